//! A Prometheus text endpoint: a gauge, the rate of a counter, or what was added to the buckets of a histogram.

use std::{collections::BTreeMap, time::Duration};

use tokio::sync::mpsc;

use super::{
    client,
    exposition::{self, Page, Sample},
    kind_of,
};
use crate::{clock::Clock, event::What, plan::Scrape};

/// Says when a process started, in most client libraries: a new one has new counters and gauges.
const START: &str = "process_start_time_seconds";

/// Shortest time a scrape may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(1);

/// Scrapes on whole multiples of the time between scrapes.
pub(super) async fn run(name: String, scrape: Scrape, clock: Clock, tx: mpsc::UnboundedSender<What>) {
    let client = match client(1) {
        Ok(client) => client,
        Err(e) => {
            let error = format!("no client can be made: {e}");
            let _ = tx.send(What::ProbeFailed { probe: name, error });
            return;
        }
    };
    let every = scrape.every.as_secs_f64();
    let start = clock.next_second();
    let mut series = Series::new(name, scrape);
    let mut count: f64 = 0.0;
    loop {
        clock.wait_until(start + count * every).await;
        let events = match fetch(&client, &series.scrape).await {
            Ok(text) => series.take(clock.now(), &text),
            Err(error) => vec![What::ProbeFailed { probe: series.name.clone(), error }],
        };
        for what in events {
            if tx.send(what).is_err() {
                return;
            }
        }
        // A scrape that took too long leaves out those that were due meanwhile; they are missed, not made up.
        count = (count + 1.0).max(((clock.now() - start) / every).ceil());
    }
}

async fn fetch(client: &reqwest::Client, scrape: &Scrape) -> Result<String, String> {
    let url = &scrape.url;
    let patience = scrape.every.max(PATIENCE);
    let request = client.get(url).header("accept", "text/plain;version=0.0.4").timeout(patience);
    let failed = |e: reqwest::Error| format!("GET {url}: {} ({})", kind_of(&e), cause(&e));
    let response = request.send().await.map_err(failed)?;
    if !response.status().is_success() {
        return Err(format!("GET {url}: status {}", response.status().as_u16()));
    }
    response.text().await.map_err(failed)
}

/// The innermost cause: `connection refused`, not `error sending request`.
fn cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Gauge,
    Counter,
    Histogram,
}

/// Cumulative counts by upper bound, ascending.
type Cumulative = Vec<(f64, f64)>;

/// The series that are watched, and what they were at the scrape before.
struct Series {
    name: String,
    scrape: Scrape,
    started: Option<f64>,
    counters: Option<(f64, BTreeMap<String, f64>)>,
    histograms: Option<BTreeMap<String, Cumulative>>,
}

impl Series {
    fn new(name: String, scrape: Scrape) -> Self {
        Self { name, scrape, started: None, counters: None, histograms: None }
    }

    /// Takes in a page scraped at this time.
    fn take(&mut self, now: f64, text: &str) -> Vec<What> {
        match self.read(now, text) {
            Ok(events) => events,
            Err(error) => vec![What::ProbeFailed { probe: self.name.clone(), error }],
        }
    }

    fn read(&mut self, now: f64, text: &str) -> Result<Vec<What>, String> {
        let page =
            exposition::parse(text).map_err(|e| format!("{} is no metrics page: {e}", self.scrape.url))?;
        let mut events: Vec<What> = self.restarted(&page).into_iter().collect();
        let what = match self.kind(&page)? {
            Kind::Gauge => Some(self.gauge(&page)?),
            Kind::Counter => self.counter(now, &page)?,
            Kind::Histogram => self.histogram(&page)?,
        };
        // A replaced process resets its counters too; that is one event, not two.
        if let Some(what) = what
            && (!matches!(what, What::ProbeReset { .. }) || events.is_empty())
        {
            events.push(what);
        }
        Ok(events)
    }

    fn restarted(&mut self, page: &Page) -> Option<What> {
        let now = page.samples.iter().find(|s| s.name == START)?.value;
        let before = self.started.replace(now)?;
        (before != now).then(|| self.reset("the process was replaced".into()))
    }

