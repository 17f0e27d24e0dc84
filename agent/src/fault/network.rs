//! Packets lost, late or cut off between a target and its peers.
//!
//! The physics are netem's: a decision per packet of the kernel's tc layer (a GSO packet is one packet), loss drawn
//! first and delay after it, and jitter that lets packets overtake each other.

use std::{fmt::Write as _, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use squall_common::{
    decide::{Action, hash, threshold},
    packet::Protocol,
    rules::{Cidr, Clause, Ports},
    table::{CLAUSES, Direction},
};
use squall_proto::v1;
use tokio::{sync::OnceCell, task::spawn_blocking};

use super::{Fault, Planned, Window};
use crate::{
    host::{
        bpf::{Hook, remove_filters},
        netns::Netns,
        port::{Figures, Holder, Owned, Support, place, random, settle},
        tc::{Interface, Netlink},
    },
    limits::{Invalid, Limits},
    target::{Scope, Target},
    time::BootTime,
};

/// The longest delay. `sch_fq` is told to keep packets twice as long (`HORIZON` in host/tc.rs).
const LONGEST_DELAY: Duration = Duration::from_mins(1);

/// A network fault.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    clauses: Vec<Clause>,
    share: f64,
    latency: Duration,
    jitter: Duration,
    loss: f64,
    partition: bool,
    seed: u64,
    interface: Option<String>,
}

/// What has to be undone. Links and TAP devices end with the agent; filters and qdiscs do not.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Undo {
    netns_path: PathBuf,
    netns_inode: u64,
    interfaces: Vec<UndoInterface>,
    seed: u64,
}

/// An interface and what we leave on it if we die.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct UndoInterface {
    name: String,
    index: u32,
    /// Whether filters of ours may be there.
    filters: bool,
    /// Whether the clsact qdisc is there because of us.
    clsact: bool,
    /// The root qdisc as it was. Only one that the kernel chose gets replaced, so it comes back when ours goes.
    root: String,
}

/// A rule on each interface.
pub struct Held {
    rules: Vec<Owned>,
    seed: u64,
    interface: Option<String>,
}

impl Fault for Network {
    const KIND: &'static str = "network";
    const SCOPE: Scope = Scope::Network;
    type Undo = Undo;
    type Held = Held;
    type Proto = v1::NetworkFault;

    fn parse(proto: v1::NetworkFault) -> Result<Self, Invalid> {
        let (egress, ingress) = match proto.direction() {
            v1::Direction::Unspecified | v1::Direction::Both => (true, true),
            v1::Direction::Egress => (true, false),
            v1::Direction::Ingress => (false, true),
        };
        let clauses = if proto.peers.is_empty() {
            vec![anyone(egress, ingress)]
        } else {
            let peers = proto.peers.iter().enumerate();
            peers.map(|(i, peer)| clause(i, peer, egress, ingress)).collect::<Result<_, _>>()?
        };
        if clauses.len() > CLAUSES {
            let fix = format!("at most {CLAUSES}; one peer may have many CIDRs");
            return Err(Invalid::new("network.peers", clauses.len(), "too many peers", fix));
        }
        let delay = proto.delay.unwrap_or_default();
        let fault = Self {
            clauses,
            share: if proto.share == 0.0 { 1.0 } else { ratio("network.share", proto.share)? },
            latency: Duration::from_nanos(delay.latency_ns),
            jitter: Duration::from_nanos(delay.jitter_ns),
            loss: proto.loss.map_or(Ok(0.0), |loss| ratio("network.loss.ratio", loss.ratio))?,
            partition: proto.partition,
            seed: proto.seed,
            interface: Some(proto.interface).filter(|name| !name.is_empty()),
        };
        if fault.latency > LONGEST_DELAY {
            let fix = format!("at most {LONGEST_DELAY:?}, or a partition");
            let given = format!("{:?}", fault.latency);
            return Err(Invalid::new(
                "network.delay.latency",
                given,
                "longer than a packet can be held",
                fix,
            ));
        }
        if fault.jitter > fault.latency {
            let given = format!("{:?}", fault.jitter);
            let fix = format!("at most the latency, {:?}", fault.latency);
            return Err(Invalid::new(
                "network.delay.jitter",
                given,
                "a packet cannot leave before it came",
                fix,
            ));
        }
        if fault.latency.is_zero() && fault.loss == 0.0 && !fault.partition {
            return Err(Invalid::new(
                "network",
                "nothing",
                "it would do nothing",
                "ask for delay, loss or partition",
            ));
        }
        if fault.partition && !(fault.latency.is_zero() && fault.loss == 0.0) {
            let fix = "leave out delay and loss, or the partition";
            return Err(Invalid::new(
                "network.partition",
                true,
                "drops every packet, so nothing else acts",
                fix,
            ));
        }
        Ok(fault)
    }

