//! From the tree to a [`Plan`]. Every reader notes what is wrong and goes on, so that a person sees it all at once.

use std::{collections::BTreeMap, time::Duration};

use clap::{ValueEnum, builder::PossibleValue};

use squall_proto::v1;

use crate::{outline, replicas::Take};

use super::{
    Abort, Expect, Fault, Gate, JsonCheck, JsonPath, JsonStep, Limits, Load, Measure, OnFail, Plan, Probe,
    Round, Scrape, Target,
    fault::{Cpu, Memory, Size},
    tree::{At, Fields, did_you_mean},
    units::{self, Wrong},
};

mod network;

const DEFAULT_BASELINE: Duration = Duration::from_secs(30);
const DEFAULT_RECOVERY: Duration = Duration::from_secs(10);
/// A recovery gate looks for a run of good seconds that starts in time: it needs some past its limit.
const RECOVERY_MARGIN: Duration = Duration::from_secs(15);
const DEFAULT_MAX_IN_FLIGHT: usize = 1000;
const MOST_RATE: f64 = 100_000.0;

/// Names that other parts of the plan refer to; what was wrong with its own entry is there as none.
struct Names {
    targets: BTreeMap<String, Option<Target>>,
    probes: BTreeMap<String, Option<Probe>>,
}

/// Reads a whole plan; none where there were problems.
pub(super) fn plan(root: &At<'_>) -> Option<Plan> {
    let mut top = root.fields("a plan: apiVersion, kind, metadata, targets, probes, rounds")?;
    for (field, value) in [("apiVersion", "squall.dev/v1"), ("kind", "Plan")] {
        if let Some(at) = top.require(field, value)
            && at.shown() != value
        {
            at.problem(format!("`{}` is not known", at.shown()), format!("write {value}"));
        }
    }
    let metadata = top.require("metadata", "{ name: my-plan }").and_then(|at| metadata(&at));
    let seed = top.get("seed").and_then(|at| at.int("a whole number"));
    let names = Names {
        targets: top.get("targets").map(|at| named(&at, "targets by name", target)).unwrap_or_default(),
        probes: BTreeMap::new(),
    };
    let probes = top.get("probes").map(|at| named(&at, "probes by name", |at| probe(at, &names)));
    let names = Names { probes: probes.unwrap_or_default(), ..names };
    let plan_gates = top.get("gates").map(|at| gates(&at, &names)).unwrap_or_default();
    let limits = top.get("limits").map_or(Some(Limits::default()), |at| limits(&at, &names));
    let rounds = top.require("rounds", "[ { name: …, hold: 60s, faults: [ … ], gates: [ … ] } ]");
    let rounds = rounds.and_then(|at| rounds_of(&at, &names, !plan_gates.is_empty()));
    let on_fail = top.get("decision").map_or(Some(OnFail::default()), |at| decision(&at));
    top.finish();

    let (name, version) = metadata?;
    Some(Plan {
        name,
        version,
        seed,
        targets: names
            .targets
            .into_iter()
            .map(|(name, target)| Some((name, target?)))
            .collect::<Option<_>>()?,
        probes: names.probes.into_iter().map(|(name, probe)| Some((name, probe?))).collect::<Option<_>>()?,
        rounds: rounds?,
        gates: plan_gates,
        limits: limits?,
        on_fail: on_fail?,
        files: BTreeMap::new(),
    })
}

fn metadata(at: &At<'_>) -> Option<(String, Option<String>)> {
    let mut fields = at.fields("{ name: my-plan }")?;
    let name = fields.require("name", "my-plan").and_then(|at| at.text("a name"));
    let version = fields.get("version").and_then(|at| at.scalar("the version that is being released"));
    fields.finish();
    Some((name?, version))
}

fn decision(at: &At<'_>) -> Option<OnFail> {
    let mut fields = at.fields("{ onFail: block }")?;
    let on_fail = fields.get("onFail").map_or(Some(OnFail::default()), |at| {
        match at.text("block or rollback")?.as_str() {
            "block" => Some(OnFail::Block),
            "rollback" => Some(OnFail::Rollback),
            other => at.refuse(format!("`{other}` is not known"), "expected block or rollback"),
        }
    });
    fields.finish();
    on_fail
}

