//! Every knob of a network fault: as a plan writes it, as an agent is told, and in words; and every refusal.

use std::fmt::Write as _;

use super::*;

/// A plan with these network faults, on top of targets that they may name.
fn plan_with(faults: &[&str]) -> String {
    let mut text = "apiVersion: squall.dev/v1
kind: Plan
metadata: { name: knobs }
targets:
  shop:    { process: { exe: shop } }
  same:    { process: { exe: shop } }
  eth:     { interface: { name: eth0 } }
  redis:   { address: { cidrs: [10.0.0.7/32], ports: [6379], protocol: tcp } }
  bastion: { address: { cidrs: [10.0.0.1/32] } }
rounds:
  - name: one
    hold: 10s
    gates: [ { oom: { target: shop } } ]
    faults:
"
    .to_owned();
    for fault in faults {
        let named = fault.starts_with("on: ") || fault.contains(", on: ");
        let on = if named { "" } else { "on: shop, " };
        let _ = writeln!(text, "      - network: {{ {on}{fault} }}");
    }
    text
}

/// A fault as an agent is told, and its summary.
fn fault(text: &str) -> (v1::NetworkFault, String) {
    let plan = read(&plan_with(&[text])).unwrap_or_else(|e| panic!("{e}"));
    let fault = &plan.rounds[0].faults[0];
    let Some(v1::fault::Kind::Network(network)) = fault.proto.kind.clone() else {
        panic!("no network fault")
    };
    (network, fault.summary.clone())
}

/// A fault that does nothing, as an agent is told of all that is not asked for.
fn nothing() -> v1::NetworkFault {
    v1::NetworkFault {
        direction: v1::Direction::Both.into(),
        share: 1.0,
        flow_share: 1.0,
        ..Default::default()
    }
}

fn delay(latency_ms: u64, jitter_ms: u64) -> v1::Delay {
    v1::Delay { latency_ns: latency_ms * 1_000_000, jitter_ns: jitter_ms * 1_000_000, ..Default::default() }
}

fn delayed(delay: v1::Delay) -> v1::NetworkFault {
    v1::NetworkFault { delay: Some(delay), ..nothing() }
}

fn lost(loss: v1::Loss) -> v1::NetworkFault {
    v1::NetworkFault { loss: Some(loss), ..nothing() }
}

fn chance(ratio: f64, correlation: f64) -> v1::Chance {
    v1::Chance { ratio, correlation }
}

fn partition(refusal: v1::Refusal) -> v1::NetworkFault {
    v1::NetworkFault { partition: true, refusal: refusal.into(), ..nothing() }
}

fn loss_1() -> v1::NetworkFault {
    lost(v1::Loss { ratio: 0.01, ..Default::default() })
}

fn dns(answer: v1::DnsAnswer) -> v1::Dns {
    v1::Dns { answer: answer.into(), ..Default::default() }
}

fn to(peer: v1::Peer) -> v1::NetworkFault {
    v1::NetworkFault { peers: vec![peer], ..loss_1() }
}

#[rstest::rstest]
#[case::latency("delay: { latency: 2s }", delayed(delay(2000, 0)), "delay 2s")]
#[case::jitter("delay: { latency: 2s, jitter: 300ms }", delayed(delay(2000, 300)), "delay 2s ±300ms")]
#[case::uniform(
    "delay: { latency: 2s, jitter: 300ms, distribution: uniform }",
    delayed(v1::Delay { distribution: v1::Distribution::Uniform.into(), ..delay(2000, 300) }),
    "delay 2s ±300ms"
)]
#[case::normal("delay: { latency: 100ms, jitter: 10ms, distribution: normal, correlation: 25% }",
    delayed(v1::Delay { distribution: v1::Distribution::Normal.into(), correlation: 0.25, ..delay(100, 10) }),
    "delay 100ms ±10ms normal 25% correlated")]
#[case::pareto("delay: { latency: 100ms, jitter: 10ms, distribution: pareto, keepOrder: true }",
    delayed(v1::Delay { distribution: v1::Distribution::Pareto.into(), keep_order: true, ..delay(100, 10) }),
    "delay 100ms ±10ms pareto in order")]
