//! Gates: pure predicates over a run.
//!
//! **Invariant:** nothing here does IO or reads a clock; the same run gives the same findings, so that `squall report`
//! can be trusted with a run from last year.
//!
//! **Invariant:** a finding starts out inconclusive. It passes only where the whole interval is inside the limit, and
//! fails only where the whole interval is past it (`statistics.md`). What is missing, unsure or unproven never passes.

mod errors;
mod latency;
mod leak;
mod needs;
mod oom;
mod recovery;
mod share;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt::Write as _};

pub use needs::{Need, needs};

use crate::{
    event::{Finding, Outcome, Phase, Verdict},
    fold::{Injected, Probe, Run},
    plan::{self, Gate, OnFail, Plan},
    stats,
};

/// Judges the gates of one round on what has been seen of it.
#[must_use]
pub fn judge_round(run: &Run, plan: &Plan, round: usize) -> Vec<Finding> {
    let Some(planned) = plan.rounds.get(round) else { return Vec::new() };
    let scope = Scope { run, plan, rounds: vec![round], name: Some(&planned.name) };
    judge(&scope, &planned.gates)
}

/// Judges the plan's own gates, over every round that was run.
#[must_use]
pub fn judge_run(run: &Run, plan: &Plan) -> Vec<Finding> {
    let reached = |r: &usize| run.rounds.get(*r).is_some_and(|r| r.phases.contains_key(&Phase::Baseline));
    let rounds = (0..plan.rounds.len()).filter(reached).collect();
    judge(&Scope { run, plan, rounds, name: None }, &plan.gates)
}

/// What all findings say together, and why.
///
/// Blocking is corrected for the number of gates that can block (Holm, at 1 % for all of them), so that a failure which only
/// luck explains is taken as inconclusive here. Failures without a p-value need no correction. That number is of all gates
/// of the plan, `planned`, also those that were not judged yet: a run looks at its findings after each round, and each look
/// for itself would be at 1 %. `faults_bit`: every fault measurably touched its target.
#[must_use]
pub fn verdict(findings: &[Finding], planned: usize, on_fail: OnFail, faults_bit: bool) -> (Verdict, String) {
    let tested: Vec<_> = findings.iter().filter_map(|f| f.p.map(|p| (f, p))).collect();
    let mut p: Vec<f64> = tested.iter().map(|(_, p)| *p).collect();
    p.resize(p.len().max(planned), 1.0);
    let rejected = stats::holm(&p, stats::ALPHA_BLOCK);
    let confirmed = |finding: &&Finding| {
        let at = tested.iter().position(|(f, _)| std::ptr::eq(*f, *finding));
        finding.outcome == Outcome::Fail && at.is_none_or(|at| rejected[at])
    };
    let failed: Vec<_> = findings.iter().filter(confirmed).collect();
    let luck = findings.iter().filter(|f| f.outcome == Outcome::Fail).count() - failed.len();
    let open: Vec<_> = findings.iter().filter(|f| f.outcome == Outcome::Inconclusive).collect();
    let of = format!("of {}", counted(findings.len(), "gate"));

    if let Some(first) = failed.first() {
        let verdict = match on_fail {
            OnFail::Block => Verdict::Block,
            OnFail::Rollback => Verdict::Rollback,
        };
        let mut why = format!("{} {of} failed: {}", failed.len(), names(&failed));
        let _ = write!(why, "; {}", first.reason);
        return (verdict, why);
    }
    if findings.is_empty() {
        return (Verdict::Inconclusive, "no gate was judged, so nothing is proven".into());
    }
    if luck > 0 {
        let why = format!("{luck} {of} failed, but not beyond what luck does among so many; repeat the run");
        return (Verdict::Inconclusive, why);
    }
    if let Some(first) = open.first() {
        let why = format!("{} {of} inconclusive: {}; {}", open.len(), names(&open), first.reason);
        return (Verdict::Inconclusive, why);
    }
    if !faults_bit {
        return (Verdict::Inconclusive, "a fault never touched its target, so nothing is proven".into());
    }
    (Verdict::Promote, format!("all {} passed and every fault bit", counted(findings.len(), "gate")))
}

/// The gates of a plan whose findings may have a p-value.
#[must_use]
pub fn tested(plan: &Plan) -> usize {
    let gates = plan.rounds.iter().flat_map(|round| &round.gates).chain(&plan.gates);
    gates
        .filter(|gate| matches!(gate, Gate::Latency { .. } | Gate::Errors { .. } | Gate::Leak { .. }))
        .count()
}