fn limits(at: &At<'_>, names: &Names) -> Option<Limits> {
    let mut fields =
        at.fields("{ nodes: 50%, replicas: 50%, injections: 4, abort: { probe: …, errors: 20%, for: 3s } }")?;
    let nodes = maybe(&mut fields, "nodes", |at| positive(at, share_of_all(at)?));
    let zone = maybe(&mut fields, "zone", |at| positive(at, share_of_all(at)?));
    let replicas = maybe(&mut fields, "replicas", |at| positive(at, share_of_all(at)?));
    let pods = maybe(&mut fields, "pods", |at| positive(at, share_of_all(at)?));
    let injections = maybe(&mut fields, "injections", |at| match at.int("a number of injections")? {
        0 => at.refuse("no round could run", "give at least 1, or leave it out"),
        most => Some(most),
    });
    let abort = maybe(&mut fields, "abort", |at| {
        let mut fields = at.fields("{ probe: the name of a load probe, errors: 20%, for: 3s }")?;
        let probe = probe_of(&mut fields, names, "errors");
        let errors = fields.require("errors", "20%").and_then(|at| share(&at));
        let window = fields.require("for", "3s").and_then(|at| match whole_seconds(&at)? {
            Duration::ZERO => at.refuse("nothing is seen in no time", "give at least 1s"),
            window => Some(window),
        });
        fields.finish();
        Some(Abort { probe: probe?, errors: errors?, window: window? })
    });
    fields.finish();
    Some(Limits {
        nodes: nodes?,
        zone: zone?,
        replicas: replicas?,
        pods: pods?,
        injections: injections?,
        abort: abort?,
    })
}

/// Entries by name, each read by `read`; one that could not be read stays as none.
fn named<T>(at: &At<'_>, expected: &str, read: impl Fn(&At<'_>) -> Option<T>) -> BTreeMap<String, Option<T>> {
    let entries = at.named(expected).unwrap_or_default();
    entries.into_iter().map(|(name, at)| (name_of(&at, name), read(&at))).collect()
}

/// Names end up in `round/gate[subject]` and in file names.
fn name_of(at: &At<'_>, name: String) -> String {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || !name.chars().all(plain) {
        at.problem(format!("`{name}` is no name"), "use letters, digits, `-`, `_` and `.`");
    }
    name
}

/// A scalar that a parser of `units` understands.
fn unit<T>(at: &At<'_>, expected: &str, parse: impl Fn(&str) -> Result<T, Wrong>) -> Option<T> {
    let text = at.scalar(expected)?;
    parse(&text).map_err(|(message, fix)| at.problem(message, fix)).ok()
}

fn duration(at: &At<'_>) -> Option<Duration> {
    unit(at, "a length of time: 300ms, 2s, 5m", units::duration)
}

/// Phases start on whole seconds, where the bins of load probes start too.
fn whole_seconds(at: &At<'_>) -> Option<Duration> {
    let d = duration(at)?;
    if d.subsec_nanos() != 0 {
        let fix = format!("write {}s or {}s", d.as_secs(), d.as_secs() + 1);
        return at.refuse("phases last whole seconds", fix);
    }
    Some(d)
}

fn share(at: &At<'_>) -> Option<f64> {
    unit(at, "a percentage: 5%", units::share)
}

/// A share, where one may well think of a number.
fn share_of_all(at: &At<'_>) -> Option<f64> {
    unit(at, "a percentage: 50%", |text| match text.trim().parse::<u64>() {
        Ok(_) => Err((
            format!("`{text}` has no unit, and is no share"),
            "write which share of all of them: 50%".into(),
        )),
        Err(_) => units::share(text),
    })
}

fn positive(at: &At<'_>, value: f64) -> Option<f64> {
    if value > 0.0 {
        Some(value)
    } else {
        at.refuse("zero does nothing", "give more than 0, or leave it out")
    }
}

// ---- targets -------------------------------------------------------------------------------------------------------

