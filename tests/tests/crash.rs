//! The agent is killed at every step of every fault, and every step is made to fail once: nothing is left of it.
//!
//! With `SQUALL_SWEEP=full` at every passing of every point and with every error; with `SQUALL_SWEEP=each` every point has its
//! turn once in each fault; else each point and each error has its turn once. `SQUALL_SCENARIOS` names the faults to do this with,
//! with a comma between them.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsStr,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use squall_proto::v1::{
    ArmRequest, Chance, Corrupt, CpuFault, Direction, Fault, Injection, ListRequest, Loss, MemoryFault,
    NetworkFault, Refusal, RenewRequest, RevertRequest, State, Target, UpdateRequest, fault, memory_fault,
};
use squall_tests::{
    Agent, AgentOptions, HostState, Lab, NetState, Sockets, Victim, bin_dir, cidr, delay, interface,
    need_root, partition, process, stdout, unique, wait_for,
};
use tempfile::TempDir;
use tokio::time::sleep;

/// Far beyond every test: nothing here may end by its deadline.
const DURATION: Duration = Duration::from_mins(10);
/// How late a lease may end: timers, and a VM without KVM.
const SLACK: Duration = Duration::from_secs(3);
/// How long the kernel and the agent may take for what they do behind our back.
const SETTLE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;
/// ENOSPC, EIO, EPERM, ENOMEM.
const ERRORS: [i32; 4] = [28, 5, 1, 12];

/// What the agent is told to do at its points, and which it passed (agent/src/crash.rs).
struct Orders(TempDir);

/// The n-th time that a point is passed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Passing {
    name: String,
    n: usize,
    /// Whether it may fail.
    step: bool,
}

impl Orders {
    fn new() -> Result<Self> {
        Ok(Self(tempfile::Builder::new().prefix(&format!("{}-", unique("crash"))).tempdir()?))
    }

    fn give(&self, orders: &str) -> Result<()> {
        fs::write(self.0.path().join("trace"), "")?;
        Ok(fs::write(self.0.path().join("orders"), orders)?)
    }

    fn kill(&self, at: &Passing) -> Result<()> {
        self.give(&format!("kill {} {}", at.name, at.n))
    }

    fn fail(&self, at: &Passing, errno: i32) -> Result<()> {
        self.give(&format!("fail {} {} {errno}", at.name, at.n))
    }

    /// What was passed since orders were given.
    fn passed(&self) -> Result<Vec<Passing>> {
        let trace = fs::read_to_string(self.0.path().join("trace"))?;
        let mut counts = BTreeMap::new();
        let passing = |line: &str| {
            let (name, kind) = line.split_once(' ')?;
            let n = counts.entry(name.to_owned()).and_modify(|n| *n += 1).or_insert(1);
            Some(Passing { name: name.to_owned(), n: *n, step: kind == "step" })
        };
        Ok(trace.lines().filter_map(passing).collect())
    }
}

/// Where things are hurt, and how it was before.
struct World {
    lab: Lab,
    victim: Victim,
    near: NetState,
    far: NetState,
    host: HostState,
}

impl World {
    fn new() -> Result<Self> {
        need_root()?;
        let (lab, victim) = (Lab::new("crash")?, Victim::start("crash", 256 * MIB)?);
        let (near, far) = (lab.near.state()?, lab.far.state()?);
        let host = HostState::capture(&bin_dir())?;
        Ok(Self { lab, victim, near, far, host })
    }

    /// What is not as before, apart from the agent itself.
    fn left(&self, agent: &Agent) -> Result<Vec<String>> {
        let mut left = self.near.changes(&self.lab.near.state()?);
        left.extend(self.far.changes(&self.lab.far.state()?));
        let own = format!("+ process {} ", agent.pid());
        let host = self.host.changes(&HostState::capture(&bin_dir())?);
        left.extend(host.into_iter().filter(|change| !change.starts_with(&own)));
        left.extend(
            files(&agent.state_dir().join("journal"))?.into_iter().map(|file| format!("+ record {file}")),
        );
        Ok(left)
    }

