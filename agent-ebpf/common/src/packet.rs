//! From bytes to what rules can ask for.

use crate::{decide::hash, table::Direction};

/// What a rule can ask for in the protocol dimension. The values index [`crate::table::Table::protocol`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Protocol {
    /// Neither of the others.
    Other = 0,
    /// TCP.
    Tcp = 1,
    /// UDP.
    Udp = 2,
    /// ICMP and `ICMPv6`, except neighbour discovery.
    Icmp = 3,
}

/// The address of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// IPv4.
    V4([u8; 4]),
    /// IPv6.
    V6([u8; 16]),
}

/// A number or none. Unlike an `Option` it has no bytes that mean nothing where there is none: the verifier lets no program
/// copy those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Maybe(u64);

impl Maybe {
    /// No number.
    pub const NONE: Self = Self(u64::MAX);

    /// A number.
    #[inline(always)]
    #[must_use]
    pub const fn some(number: u32) -> Self {
        Self(number as u64)
    }

    /// The number, where there is one.
    #[inline(always)]
    #[must_use]
    pub fn get(self) -> Option<u32> {
        if self.0 == u64::MAX { None } else { Some(self.0 as u32) }
    }
}

/// The address of a packet's peer as numbers, all of which are there for both versions: what one of them does not have, the
/// compiler reads where it needs it soon, and the verifier of 5.10 lets nothing be read that was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// 1 for IPv6, otherwise 0.
    pub v6: u64,
    /// The first half of an IPv6 address; otherwise 0.
    pub high: u64,
    /// The second half, or an IPv4 address.
    pub low: u64,
}

impl From<Address> for Peer {
    #[inline(always)]
    fn from(address: Address) -> Self {
        match address {
            Address::V4(a) => Self { v6: 0, high: 0, low: u64::from(u32::from_be_bytes(a)) },
            Address::V6([a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7]) => Self {
                v6: 1,
                high: u64::from_be_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
                low: u64::from_be_bytes([b0, b1, b2, b3, b4, b5, b6, b7]),
            },
        }
    }
}

impl Peer {
    #[inline(always)]
    fn forgotten(self, bytes: &(impl Bytes + ?Sized)) -> Self {
        Self { v6: bytes.forget(self.v6) & 1, high: bytes.forget(self.high), low: bytes.forget(self.low) }
    }

    /// What it is looked up by.
    #[inline(always)]
    #[must_use]
    pub fn address(self) -> Address {
        if self.v6 == 0 {
            return Address::V4((self.low as u32).to_be_bytes());
        }
        let ([a0, a1, a2, a3, a4, a5, a6, a7], [b0, b1, b2, b3, b4, b5, b6, b7]) =
            (self.high.to_be_bytes(), self.low.to_be_bytes());
        Address::V6([a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7])
    }
}

/// A packet, seen from the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The remote address: destination at egress, source at ingress.
    pub peer: Peer,
    /// The transport protocol, a [`Protocol`].
    pub kind: u64,
    /// The peer's port in the upper half, the target's in the lower. None for protocols without ports and for every fragment
    /// but the first: those match only rules that ask for no port.
    pub port_pair: Maybe,
    /// Flags of a TCP header, as in the header. None where there is none to be seen.
    pub tcp_flags: Maybe,
    /// Type of an ICMP or `ICMPv6` message.
    pub icmp_type: Maybe,
    /// The code point of the traffic class, 0 to 63.
    pub dscp: u64,
    /// What says that it is a fragment, the first one included; otherwise 0.
    pub(crate) fragment: u64,
    /// Id of the outermost VLAN tag; 0 where there is none, or one that is only a priority.
    pub vlan: u64,
}

impl Packet {
    /// Ports of the peer and of the target.
    #[inline(always)]
    #[must_use]
    pub fn ports(&self) -> Option<(u16, u16)> {
        self.port_pair.get().map(|pair| ((pair >> 16) as u16, pair as u16))
    }

    /// Whether it is a fragment, the first one included.
    #[inline(always)]
    #[must_use]
    pub fn is_fragment(&self) -> bool {
        self.fragment != 0
    }

    /// A number that all packets of one flow share, whichever way they go.
    #[inline(always)]
    #[must_use]
    pub fn flow(&self) -> u64 {
        let rest = self.kind << 32 | u64::from(self.port_pair.get().unwrap_or(0));
        hash(self.peer.high, self.peer.low, rest)
    }
}

