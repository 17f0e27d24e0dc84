//! What probes and targets saw, as curves with their limits and as figures for each phase.

use std::collections::{BTreeMap, BTreeSet};

use super::figure;
use crate::{
    event::{GateOutline, LoadBin, Phase, TargetSample},
    fold::{Probe, Round, Run},
};

/// A span of time, seconds since the start of the run.
pub(crate) type Span = (f64, f64);

/// Distance of the points of a spectrum.
const SPECTRUM_STEP: f64 = 0.05;

/// What a load probe saw over some of its bins.
#[derive(Debug, Default)]
pub(crate) struct LoadSummary {
    /// Requests that were due.
    pub(crate) due: u64,
    /// Requests with the expected answer in time.
    pub(crate) ok: u64,
    /// The others, by reason.
    pub(crate) failed: BTreeMap<String, u64>,
    /// Requests that the generator sent late.
    pub(crate) late: u64,
    /// Requests that the generator never sent.
    pub(crate) dropped: u64,
    /// Latency of all answers and timeouts: microseconds → count.
    latency: BTreeMap<u64, u64>,
}

impl LoadSummary {
    pub(crate) fn of<'a>(bins: impl IntoIterator<Item = &'a LoadBin>) -> Self {
        let mut sum = Self::default();
        for bin in bins {
            sum.due += bin.due;
            sum.ok += bin.ok;
            sum.late += bin.late;
            sum.dropped += bin.dropped;
            for (reason, n) in &bin.failed {
                *sum.failed.entry(reason.clone()).or_default() += n;
            }
            for (micros, n) in bin.ok_latency.iter().chain(&bin.failed_latency) {
                *sum.latency.entry(*micros).or_default() += n;
            }
        }
        sum
    }

    /// Failed requests.
    pub(crate) fn failures(&self) -> u64 {
        self.failed.values().sum()
    }

    /// Share of the requests that failed.
    pub(crate) fn errors(&self) -> Option<f64> {
        (self.due > 0).then(|| self.failures() as f64 / self.due as f64)
    }

    /// The latency in seconds that a share `q` of the requests stayed within, bad ones included.
    pub(crate) fn quantile(&self, q: f64) -> Option<f64> {
        let total: u64 = self.latency.values().sum();
        let rank = ((q * total as f64).ceil() as u64).max(1);
        let mut seen = 0;
        self.latency.iter().find_map(|(micros, n)| {
            seen += n;
            (seen >= rank).then_some(*micros as f64 / 1e6)
        })
    }

    /// The quantiles from the lowest on, as pairs of `-log10(1 - q)` (1 is p90, 2 is p99) and seconds, up to the last one
    /// that a whole request lies beyond.
    pub(crate) fn spectrum(&self) -> Vec<(f64, f64)> {
        let total: u64 = self.latency.values().sum();
        let last = (total.max(1) as f64).log10();
        let steps = (last / SPECTRUM_STEP).floor() as u32;
        (0..=steps)
            .map(|i| f64::from(i) * SPECTRUM_STEP)
            .filter_map(|x| Some((x, self.quantile(1.0 - 10f64.powf(-x))?)))
            .collect()
    }

    /// The longest latency, seconds.
    pub(crate) fn longest(&self) -> Option<f64> {
        self.latency.last_key_value().map(|(micros, _)| *micros as f64 / 1e6)
    }
}

/// Upper bound of the bucket that holds the quantile; infinite past the last finite bound.
pub(crate) fn bucket_quantile(buckets: &[(Option<f64>, u64)], q: f64) -> Option<f64> {
    let total: u64 = buckets.iter().map(|(_, n)| n).sum();
    let rank = ((q * total as f64).ceil() as u64).max(1);
    let mut seen = 0;
    buckets.iter().find_map(|(bound, n)| {
        seen += n;
        (seen >= rank).then_some(bound.unwrap_or(f64::INFINITY))
    })
}

/// A curve over time.
#[derive(Debug, Clone)]
pub(crate) struct Track {
    /// What it is: `shoppers p95`.
    pub(crate) name: String,
    /// What that means, in a few words.
    pub(crate) about: String,
    /// Unit of the values.
    pub(crate) unit: String,
    /// Time and value, ascending.
    pub(crate) points: Vec<(f64, f64)>,
    /// Limits, as lines.
    pub(crate) rules: Vec<Rule>,
    /// Times at which no sample could be taken.
    pub(crate) misses: Vec<f64>,
    /// Whether zero belongs on the axis.
    pub(crate) from_zero: bool,
}

