use std::net::IpAddr;

use etherparse::PacketBuilder;
use proptest::{
    collection::vec,
    option,
    prelude::*,
    test_runner::{Config, TestRunner},
};
use squall_common::{
    decide::{self, COPY, Chance, LossModel, Memory, threshold},
    packet::{self, Address, Packet},
    rules::{Flags, Ports},
};

use super::*;

const ALWAYS: Window = Window { not_before: BootTime(0), until: BootTime(u64::MAX) };
/// A departure of a detour, and a loss at egress: of TCX, and of a classifier.
const REDIRECT: i32 = 7;
const STOLEN: i32 = 4;
const SHOT: i32 = 2;
const NEXT: i32 = -1;

/// What a person means by a clause.
fn means(clause: &Clause, packet: &Packet, way: Direction) -> bool {
    let host = match packet.peer.address() {
        Address::V4(a) => Cidr::new(IpAddr::from(a), 32),
        Address::V6(a) => Cidr::new(IpAddr::from(a), 128),
    };
    let host = host.expect("a host");
    let value = |dimension: Dimension| match dimension {
        Dimension::PeerPort => packet.ports().map(|(peer, _)| peer),
        Dimension::LocalPort => packet.ports().map(|(_, local)| local),
        Dimension::Vlan => Some(packet.vlan as u16),
        Dimension::Dscp => Some(packet.dscp as u16),
        Dimension::Icmp => packet.icmp_type.get().map(|t| t as u16),
        Dimension::Flags => packet.tcp_flags.get().map(|f| f as u16),
        Dimension::Fragment => Some(u16::from(packet.is_fragment())),
    };
    (match way {
        Direction::Egress => clause.egress,
        Direction::Ingress => clause.ingress,
    }) && clause.protocol.is_none_or(|p| p as u64 == packet.kind)
        && (clause.cidrs.is_empty() || clause.cidrs.iter().any(|c| c.covers(&host)))
        && Dimension::ALL.into_iter().all(|d| {
            clause.values(d).is_none_or(|wanted| value(d).is_some_and(|value| wanted.contains(&value)))
        })
}

/// A rule, as plainly as it can be written down.
struct Model {
    spec: Spec,
    window: Window,
    memory: Memory<Cell>,
    action: Action<Cell>,
    /// Matched, dropped, delayed.
    counts: [u64; 3],
}

impl Model {
    fn new(spec: &Spec, window: Window) -> Self {
        let action = Action::<Cell>::default();
        action.store(&spec.action);
        Self { spec: spec.clone(), window, memory: Memory::default(), action, counts: [0; 3] }
    }

    /// The verdict, if the packet is this rule's.
    fn judge(&mut self, packet: &Packet, way: Direction) -> Option<i32> {
        let clauses = &self.spec.clauses;
        let matching = clauses.iter().find(|clause| means(clause, packet, way))?;
        if matching.except || self.window.until.0 == 0 {
            return None;
        }
        let n = self.counts[0];
        self.counts[0] += 1;
        if !decide::touched(&self.action, n, || packet.flow()) {
            return Some(NEXT);
        }
        // Nobody is sent twice here: a copy would really leave.
        assert!(!decide::duplicated(&self.action, &self.memory, n) && n & COPY == 0);
        if decide::lost(&self.action, &self.memory, n) {
            self.counts[1] += 1;
            return Some(if way == Direction::Egress { STOLEN } else { SHOT });
        }
        if self.spec.action.latency > 0 && !decide::ahead(&self.action, &self.memory, n) {
            self.counts[2] += 1;
            return Some(REDIRECT);
        }
        Some(NEXT)
    }
}

