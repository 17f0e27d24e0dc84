//! Packets lost, late, doubled, broken, slowed, refused or cut off between a target and its peers.
//!
//! The physics are netem's: a decision per packet of the kernel's tc layer (a GSO packet is one packet), in netem's order,
//! and jitter that lets packets overtake each other.

mod parse;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{ifaddrs::getifaddrs, sys::socket::SockaddrStorage};
use serde::{Deserialize, Serialize};
use squall_common::{
    decide::{Action, LossModel, hash},
    packet::Protocol,
    quantiles::Quantiles,
    rules::{Cidr, Clause, Ports},
    table::{Direction, endpoint},
};
use squall_proto::v1;
use tokio::{
    sync::OnceCell,
    task::{AbortHandle, block_in_place, spawn_blocking},
    time::sleep,
};

use self::words::{effect, holder_name, hook_name};
use super::{Fault, Planned, Window};
use crate::{
    crash,
    frame::Dns,
    host::{
        bpf::{Hook, remove_filters},
        caps::Capability,
        cgroup::Hierarchies,
        line::{self, Line},
        localnet,
        netns::Netns,
        port::{Figures, Holder, Key, Owned, Spec, Support, made_clsact, place, random, settle},
        proc,
        resolve::{Files, Resolver},
        sockets,
        tc::{Interface, Netlink},
    },
    limits::{Invalid, Limits},
    target::{self, Scope, Target},
    time::BootTime,
};

/// How often host names and the cgroups below the target's are looked at again.
const REFRESH: Duration = Duration::from_secs(5);
/// A TAP queue holds so many bytes at the most (`MOST_BYTES` in host/tap.rs).
const QUEUE_BITS: f64 = 8.0 * 268_435_456.0;
/// A fault on this part, or more, of what a node may send and receive is one on everybody there.
const MOST_OF_A_NODE: f64 = 0.5;
/// Where the addresses of hosts are.
const UNICAST: [&str; 2] = ["0.0.0.0/0", "2000::/3"];
/// Ports of services on a node without which nobody can get in and take a fault back: SSH, the API server, the kubelet.
const LIFELINES: [u16; 3] = [22, 6443, 10250];

/// Where API servers are, if not there.
const HTTPS: Ports = Ports { first: 443, last: 443 };

/// Where remote clients of this agent come in.
static CONTROL: OnceLock<u16> = OnceLock::new();

/// Keeps a TCP port of this agent out of every fault on its own network: whoever injects can also take back.
pub fn keep_open(port: u16) {
    let _only_once = CONTROL.set(port);
}

/// A network fault.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    /// Whom it is about; at least one.
    peers: Vec<Peer>,
    /// Whom it is not about.
    except: Vec<Peer>,
    /// What it does; the seed may be 0, which is none yet.
    action: Action<u64>,
    quantiles: Option<Quantiles>,
    dns: Option<Dns>,
    interface: Option<String>,
    /// As it came.
    asked: v1::NetworkFault,
}

/// A far side, with names that have yet to become addresses.
#[derive(Debug, Clone, PartialEq)]
struct Peer {
    clause: Clause,
    hosts: Vec<String>,
}

/// What has to be undone. Links and TAP devices end with the agent; filters, lines and settings do not.
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
    /// Whether it is the outer end of the target's own.
    outside: bool,
    remains: Remains,
}

/// What of a port outlives its agent.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Remains {
    /// Whether filters of ours may be there.
    filters: bool,
    /// Whether the clsact qdisc is there because of us.
    clsact: bool,
    /// Whether a line may come to be beside it.
    line: bool,
    /// Settings by which packets of this host may come to be taken without their route because of us.
    localnet: localnet::Changed,
}

impl UndoInterface {
    fn key(&self, netns: u64) -> Key {
        Key { netns, interface: self.index, outside: self.outside }
    }
}

/// A cgroup whose sockets alone are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sockets {
    path: PathBuf,
    /// Ids of it and of all below it.
    ids: Vec<u64>,
    /// Where they listen: id by [`endpoint`].
    endpoints: BTreeMap<u32, u64>,
}

impl Sockets {
    fn of(path: PathBuf, netns: &Netns) -> Self {
        let ids = cgroups_below(&path);
        let listeners = sockets::listeners(netns).unwrap_or_else(|error| {
            tracing::warn!(
                "packets that open a connection to the target will not be known as its own: {error:#}"
            );
            Vec::new()
        });
        let of_target = |listener: sockets::Listener| {
            let id = listener.cgroup.filter(|id| ids.contains(id))?;
            let kind = if listener.tcp { Protocol::Tcp } else { Protocol::Udp };
            Some((endpoint(kind as u64, listener.port.into()), id))
        };
        let endpoints = listeners.into_iter().filter_map(of_target).collect();
        Self { path, ids, endpoints }
    }
}

/// Addresses by host name.
type Names = BTreeMap<String, Vec<IpAddr>>;

/// What a live fault holds.
pub struct Held {
    live: Arc<Mutex<Live>>,
    refresh: AbortHandle,
    netns: Arc<Netns>,
    /// The median RTT of the target's sockets before.
    rtt: Option<Duration>,
}

/// What came of an injection.
struct Injected {
    live: Live,
    netns: Arc<Netns>,
    rtt: Option<Duration>,
    resolver: Resolver,
}

