//! Least privilege: with the capabilities of the table in README.md and the system calls of deploy/seccomp.json everything works, and
//! where one is missing the refusal names it.

use std::{collections::BTreeMap, fs, process::Command, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::Value;
use squall_proto::v1::{
    ArmRequest, CpuFault, Delay, DescribeRequest, Direction, Fault, Injection, MemoryFault, NetworkFault,
    ProcessSelector, RevertRequest, State, Target, fault, memory_fault, target,
};
use squall_tests::{
    Agent, AgentOptions, Cgroup, Lab, Running, Sockets, cidr, delay, interface, need_root, unique, wait_for,
};
use syscalls::Sysno;

const MIB: u64 = 1 << 20;
/// Nobody's: a process of another user shows what of it may be seen.
const NOBODY: u32 = 65534;
const FIRST: &str = "/proc/1/ns/cgroup";
/// The table: what each fault needs.
const TABLE: [(&str, &[&str]); 3] = [
    ("network", &["sys_admin", "net_admin", "sys_ptrace"]),
    ("cpu", &["sys_ptrace"]),
    ("memory", &["sys_ptrace", "ipc_lock"]),
];

fn all() -> Vec<&'static str> {
    let mut all: Vec<_> = TABLE.iter().flat_map(|(_, needs)| *needs).copied().collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// setpriv with these capabilities and no others.
fn only(capabilities: &[&str]) -> Vec<String> {
    let bounding = capabilities.iter().fold("--bounding-set=-all".to_owned(), |set, name| set + ",+" + name);
    ["setpriv".to_owned(), "--no-new-privs".to_owned(), "--inh-caps=-all".to_owned(), bounding].into()
}

/// As a container is that is not privileged: in a cgroup of its own, which a cgroup namespace of its own shows it as the root.
fn contained(cgroup: &Cgroup, under: &[String]) -> Vec<String> {
    let mut command = Command::new("unshare");
    command.arg("--cgroup").args(under);
    let inside = cgroup.wrap(&command);
    [inside.get_program()]
        .into_iter()
        .chain(inside.get_args())
        .map(|word| word.to_string_lossy().into())
        .collect()
}

/// The system calls that deploy/seccomp.json allows, as a filter.
fn filter() -> Result<BpfProgram> {
    let profile: Value = serde_json::from_str(include_str!("../../deploy/seccomp.json"))?;
    ensure!(profile["defaultAction"] == "SCMP_ACT_ERRNO", "{profile}");
    let groups = profile["syscalls"].as_array().context("no syscalls")?;
    let names = groups.iter().flat_map(|group| group["names"].as_array().into_iter().flatten());
    // Some are of other architectures.
    let numbers = names.filter_map(|name| name.as_str()?.parse::<Sysno>().ok());
    let rules: BTreeMap<i64, _> = numbers.map(|number| (i64::from(number.id()), Vec::new())).collect();
    ensure!(rules.len() > 200, "only {} system calls", rules.len());
    let (refuse, allow) = (SeccompAction::Errno(1), SeccompAction::Allow);
    Ok(SeccompFilter::new(rules, refuse, allow, std::env::consts::ARCH.try_into()?)?.try_into()?)
}

/// Does something on a thread that the filter is for, and whatever it starts.
fn filtered(work: impl Future<Output = Result<()>> + Send) -> Result<()> {
    let filter = filter()?;
    let work = || {
        seccompiler::apply_filter(&filter)?;
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
    };
    thread::scope(|scope| scope.spawn(work).join().expect("no panic"))
}

fn faults() -> [(&'static str, Fault); 4] {
    let network = |network| Fault { kind: Some(fault::Kind::Network(network)) };
    let partition = NetworkFault { partition: true, ..NetworkFault::default() };
    let delay = NetworkFault {
        direction: Direction::Egress.into(),
        delay: Some(Delay { latency_ns: 80_000_000, ..Delay::default() }),
        ..NetworkFault::default()
    };
    let cpu = CpuFault { load: 0.3, workers: 1 };
    let memory = MemoryFault { size: Some(memory_fault::Size::Bytes(48 * MIB)), ramp_ns: 0 };
    [
        ("network", network(partition)),
        ("network", network(delay)),
        ("cpu", Fault { kind: Some(fault::Kind::Cpu(cpu)) }),
        ("memory", Fault { kind: Some(fault::Kind::Memory(memory)) }),
    ]
}

async fn inject(agent: &Agent, id: &str, pid: u32, fault: Fault) -> Result<Injection, tonic::Status> {
    let process = ProcessSelector { pid, ..ProcessSelector::default() };
    let request = ArmRequest {
        id: id.to_owned(),
        target: Some(Target { kind: Some(target::Kind::Process(process)) }),
        fault: Some(fault),
        duration_ns: 300_000_000_000,
        lease_ns: 120_000_000_000,
        dry_run: false,
        only: Vec::new(),
    };
    let mut client = agent.client().await.map_err(|e| tonic::Status::internal(e.to_string()))?;
    let injected = client.inject(request).await?.into_inner().injections.pop();
    injected.ok_or_else(|| tonic::Status::internal("no injection"))
}

/// Somebody else's process, in a network namespace and a cgroup of its own.
fn victim(lab: &Lab, cgroup: &Cgroup) -> Result<Running> {
    let mut command = lab.near.command("setpriv");
    command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".to_owned()]);
    let process = Running::start("a victim", &cgroup.wrap(command.args(["sleep", "3600"])))?;
    wait_for("the victim", Duration::from_secs(10), || {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
        Ok((status.starts_with("Name:\tsleep\n") && status.contains("Uid:\t65534")).then_some(()))
    })?;
    Ok(process)
}

#[test]
fn with_the_tables_capabilities_and_the_filters_system_calls_everything_works() -> Result<()> {
    need_root()?;
    let (lab, cgroup) = (Lab::new("privilege")?, Cgroup::new(unique("privilege"))?);
    cgroup.limit_memory(256 * MIB)?;
    let victim = victim(&lab, &cgroup)?;
    let container = Cgroup::new(unique("container"))?;
    let before = lab.near.state()?;
    let first = fs::read_link(FIRST);
    filtered(async {
        let under = only(&all());
        // Where nobody may look at process 1, no agent can enter its namespace: a sandbox; a node's root may.
        let under = if first.is_ok() { contained(&container, &under) } else { under };
        let under: Vec<&str> = under.iter().map(String::as_str).collect();
        let agent = Agent::start(AgentOptions { under: &under, ..AgentOptions::default() }).await?;
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
        ensure!(status.contains("\nSeccomp:\t2\n") && status.contains("\nNoNewPrivs:\t1\n"), "{status}");
        ensure!(status.contains("\nCapEff:\t0000000000285000\n"), "{status}");
        if let Ok(first) = &first {
            let own = fs::read_link(format!("/proc/{}/ns/cgroup", agent.pid()))?;
            ensure!(own == *first, "it is in {own:?}, the node in {first:?}");
        }
        let mut client = agent.client().await?;
        let about = client.describe(DescribeRequest::default()).await?.into_inner();
        for fault in &about.faults {
            let missing: Vec<_> = fault.features.iter().filter(|feature| !feature.available).collect();
            ensure!(fault.available && missing.is_empty(), "{fault:?}");
        }
        for (n, (kind, fault)) in faults().into_iter().enumerate() {
            let injected = inject(&agent, &format!("p{n}"), victim.pid(), fault).await?;
            ensure!(injected.state() == State::Active, "{injected:?}");
            match n {
                0 => {
                    let ping = lab.near.ping(Lab::FAR, 5, Duration::from_millis(50))?;
                    ensure!(ping.loss() == 1.0, "{ping:?}");
                }
                1 => {
                    let ping = lab.near.ping(Lab::FAR, 5, Duration::from_millis(50))?;
                    ensure!(ping.median()? > 75.0, "{ping:?}");
                }
                2 => {
                    let cpus = cgroup.cpus(Duration::from_secs(2))?;
                    ensure!(cpus > 0.05, "the cgroup uses {cpus} CPUs");
                }
                _ => wait_for("the memory", Duration::from_secs(30), || {
                    Ok((cgroup.memory()? > 48 * MIB).then_some(()))
                })?,
            }
            let request = RevertRequest { ids: vec![format!("p{n}")], all: false };
            let reverted = client.revert(request).await?.into_inner().injections;
            ensure!(reverted.iter().all(|i| i.state() == State::Reverted), "{kind}: {reverted:?}");
            ensure!(cgroup.processes()?.len() == 1, "{kind}: a stressor is left");
        }
        Ok(())
    })?;
    assert_eq!(before.changes(&lab.near.state()?), [""; 0]);
    Ok(())
}

/// A container that is not privileged has /proc/sys, and cannot write there.
#[tokio::test(flavor = "multi_thread")]
async fn delay_on_loopback_works_where_proc_sys_is_read_only() -> Result<()> {
    need_root()?;
    let lab = Lab::new("privilege")?;
    let before = lab.near.state()?;
    let read_only =
        "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$0\" \"$@\"";
    let mut under = vec!["unshare", "--mount", "sh", "-c", read_only];
    let only = only(&all());
    under.extend(only.iter().map(String::as_str));
    let mut agent = Agent::start(AgentOptions { under: &under, ..AgentOptions::default() }).await?;
    ensure!(
        fs::read_to_string(format!("/proc/{}/mounts", agent.pid()))?.contains(" /proc/sys proc ro,"),
        "it is not read-only"
    );
    let request = ArmRequest {
        id: "loopback".into(),
        target: Some(interface("lo", lab.near.name())),
        fault: Some(Fault {
            kind: Some(fault::Kind::Network(delay(50, Direction::Egress, vec![cidr("127.0.0.0/8")]))),
        }),
        duration_ns: 300_000_000_000,
        lease_ns: 120_000_000_000,
        dry_run: false,
        only: Vec::new(),
    };
    let injected = agent.client().await?.inject(request).await?.into_inner().injections;
    ensure!(injected[0].state() == State::Active, "{injected:?}");
    let rtt = lab.near.rtt_with("127.0.0.1")?;
    ensure!(rtt > 99.0, "{rtt} ms");
    ensure!(agent.terminate()?.success(), "{}", agent.log());
    assert_eq!(before.changes(&lab.near.state()?), [""; 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_named() -> Result<()> {
    need_root()?;
    let (lab, cgroup) = (Lab::new("privilege")?, Cgroup::new(unique("privilege"))?);
    let victim = victim(&lab, &cgroup)?;
    for missing in all() {
        let kept: Vec<_> = all().into_iter().filter(|name| *name != missing).collect();
        let under = only(&kept);
        let under: Vec<&str> = under.iter().map(String::as_str).collect();
        let agent = Agent::start(AgentOptions { under: &under, ..AgentOptions::default() }).await?;
        let about = agent.client().await?.describe(DescribeRequest::default()).await?.into_inner();
        let name = format!("CAP_{}", missing.to_uppercase());
        for (kind, needs) in TABLE {
            let support = about.faults.iter().find(|fault| fault.kind == kind).context(kind)?;
            let needed = needs.contains(&missing);
            ensure!(support.available != needed, "{kind} without {name}: {support:?}");
            ensure!(support.reason.contains(&name) == needed, "{kind} without {name}: {support:?}");
        }
        for (kind, fault) in faults() {
            let needs = TABLE.iter().find(|(known, _)| *known == kind).context(kind)?.1;
            if needs.contains(&missing) {
                let refused = inject(&agent, "p", victim.pid(), fault).await.expect_err("it cannot work");
                ensure!(refused.message().contains(&name), "{kind} without {name}: {refused}");
            }
        }
        ensure!(cgroup.processes()?.len() == 1, "something was done without {name}");
    }
    Ok(())
}

#[test]
fn what_is_deployed_is_what_the_table_says() -> Result<()> {
    let sorted = |names: &str| {
        let mut names: Vec<String> = names
            .split([' ', ',', '[', ']'])
            .filter(|name| !name.is_empty())
            .map(|name| name.trim_start_matches("CAP_").to_lowercase())
            .collect();
        names.sort();
        names
    };
    let unit = include_str!("../../deploy/squall-agent.service");
    let set = include_str!("../../deploy/daemonset.yaml");
    for (text, field) in [(unit, "CapabilityBoundingSet="), (set, "add: ")] {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(field)).context(field)?;
        assert_eq!(sorted(line), all(), "{field}");
    }
    let readme = include_str!("../../README.md");
    for (kind, needs) in TABLE {
        let row = readme.lines().find(|line| line.starts_with(&format!("| {kind} | `CAP_"))).context(kind)?;
        for name in needs {
            ensure!(row.contains(&format!("`CAP_{}`", name.to_uppercase())), "{row}: no {name}");
        }
    }
    Ok(())
}
