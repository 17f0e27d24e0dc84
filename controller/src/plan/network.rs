//! Network faults as a plan or a command line asks for them, and as an agent is told.
//!
//! What a packet suffers is kept as the protocol's messages, which say it all; the functions here that make them let
//! nothing wrong into them, and [`Network::check`] looks at the whole.

use std::{fmt::Write as _, ops::RangeInclusive, path::Path, time::Duration};

use squall_proto::v1;

use super::{
    cover,
    fault::{bytes_shown, nanos, percent, time},
    units::{self, LONGEST_DELAY, Wrong, plain},
};

/// Rates that an agent keeps, bits a second.
const RATES: RangeInclusive<u64> = 1_000..=100_000_000_000;

/// What a network fault does, and to which packets.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Network {
    /// Far sides, each with the name that a person gave it.
    pub(crate) peers: Vec<(String, Address)>,
    /// Far sides that are left alone; the same form.
    pub(crate) except: Vec<(String, Address)>,
    pub(crate) direction: Direction,
    /// Share of packets, 0 to 1.
    pub(crate) share: Option<f64>,
    /// Share of flows, 0 to 1.
    pub(crate) flows: Option<f64>,
    pub(crate) delay: Option<v1::Delay>,
    pub(crate) duplicate: Option<v1::Chance>,
    pub(crate) loss: Option<v1::Loss>,
    pub(crate) corrupt: Option<v1::Corrupt>,
    pub(crate) reorder: Option<v1::Reorder>,
    pub(crate) rate: Option<v1::Rate>,
    pub(crate) slots: Option<v1::Slots>,
    pub(crate) partition: Option<Partition>,
    pub(crate) reset: bool,
    /// Bytes.
    pub(crate) cut: Option<u64>,
    pub(crate) dns: Option<v1::Dns>,
    pub(crate) interface: Option<String>,
    pub(crate) seed: Option<u64>,
    pub(crate) per_segment: bool,
    pub(crate) unprotected: bool,
    pub(crate) sockets: Option<Sockets>,
    pub(crate) side: Option<Side>,
}

/// Which packets of a target are hurt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Direction {
    /// Leaving and arriving
    #[default]
    Both,
    /// Leaving the target
    Egress,
    /// Arriving at the target
    Ingress,
}

/// How a partition treats packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Partition {
    /// They vanish.
    Silent,
    /// TCP gets a RST, the rest an ICMP error.
    Refuse,
}

/// Whose packets, on interfaces that several services share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Sockets {
    /// Every packet of the network namespace
    All,
    /// Only packets from and to sockets of the target's cgroup
    Target,
}

/// On which end of a pod's veth pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Side {
    /// The target's own end
    Inner,
    /// The end outside, on the host
    Host,
}

/// How the jitter of a delay is distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Distribution {
    /// Plus or minus the jitter, all alike
    Uniform,
    /// The jitter is one standard deviation
    Normal,
    /// A long tail
    Pareto,
    /// netem's mix of pareto and normal
    Paretonormal,
}

/// What DNS queries get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum DnsAnswer {
    /// There is no such name
    Nxdomain,
    /// The server failed
    Servfail,
    /// No answer
    Drop,
    /// The right answer, later
    Forward,
}

/// The far side of a network fault, and what else a packet must be.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Address {
    /// CIDRs; none means any address, unless there are hosts.
    pub cidrs: Vec<String>,
    /// Names, resolved where the target is.
    pub hosts: Vec<String>,
    /// Ports of the peer, first to last; none means any.
    pub ports: Vec<(u16, u16)>,
    /// Ports of the target, first to last; none means any.
    pub local_ports: Vec<(u16, u16)>,
    /// Protocol.
    pub protocol: Protocol,
    /// DSCP code points, 0 to 63; none means any.
    pub dscp: Vec<u32>,
    /// VLAN ids, 0 for untagged; none means any.
    pub vlans: Vec<u32>,
    /// ICMP types, 0 to 255; none means any.
    pub icmp: Vec<u32>,
    /// TCP flags.
    pub tcp_flags: Option<v1::TcpFlags>,
    /// Fragments or whole packets; none means both.
    pub fragments: Option<Fragments>,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Protocol {
    /// Any.
    #[default]
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and `ICMPv6`.
    Icmp,
}

