//! Agents, seen from here: how they are reached, started and asked.

use std::{
    fmt,
    fs::{self, File},
    net::IpAddr,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Stdio,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use squall_proto::v1::{self, agent_client::AgentClient};
use thiserror::Error;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{commands::err, faults::LEASE, wrong::Wrong};

/// Calls that only read or prepare.
const QUICK: Duration = Duration::from_secs(10);
/// Renewals: an agent that takes longer is as good as gone, and its lease ends by itself soon.
const RENEW: Duration = Duration::from_secs(3);
/// A revert waits until the host is as before: a TAP queue has to run empty, memory has to be given back.
const REVERT: Duration = Duration::from_secs(30);
/// From the start of a local agent to its health service, which waits for the journal to be replayed.
const START: Duration = Duration::from_secs(30);
/// Between two tries to reach an agent that may be in the middle of an upgrade.
const AGAIN: Duration = Duration::from_millis(200);
/// A draining agent reverts what it holds.
const DRAIN: Duration = Duration::from_secs(30);

/// Where an agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// Host and port on loopback, without TLS.
    Tcp(String),
    /// Host and port, with mutual TLS.
    Tls(String, Tls),
}

/// How we show who we are, and know who answers. Files are PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub(crate) struct Tls {
    /// Our certificate, for agents at https://
    #[arg(
        long = "tls-cert",
        value_name = "FILE",
        global = true,
        help_heading = "Everywhere",
        env = "SQUALL_TLS_CERT"
    )]
    cert: Option<PathBuf>,
    /// Its key
    #[arg(
        long = "tls-key",
        value_name = "FILE",
        global = true,
        help_heading = "Everywhere",
        env = "SQUALL_TLS_KEY"
    )]
    key: Option<PathBuf>,
    /// CA of the agents' certificates
    #[arg(
        long = "tls-ca",
        value_name = "FILE",
        global = true,
        help_heading = "Everywhere",
        env = "SQUALL_TLS_CA"
    )]
    ca: Option<PathBuf>,
    /// Name in the agents' certificates, where it is not the one they are reached by
    #[arg(
        long = "tls-server-name",
        value_name = "NAME",
        global = true,
        help_heading = "Everywhere",
        env = "SQUALL_TLS_SERVER_NAME"
    )]
    server_name: Option<String>,
    /// A token of a Kubernetes service account (audience squall) to show to agents at https:// too, read anew for each call
    #[arg(
        long = "token-file",
        value_name = "FILE",
        global = true,
        help_heading = "Everywhere",
        env = "SQUALL_TOKEN_FILE"
    )]
    token: Option<PathBuf>,
}

impl Tls {
    fn config(&self) -> Result<ClientTlsConfig, Wrong> {
        let read = |option: &str, path: &Option<PathBuf>| {
            let missing =
                || Wrong(format!("agents at https:// need {option} FILE; `squall certs` makes some"));
            let path = path.as_ref().ok_or_else(missing)?;
            fs::read(path).map_err(|e| Wrong(format!("{option}: {}: {e}", path.display())))
        };
        let identity = Identity::from_pem(read("--tls-cert", &self.cert)?, read("--tls-key", &self.key)?);
        let ca = Certificate::from_pem(read("--tls-ca", &self.ca)?);
        let config = ClientTlsConfig::new().identity(identity).ca_certificate(ca);
        Ok(match &self.server_name {
            Some(name) => config.domain_name(name),
            None => config,
        })
    }
}