fn target(at: &At<'_>) -> Option<Target> {
    match at.one_of("target", &["process", "cgroup", "interface", "address"])? {
        ("process", at) => {
            let mut fields = at.fields("{ exe: my-service }")?;
            let pid = fields.get("pid").map(|at| at.int("a pid"));
            let exe = fields.get("exe").map(|at| at.text("a path, or its last part"));
            let cmdline = fields.get("cmdline").map(|at| at.text("a part of the command line"));
            fields.finish();
            if pid.is_none() && exe.is_none() && cmdline.is_none() {
                return at.refuse("this matches every process", "add exe, cmdline or pid");
            }
            let (pid, exe, cmdline) = (flip(pid)?, flip(exe)?, flip(cmdline)?);
            Some(Target::Process { pid, exe, cmdline })
        }
        ("cgroup", at) => {
            let mut fields = at.fields("{ path: /system.slice/my.service }")?;
            let path = fields.require("path", "/system.slice/my.service");
            let path = path.and_then(|at| at.text("the path of a cgroup"));
            fields.finish();
            Some(Target::Cgroup { path: path? })
        }
        ("interface", at) => {
            let mut fields = at.fields("{ name: eth0, netns: web }")?;
            let name = fields.require("name", "eth0").and_then(|at| at.text("the name of an interface"));
            let netns = fields.get("netns").map(|at| at.text("the name or path of a network namespace"));
            fields.finish();
            Some(Target::Interface { name: name?, netns: flip(netns)? })
        }
        (_, at) => network::address(&at).map(Target::Address),
    }
}

/// A field that is missing is fine, one that is wrong is not.
#[expect(
    clippy::option_option,
    reason = "the outer one is whether it is there, the inner one whether it is right"
)]
fn flip<T>(field: Option<Option<T>>) -> Option<Option<T>> {
    match field {
        None => Some(None),
        Some(value) => value.map(Some),
    }
}

/// A field that may be missing, read by `read`; outer none where it is wrong.
#[expect(
    clippy::option_option,
    reason = "the outer one is whether it is right, the inner one whether it is there"
)]
fn maybe<'a, T>(
    fields: &mut Fields<'a>,
    name: &str,
    read: impl FnOnce(&At<'a>) -> Option<T>,
) -> Option<Option<T>> {
    flip(fields.get(name).map(|at| read(&at)))
}

/// One of the values of an enum, by the names that the command line has for them too.
fn choice<T: ValueEnum>(at: &At<'_>, what: &str) -> Option<T> {
    let values: Vec<_> = T::value_variants().iter().filter_map(ValueEnum::to_possible_value).collect();
    let names: Vec<&str> = values.iter().map(PossibleValue::get_name).collect();
    let expected = match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => names.concat(),
    };
    let text = at.text(&expected)?;
    T::from_str(&text, false).ok().or_else(|| {
        let fix = did_you_mean(&text, names).unwrap_or_else(|| format!("expected {expected}"));
        at.refuse(format!("`{text}` is no {what}"), fix)
    })
}

/// The items of a list, each read by `read`; all that is wrong with them is noted. An empty list is a problem.
fn items<T>(at: &At<'_>, expected: &str, read: impl Fn(&At<'_>) -> Option<T>) -> Option<Vec<T>> {
    let items = at.list(expected)?;
    if items.is_empty() {
        return at.refuse("this list is empty", format!("expected {expected}, or leave it out"));
    }
    let items: Vec<Option<T>> = items.iter().map(read).collect();
    items.into_iter().collect()
}

// ---- probes --------------------------------------------------------------------------------------------------------

fn probe(at: &At<'_>, names: &Names) -> Option<Probe> {
    match at.one_of("probe", &["load", "scrape", "agent"])? {
        ("load", at) => load(&at).map(Probe::Load),
        ("scrape", at) => scrape(&at).map(Probe::Scrape),
        (_, at) => {
            let mut fields = at.fields("{ target: recommender, measure: threads }")?;
            let target =
                fields.require("target", "the name of a target").and_then(|at| measured_target(&at, names));
            let measure = fields.require("measure", "threads").and_then(|at| {
                const KNOWN: [&str; 4] = ["threads", "fds", "rss", "cpu"];
                match at.text("threads, fds, rss or cpu")?.as_str() {
                    "threads" => Some(Measure::Threads),
                    "fds" => Some(Measure::Fds),
                    "rss" => Some(Measure::Rss),
                    "cpu" => Some(Measure::Cpu),
                    other => {
                        let fix = did_you_mean(other, KNOWN)
                            .unwrap_or_else(|| "expected threads, fds, rss or cpu".to_owned());
                        at.refuse(format!("there is no measure `{other}`"), fix)
                    }
                }
            });
            fields.finish();
            Some(Probe::Agent { target: target?, measure: measure? })
        }
    }
}