/// Whether a packet is a fragment of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Fragments {
    /// Fragments, the first included
    Only,
    /// Whole packets
    Never,
}

/// Parts of a fault that do not go together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Clash {
    /// The field to blame, as a plan writes it: `delay.correlation`. Empty for the fault as a whole.
    pub(crate) field: &'static str,
    /// What is wrong.
    pub(crate) message: String,
    /// What to do.
    pub(crate) fix: String,
}

/// netem's Gilbert-Elliott model. Without `r` packets are lost independently of each other.
pub(crate) fn gilbert_elliott(
    p: f64,
    r: Option<f64>,
    bad: Option<f64>,
    good: Option<f64>,
) -> Result<v1::GilbertElliott, Wrong> {
    let model = v1::GilbertElliott {
        p,
        r: r.unwrap_or(1.0 - p),
        loss_bad: bad.unwrap_or(1.0),
        loss_good: good.unwrap_or(0.0),
    };
    if model.loss_good == 0.0 && (p == 0.0 || model.loss_bad == 0.0) {
        return Err(("this loses nothing".into(), "give a p and a lossBad of more than 0%".into()));
    }
    Ok(model)
}

/// netem's four states, with its defaults for those that are not given: p31, p32, p23, p14.
pub(crate) fn four_state(p13: f64, rest: [Option<f64>; 4]) -> Result<v1::FourState, Wrong> {
    let [p31, p32, p23, p14] = rest;
    let model = v1::FourState {
        p13,
        p31: p31.unwrap_or(1.0 - p13),
        p32: p32.unwrap_or(0.0),
        p23: p23.unwrap_or(1.0),
        p14: p14.unwrap_or(0.0),
    };
    let sums = [("p13 and p14", p13 + model.p14), ("p31 and p32", model.p31 + model.p32)];
    for (names, sum) in sums {
        // Two percentages that make 100% may be a bit more in binary.
        if plain(sum) > 1.0 {
            let message =
                format!("{names} are {} together: a state is left more often than always", percent(sum));
            return Err((message, "give at most 100% together".into()));
        }
    }
    if p13 == 0.0 && model.p14 == 0.0 {
        return Err(("this loses nothing".into(), "give a p13 or p14 of more than 0%".into()));
    }
    Ok(model)
}

/// Slots in which packets leave together: from one to the next, and how much leaves in one.
pub(crate) fn slots(
    min: Duration,
    max: Option<Duration>,
    packets: Option<u64>,
    bytes: Option<u64>,
) -> Result<v1::Slots, Wrong> {
    let max = max.unwrap_or(min);
    if max.is_zero() || max > LONGEST_DELAY {
        return Err((format!("slots {max:?} apart"), "give more than 0, and at most 60s".into()));
    }
    if min > max {
        return Err((format!("at least {min:?} is more than at most {max:?}"), "exchange them".into()));
    }
    Ok(v1::Slots {
        min_ns: min.as_nanos() as u64,
        max_ns: max.as_nanos() as u64,
        packets: packets.unwrap_or_default(),
        bytes: bytes.unwrap_or_default(),
    })
}

/// A rate with its burst and its queue, bytes, and what is added to each packet, bytes.
pub(crate) fn rate(
    bits_per_second: u64,
    burst: Option<u64>,
    limit: Option<u64>,
    overhead: Option<i32>,
) -> Result<v1::Rate, Wrong> {
    if !RATES.contains(&bits_per_second) {
        let message = format!("{} cannot be kept", bits_shown(bits_per_second));
        return Err((message, "expected 1kbit to 100gbit; partition lets nothing pass".into()));
    }
    let most = u128::from(bits_per_second) / 8 * u128::from(LONGEST_DELAY.as_secs());
    for (name, bytes) in [("burst", burst), ("limit", limit)] {
        if bytes.is_some_and(|bytes| u128::from(bytes) > most) {
            let message = format!("at {}, this {name} lasts more than 60s", bits_shown(bits_per_second));
            return Err((message, format!("give at most {most}B")));
        }
    }
    let overhead_bytes = overhead.unwrap_or_default();
    if overhead_bytes.unsigned_abs() > 1500 {
        return Err((
            format!("an overhead of {overhead_bytes} is more than a packet"),
            "give -1500 to 1500".into(),
        ));
    }
    Ok(v1::Rate {
        bits_per_second,
        burst_bytes: burst.unwrap_or_default(),
        limit_bytes: limit.unwrap_or_default(),
        overhead_bytes,
    })
}

