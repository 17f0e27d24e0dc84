//! `squall`: runs plans of faults against agents and gives a verdict.

#![cfg_attr(feature = "fuzz", no_main, allow(dead_code, reason = "nothing runs but what is fuzzed"))]

mod agents;
mod certs;
mod check;
mod cli;
mod clock;
mod commands;
mod event;
#[cfg(test)]
mod fake;
mod faults;
mod fold;
#[cfg(any(feature = "fuzz", test))]
#[path = "../../tests/fuzz/controller.rs"]
mod fuzz;
mod gate;
mod gauges;
mod inject;
mod log;
mod outline;
mod plan;
mod probe;
mod progress;
mod replicas;
mod report;
mod round;
mod run;
mod signals;
mod stats;
mod stop;
mod store;
mod wrong;

use std::{
    io::Write as _,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result};
use clap::Parser;

use crate::cli::{Cli, Command, exit};

/// Whether anything in this process panicked.
static PANICKED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let mut cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are no errors.
            let code = if e.use_stderr() { exit::WRONG } else { exit::OK };
            let _ = e.print();
            return code.into();
        }
    };
    let tls = &cli.common.tls;
    cli.common.agents = cli.common.agents.into_iter().map(|agent| agent.with(tls)).collect();
    // A panic must never look like a verdict, not even one in a task that nothing waits for: 101 is no code of ours.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICKED.store(true, Ordering::SeqCst);
        print(panic);
    }));
    let code = std::panic::catch_unwind(|| {
        command(&cli).unwrap_or_else(|e| {
            let text = format!("{e:#}");
            let _ = writeln!(std::io::stderr(), "squall: {}", text.trim_end());
            wrong::exit_code(&e)
        })
    });
    match code {
        Ok(code) if !panicked() => code,
        _ => {
            let _ = writeln!(
                std::io::stderr(),
                "squall: this is a bug in squall; what was injected ends by its lease"
            );
            exit::OURS
        }
    }
    .into()
}

/// Whether anything in this process panicked: what it would say after that is not to be relied on.
fn panicked() -> bool {
    PANICKED.load(Ordering::SeqCst)
}

fn command(cli: &Cli) -> Result<u8> {
    if let Command::ExitCodes = cli.command {
        commands::out(&format!("{}\n", cli::EXIT_CODES));
        return Ok(exit::OK);
    }
    if let Command::Certs(certs) = &cli.command {
        return certs.run();
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let common = &cli.common;
        match &cli.command {
            Command::Check { plan } => check::check(common, plan).await,
            Command::Inject(what) => {
                let mut signals = signals::follow()?;
                inject::inject(common, what, &mut signals).await
            }
            Command::Status => commands::status(common).await,
            Command::Revert { ids, all } => commands::revert(common, ids, *all).await,
            Command::Stop { all: _, release } => stop::stop(common, *release).await,
            Command::Nodes => commands::nodes(common).await,
            Command::Run { plan, dry_run: true, seed } => check::preview(common, plan, *seed).await,
            Command::Run { plan, seed, dry_run: false } => {
                run::run(common, plan, *seed, signals::follow()?).await
            }
            Command::Report { run, format } => commands::report(common, run, *format),
            Command::Certs(_) | Command::ExitCodes => Ok(exit::OK),
        }
    })
}
