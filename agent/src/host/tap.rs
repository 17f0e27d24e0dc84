//! TAP devices whose queues in this process hold packets back, change them, or answer them.
//!
//! Our eBPF program redirects a packet to a device; the thread here reads it with what is to be done with it in front
//! ([`squall_common::tap`]), keeps it until its time, and writes it back, whereupon another program sends it on its way.
//! Where packets are only held, offloads stay whole: the virtio header says what is still to be segmented or summed. A
//! device whose packets are changed has no offloads, so that the kernel segments and sums first.
//!
//! A device is bound to the process. When the process dies, so does the device, and packets in it are lost. A queue that
//! does not run any more stops moving its time in [`Table::open_until`], and the program sends it no more packets.

#![expect(unsafe_code, reason = "ioctls of the TAP driver")]

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::OpenOptionsExt,
    },
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        prctl,
        socket::{AddressFamily, SockFlag, SockType, socket},
    },
    time::{ClockId, clock_gettime},
};
use squall_common::{
    decide::hash,
    histogram::{BUCKETS, bucket},
    table::{Bucket, HISTOGRAM, RULES, Rule, Table},
    tap::{ARRIVED_BITS, Header, Job, LEN},
};

use super::{bpf::Mapped, proc};
use crate::{
    crash,
    frame::{self, Dns, Verdict},
    time::BootTime,
};

/// `struct virtio_net_hdr` without the count of merged buffers, which TAP does not send unless asked.
const VNET: usize = 10;
/// The longest frame: a GSO packet of 64 KiB, its headers and ours.
const LONGEST: usize = VNET + LEN + 4 + 14 + 65_536 + 256;
/// Most bytes that are held back at once.
const MOST_BYTES: usize = 256 << 20;
/// Frames read before looking at the clock again.
const BATCH: usize = 32;
/// Frames the device keeps for us to read.
const QUEUE: libc::c_int = 16_384;

/// For so long the program takes a queue to be there that has not said so again. A busy machine may keep it waiting for a second.
const ALIVE: Duration = Duration::from_secs(3);
/// How often a queue says so.
const BEAT: Duration = Duration::from_millis(250);
/// The bits of an arrival time that travel with a packet.
const ARRIVED: u64 = (1 << ARRIVED_BITS) - 1;
/// Stream of the draws for which bit is flipped, beside those of [`squall_common::decide`].
const BIT: u64 = 100;

mod ioctls {
    use nix::{ioctl_write_int, ioctl_write_ptr_bad};

    // linux/if_tun.h and linux/sockios.h. TUNSETIFF is declared with an int and takes a struct ifreq.
    ioctl_write_ptr_bad!(
        tun_set_iff,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
    ioctl_write_int!(tun_set_offload, b'T', 208);
    ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, libc::ifreq);
    ioctl_write_ptr_bad!(set_mtu, libc::SIOCSIFMTU, libc::ifreq);
    ioctl_write_ptr_bad!(set_queue, libc::SIOCSIFTXQLEN, libc::ifreq);
}

/// `TUN_F_*`: checksums, TCP segmentation for IPv4 and IPv6 with ECN, and (6.2) UDP segmentation.
const OFFLOADS: [libc::c_ulong; 2] = [0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40, 0x01 | 0x02 | 0x04 | 0x08];

/// What the queues of a port share with it.
#[derive(Debug)]
pub struct Desk {
    /// The rules.
    pub table: Arc<Mapped<Table>>,
    /// The histograms of delays.
    pub delays: Arc<Mapped<[Bucket; HISTOGRAM]>>,
    /// What rules say about DNS.
    pub dns: Mutex<HashMap<usize, Dns>>,
}

/// A TAP device that has no queue yet.
#[derive(Debug)]
pub struct Device {
    file: File,
    name: String,
    index: u32,
}

impl Device {
    /// Makes a device, down, in the calling thread's network namespace. `whole`: GSO packets stay whole, and checksums undone.
    pub fn create(whole: bool) -> Result<Self> {
        crash::step("tap.open").context("opening /dev/net/tun")?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .context("opening /dev/net/tun (is the tun module there?)")?;
        let mut request = request("squall%d");
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        crash::step("tap.create").context("making a TAP device")?;
        // SAFETY: the kernel reads the ifreq, and writes the name it chose into it.
        unsafe { ioctls::tun_set_iff(file.as_raw_fd(), &raw const request) }
            .context("making a TAP device")?;
        let name: String =
            request.ifr_name.iter().map(|&c| c as u8).take_while(|&c| c != 0).map(char::from).collect();
        let index =
            nix::net::if_::if_nametoindex(name.as_str()).context("looking for the TAP device just made")?;
        crash::step("tap.offload").context("setting the offloads of a TAP device")?;
        let offload = |flags| {
            // SAFETY: the argument is a number.
            unsafe { ioctls::tun_set_offload(file.as_raw_fd(), flags) }
        };
        if whole {
            offload(OFFLOADS[0])
                .or_else(|_| offload(OFFLOADS[1]))
                .context("asking the TAP device for segmentation offload")?;
        } else {
            offload(0).context("asking the TAP device for no offload")?;
        }
        Ok(Self { file, name, index })
    }