    /// Fails unless all is as before.
    fn is_restored(&self, agent: &Agent) -> Result<()> {
        let mut left = Vec::new();
        let same = wait_for("everything to be as before", SETTLE, || {
            left = self.left(agent)?;
            Ok(left.is_empty().then_some(()))
        });
        same.with_context(|| format!("{left:?}\n{}", agent.log()))
    }

    /// Whether nobody feels anything.
    fn is_well(&self, scenario: &Scenario) -> Result<bool> {
        let Some(to) = scenario.ping else { return self.victim.is_alone() };
        let (rtts, _) = self.lab.near.ping_with(&format!("-c 1 -W 1 {to}"))?;
        Ok(rtts.first().is_some_and(|rtt| *rtt < 200.0))
    }
}

fn files(dir: &Path) -> Result<Vec<String>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// A fault, and what it is changed into while it is live.
struct Scenario {
    name: &'static str,
    target: Target,
    fault: fault::Kind,
    changed: fault::Kind,
    /// Whom to ping to feel it; none: look into the victim's cgroup.
    ping: Option<&'static str>,
}

/// Those that are asked for.
fn scenarios(world: &World) -> Vec<Scenario> {
    let all = all_scenarios(world);
    let Some(wanted) = wanted() else { return all };
    let unknown = wanted.split(',').find(|name| all.iter().all(|scenario| scenario.name != *name));
    assert_eq!(unknown, None, "no such scenario");
    all.into_iter().filter(|scenario| wanted.split(',').any(|name| name == scenario.name)).collect()
}

fn wanted() -> Option<String> {
    env::var("SQUALL_SCENARIOS").ok()
}

fn all_scenarios(world: &World) -> Vec<Scenario> {
    let near = |name: &'static str, fault: NetworkFault, changed: NetworkFault| Scenario {
        name,
        target: interface("near0", world.lab.near.name()),
        fault: fault::Kind::Network(fault),
        changed: fault::Kind::Network(changed),
        ping: Some("10.99.0.2"),
    };
    let stress = |name: &'static str, fault: fault::Kind, changed: fault::Kind| Scenario {
        name,
        target: process(world.victim.pid()),
        fault,
        changed,
        ping: None,
    };
    let loss = |ratio| NetworkFault {
        loss: Some(Loss { ratio, ..Loss::default() }),
        per_segment: true,
        ..NetworkFault::default()
    };
    let corrupt = |silent| NetworkFault {
        corrupt: Some(Corrupt { chance: Some(Chance { ratio: 1.0, ..Chance::default() }), silent }),
        ..NetworkFault::default()
    };
    let refusal = |direction: Direction| NetworkFault {
        direction: direction.into(),
        refusal: Refusal::Answer.into(),
        ..NetworkFault::default()
    };
    let loopback = || vec![cidr("127.0.0.0/8")];
    let cpu = |load| fault::Kind::Cpu(CpuFault { load, workers: 1 });
    let memory = |mib: u64| {
        fault::Kind::Memory(MemoryFault { size: Some(memory_fault::Size::Bytes(mib * MIB)), ramp_ns: 0 })
    };
    vec![
        // First, so that where each point has its turn once, it is here: what comes to be needed comes with the update.
        Scenario {
            target: interface("lo", world.lab.near.name()),
            ping: Some("127.0.0.1"),
            ..near(
                "loss on loopback that becomes a delay",
                NetworkFault {
                    direction: Direction::Egress.into(),
                    loss: Some(Loss { ratio: 1.0, ..Loss::default() }),
                    ..NetworkFault::default()
                },
                delay(400, Direction::Egress, vec![]),
            )
        },
        near(
            "partition",
            partition(Direction::Both, vec![]),
            partition(Direction::Both, vec![cidr("10.99.0.2/32")]),
        ),
        near("delay", delay(300, Direction::Both, vec![]), delay(400, Direction::Both, vec![])),
        near("loss of segments", loss(1.0), loss(0.9)),
        near("corruption", corrupt(false), corrupt(true)),
        near("refusal", refusal(Direction::Egress), refusal(Direction::Both)),
        Scenario {
            target: interface("lo", world.lab.near.name()),
            ping: Some("127.0.0.1"),
            ..near(
                "delay on loopback",
                delay(300, Direction::Egress, loopback()),
                delay(400, Direction::Egress, loopback()),
            )
        },
        stress("CPU load", cpu(0.05), cpu(0.1)),
        stress("memory load", memory(4), memory(8)),
    ]
}

