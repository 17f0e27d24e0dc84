//! From the message to a [`Network`], which holds nothing that is wrong in itself.

use std::{net::IpAddr, time::Duration};

use squall_common::{
    decide::{Action, Chance, LONGEST, LossModel, Mode, threshold},
    packet::Protocol,
    quantiles::Quantiles,
    rules::{Cidr, Clause, Flags, Ports},
    table::CLAUSES,
};
use squall_proto::v1;

use super::{Network, Peer};
use crate::{
    frame::{Dns, DnsAnswer},
    host::resolve::is_name,
    limits::Invalid,
};

/// The longest delay, and the longest queue for a rate. `sch_fq` is told to keep packets longer (`HORIZON` in host/tc.rs).
const LONGEST_DELAY: Duration = Duration::from_nanos(LONGEST);
/// What may wait for slots, and for a rate unless something else is asked for: netem's default queue of full Ethernet frames.
const DEFAULT_PACKETS: u64 = 1000;
/// See [`DEFAULT_PACKETS`].
const DEFAULT_LIMIT: u64 = DEFAULT_PACKETS * FRAME;
/// A full Ethernet frame.
const FRAME: u64 = 1514;
/// Port of DNS.
const DOMAIN: u16 = 53;

impl Network {
    /// Parses the message.
    pub(super) fn from_proto(asked: v1::NetworkFault) -> Result<Self, Invalid> {
        let (egress, ingress) = match asked.direction() {
            v1::Direction::Unspecified | v1::Direction::Both => (true, true),
            v1::Direction::Egress => (true, false),
            v1::Direction::Ingress => (false, true),
        };
        let list = |field: &str, peers: &[v1::Peer]| {
            let peers = peers.iter().enumerate();
            peers
                .map(|(i, peer)| peer_of(&format!("{field}[{i}]"), peer, egress, ingress))
                .collect::<Result<Vec<_>, _>>()
        };
        let mut peers = list("network.peers", &asked.peers)?;
        let mut except = list("network.except", &asked.except)?;
        if peers.is_empty() {
            peers.push(Peer { clause: Clause { egress, ingress, ..Clause::default() }, hosts: Vec::new() });
        }
        for peer in &mut except {
            peer.clause.except = true;
        }
        if peers.len() + except.len() > CLAUSES - 8 {
            let fix = format!("at most {} with the exceptions; one peer may have many CIDRs", CLAUSES - 8);
            return Err(Invalid::new("network.peers", peers.len() + except.len(), "too many peers", fix));
        }
        alone(&asked)?;
        if asked.side() == v1::Side::Host && asked.sockets() == v1::Sockets::Target {
            let problem = "outside its namespace nobody knows a packet's socket";
            return Err(Invalid::new("network.side", "host", problem, "leave out side, or sockets"));
        }
        let mut action = Action::new(asked.seed);
        action.share = share("network.share", asked.share)?;
        action.flow_share = share("network.flow_share", asked.flow_share)?;
        action.per_segment = u64::from(asked.per_segment);
        let (quantiles, table) = delay(&asked, &mut action)?;
        action.table = table;
        action = loss(&asked, action)?;
        action.duplicate = chance("network.duplicate", asked.duplicate.as_ref())?;
        if let Some(corrupt) = &asked.corrupt {
            action.corrupt = chance("network.corrupt.chance", corrupt.chance.as_ref())?;
            action.silent = u64::from(corrupt.silent);
        }
        reorder(&asked, &mut action)?;
        rate(&asked, &mut action)?;
        slots(&asked, &mut action)?;
        together(&action)?;
        if asked.partition {
            action.loss = threshold(1.0);
            action.loss_model = LossModel::Ratio as u64;
        }
        if asked.refusal() == v1::Refusal::Answer {
            action.mode = Mode::Refuse as u64;
        }
        if asked.reset {
            action.mode = Mode::Reset as u64;
        }
        if let Some(cut) = &asked.cut {
            action.mode = Mode::Cut as u64;
            action.cut_after = cut.after_bytes;
        }
        let dns = asked.dns.as_ref().map(|dns| dns_of(dns, &mut peers)).transpose()?;
        if dns.is_some() {
            action.mode = Mode::Dns as u64;
        }
        if asked.reset || asked.cut.is_some() {
            for (i, peer) in peers.iter_mut().enumerate() {
                match peer.clause.protocol {
                    None | Some(Protocol::Tcp) => peer.clause.protocol = Some(Protocol::Tcp),
                    Some(_) => {
                        let field = format!("network.peers[{i}].protocol");
                        return Err(Invalid::new(
                            field,
                            "not tcp",
                            "only TCP has connections to end",
                            "leave it out",
                        ));
                    }
                }
            }
        }
        let nothing = action.mode == Mode::Hurt as u64
            && action.loss_model == LossModel::None as u64
            && action.latency == 0
            && action.byte_time == 0
            && action.slot_max == 0
            && action.duplicate.ratio == 0
            && action.corrupt.ratio == 0;
        if nothing {
            let fix =
                "ask for delay, loss, duplicate, corrupt, rate, slots, partition, refusal, reset, cut or dns";
            return Err(Invalid::new("network", "nothing", "it would do nothing", fix));
        }
        Ok(Self {
            peers,
            except,
            action,
            quantiles,
            dns,
            interface: Some(asked.interface.clone()).filter(|name| !name.is_empty()),
            asked,
        })
    }
}

