//! The one place where order lives: plan → journal → inject → lease → revert.
//!
//! **Invariant:** the engine names no concrete fault, and nobody else calls `inject`.
//!
//! Every injection is a task of its own, so that a slow one never holds up the revert of another. Its state is a
//! [`watch`](tokio::sync::watch) value that anybody may read; commands reach it through a channel.
//!
//! Handing over is a revert like any other, with a record written before it from which the next agent injects again.
//! **Invariant:** once somebody asked for a revert or a stop, there is no such record, and none comes to be.

mod injection;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures::future::join_all;
use serde_json::Value;
use squall_proto::v1::{self, State};
use thiserror::Error;
use tokio::sync::{broadcast, mpsc, oneshot};
use tracing::{error, info, warn};

use self::injection::{Command, Core, Task};
use crate::{
    crash,
    fault::{AnyFault, Kind},
    journal::{Journal, Left, boot_id, is_id, set_aside},
    limits::{Invalid, Limits},
    metrics::METRICS,
    pods::Pods,
    stop::Stop,
    target::Target,
};

/// Ended injections that are remembered, so that a controller can still ask what became of them.
const REMEMBERED: usize = 256;

/// Why the engine refused or failed. Where nothing else is said, nothing was changed.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The request is wrong or beyond the limits.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// It collides with what is there already.
    #[error("{0}")]
    Conflict(String),
    /// No injection has this id.
    #[error("no injection {0} on this agent")]
    Unknown(String),
    /// As many injections as allowed are live.
    #[error("{0} injections are live, and this agent allows no more; revert one first")]
    Full(usize),
    /// Somebody stopped this node.
    #[error("this node is stopped, and nothing may be injected; `squall stop --release` allows it again")]
    Stopped,
    /// It ends, and another agent may take its place.
    #[error("this agent is going away; ask again when another one is there")]
    Leaving,
    /// The host refused.
    #[error("{0:#}")]
    Host(#[from] anyhow::Error),
}

/// What to inject, and for how long.
pub struct Order {
    /// Id; the n-th target of several gets `<id>.<n>`.
    pub id: String,
    /// Who gives it.
    pub owner: String,
    /// Where, each an injection of its own.
    pub targets: Vec<Target>,
    /// What, parsed once for each target.
    pub faults: Vec<AnyFault>,
    /// From Fire to the deadline.
    pub duration: Duration,
    /// Ends without a renewal for this long.
    pub lease: Duration,
    /// Check and plan, keep nothing.
    pub dry_run: bool,
}

/// The injections of this agent.
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

struct Shared {
    journal: Journal,
    limits: Limits,
    stop: Stop,
    /// This agent ends: nothing new is done, only taken back.
    ending: AtomicBool,
    /// And another agent takes its place.
    leaving: AtomicBool,
    boot_id: String,
    injections: Mutex<BTreeMap<String, Entry>>,
    /// Held from the look at what is live to what comes beside it.
    arming: Mutex<()>,
    changes: broadcast::Sender<v1::Injection>,
}

struct Entry {
    core: Arc<Core>,
    order: Option<(String, Duration, Duration)>,
    commands: mpsc::Sender<Command>,
}

/// What an injection is reached by.
type Handle = (Arc<Core>, mpsc::Sender<Command>);

impl Engine {
    /// An engine over a journal. What the journal holds of an earlier agent is taken back by [`Engine::replay`].
    pub fn new(journal: Journal, limits: Limits, stop: Stop) -> Result<Self> {
        Ok(Self(Arc::new(Shared {
            journal,
            limits,
            stop,
            ending: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            boot_id: boot_id()?,
            injections: Mutex::default(),
            arming: Mutex::default(),
            changes: broadcast::channel(1024).0,
        })))
    }

