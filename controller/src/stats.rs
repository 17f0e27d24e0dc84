//! Statistics that the gates stand on: exact intervals for shares and counts, the design effect of samples that hang
//! together in time, Holm's correction, quantiles of sparse histograms.
//!
//! Distributions come from `statrs`; every figure here is held against `SciPy` in the tests. Functions take ratios from
//! 0 to 1 and one-sided error rates (`alpha`).

use statrs::{
    distribution::{ContinuousCDF, StudentsT},
    function::{beta::beta_reg, gamma::gamma_lr},
};

/// Error rate of blocking, shared by all gates of a verdict (Holm).
pub const ALPHA_BLOCK: f64 = 0.01;
/// Error rate of passing, of each gate by itself: a promotion needs them all.
pub const ALPHA_PASS: f64 = 0.001;
/// Fewest blocks of time an interval may rest on.
pub const MIN_BLOCKS: usize = 10;

/// Largest autocorrelation between neighbouring blocks that is allowed for. A single step in a short series looks
/// like a correlation of almost one, and would make every such series undecidable.
const MAX_RHO: f64 = 0.8;

/// A share of bad outcomes, counted over blocks of time.
///
/// Bad outcomes come in bursts, so `n` outcomes say less than `n` coin tosses would. The interval is that of Korn and
/// Graubard (1998): Clopper–Pearson on the *effective* number of outcomes, which is `n` divided by the design effect
/// and by the price of having estimated that from few blocks. With many bad outcomes this is the t-interval over
/// blocks, with few or none the exact one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Outcomes.
    pub n: f64,
    /// Bad ones.
    pub bad: f64,
    /// How many outcomes say as much as one independent outcome would; at least 1.
    pub design_effect: f64,
    /// Blocks of time that had outcomes.
    pub blocks: usize,
}

impl Share {
    /// Counts blocks of `(bad, all)` in order of time. None where nothing was counted.
    #[must_use]
    pub fn of(blocks: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let blocks: Vec<_> = blocks.into_iter().filter(|(_, n)| *n > 0.0).collect();
        let (bad, n) = blocks.iter().fold((0.0, 0.0), |(b, n), (bad, all)| (b + bad, n + all));
        if n <= 0.0 {
            return None;
        }
        let share = bad / n;
        let residuals: Vec<f64> = blocks.iter().map(|(bad, all)| bad - share * all).collect();
        let count = residuals.len() as f64;
        let independent = share * (1.0 - share) * n;
        let design_effect = if blocks.len() < 2 || independent <= 0.0 {
            1.0
        } else {
            let spread = residuals.iter().map(|r| r * r).sum::<f64>() * count / (count - 1.0);
            (spread * ar1_inflation(&residuals) / independent).max(1.0)
        };
        Some(Self { n, bad, design_effect, blocks: blocks.len() })
    }

    /// The estimate.
    #[must_use]
    pub fn estimate(&self) -> f64 {
        self.bad / self.n
    }

    /// The same share, had it been watched `factor` times as long.
    #[must_use]
    pub fn longer(&self, factor: f64) -> Self {
        let blocks = (self.blocks as f64 * factor) as usize;
        Self { n: self.n * factor, bad: self.bad * factor, blocks, ..*self }
    }

    /// Number of independent outcomes that say as much. Where none or all were bad there is no burst to measure, and
    /// each outcome counts.
    #[must_use]
    pub fn effective(&self) -> f64 {
        if self.bad <= 0.0 || self.bad >= self.n || self.blocks < 2 {
            return self.n;
        }
        let ratio =
            normal_quantile(1.0 - ALPHA_PASS) / t_quantile(1.0 - ALPHA_PASS, self.blocks as f64 - 1.0);
        self.n / self.design_effect * ratio * ratio
    }

    /// Lower end of the interval.
    #[must_use]
    pub fn lower(&self, alpha: f64) -> f64 {
        let n = self.effective();
        clopper_pearson_lower(self.estimate() * n, n, alpha)
    }

    /// Upper end of the interval.
    #[must_use]
    pub fn upper(&self, alpha: f64) -> f64 {
        let n = self.effective();
        clopper_pearson_upper(self.estimate() * n, n, alpha)
    }

    /// p-value of "the true share is at most `limit`": `lower(alpha) > limit` exactly where this is below `alpha`.
    #[must_use]
    pub fn p_above(&self, limit: f64) -> f64 {
        let n = self.effective();
        binomial_at_least(self.estimate() * n, n, limit)
    }
}

