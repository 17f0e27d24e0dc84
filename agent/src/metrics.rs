//! What the agent tells Prometheus. Few labels, never an id.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{LazyLock, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use axum::{Router, extract::State, http::header, routing::get};
use prometheus::{
    Encoder, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, TextEncoder, register_histogram_vec,
    register_int_counter, register_int_counter_vec, register_int_gauge_vec,
};
use squall_proto::v1::{self, Injection};

use crate::engine::Engine;

/// All metrics of this process.
pub static METRICS: LazyLock<Metrics> =
    LazyLock::new(|| Metrics::register().expect("metric names are unique"));

/// The metrics.
pub struct Metrics {
    /// Undo records that were set aside.
    pub unreadable_records: IntCounter,
    /// Lines that the audit log lacks.
    pub audit_failures: IntCounter,
    refused: IntCounterVec,
    injections: IntGaugeVec,
    ended: IntCounterVec,
    failed_reverts: IntCounterVec,
    revert_seconds: HistogramVec,
    packets: IntCounterVec,
    /// How many packets of each injection are in the counter already, by what became of them.
    counted: Mutex<BTreeMap<String, BTreeMap<String, u64>>>,
}

impl Metrics {
    fn register() -> prometheus::Result<Self> {
        let info = register_int_gauge_vec!("squall_agent_info", "Always 1; what runs here.", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Self {
            unreadable_records: register_int_counter!(
                "squall_journal_unreadable_records_total",
                "Undo records that could not be read and were set aside."
            )?,
            audit_failures: register_int_counter!(
                "squall_audit_failures_total",
                "Lines that could not be written to the audit log."
            )?,
            refused: register_int_counter_vec!(
                "squall_access_refused_total",
                "Connections and calls that were not let in, by what they lacked or had too much of.",
                &["reason"]
            )?,
            injections: register_int_gauge_vec!(
                "squall_injections",
                "Injections known now.",
                &["kind", "state"]
            )?,
            ended: register_int_counter_vec!(
                "squall_injections_ended_total",
                "Injections that ended.",
                &["kind", "state"]
            )?,
            failed_reverts: register_int_counter_vec!(
                "squall_reverts_failed_total",
                "Attempts to revert that failed; each is tried again.",
                &["kind"]
            )?,
            revert_seconds: register_histogram_vec!(
                "squall_revert_duration_seconds",
                "Time that reverts took.",
                &["kind"],
                vec![0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
            )?,
            packets: register_int_counter_vec!(
                "squall_fault_packets_total",
                "Packets that faults were about, by what became of them.",
                &["kind", "effect"]
            )?,
            counted: Mutex::default(),
        })
    }

    /// A connection or a call was not let in.
    pub fn refused(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    /// An injection is over.
    pub fn ended(&self, kind: &str, state: v1::State) {
        self.ended.with_label_values(&[kind, state.as_str_name()]).inc();
    }

    /// What the injections are doing now.
    fn count(&self, injections: &[Injection]) {
        self.injections.reset();
        for injection in injections {
            self.injections
                .with_label_values(&[injection.kind.as_str(), injection.state().as_str_name()])
                .inc();
        }
    }

    /// What the injections did since they were counted last.
    fn count_packets(&self, injections: &[Injection]) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.retain(|id, _| injections.iter().any(|injection| injection.id == *id));
        for injection in injections {
            let before = counted.entry(injection.id.clone()).or_default();
            let figures = injection.effect.iter().flat_map(|effect| &effect.figures);
            for figure in figures.filter(|figure| figure.unit == "packets") {
                let now = figure.value as u64;
                let before = before.entry(figure.name.clone()).or_default();
                self.packets
                    .with_label_values(&[injection.kind.as_str(), figure.name.as_str()])
                    .inc_by(now.saturating_sub(*before));
                *before = now;
            }
        }
    }

    /// A revert was tried.
    pub fn revert(&self, kind: &str, took: Duration, succeeded: bool) {
        self.revert_seconds.with_label_values(&[kind]).observe(took.as_secs_f64());
        if !succeeded {
            self.failed_reverts.with_label_values(&[kind]).inc();
        }
    }
}

/// Serves `/metrics`, on loopback only: there is no authentication here.
pub async fn serve(address: SocketAddr, engine: Engine) -> Result<()> {
    ensure!(
        address.ip().is_loopback(),
        "--metrics {address}: not a loopback address; give 127.0.0.1:PORT or off"
    );
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("--metrics {address}: cannot listen there; give another port, or off"))?;
    let app = Router::new().route("/metrics", get(text)).with_state(engine);
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(())
}

async fn text(State(engine): State<Engine>) -> ([(header::HeaderName, &'static str); 1], Vec<u8>) {
    // Where one is forgotten just while it is asked, all are asked again at the next scrape.
    if let Ok(injections) = engine.observe(&[]).await {
        METRICS.count(&injections);
        METRICS.count_packets(&injections);
    }
    let mut body = Vec::new();
    TextEncoder::new().encode(&prometheus::gather(), &mut body).expect("a Vec takes every byte");
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_counted_once_however_often_one_looks() {
        let injection = |id: &str, dropped: f64| Injection {
            id: id.to_owned(),
            kind: "counted".to_owned(),
            effect: Some(v1::Effect {
                bit: true,
                figures: vec![
                    v1::Figure { name: "dropped".to_owned(), value: dropped, unit: "packets".to_owned() },
                    v1::Figure { name: "rtt".to_owned(), value: 9.0, unit: "seconds".to_owned() },
                ],
            }),
            ..Injection::default()
        };
        METRICS.count_packets(&[injection("a", 3.0)]);
        METRICS.count_packets(&[injection("a", 5.0), injection("b", 2.0)]);
        METRICS.count_packets(&[injection("b", 2.0)]);
        assert_eq!(METRICS.packets.with_label_values(&["counted", "dropped"]).get(), 7);
    }
}
