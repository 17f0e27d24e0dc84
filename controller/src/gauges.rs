//! `agent` probes: from what agents measure of a target to samples of gauges. Pure.

use std::collections::BTreeMap;

use squall_proto::v1;

use crate::{
    event::{TargetSample, What},
    plan::{Measure, Plan, Probe},
};

/// The `agent` probes of a plan, and the last samples they are made from.
#[derive(Debug)]
pub(crate) struct Gauges {
    /// Name of the probe, of its target, and the measure.
    probes: Vec<(String, String, Measure)>,
    /// By target and node.
    last: BTreeMap<String, BTreeMap<String, Node>>,
}

#[derive(Debug, Default)]
struct Node {
    last: Option<v1::TargetSample>,
    /// CPUs used between the last two samples.
    cpus: Option<f64>,
    /// Whether there was a sample since the last value of the gauges.
    fresh: bool,
}

impl Gauges {
    /// The gauges of a plan, for targets that are on these nodes.
    pub(crate) fn new(plan: &Plan, nodes: impl IntoIterator<Item = (String, String)>) -> Self {
        let probes = plan.probes.iter().filter_map(|(name, probe)| match probe {
            Probe::Agent { target, measure } => Some((name.clone(), target.clone(), *measure)),
            Probe::Load(_) | Probe::Scrape(_) => None,
        });
        let mut last: BTreeMap<String, BTreeMap<String, Node>> = BTreeMap::new();
        for (target, node) in nodes {
            last.entry(target).or_default().insert(node, Node::default());
        }
        Self { probes: probes.collect(), last }
    }

    /// Takes in a sample; gives the events it makes. Values of several nodes are summed, one value a second.
    pub(crate) fn take(&mut self, target: &str, node: &str, sample: &v1::TargetSample) -> Vec<What> {
        let mut events =
            vec![What::Target { target: target.into(), node: node.into(), sample: as_event(sample) }];
        let nodes = self.last.entry(target.to_owned()).or_default();
        let state = nodes.entry(node.to_owned()).or_default();
        if sample.processes == 0 {
            *state = Node { fresh: true, ..Node::default() };
            events.extend(self.failed(target, &format!("no process of `{target}` on {node}")));
            return events;
        }
        let before = state.last.replace(sample.clone());
        state.fresh = true;
        state.cpus = None;
        if let Some(before) = before {
            if before.generation == sample.generation {
                let seconds = sample.boot_ns.saturating_sub(before.boot_ns) as f64 / 1e9;
                let used = sample.cpu_seconds - before.cpu_seconds;
                state.cpus = (seconds > 0.0).then(|| (used / seconds).max(0.0));
            } else {
                let reason = format!("a process of `{target}` on {node} was replaced");
                let of = self.probes.iter().filter(|(_, of, _)| of == target);
                events.extend(
                    of.map(|(probe, _, _)| What::ProbeReset { probe: probe.clone(), reason: reason.clone() }),
                );
            }
        }
        if nodes.values().all(|n| n.fresh) {
            for (probe, _, measure) in self.probes.iter().filter(|(_, of, _)| of == target) {
                let values: Option<Vec<f64>> = nodes.values().map(|n| value(n, *measure)).collect();
                if let Some(values) = values {
                    let value = values.iter().sum();
                    events.push(What::Gauge { probe: probe.clone(), value, rate: false });
                } else if *measure == Measure::Fds {
                    let error = format!(
                        "the agent may not count the open files of `{target}`: give it CAP_DAC_READ_SEARCH"
                    );
                    events.push(What::ProbeFailed { probe: probe.clone(), error });
                }
            }
            for node in nodes.values_mut() {
                node.fresh = false;
            }
        }
        events
    }

    /// The events of a target that could not be measured.
    pub(crate) fn failed(&self, target: &str, error: &str) -> Vec<What> {
        let of = self.probes.iter().filter(|(_, of, _)| of == target);
        of.map(|(probe, _, _)| What::ProbeFailed { probe: probe.clone(), error: error.to_owned() }).collect()
    }
}

