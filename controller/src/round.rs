//! One round: baseline, fault, recovery. From agents and a plan to events.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::anyhow;
use squall_proto::v1::{self, State};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

use crate::{
    agents::{Agent, CallError, Patience},
    check,
    clock::Clock,
    event::{Figure, Phase, What},
    faults::{Held, NotArmed, RENEW_EVERY, as_event, figures, nodes, resolved},
    gate,
    log::Log,
    plan::{Abort, Beyond, Blame, Plan, Probe},
    probe::Open,
    signals::{Asked, asked},
};

/// Arming reads the host and may take a while; what is armed waits for at most one lease.
const ARM_AHEAD: f64 = 2.0;
/// How often the abort gate looks at what the probes told.
const ABORT_EVERY: Duration = Duration::from_millis(100);
/// The last requests of a round are answered, or time out, this long after their limit at the latest.
const SETTLE: Duration = Duration::from_secs(3);
/// A revert that failed is tried this often before the run gives up on it. The agent goes on by itself.
const REVERT_TRIES: usize = 3;

/// What everything in a run shares.
pub(crate) struct Context {
    pub plan: Plan,
    pub agents: Vec<Agent>,
    pub log: Arc<Log>,
    pub clock: Clock,
    /// Id of the run; ids of its injections start with it.
    pub run: String,
    pub seed: u64,
    /// What load probes have not told of yet.
    pub open: Open,
    /// Where background work reports what ends the run.
    pub trouble: mpsc::UnboundedSender<Stopped>,
}

/// Why a run did not get to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Stopped {
    /// Somebody asked for it.
    #[error("stopped by a person")]
    Person,
    /// An agent does not answer.
    #[error("{0}")]
    Lost(String),
    /// A host is not as it was.
    #[error("{0}")]
    Stuck(String),
    /// A safety limit was reached.
    #[error("{0}")]
    Limit(String),
    /// The plan cannot run here. Nothing was injected.
    #[error("{}", .0.iter().map(|p| p.message.as_str()).collect::<Vec<_>>().join("; "))]
    Wrong(Vec<Blame>),
    /// A round could not be made, so it proves nothing.
    #[error("{0}")]
    Undecidable(String),
    /// Our own failure.
    #[error("{0:#}")]
    Ours(anyhow::Error),
}

impl From<CallError> for Stopped {
    fn from(e: CallError) -> Self {
        match e {
            CallError::Lost { .. } => Self::Lost(e.to_string()),
            _ => Self::Ours(e.into()),
        }
    }
}

/// What may interrupt a run at any time.
pub(crate) struct Guard {
    pub signals: watch::Receiver<Asked>,
    pub trouble: mpsc::UnboundedReceiver<Stopped>,
}

impl Guard {
    /// Does something, unless the run is stopped first.
    pub(crate) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Stopped> {
        tokio::select! {
            biased;
            () = asked(&mut self.signals, Asked::Stop) => Err(Stopped::Person),
            Some(why) = self.trouble.recv() => Err(why),
            done = work => Ok(done),
        }
    }
}

/// What is known of the injections of a round.
#[derive(Debug, Default)]
struct Tracker {
    inner: Mutex<Tracked>,
}

#[derive(Debug, Default)]
struct Tracked {
    /// Everything that was armed or fired and has not ended.
    held: Held,
    /// What was fired: agent and id.
    fired: BTreeSet<(usize, String)>,
    /// What ended too early or hurt too few, and why.
    early: Vec<String>,
    /// Since when we take things back.
    reverting: Option<f64>,
    /// Last effect on record, and last reason why it is stuck.
    effects: BTreeMap<(usize, String), (bool, Vec<Figure>)>,
    /// When what was resumed was, on the clock of its node.
    resumed: BTreeMap<(usize, String), u64>,
    stuck: BTreeMap<(usize, String), String>,
}

