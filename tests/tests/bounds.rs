//! No more than agreed: what is protected, what stops everything, and what a plan may touch at most.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use squall_proto::v1::{
    ArmRequest, CgroupSelector, CpuFault, DescribeRequest, Fault, Injection, ListRequest, MemoryFault,
    NetworkFault, ProcessSelector, State, Target, agent_client::AgentClient, fault, memory_fault, target,
};
use squall_tests::{
    Agent, AgentOptions, Cgroup, Controller, Running, Victim, bin_dir, in_a_shop, need_root, stdout, unique,
    wait_for,
};
use tonic::transport::Channel;

const SHORT: &str = include_str!("../e2e/short.yaml");
const MIB: u64 = 1 << 20;
/// A file is looked for four times a second; a VM without KVM takes its time.
const SOON: Duration = Duration::from_secs(10);

fn cpu() -> Fault {
    Fault { kind: Some(fault::Kind::Cpu(CpuFault { load: 0.2, workers: 1 })) }
}

fn memory() -> Fault {
    let size = Some(memory_fault::Size::Bytes(MIB));
    Fault { kind: Some(fault::Kind::Memory(MemoryFault { size, ramp_ns: 0 })) }
}

fn loss() -> Fault {
    Fault { kind: Some(fault::Kind::Network(NetworkFault { partition: true, ..NetworkFault::default() })) }
}

fn process(pid: u32) -> Target {
    Target { kind: Some(target::Kind::Process(ProcessSelector { pid, ..ProcessSelector::default() })) }
}

fn cgroup(path: &str) -> Target {
    Target { kind: Some(target::Kind::Cgroup(CgroupSelector { path: path.to_owned() })) }
}

fn request(id: &str, target: Target, fault: Fault) -> ArmRequest {
    ArmRequest {
        id: id.to_owned(),
        target: Some(target),
        fault: Some(fault),
        duration_ns: 600_000_000_000,
        lease_ns: 120_000_000_000,
        dry_run: false,
    }
}

/// Injects a CPU fault; gives the refusal instead, where it is refused.
async fn inject(client: &mut AgentClient<Channel>, request: ArmRequest) -> Result<Injection, String> {
    let answer = client.inject(request).await.map_err(|status| status.message().to_owned())?;
    answer.into_inner().injections.pop().ok_or_else(|| "no injection".to_owned())
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_everything_and_outlives_the_agent() -> Result<()> {
    need_root()?;
    let victim = Victim::start("bounds", 64 * MIB)?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    let mut client = agent.client().await?;
    let here = format!("unix://{}", agent.socket().display());
    let nowhere = "unix:///nowhere/agent.sock";
    let squall = |args: &[&str]| Command::new(bin_dir().join("squall")).args(args).output();
    let ask = |id: &str| request(id, process(victim.pid()), cpu());
    let hurt = |id: &str, injected: Result<Injection, String>| -> Result<()> {
        let injected = injected.map_err(anyhow::Error::msg).with_context(|| id.to_owned())?;
        ensure!(injected.state() == State::Active && !victim.is_alone()?, "{id} does nothing: {injected:?}");
        Ok(())
    };
    let ended = |why: &str| {
        wait_for(&format!("the end of the fault by {why}"), SOON, || Ok(victim.is_alone()?.then_some(())))
    };

    hurt("a", inject(&mut client, ask("a")).await)?;
    let output = squall(&["stop", "--all", "--agents", nowhere, "--agents", &here])?;
    let text = said(&output);
    ensure!(output.status.code() == Some(4), "one was not reached: {}\n{text}", output.status);
    ensure!(text.contains(&format!("! {nowhere} is NOT stopped")), "{text}");
    ensure!(
        text.contains("reverted (this node was stopped)") && text.contains("1 of 2 agents stopped"),
        "{text}"
    );
    ensure!(victim.is_alone()?, "the command returns when the host is as before");

    for again in ["b", "c"] {
        let refused = inject(&mut client, ask(again)).await.expect_err("it is stopped");
        ensure!(refused.contains("squall stop --release"), "{refused}");
        ensure!(client.describe(DescribeRequest::default()).await?.into_inner().stopped);
        // And once more after a restart.
        agent.kill()?;
        agent.restart().await?;
        client = agent.client().await?;
    }
    let output = squall(&["stop", "--release", "--agents", &here])?;
    ensure!(output.status.code() == Some(0), "{}", said(&output));
    hurt("d", inject(&mut client, ask("d")).await)?;

    // Without a network, and without an agent that answers: a file, and a signal.
    let file = agent.state_dir().join("stopped");
    fs::write(&file, "")?;
    ended("the file")?;
    ensure!(inject(&mut client, ask("e")).await.is_err());
    fs::remove_file(&file)?;
    hurt("f", inject(&mut client, ask("f")).await)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(agent.pid().cast_signed()), Signal::SIGUSR1)?;
    ended("SIGUSR1")?;
    ensure!(file.exists() && inject(&mut client, ask("g")).await.is_err());
    agent.terminate()?;
    Ok(())
}

