//! Control groups, version 1, version 2 and both at once.
//!
//! Mount points come from /proc/self/mountinfo. Limits are those that bind: the smallest on the way from the cgroup to
//! the root, as the kernel applies them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};
use procfs::{ProcessCGroups, process::MountInfo};
use serde::{Deserialize, Serialize};

use crate::target::Cgroup;

/// Controllers into whose cgroups stressors move (fault/cpu.rs, fault/memory.rs).
const STRESSED: [&str; 4] = ["cpu", "cpuacct", "cpuset", "memory"];

/// The hierarchies that are mounted on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hierarchies(Vec<Hierarchy>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    /// Options of the superblock; for v1 its controllers are among them.
    options: Vec<String>,
    /// The cgroup that is seen at the mount point.
    root: PathBuf,
    mount_point: PathBuf,
}

/// Version of the cgroup interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Version {
    /// One hierarchy for each controller.
    V1,
    /// One for all.
    V2,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// Enters the cgroup namespace of process 1 with this thread, and so with all that it starts: whether it was another.
///
/// A container that is not privileged has one of its own where cgroups are v2 [Kubernetes' KEP-2254]. From within, other pods'
/// cgroups have paths that begin with `/..`, and no process can be moved into them [kernel/cgroup/cgroup.c,
/// `cgroup_procs_write_permission`, 6.1].
///
/// # Errors
///
/// Without CAP_SYS_ADMIN, and where process 1 may not be looked at (CAP_SYS_PTRACE).
pub fn enter_first() -> io::Result<bool> {
    let (first, own) = (Path::new("/proc/1/ns/cgroup"), Path::new("/proc/self/ns/cgroup"));
    if fs::read_link(first)? == fs::read_link(own)? {
        return Ok(false);
    }
    setns(fs::File::open(first)?, CloneFlags::CLONE_NEWCGROUP)?;
    Ok(true)
}

impl Hierarchies {
    /// Reads them from /proc/self/mountinfo.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/self/mountinfo")?))
    }

    /// From the text of a mountinfo file.
    pub fn parse(mountinfo: &str) -> Self {
        let mounts = mountinfo.lines().filter_map(|line| MountInfo::from_line(line).ok());
        let hierarchies = mounts.filter_map(|mount| {
            let version = match mount.fs_type.as_str() {
                "cgroup" => Version::V1,
                "cgroup2" => Version::V2,
                _ => return None,
            };
            let options = mount
                .super_options
                .into_iter()
                .map(|(name, value)| value.map_or(name.clone(), |value| format!("{name}={value}")))
                .collect();
            Some(Hierarchy { version, options, root: mount.root.into(), mount_point: mount.mount_point })
        });
        Self(hierarchies.collect())
    }

    /// `v1`, `v2`, `hybrid` (both are mounted) or `none`.
    pub fn kind(&self) -> &'static str {
        let has = |version| self.0.iter().any(|hierarchy| hierarchy.version == version);
        match (has(Version::V1), has(Version::V2)) {
            (true, true) => "hybrid",
            (true, false) => "v1",
            (false, true) => "v2",
            (false, false) => "none",
        }
    }

    /// The directories of a process's cgroup, from what its /proc/PID/cgroup says.
    pub fn of_process(&self, cgroups: &ProcessCGroups) -> Option<Cgroup> {
        let mut unified = None;
        let mut v1 = Vec::new();
        for entry in cgroups {
            // Hierarchy 0 is v2 and names no controllers [cgroups(7)].
            let v2 = entry.hierarchy == 0;
            let dir = self.0.iter().find_map(|hierarchy| {
                let here = match hierarchy.version {
                    Version::V2 => v2,
                    Version::V1 => {
                        !v2 && entry
                            .controllers
                            .iter()
                            .any(|controller| hierarchy.options.contains(controller))
                    }
                };
                here.then(|| hierarchy.dir(Path::new(&entry.pathname))).flatten()
            });
            match dir {
                Some(dir) if v2 => unified = Some(dir),
                Some(dir) => v1.extend(entry.controllers.iter().map(|name| (name.clone(), dir.clone()))),
                None => {}
            }
        }
        self.finish(unified, v1)
    }

    /// The directories of a cgroup by its path: as in /proc/PID/cgroup, or below a mount point.
    pub fn by_path(&self, path: &Path) -> Option<Cgroup> {
        let mounted = self
            .0
            .iter()
            .filter(|hierarchy| path.starts_with(&hierarchy.mount_point))
            .max_by_key(|hierarchy| hierarchy.mount_point.as_os_str().len());
        let inside = match mounted {
            Some(_) if !path.is_dir() => return None,
            Some(hierarchy) => {
                let below = path.strip_prefix(&hierarchy.mount_point).ok()?;
                hierarchy.root.join(below)
            }
            None => Path::new("/").join(path),
        };
        let mut unified = None;
        let mut v1 = Vec::new();
        for hierarchy in &self.0 {
            let Some(dir) = hierarchy.dir(&inside).filter(|dir| dir.is_dir()) else { continue };
            match hierarchy.version {
                Version::V2 => {
                    unified.get_or_insert(dir);
                }
                Version::V1 => {
                    let controllers = hierarchy.controllers();
                    v1.extend(controllers.map(|name| (name.to_owned(), dir.clone())));
                }
            }
        }
        self.finish(unified, v1)
    }

    /// Which directory identifies it: of the hierarchies in which it is not the root, the one of the memory controller,
    /// else of cpu, else any; the root of the same where it is the root in all.
    fn finish(&self, unified: Option<PathBuf>, mut v1: Vec<(String, PathBuf)>) -> Option<Cgroup> {
        v1.sort();
        v1.dedup_by(|a, b| a.0 == b.0);
        let rank = |name: &str| match name {
            "memory" => 0,
            "cpu" => 1,
            _ => 2,
        };
        let mut ranked: Vec<_> = v1.iter().collect();
        ranked.sort_by_key(|(name, _)| rank(name));
        let dirs: Vec<&PathBuf> = ranked.into_iter().map(|(_, dir)| dir).chain(&unified).collect();
        let path = (*dirs.iter().find(|dir| !self.is_mount_point(dir)).or(dirs.first())?).clone();
        let inode = inode(&path)?;
        Some(Cgroup { unified, v1, path, inode })
    }

    fn is_mount_point(&self, dir: &Path) -> bool {
        self.0.iter().any(|hierarchy| hierarchy.mount_point == dir)
    }

    /// Whether the cgroup is the root of the hierarchy that this controller is in, as far as this host shows it.
    pub fn is_root(&self, cgroup: &Cgroup, controller: &str) -> bool {
        cgroup.controller(controller).is_some_and(|(_, dir)| self.is_mount_point(dir))
    }
}

