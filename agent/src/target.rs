//! From a selector to something on this host with an identity that survives the reuse of pids and indexes.

use std::{
    collections::BTreeMap,
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use squall_proto::v1;
use thiserror::Error;

use crate::{
    host::{self, cgroup::Hierarchies, proc, tc::Netlink},
    limits::{Bystander, Invalid},
    pods,
};

/// Which things on a host are meant. Parsed, so it can be resolved as it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Selector {
    /// Processes for which every given term holds. At least one is given.
    Process {
        /// The pid.
        pid: Option<i32>,
        /// The executable: its absolute path, or its last component.
        exe: Option<String>,
        /// A part of the command line, arguments joined by single spaces.
        cmdline: Option<String>,
    },
    /// A cgroup, by its path as in /proc/PID/cgroup or below a mount point.
    Cgroup(PathBuf),
    /// A network interface.
    Interface {
        /// Its name.
        name: String,
        /// Where it is.
        netns: NetnsSelector,
    },
}

/// Which network namespace is meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NetnsSelector {
    /// The agent's own.
    Own,
    /// A name in /run/netns.
    Named(String),
    /// A path to a namespace file.
    Path(PathBuf),
}

/// What was looked for and not found, term by term.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("no target: {0}")]
pub struct NoMatch(String);

/// What of a target a fault takes hold of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// The process itself.
    Process,
    /// Its cgroup.
    Cgroup,
    /// Its network namespace (and interface, where one is named).
    Network,
    /// As [`Scope::Network`], but its cgroup where the namespace is the agent's own, and so everybody's.
    Sockets,
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
    /// The directory that identifies it: one in which it is not the root, where there is one.
    pub path: PathBuf,
    /// Inode of that directory.
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

impl Selector {
    /// Parses the message. Refuses what could match nothing, or everything.
    pub fn parse(proto: v1::Target) -> Result<Self, Invalid> {
        use v1::target::Kind;
        match &proto.kind {
            Some(Kind::Process(process)) => {
                fitting("target.process.exe", &process.exe)?;
                fitting("target.process.cmdline", &process.cmdline)?;
            }
            Some(Kind::Cgroup(cgroup)) => fitting("target.cgroup.path", &cgroup.path)?,
            Some(Kind::Interface(interface)) => fitting("target.interface.netns", &interface.netns)?,
            None => {}
        }
        match proto.kind {
            Some(Kind::Process(process)) => Self::parse_process(process),
            Some(Kind::Cgroup(cgroup)) => Self::parse_cgroup(&cgroup.path),
            Some(Kind::Interface(interface)) => Self::parse_interface(interface),
            None => Err(Invalid::new(
                "target",
                "",
                "nothing is selected",
                "give a process, a cgroup or an interface",
            )),
        }
    }

    fn parse_process(proto: v1::ProcessSelector) -> Result<Self, Invalid> {
        let pid = match proto.pid {
            0 => None,
            pid => Some(i32::try_from(pid).map_err(|_| {
                Invalid::new("target.process.pid", pid, "no pid is that large", "give the pid as ps shows it")
            })?),
        };
        let exe = Some(proto.exe).filter(|exe| !exe.is_empty());
        if let Some(exe) = &exe
            && (exe.ends_with('/') || (exe.contains('/') && !exe.starts_with('/')))
        {
            let fix = "give the absolute path of the executable, or only its last component";
            return Err(Invalid::new("target.process.exe", exe, "neither an absolute path nor a name", fix));
        }
        let cmdline = Some(proto.cmdline).filter(|cmdline| !cmdline.trim().is_empty());
        if pid.is_none() && exe.is_none() && cmdline.is_none() {
            let problem = "no term is given, which would match every process";
            return Err(Invalid::new("target.process", "", problem, "give pid, exe or cmdline"));
        }
        Ok(Self::Process { pid, exe, cmdline })
    }

    fn parse_cgroup(path: &str) -> Result<Self, Invalid> {
        let invalid = |problem: &str| {
            let fix = "give it as in /proc/PID/cgroup, for example /system.slice/redis.service";
            Invalid::new("target.cgroup.path", path, problem, fix)
        };
        if !path.starts_with('/') {
            return Err(invalid("not an absolute path"));
        }
        if Path::new(path).components().any(|part| part == std::path::Component::ParentDir) {
            return Err(invalid("leaves the place it names"));
        }
        // Without repeated and trailing slashes.
        Ok(Self::Cgroup(Path::new(path).components().collect()))
    }