/// Whether the steady state holds again after the fault of a round, so that its recovery may end early. Looks at the
/// load probes of its recovery gates, or else at those of its other gates; without any, a round recovers to its end.
#[must_use]
pub fn recovered(run: &Run, plan: &Plan, round: usize) -> bool {
    let Some(planned) = plan.rounds.get(round) else { return false };
    let scope = Scope { run, plan, rounds: vec![round], name: Some(&planned.name) };
    let load = |name: &&String| matches!(plan.probes.get(*name), Some(plan::Probe::Load(_)));
    let of_recovery = planned.gates.iter().filter_map(|g| match g {
        Gate::Recovery { probe, .. } => Some(probe),
        _ => None,
    });
    let mut probes: Vec<_> = of_recovery.filter(load).collect();
    if probes.is_empty() {
        probes = planned.gates.iter().filter_map(probe_of).filter(load).collect();
    }
    !probes.is_empty() && probes.iter().all(|probe| recovery::recovered(&scope, probe, round))
}

/// The probe a gate looks at; none for a gate on a target.
#[must_use]
pub fn probe_of(gate: &Gate) -> Option<&String> {
    match gate {
        Gate::Latency { probe, .. }
        | Gate::Errors { probe, .. }
        | Gate::Leak { probe, .. }
        | Gate::Recovery { probe, .. } => Some(probe),
        Gate::Oom { .. } => None,
    }
}

fn judge(scope: &Scope<'_>, gates: &[Gate]) -> Vec<Finding> {
    let mut seen = BTreeMap::<String, usize>::new();
    let judge = |gate: &Gate| {
        let mut finding = match gate {
            Gate::Latency { probe, percentile, limit } => latency::judge(scope, probe, *percentile, *limit),
            Gate::Errors { probe, limit } => errors::judge(scope, probe, *limit),
            Gate::Leak { probe, limit } => leak::judge(scope, probe, *limit),
            Gate::Oom { target, limit } => oom::judge(scope, target, *limit),
            Gate::Recovery { probe, within } => recovery::judge(scope, probe, *within),
        };
        if finding.outcome == Outcome::Pass
            && let Some(away) = scope.away()
        {
            (finding.outcome, finding.reason) = (Outcome::Inconclusive, away);
        }
        // Two gates may differ in nothing but the limit; names are unique all the same.
        let count = seen.entry(finding.name.clone()).or_default();
        *count += 1;
        if *count > 1 {
            let _ = write!(finding.name, " #{count}");
        }
        finding
    };
    gates.iter().map(judge).collect()
}

/// What a gate looks at: one round, or all that were run.
struct Scope<'a> {
    run: &'a Run,
    plan: &'a Plan,
    rounds: Vec<usize>,
    /// Name of the round; none over the whole run.
    name: Option<&'a str>,
}

/// A stretch of time within a round.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Span {
    round: usize,
    from: f64,
    to: f64,
}

impl Span {
    fn seconds(&self) -> f64 {
        self.to - self.from
    }

    fn holds(&self, at: f64) -> bool {
        // Samples are taken on the second, and are stamped a little later.
        (self.from - 1e-6..=self.to + SLACK).contains(&at)
    }
}

/// By how much a sample may miss the edge of a phase and still count as taken at that edge, seconds.
const SLACK: f64 = 0.05;

/// Share of the time of a fault for which its agent may be away.
const MOST_AWAY: f64 = 0.1;

/// Share of samples that may be missing.
const MAX_MISSING: f64 = 0.05;

impl<'a> Scope<'a> {
    /// An inconclusive finding, to be made into more.
    fn finding(&self, gate: &str, subject: &str, limit: f64, unit: &str) -> Finding {
        let name = match self.name {
            Some(round) => format!("{round}/{gate}[{subject}]"),
            None => format!("{gate}[{subject}]"),
        };
        Finding {
            name,
            gate: gate.into(),
            subject: subject.into(),
            outcome: Outcome::Inconclusive,
            value: None,
            interval: None,
            limit,
            unit: unit.into(),
            baseline: None,
            samples: 0,
            since: None,
            p: None,
            reason: String::new(),
        }
    }