#[case::paretonormal("delay: { latency: 100ms, jitter: 10ms, distribution: paretonormal }",
    delayed(v1::Delay { distribution: v1::Distribution::Paretonormal.into(), ..delay(100, 10) }),
    "delay 100ms ±10ms paretonormal")]
#[case::loss("loss: 5%", lost(v1::Loss { ratio: 0.05, ..Default::default() }), "loss 5%")]
#[case::correlated_loss("loss: { ratio: 5%, correlation: 25% }", lost(v1::Loss { ratio: 0.05, correlation: 0.25, ..Default::default() }),
    "loss 5% 25% correlated")]
#[case::gilbert("loss: { gilbertElliott: { p: 1% } }",
    lost(v1::Loss { gilbert_elliott: Some(v1::GilbertElliott { p: 0.01, r: 0.99, loss_bad: 1.0, loss_good: 0.0 }), ..Default::default() }),
    "loss gilbertElliott p 1% r 99%")]
#[case::gilbert_elliott("loss: { gilbertElliott: { p: 1%, r: 10%, lossBad: 90%, lossGood: 0.1% } }",
    lost(v1::Loss { gilbert_elliott: Some(v1::GilbertElliott { p: 0.01, r: 0.1, loss_bad: 0.9, loss_good: 0.001 }), ..Default::default() }),
    "loss gilbertElliott p 1% r 10% bad 90% good 0.1%")]
#[case::state("loss: { state: { p13: 1% } }",
    lost(v1::Loss { four_state: Some(v1::FourState { p13: 0.01, p31: 0.99, p32: 0.0, p23: 1.0, p14: 0.0 }), ..Default::default() }),
    "loss state p13 1% p31 99% p32 0% p23 100% p14 0%")]
#[case::all_states("loss: { state: { p13: 1%, p31: 10%, p32: 30%, p23: 50%, p14: 0.5% } }",
    lost(v1::Loss { four_state: Some(v1::FourState { p13: 0.01, p31: 0.1, p32: 0.3, p23: 0.5, p14: 0.005 }), ..Default::default() }),
    "loss state p13 1% p31 10% p32 30% p23 50% p14 0.5%")]
#[case::every("loss: { every: 10 }", lost(v1::Loss { every: 10, ..Default::default() }), "loss of 1 in every 10")]
#[case::duplicate("duplicate: 1%", v1::NetworkFault { duplicate: Some(chance(0.01, 0.0)), ..nothing() }, "duplicate 1%")]
#[case::correlated_duplicate("duplicate: { ratio: 1%, correlation: 50% }", v1::NetworkFault { duplicate: Some(chance(0.01, 0.5)), ..nothing() },
    "duplicate 1% 50% correlated")]
#[case::corrupt("corrupt: 0.1%", v1::NetworkFault { corrupt: Some(v1::Corrupt { chance: Some(chance(0.001, 0.0)), silent: false }), ..nothing() },
    "corrupt 0.1%")]
#[case::silent("corrupt: { ratio: 0.1%, correlation: 5%, silent: true }",
    v1::NetworkFault { corrupt: Some(v1::Corrupt { chance: Some(chance(0.001, 0.05)), silent: true }), ..nothing() },
    "corrupt 0.1% 5% correlated silently")]
#[case::reorder("delay: { latency: 10ms }, reorder: 25%",
    v1::NetworkFault { reorder: Some(v1::Reorder { chance: Some(chance(0.25, 0.0)), gap: 0 }), ..delayed(delay(10, 0)) },
    "delay 10ms, reorder 25%")]
#[case::gap("delay: { latency: 10ms }, reorder: { ratio: 25%, correlation: 50%, gap: 5 }",
    v1::NetworkFault { reorder: Some(v1::Reorder { chance: Some(chance(0.25, 0.5)), gap: 5 }), ..delayed(delay(10, 0)) },
    "delay 10ms, reorder 25% 50% correlated gap 5")]
