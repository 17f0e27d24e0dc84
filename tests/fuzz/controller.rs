//! What libFuzzer runs in place of `main` in a build with `--cfg fuzzing`: the controller's parsers, the one that
//! `SQUALL_FUZZ` names. Each takes any text without a panic, and keeps what is asserted.

#[cfg(test)]
use std::fs;
use std::path::Path;
#[cfg(fuzzing)]
use std::{env, sync::LazyLock};

use crate::{
    outline,
    plan::{self, units},
    probe::exposition,
};

/// Takes any input.
type Parser = fn(&str);

const TARGETS: [(&str, Parser); 3] =
    [("distribution", distribution), ("exposition", exposition), ("plan", plan)];

#[cfg(fuzzing)]
static TARGET: LazyLock<Parser> = LazyLock::new(|| {
    let name = env::var("SQUALL_FUZZ").unwrap_or_default();
    TARGETS.iter().find(|(known, _)| *known == name).expect("SQUALL_FUZZ names a target").1
});

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(&String::from_utf8_lossy(data)));

/// What fuzzing found worth keeping, without libFuzzer: so every ordinary test run compiles the targets, and runs them.
#[cfg(test)]
#[test]
fn targets_take_their_corpora() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/squall");
    assert_eq!(
        fs::read_dir(&corpus).expect("a directory").count(),
        TARGETS.len(),
        "each target has a corpus"
    );
    for (name, target) in TARGETS {
        let mut inputs = 0;
        for entry in fs::read_dir(corpus.join(name)).expect("a corpus") {
            let data = fs::read(entry.expect("an entry").path()).expect("an input");
            target(&String::from_utf8_lossy(&data));
            inputs += 1;
        }
        assert!(inputs > 0, "the corpus of {name} is empty");
    }
}

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
