//! `squall inject network`: every knob of a network fault as a flag.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use squall_proto::v1;

use super::{What, parse};
use crate::plan::{
    Address,
    fault::nanos,
    network::{
        self, Clash, Direction, Distribution, DnsAnswer, Fragments, Network, Partition, Side, Sockets,
    },
    units::{self, Wrong},
};

/// `squall inject network`.
#[derive(Debug, Args)]
pub(crate) struct InjectNetwork {
    #[command(flatten)]
    pub common: What,
    #[command(flatten)]
    packets: PacketArgs,
    #[command(flatten)]
    delay: DelayArgs,
    #[command(flatten)]
    loss: LossArgs,
    #[command(flatten)]
    damage: DamageArgs,
    #[command(flatten)]
    rate: RateArgs,
    #[command(flatten)]
    cutting: CuttingArgs,
    #[command(flatten)]
    dns: DnsArgs,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Which packets.
#[derive(Debug, Args)]
#[command(next_help_heading = "Which packets")]
struct PacketArgs {
    /// The far side: `10.0.0.7/32:6379/tcp`, `[fd00::/64]:6379`, `*:53/udp`. Repeatable; without it and --host every
    /// packet
    #[arg(long, value_name = "ADDRESS", value_parser = parse_peer)]
    to: Vec<(String, Address)>,
    /// The far side by its name, which is resolved where the target is: `redis.internal:6379/tcp`. Repeatable
    #[arg(long, value_name = "NAME", value_parser = parse_host)]
    host: Vec<(String, Address)>,
    /// A far side to leave alone, as in --to. Repeatable
    #[arg(long, value_name = "ADDRESS", value_parser = parse_peer)]
    except: Vec<(String, Address)>,
    /// Packets that leave the target, arrive at it, or both
    #[arg(long, value_enum, default_value = "both")]
    direction: Direction,
    /// Share of packets that are touched at all
    #[arg(long, value_name = "SHARE", value_parser = parse(units::part))]
    share: Option<f64>,
    /// Share of flows that are touched, each wholly in or wholly out
    #[arg(long, value_name = "SHARE", value_parser = parse(units::part))]
    flows: Option<f64>,
    /// Only with these ports of the target: `8080,9000-9010`
    #[arg(long, value_name = "PORTS", value_delimiter = ',', value_parser = parse(units::ports))]
    local_ports: Vec<(u16, u16)>,
    /// Only with these DSCP code points: 0 to 63, ef, af11, cs1, …
    #[arg(long, value_name = "POINTS", value_delimiter = ',', value_parser = parse(units::dscp))]
    dscp: Vec<u32>,
    /// Only in these VLANs: 1 to 4094, or untagged
    #[arg(long, value_name = "IDS", value_delimiter = ',', value_parser = parse(units::vlan))]
    vlans: Vec<u32>,
    /// Only these ICMP types: 0 to 255, or echo-request, echo-reply, …
    #[arg(long, value_name = "TYPES", value_parser = parse_icmp)]
    icmp: Option<IcmpTypes>,
    /// Only TCP segments with these flags, and with ! without them: `syn,!ack`
    #[arg(long, value_name = "FLAGS", value_parser = parse(units::tcp_flags))]
    tcp_flags: Option<v1::TcpFlags>,
    /// Only fragments, or never one
    #[arg(long, value_enum, value_name = "WHICH")]
    fragments: Option<Fragments>,
}

/// How late packets are.
#[derive(Debug, Args)]
#[command(next_help_heading = "Delay (of each packet, in each direction)")]
struct DelayArgs {
    /// Delay packets by this, at most 60s
    #[arg(long, value_name = "TIME", value_parser = parse(units::held))]
    delay: Option<Duration>,
    /// Vary the delay by plus or minus this, or by this scale of --distribution
    #[arg(long, value_name = "TIME", value_parser = parse(units::held), requires = "delay")]
    jitter: Option<Duration>,
    /// How the jitter is distributed; uniform where none is given
    #[arg(long, value_enum, value_name = "NAME", requires = "jitter")]
    distribution: Option<Distribution>,
    /// A table in netem's .dist format instead: whole numbers, 8192 is one jitter
    #[arg(long, value_name = "FILE", requires = "jitter", conflicts_with = "distribution")]
    distribution_table: Option<PathBuf>,
    /// How much a delay is like the one before
    #[arg(long, value_name = "SHARE", value_parser = parse(units::share), requires = "jitter")]
    correlation: Option<f64>,
    /// Let no packet of a flow overtake another
    #[arg(long, requires = "delay")]
    keep_order: bool,
    /// Send this share of packets at once instead
    #[arg(long, value_name = "SHARE", value_parser = parse(units::part))]
    reorder: Option<f64>,
    /// So likely a packet overtakes where the one before did
    #[arg(long, value_name = "SHARE", value_parser = parse(units::correlation), requires = "reorder")]
    reorder_correlation: Option<f64>,
    /// Delay at least N-1 packets between two that are sent at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "reorder")]
    gap: Option<u64>,
}

/// Which packets are lost.
#[derive(Debug, Args)]
#[command(next_help_heading = "Loss (one of these models)")]
struct LossArgs {
    /// Lose this share of packets
    #[arg(long, value_name = "SHARE", value_parser = parse(units::part))]
    loss: Option<f64>,
    /// So likely a packet is lost where the one before was
    #[arg(long, value_name = "SHARE", value_parser = parse(units::correlation), requires = "loss")]
    loss_correlation: Option<f64>,
    /// Lose packets in bursts, by Gilbert and Elliott: chance to turn bad, to turn good again (100%-P), loss while
    /// bad (100%), loss while good (0%)
    #[arg(long, value_name = "P[,R[,BAD[,GOOD]]]", value_parser = parse(loss_ge), conflicts_with = "loss")]
    loss_ge: Option<v1::GilbertElliott>,
    /// Lose packets by netem's four states: P31 is 100%-P13, P32 0%, P23 100%, P14 0% where not given
    #[arg(
        long,
        value_name = "P13[,P31[,P32[,P23[,P14]]]]",
        value_parser = parse(loss_state),
        conflicts_with_all = ["loss", "loss_ge"]
    )]
    loss_state: Option<v1::FourState>,
    /// Lose exactly every N-th packet
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u64).range(1..),
        conflicts_with_all = ["loss", "loss_ge", "loss_state"]
    )]
    loss_every: Option<u64>,
    /// Mark packets instead (ECN), where both ends understand that
    #[arg(long)]
    loss_ecn: bool,
}

