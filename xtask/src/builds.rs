//! The binaries.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::{target_dir, tools};

/// What runs in the demo and in the privileged tests.
pub(crate) const BINARIES: [&str; 3] = ["squall", "squall-agent", "recommender"];

/// Builds the binaries, optimized; returns the directory they are in.
pub(crate) fn release() -> Result<PathBuf> {
    let packages = BINARIES.iter().flat_map(|package| ["--package", package]);
    tools::show(&mut tools::cargo(["build", "--release", "--locked"].into_iter().chain(packages)))?;
    let dir = target_dir().join("release");
    for binary in BINARIES {
        ensure!(dir.join(binary).is_file(), "cargo built no {} in {}", binary, dir.display());
    }
    Ok(dir)
}
