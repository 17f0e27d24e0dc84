//! The maps of one port, that is, of the programs on one interface. The agent maps them into its memory; all fields
//! are cells that one side writes while the other reads.

use core::sync::atomic::AtomicU64;

use crate::{decide::Action, histogram::BUCKETS};

/// A number that the kernel and the agent both read and write: in a program plain loads and stores, which on eBPF's
/// machines are whole; in the agent a relaxed atomic.
#[repr(transparent)]
#[derive(Debug)]
pub struct Cell(AtomicU64);

impl Cell {
    /// A cell with this value.
    #[must_use]
    pub const fn new(value: u64) -> Self {
        Self(AtomicU64::new(value))
    }

    /// The value now.
    #[inline(always)]
    #[must_use]
    pub fn load(&self) -> u64 {
        // LLVM's backend for eBPF has no atomic load below machine version 4, not even a relaxed one.
        #[cfg(target_arch = "bpf")]
        // SAFETY: the pointer is valid and aligned, it comes from a reference.
        unsafe {
            self.0.as_ptr().read_volatile()
        }
        #[cfg(not(target_arch = "bpf"))]
        self.0.load(core::sync::atomic::Ordering::Relaxed)
    }

    /// Replaces the value.
    #[inline(always)]
    pub fn store(&self, value: u64) {
        #[cfg(target_arch = "bpf")]
        // SAFETY: the pointer is valid and aligned, it comes from a reference.
        unsafe {
            self.0.as_ptr().write_volatile(value);
        }
        #[cfg(not(target_arch = "bpf"))]
        self.0.store(value, core::sync::atomic::Ordering::Relaxed);
    }

    /// Where it is, for the program's own atomic additions.
    #[inline(always)]
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u64 {
        self.0.as_ptr()
    }

    /// Adds.
    #[cfg(any(test, feature = "user"))]
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, core::sync::atomic::Ordering::Relaxed);
    }

    /// Sets bits.
    #[cfg(any(test, feature = "user"))]
    pub fn set(&self, bits: u64) {
        self.0.fetch_or(bits, core::sync::atomic::Ordering::SeqCst);
    }

    /// Clears bits.
    #[cfg(any(test, feature = "user"))]
    pub fn clear(&self, bits: u64) {
        self.0.fetch_and(!bits, core::sync::atomic::Ordering::SeqCst);
    }
}

/// Clauses of one port: the bits of a set. A rule (one injection) has one clause for each of its peers.
pub const CLAUSES: usize = 64;
/// Rules of one port.
pub const RULES: usize = 64;
/// Entries of the port map: 65536 peer ports, then 65536 local ports.
pub const PORTS: usize = 2 * 65536;
/// Where the local ports begin in the port map.
pub const LOCAL_PORTS: usize = 65536;
/// Longest lists of CIDRs, all rules of a port together.
pub const CIDRS: u32 = 65536;

/// Which way a packet goes, seen from the target. The values index [`Table::live`] and [`Table::tap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Direction {
    /// Leaving the target: the peer is the destination.
    Egress = 0,
    /// Arriving at the target: the peer is the source.
    Ingress = 1,
}

/// Everything but addresses and ports, in one map value: the verifier takes a loop over map lookups for an infinite one.
#[repr(C)]
#[derive(Debug)]
pub struct Table {
    /// Clauses that are in force, by [`Direction`].
    pub live: [Cell; 2],
    /// Clauses that any address of a peer satisfies.
    pub any_peer: Cell,
    /// Clauses that any port of a peer satisfies, no port at all included.
    pub any_peer_port: Cell,
    /// Clauses that any local port satisfies, no port at all included.
    pub any_local_port: Cell,
    /// Clauses by [`crate::packet::Protocol`].
    pub protocol: [Cell; 4],
    /// The rule each clause belongs to.
    pub rule_of: [Cell; CLAUSES],
    /// A number of this port's own (32 bits, never 0) in a packet's control block: "seen already, let it go".
    pub guard: Cell,
    /// Length of the link layer's header: 14 for Ethernet, 0 for interfaces without one.
    pub link_header: Cell,
    /// The interface's index.
    pub ifindex: Cell,
    /// Not 0 where `sch_fq` on the interface keeps departure times (EDT).
    pub edt: Cell,
    /// Index of the TAP device that holds delayed packets, by [`Direction`]; 0 where there is none.
    pub tap: [Cell; 2],
    /// The rules.
    pub rules: [Rule; RULES],
}

/// One rule: when it acts and what it does, then what it did.
#[repr(C)]
#[derive(Debug)]
pub struct Rule {
    /// `CLOCK_BOOTTIME` in nanoseconds at which it begins.
    pub not_before: Cell,
    /// `CLOCK_BOOTTIME` in nanoseconds at which it ends by itself.
    pub until: Cell,
    /// Share of the packets that are touched: see [`crate::decide::threshold`].
    pub share: Cell,
    /// Share of those that are dropped.
    pub loss: Cell,
    /// Delay in nanoseconds.
    pub latency: Cell,
    /// Largest deviation from it in nanoseconds, uniform.
    pub jitter: Cell,
    /// Seed of its decisions.
    pub seed: Cell,
    /// Packets that matched while it was in force, as the kernel's tc layer counts: one GSO packet is one packet. Also
    /// the sequence number that a decision is drawn for.
    pub matched: Cell,
    /// Bytes of the packets that matched.
    pub bytes: Cell,
    /// Packets dropped.
    pub dropped: Cell,
    /// Packets handed to the queue that delays them.
    pub delayed: Cell,
    /// Packets that should have been delayed and could not be (no memory, no queue): dropped, not counted in `dropped`.
    pub failed: Cell,
    /// `CLOCK_BOOTTIME` of the first match; 0 before it.
    pub first_match: Cell,
}

/// Delays that fell into one bucket. The sum gives back the exact mean.
#[repr(C)]
#[derive(Debug)]
pub struct Bucket {
    /// Packets.
    pub count: Cell,
    /// Sum of their delays in nanoseconds.
    pub sum: Cell,
}

/// Entries of the histogram map: [`BUCKETS`] for each rule.
pub const HISTOGRAM: usize = RULES * BUCKETS;

impl Rule {
    /// What the rule does, read field by field.
    #[inline(always)]
    #[must_use]
    pub fn action(&self) -> Action {
        Action {
            share: self.share.load(),
            loss: self.loss.load(),
            latency: self.latency.load(),
            jitter: self.jitter.load(),
            seed: self.seed.load(),
        }
    }

    /// Whether the rule acts at this time.
    #[inline(always)]
    #[must_use]
    pub fn acts_at(&self, now: u64) -> bool {
        now >= self.not_before.load() && now < self.until.load()
    }
}