    fn check(&self, target: &Target, limits: &Limits) -> Result<(), Invalid> {
        let Some(netns) = &target.netns else {
            let fix = "choose a process or an interface";
            return Err(Invalid::new("network.target", target, "it has no network namespace", fix));
        };
        let everything = |clause: &Clause| {
            (clause.cidrs.is_empty() || clause.cidrs.iter().any(Cidr::is_everything))
                && clause.peer_ports.is_empty()
                && clause.local_ports.is_empty()
        };
        if netns.own && !limits.whole_node_network && self.clauses.iter().any(everything) {
            return Err(Invalid::new(
                "network.peers",
                "every packet",
                format!("{target} is in the node's own network namespace: this would hit SSH and this agent"),
                "name peers by CIDR or port, or start the agent with --allow-whole-node-network",
            ));
        }
        Ok(())
    }

    fn summary(&self) -> String {
        let mut what = Vec::new();
        if self.partition {
            what.push("partition".to_owned());
        }
        if !self.latency.is_zero() {
            let jitter = if self.jitter.is_zero() { String::new() } else { format!(" ±{:?}", self.jitter) };
            what.push(format!("delay {:?}{jitter}", self.latency));
        }
        if self.loss > 0.0 {
            what.push(format!("loss {}", percent(self.loss)));
        }
        let mut summary = what.join(", ");
        if self.share < 1.0 {
            let _ = write!(summary, " for {} of packets", percent(self.share));
        }
        let peers: Vec<String> = self.clauses.iter().map(peer_words).collect();
        let first = &self.clauses[0];
        let way = match (first.egress, first.ingress) {
            (true, false) => "outgoing only",
            (false, true) => "incoming only",
            _ => "both ways",
        };
        let _ = write!(summary, " to {}, {way}", peers.join(" or "));
        if let Some(interface) = &self.interface {
            let _ = write!(summary, ", on {interface}");
        }
        summary
    }

    async fn plan(&self, target: &Target) -> Result<Planned<Undo>> {
        let support = support().await?;
        let (fault, target) = (self.clone(), target.clone());
        spawn_blocking(move || fault.plan_blocking(&target, &support)).await?
    }

    async fn inject(&self, target: &Target, undo: &Undo, window: Window) -> Result<Held> {
        let support = support().await?;
        let (fault, target, undo) = (self.clone(), target.clone(), undo.clone());
        spawn_blocking(move || fault.inject_blocking(&target, &undo, window, &support)).await?
    }

    async fn update(&self, held: &mut Held) -> Result<()> {
        if self.interface != held.interface {
            bail!("a live fault stays on its interface: revert it and inject another");
        }
        let seed = if self.seed == 0 { held.seed } else { self.seed };
        tokio::task::block_in_place(|| {
            for (i, rule) in held.rules.iter().enumerate() {
                rule.change(&self.clauses, self.action(seed, i))?;
            }
            Ok(())
        })
    }

    async fn extend(held: &mut Held, until: BootTime) -> Result<()> {
        held.rules.iter().for_each(|rule| rule.extend(until));
        Ok(())
    }

    async fn effect(held: &mut Held) -> Result<v1::Effect> {
        let all = held.rules.iter().fold(Figures::default(), |sum, rule| sum.plus(&rule.figures()));
        Ok(effect(&all))
    }

    async fn revert(undo: &Undo) -> Result<()> {
        let undo = undo.clone();
        spawn_blocking(move || revert(&undo)).await?
    }

    async fn describe() -> v1::FaultSupport {
        match support().await {
            Ok(support) => describe(&support),
            Err(error) => v1::FaultSupport {
                kind: Self::KIND.to_owned(),
                available: false,
                features: Vec::new(),
                reason: format!("{error:#}"),
            },
        }
    }
}