impl Hierarchy {
    /// The directory of a cgroup, where it can be seen through this mount.
    fn dir(&self, cgroup: &Path) -> Option<PathBuf> {
        let below = cgroup.strip_prefix(&self.root).ok()?;
        Some(if below.as_os_str().is_empty() {
            self.mount_point.clone()
        } else {
            self.mount_point.join(below)
        })
    }

    /// Its controllers. Options of a v1 superblock that are no controllers are few and known
    /// [kernel/cgroup/cgroup-v1.c, `cgroup1_show_options`, 6.1].
    fn controllers(&self) -> impl Iterator<Item = &str> {
        const OTHER: [&str; 8] =
            ["rw", "ro", "noprefix", "xattr", "cpuset_v2_mode", "favordynmods", "clone_children", "seclabel"];
        self.options
            .iter()
            .map(String::as_str)
            .filter(|option| !OTHER.contains(option) && !option.starts_with("release_agent="))
    }
}

impl Cgroup {
    /// Whether the same cgroup is still there.
    pub fn exists(&self) -> bool {
        inode(&self.path) == Some(self.inode)
    }

    /// Where the files of a controller are. A v1 hierarchy that has the controller comes first: a controller is in one
    /// hierarchy only [cgroups(7)].
    pub fn controller(&self, name: &str) -> Option<(Version, &Path)> {
        let v1 = self.v1.iter().find(|(controller, _)| controller == name);
        v1.map(|(_, dir)| (Version::V1, dir.as_path()))
            .or_else(|| self.unified.as_deref().map(|dir| (Version::V2, dir)))
    }

    /// The directories a process has to move into to be under these controllers of it: v1 has one for each, v2 one for
    /// all, which counts only where none of them is in v1.
    pub fn places(&self, controllers: &[&str]) -> Vec<PathBuf> {
        let named = |name: &String| controllers.contains(&name.as_str());
        let mut v1: Vec<PathBuf> =
            self.v1.iter().filter(|(name, _)| named(name)).map(|(_, dir)| dir.clone()).collect();
        v1.dedup();
        if v1.is_empty() { self.unified.clone().into_iter().collect() } else { v1 }
    }