    fn parse_interface(proto: v1::InterfaceSelector) -> Result<Self, Invalid> {
        let name = proto.name;
        // IFNAMSIZ is 16 with the closing NUL; the rest as dev_valid_name does [net/core/dev.c, 6.1].
        let valid = !matches!(name.as_str(), "" | "." | "..")
            && name.len() < 16
            && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
        if !valid {
            let fix = "give its name as ip link shows it, for example eth0";
            return Err(Invalid::new("target.interface.name", name, "not the name of an interface", fix));
        }
        let netns = match proto.netns.as_str() {
            "" => NetnsSelector::Own,
            path if path.starts_with('/') => NetnsSelector::Path(path.into()),
            "." | ".." => return Err(Self::invalid_netns(&proto.netns)),
            name if name.contains('/') => return Err(Self::invalid_netns(name)),
            name => NetnsSelector::Named(name.to_owned()),
        };
        Ok(Self::Interface { name, netns })
    }

    fn invalid_netns(netns: &str) -> Invalid {
        let fix = "give a name that ip netns shows, an absolute path, or nothing for the agent's own";
        Invalid::new("target.interface.netns", netns, "not a network namespace", fix)
    }

    /// The processes that match now, and say so with their start times. Empty where the selector means none.
    ///
    /// Never the agent itself, its stressors, or kernel threads; and by command line alone never the agent's ancestors
    /// or a `squall` that was given the pattern as an argument.
    pub fn processes(&self) -> Vec<Process> {
        match self {
            Self::Process { pid, exe, cmdline } => {
                let matched = match_processes(*pid, exe.as_deref(), cmdline.as_deref());
                matched
                    .map(|found| found.into_iter().map(|found| found.process).collect())
                    .unwrap_or_default()
            }
            Self::Cgroup(path) => hierarchies()
                .by_path(path)
                .map(|cgroup| processes_of(&cgroup).into_iter().map(|found| found.process).collect())
                .unwrap_or_default(),
            Self::Interface { .. } => Vec::new(),
        }
    }

    /// The cgroup that is meant, where one is named.
    pub fn cgroup(&self) -> Option<Cgroup> {
        match self {
            Self::Cgroup(path) => hierarchies().by_path(path),
            Self::Process { .. } | Self::Interface { .. } => None,
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, exe, cmdline } => {
                f.write_str("process")?;
                if let Some(pid) = pid {
                    write!(f, " pid {pid}")?;
                }
                if let Some(exe) = exe {
                    write!(f, " exe {exe}")?;
                }
                if let Some(cmdline) = cmdline {
                    write!(f, " cmdline {cmdline:?}")?;
                }
                Ok(())
            }
            Self::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Self::Interface { name, netns: NetnsSelector::Own } => write!(f, "interface {name}"),
            Self::Interface { name, netns } => write!(f, "interface {name} in {netns}"),
        }
    }
}

impl NetnsSelector {
    fn path(&self) -> PathBuf {
        match self {
            Self::Own => OWN_NETNS.into(),
            Self::Named(name) => Path::new("/run/netns").join(name),
            Self::Path(path) => path.clone(),
        }
    }
}

impl fmt::Display for NetnsSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("the agent's netns"),
            Self::Named(name) => write!(f, "netns {name}"),
            Self::Path(path) => write!(f, "netns {}", path.display()),
        }
    }
}

/// Longest text of a selector, bytes: that of a path.
const LONGEST: usize = libc::PATH_MAX as usize;

/// Refuses a text that is longer than any that could match.
fn fitting(field: &str, text: &str) -> Result<(), Invalid> {
    if text.len() <= LONGEST {
        return Ok(());
    }
    let begin: String = text.chars().take(40).collect();
    let problem = format!("{} bytes are too many", text.len());
    Err(Invalid::new(field, format!("{begin}…"), problem, format!("give at most {LONGEST} bytes")))
}

/// The network namespace of the agent's first thread, which never leaves it.
const OWN_NETNS: &str = "/proc/self/ns/net";

/// Resolves a selector to targets, one for each thing of this scope: two processes of one cgroup are one target of
/// [`Scope::Cgroup`]. Reads all of /proc, which takes milliseconds.
pub fn resolve(selector: &Selector, scope: Scope) -> Result<Vec<Target>, NoMatch> {
    match selector {
        Selector::Process { pid, exe, cmdline } => {
            Ok(targets_of(match_processes(*pid, exe.as_deref(), cmdline.as_deref())?, scope))
        }
        Selector::Cgroup(path) => resolve_cgroup(path, scope),
        Selector::Interface { name, netns } if matches!(scope, Scope::Network | Scope::Sockets) => {
            resolve_interface(name, netns)
        }
        Selector::Interface { .. } => {
            Err(NoMatch(format!("{selector}: this fault needs a process or a cgroup, not an interface")))
        }
    }
}

