//! What the network fault answers and alters: refusals, resets, cuts, DNS, single segments and single bits.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hickory_proto::{op::ResponseCode, rr::RecordType};
use squall_proto::v1::{
    Chance, Corrupt, Cut, Direction, Dns, DnsAnswer, Loss, NetworkFault, Peer, Protocol, Refusal,
};
use squall_tests::{Answer, Bench, Lab, MS, NameServer, Pair, Sockets, ask, death, figure, port, ports};

const MIB: usize = 1 << 20;
/// A connection or an answer that is not there after this time does not come. Longer than a lost SYN takes to be sent again.
const PATIENCE: Duration = Duration::from_secs(5);
/// Sooner than anything that is sent again.
const AT_ONCE: Duration = Duration::from_millis(700);

fn refusal(direction: Direction, peers: Vec<Peer>) -> NetworkFault {
    NetworkFault {
        direction: direction.into(),
        peers,
        partition: true,
        refusal: Refusal::Answer.into(),
        ..NetworkFault::default()
    }
}

/// How a connection attempt ends, and how long that takes.
fn attempt(from: &squall_tests::Netns, to: IpAddr, port: u16) -> Result<(Option<ErrorKind>, Duration)> {
    let started = Instant::now();
    let connected = from.connect(SocketAddr::new(to, port), PATIENCE)?;
    Ok((connected.err().map(|error| error.kind()), started.elapsed()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_connection_is_refused_at_once() -> Result<()> {
    let mut bench = Bench::new("refuse").await?;
    let [hit, spared] = [bench.lab.far.listen(7000)?, bench.lab.far.listen(7001)?];
    for direction in [Direction::Egress, Direction::Ingress, Direction::Both] {
        for far in [Lab::FAR, Lab::FAR_V6] {
            let mut before = Pair::new(&bench.lab.near, &hit, far)?;
            let mut other = Pair::new(&bench.lab.near, &spared, far)?;
            before.exchange()?;
            let injection = bench.inject(refusal(direction, vec![port(7000)])).await?;
            if direction == Direction::Ingress {
                // The answer to the handshake is refused to the far side, and the near side hears nothing.
                let (how, took) = attempt(&bench.lab.near, far, 7000)?;
                ensure!(how == Some(ErrorKind::TimedOut), "{far}: {how:?} after {took:?}");
                before.server.write_all(b"late")?;
                ensure!(death(&mut before.server)? == ErrorKind::ConnectionReset, "{far}: not reset");
            } else {
                let (how, took) = attempt(&bench.lab.near, far, 7000)?;
                ensure!(
                    how == Some(ErrorKind::ConnectionRefused) && took < AT_ONCE,
                    "{far}: {how:?} after {took:?}"
                );
                before.client.write_all(b"late")?;
                ensure!(death(&mut before.client)? == ErrorKind::ConnectionReset, "{far}: not reset");
            }
            let took = other.exchange().context("the other connection")?;
            ensure!(took < AT_ONCE, "{took:?} to another port");
            let ended = bench.end(&injection.id).await?;
            ensure!(figure(&ended, "refused") >= 2.0, "{ended:?}");
            Pair::new(&bench.lab.near, &hit, far)?.exchange().context("afterwards")?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_datagram_is_an_error() -> Result<()> {
    let mut bench = Bench::new("prohibit").await?;
    let injection = bench.inject(refusal(Direction::Egress, vec![port(7000)])).await?;
    // "Communication administratively prohibited" in the words of each family: icmp_err_convert in net/ipv4/icmp.c and
    // icmpv6_err_convert in net/ipv6/icmp.c.
    for (far, expected) in
        [(Lab::FAR, nix::errno::Errno::EHOSTUNREACH), (Lab::FAR_V6, nix::errno::Errno::EACCES)]
    {
        let sink = bench.lab.far.udp(far, 7000)?;
        let socket = bench.lab.near.udp(far, 0)?;
        socket.connect((far, 7000))?;
        socket.send(b"hello")?;
        let said = socket.recv(&mut [0; 16]).err().context("an answer came")?;
        ensure!(said.raw_os_error() == Some(expected as i32), "{far}: {said}");
        ensure!(
            squall_tests::drain(&sink, Duration::from_millis(50))?.is_empty(),
            "{far}: it arrived all the same"
        );
        let other = bench.lab.near.udp(far, 0)?;
        let sink = bench.lab.far.udp(far, 7001)?;
        other.send_to(b"hello", (far, 7001))?;
        ensure!(
            squall_tests::drain(&sink, Duration::from_millis(300))?.len() == 1,
            "{far}: the other port is cut off"
        );
    }
    let ended = bench.end(&injection.id).await?;
    ensure!(figure(&ended, "refused") == 2.0 && figure(&ended, "dropped") == 0.0, "{ended:?}");
    // ping says why.
    let icmp =
        Peer { protocol: Protocol::Icmp.into(), cidrs: vec!["10.99.0.2/32".into()], ..Peer::default() };
    let injection = bench.inject(refusal(Direction::Egress, vec![icmp])).await?;
    let (answers, said) = bench.lab.near.ping_with("-c 2 -i 0.1 -W 1 10.99.0.2")?;
    ensure!(answers.is_empty() && said.contains("Packet filtered"), "{said}");
    bench.end(&injection.id).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_seen_at_both_ends() -> Result<()> {
    let mut bench = Bench::new("reset").await?;
    let [hit, spared] = [bench.lab.far.listen(7000)?, bench.lab.far.listen(7001)?];
    for direction in [Direction::Egress, Direction::Ingress] {
        for far in [Lab::FAR, Lab::FAR_V6] {
            let mut pair = Pair::new(&bench.lab.near, &hit, far)?;
            let mut silent = Pair::new(&bench.lab.near, &hit, far)?;
            let mut other = Pair::new(&bench.lab.near, &spared, far)?;
            pair.exchange()?;
            silent.exchange()?;
            let fault = NetworkFault {
                direction: direction.into(),
                peers: vec![port(7000)],
                reset: true,
                ..NetworkFault::default()
            };
            let injection = bench.inject(fault).await?;
            let sender = if direction == Direction::Egress { &mut pair.client } else { &mut pair.server };
            sender.write_all(b"the last words")?;
            for (end, stream) in [("near", &mut pair.client), ("far", &mut pair.server)] {
                let how = death(stream).with_context(|| format!("{direction:?} {far}: the {end} end"))?;
                ensure!(how == ErrorKind::ConnectionReset, "{direction:?} {far}: {how:?} at the {end} end");
            }
            other.exchange().context("the other connection")?;
            let ended = bench.end(&injection.id).await?;
            ensure!(figure(&ended, "reset") >= 1.0, "{ended:?}");
            // Who sent nothing lives on.
            silent.exchange().context("the silent connection")?;
        }
    }
    Ok(())
}

/// Sends a little at a time and waits for it, until the connection breaks: how many bytes arrived, at most this many.
fn until_cut(pair: &mut Pair, most: usize) -> Result<usize> {
    const PIECE: usize = 5000;
    let (mut arrived, mut buffer) = (0, [0; PIECE]);
    while arrived < most {
        if pair.client.write_all(&[7; PIECE]).is_err() {
            break;
        }
        match pair.server.read_exact(&mut buffer) {
            Ok(()) => arrived += PIECE,
            Err(error) => {
                ensure!(error.kind() == ErrorKind::ConnectionReset, "{error} after {arrived} bytes");
                break;
            }
        }
    }
    Ok(arrived)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_cut_after_its_bytes() -> Result<()> {
    const AFTER: usize = 400_000;
    let mut bench = Bench::new("cut").await?;
    let listener = bench.lab.far.listen(7000)?;
    for far in [Lab::FAR, Lab::FAR_V6] {
        let fault = NetworkFault {
            peers: vec![port(7000)],
            cut: Some(Cut { after_bytes: AFTER as u64 }),
            ..NetworkFault::default()
        };
        let injection = bench.inject(fault).await?;
        let [mut first, mut second] =
            [Pair::new(&bench.lab.near, &listener, far)?, Pair::new(&bench.lab.near, &listener, far)?];
        ensure!(until_cut(&mut second, AFTER / 2)? == AFTER / 2, "{far}: cut too early");
        let arrived = until_cut(&mut first, 2 * AFTER)?;
        println!("{arrived} bytes of payload came before the cut over {far}");
        // Headers and acknowledgements count too: 70 to 90 bytes each to 1400 of payload.
        ensure!((AFTER * 8 / 10..=AFTER).contains(&arrived), "{far}: cut after {arrived} bytes");
        ensure!(death(&mut first.client)? == ErrorKind::ConnectionReset, "{far}: the near end was not reset");
        second.exchange().context("a connection that has sent half")?;
        let rest = until_cut(&mut second, 2 * AFTER)?;
        let all = AFTER / 2 + rest;
        ensure!((AFTER * 8 / 10..=AFTER).contains(&all), "{far}: the second was cut after {all} bytes");
        let ended = bench.end(&injection.id).await?;
        ensure!(figure(&ended, "reset") >= 2.0, "{ended:?}");
    }
    Ok(())
}

/// Clients and proxies take the same port again.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_connection_over_the_same_ports_begins_to_count_anew() -> Result<()> {
    const AFTER: usize = 100_000;
    let mut bench = Bench::new("again").await?;
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    bench.lab.near.inside(|| Ok(std::fs::write(range, "40000 40000")?))?;
    let listener = bench.lab.far.listen(7000)?;
    let cut = Some(Cut { after_bytes: AFTER as u64 });
    let injection =
        bench.inject(NetworkFault { peers: vec![port(7000)], cut, ..NetworkFault::default() }).await?;
    for n in 0..3 {
        let mut pair =
            Pair::new(&bench.lab.near, &listener, Lab::FAR).with_context(|| format!("connection {n}"))?;
        ensure!(pair.client.local_addr()?.port() == 40000, "another port");
        let arrived = until_cut(&mut pair, 2 * AFTER)?;
        ensure!((AFTER / 2..=AFTER).contains(&arrived), "connection {n} was cut after {arrived} bytes");
        ensure!(death(&mut pair.client)? == ErrorKind::ConnectionReset, "the near end was not reset");
    }
    bench.end(&injection.id).await?;
    Ok(())
}

fn dns(answer: DnsAnswer, names: &[&str], addresses: &[&str], delay_ms: u64) -> NetworkFault {
    let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
    NetworkFault {
        dns: Some(Dns {
            names: texts(names),
            answer: answer.into(),
            addresses: texts(addresses),
            delay_ns: delay_ms * MS,
        }),
        ..NetworkFault::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dns_answers_are_as_wrong_as_asked() -> Result<()> {
    const HIT: [&str; 3] = ["shop.test", "SHOP.test", "a.b.below.test"];
    const SPARED: [&str; 4] = ["bestshop.test", "x.shop.test", "below.test", "other.test"];
    const PATTERNS: [&str; 2] = ["shop.test", "*.below.test"];
    let mut bench = Bench::new("dns").await?;
    let right: Vec<IpAddr> = vec!["10.1.2.3".parse()?];
    let right_v6: Vec<IpAddr> = vec!["fd01::3".parse()?];
    for server in [Lab::FAR, Lab::FAR_V6] {
        let names = NameServer::start(&bench.lab.far, server)?;
        for name in HIT.iter().chain(&SPARED) {
            names.set(&name.to_lowercase(), &[right[0], right_v6[0]]);
        }
        let near = &bench.lab.near.path();
        let near = squall_tests::interface("near0", &near.display().to_string());
        let wrong = || {
            let answer = |code, addresses: &[&str]| -> Result<Option<Answer>> {
                let addresses = addresses.iter().map(|a| a.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
                Ok(Some(Answer { code, addresses }))
            };
            Ok::<_, anyhow::Error>([
                (
                    dns(DnsAnswer::Nxdomain, &PATTERNS, &[], 0),
                    RecordType::A,
                    answer(ResponseCode::NXDomain, &[])?,
                    0,
                ),
                (
                    dns(DnsAnswer::Servfail, &PATTERNS, &[], 300),
                    RecordType::A,
                    answer(ResponseCode::ServFail, &[])?,
                    300,
                ),
                (dns(DnsAnswer::Drop, &PATTERNS, &[], 0), RecordType::A, None, 0),
                (
                    dns(DnsAnswer::Addresses, &PATTERNS, &["10.9.9.9", "10.9.9.8", "fd09::9"], 0),
                    RecordType::A,
                    answer(ResponseCode::NoError, &["10.9.9.8", "10.9.9.9"])?,
                    0,
                ),
                (
                    dns(DnsAnswer::Addresses, &PATTERNS, &["10.9.9.9", "fd09::9"], 0),
                    RecordType::AAAA,
                    answer(ResponseCode::NoError, &["fd09::9"])?,
                    0,
                ),
                (
                    dns(DnsAnswer::Forward, &PATTERNS, &[], 300),
                    RecordType::A,
                    answer(ResponseCode::NoError, &["10.1.2.3"])?,
                    300,
                ),
            ])
        };
        for (fault, kind, expected, delay) in wrong()? {
            let what = format!("{:?} {kind} from {server}", fault.dns.as_ref().map(Dns::answer));
            let forwarded = fault.dns.as_ref().is_some_and(|dns| dns.answer() == DnsAnswer::Forward);
            let injection = bench.inject_into(near.clone(), fault).await?;
            let _before = names.asked();
            for name in HIT {
                let (answer, took) = ask(&bench.lab.near, server, name, kind, Duration::from_secs(1))?;
                ensure!(answer == expected, "{what}: {name}: {answer:?}");
                let (least, most) = (Duration::from_millis(delay), Duration::from_millis(delay) + AT_ONCE);
                ensure!(answer.is_none() || (least..most).contains(&took), "{what}: {name}: {took:?}");
            }
            let asked = names.asked();
            ensure!(
                asked.len() == if forwarded { HIT.len() } else { 0 },
                "{what}: the server was asked for {asked:?}"
            );
            for name in SPARED {
                let (answer, took) = ask(&bench.lab.near, server, name, kind, PATIENCE)?;
                let addresses = if kind == RecordType::A { right.clone() } else { right_v6.clone() };
                let expected = Some(Answer { code: ResponseCode::NoError, addresses });
                ensure!(
                    answer == expected && took < AT_ONCE,
                    "{what}: {name}, which is spared: {answer:?} after {took:?}"
                );
            }
            let ended = bench.end(&injection.id).await?;
            let counted = match expected {
                None => figure(&ended, "dropped"),
                Some(_) if forwarded => figure(&ended, "delayed"),
                Some(_) => figure(&ended, "answered"),
            };
            ensure!(counted == HIT.len() as f64, "{what}: {ended:?}");
            let (answer, took) = ask(&bench.lab.near, server, HIT[0], RecordType::A, PATIENCE)?;
            ensure!(answer.is_some_and(|a| a.addresses == right) && took < AT_ONCE, "{what}: still hurt");
        }
        // Without names it is every name.
        let injection = bench.inject_into(near, dns(DnsAnswer::Nxdomain, &[], &[], 0)).await?;
        let (answer, _) = ask(&bench.lab.near, server, "other.test", RecordType::A, PATIENCE)?;
        ensure!(answer.is_some_and(|answer| answer.code == ResponseCode::NXDomain));
        bench.end(&injection.id).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_segment_has_a_fate_of_its_own() -> Result<()> {
    const RATIO: f64 = 0.1;
    let mut bench = Bench::new("segments").await?;
    let listener = bench.lab.far.listen(7000)?;
    for far in [Lab::FAR, Lab::FAR_V6] {
        let fault = |ratio, per_segment| NetworkFault {
            direction: Direction::Egress.into(),
            peers: vec![Peer { ports: ports(7000), ..Peer::default() }],
            loss: Some(Loss { ratio, ..Loss::default() }),
            per_segment,
            ..NetworkFault::default()
        };
        // So that it means something below: without, a packet of many segments is decided on once.
        let injection = bench.inject(fault(0.001, false)).await?;
        ensure!(Pair::new(&bench.lab.near, &listener, far)?.transfer(16 * MIB)? == 0);
        let ended = bench.end(&injection.id).await?;
        let whole = figure(&ended, "segments") / figure(&ended, "matched");
        ensure!(whole > 2.0, "{whole} segments a packet: nothing to tell apart");

        let injection = bench.inject(fault(RATIO, true)).await?;
        let bytes = 4 * MIB;
        let started = Instant::now();
        ensure!(
            Pair::new(&bench.lab.near, &listener, far)?.transfer(bytes)? == 0,
            "{far}: other bytes arrived"
        );
        let ended = bench.end(&injection.id).await?;
        let [matched, segments, dropped] =
            ["matched", "segments", "dropped"].map(|name| figure(&ended, name));
        println!(
            "{far}: {whole:.1} segments a packet otherwise; {dropped} of {matched} dropped in {:?}",
            started.elapsed()
        );
        ensure!(matched == segments && matched > bytes as f64 / 1460.0, "{ended:?}");
        let sigma = (matched * RATIO * (1.0 - RATIO)).sqrt();
        ensure!((dropped - matched * RATIO).abs() < 5.0 * sigma, "{dropped} of {matched} segments dropped");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_caught_or_not() -> Result<()> {
    let mut bench = Bench::new("corrupt").await?;
    let listener = bench.lab.far.listen(7000)?;
    let fault = |silent| NetworkFault {
        direction: Direction::Egress.into(),
        peers: vec![port(7000)],
        corrupt: Some(Corrupt { chance: Some(Chance { ratio: 0.01, ..Chance::default() }), silent }),
        ..NetworkFault::default()
    };
    for far in [Lab::FAR, Lab::FAR_V6] {
        let bytes = 64 * MIB;
        for silent in [false, true] {
            let caught = bench.lab.far.snmp("Tcp", "InCsumErrors")?;
            let injection = bench.inject(fault(silent)).await?;
            let wrong = Pair::new(&bench.lab.near, &listener, far)?.transfer(bytes)?;
            let caught = bench.lab.far.snmp("Tcp", "InCsumErrors")? - caught;
            let ended = bench.end(&injection.id).await?;
            let corrupted = figure(&ended, "corrupted");
            println!("{far}: {corrupted} corrupted, {caught} caught, {wrong} bytes wrong");
            ensure!(corrupted > 0.0, "{ended:?}");
            if silent {
                // One bit each; what had no payload was left alone.
                ensure!(
                    wrong > 0 && wrong as f64 <= corrupted && caught == 0,
                    "{wrong} bytes wrong, {caught} caught: {ended:?}"
                );
            } else {
                ensure!(
                    wrong == 0 && caught as f64 == corrupted,
                    "{wrong} bytes wrong, {caught} caught: {ended:?}"
                );
            }
        }
        ensure!(Pair::new(&bench.lab.near, &listener, far)?.transfer(bytes)? == 0, "still corrupted");
    }
    Ok(())
}