/// What else happens to packets.
#[derive(Debug, Args)]
#[command(next_help_heading = "Duplicates and damage")]
struct DamageArgs {
    /// Send this share of packets twice
    #[arg(long, value_name = "SHARE", value_parser = parse(units::part))]
    duplicate: Option<f64>,
    /// So likely a packet is sent twice where the one before was
    #[arg(long, value_name = "SHARE", value_parser = parse(units::correlation), requires = "duplicate")]
    duplicate_correlation: Option<f64>,
    /// Flip a bit in this share of packets
    #[arg(long, value_name = "SHARE", value_parser = parse(units::part))]
    corrupt: Option<f64>,
    /// So likely a packet is damaged where the one before was
    #[arg(long, value_name = "SHARE", value_parser = parse(units::correlation), requires = "corrupt")]
    corrupt_correlation: Option<f64>,
    /// Make the checksum right again, so that the receiver takes the damaged packet
    #[arg(long, requires = "corrupt")]
    corrupt_silent: bool,
}

/// How much gets through.
#[derive(Debug, Args)]
#[command(next_help_heading = "Rate")]
struct RateArgs {
    /// Let this much through: 1mbit, 500kbit; as in tc, bps counts bytes
    #[arg(long, value_name = "RATE", value_parser = parse(units::bit_rate))]
    rate: Option<u64>,
    /// So much may pass at once after a pause: 32KiB
    #[arg(long, value_name = "SIZE", value_parser = parse(units::some_bytes), requires = "rate")]
    burst: Option<u64>,
    /// So much may wait, more is dropped; 1000 packets of 1514 bytes where not given
    #[arg(long, value_name = "SIZE", value_parser = parse(units::some_bytes), requires = "rate")]
    limit: Option<u64>,
    /// Bytes to add to the length of each packet; may be negative
    #[arg(long, value_name = "BYTES", requires = "rate", allow_negative_numbers = true)]
    overhead: Option<i32>,
    /// Let packets leave together, as netem's slots: from one slot to the next so long, 20ms or 10ms,20ms
    #[arg(long, value_name = "MIN[,MAX]", value_parser = parse(slot_times))]
    slots: Option<(Duration, Option<Duration>)>,
    /// Packets that leave in one slot at the most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "slots")]
    slot_packets: Option<u64>,
    /// Bytes after which a slot is over
    #[arg(long, value_name = "SIZE", value_parser = parse(units::some_bytes), requires = "slots")]
    slot_bytes: Option<u64>,
}