    fn probe(&self, name: &str) -> Option<&'a Probe> {
        self.run.probes.get(name)
    }

    /// The spans of a phase, one for each round that reached it. A fault's span is the time in which it was held.
    fn spans(&self, phase: Phase) -> Vec<Span> {
        self.rounds.iter().filter_map(|r| self.span(phase, *r)).collect()
    }

    fn span(&self, phase: Phase, round: usize) -> Option<Span> {
        let (mut from, mut to) = self.run.rounds.get(round)?.span(phase, self.run.now)?;
        if phase == Phase::Fault {
            let injections = || self.injections(round);
            // An injection starts within a fraction of the first second; only a late one moves the start.
            let first = injections().map(|i| i.at).fold(f64::INFINITY, f64::min);
            if first.is_finite() && first > from + 0.5 {
                from = first;
            }
            // A fault that ended early, by a lost lease say, was not held to the end of its phase.
            if injections().count() > 0 && injections().all(|i| i.reverted.is_some()) {
                let last = injections().filter_map(|i| i.reverted.as_ref().map(|r| r.0)).fold(0.0, f64::max);
                to = to.min(last.max(from));
            }
        }
        Some(Span { round, from, to })
    }

    /// When the fault of a round was over: the last revert, or else the start of the recovery.
    fn fault_ended(&self, round: usize) -> Option<f64> {
        let recovery = *self.run.rounds.get(round)?.phases.get(&Phase::Recovery)?;
        let reverted = self.injections(round).map(|i| i.reverted.as_ref().map(|r| r.0));
        Some(
            reverted
                .collect::<Option<Vec<_>>>()
                .and_then(|t| t.into_iter().reduce(f64::max))
                .unwrap_or(recovery),
        )
    }

    fn injections(&self, round: usize) -> impl Iterator<Item = &'a Injected> + use<'a> {
        self.run.injections.iter().filter(move |i| i.round == Some(round))
    }

    /// Why the faults are not proven to have bitten; none where they are, or where no fault was planned.
    fn idle(&self) -> Option<String> {
        self.rounds.iter().find_map(|&round| {
            let planned = self.plan.rounds.get(round)?;
            if planned.faults.is_empty() {
                return None;
            }
            if self.injections(round).next().is_none() {
                return Some(format!("no fault was injected in round {}", planned.name));
            }
            let idle = self.injections(round).find(|i| !i.bit)?;
            let Injected { injection: i, .. } = idle;
            Some(format!("the {} fault on {} never touched it: {}", i.kind, i.resolved, i.summary))
        })
    }

    /// Which fault was not there for too much of its time, if one was not.
    fn away(&self) -> Option<String> {
        self.rounds.iter().find_map(|&round| {
            let hold = self.plan.rounds.get(round)?.hold.as_secs_f64();
            let Injected { injection: i, away, .. } =
                self.injections(round).find(|i| i.away > MOST_AWAY * hold)?;
            let (away, hold) = (time(*away), time(hold));
            Some(format!(
                "the {} fault on {} was away for {away} of its {hold}, while its agent was replaced",
                i.kind, i.resolved
            ))
        })
    }

    /// The first span of the fault, for times "since".
    fn since_fault(&self, at: f64) -> Option<f64> {
        self.spans(Phase::Fault).iter().rfind(|s| s.from <= at + 1e-6).map(|s| (at - s.from).max(0.0))
    }
}

/// Why values of a probe in these spans are not comparable; none where they are.
fn reset_in(probe: &Probe, spans: &[Span]) -> Option<String> {
    let (at, why) = probe.resets.iter().find(|(at, _)| spans.iter().any(|s| s.holds(*at)))?;
    Some(format!("the values before and after {} are not comparable: {why}", time(*at)))
}

/// `1 gate`, `3 gates`.
fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn names(findings: &[&Finding]) -> String {
    const SHOWN: usize = 4;
    let mut names: Vec<_> = findings.iter().take(SHOWN).map(|f| f.name.clone()).collect();
    if findings.len() > SHOWN {
        names.push(format!("{} more", findings.len() - SHOWN));
    }
    names.join(", ")
}

/// `41ms`, `1.93s`, `3min 20s`.
fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 119.5 => format!("{}min {}s", (s / 60.0) as u64, (s % 60.0) as u64),
        s if s >= 9.95 => format!("{s:.0}s"),
        s if s >= 0.9995 => format!("{}s", trimmed(s, 2)),
        s if s >= 0.00995 => format!("{:.0}ms", s * 1e3),
        s => format!("{}ms", trimmed(s * 1e3, 2)),
    }
}

/// `93.1%`, `0.12%`.
fn percent(ratio: f64) -> String {
    let percent = ratio * 100.0;
    match percent {
        p if p >= 10.0 => format!("{}%", trimmed(p, 1)),
        p if p >= 0.01 || p == 0.0 => format!("{}%", trimmed(p, 2)),
        p => format!("{}%", trimmed(p, 4)),
    }
}

fn trimmed(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
