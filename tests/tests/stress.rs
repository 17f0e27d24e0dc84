//! CPU and memory faults of a real agent, as the kernel's own accounts of the cgroup show them.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use squall_proto::v1::{
    self, ArmRequest, CgroupSelector, CpuFault, Fault, Injection, ListRequest, MemoryFault, ProcessSelector,
    RevertRequest, SampleRequest, State, Target, TargetSample, UpdateRequest, agent_client::AgentClient,
    fault, memory_fault, target,
};
use squall_tests::{Agent, AgentOptions, Cgroup, Running, bin_dir, need_root, unique, wait_for};
use tokio::time::sleep;
use tonic::transport::Channel;

const MIB: u64 = 1 << 20;
const ID: &str = "stress";
/// Longest wait for what happens at once on a free machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A sleeping process in a cgroup of its own, and an agent.
struct Stage {
    agent: Agent,
    client: AgentClient<Channel>,
    victim: Running,
    // Last: it is removed when nobody is in it.
    cgroup: Cgroup,
}

impl Stage {
    async fn new() -> Result<Self> {
        need_root()?;
        let cgroup = Cgroup::new(unique("stress"))?;
        // Others may keep the machine busy: this cgroup goes first.
        let (file, most) = if is_v2() { ("cpu.weight", "10000") } else { ("cpu.shares", "262144") };
        fs::write(cgroup.dir("cpu")?.join(file), most)?;
        let victim = Running::start("sleep", &cgroup.wrap(Command::new("sleep").arg("600")))?;
        let pid = victim.pid().cast_signed();
        let inside = || Ok(cgroup.processes()?.contains(&pid).then_some(()));
        wait_for("the victim in its cgroup", PATIENCE, inside)?;
        let agent = Agent::start(AgentOptions::default()).await?;
        let client = agent.client().await?;
        Ok(Self { agent, client, victim, cgroup })
    }

    fn target(&self) -> Target {
        let process = ProcessSelector { pid: self.victim.pid(), ..ProcessSelector::default() };
        Target { kind: Some(target::Kind::Process(process)) }
    }

    fn request(&self, fault: fault::Kind) -> ArmRequest {
        ArmRequest {
            id: ID.into(),
            target: Some(self.target()),
            fault: Some(Fault { kind: Some(fault) }),
            duration_ns: Duration::from_mins(5).as_nanos() as u64,
            lease_ns: Duration::from_mins(4).as_nanos() as u64,
            dry_run: false,
            only: Vec::new(),
        }
    }

    async fn inject(&mut self, fault: fault::Kind) -> Result<Injection> {
        let injected = self.client.inject(self.request(fault)).await?.into_inner();
        let [injection] = injected.injections.as_slice() else { bail!("one target, not {injected:?}") };
        ensure!(injection.state() == State::Active, "{injection:?}");
        Ok(injection.clone())
    }

    /// Checks and plans, and changes nothing.
    async fn plan(&mut self, request: ArmRequest) -> Result<Injection> {
        let mut planned = self.client.arm(ArmRequest { dry_run: true, ..request }).await?.into_inner();
        planned.injections.pop().context("one target")
    }

    async fn revert(&mut self) -> Result<Injection> {
        let request = RevertRequest { ids: vec![ID.into()], all: false };
        let mut reverted = self.client.revert(request).await?.into_inner();
        let injection = reverted.injections.pop().context("it was there")?;
        ensure!(injection.state() == State::Reverted, "{injection:?}");
        Ok(injection)
    }

    /// A figure of the effect, measured now.
    async fn figure(&mut self, name: &str) -> Result<f64> {
        let listed = self.client.list(ListRequest {}).await?.into_inner();
        figure(listed.injections.first().context("it is listed")?, name)
    }

