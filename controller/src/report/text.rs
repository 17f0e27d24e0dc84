//! The verdict on a terminal.

use std::{fmt::Write as _, path::Path};

use super::{Paint, RUNNING, Tally, bites, figure, host_state, outcome_sign, state, verdict_sign};
use crate::{
    event::{Finding, Outcome},
    fold::{Round, Run},
};

/// The verdict of a run, as printed at its end: the first and the last line are the verdict, and every gate that did
/// not pass shows its evidence. `report` is where the report for people was written. Ends in a newline.
#[must_use]
pub(crate) fn verdict_text(run: &Run, report: Option<&Path>, colour: bool) -> String {
    let paint = Paint { colour };
    let sign = run.verdict.as_ref().map_or(RUNNING, |(v, _)| verdict_sign(*v));
    let title: Vec<&str> = [Some(run.plan.as_str()), run.version.as_deref()].into_iter().flatten().collect();
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(format!("{}  {}   {}", paint.strong(sign.tone, sign.word), title.join(" "), Tally::of(run).words()));
    if let Some((_, reason)) = &run.verdict {
        line(figure::sentence(reason));
    }
    let rounds = figure::several(run.rounds.len(), "round");
    let nodes = figure::several(run.nodes.len(), "node");
    line(paint.dim(&format!("{rounds} · {} · {nodes} · seed {}", figure::span(run.now), run.seed)));
    for (i, round) in run.rounds.iter().enumerate() {
        line(round_line(run, round, paint));
        for finding in &round.findings {
            lines(finding, round.findings.iter().any(|f| f.outcome != Outcome::Pass), paint, &mut line);
        }
        for idle in run.injections.iter().filter(|x| x.round == Some(i) && !x.bit) {
            let injection = &idle.injection;
            let sign = state(idle);
            let text = format!("{} {} {} on {}", sign.glyph, sign.word, injection.summary, injection.node);
            line(format!("      {}", paint.tone(sign.tone, &text)));
        }
    }
    if !run.findings.is_empty() {
        line("  whole run".into());
        for finding in &run.findings {
            lines(finding, true, paint, &mut line);
        }
    }
    for stuck in run.injections.iter().filter(|i| i.stuck.is_some()) {
        let why = stuck.stuck.as_deref().unwrap_or_default();
        let text = format!("✖ STUCK {} on {}: {why}", stuck.injection.id, stuck.injection.node);
        line(paint.tone("bad", &text));
    }
    let bites = bites(run);
    if !bites.is_empty() {
        line(format!("Faults bit: {}", bites.join(", ")));
    }
    line(format!("Host state: {}", host_state(run)));
    if let Some(report) = report {
        line(format!("Report   {}", report.display()));
    }
    match &run.verdict {
        Some((verdict, _)) => {
            line(paint.strong(sign.tone, &format!("{}  exit {}", sign.word, verdict.exit_code())));
        }
        None => line(paint.strong(sign.tone, &format!("{}  the run did not end", sign.word))),
    }
    out
}

fn round_line(run: &Run, round: &Round, paint: Paint) -> String {
    let name = &round.outline.name;
    let width = run.rounds.iter().map(|r| r.outline.name.chars().count()).max().unwrap_or(0);
    let Some(verdict) = round.verdict else {
        let why = match (&run.verdict, round.phases.is_empty()) {
            (Some((verdict, _)), true) => format!("not run (stopped after {})", verdict_sign(*verdict).word),
            (None, true) => "not run".into(),
            (_, false) => "not finished".into(),
        };
        return format!("  {} {name:width$}  {}", paint.dim("-"), paint.dim(&why));
    };
    let sign = verdict_sign(verdict);
    let tally = Tally::of_round(round);
    let gates = format!("{}/{} gates", tally.passed, tally.gates);
    format!("  {} {name:width$}  {gates}", paint.tone(sign.tone, sign.glyph))
}

/// The lines of a finding. Of those that passed only a round with something to look at shows any.
fn lines(finding: &Finding, show: bool, paint: Paint, line: &mut impl FnMut(String)) {
    let sign = outcome_sign(finding.outcome);
    let label = paint.tone(sign.tone, &format!("{} {}", sign.glyph, sign.word));
    if finding.outcome == Outcome::Pass {
        if show {
            let value = finding.value.map(|_| format!("  {}", figure::found(finding))).unwrap_or_default();
            line(format!("      {label} {}  {}{value}", finding.gate, finding.subject));
        }
        return;
    }
    line(format!("      {label} {}  {}  {}", finding.gate, finding.subject, figures(finding)));
    line(format!("          {}", circumstances(finding)));
    line(format!("          {}", figure::sentence(&finding.reason)));
}

/// A finding in one line: its figures, since when, against what, from how much.
pub(crate) fn evidence(finding: &Finding) -> String {
    let figures = figures(finding);
    let mut text = format!("{} {figures} · {}", finding.subject, circumstances(finding));
    if finding.outcome != Outcome::Pass {
        // Writing to a string does not fail.
        let _ = write!(text, " · {}", finding.reason);
    }
    text
}

/// Value, interval and limit.
fn figures(finding: &Finding) -> String {
    let value = finding.value.map(|_| figure::found(finding));
    let interval = finding.interval.map(|i| figure::interval(i, finding.value, &finding.unit));
    let limit = format!("limit {}", figure::limit(finding.limit, &finding.unit));
    [value, interval, Some(limit)].into_iter().flatten().collect::<Vec<_>>().join("  ")
}

/// Since when, against what, from how much.
fn circumstances(finding: &Finding) -> String {
    let mut parts = Vec::new();
    if let Some(since) = finding.since {
        parts.push(format!("since {} of fault", figure::clock(since)));
    }
    if let Some(baseline) = finding.baseline {
        parts.push(format!("baseline {}", figure::value(baseline, &finding.unit)));
    }
    parts.push(figure::several(finding.samples as usize, "sample"));
    parts.join(" · ")
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    fn text(run: &Run, colour: bool) -> String {
        verdict_text(run, Some(Path::new("runs/7f3a/report.html")), colour)
    }

    #[test]
    fn a_block_shows_its_evidence() {
        insta::assert_snapshot!(text(&sample::run(), false));
    }

    #[test]
    fn a_run_that_was_cut_off_never_reads_as_a_pass() {
        let text = text(&sample::cut(), false);
        assert!(text.starts_with("NO VERDICT  recommender-release v2.14.0"), "{text}");
        assert!(text.ends_with("NO VERDICT  the run did not end\n"), "{text}");
        assert!(text.contains("- redis-slow       not finished"), "{text}");
        assert!(text.contains("2 injections without a revert on record"), "{text}");
    }

    #[test]
    fn colour_adds_escapes_and_nothing_else() {
        let (plain, coloured) = (text(&sample::run(), false), text(&sample::run(), true));
        assert!(coloured.contains("\x1b[1;31mBLOCK\x1b[0m"));
        let mut stripped = String::new();
        let mut rest = coloured.as_str();
        while let Some(at) = rest.find('\x1b') {
            stripped.push_str(&rest[..at]);
            rest = &rest[at..];
            rest = &rest[rest.find('m').expect("an escape ends in m") + 1..];
        }
        assert_eq!(stripped + rest, plain);
        assert!(!plain.contains('\x1b'));
    }
}