/// Whether anything gets through.
#[derive(Debug, Args)]
#[command(next_help_heading = "Cutting off (each alone)")]
struct CuttingArgs {
    /// Drop every packet
    #[arg(long)]
    partition: bool,
    /// Drop every packet and answer: TCP with a RST, the rest with an ICMP error
    #[arg(long)]
    refuse: bool,
    /// End every TCP connection that sends, with RSTs to both ends
    #[arg(long)]
    reset: bool,
    /// End each TCP connection once this much of it has passed: 64KiB
    #[arg(long, value_name = "SIZE", value_parser = parse(units::some_bytes))]
    cut: Option<u64>,
}

/// What DNS queries get.
#[derive(Debug, Args)]
#[command(next_help_heading = "DNS (alone)")]
struct DnsArgs {
    /// What DNS queries over UDP get
    #[arg(long, value_enum, value_name = "ANSWER")]
    dns_answer: Option<DnsAnswer>,
    /// The answer: these addresses instead of the right ones
    #[arg(long, value_name = "ADDRESSES", value_delimiter = ',', value_parser = parse(units::ip))]
    dns_addresses: Vec<String>,
    /// Only queries for these: `api.example.com,*.example.com`; every name where none is given
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = parse(units::dns_name))]
    dns_names: Vec<String>,
    /// Answer, or forward, so much later
    #[arg(long, value_name = "TIME", value_parser = parse(units::held))]
    dns_delay: Option<Duration>,
}

/// Where and how.
#[derive(Debug, Args)]
#[command(next_help_heading = "Where and how")]
struct PlaceArgs {
    /// Whose packets. Where not given: those of a process on the node's own network are its cgroup's, others all
    #[arg(long, value_enum, value_name = "WHOSE")]
    sockets: Option<Sockets>,
    /// On which end of a pod's veth pair; inner where not given
    #[arg(long, value_enum, value_name = "END")]
    side: Option<Side>,
    /// Decide for each segment of a large TCP packet, not once for all of them
    #[arg(long)]
    per_segment: bool,
    /// On the node's own interfaces also hurt SSH, the kubelet and the Kubernetes API
    #[arg(long)]
    unprotected: bool,
    /// Seed of the random decisions; drawn by the agent where none is given
    #[arg(long)]
    seed: Option<u64>,
}

/// ICMP types; a name may stand for two.
#[derive(Debug, Clone)]
struct IcmpTypes(Vec<u32>);

fn parse_peer(text: &str) -> Result<(String, Address), String> {
    parse(units::address)(text).map(|address| (text.to_owned(), address))
}

fn parse_host(text: &str) -> Result<(String, Address), String> {
    parse(units::named_address)(text).map(|address| (text.to_owned(), address))
}

fn parse_icmp(text: &str) -> Result<IcmpTypes, String> {
    let types = text.split(',').map(parse(units::icmp)).collect::<Result<Vec<_>, _>>()?;
    Ok(IcmpTypes(types.concat()))
}

