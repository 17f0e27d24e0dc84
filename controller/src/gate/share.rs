//! Judging a share of bad outcomes over blocks of time: what the latency and the errors gate have in common.

use super::{MAX_MISSING, Scope, counted, percent, time};
use crate::{
    event::{Finding, LoadBin, Outcome, Phase},
    fold::Probe,
    stats::{ALPHA_BLOCK, ALPHA_PASS, MIN_BLOCKS, Share},
};

/// Share of requests that the generator may drop: what was never sent was never measured.
const MAX_DROPPED: f64 = 0.001;

/// Share of requests that the generator may send late. Lateness is part of the latency for a pass, and an excuse where
/// the service fails, so it cannot bend an outcome; but past this share the load was not the one asked for.
const MAX_LATE: f64 = 0.05;

/// Error rate of calling a baseline bad.
const ALPHA_BASELINE: f64 = 0.05;

/// Outcomes of one block of time, counted twice. Where the tool itself is at fault or cannot tell, `best` gives the
/// service the benefit of the doubt and `worst` none: it fails only on its best count and passes only on its worst.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Block {
    /// Start of the block, seconds since the start of the run.
    pub(super) start: f64,
    /// As measured: bad, all.
    pub(super) seen: (f64, f64),
    /// With the benefit of the doubt: bad, all.
    pub(super) best: (f64, f64),
    /// Without: bad, all.
    pub(super) worst: (f64, f64),
}

/// What was counted while faults were held, and before.
pub(super) struct Counted {
    pub(super) fault: Vec<Block>,
    pub(super) baseline: Vec<Block>,
    /// Why nothing may be concluded from it.
    pub(super) doubts: Vec<String>,
    /// Why nothing may pass on it.
    pub(super) no_pass: Vec<String>,
    /// What is counted: `requests`.
    pub(super) noun: &'static str,
    /// What a block of time is called: `second`.
    pub(super) block: &'static str,
}

impl Counted {
    /// The bins of a load probe, each counted by `block`.
    pub(super) fn of_load(scope: &Scope<'_>, probe: &str, block: impl Fn(&LoadBin) -> Block) -> Self {
        let blocks = |phase| -> Vec<Block> {
            let spans = scope.spans(phase);
            let bins = spans.iter().flat_map(|s| scope.run.bins(probe, (s.from, s.to)));
            bins.filter(|b| b.due > 0).map(&block).collect()
        };
        let (mut doubts, mut no_pass) = (Vec::new(), Vec::new());
        let spans = scope.spans(Phase::Fault);
        // A phase that does not start on a whole second loses a bin at its start.
        let expected: f64 =
            spans.iter().map(|s| ((s.to + 1e-6).floor() - (s.from - 1e-6).ceil()).max(0.0)).sum();
        let bins: Vec<_> = spans.iter().flat_map(|s| scope.run.bins(probe, (s.from, s.to))).collect();
        let missing = expected - bins.len() as f64;
        if missing > expected * MAX_MISSING {
            doubts.push(format!("the probe gave no figures for {missing:.0} of {expected:.0} seconds"));
        }
        let sum = |f: fn(&LoadBin) -> u64| bins.iter().map(|b| f(b)).sum::<u64>();
        let (due, late, dropped) = (sum(|b| b.due), sum(|b| b.late), sum(|b| b.dropped));
        if late as f64 > due as f64 * MAX_LATE {
            no_pass.push(format!(
                "the load generator sent {late} of {due} requests late ({}); give it more CPU or ask for a lower rate",
                percent(late as f64 / due as f64)
            ));
        }
        if dropped as f64 > due as f64 * MAX_DROPPED {
            no_pass.push(format!(
                "the load generator could not send {dropped} of {due} requests, as too many were in flight"
            ));
        }
        let (fault, baseline) = (blocks(Phase::Fault), blocks(Phase::Baseline));
        Self { fault, baseline, doubts, no_pass, noun: "requests", block: "second" }
    }

    /// Interval of the share while faults were held: lower and upper end.
    pub(super) fn interval(&self) -> Option<(f64, f64)> {
        let share = |f: fn(&Block) -> (f64, f64)| Share::of(self.fault.iter().map(f));
        let lower = share(|b| b.best).map_or(0.0, |b| b.lower(ALPHA_BLOCK));
        Some((lower, share(|b| b.worst)?.upper(ALPHA_PASS)))
    }
}

