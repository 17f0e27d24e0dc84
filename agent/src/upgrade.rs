//! One agent takes the place of another: the new one injects again what the old one took back for that.
//!
//! Nothing of a fault outlives its agent, so between the two the host is as it was. Each has to be asked: the old one at
//! SIGTERM, the new one at its start. An agent that was killed left nothing to go on with.

use prost::Message as _;
use squall_proto::v1::{self, State};
use tracing::{error, info, warn};

use crate::{
    access::audit::{Audit, Entry},
    crash,
    engine::Engine,
    fault::{AnyFault, Kind},
    journal::Left,
    limits::Invalid,
};

/// What becomes of live injections when another agent takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Upgrade {
    /// SIGTERM leaves them to the next agent, and what the agent before left is resumed
    TakeOver,
    /// They end, and what the agent before left is not resumed
    End,
}

/// What can be asked of this agent: the list of faults, and how a message becomes one.
pub struct Known {
    /// Every kind of fault.
    pub kinds: &'static [Kind],
    /// Parses a fault.
    pub parse: fn(v1::Fault) -> Result<AnyFault, Invalid>,
}

/// Injects again what the agent before left, as far as that is asked for and allowed here, each in the audit log first.
/// What is not resumed says why: in the log, in the audit log, and to whoever asks for it by its id.
pub async fn resume(engine: &Engine, audit: &Audit, upgrade: Upgrade, known: &Known) {
    let taken = match engine.take_left() {
        Ok(taken) => taken,
        Err(e) => {
            error!("what the agent before left is not resumed: {e:#}");
            return;
        }
    };
    crash::point("engine.resume");
    let mut armed = Vec::new();
    for (left, removed) in taken {
        let entry = Entry {
            who: left.owner.clone().unwrap_or_default(),
            method: "Resume".to_owned(),
            ids: vec![left.id.clone()],
            target: left.target.to_string(),
            kind: left.kind.clone(),
            summary: left.summary.clone(),
            ..Entry::default()
        };
        let done = match removed {
            Ok(()) => arm(engine, audit, upgrade, known, &left, &entry).await,
            Err(e) => Err(e),
        };
        match done {
            Ok(()) => armed.push((left, entry)),
            Err(e) => refuse(engine, audit, known, left, entry, &format!("{e:#}")),
        }
    }
    let ids: Vec<String> = armed.iter().map(|(left, _)| left.id.clone()).collect();
    match engine.fire(&ids).await {
        Ok(fired) => {
            for (left, entry) in armed {
                match fired.iter().find(|injection| injection.id == left.id) {
                    Some(injection) if injection.state() != State::Active => {
                        refuse(engine, audit, known, left, entry, &injection.reason);
                    }
                    _ => info!(id = left.id, kind = left.kind, target = %left.target, "resumed"),
                }
            }
        }
        Err(e) => {
            let why = e.to_string();
            if let Err(e) = engine.revert(&ids, "it was not resumed").await {
                error!("{e:#}");
            }
            for (left, entry) in armed {
                refuse(engine, audit, known, left, entry, &why);
            }
        }
    }
}

async fn arm(
    engine: &Engine,
    audit: &Audit,
    upgrade: Upgrade,
    known: &Known,
    left: &Left,
    entry: &Entry,
) -> anyhow::Result<()> {
    if upgrade == Upgrade::End {
        anyhow::bail!("this agent does not take over; start it with --upgrade take-over");
    }
    let fault = (known.parse)(v1::Fault::decode(left.fault.as_slice())?)?;
    engine.arm_again(left, fault).await?;
    // Until it is fired, nothing is changed.
    let allowed = audit.record(Entry { verdict: "allowed".to_owned(), ..entry.clone() }).await;
    if let Err(e) = allowed {
        engine.revert(std::slice::from_ref(&left.id), "the audit log cannot be written").await?;
        return Err(e.context("the audit log cannot be written"));
    }
    Ok(())
}

fn refuse(engine: &Engine, audit: &Audit, known: &Known, left: Left, entry: Entry, why: &str) {
    warn!(id = left.id, kind = left.kind, target = %left.target, why, "not resumed");
    audit.note(Entry { verdict: "refused".to_owned(), reason: why.to_owned(), ..entry });
    engine.not_resumed(known.kinds, left, why);
}
