//! Clauses as the agent knows them, and how lists of CIDRs become the entries of a longest-prefix-match trie.

use core::{fmt, net::IpAddr, str::FromStr};
use std::{
    collections::{BTreeMap, BTreeSet},
    string::String,
    vec::Vec,
};

use crate::{
    packet::{Address, Protocol},
    table::Dimension,
};

/// An address prefix. Host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    v6: bool,
    /// The address, from the top bit down.
    bits: u128,
    len: u8,
}

impl Cidr {
    /// The prefix of this length around an address. `None` where the length is more than the address has bits.
    #[must_use]
    pub fn new(address: IpAddr, len: u8) -> Option<Self> {
        let (v6, bits) = match address {
            IpAddr::V4(a) => (false, u128::from(u32::from(a)) << 96),
            IpAddr::V6(a) => (true, u128::from(a)),
        };
        let most = if v6 { 128 } else { 32 };
        (len <= most).then(|| Self { v6, bits: bits & mask(len), len })
    }

    /// Length of the prefix in bits.
    #[must_use]
    pub fn prefix_len(&self) -> u8 {
        self.len
    }

    /// The first address of the prefix.
    #[must_use]
    pub fn address(&self) -> Address {
        let bytes = self.bits.to_be_bytes();
        if self.v6 { Address::V6(bytes) } else { Address::V4([bytes[0], bytes[1], bytes[2], bytes[3]]) }
    }

    /// Whether every address of `other` is in this prefix.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.v6 == other.v6 && self.len <= other.len && other.bits & mask(self.len) == self.bits
    }
}

fn mask(len: u8) -> u128 {
    if len == 0 { 0 } else { u128::MAX << (128 - u32::from(len)) }
}

impl FromStr for Cidr {
    type Err = String;

    /// Reads `10.0.0.0/8`, `fd00::/64`, or a single address.
    fn from_str(s: &str) -> Result<Self, String> {
        let (address, len) = match s.split_once('/') {
            Some((address, len)) => (address, Some(len)),
            None => (s, None),
        };
        let address: IpAddr = address.parse().map_err(|_| String::from("not an IP address"))?;
        let most = if address.is_ipv6() { 128 } else { 32 };
        let len = match len {
            Some(len) => len.parse().map_err(|_| String::from("the prefix length is not a number"))?,
            None => most,
        };
        Self::new(address, len).ok_or_else(|| std::format!("the prefix is longer than {most} bits"))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = match self.address() {
            Address::V4(a) => IpAddr::from(a),
            Address::V6(a) => IpAddr::from(a),
        };
        write!(f, "{address}/{}", self.len)
    }
}

/// Ports from the first to the last, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// The first.
    pub first: u16,
    /// The last, not less than the first.
    pub last: u16,
}

/// Flags that a TCP header must have, and those it must not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flags {
    /// All of these are set.
    pub set: u8,
    /// None of these is.
    pub clear: u8,
}

impl Flags {
    fn allow(self, flags: u8) -> bool {
        flags & self.set == self.set && flags & self.clear == 0
    }
}

/// One peer of a rule: a packet matches where every dimension does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Clause {
    /// A packet that matches is none of the rule's, whatever its other clauses say.
    pub except: bool,
    /// Whether packets that leave the target match.
    pub egress: bool,
    /// Whether packets that arrive at the target match.
    pub ingress: bool,
    /// Addresses of the peer; none: any.
    pub cidrs: Vec<Cidr>,
    /// Ports of the peer; none: any, and packets without ports.
    pub peer_ports: Vec<Ports>,
    /// Ports of the target; none: any, and packets without ports.
    pub local_ports: Vec<Ports>,
    /// The protocol; none: any.
    pub protocol: Option<Protocol>,
    /// Code points; none: any.
    pub dscp: Vec<u8>,
    /// VLAN ids, 0 for untagged; none: any.
    pub vlans: Vec<u16>,
    /// ICMP types; none: any, and what is no ICMP.
    pub icmp_types: Vec<u8>,
    /// TCP flags; none: any, and what is no TCP.
    pub tcp_flags: Option<Flags>,
    /// Only fragments, or none of them; none: both.
    pub fragments: Option<bool>,
    /// Ids of the cgroups (v2) whose sockets it is about; `None`: any, and no socket at all.
    pub cgroups: Option<Vec<u64>>,
}

