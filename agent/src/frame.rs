//! What can be done to a packet once the agent has it in its hands: flip a bit, refuse it, end its connection, answer a
//! DNS query. Pure: frames in, frames out.
//!
//! A frame is an Ethernet frame, segmented and with its checksums in place.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use etherparse::{
    Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TransportSlice, icmpv4,
    icmpv6,
};
use hickory_proto::{
    op::{Message, MessageType, OpCode, ResponseCode},
    rr::{DNSClass, RData, Record, RecordType},
};

/// Hops an answer may take. Linux's own default.
const HOPS: u8 = 64;
/// Seconds for which a made-up address may be cached: it should be gone soon after the fault.
const TTL: u32 = 1;
/// The most of a packet that an ICMP error quotes: RFC 1812 (4.3.2.3) for IPv4, RFC 4443 (2.4 c) for IPv6.
const MOST_QUOTED: [usize; 2] = [548, 1232];

/// Flips one bit of the payload, or of the transport's checksum where there is no payload; `draw` chooses which. The
/// receiver's checksum finds it. Whether there was anything to flip.
pub fn corrupt(frame: &mut [u8], draw: u64) -> bool {
    let Some(spot) = spot(frame) else { return false };
    let at = if spot.payload.is_empty() { spot.checksum } else { choose(spot.payload, draw) };
    flip(frame, at, draw)
}

/// Flips one bit of the payload, and makes the transport's checksum right again. Whether there was anything to flip.
pub fn corrupt_silently(frame: &mut [u8], draw: u64) -> bool {
    let Some(spot) = spot(frame) else { return false };
    if spot.payload.is_empty() {
        return false;
    }
    let at = choose(spot.payload.clone(), draw);
    // The 16-bit word that the checksum takes the byte for.
    let word = at - (at - spot.start) % 2;
    let read = |frame: &[u8], at: usize, end: usize| {
        u16::from_be_bytes([frame[at], if at + 1 < end { frame[at + 1] } else { 0 }])
    };
    let before = read(frame, word, spot.payload.end);
    flip(frame, at, draw);
    let after = read(frame, word, spot.payload.end);
    let sum = u16::from_be_bytes([frame[spot.checksum], frame[spot.checksum + 1]]);
    // UDP without a checksum has none to mend.
    if sum != 0 || !spot.optional {
        let mended = mend(sum, before, after);
        let mended = if mended == 0 && spot.optional { 0xffff } else { mended };
        frame[spot.checksum..spot.checksum + 2].copy_from_slice(&mended.to_be_bytes());
    }
    true
}

/// A checksum after one of the words it is over has changed (RFC 1624, equation 3).
fn mend(sum: u16, before: u16, after: u16) -> u16 {
    let mut wide = u32::from(!sum) + u32::from(!before) + u32::from(after);
    while wide > 0xffff {
        wide = (wide & 0xffff) + (wide >> 16);
    }
    !(wide as u16)
}

/// Where in a frame a transport's parts are.
struct Spot {
    /// Where its header begins.
    start: usize,
    checksum: usize,
    payload: std::ops::Range<usize>,
    /// Whether a checksum of 0 means that there is none.
    optional: bool,
}

fn spot(frame: &[u8]) -> Option<Spot> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let ip = packet.ip_payload()?;
    if ip.fragmented {
        return None;
    }
    let start = ip.payload.as_ptr() as usize - frame.as_ptr() as usize;
    let end = start + ip.payload.len();
    let (checksum, header, optional) = match packet.transport.as_ref()? {
        TransportSlice::Tcp(tcp) => (16, tcp.header_len(), false),
        TransportSlice::Udp(_) => (6, 8, true),
        TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_) | TransportSlice::Igmp(_) => (2, 8, false),
    };
    (start + header <= end).then(|| Spot {
        start,
        checksum: start + checksum,
        payload: start + header..end,
        optional,
    })
}

