//! Whether what was counted is what was asked for: intervals, runs, and the distance between two samples.

use statrs::distribution::{Beta, ContinuousCDF, StudentsT};

/// The normal quantile of a two-sided 99 % interval.
pub const Z99: f64 = 2.575_829_303_548_901;

/// The probabilities that a count may come from: Clopper and Pearson's interval of 99 %.
///
/// # Panics
///
/// Where more hits than trials are given.
#[must_use]
pub fn binomial99(hits: u64, trials: u64) -> (f64, f64) {
    assert!(hits <= trials, "{hits} of {trials}");
    let quantile = |a: u64, b: u64, p: f64| {
        Beta::new(a as f64, b as f64).expect("both shapes are at least one").inverse_cdf(p)
    };
    let low = if hits == 0 { 0.0 } else { quantile(hits, trials - hits + 1, 0.005) };
    let high = if hits == trials { 1.0 } else { quantile(hits + 1, trials - hits, 0.995) };
    (low, high)
}

/// Whether a probability is inside [`binomial99`].
#[must_use]
pub fn inside99(probability: f64, hits: u64, trials: u64) -> bool {
    let (low, high) = binomial99(hits, trials);
    (low..=high).contains(&probability)
}

/// The distance between two samples and how likely samples of one distribution are so far apart (Kolmogorov and
/// Smirnov's test; Press et al., Numerical Recipes, section 14.3).
///
/// # Panics
///
/// Where a sample is empty.
#[must_use]
pub fn kolmogorov_smirnov(a: &[f64], b: &[f64]) -> (f64, f64) {
    assert!(!a.is_empty() && !b.is_empty(), "an empty sample");
    let sorted = |sample: &[f64]| {
        let mut sample = sample.to_vec();
        sample.sort_by(f64::total_cmp);
        sample
    };
    let (a, b) = (sorted(a), sorted(b));
    let (mut below_a, mut below_b, mut distance) = (0, 0, 0.0_f64);
    while below_a < a.len() && below_b < b.len() {
        let next = a[below_a].min(b[below_b]);
        while below_a < a.len() && a[below_a] <= next {
            below_a += 1;
        }
        while below_b < b.len() && b[below_b] <= next {
            below_b += 1;
        }
        let share = |below: usize, sample: &[f64]| below as f64 / sample.len() as f64;
        distance = distance.max((share(below_a, &a) - share(below_b, &b)).abs());
    }
    let size = (a.len() as f64 * b.len() as f64 / (a.len() + b.len()) as f64).sqrt();
    (distance, kolmogorov((size + 0.12 + 0.11 / size) * distance))
}

/// Kolmogorov's distribution: how likely the scaled distance is at least `x`.
fn kolmogorov(x: f64) -> f64 {
    if x < 0.2 {
        return 1.0;
    }
    let terms = (1..=100).map(|k| {
        let k = f64::from(k);
        let sign = if k % 2.0 == 1.0 { 1.0 } else { -1.0 };
        2.0 * sign * (-2.0 * k * k * x * x).exp()
    });
    terms.sum::<f64>().clamp(0.0, 1.0)
}

/// The quantile `q` (0 to 1) of a sample: the smallest value that so many are not above.
///
/// # Panics
///
/// Where the sample is empty.
#[must_use]
pub fn quantile(sample: &[f64], q: f64) -> f64 {
    assert!(!sample.is_empty(), "an empty sample");
    let mut sorted = sample.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * q).ceil() as usize;
    sorted[at.clamp(1, sorted.len()) - 1]
}

/// Mean and the standard error of it. The error is infinite where there are fewer than two values.
#[must_use]
pub fn mean(sample: &[f64]) -> (f64, f64) {
    let n = sample.len() as f64;
    let mean = sample.iter().sum::<f64>() / n;
    let variance = sample.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, if sample.len() < 2 { f64::INFINITY } else { (variance / n).sqrt() })
}

