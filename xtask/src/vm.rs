//! The privileged tests on other kernels, in QEMU without KVM (which hangs where the host is itself nested).

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use squall_lab::Running;

use crate::{
    builds::{self, BINARIES, CRASH},
    initramfs::Initramfs,
    kernel::Kernel,
    setup,
    suite::{self, Counts, Said},
    target_dir, tools,
};

/// Modules that the faults and their tests need, where the kernel has them as modules.
const MODULES: [&str; 20] = [
    "veth",
    "tcp_diag",
    "udp_diag",
    "8021q",
    "ifb",
    "dummy",
    "tun",
    "sch_ingress",
    "cls_bpf",
    "cls_matchall",
    "act_bpf",
    "act_mirred",
    "act_police",
    "sch_fq",
    "sch_fq_codel",
    "sch_netem",
    "sch_htb",
    "sch_tbf",
    "sch_prio",
    "tcp_bbr",
];
/// Programs that the tests call.
const TOOLS: [&str; 11] =
    ["sh", "ip", "tc", "ethtool", "ping", "iperf3", "mount", "nsenter", "setpriv", "sleep", "unshare"];
/// What a test may be told by its environment.
const FROM_HERE: [&str; 3] = ["SQUALL_SWEEP", "SQUALL_SCENARIOS", "SQUALL_SEED"];
/// Tests that are not for every day without KVM: those that take long there (an agent that starts hundreds of times, thousands of
/// connections, bulk), those of what is the same on every kernel, and what is judged by how much CPU there is.
const RARE: [&str; 11] = [
    "answers",
    "bounds",
    "crash",
    "demo",
    "hostile",
    "journal",
    "lab",
    "safety",
    "sequences",
    "tokens",
    "upgrade",
];
/// How often a kernel is started that panics before anything runs. Seen once, on 7.2 beside builds: a CPU ran into code that another
/// was patching, most likely since QEMU without KVM does not order that as a machine does.
const MOST_BOOTS: u32 = 3;
/// What a kernel that gave up says.
const PANIC: &str = "Kernel panic - not syncing";

/// What to run in a VM.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Series of kernels, such as 6.1.
    #[arg(required = true)]
    kernels: Vec<String>,
    /// A command to run instead of the tests. May be given more than once.
    #[arg(long)]
    cmd: Vec<String>,
    /// Only the tests whose name contains this.
    #[arg(long)]
    filter: Option<String>,
    /// Longest time for one VM, minutes.
    #[arg(long, default_value_t = 30)]
    minutes: u64,
}

/// What is put into a VM beside the binaries, and run there.
#[derive(Debug, Default)]
pub(crate) struct Job {
    /// Programs: where they go, and where they are.
    pub(crate) programs: Vec<(PathBuf, PathBuf)>,
    /// Commands, run one after the other.
    pub(crate) commands: Vec<String>,
    /// Longest time, minutes.
    pub(crate) minutes: u64,
    /// Whether the VM has one CPU whose clocks count its instructions, two nanoseconds each, in place of two CPUs and the host's time: what
    /// takes time then takes the same time in every run, whatever else the host does.
    pub(crate) icount: bool,
}

