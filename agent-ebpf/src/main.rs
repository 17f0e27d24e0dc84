//! The tc programs that hurt packets. One set of them, with maps of its own, on each interface under fault.
//!
//! | program | where |
//! |---|---|
//! | `squall_egress`, `squall_ingress` | the interface, kernel 5.12 and later |
//! | `squall_egress_510`, `squall_ingress_510` | the interface, kernels whose atomics return no value |
//! | `squall_line_out`, `squall_line_in` | both ends of the veth pair between which `sch_fq` holds packets |
//! | `squall_tap_out`, `squall_tap_in` | the TAP devices whose queue in the agent holds, changes or answers packets |
//!
//! All of them return -1 for what is not theirs, which is `TCX_NEXT` under TCX and `TC_ACT_UNSPEC` in a classifier: the
//! next program or filter has its turn.

#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(unsafe_code, reason = "eBPF is helpers and raw pointers")]
#![expect(clippy::inline_always, reason = "a call costs registers and the verifier's patience")]
#![expect(clippy::needless_pass_by_value, reason = "aya's macros pass the context so")]
#![expect(missing_docs, unreachable_pub, reason = "the macros of aya export programs and maps by symbol")]

mod skb;

use aya_ebpf::{
    Global,
    bindings::{TC_ACT_SHOT, TC_ACT_STOLEN},
    helpers::{bpf_ktime_get_boot_ns, bpf_ktime_get_ns},
    macros::{classifier, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, lpm_trie::Key},
    programs::TcContext,
};
use squall_common::{
    decide::{self, COPY, LONGEST, Mode},
    histogram::{self, BUCKETS},
    line,
    matching::{self, Lookup},
    packet::{self, Address, Bytes, Maybe, Packet, Peer},
    sieve,
    table::{
        Bucket, CGROUPS, CIDRS, Dimension, Direction, ENDPOINTS, FLOWS, Flow, HISTOGRAM, Lane, QUANTILES,
        RULES, Rule, SETS, TABLES, Table, endpoint,
    },
    tap::{self, Job},
};

use crate::skb::{Note, Skb, redirect};

/// `BPF_F_MMAPABLE` of linux/bpf.h (kernel 5.5): the agent reads and writes the map as memory.
const MMAPABLE: u32 = 1 << 10;
/// `TCX_NEXT` and `TC_ACT_UNSPEC`.
const NEXT: i32 = -1;
/// What a queueing discipline without room answers (linux/netdevice.h); `sch_fq` knows no other refusal.
const NET_XMIT_DROP: i64 = 1;
/// Flags of a TCP header.
const SYN: u32 = 0x02;
const RST: u32 = 0x04;
const ACK: u32 = 0x10;

/// Not 0 where the kernel knows the cgroup (v2) of a socket. Elsewhere the verifier never sees the helpers.
#[unsafe(no_mangle)]
static SOCKET_CGROUPS: Global<u8> = Global::new(0);

#[map]
static TABLE: Array<Table> = Array::with_max_entries(1, MMAPABLE);
#[map]
static VALUE_SETS: Array<u64> = Array::with_max_entries(SETS as u32, MMAPABLE);
#[map]
static DELAYS: Array<Bucket> = Array::with_max_entries(HISTOGRAM as u32, MMAPABLE);
#[map]
static DISTRIBUTIONS: Array<[i16; QUANTILES]> = Array::with_max_entries(TABLES as u32, 0);
/// What is not in one of the two maps below, most often.
#[map]
static PEER_SIEVE: Array<u64> = Array::with_max_entries(sieve::WORDS as u32, MMAPABLE);
#[map]
static PEERS_V4: LpmTrie<[u8; 4], u64> = LpmTrie::with_max_entries(CIDRS, 0);
#[map]
static PEERS_V6: LpmTrie<[u8; 16], u64> = LpmTrie::with_max_entries(CIDRS, 0);
/// Clauses by the id of a cgroup (v2).
#[map]
static CGROUP_SETS: HashMap<u64, u64> = HashMap::with_max_entries(CGROUPS, 0);
/// What rules remember of flows.
#[map]
static FLOW_TABLE: LruHashMap<u64, Flow> = LruHashMap::with_max_entries(FLOWS, 0);

/// The cgroup (v2) of the socket that sends the packets of a flow, by [`owned`].
#[map]
static FLOW_OWNERS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(FLOWS, 0);