/// How two sides compare that were measured in pairs of turns: the geometric mean of each side's turns, whose ratio is that of the
/// pairs' ratios, so that neither side gains by the noise; and the 95 % interval of the ratio (Student's), which is everything
/// where there is one pair only.
#[must_use]
pub fn compare_pairs([ours, theirs]: &[Vec<f64>; 2]) -> ([f64; 2], [f64; 2]) {
    let logarithms = |turns: &[f64]| turns.iter().map(|x| x.ln()).collect::<Vec<_>>();
    let (ours, theirs) = (logarithms(ours), logarithms(theirs));
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours - theirs).collect();
    let (ratio, error) = mean(&ratios);
    let freedom = (ratios.len() as f64 - 1.0).max(1.0);
    let t = StudentsT::new(0.0, 1.0, freedom).map_or(f64::INFINITY, |t| t.inverse_cdf(0.975));
    let interval = [ratio - t * error, ratio + t * error].map(f64::exp);
    ([mean(&ours).0.exp(), mean(&theirs).0.exp()], interval)
}

/// The share of hits, and half the width of its 99 % interval, where hits may come in bursts: from fifty parts, which are
/// taken to be independent of each other, so each must be much longer than a burst.
#[must_use]
pub fn share_of_parts(fates: &[bool]) -> (f64, f64) {
    const PARTS: usize = 50;
    /// Student's quantile for 49 degrees of freedom.
    const T99: f64 = 2.68;
    let parts = fates.chunks_exact((fates.len() / PARTS).max(1)).map(|part| Runs::of(part).rate());
    let (mean, error) = mean(&parts.collect::<Vec<_>>());
    (mean, T99 * error)
}

/// A sequence of fates: how many were hit, and in which runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runs {
    /// Fates.
    pub total: u64,
    /// Hits.
    pub hits: u64,
    /// Lengths of the runs of hits, in order.
    pub lengths: Vec<u64>,
    /// Fates that came after a hit, and how many of those were hits.
    pub after_hit: (u64, u64),
    /// Fates that came after none, and how many of those were hits.
    pub after_miss: (u64, u64),
}

impl Runs {
    /// Counts.
    #[must_use]
    pub fn of(fates: &[bool]) -> Self {
        let lengths = fates.split(|hit| !hit).map(|run| run.len() as u64).filter(|&n| n > 0).collect();
        let (mut after_hit, mut after_miss) = ((0, 0), (0, 0));
        for pair in fates.windows(2) {
            let after = if pair[0] { &mut after_hit } else { &mut after_miss };
            after.0 += 1;
            after.1 += u64::from(pair[1]);
        }
        let hits = fates.iter().filter(|&&hit| hit).count() as u64;
        Self { total: fates.len() as u64, hits, lengths, after_hit, after_miss }
    }

    /// Share of hits, 0 to 1.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.hits as f64 / self.total as f64
    }

    /// Mean length of a run, and its standard error as if the runs were independent.
    #[must_use]
    pub fn length(&self) -> (f64, f64) {
        mean(&self.lengths.iter().map(|&n| n as f64).collect::<Vec<_>>())
    }
}

/// A chain of two states, each with a probability of a hit: Gilbert and Elliott's model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chain {
    /// From good to bad, for each packet.
    pub p: f64,
    /// From bad to good.
    pub r: f64,
    /// Probability of a hit in the bad state.
    pub bad: f64,
    /// In the good state.
    pub good: f64,
}

impl Chain {
    /// Hits at this ratio, where so likely a packet suffers what the one before did.
    #[must_use]
    pub fn correlated(ratio: f64, correlation: f64) -> Self {
        let (p, r) = ((1.0 - correlation) * ratio, (1.0 - correlation) * (1.0 - ratio));
        Self { p, r, bad: 1.0, good: 0.0 }
    }

    /// Share of hits in the long run.
    #[must_use]
    pub fn rate(&self) -> f64 {
        let bad = self.p / (self.p + self.r);
        bad * self.bad + (1.0 - bad) * self.good
    }