fn url(at: &At<'_>) -> Option<String> {
    let text = at.text("a URL: http://127.0.0.1:8080/path")?;
    match reqwest::Url::parse(&text) {
        Ok(url) if url.scheme() == "http" && url.has_host() => Some(text),
        Ok(url) if url.scheme() == "https" => {
            at.refuse("https is not supported", "use the plain http:// port of the service")
        }
        _ => at.refuse(format!("`{text}` is no URL"), "expected http://127.0.0.1:8080/path"),
    }
}

fn strings(at: &At<'_>, expected: &str) -> Option<BTreeMap<String, String>> {
    let entries = at.named(expected)?;
    entries.into_iter().map(|(name, at)| Some((name, at.scalar("text")?))).collect()
}

fn load(at: &At<'_>) -> Option<Load> {
    let mut fields = at.fields("{ url: …, rate: 200/s }")?;
    let url = fields.require("url", "http://127.0.0.1:8080/path").and_then(|at| url(&at));
    let method = fields.get("method").map_or(Some("GET".to_owned()), |at| {
        let method = at.text("an HTTP method: GET")?.to_uppercase();
        match reqwest::Method::from_bytes(method.as_bytes()) {
            Ok(_) => Some(method),
            Err(_) => at.refuse(format!("`{method}` is no HTTP method"), "expected GET, POST, …"),
        }
    });
    let headers = fields.get("headers").map(|at| headers(&at));
    let body = fields.get("body").map(|at| at.text("the body of the request"));
    let rate = fields.require("rate", "200/s").and_then(|at| {
        let rate = positive(&at, unit(&at, "a rate: 200/s", units::rate)?)?;
        let most = format!("expected at most {MOST_RATE}/s");
        if rate <= MOST_RATE { Some(rate) } else { at.refuse("more than a generator here can send", most) }
    });
    let expect = fields
        .get("expect")
        .map_or_else(|| Some(Expect { status: 200, json: vec![], within: DEFAULT_WITHIN }), |at| expect(&at));
    let max_in_flight = fields.get("maxInFlight").map_or(Some(DEFAULT_MAX_IN_FLIGHT), |at| {
        let most = at.int::<usize>("a number of requests")?;
        if most > 0 { Some(most) } else { at.refuse("nothing could be sent", "give at least 1") }
    });
    fields.finish();
    Some(Load {
        url: url?,
        method: method?,
        headers: flip(headers)?.unwrap_or_default(),
        body: flip(body)?,
        rate: rate?,
        expect: expect?,
        max_in_flight: max_in_flight?,
    })
}

const DEFAULT_WITHIN: Duration = Duration::from_secs(10);

fn headers(at: &At<'_>) -> Option<BTreeMap<String, String>> {
    use reqwest::header::{HeaderName, HeaderValue};
    let headers = strings(at, "headers by name")?;
    for (name, value) in &headers {
        if name.parse::<HeaderName>().is_err() || HeaderValue::from_str(value).is_err() {
            return at.refuse(format!("`{name}: {value}` is no HTTP header"), "expected printable ASCII");
        }
    }
    Some(headers)
}

fn expect(at: &At<'_>) -> Option<Expect> {
    let mut fields = at.fields("{ status: 200, within: 2s }")?;
    let status = fields.get("status").map_or(Some(200), |at| {
        let status = at.int::<u16>("an HTTP status: 200")?;
        if (100..600).contains(&status) {
            Some(status)
        } else {
            at.refuse(format!("{status} is no HTTP status"), "expected 100 to 599")
        }
    });
    let json = fields.get("json").map_or(Some(vec![]), |at| {
        let checks = at.named("checks by path: { $.items: { minItems: 8 } }")?;
        checks.into_iter().map(|(path, at)| Some((json_path(&at, &path)?, json_check(&at)?))).collect()
    });
    let within = fields.get("within").map_or(Some(DEFAULT_WITHIN), |at| {
        let within = duration(&at)?;
        if within.is_zero() {
            at.refuse("no answer comes in no time", "give more than 0s")
        } else {
            Some(within)
        }
    });
    fields.finish();
    Some(Expect { status: status?, json: json?, within: within? })
}

