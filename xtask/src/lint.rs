//! Formatting, dependencies, lints and documentation. Nothing may warn.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::{fuzz, setup, tools, workspace};

/// Runs everything; the first that fails ends it.
pub(crate) fn run() -> Result<ExitCode> {
    setup::ensure(setup::LINT)?;
    tools::show(&mut tools::cargo(["fmt", "--all", "--check"]))?;
    let deny = setup::deny().context("there is no cargo-deny")?;
    let check = ["--locked", "--log-level", "error", "check", "bans", "licenses", "sources"];
    tools::show(Command::new(deny).args(check).current_dir(workspace()))?;
    let clippy = ["--all-targets", "--", "-D", "warnings"];
    tools::show(&mut tools::cargo(["clippy"].iter().chain(&tools::HOST_CRATES).chain(&clippy)))?;
    // The same code with what only tests switch on.
    let features = format!("squall-agent/crash-points,{}", fuzz::FEATURES);
    let clippy = ["--bins", "--features", &features, "--", "-D", "warnings"];
    tools::show(&mut tools::cargo(["clippy"].iter().chain(&tools::HOST_CRATES).chain(&clippy)))?;
    // A program without std brings its own panic handler, which for the host needs panics that abort.
    let ebpf =
        ["clippy", "--locked", "--package", "squall-agent-ebpf", "--config", "profile.dev.panic=\"abort\""];
    tools::show(&mut tools::cargo(ebpf.iter().chain(&["--", "-D", "warnings"])))?;
    let docs = ["--no-deps", "--document-private-items"];
    let mut docs = tools::cargo(["doc"].iter().chain(&tools::HOST_CRATES).chain(&docs));
    tools::show(docs.env("RUSTDOCFLAGS", "-D warnings"))?;
    Ok(ExitCode::SUCCESS)
}