/// What DNS queries get; the names and addresses are right already.
pub(crate) fn dns(
    names: Vec<String>,
    answer: Option<DnsAnswer>,
    addresses: Vec<String>,
    delay: Duration,
) -> Result<v1::Dns, Wrong> {
    let wrong = |message: &str, fix: &str| Err((message.to_owned(), fix.to_owned()));
    let answer = match answer {
        Some(_) if !addresses.is_empty() => {
            return wrong("an answer and addresses", "the addresses are the answer; remove one of them");
        }
        Some(DnsAnswer::Forward) if delay.is_zero() => {
            return wrong("queries that are forwarded at once notice nothing", "add a delay");
        }
        Some(DnsAnswer::Drop) if !delay.is_zero() => {
            return wrong("what is dropped cannot be late", "remove the delay, or forward the queries");
        }
        Some(DnsAnswer::Nxdomain) => v1::DnsAnswer::Nxdomain,
        Some(DnsAnswer::Servfail) => v1::DnsAnswer::Servfail,
        Some(DnsAnswer::Drop) => v1::DnsAnswer::Drop,
        Some(DnsAnswer::Forward) => v1::DnsAnswer::Forward,
        None if addresses.is_empty() => {
            let fix = "expected an answer (nxdomain, servfail, drop, forward) or addresses";
            return wrong("nothing says what queries get", fix);
        }
        None => v1::DnsAnswer::Addresses,
    };
    Ok(v1::Dns { names, answer: answer.into(), addresses, delay_ns: nanos(delay) })
}

/// The table of a distribution from its file.
pub(crate) fn table(path: &Path) -> Result<Vec<i32>, Wrong> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        (format!("cannot read {}: {e}", path.display()), "expected a file such as netem's normal.dist".into())
    })?;
    units::table(&text)
        .map_err(|(line, (message, fix))| (format!("{}:{line}: {message}", path.display()), fix))
}

impl Distribution {
    pub(crate) fn proto(self) -> v1::Distribution {
        match self {
            Self::Uniform => v1::Distribution::Uniform,
            Self::Normal => v1::Distribution::Normal,
            Self::Pareto => v1::Distribution::Pareto,
            Self::Paretonormal => v1::Distribution::Paretonormal,
        }
    }
}

