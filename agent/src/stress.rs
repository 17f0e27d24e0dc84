//! The stressor: this same program, started again as `squall-stress`, in the target's cgroup.
//!
//! It lives by orders on its standard input, one line of JSON each, and answers each with one line. It ends at once
//! when that input ends, because then the agent is dead, and by itself at the time it was last given, also when the
//! agent is stopped and says nothing. Neither depends on `PR_SET_PDEATHSIG`, which fires when the *thread* that
//! started the child ends `prctl(2)`.
//!
//! Its first act is to close inherited descriptors and to move itself into the cgroup, before it allocates anything
//! that would be charged elsewhere. Its `oom_score_adj` does not come from the agent, which may be protected:
//!
//! - a memory stressor gets 1000, so that the kernel takes it before the service and before the node. The kill is
//!   counted in the target's cgroup all the same, so the `oom` gate sees it;
//! - a CPU stressor gets 0 like any process: killing it would free nothing.

mod burn;
mod child;
mod handle;
mod hold;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::{
    child::main,
    handle::{Stressor, end, end_all, orphans},
};
use crate::{host::cgroup::Memory, time::BootTime};

/// Arguments of the stressor. What it does comes as orders.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What it is for: shown by ps
    kind: Kind,
    /// Token of its injection, by which strays are found
    #[arg(long)]
    injection: String,
    /// Pid of its agent: one with another parent has lost it
    #[arg(long)]
    agent: Option<i32>,
    /// Directories of the cgroups to move into
    #[arg(long)]
    cgroup: Vec<PathBuf>,
}

/// What a stressor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Burns CPU time.
    Cpu,
    /// Holds memory.
    Memory,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
        }
    }

    fn oom_score_adj(self) -> i16 {
        match self {
            Self::Cpu => 0,
            Self::Memory => 1000,
        }
    }
}

/// One line to the stressor. The answer to it carries the same number.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    number: u64,
    #[serde(flatten)]
    what: What,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
enum What {
    /// Start, or change to, this work.
    Work { work: Work, until: BootTime },
    /// End by yourself at this time.
    Until { until: BootTime },
    /// Only answer.
    Report,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Work {
    /// Burn CPU time.
    Cpu {
        /// CPUs' worth of time, over all workers.
        usage: f64,
        /// Threads.
        workers: usize,
        /// CPUs to run on; none for any.
        cpus: Vec<usize>,
    },
    /// Hold memory.
    Memory {
        /// How much.
        size: Size,
        /// Time to get there, nanoseconds.
        ramp_ns: u64,
        /// Bytes of the node's available memory that are never taken.
        spare: u64,
    },
}

/// How much memory to hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Size {
    /// So many bytes.
    Held(u64),
    /// Whatever brings the usage of this place up to so many bytes, once; then what that took is held.
    Usage(Gauge, u64),
}

/// Where memory usage is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gauge {
    /// The working set of a cgroup.
    Cgroup(Memory),
    /// What is not available on the node.
    Node,
}

impl Gauge {
    /// Bytes in use now.
    pub fn read(&self) -> Option<u64> {
        match self {
            Self::Cgroup(memory) => memory.working_set(),
            Self::Node => {
                let (total, available) = crate::host::cgroup::node_memory().ok()?;
                Some(total - available)
            }
        }
    }
}

/// One line from the stressor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Of the order that it answers.
    number: u64,
    /// Nanoseconds since its first work.
    pub elapsed_ns: u64,
    /// CPU time it used in that time, nanoseconds.
    pub cpu_ns: u64,
    /// Bytes it holds resident.
    pub held: u64,
    /// What went wrong.
    pub error: Option<String>,
}
