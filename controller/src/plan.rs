//! A plan, parsed and checked. Past this module nothing in it can be invalid.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use squall_proto::v1;

use crate::{replicas::Take, report::figure::gate_limit};

/// A problem of a plan that only a look at the hosts shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blame {
    /// The field it is about: `targets.recommender`, `rounds[0].faults[1]`.
    pub(crate) path: String,
    /// What is wrong.
    pub(crate) message: String,
    /// What to do.
    pub(crate) fix: String,
}

/// Such problems as [`parse`] would tell its own: with line, column and a caret. `text` is a plan that parses.
#[must_use]
pub(crate) fn blame(file: &Path, text: &str, problems: &[Blame]) -> Invalid {
    let source = tree::Source::new(file, text);
    match source.parse() {
        Ok(tree) => {
            let root = source.root(&tree);
            for Blame { path, message, fix } in problems {
                root.find(path).problem(message, fix);
            }
            source.invalid()
        }
        Err(invalid) => invalid,
    }
}

mod cover;
pub(crate) mod fault;
mod limits;
pub(crate) mod network;
mod read;
mod tree;
pub(crate) mod units;

pub(crate) use self::{
    cover::warnings,
    limits::{Abort, Beyond, Limits, Touched},
    network::{Address, Protocol},
    tree::Invalid,
};

/// Parses and checks the text of a plan.
///
/// # Errors
///
/// Everything that is wrong with it at once, each with line, column, field, and what to write instead. `file` is
/// not read; what the plan reads itself, such as the tables of distributions, is relative to it.
pub(crate) fn parse(file: &Path, text: &str) -> Result<Plan, Invalid> {
    let source = tree::Source::new(file, text);
    let tree = source.parse()?;
    match read::plan(&source.root(&tree)) {
        Some(plan) if !source.has_problems() => Ok(Plan { files: source.files(), ..plan }),
        _ => Err(source.invalid()),
    }
}

/// A plan: what to break, how to watch, what must hold.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.version`: what is being released.
    pub version: Option<String>,
    /// Seed of the run; drawn where none is given.
    pub seed: Option<u64>,
    /// Targets by name.
    pub targets: BTreeMap<String, Target>,
    /// Probes by name.
    pub probes: BTreeMap<String, Probe>,
    /// Rounds, in order.
    pub rounds: Vec<Round>,
    /// Gates over the whole run.
    pub gates: Vec<Gate>,
    /// How much it may touch, and when it has to stop.
    pub limits: Limits,
    /// What a failed gate leads to.
    pub on_fail: OnFail,
    /// The files that it names: what it calls each, and where that is.
    pub files: BTreeMap<PathBuf, PathBuf>,
}

/// What a failed gate leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum OnFail {
    /// Verdict `block`.
    #[default]
    Block,
    /// Verdict `rollback`.
    Rollback,
}

/// A name for something that can be hurt, or be the far side of a network fault.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Target {
    /// Processes.
    Process {
        /// The pid.
        pid: Option<u32>,
        /// Path of the executable, or its last component.
        exe: Option<String>,
        /// A part of the command line.
        cmdline: Option<String>,
    },
    /// A cgroup, by its path.
    Cgroup {
        /// The path.
        path: String,
    },
    /// An interface.
    Interface {
        /// Its name.
        name: String,
        /// Name or path of its network namespace; the agent's own where there is none.
        netns: Option<String>,
    },
    /// A far side only: nothing that an agent can get hold of.
    Address(Address),
}

/// A source of samples.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Probe {
    /// Open-loop HTTP load at a constant rate.
    Load(Load),
    /// A Prometheus text endpoint.
    Scrape(Scrape),
    /// The agent on the target's node.
    Agent {
        /// Name of the target.
        target: String,
        /// What to measure.
        measure: Measure,
    },
}

/// Open-loop HTTP load.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Load {
    /// Where to.
    pub url: String,
    /// `GET` by default.
    pub method: String,
    /// Request headers.
    pub headers: BTreeMap<String, String>,
    /// Request body.
    pub body: Option<String>,
    /// Requests a second.
    pub rate: f64,
    /// What a good answer is.
    pub expect: Expect,
    /// Most requests in flight; one more is dropped and counted as failed.
    pub max_in_flight: usize,
}