impl Network {
    /// What it does to packets, in the words of a plan.
    fn effects(&self) -> Vec<&'static str> {
        let effects = [
            ("delay", self.delay.is_some()),
            ("loss", self.loss.is_some()),
            ("duplicate", self.duplicate.is_some()),
            ("corrupt", self.corrupt.is_some()),
            ("reorder", self.reorder.is_some()),
            ("rate", self.rate.is_some()),
            ("slots", self.slots.is_some()),
            ("partition", self.partition.is_some()),
            ("reset", self.reset),
            ("cut", self.cut.is_some()),
            ("dns", self.dns.is_some()),
        ];
        effects.into_iter().filter_map(|(name, there)| there.then_some(name)).collect()
    }

    /// What is wrong with it as a whole, all of it. `on_interface` is whether its target is an interface.
    pub(crate) fn check(&self, on_interface: bool) -> Vec<Clash> {
        let mut clashes = Vec::new();
        let mut clash = |field, message: &str, fix: &str| {
            clashes.push(Clash { field, message: message.into(), fix: fix.into() });
        };
        let effects = self.effects();
        if effects.is_empty() {
            let fix = "add delay, loss, duplicate, corrupt, rate, slots, partition, reset, cut or dns";
            clash("", "this does nothing", fix);
        }
        let alone = [
            ("partition", "a partition drops every packet"),
            ("reset", "a reset ends every connection"),
            ("cut", "a cut acts on whole connections"),
            ("dns", "a dns fault acts on queries alone"),
        ];
        if effects.len() > 1
            && let Some((name, why)) = alone.into_iter().find(|(name, _)| effects.contains(name))
        {
            let others: Vec<&str> = effects.iter().copied().filter(|other| *other != name).collect();
            let others = others.join(", ");
            let message = format!("{why}, so it does not go with {others}");
            clash(name, &message, &format!("remove {others}, or {name}"));
        }
        if self.reorder.is_some() && self.delay.is_none() {
            clash(
                "reorder",
                "without a delay no packet can overtake another",
                "add a delay, or remove reorder",
            );
        }
        if let Some(delay) = &self.delay {
            self.check_delay(delay, &mut clash);
        }
        if on_interface && self.sockets == Some(Sockets::Target) {
            clash(
                "sockets",
                "an interface has no sockets of its own",
                "aim at a process or cgroup, or remove it",
            );
        }
        if self.dns.is_some() && self.direction == Direction::Ingress {
            clash(
                "direction",
                "queries leave the target, so none would be met",
                "write egress, or leave it out",
            );
        }
        let wanted = match () {
            () if self.dns.is_some() => Some(("DNS queries are met over UDP", Protocol::Udp)),
            () if self.reset || self.cut.is_some() => Some(("only TCP has connections", Protocol::Tcp)),
            () => None,
        };
        if let Some((why, protocol)) = wanted {
            for (name, peer) in &self.peers {
                if peer.protocol_meant() != Protocol::Any && peer.protocol_meant() != protocol {
                    let message = format!("{why}, and `{name}` is another protocol");
                    clash("to", &message, "change its protocol, or leave it out");
                }
            }
        }
        let whole = [(String::new(), Address::default())];
        let peers = if self.peers.is_empty() { &whole[..] } else { &self.peers };
        let excepted = |peer: &Address| {
            self.except.iter().any(|(_, except)| cover::peer(&except.proto(), &peer.proto()))
        };
        if peers.iter().all(|(_, peer)| excepted(peer)) {
            clash("except", "every packet is excepted, so this does nothing", "name less here");
        }
        clashes
    }

    fn check_delay(&self, delay: &v1::Delay, clash: &mut impl FnMut(&'static str, &str, &str)) {
        if delay.jitter_ns == 0 {
            let fix = "add jitter, or remove it";
            if delay.correlation > 0.0 {
                clash("delay.correlation", "without jitter nothing is drawn", fix);
            }
            if !matches!(delay.distribution(), v1::Distribution::Unspecified | v1::Distribution::Uniform) {
                clash("delay.distribution", "without jitter nothing is drawn", fix);
            }
            if delay.keep_order {
                clash("delay.keepOrder", "without jitter no packet overtakes another", fix);
            }
        }
        if delay.jitter_ns > delay.latency_ns {
            let fix = format!("give at most the latency, {}", time(Duration::from_nanos(delay.latency_ns)));
            clash("delay.jitter", "a packet cannot leave before it came", &fix);
        }
        if delay.keep_order {
            let fix = "remove one of them";
            if delay.correlation > 0.0 {
                clash("delay.correlation", "correlation does not go with keeping the order", fix);
            }
            if self.reorder.is_some() {
                clash("reorder", "reorder does not go with keeping the order", fix);
            }
        }
    }

    pub(crate) fn proto(&self) -> v1::Fault {
        let peers = |of: &[(String, Address)]| of.iter().map(|(_, address)| address.proto()).collect();
        let network = v1::NetworkFault {
            direction: match self.direction {
                Direction::Both => v1::Direction::Both,
                Direction::Egress => v1::Direction::Egress,
                Direction::Ingress => v1::Direction::Ingress,
            }
            .into(),
            peers: peers(&self.peers),
            share: self.share.unwrap_or(1.0),
            delay: self.delay.clone(),
            loss: self.loss,
            partition: self.partition.is_some(),
            seed: self.seed.unwrap_or(0),
            interface: self.interface.clone().unwrap_or_default(),
            except: peers(&self.except),
            flow_share: self.flows.unwrap_or(1.0),
            duplicate: self.duplicate,
            corrupt: self.corrupt,
            reorder: self.reorder,
            rate: self.rate,
            slots: self.slots,
            refusal: match self.partition {
                None => v1::Refusal::Unspecified,
                Some(Partition::Silent) => v1::Refusal::Silent,
                Some(Partition::Refuse) => v1::Refusal::Answer,
            }
            .into(),
            reset: self.reset,
            cut: self.cut.map(|after_bytes| v1::Cut { after_bytes }),
            dns: self.dns.clone(),
            unprotected: self.unprotected,
            sockets: match self.sockets {
                None => v1::Sockets::Unspecified,
                Some(Sockets::All) => v1::Sockets::All,
                Some(Sockets::Target) => v1::Sockets::Target,
            }
            .into(),
            per_segment: self.per_segment,
            side: match self.side {
                None => v1::Side::Unspecified,
                Some(Side::Inner) => v1::Side::Inner,
                Some(Side::Host) => v1::Side::Host,
            }
            .into(),
        };
        v1::Fault { kind: Some(v1::fault::Kind::Network(network)) }
    }

    /// `network recommender ↔ redis: delay 2s ±300ms, loss 5%`.
    pub(crate) fn summary(&self, on: &str) -> String {
        let mut does = Vec::new();
        does.extend(self.delay.as_ref().map(delay_words));
        does.extend(self.loss.as_ref().map(loss_words));
        does.extend(self.duplicate.as_ref().map(|chance| format!("duplicate {}", chance_words(chance))));
        does.extend(self.corrupt.as_ref().map(|corrupt| {
            let silent = if corrupt.silent { " silently" } else { "" };
            format!("corrupt {}{silent}", chance_words(&corrupt.chance.unwrap_or_default()))
        }));
        does.extend(self.reorder.as_ref().map(|reorder| {
            let gap = if reorder.gap > 1 { format!(" gap {}", reorder.gap) } else { String::new() };
            format!("reorder {}{gap}", chance_words(&reorder.chance.unwrap_or_default()))
        }));
        does.extend(self.rate.as_ref().map(rate_words));
        does.extend(self.slots.as_ref().map(slots_words));
        does.extend(self.partition.map(|partition| match partition {
            Partition::Silent => "partition".to_owned(),
            Partition::Refuse => "refuse".to_owned(),
        }));
        does.extend(self.reset.then(|| "reset".to_owned()));
        does.extend(self.cut.map(|bytes| format!("cut after {}", bytes_shown(bytes))));
        does.extend(self.dns.as_ref().map(dns_words));
        does.extend(self.share.map(|share| format!("on {} of packets", percent(share))));
        does.extend(self.flows.map(|share| format!("on {} of flows", percent(share))));
        does.extend(self.per_segment.then(|| "per segment".to_owned()));
        does.extend(self.unprotected.then(|| "unprotected".to_owned()));
        does.extend(self.sockets.map(|sockets| match sockets {
            Sockets::All => "all sockets".to_owned(),
            Sockets::Target => "the target's sockets".to_owned(),
        }));
        does.extend(self.side.map(|side| match side {
            Side::Inner => "inner side".to_owned(),
            Side::Host => "host side".to_owned(),
        }));
        let names = |of: &[(String, Address)]| {
            of.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
        };
        let mut peers = if self.peers.is_empty() { "everyone".to_owned() } else { names(&self.peers) };
        if !self.except.is_empty() {
            let _ = write!(peers, " except {}", names(&self.except));
        }
        let arrow = match self.direction {
            Direction::Both => "↔",
            Direction::Egress => "→",
            Direction::Ingress => "←",
        };
        let mut text = format!("network {on} {arrow} {peers}: {}", does.join(", "));
        if let Some(interface) = &self.interface {
            let _ = write!(text, " at {interface}");
        }
        text
    }
}

