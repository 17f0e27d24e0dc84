//! What the service says of itself.

use std::time::Duration;

use anyhow::{Context, Result};
use axum::http::StatusCode;
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry, TextEncoder, core::Collector,
};

use crate::cache::Miss;

/// Bucket bounds, seconds; 0.8 is the promise of the service.
const BOUNDS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4];

/// The metrics of one instance.
pub(crate) struct Metrics {
    registry: Registry,
    duration: Histogram,
    requests: IntCounterVec,
    fallbacks: IntCounterVec,
    in_flight: IntGauge,
    tasks: IntGauge,
}

/// A request that is being answered.
pub(crate) struct InFlight<'a>(&'a IntGauge);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    pub(crate) fn new() -> Result<Self> {
        let registry = Registry::new();
        let metrics = Self {
            duration: register(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new("recommend_request_duration_seconds", "Time to answer a request")
                        .buckets(BOUNDS.to_vec()),
                ),
            )?,
            requests: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("recommend_requests_total", "Requests answered, by HTTP status"),
                    &["status"],
                ),
            )?,
            fallbacks: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("recommend_fallbacks_total", "Answers from the fallback list, by reason"),
                    &["reason"],
                ),
            )?,
            in_flight: register(
                &registry,
                IntGauge::new("recommend_requests_in_flight", "Requests being answered"),
            )?,
            tasks: register(&registry, IntGauge::new("recommender_tasks", "Tasks alive in the runtime"))?,
            registry,
        };
        // So that a rate has a start: every series is there from the first scrape on.
        for miss in Miss::ALL {
            metrics.fallbacks.with_label_values(&[miss.reason()]);
        }
        Ok(metrics)
    }

    pub(crate) fn in_flight(&self) -> InFlight<'_> {
        self.in_flight.inc();
        InFlight(&self.in_flight)
    }

    pub(crate) fn fell_back(&self, miss: Miss) {
        self.fallbacks.with_label_values(&[miss.reason()]).inc();
    }

    pub(crate) fn answered(&self, status: StatusCode, took: Duration) {
        self.requests.with_label_values(&[status.as_str()]).inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// The text exposition format.
    pub(crate) fn render(&self, tasks: usize) -> Result<Vec<u8>> {
        self.tasks.set(tasks as i64);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).context("cannot encode the metrics")?;
        Ok(text)
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> Result<C> {
    let collector = made.context("a metric is malformed")?;
    registry.register(Box::new(collector.clone())).context("a metric is there twice")?;
    Ok(collector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_a_plan_watches_is_exposed() -> Result<()> {
        let metrics = Metrics::new()?;
        let in_flight = metrics.in_flight();
        metrics.fell_back(Miss::Timeout);
        metrics.answered(StatusCode::OK, Duration::from_millis(300));
        let text = String::from_utf8(metrics.render(7)?)?;
        for line in [
            "recommend_request_duration_seconds_bucket{le=\"0.2\"} 0",
            "recommend_request_duration_seconds_bucket{le=\"0.4\"} 1",
            "recommend_requests_total{status=\"200\"} 1",
            "recommend_fallbacks_total{reason=\"cache_timeout\"} 1",
            "recommend_fallbacks_total{reason=\"cache_breaker_open\"} 0",
            "recommend_requests_in_flight 1",
            "recommender_tasks 7",
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line:?} in\n{text}");
        }
        drop(in_flight);
        assert!(String::from_utf8(metrics.render(7)?)?.contains("recommend_requests_in_flight 0"));
        Ok(())
    }
}
