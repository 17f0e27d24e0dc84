//! Reports: folds over a run, and everything a person sees of it once it is over.

mod chart;
pub(crate) mod figure;
mod html;
mod json;
mod junit;
mod markdown;
pub(crate) mod series;
mod text;

#[cfg(test)]
pub(crate) mod sample;

pub(crate) use html::html;
pub(crate) use json::json;
pub(crate) use junit::junit;
pub(crate) use markdown::markdown;
pub(crate) use text::{evidence, verdict_text};

use crate::{
    event::{Figure, Finding, GateOutline, Outcome, Verdict},
    fold::{Injected, Round, Run},
};

/// A sign and a word that mean the same, so that neither colour nor a glyph is needed to read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sign {
    /// One character.
    pub(crate) glyph: &'static str,
    /// The word.
    pub(crate) word: &'static str,
    /// `good`, `bad`, `doubt` or `plain`: for colours.
    pub(crate) tone: &'static str,
}

/// A run or a round without a verdict.
pub(crate) const RUNNING: Sign = Sign { glyph: "◷", word: "NO VERDICT", tone: "doubt" };

/// A verdict.
pub(crate) fn verdict_sign(verdict: Verdict) -> Sign {
    let (glyph, word, tone) = match verdict {
        Verdict::Promote => ("✔", "PROMOTE", "good"),
        Verdict::Block => ("✖", "BLOCK", "bad"),
        Verdict::Rollback => ("✖", "ROLLBACK", "bad"),
        Verdict::Inconclusive => ("?", "INCONCLUSIVE", "doubt"),
        Verdict::Aborted => ("■", "ABORTED", "doubt"),
    };
    Sign { glyph, word, tone }
}

/// An outcome of a gate.
pub(crate) fn outcome_sign(outcome: Outcome) -> Sign {
    let (glyph, word, tone) = match outcome {
        Outcome::Pass => ("✔", "ok", "good"),
        Outcome::Fail => ("✖", "FAIL", "bad"),
        Outcome::Inconclusive => ("?", "INCONCLUSIVE", "doubt"),
    };
    Sign { glyph, word, tone }
}

/// What became of an injection.
pub(crate) fn state(injected: &Injected) -> Sign {
    let (glyph, word, tone) = match (injected.stuck.is_some(), injected.bit, injected.reverted.is_some()) {
        (true, _, _) => ("✖", "STUCK", "bad"),
        (_, false, _) => ("?", "IDLE", "doubt"),
        (_, true, true) => ("✔", "bit, reverted", "good"),
        (_, true, false) => ("●", "biting", "plain"),
    };
    Sign { glyph, word, tone }
}

/// All findings with their rounds, in order; those over the whole run last.
pub(crate) fn findings(run: &Run) -> impl Iterator<Item = (Option<&Round>, &Finding)> {
    let rounds = run.rounds.iter().flat_map(|round| round.findings.iter().map(move |f| (Some(round), f)));
    rounds.chain(run.findings.iter().map(|f| (None, f)))
}

/// The gate that a finding is about, as it was announced.
pub(crate) fn announced<'a>(round: &'a Round, finding: &Finding) -> Option<&'a GateOutline> {
    let same = |gate: &&GateOutline| gate.gate == finding.gate && gate.subject == finding.subject;
    round.outline.gates.iter().find(same)
}

/// How the gates of the run came out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Gates that were announced or judged.
    pub(crate) gates: usize,
    /// Passed.
    pub(crate) passed: usize,
    /// Failed.
    pub(crate) failed: usize,
    /// Inconclusive.
    pub(crate) inconclusive: usize,
}

impl Tally {
    /// Of one round.
    pub(crate) fn of_round(round: &Round) -> Self {
        let count = |outcome| round.findings.iter().filter(|f| f.outcome == outcome).count();
        Self {
            gates: round.outline.gates.len().max(round.findings.len()),
            passed: count(Outcome::Pass),
            failed: count(Outcome::Fail),
            inconclusive: count(Outcome::Inconclusive),
        }
    }

    /// Of the whole run.
    pub(crate) fn of(run: &Run) -> Self {
        let mut sum = Self { gates: run.findings.len(), ..Self::default() };
        sum.gates += run.rounds.iter().map(|r| Self::of_round(r).gates).sum::<usize>();
        for (_, finding) in findings(run) {
            match finding.outcome {
                Outcome::Pass => sum.passed += 1,
                Outcome::Fail => sum.failed += 1,
                Outcome::Inconclusive => sum.inconclusive += 1,
            }
        }
        sum
    }

    /// In words: `1 of 11 gates failed, 1 inconclusive`.
    pub(crate) fn words(self) -> String {
        let Self { gates, passed, failed, inconclusive } = self;
        let not_run = gates - passed - failed - inconclusive;
        if gates == 0 {
            return "no gates".into();
        }
        if passed == gates {
            return if gates == 1 { "its gate passed".into() } else { format!("all {gates} gates passed") };
        }
        let mut parts = Vec::new();
        if failed > 0 {
            parts.push(format!("{failed} of {gates} gates failed"));
        }
        if inconclusive > 0 {
            let of = if failed > 0 { String::new() } else { format!(" of {gates} gates") };
            parts.push(format!("{inconclusive}{of} inconclusive"));
        }
        if parts.is_empty() {
            parts.push(format!("{passed} of {gates} gates passed"));
        }
        if not_run > 0 {
            parts.push(format!("{not_run} not run"));
        }
        parts.join(", ")
    }
}

/// What all faults did together, by measure, packets first: `48 211 packets dropped`.
pub(crate) fn bites(run: &Run) -> Vec<String> {
    let mut packets: Vec<Figure> = Vec::new();
    for figure in run.injections.iter().flat_map(|i| &i.figures).filter(|f| f.unit == "packets") {
        match packets.iter_mut().find(|sum| sum.name == figure.name) {
            Some(sum) => sum.value += figure.value,
            None => packets.push(figure.clone()),
        }
    }
    packets.iter().map(figure::effect).collect()
}

/// The last word on the hosts, as a sentence.
pub(crate) fn host_state(run: &Run) -> String {
    let nodes = figure::several(run.nodes.len(), "node");
    let Some((injected, reverted)) = run.host_state else {
        return match run.injections.iter().filter(|i| i.reverted.is_none()).count() {
            0 => format!("{} reverted", figure::several(run.injections.len(), "injection")),
            live => format!(
                "{} without a revert on record; each ends by itself",
                figure::several(live, "injection")
            ),
        };
    };
    if injected == 0 {
        return "nothing was injected".into();
    }
    if reverted >= injected {
        format!("reverted {reverted}/{injected}, hosts as before on {nodes}")
    } else {
        format!(
            "reverted {reverted}/{injected}: {} still in place",
            figure::several(injected - reverted, "injection")
        )
    }
}

/// Colours on a terminal, where they are wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint {
    /// Whether they are.
    pub(crate) colour: bool,
}

impl Paint {
    /// In faint letters.
    pub(crate) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    /// In the colour of a tone; one that is plain has none.
    pub(crate) fn tone(self, tone: &str, text: &str) -> String {
        match code(tone) {
            Some(code) => self.with(code, text),
            None => text.into(),
        }
    }

    /// Bold, in the colour of a tone.
    pub(crate) fn strong(self, tone: &str, text: &str) -> String {
        self.with(&code(tone).map_or("1".into(), |code| format!("1;{code}")), text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }
}

fn code(tone: &str) -> Option<&'static str> {
    match tone {
        "good" => Some("32"),
        "bad" => Some("31"),
        "doubt" => Some("35"),
        _ => None,
    }
}
