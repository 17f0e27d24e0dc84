//! The latency gate: a percentile of a load probe, or of a scraped histogram, while faults are held.
//!
//! "p95 is at most 800 ms" is the same as "at most 5 % take longer than 800 ms", and a share has an honest interval.
//! A request that failed, however fast, counts as one that took longer. That is at least as strict as to judge the
//! good answers alone, whose share of slow ones is never larger, so both are judged in one.

use std::collections::BTreeMap;

use super::{
    SLACK, Scope, Span,
    share::{self, Block, Counted},
    time,
};
use crate::{
    event::{Finding, LoadBin, Outcome, Phase},
    fold::Probe,
    plan,
    stats::{self, ALPHA_BLOCK, ALPHA_PASS, Share},
};

/// Judges whether the percentile is at most `limit` seconds.
pub(super) fn judge(scope: &Scope<'_>, probe: &str, percentile: f64, limit: f64) -> Finding {
    let subject = format!("{probe} p{}", super::trimmed(percentile * 100.0, 4));
    let finding = scope.finding("latency", &subject, limit, "seconds");
    match (scope.plan.probes.get(probe), scope.probe(probe)) {
        (Some(plan::Probe::Scrape(scrape)), Some(seen)) => {
            of_histogram(scope, finding, seen, scrape.every.as_secs_f64(), percentile, limit)
        }
        _ => of_load(scope, finding, probe, percentile, limit),
    }
}

// ---- load ----------------------------------------------------------------------------------------------------------

fn of_load(scope: &Scope<'_>, mut finding: Finding, probe: &str, percentile: f64, limit: f64) -> Finding {
    let allowed = 1.0 - percentile;
    let counted = Counted::of_load(scope, probe, |bin| block(bin, limit));
    let bad = format!("took longer than {} or failed", time(limit));
    share::decide(scope, &mut finding, &counted, allowed, &bad);

    let bins = |phase| -> Vec<&LoadBin> {
        scope.spans(phase).iter().flat_map(|s| scope.run.bins(probe, (s.from, s.to))).collect()
    };
    let fault = bins(Phase::Fault);
    finding.value = value(&fault, percentile, limit);
    finding.baseline = value(&bins(Phase::Baseline), percentile, limit);
    finding.interval = (!fault.is_empty()).then(|| interval(&fault, allowed, limit, finding.outcome));
    let good = stats::quantile(&merged(&fault, |b| &b.ok_latency), percentile);
    if let (Outcome::Fail, Some(good)) = (finding.outcome, good) {
        let good = time(good as f64 / 1e6);
        finding.reason += &format!("; the good answers alone have a p{} of {good}", percentile * 100.0);
    }
    finding
}

/// Counts the requests of a bin that took longer than `limit` or failed. Latency counts from the time a request was due,
/// so that a late generator makes the service look slower, never faster: that may fail to pass, and is excused to fail.
/// A dropped request was never sent, so it fails nothing.
fn block(bin: &LoadBin, limit: f64) -> Block {
    let slow: u64 = bin.ok_latency.iter().filter(|(us, _)| *us as f64 / 1e6 > limit).map(|(_, n)| n).sum();
    let bad = slow + bin.failed.values().sum::<u64>();
    let excused = bad.saturating_sub(bin.dropped).saturating_sub(bin.late);
    Block {
        start: bin.start,
        seen: (bad as f64, bin.due as f64),
        best: (excused as f64, (bin.due - bin.dropped) as f64),
        worst: (bad as f64, bin.due as f64),
    }
}

fn merged(bins: &[&LoadBin], latency: fn(&LoadBin) -> &Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut counts = BTreeMap::new();
    for (us, n) in bins.iter().flat_map(|b| latency(b)) {
        *counts.entry(*us).or_insert(0) += n;
    }
    counts.into_iter().collect()
}