fn hierarchies() -> Hierarchies {
    Hierarchies::read().unwrap_or_default()
}

/// A process and its executable.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    process: Process,
    exe: PathBuf,
}

/// Applies the terms one after the other; where none is left, says which term left how many.
fn match_processes(
    pid: Option<i32>,
    exe: Option<&str>,
    cmdline: Option<&str>,
) -> Result<Vec<Found>, NoMatch> {
    let agent = std::process::id() as i32;
    let candidates = match pid {
        Some(pid) => vec![pid],
        None => proc::pids().map_err(|error| NoMatch(format!("cannot list /proc: {error}")))?,
    };
    // Kernel threads and zombies have no executable.
    let mut left: Vec<(i32, PathBuf)> = candidates
        .into_iter()
        .filter(|pid| *pid != agent)
        .filter_map(|pid| Some((pid, proc::exe(pid)?)))
        .collect();
    if let Some(pid) = pid {
        left.retain(|(pid, _)| !is_stressor(*pid));
        if left.is_empty() {
            return Err(NoMatch(format!("pid {pid}: {}", why_not(pid, agent))));
        }
    }
    let mut terms = Vec::new();
    let mut of = if let Some(pid) = pid { format!("pid {pid}") } else { format!("{} processes", left.len()) };
    let mut hint = None;
    if let Some(exe) = exe {
        let all = left.clone();
        left.retain(|(_, path)| is_exe(path, exe));
        terms.push(format!("exe {exe}: {} of {of}", left.len()));
        of = left.len().to_string();
        if left.is_empty() {
            hint = runs_under_that_name(&all, exe);
        }
    }
    if let Some(cmdline) = cmdline {
        let ours = if pid.is_none() && exe.is_none() { proc::ancestors(agent) } else { Vec::new() };
        let alone = pid.is_none() && exe.is_none();
        left.retain(|(pid, path)| {
            let controller = alone && (ours.contains(pid) || is_exe(path, "squall"));
            !controller && proc::arguments(*pid).join(" ").contains(cmdline)
        });
        terms.push(format!("cmdline {cmdline:?}: {} of {of}", left.len()));
    }
    // Last: it reads the arguments, and few are left by now.
    left.retain(|(pid, _)| !is_stressor(*pid));
    let found: Vec<Found> = left
        .into_iter()
        .filter_map(|(pid, exe)| {
            let start_time = proc::stat(pid)?.starttime;
            Some(Found { process: Process { pid, start_time }, exe })
        })
        .collect();
    if found.is_empty() {
        if !nix::unistd::geteuid().is_root() {
            hint.get_or_insert_with(|| {
                "the agent is not root and sees only its own user's processes".to_owned()
            });
        }
        let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
        return Err(NoMatch(format!("{}{hint}", terms.join(", "))));
    }
    Ok(found)
}

fn is_stressor(pid: i32) -> bool {
    proc::injection_of(&proc::arguments(pid)).is_some()
}

fn is_exe(path: &Path, wanted: &str) -> bool {
    if wanted.starts_with('/') {
        path == Path::new(wanted)
    } else {
        path.file_name().is_some_and(|n| n == wanted)
    }
}

fn why_not(pid: i32, agent: i32) -> String {
    if pid == agent {
        return "is this agent itself".to_owned();
    }
    match proc::any_stat(pid) {
        None => "no such process".to_owned(),
        Some(stat) if proc::is_kernel_thread(&stat) => format!("is the kernel thread {}", stat.comm),
        Some(stat) if stat.state == 'Z' => format!("{} has ended and is a zombie", stat.comm),
        Some(_) if is_stressor(pid) => "is a stressor of this agent".to_owned(),
        Some(stat) => format!("{} cannot be looked at; run the agent as root", stat.comm),
    }
}