    /// Takes back what an earlier agent left, the newest first. What fails is kept as stuck and retried.
    pub async fn replay(&self, kinds: &[Kind]) -> Result<()> {
        let found = self.0.journal.undo.read()?;
        let unread =
            found.unread.into_iter().map(|(path, error)| (path, error + "; it stays for the next start"));
        let aside = found.aside.into_iter().map(|path| (path, "it was set aside before".to_owned()));
        for (path, reason) in found.set_aside.into_iter().chain(unread).chain(aside) {
            error!(path = %path.display(), reason, "an undo record cannot be read, and nothing was undone from it");
            METRICS.unreadable_records.inc();
        }
        for record in found.records {
            let id = record.id.clone();
            if record.boot_id != self.0.boot_id {
                info!(id, "made before a reboot, which undid it");
                if let Err(e) = self.0.journal.undo.remove(&id) {
                    warn!(id, "{e:#}");
                }
                continue;
            }
            let Some(kind) = kinds.iter().find(|k| k.name == record.kind) else {
                error!(
                    id,
                    kind = record.kind,
                    "this agent does not know this kind of fault; its record is kept"
                );
                continue;
            };
            info!(id, kind = kind.name, target = %record.target, "taking back what an earlier agent left");
            crash::point("engine.replay");
            let core = Core::left_over(Arc::clone(&self.0), *kind, record);
            let (commands, _) = mpsc::channel(1);
            self.0.insert(id, Entry { core: Arc::clone(&core), order: None, commands })?;
            if !core.try_revert("left by an earlier agent").await {
                tokio::spawn(async move { core.retry_revert("left by an earlier agent").await });
            }
        }
        Ok(())
    }

    /// Checks and plans an order; keeps it until it is fired, or for one lease. Changes nothing on the host.
    ///
    /// The same order again returns what the first one did.
    pub async fn arm(&self, order: Order) -> Result<Vec<v1::Injection>, EngineError> {
        self.0.refuse_stopped()?;
        if !is_id(&order.id) {
            let fix = "use 1 to 100 letters, digits, '.', '_' or '-', not starting with '.'";
            return Err(Invalid::new("id", &order.id, "not an id", fix).into());
        }
        self.0.limits.check_times(order.duration, order.lease)?;
        let pods = self.0.pods().await?;
        let many = order.targets.len() > 1;
        let mut planned = Vec::new();
        for (n, (target, fault)) in order.targets.into_iter().zip(order.faults).enumerate() {
            let id = if many { format!("{}.{n}", order.id) } else { order.id.clone() };
            let hurt = self.0.check(&target, &fault, &pods)?;
            let digest = format!("{} {} {}", fault.kind().name, target.identity(), fault.summary());
            if let Some(there) = self.0.same_order(&id, &digest, order.duration, order.lease)? {
                planned.push((there, None));
                continue;
            }
            self.0.refuse_beside_stuck(&target)?;
            let plan = fault.plan(&target).await?;
            let pods = (hurt, pods.count());
            let core = Core::armed(Arc::clone(&self.0), &id, &order.owner, &fault, target, &plan, pods);
            planned.push((core, Some((fault, digest))));
        }
        let _one_at_a_time = self.0.arming.lock().unwrap_or_else(PoisonError::into_inner);
        // What held above may hold no more: planning takes its time.
        self.0.refuse_stopped()?;
        for (core, new) in &mut planned {
            let Some((_, digest)) = new else { continue };
            if let Some(there) = self.0.same_order(&core.id(), digest, order.duration, order.lease)? {
                (*core, *new) = (there, None);
            }
        }
        let new = planned.iter().filter(|(_, new)| new.is_some()).count();
        let live = self.0.live();
        if live + new > self.0.limits.most_injections {
            return Err(EngineError::Full(live));
        }
        let mut hurt = self.0.hurt();
        for (core, _) in planned.iter().filter(|(_, new)| new.is_some()) {
            hurt.extend(core.injection().pods);
            self.0.limits.check_pods(&core.target.name, hurt.len(), pods.count())?;
        }
        let mut armed = Vec::new();
        for (core, new) in planned {
            armed.push(core.injection());
            let Some((fault, digest)) = new.filter(|_| !order.dry_run) else { continue };
            self.start(core, fault, (digest, order.duration, order.lease), None)?;
        }
        Ok(armed)
    }

