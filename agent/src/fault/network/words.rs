//! A network fault in words and figures.

use std::{fmt::Write as _, time::Duration};

use squall_common::rules::Ports;
use squall_proto::v1;

use super::{Network, Peer};
use crate::{
    fault::Fault,
    host::{
        bpf::Hook,
        port::{Figures, Holder, Support},
    },
};

impl Network {
    /// What it does to which packets, in one line.
    pub(super) fn words(&self) -> String {
        let asked = &self.asked;
        let mut what = Vec::new();
        if asked.partition || asked.refusal() != v1::Refusal::Unspecified {
            let answer = asked.refusal() == v1::Refusal::Answer;
            what.push(if answer { "partition that refuses" } else { "partition" }.to_owned());
        }
        if asked.reset {
            what.push("reset of TCP connections".to_owned());
        }
        if let Some(cut) = &asked.cut {
            what.push(format!("cut of TCP connections after {} bytes", cut.after_bytes));
        }
        what.extend(asked.dns.as_ref().map(dns));
        what.extend(asked.duplicate.as_ref().map(|c| format!("duplicate {}", chance(c))));
        what.extend(asked.loss.as_ref().map(loss));
        if let Some(corrupt) = &asked.corrupt {
            let silent = if corrupt.silent { " silently" } else { "" };
            what.push(format!("corrupt {}{silent}", chance(&corrupt.chance.unwrap_or_default())));
        }
        if let Some(reorder) = &asked.reorder {
            let gap = if reorder.gap > 1 { format!(" gap {}", reorder.gap) } else { String::new() };
            what.push(format!("reorder {}{gap}", chance(&reorder.chance.unwrap_or_default())));
        }
        what.extend(asked.delay.as_ref().map(delay));
        what.extend(asked.slots.as_ref().map(slots));
        if let Some(rate) = &asked.rate {
            let mut words = format!("rate {}bit/s", metric(rate.bits_per_second));
            for (name, bytes) in [("burst", rate.burst_bytes), ("limit", rate.limit_bytes)] {
                if bytes > 0 {
                    let _ = write!(words, " {name} {bytes} bytes");
                }
            }
            if rate.overhead_bytes != 0 {
                let _ = write!(words, " overhead {} bytes", rate.overhead_bytes);
            }
            what.push(words);
        }
        let mut words = what.join(", ");
        if asked.per_segment {
            words.push_str(", segment by segment");
        }
        if asked.share > 0.0 && asked.share < 1.0 {
            let _ = write!(words, " for {} of packets", percent(asked.share));
        }
        if asked.flow_share > 0.0 && asked.flow_share < 1.0 {
            let _ = write!(words, " for {} of flows", percent(asked.flow_share));
        }
        let peers = |peers: &[Peer]| peers.iter().map(peer).collect::<Vec<_>>().join(" or ");
        let way = match asked.direction() {
            v1::Direction::Egress => "outgoing only",
            v1::Direction::Ingress => "incoming only",
            _ => "both ways",
        };
        let _ = write!(words, " to {}, {way}", peers(&self.peers));
        if !self.except.is_empty() {
            let _ = write!(words, ", except {}", peers(&self.except));
        }
        if let Some(interface) = &self.interface {
            let _ = write!(words, ", on {interface}");
        }
        if asked.side() == v1::Side::Host {
            words.push_str(", at the host's end");
        }
        match asked.sockets() {
            v1::Sockets::Target => words.push_str(", of the target's sockets only"),
            v1::Sockets::All => words.push_str(", of all sockets"),
            v1::Sockets::Unspecified => {}
        }
        if asked.unprotected {
            words.push_str(", SSH and Kubernetes not spared");
        }
        words
    }
}

fn delay(delay: &v1::Delay) -> String {
    let mut words = format!("delay {:?}", Duration::from_nanos(delay.latency_ns));
    if delay.jitter_ns > 0 {
        let _ = write!(words, " ±{:?}", Duration::from_nanos(delay.jitter_ns));
    }
    let distribution = match delay.distribution() {
        v1::Distribution::Unspecified | v1::Distribution::Uniform => None,
        v1::Distribution::Normal => Some("normal"),
        v1::Distribution::Pareto => Some("pareto"),
        v1::Distribution::Paretonormal => Some("paretonormal"),
        v1::Distribution::Table => Some("by a table"),
    };
    if let Some(distribution) = distribution {
        let _ = write!(words, " {distribution}");
    }
    if delay.correlation > 0.0 {
        let _ = write!(words, " correlation {}", percent(delay.correlation));
    }
    if delay.keep_order {
        words.push_str(" in order");
    }
    words
}

