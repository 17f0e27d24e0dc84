//! A real `squall-agent`, with a socket and a state directory of its own.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use squall_lab::{Netns, Running, bin_dir, unique};
use squall_proto::v1::agent_client::AgentClient;
use tempfile::TempDir;
use tokio::{net::UnixStream, time::sleep};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tower::service_fn;

/// Longest start, on the slowest machine: a VM without KVM.
const START: Duration = Duration::from_mins(1);
/// Longest drain.
const DRAIN: Duration = Duration::from_mins(1);

/// How an agent is started.
#[derive(Debug, Clone, Copy, Default)]
pub struct AgentOptions<'a> {
    /// The network namespace it runs in; the caller's, where there is none.
    pub netns: Option<&'a Netns>,
    /// More arguments.
    pub args: &'a [&'a str],
    /// Its state directory; one of its own, where none is given.
    pub state_dir: Option<&'a Path>,
    /// The directory by which a test says where this agent is killed or fails (agent/src/crash.rs).
    pub crash: Option<&'a Path>,
    /// A command that becomes the agent, such as setpriv with its arguments.
    pub under: &'a [&'a str],
}

/// A running agent. It is killed when this is dropped, and what it kept in its state directory is gone.
#[derive(Debug)]
pub struct Agent {
    process: Running,
    dir: TempDir,
    state_dir: PathBuf,
    command: Command,
}

impl Agent {
    /// Starts an agent, and waits until it serves.
    pub async fn start(options: AgentOptions<'_>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix(&format!("{}-", unique("agent"))).tempdir()?;
        let binary =
            bin_dir().join(if options.crash.is_some() { "squall-agent-crash" } else { "squall-agent" });
        if !binary.exists() {
            bail!("no {}: cargo xtask test builds it", binary.display());
        }
        let mut words = options.under.iter().map(AsRef::as_ref).chain([binary.as_os_str()]);
        let program = words.next().context("no program")?;
        let mut command = options.netns.map_or_else(|| Command::new(program), |netns| netns.command(program));
        command.args(words);
        command.envs(options.crash.map(|dir| ("SQUALL_CRASH", dir)));
        let state_dir = options.state_dir.map_or_else(|| dir.path().join("state"), Path::to_owned);
        command.arg("--socket").arg(socket(dir.path())).arg("--state-dir").arg(&state_dir);
        command.args(["--metrics", "off"]).args(options.args);
        let process = spawn(&command, dir.path())?;
        let mut agent = Self { process, dir, state_dir, command };
        agent.wait_until_serving().await?;
        Ok(agent)
    }

    /// Starts it again, after [`Self::kill`] or [`Self::terminate`], with the same socket and state directory.
    pub async fn restart(&mut self) -> Result<()> {
        if self.process.ended()?.is_none() {
            bail!("the agent is still running");
        }
        self.process = spawn(&self.command, self.dir.path())?;
        self.wait_until_serving().await
    }

    /// Starts it again and waits for its end; how it ended, or `None` where it came to serve.
    pub async fn restart_to_die(&mut self) -> Result<Option<ExitStatus>> {
        self.process = spawn(&self.command, self.dir.path())?;
        match self.wait_until_serving().await {
            Ok(()) => Ok(None),
            Err(error) => self.process.ended()?.map(Some).ok_or(error),
        }
    }

    /// Waits until it ends, at most so long; whether it did.
    pub fn dies_within(&mut self, most: Duration) -> Result<bool> {
        let status = self.process.wait(most).ok();
        Ok(status.is_some_and(|status| Running::was(status, Signal::SIGKILL)))
    }

    /// A client of its API.
    pub async fn client(&self) -> Result<AgentClient<Channel>> {
        Ok(AgentClient::new(self.channel().await?))
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        socket(self.dir.path())
    }

    /// Its state directory.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.state_dir.clone()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Everything it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(log(self.dir.path())).unwrap_or_default()
    }

    /// SIGTERM, and waits for the drain. Fails with its log where it does not end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.wait(DRAIN).with_context(|| format!("the agent did not drain:\n{}", self.log()))
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.process.kill()
    }

    async fn channel(&self) -> Result<Channel> {
        let socket = self.socket();
        let connector = service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        // The address is never used; the connector goes to the socket.
        let channel = Endpoint::from_static("http://agent").connect_with_connector(connector).await;
        channel.with_context(|| format!("cannot reach the agent at {}", self.socket().display()))
    }

    async fn wait_until_serving(&mut self) -> Result<()> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.ended()? {
                bail!("the agent ended by itself ({status}):\n{}", self.log());
            }
            let error = match self.serving().await {
                Ok(()) => return Ok(()),
                Err(e) => e,
            };
            if started.elapsed() > START {
                return Err(error).with_context(|| format!("the agent does not serve:\n{}", self.log()));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn serving(&self) -> Result<()> {
        let mut health = HealthClient::new(self.channel().await?);
        let status = health.check(HealthCheckRequest::default()).await?.into_inner().status();
        if status != ServingStatus::Serving {
            bail!("its health is {status:?}");
        }
        Ok(())
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("agent.sock")
}

fn log(dir: &Path) -> PathBuf {
    dir.join("agent.log")
}

fn spawn(command: &Command, dir: &Path) -> Result<Running> {
    let out = File::options().create(true).append(true).open(log(dir))?;
    Running::start_with(
        "squall-agent",
        command,
        Stdio::null(),
        Stdio::from(out.try_clone()?),
        Stdio::from(out),
    )
}
