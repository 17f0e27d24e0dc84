//! The commands that only ask or take back: `nodes`, `status`, `revert`.

use std::{io::Write as _, time::Duration};

use anyhow::Result;
use comfy_table::{ContentArrangement, Table, presets};
use futures::future::join_all;
use serde_json::{Value, json};
use squall_proto::v1::{self, State};

use crate::{
    agents::{Agent, Agents, CallError, Local},
    cli::{Common, Format, Output, exit},
    faults::{figures, left},
    report::{
        self,
        figure::{self, several},
    },
    run::verdict_text,
    store,
    wrong::Wrong,
};

/// `squall nodes`.
pub(crate) async fn nodes(common: &Common) -> Result<u8> {
    let agents = Agents::connect(&common.agents, Local::Refuse).await?;
    match common.output {
        Output::Json => print_json(&agents.list.iter().map(node_json).collect()),
        Output::Text => {
            for agent in &agents.list {
                out(&node_text(agent));
            }
        }
    }
    Ok(exit::OK)
}

fn node_json(agent: &Agent) -> Value {
    let about = &agent.about;
    let faults: Vec<Value> = about
        .faults
        .iter()
        .map(|fault| {
            let feature = |f: &v1::Feature| {
                json!({ "name": f.name, "available": f.available, "mechanism": f.mechanism, "reason": f.reason })
            };
            let features: Vec<Value> = fault.features.iter().map(feature).collect();
            json!({ "kind": fault.kind, "available": fault.available, "reason": fault.reason, "features": features })
        })
        .collect();
    json!({
        "node": about.node,
        "address": agent.address,
        "agent": about.agent_version,
        "kernel": about.kernel,
        "cgroup": about.cgroup,
        "zone": about.zone,
        "stopped": about.stopped,
        "faults": faults,
        "limits": about.limits.as_ref().map(|l| json!({
            "longest_seconds": l.longest_ns as f64 / 1e9,
            "longest_lease_seconds": l.longest_lease_ns as f64 / 1e9,
            "most_injections": l.most_injections,
            "most_pods": l.most_pods,
        })),
    })
}

fn node_text(agent: &Agent) -> String {
    let about = &agent.about;
    let stopped =
        if about.stopped { "  ! stopped: nothing may be injected until squall stop --release\n" } else { "" };
    let zone = if about.zone.is_empty() { String::new() } else { format!("  zone {}", about.zone) };
    let text = format!(
        "{}{zone}  kernel {}  cgroup {}  agent {}  {}\n{stopped}",
        about.node, about.kernel, about.cgroup, about.agent_version, agent.address
    );
    let mut table = table();
    for fault in &about.faults {
        if fault.features.is_empty() || !fault.available {
            table.add_row([format!("  {}", fault.kind), works(fault.available).into(), fault.reason.clone()]);
        }
        for feature in fault.features.iter().filter(|_| fault.available) {
            let how = if feature.available { &feature.mechanism } else { &feature.reason };
            let name = format!("  {} {}", fault.kind, feature.name);
            table.add_row([name, works(feature.available).into(), how.clone()]);
        }
    }
    text + &table.to_string() + "\n"
}

fn works(available: bool) -> &'static str {
    if available { "✔ works" } else { "✖ no" }
}

/// A table without lines, as wide as the terminal.
pub(crate) fn table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table
}

