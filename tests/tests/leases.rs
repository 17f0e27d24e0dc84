//! A fault ends with its lease, whatever its agent does.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use squall_proto::v1::{ArmRequest, Direction, Fault, State, Target, fault};
use squall_tests::{Agent, AgentOptions, Lab, Sockets, bin_dir, interface, need_root, partition, wait_for};

const LEASE: Duration = Duration::from_secs(6);
/// How late a lease may end: timers, and a VM without KVM.
const SLACK: Duration = Duration::from_secs(3);

/// Injects; from when to when its lease may end.
async fn inject(agent: &Agent, target: Target, kind: fault::Kind) -> Result<[Instant; 2]> {
    let sent = Instant::now();
    let request = ArmRequest {
        id: "lease".into(),
        target: Some(target),
        fault: Some(Fault { kind: Some(kind) }),
        duration_ns: 600_000_000_000,
        lease_ns: LEASE.as_nanos() as u64,
        dry_run: false,
        only: Vec::new(),
    };
    let made = agent.client().await?.inject(request).await?.into_inner().injections;
    ensure!(made.len() == 1 && made[0].state() == State::Active, "{made:?}");
    Ok([sent + LEASE, Instant::now() + LEASE])
}

/// With an agent that stands still, something else must end the fault: the kernel, or the stressor.
fn ends_without_the_agent(
    agent: &mut Agent,
    ends: [Instant; 2],
    is_felt: impl Fn() -> Result<bool>,
) -> Result<()> {
    let pid = Pid::from_raw(agent.pid().cast_signed());
    kill(pid, Signal::SIGSTOP)?;
    let observed = (|| {
        ensure!(is_felt()? || Instant::now() > ends[0], "it is not felt");
        thread::sleep(ends[1].saturating_duration_since(Instant::now()));
        wait_for("the lease to end the fault", SLACK, || Ok((!is_felt()?).then_some(())))
    })();
    kill(pid, Signal::SIGCONT)?;
    observed?;
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());
    Ok(())
}

#[tokio::test]
async fn lease_ends_a_partition_of_an_agent_that_stands_still() -> Result<()> {
    let lab = Lab::new("leases")?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    let fault = fault::Kind::Network(partition(Direction::Both, vec![]));
    let ends = inject(&agent, interface("near0", lab.near.name()), fault).await?;
    let is_felt = || Ok(lab.near.ping_with("-c 1 -W 1 10.99.0.2")?.0.is_empty());
    ends_without_the_agent(&mut agent, ends, is_felt)
}

/// The kernel's deadlines run on its own CLOCK_BOOTTIME, which a time namespace does not shift.
#[tokio::test]
async fn agent_in_a_time_namespace_with_another_boot_time_is_refused() -> Result<()> {
    need_root()?;
    let dir = tempfile::tempdir()?;
    let mut command = Command::new("unshare");
    command.args(["--time", "--boottime", "1000", "--fork", "--kill-child"]);
    command.arg(bin_dir().join("squall-agent")).arg("--state-dir").arg(dir.path());
    let done = command.arg("--socket").arg(dir.path().join("sock")).args(["--metrics", "off"]).output()?;
    let said = String::from_utf8(done.stderr).context("no text")?;
    ensure!(!done.status.success() && said.contains("CLOCK_BOOTTIME") && said.contains("1000"), "{said}");
    Ok(())
}
