//! How much a plan may touch at once, and when it has to stop. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::fault::{percent, time};
use crate::{fold::Run, report::figure::several};

/// The limits of a plan.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Limits {
    /// Largest share of the nodes on which a round touches one target, 0 to 1.
    pub nodes: Option<f64>,
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

impl Limits {
    /// Which limit a round is beyond: its field, and what is wrong. `touched` names the target and the node's place in the
    /// list of `nodes` for each injection.
    pub(crate) fn beyond<'a>(
        &self,
        touched: impl IntoIterator<Item = (&'a str, usize)>,
        nodes: usize,
    ) -> Option<(&'static str, String)> {
        let mut on: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
        let mut count = 0;
        for (target, node) in touched {
            on.entry(target).or_default().insert(node);
            count += 1;
        }
        if let Some(most) = self.injections
            && count > most
        {
            return Some((
                "limits.injections",
                format!("{} at once, and {most} may be", several(count, "injection")),
            ));
        }
        let most = self.nodes?;
        // As shares are written, so that 50% of 4 nodes are 2 and no rounding makes them 1.
        let allowed = (nodes as f64 * most + 1e-9).floor() as usize;
        on.into_iter().find(|(_, on)| on.len() > allowed).map(|(target, on)| {
            let share = percent(on.len() as f64 / nodes as f64);
            let text = format!(
                "`{target}` would be hurt on {} of {} at once ({share}), and {} may be, which is {allowed}",
                on.len(),
                several(nodes, "node"),
                percent(most)
            );
            ("limits.nodes", text)
        })
    }

    /// One line for people; none where nothing is limited.
    pub(crate) fn line(&self) -> Option<String> {
        let nodes = self.nodes.map(|share| format!("{} of the nodes for each target", percent(share)));
        let injections = self.injections.map(|most| several(most, "injection"));
        let abort = self.abort.as_ref().map(Abort::line);
        let all: Vec<String> = nodes.into_iter().chain(injections).chain(abort).collect();
        (!all.is_empty()).then(|| all.join(", "))
    }
}

impl Abort {
    fn line(&self) -> String {
        let window = time(self.window);
        format!("abort where more than {} of {} fail over {window}", percent(self.errors), self.probe)
    }

    /// Why the run has to end, if it has to: what its probe saw since `start` in the last seconds it told of.
    pub(crate) fn reached(&self, run: &Run, start: f64) -> Option<String> {
        let bins = run.bins(&self.probe, (start, f64::INFINITY));
        let seconds = self.window.as_secs() as usize;
        let last = bins.get(bins.len().checked_sub(seconds)?..)?;
        let due: u64 = last.iter().map(|bin| bin.due).sum();
        let failed: u64 = last.iter().flat_map(|bin| bin.failed.values()).sum();
        let share = failed as f64 / due as f64;
        (due > 0 && share > self.errors).then(|| {
            let window = time(self.window);
            format!(
                "abort gate: {failed} of {due} requests of {} failed in the last {window} ({}; {} may)",
                self.probe,
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

    #[rstest]
    #[case::half_of_four(Some(0.5), None, &[("web", 0), ("web", 1)], 4, None)]
    #[case::twice_on_a_node(Some(0.5), None, &[("web", 0), ("web", 0), ("web", 1)], 4, None)]
    #[case::of_each_target(Some(0.5), None, &[("web", 0), ("web", 1), ("db", 2), ("db", 3)], 4, None)]
    #[case::three_of_four(Some(0.5), None, &[("web", 0), ("web", 1), ("web", 2)], 4, Some("limits.nodes"))]
    #[case::the_only_node(Some(0.5), None, &[("web", 0)], 1, Some("limits.nodes"))]
    #[case::a_third(Some(1.0 / 3.0), None, &[("web", 0)], 3, None)]
    #[case::too_many(None, Some(2), &[("web", 0), ("web", 0), ("db", 1)], 4, Some("limits.injections"))]
    #[case::as_many(None, Some(3), &[("web", 0), ("web", 0), ("db", 1)], 4, None)]
    #[case::no_limits(None, None, &[("web", 0)], 1, None)]
    fn no_more_is_touched_than_agreed(
        #[case] share: Option<f64>,
        #[case] injections: Option<usize>,
        #[case] touched: &[(&str, usize)],
        #[case] nodes: usize,
        #[case] beyond: Option<&str>,
    ) {
        let limits = Limits { nodes: share, injections, abort: None };
        let found = limits.beyond(touched.iter().copied(), nodes);
        assert_eq!(found.as_ref().map(|(field, _)| *field), beyond, "{found:?}");
    }

    #[test]
    fn the_run_ends_where_users_see_too_much_for_too_long() {
        let abort = Abort { probe: "shoppers".into(), errors: 0.2, window: Duration::from_secs(3) };
        let told = |failed: &[u64]| {
            let outline =
                ProbeOutline { kind: "load".into(), summary: String::new(), unit: "seconds".into() };
            let mut run = Run::default();
            let probe = Probe {
                outline,
                bins: vec![],
                values: vec![],
                buckets: vec![],
                failures: vec![],
                resets: vec![],
            };
            run.probes.insert("shoppers".into(), probe);
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
        assert_eq!(abort.reached(&told(&[100, 100]), 0.0), None, "not for long enough");
        assert_eq!(abort.reached(&told(&[20, 20, 20]), 0.0), None, "as much as may be");
        assert_eq!(abort.reached(&told(&[100, 0, 0, 10]), 0.0), None, "over by now");
        assert_eq!(abort.reached(&told(&[100, 100, 100]), 1.0), None, "before the round");
        let why = abort.reached(&told(&[0, 0, 10, 40, 40]), 0.0).expect("too much");
        assert_eq!(why, "abort gate: 90 of 300 requests of shoppers failed in the last 3s (30%; 20% may)");
    }
}