/// Refuses what must stand alone and does not.
fn alone(asked: &v1::NetworkFault) -> Result<(), Invalid> {
    let hurts = [
        ("delay", asked.delay.is_some()),
        ("loss", asked.loss.is_some()),
        ("duplicate", asked.duplicate.is_some()),
        ("corrupt", asked.corrupt.is_some()),
        ("reorder", asked.reorder.is_some()),
        ("rate", asked.rate.is_some()),
        ("slots", asked.slots.is_some()),
    ];
    let hurts: Vec<&str> = hurts.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect();
    let kinds = [
        ("partition", asked.partition || asked.refusal() != v1::Refusal::Unspecified),
        ("reset", asked.reset),
        ("cut", asked.cut.is_some()),
        ("dns", asked.dns.is_some()),
    ];
    let kinds: Vec<&str> = kinds.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect();
    let Some(first) = kinds.first() else { return Ok(()) };
    let others: Vec<&str> = kinds[1..].iter().chain(&hurts).copied().collect();
    if others.is_empty() {
        return Ok(());
    }
    let others = others.join(" and ");
    let problem = "every packet it is about ends there, so nothing else acts";
    Err(Invalid::new(
        format!("network.{first}"),
        format!("with {others}"),
        problem,
        format!("leave out {others}, or {first}"),
    ))
}

fn delay(asked: &v1::NetworkFault, action: &mut Action<u64>) -> Result<(Option<Quantiles>, u64), Invalid> {
    let Some(delay) = &asked.delay else { return Ok((None, 0)) };
    let (latency, jitter) = (Duration::from_nanos(delay.latency_ns), Duration::from_nanos(delay.jitter_ns));
    if latency > LONGEST_DELAY {
        let fix = format!("at most {LONGEST_DELAY:?}, or a partition");
        let given = format!("{latency:?}");
        return Err(Invalid::new("network.delay.latency", given, "longer than a packet can be held", fix));
    }
    if jitter > latency {
        let given = format!("{jitter:?}");
        let fix = format!("at most the latency, {latency:?}");
        return Err(Invalid::new("network.delay.jitter", given, "a packet cannot leave before it came", fix));
    }
    let distribution = delay.distribution();
    let wild = matches!(distribution, v1::Distribution::Unspecified | v1::Distribution::Uniform);
    if jitter.is_zero() && (!wild || delay.correlation > 0.0 || delay.keep_order) {
        let fix = "give a jitter, or leave out distribution, correlation and keep_order";
        return Err(Invalid::new(
            "network.delay.jitter",
            "0",
            "without it no delay differs from another",
            fix,
        ));
    }
    if delay.keep_order && delay.correlation > 0.0 {
        let fix = "choose one of them";
        return Err(Invalid::new(
            "network.delay.keep_order",
            true,
            "the order changes what is correlated",
            fix,
        ));
    }
    let own = distribution == v1::Distribution::Table;
    if own == delay.table.is_empty() {
        let problem = if own { "no entries" } else { "a table for another distribution" };
        let fix = "give both distribution table and its entries, or neither";
        return Err(Invalid::new("network.delay.table", delay.table.len(), problem, fix));
    }
    let quantiles = if own {
        Some(Quantiles::from_entries(&delay.table).map_err(|problem| {
            Invalid::new("network.delay.table", delay.table.len(), problem, "use a table in netem's format")
        })?)
    } else {
        None
    };
    (action.latency, action.jitter) = (delay.latency_ns, delay.jitter_ns);
    action.keep_order = u64::from(delay.keep_order);
    let correlation = ratio("network.delay.correlation", delay.correlation)?;
    action.rho = (correlation * 4_294_967_296.0) as u64;
    let table = match distribution {
        v1::Distribution::Normal => 1,
        v1::Distribution::Pareto => 2,
        v1::Distribution::Paretonormal => 3,
        _ => 0,
    };
    Ok((quantiles, table))
}

