//! Two sides of a comparison on one wire, in turns: a fault of the agent's, and what netem does when asked for the same.

use std::{fs, net::IpAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use squall_lab::{Probe, Seen, stats};
use squall_proto::v1::{
    ArmRequest, Chance, Corrupt, Delay, Direction, Distribution, Fault, Injection, InterfaceSelector, Loss,
    NetworkFault, Peer, PortRange, Protocol, Rate, Reorder, RevertRequest, State, Target, UpdateRequest,
    agent_client::AgentClient, fault, target,
};
use squall_tests::{Agent, AgentOptions, Lab, unique};
use tonic::transport::Channel;

/// A millisecond in nanoseconds.
pub const MS: u64 = 1_000_000;
/// The port of the probes.
pub const PORT: u16 = 9_999;
const SECOND: u64 = 1_000 * MS;

/// What hurts the wire.
#[derive(Debug, Clone)]
pub enum Side {
    /// Nothing.
    Nothing,
    /// A fault on near0.
    Ours(Box<NetworkFault>),
    /// netem on near0, with these words.
    Netem(String),
}

impl Side {
    /// This fault.
    pub fn ours(fault: NetworkFault) -> Self {
        Self::Ours(Box::new(fault))
    }
}

/// A lab, and an agent for its near side.
pub struct Duel {
    pub lab: Lab,
    pub agent: Agent,
    pub client: AgentClient<Channel>,
    /// Whether this kernel has netem.
    pub netem: bool,
}

impl Duel {
    pub async fn new(tag: &str) -> Result<Self> {
        let lab = Lab::new(tag)?;
        let netem = lab.near.tc("qdisc add dev near0 root netem").is_ok();
        if netem {
            lab.near.tc("qdisc del dev near0 root")?;
        }
        // Neighbours are found now, and stay: no packet of a measurement waits for ARP.
        for (netns, interface) in [(&lab.near, "near0"), (&lab.far, "far0")] {
            netns.inside(|| {
                let stale = format!("/proc/sys/net/ipv4/neigh/{interface}/base_reachable_time_ms");
                fs::write(&stale, "3600000").with_context(|| format!("cannot write {stale}"))
            })?;
        }
        // A stream that lost much must not tell the next one to go slowly.
        for netns in [&lab.near, &lab.far] {
            netns.inside(|| Ok(fs::write("/proc/sys/net/ipv4/tcp_no_metrics_save", "1")?))?;
        }
        lab.near.ping(Lab::FAR, 3, Duration::from_millis(10))?;
        let agent = Agent::start(AgentOptions::default()).await?;
        let client = agent.client().await?;
        Ok(Self { lab, agent, client, netem })
    }

    /// Measures while a side hurts the wire. Ours also says what it did.
    pub async fn during<T>(
        &mut self,
        side: &Side,
        measure: impl FnOnce(&Lab) -> Result<T>,
    ) -> Result<(T, Option<Injection>)> {
        match side {
            Side::Nothing => Ok((measure(&self.lab)?, None)),
            Side::Netem(words) => {
                self.lab.near.tc(&format!("qdisc add dev near0 root netem {words}"))?;
                let measured = measure(&self.lab);
                self.lab.near.tc("qdisc del dev near0 root")?;
                Ok((measured.with_context(|| format!("netem {words}"))?, None))
            }
            Side::Ours(fault) => {
                let injection = self.inject(fault.as_ref().clone()).await?;
                let measured = measure(&self.lab);
                let ended = self.revert(&injection.id).await?;
                Ok((measured.with_context(|| injection.summary.clone())?, Some(ended)))
            }
        }
    }

    /// Sends a probe from near to far while a side hurts the wire.
    pub async fn probe(&mut self, side: &Side, probe: Probe) -> Result<(Seen, Option<Injection>)> {
        self.during(side, |lab| probe.run(&lab.near, &lab.far, Lab::FAR)).await
    }

    pub async fn inject(&mut self, fault: NetworkFault) -> Result<Injection> {
        let netns = self.lab.near.path().display().to_string();
        let selector = InterfaceSelector { name: "near0".into(), netns };
        let request = ArmRequest {
            id: unique("injection"),
            target: Some(Target { kind: Some(target::Kind::Interface(selector)) }),
            fault: Some(Fault { kind: Some(fault::Kind::Network(fault)) }),
            duration_ns: 240 * SECOND,
            lease_ns: 240 * SECOND,
            dry_run: false,
            only: Vec::new(),
        };
        let made = self.client.inject(request).await?.into_inner().injections;
        let [injection] = <[Injection; 1]>::try_from(made).ok().context("not one injection")?;
        ensure!(injection.state() == State::Active, "{injection:?}");
        Ok(injection)
    }

    pub async fn update(&mut self, id: &str, fault: NetworkFault) -> Result<()> {
        let fault = Some(Fault { kind: Some(fault::Kind::Network(fault)) });
        self.client.update(UpdateRequest { id: id.into(), fault }).await?;
        Ok(())
    }

    /// Ends an injection, and says what it did.
    pub async fn revert(&mut self, id: &str) -> Result<Injection> {
        let request = RevertRequest { ids: vec![id.into()], all: false };
        let ended = self.client.revert(request).await?.into_inner().injections;
        let [injection] = <[Injection; 1]>::try_from(ended).ok().context("not one injection")?;
        ensure!(injection.state() == State::Reverted, "{injection:?}\n{}", self.agent.log());
        Ok(injection)
    }
}

/// What an injection counted; 0 where it does not have the figure.
pub fn figure(injection: Option<&Injection>, name: &str) -> u64 {
    let figures = injection.and_then(|injection| injection.effect.as_ref()).map(|effect| &effect.figures);
    let figure = figures.into_iter().flatten().find(|figure| figure.name == name);
    figure.map_or(0, |figure| figure.value as u64)
}

/// A fault of everything that leaves near0.
pub fn leaving() -> NetworkFault {
    NetworkFault { direction: Direction::Egress.into(), ..NetworkFault::default() }
}

/// The same fault, of the probe's packets only.
pub fn of_the_probe(fault: NetworkFault) -> NetworkFault {
    of_port(fault, PORT)
}

/// The same fault, of UDP packets to this port only.
pub fn of_port(fault: NetworkFault, port: u16) -> NetworkFault {
    let port = u32::from(port);
    let peer = Peer {
        ports: vec![PortRange { first: port, last: port }],
        protocol: Protocol::Udp.into(),
        ..Peer::default()
    };
    NetworkFault { peers: vec![peer], ..fault }
}

pub fn delay(latency_ms: u64) -> NetworkFault {
    let delay = Delay { latency_ns: latency_ms * MS, ..Delay::default() };
    NetworkFault { delay: Some(delay), ..leaving() }
}

pub fn jitter(latency_ms: u64, jitter_ms: u64, distribution: Distribution) -> NetworkFault {
    let delay = Delay {
        latency_ns: latency_ms * MS,
        jitter_ns: jitter_ms * MS,
        distribution: distribution.into(),
        ..Delay::default()
    };
    NetworkFault { delay: Some(delay), ..leaving() }
}

pub fn loss(loss: Loss) -> NetworkFault {
    NetworkFault { loss: Some(loss), ..leaving() }
}

pub fn duplicate(ratio: f64) -> NetworkFault {
    NetworkFault { duplicate: Some(Chance { ratio, correlation: 0.0 }), ..leaving() }
}

pub fn corrupt(ratio: f64, silent: bool) -> NetworkFault {
    let corrupt = Corrupt { chance: Some(Chance { ratio, correlation: 0.0 }), silent };
    NetworkFault { corrupt: Some(corrupt), ..leaving() }
}

pub fn reorder(latency_ms: u64, ratio: f64, gap: u64) -> NetworkFault {
    let reorder = Reorder { chance: Some(Chance { ratio, correlation: 0.0 }), gap };
    NetworkFault { reorder: Some(reorder), ..delay(latency_ms) }
}

pub fn rate(rate: Rate) -> NetworkFault {
    NetworkFault { rate: Some(rate), ..leaving() }
}

/// Those of a probe's packets that were sent at once, of a fault that delays by this much: which, and how often they
/// could have been.
pub fn at_once(seen: &Seen, latency_ms: f64, gap: u64) -> (Vec<u32>, u64) {
    let delays = seen.delays().into_iter();
    let early: Vec<u32> =
        delays.filter(|(_, delay)| *delay < latency_ms / 2.0).map(|(number, _)| number).collect();
    // After each come gap - 1 that cannot be early, and so it is at the start.
    let chances = seen.sent.len() as u64 - (early.len() as u64 + 1) * (gap - 1);
    (early, chances)
}

/// Bytes on the wire of a probe's packet: Ethernet, IPv4 and UDP headers, payload.
pub fn wire_bytes(probe: Probe) -> u64 {
    14 + 20 + 8 + probe.size as u64
}

/// Median, and how far the 99th percentile is above it.
pub fn shape(delays: &[f64]) -> (f64, f64) {
    let median = stats::quantile(delays, 0.5);
    (median, stats::quantile(delays, 0.99) - median)
}

/// The far side, where the probes go.
pub const FAR: IpAddr = Lab::FAR;
