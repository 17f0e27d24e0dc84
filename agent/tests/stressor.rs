//! The stressor by itself, as the agent starts it: when it works, when it ends, and that nothing keeps it alive.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

struct Stressor {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Stressor {
    fn start(kind: &str, cgroup: Option<&Path>) -> Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_squall-agent"));
        command.arg0("squall-stress").args(["stress", kind, "--injection=of-a-test"]);
        if let Some(dir) = cgroup {
            command.arg("--cgroup").arg(dir);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("piped")?);
        Ok(Self { child, orders, answers })
    }

    fn order(&mut self, order: &Value) -> Result<Value> {
        let orders = self.orders.as_mut().context("still open")?;
        writeln!(orders, "{order}")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("answer {line:?}"))
    }

    fn report(&mut self) -> Result<Value> {
        self.order(&json!({"number": 9, "order": "report"}))
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if started.elapsed() > PATIENCE {
                bail!("the stressor lives on");
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// CPU seconds, as /proc counts them.
    fn cpu(&self) -> Result<f64> {
        let stat = procfs::process::Process::new(self.child.id().cast_signed())?.stat()?;
        Ok((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64)
    }
}

impl Drop for Stressor {
    fn drop(&mut self) {
        // One that has ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn boot_ns(from_now: Duration) -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every kernel has it");
    (Duration::from(now) + from_now).as_nanos() as u64
}

fn burn(usage: f64, until: Duration) -> Value {
    let work = json!({"kind": "cpu", "usage": usage, "workers": 1, "cpus": []});
    json!({"number": 1, "order": "work", "work": work, "until": boot_ns(until)})
}

fn hold(bytes: u64, until: Duration) -> Value {
    let work = json!({"kind": "memory", "size": {"held": bytes}, "ramp_ns": 0, "spare": 0});
    json!({"number": 1, "order": "work", "work": work, "until": boot_ns(until)})
}

fn wait_for_held(stressor: &mut Stressor, bytes: u64) -> Result<()> {
    let started = Instant::now();
    loop {
        let report = stressor.report()?;
        ensure!(report["error"].is_null(), "{report}");
        if report["held"] == bytes {
            return Ok(());
        }
        ensure!(started.elapsed() < PATIENCE, "{report}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn load_ends_with_the_agents_end_of_the_pipe() -> Result<()> {
    let mut stressor = Stressor::start("cpu", None)?;
    let answer = stressor.order(&burn(0.2, PATIENCE * 10))?;
    ensure!(answer["number"] == 1 && answer["error"].is_null(), "{answer}");
    while stressor.cpu()? == 0.0 {
        thread::sleep(Duration::from_millis(10));
    }
    stressor.orders = None;
    ensure!(stressor.wait()?.success());
    Ok(())
}

#[test]
fn memory_is_resident_and_ends_with_the_agents_end_of_the_pipe() -> Result<()> {
    let mut stressor = Stressor::start("memory", None)?;
    stressor.order(&hold(48 * MIB, PATIENCE * 10))?;
    wait_for_held(&mut stressor, 48 * MIB)?;
    let status = procfs::process::Process::new(stressor.child.id().cast_signed())?.status()?;
    ensure!(status.vmrss.context("resident")? * 1024 > 48 * MIB, "{:?} KiB", status.vmrss);
    stressor.orders = None;
    ensure!(stressor.wait()?.success());
    Ok(())
}

#[test]
fn time_is_up_without_a_word_from_the_agent() -> Result<()> {
    let second = Duration::from_secs(1);
    for kind in ["cpu", "memory"] {
        let mut stressor = Stressor::start(kind, None)?;
        let order = if kind == "cpu" { burn(0.2, second) } else { hold(MIB, second) };
        stressor.order(&order)?;
        ensure!(stressor.wait()?.success(), "{kind}");
        ensure!(stressor.orders.is_some(), "{kind}: nobody closed the pipe");
        // What it did is still there to be read, and says that it worked until then.
        let last_words = stressor.answer()?;
        ensure!(last_words["elapsed_ns"].as_u64() > Some(500_000_000), "{kind}: {last_words}");
    }
    Ok(())
}

#[test]
fn time_can_be_moved_both_ways() -> Result<()> {
    let mut stressor = Stressor::start("memory", None)?;
    stressor.order(&hold(MIB, Duration::from_secs(1)))?;
    stressor.order(&json!({"number": 2, "order": "until", "until": boot_ns(PATIENCE * 10)}))?;
    thread::sleep(Duration::from_secs(2));
    ensure!(stressor.child.try_wait()?.is_none(), "its time was moved back");
    stressor.order(&json!({"number": 3, "order": "until", "until": boot_ns(Duration::ZERO)}))?;
    ensure!(stressor.wait()?.success());
    Ok(())
}

#[test]
fn size_changes_in_place() -> Result<()> {
    let mut stressor = Stressor::start("memory", None)?;
    for mebibytes in [24, 8, 16] {
        stressor.order(&hold(mebibytes * MIB, PATIENCE * 10))?;
        wait_for_held(&mut stressor, mebibytes * MIB)?;
    }
    Ok(())
}

#[test]
fn cgroup_that_takes_no_process_is_said_and_nothing_runs() -> Result<()> {
    let mut stressor = Stressor::start("cpu", Some(Path::new("/proc/self")))?;
    let answer = stressor.answer()?;
    let error = answer["error"].as_str().unwrap_or_default();
    ensure!(error.contains("move the stressor into the cgroup /proc/self"), "{answer}");
    ensure!(stressor.wait()?.code() == Some(1));
    Ok(())
}

#[test]
fn nonsense_on_the_pipe_ends_it() -> Result<()> {
    let mut stressor = Stressor::start("cpu", None)?;
    writeln!(stressor.orders.as_mut().context("open")?, "burn everything")?;
    let status = stressor.wait()?;
    ensure!(status.code() == Some(1) && status.signal().is_none(), "{status}");
    Ok(())
}

#[test]
fn name_and_oom_score_say_what_it_is() -> Result<()> {
    for (kind, score) in [("cpu", 0), ("memory", 1000)] {
        let mut stressor = Stressor::start(kind, None)?;
        stressor.report()?;
        let of = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", stressor.child.id()));
        ensure!(of("comm")?.trim() == "squall-stress");
        // Without privilege it can only be raised.
        let own: i32 = fs::read_to_string("/proc/self/oom_score_adj")?.trim().parse()?;
        let expected = if nix::unistd::geteuid().is_root() { score } else { score.max(own) };
        ensure!(of("oom_score_adj")?.trim().parse() == Ok(expected), "{kind}");
        let descriptors = fs::read_dir(format!("/proc/{}/fd", stressor.child.id()))?.count();
        ensure!(descriptors == 3, "{kind}: {descriptors} descriptors");
    }
    Ok(())
}