impl Scenario {
    /// Injects, renews, changes, looks and reverts. How the injection stood in the end.
    async fn drive(&self, agent: &Agent, lease: Duration) -> Result<Injection> {
        let mut client = agent.client().await?;
        let id = unique("injection");
        let fault = |kind: &fault::Kind| Some(Fault { kind: Some(kind.clone()) });
        let request = ArmRequest {
            id: id.clone(),
            target: Some(self.target.clone()),
            fault: fault(&self.fault),
            duration_ns: DURATION.as_nanos() as u64,
            lease_ns: lease.as_nanos() as u64,
            dry_run: false,
            only: Vec::new(),
        };
        let injected = one(client.inject(request).await?.into_inner().injections)?;
        if injected.state() == State::Failed {
            return Ok(injected);
        }
        client.renew(RenewRequest { ids: vec![id.clone()] }).await?;
        // A step of it may be told to fail; the fault stays what it was then.
        let changed = client.update(UpdateRequest { id: id.clone(), fault: fault(&self.changed) }).await;
        if let Err(error) = changed
            && error.code() == tonic::Code::Unavailable
        {
            return Err(error.into());
        }
        client.list(ListRequest {}).await?;
        one(client.revert(RevertRequest { ids: vec![id], all: false }).await?.into_inner().injections)
    }
}

fn one(injections: Vec<Injection>) -> Result<Injection> {
    let [injection] = <[Injection; 1]>::try_from(injections).ok().context("not one injection")?;
    Ok(injection)
}

fn sweep_is(what: &str) -> bool {
    env::var_os("SQUALL_SWEEP").as_deref() == Some(OsStr::new(what))
}

fn full() -> bool {
    sweep_is("full")
}

/// What was done so far.
#[derive(Default)]
struct Tally {
    /// Passings at which it happened: `delay: line.veth 1`.
    done: usize,
    points: BTreeSet<String>,
    /// Points that had their turn, each with where that was.
    turns: BTreeSet<String>,
    /// Passings that were not reached again.
    missed: Vec<String>,
    /// The longest time from a kill until nobody felt anything.
    latest: Duration,
}

/// An agent that can be told what to do at its points.
struct Sweep {
    world: World,
    orders: Orders,
    agent: Agent,
    lease: Duration,
    tally: Tally,
}

impl Sweep {
    async fn new() -> Result<Self> {
        let (world, orders) = (World::new()?, Orders::new()?);
        orders.give("")?;
        let agent = Agent::start(AgentOptions {
            crash: Some(orders.0.path()),
            args: &["--upgrade", "take-over"],
            ..AgentOptions::default()
        })
        .await?;
        Ok(Self { world, orders, agent, lease: Duration::from_mins(1), tally: Tally::default() })
    }

    /// All that a scenario passes when nothing happens to it.
    async fn learn(&mut self, scenario: &Scenario) -> Result<Vec<Passing>> {
        self.orders.give("")?;
        let started = Instant::now();
        let ended = scenario.drive(&self.agent, Duration::from_mins(1)).await?;
        ensure!(ended.state() == State::Reverted, "{ended:?}\n{}", self.agent.log());
        // Long enough for what follows a kill, short enough to wait for its end.
        self.lease = (started.elapsed() * 3).max(Duration::from_secs(1));
        self.world.is_restored(&self.agent)?;
        let passed = self.orders.passed()?;
        ensure!(passed.len() > 10, "a test build? {passed:?}");
        Ok(passed)
    }

