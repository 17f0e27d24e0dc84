//! Open-loop HTTP load at a constant rate.
//!
//! Requests are *due* on a schedule that no answer can hold up, and their latency counts from there: a service that
//! stalls cannot slow the generator down and so look better (coordinated omission), and neither can a generator that
//! is late itself hide what it did, since that is counted beside.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use hdrhistogram::Histogram;
use reqwest::{Client, Request};
use tokio::{sync::mpsc, task::JoinSet};

use super::{Open, Second, client, kind_of};
use crate::{
    clock::Clock,
    event::{LoadBin, What},
    plan::{Expect, JsonCheck, JsonPath, JsonStep, Load},
};

/// A request that leaves this much after it was due is late, seconds.
const LATE: f64 = 0.01;

/// How often it says how the seconds stand that are not told of yet, seconds.
const SHOW_EVERY: f64 = 0.1;

/// Most requests sent before answers are looked at, where many are due at once.
const BATCH: usize = 64;

/// How a request ended.
struct Answer {
    /// Number of its second.
    second: u64,
    /// From the time it was due, microseconds.
    latency: u64,
    late: bool,
    /// Why it failed; none where it did well.
    failure: Option<String>,
}

/// Sends requests and tells of each second once all its requests have ended, in order.
pub(super) async fn run(name: String, load: Load, clock: Clock, tx: mpsc::UnboundedSender<What>, open: Open) {
    let (client, template) = match prepare(&load) {
        Ok(prepared) => prepared,
        Err(e) => {
            let error = format!("no request can be made of the plan: {e}");
            let _ = tx.send(What::ProbeFailed { probe: name, error });
            return;
        }
    };
    // Dropped with this task, and all requests with it.
    let mut in_flight = JoinSet::new();
    let start = clock.next_second();
    let mut bins = Bins::new(start as u64);
    let mut sent: u64 = 0;
    let mut shown = f64::NEG_INFINITY;
    // From the count, not from the time before: no rounding adds up, and a late batch keeps its due times.
    let due_at = |sent: u64| start + sent as f64 / load.rate;
    loop {
        for _ in 0..BATCH {
            let due = due_at(sent);
            if due > clock.now() {
                break;
            }
            sent += 1;
            let second = (due + 1e-9) as u64;
            if in_flight.len() >= load.max_in_flight {
                bins.drop_one(second);
            } else if let Some(request) = template.try_clone() {
                bins.due(second);
                in_flight.spawn(send(client.clone(), request, load.expect.clone(), clock, second, due));
            }
        }
        while let Some(Ok(answer)) = in_flight.try_join_next() {
            bins.take(&answer);
        }
        let (now, due) = (clock.now(), due_at(sent));
        for bin in bins.told(now.min(due)) {
            if tx.send(What::Load { probe: name.clone(), bin }).is_err() {
                return;
            }
        }
        if now - shown >= SHOW_EVERY {
            open.set(&name, bins.open(now.min(due)));
            shown = now;
        }
        if due <= now {
            tokio::task::yield_now().await;
            continue;
        }
        let wake = due.min(now + SHOW_EVERY).min(now.floor() + 1.0);
        tokio::select! {
            biased;
            () = clock.wait_until(wake) => {}
            Some(answer) = in_flight.join_next() => {
                // A task that panicked would leave its second open for ever, and the run would say so.
                if let Ok(answer) = answer {
                    bins.take(&answer);
                }
            }
            () = tx.closed() => return,
        }
    }
}

fn prepare(load: &Load) -> anyhow::Result<(Client, Request)> {
    let client = client(load.max_in_flight)?;
    let mut request = client.request(load.method.parse()?, &load.url);
    for (name, value) in &load.headers {
        request = request.header(name, value);
    }
    if let Some(body) = &load.body {
        request = request.body(body.clone());
    }
    let request = request.build()?;
    Ok((client, request))
}

/// Sends one request. Whatever is still under way when its time is up is dropped, which closes the connection: a late
/// answer can never be taken for that of the next request.
async fn send(
    client: Client,
    request: Request,
    expect: Expect,
    clock: Clock,
    second: u64,
    due: f64,
) -> Answer {
    let left = clock.now();
    let limit = expect.within.as_secs_f64();
    let remaining = Duration::from_secs_f64((due + limit - left).max(0.0));
    let failure = match tokio::time::timeout(remaining, exchange(&client, request, &expect)).await {
        Ok(failure) => failure,
        Err(_) => Some("timeout".to_owned()),
    };
    let took = clock.now() - due;
    // The timer is a little late at times, the clock is not.
    let failure = if took > limit { Some("timeout".to_owned()) } else { failure };
    Answer { second, latency: (took * 1e6) as u64, late: left - due > LATE, failure }
}