fn correlated(correlation: f64) -> String {
    if correlation > 0.0 { format!(" {} correlated", percent(correlation)) } else { String::new() }
}

fn chance_words(chance: &v1::Chance) -> String {
    format!("{}{}", percent(chance.ratio), correlated(chance.correlation))
}

fn delay_words(delay: &v1::Delay) -> String {
    let mut text = format!("delay {}", time(Duration::from_nanos(delay.latency_ns)));
    if delay.jitter_ns > 0 {
        let _ = write!(text, " ±{}", time(Duration::from_nanos(delay.jitter_ns)));
    }
    text += match delay.distribution() {
        v1::Distribution::Unspecified | v1::Distribution::Uniform => "",
        v1::Distribution::Normal => " normal",
        v1::Distribution::Pareto => " pareto",
        v1::Distribution::Paretonormal => " paretonormal",
        v1::Distribution::Table => " by table",
    };
    text += &correlated(delay.correlation);
    if delay.keep_order {
        text += " in order";
    }
    text
}

fn loss_words(loss: &v1::Loss) -> String {
    let ecn = if loss.ecn { " ecn" } else { "" };
    model_words(loss) + ecn
}

fn model_words(loss: &v1::Loss) -> String {
    if let Some(v1::GilbertElliott { p, r, loss_bad, loss_good }) = loss.gilbert_elliott {
        let mut text = format!("loss gilbertElliott p {} r {}", percent(p), percent(r));
        if loss_bad < 1.0 {
            let _ = write!(text, " bad {}", percent(loss_bad));
        }
        if loss_good > 0.0 {
            let _ = write!(text, " good {}", percent(loss_good));
        }
        return text;
    }
    if let Some(v1::FourState { p13, p31, p32, p23, p14 }) = loss.four_state {
        let all = [("p13", p13), ("p31", p31), ("p32", p32), ("p23", p23), ("p14", p14)];
        let all: Vec<String> = all.iter().map(|(name, p)| format!("{name} {}", percent(*p))).collect();
        return format!("loss state {}", all.join(" "));
    }
    match loss.every {
        0 => format!("loss {}{}", percent(loss.ratio), correlated(loss.correlation)),
        n => format!("loss of 1 in every {n}"),
    }
}