impl Address {
    /// The same, reached with these certificates where it takes any.
    pub(crate) fn with(self, tls: &Tls) -> Self {
        match self {
            Self::Tls(authority, _) => Self::Tls(authority, tls.clone()),
            plain => plain,
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix://") {
            if !path.starts_with('/') {
                return Err("the path of a socket is absolute: unix:///run/squall/agent.sock".into());
            }
            return Ok(Self::Unix(path.into()));
        }
        let expected = "expected unix:///run/squall/agent.sock, https://node-1:7400 or http://127.0.0.1:7400";
        let tls = text.strip_prefix("https://");
        let Some(authority) = tls.or_else(|| text.strip_prefix("http://")) else {
            return Err(expected.into());
        };
        let authority = authority.trim_end_matches('/');
        let Some((host, port)) = authority.rsplit_once(':') else {
            return Err(format!("no port; {expected}"));
        };
        if port.parse::<u16>().is_err() {
            return Err(format!("`{port}` is no port; {expected}"));
        }
        if tls.is_some() {
            return Ok(Self::Tls(authority.to_owned(), Tls::default()));
        }
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if host != "localhost" && !bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) {
            return Err(format!(
                "plain TCP to {host} is refused: anyone on the way could inject faults; use https:// with certificates, \
                 or loopback (ssh -L 7400:/run/squall/agent.sock {host})"
            ));
        }
        Ok(Self::Tcp(authority.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(authority) => write!(f, "http://{authority}"),
            Self::Tls(authority, _) => write!(f, "https://{authority}"),
        }
    }
}

/// A call that an agent did not do.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum CallError {
    /// There is no such injection there, or nothing there that the selector matches.
    #[error("{node}: {message}")]
    NotThere {
        /// Node of the agent.
        node: String,
        /// Why.
        message: String,
    },
    /// The agent understood and said no: the request is wrong, or not possible there. Nothing was changed.
    #[error("{node}: {message}")]
    Refused {
        /// Node of the agent.
        node: String,
        /// Why.
        message: String,
    },
    /// The agent tried and failed.
    #[error("{node}: {message}")]
    Failed {
        /// Node of the agent.
        node: String,
        /// What went wrong.
        message: String,
    },
    /// The agent does not answer.
    #[error("the agent on {node} is lost: {message}")]
    Lost {
        /// Node of the agent.
        node: String,
        /// What was seen.
        message: String,
    },
}

impl CallError {
    fn of(node: &str, status: &Status) -> Self {
        let (node, message) = (node.to_owned(), status.message().to_owned());
        match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => Self::Lost { node, message },
            Code::NotFound => Self::NotThere { node, message },
            Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::Unimplemented
            | Code::ResourceExhausted
            | Code::OutOfRange
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::AlreadyExists => Self::Refused { node, message },
            // Transport errors of a broken connection arrive as Unknown with a source.
            Code::Unknown if std::error::Error::source(status).is_some() => Self::Lost { node, message },
            _ => Self::Failed { node, message },
        }
    }
}

/// Shows the token of a file with each call. The kubelet puts another one there before the old one expires.
///
/// Where there is none the call goes without: what a certificate may alone, such as a revert, needs no token.
#[derive(Debug, Clone, Default)]
struct Bearer(Option<PathBuf>);

impl Bearer {
    /// Where the token of this address is; its absence is told.
    fn of(address: &Address) -> Self {
        let Address::Tls(_, Tls { token: Some(path), .. }) = address else { return Self(None) };
        if let Err(e) = bearer(path) {
            err(&format!("! --token-file: {}: {e}; going on without a token\n", path.display()));
        }
        Self(Some(path.clone()))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = self.0.as_ref().and_then(|path| bearer(path).ok()) {
            request.metadata_mut().insert("authorization", token);
        }
        Ok(request)
    }
}

/// What a call carries, from the file of a token.
fn bearer(path: &Path) -> Result<MetadataValue<Ascii>, String> {
    let text = fs::read_to_string(path).map_err(|e| e.to_string())?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("there is no token in it".to_owned());
    }
    let mut value: MetadataValue<Ascii> =
        format!("Bearer {token}").parse().map_err(|_| "no token".to_owned())?;
    value.set_sensitive(true);
    Ok(value)
}

/// An agent that answers.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    /// Host name of its node.
    pub node: String,
    /// Where it was reached.
    pub address: String,
    /// What it said about its node when it was reached.
    pub about: v1::DescribeResponse,
    client: AgentClient<InterceptedService<Channel, Bearer>>,
    /// When it last gave or renewed leases.
    leased: Arc<Mutex<Instant>>,
}

/// How long a stream of an agent is waited for that may be in the middle of an upgrade: as long as a lease.
#[derive(Debug, Default)]
pub(crate) struct Patience(Option<Instant>);

