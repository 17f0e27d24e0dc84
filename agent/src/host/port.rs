//! A port: our programs on one interface, with the rules of every injection there.
//!
//! Injections share the port of an interface. The first that needs it opens it, the last that leaves closes it; each adds
//! only what it needs (a hook per direction, a queue per direction). All changes to live rules are writes to maps.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use squall_common::{
    decide::Action,
    histogram::{BUCKETS, quantile},
    packet::Protocol,
    rules::{Cidr, Clause, Ports, prefixes},
    table::{Bucket, CLAUSES, Cell, Direction, HISTOGRAM, LOCAL_PORTS, RULES, Table},
};

use super::{
    bpf::{Hook, Mapped, Program, Programs, remove_filters},
    netns::{Netns, run_in_new},
    tap::{Device, Tap},
    tc::{Interface, Netlink, OUR_QDISC, Qdisc},
};
use crate::{fault::Window, time::BootTime};

/// How long a port waits for `sch_fq` to send off what it holds before it removes it.
const LONGEST_DRAIN: Duration = Duration::from_secs(1);
const LOOPBACK: u32 = 1;

// ---- what this node can do -----------------------------------------------------------------------------------------

/// What was found by trying.
#[derive(Debug, Clone)]
pub struct Support {
    /// How programs are attached.
    pub hook: Hook,
    /// Why `sch_fq` cannot be used; `None` where it can.
    pub no_fq: Option<String>,
    /// Why a TAP queue cannot be used; `None` where it can.
    pub no_tap: Option<String>,
}

/// How packets of one direction are held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Departure times (EDT) that `sch_fq` at the root of the interface keeps.
    Edt,
    /// A TAP device with a queue in the agent.
    Tap,
}

impl Support {
    /// Tries everything in a network namespace that nobody else sees. Must be called within the runtime.
    pub fn probe() -> Result<Self> {
        let mut programs = Programs::get()?;
        run_in_new(move || {
            let mut netlink = Netlink::open()?;
            let hook = match programs.attach(Program::Port(Direction::Egress), "lo", Hook::Tcx) {
                Ok(()) => Hook::Tcx,
                Err(tcx) => {
                    netlink.add_clsact(LOOPBACK)?;
                    programs
                        .attach(Program::Port(Direction::Egress), "lo", Hook::Clsact)
                        .with_context(|| format!("neither TCX ({tcx:#}) nor a classifier can be attached"))?;
                    Hook::Clsact
                }
            };
            let no_fq = netlink.set_root_fq(LOOPBACK).err().map(|e| format!("{:#}", e.root_cause()));
            let no_tap = Device::create()
                .and_then(|device| {
                    attach_tap(&mut programs, &mut netlink, &device, hook)?;
                    device.up()
                })
                .err()
                .map(|e| format!("{e:#}"));
            Ok(Self { hook, no_fq, no_tap })
        })
    }

    /// How packets of a direction can be held back on an interface with this root qdisc. The error says what is missing.
    pub fn holder(&self, way: Direction, interface: &Interface, root: Option<&Qdisc>) -> Result<Holder> {
        let no_edt = match (way, &self.no_fq) {
            (Direction::Ingress, _) => "sch_fq holds no arriving packets".to_owned(),
            (Direction::Egress, Some(reason)) => format!("no sch_fq ({reason})"),
            (Direction::Egress, None) => match root {
                // A qdisc that the kernel chose comes back by itself when ours goes.
                Some(root) if root.handle.major != 0 && root.handle != OUR_QDISC => {
                    format!("somebody configured the root qdisc ({} {:x}:)", root.kind, root.handle.major)
                }
                _ => return Ok(Holder::Edt),
            },
        };
        let no_tap = match (&self.no_tap, interface.link_header) {
            (Some(reason), _) => format!("no TAP queue ({reason})"),
            (None, Some(14)) => return Ok(Holder::Tap),
            (None, _) => "a TAP queue needs an interface with Ethernet headers".to_owned(),
        };
        bail!("packets on {} cannot be delayed: {no_edt}; {no_tap}", interface.name)
    }
}

fn attach_tap(programs: &mut Programs, netlink: &mut Netlink, device: &Device, hook: Hook) -> Result<()> {
    if hook == Hook::Clsact {
        netlink.add_clsact(device.index())?;
    }
    programs.attach(Program::TapOut, device.name(), hook)?;
    programs.attach(Program::TapIn, device.name(), hook)
}

// ---- the list of ports ---------------------------------------------------------------------------------------------

