//! Numbered UDP packets from one namespace to another, and what became of each.

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::{
        prctl,
        socket::{
            ControlMessageOwned, MsgFlags, recvmsg, setsockopt,
            sockopt::{RcvBufForce, ReceiveTimestampns, SndBufForce},
        },
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

use crate::{Netns, netns::two_cpus};

/// Bytes before the payload proper: the number, three times, so that a flipped bit does not hide it.
const HEADER: usize = 24;
/// Room for what is delayed: a packet that a qdisc holds still counts as its sender's.
const BUFFER: usize = 256 << 20;

/// What is sent.
#[derive(Debug, Clone, Copy)]
pub struct Probe {
    /// How many packets.
    pub packets: u32,
    /// Bytes of payload of each, at least 24.
    pub size: usize,
    /// Time from one packet to the next; zero is as fast as possible.
    pub gap: Duration,
    /// How long to wait for the last ones.
    pub patience: Duration,
    /// The port they are sent to.
    pub port: u16,
}

/// A probe under way.
#[derive(Debug)]
pub struct Flight {
    sender: JoinHandle<Result<Vec<u64>>>,
    receiver: JoinHandle<Result<Vec<Arrival>>>,
    done: Arc<AtomicBool>,
    probe: Probe,
}

/// A packet that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Its number.
    pub number: u32,
    /// When the kernel took it from the wire: nanoseconds of CLOCK_MONOTONIC.
    pub at: u64,
    /// Bits of it that are not as they were sent.
    pub flipped: u32,
}

/// What became of the packets of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// When each was sent: nanoseconds of CLOCK_MONOTONIC, right before send(2).
    pub sent: Vec<u64>,
    /// Those that arrived, in order of arrival, twice if they came twice.
    pub arrivals: Vec<Arrival>,
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic() -> Result<u64> {
    now(ClockId::CLOCK_MONOTONIC)
}

fn now(clock: ClockId) -> Result<u64> {
    Ok(nanoseconds(clock_gettime(clock)?))
}

fn nanoseconds(time: TimeSpec) -> u64 {
    Duration::from(time).as_nanos() as u64
}

impl Default for Probe {
    /// 1000 small packets, 1 ms apart.
    fn default() -> Self {
        Self {
            packets: 1000,
            size: 64,
            gap: Duration::from_millis(1),
            patience: Duration::from_millis(500),
            port: 9_999,
        }
    }
}

impl Probe {
    /// Sends them all and waits for the last. `to` has the address. Fails where the receiver could not keep up.
    pub fn run(self, from: &Netns, to: &Netns, address: IpAddr) -> Result<Seen> {
        let before = to.counters()?;
        let seen = self.start(from, to, address)?.finish()?;
        let overrun = to.counters()?.grown(&before, "Udp", "RcvbufErrors")?;
        ensure!(overrun == 0, "{overrun} packets had no room in the receiver's buffer");
        Ok(seen)
    }

    /// Starts to send.
    pub fn start(self, from: &Netns, to: &Netns, address: IpAddr) -> Result<Flight> {
        ensure!(self.size >= HEADER, "a packet has at least {HEADER} bytes of payload");
        let address = SocketAddr::new(address, self.port);
        let receiver = to.inside(|| Ok(UdpSocket::bind(address)?))?;
        setsockopt(&receiver, RcvBufForce, &BUFFER)?;
        setsockopt(&receiver, ReceiveTimestampns, &true)?;
        receiver.set_read_timeout(Some(Duration::from_millis(20)))?;
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let sender = from.inside(|| Ok(UdpSocket::bind((any, 0))?))?;
        setsockopt(&sender, SndBufForce, &BUFFER)?;
        sender.connect(address)?;
        let done = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&done);
        Ok(Flight {
            receiver: thread::spawn(move || receive(&receiver, self.size, &stop)),
            sender: thread::spawn(move || self.send(&sender)),
            done,
            probe: self,
        })
    }

    fn send(self, socket: &UdpSocket) -> Result<Vec<u64>> {
        // Otherwise sleeps are 50 µs too long.
        prctl::set_timerslack(1)?;
        let mut sent = Vec::with_capacity(self.packets as usize);
        let mut packet = vec![0; self.size];
        let start = monotonic()?;
        for number in 0..self.packets {
            let due = start + self.gap.as_nanos() as u64 * u64::from(number);
            // Where it is late it catches up.
            if let Some(early) = due.checked_sub(monotonic()?) {
                thread::sleep(Duration::from_nanos(early));
            }
            fill(&mut packet, number);
            sent.push(monotonic()?);
            socket.send(&packet).with_context(|| format!("cannot send packet {number}"))?;
        }
        Ok(sent)
    }
}

impl Flight {
    /// Waits for the end.
    pub fn finish(self) -> Result<Seen> {
        let sent = self.sender.join().map_err(|_| anyhow!("the sender panicked"))?;
        if sent.is_ok() {
            thread::sleep(self.probe.patience);
        }
        self.done.store(true, Ordering::Relaxed);
        let arrivals = self.receiver.join().map_err(|_| anyhow!("the receiver panicked"))?;
        Ok(Seen { sent: sent?, arrivals: arrivals? })
    }