fn choose(range: std::ops::Range<usize>, draw: u64) -> usize {
    range.start + (draw >> 3) as usize % range.len()
}

fn flip(frame: &mut [u8], at: usize, draw: u64) -> bool {
    frame[at] ^= 1 << (draw & 7);
    true
}

/// Both ends of a packet, and what is in front of its network header, the other way round.
struct Back<'a> {
    packet: SlicedPacket<'a>,
    link: Vec<u8>,
    from: IpAddr,
    to: IpAddr,
}

impl<'a> Back<'a> {
    fn of(frame: &'a [u8]) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let (net, from, to): (&[u8], IpAddr, IpAddr) = match packet.net.as_ref()? {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                (header.slice(), header.source_addr().into(), header.destination_addr().into())
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                (header.slice(), header.source_addr().into(), header.destination_addr().into())
            }
            NetSlice::Arp(_) => return None,
        };
        let mut link = frame[..net.as_ptr() as usize - frame.as_ptr() as usize].to_vec();
        let (addresses, _) = link.split_first_chunk_mut::<12>()?;
        addresses.rotate_left(6);
        Some(Self { packet, link, from, to })
    }

    /// A packet from the receiver of this one to its sender.
    fn answer(&self) -> PacketBuilderStep<etherparse::IpHeaders> {
        step(self.to, self.from)
    }

    fn frame(&self, packet: &[u8]) -> Vec<u8> {
        [&self.link, packet].concat()
    }
}

/// A packet between two addresses of one family.
fn step(from: IpAddr, to: IpAddr) -> PacketBuilderStep<etherparse::IpHeaders> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), HOPS),
        (from, to) => PacketBuilder::ipv6(mapped(from).octets(), mapped(to).octets(), HOPS),
    }
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped(),
        IpAddr::V6(a) => a,
    }
}

/// What the sender of a packet hears when the packet is refused: a RST for TCP (RFC 9293, 3.5.2), "administratively prohibited"
/// for the rest (RFC 1812, RFC 4443). `None` for what must not be answered: a RST, an ICMP error, what was not for one receiver.
#[must_use]
pub fn refusal(frame: &[u8]) -> Option<Vec<u8>> {
    let back = Back::of(frame)?;
    let unicast = match back.to {
        IpAddr::V4(to) => !to.is_multicast() && !to.is_broadcast() && to != Ipv4Addr::UNSPECIFIED,
        IpAddr::V6(to) => !to.is_multicast(),
    };
    // A broadcast of the link layer may carry anything.
    if !unicast || back.link.get(6).is_some_and(|first| first & 1 != 0) {
        return None;
    }
    let mut packet = Vec::new();
    match &back.packet.transport {
        Some(TransportSlice::Tcp(tcp)) => return rst_to_sender(&back, tcp),
        Some(TransportSlice::Icmpv4(icmp)) if is_error(icmp.type_u8(), false) => return None,
        Some(TransportSlice::Icmpv6(icmp)) if is_error(icmp.type_u8(), true) => return None,
        _ => {}
    }
    let quoted = &frame[back.link.len()..];
    let quoted = &quoted[..quoted.len().min(MOST_QUOTED[usize::from(back.to.is_ipv6())])];
    let written = if back.to.is_ipv4() {
        let prohibited = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::FilterProhibited);
        back.answer().icmpv4(prohibited).write(&mut packet, quoted)
    } else {
        let prohibited = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Prohibited);
        back.answer().icmpv6(prohibited).write(&mut packet, quoted)
    };
    written.ok().map(|()| back.frame(&packet))
}

/// ICMP messages that report errors: RFC 792, and in IPv6 all below 128.
fn is_error(kind: u8, v6: bool) -> bool {
    if v6 { kind < 128 } else { matches!(kind, 3 | 4 | 5 | 11 | 12) }
}