    /// Whether it is the turn of a point, which is passed on the way `there`, in a `replay` or at the `start`.
    fn is_due(&self, at: &Passing, when: &str) -> bool {
        full() || !self.tally.turns.contains(&format!("{} {when}", at.name))
    }

    fn note(&mut self, at: &Passing, when: &str) {
        self.tally.done += 1;
        self.tally.points.insert(at.name.clone());
        self.tally.turns.insert(format!("{} {when}", at.name));
    }

    /// Nothing more happens to the agent; it starts again, and everything must be as before.
    async fn recover(&mut self, at: &Passing) -> Result<()> {
        self.orders.give("")?;
        self.agent.restart().await?;
        self.world.is_restored(&self.agent).with_context(|| format!("after a kill at {at:?}"))
    }

    /// Drives a scenario into a kill. False: it came through.
    async fn kill_at(&mut self, scenario: &Scenario, at: &Passing) -> Result<bool> {
        self.orders.kill(at)?;
        let driven = scenario.drive(&self.agent, self.lease).await;
        // What comes after the last reply comes soon.
        let most = if driven.is_ok() { Duration::from_millis(300) } else { SETTLE };
        self.agent.dies_within(most)
    }

    /// Kills at every passing of a scenario, on the way there and back.
    async fn scenario(&mut self, scenario: &Scenario) -> Result<()> {
        for at in self.learn(scenario).await? {
            if !self.is_due(&at, "there") {
                continue;
            }
            if !self.kill_at(scenario, &at).await? {
                self.tally.missed.push(format!("{}: {} {}", scenario.name, at.name, at.n));
                continue;
            }
            let killed = Instant::now();
            wait_for("the fault to end without the agent", self.lease + SLACK, || {
                Ok(self.world.is_well(scenario)?.then_some(()))
            })
            .with_context(|| format!("{at:?}"))?;
            self.tally.latest = self.tally.latest.max(killed.elapsed());
            self.recover(&at).await?;
            self.note(&at, "there");
        }
        Ok(())
    }

    /// Kills at every passing of the replay of what a killed agent left.
    async fn replay(&mut self, scenario: &Scenario) -> Result<()> {
        let injected = Passing { name: "engine.injected".into(), n: 1, step: false };
        ensure!(self.kill_at(scenario, &injected).await?, "{}", self.agent.log());
        self.recover(&injected).await?;
        let mut passed = self.orders.passed()?;
        let last =
            passed.iter().rposition(|at| at.name == "engine.removed").context("nothing was replayed")?;
        passed.truncate(last + 1);
        for at in passed {
            if !self.is_due(&at, "replay") {
                continue;
            }
            ensure!(self.kill_at(scenario, &injected).await?, "{}", self.agent.log());
            self.orders.kill(&at)?;
            if self.agent.restart_to_die().await?.is_none() {
                self.tally.missed.push(format!("{}: {} {} in a replay", scenario.name, at.name, at.n));
                continue;
            }
            self.recover(&at).await?;
            // Two kills.
            self.tally.done += 1;
            self.note(&at, "replay");
        }
        Ok(())
    }

    /// Injects for an upgrade: nothing of it is renewed or changed.
    async fn inject(&self, scenario: &Scenario) -> Result<()> {
        let request = ArmRequest {
            id: unique("injection"),
            target: Some(scenario.target.clone()),
            fault: Some(Fault { kind: Some(scenario.fault.clone()) }),
            duration_ns: DURATION.as_nanos() as u64,
            lease_ns: Duration::from_mins(5).as_nanos() as u64,
            dry_run: false,
            only: Vec::new(),
        };
        let injected = one(self.agent.client().await?.inject(request).await?.into_inner().injections)?;
        ensure!(injected.state() == State::Active, "{injected:?}\n{}", self.agent.log());
        Ok(())
    }

    /// Reverts what was resumed, and everything is as before; what is more, nothing is there to be resumed.
    async fn revert_all(&mut self, at: &Passing) -> Result<()> {
        let request = RevertRequest { ids: vec![], all: true };
        self.agent.client().await?.revert(request).await?;
        self.world.is_restored(&self.agent).with_context(|| format!("after a kill at {at:?}"))?;
        let left = files(&self.agent.state_dir().join("resume"))?;
        ensure!(left.is_empty(), "{left:?} after a kill at {at:?}");
        Ok(())
    }

