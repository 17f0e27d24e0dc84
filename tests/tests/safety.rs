//! Whatever happens to the agent, every fault ends, and the host is as it was.

use std::{
    fs,
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use hickory_proto::{op::ResponseCode, rr::RecordType};
use squall_proto::v1::{
    ArmRequest, Chance, Corrupt, CpuFault, Delay, Direction, Dns, DnsAnswer, Fault, InterfaceSelector,
    ListRequest, Loss, MemoryFault, NetworkFault, ProcessSelector, Rate, Refusal, RenewRequest, State,
    Target, fault, memory_fault, target,
};
use squall_tests::{
    Agent, AgentOptions, HostState, Lab, NameServer, NetState, Pair, Running, Sockets, Victim, ask, bin_dir,
    cidr, interface, need_root, wait_for,
};
use tokio::time::sleep;

/// Long enough to see a fault, short enough to wait for its end.
const LEASE: Duration = Duration::from_secs(4);
/// Far beyond every test: nothing here may end by its deadline.
const DURATION: Duration = Duration::from_mins(10);
/// How late a lease may end: timers, and a VM without KVM.
const SLACK: Duration = Duration::from_secs(3);
const ID: &str = "safety";
const MIB: u64 = 1 << 20;

/// A place, a fault for it, and how a user tells whether it is on.
trait Case {
    fn target(&self) -> Target;
    fn fault(&self) -> Fault;
    /// Fails unless the fault is felt.
    fn hurts(&self) -> Result<()>;
    /// Fails unless nothing of it is felt.
    fn is_well(&self) -> Result<()>;
    /// What is left of it in its place, one line each.
    fn remains(&self) -> Result<Vec<String>>;
}

struct Network {
    lab: Lab,
    before: NetState,
    fault: NetworkFault,
    /// Bounds of the share of pings that stay unanswered, and of the median round trip in milliseconds.
    loss: (f64, f64),
    rtt: (f64, f64),
}

impl Network {
    fn new(fault: NetworkFault, loss: (f64, f64), rtt: (f64, f64)) -> Result<Self> {
        let lab = Lab::new("safety")?;
        let before = lab.near.state()?;
        Ok(Self { lab, before, fault, loss, rtt })
    }

    fn delay() -> Result<Self> {
        let delay = Some(Delay { latency_ns: 100_000_000, ..Delay::default() });
        let fault = NetworkFault { direction: Direction::Egress.into(), delay, ..NetworkFault::default() };
        Self::new(fault, (0.0, 0.0), (95.0, 200.0))
    }

    fn loss() -> Result<Self> {
        let fault =
            NetworkFault { loss: Some(Loss { ratio: 0.5, ..Loss::default() }), ..NetworkFault::default() };
        // Both ways: a quarter of the pings is answered.
        Self::new(fault, (0.4, 0.95), (0.0, 50.0))
    }

    fn partition() -> Result<Self> {
        Self::new(NetworkFault { partition: true, ..NetworkFault::default() }, (1.0, 1.0), (0.0, 0.0))
    }

    fn refusal() -> Result<Self> {
        let fault = NetworkFault { refusal: Refusal::Answer.into(), ..NetworkFault::default() };
        Self::new(fault, (1.0, 1.0), (0.0, 0.0))
    }

    /// Every packet has a wrong checksum.
    fn corruption() -> Result<Self> {
        let corrupt =
            Some(Corrupt { chance: Some(Chance { ratio: 1.0, ..Chance::default() }), silent: false });
        Self::new(NetworkFault { corrupt, ..NetworkFault::default() }, (1.0, 1.0), (0.0, 0.0))
    }

    /// A ping is 98 bytes, so 39 ms, and the next one waits for it. ping does not wait for the last of them.
    fn rate() -> Result<Self> {
        let rate = Some(Rate { bits_per_second: 20_000, ..Rate::default() });
        let fault = NetworkFault { direction: Direction::Egress.into(), rate, ..NetworkFault::default() };
        Self::new(fault, (0.0, 0.5), (39.0, 2000.0))
    }
}

impl Case for Network {
    fn target(&self) -> Target {
        let netns = self.lab.near.name().to_owned();
        Target { kind: Some(target::Kind::Interface(InterfaceSelector { name: "near0".into(), netns })) }
    }

    fn fault(&self) -> Fault {
        Fault { kind: Some(fault::Kind::Network(self.fault.clone())) }
    }

    fn hurts(&self) -> Result<()> {
        let ping = self.lab.near.ping(Lab::FAR, 40, Duration::from_millis(10))?;
        let within = |value: f64, (low, high): (f64, f64)| low <= value && value <= high;
        ensure!(within(ping.loss(), self.loss), "loss {} is not in {:?}: {ping:?}", ping.loss(), self.loss);
        if !ping.rtts.is_empty() {
            ensure!(within(ping.median()?, self.rtt), "RTT {} is not in {:?}", ping.median()?, self.rtt);
        }
        Ok(())
    }

    fn is_well(&self) -> Result<()> {
        for address in [Lab::FAR, Lab::FAR_V6] {
            let ping = self.lab.near.ping(address, 20, Duration::from_millis(10))?;
            ensure!(ping.loss() == 0.0 && ping.median()? < 50.0, "{address}: {ping:?}");
        }
        Ok(())
    }

    fn remains(&self) -> Result<Vec<String>> {
        Ok(self.before.changes(&self.lab.near.state()?))
    }
}

/// A delay on loopback, which takes settings of the interface.
struct Loopback {
    lab: Lab,
    before: (NetState, Vec<String>),
}

impl Loopback {
    fn new() -> Result<Self> {
        let lab = Lab::new("safety")?;
        let before = Self::state(&lab)?;
        Ok(Self { lab, before })
    }

    fn state(lab: &Lab) -> Result<(NetState, Vec<String>)> {
        let settings = lab.near.inside(|| {
            let names = ["route_localnet", "accept_local"].into_iter();
            let read = |name| {
                Ok(format!("{name} {}", fs::read_to_string(format!("/proc/sys/net/ipv4/conf/lo/{name}"))?))
            };
            names.map(read).collect()
        })?;
        Ok((lab.near.state()?, settings))
    }

    fn rtts(&self) -> Result<[f64; 2]> {
        Ok([self.lab.near.rtt_with("127.0.0.1")?, self.lab.near.rtt_with("::1")?])
    }
}

impl Case for Loopback {
    fn target(&self) -> Target {
        interface("lo", self.lab.near.name())
    }

    fn fault(&self) -> Fault {
        let delay = Some(Delay { latency_ns: 50_000_000, ..Delay::default() });
        let peers = vec![cidr("127.0.0.0/8"), cidr("::1/128")];
        let fault =
            NetworkFault { peers, direction: Direction::Egress.into(), delay, ..NetworkFault::default() };
        Fault { kind: Some(fault::Kind::Network(fault)) }
    }

    fn hurts(&self) -> Result<()> {
        let rtts = self.rtts()?;
        ensure!(rtts.iter().all(|rtt| (99.0..200.0).contains(rtt)), "round trips of {rtts:?} ms");
        Ok(())
    }

    fn is_well(&self) -> Result<()> {
        let rtts = self.rtts()?;
        ensure!(rtts.iter().all(|rtt| *rtt < 30.0), "round trips of {rtts:?} ms");
        Ok(())
    }

    fn remains(&self) -> Result<Vec<String>> {
        let (state, settings) = Self::state(&self.lab)?;
        let mut remains = self.before.0.changes(&state);
        remains.extend(settings.into_iter().filter(|setting| !self.before.1.contains(setting)));
        Ok(remains)
    }
}

/// What ends a conversation: every TCP connection is reset, or no name exists.
struct Conversation {
    lab: Lab,
    before: NetState,
    listener: TcpListener,
    _names: NameServer,
    dns: bool,
}

impl Conversation {
    fn new(dns: bool) -> Result<Self> {
        let lab = Lab::new("safety")?;
        let before = lab.near.state()?;
        let listener = lab.far.listen(7000)?;
        let names = NameServer::start(&lab.far, Lab::FAR)?;
        names.set("shop.test", &[Lab::FAR]);
        Ok(Self { lab, before, listener, _names: names, dns })
    }

    /// Connections are reset.
    fn reset() -> Result<Self> {
        Self::new(false)
    }

    /// Names do not exist.
    fn dns() -> Result<Self> {
        Self::new(true)
    }

    fn code(&self) -> Result<ResponseCode> {
        let (answer, _) = ask(&self.lab.near, Lab::FAR, "shop.test", RecordType::A, Duration::from_secs(5))?;
        Ok(answer.context("no answer")?.code)
    }
}

impl Case for Conversation {
    fn target(&self) -> Target {
        interface("near0", self.lab.near.name())
    }

    fn fault(&self) -> Fault {
        let dns = Dns { answer: DnsAnswer::Nxdomain.into(), ..Dns::default() };
        let fault =
            NetworkFault { reset: !self.dns, dns: self.dns.then_some(dns), ..NetworkFault::default() };
        Fault { kind: Some(fault::Kind::Network(fault)) }
    }

    fn hurts(&self) -> Result<()> {
        if self.dns {
            let code = self.code()?;
            ensure!(code == ResponseCode::NXDomain, "{code}");
            return Ok(());
        }
        let to = SocketAddr::new(Lab::FAR, self.listener.local_addr()?.port());
        let how = self.lab.near.connect(to, Duration::from_secs(5))?.err().context("it connects")?;
        ensure!(how.kind() == ErrorKind::ConnectionRefused, "{how}");
        Ok(())
    }

    fn is_well(&self) -> Result<()> {
        let code = self.code()?;
        ensure!(code == ResponseCode::NoError, "{code}");
        Pair::new(&self.lab.near, &self.listener, Lab::FAR)?.exchange()?;
        Ok(())
    }

    fn remains(&self) -> Result<Vec<String>> {
        Ok(self.before.changes(&self.lab.near.state()?))
    }
}

struct Cpu(Victim);

impl Case for Cpu {
    fn target(&self) -> Target {
        process(&self.0)
    }

    fn fault(&self) -> Fault {
        Fault { kind: Some(fault::Kind::Cpu(CpuFault { load: 0.5, workers: 1 })) }
    }

    fn hurts(&self) -> Result<()> {
        let cpus = self.0.cgroup.cpus(Duration::from_secs(1))?;
        ensure!(cpus > 0.2, "the cgroup uses {cpus} CPUs");
        Ok(())
    }

    fn is_well(&self) -> Result<()> {
        let cpus = self.0.cgroup.cpus(Duration::from_millis(500))?;
        ensure!(cpus < 0.05, "the cgroup uses {cpus} CPUs");
        ensure!(self.0.is_alone()?, "somebody else is in the cgroup");
        Ok(())
    }

    fn remains(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

struct Memory(Victim);

impl Case for Memory {
    fn target(&self) -> Target {
        process(&self.0)
    }

    fn fault(&self) -> Fault {
        let size = Some(memory_fault::Size::Bytes(64 * MIB));
        Fault { kind: Some(fault::Kind::Memory(MemoryFault { size, ramp_ns: 0 })) }
    }

    fn hurts(&self) -> Result<()> {
        let full = || Ok((self.0.cgroup.memory()? > 60 * MIB).then_some(()));
        wait_for("64 MiB in the cgroup", LEASE * 3 / 4, full)
    }

    fn is_well(&self) -> Result<()> {
        let charged = self.0.cgroup.memory()?;
        ensure!(charged < 16 * MIB, "{charged} bytes are still charged to the cgroup");
        ensure!(self.0.is_alone()?, "somebody else is in the cgroup");
        Ok(())
    }

    fn remains(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

fn process(victim: &Victim) -> Target {
    let selector = ProcessSelector { pid: victim.pid(), ..ProcessSelector::default() };
    Target { kind: Some(target::Kind::Process(selector)) }
}

/// Fails unless the host is as it was, at the latest a moment after the agent's end.
fn is_as(before: &HostState) -> Result<()> {
    let mut changes = Vec::new();
    let same = wait_for("the host to be as before", Duration::from_secs(10), || {
        changes = before.changes(&HostState::capture(&bin_dir())?);
        Ok(changes.is_empty().then_some(()))
    });
    same.with_context(|| format!("{changes:?}"))
}

async fn inject(agent: &Agent, case: &impl Case) -> Result<()> {
    let request = ArmRequest {
        id: ID.into(),
        target: Some(case.target()),
        fault: Some(case.fault()),
        duration_ns: DURATION.as_nanos() as u64,
        lease_ns: LEASE.as_nanos() as u64,
        dry_run: false,
        only: Vec::new(),
    };
    let injections = agent.client().await?.inject(request).await?.into_inner().injections;
    ensure!(injections.len() == 1, "one injection was asked for: {injections:?}");
    ensure!(injections[0].state() == State::Active, "it is not active: {:?}", injections[0]);
    Ok(())
}

/// SIGKILL while the fault is on: what the lease does not end at once, the next start clears.
async fn killed(case: impl Case) -> Result<()> {
    let before = HostState::capture(&bin_dir())?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    case.is_well().context("before the fault")?;
    inject(&agent, &case).await?;
    case.hurts().context("during the fault")?;
    agent.kill()?;
    sleep(LEASE + SLACK).await;
    case.is_well().context("after the lease, with the agent dead")?;
    agent.restart().await?;
    wait_for("the next start to clear the rest", Duration::from_secs(10), || {
        Ok(case.remains()?.is_empty().then_some(()))
    })
    .with_context(|| format!("left: {:?}\n{}", case.remains(), agent.log()))?;
    case.is_well().context("after the next start")?;
    let listed = agent.client().await?.list(ListRequest {}).await?.into_inner().injections;
    ensure!(listed.iter().all(|i| i.state() == State::Reverted), "something is still there: {listed:?}");
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    is_as(&before)?;
    Ok(())
}

/// SIGTERM while the fault is on: when the agent is gone, so is the fault with all that it changed.
async fn terminated(case: impl Case) -> Result<()> {
    let before = HostState::capture(&bin_dir())?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    inject(&agent, &case).await?;
    case.hurts().context("during the fault")?;
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    assert_eq!(case.remains()?, [""; 0]);
    case.is_well().context("after the drain")?;
    is_as(&before)?;
    Ok(())
}

/// Nobody renews the lease: the fault ends, and the agent says why.
async fn abandoned(case: impl Case) -> Result<()> {
    let mut agent = Agent::start(AgentOptions::default()).await?;
    inject(&agent, &case).await?;
    case.hurts().context("during the fault")?;
    sleep(LEASE + SLACK).await;
    case.is_well().context("after the lease")?;
    assert_eq!(case.remains()?, [""; 0]);
    let listed = agent.client().await?.list(ListRequest {}).await?.into_inner().injections;
    ensure!(listed.len() == 1 && listed[0].state() == State::Reverted, "{listed:?}");
    ensure!(listed[0].reason.contains("lease"), "the reason does not name the lease: {:?}", listed[0].reason);
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    Ok(())
}

#[tokio::test]
async fn sigkill_during_delay() -> Result<()> {
    killed(Network::delay()?).await
}

#[tokio::test]
async fn sigkill_during_loss() -> Result<()> {
    killed(Network::loss()?).await
}

#[tokio::test]
async fn sigkill_during_partition() -> Result<()> {
    killed(Network::partition()?).await
}

#[tokio::test]
async fn sigkill_during_refusal() -> Result<()> {
    killed(Network::refusal()?).await
}

#[tokio::test]
async fn sigkill_during_corruption() -> Result<()> {
    killed(Network::corruption()?).await
}

#[tokio::test]
async fn sigkill_during_a_rate() -> Result<()> {
    killed(Network::rate()?).await
}

#[tokio::test]
async fn sigkill_during_delay_on_loopback() -> Result<()> {
    killed(Loopback::new()?).await
}

#[tokio::test]
async fn sigkill_during_resets() -> Result<()> {
    killed(Conversation::reset()?).await
}

#[tokio::test]
async fn sigkill_during_wrong_dns_answers() -> Result<()> {
    killed(Conversation::dns()?).await
}

#[tokio::test]
async fn sigkill_during_cpu_load() -> Result<()> {
    need_root()?;
    killed(Cpu(Victim::start("safety", 256 * MIB)?)).await
}

#[tokio::test]
async fn sigkill_during_memory_load() -> Result<()> {
    need_root()?;
    killed(Memory(Victim::start("safety", 256 * MIB)?)).await
}

#[tokio::test]
async fn sigterm_during_delay() -> Result<()> {
    terminated(Network::delay()?).await
}

#[tokio::test]
async fn sigterm_during_partition() -> Result<()> {
    terminated(Network::partition()?).await
}

#[tokio::test]
async fn sigterm_during_refusal() -> Result<()> {
    terminated(Network::refusal()?).await
}

#[tokio::test]
async fn sigterm_during_a_rate() -> Result<()> {
    terminated(Network::rate()?).await
}

#[tokio::test]
async fn sigterm_during_delay_on_loopback() -> Result<()> {
    terminated(Loopback::new()?).await
}

#[tokio::test]
async fn sigterm_during_wrong_dns_answers() -> Result<()> {
    terminated(Conversation::dns()?).await
}

#[tokio::test]
async fn sigterm_during_cpu_load() -> Result<()> {
    need_root()?;
    terminated(Cpu(Victim::start("safety", 256 * MIB)?)).await
}

#[tokio::test]
async fn sigterm_during_memory_load() -> Result<()> {
    need_root()?;
    terminated(Memory(Victim::start("safety", 256 * MIB)?)).await
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_delay() -> Result<()> {
    abandoned(Network::delay()?).await
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_loss() -> Result<()> {
    abandoned(Network::loss()?).await
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_corruption() -> Result<()> {
    abandoned(Network::corruption()?).await
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_delay_on_loopback() -> Result<()> {
    abandoned(Loopback::new()?).await
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_resets() -> Result<()> {
    abandoned(Conversation::reset()?).await
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_cpu_load() -> Result<()> {
    need_root()?;
    abandoned(Cpu(Victim::start("safety", 256 * MIB)?)).await
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_memory_load() -> Result<()> {
    need_root()?;
    abandoned(Memory(Victim::start("safety", 256 * MIB)?)).await
}

#[tokio::test]
async fn a_lease_that_is_renewed_goes_on() -> Result<()> {
    let case = Network::partition()?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    inject(&agent, &case).await?;
    let mut client = agent.client().await?;
    for _ in 0..6 {
        sleep(LEASE / 3).await;
        let renewed = client.renew(RenewRequest { ids: vec![ID.into()] }).await?.into_inner();
        ensure!(renewed.gone.is_empty(), "{renewed:?}");
    }
    case.hurts().context("two leases later")?;
    let status = agent.kill()?;
    ensure!(Running::was(status, nix::sys::signal::Signal::SIGKILL), "{status}");
    sleep(LEASE + SLACK).await;
    case.is_well().context("after the last lease, with the agent dead")?;
    agent.restart().await?;
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    assert_eq!(case.remains()?, [""; 0]);
    Ok(())
}

/// Whoever has no descriptors left can revert nothing.
#[tokio::test]
async fn agent_takes_all_the_descriptors_that_it_may_have() -> Result<()> {
    need_root()?;
    let under = ["prlimit", "--nofile=64:4096"];
    let agent = Agent::start(AgentOptions { under: &under, ..AgentOptions::default() }).await?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", agent.pid()))?;
    let open = limits.lines().find(|line| line.starts_with("Max open files")).context("no such limit")?;
    ensure!(open.split_whitespace().filter(|word| *word == "4096").count() == 2, "{open}");
    Ok(())
}