/// Why an exchange failed; none where the answer is the one expected.
async fn exchange(client: &Client, request: Request, expect: &Expect) -> Option<String> {
    let response = match client.execute(request).await {
        Ok(response) => response,
        Err(e) => return Some(kind_of(&e).to_owned()),
    };
    let status = response.status().as_u16();
    // The body is read to its end also where nobody looks at it, or the connection could not be used again.
    let body = match response.bytes().await {
        Ok(body) => body,
        Err(e) => return Some(kind_of(&e).to_owned()),
    };
    if status != expect.status {
        return Some(format!("status {status}"));
    }
    if expect.json.is_empty() {
        return None;
    }
    let Ok(json) = serde_json::from_slice(&body) else { return Some("no json".into()) };
    let failed = expect.json.iter().find(|(path, check)| !holds(find(&json, path), check));
    failed.map(|(path, _)| format!("json {}", path.text))
}

fn find<'a>(json: &'a serde_json::Value, path: &JsonPath) -> Option<&'a serde_json::Value> {
    path.steps.iter().try_fold(json, |at, step| match step {
        JsonStep::Key(key) => at.as_object()?.get(key),
        JsonStep::Index(index) => at.as_array()?.get(*index),
    })
}

fn holds(value: Option<&serde_json::Value>, check: &JsonCheck) -> bool {
    match (check, value) {
        (JsonCheck::MinItems(n), Some(value)) => value.as_array().is_some_and(|items| items.len() >= *n),
        (JsonCheck::Equals(wanted), Some(value)) => value == wanted,
        (JsonCheck::Exists, Some(value)) => !value.is_null(),
        (_, None) => false,
    }
}

/// The seconds not told of yet.
struct Bins {
    /// Number of the first of them.
    first: u64,
    open: VecDeque<Filling>,
}

/// A second under way.
struct Filling {
    due: u64,
    ended: u64,
    late: u64,
    dropped: u64,
    failed: BTreeMap<String, u64>,
    ok: Histogram<u64>,
    bad: Histogram<u64>,
}

impl Bins {
    fn new(first: u64) -> Self {
        Self { first, open: VecDeque::new() }
    }

    fn at(&mut self, second: u64) -> &mut Filling {
        let index = second.saturating_sub(self.first) as usize;
        while self.open.len() <= index {
            self.open.push_back(Filling::new());
        }
        &mut self.open[index]
    }

    fn due(&mut self, second: u64) {
        self.at(second).due += 1;
    }

    fn drop_one(&mut self, second: u64) {
        let open = self.at(second);
        open.due += 1;
        open.ended += 1;
        open.dropped += 1;
        *open.failed.entry("dropped".into()).or_default() += 1;
    }

    fn take(&mut self, answer: &Answer) {
        let open = self.at(answer.second);
        open.ended += 1;
        open.late += u64::from(answer.late);
        match &answer.failure {
            None => record(&mut open.ok, answer.latency),
            Some(why) => {
                record(&mut open.bad, answer.latency);
                *open.failed.entry(why.clone()).or_default() += 1;
            }
        }
    }

    /// The seconds that are over at `now`, in order, as they stand.
    fn open(&self, now: f64) -> Vec<Second> {
        let seconds = self.open.iter().zip(self.first..).map(|(second, number)| Second {
            start: number as f64,
            due: second.due,
            failed: second.failed.values().sum(),
        });
        seconds.take_while(|second| second.start + 1.0 <= now + 1e-9).collect()
    }

    /// The seconds, in order, that are over at `now` and of which every request has ended.
    fn told(&mut self, now: f64) -> Vec<LoadBin> {
        let mut told = Vec::new();
        while (self.first + 1) as f64 <= now + 1e-9 {
            let first = self.first;
            let open = self.at(first);
            if open.ended < open.due {
                break;
            }
            told.push(open.bin(first as f64));
            self.open.pop_front();
            self.first += 1;
        }
        told
    }
}

/// Records into a histogram that grows; it does so for any number of microseconds that a clock can show.
fn record(histogram: &mut Histogram<u64>, us: u64) {
    histogram.record(us).expect("the histogram grows");
}

