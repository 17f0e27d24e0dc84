//! The recovery gate: how long after the fault the steady state of a load probe holds again.
//!
//! Time is counted to the first of [`RUN`] good seconds in a row, and is known to one second. A second is good where
//! neither its latencies nor its errors are beyond what the round's own gates on that probe allow; for what they do
//! not limit, beyond what the baseline showed. "Beyond" allows for chance, or noise would delay every recovery.

use super::{Scope, Span, counted, percent, time};
use crate::{
    event::{Finding, LoadBin, Outcome, Phase},
    plan::Gate,
    stats,
};

/// Good seconds in a row that make a steady state.
pub(super) const RUN: usize = 3;

/// Chance of calling a second bad that only looks worse than the limit.
const ALPHA_BIN: f64 = 0.05;

/// Share of the baseline's seconds that must look good, or the measure does not fit the service.
const GOOD_BASELINE: f64 = 0.8;

/// Share of requests that may fail in a steady state, whatever the baseline shows or a gate allows.
const MOST_ERRORS: f64 = 0.05;

/// Judges whether the steady state holds again within so many seconds; over the whole run, in every round.
pub(super) fn judge(scope: &Scope<'_>, probe: &str, within: f64) -> Finding {
    let mut finding = scope.finding("recovery", probe, within, "seconds");
    let rounds: Vec<_> = scope.rounds.iter().map(|r| (*r, judge_one(scope, probe, within, *r))).collect();
    // The worst round speaks for all: a failure, then what is open, then the slowest.
    let worst = rounds.iter().max_by(|(_, a), (_, b)| {
        let rank = |o: &One| match o.outcome {
            Outcome::Fail => 2,
            Outcome::Inconclusive => 1,
            Outcome::Pass => 0,
        };
        rank(a)
            .cmp(&rank(b))
            .then(a.value.unwrap_or(f64::INFINITY).total_cmp(&b.value.unwrap_or(f64::INFINITY)))
    });
    let Some((round, worst)) = worst else {
        finding.reason = "no round was run".into();
        return finding;
    };
    finding.outcome = worst.outcome;
    finding.value = worst.value;
    finding.interval = worst.interval;
    finding.samples = rounds.iter().map(|(_, one)| one.samples).sum();
    finding.reason = worst.reason.clone();
    if scope.name.is_none() && rounds.len() > 1 {
        let name = scope.plan.rounds.get(*round).map_or("", |r| &r.name);
        finding.reason = format!("in round {name}: {}", worst.reason);
    }
    finding
}

/// Whether the steady state of a probe holds again in a round, as far as has been seen.
pub(super) fn recovered(scope: &Scope<'_>, probe: &str, round: usize) -> bool {
    let (Some(ended), Some(good)) = (scope.fault_ended(round), Good::of(scope, probe, round)) else {
        return false;
    };
    first_run(&after(scope, probe, round, ended), &good).is_some_and(|run| run.complete)
}

/// What one round says.
struct One {
    outcome: Outcome,
    value: Option<f64>,
    interval: Option<(Option<f64>, Option<f64>)>,
    samples: u64,
    reason: String,
}

fn judge_one(scope: &Scope<'_>, probe: &str, within: f64, round: usize) -> One {
    let mut one = One {
        outcome: Outcome::Inconclusive,
        value: None,
        interval: None,
        samples: 0,
        reason: String::new(),
    };
    let scope = &Scope { run: scope.run, plan: scope.plan, rounds: vec![round], name: scope.name };
    let Some(ended) = scope.fault_ended(round) else {
        one.reason = "the round never came to its recovery".into();
        return one;
    };
    let bins = after(scope, probe, round, ended);
    one.samples = bins.iter().map(|b| b.due).sum();
    let Some(good) = Good::of(scope, probe, round) else {
        one.reason = "there is no baseline that says what the steady state is; give the round one".into();
        return one;
    };
    if let Some(why) = good.misfit(scope, probe, round) {
        one.reason = why;
        return one;
    }
    if let Some(why) = scope.idle() {
        one.reason = why;
        return one;
    }
    let Some(last) = bins.last() else {
        one.reason = "there are no samples from after the fault; give the round a longer recovery".into();
        return one;
    };
    let gaps = (last.start - bins[0].start).round() as usize + 1 - bins.len();
    if gaps > 0 || bins[0].start > ended.ceil() + 0.5 {
        one.reason = format!("the probe gave no figures for {}", counted(gaps.max(1), "second"));
        return one;
    }
    let watched = last.start + 1.0 - ended;
    let steady = format!("{RUN} good seconds in a row");
    match first_run(&bins, &good) {
        Some(run) if run.complete => {
            let low = (run.start - 1.0 - ended).max(0.0);
            let low = if run.index == 0 { 0.0 } else { low };
            let high = if run.start > ended { run.start - ended } else { run.start + 1.0 - ended };
            let high = if run.index == 0 { high.max(1.0) } else { high };
            one.value = Some(high);
            one.interval = Some((Some(low), Some(high)));
            let took = format!("{steady} began {} after the fault ended", between(low, high));
            if high <= within {
                one.outcome = Outcome::Pass;
                one.reason = took;
            } else if low >= within {
                one.outcome = Outcome::Fail;
                one.reason = format!("{took}, later than {}", time(within));
            } else {
                one.reason = format!("{took}, which is not to be told from {}", time(within));
            }
        }
        begun => {
            let bad_until = begun.map_or(watched, |run| (run.start - ended).max(0.0));
            one.interval = Some((Some(bad_until), None));
            if bad_until >= within {
                one.outcome = Outcome::Fail;
                one.reason = format!(
                    "not recovered in the {} that were watched, longer than {}: {}",
                    time(watched),
                    time(within),
                    good.why_bad(last)
                );
            } else {
                one.reason = format!(
                    "not recovered in the {} that were watched; give the round a recovery of at least {}",
                    time(watched),
                    time((within + RUN as f64).ceil())
                );
            }
        }
    }
    one
}

