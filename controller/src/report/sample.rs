//! A run to test reports with: five rounds on two nodes; three promote, one fails on latency and one cannot be decided.

use std::collections::BTreeMap;

use crate::{
    event::{
        Event, Figure, Finding, GateOutline, Injection, LoadBin, Node, Outcome, Phase, ProbeOutline,
        RoundOutline, TargetSample, Verdict, What,
    },
    fold::Run,
};

const BASELINE: f64 = 10.0;
const HOLD: f64 = 25.0;
const RECOVERY: f64 = 10.0;
const LENGTH: f64 = BASELINE + HOLD + RECOVERY;
const RATE: u64 = 200;

/// Quantiles of the normal distribution at 1/40, 3/40, … 39/40.
const NORMAL: [f64; 10] = [0.063, 0.189, 0.319, 0.454, 0.598, 0.755, 0.935, 1.150, 1.440, 1.960];

/// The events.
pub(crate) fn events() -> Vec<Event> {
    let mut events = Vec::new();
    let mut add = |at: f64, what: What| events.push(Event { at, what });
    add(0.0, started("recommender-release"));
    for (node, kernel) in [("node-a", "6.18.0-cloud"), ("node-b", "6.1.0-37-amd64")] {
        add(0.1, What::Node(agent(node, kernel)));
    }
    for (i, case) in CASES.iter().enumerate() {
        round(i, case, &mut add);
    }
    let end = 1.0 + LENGTH * CASES.len() as f64;
    add(end, What::HostState { injected: 10, reverted: 10 });
    let reason = "In round redis-slow the p95 of shoppers was 1.93s where at most 800ms is allowed.";
    add(end, What::RunFinished { verdict: Verdict::Block, reason: reason.into() });
    events.sort_by(|a, b| a.at.total_cmp(&b.at));
    events
}

/// The run.
pub(crate) fn run() -> Run {
    Run::of(&events())
}

/// The same run, cut off in the middle of the second fault.
pub(crate) fn cut() -> Run {
    Run::of(events().iter().take_while(|e| e.at < 75.0))
}

struct Case {
    name: &'static str,
    kind: &'static str,
    fault: &'static str,
    to: &'static str,
    figures: &'static [(&'static str, f64, &'static str)],
    /// Factor on latency during the fault.
    slow: f64,
    /// Share of requests that time out during the fault.
    lost: f64,
    verdict: Verdict,
}

const CASES: [Case; 5] = [
    Case {
        name: "cpu-high",
        kind: "cpu",
        fault: "CPU 90%",
        to: "recommender",
        figures: &[("cpu_usage", 0.899, "ratio")],
        slow: 1.6,
        lost: 0.0,
        verdict: Verdict::Promote,
    },
    Case {
        name: "redis-slow",
        kind: "network",
        fault: "delay 2s ±300ms loss 5%",
        to: "recommender → redis",
        figures: &[
            ("matched", 4_812.0, "packets"),
            ("delayed", 4_571.0, "packets"),
            ("dropped", 241.0, "packets"),
            ("delay_p50", 2.01, "seconds"),
            ("delay_p90", 2.24, "seconds"),
            ("delay_p99", 2.3, "seconds"),
            ("tcp_rtt_before", 0.000_4, "seconds"),
            ("tcp_rtt", 4.02, "seconds"),
        ],
        slow: 34.0,
        lost: 0.011,
        verdict: Verdict::Block,
    },
    Case {
        name: "redis-cut",
        kind: "network",
        fault: "partition",
        to: "recommender → redis",
        figures: &[("matched", 1_204.0, "packets"), ("dropped", 1_204.0, "packets")],
        slow: 2.2,
        lost: 0.0,
        verdict: Verdict::Promote,
    },
    Case {
        name: "memory-pressure",
        kind: "memory",
        fault: "memory 60% of the limit over 5s",
        to: "recommender",
        figures: &[("held", 322_122_547.0, "bytes")],
        slow: 1.1,
        lost: 0.0,
        verdict: Verdict::Inconclusive,
    },
    Case {
        name: "lossy",
        kind: "network",
        fault: "loss 3% ±20ms jitter on 95% of packets",
        to: "recommender → redis",
        figures: &[
            ("matched", 18_330.0, "packets"),
            ("delayed", 17_391.0, "packets"),
            ("dropped", 548.0, "packets"),
        ],
        slow: 1.9,
        lost: 0.000_2,
        verdict: Verdict::Promote,
    },
];