fn frames() -> impl Strategy<Value = Vec<u8>> {
    let tcp = (0..16_u8).prop_map(|flags| (0_u8, flags));
    let udp = Just((1_u8, 0_u8));
    let icmp = prop_oneof![Just(0_u8), Just(8)].prop_map(|kind| (2_u8, kind));
    let what = prop_oneof![tcp, udp, icmp];
    let tag = option::weighted(0.3, 1..4_u16);
    (what, any::<bool>(), 0..3_u8, 0..3_u8, (1..12_u16, 1..12_u16), 0..4_u8, tag, any::<bool>()).prop_map(
        |((kind, detail), v6, a, b, (source, destination), dscp, tag, fragment)| {
            let v4 = |x: u8| [10, x, 0, x];
            let long = |x: u8| [0xfd, x, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, x];
            let ip = if v6 {
                PacketBuilder::ipv6(long(a), long(b), 9)
            } else {
                PacketBuilder::ipv4(v4(a), v4(b), 9)
            };
            let mut packet = Vec::new();
            match kind {
                0 => {
                    let mut tcp = ip.tcp(source, destination, 1, 1);
                    if detail & 1 != 0 {
                        tcp = tcp.fin();
                    }
                    if detail & 2 != 0 {
                        tcp = tcp.syn();
                    }
                    if detail & 4 != 0 {
                        tcp = tcp.psh();
                    }
                    if detail & 8 != 0 {
                        tcp = tcp.ack(1);
                    }
                    tcp.write(&mut packet, b"data")
                }
                1 => ip.udp(source, destination).write(&mut packet, b"data"),
                _ if v6 => ip.icmpv6_echo_request(1, 1).write(&mut packet, b"data"),
                _ if detail == 0 => ip.icmpv4_echo_reply(1, 1).write(&mut packet, b"data"),
                _ => ip.icmpv4_echo_request(1, 1).write(&mut packet, b"data"),
            }
            .expect("it fits");
            if v6 {
                packet[0] |= dscp >> 2;
                packet[1] |= dscp << 6;
            } else {
                packet[1] = dscp << 2;
                if fragment {
                    // The second of several.
                    packet[6..8].copy_from_slice(&0x2001_u16.to_be_bytes());
                }
            }
            let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
            if let Some(tag) = tag {
                frame.extend([0x81, 0]);
                frame.extend(tag.to_be_bytes());
            }
            frame.extend(if v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
            frame.extend(packet);
            frame
        },
    )
}

prop_compose! {
    fn clauses()(
        except in proptest::bool::weighted(0.2), way in 0..3_u8,
        cidrs in vec((any::<bool>(), 0..3_u8, 0..=32_u8), 0..3), peer_ports in vec((1..12_u16, 0..4_u16), 0..2),
        local_ports in vec((1..12_u16, 0..4_u16), 0..2),
        protocol in option::weighted(0.3, prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Icmp)]),
        dscp in vec(0..4_u8, 0..2), vlans in vec(0..4_u16, 0..2), icmp_types in vec(prop_oneof![Just(0_u8), Just(8), Just(128)], 0..2),
        tcp_flags in option::weighted(0.15, (0..16_u8, 0..16_u8)), fragments in option::weighted(0.2, any::<bool>()),
    ) -> Clause {
        let ports = |all: Vec<(u16, u16)>| all.into_iter().map(|(first, more)| Ports { first, last: first + more }).collect();
        let cidr = |(v6, x, len): (bool, u8, u8)| if v6 {
            Cidr::new(IpAddr::from([0xfd, x, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, x]), len * 4)
        } else {
            Cidr::new(IpAddr::from([10, x, 0, x]), len)
        };
        Clause {
            except,
            egress: way != 1,
            ingress: way != 0,
            cidrs: cidrs.into_iter().filter_map(cidr).collect(),
            peer_ports: ports(peer_ports),
            local_ports: ports(local_ports),
            protocol,
            dscp,
            vlans,
            icmp_types,
            tcp_flags: tcp_flags.map(|(set, clear)| Flags { set, clear: clear & !set }),
            fragments,
            cgroups: None,
        }
    }
}

