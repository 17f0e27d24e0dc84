//! Random sequences of what may happen to injections, against a model: after every step the host is what the model says.
//!
//! 1000 sequences with `SQUALL_SWEEP=full`, else 50. `SQUALL_SEED` repeats those of a seed, which is printed.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::ErrorKind,
    net::UdpSocket,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime, clock_settime};
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner},
};
use squall_proto::v1::{
    ArmRequest, CpuFault, Direction, Fault, ListRequest, NetworkFault, RenewRequest, RevertRequest, State,
    Target, UpdateRequest, fault,
};
use squall_tests::{
    Agent, AgentOptions, Lab, NetState, Victim, cidr, delay, interface, need_root, partition, process,
    unique, wait_for,
};
use tokio::runtime::Runtime;

/// A lease that is seen to end.
const SHORT: Duration = Duration::from_millis(800);
/// A lease that is not.
const LONG: Duration = Duration::from_mins(5);
const DURATION: Duration = Duration::from_mins(10);
/// How late a fault may end that nobody reverts: timers, looks at the target, and a VM without KVM.
const SLACK: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(20);
/// How long an answer is waited for that should not come.
const SILENCE: Duration = Duration::from_millis(60);
const PORT: u16 = 7000;

/// One step. The number chooses among the faults.
#[derive(Debug, Clone)]
enum Step {
    Inject(usize, bool),
    Update(usize),
    Renew(usize),
    Revert(usize),
    KillAgent,
    Restart,
    TargetDies,
    LeasesEnd,
    /// The wall clock steps by so many seconds; in a VM alone.
    Clock(i64),
}

fn step() -> impl Strategy<Value = Step> {
    let kind = 0..FAULTS;
    let clock = prop_oneof![Just(-86_400_i64), Just(86_400)];
    prop_oneof![
        6 => (kind.clone(), any::<bool>()).prop_map(|(kind, short)| Step::Inject(kind, short)),
        2 => kind.clone().prop_map(Step::Update),
        2 => kind.clone().prop_map(Step::Renew),
        3 => kind.prop_map(Step::Revert),
        1 => Just(Step::KillAgent),
        1 => Just(Step::Restart),
        1 => Just(Step::TargetDies),
        1 => Just(Step::LeasesEnd),
        1 => clock.prop_map(Step::Clock),
    ]
}

/// Two partitions, a load, and a delay that takes settings.
const FAULTS: usize = 4;
const LOAD: usize = 2;
const LOOPBACK: usize = 3;

/// What the model knows of a live injection.
#[derive(Debug, Clone)]
struct Live {
    id: String,
    lease: Duration,
    /// Until then it must be felt.
    felt: Instant,
    /// From then on it must not.
    gone: Instant,
}

struct World {
    runtime: Runtime,
    lab: Lab,
    victim: Victim,
    before: NetState,
    agent: Agent,
    alive: bool,
    model: [Option<Live>; FAULTS],
    socket: UdpSocket,
    steps: usize,
}

/// Sends back what comes to an address of the far side.
fn echo(lab: &Lab, address: &str) -> Result<()> {
    let socket = lab.far.inside(|| Ok(UdpSocket::bind((address, PORT))?))?;
    thread::spawn(move || {
        let mut word = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut word) {
            let _unreachable = socket.send_to(&word[..length], from);
        }
    });
    Ok(())
}

const PEERS: [&str; 2] = ["10.99.0.2", "10.99.0.3"];

impl World {
    fn new() -> Result<Self> {
        need_root()?;
        let runtime = Runtime::new()?;
        let (lab, victim) = (Lab::new("sequences")?, Victim::start("sequences", 256 << 20)?);
        for peer in PEERS {
            echo(&lab, peer)?;
        }
        let socket = lab.near.inside(|| Ok(UdpSocket::bind(("0.0.0.0", 0))?))?;
        let before = lab.near.state()?;
        let agent = runtime.block_on(Agent::start(AgentOptions::default()))?;
        let model = [const { None }; FAULTS];
        Ok(Self { runtime, lab, victim, before, agent, alive: true, model, socket, steps: 0 })
    }