impl Tracker {
    fn lock(&self) -> MutexGuard<'_, Tracked> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what an agent says of an injection, and puts on record what is new.
    fn heard(&self, context: &Context, agent: usize, injection: &v1::Injection) {
        let mut tracked = self.lock();
        let key = (agent, injection.id.clone());
        if !tracked.fired.contains(&key) {
            return;
        }
        let (id, node) = (injection.id.clone(), context.agents[agent].node.clone());
        if let Some(resumed) = &injection.resumed
            && tracked.resumed.insert(key.clone(), resumed.at_boot_ns) != Some(resumed.at_boot_ns)
        {
            let (agent, gap) = (resumed.agent_version.clone(), resumed.gap_ns as f64 / 1e9);
            context.log.record(What::Resumed { id: id.clone(), node: node.clone(), agent, gap });
        }
        if let Some(effect) = &injection.effect {
            let effect = (effect.bit, figures(effect));
            if tracked.effects.get(&key) != Some(&effect) {
                tracked.effects.insert(key.clone(), effect.clone());
                let (bit, figures) = effect;
                context.log.record(What::Effect { id: id.clone(), node: node.clone(), bit, figures });
            }
        }
        let reason = injection.reason.clone();
        match injection.state() {
            State::Reverted | State::Failed => {
                tracked.fired.remove(&key);
                tracked.held.remove(agent, &id);
                let now = context.clock.now();
                let took = tracked.reverting.map_or(0.0, |since| now - since);
                if tracked.reverting.is_none() {
                    let text = format!("{id} on {node} ended before the round did: {reason}");
                    context.log.note(&text);
                    tracked.early.push(text);
                }
                context.log.record_at(now, What::Reverted { id, node, took, reason });
            }
            State::Stuck if tracked.stuck.get(&key) != Some(&reason) => {
                if tracked.reverting.is_none() {
                    tracked.early.push(format!("{id} on {node} ended before the round did: {reason}"));
                }
                tracked.stuck.insert(key, reason.clone());
                context.log.record(What::Stuck { id, node, reason });
            }
            _ => {}
        }
    }
}

/// Runs a round up to the end of its recovery. Whatever happens, what it injected is taken back. `there`: how many injections
/// each of its faults would have been when the run began.
///
/// Gives what ended too early or hurt fewer than that, in words: such a round proves nothing good.
pub(crate) async fn run(
    context: &Arc<Context>,
    guard: &mut Guard,
    round: usize,
    there: &[usize],
) -> Result<Vec<String>, Stopped> {
    let tracker = Arc::new(Tracker::default());
    // Dropped on every way out, which ends what runs beside.
    let mut beside = JoinSet::new();
    let ended = phases(context, guard, (round, there), &tracker, &mut beside).await;
    if ended.is_err() {
        tokio::select! {
            // What cannot be taken back is on record; the reason for stopping stays the first one.
            _ = take_back(context, &tracker) => {}
            () = asked(&mut guard.signals, Asked::Leave) => {
                let left = tracker.lock().held.len();
                context.log.note(format!("left with {left} not reverted; {}", leases(context, &tracker)));
            }
        }
    }
    ended?;
    Ok(std::mem::take(&mut tracker.lock().early))
}

/// Which leases end when.
fn leases(context: &Context, tracker: &Tracker) -> String {
    let ends = context.clock.now() + crate::faults::LEASE.as_secs_f64();
    let held = tracker.lock().held.clone();
    let lines: Vec<String> = held
        .by_agent()
        .iter()
        .flat_map(|(agent, ids)| ids.iter().map(|id| format!("{id} on {}", context.agents[*agent].node)))
        .collect();
    format!("{} ends by itself by {ends:.0}s of the run, when its lease is over", lines.join(", "))
}

async fn phases(
    context: &Arc<Context>,
    guard: &mut Guard,
    (round, there): (usize, &[usize]),
    tracker: &Arc<Tracker>,
    beside: &mut JoinSet<()>,
) -> Result<(), Stopped> {
    let (clock, log, plan) = (context.clock, &context.log, &context.plan.rounds[round]);
    let start = clock.next_second();
    guard.during(clock.wait_until(start)).await?;
    log.record_at(start, What::RoundStarted { round });
    log.record_at(start, What::PhaseStarted { round, phase: Phase::Baseline });
    if let Some(abort) = context.plan.limits.abort.clone() {
        beside.spawn(obey(Arc::clone(context), abort, start));
    }

    let mut fault_at = start + plan.baseline.as_secs_f64();
    guard.during(clock.wait_until((fault_at - ARM_AHEAD).max(start))).await?;
    let on = guard.during(arm(context, round, there, tracker)).await??;
    // Where arming took longer than the baseline had left, the baseline is longer.
    fault_at = fault_at.max(clock.next_second());
    guard.during(clock.wait_until(fault_at)).await?;

    log.record_at(fault_at, What::PhaseStarted { round, phase: Phase::Fault });
    guard.during(fire(context, round, tracker, &on)).await??;
    // However long that took: what is held is what is in force. Phases end on whole seconds.
    let recovery_at = (clock.now() + plan.hold.as_secs_f64()).round();
    follow(context, tracker, beside);
    guard.during(clock.wait_until(recovery_at)).await?;

    log.record_at(recovery_at, What::PhaseStarted { round, phase: Phase::Recovery });
    guard.during(take_back(context, tracker)).await??;
    guard.during(recover(context, round, recovery_at + plan.recovery.as_secs_f64())).await?;
    let end = clock.now().floor();
    guard.during(settle(context, round, end)).await
}

