//! No more than agreed: what is protected, what stops everything, and what a plan may touch at most.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use squall_proto::v1::{
    ArmRequest, CgroupSelector, CpuFault, DescribeRequest, Fault, Injection, ListRequest, MemoryFault,
    NetworkFault, ProcessSelector, RevertRequest, Sockets as Whose, State, Target, UpdateRequest,
    agent_client::AgentClient, fault, memory_fault, target,
};
use squall_tests::{
    Agent, AgentOptions, Cgroup, Controller, Lab, Running, Sockets, Unified, Victim, bin_dir, cidr,
    in_a_shop, interface, need_root, stdout, unique, wait_for,
};
use tonic::transport::Channel;

const SHORT: &str = include_str!("../e2e/short.yaml");
const MIB: u64 = 1 << 20;
/// A stop by file is obeyed at once; a VM without KVM takes its time.
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
        only: Vec::new(),
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
        Self::start_by(name, &|program| Command::new(program))
    }

    fn start_by(name: &str, command: &dyn Fn(&Path) -> Command) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let program = dir.path().join(name);
        fs::copy(stdout(Command::new("sh").args(["-c", "command -v sleep"]))?.trim(), &program)?;
        let cgroup = Cgroup::new(unique("bounds"))?;
        let process = Running::start(name, &cgroup.wrap(command(&program).arg("3600")))?;
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

/// A node with one pod behind a veth pair: the agent is on the near side, and the pod on the far one.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_protected_is_not_hurt_by_its_network_either() -> Result<()> {
    let lab = Lab::new("bounds")?;
    let uid = Kubelet::uid(0);
    let dir = tempfile::tempdir()?;
    let logs = |namespace: &str| -> Result<String> {
        let logs = dir.path().join(namespace);
        fs::create_dir_all(logs.join(format!("{namespace}_some-pod_{uid}")))?;
        Ok(logs.display().to_string())
    };
    let in_far = |program: &Path| lab.far.command(program);
    // What is asked for by name, somebody beside it, and somebody on the node.
    let etcd = Named::start_by("etcd", &in_far)?;
    let [beside, shop] =
        [Named::start_by("beside", &in_far)?, Named::start_by("shop", &|program| lab.near.command(program))?];
    let place = format!("kubepods/pod{uid}/app");
    let pod = etcd.cgroup.wrap_below(&place, lab.far.command("sleep").arg("3600"))?;
    let _pod = Running::start("a pod", &pod)?;

    let cut = |change: &dyn Fn(&mut NetworkFault)| {
        let mut fault =
            NetworkFault { partition: true, peers: vec![cidr("10.99.0.77/32")], ..NetworkFault::default() };
        change(&mut fault);
        Fault { kind: Some(fault::Kind::Network(fault)) }
    };
    let just = cut(&|_| {});
    let all = cut(&|fault| {
        fault.set_sockets(Whose::All);
        fault.interface = "near0".to_owned();
    });
    let agent = async |args: &[&str]| {
        let agent =
            Agent::start(AgentOptions { netns: Some(&lab.near), args, ..AgentOptions::default() }).await?;
        anyhow::Ok((agent.client().await?, agent))
    };
    let hurt = [
        ("the node's end of a pod", interface("near0", ""), just.clone()),
        ("the pod's own end", interface("far0", lab.far.name()), just.clone()),
        ("who shares its network", process(beside.pid()), just.clone()),
    ];
    for (args, why) in [
        (["--protect", "etcd"], "--protect etcd"),
        (["--pod-logs", &logs("kube-system")?], "of the namespace kube-system, which is protected"),
    ] {
        let (mut client, _agent) = agent(&args).await?;
        for (what, target, fault) in hurt.clone() {
            let refused = inject(&mut client, request("x", target, fault)).await;
            let refused = refused.err().with_context(|| format!("{what} is cut off"))?;
            ensure!(refused.starts_with("target: ") && refused.contains(why), "{what}: {refused}");
        }
        // By the way of somebody on the node.
        let refused = inject(&mut client, request("x", process(shop.pid()), all.clone())).await;
        let refused = refused.err().context("its end is cut off by the way")?;
        ensure!(
            refused.contains("network.interface: near0: ") && refused.contains("the target"),
            "{refused}"
        );
    }
    // Where it is nobody special, and on the node's other interfaces.
    let (mut client, _agent) = agent(&["--pod-logs", &logs("web")?]).await?;
    for (n, (what, target, fault)) in hurt.into_iter().enumerate() {
        let id = format!("fine-{n}");
        let injected = inject(&mut client, request(&id, target, fault)).await.map_err(anyhow::Error::msg);
        let injected = injected.with_context(|| what.to_owned())?;
        ensure!(injected.state() == State::Active && injected.pods == [uid.as_str()], "{what}: {injected:?}");
    }
    let (mut client, _agent) = agent(&["--protect", "etcd"]).await?;
    let injected = inject(&mut client, request("lo", interface("lo", ""), just)).await;
    ensure!(injected.map_err(anyhow::Error::msg)?.state() == State::Active);
    Ok(())
}

