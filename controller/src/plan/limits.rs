//! How much a plan may touch at once, and when it has to stop. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::fault::{percent, time};
use crate::{fold::Run, probe::Second, replicas::at_most, report::figure::several};

/// The limits of a plan.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Limits {
    /// Largest share of the nodes on which a round touches one target, 0 to 1.
    pub nodes: Option<f64>,
    /// Largest share of the nodes of any one zone on which a round touches anything, 0 to 1.
    pub zone: Option<f64>,
    /// Largest share of one target's replicas that a round touches, over all agents, 0 to 1.
    pub replicas: Option<f64>,
    /// Largest share of the pods of any one node that a round touches, 0 to 1.
    pub pods: Option<f64>,
    /// Most injections of a round.
    pub injections: Option<usize>,
    /// When a run has to end at once.
    pub abort: Option<Abort>,
}

/// The abort gate: what users may see at the very most.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Abort {
    /// A load probe.
    pub probe: String,
    /// Largest share of failed requests, 0 to 1.
    pub errors: f64,
    /// Over so much time, whole seconds.
    pub window: Duration,
}

/// What one injection of a round touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Touched {
    /// Name of the target.
    pub target: String,
    /// The node's place in the list of agents.
    pub node: usize,
    /// Which replica of the target, told from the others of that node.
    pub replica: String,
    /// How many replicas the target has, over all agents.
    pub replicas: usize,
    /// UIDs of the pods that are hurt.
    pub pods: Vec<String>,
    /// How many pods the node has.
    pub pods_there: usize,
}

/// A limit that a round is beyond.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Beyond {
    /// The limit: `limits.nodes`.
    pub field: &'static str,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub fix: &'static str,
}

/// How much more than this share it is, if it is.
fn more(share: f64, touched: usize, all: usize, what: &str) -> Option<String> {
    let allowed = at_most(share, all);
    (touched > allowed).then(|| {
        let there = percent(touched as f64 / all as f64);
        let (all, most) = (several(all, what), percent(share));
        format!("{touched} of {all} at once ({there}), and {most} may be, which is {allowed}")
    })
}

fn by<K: Ord>(touched: &[Touched], key: impl Fn(&Touched) -> &K) -> BTreeMap<&K, Vec<&Touched>> {
    let mut groups: BTreeMap<&K, Vec<&Touched>> = BTreeMap::new();
    for one in touched {
        groups.entry(key(one)).or_default().push(one);
    }
    groups
}

impl Limits {
    /// Which limit a round is beyond. `nodes` are the agents' nodes, each with its zone.
    pub(crate) fn beyond(&self, touched: &[Touched], nodes: &[(&str, &str)]) -> Option<Beyond> {
        const FIX: &str = "name more agents, choose a narrower target, or agree on more";
        let beyond = |field, problem| Some(Beyond { field, problem, fix: FIX });
        let count = touched.len();
        if let Some(most) = self.injections.filter(|most| count > *most) {
            let problem = format!("{} at once, and {most} may be", several(count, "injection"));
            return beyond("limits.injections", problem);
        }
        if let Some(share) = self.nodes {
            for (target, touched) in by(touched, |t| &t.target) {
                let on: BTreeSet<_> = touched.iter().map(|t| t.node).collect();
                if let Some(text) = more(share, on.len(), nodes.len(), "node") {
                    return beyond("limits.nodes", format!("`{target}` would be hurt on {text}"));
                }
            }
        }
        if let Some(share) = self.zone {
            let nameless: Vec<_> =
                nodes.iter().filter(|(_, zone)| zone.is_empty()).map(|(n, _)| *n).collect();
            if !nameless.is_empty() {
                return Some(Beyond {
                    field: "limits.zone",
                    problem: format!("it is not known which zone is that of {}", nameless.join(", ")),
                    fix: "start the agents there with --zone NAME, or leave this limit out",
                });
            }
            for zone in nodes.iter().map(|(_, zone)| *zone).collect::<BTreeSet<_>>() {
                let of = nodes.iter().filter(|(_, other)| *other == zone).count();
                let on: BTreeSet<_> =
                    touched.iter().map(|t| t.node).filter(|n| nodes[*n].1 == zone).collect();
                if let Some(text) = more(share, on.len(), of, "node") {
                    return beyond("limits.zone", format!("in the zone {zone} would be hurt {text}"));
                }
            }
        }
        if let Some(share) = self.replicas {
            for (target, touched) in by(touched, |t| &t.target) {
                // Faults that take hold of different things may count differently; the smallest number is sure not to hide any.
                let of = touched.iter().map(|t| t.replicas).min().unwrap_or_default();
                let taken: BTreeSet<_> = touched.iter().map(|t| (t.node, &t.replica)).collect();
                if let Some(text) = more(share, taken.len().min(of), of, "replica") {
                    return Some(Beyond {
                        field: "limits.replicas",
                        problem: format!("of `{target}` would be hurt {text}"),
                        fix: "take fewer with `replicas` in the fault, or agree on more",
                    });
                }
            }
        }
        if let Some(share) = self.pods {
            for (node, touched) in by(touched, |t| &t.node) {
                let of = touched.iter().map(|t| t.pods_there).min().unwrap_or_default();
                let hurt: BTreeSet<_> = touched.iter().flat_map(|t| &t.pods).collect();
                if let Some(text) = more(share, hurt.len(), of, "pod") {
                    return beyond("limits.pods", format!("on {} would be hurt {text}", nodes[*node].0));
                }
            }
        }
        None
    }