    /// Has an armed injection wait to be fired.
    fn start(
        &self,
        core: Arc<Core>,
        fault: AnyFault,
        order: (String, Duration, Duration),
        resumed: Option<Left>,
    ) -> Result<(), EngineError> {
        let (commands, inbox) = mpsc::channel(16);
        self.0.insert(core.id(), Entry { core: Arc::clone(&core), order: Some(order.clone()), commands })?;
        let (order, duration, lease) = order;
        let task = Task { core, fault, order, duration, lease, resumed, commands: inbox };
        tokio::spawn(task.supervise());
        Ok(())
    }

    /// What the agent before left to be injected again. It is on disk no more, so that it is injected again at most once;
    /// with what could not be removed comes the error, and it must not be.
    pub fn take_left(&self) -> Result<Vec<(Left, Result<()>)>> {
        let found = self.0.journal.left.read()?;
        for (path, _) in &found.unread {
            // Later it would be injected after somebody asked for its end, and was told that there is none.
            set_aside(path)?;
        }
        for (path, reason) in found.set_aside.into_iter().chain(found.unread) {
            error!(path = %path.display(), reason, "what an agent left cannot be read; it was set aside and is not resumed");
            METRICS.unreadable_records.inc();
        }
        // In the order in which they were injected: the first rule that matches wins.
        let mut left = found.records;
        left.sort_by_key(|left| left.fired);
        Ok(left
            .into_iter()
            .map(|left| {
                let removed = self.0.journal.left.remove(&left.id);
                (left, removed)
            })
            .collect())
    }

    /// Checks and plans again what the agent before left. [`Engine::fire`] injects it, to end when it would have ended.
    pub async fn arm_again(&self, left: &Left, mut fault: AnyFault) -> Result<(), EngineError> {
        self.0.refuse_stopped()?;
        let over = |why: &str| Err(EngineError::Conflict(why.to_owned()));
        if left.boot_id != self.0.boot_id {
            return over("it was left before a reboot");
        }
        if left.deadline.remaining().is_zero() {
            return over("its time was up while no agent ran");
        }
        if left.lease_ends.remaining().is_zero() {
            return over("its lease was not renewed while no agent ran");
        }
        if !left.target.alive() {
            return over("its target is gone");
        }
        self.0.limits.check_times(left.duration, left.lease)?;
        let pods = self.0.pods().await?;
        let hurt = self.0.check(&left.target, &fault, &pods)?;
        self.0.refuse_beside_stuck(&left.target)?;
        fault.draw_from(left.seed);
        let plan = fault.plan(&left.target).await?;
        let _one_at_a_time = self.0.arming.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.refuse_stopped()?;
        self.0.refuse_recorded(&left.id)?;
        let live = self.0.live();
        if live >= self.0.limits.most_injections {
            return Err(EngineError::Full(live));
        }
        let mut all = self.0.hurt();
        all.extend(hurt.iter().cloned());
        self.0.limits.check_pods(&left.target.name, all.len(), pods.count())?;
        let owner = left.owner.as_deref().unwrap_or_default();
        let (target, pods) = (left.target.clone(), (hurt, pods.count()));
        let core = Core::armed(Arc::clone(&self.0), &left.id, owner, &fault, target, &plan, pods);
        self.start(core, fault, (left.order.clone(), left.duration, left.lease), Some(left.clone()))
    }

    /// Remembers that something was left and is not injected again, so that whoever asks is told why.
    pub fn not_resumed(&self, kinds: &[Kind], left: Left, why: &str) {
        let Some(kind) = kinds.iter().find(|kind| kind.name == left.kind) else { return };
        let injection = v1::Injection {
            id: left.id.clone(),
            kind: left.kind,
            target: Some((&left.target).into()),
            state: State::Reverted.into(),
            summary: left.summary,
            fired_boot_ns: left.fired.0,
            seed: left.seed,
            reason: format!("not resumed when the agent was replaced: {why}"),
            ..v1::Injection::default()
        };
        let core = Core::new(Arc::clone(&self.0), *kind, left.target, left.owner, Value::Null, injection);
        let entry = Entry { core, order: None, commands: mpsc::channel(1).0 };
        let _what_is_stuck_says_more = self.0.insert(left.id, entry);
    }