    /// Kills the old agent at every passing of its end, and the new one at every passing of its start.
    async fn upgrade(&mut self, scenario: &Scenario) -> Result<()> {
        let none = Passing { name: String::new(), n: 0, step: false };
        self.inject(scenario).await?;
        self.orders.give("")?;
        self.agent.terminate()?;
        let old = self.orders.passed()?;
        self.orders.give("")?;
        self.agent.restart().await?;
        let new = self.orders.passed()?;
        let live = self.agent.client().await?.list(ListRequest {}).await?.into_inner().injections;
        ensure!(
            live.iter().any(|i| i.state() == State::Active),
            "not resumed: {live:?}\n{}",
            self.agent.log()
        );
        self.revert_all(&none).await?;
        for at in old {
            if !self.is_due(&at, "upgrade") {
                continue;
            }
            self.inject(scenario).await?;
            self.orders.kill(&at)?;
            if self.agent.terminate()?.success() {
                self.tally.missed.push(format!("{}: {} {} before an upgrade", scenario.name, at.name, at.n));
            } else {
                self.note(&at, "upgrade");
            }
            self.orders.give("")?;
            self.agent.restart().await?;
            self.revert_all(&at).await?;
        }
        for at in new {
            if !self.is_due(&at, "take-over") {
                continue;
            }
            self.inject(scenario).await?;
            self.orders.give("")?;
            self.agent.terminate()?;
            self.orders.kill(&at)?;
            if self.agent.restart_to_die().await?.is_none() {
                self.tally.missed.push(format!("{}: {} {} in an upgrade", scenario.name, at.name, at.n));
            } else {
                self.orders.give("")?;
                self.agent.restart().await?;
                self.note(&at, "take-over");
            }
            self.orders.give("")?;
            self.revert_all(&at).await?;
        }
        Ok(())
    }

    /// Kills at every passing of a start, while the agent finds out what works here.
    async fn start(&mut self) -> Result<()> {
        self.agent.kill()?;
        self.orders.give("")?;
        self.agent.restart().await?;
        for at in self.orders.passed()? {
            if !self.is_due(&at, "start") {
                continue;
            }
            self.agent.kill()?;
            self.orders.kill(&at)?;
            if self.agent.restart_to_die().await?.is_none() {
                self.tally.missed.push(format!("start: {} {}", at.name, at.n));
                continue;
            }
            self.recover(&at).await?;
            self.note(&at, "start");
        }
        Ok(())
    }

    /// Lets every step of a scenario fail, with every error. The agent lives through it, and takes everything back.
    async fn failures(&mut self, scenario: &Scenario) -> Result<()> {
        let steps: Vec<Passing> = self.learn(scenario).await?.into_iter().filter(|at| at.step).collect();
        for (i, at) in steps.iter().enumerate() {
            let errors = if full() { &ERRORS[..] } else { &ERRORS[i % ERRORS.len()..][..1] };
            if !self.is_due(at, "there") {
                continue;
            }
            for errno in errors {
                self.orders.fail(at, *errno)?;
                let ended = scenario.drive(&self.agent, Duration::from_mins(1)).await;
                if !self.orders.passed()?.contains(at) {
                    self.tally.missed.push(format!("{}: {} {}", scenario.name, at.name, at.n));
                    continue;
                }
                self.all_ended().await.with_context(|| format!("{at:?} failed with {errno}: {ended:?}"))?;
                self.world
                    .is_restored(&self.agent)
                    .with_context(|| format!("{at:?} failed with {errno}: {ended:?}"))?;
                self.note(at, "there");
            }
        }
        Ok(())
    }