fn between(low: f64, high: f64) -> String {
    if low > 0.0 { format!("{} to {}", time(low), time(high)) } else { format!("at most {}", time(high)) }
}

/// The bins of a round from the second in which the fault ended on, up to the next round.
fn after<'a>(scope: &Scope<'a>, probe: &str, round: usize, ended: f64) -> Vec<&'a LoadBin> {
    let to = scope.run.rounds.get(round).and_then(|r| r.finished).unwrap_or(f64::INFINITY);
    scope.run.bins(probe, (ended.floor(), to))
}

/// A run of good seconds.
struct GoodRun {
    /// Index of its first bin.
    index: usize,
    /// Start of its first bin.
    start: f64,
    /// Whether it is long enough; where not, it reaches to the last bin seen.
    complete: bool,
}

/// The first run that is long enough, or else the one that is under way.
fn first_run(bins: &[&LoadBin], good: &Good) -> Option<GoodRun> {
    let mut index = 0;
    while index < bins.len() {
        let length = bins[index..].iter().take(RUN).take_while(|b| good.holds(b)).count();
        let complete = length == RUN;
        if complete || (length > 0 && index + length == bins.len()) {
            return Some(GoodRun { index, start: bins[index].start, complete });
        }
        index += length + 1;
    }
    None
}

/// What a good second is.
struct Good {
    /// Latency in seconds, and the share of requests that may take longer or fail.
    latency: Vec<(f64, f64)>,
    /// Share of requests that may fail.
    errors: f64,
}

impl Good {
    /// From the gates of the round on this probe, and for the rest from its baseline. None without a baseline.
    fn of(scope: &Scope<'_>, probe: &str, round: usize) -> Option<Self> {
        let bins = baseline(scope, probe, round);
        let due: u64 = bins.iter().map(|b| b.due).sum();
        if due == 0 {
            return None;
        }
        let planned = scope.plan.rounds.get(round)?;
        let mut latency: Vec<(f64, f64)> = Vec::new();
        let mut errors: Option<f64> = None;
        for gate in planned.gates.iter().chain(&scope.plan.gates) {
            match gate {
                Gate::Latency { probe: p, percentile, limit } if p == probe => {
                    latency.push((*limit, 1.0 - percentile));
                }
                Gate::Errors { probe: p, limit } if p == probe => {
                    errors = Some(errors.map_or(*limit, |e| e.min(*limit)));
                }
                _ => {}
            }
        }
        if latency.is_empty() {
            // Twice the p95 of the baseline: past the noise of a service that is well, well below one that is hurt.
            let mut all: Vec<(u64, u64)> = bins.iter().flat_map(|b| b.ok_latency.iter().copied()).collect();
            all.sort_unstable();
            let p95 = stats::quantile(&all, 0.95)? as f64 / 1e6;
            latency.push(((2.0 * p95).max(p95 + 0.01), 0.05));
        }
        let failed: u64 = bins.iter().map(|b| failed(b)).sum();
        let seen = stats::clopper_pearson_upper(failed as f64, due as f64, ALPHA_BIN);
        // What may fail under a fault is no measure of a service that is well.
        let errors = errors.unwrap_or(seen).min(MOST_ERRORS);
        Some(Self { latency, errors })
    }

    fn holds(&self, bin: &LoadBin) -> bool {
        let n = bin.due as f64;
        let fine = |bad: u64, limit: f64| {
            bad == 0 || (bad < bin.due && stats::binomial_at_least(bad as f64, n, limit) > ALPHA_BIN)
        };
        bin.due > 0
            && fine(failed(bin), self.errors)
            && self.latency.iter().all(|(limit, share)| fine(slow(bin, *limit) + failed(bin), *share))
    }

    fn misfit(&self, scope: &Scope<'_>, probe: &str, round: usize) -> Option<String> {
        let bins = baseline(scope, probe, round);
        let good = bins.iter().filter(|b| self.holds(b)).count();
        if good as f64 >= bins.len() as f64 * GOOD_BASELINE && good >= RUN {
            return None;
        }
        let of = counted(bins.len(), "second");
        Some(format!(
            "bad baseline: only {good} of its {of} look like a steady state, so a recovery to it cannot be seen"
        ))
    }

    fn why_bad(&self, bin: &LoadBin) -> String {
        let share = |n: u64| percent(n as f64 / bin.due.max(1) as f64);
        match self.latency.first() {
            _ if failed(bin) > 0 => format!("in the last second {} of requests failed", share(failed(bin))),
            Some((limit, _)) => {
                format!(
                    "in the last second {} of requests took longer than {}",
                    share(slow(bin, *limit)),
                    time(*limit)
                )
            }
            None => "the last second was not good".into(),
        }
    }
}

fn baseline<'a>(scope: &Scope<'a>, probe: &str, round: usize) -> Vec<&'a LoadBin> {
    let span = scope.span(Phase::Baseline, round);
    let bins = span.map(|Span { from, to, .. }| scope.run.bins(probe, (from, to))).unwrap_or_default();
    bins.into_iter().filter(|b| b.due > 0).collect()
}

fn failed(bin: &LoadBin) -> u64 {
    bin.failed.values().sum()
}

fn slow(bin: &LoadBin, limit: f64) -> u64 {
    bin.ok_latency.iter().filter(|(us, _)| *us as f64 / 1e6 > limit).map(|(_, n)| n).sum()
}
