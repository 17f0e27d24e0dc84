//! One agent takes the place of another: what was injected is taken back, and injected again where both were asked to, to
//! end when it would have ended.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use squall_proto::v1::{
    ArmRequest, CpuFault, Direction, Fault, Injection, ListRequest, MemoryFault, RenewRequest, RevertRequest,
    State, Target, fault, memory_fault,
};
use squall_tests::{Agent, AgentOptions, Place, Sockets, bin_dir, cidr, delay, interface, process, wait_for};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_mins(5);
const TAKE_OVER: &[&str] = &["--upgrade", "take-over"];
/// Of each packet, each way.
const DELAY_MS: u64 = 50;

fn faults(place: &Place) -> [(&'static str, Target, fault::Kind); 3] {
    let network = delay(DELAY_MS, Direction::Both, vec![cidr("10.99.0.2/32")]);
    let memory = MemoryFault { size: Some(memory_fault::Size::Bytes(64 * MIB)), ramp_ns: 0 };
    [
        ("delay", interface("near0", place.lab.near.name()), fault::Kind::Network(network)),
        ("load", process(place.victim.pid()), fault::Kind::Cpu(CpuFault { load: 0.05, workers: 1 })),
        ("full", process(place.victim.pid()), fault::Kind::Memory(memory)),
    ]
}

fn rtt(place: &Place) -> Result<f64> {
    place.lab.near.rtt_with("10.99.0.2")
}

/// All three faults are felt.
fn is_hurt(place: &Place) -> Result<()> {
    let rtt = rtt(place)?;
    ensure!(rtt > 1.9 * DELAY_MS as f64, "not delayed: {rtt} ms");
    let stressors = place.victim.cgroup.processes()?.len() - 1;
    ensure!(stressors == 2, "{stressors} stressors");
    Ok(())
}

fn is_well(place: &Place) -> Result<()> {
    let rtt = rtt(place)?;
    ensure!(rtt < DELAY_MS as f64, "still delayed: {rtt} ms");
    ensure!(place.victim.is_alone()?, "a stressor is left");
    Ok(())
}

async fn inject(
    agent: &Agent,
    id: &str,
    target: Target,
    kind: fault::Kind,
    lease: Duration,
) -> Result<Injection> {
    let request = ArmRequest {
        id: id.into(),
        target: Some(target),
        fault: Some(Fault { kind: Some(kind) }),
        duration_ns: 2 * LONG.as_nanos() as u64,
        lease_ns: lease.as_nanos() as u64,
        dry_run: false,
        only: Vec::new(),
    };
    let mut made = agent.client().await?.inject(request).await?.into_inner().injections;
    ensure!(made.len() == 1 && made[0].state() == State::Active, "{made:?}");
    Ok(made.remove(0))
}

async fn all(agent: &Agent) -> Result<Vec<Injection>> {
    Ok(agent.client().await?.list(ListRequest {}).await?.into_inner().injections)
}

/// The only one there is.
async fn one(agent: &Agent) -> Result<Injection> {
    let mut all = all(agent).await?;
    ensure!(all.len() == 1, "{all:?}\n{}", agent.log());
    Ok(all.remove(0))
}

fn left(agent: &Agent) -> Result<usize> {
    Ok(fs::read_dir(agent.state_dir().join("resume"))?.count())
}

fn end(mut agent: Agent) -> Result<()> {
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    Ok(())
}

#[tokio::test]
async fn the_next_agent_takes_over_what_was_live_and_ends_it_when_it_would_have_ended() -> Result<()> {
    let place = Place::new("upgrade")?;
    let mut agent = Agent::start(AgentOptions { args: TAKE_OVER, ..AgentOptions::default() }).await?;
    let mut before = Vec::new();
    for (id, target, kind) in faults(&place) {
        before.push(inject(&agent, id, target, kind, LONG).await?);
    }
    is_hurt(&place)?;

    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    is_well(&place).context("between the agents")?;
    place.is_restored().context("between the agents")?;
    assert_eq!((left(&agent)?, fs::read_dir(agent.state_dir().join("journal"))?.count()), (3, 0));

    agent.restart().await?;
    let resumed = all(&agent).await?;
    for old in &before {
        let new = resumed.iter().find(|i| i.id == old.id).context("not there")?;
        ensure!(new.state() == State::Active, "{new:?}\n{}", agent.log());
        let times = |i: &Injection| (i.fired_boot_ns, i.ends_boot_ns, i.lease_ends_boot_ns);
        assert_eq!(times(new), times(old), "{}", old.id);
        assert_eq!((new.seed, &new.summary), (old.seed, &old.summary));
        ensure!(new.resumed.as_ref().is_some_and(|r| r.gap_ns > 0), "{new:?}");
        ensure!(new.warnings.iter().any(|w| w.contains("resumed by agent")), "{:?}", new.warnings);
    }
    wait_for("all faults to be felt again", PATIENCE, || Ok(is_hurt(&place).ok()))?;
    assert_eq!(left(&agent)?, 0, "it would be resumed twice");
    let audit = fs::read_to_string(agent.state_dir().join("audit.jsonl"))?;
    let lines = audit.lines().filter(|l| l.contains("\"Resume\"") && l.contains("\"allowed\"")).count();
    assert_eq!(lines, 3, "{audit}");

    let ids: Vec<String> = before.iter().map(|i| i.id.clone()).collect();
    let mut client = agent.client().await?;
    let gone = client.renew(RenewRequest { ids: ids.clone() }).await?.into_inner().gone;
    ensure!(gone.is_empty(), "{gone:?} cannot be renewed");
    let reverted = client.revert(RevertRequest { ids, all: false }).await?.into_inner().injections;
    ensure!(reverted.iter().all(|i| i.state() == State::Reverted), "{reverted:?}");
    is_well(&place)?;
    // What ended does not come again.
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    place.is_restored()?;
    agent.restart().await?;
    assert_eq!(all(&agent).await?, []);
    end(agent)?;
    place.is_restored()
}

#[tokio::test]
async fn what_was_taken_over_ends_with_the_lease_it_had() -> Result<()> {
    let place = Place::new("upgrade")?;
    let mut agent = Agent::start(AgentOptions { args: TAKE_OVER, ..AgentOptions::default() }).await?;
    let (lease, started) = (Duration::from_secs(20), Instant::now());
    let [(id, target, kind), ..] = faults(&place);
    inject(&agent, id, target, kind, lease).await?;
    agent.terminate()?;
    agent.restart().await?;
    if one(&agent).await?.state() == State::Active {
        let ended = || Ok(is_well(&place).is_ok().then_some(()));
        wait_for("the lease to end it", lease.saturating_sub(started.elapsed()) + PATIENCE, ended)?;
        ensure!(started.elapsed() > lease / 2, "it ended at once");
    }
    let over = one(&agent).await?;
    ensure!(over.reason.contains("its lease was not renewed"), "{over:?}");
    end(agent)?;
    place.is_restored()
}

#[tokio::test]
async fn without_being_asked_an_upgrade_ends_what_is_live() -> Result<()> {
    let place = Place::new("upgrade")?;
    let [(id, target, kind), ..] = faults(&place);
    let mut agent = Agent::start(AgentOptions::default()).await?;
    inject(&agent, id, target.clone(), kind.clone(), LONG).await?;
    agent.terminate()?;
    agent.restart().await?;
    assert_eq!((all(&agent).await?, left(&agent)?), (vec![], 0));
    end(agent)?;

    // Nobody asks the one that is killed.
    let mut agent = Agent::start(AgentOptions { args: TAKE_OVER, ..AgentOptions::default() }).await?;
    inject(&agent, id, target, kind, LONG).await?;
    agent.kill()?;
    agent.restart().await?;
    let undone = one(&agent).await?;
    assert_eq!((undone.state(), undone.reason.as_str()), (State::Reverted, "left by an earlier agent"));
    is_well(&place)?;
    end(agent)?;
    place.is_restored()
}

/// Hands a load over, does something meanwhile, and says how it stands with the next agent.
async fn meanwhile(
    place: &mut Place,
    lease: Duration,
    change: impl FnOnce(&mut Place, &Agent) -> Result<()>,
) -> Result<Vec<Injection>> {
    let mut agent = Agent::start(AgentOptions { args: TAKE_OVER, ..AgentOptions::default() }).await?;
    let [_, (id, target, kind), _] = faults(place);
    inject(&agent, id, target, kind, lease).await?;
    agent.terminate()?;
    assert_eq!(left(&agent)?, 1);
    change(place, &agent)?;
    agent.restart().await?;
    let found = all(&agent).await?;
    ensure!(place.victim.cgroup.processes()?.len() < 2, "a stressor: {found:?}");
    assert_eq!(left(&agent)?, 0);
    end(agent)?;
    Ok(found)
}

#[tokio::test]
async fn a_stop_a_passed_lease_or_another_target_ends_what_was_left_and_says_why() -> Result<()> {
    let mut place = Place::new("upgrade")?;
    let because = |found: &[Injection], why: &str| -> Result<()> {
        let [one] = found else { anyhow::bail!("not one: {found:?}") };
        ensure!(one.state() == State::Reverted && one.reason.contains(why), "{why}: {one:?}");
        Ok(())
    };
    let found = meanwhile(&mut place, LONG, |_, agent| Ok(fs::write(agent.state_dir().join("stopped"), "")?));
    because(&found.await?, "this node is stopped")?;
    let lease = Duration::from_secs(15);
    let found = meanwhile(&mut place, lease, |_, _| {
        std::thread::sleep(lease);
        Ok(())
    });
    because(&found.await?, "its lease was not renewed")?;
    let found = meanwhile(&mut place, LONG, |_, agent| {
        let mut command = Command::new(bin_dir().join("squall-agent"));
        let done = command.arg("clean").arg("--state-dir").arg(agent.state_dir()).output()?;
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        ensure!(done.status.success() && said.contains("was to resume load"), "{done:?}");
        assert_eq!(left(agent)?, 0);
        Ok(())
    });
    assert_eq!(found.await?, [], "cleaned");
    place.is_restored()?;
    let found = meanwhile(&mut place, LONG, |place, _| place.victim.kill());
    because(&found.await?, "its target is gone")
}
