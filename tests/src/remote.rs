//! Certificates made by `squall certs`, and connections over TCP with them.

use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpStream as StdStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
use squall_lab::{Netns, bin_dir, stdout};
use squall_proto::v1::agent_client::AgentClient;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};
use tower::service_fn;

/// A CA, a certificate for an agent on the near side of a lab, and clients.
#[derive(Debug)]
pub struct Certs {
    dir: TempDir,
}

impl Certs {
    /// Makes them. Clients are written `NAME:ROLE`.
    pub fn new(clients: &[&str]) -> Result<Self> {
        let certs = Self { dir: tempfile::tempdir()? };
        certs.issue(clients)?;
        Ok(certs)
    }

    /// Makes them anew, with the same CA.
    pub fn issue(&self, clients: &[&str]) -> Result<()> {
        let mut command = Command::new(bin_dir().join("squall"));
        command.args(["certs", "--force", "--agent", "10.99.0.1,fd99::1", "--dir"]).arg(self.dir.path());
        command.args(clients.iter().flat_map(|client| ["--client", client]));
        stdout(&mut command).map(drop)
    }

    /// A file: `ca.pem`, `NAME.pem`, `NAME-key.pem`, `policy.yaml`.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// The content of a file.
    pub fn read(&self, file: &str) -> Result<String> {
        Ok(fs::read_to_string(self.path(file))?)
    }

    /// Puts rules into the policy, in YAML.
    pub fn rules(&self, rules: &str) -> Result<()> {
        let text = format!("apiVersion: squall.dev/v1\nkind: AccessPolicy\nrules:\n{rules}");
        // As an editor does it, and whole at once.
        fs::write(self.path("policy.new"), text)?;
        Ok(fs::rename(self.path("policy.new"), self.path("policy.yaml"))?)
    }

    /// The arguments of an agent that listens there.
    #[must_use]
    pub fn listen(&self, to: SocketAddr) -> Vec<String> {
        let mut args = vec!["--listen".to_owned(), to.to_string()];
        let files = [
            ("--tls-cert", "agent.pem"),
            ("--tls-key", "agent-key.pem"),
            ("--tls-client-ca", "ca.pem"),
            ("--policy", "policy.yaml"),
        ];
        for (option, file) in files {
            args.extend([option.to_owned(), self.path(file).display().to_string()]);
        }
        args
    }

    /// What a client trusts, and no certificate of his own.
    pub fn nobody(&self) -> Result<ClientTlsConfig> {
        Ok(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.read("ca.pem")?)))
    }

    /// The same as [`Self::client`], for a client that does not speak HTTP.
    pub fn rustls(&self, name: &str) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.path("ca.pem"))?)?;
        let certificate = CertificateDer::from_pem_file(self.path(&format!("{name}.pem")))?;
        let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}-key.pem")))?;
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions()?.with_root_certificates(roots);
        Ok(Arc::new(config.with_client_auth_cert(vec![certificate], key)?))
    }

    /// What a client trusts and shows.
    pub fn client(&self, name: &str) -> Result<ClientTlsConfig> {
        let key = self.read(&format!("{name}-key.pem"))?;
        Ok(self.nobody()?.identity(Identity::from_pem(self.read(&format!("{name}.pem"))?, key)))
    }
}

/// A way to an agent, from a namespace and an address in it.
#[derive(Debug, Clone, Copy)]
pub struct Dial<'a> {
    /// Where the client is.
    pub netns: &'a Netns,
    /// His address.
    pub from: IpAddr,
    /// Where the agent listens.
    pub to: SocketAddr,
}

impl Dial<'_> {
    /// A TCP connection.
    pub fn tcp(&self) -> Result<StdStream> {
        let Self { netns, from, to } = *self;
        netns.inside(|| tcp(from, to))
    }

    /// One connection with mutual TLS. It is not made again when it is lost.
    pub async fn channel(&self, tls: ClientTlsConfig) -> Result<Channel> {
        let stream = self.tcp()?;
        stream.set_nonblocking(true)?;
        let stream = Mutex::new(Some(TcpStream::from_std(stream)?));
        let once = service_fn(move |_: Uri| {
            let stream = stream.lock().ok().and_then(|mut stream| stream.take());
            async move { stream.map(TokioIo::new).ok_or_else(|| std::io::Error::other("the connection is lost")) }
        });
        let endpoint = Endpoint::from_shared(format!("https://{}", self.to))?.tls_config(tls)?;
        let endpoint = endpoint.timeout(Duration::from_secs(30)).connect_timeout(Duration::from_secs(30));
        endpoint.connect_with_connector(once).await.with_context(|| format!("connect to {}", self.to))
    }

    /// A client with mutual TLS.
    pub async fn client(&self, tls: ClientTlsConfig) -> Result<AgentClient<Channel>> {
        Ok(AgentClient::new(self.channel(tls).await?))
    }
}

/// Connects from an address.
fn tcp(from: IpAddr, to: SocketAddr) -> Result<StdStream> {
    use std::os::fd::AsRawFd as _;
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(from, 0)))?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(fd.into())
}

/// What the binary says about an audit log, and whether it is whole.
pub fn verify_audit(file: &Path) -> Result<(bool, String)> {
    let mut command = Command::new(bin_dir().join("squall-agent"));
    let done = command.args(["audit", "verify"]).arg(file).output()?;
    let said = [done.stdout, done.stderr].concat();
    Ok((done.status.success(), String::from_utf8_lossy(&said).into_owned()))
}
