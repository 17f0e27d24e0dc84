//! What is right and yet may surprise: a fault that no packet reaches, a delay that is more than it seems. Pure.
//!
//! A packet suffers the first fault that matches it and no other, whether that one's share takes it or not.

use std::{net::IpAddr, time::Duration};

use squall_proto::v1::{self, fault::Kind};

use super::{Fault, Plan, Target, fault::time};

/// The warnings about the faults of a round, fault by fault.
pub(crate) fn warnings(plan: &Plan, round: usize) -> Vec<Vec<String>> {
    let faults = &plan.rounds[round].faults;
    let of = |(n, fault): (usize, &Fault)| {
        let Some(Kind::Network(network)) = &fault.proto.kind else { return Vec::new() };
        let mut warnings = Vec::new();
        let earlier = faults[..n].iter().filter(|earlier| same(plan, &earlier.on, &fault.on));
        for earlier in earlier {
            if let Some(Kind::Network(first)) = &earlier.proto.kind
                // A fault on some of the replicas leaves packets of the others.
                && (earlier.replicas.is_none() || earlier.replicas == fault.replicas)
                && covers(first, network)
            {
                warnings.push(format!(
                    "no packet reaches this: the first fault that matches takes it, and `{}` matches all of these; \
                     put this one before it, or both in one fault",
                    earlier.summary
                ));
            }
        }
        warnings.extend(network.delay.as_ref().into_iter().flat_map(|delay| slower(network, delay)));
        warnings
    };
    faults.iter().enumerate().map(of).collect()
}

/// Whether two names stand for the same thing.
fn same(plan: &Plan, a: &str, b: &str) -> bool {
    let target = |name: &str| plan.targets.get(name).and_then(Target::proto);
    a == b || target(a) == target(b)
}

fn slower(network: &v1::NetworkFault, delay: &v1::Delay) -> Vec<String> {
    let mut warnings = Vec::new();
    if delay.latency_ns > 0 {
        let latency = Duration::from_nanos(delay.latency_ns);
        let trip = match network.direction() {
            v1::Direction::Egress | v1::Direction::Ingress => latency,
            v1::Direction::Both | v1::Direction::Unspecified => latency * 2,
        };
        warnings.push(format!(
            "the delay is of each packet, not of each request: a round trip takes {} longer, and a request may need \
             several",
            time(trip)
        ));
    }
    if delay.jitter_ns > 0 && !delay.keep_order {
        warnings.push(
            "jitter lets packets overtake each other, which TCP may take for loss; keepOrder keeps their order"
                .into(),
        );
    }
    warnings
}

/// Whether no packet that matches `later` is left to it by `earlier`. Says no where it cannot be sure.
fn covers(earlier: &v1::NetworkFault, later: &v1::NetworkFault) -> bool {
    let everyone = [v1::Peer::default()];
    let of = |peers: &[v1::Peer]| if peers.is_empty() { everyone.to_vec() } else { peers.to_vec() };
    let (first, second) = (of(&earlier.peers), of(&later.peers));
    let outer = |side: v1::Side| side == v1::Side::Host;
    // These take certain packets only, and what they do with the rest is not told by their peers.
    let kind = |fault: &v1::NetworkFault| (fault.reset, fault.cut.is_some(), fault.dns.is_some());
    let narrow = kind(earlier) != (false, false, false);
    let ways = match earlier.direction() {
        v1::Direction::Both | v1::Direction::Unspecified => true,
        way => way == later.direction(),
    };
    ways && (!narrow || (kind(earlier) == kind(later) && queries_cover(earlier, later)))
        && (earlier.interface.is_empty() || earlier.interface == later.interface)
        && outer(earlier.side()) == outer(later.side())
        && (earlier.unprotected || !later.unprotected)
        && match earlier.sockets() {
            v1::Sockets::All => true,
            v1::Sockets::Unspecified => later.sockets() != v1::Sockets::All,
            v1::Sockets::Target => later.sockets() == v1::Sockets::Target,
        }
        && earlier.except.iter().all(|left| later.except.iter().any(|except| peer(except, left)))
        && second.iter().all(|b| first.iter().any(|a| peer(a, b)))
}