/// Ends the run where users see more than the plan allows.
async fn obey(context: Arc<Context>, abort: Abort, start: f64) {
    loop {
        let (open, now) = (context.open.of(&abort.probe), context.clock.now());
        if let Some(why) = context.log.with(|run| abort.reached(run, &open, start, now)) {
            // Nobody listens any more once the run has ended.
            let _ = context.trouble.send(Stopped::Limit(why));
            return;
        }
        sleep(ABORT_EVERY).await;
    }
}

/// Arms every fault of the round. Gives the target's name for each injection. `there`: how many injections each would have been
/// when the run began.
async fn arm(
    context: &Context,
    round: usize,
    there: &[usize],
    tracker: &Tracker,
) -> Result<BTreeMap<(usize, String), String>, Stopped> {
    let orders = check::orders(&context.plan, round, &context.run, context.seed).map_err(Stopped::Ours)?;
    let mut on = BTreeMap::new();
    let mut touched = Vec::new();
    let name = &context.plan.rounds[round].name;
    let not_armed = |e| match e {
        NotArmed::Wrong(why) => Stopped::Undecidable(format!("round {name} could not be made: {why}")),
        NotArmed::Call(e) => e.into(),
    };
    for (mut order, there) in orders.into_iter().zip(there) {
        order.choose(&context.agents).await.map_err(not_armed)?;
        let armed = order.arm(&context.agents, false).await.map_err(not_armed)?;
        tracker.lock().held.add(&armed);
        if armed.len() < *there {
            let (summary, now) = (&order.summary, armed.len());
            let text = format!("{summary}: {now} of the {there} that were there when the run began are left");
            context.log.note(&text);
            tracker.lock().early.push(text);
        }
        if let Some(choice) = &order.choice {
            let names =
                armed.iter().map(|(agent, i)| format!("{}  {}", context.agents[*agent].node, resolved(i)));
            let names: Vec<_> = names.collect();
            context.log.note(format!("{}: chosen {choice}: {}", order.summary, names.join(", ")));
        }
        touched.extend(order.touched(&armed));
        on.extend(armed.into_iter().map(|(agent, i)| ((agent, i.id), order.on.clone())));
    }
    // What was checked before the run may be more by now.
    if let Some(Beyond { field, problem, .. }) = context.plan.limits.beyond(&touched, &nodes(&context.agents))
    {
        return Err(Stopped::Limit(format!("{field}: round {name}: {problem}")));
    }
    Ok(on)
}

/// Injects everything that is armed.
async fn fire(
    context: &Context,
    round: usize,
    tracker: &Tracker,
    on: &BTreeMap<(usize, String), String>,
) -> Result<(), Stopped> {
    let held = tracker.lock().held.clone();
    let fired = held.fire(&context.agents).await?;
    let mut failed = Vec::new();
    for (agent, injection) in &fired {
        let node = &context.agents[*agent].node;
        let state = injection.state();
        if matches!(state, State::Active | State::Stuck) {
            let key = (*agent, injection.id.clone());
            let target = on.get(&key).map_or("", String::as_str);
            let reported = as_event(&context.agents[*agent], target, injection, context.clock.now());
            tracker.lock().fired.insert(key);
            context.log.record(What::Injected { round: Some(round), injection: reported });
        }
        if state != State::Active {
            let why =
                if injection.reason.is_empty() { "it did not start in time" } else { &injection.reason };
            failed.push(format!("{} on {node}: {why}", injection.summary));
        }
        tracker.heard(context, *agent, injection);
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(Stopped::Ours(anyhow!("could not inject {}", failed.join("; "))))
    }
}

/// Starts what runs beside the fault: renewals, and one watcher for each agent.
fn follow(context: &Arc<Context>, tracker: &Arc<Tracker>, beside: &mut JoinSet<()>) {
    let by_agent = tracker.lock().held.by_agent().clone();
    for (agent, ids) in by_agent {
        let (context, tracker) = (Arc::clone(context), Arc::clone(tracker));
        beside.spawn(async move {
            if let Err(e) = watch(&context, &tracker, agent, ids).await {
                // Nobody listens any more once the run has ended.
                let _ = context.trouble.send(e.into());
            }
        });
    }
    let (context, tracker) = (Arc::clone(context), Arc::clone(tracker));
    beside.spawn(async move {
        if let Err(e) = renew(&context, &tracker).await {
            let _ = context.trouble.send(e.into());
        }
    });
}

/// Follows the injections of an agent, and of the one that takes its place.
async fn watch(
    context: &Context,
    tracker: &Tracker,
    agent: usize,
    ids: Vec<String>,
) -> Result<(), CallError> {
    let of = &context.agents[agent];
    let mut patience = Patience::default();
    loop {
        let mut lost = watch_once(context, tracker, agent, ids.clone(), &mut patience).await;
        let known = loop {
            patience.wait(lost).await?;
            match of.list().await {
                Ok(known) => break known,
                Err(e) => lost = e,
            }
        };
        for id in &ids {
            let forgotten = || v1::Injection {
                id: id.clone(),
                state: State::Reverted.into(),
                reason: "the agent was replaced, and the next one does not know it".into(),
                ..v1::Injection::default()
            };
            let injection = known.iter().find(|i| i.id == *id).cloned().unwrap_or_else(forgotten);
            tracker.heard(context, agent, &injection);
        }
    }
}

