//! The event stream: the one record of a run. Progress, verdict, reports and history are folds over it.
//!
//! **Invariant:** nothing a person sees comes from anywhere else, so `squall report` can make it all again from
//! `events.jsonl`. One event is one line of JSON.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Something that happened, and when.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since the run started, on the controller's monotonic clock.
    pub at: f64,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum What {
    /// First of all events.
    RunStarted {
        /// Id of the run, and name of its directory.
        run: String,
        /// `metadata.name` of the plan.
        plan: String,
        /// `metadata.version` of the plan: what is being released.
        version: Option<String>,
        /// Wall-clock time of the start.
        started: Timestamp,
        /// Version of `squall`.
        squall: String,
        /// Seed from which the seeds of all faults are drawn.
        seed: u64,
        /// The rounds that are going to run, in order.
        rounds: Vec<RoundOutline>,
        /// Probes by name, with a line that says what each one does.
        probes: BTreeMap<String, ProbeOutline>,
    },
    /// An agent that takes part.
    Node(Node),
    /// A round starts.
    RoundStarted {
        /// Index into the rounds, from 0.
        round: usize,
    },
    /// A phase of the current round starts now. Starts are on whole seconds, where load bins start too.
    PhaseStarted {
        /// Index of the round.
        round: usize,
        /// The phase.
        phase: Phase,
    },
    /// A fault was injected.
    Injected {
        /// Index of the round; none for `squall inject`.
        round: Option<usize>,
        /// What and where.
        injection: Injection,
    },
    /// What a fault measurably did up to now.
    Effect {
        /// Id of the injection.
        id: String,
        /// Node it is on.
        node: String,
        /// Whether it touched its target at least once.
        bit: bool,
        /// Counters and measures by name, each with its unit.
        figures: Vec<Figure>,
    },
    /// An injection ended and its host is as before.
    Reverted {
        /// Id of the injection.
        id: String,
        /// Node it was on.
        node: String,
        /// Seconds that the revert took, seen from here.
        took: f64,
        /// Why it ended: asked for, deadline, lease, target gone.
        reason: String,
    },
    /// The agent was replaced, and the next one injected again what the one before had taken back. Figures begin anew.
    Resumed {
        /// Id of the injection.
        id: String,
        /// Node it is on.
        node: String,
        /// Version of the agent that did.
        agent: String,
        /// Seconds for which nothing was injected, measured by that agent.
        gap: f64,
    },
    /// A revert that failed; the agent keeps trying.
    Stuck {
        /// Id of the injection.
        id: String,
        /// Node it is on.
        node: String,
        /// What went wrong.
        reason: String,
    },
    /// One second of a load probe.
    Load {
        /// Name of the probe.
        probe: String,
        /// Its requests, by the time they were due.
        bin: LoadBin,
    },
    /// One sample of a gauge or of a counter's rate.
    Gauge {
        /// Name of the probe.
        probe: String,
        /// The value; for a counter its increase per second since the sample before.
        value: f64,
        /// Whether it is such a rate.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        rate: bool,
    },
    /// One sample of a histogram: what was added to each bucket since the sample before.
    Buckets {
        /// Name of the probe.
        probe: String,
        /// Upper bound (the last is infinite, written `null`) and the count added, not cumulative.
        buckets: Vec<(Option<f64>, u64)>,
    },
    /// A probe that could not get a sample. It never counts as a pass.
    ProbeFailed {
        /// Name of the probe.
        probe: String,
        /// Why.
        error: String,
    },
    /// A counter went backwards or a process was replaced: values before and after are not comparable.
    ProbeReset {
        /// Name of the probe.
        probe: String,
        /// What was seen.
        reason: String,
    },
    /// What a target uses, measured by the agent on its node.
    Target {
        /// Name of the target in the plan.
        target: String,
        /// Node it is on.
        node: String,
        /// The measures.
        sample: TargetSample,
    },
    /// A gate was judged.
    Judged {
        /// Index of the round; none for a gate over the whole run.
        round: Option<usize>,
        /// The outcome with its evidence.
        finding: Finding,
    },
    /// A round is over.
    RoundFinished {
        /// Index of the round.
        round: usize,
        /// What its gates say together.
        verdict: Verdict,
    },
    /// Something a person should read.
    Note {
        /// The text.
        text: String,
    },
    /// Whether the hosts are as they were: last word on the faults.
    HostState {
        /// Injections that were made.
        injected: usize,
        /// Injections that were taken back.
        reverted: usize,
    },
    /// Last of all events.
    RunFinished {
        /// The verdict.
        verdict: Verdict,
        /// One sentence that says why.
        reason: String,
    },
}

/// A round as announced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundOutline {
    /// Its name.
    pub name: String,
    /// Seconds of each phase.
    pub baseline: f64,
    /// Seconds the fault is held.
    pub hold: f64,
    /// Longest recovery, seconds.
    pub recovery: f64,
    /// One line for each fault.
    pub faults: Vec<String>,
    /// Its gates.
    pub gates: Vec<GateOutline>,
}

/// A gate as announced: what its [`Finding`] will be about, and where its limit line goes in a chart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GateOutline {
    /// Kind of gate, as in [`Finding::gate`].
    pub gate: String,
    /// What is judged, as in [`Finding::subject`].
    pub subject: String,
    /// Name of the probe it reads; of the target, for `oom`.
    pub source: String,
    /// 0.95 for p95; none where the gate reads no percentile.
    pub percentile: Option<f64>,
    /// The limit, in `unit`.
    pub limit: f64,
    /// Unit of the limit, as in [`Finding::unit`].
    pub unit: String,
}

