//! What a host looks like, so that before and after can be compared.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::time::TimeValLike,
    time::{ClockId, clock_gettime},
};
use serde_json::Value;

use crate::{PREFIX, bpf, cgroup, netns, stdout, sweep};

/// Everything of a host that Squall could leave behind. What belongs to another lab that is still in use is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostState {
    /// Names in /run/netns.
    pub netns: BTreeSet<String>,
    /// The host's own network namespace.
    pub network: NetState,
    /// Directories below /sys/fs/cgroup that have to do with Squall.
    pub cgroups: BTreeSet<PathBuf>,
    /// What the files in them say that can be set.
    pub settings: BTreeSet<String>,
    /// Everything in /sys/fs/bpf.
    pub pins: BTreeSet<PathBuf>,
    /// eBPF objects of Squall that no process holds.
    pub orphans: BTreeSet<String>,
    /// Mounts, other than of named network namespaces.
    pub mounts: BTreeSet<String>,
    /// Processes of Squall's binaries: pid and path.
    pub processes: BTreeSet<String>,
    /// How far the wall clock is ahead of time since boot, milliseconds.
    pub clock: i64,
}

/// A clock that is as far off as this was not set, but disciplined, or read at another moment.
const SAME_CLOCK: i64 = 250;

/// A network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetState {
    /// Name, kind, MTU and qdisc of each link.
    pub links: BTreeSet<String>,
    /// Device, kind, handle and parent of each qdisc.
    pub qdiscs: BTreeSet<String>,
    /// Filters at ingress and egress, as tc shows them.
    pub filters: BTreeSet<String>,
    /// Interface and address.
    pub addresses: BTreeSet<String>,
    /// Settings below /proc/sys/net that a fault may have to change.
    pub settings: BTreeSet<String>,
    /// What each link leaves to its device, as ethtool shows it.
    pub offloads: BTreeSet<String>,
}

