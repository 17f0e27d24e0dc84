//! What gates need against what a plan gives them, for `squall check`.

use super::{leak, percent, recovery, time, trimmed};
use crate::{
    plan::{Gate, Plan, Probe, Round},
    stats::{self, ALPHA_PASS, MIN_BLOCKS},
};

/// Samples a gate needs, and those it is going to get.
#[derive(Debug, Clone, PartialEq)]
pub struct Need {
    /// What is counted: `requests`, `seconds of fault`, …
    pub what: String,
    /// Fewest with which it can pass at all, with nothing bad among them.
    pub needs: f64,
    /// What the plan gives.
    pub gives: f64,
    /// One line for people: why so many, and what to change where they are too few.
    pub text: String,
}

impl Need {
    /// Whether the plan gives enough.
    #[must_use]
    pub fn enough(&self) -> bool {
        self.gives >= self.needs
    }

    fn new(what: &str, needs: f64, gives: f64, why: &str) -> Self {
        let verdict = if gives >= needs { "enough" } else { "too few" };
        let text = format!(
            "needs {} {what} {why}, gets about {}: {verdict}",
            trimmed(needs, 1),
            trimmed(gives.floor(), 1)
        );
        Self { what: what.into(), needs, gives, text }
    }
}

/// What a gate needs to be able to pass, and what it gets: of one round, or of the whole run where `round` is none.
#[must_use]
pub fn needs(gate: &Gate, plan: &Plan, round: Option<usize>) -> Vec<Need> {
    let rounds: Vec<&Round> = match round {
        Some(round) => plan.rounds.get(round).into_iter().collect(),
        None => plan.rounds.iter().collect(),
    };
    let sum = |f: fn(&Round) -> f64| rounds.iter().map(|r| f(r)).sum::<f64>();
    let hold = sum(|r| r.hold.as_secs_f64());
    match gate {
        Gate::Latency { probe, percentile, .. } => {
            let mut needs = blocks(plan, probe, hold);
            if let Some(Probe::Load(load)) = plan.probes.get(probe) {
                let least = stats::least_trials(1.0 - percentile, ALPHA_PASS);
                let why = format!("to show a p{} with 99.9% confidence", trimmed(percentile * 100.0, 4));
                needs.push(Need::new("requests", least, load.rate * hold, &why));
            }
            needs
        }
        Gate::Errors { probe, limit } => {
            let mut needs = blocks(plan, probe, hold);
            if let Some(Probe::Load(load)) = plan.probes.get(probe) {
                let least = stats::least_trials(*limit, ALPHA_PASS);
                let why =
                    format!("without an error to show at most {} with 99.9% confidence", percent(*limit));
                needs.push(Need::new("requests", least, load.rate * hold, &why));
            }
            needs
        }
        Gate::Leak { limit, .. } => {
            // Recoveries may end early, so they are not counted on, but for the last one.
            let last = rounds.last().map_or(0.0, |r| r.recovery.as_secs_f64());
            let gives = sum(|r| r.baseline.as_secs_f64()) + hold + last;
            // With nothing kept at all, a limit needs the time in which chance alone would not hide that many.
            let least = (stats::poisson_upper(0.0, ALPHA_PASS) / limit * 60.0).max(leak::MIN_SECONDS).ceil();
            let why = format!("to show at most {} a minute", trimmed(*limit, 2));
            vec![Need::new("seconds", least, gives, &why)]
        }
        Gate::Oom { target, .. } => {
            let gives = sum(|r| (r.baseline + r.hold).as_secs_f64());
            vec![Need::new("samples", 1.0, gives, &format!("of {target}"))]
        }
        Gate::Recovery { within, .. } => rounds
            .iter()
            .map(|r| {
                let why = format!("of recovery in round {} to see one that takes {}", r.name, time(*within));
                Need::new("seconds", (within + recovery::RUN as f64).ceil(), r.recovery.as_secs_f64(), &why)
            })
            .collect(),
    }
}

/// Blocks of time that show how much a probe's samples scatter.
fn blocks(plan: &Plan, probe: &str, hold: f64) -> Vec<Need> {
    let every = match plan.probes.get(probe) {
        Some(Probe::Scrape(scrape)) => scrape.every.as_secs_f64(),
        Some(Probe::Load(load)) => (1.0 / load.rate).max(1.0),
        _ => 1.0,
    };
    let what = if every > 1.0 { "samples" } else { "seconds" };
    vec![Need::new(what, MIN_BLOCKS as f64, hold / every, "of fault to see how much they scatter")]
}