/// Where a packet's bytes come from: the kernel's helper in eBPF, a slice in tests.
pub trait Bytes {
    /// `N` numbers of four bytes each, the most significant first, from an offset on, or `None` past the end. Of single bytes LLVM would make
    /// an instruction each, and more to put them together.
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]>;

    /// The byte at an offset, or `None` past the end.
    fn byte(&self, offset: usize) -> Option<u8>;

    /// The same number, of which the verifier knows nothing any more. It follows a program once for each thing it knows: a
    /// header that may be in ten places would have all that comes after it looked at ten times.
    fn forget(&self, number: u64) -> u64 {
        number
    }
}

impl Bytes for [u8] {
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        let (words, _) = self.get(offset..)?.as_chunks();
        let mut numbers = [0; N];
        for (number, word) in numbers.iter_mut().zip(words.get(..N)?) {
            *number = u32::from_be_bytes(*word);
        }
        Some(numbers)
    }

    fn byte(&self, offset: usize) -> Option<u8> {
        self.get(offset).copied()
    }
}

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;

/// The id in a VLAN tag, beside priority and drop eligibility.
pub const VLAN_ID: u16 = 0x0fff;

const IPPROTO_HOPOPTS: u8 = 0;
const IPPROTO_ICMP: u8 = 1;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const IPPROTO_DCCP: u8 = 33;
const IPPROTO_ROUTING: u8 = 43;
const IPPROTO_FRAGMENT: u8 = 44;
const IPPROTO_AH: u8 = 51;
const IPPROTO_ICMPV6: u8 = 58;
const IPPROTO_DSTOPTS: u8 = 60;
const IPPROTO_SCTP: u8 = 132;
const IPPROTO_UDPLITE: u8 = 136;

/// Longest chain of IPv6 extension headers that is followed. A packet with more has no ports for us.
const EXTENSIONS: usize = 6;
/// Most VLAN tags in the packet itself (one more may be in the kernel's metadata).
const TAGS: usize = 2;

/// A packet of which only the network layer was read. Most packets are nobody's by then.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    /// The packet, as if it had no transport.
    pub packet: Packet,
    next: u64,
    /// Where the transport's header begins; 0 where there is none to be seen.
    offset: usize,
}

/// Behind the longest chain of headers that is followed.
const FARTHEST: usize = 0x7fff;

impl Head {
    /// Reads the transport's header. `None` for neighbour discovery: see [`head`].
    #[inline(always)]
    #[must_use]
    pub fn complete(&self, bytes: &(impl Bytes + ?Sized), way: Direction) -> Option<Packet> {
        let mut packet = self.packet;
        if self.offset != 0 {
            let inner = inner(bytes, self.next as u8, self.offset, way);
            // Router and neighbour solicitation and advertisement, redirect: RFC 4861, section 4.
            if self.next == u64::from(IPPROTO_ICMPV6)
                && inner.icmp_type.get().is_some_and(|kind| (133..=137).contains(&kind))
            {
                return None;
            }
            packet.port_pair = Maybe(bytes.forget(inner.port_pair.0));
            packet.tcp_flags = Maybe(bytes.forget(inner.tcp_flags.0));
            packet.icmp_type = Maybe(bytes.forget(inner.icmp_type.0));
        }
        Some(packet)
    }
}

/// Reads a packet: [`head`], then [`Head::complete`].
#[inline(always)]
pub fn parse(
    bytes: &(impl Bytes + ?Sized),
    ethertype: u16,
    vlan: u16,
    offset: usize,
    way: Direction,
) -> Option<Packet> {
    head(bytes, ethertype, vlan, offset, way)?.complete(bytes, way)
}

/// Reads a packet's network layer. `ethertype` is `skb->protocol` in host order: what follows the link layer, and any VLAN tag that the
/// kernel took off into its metadata, whose id is `vlan`. `offset` is the length of the link layer's header.
///
/// `None` for what no rule can match: everything but IP, ARP among it, and its like in IPv6, neighbour discovery.
/// Without those a network is not broken but dead, and heals late because neighbours have to be found again.
#[inline(always)]
pub fn head(
    bytes: &(impl Bytes + ?Sized),
    ethertype: u16,
    vlan: u16,
    offset: usize,
    way: Direction,
) -> Option<Head> {
    let mut ethertype = ethertype;
    let mut offset = offset;
    let mut vlan = vlan;
    for _ in 0..TAGS {
        if ethertype != ETH_P_8021Q && ethertype != ETH_P_8021AD {
            break;
        }
        let [tag] = bytes.words(offset)?;
        if vlan == 0 {
            vlan = (tag >> 16) as u16 & VLAN_ID;
        }
        ethertype = tag as u16;
        offset += 4;
    }
    let ethertype = bytes.forget(u64::from(ethertype));
    let offset = bytes.forget(offset as u64) as usize & FARTHEST;
    let vlan = bytes.forget(u64::from(vlan)) as u16 & VLAN_ID;
    if ethertype == u64::from(ETH_P_IP) {
        parse_v4(bytes, offset, vlan, way)
    } else if ethertype == u64::from(ETH_P_IPV6) {
        parse_v6(bytes, offset, vlan, way)
    } else {
        None
    }
}

