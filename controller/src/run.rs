//! `squall run`: a plan from its first event to its last.

use std::{
    io::{IsTerminal, stdout},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Result;
use jiff::Timestamp;
use squall_proto::v1;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::sleep,
};

use crate::{
    agents::{Agent, Agents, CallError, Local, Patience},
    check,
    cli::{Common, Output, exit},
    clock::Clock,
    commands::{err, out, print_json},
    event::{Finding, Node, Verdict, What},
    faults::Armed,
    fold::Run,
    gate,
    gauges::Gauges,
    log::Log,
    outline,
    plan::{self, Blame, Probe},
    probe,
    progress::Progress,
    report,
    round::{self, Context, Guard, Stopped},
    signals::Asked,
    store::Store,
    wrong,
};

/// Time between two looks of the progress display at the clock.
const TICK: Duration = Duration::from_millis(200);

/// Load runs this long before the first baseline, so that it does not see connections being made.
const WARM_UP: Duration = Duration::from_secs(2);

/// `squall run`. A `seed` goes before the plan's; where there is none at all, one is drawn.
pub(crate) async fn run(
    common: &Common,
    path: &Path,
    seed: Option<u64>,
    signals: watch::Receiver<Asked>,
) -> Result<u8> {
    let (text, plan) = check::load(path)?;
    let clock = Clock::start();
    let started = Timestamp::now();
    let seed = seed.or(plan.seed).unwrap_or_else(|| rand::random::<u32>().into());
    let store = Store::create(&common.runs, &text, &plan.files)?;
    let id = store.id.clone();
    let log = Arc::new(Log::new(clock, store, Progress::new(common.progress)));
    log.record(outline::run_started(&plan, &id, started, seed));
    let ticking = tokio::spawn(tick(Arc::clone(&log)));

    let (trouble, troubles) = mpsc::unbounded_channel();
    let mut guard = Guard { signals, trouble: troubles };
    let connected = match guard.during(Agents::connect(&common.agents, Local::Start)).await {
        Ok(Ok(agents)) => Ok(agents),
        Ok(Err(e)) => Err(stopped_by(e)),
        Err(stopped) => Err(stopped),
    };
    let (ended, agents) = match connected {
        Ok(agents) => {
            let list = agents.list.clone();
            let context = Context {
                plan,
                agents: list,
                log: Arc::clone(&log),
                clock,
                run: id,
                seed,
                open: probe::Open::default(),
                trouble,
            };
            (rounds(Arc::new(context), &mut guard).await, Some(agents))
        }
        Err(stopped) => (Err(stopped), None),
    };
    let ended = stop_agents(&log, agents, ended).await;
    ticking.abort();
    conclude(common, &log, (path, &text), &ended)
}

/// Keeps the progress display going between events.
async fn tick(log: Arc<Log>) {
    loop {
        sleep(TICK).await;
        log.tick();
    }
}

/// An error of connecting as a reason to stop: what would be exit 4 for any command is it for a run too.
fn stopped_by(e: anyhow::Error) -> Stopped {
    match wrong::exit_code(&e) {
        exit::WRONG => {
            let fix = "the agent does not take this".into();
            Stopped::Wrong(vec![Blame { path: "targets".into(), message: format!("{e:#}"), fix }])
        }
        exit::ABORTED => Stopped::Lost(format!("{e:#}")),
        _ => Stopped::Ours(e),
    }
}

type Ended = Result<(Verdict, String), Stopped>;

/// Stops a local agent that was started for the run, and keeps its log. One that could not drain is our failure.
async fn stop_agents(log: &Log, agents: Option<Agents>, ended: Ended) -> Ended {
    let Some(agents) = agents else { return ended };
    let kept = agents.log();
    let stopped = agents.stop().await;
    if let Some(kept) = kept
        && let Err(e) = log.store(|store, _| store.add_log(&kept))
    {
        log.note(format!("the log of the agent is lost: {e:#}"));
    }
    match (stopped, ended) {
        (Err(e), Ok(_)) => Err(Stopped::Ours(e)),
        (Err(e), Err(stopped)) => {
            log.note(format!("{e:#}"));
            Err(stopped)
        }
        (Ok(()), ended) => ended,
    }
}

