//! `squall check`: everything that can be known about a run before anything is changed.

use std::{fmt::Write as _, path::Path, time::Duration};

use anyhow::{Context, Result};
use futures::future::join_all;
use serde_json::{Value, json};
use squall_proto::v1;

use crate::{
    agents::{Agent, Agents, Local},
    cli::{Common, Output, exit},
    commands::{out, print_json},
    faults::{Armed, LEASE, NotArmed, Order, nodes},
    gate,
    plan::{self, Beyond, Blame, Plan, Target, fault::time},
    replicas::{Choice, mixed},
    report::figure::several,
    wrong::Wrong,
};

/// A fault ends by itself this long after it should have been reverted. One that was injected first is held until the last was
/// held long enough, which comes no more than a lease later, and is not to end before.
const MARGIN: Duration = LEASE.saturating_mul(2);

/// Reads a plan from its file.
pub(crate) fn load(path: &Path) -> Result<(String, Plan)> {
    let text =
        std::fs::read_to_string(path).map_err(|e| Wrong(format!("cannot read {}: {e}", path.display())))?;
    let plan = plan::parse(path, &text)?;
    Ok((text, plan))
}

/// The faults of a round as orders. Ids start with `run`; seeds that the plan does not give come from `seed`.
pub(crate) fn orders(plan: &Plan, round: usize, run: &str, seed: u64) -> Result<Vec<Order>> {
    let of = &plan.rounds[round];
    let order = |(n, fault): (usize, &plan::Fault)| {
        let target =
            plan.targets.get(&fault.on).and_then(Target::proto).context("a fault on no local target")?;
        Ok(Order {
            id: format!("{run}-{}-{}", round + 1, n + 1),
            on: fault.on.clone(),
            summary: fault.summary.clone(),
            target,
            fault: seeded(fault.proto.clone(), seed, round, n),
            duration: of.hold + MARGIN,
            lease: LEASE,
            take: fault.replicas,
            seed,
            choice: None,
        })
    };
    of.faults.iter().enumerate().map(order).collect()
}

/// Gives a fault that draws and has no seed one that depends on the run's, so that a run can be repeated.
fn seeded(mut fault: v1::Fault, seed: u64, round: usize, n: usize) -> v1::Fault {
    if let Some(v1::fault::Kind::Network(network)) = &mut fault.kind
        && network.seed == 0
    {
        network.seed = mixed(seed, ((round as u64) << 32) | n as u64).max(1);
    }
    fault
}

/// What was found out about a plan.
pub(crate) struct Checked {
    /// Name of each local target, and what it resolves to by agent.
    pub targets: Vec<(String, Vec<v1::Resolved>)>,
    /// By round and fault: what would be injected, or why not.
    pub faults: Vec<Vec<(Order, Result<Armed, NotArmed>)>>,
}

/// Resolves every target and arms every fault without keeping it. Fails only where an agent fails.
pub(crate) async fn dry_run(plan: &Plan, agents: &[Agent], run: &str, seed: u64) -> Result<Checked> {
    let local: Vec<(String, v1::Target)> =
        plan.targets.iter().filter_map(|(name, t)| Some((name.clone(), t.proto()?))).collect();
    let protos: Vec<v1::Target> = local.iter().map(|(_, t)| t.clone()).collect();
    let mut targets: Vec<_> = local.into_iter().map(|(name, _)| (name, Vec::new())).collect();
    for resolved in join_all(agents.iter().map(|a| a.resolve(protos.clone(), None))).await {
        for (target, resolved) in targets.iter_mut().zip(resolved?) {
            target.1.push(resolved);
        }
    }
    let mut faults = Vec::new();
    for round in 0..plan.rounds.len() {
        let mut armed = Vec::new();
        for mut order in orders(plan, round, run, seed)? {
            let result = match order.choose(agents).await {
                Ok(()) => order.arm(agents, true).await,
                Err(e) => Err(e),
            };
            if let Err(NotArmed::Call(e)) = result {
                return Err(e.into());
            }
            armed.push((order, result));
        }
        faults.push(armed);
    }
    Ok(Checked { targets, faults })
}

