//! A port: our programs on one interface, with the rules of every injection there.
//!
//! Injections share the port of an interface. The first that needs it opens it, the last that leaves closes it; each adds
//! only what it needs (a hook per direction, a queue per direction). All changes to live rules are writes to maps.

mod figures;
mod support;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use squall_common::{
    decide::{Action, LONGEST, Mode},
    histogram::BUCKETS,
    packet::{Address, Protocol},
    quantiles::Quantiles,
    rules::{Cidr, Clause, prefixes},
    sieve::Sieve,
    table::{
        CGROUPS, CIDRS, CLAUSES, Cell, Dimension, Direction, ENDPOINTS, GUARDS, LANES, Lane, RULES, Rule,
    },
};

use self::support::{attach_line, attach_tap};
pub use self::{
    figures::Figures,
    support::{Holder, Support},
};
use super::{
    bpf::{Hook, Program, Programs, remove_filters, socket_cgroups},
    line::Line,
    localnet,
    netns::Netns,
    tap::{Desk, Device, Tap},
    tc::{Interface, Netlink},
};
use crate::{crash, fault::Window, frame::Dns, time::BootTime};

/// How long a port waits for packets on their way before it takes the way from them. Whoever waits for the port, which are another
/// injection and the next agent, has a lease of a run to lose, which is 5 s.
const LONGEST_DRAIN: Duration = Duration::from_millis(2500);
const LOOPBACK: u32 = 1;

/// By how much even the most punctual packets of the rule before were late behind a TAP queue, and behind a line, in nanoseconds; 0: not
/// known yet. A rule begins with it, so that its first packets are as punctual as those after them.
static LATE: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// What a rule is about, and what it does.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// What it matches: exceptions first.
    pub clauses: Vec<Clause>,
    /// What it does.
    pub action: Action<u64>,
    /// A distribution of delays of its own; the action's `table` is set to it.
    pub quantiles: Option<Quantiles>,
    /// What it says about DNS.
    pub dns: Option<Dns>,
    /// Where the cgroups of its clauses listen: cgroup by [`endpoint`](squall_common::table::endpoint).
    pub endpoints: BTreeMap<u32, u64>,
}

impl Spec {
    /// Whether packets have to be held back.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.action.latency + self.action.jitter + self.action.byte_time + self.action.slot_max > 0
    }

    /// Whether packets have to be changed or answered.
    #[must_use]
    pub fn works(&self) -> bool {
        self.action.corrupt.ratio > 0 || self.action.mode != Mode::Hurt as u64
    }

    /// Whether packets have to be segmented first.
    #[must_use]
    pub fn segments(&self) -> bool {
        self.action.per_segment != 0
    }

    /// Whether packets leave the interface's own way at all.
    #[must_use]
    pub fn detours(&self) -> bool {
        self.holds() || self.works() || self.segments()
    }

    /// The longest time for which a packet is held.
    #[must_use]
    pub fn longest(&self) -> Duration {
        // A table's entries reach four jitters.
        let delay = self.action.latency + 4 * self.action.jitter;
        let held = delay + self.action.backlog + self.action.slot_backlog;
        let held = Duration::from_nanos(held.min(LONGEST));
        held + self.dns.as_ref().map_or(Duration::ZERO, |dns| dns.delay)
    }

    /// Whether it is about packets that go this way.
    #[must_use]
    pub fn passes(&self, way: Direction) -> bool {
        self.clauses.iter().any(|clause| match way {
            Direction::Egress => clause.egress,
            Direction::Ingress => clause.ingress,
        })
    }
}

// ---- the list of ports ---------------------------------------------------------------------------------------------

/// The place of a port, whether one is open there or not.
#[derive(Default)]
pub struct Place {
    port: Mutex<Option<Port>>,
    /// Rules whose owner is gone and that wait to be removed.
    leaving: Mutex<Vec<usize>>,
}

/// Which port: an interface, used as the target's own or as the outer end of the target's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Inode of the network namespace.
    pub netns: u64,
    /// Index of the interface.
    pub interface: u32,
    /// Whether what leaves the interface arrives at the target.
    pub outside: bool,
}