/// Programs behind a symlink, a script or a wrapper run as something else than their name (Debian's redis-server is
/// /usr/bin/redis-check-rdb): say what the executable is called.
fn runs_under_that_name(all: &[(i32, PathBuf)], exe: &str) -> Option<String> {
    let name = Path::new(exe).file_name()?.to_str()?;
    let (pid, path) = all.iter().find(|(pid, _)| {
        let arguments = proc::arguments(*pid);
        let named = |argument: Option<&String>| {
            argument.is_some_and(|argument| {
                let word = argument.split_whitespace().next().unwrap_or_default();
                Path::new(word).file_name().is_some_and(|file| file == name)
            })
        };
        named(arguments.first())
            || named(arguments.get(1))
            || proc::stat(*pid).is_some_and(|stat| stat.comm == name)
    })?;
    Some(format!("pid {pid} goes by that name, but its executable is {}", path.display()))
}

/// The processes of a cgroup that may be targets.
fn processes_of(cgroup: &Cgroup) -> Vec<Found> {
    let agent = std::process::id() as i32;
    let candidates = cgroup.processes().into_iter().filter(|pid| *pid != agent);
    candidates
        .filter_map(|pid| {
            let exe = proc::exe(pid)?;
            let start_time = proc::stat(pid)?.starttime;
            (!is_stressor(pid)).then_some(Found { process: Process { pid, start_time }, exe })
        })
        .collect()
}

/// One target for each thing of this scope that the processes are in, named after the first of them.
fn targets_of(found: Vec<Found>, scope: Scope) -> Vec<Target> {
    let hierarchies = hierarchies();
    let own = own_netns();
    let mut targets: Vec<(Target, usize)> = Vec::new();
    for Found { process, exe } in found {
        let cgroup = proc::cgroups(process.pid).and_then(|cgroups| hierarchies.of_process(&cgroups));
        let netns = netns(format!("/proc/{}/ns/net", process.pid).into(), own);
        let same = targets.iter_mut().find(|(other, _)| match scope {
            Scope::Process => false,
            Scope::Cgroup => other.cgroup == cgroup,
            Scope::Sockets if netns.as_ref().is_some_and(|netns| netns.own) => other.cgroup == cgroup,
            Scope::Network | Scope::Sockets => {
                other.netns.as_ref().map(|n| n.inode) == netns.as_ref().map(|n| n.inode)
            }
        });
        if let Some((_, more)) = same {
            *more += 1;
            continue;
        }
        let exe = exe.file_name().unwrap_or(exe.as_os_str()).to_string_lossy().into_owned();
        let name = format!("{exe} pid {}", process.pid);
        targets.push((Target { name, process: Some(process), cgroup, netns, interface: None }, 0));
    }
    let named = targets.into_iter().map(|(mut target, more)| {
        if more > 0 {
            target.name = format!("{} and {more} more", target.name);
        }
        target
    });
    named.collect()
}

fn resolve_cgroup(path: &Path, scope: Scope) -> Result<Vec<Target>, NoMatch> {
    let hierarchies = hierarchies();
    let Some(cgroup) = hierarchies.by_path(path) else {
        let kind = hierarchies.kind();
        return Err(NoMatch(format!(
            "cgroup {}: not in any cgroup hierarchy mounted here ({kind})",
            path.display()
        )));
    };
    if scope == Scope::Cgroup {
        let name = format!("cgroup {}", path.display());
        return Ok(vec![Target { name, process: None, cgroup: Some(cgroup), netns: None, interface: None }]);
    }
    let found = processes_of(&cgroup);
    if found.is_empty() {
        return Err(NoMatch(format!("cgroup {}: 0 processes in it", path.display())));
    }
    Ok(targets_of(found, scope))
}

fn resolve_interface(name: &str, selector: &NetnsSelector) -> Result<Vec<Target>, NoMatch> {
    let path = selector.path();
    let Some(netns) = netns(path.clone(), own_netns()) else {
        return Err(NoMatch(format!("{selector}: {} is no network namespace", path.display())));
    };
    let interfaces = interfaces(&netns).map_err(|error| NoMatch(format!("{selector}: {error}")))?;
    if !interfaces.iter().any(|interface| interface == name) {
        let all = interfaces.join(", ");
        let count = interfaces.len();
        return Err(NoMatch(format!("interface {name}: 0 of {count} interfaces in {selector} ({all})")));
    }
    let name_for_people = match selector {
        NetnsSelector::Own => name.to_owned(),
        NetnsSelector::Named(_) | NetnsSelector::Path(_) => format!("{name} in {selector}"),
    };
    let interface = Some(name.to_owned());
    Ok(vec![Target { name: name_for_people, process: None, cgroup: None, netns: Some(netns), interface }])
}