    /// Whether all is sent.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        self.sender.is_finished()
    }
}

fn receive(socket: &UdpSocket, size: usize, done: &AtomicBool) -> Result<Vec<Arrival>> {
    let mut arrivals = Vec::new();
    // One more, so that a packet that is too long shows.
    let mut packet = vec![0; size + 1];
    let mut space = nix::cmsg_space!(TimeSpec);
    // The kernel stamps with CLOCK_REALTIME.
    let behind = offset()?;
    loop {
        let mut parts = [IoSliceMut::new(&mut packet)];
        let (length, stamp) =
            match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()) {
                Ok(message) => {
                    let stamp = message.cmsgs()?.find_map(|message| match message {
                        ControlMessageOwned::ScmTimestampns(time) => Some(nanoseconds(time)),
                        _ => None,
                    });
                    (message.bytes, stamp.context("a packet without a time")?)
                }
                Err(Errno::EAGAIN | Errno::EINTR) if !done.load(Ordering::Relaxed) => continue,
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                Err(e) => return Err(io::Error::from(e)).context("cannot receive"),
            };
        let (number, flipped) = read(&packet[..length]).context("a packet of somebody else's")?;
        arrivals.push(Arrival { number, at: stamp.saturating_sub(behind), flipped });
    }
    let stepped = offset()?.abs_diff(behind);
    if stepped > 1_000_000 {
        bail!("the clock was stepped by {stepped} ns meanwhile");
    }
    Ok(arrivals)
}

/// How far CLOCK_MONOTONIC is behind CLOCK_REALTIME, nanoseconds: the best of a few readings, as any may be interrupted.
fn offset() -> Result<u64> {
    let mut best = (u64::MAX, 0);
    for _ in 0..20 {
        let (before, real, after) = (monotonic()?, now(ClockId::CLOCK_REALTIME)?, monotonic()?);
        let middle = u64::midpoint(before, after);
        best = best.min((after - before, real.saturating_sub(middle)));
    }
    Ok(best.1)
}

fn fill(packet: &mut [u8], number: u32) {
    let (header, rest) = packet.split_at_mut(HEADER);
    for copy in header.chunks_exact_mut(8) {
        copy.copy_from_slice(&(u64::from(number) | MARK).to_le_bytes());
    }
    for (i, byte) in rest.iter_mut().enumerate() {
        *byte = pattern(number, i);
    }
}

/// In every number, to tell our packets from others'.
const MARK: u64 = 0x5351_5541_0000_0000;

fn pattern(number: u32, i: usize) -> u8 {
    (number as usize).wrapping_mul(31).wrapping_add(i.wrapping_mul(131)) as u8
}

/// The number of a packet, and how many bits of it are wrong; nothing where it is none of ours.
fn read(packet: &[u8]) -> Option<(u32, u32)> {
    let copies: Vec<u64> = packet
        .get(..HEADER)?
        .chunks_exact(8)
        .map(|copy| u64::from_le_bytes(copy.try_into().expect("eight bytes")))
        .collect();
    let [a, b, c] = copies[..] else { return None };
    let most = (a & b) | (a & c) | (b & c);
    let number = (most ^ MARK).try_into().ok()?;
    let in_header: u32 = copies.iter().map(|copy| (copy ^ most).count_ones()).sum();
    let rest = packet[HEADER..].iter().enumerate();
    let in_rest: u32 = rest.map(|(i, byte)| (byte ^ pattern(number, i)).count_ones()).sum();
    Some((number, in_header + in_rest))
}

impl Seen {
    /// For each packet sent, whether it never arrived.
    #[must_use]
    pub fn lost(&self) -> Vec<bool> {
        let mut lost = vec![true; self.sent.len()];
        for arrival in &self.arrivals {
            if let Some(lost) = lost.get_mut(arrival.number as usize) {
                *lost = false;
            }
        }
        lost
    }

    /// How many never arrived.
    #[must_use]
    pub fn losses(&self) -> u64 {
        self.lost().iter().filter(|&&lost| lost).count() as u64
    }