#[inline(always)]
fn parse_v4(bytes: &(impl Bytes + ?Sized), offset: usize, vlan: u16, way: Direction) -> Option<Head> {
    let [first, second, third, source, destination] = bytes.words(offset)?;
    let length = (first >> 24 & 0x0f) as usize * 4;
    let fragments = second as u16;
    let peer = match way {
        Direction::Egress => destination,
        Direction::Ingress => source,
    };
    let next = (third >> 16) as u8;
    let transport = if fragments << 3 == 0 { offset + length } else { 0 };
    Some(Head {
        packet: Packet {
            peer: Peer { v6: 0, high: 0, low: u64::from(peer) }.forgotten(bytes),
            kind: kind(bytes, next),
            port_pair: Maybe::NONE,
            tcp_flags: Maybe::NONE,
            icmp_type: Maybe::NONE,
            dscp: u64::from(first >> 18 & 0x3f),
            fragment: bytes.forget(u64::from(fragments & 0x3fff)),
            vlan: u64::from(vlan),
        },
        next: u64::from(next),
        offset: bytes.forget(transport as u64) as usize & FARTHEST,
    })
}

#[inline(always)]
fn parse_v6(bytes: &(impl Bytes + ?Sized), offset: usize, vlan: u16, way: Direction) -> Option<Head> {
    let [first, second] = bytes.words(offset)?;
    let dscp = first >> 22 & 0x3f;
    let mut next = (second >> 8) as u8;
    let [a, b, c, d] = bytes.words(match way {
        Direction::Egress => offset + 24,
        Direction::Ingress => offset + 8,
    })?;
    let peer =
        Peer { v6: 1, high: u64::from(a) << 32 | u64::from(b), low: u64::from(c) << 32 | u64::from(d) };
    let mut offset = offset + 40;
    let mut fragment = false;
    let mut later = false;
    for _ in 0..EXTENSIONS {
        let length = match next {
            IPPROTO_HOPOPTS | IPPROTO_ROUTING | IPPROTO_DSTOPTS | IPPROTO_FRAGMENT | IPPROTO_AH => {
                let [header] = bytes.words(offset)?;
                let length = (header >> 16 & 0xff) as usize;
                let length = match next {
                    IPPROTO_FRAGMENT => {
                        // Offset, and whether more fragments follow.
                        fragment = header & 0xfff9 != 0;
                        later = header & 0xfff8 != 0;
                        8
                    }
                    IPPROTO_AH => (length + 2) * 4,
                    _ => (length + 1) * 8,
                };
                next = (header >> 24) as u8;
                length
            }
            _ => break,
        };
        offset = bytes.forget((offset + length) as u64) as usize & FARTHEST;
        next = bytes.forget(u64::from(next)) as u8;
        fragment = bytes.forget(u64::from(fragment)) & 1 != 0;
        later = bytes.forget(u64::from(later)) & 1 != 0;
        if later {
            break;
        }
    }
    let next = bytes.forget(u64::from(next)) as u8;
    let transport = if later { 0 } else { offset };
    Some(Head {
        packet: Packet {
            peer: peer.forgotten(bytes),
            kind: kind(bytes, next),
            port_pair: Maybe::NONE,
            tcp_flags: Maybe::NONE,
            icmp_type: Maybe::NONE,
            dscp: u64::from(dscp),
            fragment: bytes.forget(u64::from(fragment)) & 1,
            vlan: u64::from(vlan),
        },
        next: u64::from(next),
        offset: bytes.forget(transport as u64) as usize & FARTHEST,
    })
}

/// What the transport's header says.
struct Inner {
    port_pair: Maybe,
    tcp_flags: Maybe,
    icmp_type: Maybe,
}

