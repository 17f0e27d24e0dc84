//! A journal on a disk that is full or takes nothing more: nothing new is injected, and everything is still taken back.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use squall_proto::v1::{ArmRequest, Direction, Fault, Injection, NetworkFault, RevertRequest, State, fault};
use squall_tests::{
    Agent, AgentOptions, Lab, NetState, Sockets, cidr, delay, interface, need_root, wait_for,
};
use tokio::runtime::Builder;

const PATIENCE: Duration = Duration::from_secs(20);

struct Place {
    lab: Lab,
    before: NetState,
    agent: Agent,
}

/// Runs a test on a thread of its own, in a mount namespace that its agent shares and nobody else sees.
fn apart(test: impl AsyncFnOnce(&mut Place) -> Result<()> + Send + 'static) -> Result<()> {
    need_root()?;
    let test = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        Builder::new_current_thread().enable_all().build()?.block_on(async {
            let lab = Lab::new("journal")?;
            let before = lab.near.state()?;
            let agent = Agent::start(AgentOptions::default()).await?;
            let mut place = Place { lab, before, agent };
            test(&mut place).await?;
            ensure!(place.agent.terminate()?.success(), "the agent failed:\n{}", place.agent.log());
            place.is_restored()
        })
    });
    test.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A tiny file system on a directory.
fn tiny(on: &Path) -> Result<()> {
    mount(Some("tmpfs"), on, Some("tmpfs"), MsFlags::empty(), Some("size=16k,mode=0700"))
        .with_context(|| format!("mounting on {}", on.display()))
}

fn make_read_only(dir: &Path, on: bool) -> Result<()> {
    let flags = if on { MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY } else { MsFlags::MS_REMOUNT };
    mount(None::<&str>, dir, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("mounting {} again", dir.display()))
}

impl Drop for Place {
    /// What is mounted on cannot be removed with the agent's directory.
    fn drop(&mut self) {
        let state = self.agent.state_dir();
        // Not every test mounts on each.
        let _ = umount2(&state.join("journal"), MntFlags::MNT_DETACH);
        let _ = umount2(&state, MntFlags::MNT_DETACH);
    }
}

impl Place {
    /// A delay on loopback: it takes settings, which nothing but a revert takes back.
    async fn inject(&self, id: &str) -> Result<Injection> {
        let fault: NetworkFault = delay(50, Direction::Egress, vec![cidr("127.0.0.0/8")]);
        let request = ArmRequest {
            id: id.into(),
            target: Some(interface("lo", self.lab.near.name())),
            fault: Some(Fault { kind: Some(fault::Kind::Network(fault)) }),
            duration_ns: 600_000_000_000,
            lease_ns: 120_000_000_000,
            dry_run: false,
            only: Vec::new(),
        };
        let made = self.agent.client().await?.inject(request).await?.into_inner().injections;
        let [injection] = <[Injection; 1]>::try_from(made).ok().context("not one injection")?;
        Ok(injection)
    }

    /// Fails unless an injection is refused, for this reason and with nothing changed.
    async fn is_refused(&self, id: &str, reason: &str) -> Result<()> {
        let (before, records) = (self.lab.near.state()?, self.records()?);
        let refused = self.inject(id).await?;
        ensure!(refused.state() == State::Failed, "{refused:?}");
        ensure!(
            refused.reason.contains("nothing was injected") && refused.reason.contains(reason),
            "{refused:?}"
        );
        assert_eq!(before.changes(&self.lab.near.state()?), [""; 0]);
        assert_eq!(records, self.records()?, "something of the refused one is in the journal");
        Ok(())
    }

    async fn revert(&self, id: &str) -> Result<()> {
        let request = RevertRequest { ids: vec![id.into()], all: false };
        let ended = self.agent.client().await?.revert(request).await?.into_inner().injections;
        ensure!(ended.len() == 1 && ended[0].state() == State::Reverted, "{ended:?}");
        self.is_restored()
    }

    fn is_restored(&self) -> Result<()> {
        let changes = || self.before.changes(&self.lab.near.state().unwrap_or_default());
        wait_for("the lab to be as before", PATIENCE, || Ok(changes().is_empty().then_some(())))
            .with_context(|| format!("{:?}\n{}", changes(), self.agent.log()))?;
        let rtt = self.lab.near.rtt_with("127.0.0.1")?;
        ensure!(rtt < 30.0, "{rtt} ms on loopback");
        Ok(())
    }

    /// Names in the journal, sorted.
    fn records(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(self.agent.state_dir().join("journal"))?;
        let mut names: Vec<String> = entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        names.sort();
        Ok(names)
    }
}

#[test]
fn full_disk_refuses_injections_and_takes_reverts() -> Result<()> {
    apart(async |place| {
        let journal = place.agent.state_dir().join("journal");
        tiny(&journal)?;
        ensure!(place.inject("first").await?.state() == State::Active);
        let filler = journal.join("filler");
        let full = fs::write(&filler, vec![0; 64 << 10]).err().context("the disk is not full")?;
        ensure!(full.kind() == std::io::ErrorKind::StorageFull, "{full}");
        place.is_refused("second", "No space left on device").await?;
        place.revert("first").await?;
        assert_eq!(place.records()?, ["filler"]);
        fs::remove_file(filler)?;
        ensure!(place.inject("fourth").await?.state() == State::Active);
        place.revert("fourth").await
    })
}

#[test]
fn read_only_disk_refuses_injections_and_takes_reverts() -> Result<()> {
    apart(async |place| {
        let journal = place.agent.state_dir().join("journal");
        tiny(&journal)?;
        ensure!(place.inject("first").await?.state() == State::Active);
        make_read_only(&journal, true)?;
        place.is_refused("second", "Read-only file system").await?;
        place.revert("first").await?;
        assert_eq!(place.records()?, ["first.json"], "it cannot be removed");
        make_read_only(&journal, false)?;
        wait_for("the record to be removed", PATIENCE, || Ok(place.records()?.is_empty().then_some(())))
    })
}

#[test]
fn agent_takes_back_from_a_read_only_disk_what_a_dead_one_left() -> Result<()> {
    apart(async |place| {
        ensure!(place.agent.terminate()?.success(), "{}", place.agent.log());
        let state = place.agent.state_dir();
        tiny(&state)?;
        place.agent.restart().await?;
        ensure!(place.inject("first").await?.state() == State::Active);
        place.agent.kill()?;
        make_read_only(&state, true)?;
        if place.before.changes(&place.lab.near.state()?).is_empty() {
            bail!("a dead agent left nothing, so this shows nothing");
        }
        place.agent.restart().await?;
        place.is_restored()?;
        // The audit log is on that disk, too.
        let said = place.inject("second").await.err().context("it was not refused")?.to_string();
        ensure!(said.contains("nothing is injected") && said.contains("Read-only file system"), "{said}");
        place.is_restored()?;
        make_read_only(&state, false)?;
        wait_for("the record to be removed", PATIENCE, || Ok(place.records()?.is_empty().then_some(())))
    })
}
