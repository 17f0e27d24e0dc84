//! `squall inject`: one fault by hand, measured, and always with an end.

use std::{fmt::Write as _, time::Duration};

use anyhow::Result;
use jiff::{Span, Zoned};
use serde_json::json;
use squall_proto::v1::{self, State};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use crate::{
    agents::{Agent, Agents, CallError, Local},
    check::choice_json,
    cli::{Common, Inject, Output, exit},
    commands::{err, injection_json, measured, out, print_json, resumed, state},
    faults::{Armed, Held, LEASE, Order, RENEW_EVERY, left, new_id},
    plan::fault::time,
    report::figure::several,
    signals::{Asked, asked},
    wrong::Wrong,
};

/// So long after the start it is shown what the fault did.
const FIRST_LOOK: Duration = Duration::from_secs(3);

/// Why a fault in the foreground is over.
enum Over {
    Time,
    Person,
    Lost(CallError),
    /// All of it ended before its time.
    Early,
}

/// `squall inject`.
pub(crate) async fn inject(
    common: &Common,
    inject: &Inject,
    signals: &mut watch::Receiver<Asked>,
) -> Result<u8> {
    let (fault, summary) = inject.fault().map_err(|(message, fix)| Wrong(format!("{message}: {fix}")))?;
    let what = inject.common();
    let target = what
        .target
        .target()
        .proto()
        .ok_or_else(|| Wrong("give --exe, --pid, --cgroup or --interface".into()))?;
    let mut order = Order {
        id: new_id(),
        on: what.target.shown(),
        summary,
        target,
        fault,
        duration: what.duration,
        lease: if what.detach { what.duration } else { LEASE },
        take: what.replicas,
        seed: what.replicas_seed.unwrap_or_else(|| rand::random::<u32>().into()),
        choice: None,
    };
    let local = if what.detach { Local::Refuse } else { Local::Start };
    let agents = Agents::connect(&common.agents, local).await?;
    let result = match order.choose(&agents.list).await {
        Err(e) => Err(e.into()),
        Ok(()) if what.dry_run => preview(common, &order, &agents.list).await,
        Ok(()) => on_agents(common, &order, what.detach, &agents.list, signals).await,
    };
    let stopped = agents.stop().await;
    let code = result?;
    stopped?;
    Ok(code)
}

/// What would be changed where, which every agent knows before it happens.
async fn preview(common: &Common, order: &Order, agents: &[Agent]) -> Result<u8> {
    let planned = order.arm(agents, true).await?;
    match common.output {
        Output::Json => {
            let list: Vec<_> = planned.iter().map(|(a, i)| injection_json(&agents[*a].node, i)).collect();
            let chosen = order.choice.as_ref().map(choice_json);
            let planned =
                json!({ "event": "planned", "fault": order.summary, "chosen": chosen, "injections": list });
            print_json(&planned);
        }
        Output::Text => {
            out(&injected(agents, order, &planned));
            out("nothing was changed\n");
        }
    }
    Ok(exit::OK)
}

async fn on_agents(
    common: &Common,
    order: &Order,
    detach: bool,
    agents: &[Agent],
    signals: &mut watch::Receiver<Asked>,
) -> Result<u8> {
    let mut held = Held::default();
    held.add(&order.arm(agents, false).await?);
    let fired = match held.fire(agents).await {
        Ok(fired) => fired,
        Err(e) => {
            held.revert(agents).await;
            return Err(e.into());
        }
    };
    show(common, agents, order, &fired, detach);
    let failed: Vec<String> =
        fired.iter().filter(|(_, i)| i.state() != State::Active).map(|(_, i)| i.reason.clone()).collect();
    if !failed.is_empty() {
        let taken = held.revert(agents).await;
        let over = |i: &&(usize, v1::Injection)| matches!(i.1.state(), State::Reverted | State::Failed);
        let left = held.len() - taken.injections.iter().filter(over).count().min(held.len());
        let after = match left {
            0 => "everything was reverted".to_owned(),
            _ => format!(
                "{left} of {} could not be reverted; `squall status` shows them, and their agents go on trying",
                held.len()
            ),
        };
        anyhow::bail!("{}; {after}", failed.join("; "));
    }
    if detach {
        return Ok(exit::OK);
    }
    let over = hold(common, agents, order, &mut held, signals).await;
    finish(common, agents, order, &fired, over, signals).await
}

