//! The demo: a shop in namespaces of its own, a plan of five rounds, a verdict, and nothing left behind.

use std::{
    collections::BTreeSet,
    fs,
    future::ready,
    path::{Path, PathBuf},
    process::{ExitCode, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use squall_lab::{HostState, Shop, ShopOptions, need_root, sweep};
use tokio::{
    process::{Child, Command},
    runtime,
    signal::unix::{SignalKind, signal},
    time::timeout,
};

use crate::{builds, setup, workspace};

/// Memory limit of the recommender.
const MEMORY: u64 = 256 << 20;
/// CPUs that the recommender may use.
const CPUS: f64 = 1.0;
/// How the plan names the recommender; replaced by the name of the shop.
const NAME_IN_PLAN: &str = "squall-demo";
/// Longest time for the controller to end its faults after a signal.
const GRACE: Duration = Duration::from_secs(40);
/// Exit code where a person stopped it.
const ABORTED: u8 = 4;
/// Exit code for a host that is not as before: our own failure, never a verdict.
pub(crate) const OURS: u8 = 5;

/// How the demo runs.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Take a defence of the recommender away, so that a gate has something to catch.
    #[arg(long, value_enum)]
    defect: Option<Defect>,
    /// Where the reports go; by default runs/ in the workspace.
    #[arg(long, value_name = "DIR")]
    keep_runs: Option<PathBuf>,
}

/// A defence that is missing.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Defect {
    /// Tasks that never end.
    Leak,
    /// Redis is waited for as long as it takes.
    NoTimeout,
    /// An error from Redis becomes a status 500.
    NoFallback,
    /// Memory that is never given back.
    Balloon,
}

/// Runs the demo; the exit code is the verdict's.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    need_root()?;
    setup::ensure(setup::DEMO)?;
    let binaries = builds::release()?;
    for line in sweep()? {
        println!("left behind by an earlier lab, now removed: {line}");
    }
    let started = Instant::now();
    let runs = options.keep_runs.clone().unwrap_or_else(|| workspace().join("runs"));
    fs::create_dir_all(&runs)?;
    let known = entries(&runs)?;

    let before = HostState::capture(&binaries)?;
    // One thread for everything: a process that the kernel ties to its parent is tied to the thread that started it.
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(play(options, &binaries, &runs));
    let changes = before.changes(&HostState::capture(&binaries)?);

    println!();
    if changes.is_empty() {
        println!("left behind: nothing (ip netns, ip link, tc qdisc, cgroups, /sys/fs/bpf, processes)");
    } else {
        println!("left behind:");
        for line in &changes {
            println!("  {line}");
        }
    }
    let code = outcome?;
    for run in entries(&runs)?.difference(&known) {
        println!("report: {}", runs.join(run).join("report.html").display());
    }
    let meaning = match code {
        0 => "promote",
        1 => "block",
        2 => "the plan is wrong",
        3 => "inconclusive",
        4 => "aborted",
        _ => "a failure of squall itself",
    };
    println!("demo: {meaning} after {:.0?}, exit {code}", started.elapsed());
    Ok(ExitCode::from(if changes.is_empty() { code } else { OURS }))
}

/// Opens the shop, runs the plan against it, closes the shop. Returns the controller's exit code.
async fn play(options: &Options, binaries: &Path, runs: &Path) -> Result<u8> {
    let defect = options.defect.and_then(|defect| defect.to_possible_value());
    let defect = defect.map(|value| value.get_name().to_owned());
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shop = Shop::open(&ShopOptions {
        tag: "demo".into(),
        binaries: binaries.to_owned(),
        defect: defect.clone(),
        memory: MEMORY,
        cpus: CPUS,
    })?;
    println!(
        "the shop is open: {}, with {}",
        shop.name(),
        defect.map_or_else(|| "no known defect".to_owned(), |defect| format!("the defect {defect}"))
    );
    let plan = shop.dir().join("demo.yaml");
    fs::write(&plan, plan_for(&shop)?)?;
    tokio::select! {
        biased;
        _ = interrupt.recv() => return Ok(ABORTED),
        _ = terminate.recv() => return Ok(ABORTED),
        () = ready(()) => {}
    }
    let mut controller = start(&shop, binaries, &plan, runs)?;
    let status = tokio::select! {
        status = controller.wait() => status?,
        // Ctrl-C in a terminal goes to the controller as well, which takes its faults back and ends; SIGTERM does not.
        _ = interrupt.recv() => finish(&mut controller, None).await?,
        _ = terminate.recv() => finish(&mut controller, Some(Signal::SIGTERM)).await?,
    };
    drop(shop);
    exit_code(status)
}

fn plan_for(shop: &Shop) -> Result<String> {
    let path = workspace().join("tests/e2e/demo.yaml");
    let plan = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    if !plan.contains(NAME_IN_PLAN) {
        bail!("{} does not name {NAME_IN_PLAN}", path.display());
    }
    Ok(plan.replace(NAME_IN_PLAN, shop.name()))
}

/// Starts the controller in the client's namespace, with an agent of its own.
fn start(shop: &Shop, binaries: &Path, plan: &Path, runs: &Path) -> Result<Child> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--", "nsenter"]);
    command.arg(format!("--net={}", shop.client().path().display()));
    command.arg(binaries.join("squall")).arg("run").arg(plan).arg("--runs").arg(runs);
    command.env("SQUALL_SOCKET", shop.dir().join("agent.sock"));
    command.env("SQUALL_STATE_DIR", shop.dir().join("state"));
    command.env("SQUALL_AGENT", binaries.join("squall-agent"));
    command.kill_on_drop(true).spawn().context("cannot start the controller")
}

/// Waits until the controller has taken its faults back.
async fn finish(controller: &mut Child, send: Option<Signal>) -> Result<ExitStatus> {
    if let (Some(signal), Some(pid)) = (send, controller.id()) {
        kill(Pid::from_raw(pid.cast_signed()), signal).context("cannot stop the controller")?;
    }
    if let Ok(status) = timeout(GRACE, controller.wait()).await {
        return Ok(status?);
    }
    controller.kill().await?;
    bail!("the controller did not end within {GRACE:?} and was killed");
}

fn exit_code(status: ExitStatus) -> Result<u8> {
    let code = status.code().with_context(|| format!("the controller did not exit: {status}"))?;
    Ok(u8::try_from(code)?)
}

fn entries(dir: &Path) -> Result<BTreeSet<PathBuf>> {
    fs::read_dir(dir)?.map(|entry| Ok(PathBuf::from(entry?.file_name()))).collect()
}
