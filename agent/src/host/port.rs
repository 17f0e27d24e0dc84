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
    decide::{Action, Mode},
    histogram::{BUCKETS, bound, quantile},
    packet::Protocol,
    quantiles::Quantiles,
    rules::{Cidr, Clause, prefixes},
    sieve::Sieve,
    table::{CLAUSES, Cell, Dimension, Direction, LANES, Lane, RULES, Rule},
};

use super::{
    bpf::{Hook, Program, Programs, remove_filters, socket_cgroups},
    line::{self, Line},
    netns::{Netns, run_in_new},
    tap::{Desk, Device, Tap},
    tc::{Interface, Netlink},
};
use crate::{crash, fault::Window, frame::Dns, time::BootTime};

/// How long a port waits for packets on their way before it takes the way from them.
const LONGEST_DRAIN: Duration = Duration::from_secs(1);
const LOOPBACK: u32 = 1;

// ---- what this node can do -----------------------------------------------------------------------------------------

/// What was found by trying.
#[derive(Debug, Clone)]
pub struct Support {
    /// How programs are attached.
    pub hook: Hook,
    /// Why a line with `sch_fq` cannot be used; `None` where it can.
    pub no_line: Option<String>,
    /// Why a TAP queue cannot be used; `None` where it can.
    pub no_tap: Option<String>,
    /// Whether packets can be chosen by the cgroup (v2) of their socket.
    pub cgroups: bool,
}

/// How packets are held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Departure times (EDT) that `sch_fq` keeps, on a veth pair beside the interface.
    Line,
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
            let line = Line::create(&mut netlink, LOOPBACK, false, Duration::ZERO)
                .and_then(|line| attach_line(&mut programs, &mut netlink, line, LOOPBACK, false, hook));
            let no_line = line.err().map(|e| format!("{:#}", e.root_cause()));
            let tap = [true, false].into_iter().try_for_each(|whole| {
                let device = Device::create(whole)?;
                attach_tap(&mut programs, &mut netlink, &device, hook)?;
                device.up()
            });
            let no_tap = tap.err().map(|e| format!("{e:#}"));
            programs.detach();
            if hook == Hook::Tcx
                && let Err(error) = Netns::scratch().and_then(|netns| programs.keep_warm(netns))
            {
                tracing::debug!("faults begin some milliseconds later than they could: {error:#}");
            }
            programs.give_back();
            Ok(Self { hook, no_line, no_tap, cgroups: socket_cgroups() })
        })
    }

    /// How packets can be held back on an interface. The error says what is missing.
    pub fn holder(&self, interface: &Interface) -> Result<Holder> {
        let name = &interface.name;
        if interface.link_header != Some(14) {
            bail!("packets on {name} cannot be delayed: that needs an interface with Ethernet headers");
        }
        match (&self.no_line, &self.no_tap) {
            (None, _) => Ok(Holder::Line),
            (Some(_), None) => Ok(Holder::Tap),
            (Some(line), Some(tap)) => {
                bail!("packets on {name} cannot be delayed: no sch_fq ({line}), and no TAP queue ({tap})")
            }
        }
    }

    /// Refuses where packets on an interface cannot be changed or answered.
    pub fn worker(&self, interface: &Interface) -> Result<()> {
        let name = &interface.name;
        match (&self.no_tap, interface.link_header) {
            (Some(reason), _) => bail!("packets on {name} cannot be changed: no TAP queue ({reason})"),
            (None, Some(14)) => Ok(()),
            (None, _) => {
                bail!("packets on {name} cannot be changed: that needs an interface with Ethernet headers")
            }
        }
    }
}

fn attach_tap(programs: &mut Programs, netlink: &mut Netlink, device: &Device, hook: Hook) -> Result<()> {
    if hook == Hook::Clsact {
        netlink.add_clsact(device.index())?;
    }
    crash::step("port.tap.program")?;
    programs.attach(Program::TapOut, device.name(), hook)?;
    programs.attach(Program::TapIn, device.name(), hook)
}