impl Network {
    /// What a packet suffers. Interfaces draw from different sequences.
    fn action(&self, seed: u64, interface: usize) -> Action {
        Action {
            share: threshold(self.share),
            loss: threshold(if self.partition { 1.0 } else { self.loss }),
            latency: self.latency.as_nanos() as u64,
            jitter: self.jitter.as_nanos() as u64,
            seed: if interface == 0 { seed } else { hash(seed, interface as u64, 0) },
        }
    }

    fn draws(&self) -> bool {
        self.share < 1.0 || self.loss > 0.0 || !self.jitter.is_zero()
    }

    fn ways(&self) -> impl Iterator<Item = Direction> {
        let first = &self.clauses[0];
        let egress = first.egress.then_some(Direction::Egress);
        egress.into_iter().chain(first.ingress.then_some(Direction::Ingress))
    }

    /// The interfaces the fault is for, of the calling thread's network namespace.
    fn interfaces(&self, target: &Target, netlink: &mut Netlink) -> Result<Vec<Interface>> {
        let all = netlink.interfaces()?;
        let chosen: Vec<Interface> = match self.interface.as_ref().or(target.interface.as_ref()) {
            Some(name) => all.iter().filter(|i| i.name == *name).cloned().collect(),
            // Our own TAP devices carry packets that were matched already.
            None => all
                .iter()
                .filter(|i| i.up && !i.loopback && i.link_header.is_some() && !i.name.starts_with("squall"))
                .cloned()
                .collect(),
        };
        if chosen.is_empty() {
            let names: Vec<&str> = all.iter().map(|i| i.name.as_str()).collect();
            let names = names.join(", ");
            match self.interface.as_ref().or(target.interface.as_ref()) {
                Some(name) => bail!("{target} has no interface {name}; it has {names}"),
                None => bail!("{target} has no interface that is up, apart from loopback; it has {names}"),
            }
        }
        Ok(chosen)
    }

    fn plan_blocking(&self, target: &Target, support: &Support) -> Result<Planned<Undo>> {
        let netns = target.netns.as_ref().ok_or_else(|| anyhow!("{target} has no network namespace"))?;
        let open = Netns::open(netns)?;
        let seed = match self.seed {
            0 if self.draws() => random().max(1),
            seed => seed,
        };
        let mut planned = Planned {
            undo: Undo {
                netns_path: netns.path.clone(),
                netns_inode: netns.inode,
                interfaces: Vec::new(),
                seed,
            },
            changes: Vec::new(),
            warnings: Vec::new(),
            mechanism: String::new(),
            seed: if self.draws() { seed } else { 0 },
        };
        let mut mechanisms = vec![hook_name(support.hook).to_owned()];
        open.run(|| {
            let mut netlink = Netlink::open()?;
            for interface in self.interfaces(target, &mut netlink)? {
                let root = netlink.root_qdisc(interface.index)?;
                let place = place(netns.inode, interface.index);
                let clsact = support.hook == Hook::Clsact
                    && (!netlink.has_clsact(interface.index)? || place.made_clsact());
                let name = &interface.name;
                planned.changes.push(match support.hook {
                    Hook::Tcx => format!("{name}: programs attached by TCX; ends with its link"),
                    Hook::Clsact if clsact => {
                        format!("{name}: clsact qdisc with filters squall_*; undo: remove both")
                    }
                    Hook::Clsact => format!("{name}: filters squall_* in its clsact qdisc; undo: remove the filters"),
                });
                if !self.latency.is_zero() {
                    for way in self.ways() {
                        let holder = support.holder(way, &interface, root.as_ref())?;
                        let kind = root.as_ref().map_or("none", |root| root.kind.as_str());
                        planned.changes.push(match holder {
                            Holder::Edt => format!("{name}: root qdisc {kind} becomes fq; undo: back to {kind}"),
                            Holder::Tap => format!("{name}: a TAP device squall*; ends with the agent"),
                        });
                        let mechanism = format!("{} delay: {}", way_name(way), holder_name(holder));
                        if !mechanisms.contains(&mechanism) {
                            mechanisms.push(mechanism);
                        }
                    }
                }
                if place.rules() > 0 {
                    planned.warnings.push(format!(
                        "{name}: {} other injections come first; packets that match them never reach this one",
                        place.rules()
                    ));
                }
                planned.undo.interfaces.push(UndoInterface {
                    name: name.clone(),
                    index: interface.index,
                    filters: support.hook == Hook::Clsact,
                    clsact,
                    root: root.map_or_else(String::new, |root| root.kind),
                });
            }
            Ok(())
        })?;
        planned.mechanism = mechanisms.join("; ");
        Ok(planned)
    }