impl Clause {
    /// The values it asks for in a dimension. `None` where it takes any.
    #[must_use]
    pub fn values(&self, dimension: Dimension) -> Option<Vec<u16>> {
        let ports = |ranges: &[Ports]| {
            (!ranges.is_empty()).then(|| ranges.iter().flat_map(|p| p.first..=p.last).collect())
        };
        let list =
            |values: &[u8]| (!values.is_empty()).then(|| values.iter().copied().map(u16::from).collect());
        match dimension {
            Dimension::PeerPort => ports(&self.peer_ports),
            Dimension::LocalPort => ports(&self.local_ports),
            Dimension::Vlan => (!self.vlans.is_empty()).then(|| self.vlans.clone()),
            Dimension::Dscp => list(&self.dscp),
            Dimension::Icmp => list(&self.icmp_types),
            Dimension::Flags => {
                self.tcp_flags.map(|flags| (0..=255).filter(|&f| flags.allow(f as u8)).collect())
            }
            Dimension::Fragment => self.fragments.map(|only| Vec::from([u16::from(only)])),
        }
    }

    /// Whether it asks for nothing but addresses, ports and protocol.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        let rare = [Dimension::Vlan, Dimension::Dscp, Dimension::Icmp, Dimension::Flags, Dimension::Fragment];
        rare.into_iter().all(|dimension| self.values(dimension).is_none())
    }

    /// Whether every packet that `other` matches is matched by this one. May say no where it is hard to tell.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        let within = |mine: Option<Vec<u16>>, theirs: Option<Vec<u16>>| match (mine, theirs) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(mine), Some(theirs)) => {
                let mine: BTreeSet<u16> = mine.into_iter().collect();
                theirs.iter().all(|value| mine.contains(value))
            }
        };
        (self.egress || !other.egress)
            && (self.ingress || !other.ingress)
            && (self.protocol.is_none() || self.protocol == other.protocol)
            && (self.cidrs.is_empty()
                || (!other.cidrs.is_empty()
                    && other.cidrs.iter().all(|theirs| self.cidrs.iter().any(|mine| mine.covers(theirs)))))
            && Dimension::ALL.into_iter().all(|d| within(self.values(d), other.values(d)))
            && match (&self.cgroups, &other.cgroups) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(mine), Some(theirs)) => theirs.iter().all(|id| mine.contains(id)),
            }
    }
}

