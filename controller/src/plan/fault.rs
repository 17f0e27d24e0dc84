//! Faults as a plan or a command line asks for them, and as an agent is told.

use std::time::Duration;

use squall_proto::v1;

use super::units::plain;

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

/// A duration for the wire, nanoseconds.
pub(crate) fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
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
pub(super) fn bytes_shown(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let exact = units.iter().find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    exact.map_or_else(|| format!("{bytes}B"), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}
