//! The report for people: one file, whole without script and without leave to load anything.

use anyhow::Context as _;
use askama::Template;

use super::{
    RUNNING, Sign, Tally, announced, bites, chart, figure, findings, host_state, outcome_sign,
    series::{self, LoadSummary, Span, Track},
    state, verdict_sign,
};
use crate::{
    event::{Finding, Outcome, Phase},
    fold::{Injected, Round, Run},
    stats,
};

const PHASES: [(Phase, &str); 3] =
    [(Phase::Baseline, "baseline"), (Phase::Fault, "fault"), (Phase::Recovery, "recovery")];

/// The report of a run as one HTML file. The same events give the same bytes.
pub(crate) fn html(run: &Run) -> anyhow::Result<String> {
    let marks = series::marks(run);
    let tracks = series::tracks(run);
    let page = Page {
        run,
        sign: run.verdict.as_ref().map_or(RUNNING, |(v, _)| verdict_sign(*v)),
        exit: run.verdict.as_ref().map(|(v, _)| v.exit_code()),
        reason: figure::sentence(
            run.verdict.as_ref().map_or("the events end before the run did", |(_, reason)| reason),
        ),
        tally: Tally::of(run).words(),
        facts: facts(run),
        trouble: findings(run)
            .filter(|(_, f)| f.outcome != Outcome::Pass)
            .map(|(round, finding)| Trouble::of(run, round, finding))
            .collect(),
        timeline: chart::timeline(run, &marks),
        tracks: tracks.iter().map(|track| chart::track(run, track)).collect(),
        moments: moments(run, &marks),
        table: tracks.iter().flat_map(|track| track_rows(run, track)).collect(),
        rounds: run.rounds.iter().enumerate().map(|(i, round)| RoundView::of(run, i, round)).collect(),
        whole: run.findings.iter().map(GateRow::of).collect(),
        injections: run.injections.iter().map(|injected| InjectionRow::of(run, injected)).collect(),
        bites: bites(run),
        host_state: host_state(run),
        alpha_pass: figure::limit(stats::ALPHA_PASS, "ratio"),
        alpha_block: figure::limit(stats::ALPHA_BLOCK, "ratio"),
        methods: methods(run),
        notes: run.notes.iter().map(|(at, text)| (figure::clock(*at), text.as_str())).collect(),
        probes: run
            .probes
            .iter()
            .map(|(name, p)| [name.clone(), p.outline.kind.clone(), p.outline.summary.clone()])
            .collect(),
    };
    page.render().context("the report's template does not render")
}

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    run: &'a Run,
    sign: Sign,
    exit: Option<u8>,
    reason: String,
    tally: String,
    facts: Vec<(&'static str, String)>,
    trouble: Vec<Trouble>,
    timeline: String,
    tracks: Vec<String>,
    moments: Vec<[String; 3]>,
    table: Vec<[String; 7]>,
    rounds: Vec<RoundView>,
    whole: Vec<GateRow>,
    injections: Vec<InjectionRow>,
    bites: Vec<String>,
    host_state: String,
    alpha_pass: String,
    alpha_block: String,
    methods: Vec<[String; 5]>,
    notes: Vec<(String, &'a str)>,
    probes: Vec<[String; 3]>,
}

fn facts(run: &Run) -> Vec<(&'static str, String)> {
    let version = run.version.clone().unwrap_or_else(|| "not given".into());
    let started = run.started.map(|at| at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string());
    vec![
        ("plan", run.plan.clone()),
        ("version", version),
        ("run", run.id.clone()),
        ("started", started.unwrap_or_else(|| "unknown".into())),
        ("took", figure::span(run.now)),
        ("rounds", run.rounds.len().to_string()),
        ("nodes", run.nodes.len().to_string()),
        ("seed", run.seed.to_string()),
    ]
}

/// A gate that did not pass.
struct Trouble {
    sign: Sign,
    round: String,
    gate: String,
    subject: String,
    figures: Vec<(&'static str, String)>,
    reason: String,
    chart: Option<String>,
    /// Seconds from the start of the fault, and the value then.
    samples: Vec<(String, String)>,
}

impl Trouble {
    fn of(run: &Run, round: Option<&Round>, finding: &Finding) -> Self {
        let row = GateRow::of(finding);
        let track = round
            .and_then(|round| Some((round, announced(round, finding)?)))
            .and_then(|(round, gate)| series::track_of(run, round, gate));
        let fault = round.and_then(|round| round.span(Phase::Fault, run.now));
        let whole = round.and_then(|r| Some((*r.phases.values().next()?, r.finished.unwrap_or(run.now))));
        let samples = match (&track, fault, whole) {
            (Some(track), Some((zero, _)), Some(span)) => track
                .inside(span)
                .iter()
                .map(|(at, v)| (offset(at - zero), figure::value(*v, &track.unit)))
                .collect(),
            _ => Vec::new(),
        };
        Self {
            sign: outcome_sign(finding.outcome),
            round: round.map_or("whole run".into(), |r| r.outline.name.clone()),
            gate: finding.gate.clone(),
            subject: finding.subject.clone(),
            figures: vec![
                ("value", row.value),
                ("interval", row.interval),
                ("limit", row.limit),
                ("baseline", row.baseline),
                ("since", row.since),
                ("samples", row.samples),
            ],
            reason: figure::sentence(&finding.reason),
            chart: round
                .zip(track)
                .and_then(|(round, track)| chart::gate(run, round, &track, finding.baseline)),
            samples,
        }
    }
}

/// Seconds before or after the start of the fault.
fn offset(seconds: f64) -> String {
    format!("{}{:.1}s", if seconds < 0.0 { "-" } else { "+" }, seconds.abs())
}

struct GateRow {
    sign: Sign,
    gate: String,
    subject: String,
    value: String,
    interval: String,
    plot: Option<String>,
    limit: String,
    baseline: String,
    samples: String,
    since: String,
    reason: String,
    /// Whether the reason says more than the figures.
    explain: bool,
}

impl GateRow {
    fn of(finding: &Finding) -> Self {
        let dash = || "–".to_string();
        let unit = &finding.unit;
        Self {
            sign: outcome_sign(finding.outcome),
            gate: finding.gate.clone(),
            subject: finding.subject.clone(),
            value: figure::found(finding),
            interval: finding.interval.map_or_else(dash, |i| figure::interval(i, finding.value, unit)),
            plot: chart::interval(finding),
            limit: figure::limit(finding.limit, unit),
            baseline: finding.baseline.map_or_else(dash, |v| figure::value(v, unit)),
            samples: figure::count(finding.samples as f64),
            since: finding.since.map_or_else(dash, |s| format!("{} of fault", figure::clock(s))),
            reason: figure::sentence(&finding.reason),
            explain: finding.outcome != Outcome::Pass,
        }
    }
}

struct RoundView {
    number: usize,
    name: String,
    sign: Sign,
    tally: String,
    lengths: String,
    faults: Vec<String>,
    bites: Vec<InjectionRow>,
    gates: Vec<GateRow>,
    /// Gates that were announced and not judged.
    waiting: Vec<String>,
    phases: Vec<[String; 4]>,
    /// Load probes with the spectrum of their latencies.
    spectra: Vec<(String, String)>,
    reached: bool,
}

impl RoundView {
    fn of(run: &Run, index: usize, round: &Round) -> Self {
        let outline = &round.outline;
        let reached = !round.phases.is_empty();
        let none = if reached { "NOT FINISHED" } else { "NOT RUN" };
        let tally = Tally::of_round(round);
        let waiting = outline
            .gates
            .iter()
            .filter(|gate| !round.findings.iter().any(|f| f.gate == gate.gate && f.subject == gate.subject));
        let waiting = if round.findings.len() < outline.gates.len() {
            waiting.map(|g| format!("{} {} {}", g.gate, g.subject, figure::gate_limit(g))).collect()
        } else {
            Vec::new()
        };
        Self {
            number: index + 1,
            name: outline.name.clone(),
            sign: round.verdict.map_or(Sign { glyph: "–", word: none, tone: "plain" }, verdict_sign),
            tally: format!("{}/{} gates passed", tally.passed, tally.gates),
            lengths: format!(
                "baseline {}, fault {}, recovery up to {}",
                figure::span(outline.baseline),
                figure::span(outline.hold),
                figure::span(outline.recovery)
            ),
            faults: outline.faults.clone(),
            bites: run
                .injections
                .iter()
                .filter(|i| i.round == Some(index))
                .map(|i| InjectionRow::of(run, i))
                .collect(),
            gates: round.findings.iter().map(GateRow::of).collect(),
            waiting,
            phases: phase_rows(run, round),
            spectra: spectra(run, round),
            reached,
        }
    }
}

/// A value's row over a round: its name, then one cell for each phase.
fn phase_row(run: &Run, round: &Round, name: &str, cell: impl Fn(Span) -> Option<String>) -> [String; 4] {
    let [baseline, fault, recovery] =
        PHASES.map(|(phase, _)| round.span(phase, run.now).and_then(&cell).unwrap_or_else(|| "–".into()));
    [name.to_string(), baseline, fault, recovery]
}

fn phase_rows(run: &Run, round: &Round) -> Vec<[String; 4]> {
    let mut rows = Vec::new();
    for (name, probe) in &run.probes {
        if probe.outline.kind != "load" {
            continue;
        }
        let sum = |span| LoadSummary::of(run.bins(name, span));
        for q in [0.5, 0.9, 0.95, 0.99, 0.999] {
            let row = format!("{name} {}", figure::percentile(q));
            rows.push(phase_row(run, round, &row, |span| sum(span).quantile(q).map(figure::seconds)));
        }
        rows.push(phase_row(run, round, &format!("{name} slowest"), |span| {
            sum(span).longest().map(figure::seconds)
        }));
        rows.push(phase_row(run, round, &format!("{name} errors"), |span| {
            let sum = sum(span);
            let reasons: Vec<_> =
                sum.failed.iter().map(|(why, n)| format!("{} {why}", figure::count(*n as f64))).collect();
            let reasons =
                if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
            Some(format!("{}{reasons}", figure::value(sum.errors()?, "ratio")))
        }));
        rows.push(phase_row(run, round, &format!("{name} requests"), |span| {
            let sum = sum(span);
            let late = match (sum.late, sum.dropped) {
                (0, 0) => String::new(),
                (late, dropped) => format!(", {late} late, {dropped} dropped by the generator"),
            };
            (sum.due > 0).then(|| format!("{} due{late}", figure::count(sum.due as f64)))
        }));
    }
    let load = |track: &Track| {
        let of =
            |name: &String| track.name.strip_prefix(name.as_str()).is_some_and(|rest| rest.starts_with(' '));
        run.probes.iter().any(|(name, p)| p.outline.kind == "load" && of(name))
    };
    for track in series::tracks(run).iter().filter(|track| !load(track)) {
        rows.push(phase_row(run, round, &track.name, |span| {
            let (_, mean, high) = track.summary(span)?;
            let (mean, high) = (figure::limit(mean, &track.unit), figure::limit(high, &track.unit));
            Some(if mean == high { mean } else { format!("{mean} (max {high})") })
        }));
    }
    rows
}

/// The spectrum of each load probe, with the limits of the round.
fn spectra(run: &Run, round: &Round) -> Vec<(String, String)> {
    let load = run.probes.iter().filter(|(_, probe)| probe.outline.kind == "load");
    let drawn = load.filter_map(|(name, _)| {
        let seen = PHASES.iter().filter_map(|(phase, label)| {
            let span = round.span(*phase, run.now)?;
            Some((*phase, *label, LoadSummary::of(run.bins(name, span))))
        });
        let gates = round.outline.gates.iter().filter(|g| g.gate == "latency" && g.source == *name);
        let limits: Vec<_> = gates.filter_map(|g| Some((g.percentile?, g.limit))).collect();
        Some((name.clone(), chart::spectrum(name, &seen.collect::<Vec<_>>(), &limits)?))
    });
    drawn.collect()
}

/// Rows for the table under the timeline: name, round, phase, samples, lowest, mean, highest.
fn track_rows(run: &Run, track: &Track) -> Vec<[String; 7]> {
    let mut rows = Vec::new();
    for round in &run.rounds {
        for (phase, name) in PHASES {
            let Some(span) = round.span(phase, run.now) else { continue };
            let Some((low, mean, high)) = track.summary(span) else { continue };
            let v = |value| figure::limit(value, &track.unit);
            let n = track.inside(span).len().to_string();
            rows.push([
                track.name.clone(),
                round.outline.name.clone(),
                name.into(),
                n,
                v(low),
                v(mean),
                v(high),
            ]);
        }
    }
    rows
}

/// What happened when: phases, injections, reverts and marks.
fn moments(run: &Run, marks: &[series::Mark]) -> Vec<[String; 3]> {
    let mut moments: Vec<(f64, String, String)> = Vec::new();
    for round in &run.rounds {
        for (phase, name) in PHASES {
            if let Some(at) = round.phases.get(&phase) {
                moments.push((*at, round.outline.name.clone(), format!("{name} starts")));
            }
        }
        if let (Some(at), Some(verdict)) = (round.finished, round.verdict) {
            moments.push((at, round.outline.name.clone(), format!("ends in {}", verdict_sign(verdict).word)));
        }
    }
    for injected in &run.injections {
        let injection = &injected.injection;
        let on = format!("{} on {}", injection.resolved, injection.node);
        moments.push((injected.at, on.clone(), format!("injected: {}", injection.summary)));
        if let Some((at, took, reason)) = &injected.reverted {
            moments.push((*at, on, format!("reverted in {} ({reason})", figure::seconds(*took))));
        }
    }
    moments.extend(marks.iter().map(|mark| (mark.at, mark.on.clone(), mark.text.clone())));
    moments.sort_by(|a, b| a.0.total_cmp(&b.0));
    moments.into_iter().map(|(at, on, what)| [figure::clock(at), on, what]).collect()
}

struct InjectionRow {
    id: String,
    round: String,
    node: String,
    target: String,
    asked: String,
    measured: String,
    state: Sign,
    mechanism: String,
    seed: String,
    changes: Vec<String>,
    warnings: Vec<String>,
    span: String,
    reverted: String,
}

impl InjectionRow {
    fn of(run: &Run, injected: &Injected) -> Self {
        let injection = &injected.injection;
        let figures = figure::effects(&injected.figures);
        let reverted = match (&injected.stuck, &injected.reverted) {
            (Some(why), _) => format!("stuck: {why}; the agent keeps trying"),
            (None, Some((_, took, reason))) => format!("in {}, {reason}", figure::seconds(*took)),
            (None, None) => format!("not on record; ends by itself at {}", figure::clock(injection.ends)),
        };
        let end = injected.reverted.as_ref().map(|(at, ..)| *at);
        let to = end.map_or("…".into(), figure::clock);
        Self {
            id: injection.id.clone(),
            round: injected
                .round
                .and_then(|r| run.rounds.get(r))
                .map_or("–".into(), |r| r.outline.name.clone()),
            node: injection.node.clone(),
            target: injection.resolved.clone(),
            asked: injection.summary.clone(),
            measured: if figures.is_empty() { "nothing measured".into() } else { figures },
            state: state(injected),
            mechanism: injection.mechanism.clone(),
            seed: if injection.seed == 0 { "–".into() } else { injection.seed.to_string() },
            changes: injection.changes.clone(),
            warnings: injection.warnings.clone(),
            span: format!("{} to {to}", figure::clock(injected.at)),
            reverted,
        }
    }
}

/// How each gate was decided: name, samples, p-value, interval, limit.
fn methods(run: &Run) -> Vec<[String; 5]> {
    let row = |(_, finding): (Option<&Round>, &Finding)| {
        let p = match finding.p {
            Some(p) if p < 0.0001 => "< 0.0001".into(),
            Some(p) => format!("{p:.4}"),
            None => "none needed".into(),
        };
        let gate = GateRow::of(finding);
        [finding.name.clone(), gate.samples, p, gate.interval, gate.limit]
    };
    findings(run).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};
    use crate::event::{Event, What};

    /// Panics where an element is not closed, or closed out of order.
    fn balanced(html: &str) {
        let body = html.strip_prefix("<!DOCTYPE html>").expect("a doctype");
        let style = body.find("<style>").expect("a style")..body.find("</style>").expect("its end");
        let mut open: Vec<&str> = Vec::new();
        let mut at = 0;
        while let Some(start) = body[at..].find('<').map(|i| i + at) {
            let end = start + body[start..].find('>').expect("a tag ends");
            at = end + 1;
            if style.contains(&start) && start != style.start {
                continue;
            }
            let tag = &body[start + 1..end];
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "at {}", &body[start.saturating_sub(80)..=end]);
            } else if !tag.ends_with('/') {
                open.push(tag.split_whitespace().next().expect("a name"));
            }
        }
        assert!(open.is_empty(), "not closed: {open:?}");
    }

    fn sample_html() -> String {
        html(&sample::run()).expect("the sample renders")
    }

    #[test]
    fn the_page_is_well_formed_and_loads_nothing() {
        let page = sample_html();
        balanced(&page);
        assert!(page.contains("delay p50 2.01s p90 2.24s p99 2.3s, TCP RTT 400µs → 4.02s"));
        for refused in [
            "<script",
            "src=",
            "href=\"http",
            "url(http",
            "@import",
            "<link",
            "javascript:",
            " onload",
            "style=",
        ] {
            assert!(!page.contains(refused), "{refused}");
        }
        let namespaces = page.matches("http://www.w3.org/2000/svg").count();
        assert!(namespaces > 5);
        assert_eq!(page, sample_html(), "the same events give the same bytes");
    }

    #[test]
    fn the_verdict_comes_first_and_the_evidence_with_it() {
        let page = sample_html();
        let place = |text: &str| page.find(text).unwrap_or_else(|| panic!("{text} is missing"));
        let order = [
            "BLOCK",
            "In round redis-slow",
            "1.93s",
            "[1.88, 1.97]",
            "id=\"timeline\"",
            "id=\"round-1\"",
            "id=\"injected\"",
            "id=\"safety\"",
            "id=\"method\"",
            "id=\"repeat\"",
        ];
        assert!(order.map(place).is_sorted());
        for figure in [
            "11 842",
            "00:03 of fault",
            "41.3ms",
            "hold at least 3 min",
            "4 812 packets matched",
            "seed 4711",
            "undo: detach it",
            "reverted 10/10",
        ] {
            place(figure);
        }
    }

    #[test]
    fn charts_hold_the_samples() {
        let run = sample::run();
        let tracks = series::tracks(&run);
        let names: Vec<_> = tracks.iter().map(|t| t.name.as_str()).collect();
        assert!(names.starts_with(&["shoppers p95", "shoppers errors", "served p95", "tasks"]), "{names:?}");
        let shoppers = &tracks[0];
        assert_eq!(shoppers.points.len(), 225);
        assert_eq!(shoppers.rules.iter().filter(|r| matches!(r, series::Rule::Level { .. })).count(), 5);
        let svg = chart::track(&run, shoppers);
        let longest = svg.split(" d=\"").map(|path| path.matches('L').count()).max();
        assert_eq!(longest, Some(224), "one line through every second");
        assert!(svg.contains("limit 800ms"));
    }

    #[test]
    fn hostile_names_stay_text() {
        let hostile = "<img src=x onerror=alert(1)>\"'&";
        let mut events = sample::events();
        events[0].what = sample::started(hostile);
        events.push(Event { at: 1.0, what: What::Note { text: hostile.into() } });
        for event in &mut events {
            match &mut event.what {
                What::Injected { injection, .. } => {
                    (injection.summary, injection.node) = (hostile.into(), hostile.into());
                    injection.changes.push(hostile.into());
                }
                What::Judged { finding, .. } => {
                    (finding.reason, finding.subject) = (hostile.into(), hostile.into());
                }
                What::Node(node) => node.kernel = hostile.into(),
                What::RunStarted { rounds, .. } => rounds[0].name = hostile.into(),
                _ => {}
            }
        }
        let page = html(&Run::of(&events)).expect("hostile names render");
        assert!(!page.contains("<img"));
        assert!(page.contains("&lt;img") || page.contains("&#60;img"));
        balanced(&page);
    }

    #[test]
    fn a_run_cut_off_or_empty_still_makes_a_page() {
        let page = html(&sample::cut()).expect("a cut run renders");
        balanced(&page);
        assert!(page.contains("NO VERDICT") && page.contains("The events end before the run did."));
        assert!(page.contains("NOT FINISHED") && page.contains("NOT RUN"));
        let page = html(&Run::default()).expect("an empty run renders");
        balanced(&page);
        assert!(!page.contains("NaN") && !page.contains("inf"));
    }

    #[test]
    #[ignore = "writes the sample to look at: SQUALL_SAMPLE=DIR cargo test -p squall look -- --ignored"]
    fn look() {
        let dir = std::path::PathBuf::from(
            std::env::var_os("SQUALL_SAMPLE").expect("SQUALL_SAMPLE names a directory"),
        );
        std::fs::write(dir.join("report.html"), sample_html()).expect("writing the report");
        let lines: Vec<_> = sample::events()
            .iter()
            .map(|e| serde_json::to_string(e).expect("events serialize") + "\n")
            .collect();
        std::fs::write(dir.join("events.jsonl"), lines.concat()).expect("writing the events");
    }
}