/// The cgroup (v2) that listens, by [`endpoint`].
#[map]
static PORT_OWNERS: HashMap<u32, u64> = HashMap::with_max_entries(ENDPOINTS, 0);

struct Maps<'a> {
    table: &'a Table,
    skb: &'a Skb<'a>,
    hook: Direction,
    packet: &'a Packet,
    /// Not a segment that comes back from our TAP device, whose socket it has.
    whole: bool,
}

/// A flow of this port: entries of the interface that the programs served before are nobody's.
#[inline(always)]
fn owned(table: &Table, packet: &Packet) -> u64 {
    packet.flow() ^ table.guard.load()
}

/// The clauses that name a cgroup.
#[inline(always)]
fn cgroup_set(id: u64) -> u64 {
    // SAFETY: the value is a number, copied at once.
    unsafe { CGROUP_SETS.get(id) }.copied().unwrap_or(0)
}

/// Notes whose flow a packet belongs to that leaves, where a rule will ask when packets of it arrive, or segments of it leave.
#[inline(always)]
fn note_owner(table: &Table, skb: &Skb<'_>, link_header: usize) {
    if table.owners.load() == 0 || SOCKET_CGROUPS.load() == 0 {
        return;
    }
    let id = skb.cgroup_id();
    let named = cgroup_set(id) != 0;
    if let Some(packet) = packet::parse(skb, skb.ethertype(), skb.vlan(), link_header, Direction::Egress) {
        let flow = owned(table, &packet);
        if named {
            // Where there is no memory the flow is nobody's.
            let _full = FLOW_OWNERS.insert(flow, id, 0);
        // SAFETY: nothing is read.
        } else if unsafe { FLOW_OWNERS.get(flow) }.is_some() {
            // Somebody else uses the same ports now.
            let _gone = FLOW_OWNERS.remove(flow);
        }
    }
}

impl Lookup for Maps<'_> {
    #[inline(always)]
    fn may_be_peer(&self, peer: &Peer) -> bool {
        let word = |word: usize| PEER_SIEVE.get(word as u32).copied().unwrap_or(0);
        sieve::passes(self.table.grains.load(), peer, word)
    }

    #[inline(always)]
    fn peer(&self, peer: Peer) -> u64 {
        match peer.address() {
            Address::V4(a) => PEERS_V4.get(Key::new(32, a)).copied(),
            Address::V6(a) => PEERS_V6.get(Key::new(128, a)).copied(),
        }
        .unwrap_or(0)
    }

    #[inline(always)]
    fn value(&self, dimension: Dimension, value: u16) -> u64 {
        VALUE_SETS.get(dimension.base() as u32 + u32::from(value)).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn cgroup(&self) -> u64 {
        if SOCKET_CGROUPS.load() == 0 {
            return 0;
        }
        if matches!(self.hook, Direction::Egress) && self.whole {
            return cgroup_set(self.skb.cgroup_id());
        }
        // SAFETY: the value is a number, copied at once; an entry that is reused meanwhile names another cgroup.
        if let Some(id) = unsafe { FLOW_OWNERS.get(owned(self.table, self.packet)) } {
            return cgroup_set(*id);
        }
        match self.hook {
            // Its packet was there a moment ago.
            Direction::Egress => 0,
            Direction::Ingress => {
                // An arriving packet has no socket yet. It is whoever's the flow is that left here, or who listens.
                let port = self.packet.port_pair.get().unwrap_or(0) & 0xffff;
                // SAFETY: as above.
                match unsafe { PORT_OWNERS.get(endpoint(self.packet.kind, port)) } {
                    Some(id) => cgroup_set(*id),
                    None => 0,
                }
            }
        }
    }
}

/// Nothing: what any program costs, to be taken off what ours cost.
#[classifier]
pub fn squall_empty(_ctx: TcContext) -> i32 {
    NEXT
}

/// Packets that leave.
#[classifier]
#[inline(always)]
pub fn squall_egress(ctx: TcContext) -> i32 {
    port::<true>(&ctx, Direction::Egress)
}

/// Packets that arrive.
#[classifier]
#[inline(always)]
pub fn squall_ingress(ctx: TcContext) -> i32 {
    port::<true>(&ctx, Direction::Ingress)
}

/// Packets that leave, before 5.12.
#[classifier]
#[inline(always)]
pub fn squall_egress_510(ctx: TcContext) -> i32 {
    port::<false>(&ctx, Direction::Egress)
}

/// Packets that arrive, before 5.12.
#[classifier]
#[inline(always)]
pub fn squall_ingress_510(ctx: TcContext) -> i32 {
    port::<false>(&ctx, Direction::Ingress)
}

