//! Made-up runs for the tests of the gates.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    event::{Event, Finding, Injection, LoadBin, Phase, ProbeOutline, RoundOutline, TargetSample, What},
    fold::Run,
    plan::{self, Expect, Fault, Gate, Load, Measure, Plan, Probe, Round, Scrape},
};

/// A plan and what happened in it. Rounds are alike; a round takes baseline + hold + recovery seconds.
pub(super) struct Lab {
    pub(super) plan: Plan,
    pub(super) events: Vec<Event>,
    seconds: (u64, u64, u64),
}

/// Requests of one second.
#[derive(Clone, Copy, Default)]
pub(super) struct Second {
    pub(super) ok: u64,
    /// Microseconds.
    pub(super) latency: u64,
    pub(super) slow: u64,
    pub(super) failed: u64,
    pub(super) late: u64,
    pub(super) dropped: u64,
}

impl Second {
    pub(super) fn fine() -> Self {
        Self { ok: 200, latency: 5_000, ..Self::default() }
    }

    pub(super) fn slow(slow: u64) -> Self {
        Self { ok: 200 - slow, latency: 5_000, slow, ..Self::default() }
    }

    pub(super) fn failed(failed: u64) -> Self {
        Self { ok: 200 - failed, latency: 5_000, failed, ..Self::default() }
    }

    pub(super) fn bin(self, start: f64) -> LoadBin {
        let pairs = |pairs: &[(u64, u64)]| pairs.iter().copied().filter(|(_, n)| *n > 0).collect::<Vec<_>>();
        let failed = [("timeout".to_owned(), self.failed), ("dropped".to_owned(), self.dropped)];
        LoadBin {
            start,
            due: self.ok + self.slow + self.failed + self.dropped,
            ok: self.ok + self.slow,
            failed: failed.into_iter().filter(|(_, n)| *n > 0).collect(),
            late: self.late,
            dropped: self.dropped,
            ok_latency: pairs(&[(self.latency, self.ok), (1_500_000, self.slow)]),
            failed_latency: pairs(&[(2_000_000, self.failed)]),
        }
    }
}

pub(super) const LOAD: &str = "shoppers";
pub(super) const GAUGE: &str = "tasks";
pub(super) const HISTOGRAM: &str = "duration";
pub(super) const TARGET: &str = "recommender";

impl Lab {
    /// Rounds of so many seconds each, with a fault that bites.
    pub(super) fn new(rounds: usize, baseline: u64, hold: u64, recovery: u64) -> Self {
        let load = Load {
            url: "http://127.0.0.1:1/".into(),
            method: "GET".into(),
            headers: BTreeMap::new(),
            body: None,
            rate: 200.0,
            expect: Expect { status: 200, json: vec![], within: Duration::from_secs(2) },
            max_in_flight: 1000,
        };
        let scrape = |metric: &str| {
            let url = "http://127.0.0.1:1/metrics".into();
            let every = Duration::from_secs(1);
            Probe::Scrape(Scrape { url, metric: metric.into(), labels: BTreeMap::new(), every })
        };
        let probes = [
            (LOAD, Probe::Load(load)),
            (GAUGE, scrape("tasks")),
            (HISTOGRAM, scrape("duration_seconds")),
            ("threads", Probe::Agent { target: TARGET.into(), measure: Measure::Threads }),
        ];
        let fault = || Fault {
            on: TARGET.into(),
            replicas: None,
            proto: squall_proto::v1::Fault::default(),
            summary: "cut".into(),
        };
        let round = |i| Round {
            name: format!("round-{i}"),
            baseline: Duration::from_secs(baseline),
            hold: Duration::from_secs(hold),
            recovery: Duration::from_secs(recovery),
            faults: vec![fault()],
            gates: vec![],
        };
        let plan = Plan {
            name: "lab".into(),
            version: None,
            seed: None,
            targets: [(TARGET.to_owned(), plan::Target::Cgroup { path: "/x".into() })].into(),
            probes: probes.into_iter().map(|(n, p)| (n.to_owned(), p)).collect(),
            rounds: (0..rounds).map(round).collect(),
            gates: vec![],
            limits: plan::Limits::default(),
            on_fail: plan::OnFail::Block,
            files: BTreeMap::new(),
        };
        let mut lab = Self { plan, events: vec![], seconds: (baseline, hold, recovery) };
        lab.start();
        lab
    }