impl Patience {
    /// Something came.
    pub(crate) fn heard(&mut self) {
        self.0 = None;
    }

    /// Waits a moment before the next try. Gives the error back where it is no loss, or nothing came for a whole lease.
    pub(crate) async fn wait(&mut self, error: CallError) -> Called<()> {
        let since = *self.0.get_or_insert_with(Instant::now);
        if !matches!(error, CallError::Lost { .. }) || since.elapsed() >= LEASE {
            return Err(error);
        }
        sleep(AGAIN).await;
        Ok(())
    }
}

type Called<T> = Result<T, CallError>;

impl Agent {
    /// Connects and asks what the node is. Waits for nothing: an agent that is not there is an error.
    pub(crate) async fn connect(address: &Address) -> Result<Self> {
        let channel = open(address).await?;
        let mut client = AgentClient::with_interceptor(channel, Bearer::of(address));
        let describe = client.describe(v1::DescribeRequest::default());
        let about = timeout(QUICK, describe)
            .await
            .with_context(|| format!("the agent at {address} does not answer"))?
            .map_err(|status| anyhow!("the agent at {address}: {}", status.message()))?
            .into_inner();
        Ok(Self {
            node: about.node.clone(),
            address: address.to_string(),
            about,
            client,
            leased: Arc::new(Mutex::new(Instant::now())),
        })
    }

    /// Whether an error may be that of an upgrade: until the leases it gave are over, another agent may go on with them.
    pub(crate) fn may_return(&self, error: &CallError) -> bool {
        let leased = *self.leased.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(error, CallError::Lost { .. }) && leased.elapsed() < LEASE
    }

