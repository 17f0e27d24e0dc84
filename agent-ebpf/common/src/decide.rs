//! What happens to the n-th packet of a rule. A decision is a hash of the seed and n: the same seed and the same
//! sequence of packets give the same decisions, without a lock.
//!
//! Models with a memory keep it in cells of their rule, one for all CPUs. Two packets that are decided on at the same
//! moment may both take their step from the same state; each is still a step of the model, so shares and distributions stay.

use crate::table::Cell;

/// What a rule does. `T` is a [`Cell`] in the map and a plain number in the agent.
#[repr(C)]
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Action<T> {
    /// A [`Mode`].
    pub mode: T,
    /// Seed of the decisions.
    pub seed: T,
    /// [`threshold`] of the share of packets that are touched.
    pub share: T,
    /// [`threshold`] of the share of flows that are touched.
    pub flow_share: T,
    /// Packets sent twice.
    pub duplicate: Chance<T>,
    /// Packets with a bit flipped.
    pub corrupt: Chance<T>,
    /// Not 0: the checksum is made right after a bit was flipped.
    pub silent: T,
    /// Packets that are not delayed among those that are.
    pub reorder: Chance<T>,
    /// At least `gap - 1` packets are delayed between two that are not. At least 1.
    pub gap: T,
    /// A [`LossModel`].
    pub loss_model: T,
    /// [`threshold`] of the share that is lost, or every how many packets one is.
    pub loss: T,
    /// Markov chain of four states: for each the [`threshold`]s below which the next is 0, 1, 2; otherwise it is 3.
    pub next: [[T; 3]; 4],
    /// [`threshold`] of the loss in each state.
    pub lose: [T; 4],
    /// Delay in nanoseconds.
    pub latency: T,
    /// Largest deviation from it in nanoseconds (uniform), or the scale of the table.
    pub jitter: T,
    /// Weight of the draw before in the next, as netem's: 0 to 2^32.
    pub rho: T,
    /// 0: uniform; otherwise 1 + the index of a table of quantiles.
    pub table: T,
    /// Not 0: within a flow no packet overtakes another.
    pub keep_order: T,
    /// Nanoseconds a byte takes, times 2^24; 0: no limit to the rate.
    pub byte_time: T,
    /// Added to each packet's length in bytes; two's complement.
    pub overhead: T,
    /// Time that a full bucket of bytes takes, in nanoseconds.
    pub burst: T,
    /// Longest time for which bytes may queue for the rate, in nanoseconds.
    pub backlog: T,
    /// Not 0: packets that would be lost are marked instead, where they can be (ECN).
    pub ecn: T,
    /// Least and longest time from one slot to the next in nanoseconds; the longest is 0 where there are no slots.
    pub slot_min: T,
    /// See [`Action::slot_min`].
    pub slot_max: T,
    /// Packets that leave in one slot at the most; 0: any number.
    pub slot_packets: T,
    /// Bytes after which a slot is over; 0: any number.
    pub slot_bytes: T,
    /// Longest time for which packets may wait for a slot, in nanoseconds.
    pub slot_backlog: T,
    /// Bytes of a flow after which it is cut.
    pub cut_after: T,
    /// Not 0: GSO packets are segmented before anything is decided.
    pub per_segment: T,
}

/// How likely something is. `T` as in [`Action`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chance<T> {
    /// [`threshold`] of the share of packets.
    pub ratio: T,
    /// [`threshold`] of the chance that a packet suffers whatever the one before did. The share stays what it is.
    pub repeat: T,
}

/// What models remember. `T` as in [`Action`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory<T> {
    /// Whether the packet before was duplicated.
    pub duplicated: T,
    /// Whether it was corrupted.
    pub corrupted: T,
    /// Whether it was sent ahead.
    pub ahead: T,
    /// Packets delayed since one was sent ahead.
    pub since: T,
    /// State of the loss model.
    pub state: T,
    /// The last draw for a delay, 32 bits.
    pub draw: T,
    /// `CLOCK_MONOTONIC` in nanoseconds at which the rate is free again.
    pub free_at: T,
    /// `CLOCK_MONOTONIC` in nanoseconds of the last slot.
    pub slot_at: T,
    /// Packets in it.
    pub slot_packets: T,
    /// Bytes in it.
    pub slot_bytes: T,
}

