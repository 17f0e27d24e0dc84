//! The maps of one port, that is, of the programs on one interface. The agent maps them into its memory; all fields
//! are cells that one side writes while the other reads.

use core::sync::atomic::AtomicU64;

use crate::histogram::BUCKETS;

/// The upper 16 bits of every port's guard, of whichever agent.
pub const GUARDS: u32 = 0x5ca1_0000;

/// A number that the kernel and the agent both read and write: in a program plain loads and stores, which on eBPF's
/// machines are whole; in the agent a relaxed atomic.
#[repr(transparent)]
#[derive(Debug, Default)]
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

    /// Adds. On any kernel: this atomic does not say what was there before.
    #[inline(always)]
    pub fn add(&self, by: u64) {
        // Rust's target for eBPF has no atomic additions (`atomic-cas` is false in its description), the machine has.
        #[cfg(target_arch = "bpf")]
        // SAFETY: the pointer comes from a reference to an aligned u64 that everyone changes atomically.
        unsafe {
            core::arch::asm!("lock *(u64 *)({p} + 0) += {v}", p = in(reg) self.0.as_ptr(), v = in(reg) by);
        }
        #[cfg(not(target_arch = "bpf"))]
        self.0.fetch_add(by, core::sync::atomic::Ordering::Relaxed);
    }

    /// Adds and gives the value before. In a program: Linux 5.12 and later (kernel/bpf/verifier.c, `BPF_FETCH`).
    #[inline(always)]
    pub fn fetch_add(&self, by: u64) -> u64 {
        #[cfg(target_arch = "bpf")]
        {
            let mut value = by;
            // SAFETY: the pointer comes from a reference to an aligned u64 that everyone changes atomically.
            unsafe {
                core::arch::asm!(
                    "{v} = atomic_fetch_add((u64 *)({p} + 0), {v})",
                    p = in(reg) self.0.as_ptr(),
                    v = inout(reg) value,
                );
            }
            value
        }
        #[cfg(not(target_arch = "bpf"))]
        self.0.fetch_add(by, core::sync::atomic::Ordering::Relaxed)
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

/// Clauses of one port: the bits of a set. A rule (one injection) has one clause for each of its peers and exceptions.
pub const CLAUSES: usize = 64;
/// Rules of one port.
pub const RULES: usize = 64;
/// Longest lists of CIDRs, all rules of a port together.
pub const CIDRS: u32 = 65536;
/// Most cgroups that rules of a port name, those below the named ones included.
pub const CGROUPS: u32 = 4096;
/// Flows that are remembered, all rules of a port together; the least recently seen is forgotten first.
pub const FLOWS: u32 = 65536;

/// Ports on which cgroups that rules name listen.
pub const ENDPOINTS: u32 = 4096;

/// A port of this host under a [`crate::packet::Protocol`], as one number.
#[inline(always)]
#[must_use]
pub const fn endpoint(kind: u64, port: u32) -> u32 {
    (kind as u32) << 16 | port
}

/// What a clause can ask for by a small number. The map of sets has one set of clauses for each value of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Dimension {
    /// Port of the peer.
    PeerPort = 0,
    /// Port of the target.
    LocalPort = 1,
    /// VLAN id; 0 is untagged.
    Vlan = 2,
    /// Code point of the traffic class.
    Dscp = 3,
    /// ICMP type.
    Icmp = 4,
    /// TCP flags.
    Flags = 5,
    /// 1 is a fragment.
    Fragment = 6,
}

impl Dimension {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::PeerPort, Self::LocalPort, Self::Vlan, Self::Dscp, Self::Icmp, Self::Flags, Self::Fragment];

    /// Where its sets begin in the map.
    #[inline(always)]
    #[must_use]
    pub const fn base(self) -> usize {
        match self {
            Self::PeerPort => 0,
            Self::LocalPort => 0x1_0000,
            Self::Vlan => 0x2_0000,
            Self::Dscp => 0x2_1000,
            Self::Icmp => 0x2_1100,
            Self::Flags => 0x2_1200,
            Self::Fragment => 0x2_1300,
        }
    }
}

/// Entries of the map of sets.
pub const SETS: usize = 0x2_1400;

/// Which way a packet goes, seen from the target. The values index [`Table::live`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Direction {
    /// Leaving the target: the peer is the destination.
    Egress = 0,
    /// Arriving at the target: the peer is the source.
    Ingress = 1,
}

impl Direction {
    /// The opposite.
    #[inline(always)]
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Egress => Self::Ingress,
            Self::Ingress => Self::Egress,
        }
    }
}

/// A detour that packets take, one for each direction of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Lane {
    /// Where packets wait: an end of a veth pair with `sch_fq`, or a TAP device. GSO packets stay whole.
    Hold = 0,
    /// A TAP device whose queue changes packets or answers them. The kernel segments and sums what goes there.
    Work = 2,
    /// As `Work`, but the segments come back to be decided on one by one.
    Segment = 4,
}

/// Lanes, both directions.
pub const LANES: usize = 6;

impl Lane {
    /// Its index in [`Table::lane`] for packets of one direction of the interface.
    #[inline(always)]
    #[must_use]
    pub const fn index(self, hook: Direction) -> usize {
        self as usize + hook as usize
    }
}