#[case::marks("loss: { ratio: 5%, ecn: true }", lost(v1::Loss { ratio: 0.05, ecn: true, ..Default::default() }), "loss 5% ecn")]
#[case::slots("slots: { min: 10ms, max: 20ms, packets: 32, bytes: 64KiB }",
    v1::NetworkFault {
        slots: Some(v1::Slots { min_ns: 10_000_000, max_ns: 20_000_000, packets: 32, bytes: 65_536 }),
        ..nothing()
    },
    "slots every 10ms to 20ms packets 32 bytes 64KiB")]
#[case::rate("rate: 1mbit", v1::NetworkFault { rate: Some(v1::Rate { bits_per_second: 1_000_000, ..Default::default() }), ..nothing() }, "rate 1mbit")]
#[case::whole_rate("rate: { rate: 1500kbps, burst: 32KiB, limit: 1MiB, overhead: -14 }",
    v1::NetworkFault {
        rate: Some(v1::Rate { bits_per_second: 12_000_000, burst_bytes: 32 << 10, limit_bytes: 1 << 20, overhead_bytes: -14 }),
        ..nothing()
    },
    "rate 12mbit burst 32KiB limit 1MiB overhead -14B")]
#[case::partition("partition: true", partition(v1::Refusal::Silent), "partition")]
#[case::refuse("partition: refuse", partition(v1::Refusal::Answer), "refuse")]
#[case::reset("reset: true", v1::NetworkFault { reset: true, ..nothing() }, "reset")]
#[case::cut("cut: 64KiB", v1::NetworkFault { cut: Some(v1::Cut { after_bytes: 65536 }), ..nothing() }, "cut after 64KiB")]
#[case::cut_after("cut: { after: 1MB }", v1::NetworkFault { cut: Some(v1::Cut { after_bytes: 1_000_000 }), ..nothing() }, "cut after 1000000B")]
#[case::nxdomain(r#"dns: { names: ["*.example.com", redis.internal], answer: nxdomain }"#,
    v1::NetworkFault {
        dns: Some(v1::Dns { names: vec!["*.example.com".into(), "redis.internal".into()], ..dns(v1::DnsAnswer::Nxdomain) }),
        ..nothing()
    },
    "dns *.example.com redis.internal: nxdomain")]
#[case::servfail("dns: { answer: servfail, delay: 2s }",
    v1::NetworkFault { dns: Some(v1::Dns { delay_ns: 2_000_000_000, ..dns(v1::DnsAnswer::Servfail) }), ..nothing() },
    "dns every name: servfail after 2s")]
#[case::no_answer("dns: { answer: drop }", v1::NetworkFault { dns: Some(dns(v1::DnsAnswer::Drop)), ..nothing() }, "dns every name: drop")]
#[case::late_answer("dns: { answer: forward, delay: 300ms }",
    v1::NetworkFault { dns: Some(v1::Dns { delay_ns: 300_000_000, ..dns(v1::DnsAnswer::Forward) }), ..nothing() },
    "dns every name: forward after 300ms")]
#[case::wrong_answer("dns: { addresses: [10.0.0.9, \"fd00::9\"] }",
    v1::NetworkFault { dns: Some(v1::Dns { addresses: vec!["10.0.0.9".into(), "fd00::9".into()], ..dns(v1::DnsAnswer::Addresses) }), ..nothing() },
    "dns every name: 10.0.0.9 fd00::9")]
#[case::flows("loss: 1%, flows: 30%", v1::NetworkFault { flow_share: 0.3, ..loss_1() }, "loss 1%, on 30% of flows")]
#[case::share("loss: 1%, share: 50%, seed: 7", v1::NetworkFault { share: 0.5, seed: 7, ..loss_1() }, "loss 1%, on 50% of packets")]
#[case::per_segment("loss: 1%, perSegment: true", v1::NetworkFault { per_segment: true, ..loss_1() }, "loss 1%, per segment")]
#[case::unprotected("loss: 1%, unprotected: true", v1::NetworkFault { unprotected: true, ..loss_1() }, "loss 1%, unprotected")]
#[case::all_sockets("loss: 1%, sockets: all", v1::NetworkFault { sockets: v1::Sockets::All.into(), ..loss_1() }, "loss 1%, all sockets")]
#[case::own_sockets("loss: 1%, sockets: target", v1::NetworkFault { sockets: v1::Sockets::Target.into(), ..loss_1() },
    "loss 1%, the target's sockets")]