/// The place of a port, whether one is open there or not.
#[derive(Default)]
pub struct Place {
    port: Mutex<Option<Port>>,
    /// Rules whose owner is gone and that wait to be removed.
    leaving: Mutex<Vec<usize>>,
}

/// Inode of the network namespace and index of the interface.
type Key = (u64, u32);

static PLACES: Mutex<Option<HashMap<Key, Arc<Place>>>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The place of an interface's port.
#[must_use]
pub fn place(netns: u64, interface: u32) -> Arc<Place> {
    let mut places = lock(&PLACES);
    Arc::clone(places.get_or_insert_default().entry((netns, interface)).or_default())
}

/// Closes the port of an interface if no rule is left on it, and says whether it is closed.
pub fn settle(netns: u64, interface: u32) -> Result<bool> {
    let place = place(netns, interface);
    let closed = place.settle()?;
    if closed {
        let mut places = lock(&PLACES);
        // One count here, one in the map: nobody is about to open it.
        if Arc::strong_count(&place) == 2 {
            places.get_or_insert_default().remove(&(netns, interface));
        }
    }
    Ok(closed)
}

impl Place {
    fn settle(&self) -> Result<bool> {
        let mut slot = lock(&self.port);
        let Some(port) = slot.as_mut() else { return Ok(true) };
        self.sweep(port)?;
        if port.rules.iter().any(|&used| used) {
            return Ok(false);
        }
        match slot.take() {
            Some(port) => port.close().map(|()| true),
            None => Ok(true),
        }
    }

    fn sweep(&self, port: &mut Port) -> Result<()> {
        let leaving = std::mem::take(&mut *lock(&self.leaving));
        leaving.into_iter().try_for_each(|rule| port.remove(rule))
    }

    /// Whether the open port made the interface's clsact qdisc.
    #[must_use]
    pub fn made_clsact(&self) -> bool {
        lock(&self.port).as_ref().is_some_and(|port| port.made_clsact)
    }

    /// How many rules come before a new one.
    #[must_use]
    pub fn rules(&self) -> usize {
        lock(&self.port).as_ref().map_or(0, |port| port.rules.iter().filter(|&&used| used).count())
    }
}

/// A rule on a port. Dropping it ends the rule at once, and later closes the port if it was the last.
pub struct Owned {
    key: Key,
    place: Arc<Place>,
    rule: usize,
    table: Arc<Mapped<Table>>,
    delays: Arc<Mapped<[Bucket; HISTOGRAM]>>,
}

impl Owned {
    /// Adds a rule to the port of an interface, opening it where it is not. Must be called within the runtime.
    pub fn add(
        support: &Support,
        netns: &Arc<Netns>,
        interface: &Interface,
        clauses: &[Clause],
        action: Action,
        window: Window,
    ) -> Result<Self> {
        let key = (netns.inode(), interface.index);
        let place = place(key.0, key.1);
        let (rule, table, delays) = {
            let mut slot = lock(&place.port);
            let port = match slot.as_mut() {
                Some(port) => port,
                None => slot.insert(Port::open(support.clone(), Arc::clone(netns), interface.clone())?),
            };
            place.sweep(port)?;
            let rule = port.add(clauses, action, window)?;
            (rule, Arc::clone(port.programs.table()), Arc::clone(port.programs.delays()))
        };
        Ok(Self { key, place, rule, table, delays })
    }

    /// Changes what the rule matches and does, in place.
    pub fn change(&self, clauses: &[Clause], action: Action) -> Result<()> {
        let mut slot = lock(&self.place.port);
        slot.as_mut().ok_or_else(|| anyhow!("the port is closed"))?.change(self.rule, clauses, action)
    }

    /// Moves the time at which the rule ends by itself.
    pub fn extend(&self, until: BootTime) {
        self.table.rules[self.rule].until.store(until.0);
    }

    /// What the rule did so far.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let rule = &self.table.rules[self.rule];
        let first = rule.first_match.load();
        Figures {
            matched: rule.matched.load(),
            bytes: rule.bytes.load(),
            dropped: rule.dropped.load(),
            delayed: rule.delayed.load(),
            failed: rule.failed.load(),
            first_match: (first != 0)
                .then(|| Duration::from_nanos(first.saturating_sub(rule.not_before.load()))),
            delays: self.delays[self.rule * BUCKETS..][..BUCKETS]
                .iter()
                .map(|bucket| (bucket.count.load(), bucket.sum.load()))
                .collect(),
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // The program looks at this time for every packet: the fault is over now.
        self.table.rules[self.rule].until.store(0);
        lock(&self.place.leaving).push(self.rule);
        let (netns, interface) = self.key;
        let settled = thread::Builder::new().name("port".to_owned()).spawn(move || {
            if let Err(error) = settle(netns, interface) {
                tracing::warn!("closing the port of interface {interface} in net:[{netns}]: {error:#}");
            }
        });
        if let Err(error) = settled {
            tracing::warn!("starting a thread to close a port: {error}");
        }
    }
}

