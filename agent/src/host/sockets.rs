//! What the established TCP sockets of a network namespace report about themselves, over NETLINK_SOCK_DIAG.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rtnetlink::{
    packet_core::{
        NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
        NetlinkSerializable, NlasIterator,
    },
    sys::{self, Socket, protocols::NETLINK_SOCK_DIAG},
};

use super::netns::Netns;

/// Most sockets that are read at once. A namespace that has more of them shows these many, the kernel chooses which.
pub const MOST: usize = 10_000;

/// An established TCP socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpSocket {
    /// Its own end. IPv4 also where the socket is an IPv6 one that speaks IPv4.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// Smoothed round-trip time, to the microsecond; zero where nothing has been measured yet.
    pub rtt: Duration,
    /// Segments sent again since it was opened.
    pub retransmits: u32,
    /// Bytes that the peer has acknowledged since it was opened.
    pub bytes_acked: u64,
    /// Tells it from any other socket since boot, as `SO_COOKIE` and `bpf_get_socket_cookie` do.
    pub cookie: u64,
    /// The cgroup v2 it was made in, by the inode of its directory; from Linux 5.9 on.
    pub cgroup: Option<u64>,
}

/// The established TCP sockets of a namespace, IPv4 and IPv6, at most [`MOST`]. Sockets that come and go meanwhile may
/// be missing.
///
/// Fails where the namespace cannot be entered, or the kernel has no tcp_diag (`CONFIG_INET_DIAG`).
pub fn established(netns: &Netns) -> Result<Vec<TcpSocket>> {
    let list = || {
        let mut sockets = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            dump(request(family as u8, libc::IPPROTO_TCP as u8, TCP_ESTABLISHED), &mut sockets, parse)?;
        }
        Ok(sockets)
    };
    netns.run(list).with_context(|| format!("listing the TCP sockets of net:[{}]", netns.inode()))
}

/// `SOCK_DIAG_BY_FAMILY` [include/uapi/linux/sock_diag.h, 6.1].
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Length of `struct inet_diag_msg`, behind which the attributes begin. The kinds of attributes, this structure and the
/// request are in include/uapi/linux/inet_diag.h, 6.1.
const INET_DIAG_MSG: usize = 72;
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_CGROUP_ID: u16 = 21;
/// `TCP_ESTABLISHED` [include/net/tcp_states.h, 6.1].
const TCP_ESTABLISHED: u32 = 1;

/// `TCP_LISTEN`, and `TCP_CLOSE`, which is the state of a UDP socket without a peer.
const TCP_LISTEN: u32 = 10;
const TCP_CLOSE: u32 = 7;

/// A port on which a socket takes packets from anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    /// TCP; otherwise UDP.
    pub tcp: bool,
    /// The port.
    pub port: u16,
    /// The id of the socket's cgroup (v2), from Linux 5.9 on.
    pub cgroup: Option<u64>,
}

/// The listening TCP and unconnected UDP sockets of a namespace, IPv4 and IPv6, at most [`MOST`] of each.
///
/// Fails where the namespace cannot be entered, or the kernel has neither tcp_diag nor udp_diag; where it has one of them,
/// those of the other are missing.
pub fn listeners(netns: &Netns) -> Result<Vec<Listener>> {
    let of = |protocol: i32, state: u32| {
        let mut listeners = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut some = Vec::new();
            dump(request(family as u8, protocol as u8, state), &mut some, |body| {
                let port = u16::from_be_bytes(field(body, 4)?);
                Some(Listener { tcp: protocol == libc::IPPROTO_TCP, port, cgroup: cgroup(body) })
            })?;
            listeners.extend(some);
        }
        anyhow::Ok(listeners)
    };
    let list = || match [of(libc::IPPROTO_TCP, TCP_LISTEN), of(libc::IPPROTO_UDP, TCP_CLOSE)] {
        [Ok(tcp), Ok(udp)] => Ok([tcp, udp].concat()),
        [Ok(some), Err(error)] | [Err(error), Ok(some)] => {
            tracing::warn!("who listens is known for one of TCP and UDP only: {error:#}");
            Ok(some)
        }
        [Err(error), Err(_)] => Err(error),
    };
    netns.run(list).with_context(|| format!("listing who listens in net:[{}]", netns.inode()))
}

/// `struct inet_diag_req_v2`: family, protocol, extensions, states, and an empty socket identity, which matches any.
fn request(family: u8, protocol: u8, state: u32) -> Vec<u8> {
    let mut request = vec![family, protocol, 1 << (INET_DIAG_INFO - 1), 0];
    request.extend((1_u32 << state).to_ne_bytes());
    request.resize(56, 0);
    request
}

