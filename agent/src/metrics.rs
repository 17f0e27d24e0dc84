//! What the agent tells Prometheus. Few labels, never an id.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use axum::{Router, extract::State, http::header, routing::get};
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use prometheus::{
    Encoder, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, TextEncoder,
    core::{Collector, Desc},
    proto, register, register_histogram_vec, register_int_counter, register_int_counter_vec,
    register_int_gauge_vec,
};
use squall_proto::v1::{self, Injection};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};
use tracing::debug;

use crate::engine::Engine;

/// Anybody on this host may ask, and a descriptor that he holds is one that a revert lacks: so many at once, and each so long.
const MOST_SCRAPES: usize = 8;
const LONGEST_SCRAPE: Duration = Duration::from_secs(5);
/// Pause after an accept that failed: there are no file descriptors left, most likely.
const PAUSE: Duration = Duration::from_millis(100);

/// All metrics of this process.
pub static METRICS: LazyLock<Metrics> =
    LazyLock::new(|| Metrics::register().expect("metric names are unique"));

/// The metrics.
pub struct Metrics {
    /// Undo records that cannot be read.
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
    delays: Delays,
}

/// The delays really added to packets. They are counted in the kernel, so that they cannot be observed one by one.
#[derive(Clone)]
struct Delays(Arc<Mutex<DelaysByKind>>, Desc);

#[derive(Default)]
struct DelaysByKind {
    /// Packets and the sum of their delays in nanoseconds by bound: of each injection, as it was seen last.
    seen: BTreeMap<String, BTreeMap<u64, (u64, u64)>>,
    /// The same of all injections of each kind so far, the bound being a power of two.
    total: BTreeMap<String, BTreeMap<u64, (u64, u64)>>,
}

impl Delays {
    fn register() -> prometheus::Result<Self> {
        let help = "Delays really added to packets by faults.".to_owned();
        let desc = Desc::new(
            "squall_fault_delay_seconds".to_owned(),
            help,
            vec!["kind".to_owned()],
            HashMap::new(),
        )?;
        let delays = Self(Arc::default(), desc);
        register(Box::new(delays.clone()))?;
        Ok(delays)
    }

    fn lock(&self) -> MutexGuard<'_, DelaysByKind> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what injections did since they were counted last.
    fn count(&self, injections: &[Injection]) {
        let DelaysByKind { seen, total } = &mut *self.lock();
        seen.retain(|id, _| injections.iter().any(|injection| injection.id == *id));
        for injection in injections {
            for bucket in injection.effect.iter().flat_map(|effect| &effect.delays) {
                let seen = seen.entry(injection.id.clone()).or_default();
                let (count, sum) =
                    seen.insert(bucket.up_to_ns, (bucket.count, bucket.sum_ns)).unwrap_or_default();
                let total = total.entry(injection.kind.clone()).or_default();
                let total = total.entry(bucket.up_to_ns.next_power_of_two()).or_default();
                total.0 += bucket.count.saturating_sub(count);
                total.1 += bucket.sum_ns.saturating_sub(sum);
            }
        }
    }
}

impl Collector for Delays {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.1]
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        let metric = |(kind, buckets): (&String, &BTreeMap<u64, (u64, u64)>)| {
            let mut histogram = proto::Histogram::default();
            let (mut count, mut sum) = (0, 0);
            let mut cumulative = Vec::new();
            for (&up_to, &(packets, nanoseconds)) in buckets {
                count += packets;
                sum += nanoseconds;
                let mut bucket = proto::Bucket::default();
                bucket.set_upper_bound(up_to as f64 / 1e9);
                bucket.set_cumulative_count(count);
                cumulative.push(bucket);
            }
            histogram.set_bucket(cumulative);
            histogram.set_sample_count(count);
            histogram.set_sample_sum(sum as f64 / 1e9);
            let mut label = proto::LabelPair::default();
            label.set_name("kind".to_owned());
            label.set_value(kind.clone());
            let mut metric = proto::Metric::from_label(vec![label]);
            metric.set_histogram(histogram);
            metric
        };
        let mut family = proto::MetricFamily::default();
        family.set_name(self.1.fq_name.clone());
        family.set_help(self.1.help.clone());
        family.set_field_type(proto::MetricType::HISTOGRAM);
        family.set_metric(self.lock().total.iter().map(metric).collect());
        vec![family]
    }
}

