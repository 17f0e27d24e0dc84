//! The binaries.

use std::{env, ffi::OsStr, fs, path::PathBuf, process::Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{target_dir, tools};

/// What runs in the demo and in the privileged tests.
pub(crate) const BINARIES: [&str; 3] = ["squall", "squall-agent", "recommender"];
/// The agent with the points at which a test can kill it (agent/src/crash.rs).
pub(crate) const CRASH: &str = "squall-agent-crash";

/// Builds the binaries, optimized; returns the directory they are in. Where `SQUALL_BIN_DIR` is set, those in it are
/// used as they are.
pub(crate) fn release() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("SQUALL_BIN_DIR") {
        return check(PathBuf::from(dir));
    }
    tools::show(&mut tools::cargo(release_of_all()))?;
    check(target_dir().join("release"))
}

/// Always of all three: another selection would mean other features of shared dependencies, and compiling them again.
fn release_of_all() -> impl Iterator<Item = &'static str> {
    let packages = BINARIES.iter().flat_map(|package| ["--package", package]);
    ["build", "--release", "--locked"].into_iter().chain(packages)
}

/// As [`release`], with the agent that has crash points beside the others.
pub(crate) fn for_tests() -> Result<PathBuf> {
    if env::var_os("SQUALL_BIN_DIR").is_none() {
        let crash = release_of_all().chain(["--features", "squall-agent/crash-points"]);
        let built = executables(crash)?;
        let agent = built.iter().find(|(name, _)| name == "squall-agent");
        let (_, agent) = agent.context("cargo built no squall-agent")?;
        let copy = target_dir().join("release").join(CRASH);
        // Not written into: a test may be running it.
        let beside = copy.with_extension("new");
        fs::copy(agent, &beside)
            .and_then(|_| fs::rename(&beside, &copy))
            .with_context(|| format!("cannot make {}", copy.display()))?;
    }
    let dir = release()?;
    ensure!(dir.join(CRASH).is_file(), "there is no {CRASH} in {}", dir.display());
    Ok(dir)
}

/// Runs a cargo command that builds executables; returns the name and path of each.
pub(crate) fn executables<S: AsRef<OsStr>>(
    args: impl IntoIterator<Item = S>,
) -> Result<Vec<(String, PathBuf)>> {
    let mut command = tools::cargo(args);
    command.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = command.output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("{} failed", tools::line(&command));
    }
    let mut found = Vec::new();
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let message: Value = serde_json::from_slice(line)?;
        let field = |path: &str| message.pointer(path).and_then(Value::as_str).map(ToOwned::to_owned);
        if let (Some(path), Some(name)) = (field("/executable"), field("/target/name")) {
            found.push((name, path.into()));
        }
    }
    Ok(found)
}

fn check(dir: PathBuf) -> Result<PathBuf> {
    for binary in BINARIES {
        ensure!(dir.join(binary).is_file(), "there is no {binary} in {}", dir.display());
    }
    Ok(dir)
}