    /// Who injected it, where that is known.
    pub fn owner(&self, id: &str) -> Option<String> {
        self.0.lock().get(id)?.core.owner.clone()
    }

    /// Injects what was armed, all at once. Says how each one stands then; firing twice changes nothing.
    pub async fn fire(&self, ids: &[String]) -> Result<Vec<v1::Injection>, EngineError> {
        self.0.refuse_stopped()?;
        let entries = self.entries(ids)?;
        let fired = entries.into_iter().map(|(core, commands)| async move {
            let _gone = commands.send(Command::Fire).await;
            core.wait(|s| s.injection.state() != State::Armed).await
        });
        Ok(join_all(fired).await)
    }

    /// Extends leases. Returns the ids that are not live any more.
    pub async fn renew(&self, ids: &[String]) -> Result<Vec<String>, EngineError> {
        let renewed = ids.iter().map(|id| async move {
            let Ok(entries) = self.entries(std::slice::from_ref(id)) else { return false };
            let mut live = !entries.is_empty();
            for (_, commands) in entries {
                let (reply, answer) = oneshot::channel();
                live &= commands.send(Command::Renew(reply)).await.is_ok() && answer.await.unwrap_or(false);
            }
            live
        });
        let renewed = join_all(renewed).await;
        // What is handed over is not live, and not gone.
        self.0.refuse_leaving()?;
        let gone = ids.iter().zip(renewed).filter(|(_, live)| !live).map(|(id, _)| id.clone());
        Ok(gone.collect())
    }

    /// Changes the parameters of a live injection in place.
    pub async fn update(&self, id: &str, fault: AnyFault) -> Result<v1::Injection, EngineError> {
        self.0.refuse_stopped()?;
        let mut entries = self.entries(&[id.to_owned()])?;
        let (Some((core, commands)), true) = (entries.pop(), entries.is_empty()) else {
            let why = format!("{id} is several injections; update each by its own id");
            return Err(EngineError::Conflict(why));
        };
        fault.check(&core.target, &self.0.limits)?;
        let (reply, answer) = oneshot::channel();
        let not_live = || EngineError::Conflict(format!("{id} is not active, so there is nothing to update"));
        commands.send(Command::Update(Box::new(fault), reply)).await.map_err(|_| not_live())?;
        answer.await.map_err(|_| not_live())??;
        Ok(core.injection())
    }

    /// Ends injections, all at once, and waits until their hosts are as before. What is gone already is a success.
    pub async fn revert(&self, ids: &[String], why: &'static str) -> Result<Vec<v1::Injection>, EngineError> {
        let entries = self.entries(ids)?;
        let reverted = entries.into_iter().map(|(core, commands)| async move {
            let failures = core.status.borrow().failures;
            let _gone = commands.send(Command::Revert(why)).await;
            let forbidden = core.forbid_handing(why).await;
            core.retry.notify_one();
            let injection = core.wait(|s| s.ended() || s.failures > failures).await;
            forbidden.map(|()| injection)
        });
        Ok(join_all(reverted).await.into_iter().collect::<Result<_>>()?)
    }

    /// Reverts everything that is live, and leaves what is injected to the next agent. From now on nothing is injected,
    /// changed or renewed here. Returns what could not be reverted; the next agent tries again, and resumes it then.
    pub async fn hand_over(&self) -> Vec<v1::Injection> {
        self.0.leaving.store(true, Ordering::SeqCst);
        self.end_all(|| Command::HandOver).await
    }

    /// Reverts everything that is live. From now on nothing is injected or changed here. Returns what could not be reverted.
    pub async fn drain(&self, why: &'static str) -> Vec<v1::Injection> {
        self.end_all(|| Command::Revert(why)).await
    }