/// One to `N` percentages, those that are not there as none.
fn shares<const N: usize>(text: &str) -> Result<[Option<f64>; N], Wrong> {
    let given: Vec<f64> = text.split(',').map(units::share).collect::<Result<_, _>>()?;
    if given.len() > N {
        return Err((format!("`{text}` has {} percentages", given.len()), format!("expected at most {N}")));
    }
    Ok(std::array::from_fn(|i| given.get(i).copied()))
}

fn slot_times(text: &str) -> Result<(Duration, Option<Duration>), Wrong> {
    let (min, max) = text.split_once(',').map_or((text, None), |(min, max)| (min, Some(max)));
    Ok((units::duration(min)?, max.map(units::duration).transpose()?))
}

fn loss_ge(text: &str) -> Result<v1::GilbertElliott, Wrong> {
    let [p, r, bad, good] = shares(text)?;
    network::gilbert_elliott(p.unwrap_or_default(), r, bad, good)
}

fn loss_state(text: &str) -> Result<v1::FourState, Wrong> {
    let [p13, p31, p32, p23, p14] = shares(text)?;
    network::four_state(p13.unwrap_or_default(), [p31, p32, p23, p14])
}

fn chance(ratio: Option<f64>, correlation: Option<f64>) -> Option<v1::Chance> {
    Some(v1::Chance { ratio: ratio?, correlation: correlation.unwrap_or_default() })
}

impl InjectNetwork {
    /// What is asked for, checked as a whole.
    pub(crate) fn network(&self) -> Result<Network, Wrong> {
        let (damage, cutting, place) = (&self.damage, &self.cutting, &self.place);
        let (target, reordered) = (&self.common.target, &self.delay);
        let network = Network {
            peers: self.packets.peers()?,
            except: self.packets.except.clone(),
            direction: self.packets.direction,
            share: self.packets.share,
            flows: self.packets.flows,
            delay: self.delay.delay()?,
            duplicate: chance(damage.duplicate, damage.duplicate_correlation),
            loss: self.loss.loss()?,
            corrupt: damage.corrupt.map(|ratio| v1::Corrupt {
                chance: chance(Some(ratio), damage.corrupt_correlation),
                silent: damage.corrupt_silent,
            }),
            reorder: reordered.reorder.map(|ratio| v1::Reorder {
                chance: chance(Some(ratio), reordered.reorder_correlation),
                gap: reordered.gap.unwrap_or_default(),
            }),
            rate: self.rate.rate()?,
            slots: self.rate.slots()?,
            partition: match (cutting.partition, cutting.refuse) {
                (_, true) => Some(Partition::Refuse),
                (true, false) => Some(Partition::Silent),
                (false, false) => None,
            },
            reset: cutting.reset,
            cut: cutting.cut,
            dns: self.dns.dns()?,
            interface: target.interface.clone().filter(|_| !target.is_interface()),
            seed: place.seed,
            per_segment: place.per_segment,
            unprotected: place.unprotected,
            sockets: place.sockets,
            side: place.side,
        };
        let mut clashes = network.check(target.is_interface());
        let Some(last) = clashes.pop() else { return Ok(network) };
        let others = clashes.into_iter().map(shown).map(|(message, fix)| format!("{message}: {fix}\n"));
        let (message, fix) = shown(last);
        Err((others.collect::<String>() + &message, fix))
    }
}

/// A clash in the words of the command line.
fn shown(Clash { field, message, fix }: Clash) -> Wrong {
    match field {
        "" => {
            let fix = "give --delay, --loss, --partition, or another flag of `squall inject network --help`";
            (message, fix.into())
        }
        "delay.jitter" => (format!("--jitter: {message}"), fix),
        "delay.keepOrder" => (format!("--keep-order: {message}"), fix),
        "delay.correlation" => (format!("--correlation: {message}"), fix),
        "delay.distribution" => (format!("--distribution: {message}"), fix),
        "dns" => (format!("--dns-…: {message}"), fix),
        field => (format!("--{field}: {message}"), fix),
    }
}