    fn inject_blocking(
        &self,
        target: &Target,
        undo: &Undo,
        window: Window,
        support: &Support,
    ) -> Result<Held> {
        let netns = target.netns.as_ref().ok_or_else(|| anyhow!("{target} has no network namespace"))?;
        let netns = Arc::new(Netns::open(netns)?);
        let present = netns.run(|| Netlink::open()?.interfaces())?;
        let mut rules = Vec::new();
        for (i, planned) in undo.interfaces.iter().enumerate() {
            let interface = present
                .iter()
                .find(|interface| interface.index == planned.index && interface.name == planned.name)
                .ok_or_else(|| anyhow!("{} is gone since the injection was planned", planned.name))?;
            let action = self.action(undo.seed, i);
            rules.push(Owned::add(support, &netns, interface, &self.clauses, action, window)?);
        }
        Ok(Held { rules, seed: undo.seed, interface: self.interface.clone() })
    }
}

fn anyone(egress: bool, ingress: bool) -> Clause {
    Clause {
        egress,
        ingress,
        cidrs: Vec::new(),
        peer_ports: Vec::new(),
        local_ports: Vec::new(),
        protocol: None,
    }
}

fn clause(i: usize, peer: &v1::Peer, egress: bool, ingress: bool) -> Result<Clause, Invalid> {
    let cidrs = peer.cidrs.iter().enumerate().map(|(j, text)| {
        text.parse::<Cidr>().map_err(|problem| {
            let field = format!("network.peers[{i}].cidrs[{j}]");
            Invalid::new(field, text, problem, "write it like 10.0.0.7/32 or fd00::/64")
        })
    });
    let ports = |name: &str, ranges: &[v1::PortRange]| {
        let ranges = ranges.iter().enumerate().map(|(j, range)| {
            let valid = |port: u32| u16::try_from(port).ok().filter(|&port| port > 0);
            match (valid(range.first), valid(range.last)) {
                (Some(first), Some(last)) if first <= last => Ok(Ports { first, last }),
                _ => Err(Invalid::new(
                    format!("network.peers[{i}].{name}[{j}]"),
                    format!("{}-{}", range.first, range.last),
                    "not a range of ports",
                    "write a first port and a last one, from 1 to 65535",
                )),
            }
        });
        ranges.collect::<Result<Vec<_>, _>>()
    };
    let clause = Clause {
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
    };
    if clause.protocol == Some(Protocol::Icmp)
        && !(clause.peer_ports.is_empty() && clause.local_ports.is_empty())
    {
        let field = format!("network.peers[{i}].protocol");
        return Err(Invalid::new(
            field,
            "icmp",
            "it has no ports",
            "leave out the ports, or choose tcp or udp",
        ));
    }
    Ok(clause)
}

fn ratio(field: &str, value: f64) -> Result<f64, Invalid> {
    if (0.0..=1.0).contains(&value) {
        return Ok(value);
    }
    Err(Invalid::new(field, value, "not a share", "write a ratio from 0 to 1"))
}

fn percent(ratio: f64) -> String {
    // Three digits behind the point, and none that say nothing.
    let digits = format!("{:.3}", ratio * 100.0);
    format!("{}%", digits.trim_end_matches('0').trim_end_matches('.'))
}

