//! Who may connect: connections with a known caller, and never more of them than can be served.

use std::{
    fmt, io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Result;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::mpsc,
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::{
    live::Live,
    quota::{Quota, Slot},
    tls,
};
use crate::metrics::METRICS;

/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A remote connection from which nothing comes for so long is over. Every living one answers a ping more often.
const QUIET: Duration = Duration::from_secs(30);
/// How often a remote client is asked whether he is there, and how long he may take to answer.
pub const PING: Duration = Duration::from_secs(10);
/// Longest life of a connection whose certificate says nothing shorter.
const LONGEST: Duration = Duration::from_hours(24);
/// Pause after an accept that failed: there are no file descriptors left, most likely.
const PAUSE: Duration = Duration::from_millis(100);

/// How much of one listener may be used at once, in all and by one caller.
#[derive(Debug)]
pub struct Gate {
    handshakes: Arc<Quota>,
    connections: Arc<Quota>,
    /// Calls that do not only take back.
    pub calls: Arc<Quota>,
    /// Calls of Describe, which takes back nothing and may read much.
    pub describes: Arc<Quota>,
    /// Streams, which last.
    pub streams: Arc<Quota>,
}

impl Gate {
    /// The limits of a listener. Each has its own, so that one that is full leaves the other as it is.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            handshakes: Quota::new(128, 16),
            connections: Quota::new(256, 64),
            calls: Quota::new(64, 32),
            describes: Quota::new(64, 32),
            streams: Quota::new(128, 32),
        })
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Caller {
    /// His names, in the words of the policy.
    pub names: Vec<String>,
    /// Where he comes from; empty on this host.
    from: String,
    /// The limits of the listener he came by.
    pub gate: Arc<Gate>,
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names.join(" "))?;
        if !self.from.is_empty() {
            write!(f, " at {}", self.from)?;
        }
        Ok(())
    }
}

trait Io: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Io for T {}

/// A connection whose caller is known.
pub struct Connection {
    io: Pin<Box<dyn Io>>,
    caller: Caller,
    watch: Option<Watch>,
    _slot: Slot,
}

/// When a remote connection is over.
struct Watch {
    quiet: Pin<Box<Sleep>>,
    end: Pin<Box<Sleep>>,
}

impl Watch {
    fn new(left: Duration) -> Self {
        Self { quiet: Box::pin(sleep(QUIET)), end: Box::pin(sleep(left.min(LONGEST))) }
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = self.io.as_mut().poll_read(cx, buffer);
        let Some(watch) = &mut self.watch else { return read };
        if watch.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the client's certificate has expired",
            )));
        }
        if read.is_ready() {
            watch.quiet.as_mut().reset(Instant::now() + QUIET);
        } else if watch.quiet.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client is silent")));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.io.as_mut().poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_shutdown(cx)
    }
}

/// Connections, for tonic.
pub type Connections = ReceiverStream<io::Result<Connection>>;

/// Connections of a unix socket; the kernel says who calls.
pub fn local(listener: UnixListener) -> Connections {
    let (sender, connections) = mpsc::channel(16);
    let gate = Gate::new();
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    if let Some(connection) = known(stream, &gate)
                        && sender.send(Ok(connection)).await.is_err()
                    {
                        return;
                    }
                }
                Err(e) => {
                    warn!(error = %e, "cannot accept a connection on the socket");
                    sleep(PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}

fn known(stream: UnixStream, gate: &Arc<Gate>) -> Option<Connection> {
    let name = format!("uid:{}", stream.peer_cred().ok()?.uid());
    let Some(slot) = gate.connections.take(&name) else {
        METRICS.refused("connections");
        return None;
    };
    let caller = Caller { names: vec![name], from: String::new(), gate: Arc::clone(gate) };
    Some(Connection { io: Box::pin(stream), caller, watch: None, _slot: slot })
}

/// How a remote client is known.
#[derive(Clone)]
pub enum Security {
    /// By his certificate.
    Mutual(Arc<Live<ServerConfig>>),
    /// Not at all; on loopback only.
    Loopback,
}

/// Connections of a TCP socket.
pub fn remote(listener: TcpListener, security: Security) -> Connections {
    let (sender, connections) = mpsc::channel(16);
    let gate = Gate::new();
    tokio::spawn(async move {
        while !sender.is_closed() {
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(e) => {
                    warn!(error = %e, "cannot accept a connection");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            let Some(place) = gate.handshakes.take(&network(from.ip())) else {
                METRICS.refused("handshakes");
                continue;
            };
            let (sender, security, gate) = (sender.clone(), security.clone(), Arc::clone(&gate));
            tokio::spawn(async move {
                let done = timeout(HANDSHAKE, greet(stream, from, &security, &gate)).await;
                drop(place);
                match done {
                    Ok(Ok(connection)) => {
                        let _draining = sender.send(Ok(connection)).await;
                    }
                    Ok(Err(e)) => {
                        METRICS.refused("identity");
                        debug!(%from, error = format!("{e:#}"), "not let in");
                    }
                    Err(_) => METRICS.refused("silence"),
                }
            });
        }
    });
    ReceiverStream::new(connections)
}

/// Whose handshakes are counted together: an address, in IPv6 its /64, of which one host has all.
fn network(ip: IpAddr) -> String {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).to_string(),
        ip @ IpAddr::V4(_) => ip.to_string(),
    }
}

async fn greet(
    stream: TcpStream,
    from: SocketAddr,
    security: &Security,
    gate: &Arc<Gate>,
) -> Result<Connection> {
    stream.set_nodelay(true)?;
    let (io, names, left): (Pin<Box<dyn Io>>, _, _) = match security {
        Security::Mutual(config) => {
            let stream = TlsAcceptor::from(config.get()).accept(stream).await?;
            let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let first = certificates.first().ok_or_else(|| anyhow::anyhow!("no certificate"))?;
            let subject = tls::subject(first)?;
            (Box::pin(stream), subject.names, subject.left)
        }
        Security::Loopback => (Box::pin(stream), vec!["loopback".to_owned()], LONGEST),
    };
    let slot = gate.connections.take(&names.join(" "));
    let slot =
        slot.ok_or_else(|| anyhow::anyhow!("too many connections, in all or of {}", names.join(" ")))?;
    let caller = Caller { names, from: from.to_string(), gate: Arc::clone(gate) };
    Ok(Connection { io, caller, watch: Some(Watch::new(left)), _slot: slot })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_cannot_pass_for_many() {
        let of = |ip: &str| network(ip.parse().unwrap());
        assert_eq!(of("fd99::1"), of("fd99::ffff:2"));
        assert_ne!(of("fd99::1"), of("fd99:0:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.7"), of("10.0.0.7"));
        assert_ne!(of("10.0.0.7"), of("10.0.0.8"));
    }
}