impl PacketArgs {
    /// The far sides, each with all other terms.
    fn peers(&self) -> Result<Vec<(String, Address)>, Wrong> {
        let terms = Address {
            local_ports: self.local_ports.clone(),
            dscp: self.dscp.clone(),
            vlans: self.vlans.clone(),
            icmp: self.icmp.clone().map(|IcmpTypes(types)| types).unwrap_or_default(),
            tcp_flags: self.tcp_flags,
            fragments: self.fragments,
            ..Address::default()
        };
        let mut peers: Vec<(String, Address)> = self.to.iter().chain(&self.host).cloned().collect();
        if !terms.is_everything() {
            if peers.is_empty() {
                peers.push((String::new(), Address::default()));
            }
            for (name, peer) in &mut peers {
                *name = format!("{name} {}", terms.shown()).trim().to_owned();
                let Address { cidrs, hosts, ports, protocol, .. } = peer.clone();
                *peer = Address { cidrs, hosts, ports, protocol, ..terms.clone() };
            }
        }
        for (name, peer) in &peers {
            peer.check().map_err(|(message, fix)| (format!("`{name}`: {message}"), fix))?;
        }
        Ok(peers)
    }
}

impl DelayArgs {
    fn delay(&self) -> Result<Option<v1::Delay>, Wrong> {
        let Some(latency) = self.delay else { return Ok(None) };
        let jitter = self.jitter.unwrap_or_default();
        if latency.is_zero() && jitter.is_zero() {
            return Err(("--delay: this delays nothing".into(), "give more than 0".into()));
        }
        let table = self.distribution_table.as_deref().map(network::table).transpose()?;
        let distribution = match &table {
            Some(_) => v1::Distribution::Table,
            None => self.distribution.map(Distribution::proto).unwrap_or_default(),
        };
        Ok(Some(v1::Delay {
            latency_ns: nanos(latency),
            jitter_ns: nanos(jitter),
            correlation: self.correlation.unwrap_or_default(),
            distribution: distribution.into(),
            table: table.unwrap_or_default(),
            keep_order: self.keep_order,
        }))
    }
}

impl LossArgs {
    fn loss(&self) -> Result<Option<v1::Loss>, Wrong> {
        let loss = v1::Loss {
            ratio: self.loss.unwrap_or_default(),
            correlation: self.loss_correlation.unwrap_or_default(),
            gilbert_elliott: self.loss_ge,
            four_state: self.loss_state,
            every: self.loss_every.unwrap_or_default(),
            ecn: false,
        };
        let some = loss != v1::Loss::default();
        if self.loss_ecn && !some {
            return Err(("--loss-ecn: no packet is lost".into(), "add --loss or another model".into()));
        }
        Ok(some.then_some(v1::Loss { ecn: self.loss_ecn, ..loss }))
    }
}

impl RateArgs {
    fn rate(&self) -> Result<Option<v1::Rate>, Wrong> {
        let Some(bits) = self.rate else { return Ok(None) };
        let made = network::rate(bits, self.burst, self.limit, self.overhead);
        made.map(Some).map_err(|(message, fix)| (format!("--rate: {message}"), fix))
    }

    fn slots(&self) -> Result<Option<v1::Slots>, Wrong> {
        let Some((min, max)) = self.slots else { return Ok(None) };
        let made = network::slots(min, max, self.slot_packets, self.slot_bytes);
        made.map(Some).map_err(|(message, fix)| (format!("--slots: {message}"), fix))
    }
}

impl DnsArgs {
    fn dns(&self) -> Result<Option<v1::Dns>, Wrong> {
        let Self { dns_answer, dns_addresses, dns_names, dns_delay } = self;
        if dns_answer.is_none() && dns_addresses.is_empty() && dns_names.is_empty() && dns_delay.is_none() {
            return Ok(None);
        }
        let (names, addresses) = (dns_names.clone(), dns_addresses.clone());
        network::dns(names, *dns_answer, addresses, dns_delay.unwrap_or_default())
            .map(Some)
            .map_err(|(message, fix)| (format!("--dns-…: {message}"), fix))
    }
}