fn queries_cover(earlier: &v1::NetworkFault, later: &v1::NetworkFault) -> bool {
    let (Some(a), Some(b)) = (&earlier.dns, &later.dns) else { return true };
    a.names.is_empty() || (!b.names.is_empty() && b.names.iter().all(|name| a.names.contains(name)))
}

/// Whether every packet that `b` matches is one that `a` matches. Says no where it cannot be sure.
pub(super) fn peer(a: &v1::Peer, b: &v1::Peer) -> bool {
    let anywhere = |peer: &v1::Peer| peer.cidrs.is_empty() && peer.hosts.is_empty();
    let place = anywhere(a)
        || (!anywhere(b)
            && b.cidrs.iter().all(|inner| a.cidrs.iter().any(|outer| contains(outer, inner)))
            && b.hosts.iter().all(|host| a.hosts.contains(host)));
    let flags = |peer: &v1::Peer| peer.tcp_flags.unwrap_or_default();
    let (wanted, given) = (flags(a), flags(b));
    let protocol = match b.protocol() {
        v1::Protocol::Unspecified if b.tcp_flags.is_some() => v1::Protocol::Tcp,
        v1::Protocol::Unspecified if !b.icmp_types.is_empty() => v1::Protocol::Icmp,
        given => given,
    };
    place
        && ports(&a.ports, &b.ports)
        && ports(&a.local_ports, &b.local_ports)
        && (a.protocol() == v1::Protocol::Unspecified || a.protocol() == protocol)
        && among(&a.dscp, &b.dscp)
        && among(&a.vlans, &b.vlans)
        && among(&a.icmp_types, &b.icmp_types)
        && (a.tcp_flags.is_none() || b.tcp_flags.is_some())
        && wanted.set & !given.set == 0
        && wanted.clear & !given.clear == 0
        && (a.fragments() == v1::Fragments::Unspecified || a.fragments() == b.fragments())
}

/// Where none are given, any will do.
fn among(a: &[u32], b: &[u32]) -> bool {
    a.is_empty() || (!b.is_empty() && b.iter().all(|n| a.contains(n)))
}

fn ports(a: &[v1::PortRange], b: &[v1::PortRange]) -> bool {
    let inside =
        |inner: &v1::PortRange| a.iter().any(|outer| outer.first <= inner.first && inner.last <= outer.last);
    a.is_empty() || (!b.is_empty() && b.iter().all(inside))
}

/// Whether a CIDR lies within another.
fn contains(outer: &str, inner: &str) -> bool {
    let parsed = |cidr: &str| {
        let (address, prefix) = cidr.split_once('/')?;
        let (bits, width) = match address.parse().ok()? {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32),
            IpAddr::V6(v6) => (v6.to_bits(), 128),
        };
        Some((bits, width, prefix.parse::<u32>().ok()?))
    };
    let (Some((a, width, short)), Some((b, other, long))) = (parsed(outer), parsed(inner)) else {
        return false;
    };
    width == other && short <= long && (a ^ b).checked_shr(128 - short).unwrap_or(0) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("10.0.0.0/8", "10.2.0.7/32", true)]
    #[case("10.0.0.7/32", "10.0.0.7/32", true)]
    #[case("10.0.0.7/32", "10.0.0.8/32", false)]
    #[case("10.2.0.7/32", "10.0.0.0/8", false)]
    #[case("0.0.0.0/0", "203.0.113.9/32", true)]
    #[case("0.0.0.0/0", "fd00::1/128", false)]
    #[case("fd00::/64", "fd00::9/128", true)]
    #[case("fd00::/64", "fd00:0:0:1::9/128", false)]
    fn cidrs_within_each_other(#[case] outer: &str, #[case] inner: &str, #[case] within: bool) {
        assert_eq!(contains(outer, inner), within);
    }
}
