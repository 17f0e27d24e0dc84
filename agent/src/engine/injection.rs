//! The life of one injection: armed, fired, held, taken back.

use std::{collections::BTreeSet, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use futures::FutureExt;
use prost::Message as _;
use serde_json::Value;
use squall_proto::v1::{self, State};
use tokio::{
    sync::{Mutex as AsyncMutex, Notify, mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tracing::{error, info, warn};

use super::{Shared, is_live};
use crate::{
    crash,
    fault::{AnyFault, AnyHeld, Kind, Planned, Window},
    journal::{Left, Record},
    metrics::METRICS,
    target::Target,
    time::{BootTime, sleep_until},
};

/// How often a held fault's target is looked at: a vanished one ends the fault.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// A measurement so young is as good as a new one. However many ask, a revert does not wait behind them.
const FRESH: Duration = Duration::from_millis(10);
/// First pause after a failed revert; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long a caller waits for a Fire or a Revert before it is told how things stand.
const PATIENCE: Duration = Duration::from_secs(30);

/// What its task is asked for.
pub(super) enum Command {
    Fire,
    Revert(&'static str),
    HandOver,
    Renew(oneshot::Sender<bool>),
    Update(Box<AnyFault>, oneshot::Sender<Result<()>>),
    Observe(oneshot::Sender<()>),
}

/// What outlives even a panic of an injection's task: enough to take it back.
pub(super) struct Core {
    shared: Arc<Shared>,
    kind: Kind,
    pub(super) target: Target,
    /// Who injected it, where that is known.
    pub(super) owner: Option<String>,
    undo: Value,
    pub(super) status: watch::Sender<Status>,
    handing: AsyncMutex<Handing>,
    /// Wakes a stuck injection that waits for its next try.
    pub(super) retry: Notify,
}

/// Whether the next agent is to inject it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handing {
    /// Nobody asked for that.
    Possible,
    /// Its record is on disk.
    Done,
    /// Somebody asked for its end.
    Forbidden,
}

#[derive(Clone)]
pub(super) struct Status {
    pub(super) injection: v1::Injection,
    /// Reverts that failed.
    pub(super) failures: u32,
}

impl Status {
    pub(super) fn ended(&self) -> bool {
        !is_live(&self.injection)
    }
}

impl Core {
    pub(super) fn armed(
        shared: Arc<Shared>,
        id: &str,
        owner: &str,
        fault: &AnyFault,
        target: Target,
        plan: &Planned<Value>,
        (pods, pods_there): (BTreeSet<String>, usize),
    ) -> Arc<Self> {
        let injection = v1::Injection {
            id: id.to_owned(),
            kind: fault.kind().name.to_owned(),
            target: Some((&target).into()),
            state: State::Armed.into(),
            summary: fault.summary(),
            changes: plan.changes.clone(),
            warnings: plan.warnings.clone(),
            mechanism: plan.mechanism.clone(),
            seed: plan.seed,
            pods: pods.into_iter().collect(),
            pods_there: pods_there as u32,
            ..v1::Injection::default()
        };
        let owner = Some(owner.to_owned()).filter(|owner| !owner.is_empty());
        Self::new(shared, fault.kind(), target, owner, plan.undo.clone(), injection)
    }

    pub(super) fn left_over(shared: Arc<Shared>, kind: Kind, record: Record) -> Arc<Self> {
        let target = v1::ResolvedTarget::from(&record.target);
        let injection = v1::Injection {
            id: record.id,
            kind: kind.name.to_owned(),
            pods: Some(target.pod.clone()).filter(|pod| !pod.is_empty()).into_iter().collect(),
            target: Some(target),
            state: State::Stuck.into(),
            summary: "left by an earlier agent".to_owned(),
            ..v1::Injection::default()
        };
        Self::new(shared, kind, record.target, None, record.undo, injection)
    }

    pub(super) fn new(
        shared: Arc<Shared>,
        kind: Kind,
        target: Target,
        owner: Option<String>,
        undo: Value,
        injection: v1::Injection,
    ) -> Arc<Self> {
        let status = watch::Sender::new(Status { injection, failures: 0 });
        let handing = AsyncMutex::new(Handing::Possible);
        Arc::new(Self { shared, kind, target, owner, undo, status, handing, retry: Notify::new() })
    }

    /// Sees to it that no agent injects it again.
    pub(super) async fn forbid_handing(self: &Arc<Self>, why: &str) -> Result<()> {
        let mut handing = self.handing.lock().await;
        if *handing == Handing::Done {
            let core = Arc::clone(self);
            let removed = tokio::task::spawn_blocking(move || core.shared.journal.left.remove(&core.id()));
            removed.await.context("write the journal").flatten().with_context(|| {
                format!("{} is reverted, but the next agent will inject it again: stop this node", self.id())
            })?;
        }
        *handing = Handing::Forbidden;
        if self.injection().state() == State::HandedOver {
            self.end(State::Reverted, why);
        }
        Ok(())
    }

    /// How it stands now.
    pub(super) fn injection(&self) -> v1::Injection {
        let mut injection = self.status.borrow().injection.clone();
        injection.now_boot_ns = BootTime::now().0;
        injection
    }

    pub(super) fn id(&self) -> String {
        self.status.borrow().injection.id.clone()
    }

    /// Waits until a condition holds, or for as long as a caller is expected to wait; says how things stand then.
    pub(super) async fn wait(&self, condition: impl FnMut(&Status) -> bool) -> v1::Injection {
        let mut status = self.status.subscribe();
        let _patience_over = timeout(PATIENCE, status.wait_for(condition)).await;
        self.injection()
    }

    /// Changes what is known of it, and tells everyone.
    fn set(&self, change: impl FnOnce(&mut v1::Injection)) {
        self.status.send_modify(|status| change(&mut status.injection));
        let _nobody_listens = self.shared.changes.send(self.injection());
    }

    fn end(&self, state: State, reason: &str) {
        info!(id = self.id(), kind = self.kind.name, target = %self.target, reason, state = state.as_str_name(), "ended");
        METRICS.ended(self.kind.name, state);
        self.set(|i| {
            i.state = state.into();
            reason.clone_into(&mut i.reason);
        });
    }

    /// Takes it back. Where that fails it is stuck, and this says false.
    pub(super) async fn try_revert(self: &Arc<Self>, why: &str) -> bool {
        let started = Instant::now();
        crash::point("engine.revert");
        let reverted = AssertUnwindSafe(self.kind.revert(self.undo.clone())).catch_unwind().await;
        let reverted = reverted.unwrap_or_else(|_| Err(anyhow::anyhow!("the revert panicked")));
        METRICS.revert(self.kind.name, started.elapsed(), reverted.is_ok());
        if let Err(e) = reverted {
            error!(id = self.id(), kind = self.kind.name, target = %self.target, error = format!("{e:#}"), "revert failed; it is retried");
            self.status.send_modify(|s| s.failures += 1);
            self.set(|i| {
                i.state = State::Stuck.into();
                i.reason = format!("{why}, but the revert failed: {e:#}");
            });
            return false;
        }
        crash::point("engine.reverted");
        // Reverted is reverted: a record that cannot be removed is tried again, or replayed at the next start.
        if let Err(e) = self.shared.journal.undo.remove(&self.id()) {
            error!(id = self.id(), error = format!("{e:#}"), "reverted, but its undo record stays for now");
            tokio::spawn(Arc::clone(self).forget());
        }
        crash::point("engine.removed");
        let handing = self.handing.lock().await;
        let state = if *handing == Handing::Done { State::HandedOver } else { State::Reverted };
        self.end(state, why);
        true
    }

    /// Tries again, with growing pauses, until it is taken back.
    pub(super) async fn retry_revert(self: &Arc<Self>, why: &str) {
        let mut pause = FIRST_PAUSE;
        loop {
            let _time_or_asked = timeout(pause, self.retry.notified()).await;
            if self.try_revert(why).await {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Tries, with growing pauses, to remove the record of what is reverted.
    async fn forget(self: Arc<Self>) {
        let mut pause = FIRST_PAUSE;
        loop {
            sleep(pause).await;
            if self.shared.journal.undo.remove(&self.id()).is_ok() {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn take_back(self: &Arc<Self>, why: &str) {
        if !self.try_revert(why).await {
            self.retry_revert(why).await;
        }
    }
}

/// The life of one injection.
pub(super) struct Task {
    pub(super) core: Arc<Core>,
    pub(super) fault: AnyFault,
    /// What tells its order from another.
    pub(super) order: String,
    pub(super) duration: Duration,
    pub(super) lease: Duration,
    /// What an earlier agent left, where this goes on with it.
    pub(super) resumed: Option<Left>,
    pub(super) commands: mpsc::Receiver<Command>,
}

impl Task {
    /// Lives, and if that panics, takes back what was injected.
    pub(super) async fn supervise(self) {
        let core = Arc::clone(&self.core);
        if AssertUnwindSafe(self.live()).catch_unwind().await.is_err() {
            error!(id = core.id(), "the task of this injection panicked");
            core.take_back("a bug in the agent ended it").await;
        }
    }

    async fn live(mut self) {
        if !self.fired().await {
            return;
        }
        let Some(mut held) = self.inject().await else { return };
        let why = self.hold(&mut held).await;
        crash::point("engine.end");
        self.measure(&mut held).await;
        drop(held);
        crash::point("engine.dropped");
        self.take_back(why).await;
    }

    async fn take_back(&mut self, why: &str) {
        if !self.core.try_revert(why).await {
            // That may take for ever. Nobody is to wait for an answer, or for a place in a queue that is not read.
            self.commands = mpsc::channel(1).1;
            self.core.retry_revert(why).await;
        }
    }

    /// Waits to be fired. False: it ended before.
    async fn fired(&mut self) -> bool {
        let expiry = BootTime::now() + self.lease;
        loop {
            let ended = tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    Some(Command::Fire) => return true,
                    Some(Command::Renew(reply)) => {
                        let _gone = reply.send(false);
                        continue;
                    }
                    Some(Command::Update(_, _) | Command::Observe(_)) => continue,
                    Some(Command::Revert(why)) => why,
                    Some(Command::HandOver) => "the agent was replaced before it was fired",
                    None => "the agent stopped",
                },
                () = sleep_until(expiry) => "it was armed, but never fired",
            };
            self.core.end(State::Reverted, ended);
            return false;
        }
    }

    /// Journal first, then the kernel.
    async fn inject(&mut self) -> Option<AnyHeld> {
        let core = Arc::clone(&self.core);
        let record = Record {
            id: core.id(),
            kind: core.kind.name.to_owned(),
            target: core.target.clone(),
            undo: core.undo.clone(),
            created: BootTime::now(),
            boot_id: core.shared.boot_id.clone(),
        };
        crash::point("engine.fire");
        let shared = Arc::clone(&core.shared);
        let written = tokio::task::spawn_blocking(move || shared.journal.undo.write(&record)).await;
        if let Err(e) = written.context("write the journal").flatten() {
            core.end(State::Failed, &format!("{e:#}"));
            return None;
        }
        crash::point("engine.journaled");
        let now = BootTime::now();
        let (deadline, lease_ends) = match &self.resumed {
            Some(left) => (left.deadline, left.lease_ends),
            None => (now + self.duration, now + self.lease),
        };
        let window = Window { not_before: now, until: deadline.min(lease_ends) };
        match self.fault.inject(&core.target, &core.undo, window).await {
            Ok(held) => {
                crash::point("engine.injected");
                info!(id = core.id(), kind = core.kind.name, target = %core.target, summary = self.fault.summary(), "injected");
                core.set(|i| {
                    i.state = State::Active.into();
                    i.fired_boot_ns = now.0;
                    i.ends_boot_ns = deadline.0;
                    i.lease_ends_boot_ns = lease_ends.0;
                    if let Some(left) = &self.resumed {
                        note_resumed(i, left);
                    }
                });
                Some(held)
            }
            Err(e) => {
                warn!(id = core.id(), kind = core.kind.name, error = format!("{e:#}"), "inject failed");
                let why = format!("inject failed: {e:#}");
                self.take_back(&why).await;
                core.set(|i| i.state = State::Failed.into());
                None
            }
        }
    }

    /// Holds it until something ends it; says what.
    async fn hold(&mut self, held: &mut AnyHeld) -> &'static str {
        let mut look = tokio::time::interval(ALIVE_EVERY);
        let mut measured: Option<Instant> = None;
        loop {
            let (deadline, lease_ends) = {
                let status = self.core.status.borrow();
                (BootTime(status.injection.ends_boot_ns), BootTime(status.injection.lease_ends_boot_ns))
            };
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    Some(Command::Revert(why)) => return why,
                    Some(Command::HandOver) => {
                        self.leave().await;
                        return "the agent was replaced";
                    }
                    None => return "the agent stopped",
                    Some(Command::Fire) => {}
                    Some(Command::Renew(reply)) => {
                        let renewed = self.renew(held, deadline).await;
                        let _gone = reply.send(renewed);
                    }
                    Some(Command::Update(fault, reply)) => {
                        crash::point("engine.update");
                        let updated = held.update(&fault).await;
                        crash::point("engine.updated");
                        measured = None;
                        if updated.is_ok() {
                            self.core.set(|i| i.summary = fault.summary());
                            self.fault = *fault;
                        }
                        let _gone = reply.send(updated);
                    }
                    Some(Command::Observe(reply)) => {
                        if measured.is_none_or(|at| at.elapsed() >= FRESH) {
                            self.measure(held).await;
                            measured = Some(Instant::now());
                        }
                        let _gone = reply.send(());
                    }
                },
                () = sleep_until(deadline) => return "its time was up",
                () = sleep_until(lease_ends) => return "its lease was not renewed",
                _ = look.tick() => {
                    if !self.core.target.alive() {
                        return "its target is gone";
                    }
                    if let Some(why) = held.ended() {
                        return why;
                    }
                }
            }
        }
    }

    async fn renew(&self, held: &mut AnyHeld, deadline: BootTime) -> bool {
        crash::point("engine.renew");
        let lease_ends = BootTime::now() + self.lease;
        if let Err(e) = held.extend(lease_ends.min(deadline)).await {
            warn!(id = self.core.id(), error = format!("{e:#}"), "a lease could not be renewed");
            return false;
        }
        self.core.status.send_modify(|s| s.injection.lease_ends_boot_ns = lease_ends.0);
        crash::point("engine.renewed");
        true
    }

    /// Writes down for the next agent how to go on. Where that fails it just ends.
    async fn leave(&self) {
        let core = Arc::clone(&self.core);
        let mut handing = core.handing.lock().await;
        if *handing == Handing::Forbidden || core.shared.stop.is_set() {
            return;
        }
        let injection = core.injection();
        let left = Left {
            id: injection.id,
            owner: core.owner.clone(),
            kind: injection.kind,
            summary: injection.summary,
            fault: self.fault.message().encode_to_vec(),
            seed: injection.seed,
            target: core.target.clone(),
            order: self.order.clone(),
            duration: self.duration,
            lease: self.lease,
            fired: BootTime(injection.fired_boot_ns),
            deadline: BootTime(injection.ends_boot_ns),
            lease_ends: BootTime(injection.lease_ends_boot_ns),
            left: BootTime::now(),
            boot_id: core.shared.boot_id.clone(),
        };
        crash::point("engine.leave");
        let shared = Arc::clone(&core.shared);
        let written = tokio::task::spawn_blocking(move || shared.journal.left.write(&left)).await;
        match written.context("write the journal").flatten() {
            Ok(()) => *handing = Handing::Done,
            Err(e) => error!(id = core.id(), error = format!("{e:#}"), "it ends with this agent"),
        }
        crash::point("engine.left");
    }

    async fn measure(&self, held: &mut AnyHeld) {
        match held.effect().await {
            Ok(effect) => self.core.status.send_modify(|s| s.injection.effect = Some(effect)),
            Err(e) => {
                warn!(id = self.core.id(), error = format!("{e:#}"), "the effect could not be measured");
            }
        }
    }
}

/// Says on an injection what it went through.
fn note_resumed(i: &mut v1::Injection, left: &Left) {
    let (agent_version, now) = (env!("CARGO_PKG_VERSION").to_owned(), BootTime::now().0);
    let gap_ns = now.saturating_sub(left.left.0);
    i.fired_boot_ns = left.fired.0;
    i.warnings.push(format!(
        "resumed by agent {agent_version} after {:.1} s without it; what is counted began anew",
        gap_ns as f64 / 1e9
    ));
    i.resumed = Some(v1::Resumption { agent_version, at_boot_ns: now, gap_ns });
}
