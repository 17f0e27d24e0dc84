//! Every test there is, and one line of counts at the end.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result};

use crate::{builds, fuzz, setup, tools, vm, workspace};

/// Time for each target: enough to try the corpora and what is near them.
const FUZZ_SECONDS: u64 = 5;

/// What cargo's test harness counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

/// Runs all tests. Goes on after a failure, and fails at the end.
pub(crate) fn run() -> Result<ExitCode> {
    setup::ensure(setup::ALL)?;
    let binaries = builds::for_tests()?;
    let mut total = Counts::default();
    let mut failures = Vec::new();

    let unit = ["--no-fail-fast", "--exclude", "squall-tests"];
    let mut unit = tools::cargo(["test"].iter().chain(&tools::HOST_CRATES).chain(&unit));
    total.run("unit tests", &mut unit, &mut failures)?;

    let fuzz = fuzz::Options { seconds: FUZZ_SECONDS, ..fuzz::Options::default() };
    if let Err(e) = fuzz::run(&fuzz) {
        failures.push(format!("fuzzing: {e:#}"));
    }

    if let Err(e) = squall_lab::need_root() {
        failures.push(format!("the privileged tests: not run, {e}"));
    } else {
        let names = privileged()?;
        let targets = names.iter().flat_map(|name| ["--test", name]);
        let mut command = tools::cargo(["test"].into_iter().chain(tools::HOST_CRATES).chain(targets));
        // One at a time: they share the machine's CPUs, and some of them measure.
        command.args(["--no-fail-fast", "--", "--test-threads=1"]).env("SQUALL_BIN_DIR", &binaries);
        total.run("the privileged tests", &mut command, &mut failures)?;
        let (ok, counts) = vm::test("6.1", &binaries)?;
        total.add(counts);
        if !ok {
            failures.push("the VM with kernel 6.1".into());
        }
    }

    for failure in &failures {
        println!("FAILED: {failure}");
    }
    let Counts { passed, failed, ignored } = total;
    let word = if failures.is_empty() { "ok" } else { "FAILED" };
    println!(
        "test result: {word}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out"
    );
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The names of the privileged tests: the files in tests/tests.
pub(crate) fn privileged() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(workspace().join("tests/tests"))? {
        let path = entry?.path();
        if let (Some(name), Some("rs")) = (path.file_stem(), path.extension().and_then(|ext| ext.to_str())) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

impl Counts {
    /// Runs a command that prints the harness's results; shows its output as it comes.
    fn run(&mut self, what: &str, command: &mut Command, failures: &mut Vec<String>) -> Result<()> {
        println!("+ {}", tools::line(command));
        let mut child =
            command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {what}"))?;
        let out = child.stdout.take().context("a pipe was asked for")?;
        for line in BufReader::new(out).lines() {
            let line = line?;
            println!("{line}");
            self.take(&line);
        }
        if !child.wait()?.success() {
            failures.push(what.to_owned());
        }
        Ok(())
    }

    /// Adds what one line of output says, if it is a result.
    pub(crate) fn take(&mut self, line: &str) {
        let Some((_, result)) = line.split_once("test result: ") else { return };
        for part in result.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else {
                continue;
            };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                _ => {}
            }
        }
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_add_up() {
        let mut counts = Counts::default();
        counts.take(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        );
        counts.take(
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1s",
        );
        counts.take("test tests::result ... ok");
        assert_eq!(counts, Counts { passed: 15, failed: 2, ignored: 1 });
    }
}