/// What a rule did.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Packets that matched, where one GSO packet is one packet.
    pub matched: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets dropped.
    pub dropped: u64,
    /// Packets held back.
    pub delayed: u64,
    /// Packets that were to be held back and got lost for want of memory.
    pub failed: u64,
    /// From the beginning of the fault to the first packet that matched.
    pub first_match: Option<Duration>,
    delays: Vec<(u64, u64)>,
}

impl Figures {
    /// Both together: packets and bytes add up, delays are one distribution.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        self.matched += other.matched;
        self.bytes += other.bytes;
        self.dropped += other.dropped;
        self.delayed += other.delayed;
        self.failed += other.failed;
        self.first_match = [self.first_match, other.first_match].into_iter().flatten().min();
        self.delays.resize(BUCKETS, (0, 0));
        for (mine, theirs) in self.delays.iter_mut().zip(&other.delays) {
            mine.0 += theirs.0;
            mine.1 += theirs.1;
        }
        self
    }

    /// A quantile of the delay that was added, in seconds; `None` where no packet was delayed.
    #[must_use]
    pub fn delay(&self, q: f64) -> Option<f64> {
        quantile(&self.delays, q).map(|ns| ns / 1e9)
    }
}

// ---- a port --------------------------------------------------------------------------------------------------------

struct Port {
    support: Support,
    netns: Arc<Netns>,
    interface: Interface,
    programs: Programs,
    attached: [bool; 2],
    taps: [Option<Tap>; 2],
    edt: bool,
    made_clsact: bool,
    /// The longest delay any rule asked for, which is how long `sch_fq` may hold a packet.
    longest: Duration,
    clauses: [Option<(usize, Clause)>; CLAUSES],
    rules: [bool; RULES],
    trie: BTreeMap<Cidr, u64>,
}

impl Port {
    fn open(support: Support, netns: Arc<Netns>, interface: Interface) -> Result<Self> {
        let link_header = interface
            .link_header
            .ok_or_else(|| anyhow!("{} has a link layer that is not supported", interface.name))?;
        let programs = Programs::get()?;
        let table = programs.table();
        table.guard.store(u64::from(random() as u32 | 1));
        table.link_header.store(u64::from(link_header));
        table.ifindex.store(u64::from(interface.index));
        Ok(Self {
            support,
            netns,
            interface,
            programs,
            attached: [false; 2],
            taps: [None, None],
            edt: false,
            made_clsact: false,
            longest: Duration::ZERO,
            clauses: [const { None }; CLAUSES],
            rules: [false; RULES],
            trie: BTreeMap::new(),
        })
    }

    fn add(&mut self, clauses: &[Clause], action: Action, window: Window) -> Result<usize> {
        let rule = self
            .rules
            .iter()
            .position(|&used| !used)
            .ok_or_else(|| anyhow!("{} has {RULES} rules already", self.interface.name))?;
        self.prepare(clauses, &action)?;
        let cells = &self.programs.table().rules[rule];
        for counter in
            [&cells.matched, &cells.bytes, &cells.dropped, &cells.delayed, &cells.failed, &cells.first_match]
        {
            counter.store(0);
        }
        for bucket in &self.programs.delays()[rule * BUCKETS..][..BUCKETS] {
            bucket.count.store(0);
            bucket.sum.store(0);
        }
        self.write_action(rule, action);
        cells.not_before.store(window.not_before.0);
        cells.until.store(window.until.0);
        let end = self.clauses.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.rules[rule] = true;
        if let Err(error) = self.insert(end, rule, clauses) {
            self.remove(rule)?;
            return Err(error);
        }
        Ok(rule)
    }

    fn change(&mut self, rule: usize, clauses: &[Clause], action: Action) -> Result<()> {
        self.prepare(clauses, &action)?;
        let old: Vec<usize> = self.slots_of(rule);
        let same = old.iter().filter_map(|&slot| self.clauses[slot].as_ref().map(|(_, c)| c)).eq(clauses);
        if !same {
            let after = old.last().map_or(0, |last| last + 1);
            if self.free() >= clauses.len() {
                // The new ones behind the old, then the old ones away: no packet passes in between.
                self.insert(after, rule, clauses)?;
                let kept = clauses.len();
                let slots = self.slots_of(rule);
                for &slot in &slots[..slots.len() - kept] {
                    self.clear(slot)?;
                }
            } else {
                let first = old.first().copied().unwrap_or(0);
                for slot in old {
                    self.clear(slot)?;
                }
                self.insert(first, rule, clauses)?;
            }
        }
        self.write_action(rule, action);
        Ok(())
    }

