//! A line: a veth pair of our own, with `sch_fq` at both ends, through which packets of an interface take a detour to be
//! late. What goes in at one end comes out of the other, so one pair serves both directions.
//!
//! The interface itself keeps its qdiscs. The pair needs no process: when the agent dies, packets still come through. It
//! stays until it is removed, and is found by its name.

use std::time::Duration;

use anyhow::{Result, bail};
use squall_common::{line::QUEUES, table::Direction};

use super::{proc, steer, tc::Netlink};
use crate::crash;

/// Packets a second for which a line has room. A packet may be a GSO packet of 64 KiB.
pub const PACKETS_A_SECOND: u32 = 100_000;
/// The least and the most packets for which a line has room: the kernel's memory is everybody's.
const ROOM: std::ops::RangeInclusive<u32> = 10_000..=400_000;

/// For how many packets a line has room that holds them for so long.
#[must_use]
pub fn room(longest: Duration) -> u32 {
    ((longest.as_secs_f64() * f64::from(PACKETS_A_SECOND)) as u32).clamp(*ROOM.start(), *ROOM.end())
}

/// Begins the alias of an end of a line.
const MARK: &str = "squall-agent ";

/// The line of one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Indexes of its ends.
    pub ends: [u32; 2],
}

/// The names of the ends of the line for the interface with this index, used as it is or as the outer end of another. All begin with `squall`, and none of our programs
/// ever attaches to such an interface as a target.
#[must_use]
pub fn names(interface: u32, outside: bool) -> [String; 2] {
    let ends = if outside { ["c", "d"] } else { ["a", "b"] };
    ends.map(|end| format!("squall{interface:x}{end}"))
}

/// Whether an interface of this name is the end of a line.
#[must_use]
pub fn is_name(name: &str) -> bool {
    name.strip_prefix("squall")
        .and_then(|rest| rest.strip_suffix(['a', 'b', 'c', 'd']))
        .is_some_and(|index| u32::from_str_radix(index, 16).is_ok())
}

/// What the ends of our lines say about whose they are: `squall-agent PID START`.
fn mark() -> String {
    let pid = std::process::id() as i32;
    format!("{MARK}{pid} {}", proc::stat(pid).map_or(0, |stat| stat.starttime))
}

/// Whether the agent that made the line with this mark lives.
#[must_use]
pub fn owned(mark: Option<&str>) -> bool {
    let owner = mark.and_then(|mark| mark.strip_prefix(MARK)?.split_once(' '));
    owner.is_some_and(|(pid, start)| {
        let stat = pid.parse().ok().and_then(proc::stat);
        stat.is_some_and(|stat| stat.starttime.to_string() == start)
    })
}

/// As [`owned`], by another process than this one.
#[must_use]
pub fn is_anothers(mark: Option<&str>) -> bool {
    owned(mark) && mark != Some(&self::mark())
}

impl Line {
    /// Makes the line of an interface in the calling thread's network namespace. What a dead agent left there goes first; that of another
    /// living one stays.
    pub fn create(netlink: &mut Netlink, interface: u32, outside: bool, longest: Duration) -> Result<Self> {
        let names = names(interface, outside);
        for found in netlink.interfaces()?.into_iter().filter(|i| names.contains(&i.name)) {
            if is_anothers(found.alias.as_deref()) {
                let alias = found.alias.unwrap_or_default();
                bail!("{} is the line of another agent, which lives: {alias}", found.name);
            }
        }
        Self::remove(netlink, interface, outside)?;
        crash::step("line.veth")?;
        let line = Self { ends: netlink.add_veth([&names[0], &names[1]], &mark(), QUEUES)? };
        if let Err(error) = line.resize(netlink, longest) {
            netlink.remove_link(line.ends[0])?;
            return Err(error);
        }
        crash::point("line.steer");
        if let Err(error) = names.iter().try_for_each(|name| steer::flows_to_cpus(name)) {
            tracing::warn!(
                "packets of one flow may overtake each other where several CPUs send them: {error}"
            );
        }
        Ok(line)
    }