impl Inner {
    const UNKNOWN: Self = Self { port_pair: Maybe::NONE, tcp_flags: Maybe::NONE, icmp_type: Maybe::NONE };
}

#[inline(always)]
fn inner(bytes: &(impl Bytes + ?Sized), protocol: u8, offset: usize, way: Direction) -> Inner {
    let mut inner = Inner::UNKNOWN;
    match protocol {
        IPPROTO_ICMP | IPPROTO_ICMPV6 => {
            if let Some(kind) = bytes.byte(offset) {
                inner.icmp_type = Maybe::some(u32::from(kind));
            }
        }
        IPPROTO_TCP => {
            if let Some([ports, _, _, flags]) = bytes.words(offset) {
                inner.port_pair = pair(ports, way);
                inner.tcp_flags = Maybe::some(flags >> 16 & 0xff);
            }
        }
        IPPROTO_UDP | IPPROTO_SCTP | IPPROTO_DCCP | IPPROTO_UDPLITE => {
            if let Some([ports]) = bytes.words(offset) {
                inner.port_pair = pair(ports, way);
            }
        }
        _ => {}
    }
    inner
}

/// Ports of the peer and of the target, from those of source and destination.
#[inline(always)]
fn pair(ports: u32, way: Direction) -> Maybe {
    Maybe::some(match way {
        Direction::Egress => ports.rotate_left(16),
        Direction::Ingress => ports,
    })
}