/// The entries of the trie for clauses at given bits. The lookup finds only the longest prefix, so each entry carries
/// the bits of every prefix that covers it.
#[must_use]
pub fn prefixes<'a>(clauses: impl IntoIterator<Item = (usize, &'a Clause)>) -> BTreeMap<Cidr, u64> {
    let mut entries = BTreeMap::new();
    for (bit, clause) in clauses {
        for cidr in &clause.cidrs {
            *entries.entry(*cidr).or_insert(0) |= 1 << bit;
        }
    }
    // In this order a prefix comes after all that cover it, and what lies between them is covered too.
    let mut covering: Vec<(Cidr, u64)> = Vec::new();
    for (cidr, set) in &mut entries {
        while covering.pop_if(|(last, _)| !last.covers(cidr)).is_some() {}
        *set |= covering.last().map_or(0, |(_, set)| *set);
        covering.push((*cidr, *set));
    }
    entries
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};
    use std::{boxed::Box, cell::Cell, string::ToString};

    use super::*;
    use crate::{
        matching::{self, Lookup},
        packet::{Maybe, Packet, Peer},
        sieve::{self, Sieve},
        table::{Direction, Table},
    };

    fn cidr(s: &str) -> Cidr {
        s.parse().unwrap()
    }

    #[test]
    fn cidrs_are_read_and_written() {
        assert_eq!(cidr("10.1.2.3/8").to_string(), "10.0.0.0/8");
        assert_eq!(cidr("10.1.2.3").to_string(), "10.1.2.3/32");
        assert_eq!(cidr("fd00::1/64").to_string(), "fd00::/64");
        assert_eq!(cidr("::/0").to_string(), "::/0");
        for wrong in
            ["10.0.0.0/33", "::/129", "10.0.0/8", "redis", "10.0.0.1/", "10.0.0.1/x", "", "10.0.0.1/-1"]
        {
            assert!(wrong.parse::<Cidr>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_longer_prefix_carries_the_bits_of_the_shorter() {
        let clause = |cidrs: &[&str]| Clause {
            egress: true,
            ingress: true,
            cidrs: cidrs.iter().map(|s| cidr(s)).collect(),
            ..Clause::default()
        };
        let (a, b) = (clause(&["10.0.0.0/8", "10.2.0.0/16"]), clause(&["10.1.0.0/16", "10.1.2.0/24"]));
        let c = clause(&["0.0.0.0/0", "fd00::/8"]);
        let entries = prefixes([(0, &a), (1, &b), (2, &c)]);
        let of = |s: &str| entries[&cidr(s)];
        assert_eq!(of("0.0.0.0/0"), 0b100);
        assert_eq!(of("10.0.0.0/8"), 0b101);
        assert_eq!(of("10.1.0.0/16"), 0b111);
        assert_eq!(of("10.1.2.0/24"), 0b111);
        assert_eq!(of("10.2.0.0/16"), 0b101);
        assert_eq!(of("fd00::/8"), 0b100);
    }

    /// The kernel's maps, done plainly.
    struct Maps<'a> {
        sieve: Sieve,
        trie: BTreeMap<Cidr, u64>,
        clauses: &'a [Clause],
        /// Whether the trie was asked.
        asked: Cell<bool>,
    }

    impl Lookup for Maps<'_> {
        fn may_be_peer(&self, peer: &Peer) -> bool {
            sieve::passes(self.sieve.grains, peer, |word| self.sieve.words[word])
        }

        fn peer(&self, peer: Peer) -> u64 {
            self.asked.set(true);
            let host = host(peer.address());
            let best = self.trie.iter().filter(|(c, _)| c.covers(&host)).max_by_key(|(c, _)| c.len);
            best.map_or(0, |(_, set)| *set)
        }

        fn value(&self, dimension: Dimension, value: u16) -> u64 {
            bits(self.clauses, |c| c.values(dimension).is_some_and(|values| values.contains(&value)))
        }

        fn cgroup(&self) -> u64 {
            bits(self.clauses, |c| c.cgroups.as_ref().is_some_and(|ids| ids.contains(&CGROUP)))
        }
    }

    /// The cgroup of every packet in these tests.
    const CGROUP: u64 = 3;

    fn host(address: Address) -> Cidr {
        match address {
            Address::V4(a) => Cidr::new(IpAddr::from(a), 32).unwrap(),
            Address::V6(a) => Cidr::new(IpAddr::from(a), 128).unwrap(),
        }
    }

    fn bits(clauses: &[Clause], f: impl Fn(&Clause) -> bool) -> u64 {
        clauses.iter().enumerate().filter(|(_, c)| f(c)).fold(0, |set, (i, _)| set | 1 << i)
    }

    /// What a person means by a clause.
    fn means(clause: &Clause, packet: &Packet, way: Direction) -> bool {
        let within = |ports: &[Ports], port: Option<u16>| match port {
            _ if ports.is_empty() => true,
            Some(port) => ports.iter().any(|p| (p.first..=p.last).contains(&port)),
            None => false,
        };
        (match way {
            Direction::Egress => clause.egress,
            Direction::Ingress => clause.ingress,
        }) && clause.protocol.is_none_or(|p| p as u64 == packet.kind)
            && (clause.cidrs.is_empty()
                || clause.cidrs.iter().any(|c| c.covers(&host(packet.peer.address()))))
            && within(&clause.peer_ports, packet.ports().map(|p| p.0))
            && within(&clause.local_ports, packet.ports().map(|p| p.1))
            && (clause.dscp.is_empty() || clause.dscp.iter().any(|&d| u64::from(d) == packet.dscp))
            && (clause.vlans.is_empty() || clause.vlans.iter().any(|&v| u64::from(v) == packet.vlan))
            && (clause.icmp_types.is_empty()
                || packet.icmp_type.get().is_some_and(|t| clause.icmp_types.contains(&(t as u8))))
            && clause
                .tcp_flags
                .is_none_or(|flags| packet.tcp_flags.get().is_some_and(|f| flags.allow(f as u8)))
            && clause.fragments.is_none_or(|only| only == packet.is_fragment())
            && clause.cgroups.as_ref().is_none_or(|ids| ids.contains(&CGROUP))
    }

    fn protocols() -> impl Strategy<Value = Protocol> {
        prop_oneof![Just(Protocol::Other), Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Icmp)]
    }

    // Few different values, so that they meet.
    fn addresses() -> impl Strategy<Value = Address> {
        prop_oneof![
            (0..3_u8, 0..3_u8).prop_map(|(a, b)| Address::V4([10, a, 0, b])),
            (0..3_u8, 0..3_u8)
                .prop_map(|(a, b)| { Address::V6([0xfd, a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b]) }),
        ]
    }

    fn cidrs() -> impl Strategy<Value = Cidr> {
        (addresses(), 0..=128_u8).prop_map(|(address, len)| match address {
            Address::V4(a) => Cidr::new(IpAddr::from(a), len / 4).unwrap(),
            Address::V6(a) => Cidr::new(IpAddr::from(a), len).unwrap(),
        })
    }

    fn ports() -> impl Strategy<Value = Ports> {
        (0..12_u16, 0..4_u16).prop_map(|(first, more)| Ports { first, last: first + more })
    }

    prop_compose! {
        fn clauses()(
            egress: bool, ingress: bool, cidrs in vec(cidrs(), 0..6), peer_ports in vec(ports(), 0..3),
            local_ports in vec(ports(), 0..3), protocol in option::of(protocols()), dscp in vec(0..4_u8, 0..2),
            vlans in vec(0..3_u16, 0..2), icmp_types in vec(0..4_u8, 0..2),
            tcp_flags in option::weighted(0.2, (0..8_u8, 0..8_u8).prop_map(|(set, clear)| Flags { set, clear })),
            fragments in option::weighted(0.2, any::<bool>()), cgroups in option::weighted(0.2, vec(0..5_u64, 0..4)),
        ) -> Clause {
            Clause {
                except: false, egress, ingress, cidrs, peer_ports, local_ports, protocol, dscp, vlans, icmp_types,
                tcp_flags, fragments, cgroups,
            }
        }
    }

    prop_compose! {
        fn packets()(
            peer in addresses(), protocol in protocols(), ports in option::of((0..16_u16, 0..16_u16)),
            tcp_flags in option::of(0..8_u32), icmp_type in option::of(0..5_u32), dscp in 0..5_u64, fragment in 0..2_u64,
            vlan in 0..4_u64,
        ) -> Packet {
            let maybe = |number: Option<u32>| number.map_or(Maybe::NONE, Maybe::some);
            Packet {
                peer: Peer::from(peer),
                kind: protocol as u64,
                port_pair: maybe(ports.map(|(peer, local)| u32::from(peer) << 16 | u32::from(local))),
                tcp_flags: maybe(tcp_flags),
                icmp_type: maybe(icmp_type),
                dscp,
                fragment,
                vlan,
            }
        }
    }

    proptest! {
        #[test]
        fn bit_vectors_say_what_the_clauses_mean(
            clauses in vec(clauses(), 0..64), packets in vec(packets(), 1..50),
        ) {
            let table = Box::new(Table::default());
            for (way, i) in [(Direction::Egress, 0), (Direction::Ingress, 1)] {
                let live = bits(&clauses, |c| if i == 0 { c.egress } else { c.ingress });
                table.live[way as usize].store(live);
            }
            table.any_peer.store(bits(&clauses, |c| c.cidrs.is_empty()));
            for d in Dimension::ALL {
                table.any[d as usize].store(bits(&clauses, |c| c.values(d).is_none()));
            }
            table.any_cgroup.store(bits(&clauses, |c| c.cgroups.is_none()));
            table.plain.store(bits(&clauses, Clause::is_plain));
            for p in [Protocol::Other, Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
                let set = bits(&clauses, |c| c.protocol.is_none_or(|q| p == q));
                table.protocol[p as usize].store(set);
            }
            let trie = prefixes(clauses.iter().enumerate());
            let maps = Maps { sieve: Sieve::new(trie.keys()), trie, clauses: &clauses, asked: Cell::new(false) };
            for packet in &packets {
                for way in [Direction::Egress, Direction::Ingress] {
                    maps.asked.set(false);
                    let set = matching::by_network(&table, matching::live(&table, way), packet, &maps);
                    let set = matching::by_transport(&table, set, packet, &maps);
                    prop_assert_eq!(set, bits(&clauses, |c| means(c, packet, way)), "{:?} {:?}", packet, way);
                    // It is dear: only the answer may be left to know.
                    let but_for_peers = |c: &Clause| Clause { cidrs: Vec::new(), cgroups: None, ..c.clone() };
                    let mut with_peers = clauses.iter().filter(|c| !c.cidrs.is_empty());
                    prop_assert!(!maps.asked.get() || with_peers.any(|c| means(&but_for_peers(c), packet, way)));
                }
            }
        }
    }

    /// One that covers another matches whatever that one does.
    #[test]
    fn what_covers_covers() {
        let clause = |cidrs: &[&str], ports: &[(u16, u16)]| Clause {
            egress: true,
            ingress: true,
            cidrs: cidrs.iter().map(|s| cidr(s)).collect(),
            peer_ports: ports.iter().map(|&(first, last)| Ports { first, last }).collect(),
            ..Clause::default()
        };
        let all = clause(&[], &[]);
        let net = clause(&["10.0.0.0/8"], &[]);
        let host = clause(&["10.0.0.7"], &[(6379, 6379)]);
        assert!(all.covers(&net) && all.covers(&host) && net.covers(&host) && net.covers(&net));
        assert!(!net.covers(&all) && !host.covers(&net));
        assert!(!clause(&["10.0.0.0/8"], &[(80, 90)]).covers(&host));
        assert!(!Clause { ingress: false, ..clause(&[], &[]) }.covers(&host));
    }
}