/// Where the clsact qdisc is ours: network namespace and interface, which two ports may share. The last of them removes it.
static CLSACTS: Mutex<BTreeSet<(u64, u32)>> = Mutex::new(BTreeSet::new());

/// Whether a port made the clsact qdisc of an interface.
#[must_use]
pub fn made_clsact(key: Key) -> bool {
    lock(&CLSACTS).contains(&(key.netns, key.interface))
}

static PLACES: Mutex<Option<HashMap<Key, Arc<Place>>>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The place of an interface's port.
#[must_use]
pub fn place(key: Key) -> Arc<Place> {
    let mut places = lock(&PLACES);
    Arc::clone(places.get_or_insert_default().entry(key).or_default())
}

/// Closes the port of an interface if no rule is left on it, and says whether it is closed.
pub fn settle(key: Key) -> Result<bool> {
    let place = place(key);
    let closed = place.settle()?;
    if closed {
        let mut places = lock(&PLACES);
        // One count here, one in the map: nobody is about to open it.
        if Arc::strong_count(&place) == 2 {
            places.get_or_insert_default().remove(&key);
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
        // Where that fails it stays in its place, so that whoever tries again finds what is left of it.
        port.close()?;
        if let Some(Port { programs, .. }) = slot.take() {
            programs.give_back();
        }
        Ok(true)
    }

    fn sweep(&self, port: &mut Port) -> Result<()> {
        let mut leaving = lock(&self.leaving);
        while let Some(&rule) = leaving.last() {
            port.remove(rule)?;
            leaving.pop();
        }
        Ok(())
    }

    /// What the open port changed so that the loopback interface takes packets from elsewhere.
    #[must_use]
    pub fn made_localnet(&self) -> localnet::Changed {
        lock(&self.port).as_ref().map(|port| port.made_localnet).unwrap_or_default()
    }

    /// The clauses that come before those of a new rule, rule by rule.
    #[must_use]
    pub fn rules(&self) -> Vec<Vec<Clause>> {
        let mut rules: BTreeMap<usize, Vec<Clause>> = BTreeMap::new();
        if let Some(port) = lock(&self.port).as_ref() {
            for (rule, clause) in port.clauses.iter().flatten() {
                rules.entry(*rule).or_default().push(clause.clone());
            }
        }
        rules.into_values().collect()
    }
}

/// A rule on a port. Dropping it ends the rule at once, and later closes the port if it was the last.
pub struct Owned {
    key: Key,
    place: Arc<Place>,
    rule: usize,
    desk: Arc<Desk>,
    /// What the port's line and queues had lost before.
    lost_before: u64,
}

impl Owned {
    /// Adds a rule to the port of an interface, opening it where it is not. Must be called within the runtime.
    pub fn add(
        support: &Support,
        netns: &Arc<Netns>,
        interface: &Interface,
        outside: bool,
        spec: Spec,
        window: Window,
    ) -> Result<Self> {
        let key = Key { netns: netns.inode(), interface: interface.index, outside };
        let place = place(key);
        let (rule, desk, lost_before) = {
            let mut slot = lock(&place.port);
            let port = match slot.as_mut() {
                Some(port) => port,
                None => {
                    slot.insert(Port::open(support.clone(), Arc::clone(netns), interface.clone(), outside)?)
                }
            };
            place.sweep(port)?;
            let lost_before = port.lost();
            (port.add(spec, window)?, Arc::clone(&port.desk), lost_before)
        };
        Ok(Self { key, place, rule, desk, lost_before })
    }

    /// Changes what the rule matches and does, in place.
    pub fn change(&self, spec: Spec) -> Result<()> {
        let mut slot = lock(&self.place.port);
        slot.as_mut().ok_or_else(|| anyhow!("the port is closed"))?.change(self.rule, spec)
    }

    /// Moves the time at which the rule ends by itself.
    pub fn extend(&self, until: BootTime) {
        self.cells().until.store(until.0);
    }

    /// What the rule did so far. Of a line or queue that several rules share, each has what all lost there.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let rule = self.cells();
        let first = rule.first_match.load();
        let lost = match lock(&self.place.port).as_ref() {
            Some(port) if rule.delayed.load() > 0 => port.lost().saturating_sub(self.lost_before),
            _ => 0,
        };
        Figures {
            matched: rule.matched.load(),
            segments: rule.segments.load(),
            bytes: rule.bytes.load(),
            dropped: rule.dropped.load(),
            marked: rule.marked.load(),
            delayed: rule.delayed.load(),
            duplicated: rule.duplicated.load(),
            corrupted: rule.corrupted.load(),
            reordered: rule.reordered.load(),
            refused: rule.refused.load(),
            reset: rule.reset.load(),
            answered: rule.answered.load(),
            failed: rule.failed.load() + lost,
            first_match: (first != 0)
                .then(|| Duration::from_nanos(first.saturating_sub(rule.not_before.load()))),
            delays: self.desk.delays[self.rule * BUCKETS..][..BUCKETS]
                .iter()
                .map(|bucket| (bucket.count.load(), bucket.sum.load()))
                .collect(),
        }
    }

    fn cells(&self) -> &Rule {
        &self.desk.table.rules[self.rule]
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // The program looks at this time for every packet: the fault is over now.
        self.cells().until.store(0);
        lock(&self.place.leaving).push(self.rule);
        let key = self.key;
        let settled = thread::Builder::new().name("port".to_owned()).spawn(move || {
            if let Err(error) = settle(key) {
                tracing::warn!("closing the port of {key:?}: {error:#}");
            }
        });
        if let Err(error) = settled {
            tracing::warn!("starting a thread to close a port: {error}");
        }
    }
}