/// Boots each kernel in turn. Fails if anything failed on any of them.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    setup::ensure(setup::ALL)?;
    let binaries = builds::for_tests()?;
    let mut job = tests(&suite::privileged()?, options.filter.as_deref().unwrap_or_default(), &binaries)?;
    job.minutes = options.minutes;
    if !options.cmd.is_empty() {
        job.commands.clone_from(&options.cmd);
    }
    let mut failed = Vec::new();
    for kernel in &options.kernels {
        if !boot(kernel, &binaries, &job, |_| {})? {
            failed.push(kernel.as_str());
        }
    }
    if failed.is_empty() {
        println!("vm: ok on {}", options.kernels.join(", "));
        return Ok(ExitCode::SUCCESS);
    }
    println!("vm: FAILED on {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

/// Runs the privileged tests on one kernel, without those that are rare there; whether all passed.
pub(crate) fn test(
    kernel: &str,
    binaries: &Path,
    total: &mut Counts,
    unsteady: &mut Vec<String>,
) -> Result<bool> {
    let names: Vec<String> =
        suite::privileged()?.into_iter().filter(|name| !RARE.contains(&name.as_str())).collect();
    let mut job = tests(&names, "", binaries)?;
    let hear = |job: &Job| {
        let mut said = Said::default();
        let ok = boot(kernel, binaries, job, |line| said.take(line))?;
        anyhow::Ok((ok, said))
    };
    let (ok, said) = hear(&job)?;
    said.judge(ok, total, unsteady, &format!("vm {kernel}"), |failed| {
        job.commands = failed.iter().map(|(file, test)| format!("/tests/{file} --exact {test}")).collect();
        hear(&job)
    })
}

/// Boots a kernel and runs a job. Shows what is said there, and hands each line over; whether no command failed.
pub(crate) fn boot(series: &str, binaries: &Path, job: &Job, mut each: impl FnMut(&str)) -> Result<bool> {
    let kernel = Kernel::fetch(series)?;
    println!("vm {series}: Linux {}", kernel.release());
    let archive = target_dir().join("vm").join(series).join("initramfs");
    fs::write(&archive, initramfs(&kernel, binaries, job)?.archive())?;
    let mut qemu = Command::new("qemu-system-x86_64");
    // Without "rep movsb", which QEMU does byte by byte, the kernel copies in larger pieces: twice the throughput of TCP.
    qemu.args(["-cpu", "max,-erms,-fsrm", "-m", "2048"]);
    qemu.args(if job.icount {
        // Where nothing is to be done, time leaps to what comes next.
        &["-accel", "tcg", "-smp", "1", "-icount", "shift=1,sleep=off", "-rtc", "clock=vm"][..]
    } else {
        &["-accel", "tcg,thread=multi", "-smp", "2"]
    });
    qemu.args(["-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&archive);
    // An oops is a panic, a panic is a reboot, and a reboot is the end. Without a word the kernel does not trust the TSC of
    // several CPUs (unsynchronized_tsc, arch/x86/kernel/tsc.c, 6.1), and reads the HPET, which QEMU emulates slowly and under
    // its one big lock: whoever reads the clock more often would then be slower here than on any machine.
    qemu.args(["-append", "console=ttyS0 quiet oops=panic panic=-1 tsc=reliable"]);
    for _ in 0..MOST_BOOTS {
        if let Some(ok) = watch(&qemu, Duration::from_secs(job.minutes * 60), &mut each)? {
            return Ok(ok);
        }
        println!("vm {series}: the kernel did not come up; once more");
    }
    bail!("the kernel did not come up in {MOST_BOOTS} attempts")
}

/// Shows what the VM says until it is off; whether its init reported no failure. `None` where the kernel panicked before anything
/// was run.
fn watch(qemu: &Command, most: Duration, each: &mut impl FnMut(&str)) -> Result<Option<bool>> {
    let mut vm = Running::start_with("qemu", qemu, Stdio::null(), Stdio::piped(), Stdio::inherit())?;
    let console = vm.child().stdout.take().context("a pipe was asked for")?;
    let (lines, said) = mpsc::channel();
    thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        // The console may say anything, so also what is no UTF-8.
        while console.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
    let end = Instant::now() + most;
    let (mut begun, mut reported) = (false, None);
    loop {
        match said.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                // The firmware would reset the terminal.
                if !line.contains('\x1b') {
                    println!("{line}");
                    std::io::stdout().flush()?;
                }
                each(&line);
                begun |= line.starts_with("==== ");
                if line.contains(PANIC) {
                    ensure!(!begun, "the kernel panicked");
                    return Ok(None);
                }
                if let Some(result) = line.strip_prefix("==== squall-init: ") {
                    reported = Some(result.starts_with("0 failed"));
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => bail!("the VM was not done after {most:?}"),
        }
    }
    vm.wait(Duration::from_secs(10))?;
    reported.map(Some).context("the VM ended before its init reported: it crashed, or did not boot")
}

fn initramfs(kernel: &Kernel, binaries: &Path, job: &Job) -> Result<Initramfs> {
    let mut initramfs = Initramfs::default();
    let mut lines: Vec<String> =
        ["env PATH=/bin", "env SQUALL_BIN_DIR=/squall", "env SQUALL_VM=1"].map(Into::into).into();
    for name in FROM_HERE {
        lines.extend(env::var(name).map(|value| format!("env {name}={value}")));
    }
    for (name, module) in kernel.modules(&MODULES)? {
        let path = format!("/modules/{name}.ko");
        lines.push(format!("module {path}"));
        initramfs.file(path, module);
    }
    for tool in TOOLS {
        initramfs.tool(tool)?;
    }
    // netem's tables of distributions, where tc looks for them.
    for dir in ["/usr/lib/x86_64-linux-gnu/tc", "/usr/lib/tc"] {
        for entry in fs::read_dir(dir).into_iter().flatten() {
            let path = entry?.path();
            if path.extension().is_some_and(|ext| ext == "dist") {
                let table = fs::read(&path)?;
                initramfs.file(path, table);
            }
        }
    }
    // The shop's Redis, see squall-lab.
    initramfs.program(
        "/usr/bin/redis-check-rdb",
        &tools::find("redis-check-rdb").context("no redis-check-rdb")?,
    )?;
    for binary in BINARIES {
        initramfs.program(Path::new("/squall").join(binary), &binaries.join(binary))?;
    }
    for (path, program) in &job.programs {
        initramfs.program(path, program)?;
    }
    let init =
        builds::executables(["build"].iter().chain(&tools::HOST_CRATES).chain(&["--bin", "squall-init"]))?;
    let [(_, init)] = &init[..] else { bail!("not one squall-init: {init:?}") };
    initramfs.program("/init", init)?;
    lines.extend(job.commands.iter().map(|command| format!("run {command}")));
    initramfs.file("/etc/vm", lines.join("\n").into_bytes());
    Ok(initramfs)
}

/// The tests of these files whose names contain `filter`.
fn tests(files: &[String], filter: &str, binaries: &Path) -> Result<Job> {
    let targets = files.iter().flat_map(|name| ["--test", name]);
    let build = ["test"].into_iter().chain(tools::HOST_CRATES).chain(["--no-run"]).chain(targets);
    let mut job = Job { minutes: 50, ..Job::default() };
    job.programs.push((Path::new("/squall").join(CRASH), binaries.join(CRASH)));
    for (name, path) in builds::executables(build)? {
        job.commands.push(format!("/tests/{name} --test-threads=1 {filter}"));
        job.programs.push((Path::new("/tests").join(name), path));
    }
    Ok(job)
}