#[case::inner("loss: 1%, side: inner", v1::NetworkFault { side: v1::Side::Inner.into(), ..loss_1() }, "loss 1%, inner side")]
#[case::host_side("loss: 1%, side: host, interface: eth0",
    v1::NetworkFault { side: v1::Side::Host.into(), interface: "eth0".into(), ..loss_1() }, "loss 1%, host side at eth0")]
fn what_a_packet_suffers(#[case] text: &str, #[case] told: v1::NetworkFault, #[case] words: &str) {
    let (network, summary) = fault(text);
    assert_eq!(network, told);
    assert_eq!(summary, format!("network shop ↔ everyone: {words}"));
}

#[rstest::rstest]
#[case("{ hosts: [redis.internal, cache], ports: [6379] }",
    v1::Peer { hosts: vec!["redis.internal".into(), "cache".into()], ports: vec![v1::PortRange { first: 6379, last: 6379 }], ..Default::default() },
    "redis.internal cache :6379")]
#[case("{ dscp: [46, ef, af11, CS1] }", v1::Peer { dscp: vec![46, 46, 10, 8], ..Default::default() }, "dscp 46 dscp 46 dscp 10 dscp 8")]
#[case("{ vlans: [100, untagged] }", v1::Peer { vlans: vec![100, 0], ..Default::default() }, "vlan 100 untagged")]
#[case("{ icmp: [echo-request, 3] }", v1::Peer { icmp_types: vec![8, 128, 3], ..Default::default() },
    "icmp type 8 icmp type 128 icmp type 3")]
#[case(r#"{ tcpFlags: "syn,!ack", cidrs: [10.0.0.0/8] }"#,
    v1::Peer { cidrs: vec!["10.0.0.0/8".into()], tcp_flags: Some(v1::TcpFlags { set: 2, clear: 16 }), ..Default::default() },
    "10.0.0.0/8 syn,!ack")]
#[case("{ fragments: only, protocol: udp }",
    v1::Peer { fragments: v1::Fragments::Only.into(), protocol: v1::Protocol::Udp.into(), ..Default::default() }, "udp fragments")]
#[case("{ fragments: never }", v1::Peer { fragments: v1::Fragments::Never.into(), ..Default::default() }, "no fragments")]
#[case("{ localPorts: [8080, 9000-9010] }",
    v1::Peer {
        local_ports: vec![v1::PortRange { first: 8080, last: 8080 }, v1::PortRange { first: 9000, last: 9010 }],
        ..Default::default()
    },
    "local :8080 local :9000-9010")]
fn whom_it_concerns(#[case] text: &str, #[case] peer: v1::Peer, #[case] words: &str) {
    let (network, summary) = fault(&format!("loss: 1%, to: {text}"));
    assert_eq!(network, to(peer));
    assert_eq!(summary, format!("network shop ↔ {words}: loss 1%"));
}

#[test]
fn some_are_left_alone() {
    let (network, summary) =
        fault("partition: true, direction: egress, except: [bastion, { ports: [22], protocol: tcp }]");
    assert_eq!(summary, "network shop → everyone except bastion, :22 tcp: partition");
    assert_eq!(network.except.len(), 2);
    assert_eq!(network.except[0].cidrs, ["10.0.0.1/32"]);
    assert_eq!(network.except[1].ports, [v1::PortRange { first: 22, last: 22 }]);
    assert_eq!(network.peers, []);
}

#[test]
fn false_is_as_if_it_were_not_there() {
    let text = "loss: 1%, partition: false, reset: false, perSegment: false, unprotected: false";
    assert_eq!(fault(text).0, loss_1());
}

