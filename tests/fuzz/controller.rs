//! What libFuzzer runs in place of `main` in a build with `--cfg fuzzing`: the controller's parsers, the one that
//! `SQUALL_FUZZ` names. Each takes any text without a panic, and keeps what is asserted.

mod targets;

use std::path::Path;

use self::targets::Parser;
use crate::{
    outline,
    plan::{self, units},
    probe::exposition,
};

const TARGETS: [(&str, Parser); 3] =
    [("distribution", distribution), ("exposition", exposition), ("plan", plan)];

#[cfg(feature = "fuzz")]
static TARGET: std::sync::LazyLock<Parser> = std::sync::LazyLock::new(|| targets::chosen(&TARGETS));

#[cfg(feature = "fuzz")]
libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));

#[test]
fn targets_take_their_corpora() {
    targets::take_corpora("squall", &TARGETS);
}

fn distribution(data: &[u8]) {
    let text = &String::from_utf8_lossy(data);
    match units::table(text) {
        Ok(table) => assert!((1..=16_384).contains(&table.len())),
        Err((line, _)) => assert!((1..=text.lines().count().max(1)).contains(&line)),
    }
}

fn exposition(data: &[u8]) {
    let text = &String::from_utf8_lossy(data);
    if let Ok(page) = exposition::parse(text) {
        assert!(page.samples.len() <= text.lines().count());
    }
}

fn plan(data: &[u8]) {
    let text = &String::from_utf8_lossy(data);
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