fn json_path(at: &At<'_>, text: &str) -> Option<JsonPath> {
    let bad = || at.refuse(format!("`{text}` is no path"), "expected a form such as $.items[0].id");
    let Some(mut rest) = text.strip_prefix('$') else { return bad() };
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            let (key, after) = after.split_at(end);
            if key.is_empty() {
                return bad();
            }
            steps.push(JsonStep::Key(key.to_owned()));
            rest = after;
        } else if let Some((index, after)) = rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
            let Ok(index) = index.parse() else { return bad() };
            steps.push(JsonStep::Index(index));
            rest = after;
        } else {
            return bad();
        }
    }
    Some(JsonPath { text: text.to_owned(), steps })
}

fn json_check(at: &At<'_>) -> Option<JsonCheck> {
    match at.one_of("check", &["minItems", "equals", "exists"])? {
        ("minItems", at) => at.int("a number of items").map(JsonCheck::MinItems),
        ("equals", at) => Some(JsonCheck::Equals(at.json())),
        (_, at) if at.bool()? => Some(JsonCheck::Exists),
        (_, at) => at.refuse("`exists: false` is not known", "write exists: true, or equals: null"),
    }
}

fn scrape(at: &At<'_>) -> Option<Scrape> {
    let mut fields = at.fields("{ url: …, metric: go_goroutines }")?;
    let url = fields.require("url", "http://127.0.0.1:8080/metrics").and_then(|at| url(&at));
    let metric = fields.require("metric", "go_goroutines").and_then(|at| {
        let metric = at.text("the name of a metric")?;
        match metric.strip_suffix("_bucket") {
            Some(family) => at.refuse("this is one series of a histogram", format!("write {family}")),
            None => Some(metric),
        }
    });
    let labels = fields.get("labels").map(|at| strings(&at, "labels by name"));
    let every = fields.get("every").map_or(Some(Duration::from_secs(1)), |at| {
        let every = duration(&at)?;
        let fix = "expected 100ms or more";
        if every < Duration::from_millis(100) {
            at.refuse("this would load the service", fix)
        } else {
            Some(every)
        }
    });
    fields.finish();
    Some(Scrape { url: url?, metric: metric?, labels: flip(labels)?.unwrap_or_default(), every: every? })
}

// ---- rounds --------------------------------------------------------------------------------------------------------

fn rounds_of(at: &At<'_>, names: &Names, plan_gates: bool) -> Option<Vec<Round>> {
    let items = at.list("a list of rounds")?;
    if items.is_empty() {
        return at.refuse("there are no rounds", "add one with a name, faults and gates");
    }
    let mut seen: Vec<String> = Vec::new();
    let mut rounds = Vec::new();
    for at in &items {
        let round = round(at, names, plan_gates);
        if let Some(round) = &round {
            if seen.contains(&round.name) {
                at.problem(format!("there are two rounds `{}`", round.name), "give each a name of its own");
            }
            seen.push(round.name.clone());
        }
        rounds.push(round);
    }
    rounds.into_iter().collect()
}