// ---- a port --------------------------------------------------------------------------------------------------------

struct Port {
    support: Support,
    netns: Arc<Netns>,
    interface: Interface,
    outside: bool,
    programs: Programs,
    desk: Arc<Desk>,
    attached: [bool; 2],
    line: Option<Line>,
    taps: [Option<Tap>; LANES],
    made_localnet: localnet::Changed,
    /// The longest time for which any rule holds a packet.
    longest: Duration,
    clauses: [Option<(usize, Clause)>; CLAUSES],
    rules: [bool; RULES],
    trie: BTreeMap<Cidr, u64>,
    cgroups: BTreeMap<u64, u64>,
    /// By rule, then all together as they are in the map.
    endpoints: BTreeMap<usize, BTreeMap<u32, u64>>,
    listening: BTreeMap<u32, u64>,
}

impl Port {
    fn open(support: Support, netns: Arc<Netns>, interface: Interface, outside: bool) -> Result<Self> {
        let link_header = interface
            .link_header
            .ok_or_else(|| anyhow!("{} has a link layer that is not supported", interface.name))?;
        crash::step("port.open")?;
        let programs = Programs::get()?;
        let table = Arc::clone(programs.table());
        table.guard.store(u64::from(GUARDS | u32::from(random() as u16)));
        table.link_header.store(u64::from(link_header));
        table.ifindex.store(u64::from(interface.index));
        table.outside.store(u64::from(outside));
        table.classifier.store(u64::from(support.hook == Hook::Clsact));
        let desk = Arc::new(Desk { table, delays: Arc::clone(programs.delays()), dns: Mutex::default() });
        Ok(Self {
            support,
            netns,
            interface,
            outside,
            programs,
            desk,
            attached: [false; 2],
            line: None,
            taps: [const { None }; LANES],
            made_localnet: localnet::Changed::default(),
            longest: Duration::ZERO,
            clauses: [const { None }; CLAUSES],
            rules: [false; RULES],
            trie: BTreeMap::new(),
            cgroups: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            listening: BTreeMap::new(),
        })
    }

    fn add(&mut self, spec: Spec, window: Window) -> Result<usize> {
        let rule = self
            .rules
            .iter()
            .position(|&used| !used)
            .ok_or_else(|| anyhow!("{} has {RULES} rules already", self.interface.name))?;
        self.room(None, &spec)?;
        self.prepare(&spec)?;
        crash::step("port.write")?;
        let cells = &self.desk.table.rules[rule];
        cells.counters().into_iter().for_each(|counter| counter.store(0));
        cells.memory.clear();
        cells.lateness.begin(self.late().load(Ordering::Relaxed));
        for bucket in &self.desk.delays[rule * BUCKETS..][..BUCKETS] {
            bucket.count.store(0);
            bucket.sum.store(0);
        }
        self.write_action(rule, &spec)?;
        let cells = &self.desk.table.rules[rule];
        cells.not_before.store(window.not_before.0);
        cells.until.store(window.until.0);
        let end = self.clauses.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.rules[rule] = true;
        // The kernel waits for all CPUs before it says that a program is attached; it works before that.
        if let Err(error) = self.insert(end, rule, &spec.clauses).and_then(|()| self.attach(&spec)) {
            self.remove(rule)?;
            return Err(error);
        }
        crash::point("port.written");
        Ok(rule)
    }