impl Checked {
    /// Everything that stands in the way of a run; empty where nothing does.
    pub(crate) fn problems(&self, agents: &[Agent], plan: &Plan) -> Vec<Blame> {
        let mut problems = Vec::new();
        for (name, resolved) in &self.targets {
            if resolved.iter().all(|r| r.targets.is_empty()) {
                let why: Vec<String> =
                    agents.iter().zip(resolved).map(|(a, r)| format!("{}: {}", a.node, r.error)).collect();
                problems.push(Blame {
                    path: format!("targets.{name}"),
                    message: format!("target `{name}` matches nothing: {}", why.join("; ")),
                    fix: "start it, or change what it is found by".into(),
                });
            }
        }
        for (round, faults) in self.faults.iter().enumerate() {
            for (n, (order, armed)) in faults.iter().enumerate() {
                let missing = format!("targets.{}", order.on);
                if let Err(e) = armed
                    // That is said once already.
                    && problems.iter().all(|p| p.path != missing)
                {
                    problems.push(Blame {
                        path: format!("rounds[{round}].faults[{n}].{}", plan.rounds[round].faults[n].kind()),
                        message: e.to_string(),
                        fix: "this cannot be injected".into(),
                    });
                }
            }
        }
        for (round, faults) in self.faults.iter().enumerate() {
            let armed = faults.iter().filter_map(|(order, armed)| Some(order.touched(armed.as_ref().ok()?)));
            let touched: Vec<_> = armed.flatten().collect();
            if let Some(Beyond { field, problem, fix }) = plan.limits.beyond(&touched, &nodes(agents)) {
                problems.push(Blame {
                    path: field.into(),
                    message: format!("round {}: {problem}", plan.rounds[round].name),
                    fix: fix.into(),
                });
            }
        }
        problems
    }
}

/// `squall check`.
pub(crate) async fn check(common: &Common, path: &Path) -> Result<u8> {
    let (text, plan) = load(path)?;
    let agents = Agents::connect(&common.agents, Local::Start).await?;
    let checked = dry_run(&plan, &agents.list, "check", plan.seed.unwrap_or(1)).await;
    let checked = match checked {
        Ok(checked) => checked,
        Err(e) => {
            agents.stop().await?;
            return Err(e);
        }
    };
    let problems = checked.problems(&agents.list, &plan);
    match common.output {
        Output::Json => print_json(&as_json(&plan, &agents.list, &checked, &problems)),
        Output::Text => out(&as_text(&plan, &agents.list, &checked)),
    }
    agents.stop().await?;
    if problems.is_empty() {
        if common.output == Output::Text {
            out(&format!("✔ ok  {} can run; nothing was changed\n", path.display()));
        }
        return Ok(exit::OK);
    }
    Err(plan::blame(path, &text, &problems).into())
}

/// `squall run --dry-run`: every change that the plan would make, host by host.
pub(crate) async fn preview(common: &Common, path: &Path, seed: Option<u64>) -> Result<u8> {
    let (text, plan) = load(path)?;
    let agents = Agents::connect(&common.agents, Local::Start).await?;
    let checked = dry_run(&plan, &agents.list, "dry-run", seed.or(plan.seed).unwrap_or(1)).await;
    let list = agents.list.clone();
    agents.stop().await?;
    let checked = checked?;
    let problems = checked.problems(&list, &plan);
    if !problems.is_empty() {
        return Err(plan::blame(path, &text, &problems).into());
    }
    let hosts = by_host(&plan, &list, &checked);
    match common.output {
        Output::Json => print_json(&hosts_json(&hosts)),
        Output::Text => {
            out(&hosts_text(&hosts));
            out("nothing was changed\n");
        }
    }
    Ok(exit::OK)
}

/// What would happen to one host: round, fault and injection, in order.
struct Host<'a> {
    node: &'a str,
    injections: Vec<(&'a str, &'a Order, &'a v1::Injection)>,
}