    /// Brings it up: long enough for any packet and any burst, and with nothing of the stack's own on it.
    pub fn up(&self) -> Result<()> {
        // Where IPv6 is not there or /proc/sys is read-only, the stack's own packets are dropped by our program anyway.
        let quiet = fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.name), "1");
        if let Err(error) = quiet {
            tracing::debug!("switching IPv6 off on {}: {error}", self.name);
        }
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .context("opening a socket")?;
        let fd = socket.as_raw_fd();
        let mut with = request(&self.name);
        with.ifr_ifru.ifru_mtu = 65_521;
        // SAFETY: the kernel reads the ifreq.
        unsafe { ioctls::set_mtu(fd, &raw const with) }.context("setting the MTU of the TAP device")?;
        // The queue's length shares the number's place in the union.
        with.ifr_ifru.ifru_mtu = QUEUE;
        // SAFETY: the kernel reads the ifreq.
        unsafe { ioctls::set_queue(fd, &raw const with) }.context("setting the queue of the TAP device")?;
        crash::step("tap.up").context("bringing the TAP device up")?;
        with.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_NOARP) as libc::c_short;
        // SAFETY: the kernel reads the ifreq.
        unsafe { ioctls::set_flags(fd, &raw const with) }.context("bringing the TAP device up")?;
        Ok(())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its index.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// A way to send packets out of the device that no queue took in.
    pub fn answers(&self) -> Result<File> {
        self.file.try_clone().context("taking a second handle of a TAP device")
    }

    /// Starts its queue, as the lane with this index. Answers to packets leave through `answers`.
    pub fn start(self, lane: usize, desk: Arc<Desk>, answers: Option<File>) -> Result<Tap> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let index = self.index;
        let mut queue = Queue {
            file: self.file,
            answers,
            lane,
            stop: Arc::clone(&stop),
            desk,
            held: BinaryHeap::new(),
            bytes: 0,
            sequence: 0,
            last: (0, 0),
        };
        queue.beat();
        let thread = thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                if let Err(error) = queue.run() {
                    tracing::warn!("the queue of {} ended: {error}", self.name);
                }
            })
            .context("starting the thread of a TAP queue")?;
        Ok(Tap { index, stop, thread: Some(thread) })
    }
}

fn request(name: &str) -> libc::ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_mtu: 0 } }
}

/// A TAP device with its queue. Dropping it sends off what is held, at once and in order, and removes the device.
#[derive(Debug)]
pub struct Tap {
    index: u32,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Tap {
    /// Index of the device.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            tracing::error!("stopping a TAP queue: {error}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a TAP queue panicked");
        }
    }
}

/// What a queue does with a packet when it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Task {
    Send,
    Corrupt,
    CorruptSilently,
    Refuse,
    Reset,
    /// The frame is an answer already.
    Answer,
}

/// A packet held back. The order is by departure, then by arrival.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    due: u64,
    sequence: u64,
    arrived: u64,
    rule: u16,
    task: Task,
    /// The virtio header and the frame.
    frame: Vec<u8>,
}

struct Queue {
    file: File,
    answers: Option<File>,
    lane: usize,
    stop: Arc<EventFd>,
    desk: Arc<Desk>,
    held: BinaryHeap<Reverse<Held>>,
    bytes: usize,
    sequence: u64,
    /// Rule and arrival of the last packet, by which segments of one packet are known.
    last: (u16, u64),
}