fn round(at: &At<'_>, names: &Names, plan_gates: bool) -> Option<Round> {
    let mut fields = at.fields("{ name: …, hold: 60s, faults: [ … ], gates: [ … ] }")?;
    let name = fields.require("name", "redis-slow").and_then(|at| Some(name_of(&at, at.text("a name")?)));
    let baseline = fields.get("baseline").map_or(Some(DEFAULT_BASELINE), |at| whole_seconds(&at));
    let hold = fields.require("hold", "60s").and_then(|at| {
        let hold = whole_seconds(&at)?;
        if hold.is_zero() { at.refuse("no time to see anything in", "give at least 1s") } else { Some(hold) }
    });
    let recovery_at = fields.get("recovery");
    let faults = fields.require("faults", "[ { cpu: { on: …, load: 90% } } ]");
    let faults = faults.and_then(|at| {
        let items = at.list("a list of faults")?;
        if items.is_empty() {
            return at.refuse("a round without a fault proves nothing", "add a fault");
        }
        let faults: Vec<_> =
            items.iter().map(|at| fault(at, names).and_then(|f| reached_within(at, f, hold))).collect();
        faults.into_iter().collect::<Option<Vec<_>>>()
    });
    let gates = match fields.get("gates") {
        Some(at) => gates(&at, names),
        None => vec![],
    };
    let gates_are_there = fields.has("gates");
    fields.finish();
    if !gates_are_there && !plan_gates {
        at.problem("a round without gates cannot pass", "add gates to it, or to the plan");
    }
    let within = gates.iter().filter_map(|g| match g {
        Gate::Recovery { within, .. } => Some(Duration::from_secs_f64(within.ceil())),
        _ => None,
    });
    let within = within.max();
    let recovery = match recovery_at {
        Some(at) => whole_seconds(&at).and_then(|recovery| {
            if within.is_some_and(|within| recovery < within) {
                let fix = format!("give at least {}", super::fault::time(within.unwrap_or_default()));
                return at.refuse("the recovery gate could never be decided in this time", fix);
            }
            Some(recovery)
        }),
        None => Some(within.map_or(DEFAULT_RECOVERY, |within| within + RECOVERY_MARGIN)),
    };
    Some(Round { name: name?, baseline: baseline?, hold: hold?, recovery: recovery?, faults: faults?, gates })
}

// ---- faults --------------------------------------------------------------------------------------------------------

fn fault(at: &At<'_>, names: &Names) -> Option<Fault> {
    let (kind, at) = at.one_of("fault", &["network", "cpu", "memory"])?;
    let mut fields = at.fields("{ on: the name of a target, … }")?;
    let on = fields.require("on", "the name of a target").and_then(|at| local_target(&at, names));
    let replicas = maybe(&mut fields, "replicas", |at| {
        unit(at, "a share of the target's replicas, or a number of them: 50%, 1", Take::parse)
    });
    let name = on.as_deref().unwrap_or_default();
    let of = replicas.flatten().map(|take| format!(" (replicas: {take})")).unwrap_or_default();
    let shown = format!("{name}{of}");
    let read = match kind {
        "network" => network::network(fields, names, name).map(|n| (n.proto(), n.summary(&shown))),
        "cpu" => cpu(fields).map(|c| (c.proto(), c.summary(&shown))),
        _ => memory(fields).map(|m| (m.proto(), m.summary(&shown))),
    };
    let (proto, summary) = read?;
    Some(Fault { on: on?, replicas: replicas?, proto, summary })
}

/// Refuses a fault that would never come to be what was asked for.
fn reached_within(at: &At<'_>, fault: Fault, hold: Option<Duration>) -> Option<Fault> {
    match &fault.proto.kind {
        Some(v1::fault::Kind::Memory(memory))
            if hold.is_some_and(|hold| u128::from(memory.ramp_ns) >= hold.as_nanos()) =>
        {
            at.refuse(
                "the ramp is as long as the hold: so much is never held",
                "give a shorter ramp, or a longer hold",
            )
        }
        _ => Some(fault),
    }
}

fn cpu(mut fields: Fields<'_>) -> Option<Cpu> {
    let load = fields.require("load", "90%").and_then(|at| positive(&at, share(&at)?));
    let workers = fields.get("workers").map(|at| {
        let workers = at.int::<u32>("a number of threads")?;
        if workers > 0 {
            Some(workers)
        } else {
            at.refuse("nobody would work", "give at least 1, or leave it out")
        }
    });
    fields.finish();
    Some(Cpu { load: load?, workers: flip(workers)? })
}

fn memory(mut fields: Fields<'_>) -> Option<Memory> {
    let size = fields.require("size", "90%").and_then(|at| {
        let text = at.scalar("a size or a share of the limit: 200MiB, 90%")?;
        if text.trim().ends_with('%') {
            return share(&at).and_then(|s| positive(&at, s)).map(Size::Share);
        }
        match units::size(&text) {
            Ok(0) => at.refuse("zero does nothing", "give more than 0"),
            Ok(bytes) => Some(Size::Bytes(bytes)),
            Err((message, fix)) if message.ends_with("has no unit") => at.refuse(message, fix),
            Err((message, _)) => at.refuse(message, "expected a size or a share of the limit: 200MiB, 90%"),
        }
    });
    let ramp = fields.get("ramp").map_or(Some(Duration::ZERO), |at| duration(&at));
    fields.finish();
    Some(Memory { size: size?, ramp: ramp? })
}

