//! Measurements.

mod network;
mod plot;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use squall_lab::need_root;

use crate::{builds, setup, tools};

/// What is measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Subject {
    /// Idle memory and CPU of the agent, and the time from Inject to the first affected packet. Needs root.
    Agent,
    /// The network fault beside netem, in a VM for each kernel; and on this host. Needs root.
    Network(network::Options),
}

/// Measures, and prints a Markdown table.
pub(crate) fn run(subject: &Subject) -> Result<ExitCode> {
    need_root()?;
    match subject {
        Subject::Agent => {
            setup::ensure(setup::DEMO)?;
            let binaries = builds::release()?;
            let args = ["bench", "--locked", "--package", "squall-tests", "--bench", "agent"];
            tools::show(tools::cargo(args).env("SQUALL_BIN_DIR", binaries))?;
            Ok(ExitCode::SUCCESS)
        }
        Subject::Network(options) => network::run(options),
    }
}