/// P(X ≥ `bad`) for X binomial of `n` trials with probability `p`; continued to trials that are not whole numbers.
#[must_use]
pub fn binomial_at_least(bad: f64, n: f64, p: f64) -> f64 {
    if bad <= 0.0 || p >= 1.0 {
        return 1.0;
    }
    if p <= 0.0 {
        return 0.0;
    }
    beta_reg(bad, n - bad + 1.0, p).clamp(0.0, 1.0)
}

/// Lower Clopper–Pearson bound of a share: `bad` of `n`.
#[must_use]
pub fn clopper_pearson_lower(bad: f64, n: f64, alpha: f64) -> f64 {
    if bad <= 0.0 {
        return 0.0;
    }
    bisect(|p| binomial_at_least(bad, n, p) < alpha)
}

/// Upper Clopper–Pearson bound of a share: `bad` of `n`. None bad of 300 is at most 1 % (`alpha` 0.05).
#[must_use]
pub fn clopper_pearson_upper(bad: f64, n: f64, alpha: f64) -> f64 {
    if bad >= n {
        return 1.0;
    }
    bisect(|p| beta_reg(bad + 1.0, n - bad, p) < 1.0 - alpha)
}

/// Fewest trials, none of them bad, that show a share to be at most `limit`.
#[must_use]
pub fn least_trials(limit: f64, alpha: f64) -> f64 {
    (alpha.ln() / (-limit).ln_1p()).ceil()
}

/// Lower bound of a Poisson mean of which `count` were seen.
#[must_use]
pub fn poisson_lower(count: f64, alpha: f64) -> f64 {
    if count <= 0.0 {
        return 0.0;
    }
    let scale = count + 1.0;
    scale * bisect(|x| x <= 0.0 || gamma_lr(count, x * scale) < alpha)
}

/// Upper bound of a Poisson mean of which `count` were seen. None seen is at most 6.9 (`alpha` 0.001).
#[must_use]
pub fn poisson_upper(count: f64, alpha: f64) -> f64 {
    let count = count.max(0.0);
    let scale = 4.0 * count + 50.0;
    scale * bisect(|x| x <= 0.0 || gamma_lr(count + 1.0, x * scale) < 1.0 - alpha)
}

/// P(X ≥ `count`) for X Poisson with this mean.
#[must_use]
pub fn poisson_at_least(count: f64, mean: f64) -> f64 {
    match (count, mean) {
        (c, _) if c <= 0.0 => 1.0,
        (_, m) if m <= 0.0 => 0.0,
        _ => gamma_lr(count, mean).clamp(0.0, 1.0),
    }
}

/// Quantile of Student's t.
#[must_use]
pub fn t_quantile(p: f64, freedom: f64) -> f64 {
    StudentsT::new(0.0, 1.0, freedom.max(1.0)).map_or(f64::NAN, |t| t.inverse_cdf(p))
}

/// Quantile of the normal distribution.
#[must_use]
pub fn normal_quantile(p: f64) -> f64 {
    -std::f64::consts::SQRT_2 * statrs::function::erf::erfc_inv(2.0 * p)
}

/// By how much the correlation of neighbours widens the variance of a mean: (1 + ρ) / (1 − ρ) of an AR(1) series, at
/// least 1. ρ is corrected for the bias it has in short series (Kendall 1954).
#[must_use]
pub fn ar1_inflation(residuals: &[f64]) -> f64 {
    let power: f64 = residuals.iter().map(|r| r * r).sum();
    if residuals.len() < 3 || power <= 0.0 {
        return 1.0;
    }
    let rho: f64 = residuals.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / power;
    let rho = (rho + (1.0 + 3.0 * rho) / residuals.len() as f64).clamp(0.0, MAX_RHO);
    (1.0 + rho) / (1.0 - rho)
}

/// Holm's step-down procedure: which of these hypotheses are rejected, at `alpha` for all of them together.
#[must_use]
pub fn holm(p: &[f64], alpha: f64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
    let mut rejected = vec![false; p.len()];
    for (rank, i) in order.into_iter().enumerate() {
        if p[i] > alpha / (p.len() - rank) as f64 {
            break;
        }
        rejected[i] = true;
    }
    rejected
}

/// Smallest value with at least the share `q` of all counts at or below it. `counts` ascend by value.
#[must_use]
pub fn quantile<V: Copy>(counts: &[(V, u64)], q: f64) -> Option<V> {
    let total: u64 = counts.iter().map(|(_, n)| n).sum();
    let rank = ((q * total as f64 - 1e-9).ceil() as u64).max(1);
    let mut below = 0;
    counts
        .iter()
        .find(|(_, n)| {
            below += n;
            below >= rank
        })
        .map(|(value, _)| *value)
}

