//! Two sides of a comparison on one wire, in turns: a fault of the agent's, and what netem does when asked for the same.

use std::{
    fs,
    net::IpAddr,
    ops::{Deref, DerefMut},
    time::Duration,
};

use anyhow::{Context, Result};
use squall_lab::{Probe, Seen, stats};
use squall_proto::v1::{
    Chance, Corrupt, Delay, Direction, Distribution, Injection, Loss, NetworkFault, Peer, PortRange,
    Protocol, Rate, Reorder,
};
pub use squall_tests::MS;
use squall_tests::{Bench, Lab};

/// The port of the probes.
pub const PORT: u16 = 9_999;

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

/// A lab with an agent that hurts its near side, as netem does in its turn.
pub struct Duel {
    bench: Bench,
    /// Whether this kernel has netem.
    pub netem: bool,
}

impl Deref for Duel {
    type Target = Bench;

    fn deref(&self) -> &Bench {
        &self.bench
    }
}

impl DerefMut for Duel {
    fn deref_mut(&mut self) -> &mut Bench {
        &mut self.bench
    }
}

impl Duel {
    pub async fn new(tag: &str) -> Result<Self> {
        let bench = Bench::new(tag).await?;
        let lab = &bench.lab;
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
        Ok(Self { bench, netem })
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
}

/// What an injection counted; 0 where it does not have the figure.
pub fn figure(injection: Option<&Injection>, name: &str) -> u64 {
    injection.map_or(0, |injection| squall_tests::figure(injection, name) as u64)
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