/// A limit in a chart.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Rule {
    /// The value must stay at or below this.
    Level {
        /// Where it holds.
        span: Span,
        /// The limit.
        value: f64,
        /// What to write beside it.
        label: String,
    },
    /// The value must not grow faster than this.
    Slope {
        /// Where it holds.
        span: Span,
        /// Where the line starts.
        start: f64,
        /// Growth a second.
        per_second: f64,
        /// What to write beside it.
        label: String,
    },
    /// Something must have happened by now.
    By {
        /// When.
        at: f64,
        /// What to write beside it.
        label: String,
    },
}

impl Rule {
    /// What to write beside it.
    pub(crate) fn label(&self) -> &str {
        let (Self::Level { label, .. } | Self::Slope { label, .. } | Self::By { label, .. }) = self;
        label
    }
}

impl Track {
    fn new(name: String, about: &str, unit: &str, points: Vec<(f64, f64)>) -> Self {
        let from_zero = matches!(unit, "seconds" | "ratio" | "bytes" | "cpus");
        let (about, unit) = (about.into(), unit.into());
        Self { name, about, unit, points, rules: vec![], misses: vec![], from_zero }
    }

    /// The points inside a span.
    pub(crate) fn inside(&self, (from, to): Span) -> &[(f64, f64)] {
        let start = self.points.partition_point(|(at, _)| *at < from);
        let end = self.points.partition_point(|(at, _)| *at < to).max(start);
        &self.points[start..end]
    }

    /// Lowest, mean and highest value in a span.
    pub(crate) fn summary(&self, span: Span) -> Option<(f64, f64, f64)> {
        let points = self.inside(span);
        let values = points.iter().map(|(_, v)| *v);
        let low = values.clone().reduce(f64::min)?;
        let high = values.clone().reduce(f64::max)?;
        Some((low, values.sum::<f64>() / points.len() as f64, high))
    }
}

/// Every probe as a curve, load probes as several, with the limits of all rounds; then the targets.
pub(crate) fn tracks(run: &Run) -> Vec<Track> {
    let mut tracks = probes(run, 0.0);
    tracks.extend(targets(run));
    tracks
}

/// Every probe as a curve from a time on, load probes as several, with the limits of all rounds.
pub(crate) fn probes(run: &Run, from: f64) -> Vec<Track> {
    let mut tracks = Vec::new();
    // What users see comes first.
    let (load, others): (Vec<_>, Vec<_>) =
        run.probes.iter().partition(|(_, probe)| probe.outline.kind == "load");
    for (name, probe) in load.into_iter().chain(others) {
        let gates = || run.rounds.iter().flat_map(|r| &r.outline.gates).filter(|g| g.source == *name);
        let asked: BTreeSet<u64> = gates().filter_map(|g| g.percentile).map(f64::to_bits).collect();
        let asked = if asked.is_empty() { BTreeSet::from([0.95f64.to_bits()]) } else { asked };
        if probe.outline.kind == "load" {
            let bins = &probe.bins[probe.bins.partition_point(|bin| bin.start < from)..];
            tracks.extend(asked.iter().map(|p| latency(name, bins, f64::from_bits(*p))));
            tracks.push(errors(name, bins));
        } else if probe.buckets.is_empty() {
            tracks.push(gauge(name, probe, from));
        } else {
            tracks.extend(asked.iter().map(|p| histogram(name, probe, f64::from_bits(*p), from)));
        }
    }
    for track in &mut tracks {
        for round in &run.rounds {
            let rules: Vec<_> =
                round.outline.gates.iter().filter_map(|gate| rule(run, round, gate, track)).collect();
            track.rules.extend(rules);
        }
    }
    tracks
}

/// The curve that a gate judges, with its limit alone.
pub(crate) fn track_of(run: &Run, round: &Round, gate: &GateOutline) -> Option<Track> {
    if gate.gate == "oom" {
        return Some(kills(run, gate));
    }
    let probe = run.probes.get(&gate.source)?;
    let name = &gate.source;
    let p = gate.percentile.unwrap_or(0.95);
    let mut track = match gate.gate.as_str() {
        "errors" => errors(name, &probe.bins),
        _ if probe.outline.kind == "load" => latency(name, &probe.bins, p),
        _ if !probe.buckets.is_empty() => histogram(name, probe, p, 0.0),
        _ => gauge(name, probe, 0.0),
    };
    track.rules.extend(rule(run, round, gate, &track));
    Some(track)
}

