//! The leak gate: what a gauge keeps, a minute.
//!
//! A slope through all samples lies: a saw-tooth, a warm-up and requests in flight all bend it (`statistics.md`). So
//! only *quiet* stretches are compared, the baselines and the settled part of the recoveries, by their floors. What the
//! gauge grew from the first floor to the last is what it kept. It is given these allowances:
//!
//! - **give-back**: as much as the gauge was seen to fall within and between quiet stretches, it may fall again. This
//!   covers noise and saw-teeth, in both directions.
//! - **one step**: the largest lasting rise within a few seconds is taken for a warm-up, and fails nothing. It still
//!   counts against a pass.
//! - **chance**: leaks come one by one, so a count of them scatters like any count (Poisson).

use super::{SLACK, Scope, Span, share, time, trimmed};
use crate::{
    event::{Finding, Outcome, Phase},
    plan,
    stats::{self, ALPHA_BLOCK, ALPHA_PASS},
};

/// Fewest seconds between the first quiet sample and the last.
pub(super) const MIN_SECONDS: f64 = 90.0;

/// Fewest samples of a quiet stretch.
const MIN_SAMPLES: usize = 3;

/// Seconds after a fault in which requests in flight drain.
const SETTLE: f64 = 2.0;

/// By how much the largest fall seen is stretched, as it is not the largest to come.
const GIVE_BACK: f64 = 2.0;

/// With fewer quiet stretches than this, what happens within faults is looked at too.
const FEW_STRETCHES: usize = 4;

/// Judges whether the gauge keeps at most `limit` a minute.
pub(super) fn judge(scope: &Scope<'_>, probe: &str, limit: f64) -> Finding {
    let mut finding = scope.finding("leak", probe, limit, "per_minute");
    let Some(seen) = scope.probe(probe) else {
        finding.reason = format!("there is no probe {probe}");
        return finding;
    };
    let every = match scope.plan.probes.get(probe) {
        Some(plan::Probe::Scrape(scrape)) => scrape.every.as_secs_f64(),
        _ => 1.0,
    };
    let spans: Vec<Span> =
        [Phase::Baseline, Phase::Fault, Phase::Recovery].iter().flat_map(|p| scope.spans(*p)).collect();
    let inside = |at: f64| spans.iter().any(|s| s.holds(at));
    let samples: Vec<(f64, f64)> = seen.values.iter().copied().filter(|(at, _)| inside(*at)).collect();
    finding.samples = samples.len() as u64;
    if samples.is_empty() {
        let why = seen.failures.last().map(|(_, why)| format!(": {why}")).unwrap_or_default();
        finding.reason = format!("there are no samples{why}");
        return finding;
    }
    if seen.rate {
        // As fast as ever is what a counter of leaks says, too.
        finding.reason =
            format!("{probe} is a counter, whose rate says nothing of what is kept: watch a gauge");
        return finding;
    }
    let stretches = quiet(scope, &samples);
    // From the baseline on to the end of the fault, which is before what is in flight drains.
    let held = scope.rounds.iter().filter_map(|r| {
        let (from, to) = (scope.span(Phase::Baseline, *r)?.from, scope.span(Phase::Fault, *r)?.to);
        Some(samples.iter().copied().filter(|(at, _)| (from - 1e-6..=to).contains(at)).collect())
    });
    let held: Vec<Vec<(f64, f64)>> = held.collect();
    let Some(kept) = Kept::of(&samples, &stretches, &held) else {
        finding.reason = format!(
            "there are not two quiet stretches with {MIN_SAMPLES} samples each to compare; \
             give the round a longer baseline and recovery"
        );
        return finding;
    };
    finding.value = Some(kept.growth / kept.minutes);
    finding.interval = Some((Some(kept.lower() / kept.minutes), Some(kept.upper() / kept.minutes)));

    let times: Vec<f64> = samples.iter().map(|(at, _)| *at).collect();
    let mut doubts: Vec<String> = share::missing_samples(seen, &times, &spans, every).into_iter().collect();
    doubts.extend(super::reset_in(seen, &spans));
    if kept.seconds < MIN_SECONDS - 1e-6 {
        doubts.push(format!(
            "{} of usable samples are too few for a slope; hold at least {} longer",
            time(kept.seconds),
            time((MIN_SECONDS - kept.seconds).ceil())
        ));
    }
    if !doubts.is_empty() {
        finding.reason = doubts.join("; ");
        return finding;
    }
    let allowed = limit * kept.minutes;
    finding.p = Some(stats::poisson_at_least(kept.surely(), allowed));
    let figures = format!(
        "from {} to {} in {}, where {} may be kept",
        trimmed(kept.first, 1),
        trimmed(kept.last, 1),
        time(kept.minutes * 60.0),
        trimmed(allowed, 1)
    );
    if kept.lower() > allowed {
        finding.outcome = Outcome::Fail;
        finding.since = kept.passed(&samples, allowed).and_then(|at| scope.since_fault(at));
        finding.reason = format!("the quiet level grew {figures}");
    } else if kept.upper() <= allowed {
        match scope.idle() {
            None => {
                finding.outcome = Outcome::Pass;
                finding.reason = format!("the quiet level went {figures}");
            }
            Some(idle) => finding.reason = idle,
        }
    } else {
        let noise = if kept.give_back > 0.0 {
            format!(" (by itself it may go up and down by {})", trimmed(kept.give_back, 1))
        } else {
            String::new()
        };
        let step = if kept.growth - kept.step <= allowed && kept.growth > allowed {
            "; most of it in one step, which may be a warm-up: repeat the round, or warm the service up first"
        } else {
            ""
        };
        finding.reason = format!("the quiet level went {figures}{noise}{step}; {}", kept.more(limit));
    }
    finding
}

