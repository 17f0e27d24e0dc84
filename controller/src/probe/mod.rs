//! Probes: sources of samples.
//!
//! A probe sends what it saw as events. It never judges, and it never stays silent about a sample it could not get. The
//! measures of the agents come as samples of targets and are turned into gauges where those arrive, so there is no
//! task for them here.

pub(crate) mod exposition;
mod load;
mod scrape;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{sync::mpsc, task::JoinHandle};

use crate::{clock::Clock, event::What, plan::Probe};

/// A second of a load probe that is over, while answers are missing still.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Second {
    /// Seconds since the start of the run.
    pub start: f64,
    /// Requests that were due in it.
    pub due: u64,
    /// Those of them that have failed by now.
    pub failed: u64,
}

/// What load probes know of the seconds that they have not told of yet. No evidence about a release, only for who must not wait
/// for the last answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Open(Arc<Mutex<BTreeMap<String, Vec<Second>>>>);

impl Open {
    fn set(&self, probe: &str, seconds: Vec<Second>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(probe.to_owned(), seconds);
    }

    /// Those of a probe, in order.
    pub(crate) fn of(&self, probe: &str) -> Vec<Second> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(probe).cloned().unwrap_or_default()
    }
}

/// Starts a probe that asks the service itself. It runs until it is aborted, or nobody listens any more.
pub(crate) fn start(
    name: &str,
    probe: &Probe,
    clock: Clock,
    tx: mpsc::UnboundedSender<What>,
    open: Open,
) -> JoinHandle<()> {
    let name = name.to_owned();
    match probe.clone() {
        Probe::Load(load) => tokio::spawn(load::run(name, load, clock, tx, open)),
        Probe::Scrape(scrape) => tokio::spawn(scrape::run(name, scrape, clock, tx)),
        Probe::Agent { .. } => tokio::spawn(async move { tx.closed().await }),
    }
}

/// An HTTP client that measures the service and nothing else: no proxy of the environment, no redirects followed.
fn client(idle: usize) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .http1_only()
        .tcp_nodelay(true)
        .pool_max_idle_per_host(idle)
        .user_agent(concat!("squall/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// What went wrong with a request, in a word or two.
fn kind_of(error: &reqwest::Error) -> &'static str {
    if error.is_timeout() {
        "timeout"
    } else if error.is_connect() {
        "connect"
    } else {
        "broken off"
    }
}
