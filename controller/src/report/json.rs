//! The report for scripts. The names and units here are an API: `schema` changes when they do.

use serde_json::{Map, Value, json};

use super::{
    Tally,
    series::{LoadSummary, Span, marks, tracks},
};
use crate::{
    event::{Finding, Phase},
    fold::{Injected, Probe, Round, Run},
};

/// The report of a run as JSON. Times are seconds since its start, ratios go from 0 to 1.
#[must_use]
pub(crate) fn json(run: &Run) -> Value {
    let tally = Tally::of(run);
    json!({
        "schema": "squall.dev/report/v1",
        "run": run.id,
        "plan": run.plan,
        "version": run.version,
        "started": run.started.map(|at| at.to_string()),
        "duration": run.now,
        "seed": run.seed,
        "squall": run.squall,
        "verdict": run.verdict.as_ref().map(|(verdict, _)| verdict),
        "exit_code": run.verdict.as_ref().map(|(verdict, _)| verdict.exit_code()),
        "reason": run.verdict.as_ref().map(|(_, reason)| reason),
        "gates": {
            "total": tally.gates,
            "passed": tally.passed,
            "failed": tally.failed,
            "inconclusive": tally.inconclusive,
        },
        "rounds": run.rounds.iter().map(|r| round(run, r)).collect::<Vec<_>>(),
        "findings": run.findings.iter().map(finding).collect::<Vec<_>>(),
        "injections": run.injections.iter().map(|i| injection(run, i)).collect::<Vec<_>>(),
        "nodes": run.nodes,
        "probes": run.probes.iter().map(|(name, p)| (name.clone(), probe(run, name, p))).collect::<Map<_, _>>(),
        "events": marks(run).iter().map(|m| json!({ "at": m.at, "on": m.on, "text": m.text })).collect::<Vec<_>>(),
        "notes": run.notes.iter().map(|(at, text)| json!({ "at": at, "text": text })).collect::<Vec<_>>(),
        "host_state": run.host_state.map(|(made, reverted)| json!({ "injected": made, "reverted": reverted })),
    })
}

fn round(run: &Run, round: &Round) -> Value {
    let outline = &round.outline;
    let phase = |phase| round.span(phase, run.now).map(|(from, to)| json!({ "from": from, "to": to }));
    json!({
        "name": outline.name,
        "verdict": round.verdict,
        "faults": outline.faults,
        "gates": outline.gates,
        "phases": {
            "baseline": phase(Phase::Baseline),
            "fault": phase(Phase::Fault),
            "recovery": phase(Phase::Recovery),
        },
        "findings": round.findings.iter().map(finding).collect::<Vec<_>>(),
    })
}

fn finding(finding: &Finding) -> Value {
    json!({
        "name": finding.name,
        "gate": finding.gate,
        "subject": finding.subject,
        "outcome": finding.outcome,
        "value": finding.value,
        "interval": finding.interval.map(|(low, high)| json!({ "low": low, "high": high })),
        "limit": finding.limit,
        "unit": finding.unit,
        "baseline": finding.baseline,
        "samples": finding.samples,
        "since": finding.since,
        "p": finding.p,
        "reason": finding.reason,
    })
}

fn injection(run: &Run, injected: &Injected) -> Value {
    let injection = &injected.injection;
    let round = injected.round.and_then(|r| run.rounds.get(r)).map(|r| &r.outline.name);
    json!({
        "id": injection.id,
        "round": round,
        "node": injection.node,
        "kind": injection.kind,
        "target": injection.target,
        "resolved": injection.resolved,
        "summary": injection.summary,
        "mechanism": injection.mechanism,
        "changes": injection.changes,
        "warnings": injection.warnings,
        "seed": injection.seed,
        "at": injected.at,
        "ends": injection.ends,
        "bit": injected.bit,
        "figures": injected.figures,
        "reverted": injected.reverted.as_ref().map(|(at, took, reason)| json!({ "at": at, "took": took, "reason": reason })),
        "stuck": injected.stuck,
    })
}

/// A probe with its figures for each phase of each round that was reached.
fn probe(run: &Run, name: &str, probe: &Probe) -> Value {
    let mut phases = Vec::new();
    let curves: Vec<_> = tracks(run)
        .into_iter()
        .filter(|track| {
            track.name == name || track.name.strip_prefix(name).is_some_and(|rest| rest.starts_with(" p"))
        })
        .collect();
    for round in &run.rounds {
        for phase in [Phase::Baseline, Phase::Fault, Phase::Recovery] {
            let Some(span) = round.span(phase, run.now) else { continue };
            let mut figures = if probe.outline.kind == "load" {
                load(run, name, span)
            } else {
                let summary = curves.iter().find_map(|track| Some((track, track.summary(span)?)));
                summary.map_or(json!({ "samples": 0 }), |(track, (min, mean, max))| {
                    json!({ "samples": track.inside(span).len(), "min": min, "mean": mean, "max": max })
                })
            };
            let inside = |at: f64| at >= span.0 && at < span.1;
            figures["round"] = json!(round.outline.name);
            figures["phase"] = json!(phase);
            figures["failed_samples"] = json!(probe.failures.iter().filter(|(at, _)| inside(*at)).count());
            figures["resets"] = json!(probe.resets.iter().filter(|(at, _)| inside(*at)).count());
            phases.push(figures);
        }
    }
    json!({
        "kind": probe.outline.kind,
        "summary": probe.outline.summary,
        "unit": probe.outline.unit,
        "phases": phases,
        "last_error": probe.failures.last().map(|(_, error)| error),
    })
}

fn load(run: &Run, name: &str, span: Span) -> Value {
    let sum = LoadSummary::of(run.bins(name, span));
    json!({
        "due": sum.due,
        "ok": sum.ok,
        "failed": sum.failed,
        "errors": sum.errors(),
        "late": sum.late,
        "dropped": sum.dropped,
        "p50": sum.quantile(0.5),
        "p95": sum.quantile(0.95),
        "p99": sum.quantile(0.99),
        "max": sum.longest(),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    #[test]
    fn the_whole_report() {
        let mut report = json(&sample::run());
        // The last rounds say nothing new.
        for list in ["rounds", "injections"] {
            report[list].as_array_mut().expect("a list").truncate(2);
        }
        for probe in report["probes"].as_object_mut().expect("an object").values_mut() {
            probe["phases"].as_array_mut().expect("a list").truncate(6);
        }
        insta::assert_json_snapshot!(report);
    }

    #[test]
    fn a_run_that_was_cut_off_has_no_verdict() {
        let report = json(&sample::cut());
        assert_eq!(report["verdict"], Value::Null);
        assert_eq!(report["exit_code"], Value::Null);
        assert_eq!(report["rounds"][0]["verdict"], "promote");
        assert_eq!(report["rounds"][4]["phases"]["fault"], Value::Null);
    }
}