fn slots(asked: &v1::NetworkFault, action: &mut Action<u64>) -> Result<(), Invalid> {
    let Some(slots) = &asked.slots else { return Ok(()) };
    let [min, max] = [slots.min_ns, slots.max_ns].map(Duration::from_nanos);
    if max.is_zero() || max > LONGEST_DELAY {
        let fix = format!("more than 0, and at most {LONGEST_DELAY:?}");
        let problem = "not a time from one slot to the next";
        return Err(Invalid::new("network.slots.max", format!("{max:?}"), problem, fix));
    }
    if min > max {
        let fix = format!("at most the longest, {max:?}");
        return Err(Invalid::new("network.slots.min", format!("{min:?}"), "more than the longest", fix));
    }
    (action.slot_min, action.slot_max) = (slots.min_ns, slots.max_ns);
    (action.slot_packets, action.slot_bytes) = (slots.packets, slots.bytes);
    // The slot that is next, and as many as netem's default queue fills.
    let filled = |all: u64, one: u64| if one == 0 { 0 } else { all.div_ceil(one) };
    let slots = filled(DEFAULT_PACKETS, slots.packets).max(filled(DEFAULT_LIMIT, slots.bytes)) + 1;
    action.slot_backlog = slots.saturating_mul(action.slot_max).min(LONGEST);
    Ok(())
}

fn loss(asked: &v1::NetworkFault, action: Action<u64>) -> Result<Action<u64>, Invalid> {
    let Some(loss) = &asked.loss else { return Ok(action) };
    let action = Action { ecn: u64::from(loss.ecn), ..action };
    let given = [
        ("ratio", loss.ratio != 0.0),
        ("gilbert_elliott", loss.gilbert_elliott.is_some()),
        ("four_state", loss.four_state.is_some()),
        ("every", loss.every > 0),
    ];
    let given: Vec<&str> = given.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect();
    if given.len() > 1 {
        let given = given.join(" and ");
        return Err(Invalid::new("network.loss", given, "several models at once", "choose one"));
    }
    if loss.correlation != 0.0 && given != ["ratio"] {
        return Err(Invalid::new(
            "network.loss.correlation",
            loss.correlation,
            "it goes with a ratio, and with nothing else",
            "give a ratio, or leave it out",
        ));
    }
    let field = |name: &str| format!("network.loss.{name}");
    if let Some(m) = &loss.gilbert_elliott {
        let [p, r, bad, good] =
            [("p", m.p), ("r", m.r), ("loss_bad", m.loss_bad), ("loss_good", m.loss_good)]
                .map(|(name, value)| ratio(&field(&format!("gilbert_elliott.{name}")), value));
        return Ok(action.with_gilbert_elliott(p?, r?, bad?, good?));
    }
    if let Some(m) = &loss.four_state {
        let [p13, p31, p32, p23, p14] =
            [("p13", m.p13), ("p31", m.p31), ("p32", m.p32), ("p23", m.p23), ("p14", m.p14)]
                .map(|(name, value)| ratio(&field(&format!("four_state.{name}")), value));
        let (p13, p31, p32, p23, p14) = (p13?, p31?, p32?, p23?, p14?);
        for (names, sum) in [("p13 + p14", p13 + p14), ("p31 + p32", p31 + p32)] {
            if sum > 1.0 + 1e-9 {
                let fix = "they leave the same state, so together they are at most 1";
                return Err(Invalid::new(
                    field("four_state"),
                    format!("{names} = {sum}"),
                    "more than certain",
                    fix,
                ));
            }
        }
        return Ok(action.with_four_states(p13, p31, p32, p23, p14));
    }
    if loss.every > 0 {
        let model = LossModel::Every as u64;
        return Ok(Action { loss: loss.every, loss_model: model, ..action });
    }
    let correlation = correlation("network.loss.correlation", loss.correlation)?;
    Ok(action.with_loss(ratio("network.loss.ratio", loss.ratio)?, correlation))
}