/// What a rule does with a packet at large. The values of [`Action::mode`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Mode {
    /// Duplicate, lose, corrupt, reorder, delay.
    Hurt = 0,
    /// Drop with an answer.
    Refuse = 1,
    /// End the TCP connection.
    Reset = 2,
    /// End the TCP connection after a number of bytes.
    Cut = 3,
    /// Hand it to the queue that knows DNS.
    Dns = 4,
}

/// Models of loss. The values of [`Action::loss_model`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum LossModel {
    /// None.
    None = 0,
    /// Each packet for itself.
    Ratio = 1,
    /// Every n-th.
    Every = 2,
    /// By a Markov chain.
    Chain = 3,
}

/// What a draw is for. Draws for different things are independent.
#[derive(Debug, Clone, Copy)]
#[repr(u64)]
enum Stream {
    Share = 1,
    Flow = 2,
    Loss = 3,
    Step = 4,
    Delay = 5,
    Duplicate = 6,
    Corrupt = 8,
    Reorder = 10,
    Slot = 12,
}

/// The longest time for which a packet can be held, in nanoseconds.
pub const LONGEST: u64 = 60_000_000_000;

/// Number of a packet's second copy, which is decided on for itself: above any number of packets.
pub const COPY: u64 = 1 << 63;

/// A ratio from 0 to 1 as a number to compare a 64-bit hash with. 1 becomes `u64::MAX`, which means "always".
#[must_use]
pub fn threshold(ratio: f64) -> u64 {
    // A cast from float saturates: 1.0 and more is u64::MAX, NaN and less than 0 is 0.
    (ratio * 18_446_744_073_709_551_616.0) as u64
}

/// Whether packet `n` is touched at all.
#[inline(always)]
#[must_use]
pub fn touched(action: &Action<Cell>, n: u64, flow: impl FnOnce() -> u64) -> bool {
    let seed = action.seed.load();
    let share = action.flow_share.load();
    if share != u64::MAX && hash(seed, flow(), Stream::Flow as u64) >= share {
        return false;
    }
    hit(action.share.load(), seed, n, Stream::Share as u64)
}

/// Whether packet `n` is sent twice.
#[inline(always)]
#[must_use]
pub fn duplicated(action: &Action<Cell>, memory: &Memory<Cell>, n: u64) -> bool {
    chance(&action.duplicate, &memory.duplicated, action.seed.load(), n, Stream::Duplicate)
}

/// Whether packet `n` gets a bit flipped.
#[inline(always)]
#[must_use]
pub fn corrupted(action: &Action<Cell>, memory: &Memory<Cell>, n: u64) -> bool {
    chance(&action.corrupt, &memory.corrupted, action.seed.load(), n, Stream::Corrupt)
}

/// Whether packet `n` is sent ahead of those that wait.
#[inline(always)]
#[must_use]
pub fn ahead(action: &Action<Cell>, memory: &Memory<Cell>, n: u64) -> bool {
    if action.reorder.ratio.load() == 0 {
        return false;
    }
    let since = memory.since.load();
    let ahead = since + 1 >= action.gap.load()
        && chance(&action.reorder, &memory.ahead, action.seed.load(), n, Stream::Reorder);
    memory.since.store(if ahead { 0 } else { since + 1 });
    ahead
}

/// Whether packet `n` is lost.
#[inline(always)]
#[must_use]
pub fn lost(action: &Action<Cell>, memory: &Memory<Cell>, n: u64) -> bool {
    let model = action.loss_model.load();
    let seed = action.seed.load();
    if model == LossModel::Ratio as u64 {
        return hit(action.loss.load(), seed, n, Stream::Loss as u64);
    }
    if model == LossModel::Every as u64 {
        return ((n & !COPY) + 1).checked_rem(action.loss.load()) == Some(0);
    }
    if model != LossModel::Chain as u64 {
        return false;
    }
    let row = &action.next[memory.state.load() as usize & 3];
    let draw = hash(seed, n, Stream::Step as u64);
    let mut state = 0;
    if draw >= row[0].load() {
        state += 1;
    }
    if draw >= row[1].load() {
        state += 1;
    }
    if draw >= row[2].load() {
        state += 1;
    }
    memory.state.store(state);
    hit(action.lose[state as usize & 3].load(), seed, n, Stream::Loss as u64)
}

