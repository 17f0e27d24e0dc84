//! The whole way, as a user goes it: a shop, a plan, a verdict, and a host that is as before.

use std::{process::Output, time::Duration};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use squall_tests::{Controller, in_a_shop};

const SHORT: &str = include_str!("../e2e/short.yaml");

fn exit_code(output: &Output, expected: i32) -> Result<()> {
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(expected), "{}, not exit {expected}:\n{said}", output.status);
    Ok(())
}

/// The gates of a report with an outcome, by name.
fn gates(report: &Value, outcome: &str) -> Vec<String> {
    let rounds = report["rounds"].as_array().into_iter().flatten();
    let findings = rounds.flat_map(|round| round["findings"].as_array().into_iter().flatten());
    let whole_run = report["findings"].as_array().into_iter().flatten();
    let found = findings.chain(whole_run).filter(|finding| finding["outcome"] == outcome);
    found.filter_map(|finding| finding["name"].as_str().map(ToOwned::to_owned)).collect()
}

#[test]
fn a_release_that_survives_is_promoted() -> Result<()> {
    in_a_shop(None, |shop| {
        let controller = Controller::of(shop);
        let plan = controller.plan(SHORT)?;
        let output = controller.run(&["run", &plan.display().to_string()])?;
        exit_code(&output, 0)?;
        let report = controller.report()?;
        ensure!(report["verdict"] == "promote", "{report:#}");
        ensure!(gates(&report, "pass").len() == 5, "{report:#}");
        for injection in report["injections"].as_array().context("no injections")? {
            ensure!(injection["bit"] == true, "a fault that never bit: {injection:#}");
            ensure!(!injection["reverted"].is_null(), "a fault that was never taken back: {injection:#}");
        }
        let html = controller.run_dir()?.join("report.html");
        ensure!(
            String::from_utf8_lossy(&output.stdout).contains(&html.display().to_string()),
            "no report is named"
        );
        ensure!(html.is_file(), "no {}", html.display());
        shop.service().check()
    })
}

#[test]
fn a_release_without_a_fallback_is_blocked_by_the_errors_gate() -> Result<()> {
    in_a_shop(Some("no-fallback"), |shop| {
        let controller = Controller::of(shop);
        let plan = controller.plan(SHORT)?;
        let output = controller.run(&["run", &plan.display().to_string()])?;
        exit_code(&output, 1)?;
        let report = controller.report()?;
        ensure!(report["verdict"] == "block", "{report:#}");
        ensure!(gates(&report, "fail").iter().any(|gate| gate.starts_with("redis-cut/errors")), "{report:#}");
        Ok(())
    })
}

#[test]
fn an_interrupt_takes_every_fault_back() -> Result<()> {
    in_a_shop(None, |shop| {
        let controller = Controller::of(shop);
        let plan = controller.plan(SHORT)?;
        let mut squall = controller.start(&["run", &plan.display().to_string()])?;
        controller.wait_for_event("injected").with_context(|| controller.said())?;
        ensure!(shop.ask("U1")?.contains("\"fallback_used\":true"), "Redis is not cut off");
        squall.signal(Signal::SIGINT)?;
        let status = squall.wait(Duration::from_secs(60)).with_context(|| controller.said())?;
        ensure!(status.code() == Some(4), "{status}:\n{}", controller.said());
        squall_tests::wait_for("answers out of Redis again", Duration::from_secs(10), || {
            Ok(shop.ask("U1")?.contains("\"fallback_used\":false").then_some(()))
        })
    })
}

#[test]
fn a_wrong_plan_says_where_and_what_to_write_and_changes_nothing() -> Result<()> {
    in_a_shop(None, |shop| {
        let controller = Controller::of(shop);
        for (what, from, to, fix) in [
            ("an unknown field", "hold: 12s", "hld: 12s", "did you mean `hold`?"),
            ("a wrong unit", "p95: 800ms", "p95: 800", "write 800ms or 800s"),
            (
                "a missing probe",
                "errors:   { probe: shoppers",
                "errors:   { probe: shopers",
                "did you mean `shoppers`?",
            ),
            ("a target that matches nothing", "exe: recommender", "exe: recomender", "recomender"),
        ] {
            let (above, _) = SHORT.split_once(from).context("the plan has changed")?;
            let line = above.lines().count();
            let plan = controller.plan(&SHORT.replacen(from, to, 1))?;
            let shown = plan.display().to_string();
            let output = controller.run(&["run", &shown])?;
            exit_code(&output, 2).context(what)?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(said.contains(&format!("plan.yaml:{line}")), "{what}: no line {line} in\n{said}");
            ensure!(said.contains(fix), "{what}: no fix {fix:?} in\n{said}");
            ensure!(shop.ask("U1")?.contains("\"fallback_used\":false"), "{what}: something was injected");
        }
        Ok(())
    })
}
