//! Measurements.

use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;
use squall_lab::need_root;

use crate::{builds, setup, tools};

/// What is measured.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Subject {
    /// Idle memory and CPU of the agent, and the time from Inject to the first affected packet. Needs root.
    Agent,
}

/// Measures, and prints a Markdown table.
pub(crate) fn run(subject: Subject) -> Result<ExitCode> {
    need_root()?;
    setup::ensure(setup::DEMO)?;
    let binaries = builds::release()?;
    let name = match subject {
        Subject::Agent => "agent",
    };
    let mut command = tools::cargo(["bench", "--locked", "--package", "squall-tests", "--bench", name]);
    tools::show(command.env("SQUALL_BIN_DIR", binaries))?;
    Ok(ExitCode::SUCCESS)
}