    async fn end_all(&self, command: impl Fn() -> Command) -> Vec<v1::Injection> {
        self.0.ending.store(true, Ordering::SeqCst);
        // Whoever looked before that has come to be listed, once nobody holds this.
        drop(self.0.arming.lock().unwrap_or_else(PoisonError::into_inner));
        let live = |entry: &&Entry| is_live(&entry.core.injection());
        let handle = |entry: &Entry| (Arc::clone(&entry.core), entry.commands.clone());
        let entries: Vec<Handle> = self.0.lock().values().filter(live).map(handle).collect();
        let ended = entries.into_iter().map(|(core, commands)| {
            let command = command();
            async move {
                let failures = core.status.borrow().failures;
                let _gone = commands.send(command).await;
                core.retry.notify_one();
                core.wait(|s| s.ended() || s.failures > failures).await
            }
        });
        join_all(ended).await.into_iter().filter(is_live).collect()
    }

    /// Refuses injections from now on, also those of the next agent, and reverts everything that is live. Returns that.
    pub async fn stop(&self) -> Result<Vec<v1::Injection>> {
        let kept = self.0.stop.set();
        let reverted = self.end_stopped().await;
        kept.map(|()| reverted)
    }

    /// Allows injections again.
    pub fn release(&self) -> Result<()> {
        self.0.stop.release()
    }

    /// Whether injections are refused because somebody stopped this node.
    pub fn stopped(&self) -> bool {
        self.0.stop.is_set()
    }

    /// Reverts what is live in spite of a stop, for as long as this runs.
    pub async fn obey_stop(&self) {
        let mut watch = self.0.stop.watch();
        loop {
            let stopped = self.stopped();
            if stopped && self.list().iter().any(is_unstopped) {
                self.end_stopped().await;
            }
            watch.next(stopped).await;
        }
    }

    async fn end_stopped(&self) -> Vec<v1::Injection> {
        let may_live = |i: &v1::Injection| is_live(i) || i.state() == State::HandedOver;
        let ids: Vec<_> = self.list().into_iter().filter(may_live).map(|i| i.id).collect();
        warn!(live = ids.len(), "stopped: nothing is injected until it is released");
        self.revert(&ids, "this node was stopped").await.unwrap_or_else(|e| {
            error!("{e:#}");
            Vec::new()
        })
    }

    /// All injections, ended ones included for a while.
    pub fn list(&self) -> Vec<v1::Injection> {
        self.0.lock().values().map(|e| e.core.injection()).collect()
    }

    /// As [`Engine::list`], with the effects measured now. Only these ids, where some are given.
    pub async fn observe(&self, ids: &[String]) -> Result<Vec<v1::Injection>, EngineError> {
        let ids = if ids.is_empty() { self.list().into_iter().map(|i| i.id).collect() } else { ids.to_vec() };
        let observed = self.entries(&ids)?.into_iter().map(|(core, commands)| async move {
            let (reply, answer) = oneshot::channel();
            if commands.send(Command::Observe(reply)).await.is_ok() {
                let _ended = answer.await;
            }
            core.injection()
        });
        Ok(join_all(observed).await)
    }

    /// Every change of state from now on.
    pub fn changes(&self) -> broadcast::Receiver<v1::Injection> {
        self.0.changes.subscribe()
    }

    /// The limits that orders are checked against.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// The injections of ids; `<id>` also names its `<id>.<n>`.
    fn entries(&self, ids: &[String]) -> Result<Vec<Handle>, EngineError> {
        let injections = self.0.lock();
        let mut entries = Vec::new();
        for id in ids {
            let part = |key: &str| {
                key.strip_prefix(id.as_str())
                    .and_then(|rest| rest.strip_prefix('.'))
                    .is_some_and(|n| n.parse::<u32>().is_ok())
            };
            let before = entries.len();
            let matching = injections.iter().filter(|(key, _)| *key == id || part(key));
            entries.extend(matching.map(|(_, e)| (Arc::clone(&e.core), e.commands.clone())));
            if entries.len() == before {
                return Err(EngineError::Unknown(id.clone()));
            }
        }
        Ok(entries)
    }
}

/// Whether it hurts, may come to hurt, or could not be taken back yet.
pub fn is_live(injection: &v1::Injection) -> bool {
    matches!(injection.state(), State::Armed | State::Active | State::Stuck)
}

fn taken(id: &str) -> EngineError {
    EngineError::Conflict(format!("id {id} is taken by another injection; choose a new one"))
}