/// What may change while the fault lives.
struct Live {
    /// A rule on each interface.
    rules: Vec<Owned>,
    fault: Network,
    seed: u64,
    names: Names,
    /// The target's cgroup, where only its sockets are meant.
    cgroup: Option<Sockets>,
    /// Where the interfaces are the node's own: at which addresses its kubelet reaches the API server.
    node: Option<Vec<Cidr>>,
    /// Whether no interface was named.
    whole: bool,
    /// Which of them is the loopback interface, where it was not named.
    loopback: Option<usize>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.refresh.abort();
        // Whoever refreshes just now may still hold the rest.
        lock(&self.live).rules.clear();
    }
}

fn lock(live: &Mutex<Live>) -> MutexGuard<'_, Live> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Live {
    /// Writes the rules anew.
    fn apply(&self) -> Result<()> {
        for (i, rule) in self.rules.iter().enumerate() {
            let spec = self.fault.spec(
                self.seed,
                i,
                &self.names,
                self.cgroup.as_ref(),
                self.node.as_deref(),
                self.loopback == Some(i),
            );
            rule.change(spec)?;
        }
        Ok(())
    }
}

impl Fault for Network {
    const KIND: &'static str = "network";
    const NEEDS: &'static [Capability] = &[Capability::SysAdmin, Capability::NetAdmin, Capability::SysPtrace];
    type Undo = Undo;
    type Held = Held;
    type Proto = v1::NetworkFault;

    fn parse(proto: v1::NetworkFault) -> Result<Self, Invalid> {
        Self::from_proto(proto)
    }

    fn scope(&self) -> Scope {
        match self.asked.sockets() {
            v1::Sockets::All => Scope::Network,
            v1::Sockets::Unspecified | v1::Sockets::Target => Scope::Sockets,
        }
    }

    fn check(&self, target: &Target, limits: &Limits) -> Result<(), Invalid> {
        let Some(netns) = &target.netns else {
            let fix = "choose a process or an interface";
            return Err(Invalid::new("network.target", target, "it has no network namespace", fix));
        };
        if self.asked.side() == v1::Side::Host && netns.own {
            let fix = "leave it out, or choose a target with a network of its own";
            return Err(Invalid::new(
                "network.side",
                "host",
                "the target is on the host's network already",
                fix,
            ));
        }
        if let (Some(asked), Some(named)) = (&self.interface, &target.interface)
            && asked != named
        {
            let problem = format!("the target is the interface {named}");
            return Err(Invalid::new(
                "network.interface",
                asked,
                problem,
                "leave it out, or choose another target",
            ));
        }
        let own_sockets = self.cgroup_of(target).is_ok_and(|cgroup| cgroup.is_some());
        let everybodys = netns.own && !own_sockets;
        if everybodys && !limits.whole_node_network && self.share_of_packets() >= MOST_OF_A_NODE {
            return Err(Invalid::new(
                "network.peers",
                "every packet",
                format!("{target} is in the node's own network namespace: this would hit everybody on it"),
                "name fewer peers by CIDR or port, or start the agent with --allow-whole-node-network",
            ));
        }
        // Who is protected was looked at for the target, and so for the interface that the target names.
        if let Some(name) = self.interface.as_ref().filter(|_| everybodys && target.interface.is_none())
            && target::behind(name).is_some()
        {
            let problem = "it leads into a network of somebody else";
            return Err(Invalid::new("network.interface", name, problem, "make this interface the target"));
        }
        let spared = self.lifelines(netns.own.then_some(&[]));
        for (i, Peer { clause, hosts }) in self.peers.iter().enumerate() {
            if hosts.is_empty() && spared.iter().any(|spared| spared.covers(clause)) {
                return Err(Invalid::new(
                    format!("network.peers[{i}]"),
                    words::peer(&self.peers[i]),
                    "on a node's own network SSH and Kubernetes are spared, and this is nothing else",
                    "choose others, or set unprotected",
                ));
            }
        }
        Ok(())
    }

    fn summary(&self) -> String {
        self.words()
    }

    fn draw_from(&mut self, seed: u64) {
        if self.action.seed == 0 {
            self.action.seed = seed;
        }
    }

    async fn plan(&self, target: &Target) -> Result<Planned<Undo>> {
        let support = support().await?;
        let (fault, target) = (self.clone(), target.clone());
        spawn_blocking(move || fault.plan_blocking(&target, &support)).await?
    }

    async fn inject(&self, target: &Target, undo: &Undo, window: Window) -> Result<Held> {
        let support = support().await?;
        let (fault, target, undo) = (self.clone(), target.clone(), undo.clone());
        let injected = spawn_blocking(move || fault.inject_blocking(&target, &undo, window, &support));
        let Injected { live, netns, rtt, resolver } = injected.await??;
        let live = Arc::new(Mutex::new(live));
        let refresh = tokio::spawn(refresh(Arc::downgrade(&live), resolver)).abort_handle();
        Ok(Held { live, refresh, netns, rtt })
    }

    async fn update(&self, held: &mut Held) -> Result<()> {
        let wanted = self.clone();
        block_in_place(|| {
            let mut live = lock(&held.live);
            let same = |f: fn(&Self) -> (Option<&String>, i32, i32)| f(&wanted) == f(&live.fault);
            if !same(|fault| (fault.interface.as_ref(), fault.asked.side, fault.asked.sockets)) {
                bail!("a live fault stays on its interface and its sockets: revert it and inject another");
            }
            if wanted.names().any(|name| !live.names.contains_key(name)) {
                bail!("a live fault takes no new host names: revert it and inject another");
            }
            // Whether it takes the loopback interface was decided by its peers.
            if live.whole && wanted.whereabouts(&live.names) != live.fault.whereabouts(&live.names) {
                bail!(
                    "a live fault takes no peers on loopback beside others, nor others beside those: revert it and inject another"
                );
            }
            if wanted.action.seed != 0 {
                live.seed = wanted.action.seed;
            }
            live.fault = wanted;
            crash::step("network.update")?;
            live.apply()?;
            crash::point("network.updated");
            Ok(())
        })
    }