/// Device and inode of the agent's own network namespace.
fn own_netns() -> Option<(u64, u64)> {
    fs::metadata(OWN_NETNS).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// The namespace a path opens. All namespace files are on one filesystem of the kernel's own (nsfs), so a file on
/// another device is none, and the inode alone identifies a namespace.
fn netns(path: PathBuf, own: Option<(u64, u64)>) -> Option<Netns> {
    let meta = fs::metadata(&path).ok()?;
    let (device, inode) = own?;
    (meta.dev() == device).then(|| Netns { path, inode: meta.ino(), own: meta.ino() == inode })
}

/// Names of the interfaces in a namespace. Enters it on a thread of its own.
fn interfaces(netns: &Netns) -> anyhow::Result<Vec<String>> {
    let list = || {
        let interfaces = nix::net::if_::if_nameindex()?;
        anyhow::Ok(
            interfaces.iter().map(|interface| interface.name().to_string_lossy().into_owned()).collect(),
        )
    };
    if netns.own {
        return list();
    }
    host::netns::Netns::open(netns)?.run(list)
}

/// The inode of the other network namespace that an interface of the agent's own leads to, where somebody is there: of the
/// node's end of a pod's veth pair, the pod's.
pub fn behind(name: &str) -> Option<u64> {
    let mut others: BTreeMap<u64, i32> = proc::pids()
        .unwrap_or_default()
        .into_iter()
        .filter_map(|pid| Some((inode_of_netns(pid)?, pid)))
        .collect();
    others.remove(&own_netns()?.1);
    let found = Netlink::open().and_then(|mut netlink| netlink.behind(name, others.into_values()));
    let found = found.inspect_err(|error| tracing::warn!("where {name} leads to is not known: {error:#}"));
    inode_of_netns(found.ok()??)
}

/// Of the network namespace that a process is in.
fn inode_of_netns(pid: i32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|netns| netns.ino())
}

impl Target {
    /// Tells this target from any other there was or will be since boot: pid and start time, cgroup and inode, or
    /// network namespace and interface.
    #[must_use]
    pub fn identity(&self) -> String {
        if let Some(Process { pid, start_time }) = self.process {
            return format!("process {pid} started {start_time}");
        }
        if let Some(cgroup) = &self.cgroup {
            return format!("cgroup {} inode {}", cgroup.path.display(), cgroup.inode);
        }
        let inode = self.netns.as_ref().map_or(0, |netns| netns.inode);
        format!("netns {inode} interface {}", self.interface.as_deref().unwrap_or("any"))
    }

    /// Whether a fault of this scope is about the packets of everybody on the agent's own network, which is the node's: more
    /// than those of one process or cgroup there.
    #[must_use]
    pub fn is_everybody(&self, scope: Scope) -> bool {
        self.netns.as_ref().is_some_and(|netns| netns.own)
            && (scope == Scope::Network || scope == Scope::Sockets && self.process.is_none())
    }

    /// Who suffers from a fault of this scope: the target's process, and everybody in what is taken hold of, be it a cgroup
    /// or a network. Who else uses the agent's own network is not told: see [`Self::is_everybody`].
    #[must_use]
    pub fn hurt(&self, scope: Scope) -> Vec<Bystander> {
        let agent = std::process::id() as i32;
        let ours = proc::ancestors(agent);
        let mut pids: Vec<i32> = self.process.iter().map(|process| process.pid).collect();
        if let Some(cgroup) = &self.cgroup {
            // On a network of its own its sockets are among all that are there.
            let own = self.netns.as_ref().is_some_and(|netns| netns.own);
            if scope == Scope::Cgroup || self.process.is_none() {
                pids.extend(cgroup.members());
            } else if scope == Scope::Sockets && own {
                pids.extend(cgroup.owners_of_sockets());
            }
        }
        if let Some(network) = self.network().filter(|_| matches!(scope, Scope::Network | Scope::Sockets)) {
            let all = proc::pids().unwrap_or_default().into_iter();
            pids.extend(all.filter(|pid| inode_of_netns(*pid) == Some(network)));
        }
        pids.sort_unstable();
        pids.dedup();
        let bystander = |pid| Bystander {
            pid,
            // A name that cannot be read, as of pid 1 in some VMs, is no reason to pass it over.
            exe: proc::exe(pid).unwrap_or_default(),
            cgroups: proc::cgroups(pid).into_iter().flatten().map(|entry| entry.pathname.into()).collect(),
            ours: pid == agent || ours.contains(&pid),
            of_the_node: proc::pid_namespace(pid) == proc::pid_namespace(agent),
        };
        pids.into_iter().filter(|pid| !is_stressor(*pid)).map(bystander).collect()
    }

