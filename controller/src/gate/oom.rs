//! The oom gate: kills by the kernel in the target's cgroups, from the start of a round to its end.
//!
//! A kill is a fact, so there is no p-value. What could not be counted is not zero.

use super::{MAX_MISSING, SLACK, Scope, counted, time};
use crate::{
    event::{Finding, Outcome, Phase, TargetSample},
    plan,
};

/// Time between samples of a target, seconds.
const EVERY: f64 = 1.0;

/// Longest silence at the end of a round after which the sampling counts as dead, seconds.
const SILENCE: f64 = 5.0;

/// Judges whether at most `limit` processes were killed. Each round is judged from its baseline to its end.
pub(super) fn judge(scope: &Scope<'_>, target: &str, limit: u64) -> Finding {
    let mut finding = scope.finding("oom", target, limit as f64, "count");
    let nodes: Vec<_> = scope.run.targets.iter().filter(|((name, _), _)| name == target).collect();
    let (mut kills, mut known, mut doubts) = (0, false, Vec::new());
    for (index, from, to) in stretches(scope) {
        let mut sampled = false;
        for ((_, node), samples) in &nodes {
            let seen = Seen::of(samples, from, to);
            sampled |= seen.samples > 0;
            finding.samples += seen.samples as u64;
            kills += seen.kills;
            known |= seen.counted;
            if seen.kills > 0 && finding.since.is_none() {
                finding.since = seen.first.and_then(|at| scope.since_fault(at));
            }
            doubts.extend(seen.doubt(from, to).map(|why| format!("on {node} {why}")));
        }
        if !sampled {
            let round = scope.plan.rounds.get(index).map_or("", |r: &plan::Round| &r.name);
            doubts.push(format!("there is no sample of {target} from round {round}"));
        }
    }
    finding.value = known.then_some(kills as f64);
    doubts.extend(scope.idle());
    let seen = counted(kills as usize, "OOM kill");
    if kills > limit {
        finding.outcome = Outcome::Fail;
        finding.reason = format!("{seen} in the cgroups of {target} ({limit} may be)");
    } else if finding.samples == 0 {
        finding.reason = format!("there are no samples of {target}, so kills are not known");
    } else if let Some(doubt) = doubts.first() {
        finding.reason = doubt.clone();
    } else {
        finding.outcome = Outcome::Pass;
        finding.reason = format!("{seen} in the cgroups of {target}, in {} samples", finding.samples);
    }
    finding
}

/// Index, start and end of each round.
fn stretches(scope: &Scope<'_>) -> Vec<(usize, f64, f64)> {
    let round = |&index: &usize| {
        let round = scope.run.rounds.get(index)?;
        let from = *round.phases.get(&Phase::Baseline).or(round.phases.values().next())?;
        Some((index, from, round.finished.unwrap_or(scope.run.now)))
    };
    scope.rounds.iter().filter_map(round).collect()
}

/// What one node saw of the target in one stretch.
#[derive(Default)]
struct Seen {
    samples: usize,
    kills: u64,
    /// Time of the first kill.
    first: Option<f64>,
    /// Whether a count could be read at all.
    counted: bool,
    /// Samples without a count, and the first time of one.
    unknown: Option<f64>,
    vanished: Option<f64>,
    replaced: Option<f64>,
    last: f64,
}

impl Seen {
    fn of(samples: &[(f64, TargetSample)], from: f64, to: f64) -> Self {
        let mut seen = Self::default();
        // The last sample from before the stretch is what its first one is compared with.
        let before = samples.iter().rfind(|(at, _)| *at < from).map(|(_, s)| s);
        let mut count = before.and_then(|s| s.oom_kills);
        let mut generation = before.map(|s| &s.generation);
        for (at, sample) in samples.iter().filter(|(at, _)| (from..=to + SLACK).contains(at)) {
            (seen.samples, seen.last) = (seen.samples + 1, *at);
            if sample.processes == 0 {
                seen.vanished.get_or_insert(*at);
            }
            if generation.is_some_and(|g| *g != sample.generation) {
                seen.replaced.get_or_insert(*at);
            }
            generation = Some(&sample.generation);
            let Some(now) = sample.oom_kills else {
                seen.unknown.get_or_insert(*at);
                continue;
            };
            seen.counted = true;
            // A count that falls is that of a new cgroup, which starts at none.
            let added = count.map_or(0, |before| if now >= before { now - before } else { now });
            if added > 0 {
                seen.kills += added;
                seen.first.get_or_insert(*at);
            }
            count = Some(now);
        }
        seen
    }

    /// Why a count of none is not known to be none.
    fn doubt(&self, from: f64, to: f64) -> Option<String> {
        let expected = ((to - from) / EVERY).floor() - 1.0;
        if self.samples == 0 {
            // It is not on this node in this stretch; whether it is on any is for the caller.
            None
        } else if let Some(at) = self.vanished {
            Some(format!("the target was gone at {}, and nothing counted says why", time(at)))
        } else if let Some(at) = self.replaced {
            Some(format!(
                "a process of the target was replaced at {}, and nothing counted says why",
                time(at)
            ))
        } else if let Some(at) = self.unknown {
            Some(format!("its OOM kills could not be read at {}", time(at)))
        } else if self.last < to - SILENCE || (expected - self.samples as f64) > expected * MAX_MISSING {
            Some(format!(
                "there are only {} of the target in {}",
                counted(self.samples, "sample"),
                time(to - from)
            ))
        } else {
            None
        }
    }
}
