//! Network namespaces, wires between them, and what a user sees over such a wire: round-trip times and throughput.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader},
    net::IpAddr,
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sched::{CloneFlags, CpuSet, sched_getaffinity, setns},
    unistd::Pid,
};
use serde_json::Value;

use crate::{HostState, NetState, Running, output, run, stdout};

/// A named network namespace with loopback up. Deleted when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

/// One end of a wire: its interface and its addresses.
#[derive(Debug, Clone, Copy)]
pub struct Wire<'a> {
    /// The namespace.
    pub netns: &'a Netns,
    /// Name of the interface in it.
    pub interface: &'a str,
    /// IPv4 address; the prefix is 24 bits long.
    pub v4: &'a str,
    /// IPv6 address; the prefix is 64 bits long.
    pub v6: &'a str,
}

/// Round-trip times.
#[derive(Debug, Clone, PartialEq)]
pub struct Ping {
    /// Requests sent.
    pub sent: u32,
    /// Round-trip times of those answered, milliseconds, ascending.
    pub rtts: Vec<f64>,
}

/// What one TCP stream achieved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stream {
    /// Bits a second, as received.
    pub bits_per_second: f64,
    /// Segments the sender sent again.
    pub retransmits: u64,
    /// Bytes received.
    pub bytes: u64,
}

fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Runs a function on a thread of its own, in the namespace of this name.
pub(crate) fn inside<T: Send>(name: &str, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(path(name)).with_context(|| format!("cannot open namespace {name}"))?;
    let work = move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")?;
        f()
    };
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => resume_unwind(panic),
    })
}

impl Netns {
    /// Makes a namespace.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        run("ip", ["netns", "add", &name])?;
        let netns = Self { name };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that opens it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        path(&self.name)
    }

    /// A command that runs in it. The mounts, so also /sys and the cgroups, stay the host's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }

    /// Runs a function on a thread of its own, in this namespace.
    pub fn inside<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&self.name, f)
    }

    /// A counter of this namespace's TCP, by its name in /proc/net/netstat: `TCPSACKReorder`.
    pub fn tcp_counter(&self, name: &str) -> Result<u64> {
        let text = self.inside(|| {
            fs::read_to_string("/proc/thread-self/net/netstat").context("cannot read the counters of TCP")
        })?;
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("TcpExt:")).collect();
        let [names, values] = lines[..] else { bail!("no counters of TCP in {text:?}") };
        let mut both = names.split_whitespace().zip(values.split_whitespace());
        let (_, value) =
            both.find(|(found, _)| *found == name).with_context(|| format!("no counter {name}"))?;
        Ok(value.parse()?)
    }

    /// `ip -n <name> <words>`.
    pub fn ip(&self, words: &str) -> Result<String> {
        stdout(Command::new("ip").args(["-n", &self.name]).args(words.split_whitespace()))
    }

    /// `tc -n <name> <words>`.
    pub fn tc(&self, words: &str) -> Result<String> {
        stdout(Command::new("tc").args(["-n", &self.name]).args(words.split_whitespace()))
    }

    /// Its links, qdiscs and filters.
    pub fn state(&self) -> Result<NetState> {
        HostState::network(Some(&self.name))
    }

    /// Connects two namespaces with a veth pair that is up and has its addresses when this returns.
    pub fn connect(a: Wire<'_>, b: Wire<'_>) -> Result<()> {
        a.netns.ip(&format!(
            "link add {} type veth peer name {} netns {}",
            a.interface, b.interface, b.netns.name
        ))?;
        for Wire { netns, interface, v4, v6 } in [a, b] {
            netns.ip(&format!("addr add {v4}/24 dev {interface}"))?;
            // Without duplicate address detection, which would keep the address unusable for a second or two.
            netns.ip(&format!("addr add {v6}/64 dev {interface} nodad"))?;
            netns.ip(&format!("link set {interface} up"))?;
        }
        Ok(())
    }

    /// Pings an address `count` times, `interval` apart.
    pub fn ping(&self, to: IpAddr, count: u32, interval: Duration) -> Result<Ping> {
        let mut command = self.command("ping");
        let seconds = interval.as_secs_f64();
        command.args(["-n", "-W", "5", "-c", &count.to_string(), "-i", &format!("{seconds:.3}")]);
        command.arg(to.to_string());
        // Status 1 says that nothing was answered, which is an answer here.
        let done = command.stdin(Stdio::null()).output().context("cannot start ping")?;
        if !matches!(done.status.code(), Some(0 | 1)) {
            bail!("{command:?} failed ({}): {}", done.status, String::from_utf8_lossy(&done.stderr).trim());
        }
        Ping::parse(&String::from_utf8_lossy(&done.stdout), count)
    }

    /// Sends one TCP stream to `to`, whose address is `address`, for a while.
    pub fn stream(&self, to: &Self, address: IpAddr, time: Duration) -> Result<Stream> {
        self.streams(to, address, time, 1)
    }

    /// As [`stream`](Self::stream), with a CPU for each end where there are two: on which one the scheduler puts them makes more
    /// of a difference than what is to be told apart here.
    pub fn pinned_stream(&self, to: &Self, address: IpAddr, time: Duration) -> Result<Stream> {
        let [here, there] = two_cpus()?;
        self.iperf(to, address, time, &["--affinity", &format!("{here},{there}")])
    }

    /// Sends so many TCP streams at once, and adds up what they achieved.
    pub fn streams(&self, to: &Self, address: IpAddr, time: Duration, flows: u32) -> Result<Stream> {
        self.iperf(to, address, time, &["--parallel", &flows.to_string()])
    }

    fn iperf(&self, to: &Self, address: IpAddr, time: Duration, more: &[&str]) -> Result<Stream> {
        let mut command = to.command("iperf3");
        command.args(["--server", "--one-off", "--forceflush"]);
        let mut server =
            Running::start_with("iperf3 server", &command, Stdio::null(), Stdio::piped(), Stdio::null())?;
        let said = server.child().stdout.take().context("iperf3 has no standard output")?;
        let mut lines = BufReader::new(said).lines();
        while !lines.next().context("iperf3 ended before it listened")??.contains("listening") {}
        let mut client = self.command("iperf3");
        client.args(["--client", &address.to_string(), "--time", &time.as_secs().to_string(), "--json"]);
        client.args(more);
        let json = output(&mut client)?.stdout;
        // What it still has to say must not fill the pipe.
        lines.for_each(drop);
        server.wait(Duration::from_secs(10))?;
        Stream::parse(&json)
    }
}