fn attach_line(
    programs: &mut Programs,
    netlink: &mut Netlink,
    line: Line,
    interface: u32,
    outside: bool,
    hook: Hook,
) -> Result<()> {
    for (name, end) in line::names(interface, outside).iter().zip(line.ends) {
        if hook == Hook::Clsact {
            netlink.add_clsact(end)?;
        }
        crash::step("port.line.program")?;
        programs.attach(Program::LineOut, name, hook)?;
        programs.attach(Program::LineIn, name, hook)?;
    }
    Ok(())
}

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
        let held = Duration::from_nanos(delay + self.action.backlog + self.action.slot_max);
        held + self.dns.as_ref().map_or(Duration::ZERO, |dns| dns.delay)
    }

    fn passes(&self, way: Direction) -> bool {
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
    /// What the port's line had lost before.
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

    /// What the rule did so far. Of a line that several rules share, each has what all lost there.
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

/// What a rule did, in packets where nothing else is said. One GSO packet is one packet.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Matched.
    pub matched: u64,
    /// Segments of those.
    pub segments: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Dropped.
    pub dropped: u64,
    /// Marked instead of dropped (ECN).
    pub marked: u64,
    /// Held back.
    pub delayed: u64,
    /// Sent twice.
    pub duplicated: u64,
    /// With a bit flipped.
    pub corrupted: u64,
    /// Sent ahead of others.
    pub reordered: u64,
    /// Refused with an answer.
    pub refused: u64,
    /// Upon which a connection was reset.
    pub reset: u64,
    /// DNS queries answered.
    pub answered: u64,
    /// That were to be hurt otherwise and got lost for want of memory, or of a CPU to take them.
    pub failed: u64,
    /// From the beginning of the fault to the first packet that matched.
    pub first_match: Option<Duration>,
    delays: Vec<(u64, u64)>,
}

/// Delays of about the same length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DelayBucket {
    /// They are shorter than this, in nanoseconds.
    pub up_to_ns: u64,
    /// Packets.
    pub count: u64,
    /// Sum of their delays in nanoseconds.
    pub sum_ns: u64,
}