    /// The standard deviation of the share of hits among `n` packets.
    #[must_use]
    pub fn deviation(&self, n: u64) -> f64 {
        // Hits that are k packets apart have the covariance a·λ^k.
        let (bad, decay) = (self.p / (self.p + self.r), 1.0 - self.p - self.r);
        let a = bad * (1.0 - bad) * (self.bad - self.good).powi(2);
        let variance = self.rate() * (1.0 - self.rate()) + 2.0 * a * decay / (1.0 - decay);
        (variance / n as f64).sqrt()
    }

    /// Mean length of a run of hits.
    #[must_use]
    pub fn run_length(&self) -> f64 {
        let bad = self.p / (self.p + self.r);
        let both = bad * self.bad * ((1.0 - self.r) * self.bad + self.r * self.good)
            + (1.0 - bad) * self.good * (self.p * self.bad + (1.0 - self.p) * self.good);
        self.rate() / (self.rate() - both)
    }

    /// Whether the share of hits is inside its 99 % interval.
    #[must_use]
    pub fn fits_rate(&self, runs: &Runs) -> bool {
        (runs.rate() - self.rate()).abs() <= Z99 * self.deviation(runs.total)
    }

    /// Half the width of the 99 % interval of the mean length of a run, for so many runs: from their own spread, or from
    /// that of runs that go on with the same probability each time, whichever is wider.
    #[must_use]
    pub fn run_width(&self, runs: &Runs) -> f64 {
        let length = self.run_length();
        let geometric = (length * (length - 1.0) / runs.lengths.len() as f64).sqrt();
        Z99 * runs.length().1.max(geometric)
    }