/// As docker-proxy, which is in the cgroup of dockerd.
#[tokio::test(flavor = "multi_thread")]
async fn whose_sockets_go_by_the_same_cgroup_is_hurt_with_the_target() -> Result<()> {
    let lab = Lab::new("bounds")?;
    let [shared, own] = [Unified::new(&unique("shared"))?, Unified::new(&unique("own"))?];
    let start =
        |name, cgroup: &Unified| Named::start_by(name, &|program| cgroup.wrap(&lab.near.command(program)));
    let (_dockerd, proxy, shop) =
        (start("dockerd", &shared)?, start("proxy", &shared)?, start("shop", &own)?);
    let agent = Agent::start(AgentOptions { netns: Some(&lab.near), ..AgentOptions::default() }).await?;
    let mut client = agent.client().await?;
    let refused = inject(&mut client, request("x", process(proxy.pid()), loss())).await;
    let refused = refused.err().context("the sockets of dockerd are cut off")?;
    ensure!(refused.starts_with("target: ") && refused.contains("would hurt dockerd"), "{refused}");
    let injected = inject(&mut client, request("y", process(shop.pid()), loss())).await;
    ensure!(injected.map_err(anyhow::Error::msg)?.state() == State::Active);
    Ok(())
}

/// As where somebody else runs the API server: it is at 443, and so are others.
#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_is_not_cut_off_from_an_api_server_at_443() -> Result<()> {
    let lab = Lab::new("bounds")?;
    let listeners = [443, 7000].map(|port| lab.far.listen(port)).into_iter().collect::<Result<Vec<_>>>()?;
    let connects = |to, port| -> Result<bool> {
        Ok(lab.near.connect(SocketAddr::new(to, port), Duration::from_millis(700))?.is_ok())
    };
    let dir = tempfile::tempdir()?;
    let kubelet = dir.path().join("kubelet");
    fs::copy(stdout(Command::new("sh").args(["-c", "command -v bash"]))?.trim(), &kubelet)?;
    let cgroup = Unified::new(&unique("kubelet"))?;
    let mut command = lab.near.command(&kubelet);
    command.args(["-c", &format!("exec 3<>/dev/tcp/{}/443; read -t 3600 <&3", Lab::FAR)]);
    let _kubelet = Running::start("a kubelet", &cgroup.wrap(&command))?;
    let (_connection, _) = listeners[0].accept()?;

    let agent = Agent::start(AgentOptions { netns: Some(&lab.near), ..AgentOptions::default() }).await?;
    let mut client = agent.client().await?;
    let peers = vec![cidr("10.99.0.0/24")];
    let fault = NetworkFault { partition: true, peers, ..NetworkFault::default() };
    let cut = |unprotected| Fault {
        kind: Some(fault::Kind::Network(NetworkFault { unprotected, ..fault.clone() })),
    };
    let injected = inject(&mut client, request("x", interface("near0", ""), cut(false))).await;
    ensure!(injected.map_err(anyhow::Error::msg)?.state() == State::Active);
    ensure!(connects(Lab::FAR, 443)?, "the API server is cut off");
    ensure!(!connects(Lab::FAR, 7000)? && !connects(Lab::FAR_OTHER, 443)?, "others are not");
    client.update(UpdateRequest { id: "x".to_owned(), fault: Some(cut(true)) }).await?;
    ensure!(!connects(Lab::FAR, 443)?, "it is asked for");
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

