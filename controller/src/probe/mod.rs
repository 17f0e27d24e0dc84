//! Probes: sources of samples.

use tokio::{sync::mpsc, task::JoinHandle};

use crate::{clock::Clock, event::What, plan::Probe};

/// Starts a probe.
pub(crate) fn start(_: &str, _: &Probe, _: Clock, tx: mpsc::UnboundedSender<What>) -> JoinHandle<()> {
    tokio::spawn(async move { tx.closed().await })
}