    fn remove(&mut self, rule: usize) -> Result<()> {
        for slot in self.slots_of(rule) {
            self.clear(slot)?;
        }
        self.rules[rule] = false;
        Ok(())
    }

    fn write_action(&self, rule: usize, action: Action) {
        let cells = &self.programs.table().rules[rule];
        cells.seed.store(action.seed);
        cells.share.store(action.share);
        cells.loss.store(action.loss);
        cells.jitter.store(action.jitter);
        cells.latency.store(action.latency);
    }

    fn slots_of(&self, rule: usize) -> Vec<usize> {
        let of_rule = |slot: &Option<(usize, Clause)>| slot.as_ref().is_some_and(|(r, _)| *r == rule);
        (0..CLAUSES).filter(|&slot| of_rule(&self.clauses[slot])).collect()
    }

    fn free(&self) -> usize {
        self.clauses.iter().filter(|slot| slot.is_none()).count()
    }

    /// Puts clauses at a place in the order, moving others where it must. What is live stays live.
    fn insert(&mut self, at: usize, rule: usize, clauses: &[Clause]) -> Result<()> {
        if clauses.len() > self.free() {
            let (free, name) = (self.free(), &self.interface.name);
            bail!("{} peers are too many for {name}: {free} of {CLAUSES} are left", clauses.len());
        }
        let mut at = at;
        let fits =
            at + clauses.len() <= CLAUSES && self.clauses[at..at + clauses.len()].iter().all(Option::is_none);
        if !fits {
            let before = self.clauses[..at].iter().flatten().count();
            // Everyone to the left, then those behind to the right end.
            let used: Vec<usize> = (0..CLAUSES).filter(|&slot| self.clauses[slot].is_some()).collect();
            for (to, from) in used.iter().copied().enumerate() {
                self.move_clause(from, to)?;
            }
            let behind = used.len() - before;
            for i in 0..behind {
                self.move_clause(used.len() - 1 - i, CLAUSES - 1 - i)?;
            }
            at = before;
        }
        for (i, clause) in clauses.iter().enumerate() {
            self.set(at + i, rule, clause.clone())?;
        }
        Ok(())
    }

    fn move_clause(&mut self, from: usize, to: usize) -> Result<()> {
        if from == to {
            return Ok(());
        }
        if let Some((rule, clause)) = self.clauses[from].clone() {
            self.set(to, rule, clause)?;
            self.clear(from)?;
        }
        Ok(())
    }

    /// Writes a clause: first what it matches, then that it is live.
    fn set(&mut self, slot: usize, rule: usize, clause: Clause) -> Result<()> {
        let table = Arc::clone(self.programs.table());
        let bit = 1_u64 << slot;
        let write = |cell: &Cell, on: bool| if on { cell.set(bit) } else { cell.clear(bit) };
        table.rule_of[slot].store(rule as u64);
        write(&table.any_peer, clause.cidrs.is_empty());
        write(&table.any_peer_port, clause.peer_ports.is_empty());
        write(&table.any_local_port, clause.local_ports.is_empty());
        for protocol in [Protocol::Other, Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
            write(&table.protocol[protocol as usize], clause.protocol.is_none_or(|p| p == protocol));
        }
        self.for_ports(&clause, |cell| cell.set(bit));
        let (egress, ingress) = (clause.egress, clause.ingress);
        self.clauses[slot] = Some((rule, clause));
        self.write_trie()?;
        write(&table.live[Direction::Egress as usize], egress);
        write(&table.live[Direction::Ingress as usize], ingress);
        Ok(())
    }

    fn clear(&mut self, slot: usize) -> Result<()> {
        let bit = 1_u64 << slot;
        for cell in &self.programs.table().live {
            cell.clear(bit);
        }
        if let Some((_, clause)) = self.clauses[slot].take() {
            self.for_ports(&clause, |cell| cell.clear(bit));
            self.write_trie()?;
        }
        Ok(())
    }

    fn for_ports(&self, clause: &Clause, f: impl Fn(&Cell)) {
        let ports = self.programs.ports();
        for (base, ranges) in [(0, &clause.peer_ports), (LOCAL_PORTS, &clause.local_ports)] {
            for &Ports { first, last } in ranges {
                ports[base + usize::from(first)..=base + usize::from(last)].iter().for_each(&f);
            }
        }
    }