/// The quiet samples, one list for each stretch between faults.
fn quiet(scope: &Scope<'_>, samples: &[(f64, f64)]) -> Vec<Vec<(f64, f64)>> {
    let mut stretches: Vec<Vec<(f64, f64)>> = vec![Vec::new()];
    let mut rounds = scope.rounds.clone();
    rounds.sort_unstable();
    for round in rounds {
        let within = |from: f64, to: f64| {
            samples.iter().copied().filter(move |(at, _)| (from - 1e-6..=to + SLACK).contains(at))
        };
        if let Some(baseline) = scope.span(Phase::Baseline, round)
            && let Some(stretch) = stretches.last_mut()
        {
            // A sample at the very end may see the fault already.
            stretch.extend(within(baseline.from, baseline.to - SLACK));
        }
        if scope.span(Phase::Fault, round).is_some() {
            stretches.push(Vec::new());
        }
        if let (Some(recovery), Some(ended)) = (scope.span(Phase::Recovery, round), scope.fault_ended(round))
            && let Some(stretch) = stretches.last_mut()
        {
            stretch.extend(within(recovery.from.max(ended + SETTLE), recovery.to));
        }
    }
    stretches.retain(|s| s.len() >= MIN_SAMPLES);
    for stretch in &mut stretches {
        stretch.dedup_by(|a, b| a.0 <= b.0);
    }
    stretches
}

/// What a gauge kept from its first quiet stretch to its last.
struct Kept {
    first: f64,
    last: f64,
    growth: f64,
    /// Between the two.
    minutes: f64,
    /// From the first quiet sample to the last.
    seconds: f64,
    give_back: f64,
    step: f64,
}

