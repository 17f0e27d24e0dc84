//! A process that does nothing, in a cgroup of its own, for faults that take hold of a cgroup.

use std::process::Command;

use anyhow::Result;
use squall_lab::{Cgroup, Running, unique};

/// How long it lives where nobody ends it, seconds: longer than a full sweep in a VM.
const LIFE: &str = "43200";

/// A process in a cgroup with a memory limit. Both are gone when it is dropped.
#[derive(Debug)]
pub struct Victim {
    // Dropped first, so that the cgroup is empty.
    process: Running,
    /// Its cgroup.
    pub cgroup: Cgroup,
}

impl Victim {
    /// Starts one. `memory` is the limit of its cgroup, bytes.
    pub fn start(tag: &str, memory: u64) -> Result<Self> {
        let cgroup = Cgroup::new(unique(tag))?;
        cgroup.limit_memory(memory)?;
        let process = Running::start("a victim", &cgroup.wrap(Command::new("sleep").arg(LIFE)))?;
        squall_lab::wait_for("the victim in its cgroup", std::time::Duration::from_secs(10), || {
            let there = cgroup.processes()?.contains(&process.pid().cast_signed());
            Ok(there.then_some(()))
        })?;
        Ok(Self { process, cgroup })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// SIGKILL. Its cgroup stays.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Whether its cgroup has no process but this one.
    pub fn is_alone(&self) -> Result<bool> {
        Ok(self.cgroup.processes()? == [self.pid().cast_signed()])
    }
}
