//! The report as `JUnit` XML, for CI servers: a suite for each round, a case for each gate.

use std::fmt::Write as _;

use super::{chart::escape, evidence, figure, verdict_sign};
use crate::{
    event::{Finding, Outcome, Verdict},
    fold::{Round, Run},
};

/// A case: its name, and what is inside its element.
type Case = (String, String);

/// The report of a run as `JUnit` XML. A failed gate is a failure; an inconclusive one, and one that an end of the run
/// came before, is an error; one of a round that was not run is skipped. The verdict is a case of its own, so that a run
/// whose gates all passed and whose verdict is not `promote` is not read as a pass.
#[must_use]
pub(crate) fn junit(run: &Run) -> String {
    let mut suites = vec![("verdict".to_string(), run.now, vec![verdict(run)])];
    for round in &run.rounds {
        let start = round.phases.values().next().copied();
        let seconds = start.map_or(0.0, |start| round.finished.unwrap_or(run.now) - start);
        suites.push((round.outline.name.clone(), seconds, cases(round)));
    }
    if !run.findings.is_empty() {
        suites.push(("whole run".into(), run.now, run.findings.iter().map(case).collect()));
    }
    let all = || suites.iter().flat_map(|(.., cases)| cases);
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let name = escape(&run.plan);
    element(
        &mut out,
        &format!("testsuites name=\"{name}\" time=\"{:.3}\"", run.now),
        &all().collect::<Vec<_>>(),
    );
    for (name, seconds, cases) in &suites {
        let name = escape(name);
        out.push_str("  ");
        element(
            &mut out,
            &format!("testsuite name=\"{name}\" time=\"{seconds:.3}\""),
            &cases.iter().collect::<Vec<_>>(),
        );
        for (case, inside) in cases {
            let (class, case) = (escape(&run.plan), escape(case));
            // Writing to a string does not fail.
            let _ = writeln!(
                out,
                "    <testcase classname=\"{class}.{name}\" name=\"{case}\">{inside}</testcase>"
            );
        }
        out.push_str("  </testsuite>\n");
    }
    out.push_str("</testsuites>\n");
    out
}

/// Opens an element with the counts of its cases.
fn element(out: &mut String, head: &str, cases: &[&Case]) {
    let count = |tag: &str| cases.iter().filter(|(_, inside)| inside.starts_with(tag)).count();
    let (failures, errors, skipped) = (count("<failure"), count("<error"), count("<skipped"));
    let tests = cases.len();
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "<{head} tests=\"{tests}\" failures=\"{failures}\" errors=\"{errors}\" skipped=\"{skipped}\">"
    );
}

fn verdict(run: &Run) -> Case {
    let inside = match &run.verdict {
        Some((Verdict::Promote, _)) => String::new(),
        Some((verdict @ (Verdict::Block | Verdict::Rollback), why)) => {
            said("failure", verdict_sign(*verdict).word, why)
        }
        Some((verdict, why)) => said("error", verdict_sign(*verdict).word, why),
        None => said("error", "NO VERDICT", "the events end before the run did"),
    };
    ("verdict".into(), inside)
}

fn cases(round: &Round) -> Vec<Case> {
    let mut cases: Vec<Case> = round.findings.iter().map(case).collect();
    if round.findings.len() < round.outline.gates.len() {
        for gate in &round.outline.gates {
            if round.findings.iter().any(|f| f.gate == gate.gate && f.subject == gate.subject) {
                continue;
            }
            let name = format!("{}/{}[{}]", round.outline.name, gate.gate, gate.subject);
            let inside = if round.phases.is_empty() {
                "<skipped message=\"the round was not run\"/>".into()
            } else {
                said("error", "not judged", &format!("the round ended before; {}", figure::gate_limit(gate)))
            };
            cases.push((name, inside));
        }
    }
    cases
}

fn case(finding: &Finding) -> Case {
    let inside = match finding.outcome {
        Outcome::Pass => format!("<system-out>{}</system-out>", escape(&evidence(finding))),
        Outcome::Fail => said("failure", &finding.gate, &evidence(finding)),
        Outcome::Inconclusive => said("error", &finding.gate, &evidence(finding)),
    };
    (finding.name.clone(), inside)
}

fn said(tag: &str, kind: &str, why: &str) -> String {
    let (kind, why) = (escape(kind), escape(why));
    format!("<{tag} type=\"{kind}\" message=\"{why}\">{why}</{tag}>")
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    #[test]
    fn a_block() {
        insta::assert_snapshot!(junit(&sample::run()));
    }

    #[test]
    fn a_run_cut_off_is_an_error_and_what_was_not_run_is_skipped() {
        let xml = junit(&sample::cut());
        assert!(xml.contains("<error type=\"NO VERDICT\""), "{xml}");
        assert!(
            xml.contains("name=\"redis-slow/latency[shoppers p95]\"><error type=\"not judged\""),
            "{xml}"
        );
        assert!(xml.contains("name=\"lossy/latency[shoppers p95]\"><skipped"), "{xml}");
        assert!(xml.contains("tests=\"17\" failures=\"0\" errors=\"4\" skipped=\"10\""), "{xml}");
    }
}
