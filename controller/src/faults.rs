//! Faults across agents: one order, armed and fired wherever its target is, renewed and taken back together.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::future::join_all;
use squall_proto::v1::{self, State};

use crate::{
    agents::{Agent, CallError},
    event,
    plan::Touched,
    replicas::{self, Choice, Take},
};

/// Without a renewal for this long, what was injected ends by itself.
pub(crate) const LEASE: Duration = Duration::from_secs(5);
/// How often leases are renewed: four may get lost.
pub(crate) const RENEW_EVERY: Duration = Duration::from_secs(1);

/// A fault for agents.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Order {
    /// Id of the injection, or of its parts.
    pub id: String,
    /// Name of the target.
    pub on: String,
    /// One line for people.
    pub summary: String,
    /// The target.
    pub target: v1::Target,
    /// The fault.
    pub fault: v1::Fault,
    /// From Fire to the deadline.
    pub duration: Duration,
    /// The lease.
    pub lease: Duration,
    /// How many of the target's replicas; all where nothing is said.
    pub take: Option<Take>,
    /// Seed by which they are chosen.
    pub seed: u64,
    /// Those that were.
    pub choice: Option<Choice>,
}

/// Why an order cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotArmed {
    /// It is wrong, or not possible there: the plan's or the command's fault. Nothing was changed.
    #[error("{0}")]
    Wrong(String),
    /// An agent failed or is lost.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Armed injections: index of the agent, and what it says.
pub(crate) type Armed = Vec<(usize, v1::Injection)>;

impl Order {
    /// Chooses the replicas, where it does not take all; says no where that cannot be done. The limits of agents are about what
    /// is chosen, so they are not asked for yet.
    pub(crate) async fn choose(&mut self, agents: &[Agent]) -> Result<(), NotArmed> {
        let Some(take) = self.take else { return Ok(()) };
        let asked = agents.iter().map(|a| a.resolve(vec![self.target.clone()], Some(self.fault.clone())));
        let mut there = Vec::new();
        for (agent, resolved) in agents.iter().zip(join_all(asked).await) {
            let resolved = resolved.map_err(|e| match e {
                CallError::Refused { .. } => NotArmed::Wrong(format!("{}: {e}", self.summary)),
                e => e.into(),
            })?;
            there.push((
                agent.node.as_str(),
                resolved.into_iter().flat_map(|r| r.targets).collect::<Vec<_>>(),
            ));
        }
        // That there is nothing at all is told by who is asked to arm it.
        if there.iter().any(|(_, targets)| !targets.is_empty()) {
            let choice = replicas::choose(take, self.seed, &there);
            let wrong = |why| NotArmed::Wrong(format!("{}: {why}", self.summary));
            self.choice = Some(choice.map_err(wrong)?);
        }
        Ok(())
    }

    /// What it touches, for the limits of a plan.
    pub(crate) fn touched(&self, armed: &Armed) -> Vec<Touched> {
        let replica = |i: &v1::Injection| i.target.as_ref().map(replicas::key).unwrap_or_default().to_owned();
        let all: BTreeSet<_> = armed.iter().map(|(agent, i)| (*agent, replica(i))).collect();
        let of = self.choice.as_ref().map_or(all.len(), |choice| choice.of);
        let touched = armed.iter().map(|(node, i)| Touched {
            target: self.on.clone(),
            node: *node,
            replica: replica(i),
            replicas: of,
            pods: i.pods.clone(),
            pods_there: i.pods_there as usize,
        });
        touched.collect()
    }

    fn request(&self, agent: usize, dry_run: bool) -> v1::ArmRequest {
        let only = self.choice.as_ref().and_then(|choice| choice.by_agent.get(&agent));
        v1::ArmRequest {
            id: self.id.clone(),
            target: Some(self.target.clone()),
            fault: Some(self.fault.clone()),
            duration_ns: self.duration.as_nanos() as u64,
            lease_ns: self.lease.as_nanos() as u64,
            dry_run,
            only: only.cloned().unwrap_or_default(),
        }
    }

    /// Arms it on every agent where its target is; with `dry_run` only checks that this is possible.
    ///
    /// An agent where the target is not takes no part. None at all is an error that says why, node by node.
    pub(crate) async fn arm(&self, agents: &[Agent], dry_run: bool) -> Result<Armed, NotArmed> {
        let chosen = |index: &usize| self.choice.as_ref().is_none_or(|c| c.by_agent.contains_key(index));
        let asked = (0..agents.len()).filter(chosen);
        let asked =
            asked.map(|index| async move { (index, agents[index].arm(self.request(index, dry_run)).await) });
        let (mut armed, mut refused, mut not_there) = (Vec::new(), Vec::new(), Vec::new());
        for (index, answer) in join_all(asked).await {
            match answer {
                Ok(injections) => armed.extend(injections.into_iter().map(|i| (index, i))),
                Err(e @ CallError::NotThere { .. }) => not_there.push(e.to_string()),
                Err(e @ CallError::Refused { .. }) => refused.push(e.to_string()),
                Err(e @ (CallError::Failed { .. } | CallError::Lost { .. })) => return Err(e.into()),
            }
        }
        if !refused.is_empty() {
            return Err(NotArmed::Wrong(format!("{}: {}", self.summary, refused.join("; "))));
        }
        if armed.is_empty() {
            let why = format!("target `{}` matches nothing: {}", self.on, not_there.join("; "));
            return Err(NotArmed::Wrong(why));
        }
        Ok(armed)
    }
}

