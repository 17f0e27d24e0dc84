//! A packet in the kernel, behind a safe face.

use core::{
    mem::MaybeUninit,
    ptr::{addr_of, addr_of_mut},
};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS},
    helpers::{
        bpf_clone_redirect, bpf_get_prandom_u32, bpf_redirect, bpf_set_hash, bpf_set_hash_invalid,
        bpf_skb_cgroup_id, bpf_skb_change_head, bpf_skb_change_type, bpf_skb_ecn_set_ce, bpf_skb_load_bytes,
        bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use squall_common::{
    packet::{Bytes, VLAN_ID},
    table::{Direction, GUARDS, RULES, Table},
    tap,
};

/// A packet, valid while the program runs.
pub(crate) struct Skb<'a> {
    ptr: *mut __sk_buff,
    /// A number of which the verifier knows nothing.
    unknown: u64,
    _ctx: &'a TcContext,
}

/// What our programs write on a packet for the next of them to read: `skb->cb`, which is the qdisc layer's own and
/// travels with clones and redirects. Two numbers: when the packet leaves, and when it came; above each, what else is known.
#[derive(Clone, Copy)]
pub(crate) struct Note {
    first: u64,
    second: u64,
}

/// Departure times are times since boot and fit below for nine years.
const DUE_BITS: u32 = 58;
const ARRIVED_BITS: u32 = tap::ARRIVED_BITS;
/// Where the rule ends that is above it, and the lower bits of the departure time begin.
const PUNCTUAL_BIT: u32 = ARRIVED_BITS + RULES.ilog2();
/// The units of those are 64 ns, and they tell whether a packet is late or early by up to 134 ms.
const PUNCTUAL_UNIT: u32 = 6;

impl Note {
    /// A job beside [`tap::Job`]'s: delay, and let it overtake others.
    pub(crate) const SHUFFLE: u64 = 62;
    /// A job beside [`tap::Job`]'s: this is a segment of a packet that was to be decided on segment by segment.
    pub(crate) const SEGMENT: u64 = 63;

    /// `due` and `arrived` are `CLOCK_MONOTONIC` in nanoseconds.
    #[inline(always)]
    pub(crate) fn new(rule: usize, job: u64, due: u64, arrived: u64) -> Self {
        Self {
            first: due | job << DUE_BITS,
            second: (arrived & ((1 << ARRIVED_BITS) - 1))
                | (rule as u64 & (RULES as u64 - 1)) << ARRIVED_BITS
                | (due >> PUNCTUAL_UNIT) << PUNCTUAL_BIT,
        }
    }

    #[inline(always)]
    pub(crate) fn job(self) -> u64 {
        self.first >> DUE_BITS
    }

    #[inline(always)]
    pub(crate) fn due(self) -> u64 {
        self.first & ((1 << DUE_BITS) - 1)
    }

    #[inline(always)]
    pub(crate) fn rule(self) -> usize {
        (self.second >> ARRIVED_BITS) as usize & (RULES - 1)
    }

    /// Nanoseconds by which a packet leaves later than it was to, by what [`Skb::behind`] gives back; 0 where it is not late.
    #[inline(always)]
    pub(crate) fn late(self, now: u64) -> u64 {
        let late = (now >> PUNCTUAL_UNIT).wrapping_sub(self.second >> PUNCTUAL_BIT) << PUNCTUAL_BIT;
        // The upper half of the numbers is those below zero.
        if late >> 63 == 0 { late >> PUNCTUAL_BIT << PUNCTUAL_UNIT } else { 0 }
    }

    /// The lower bits of the arrival time; [`Note::since`] understands them.
    #[inline(always)]
    pub(crate) fn arrived(self) -> u64 {
        self.second & ((1 << ARRIVED_BITS) - 1)
    }

    /// Nanoseconds from an arrival time to now.
    #[inline(always)]
    pub(crate) fn since(arrived: u64, now: u64) -> u64 {
        now.wrapping_sub(arrived) & ((1 << ARRIVED_BITS) - 1)
    }
}

macro_rules! field {
    ($skb:expr, $($field:tt)+) => {
        // SAFETY: the context is valid, and the verifier checks which fields may be read.
        unsafe { addr_of!((*$skb.ptr).$($field)+).read_volatile() }
    };
}

macro_rules! set_field {
    ($skb:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: the context is valid, and the verifier checks which fields may be written.
        unsafe { addr_of_mut!((*$skb.ptr).$($field)+).write_volatile($value) }
    };
}

impl<'a> Skb<'a> {
    #[inline(always)]
    pub(crate) fn new(ctx: &'a TcContext) -> Self {
        let mut skb = Self { ptr: ctx.skb.skb, unknown: 0, _ctx: ctx };
        skb.unknown = u64::from(field!(skb, len));
        skb
    }