    async fn extend(held: &mut Held, until: BootTime) -> Result<()> {
        crash::step("network.extend")?;
        lock(&held.live).rules.iter().for_each(|rule| rule.extend(until));
        Ok(())
    }

    async fn effect(held: &mut Held) -> Result<v1::Effect> {
        let (live, netns) = (Arc::clone(&held.live), Arc::clone(&held.netns));
        let looked = spawn_blocking(move || {
            let (all, clauses) = {
                let live = lock(&live);
                let all = live.rules.iter().fold(Figures::default(), |sum, rule| sum.plus(&rule.figures()));
                (all, live.fault.clauses(&live.names))
            };
            (all, median_rtt(&netns, &clauses))
        });
        let (all, rtt) = looked.await?;
        Ok(effect(&all, [held.rtt, rtt]))
    }

    async fn revert(undo: &Undo) -> Result<()> {
        let undo = undo.clone();
        spawn_blocking(move || revert(&undo)).await?
    }

    async fn describe() -> v1::FaultSupport {
        match support().await {
            Ok(support) => words::describe(&support),
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
    /// How large a part of all packets it is about at the most, by addresses and ports alone: the sum over its peers, for the IP
    /// version of which that is the larger part.
    fn share_of_packets(&self) -> f64 {
        let share_of = |all: &Cidr| -> f64 {
            let clauses =
                self.peers.iter().filter(|peer| !peer.clause.cidrs.is_empty() || peer.hosts.is_empty());
            let share = |Peer { clause, .. }: &Peer| {
                let ports = share_of_ports(&clause.peer_ports) * share_of_ports(&clause.local_ports);
                share_of_addresses(all, &clause.cidrs) * ports
            };
            clauses.map(share).sum()
        };
        UNICAST.iter().filter_map(|all| Some(share_of(&all.parse().ok()?))).fold(0.0, f64::max)
    }

    /// The rule for the n-th interface. Interfaces draw from different sequences. `loopback`: it is the loopback interface, for the sake of
    /// those peers that are there.
    fn spec(
        &self,
        seed: u64,
        n: usize,
        names: &Names,
        sockets: Option<&Sockets>,
        node: Option<&[Cidr]>,
        loopback: bool,
    ) -> Spec {
        let mut clauses: Vec<Clause> = self.except.iter().map(|peer| peer.with_addresses(names)).collect();
        clauses.extend(self.lifelines(node));
        clauses.extend(
            self.clauses(names)
                .into_iter()
                .filter(|clause| !loopback || on_loopback(clause))
                .map(|clause| Clause { cgroups: sockets.map(|sockets| sockets.ids.clone()), ..clause }),
        );
        let seed = if n == 0 { seed } else { hash(seed, n as u64, 0) };
        Spec {
            clauses,
            action: Action { seed, ..self.action.clone() },
            quantiles: self.quantiles.clone(),
            dns: self.dns.clone(),
            endpoints: sockets.map(|sockets| sockets.endpoints.clone()).unwrap_or_default(),
        }
    }

    /// Whom it is about.
    fn clauses(&self, names: &Names) -> Vec<Clause> {
        self.peers.iter().map(|peer| peer.with_addresses(names)).collect()
    }

    /// What is spared on a node's own interfaces, of which it is known where the API server is.
    fn lifelines(&self, node: Option<&[Cidr]>) -> Vec<Clause> {
        let Some(api) = node else { return Vec::new() };
        let lifeline = Clause {
            except: true,
            egress: true,
            ingress: true,
            protocol: Some(Protocol::Tcp),
            ..Clause::default()
        };
        let control = CONTROL
            .get()
            .map(|&port| Clause { local_ports: vec![Ports { first: port, last: port }], ..lifeline.clone() });
        if self.asked.unprotected {
            return control.into_iter().collect();
        }
        let ports: Vec<Ports> = LIFELINES.iter().map(|&port| Ports { first: port, last: port }).collect();
        let mut all = vec![
            Clause { local_ports: ports.clone(), ..lifeline.clone() },
            Clause { peer_ports: ports[1..].to_vec(), ..lifeline.clone() },
        ];
        all.extend(control);
        if !api.is_empty() {
            all.push(Clause { cidrs: api.to_vec(), peer_ports: vec![HTTPS], ..lifeline.clone() });
        }
        // As every pod is told.
        let var = |name: &str| env::var(name).ok();
        if let (Some(host), Some(port)) = (var("KUBERNETES_SERVICE_HOST"), var("KUBERNETES_SERVICE_PORT"))
            && let (Ok(cidr), Ok(port)) = (host.parse(), port.parse())
        {
            let peer_ports = vec![Ports { first: port, last: port }];
            all.push(Clause { cidrs: vec![cidr], peer_ports, ..lifeline });
        }
        all
    }

    fn names(&self) -> impl Iterator<Item = &String> {
        self.peers.iter().chain(&self.except).flat_map(|peer| &peer.hosts)
    }

    /// The cgroup whose sockets alone are meant; none where all are. The error says why it cannot be had.
    fn cgroup_of(&self, target: &Target) -> Result<Option<PathBuf>> {
        let shared = target.netns.as_ref().is_some_and(|netns| netns.own) && target.process.is_some();
        match self.asked.sockets() {
            v1::Sockets::All => return Ok(None),
            v1::Sockets::Unspecified if !shared => return Ok(None),
            v1::Sockets::Unspecified | v1::Sockets::Target => {}
        }
        match target.cgroup.as_ref().and_then(target::Cgroup::of_sockets) {
            Some(path) => Ok(Some(path.to_owned())),
            None => bail!(
                "{target} shares its network and has no cgroup (v2) of its own by which to tell its sockets; \
                 choose `sockets: all` to hurt everybody there, with peers that are only the target's"
            ),
        }
    }

    fn draws(&self) -> bool {
        let action = &self.action;
        let sure = |ratio: u64| ratio == 0 || ratio == u64::MAX;
        let loses = action.loss_model == LossModel::Chain as u64
            || action.loss_model == LossModel::Ratio as u64 && !sure(action.loss);
        [action.share, action.flow_share].iter().any(|&share| share != u64::MAX)
            || loses
            || action.jitter > 0
            || !sure(action.duplicate.ratio)
            || action.corrupt.ratio > 0
            || !sure(action.reorder.ratio)
    }

    /// The interface that the fault or its target names.
    fn named<'a>(&'a self, target: &'a Target) -> Option<&'a String> {
        self.interface.as_ref().or(target.interface.as_ref())
    }

    /// Whether there are peers on the loopback interface, and peers elsewhere.
    fn whereabouts(&self, names: &Names) -> [bool; 2] {
        let clauses = self.clauses(names);
        let elsewhere = |c: &Clause| c.cidrs.is_empty() || !c.cidrs.iter().all(is_loopback);
        [clauses.iter().any(on_loopback), clauses.iter().any(elsewhere)]
    }

    /// The interfaces the fault is for, of the calling thread's network namespace, and those that are left out because all their
    /// packets pass one of them too.
    fn interfaces(
        &self,
        target: &Target,
        names: &Names,
        netlink: &mut Netlink,
    ) -> Result<(Vec<Interface>, Vec<String>)> {
        let all = netlink.interfaces()?;
        let [loopback, elsewhere] = self.whereabouts(names);
        // Our own devices carry packets that were matched already.
        let ours = |i: &Interface| i.name.starts_with("squall");
        let wanted = |i: &&Interface| {
            let needed = if i.loopback { loopback } else { elsewhere };
            let usable = i.up && needed && i.link_header.is_some() && !ours(i);
            self.named(target).map_or(usable, |name| i.name == *name)
        };
        let wanted: Vec<&Interface> = all.iter().filter(wanted).collect();
        if wanted.is_empty() {
            let names: Vec<&str> = all.iter().map(|i| i.name.as_str()).collect();
            let names = names.join(", ");
            match self.named(target) {
                Some(name) => bail!("{target} has no interface {name}; it has {names}"),
                None => bail!("{target} has no interface that is up, apart from loopback; it has {names}"),
            }
        }
        let stacked = |upper: &&&Interface| {
            wanted.iter().any(|i| Some(i.index) == upper.lower || i.master == Some(upper.index))
        };
        let (left, chosen): (Vec<&Interface>, Vec<&Interface>) = wanted.iter().partition(stacked);
        Ok((chosen.into_iter().cloned().collect(), left.into_iter().map(|i| i.name.clone()).collect()))
    }

    /// Addresses of all names it has. A name without any is an error: the fault would hurt nobody.
    fn resolve(&self, resolver: &Resolver) -> Result<Names> {
        self.names().map(|name| Ok((name.clone(), resolver.resolve(name)?))).collect()
    }

    /// Where the programs go: the namespace, its interfaces, and whether they are the outer ends of the target's.
    fn places(
        &self,
        target: &Target,
        names: &Names,
        warnings: &mut Vec<String>,
    ) -> Result<(target::Netns, Vec<Interface>, bool)> {
        let netns = target.netns.as_ref().ok_or_else(|| anyhow!("{target} has no network namespace"))?;
        let open = Netns::open(netns)?;
        let (inner, left) = open.run(|| self.interfaces(target, names, &mut Netlink::open()?))?;
        if !left.is_empty() {
            warnings.push(format!(
                "{} left out: packets that pass there pass an interface below too, and suffer there; name an interface to choose",
                left.join(", ")
            ));
        }
        if self.asked.side() != v1::Side::Host {
            return Ok((netns.clone(), inner, false));
        }
        let own = target::Netns::own().context("opening the agent's own network namespace")?;
        let outer = Netns::open(&own)?.run(|| Netlink::open()?.interfaces())?;
        let ends = inner.iter().map(|inner| {
            let peer =
                |outer: &&Interface| Some(outer.index) == inner.peer && outer.peer == Some(inner.index);
            outer.iter().find(peer).cloned().ok_or_else(|| {
                anyhow!(
                    "{} of {target} has no other end on the host: it is no veth pair with one there",
                    inner.name
                )
            })
        });
        Ok((own, ends.collect::<Result<_>>()?, true))
    }

    /// What it is about that goes over the loopback interface, where it does not reach.
    fn unhurt(&self, resolver: &Resolver, names: &Names) -> Vec<String> {
        let mut warnings = Vec::new();
        let addresses = resolver.netns().run(|| Ok(getifaddrs()?.collect::<Vec<_>>())).unwrap_or_default();
        let addresses: BTreeSet<IpAddr> =
            addresses.iter().filter_map(|a| address_of(a.address.as_ref()?)).collect();
        let named: Vec<Cidr> = self.clauses(names).into_iter().flat_map(|clause| clause.cidrs).collect();
        for address in addresses {
            // A network is meant for the others in it.
            if host(address).is_some_and(|own| !is_loopback(&own) && named.contains(&own)) {
                warnings.push(format!(
                    "{address} is the target's own address: packets to it go over lo and are not hurt; inject into the interface lo for them"
                ));
            }
        }
        if self.dns.is_some() && self.asked.peers.is_empty() {
            let servers = resolver.servers().unwrap_or_default();
            if let Some(server) = servers.iter().find(|server| server.is_loopback()) {
                warnings.push(format!(
                    "the target's resolv.conf names {server}: queries to it go over lo and are not hurt; name it as a peer to hurt them"
                ));
            }
        }
        warnings
    }

    fn plan_blocking(&self, target: &Target, support: &Support) -> Result<Planned<Undo>> {
        let netns = target.netns.as_ref().ok_or_else(|| anyhow!("{target} has no network namespace"))?;
        let open = Arc::new(Netns::open(netns)?);
        let resolver = Resolver::new(Arc::clone(&open), Files::of(target));
        let names = self.resolve(&resolver)?;
        let mut warnings =
            if self.named(target).is_none() { self.unhurt(&resolver, &names) } else { Vec::new() };
        let cgroup = self.cgroup_of(target)?;
        if cgroup.is_some() && !support.cgroups {
            bail!("this kernel does not know the cgroup (v2) of a socket; choose `sockets: all`");
        }
        let (netns, interfaces, outside) = self.places(target, &names, &mut warnings)?;
        let seed = match self.action.seed {
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
            warnings,
            mechanism: String::new(),
            seed: if self.draws() { seed } else { 0 },
        };
        for (name, addresses) in &names {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            planned
                .changes
                .push(format!("{name} is {}, asked again every {REFRESH:?}", addresses.join(", ")));
        }
        let cgroup = cgroup.map(|path| Sockets { path, ids: Vec::new(), endpoints: BTreeMap::new() });
        let node = (netns.own && !outside).then(api_servers);
        let mut mechanisms = vec![hook_name(support.hook).to_owned()];
        let mut changes = false;
        Netns::open(&netns)?.run(|| {
            let mut netlink = Netlink::open()?;
            for (i, interface) in interfaces.iter().enumerate() {
                let loopback = interface.loopback && self.named(target).is_none();
                let spec = self.spec(seed, i, &names, cgroup.as_ref(), node.as_deref(), loopback);
                changes |= spec.works() || spec.segments();
                let undo = plan_interface(
                    support,
                    &mut netlink,
                    netns.inode,
                    interface,
                    outside,
                    &spec,
                    &mut planned,
                )?;
                if spec.holds() {
                    let held = holder_name(support.holder(interface)?);
                    if !mechanisms.iter().any(|m| m == held) {
                        mechanisms.push(held.to_owned());
                    }
                }
                planned.undo.interfaces.push(undo);
            }
            Ok(())
        })?;
        if changes && !mechanisms.iter().any(|m| m.contains("TAP")) {
            mechanisms.push("TAP queue".to_owned());
        }
        planned.mechanism = mechanisms.join("; ");
        Ok(planned)
    }

    fn inject_blocking(
        &self,
        target: &Target,
        undo: &Undo,
        window: Window,
        support: &Support,
    ) -> Result<Injected> {
        let netns = target.netns.as_ref().ok_or_else(|| anyhow!("{target} has no network namespace"))?;
        crash::step("network.inject")?;
        let inner = Arc::new(Netns::open(netns)?);
        let resolver = Resolver::new(Arc::clone(&inner), Files::of(target));
        let names = self.resolve(&resolver)?;
        let rtt = median_rtt(&inner, &self.clauses(&names));
        let cgroup = self.cgroup_of(target)?.map(|path| Sockets::of(path, &inner));
        let (place, node) = if undo.netns_inode == netns.inode {
            (Arc::clone(&inner), netns.own)
        } else {
            let own = target::Netns::own().context("opening the agent's own network namespace")?;
            (Arc::new(Netns::open(&own)?), false)
        };
        let present = place.run(|| Netlink::open()?.interfaces())?;
        let (rules, fault, seed, loopback) = (Vec::new(), self.clone(), undo.seed, None);
        let whole = self.named(target).is_none();
        let node = node.then(api_servers);
        let mut live = Live { rules, fault, seed, names, cgroup, node, whole, loopback };
        for (i, planned) in undo.interfaces.iter().enumerate() {
            let interface = present
                .iter()
                .find(|interface| interface.index == planned.index && interface.name == planned.name)
                .ok_or_else(|| anyhow!("{} is gone since the injection was planned", planned.name))?;
            if interface.loopback && whole {
                live.loopback = Some(i);
            }
            let spec = self.spec(
                undo.seed,
                i,
                &live.names,
                live.cgroup.as_ref(),
                live.node.as_deref(),
                live.loopback == Some(i),
            );
            crash::step("network.rule")?;
            live.rules.push(Owned::add(support, &place, interface, planned.outside, spec, window)?);
            crash::point("network.ruled");
        }
        Ok(Injected { live, netns: inner, rtt, resolver })
    }
}

/// Says what one interface will see, and what has to be undone there.
fn plan_interface(
    support: &Support,
    netlink: &mut Netlink,
    netns: u64,
    interface: &Interface,
    outside: bool,
    spec: &Spec,
    planned: &mut Planned<Undo>,
) -> Result<UndoInterface> {
    let name = &interface.name;
    let mut undo = UndoInterface {
        name: name.clone(),
        index: interface.index,
        outside,
        remains: Remains { filters: support.hook == Hook::Clsact, ..Remains::default() },
    };
    let place = place(undo.key(netns));
    undo.remains.clsact =
        undo.remains.filters && (!netlink.has_clsact(interface.index)? || made_clsact(undo.key(netns)));
    if support.hook == Hook::Clsact {
        // Somebody else's filters must not be in the way.
        for way in [Direction::Egress, Direction::Ingress].into_iter().filter(|&way| spec.passes(way)) {
            let hook = if outside { way.other() } else { way };
            netlink.foremost(interface.index, hook).with_context(|| format!("attaching to {name}"))?;
        }
    }
    planned.changes.push(match support.hook {
        Hook::Tcx => format!("{name}: programs attached by TCX; ends with its link"),
        Hook::Clsact if undo.remains.clsact => {
            format!("{name}: clsact qdisc with filters squall_*; undo: remove both")
        }
        Hook::Clsact => format!("{name}: filters squall_* in its clsact qdisc; undo: remove the filters"),
    });
    // Whatever an update may come to need, and another injection here: its record goes with it, and the line stays for this one.
    undo.remains.line = matches!(support.holder(interface), Ok(Holder::Line));
    if interface.loopback {
        undo.remains.localnet = localnet::missing()?.or(place.made_localnet());
    }
    if spec.holds() {
        let latency = spec.action.latency;
        match support.holder(interface)? {
            Holder::Line => {
                let ends = line::names(interface.index, outside).join(" and ");
                let room = line::room(spec.longest());
                planned.changes.push(format!(
                    "{name}: a veth pair {ends} beside it, with room for {room} packets; undo: remove it"
                ));
                let most = f64::from(room) / spec.longest().as_secs_f64();
                if most < f64::from(line::PACKETS_A_SECOND) * 0.999 {
                    planned.warnings.push(format!(
                        "{name}: so long a delay has room for {most:.0} packets a second; more are lost"
                    ));
                }
            }
            Holder::Tap => {
                planned.changes.push(format!("{name}: TAP devices squall*; end with the agent"));
                if latency >= 1_000_000_000 {
                    planned.warnings.push(format!(
                        "{name}: the queue holds 256 MiB, so at this delay at most {:.0} Mbit/s pass; more is lost",
                        QUEUE_BITS / (latency as f64 / 1e9) / 1e6
                    ));
                }
            }
        }
        if latency + spec.action.jitter > 0 && spec.action.jitter > 0 && spec.action.keep_order == 0 {
            planned
                .warnings
                .push(format!("{name}: jitter lets packets overtake each other, as netem's does"));
        }
    }
    if spec.works() || spec.segments() {
        support.worker(interface)?;
        planned
            .changes
            .push(format!("{name}: TAP devices squall*, where packets are changed; end with the agent"));
    }
    if interface.loopback {
        if spec.detours() && undo.remains.localnet.any() {
            localnet::check(localnet::missing()?)?;
            planned
                .changes
                .push(format!("{name}: route_localnet and accept_local become 1; undo: back to 0"));
        }
        let both = |clause: &Clause| clause.egress && clause.ingress && clause.peer_ports.is_empty();
        if spec.clauses.iter().any(|clause| !clause.except && both(clause) && clause.local_ports.is_empty()) {
            planned.warnings.push(format!(
                "{name}: each packet leaves and arrives here, so it suffers twice; name a port or a direction"
            ));
        }
    }
    let before = place.rules();
    let unreachable = |clause: &Clause| {
        clause.except
            || before
                .iter()
                .any(|rule| rule.iter().all(|c| !c.except) && rule.iter().any(|c| c.covers(clause)))
    };
    if !before.is_empty() && spec.clauses.iter().all(unreachable) {
        planned.warnings.push(format!(
            "{name}: everything this one is about is taken by injections before it: it will do nothing until they end"
        ));
    } else if !before.is_empty() {
        planned.warnings.push(format!(
            "{name}: {} other injections come first; packets that match them never reach this one",
            before.len()
        ));
    }
    Ok(undo)
}

impl Peer {
    fn with_addresses(&self, names: &Names) -> Clause {
        let mut clause = self.clause.clone();
        let addresses = self.hosts.iter().filter_map(|name| names.get(name)).flatten();
        clause.cidrs.extend(addresses.filter_map(|&address| host(address)));
        clause
    }
}

fn on_loopback(clause: &Clause) -> bool {
    clause.cidrs.iter().any(is_loopback)
}

fn address_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
}

/// Where the kubelet reaches the API server, if that is at 443, as on clusters that somebody else runs: packets have that address by the
/// time they leave, and not the one of the service. Told by the cgroup (v2) of its sockets; on v1 it is not.
fn api_servers() -> Vec<Cidr> {
    let hierarchies = Hierarchies::read().unwrap_or_default();
    let is_kubelet = |pid: &i32| proc::exe(*pid).is_some_and(|exe| exe.ends_with("kubelet"));
    let cgroup = |pid| hierarchies.of_process(&proc::cgroups(pid)?)?.of_sockets()?.metadata().ok();
    let kubelets = proc::pids().unwrap_or_default().into_iter().filter(is_kubelet);
    let ids: Vec<u64> = kubelets.filter_map(cgroup).map(|dir| dir.ino()).collect();
    if ids.is_empty() {
        return Vec::new();
    }
    let own = target::Netns::own().context("the agent has no network namespace");
    let sockets = own.and_then(|own| sockets::established(&Netns::open(&own)?)).unwrap_or_else(|error| {
        tracing::warn!("an API server at {} is not known, and not spared: {error:#}", HTTPS.first);
        Vec::new()
    });
    let is_its = |socket: &sockets::TcpSocket| {
        socket.peer.port() == HTTPS.first && socket.cgroup.is_some_and(|id| ids.contains(&id))
    };
    let hosts: BTreeSet<IpAddr> = sockets.into_iter().filter(is_its).map(|socket| socket.peer.ip()).collect();
    hosts.into_iter().filter_map(host).collect()
}

/// The prefix of one address.
fn host(address: IpAddr) -> Option<Cidr> {
    Cidr::new(address, if address.is_ipv4() { 32 } else { 128 })
}

/// How large a part of a prefix these take together; without any, all of it.
fn share_of_addresses(all: &Cidr, cidrs: &[Cidr]) -> f64 {
    if cidrs.is_empty() || cidrs.iter().any(|cidr| cidr.covers(all)) {
        return 1.0;
    }
    // In this order a prefix comes after all that cover it.
    let inside: BTreeSet<&Cidr> = cidrs.iter().filter(|cidr| all.covers(cidr)).collect();
    let (mut share, mut last) = (0.0, None::<&Cidr>);
    for cidr in inside {
        if last.is_none_or(|last| !last.covers(cidr)) {
            share += (-f64::from(cidr.prefix_len() - all.prefix_len())).exp2();
            last = Some(cidr);
        }
    }
    share
}

/// How large a part of all ports these ranges take, none of which overlap; without any, all of them.
fn share_of_ports(ports: &[Ports]) -> f64 {
    if ports.is_empty() {
        return 1.0;
    }
    let count: u32 = ports.iter().map(|range| u32::from(range.last - range.first) + 1).sum();
    f64::from(count) / 65_536.0
}

fn is_loopback(cidr: &Cidr) -> bool {
    let loopback = ["127.0.0.0/8", "::1/128"].map(str::parse::<Cidr>);
    loopback.iter().flatten().any(|loopback| loopback.covers(cidr))
}

/// The id of a cgroup (v2) and of all below it. It is the inode of the directory (kernfs, Linux 5.5 and later).
fn cgroups_below(path: &Path) -> Vec<u64> {
    let mut ids: Vec<u64> = path.metadata().map(|meta| meta.ino()).into_iter().collect();
    let entries = path.read_dir().into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        ids.extend(cgroups_below(&entry.path()));
    }
    ids.sort_unstable();
    ids
}