/// What is stuck retries by itself.
fn is_unstopped(injection: &v1::Injection) -> bool {
    matches!(injection.state(), State::Armed | State::Active | State::HandedOver)
}

impl Shared {
    fn refuse_stopped(&self) -> Result<(), EngineError> {
        if self.ending.load(Ordering::SeqCst) {
            return Err(EngineError::Leaving);
        }
        if self.stop.is_set() { Err(EngineError::Stopped) } else { Ok(()) }
    }

    fn refuse_leaving(&self) -> Result<(), EngineError> {
        if self.leaving.load(Ordering::SeqCst) { Err(EngineError::Leaving) } else { Ok(()) }
    }

    /// Refuses what nobody may do to this target here; otherwise the UIDs of the pods that the fault would hurt.
    fn check(&self, target: &Target, fault: &AnyFault, pods: &Pods) -> Result<BTreeSet<String>, EngineError> {
        let hurt = target.hurt(fault.scope());
        self.limits.check_protected(&target.name, &hurt)?;
        let hurt = pods.hurt(&hurt);
        let namespaces = hurt.iter().map(|uid| (uid.as_str(), pods.namespace(uid)));
        self.limits.check_namespaces(&target.name, namespaces)?;
        fault.check(target, &self.limits)?;
        Ok(pods.beyond(target, fault.scope(), hurt))
    }

    /// The pods on this node, now.
    async fn pods(&self) -> Result<Pods> {
        let logs = self.limits.pod_logs.clone();
        tokio::task::spawn_blocking(move || Pods::read(&logs)).await.context("look for pods")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Entry>> {
        self.injections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> usize {
        self.lock().values().filter(|e| is_live(&e.core.injection())).count()
    }

    /// UIDs of the pods that are hurt by what is live.
    fn hurt(&self) -> BTreeSet<String> {
        let live = self.lock().values().map(|e| e.core.injection()).filter(is_live).collect::<Vec<_>>();
        live.into_iter().flat_map(|injection| injection.pods).collect()
    }

    /// Lists an injection. What is live and has this id is reached by it alone, and stays.
    fn insert(&self, id: String, entry: Entry) -> Result<(), EngineError> {
        let mut injections = self.lock();
        if injections.get(&id).is_some_and(|there| is_live(&there.core.injection())) {
            return Err(taken(&id));
        }
        injections.insert(id, entry);
        let mut ended: Vec<_> = injections
            .iter()
            .filter(|(_, e)| e.core.status.borrow().ended())
            .map(|(id, e)| (e.core.injection().fired_boot_ns, id.clone()))
            .collect();
        ended.sort_unstable();
        for (_, id) in ended.iter().take(ended.len().saturating_sub(REMEMBERED)) {
            injections.remove(id);
        }
        Ok(())
    }

    /// The injection that this very order made before, if it did.
    fn same_order(
        &self,
        id: &str,
        digest: &str,
        duration: Duration,
        lease: Duration,
    ) -> Result<Option<Arc<Core>>, EngineError> {
        let injections = self.lock();
        let Some(there) = injections.get(id) else { return self.refuse_recorded(id).map(|()| None) };
        if there.order.as_ref().is_some_and(|o| *o == (digest.to_owned(), duration, lease)) {
            return Ok(Some(Arc::clone(&there.core)));
        }
        Err(taken(id))
    }

    /// Refuses an id whose undo record nobody could play back: it must not be written over.
    fn refuse_recorded(&self, id: &str) -> Result<(), EngineError> {
        if !self.journal.undo.has(id) {
            return Ok(());
        }
        let why = "has an undo record on disk that was not played back, see the log; choose a new one";
        Err(EngineError::Conflict(format!("id {id} {why}")))
    }

    fn refuse_beside_stuck(&self, target: &Target) -> Result<(), EngineError> {
        let identity = target.identity();
        let stuck =
            |core: &Core| core.injection().state() == State::Stuck && core.target.identity() == identity;
        match self.lock().iter().find(|(_, e)| stuck(&e.core)) {
            Some((id, _)) => Err(EngineError::Conflict(format!(
                "{target} is still hurt by {id}, which could not be reverted yet; revert {id} first"
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
