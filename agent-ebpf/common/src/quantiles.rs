//! The distributions of delays that netem's users know by name, as tables of quantiles: 8192 is one jitter.

use statrs::distribution::{ContinuousCDF, Normal};
use std::{boxed::Box, string::String, sync::LazyLock, vec::Vec};

use crate::table::QUANTILES;

/// One jitter in a table (`NETEM_DIST_SCALE`, linux/pkt_sched.h).
pub const SCALE: f64 = 8192.0;
/// Most entries of a table of the user's own (`NETEM_DIST_MAX`, linux/pkt_sched.h).
pub const MOST: usize = 16_384;

/// Quantiles, ascending: entry i is the value at (i + 0.5) / [`QUANTILES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantiles(Box<[i16]>);

/// The normal distribution with a standard deviation of one jitter, cut off at four.
pub static NORMAL: LazyLock<Quantiles> = LazyLock::new(|| Quantiles::of(normal));
/// A Pareto distribution of shape 3, moved and scaled to a mean of 0 and a standard deviation of about one jitter, cut off at four.
pub static PARETO: LazyLock<Quantiles> = LazyLock::new(|| Quantiles::of(pareto));
/// A quarter of the normal's deviation and three quarters of the Pareto's, quantile by quantile.
pub static PARETONORMAL: LazyLock<Quantiles> =
    LazyLock::new(|| Quantiles::of(|q| 0.25 * normal(q) + 0.75 * pareto(q)));

fn normal(q: f64) -> f64 {
    Normal::standard().inverse_cdf(q)
}

fn pareto(q: f64) -> f64 {
    ((1.0 - q).powf(-1.0 / 3.0) - 1.5) * 4.0 / 3.0
}

impl Quantiles {
    fn of(f: impl Fn(f64) -> f64) -> Self {
        let at = |i: usize| (i as f64 + 0.5) / QUANTILES as f64;
        // A cast from float saturates.
        Self((0..QUANTILES).map(|i| (f(at(i)) * SCALE).round() as i16).collect())
    }

    /// The distribution of a table in netem's format, whose entries are equally likely. The error says what is wrong.
    pub fn from_entries(entries: &[i32]) -> Result<Self, String> {
        if entries.is_empty() || entries.len() > MOST {
            return Err(std::format!("{} entries; a table has 1 to {MOST}", entries.len()));
        }
        let mut sorted = Vec::with_capacity(entries.len());
        for (i, entry) in entries.iter().enumerate() {
            let entry =
                i16::try_from(*entry).map_err(|_| std::format!("entry {i} is {entry}; -32768 to 32767"))?;
            sorted.push(entry);
        }
        sorted.sort_unstable();
        Ok(Self((0..QUANTILES).map(|i| sorted[(2 * i + 1) * sorted.len() / (2 * QUANTILES)]).collect()))
    }

    /// All of them.
    #[must_use]
    pub fn entries(&self) -> &[i16] {
        &self.0
    }

    /// The value at a place from 0 to 2^32.
    #[must_use]
    pub fn at(&self, place: u64) -> i16 {
        self.0[(place >> 20) as usize % QUANTILES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean_and_deviation(table: &Quantiles) -> (f64, f64) {
        let n = QUANTILES as f64;
        let mean = table.0.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = table.0.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        (mean / SCALE, variance.sqrt() / SCALE)
    }

    #[test]
    fn the_distributions_have_the_moments_they_claim() {
        let (mean, deviation) = mean_and_deviation(&NORMAL);
        assert!(mean.abs() < 0.001 && (deviation - 1.0).abs() < 0.001, "{mean} {deviation}");
        let (mean, deviation) = mean_and_deviation(&PARETO);
        // The tail beyond four is what is missing.
        assert!(mean.abs() < 0.05 && deviation > 0.7 && deviation < 1.2, "{mean} {deviation}");
        assert!(PARETONORMAL.0.is_sorted());
    }

    #[test]
    fn a_table_of_ones_own_keeps_its_distribution() {
        let two = Quantiles::from_entries(&[8192, -8192]).unwrap();
        assert_eq!(two.at(0), -8192);
        assert_eq!(two.at((1 << 31) - 1), -8192);
        assert_eq!(two.at(1 << 31), 8192);
        let all: Vec<i32> = (0..MOST as i32).rev().collect();
        let table = Quantiles::from_entries(&all).unwrap();
        assert!((i32::from(table.0[2048]) - 8194).abs() <= 2, "{}", table.0[2048]);
        assert!(Quantiles::from_entries(&[]).is_err());
        assert!(Quantiles::from_entries(&[40_000]).unwrap_err().contains("entry 0"));
    }
}