    fn leased(&self) {
        *self.leased.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    async fn call<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Called<T> {
        match timeout(limit, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(CallError::of(&self.node, &status)),
            Err(_) => {
                let message = format!("no answer within {}", humantime::format_duration(limit));
                Err(CallError::Lost { node: self.node.clone(), message })
            }
        }
    }

    /// What the selectors resolve to there now, in order; with a fault as that takes hold of them.
    pub(crate) async fn resolve(
        &self,
        targets: Vec<v1::Target>,
        fault: Option<v1::Fault>,
    ) -> Called<Vec<v1::Resolved>> {
        let mut client = self.client.clone();
        let response = self.call(QUICK, client.describe(v1::DescribeRequest { targets, fault })).await?;
        Ok(response.resolved)
    }

    /// Checks and prepares an injection; with `dry_run` keeps nothing.
    pub(crate) async fn arm(&self, request: v1::ArmRequest) -> Called<Vec<v1::Injection>> {
        let mut client = self.client.clone();
        Ok(self.call(QUICK, client.arm(request)).await?.injections)
    }

    /// Injects what was armed.
    pub(crate) async fn fire(&self, ids: Vec<String>) -> Called<Vec<v1::Injection>> {
        let mut client = self.client.clone();
        let fired = self.call(QUICK, client.fire(v1::FireRequest { ids })).await?;
        self.leased();
        Ok(fired.injections)
    }

    /// Renews leases; gives the ids that are not live any more.
    pub(crate) async fn renew(&self, ids: Vec<String>) -> Called<Vec<String>> {
        let mut client = self.client.clone();
        let renewed = self.call(RENEW, client.renew(v1::RenewRequest { ids })).await?;
        self.leased();
        Ok(renewed.gone)
    }

    /// Reverts injections and waits until the host is as before.
    pub(crate) async fn revert(&self, ids: Vec<String>) -> Called<Vec<v1::Injection>> {
        let mut client = self.client.clone();
        Ok(self.call(REVERT, client.revert(v1::RevertRequest { ids, all: false })).await?.injections)
    }

    /// Reverts everything the agent holds.
    pub(crate) async fn revert_all(&self) -> Called<Vec<v1::Injection>> {
        let mut client = self.client.clone();
        let request = v1::RevertRequest { ids: vec![], all: true };
        Ok(self.call(REVERT, client.revert(request)).await?.injections)
    }

    /// Reverts everything and has injections refused; with `release` allows them again.
    pub(crate) async fn stop(&self, release: bool) -> Called<Vec<v1::Injection>> {
        let mut client = self.client.clone();
        Ok(self.call(REVERT, client.stop(v1::StopRequest { release })).await?.injections)
    }

    /// The injections it holds, and those that ended lately.
    pub(crate) async fn list(&self) -> Called<Vec<v1::Injection>> {
        let mut client = self.client.clone();
        Ok(self.call(QUICK, client.list(v1::ListRequest {})).await?.injections)
    }

    /// State and effect of injections: at once, at each change, once a second.
    pub(crate) async fn watch(&self, ids: Vec<String>) -> Called<Streaming<v1::Injection>> {
        let mut client = self.client.clone();
        self.call(QUICK, client.watch(v1::WatchRequest { ids, interval_ns: 1_000_000_000 })).await
    }

    /// What a target uses, once a second.
    pub(crate) async fn sample(&self, target: v1::Target) -> Called<Streaming<v1::TargetSample>> {
        let mut client = self.client.clone();
        let request = v1::SampleRequest { target: Some(target), interval_ns: 1_000_000_000 };
        self.call(QUICK, client.sample(request)).await
    }

    /// An error of one of its streams.
    pub(crate) fn stream_error(&self, status: &Status) -> CallError {
        CallError::of(&self.node, status)
    }

    /// The kinds of fault that work there, each with its mechanisms.
    #[must_use]
    pub(crate) fn faults(&self) -> std::collections::BTreeMap<String, String> {
        let available = self.about.faults.iter().filter(|f| f.available);
        available
            .map(|fault| {
                let mut mechanisms: Vec<&str> =
                    fault.features.iter().filter(|f| f.available).map(|f| f.mechanism.as_str()).collect();
                mechanisms.dedup();
                mechanisms.retain(|m| !m.is_empty());
                (fault.kind.clone(), mechanisms.join(", "))
            })
            .collect()
    }
}

async fn open(address: &Address) -> Result<Channel> {
    let uri = match address {
        Address::Unix(path) => format!("unix://{}", path.display()),
        Address::Tcp(authority) => format!("http://{authority}"),
        Address::Tls(authority, _) => format!("https://{authority}"),
    };
    let mut endpoint = tonic::transport::Endpoint::from_shared(uri)
        .with_context(|| format!("{address} is no address of an agent"))?
        .connect_timeout(Duration::from_secs(3))
        // A node that is gone sends no reset; without this the streams would wait for TCP to give up.
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(5));
    if let Address::Tls(_, tls) = address {
        endpoint = endpoint
            .tls_config(tls.config()?)
            .map_err(|e| Wrong(format!("--tls-cert, --tls-key, --tls-ca: {e:?}")))?;
    }
    endpoint.connect().await.with_context(|| format!("no agent answers at {address}"))
}

/// Whether the agent there is ready; an error where none answers.
async fn serving(address: &Address) -> Result<bool> {
    let mut health = HealthClient::new(open(address).await?);
    let request = HealthCheckRequest { service: String::new() };
    let response = timeout(Duration::from_secs(3), health.check(request)).await??;
    Ok(response.into_inner().status() == ServingStatus::Serving)
}

/// What to do where no `--agents` were given and none answers on the local socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Local {
    /// Start one, and stop it after.
    Start,
    /// Say so.
    Refuse,
}

/// An agent that was named does not answer.
#[derive(Debug, Error)]
#[error("{0}")]
pub(crate) struct Unreachable(String);

/// No agent was named and none runs here.
#[derive(Debug, Error)]
#[error("no agent answers at {0}; start `squall-agent` as root, or name one with --agents")]
pub(crate) struct NoAgent(Address);

/// The agents that take part, and the local one that was started for them.
#[derive(Debug)]
pub(crate) struct Agents {
    /// Those that answer.
    pub list: Vec<Agent>,
    local: Option<LocalAgent>,
}