/// Follows until the stream ends; says why it did.
async fn watch_once(
    context: &Context,
    tracker: &Tracker,
    agent: usize,
    ids: Vec<String>,
    patience: &mut Patience,
) -> CallError {
    let of = &context.agents[agent];
    let mut stream = match of.watch(ids).await {
        Ok(stream) => stream,
        Err(e) => return e,
    };
    loop {
        match stream.message().await {
            Ok(Some(injection)) => {
                patience.heard();
                tracker.heard(context, agent, &injection);
            }
            Ok(None) => {
                return CallError::Lost { node: of.node.clone(), message: "it closed its stream".into() };
            }
            Err(status) => return of.stream_error(&status),
        }
    }
}

/// Renews leases until we take the faults back ourselves.
async fn renew(context: &Context, tracker: &Tracker) -> Result<(), CallError> {
    let mut ticks = interval(RENEW_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let held = {
            let known = tracker.lock();
            if known.reverting.is_some() {
                return Ok(());
            }
            known.held.clone()
        };
        // What is gone says why through its watcher.
        held.renew(&context.agents).await?;
    }
}

/// Ends everything that may be live and waits until the hosts are as before.
async fn take_back(context: &Context, tracker: &Tracker) -> Result<(), Stopped> {
    let mut stuck = Vec::new();
    let mut tries = 0;
    let lost = loop {
        let held = {
            let mut known = tracker.lock();
            known.reverting.get_or_insert(context.clock.now());
            known.held.clone()
        };
        if held.len() == 0 {
            return Ok(());
        }
        let taken = held.revert(&context.agents).await;
        stuck.clear();
        for (agent, injection) in &taken.injections {
            tracker.heard(context, *agent, injection);
            if matches!(injection.state(), State::Reverted | State::Failed) {
                tracker.lock().held.remove(*agent, &injection.id);
            } else {
                let node = &context.agents[*agent].node;
                stuck.push(format!("{} on {node}: {}", injection.id, injection.reason));
            }
        }
        // The next agent might resume what nobody could be asked to revert.
        let returns = taken.unasked.iter().any(|(agent, _, e)| context.agents[*agent].may_return(e));
        tries += usize::from(!stuck.is_empty());
        if !returns && (stuck.is_empty() || tries == REVERT_TRIES) {
            break taken.unasked;
        }
        sleep(Duration::from_secs(1)).await;
    };
    for (agent, ids, why) in &lost {
        let (ids, node) = (ids.join(", "), &context.agents[*agent].node);
        let lease = humantime::format_duration(crate::faults::LEASE);
        context
            .log
            .note(format!("{ids} on {node} could not be reverted ({why}); it ends by itself within {lease}"));
    }
    if !stuck.is_empty() {
        return Err(Stopped::Stuck(format!("{} could not be reverted: {}", stuck.len(), stuck.join("; "))));
    }
    match lost.into_iter().next() {
        Some((_, _, why)) => Err(why.into()),
        None => Ok(()),
    }
}

/// Waits until the steady state holds again, or the time for that is over. Ends on a whole second.
async fn recover(context: &Context, round: usize, latest: f64) {
    let clock = context.clock;
    loop {
        clock.wait_until((clock.now().floor() + 1.0).min(latest)).await;
        let recovered = context.log.with(|run| gate::recovered(run, &context.plan, round));
        if recovered || clock.now() >= latest {
            return;
        }
    }
}

/// Waits until the load probes have told all of the round: an answer may come, or time out, after its end.
async fn settle(context: &Context, round: usize, end: f64) {
    let started = context.log.with(|run| run.rounds.get(round).map(|r| r.phases.clone())).unwrap_or_default();
    let loads = context.plan.probes.iter().filter_map(|(name, probe)| match probe {
        Probe::Load(load) => Some((name, load.expect.within)),
        Probe::Scrape(_) | Probe::Agent { .. } => None,
    });
    let loads: Vec<_> = loads.collect();
    let Some(longest) = loads.iter().map(|(_, within)| *within).max().filter(|_| !started.is_empty()) else {
        return;
    };
    let complete = || {
        context.log.with(|run| {
            let told =
                |name: &str| run.probes.get(name).and_then(|p| p.bins.last()).map_or(0.0, |b| b.start + 1.0);
            loads.iter().all(|(name, _)| told(name) >= end)
        })
    };
    let latest = context.clock.now() + (longest + SETTLE).as_secs_f64();
    while !complete() && context.clock.now() < latest {
        sleep(Duration::from_millis(50)).await;
    }
}