fn slots(slots: &v1::Slots) -> String {
    let [min, max] = [slots.min_ns, slots.max_ns].map(Duration::from_nanos);
    let mut words = format!("slots every {min:?} to {max:?}");
    if slots.packets > 0 {
        let _ = write!(words, " of {} packets", slots.packets);
    }
    if slots.bytes > 0 {
        let _ = write!(words, " of {} bytes", slots.bytes);
    }
    words
}

fn loss(loss: &v1::Loss) -> String {
    let ecn = if loss.ecn { ", or marks (ECN)" } else { "" };
    model(loss) + ecn
}

fn model(loss: &v1::Loss) -> String {
    if let Some(m) = &loss.gilbert_elliott {
        let [p, r, bad, good] = [m.p, m.r, m.loss_bad, m.loss_good].map(percent);
        return format!("loss Gilbert-Elliott p {p} r {r} bad {bad} good {good}");
    }
    if let Some(m) = &loss.four_state {
        let [p13, p31, p32, p23, p14] = [m.p13, m.p31, m.p32, m.p23, m.p14].map(percent);
        return format!("loss of four states p13 {p13} p31 {p31} p32 {p32} p23 {p23} p14 {p14}");
    }
    if loss.every > 0 {
        return format!("loss of one packet in {}", loss.every);
    }
    let correlated = if loss.correlation > 0.0 {
        format!(" correlation {}", percent(loss.correlation))
    } else {
        String::new()
    };
    format!("loss {}{correlated}", percent(loss.ratio))
}

fn dns(dns: &v1::Dns) -> String {
    let names = if dns.names.is_empty() { "every name".to_owned() } else { dns.names.join(", ") };
    let mut words = match dns.answer() {
        v1::DnsAnswer::Nxdomain => format!("DNS: {names} does not exist"),
        v1::DnsAnswer::Servfail => format!("DNS: the server fails for {names}"),
        v1::DnsAnswer::Drop => format!("DNS: no answer for {names}"),
        v1::DnsAnswer::Addresses => format!("DNS: {names} is {}", dns.addresses.join(", ")),
        v1::DnsAnswer::Forward | v1::DnsAnswer::Unspecified => format!("DNS: {names}"),
    };
    if dns.delay_ns > 0 {
        let _ = write!(words, ", {:?} later", Duration::from_nanos(dns.delay_ns));
    }
    words
}

fn chance(chance: &v1::Chance) -> String {
    let mut words = percent(chance.ratio);
    if chance.correlation > 0.0 {
        let _ = write!(words, " correlation {}", percent(chance.correlation));
    }
    words
}