/// The percentile in seconds, failed requests being slower than all good ones. Where it falls among those, it is the
/// time they took, if that is past the limit; what failed faster has no latency to show.
fn value(bins: &[&LoadBin], percentile: f64, limit: f64) -> Option<f64> {
    let mut counts = merged(bins, |b| &b.ok_latency);
    let good = counts.len();
    counts.extend(merged(bins, |b| &b.failed_latency));
    let dropped: u64 = bins.iter().map(|b| b.dropped).sum();
    let ranked: Vec<_> =
        counts.iter().enumerate().map(|(i, (_, n))| (i, *n)).chain([(counts.len(), dropped)]).collect();
    let at = stats::quantile(&ranked, percentile)?;
    let seconds = counts.get(at)?.0 as f64 / 1e6;
    (at < good || seconds > limit).then_some(seconds)
}

/// Interval of the percentile, seconds: the latencies whose share of slower requests may be the one allowed. An end
/// among failed requests is open.
fn interval(bins: &[&LoadBin], allowed: f64, limit: f64, outcome: Outcome) -> (Option<f64>, Option<f64>) {
    let latencies: Vec<f64> =
        merged(bins, |b| &b.ok_latency).iter().map(|(us, _)| *us as f64 / 1e6).collect();
    let share = |limit: f64, f: fn(&Block) -> (f64, f64)| Share::of(bins.iter().map(|b| f(&block(b, limit))));
    let may_be_below = |at: &f64| share(*at, |b| b.best).is_none_or(|s| s.lower(ALPHA_BLOCK) <= allowed);
    let is_below = |at: &f64| share(*at, |b| b.worst).is_some_and(|s| s.upper(ALPHA_PASS) <= allowed);
    let low = latencies.get(latencies.partition_point(|at| !may_be_below(at))).copied();
    let high = latencies.get(latencies.partition_point(|at| !is_below(at))).copied();
    match outcome {
        // Between two recorded latencies lies the limit; the ends never contradict the outcome.
        Outcome::Pass => (low.map(|l| l.min(limit)), high.map(|h| h.min(limit))),
        Outcome::Fail => (Some(low.map_or(limit, |l| l.max(limit))), high.map(|h| h.max(limit))),
        Outcome::Inconclusive => (low, high),
    }
}

// ---- histogram -----------------------------------------------------------------------------------------------------

/// Least share of the observations a second of the baseline that there must be while a fault is held.
const FEWEST: f64 = 0.9;

/// What was added to each bucket: upper bound (none is infinite) and count.
type Buckets = Vec<(Option<f64>, u64)>;

fn of_histogram(
    scope: &Scope<'_>,
    mut finding: Finding,
    probe: &Probe,
    every: f64,
    percentile: f64,
    limit: f64,
) -> Finding {
    let allowed = 1.0 - percentile;
    let spans = scope.spans(Phase::Fault);
    let samples = |phase| -> Vec<(f64, &Buckets)> {
        scope.spans(phase).iter().flat_map(|s| within(probe, s)).collect()
    };
    let (fault, baseline) = (samples(Phase::Fault), samples(Phase::Baseline));
    let block = |(at, buckets): &(f64, &Buckets)| split(*at, buckets, limit);
    let times: Vec<f64> = probe.buckets.iter().map(|(at, _)| *at).collect();
    let mut doubts: Vec<String> = share::missing_samples(probe, &times, &spans, every).into_iter().collect();
    doubts.extend(super::reset_in(probe, &spans));
    let counted = Counted {
        fault: fault.iter().map(block).filter(|b| b.seen.1 > 0.0).collect(),
        baseline: baseline.iter().map(block).filter(|b| b.seen.1 > 0.0).collect(),
        doubts,
        no_pass: unseen(scope, probe).into_iter().collect(),
        noun: "observations",
        block: "scrape",
    };
    share::decide(scope, &mut finding, &counted, allowed, &format!("took longer than {}", time(limit)));

    let total = sum(&fault);
    let bounds = bucket_of(&total, percentile);
    finding.interval = bounds.map(|_| bucket_interval(&fault, &total, allowed));
    // A quantile in the last bucket is above its lower bound, and no more is known.
    finding.value = bounds.and_then(|(_, high)| high);
    finding.baseline = bucket_of(&sum(&baseline), percentile).and_then(|(_, high)| high);
    if finding.outcome == Outcome::Inconclusive
        && let Some((low, high)) = bounds
        && low < limit
        && high.is_none_or(|h| limit < h)
    {
        let high = high.map_or("infinity".into(), time);
        finding.reason += &format!(
            "; the limit lies inside the bucket from {} to {high}: give the histogram a bound at {}",
            time(low),
            time(limit)
        );
    }
    finding
}