    /// The processes in it and below it.
    pub fn processes(&self) -> Vec<i32> {
        below([self.path.as_path()])
    }

    /// Everybody that a stressor in it is a neighbour of. On v1 the cgroups of two controllers may have other members.
    pub fn members(&self) -> Vec<i32> {
        below(self.stressed().map(|(_, dir)| dir).chain([self.path.as_path()]))
    }

    /// The cgroups that a stressor may move into, by their controllers. A root is left out: there a stressor is one more process
    /// of the node.
    pub fn stressed(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let dirs = STRESSED.iter().filter_map(|name| Some((*name, self.controller(name)?.1)));
        dirs.filter(|(_, dir)| with_ancestors(dir).nth(1).is_some())
    }

    /// The cgroup by which its sockets are told from others: of v2, and not the root, which has no type
    /// [Documentation/admin-guide/cgroup-v2.rst, 6.1].
    pub fn of_sockets(&self) -> Option<&Path> {
        self.unified.as_deref().filter(|dir| dir.join("cgroup.type").exists())
    }

    /// Everybody whose sockets are told by it.
    pub fn owners_of_sockets(&self) -> Vec<i32> {
        below(self.of_sockets())
    }

    /// Its memory controller.
    pub fn memory(&self) -> Option<Memory> {
        let (version, dir) = self.controller("memory")?;
        let file = if version == Version::V1 { "memory.usage_in_bytes" } else { "memory.stat" };
        // In v2 the controller may be off in the leaf; its memory is then charged to the nearest ancestor that has it.
        let dir = with_ancestors(dir).find(|dir| dir.join(file).exists())?;
        Some(Memory { version, dir: dir.to_owned() })
    }

    /// CPUs' worth of time that the cgroup and its ancestors may use; none without a quota.
    pub fn cpu_quota(&self) -> Option<f64> {
        let (version, dir) = self.controller("cpu")?;
        let quotas = with_ancestors(dir).filter_map(|dir| match version {
            Version::V2 => parse_cpu_max(&fs::read_to_string(dir.join("cpu.max")).ok()?),
            Version::V1 => {
                let quota = fs::read_to_string(dir.join("cpu.cfs_quota_us")).ok()?;
                let period = fs::read_to_string(dir.join("cpu.cfs_period_us")).ok()?;
                parse_cfs(&quota, &period)
            }
        });
        quotas.reduce(f64::min)
    }

    /// The CPUs that its cpuset leaves it; none without the controller.
    pub fn cpuset(&self) -> Option<Vec<usize>> {
        let (version, dir) = self.controller("cpuset")?;
        let file = if version == Version::V1 { "cpuset.effective_cpus" } else { "cpuset.cpus.effective" };
        let text = with_ancestors(dir).find_map(|dir| fs::read_to_string(dir.join(file)).ok())?;
        parse_cpus(text.trim())
    }
}

/// The memory controller of one cgroup.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Memory {
    version: Version,
    dir: PathBuf,
}

impl Memory {
    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether an OOM kill in it ends all of its processes at once.
    pub fn kills_group(&self) -> bool {
        read_number(&self.dir.join("memory.oom.group")) == Some(1)
    }

    /// Inode of its directory; none where it is gone.
    pub fn inode(&self) -> Option<u64> {
        inode(&self.dir)
    }

    /// Bytes charged to it, page cache included. None for the root of v2, which has no such file.
    pub fn usage(&self) -> Option<u64> {
        let file = if self.version == Version::V1 { "memory.usage_in_bytes" } else { "memory.current" };
        read_number(&self.dir.join(file))
    }

    /// Bytes that reclaim cannot easily take: the usage without the inactive page cache, as the kubelet and Docker
    /// count a container's memory.
    pub fn working_set(&self) -> Option<u64> {
        let key = if self.version == Version::V1 { "total_inactive_file" } else { "inactive_file" };
        let stat = fs::read_to_string(self.dir.join("memory.stat")).ok()?;
        Some(self.usage()?.saturating_sub(flat_key(&stat, key).unwrap_or(0)))
    }

