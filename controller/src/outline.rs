//! What a run announces before it starts: its rounds, gates and probes in words.

use jiff::Timestamp;

use crate::{
    event::{GateOutline, ProbeOutline, RoundOutline, What},
    plan::{Gate, Load, Measure, Plan, Probe, Round, Scrape},
    report::figure::{count, percentile, span},
};

/// The first event of a run.
#[must_use]
pub(crate) fn run_started(plan: &Plan, run: &str, started: Timestamp, seed: u64) -> What {
    What::RunStarted {
        run: run.into(),
        plan: plan.name.clone(),
        version: plan.version.clone(),
        started,
        squall: env!("CARGO_PKG_VERSION").into(),
        seed,
        rounds: plan.rounds.iter().map(round).collect(),
        probes: plan.probes.iter().map(|(name, p)| (name.clone(), probe(p))).collect(),
    }
}

/// A gate as announced. The subject is also that of its finding.
#[must_use]
pub(crate) fn gate(gate: &Gate) -> GateOutline {
    let of = |gate: &str, source: &str, limit: f64, unit: &str| GateOutline {
        gate: gate.into(),
        subject: source.into(),
        source: source.into(),
        percentile: None,
        limit,
        unit: unit.into(),
    };
    match gate {
        Gate::Latency { probe, percentile: p, limit } => GateOutline {
            subject: format!("{probe} {}", percentile(*p)),
            percentile: Some(*p),
            ..of("latency", probe, *limit, "seconds")
        },
        Gate::Errors { probe, limit } => of("errors", probe, *limit, "ratio"),
        Gate::Leak { probe, limit } => of("leak", probe, *limit, "per_minute"),
        Gate::Oom { target, limit } => of("oom", target, *limit as f64, "count"),
        Gate::Recovery { probe, within } => of("recovery", probe, *within, "seconds"),
    }
}

fn round(round: &Round) -> RoundOutline {
    RoundOutline {
        name: round.name.clone(),
        baseline: round.baseline.as_secs_f64(),
        hold: round.hold.as_secs_f64(),
        recovery: round.recovery.as_secs_f64(),
        faults: round.faults.iter().map(|fault| fault.summary.clone()).collect(),
        gates: round.gates.iter().map(gate).collect(),
    }
}

fn probe(probe: &Probe) -> ProbeOutline {
    let of = |kind: &str, summary: String, unit: &str| ProbeOutline {
        kind: kind.into(),
        summary,
        unit: unit.into(),
    };
    match probe {
        Probe::Load(load) => of("load", load_summary(load), "seconds"),
        Probe::Scrape(scrape) => of("scrape", scrape_summary(scrape), scrape_unit(&scrape.metric)),
        Probe::Agent { target, measure } => {
            let (what, unit) = match measure {
                Measure::Threads => ("threads", "1"),
                Measure::Fds => ("open file descriptors", "1"),
                Measure::Rss => ("resident memory", "bytes"),
                Measure::Cpu => ("CPUs used", "cpus"),
            };
            of("agent", format!("{what} of {target}"), unit)
        }
    }
}

fn load_summary(load: &Load) -> String {
    let rate = if load.rate.fract() == 0.0 { count(load.rate) } else { load.rate.to_string() };
    let within = span(load.expect.within.as_secs_f64());
    let mut answer = vec![load.expect.status.to_string()];
    answer.extend(load.expect.json.iter().map(|(path, _)| path.text.clone()));
    format!("{} {} at {rate}/s; expects {} within {within}", load.method, load.url, answer.join(", "))
}

fn scrape_summary(scrape: &Scrape) -> String {
    let labels: Vec<_> = scrape.labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
    let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
    format!("{}{labels} from {} every {}", scrape.metric, scrape.url, span(scrape.every.as_secs_f64()))
}

/// Prometheus names carry base units as a suffix; a counter's rate keeps it too.
fn scrape_unit(metric: &str) -> &'static str {
    let metric = metric.strip_suffix("_total").unwrap_or(metric);
    match metric.rsplit('_').next() {
        Some("seconds") => "seconds",
        Some("bytes") => "bytes",
        Some("ratio") => "ratio",
        _ => "1",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_announced_with_what_their_findings_are_about() {
        let latency = gate(&Gate::Latency { probe: "shoppers".into(), percentile: 0.999, limit: 0.8 });
        assert_eq!((latency.subject.as_str(), latency.source.as_str()), ("shoppers p99.9", "shoppers"));
        assert_eq!((latency.percentile, latency.limit, latency.unit.as_str()), (Some(0.999), 0.8, "seconds"));
        let oom = gate(&Gate::Oom { target: "recommender".into(), limit: 0 });
        assert_eq!(
            (oom.gate.as_str(), oom.subject.as_str(), oom.unit.as_str()),
            ("oom", "recommender", "count")
        );
    }

    #[test]
    fn units_come_from_the_suffix_that_prometheus_asks_for() {
        assert_eq!(scrape_unit("recommend_request_duration_seconds"), "seconds");
        assert_eq!(scrape_unit("process_resident_memory_bytes"), "bytes");
        assert_eq!(scrape_unit("sent_bytes_total"), "bytes");
        assert_eq!(scrape_unit("go_goroutines"), "1");
    }
}