impl Agents {
    /// Connects to all of `addresses`, or where there are none to the agent of this host.
    pub(crate) async fn connect(addresses: &[Address], local: Local) -> Result<Self> {
        if addresses.is_empty() {
            return Self::local(local).await;
        }
        let mut list: Vec<Agent> = Vec::new();
        for address in addresses {
            let agent = Agent::connect(address).await.map_err(|e| match e.downcast::<Wrong>() {
                Ok(wrong) => wrong.into(),
                Err(e) => anyhow!(Unreachable(format!("{e:#}"))),
            })?;
            if let Some(same) = list.iter().find(|a| a.node == agent.node) {
                let (first, node) = (&same.address, &agent.node);
                return Err(Wrong(format!(
                    "{first} and {address} are both agents of node {node}; name one of them"
                ))
                .into());
            }
            list.push(agent);
        }
        Ok(Self { list, local: None })
    }

    async fn local(local: Local) -> Result<Self> {
        let socket = path_from_env("SQUALL_SOCKET", "/run/squall/agent.sock");
        let address = Address::Unix(socket.clone());
        if let Ok(agent) = Agent::connect(&address).await {
            return Ok(Self { list: vec![agent], local: None });
        }
        if local == Local::Refuse {
            return Err(NoAgent(address).into());
        }
        let state = path_from_env("SQUALL_STATE_DIR", "/var/lib/squall");
        let child = LocalAgent::start(&socket, &state).await?;
        let agent = Agent::connect(&address).await?;
        Ok(Self { list: vec![agent], local: Some(child) })
    }

    /// Whether a local agent was started.
    #[must_use]
    pub(crate) fn started(&self) -> bool {
        self.local.is_some()
    }

    /// The log of the local agent, if one was started.
    #[must_use]
    pub(crate) fn log(&self) -> Option<String> {
        self.local.as_ref().map(LocalAgent::log)
    }

    /// Stops the local agent, if one was started: it drains, and this waits for it.
    pub(crate) async fn stop(self) -> Result<()> {
        drop(self.list);
        match self.local {
            Some(local) => local.stop().await,
            None => Ok(()),
        }
    }
}

fn path_from_env(name: &str, default: &str) -> PathBuf {
    std::env::var_os(name).filter(|v| !v.is_empty()).map_or_else(|| default.into(), PathBuf::from)
}

/// An agent that was started for one command. It drains and exits when its stdin closes, so it never outlives us.
#[derive(Debug)]
struct LocalAgent {
    child: Child,
    /// Its stderr: a file in memory. Unlike a pipe it can be written to after we were killed, while the agent drains.
    log: File,
}

