//! A line: a veth pair of our own, with `sch_fq` at both ends, through which packets of an interface take a detour to be
//! late. What goes in at one end comes out of the other, so one pair serves both directions.
//!
//! The interface itself keeps its qdiscs. The pair needs no process: when the agent dies, packets still come through. It
//! stays until it is removed, and is found by its name.

use anyhow::Result;

use super::tc::Netlink;

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

impl Line {
    /// Makes the line of an interface in the calling thread's network namespace. What a dead agent left there goes first.
    pub fn create(netlink: &mut Netlink, interface: u32, outside: bool) -> Result<Self> {
        Self::remove(netlink, interface, outside)?;
        let names = names(interface, outside);
        let ends = netlink.add_veth([&names[0], &names[1]])?;
        for end in ends {
            if let Err(error) = netlink.set_root_fq(end) {
                netlink.remove_link(ends[0])?;
                return Err(error);
            }
        }
        Ok(Self { ends })
    }

    /// Packets that are on their way.
    pub fn packets(&self, netlink: &mut Netlink) -> Result<u32> {
        let mut packets = 0;
        for end in self.ends {
            packets += netlink.root_qdisc(end)?.map_or(0, |root| root.packets);
        }
        Ok(packets)
    }

    /// Removes the line of an interface. One that is not there is a success.
    pub fn remove(netlink: &mut Netlink, interface: u32, outside: bool) -> Result<()> {
        let names = names(interface, outside);
        // Both, should one have been moved away from the other.
        for found in netlink.interfaces()?.iter().filter(|i| names.contains(&i.name)) {
            netlink.remove_link(found.index)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let all = [names(u32::MAX, false), names(u32::MAX, true)].concat();
        assert!(all.iter().all(|name| name.len() < libc::IFNAMSIZ), "{all:?}");
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
    }
}
