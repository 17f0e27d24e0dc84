//! Formatting, lints and documentation. Nothing may warn.

use std::process::ExitCode;

use anyhow::Result;

use crate::{setup, tools};

/// Runs everything; the first that fails ends it.
pub(crate) fn run() -> Result<ExitCode> {
    setup::ensure(setup::BUILD)?;
    tools::show(&mut tools::cargo(["fmt", "--all", "--check"]))?;
    // The eBPF crate is no_std and for another target: it gets a call of its own.
    let clippy = ["--all-targets", "--", "-D", "warnings"];
    tools::show(&mut tools::cargo(["clippy"].iter().chain(&tools::HOST_CRATES).chain(&clippy)))?;
    let docs = ["--no-deps", "--document-private-items"];
    let mut docs = tools::cargo(["doc"].iter().chain(&tools::HOST_CRATES).chain(&docs));
    tools::show(docs.env("RUSTDOCFLAGS", "-D warnings"))?;
    Ok(ExitCode::SUCCESS)
}