    fn start(&mut self) {
        let (baseline, hold, recovery) = self.seconds;
        let outline = |r: &Round| RoundOutline {
            name: r.name.clone(),
            baseline: baseline as f64,
            hold: hold as f64,
            recovery: recovery as f64,
            faults: vec![],
            gates: vec![],
        };
        let probe = ProbeOutline { kind: String::new(), summary: String::new(), unit: String::new() };
        let what = What::RunStarted {
            run: "r".into(),
            plan: "lab".into(),
            version: None,
            started: jiff::Timestamp::UNIX_EPOCH,
            squall: "0".into(),
            seed: 1,
            rounds: self.plan.rounds.iter().map(outline).collect(),
            probes: self.plan.probes.keys().map(|n| (n.clone(), probe.clone())).collect(),
        };
        self.push(0.0, what);
        for round in 0..self.plan.rounds.len() {
            let (start, fault, recovered, end) = self.times(round);
            let id = format!("i{round}");
            self.push(start, What::PhaseStarted { round, phase: Phase::Baseline });
            self.push(fault, What::PhaseStarted { round, phase: Phase::Fault });
            let injection = Injection {
                id: id.clone(),
                node: "n".into(),
                kind: "network".into(),
                target: TARGET.into(),
                resolved: "recommender pid 7".into(),
                summary: "cut".into(),
                mechanism: String::new(),
                changes: vec![],
                warnings: vec![],
                ends: recovered,
                seed: 0,
            };
            self.push(fault + 0.01, What::Injected { round: Some(round), injection });
            let effect = What::Effect { id: id.clone(), node: "n".into(), bit: true, figures: vec![] };
            self.push(fault + 1.0, effect);
            self.push(recovered, What::PhaseStarted { round, phase: Phase::Recovery });
            let reverted = What::Reverted { id, node: "n".into(), took: 0.01, reason: "asked".into() };
            self.push(recovered + 0.01, reverted);
            self.push(end, What::RoundFinished { round, verdict: crate::event::Verdict::Promote });
        }
    }

    /// Start, start of the fault, its end, and the end of a round.
    pub(super) fn times(&self, round: usize) -> (f64, f64, f64, f64) {
        let (baseline, hold, recovery) = self.seconds;
        let start = round as u64 * (baseline + hold + recovery);
        let fault = start + baseline;
        let recovered = fault + hold;
        (start as f64, fault as f64, recovered as f64, (recovered + recovery) as f64)
    }

    pub(super) fn end(&self) -> f64 {
        self.times(self.plan.rounds.len() - 1).3
    }

    pub(super) fn push(&mut self, at: f64, what: What) {
        self.events.push(Event { at, what });
    }

    /// The phase a second lies in, and the seconds since its start.
    pub(super) fn phase(&self, at: f64) -> (Phase, f64) {
        let (baseline, hold, recovery) = self.seconds;
        let within = at % (baseline + hold + recovery) as f64;
        match within {
            w if w < baseline as f64 => (Phase::Baseline, w),
            w if w < (baseline + hold) as f64 => (Phase::Fault, w - baseline as f64),
            w => (Phase::Recovery, w - (baseline + hold) as f64),
        }
    }

