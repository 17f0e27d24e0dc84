//! Every test there is, and one line of counts at the end.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result};

use crate::{builds, setup, tools, vm, workspace};

/// How many tests that failed are run once more.
const MOST_AGAIN: usize = 5;

/// What cargo's test harness counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

/// What the harness said in a run of tests.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pub(crate) counts: Counts,
    /// The file of tests whose turn it is; only in a VM is that said.
    file: String,
    /// The tests that failed, each with its file.
    failed: Vec<(String, String)>,
}

/// Runs all tests. Goes on after a failure, and fails at the end.
pub(crate) fn run() -> Result<ExitCode> {
    setup::ensure(setup::ALL)?;
    let binaries = builds::for_tests()?;
    let (mut total, mut failures, mut unsteady) = (Counts::default(), Vec::new(), Vec::new());

    let unit = ["--no-fail-fast", "--exclude", "squall-tests"];
    let mut unit = tools::cargo(["test"].iter().chain(&tools::HOST_CRATES).chain(&unit));
    let (ok, said) = Said::hear(&mut unit)?;
    total.add(said.counts);
    if !ok {
        failures.push("unit tests".to_owned());
    }

    if let Err(e) = squall_lab::need_root() {
        failures.push(format!("the privileged tests: not run, {e}"));
    } else {
        if !host(&binaries, &mut total, &mut unsteady)? {
            failures.push("the privileged tests".to_owned());
        }
        if !vm::test("6.1", &binaries, &mut total, &mut unsteady)? {
            failures.push("the VM with kernel 6.1".to_owned());
        }
    }

    for test in &unsteady {
        println!("UNSTEADY: {test} failed, and passed when it was run once more by itself");
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

/// Runs the privileged tests on this machine; whether all passed.
fn host(binaries: &Path, total: &mut Counts, unsteady: &mut Vec<String>) -> Result<bool> {
    let names = privileged()?;
    let targets = names.iter().flat_map(|name| ["--test", name]);
    let mut command = tools::cargo(["test"].into_iter().chain(tools::HOST_CRATES).chain(targets));
    // One at a time: they share the machine's CPUs, and some of them measure.
    command.args(["--no-fail-fast", "--", "--test-threads=1"]).env("SQUALL_BIN_DIR", binaries);
    let (ok, said) = Said::hear(&mut command)?;
    said.judge(ok, total, unsteady, "this machine", |failed| {
        command.arg("--exact").args(failed.iter().map(|(_, test)| test));
        Said::hear(&mut command)
    })
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

impl Said {
    /// Runs a command that prints the harness's results, and shows its output as it comes; whether it succeeded.
    fn hear(command: &mut Command) -> Result<(bool, Self)> {
        println!("+ {}", tools::line(command));
        let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start the tests")?;
        let out = child.stdout.take().context("a pipe was asked for")?;
        let mut said = Self::default();
        for line in BufReader::new(out).lines() {
            let line = line?;
            println!("{line}");
            said.take(&line);
        }
        Ok((child.wait()?.success(), said))
    }

    /// Takes in one line of output.
    pub(crate) fn take(&mut self, line: &str) {
        self.counts.take(line);
        if let Some(command) = line.strip_prefix("==== /tests/") {
            self.file = command.split_whitespace().next().unwrap_or_default().to_owned();
        }
        // An error of the test is output too, so each that failed has this line.
        if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.failed.push((self.file.clone(), test.to_owned()));
        }
    }

    /// Adds to the counts, and says whether all is well.
    ///
    /// A machine that is busy, or emulated, stands still now and then, which a test that looks at the time takes for a defect. So
    /// what failed is run once more by itself, and what passes then is named in `unsteady`.
    pub(crate) fn judge(
        mut self,
        ok: bool,
        total: &mut Counts,
        unsteady: &mut Vec<String>,
        place: &str,
        again: impl FnOnce(&[(String, String)]) -> Result<(bool, Self)>,
    ) -> Result<bool> {
        let failed = self.counts.failed;
        // What fails without a test that does is no matter of time, and many failures are not either.
        let named = failed > 0 && self.failed.len() as u64 == failed && self.failed.len() <= MOST_AGAIN;
        let mut well = ok;
        if !ok && named {
            let (ok, again) = again(&self.failed)?;
            // By name may be more than failed: of the same name in another file.
            if ok && again.counts.passed >= failed {
                unsteady.extend(
                    self.failed
                        .iter()
                        .map(|(file, test)| format!("{file} {test} ({place})").trim_start().to_owned()),
                );
                (self.counts.passed, self.counts.failed) = (self.counts.passed + failed, 0);
                well = true;
            }
        }
        total.add(self.counts);
        Ok(well)
    }
}

impl Counts {
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

    fn said(lines: &[&str]) -> Said {
        let mut said = Said::default();
        for line in lines {
            said.take(line);
        }
        said
    }

    #[test]
    fn what_failed_is_run_once_more_by_name() {
        let first = || {
            said(&[
                "==== /tests/demo --test-threads=1",
                "test one ... [  324.427362] Memory cgroup out of memory",
                "---- one stdout ----",
                "test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1s",
                "==== FAILED after 51.6s",
                "==== /tests/demo exited with 101",
                "==== /tests/lab --test-threads=1",
                "test fine ... ok",
                "---- two stdout ----",
                "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1s",
            ])
        };
        let wanted = [("demo".to_owned(), "one".to_owned()), ("lab".to_owned(), "two".to_owned())];
        let pass = "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 7 filtered out";
        let fail = "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 7 filtered out";
        for (ok, second, well) in
            [(true, [pass, pass], true), (false, [pass, fail], false), (true, [pass, ""], false)]
        {
            let (mut total, mut unsteady) = (Counts::default(), Vec::new());
            let judged = first().judge(false, &mut total, &mut unsteady, "here", |failed| {
                assert_eq!(failed, wanted);
                Ok((ok, said(&second)))
            });
            assert_eq!(judged.unwrap(), well);
            assert_eq!(total.failed, if well { 0 } else { 2 });
            assert_eq!(unsteady, if well { vec!["demo one (here)", "lab two (here)"] } else { vec![] });
        }
    }

    #[test]
    fn what_fails_without_a_test_that_does_is_a_failure() {
        let never = |_: &[(String, String)]| -> Result<(bool, Said)> { panic!("it is not to be run again") };
        let (mut total, mut unsteady) = (Counts::default(), Vec::new());
        let crashed = said(&["---- one stdout ----"]);
        assert!(!crashed.judge(false, &mut total, &mut unsteady, "here", never).unwrap());
        let many = "test result: FAILED. 0 passed; 6 failed; 0 ignored; 0 measured; 0 filtered out";
        let lines: Vec<String> =
            (0..6).map(|n| format!("---- t{n} stdout ----")).chain([many.to_owned()]).collect();
        let many = said(&lines.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(!many.judge(false, &mut total, &mut unsteady, "here", never).unwrap());
        assert!(unsteady.is_empty());
        assert_eq!(total.failed, 6);
    }

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