    /// Makes room for packets that are held for so long. What is in the line stays.
    pub fn resize(self, netlink: &mut Netlink, longest: Duration) -> Result<()> {
        self.ends.iter().try_for_each(|&end| {
            crash::step("line.fq")?;
            netlink.set_root_fq(end, room(longest))
        })
    }

    /// Packets that are on their way.
    pub fn packets(self, netlink: &mut Netlink) -> Result<u32> {
        let mut packets = 0;
        for end in self.ends {
            packets += netlink.root_qdisc(end)?.map_or(0, |root| root.packets);
        }
        Ok(packets)
    }

    /// Packets that got lost between its ends, since it was made: a CPU takes no more than `net.core.netdev_max_backlog` of those
    /// that others hand it (`enqueue_to_backlog` in net/core/dev.c, 6.1).
    pub fn lost(self, netlink: &mut Netlink) -> Result<u64> {
        self.ends.iter().map(|&end| netlink.lost(end, Direction::Ingress)).sum()
    }

    /// Removes the line of an interface. One that is not there is a success.
    pub fn remove(netlink: &mut Netlink, interface: u32, outside: bool) -> Result<()> {
        let names = names(interface, outside);
        // Both, should one have been moved away from the other.
        for found in netlink.interfaces()?.iter().filter(|i| names.contains(&i.name)) {
            crash::step("line.remove")?;
            if let Err(error) = steer::flows_anywhere(&found.name) {
                tracing::debug!("{}: {error}", found.name);
            }
            netlink.remove_link(found.index)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_what_is_held_and_no_more_than_is_sane() {
        assert_eq!(room(Duration::from_millis(1)), 10_000);
        assert_eq!(room(Duration::from_secs(1)), 100_000);
        assert_eq!(room(Duration::from_mins(1)), 400_000);
    }

    #[test]
    fn names_fit_and_differ() {
        let all = [names(u32::MAX, false), names(u32::MAX, true)].concat();
        assert!(all.iter().all(|name| name.len() < libc::IFNAMSIZ), "{all:?}");
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
        assert!(all.iter().all(|name| is_name(name)));
        // A TAP device, and others' interfaces.
        assert!(!["squall0", "squall12", "squalla", "squall-a", "eth0a"].into_iter().any(is_name));
    }

    /// Needs root, and a kernel with sch_fq for the second half.
    #[test]
    fn privileged_another_agents_line_stays() {
        let made = crate::host::netns::run_in_new(|| {
            let mut netlink = Netlink::open()?;
            let names = names(1, false);
            let stat = proc::stat(1).expect("init lives");
            let theirs = format!("{MARK}1 {}", stat.starttime);
            netlink.add_veth([&names[0], &names[1]], &theirs, QUEUES)?;
            let mut create = || Line::create(&mut netlink, 1, false, Duration::ZERO).map(drop);
            let refused = create().expect_err("it is another's").to_string();
            assert!(refused.starts_with("squall1") && refused.contains(&theirs), "{refused}");
            // One of the same name that nobody owns is no reason.
            Line::remove(&mut netlink, 1, false)?;
            netlink.add_veth([&names[0], &names[1]], "squall-agent 1 0", QUEUES)?;
            let made = Line::create(&mut netlink, 1, false, Duration::ZERO).map(drop);
            assert!(!made.is_err_and(|e| e.to_string().contains("another agent")), "a dead one's");
            Ok(())
        });
        made.expect("root");
    }

    #[test]
    fn a_line_is_owned_by_a_living_process_that_is_the_same() {
        let mark = mark();
        assert!(owned(Some(&mark)));
        assert!(!owned(Some(&format!("{mark}0"))), "another process of the same pid");
        assert!(!owned(None));
        assert!(!is_anothers(Some(&mark)));
        let parent = nix::unistd::getppid().as_raw();
        let start = proc::stat(parent).unwrap().starttime;
        assert!(is_anothers(Some(&format!("{MARK}{parent} {start}"))));
    }
}
