//! Who gets in, and what he may do there.
//!
//! A connection has a caller, by his certificate or his uid ([`mod@listen`]), who may show a token of a service account with a
//! call ([`tokens`]); every call of it goes through one door
//! ([`layer`]), which asks the policy for his role; what he injects is held against the limits of his rule
//! ([`policy`]); and what he did, or was not let do, is written down ([`audit`]).

pub mod audit;
pub mod layer;
pub mod listen;
pub mod live;
pub mod policy;
pub mod quota;
pub mod tls;
pub mod tokens;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use tokio::net::TcpListener;

use self::{
    audit::Audit,
    listen::{Connections, Security, remote},
    live::Live,
    policy::Policy,
    tokens::Tokens,
};

/// Who gets in, from the command line.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Also serve gRPC here, for clients with a certificate of --tls-client-ca
    #[arg(
        long,
        value_name = "ADDR:PORT",
        requires_all = ["tls_cert", "tls_key", "tls_client_ca", "policy"],
        conflicts_with = "listen_insecure"
    )]
    listen: Option<SocketAddr>,
    /// Also serve gRPC here without TLS, loopback only; who calls is `loopback` in the policy
    #[arg(long, value_name = "ADDR:PORT", requires = "policy")]
    listen_insecure: Option<SocketAddr>,
    /// Certificate of this agent, PEM; read again when it changes, as are the other files here
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_cert: Option<PathBuf>,
    /// Its key, which nobody else may read
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_key: Option<PathBuf>,
    /// CA of the clients' certificates, PEM
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_client_ca: Option<PathBuf>,
    /// Who may do what, YAML. Without it root may do everything and others nothing
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Group that may connect to --socket, by its number; the policy says what its members may do
    #[arg(long, value_name = "GID", requires = "policy")]
    pub socket_group: Option<u32>,
    #[command(flatten)]
    tokens: tokens::Options,
}

/// What the door needs to know.
#[derive(Debug, Clone)]
pub struct Access {
    policy: Arc<Live<Policy>>,
    /// Where tokens are taken.
    tokens: Option<Arc<Tokens>>,
    /// The log.
    pub audit: Audit,
}

impl Access {
    /// As asked for on the command line.
    pub fn new(options: &Options, state_dir: &Path) -> Result<Self> {
        let policy = match &options.policy {
            Some(path) => {
                Live::follow(vec![path.clone()], |files| policy::load(&files[0])).context("--policy")?
            }
            None => Live::fixed(Policy::default()),
        };
        Ok(Self { policy, tokens: Tokens::new(&options.tokens)?, audit: Audit::start(state_dir)? })
    }
}

/// Listens for remote clients, where that was asked for. The port is told too: no fault of ours may close it.
pub async fn listen(options: &Options) -> Result<Option<(Connections, SocketAddr)>> {
    let (address, security) = match (options.listen, options.listen_insecure) {
        (Some(address), _) => (address, Security::Mutual(tls(options)?)),
        (None, Some(address)) if address.ip().is_loopback() => (address, Security::Loopback),
        (None, Some(address)) => bail!(
            "--listen-insecure: {address}: without TLS anyone on the way could inject faults; give a loopback address, or \
             --listen with certificates (`squall certs` makes some)"
        ),
        (None, None) => return Ok(None),
    };
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    let address = listener.local_addr()?;
    Ok(Some((remote(listener, security), address)))
}

fn tls(options: &Options) -> Result<Arc<Live<rustls::ServerConfig>>> {
    let files = [&options.tls_cert, &options.tls_key, &options.tls_client_ca];
    let paths: Vec<PathBuf> = files.into_iter().flatten().cloned().collect();
    ensure!(paths.len() == 3, "--listen needs --tls-cert, --tls-key and --tls-client-ca");
    let key = paths[1].clone();
    Live::follow(paths, move |files| {
        tls::check_key(&key)?;
        tls::server(&files[0], &files[1], &files[2])
    })
}
