//! One line for each thing that happened, and a heartbeat.

use std::{collections::BTreeSet, fmt::Write as _};

use crate::{
    event::{Event, Phase, What},
    fold::{Round, Run, resumed},
    report::{Paint, evidence, figure, outcome_sign, series, verdict_sign},
};

/// Seconds without a line after which there is a sign of life.
const HEARTBEAT: f64 = 10.0;

/// What has been said.
pub(super) struct Plain {
    paint: Paint,
    /// Time of the last line.
    last: f64,
    /// Round that goes on.
    round: Option<usize>,
    /// Injections that were seen to bite, by id and node.
    biting: BTreeSet<(String, String)>,
    /// Probes that cannot get samples.
    failing: BTreeSet<String>,
}

impl Plain {
    pub(super) fn new(paint: Paint) -> Self {
        Self { paint, last: 0.0, round: None, biting: BTreeSet::new(), failing: BTreeSet::new() }
    }

    /// The lines about an event, most often none.
    pub(super) fn event(&mut self, event: &Event, run: &Run) -> String {
        let mut text = String::new();
        for line in self.words(event, run) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{} {line}", figure::clock(event.at));
            self.last = event.at;
        }
        text
    }

    /// A sign of life, where nothing was said for a while.
    pub(super) fn heartbeat(&mut self, run: &Run, now: f64) -> String {
        if now - self.last < HEARTBEAT {
            return String::new();
        }
        let Some((round, outline)) = self.round.and_then(|i| Some((i, run.rounds.get(i)?))) else {
            return String::new();
        };
        self.last = now;
        let mut parts = Vec::new();
        if let Some((phase, left)) = phase(outline, now) {
            parts.push(format!("{phase}, {} left", figure::span(left.round())));
        }
        let live: Vec<_> =
            run.injections.iter().filter(|i| i.round == Some(round) && i.reverted.is_none()).collect();
        if !live.is_empty() {
            let biting = live.iter().filter(|i| i.bit).count();
            parts.push(format!("{biting} of {} biting", figure::several(live.len(), "injection")));
        }
        for track in series::probes(run, now - HEARTBEAT) {
            if let Some((_, value)) = track.points.last() {
                parts.push(format!("{} {}", track.name, figure::limit(*value, &track.unit)));
            }
        }
        format!("{} {}: {}\n", figure::clock(now), outline.outline.name, parts.join(" · "))
    }

    fn words(&mut self, event: &Event, run: &Run) -> Vec<String> {
        let name = |round: usize| run.rounds.get(round).map_or("?", |r| r.outline.name.as_str());
        match &event.what {
            What::RunStarted { run: id, plan, version, rounds, seed, .. } => {
                let version = version.as_deref().map(|v| format!(" {v}")).unwrap_or_default();
                let length = rounds.iter().map(|r| r.baseline + r.hold + r.recovery).sum();
                let rounds = figure::several(rounds.len(), "round");
                vec![format!(
                    "run {id}: {plan}{version}, {rounds}, at most {}, seed {seed}",
                    figure::span(length)
                )]
            }
            What::Node(node) => {
                vec![format!("node {}: kernel {}, agent {}", node.node, node.kernel, node.agent)]
            }
            What::RoundStarted { round } => {
                self.round = Some(*round);
                let faults = run.rounds.get(*round).map(|r| r.outline.faults.join("; ")).unwrap_or_default();
                vec![format!("round {}/{} {}: {faults}", round + 1, run.rounds.len(), name(*round))]
            }
            What::PhaseStarted { round, phase } => {
                let length = run.rounds.get(*round).map(|r| length(r, *phase)).unwrap_or_default();
                let most = if *phase == Phase::Recovery { "at most " } else { "" };
                vec![format!("{}: {}, {most}{}", name(*round), phase_name(*phase), figure::span(length))]
            }
            What::Injected { injection, .. } => {
                let on = format!("{} on {}", injection.resolved, injection.node);
                let ends = figure::clock(injection.ends);
                let seed = match injection.seed {
                    0 => String::new(),
                    seed => format!(", seed {seed}"),
                };
                let mut lines = vec![format!(
                    "injected {}: {}; ends by itself at {ends} (id {}{seed})",
                    on, injection.summary, injection.id
                )];
                lines.extend(injection.warnings.iter().map(|w| format!("! {}: {w}", injection.id)));
                lines
            }
            What::Effect { id, node, bit: true, figures }
                if self.biting.insert((id.clone(), node.clone())) =>
            {
                vec![format!("biting {id} on {node}: {}", figure::effects(figures))]
            }
            What::Reverted { id, node, took, reason } => {
                vec![format!("reverted {id} on {node} in {} ({reason})", figure::seconds(*took))]
            }
            What::Resumed { id, node, agent, gap } => vec![format!("! {}", resumed(id, node, agent, *gap))],
            What::Stuck { id, node, reason } => {
                vec![self.paint.tone("bad", &format!("✖ STUCK {id} on {node}: {reason}"))]
            }
            What::ProbeFailed { probe, error } if self.failing.insert(probe.clone()) => {
                vec![format!("! probe {probe} has no sample: {error}")]
            }
            What::Load { probe, .. } | What::Gauge { probe, .. } | What::Buckets { probe, .. }
                if self.failing.remove(probe) =>
            {
                vec![format!("probe {probe} has samples again")]
            }
            What::ProbeReset { probe, reason } => vec![format!("! probe {probe} starts again: {reason}")],
            What::Judged { finding, .. } => {
                let sign = outcome_sign(finding.outcome);
                let label = self.paint.tone(sign.tone, &format!("{} {}", sign.glyph, sign.word));
                vec![format!("{label} {}: {}", finding.name, evidence(finding))]
            }
            What::RoundFinished { round, verdict } => {
                self.round = None;
                let sign = verdict_sign(*verdict);
                vec![format!(
                    "{}: {}",
                    name(*round),
                    self.paint.strong(sign.tone, &format!("{} {}", sign.glyph, sign.word))
                )]
            }
            What::Note { text } => vec![text.clone()],
            What::HostState { .. } => vec![format!("host state: {}", crate::report::host_state(run))],
            What::Effect { .. }
            | What::Load { .. }
            | What::Gauge { .. }
            | What::Buckets { .. }
            | What::ProbeFailed { .. }
            | What::Target { .. }
            | What::RunFinished { .. } => Vec::new(),
        }
    }
}

/// Planned seconds of a phase.
pub(super) fn length(round: &Round, phase: Phase) -> f64 {
    match phase {
        Phase::Baseline => round.outline.baseline,
        Phase::Fault => round.outline.hold,
        Phase::Recovery => round.outline.recovery,
    }
}

/// What a phase is called.
pub(super) fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Baseline => "baseline",
        Phase::Fault => "fault",
        Phase::Recovery => "recovery",
    }
}

/// The phase a round is in, and the seconds it has left at most.
pub(super) fn phase(round: &Round, now: f64) -> Option<(&'static str, f64)> {
    let (phase, start) = round.phases.iter().next_back()?;
    Some((phase_name(*phase), (start + length(round, *phase) - now).max(0.0)))
}