#[inline(always)]
fn port<const FETCH: bool>(ctx: &TcContext, hook: Direction) -> i32 {
    let Some(table) = TABLE.get(0) else { return NEXT };
    let skb = Skb::new(ctx);
    let mut whole = true;
    if let Some(note) = skb.note(table) {
        skb.clear_note();
        if note.job() != Note::SEGMENT {
            // It was here before, and has done its time.
            return NEXT;
        }
        whole = false;
    }
    let way = if table.outside.load() == 0 { hook } else { hook.other() };
    let link_header = table.link_header.load() as usize & 0xff;
    if matches!(hook, Direction::Egress) && whole {
        note_owner(table, &skb, link_header);
    }
    let live = matching::live(table, way);
    if live == 0 {
        return NEXT;
    }
    let Some(head) = packet::head(&skb, skb.ethertype(), skb.vlan(), link_header, way) else { return NEXT };
    let set = matching::by_network(
        table,
        live,
        &head.packet,
        &Maps { table, skb: &skb, hook, packet: &head.packet, whole },
    );
    if set == 0 {
        return NEXT;
    }
    let Some(packet) = head.complete(&skb, way) else { return NEXT };
    let set =
        matching::by_transport(table, set, &packet, &Maps { table, skb: &skb, hook, packet: &packet, whole });
    if set == 0 || skb.is_anothers(table) {
        return NEXT;
    }
    // Of the packet these numbers are all that follows needs. The verifier, which went a hundred ways to get here, knows none of
    // them, and so goes on once.
    let mut set = skb.forget(set);
    let flow = skb.forget(packet.flow());
    let whole = skb.forget(u64::from(whole)) != 0;
    // SAFETY: the helper takes no argument and cannot fail.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // A rule that has not begun or is over, or makes an exception of this packet, must not shadow those behind it.
    let mut index = RULES;
    for _ in 0..RULES {
        if set == 0 {
            break;
        }
        let clause = set.trailing_zeros() as usize & 63;
        let candidate = table.rule_of[clause].load() as usize & (RULES - 1);
        if table.except.load() & (1 << clause) == 0 && table.rules[candidate].acts_at(skb.forget(now)) {
            index = candidate;
            break;
        }
        set &= !table.clauses_of[candidate].load();
    }
    if index >= RULES {
        return NEXT;
    }
    // Behind the loop, so that the verifier looks at what follows once.
    let rule = &table.rules[index];
    // Another one, so that the first need not be in memory.
    let skb = Skb::new(ctx);
    Place { ctx, skb: &skb, hook, table, index, rule, boot: now, flow }.act::<FETCH>(packet.tcp_flags, whole)
}

/// A packet that a rule is about.
struct Place<'a> {
    ctx: &'a TcContext,
    skb: &'a Skb<'a>,
    /// Which way the packet passes the interface.
    hook: Direction,
    table: &'a Table,
    index: usize,
    rule: &'a Rule,
    /// `CLOCK_BOOTTIME` in nanoseconds.
    boot: u64,
    /// What all packets of its flow share.
    flow: u64,
}

