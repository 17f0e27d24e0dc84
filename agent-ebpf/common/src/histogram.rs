//! A log-linear histogram of delays: eight buckets to the octave.

/// Buckets of one histogram.
pub const BUCKETS: usize = 256;
/// Delays below this many nanoseconds share the first bucket.
const LEAST: u32 = 10;
/// Bits of a delay below the leading one that choose a bucket within the octave.
const SUB: u32 = 3;

/// The bucket of a delay in nanoseconds.
#[inline(always)]
#[must_use]
pub fn bucket(delay: u64) -> usize {
    if delay >> LEAST == 0 {
        return 0;
    }
    let octave = delay.ilog2();
    let within = (delay >> (octave - SUB)) as usize & ((1 << SUB) - 1);
    let bucket = 1 + (((octave - LEAST) as usize) << SUB) + within;
    if bucket < BUCKETS { bucket } else { BUCKETS - 1 }
}

/// Delays in a bucket are shorter than so many nanoseconds; those in the last may be longer.
#[cfg(any(test, feature = "user"))]
#[must_use]
pub const fn bound(bucket: usize) -> u64 {
    let Some(bucket) = bucket.checked_sub(1) else { return 1 << LEAST };
    let octave = LEAST + (bucket >> SUB) as u32;
    let within = (bucket & ((1 << SUB) - 1)) as u64;
    (1 << octave) + ((within + 1) << (octave - SUB))
}

/// The quantile `q` (0 to 1) in nanoseconds of buckets given as `(count, sum)`: the mean of the bucket in which it
/// lies, so a constant delay comes back exactly. `None` without any.
#[cfg(any(test, feature = "user"))]
#[must_use]
pub fn quantile(buckets: &[(u64, u64)], q: f64) -> Option<f64> {
    let total: u64 = buckets.iter().map(|(count, _)| count).sum();
    if total == 0 {
        return None;
    }
    let rank = ((total as f64 * q).ceil() as u64).clamp(1, total);
    let mut seen = 0;
    buckets.iter().find_map(|&(count, sum)| {
        seen += count;
        (seen >= rank).then(|| sum as f64 / count as f64)
    })
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;

    #[test]
    fn buckets_grow_with_the_delay_and_stay_inside() {
        let mut last = 0;
        for shift in 0..64 {
            for step in 0..8_u64 {
                let delay = (1_u64 << shift).saturating_add(step * ((1 << shift) / 8));
                let b = bucket(delay);
                assert!(b >= last && b < BUCKETS, "{delay} in {b} after {last}");
                last = b;
            }
        }
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(1023), 0);
        assert_eq!(bucket(1024), 1);
        assert_eq!(bucket(2048), 9);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_bucket_ends_where_the_next_begins() {
        for b in 0..BUCKETS - 1 {
            assert_eq!((bucket(bound(b) - 1), bucket(bound(b))), (b, b + 1));
        }
    }

    #[test]
    fn a_bucket_is_at_most_an_eighth_wide() {
        for delay in [1 << 20, 3_000_000, 100_000_000, 2_000_000_000, 60_000_000_000_u64] {
            assert_ne!(bucket(delay), bucket(delay + delay / 7));
        }
    }

    #[test]
    fn quantiles_are_means_of_buckets() {
        let mut buckets = vec![(0, 0); BUCKETS];
        assert_eq!(quantile(&buckets, 0.5), None);
        buckets[bucket(100_000_000)] = (98, 98 * 100_000_000);
        buckets[bucket(900_000_000)] = (2, 2 * 900_000_000);
        assert_eq!(quantile(&buckets, 0.5), Some(1e8));
        assert_eq!(quantile(&buckets, 0.98), Some(1e8));
        assert_eq!(quantile(&buckets, 0.99), Some(9e8));
        assert_eq!(quantile(&buckets, 1.0), Some(9e8));
    }
}