/// Largest x from 0 to 1 for which `below` holds; it holds up to some point and not after.
fn bisect(below: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if below(middle) { low = middle } else { high = middle }
    }
    f64::midpoint(low, high)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn close(ours: f64, scipy: f64) {
        assert!((ours - scipy).abs() <= 1e-9 + 1e-7 * scipy.abs(), "{ours} is not SciPy's {scipy}");
    }

    // SciPy 1.17.1: beta.ppf(1 - alpha, bad + 1, n - bad)
    #[rstest]
    #[case(0.0, 300.0, 0.05, 0.009_936_081_944_457_708)]
    #[case(0.0, 3836.0, 0.01, 0.001_199_793_276_098_587_1)]
    #[case(0.0, 5754.0, 0.001, 0.001_199_793_276_098_587)]
    #[case(3.0, 1200.0, 0.001, 0.010_839_664_122_431_53)]
    #[case(45.0, 36_000.0, 0.001, 0.001_939_138_084_721_239_3)]
    #[case(2.7, 55.3, 0.001, 0.207_299_701_929_609_5)]
    #[case(5.5, 11.0, 0.001, 0.898_732_012_001_797_8)]
    #[case(18_000.0, 36_000.0, 0.001, 0.508_156_766_900_161_6)]
    #[case(1999.0, 2000.0, 0.001, 0.999_999_499_749_958_4)]
    fn upper_bound_is_scipys(#[case] bad: f64, #[case] n: f64, #[case] alpha: f64, #[case] scipy: f64) {
        close(clopper_pearson_upper(bad, n, alpha), scipy);
    }

    // SciPy 1.17.1: beta.ppf(alpha, bad, n - bad + 1)
    #[rstest]
    #[case(9.0, 12.0, 0.01, 0.377_806_987_463_530_53)]
    #[case(43.0, 36_000.0, 0.01, 0.000_812_031_992_746_273_9)]
    #[case(2.7, 55.3, 0.01, 0.006_178_431_353_401_485)]
    #[case(18_000.0, 36_000.0, 0.01, 0.493_855_920_667_242)]
    #[case(2400.0, 2400.0, 0.01, 0.998_083_018_849_104_1)]
    #[case(1.0, 5.0, 0.001, 0.000_200_080_048_033_626)]
    fn lower_bound_is_scipys(#[case] bad: f64, #[case] n: f64, #[case] alpha: f64, #[case] scipy: f64) {
        close(clopper_pearson_lower(bad, n, alpha), scipy);
    }

    // SciPy 1.17.1: binom.sf(bad - 1, n, p); where `bad` is not whole beta.cdf(p, bad, n - bad + 1)
    #[rstest]
    #[case(3.0, 1200.0, 0.0012, 0.176_166_918_155_888_46)]
    #[case(2.7, 55.3, 0.05, 0.602_354_045_271_050_5)]
    #[case(130.0, 2400.0, 0.05, 0.185_967_914_482_439_66)]
    #[case(2.0, 10.0, 0.05, 0.086_138_355_899_316_37)]
    fn binomial_tail_is_scipys(#[case] bad: f64, #[case] n: f64, #[case] p: f64, #[case] scipy: f64) {
        close(binomial_at_least(bad, n, p), scipy);
    }

    // SciPy 1.17.1: t.ppf(.999, freedom), t.ppf(.99, freedom)
    #[rstest]
    #[case(3.0, 10.214_531_852_407_383, 4.540_702_858_568_132)]
    #[case(4.0, 7.173_182_219_782_307, 3.746_947_387_979_196)]
    #[case(11.0, 4.024_701_037_630_738, 2.718_079_183_813_861_4)]
    #[case(59.0, 3.234_207_344_447_292_5, 2.391_228_837_207_356_7)]
    #[case(1000.0, 3.098_402_163_912_923_3, 2.330_082_674_755_513)]
    fn t_is_scipys(#[case] freedom: f64, #[case] at_999: f64, #[case] at_99: f64) {
        close(t_quantile(0.999, freedom), at_999);
        close(t_quantile(0.99, freedom), at_99);
    }

    // SciPy 1.17.1: gamma.ppf(1 - alpha, count + 1), gamma.ppf(alpha, count), poisson.sf(count - 1, mean)
    #[test]
    fn poisson_is_scipys() {
        close(poisson_upper(0.0, 0.001), 6.907_755_278_982_137);
        close(poisson_upper(30.0, 0.001), 51.083_124_165_924_396);
        close(poisson_upper(7.0, 0.01), 15.999_963_454_407_588);
        close(poisson_upper(500.0, 0.001), 573.027_603_256_997);
        close(poisson_lower(30.0, 0.01), 18.742_425_764_901_892);
        close(poisson_lower(7.0, 0.01), 2.330_212_531_328_884_4);
        close(poisson_lower(500.0, 0.01), 449.456_223_464_806_6);
        close(poisson_at_least(30.0, 15.0), 0.000_418_449_668_327_690_1);
        close(poisson_at_least(3.0, 2.5), 0.456_186_884_116_670_35);
    }

    #[test]
    fn minima_of_the_percentiles() {
        let least = |p: f64| least_trials(1.0 - p, ALPHA_PASS);
        assert_eq!((least(0.95), least(0.99), least(0.999)), (135.0, 688.0, 6905.0));
    }

    #[test]
    fn holm_steps_down_and_stops_at_the_first_that_stands() {
        assert_eq!(holm(&[0.02, 0.001, 0.004, 0.5], 0.01), [false, true, false, false]);
        assert_eq!(holm(&[0.006, 0.001, 0.003], 0.01), [true, true, true]);
        assert_eq!(holm(&[0.02], 0.01), [false]);
        assert!(holm(&[], 0.01).is_empty());
    }

    #[test]
    fn quantiles_of_sparse_counts() {
        let counts = [(10, 94), (20, 1), (900, 5)];
        assert_eq!(quantile(&counts, 0.95), Some(20));
        assert_eq!(quantile(&counts, 0.951), Some(900));
        assert_eq!(quantile(&counts, 1.0), Some(900));
        assert_eq!(quantile(&[(1, 0), (7, 3)], 0.0), Some(7));
        assert_eq!(quantile::<u64>(&[], 0.5), None);
    }

    #[test]
    fn bursts_widen_the_interval() {
        let even = Share::of([(5.0, 100.0); 20]).expect("counted");
        let burst = Share::of((0..20).map(|i| (if i == 7 { 100.0 } else { 0.0 }, 100.0))).expect("counted");
        assert_eq!(even.estimate(), burst.estimate());
        assert_eq!(even.design_effect, 1.0);
        assert!(burst.design_effect > 50.0, "{burst:?}");
        assert!(burst.upper(0.001) > 2.0 * even.upper(0.001));
        assert!(burst.lower(0.01) < even.lower(0.01));
    }

    proptest! {
        #[test]
        fn interval_contains_the_estimate(bins in prop::collection::vec((0u32..50, 50u32..60), 2..40)) {
            let share = Share::of(bins.iter().map(|(b, n)| (f64::from(*b), f64::from(*n)))).expect("counted");
            prop_assert!(share.lower(ALPHA_BLOCK) <= share.estimate() + 1e-9);
            prop_assert!(share.upper(ALPHA_PASS) >= share.estimate() - 1e-9);
        }

        #[test]
        fn bounds_rise_with_bad_outcomes_and_fall_with_good_ones(bad in 0u32..100, good in 1u32..1000) {
            let (bad, n) = (f64::from(bad), f64::from(bad + good));
            prop_assert!(clopper_pearson_upper(bad + 1.0, n, 0.001) > clopper_pearson_upper(bad, n, 0.001));
            prop_assert!(clopper_pearson_lower(bad + 1.0, n, 0.01) > clopper_pearson_lower(bad, n, 0.01));
            prop_assert!(clopper_pearson_upper(bad, n + 1.0, 0.001) < clopper_pearson_upper(bad, n, 0.001));
        }

        #[test]
        fn p_value_agrees_with_the_bound(bad in 0u32..60, limit in 0.001f64..0.9) {
            let share = Share::of((0..12).map(|i| (f64::from(bad + i) / 2.0, 40.0))).expect("counted");
            prop_assume!((share.lower(0.01) - limit).abs() > 1e-6);
            prop_assert_eq!(share.lower(0.01) > limit, share.p_above(limit) < 0.01);
        }

        #[test]
        fn poisson_bounds_bracket_the_count(count in 0u32..10_000) {
            let count = f64::from(count);
            prop_assert!(poisson_lower(count, 0.01) <= count);
            prop_assert!(poisson_upper(count, 0.001) > count);
        }

        #[test]
        fn holm_rejects_no_more_than_uncorrected(p in prop::collection::vec(0.0f64..0.05, 0..20)) {
            for (rejected, p) in holm(&p, 0.01).into_iter().zip(&p) {
                prop_assert!(!rejected || *p <= 0.01);
            }
        }
    }
}