/// Last events, reports, and the exit code.
fn conclude(common: &Common, log: &Log, plan: (&Path, &str), ended: &Ended) -> Result<u8> {
    let (injected, reverted) = log
        .with(|run| (run.injections.len(), run.injections.iter().filter(|i| i.reverted.is_some()).count()));
    log.record(What::HostState { injected, reverted });
    let tally = format!("{reverted} of {injected} reverted");
    let (verdict, reason, code) = match ended {
        Ok((verdict, reason)) => (*verdict, reason.clone(), verdict.exit_code()),
        Err(stopped @ (Stopped::Person | Stopped::Lost(_) | Stopped::Stuck(_) | Stopped::Limit(_))) => {
            (Verdict::Aborted, format!("{stopped}; {tally}"), exit::ABORTED)
        }
        Err(stopped @ Stopped::Wrong(_)) => {
            let why = format!("the plan cannot run here, nothing was injected: {stopped}");
            (Verdict::Aborted, why, exit::WRONG)
        }
        Err(Stopped::Undecidable(why)) => (Verdict::Inconclusive, why.clone(), exit::INCONCLUSIVE),
        Err(Stopped::Ours(e)) => (Verdict::Aborted, format!("squall failed: {e:#}; {tally}"), exit::OURS),
    };
    log.record(What::RunFinished { verdict, reason: reason.clone() });
    log.finish();
    let reported = log.store(|store, run| {
        let path = store.write_reports(run);
        let text = (common.output != Output::Json).then(|| verdict_text(run, path.as_deref().ok()));
        (path, text, report::json(run))
    });
    let (path, text, json) = reported;
    let path = path?;
    match ended {
        Err(Stopped::Wrong(problems)) => {
            let (file, text) = plan;
            err(&format!("squall: {}nothing was injected\n", plan::blame(file, text, problems)));
        }
        Err(_) => err(&format!("squall: {reason}\n")),
        Ok(_) => {}
    }
    match text {
        // A verdict of rounds that never ran, or that we failed to run, would be read as one.
        Some(_) if matches!(ended, Err(Stopped::Wrong(_) | Stopped::Ours(_))) => {
            err(&format!("squall: the record is {}\n", path.display()));
        }
        Some(text) => out(&text),
        None => print_json(&json),
    }
    if let Some(broken) = log.broken() {
        anyhow::bail!("the events of this run are not complete: {broken}");
    }
    Ok(code)
}

/// The verdict for a person at a terminal, or for a pipe.
pub(crate) fn verdict_text(run: &Run, report: Option<&Path>) -> String {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    let colour =
        stdout().is_terminal() && set("NO_COLOR").is_none() && set("TERM").is_none_or(|t| t != "dumb");
    report::verdict_text(run, report, colour)
}

/// All rounds of a plan, from the dry run to the verdict.
async fn rounds(context: Arc<Context>, guard: &mut Guard) -> Ended {
    let (plan, log) = (&context.plan, &context.log);
    for agent in &context.agents {
        log.record(What::Node(Node {
            node: agent.node.clone(),
            address: agent.address.clone(),
            kernel: agent.about.kernel.clone(),
            agent: agent.about.agent_version.clone(),
            faults: agent.faults(),
        }));
    }
    let checked = guard.during(check::dry_run(plan, &context.agents, &context.run, context.seed)).await?;
    let checked = checked.map_err(stopped_by)?;
    let problems = checked.problems(&context.agents, plan);
    if !problems.is_empty() {
        return Err(Stopped::Wrong(problems));
    }
    let of_round = |faults: &Vec<(_, Result<Armed, _>)>| {
        faults.iter().map(|(_, armed)| armed.as_ref().map_or(0, Armed::len)).collect()
    };
    let there: Vec<Vec<usize>> = checked.faults.iter().map(of_round).collect();
    let mut beside = JoinSet::new();
    sample(&context, &checked, &mut beside);
    probe(&context, &mut beside);
    if plan.probes.values().any(|p| matches!(p, Probe::Load(_))) {
        guard.during(sleep(WARM_UP)).await?;
    }

    let tested = gate::tested(plan);
    let mut findings: Vec<Finding> = Vec::new();
    let mut held = Ok(());
    for (index, there) in there.iter().enumerate() {
        let early = round::run(&context, guard, index, there).await?;
        if let Some(broken) = log.broken() {
            return Err(Stopped::Ours(anyhow::anyhow!(broken)));
        }
        if crate::panicked() {
            return Err(Stopped::Ours(anyhow::anyhow!(
                "a part of it panicked, so what it saw proves nothing"
            )));
        }
        let found = log.with(|run| gate::judge_round(run, plan, index));
        for finding in &found {
            log.record(What::Judged { round: Some(index), finding: finding.clone() });
        }
        let bit = log.with(|run| all_bit(run, Some(index)));
        let (verdict, _) = proven(gate::verdict(&found, tested, plan.on_fail, bit), early.first());
        log.record(What::RoundFinished { round: index, verdict });
        if held.is_ok() {
            held = early.into_iter().next().map_or(Ok(()), Err);
        }
        findings.extend(found);
        let (so_far, _) = gate::verdict(&findings, tested, plan.on_fail, true);
        if matches!(so_far, Verdict::Block | Verdict::Rollback) {
            break;
        }
    }
    let found = log.with(|run| gate::judge_run(run, plan));
    for finding in &found {
        log.record(What::Judged { round: None, finding: finding.clone() });
    }
    findings.extend(found);
    let bit = log.with(|run| all_bit(run, None));
    Ok(proven(gate::verdict(&findings, tested, plan.on_fail, bit), held.err().as_ref()))
}