/// Looks again at what names and cgroups mean, and changes the rules where that has changed. A name that has no address any
/// more keeps its last ones.
async fn refresh(live: Weak<Mutex<Live>>, resolver: Resolver) {
    loop {
        sleep(REFRESH).await;
        let (live, resolver) = (Weak::clone(&live), resolver.clone());
        let looked = spawn_blocking(move || {
            // Not held while names are looked up: that may take seconds, and the fault must be able to end.
            let Some(now) = live.upgrade() else { return Ok(false) };
            let (mut names, path) = {
                let live = lock(&now);
                (live.names.clone(), live.cgroup.as_ref().map(|sockets| sockets.path.clone()))
            };
            drop(now);
            for (name, addresses) in &mut names {
                match resolver.resolve(name) {
                    Ok(found) => *addresses = found,
                    Err(error) => tracing::debug!("{name} keeps its last addresses: {error:#}"),
                }
            }
            let cgroup = path.map(|path| Sockets::of(path, resolver.netns()));
            let Some(now) = live.upgrade() else { return Ok(false) };
            let mut live = lock(&now);
            if live.names != names || live.cgroup != cgroup {
                (live.names, live.cgroup) = (names, cgroup);
                live.apply()?;
            }
            Ok::<_, anyhow::Error>(true)
        });
        match looked.await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) | Err(_) => return,
            Ok(Err(error)) => tracing::warn!("refreshing a network fault: {error:#}"),
        }
    }
}

