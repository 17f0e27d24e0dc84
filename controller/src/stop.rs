//! `squall stop`: every agent at once, whatever else is going on.

use anyhow::Result;
use futures::future::join_all;
use serde_json::json;
use squall_proto::v1::State;

use crate::{
    agents::{Agent, Agents, CallError, Local},
    cli::{Common, Output, exit},
    commands::{err, injection_json, out, print_json, state},
    report::figure::several,
};

/// What became of one agent: its node or address, and what it reverted or why it was not stopped.
type Asked = (String, Result<Vec<squall_proto::v1::Injection>, String>);

/// `squall stop`. No agent waits for another, and one that cannot be reached keeps none from being stopped.
pub(crate) async fn stop(common: &Common, release: bool) -> Result<u8> {
    let (asked, local) = if common.agents.is_empty() {
        let agents = Agents::connect(&[], Local::Start).await?;
        (join_all(agents.list.iter().map(|agent| ask(agent, release))).await, Some(agents))
    } else {
        let each = common.agents.iter().map(|address| async move {
            match Agent::connect(address).await {
                Ok(agent) => ask(&agent, release).await,
                Err(e) => (address.to_string(), Err(format!("{e:#}"))),
            }
        });
        (join_all(each).await, None)
    };
    let code = show(common, release, &asked);
    if let Some(agents) = local {
        agents.stop().await?;
    }
    Ok(code)
}

async fn ask(agent: &Agent, release: bool) -> Asked {
    let answer = agent.stop(release).await;
    let why = |e: CallError| match e {
        CallError::Lost { message, .. }
        | CallError::Failed { message, .. }
        | CallError::Refused { message, .. }
        | CallError::NotThere { message, .. } => message,
    };
    (agent.node.clone(), answer.map_err(why))
}

fn show(common: &Common, release: bool, asked: &[Asked]) -> u8 {
    let done = if release { "released" } else { "stopped" };
    let left = asked.iter().filter_map(|(_, answer)| answer.as_ref().ok()).flatten();
    let left = left.filter(|i| !matches!(i.state(), State::Reverted | State::Failed)).count();
    let failed = asked.iter().filter(|(_, answer)| answer.is_err()).count();
    if common.output == Output::Json {
        let node = |(node, answer): &Asked| match answer {
            Ok(injections) => {
                let list: Vec<_> = injections.iter().map(|i| injection_json(node, i)).collect();
                json!({ "node": node, done: true, "injections": list })
            }
            Err(why) => json!({ "node": node, done: false, "error": why }),
        };
        print_json(&asked.iter().map(node).collect());
    }
    for (node, answer) in asked {
        match answer {
            Err(why) => err(&format!("! {node} is NOT {done}: {why}\n")),
            Ok(injections) if common.output == Output::Text => {
                for i in injections {
                    out(&format!("{}  {node}  {}  {}\n", i.id, i.summary, state(i)));
                }
                out(&format!("✔ {node} is {done}\n"));
            }
            Ok(_) => {}
        }
    }
    if common.output == Output::Text {
        out(&format!("{} of {} {done}\n", asked.len() - failed, several(asked.len(), "agent")));
    }
    match (failed, left) {
        (0, 0) => exit::OK,
        (0, _) => exit::OURS,
        _ => exit::ABORTED,
    }
}