/// The first event, with a name for the plan.
pub(crate) fn started(plan: &str) -> What {
    let gate = |gate: &str, subject: &str, source: &str, percentile, limit, unit: &str| GateOutline {
        gate: gate.into(),
        subject: subject.into(),
        source: source.into(),
        percentile,
        limit,
        unit: unit.into(),
    };
    let outline = |case: &Case| {
        let mut gates = vec![
            gate("latency", "shoppers p95", "shoppers", Some(0.95), 0.8, "seconds"),
            gate("errors", "shoppers", "shoppers", None, 0.0012, "ratio"),
        ];
        gates.push(match case.kind {
            "memory" => gate("leak", "tasks", "tasks", None, 5.0, "per_minute"),
            _ => gate("recovery", "shoppers", "shoppers", None, 8.0, "seconds"),
        });
        if case.kind == "memory" {
            gates.push(gate("oom", "recommender", "recommender", None, 0.0, "count"));
        }
        RoundOutline {
            name: case.name.into(),
            baseline: BASELINE,
            hold: HOLD,
            recovery: RECOVERY,
            faults: vec![format!("{} on {}", case.fault, case.to)],
            gates,
        }
    };
    let probe = |kind: &str, summary: &str, unit: &str| ProbeOutline {
        kind: kind.into(),
        summary: summary.into(),
        unit: unit.into(),
    };
    let shoppers =
        "GET http://10.77.0.2:8080/recommend?user_id=U123 at 200/s; expects 200, $.items within 2s";
    let served = "recommend_request_duration_seconds from http://10.77.0.2:8080/metrics every 1s";
    What::RunStarted {
        run: "7f3a".into(),
        plan: plan.into(),
        version: Some("v2.14.0".into()),
        started: "2026-03-02T14:04:19Z".parse().expect("a timestamp"),
        squall: "0.1.0".into(),
        seed: 4711,
        rounds: CASES.iter().map(outline).collect(),
        probes: BTreeMap::from([
            ("shoppers".into(), probe("load", shoppers, "seconds")),
            ("tasks".into(), probe("scrape", "tokio_tasks from http://10.77.0.2:8080/metrics every 1s", "1")),
            ("served".into(), probe("scrape", served, "seconds")),
        ]),
    }
}

fn agent(node: &str, kernel: &str) -> Node {
    let network = if kernel.starts_with("6.18") { "TCX, TAP queue" } else { "clsact, EDT + sch_fq" };
    let faults = [("network", network), ("cpu", "duty cycle in cgroup v2"), ("memory", "ramp in cgroup v2")];
    Node {
        node: node.into(),
        address: format!("https://{node}:7433"),
        kernel: kernel.into(),
        agent: "0.1.0".into(),
        faults: faults.map(|(kind, how)| (kind.to_string(), how.to_string())).into(),
    }
}

fn round(i: usize, case: &Case, add: &mut impl FnMut(f64, What)) {
    let start = 1.0 + LENGTH * i as f64;
    let (fault, recovery, end) = (start + BASELINE, start + BASELINE + HOLD, start + LENGTH);
    add(start, What::RoundStarted { round: i });
    for (at, phase) in [(start, Phase::Baseline), (fault, Phase::Fault), (recovery, Phase::Recovery)] {
        add(at, What::PhaseStarted { round: i, phase });
    }
    for (n, node) in ["node-a", "node-b"].into_iter().enumerate() {
        inject(i, case, (n, node), (fault, recovery), add);
    }
    for second in 0..LENGTH as usize {
        let at = start + second as f64;
        let hurt = at >= fault + 2.0 && at < recovery + 1.0;
        sample(i, case, at, hurt, add);
    }
    for finding in judge(case) {
        add(end - 0.5, What::Judged { round: Some(i), finding });
    }
    add(end, What::RoundFinished { round: i, verdict: case.verdict });
}