fn value(node: &Node, measure: Measure) -> Option<f64> {
    let sample = node.last.as_ref()?;
    match measure {
        Measure::Threads => Some(sample.threads as f64),
        Measure::Fds => sample.fds_known.then_some(sample.fds as f64),
        Measure::Rss => Some(sample.rss_bytes as f64),
        Measure::Cpu => node.cpus,
    }
}

fn as_event(sample: &v1::TargetSample) -> TargetSample {
    TargetSample {
        processes: sample.processes,
        threads: sample.threads,
        fds: sample.fds_known.then_some(sample.fds),
        rss: sample.rss_bytes,
        cpu: sample.cpu_seconds,
        oom_kills: sample.oom_known.then_some(sample.oom_kills),
        generation: sample.generation.clone(),
        cgroup_memory: sample.cgroup_memory_bytes,
        cgroup_memory_limit: sample.cgroup_memory_limit_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gauges(measure: Measure, nodes: &[&str]) -> Gauges {
        let last = nodes.iter().map(|n| ((*n).to_owned(), Node::default())).collect();
        Gauges {
            probes: vec![("probe".into(), "web".into(), measure)],
            last: [("web".to_owned(), last)].into(),
        }
    }

    fn sample(second: u64, threads: u64, cpu: f64) -> v1::TargetSample {
        v1::TargetSample {
            boot_ns: second * 1_000_000_000,
            processes: 1,
            threads,
            cpu_seconds: cpu,
            generation: "a".into(),
            ..v1::TargetSample::default()
        }
    }

    fn values(events: &[What]) -> Vec<f64> {
        let value = |e: &What| match e {
            What::Gauge { value, .. } => Some(*value),
            _ => None,
        };
        events.iter().filter_map(value).collect()
    }

    #[test]
    fn nodes_are_summed_once_all_have_spoken() {
        let mut gauges = gauges(Measure::Threads, &["a", "b"]);
        assert_eq!(values(&gauges.take("web", "a", &sample(1, 10, 0.0))), Vec::<f64>::new());
        assert_eq!(values(&gauges.take("web", "b", &sample(1, 5, 0.0))), [15.0]);
        assert_eq!(values(&gauges.take("web", "b", &sample(2, 6, 0.0))), Vec::<f64>::new());
        assert_eq!(values(&gauges.take("web", "a", &sample(2, 10, 0.0))), [16.0]);
    }

    #[test]
    fn cpu_is_a_rate_and_needs_two_samples_of_the_same_processes() {
        let mut gauges = gauges(Measure::Cpu, &["a"]);
        assert_eq!(values(&gauges.take("web", "a", &sample(1, 1, 3.0))), Vec::<f64>::new());
        assert_eq!(values(&gauges.take("web", "a", &sample(3, 1, 4.0))), [0.5]);
        let replaced = v1::TargetSample { generation: "b".into(), ..sample(4, 1, 0.1) };
        let events = gauges.take("web", "a", &replaced);
        assert_eq!(values(&events), Vec::<f64>::new());
        assert!(events.iter().any(|e| matches!(e, What::ProbeReset { .. })), "{events:?}");
    }

    #[test]
    fn files_that_may_not_be_counted_are_a_failed_sample() {
        let mut gauges = gauges(Measure::Fds, &["a"]);
        let known = v1::TargetSample { fds: 7, fds_known: true, ..sample(1, 1, 0.0) };
        assert_eq!(values(&gauges.take("web", "a", &known)), [7.0]);
        let events = gauges.take("web", "a", &v1::TargetSample { fds: 3, ..sample(2, 1, 0.0) });
        assert!(matches!(&events[..], [_, What::ProbeFailed { .. }]), "{events:?}");
    }

    #[test]
    fn a_target_that_is_gone_is_a_failed_sample_and_its_kills_stay_on_record() {
        let mut gauges = gauges(Measure::Threads, &["a"]);
        gauges.take("web", "a", &sample(1, 1, 0.0));
        let gone =
            v1::TargetSample { processes: 0, oom_kills: 1, oom_known: true, ..v1::TargetSample::default() };
        let events = gauges.take("web", "a", &gone);
        assert!(
            matches!(&events[0], What::Target { sample, .. } if sample.oom_kills == Some(1)),
            "{events:?}"
        );
        assert!(matches!(&events[1], What::ProbeFailed { .. }), "{events:?}");
    }
}