// ---- gates ---------------------------------------------------------------------------------------------------------

fn gates(at: &At<'_>, names: &Names) -> Vec<Gate> {
    let mut gates: Vec<Gate> = Vec::new();
    let items = at.list("a list of gates");
    if items.as_ref().is_some_and(Vec::is_empty) {
        at.problem("without a gate nothing can pass", "add a gate");
    }
    for at in items.unwrap_or_default() {
        for gate in gate(&at, names).unwrap_or_default() {
            let this = outline::gate(&gate);
            let same = |g: &Gate| {
                let other = outline::gate(g);
                (&other.gate, &other.subject) == (&this.gate, &this.subject)
            };
            if gates.iter().any(same) {
                let message = format!("there are two gates {} of {}", this.gate, this.subject);
                at.problem(message, "remove one of them");
            }
            gates.push(gate);
        }
    }
    gates
}

/// One gate; a `latency` gate with several percentiles is several.
fn gate(at: &At<'_>, names: &Names) -> Option<Vec<Gate>> {
    let (kind, at) = at.one_of("gate", &["latency", "errors", "leak", "oom", "recovery"])?;
    let mut fields = at.fields("the fields of a gate")?;
    let found = match kind {
        "latency" => {
            let probe = probe_of(&mut fields, names, kind);
            let percentiles: Vec<_> = fields
                .matching(|key| units::percentile(key).is_some())
                .into_iter()
                .map(|(key, at)| Some((units::percentile(&key)?, duration(&at)?.as_secs_f64())))
                .collect();
            let misspelled = fields
                .matching(|key| {
                    let digits = key.strip_prefix(['p', 'P']).unwrap_or_default();
                    digits.starts_with(|c: char| c.is_ascii_digit()) && units::percentile(key).is_none()
                })
                .into_iter()
                .map(|(key, at)| {
                    at.problem(
                        format!("`{key}` is no percentile"),
                        "expected p50 to p99.9, such as p95: 800ms",
                    );
                })
                .count();
            if percentiles.is_empty() && misspelled == 0 {
                fields.map.problem("no percentile", "add p95: 800ms");
            }
            fields.finish();
            let probe = probe?;
            let gate = |(percentile, limit)| Gate::Latency { probe: probe.clone(), percentile, limit };
            return percentiles.into_iter().map(|p| p.map(gate)).collect();
        }
        "errors" => {
            let probe = probe_of(&mut fields, names, kind);
            let limit = fields.require("max", "0.12%").and_then(|at| {
                let limit = share(&at)?;
                never_none(&at, limit)
            });
            (probe, limit).both().map(|(probe, limit)| Gate::Errors { probe, limit })
        }
        "leak" => {
            let probe = probe_of(&mut fields, names, kind);
            let limit = fields.require("max", "5/min");
            let limit = limit.and_then(|at| {
                let limit = unit(&at, "a growth per time: 5/min", units::rate)?;
                never_none(&at, limit)
            });
            (probe, limit).both().map(|(probe, per_second)| Gate::Leak { probe, limit: per_second * 60.0 })
        }
        "oom" => {
            let target = fields.require("target", "the name of a target");
            let target = target.and_then(|at| measured_target(&at, names));
            let limit = fields.get("max").map_or(Some(0), |at| at.int("a number of kills"));
            (target, limit).both().map(|(target, limit)| Gate::Oom { target, limit })
        }
        _ => {
            let probe = probe_of(&mut fields, names, kind);
            let within = fields.require("within", "47s").and_then(|at| {
                let within = duration(&at)?;
                if within.is_zero() {
                    at.refuse("nothing recovers in no time", "give at least 1s")
                } else {
                    Some(within)
                }
            });
            (probe, within)
                .both()
                .map(|(probe, within)| Gate::Recovery { probe, within: within.as_secs_f64() })
        }
    };
    fields.finish();
    found.map(|gate| vec![gate])
}

