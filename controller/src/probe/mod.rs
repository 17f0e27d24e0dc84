//! Probes: sources of samples.
//!
//! A probe sends what it saw as events. It never judges, and it never stays silent about a sample it could not get. The
//! measures of the agents come as samples of targets and are turned into gauges where those arrive, so there is no
//! task for them here.

pub(crate) mod exposition;
mod load;
mod scrape;

use tokio::{sync::mpsc, task::JoinHandle};

use crate::{clock::Clock, event::What, plan::Probe};

/// Starts a probe that asks the service itself. It runs until it is aborted, or nobody listens any more.
pub(crate) fn start(
    name: &str,
    probe: &Probe,
    clock: Clock,
    tx: mpsc::UnboundedSender<What>,
) -> JoinHandle<()> {
    let name = name.to_owned();
    match probe.clone() {
        Probe::Load(load) => tokio::spawn(load::run(name, load, clock, tx)),
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