    /// The limit that binds it, and the cgroup (itself or an ancestor) that has it. None without one below `node`
    /// bytes, the memory of the node.
    pub fn limit(&self, node: u64) -> Option<(u64, Self)> {
        let file = if self.version == Version::V1 { "memory.limit_in_bytes" } else { "memory.max" };
        with_ancestors(&self.dir)
            // "max", and v1's number for it, are no limit.
            .filter_map(|dir| Some((read_number(&dir.join(file))?, dir)))
            .filter(|(limit, _)| *limit < node)
            .min_by_key(|(limit, _)| *limit)
            .map(|(limit, dir)| (limit, Self { version: self.version, dir: dir.to_owned() }))
    }

    /// Processes that were OOM-killed in it since it was made, without its descendants; with them on v2 before 5.2,
    /// which has no `memory.events.local`.
    ///
    /// The kernel counts a kill in the cgroup of the process it killed, not in the one whose limit was hit
    /// [`mm/oom_kill.c`, `__oom_kill_process`, 6.1], and on v1 not in its ancestors
    /// [`include/linux/memcontrol.h`, `memcg_memory_event`, 6.1].
    pub fn oom_kills(&self) -> Option<u64> {
        let files: &[&str] = match self.version {
            Version::V1 => &["memory.oom_control"],
            Version::V2 => &["memory.events.local", "memory.events"],
        };
        files.iter().find_map(|file| {
            let text = fs::read_to_string(self.dir.join(file)).ok()?;
            flat_key(&text, "oom_kill")
        })
    }

    /// This one and all below it.
    pub fn with_descendants(&self) -> Vec<Self> {
        let mut all = vec![self.clone()];
        let mut next = 0;
        while next < all.len() {
            let children = subdirectories(&all[next].dir);
            all.extend(children.map(|dir| Self { version: self.version, dir }));
            next += 1;
        }
        all
    }
}

/// Whether a process can be moved into a cgroup: one of v2 that turned controllers on for its children takes none,
/// except the root [Documentation/admin-guide/cgroup-v2.rst, "No Internal Process Constraint", 6.1].
pub fn takes_processes(dir: &Path) -> bool {
    let is_root = !dir.join("cgroup.type").exists();
    is_root || fs::read_to_string(dir.join("cgroup.subtree_control")).is_ok_and(|on| on.trim().is_empty())
}

/// Memory of the node, bytes: all of it, and what could be had without swapping.
pub fn node_memory() -> io::Result<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kibibytes = |key| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    let missing = || io::Error::other("/proc/meminfo has no MemTotal or no MemAvailable");
    let total = kibibytes("MemTotal").ok_or_else(missing)?;
    let available = kibibytes("MemAvailable").ok_or_else(missing)?;
    Ok((total * 1024, available * 1024))
}

/// The most CPUs of a list: those that Linux can be built for (`NR_CPUS_RANGE_END`, arch/x86/Kconfig, 6.1).
pub const MOST_CPUS: usize = 8192;

/// A list of CPUs: `0-2,5`.
pub fn parse_cpus(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if last >= MOST_CPUS || cpus.len() + (last + 1).saturating_sub(first) > MOST_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    (!cpus.is_empty()).then_some(cpus)
}

fn inode(dir: &Path) -> Option<u64> {
    fs::metadata(dir).ok().map(|meta| std::os::unix::fs::MetadataExt::ino(&meta))
}

/// A directory and those above it that are cgroups too.
fn with_ancestors(dir: &Path) -> impl Iterator<Item = &Path> {
    dir.ancestors().take_while(|dir| dir.join("cgroup.procs").exists())
}

fn subdirectories(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// The processes in these cgroups and below them.
fn below<'a>(dirs: impl IntoIterator<Item = &'a Path>) -> Vec<i32> {
    let mut pids = Vec::new();
    dirs.into_iter().for_each(|dir| processes_below(dir, &mut pids));
    pids.sort_unstable();
    pids.dedup();
    pids
}