/// Pods as the kubelet makes them, in cgroups below one of the test's own. Each process is called by the same name.
struct Kubelet {
    // Dropped first, so that the cgroups are empty.
    containers: Vec<(Running, usize, String)>,
    cgroup: Cgroup,
    dir: tempfile::TempDir,
}

const PODS: usize = 4;

impl Kubelet {
    /// Four pods, of which the first has two containers and the last is of kube-system.
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let cgroup = Cgroup::new(unique("bounds"))?;
        let mut kubelet = Self { containers: Vec::new(), cgroup, dir };
        fs::copy(stdout(Command::new("sh").args(["-c", "command -v sleep"]))?.trim(), kubelet.exe())?;
        for (pod, place) in [
            (0, "kubepods/burstable/podUID/app"),
            (0, "kubepods/burstable/podUID/sidecar"),
            (1, "kubepods/podUID/app"),
            (
                2,
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID.slice/cri-containerd-app.scope",
            ),
            (3, "kubepods.slice/kubepods-podUID.slice/cri-containerd-app.scope"),
        ] {
            let uid = Self::uid(pod);
            let uid = if place.contains(".slice") { uid.replace('-', "_") } else { uid };
            let place = place.replace("UID", &uid);
            let mut command = Command::new(kubelet.exe());
            command.arg("3600");
            let process = Running::start("a container", &kubelet.cgroup.wrap_below(&place, &command)?)?;
            wait_for("the container in its cgroup", SOON, || {
                let exe = fs::read_link(Path::new("/proc").join(process.pid().to_string()).join("exe"));
                Ok(exe.is_ok_and(|exe| exe == kubelet.exe()).then_some(()))
            })?;
            kubelet.containers.push((process, pod, place));
        }
        for (pod, namespace) in ["shop", "shop", "shop", "kube-system"].into_iter().enumerate() {
            let name = format!("{namespace}_some-pod_{}", Self::uid(pod));
            fs::create_dir_all(kubelet.logs().join(name))?;
        }
        Ok(kubelet)
    }

    fn uid(pod: usize) -> String {
        format!("0b5ec1f2-6d1a-4c57-9d0e-5f6f3c2a1b{pod:02}")
    }

    fn exe(&self) -> PathBuf {
        self.dir.path().join("replica")
    }

    fn logs(&self) -> PathBuf {
        self.dir.path().join("pods")
    }

    /// The container of a place in the list.
    fn container(&self, n: usize) -> Target {
        process(self.containers[n].0.pid())
    }

    /// The pods in whose cgroups something else runs than what the test put there.
    fn hurt(&self) -> Result<Vec<usize>> {
        let mut hurt = Vec::new();
        for (process, pod, place) in &self.containers {
            if self.cgroup.processes_below(place)? != [process.pid().cast_signed()] {
                hurt.push(*pod);
            }
        }
        hurt.dedup();
        Ok(hurt)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_of_the_nodes_pods_are_hurt_than_the_agent_allows() -> Result<()> {
    need_root()?;
    let kubelet = Kubelet::start()?;
    let logs = kubelet.logs().display().to_string();
    let args = ["--most-pods", "50%", "--pod-logs", &logs, "--protect-namespace", "shop-2"];
    let agent = Agent::start(AgentOptions { args: &args, ..AgentOptions::default() }).await?;
    let mut client = agent.client().await?;
    let ask = |id: &str, n: usize| request(id, kubelet.container(n), cpu());

    let refused = inject(&mut client, ask("system", 4)).await.expect_err("it is of kube-system");
    ensure!(refused.contains("of the namespace kube-system, which is protected"), "{refused}");
    let all = request("all", cgroup(&format!("{}/kubepods.slice", kubelet.cgroup.path())), cpu());
    let refused = inject(&mut client, all).await.expect_err("one of them is of kube-system");
    ensure!(refused.contains("kube-system"), "{refused}");
    ensure!(kubelet.hurt()?.is_empty(), "{:?}", kubelet.hurt()?);

    // Two of four pods, one of them in both of its containers.
    for n in 0..3 {
        let injected = inject(&mut client, ask(&format!("pod-{n}"), n)).await.map_err(anyhow::Error::msg)?;
        ensure!(injected.state() == State::Active && injected.pods_there as usize == PODS, "{injected:?}");
        ensure!(injected.pods == [Kubelet::uid(kubelet.containers[n].1)], "{injected:?}");
    }
    ensure!(kubelet.hurt()? == [0, 1], "{:?}", kubelet.hurt()?);
    let refused = inject(&mut client, ask("third", 3)).await.expect_err("a third pod");
    let why = "3 of this node's 4 pods would be hurt at once, and --most-pods 50% allows 2; take fewer";
    ensure!(refused.starts_with("target: ") && refused.contains(why), "{refused}");
    ensure!(
        kubelet.hurt()? == [0, 1] && client.list(ListRequest {}).await?.into_inner().injections.len() == 3
    );

    client.revert(RevertRequest { ids: vec!["pod-2".to_owned()], all: false }).await?;
    let injected = inject(&mut client, ask("third", 3)).await.map_err(anyhow::Error::msg)?;
    ensure!(injected.state() == State::Active && kubelet.hurt()? == [0, 2], "{:?}", kubelet.hurt()?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn some_of_the_replicas_are_chosen_and_no_others_are_hurt() -> Result<()> {
    need_root()?;
    let kubelet = Kubelet::start()?;
    let exe = kubelet.exe().display().to_string();
    // Where the namespaces are not known none of them is protected.
    let nowhere = kubelet.dir.path().join("nowhere").display().to_string();
    let args = ["--pod-logs", &nowhere, "--zone", "north"];
    let agent = Agent::start(AgentOptions { args: &args, ..AgentOptions::default() }).await?;
    let mut client = agent.client().await?;
    let here = format!("unix://{}", agent.socket().display());
    let runs = kubelet.dir.path().join("runs");
    let squall = |args: &[&str]| -> Result<(Option<i32>, String)> {
        let mut command = Command::new(bin_dir().join("squall"));
        let output = command.args(args).args(["--agents", &here, "--runs"]).arg(&runs).output()?;
        Ok((output.status.code(), said(&output)))
    };
    let chosen = |seed: &str, how: &str| {
        let line = ["inject", "cpu", "--exe", &exe, "--load", "10%", "--for", "240s", "--replicas", "50%"];
        squall(&[&line[..], &["--replicas-seed", seed, how]].concat())
    };

    let mut ever = Vec::new();
    for seed in ["1", "2", "3", "4", "5", "6"] {
        let (code, planned) = chosen(seed, "--dry-run")?;
        ensure!(code == Some(0) && kubelet.hurt()?.is_empty(), "{planned}");
        ensure!(planned.contains(&format!("chosen   2 of 4 replicas by seed {seed}")), "{planned}");
        let (code, text) = chosen(seed, "--detach")?;
        ensure!(code == Some(0), "{text}");
        let hurt = kubelet.hurt()?;
        ensure!(hurt.len() == 2, "{hurt:?}\n{text}");
        for (process, pod, _) in &kubelet.containers {
            let named = planned.contains(&format!("replica pid {}  ", process.pid()));
            ensure!(named == hurt.contains(pod), "{hurt:?}\n{planned}");
        }
        client.revert(RevertRequest { ids: vec![], all: true }).await?;
        ensure!(kubelet.hurt()?.is_empty());
        ever.push(hurt);
    }
    ever.sort();
    ever.dedup();
    ensure!(ever.len() > 1, "every seed chooses {ever:?}");

    let plan = |limits: &str, replicas: &str| -> Result<String> {
        let text = format!(
            "apiVersion: squall.dev/v1\nkind: Plan\nmetadata: {{ name: some }}\nseed: 3\n\
             targets: {{ web: {{ process: {{ exe: {exe} }} }} }}\n\
             rounds:\n  - name: busy\n    baseline: 1s\n    hold: 2s\n    recovery: 1s\n    \
             faults: [ {{ cpu: {{ on: web, replicas: {replicas}, load: 10% }} }} ]\n    \
             gates: [ {{ oom: {{ target: web }} }} ]\nlimits: {{ {limits} }}\n"
        );
        let path = kubelet.dir.path().join("plan.yaml");
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    for (limits, replicas, why) in [
        (
            "replicas: 25%",
            "2",
            "of `web` would be hurt 2 of 4 replicas at once (50%), and 25% may be, which is 1",
        ),
        ("pods: 25%", "50%", "would be hurt 2 of 4 pods at once (50%), and 25% may be, which is 1"),
        ("zone: 50%", "1", "in the zone north would be hurt 1 of 1 node at once (100%)"),
        ("replicas: 50%", "5", "there are only 4 replicas"),
        ("replicas: 50%", "24%", "of 4 replicas that is none"),
    ] {
        let plan = plan(limits, replicas)?;
        for command in ["check", "run"] {
            let (code, text) = squall(&[command, &plan])?;
            ensure!(code == Some(2) && text.contains(why), "{limits}: {command}: {code:?}\n{text}");
        }
        ensure!(kubelet.hurt()?.is_empty());
    }

    // What a check shows is who a run hurts.
    let plan = plan("replicas: 50%, pods: 50%, zone: 100%", "50%")?;
    let (code, checked) = squall(&["check", &plan])?;
    ensure!(code == Some(0) && checked.contains("chosen  2 of 4 replicas by seed 3"), "{code:?}\n{checked}");
    let (_, text) = squall(&["run", &plan])?;
    let run = fs::read_dir(&runs)?.map(|run| Ok(run?.path())).collect::<Result<Vec<_>>>()?;
    let newest = run.iter().max_by_key(|run| fs::metadata(run).and_then(|m| m.modified()).ok());
    let events = fs::read_to_string(newest.context("no run")?.join("events.jsonl"))?;
    ensure!(events.contains("chosen 2 of 4 replicas by seed 3: "), "{events}\n{text}");
    let injected: Vec<&str> = events.lines().filter(|line| line.contains("\"event\":\"injected\"")).collect();
    for (process, _, _) in &kubelet.containers {
        let name = format!("replica pid {}", process.pid());
        let by_cpu = |text: &str| text.contains(&format!("{name}  by "));
        let was = injected.iter().any(|line| line.contains(&format!("{name}\"")));
        ensure!(was == by_cpu(&checked), "{name}:\n{checked}\n{injected:#?}");
    }
    ensure!(!injected.is_empty() && kubelet.hurt()?.is_empty(), "{events}");

    // Of an agent without a zone it is not known what share of one it is.
    drop(agent);
    let agent = Agent::start(AgentOptions { args: &args[..2], ..AgentOptions::default() }).await?;
    let here = format!("unix://{}", agent.socket().display());
    let output = Command::new(bin_dir().join("squall")).args(["check", &plan, "--agents", &here]).output()?;
    let text = said(&output);
    ensure!(
        output.status.code() == Some(2) && text.contains("start the agents there with --zone NAME"),
        "{text}"
    );
    Ok(())
}
