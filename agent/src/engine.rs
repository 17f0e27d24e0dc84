//! The one place where order lives: plan → journal → inject → lease → revert.
//!
//! **Invariant:** the engine names no concrete fault, and nobody else calls `inject`.
//!
//! Every injection is a task of its own, so that a slow one never holds up the revert of another. Its state is a
//! [`watch`] value that anybody may read; commands reach it through a channel.
//!
//! Handing over is a revert like any other, with a record written before it from which the next agent injects again.
//! **Invariant:** once somebody asked for a revert or a stop, there is no such record, and none comes to be.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures::{FutureExt, future::join_all};
use prost::Message as _;
use serde_json::Value;
use squall_proto::v1::{self, State};
use thiserror::Error;
use tokio::{
    sync::{Mutex as AsyncMutex, Notify, broadcast, mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tracing::{error, info, warn};

use crate::{
    crash,
    fault::{AnyFault, AnyHeld, Kind, Planned, Window},
    journal::{Journal, Left, Record, boot_id, is_id},
    limits::{Invalid, Limits},
    metrics::METRICS,
    pods::Pods,
    stop::Stop,
    target::Target,
    time::{BootTime, sleep_until},
};

/// Ended injections that are remembered, so that a controller can still ask what became of them.
const REMEMBERED: usize = 256;
/// How often a held fault's target is looked at: a vanished one ends the fault.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// A measurement so young is as good as a new one. However many ask, a revert does not wait behind them.
const FRESH: Duration = Duration::from_millis(10);
/// First pause after a failed revert; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long a caller waits for a Fire or a Revert before it is told how things stand.
const PATIENCE: Duration = Duration::from_secs(30);

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
    /// Another agent takes its place.
    #[error("this agent is being replaced; ask again when the next one is there")]
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
    /// Another agent takes its place: nothing new is done, only taken back.
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

enum Command {
    Fire,
    Revert(&'static str),
    HandOver,
    Renew(oneshot::Sender<bool>),
    Update(Box<AnyFault>, oneshot::Sender<Result<()>>),
    Observe(oneshot::Sender<()>),
}

/// What outlives even a panic of an injection's task: enough to take it back.
struct Core {
    shared: Arc<Shared>,
    kind: Kind,
    target: Target,
    /// Who injected it, where that is known.
    owner: Option<String>,
    undo: Value,
    status: watch::Sender<Status>,
    handing: AsyncMutex<Handing>,
    /// Wakes a stuck injection that waits for its next try.
    retry: Notify,
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
struct Status {
    injection: v1::Injection,
    /// Reverts that failed.
    failures: u32,
}

impl Engine {
    /// An engine over a journal. What the journal holds of an earlier agent is taken back by [`Engine::replay`].
    pub fn new(journal: Journal, limits: Limits, stop: Stop) -> Result<Self> {
        Ok(Self(Arc::new(Shared {
            journal,
            limits,
            stop,
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
        for (path, reason) in found.set_aside {
            error!(path = %path.display(), reason, "an undo record cannot be read; it was set aside and nothing was undone from it");
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
            self.0.insert(id, Entry { core: Arc::clone(&core), order: None, commands });
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
            self.start(core, fault, (digest, order.duration, order.lease), None);
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
    ) {
        let (commands, inbox) = mpsc::channel(16);
        self.0.insert(core.id(), Entry { core: Arc::clone(&core), order: Some(order.clone()), commands });
        let (order, duration, lease) = order;
        let task = Task { core, fault, order, duration, lease, resumed, commands: inbox };
        tokio::spawn(task.supervise());
    }

    /// What the agent before left to be injected again. It is on disk no more, so that it is injected again at most once;
    /// with what could not be removed comes the error, and it must not be.
    pub fn take_left(&self) -> Result<Vec<(Left, Result<()>)>> {
        let found = self.0.journal.left.read()?;
        for (path, reason) in found.set_aside {
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
        self.start(core, fault, (left.order.clone(), left.duration, left.lease), Some(left.clone()));
        Ok(())
    }

    /// Remembers that something was left and is not injected again, so that whoever asks is told why.
    pub fn not_resumed(&self, kinds: &[Kind], left: Left, why: &str) {
        let stuck = self.0.lock().get(&left.id).is_some_and(|there| is_live(&there.core.injection()));
        let Some(kind) = kinds.iter().find(|kind| kind.name == left.kind).filter(|_| !stuck) else { return };
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
        self.0.insert(left.id, Entry { core, order: None, commands: mpsc::channel(1).0 });
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
        let live = |entry: &&Entry| is_live(&entry.core.injection());
        let handle = |entry: &Entry| (Arc::clone(&entry.core), entry.commands.clone());
        let entries: Vec<Handle> = self.0.lock().values().filter(live).map(handle).collect();
        let ended = entries.into_iter().map(|(core, commands)| async move {
            let failures = core.status.borrow().failures;
            let _gone = commands.send(Command::HandOver).await;
            core.retry.notify_one();
            core.wait(|s| s.ended() || s.failures > failures).await
        });
        join_all(ended).await.into_iter().filter(is_live).collect()
    }

    /// Reverts everything that is live. Returns what could not be reverted.
    pub async fn drain(&self, why: &'static str) -> Vec<v1::Injection> {
        let ids: Vec<_> = self.list().into_iter().filter(is_live).map(|i| i.id).collect();
        let reverted = self.revert(&ids, why).await.unwrap_or_default();
        reverted.into_iter().filter(is_live).collect()
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

/// What is stuck retries by itself.
fn is_unstopped(injection: &v1::Injection) -> bool {
    matches!(injection.state(), State::Armed | State::Active | State::HandedOver)
}

impl Shared {
    fn refuse_stopped(&self) -> Result<(), EngineError> {
        self.refuse_leaving()?;
        if self.stop.is_set() { Err(EngineError::Stopped) } else { Ok(()) }
    }

    fn refuse_leaving(&self) -> Result<(), EngineError> {
        if self.leaving.load(Ordering::SeqCst) { Err(EngineError::Leaving) } else { Ok(()) }
    }

    /// Refuses what nobody may do to this target here.
    /// The UIDs of the pods that a fault on a target would hurt.
    fn check(&self, target: &Target, fault: &AnyFault, pods: &Pods) -> Result<BTreeSet<String>, EngineError> {
        let hurt = target.hurt(fault.scope());
        self.limits.check_protected(&target.name, &hurt)?;
        let hurt = pods.hurt(target, fault.scope(), &hurt);
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

    fn insert(&self, id: String, entry: Entry) {
        let mut injections = self.lock();
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
        let Some(there) = injections.get(id) else { return Ok(None) };
        if there.order.as_ref().is_some_and(|o| *o == (digest.to_owned(), duration, lease)) {
            return Ok(Some(Arc::clone(&there.core)));
        }
        Err(EngineError::Conflict(format!("id {id} is taken by another injection; choose a new one")))
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

impl Status {
    fn ended(&self) -> bool {
        !is_live(&self.injection)
    }
}

impl Core {
    fn armed(
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

    fn left_over(shared: Arc<Shared>, kind: Kind, record: Record) -> Arc<Self> {
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

    fn new(
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
    async fn forbid_handing(self: &Arc<Self>, why: &str) -> Result<()> {
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
    fn injection(&self) -> v1::Injection {
        let mut injection = self.status.borrow().injection.clone();
        injection.now_boot_ns = BootTime::now().0;
        injection
    }

    fn id(&self) -> String {
        self.status.borrow().injection.id.clone()
    }

    /// Waits until a condition holds, or for as long as a caller is expected to wait; says how things stand then.
    async fn wait(&self, condition: impl FnMut(&Status) -> bool) -> v1::Injection {
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
    async fn try_revert(self: &Arc<Self>, why: &str) -> bool {
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
    async fn retry_revert(self: &Arc<Self>, why: &str) {
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
struct Task {
    core: Arc<Core>,
    fault: AnyFault,
    /// What tells its order from another.
    order: String,
    duration: Duration,
    lease: Duration,
    /// What an earlier agent left, where this goes on with it.
    resumed: Option<Left>,
    commands: mpsc::Receiver<Command>,
}

impl Task {
    /// Lives, and if that panics, takes back what was injected.
    async fn supervise(self) {
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
        self.core.take_back(why).await;
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
                core.take_back(&why).await;
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
                _ = look.tick() => if !self.core.target.alive() {
                    return "its target is gone";
                },
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

#[cfg(test)]
mod tests {
    //! The order of things, with a fault that only writes down what is asked of it.

    use std::{
        path::PathBuf,
        process::{Child, Command as Program},
        sync::LazyLock,
    };

    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::{
        access::audit::Audit,
        fault::Fault,
        target::{Process, Scope},
        upgrade::{self, Known, Upgrade},
    };

    type Log = Arc<Mutex<Vec<String>>>;

    /// Worlds by name: an undo record is plain data, so it can only name its world.
    static WORLDS: LazyLock<Mutex<BTreeMap<String, World>>> = LazyLock::new(Mutex::default);

    #[derive(Clone)]
    struct World {
        log: Log,
        journal: PathBuf,
        failing_reverts: Arc<Mutex<u32>>,
        /// When the kernel would end what was injected last.
        until: Arc<Mutex<BootTime>>,
    }

    #[derive(Clone)]
    struct Fake {
        world: String,
        fails: Option<&'static str>,
        level: u32,
        /// 0: drawn, which gives 7.
        seed: u64,
    }

    impl Fake {
        fn any(self) -> AnyFault {
            let (interface, share) = (self.world.clone(), self.level.into());
            let message = v1::NetworkFault { interface, share, ..v1::NetworkFault::default() };
            AnyFault::of(self, v1::Fault { kind: Some(v1::fault::Kind::Network(message)) })
        }
    }

    #[derive(Serialize, Deserialize)]
    struct Undo(String);

    struct Held(String);

    impl Drop for Held {
        fn drop(&mut self) {
            note(&self.0, "dropped");
        }
    }

    fn world(name: &str) -> World {
        WORLDS.lock().unwrap().get(name).unwrap().clone()
    }

    fn note(name: &str, what: &str) {
        world(name).log.lock().unwrap().push(what.to_owned());
    }

    impl Fault for Fake {
        const KIND: &'static str = "fake";
        type Undo = Undo;
        type Held = Held;
        type Proto = v1::Fault;

        /// The world is the name of the interface, the level the share.
        fn parse(proto: v1::Fault) -> Result<Self, Invalid> {
            match proto.kind {
                Some(v1::fault::Kind::Network(v1::NetworkFault { interface, share, .. })) => {
                    Ok(Self { world: interface, fails: None, level: share as u32, seed: 0 })
                }
                _ => Err(Invalid::new("fake", "", "has no message", "give one")),
            }
        }

        fn scope(&self) -> Scope {
            Scope::Process
        }

        fn check(&self, _: &Target, _: &Limits) -> Result<(), Invalid> {
            if self.level > 100 {
                return Err(Invalid::new("fake.level", self.level, "too much", "at most 100"));
            }
            Ok(())
        }

        fn summary(&self) -> String {
            format!("level {}", self.level)
        }

        fn draw_from(&mut self, seed: u64) {
            self.seed = seed;
        }

        async fn plan(&self, _: &Target) -> Result<Planned<Undo>> {
            let undo = Undo(self.world.clone());
            let seed = if self.seed == 0 { 7 } else { self.seed };
            Ok(Planned { undo, changes: vec![], warnings: vec![], mechanism: "fake".into(), seed })
        }

        async fn inject(&self, _: &Target, undo: &Undo, window: Window) -> Result<Held> {
            *world(&undo.0).until.lock().unwrap() = window.until;
            let records = std::fs::read_dir(world(&undo.0).journal).unwrap().count();
            note(&undo.0, &format!("inject with {records} records"));
            match self.fails {
                Some("panic") => panic!("asked to"),
                Some(why) => anyhow::bail!(why),
                None => Ok(Held(undo.0.clone())),
            }
        }

        async fn update(&self, held: &mut Held) -> Result<()> {
            note(&held.0, &format!("update {}", self.level));
            Ok(())
        }

        async fn extend(held: &mut Held, _: BootTime) -> Result<()> {
            note(&held.0, "extend");
            Ok(())
        }

        async fn effect(_: &mut Held) -> Result<v1::Effect> {
            Ok(v1::Effect { bit: true, ..v1::Effect::default() })
        }

        async fn revert(undo: &Undo) -> Result<()> {
            note(&undo.0, "revert");
            let world = world(&undo.0);
            let mut failing = world.failing_reverts.lock().unwrap();
            if *failing > 0 {
                *failing -= 1;
                anyhow::bail!("not yet");
            }
            Ok(())
        }

        async fn describe() -> v1::FaultSupport {
            v1::FaultSupport::default()
        }
    }

    struct Bench {
        name: String,
        dir: tempfile::TempDir,
        engine: Engine,
        victim: Child,
    }

    impl Bench {
        fn new(name: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let world = World {
                log: Log::default(),
                journal: dir.path().join("journal"),
                failing_reverts: Arc::default(),
                until: Arc::new(Mutex::new(BootTime(0))),
            };
            WORLDS.lock().unwrap().insert(name.to_owned(), world);
            let engine =
                Engine::new(Journal::open(dir.path()).unwrap(), Limits::default(), Stop::new(dir.path()))
                    .unwrap();
            let victim = Program::new("sleep").arg("60").spawn().unwrap();
            Self { name: name.to_owned(), dir, engine, victim }
        }

        fn target(&self) -> Target {
            let pid = self.victim.id() as i32;
            let start_time = procfs::process::Process::new(pid).unwrap().stat().unwrap().starttime;
            Target {
                name: "sleep".into(),
                process: Some(Process { pid, start_time }),
                cgroup: None,
                netns: None,
                interface: None,
            }
        }

        fn fake(&self) -> Fake {
            Fake { world: self.name.clone(), fails: None, level: 1, seed: 0 }
        }

        fn order(&self, id: &str, fake: Fake) -> Order {
            Order {
                id: id.into(),
                owner: "uid:7".into(),
                targets: vec![self.target()],
                faults: vec![fake.any()],
                duration: Duration::from_secs(60),
                lease: Duration::from_secs(60),
                dry_run: false,
            }
        }

        async fn inject(&self, order: Order) -> v1::Injection {
            let id = order.id.clone();
            self.engine.arm(order).await.unwrap();
            self.engine.fire(&[id]).await.unwrap().remove(0)
        }

        fn log(&self) -> Vec<String> {
            world(&self.name).log.lock().unwrap().clone()
        }

        fn records(&self) -> usize {
            std::fs::read_dir(self.dir.path().join("journal")).unwrap().count()
        }

        fn left(&self) -> usize {
            std::fs::read_dir(self.dir.path().join("resume")).unwrap().count()
        }

        /// The next agent, in a state directory of its own (this process still holds the other one), with what was left.
        fn next(&self) -> Self {
            let next = Self::new(&self.name);
            for file in std::fs::read_dir(self.dir.path().join("resume")).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), next.dir.path().join("resume").join(file.file_name())).unwrap();
            }
            next
        }

        /// What it makes of what was left; and that it is on disk no more.
        async fn resume(&self, upgrade: Upgrade) -> v1::Injection {
            const KINDS: &[Kind] = &[Kind::of::<Fake>()];
            let audit = Audit::start(self.dir.path()).unwrap();
            let known = Known { kinds: KINDS, parse: |proto| Fake::parse(proto).map(Fake::any) };
            upgrade::resume(&self.engine, &audit, upgrade, &known).await;
            assert_eq!(self.left(), 0);
            self.engine.list().remove(0)
        }

        async fn ended(&self, id: &str) -> v1::Injection {
            let (core, _) = self.engine.entries(&[id.to_owned()]).unwrap().remove(0);
            core.wait(Status::ended).await
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            self.victim.kill().unwrap();
            self.victim.wait().unwrap();
        }
    }

    #[tokio::test]
    async fn the_record_is_on_disk_before_inject_and_gone_after_revert() {
        let bench = Bench::new("order");
        let injection = bench.inject(bench.order("a", bench.fake())).await;
        assert_eq!(injection.state(), State::Active);
        assert!(injection.ends_boot_ns > injection.fired_boot_ns);
        let reverted = bench.engine.revert(&["a".into()], "asked").await.unwrap().remove(0);
        assert_eq!((reverted.state(), reverted.reason.as_str()), (State::Reverted, "asked"));
        assert!(reverted.effect.unwrap().bit, "the effect is measured once more before the end");
        assert_eq!(bench.log(), ["inject with 1 records", "dropped", "revert"]);
        assert_eq!(bench.records(), 0);
        bench.engine.revert(&["a".into()], "again").await.unwrap();
        assert_eq!(bench.log().len(), 3, "reverting twice does nothing more");
    }

    #[tokio::test]
    async fn a_stop_ends_everything_and_refuses_until_it_is_released() {
        let bench = Bench::new("stop");
        bench.inject(bench.order("a", bench.fake())).await;
        bench.engine.arm(bench.order("b", bench.fake())).await.unwrap();
        let stopped = bench.engine.stop().await.unwrap();
        assert_eq!(stopped.len(), 2);
        assert!(stopped.iter().all(|i| i.state() == State::Reverted && i.reason == "this node was stopped"));
        let armed = bench.engine.arm(bench.order("c", bench.fake())).await;
        assert!(matches!(armed, Err(EngineError::Stopped)));
        assert!(matches!(bench.engine.fire(&["b".into()]).await, Err(EngineError::Stopped)));
        assert!(bench.engine.revert(&["a".into()], "asked").await.is_ok(), "a revert always works");
        bench.engine.release().unwrap();
        assert_eq!(bench.inject(bench.order("c", bench.fake())).await.state(), State::Active);

        let engine = bench.engine.clone();
        let obeying = tokio::spawn(async move { engine.obey_stop().await });
        std::fs::write(bench.dir.path().join("stopped"), "").unwrap();
        assert_eq!(bench.ended("c").await.reason, "this node was stopped", "a file is enough");
        obeying.abort();
    }

    #[tokio::test]
    async fn arming_changes_nothing_and_expires() {
        let bench = Bench::new("expire");
        let order = Order { lease: Duration::from_millis(50), ..bench.order("a", bench.fake()) };
        bench.engine.arm(order).await.unwrap();
        assert_eq!(bench.records(), 0);
        assert_eq!(bench.ended("a").await.reason, "it was armed, but never fired");
        assert!(bench.log().is_empty());
    }

    #[tokio::test]
    async fn a_dry_run_keeps_nothing() {
        let bench = Bench::new("dry");
        let order = Order { dry_run: true, ..bench.order("a", bench.fake()) };
        assert_eq!(bench.engine.arm(order).await.unwrap().len(), 1);
        assert!(bench.engine.list().is_empty());
    }

    #[tokio::test]
    async fn a_lease_that_is_not_renewed_ends_it_and_one_that_is_does_not() {
        let bench = Bench::new("lease");
        let order = Order { lease: Duration::from_millis(300), ..bench.order("a", bench.fake()) };
        let first = bench.inject(order).await;
        for _ in 0..4 {
            sleep(Duration::from_millis(100)).await;
            assert!(bench.engine.renew(&["a".into()]).await.unwrap().is_empty());
        }
        let renewed = bench.engine.list().remove(0);
        assert!(renewed.lease_ends_boot_ns > first.lease_ends_boot_ns);
        assert_eq!(renewed.state(), State::Active);
        assert_eq!(bench.ended("a").await.reason, "its lease was not renewed");
        assert_eq!(bench.engine.renew(&["a".into(), "none".into()]).await.unwrap(), ["a", "none"]);
        assert_eq!(bench.records(), 0);
    }

    #[tokio::test]
    async fn the_deadline_ends_it_however_often_it_is_renewed() {
        let bench = Bench::new("deadline");
        let order = Order { duration: Duration::from_millis(200), ..bench.order("a", bench.fake()) };
        bench.inject(order).await;
        bench.engine.renew(&["a".into()]).await.unwrap();
        assert_eq!(bench.ended("a").await.reason, "its time was up");
    }

    #[tokio::test]
    async fn a_target_that_dies_ends_it() {
        let mut bench = Bench::new("death");
        bench.inject(bench.order("a", bench.fake())).await;
        bench.victim.kill().unwrap();
        bench.victim.wait().unwrap();
        assert_eq!(bench.ended("a").await.reason, "its target is gone");
        assert_eq!(bench.records(), 0);
    }

    #[tokio::test]
    async fn an_inject_that_fails_or_panics_is_taken_back() {
        let bench = Bench::new("failing");
        let failed =
            bench.inject(bench.order("a", Fake { fails: Some("no such qdisc"), ..bench.fake() })).await;
        assert!(failed.reason.contains("no such qdisc"), "{}", failed.reason);
        bench.inject(bench.order("b", Fake { fails: Some("panic"), ..bench.fake() })).await;
        bench.ended("b").await;
        let log = ["inject with 1 records", "revert", "inject with 1 records", "revert"];
        assert_eq!(bench.log(), log);
        assert_eq!(bench.records(), 0);
    }

    #[tokio::test]
    async fn a_revert_that_fails_is_kept_retried_and_blocks_its_target() {
        let bench = Bench::new("stuck");
        *world("stuck").failing_reverts.lock().unwrap() = 3;
        bench.inject(bench.order("a", bench.fake())).await;
        let stuck = bench.engine.revert(&["a".into()], "asked").await.unwrap().remove(0);
        assert_eq!(stuck.state(), State::Stuck);
        assert!(stuck.reason.contains("not yet"), "{}", stuck.reason);
        assert_eq!(bench.records(), 1);
        let refused = bench.engine.arm(bench.order("b", bench.fake())).await.unwrap_err();
        assert!(refused.to_string().contains("revert a first"), "{refused}");
        assert_eq!(bench.ended("a").await.state(), State::Reverted);
        assert_eq!(bench.records(), 0);
    }

    #[tokio::test]
    async fn the_next_agent_takes_back_what_a_dead_one_left_newest_first() {
        let bench = Bench::new("replay");
        let journal = &bench.engine.0.journal;
        for (n, boot_id) in [(1, &bench.engine.0.boot_id), (2, &"another boot".to_owned())] {
            let undo = serde_json::to_value(Undo("replay".into())).unwrap();
            let (kind, target, boot_id) = ("fake".to_owned(), bench.target(), boot_id.clone());
            let record = Record { id: format!("old{n}"), kind, target, undo, created: BootTime(n), boot_id };
            journal.undo.write(&record).unwrap();
        }
        bench.engine.replay(&[Kind::of::<Fake>()]).await.unwrap();
        assert_eq!(bench.log(), ["revert"], "only what this boot made");
        assert_eq!(bench.records(), 0);
        assert_eq!(bench.engine.list().remove(0).state(), State::Reverted);
    }

    #[tokio::test]
    async fn the_same_order_twice_is_one_injection_and_another_order_is_refused() {
        let bench = Bench::new("twice");
        bench.inject(bench.order("a", bench.fake())).await;
        let again = bench.inject(bench.order("a", bench.fake())).await;
        assert_eq!(again.state(), State::Active);
        assert_eq!(bench.log(), ["inject with 1 records"]);
        let other = bench.engine.arm(bench.order("a", Fake { level: 2, ..bench.fake() })).await;
        assert!(matches!(other, Err(EngineError::Conflict(_))));
    }

    #[tokio::test]
    async fn an_update_is_in_place_and_checked() {
        let bench = Bench::new("update");
        bench.inject(bench.order("a", bench.fake())).await;
        let stronger = |level| Fake { level, ..bench.fake() }.any();
        let updated = bench.engine.update("a", stronger(7)).await.unwrap();
        assert_eq!((updated.summary.as_str(), updated.state()), ("level 7", State::Active));
        assert!(matches!(bench.engine.update("a", stronger(101)).await, Err(EngineError::Invalid(_))));
        assert_eq!(bench.log(), ["inject with 1 records", "update 7"]);
    }

    #[tokio::test]
    async fn the_next_agent_resumes_what_was_handed_over_and_ends_it_when_it_would_have_ended() {
        let bench = Bench::new("upgrade");
        bench.inject(bench.order("a", bench.fake())).await;
        let stronger = Fake { level: 3, ..bench.fake() }.any();
        let before = bench.engine.update("a", stronger).await.unwrap();
        assert!(bench.engine.hand_over().await.is_empty());
        let handed = bench.engine.list().remove(0);
        assert_eq!((handed.state(), bench.left(), bench.records()), (State::HandedOver, 1, 0));
        assert_eq!(bench.log(), ["inject with 1 records", "update 3", "dropped", "revert"]);
        let refused = bench.engine.renew(&["a".into()]).await;
        assert!(matches!(refused, Err(EngineError::Leaving)), "neither live nor gone: {refused:?}");
        let refused = bench.engine.arm(bench.order("b", bench.fake())).await;
        assert!(matches!(refused, Err(EngineError::Leaving)));

        let next = bench.next();
        let resumed = next.resume(Upgrade::TakeOver).await;
        assert_eq!((resumed.state(), resumed.summary.as_str()), (State::Active, "level 3"), "{resumed:?}");
        let times = |i: &v1::Injection| (i.fired_boot_ns, i.ends_boot_ns, i.lease_ends_boot_ns, i.seed);
        assert_eq!(times(&resumed), times(&before));
        assert_eq!(next.log(), ["inject with 1 records"]);
        let until = *world("upgrade").until.lock().unwrap();
        assert_eq!(until.0, before.lease_ends_boot_ns.min(before.ends_boot_ns), "the kernel ends it then");
        assert!(resumed.warnings[0].contains("resumed by agent"), "{:?}", resumed.warnings);
        assert!(resumed.resumed.is_some_and(|r| r.gap_ns > 0));
        assert_eq!(next.engine.owner("a").as_deref(), Some("uid:7"));
        let again = next.inject(bench.order("a", bench.fake())).await;
        assert_eq!(again.state(), State::Active, "the order that it was");
        assert_eq!(next.log(), ["inject with 1 records"]);
    }

    #[tokio::test]
    async fn what_may_not_be_resumed_is_dropped_and_says_why() {
        let bench = Bench::new("dropped");
        bench.inject(bench.order("a", bench.fake())).await;
        assert!(bench.engine.hand_over().await.is_empty());
        let left = || bench.engine.0.journal.left.look().unwrap().records.remove(0);
        let tampered = |change: fn(&mut Left)| {
            let next = bench.next();
            let mut left = left();
            change(&mut left);
            next.engine.0.journal.left.write(&left).unwrap();
            next
        };
        let cases: [(Bench, Upgrade, &str); 8] = [
            (tampered(|_| {}), Upgrade::End, "--upgrade take-over"),
            (tampered(|left| left.boot_id = "another".into()), Upgrade::TakeOver, "before a reboot"),
            (tampered(|left| left.deadline = BootTime::now()), Upgrade::TakeOver, "its time was up"),
            (tampered(|left| left.lease_ends = BootTime::now()), Upgrade::TakeOver, "not renewed"),
            (
                tampered(|left| left.target.process.as_mut().unwrap().start_time -= 1),
                Upgrade::TakeOver,
                "its target is gone",
            ),
            (
                tampered(|left| left.duration = Duration::from_secs(1_000_000)),
                Upgrade::TakeOver,
                "longer than this agent allows",
            ),
            (
                tampered(|left| {
                    let start_time = procfs::process::Process::new(1).unwrap().stat().unwrap().starttime;
                    left.target.process = Some(Process { pid: 1, start_time });
                }),
                Upgrade::TakeOver,
                "which is protected",
            ),
            (tampered(|left| left.fault.clear()), Upgrade::TakeOver, "has no message"),
        ];
        for (next, upgrade, why) in cases {
            let dropped = next.resume(upgrade).await;
            assert_eq!(dropped.state(), State::Reverted, "{why}");
            assert!(dropped.reason.contains(why), "{why}: {}", dropped.reason);
            assert!(next.log().is_empty(), "{why}: {:?}", next.log());
        }
        let next = bench.next();
        next.engine.stop().await.unwrap();
        assert!(next.resume(Upgrade::TakeOver).await.reason.contains("stopped"));
        assert!(next.log().is_empty());
    }

    #[tokio::test]
    async fn a_revert_or_a_stop_before_during_or_after_the_hand_over_leaves_nothing_to_resume() {
        for stop in [false, true] {
            for delay in [0, 1, 5, 100] {
                let bench = Bench::new(&format!("race {stop} {delay}"));
                bench.inject(bench.order("a", bench.fake())).await;
                let end = async {
                    sleep(Duration::from_millis(delay)).await;
                    if stop {
                        bench.engine.stop().await.unwrap();
                    } else {
                        bench.engine.revert(&["a".into()], "asked").await.unwrap();
                    }
                };
                let ((), left) = tokio::join!(end, bench.engine.hand_over());
                assert!(left.is_empty());
                assert_eq!((bench.left(), bench.records()), (0, 0), "{stop} {delay}");
                assert_eq!(bench.engine.list().remove(0).state(), State::Reverted, "{stop} {delay}");
            }
        }
    }

    #[tokio::test]
    async fn what_cannot_be_left_or_was_only_armed_just_ends() {
        let bench = Bench::new("not left");
        bench.engine.arm(bench.order("armed", bench.fake())).await.unwrap();
        bench.inject(bench.order("a", bench.fake())).await;
        std::fs::remove_dir(bench.dir.path().join("resume")).unwrap();
        assert!(bench.engine.hand_over().await.is_empty());
        assert!(bench.engine.list().iter().all(|i| i.state() == State::Reverted));
        assert_eq!((bench.log().last().unwrap().as_str(), bench.records()), ("revert", 0));
    }

    #[tokio::test]
    async fn what_could_not_be_reverted_at_the_hand_over_is_reverted_first_and_then_resumed() {
        let bench = Bench::new("stuck handing");
        *world("stuck handing").failing_reverts.lock().unwrap() = 1000;
        bench.inject(bench.order("a", bench.fake())).await;
        let stuck = bench.engine.hand_over().await;
        assert_eq!((stuck[0].state(), bench.left(), bench.records()), (State::Stuck, 1, 1));
        let record = bench.engine.0.journal.undo.look().unwrap().records.remove(0);
        let next = bench.next();
        next.engine.0.journal.undo.write(&record).unwrap();
        next.engine.replay(&[Kind::of::<Fake>()]).await.unwrap();
        assert_eq!(next.resume(Upgrade::TakeOver).await.state(), State::Active);
        assert_eq!(next.log(), ["revert", "inject with 1 records"]);
    }

    #[tokio::test]
    async fn limits_and_bad_orders_are_refused() {
        let bench = Bench::new("limits");
        let bad = [
            Order { duration: Duration::ZERO, ..bench.order("a", bench.fake()) },
            Order { duration: Duration::from_secs(1_000_000), ..bench.order("a", bench.fake()) },
            bench.order("../a", bench.fake()),
            bench.order("a", Fake { level: 101, ..bench.fake() }),
        ];
        for order in bad {
            assert!(matches!(bench.engine.arm(order).await, Err(EngineError::Invalid(_))));
        }
        for n in 0..32 {
            bench.engine.arm(bench.order(&format!("n{n}"), bench.fake())).await.unwrap();
        }
        let full = bench.engine.arm(bench.order("more", bench.fake())).await;
        assert!(matches!(full, Err(EngineError::Full(32))));
        assert!(bench.engine.drain("asked").await.is_empty());
        bench.engine.arm(bench.order("more", bench.fake())).await.unwrap();
    }
}
