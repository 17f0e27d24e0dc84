//! Formatting, lints and documentation. Nothing may warn.

use std::process::ExitCode;

use anyhow::Result;

use crate::{setup, tools};

/// Runs everything; the first that fails ends it.
pub(crate) fn run() -> Result<ExitCode> {
    setup::ensure(setup::BUILD)?;
    tools::show(&mut tools::cargo(["fmt", "--all", "--check"]))?;
    // The eBPF crate is no_std and for another target: it gets a call of its own.
    let host = ["clippy", "--locked", "--workspace", "--exclude", "squall-agent-ebpf", "--all-targets"];
    tools::show(&mut tools::cargo(host.into_iter().chain(["--", "-D", "warnings"])))?;
    let docs = ["doc", "--locked", "--workspace", "--exclude", "squall-agent-ebpf", "--no-deps"];
    let private = ["--document-private-items"];
    tools::show(tools::cargo(docs.into_iter().chain(private)).env("RUSTDOCFLAGS", "-D warnings"))?;
    Ok(ExitCode::SUCCESS)
}