/// What a good answer is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Expect {
    /// HTTP status.
    pub status: u16,
    /// Assertions on the JSON body: path such as `$.items` and what must hold there.
    pub json: Vec<(JsonPath, JsonCheck)>,
    /// An answer later than this is a timeout.
    pub within: Duration,
}

/// A path into a JSON body: `$.items[0].id` → keys and indexes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct JsonPath {
    /// As written.
    pub text: String,
    /// Its steps from the root.
    pub steps: Vec<JsonStep>,
}

/// A step of a path.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum JsonStep {
    /// A member of an object.
    Key(String),
    /// An element of an array.
    Index(usize),
}

/// What must hold for a value of a JSON body.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum JsonCheck {
    /// It is an array with at least this many items.
    MinItems(usize),
    /// It is this value.
    Equals(serde_json::Value),
    /// It is there, and not null.
    Exists,
}

/// A Prometheus text endpoint.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scrape {
    /// Where it is.
    pub url: String,
    /// Name of the metric family; for a histogram without `_bucket`.
    pub metric: String,
    /// Labels a series must have. All that match are summed.
    pub labels: BTreeMap<String, String>,
    /// Time between scrapes.
    pub every: Duration,
}

/// What an agent measures of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    /// Threads.
    Threads,
    /// Open file descriptors.
    Fds,
    /// Resident memory, bytes.
    Rss,
    /// CPUs used, 1 is one whole CPU.
    Cpu,
}

/// baseline → fault → recovery.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Round {
    /// Its name.
    pub name: String,
    /// Before the fault.
    pub baseline: Duration,
    /// During the fault.
    pub hold: Duration,
    /// Longest time after the fault.
    pub recovery: Duration,
    /// What is injected, all at once.
    pub faults: Vec<Fault>,
    /// What must hold.
    pub gates: Vec<Gate>,
}

/// A fault on a target.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fault {
    /// Name of the target.
    pub on: String,
    /// How many of the target's replicas; all where nothing is said.
    pub replicas: Option<Take>,
    /// For the agent.
    pub proto: v1::Fault,
    /// One line for people.
    pub summary: String,
}

/// A gate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Gate {
    /// A percentile of a load probe, or of a scraped histogram, is at most this during the fault.
    Latency {
        /// Probe.
        probe: String,
        /// 0.95 for p95.
        percentile: f64,
        /// Seconds.
        limit: f64,
    },
    /// The share of failed requests of a load probe is at most this during the fault.
    Errors {
        /// Probe.
        probe: String,
        /// 0 to 1.
        limit: f64,
    },
    /// A gauge grows by at most this a minute.
    Leak {
        /// Probe: a scraped gauge, or an agent's measure.
        probe: String,
        /// Per minute.
        limit: f64,
    },
    /// At most this many OOM kills in the target's cgroups, from the start of the round to its end.
    Oom {
        /// Target.
        target: String,
        /// Kills.
        limit: u64,
    },
    /// The steady state of a load probe holds again this soon after the fault ended.
    Recovery {
        /// Probe.
        probe: String,
        /// Longest time, seconds.
        within: f64,
    },
}

impl Target {
    /// The selector for an agent; none for what no agent can get hold of.
    #[must_use]
    pub(crate) fn proto(&self) -> Option<v1::Target> {
        let kind = match self {
            Self::Process { pid, exe, cmdline } => v1::target::Kind::Process(v1::ProcessSelector {
                pid: pid.unwrap_or(0),
                exe: exe.clone().unwrap_or_default(),
                cmdline: cmdline.clone().unwrap_or_default(),
            }),
            Self::Cgroup { path } => v1::target::Kind::Cgroup(v1::CgroupSelector { path: path.clone() }),
            Self::Interface { name, netns } => v1::target::Kind::Interface(v1::InterfaceSelector {
                name: name.clone(),
                netns: netns.clone().unwrap_or_default(),
            }),
            Self::Address(_) => return None,
        };
        Some(v1::Target { kind: Some(kind) })
    }
}

impl Round {
    /// The longest it can take.
    #[must_use]
    pub(crate) fn longest(&self) -> Duration {
        self.baseline + self.hold + self.recovery
    }
}

impl Gate {
    /// One line: `latency: shoppers p95 ≤ 800ms`.
    #[must_use]
    pub(crate) fn line(&self) -> String {
        let outline = crate::outline::gate(self);
        format!("{}: {} {}", outline.gate, outline.subject, gate_limit(&outline))
    }
}

#[cfg(test)]
mod tests;