/// Decides whether the share of bad outcomes is at most `limit`, and puts outcome, p-value, samples and reason into
/// the finding. `bad` says what a bad outcome is, as in `took longer than 800ms or failed`.
pub(super) fn decide(scope: &Scope<'_>, finding: &mut Finding, counted: &Counted, limit: f64, bad: &str) {
    let pick = |blocks: &[Block], f: fn(&Block) -> (f64, f64)| Share::of(blocks.iter().map(f));
    let fault = &counted.fault;
    let noun = counted.noun;
    let (Some(seen), Some(worst)) = (pick(fault, |b| b.seen), pick(fault, |b| b.worst)) else {
        finding.reason = join(&counted.doubts, "there are no samples from the time of the fault");
        return;
    };
    let best = pick(fault, |b| b.best);
    finding.samples = seen.n as u64;
    finding.since =
        fault.iter().find(|b| b.seen.0 > b.seen.1 * limit).and_then(|b| scope.since_fault(b.start));

    let mut doubts = counted.doubts.clone();
    if fault.len() < MIN_BLOCKS {
        doubts.push(format!(
            "{} too few to see how much they scatter; hold the fault for at least {MIN_BLOCKS}",
            match fault.len() {
                1 => format!("1 {} is", counted.block),
                n => format!("{n} {}s are", counted.block),
            }
        ));
    }
    match pick(&counted.baseline, |b| b.best) {
        None => doubts.push("there is no baseline to compare with; give the round one".into()),
        Some(base) if base.estimate() > limit && base.p_above(limit) < ALPHA_BASELINE => {
            doubts.push(format!(
                "bad baseline: before the fault {} of {noun} {bad} already ({} may)",
                percent(base.estimate()),
                percent(limit)
            ));
        }
        Some(_) => {}
    }
    doubts.extend(scope.idle());

    let (lower, upper) = counted.interval().unwrap_or((0.0, 1.0));
    let figures =
        format!("{} of {:.0} {noun} {bad} ({} may)", percent(seen.estimate()), seen.n, percent(limit));
    if !doubts.is_empty() {
        finding.reason = join(&doubts, "");
        return;
    }
    finding.p = Some(best.map_or(1.0, |b| b.p_above(limit)));
    if lower > limit {
        finding.outcome = Outcome::Fail;
        finding.reason = format!("{figures}; at least {} do, with 99% confidence", percent(lower));
    } else if !counted.no_pass.is_empty() {
        finding.reason = join(&counted.no_pass, "");
    } else if upper <= limit {
        finding.outcome = Outcome::Pass;
        finding.reason = format!("{figures}; at most {} do, with 99.9% confidence", percent(upper));
    } else {
        let ends = format!("the true share may be {} to {}", percent(lower), percent(upper));
        finding.reason = format!("{figures}, but {ends}; {}", more(&worst, best.as_ref(), limit, scope));
    }
}

/// What would decide a share that spans the limit.
fn more(worst: &Share, best: Option<&Share>, limit: f64, scope: &Scope<'_>) -> String {
    let held: f64 = scope.spans(Phase::Fault).iter().map(super::Span::seconds).sum();
    let decided = |factor: f64| {
        worst.longer(factor).upper(ALPHA_PASS) <= limit
            || best.is_some_and(|b| b.longer(factor).lower(ALPHA_BLOCK) > limit)
    };
    let factors = (1..=20).map(|i| 1.25_f64.powi(i));
    match factors.into_iter().find(|f| decided(*f)) {
        Some(factor) => format!(
            "hold the fault {} in all, or ask for {} times the load, to decide",
            time((held * factor).ceil()),
            super::trimmed((factor * 10.0).ceil() / 10.0, 1)
        ),
        None => "it is so close to the limit that no reasonable time would decide".into(),
    }
}

/// The samples of a scrape or agent probe in some spans: why too many are missing, if they are. `every` is the time
/// between samples.
pub(super) fn missing_samples(
    probe: &Probe,
    times: &[f64],
    spans: &[super::Span],
    every: f64,
) -> Option<String> {
    let inside = |at: f64| spans.iter().any(|s| s.holds(at));
    let got = times.iter().filter(|t| inside(**t)).count();
    let failures: Vec<_> = probe.failures.iter().filter(|(at, _)| inside(*at)).collect();
    // One sample may fall on either side of each edge.
    let expected: f64 = spans.iter().map(|s| ((s.seconds() / every).floor() - 1.0).max(0.0)).sum();
    let missing = (expected - got as f64).max(failures.len() as f64).max(0.0);
    if missing <= (expected * MAX_MISSING).max(0.0) {
        return None;
    }
    let why = failures.last().map(|(_, why)| format!(", the last one because {why}")).unwrap_or_default();
    let seconds: f64 = spans.iter().map(super::Span::seconds).sum();
    Some(format!("{} missing in {}{why}", counted(missing as usize, "sample"), time(seconds)))
}

/// Reasons as one sentence.
pub(super) fn join(reasons: &[String], or: &str) -> String {
    if reasons.is_empty() { or.into() } else { reasons.join("; ") }
}
