//! From a packet to the clauses it satisfies.

use crate::{
    packet::{Packet, Peer},
    table::{Dimension, Direction, Table},
};

/// The dimensions that need a map of their own.
pub trait Lookup {
    /// Whether any CIDR may cover this address. That is known quickly, and of most addresses none does.
    fn may_be_peer(&self, peer: &Peer) -> bool;
    /// Clauses with a CIDR that covers this address. It takes longer than all that can be asked before it.
    fn peer(&self, peer: Peer) -> u64;
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

/// Whether there are clauses in the set that are not in `any`.
#[inline(always)]
fn asks(set: u64, any: u64) -> bool {
    set | any != any
}

#[inline(always)]
fn narrow(table: &Table, set: u64, maps: &impl Lookup, dimension: Dimension, value: Option<u32>) -> u64 {
    let any = table.any[dimension as usize].load();
    if asks(set, any) { set & (any | value.map_or(0, |v| maps.value(dimension, v as u16))) } else { set }
}

/// The clauses of `live` that the packet may satisfy by its network layer. No lookup is made whose answer cannot
/// matter.
#[inline(always)]
#[must_use]
pub fn by_network(table: &Table, live: u64, packet: &Packet, maps: &impl Lookup) -> u64 {
    let mut set = live & table.protocol[packet.kind as usize & 3].load();
    // Peers first: most packets are of nobody that a rule names, and what else is in their headers need not be looked at.
    let any = table.any_peer.load();
    if asks(set, any) && !maps.may_be_peer(&packet.peer) {
        set &= any;
    }
    if asks(set, table.plain.load()) {
        set = narrow(table, set, maps, Dimension::Vlan, Some(packet.vlan as u32));
        set = narrow(table, set, maps, Dimension::Dscp, Some(packet.dscp as u32));
        set = narrow(table, set, maps, Dimension::Fragment, Some(u32::from(packet.is_fragment())));
    }
    set
}

/// The clauses of `set` that the packet satisfies in the rest.
#[inline(always)]
#[must_use]
pub fn by_transport(table: &Table, set: u64, packet: &Packet, maps: &impl Lookup) -> u64 {
    let mut set = set;
    set = narrow(table, set, maps, Dimension::PeerPort, packet.port_pair.get().map(|pair| pair >> 16));
    if set == 0 {
        return 0;
    }
    set = narrow(table, set, maps, Dimension::LocalPort, packet.port_pair.get());
    if set == 0 {
        return 0;
    }
    if asks(set, table.plain.load()) {
        set = narrow(table, set, maps, Dimension::Icmp, packet.icmp_type.get());
        set = narrow(table, set, maps, Dimension::Flags, packet.tcp_flags.get());
    }
    let any = table.any_peer.load();
    if asks(set, any) {
        set &= any | maps.peer(packet.peer);
    }
    let any = table.any_cgroup.load();
    if asks(set, any) {
        set &= any | maps.cgroup();
    }
    set
}