/// Refuses a limit of nothing at all: however many samples are good, that the next is not bad cannot be shown.
fn never_none(at: &At<'_>, limit: f64) -> Option<f64> {
    if limit > 0.0 {
        return Some(limit);
    }
    at.refuse(
        "that there is none at all cannot be shown",
        "give what may be tolerated: max: 0.1%, max: 1/min",
    )
}

/// Both or nothing; reads better than two `?` where the fields have to be finished first.
trait Both<A, B> {
    fn both(self) -> Option<(A, B)>;
}

impl<A, B> Both<A, B> for (Option<A>, Option<B>) {
    fn both(self) -> Option<(A, B)> {
        Some((self.0?, self.1?))
    }
}

/// The probe of a gate. One that can never yield what the gate judges is a problem.
fn probe_of(fields: &mut Fields<'_>, names: &Names, gate: &str) -> Option<String> {
    let at = fields.require("probe", "the name of a probe")?;
    let name = at.text("the name of a probe")?;
    let Some(probe) = names.probes.get(&name) else {
        return unknown(&at, "probe", &name, names.probes.keys().map(String::as_str));
    };
    let Some(probe) = probe else { return Some(name) };
    if let ("recovery", Probe::Load(load)) = (gate, probe)
        && load.rate < 1.0
    {
        return at.refuse(
            format!("`{name}` sends less than a request a second, and a recovery is told by good seconds"),
            "give that probe a rate of 1/s or more",
        );
    }
    let (yields, needs) = match (gate, probe) {
        ("latency" | "errors" | "recovery", Probe::Load(_)) | ("leak", Probe::Agent { .. }) => {
            return Some(name);
        }
        ("latency", Probe::Scrape(s)) if !s.metric.ends_with("_total") => return Some(name),
        ("leak", Probe::Scrape(s)) if !s.metric.ends_with("_total") => return Some(name),
        ("latency", Probe::Scrape(_)) => ("a counter", "a load probe, or a scraped histogram"),
        ("leak", Probe::Scrape(_)) => ("a counter", "a scraped gauge, or an agent probe"),
        ("leak", Probe::Load(_)) => ("requests", "a scraped gauge, or an agent probe"),
        ("latency", Probe::Agent { .. }) => ("a gauge", "a load probe, or a scraped histogram"),
        (_, Probe::Scrape(_)) => ("scraped values", "a load probe"),
        (_, Probe::Agent { .. }) => ("a gauge", "a load probe"),
        (_, Probe::Load(_)) => ("requests", "another probe"),
    };
    at.refuse(
        format!("`{name}` yields {yields}: the {gate} gate could never be decided"),
        format!("name {needs}"),
    )
}

/// The name of a target with processes that an agent can measure.
fn measured_target(at: &At<'_>, names: &Names) -> Option<String> {
    let name = local_target(at, names)?;
    match names.targets.get(&name) {
        Some(Some(Target::Interface { .. })) => at.refuse(
            format!("`{name}` is an interface: it has no processes to measure"),
            "name a process or cgroup target",
        ),
        _ => Some(name),
    }
}

/// The name of a target that an agent can get hold of.
fn local_target(at: &At<'_>, names: &Names) -> Option<String> {
    let name = at.text("the name of a target")?;
    match names.targets.get(&name) {
        Some(Some(Target::Address(_))) => at.refuse(
            format!("`{name}` is an address: no agent can get hold of it"),
            "name a process, cgroup or interface target",
        ),
        Some(_) => Some(name),
        None => unknown(at, "target", &name, names.targets.keys().map(String::as_str)),
    }
}

fn unknown<'n, T>(
    at: &At<'_>,
    what: &str,
    name: &str,
    known: impl Iterator<Item = &'n str> + Clone,
) -> Option<T> {
    let fix = did_you_mean(name, known.clone()).unwrap_or_else(|| {
        let known: Vec<&str> = known.collect();
        if known.is_empty() {
            format!("the plan has no {what}s that fit")
        } else {
            format!("known: {}", known.join(", "))
        }
    });
    at.refuse(format!("there is no {what} `{name}`"), fix)
}