/// A process that goes by a name, in a cgroup of its own.
struct Named {
    process: Running,
    cgroup: Cgroup,
    _dir: tempfile::TempDir,
}

impl Named {
    fn start(name: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let program = dir.path().join(name);
        fs::copy(stdout(Command::new("sh").args(["-c", "command -v sleep"]))?.trim(), &program)?;
        let cgroup = Cgroup::new(unique("bounds"))?;
        let process = Running::start(name, &cgroup.wrap(Command::new(&program).arg("3600")))?;
        wait_for("the process in its cgroup", SOON, || {
            let exe = fs::read_link(Path::new("/proc").join(process.pid().to_string()).join("exe"));
            Ok(exe.is_ok_and(|exe| exe == program).then_some(()))
        })?;
        Ok(Self { process, cgroup, _dir: dir })
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_is_run_and_reached_through_is_never_hurt() -> Result<()> {
    need_root()?;
    let (kubelet, etcd, other) = (Named::start("kubelet")?, Named::start("etcd")?, Named::start("shop")?);
    let place = other.cgroup.path();
    let agent =
        Agent::start(AgentOptions { args: &["--protect", "etc*"], ..AgentOptions::default() }).await?;
    let mut client = agent.client().await?;
    let me = std::process::id();
    for (what, target, fault, why) in [
        ("init", process(1), cpu(), "pid 1"),
        ("init's network", process(1), loss(), "pid 1"),
        ("what started the agent", process(me), memory(), "which is protected"),
        ("the root cgroup", cgroup("/"), cpu(), "pid 1"),
        ("a daemon of the node", process(kubelet.pid()), cpu(), "kubelet"),
        ("its network", process(kubelet.pid()), loss(), "kubelet"),
        ("its cgroup", cgroup(&kubelet.cgroup.path()), memory(), "kubelet"),
        ("what was asked for", process(etcd.pid()), cpu(), "--protect etc*"),
    ] {
        let refused = inject(&mut client, request("x", target, fault)).await;
        let refused = refused.err().with_context(|| format!("{what} is hurt"))?;
        // Of some VMs' init not even the name can be read, so that nothing finds it.
        let said = refused.starts_with("target: ") || refused.starts_with("no target: pid 1: ");
        ensure!(said && refused.contains(why), "{what}: {refused}");
    }
    ensure!(client.list(ListRequest {}).await?.into_inner().injections.is_empty());
    let hurt = inject(&mut client, request("y", process(other.pid()), cpu())).await;
    ensure!(hurt.map_err(anyhow::Error::msg)?.state() == State::Active, "everybody else may be hurt");
    drop(agent);

    let args = ["--protect", &place];
    let agent = Agent::start(AgentOptions { args: &args, ..AgentOptions::default() }).await?;
    let refused = inject(&mut agent.client().await?, request("z", process(other.pid()), cpu())).await;
    let refused = refused.expect_err("its cgroup is protected");
    ensure!(refused.contains(&format!("--protect {place}")), "{refused}");
    Ok(())
}

fn with_limits(limits: &str) -> String {
    SHORT.replacen("rounds:", &format!("limits: {{ {limits} }}\nrounds:"), 1)
}

#[test]
fn a_run_ends_at_once_where_users_see_too_much() -> Result<()> {
    in_a_shop(Some("no-fallback"), |shop| {
        let controller = Controller::of(shop);
        let abort = "nodes: 100%, injections: 1, abort: { probe: shoppers, errors: 20%, for: 2s }";
        let plan = controller.plan(&with_limits(abort))?;
        let output = controller.run(&["run", &plan.display().to_string()])?;
        let text = said(&output);
        ensure!(output.status.code() == Some(4), "{}:\n{text}", output.status);
        let report = controller.report()?;
        ensure!(report["verdict"] == "aborted", "{report:#}");
        let reason = report["reason"].as_str().context("no reason")?;
        ensure!(
            reason.contains("abort gate: ") && reason.contains("requests of shoppers failed"),
            "{reason}"
        );
        ensure!(text.contains(reason), "the reason is not told:\n{text}");
        let injections = report["injections"].as_array().context("no injections")?;
        ensure!(injections.len() == 1, "the second round was not run: {report:#}");
        ensure!(!injections[0]["reverted"].is_null(), "{report:#}");
        wait_for("answers out of Redis again", SOON, || {
            Ok(shop.ask("U1").ok().filter(|body| body.contains("\"fallback_used\":false")))
        })?;
        Ok(())
    })
}

#[test]
fn what_is_more_than_agreed_is_refused_before_anything_happens() -> Result<()> {
    in_a_shop(None, |shop| {
        let controller = Controller::of(shop);
        let plan = controller.plan(&with_limits("nodes: 50%"))?;
        let (above, _) =
            with_limits("").split_once("limits:").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let line = above.lines().count() + 1;
        for command in ["check", "run"] {
            let output = controller.run(&[command, &plan.display().to_string()])?;
            let text = said(&output);
            ensure!(output.status.code() == Some(2), "{command}: {}\n{text}", output.status);
            ensure!(text.contains("would be hurt on 1 of 1 node at once (100%), and 50% may be"), "{text}");
            ensure!(text.contains(&format!("plan.yaml:{line}:")), "no line {line}:\n{text}");
            ensure!(shop.ask("U1")?.contains("\"fallback_used\":false"), "something was injected");
        }
        Ok(())
    })
}

#[test]
fn a_dry_run_says_what_would_be_changed_on_each_host_and_changes_nothing() -> Result<()> {
    in_a_shop(None, |shop| {
        let pid = shop.service().pid().to_string();
        let controller = Controller::of(shop);
        let plan = controller.plan(SHORT)?;
        let before = shop.client().state()?;
        let node = nix::unistd::gethostname()?.to_string_lossy().into_owned();
        let output = controller.run(&["run", "--dry-run", &plan.display().to_string()])?;
        let text = said(&output);
        ensure!(output.status.code() == Some(0), "{}:\n{text}", output.status);
        ensure!(text.contains(&format!("{node}: 2 injections")), "{text}");
        for part in ["redis-cut  network", "memory-pressure  memory", "changes  ", "nothing was changed"] {
            ensure!(text.contains(part), "no {part:?} in\n{text}");
        }
        let inject = ["inject", "cpu", "--pid", &pid, "--load", "50%", "--for", "30s", "--dry-run"];
        let output = controller.run(&inject)?;
        let text = said(&output);
        ensure!(output.status.code() == Some(0) && text.contains("changes  "), "{}:\n{text}", output.status);
        ensure!(shop.cgroup().processes()?.len() == 1, "a stressor runs");
        ensure!(before == shop.client().state()? && controller.run_dir().is_err(), "something was done");
        Ok(())
    })
}
