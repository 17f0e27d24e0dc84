//! From a selector to something on this host with an identity that survives the reuse of pids and indexes.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

/// What of a target a fault takes hold of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// The process itself.
    Process,
    /// Its cgroup.
    Cgroup,
    /// Its network namespace (and interface, where one is named).
    Network,
}

/// One thing on this host that a fault can be injected into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// For people: `recommender pid 4121`.
    pub name: String,
    /// The process, where the target is one, or was found through one.
    pub process: Option<Process>,
    /// The cgroup, where the target is or has one.
    pub cgroup: Option<Cgroup>,
    /// The network namespace, where the target is or has one.
    pub netns: Option<Netns>,
    /// The interface, where the selector named one.
    pub interface: Option<String>,
}

/// A process, and the start time that tells it from a later one with the same pid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The pid in the agent's pid namespace.
    pub pid: i32,
    /// Field 22 of /proc/PID/stat, clock ticks since boot.
    pub start_time: u64,
}

/// A cgroup in every hierarchy the host has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// The directory in the v2 hierarchy, where there is one mounted and the cgroup is in it.
    pub unified: Option<PathBuf>,
    /// The v1 directories by controller (`memory`, `cpu`, …), where the host has v1 hierarchies.
    pub v1: Vec<(String, PathBuf)>,
    /// Inode of the directory that identifies it.
    pub inode: u64,
}

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netns {
    /// A path that opens it now: `/proc/4121/ns/net` or `/run/netns/web`.
    pub path: PathBuf,
    /// Inode of the namespace, which is its identity while anything keeps it alive.
    pub inode: u64,
    /// Whether it is the agent's own, which on a node is the node's.
    pub own: bool,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