    fn reset(&self, reason: String) -> What {
        What::ProbeReset { probe: self.name.clone(), reason }
    }

    /// Samples of that name with the labels asked for.
    fn matching<'p>(&self, page: &'p Page, name: &str) -> Vec<&'p Sample> {
        let labelled = |s: &Sample| self.scrape.labels.iter().all(|(k, v)| s.labels.get(k) == Some(v));
        page.samples.iter().filter(|s| s.name == name && labelled(s)).collect()
    }

    fn kind(&self, page: &Page) -> Result<Kind, String> {
        let metric = &self.scrape.metric;
        let of = |family: &str| page.types.get(family).map(String::as_str);
        if !self.matching(page, metric).is_empty() {
            // OpenMetrics names a counter's family without its suffix.
            let part = |suffix| metric.strip_suffix(suffix).and_then(of);
            let parts = [part("_count"), part("_sum"), part("_bucket")];
            let counter = of(metric) == Some("counter")
                || metric.ends_with("_total")
                || parts.iter().any(|p| matches!(p, Some("histogram" | "summary")));
            return Ok(if counter { Kind::Counter } else { Kind::Gauge });
        }
        if !self.matching(page, &format!("{metric}_bucket")).is_empty() {
            return Ok(Kind::Histogram);
        }
        let named = |s: &Sample| s.name == *metric || s.name.strip_suffix("_bucket") == Some(metric);
        Err(if page.samples.iter().any(named) {
            format!("no series of {metric} has the labels {:?}", self.scrape.labels)
        } else {
            format!("{} has no metric {metric}", self.scrape.url)
        })
    }

    fn gauge(&self, page: &Page) -> Result<What, String> {
        let value: f64 = self.matching(page, &self.scrape.metric).iter().map(|s| s.value).sum();
        if !value.is_finite() {
            return Err(format!("{} is {value}", self.scrape.metric));
        }
        Ok(What::Gauge { probe: self.name.clone(), value, rate: false })
    }

    /// The rate since the scrape before. A series that is new since then counted from zero, which is what it did.
    fn counter(&mut self, now: f64, page: &Page) -> Result<Option<What>, String> {
        let metric = self.scrape.metric.clone();
        let series: BTreeMap<String, f64> =
            self.matching(page, &metric).iter().map(|s| (identity(s), s.value)).collect();
        if let Some((_, value)) = series.iter().find(|(_, v)| !v.is_finite()) {
            return Err(format!("{metric} is {value}"));
        }
        let Some((then, before)) = self.counters.replace((now, series.clone())) else { return Ok(None) };
        for (id, was) in &before {
            match series.get(id) {
                None => return Ok(Some(self.reset(format!("{metric}{id} is gone")))),
                Some(is) if is < was => {
                    return Ok(Some(self.reset(format!("{metric}{id} fell from {was} to {is}"))));
                }
                Some(_) => {}
            }
        }
        let added = series.values().sum::<f64>() - before.values().sum::<f64>();
        let value = added / (now - then);
        Ok(value.is_finite().then(|| What::Gauge { probe: self.name.clone(), value, rate: true }))
    }

    /// What was added to each bucket since the scrape before, over all series.
    fn histogram(&mut self, page: &Page) -> Result<Option<What>, String> {
        let metric = format!("{}_bucket", self.scrape.metric);
        let mut series: BTreeMap<String, Cumulative> = BTreeMap::new();
        for sample in self.matching(page, &metric) {
            let mut labels = sample.labels.clone();
            let bound = labels.remove("le").and_then(|le| match le.as_str() {
                "+Inf" | "Inf" => Some(f64::INFINITY),
                le => le.parse().ok(),
            });
            let bound = bound.ok_or_else(|| format!("a bucket of {metric} has no bound"))?;
            let id = identity(&Sample { labels, ..sample.clone() });
            series.entry(id).or_default().push((bound, sample.value));
        }
        for (id, buckets) in &mut series {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            if buckets.last().is_none_or(|(bound, _)| bound.is_finite()) {
                return Err(format!("{metric}{id} has no bucket for +Inf"));
            }
        }
        let bounds = |buckets: &Cumulative| buckets.iter().map(|(bound, _)| *bound).collect::<Vec<_>>();
        let Some(all) = series.values().next().map(bounds) else { return Ok(None) };
        if series.values().any(|s| bounds(s) != all) {
            return Err(format!("the series of {metric} have different bounds and cannot be added up"));
        }
        let Some(before) = self.histograms.replace(series.clone()) else { return Ok(None) };
        let mut cumulative = vec![0.0; all.len()];
        for (id, now) in &series {
            for (i, (_, count)) in now.iter().enumerate() {
                cumulative[i] += count;
            }
            let Some(was) = before.get(id) else { continue };
            if bounds(was) != all || was.iter().zip(now).any(|(was, now)| now.1 < was.1) {
                return Ok(Some(self.reset(format!("{metric}{id} went backwards"))));
            }
            for (i, (_, count)) in was.iter().enumerate() {
                cumulative[i] -= count;
            }
        }
        if let Some(id) = before.keys().find(|id| !series.contains_key(*id)) {
            return Ok(Some(self.reset(format!("{metric}{id} is gone"))));
        }
        let mut below = 0.0;
        let buckets = all.iter().zip(&cumulative).map(|(bound, count)| {
            // A page that was written while it was counted may be off by a few.
            let added = (count - below).max(0.0);
            below = count.max(below);
            (bound.is_finite().then_some(*bound), added as u64)
        });
        Ok(Some(What::Buckets { probe: self.name.clone(), buckets: buckets.collect() }))
    }
}