impl Metrics {
    fn register() -> prometheus::Result<Self> {
        let info = register_int_gauge_vec!("squall_agent_info", "Always 1; what runs here.", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Self {
            unreadable_records: register_int_counter!(
                "squall_journal_unreadable_records_total",
                "Undo records that could not be read when the agent started."
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
            delays: Delays::register()?,
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
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("--metrics {address}: cannot listen there; give another port, or off"))?;
    answer(listener, Router::new().route("/metrics", get(text)).with_state(engine));
    Ok(())
}

fn answer(listener: TcpListener, app: Router) {
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(MOST_SCRAPES));
        // Never closed. Whoever comes too many waits in the kernel, where he costs no descriptor of ours.
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            let Ok((stream, _)) = listener.accept().await.inspect_err(|e| debug!("cannot accept: {e}"))
            else {
                sleep(PAUSE).await;
                continue;
            };
            let service = TowerToHyperService::new(app.clone());
            tokio::spawn(async move {
                let served =
                    http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
                let _slow_or_gone = timeout(LONGEST_SCRAPE, served).await;
                drop(place);
            });
        }
    });
}

async fn text(State(engine): State<Engine>) -> ([(header::HeaderName, &'static str); 1], Vec<u8>) {
    // Where one is forgotten just while it is asked, all are asked again at the next scrape.
    if let Ok(injections) = engine.observe(&[]).await {
        METRICS.count(&injections);
        METRICS.count_packets(&injections);
        METRICS.delays.count(&injections);
    }
    let mut body = Vec::new();
    TextEncoder::new().encode(&prometheus::gather(), &mut body).expect("a Vec takes every byte");
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], body)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        time::Instant,
    };

    use super::*;

    /// Every connection is a descriptor, and whoever reverts needs some.
    #[tokio::test]
    async fn who_asks_for_nothing_or_for_too_much_has_his_place_for_a_while() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        answer(listener, Router::new().route("/metrics", get(async || "figures")));
        let mut silent = Vec::new();
        for _ in 0..MOST_SCRAPES {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let started = Instant::now();
        let mut one = TcpStream::connect(address).await.unwrap();
        one.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        one.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("figures"), "{answer}");
        assert!(started.elapsed() > LONGEST_SCRAPE / 2, "there was a place for one more");
        for mut connection in silent {
            let ended = timeout(LONGEST_SCRAPE, connection.read(&mut [0])).await;
            assert_eq!(ended.expect("it is still open").unwrap_or(0), 0);
        }
    }

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
                delays: vec![],
            }),
            ..Injection::default()
        };
        METRICS.count_packets(&[injection("a", 3.0)]);
        METRICS.count_packets(&[injection("a", 5.0), injection("b", 2.0)]);
        METRICS.count_packets(&[injection("b", 2.0)]);
        assert_eq!(METRICS.packets.with_label_values(&["counted", "dropped"]).get(), 7);
    }

    #[test]
    fn delays_are_a_histogram_of_all_injections() {
        let injection = |id: &str, counts: [u64; 2]| {
            let bucket =
                |(up_to_ns, count)| v1::DelayBucket { up_to_ns, count, sum_ns: count * (up_to_ns - 1000) };
            let delays = [1_200_000, 3_000_000].into_iter().zip(counts).map(bucket).collect();
            let effect = v1::Effect { delays, ..v1::Effect::default() };
            Injection {
                id: id.to_owned(),
                kind: "late".to_owned(),
                effect: Some(effect),
                ..Injection::default()
            }
        };
        METRICS.delays.count(&[injection("a", [3, 0])]);
        METRICS.delays.count(&[injection("a", [5, 1]), injection("b", [0, 4])]);
        METRICS.delays.count(&[injection("b", [0, 4])]);
        let mut text = Vec::new();
        TextEncoder::new().encode(&METRICS.delays.collect(), &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        for line in [
            "# TYPE squall_fault_delay_seconds histogram",
            "squall_fault_delay_seconds_bucket{kind=\"late\",le=\"0.002097152\"} 5",
            "squall_fault_delay_seconds_bucket{kind=\"late\",le=\"0.004194304\"} 10",
            "squall_fault_delay_seconds_bucket{kind=\"late\",le=\"+Inf\"} 10",
            "squall_fault_delay_seconds_count{kind=\"late\"} 10",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }
}
