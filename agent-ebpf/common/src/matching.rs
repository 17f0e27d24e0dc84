//! From a packet to the clauses it satisfies.

use crate::{
    packet::{Address, Packet},
    table::{Direction, Table},
};

/// The dimensions that need a map of their own.
pub trait Lookup {
    /// Clauses with a CIDR that covers this address.
    fn peer(&self, address: Address) -> u64;
    /// Clauses that name this port of the peer.
    fn peer_port(&self, port: u16) -> u64;
    /// Clauses that name this port of the target.
    fn local_port(&self, port: u16) -> u64;
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

    let any = table.any_peer_port.load();
    if set & !any != 0 {
        set &= any | packet.ports.map_or(0, |(peer, _)| maps.peer_port(peer));
    }
    let any = table.any_local_port.load();
    if set & !any != 0 {
        set &= any | packet.ports.map_or(0, |(_, local)| maps.local_port(local));
    }
    let any = table.any_peer.load();
    if set & !any != 0 {
        set &= any | maps.peer(packet.peer);
    }
    set
}