    async fn figure_until(&mut self, name: &str, wanted: impl Fn(f64) -> bool) -> Result<()> {
        let started = Instant::now();
        loop {
            let now = self.figure(name).await?;
            if wanted(now) {
                return Ok(());
            }
            ensure!(started.elapsed() < PATIENCE, "{name} is still {now}:\n{}", self.agent.log());
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn sample(&mut self) -> Result<TargetSample> {
        let request = SampleRequest { target: Some(self.target()), interval_ns: 0 };
        let mut stream = self.client.sample(request).await?.into_inner();
        stream.message().await?.context("a sample at once")
    }

    /// CPU seconds charged to the cgroup since it was made.
    fn cpu(&self) -> Result<f64> {
        if is_v2() {
            let text = fs::read_to_string(self.cgroup.dir("cpu")?.join("cpu.stat"))?;
            let line =
                text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("usage_usec")?;
            return Ok(line.parse::<f64>()? / 1e6);
        }
        let text = fs::read_to_string(self.cgroup.dir("cpuacct")?.join("cpuacct.usage"))?;
        Ok(text.trim().parse::<f64>()? / 1e9)
    }

    /// CPUs' worth of time that the cgroup uses now.
    async fn usage(&self) -> Result<f64> {
        let (started, before) = (Instant::now(), self.cpu()?);
        sleep(Duration::from_secs(2)).await;
        Ok((self.cpu()? - before) / started.elapsed().as_secs_f64())
    }

    /// Whether the cgroup settles at this many CPUs. A machine that stands still, as an emulated one does, spoils the two seconds
    /// it does so in.
    async fn settles(&self, at: f64, tolerance: f64) -> Result<()> {
        let mut seen = Vec::new();
        while seen.len() < 5 {
            let usage = self.usage().await?;
            if close(usage, at, tolerance) {
                return Ok(());
            }
            seen.push(usage);
        }
        bail!("{at} CPUs were asked for, {seen:?} are used")
    }

    /// Waits until a reading of the cgroup's memory is as wanted; returns the highest on the way.
    async fn memory_until(&self, wanted: impl Fn(u64) -> bool) -> Result<u64> {
        let started = Instant::now();
        let mut highest = 0;
        loop {
            let now = self.cgroup.memory()?;
            highest = highest.max(now);
            if wanted(now) {
                return Ok(highest);
            }
            ensure!(started.elapsed() < PATIENCE, "still {now} bytes are charged:\n{}", self.agent.log());
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Those in the cgroup besides the victim.
    fn others(&self) -> Result<Vec<i32>> {
        let victim = self.victim.pid().cast_signed();
        Ok(self.cgroup.processes()?.into_iter().filter(|pid| *pid != victim).collect())
    }
}

/// A stressor that no agent knows of. Its input stays open until it is dropped.
struct Stray(Child);

impl Stray {
    fn start(token: &str) -> Result<Self> {
        let mut command = Command::new(bin_dir().join("squall-agent"));
        command.arg0("squall-stress").args(["stress", "cpu", token]);
        Ok(Self(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?))
    }
}

impl Drop for Stray {
    fn drop(&mut self) {
        // One that has ended is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_v2() -> bool {
    fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap_or(false)
}

fn figure(injection: &Injection, name: &str) -> Result<f64> {
    let effect = injection.effect.as_ref().context("an effect")?;
    let found = effect.figures.iter().find(|figure| figure.name == name);
    found.map(|figure| figure.value).with_context(|| format!("no {name} in {effect:?}"))
}

fn cpu(load: f64) -> fault::Kind {
    fault::Kind::Cpu(CpuFault { load, workers: 0 })
}

fn share(share: f64, ramp: Duration) -> fault::Kind {
    let size = Some(memory_fault::Size::Share(share));
    fault::Kind::Memory(MemoryFault { size, ramp_ns: ramp.as_nanos() as u64 })
}

fn bytes(bytes: u64) -> fault::Kind {
    fault::Kind::Memory(MemoryFault { size: Some(memory_fault::Size::Bytes(bytes)), ramp_ns: 0 })
}

fn close(value: f64, wanted: f64, by: f64) -> bool {
    (value - wanted).abs() <= by
}

#[tokio::test(flavor = "multi_thread")]
async fn cpu_load_is_a_share_of_the_quota_and_changes_in_place() -> Result<()> {
    let mut stage = Stage::new().await?;
    stage.cgroup.limit_cpus(0.5)?;
    ensure!(stage.usage().await? < 0.01, "nothing burns before");

    let injection = stage.inject(cpu(0.8)).await?;
    ensure!(injection.warnings.is_empty(), "{:?}", injection.warnings);
    let version = if is_v2() { "v2" } else { "v1" };
    ensure!(injection.mechanism == format!("{version} cgroup + duty cycle"), "{}", injection.mechanism);
    let stressors = stage.others()?;
    ensure!(stressors.len() == 1, "{stressors:?}");
    stage.settles(0.4, 0.06).await.context("80% of half a CPU")?;
    let (measured, asked) = (stage.figure("cpu_usage").await?, stage.figure("cpu_asked").await?);
    ensure!(close(measured, 0.4, 0.06) && close(asked, 0.4, 1e-6), "{measured} of {asked}");

    let fault = Some(Fault { kind: Some(cpu(0.3)) });
    stage.client.update(UpdateRequest { id: ID.into(), fault }).await?;
    stage.settles(0.15, 0.06).await.context("30% of half a CPU")?;
    ensure!(stage.others()? == stressors, "the same stressor goes on");
    let measured = stage.figure("cpu_usage").await?;
    ensure!(close(measured, 0.15, 0.06), "{measured} since the change");

    let reverted = stage.revert().await?;
    ensure!(reverted.effect.as_ref().is_some_and(|effect| effect.bit), "{reverted:?}");
    ensure!(stage.others()?.is_empty(), "{:?}", stage.others()?);
    ensure!(stage.usage().await? < 0.01, "nothing burns after");
    stage.victim.check()
}

#[tokio::test(flavor = "multi_thread")]
async fn stressor_is_no_part_of_the_target() -> Result<()> {
    let mut stage = Stage::new().await?;
    let before = stage.sample().await?;
    stage.inject(cpu(0.2)).await?;
    sleep(Duration::from_secs(1)).await;
    let during = stage.sample().await?;
    let of_target = |sample: &TargetSample| (sample.processes, sample.threads, sample.generation.clone());
    ensure!(of_target(&before) == of_target(&during), "{before:?} {during:?}");
    // Its own start may have taken a tenth of a second where a CPU is emulated.
    let burned = during.cpu_seconds - before.cpu_seconds;
    ensure!(burned < 0.1, "the burning is not the target's: {before:?} {during:?}");

    let path = stage.cgroup.path();
    let cgroup = Target { kind: Some(target::Kind::Cgroup(CgroupSelector { path })) };
    let request = SampleRequest { target: Some(cgroup), interval_ns: 0 };
    let mut samples = stage.client.sample(request).await?.into_inner();
    let sample = samples.message().await?.context("a sample")?;
    ensure!(sample.processes == 1 && sample.generation == before.generation, "{sample:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_share_counts_what_the_service_uses_and_is_never_passed() -> Result<()> {
    const LIMIT: u64 = 128 * MIB;
    const WANTED: u64 = LIMIT / 10 * 8;
    let mut stage = Stage::new().await?;
    stage.cgroup.limit_memory(LIMIT)?;
    // A service that uses some of it already: a shell with 16 bytes doubled 20 times in a variable.
    let hog = "x=0123456789abcdef; i=0; while [ $i -lt 20 ]; do x=$x$x; i=$((i+1)); done; sleep 600";
    let _hog = Running::start("hog", &stage.cgroup.wrap(Command::new("sh").args(["-c", hog])))?;
    stage.memory_until(|memory| memory > 16 * MIB).await?;
    // Doubling takes more for a moment.
    sleep(Duration::from_secs(1)).await;
    let before = stage.cgroup.memory()?;

    let injection = stage.inject(share(0.8, Duration::from_secs(2))).await?;
    ensure!(injection.changes[0].contains("of 128 MiB"), "{:?}", injection.changes);
    let early = stage.cgroup.memory()?;
    ensure!(early < WANTED - 10 * MIB, "{early} bytes at once: no ramp");
    let highest = stage.memory_until(|memory| memory + MIB > WANTED).await?;
    sleep(Duration::from_secs(1)).await;
    let settled = stage.cgroup.memory()?;
    ensure!(highest.max(settled) < WANTED + 4 * MIB, "{highest} and {settled}, not {WANTED}");
    let held = stage.figure("memory_held").await?;
    ensure!(
        close(held, (WANTED - before) as f64, 4e0 * MIB as f64),
        "the service's own memory counts: held {held} beside {before}"
    );
    let sample = stage.sample().await?;
    ensure!(sample.oom_known && sample.oom_kills == 0, "{sample:?}");
    ensure!(sample.cgroup_memory_limit_bytes == LIMIT, "{sample:?}");

    let reverted = stage.revert().await?;
    ensure!(reverted.effect.as_ref().is_some_and(|effect| effect.bit), "{reverted:?}");
    let left = stage.cgroup.memory()?;
    ensure!(left < before + 4 * MIB, "{left} bytes are still charged right after the revert");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_in_bytes_is_held_by_the_stressor() -> Result<()> {
    let mut stage = Stage::new().await?;
    stage.cgroup.limit_memory(256 * MIB)?;
    stage.inject(bytes(64 * MIB)).await?;
    stage.memory_until(|memory| memory >= 64 * MIB).await?;
    // The stressor reports what it holds a moment after the kernel does.
    stage.figure_until("memory_held", |held| close(held, 64e0 * MIB as f64, 1.0)).await?;
    let fault = Some(Fault { kind: Some(bytes(16 * MIB)) });
    stage.client.update(UpdateRequest { id: ID.into(), fault }).await?;
    stage.memory_until(|memory| memory < 24 * MIB).await?;
    stage.figure_until("memory_held", |held| close(held, 16e0 * MIB as f64, 1.0)).await?;
    stage.revert().await?;
    ensure!(stage.others()?.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn service_that_balloons_under_pressure_is_killed_and_counted() -> Result<()> {
    let mut stage = Stage::new().await?;
    stage.cgroup.limit_memory(96 * MIB)?;
    let path = stage.cgroup.path();
    let cgroup = Target { kind: Some(target::Kind::Cgroup(CgroupSelector { path })) };
    let request = SampleRequest { target: Some(cgroup), interval_ns: 100_000_000 };
    let mut samples = stage.client.sample(request).await?.into_inner();
    let first = samples.message().await?.context("a sample")?;
    ensure!(first.oom_known && first.oom_kills == 0, "{first:?}");

    stage.inject(share(0.9, Duration::ZERO)).await?;
    stage.memory_until(|memory| memory > 84 * MIB).await?;
    // It grows when it is told to.
    let go = stage.agent.state_dir().join("go");
    let script = "until [ -e \"$0\" ]; do sleep 0.1; done; x=0123456789abcdef; while :; do x=$x$x; done";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(&go);
    let balloon = Running::start("balloon", &stage.cgroup.wrap(&command))?;
    let procs = stage.cgroup.dir("memory")?.join("cgroup.procs");
    let pid = balloon.pid().to_string();
    let inside = || Ok(fs::read_to_string(&procs)?.lines().any(|line| line == pid).then_some(()));
    wait_for("the balloon in the cgroup", PATIENCE, inside)?;
    // By its process, which takes the way to its cgroup with it when it is killed.
    let process = ProcessSelector { pid: balloon.pid(), ..ProcessSelector::default() };
    let target = Some(Target { kind: Some(target::Kind::Process(process)) });
    let request = SampleRequest { target, interval_ns: 100_000_000 };
    let mut of_process = stage.client.sample(request).await?.into_inner();
    let seen = of_process.message().await?.context("a sample")?;
    ensure!(seen.processes == 1 && seen.oom_known, "{seen:?}");
    fs::write(&go, "")?;
    let started = Instant::now();
    loop {
        let sample = of_process.message().await?.context("a sample")?;
        if sample.processes == 0 && sample.oom_kills >= 2 {
            break;
        }
        ensure!(started.elapsed() < PATIENCE, "{sample:?}");
    }
    loop {
        let sample = samples.message().await?.context("a sample")?;
        // First the stressor, then, with all the memory to itself and still growing, the balloon.
        if sample.oom_kills >= 2 {
            break;
        }
        ensure!(started.elapsed() < PATIENCE, "{sample:?}");
    }
    // Nothing is said to be injected that holds nothing.
    let renewed = || v1::RenewRequest { ids: vec![ID.into()] };
    while stage.client.renew(renewed()).await?.into_inner().gone.is_empty() {
        ensure!(started.elapsed() < PATIENCE, "it is live, without a stressor");
        sleep(Duration::from_millis(20)).await;
    }
    let ended = stage.revert().await?;
    ensure!(ended.reason == "its stressor was killed", "{ended:?}");
    ensure!(close(figure(&ended, "stressor_killed")?, 1.0, 0.0));
    ensure!(figure(&ended, "oom_kills")? >= 1.0);
    ensure!(close(figure(&ended, "memory_held")?, 0.0, 0.0));
    stage.victim.check()
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_agent_holds_nothing_past_its_lease() -> Result<()> {
    let mut stage = Stage::new().await?;
    stage.cgroup.limit_memory(128 * MIB)?;
    let request = stage.request(bytes(48 * MIB));
    let lease_ns = Duration::from_secs(3).as_nanos() as u64;
    stage.client.inject(ArmRequest { lease_ns, ..request }).await?;
    stage.memory_until(|memory| memory > 48 * MIB).await?;
    let agent = nix::unistd::Pid::from_raw(stage.agent.pid().cast_signed());
    nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGSTOP)?;
    let gone = || Ok(stage.others()?.is_empty().then_some(()));
    let ended = wait_for("the end of the stressor", PATIENCE, gone);
    nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGCONT)?;
    ended?;
    stage.memory_until(|memory| memory < 16 * MIB).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_agent_leaves_no_stressor() -> Result<()> {
    for fault in [cpu(0.2), bytes(48 * MIB)] {
        let mut stage = Stage::new().await?;
        stage.inject(fault).await?;
        ensure!(stage.others()?.len() == 1);
        stage.agent.kill()?;
        wait_for("the end of the stressor", Duration::from_secs(5), || {
            Ok(stage.others()?.is_empty().then_some(()))
        })?;
        stage.memory_until(|memory| memory < 16 * MIB).await?;
        stage.agent.restart().await?;
        let mut client = stage.agent.client().await?;
        let listed = client.list(ListRequest {}).await?.into_inner().injections;
        ensure!(listed.len() == 1 && listed[0].state() == State::Reverted, "{listed:?}");
        stage.victim.check()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn stray_stressor_is_found_by_its_token_and_ended() -> Result<()> {
    let mut stage = Stage::new().await?;
    stage.inject(bytes(16 * MIB)).await?;
    let pid = stage.others()?.pop().context("a stressor")?;
    let arguments = procfs::process::Process::new(pid)?.cmdline()?;
    let token = arguments.iter().find(|argument| argument.starts_with("--injection=")).context("a token")?;
    // One of the same injection that the agent knows nothing of, and one of another.
    let (mut same, mut other) = (Stray::start(token)?, Stray::start("--injection=other")?);
    for stray in [&same, &other] {
        let pid = stray.0.id().cast_signed();
        let named =
            || Ok((procfs::process::Process::new(pid)?.stat()?.comm == "squall-stress").then_some(()));
        wait_for("the stray to be up", PATIENCE, named)?;
    }
    stage.revert().await?;
    wait_for("the end of the stray", PATIENCE, || Ok(same.0.try_wait()?))?;
    ensure!(other.0.try_wait()?.is_none(), "another injection's stressor is left alone");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_says_what_would_happen_and_changes_nothing() -> Result<()> {
    let mut stage = Stage::new().await?;
    let unlimited = stage.plan(stage.request(share(0.1, Duration::ZERO))).await?;
    ensure!(
        unlimited.warnings.iter().any(|warning| warning.contains("has no memory limit")),
        "{unlimited:?}"
    );

    stage.cgroup.limit_memory(64 * MIB)?;
    let too_much = stage.plan(stage.request(bytes(80 * MIB))).await?;
    ensure!(too_much.warnings.iter().any(|warning| warning.contains("OOM kill is certain")), "{too_much:?}");
    ensure!(too_much.changes.iter().all(|change| change.contains("undone by ending it")), "{too_much:?}");

    let refused =
        stage.plan(stage.request(share(0.99, Duration::ZERO))).await.expect_err("beyond the limits");
    ensure!(format!("{refused:#}").contains("memory.share"), "{refused:#}");
    let refused = stage.plan(stage.request(bytes(1 << 50))).await.expect_err("beyond the node");
    ensure!(format!("{refused:#}").contains("cannot be held"), "{refused:#}");

    // This very test is in a cgroup with what started the agent.
    let process = ProcessSelector { pid: std::process::id(), ..ProcessSelector::default() };
    let root = Some(Target { kind: Some(target::Kind::Process(process)) });
    let refused = stage.plan(ArmRequest { target: root, ..stage.request(cpu(0.5)) }).await;
    let refused = format!("{:#}", refused.expect_err("everybody would be hurt"));
    ensure!(
        refused.contains("which is protected") && refused.contains("in a cgroup of its own"),
        "{refused}"
    );

    ensure!(
        stage.others()?.is_empty()
            && stage.client.list(ListRequest {}).await?.into_inner().injections.is_empty()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_says_that_both_faults_work_here_and_how() -> Result<()> {
    let mut stage = Stage::new().await?;
    let described = stage.client.describe(v1::DescribeRequest::default()).await?.into_inner();
    let version = if is_v2() { "v2" } else { "v1" };
    for (kind, mechanism) in [("cpu", "cgroup + duty cycle"), ("memory", "cgroup + resident mapping")] {
        let support = described.faults.iter().find(|fault| fault.kind == kind).context(kind)?;
        ensure!(support.available, "{support:?}");
        let how = format!("{version} {mechanism}");
        ensure!(
            support.features.iter().all(|feature| feature.available && feature.mechanism == how),
            "{support:?}"
        );
    }
    Ok(())
}