const REFUSED: [&str; 104] = [
    "direction: both",
    "partition: true, loss: 5%, delay: { latency: 2s }",
    "partition: refuse, rate: 1mbit",
    "partition: refused",
    "partition: 1",
    "reset: true, loss: 5%",
    "cut: 64KiB, partition: true",
    "cut: 64",
    "cut: { before: 64KiB }",
    "cut: 0B",
    "dns: { answer: nxdomain }, duplicate: 1%",
    "dns: { answer: nxdomian }",
    "dns: { names: [api.example.com] }",
    "dns: { answer: drop, delay: 2s }",
    "dns: { answer: forward }",
    "dns: { answer: servfail, addresses: [10.0.0.9] }",
    "dns: { addresses: [10.0.0.9/32] }",
    "dns: { names: [\"api.*.com\"], answer: drop }",
    "dns: { names: [], answer: drop }",
    "dns: { answer: drop }, direction: ingress",
    "dns: { answer: drop }, to: redis",
    "reset: true, to: { cidrs: [10.0.0.7/32], protocol: udp }",
    "reorder: 25%",
    "reorder: { ratio: 25%, gap: 0 }, delay: { latency: 1s }",
    "reorder: 25%, delay: { latency: 1s, jitter: 1s, keepOrder: true }",
    "delay: 2s",
    "delay: { latency: 61s }",
    "delay: { latency: 0s }",
    "delay: { jitter: 2s }",
    "delay: { latency: 2s, jitter: 2m }",
    "delay: { latency: 1s, jitter: 2s }",
    "delay: { latency: 0s, jitter: 2s }",
    "delay: { latency: 1s, keepOrder: true }",
    "delay: { latency: 2s, correlation: 25% }",
    "delay: { latency: 2s, distribution: normal }",
    "delay: { latency: 2s, jitter: 1s, distribution: norml }",
    "delay: { latency: 2s, jitter: 1s, distribution: gamma }",
    "delay: { latency: 2s, jitter: 1s, distribution: { file: my.dist } }",
    "delay: { latency: 2s, jitter: 1s, correlation: 25%, keepOrder: true }",
    "delay: { latency: 2s, jitter: 1s, correlation: 0.25 }",
    "loss: 0%",
    "loss: 130%",
    "loss: [5%]",
    "loss: {}",
    "loss: { correlation: 25% }",
    "loss: { every: 10, ratio: 5% }",
    "loss: { every: 10, correlation: 5% }",
    "loss: { every: 0 }",
    "loss: { every: 2.5 }",
    "loss: { gilbertElliott: { r: 10% } }",
    "loss: { gilbertElliott: { p: 0%, r: 10% } }",
    "loss: { gilbertElliott: { p: 1%, lossBad: 0% } }",
    "loss: { gilbertElliott: { p: 1%, h: 10% } }",
    "loss: { state: { p13: 60%, p14: 50% } }",
    "loss: { state: { p13: 1%, p32: 5% } }",
    "loss: { state: { p13: 0% } }",
    "duplicate: 1",
    "duplicate: { correlation: 25% }",
    "duplicate: { ratio: 1%, correlation: 100% }",
    "loss: { ratio: 1%, correlation: 100% }",
    "corrupt: { ratio: 1%, silent: yes please }",
    "corrupt: { ratio: 1%, quiet: true }",
    "rate: 10",
    "rate: 10MB",
    "rate: 0mbit",
    "rate: { rate: 10mbit, burst: 32 }",
    "rate: { burst: 32KiB }",
    "rate: 999bit",
    "rate: { rate: 101gbit }",
    "rate: { rate: 10mbit, burst: 76MB }",
    "rate: { rate: 10mbit, limit: 76MB }",
    "rate: { rate: 10mbit, overhead: -1501 }",
    "rate: { rate: 10mbit, overhead: 14B }",
    "slots: 20ms",
    "slots: { min: 0s }",
    "slots: { min: 20ms, max: 10ms }",
    "slots: { min: 20ms, max: 61s }",
    "slots: { max: 20ms }",
    "slots: { min: 20ms, packets: 0 }",
    "loss: { ecn: true }",
    "loss: 1%, flows: 0%",
    "loss: 1%, perSegment: 1",
    "loss: 1%, persegment: true",
    "loss: 1%, sockets: mine",
    "loss: 1%, sockets: target, on: eth",
    "loss: 1%, side: outer",
    "loss: 1%, except: []",
    "loss: 1%, except: bastoin",
    "loss: 1%, except: shop",
    "loss: 1%, to: redis, except: { cidrs: [10.0.0.0/8] }",
    "loss: 1%, to: { cidrs: [] }",
    "loss: 1%, to: { hosts: [10.0.0.7] }",
    "loss: 1%, to: { hosts: [redis internal, 10.7, -a.b] }",
    "loss: 1%, to: { dscp: [64, af44] }",
    "loss: 1%, to: { vlans: [0, 4095] }",
    "loss: 1%, to: { icmp: [256, time-exceeded] }",
    "loss: 1%, to: { icmp: [3], protocol: tcp }",
    "loss: 1%, to: { icmp: [3], ports: [80] }",
    "loss: 1%, to: { tcpFlags: \"syn,!syn\" }",
    "loss: 1%, to: { tcpFlags: \"sin\" }",
    "loss: 1%, to: { tcpFlags: syn, protocol: udp }",
    "loss: 1%, to: { tcpFlags: syn, icmp: [8] }",
    "loss: 1%, to: { fragments: first }",
    "loss: 1%, to: 10.0.0.7:80/icmp",
];

