//! The fold over the event stream that everything shares: gates, progress and reports read a [`Run`], never the events.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::event::{
    Event, Figure, Finding, Injection, LoadBin, Node, Phase, ProbeOutline, RoundOutline, TargetSample,
    Verdict, What,
};

/// A run, as far as its events tell.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Run {
    /// Id of the run.
    pub id: String,
    /// Name of the plan.
    pub plan: String,
    /// What is being released.
    pub version: Option<String>,
    /// Wall-clock start.
    pub started: Option<Timestamp>,
    /// Version of `squall`.
    pub squall: String,
    /// Seed of the run.
    pub seed: u64,
    /// Time of the last event, seconds since the start.
    pub now: f64,
    /// Agents.
    pub nodes: Vec<Node>,
    /// Rounds, in order; those not reached have no phases.
    pub rounds: Vec<Round>,
    /// Everything the probes saw, by name.
    pub probes: BTreeMap<String, Probe>,
    /// Samples of targets by (target, node).
    pub targets: BTreeMap<(String, String), Vec<(f64, TargetSample)>>,
    /// Injections, in order of injection.
    pub injections: Vec<Injected>,
    /// Findings of the gates over the whole run.
    pub findings: Vec<Finding>,
    /// Notes: time and text.
    pub notes: Vec<(f64, String)>,
    /// Injections made and taken back, from the last word on the hosts.
    pub host_state: Option<(usize, usize)>,
    /// Verdict and its reason, once the run is over.
    pub verdict: Option<(Verdict, String)>,
}

/// A round.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// As announced.
    pub outline: RoundOutline,
    /// Start of each phase reached, seconds since the start of the run.
    pub phases: BTreeMap<Phase, f64>,
    /// End of the round.
    pub finished: Option<f64>,
    /// What its gates found.
    pub findings: Vec<Finding>,
    /// What they say together.
    pub verdict: Option<Verdict>,
}

/// Upper bound (none is infinite) and count of each bucket of a histogram.
pub type Buckets = Vec<(Option<f64>, u64)>;

/// What a probe saw.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// As announced.
    pub outline: ProbeOutline,
    /// Bins of a load probe, ascending by start.
    pub bins: Vec<LoadBin>,
    /// Samples of a gauge: time, value.
    pub values: Vec<(f64, f64)>,
    /// Whether the values are the rates of a counter.
    pub rate: bool,
    /// Samples of a histogram: time, buckets.
    pub buckets: Vec<(f64, Buckets)>,
    /// Failed samples: time, why.
    pub failures: Vec<(f64, String)>,
    /// Times at which values stopped being comparable with those before, and why.
    pub resets: Vec<(f64, String)>,
}

/// An injection and what became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Injected {
    /// Index of its round.
    pub round: Option<usize>,
    /// When, seconds since the start.
    pub at: f64,
    /// As reported.
    pub injection: Injection,
    /// Whether it touched its target.
    pub bit: bool,
    /// For how many seconds there was no agent to hold it.
    pub away: f64,
    /// Its last figures.
    pub figures: Vec<Figure>,
    /// When it was taken back, how many seconds that took, and why it ended.
    pub reverted: Option<(f64, f64, String)>,
    /// Why it is stuck.
    pub stuck: Option<String>,
}

impl Round {
    /// Start and end of a phase that was reached; a phase still running ends at `now`.
    #[must_use]
    pub fn span(&self, phase: Phase, now: f64) -> Option<(f64, f64)> {
        let start = *self.phases.get(&phase)?;
        let next = self.phases.range(phase..).nth(1).map(|(_, at)| *at);
        Some((start, next.or(self.finished).unwrap_or(now)))
    }
}

/// What everybody is told about a fault with a gap.
pub(crate) fn resumed(id: &str, node: &str, agent: &str, gap: f64) -> String {
    format!(
        "{id} on {node}: resumed by agent {agent} after {gap:.1} s without it; what is counted began anew"
    )
}

