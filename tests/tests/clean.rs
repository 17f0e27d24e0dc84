//! `squall-agent clean` takes back what a dead agent left, with a journal or without, and touches nothing of a living one.

use std::{
    fs,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use squall_proto::v1::{
    ArmRequest, CpuFault, Direction, Fault, Loss, NetworkFault, RevertRequest, State, Target, UpdateRequest,
    fault,
};
use squall_tests::{
    Agent, AgentOptions, Place, Sockets, bin_dir, cidr, delay, interface, partition, process, wait_for,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// A delay on loopback, which sets settings; a delay, which may take a line and filters; a load.
async fn hurt(place: &Place, agent: &Agent) -> Result<()> {
    let near = place.lab.near.name();
    let network = |fault: NetworkFault| fault::Kind::Network(fault);
    let cpu = fault::Kind::Cpu(CpuFault { load: 0.05, workers: 1 });
    for (id, target, kind) in [
        ("loopback", interface("lo", near), network(delay(50, Direction::Egress, vec![cidr("127.0.0.0/8")]))),
        ("delay", interface("near0", near), network(delay(50, Direction::Both, vec![cidr("10.99.0.2/32")]))),
        ("load", process(place.victim.pid()), cpu),
    ] {
        inject(agent, id, target, kind).await?;
    }
    Ok(())
}

/// The stressor in the victim's cgroup.
fn stressor(place: &Place) -> Result<i32> {
    let victim = place.victim.pid().cast_signed();
    let others = place.victim.cgroup.processes()?.into_iter().find(|pid| *pid != victim);
    others.context("no stressor")
}

async fn inject(agent: &Agent, id: &str, target: Target, kind: fault::Kind) -> Result<()> {
    let request = ArmRequest {
        id: id.into(),
        target: Some(target),
        fault: Some(Fault { kind: Some(kind) }),
        duration_ns: 600_000_000_000,
        lease_ns: 120_000_000_000,
        dry_run: false,
        only: Vec::new(),
    };
    let injections = agent.client().await?.inject(request).await?.into_inner().injections;
    ensure!(injections.len() == 1 && injections[0].state() == State::Active, "{injections:?}");
    Ok(())
}

/// Runs it; whether it succeeded, and all that it said.
fn clean(state_dir: &Path, more: &[&str]) -> Result<(bool, String)> {
    let mut command = Command::new(bin_dir().join("squall-agent"));
    let done = command.arg("clean").arg("--state-dir").arg(state_dir).args(more).output()?;
    let said = [done.stdout, done.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    Ok((done.status.success(), said))
}

/// The journal's records.
fn records(agent: &Agent) -> Result<usize> {
    Ok(fs::read_dir(agent.state_dir().join("journal"))?.count())
}

#[tokio::test]
async fn clean_plays_the_journal_of_a_dead_agent_back() -> Result<()> {
    let place = Place::new("clean")?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    hurt(&place, &agent).await?;
    agent.kill()?;
    wait_for("the stressor to end with its agent", PATIENCE, || Ok(place.victim.is_alone()?.then_some(())))?;
    let left = place.left()?;
    ensure!(left.iter().any(|change| change.contains("route_localnet 1")), "nothing to clean: {left:?}");

    let (ok, said) = clean(&agent.state_dir(), &["--dry-run"])?;
    ensure!(ok && said.contains(" to clean; nothing was changed"), "{said}");
    for id in ["loopback", "delay", "load"] {
        ensure!(said.contains(&format!("would undo {id}")), "{said}");
    }
    ensure!(records(&agent)? == 3, "a dry run removed records");
    ensure!(
        place.left()?.iter().any(|change| change.contains("route_localnet 1")),
        "a dry run changed something"
    );

    let (ok, said) = clean(&agent.state_dir(), &[])?;
    ensure!(ok, "{said}");
    let places = ["load", "delay", "loopback"].map(|id| said.find(&format!("undo {id}")));
    ensure!(places.is_sorted() && places.iter().all(Option::is_some), "not the newest first: {said}");
    place.is_restored()?;
    ensure!(records(&agent)? == 0, "records are left");
    let (ok, said) = clean(&agent.state_dir(), &[])?;
    ensure!(ok && said.contains("nothing to clean"), "{said}");
    Ok(())
}

#[tokio::test]
async fn clean_finds_strays_without_a_journal() -> Result<()> {
    let place = Place::new("clean")?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    let near = place.lab.near.name();
    let fault = fault::Kind::Network(delay(50, Direction::Both, vec![]));
    inject(&agent, "delay", interface("near0", near), fault).await?;
    // A line of an agent that is gone, also on kernels that have none.
    place.lab.near.ip("link add squallffffa type veth peer name squallffffb")?;
    place.lab.near.ip("link set squallffffa alias squall-agent")?;
    // A stressor of an agent that is gone, and that has not noticed: somebody holds its input.
    let mut stressor = Command::new(bin_dir().join("squall-agent"));
    stressor.arg0("squall-stress").args([
        "stress",
        "cpu",
        "--injection=lost",
        "--agent=99999999",
        "--cgroup",
    ]);
    stressor.arg(place.victim.cgroup.dir("cpu")?).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut running = stressor.spawn()?;
    let stressor = running.id();
    wait_for("the stressor", PATIENCE, || Ok((!place.victim.is_alone()?).then_some(())))?;
    agent.kill()?;
    fs::remove_dir_all(agent.state_dir())?;

    let (ok, said) = clean(&agent.state_dir(), &["--dry-run"])?;
    ensure!(ok && said.contains(&format!("would end the stressor {stressor}")), "{said}");
    ensure!(said.contains("would remove squallffffa"), "{said}");
    ensure!(!agent.state_dir().exists(), "a dry run made a directory");
    ensure!(!place.victim.is_alone()?, "a dry run ended the stressor");

    let (ok, said) = clean(&agent.state_dir(), &[])?;
    ensure!(ok, "{said}");
    let status = running.wait()?;
    ensure!(status.signal() == Some(Signal::SIGKILL as i32), "{status}");
    place.is_restored()
}

#[tokio::test]
async fn clean_touches_nothing_of_a_living_agent() -> Result<()> {
    let place = Place::new("clean")?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    hurt(&place, &agent).await?;
    let cut = fault::Kind::Network(partition(Direction::Both, vec![cidr("10.99.0.3/32")]));
    inject(&agent, "cut", interface("near0", place.lab.near.name()), cut).await?;
    let during = (place.left()?, stressor(&place)?);

    let (ok, said) = clean(&agent.state_dir(), &[])?;
    ensure!(!ok && said.contains("another squall-agent holds"), "{said}");
    let elsewhere = tempfile::tempdir()?;
    let (ok, said) = clean(elsewhere.path(), &[])?;
    ensure!(ok && said.contains("nothing to clean"), "{said}");

    assert_eq!((place.left()?, stressor(&place)?), during);
    let rtt = place.lab.near.rtt_with("10.99.0.2")?;
    ensure!(rtt > 99.0, "the delay is gone: {rtt} ms");
    let (rtts, said) = place.lab.near.ping_with("-c 3 -i 0.1 -W 1 10.99.0.3")?;
    ensure!(rtts.is_empty(), "the partition is gone: {said}");
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    place.is_restored()
}

#[tokio::test]
async fn clean_goes_on_after_a_record_that_it_cannot_read() -> Result<()> {
    let place = Place::new("clean")?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    hurt(&place, &agent).await?;
    agent.kill()?;
    let journal = agent.state_dir().join("journal");
    let newer = fs::read_to_string(journal.join("load.json"))?.replace("\"format\":1", "\"format\":99");
    fs::write(journal.join("load.json"), newer)?;
    fs::write(journal.join("torn.json"), "{\"format\":1,")?;

    let (ok, said) = clean(&agent.state_dir(), &[])?;
    ensure!(!ok && said.contains("load.json: format 99"), "{said}");
    ensure!(said.contains("torn.json: not an undo record"), "{said}");
    ensure!(said.contains("undo delay") && said.contains("undo loopback"), "the rest did not go on: {said}");
    let (ok, said) = clean(&agent.state_dir(), &[])?;
    ensure!(!ok && said.contains("load.json.unreadable: it was set aside before"), "{said}");
    fs::create_dir(journal.join("busy.json"))?;
    for aside in ["load", "torn"] {
        fs::remove_file(journal.join(format!("{aside}.json.unreadable")))?;
    }
    let (ok, said) = clean(&agent.state_dir(), &[])?;
    ensure!(!ok && said.contains("busy.json: Is a directory") && said.contains("try again"), "{said}");
    ensure!(journal.join("busy.json").exists(), "what cannot be read just now was thrown away");
    wait_for("the stressor to end with its agent", PATIENCE, || Ok(place.victim.is_alone()?.then_some(())))?;
    place.is_restored()
}

/// A loss on loopback: it takes nothing that outlives its agent.
fn loss() -> fault::Kind {
    let loss = Some(Loss { ratio: 0.1, ..Loss::default() });
    fault::Kind::Network(NetworkFault { loss, ..NetworkFault::default() })
}

fn loopback_delay() -> fault::Kind {
    fault::Kind::Network(delay(50, Direction::Egress, vec![cidr("127.0.0.0/8")]))
}

/// The settings of loopback, and on most kernels a line.
fn outlives(place: &Place) -> Result<()> {
    let left = place.left()?;
    ensure!(left.iter().any(|change| change.contains("route_localnet 1")), "nothing to clean: {left:?}");
    Ok(())
}

#[tokio::test]
async fn what_an_update_came_to_need_is_taken_back_too() -> Result<()> {
    let place = Place::new("clean")?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    inject(&agent, "loss", interface("lo", place.lab.near.name()), loss()).await?;
    let later = Some(Fault { kind: Some(loopback_delay()) });
    agent.client().await?.update(UpdateRequest { id: "loss".into(), fault: later }).await?;
    agent.kill()?;
    outlives(&place)?;
    agent.restart().await?;
    ensure!(records(&agent)? == 0, "records are left");
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    place.is_restored()
}

#[tokio::test]
async fn what_another_injection_left_to_the_last_one_is_taken_back_too() -> Result<()> {
    let place = Place::new("clean")?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    inject(&agent, "loss", interface("lo", place.lab.near.name()), loss()).await?;
    inject(&agent, "delay", interface("lo", place.lab.near.name()), loopback_delay()).await?;
    let revert = RevertRequest { ids: vec!["delay".into()], all: false };
    let reverted = agent.client().await?.revert(revert).await?.into_inner().injections;
    ensure!(reverted[0].state() == State::Reverted, "{reverted:?}");
    agent.kill()?;
    outlives(&place)?;
    agent.restart().await?;
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    place.is_restored()
}