/// Everything that is refused, each with its message. Read it as a user would.
#[test]
fn refusals() {
    let mut all = String::new();
    for case in REFUSED {
        let invalid = read(&plan_with(&[case])).map(|_| ()).expect_err(case);
        let _ = writeln!(all, "{case}");
        let mut lines = invalid.text.lines();
        while let Some(line) = lines.next() {
            let Some(place) = line.strip_prefix("plan.yaml:15:") else { continue };
            let (_, what) = place.split_once("rounds[0].faults[0].network").expect("a field of the fault");
            let fix = lines.nth(2).and_then(|caret| caret.split_once('^')).expect("a caret").1;
            let _ = writeln!(
                all,
                "    {}\n        {}",
                what.trim_start_matches('.'),
                fix.trim_start_matches('^').trim()
            );
        }
        all.push('\n');
    }
    insta::assert_snapshot!(all);
}

#[test]
fn a_clash_is_shown_at_the_field_to_blame() {
    let text = plan_with(&["delay: { latency: 2s, jitter: 1s, correlation: 25%, keepOrder: true }"]);
    insta::assert_snapshot!(read(&text).expect_err("a clash").text, @r"
    plan.yaml:15:64: rounds[0].faults[0].network.delay.correlation: correlation does not go with keeping the order
        |
     15 |       - network: { on: shop, delay: { latency: 2s, jitter: 1s, correlation: 25%, keepOrder: true } }
        |                                                                ^^^^^^^^^^^ remove one of them

    1 error in plan.yaml
    ");
}

#[test]
fn everything_wrong_with_a_fault_is_said_at_once() {
    let text =
        "on: eth, reset: true, loss: { every: 10 }, reorder: 5%, sockets: target, except: redis, to: redis";
    let invalid = read(&plan_with(&[text])).expect_err("four clashes");
    let places: Vec<&str> = invalid.text.lines().filter(|l| l.starts_with("plan.yaml:")).collect();
    assert_eq!(invalid.count, 4, "{places:#?}");
    let text = "to: { dscp: [64, 65], vlans: [9999] }, loss: 0, rate: 5, dns: { answer: no }, side: top";
    assert_eq!(read(&plan_with(&[text])).expect_err("seven mistakes").count, 7);
}

// ---- tables --------------------------------------------------------------------------------------------------------

/// A plan in a directory of its own, with a table beside it.
fn with_table(table: &str) -> Result<Plan, String> {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(dir.path().join("tables")).expect("a directory");
    std::fs::write(dir.path().join("tables/my.dist"), table).expect("a file");
    let fault = "delay: { latency: 2s, jitter: 1s, distribution: { table: tables/my.dist } }";
    let read = parse(&dir.path().join("plan.yaml"), &plan_with(&[fault]));
    read.map_err(|e| e.text.replace(&*dir.path().to_string_lossy(), "DIR"))
}

#[test]
fn a_table_is_read_beside_the_plan() {
    let plan = with_table("# a comment\n -32768 -8192\n\t0 8192 # another\n\n32767\n").expect("valid");
    let fault = &plan.rounds[0].faults[0];
    let Some(v1::fault::Kind::Network(network)) = &fault.proto.kind else { panic!("no network fault") };
    let delay = network.delay.as_ref().expect("a delay");
    assert_eq!(delay.distribution(), v1::Distribution::Table);
    assert_eq!(delay.table, [-32768, -8192, 0, 8192, 32767]);
    assert_eq!(fault.summary, "network shop ↔ everyone: delay 2s ±1s by table");
    assert_eq!(plan.files.keys().collect::<Vec<_>>(), [Path::new("tables/my.dist")]);
    assert_eq!(with_table(&"1 ".repeat(16384)).map(|_| ()), Ok(()));
}

#[rstest::rstest]
#[case("# nothing\n\n", "DIR/tables/my.dist:2: the table is empty")]
#[case("0 1\n2 x3\n", "DIR/tables/my.dist:2: `x3` is no entry of a table")]
#[case("0\n# 1\n40000", "DIR/tables/my.dist:3: `40000` is no entry of a table")]
#[case(&format!("{}\n1", "1 ".repeat(16384)), "DIR/tables/my.dist:2: the table is too long")]
fn a_wrong_table_names_its_file_and_line(#[case] table: &str, #[case] message: &str) {
    let text = with_table(table).expect_err("wrong");
    assert!(text.starts_with("DIR/plan.yaml:15:"), "{text}");
    assert!(text.contains(&format!("network.delay.distribution.table: {message}")), "{text}");
}

#[test]
fn a_table_that_is_not_there() {
    let fault = "delay: { latency: 2s, jitter: 1s, distribution: { table: nowhere.dist } }";
    let text = parse(Path::new("/no/plan.yaml"), &plan_with(&[fault])).expect_err("no file").text;
    assert!(text.contains("distribution.table: cannot read /no/nowhere.dist: No such file"), "{text}");
}

// ---- warnings ------------------------------------------------------------------------------------------------------

/// Whether the second fault is warned of as one that no packet reaches.
fn shadowed(first: &str, second: &str) -> bool {
    let plan = read(&plan_with(&[first, second])).unwrap_or_else(|e| panic!("{e}"));
    let warnings = warnings(&plan, 0);
    assert_eq!(warnings.len(), 2);
    assert!(warnings[0].is_empty(), "{warnings:?}");
    warnings[1].iter().any(|w| w.starts_with("no packet reaches this"))
}

#[rstest::rstest]
#[case("loss: 1%", "loss: 2%, to: redis", true)]
#[case("loss: 1%, share: 5%", "loss: 2%, to: redis", true)]
#[case("loss: 1%", "on: same, loss: 2%", true)]
#[case("loss: 1%", "on: eth, loss: 2%", false)]
#[case("loss: 1%, to: redis", "loss: 2%", false)]
#[case("loss: 1%, to: redis", "loss: 2%, to: redis", true)]
#[case("loss: 1%, to: redis", "loss: 2%, to: bastion", false)]
#[case("loss: 1%, to: [bastion, redis]", "loss: 2%, to: redis", true)]
#[case("loss: 1%, to: redis", "loss: 2%, to: [redis, bastion]", false)]
#[case("loss: 1%, to: 10.0.0.0/8", "loss: 2%, to: redis", true)]
#[case("loss: 1%, to: 10.0.0.7/32:6379/udp", "loss: 2%, to: redis", false)]
#[case("loss: 1%, to: { ports: [6000-7000] }", "loss: 2%, to: redis", true)]
#[case("loss: 1%, to: { ports: [6000-6100] }", "loss: 2%, to: redis", false)]
#[case("loss: 1%, direction: egress", "loss: 2%, direction: egress", true)]
#[case("loss: 1%, direction: egress", "loss: 2%, direction: ingress", false)]
#[case("loss: 1%, direction: egress", "loss: 2%", false)]
#[case("loss: 1%", "loss: 2%, direction: ingress", true)]
#[case("loss: 1%, interface: eth0", "loss: 2%, interface: eth1", false)]
#[case("loss: 1%", "loss: 2%, interface: eth1", true)]
#[case("loss: 1%, except: redis", "loss: 2%, to: redis", false)]
#[case("loss: 1%, except: redis", "loss: 2%, except: { cidrs: [10.0.0.0/8] }", true)]
#[case("loss: 1%, sockets: target", "loss: 2%", false)]
#[case("loss: 1%", "loss: 2%, sockets: target", true)]
#[case("loss: 1%", "loss: 2%, unprotected: true", false)]
#[case("loss: 1%, side: inner", "loss: 2%", true)]
#[case("loss: 1%, side: host", "loss: 2%", false)]
#[case("loss: 1%", "dns: { answer: drop }", true)]
#[case("dns: { answer: drop }", "loss: 1%", false)]
#[case("dns: { answer: drop }", "dns: { answer: nxdomain, names: [a.b] }", true)]
#[case("dns: { answer: drop, names: [a.b] }", "dns: { answer: nxdomain, names: [a.c] }", false)]
#[case("reset: true", "loss: 1%", false)]
#[case("loss: 1%, to: { hosts: [a.b] }", "loss: 2%, to: { hosts: [a.b], ports: [80] }", true)]
#[case("loss: 1%, to: { hosts: [a.b] }", "loss: 2%, to: redis", false)]
#[case("loss: 1%, to: { tcpFlags: syn }", "loss: 2%, to: { tcpFlags: 'syn,!ack' }", true)]
#[case("loss: 1%, to: { tcpFlags: syn }", "loss: 2%, to: { tcpFlags: rst }", false)]
#[case("loss: 1%, to: { protocol: icmp }", "loss: 2%, to: { icmp: [8] }", true)]
#[case("loss: 1%, to: { dscp: [ef] }", "loss: 2%, to: redis", false)]
#[case("loss: 1%, to: { vlans: [1, 2] }", "loss: 2%, to: { vlans: [2] }", true)]
#[case("loss: 1%, to: { fragments: only }", "loss: 2%, to: { fragments: never }", false)]
fn a_fault_that_no_packet_reaches(#[case] first: &str, #[case] second: &str, #[case] warned: bool) {
    assert_eq!(shadowed(first, second), warned);
}

#[test]
fn warnings_say_what_a_delay_is() {
    let of = |text: &str| warnings(&read(&plan_with(&[text])).expect("valid"), 0).remove(0).join("\n");
    insta::assert_snapshot!(of("delay: { latency: 2s, jitter: 300ms }"), @r"
    the delay is of each packet, not of each request: a round trip takes 4s longer, and a request may need several
    jitter lets packets overtake each other, which TCP may take for loss; keepOrder keeps their order
    ");
    let one_way = of("delay: { latency: 2s, jitter: 300ms, keepOrder: true }, direction: egress");
    insta::assert_snapshot!(one_way, @"the delay is of each packet, not of each request: a round trip takes 2s longer, and a request may need several");
    assert_eq!(of("loss: 1%"), "");
}

/// What docs/from-netem.md tells people to write is a plan.
#[test]
fn what_the_docs_say_can_be_written() {
    let page = include_str!("../../../../docs/from-netem.md");
    let told = page.lines().filter_map(|line| line.strip_prefix('|')?.split(" | ").nth(1));
    let told: Vec<&str> = told.filter_map(|cell| cell.trim().strip_prefix('`')?.strip_suffix('`')).collect();
    assert_eq!(told.len(), 22, "{told:?}");
    for written in told {
        let _ = fault(written);
    }
}
