//! What a rule did.

use std::time::Duration;

use squall_common::histogram::{BUCKETS, bound, quantile};

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
    pub(super) delays: Vec<(u64, u64)>,
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