/// `10mbit`, in the largest unit that is exact.
fn bits_shown(bits: u64) -> String {
    let units = [(1_000_000_000, "gbit"), (1_000_000, "mbit"), (1000, "kbit")];
    let exact = units.iter().find(|(unit, _)| bits.is_multiple_of(*unit));
    exact.map_or_else(|| format!("{bits}bit"), |(unit, name)| format!("{}{name}", bits / unit))
}

fn slots_words(slots: &v1::Slots) -> String {
    let [min, max] = [slots.min_ns, slots.max_ns].map(Duration::from_nanos);
    let mut text =
        if min == max { format!("slots every {max:?}") } else { format!("slots every {min:?} to {max:?}") };
    if slots.packets > 0 {
        let _ = write!(text, " packets {}", slots.packets);
    }
    if slots.bytes > 0 {
        let _ = write!(text, " bytes {}", bytes_shown(slots.bytes));
    }
    text
}

fn rate_words(rate: &v1::Rate) -> String {
    let mut text = format!("rate {}", bits_shown(rate.bits_per_second));
    if rate.burst_bytes > 0 {
        let _ = write!(text, " burst {}", bytes_shown(rate.burst_bytes));
    }
    if rate.limit_bytes > 0 {
        let _ = write!(text, " limit {}", bytes_shown(rate.limit_bytes));
    }
    if rate.overhead_bytes != 0 {
        let _ = write!(text, " overhead {}B", rate.overhead_bytes);
    }
    text
}

fn dns_words(dns: &v1::Dns) -> String {
    let names = if dns.names.is_empty() { "every name".to_owned() } else { dns.names.join(" ") };
    let answer = match dns.answer() {
        v1::DnsAnswer::Unspecified => String::new(),
        v1::DnsAnswer::Nxdomain => "nxdomain".into(),
        v1::DnsAnswer::Servfail => "servfail".into(),
        v1::DnsAnswer::Drop => "drop".into(),
        v1::DnsAnswer::Addresses => dns.addresses.join(" "),
        v1::DnsAnswer::Forward => "forward".into(),
    };
    let after = Duration::from_nanos(dns.delay_ns);
    let after = if after.is_zero() { String::new() } else { format!(" after {}", time(after)) };
    format!("dns {names}: {answer}{after}")
}

