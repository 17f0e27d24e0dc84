//! PID 1 of the test VMs. Mounts what a host has, loads modules, runs commands one after the other, prints one line
//! that says how it went, and powers off.
//!
//! `/etc/vm` in the initramfs says what to do, one item a line:
//!
//! ```text
//! module /modules/veth.ko
//! env SQUALL_BIN_DIR=/squall
//! run /tests/network --test-threads=1
//! ```

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs::{self, File},
    path::Path,
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{RLIM_INFINITY, Resource, setrlimit},
        wait::{WaitStatus, wait},
    },
    unistd::{Pid, getpid, sync},
};

/// What to do.
#[derive(Debug, Default, PartialEq, Eq)]
struct Job {
    modules: Vec<String>,
    env: BTreeMap<String, String>,
    runs: Vec<Vec<String>>,
}

fn main() -> Result<Infallible> {
    if getpid() != Pid::from_raw(1) {
        bail!("this is the init of a test VM; it would power this machine off");
    }
    let failed = match work() {
        Ok(failed) => failed,
        Err(e) => {
            println!("init: {e:#}");
            1
        }
    };
    println!("\n==== squall-init: {failed} failed ====");
    sync();
    Ok(reboot(RebootMode::RB_POWER_OFF)?)
}

/// Runs the job; returns how many commands failed.
fn work() -> Result<usize> {
    mounts()?;
    let job = Job::parse(&fs::read_to_string("/etc/vm").context("no /etc/vm in the initramfs")?)?;
    for module in &job.modules {
        load(module)?;
    }
    // Kernels before 5.11 charge BPF maps against this limit.
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
    run(&words("ip link set lo up"), &job.env)?;
    let mut failed = 0;
    for command in &job.runs {
        println!("\n==== {}", command.join(" "));
        let started = Instant::now();
        let result = run(command, &job.env);
        println!("==== {} after {:.1?}", if result.is_ok() { "ok" } else { "FAILED" }, started.elapsed());
        if let Err(e) = result {
            println!("==== {e:#}");
            failed += 1;
        }
    }
    Ok(failed)
}

fn mounts() -> Result<()> {
    for (kind, at) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        fs::create_dir_all(at).with_context(|| format!("cannot make {at}"))?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {kind} on {at}"))?;
    }
    // What systemd does on a real host.
    let on = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").context("no cgroup controllers")?;
    let on: Vec<String> = on.split_whitespace().map(|controller| format!("+{controller}")).collect();
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", on.join(" "))
        .context("cannot turn cgroup controllers on")
}

fn load(module: &str) -> Result<()> {
    let file = File::open(Path::new(module)).with_context(|| format!("no module {module}"))?;
    match finit_module(file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("cannot load {module}")),
    }
}

/// Runs a command to its end, and reaps, as PID 1 must, whatever else ends meanwhile.
fn run(command: &[String], env: &BTreeMap<String, String>) -> Result<()> {
    let (program, args) = command.split_first().context("an empty command")?;
    let child = Command::new(program).args(args).envs(env).spawn();
    let child = child.with_context(|| format!("cannot start {program}"))?.id().cast_signed();
    loop {
        match wait()? {
            WaitStatus::Exited(pid, 0) if pid.as_raw() == child => return Ok(()),
            WaitStatus::Exited(pid, code) if pid.as_raw() == child => bail!("{program} exited with {code}"),
            WaitStatus::Signaled(pid, signal, _) if pid.as_raw() == child => {
                bail!("{program} was killed by {signal}")
            }
            _ => {}
        }
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(ToOwned::to_owned).collect()
}

impl Job {
    fn parse(text: &str) -> Result<Self> {
        let mut job = Self::default();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (what, rest) = line.split_once(' ').unwrap_or((line, ""));
            match what {
                "module" => job.modules.push(rest.to_owned()),
                "env" => {
                    let (name, value) = rest.split_once('=').with_context(|| format!("no = in {line:?}"))?;
                    job.env.insert(name.to_owned(), value.to_owned());
                }
                "run" => job.runs.push(words(rest)),
                _ => bail!("cannot make sense of {line:?}"),
            }
        }
        Ok(job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_read_line_by_line() -> Result<()> {
        let job = Job::parse("module /m/veth.ko\nenv A=b=c\n\nrun /t --x 1\nrun /u\n")?;
        assert_eq!(job.modules, ["/m/veth.ko"]);
        assert_eq!(job.env["A"], "b=c");
        assert_eq!(job.runs, [words("/t --x 1"), words("/u")]);
        assert!(Job::parse("walk /t").is_err());
        Ok(())
    }
}