    fn fault(&self, kind: usize, changed: bool) -> (Target, Fault) {
        let near = |name: &str| interface(name, self.lab.near.name());
        let network = |fault: NetworkFault| fault::Kind::Network(fault);
        let (target, kind) = match kind {
            LOAD => {
                let load = if changed { 0.02 } else { 0.01 };
                (process(self.victim.pid()), fault::Kind::Cpu(CpuFault { load, workers: 1 }))
            }
            LOOPBACK => {
                let ms = if changed { 2 } else { 1 };
                (near("lo"), network(delay(ms, Direction::Egress, vec![cidr("127.0.0.0/8")])))
            }
            peer => {
                let direction = if changed { Direction::Egress } else { Direction::Both };
                (near("near0"), network(partition(direction, vec![cidr(&format!("{}/32", PEERS[peer]))])))
            }
        };
        (target, Fault { kind: Some(kind) })
    }

    /// Whether a fault is on, as its victim sees it.
    fn is_felt(&self, kind: usize) -> Result<bool> {
        match kind {
            LOAD => Ok(self.victim.cgroup.processes()?.len() > 1),
            LOOPBACK => self.lab.near.inside(|| {
                Ok(fs::read_to_string("/proc/sys/net/ipv4/conf/lo/route_localnet")?.trim() == "1")
            }),
            peer => Ok(!self.answers(PEERS[peer])?),
        }
    }