fn by_host<'a>(plan: &'a Plan, agents: &'a [Agent], checked: &'a Checked) -> Vec<Host<'a>> {
    let rounds = plan.rounds.iter().zip(&checked.faults);
    let all: Vec<_> = rounds
        .flat_map(|(round, faults)| faults.iter().map(move |(order, armed)| (round, order, armed)))
        .flat_map(|(round, order, armed)| {
            armed.iter().flatten().map(move |(agent, i)| (*agent, round, order, i))
        })
        .collect();
    let host = |(index, agent): (usize, &'a Agent)| {
        let here = all.iter().filter(|(agent, ..)| *agent == index);
        let injections = here.map(|(_, round, order, i)| (round.name.as_str(), *order, *i));
        Host { node: &agent.node, injections: injections.collect() }
    };
    agents.iter().enumerate().map(host).collect()
}

fn hosts_text(hosts: &[Host<'_>]) -> String {
    let mut text = String::new();
    for Host { node, injections } in hosts {
        let _ = writeln!(text, "{node}: {}", several(injections.len(), "injection"));
        for (round, order, i) in injections {
            let target = i.target.as_ref().map(|t| t.name.as_str()).unwrap_or_default();
            let _ = writeln!(text, "  {round}  {}\n    on {target}  by {}", order.summary, i.mechanism);
            if let Some(choice) = &order.choice {
                let _ = writeln!(text, "    chosen   {choice}");
            }
            for change in &i.changes {
                let _ = writeln!(text, "    changes  {change}");
            }
            for warning in &i.warnings {
                let _ = writeln!(text, "    ! warning  {warning}");
            }
        }
    }
    text
}

fn hosts_json(hosts: &[Host<'_>]) -> Value {
    let injection = |(round, order, i): &(&str, &Order, &v1::Injection)| {
        json!({
            "round": round,
            "fault": order.summary,
            "chosen": order.choice.as_ref().map(choice_json),
            "target": i.target.as_ref().map(|t| &t.name),
            "mechanism": i.mechanism,
            "changes": i.changes,
            "warnings": i.warnings,
        })
    };
    let host = |h: &Host<'_>| {
        let injections: Vec<Value> = h.injections.iter().map(injection).collect();
        json!({ "node": h.node, "injections": injections })
    };
    hosts.iter().map(host).collect()
}

fn as_text(plan: &Plan, agents: &[Agent], checked: &Checked) -> String {
    let mut text = String::new();
    let longest: Duration = plan.rounds.iter().map(plan::Round::longest).sum();
    let rounds = several(plan.rounds.len(), "round");
    let nodes = several(agents.len(), "node");
    let _ = writeln!(text, "{}: {rounds}, at most {}, {nodes}", plan.name, time(longest));
    if let Some(limits) = plan.limits.line() {
        let _ = writeln!(text, "limits: {limits}");
    }
    text.push_str("\nTARGETS\n");
    for (name, resolved) in &checked.targets {
        let on = resolved.iter().filter(|r| !r.targets.is_empty()).count();
        let mark = if on > 0 { "✔ ok  " } else { "✖ none" };
        let _ = writeln!(text, "  {mark} {name}: on {on} of {nodes}");
        for (agent, resolved) in agents.iter().zip(resolved) {
            for target in &resolved.targets {
                let cgroup =
                    if target.cgroup.is_empty() { String::new() } else { format!("  {}", target.cgroup) };
                let _ = writeln!(text, "           {}  {}{cgroup}", agent.node, target.name);
            }
            if resolved.targets.is_empty() {
                let _ = writeln!(text, "           {}  {}", agent.node, resolved.error);
            }
        }
    }
    for (index, (round, faults)) in plan.rounds.iter().zip(&checked.faults).enumerate() {
        let phases =
            [("baseline", round.baseline), ("fault", round.hold), ("recovery up to", round.recovery)];
        let phases: Vec<String> = phases.iter().map(|(name, d)| format!("{name} {}", time(*d))).collect();
        let _ = writeln!(text, "\nROUND {}  {}", round.name, phases.join(", "));
        for ((order, armed), warnings) in faults.iter().zip(plan::warnings(plan, index)) {
            fault_text(&mut text, agents, order, armed, &warnings);
        }
        gates_text(&mut text, plan, Some(index));
    }
    if !plan.gates.is_empty() {
        let _ = writeln!(text, "\nWHOLE RUN");
        gates_text(&mut text, plan, None);
    }
    text.push('\n');
    text
}

fn fault_text(
    text: &mut String,
    agents: &[Agent],
    order: &Order,
    armed: &Result<Armed, NotArmed>,
    warnings: &[String],
) {
    let mark = if armed.is_ok() { "✔ ok" } else { "✖ no" };
    let _ = writeln!(text, "  {mark}   {}", order.summary);
    for warning in warnings {
        let _ = writeln!(text, "           ! warning  {warning}");
    }
    if let Some(choice) = &order.choice {
        let _ = writeln!(text, "           chosen  {choice}");
    }
    match armed {
        Err(e) => {
            let _ = writeln!(text, "           {e}");
        }
        Ok(armed) => {
            for (agent, injection) in armed {
                let resolved = injection.target.as_ref().map(|t| t.name.as_str()).unwrap_or_default();
                let _ = writeln!(
                    text,
                    "           {}  {resolved}  by {}",
                    agents[*agent].node, injection.mechanism
                );
                for change in &injection.changes {
                    let _ = writeln!(text, "             changes  {change}");
                }
                for warning in &injection.warnings {
                    let _ = writeln!(text, "             ! warning  {warning}");
                }
            }
        }
    }
}

/// How many replicas were chosen, and by which seed.
pub(crate) fn choice_json(choice: &Choice) -> Value {
    json!({ "replicas": choice.taken, "of": choice.of, "seed": choice.seed })
}

fn gates_text(text: &mut String, plan: &Plan, round: Option<usize>) {
    for gate in round.map_or(&plan.gates, |round| &plan.rounds[round].gates) {
        let _ = writeln!(text, "  gate   {}", gate.line());
        for need in gate::needs(gate, plan, round) {
            let mark = if need.enough() { "✔" } else { "!" };
            let _ = writeln!(text, "           {mark} {}", need.text);
        }
    }
}

fn gate_json(gate: &plan::Gate, plan: &Plan, round: Option<usize>) -> Value {
    let need =
        |n: &gate::Need| json!({ "what": n.what, "needs": n.needs, "gives": n.gives, "enough": n.enough() });
    let needs: Vec<Value> = gate::needs(gate, plan, round).iter().map(need).collect();
    json!({ "gate": gate.line(), "samples": needs })
}

fn as_json(plan: &Plan, agents: &[Agent], checked: &Checked, problems: &[Blame]) -> Value {
    let resolved = |agent: &Agent, r: &v1::Resolved| {
        let names: Vec<&str> = r.targets.iter().map(|t| t.name.as_str()).collect();
        json!({ "node": agent.node, "matches": names, "error": (!r.error.is_empty()).then_some(&r.error) })
    };
    let targets: Vec<Value> = checked
        .targets
        .iter()
        .map(|(name, found)| {
            let nodes: Vec<Value> = agents.iter().zip(found).map(|(a, r)| resolved(a, r)).collect();
            json!({ "name": name, "nodes": nodes })
        })
        .collect();
    let injection = |(agent, i): &(usize, v1::Injection)| {
        json!({
            "node": agents[*agent].node,
            "target": i.target.as_ref().map(|t| &t.name),
            "mechanism": i.mechanism,
            "changes": i.changes,
            "warnings": i.warnings,
        })
    };
    let fault = |(order, armed): &(Order, Result<Armed, NotArmed>), warnings: &[String]| match armed {
        Ok(armed) => {
            let injections: Vec<Value> = armed.iter().map(injection).collect();
            let chosen = order.choice.as_ref().map(choice_json);
            json!({ "fault": order.summary, "warnings": warnings, "chosen": chosen, "injections": injections })
        }
        Err(e) => json!({ "fault": order.summary, "warnings": warnings, "error": e.to_string() }),
    };
    let rounds: Vec<Value> = plan
        .rounds
        .iter()
        .zip(&checked.faults)
        .enumerate()
        .map(|(index, (round, faults))| {
            let warnings = plan::warnings(plan, index);
            json!({
                "name": round.name,
                "baseline_seconds": round.baseline.as_secs_f64(),
                "hold_seconds": round.hold.as_secs_f64(),
                "recovery_seconds": round.recovery.as_secs_f64(),
                "faults": faults.iter().zip(&warnings).map(|(f, w)| fault(f, w)).collect::<Vec<_>>(),
                "gates": round.gates.iter().map(|g| gate_json(g, plan, Some(index))).collect::<Vec<_>>(),
            })
        })
        .collect();
    let gates: Vec<Value> = plan.gates.iter().map(|g| gate_json(g, plan, None)).collect();
    let ok = problems.is_empty();
    let problems: Vec<Value> =
        problems.iter().map(|p| json!({ "field": p.path, "problem": p.message })).collect();
    json!({ "plan": plan.name, "limits": plan.limits.line(), "ok": ok, "problems": problems, "targets": targets, "rounds": rounds, "gates": gates })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_by_fault_and_are_the_same_every_time() {
        let network = || v1::Fault { kind: Some(v1::fault::Kind::Network(v1::NetworkFault::default())) };
        let seed_of = |fault: v1::Fault| match fault.kind {
            Some(v1::fault::Kind::Network(n)) => n.seed,
            _ => 0,
        };
        let all: Vec<u64> = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]
            .map(|(s, r, n)| seed_of(seeded(network(), s, r, n)))
            .into();
        for (i, a) in all.iter().enumerate() {
            assert!(*a != 0 && !all[..i].contains(a), "{all:?}");
        }
        assert_eq!(seed_of(seeded(network(), 1, 0, 0)), all[0]);
        let given = v1::NetworkFault { seed: 7, ..v1::NetworkFault::default() };
        let given = v1::Fault { kind: Some(v1::fault::Kind::Network(given)) };
        assert_eq!(seed_of(seeded(given, 1, 0, 0)), 7);
    }

    const PLAN: &str = "
apiVersion: squall.dev/v1
kind: Plan
metadata: { name: test }
targets: { web: { process: { exe: web } } }
rounds:
  - name: first
    hold: 2s
    gates: [ { oom: { target: web } } ]
    faults:
      - network: { on: web, delay: { latency: 1s, jitter: 1s } }
      - network: { on: web, to: '10.0.0.7:80', loss: 5% }
";

    #[tokio::test]
    async fn what_may_surprise_is_told_beside_its_fault() {
        let fake = crate::fake::Fake::start("node-a").await;
        let agents = std::slice::from_ref(&fake.agent);
        let plan = plan::parse(Path::new("plan.yaml"), PLAN).expect("a plan");
        let checked = dry_run(&plan, agents, "check", 1).await.expect("checked");
        assert!(checked.problems(agents, &plan).is_empty());
        let text = as_text(&plan, agents, &checked);
        let faults: Vec<&str> = text.lines().skip_while(|l| !l.starts_with("ROUND")).skip(1).collect();
        insta::assert_snapshot!(faults.join("\n"), @r"
        ✔ ok   network web ↔ everyone: delay 1s ±1s
                 ! warning  the delay is of each packet, not of each request: a round trip takes 2s longer, and a request may need several
                 ! warning  jitter lets packets overtake each other, which TCP may take for loss; keepOrder keeps their order
                 node-a  web pid 7  by 
        ✔ ok   network web ↔ 10.0.0.7:80: loss 5%
                 ! warning  no packet reaches this: the first fault that matches takes it, and `network web ↔ everyone: delay 1s ±1s` matches all of these; put this one before it, or both in one fault
                 node-a  web pid 7  by 
        gate   oom: web ≤ 0 kills
                 ✔ needs 1 samples of web, gets about 32: enough
        ");
        let json = as_json(&plan, agents, &checked, &[]);
        let warnings =
            |n: usize| json["rounds"][0]["faults"][n]["warnings"].as_array().expect("a list").len();
        assert_eq!((warnings(0), warnings(1)), (2, 1));
        assert_eq!(json["ok"], true);
    }
}