    /// One line for people; none where nothing is limited.
    pub(crate) fn line(&self) -> Option<String> {
        let nodes = self.nodes.map(|share| format!("{} of the nodes for each target", percent(share)));
        let zone = self.zone.map(|share| format!("{} of the nodes of a zone", percent(share)));
        let replicas =
            self.replicas.map(|share| format!("{} of the replicas of each target", percent(share)));
        let pods = self.pods.map(|share| format!("{} of the pods of a node", percent(share)));
        let injections = self.injections.map(|most| several(most, "injection"));
        let abort = self.abort.as_ref().map(Abort::line);
        let all: Vec<String> =
            [nodes, zone, replicas, pods, injections, abort].into_iter().flatten().collect();
        (!all.is_empty()).then(|| all.join(", "))
    }
}

/// A load probe that is well says something every second; one that says nothing for so long beyond the window is not, seconds.
const SILENCE: f64 = 5.0;

impl Abort {
    fn line(&self) -> String {
        let window = time(self.window);
        format!("abort where more than {} of {} fail over {window}", percent(self.errors), self.probe)
    }

    /// Why the run has to end, if it has to: what its probe saw since `start` in the last seconds that are over, those included
    /// of which answers are missing (`open`): what has failed by now has failed. A probe that says nothing guards nothing.
    pub(crate) fn reached(&self, run: &Run, open: &[Second], start: f64, now: f64) -> Option<String> {
        let told = run.bins(&self.probe, (start, f64::INFINITY));
        let last = run.probes.get(&self.probe).and_then(|p| p.bins.last()).map_or(0.0, |bin| bin.start + 1.0);
        let told = told.iter().map(|bin| (bin.due, bin.failed.values().sum::<u64>()));
        let open = open.iter().filter(|second| second.start >= last.max(start) - 1e-6);
        let silent = now - open.clone().next_back().map_or(last, |second| second.start + 1.0).max(start);
        let (window, probe) = (time(self.window), &self.probe);
        if silent > self.window.as_secs_f64() + SILENCE {
            return Some(format!(
                "abort gate: {probe} has said nothing for {silent:.0}s, so it guards nobody"
            ));
        }
        let all: Vec<(u64, u64)> = told.chain(open.map(|second| (second.due, second.failed))).collect();
        let last = all.get(all.len().checked_sub(self.window.as_secs() as usize)?..)?;
        let (due, failed) = last.iter().fold((0, 0), |(due, failed), (d, f)| (due + d, failed + f));
        let share = failed as f64 / due as f64;
        (due > 0 && share > self.errors).then(|| {
            format!(
                "abort gate: {failed} of {due} requests of {probe} failed in the last {window} ({}; {} may)",
                percent(share),
                percent(self.errors)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::{
        event::{Event, LoadBin, ProbeOutline, What},
        fold::Probe,
    };

    /// Of a target with one replica on each node, and no pods.
    fn touched(all: &[(&str, usize)]) -> Vec<Touched> {
        let one = |(target, node): &(&str, usize)| Touched {
            target: (*target).to_owned(),
            node: *node,
            replica: "process 7".to_owned(),
            replicas: 4,
            pods: vec![],
            pods_there: 0,
        };
        all.iter().map(one).collect()
    }

    const ZONES: [(&str, &str); 4] = [("a", "north"), ("b", "north"), ("c", "south"), ("d", "south")];

    fn limits(text: &str) -> Limits {
        let mut limits = Limits::default();
        for (name, value) in text.split(", ").filter_map(|term| term.split_once(": ")) {
            let share = value.strip_suffix('%').map(|percent| percent.parse::<f64>().unwrap() / 100.0);
            match name {
                "nodes" => limits.nodes = share,
                "zone" => limits.zone = share,
                "replicas" => limits.replicas = share,
                "pods" => limits.pods = share,
                _ => limits.injections = Some(value.parse().unwrap()),
            }
        }
        limits
    }

    #[rstest]
    #[case::half_of_four("nodes: 50%", &[("web", 0), ("web", 1)], 4, None)]
    #[case::twice_on_a_node("nodes: 50%", &[("web", 0), ("web", 0), ("web", 1)], 4, None)]
    #[case::of_each_target("nodes: 50%", &[("web", 0), ("web", 1), ("db", 2), ("db", 3)], 4, None)]
    #[case::three_of_four("nodes: 50%", &[("web", 0), ("web", 1), ("web", 2)], 4, Some("limits.nodes"))]
    #[case::the_only_node("nodes: 50%", &[("web", 0)], 1, Some("limits.nodes"))]
    #[case::a_third("nodes: 33.333333333333336%", &[("web", 0)], 3, None)]
    #[case::too_many("injections: 2", &[("web", 0), ("web", 0), ("db", 1)], 4, Some("limits.injections"))]
    #[case::as_many("injections: 3", &[("web", 0), ("web", 0), ("db", 1)], 4, None)]
    #[case::no_limits("", &[("web", 0)], 1, None)]
    #[case::one_of_each_zone("zone: 50%", &[("web", 0), ("web", 2)], 4, None)]
    #[case::all_of_a_zone("zone: 50%", &[("web", 0), ("web", 1)], 4, Some("limits.zone"))]
    #[case::a_zone_by_two_targets("zone: 50%", &[("web", 2), ("db", 3)], 4, Some("limits.zone"))]
    #[case::a_zone_of_one("zone: 50%", &[("web", 2)], 3, Some("limits.zone"))]
    #[case::half_of_the_replicas("replicas: 50%", &[("web", 0), ("web", 1)], 4, None)]
    #[case::a_replica_twice("replicas: 25%", &[("web", 0), ("web", 0)], 4, None)]
    #[case::too_many_replicas("replicas: 50%", &[("web", 0), ("web", 1), ("web", 2)], 4, Some("limits.replicas"))]
    #[case::replicas_of_each_target("replicas: 25%", &[("web", 0), ("db", 1)], 4, None)]
    fn no_more_is_touched_than_agreed(
        #[case] agreed: &str,
        #[case] all: &[(&str, usize)],
        #[case] nodes: usize,
        #[case] beyond: Option<&str>,
    ) {
        let found = limits(agreed).beyond(&touched(all), &ZONES[..nodes]);
        assert_eq!(found.as_ref().map(|beyond| beyond.field), beyond, "{found:?}");
    }

    #[test]
    fn what_is_beyond_a_limit_is_told() {
        let told = |agreed: &str, touched: &[Touched], nodes: &[(&str, &str)]| {
            let Beyond { field, problem, fix } = limits(agreed).beyond(touched, nodes).expect("beyond it");
            format!("{field}: {problem}; {fix}")
        };
        let two = touched(&[("web", 0), ("web", 1)]);
        let few = |replicas| two.iter().map(|t| Touched { replicas, ..t.clone() }).collect::<Vec<_>>();
        let pods = |t: &Touched, pods: &[&str]| Touched {
            pods: pods.iter().map(|&pod| pod.to_owned()).collect(),
            pods_there: 4,
            ..t.clone()
        };
        let pods = [pods(&two[0], &["a", "b"]), pods(&two[0], &["b", "c"]), pods(&two[1], &["d", "e"])];
        let all = [
            told("nodes: 25%", &two, &ZONES),
            told("zone: 50%", &two, &ZONES),
            told("zone: 50%", &two, &[("a", "north"), ("b", ""), ("c", "")]),
            told("replicas: 50%", &few(2), &ZONES),
            // A fault that takes hold of all at once, and one that does not.
            told("replicas: 50%", &[few(1).remove(0), few(4).remove(1)], &ZONES),
            told("pods: 50%", &pods, &ZONES),
            told("injections: 1", &two, &ZONES),
        ];
        assert_eq!(limits("pods: 75%").beyond(&pods, &ZONES), None);
        insta::assert_snapshot!(all.join("\n"), @r#"
        limits.nodes: `web` would be hurt on 2 of 4 nodes at once (50%), and 25% may be, which is 1; name more agents, choose a narrower target, or agree on more
        limits.zone: in the zone north would be hurt 2 of 2 nodes at once (100%), and 50% may be, which is 1; name more agents, choose a narrower target, or agree on more
        limits.zone: it is not known which zone is that of b, c; start the agents there with --zone NAME, or leave this limit out
        limits.replicas: of `web` would be hurt 2 of 2 replicas at once (100%), and 50% may be, which is 1; take fewer with `replicas` in the fault, or agree on more
        limits.replicas: of `web` would be hurt 1 of 1 replica at once (100%), and 50% may be, which is 0; take fewer with `replicas` in the fault, or agree on more
        limits.pods: on a would be hurt 3 of 4 pods at once (75%), and 50% may be, which is 2; name more agents, choose a narrower target, or agree on more
        limits.injections: 2 injections at once, and 1 may be; name more agents, choose a narrower target, or agree on more
        "#);
    }

    #[test]
    fn the_run_ends_where_users_see_too_much_for_too_long() {
        let abort = Abort { probe: "shoppers".into(), errors: 0.2, window: Duration::from_secs(3) };
        let told = |failed: &[u64]| {
            let outline =
                ProbeOutline { kind: "load".into(), summary: String::new(), unit: "seconds".into() };
            let mut run = Run::default();
            run.probes.insert("shoppers".into(), Probe::announced(outline));
            for (second, failed) in failed.iter().enumerate() {
                let failed = [("timeout".to_owned(), *failed)].into();
                let bin = LoadBin { start: second as f64, due: 100, failed, ..LoadBin::default() };
                run.apply(&Event {
                    at: second as f64 + 1.0,
                    what: What::Load { probe: "shoppers".into(), bin },
                });
            }
            run
        };
        let reached = |failed: &[u64], open: &[u64], start| {
            let open: Vec<_> = open
                .iter()
                .zip(failed.len()..)
                .map(|(failed, second)| Second { start: second as f64, due: 100, failed: *failed })
                .collect();
            abort.reached(&told(failed), &open, start, (failed.len() + open.len()) as f64 + 0.5)
        };
        assert_eq!(reached(&[100, 100], &[], 0.0), None, "not for long enough");
        assert_eq!(reached(&[20, 20, 20], &[], 0.0), None, "as much as may be");
        assert_eq!(reached(&[100, 0, 0, 10], &[], 0.0), None, "over by now");
        assert_eq!(reached(&[100, 100, 100], &[], 1.0), None, "before the round");
        let why = reached(&[0, 0, 10, 40, 40], &[], 0.0).expect("too much");
        assert_eq!(why, "abort gate: 90 of 300 requests of shoppers failed in the last 3s (30%; 20% may)");
        // What hangs holds no second back.
        let why = reached(&[0, 0], &[99, 99, 0], 0.0).expect("too much");
        assert_eq!(why, "abort gate: 198 of 300 requests of shoppers failed in the last 3s (66%; 20% may)");
        assert_eq!(reached(&[0, 0], &[20, 20, 20], 0.0), None, "as much as may be");
        assert_eq!(abort.reached(&told(&[0, 0]), &[], 0.0, 9.5), None, "a little late");
        let why = abort.reached(&told(&[0, 0]), &[], 0.0, 11.0).expect("blind");
        assert_eq!(why, "abort gate: shoppers has said nothing for 9s, so it guards nobody");
    }
}