/// Adds what the sockets asked for in the calling thread's namespace say.
fn dump<T>(request: Vec<u8>, sockets: &mut Vec<T>, parse: impl Fn(&[u8]) -> Option<T>) -> Result<()> {
    let mut netlink = Socket::new(NETLINK_SOCK_DIAG).context("opening a netlink socket")?;
    netlink.bind_auto().context("binding a netlink socket")?;
    netlink.connect(&sys::SocketAddr::new(0, 0)).context("connecting a netlink socket")?;

    let mut message = NetlinkMessage::from(Body(request));
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    netlink.send(&bytes, 0).context("sending to netlink")?;

    loop {
        let (bytes, _) = netlink.recv_from_full().context("receiving from netlink")?;
        if take(&bytes, sockets, &parse)? {
            return Ok(());
        }
    }
}

/// Adds what the sockets in one of netlink's datagrams say. Whether it was the last, or there are enough.
pub fn take<T>(datagram: &[u8], sockets: &mut Vec<T>, parse: impl Fn(&[u8]) -> Option<T>) -> Result<bool> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let reply = NetlinkMessage::<Body>::deserialize(rest).context("reading what netlink sent")?;
        let length = (reply.header.length as usize).next_multiple_of(4).clamp(16, rest.len());
        rest = &rest[length..];
        match reply.payload {
            NetlinkPayload::InnerMessage(Body(body)) => sockets.extend(parse(&body)),
            // A list that ends in an error says so here: ENOENT where there is no tcp_diag.
            NetlinkPayload::Done(done) if done.code < 0 => {
                return Err(answered(done.code));
            }
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(e) => return Err(answered(e.raw_code())),
            _ => bail!("netlink lost messages"),
        }
        if sockets.len() >= MOST {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The error that netlink's negative number stands for.
fn answered(code: i32) -> anyhow::Error {
    anyhow::Error::new(io::Error::from_raw_os_error(code.saturating_neg())).context("the kernel's answer")
}

/// A socket, from `struct inet_diag_msg` and its attributes; none where it reports no `struct tcp_info`.
pub fn parse(body: &[u8]) -> Option<TcpSocket> {
    let (message, attributes) = body.split_at_checked(INET_DIAG_MSG)?;
    let end = |port: usize, address: usize| {
        let ip = if i32::from(message[0]) == libc::AF_INET {
            IpAddr::from(field::<4>(message, address)?)
        } else {
            IpAddr::from(field::<16>(message, address)?).to_canonical()
        };
        Some(SocketAddr::new(ip, u16::from_be_bytes(field(message, port)?)))
    };
    // Offsets in struct tcp_info [include/uapi/linux/tcp.h, 6.1]; the kernel only ever adds at its end.
    let info = attribute(attributes, INET_DIAG_INFO)?;
    Some(TcpSocket {
        local: end(4, 8)?,
        peer: end(6, 24)?,
        rtt: Duration::from_micros(u32::from_ne_bytes(field(&info, 68)?).into()), // tcpi_rtt
        retransmits: u32::from_ne_bytes(field(&info, 100)?),                      // tcpi_total_retrans
        bytes_acked: u64::from_ne_bytes(field(&info, 120)?),                      // tcpi_bytes_acked
        // Two 32-bit words, the lower one first [sock_diag_save_cookie in net/core/sock_diag.c, 6.1].
        cookie: u64::from(u32::from_ne_bytes(field(message, 44)?))
            | u64::from(u32::from_ne_bytes(field(message, 48)?)) << 32,
        cgroup: cgroup(body),
    })
}

fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    let mut all = NlasIterator::new(attributes).filter_map(Result::ok);
    all.find(|nla| nla.kind() == kind).map(|nla| nla.value().to_vec())
}

/// The id of a socket's cgroup, behind its `struct inet_diag_msg`.
fn cgroup(body: &[u8]) -> Option<u64> {
    let id = attribute(body.get(INET_DIAG_MSG..)?, INET_DIAG_CGROUP_ID)?;
    Some(u64::from_ne_bytes(field(&id, 0)?))
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// What follows the header of a netlink message, as it is.
struct Body(Vec<u8>);

impl NetlinkSerializable for Body {
    fn message_type(&self) -> u16 {
        SOCK_DIAG_BY_FAMILY
    }

    fn buffer_len(&self) -> usize {
        self.0.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0);
    }
}

