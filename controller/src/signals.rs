//! What a person asks for while something runs: once to stop and revert, twice to leave.

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Asked {
    /// Nothing.
    GoOn,
    /// Stop, and revert everything.
    Stop,
    /// Leave now; leases end what is left.
    Leave,
}

/// Follows SIGINT, SIGTERM and SIGHUP. From here on they do not end the process by themselves.
pub(crate) fn follow() -> std::io::Result<watch::Receiver<Asked>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let (tx, rx) = watch::channel(Asked::GoOn);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            tx.send_modify(|asked| {
                *asked = if *asked == Asked::GoOn { Asked::Stop } else { Asked::Leave };
            });
        }
    });
    Ok(rx)
}

/// Waits until at least this much was asked for. Without anybody to ask it waits for ever.
pub(crate) async fn asked(signals: &mut watch::Receiver<Asked>, least: Asked) {
    if signals.wait_for(|asked| *asked >= least).await.is_err() {
        std::future::pending::<()>().await;
    }
}