/// The delay of packet number `n` in nanoseconds, never below zero: uniform in latency ± jitter, or by a table of quantiles
/// (each 8192 for one jitter). `quantile` gives the entry of a table at a place from 0 to 2^32.
#[inline(always)]
#[must_use]
pub fn delay(
    action: &Action<Cell>,
    memory: &Memory<Cell>,
    n: u64,
    quantile: impl FnOnce(u64, u64) -> i16,
) -> u64 {
    let latency = action.latency.load();
    let jitter = action.jitter.load();
    if jitter == 0 {
        return latency;
    }
    let mut draw = hash(action.seed.load(), n, Stream::Delay as u64) >> 32;
    let rho = action.rho.load();
    if rho != 0 {
        // netem's get_crandom (net/sched/sch_netem.c, Linux 6.1). The sum stays below 2^64.
        draw = (draw * ((1 << 32) - rho) + memory.draw.load() * rho) >> 32;
        memory.draw.store(draw);
    }
    let table = action.table.load();
    if table == 0 {
        return (latency + scale(2 * jitter + 1, draw)).saturating_sub(jitter);
    }
    let away = (jitter as i64 * i64::from(quantile(table - 1, draw)) + 4096) >> 13;
    let delay = latency as i64 + away;
    if delay > 0 { delay as u64 } else { 0 }
}

/// For how many nanoseconds a packet of `len` bytes has to wait for the rate, its own time on the wire included. `None`
/// where too much waits already, or it would wait for longer than `most`: what is lost takes no time from those after it.
#[inline(always)]
#[must_use]
pub fn wait(action: &Action<Cell>, memory: &Memory<Cell>, now: u64, len: u64, most: u64) -> Option<u64> {
    let byte_time = action.byte_time.load();
    if byte_time == 0 {
        return Some(0);
    }
    let len = len.wrapping_add(action.overhead.load());
    // Negative where the overhead says so.
    let len = if len >> 63 == 0 { len } else { 0 };
    let takes = (len * byte_time) >> 24;
    let burst = action.burst.load();
    let free_at = memory.free_at.load();
    let queued = free_at.saturating_sub(now);
    if queued > action.backlog.load() || queued + takes > most + burst {
        return None;
    }
    if free_at < now {
        memory.free_at.store(now);
    }
    // Packets on several CPUs add up, in whatever order.
    memory.free_at.add(takes);
    Some(memory.free_at.load().saturating_sub(now).saturating_sub(burst))
}

/// When packet number `n` leaves that could leave at `due` (`CLOCK_MONOTONIC`, nanoseconds): at the next slot with room for it,
/// and where there is none ahead, with one that is drawn from then on. `None` where too much waits already, or that would be
/// after `latest`: what is lost takes no room from those after it.
#[inline(always)]
#[must_use]
pub fn slot(
    action: &Action<Cell>,
    memory: &Memory<Cell>,
    n: u64,
    due: u64,
    len: u64,
    latest: u64,
) -> Option<u64> {
    let (least, most) = (action.slot_min.load(), action.slot_max.load());
    if most == 0 {
        return Some(due);
    }
    let before = memory.slot_at.load();
    let (packets, bytes) = (action.slot_packets.load(), action.slot_bytes.load());
    let full = packets != 0 && memory.slot_packets.load() >= packets
        || bytes != 0 && memory.slot_bytes.load() >= bytes;
    let mut at = before;
    let mut last = before;
    if before < due || full {
        let from = if before < due { due } else { before };
        let draw = hash(action.seed.load(), n, Stream::Slot as u64) >> 32;
        at = from + least + scale(most - least, draw);
        // Not by the draw itself: of many that try, those with a near slot would get through.
        last = from + most;
    }
    if last > latest || last - due > action.slot_backlog.load() {
        return None;
    }
    if at != before {
        memory.slot_at.store(at);
        memory.slot_packets.store(0);
        memory.slot_bytes.store(0);
    }
    memory.slot_packets.add(1);
    memory.slot_bytes.add(len);
    Some(at)
}