    /// Load in every second of the run; none leaves a second out.
    pub(super) fn load(mut self, mut second: impl FnMut(Phase, f64) -> Option<Second>) -> Self {
        for at in 0..self.end() as u64 {
            let at = at as f64;
            let (phase, since) = self.phase(at);
            if let Some(second) = second(phase, since) {
                self.push(at + 1.5, What::Load { probe: LOAD.into(), bin: second.bin(at) });
            }
        }
        self
    }

    /// A sample of the gauge in every second of the run, at that time of the run.
    pub(super) fn gauge(mut self, mut value: impl FnMut(f64) -> Option<f64>) -> Self {
        for at in 0..=self.end() as u64 {
            let at = at as f64 + 0.004;
            let what = match value(at) {
                Some(value) => What::Gauge { probe: GAUGE.into(), value, rate: false },
                None => What::ProbeFailed { probe: GAUGE.into(), error: "connection refused".into() },
            };
            self.push(at, what);
        }
        self
    }

    /// A sample of the target in every second of the run.
    pub(super) fn target(mut self, mut sample: impl FnMut(f64) -> Option<TargetSample>) -> Self {
        for at in 0..=self.end() as u64 {
            let at = at as f64 + 0.01;
            if let Some(sample) = sample(at) {
                self.push(at, What::Target { target: TARGET.into(), node: "n".into(), sample });
            }
        }
        self
    }

    /// A sample of the histogram in every second of the run.
    pub(super) fn histogram(mut self, mut buckets: impl FnMut(Phase) -> Vec<(Option<f64>, u64)>) -> Self {
        for at in 0..=self.end() as u64 {
            let at = at as f64;
            let what = What::Buckets { probe: HISTOGRAM.into(), buckets: buckets(self.phase(at - 0.5).0) };
            self.push(at + 0.004, what);
        }
        self
    }

    /// Changes every event as asked.
    pub(super) fn with(mut self, change: impl FnMut(&mut Event)) -> Self {
        self.events.iter_mut().for_each(change);
        self
    }

    /// A fault that never touched anything.
    pub(super) fn idle(self) -> Self {
        self.with(|e| {
            if let What::Effect { bit, .. } = &mut e.what {
                *bit = false;
            }
        })
    }

    /// A fault whose agent is replaced, in a time without it.
    pub(super) fn away(mut self, gap: f64) -> Self {
        let injected = self.events.iter().find_map(|e| match &e.what {
            What::Injected { injection, .. } => Some((e.at, injection.id.clone(), injection.node.clone())),
            _ => None,
        });
        let (at, id, node) = injected.expect("an injection");
        self.push(at + gap, What::Resumed { id, node, agent: "9.9.9".into(), gap });
        self
    }

    pub(super) fn run(&self) -> Run {
        let mut events: Vec<_> = self.events.iter().collect();
        events.sort_by(|a, b| a.at.total_cmp(&b.at));
        Run::of(events)
    }

    /// Judges one gate on the first round.
    pub(super) fn judge(&mut self, gate: Gate) -> Finding {
        self.plan.rounds[0].gates = vec![gate];
        super::judge_round(&self.run(), &self.plan, 0).remove(0)
    }

    /// Judges one gate over the whole run.
    pub(super) fn judge_run(&mut self, gate: Gate) -> Finding {
        self.plan.gates = vec![gate];
        super::judge_run(&self.run(), &self.plan).remove(0)
    }
}

/// One of each kind of gate.
pub(super) fn gates() -> Vec<Gate> {
    vec![
        Gate::Latency { probe: LOAD.into(), percentile: 0.95, limit: 0.8 },
        Gate::Latency { probe: HISTOGRAM.into(), percentile: 0.95, limit: 0.8 },
        Gate::Errors { probe: LOAD.into(), limit: 0.01 },
        Gate::Leak { probe: GAUGE.into(), limit: 60.0 },
        Gate::Leak { probe: "threads".into(), limit: 60.0 },
        Gate::Oom { target: TARGET.into(), limit: 0 },
        Gate::Recovery { probe: LOAD.into(), within: 5.0 },
    ]
}