    /// Waits until nothing is injected any more: what could not be reverted at first is tried again.
    async fn all_ended(&self) -> Result<()> {
        let mut client = self.agent.client().await?;
        let end = Instant::now() + SETTLE;
        loop {
            let all = client.list(ListRequest {}).await?.into_inner().injections;
            let live: Vec<_> =
                all.iter().filter(|i| !matches!(i.state(), State::Reverted | State::Failed)).collect();
            if live.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("still there: {live:?}\n{}", self.agent.log());
            }
            if let Some(active) = live.iter().find(|i| i.state() == State::Active) {
                client.revert(RevertRequest { ids: vec![active.id.clone()], all: false }).await?;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Says what was done. Fails where a passing was missed that should not be, or at the end something is left.
    fn end(mut self, what: &str) -> Result<Tally> {
        ensure!(self.agent.terminate()?.success(), "the agent failed:\n{}", self.agent.log());
        self.world.is_restored(&self.agent)?;
        let Tally { done, points, missed, .. } = &self.tally;
        println!(
            "crash sweep: {done} {what} at {} points, {} passings not reached again",
            points.len(),
            missed.len()
        );
        // What two threads race for comes now and then in another order.
        ensure!(missed.len() <= 1 + done / 50, "too many were not reached again: {missed:?}");
        Ok(self.tally)
    }
}

/// Every point of the agent that can be passed on this kernel.
async fn points(agent: &Agent) -> Result<BTreeSet<String>> {
    let list = stdout(std::process::Command::new(bin_dir().join("squall-agent-crash")).arg("crash-points"))?;
    let faults = agent.client().await?.describe(squall_proto::v1::DescribeRequest::default()).await?;
    let mechanisms = format!("{:?}", faults.into_inner().faults);
    let tcx = mechanisms.contains("TCX");
    let line = mechanisms.contains("sch_fq");
    let needs_clsact = |name: &str| {
        let filters =
            ["network.clsact", "network.filters", "port.clsact", "port.close.clsact", "port.close.filters"];
        filters.contains(&name)
    };
    let needs_line = |name: &str| {
        let more = ["network.line", "port.close.line", "port.close.drain", "line.steer", "line.remove"];
        name.starts_with("port.line") || more.contains(&name)
    };
    let possible = |name: &&str| {
        // A stressor dies with its agent; that one which does not is killed is shown in tests/clean.rs.
        !(tcx && needs_clsact(name) || !line && needs_line(name) || *name == "stressor.kill")
    };
    Ok(list.lines().filter(possible).map(str::to_owned).collect())
}

#[tokio::test]
async fn sigkill_at_every_crash_point_leaves_nothing() -> Result<()> {
    let mut sweep = Sweep::new().await?;
    let points = points(&sweep.agent).await?;
    for scenario in scenarios(&sweep.world) {
        let (before, started) = (sweep.tally.done, Instant::now());
        sweep.scenario(&scenario).await.with_context(|| scenario.name.to_owned())?;
        sweep.replay(&scenario).await.with_context(|| format!("{}, replayed", scenario.name))?;
        sweep.upgrade(&scenario).await.with_context(|| format!("{}, at an upgrade", scenario.name))?;
        if sweep_is("each") {
            sweep.tally.turns.clear();
        }
        println!("{}: {} kills in {:.1?}", scenario.name, sweep.tally.done - before, started.elapsed());
    }
    sweep.start().await.context("at the start")?;
    let tally = sweep.end("kills")?;
    println!(
        "crash sweep: without an agent a fault was over at the latest {:?} after the kill",
        tally.latest
    );
    if wanted().is_some() {
        return Ok(());
    }
    let missing: Vec<_> = points.difference(&tally.points).collect();
    ensure!(missing.is_empty(), "points at which nothing was killed: {missing:?}");
    ensure!(!full() || tally.done >= 500, "only {} kills", tally.done);
    Ok(())
}

#[tokio::test]
async fn every_step_may_fail_and_leaves_nothing() -> Result<()> {
    let mut sweep = Sweep::new().await?;
    for scenario in scenarios(&sweep.world) {
        sweep.failures(&scenario).await.with_context(|| scenario.name.to_owned())?;
    }
    sweep.end("errors").map(drop)
}
