//! What a lab that was killed left behind.

use std::{env, fs, path::Path};

use anyhow::Result;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{PREFIX, cgroup, run, stdout};

/// Removes the namespaces, cgroups and directories of labs whose process is gone, and kills what runs in them.
/// Returns what was removed, one line each.
pub fn sweep() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let root = Path::new(cgroup::ROOT);
    let mut parents = vec![root.to_owned()];
    parents.extend(fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path()));
    for parent in parents {
        for dir in orphans(&parent) {
            cgroup::remove(&parent.join(&dir))?;
            removed.push(format!("cgroup {}", parent.join(dir).display()));
        }
    }
    for netns in orphans(Path::new("/run/netns")) {
        let pids = stdout(std::process::Command::new("ip").args(["netns", "pids", &netns]))?;
        for pid in pids.lines().filter_map(|line| line.trim().parse::<i32>().ok()) {
            // It may have ended since.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        run("ip", ["netns", "delete", &netns])?;
        removed.push(format!("namespace {netns}"));
    }
    let temp = env::temp_dir();
    for dir in orphans(&temp) {
        fs::remove_dir_all(temp.join(&dir))?;
        removed.push(format!("directory {}", temp.join(dir).display()));
    }
    Ok(removed)
}

/// Whether this is the name of something that a living process other than this one has made.
pub(crate) fn in_use_by_another(name: &str) -> bool {
    owner(name).is_some_and(|pid| pid != std::process::id() && alive(pid))
}

fn orphans(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| owner(name).is_some_and(|pid| !alive(pid))).collect()
}

/// The process in a name made by [`crate::unique`]: `squall-<tag>-<pid>-<n>…`.
fn owner(name: &str) -> Option<u32> {
    let mut parts = name.strip_prefix(PREFIX)?.split('-').skip(1);
    let pid = parts.next()?.parse().ok()?;
    parts.next()?.parse::<u32>().ok()?;
    Some(pid)
}

fn alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_names_of_labs_have_an_owner() {
        assert_eq!(owner("squall-demo-4711-0"), Some(4711));
        assert_eq!(owner("squall-demo-4711-0-client"), Some(4711));
        assert_eq!(owner("squall-demo-4711"), None);
        assert_eq!(owner("squall-agent"), None);
        assert_eq!(owner("web-demo-4711-0"), None);
        assert_eq!(owner(&crate::unique("tag")), Some(std::process::id()));
    }

    #[test]
    fn a_lab_of_our_own_is_not_another_ones() {
        assert!(!in_use_by_another(&crate::unique("tag")));
        assert!(in_use_by_another("squall-demo-1-0"));
    }
}