/// A probe as announced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeOutline {
    /// `load`, `scrape` or `agent`.
    pub kind: String,
    /// One line: what it does, to what, how often.
    pub summary: String,
    /// Unit of its values: `seconds`, `bytes`, `1`, …
    pub unit: String,
}

/// An agent and its node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Host name.
    pub node: String,
    /// Where it was reached.
    pub address: String,
    /// `uname -r`.
    pub kernel: String,
    /// Version of the agent.
    pub agent: String,
    /// Fault kinds that work there, each with its mechanism.
    pub faults: BTreeMap<String, String>,
}

/// Parts of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Nothing is wrong yet.
    Baseline,
    /// Faults are held.
    Fault,
    /// Faults have been taken back.
    Recovery,
}

/// An injection as the agent reported it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Injection {
    /// Its id.
    pub id: String,
    /// Node it is on.
    pub node: String,
    /// Kind of fault.
    pub kind: String,
    /// Name of the target in the plan.
    pub target: String,
    /// What it resolved to: `recommender pid 4121`.
    pub resolved: String,
    /// One line: what it does.
    pub summary: String,
    /// How it is done there: `TAP queue`.
    pub mechanism: String,
    /// Each change to the host with its undo.
    pub changes: Vec<String>,
    /// What the agent warned about.
    pub warnings: Vec<String>,
    /// Seconds after the start of the run at which it ends by itself.
    pub ends: f64,
    /// Seed of its random decisions; 0 where there are none.
    pub seed: u64,
}

/// One measure of an effect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// `matched`, `dropped`, `delayed`, `cpu_usage`, …
    pub name: String,
    /// Its value.
    pub value: f64,
    /// `packets`, `ratio`, `bytes`, `seconds`, …
    pub unit: String,
}

/// Requests of one second, by the time they were *due*. `due = ok + failed`, where failed includes the dropped.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadBin {
    /// Seconds since the run started; the bin covers one second from here.
    pub start: f64,
    /// Requests that were due.
    pub due: u64,
    /// Requests with the expected answer in time.
    pub ok: u64,
    /// Requests without, by reason: `timeout`, `connect`, `status 500`, `json $.items`, `dropped`.
    pub failed: BTreeMap<String, u64>,
    /// Requests that left more than 10 ms after they were due: the generator was late, not the service.
    pub late: u64,
    /// Requests never sent, because too many were in flight. Also in `failed`, as `dropped`.
    pub dropped: u64,
    /// Latency of good answers from the time the request was due: microseconds, count; ascending.
    pub ok_latency: Vec<(u64, u64)>,
    /// Latency of bad ones (a timeout counts as the time waited); same form.
    pub failed_latency: Vec<(u64, u64)>,
}

/// What a target uses.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TargetSample {
    /// Processes that match.
    pub processes: u32,
    /// Their threads.
    pub threads: u64,
    /// Their open file descriptors.
    #[serde(default)]
    pub fds: Option<u64>,
    /// Their resident memory, bytes.
    pub rss: u64,
    /// CPU seconds they used since they started.
    pub cpu: f64,
    /// OOM kills in the target's cgroups since they were made; none where that cannot be read.
    pub oom_kills: Option<u64>,
    /// Changes when a process of the target is replaced.
    pub generation: String,
    /// Memory charged to the cgroup, bytes.
    pub cgroup_memory: u64,
    /// Limit of the cgroup, bytes; 0 where there is none.
    pub cgroup_memory_limit: u64,
}

/// What a gate found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Unique in the run: `redis-slow/latency[shoppers p95]`.
    pub name: String,
    /// Kind of gate: `latency`.
    pub gate: String,
    /// What was judged: `shoppers p95`.
    pub subject: String,
    /// The outcome.
    pub outcome: Outcome,
    /// The estimate, in `unit`; none where there is none.
    pub value: Option<f64>,
    /// Confidence interval of the estimate; an open end is none.
    pub interval: Option<(Option<f64>, Option<f64>)>,
    /// The limit of the plan, in `unit`.
    pub limit: f64,
    /// `seconds`, `ratio`, `per_minute`, `count`.
    pub unit: String,
    /// The same estimate over the baseline.
    pub baseline: Option<f64>,
    /// Samples that were judged.
    pub samples: u64,
    /// Seconds into the fault at which the limit was first passed.
    pub since: Option<f64>,
    /// p-value of "the limit holds", for the correction over all gates; none where a failure needs no statistics.
    pub p: Option<f64>,
    /// One sentence: why this outcome, and, where inconclusive, what would decide it.
    pub reason: String,
}

/// Outcome of one gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The whole interval is inside the limit.
    Pass,
    /// The whole interval is past the limit.
    Fail,
    /// Anything else.
    Inconclusive,
}

/// What a round or a run ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every gate passed and every fault bit.
    Promote,
    /// A gate failed, and the plan says to stop the release.
    Block,
    /// A gate failed, and the plan says to go back to the version before.
    Rollback,
    /// Nothing failed, but not everything is proven.
    Inconclusive,
    /// Stopped by a person, a safety limit or a lost agent.
    Aborted,
}

impl Verdict {
    /// The exit code of `squall run`.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Promote => 0,
            Self::Block | Self::Rollback => 1,
            Self::Inconclusive => 3,
            Self::Aborted => 4,
        }
    }
}