/// The median RTT that the established TCP sockets report which these clauses are about.
fn median_rtt(netns: &Netns, clauses: &[Clause]) -> Option<Duration> {
    let sockets = match sockets::established(netns) {
        Ok(sockets) => sockets,
        Err(error) => {
            tracing::debug!("asking TCP sockets for their RTT: {error:#}");
            return None;
        }
    };
    let within = |ranges: &[Ports], address: SocketAddr| {
        ranges.is_empty() || ranges.iter().any(|p| (p.first..=p.last).contains(&address.port()))
    };
    let about = |clause: &Clause, socket: &sockets::TcpSocket| {
        let host = host(socket.peer.ip());
        matches!(clause.protocol, None | Some(Protocol::Tcp))
            && within(&clause.peer_ports, socket.peer)
            && within(&clause.local_ports, socket.local)
            && (clause.cidrs.is_empty()
                || host.is_some_and(|host| clause.cidrs.iter().any(|c| c.covers(&host))))
    };
    let mut rtts: Vec<Duration> = sockets
        .iter()
        .filter(|socket| !socket.rtt.is_zero() && clauses.iter().any(|clause| about(clause, socket)))
        .map(|socket| socket.rtt)
        .collect();
    rtts.sort_unstable();
    rtts.get(rtts.len() / 2).copied()
}

