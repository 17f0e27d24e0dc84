//! `squall-agent`: build, run, drain. No logic.

#![cfg_attr(feature = "fuzz", no_main, allow(dead_code, reason = "nothing runs but what is fuzzed"))]

mod access;
mod clean;
mod cost;
mod crash;
mod engine;
mod fault;
mod frame;
#[cfg(any(feature = "fuzz", test))]
#[path = "../../tests/fuzz/agent.rs"]
mod fuzz;
mod host;
mod journal;
mod limits;
mod metrics;
mod pods;
mod sample;
mod server;
mod stop;
mod stress;
mod target;
mod time;
mod upgrade;

use std::{
    fs,
    io::{self, Read},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, PermissionsExt, chown},
    os::unix::net::UnixStream as StdUnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use squall_proto::v1::agent_server::AgentServer;
use tokio::{
    net::UnixListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tonic::transport::Server;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

use crate::{
    access::{
        Access,
        audit::{self, Entry},
        listen::{self, PING},
    },
    engine::Engine,
    fault::{AnyFault, KINDS},
    journal::Journal,
    limits::{KUBE_SYSTEM, Limits, POD_LOGS, Pattern, share},
    stop::Stop,
    upgrade::{Known, Upgrade},
};

/// Longest message a client may send, bytes.
const LARGEST_MESSAGE: usize = 1 << 20;
/// Longest headers of a call, bytes.
const LARGEST_HEADERS: u32 = 16 << 10;
/// Calls and streams of one connection at once.
const MOST_STREAMS: u32 = 128;
/// Longest time for a call to be understood and answered, streams apart.
const LONGEST_CALL: Duration = Duration::from_mins(1);

/// How long the end of the agent waits for the audit log.
const LAST_LINE: Duration = Duration::from_secs(5);

/// The node daemon that injects faults and always takes them back.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A stressor; the agent starts these itself.
    #[command(hide = true)]
    Stress(stress::Args),
    /// Measure what a packet pays that no fault is about, in a network namespace of its own, and exit. Needs root.
    Cost(cost::Args),
    /// Look into the audit log of an agent
    Audit(audit::Args),
    /// Take back what a dead agent left on this host, and exit. Refuses while an agent lives. Needs root.
    Clean(clean::Args),
    /// Print the points at which a test can kill this agent.
    #[cfg(feature = "crash-points")]
    CrashPoints,
}

#[derive(Debug, clap::Args)]
struct Run {
    /// Unix socket to serve gRPC on; for root alone, unless there is a --socket-group
    #[arg(long, default_value = "/run/squall/agent.sock", value_name = "PATH")]
    socket: PathBuf,
    /// Directory of the undo journal; one agent at a time
    #[arg(long, default_value = "/var/lib/squall", value_name = "DIR")]
    state_dir: PathBuf,
    /// Loopback address for Prometheus, or "off"
    #[arg(long, default_value = "127.0.0.1:9723", value_name = "ADDR|off", value_parser = metrics_address)]
    metrics: MetricsAddress,
    /// Form of the log lines on stderr
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log: LogFormat,
    /// Drain and exit when standard input closes: the agent then lives no longer than who started it
    #[arg(long)]
    exit_on_stdin_eof: bool,
    /// What becomes of live injections when another agent takes this one's place
    ///
    /// With take-over SIGTERM reverts them as always, and writes down how to go on; the next agent on the same state directory, also
    /// with take-over, injects them again, to end when they would have ended, where lease and deadline have not passed, the
    /// target is the same, and its limits allow it. Any other end (SIGINT, SIGKILL, end of input) is for good.
    #[arg(long, value_enum, default_value_t = Upgrade::End)]
    upgrade: Upgrade,
    /// Longest time an injection may ask for
    #[arg(long, default_value = "3600", value_name = "SECONDS")]
    longest: u64,
    /// Most live injections at once
    #[arg(long, default_value_t = 32, value_name = "N")]
    most_injections: usize,
    /// Allow network faults without peers on the node's own interfaces: they hit SSH and the kubelet too
    #[arg(long)]
    allow_whole_node_network: bool,
    #[command(flatten)]
    access: access::Options,
    /// Protect these processes too: the name of an executable (etcd, kube-*), or an absolute path of an executable or
    /// a cgroup with all below it. Repeatable; pid 1, what runs and reaches the node, and this agent always are
    #[arg(long, value_name = "PATTERN")]
    protect: Vec<Pattern>,
    /// Protect the pods of this namespace of Kubernetes, as those of kube-system always are. Repeatable
    #[arg(long, value_name = "NAME")]
    protect_namespace: Vec<String>,
    /// Where the kubelet keeps the logs of pods, which say whose namespace a pod is of
    #[arg(long, default_value = POD_LOGS, value_name = "DIR")]
    pod_logs: PathBuf,
    /// Largest share of this node's pods that may be hurt at once
    #[arg(long, default_value = "100%", value_name = "SHARE", value_parser = share)]
    most_pods: f64,
    /// The zone this node is in, for the limits of plans
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME", env = "SQUALL_ZONE")]
    zone: String,
}

