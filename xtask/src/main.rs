//! `cargo xtask`: everything around the code, in Rust, with no other tool to learn.

mod bench;
mod builds;
mod demo;
mod fuzz;
mod initramfs;
mod kernel;
mod lint;
mod setup;
mod suite;
mod tools;
mod vm;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Tasks of the Squall workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Find or install what is missing: eBPF toolchain, bpf-linker, packages for the tests.
    Setup {
        /// Install nothing; exit with 1 if something is missing.
        #[arg(long)]
        check: bool,
    },
    /// Build squall, squall-agent and the recommender, optimized.
    Build,
    /// Break a real service on this host and print the verdict; exit with its code. Needs root.
    Demo(demo::Options),
    /// Unit tests, the fuzz corpora among them, privileged tests on this host, and those in a VM with kernel 6.1.
    Test,
    /// The privileged tests on Debian's kernels, in QEMU.
    Vm(vm::Options),
    /// Measure, and print a Markdown table.
    Bench {
        #[command(subcommand)]
        subject: bench::Subject,
    },
    /// Fuzz the parsers with libFuzzer.
    Fuzz(fuzz::Options),
    /// rustfmt, cargo-deny, clippy and rustdoc, without a warning.
    Lint,
}

fn main() -> ExitCode {
    let task = Args::parse().task;
    // Of the demo, 1 is a verdict; a failure of ours must not look like one.
    let ours = if matches!(task, Task::Demo(_)) { demo::OURS } else { 1 };
    run(task).unwrap_or_else(|e| {
        eprintln!("error: {e:#}");
        ExitCode::from(ours)
    })
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Setup { check } => setup::report(check),
        Task::Build => {
            setup::ensure(setup::BUILD)?;
            builds::release()?;
            Ok(ExitCode::SUCCESS)
        }
        Task::Demo(options) => demo::run(&options),
        Task::Test => suite::run(),
        Task::Vm(options) => vm::run(&options),
        Task::Bench { subject } => bench::run(&subject),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Lint => lint::run(),
    }
}

/// The root of the workspace.
fn workspace() -> PathBuf {
    let xtask = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().map(PathBuf::from).unwrap_or(xtask)
}

/// Where cargo builds.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}