impl Kept {
    fn of(samples: &[(f64, f64)], stretches: &[Vec<(f64, f64)>], held: &[Vec<(f64, f64)>]) -> Option<Self> {
        let [head, .., tail] = stretches else { return None };
        let floors: Vec<f64> = stretches.iter().map(|s| floor(s)).collect();
        let (first, last) = (floors[0], floors[floors.len() - 1]);
        let middle = |s: &[(f64, f64)]| s.iter().map(|(at, _)| at).sum::<f64>() / s.len() as f64;
        let minutes = (middle(tail) - middle(head)) / 60.0;
        let seconds = tail.last()?.0 - head.first()?.0;
        let values = |s: &Vec<(f64, f64)>| s.iter().map(|(_, v)| *v).collect::<Vec<_>>();
        let falls = stretches.iter().map(|s| largest_fall(&values(s)));
        let quiet = GIVE_BACK * falls.fold(largest_fall(&floors), f64::max);
        // Few stretches are few chances to be seen falling, so falls up to the end of a fault count too, as they are: requests in
        // flight make them larger already.
        let give_back = if stretches.len() < FEW_STRETCHES {
            held.iter().map(|s| largest_fall(&values(s))).fold(quiet, f64::max)
        } else {
            quiet
        };
        let step = largest_step(samples, last, (minutes * 60.0 / 20.0).max(5.0));
        (minutes > 0.0).then_some(Self {
            first,
            last,
            growth: last - first,
            minutes,
            seconds,
            give_back,
            step,
        })
    }

    /// Growth that neither noise nor a warm-up explains.
    fn surely(&self) -> f64 {
        self.growth - self.step - self.give_back
    }

    fn lower(&self) -> f64 {
        let surely = self.surely();
        if surely <= 0.0 { surely } else { stats::poisson_lower(surely, ALPHA_BLOCK) }
    }

    fn upper(&self) -> f64 {
        stats::poisson_upper(self.growth, ALPHA_PASS) + self.give_back
    }

    /// When the level first was past what may be kept, for good.
    fn passed(&self, samples: &[(f64, f64)], allowed: f64) -> Option<f64> {
        let kept = envelope(samples, self.last);
        kept.iter().find(|(_, v)| *v > self.first + allowed).map(|(at, _)| *at)
    }

    /// What would decide.
    fn more(&self, limit: f64) -> String {
        let factors = (1..=16).map(|i| 1.25_f64.powi(i));
        // The same as comparing the ends of the interval with the limit, without having to look for those ends.
        let decided = |factor: &f64| {
            let (growth, allowed) = (self.growth.max(0.0) * factor, limit * self.minutes * factor);
            let over = growth - self.step - self.give_back;
            stats::poisson_at_least(over, allowed) < ALPHA_BLOCK
                || 1.0 - stats::poisson_at_least(growth + 1.0, allowed - self.give_back) <= ALPHA_PASS
        };
        match factors.into_iter().find(decided) {
            Some(factor) => format!("hold at least {} to decide", time((self.seconds * factor).ceil())),
            None => "only less noise, or more load with a limit to match, would decide".into(),
        }
    }
}

/// The lower quartile: low enough to pass over what drains, without hanging on a single sample.
fn floor(stretch: &[(f64, f64)]) -> f64 {
    let mut values: Vec<f64> = stretch.iter().map(|(_, v)| *v).collect();
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) / 4]
}

fn largest_fall(values: &[f64]) -> f64 {
    let mut top = f64::NEG_INFINITY;
    values.iter().fold(0.0, |fall, v| {
        top = top.max(*v);
        fall.max(top - v)
    })
}

/// What is never given back later: at each time the least value from there on, at most the last floor.
fn envelope(samples: &[(f64, f64)], last: f64) -> Vec<(f64, f64)> {
    let mut least = last;
    let mut kept: Vec<_> = samples
        .iter()
        .rev()
        .map(|(at, v)| {
            least = least.min(*v);
            (*at, least)
        })
        .collect();
    kept.reverse();
    kept
}

/// The largest lasting rise within `width` seconds.
fn largest_step(samples: &[(f64, f64)], last: f64, width: f64) -> f64 {
    let kept = envelope(samples, last);
    let mut from = 0;
    let mut step = 0.0_f64;
    for (at, v) in &kept {
        while kept[from].0 < at - width - SLACK {
            from += 1;
        }
        step = step.max(v - kept[from].1);
    }
    step
}