impl Queue {
    fn run(&mut self) -> io::Result<()> {
        // The default lets the kernel wake us 50 µs late.
        prctl::set_timerslack(1)?;
        proc::be_nice(-20);
        let mut buffer = vec![0; LONGEST];
        let mut beat = Instant::now();
        loop {
            if beat.elapsed() >= BEAT {
                self.beat();
                beat = Instant::now();
            }
            self.send_due(now())?;
            if self.read(&mut buffer)? {
                continue;
            }
            let next =
                self.held.peek().map(|Reverse(next)| Duration::from_nanos(next.due.saturating_sub(now())));
            let wait = next.map_or(BEAT, |next| next.min(BEAT));
            let mut fds = [
                PollFd::new(self.file.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            ];
            match ppoll(&mut fds, Some(wait.into()), None) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [device, stop] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            if stop.contains(PollFlags::POLLIN) {
                // What is in the device is as due as what we hold: the fault is over.
                while self.read(&mut buffer)? {}
                return self.send_due(u64::MAX);
            }
            if device.contains(PollFlags::POLLERR) {
                return Err(io::Error::other("the device is gone"));
            }
        }
    }

    /// Says that packets may come.
    fn beat(&self) {
        let until = BootTime::now().0 + ALIVE.as_nanos() as u64;
        self.desk.table.open_until[self.lane].store(until);
    }

    fn rule(&self, number: u16) -> &Rule {
        &self.desk.table.rules[usize::from(number) % RULES]
    }

    /// Reads what has come, up to a batch. Whether there may be more.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        for _ in 0..BATCH {
            let length = match self.file.read(buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.take(&buffer[..length]);
        }
        Ok(true)
    }

    fn take(&mut self, bytes: &[u8]) {
        let Some((header, mut frame)) = unwrap(bytes) else { return };
        if self.bytes + frame.len() > MOST_BYTES {
            self.rule(header.rule).failed.add(1);
            return;
        }
        let first = self.last != (header.rule, header.arrived);
        self.last = (header.rule, header.arrived);
        let mut due = header.due;
        let task = match Job::from_number(header.job) {
            Some(Job::Send) | None => Task::Send,
            // One segment suffers for the packet.
            Some(Job::Corrupt | Job::CorruptSilently) if !first => Task::Send,
            Some(Job::Corrupt) => Task::Corrupt,
            Some(Job::CorruptSilently) => Task::CorruptSilently,
            Some(Job::Refuse) => Task::Refuse,
            Some(Job::Reset) if first => Task::Reset,
            Some(Job::Reset) => return,
            Some(Job::Dns) => match self.judge(header.rule, &frame[VNET..]) {
                None | Some((Verdict::Pass, _)) => Task::Send,
                Some((Verdict::Drop, _)) => {
                    self.rule(header.rule).dropped.add(1);
                    return;
                }
                Some((Verdict::Late, delay)) => {
                    due += delay.as_nanos() as u64;
                    self.rule(header.rule).delayed.add(1);
                    Task::Send
                }
                Some((Verdict::Answer(answer), delay)) => {
                    due += delay.as_nanos() as u64;
                    frame = [&[0; VNET][..], &answer].concat();
                    Task::Answer
                }
            },
        };
        self.bytes += frame.len();
        self.sequence += 1;
        self.held.push(Reverse(Held {
            due,
            sequence: self.sequence,
            arrived: header.arrived,
            rule: header.rule,
            task,
            frame,
        }));
    }

    fn judge(&self, rule: u16, frame: &[u8]) -> Option<(Verdict, Duration)> {
        let dns = self.desk.dns.lock().unwrap_or_else(PoisonError::into_inner);
        let dns = dns.get(&usize::from(rule))?;
        Some((dns.judge(frame), dns.delay))
    }