    /// Length of the packet on the wire in bytes. Where it leaves, the headers of each segment count (`qdisc_skb_cb`'s
    /// `pkt_len`); where it arrives, the kernel does not say.
    #[inline(always)]
    pub(crate) fn wire_len(&self, hook: Direction) -> u64 {
        u64::from(match hook {
            Direction::Egress => field!(self, wire_len),
            Direction::Ingress => field!(self, len),
        })
    }

    /// Segments that will be made of the packet, at least 1.
    #[inline(always)]
    pub(crate) fn segments(&self) -> u32 {
        match field!(self, gso_segs) {
            0 => 1,
            n => n,
        }
    }

    /// Id of the VLAN tag that the kernel keeps beside the packet; 0 where there is none.
    #[inline(always)]
    pub(crate) fn vlan(&self) -> u16 {
        if field!(self, vlan_present) == 0 { 0 } else { field!(self, vlan_tci) as u16 & VLAN_ID }
    }

    /// Id of the cgroup (v2) of the socket that sends the packet; 0 where no socket of this host does.
    #[inline(always)]
    pub(crate) fn cgroup_id(&self) -> u64 {
        // SAFETY: the context is valid.
        unsafe { bpf_skb_cgroup_id(self.ptr) }
    }
    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        field!(self, ifindex)
    }

    /// `skb->protocol` in host order.
    #[inline(always)]
    pub(crate) fn ethertype(&self) -> u16 {
        u16::from_be(field!(self, protocol) as u16)
    }

    /// Earliest departure time, as TCP's pacing set it.
    #[inline(always)]
    pub(crate) fn departure(&self) -> u64 {
        field!(self, tstamp)
    }

    /// Makes the packet one of no priority (`SO_PRIORITY`).
    #[inline(always)]
    pub(crate) fn clear_priority(&self) {
        set_field!(self, 0, priority);
    }

    #[inline(always)]
    pub(crate) fn set_departure(&self, at: u64) {
        set_field!(self, at, tstamp);
    }

    /// The note of this port on the packet, if there is one.
    #[inline(always)]
    pub(crate) fn note(&self, table: &Table) -> Option<Note> {
        let guard = table.guard.load() as u32;
        if field!(self, cb[0]) != guard {
            return None;
        }
        let first = u64::from(field!(self, cb[1])) | u64::from(field!(self, cb[2])) << 32;
        Some(Note { first, second: self.second() })
    }

    /// Whether it comes out of another port of this interface. The program of that one is behind ours, or the note would be gone by
    /// now: so the packet was here before.
    #[inline(always)]
    pub(crate) fn is_anothers(&self, table: &Table) -> bool {
        let mark = field!(self, cb[0]);
        mark & !0xffff == GUARDS && mark != table.guard.load() as u32
    }

    #[inline(always)]
    fn second(&self) -> u64 {
        u64::from(field!(self, cb[3])) | u64::from(field!(self, cb[4])) << 32
    }

    /// The note of a packet behind `sch_fq`, which has overwritten the first half of it with its own (struct fq_skb_cb,
    /// net/sched/sch_fq.c, 6.1): neither job nor departure time.
    #[inline(always)]
    pub(crate) fn behind(&self) -> Note {
        Note { first: 0, second: self.second() }
    }

    #[inline(always)]
    pub(crate) fn set_note(&self, table: &Table, note: Note) {
        set_field!(self, table.guard.load() as u32, cb[0]);
        set_field!(self, note.first as u32, cb[1]);
        set_field!(self, (note.first >> 32) as u32, cb[2]);
        set_field!(self, note.second as u32, cb[3]);
        set_field!(self, (note.second >> 32) as u32, cb[4]);
    }

    #[inline(always)]
    pub(crate) fn clear_note(&self) {
        set_field!(self, 0, cb[0]);
    }

    /// Makes the packet one for this host. On our devices it was somebody else's, and the loopback interface, which takes what
    /// leaves it for what arrives, would keep it so (`eth_type_trans`, Linux 6.1 net/ethernet/eth.c).
    #[inline(always)]
    pub(crate) fn set_ours(&self) {
        const PACKET_HOST: u32 = 0;
        // SAFETY: the context is valid; the helper only compares and stores a number.
        let _same_type = unsafe { bpf_skb_change_type(self.ptr, PACKET_HOST) };
    }

    /// Chooses the queue of a device of ours, for sending and for what becomes of it behind (`skb_tx_hash`, net/core/dev.c, 6.1).
    #[inline(always)]
    pub(crate) fn set_queue(&self, queue: u32) {
        set_field!(self, queue + 1, queue_mapping);
    }

    /// Forgets by which queue the packet came, and gives it the hash of its flow again: neither says anything about where it goes
    /// next, which on a device of many queues it would.
    #[inline(always)]
    pub(crate) fn forget_queue(&self) {
        set_field!(self, 0, queue_mapping);
        // SAFETY: the context is valid; the helper cannot fail.
        unsafe { bpf_set_hash_invalid(self.ptr) };
    }

    /// Makes the packet a flow of its own.
    #[inline(always)]
    pub(crate) fn set_random_hash(&self) {
        // SAFETY: the helper takes no argument and cannot fail.
        let hash = unsafe { bpf_get_prandom_u32() };
        // SAFETY: the context is valid; the helper cannot fail.
        unsafe { bpf_set_hash(self.ptr, hash) };
    }

    /// Sends a clone out of an interface, or lets it arrive there. 0, or why not: a negative error, or what the interface's queue
    /// answered (`NET_XMIT_*`).
    #[inline(always)]
    pub(crate) fn clone_redirect(&self, ifindex: u32, ingress: bool) -> i64 {
        let flags = if ingress { u64::from(BPF_F_INGRESS) } else { 0 };
        // SAFETY: the context is valid.
        unsafe { bpf_clone_redirect(self.ptr, ifindex, flags) }
    }

    /// Tells the receiver of congestion, where both ends of the connection understand that (ECN).
    #[inline(always)]
    pub(crate) fn mark_congestion(&self) -> bool {
        // SAFETY: the context is valid.
        (unsafe { bpf_skb_ecn_set_ce(self.ptr) }) == 1
    }

    /// A copy of what is at an offset: a number, or an array of numbers.
    #[inline(always)]
    fn load<T: Copy>(&self, offset: usize) -> Option<T> {
        let mut copy = MaybeUninit::<T>::uninit();
        // SAFETY: the helper writes all of it, or fails.
        let failed = unsafe {
            bpf_skb_load_bytes(
                self.ptr.cast(),
                offset as u32,
                copy.as_mut_ptr().cast(),
                size_of::<T>() as u32,
            )
        };
        if failed != 0 {
            return None;
        }
        // SAFETY: the helper succeeded, so all of it is written, and any bytes are a number.
        Some(unsafe { copy.assume_init() })
    }

    /// Puts bytes in front of the packet.
    #[inline(always)]
    pub(crate) fn push(&self, bytes: &[u8; tap::LEN]) -> bool {
        // SAFETY: the context is valid.
        if unsafe { bpf_skb_change_head(self.ptr, tap::LEN as u32, 0) } != 0 {
            return false;
        }
        // SAFETY: the context is valid, and so are as many bytes as the array has.
        (unsafe { bpf_skb_store_bytes(self.ptr.cast(), 0, bytes.as_ptr().cast(), tap::LEN as u32, 0) }) == 0
    }
}

