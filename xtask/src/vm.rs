//! The privileged tests on other kernels, in QEMU without KVM (which hangs where the host is itself nested).

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;
use squall_lab::Running;

use crate::{
    builds::{self, BINARIES},
    initramfs::Initramfs,
    kernel::Kernel,
    setup,
    suite::{self, Counts},
    target_dir, tools,
};

/// Modules that the faults and their tests need, where the kernel has them as modules.
const MODULES: [&str; 17] = [
    "veth",
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
const TOOLS: [&str; 8] = ["sh", "ip", "tc", "ping", "iperf3", "nsenter", "setpriv", "sleep"];
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
    #[arg(long, default_value_t = 20)]
    minutes: u64,
}

/// Boots each kernel in turn. Fails if anything failed on any of them.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    setup::ensure(setup::ALL)?;
    let binaries = builds::release()?;
    let mut failed = Vec::new();
    for kernel in &options.kernels {
        let (ok, _) = boot(kernel, &binaries, options)?;
        if !ok {
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

/// Runs all privileged tests on one kernel; whether they passed, and the counts.
pub(crate) fn test(kernel: &str, binaries: &Path) -> Result<(bool, Counts)> {
    let options = Options { kernels: vec![], cmd: vec![], filter: None, minutes: 20 };
    boot(kernel, binaries, &options)
}

fn boot(series: &str, binaries: &Path, options: &Options) -> Result<(bool, Counts)> {
    let kernel = Kernel::fetch(series)?;
    println!("vm {series}: Linux {}", kernel.release());
    let archive = target_dir().join("vm").join(series).join("initramfs");
    fs::write(&archive, initramfs(&kernel, binaries, options)?.archive())?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048"]);
    qemu.args(["-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&archive);
    // An oops is a panic, a panic is a reboot, and a reboot is the end.
    qemu.args(["-append", "console=ttyS0 quiet oops=panic panic=-1"]);
    watch(&qemu, Duration::from_secs(options.minutes * 60))
}

/// Shows what the VM says until it is off; whether its init reported no failure.
fn watch(qemu: &Command, most: Duration) -> Result<(bool, Counts)> {
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
    let mut counts = Counts::default();
    let mut reported = None;
    loop {
        match said.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                // The firmware would reset the terminal.
                if !line.contains('\x1b') {
                    println!("{line}");
                    std::io::stdout().flush()?;
                }
                counts.take(&line);
                if line.contains(PANIC) {
                    bail!("the kernel panicked");
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
    let ok = reported.context("the VM ended before its init reported: it crashed, or did not boot")?;
    Ok((ok, counts))
}

fn initramfs(kernel: &Kernel, binaries: &Path, options: &Options) -> Result<Initramfs> {
    let mut initramfs = Initramfs::default();
    let mut job: Vec<String> = ["env PATH=/bin", "env SQUALL_BIN_DIR=/squall"].map(Into::into).into();
    for (name, module) in kernel.modules(&MODULES)? {
        let path = format!("/modules/{name}.ko");
        job.push(format!("module {path}"));
        initramfs.file(path, module);
    }
    for tool in TOOLS {
        initramfs.tool(tool)?;
    }
    // The shop's Redis, see squall-lab.
    initramfs.program(
        "/usr/bin/redis-check-rdb",
        &tools::find("redis-check-rdb").context("no redis-check-rdb")?,
    )?;
    for binary in BINARIES {
        initramfs.program(Path::new("/squall").join(binary), &binaries.join(binary))?;
    }
    let tests = executables()?;
    if options.cmd.is_empty() {
        let filter = options.filter.as_deref().unwrap_or_default();
        for name in tests.iter().filter(|test| test.integration).map(|test| &test.name) {
            job.push(format!("run /tests/{name} --test-threads=1 {filter}"));
        }
    }
    for test in &tests {
        let path = if test.integration { format!("/tests/{}", test.name) } else { "/init".into() };
        initramfs.program(path, &test.path)?;
    }
    for command in &options.cmd {
        job.push(format!("run {command}"));
    }
    initramfs.file("/etc/vm", job.join("\n").into_bytes());
    Ok(initramfs)
}

#[derive(Debug)]
struct Executable {
    name: String,
    path: PathBuf,
    /// One of tests/tests/*.rs; otherwise it is the init.
    integration: bool,
}

/// Builds the privileged tests and the init, and finds where cargo put them.
fn executables() -> Result<Vec<Executable>> {
    let mut found = Vec::new();
    let privileged = suite::privileged()?;
    let privileged: Vec<&str> = privileged.iter().flat_map(|name| ["--test", name]).collect();
    for (verb, targets) in
        [("test", &[&["--no-run"], &privileged[..]].concat()[..]), ("build", &["--bin", "squall-init"])]
    {
        let mut command = tools::cargo([verb].iter().chain(&tools::HOST_CRATES).chain(targets));
        command.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
        let output = command.output().context("cannot start cargo")?;
        if !output.status.success() {
            bail!("{} failed", tools::line(&command));
        }
        for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let message: Value = serde_json::from_slice(line)?;
            let field = |path: &str| message.pointer(path).and_then(Value::as_str).map(ToOwned::to_owned);
            if let (Some(path), Some(name)) = (field("/executable"), field("/target/name")) {
                let integration = verb == "test";
                found.push(Executable { name, path: path.into(), integration });
            }
        }
    }
    Ok(found)
}