impl Place<'_> {
    #[inline(always)]
    fn act<const FETCH: bool>(&self, tcp_flags: Maybe, whole: bool) -> i32 {
        let Self { ctx, skb, hook, rule, index, .. } = *self;
        let action = &rule.action;
        let segments = skb.segments();
        if whole && segments > 1 && action.per_segment.load() != 0 {
            return match self.open(Lane::Segment) {
                Some(lane) => self.detour(lane, Job::Send as u64, 0, 0),
                None => NEXT,
            };
        }
        let n = if FETCH {
            rule.matched.fetch_add(1)
        } else {
            // Two packets at the same moment may get the same number.
            rule.matched.add(1);
            rule.matched.load().wrapping_sub(1)
        };
        rule.segments.add(u64::from(segments));
        rule.bytes.add(skb.wire_len(hook));
        if rule.first_match.load() == 0 {
            rule.first_match.store(self.boot);
            aya_log_ebpf::info!(ctx, "interface {}: rule {} has its first packet", skb.ifindex(), index);
        }
        if !decide::touched(action, n, || self.flow) {
            return NEXT;
        }
        let mode = action.mode.load();
        if mode != Mode::Hurt as u64 {
            return self.answer(tcp_flags, mode);
        }
        let twice = decide::duplicated(action, &rule.memory, n);
        let mut lost = decide::lost(action, &rule.memory, n);
        if lost && action.ecn.load() != 0 && skb.mark_congestion() {
            rule.marked.add(1);
            lost = false;
        }
        if twice {
            rule.duplicated.add(1);
        }
        if lost {
            rule.dropped.add(1);
            if !twice {
                return lose(self.table, hook);
            }
        }
        // As netem does: of two copies of which one is lost, one remains; otherwise the second has a fate of its own.
        if twice && !lost {
            if decide::lost(action, &rule.memory, n | COPY) {
                rule.dropped.add(1);
            } else {
                self.send_copy(n | COPY);
            }
        }
        self.send(n)
    }

    /// Refuses, resets, cuts, or lets the agent look into DNS.
    #[inline(always)]
    fn answer(&self, tcp_flags: Maybe, mode: u64) -> i32 {
        let job = if mode == Mode::Refuse as u64 {
            Job::Refuse
        } else if mode == Mode::Dns as u64 {
            Job::Dns
        } else {
            // What ends a connection is nobody's to end.
            let Some(flags) = tcp_flags.get() else { return NEXT };
            if flags & RST != 0 {
                return NEXT;
            }
            if mode == Mode::Cut as u64 {
                let passed = self.remember(|flow| {
                    // Another connection over the same ports begins anew.
                    if flags & (SYN | ACK) == SYN {
                        flow.bytes = 0;
                    }
                    flow.bytes += self.skb.wire_len(self.hook);
                    flow.bytes
                });
                if passed <= self.rule.action.cut_after.load() {
                    return NEXT;
                }
            }
            Job::Reset
        };
        match self.open(Lane::Work) {
            Some(lane) => {
                let now = monotonic();
                self.detour(lane, job as u64, now, now)
            }
            None => NEXT,
        }
    }

    /// When the packet may go, and how: `None` where it waits for too much already.
    #[inline(always)]
    fn fate(&self, n: u64, now: u64) -> Option<Fate> {
        let (action, memory) = (&self.rule.action, &self.rule.memory);
        let corrupt = decide::corrupted(action, memory, n);
        let ahead = decide::ahead(action, memory, n);
        let delay = if ahead {
            0
        } else {
            decide::delay(action, memory, n, |table, at| match DISTRIBUTIONS.get(table as u32) {
                Some(quantiles) => quantiles[(at >> 20) as usize & (QUANTILES - 1)],
                None => 0,
            })
        };
        let len = self.skb.wire_len(self.hook);
        let latest = now + LONGEST;
        let wait = decide::wait(action, memory, now, len, LONGEST.saturating_sub(delay))?;
        let by = delay + wait;
        let mut due = now;
        if by != 0 {
            // TCP's own pacing (bbr) is a departure time too: add to it. Nobody paces a packet further ahead than we hold
            // one; such a time stamp is of another clock.
            let from = match self.hook {
                Direction::Egress => match self.skb.departure() {
                    paced if paced > now && paced < latest => paced,
                    _ => now,
                },
                Direction::Ingress => now,
            };
            due = from + by;
        }
        if due > latest {
            return None;
        }
        if action.keep_order.load() != 0 {
            due = self.remember(|flow| {
                if flow.last > due && flow.last <= latest {
                    due = flow.last;
                }
                flow.last = due;
                due
            });
        }
        due = decide::slot(action, memory, n, due, len, latest)?;
        if ahead {
            self.rule.reordered.add(1);
        }
        if due > now {
            due = self.rule.lateness.sooner(due, now);
        }
        Some(Fate { corrupt, due })
    }

    /// Sends the packet on its way.
    #[inline(always)]
    fn send(&self, n: u64) -> i32 {
        let now = monotonic();
        let Some(fate) = self.fate(n, now) else {
            self.rule.dropped.add(1);
            return lose(self.table, self.hook);
        };
        if fate.corrupt {
            return match self.open(Lane::Work) {
                Some(lane) => {
                    if fate.due > now {
                        self.rule.delayed.add(1);
                    }
                    self.detour(lane, self.corruption(), fate.due, now)
                }
                None => NEXT,
            };
        }
        if fate.due <= now {
            return NEXT;
        }
        let Some(lane) = self.open(Lane::Hold) else { return NEXT };
        if self.table.line.load() == 0 {
            self.rule.delayed.add(1);
            return self.detour(lane, Job::Send as u64, fate.due, now);
        }
        // The packet belongs to its socket until it leaves the queue, and TCP allows only a few there (TCP Small Queues);
        // over a veth pair that is so where it arrives, too. A clone has no owner: delay one, and lose the original
        // without a word.
        self.note(self.order(), fate.due, now);
        match self.skb.clone_redirect(lane, false) {
            0 => self.rule.delayed.add(1),
            // The line is full.
            NET_XMIT_DROP => self.rule.failed.add(1),
            // It is gone (EINVAL) or down (NET_XMIT_CN of `noop_enqueue`), or there was no memory: the clone was never on its way. The
            // fault must not become a cut-off because of that.
            _ => {
                self.rule.failed.add(1);
                self.skb.clear_note();
                return NEXT;
            }
        }
        lose(self.table, self.hook)
    }

    /// Sends a second copy of the packet.
    #[inline(always)]
    fn send_copy(&self, n: u64) {
        let now = monotonic();
        let Some(fate) = self.fate(n, now) else {
            self.rule.dropped.add(1);
            return;
        };
        let late = fate.due > now;
        let detour = if fate.corrupt {
            self.open(Lane::Work)
        } else if late {
            self.open(Lane::Hold)
        } else {
            None
        };
        let error = if let Some(lane) = detour {
            self.note(if fate.corrupt { self.corruption() } else { self.order() }, fate.due, now);
            self.skb.clone_redirect(lane, false)
        } else {
            self.note(0, 0, 0);
            self.skb.clone_redirect(self.skb.ifindex(), matches!(self.hook, Direction::Ingress))
        };
        self.skb.clear_note();
        if error != 0 {
            self.rule.failed.add(1);
        } else if late && detour.is_some() {
            self.rule.delayed.add(1);
        }
    }

    /// What is to be done with a packet that is only delayed.
    #[inline(always)]
    fn order(&self) -> u64 {
        // Where packets may overtake, each is a flow of its own in sch_fq.
        let action = &self.rule.action;
        let overtakes =
            action.keep_order.load() == 0 && (action.jitter.load() | action.reorder.ratio.load()) != 0;
        if self.table.line.load() != 0 && overtakes { Note::SHUFFLE } else { Job::Send as u64 }
    }

    #[inline(always)]
    fn corruption(&self) -> u64 {
        if self.rule.action.silent.load() == 0 { Job::Corrupt as u64 } else { Job::CorruptSilently as u64 }
    }

    /// The device of a lane, where there is one that lets packets out again.
    #[inline(always)]
    fn open(&self, lane: Lane) -> Option<u32> {
        let index = lane.index(self.hook);
        let device = self.table.lane[index].load();
        (device != 0 && self.boot < self.table.open_until[index].load()).then_some(device as u32)
    }

    #[inline(always)]
    fn note(&self, job: u64, due: u64, arrived: u64) {
        self.skb.set_note(self.table, Note::new(self.index, job, due, arrived));
    }

    /// The verdict that sends the packet itself to a lane.
    #[inline(always)]
    fn detour(&self, lane: u32, job: u64, due: u64, arrived: u64) -> i32 {
        self.note(job, due, arrived);
        redirect(lane, false)
    }

    /// Looks at what the rule remembers of the packet's flow, and changes it.
    #[inline(always)]
    fn remember(&self, f: impl FnOnce(&mut Flow) -> u64) -> u64 {
        let key = decide::hash(self.flow, self.index as u64, self.rule.not_before.load());
        if let Some(flow) = FLOW_TABLE.get_ptr_mut(key) {
            // SAFETY: the value stays valid while the program runs. Two packets of a flow at the same moment may overwrite
            // each other's change, which costs one packet's bytes.
            return f(unsafe { &mut *flow });
        }
        let mut flow = Flow::default();
        let result = f(&mut flow);
        // Where there is no memory the flow is new again next time.
        let _full = FLOW_TABLE.insert(key, flow, 0);
        result
    }
}