/// The verdict that sends the packet of this program out of (or into) an interface.
#[inline(always)]
pub(crate) fn redirect(ifindex: u32, ingress: bool) -> i32 {
    let flags = if ingress { u64::from(BPF_F_INGRESS) } else { 0 };
    // SAFETY: the helper only notes the index down; an interface that is not there is found out later.
    (unsafe { bpf_redirect(ifindex, flags) }) as i32
}

/// Four bytes of a packet at once, at an offset behind a place. LLVM reads what may not be aligned byte by byte; the kernel lets programs read
/// words where the machine does (`check_pkt_ptr_alignment`, kernel/bpf/verifier.c, 5.10).
macro_rules! word {
    ($place:expr, $offset:literal) => {{
        let word: u64;
        // SAFETY: the bytes are within the packet's linear part, as the verifier sees for itself. Pure, so that the compiler leaves out what
        // nobody asks for.
        unsafe {
            core::arch::asm!(
                concat!("{w} = *(u32 *)({p} + ", $offset, ")"),
                w = out(reg) word,
                p = in(reg) $place,
                options(pure, readonly, nostack)
            );
        }
        u32::from_be(word as u32)
    }};
}

impl Bytes for Skb<'_> {
    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        const { assert!(N <= 5) };
        let start = field!(self, data) as usize + offset;
        if start + N * 4 <= field!(self, data_end) as usize {
            return Some(core::array::from_fn(|n| match n {
                0 => word!(start, 0),
                1 => word!(start, 4),
                2 => word!(start, 8),
                3 => word!(start, 12),
                _ => word!(start, 16),
            }));
        }
        self.load::<[u32; N]>(offset).map(|words| words.map(u32::from_be))
    }

    #[inline(always)]
    fn byte(&self, offset: usize) -> Option<u8> {
        self.load(offset)
    }

    #[inline(always)]
    fn forget(&self, number: u64) -> u64 {
        let mut number = number;
        // Pure, so that the compiler leaves it out where nobody asks for the number: most packets are let go before.
        // SAFETY: two exclusive-ors with the same number change nothing, and no memory is touched.
        unsafe {
            core::arch::asm!("{n} ^= {u}", "{n} ^= {u}", n = inout(reg) number, u = in(reg) self.unknown, options(pure, nomem, nostack));
        }
        number
    }
}