#[cfg(test)]
mod tests {
    use std::{fmt::Write as _, path::Path};

    use clap::{CommandFactory, Parser};

    use super::super::{Cli, Command, Inject};
    use crate::plan;

    /// `squall inject network --exe shop … --for 5s`; words are split at spaces.
    fn parsed(flags: &str) -> Result<Inject, String> {
        let line = format!("squall inject network --exe shop --for 5s {flags}");
        match Cli::try_parse_from(line.split_whitespace()).map_err(|e| e.to_string())?.command {
            Command::Inject(inject) => Ok(*inject),
            _ => panic!("not inject"),
        }
    }

    fn injected(flags: &str) -> Result<(squall_proto::v1::Fault, String), String> {
        parsed(flags)?.fault().map_err(|(message, fix)| format!("{message}: {fix}"))
    }

    /// Each fault as flags and as a plan has it.
    const SAME: [(&str, &str); 43] = [
        ("--delay 2s", "delay: { latency: 2s }"),
        ("--delay 2s --jitter 300ms", "delay: { latency: 2s, jitter: 300ms }"),
        (
            "--delay 100ms --jitter 10ms --distribution paretonormal --correlation 25%",
            "delay: { latency: 100ms, jitter: 10ms, distribution: paretonormal, correlation: 25% }",
        ),
        (
            "--delay 100ms --jitter 10ms --distribution-table DIST",
            "delay: { latency: 100ms, jitter: 10ms, distribution: { table: DIST } }",
        ),
        (
            "--delay 100ms --jitter 10ms --keep-order",
            "delay: { latency: 100ms, jitter: 10ms, keepOrder: true }",
        ),
        ("--loss 5%", "loss: 5%"),
        ("--loss 5% --loss-correlation 25%", "loss: { ratio: 5%, correlation: 25% }"),
        ("--loss-ge 1%", "loss: { gilbertElliott: { p: 1% } }"),
        (
            "--loss-ge 1%,10%,90%,0.1%",
            "loss: { gilbertElliott: { p: 1%, r: 10%, lossBad: 90%, lossGood: 0.1% } }",
        ),
        ("--loss-state 1%", "loss: { state: { p13: 1% } }"),
        (
            "--loss-state 1%,10%,30%,50%,0.5%",
            "loss: { state: { p13: 1%, p31: 10%, p32: 30%, p23: 50%, p14: 0.5% } }",
        ),
        ("--loss-every 10", "loss: { every: 10 }"),
        ("--loss 5% --loss-ecn", "loss: { ratio: 5%, ecn: true }"),
        ("--slots 20ms", "slots: { min: 20ms }"),
        (
            "--slots 10ms,20ms --slot-packets 32 --slot-bytes 64KiB",
            "slots: { min: 10ms, max: 20ms, packets: 32, bytes: 64KiB }",
        ),
        ("--duplicate 1%", "duplicate: 1%"),
        ("--duplicate 1% --duplicate-correlation 50%", "duplicate: { ratio: 1%, correlation: 50% }"),
        ("--corrupt 0.1%", "corrupt: 0.1%"),
        (
            "--corrupt 0.1% --corrupt-correlation 5% --corrupt-silent",
            "corrupt: { ratio: 0.1%, correlation: 5%, silent: true }",
        ),
        (
            "--delay 10ms --reorder 25% --reorder-correlation 50% --gap 5",
            "delay: { latency: 10ms }, reorder: { ratio: 25%, correlation: 50%, gap: 5 }",
        ),
        ("--rate 1mbit", "rate: 1mbit"),
        (
            "--rate 10mbit --burst 32KiB --limit 1MiB --overhead -14",
            "rate: { rate: 10mbit, burst: 32KiB, limit: 1MiB, overhead: -14 }",
        ),
        ("--partition", "partition: true"),
        ("--refuse", "partition: refuse"),
        ("--partition --refuse", "partition: refuse"),
        ("--reset", "reset: true"),
        ("--cut 64KiB", "cut: 64KiB"),
        (
            "--dns-names *.example.com,a.b --dns-answer servfail --dns-delay 2s",
            "dns: { names: ['*.example.com', a.b], answer: servfail, delay: 2s }",
        ),
        ("--dns-addresses 10.0.0.9,fd00::9", "dns: { addresses: [10.0.0.9, 'fd00::9'] }"),
        ("--loss 1% --flows 30% --share 50% --seed 7", "loss: 1%, flows: 30%, share: 50%, seed: 7"),
        (
            "--loss 1% --per-segment --unprotected --sockets all --side host",
            "loss: 1%, perSegment: true, unprotected: true, sockets: all, side: host",
        ),
        ("--loss 1% --sockets target --side inner", "loss: 1%, sockets: target, side: inner"),
        ("--loss 1% --direction egress --interface eth0", "loss: 1%, direction: egress, interface: eth0"),
        ("--loss 1% --to 10.0.0.7/32:6379/tcp --to *:53", "loss: 1%, to: ['10.0.0.7/32:6379/tcp', '*:53']"),
        ("--loss 1% --except 10.0.0.1 --except *:22/tcp", "loss: 1%, except: ['10.0.0.1', '*:22/tcp']"),
        ("--loss 1% --host redis", "loss: 1%, to: { hosts: [redis] }"),
        (
            "--loss 1% --host redis --host cache.b:6379/tcp",
            "loss: 1%, to: [{ hosts: [redis] }, { hosts: [cache.b], ports: [6379], protocol: tcp }]",
        ),
        ("--loss 1% --dscp ef,10", "loss: 1%, to: { dscp: [ef, 10] }"),
        ("--loss 1% --vlans 100,untagged", "loss: 1%, to: { vlans: [100, untagged] }"),
        ("--loss 1% --icmp echo-request,3", "loss: 1%, to: { icmp: [echo-request, 3] }"),
        ("--loss 1% --tcp-flags syn,!ack", "loss: 1%, to: { tcpFlags: 'syn,!ack' }"),
        ("--loss 1% --fragments only", "loss: 1%, to: { fragments: only }"),
        (
            "--loss 1% --to 10.0.0.7 --local-ports 80,8000-8010",
            "loss: 1%, to: { cidrs: [10.0.0.7/32], localPorts: [80, 8000-8010] }",
        ),
    ];