/// Where agents are, for the limits of a plan: name of the node, and its zone.
pub(crate) fn nodes(agents: &[Agent]) -> Vec<(&str, &str)> {
    agents.iter().map(|agent| (agent.node.as_str(), agent.about.zone.as_str())).collect()
}

/// Injections that may be live, by agent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Held {
    ids: BTreeMap<usize, Vec<String>>,
}

/// What became of an attempt to take injections back.
#[derive(Debug, Default)]
pub(crate) struct TakenBack {
    /// Index of the agent, and the injection as it stands now.
    pub injections: Armed,
    /// Agents that could not be asked: index, ids, why.
    pub unasked: Vec<(usize, Vec<String>, CallError)>,
}

impl Held {
    /// Adds injections.
    pub(crate) fn add(&mut self, armed: &Armed) {
        for (agent, injection) in armed {
            self.ids.entry(*agent).or_default().push(injection.id.clone());
        }
    }

    /// Forgets an injection that has ended.
    pub(crate) fn remove(&mut self, agent: usize, id: &str) {
        if let Some(ids) = self.ids.get_mut(&agent) {
            ids.retain(|i| i != id);
            if ids.is_empty() {
                self.ids.remove(&agent);
            }
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.ids.values().map(Vec::len).sum()
    }

    /// Ids by agent.
    pub(crate) fn by_agent(&self) -> &BTreeMap<usize, Vec<String>> {
        &self.ids
    }

    /// Injects what was armed, on all agents at once.
    pub(crate) async fn fire(&self, agents: &[Agent]) -> Result<Armed, CallError> {
        let fired = self
            .ids
            .iter()
            .map(|(&agent, ids)| async move { (agent, agents[agent].fire(ids.clone()).await) });
        let mut all = Vec::new();
        for (agent, fired) in join_all(fired).await {
            all.extend(fired?.into_iter().map(|i| (agent, i)));
        }
        Ok(all)
    }

    /// Renews all leases. Gives what is not live any more: index of the agent and id. An agent that is lost, but may return
    /// before its leases are over, is no error yet.
    pub(crate) async fn renew(&self, agents: &[Agent]) -> Result<Vec<(usize, String)>, CallError> {
        let renewed = self
            .ids
            .iter()
            .map(|(&agent, ids)| async move { (agent, agents[agent].renew(ids.clone()).await) });
        let mut gone = Vec::new();
        for (agent, renewed) in join_all(renewed).await {
            match renewed {
                Ok(ids) => gone.extend(ids.into_iter().map(|id| (agent, id))),
                Err(e) if agents[agent].may_return(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(gone)
    }

    /// Takes everything back, on all agents at once, and waits for it. Never fails as a whole.
    pub(crate) async fn revert(&self, agents: &[Agent]) -> TakenBack {
        let reverted = self.ids.iter().map(|(&agent, ids)| async move {
            // What the agent has forgotten ended long ago, and must not keep the others from being reverted.
            let each = ids.iter().map(|id| async move { (id, agents[agent].revert(vec![id.clone()]).await) });
            (agent, join_all(each).await)
        });
        let mut taken = TakenBack::default();
        for (agent, answers) in join_all(reverted).await {
            for (id, answer) in answers {
                match answer {
                    Ok(injections) => taken.injections.extend(injections.into_iter().map(|i| (agent, i))),
                    Err(CallError::NotThere { message, .. }) => {
                        let gone = v1::Injection {
                            id: id.clone(),
                            state: State::Reverted.into(),
                            reason: message,
                            ..v1::Injection::default()
                        };
                        taken.injections.push((agent, gone));
                    }
                    Err(e) => taken.unasked.push((agent, vec![id.clone()], e)),
                }
            }
        }
        taken
    }
}

/// How long until a time of the agent's clock, when it sent this.
pub(crate) fn left(injection: &v1::Injection, boot_ns: u64) -> Duration {
    Duration::from_nanos(boot_ns.saturating_sub(injection.now_boot_ns))
}

/// The name of what an injection is on.
pub(crate) fn resolved(injection: &v1::Injection) -> &str {
    injection.target.as_ref().map(|t| t.name.as_str()).unwrap_or_default()
}

/// What an agent reported, as an event has it. `now` is the time of the run.
pub(crate) fn as_event(agent: &Agent, on: &str, injection: &v1::Injection, now: f64) -> event::Injection {
    event::Injection {
        id: injection.id.clone(),
        node: agent.node.clone(),
        kind: injection.kind.clone(),
        target: on.to_owned(),
        resolved: resolved(injection).to_owned(),
        summary: injection.summary.clone(),
        mechanism: injection.mechanism.clone(),
        changes: injection.changes.clone(),
        warnings: injection.warnings.clone(),
        ends: now + left(injection, injection.ends_boot_ns).as_secs_f64(),
        seed: injection.seed,
    }
}

/// The figures of an effect.
pub(crate) fn figures(effect: &v1::Effect) -> Vec<event::Figure> {
    let figure =
        |f: &v1::Figure| event::Figure { name: f.name.clone(), value: f.value, unit: f.unit.clone() };
    effect.figures.iter().map(figure).collect()
}

/// A new id: short, hexadecimal, unlikely to be in use.
pub(crate) fn new_id() -> String {
    format!("{:06x}", rand::random::<u32>() & 0x00ff_ffff)
}
