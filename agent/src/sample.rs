//! What a target uses, measured on this node.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use squall_proto::v1;

use crate::{
    host::{
        cgroup::{Hierarchies, Memory, node_memory},
        proc,
    },
    target::{Process, Selector},
    time::BootTime,
};

/// Measures one target again and again.
///
/// It remembers the cgroups it has seen: a process that was OOM-killed is gone from /proc, and its cgroup may be gone
/// a moment later, but the kill must be counted.
#[derive(Debug)]
pub struct Sampler {
    selector: Selector,
    /// OOM kills by cgroup and inode: a cgroup of the same path that was made anew counts from zero again.
    kills: BTreeMap<(Memory, u64), Option<u64>>,
}

impl Sampler {
    /// A sampler of what the selector means, each time anew.
    pub fn new(selector: Selector) -> Self {
        Self { selector, kills: BTreeMap::new() }
    }

    /// Measures now. A target that is gone gives zero processes, not an error.
    pub fn sample(&mut self) -> v1::TargetSample {
        let processes = self.selector.processes();
        let mut sample = v1::TargetSample {
            boot_ns: BootTime::now().0,
            generation: generation(&processes),
            fds_known: true,
            ..v1::TargetSample::default()
        };
        let ticks = procfs::ticks_per_second() as f64;
        for process in &processes {
            let Some(stat) = proc::stat(process.pid) else { continue };
            sample.processes += 1;
            sample.threads += stat.num_threads.unsigned_abs();
            sample.rss_bytes += proc::resident(process.pid).unwrap_or(0);
            sample.cpu_seconds += (stat.utime + stat.stime) as f64 / ticks;
            match proc::descriptors(process.pid) {
                Some(count) => sample.fds += count,
                // A process that has ended has none.
                None => sample.fds_known &= proc::stat(process.pid).is_none(),
            }
        }
        self.sample_cgroups(&processes, &mut sample);
        sample
    }

    fn sample_cgroups(&mut self, processes: &[Process], sample: &mut v1::TargetSample) {
        let named = self.selector.cgroup();
        let now = named
            .as_ref()
            .map_or_else(|| cgroups_of(processes), |cgroup| cgroup.memory().into_iter().collect());
        let node = node_memory().map_or(u64::MAX, |(total, _)| total);
        for memory in now {
            sample.cgroup_memory_bytes += memory.usage().unwrap_or(0);
            sample.cgroup_memory_limit_bytes += memory.limit(node).map_or(0, |(limit, _)| limit);
            // A target that is a cgroup has all below it; one that is a process has only its own.
            let counted = if named.is_some() { memory.with_descendants() } else { vec![memory] };
            for memory in counted {
                if let Some(inode) = memory.inode() {
                    self.kills.entry((memory, inode)).or_default();
                }
            }
        }
        for ((memory, inode), kills) in &mut self.kills {
            // Keeps the last count of a cgroup that is gone.
            if memory.inode() == Some(*inode) {
                *kills = memory.oom_kills().or(*kills);
            }
        }
        sample.oom_kills = self.kills.values().flatten().sum();
        sample.oom_known = !self.kills.is_empty() && self.kills.values().all(Option::is_some);
    }
}

/// The memory controllers of processes, each once.
fn cgroups_of(processes: &[Process]) -> Vec<Memory> {
    let hierarchies = Hierarchies::read().unwrap_or_default();
    let memory = |process: &Process| hierarchies.of_process(&proc::cgroups(process.pid)?)?.memory();
    let mut all: Vec<Memory> = processes.iter().filter_map(memory).collect();
    all.sort();
    all.dedup();
    all
}

/// Changes when a process of the target is replaced, comes or goes.
fn generation(processes: &[Process]) -> String {
    let mut hash = Sha256::new();
    for process in processes {
        hash.update(process.pid.to_le_bytes());
        hash.update(process.start_time.to_le_bytes());
    }
    format!("{:x}", hash.finalize())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn selector(pid: u32) -> Selector {
        Selector::Process { pid: Some(pid as i32), exe: None, cmdline: None }
    }

    #[test]
    fn target_that_is_gone_is_zero_processes_of_another_generation() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let mut sampler = Sampler::new(selector(child.id()));
        // A moment after spawn returns exec is over and memory is mapped.
        while proc::resident(child.id() as i32) == Some(0) {
            std::thread::yield_now();
        }
        let alive = sampler.sample();
        child.kill().expect("killed");
        child.wait().expect("waited");
        let gone = sampler.sample();
        assert_eq!((alive.processes, alive.threads), (1, 1));
        assert!(alive.rss_bytes > 0 && alive.fds >= 3 && alive.fds_known, "{alive:?}");
        assert_eq!((gone.processes, gone.threads, gone.rss_bytes), (0, 0, 0));
        assert_ne!(alive.generation, gone.generation);
        assert!(gone.boot_ns > alive.boot_ns);
    }

    #[test]
    fn generation_stays_while_nothing_changes() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let mut sampler = Sampler::new(selector(child.id()));
        let (first, second) = (sampler.sample(), sampler.sample());
        child.kill().expect("killed");
        child.wait().expect("waited");
        assert_eq!(first.generation, second.generation);
    }
}