/// What becomes of one copy of a packet.
struct Fate {
    corrupt: bool,
    /// `CLOCK_MONOTONIC` in nanoseconds; not later than now where it leaves at once.
    due: u64,
}

#[inline(always)]
fn monotonic() -> u64 {
    // SAFETY: the helper takes no argument and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// Loses a packet as a network would.
///
/// At egress `TC_ACT_SHOT` would tell the local sender (`NET_XMIT_DROP`), and TCP would take it for congestion of its own
/// host. `TC_ACT_STOLEN` of a classifier frees the packet and reports success; TCX does not know it. There it is a redirect to an
/// interface that does not exist (`sch_handle_egress` and `skb_do_redirect`, Linux 5.10 net/core/dev.c and filter.c to 6.18).
#[inline(always)]
fn lose(table: &Table, hook: Direction) -> i32 {
    match hook {
        Direction::Egress if table.classifier.load() != 0 => TC_ACT_STOLEN,
        Direction::Egress => redirect(0, false),
        Direction::Ingress => TC_ACT_SHOT,
    }
}

/// Packets into the line: they learn when to leave it. Nobody else may send here.
#[classifier]
pub fn squall_line_out(ctx: TcContext) -> i32 {
    let Some(table) = TABLE.get(0) else { return TC_ACT_SHOT };
    let skb = Skb::new(&ctx);
    let Some(note) = skb.note(table) else { return TC_ACT_SHOT };
    if note.job() == Note::SHUFFLE {
        // A flow of its own in sch_fq, so that it may overtake; and no other CPU has to be woken to take it.
        skb.set_random_hash();
        skb.set_queue(line::ANY_CPU);
    } else {
        skb.set_queue(line::CPU_OF_FLOW);
    }
    // sch_fq sends what has the priority of control packets at once (`fq_classify`). The veth pair would clear it anyway.
    skb.clear_priority();
    skb.set_departure(note.due());
    NEXT
}

/// Packets out of the line: measured, and back to where they were taken, past our own program.
#[classifier]
pub fn squall_line_in(ctx: TcContext) -> i32 {
    let Some(table) = TABLE.get(0) else { return TC_ACT_SHOT };
    let skb = Skb::new(&ctx);
    let (note, now) = (skb.behind(), monotonic());
    let delay = Note::since(note.arrived(), now);
    if let Some(bucket) = DELAYS.get((note.rule() * BUCKETS + histogram::bucket(delay)) as u32) {
        bucket.count.add(1);
        bucket.sum.add(delay);
    }
    table.rules[note.rule()].lateness.note(note.late(now));
    skb.set_note(table, Note::new(0, 0, 0, 0));
    skb.set_ours();
    skb.forget_queue();
    // A packet that went in at one end comes out of the other.
    let came_out = u64::from(skb.ifindex());
    let to = table.ifindex.load() as u32;
    if came_out == table.lane[Lane::Hold.index(Direction::Ingress)].load() {
        redirect(to, false)
    } else if came_out == table.lane[Lane::Hold.index(Direction::Egress)].load() {
        redirect(to, true)
    } else {
        TC_ACT_SHOT
    }
}

/// Packets into a queue: the header that tells it what to do. Nobody else may send here.
#[classifier]
pub fn squall_tap_out(ctx: TcContext) -> i32 {
    let Some(table) = TABLE.get(0) else { return TC_ACT_SHOT };
    let skb = Skb::new(&ctx);
    let Some(note) = skb.note(table) else { return TC_ACT_SHOT };
    let rule = note.rule();
    let header =
        tap::Header { rule: rule as u16, job: note.job() as u8, arrived: note.arrived(), due: note.due() };
    if skb.push(&header.to_bytes()) {
        return NEXT;
    }
    table.rules[rule & (RULES - 1)].failed.add(1);
    TC_ACT_SHOT
}

/// Packets out of a queue: back to where they were taken, past our own program or as segments to be decided on.
#[classifier]
pub fn squall_tap_in(ctx: TcContext) -> i32 {
    let Some(table) = TABLE.get(0) else { return TC_ACT_SHOT };
    let skb = Skb::new(&ctx);
    let from = u64::from(skb.ifindex());
    let to = table.ifindex.load() as u32;
    let lane = |lane: Lane, hook: Direction| table.lane[lane.index(hook)].load() == from;
    let segment = lane(Lane::Segment, Direction::Egress) || lane(Lane::Segment, Direction::Ingress);
    skb.set_note(table, Note::new(0, if segment { Note::SEGMENT } else { 0 }, 0, 0));
    skb.set_ours();
    skb.forget_queue();
    let egress = |l: Lane| lane(l, Direction::Egress);
    let ingress = |l: Lane| lane(l, Direction::Ingress);
    if egress(Lane::Hold) || egress(Lane::Work) || egress(Lane::Segment) {
        redirect(to, false)
    } else if ingress(Lane::Hold) || ingress(Lane::Work) || ingress(Lane::Segment) {
        redirect(to, true)
    } else {
        TC_ACT_SHOT
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// None of the helpers used here is kept for programs under the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";
