//! The tc programs that hurt packets. One set of them, with maps of its own, on each interface under fault.
//!
//! | program | where |
//! |---|---|
//! | `squall_egress`, `squall_ingress` | the interface, kernel 5.12 and later |
//! | `squall_egress_510`, `squall_ingress_510` | the interface, kernels whose atomics return no value |
//! | `squall_tap_out`, `squall_tap_in` | the TAP devices whose queue in the agent delays packets |
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

mod atomic;
mod skb;

use aya_ebpf::{
    bindings::TC_ACT_SHOT,
    helpers::{bpf_get_smp_processor_id, bpf_ktime_get_boot_ns, bpf_ktime_get_ns},
    macros::{classifier, map},
    maps::{Array, LpmTrie, PerCpuArray, lpm_trie::Key},
    programs::TcContext,
};
use squall_common::{
    decide::{self, Fate},
    histogram::{self, BUCKETS},
    matching::{self, Lookup},
    packet::{self, Address},
    table::{Bucket, CIDRS, Direction, HISTOGRAM, LOCAL_PORTS, PORTS, RULES, Rule, Table},
    tap,
};

use crate::skb::{Note, Skb, redirect};

/// `BPF_F_MMAPABLE` of linux/bpf.h (kernel 5.5): the agent reads and writes the map as memory.
const MMAPABLE: u32 = 1 << 10;
/// `TCX_NEXT` and `TC_ACT_UNSPEC`.
const NEXT: i32 = -1;
/// Nobody paces a packet further ahead than this; such a time stamp is of another clock.
const FARTHEST: u64 = 60_000_000_000;
/// A rule's index travels above the departure time, which is a time since boot and fits below for nine years.
const RULE_SHIFT: u32 = 58;

#[map]
static TABLE: Array<Table> = Array::with_max_entries(1, MMAPABLE);
#[map]
static PORT_SETS: Array<u64> = Array::with_max_entries(PORTS as u32, MMAPABLE);
#[map]
static DELAYS: Array<Bucket> = Array::with_max_entries(HISTOGRAM as u32, MMAPABLE);
#[map]
static PEERS_V4: LpmTrie<[u8; 4], u64> = LpmTrie::with_max_entries(CIDRS, 0);
#[map]
static PEERS_V6: LpmTrie<[u8; 16], u64> = LpmTrie::with_max_entries(CIDRS, 0);
/// Sequence numbers where an atomic cannot give them: one count for each CPU and rule.
#[map]
static SEQUENCE: PerCpuArray<u64> = PerCpuArray::with_max_entries(RULES as u32, 0);

struct Maps;

impl Lookup for Maps {
    #[inline(always)]
    fn peer(&self, address: Address) -> u64 {
        match address {
            Address::V4(a) => PEERS_V4.get(Key::new(32, a)).copied(),
            Address::V6(a) => PEERS_V6.get(Key::new(128, a)).copied(),
        }
        .unwrap_or(0)
    }