    #[test]
    fn flags_ask_for_what_a_plan_does() {
        let dir = tempfile::tempdir().expect("a directory");
        let dist = dir.path().join("my.dist");
        std::fs::write(&dist, "# mine\n-8192 0 8192\n").expect("a file");
        for (flags, fault) in SAME {
            let (flags, fault) =
                [flags, fault].map(|text| text.replace("DIST", &dist.to_string_lossy())).into();
            let text = format!(
                "apiVersion: squall.dev/v1\nkind: Plan\nmetadata: {{ name: same }}\n\
                 targets: {{ shop: {{ process: {{ exe: shop }} }} }}\n\
                 rounds: [ {{ name: one, hold: 9s, gates: [ {{ oom: {{ target: shop }} }} ], \
                 faults: [ {{ network: {{ on: shop, {fault} }} }} ] }} ]\n"
            );
            let plan = plan::parse(Path::new("plan.yaml"), &text).unwrap_or_else(|e| panic!("{fault}\n{e}"));
            let (told, summary) = injected(&flags).unwrap_or_else(|e| panic!("{flags}\n{e}"));
            assert_eq!(told, plan.rounds[0].faults[0].proto, "{flags}");
            // What a plan names, and what is left unnamed there, is told apart by its terms.
            let what = |text: &str| text.rsplit_once(": ").map(|(_, what)| what.to_owned());
            assert_eq!(what(&summary), what(&plan.rounds[0].faults[0].summary), "{flags}");
        }
    }