fn inject(
    i: usize,
    case: &Case,
    (n, node): (usize, &str),
    (fault, recovery): (f64, f64),
    add: &mut impl FnMut(f64, What),
) {
    let id = format!("7f3a-{i}.{n}");
    let pid = 4121 + 37 * n;
    let (mechanism, changes) = match case.kind {
        "network" => (
            if n == 0 { "TCX, TAP queue" } else { "clsact, EDT + sch_fq" },
            vec![
                format!("attach squall_egress to eth0 in the netns of pid {pid}; undo: detach it"),
                format!("attach squall_ingress to eth0 in the netns of pid {pid}; undo: detach it"),
            ],
        ),
        kind => ("cgroup v2", vec![format!("start a {kind} stressor in /shop/recommender; undo: kill it")]),
    };
    let injection = Injection {
        id: id.clone(),
        node: node.into(),
        kind: case.kind.into(),
        target: "recommender".into(),
        resolved: format!("recommender pid {pid}"),
        summary: format!("{} on {}", case.fault, case.to),
        mechanism: mechanism.into(),
        changes,
        warnings: vec![],
        ends: recovery + 5.0,
        seed: if case.kind == "network" { 90_210 + i as u64 } else { 0 },
    };
    add(fault, What::Injected { round: Some(i), injection });
    let figures = |share: f64| {
        let scaled = |(name, value, unit): &(&str, f64, &str)| Figure {
            name: (*name).into(),
            value: if *unit == "packets" { (value * share / (n + 1) as f64).round() } else { *value },
            unit: (*unit).into(),
        };
        case.figures.iter().map(scaled).collect::<Vec<_>>()
    };
    for second in 1..HOLD as u32 {
        let share = f64::from(second) / (HOLD - 1.0);
        let effect = What::Effect { id: id.clone(), node: node.into(), bit: true, figures: figures(share) };
        add(fault + f64::from(second), effect);
    }
    let took = 0.012 + 0.007 * n as f64;
    add(recovery + took, What::Reverted { id, node: node.into(), took, reason: "asked for".into() });
}