    /// The inode of the network namespace of which all packets are meant. Of the agent's own not all are; there it is the one
    /// that a named interface leads to.
    fn network(&self) -> Option<u64> {
        match (&self.netns, &self.interface) {
            (Some(netns), _) if !netns.own => Some(netns.inode),
            (Some(_), Some(name)) => behind(name),
            _ => None,
        }
    }

    /// Whether it is still there, and still the same.
    #[must_use]
    pub fn alive(&self) -> bool {
        if let Some(process) = &self.process {
            return process.alive();
        }
        if let Some(cgroup) = &self.cgroup {
            return cgroup.exists();
        }
        self.netns.as_ref().is_some_and(|known| {
            netns(known.path.clone(), own_netns()).is_some_and(|found| found.inode == known.inode)
        })
    }
}

impl Netns {
    /// The agent's own.
    #[must_use]
    pub fn own() -> Option<Self> {
        netns(OWN_NETNS.into(), own_netns())
    }
}

impl Process {
    /// Whether it still runs, and is the same.
    #[must_use]
    pub fn alive(&self) -> bool {
        proc::stat(self.pid).is_some_and(|stat| stat.starttime == self.start_time)
    }
}

impl From<&Target> for v1::ResolvedTarget {
    fn from(target: &Target) -> Self {
        let of_process = target.process.as_ref().and_then(|process| pods::of_process(process.pid));
        let of_cgroup = target.cgroup.as_ref().and_then(|cgroup| pods::of_cgroup(&cgroup.path));
        Self {
            name: target.name.clone(),
            identity: target.identity(),
            pid: target.process.as_ref().map_or(0, |process| process.pid.unsigned_abs()),
            cgroup: target
                .cgroup
                .as_ref()
                .map(|cgroup| cgroup.path.display().to_string())
                .unwrap_or_default(),
            netns_inode: target.netns.as_ref().map_or(0, |netns| netns.inode),
            pod: of_process.or(of_cgroup).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use rstest::rstest;

    use super::*;

    /// A process that is ended with the test.
    struct Sleeper(Child);

    impl Sleeper {
        fn start(argument: &str) -> Self {
            Self::spawn(Command::new("sleep").arg(argument))
        }

        /// Waits until exec is over: the arguments appear a moment after spawn returns.
        fn spawn(command: &mut Command) -> Self {
            let sleeper = Self(command.spawn().expect("spawned"));
            while proc::arguments(sleeper.pid()).is_empty() {
                std::thread::yield_now();
            }
            sleeper
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            // A process that ended by itself is as good.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn process(pid: u32, exe: &str, cmdline: &str) -> v1::Target {
        let process = v1::ProcessSelector { pid, exe: exe.into(), cmdline: cmdline.into() };
        v1::Target { kind: Some(v1::target::Kind::Process(process)) }
    }

    fn cgroup(path: &str) -> v1::Target {
        v1::Target { kind: Some(v1::target::Kind::Cgroup(v1::CgroupSelector { path: path.into() })) }
    }

    fn interface(name: &str, netns: &str) -> v1::Target {
        let interface = v1::InterfaceSelector { name: name.into(), netns: netns.into() };
        v1::Target { kind: Some(v1::target::Kind::Interface(interface)) }
    }

    #[rstest]
    #[case(v1::Target { kind: None }, "target")]
    #[case(process(0, "", "  "), "target.process")]
    #[case(process(u32::MAX, "", ""), "target.process.pid")]
    #[case(process(0, "bin/redis", ""), "target.process.exe")]
    #[case(process(0, "/usr/bin/", ""), "target.process.exe")]
    #[case(cgroup("system.slice"), "target.cgroup.path")]
    #[case(cgroup("/system.slice/../.."), "target.cgroup.path")]
    #[case(interface("", ""), "target.interface.name")]
    #[case(interface("a-name-of-16-byte", ""), "target.interface.name")]
    #[case(interface("eth0", "a/b"), "target.interface.netns")]
    #[case(process(0, &"x".repeat(4097), ""), "target.process.exe")]
    #[case(process(0, "", &"x".repeat(4097)), "target.process.cmdline")]
    #[case(cgroup(&format!("/{}", "x".repeat(4096))), "target.cgroup.path")]
    #[case(interface("eth0", &"x".repeat(4097)), "target.interface.netns")]
    fn nonsense_is_refused_by_field(#[case] proto: v1::Target, #[case] field: &str) {
        assert_eq!(Selector::parse(proto).expect_err("nonsense").field, field);
    }

    #[test]
    fn selectors_are_parsed() {
        assert_eq!(
            Selector::parse(process(7, "redis", "")),
            Ok(Selector::Process { pid: Some(7), exe: Some("redis".into()), cmdline: None })
        );
        assert_eq!(Selector::parse(cgroup("/a//b/")), Ok(Selector::Cgroup("/a/b".into())));
        let named = Selector::parse(interface("eth0", "web")).expect("fine");
        assert_eq!(named.to_string(), "interface eth0 in netns web");
    }

    #[test]
    fn process_is_found_by_pid_name_path_and_arguments() {
        let argument = format!("7771.{}", std::process::id());
        let sleeper = Sleeper::start(&argument);
        let pid = sleeper.pid();
        let exe = proc::exe(pid).expect("an executable");
        let name = exe.file_name().expect("a name").to_string_lossy().into_owned();
        let path = exe.to_string_lossy().into_owned();
        for (pid_term, exe, cmdline) in [
            (pid as u32, "", ""),
            (0, name.as_str(), argument.as_str()),
            (0, path.as_str(), argument.as_str()),
        ] {
            let selector = Selector::parse(process(pid_term, exe, cmdline)).expect("fine");
            let targets = resolve(&selector, Scope::Process).expect("one target");
            assert_eq!(targets.len(), 1, "{selector}");
            assert_eq!(targets[0].process.as_ref().map(|process| process.pid), Some(pid));
            assert_eq!(targets[0].name, format!("{name} pid {pid}"));
        }
    }

    #[test]
    fn processes_that_share_a_namespace_are_one_network_target() {
        let argument = format!("7772.{}", std::process::id());
        let (first, _second) = (Sleeper::start(&argument), Sleeper::start(&argument));
        let exe = proc::exe(first.pid()).expect("an executable").to_string_lossy().into_owned();
        let selector = Selector::Process { pid: None, exe: Some(exe), cmdline: Some(argument) };
        assert_eq!(resolve(&selector, Scope::Process).expect("found").len(), 2);
        let network = resolve(&selector, Scope::Network).expect("found");
        assert_eq!(network.len(), 1);
        assert!(network[0].name.ends_with(" and 1 more"), "{}", network[0].name);
        assert!(network[0].netns.as_ref().is_some_and(|netns| netns.own));
        assert_eq!(resolve(&selector, Scope::Cgroup).expect("found").len(), 1);
    }

    #[test]
    fn nothing_found_says_which_term_left_how_many() {
        let sleeper = Sleeper::start("7773.5");
        let exe = proc::exe(sleeper.pid()).expect("an executable").to_string_lossy().into_owned();
        let message = |exe: Option<&str>, cmdline: Option<&str>| {
            let (exe, cmdline) = (exe.map(str::to_owned), cmdline.map(str::to_owned));
            resolve(&Selector::Process { pid: None, exe, cmdline }, Scope::Process)
                .expect_err("nothing")
                .to_string()
        };
        let none = message(Some("no-such-program"), Some("x"));
        assert!(none.starts_with("no target: exe no-such-program: 0 of "), "{none}");
        assert!(none.contains(" processes, cmdline \"x\": 0 of 0"), "{none}");
        let argument = message(Some(&exe), Some("7773.9"));
        assert!(
            argument.contains("cmdline \"7773.9\": 0 of ") && !argument.contains("exe 0 of"),
            "{argument}"
        );
    }

    #[test]
    fn name_that_is_only_the_first_argument_gets_a_hint() {
        use std::os::unix::process::CommandExt;
        let sleeper = Sleeper::spawn(Command::new("sleep").arg0("squall-test-alias").arg("7774.5"));
        let selector = Selector::Process { pid: None, exe: Some("squall-test-alias".into()), cmdline: None };
        let message = resolve(&selector, Scope::Process).expect_err("no such executable").to_string();
        let exe = proc::exe(sleeper.pid()).expect("an executable");
        assert!(message.contains(&format!("but its executable is {}", exe.display())), "{message}");
    }

    #[test]
    fn agent_stressors_and_kernel_threads_are_never_targets() {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new("sh");
        command.arg0(proc::STRESSOR).args(["-c", "read line", "--injection=7775"]);
        let stressor = Sleeper::spawn(command.stdin(std::process::Stdio::piped()));
        let message = |pid| {
            resolve(&Selector::Process { pid: Some(pid), exe: None, cmdline: None }, Scope::Process)
                .expect_err("never a target")
                .to_string()
        };
        assert!(message(std::process::id() as i32).contains("is this agent itself"));
        assert!(
            message(stressor.pid()).contains("is a stressor of this agent"),
            "{}",
            message(stressor.pid())
        );
        if proc::any_stat(2).is_some_and(|stat| stat.comm == "kthreadd") {
            assert!(message(2).contains("is the kernel thread kthreadd"));
        }
        let gone = Selector::Process { pid: Some(i32::MAX), exe: None, cmdline: None };
        assert!(resolve(&gone, Scope::Process).expect_err("none").to_string().contains("no such process"));
    }

    #[test]
    fn command_line_alone_never_matches_who_started_the_agent() {
        let parent = proc::any_stat(std::process::id() as i32).expect("this process").ppid;
        let cmdline = proc::arguments(parent).join(" ");
        let selector = Selector::Process { pid: None, exe: None, cmdline: Some(cmdline) };
        assert!(selector.processes().iter().all(|process| process.pid != parent));
    }

    #[test]
    fn identity_does_not_hold_for_another_process_of_the_same_pid() {
        let sleeper = Sleeper::start("7776.5");
        let selector = Selector::Process { pid: Some(sleeper.pid()), exe: None, cmdline: None };
        let mut targets = resolve(&selector, Scope::Process).expect("found");
        let mut target = targets.remove(0);
        assert!(target.alive());
        let identity = target.identity();
        if let Some(process) = &mut target.process {
            process.start_time -= 1;
        }
        assert!(!target.alive());
        assert_ne!(target.identity(), identity);
    }

    #[test]
    fn target_that_ended_is_not_alive() {
        let sleeper = Sleeper::start("7777.5");
        let selector = Selector::Process { pid: Some(sleeper.pid()), exe: None, cmdline: None };
        let target = resolve(&selector, Scope::Process).expect("found").remove(0);
        drop(sleeper);
        assert!(!target.alive());
    }

    #[test]
    fn interface_of_the_agents_own_namespace_is_found() {
        let find = |name: &str, scope| {
            resolve(&Selector::Interface { name: name.into(), netns: NetnsSelector::Own }, scope)
        };
        let target = find("lo", Scope::Network).expect("there is a loopback").remove(0);
        assert_eq!(target.interface.as_deref(), Some("lo"));
        assert!(target.alive() && target.netns.is_some_and(|netns| netns.own));
        let none = find("squall-none", Scope::Network).expect_err("no such interface").to_string();
        assert!(none.contains("interface squall-none: 0 of ") && none.contains("lo"), "{none}");
        assert!(
            find("lo", Scope::Cgroup).expect_err("unfit").to_string().contains("needs a process or a cgroup")
        );
    }

    #[test]
    fn path_that_is_no_namespace_is_no_target() {
        let selector =
            Selector::Interface { name: "lo".into(), netns: NetnsSelector::Path("/proc/self/stat".into()) };
        let message = resolve(&selector, Scope::Network).expect_err("no namespace").to_string();
        assert!(message.contains("/proc/self/stat is no network namespace"), "{message}");
    }

    /// Needs root: these make network namespaces.
    mod privileged {
        use super::*;
        use crate::host::netns;

        #[test]
        fn whoever_shares_the_network_is_hurt_with_it() {
            let netns = [
                netns::Netns::scratch().expect("a namespace"),
                netns::Netns::scratch().expect("a namespace"),
            ];
            let start = |netns: &netns::Netns| netns.run(|| Ok(Sleeper::start("7778.5"))).expect("started");
            let sleepers = [start(&netns[0]), start(&netns[0]), start(&netns[1])];
            let pid = sleepers[0].pid();
            let selector = Selector::Process { pid: Some(pid), exe: None, cmdline: None };
            let process = resolve(&selector, Scope::Network).expect("found").remove(0);
            let interface =
                Target { process: None, cgroup: None, interface: Some("lo".into()), ..process.clone() };
            let mut shared = vec![pid, sleepers[1].pid()];
            shared.sort_unstable();
            let hurt = |target: &Target, scope| -> Vec<i32> {
                target.hurt(scope).into_iter().map(|one| one.pid).collect()
            };
            for target in [&process, &interface] {
                for scope in [Scope::Network, Scope::Sockets] {
                    assert_eq!(hurt(target, scope), shared, "{target} {scope:?}");
                }
            }
            assert_eq!(hurt(&process, Scope::Process), [pid]);
            let own = Target { netns: Netns::own(), ..interface };
            assert_eq!(hurt(&own, Scope::Network), [0; 0], "who is there is not told");
        }
    }
}