/// A fault that was not held to the end of its time proves nothing good.
fn proven((verdict, reason): (Verdict, String), early: Option<&String>) -> (Verdict, String) {
    match early {
        Some(early) if verdict == Verdict::Promote => (Verdict::Inconclusive, early.clone()),
        _ => (verdict, reason),
    }
}

/// Whether every fault measurably touched its target: of a round, or of all rounds that were run.
fn all_bit(run: &Run, round: Option<usize>) -> bool {
    let of = run.injections.iter().filter(|i| round.is_none() || i.round == round);
    let of: Vec<_> = of.collect();
    !of.is_empty() && of.iter().all(|i| i.bit)
}

/// Starts sampling every local target wherever it is.
fn sample(context: &Arc<Context>, checked: &check::Checked, beside: &mut JoinSet<()>) {
    let places = checked.targets.iter().flat_map(|(name, resolved)| {
        let on = resolved.iter().enumerate().filter(|(_, r)| !r.targets.is_empty());
        on.map(move |(agent, _)| (name.clone(), agent))
    });
    let places: Vec<(String, usize)> = places.collect();
    let nodes = places.iter().map(|(name, agent)| (name.clone(), context.agents[*agent].node.clone()));
    let gauges = Arc::new(Mutex::new(Gauges::new(&context.plan, nodes)));
    for (name, agent) in places {
        let Some(target) = context.plan.targets.get(&name).and_then(plan::Target::proto) else {
            continue;
        };
        let (context, gauges) = (Arc::clone(context), Arc::clone(&gauges));
        beside.spawn(async move {
            let mut patience = Patience::default();
            loop {
                let agent = &context.agents[agent];
                let error = sample_once(&context, agent, &name, target.clone(), &gauges, &mut patience).await;
                if let CallError::Lost { .. } = error {
                    if let Err(lost) = patience.wait(error).await {
                        // Nobody listens any more once the run has ended.
                        let _ = context.trouble.send(lost.into());
                        return;
                    }
                    continue;
                }
                let failed =
                    gauges.lock().unwrap_or_else(PoisonError::into_inner).failed(&name, &error.to_string());
                context.log.record_all(failed);
                sleep(Duration::from_secs(1)).await;
            }
        });
    }
}

/// Samples until the stream ends; says why it did.
async fn sample_once(
    context: &Context,
    agent: &Agent,
    name: &str,
    target: v1::Target,
    gauges: &Mutex<Gauges>,
    patience: &mut Patience,
) -> CallError {
    let mut stream = match agent.sample(target).await {
        Ok(stream) => stream,
        Err(e) => return e,
    };
    loop {
        match stream.message().await {
            Ok(Some(sample)) => {
                patience.heard();
                let events =
                    gauges.lock().unwrap_or_else(PoisonError::into_inner).take(name, &agent.node, &sample);
                context.log.record_all(events);
            }
            Ok(None) => {
                return CallError::Lost { node: agent.node.clone(), message: "it closed its stream".into() };
            }
            Err(status) => return agent.stream_error(&status),
        }
    }
}

/// Starts the probes that ask the service itself. One that dies counts as failed, never as fine.
fn probe(context: &Arc<Context>, beside: &mut JoinSet<()>) {
    let (tx, mut rx) = mpsc::unbounded_channel();
    for (name, probe) in &context.plan.probes {
        if let Probe::Agent { .. } = probe {
            continue;
        }
        let mut running =
            AbortOnDrop(probe::start(name, probe, context.clock, tx.clone(), context.open.clone()));
        let (context, name) = (Arc::clone(context), name.clone());
        beside.spawn(async move {
            let error = match (&mut running.0).await {
                Ok(()) => "the probe ended".to_owned(),
                Err(e) => format!("the probe failed: {e}"),
            };
            loop {
                context.log.record(What::ProbeFailed { probe: name.clone(), error: error.clone() });
                sleep(Duration::from_secs(1)).await;
            }
        });
    }
    let context = Arc::clone(context);
    beside.spawn(async move {
        while let Some(what) = rx.recv().await {
            context.log.record(what);
        }
    });
}

/// A task that ends with the one that waits for it.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests;