impl Address {
    /// Whether it matches every packet.
    pub(crate) fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    /// The protocol it is about, given or not.
    pub(crate) fn protocol_meant(&self) -> Protocol {
        match self.protocol {
            Protocol::Any if self.tcp_flags.is_some() => Protocol::Tcp,
            Protocol::Any if !self.icmp.is_empty() => Protocol::Icmp,
            given => given,
        }
    }

    /// Terms that no packet could meet all at once.
    pub(crate) fn check(&self) -> Result<(), Wrong> {
        let wrong = |message: &str, fix: &str| Err((message.to_owned(), fix.to_owned()));
        if self.tcp_flags.is_some() && (self.protocol_meant() != Protocol::Tcp || !self.icmp.is_empty()) {
            return wrong("only tcp has TCP flags", "remove them, or use tcp");
        }
        if !self.icmp.is_empty() && self.protocol_meant() != Protocol::Icmp {
            return wrong("only icmp has ICMP types", "remove them, or use icmp");
        }
        let ports = !(self.ports.is_empty() && self.local_ports.is_empty());
        if self.protocol_meant() == Protocol::Icmp && ports {
            return wrong("icmp has no ports", "remove the ports, or use tcp or udp");
        }
        Ok(())
    }

    /// Its terms, for people.
    pub(crate) fn shown(&self) -> String {
        let mut parts = self.cidrs.clone();
        parts.extend(self.hosts.iter().cloned());
        let range = |(a, b): &(u16, u16)| if a == b { a.to_string() } else { format!("{a}-{b}") };
        parts.extend(self.ports.iter().map(|ports| format!(":{}", range(ports))));
        parts.extend(self.local_ports.iter().map(|ports| format!("local :{}", range(ports))));
        match self.protocol {
            Protocol::Any => {}
            Protocol::Tcp => parts.push("tcp".into()),
            Protocol::Udp => parts.push("udp".into()),
            Protocol::Icmp => parts.push("icmp".into()),
        }
        parts.extend(self.dscp.iter().map(|point| format!("dscp {point}")));
        parts.extend(self.vlans.iter().map(|id| match id {
            0 => "untagged".to_owned(),
            id => format!("vlan {id}"),
        }));
        parts.extend(self.icmp.iter().map(|kind| format!("icmp type {kind}")));
        parts.extend(self.tcp_flags.map(units::tcp_flags_shown));
        parts.extend(self.fragments.map(|fragments| match fragments {
            Fragments::Only => "fragments".to_owned(),
            Fragments::Never => "no fragments".to_owned(),
        }));
        parts.join(" ")
    }

    pub(crate) fn proto(&self) -> v1::Peer {
        let ranges = |ports: &[(u16, u16)]| {
            ports
                .iter()
                .map(|&(first, last)| v1::PortRange { first: first.into(), last: last.into() })
                .collect()
        };
        v1::Peer {
            cidrs: self.cidrs.clone(),
            ports: ranges(&self.ports),
            local_ports: ranges(&self.local_ports),
            protocol: match self.protocol {
                Protocol::Any => v1::Protocol::Unspecified,
                Protocol::Tcp => v1::Protocol::Tcp,
                Protocol::Udp => v1::Protocol::Udp,
                Protocol::Icmp => v1::Protocol::Icmp,
            }
            .into(),
            hosts: self.hosts.clone(),
            dscp: self.dscp.clone(),
            vlans: self.vlans.clone(),
            icmp_types: self.icmp.clone(),
            tcp_flags: self.tcp_flags,
            fragments: match self.fragments {
                None => v1::Fragments::Unspecified,
                Some(Fragments::Only) => v1::Fragments::Only,
                Some(Fragments::Never) => v1::Fragments::Never,
            }
            .into(),
        }
    }
}