fn rst_to_sender(back: &Back<'_>, tcp: &etherparse::TcpSlice<'_>) -> Option<Vec<u8>> {
    if tcp.rst() {
        return None;
    }
    let (from, to) = (tcp.destination_port(), tcp.source_port());
    let mut packet = Vec::new();
    let written = if tcp.ack() {
        back.answer().tcp(from, to, tcp.acknowledgment_number(), 0).rst().write(&mut packet, &[])
    } else {
        let length = tcp.payload().len() as u32 + u32::from(tcp.syn()) + u32::from(tcp.fin());
        let acknowledged = tcp.sequence_number().wrapping_add(length);
        back.answer().tcp(from, to, 0, 0).rst().ack(acknowledged).write(&mut packet, &[])
    };
    written.ok().map(|()| back.frame(&packet))
}

/// What ends the TCP connection of a packet at both ends: a RST to its sender, and one to its receiver in its place. `None`
/// where it is no TCP, or a RST itself.
#[must_use]
pub fn resets(frame: &[u8]) -> Option<[Vec<u8>; 2]> {
    let back = Back::of(frame)?;
    let Some(TransportSlice::Tcp(tcp)) = &back.packet.transport else { return None };
    let to_sender = rst_to_sender(&back, tcp)?;
    let onward =
        step(back.from, back.to).tcp(tcp.source_port(), tcp.destination_port(), tcp.sequence_number(), 0);
    let onward = onward.rst();
    let onward = if tcp.ack() { onward.ack(tcp.acknowledgment_number()) } else { onward };
    let mut packet = Vec::new();
    onward.write(&mut packet, &[]).ok()?;
    let link = &frame[..back.link.len()];
    Some([to_sender, [link, &packet].concat()])
}

/// What a rule says about DNS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns {
    /// Names in lower case without a dot at the end, `*.` in front for everything below; none: all.
    pub names: Vec<String>,
    /// What happens to a query for one of them.
    pub answer: DnsAnswer,
    /// How much later.
    pub delay: Duration,
}

/// What happens to a DNS query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DnsAnswer {
    /// The name does not exist.
    NxDomain,
    /// The server failed.
    ServFail,
    /// Nothing.
    Drop,
    /// These addresses, of which a query for IPv4 sees those of IPv4, and one for IPv6 the others.
    Addresses(Vec<IpAddr>),
    /// The query goes on.
    Forward,
}

/// What a rule makes of one packet to port 53.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is none of the rule's.
    Pass,
    /// It vanishes.
    Drop,
    /// This goes back to its sender.
    Answer(Vec<u8>),
    /// It goes on, late.
    Late,
}

impl Dns {
    /// Judges a frame.
    #[must_use]
    pub fn judge(&self, frame: &[u8]) -> Verdict {
        self.judged(frame).unwrap_or(Verdict::Pass)
    }

    fn judged(&self, frame: &[u8]) -> Option<Verdict> {
        let back = Back::of(frame)?;
        let Some(TransportSlice::Udp(udp)) = &back.packet.transport else { return None };
        let query = Message::from_vec(udp.payload()).ok()?;
        if query.metadata.message_type != MessageType::Query || query.metadata.op_code != OpCode::Query {
            return None;
        }
        let [question] = query.queries.as_slice() else { return None };
        let name = question.name().to_ascii().to_lowercase();
        if !self.is_about(name.trim_end_matches('.')) {
            return None;
        }
        let mut answer = Message::response(query.metadata.id, OpCode::Query);
        answer.metadata.recursion_desired = query.metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.add_query(question.clone());
        match &self.answer {
            DnsAnswer::Drop => return Some(Verdict::Drop),
            DnsAnswer::Forward => return Some(Verdict::Late),
            DnsAnswer::NxDomain => answer.metadata.response_code = ResponseCode::NXDomain,
            DnsAnswer::ServFail => answer.metadata.response_code = ResponseCode::ServFail,
            DnsAnswer::Addresses(addresses) => {
                if question.query_class() == DNSClass::IN {
                    for address in addresses {
                        let data = match (address, question.query_type()) {
                            (IpAddr::V4(a), RecordType::A) => RData::A((*a).into()),
                            (IpAddr::V6(a), RecordType::AAAA) => RData::AAAA((*a).into()),
                            _ => continue,
                        };
                        answer.add_answer(Record::from_rdata(question.name().clone(), TTL, data));
                    }
                }
            }
        }
        let mut packet = Vec::new();
        back.answer()
            .udp(udp.destination_port(), udp.source_port())
            .write(&mut packet, &answer.to_vec().ok()?)
            .ok()?;
        Some(Verdict::Answer(back.frame(&packet)))
    }

