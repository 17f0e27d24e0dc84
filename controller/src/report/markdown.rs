//! The report as Markdown, for comments and job summaries: short, and its evidence with it.

use std::fmt::Write as _;

use super::{RUNNING, Tally, evidence, figure, findings, host_state, outcome_sign, state, verdict_sign};
use crate::{event::Outcome, fold::Run};

/// Most rows of a table: GitHub drops a summary of more than 1 MiB whole.
const MOST_ROWS: usize = 200;

/// The report of a run as GitHub-flavoured Markdown.
#[must_use]
pub(crate) fn markdown(run: &Run) -> String {
    let sign = run.verdict.as_ref().map_or(RUNNING, |(v, _)| verdict_sign(*v));
    let reason = run.verdict.as_ref().map_or("The events end before the run did.", |(_, reason)| reason);
    let version = run.version.as_deref().map(|v| format!(" {v}")).unwrap_or_default();
    let mut out = String::new();
    let mut line = |text: &str| {
        out.push_str(text);
        out.push('\n');
    };
    line(&format!("## {} {} {}\n", sign.glyph, sign.word, plain(&format!("{}{version}", run.plan))));
    line(&format!("**{}**\n", plain(&figure::sentence(reason))));
    let exit = run.verdict.as_ref().map(|(v, _)| format!(" · exit {}", v.exit_code())).unwrap_or_default();
    let took = figure::span(run.now);
    let nodes = figure::several(run.nodes.len(), "node");
    line(&format!(
        "{} · {took} · {nodes} · run {} · seed {}{exit}\n",
        Tally::of(run).words(),
        plain(&run.id),
        run.seed
    ));

    let open: Vec<_> = findings(run).filter(|(_, f)| f.outcome != Outcome::Pass).collect();
    if !open.is_empty() {
        line("| gate | | evidence |\n|---|---|---|");
        for (_, finding) in open.iter().take(MOST_ROWS) {
            let sign = outcome_sign(finding.outcome);
            let (name, why) = (plain(&finding.name), plain(&evidence(finding)));
            line(&format!("| {name} | {} {} | {why} |", sign.glyph, sign.word));
        }
        line("");
    }
    line("| round | | gates passed | what the faults did |\n|---|---|---|---|");
    for (i, round) in run.rounds.iter().enumerate().take(MOST_ROWS) {
        let verdict = round.verdict.map_or("– not finished".into(), |v| {
            let sign = verdict_sign(v);
            format!("{} {}", sign.glyph, sign.word)
        });
        let verdict = if round.phases.is_empty() { "– not run".to_string() } else { verdict };
        let tally = Tally::of_round(round);
        let mut did = String::new();
        for injected in run.injections.iter().filter(|x| x.round == Some(i)) {
            let figures = figure::effects(&injected.figures);
            let seed = match injected.injection.seed {
                0 => String::new(),
                seed => format!(", seed {seed}"),
            };
            let (what, node) = (plain(&injected.injection.summary), plain(&injected.injection.node));
            let gap = if did.is_empty() { "" } else { "<br>" };
            // Writing to a string does not fail.
            let _ = write!(did, "{gap}{what} ({node}{seed}): {}", state(injected).word);
            if !figures.is_empty() {
                let _ = write!(did, ", {}", plain(&figures));
            }
        }
        let name = plain(&round.outline.name);
        line(&format!("| {name} | {verdict} | {}/{} | {did} |", tally.passed, tally.gates));
    }
    line(&format!("\nHost state: {}.", host_state(run)));
    out
}

/// Text that Markdown takes as it is: in a cell, without markup, links or mentions.
fn plain(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '~' | '!' => {
                out.push('\\');
                out.push(c);
            }
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            // A mention would call people.
            '@' => out.push_str("&#64;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    #[test]
    fn a_block() {
        insta::assert_snapshot!(markdown(&sample::run()));
    }

    #[test]
    fn names_are_neither_markup_nor_mentions() {
        let mut run = sample::cut();
        run.rounds[0].outline.name = "a|b <img> @team\n[x](http://x)".into();
        let text = markdown(&run);
        assert!(text.contains("| a\\|b &lt;img&gt; &#64;team \\[x\\](http://x) |"), "{text}");
        assert!(text.contains("NO VERDICT") && text.contains("– not run"), "{text}");
    }
}