impl Figures {
    /// Both together: packets and bytes add up, delays are one distribution.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        self.matched += other.matched;
        self.segments += other.segments;
        self.bytes += other.bytes;
        self.dropped += other.dropped;
        self.marked += other.marked;
        self.delayed += other.delayed;
        self.duplicated += other.duplicated;
        self.corrupted += other.corrupted;
        self.reordered += other.reordered;
        self.refused += other.refused;
        self.reset += other.reset;
        self.answered += other.answered;
        self.failed += other.failed;
        self.first_match = [self.first_match, other.first_match].into_iter().flatten().min();
        self.delays.resize(BUCKETS, (0, 0));
        for (mine, theirs) in self.delays.iter_mut().zip(&other.delays) {
            mine.0 += theirs.0;
            mine.1 += theirs.1;
        }
        self
    }

    /// The delays that were added, as measured.
    #[must_use]
    pub fn delays(&self) -> Vec<DelayBucket> {
        let all = self.delays.iter().enumerate().filter(|(_, (count, _))| *count > 0);
        all.map(|(i, &(count, sum_ns))| DelayBucket { up_to_ns: bound(i), count, sum_ns }).collect()
    }

    /// A quantile of the delay that was added, as measured, in seconds; `None` where no packet was delayed.
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
    outside: bool,
    programs: Programs,
    desk: Arc<Desk>,
    attached: [bool; 2],
    line: Option<Line>,
    taps: [Option<Tap>; LANES],
    made_clsact: bool,
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
        table.guard.store(u64::from(random() as u32 | 1));
        table.link_header.store(u64::from(link_header));
        table.ifindex.store(u64::from(interface.index));
        table.outside.store(u64::from(outside));
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
            made_clsact: false,
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
        self.prepare(&spec)?;
        crash::step("port.write")?;
        let cells = &self.desk.table.rules[rule];
        cells.counters().into_iter().for_each(|counter| counter.store(0));
        cells.memory.clear();
        cells.lateness.clear();
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

    /// Packets that got lost in its line, as far as the kernel says.
    fn lost(&self) -> u64 {
        let Some(line) = self.line else { return 0 };
        self.netns.run(|| line.lost(&mut Netlink::open()?)).unwrap_or_else(|error| {
            tracing::debug!("what the line of {} lost: {error:#}", self.interface.name);
            0
        })
    }

    fn change(&mut self, rule: usize, spec: Spec) -> Result<()> {
        self.prepare(&spec)?;
        self.attach(&spec)?;
        let clauses = &spec.clauses;
        let old: Vec<usize> = self.slots_of(rule);
        let same = old.iter().filter_map(|&slot| self.clauses[slot].as_ref().map(|(_, c)| c)).eq(clauses);
        if !same {
            let after = old.last().map_or(0, |last| last + 1);
            if self.free() >= clauses.len() {
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
        self.rules[rule] = false;
        self.write_endpoints(rule, BTreeMap::new())
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
        for (endpoint, id) in &all {
            if self.listening.get(endpoint) != Some(id) {
                self.programs.set_endpoint(*endpoint, Some(*id))?;
            }
        }
        for endpoint in self.listening.keys().filter(|endpoint| !all.contains_key(endpoint)) {
            self.programs.set_endpoint(*endpoint, None)?;
        }
        self.listening = all;
        Ok(())
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
        for (cidr, set) in &peers {
            if self.trie.get(cidr) != Some(set) {
                self.programs.set_peers(cidr, *set)?;
            }
        }
        for cidr in self.trie.keys().filter(|cidr| !peers.contains_key(cidr)) {
            self.programs.remove_peers(cidr)?;
        }
        self.write_sieve(&sieve, Cell::store);
        self.trie = peers;
        for (id, set) in &cgroups {
            if self.cgroups.get(id) != Some(set) {
                self.programs.set_cgroup(*id, *set)?;
            }
        }
        for id in self.cgroups.keys().filter(|id| !cgroups.contains_key(id)) {
            self.programs.remove_cgroup(*id)?;
        }
        self.cgroups = cgroups;
        let asks = clauses().any(|(_, clause)| clause.ingress && clause.cgroups.is_some());
        self.programs.table().owners.store(u64::from(asks));
        Ok(())
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
                    self.made_clsact = true;
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
        self.programs.table().lane[index].store(u64::from(tap.index()));
        self.taps[index] = Some(tap);
        Ok(())
    }

    /// Takes everything back.
    fn close(self) -> Result<()> {
        let (netns, name) = (Arc::clone(&self.netns), self.interface.name.clone());
        // All of it inside: a filter that is dropped elsewhere would take another's with it.
        netns
            .run(move || {
                let mut port = self;
                for rule in 0..RULES {
                    port.remove(rule)?;
                }
                let Self {
                    interface,
                    outside,
                    mut programs,
                    attached,
                    line,
                    taps,
                    made_clsact,
                    made_localnet,
                    longest,
                    support,
                    ..
                } = port;
                crash::step("port.close")?;
                let mut netlink = Netlink::open()?;
                // The queues send off what they hold, which takes the programs.
                drop(taps);
                if let Some(line) = line {
                    crash::step("port.close.drain")?;
                    drain(&mut netlink, line, longest.min(LONGEST_DRAIN))?;
                }
                crash::point("port.close.programs");
                programs.detach();
                if support.hook == Hook::Clsact && attached.contains(&true) {
                    crash::step("port.close.filters")?;
                    remove_filters(&interface.name)?;
                }
                if line.is_some() {
                    crash::step("port.close.line")?;
                    Line::remove(&mut netlink, interface.index, outside)?;
                }
                if made_clsact {
                    crash::step("port.close.clsact")?;
                    netlink.remove_empty_clsact(interface.index)?;
                }
                crash::step("port.close.localnet")?;
                localnet::set(made_localnet, false)?;
                crash::point("port.closed");
                programs.give_back();
                Ok(())
            })
            .with_context(|| format!("taking our programs off {name}"))
    }
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

/// Waits until a line is empty, or as long as it may hold a packet.
fn drain(netlink: &mut Netlink, line: Line, longest: Duration) -> Result<()> {
    let end = Instant::now() + longest;
    while Instant::now() < end && line.packets(netlink)? > 0 {
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Whether the loopback interface of the calling thread's network namespace takes packets of this host that come without
/// their route, as they do after a detour: `route_localnet` for addresses in 127.0.0.0/8 (`ip_route_input_slow`, Linux 6.1
/// net/ipv4/route.c), `accept_local` for all of the host's own (`fib_validate_source`, net/ipv4/fib_frontend.c). For this
/// interface alone they let nobody in: what comes from it comes from this host.
pub mod localnet {
    use std::fs;

    use anyhow::{Context, Result};
    use serde::{Deserialize, Serialize};

    use crate::crash;

    const FILES: [&str; 2] =
        ["/proc/sys/net/ipv4/conf/lo/route_localnet", "/proc/sys/net/ipv4/conf/lo/accept_local"];

    /// Which of the two settings were changed, and have to be taken back.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Changed([bool; 2]);

    impl Changed {
        /// Whether any was.
        #[must_use]
        pub fn any(self) -> bool {
            self.0.contains(&true)
        }

        /// Either's.
        #[must_use]
        pub fn or(self, other: Self) -> Self {
            Self([self.0[0] || other.0[0], self.0[1] || other.0[1]])
        }
    }

    /// Which settings would have to change.
    pub fn missing() -> Result<Changed> {
        let off = |file: &str| {
            let text = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
            anyhow::Ok(text.trim() == "0")
        };
        Ok(Changed([off(FILES[0])?, off(FILES[1])?]))
    }

    /// Switches settings on, or off again.
    pub fn set(which: Changed, on: bool) -> Result<()> {
        for (file, _) in FILES.iter().zip(which.0).filter(|(_, changed)| *changed) {
            crash::step("localnet.write")?;
            fs::write(file, if on { "1" } else { "0" }).with_context(|| format!("writing {file}"))?;
        }
        Ok(())
    }
}

/// A number that nobody can guess, from the seed that the standard library draws for its hash tables.
#[must_use]
pub fn random() -> u64 {
    RandomState::new().hash_one(0)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use etherparse::PacketBuilder;
    use proptest::{
        collection::vec,
        option,
        prelude::*,
        test_runner::{Config, TestRunner},
    };
    use squall_common::{
        decide::{self, COPY, Chance, LossModel, Memory, threshold},
        packet::{self, Address, Packet},
        rules::{Flags, Ports},
    };

    use super::*;

    const ALWAYS: Window = Window { not_before: BootTime(0), until: BootTime(u64::MAX) };
    /// A departure of a detour, and a loss at egress.
    const REDIRECT: i32 = 7;
    const SHOT: i32 = 2;
    const NEXT: i32 = -1;

    /// What a person means by a clause.
    fn means(clause: &Clause, packet: &Packet, way: Direction) -> bool {
        let host = match packet.peer.address() {
            Address::V4(a) => Cidr::new(IpAddr::from(a), 32),
            Address::V6(a) => Cidr::new(IpAddr::from(a), 128),
        };
        let host = host.expect("a host");
        let value = |dimension: Dimension| match dimension {
            Dimension::PeerPort => packet.ports().map(|(peer, _)| peer),
            Dimension::LocalPort => packet.ports().map(|(_, local)| local),
            Dimension::Vlan => Some(packet.vlan as u16),
            Dimension::Dscp => Some(packet.dscp as u16),
            Dimension::Icmp => packet.icmp_type.get().map(|t| t as u16),
            Dimension::Flags => packet.tcp_flags.get().map(|f| f as u16),
            Dimension::Fragment => Some(packet.fragment as u16),
        };
        (match way {
            Direction::Egress => clause.egress,
            Direction::Ingress => clause.ingress,
        }) && clause.protocol.is_none_or(|p| p as u64 == packet.kind)
            && (clause.cidrs.is_empty() || clause.cidrs.iter().any(|c| c.covers(&host)))
            && Dimension::ALL.into_iter().all(|d| {
                clause.values(d).is_none_or(|wanted| value(d).is_some_and(|value| wanted.contains(&value)))
            })
    }

    /// A rule, as plainly as it can be written down.
    struct Model {
        spec: Spec,
        window: Window,
        memory: Memory<Cell>,
        action: Action<Cell>,
        /// Matched, dropped, delayed.
        counts: [u64; 3],
    }

    impl Model {
        fn new(spec: &Spec, window: Window) -> Self {
            let action = Action::<Cell>::default();
            action.store(&spec.action);
            Self { spec: spec.clone(), window, memory: Memory::default(), action, counts: [0; 3] }
        }

        /// The verdict, if the packet is this rule's.
        fn judge(&mut self, packet: &Packet, way: Direction) -> Option<i32> {
            let clauses = &self.spec.clauses;
            let matching = clauses.iter().find(|clause| means(clause, packet, way))?;
            if matching.except || self.window.until.0 == 0 {
                return None;
            }
            let n = self.counts[0];
            self.counts[0] += 1;
            if !decide::touched(&self.action, n, || packet.flow()) {
                return Some(NEXT);
            }
            // Nobody is sent twice here: a copy would really leave.
            assert!(!decide::duplicated(&self.action, &self.memory, n) && n & COPY == 0);
            if decide::lost(&self.action, &self.memory, n) {
                self.counts[1] += 1;
                return Some(if way == Direction::Egress { REDIRECT } else { SHOT });
            }
            if self.spec.action.latency > 0 && !decide::ahead(&self.action, &self.memory, n) {
                self.counts[2] += 1;
                return Some(REDIRECT);
            }
            Some(NEXT)
        }
    }

    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let tcp = (0..16_u8).prop_map(|flags| (0_u8, flags));
        let udp = Just((1_u8, 0_u8));
        let icmp = prop_oneof![Just(0_u8), Just(8)].prop_map(|kind| (2_u8, kind));
        let what = prop_oneof![tcp, udp, icmp];
        let tag = option::weighted(0.3, 1..4_u16);
        (what, any::<bool>(), 0..3_u8, 0..3_u8, (1..12_u16, 1..12_u16), 0..4_u8, tag, any::<bool>()).prop_map(
            |((kind, detail), v6, a, b, (source, destination), dscp, tag, fragment)| {
                let v4 = |x: u8| [10, x, 0, x];
                let long = |x: u8| [0xfd, x, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, x];
                let ip = if v6 {
                    PacketBuilder::ipv6(long(a), long(b), 9)
                } else {
                    PacketBuilder::ipv4(v4(a), v4(b), 9)
                };
                let mut packet = Vec::new();
                match kind {
                    0 => {
                        let mut tcp = ip.tcp(source, destination, 1, 1);
                        if detail & 1 != 0 {
                            tcp = tcp.fin();
                        }
                        if detail & 2 != 0 {
                            tcp = tcp.syn();
                        }
                        if detail & 4 != 0 {
                            tcp = tcp.psh();
                        }
                        if detail & 8 != 0 {
                            tcp = tcp.ack(1);
                        }
                        tcp.write(&mut packet, b"data")
                    }
                    1 => ip.udp(source, destination).write(&mut packet, b"data"),
                    _ if v6 => ip.icmpv6_echo_request(1, 1).write(&mut packet, b"data"),
                    _ if detail == 0 => ip.icmpv4_echo_reply(1, 1).write(&mut packet, b"data"),
                    _ => ip.icmpv4_echo_request(1, 1).write(&mut packet, b"data"),
                }
                .expect("it fits");
                if v6 {
                    packet[0] |= dscp >> 2;
                    packet[1] |= dscp << 6;
                } else {
                    packet[1] = dscp << 2;
                    if fragment {
                        // The second of several.
                        packet[6..8].copy_from_slice(&0x2001_u16.to_be_bytes());
                    }
                }
                let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
                if let Some(tag) = tag {
                    frame.extend([0x81, 0]);
                    frame.extend(tag.to_be_bytes());
                }
                frame.extend(if v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
                frame.extend(packet);
                frame
            },
        )
    }

    prop_compose! {
        fn clauses()(
            except in proptest::bool::weighted(0.2), way in 0..3_u8,
            cidrs in vec((any::<bool>(), 0..3_u8, 0..=32_u8), 0..3), peer_ports in vec((1..12_u16, 0..4_u16), 0..2),
            local_ports in vec((1..12_u16, 0..4_u16), 0..2),
            protocol in option::weighted(0.3, prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Icmp)]),
            dscp in vec(0..4_u8, 0..2), vlans in vec(0..4_u16, 0..2), icmp_types in vec(prop_oneof![Just(0_u8), Just(8), Just(128)], 0..2),
            tcp_flags in option::weighted(0.15, (0..16_u8, 0..16_u8)), fragments in option::weighted(0.2, any::<bool>()),
        ) -> Clause {
            let ports = |all: Vec<(u16, u16)>| all.into_iter().map(|(first, more)| Ports { first, last: first + more }).collect();
            let cidr = |(v6, x, len): (bool, u8, u8)| if v6 {
                Cidr::new(IpAddr::from([0xfd, x, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, x]), len * 4)
            } else {
                Cidr::new(IpAddr::from([10, x, 0, x]), len)
            };
            Clause {
                except,
                egress: way != 1,
                ingress: way != 0,
                cidrs: cidrs.into_iter().filter_map(cidr).collect(),
                peer_ports: ports(peer_ports),
                local_ports: ports(local_ports),
                protocol,
                dscp,
                vlans,
                icmp_types,
                tcp_flags: tcp_flags.map(|(set, clear)| Flags { set, clear: clear & !set }),
                fragments,
                cgroups: None,
            }
        }
    }

    prop_compose! {
        fn actions()(
            seed in 1..1000_u64, share in prop_oneof![Just(1.0), 0.2..0.9_f64], flows in prop_oneof![Just(1.0), 0.2..0.9_f64],
            loss in 0..5_u8, ratio in 0.1..0.9_f64, correlation in prop_oneof![Just(0.0), 0.1..0.8_f64],
            latency in prop_oneof![Just(0_u64), Just(1_000_000)], reorder in prop_oneof![Just(0.0), 0.2..0.8_f64], gap in 1..4_u64,
        ) -> Action<u64> {
            let action = Action { share: threshold(share), flow_share: threshold(flows), latency, ..Action::new(seed) };
            let action = match loss {
                1 => action.with_loss(ratio, correlation),
                2 => action.with_gilbert_elliott(ratio / 2.0, ratio, 0.9, 0.1),
                3 => action.with_four_states(ratio / 2.0, ratio / 2.0, 0.2, ratio, 0.1),
                4 => Action { loss: 1 + seed % 5, loss_model: LossModel::Every as u64, ..action },
                _ => action,
            };
            if latency > 0 { Action { reorder: Chance::new(reorder, correlation), gap, ..action } } else { action }
        }
    }

    /// Random rules and random packets: what the program in the kernel does is what the model says, packet by packet, and so
    /// are its counters. Needs root.
    #[tokio::test(flavor = "multi_thread")]
    async fn privileged_the_kernel_does_what_the_rules_mean() {
        let port = Mutex::new(scratch().expect("root, and a kernel with eBPF"));
        let rules = vec((vec(clauses(), 1..5), actions(), proptest::bool::weighted(0.9)), 1..6);
        let traffic = vec((frames(), any::<bool>()), 20..60);
        let mut runner =
            TestRunner::new(Config { cases: 200, failure_persistence: None, ..Config::default() });
        let result = runner.run(&(rules, traffic), |(rules, traffic)| {
            let mut port = lock(&port);
            let netns = Arc::clone(&port.netns);
            let mut models = Vec::new();
            for (clauses, action, on) in rules {
                let mut clauses = clauses;
                clauses.sort_by_key(|clause| !clause.except);
                let spec = Spec { clauses, action, quantiles: None, dns: None, endpoints: BTreeMap::new() };
                let window = if on { ALWAYS } else { Window { until: BootTime(0), ..ALWAYS } };
                let rule = port.add(spec.clone(), window).expect("added");
                models.push((rule, Model::new(&spec, window)));
            }
            let table = Arc::clone(&port.desk.table);
            let programs = &mut port.programs;
            let verdicts = netns.run(|| {
                let run = |(frame, out): &(Vec<u8>, bool)| {
                    let way = if *out { Direction::Egress } else { Direction::Ingress };
                    Ok((way, frame.clone(), programs.run(Program::Port(way), frame, 1)?.0))
                };
                traffic.iter().map(run).collect::<Result<Vec<_>>>()
            });
            for (i, (way, frame, verdict)) in verdicts.expect("run").into_iter().enumerate() {
                let ethertype = u16::from_be_bytes([frame[12], frame[13]]);
                let packet = packet::parse(&frame[..], ethertype, 0, 14, way);
                let judged =
                    packet.and_then(|p| models.iter_mut().find_map(|(_, model)| model.judge(&p, way)));
                prop_assert_eq!(verdict, judged.unwrap_or(NEXT), "packet {} {:?} {:?}", i, way, packet);
            }
            for (rule, model) in &models {
                let cells = &table.rules[*rule];
                let counted = [&cells.matched, &cells.dropped, &cells.delayed].map(Cell::load);
                prop_assert_eq!(counted, model.counts);
            }
            for (rule, _) in models {
                port.remove(rule).expect("removed");
            }
            // Programs serve one interface after the other, so that nothing may stay in the sieve.
            let left = table.grains.load() != 0 || port.programs.sieve().iter().any(|word| word.load() != 0);
            prop_assert!(!left, "the sieve is not empty");
            Ok(())
        });
        result.unwrap_or_else(|failure| panic!("{failure}"));
        port.into_inner().unwrap_or_else(PoisonError::into_inner).close().expect("closed");
    }
}