#[inline(always)]
fn chance(chance: &Chance<Cell>, last: &Cell, seed: u64, n: u64, stream: Stream) -> bool {
    let ratio = chance.ratio.load();
    if ratio == 0 {
        return false;
    }
    let repeat = chance.repeat.load();
    if repeat == 0 {
        return hit(ratio, seed, n, stream as u64);
    }
    if hit(repeat, seed, n, stream as u64 + 1) {
        return last.load() != 0;
    }
    let now = hit(ratio, seed, n, stream as u64);
    last.store(u64::from(now));
    now
}

/// `range * fraction / 2^32` without 128-bit arithmetic, which eBPF has not. Exact for ranges below 2^63.
#[inline(always)]
fn scale(range: u64, fraction: u64) -> u64 {
    (range >> 32) * fraction + (((range & 0xffff_ffff) * fraction) >> 32)
}

#[inline(always)]
fn hit(threshold: u64, seed: u64, n: u64, stream: u64) -> bool {
    match threshold {
        0 => false,
        u64::MAX => true,
        t => hash(seed, n, stream) < t,
    }
}

/// Mixes seed, sequence number and stream. The finalizer is `SplitMix64`'s (Steele, Lea, Flood 2014).
#[inline(always)]
#[must_use]
pub fn hash(seed: u64, n: u64, stream: u64) -> u64 {
    let mut x = seed ^ stream.wrapping_mul(0xd6e8_feb8_6659_fd93);
    x = mix(x.wrapping_add(0x9e37_79b9_7f4a_7c15));
    mix(x.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

#[inline(always)]
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(any(test, feature = "user"))]
mod user {
    use super::{Action, Cell, Chance, LossModel, Memory, threshold};

    impl Chance<Cell> {
        fn store(&self, value: &Chance<u64>) {
            self.ratio.store(value.ratio);
            self.repeat.store(value.repeat);
        }
    }

    impl Action<Cell> {
        /// Replaces every field.
        pub fn store(&self, value: &Action<u64>) {
            // Everything that makes the rule do more comes after what limits it.
            let pairs = [
                (&self.seed, value.seed),
                (&self.flow_share, value.flow_share),
                (&self.share, value.share),
                (&self.silent, value.silent),
                (&self.gap, value.gap),
                (&self.loss, value.loss),
                (&self.table, value.table),
                (&self.rho, value.rho),
                (&self.keep_order, value.keep_order),
                (&self.jitter, value.jitter),
                (&self.latency, value.latency),
                (&self.overhead, value.overhead),
                (&self.burst, value.burst),
                (&self.backlog, value.backlog),
                (&self.byte_time, value.byte_time),
                (&self.ecn, value.ecn),
                (&self.slot_packets, value.slot_packets),
                (&self.slot_bytes, value.slot_bytes),
                (&self.slot_backlog, value.slot_backlog),
                (&self.slot_min, value.slot_min),
                (&self.slot_max, value.slot_max),
                (&self.cut_after, value.cut_after),
                (&self.per_segment, value.per_segment),
            ];
            for (cell, value) in pairs {
                cell.store(value);
            }
            let chain = self.next.iter().flatten().zip(value.next.iter().flatten());
            for (cell, value) in chain.chain(self.lose.iter().zip(&value.lose)) {
                cell.store(*value);
            }
            self.duplicate.store(&value.duplicate);
            self.corrupt.store(&value.corrupt);
            self.reorder.store(&value.reorder);
            self.loss_model.store(value.loss_model);
            self.mode.store(value.mode);
        }
    }

    impl Memory<Cell> {
        /// Forgets everything.
        pub fn clear(&self) {
            let Self {
                duplicated,
                corrupted,
                ahead,
                since,
                state,
                draw,
                free_at,
                slot_at,
                slot_packets,
                slot_bytes,
            } = self;
            let cells = [duplicated, corrupted, ahead, since, state, draw, free_at];
            for cell in cells.into_iter().chain([slot_at, slot_packets, slot_bytes]) {
                cell.store(0);
            }
        }
    }

    impl Chance<u64> {
        /// Something that happens to this share of packets, and is so likely to happen again.
        #[must_use]
        pub fn new(ratio: f64, correlation: f64) -> Self {
            Self { ratio: threshold(ratio), repeat: threshold(correlation) }
        }
    }

    impl Action<u64> {
        /// An action that touches every packet and does nothing to it.
        #[must_use]
        pub fn new(seed: u64) -> Self {
            Self { seed, share: u64::MAX, flow_share: u64::MAX, gap: 1, ..Self::default() }
        }

        /// Loses packets by a chain: the chances of the next state for each state, and the loss in each.
        #[must_use]
        pub fn with_chain(mut self, steps: [[f64; 4]; 4], lose: [f64; 4]) -> Self {
            self.loss_model = LossModel::Chain as u64;
            self.next = steps.map(|[a, b, c, _]| [a, a + b, a + b + c].map(threshold));
            self.lose = lose.map(threshold);
            self
        }

        /// Loses a share of packets. With a correlation a packet is so likely to suffer what the one before did: a chain of
        /// two states, in which the share stays.
        #[must_use]
        pub fn with_loss(mut self, ratio: f64, correlation: f64) -> Self {
            if correlation > 0.0 && ratio > 0.0 && ratio < 1.0 {
                let (enter, leave) = (ratio * (1.0 - correlation), (1.0 - ratio) * (1.0 - correlation));
                let never = [1.0, 0.0, 0.0, 0.0];
                let steps = [[1.0 - enter, enter, 0.0, 0.0], [leave, 1.0 - leave, 0.0, 0.0], never, never];
                return self.with_chain(steps, [0.0, 1.0, 0.0, 0.0]);
            }
            self.loss = threshold(ratio);
            self.loss_model = if ratio > 0.0 { LossModel::Ratio } else { LossModel::None } as u64;
            self
        }

        /// netem's `loss gemodel`.
        #[must_use]
        pub fn with_gilbert_elliott(self, p: f64, r: f64, loss_bad: f64, loss_good: f64) -> Self {
            let never = [1.0, 0.0, 0.0, 0.0];
            let steps = [[1.0 - p, p, 0.0, 0.0], [r, 1.0 - r, 0.0, 0.0], never, never];
            self.with_chain(steps, [loss_good, loss_bad, 0.0, 0.0])
        }

        /// netem's `loss state`: 1 received in a gap, 2 received in a burst, 3 lost in a burst, 4 lost in a gap.
        #[must_use]
        pub fn with_four_states(self, p13: f64, p31: f64, p32: f64, p23: f64, p14: f64) -> Self {
            let steps = [
                [1.0 - p13 - p14, 0.0, p13, p14],
                [0.0, 1.0 - p23, p23, 0.0],
                [p31, p32, 1.0 - p31 - p32, 0.0],
                [1.0, 0.0, 0.0, 0.0],
            ];
            self.with_chain(steps, [0.0, 0.0, 1.0, 1.0])
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;

    const MS: u64 = 1_000_000;

    fn memory() -> Memory<Cell> {
        Memory::default()
    }

    fn cells(action: &Action<u64>) -> Action<Cell> {
        let cells = Action::<Cell>::default();
        cells.store(action);
        cells
    }

    fn losses(action: Action<u64>, n: u64) -> Vec<bool> {
        let (action, memory) = (cells(&action), memory());
        (0..n).map(|i| lost(&action, &memory, i)).collect()
    }

    fn share(events: &[bool]) -> f64 {
        events.iter().filter(|&&e| e).count() as f64 / events.len() as f64
    }

    /// Share of events among those right after an event.
    fn after(events: &[bool]) -> f64 {
        let next: Vec<bool> = events.windows(2).filter(|w| w[0]).map(|w| w[1]).collect();
        share(&next)
    }

    fn delays(action: Action<u64>, n: u64) -> Vec<u64> {
        let (action, memory) = (cells(&action), memory());
        (0..n).map(|i| delay(&action, &memory, i, |_, at| crate::quantiles::NORMAL.at(at))).collect()
    }

    #[test]
    fn thresholds_reach_both_ends() {
        assert_eq!(threshold(0.0), 0);
        assert_eq!(threshold(1.0), u64::MAX);
        assert_eq!(threshold(0.5), 1 << 63);
        assert!(losses(Action::new(1).with_loss(1.0, 0.0), 1000).iter().all(|&l| l));
        assert!(!losses(Action::new(1).with_loss(0.0, 0.5), 1000).iter().any(|&l| l));
    }

    #[test]
    fn the_same_seed_gives_the_same_fates_and_another_seed_others() {
        let draw = |seed| losses(Action::new(seed).with_gilbert_elliott(0.1, 0.3, 0.9, 0.01), 1000);
        assert_eq!(draw(4711), draw(4711));
        assert_ne!(draw(4711), draw(4712));
    }

    #[test]
    fn loss_has_the_rate_asked_for_and_no_memory() {
        for (ratio, n) in [(0.01, 1_000_000_u64), (0.05, 400_000), (0.5, 100_000)] {
            let lost = losses(Action::new(4711).with_loss(ratio, 0.0), n);
            let sigma = (ratio * (1.0 - ratio) / n as f64).sqrt();
            assert!((share(&lost) - ratio).abs() < 4.0 * sigma, "{ratio}: {}", share(&lost));
            let sigma = (ratio * (1.0 - ratio) / (n as f64 * ratio)).sqrt();
            assert!((after(&lost) - ratio).abs() < 4.0 * sigma, "{ratio}: {} after a loss", after(&lost));
        }
    }

    #[test]
    fn correlated_loss_keeps_its_rate_and_repeats_itself() {
        let lost = losses(Action::new(1).with_loss(0.05, 0.25), 1_000_000);
        assert!((share(&lost) - 0.05).abs() < 0.002, "{}", share(&lost));
        assert!((after(&lost) - (0.25 + 0.75 * 0.05)).abs() < 0.01, "{}", after(&lost));
    }

    #[test]
    fn gilbert_elliott_and_four_states_have_their_rates() {
        let (p, r) = (0.02, 0.2);
        let lost = losses(Action::new(1).with_gilbert_elliott(p, r, 1.0, 0.0), 1_000_000);
        assert!((share(&lost) - p / (p + r)).abs() < 0.003, "{}", share(&lost));
        assert!((after(&lost) - (1.0 - r)).abs() < 0.005, "{}", after(&lost));
        // p14 alone: isolated losses.
        let lost = losses(Action::new(1).with_four_states(0.0, 1.0, 0.0, 1.0, 0.1), 1_000_000);
        assert!((share(&lost) - 0.1 / 1.1).abs() < 0.002, "{}", share(&lost));
        assert_eq!(after(&lost), 0.0);
        // p13 and p31 alone are a Gilbert model.
        let lost = losses(Action::new(1).with_four_states(p, r, 0.0, 1.0, 0.0), 1_000_000);
        assert!((share(&lost) - p / (p + r)).abs() < 0.003, "{}", share(&lost));
    }

    #[test]
    fn every_nth_is_every_nth() {
        let mut action = Action::new(1);
        (action.loss_model, action.loss) = (LossModel::Every as u64, 4);
        let lost = losses(action, 12);
        let at: Vec<usize> = (0..12).filter(|&i| lost[i]).collect();
        assert_eq!(at, [3, 7, 11]);
    }

    #[test]
    fn a_share_of_flows_is_whole_flows() {
        let action = cells(&Action { flow_share: threshold(0.3), ..Action::new(7) });
        let flows: Vec<bool> = (0..10_000)
            .map(|flow| {
                let first = touched(&action, 0, || flow);
                assert!((1..20).all(|n| touched(&action, n, || flow) == first));
                first
            })
            .collect();
        assert!((share(&flows) - 0.3).abs() < 0.02, "{}", share(&flows));
    }

    #[test]
    fn what_repeats_keeps_its_share() {
        let action = cells(&Action { duplicate: Chance::new(0.1, 0.5), ..Action::new(3) });
        let memory = memory();
        let twice: Vec<bool> = (0..400_000).map(|n| duplicated(&action, &memory, n)).collect();
        assert!((share(&twice) - 0.1).abs() < 0.004, "{}", share(&twice));
        assert!((after(&twice) - 0.55).abs() < 0.01, "{}", after(&twice));
    }

    #[test]
    fn nothing_goes_ahead_within_the_gap() {
        let action = cells(&Action { reorder: Chance::new(0.5, 0.0), gap: 5, ..Action::new(3) });
        let memory = memory();
        let at: Vec<u64> = (0..100_000).filter(|&n| ahead(&action, &memory, n)).collect();
        assert!(at.windows(2).all(|w| w[1] - w[0] >= 5));
        // Four that wait, then on the average two tries.
        assert!((at.len() as f64 - 100_000.0 / 6.0).abs() < 300.0, "{}", at.len());
    }

    #[test]
    fn jitter_is_uniform() {
        let mut delays = delays(Action { latency: 100 * MS, jitter: 50 * MS, ..Action::new(4711) }, 100_000);
        delays.sort_unstable();
        for q in [1, 10, 25, 50, 75, 90, 99] {
            let at = delays[q * 1000] as f64 / MS as f64;
            assert!((at - (50.0 + q as f64)).abs() < 1.0, "p{q} is {at} ms");
        }
        assert!(delays[0] >= 50 * MS && delays[99_999] <= 150 * MS);
    }

    #[test]
    fn a_table_gives_its_distribution() {
        let action = Action { latency: 100 * MS, jitter: 10 * MS, table: 1, ..Action::new(1) };
        let mut delays = delays(action, 100_000);
        delays.sort_unstable();
        for (q, z) in [(2.275, -2.0), (15.866, -1.0), (50.0, 0.0), (84.134, 1.0), (97.725, 2.0)] {
            let at = delays[(q * 1000.0) as usize] as f64 / MS as f64;
            assert!((at - (100.0 + 10.0 * z)).abs() < 0.5, "{q}% is {at} ms");
        }
    }

    #[test]
    fn delays_that_are_correlated_resemble_each_other() {
        let lag = |rho: u64| {
            let action = Action { latency: 100 * MS, jitter: 50 * MS, rho, ..Action::new(1) };
            let d: Vec<f64> = delays(action, 100_000).iter().map(|&d| d as f64).collect();
            let mean = d.iter().sum::<f64>() / d.len() as f64;
            let variance: f64 = d.iter().map(|x| (x - mean).powi(2)).sum();
            d.windows(2).map(|w| (w[0] - mean) * (w[1] - mean)).sum::<f64>() / variance
        };
        assert!(lag(0).abs() < 0.02);
        assert!((lag(1 << 31) - 0.5).abs() < 0.02);
    }

    #[test]
    fn slots_come_in_time_and_take_what_they_may() {
        let slot_backlog = 1000 * MS;
        let action =
            Action { slot_min: 10 * MS, slot_max: 20 * MS, slot_packets: 3, slot_backlog, ..Action::new(7) };
        let (cells, m) = (cells(&action), memory());
        let slot = |cells: &Action<Cell>, m: &Memory<Cell>, n, due, len| {
            slot(cells, m, n, due, len, u64::MAX).expect("there is room")
        };
        // Ten at once leave by threes, then somebody much later.
        let mut slots: Vec<u64> = (0..10).map(|n| slot(&cells, &m, n, MS, 100)).collect();
        assert!(slots.chunks(3).all(|three| three.iter().all(|at| *at == three[0])), "{slots:?}");
        slots.dedup();
        slots.insert(0, MS);
        assert!(slots.windows(2).all(|w| (10 * MS..=20 * MS).contains(&(w[1] - w[0]))), "{slots:?}");
        let late = slot(&cells, &m, 10, 1000 * MS, 100);
        assert!((1010 * MS..=1020 * MS).contains(&late), "{late}");
        assert_eq!(slot(&cells, &m, 11, late, 100), late);
        // A slot is over with the packet that fills it.
        let action = Action { slot_packets: 0, slot_bytes: 250, ..action };
        cells.store(&action);
        m.clear();
        let mut slots: Vec<u64> = (0..9).map(|n| slot(&cells, &m, n, MS, 100)).collect();
        slots.dedup();
        assert_eq!(slots.len(), 3, "{slots:?}");
        assert_eq!(slot(&self::cells(&Action::new(7)), &m, 0, 5, 100), 5);
    }

    #[test]
    fn a_rate_is_kept_with_its_burst_and_its_limit() {
        // 1 Mbit/s is 8 µs a byte.
        let action = cells(&Action { byte_time: 8_000 << 24, backlog: 100 * MS, ..Action::new(1) });
        let m = memory();
        let wait = |action: &Action<Cell>, m: &Memory<Cell>, now, len| wait(action, m, now, len, LONGEST);
        assert_eq!(wait(&action, &m, MS, 1000), Some(8 * MS));
        assert_eq!(wait(&action, &m, MS, 1000), Some(16 * MS));
        assert_eq!(wait(&action, &m, 5 * MS, 1000), Some(20 * MS));
        let through = (0..100).filter(|_| wait(&action, &m, 5 * MS, 1000).is_some()).count();
        assert_eq!(through, 11, "what waits 100 ms and one more");
        let action = cells(&Action {
            burst: 24 * MS,
            ..Action { byte_time: 8_000 << 24, backlog: 100 * MS, ..Action::new(1) }
        });
        let m = memory();
        let waits: Vec<u64> = (0..5).filter_map(|_| wait(&action, &m, MS, 1000)).collect();
        assert_eq!(waits, [0, 0, 0, 8 * MS, 16 * MS]);
    }

    /// Packets of 1000 bytes, one in so many milliseconds for three minutes: how many get through in each ten seconds, and
    /// the longest wait.
    fn overload(every: u64, fate: impl Fn(u64, u64) -> Option<u64>) -> ([u64; 18], u64) {
        let (mut through, mut longest) = ([0; 18], 0);
        for n in 0..180_000 / every {
            let now = 1 + n * every * MS;
            if let Some(due) = fate(n, now) {
                through[(n * every / 10_000) as usize] += 1;
                longest = longest.max(due - now);
            }
        }
        (through, longest)
    }

    #[test]
    fn four_times_what_a_rate_lets_through_does_not_cut_it_off() {
        // 100 kbit/s, that is 12.5 packets a second, with netem's default queue, which lasts two minutes; and what may be
        // added to it by a delay.
        for latency in [0, 30_000 * MS, 59_000 * MS] {
            let action = cells(&Action { byte_time: 80_000 << 24, backlog: 121_120 * MS, ..Action::new(1) });
            let m = memory();
            let (through, longest) = overload(20, |_, now| {
                wait(&action, &m, now, 1000, LONGEST - latency).map(|wait| now + latency + wait)
            });
            assert!(longest <= LONGEST, "{longest}");
            // At first the queue fills.
            assert!(through.iter().all(|n| (124..=501).contains(n)), "{latency}: {through:?}");
            assert!(through[8..].iter().all(|n| (124..=126).contains(n)), "{latency}: {through:?}");
        }
        // A packet that lasts longer than any can be held is lost, and those after it are not.
        let (action, m) =
            (cells(&Action { byte_time: 8_000_000 << 24, backlog: LONGEST, ..Action::new(1) }), memory());
        assert_eq!(wait(&action, &m, MS, 65_000, LONGEST), None);
        assert_eq!(wait(&action, &m, MS, 1000, LONGEST), Some(8000 * MS));
    }

    #[test]
    fn ten_times_what_slots_take_does_not_cut_them_off() {
        // Five packets in each 100 ms or so, and 500 a second.
        for slot_backlog in [2_000 * MS, 2 * LONGEST] {
            let action = cells(&Action {
                slot_min: 80 * MS,
                slot_max: 120 * MS,
                slot_packets: 5,
                slot_backlog,
                ..Action::new(7)
            });
            let m = memory();
            let (through, longest) = overload(2, |n, now| slot(&action, &m, n, now, 1000, now + LONGEST));
            assert!(longest <= slot_backlog.min(LONGEST), "{longest}");
            assert!(through[14..].iter().all(|n| (470..=530).contains(n)), "{slot_backlog}: {through:?}");
        }
    }

    proptest! {
        #[test]
        fn a_delay_stays_within_latency_and_jitter(
            latency in 0..60_000 * MS, jitter in 0..60_000 * MS, seed: u64, n: u64, rho in 0..1_u64 << 32,
        ) {
            let action = cells(&Action { latency, jitter, rho, ..Action::new(seed) });
            let by = delay(&action, &memory(), n, |_, _| 0);
            prop_assert!(by >= latency.saturating_sub(jitter) && by <= latency + jitter);
        }

        #[test]
        fn scale_is_exact(range in 0..1_u64 << 62, fraction in 0..1_u64 << 32) {
            let exact = (u128::from(range) * u128::from(fraction)) >> 32;
            prop_assert_eq!(u128::from(scale(range, fraction)), exact);
        }
    }
}