    /// Does what is due.
    fn send_due(&mut self, now: u64) -> io::Result<()> {
        while self.held.peek().is_some_and(|Reverse(next)| next.due <= now) {
            let Some(Reverse(packet)) = self.held.pop() else { break };
            self.bytes -= packet.frame.len();
            match self.carry_out(packet) {
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Does one task, and counts it.
    fn carry_out(&self, mut packet: Held) -> io::Result<()> {
        let rule = self.rule(packet.rule);
        let done = match packet.task {
            Task::Send => self.send(&packet),
            Task::Corrupt | Task::CorruptSilently => {
                let draw = hash(rule.action.seed.load(), rule.corrupted.load(), BIT);
                let (vnet, frame) = packet.frame.split_at_mut(VNET);
                // Nothing vouches for this checksum.
                vnet.fill(0);
                let flipped = if packet.task == Task::Corrupt {
                    frame::corrupt(frame, draw)
                } else {
                    frame::corrupt_silently(frame, draw)
                };
                let sent = self.send(&packet);
                if sent.is_ok() && flipped {
                    rule.corrupted.add(1);
                }
                sent
            }
            // What must not be answered is lost, as at a firewall.
            Task::Refuse => {
                if let Some(answer) = frame::refusal(&packet.frame[VNET..]) {
                    self.answer(&answer).map(|()| rule.refused.add(1))
                } else {
                    rule.dropped.add(1);
                    Ok(())
                }
            }
            Task::Reset => match frame::resets(&packet.frame[VNET..]) {
                Some([back, onward]) => {
                    let onward = [&[0; VNET][..], &onward].concat();
                    self.answer(&back).and_then(|()| (&self.file).write(&onward)).map(|_| rule.reset.add(1))
                }
                None => self.send(&packet),
            },
            Task::Answer => self.answer(&packet.frame[VNET..]).map(|()| rule.answered.add(1)),
        };
        // EINVAL: a header the kernel takes offence at. The others: no memory, the device is down.
        if done.is_err() {
            rule.failed.add(1);
        }
        done
    }

    fn send(&self, packet: &Held) -> io::Result<()> {
        // The device takes a frame whole or not at all.
        (&self.file).write_all(&packet.frame)?;
        if packet.due & ARRIVED != packet.arrived {
            let now = now();
            let delay = now.wrapping_sub(packet.arrived) & ARRIVED;
            let rule = usize::from(packet.rule) % RULES;
            let bucket = &self.desk.delays[rule * BUCKETS + bucket(delay)];
            bucket.count.add(1);
            bucket.sum.add(delay);
            self.rule(packet.rule).lateness.note(now.saturating_sub(packet.due));
        }
        Ok(())
    }

    fn answer(&self, frame: &[u8]) -> io::Result<()> {
        let Some(mut answers) = self.answers.as_ref() else {
            return Err(io::Error::other("this queue has no way back"));
        };
        answers.write_all(&[&[0; VNET][..], frame].concat())
    }
}

/// Takes our header out of what the device sent: what remains is the virtio header and the packet as it came, with the VLAN
/// tag where the kernel kept one aside.
fn unwrap(bytes: &[u8]) -> Option<(Header, Vec<u8>)> {
    let (vnet, rest) = bytes.split_first_chunk::<VNET>()?;
    let split = Header::split(rest)?;
    let mut frame = Vec::with_capacity(VNET + 4 + split.packet.len());
    frame.extend_from_slice(&shorten(*vnet));
    match split.tag {
        Some(tag) => {
            let (addresses, rest) = split.packet.split_at_checked(12)?;
            frame.extend_from_slice(addresses);
            frame.extend_from_slice(&tag);
            frame.extend_from_slice(rest);
        }
        None => frame.extend_from_slice(split.packet),
    }
    Some((split.header, frame))
}

/// The virtio header of a packet that lost [`LEN`] bytes at its front. Fields: flags, GSO type, length of the headers, GSO
/// size, start of the checksum, its offset; in the host's byte order (`linux/virtio_net.h`, legacy).
fn shorten(mut vnet: [u8; VNET]) -> [u8; VNET] {
    for at in [2, 6] {
        let offset = u16::from_ne_bytes([vnet[at], vnet[at + 1]]).saturating_sub(LEN as u16);
        vnet[at..at + 2].copy_from_slice(&offset.to_ne_bytes());
    }
    vnet
}

/// `CLOCK_MONOTONIC` in nanoseconds, as the programs read it.
fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| Duration::from(t).as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packet_comes_out_as_it_went_in() {
        let header = Header { rule: 3, job: Job::Send as u8, arrived: 1, due: 2 };
        // Needs a checksum at 34 + 16 behind our header; TCP over IPv4 in pieces of 1448 bytes.
        let vnet = |more: u16| {
            let mut v = [1, 1, 0, 0, 0xa8, 0x05, 0, 0, 16, 0];
            v[2..4].copy_from_slice(&(54 + more).to_ne_bytes());
            v[6..8].copy_from_slice(&(34 + more).to_ne_bytes());
            v
        };
        let packet = b"aaaaaabbbbbb\x08\x00rest of the packet";
        let mut bytes = vnet(LEN as u16).to_vec();
        bytes.extend(header.to_bytes());
        bytes.extend(packet);
        let (got, frame) = unwrap(&bytes).unwrap();
        assert_eq!(got, header);
        assert_eq!(frame[..VNET], vnet(0));
        assert_eq!(&frame[VNET..], packet);

        bytes.splice(VNET + 12..VNET + 12, [0x81, 0, 0, 9]);
        let (_, frame) = unwrap(&bytes).unwrap();
        assert_eq!(&frame[VNET..], b"aaaaaabbbbbb\x81\x00\x00\x09\x08\x00rest of the packet");
    }

    #[test]
    fn packets_leave_by_time_then_in_order() {
        let held =
            |due, sequence| Held { due, sequence, arrived: 0, rule: 0, task: Task::Send, frame: Vec::new() };
        let mut heap: BinaryHeap<_> =
            [(5, 1), (3, 2), (5, 0), (3, 1)].map(|(d, s)| Reverse(held(d, s))).into();
        let mut order = Vec::new();
        while let Some(Reverse(next)) = heap.pop() {
            order.push((next.due, next.sequence));
        }
        assert_eq!(order, [(3, 1), (3, 2), (5, 0), (5, 1)]);
    }
}