/// Two CPUs that the calling thread may use; where it may use but one, that one twice.
pub(crate) fn two_cpus() -> Result<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("asking which CPUs this thread may use")?;
    let mut usable = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    let first = usable.next().context("no CPU may be used")?;
    Ok([first, usable.next().unwrap_or(first)])
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(e) = run("ip", ["netns", "delete", &self.name]) {
            eprintln!("cannot delete the namespace {}: {e:#}", self.name);
        }
    }
}

impl Ping {
    /// The median round-trip time, milliseconds. Fails where nothing was answered.
    pub fn median(&self) -> Result<f64> {
        ensure!(!self.rtts.is_empty(), "none of {} pings was answered", self.sent);
        Ok(self.rtts[self.rtts.len() / 2])
    }

    /// Share of the pings that were not answered, 0 to 1.
    #[must_use]
    pub fn loss(&self) -> f64 {
        1.0 - self.rtts.len() as f64 / f64::from(self.sent.max(1))
    }

    fn parse(text: &str, sent: u32) -> Result<Self> {
        let times = text.lines().filter(|line| !line.contains("DUP!")).filter_map(|line| {
            let (_, rest) = line.split_once(" time=")?;
            rest.split_whitespace().next()
        });
        let mut rtts =
            times.map(str::parse).collect::<Result<Vec<f64>, _>>().context("ping's output is strange")?;
        rtts.sort_by(f64::total_cmp);
        Ok(Self { sent, rtts })
    }
}

impl Stream {
    fn parse(json: &[u8]) -> Result<Self> {
        let report: Value = serde_json::from_slice(json).context("iperf3's report is not JSON")?;
        let figure = |path: &str| {
            report
                .pointer(path)
                .and_then(Value::as_f64)
                .with_context(|| format!("iperf3's report lacks {path}"))
        };
        Ok(Self {
            bits_per_second: figure("/end/sum_received/bits_per_second")?,
            retransmits: figure("/end/sum_sent/retransmits")? as u64,
            bytes: figure("/end/sum_received/bytes")? as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ping_counts_answers_and_not_duplicates() -> Result<()> {
        let text = "PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.\n\
            64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time=0.3 ms\n\
            64 bytes from 10.0.0.2: icmp_seq=2 ttl=64 time=100 ms\n\
            64 bytes from 10.0.0.2: icmp_seq=2 ttl=64 time=101 ms (DUP!)\n\
            64 bytes from 10.0.0.2: icmp_seq=3 ttl=64 time=0.2 ms\n\n\
            --- 10.0.0.2 ping statistics ---\n4 packets transmitted, 3 received, 25% packet loss, time 3ms\n";
        let ping = Ping::parse(text, 4)?;
        assert_eq!(ping.rtts, [0.2, 0.3, 100.0]);
        assert!((ping.median()? - 0.3).abs() < 1e-9);
        assert!((ping.loss() - 0.25).abs() < 1e-9);
        Ok(())
    }

    #[test]
    fn a_report_without_its_figures_is_an_error() {
        let error = Stream::parse(br#"{"error": "unable to connect"}"#).expect_err("there are no figures");
        assert!(error.to_string().contains("sum_received"), "{error:#}");
    }
}
