//! What the agent costs while it does nothing, and how soon it acts. Prints a table; asserts nothing.
//!
//! The time to the first affected packet is taken from a real stream: one numbered UDP packet about every 150 µs from
//! a namespace, and a partition injected there. The first number that never arrives was the first affected packet.

use std::{
    net::UdpSocket,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use procfs::process::Process;
use squall_proto::v1::{
    ArmRequest, Fault, InterfaceSelector, NetworkFault, Peer, PortRange, Protocol, RevertRequest, Target,
    fault, target,
};
use squall_tests::{Agent, AgentOptions, Lab};
use tokio::time::sleep;

const REPEATS: u32 = 200;
const SETTLE: Duration = Duration::from_secs(3);
const IDLE: Duration = Duration::from_secs(30);
/// Time between two packets, as asked of the kernel; it adds its timer slack.
const GAP: Duration = Duration::from_micros(100);
/// How long a partition is left on after its RPC returned, and how long the wire is left whole after its revert.
const HOLD: Duration = Duration::from_millis(15);
const PORT: u16 = 9_999;
const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(measure())
}

async fn measure() -> Result<()> {
    let lab = Lab::new("bench")?;
    let mut agent = Agent::start(AgentOptions::default()).await?;
    let pid = agent.pid().cast_signed();
    sleep(SETTLE).await;
    let (cpu, rss) = idle(pid).await?;
    let stream = Packets::open(&lab)?;
    let (mut firsts, mut calls) = (Vec::new(), Vec::new());
    let stop = AtomicBool::new(false);
    let measured: Result<()> = thread::scope(|scope| {
        scope.spawn(|| stream.send(&stop));
        scope.spawn(|| stream.receive(&stop));
        let repeats = async {
            for n in 0..REPEATS {
                let (first, call) = repeat(&agent, &lab, &stream, n).await?;
                firsts.push(first);
                calls.push(call);
            }
            Ok(())
        };
        // The scope's threads wait for `stop`; this one drives the repeats meanwhile.
        let result = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(repeats));
        stop.store(true, Ordering::Relaxed);
        result
    });
    measured?;
    let after = resident(pid)?;
    ensure!(agent.terminate()?.success(), "the agent failed:\n{}", agent.log());

    println!("| squall-agent | measured | aim |");
    println!("|---|---|---|");
    println!("| RSS, idle | {:.1} MiB | 20 MiB |", rss / MIB);
    println!("| RSS, after {REPEATS} injections | {:.1} MiB | |", after / MIB);
    println!("| CPU, idle, over {IDLE:?} | {:.3} % | 0.2 % |", cpu * 100.0);
    for (p, aim) in [(0.5, ""), (0.99, "10 ms")] {
        let of = |times: &mut Vec<Duration>| percentile(times, p).as_secs_f64() * 1e3;
        println!(
            "| Inject to first affected packet, p{:.0} | {:.2} ms | {aim} |",
            p * 100.0,
            of(&mut firsts)
        );
        println!("| Inject to its answer, p{:.0} | {:.2} ms | |", p * 100.0, of(&mut calls));
    }
    Ok(())
}

/// CPUs used (1 is one whole CPU) and resident bytes of a process that nobody asks for anything.
async fn idle(pid: i32) -> Result<(f64, f64)> {
    let ticks = |pid| -> Result<u64> {
        let stat = Process::new(pid)?.stat()?;
        Ok(stat.utime + stat.stime)
    };
    let before = ticks(pid)?;
    sleep(IDLE).await;
    let used = (ticks(pid)? - before) as f64 / procfs::ticks_per_second() as f64;
    Ok((used / IDLE.as_secs_f64(), resident(pid)?))
}

fn resident(pid: i32) -> Result<f64> {
    let kib = Process::new(pid)?.status()?.vmrss.context("the agent has no VmRSS")?;
    Ok(kib as f64 * 1024.0)
}

/// One partition: from the start of the RPC to the first packet that it took, and to the RPC's answer.
async fn repeat(agent: &Agent, lab: &Lab, stream: &Packets, n: u32) -> Result<(Duration, Duration)> {
    let mut client = agent.client().await?;
    let id = format!("bench-{n}");
    let interface = InterfaceSelector { name: "near0".into(), netns: lab.near.name().to_owned() };
    let port = u32::from(PORT);
    let peer = Peer {
        ports: vec![PortRange { first: port, last: port }],
        protocol: Protocol::Udp.into(),
        ..Peer::default()
    };
    let network = NetworkFault { partition: true, peers: vec![peer], ..NetworkFault::default() };
    let request = ArmRequest {
        id: id.clone(),
        target: Some(Target { kind: Some(target::Kind::Interface(interface)) }),
        fault: Some(Fault { kind: Some(fault::Kind::Network(network)) }),
        duration_ns: 60_000_000_000,
        lease_ns: 30_000_000_000,
        dry_run: false,
        only: Vec::new(),
    };
    let started = Instant::now();
    client.inject(request).await?;
    let call = started.elapsed();
    sleep(HOLD).await;
    let held = Instant::now();
    client.revert(RevertRequest { ids: vec![id], all: false }).await?;
    sleep(HOLD).await;
    let first = stream.first_lost(started, held).context("the partition took no packet")?;
    Ok((first.duration_since(started), call))
}

fn percentile(times: &mut [Duration], p: f64) -> Duration {
    times.sort_unstable();
    let at = (times.len() as f64 * p).ceil() as usize;
    times[at.clamp(1, times.len()) - 1]
}

/// A stream of numbered packets.
struct Packets {
    sender: UdpSocket,
    receiver: UdpSocket,
    /// When each was sent, and whether it arrived.
    log: Mutex<Vec<(Instant, bool)>>,
}

impl Packets {
    fn open(lab: &Lab) -> Result<Self> {
        let receiver = lab.far.inside(|| Ok(UdpSocket::bind((Lab::FAR, PORT))?))?;
        receiver.set_read_timeout(Some(Duration::from_millis(100)))?;
        let sender = lab.near.inside(|| Ok(UdpSocket::bind((Lab::NEAR, 0))?))?;
        sender.connect((Lab::FAR, PORT))?;
        Ok(Self { sender, receiver, log: Mutex::default() })
    }

    fn send(&self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let number = {
                let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
                log.push((Instant::now(), false));
                log.len() as u64 - 1
            };
            // A packet that cannot be sent is as lost as one that is dropped on its way.
            let _ = self.sender.send(&number.to_le_bytes());
            thread::sleep(GAP);
        }
    }

    fn receive(&self, stop: &AtomicBool) {
        let mut packet = [0; 8];
        while !stop.load(Ordering::Relaxed) {
            if self.receiver.recv(&mut packet).is_ok() {
                let number = u64::from_le_bytes(packet) as usize;
                let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(entry) = log.get_mut(number) {
                    entry.1 = true;
                }
            }
        }
    }

    /// When the first of the packets that were sent in this time and never arrived was sent.
    fn first_lost(&self, from: Instant, to: Instant) -> Option<Instant> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = log.iter().find(|(sent, arrived)| (from..to).contains(sent) && !arrived);
        lost.map(|(sent, _)| *sent)
    }
}
