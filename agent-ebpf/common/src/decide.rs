//! What happens to the n-th packet of a rule. A decision is a hash of the seed and n: the same seed and the same
//! sequence of packets give the same decisions, without a lock.

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Action {
    /// [`threshold`] of the share of packets that are touched.
    pub share: u64,
    /// [`threshold`] of the share of those that are dropped.
    pub loss: u64,
    /// Delay in nanoseconds.
    pub latency: u64,
    /// Largest deviation from it in nanoseconds, uniform.
    pub jitter: u64,
    /// Seed of the decisions.
    pub seed: u64,
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Nothing.
    Pass,
    /// It is lost.
    Drop,
    /// It leaves this many nanoseconds later. Never 0.
    Delay(u64),
}

/// A ratio from 0 to 1 as a number to compare a 64-bit hash with. 1 becomes `u64::MAX`, which means "always".
#[must_use]
pub fn threshold(ratio: f64) -> u64 {
    // A cast from float saturates: 1.0 and more is u64::MAX, NaN and less than 0 is 0.
    (ratio * 18_446_744_073_709_551_616.0) as u64
}

/// Decides the fate of packet number `n`.
#[inline(always)]
#[must_use]
pub fn fate(action: &Action, n: u64) -> Fate {
    if !hit(action.share, action.seed, n, 1) {
        return Fate::Pass;
    }
    if hit(action.loss, action.seed, n, 2) {
        return Fate::Drop;
    }
    match delay(action, n) {
        0 => Fate::Pass,
        by => Fate::Delay(by),
    }
}

/// The delay of packet number `n` in nanoseconds: uniform in latency ± jitter, never below zero.
#[inline(always)]
fn delay(action: &Action, n: u64) -> u64 {
    if action.jitter == 0 {
        return action.latency;
    }
    let offset = scale(2 * action.jitter + 1, hash(action.seed, n, 3) >> 32);
    (action.latency + offset).saturating_sub(action.jitter)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;

    const MS: u64 = 1_000_000;

    fn action(loss: f64, latency: u64, jitter: u64) -> Action {
        Action { share: u64::MAX, loss: threshold(loss), latency, jitter, seed: 4711 }
    }

    #[test]
    fn thresholds_reach_both_ends() {
        assert_eq!(threshold(0.0), 0);
        assert_eq!(threshold(1.0), u64::MAX);
        assert_eq!(threshold(0.5), 1 << 63);
        assert!((0..1000).all(|n| fate(&action(1.0, 0, 0), n) == Fate::Drop));
        assert!((0..1000).all(|n| fate(&action(0.0, 0, 0), n) == Fate::Pass));
    }

    #[test]
    fn the_same_seed_gives_the_same_fates_and_another_seed_others() {
        let a = action(0.3, 10 * MS, 5 * MS);
        let b = Action { seed: 4712, ..a };
        let draw = |a: &Action| (0..1000).map(|n| fate(a, n)).collect::<Vec<_>>();
        assert_eq!(draw(&a), draw(&a));
        assert_ne!(draw(&a), draw(&b));
    }

    #[test]
    fn loss_has_the_rate_asked_for_and_no_memory() {
        for (ratio, n) in [(0.01, 1_000_000_u64), (0.05, 400_000), (0.5, 100_000)] {
            let lost: Vec<bool> = (0..n).map(|i| fate(&action(ratio, 0, 0), i) == Fate::Drop).collect();
            let count = lost.iter().filter(|&&l| l).count() as f64;
            let sigma = (n as f64 * ratio * (1.0 - ratio)).sqrt();
            assert!((count - n as f64 * ratio).abs() < 4.0 * sigma, "{ratio}: {count} of {n}");
            let pairs = lost.windows(2).filter(|w| w[0] && w[1]).count() as f64;
            let expected = n as f64 * ratio * ratio;
            assert!(
                (pairs - expected).abs() < 5.0 * expected.sqrt(),
                "{ratio}: {pairs} pairs, not {expected}"
            );
        }
    }

    #[test]
    fn share_is_a_share_of_packets_and_loss_a_share_of_those() {
        let a = Action { share: threshold(0.5), ..action(0.5, MS, 0) };
        let n = 100_000;
        let fates: Vec<Fate> = (0..n).map(|i| fate(&a, i)).collect();
        let share = |f: Fate| fates.iter().filter(|&&x| x == f).count() as f64 / n as f64;
        assert!((share(Fate::Pass) - 0.5).abs() < 0.01);
        assert!((share(Fate::Drop) - 0.25).abs() < 0.01);
        assert!((share(Fate::Delay(MS)) - 0.25).abs() < 0.01);
    }

    #[test]
    fn jitter_is_uniform() {
        let a = action(0.0, 100 * MS, 50 * MS);
        let mut delays: Vec<u64> = (0..100_000)
            .map(|n| match fate(&a, n) {
                Fate::Delay(by) => by,
                other => panic!("{other:?}"),
            })
            .collect();
        delays.sort_unstable();
        for q in [1, 10, 25, 50, 75, 90, 99] {
            let at = delays[q * 1000] as f64 / MS as f64;
            assert!((at - (50.0 + q as f64)).abs() < 1.0, "p{q} is {at} ms");
        }
        assert!(delays[0] >= 50 * MS && delays[99_999] <= 150 * MS);
    }

    proptest! {
        #[test]
        fn a_delay_stays_within_latency_and_jitter(
            latency in 0..60_000 * MS, jitter in 0..60_000 * MS, seed: u64, n: u64,
        ) {
            let a = Action { share: u64::MAX, loss: 0, latency, jitter, seed };
            let by = delay(&a, n);
            prop_assert!(by >= latency.saturating_sub(jitter) && by <= latency + jitter);
        }

        #[test]
        fn scale_is_exact(range in 0..1_u64 << 62, fraction in 0..1_u64 << 32) {
            let exact = (u128::from(range) * u128::from(fraction)) >> 32;
            prop_assert_eq!(u128::from(scale(range, fraction)), exact);
        }
    }
}