prop_compose! {
    fn actions()(
        seed in 1..1000_u64, share in prop_oneof![Just(1.0), 0.2..0.9_f64], flows in prop_oneof![Just(1.0), 0.2..0.9_f64],
        loss in 0..5_u8, ratio in 0.1..0.9_f64, correlation in prop_oneof![Just(0.0), 0.1..0.8_f64],
        latency in prop_oneof![Just(0_u64), Just(1_000_000)], reorder in prop_oneof![Just(0.0), 0.2..0.8_f64], gap in 1..4_u64,
    ) -> Action<u64> {
        let action = Action { share: threshold(share), flow_share: threshold(flows), latency, ..Action::new(seed) };
        let action = match loss {
            1 => action.with_loss(ratio, correlation),
            2 => action.with_gilbert_elliott(ratio / 2.0, ratio, 0.9, 0.1),
            3 => action.with_four_states(ratio / 2.0, ratio / 2.0, 0.2, ratio, 0.1),
            4 => Action { loss: 1 + seed % 5, loss_model: LossModel::Every as u64, ..action },
            _ => action,
        };
        if latency > 0 { Action { reorder: Chance::new(reorder, correlation), gap, ..action } } else { action }
    }
}

/// Random rules and random packets: what the program in the kernel does is what the model says, packet by packet, and so
/// are its counters. Needs root.
#[tokio::test(flavor = "multi_thread")]
async fn privileged_the_kernel_does_what_the_rules_mean() {
    let port = Mutex::new(scratch().expect("root, and a kernel with eBPF"));
    let rules = vec((vec(clauses(), 1..5), actions(), proptest::bool::weighted(0.9)), 1..6);
    let traffic = vec((frames(), any::<bool>()), 20..60);
    let mut runner = TestRunner::new(Config { cases: 200, failure_persistence: None, ..Config::default() });
    let result = runner.run(&(rules, traffic), |(rules, traffic)| {
        let mut port = lock(&port);
        let netns = Arc::clone(&port.netns);
        let mut models = Vec::new();
        for (clauses, action, on) in rules {
            let mut clauses = clauses;
            clauses.sort_by_key(|clause| !clause.except);
            let spec = Spec { clauses, action, quantiles: None, dns: None, endpoints: BTreeMap::new() };
            let window = if on { ALWAYS } else { Window { until: BootTime(0), ..ALWAYS } };
            let rule = port.add(spec.clone(), window).expect("added");
            models.push((rule, Model::new(&spec, window)));
        }
        let table = Arc::clone(&port.desk.table);
        let programs = &mut port.programs;
        let verdicts = netns.run(|| {
            let run = |(frame, out): &(Vec<u8>, bool)| {
                let way = if *out { Direction::Egress } else { Direction::Ingress };
                Ok((way, frame.clone(), programs.run(Program::Port(way), frame, 1)?.0))
            };
            traffic.iter().map(run).collect::<Result<Vec<_>>>()
        });
        let same = (|| {
            for (i, (way, frame, verdict)) in verdicts.expect("run").into_iter().enumerate() {
                let ethertype = u16::from_be_bytes([frame[12], frame[13]]);
                let packet = packet::parse(&frame[..], ethertype, 0, 14, way);
                let judged =
                    packet.and_then(|p| models.iter_mut().find_map(|(_, model)| model.judge(&p, way)));
                prop_assert_eq!(verdict, judged.unwrap_or(NEXT), "packet {} {:?} {:?}", i, way, packet);
            }
            for (rule, model) in &models {
                let cells = &table.rules[*rule];
                let counted = [&cells.matched, &cells.dropped, &cells.delayed].map(Cell::load);
                prop_assert_eq!(counted, model.counts);
            }
            Ok(())
        })();
        // Also where they differ: a smaller case is looked for on the same port.
        for (rule, _) in models {
            port.remove(rule).expect("removed");
        }
        same?;
        // Programs serve one interface after the other, so that nothing may stay in the sieve.
        let left = table.grains.load() != 0 || port.programs.sieve().iter().any(|word| word.load() != 0);
        prop_assert!(!left, "the sieve is not empty");
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    port.into_inner().unwrap_or_else(PoisonError::into_inner).close().expect("closed");
}

/// What one rule found out about the machine the next one knows from its first packet on. Needs root.
#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_rule_begins_with_what_the_one_before_it_was_late() {
    let mut port = scratch().expect("root, and a kernel with eBPF");
    let spec = Spec {
        clauses: vec![Clause { egress: true, ..Clause::default() }],
        action: Action::new(1),
        quantiles: None,
        dns: None,
        endpoints: BTreeMap::new(),
    };
    let mut begun = Vec::new();
    // Late by so much; 0: nothing was late, or nobody knows.
    for found in [9_000, 7_000, 0, 8_000, 70_000, 7_000] {
        let rule = port.add(spec.clone(), ALWAYS).expect("added");
        let cells = &port.desk.table.rules[rule];
        begun.push(cells.lateness.settled());
        cells.lateness.begin(found);
        cells.delayed.add(1);
        port.remove(rule).expect("removed");
    }
    assert_eq!(begun, [0, 9_000, 7_000, 7_000, 8_000, 16_000]);
    port.close().expect("closed");
}

/// What does not fit is refused before anything of it is written, and what fits only without the old is exchanged. Needs root.
#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_rule_that_does_not_fit_leaves_nothing_behind() {
    let mut port = scratch().expect("root, and a kernel with eBPF");
    let netns = Arc::clone(&port.netns);
    let hosts = |first: u32, count: u32| {
        let cidr = |n: u32| Cidr::new(IpAddr::from((0x0a00_0000 + n).to_be_bytes()), 32).expect("a host");
        let cidrs = (first..first + count).map(cidr).collect();
        let clauses = vec![Clause { egress: true, cidrs, ..Clause::default() }];
        Spec { clauses, action: Action::new(1), quantiles: None, dns: None, endpoints: BTreeMap::new() }
    };
    let error = port.add(hosts(0, CIDRS + 1), ALWAYS).expect_err("there is no room");
    assert!(
        error.to_string().contains("65537 CIDRs of IPv4") && error.to_string().contains("65536"),
        "{error}"
    );
    let mut many = hosts(0, 1);
    many.endpoints = (0..=ENDPOINTS).map(|endpoint| (endpoint, 1)).collect();
    let error = port.add(many, ALWAYS).expect_err("there is no room");
    assert!(error.to_string().contains("4097 ports"), "{error}");

    let rule = port.add(hosts(0, 40_000), ALWAYS).expect("it fits");
    port.change(rule, hosts(50_000, 40_000)).expect("it fits without the old");
    let matched = |port: &mut Port, n: u32| {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        let packet = PacketBuilder::ipv4([10, 9, 9, 9], (0x0a00_0000 + n).to_be_bytes(), 9).udp(1, 2);
        packet.write(&mut frame, b"data").expect("it fits");
        let before = port.desk.table.rules[rule].matched.load();
        netns.run(|| port.programs.run(Program::Port(Direction::Egress), &frame, 1)).expect("run");
        port.desk.table.rules[rule].matched.load() > before
    };
    assert!([50_000, 89_999].into_iter().all(|n| matched(&mut port, n)), "the new");
    assert!(![0, 39_999, 90_000].into_iter().any(|n| matched(&mut port, n)), "the old");
    port.remove(rule).expect("removed");
    assert!(port.trie.is_empty() && port.listening.is_empty());
    port.close().expect("closed");
}

/// A port whose close fails is there for whoever tries again, and is closed then. Needs root.
#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_could_not_be_closed_stays_to_be_closed() {
    let mut port = scratch().expect("root, and a kernel with eBPF");
    let key = Key { netns: port.netns.inode(), interface: port.interface.index, outside: false };
    let everyone: Cidr = "10.0.0.0/8".parse().expect("a prefix");
    // In the map, as the port has it, it is not: removing it fails.
    port.trie.insert(everyone, 1);
    *lock(&place(key).port) = Some(port);
    settle(key).expect_err("an entry that is not there cannot be removed");
    settle(key).expect_err("it is not closed by having failed");
    lock(&place(key).port).as_mut().expect("it is still there").trie.clear();
    assert!(settle(key).expect("nothing is in the way any more"));
    assert!(lock(&place(key).port).is_none());
}