/// Renews the leases until it is over.
async fn hold(
    common: &Common,
    agents: &[Agent],
    order: &Order,
    held: &mut Held,
    signals: &mut watch::Receiver<Asked>,
) -> Over {
    let start = Instant::now();
    let mut renew = interval(RENEW_EVERY);
    renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut look = Some(start + FIRST_LOOK.min(order.duration / 2));
    loop {
        tokio::select! {
            () = sleep_until(start + order.duration) => return Over::Time,
            () = asked(signals, Asked::Stop) => return Over::Person,
            () = sleep_until(look.unwrap_or(start + order.duration)), if look.is_some() => {
                look = None;
                if common.output == Output::Text && let Ok(now) = current(agents, held).await {
                    show_measured(agents, &now);
                }
            }
            _ = renew.tick() => match held.renew(agents).await {
                Ok(gone) => {
                    for (agent, id) in gone {
                        held.remove(agent, &id);
                    }
                    if held.len() == 0 {
                        return if start.elapsed() + RENEW_EVERY >= order.duration { Over::Time } else { Over::Early };
                    }
                }
                Err(e) => return Over::Lost(e),
            },
        }
    }
}

/// How the injections stand now.
async fn current(agents: &[Agent], held: &Held) -> Result<Armed, CallError> {
    let mut now = Vec::new();
    for (agent, ids) in held.by_agent() {
        let list = agents[*agent].list().await?;
        now.extend(list.into_iter().filter(|i| ids.contains(&i.id)).map(|i| (*agent, i)));
    }
    Ok(now)
}

async fn finish(
    common: &Common,
    agents: &[Agent],
    order: &Order,
    fired: &Armed,
    over: Over,
    signals: &mut watch::Receiver<Asked>,
) -> Result<u8> {
    // All that was fired, not only what is held: also what ended by itself has a last word.
    let mut all = Held::default();
    all.add(fired);
    let taken = tokio::select! {
        taken = all.revert(agents) => taken,
        () = asked(signals, Asked::Leave) => {
            err(&format!("left; what is not reverted yet ends by itself within {}\n", time(order.lease)));
            return Ok(exit::ABORTED);
        }
    };
    let reverted = taken.injections.iter().filter(|(_, i)| i.state() == State::Reverted).count();
    let bit = taken.injections.iter().any(|(_, i)| i.effect.as_ref().is_some_and(|e| e.bit));
    if common.output == Output::Json {
        let list: Vec<_> =
            taken.injections.iter().map(|(a, i)| injection_json(&agents[*a].node, i)).collect();
        out(&format!(
            "{}\n",
            json!({ "event": "ended", "reverted": reverted, "of": fired.len(), "injections": list })
        ));
    } else {
        for (agent, i) in &taken.injections {
            out(&format!("  {}  {}  {}  {}\n", agents[*agent].node, i.id, state(i), measured(i)));
            err(&resumed(i));
        }
        out(&format!("{reverted} of {} reverted\n", fired.len()));
    }
    for (agent, ids, why) in &taken.unasked {
        let node = &agents[*agent].node;
        err(&format!(
            "! {node}: {} could not be reverted ({why}); it ends by itself within {}\n",
            ids.join(", "),
            time(order.lease)
        ));
    }
    match over {
        Over::Lost(e) => Err(e.into()),
        _ if reverted < fired.len() => Ok(exit::OURS),
        Over::Person => Ok(exit::ABORTED),
        Over::Early => {
            err("! it ended before its time\n");
            Ok(exit::INCONCLUSIVE)
        }
        Over::Time if !bit => {
            err("! it never touched its target: nothing of what it matches came by\n");
            Ok(exit::INCONCLUSIVE)
        }
        Over::Time => Ok(exit::OK),
    }
}