fn latency(name: &str, bins: &[LoadBin], p: f64) -> Track {
    let points = bins.iter().filter_map(|bin| Some((bin.start + 0.5, LoadSummary::of([bin]).quantile(p)?)));
    let about = "latency of all requests due in a second, bad answers and timeouts included";
    Track::new(format!("{name} {}", figure::percentile(p)), about, "seconds", points.collect())
}

fn errors(name: &str, bins: &[LoadBin]) -> Track {
    let points = bins.iter().filter_map(|bin| Some((bin.start + 0.5, LoadSummary::of([bin]).errors()?)));
    let about = "share of the requests due in a second that failed";
    Track::new(format!("{name} errors"), about, "ratio", points.collect())
}

fn gauge(name: &str, probe: &Probe, from: f64) -> Track {
    let points = probe.values.iter().filter(|(at, _)| *at >= from).copied();
    let mut track = Track::new(name.into(), &probe.outline.summary, &probe.outline.unit, points.collect());
    track.misses = misses(probe, from);
    track
}

fn histogram(name: &str, probe: &Probe, p: f64, from: f64) -> Track {
    let recent = probe.buckets.iter().filter(|(at, _)| *at >= from);
    let points = recent.filter_map(|(at, buckets)| Some((*at, bucket_quantile(buckets, p)?)));
    let name = format!("{name} {}", figure::percentile(p));
    let about = "upper bound of the bucket that holds it";
    let mut track = Track::new(name, about, &probe.outline.unit, points.collect());
    track.misses = misses(probe, from);
    track
}

fn misses(probe: &Probe, from: f64) -> Vec<f64> {
    probe.failures.iter().map(|(at, _)| *at).filter(|at| *at >= from).collect()
}

fn kills(run: &Run, gate: &GateOutline) -> Track {
    let mut points: Vec<(f64, f64)> = Vec::new();
    for ((target, _), samples) in &run.targets {
        if *target == gate.source {
            points.extend(samples.iter().filter_map(|(at, s)| Some((*at, s.oom_kills? as f64))));
        }
    }
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    Track::new(
        format!("{} OOM kills", gate.source),
        "in the target's cgroups, since they were made",
        "count",
        points,
    )
}

/// Memory and CPU of the targets.
fn targets(run: &Run) -> Vec<Track> {
    let mut tracks = Vec::new();
    let nodes: BTreeSet<&str> = run.targets.keys().map(|(_, node)| node.as_str()).collect();
    for ((target, node), samples) in &run.targets {
        let target = if nodes.len() > 1 { format!("{target} on {node}") } else { target.clone() };
        let memory: Vec<_> = samples.iter().map(|(at, s)| (*at, charged(s) as f64)).collect();
        let mut track = Track::new(format!("{target} memory"), "charged to its cgroup", "bytes", memory);
        if let Some((at, first)) = samples.iter().find(|(_, s)| s.cgroup_memory_limit > 0) {
            let end = samples.last().map_or(*at, |(at, _)| *at);
            let value = first.cgroup_memory_limit as f64;
            let label = format!("cgroup limit {}", figure::value(value, "bytes"));
            track.rules.push(Rule::Level { span: (*at, end), value, label });
        }
        tracks.push(track);
        let cpu = samples.windows(2).filter_map(|w| {
            let [(t0, a), (t1, b)] = w else { return None };
            let comparable = a.generation == b.generation && b.cpu >= a.cpu && t1 > t0;
            comparable.then(|| (*t1, (b.cpu - a.cpu) / (t1 - t0)))
        });
        tracks.push(Track::new(format!("{target} CPU"), "CPUs used by its processes", "cpus", cpu.collect()));
    }
    tracks
}

fn charged(sample: &TargetSample) -> u64 {
    if sample.cgroup_memory > 0 { sample.cgroup_memory } else { sample.rss }
}

