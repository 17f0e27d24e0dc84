//! The binaries.

use std::{env, path::PathBuf};

use anyhow::{Result, ensure};

use crate::{target_dir, tools};

/// What runs in the demo and in the privileged tests.
pub(crate) const BINARIES: [&str; 3] = ["squall", "squall-agent", "recommender"];

/// Builds the binaries, optimized; returns the directory they are in. Where `SQUALL_BIN_DIR` is set, those in it are
/// used as they are.
pub(crate) fn release() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("SQUALL_BIN_DIR") {
        return check(PathBuf::from(dir));
    }
    let packages = BINARIES.iter().flat_map(|package| ["--package", package]);
    tools::show(&mut tools::cargo(["build", "--release", "--locked"].into_iter().chain(packages)))?;
    check(target_dir().join("release"))
}

fn check(dir: PathBuf) -> Result<PathBuf> {
    for binary in BINARIES {
        ensure!(dir.join(binary).is_file(), "there is no {binary} in {}", dir.display());
    }
    Ok(dir)
}