fn reorder(asked: &v1::NetworkFault, action: &mut Action<u64>) -> Result<(), Invalid> {
    let Some(reorder) = &asked.reorder else { return Ok(()) };
    action.reorder = chance("network.reorder.chance", reorder.chance.as_ref())?;
    action.gap = reorder.gap.max(1);
    if action.latency == 0 {
        let problem = "there is nobody to overtake: packets go ahead of those that are delayed";
        return Err(Invalid::new("network.reorder", "without a delay", problem, "add a delay"));
    }
    if action.keep_order != 0 {
        let fix = "leave out one of them";
        return Err(Invalid::new("network.reorder", "with keep_order", "they are opposites", fix));
    }
    if action.reorder.ratio == 0 {
        let fix = "give a ratio; 1 sends every gap-th packet ahead";
        return Err(Invalid::new("network.reorder.chance.ratio", 0, "no packet would go ahead", fix));
    }
    Ok(())
}

fn rate(asked: &v1::NetworkFault, action: &mut Action<u64>) -> Result<(), Invalid> {
    let Some(rate) = &asked.rate else { return Ok(()) };
    let bits = rate.bits_per_second;
    if !(1_000..=100_000_000_000).contains(&bits) {
        let fix = "write 1 kbit/s to 100 Gbit/s, or a partition for nothing at all";
        return Err(Invalid::new("network.rate.bits_per_second", bits, "not a rate that can be kept", fix));
    }
    let time =
        |bytes: u64| (u128::from(bytes) * 8_000_000_000 / u128::from(bits)).min(u128::from(u64::MAX)) as u64;
    let limit = if rate.limit_bytes == 0 { DEFAULT_LIMIT } else { rate.limit_bytes };
    for (name, bytes) in [("burst_bytes", rate.burst_bytes), ("limit_bytes", rate.limit_bytes)] {
        if time(bytes) > LONGEST_DELAY.as_nanos() as u64 {
            let most = u128::from(bits) / 8 * u128::from(LONGEST_DELAY.as_secs());
            let problem = format!("at this rate it lasts longer than {LONGEST_DELAY:?}");
            return Err(Invalid::new(
                format!("network.rate.{name}"),
                bytes,
                problem,
                format!("at most {most}"),
            ));
        }
    }
    if rate.overhead_bytes.unsigned_abs() > 1500 {
        let fix = "-1500 to 1500";
        return Err(Invalid::new(
            "network.rate.overhead_bytes",
            rate.overhead_bytes,
            "larger than a packet",
            fix,
        ));
    }
    action.byte_time = ((8_000_000_000_u128 << 24) / u128::from(bits)) as u64;
    action.burst = time(rate.burst_bytes);
    action.backlog = time(limit).min(LONGEST) + action.burst;
    action.overhead = i64::from(rate.overhead_bytes) as u64;
    Ok(())
}

/// Refuses where every packet would be lost: a delay, the time of a packet at the rate and a slot come one after the other.
fn together(action: &Action<u64>) -> Result<(), Invalid> {
    let sum =
        action.latency + action.slot_max + ((FRAME * action.byte_time) >> 24).saturating_sub(action.burst);
    if action.latency == 0 || sum <= LONGEST {
        return Ok(());
    }
    let problem = "with the time a full packet takes at the rate and the longest slot it is longer than a packet can be held";
    let given = format!("{:?}", Duration::from_nanos(action.latency));
    let fix = format!("at most {LONGEST_DELAY:?} together");
    Err(Invalid::new("network.delay.latency", given, problem, fix))
}