impl From<Body> for NetlinkPayload<Body> {
    fn from(body: Body) -> Self {
        Self::InnerMessage(body)
    }
}

impl NetlinkDeserializable for Body {
    type Error = Infallible;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self(payload.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        os::unix::fs::MetadataExt,
        path::Path,
        process::Command,
    };

    use super::*;
    use crate::host::netns::run_in_new;

    /// Found by fuzzing: netlink's own crate negated it with an overflow.
    #[test]
    fn the_least_number_is_an_error_like_any_other() {
        for kind in [2_u16, 3] {
            let mut message = [0; 36];
            message[0] = 36;
            message[4..6].copy_from_slice(&kind.to_ne_bytes());
            message[16..20].copy_from_slice(&i32::MIN.to_ne_bytes());
            assert!(take(&message, &mut Vec::new(), parse).is_err());
        }
    }

    #[test]
    fn a_message_cut_short_is_no_socket() {
        let mut body = vec![0; INET_DIAG_MSG];
        body[0] = libc::AF_INET as u8;
        assert_eq!(parse(&body), None);
        body.extend([132, 0, 2, 0]); // an INET_DIAG_INFO of 128 bytes
        body.resize(INET_DIAG_MSG + 4 + 128, 1);
        assert!(parse(&body).is_some_and(|socket| socket.cgroup.is_none()));
        for length in 0..body.len() {
            assert_eq!(parse(&body[..length]), None, "{length}");
        }
    }

    /// Needs root: these make network namespaces.
    mod privileged {
        use super::*;

        #[test]
        fn connections_of_the_namespace_report_their_rtt() -> Result<()> {
            let (netns, listeners, streams) = run_in_new(|| {
                assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status()?.success());
                let path = Path::new("/proc/thread-self/ns/net");
                let netns = Netns::find(path, fs::metadata(path)?.ino())?.context("just made")?;
                // The last is an IPv6 socket that speaks IPv4.
                let listeners = ["127.0.0.1:0", "[::1]:0", "[::]:0"].map(TcpListener::bind);
                let listeners = listeners.into_iter().collect::<io::Result<Vec<_>>>()?;
                let ends = [
                    listeners[0].local_addr()?,
                    listeners[1].local_addr()?,
                    SocketAddr::new([127, 0, 0, 1].into(), listeners[2].local_addr()?.port()),
                ];
                let streams = ends.into_iter().map(TcpStream::connect).collect::<io::Result<Vec<_>>>()?;
                Ok((netns, listeners, streams))
            })?;
            for (mut client, listener) in streams.iter().zip(&listeners) {
                let (mut server, peer) = listener.accept()?;
                for _ in 0..100 {
                    client.write_all(&[7; 100])?;
                    server.read_exact(&mut [0; 100])?;
                    server.write_all(&[8; 10])?;
                    client.read_exact(&mut [0; 10])?;
                }
                let sockets = established(&netns)?;
                let found = |local: SocketAddr, peer: SocketAddr| {
                    let found: Vec<_> =
                        sockets.iter().filter(|s| s.local == local && s.peer == peer).collect();
                    assert_eq!(found.len(), 1, "{local} to {peer} in {sockets:?}");
                    found[0].clone()
                };
                let (here, there) = (client.local_addr()?, client.peer_addr()?);
                assert_eq!(peer.ip().to_canonical(), here.ip());
                for (socket, acked) in [(found(here, there), 10_000), (found(there, here), 1_000)] {
                    assert!(socket.rtt > Duration::ZERO && socket.rtt < Duration::from_secs(1), "{socket:?}");
                    // The SYN counts for one; the last segment may not be acknowledged yet.
                    assert!((acked - 100..=acked + 1).contains(&socket.bytes_acked), "{socket:?}");
                    assert_eq!(socket.retransmits, 0, "{socket:?}");
                    assert!(socket.cgroup.is_some(), "{socket:?}");
                    let again = established(&netns)?;
                    let same: Vec<_> = again.iter().filter(|s| s.cookie == socket.cookie).collect();
                    assert!(same.len() == 1 && same[0].local == socket.local, "{socket:?} in {again:?}");
                }
            }
            let own = Netns::find(Path::new("/proc/self/ns/net"), fs::metadata("/proc/self/ns/net")?.ino())?;
            let elsewhere = established(&own.context("there is one")?)?;
            let ours: Vec<_> = streams.iter().filter_map(|stream| stream.local_addr().ok()).collect();
            assert!(elsewhere.iter().all(|socket| !ours.contains(&socket.local)), "{elsewhere:?}");
            Ok(())
        }
    }
}