fn revert(undo: &Undo) -> Result<()> {
    crash::step("network.revert")?;
    let mut left = Vec::new();
    for interface in &undo.interfaces {
        // A port that other injections still use keeps what it needs; the last of them takes it away.
        if settle(interface.key(undo.netns_inode))? {
            left.push(interface);
        }
    }
    // What an agent that died left behind. The namespace may be gone, and everything in it.
    let Some(netns) = Netns::find(&undo.netns_path, undo.netns_inode)? else { return Ok(()) };
    netns.run(|| {
        let mut netlink = Netlink::open()?;
        let present = netlink.interfaces()?;
        for interface in left {
            clean(&mut netlink, interface, &present)
                .with_context(|| format!("cleaning up {} in net:[{}]", interface.name, undo.netns_inode))?;
        }
        Ok(())
    })
}

/// Takes back what is left of a port. The line beside an interface is there even when the interface is not.
fn clean(netlink: &mut Netlink, interface: &UndoInterface, present: &[Interface]) -> Result<()> {
    let there = present.iter().any(|i| i.index == interface.index && i.name == interface.name);
    if there && interface.remains.filters && netlink.has_clsact(interface.index)? {
        crash::step("network.filters")?;
        remove_filters(&interface.name)?;
    }
    if there && interface.remains.clsact {
        crash::step("network.clsact")?;
        netlink.remove_empty_clsact(interface.index)?;
    }
    let names = line::names(interface.index, interface.outside);
    let ours = |i: &Interface| names.contains(&i.name) && !line::is_anothers(i.alias.as_deref());
    if interface.remains.line && present.iter().any(ours) {
        crash::step("network.line")?;
        Line::remove(netlink, interface.index, interface.outside)?;
    }
    crash::step("network.localnet")?;
    localnet::set(interface.remains.localnet, false)
}