    /// How many packets sent arrived more than once.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.arrivals.len() as u64 - (self.sent.len() as u64 - self.losses())
    }

    /// For each packet that arrived, the first time it did, its number and how long it took, milliseconds; by number.
    #[must_use]
    pub fn delays(&self) -> Vec<(u32, f64)> {
        let mut first = vec![None; self.sent.len()];
        for arrival in &self.arrivals {
            let number = arrival.number as usize;
            if let Some((first, sent)) = first.get_mut(number).zip(self.sent.get(number)) {
                first.get_or_insert((arrival.at.cast_signed() - sent.cast_signed()) as f64 / 1e6);
            }
        }
        (0..).zip(first).filter_map(|(number, delay)| Some((number, delay?))).collect()
    }

    /// How long the packets took, milliseconds, by number.
    #[must_use]
    pub fn times(&self) -> Vec<f64> {
        self.delays().into_iter().map(|(_, delay)| delay).collect()
    }

    /// Packets that arrived before one with a lower number.
    #[must_use]
    pub fn early(&self) -> u64 {
        let mut lowest = u32::MAX;
        let from_the_last = self.arrivals.iter().rev();
        from_the_last
            .filter(|arrival| {
                let early = arrival.number > lowest;
                lowest = lowest.min(arrival.number);
                early
            })
            .count() as u64
    }

    /// Packets that arrived with a wrong bit, and the most wrong bits that one had.
    #[must_use]
    pub fn flipped(&self) -> (u64, u32) {
        let wrong = self.arrivals.iter().filter(|arrival| arrival.flipped > 0);
        (wrong.clone().count() as u64, wrong.map(|arrival| arrival.flipped).max().unwrap_or(0))
    }

    /// Packets a second between the first and the last arrival.
    #[must_use]
    pub fn rate(&self) -> f64 {
        let times = || self.arrivals.iter().map(|arrival| arrival.at);
        match (times().min(), times().max()) {
            (Some(first), Some(last)) if last > first => {
                (self.arrivals.len() - 1) as f64 * 1e9 / (last - first) as f64
            }
            _ => 0.0,
        }
    }
}

/// The calling thread on one CPU, until this is dropped.
struct Pinned(CpuSet);

impl Pinned {
    fn to(cpu: usize) -> Result<Self> {
        let this_thread = Pid::from_raw(0);
        let before = sched_getaffinity(this_thread)?;
        let mut only = CpuSet::new();
        only.set(cpu)?;
        sched_setaffinity(this_thread, &only).with_context(|| format!("cannot go to CPU {cpu}"))?;
        Ok(Self(before))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(Pid::from_raw(0), &self.0) {
            eprintln!("a thread stays on its CPU: {error}");
        }
    }
}

/// Round-trip times of small UDP packets, one after the other, milliseconds, with a CPU for each end where there are two. `to` has
/// the address.
pub fn round_trips(from: &Netns, to: &Netns, address: IpAddr, port: u16, count: u32) -> Result<Vec<f64>> {
    let address = SocketAddr::new(address, port);
    let echo = to.inside(|| Ok(UdpSocket::bind(address)?))?;
    echo.set_read_timeout(Some(Duration::from_millis(100)))?;
    let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = from.inside(|| Ok(UdpSocket::bind((any, 0))?))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let done = AtomicBool::new(false);
    let [here, there] = two_cpus()?;
    let _pinned = Pinned::to(here)?;
    thread::scope(|scope| {
        scope.spawn(|| {
            let _pinned = Pinned::to(there);
            let mut packet = [0; 64];
            while !done.load(Ordering::Relaxed) {
                if let Ok((length, from)) = echo.recv_from(&mut packet) {
                    // What cannot be sent shows as an answer that never comes.
                    let _ = echo.send_to(&packet[..length], from);
                }
            }
        });
        let measured = (0..count).map(|number| {
            let sent = monotonic()?;
            socket.send(&number.to_le_bytes())?;
            let mut answer = [0; 4];
            while socket.recv(&mut answer).context("no answer")? != 4 || answer != number.to_le_bytes() {}
            Ok((monotonic()? - sent) as f64 / 1e6)
        });
        let measured = measured.collect();
        done.store(true, Ordering::Relaxed);
        measured
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(sent: u32, arrived: &[u32]) -> Seen {
        let arrival = |(i, &number): (usize, &u32)| Arrival {
            number,
            at: 2_000_000 + i as u64 * 1_000_000,
            flipped: u32::from(number == 3),
        };
        Seen {
            sent: (0..sent).map(|n| u64::from(n) * 1_000_000).collect(),
            arrivals: arrived.iter().enumerate().map(arrival).collect(),
        }
    }

    #[test]
    fn every_packet_is_accounted_for() {
        let seen = seen(5, &[0, 2, 1, 1, 3]);
        assert_eq!(seen.lost(), [false, false, false, false, true]);
        assert_eq!((seen.losses(), seen.duplicates(), seen.early()), (1, 1, 1));
        assert_eq!(seen.flipped(), (1, 1));
        assert_eq!(seen.delays(), [(0, 2.0), (1, 3.0), (2, 1.0), (3, 3.0)]);
        assert!((seen.rate() - 1000.0).abs() < 1e-9);
    }

    #[test]
    fn a_packet_is_known_whichever_bit_is_flipped() {
        let mut packet = vec![0; 100];
        fill(&mut packet, 70_000);
        assert_eq!(read(&packet), Some((70_000, 0)));
        for bit in 0..800 {
            let mut wrong = packet.clone();
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(&wrong), Some((70_000, 1)), "bit {bit}");
        }
        assert_eq!(read(&[0; 100]), None);
        assert_eq!(read(&packet[..20]), None);
    }
}