    #[inline(always)]
    fn peer_port(&self, port: u16) -> u64 {
        PORT_SETS.get(u32::from(port)).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn local_port(&self, port: u16) -> u64 {
        PORT_SETS.get(LOCAL_PORTS as u32 + u32::from(port)).copied().unwrap_or(0)
    }
}

/// Packets that leave.
#[classifier]
pub fn squall_egress(ctx: TcContext) -> i32 {
    port::<true>(&ctx, Direction::Egress)
}

/// Packets that arrive.
#[classifier]
pub fn squall_ingress(ctx: TcContext) -> i32 {
    port::<true>(&ctx, Direction::Ingress)
}

/// Packets that leave, before 5.12.
#[classifier]
pub fn squall_egress_510(ctx: TcContext) -> i32 {
    port::<false>(&ctx, Direction::Egress)
}

/// Packets that arrive, before 5.12.
#[classifier]
pub fn squall_ingress_510(ctx: TcContext) -> i32 {
    port::<false>(&ctx, Direction::Ingress)
}

#[inline(always)]
fn port<const FETCH: bool>(ctx: &TcContext, way: Direction) -> i32 {
    let Some(table) = TABLE.get(0) else { return NEXT };
    let skb = Skb::new(ctx);
    if let Some(note) = skb.note(table) {
        return second_pass(&skb, note, way);
    }
    let live = matching::live(table, way);
    if live == 0 {
        return NEXT;
    }
    let link_header = table.link_header.load() as usize & 0xff;
    let Some(packet) = packet::parse(&skb, skb.ethertype(), link_header, way) else { return NEXT };
    let mut set = matching::candidates(table, live, &packet, &Maps);
    if set == 0 {
        return NEXT;
    }
    // SAFETY: the helper takes no argument and cannot fail.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // A rule that has not begun or is over must not shadow those behind it.
    for _ in 0..RULES {
        if set == 0 {
            break;
        }
        let clause = set.trailing_zeros() as usize & (RULES - 1);
        let index = table.rule_of[clause].load() as usize & (RULES - 1);
        let rule = &table.rules[index];
        if rule.acts_at(now) {
            return act::<FETCH>(ctx, &skb, way, table, index, rule, now);
        }
        set &= set - 1;
    }
    NEXT
}

#[inline(always)]
fn act<const FETCH: bool>(
    ctx: &TcContext,
    skb: &Skb<'_>,
    way: Direction,
    table: &Table,
    index: usize,
    rule: &Rule,
    now: u64,
) -> i32 {
    let n = if FETCH {
        atomic::fetch_add(&rule.matched, 1)
    } else {
        atomic::add(&rule.matched, 1);
        sequence(index)
    };
    atomic::add(&rule.bytes, u64::from(skb.len()));
    if rule.first_match.load() == 0 {
        rule.first_match.store(now);
        aya_log_ebpf::info!(ctx, "interface {}: rule {} has its first packet", skb.ifindex(), index);
    }
    match decide::fate(&rule.action(), n) {
        Fate::Pass => NEXT,
        Fate::Drop => {
            atomic::add(&rule.dropped, 1);
            lose(way)
        }
        Fate::Delay(by) => delay(skb, way, table, index, rule, by),
    }
}

/// A sequence number without a fetching atomic: its own for each CPU.
#[inline(always)]
fn sequence(index: usize) -> u64 {
    // SAFETY: the helper takes no argument and cannot fail.
    let cpu = u64::from(unsafe { bpf_get_smp_processor_id() });
    let Some(count) = SEQUENCE.get_ptr_mut(index as u32) else { return 0 };
    // SAFETY: the value is this CPU's own, and a tc program is not preempted by another on the same CPU.
    let count = unsafe { &mut *count };
    *count += 1;
    let count = *count;
    (cpu << 48) | count
}

/// Loses a packet as a network would.
///
/// At egress `TC_ACT_SHOT` would tell the local sender (`NET_XMIT_DROP`), and TCP would take it for congestion of its own
/// host. A redirect to an interface that does not exist frees the packet and reports success, under TCX and in a
/// classifier alike (`sch_handle_egress` and `skb_do_redirect`, Linux 5.10 net/core/dev.c and filter.c to 6.18).
#[inline(always)]
fn lose(way: Direction) -> i32 {
    match way {
        Direction::Egress => redirect(0, false),
        Direction::Ingress => TC_ACT_SHOT,
    }
}

/// Hands a packet to whatever holds packets here.
#[inline(always)]
fn delay(skb: &Skb<'_>, way: Direction, table: &Table, index: usize, rule: &Rule, by: u64) -> i32 {
    // SAFETY: the helper takes no argument and cannot fail.
    let now = unsafe { bpf_ktime_get_ns() };
    // TCP's own pacing (bbr) is a departure time too: add to it.
    let from = match way {
        Direction::Egress => match skb.departure() {
            paced if paced > now && paced < now + FARTHEST => paced,
            _ => now,
        },
        Direction::Ingress => now,
    };
    let due = from + by;
    let tap = match way {
        Direction::Egress => table.tap[0].load(),
        Direction::Ingress => table.tap[1].load(),
    };
    if tap != 0 {
        atomic::add(&rule.delayed, 1);
        skb.set_note(table, Note { due: due | (index as u64) << RULE_SHIFT, more: from });
        return redirect(tap as u32, false);
    }
    if way == Direction::Ingress || table.edt.load() == 0 {
        return NEXT;
    }
    // The packet belongs to its socket until it leaves the queue, and TCP allows only a few there (TCP Small Queues).
    // A clone has no owner: send one through this program again, and lose the original without a word.
    let shuffle = u64::from(rule.jitter.load() != 0);
    skb.set_note(table, Note { due, more: shuffle });
    if skb.clone_redirect(skb.ifindex()) {
        atomic::add(&rule.delayed, 1);
        if let Some(bucket) = DELAYS.get((index * BUCKETS + histogram::bucket(by)) as u32) {
            atomic::add(&bucket.count, 1);
            atomic::add(&bucket.sum, by);
        }
    } else {
        atomic::add(&rule.failed, 1);
    }
    lose(way)
}

/// The packet was here before: on its way out it learns when to leave, otherwise it comes back from the queue.
#[inline(always)]
fn second_pass(skb: &Skb<'_>, note: Note, way: Direction) -> i32 {
    skb.clear_note();
    if way == Direction::Egress && note.due != 0 {
        if note.more != 0 {
            // A flow of its own in sch_fq, so that it may overtake.
            skb.set_random_hash();
        }
        skb.set_departure(note.due);
    }
    NEXT
}

/// Packets into the queue: the header that tells it what to do. Nobody else may send here.
#[classifier]
pub fn squall_tap_out(ctx: TcContext) -> i32 {
    let Some(table) = TABLE.get(0) else { return TC_ACT_SHOT };
    let skb = Skb::new(&ctx);
    let Some(note) = skb.note(table) else { return TC_ACT_SHOT };
    let rule = (note.due >> RULE_SHIFT) as usize & (RULES - 1);
    let header =
        tap::Header { rule: rule as u16, arrived: note.more, due: note.due & ((1 << RULE_SHIFT) - 1) };
    if skb.push(&header.to_bytes()) {
        return NEXT;
    }
    atomic::add(&table.rules[rule].failed, 1);
    TC_ACT_SHOT
}

/// Packets out of the queue: back to where they were taken, past our own program.
#[classifier]
pub fn squall_tap_in(ctx: TcContext) -> i32 {
    let Some(table) = TABLE.get(0) else { return TC_ACT_SHOT };
    let skb = Skb::new(&ctx);
    let from = u64::from(skb.ifindex());
    let to = table.ifindex.load() as u32;
    skb.set_note(table, Note { due: 0, more: 0 });
    if from == table.tap[0].load() {
        redirect(to, false)
    } else if from == table.tap[1].load() {
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