/// Everything but addresses and numbers, in one map value: the verifier takes a loop over map lookups for an infinite one.
#[repr(C)]
#[derive(Debug)]
pub struct Table {
    /// Clauses that are in force, by [`Direction`].
    pub live: [Cell; 2],
    /// Clauses that any address of a peer satisfies.
    pub any_peer: Cell,
    /// Grains of the sieve of peers that are in use: see [`crate::sieve`].
    pub grains: Cell,
    /// Clauses that any value satisfies, none at all included, by [`Dimension`].
    pub any: [Cell; 7],
    /// Clauses that packets of any socket satisfy.
    pub any_cgroup: Cell,
    /// Not 0 where the program has to note whose flows leave, because a clause asks when packets arrive.
    pub owners: Cell,
    /// Clauses that ask for nothing but addresses, ports and protocol.
    pub plain: Cell,
    /// Clauses by [`crate::packet::Protocol`].
    pub protocol: [Cell; 4],
    /// Clauses that take a packet out of their rule.
    pub except: Cell,
    /// The rule each clause belongs to.
    pub rule_of: [Cell; CLAUSES],
    /// The clauses of each rule.
    pub clauses_of: [Cell; RULES],
    /// A number of this port's own (32 bits, made of [`GUARDS`]) in a packet's control block: "seen already, let it go".
    pub guard: Cell,
    /// Length of the link layer's header: 14 for Ethernet, 0 for interfaces without one.
    pub link_header: Cell,
    /// The interface's index.
    pub ifindex: Cell,
    /// Not 0 where the interface is the far end of the target's: what leaves it arrives at the target.
    pub outside: Cell,
    /// Index of the device of each lane; 0 where there is none. See [`Lane::index`].
    pub lane: [Cell; LANES],
    /// `CLOCK_BOOTTIME` in nanoseconds until which a lane may be used; its queue in the agent keeps moving it. `u64::MAX`
    /// for a lane that needs no agent.
    pub open_until: [Cell; LANES],
    /// Not 0 where [`Lane::Hold`] is a veth pair with `sch_fq`.
    pub line: Cell,
    /// Not 0 where the programs are classifiers, and not attached by TCX.
    pub classifier: Cell,
    /// The rules.
    pub rules: [Rule; RULES],
}

#[cfg(any(test, feature = "user"))]
impl Default for Table {
    /// A table without a rule.
    fn default() -> Self {
        use core::array::from_fn;
        Self {
            live: Default::default(),
            any_peer: Cell::default(),
            grains: Cell::default(),
            any: Default::default(),
            any_cgroup: Cell::default(),
            owners: Cell::default(),
            plain: Cell::default(),
            protocol: Default::default(),
            except: Cell::default(),
            rule_of: from_fn(|_| Cell::default()),
            clauses_of: from_fn(|_| Cell::default()),
            guard: Cell::default(),
            link_header: Cell::default(),
            ifindex: Cell::default(),
            outside: Cell::default(),
            lane: Default::default(),
            open_until: Default::default(),
            line: Cell::default(),
            classifier: Cell::default(),
            rules: from_fn(|_| Rule::default()),
        }
    }
}

/// One rule: when it acts and what it does, then what it did.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Rule {
    /// `CLOCK_BOOTTIME` in nanoseconds at which it begins.
    pub not_before: Cell,
    /// `CLOCK_BOOTTIME` in nanoseconds at which it ends by itself.
    pub until: Cell,
    /// What it does.
    pub action: crate::decide::Action<Cell>,
    /// What its models of loss, delay and so on remember of the packets before.
    pub memory: crate::decide::Memory<Cell>,
    /// How punctual what holds its packets is.
    pub lateness: crate::lateness::Lateness,
    /// Packets that matched while it was in force, as the kernel's tc layer counts: one GSO packet is one packet. Also
    /// the sequence number that a decision is drawn for.
    pub matched: Cell,
    /// Segments of the packets that matched.
    pub segments: Cell,
    /// Bytes of the packets that matched.
    pub bytes: Cell,
    /// Packets dropped.
    pub dropped: Cell,
    /// Packets marked instead (ECN).
    pub marked: Cell,
    /// Packets handed to what delays them.
    pub delayed: Cell,
    /// Packets sent twice.
    pub duplicated: Cell,
    /// Packets with a bit flipped.
    pub corrupted: Cell,
    /// Packets sent at once that would have been delayed.
    pub reordered: Cell,
    /// Packets refused with an answer.
    pub refused: Cell,
    /// Packets upon which both ends of a TCP connection got a RST.
    pub reset: Cell,
    /// DNS queries answered instead of forwarded.
    pub answered: Cell,
    /// Packets that should have been hurt and could not be (no memory, no queue): lost, not counted in `dropped`.
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

/// What is remembered of a flow under a rule.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Flow {
    /// Bytes that passed.
    pub bytes: u64,
    /// `CLOCK_MONOTONIC` in nanoseconds at which its last packet leaves.
    pub last: u64,
}

/// Entries of the histogram map: [`BUCKETS`] for each rule.
pub const HISTOGRAM: usize = RULES * BUCKETS;

/// Quantiles in a table of delays.
pub const QUANTILES: usize = 4096;
/// Tables: the three that every netem user knows, then one for each rule.
pub const TABLES: usize = 3 + RULES;

impl Rule {
    /// Whether the rule acts at this time.
    #[inline(always)]
    #[must_use]
    pub fn acts_at(&self, now: u64) -> bool {
        now >= self.not_before.load() && now < self.until.load()
    }

    /// All counters.
    #[cfg(any(test, feature = "user"))]
    #[must_use]
    pub fn counters(&self) -> [&Cell; 14] {
        [
            &self.matched,
            &self.segments,
            &self.bytes,
            &self.dropped,
            &self.marked,
            &self.delayed,
            &self.duplicated,
            &self.corrupted,
            &self.reordered,
            &self.refused,
            &self.reset,
            &self.answered,
            &self.failed,
            &self.first_match,
        ]
    }
}