#[inline(always)]
fn kind(bytes: &(impl Bytes + ?Sized), protocol: u8) -> u64 {
    let kind = match protocol {
        IPPROTO_TCP => Protocol::Tcp,
        IPPROTO_UDP => Protocol::Udp,
        IPPROTO_ICMP | IPPROTO_ICMPV6 => Protocol::Icmp,
        _ => Protocol::Other,
    };
    bytes.forget(kind as u64) & 3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    use super::*;

    fn v4(protocol: u8, fragment: u16, options: usize, payload: &[u8]) -> Vec<u8> {
        let mut p =
            vec![0x45 + options as u8, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        p[6..8].copy_from_slice(&fragment.to_be_bytes());
        p.extend(vec![0; options * 4]);
        p.extend_from_slice(payload);
        p
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut p = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        p.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        p.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        p.extend_from_slice(payload);
        p
    }

    // Source port 1000, destination port 6379.
    const SEGMENT: [u8; 16] = [0x03, 0xe8, 0x18, 0xeb, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x12, 0, 0];

    fn read(p: &[u8], ethertype: u16, way: Direction) -> Option<Packet> {
        parse(p, ethertype, 0, 0, way)
    }

    #[test]
    fn the_peer_is_the_far_side_whichever_way_the_packet_goes() {
        let p = v4(6, 0, 0, &SEGMENT);
        let out = read(&p, ETH_P_IP, Direction::Egress).unwrap();
        assert_eq!(out.peer.address(), Address::V4([10, 0, 0, 2]));
        assert_eq!(out.ports(), Some((6379, 1000)));
        assert_eq!(out.kind, Protocol::Tcp as u64);
        let back = read(&p, ETH_P_IP, Direction::Ingress).unwrap();
        assert_eq!(back.peer.address(), Address::V4([10, 0, 0, 1]));
        assert_eq!(back.ports(), Some((1000, 6379)));
    }

    #[test]
    fn options_move_the_ports() {
        let p = v4(17, 0, 10, &SEGMENT);
        assert_eq!(read(&p, ETH_P_IP, Direction::Egress).unwrap().ports(), Some((6379, 1000)));
    }

    #[test]
    fn only_the_first_fragment_has_ports() {
        let first = v4(17, 0x2000, 0, &SEGMENT);
        assert_eq!(read(&first, ETH_P_IP, Direction::Egress).unwrap().ports(), Some((6379, 1000)));
        let second = v4(17, 0x0010, 0, &SEGMENT);
        let second = read(&second, ETH_P_IP, Direction::Egress).unwrap();
        assert_eq!((second.ports(), second.kind, second.is_fragment()), (None, Protocol::Udp as u64, true));
        let mut v6_second = vec![17, 0, 0x00, 0x08, 0, 0, 0, 1];
        v6_second.extend(SEGMENT);
        let second = read(&v6(44, &v6_second), ETH_P_IPV6, Direction::Egress).unwrap();
        assert_eq!((second.ports(), second.kind), (None, Protocol::Udp as u64));
        v6_second[3] = 0x01;
        let first = read(&v6(44, &v6_second), ETH_P_IPV6, Direction::Egress).unwrap();
        assert_eq!((first.ports(), first.is_fragment()), (Some((6379, 1000)), true));
        assert!(!read(&v4(17, 0x4000, 0, &SEGMENT), ETH_P_IP, Direction::Egress).unwrap().is_fragment());
    }

    #[test]
    fn flags_types_and_code_points_are_read() {
        let mut p = v4(6, 0, 0, &SEGMENT);
        p[1] = 46 << 2 | 1;
        let packet = read(&p, ETH_P_IP, Direction::Egress).unwrap();
        assert_eq!((packet.tcp_flags.get(), packet.icmp_type.get(), packet.dscp), (Some(0x12), None, 46));
        let mut p = v6(58, &[128, 0, 0, 0]);
        p[0] |= 0x0b;
        p[1] = 0x80;
        let packet = read(&p, ETH_P_IPV6, Direction::Egress).unwrap();
        assert_eq!((packet.tcp_flags.get(), packet.icmp_type.get(), packet.dscp), (None, Some(128), 46));
    }

    #[test]
    fn a_flow_is_the_same_both_ways_and_another_is_not() {
        let out = v4(6, 0, 0, &SEGMENT);
        let mut back = v4(6, 0, 0, &[0x18, 0xeb, 0x03, 0xe8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        back[12..20].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
        let flow = |p: &[u8], way| read(p, ETH_P_IP, way).unwrap().flow();
        assert_eq!(flow(&out, Direction::Egress), flow(&back, Direction::Ingress));
        back[21] += 1;
        assert_ne!(flow(&out, Direction::Egress), flow(&back, Direction::Ingress));
    }

    #[test]
    fn extension_headers_are_followed_up_to_a_bound() {
        let mut chain = vec![60, 0, 0, 0, 0, 0, 0, 0]; // hop-by-hop
        chain.extend([43, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // destination options, 16 bytes
        chain.extend([51, 0, 0, 0, 0, 0, 0, 0]); // routing
        chain.extend([6, 4, 0, 0]); // authentication header, 24 bytes
        chain.extend([0; 20]);
        chain.extend(SEGMENT);
        let p = read(&v6(0, &chain), ETH_P_IPV6, Direction::Ingress).unwrap();
        assert_eq!(p.ports(), Some((1000, 6379)));
        assert_eq!(p.peer.address(), Address::V6([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]));

        let mut long = Vec::new();
        for _ in 0..EXTENSIONS {
            long.extend([60, 0, 0, 0, 0, 0, 0, 0]);
        }
        long.extend([6, 0, 0, 0, 0, 0, 0, 0]);
        long.extend(SEGMENT);
        assert_eq!(read(&v6(60, &long), ETH_P_IPV6, Direction::Egress).unwrap().ports(), None);
    }

    #[test]
    fn arp_and_neighbour_discovery_are_nobodys_prey() {
        assert_eq!(read(&[0; 28], 0x0806, Direction::Egress), None);
        for kind in 133..=137 {
            assert_eq!(read(&v6(58, &[kind, 0, 0, 0]), ETH_P_IPV6, Direction::Egress), None);
        }
        let echo = read(&v6(58, &[128, 0, 0, 0]), ETH_P_IPV6, Direction::Egress).unwrap();
        assert_eq!((echo.kind, echo.ports()), (Protocol::Icmp as u64, None));
    }

    #[test]
    fn tags_inside_the_packet_are_stepped_over() {
        let mut p = vec![0, 7, 0x81, 0x00, 0, 8, 0x08, 0x00];
        p.extend(v4(6, 0, 0, &SEGMENT));
        let packet = read(&p, ETH_P_8021AD, Direction::Egress).unwrap();
        assert_eq!((packet.ports(), packet.vlan), (Some((6379, 1000)), 7));
        // What the kernel took off is the outer one.
        assert_eq!(parse(&p[..], ETH_P_8021AD, 5, 0, Direction::Egress).unwrap().vlan, 5);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), ethertype: u16, offset in 0..64_usize,
        ) {
            for kind in [ethertype, ETH_P_IP, ETH_P_IPV6, ETH_P_8021Q] {
                let _ = parse(&bytes[..], kind, 0, offset, Direction::Egress);
                let _ = parse(&bytes[..], kind, 0, offset, Direction::Ingress);
            }
        }
    }
}
