//! The agent's side of a stressor.

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{sleep, timeout},
};

use super::{Kind, Order, Report, What, Work};
use crate::{crash, host::proc, time::BootTime};

/// How long an answer may take. A stressor answers at once, unless its cgroup is throttled or frozen.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the end of a killed stressor may take: it gives its memory back first.
const END: Duration = Duration::from_secs(20);

/// A running stressor. It ends when this is dropped.
#[derive(Debug)]
pub struct Stressor {
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    number: u64,
    last: Report,
}

impl Stressor {
    /// Starts a stressor in these cgroups and gives it work.
    pub async fn start(
        kind: Kind,
        token: &str,
        cgroups: &[PathBuf],
        work: Work,
        until: BootTime,
    ) -> Result<Self> {
        let mut command = Command::new(program()?);
        command
            .arg0(proc::STRESSOR)
            .args(["stress", kind.name()])
            .arg(format!("{}{token}", proc::INJECTION_ARGUMENT))
            .arg(format!("{}{}", proc::AGENT_ARGUMENT, std::process::id()))
            .args(cgroups.iter().flat_map(|dir| [Path::new("--cgroup"), dir.as_path()]))
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C in a terminal is for the agent, which takes things back in order.
            .process_group(0)
            .kill_on_drop(true);
        #[cfg(feature = "crash-points")]
        command.envs(crash::env());
        crash::step("stressor.spawn").context("start a stressor")?;
        let mut child = command.spawn().context("start a stressor")?;
        crash::point("stressor.spawned");
        let orders = child.stdin.take().context("the stressor has no input")?;
        let answers = BufReader::new(child.stdout.take().context("the stressor has no output")?).lines();
        let mut stressor = Self { child, orders, answers, number: 0, last: Report::default() };
        stressor.work(work, until).await?;
        Ok(stressor)
    }

    /// Changes its work, without a gap. Where it has ended, this is an error.
    pub async fn work(&mut self, work: Work, until: BootTime) -> Result<()> {
        if !self.ask(What::Work { work, until }).await? {
            bail!("the stressor has ended{}", self.how_it_ended());
        }
        if let Some(error) = &self.last.error {
            bail!("the stressor cannot: {error}");
        }
        Ok(())
    }

    /// Moves the time at which it ends by itself. One that has ended stays ended.
    pub async fn until(&mut self, until: BootTime) -> Result<()> {
        self.ask(What::Until { until }).await.map(|_alive| ())
    }

    /// What it did up to now; where it has ended, its last words.
    pub async fn report(&mut self) -> Result<Report> {
        self.ask(What::Report).await?;
        Ok(self.last.clone())
    }

    /// Whether somebody killed it: the kernel, out of memory, or whoever killed everything in the cgroup.
    pub fn was_killed(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(status)) if status.signal() == Some(libc::SIGKILL))
    }

    /// Why it is over, where it is: its time was up, or it was killed.
    pub fn ended(&mut self) -> Option<&'static str> {
        let over = matches!(self.child.try_wait(), Ok(Some(_)));
        over.then(|| if self.was_killed() { "its stressor was killed" } else { "its stressor has ended" })
    }

    fn how_it_ended(&mut self) -> String {
        match self.child.try_wait() {
            Ok(Some(status)) => format!(" ({status})"),
            _ => String::new(),
        }
    }

    /// Gives an order and waits for its answer. False: it has ended.
    async fn ask(&mut self, what: What) -> Result<bool> {
        crash::step("stressor.order").context("give the stressor an order")?;
        self.number += 1;
        let order = Order { number: self.number, what };
        let mut line = serde_json::to_vec(&order).context("write an order")?;
        line.push(b'\n');
        // A stressor that has ended still has words in its pipe.
        let _ended = self.orders.write_all(&line).await;
        let answered = timeout(ANSWER, self.answer()).await.context("the stressor does not answer")?;
        crash::point("stressor.answered");
        answered
    }

    async fn answer(&mut self) -> Result<bool> {
        while let Some(line) = self.answers.next_line().await.context("read from the stressor")? {
            self.last = serde_json::from_str(&line).with_context(|| format!("a strange answer: {line}"))?;
            // Zero: it could not even start, or its time is up. An older number answers an order given up on.
            if self.last.number == self.number || (self.last.number == 0 && self.last.error.is_some()) {
                return Ok(true);
            }
        }
        // It has closed its output, so it ends now.
        self.child.wait().await.context("wait for the stressor")?;
        Ok(false)
    }
}

/// The agent itself, also after its file was replaced.
#[cfg(not(test))]
#[expect(clippy::unnecessary_wraps, reason = "under test it can fail")]
fn program() -> Result<PathBuf> {
    Ok("/proc/self/exe".into())
}

