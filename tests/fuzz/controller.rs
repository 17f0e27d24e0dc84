//! What libFuzzer runs in place of `main` in a build with `--cfg fuzzing`: the controller's parsers, the one that
//! `SQUALL_FUZZ` names. Each takes any text without a panic, and keeps what is asserted.

use std::{env, path::Path, sync::LazyLock};

use libfuzzer_sys::fuzz_target;

use crate::{
    outline,
    plan::{self, units},
    probe::exposition,
};

static TARGET: LazyLock<fn(&str)> = LazyLock::new(|| match env::var("SQUALL_FUZZ").as_deref() {
    Ok("distribution") => distribution,
    Ok("exposition") => exposition,
    Ok("plan") => plan,
    other => panic!("SQUALL_FUZZ is {other:?}, which is no directory of tests/fuzz/corpus/squall"),
});

fuzz_target!(|data: &[u8]| TARGET(&String::from_utf8_lossy(data)));

fn distribution(text: &str) {
    match units::table(text) {
        Ok(table) => assert!((1..=16_384).contains(&table.len())),
        Err((line, _)) => assert!((1..=text.lines().count().max(1)).contains(&line)),
    }
}

fn exposition(text: &str) {
    if let Ok(page) = exposition::parse(text) {
        assert!(page.samples.len() <= text.lines().count());
    }
}

fn plan(text: &str) {
    // A file that a plan names is no part of its text.
    if text.contains("table") {
        return;
    }
    match plan::parse(Path::new("plan.yaml"), text) {
        Ok(plan) => {
            let _ = outline::run_started(&plan, "run", jiff::Timestamp::UNIX_EPOCH, 1);
            for round in 0..plan.rounds.len() {
                assert_eq!(plan::warnings(&plan, round).len(), plan.rounds[round].faults.len());
            }
            for gate in plan.rounds.iter().flat_map(|round| &round.gates).chain(&plan.gates) {
                assert!(!gate.line().is_empty());
            }
        }
        Err(invalid) => assert!(!invalid.to_string().is_empty()),
    }
}