/// What this node can do; found out once.
async fn support() -> Result<Arc<Support>> {
    static SUPPORT: OnceCell<Arc<Support>> = OnceCell::const_new();
    let probe = || async { Ok::<_, anyhow::Error>(Arc::new(spawn_blocking(Support::probe).await??)) };
    SUPPORT.get_or_try_init(probe).await.cloned()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn peer(cidrs: &[&str], ports: &[[u32; 2]], hosts: &[&str]) -> v1::Peer {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        let ports = ports.iter().map(|&[first, last]| v1::PortRange { first, last }).collect();
        v1::Peer { cidrs: texts(cidrs), hosts: texts(hosts), ports, ..v1::Peer::default() }
    }

    #[rstest]
    #[case::no_peer(vec![], true)]
    #[case::all(vec![peer(&["0.0.0.0/0"], &[], &[])], true)]
    #[case::two_halves(vec![peer(&["0.0.0.0/1", "128.0.0.0/1"], &[], &[])], true)]
    #[case::two_halves_of_two_peers(vec![peer(&["::/1"], &[], &[]), peer(&["8000::/1"], &[], &[])], true)]
    #[case::all_but_one_address_in_256(vec![peer(&["0.0.0.0/1", "128.0.0.0/2", "192.0.0.0/3"], &[], &[])], true)]
    #[case::all_ports(vec![peer(&[], &[[1, 65535]], &[])], true)]
    #[case::all_ports_in_parts(vec![peer(&[], &[[1, 30000], [20000, 60000], [60001, 65535]], &[])], true)]
    #[case::all_of_both(vec![peer(&["0.0.0.0/0"], &[[1, 40000]], &[]), peer(&["0.0.0.0/0"], &[[40001, 65535]], &[])], true)]
    #[case::one_port(vec![peer(&[], &[[443, 443]], &[])], false)]
    #[case::a_port_of_all_and_all_of_one(vec![peer(&["0.0.0.0/0"], &[[443, 443]], &[]), peer(&["10.0.0.0/8"], &[], &[])], false)]
    #[case::a_network_in_itself(vec![peer(&["0.0.0.0/2", "10.0.0.0/8", "20.0.0.0/7"], &[], &[])], false)]
    #[case::a_name(vec![peer(&[], &[], &["shop.test"])], false)]
    fn nearly_everything_is_everything(#[case] peers: Vec<v1::Peer>, #[case] everything: bool) {
        let fault = v1::NetworkFault { peers, partition: true, ..v1::NetworkFault::default() };
        let fault = Network::parse(fault).unwrap();
        let target = Target {
            name: "lo".to_owned(),
            process: None,
            cgroup: None,
            netns: target::Netns::own(),
            interface: Some("lo".to_owned()),
        };
        let refused = fault.check(&target, &Limits::default()).err().map(|refused| refused.to_string());
        assert_eq!(refused.is_some(), everything, "{refused:?}");
        assert!(refused.is_none_or(|why| why.contains("--allow-whole-node-network")));
        let whole_node_network = true;
        assert_eq!(fault.check(&target, &Limits { whole_node_network, ..Limits::default() }), Ok(()));
    }
}