impl LocalAgent {
    async fn start(socket: &Path, state: &Path) -> Result<Self> {
        let executable = agent_executable()?;
        let log = File::from(memfd_create(c"squall-agent.log", MFdFlags::MFD_CLOEXEC)?);
        let child = Command::new(&executable)
            .arg("--socket")
            .arg(socket)
            .arg("--state-dir")
            .arg(state)
            .arg("--exit-on-stdin-eof")
            // Nobody knows of this agent for long enough to scrape it, and the port may be taken.
            .args(["--metrics", "off"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log.try_clone()?)
            // Ctrl-C in the terminal is for us: we revert first, and stop the agent after.
            .process_group(0)
            .spawn()
            .with_context(|| format!("could not start {}", executable.display()))?;
        let mut local = Self { child, log };
        let address = Address::Unix(socket.to_owned());
        let since = Instant::now();
        loop {
            if let Some(status) = local.child.try_wait()? {
                bail!("{} ended at once ({status}):\n{}", executable.display(), local.tail());
            }
            if serving(&address).await.unwrap_or(false) {
                return Ok(local);
            }
            if since.elapsed() > START {
                let tail = local.tail();
                local.stop().await?;
                bail!("{} was not ready after {START:?}:\n{tail}", executable.display());
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn log(&self) -> String {
        let mut bytes = vec![0; self.log.metadata().map_or(0, |m| m.len() as usize)];
        // The offset is the agent's, which goes on writing there.
        match self.log.read_exact_at(&mut bytes, 0) {
            Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) => format!("the log cannot be read: {e}\n"),
        }
    }

    fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines.iter().skip(lines.len().saturating_sub(8));
        last.fold(String::new(), |text, line| text + "  " + line + "\n")
    }

    async fn stop(mut self) -> Result<()> {
        if let Some(pid) = self.child.id() {
            // It may have ended by itself; then there is nobody to tell.
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        }
        match timeout(DRAIN, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => bail!("the local agent ended with {status}:\n{}", self.tail()),
            Ok(Err(e)) => Err(e).context("could not wait for the local agent"),
            Err(_) => {
                self.child.kill().await?;
                bail!("the local agent did not drain within {DRAIN:?} and was killed:\n{}", self.tail())
            }
        }
    }
}

/// `$SQUALL_AGENT`, else `squall-agent` next to this executable, else in `$PATH`.
fn agent_executable() -> Result<PathBuf> {
    const NAME: &str = "squall-agent";
    if let Some(path) = std::env::var_os("SQUALL_AGENT").filter(|v| !v.is_empty()) {
        return Ok(path.into());
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(NAME)));
    let in_path = std::env::var_os("PATH")
        .into_iter()
        .flat_map(|path| std::env::split_paths(&path).map(|dir| dir.join(NAME)).collect::<Vec<_>>());
    beside
        .into_iter()
        .chain(in_path)
        .find(|path| path.is_file())
        .ok_or_else(|| anyhow!("no `{NAME}` next to squall or in PATH; install it, or set SQUALL_AGENT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("unix:///run/squall/agent.sock", Address::Unix("/run/squall/agent.sock".into()))]
    #[case("http://127.0.0.1:7400", Address::Tcp("127.0.0.1:7400".into()))]
    #[case("http://[::1]:7400/", Address::Tcp("[::1]:7400".into()))]
    #[case("https://10.0.0.7:7400/", Address::Tls("10.0.0.7:7400".into(), Tls::default()))]
    #[case("http://localhost:7400", Address::Tcp("localhost:7400".into()))]
    fn addresses(#[case] text: &str, #[case] expected: Address) {
        assert_eq!(text.parse::<Address>(), Ok(expected));
    }

    #[rstest::rstest]
    #[case("http://10.0.0.7:7400", "plain TCP to 10.0.0.7 is refused")]
    #[case("http://example.com:7400", "plain TCP to example.com is refused")]
    #[case("http://127.0.0.1", "no port")]
    #[case("https://node-1", "no port")]
    #[case("unix://run/agent.sock", "the path of a socket is absolute")]
    #[case("127.0.0.1:7400", "expected unix://")]
    fn refused_addresses(#[case] text: &str, #[case] why: &str) {
        let error = text.parse::<Address>().expect_err("refused");
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn a_token_is_read_anew_for_each_call_and_goes_to_https_alone() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let tls = Tls { token: Some(file.path().to_owned()), ..Tls::default() };
        let shown = |bearer: &mut Bearer| {
            let request = bearer.call(Request::new(())).expect("never fails");
            request
                .metadata()
                .get("authorization")
                .map(|v| (v.to_str().expect("text").to_owned(), v.is_sensitive()))
        };
        let mut bearer = Bearer::of(&Address::Tls("node-1:7400".into(), tls.clone()));
        for (content, expected) in
            [("one\n", Some("Bearer one")), ("two", Some("Bearer two")), ("", None), ("a b", None)]
        {
            fs::write(file.path(), content).expect("written");
            assert_eq!(shown(&mut bearer), expected.map(|text| (text.to_owned(), true)));
        }
        fs::write(file.path(), "one").expect("written");
        let mut plain = Bearer::of(&Address::Tcp("127.0.0.1:7400".into()).with(&tls));
        assert_eq!(shown(&mut plain), None);
    }

    #[test]
    fn a_refusal_is_not_a_loss() {
        let of = |code| CallError::of("n", &Status::new(code, "why"));
        assert!(matches!(of(Code::InvalidArgument), CallError::Refused { .. }));
        assert!(matches!(of(Code::NotFound), CallError::NotThere { .. }));
        assert!(matches!(of(Code::Internal), CallError::Failed { .. }));
        assert!(matches!(of(Code::Unknown), CallError::Failed { .. }));
        assert!(matches!(of(Code::Unavailable), CallError::Lost { .. }));
    }
}