fn show(common: &Common, agents: &[Agent], order: &Order, fired: &Armed, detach: bool) {
    if common.output == Output::Json {
        let list: Vec<_> = fired.iter().map(|(a, i)| injection_json(&agents[*a].node, i)).collect();
        out(&format!(
            "{}\n",
            json!({
                "event": "injected",
                "id": order.id,
                "fault": order.summary,
                "chosen": order.choice.as_ref().map(choice_json),
                "injections": list,
            })
        ));
        return;
    }
    out(&injected(agents, order, fired));
    let longest = fired.iter().map(|(_, i)| left(i, i.ends_boot_ns)).max().unwrap_or_default();
    let at = i64::try_from(longest.as_millis())
        .ok()
        .and_then(|ms| Zoned::now().checked_add(Span::new().milliseconds(ms)).ok());
    let at = at.map(|at| format!(", at {}", at.strftime("%H:%M:%S"))).unwrap_or_default();
    let lease =
        if detach { String::new() } else { format!(" ({} after this command dies)", time(order.lease)) };
    out(&format!("ends by itself  in {}{at}{lease}\n", time(order.duration)));
    let named = common.agents.iter().fold(String::new(), |text, a| text + " --agents " + &a.to_string());
    let or = if detach { "" } else { ", or Ctrl-C" };
    out(&format!("end it now      squall{named} revert {}{or}\n", order.id));
}

/// What was injected where, how, and with which seed; changes with their undo, and warnings.
fn injected(agents: &[Agent], order: &Order, fired: &Armed) -> String {
    let mut text = format!("{}  id {}  on {}\n", order.summary, order.id, several(fired.len(), "target"));
    // Writing to a string does not fail.
    if let Some(choice) = &order.choice {
        let _ = writeln!(text, "  chosen   {choice}");
    }
    for (agent, i) in fired {
        let _ = writeln!(text, "  {}  by {}", place(&agents[*agent], i), i.mechanism);
        if i.seed != 0 {
            let _ = writeln!(text, "    seed     {}", i.seed);
        }
        for change in &i.changes {
            let _ = writeln!(text, "    changes  {change}");
        }
        for warning in &i.warnings {
            let _ = writeln!(text, "    ! warning  {warning}");
        }
    }
    text
}

fn show_measured(agents: &[Agent], now: &Armed) {
    for (agent, i) in now {
        let idle = if i.effect.as_ref().is_some_and(|e| e.bit) {
            ""
        } else {
            "  (nothing of what it matches came by yet)"
        };
        out(&format!("measured  {}  {}  {}{idle}\n", place(&agents[*agent], i), state(i), measured(i)));
    }
}

fn place(agent: &Agent, i: &v1::Injection) -> String {
    format!("{}  {}", agent.node, i.target.as_ref().map(|t| t.name.as_str()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{commands::injection_json, fake::Fake};

    #[tokio::test]
    async fn the_seed_is_shown_where_something_is_drawn() {
        let fake = Fake::start("node-a").await;
        let order = Order {
            id: "7f3a".into(),
            on: "shop".into(),
            summary: "network shop ↔ everyone: loss 5%".into(),
            target: v1::Target::default(),
            fault: v1::Fault::default(),
            duration: Duration::from_secs(30),
            lease: LEASE,
            take: None,
            seed: 1,
            choice: None,
        };
        let drawn = v1::Injection {
            id: "7f3a".into(),
            target: Some(v1::ResolvedTarget { name: "shop pid 7".into(), ..Default::default() }),
            mechanism: "TCX".into(),
            changes: vec!["eth0: programs attached by TCX; ends with its link".into()],
            warnings: vec!["eth0: other injections come first".into()],
            seed: 4711,
            ..Default::default()
        };
        assert_eq!(injection_json("node-a", &drawn)["seed"], 4711);
        let fixed = v1::Injection { seed: 0, changes: vec![], warnings: vec![], ..drawn.clone() };
        let fired = vec![(0, drawn), (0, fixed)];
        let text = injected(std::slice::from_ref(&fake.agent), &order, &fired);
        insta::assert_snapshot!(text, @r"
        network shop ↔ everyone: loss 5%  id 7f3a  on 2 targets
          node-a  shop pid 7  by TCX
            seed     4711
            changes  eth0: programs attached by TCX; ends with its link
            ! warning  eth0: other injections come first
          node-a  shop pid 7  by TCX
        ");
    }
}