impl HostState {
    /// The host now. `binaries` is where the processes to look for were started from.
    pub fn capture(binaries: &Path) -> Result<Self> {
        let foreign = |name: &str| sweep::in_use_by_another(name);
        let netns = names(Path::new("/run/netns"))?.into_iter().filter(|name| !foreign(name)).collect();
        let mut cgroups = BTreeSet::new();
        walk(Path::new(cgroup::ROOT), &mut |dir| {
            let of_squall = |part: &std::ffi::OsStr| part.to_string_lossy().starts_with(PREFIX);
            let theirs = dir.iter().any(|part| foreign(&part.to_string_lossy()));
            if dir.iter().any(of_squall) && !theirs {
                cgroups.insert(dir.to_owned());
            }
        })?;
        let settings = cgroups.iter().flat_map(|dir| cgroup_settings(dir)).collect();
        let mut pins = BTreeSet::new();
        for pin in names(Path::new("/sys/fs/bpf"))? {
            pins.insert(Path::new("/sys/fs/bpf").join(pin));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
        let mounts = mounts.lines().filter_map(mount).collect();
        Ok(Self {
            netns,
            network: Self::network(None)?,
            cgroups,
            settings,
            pins,
            orphans: bpf::orphans(),
            mounts,
            processes: processes(binaries)?,
            clock: clock()?,
        })
    }

    /// The network namespace of this name, or this process's own.
    pub fn network(netns: Option<&str>) -> Result<NetState> {
        let tool = |tool: &str, args: &[&str]| {
            let mut command = Command::new(tool);
            if let Some(netns) = netns {
                command.args(["-n", netns]);
            }
            stdout(command.args(args))
        };
        let list = |text: String| -> Result<Vec<Value>> {
            // iproute2 prints nothing at all where there is nothing to list.
            if text.trim().is_empty() { Ok(Vec::new()) } else { Ok(serde_json::from_str(&text)?) }
        };
        // Links with their addresses.
        let links = list(tool("ip", &["-j", "-d", "addr", "show"])?).context("ip's links are not JSON")?;
        let qdiscs = list(tool("tc", &["-j", "qdisc", "show"])?).context("tc's qdiscs are not JSON")?;
        let mut filters = BTreeSet::new();
        for qdisc in qdiscs.iter().filter(|q| matches!(q["kind"].as_str(), Some("clsact" | "ingress"))) {
            let device = qdisc["dev"].as_str().unwrap_or_default();
            for hook in ["ingress", "egress"] {
                let shown = tool("tc", &["filter", "show", "dev", device, hook])?;
                filters.extend(shown.lines().map(|line| format!("{device} {hook} {}", line.trim())));
            }
        }
        let (settings, offloads) = match netns {
            Some(name) => netns::inside(name, || Ok((net_settings()?, offloads(&links)?)))?,
            None => (net_settings()?, offloads(&links)?),
        };
        Ok(NetState {
            links: lines(&links, &["/ifname", "/linkinfo/info_kind", "/mtu", "/qdisc"]),
            qdiscs: lines(&qdiscs, &["/dev", "/kind", "/handle", "/parent", "/root"]),
            filters,
            addresses: addresses(&links),
            settings,
            offloads,
        })
    }

    /// What differs afterwards, one line each: `+` is new, `-` is missing. Nothing, if all is as before.
    #[must_use]
    pub fn changes(&self, after: &Self) -> Vec<String> {
        let mut found = self.network.changes(&after.network);
        compare("namespace", &self.netns, &after.netns, &mut found);
        compare("process", &self.processes, &after.processes, &mut found);
        let text = |paths: &BTreeSet<PathBuf>| paths.iter().map(|p| p.display().to_string()).collect();
        compare("cgroup", &text(&self.cgroups), &text(&after.cgroups), &mut found);
        compare("cgroup setting", &self.settings, &after.settings, &mut found);
        compare("BPF object", &text(&self.pins), &text(&after.pins), &mut found);
        // The kernel frees them a moment after their last process, so that any may have been there before.
        found.extend(after.orphans.difference(&self.orphans).map(|orphan| format!("+ BPF orphan {orphan}")));
        compare("mount", &self.mounts, &after.mounts, &mut found);
        let set = after.clock - self.clock;
        if set.abs() > SAME_CLOCK {
            found.push(format!("+ clock set by {set} ms"));
        }
        found
    }
}

impl NetState {
    /// What differs afterwards, one line each: `+` is new, `-` is missing.
    #[must_use]
    pub fn changes(&self, after: &Self) -> Vec<String> {
        let mut found = Vec::new();
        compare("link", &self.links, &after.links, &mut found);
        compare("qdisc", &self.qdiscs, &after.qdiscs, &mut found);
        compare("filter", &self.filters, &after.filters, &mut found);
        compare("address", &self.addresses, &after.addresses, &mut found);
        compare("setting", &self.settings, &after.settings, &mut found);
        compare("offload", &self.offloads, &after.offloads, &mut found);
        found
    }
}

fn compare(what: &str, before: &BTreeSet<String>, after: &BTreeSet<String>, found: &mut Vec<String>) {
    found.extend(after.difference(before).map(|new| format!("+ {what} {new}")));
    found.extend(before.difference(after).map(|missing| format!("- {what} {missing}")));
}

fn lines(list: &[Value], fields: &[&str]) -> BTreeSet<String> {
    let line = |item: &Value| {
        let parts = fields.iter().filter_map(|field| match item.pointer(field)? {
            Value::String(text) => Some(text.clone()),
            Value::Null => None,
            other => Some(other.to_string()),
        });
        parts.collect::<Vec<_>>().join(" ")
    };
    list.iter().map(line).collect()
}

/// Interface and address, with its prefix. Link-local ones of IPv6 are left out: the kernel makes them, some time after a link
/// is up.
fn addresses(links: &[Value]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for link in links {
        for address in link["addr_info"].as_array().into_iter().flatten() {
            let made_by_kernel = address["family"] == "inet6" && address["scope"] == "link";
            if !made_by_kernel {
                found.insert(format!("{} {}/{}", link["ifname"], address["local"], address["prefixlen"]));
            }
        }
    }
    found
}

/// The settings of the calling thread's network namespace.
fn net_settings() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let root = Path::new("/proc/sys/net/ipv4/conf");
    for interface in names(root)? {
        for name in ["route_localnet", "accept_local", "forwarding", "rp_filter"] {
            // Interfaces come and go.
            if let Ok(value) = fs::read_to_string(root.join(&interface).join(name)) {
                found.insert(format!("{interface} {name} {}", value.trim()));
            }
        }
    }
    Ok(found)
}

