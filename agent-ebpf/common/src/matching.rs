//! From a packet to the clauses it satisfies.

use crate::{
    packet::{Address, Packet},
    table::{Dimension, Direction, Table},
};

/// The dimensions that need a map of their own.
pub trait Lookup {
    /// Clauses with a CIDR that covers this address.
    fn peer(&self, address: Address) -> u64;
    /// Clauses that name this value.
    fn value(&self, dimension: Dimension, value: u16) -> u64;
    /// Clauses that name the cgroup of the packet's socket on this host. Asked last, for it is dear.
    fn cgroup(&self) -> u64;
}

/// The clauses in force for one direction. Zero is the common case, and costs nothing more.
#[inline(always)]
#[must_use]
pub fn live(table: &Table, way: Direction) -> u64 {
    match way {
        Direction::Egress => table.live[0].load(),
        Direction::Ingress => table.live[1].load(),
    }
}

/// The clauses of `live` that the packet satisfies. Cheap dimensions first, and no lookup whose answer cannot matter.
#[inline(always)]
#[must_use]
pub fn candidates(table: &Table, live: u64, packet: &Packet, maps: &impl Lookup) -> u64 {
    let mut set = live & table.protocol[packet.protocol as usize & 3].load();
    let narrow = |set: u64, dimension: Dimension, value: Option<u32>| {
        let any = table.any[dimension as usize].load();
        if set & !any == 0 { set } else { set & (any | value.map_or(0, |v| maps.value(dimension, v as u16))) }
    };
    set = narrow(set, Dimension::PeerPort, packet.port_pair.get().map(|pair| pair >> 16));
    set = narrow(set, Dimension::LocalPort, packet.port_pair.get());
    let plain = table.plain.load();
    if set & !plain != 0 {
        set = narrow(set, Dimension::Vlan, Some(u32::from(packet.vlan)));
        set = narrow(set, Dimension::Dscp, Some(u32::from(packet.dscp)));
        set = narrow(set, Dimension::Icmp, packet.icmp_type.get());
        set = narrow(set, Dimension::Flags, packet.tcp_flags.get());
        set = narrow(set, Dimension::Fragment, Some(u32::from(packet.fragment)));
    }
    let any = table.any_peer.load();
    if set & !any != 0 {
        set &= any | maps.peer(packet.peer);
    }
    let any = table.any_cgroup.load();
    if set & !any != 0 {
        set &= any | maps.cgroup();
    }
    set
}