fn processes_below(dir: &Path, pids: &mut Vec<i32>) {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for child in subdirectories(dir) {
        processes_below(&child, pids);
    }
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The value of a line `key value`.
pub fn flat_key(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// `cpu.max`: `200000 100000`, or `max 100000` for none.
pub fn parse_cpu_max(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    parse_cfs(quota, period)
}

fn parse_cfs(quota: &str, period: &str) -> Option<f64> {
    let quota: f64 = quota.trim().parse().ok()?;
    let period: f64 = period.trim().parse().ok()?;
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use procfs::FromBufRead;
    use rstest::rstest;
    use tempfile::TempDir;

    use super::*;

    /// Mounts as on a host with systemd in hybrid mode, below `top`.
    fn hybrid(top: &str) -> String {
        format!(
            "24 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
             31 23 0:28 / {top} rw,relatime - tmpfs tmpfs rw,mode=755\n\
             32 31 0:29 / {top}/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
             35 31 0:32 / {top}/memory rw,relatime - cgroup cgroup rw,memory\n\
             40 31 0:37 / {top}/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd\n\
             41 31 0:38 / {top}/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
        )
    }

    fn process(text: &str) -> ProcessCGroups {
        ProcessCGroups::from_buf_read(text.as_bytes()).expect("a good fixture")
    }

    fn tree(dirs: &[&str]) -> TempDir {
        let top = tempfile::tempdir().expect("a directory");
        for dir in dirs {
            fs::create_dir_all(top.path().join(dir)).expect("a directory");
            for above in top.path().join(dir).ancestors().take_while(|above| *above != top.path()) {
                fs::write(above.join("cgroup.procs"), "").expect("a file");
            }
        }
        top
    }

    #[test]
    fn hybrid_host_gives_each_controller_its_directory() {
        let top = tree(&["cpu,cpuacct/web", "memory/web", "systemd", "unified"]);
        let at = |dir: &str| top.path().join(dir);
        let hierarchies = Hierarchies::parse(&hybrid(&top.path().display().to_string()));
        assert_eq!(hierarchies.kind(), "hybrid");
        let of = "8:name=systemd:/\n4:memory:/web\n2:cpu,cpuacct:/web\n0::/\n";
        let cgroup = hierarchies.of_process(&process(of)).expect("a cgroup");
        assert_eq!(cgroup.controller("memory"), Some((Version::V1, at("memory/web").as_path())));
        assert_eq!(cgroup.controller("cpuacct"), Some((Version::V1, at("cpu,cpuacct/web").as_path())));
        assert_eq!(cgroup.unified, Some(at("unified")));
        assert_eq!(cgroup.path, at("memory/web"));
        assert!(cgroup.exists() && !hierarchies.is_root(&cgroup, "cpu"));
        fs::remove_file(at("memory/web/cgroup.procs")).expect("removed");
        fs::remove_dir(at("memory/web")).expect("removed");
        assert!(!cgroup.exists());
    }

    #[test]
    fn cgroup_that_is_root_in_one_hierarchy_is_told_by_another() {
        let top = tree(&["cpu,cpuacct/web", "memory", "systemd", "unified"]);
        let hierarchies = Hierarchies::parse(&hybrid(&top.path().display().to_string()));
        let of = "8:name=systemd:/\n4:memory:/\n2:cpu,cpuacct:/web\n0::/\n";
        let cgroup = hierarchies.of_process(&process(of)).expect("a cgroup");
        assert_eq!(cgroup.path, top.path().join("cpu,cpuacct/web"));
        assert!(hierarchies.is_root(&cgroup, "memory") && !hierarchies.is_root(&cgroup, "cpu"));
    }

    #[test]
    fn members_are_those_of_every_cgroup_that_a_stressor_moves_into() {
        let top = tree(&["cpu,cpuacct/pool/a", "memory/web", "systemd", "unified"]);
        let hierarchies = Hierarchies::parse(&hybrid(&top.path().display().to_string()));
        let procs = |dir: &str, pids: &str| {
            fs::write(top.path().join(dir).join("cgroup.procs"), pids).expect("a file");
        };
        procs("memory/web", "7\n8\n");
        procs("cpu,cpuacct/pool", "7\n");
        procs("cpu,cpuacct/pool/a", "9\n");
        procs("cpu,cpuacct", "1\n7\n");
        let of = |cpu: &str| {
            let text = format!("8:name=systemd:/\n4:memory:/web\n2:cpu,cpuacct:{cpu}\n0::/\n");
            hierarchies.of_process(&process(&text)).expect("a cgroup")
        };
        assert_eq!(of("/pool").members(), [7, 8, 9]);
        assert_eq!(of("/pool").processes(), [7, 8]);
        assert_eq!(of("/").members(), [7, 8], "a root is nobody's in particular");
        assert_eq!(of("/pool").owners_of_sockets(), [0; 0], "in the root of v2 sockets are everybody's");
        fs::write(top.path().join("unified/cgroup.type"), "domain\n").expect("a file");
        procs("unified", "5\n");
        assert_eq!(of("/pool").owners_of_sockets(), [5]);
    }

    #[test]
    fn unified_host_has_one_directory() {
        let top = tree(&["system.slice/redis.service"]);
        let line = format!("35 24 0:30 / {} rw shared:4 - cgroup2 cgroup2 rw", top.path().display());
        let hierarchies = Hierarchies::parse(&line);
        assert_eq!(hierarchies.kind(), "v2");
        let dir = top.path().join("system.slice/redis.service");
        let cgroup = hierarchies.of_process(&process("0::/system.slice/redis.service\n")).expect("a cgroup");
        assert_eq!(cgroup.controller("memory"), Some((Version::V2, dir.as_path())));
        let given = hierarchies.by_path(Path::new("/system.slice/redis.service")).expect("by path");
        let mounted = hierarchies.by_path(&dir).expect("by directory");
        assert_eq!((&given, &mounted), (&cgroup, &cgroup));
        assert_eq!(hierarchies.by_path(&dir.join("gone")), None);
    }

    #[test]
    fn mount_of_a_part_shows_only_that_part() {
        let top = tree(&["web"]);
        let line = format!("35 24 0:30 /docker/77 {} rw - cgroup2 cgroup2 rw", top.path().display());
        let hierarchies = Hierarchies::parse(&line);
        let inside = hierarchies.of_process(&process("0::/docker/77/web\n")).expect("inside");
        assert_eq!(inside.unified, Some(top.path().join("web")));
        assert_eq!(hierarchies.of_process(&process("0::/docker/99\n")), None);
    }

    #[test]
    fn smallest_limit_on_the_way_up_binds() {
        let top = tree(&["pod/container"]);
        let leaf = top.path().join("pod/container");
        fs::write(top.path().join("pod/memory.max"), "1000\n").expect("a file");
        fs::write(leaf.join("memory.max"), "max\n").expect("a file");
        let memory = Memory { version: Version::V2, dir: leaf.clone() };
        let pod = Memory { version: Version::V2, dir: top.path().join("pod") };
        assert_eq!(memory.limit(1 << 40), Some((1000, pod)));
        assert_eq!(memory.limit(1000), None, "a limit as large as the node is none");
        fs::write(leaf.join("memory.max"), "500\n").expect("a file");
        assert_eq!(memory.limit(1 << 40), Some((500, memory.clone())));
    }

    #[test]
    fn working_set_leaves_out_cache_that_reclaim_can_take() {
        let top = tree(&["web"]);
        let dir = top.path().join("web");
        fs::write(dir.join("memory.usage_in_bytes"), "5000\n").expect("a file");
        fs::write(dir.join("memory.stat"), "inactive_file 1\ntotal_inactive_file 1500\n").expect("a file");
        assert_eq!(Memory { version: Version::V1, dir }.working_set(), Some(3500));
    }

    #[test]
    fn local_kills_come_before_those_of_descendants() {
        let top = tree(&["web"]);
        let dir = top.path().join("web");
        let memory = Memory { version: Version::V2, dir: dir.clone() };
        assert_eq!(memory.oom_kills(), None);
        fs::write(dir.join("memory.events"), "oom 9\noom_kill 7\noom_group_kill 1\n").expect("a file");
        assert_eq!(memory.oom_kills(), Some(7));
        fs::write(dir.join("memory.events.local"), "oom 2\noom_kill 3\n").expect("a file");
        assert_eq!(memory.oom_kills(), Some(3));
        fs::write(dir.join("memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
            .expect("a file");
        assert_eq!(Memory { version: Version::V1, dir }.oom_kills(), Some(4));
    }

    #[rstest]
    #[case("0-2,5\n", Some(vec![0, 1, 2, 5]))]
    #[case("7", Some(vec![7]))]
    #[case("", None)]
    #[case("a-b", None)]
    #[case("0-18446744073709551615", None)]
    #[case("0-8191,0-8191", None)]
    fn cpu_lists(#[case] list: &str, #[case] cpus: Option<Vec<usize>>) {
        assert_eq!(parse_cpus(list.trim()), cpus);
    }

    #[rstest]
    #[case("200000 100000\n", Some(2.0))]
    #[case("50000 100000\n", Some(0.5))]
    #[case("max 100000\n", None)]
    fn cpu_quotas(#[case] text: &str, #[case] cpus: Option<f64>) {
        assert_eq!(parse_cpu_max(text), cpus);
    }

    #[test]
    fn no_quota_in_v1_is_minus_one() {
        assert_eq!(parse_cfs("-1\n", "100000\n"), None);
        assert_eq!(parse_cfs("150000\n", "100000\n"), Some(1.5));
    }
}