    /// Brings the trie of peers up to date: new entries before old ones go.
    fn write_trie(&mut self) -> Result<()> {
        let clauses = self.clauses.iter().enumerate();
        let wanted =
            prefixes(clauses.filter_map(|(bit, slot)| slot.as_ref().map(|(_, clause)| (bit, clause))));
        for (cidr, set) in &wanted {
            if self.trie.get(cidr) != Some(set) {
                self.programs.set_peers(cidr, *set)?;
            }
        }
        for cidr in self.trie.keys().filter(|cidr| !wanted.contains_key(cidr)) {
            self.programs.remove_peers(cidr)?;
        }
        self.trie = wanted;
        Ok(())
    }

    /// Attaches what the clauses need, and sets up what holds packets back.
    fn prepare(&mut self, clauses: &[Clause], action: &Action) -> Result<()> {
        let delays = action.latency + action.jitter > 0;
        self.longest = self.longest.max(Duration::from_nanos(action.latency + action.jitter));
        let ways = [Direction::Egress, Direction::Ingress].map(|way| {
            let wanted = clauses.iter().any(|clause| match way {
                Direction::Egress => clause.egress,
                Direction::Ingress => clause.ingress,
            });
            (way, wanted)
        });
        let netns = Arc::clone(&self.netns);
        netns.run(|| {
            let mut netlink = Netlink::open()?;
            for (way, wanted) in ways {
                if wanted && delays {
                    self.hold(&mut netlink, way)?;
                }
                if wanted && !self.attached[way as usize] {
                    self.attach(&mut netlink, way)?;
                }
            }
            Ok(())
        })
    }

    fn attach(&mut self, netlink: &mut Netlink, way: Direction) -> Result<()> {
        if self.support.hook == Hook::Clsact && !netlink.has_clsact(self.interface.index)? {
            netlink.add_clsact(self.interface.index)?;
            self.made_clsact = true;
        }
        self.programs.attach(Program::Port(way), &self.interface.name, self.support.hook)?;
        self.attached[way as usize] = true;
        Ok(())
    }

    fn hold(&mut self, netlink: &mut Netlink, way: Direction) -> Result<()> {
        if self.taps[way as usize].is_some() || (way == Direction::Egress && self.edt) {
            return Ok(());
        }
        let root = netlink.root_qdisc(self.interface.index)?;
        match self.support.holder(way, &self.interface, root.as_ref())? {
            Holder::Edt => {
                netlink.set_root_fq(self.interface.index)?;
                self.edt = true;
                self.programs.table().edt.store(1);
            }
            Holder::Tap => {
                let device = Device::create()?;
                attach_tap(&mut self.programs, netlink, &device, self.support.hook)?;
                device.up()?;
                let (table, delays) = (self.programs.table(), self.programs.delays());
                let tap = device.start(Arc::clone(table), Arc::clone(delays))?;
                self.programs.table().tap[way as usize].store(u64::from(tap.index()));
                self.taps[way as usize] = Some(tap);
            }
        }
        Ok(())
    }

    /// Takes everything back.
    fn close(self) -> Result<()> {
        let Self { netns, interface, programs, attached, taps, edt, made_clsact, longest, support, .. } =
            self;
        let name = interface.name.clone();
        netns
            .run(move || {
                let mut netlink = Netlink::open()?;
                // The queues send off what they hold, which takes the programs.
                drop(taps);
                if edt {
                    drain(&mut netlink, interface.index, longest.min(LONGEST_DRAIN))?;
                }
                // Links end here; filters are found by their names.
                drop(programs);
                if support.hook == Hook::Clsact && attached.contains(&true) {
                    remove_filters(&interface.name)?;
                }
                if edt {
                    netlink.remove_root_fq(interface.index)?;
                }
                if made_clsact {
                    netlink.remove_empty_clsact(interface.index)?;
                }
                Ok(())
            })
            .with_context(|| format!("taking our programs off {name}"))
    }
}

/// Waits until a root qdisc is empty, or as long as it may hold a packet.
fn drain(netlink: &mut Netlink, interface: u32, longest: Duration) -> Result<()> {
    let end = Instant::now() + longest;
    while Instant::now() < end {
        match netlink.root_qdisc(interface)? {
            Some(root) if root.handle == OUR_QDISC && root.packets > 0 => {
                thread::sleep(Duration::from_millis(5));
            }
            _ => break,
        }
    }
    Ok(())
}

/// A number that nobody can guess, from the seed that the standard library draws for its hash tables.
#[must_use]
pub fn random() -> u64 {
    RandomState::new().hash_one(0)
}