/// Tests run in a program that is not the agent; cargo builds the agent for them because of agent/tests.
#[cfg(test)]
fn program() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let agent = test.ancestors().nth(2).context("no directory")?.join("squall-agent");
    if !agent.exists() {
        bail!("no {}: cargo build -p squall-agent", agent.display());
    }
    Ok(agent)
}

/// Ends every stressor that works for an injection, whoever started it, and waits until it has given its memory back.
/// None is as good.
pub async fn end_all(token: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        let left = strays(token)?;
        if left.is_empty() {
            crash::point("stressor.ended");
            return Ok(());
        }
        if started.elapsed() > END {
            bail!("stressor {left:?} of injection {token} was killed but does not end");
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// Stressors whose agent is gone: pid and token. A frozen one has not noticed.
pub fn orphans() -> Result<Vec<(i32, String)>> {
    let orphan = |pid: i32| {
        let arguments = proc::arguments(pid);
        let token = proc::injection_of(&arguments)?.to_owned();
        let agent = arguments.iter().find_map(|argument| argument.strip_prefix(proc::AGENT_ARGUMENT))?;
        // Whoever loses its parent gets another.
        let parent = proc::any_stat(pid)?.ppid;
        (agent != parent.to_string()).then_some((pid, token))
    };
    Ok(proc::pids().context("list /proc")?.into_iter().filter_map(orphan).collect())
}

/// Kills a stressor, if it still is of this injection.
pub fn end(pid: i32, token: &str) -> Result<bool> {
    let Some(process) = proc::PidFd::open(pid).context("hold a stressor")? else { return Ok(false) };
    // Held now: look again, so that it is not another process of the same pid.
    let same = proc::injection_of(&proc::arguments(pid)) == Some(token);
    if same {
        crash::step("stressor.kill")?;
        process.kill().with_context(|| format!("kill the stressor {pid}"))?;
    }
    Ok(same)
}

/// Kills the stressors of an injection. Returns those that are still there, and all stressors that are dying: one that
/// is giving its memory back has no arguments any more that say whose it is.
fn strays(token: &str) -> Result<Vec<i32>> {
    let mut left = Vec::new();
    for pid in proc::pids().context("list /proc")? {
        let arguments = proc::arguments(pid);
        let dying = arguments.is_empty() && is_dying(pid);
        if (dying || proc::injection_of(&arguments) == Some(token)) && proc::is_kin(pid) {
            if !dying {
                end(pid, token)?;
            }
            left.push(pid);
        }
    }
    Ok(left)
}

/// Whether it is on its way out, by the kernel's word: anybody may call himself a stressor and have no arguments.
fn is_dying(pid: i32) -> bool {
    proc::any_stat(pid).is_some_and(|stat| {
        // A zombie with no other threads has nothing left to give back.
        stat.comm == proc::STRESSOR && proc::is_exiting(&stat) && (stat.state != 'Z' || stat.num_threads > 1)
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{fs::PermissionsExt, process::CommandExt},
        process::{Command, Stdio},
        thread,
    };

    use super::*;

    /// Needs root: it starts processes as somebody else.
    mod privileged {
        use super::*;

        #[tokio::test]
        async fn nobody_holds_up_a_revert_who_only_calls_himself_a_stressor() {
            const NOBODY: u32 = 65_534;
            let dir = tempfile::tempdir().expect("a directory");
            let program = dir.path().join(proc::STRESSOR);
            let cat = ["/usr/bin/cat", "/bin/cat"].iter().find(|cat| Path::new(cat).exists()).expect("a cat");
            fs::copy(cat, &program).expect("copied");
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("open to all");
            let token = "of-nobody";
            let start = |uid: u32, arguments: &[&str]| {
                let mut command = Command::new(&program);
                command.arg0(arguments[0]).args(&arguments[1..]).uid(uid).stdin(Stdio::piped());
                let child = command.spawn().expect("started");
                while proc::any_stat(child.id().cast_signed()).is_none_or(|stat| stat.comm != proc::STRESSOR)
                {
                    thread::yield_now();
                }
                child
            };
            // Without arguments, as root and not; and with those of a stressor, of somebody who would come again each time.
            let injection = format!("{}{token}", proc::INJECTION_ARGUMENT);
            let mut all = [
                start(NOBODY, &[""]),
                start(0, &[""]),
                start(NOBODY, &[proc::STRESSOR, "-", "--", &injection]),
            ];
            let started = Instant::now();
            let ended = end_all(token).await;
            let took = started.elapsed();
            let lives = all.each_mut().map(|child| child.try_wait().expect("asked").is_none());
            for mut child in all {
                child.kill().expect("ended");
                child.wait().expect("ended");
            }
            ended.expect("nobody is left");
            assert!(took < END / 2, "{took:?}");
            assert_eq!(lives, [true; 3]);
        }
    }
}