/// `1.5M`, exactly.
fn metric(number: u64) -> String {
    let units = [(1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")];
    let unit = units.into_iter().find(|(unit, _)| number >= *unit && number.is_multiple_of(unit / 1000));
    unit.map_or_else(
        || format!("{number} "),
        |(unit, letter)| format!("{} {letter}", number as f64 / unit as f64),
    )
}

fn percent(ratio: f64) -> String {
    // Three digits behind the point, and none that say nothing.
    let digits = format!("{:.3}", ratio * 100.0);
    format!("{}%", digits.trim_end_matches('0').trim_end_matches('.'))
}

/// A peer in words.
pub(super) fn peer(peer: &Peer) -> String {
    let Peer { clause, hosts } = peer;
    let ports = |ranges: &[Ports]| {
        let range = |p: &Ports| {
            if p.first == p.last { p.first.to_string() } else { format!("{}-{}", p.first, p.last) }
        };
        ranges.iter().map(range).collect::<Vec<_>>().join(",")
    };
    let numbers = |values: &[u8]| values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut words = match (clause.cidrs.as_slice(), hosts.as_slice()) {
        ([], []) => "anyone".to_owned(),
        ([], hosts) => hosts.join(", "),
        ([cidr], []) => cidr.to_string(),
        ([first, rest @ ..], hosts) => format!("{first} and {} more", rest.len() + hosts.len()),
    };
    if !clause.peer_ports.is_empty() {
        let _ = write!(words, " port {}", ports(&clause.peer_ports));
    }
    if !clause.local_ports.is_empty() {
        let _ = write!(words, " from local port {}", ports(&clause.local_ports));
    }
    if !clause.dscp.is_empty() {
        let _ = write!(words, " dscp {}", numbers(&clause.dscp));
    }
    if !clause.vlans.is_empty() {
        let vlans: Vec<String> = clause.vlans.iter().map(ToString::to_string).collect();
        let _ = write!(words, " vlan {}", vlans.join(","));
    }
    if !clause.icmp_types.is_empty() {
        let _ = write!(words, " icmp type {}", numbers(&clause.icmp_types));
    }
    if let Some(flags) = clause.tcp_flags {
        let _ = write!(words, " flags {:#04x} of {:#04x}", flags.set, flags.set | flags.clear);
    }
    match clause.fragments {
        Some(true) => words.push_str(" fragments only"),
        Some(false) => words.push_str(" no fragments"),
        None => {}
    }
    match clause.protocol {
        Some(squall_common::packet::Protocol::Tcp) => words.push_str(" (tcp)"),
        Some(squall_common::packet::Protocol::Udp) => words.push_str(" (udp)"),
        Some(squall_common::packet::Protocol::Icmp) => words.push_str(" (icmp)"),
        Some(squall_common::packet::Protocol::Other) | None => {}
    }
    words
}

/// What a rule did. `rtt` is the median that the target's TCP sockets report before and now.
pub(super) fn effect(all: &Figures, rtt: [Option<Duration>; 2]) -> v1::Effect {
    let figure = |name: &str, value: f64, unit: &str| v1::Figure {
        name: name.to_owned(),
        value,
        unit: unit.to_owned(),
    };
    let mut figures = vec![
        figure("matched", all.matched as f64, "packets"),
        figure("dropped", all.dropped as f64, "packets"),
        figure("delayed", all.delayed as f64, "packets"),
        figure("bytes", all.bytes as f64, "bytes"),
        figure("segments", all.segments as f64, "packets"),
    ];
    let rare = [
        ("marked", all.marked),
        ("duplicated", all.duplicated),
        ("corrupted", all.corrupted),
        ("reordered", all.reordered),
        ("refused", all.refused),
        ("reset", all.reset),
        ("answered", all.answered),
        ("failed", all.failed),
    ];
    for (name, count) in rare.into_iter().filter(|(_, count)| *count > 0) {
        figures.push(figure(name, count as f64, "packets"));
    }
    for (name, q) in [("delay_p50", 0.5), ("delay_p90", 0.9), ("delay_p99", 0.99)] {
        figures.extend(all.delay(q).map(|seconds| figure(name, seconds, "seconds")));
    }
    for (name, rtt) in ["tcp_rtt_before", "tcp_rtt"].into_iter().zip(rtt) {
        figures.extend(rtt.map(|rtt| figure(name, rtt.as_secs_f64(), "seconds")));
    }
    figures.extend(all.first_match.map(|after| figure("first_match", after.as_secs_f64(), "seconds")));
    let hurt = all.dropped
        + all.marked
        + all.delayed
        + all.duplicated
        + all.corrupted
        + all.reordered
        + all.refused
        + all.reset
        + all.answered;
    let delays = all.delays().into_iter();
    let delays = delays.map(|b| v1::DelayBucket { up_to_ns: b.up_to_ns, count: b.count, sum_ns: b.sum_ns });
    v1::Effect { bit: hurt > 0, figures, delays: delays.collect() }
}

pub(super) fn describe(support: &Support) -> v1::FaultSupport {
    let feature = |name: &str, mechanism: String, reason: Option<String>| v1::Feature {
        name: name.to_owned(),
        available: reason.is_none(),
        mechanism,
        reason: reason.unwrap_or_default(),
    };
    let hook = hook_name(support.hook).to_owned();
    let held = match (&support.no_line, &support.no_tap) {
        (None, _) => (holder_name(Holder::Line).to_owned(), None),
        (Some(_), None) => (holder_name(Holder::Tap).to_owned(), None),
        (Some(line), Some(tap)) => {
            (String::new(), Some(format!("no sch_fq ({line}), and no TAP queue ({tap})")))
        }
    };
    let queue = || {
        let reason = support.no_tap.as_ref().map(|tap| format!("no TAP queue ({tap})"));
        (if reason.is_none() { "TAP queue".to_owned() } else { String::new() }, reason)
    };
    let mut features: Vec<v1::Feature> =
        ["loss", "duplicate", "partition"].map(|name| feature(name, hook.clone(), None)).into();
    for name in ["delay", "reorder", "rate", "slots"] {
        features.push(feature(name, held.0.clone(), held.1.clone()));
    }
    for name in ["corrupt", "refusal", "reset", "cut", "dns", "per_segment"] {
        let (mechanism, reason) = queue();
        features.push(feature(name, mechanism, reason));
    }
    let sockets =
        (!support.cgroups).then(|| "the kernel does not know the cgroup (v2) of a socket".to_owned());
    features.push(feature(
        "sockets",
        if sockets.is_none() { "cgroup v2".to_owned() } else { String::new() },
        sockets,
    ));
    v1::FaultSupport { kind: Network::KIND.to_owned(), available: true, features, reason: String::new() }
}

pub(super) fn hook_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Tcx => "TCX",
        Hook::Clsact => "clsact filter",
    }
}

pub(super) fn holder_name(holder: Holder) -> &'static str {
    match holder {
        Holder::Line => "EDT + sch_fq on a veth pair",
        Holder::Tap => "TAP queue",
    }
}