fn sample(i: usize, case: &Case, at: f64, hurt: bool, add: &mut impl FnMut(f64, What)) {
    let noise = |salt: u64| {
        let mut mixed =
            (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt.wrapping_mul(0xd1b5_4a32_d192_ed03);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 40) as f64 / f64::from(1u32 << 24) - 0.5
    };
    let slow = if hurt { case.slow } else { 1.0 };
    let base = 0.024 * slow * (1.0 + 0.4 * noise(1) + if noise(5) > 0.46 { 0.8 } else { 0.0 });
    let lost = if hurt { (case.lost * RATE as f64 + noise(2) + 0.5).floor().max(0.0) as u64 } else { 0 };
    let mut latency: Vec<(u64, u64)> = NORMAL
        .iter()
        .flat_map(|z| [-*z, *z])
        .map(|z| ((base * (0.34 * z).exp() * 1e6) as u64, RATE / 20))
        .collect();
    latency.sort_unstable();
    latency[19].1 -= lost;
    let ok: u64 = latency.iter().map(|(_, n)| n).sum();
    let failed = RATE - ok;
    let bin = LoadBin {
        start: at,
        due: RATE,
        ok,
        failed: if failed > 0 { BTreeMap::from([("timeout".into(), failed)]) } else { BTreeMap::new() },
        late: 0,
        dropped: 0,
        ok_latency: latency,
        failed_latency: if failed > 0 { vec![(2_000_000, failed)] } else { vec![] },
    };
    add(at + 1.0, What::Load { probe: "shoppers".into(), bin });

    let climb = if case.kind == "memory" && hurt { (at % 45.0) * 0.05 } else { 0.0 };
    add(
        at + 0.4,
        What::Gauge { probe: "tasks".into(), value: (212.0 + 6.0 * noise(3) + climb).round(), rate: false },
    );
    let fast = if hurt && case.slow > 10.0 { 12 } else { 190 };
    let buckets =
        vec![(Some(0.05), fast), (Some(0.1), 8), (Some(0.8), 2), (Some(2.5), RATE - fast - 10), (None, 0)];
    if i == 2 && (12.0..15.0).contains(&(at % 45.0)) {
        let error = "connection refused (os error 111)".into();
        add(at + 0.4, What::ProbeFailed { probe: "served".into(), error });
    } else {
        add(at + 0.4, What::Buckets { probe: "served".into(), buckets });
    }
    let memory = 190.0 + 8.0 * noise(4) + if case.kind == "memory" && hurt { 307.0 } else { 0.0 };
    let usage = TargetSample {
        processes: 1,
        threads: 9,
        fds: Some(64),
        rss: (150.0 * 1_048_576.0) as u64,
        cpu: at * 0.4 + 0.1 * noise(6),
        oom_kills: Some(0),
        generation: "4121".into(),
        cgroup_memory: (memory * 1_048_576.0) as u64,
        cgroup_memory_limit: 512 * 1_048_576,
    };
    for node in ["node-a", "node-b"] {
        let sample = What::Target { target: "recommender".into(), node: node.into(), sample: usage.clone() };
        add(at + 0.9, sample);
    }
}

fn judge(case: &Case) -> Vec<Finding> {
    let finding = |gate: &str, subject: &str, value: f64, interval, limit: f64, unit: &str| Finding {
        name: format!("{}/{gate}[{subject}]", case.name),
        gate: gate.into(),
        subject: subject.into(),
        outcome: Outcome::Pass,
        value: Some(value),
        interval,
        limit,
        unit: unit.into(),
        baseline: None,
        samples: 5_000,
        since: None,
        p: Some(1.0),
        reason: "The whole interval is inside the limit.".into(),
    };
    let some = |low, high| Some((Some(low), Some(high)));
    let p95 = 0.0413 * case.slow;
    let mut latency = finding("latency", "shoppers p95", p95, some(p95 * 0.96, p95 * 1.05), 0.8, "seconds");
    latency.baseline = Some(0.0413);
    if case.verdict == Verdict::Block {
        latency = Finding {
            outcome: Outcome::Fail,
            value: Some(1.93),
            interval: some(1.88, 1.97),
            samples: 11_842,
            since: Some(3.0),
            p: Some(1.2e-9),
            reason: "The whole interval is past the limit: requests wait for Redis without a client timeout."
                .into(),
            ..latency
        };
    }
    let mut errors = finding("errors", "shoppers", 0.000_04, Some((None, Some(0.001))), 0.0012, "ratio");
    errors.baseline = Some(0.0);
    let mut findings = vec![latency, errors];
    if case.kind == "memory" {
        let mut leak = finding("leak", "tasks", 2.1, some(-1.4, 5.6), 5.0, "per_minute");
        leak.baseline = Some(0.2);
        leak.outcome = Outcome::Inconclusive;
        leak.samples = 25;
        leak.reason = "The interval spans the limit; hold at least 3 min to decide.".into();
        findings.push(leak);
        findings.push(Finding { p: None, ..finding("oom", "recommender", 0.0, None, 0.0, "count") });
    } else {
        findings.push(finding("recovery", "shoppers", 2.0, some(1.0, 2.0), 8.0, "seconds"));
    }
    findings
}