/// A series by its labels.
fn identity(sample: &Sample) -> String {
    let labels: Vec<String> = sample.labels.iter().map(|(k, v)| format!("{k}={v:?}")).collect();
    if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn series(metric: &str, labels: &[(&str, &str)]) -> Series {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let every = Duration::from_secs(1);
        let scrape = Scrape { url: "http://x/metrics".into(), metric: metric.into(), labels, every };
        Series::new("p".into(), scrape)
    }

    /// What pages a second apart, or two for an empty one, lead to.
    fn after(mut series: Series, pages: &[&str]) -> Vec<What> {
        let mut events = Vec::new();
        for (at, page) in pages.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
            events = series.take(at as f64, page);
        }
        events
    }

    fn gauge(value: f64) -> Vec<What> {
        vec![What::Gauge { probe: "p".into(), value, rate: false }]
    }

    fn rate(value: f64) -> Vec<What> {
        vec![What::Gauge { probe: "p".into(), value, rate: true }]
    }

    #[rstest]
    #[case::gauge("# TYPE m gauge\nm 7", gauge(7.0))]
    #[case::untyped("m 7", gauge(7.0))]
    #[case::summed("m{a=\"1\"} 7\nm{a=\"2\"} 8\nother 1", gauge(15.0))]
    #[case::first_of_a_counter("# TYPE m counter\nm 7", vec![])]
    fn one_page(#[case] page: &str, #[case] events: Vec<What>) {
        assert_eq!(after(series("m", &[]), &[page]), events);
    }

    #[rstest]
    #[case::missing("other 1", "has no metric m")]
    #[case::nan("m NaN", "m is NaN")]
    #[case::infinite("m 1\nm{a=\"2\"} +Inf", "m is inf")]
    #[case::no_page("<html>", "is no metrics page")]
    #[case::empty("", "has no metric m")]
    #[case::no_last_bucket("m_bucket{le=\"1\"} 3", "no bucket for +Inf")]
    #[case::mixed(
        "m_bucket{le=\"+Inf\"} 3\nm_bucket{a=\"b\",le=\"1\"} 3\nm_bucket{a=\"b\",le=\"+Inf\"} 3",
        "different bounds"
    )]
    fn what_cannot_be_read_is_a_failure(#[case] page: &str, #[case] why: &str) {
        let events = series("m", &[]).take(1.0, page);
        let [What::ProbeFailed { error, .. }] = events.as_slice() else { panic!("{events:?}") };
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn labels_pick_series() {
        let page = "m{a=\"1\",b=\"x\"} 7\nm{a=\"2\",b=\"x\"} 8";
        assert_eq!(after(series("m", &[("a", "2")]), &[page]), gauge(8.0));
        let [What::ProbeFailed { error, .. }] = &after(series("m", &[("a", "3")]), &[page])[..] else {
            panic!()
        };
        assert!(error.contains("no series of m has the labels"), "{error}");
    }

    #[rstest]
    #[case::rate("m_total", &["m_total 5", "m_total 12"], rate(7.0))]
    #[case::over_a_gap("m_total", &["m_total 5", "", "m_total 12"], rate(3.5))]
    #[case::by_type("m", &["# TYPE m counter\nm 5", "# TYPE m counter\nm 6"], rate(1.0))]
    #[case::of_a_histogram(
        "m_count",
        &["# TYPE m histogram\nm_count 5", "# TYPE m histogram\nm_count 9"],
        rate(4.0)
    )]
    #[case::a_new_series_counts_from_zero(
        "m_total",
        &["m_total{code=\"200\"} 5", "m_total{code=\"200\"} 5\nm_total{code=\"500\"} 3"],
        rate(3.0)
    )]
    fn counters_become_rates(#[case] metric: &str, #[case] pages: &[&str], #[case] events: Vec<What>) {
        assert_eq!(after(series(metric, &[]), pages), events);
    }

    #[rstest]
    #[case::fell("m_total", &["m_total 5", "m_total 4"], "fell from 5 to 4")]
    #[case::one_fell_the_sum_rose(
        "m_total",
        &["m_total{a=\"1\"} 5\nm_total{a=\"2\"} 5", "m_total{a=\"1\"} 4\nm_total{a=\"2\"} 50"],
        "fell from 5 to 4"
    )]
    #[case::gone("m_total", &["m_total{a=\"1\"} 5\nm_total 1", "m_total 2"], "is gone")]
    #[case::histogram("m", &["m_bucket{le=\"+Inf\"} 5", "m_bucket{le=\"+Inf\"} 4"], "went backwards")]
    fn what_goes_backwards_is_a_reset(#[case] metric: &str, #[case] pages: &[&str], #[case] why: &str) {
        let events = after(series(metric, &[]), pages);
        let [What::ProbeReset { reason, .. }] = events.as_slice() else { panic!("{events:?}") };
        assert!(reason.contains(why), "{reason}");
    }

    #[test]
    fn a_replaced_process_is_one_reset() {
        let pages = ["process_start_time_seconds 10\nm_total 5", "process_start_time_seconds 11\nm_total 1"];
        let events = after(series("m_total", &[]), &pages);
        assert!(matches!(events.as_slice(), [What::ProbeReset { .. }]), "{events:?}");
        let pages = ["process_start_time_seconds 10\nm 5", "process_start_time_seconds 11\nm 1"];
        let events = after(series("m", &[]), &pages);
        assert!(matches!(events.as_slice(), [What::ProbeReset { .. }, What::Gauge { .. }]), "{events:?}");
    }

    #[test]
    fn histograms_give_what_was_added_to_each_bucket() {
        let page = |a: u64, b: u64, all: u64| {
            format!(
                "# TYPE m histogram\nm_bucket{{le=\"0.5\"}} {a}\nm_bucket{{le=\"1\"}} {b}\nm_bucket{{le=\"+Inf\"}} {all}"
            )
        };
        let pages = [page(10, 20, 21), page(13, 23, 26)];
        let events = after(series("m", &[]), &[&pages[0], &pages[1]]);
        let buckets = vec![(Some(0.5), 3), (Some(1.0), 0), (None, 2)];
        assert_eq!(events, [What::Buckets { probe: "p".into(), buckets }]);
    }
}
