//! Whom the network fault is about: each term of a peer, and whose packets on which interface.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hickory_proto::rr::RecordType;
use squall_proto::v1::{
    Direction, Dns, DnsAnswer, Fragments, NetworkFault, Peer, Protocol, Refusal, Side, Sockets as Whose,
    TcpFlags,
};
use squall_tests::{
    Bench, Lab, NameServer, Netns, Pair, Running, Sockets, Unified, ask, cidr, delay, drain, figure,
    interface, partition, port, ports, process, unique, wait_for,
};
use tempfile::TempDir;

const SOON: Duration = Duration::from_millis(700);
/// Names are looked up again every 5 s. A VM without KVM is slow.
const REFRESH: Duration = Duration::from_secs(15);
const FIN: u32 = 1;
const SYN: u32 = 2;
const ACK: u32 = 16;

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Whether pings with these words are answered, all of them or none.
fn reached(from: &Netns, words: &str) -> Result<bool> {
    let (rtts, said) = from.ping_with(&format!("-c 3 -i 0.02 -W 1 {words}"))?;
    ensure!(matches!(rtts.len(), 0 | 3), "some were answered: {said}");
    Ok(!rtts.is_empty())
}

fn connects(from: &Netns, to: IpAddr, port: u16) -> Result<bool> {
    Ok(from.connect(SocketAddr::new(to, port), SOON)?.is_ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn exceptions_are_spared() -> Result<()> {
    let mut bench = Bench::new("except").await?;
    let fault = |except: &[&str]| NetworkFault {
        except: except.iter().map(|spared| cidr(spared)).collect(),
        ..partition(Direction::Both, vec![cidr("10.99.0.0/24"), cidr("fd99::/64")])
    };
    let injection = bench.inject(fault(&["10.99.0.3/32", "fd99::2/128"])).await?;
    let reached_now = |lab: &Lab| -> Result<[bool; 3]> {
        Ok([
            reached(&lab.near, "10.99.0.2")?,
            reached(&lab.near, "10.99.0.3")?,
            reached(&lab.near, "fd99::2")?,
        ])
    };
    ensure!(reached_now(&bench.lab)? == [false, true, true]);
    bench.update(&injection.id, fault(&["10.99.0.2/31"])).await?;
    ensure!(reached_now(&bench.lab)? == [true, true, false]);
    bench.update(&injection.id, fault(&[])).await?;
    ensure!(reached_now(&bench.lab)? == [false, false, false]);
    bench.end(&injection.id).await?;
    ensure!(reached_now(&bench.lab)? == [true, true, true]);
    Ok(())
}

/// An exception leaves packets to the injections behind, which may be about them.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_excepts_another_may_hurt() -> Result<()> {
    let mut bench = Bench::new("except2").await?;
    let spares = NetworkFault {
        except: vec![cidr("10.99.0.3/32")],
        ..partition(Direction::Egress, vec![cidr("10.99.0.0/24")])
    };
    let first = bench.inject(spares).await?;
    let second = bench.inject(delay(80, Direction::Egress, vec![cidr("10.99.0.0/24")])).await?;
    ensure!(!reached(&bench.lab.near, "10.99.0.2")?);
    let rtt = bench.lab.near.rtt_with("10.99.0.3")?;
    ensure!((79.0..130.0).contains(&rtt), "{rtt} ms");
    bench.revert(&second.id).await?;
    bench.end(&first.id).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_of_flows_is_hit_wholly() -> Result<()> {
    const FLOWS: usize = 300;
    const PACKETS: usize = 4;
    const SHARE: f64 = 0.3;
    let mut bench = Bench::new("flows").await?;
    for (near, far, address) in
        [(Lab::NEAR, Lab::FAR, "10.99.0.0/24"), (Lab::NEAR_V6, Lab::FAR_V6, "fd99::/64")]
    {
        let fault = NetworkFault { flow_share: SHARE, ..partition(Direction::Egress, vec![cidr(address)]) };
        let injection = bench.inject(fault).await?;
        let sink = bench.lab.far.udp(near, 7000)?;
        let mut whole = 0;
        for _ in 0..FLOWS {
            let flow = bench.lab.near.udp(near, 0)?;
            let from = flow.local_addr()?.port();
            for _ in 0..PACKETS {
                flow.send_to(b"hello", (far, 7000))?;
            }
            // Over veth a packet has arrived when the call returns, or soon after.
            let came = drain(&sink, Duration::from_millis(5))?;
            ensure!(came.iter().all(|peer| peer.port() == from), "late packets of another flow");
            ensure!(came.is_empty() || came.len() == PACKETS, "{} of {PACKETS} packets came", came.len());
            whole += came.len() / PACKETS;
        }
        let ended = bench.end(&injection.id).await?;
        let hit = (FLOWS - whole) as f64;
        let (mean, sigma) = (FLOWS as f64 * SHARE, (FLOWS as f64 * SHARE * (1.0 - SHARE)).sqrt());
        println!("{hit} of {FLOWS} flows hit over {address}");
        ensure!((hit - mean).abs() < 5.0 * sigma, "{hit} of {FLOWS} flows were hit");
        ensure!(figure(&ended, "dropped") >= hit * PACKETS as f64, "{ended:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn dscp_chooses() -> Result<()> {
    let mut bench = Bench::new("dscp").await?;
    // Expedited forwarding, and best effort.
    for (dscp, hit, spared) in [(46, "0xb8", "0x00"), (0, "0x00", "0xb8")] {
        let peer = Peer { dscp: vec![dscp], ..Peer::default() };
        let injection = bench.inject(delay(100, Direction::Egress, vec![peer])).await?;
        for far in ["10.99.0.2", "fd99::2"] {
            let slow = bench.lab.near.rtt_with(&format!("-Q {hit} {far}"))?;
            let fast = bench.lab.near.rtt_with(&format!("-Q {spared} {far}"))?;
            ensure!((99.0..160.0).contains(&slow) && fast < 50.0, "{far}: {slow} ms, the other {fast} ms");
        }
        bench.end(&injection.id).await?;
    }
    Ok(())
}

/// Kernels without VLAN devices have untagged packets only, which are a value too.
#[tokio::test(flavor = "multi_thread")]
async fn vlans_choose() -> Result<()> {
    let mut bench = Bench::new("vlan").await?;
    let peer = |vlans: &[u32]| Peer { vlans: vlans.to_vec(), ..Peer::default() };
    let mut ways = vec![(0, "10.99.0.2".to_owned())];
    for (netns, parent, end) in [(&bench.lab.near, "near0", 1), (&bench.lab.far, "far0", 2)] {
        for id in [7, 8] {
            let added = netns.ip(&format!("link add link {parent} name v{id} type vlan id {id}"));
            if added.as_ref().is_err_and(|e| format!("{e:#}").contains("Unknown device type")) {
                println!("no VLAN devices here");
                continue;
            }
            added?;
            netns.ip(&format!("addr add 10.98.{id}.{end}/24 dev v{id}"))?;
            netns.ip(&format!("link set v{id} up"))?;
            if end == 2 {
                ways.push((id, format!("10.98.{id}.2")));
            }
        }
    }
    bench.settle()?;
    for (_, address) in &ways {
        wait_for("the way to be there", Duration::from_secs(10), || {
            Ok(reached(&bench.lab.near, address)?.then_some(()))
        })?;
    }
    for direction in [Direction::Egress, Direction::Ingress] {
        for vlans in [vec![0], vec![7], vec![8, 0], vec![9]] {
            let injection = bench.inject(delay(100, direction, vec![peer(&vlans)])).await?;
            for (id, address) in &ways {
                let rtt = bench.lab.near.rtt_with(address)?;
                let hit = vlans.contains(id);
                let expected = if hit { 99.0..160.0 } else { 0.0..50.0 };
                ensure!(expected.contains(&rtt), "{direction:?} {vlans:?}: {rtt} ms over VLAN {id}");
            }
            bench.end(&injection.id).await?;
        }
    }
    // The tag stays on a packet that is taken out of the kernel, and on the answer to it.
    let refusal = |direction| NetworkFault {
        refusal: Refusal::Answer.into(),
        ..partition(direction, vec![peer(&[7])])
    };
    let injection = bench.inject(refusal(Direction::Egress)).await?;
    for (id, address) in &ways {
        let (answers, said) = bench.lab.near.ping_with(&format!("-c 2 -i 0.1 -W 1 {address}"))?;
        let refused = answers.is_empty() && said.contains("Packet filtered");
        ensure!(refused == (*id == 7), "VLAN {id}: {said}");
    }
    bench.end(&injection.id).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn icmp_types_choose() -> Result<()> {
    let mut bench = Bench::new("icmp").await?;
    // Echo requests and replies, as ICMP and ICMPv6 number them. Neighbours must find each other, or nothing comes.
    for (types, out, back) in [(vec![8, 128], false, true), (vec![0, 129], true, false)] {
        let peer = Peer { icmp_types: types.clone(), ..Peer::default() };
        let injection = bench.inject(partition(Direction::Egress, vec![peer])).await?;
        for (near, far) in [("10.99.0.1", "10.99.0.2"), ("fd99::1", "fd99::2")] {
            let got = (reached(&bench.lab.near, far)?, reached(&bench.lab.far, near)?);
            ensure!(got == (out, back), "{types:?}: {far} is reached: {}, {near}: {}", got.0, got.1);
        }
        let ended = bench.end(&injection.id).await?;
        ensure!(figure(&ended, "matched") == 6.0 && figure(&ended, "dropped") == 6.0, "{ended:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_flags_choose() -> Result<()> {
    let mut bench = Bench::new("flags").await?;
    let listener = bench.lab.far.listen(7000)?;
    let flags = |set, clear| Peer { tcp_flags: Some(TcpFlags { set, clear }), ..Peer::default() };
    for far in [Lab::FAR, Lab::FAR_V6] {
        let connection = |lab: &Lab| -> Result<[f64; 3]> {
            let mut pair = Pair::new(&lab.near, &listener, far)?;
            // The first answer acknowledges too; the second finds everything settled.
            pair.exchange()?;
            let exchange = pair.exchange()?;
            let handshake = pair.handshake;
            Ok([handshake, exchange, pair.close()?].map(ms))
        };
        let injection = bench.inject(delay(300, Direction::Egress, vec![flags(SYN, ACK)])).await?;
        let [connect, exchange, close] = connection(&bench.lab)?;
        ensure!(
            connect > 299.0 && exchange < 200.0 && close < 200.0,
            "SYN: {connect}, {exchange}, {close} ms"
        );
        bench.update(&injection.id, delay(300, Direction::Egress, vec![flags(FIN, 0)])).await?;
        let [connect, exchange, close] = connection(&bench.lab)?;
        ensure!(
            connect < 200.0 && exchange < 200.0 && close > 299.0,
            "FIN: {connect}, {exchange}, {close} ms"
        );
        // The answer to the handshake is of the other side: nothing here has both flags.
        bench.update(&injection.id, delay(300, Direction::Egress, vec![flags(SYN | ACK, 0)])).await?;
        let [connect, exchange, close] = connection(&bench.lab)?;
        ensure!(
            connect < 200.0 && exchange < 200.0 && close < 200.0,
            "none: {connect}, {exchange}, {close} ms"
        );
        bench.end(&injection.id).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn fragments_are_told_from_whole_packets() -> Result<()> {
    let mut bench = Bench::new("frag").await?;
    for (fragments, large_hit, small_hit) in [(Fragments::Only, true, false), (Fragments::Never, false, true)]
    {
        let peer = Peer { fragments: fragments.into(), ..Peer::default() };
        let injection = bench.inject(delay(100, Direction::Egress, vec![peer])).await?;
        for far in ["10.99.0.2", "fd99::2"] {
            for (size, hit) in [(4000, large_hit), (100, small_hit)] {
                let rtt = bench.lab.near.rtt_with(&format!("-s {size} {far}"))?;
                let expected = if hit { 99.0..160.0 } else { 0.0..50.0 };
                ensure!(expected.contains(&rtt), "{fragments:?}: {rtt} ms for {size} bytes to {far}");
            }
        }
        bench.end(&injection.id).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn local_ports_choose() -> Result<()> {
    let mut bench = Bench::new("local").await?;
    let [hit, spared] = [bench.lab.near.listen(7001)?, bench.lab.near.listen(7002)?];
    let same_there = bench.lab.far.listen(7001)?;
    let peer = Peer { local_ports: ports(7001), protocol: Protocol::Tcp.into(), ..Peer::default() };
    for direction in [Direction::Egress, Direction::Ingress] {
        let injection = bench.inject(delay(100, direction, vec![peer.clone()])).await?;
        for near in [Lab::NEAR, Lab::NEAR_V6] {
            let slow = ms(Pair::new(&bench.lab.far, &hit, near)?.exchange()?);
            let fast = ms(Pair::new(&bench.lab.far, &spared, near)?.exchange()?);
            ensure!(
                (99.0..180.0).contains(&slow) && fast < 50.0,
                "{direction:?}: {slow} ms, the other port {fast} ms"
            );
        }
        // The same number at the far end is another thing.
        let fast = ms(Pair::new(&bench.lab.near, &same_there, Lab::FAR)?.exchange()?);
        ensure!(fast < 50.0, "{direction:?}: {fast} ms to a peer with that port");
        bench.end(&injection.id).await?;
    }
    Ok(())
}

/// /etc/netns/NAME, which stands for /etc in the namespace of that name.
struct Etc {
    dir: PathBuf,
    made_parent: bool,
}

impl Etc {
    fn new(netns: &Netns) -> Result<Self> {
        let parent = PathBuf::from("/etc/netns");
        let made_parent = !parent.exists();
        let dir = parent.join(netns.name());
        fs::create_dir_all(&dir)?;
        Ok(Self { dir, made_parent })
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        Ok(fs::write(self.dir.join(file), text)?)
    }
}

impl Drop for Etc {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.dir) {
            eprintln!("cannot remove {}: {e}", self.dir.display());
        }
        if self.made_parent {
            // Others may have put something there since.
            let _ = fs::remove_dir("/etc/netns");
        }
    }
}

fn host(name: &str) -> Peer {
    Peer { hosts: vec![name.into()], ..Peer::default() }
}

/// Waits until exactly these addresses of the far side cannot be reached.
fn wait_for_cut(lab: &Lab, cut: [bool; 3]) -> Result<()> {
    let now = || -> Result<[bool; 3]> {
        Ok([
            !reached(&lab.near, "10.99.0.2")?,
            !reached(&lab.near, "10.99.0.3")?,
            !reached(&lab.near, "fd99::2")?,
        ])
    };
    wait_for("the names to be followed", REFRESH, || Ok((now()? == cut).then_some(())))
        .with_context(|| format!("cut off are {:?} instead of {cut:?}", now()))
}

#[tokio::test(flavor = "multi_thread")]
async fn names_in_the_hosts_file_are_followed() -> Result<()> {
    let mut bench = Bench::new("hosts").await?;
    let etc = Etc::new(&bench.lab.near)?;
    etc.write("hosts", "10.99.0.2 shop.test\nfd99::2 shop.test\n")?;
    etc.write("resolv.conf", "nameserver 10.99.0.1\n")?;
    let injection = bench.inject(partition(Direction::Both, vec![host("shop.test")])).await?;
    wait_for_cut(&bench.lab, [true, false, true])?;
    etc.write("hosts", "10.99.0.3 shop.test\n")?;
    wait_for_cut(&bench.lab, [false, true, false])?;
    bench.end(&injection.id).await?;
    wait_for_cut(&bench.lab, [false, false, false])
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_asked_for_where_the_target_is() -> Result<()> {
    let mut bench = Bench::new("names").await?;
    let etc = Etc::new(&bench.lab.near)?;
    etc.write("hosts", "")?;
    etc.write("resolv.conf", "nameserver 127.0.0.1\n")?;
    // Nobody outside the namespace can ask this one.
    let server = NameServer::start(&bench.lab.near, Lab::NEAR)?;
    let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
    ensure!(ask(&bench.lab.near, localhost, "shop.test", RecordType::A, SOON)?.0.is_some(), "no name server");

    let near = bench.near();
    let said = bench.refused(near, partition(Direction::Both, vec![host("shop.test")])).await?;
    ensure!(said.contains("shop.test") && said.contains("no such name"), "{said}");

    server.set("shop.test", &[Lab::FAR, Lab::FAR_V6]);
    let injection = bench.inject(partition(Direction::Both, vec![host("shop.test")])).await?;
    ensure!(
        injection.changes.iter().any(|change| change.contains("shop.test is 10.99.0.2, fd99::2")),
        "{injection:?}"
    );
    wait_for_cut(&bench.lab, [true, false, true])?;
    // It moves.
    server.set("shop.test", &[Lab::FAR_OTHER]);
    wait_for_cut(&bench.lab, [false, true, false])?;
    // It vanishes: its last addresses stay, however often it is asked for.
    server.set("shop.test", &[]);
    let _ = server.asked();
    let mut asked = 0;
    wait_for("two more lookups", 2 * REFRESH, || {
        asked += server.asked().len();
        Ok((asked >= 4).then_some(()))
    })?;
    wait_for_cut(&bench.lab, [false, true, false])?;
    let said = bench.update(&injection.id, partition(Direction::Both, vec![host("other.test")])).await;
    ensure!(said.is_err_and(|e| format!("{e:#}").contains("no new host names")), "a new name was taken");
    bench.end(&injection.id).await?;
    wait_for_cut(&bench.lab, [false, false, false])
}

/// An exception by name is one too.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_can_be_spared() -> Result<()> {
    let mut bench = Bench::new("spare").await?;
    let etc = Etc::new(&bench.lab.near)?;
    etc.write("hosts", "10.99.0.3 spared.test\n")?;
    let fault = NetworkFault {
        except: vec![host("spared.test")],
        ..partition(Direction::Both, vec![cidr("10.99.0.0/24")])
    };
    let injection = bench.inject(fault).await?;
    wait_for_cut(&bench.lab, [true, false, false])?;
    bench.end(&injection.id).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn loopback_is_hurt_where_it_is_meant() -> Result<()> {
    let mut bench = Bench::new("loop").await?;
    let [hit, spared] = [bench.lab.near.listen(7000)?, bench.lab.near.listen(7001)?];
    let sleeper = Running::start("a sleeper", bench.lab.near.command("sleep").arg("600"))?;
    let settings = |lab: &Lab| {
        lab.near.inside(|| {
            let read = |name| fs::read_to_string(format!("/proc/sys/net/ipv4/conf/lo/{name}"));
            Ok([read("route_localnet")?, read("accept_local")?].map(|value| value.trim() == "1"))
        })
    };
    let peers = || {
        vec![
            Peer { cidrs: vec!["127.0.0.0/8".into()], ports: ports(7000), ..Peer::default() },
            Peer { cidrs: vec!["::1/128".into()], ports: ports(7000), ..Peer::default() },
        ]
    };
    // By name, and because all peers are there.
    let by_name = interface("lo", &bench.lab.near.path().display().to_string());
    for (set, target) in [(false, by_name), (true, process(sleeper.pid()))] {
        if set {
            // Somebody has one of them already; it must stay.
            bench.lab.near.inside(|| Ok(fs::write("/proc/sys/net/ipv4/conf/lo/route_localnet", "1")?))?;
            bench.settle()?;
        }
        let before = settings(&bench.lab)?;
        ensure!(before == [set, false], "{before:?}");
        for direction in [Direction::Egress, Direction::Ingress] {
            let injection = bench.inject_into(target.clone(), delay(100, direction, peers())).await?;
            for address in ["127.0.0.1", "127.0.0.9", "::1"] {
                let address: IpAddr = address.parse()?;
                let slow = ms(Pair::new(&bench.lab.near, &hit, address)?.exchange()?);
                let fast = ms(Pair::new(&bench.lab.near, &spared, address)?.exchange()?);
                ensure!((99.0..180.0).contains(&slow), "{direction:?} {address}: {slow} ms");
                ensure!(fast < 50.0, "{direction:?} {address}: {fast} ms to another port");
            }
            ensure!(reached(&bench.lab.near, "10.99.0.2")?, "the wire is hurt");
            bench.end(&injection.id).await?;
            ensure!(
                settings(&bench.lab)? == before,
                "route_localnet and accept_local are {:?}",
                settings(&bench.lab)?
            );
            let fast = ms(Pair::new(&bench.lab.near, &hit, Ipv4Addr::LOCALHOST.into())?.exchange()?);
            ensure!(fast < 50.0, "{fast} ms afterwards");
        }
    }
    // What needs no detour needs no setting.
    let injection = bench.inject_into(process(sleeper.pid()), partition(Direction::Both, peers())).await?;
    ensure!(!connects(&bench.lab.near, Ipv4Addr::LOCALHOST.into(), 7000)?);
    ensure!(connects(&bench.lab.near, Ipv4Addr::LOCALHOST.into(), 7001)?);
    ensure!(settings(&bench.lab)? == [true, false]);
    bench.end(&injection.id).await?;
    ensure!(connects(&bench.lab.near, Ipv4Addr::LOCALHOST.into(), 7000)?);
    Ok(())
}

/// Peers on loopback beside others are hurt there, and what goes over it unhurt is said.
#[tokio::test(flavor = "multi_thread")]
async fn loopback_is_hurt_beside_the_wire() -> Result<()> {
    let mut bench = Bench::new("beside").await?;
    let etc = Etc::new(&bench.lab.near)?;
    // One who has no such file asks on loopback too.
    let file = Path::new("/etc/resolv.conf").exists();
    if file {
        etc.write("resolv.conf", "nameserver 127.0.0.53\n")?;
    }
    let listeners = [7000, 7001, 7002].map(|port| bench.lab.near.listen(port));
    let [local, _, both] = listeners.into_iter().collect::<Result<Vec<_>>>()?.try_into().expect("three");
    let [remote, both_there] = [bench.lab.far.listen(7001)?, bench.lab.far.listen(7002)?];
    // It sees that file.
    let mut command = Command::new("ip");
    command.args(["netns", "exec", bench.lab.near.name(), "sleep", "600"]);
    let sleeper = Running::start("a sleeper", &command)?;
    asleep(&sleeper)?;
    let peers = vec![
        Peer { ports: ports(7000), ..cidr("127.0.0.1/32") },
        Peer { ports: ports(7001), ..cidr("10.99.0.2/32") },
        port(7002),
    ];
    let injection =
        bench.inject_into(process(sleeper.pid()), delay(100, Direction::Egress, peers.clone())).await?;
    let took = |listener, address: &str| -> Result<f64> {
        Ok(ms(Pair::new(&bench.lab.near, listener, address.parse()?)?.exchange()?))
    };
    for (listener, address) in [(&local, "127.0.0.1"), (&remote, "10.99.0.2"), (&both_there, "10.99.0.2")] {
        let slow = took(listener, address)?;
        ensure!((99.0..180.0).contains(&slow), "{slow} ms to {address} at {}", listener.local_addr()?);
    }
    // Named by its port alone, which is not about loopback.
    let fast = took(&both, "127.0.0.1")?;
    ensure!(fast < 50.0, "{fast} ms");
    let said = bench.update(&injection.id, delay(100, Direction::Egress, vec![port(7002)])).await;
    ensure!(said.is_err_and(|e| format!("{e:#}").contains("loopback")), "loopback was left");
    bench.end(&injection.id).await?;

    let own = partition(Direction::Both, vec![cidr("10.99.0.1/32"), cidr("10.99.0.3/32")]);
    let dns = NetworkFault {
        dns: Some(Dns { answer: DnsAnswer::Nxdomain.into(), ..Dns::default() }),
        ..NetworkFault::default()
    };
    for (fault, address) in [(own, "10.99.0.1"), (dns, if file { "127.0.0.53" } else { "127.0.0.1" })] {
        let injection = bench.inject_into(process(sleeper.pid()), fault).await?;
        let warned = injection.warnings.iter().any(|warning| warning.contains(address));
        ensure!(warned, "{address}: {:?}", injection.warnings);
        bench.end(&injection.id).await?;
    }
    Ok(())
}

/// A packet on a VLAN passes the interface below too, and suffers once.
#[tokio::test(flavor = "multi_thread")]
async fn stacked_interfaces_hurt_a_packet_once() -> Result<()> {
    let mut bench = Bench::new("stacked").await?;
    for (netns, parent, end) in [(&bench.lab.near, "near0", 1), (&bench.lab.far, "far0", 2)] {
        let added = netns.ip(&format!("link add link {parent} name v7 type vlan id 7"));
        if added.as_ref().is_err_and(|e| format!("{e:#}").contains("Unknown device type")) {
            println!("no VLAN devices here");
            return Ok(());
        }
        added?;
        netns.ip(&format!("addr add 10.98.7.{end}/24 dev v7"))?;
        netns.ip("link set v7 up")?;
    }
    bench.settle()?;
    wait_for("the VLAN to be there", Duration::from_secs(10), || {
        Ok(reached(&bench.lab.near, "10.98.7.2")?.then_some(()))
    })?;
    let sleeper = Running::start("a sleeper", bench.lab.near.command("sleep").arg("600"))?;
    asleep(&sleeper)?;
    for direction in [Direction::Egress, Direction::Ingress] {
        let injection = bench.inject_into(process(sleeper.pid()), delay(100, direction, vec![])).await?;
        for address in ["10.98.7.2", "10.99.0.2"] {
            let rtt = bench.lab.near.rtt_with(address)?;
            ensure!((99.0..160.0).contains(&rtt), "{direction:?}: {rtt} ms to {address}");
        }
        ensure!(injection.warnings.iter().any(|w| w.contains("v7 left out")), "{:?}", injection.warnings);
        bench.end(&injection.id).await?;
    }
    // Who is named is taken.
    let near = bench.lab.near.path().display().to_string();
    let injection = bench.inject_into(interface("v7", &near), delay(100, Direction::Egress, vec![])).await?;
    let [vlan, below] = ["10.98.7.2", "10.99.0.2"].map(|address| bench.lab.near.rtt_with(address));
    let (vlan, below) = (vlan?, below?);
    ensure!((99.0..160.0).contains(&vlan) && below < 50.0, "{vlan} ms, {below} ms below");
    bench.end(&injection.id).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outer_end_of_a_veth_pair_serves_the_target() -> Result<()> {
    let mut bench = Bench::with_agent_in("side", |lab| &lab.far).await?;
    let outside = |fault: NetworkFault| NetworkFault { side: Side::Host.into(), ..fault };
    let inner = bench.lab.near.state()?;
    let requests = || vec![Peer { icmp_types: vec![8, 128], ..Peer::default() }];
    // Requests that leave the target, and those that arrive there.
    for (direction, out, back) in [(Direction::Egress, false, true), (Direction::Ingress, true, false)] {
        let injection = bench.inject(outside(partition(direction, requests()))).await?;
        ensure!(inner.changes(&bench.lab.near.state()?).is_empty(), "something is in the target's namespace");
        for (near, far) in [("10.99.0.1", "10.99.0.2"), ("fd99::1", "fd99::2")] {
            let got = (reached(&bench.lab.near, far)?, reached(&bench.lab.far, near)?);
            ensure!(got == (out, back), "{direction:?}: {far} is reached: {}, {near}: {}", got.0, got.1);
        }
        bench.end(&injection.id).await?;
    }
    let replies = vec![Peer { icmp_types: vec![0, 129], ..Peer::default() }];
    for (direction, peers) in [(Direction::Egress, requests()), (Direction::Ingress, replies)] {
        let injection = bench.inject(outside(delay(100, direction, peers))).await?;
        for far in ["10.99.0.2", "fd99::2"] {
            let rtt = bench.lab.near.rtt_with(far)?;
            ensure!((99.0..160.0).contains(&rtt), "{direction:?}: {rtt} ms");
        }
        ensure!(inner.changes(&bench.lab.near.state()?).is_empty(), "something is in the target's namespace");
        bench.end(&injection.id).await?;
    }
    // Peers are those of the target, though addresses and ports are seen from the other end.
    let listener = bench.lab.far.listen(7000)?;
    let peer = Peer { ports: ports(7000), ..cidr("10.99.0.2/32") };
    let injection = bench.inject(outside(delay(100, Direction::Both, vec![peer]))).await?;
    let slow = ms(Pair::new(&bench.lab.near, &listener, Lab::FAR)?.exchange()?);
    let fast = ms(Pair::new(&bench.lab.near, &listener, Lab::FAR_OTHER)?.exchange()?);
    ensure!((199.0..320.0).contains(&slow) && fast < 50.0, "{slow} ms, another address {fast} ms");
    bench.end(&injection.id).await?;
    let own = interface("far0", "");
    let said = bench.refused(own, outside(partition(Direction::Both, vec![port(7000)]))).await?;
    ensure!(said.contains("network.side"), "{said}");
    Ok(())
}

/// A Redis in a cgroup (v2) of its own on the near side.
struct Service {
    process: Running,
    // Dropped after the process.
    _cgroup: Unified,
    _dir: TempDir,
    port: u16,
}

impl Service {
    fn start(netns: &Netns, port: u16) -> Result<Self> {
        let cgroup = Unified::new(&unique("sockets"))?;
        let dir = tempfile::tempdir()?;
        // Debian's redis-server is a link to this.
        let tool = ["/usr/bin/redis-check-rdb", "/usr/local/bin/redis-check-rdb"].map(Path::new);
        let tool = tool.into_iter().find(|tool| tool.exists()).context("there is no Redis here")?;
        let server = dir.path().join("redis-server");
        symlink(tool, &server)?;
        let mut command = netns.command(server);
        command.args([
            "--port",
            &port.to_string(),
            "--bind",
            "*",
            "-::*",
            "--protected-mode",
            "no",
            "--save",
            "",
        ]);
        command.arg("--dir").arg(dir.path());
        let (name, command) = (format!("a server at {port}"), cgroup.wrap(&command));
        let process = Running::start_with(name, &command, Stdio::null(), Stdio::null(), Stdio::null())?;
        let service = Self { process, _cgroup: cgroup, _dir: dir, port };
        wait_for("the server to listen", Duration::from_secs(20), || {
            Ok(connects(netns, Ipv4Addr::LOCALHOST.into(), port)?.then_some(()))
        })?;
        Ok(service)
    }

    /// Connects from the far side and says a word: how long until an answer is there, milliseconds; none where none comes.
    fn answers(&self, lab: &Lab, address: IpAddr) -> Result<Option<f64>> {
        let started = Instant::now();
        let Ok(mut stream) = lab.far.connect(SocketAddr::new(address, self.port), SOON)? else {
            return Ok(None);
        };
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"PING\r\n")?;
        let mut answer = [0; 7];
        let answered = stream.read_exact(&mut answer).is_ok();
        ensure!(!answered || &answer == b"+PONG\r\n", "a strange answer: {answer:?}");
        Ok(answered.then(|| ms(started.elapsed())))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_targets_sockets_are_hurt() -> Result<()> {
    let mut bench = Bench::new("sockets").await?;
    let [hit, neighbour] = [Service::start(&bench.lab.near, 7001)?, Service::start(&bench.lab.near, 7002)?];
    let of_target = |fault: NetworkFault| NetworkFault { sockets: Whose::Target.into(), ..fault };
    let target = process(hit.process.pid());
    for direction in [Direction::Egress, Direction::Ingress] {
        let injection = bench.inject_into(target.clone(), of_target(delay(200, direction, vec![]))).await?;
        for near in [Lab::NEAR, Lab::NEAR_V6] {
            let (slow, fast) = (hit.answers(&bench.lab, near)?, neighbour.answers(&bench.lab, near)?);
            // Late are the handshake, which the listener has a part in, and the word or its answer.
            let right = slow.is_some_and(|slow| slow > 399.0) && fast.is_some_and(|fast| fast < 150.0);
            ensure!(
                right,
                "{direction:?} {near}: {slow:?} ms, the neighbour {fast:?} ms\n{}",
                bench.agent.log()
            );
        }
        bench.update(&injection.id, of_target(partition(direction, vec![]))).await?;
        for near in [Lab::NEAR, Lab::NEAR_V6] {
            ensure!(!connects(&bench.lab.far, near, hit.port)?, "{direction:?} {near}: not cut off");
            ensure!(
                neighbour.answers(&bench.lab, near)?.is_some(),
                "{direction:?} {near}: the neighbour is cut off"
            );
        }
        ensure!(reached(&bench.lab.near, "10.99.0.2")?, "pings have no socket of the target");
        bench.end(&injection.id).await?;
        let again = hit.answers(&bench.lab, Lab::NEAR)?;
        ensure!(again.is_some_and(|took| took < 150.0), "{again:?} ms afterwards");
    }
    Ok(())
}

/// Waits until a process is where it was to go, and does nothing any more.
fn asleep(sleeper: &Running) -> Result<()> {
    wait_for("the sleeper to sleep", Duration::from_secs(10), || {
        let exe = fs::read_link(format!("/proc/{}/exe", sleeper.pid()));
        Ok(exe.is_ok_and(|exe| exe.ends_with("sleep")).then_some(()))
    })
}

/// What arrives is known by what left: a flow is no longer the target's when somebody else sends in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_flow_that_changes_hands_is_not_the_targets_any_more() -> Result<()> {
    let mut bench = Bench::new("hands").await?;
    let cgroup = Unified::new(&unique("hands"))?;
    let sleeper = Running::start("a sleeper", &cgroup.wrap(bench.lab.near.command("sleep").arg("600")))?;
    asleep(&sleeper)?;
    let fault = NetworkFault { sockets: Whose::Target.into(), ..delay(200, Direction::Ingress, vec![]) };
    let injection = bench.inject_into(process(sleeper.pid()), fault).await?;
    // All pings to one address are one flow.
    let mut theirs = bench.lab.near.command("ping");
    theirs.args(["-n", "-c", "2", "-i", "0.5", "-W", "2", "10.99.0.2"]);
    let said = String::from_utf8(cgroup.wrap(&theirs).output()?.stdout)?;
    let hurt = figure(&bench.effect(&injection.id).await?, "delayed");
    ensure!(hurt >= 2.0, "{hurt} answers to the target were late: {said}");
    let rtt = bench.lab.near.rtt_with("10.99.0.2")?;
    ensure!(rtt < 100.0, "{rtt} ms for somebody else");
    bench.end(&injection.id).await?;
    Ok(())
}

/// Segments come back by a device of the agent's, whose socket they have; whose they are is known by their flow.
#[tokio::test(flavor = "multi_thread")]
async fn segments_are_the_targets_as_their_packet_was() -> Result<()> {
    const BYTES: usize = 400_000;
    let mut bench = Bench::new("segments").await?;
    let [hit, neighbour] = [Service::start(&bench.lab.near, 7001)?, Service::start(&bench.lab.near, 7002)?];
    let fault = |per_segment| NetworkFault {
        sockets: Whose::Target.into(),
        per_segment,
        ..delay(20, Direction::Egress, vec![])
    };
    let echo = |service: &Service, lab: &Lab| -> Result<()> {
        let mut stream = lab.far.connect(SocketAddr::new(Lab::NEAR, service.port), SOON)??;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(format!("*2\r\n$4\r\nECHO\r\n${BYTES}\r\n").as_bytes())?;
        stream.write_all(&vec![b'x'; BYTES])?;
        stream.write_all(b"\r\n")?;
        let mut answer = vec![0; BYTES];
        Ok(stream.read_exact(&mut answer)?)
    };
    let target = process(hit.process.pid());
    // Also where the rule learns only later that it is about segments.
    let injection = bench.inject_into(target, fault(false)).await?;
    bench.update(&injection.id, fault(true)).await?;
    echo(&neighbour, &bench.lab)?;
    let spared = figure(&bench.effect(&injection.id).await?, "matched");
    ensure!(spared == 0.0, "{spared} packets of the neighbour's");
    echo(&hit, &bench.lab)?;
    let ended = bench.end(&injection.id).await?;
    // Full segments of 1448 bytes, if not less.
    let least = (BYTES / 1448) as f64;
    let [matched, delayed] = ["matched", "delayed"].map(|name| figure(&ended, name));
    ensure!(matched >= least && delayed >= least, "{matched} packets, {delayed} late, of at least {least}");
    Ok(())
}

/// A process that shares its network with everybody, and has nothing by which to tell its packets.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_a_cgroup_of_its_own_is_refused() -> Result<()> {
    let mut bench = Bench::with_agent_in("nocgroup", |lab| &lab.near).await?;
    let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let root =
        root.into_iter().find(|root| root.join("cgroup.controllers").exists()).context("no cgroup v2")?;
    let mut command = Command::new("sh");
    command.args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#]).arg(root);
    command.args(["nsenter", &format!("--net={}", bench.lab.near.path().display()), "sleep", "600"]);
    let sleeper = Running::start("a sleeper", &command)?;
    asleep(&sleeper)?;
    let fault = partition(Direction::Both, vec![port(7000)]);
    let said = bench.refused(process(sleeper.pid()), fault.clone()).await?;
    ensure!(said.contains("has no cgroup (v2) of its own") && said.contains("sockets: all"), "{said}");
    // What the advice says works.
    let listener = bench.lab.far.listen(7000)?;
    let all = NetworkFault { sockets: Whose::All.into(), ..fault };
    let injection = bench.inject_into(process(sleeper.pid()), all).await?;
    ensure!(!connects(&bench.lab.near, Lab::FAR, 7000)?);
    bench.end(&injection.id).await?;
    ensure!(connects(&bench.lab.near, Lab::FAR, listener.local_addr()?.port())?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ways_into_a_node_are_spared() -> Result<()> {
    let mut bench = Bench::with_agent_in("spared", |lab| &lab.near).await?;
    let own = interface("near0", "");
    let ports = [22, 6443, 7000, 10250];
    let _in: Vec<_> = ports.iter().map(|&port| bench.lab.near.listen(port)).collect::<Result<_>>()?;
    let _out: Vec<_> = ports.iter().map(|&port| bench.lab.far.listen(port)).collect::<Result<_>>()?;
    let open = |from: &Netns, to: IpAddr| -> Result<Vec<u16>> {
        let mut open = Vec::new();
        for port in ports {
            if connects(from, to, port)? {
                open.push(port);
            }
        }
        Ok(open)
    };
    let said = bench.refused(own.clone(), partition(Direction::Both, vec![])).await?;
    ensure!(said.contains("network.peers") && said.contains("--allow-whole-node-network"), "{said}");
    let ssh =
        Peer { local_ports: squall_tests::ports(22), protocol: Protocol::Tcp.into(), ..Peer::default() };
    let said = bench.refused(own.clone(), partition(Direction::Both, vec![ssh])).await?;
    ensure!(said.contains("spared") && said.contains("unprotected"), "{said}");

    let fault = |unprotected| NetworkFault {
        unprotected,
        ..partition(Direction::Both, vec![cidr("10.99.0.0/24"), cidr("fd99::/64")])
    };
    for (near, far) in [(Lab::NEAR, Lab::FAR), (Lab::NEAR_V6, Lab::FAR_V6)] {
        let injection = bench.inject_into(own.clone(), fault(false)).await?;
        // Others get in by SSH, the API and the kubelet; the node reaches the API and kubelets, and no SSH of others.
        let (inwards, outwards) = (open(&bench.lab.far, near)?, open(&bench.lab.near, far)?);
        ensure!(inwards == [22, 6443, 10250], "{near}: {inwards:?} are open");
        ensure!(outwards == [6443, 10250], "{far}: {outwards:?} are open");
        bench.update(&injection.id, fault(true)).await?;
        ensure!(
            open(&bench.lab.far, near)?.is_empty() && open(&bench.lab.near, far)?.is_empty(),
            "spared all the same"
        );
        bench.end(&injection.id).await?;
        ensure!(open(&bench.lab.far, near)? == ports);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_injections_share_an_interface() -> Result<()> {
    const PEERS: u8 = 10;
    let mut bench = Bench::new("twenty").await?;
    for i in 0..PEERS {
        bench.lab.far.ip(&format!("addr add 10.99.0.{}/24 dev far0", 100 + i))?;
    }
    bench.settle()?;
    // For each peer two: the first of them is in force.
    let (mut firsts, mut seconds) = (Vec::new(), Vec::new());
    for i in 0..PEERS {
        let peer = format!("10.99.0.{}/32", 100 + i);
        firsts.push(
            bench.inject(delay(20 + 10 * u64::from(i), Direction::Egress, vec![cidr(&peer)])).await?.id,
        );
        seconds.push(
            bench.inject(delay(200 + 10 * u64::from(i), Direction::Egress, vec![cidr(&peer)])).await?.id,
        );
    }
    let check = |lab: &Lab, expected: &dyn Fn(u8) -> u64| -> Result<()> {
        for i in 0..PEERS {
            let rtt = lab.near.rtt_with(&format!("10.99.0.{}", 100 + i))?;
            let expected = expected(i) as f64;
            ensure!(
                (expected - 0.5..expected + 9.0).contains(&rtt),
                "peer {i}: {rtt} ms instead of {expected}"
            );
        }
        let rtt = lab.near.rtt_with("10.99.0.2")?;
        ensure!(rtt < 10.0, "{rtt} ms to nobody's peer");
        Ok(())
    };
    let first = |i: u8| 20 + 10 * u64::from(i);
    let second = |i: u8| 200 + 10 * u64::from(i);
    check(&bench.lab, &first)?;
    for i in [3_u8, 4, 6] {
        bench.revert(&firsts[usize::from(i)]).await?;
    }
    check(&bench.lab, &|i| if [3, 4, 6].contains(&i) { second(i) } else { first(i) })?;
    bench.revert(&seconds[4]).await?;
    bench.revert(&seconds[5]).await?;
    bench.revert(&firsts[0]).await?;
    check(&bench.lab, &|i| match i {
        4 => 0,
        0 | 3 | 6 => second(i),
        _ => first(i),
    })?;
    // A new one comes last, where others have left room in the middle.
    let late = bench.inject(delay(150, Direction::Egress, vec![cidr("10.99.0.96/28")])).await?.id;
    check(&bench.lab, &|i| match i {
        4 => 150,
        0 | 3 | 6 => second(i),
        _ => first(i),
    })?;
    bench.revert(&late).await?;
    for id in firsts.iter().chain(&seconds) {
        bench.revert(id).await?;
    }
    bench.is_restored()?;
    check(&bench.lab, &|_| 0)
}
