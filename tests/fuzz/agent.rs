//! What libFuzzer runs in place of `main` in a build with `--cfg fuzzing`: the agent's parsers, the one that
//! `SQUALL_FUZZ` names. Each takes any bytes without a panic, and keeps what is asserted.

mod targets;

use std::{path::Path, time::Duration};

use etherparse::SlicedPacket;
use procfs::{FromBufRead, ProcessCGroups};
use prost::Message;
use squall_common::{packet, quantiles::Quantiles, table::Direction};
use squall_proto::v1;

use self::targets::Parser;
use crate::{
    fault::AnyFault,
    frame::{self, Dns, DnsAnswer, Verdict},
    host::{
        cgroup::{self, Hierarchies},
        proc, resolve, sockets,
    },
    journal,
    limits::Limits,
    target::Selector,
};

const TARGETS: [(&str, Parser); 9] = [
    ("arm", arm),
    ("cgroup", cgroup),
    ("frame", frame),
    ("journal", journal),
    ("packet", packet),
    ("proc", proc),
    ("resolve", resolve),
    ("sockets", sockets),
    ("table", table),
];

#[cfg(feature = "fuzz")]
static TARGET: std::sync::LazyLock<Parser> = std::sync::LazyLock::new(|| targets::chosen(&TARGETS));

#[cfg(feature = "fuzz")]
libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));

#[test]
fn targets_take_their_corpora() {
    targets::take_corpora("squall-agent", &TARGETS);
}

/// An order as it comes from a client.
fn arm(data: &[u8]) {
    let Ok(request) = v1::ArmRequest::decode(data) else { return };
    let _ = journal::is_id(&request.id);
    let times = (Duration::from_nanos(request.duration_ns), Duration::from_nanos(request.lease_ns));
    let _ = Limits::default().check_times(times.0, times.1);
    if let Some(target) = request.target
        && let Ok(selector) = Selector::parse(target)
    {
        assert!(!selector.to_string().is_empty());
    }
    if let Some(fault) = request.fault
        && let Ok(fault) = AnyFault::parse(fault)
    {
        assert!(!fault.summary().is_empty());
        let _ = fault.scope();
    }
}

fn cgroup(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (mounts, rest) = text.split_once("\n\n").unwrap_or((&text, ""));
    let hierarchies = Hierarchies::parse(mounts);
    assert!(["v1", "v2", "hybrid", "none"].contains(&hierarchies.kind()));
    if let Ok(cgroups) = ProcessCGroups::from_buf_read(rest.as_bytes()) {
        let _ = hierarchies.of_process(&cgroups);
    }
    let _ = hierarchies.by_path(Path::new(rest));
    if let Some(cpus) = cgroup::parse_cpus(&text) {
        assert!((1..=cgroup::MOST_CPUS).contains(&cpus.len()));
    }
    assert!(cgroup::parse_cpu_max(&text).is_none_or(|cpus| cpus > 0.0));
    let _ = cgroup::flat_key(&text, "oom_kill");
}

fn frame(data: &[u8]) {
    let Some((draw, bytes)) = data.split_first_chunk() else { return };
    let draw = u64::from_le_bytes(*draw);
    let mut changed = bytes.to_vec();
    let flipped = frame::corrupt(&mut changed, draw);
    let bits: u32 = bytes.iter().zip(&changed).map(|(a, b)| (a ^ b).count_ones()).sum();
    assert_eq!(bits, u32::from(flipped));
    frame::corrupt_silently(&mut bytes.to_vec(), draw);
    if let Some(answer) = frame::refusal(bytes) {
        SlicedPacket::from_ethernet(&answer).expect("a refusal is a packet");
        assert_eq!(frame::refusal(&answer), None, "an answer that is answered never ends");
    }
    for reset in frame::resets(bytes).into_iter().flatten() {
        SlicedPacket::from_ethernet(&reset).expect("a reset is a packet");
        assert_eq!(frame::resets(&reset), None, "a reset that is reset never ends");
    }
    let addresses = DnsAnswer::Addresses(vec![[192, 0, 2, 1].into(), [0; 16].into()]);
    for answer in [DnsAnswer::NxDomain, DnsAnswer::ServFail, addresses] {
        let names = if draw & 1 == 0 { Vec::new() } else { vec!["*.example.com".to_owned()] };
        let dns = Dns { names, answer, delay: Duration::ZERO };
        if let Verdict::Answer(answer) = dns.judge(bytes) {
            assert_eq!(dns.judge(&answer), Verdict::Pass, "an answer is no query");
        }
    }
}

fn journal(data: &[u8]) {
    filed::<journal::Record>(data);
    filed::<journal::Left>(data);
}

fn filed<R: journal::Filed + PartialEq + std::fmt::Debug>(data: &[u8]) {
    let _ = journal::parse::<R>(data);
    // With a checksum that no mutation would find.
    let Ok(inner) = str::from_utf8(data) else { return };
    let envelope = journal::envelope(inner.to_owned()).expect("text is JSON");
    if let Ok(record) = journal::parse::<R>(&envelope) {
        let again = serde_json::to_string(&record).expect("a record is JSON");
        let envelope = journal::envelope(again).expect("text is JSON");
        assert_eq!(journal::parse::<R>(&envelope).expect("what is written can be read"), record);
    }
}

fn packet(data: &[u8]) {
    let Some(([high, low, vlan, offset], bytes)) = data.split_first_chunk() else { return };
    let (ethertype, vlan) = (u16::from_be_bytes([*high, *low]), (*vlan).into());
    let parse = |way| packet::parse(bytes, ethertype, vlan, (*offset).into(), way);
    let (Some(out), Some(back)) = (parse(Direction::Egress), parse(Direction::Ingress)) else { return };
    assert!(out.dscp < 64 && out.kind < 4 && out.peer.v6 < 2);
    assert!(out.vlan <= packet::VLAN_ID.into());
    assert!(
        out.peer.v6 == 1 || out.peer.high == 0 && out.peer.low <= u32::MAX.into(),
        "an IPv4 address is 32 bits"
    );
    assert!(out.icmp_type.get().is_none_or(|kind| kind < 256));
    assert_eq!(out.ports(), back.ports().map(|(peer, own)| (own, peer)));
}

fn proc(data: &[u8]) {
    let _ = proc::parse_stat(data);
    assert!(proc::split_arguments(data).len() <= data.len());
    let text = String::from_utf8_lossy(data);
    proc::undelete(Path::new(&*text));
    let _ = proc::injection_of(&proc::split_arguments(data));
}

/// What a pod put into its /etc.
fn resolve(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    resolve::parse_conf(&text);
    let name = text.lines().next().unwrap_or_default();
    if resolve::is_name(name) {
        hickory_resolver::proto::rr::Name::from_ascii(name).expect("a host name is a name");
    }
    let found = resolve::in_hosts(&text, name);
    assert!(found.is_sorted(), "{found:?}");
}

fn sockets(data: &[u8]) {
    let mut found = Vec::new();
    let _ = sockets::take(data, &mut found, sockets::parse);
    let _ = sockets::parse(data);
}

fn table(data: &[u8]) {
    let entries: Vec<i32> =
        data.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    if let Ok(table) = Quantiles::from_entries(&entries) {
        assert!(table.entries().is_sorted());
    }
}
