//! Coverage-guided fuzzing of every parser, with libFuzzer. The targets are tests/fuzz/*.rs, compiled into the agent and the
//! controller, so that nothing has to be public for them; their corpora are tests/fuzz/corpus/PACKAGE/TARGET.
//!
//! The instrumentation is LLVM's own and needs no nightly. There is no AddressSanitizer: none of the parsers is unsafe.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{builds, setup, target_dir, workspace};

/// What to fuzz.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// The targets; without any, all of them.
    pub(crate) targets: Vec<String>,
    /// Time for each.
    #[arg(long, default_value_t = 60)]
    pub(crate) seconds: u64,
    /// Keep what reaches new code in the corpus, merged to the fewest inputs.
    #[arg(long)]
    pub(crate) keep: bool,
}

/// As cargo-fuzz has it, without the sanitizer.
const INSTRUMENT: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
/// What puts the targets in place of the programs.
pub(crate) const FEATURES: &str = "squall/fuzz,squall-agent/fuzz";
/// An input that takes longer, or more memory, is a finding. Seconds, and MiB.
const LIMITS: [&str; 3] = ["-timeout=120", "-rss_limit_mb=2048", "-max_len=16384"];

struct Target {
    package: String,
    name: String,
    corpus: PathBuf,
}

/// Fuzzes; ends at the first finding, whose input is named.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    setup::ensure(setup::BUILD)?;
    let mut targets = targets()?;
    let known: Vec<_> = targets.iter().map(|target| target.name.clone()).collect();
    for name in &options.targets {
        ensure!(known.contains(name), "no target {name}; there are {}", known.join(", "));
    }
    targets.retain(|target| options.targets.is_empty() || options.targets.contains(&target.name));
    let host = host()?;
    let flag = format!("target.{host}.rustflags={:?}", INSTRUMENT.split_whitespace().collect::<Vec<_>>());
    // With --target the flags are for the programs alone, not for what builds them.
    let build = ["build", "--locked", "--profile=fuzz", "--bins", "--target", &host, "--config", &flag];
    let packages = ["-p", "squall", "-p", "squall-agent", "--features", FEATURES];
    let built = builds::executables(build.into_iter().chain(packages))?;
    for target in &targets {
        let (_, program) =
            built.iter().find(|(name, _)| *name == target.package).context("cargo built no such program")?;
        target.fuzz(program, options)?;
    }
    println!("no finding in {} targets, {} s each", targets.len(), options.seconds);
    Ok(ExitCode::SUCCESS)
}

impl Target {
    fn fuzz(&self, program: &Path, options: &Options) -> Result<()> {
        let (found, findings) =
            (target_dir().join("fuzz/corpus").join(&self.name), target_dir().join("fuzz/findings"));
        fs::create_dir_all(&found)?;
        fs::create_dir_all(&findings)?;
        let log = findings.join(format!("{}.log", self.name));
        let command = || -> Result<Command> {
            let mut command = Command::new(program);
            command.env("SQUALL_FUZZ", &self.name).args(LIMITS).stderr(File::create(&log)?);
            Ok(command)
        };
        let mut fuzz = command()?;
        fuzz.arg(format!("-artifact_prefix={}/{}-", findings.display(), self.name));
        fuzz.arg(format!("-max_total_time={}", options.seconds)).arg("-print_final_stats=1");
        let status = fuzz.arg(&found).arg(&self.corpus).status()?;
        let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        if !status.success() {
            let lines: Vec<_> = said.lines().collect();
            let start = lines.iter().position(|line| line.contains("panicked"));
            let start = start.unwrap_or(lines.len().saturating_sub(20));
            let why = lines[start..].iter().take(60).copied().collect::<Vec<_>>().join("\n");
            bail!("{}: a finding ({status}):\n{why}\nall of it is in {}", self.name, log.display());
        }
        let runs = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        let covered = said.lines().rev().find_map(|line| line.split_once("cov: ")?.1.split(' ').next());
        let (runs, covered) = (runs.unwrap_or("?").trim(), covered.unwrap_or("?"));
        println!("{:13} {runs} inputs in {} s, {covered} edges, no finding", self.name, options.seconds);
        if options.keep {
            let mut merge = command()?;
            merge.arg("-merge=1").arg(&self.corpus).arg(&found);
            ensure!(merge.status()?.success(), "{} could not be merged: see {}", self.name, log.display());
        }
        Ok(())
    }
}

fn targets() -> Result<Vec<Target>> {
    let mut targets = Vec::new();
    for package in ["squall-agent", "squall"] {
        let dir = workspace().join("tests/fuzz/corpus").join(package);
        for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
            let corpus = entry?.path();
            let name = corpus.file_name().unwrap_or_default().to_string_lossy().into_owned();
            targets.push(Target { package: package.into(), name, corpus });
        }
    }
    targets.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(targets)
}

/// The triple that rustc builds for.
fn host() -> Result<String> {
    let version = squall_lab::stdout(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc says no host")?.to_owned())
}