impl Run {
    /// Folds a whole stream.
    #[cfg(test)]
    pub fn of<'a>(events: impl IntoIterator<Item = &'a Event>) -> Self {
        let mut run = Self::default();
        for event in events {
            run.apply(event);
        }
        run
    }

    /// The bins of a load probe that lie wholly inside a span.
    #[must_use]
    pub fn bins(&self, probe: &str, (from, to): (f64, f64)) -> Vec<&LoadBin> {
        const SLACK: f64 = 1e-6;
        let inside = |b: &&LoadBin| b.start >= from - SLACK && b.start + 1.0 <= to + SLACK;
        self.probes.get(probe).map(|p| p.bins.iter().filter(inside).collect()).unwrap_or_default()
    }

    /// Takes in one event.
    pub fn apply(&mut self, event: &Event) {
        let at = event.at;
        self.now = self.now.max(at);
        match event.what.clone() {
            What::RunStarted { run, plan, version, started, squall, seed, rounds, probes } => {
                (self.id, self.plan, self.version, self.squall, self.seed) =
                    (run, plan, version, squall, seed);
                self.started = Some(started);
                self.rounds = rounds.into_iter().map(Round::announced).collect();
                self.probes =
                    probes.into_iter().map(|(name, outline)| (name, Probe::announced(outline))).collect();
            }
            What::Node(node) => self.nodes.push(node),
            What::RoundStarted { .. } => {}
            What::PhaseStarted { round, phase } => {
                if let Some(round) = self.rounds.get_mut(round) {
                    round.phases.insert(phase, at);
                }
            }
            What::Injected { round, injection } => self.injections.push(Injected::new(round, at, injection)),
            What::Effect { id, node, bit, figures } => {
                if let Some(injected) = self.injected(&id, &node) {
                    // What is counted begins anew with another agent; what was touched stays touched.
                    injected.bit |= bit;
                    injected.figures = figures;
                }
            }
            What::Resumed { id, node, agent, gap } => {
                self.notes.push((at, resumed(&id, &node, &agent, gap)));
                if let Some(injected) = self.injected(&id, &node) {
                    injected.away += gap;
                }
            }
            What::Reverted { id, node, took, reason } => {
                if let Some(injected) = self.injected(&id, &node) {
                    injected.reverted = Some((at, took, reason));
                    injected.stuck = None;
                }
            }
            What::Stuck { id, node, reason } => {
                if let Some(injected) = self.injected(&id, &node) {
                    injected.stuck = Some(reason);
                }
            }
            What::Load { probe, bin } => self.with_probe(&probe, |p| p.bins.push(bin)),
            What::Gauge { probe, value, rate } => self.with_probe(&probe, |p| {
                p.values.push((at, value));
                p.rate |= rate;
            }),
            What::Buckets { probe, buckets } => self.with_probe(&probe, |p| p.buckets.push((at, buckets))),
            What::ProbeFailed { probe, error } => self.with_probe(&probe, |p| p.failures.push((at, error))),
            What::ProbeReset { probe, reason } => self.with_probe(&probe, |p| p.resets.push((at, reason))),
            What::Target { target, node, sample } => {
                self.targets.entry((target, node)).or_default().push((at, sample));
            }
            What::Judged { round, finding } => match round.and_then(|r| self.rounds.get_mut(r)) {
                Some(round) => round.findings.push(finding),
                None => self.findings.push(finding),
            },
            What::RoundFinished { round, verdict } => {
                if let Some(round) = self.rounds.get_mut(round) {
                    (round.finished, round.verdict) = (Some(at), Some(verdict));
                }
            }
            What::Note { text } => self.notes.push((at, text)),
            What::HostState { injected, reverted } => self.host_state = Some((injected, reverted)),
            What::RunFinished { verdict, reason } => self.verdict = Some((verdict, reason)),
        }
    }

    fn with_probe(&mut self, name: &str, f: impl FnOnce(&mut Probe)) {
        if let Some(probe) = self.probes.get_mut(name) {
            f(probe);
        }
    }

    fn injected(&mut self, id: &str, node: &str) -> Option<&mut Injected> {
        self.injections.iter_mut().rev().find(|i| i.injection.id == id && i.injection.node == node)
    }
}

impl Round {
    fn announced(outline: RoundOutline) -> Self {
        Self { outline, phases: BTreeMap::new(), finished: None, findings: Vec::new(), verdict: None }
    }
}

impl Probe {
    /// One that saw nothing yet.
    pub(crate) fn announced(outline: ProbeOutline) -> Self {
        Self {
            outline,
            bins: vec![],
            values: vec![],
            rate: false,
            buckets: vec![],
            failures: vec![],
            resets: vec![],
        }
    }
}

impl Injected {
    fn new(round: Option<usize>, at: f64, injection: Injection) -> Self {
        Self { round, at, injection, bit: false, away: 0.0, figures: vec![], reverted: None, stuck: None }
    }
}