    fn is_about(&self, name: &str) -> bool {
        let one = |pattern: &String| match pattern.strip_prefix("*.") {
            Some(below) => {
                name.strip_suffix(below).is_some_and(|front| front.len() > 1 && front.ends_with('.'))
            }
            None => name == pattern,
        };
        self.names.is_empty() || self.names.iter().any(one)
    }
}

#[cfg(test)]
mod tests {
    use etherparse::TcpHeader;
    use hickory_proto::{op::Query, rr::Name};
    use rstest::rstest;

    use super::*;

    const MACS: [u8; 12] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];

    /// A frame from 10.0.0.1 or fd00::1 to 10.0.0.2 or fd00::2.
    fn frame(
        v6: bool,
        tagged: bool,
        build: impl FnOnce(PacketBuilderStep<etherparse::IpHeaders>) -> Vec<u8>,
    ) -> Vec<u8> {
        let pair = if v6 { ["fd00::1", "fd00::2"] } else { ["10.0.0.1", "10.0.0.2"] };
        let [from, to] = pair.map(|a| a.parse::<IpAddr>().unwrap());
        let mut frame = MACS.to_vec();
        if tagged {
            frame.extend([0x81, 0, 0, 7]);
        }
        frame.extend(if v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        frame.extend(build(step(from, to)));
        frame
    }

    fn tcp(v6: bool, tagged: bool, payload: &[u8]) -> Vec<u8> {
        frame(v6, tagged, |ip| {
            let mut packet = Vec::new();
            ip.tcp(1000, 6379, 77, 512).ack(99).psh().write(&mut packet, payload).unwrap();
            packet
        })
    }

    fn udp(v6: bool, port: u16, payload: &[u8]) -> Vec<u8> {
        frame(v6, false, |ip| {
            let mut packet = Vec::new();
            ip.udp(1000, port).write(&mut packet, payload).unwrap();
            packet
        })
    }

    /// Whether a frame's transport checksum is right, reckoned anew.
    fn is_right(frame: &[u8]) -> bool {
        let packet = SlicedPacket::from_ethernet(frame).unwrap();
        let ends: [IpAddr; 2] = match packet.net.as_ref().unwrap() {
            NetSlice::Ipv4(ip) => [ip.header().source_addr().into(), ip.header().destination_addr().into()],
            NetSlice::Ipv6(ip) => [ip.header().source_addr().into(), ip.header().destination_addr().into()],
            NetSlice::Arp(_) => panic!("ARP"),
        };
        let v4 = |a: IpAddr| match a {
            IpAddr::V4(a) => a.octets(),
            IpAddr::V6(_) => panic!("{a}"),
        };
        let v6 = |a: IpAddr| mapped(a).octets();
        match packet.transport.as_ref().unwrap() {
            TransportSlice::Tcp(tcp) => {
                let header: TcpHeader = tcp.to_header();
                let sum = if ends[0].is_ipv4() {
                    header.calc_checksum_ipv4_raw(v4(ends[0]), v4(ends[1]), tcp.payload())
                } else {
                    header.calc_checksum_ipv6_raw(v6(ends[0]), v6(ends[1]), tcp.payload())
                };
                sum.unwrap() == tcp.checksum()
            }
            TransportSlice::Udp(udp) => {
                let header = udp.to_header();
                let sum = if ends[0].is_ipv4() {
                    header.calc_checksum_ipv4_raw(v4(ends[0]), v4(ends[1]), udp.payload())
                } else {
                    header.calc_checksum_ipv6_raw(v6(ends[0]), v6(ends[1]), udp.payload())
                };
                sum.unwrap() == udp.checksum()
            }
            other => panic!("{other:?}"),
        }
    }

    fn flipped(a: &[u8], b: &[u8]) -> u32 {
        a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum()
    }

    #[rstest]
    fn one_bit_is_flipped_and_the_checksum_tells(
        #[values(false, true)] v6: bool,
        #[values(&b""[..], b"x", b"some payload")] payload: &[u8],
    ) {
        for draw in (0..200).map(|n| squall_common::decide::hash(1, n, 0)) {
            for whole in [tcp(v6, draw & 1 == 1, payload), udp(v6, 9, payload)] {
                assert!(is_right(&whole));
                let mut broken = whole.clone();
                assert!(corrupt(&mut broken, draw));
                assert_eq!(flipped(&whole, &broken), 1);
                assert!(!is_right(&broken));
            }
        }
    }

    #[rstest]
    fn silent_corruption_is_silent(
        #[values(false, true)] v6: bool,
        #[values(&b"x"[..], b"xy", b"some odd payload.")] payload: &[u8],
    ) {
        for draw in (0..200).map(|n| squall_common::decide::hash(1, n, 0)) {
            for whole in [tcp(v6, draw & 1 == 1, payload), udp(v6, 9, payload)] {
                let mut broken = whole.clone();
                assert!(corrupt_silently(&mut broken, draw));
                let from = whole.len() - payload.len();
                assert_eq!(flipped(&whole[from..], &broken[from..]), 1);
                assert!(is_right(&broken), "{draw}");
            }
        }
        assert!(!corrupt_silently(&mut tcp(v6, false, b""), 1));
    }

    #[rstest]
    fn tcp_is_refused_with_a_rst(#[values(false, true)] v6: bool, #[values(false, true)] tagged: bool) {
        let answer = refusal(&tcp(v6, tagged, b"abc")).unwrap();
        assert_eq!(answer[..6], MACS[6..12]);
        assert!(is_right(&answer));
        let packet = SlicedPacket::from_ethernet(&answer).unwrap();
        assert_eq!(packet.vlan().is_some(), tagged);
        let Some(TransportSlice::Tcp(rst)) = packet.transport else { panic!("{packet:?}") };
        assert!(rst.rst() && !rst.ack());
        assert_eq!((rst.source_port(), rst.destination_port(), rst.sequence_number()), (6379, 1000, 99));
        // No answer to an answer.
        assert_eq!(refusal(&answer), None);
        let syn = frame(v6, false, |ip| {
            let mut packet = Vec::new();
            ip.tcp(1000, 6379, 77, 512).syn().write(&mut packet, &[]).unwrap();
            packet
        });
        let answer = refusal(&syn).unwrap();
        let packet = SlicedPacket::from_ethernet(&answer).unwrap();
        let Some(TransportSlice::Tcp(rst)) = packet.transport else { panic!("{packet:?}") };
        assert!(rst.rst() && rst.ack());
        assert_eq!((rst.sequence_number(), rst.acknowledgment_number()), (0, 78));
    }

    #[rstest]
    fn the_rest_is_refused_with_icmp(#[values(false, true)] v6: bool) {
        let query = udp(v6, 53, b"payload");
        let answer = refusal(&query).unwrap();
        let packet = SlicedPacket::from_ethernet(&answer).unwrap();
        let quoted = match packet.transport.as_ref().unwrap() {
            TransportSlice::Icmpv4(icmp) => {
                assert_eq!((icmp.type_u8(), icmp.code_u8()), (3, 13));
                icmp.payload()
            }
            TransportSlice::Icmpv6(icmp) => {
                assert_eq!((icmp.type_u8(), icmp.code_u8()), (1, 1));
                icmp.payload()
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(quoted, &query[14..]);
        assert_eq!(refusal(&answer), None);
    }

    #[rstest]
    fn a_connection_is_reset_at_both_ends(#[values(false, true)] v6: bool) {
        let [back, onward] = resets(&tcp(v6, false, b"abc")).unwrap();
        assert!(is_right(&back) && is_right(&onward));
        let packet = SlicedPacket::from_ethernet(&onward).unwrap();
        let Some(TransportSlice::Tcp(rst)) = packet.transport else { panic!("{packet:?}") };
        assert_eq!((rst.source_port(), rst.sequence_number(), rst.rst()), (1000, 77, true));
        assert_eq!(onward[..12], MACS);
        assert_eq!(resets(&udp(v6, 9, b"")), None);
    }

    fn query(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = 4711;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        udp(false, 53, &message.to_vec().unwrap())
    }

    fn dns(names: &[&str], answer: DnsAnswer) -> Dns {
        Dns { names: names.iter().map(ToString::to_string).collect(), answer, delay: Duration::ZERO }
    }

    fn answered(dns: &Dns, query: &[u8]) -> Message {
        let Verdict::Answer(frame) = dns.judge(query) else { panic!("{:?}", dns.judge(query)) };
        assert!(is_right(&frame));
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(TransportSlice::Udp(udp)) = packet.transport else { panic!("{packet:?}") };
        assert_eq!((udp.source_port(), udp.destination_port()), (53, 1000));
        Message::from_vec(udp.payload()).unwrap()
    }

    #[test]
    fn queries_are_answered_by_name_and_type() {
        let one = query("API.example.com.", RecordType::A);
        let answer = answered(&dns(&["api.example.com"], DnsAnswer::NxDomain), &one);
        assert_eq!((answer.metadata.id, answer.metadata.response_code), (4711, ResponseCode::NXDomain));
        let answer = answered(&dns(&["*.example.com"], DnsAnswer::ServFail), &one);
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        let addresses = ["10.9.9.9", "fd00::9"].map(|a| a.parse().unwrap()).to_vec();
        let wrong = dns(&[], DnsAnswer::Addresses(addresses));
        let answer = answered(&wrong, &one);
        assert_eq!(answer.answers.len(), 1);
        assert_eq!(answer.answers[0].record_type(), RecordType::A);
        let answer = answered(&wrong, &query("api.example.com.", RecordType::AAAA));
        assert_eq!(answer.answers[0].record_type(), RecordType::AAAA);
        assert!(answered(&wrong, &query("api.example.com.", RecordType::MX)).answers.is_empty());
        assert_eq!(dns(&[], DnsAnswer::Drop).judge(&one), Verdict::Drop);
        assert_eq!(dns(&[], DnsAnswer::Forward).judge(&one), Verdict::Late);
        for others in ["example.org", "*.api.example.com", "xapi.example.com", "*.com.example"] {
            assert_eq!(dns(&[others], DnsAnswer::Drop).judge(&one), Verdict::Pass, "{others}");
        }
        assert_eq!(
            dns(&["*.example.com"], DnsAnswer::Drop).judge(&query("example.com.", RecordType::A)),
            Verdict::Pass
        );
        assert_eq!(dns(&[], DnsAnswer::Drop).judge(&udp(false, 53, b"no query")), Verdict::Pass);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_taken_without_a_panic(
            mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), draw: u64, cut in 0..60_usize,
        ) {
            let whole = tcp(draw & 1 == 0, draw & 2 == 0, b"payload");
            for frame in [&mut bytes, &mut whole[..whole.len().saturating_sub(cut)].to_vec()] {
                let _ = (refusal(frame), resets(frame), dns(&[], DnsAnswer::NxDomain).judge(frame));
                let _ = (corrupt(frame, draw), corrupt_silently(frame, draw));
            }
        }
    }
}