/// The same ports in as few ranges as that takes: however many are asked for, there are no more ports than there are.
fn merged(mut ranges: Vec<Ports>) -> Vec<Ports> {
    ranges.sort_unstable_by_key(|range| range.first);
    let mut merged: Vec<Ports> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(before) if range.first <= before.last.saturating_add(1) => {
                before.last = before.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

fn dns_of(dns: &v1::Dns, peers: &mut [Peer]) -> Result<Dns, Invalid> {
    let names = dns.names.iter().enumerate().map(|(i, name)| {
        let lower = name.trim_end_matches('.').to_lowercase();
        if is_name(lower.strip_prefix("*.").unwrap_or(&lower)) {
            return Ok(lower);
        }
        let fix = "write it like api.example.com, or *.example.com for everything below";
        Err(Invalid::new(format!("network.dns.names[{i}]"), name, "not a host name", fix))
    });
    let names = names.collect::<Result<_, _>>()?;
    let addresses = dns.addresses.iter().enumerate().map(|(i, address)| {
        address.parse::<IpAddr>().map_err(|_| {
            let fix = "write it like 10.0.0.7 or fd00::7";
            Invalid::new(format!("network.dns.addresses[{i}]"), address, "not an IP address", fix)
        })
    });
    let addresses = addresses.collect::<Result<Vec<_>, _>>()?;
    if addresses.is_empty() == (dns.answer() == v1::DnsAnswer::Addresses) {
        let fix = "give addresses with the answer `addresses`, and only then";
        return Err(Invalid::new("network.dns.addresses", addresses.len(), "do not fit the answer", fix));
    }
    let delay = Duration::from_nanos(dns.delay_ns);
    if delay > LONGEST_DELAY {
        let fix = format!("at most {LONGEST_DELAY:?}");
        return Err(Invalid::new(
            "network.dns.delay",
            format!("{delay:?}"),
            "longer than a packet can be held",
            fix,
        ));
    }
    let answer = match dns.answer() {
        v1::DnsAnswer::Nxdomain => DnsAnswer::NxDomain,
        v1::DnsAnswer::Servfail => DnsAnswer::ServFail,
        v1::DnsAnswer::Drop => DnsAnswer::Drop,
        v1::DnsAnswer::Addresses => DnsAnswer::Addresses(addresses),
        v1::DnsAnswer::Forward if delay.is_zero() => {
            let fix = "give a delay, or another answer";
            return Err(Invalid::new(
                "network.dns.delay",
                0,
                "a query that goes on at once is not hurt",
                fix,
            ));
        }
        v1::DnsAnswer::Forward => DnsAnswer::Forward,
        v1::DnsAnswer::Unspecified => {
            let fix = "choose nxdomain, servfail, drop, addresses or forward";
            return Err(Invalid::new("network.dns.answer", "", "missing", fix));
        }
    };
    for (i, Peer { clause, .. }) in peers.iter_mut().enumerate() {
        if !matches!(clause.protocol, None | Some(Protocol::Udp)) || !clause.egress {
            let problem = "queries are UDP packets that leave the target";
            let fix = "leave out protocol and direction";
            return Err(Invalid::new(format!("network.peers[{i}]"), "not outgoing UDP", problem, fix));
        }
        (clause.protocol, clause.ingress) = (Some(Protocol::Udp), false);
        if clause.peer_ports.is_empty() {
            clause.peer_ports.push(Ports { first: DOMAIN, last: DOMAIN });
        }
    }
    Ok(Dns { names, answer, delay })
}

fn peer_of(field: &str, peer: &v1::Peer, egress: bool, ingress: bool) -> Result<Peer, Invalid> {
    let cidrs = peer.cidrs.iter().enumerate().map(|(j, text)| {
        text.parse::<Cidr>().map_err(|problem| {
            Invalid::new(
                format!("{field}.cidrs[{j}]"),
                text,
                problem,
                "write it like 10.0.0.7/32 or fd00::/64",
            )
        })
    });
    let ports = |name: &str, ranges: &[v1::PortRange]| {
        let ranges = ranges.iter().enumerate().map(|(j, range)| {
            let valid = |port: u32| u16::try_from(port).ok().filter(|&port| port > 0);
            match (valid(range.first), valid(range.last)) {
                (Some(first), Some(last)) if first <= last => Ok(Ports { first, last }),
                _ => Err(Invalid::new(
                    format!("{field}.{name}[{j}]"),
                    format!("{}-{}", range.first, range.last),
                    "not a range of ports",
                    "write a first port and a last one, from 1 to 65535",
                )),
            }
        });
        ranges.collect::<Result<Vec<_>, _>>().map(merged)
    };
    let numbers = |name: &str, values: &[u32], most: u16| {
        let values = values.iter().enumerate().map(|(j, &value)| {
            u16::try_from(value).ok().filter(|&v| v <= most).ok_or_else(|| {
                let fix = format!("write a number from 0 to {most}");
                Invalid::new(format!("{field}.{name}[{j}]"), value, "out of range", fix)
            })
        });
        values.collect::<Result<Vec<_>, _>>()
    };
    let bytes = |values: Vec<u16>| values.into_iter().map(|v| v as u8).collect::<Vec<u8>>();
    let hosts = peer.hosts.iter().enumerate().map(|(j, name)| {
        if is_name(name) {
            return Ok(name.clone());
        }
        let fix = "write it like redis.internal; addresses are cidrs";
        Err(Invalid::new(format!("{field}.hosts[{j}]"), name, "not a host name", fix))
    });
    let tcp_flags = peer.tcp_flags.as_ref().map(|flags| {
        let [set, clear] = [("set", flags.set), ("clear", flags.clear)].map(|(name, value)| {
            u8::try_from(value).map_err(|_| {
                let fix = "add up FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128";
                Invalid::new(format!("{field}.tcp_flags.{name}"), value, "not a set of flags", fix)
            })
        });
        let (set, clear) = (set?, clear?);
        if set & clear != 0 {
            let fix = "ask for each flag once";
            return Err(Invalid::new(format!("{field}.tcp_flags"), set & clear, "both set and clear", fix));
        }
        Ok(Flags { set, clear })
    });
    let clause = Clause {
        except: false,
        egress,
        ingress,
        cidrs: cidrs.collect::<Result<_, _>>()?,
        peer_ports: ports("ports", &peer.ports)?,
        local_ports: ports("local_ports", &peer.local_ports)?,
        protocol: match peer.protocol() {
            v1::Protocol::Unspecified => None,
            v1::Protocol::Tcp => Some(Protocol::Tcp),
            v1::Protocol::Udp => Some(Protocol::Udp),
            v1::Protocol::Icmp => Some(Protocol::Icmp),
        },
        dscp: bytes(numbers("dscp", &peer.dscp, 63)?),
        vlans: numbers("vlans", &peer.vlans, 4094)?,
        icmp_types: bytes(numbers("icmp_types", &peer.icmp_types, 255)?),
        tcp_flags: tcp_flags.transpose()?,
        fragments: match peer.fragments() {
            v1::Fragments::Unspecified => None,
            v1::Fragments::Only => Some(true),
            v1::Fragments::Never => Some(false),
        },
        cgroups: None,
    };
    let has_ports = !(clause.peer_ports.is_empty() && clause.local_ports.is_empty());
    let never = [
        (clause.protocol == Some(Protocol::Icmp) && has_ports, "icmp", "it has no ports"),
        (
            !clause.icmp_types.is_empty() && !matches!(clause.protocol, None | Some(Protocol::Icmp)),
            "not icmp",
            "only ICMP has ICMP types",
        ),
        (!clause.icmp_types.is_empty() && has_ports, "icmp_types", "ICMP has no ports"),
        (
            clause.tcp_flags.is_some() && !matches!(clause.protocol, None | Some(Protocol::Tcp)),
            "not tcp",
            "only TCP has TCP flags",
        ),
    ];
    if let Some((_, value, problem)) = never.into_iter().find(|(is, ..)| *is) {
        let fix = "leave one of them out: no packet is both";
        return Err(Invalid::new(format!("{field}.protocol"), value, problem, fix));
    }
    Ok(Peer { clause, hosts: hosts.collect::<Result<_, _>>()? })
}

fn chance(field: &str, chance: Option<&v1::Chance>) -> Result<Chance<u64>, Invalid> {
    let Some(chance) = chance else { return Ok(Chance::default()) };
    let ratio = ratio(&format!("{field}.ratio"), chance.ratio)?;
    Ok(Chance::new(ratio, correlation(&format!("{field}.correlation"), chance.correlation)?))
}

/// A share where 0 means that none was given.
fn share(field: &str, value: f64) -> Result<u64, Invalid> {
    Ok(if value == 0.0 { u64::MAX } else { threshold(ratio(field, value)?) })
}

fn ratio(field: &str, value: f64) -> Result<f64, Invalid> {
    if (0.0..=1.0).contains(&value) {
        return Ok(value);
    }
    Err(Invalid::new(field, value, "not a share", "write a ratio from 0 to 1"))
}

/// A correlation of 1 would never leave the first decision.
fn correlation(field: &str, value: f64) -> Result<f64, Invalid> {
    if (0.0..1.0).contains(&value) {
        return Ok(value);
    }
    Err(Invalid::new(field, value, "not a correlation that ends", "write a ratio from 0 to less than 1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_ports_are_as_few_as_they_can_be() {
        let ranges = |all: &[[u16; 2]]| all.iter().map(|&[first, last]| Ports { first, last }).collect();
        let some = ranges(&[[80, 90], [7, 7], [8, 8], [85, 100], [1, 3], [2, 2], [65_535, 65_535]]);
        assert_eq!(merged(some), ranges(&[[1, 3], [7, 8], [80, 100], [65_535, 65_535]]) as Vec<_>);
        assert_eq!(merged(vec![Ports { first: 1, last: 65_535 }; 100_000]).len(), 1);
    }
}