/// Prints to stdout. A reader that went away (`squall status | head`) is no failure.
pub(crate) fn out(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Prints to stderr. That the terminal went away is no reason to panic: there is still something to revert.
pub(crate) fn err(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Prints one JSON value to stdout.
pub(crate) fn print_json(value: &Value) {
    out(&format!("{value:#}\n"));
}

/// `squall status`.
pub(crate) async fn status(common: &Common) -> Result<u8> {
    let agents = Agents::connect(&common.agents, Local::Refuse).await?;
    let mut found = Vec::new();
    for (agent, list) in agents.list.iter().zip(join_all(agents.list.iter().map(Agent::list)).await) {
        found.extend(list?.into_iter().map(|i| (agent.node.clone(), i)));
    }
    match common.output {
        Output::Json => print_json(&found.iter().map(|(node, i)| injection_json(node, i)).collect()),
        Output::Text if found.is_empty() => {
            out(&format!("no injections on {}\n", several(agents.list.len(), "node")));
        }
        Output::Text => {
            let mut table = table();
            table.set_header(["ID", "NODE", "TARGET", "FAULT", "STATE", "ENDS", "MEASURED"]);
            for (node, i) in &found {
                let target = i.target.as_ref().map(|t| t.name.clone()).unwrap_or_default();
                let fault = format!("{} {}", i.kind, i.summary);
                table.add_row([i.id.clone(), node.clone(), target, fault, state(i), ends(i), measured(i)]);
            }
            out(&format!("{table}\n"));
            for (_, i) in &found {
                out(&resumed(i));
            }
        }
    }
    Ok(exit::OK)
}

/// A line where the agent was replaced meanwhile; else nothing.
pub(crate) fn resumed(i: &v1::Injection) -> String {
    let Some(v1::Resumption { agent_version, gap_ns, .. }) = &i.resumed else { return String::new() };
    let gap = *gap_ns as f64 / 1e9;
    format!(
        "! {}: resumed by agent {agent_version} after {gap:.1} s without it; what is counted began anew\n",
        i.id
    )
}

/// An injection as JSON.
pub(crate) fn injection_json(node: &str, i: &v1::Injection) -> Value {
    let effect = i.effect.as_ref();
    json!({
        "id": i.id,
        "node": node,
        "kind": i.kind,
        "target": i.target.as_ref().map(|t| t.name.clone()),
        "state": state_name(i.state()),
        "summary": i.summary,
        "mechanism": i.mechanism,
        "changes": i.changes,
        "warnings": i.warnings,
        "reason": i.reason,
        "seed": i.seed,
        "resumed": i.resumed.as_ref().map(|r| json!({
            "agent": r.agent_version,
            "after_seconds": r.gap_ns as f64 / 1e9,
        })),
        "ends_in_seconds": is_live(i).then(|| left(i, i.ends_boot_ns).as_secs_f64()),
        "lease_ends_in_seconds": is_live(i).then(|| left(i, i.lease_ends_boot_ns).as_secs_f64()),
        "bit": effect.is_some_and(|e| e.bit),
        "figures": effect.map(figures).unwrap_or_default(),
    })
}

fn is_live(i: &v1::Injection) -> bool {
    i.state() == State::Active
}

fn state_name(state: State) -> &'static str {
    match state {
        State::Unspecified => "unknown",
        State::Armed => "armed",
        State::Active => "active",
        State::Reverted => "reverted",
        State::Stuck => "stuck",
        State::Failed => "failed",
        State::HandedOver => "handed over",
    }
}

/// State in the words that people use: what it does, not what was asked for.
pub(crate) fn state(i: &v1::Injection) -> String {
    match i.state() {
        State::Active if i.effect.as_ref().is_some_and(|e| e.bit) => "● biting".into(),
        State::Active => "○ idle".into(),
        State::Reverted => format!("✔ reverted ({})", i.reason),
        State::Stuck => format!("! stuck ({})", i.reason),
        State::Failed => format!("✖ failed ({})", i.reason),
        other => state_name(other).into(),
    }
}

fn ends(i: &v1::Injection) -> String {
    if !is_live(i) {
        return String::new();
    }
    let seconds = |d: Duration| format!("{}s", d.as_secs_f64().ceil());
    format!("in {} (lease {})", seconds(left(i, i.ends_boot_ns)), seconds(left(i, i.lease_ends_boot_ns)))
}

/// What it measurably did: `matched 1204 packets, dropped 61 packets`.
pub(crate) fn measured(i: &v1::Injection) -> String {
    let Some(effect) = &i.effect else { return "nothing yet".into() };
    figure::effects(&figures(effect))
}

/// Reverts everything an agent holds. Gives what was live before; of one that was just started also what its start
/// took back.
async fn everything(agent: &Agent, started: bool) -> Result<Vec<v1::Injection>, CallError> {
    let ended = |i: &v1::Injection| matches!(i.state(), State::Reverted | State::Failed);
    let before = agent.list().await?;
    let old: Vec<&str> = before.iter().filter(|i| ended(i)).map(|i| i.id.as_str()).collect();
    let mut reverted = agent.revert_all().await?;
    reverted.retain(|i| started || !old.contains(&i.id.as_str()));
    Ok(reverted)
}

/// `squall revert`.
pub(crate) async fn revert(common: &Common, ids: &[String], all: bool) -> Result<u8> {
    // A start replays the journal, so even what a dead agent left can be reverted.
    let local = if all { Local::Start } else { Local::Refuse };
    let agents = Agents::connect(&common.agents, local).await?;
    let mut found: Vec<(String, v1::Injection)> = Vec::new();
    let mut unknown: Vec<&String> = ids.iter().collect();
    let mut lost = Vec::new();
    for agent in &agents.list {
        if all {
            match everything(agent, agents.started()).await {
                Ok(injections) => found.extend(injections.into_iter().map(|i| (agent.node.clone(), i))),
                Err(e) => lost.push(e),
            }
        }
        for id in ids {
            match agent.revert(vec![id.clone()]).await {
                Ok(injections) => {
                    unknown.retain(|u| *u != id);
                    found.extend(injections.into_iter().map(|i| (agent.node.clone(), i)));
                }
                Err(CallError::NotThere { .. }) => {}
                Err(e) => lost.push(e),
            }
        }
    }
    let nodes = agents.list.len();
    // A local agent that was started for this keeps what is stuck in its journal, and says so when it stops.
    let stopped = agents.stop().await;
    let reverted =
        found.iter().filter(|(_, i)| i.state() == State::Reverted || i.state() == State::Failed).count();
    match common.output {
        Output::Json => print_json(&json!({
            "reverted": reverted,
            "of": found.len(),
            "nodes": nodes,
            "injections": found.iter().map(|(node, i)| injection_json(node, i)).collect::<Vec<_>>(),
        })),
        Output::Text => {
            for (node, i) in &found {
                out(&format!("{}  {node}  {}  {}\n", i.id, i.summary, state(i)));
            }
            out(&format!("{reverted} of {} reverted on {}\n", found.len(), several(nodes, "node")));
        }
    }
    if let Some(e) = lost.into_iter().next() {
        return Err(e.into());
    }
    if !unknown.is_empty() {
        let ids: Vec<&str> = unknown.iter().map(|id| id.as_str()).collect();
        return Err(
            Wrong(format!("no agent knows {}; `squall status` shows what there is", ids.join(", "))).into()
        );
    }
    stopped?;
    Ok(if reverted == found.len() { exit::OK } else { exit::OURS })
}

/// `squall report`.
pub(crate) fn report(common: &Common, run: &str, format: Option<Format>) -> Result<u8> {
    let dir = store::find(&common.runs, run)?;
    match format {
        None => {
            let (run, path) = store::report_again(&dir)?;
            match common.output {
                Output::Json => print_json(&report::json(&run)),
                Output::Text => out(&verdict_text(&run, Some(&path))),
            }
            err(&format!("squall: wrote {}\n", path.display()));
        }
        Some(Format::Html) => out(&report::html(&store::read(&dir)?)?),
        Some(Format::Json) => print_json(&report::json(&store::read(&dir)?)),
        Some(Format::Junit) => out(&report::junit(&store::read(&dir)?)),
        Some(Format::Md) => out(&report::markdown(&store::read(&dir)?)),
    }
    Ok(exit::OK)
}