/// The offloads of the links, which are in the calling thread's network namespace: `near0 tx-checksumming: on`.
fn offloads(links: &[Value]) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for name in links.iter().filter_map(|link| link["ifname"].as_str()) {
        // Interfaces come and go.
        let shown = Command::new("ethtool").args(["-k", name]).output().context("cannot start ethtool")?;
        let flags = String::from_utf8_lossy(&shown.stdout).into_owned();
        found.extend(flags.lines().skip(1).map(|flag| format!("{name} {}", flag.trim())));
    }
    // There is a loopback interface everywhere.
    ensure!(!found.is_empty(), "ethtool shows no flag of any of {} links", links.len());
    Ok(found)
}

/// How far the wall clock is ahead of `CLOCK_BOOTTIME`, milliseconds.
fn clock() -> Result<i64> {
    let now = |clock| clock_gettime(clock).context("cannot read a clock").map(|time| time.num_milliseconds());
    Ok(now(ClockId::CLOCK_REALTIME)? - now(ClockId::CLOCK_BOOTTIME)?)
}

/// What the files of a cgroup say that can be set, and its processes. Usage is left out: it is never the same.
fn cgroup_settings(dir: &Path) -> Vec<String> {
    const FILES: [&str; 17] = [
        "cgroup.freeze",
        "cgroup.procs",
        "cgroup.subtree_control",
        "cgroup.type",
        "cpu.cfs_period_us",
        "cpu.cfs_quota_us",
        "cpu.max",
        "cpu.shares",
        "cpu.weight",
        "cpuset.cpus",
        "freezer.state",
        "io.max",
        "memory.high",
        "memory.limit_in_bytes",
        "memory.max",
        "memory.oom.group",
        "pids.max",
    ];
    let read = |file: &str| {
        let value = fs::read_to_string(dir.join(file)).ok()?;
        Some(format!("{}/{file} {}", dir.display(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
    };
    FILES.into_iter().filter_map(read).collect()
}

/// Place and kind of a mount: `/tmp tmpfs`.
fn mount(line: &str) -> Option<String> {
    let (before, after) = line.split_once(" - ")?;
    let place = before.split(' ').nth(4)?;
    (!place.starts_with("/run/netns"))
        .then(|| format!("{place} {}", after.split(' ').next().unwrap_or_default()))
}

fn names(dir: &Path) -> Result<Vec<String>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("cannot list {}", dir.display())),
    }
}

/// Calls `each` for every directory below `dir`. Cgroups come and go while we look.
fn walk(dir: &Path, each: &mut impl FnMut(&Path)) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("cannot list {}", dir.display())),
    };
    for entry in entries {
        let Ok(entry) = entry else { continue };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            each(&entry.path());
            walk(&entry.path(), each)?;
        }
    }
    Ok(())
}

fn processes(binaries: &Path) -> Result<BTreeSet<String>> {
    let binaries = fs::canonicalize(binaries).unwrap_or_else(|_| binaries.to_owned());
    let mut found = BTreeSet::new();
    for pid in names(Path::new("/proc"))?.into_iter().filter(|name| name.parse::<u32>().is_ok()) {
        // Kernel threads and zombies have no executable; others may be gone by now.
        let Ok(exe) = fs::read_link(format!("/proc/{pid}/exe")) else { continue };
        let name = exe.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let ours = ["squall", "squall-agent", "squall-agent-crash", "recommender"].contains(&name.as_str());
        if exe.parent() == Some(&binaries) && ours {
            found.insert(format!("{pid} {}", exe.display()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(links: &[&str]) -> NetState {
        let set = |items: &[&str]| items.iter().map(ToString::to_string).collect();
        NetState { links: set(links), ..NetState::default() }
    }

    #[test]
    fn both_what_is_new_and_what_is_missing_is_a_change() {
        let changes = state(&["lo", "eth0"]).changes(&state(&["lo", "tap0"]));
        assert_eq!(changes, ["+ link tap0", "- link eth0"]);
        assert!(state(&["lo"]).changes(&state(&["lo"])).is_empty());
    }

    #[test]
    fn an_offload_that_was_switched_is_a_change() {
        let with = |flag: &str| NetState { offloads: [flag.to_owned()].into(), ..NetState::default() };
        let changes = with("near0 tso: on").changes(&with("near0 tso: off"));
        assert_eq!(changes, ["+ offload near0 tso: off", "- offload near0 tso: on"]);
    }
}