    /// Packets that got lost in its line, or before its queues took them, as far as the kernel says.
    fn lost(&self) -> u64 {
        let lost = || {
            let mut netlink = Netlink::open()?;
            let line = self.line.map_or(Ok(0), |line| line.lost(&mut netlink))?;
            let taps = self.taps.iter().flatten().map(|tap| netlink.lost(tap.index(), Direction::Egress));
            Ok(line + taps.sum::<Result<u64>>()?)
        };
        self.netns.run(lost).unwrap_or_else(|error| {
            tracing::debug!("what was lost on the detours of {}: {error:#}", self.interface.name);
            0
        })
    }

    fn change(&mut self, rule: usize, spec: Spec) -> Result<()> {
        self.room(Some(rule), &spec)?;
        self.prepare(&spec)?;
        self.attach(&spec)?;
        let clauses = &spec.clauses;
        let old: Vec<usize> = self.slots_of(rule);
        let same = old.iter().filter_map(|&slot| self.clauses[slot].as_ref().map(|(_, c)| c)).eq(clauses);
        if !same {
            let after = old.last().map_or(0, |last| last + 1);
            if self.room(None, &spec).is_ok() {
                // The new ones behind the old, then the old ones away, exceptions last: no packet passes in between.
                self.insert(after, rule, clauses)?;
                let kept = clauses.len();
                let slots = self.slots_of(rule);
                for &slot in slots[..slots.len() - kept].iter().rev() {
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
        self.write_action(rule, &spec)
    }

    fn remove(&mut self, rule: usize) -> Result<()> {
        for slot in self.slots_of(rule).into_iter().rev() {
            self.clear(slot)?;
        }
        lock(&self.desk.dns).remove(&rule);
        let cells = &self.desk.table.rules[rule];
        if std::mem::take(&mut self.rules[rule]) && cells.delayed.load() > 0 {
            let floor = cells.lateness.settled();
            // Where a rule's time was a busy one, the first packets of the next would leave too early.
            let _unknown = self.late().fetch_update(Ordering::Relaxed, Ordering::Relaxed, |known| {
                (floor != 0).then_some(if known == 0 { floor } else { floor.min(2 * known) })
            });
        }
        self.write_endpoints(rule, BTreeMap::new())
    }

    /// What is known of how late packets leave what holds them here.
    fn late(&self) -> &'static AtomicU64 {
        &LATE[usize::from(self.line.is_some())]
    }

    fn write_action(&mut self, rule: usize, spec: &Spec) -> Result<()> {
        let mut action = spec.action.clone();
        if let Some(quantiles) = &spec.quantiles {
            action.table = 1 + self.programs.set_quantiles(rule, quantiles)? as u64;
        }
        match &spec.dns {
            Some(dns) => lock(&self.desk.dns).insert(rule, dns.clone()),
            None => lock(&self.desk.dns).remove(&rule),
        };
        let cells = &self.desk.table.rules[rule];
        cells.action.store(&action);
        // A slot far ahead is none of the new ones.
        cells.memory.slot_at.store(0);
        self.write_endpoints(rule, spec.endpoints.clone())
    }

    fn write_endpoints(&mut self, rule: usize, endpoints: BTreeMap<u32, u64>) -> Result<()> {
        self.endpoints.insert(rule, endpoints);
        let all: BTreeMap<u32, u64> = self.endpoints.values().flatten().map(|(&e, &id)| (e, id)).collect();
        for endpoint in missing(&self.listening, &all) {
            self.programs.set_endpoint(endpoint, None)?;
            self.listening.remove(&endpoint);
        }
        for (endpoint, id) in all {
            if self.listening.get(&endpoint) != Some(&id) {
                self.programs.set_endpoint(endpoint, Some(id))?;
                self.listening.insert(endpoint, id);
            }
        }
        Ok(())
    }

    /// Refuses where the maps have no room for a rule, beside all others or instead of one.
    fn room(&self, instead_of: Option<usize>, spec: &Spec) -> Result<()> {
        let stay = self.clauses.iter().flatten().filter(|(rule, _)| Some(*rule) != instead_of);
        let all: Vec<&Clause> = stay.map(|(_, clause)| clause).chain(&spec.clauses).collect();
        let peers = prefixes(all.iter().map(|clause| (0, *clause)));
        let v4 = peers.keys().filter(|cidr| matches!(cidr.address(), Address::V4(_))).count();
        let cgroups: BTreeSet<u64> =
            all.iter().flat_map(|clause| clause.cgroups.iter().flatten()).copied().collect();
        let listening = self.endpoints.iter().filter(|(rule, _)| Some(**rule) != instead_of);
        let listening: BTreeSet<u32> =
            listening.flat_map(|(_, of_rule)| of_rule.keys()).chain(spec.endpoints.keys()).copied().collect();
        let cidrs = CIDRS as usize;
        for (what, count, most) in [
            ("peers and exceptions", all.len(), CLAUSES),
            ("CIDRs of IPv4", v4, cidrs),
            ("CIDRs of IPv6", peers.len() - v4, cidrs),
            ("cgroups", cgroups.len(), CGROUPS as usize),
            ("ports on which targets listen", listening.len(), ENDPOINTS as usize),
        ] {
            ensure!(
                count <= most,
                "{count} {what} are too many for {}, those of other injections included: at most {most}",
                self.interface.name
            );
        }
        Ok(())
    }

    fn slots_of(&self, rule: usize) -> Vec<usize> {
        let of_rule = |slot: &Option<(usize, Clause)>| slot.as_ref().is_some_and(|(r, _)| *r == rule);
        (0..CLAUSES).filter(|&slot| of_rule(&self.clauses[slot])).collect()
    }

    /// Puts clauses, for which there is room, at a place in the order, moving others where it must. What is live stays live.
    fn insert(&mut self, at: usize, rule: usize, clauses: &[Clause]) -> Result<()> {
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
        table.clauses_of[rule].set(bit);
        write(&table.except, clause.except);
        write(&table.any_peer, clause.cidrs.is_empty());
        write(&table.any_cgroup, clause.cgroups.is_none());
        write(&table.plain, clause.is_plain());
        for dimension in Dimension::ALL {
            write(&table.any[dimension as usize], clause.values(dimension).is_none());
        }
        for protocol in [Protocol::Other, Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
            write(&table.protocol[protocol as usize], clause.protocol.is_none_or(|p| p == protocol));
        }
        self.for_values(&clause, |cell| cell.set(bit));
        let (egress, ingress) = (clause.egress, clause.ingress);
        self.clauses[slot] = Some((rule, clause));
        self.write_maps()?;
        write(&table.live[Direction::Egress as usize], egress);
        write(&table.live[Direction::Ingress as usize], ingress);
        Ok(())
    }

    fn clear(&mut self, slot: usize) -> Result<()> {
        let bit = 1_u64 << slot;
        let table = Arc::clone(self.programs.table());
        for cell in &table.live {
            cell.clear(bit);
        }
        if let Some((rule, clause)) = self.clauses[slot].take() {
            table.clauses_of[rule].clear(bit);
            self.for_values(&clause, |cell| cell.clear(bit));
            self.write_maps()?;
        }
        Ok(())
    }

    fn for_values(&self, clause: &Clause, f: impl Fn(&Cell)) {
        let sets = self.programs.sets();
        for dimension in Dimension::ALL {
            for value in clause.values(dimension).unwrap_or_default() {
                f(&sets[dimension.base() + usize::from(value)]);
            }
        }
    }

    /// Brings the maps of peers and of cgroups up to date: new entries before old ones go.
    fn write_maps(&mut self) -> Result<()> {
        let all = self.clauses.clone();
        let clauses = || {
            let all = all.iter().enumerate();
            all.filter_map(|(bit, slot)| slot.as_ref().map(|(_, clause)| (bit, clause)))
        };
        let peers = prefixes(clauses());
        let mut cgroups: BTreeMap<u64, u64> = BTreeMap::new();
        for (bit, clause) in clauses() {
            for id in clause.cgroups.iter().flatten() {
                *cgroups.entry(*id).or_insert(0) |= 1 << bit;
            }
        }
        // What is new passes the sieve before it is there, and what is old until it is gone.
        let sieve = Sieve::new(peers.keys());
        self.write_sieve(&sieve, Cell::set);
        // One by one, so that it is known what is in the maps where writing fails half-way.
        for (cidr, set) in &peers {
            if self.trie.get(cidr) != Some(set) {
                self.programs.set_peers(cidr, *set)?;
                self.trie.insert(*cidr, *set);
            }
        }
        for cidr in missing(&self.trie, &peers) {
            self.programs.remove_peers(&cidr)?;
            self.trie.remove(&cidr);
        }
        self.write_sieve(&sieve, Cell::store);
        for (id, set) in &cgroups {
            if self.cgroups.get(id) != Some(set) {
                self.programs.set_cgroup(*id, *set)?;
                self.cgroups.insert(*id, *set);
            }
        }
        for id in missing(&self.cgroups, &cgroups) {
            self.programs.remove_cgroup(id)?;
            self.cgroups.remove(&id);
        }
        self.write_owners();
        Ok(())
    }

    /// Says whether somebody asks whose a packet is that has no socket: one that arrives, or a segment.
    fn write_owners(&self) {
        let segments = self.taps[Lane::Segment.index(Direction::Egress)].is_some();
        let mut clauses = self.clauses.iter().flatten();
        let asks = clauses.any(|(_, clause)| (clause.ingress || segments) && clause.cgroups.is_some());
        self.programs.table().owners.store(u64::from(asks));
    }

    fn write_sieve(&self, sieve: &Sieve, write: impl Fn(&Cell, u64)) {
        let words = self.programs.sieve().iter().zip(&sieve.words);
        let all = words.chain([(&self.programs.table().grains, &sieve.grains)]);
        all.filter(|(cell, word)| cell.load() != **word).for_each(|(cell, word)| write(cell, *word));
    }

    /// Sets up the detours of a rule.
    fn prepare(&mut self, spec: &Spec) -> Result<()> {
        crash::step("port.prepare")?;
        self.longest = self.longest.max(spec.longest());
        if !spec.detours() {
            return Ok(());
        }
        let netns = Arc::clone(&self.netns);
        netns.run(|| {
            let mut netlink = Netlink::open()?;
            if self.interface.loopback {
                let missing = localnet::missing()?;
                self.made_localnet = self.made_localnet.or(missing);
                crash::step("port.localnet")?;
                localnet::set(missing, true)?;
            }
            for way in [Direction::Egress, Direction::Ingress] {
                if !spec.passes(way) {
                    continue;
                }
                let hook = if self.outside { way.other() } else { way };
                if spec.holds() {
                    self.hold(&mut netlink, hook)?;
                }
                if spec.segments() {
                    self.tap(&mut netlink, Lane::Segment, hook, false)?;
                }
            }
            if spec.works() { self.work(&mut netlink) } else { Ok(()) }
        })
    }

    /// Attaches what a rule needs to the interface.
    fn attach(&mut self, spec: &Spec) -> Result<()> {
        let mut wanted = [false; 2];
        for way in [Direction::Egress, Direction::Ingress].into_iter().filter(|&way| spec.passes(way)) {
            wanted[if self.outside { way.other() } else { way } as usize] = true;
        }
        // Whose an arriving packet is, is noted when those before it leave.
        let owners = spec.clauses.iter().any(|clause| clause.ingress && clause.cgroups.is_some());
        wanted[Direction::Egress as usize] |= owners;
        let missing = |hook: &Direction| wanted[*hook as usize] && !self.attached[*hook as usize];
        let missing: Vec<Direction> =
            [Direction::Egress, Direction::Ingress].into_iter().filter(missing).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let netns = Arc::clone(&self.netns);
        netns.run(|| {
            if self.support.hook == Hook::Clsact {
                let mut netlink = Netlink::open()?;
                if !netlink.has_clsact(self.interface.index)? {
                    crash::step("port.clsact")?;
                    netlink.add_clsact(self.interface.index)?;
                    lock(&CLSACTS).insert((self.netns.inode(), self.interface.index));
                }
            }
            for hook in missing {
                crash::step("port.attach")?;
                self.programs.attach(Program::Port(hook), &self.interface.name, self.support.hook)?;
                self.attached[hook as usize] = true;
                crash::point("port.attached");
            }
            Ok(())
        })
    }

    fn hold(&mut self, netlink: &mut Netlink, hook: Direction) -> Result<()> {
        if self.support.holder(&self.interface)? == Holder::Tap {
            return self.tap(netlink, Lane::Hold, hook, true);
        }
        if let Some(line) = self.line {
            return line.resize(netlink, self.longest);
        }
        let (index, outside) = (self.interface.index, self.outside);
        crash::step("port.line")?;
        let line = Line::create(netlink, index, outside, self.longest)?;
        // From here on it is ours to remove.
        self.line = Some(line);
        attach_line(&mut self.programs, netlink, line, index, outside, self.support.hook)?;
        let table = self.programs.table();
        table.line.store(1);
        for (hook, end) in [Direction::Egress, Direction::Ingress].into_iter().zip(line.ends) {
            let lane = Lane::Hold.index(hook);
            table.open_until[lane].store(u64::MAX);
            table.lane[lane].store(u64::from(end));
        }
        crash::point("port.lined");
        Ok(())
    }

    /// A TAP device of its own for packets of one direction.
    fn tap(&mut self, netlink: &mut Netlink, lane: Lane, hook: Direction, whole: bool) -> Result<()> {
        if self.taps[lane.index(hook)].is_none() {
            let device = self.device(netlink, whole)?;
            self.start(device, lane, hook, None)?;
        }
        Ok(())
    }

    /// The pair of TAP devices where packets are changed, and answered the other way.
    fn work(&mut self, netlink: &mut Netlink) -> Result<()> {
        if self.taps[Lane::Work.index(Direction::Egress)].is_some() {
            return Ok(());
        }
        self.support.worker(&self.interface)?;
        let [out, back] = [self.device(netlink, false)?, self.device(netlink, false)?];
        let answers = [back.answers()?, out.answers()?];
        let hooks = [Direction::Egress, Direction::Ingress];
        // An answer may come before the other queue takes packets, so both are known first.
        for (hook, device) in hooks.into_iter().zip([&out, &back]) {
            self.programs.table().lane[Lane::Work.index(hook)].store(u64::from(device.index()));
        }
        for (hook, (device, answers)) in hooks.into_iter().zip([out, back].into_iter().zip(answers)) {
            self.start(device, Lane::Work, hook, Some(answers))?;
        }
        Ok(())
    }

    fn device(&mut self, netlink: &mut Netlink, whole: bool) -> Result<Device> {
        crash::step("port.tap")?;
        let device = Device::create(whole)?;
        attach_tap(&mut self.programs, netlink, &device, self.support.hook)?;
        device.up()?;
        Ok(device)
    }

    fn start(
        &mut self,
        device: Device,
        lane: Lane,
        hook: Direction,
        answers: Option<std::fs::File>,
    ) -> Result<()> {
        crash::step("port.tap.queue")?;
        let index = lane.index(hook);
        let tap = device.start(index, Arc::clone(&self.desk), answers)?;
        let device = u64::from(tap.index());
        self.taps[index] = Some(tap);
        self.write_owners();
        self.programs.table().lane[index].store(device);
        Ok(())
    }

    /// Takes everything back. What failed can be tried again.
    fn close(&mut self) -> Result<()> {
        let (netns, name) = (Arc::clone(&self.netns), self.interface.name.clone());
        // All of it inside: a filter that is dropped elsewhere would take another's with it.
        netns.run(|| self.close_inside()).with_context(|| format!("taking our programs off {name}"))
    }

    fn close_inside(&mut self) -> Result<()> {
        for rule in 0..RULES {
            self.remove(rule)?;
        }
        // The next port gets these maps: nothing may stay in them, also where writing them failed before.
        self.write_maps()?;
        crash::step("port.close")?;
        let mut netlink = Netlink::open()?;
        let interface = &self.interface;
        // The queues send off what they hold, which takes the programs.
        self.taps = [const { None }; LANES];
        if let Some(line) = self.line {
            crash::step("port.close.drain")?;
            let left = drain(&mut netlink, line, self.longest.min(LONGEST_DRAIN))?;
            if left > 0 {
                tracing::warn!("{left} packets of {} that were to be later still are lost", interface.name);
            }
        }
        crash::point("port.close.programs");
        self.programs.detach();
        // An interface that is gone took with it what was on it.
        let there = netlink.interfaces()?.into_iter().find(|there| there.index == interface.index);
        if let Some(there) = there.filter(|_| self.support.hook == Hook::Clsact)
            && self.attached.contains(&true)
        {
            crash::step("port.close.filters")?;
            remove_filters(&there.name)?;
        }
        self.attached = [false; 2];
        if self.line.is_some() {
            crash::step("port.close.line")?;
            Line::remove(&mut netlink, interface.index, self.outside)?;
            self.line = None;
        }
        let clsact = (self.netns.inode(), interface.index);
        if lock(&CLSACTS).contains(&clsact) {
            crash::step("port.close.clsact")?;
            netlink.remove_empty_clsact(interface.index)?;
            if !netlink.has_clsact(interface.index)? {
                lock(&CLSACTS).remove(&clsact);
            }
        }
        crash::step("port.close.localnet")?;
        localnet::set(self.made_localnet, false)?;
        self.made_localnet = localnet::Changed::default();
        crash::point("port.closed");
        Ok(())
    }
}

/// The keys of a map that another has not.
fn missing<K: Ord + Copy, V>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Vec<K> {
    old.keys().filter(|key| !new.contains_key(key)).copied().collect()
}

/// What a packet that no rule matches costs above an empty program, measured with these rules in a network namespace of
/// our own. Must be called within the runtime.
pub fn cost(specs: Vec<Spec>, frame: &[u8], repeat: u32) -> Result<Duration> {
    let mut port = scratch()?;
    let netns = Arc::clone(&port.netns);
    let always = Window { not_before: BootTime(0), until: BootTime(u64::MAX) };
    for spec in specs {
        port.add(spec, always)?;
    }
    let cost = netns.run(|| {
        let mut lowest = Duration::MAX;
        // In turns, many and short, because a machine is slow now and then; and the least of each.
        let mut empty = Duration::MAX;
        for _ in 0..300 {
            empty = empty.min(port.programs.run(Program::Empty, frame, repeat)?.1);
            lowest = lowest.min(port.programs.run(Program::Port(Direction::Egress), frame, repeat)?.1);
        }
        Ok(lowest.saturating_sub(empty))
    })?;
    let matched: u64 = port.desk.table.rules.iter().map(|rule| rule.matched.load()).sum();
    if matched > 0 {
        bail!("the packet was to match nothing, and matched {matched} times");
    }
    port.close()?;
    port.programs.give_back();
    Ok(cost)
}

/// A port on the loopback interface of a network namespace of its own.
fn scratch() -> Result<Port> {
    let netns = Arc::new(Netns::scratch()?);
    let all = netns.run(|| Netlink::open()?.interfaces())?;
    let lo = all.into_iter().find(|i| i.loopback).ok_or_else(|| anyhow!("a namespace without loopback"))?;
    // TCX or not is all the same to a program that is run by hand, and no detour is taken.
    let support = Support {
        hook: Hook::Clsact,
        no_line: Some("not for this".to_owned()),
        no_tap: None,
        cgroups: socket_cgroups(),
    };
    Port::open(support, netns, lo, false)
}

/// Waits until a line is empty, or as long as it may hold a packet; says how many packets are still in it.
fn drain(netlink: &mut Netlink, line: Line, longest: Duration) -> Result<u32> {
    let end = Instant::now() + longest;
    loop {
        let left = line.packets(netlink)?;
        if left == 0 || Instant::now() >= end {
            return Ok(left);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A number that nobody can guess, from the seed that the standard library draws for its hash tables.
#[must_use]
pub fn random() -> u64 {
    RandomState::new().hash_one(0)
}

#[cfg(test)]
mod tests;