#[derive(Debug, Clone)]
struct MetricsAddress(Option<SocketAddr>);

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn metrics_address(text: &str) -> Result<MetricsAddress, String> {
    if text == "off" {
        return Ok(MetricsAddress(None));
    }
    text.parse()
        .map(|a| MetricsAddress(Some(a)))
        .map_err(|_| "write 127.0.0.1:PORT, [::1]:PORT or off".to_owned())
}

fn main() -> ExitCode {
    host::memory::one_arena();
    let cli = Cli::parse();
    if let Some(Command::Stress(args)) = cli.command {
        return stress::main(&args);
    }
    #[cfg(feature = "crash-points")]
    if let Some(Command::CrashPoints) = cli.command {
        println!("{}", crash::POINTS.join("\n"));
        return ExitCode::SUCCESS;
    }
    start_log(cli.run.log);
    raise_open_files();
    // While there is one thread. A log is read by whoever may.
    if !matches!(cli.command, Some(Command::Audit(_)))
        && let Err(e) = host::cgroup::enter_first()
    {
        warn!(
            "cannot enter the node's cgroup namespace, so cgroups of other containers may be out of reach: {e}"
        );
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let done = runtime.context("start the runtime").and_then(|runtime| match cli.command {
        Some(Command::Cost(args)) => {
            runtime.block_on(async { tokio::task::block_in_place(|| cost::main(&args)) })
        }
        Some(Command::Audit(args)) => audit::main(&args),
        Some(Command::Clean(args)) => runtime.block_on(clean::main(&args)),
        _ => runtime.block_on(run(cli.run)),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Takes back the low limit that select() needs: without descriptors nothing can be reverted.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        warn!("the limit of open files stays as it is: {e}");
    }
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("SQUALL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

async fn run(args: Run) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("squall-agent needs root: it loads eBPF programs and enters namespaces and cgroups");
    }
    if let Some(offset) = time::boot_offset().filter(|offset| *offset != "0 0") {
        bail!(
            "this time namespace shifts CLOCK_BOOTTIME by {offset} (s, ns), so leases would end at another time than in the \
             kernel; run squall-agent outside of it"
        );
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut stdin_closed = if args.exit_on_stdin_eof { stdin_closed() } else { mpsc::channel(1).1 };

    let journal = Journal::open(&args.state_dir)?;
    let limits = Limits {
        longest: Duration::from_secs(args.longest),
        most_injections: args.most_injections,
        whole_node_network: args.allow_whole_node_network,
        protect: args.protect,
        protect_namespaces: [KUBE_SYSTEM.to_owned()].into_iter().chain(args.protect_namespace).collect(),
        pod_logs: args.pod_logs,
        most_pods: args.most_pods,
        ..Limits::default()
    };
    let engine = Engine::new(journal, limits, Stop::new(&args.state_dir))?;
    engine.replay(KINDS).await?;

    if let Some(address) = args.metrics.0 {
        metrics::serve(address, engine.clone()).await?;
    }
    tokio::spawn(obey_stop(engine.clone(), signal(SignalKind::user_defined1())?));
    let access = Access::new(&args.access, &args.state_dir)?;
    let audit = access.audit.clone();
    let reason = format!("squall-agent {} started", env!("CARGO_PKG_VERSION"));
    audit.note(Entry { method: "start".to_owned(), reason, ..Entry::default() });
    let local = listen::local(listen(&args.socket, args.access.socket_group)?);
    let remote = access::listen(&args.access).await?;
    if let Some((_, address)) = &remote {
        fault::keep_open(address.port());
    }
    // Before anybody is served: who asks for an injection finds it live or learns why it is not.
    upgrade::resume(&engine, &audit, args.upgrade, &Known { kinds: KINDS, parse: AnyFault::parse }).await;
    let (health_reporter, health) = tonic_health::server::health_reporter();
    let service = AgentServer::new(server::Server::new(engine.clone(), audit.clone(), args.zone).await)
        .max_decoding_message_size(LARGEST_MESSAGE);
    health_reporter.set_serving::<AgentServer<server::Server>>().await;
    let mut server = Server::builder()
        .layer(access)
        .timeout(LONGEST_CALL)
        .http2_max_header_list_size(LARGEST_HEADERS)
        .max_concurrent_streams(MOST_STREAMS);
    let mut serving = JoinSet::new();
    if let Some((remote, address)) = remote {
        let mut server =
            server.clone().http2_keepalive_interval(Some(PING)).http2_keepalive_timeout(Some(PING));
        let server = server.add_service(health.clone()).add_service(service.clone());
        serving.spawn(server.serve_with_incoming(remote));
        info!(%address, "serving remote clients");
    }
    serving.spawn(server.add_service(health).add_service(service).serve_with_incoming(local));
    info!(socket = %args.socket.display(), "serving");

    let mut served = Ok(());
    let why = tokio::select! {
        Some(ended) = serving.join_next() => {
            served = ended.map_err(Into::into).and_then(|ended| ended.context("serve gRPC"));
            "the server ended"
        }
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        Some(()) = stdin_closed.recv() => "standard input closed",
    };
    info!(why, "draining");
    drop(serving);
    let stuck = if (args.upgrade, why) == (Upgrade::TakeOver, "SIGTERM") {
        engine.hand_over().await
    } else {
        engine.drain("the agent was stopped").await
    };
    let _gone = fs::remove_file(&args.socket);
    // Behind this line nothing waits any more.
    let stop = Entry { method: "stop".to_owned(), reason: why.to_owned(), ..Entry::default() };
    let _failed_or_slow = timeout(LAST_LINE, audit.record(stop)).await;
    if !stuck.is_empty() {
        let ids: Vec<_> = stuck.into_iter().map(|i| i.id).collect();
        bail!("could not revert {}; the journal keeps them for the next start", ids.join(", "));
    }
    info!("drained, nothing left behind");
    served
}

/// Stops where the file says so, or SIGUSR1.
async fn obey_stop(engine: Engine, mut asked: Signal) {
    let by_signal = async {
        while asked.recv().await.is_some() {
            if let Err(e) = engine.stop().await {
                error!("{e:#}");
            }
        }
    };
    tokio::join!(engine.obey_stop(), by_signal);
}

/// Binds the socket so that only root can connect, and a group where one is given. Takes the place of a dead agent's
/// socket, never of a living one's.
fn listen(path: &Path, group: Option<u32>) -> Result<UnixListener> {
    if StdUnixStream::connect(path).is_ok() {
        bail!("another agent answers on {}; talk to that one, or give --socket", path.display());
    }
    let (directory, socket) = if group.is_some() { (0o710, 0o660) } else { (0o700, 0o600) };
    if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
        let made = fs::DirBuilder::new().recursive(true).mode(directory).create(dir);
        made.and_then(|()| chown(dir, None, group)).with_context(|| format!("make {}", dir.display()))?;
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("remove the old socket {}", path.display()));
        }
        _ => {}
    }
    // The mask makes it 0600 from its first moment; the mode is set too, in case the file system ignores the mask.
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(mask);
    let listener = listener.with_context(|| format!("listen on {}", path.display()))?;
    chown(path, None, group).with_context(|| format!("--socket-group: {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(socket))?;
    Ok(listener)
}

/// Says so once standard input is at its end.
fn stdin_closed() -> mpsc::Receiver<()> {
    let (closed, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = [0; 256];
        while !matches!(stdin.read(&mut buffer), Ok(0) | Err(_)) {}
        let _draining_already = closed.blocking_send(());
    });
    receiver
}