    #[test]
    fn terms_beside_an_address_are_in_the_summary() {
        let (_, summary) = injected("--loss 1% --to 10.0.0.7 --dscp ef --tcp-flags syn").expect("valid");
        assert_eq!(summary, "network shop ↔ 10.0.0.7 dscp 46 syn: loss 1%");
        let (_, summary) = injected("--loss 1% --fragments never --except 10.0.0.1").expect("valid");
        assert_eq!(summary, "network shop ↔ no fragments except 10.0.0.1: loss 1%");
    }

    /// Everything that is refused, each with its message. Read it as a user would.
    #[test]
    fn refusals() {
        let cases = [
            "",
            "--jitter 3s",
            "--delay 0s",
            "--delay 61s",
            "--delay 1s --distribution normal",
            "--delay 1s --jitter 1s --distribution gauss",
            "--delay 1s --jitter 1s --distribution normal --distribution-table x.dist",
            "--delay 1s --jitter 1s --distribution-table nowhere.dist",
            "--delay 1s --jitter 1s --correlation 10% --keep-order",
            "--reorder 25%",
            "--delay 1s --gap 5",
            "--delay 1s --reorder 5% --gap 0",
            "--loss 0%",
            "--loss 5",
            "--loss-correlation 5%",
            "--loss 5% --loss-every 10",
            "--loss-ge 1% --loss-state 1%",
            "--loss-ge 1%,2%,3%,4%,5%",
            "--loss-ge 0%",
            "--loss-state 60%,0%,0%,0%,60%",
            "--loss-every 0",
            "--loss-ecn",
            "--slots 0s",
            "--slots 20ms,10ms",
            "--slot-packets 3",
            "--corrupt-silent",
            "--rate 10",
            "--rate 10bit",
            "--rate 10mbit --limit 1GiB",
            "--loss 5% --loss-correlation 100%",
            "--delay 1s --jitter 2s",
            "--delay 1s --keep-order",
            "--burst 32KiB",
            "--partition --loss 5% --reorder 5%",
            "--refuse --rate 1mbit",
            "--reset --cut 64KiB",
            "--cut 0B",
            "--dns-names a.b",
            "--dns-answer drop --dns-delay 1s",
            "--dns-answer drop --to 10.0.0.7/32:53/tcp",
            "--loss 1% --host 10.0.0.7",
            "--loss 1% --host redis:0",
            "--loss 1% --dscp 64",
            "--loss 1% --vlans 0",
            "--loss 1% --icmp ping",
            "--loss 1% --to 10.0.0.7/32:80/tcp --icmp echo-request",
            "--loss 1% --tcp-flags sin",
            "--loss 1% --except *",
            "--loss 1% --sockets mine",
        ];
        let mut all = String::new();
        for case in cases {
            let error = injected(case).expect_err(case);
            // What clap adds about usage and help says nothing of ours.
            let error = error.split("\n\nUsage").next().unwrap_or_default();
            let error = error.split("\n\nFor more").next().unwrap_or_default().trim();
            let _ = writeln!(all, "{case}\n    {}\n", error.replace('\n', "\n    "));
        }
        insta::assert_snapshot!(all);
    }

    #[test]
    fn an_interface_has_no_sockets_of_its_own() {
        let line = "squall inject network --interface eth0 --loss 1% --sockets target --for 5s";
        let Command::Inject(inject) = Cli::try_parse_from(line.split(' ')).expect("valid").command else {
            panic!("not inject")
        };
        let (message, _) = inject.fault().expect_err("no sockets");
        assert_eq!(message, "--sockets: an interface has no sockets of its own");
    }

    #[test]
    fn the_help_has_every_flag_under_a_heading() {
        let command = Cli::command().term_width(100);
        let help = command.try_get_matches_from(["squall", "inject", "network", "--help"]).expect_err("help");
        let help = help.to_string();
        insta::assert_snapshot!(help);
    }
}