impl Filling {
    fn new() -> Self {
        // Grows as values come.
        let histogram = || Histogram::new(3).expect("three digits are within the bounds of hdrhistogram");
        let (ok, bad) = (histogram(), histogram());
        Self { due: 0, ended: 0, late: 0, dropped: 0, failed: BTreeMap::new(), ok, bad }
    }

    fn bin(&self, start: f64) -> LoadBin {
        let pairs = |h: &Histogram<u64>| {
            h.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect()
        };
        LoadBin {
            start,
            due: self.due,
            ok: self.ok.len(),
            failed: self.failed.clone(),
            late: self.late,
            dropped: self.dropped,
            ok_latency: pairs(&self.ok),
            failed_latency: pairs(&self.bad),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use axum::{Json, Router, extract::ConnectInfo, routing::get};
    use serde_json::json;
    use tokio::net::TcpListener;

    use super::*;

    /// A service on loopback that stops with the test.
    async fn serve(app: Router) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = listener.local_addr().expect("is bound");
        let app = app.into_make_service_with_connect_info::<std::net::SocketAddr>();
        tokio::spawn(async move { axum::serve(listener, app).await });
        format!("http://{address}/")
    }

    fn load(url: &str, rate: f64) -> Load {
        let within = Duration::from_millis(500);
        Load {
            url: url.into(),
            method: "GET".into(),
            headers: BTreeMap::new(),
            body: None,
            rate,
            expect: Expect { status: 200, json: vec![], within },
            max_in_flight: 1000,
        }
    }

    /// The first bins of a load; the generator is stopped after.
    async fn bins(load: Load, seconds: usize) -> Vec<LoadBin> {
        let (tx, mut rx) = mpsc::unbounded_channel();
        let generator = tokio::spawn(run("web".into(), load, Clock::start(), tx, Open::default()));
        let mut bins = Vec::new();
        while bins.len() < seconds {
            match rx.recv().await.expect("the generator runs") {
                What::Load { bin, .. } => bins.push(bin),
                other => panic!("{other:?}"),
            }
        }
        generator.abort();
        bins
    }

    fn consistent(bin: &LoadBin) {
        let count = |pairs: &[(u64, u64)]| pairs.iter().map(|(_, n)| n).sum::<u64>();
        let failed: u64 = bin.failed.values().sum();
        assert_eq!(bin.due, bin.ok + failed, "{bin:?}");
        assert_eq!(count(&bin.ok_latency), bin.ok, "{bin:?}");
        assert_eq!(count(&bin.failed_latency), failed - bin.dropped, "{bin:?}");
        assert!(bin.ok_latency.is_sorted() && bin.failed_latency.is_sorted());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_second_has_the_requests_that_were_due_in_it() {
        let peers = Arc::new(std::sync::Mutex::new(std::collections::BTreeSet::new()));
        let seen = Arc::clone(&peers);
        let app = Router::new().route(
            "/",
            get(move |ConnectInfo(peer): ConnectInfo<std::net::SocketAddr>| async move {
                seen.lock().expect("not poisoned").insert(peer);
            }),
        );
        let bins = bins(load(&serve(app).await, 100.0), 3).await;
        for (i, bin) in bins.iter().enumerate() {
            consistent(bin);
            assert_eq!((bin.start, bin.due), (bins[0].start + i as f64, 100));
            assert_eq!(bin.start.fract(), 0.0);
        }
        let connections = peers.lock().expect("not poisoned").len();
        assert!(connections < 100, "connections are kept alive: {connections} for 300 requests");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_stall_is_seen_by_all_that_were_due_in_it() {
        // One request in 50 takes 400 ms during which the service answers nobody else.
        let lock = Arc::new(tokio::sync::Mutex::new(0_u64));
        let app = Router::new().route(
            "/",
            get(move || {
                let lock = Arc::clone(&lock);
                async move {
                    let mut served = lock.lock().await;
                    *served += 1;
                    if *served == 50 {
                        tokio::time::sleep(Duration::from_millis(400)).await;
                    }
                }
            }),
        );
        let bins = bins(load(&serve(app).await, 100.0), 2).await;
        let slow =
            |b: &LoadBin| b.ok_latency.iter().filter(|(us, _)| *us > 100_000).map(|(_, n)| n).sum::<u64>();
        let slow: u64 = bins.iter().map(slow).sum();
        // A closed loop would have seen one.
        assert!(slow >= 20, "{slow} of those that were due in the stall waited");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_is_not_expected_fails_by_name() {
        let app = Router::new()
            .route("/", get(|| async { Json(json!({"items": [1, 2], "fallback": true, "none": null})) }))
            .route("/broken", get(|| async { axum::http::StatusCode::INTERNAL_SERVER_ERROR }))
            .route("/text", get(|| async { "no json" }))
            .route("/never", get(std::future::pending::<()>));
        let base = serve(app).await;
        let key = |key: &str| JsonPath { text: format!("$.{key}"), steps: vec![JsonStep::Key(key.into())] };
        let item = JsonPath {
            text: "$.items[1]".into(),
            steps: vec![JsonStep::Key("items".into()), JsonStep::Index(1)],
        };
        let cases = [
            ("", vec![], None),
            ("", vec![(key("items"), JsonCheck::MinItems(2)), (item, JsonCheck::Equals(json!(2)))], None),
            ("", vec![(key("items"), JsonCheck::MinItems(3))], Some("json $.items")),
            ("", vec![(key("fallback"), JsonCheck::Equals(json!(false)))], Some("json $.fallback")),
            ("", vec![(key("none"), JsonCheck::Exists)], Some("json $.none")),
            ("", vec![(key("gone"), JsonCheck::Exists)], Some("json $.gone")),
            ("text", vec![(key("gone"), JsonCheck::Exists)], Some("no json")),
            ("broken", vec![], Some("status 500")),
            ("never", vec![], Some("timeout")),
        ];
        for (path, json, failure) in cases {
            let mut load = load(&format!("{base}{path}"), 20.0);
            load.expect.json = json;
            let bin = bins(load, 1).await.remove(0);
            consistent(&bin);
            match failure {
                None => assert_eq!(bin.ok, 20, "{bin:?}"),
                Some(why) => assert_eq!(bin.failed, [(why.to_owned(), 20)].into(), "{bin:?}"),
            }
            if failure == Some("timeout") {
                assert!(bin.failed_latency.iter().all(|(us, _)| *us >= 499_000), "{bin:?}");
            }
        }
        let closed = bins(load("http://127.0.0.1:1/", 20.0), 1).await.remove(0);
        assert_eq!(closed.failed, [("connect".to_owned(), 20)].into());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_too_many_in_flight_is_dropped_and_counted() {
        let app = Router::new().route("/", get(std::future::pending::<()>));
        let mut load = load(&serve(app).await, 50.0);
        (load.max_in_flight, load.expect.within) = (5, Duration::from_secs(3));
        let bin = bins(load, 1).await.remove(0);
        consistent(&bin);
        assert_eq!((bin.due, bin.dropped, bin.failed["timeout"]), (50, 45, 5), "{bin:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nothing_is_sent_once_it_is_aborted() {
        let hits = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&hits);
        let app = Router::new().route(
            "/",
            get(move || {
                count.fetch_add(1, Ordering::Relaxed);
                std::future::pending::<()>()
            }),
        );
        let (tx, mut rx) = mpsc::unbounded_channel();
        let generator = tokio::spawn(run(
            "web".into(),
            load(&serve(app).await, 100.0),
            Clock::start(),
            tx,
            Open::default(),
        ));
        while hits.load(Ordering::Relaxed) < 10 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        generator.abort();
        assert!(generator.await.expect_err("was aborted").is_cancelled());
        let after = hits.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(hits.load(Ordering::Relaxed) <= after + 2, "requests went on");
        while rx.recv().await.is_some() {}
    }

    #[test]
    fn seconds_are_told_in_order_and_only_when_all_their_requests_have_ended() {
        let mut bins = Bins::new(5);
        let answer = |second| Answer { second, latency: 1000, late: false, failure: None };
        bins.due(5);
        bins.due(6);
        bins.take(&answer(6));
        assert!(bins.told(7.0).is_empty(), "second 5 has one under way");
        bins.take(&answer(5));
        let told: Vec<_> = bins.told(7.5).iter().map(|b| (b.start, b.due, b.ok)).collect();
        assert_eq!(told, [(5.0, 1, 1), (6.0, 1, 1)]);
        // A second without requests is told too: silence there is no missing sample.
        assert_eq!(bins.told(8.0).iter().map(|b| b.due).collect::<Vec<_>>(), [0]);
    }
}