    /// Whether the mean length of a run is inside its 99 % interval.
    #[must_use]
    pub fn fits_runs(&self, runs: &Runs) -> bool {
        (runs.length().0 - self.run_length()).abs() <= self.run_width(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from 0 to 1 that look random enough and are the same every time.
    fn noise(seed: u64) -> impl FnMut() -> f64 {
        let mut x = seed;
        move || {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = x;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) as f64 / u64::MAX as f64
        }
    }

    fn walk(chain: Chain, n: usize, seed: u64) -> Vec<bool> {
        let mut next = noise(seed);
        let mut bad = false;
        let mut step = || {
            bad = if bad { next() >= chain.r } else { next() < chain.p };
            next() < if bad { chain.bad } else { chain.good }
        };
        (0..n).map(|_| step()).collect()
    }

    #[test]
    fn pairs_of_turns_are_compared_by_ratio() {
        let ([ours, theirs], [low, high]) = compare_pairs(&[vec![1.0, 4.0], vec![2.0, 2.0]]);
        assert!((ours - 2.0).abs() < 1e-9 && (theirs - 2.0).abs() < 1e-9, "{ours} {theirs}");
        // Student's quantile for one degree of freedom is 12.706, and the error is ln 2.
        assert!(
            (high.ln() - 12.706 * 2_f64.ln()).abs() < 1e-3 && (low * high - 1.0).abs() < 1e-9,
            "{low} {high}"
        );
        // With the sides exchanged it is the inverse.
        let ([a, b], inverse) = compare_pairs(&[vec![2.0, 5.0, 3.0], vec![1.0, 4.0, 7.0]]);
        let ([c, d], interval) = compare_pairs(&[vec![1.0, 4.0, 7.0], vec![2.0, 5.0, 3.0]]);
        assert!((a / b - d / c).abs() < 1e-9 && (inverse[0] * interval[1] - 1.0).abs() < 1e-9);
        // One pair says nothing.
        assert_eq!(compare_pairs(&[vec![3.0], vec![3.0]]).1, [0.0, f64::INFINITY]);
    }

    #[test]
    fn the_interval_is_clopper_and_pearsons() {
        // R: binom.test(10, 1000, conf.level = 0.99)
        let (low, high) = binomial99(10, 1000);
        assert!((low - 0.003_735).abs() < 1e-5 && (high - 0.021_352).abs() < 1e-4, "{low} {high}");
        assert_eq!(binomial99(0, 50).0, 0.0);
        assert_eq!(binomial99(50, 50).1, 1.0);
        assert!(inside99(0.01, 10, 1000) && !inside99(0.03, 10, 1000));
    }

    #[test]
    fn samples_of_one_distribution_are_close_and_others_are_not() {
        let mut next = noise(1);
        let mut sample = |shift: f64| (0..5000).map(|_| next() + shift).collect::<Vec<f64>>();
        let (a, b, c) = (sample(0.0), sample(0.0), sample(0.05));
        assert!(kolmogorov_smirnov(&a, &b).1 > 0.01);
        assert!(kolmogorov_smirnov(&a, &c).1 < 0.001);
        assert_eq!(kolmogorov_smirnov(&a, &a), (0.0, 1.0));
        assert_eq!(kolmogorov_smirnov(&[1.0, 2.0], &[3.0]).0, 1.0);
        // The critical distance for 5000 against 5000 at 1 %: 1.628 × √(2 ⁄ 5000).
        assert!((kolmogorov(1.628) - 0.01).abs() < 2e-4);
    }

    #[test]
    fn runs_are_counted() {
        let fates = [true, true, false, false, true, false].map(|hit| hit);
        let runs = Runs::of(&fates);
        assert_eq!((runs.total, runs.hits), (6, 3));
        assert_eq!(runs.lengths, [2, 1]);
        assert_eq!((runs.after_hit, runs.after_miss), ((3, 1), (2, 1)));
        assert_eq!(runs.length().0, 1.5);
    }

    #[test]
    fn a_chain_has_the_rate_and_the_runs_of_its_theory() {
        for chain in [
            Chain { p: 0.01, r: 0.1, bad: 1.0, good: 0.0 },
            Chain { p: 0.02, r: 0.2, bad: 0.7, good: 0.001 },
            Chain::correlated(0.05, 0.5),
            Chain::correlated(0.05, 0.0),
        ] {
            let runs = Runs::of(&walk(chain, 1_000_000, 4));
            assert!(chain.fits_rate(&runs), "{chain:?}: {} is not {}", runs.rate(), chain.rate());
            assert!(chain.fits_runs(&runs), "{chain:?}: {:?} is not {}", runs.length(), chain.run_length());
            let other = Chain { p: chain.p * 1.3, ..chain };
            assert!(!other.fits_rate(&runs), "{other:?}: {}", runs.rate());
        }
        assert!((Chain::correlated(0.05, 0.5).rate() - 0.05).abs() < 1e-12);
        // The chance that a packet suffers what a lost one before it did: ρ + (1 − ρ)·p.
        assert!((Chain::correlated(0.05, 0.5).run_length() - 1.0 / (1.0 - 0.525)).abs() < 1e-12);
    }

    #[test]
    fn the_spread_of_a_rate_is_the_one_that_is_seen() {
        let chain = Chain { p: 0.02, r: 0.2, bad: 0.7, good: 0.001 };
        let rates: Vec<f64> = (0..400).map(|seed| Runs::of(&walk(chain, 5_000, seed << 20)).rate()).collect();
        let (_, error) = mean(&rates);
        let ratio = error * 20.0 / chain.deviation(5_000);
        assert!((0.85..1.15).contains(&ratio), "{ratio}");
        // And the one that a single long sequence shows in its parts.
        let (share, width) = share_of_parts(&walk(chain, 200_000, 9));
        let ratio = width / (2.68 * chain.deviation(200_000));
        assert!((0.7..1.3).contains(&ratio), "{ratio}");
        assert!((share - chain.rate()).abs() < width, "{share}");
    }

    #[test]
    fn quantiles_are_values_of_the_sample() {
        let sample: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!((quantile(&sample, 0.5), quantile(&sample, 0.99)), (50.0, 99.0));
        assert_eq!((quantile(&sample, 0.0), quantile(&sample, 1.0)), (1.0, 100.0));
    }
}
