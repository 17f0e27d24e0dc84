//! Faults as a plan or a command line asks for them, and as an agent is told.

use std::{fmt::Write as _, time::Duration};

use squall_proto::v1;

use super::{Address, Protocol, units::plain};

/// What a network fault does, and to which packets.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Network {
    /// Far sides, each with the name that a person gave it.
    pub(crate) peers: Vec<(String, Address)>,
    pub(crate) direction: Direction,
    /// 0 to 1.
    pub(crate) share: Option<f64>,
    /// Latency and jitter.
    pub(crate) delay: Option<(Duration, Duration)>,
    /// 0 to 1.
    pub(crate) loss: Option<f64>,
    pub(crate) partition: bool,
    pub(crate) interface: Option<String>,
    pub(crate) seed: Option<u64>,
}

/// Which packets of a target are hurt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Direction {
    /// Leaving and arriving.
    #[default]
    Both,
    /// Leaving the target.
    Egress,
    /// Arriving at the target.
    Ingress,
}

/// A CPU load.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cpu {
    /// 0 to 1 of the CPUs the target may use.
    pub(crate) load: f64,
    pub(crate) workers: Option<u32>,
}

/// A memory load.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Memory {
    pub(crate) size: Size,
    pub(crate) ramp: Duration,
}

impl super::Fault {
    /// Its kind, as in a plan: `network`.
    pub(crate) fn kind(&self) -> &'static str {
        match self.proto.kind {
            Some(v1::fault::Kind::Network(_)) => "network",
            Some(v1::fault::Kind::Cpu(_)) => "cpu",
            Some(v1::fault::Kind::Memory(_)) => "memory",
            None => "",
        }
    }
}

/// How much memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Size {
    Bytes(u64),
    /// 0 to 1 of the cgroup's limit.
    Share(f64),
}

/// A duration as people write it: `2s`, `300ms`.
pub(crate) fn time(d: Duration) -> String {
    humantime::format_duration(d).to_string()
}

/// A share as people write it: `5%`.
pub(crate) fn percent(ratio: f64) -> String {
    format!("{}%", plain(ratio * 100.0))
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

impl Network {
    /// What is wrong with it as a whole, and what to write.
    pub(crate) fn check(&self) -> Result<(), super::units::Wrong> {
        if self.delay.is_none() && self.loss.is_none() && !self.partition {
            return Err(("this does nothing".into(), "add delay, loss or partition: true".into()));
        }
        if self.partition && (self.delay.is_some() || self.loss.is_some()) {
            let fix = "a partition drops every packet; remove delay and loss, or the partition";
            return Err(("a partition with delay or loss".into(), fix.into()));
        }
        Ok(())
    }

    pub(crate) fn proto(&self) -> v1::Fault {
        let network = v1::NetworkFault {
            direction: match self.direction {
                Direction::Both => v1::Direction::Both,
                Direction::Egress => v1::Direction::Egress,
                Direction::Ingress => v1::Direction::Ingress,
            }
            .into(),
            peers: self.peers.iter().map(|(_, address)| address.proto()).collect(),
            share: self.share.unwrap_or(1.0),
            delay: self
                .delay
                .map(|(latency, jitter)| v1::Delay { latency_ns: nanos(latency), jitter_ns: nanos(jitter) }),
            loss: self.loss.map(|ratio| v1::Loss { ratio }),
            partition: self.partition,
            seed: self.seed.unwrap_or(0),
            interface: self.interface.clone().unwrap_or_default(),
        };
        v1::Fault { kind: Some(v1::fault::Kind::Network(network)) }
    }

    /// `recommender → redis: delay 2s ±300ms, loss 5%`.
    pub(crate) fn summary(&self, on: &str) -> String {
        let mut does = Vec::new();
        if let Some((latency, jitter)) = self.delay {
            let jitter = if jitter.is_zero() { String::new() } else { format!(" ±{}", time(jitter)) };
            does.push(format!("delay {}{jitter}", time(latency)));
        }
        does.extend(self.loss.map(|loss| format!("loss {}", percent(loss))));
        if self.partition {
            does.push("partition".into());
        }
        does.extend(self.share.map(|share| format!("on {} of packets", percent(share))));
        let peers: Vec<&str> = self.peers.iter().map(|(name, _)| name.as_str()).collect();
        let peers = if peers.is_empty() { "everyone".to_owned() } else { peers.join(", ") };
        let arrow = match self.direction {
            Direction::Both => "↔",
            Direction::Egress => "→",
            Direction::Ingress => "←",
        };
        let mut text = format!("network {on} {arrow} {peers}: {}", does.join(", "));
        if let Some(interface) = &self.interface {
            let _ = write!(text, " at {interface}");
        }
        text
    }
}

impl Cpu {
    pub(crate) fn proto(&self) -> v1::Fault {
        let cpu = v1::CpuFault { load: self.load, workers: self.workers.unwrap_or(0) };
        v1::Fault { kind: Some(v1::fault::Kind::Cpu(cpu)) }
    }

    pub(crate) fn summary(&self, on: &str) -> String {
        let workers = self.workers.map(|n| format!(" by {n} workers")).unwrap_or_default();
        format!("cpu {on}: load {}{workers}", percent(self.load))
    }
}

impl Memory {
    pub(crate) fn proto(&self) -> v1::Fault {
        let size = match self.size {
            Size::Bytes(bytes) => v1::memory_fault::Size::Bytes(bytes),
            Size::Share(share) => v1::memory_fault::Size::Share(share),
        };
        let memory = v1::MemoryFault { size: Some(size), ramp_ns: nanos(self.ramp) };
        v1::Fault { kind: Some(v1::fault::Kind::Memory(memory)) }
    }

    pub(crate) fn summary(&self, on: &str) -> String {
        let size = match self.size {
            Size::Bytes(bytes) => bytes_shown(bytes),
            Size::Share(share) => format!("{} of the limit", percent(share)),
        };
        let ramp = if self.ramp.is_zero() { String::new() } else { format!(", ramp {}", time(self.ramp)) };
        format!("memory {on}: {size}{ramp}")
    }
}

/// `64MiB`, or plain bytes where that would not be exact.
fn bytes_shown(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let exact = units.iter().find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    exact.map_or_else(|| format!("{bytes}B"), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

impl Address {
    pub(crate) fn proto(&self) -> v1::Peer {
        let ranges = |ports: &[(u16, u16)]| {
            ports
                .iter()
                .map(|&(first, last)| v1::PortRange { first: first.into(), last: last.into() })
                .collect()
        };
        v1::Peer {
            cidrs: self.cidrs.clone(),
            ports: ranges(&self.ports),
            local_ports: ranges(&self.local_ports),
            protocol: match self.protocol {
                Protocol::Any => v1::Protocol::Unspecified,
                Protocol::Tcp => v1::Protocol::Tcp,
                Protocol::Udp => v1::Protocol::Udp,
                Protocol::Icmp => v1::Protocol::Icmp,
            }
            .into(),
        }
    }
}