    fn answers(&self, peer: &str) -> Result<bool> {
        self.socket.set_read_timeout(Some(SILENCE))?;
        let word = unique("word");
        // What a partition leaves to the sender is nothing or an error.
        let _refused = self.socket.send_to(word.as_bytes(), (peer, PORT));
        let mut answer = [0; 64];
        loop {
            match self.socket.recv_from(&mut answer) {
                Ok((length, _)) if &answer[..length] == word.as_bytes() => return Ok(true),
                // Late answers to words before.
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// From a state in which nothing is injected.
    fn reset(&mut self) -> Result<()> {
        self.agent.kill()?;
        self.runtime.block_on(self.agent.restart())?;
        self.alive = true;
        self.model = [const { None }; FAULTS];
        self.victim = Victim::start("sequences", 256 << 20)?;
        Ok(())
    }

    fn sequence(&mut self, steps: &[Step]) -> Result<()> {
        for step in steps {
            self.take(step).with_context(|| format!("{step:?}"))?;
            self.check().with_context(|| format!("after {step:?}, with {:?}", self.model))?;
            self.steps += 1;
        }
        if !self.alive {
            self.take(&Step::Restart)?;
        }
        self.revert_all()?;
        self.check()?;
        let near = || anyhow::Ok(self.before.changes(&self.lab.near.state()?));
        wait_for("the lab to be as before", PATIENCE, || Ok(near()?.is_empty().then_some(())))
            .with_context(|| format!("{:?}\n{}", near(), self.agent.log()))?;
        ensure!(self.records()? == 0, "records are left");
        Ok(())
    }

    fn records(&self) -> Result<usize> {
        Ok(fs::read_dir(self.agent.state_dir().join("journal"))?.count())
    }

    fn revert_all(&mut self) -> Result<()> {
        let request = RevertRequest { ids: vec![], all: true };
        let reverted =
            self.runtime.block_on(async { anyhow::Ok(self.agent.client().await?.revert(request).await?) })?;
        let reverted = reverted.into_inner().injections;
        ensure!(reverted.iter().all(|i| i.state() != State::Stuck), "{reverted:?}");
        self.model = [const { None }; FAULTS];
        Ok(())
    }

    fn take(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Inject(kind, short) if self.alive => self.inject(kind, if short { SHORT } else { LONG }),
            Step::Update(kind) if self.alive => self.update(kind),
            Step::Renew(kind) if self.alive => self.renew(kind),
            Step::Revert(kind) if self.alive => self.revert(kind),
            Step::Inject(..) | Step::Update(_) | Step::Renew(_) | Step::Revert(_) => Ok(()),
            Step::KillAgent => {
                self.agent.kill()?;
                self.alive = false;
                for live in self.model.iter_mut().flatten() {
                    live.felt = Instant::now();
                }
                Ok(())
            }
            Step::Restart => {
                if self.alive {
                    ensure!(self.agent.terminate()?.success(), "{}", self.agent.log());
                }
                self.runtime.block_on(self.agent.restart())?;
                self.alive = true;
                self.model = [const { None }; FAULTS];
                Ok(())
            }
            Step::TargetDies => {
                self.victim.kill()?;
                wait_for("the load to end with its target", PATIENCE + SHORT, || {
                    Ok(self.victim.cgroup.processes()?.is_empty().then_some(()))
                })?;
                if let Some(live) = &self.model[LOAD] {
                    self.has_ended(&live.id)?;
                }
                self.model[LOAD] = None;
                self.victim = Victim::start("sequences", 256 << 20)?;
                Ok(())
            }
            Step::LeasesEnd => {
                for kind in 0..FAULTS {
                    let Some(live) = self.model[kind].clone().filter(|live| live.lease == SHORT) else {
                        continue;
                    };
                    thread::sleep(live.felt.saturating_duration_since(Instant::now()));
                    // Settings stay until the next start where the agent is dead.
                    if self.alive || kind != LOOPBACK {
                        let most = live.gone.saturating_duration_since(Instant::now());
                        wait_for("the lease to end", most, || Ok((!self.is_felt(kind)?).then_some(())))?;
                        self.has_ended(&live.id)?;
                        self.model[kind] = None;
                    }
                }
                Ok(())
            }
            Step::Clock(seconds) => {
                if Path::new("/etc/vm").exists() {
                    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
                    let then = nix::sys::time::TimeSpec::new(now.tv_sec() + seconds, now.tv_nsec());
                    clock_settime(ClockId::CLOCK_REALTIME, then)?;
                }
                Ok(())
            }
        }
    }

    fn inject(&mut self, kind: usize, lease: Duration) -> Result<()> {
        if self.model[kind].is_some() {
            return self.renew(kind);
        }
        let id = unique("injection");
        let (target, fault) = self.fault(kind, false);
        let request = ArmRequest {
            id: id.clone(),
            target: Some(target),
            fault: Some(fault),
            duration_ns: DURATION.as_nanos() as u64,
            lease_ns: lease.as_nanos() as u64,
            dry_run: false,
            only: Vec::new(),
        };
        let sent = Instant::now();
        let made =
            self.runtime.block_on(async { anyhow::Ok(self.agent.client().await?.inject(request).await?) })?;
        let made = made.into_inner().injections;
        // On a slow machine a short lease may be over by now.
        let live = |s: State| s == State::Active || lease == SHORT && s == State::Reverted;
        ensure!(made.len() == 1 && live(made[0].state()), "{made:?}");
        let (felt, gone) = (sent + lease, Instant::now() + lease + SLACK);
        self.model[kind] = Some(Live { id, lease, felt, gone });
        Ok(())
    }

    fn update(&mut self, kind: usize) -> Result<()> {
        let Some(live) = &self.model[kind] else { return Ok(()) };
        let request = UpdateRequest { id: live.id.clone(), fault: Some(self.fault(kind, true).1) };
        let updated =
            self.runtime.block_on(async { anyhow::Ok(self.agent.client().await?.update(request).await) })?;
        if let Err(error) = updated {
            ensure!(Instant::now() > live.felt, "a live one was not changed: {error}");
        }
        Ok(())
    }

    fn renew(&mut self, kind: usize) -> Result<()> {
        let Some(live) = &mut self.model[kind] else { return Ok(()) };
        let sent = Instant::now();
        let request = RenewRequest { ids: vec![live.id.clone()] };
        let renewed =
            self.runtime.block_on(async { anyhow::Ok(self.agent.client().await?.renew(request).await?) })?;
        if renewed.into_inner().gone.is_empty() {
            (live.felt, live.gone) = (sent + live.lease, Instant::now() + live.lease + SLACK);
        } else {
            ensure!(Instant::now() > live.felt, "a live one was not renewed");
        }
        Ok(())
    }

    fn revert(&mut self, kind: usize) -> Result<()> {
        let Some(live) = self.model[kind].take() else { return Ok(()) };
        // Twice: the second finds nothing to do.
        for _ in 0..2 {
            let request = RevertRequest { ids: vec![live.id.clone()], all: false };
            let reverted = self
                .runtime
                .block_on(async { anyhow::Ok(self.agent.client().await?.revert(request).await?) })?;
            let reverted = reverted.into_inner().injections;
            ensure!(reverted.len() == 1 && reverted[0].state() == State::Reverted, "{reverted:?}");
        }
        Ok(())
    }

    /// Fails unless the agent, if it lives, says that an injection is over.
    fn has_ended(&self, id: &str) -> Result<()> {
        if !self.alive {
            return Ok(());
        }
        wait_for("the agent to see the end", PATIENCE, || {
            Ok((!self.active()?.contains(&id.to_owned())).then_some(()))
        })
    }

    /// What the agent says is live.
    fn active(&self) -> Result<Vec<String>> {
        let listed = self
            .runtime
            .block_on(async { anyhow::Ok(self.agent.client().await?.list(ListRequest {}).await?) })?;
        let listed = listed.into_inner().injections.into_iter();
        Ok(listed.filter(|i| i.state() != State::Reverted).map(|i| i.id).collect())
    }

    /// Holds the host, the agent and its journal to the model.
    fn check(&mut self) -> Result<()> {
        for kind in 0..FAULTS {
            let over = match &self.model[kind] {
                None => true,
                Some(live) => Instant::now() > live.gone,
            };
            // Settings stay until the next start where the agent is dead.
            if over && (self.alive || kind != LOOPBACK) {
                let ended = || Ok((!self.is_felt(kind)?).then_some(()));
                wait_for("a fault to be over", PATIENCE, ended).with_context(|| format!("fault {kind}"))?;
                if let Some(live) = self.model[kind].take() {
                    self.has_ended(&live.id)?;
                }
            } else if let Some(live) = &self.model[kind] {
                let felt = self.is_felt(kind)?;
                ensure!(felt || Instant::now() > live.felt, "fault {kind} is not felt\n{}", self.agent.log());
            }
        }
        if self.alive {
            let active = self.active()?;
            let now = Instant::now();
            for id in &active {
                ensure!(
                    self.model.iter().flatten().any(|live| live.id == *id),
                    "{id} is live and should not be"
                );
            }
            for live in self.model.iter().flatten().filter(|live| live.felt > now) {
                ensure!(active.contains(&live.id), "{live:?} is not live");
            }
            let most = self.model.iter().flatten().count();
            wait_for("the journal to hold what is live", PATIENCE, || {
                Ok((self.records()? <= most).then_some(()))
            })?;
            ensure!(
                self.records()? >= self.model.iter().flatten().filter(|l| l.felt > Instant::now()).count()
            );
        }
        Ok(())
    }
}

#[test]
fn whatever_happens_the_host_is_what_the_model_says() -> Result<()> {
    let cases = if env::var_os("SQUALL_SWEEP").as_deref() == Some(OsStr::new("full")) { 1000 } else { 50 };
    let seed: u64 = match env::var("SQUALL_SEED") {
        Ok(seed) => seed.parse().context("SQUALL_SEED is a number")?,
        Err(_) => {
            u64::from(std::process::id()) << 32
                | u64::from(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).subsec_nanos())
        }
    };
    println!("sequences: SQUALL_SEED={seed}");
    let bytes: Vec<u8> = [seed, 0, 0, 0].iter().flat_map(|part| part.to_le_bytes()).collect();
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 100, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let world = std::cell::RefCell::new(World::new()?);
    let done = runner.run(&vec(step(), 3..8), |steps| {
        let mut world = world.borrow_mut();
        world.sequence(&steps).map_err(|error| {
            // The next attempt starts afresh.
            let reset = world.reset();
            TestCaseError::fail(format!("{error:#} (reset: {reset:?})"))
        })
    });
    let steps = world.borrow().steps;
    println!(
        "sequences: {cases} of them, {steps} steps, in the end the host is what the model says: {}",
        done.is_ok()
    );
    done.map_err(|error| anyhow::anyhow!("{error}"))
}