/// Why slow requests may be missing from a histogram, if they may: it has those alone that were answered, and one that hangs is
/// not. So no fewer than before must have been, or nothing passes.
fn unseen(scope: &Scope<'_>, probe: &Probe) -> Option<String> {
    let pace = |phase| {
        let spans = scope.spans(phase);
        let inside = |pair: &&[(f64, Buckets)]| spans.iter().any(|span| covers(span, pair));
        let (mut count, mut seconds) = (0, 0.0);
        for pair in probe.buckets.windows(2).filter(inside) {
            count += pair[1].1.iter().map(|(_, n)| n).sum::<u64>();
            seconds += pair[1].0 - pair[0].0;
        }
        (seconds > 0.0).then_some(count as f64 / seconds)
    };
    let (before, now) = (pace(Phase::Baseline)?, pace(Phase::Fault)?);
    (now < before * FEWEST).then(|| {
        format!(
            "{} observations a second were made, {} before the fault: what hangs is in no histogram; judge a load probe, or send \
             as much as before",
            super::trimmed(now, 1),
            super::trimmed(before, 1)
        )
    })
}

/// The samples that cover nothing but a span: taken in it, as was the one before.
fn within<'a>(probe: &'a Probe, span: &Span) -> Vec<(f64, &'a Buckets)> {
    probe.buckets.windows(2).filter(|w| covers(span, w)).map(|w| (w[0].0, &w[1].1)).collect()
}

fn covers(span: &Span, pair: &[(f64, Buckets)]) -> bool {
    pair[0].0 >= span.from - 1e-6 && pair[1].0 <= span.to + SLACK
}

/// Splits a sample at the limit. What lies in the bucket around it is in doubt.
fn split(start: f64, buckets: &Buckets, limit: f64) -> Block {
    let (mut all, mut above, mut not_below, mut low) = (0.0, 0.0, 0.0, f64::NEG_INFINITY);
    for (high, n) in buckets {
        let n = *n as f64;
        all += n;
        if low >= limit {
            above += n;
        }
        if high.is_none_or(|high| high > limit) {
            not_below += n;
        }
        low = high.unwrap_or(f64::INFINITY);
    }
    Block { start, seen: (not_below, all), best: (above, all), worst: (not_below, all) }
}

/// Lower end: the highest bound that the percentile is surely above. Upper end: the lowest it is surely not above.
fn bucket_interval(samples: &[(f64, &Buckets)], total: &Buckets, allowed: f64) -> (Option<f64>, Option<f64>) {
    let share = |bound: f64| Share::of(samples.iter().map(|(at, buckets)| split(*at, buckets, bound).worst));
    let bounds = || total.iter().filter_map(|(bound, _)| *bound);
    let low = bounds().rfind(|b| share(*b).is_some_and(|s| s.lower(ALPHA_BLOCK) > allowed));
    let high = bounds().find(|b| share(*b).is_some_and(|s| s.upper(ALPHA_PASS) <= allowed));
    (Some(low.unwrap_or(0.0)), high)
}

fn sum(samples: &[(f64, &Buckets)]) -> Buckets {
    let mut total: Buckets = Vec::new();
    for (_, buckets) in samples {
        for (bound, n) in *buckets {
            match total.iter_mut().find(|(b, _)| b == bound) {
                Some((_, count)) => *count += n,
                None => total.push((*bound, *n)),
            }
        }
    }
    total.sort_by(|a, b| a.0.unwrap_or(f64::INFINITY).total_cmp(&b.0.unwrap_or(f64::INFINITY)));
    total
}

/// The bucket a quantile lies in: its bounds; the last one has no upper bound.
fn bucket_of(buckets: &Buckets, q: f64) -> Option<(f64, Option<f64>)> {
    let counts: Vec<(usize, u64)> = buckets.iter().enumerate().map(|(i, (_, n))| (i, *n)).collect();
    let at = stats::quantile(&counts, q)?;
    let low = at.checked_sub(1).and_then(|below| buckets[below].0).unwrap_or(0.0);
    Some((low, buckets[at].0))
}
