//! Which of a target's replicas a fault takes. Pure.

use std::{collections::BTreeMap, fmt, str::FromStr};

use squall_proto::v1;

use crate::{
    plan::{fault::percent, units},
    report::figure::several,
};

/// How many of a target's replicas a fault takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Take {
    /// So many.
    Count(usize),
    /// Of all over all agents, 0 to 1.
    Share(f64),
}

impl Take {
    /// `50%` or `1`.
    pub(crate) fn parse(text: &str) -> Result<Self, units::Wrong> {
        const EXPECTED: &str = "expected a share or a number of them: 50%, 1";
        if let Ok(count) = text.trim().parse() {
            return if count == 0 {
                Err(("none would be hurt".into(), EXPECTED.into()))
            } else {
                Ok(Self::Count(count))
            };
        }
        match units::share(text) {
            Ok(share) if share > 0.0 => Ok(Self::Share(share)),
            _ => Err((format!("`{text}` is no part of the replicas"), EXPECTED.into())),
        }
    }

    /// Of so many; why not, where that is none or more than there are.
    fn of(self, all: usize) -> Result<usize, String> {
        let there = several(all, "replica");
        match self {
            Self::Count(count) if count <= all => Ok(count),
            Self::Count(count) => Err(format!("replicas: {count}: there are only {there}; take fewer")),
            Self::Share(share) => match at_most(share, all) {
                0 => {
                    Err(format!("replicas: {self}: of {there} that is none; take more, or write replicas: 1"))
                }
                count => Ok(count),
            },
        }
    }
}

impl fmt::Display for Take {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Share(share) => f.write_str(&percent(*share)),
        }
    }
}

impl FromStr for Take {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|(message, fix)| format!("{message}: {fix}"))
    }
}

/// The most of so many that a share allows: as shares are written, so that 50% of 4 are 2 and no rounding makes them 1.
pub(crate) fn at_most(share: f64, all: usize) -> usize {
    (all as f64 * share + 1e-9).floor() as usize
}

/// What tells replicas of one node from each other: a pod is one, however many processes it has.
pub(crate) fn key(target: &v1::ResolvedTarget) -> &str {
    if target.pod.is_empty() { &target.identity } else { &target.pod }
}

/// The replicas that were chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Identities of what is taken, by the agent's place in the list.
    pub by_agent: BTreeMap<usize, Vec<String>>,
    /// How many replicas that are.
    pub taken: usize,
    /// Of how many.
    pub of: usize,
    /// By which seed.
    pub seed: u64,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} by seed {}", self.taken, several(self.of, "replica"), self.seed)
    }
}

/// Chooses among what a target resolves to on each agent, which is named by its node. The same seed takes the same ones of the
/// same replicas, and taking more takes these too.
pub(crate) fn choose(
    take: Take,
    seed: u64,
    there: &[(&str, Vec<v1::ResolvedTarget>)],
) -> Result<Choice, String> {
    let mut replicas: BTreeMap<(usize, &str), Vec<String>> = BTreeMap::new();
    for (agent, (_, targets)) in there.iter().enumerate() {
        for target in targets {
            replicas.entry((agent, key(target))).or_default().push(target.identity.clone());
        }
    }
    let of = replicas.len();
    let taken = take.of(of)?;
    let mut ranked: Vec<_> = replicas.into_iter().collect();
    ranked.sort_by_key(|((agent, key), _)| (rank(seed, there[*agent].0, key), *agent));
    let mut by_agent: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for ((agent, _), identities) in ranked.into_iter().take(taken) {
        by_agent.entry(agent).or_default().extend(identities);
    }
    Ok(Choice { by_agent, taken, of, seed })
}

/// Where a replica stands in the order of a seed.
fn rank(seed: u64, node: &str, key: &str) -> u64 {
    let bytes = node.bytes().chain([0]).chain(key.bytes());
    bytes.fold(mixed(seed, 0), |hash, byte| mixed(hash, byte.into()))
}

/// The finalizer of splitmix64 (Steele, Lea, Flood 2014): neighbouring inputs give unrelated outputs.
pub(crate) fn mixed(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rstest::rstest;

    use super::*;

    fn target(identity: &str, pod: &str) -> v1::ResolvedTarget {
        v1::ResolvedTarget { identity: identity.into(), pod: pod.into(), ..Default::default() }
    }

    fn ten() -> Vec<(&'static str, Vec<v1::ResolvedTarget>)> {
        let five = || (0..5).map(|n| target(&format!("process {n}"), "")).collect();
        vec![("node-a", five()), ("node-b", five())]
    }

    fn taken(choice: &Choice) -> BTreeSet<(usize, String)> {
        let all = choice.by_agent.iter();
        all.flat_map(|(agent, ids)| ids.iter().map(|id| (*agent, id.clone()))).collect()
    }

    #[rstest]
    #[case("50%", 5)]
    #[case("1", 1)]
    #[case("10", 10)]
    #[case("19%", 1)]
    #[case("100%", 10)]
    fn so_many_are_taken(#[case] take: Take, #[case] expected: usize) {
        let choice = choose(take, 7, &ten()).unwrap();
        assert_eq!((choice.taken, choice.of, taken(&choice).len()), (expected, 10, expected));
    }

    #[rstest]
    #[case("9%", "replicas: 9%: of 10 replicas that is none; take more, or write replicas: 1")]
    #[case("11", "replicas: 11: there are only 10 replicas; take fewer")]
    fn what_cannot_be_taken_is_told(#[case] take: Take, #[case] why: &str) {
        assert_eq!(choose(take, 7, &ten()), Err(why.to_owned()));
    }

    #[rstest]
    #[case("0")]
    #[case("0%")]
    #[case("101%")]
    #[case("half")]
    #[case("-1")]
    fn nonsense(#[case] text: &str) {
        assert!(text.parse::<Take>().unwrap_err().contains("50%, 1"));
    }

    #[test]
    fn a_seed_takes_the_same_ones_each_time_and_all_get_their_turn() {
        let of = |take, seed| taken(&choose(take, seed, &ten()).unwrap());
        let mut ever = BTreeSet::new();
        for seed in 0..100 {
            let one = of(Take::Count(1), seed);
            assert_eq!(one, of(Take::Count(1), seed));
            assert!(one.is_subset(&of(Take::Share(0.5), seed)), "more are these and others");
            ever.extend(one);
        }
        assert_eq!(ever.len(), 10);
        // As it was when this was written: a seed in a report is good for ever.
        let four = of(Take::Count(4), 4711);
        let four: Vec<String> = four.iter().map(|(agent, id)| format!("{agent} {id}")).collect();
        insta::assert_snapshot!(four.join(", "), @"0 process 3, 1 process 1, 1 process 2, 1 process 3");
    }

    #[test]
    fn a_pod_is_taken_as_a_whole() {
        let there = vec![("node-a", vec![target("1", "a"), target("2", "b"), target("3", "a")])];
        for seed in 0..20 {
            let choice = choose(Take::Share(0.5), seed, &there).unwrap();
            assert_eq!((choice.taken, choice.of), (1, 2));
            assert!([vec!["1", "3"], vec!["2"]].iter().any(|pod| choice.by_agent[&0] == *pod), "{choice:?}");
        }
    }
}
