//! Commands that must succeed, and processes that end with their owner.

use std::{
    ffi::OsStr,
    io,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait_for;

/// Runs a command to its end and returns what it printed; fails with its standard error where it failed.
pub fn output(command: &mut Command) -> Result<Output> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed ({}): {}", output.status, said.trim());
    }
    Ok(output)
}

/// Runs a command to its end; returns its standard output.
pub fn stdout(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command)?.stdout).into_owned())
}

/// Runs a program with arguments to its end.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Result<()> {
    output(Command::new(program).args(args)).map(drop)
}

/// A process that is killed when this is dropped, or when the thread that started it dies.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
}

impl Running {
    /// Starts a command. The kernel kills it should this process be killed: see prctl(2), `PR_SET_PDEATHSIG`.
    pub fn start(name: impl Into<String>, command: &Command) -> Result<Self> {
        let name = name.into();
        let child =
            Self::tied(command).spawn().with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Self { name, child })
    }

    /// Like [`Self::start`], with its three standard streams.
    pub fn start_with(
        name: impl Into<String>,
        command: &Command,
        stdin: Stdio,
        out: Stdio,
        err: Stdio,
    ) -> Result<Self> {
        let name = name.into();
        let child = Self::tied(command).stdin(stdin).stdout(out).stderr(err).spawn();
        let child = child.with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Self { name, child })
    }

    fn tied(command: &Command) -> Command {
        let mut tied = Command::new("setpriv");
        tied.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => tied.env(name, value),
                None => tied.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            tied.current_dir(dir);
        }
        tied.stdin(Stdio::null());
        tied
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Fails if it has ended: it is meant to be there.
    pub fn check(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!("{} ended by itself ({status})", self.name),
        }
    }

    /// Sends a signal, and does not wait. A process that has ended gets none.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits for its end.
    pub fn wait(&mut self, most: Duration) -> Result<ExitStatus> {
        let name = format!("the end of {}", self.name);
        wait_for(&name, most, || self.ended())
    }

    /// SIGTERM, and SIGKILL where that does not end it in time. Returns how it ended.
    pub fn stop(&mut self, most: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        if let Ok(status) = self.wait(most) {
            return Ok(status);
        }
        self.kill()
    }

    /// SIGKILL. Returns how it ended.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        self.child.wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Whether a status is the end by this signal.
    #[must_use]
    pub fn was(status: ExitStatus, signal: Signal) -> bool {
        status.signal() == Some(signal as i32)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(e) = self.kill() {
            let _ = io::Write::write_fmt(&mut io::stderr(), format_args!("{e:#}\n"));
        }
    }
}
