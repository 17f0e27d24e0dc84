//! Two namespaces and a wire.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use squall_lab::{Netns, Wire, need_root, unique};

/// Two network namespaces connected by a veth pair, both up, with addresses of both families. Gone when dropped.
#[derive(Debug)]
pub struct Lab {
    /// The near side: what the tests hurt. Its interface is `near0`.
    pub near: Netns,
    /// The far side. Its interface is `far0`.
    pub far: Netns,
}

impl Lab {
    /// IPv4 address of the near side.
    pub const NEAR: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));
    /// IPv4 address of the far side.
    pub const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 2));
    /// A second IPv4 address of the far side, for what must stay whole.
    pub const FAR_OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 3));
    /// IPv6 address of the near side.
    pub const NEAR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1));
    /// IPv6 address of the far side.
    pub const FAR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 2));

    /// Makes the lab. `tag` goes into the names of its namespaces: `squall-<tag>-<pid>-<n>-near`.
    pub fn new(tag: &str) -> Result<Self> {
        need_root()?;
        let name = unique(tag);
        let lab = Self { near: Netns::new(format!("{name}-near"))?, far: Netns::new(format!("{name}-far"))? };
        Netns::connect(
            Wire { netns: &lab.near, interface: "near0", v4: "10.99.0.1", v6: "fd99::1" },
            Wire { netns: &lab.far, interface: "far0", v4: "10.99.0.2", v6: "fd99::2" },
        )?;
        lab.far.ip("addr add 10.99.0.3/24 dev far0")?;
        Ok(lab)
    }
}
