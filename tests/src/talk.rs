//! Sockets in namespaces, both ends in one hand: what a user of the network would see.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::Netns;

/// The longest anything is waited for that has to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Sockets in a namespace. They stay there, whoever uses them.
pub trait Sockets {
    /// Listens on a port of every address, IPv4 and IPv6.
    fn listen(&self, port: u16) -> Result<TcpListener>;
    /// Connects within this time.
    fn connect(&self, to: SocketAddr, most: Duration) -> Result<io::Result<TcpStream>>;
    /// A UDP socket with a port of every address of a family.
    fn udp(&self, like: IpAddr, port: u16) -> Result<UdpSocket>;
    /// Runs ping with these words; round-trip times of the answers in milliseconds, and all that it said.
    fn ping_with(&self, words: &str) -> Result<(Vec<f64>, String)>;
    /// The median of a few pings with these words, milliseconds.
    fn rtt_with(&self, words: &str) -> Result<f64>;
    /// A number in this namespace's /proc/net/snmp: `Tcp`, `InCsumErrors`.
    fn snmp(&self, protocol: &str, name: &str) -> Result<u64>;
}

impl Sockets for Netns {
    fn listen(&self, port: u16) -> Result<TcpListener> {
        self.inside(|| {
            TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
                .with_context(|| format!("listening on port {port}"))
        })
    }

    fn connect(&self, to: SocketAddr, most: Duration) -> Result<io::Result<TcpStream>> {
        self.inside(|| {
            let stream = TcpStream::connect_timeout(&to, most);
            if let Ok(stream) = &stream {
                ready(stream)?;
            }
            Ok(stream)
        })
    }

    fn udp(&self, like: IpAddr, port: u16) -> Result<UdpSocket> {
        self.inside(|| {
            let any = if like.is_ipv4() { "0.0.0.0" } else { "::" };
            let socket = UdpSocket::bind((any, port)).with_context(|| format!("taking UDP port {port}"))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        })
    }

    fn ping_with(&self, words: &str) -> Result<(Vec<f64>, String)> {
        let mut command = self.command("ping");
        command.arg("-n").args(words.split_whitespace()).stdin(Stdio::null());
        let done = command.output().context("cannot start ping")?;
        let said =
            [done.stdout, done.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        // Status 1 says that not all was answered, which is an answer here.
        ensure!(matches!(done.status.code(), Some(0 | 1)), "{command:?} failed ({}): {said}", done.status);
        let times =
            said.split(" time=").skip(1).filter_map(|rest| rest.split_whitespace().next()?.parse().ok());
        let mut rtts: Vec<f64> = times.collect();
        rtts.sort_by(f64::total_cmp);
        Ok((rtts, said))
    }

    fn rtt_with(&self, words: &str) -> Result<f64> {
        let (rtts, said) = self.ping_with(&format!("-c 5 -i 0.05 -W 2 {words}"))?;
        ensure!(rtts.len() >= 3, "{} of 5 pings were answered: {said}", rtts.len());
        Ok(rtts[rtts.len() / 2])
    }

    fn snmp(&self, protocol: &str, name: &str) -> Result<u64> {
        // Of this thread: the process is in another namespace.
        let text = self.inside(|| Ok(std::fs::read_to_string("/proc/thread-self/net/snmp")?))?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(": "));
        let (names, values) = (lines.next().context("no names")?, lines.next().context("no values")?);
        let mut pairs = names.split_whitespace().zip(values.split_whitespace());
        let (_, value) = pairs.find(|(n, _)| *n == name).with_context(|| format!("no {protocol} {name}"))?;
        Ok(value.parse()?)
    }
}

fn ready(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

/// Both ends of a TCP connection.
#[derive(Debug)]
pub struct Pair {
    /// The end that connected.
    pub client: TcpStream,
    /// The end that was listening.
    pub server: TcpStream,
    /// How long the handshake took.
    pub handshake: Duration,
}

impl Pair {
    /// Connects from a namespace to a listener, which has this address.
    pub fn new(from: &Netns, listener: &TcpListener, address: IpAddr) -> Result<Self> {
        let to = SocketAddr::new(address, listener.local_addr()?.port());
        let started = Instant::now();
        let client = from.connect(to, PATIENCE)?.with_context(|| format!("connecting to {to}"))?;
        let handshake = started.elapsed();
        let (server, _) = listener.accept()?;
        ready(&server)?;
        Ok(Self { client, server, handshake })
    }

    /// Sends a word there and back, and says how long that took.
    pub fn exchange(&mut self) -> io::Result<Duration> {
        let started = Instant::now();
        let mut word = [0; 4];
        self.client.write_all(b"ping")?;
        self.server.read_exact(&mut word)?;
        self.server.write_all(b"pong")?;
        self.client.read_exact(&mut word)?;
        Ok(started.elapsed())
    }

    /// The client closes its side: how long until the server sees that.
    pub fn close(mut self) -> Result<Duration> {
        let started = Instant::now();
        self.client.shutdown(std::net::Shutdown::Write)?;
        let left = self.server.read(&mut [0; 16])?;
        ensure!(left == 0, "{left} bytes instead of the end");
        Ok(started.elapsed())
    }

    /// Sends so many bytes from the client to the server and ends the connection: how many of them arrived otherwise
    /// than they left. Fails unless all arrive.
    pub fn transfer(self, bytes: usize) -> Result<usize> {
        let Self { mut client, mut server, .. } = self;
        let pattern: Vec<u8> =
            (0..1_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let sent = pattern.clone();
        let sender = thread::spawn(move || {
            let mut left = bytes;
            while left > 0 {
                let part = left.min(sent.len());
                client.write_all(&sent[..part])?;
                left -= part;
            }
            client.shutdown(std::net::Shutdown::Write)?;
            // Not closed before everything is acknowledged.
            client.read(&mut [0; 1])
        });
        let (mut buffer, mut at, mut wrong) = (vec![0; 1 << 16], 0, 0);
        loop {
            let read = server.read(&mut buffer).with_context(|| format!("after {at} bytes"))?;
            if read == 0 {
                break;
            }
            wrong += (0..read).filter(|i| buffer[*i] != pattern[(at + i) % pattern.len()]).count();
            at += read;
        }
        drop(server);
        match sender.join() {
            Ok(sent) => sent?,
            Err(_) => bail!("the sender panicked"),
        };
        ensure!(at == bytes, "{at} of {bytes} bytes arrived");
        Ok(wrong)
    }
}

/// What a read of a dead connection says, waiting for it.
pub fn death(stream: &mut TcpStream) -> Result<io::ErrorKind> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => bail!("the connection was closed, not reset"),
            Ok(_) => {}
            Err(error) => return Ok(error.kind()),
        }
    }
}

/// Reads what comes to a UDP socket until nothing comes for a while: who sent each packet.
pub fn drain(socket: &UdpSocket, quiet: Duration) -> Result<Vec<SocketAddr>> {
    socket.set_read_timeout(Some(quiet))?;
    let (mut all, mut buffer) = (Vec::new(), [0; 2048]);
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((_, from)) => all.push(from),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Ok(all);
            }
            Err(error) => return Err(error.into()),
        }
    }
}