/// The line of a gate's limit in a curve, where it has a place there and its phase was reached.
fn rule(run: &Run, round: &Round, gate: &GateOutline, track: &Track) -> Option<Rule> {
    let fault = round.span(Phase::Fault, run.now)?;
    let limit = format!("limit {}", figure::limit(gate.limit, &gate.unit));
    let level = || Some(Rule::Level { span: fault, value: gate.limit, label: limit.clone() });
    let errors = track.name == format!("{} errors", gate.source);
    match gate.gate.as_str() {
        "latency" if track.name == gate.subject => level(),
        "errors" if errors => level(),
        "leak" if track.name == gate.source => {
            let start = track.summary((fault.0 - 5.0, fault.0 + 1.0)).map(|(_, mean, _)| mean)?;
            Some(Rule::Slope { span: fault, start, per_second: gate.limit / 60.0, label: limit })
        }
        "recovery" if !errors && track.name.starts_with(&format!("{} p", gate.source)) => {
            let at = round.phases.get(&Phase::Recovery)? + gate.limit;
            // A round that ended before leaves no room for the line: what follows is another round's.
            let reached = round.finished.is_none_or(|end| at <= end);
            reached.then(|| Rule::By { at, label: format!("recover by {}", figure::span(gate.limit)) })
        }
        _ => None,
    }
}

/// Something that happened to a target at one moment.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Mark {
    /// When.
    pub(crate) at: f64,
    /// Target or probe.
    pub(crate) on: String,
    /// One letter or sign for the chart.
    pub(crate) sign: &'static str,
    /// What happened.
    pub(crate) text: String,
}

/// OOM kills, replaced processes and resets of probes, in order.
pub(crate) fn marks(run: &Run) -> Vec<Mark> {
    let mut marks = Vec::new();
    for ((target, node), samples) in &run.targets {
        for pair in samples.windows(2) {
            let [(_, a), (at, b)] = pair else { continue };
            let on = format!("{target} on {node}");
            if let (Some(before), Some(after)) = (a.oom_kills, b.oom_kills)
                && after > before
            {
                let text = format!("OOM: {}", figure::kills((after - before) as f64));
                marks.push(Mark { at: *at, on: on.clone(), sign: "✖", text });
            }
            if a.generation != b.generation {
                marks.push(Mark { at: *at, on, sign: "↻", text: "a process was replaced".into() });
            }
        }
    }
    for (name, probe) in &run.probes {
        marks.extend(probe.resets.iter().map(|(at, why)| Mark {
            at: *at,
            on: name.clone(),
            sign: "↻",
            text: why.clone(),
        }));
    }
    marks.sort_by(|a, b| a.at.total_cmp(&b.at).then_with(|| a.on.cmp(&b.on)));
    marks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_count_bad_answers_too() {
        let bin = LoadBin {
            due: 10,
            ok: 9,
            failed: BTreeMap::from([("timeout".into(), 1)]),
            ok_latency: vec![(10_000, 5), (20_000, 4)],
            failed_latency: vec![(2_000_000, 1)],
            ..LoadBin::default()
        };
        let sum = LoadSummary::of([&bin]);
        assert_eq!(sum.quantile(0.5), Some(0.01));
        assert_eq!(sum.quantile(0.9), Some(0.02));
        assert_eq!(sum.quantile(0.95), Some(2.0));
        assert_eq!(sum.errors(), Some(0.1));
        assert_eq!(LoadSummary::default().quantile(0.5), None);
        assert_eq!(LoadSummary::default().errors(), None);
    }

    #[test]
    fn a_spectrum_ends_where_there_are_no_requests_beyond() {
        let bin = LoadBin { ok_latency: vec![(10_000, 90), (20_000, 9), (90_000, 1)], ..LoadBin::default() };
        let spectrum = LoadSummary::of([&bin]).spectrum();
        assert_eq!(spectrum.first(), Some(&(0.0, 0.01)));
        let (last, slowest) = spectrum.last().copied().expect("points");
        assert!((last - 2.0).abs() < 1e-9 && (slowest - 0.02).abs() < 1e-9, "p99 of a hundred is the 99th");
        assert!(spectrum.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1));
    }

    #[test]
    fn a_quantile_past_the_last_bound_is_not_that_bound() {
        let buckets = [(Some(0.1), 90), (Some(0.8), 5), (None, 5)];
        assert_eq!(bucket_quantile(&buckets, 0.95), Some(0.8));
        assert_eq!(bucket_quantile(&buckets, 0.99), Some(f64::INFINITY));
        assert_eq!(bucket_quantile(&[], 0.99), None);
    }
}