fn peer_words(clause: &Clause) -> String {
    let ports = |ranges: &[Ports]| {
        let range = |p: &Ports| {
            if p.first == p.last { p.first.to_string() } else { format!("{}-{}", p.first, p.last) }
        };
        ranges.iter().map(range).collect::<Vec<_>>().join(",")
    };
    let mut words = match clause.cidrs.as_slice() {
        [] => "anyone".to_owned(),
        [cidr] => cidr.to_string(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    };
    if !clause.peer_ports.is_empty() {
        let _ = write!(words, " port {}", ports(&clause.peer_ports));
    }
    if !clause.local_ports.is_empty() {
        let _ = write!(words, " from local port {}", ports(&clause.local_ports));
    }
    match clause.protocol {
        Some(Protocol::Tcp) => words.push_str(" (tcp)"),
        Some(Protocol::Udp) => words.push_str(" (udp)"),
        Some(Protocol::Icmp) => words.push_str(" (icmp)"),
        Some(Protocol::Other) | None => {}
    }
    words
}

fn effect(all: &Figures) -> v1::Effect {
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
    ];
    if all.failed > 0 {
        figures.push(figure("failed", all.failed as f64, "packets"));
    }
    for (name, q) in [("delay_p50", 0.5), ("delay_p99", 0.99)] {
        figures.extend(all.delay(q).map(|seconds| figure(name, seconds, "seconds")));
    }
    figures.extend(all.first_match.map(|after| figure("first_match", after.as_secs_f64(), "seconds")));
    v1::Effect { bit: all.dropped + all.delayed > 0, figures }
}

fn revert(undo: &Undo) -> Result<()> {
    let mut left = Vec::new();
    for interface in &undo.interfaces {
        // A port that other injections still use keeps what it needs; the last of them takes it away.
        if settle(undo.netns_inode, interface.index)? {
            left.push(interface);
        }
    }
    // What an agent that died left behind. The namespace may be gone, and everything in it.
    let Some(netns) = Netns::find(&undo.netns_path, undo.netns_inode) else { return Ok(()) };
    netns.run(|| {
        let mut netlink = Netlink::open()?;
        let present = netlink.interfaces()?;
        for interface in left {
            let same = |i: &&Interface| i.index == interface.index && i.name == interface.name;
            if present.iter().any(|i| same(&i)) {
                clean(&mut netlink, interface).with_context(|| {
                    format!("cleaning up {} in net:[{}]", interface.name, undo.netns_inode)
                })?;
            }
        }
        Ok(())
    })
}

fn clean(netlink: &mut Netlink, interface: &UndoInterface) -> Result<()> {
    if interface.filters && netlink.has_clsact(interface.index)? {
        remove_filters(&interface.name)?;
    }
    if interface.clsact {
        netlink.remove_empty_clsact(interface.index)?;
    }
    netlink.remove_root_fq(interface.index)
}

fn describe(support: &Support) -> v1::FaultSupport {
    let feature = |name: &str, mechanism: String, reason: Option<String>| v1::Feature {
        name: name.to_owned(),
        available: reason.is_none(),
        mechanism,
        reason: reason.unwrap_or_default(),
    };
    let hook = hook_name(support.hook);
    let delay = match (&support.no_fq, &support.no_tap) {
        (None, None) => ("egress: EDT + sch_fq, ingress: TAP queue".to_owned(), None),
        (None, Some(tap)) => (format!("egress: EDT + sch_fq, ingress: none ({tap})"), None),
        (Some(_), None) => ("TAP queue".to_owned(), None),
        (Some(fq), Some(tap)) => (String::new(), Some(format!("no sch_fq ({fq}), and no TAP queue ({tap})"))),
    };
    v1::FaultSupport {
        kind: Network::KIND.to_owned(),
        available: true,
        features: vec![
            feature("loss", hook.to_owned(), None),
            feature("delay", delay.0, delay.1),
            feature("partition", hook.to_owned(), None),
        ],
        reason: String::new(),
    }
}

fn hook_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Tcx => "TCX",
        Hook::Clsact => "clsact filter",
    }
}

fn holder_name(holder: Holder) -> &'static str {
    match holder {
        Holder::Edt => "EDT + sch_fq",
        Holder::Tap => "TAP queue",
    }
}

fn way_name(way: Direction) -> &'static str {
    match way {
        Direction::Egress => "egress",
        Direction::Ingress => "ingress",
    }
}

/// What this node can do; found out once.
async fn support() -> Result<Arc<Support>> {
    static SUPPORT: OnceCell<Arc<Support>> = OnceCell::const_new();
    let probe = || async { Ok::<_, anyhow::Error>(Arc::new(spawn_blocking(Support::probe).await??)) };
    SUPPORT.get_or_try_init(probe).await.cloned()
}
