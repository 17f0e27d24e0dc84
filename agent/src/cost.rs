//! `squall-agent cost`: what packets pay on this node that no fault is about, measured with the programs themselves.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::{Result, anyhow};
use etherparse::PacketBuilder;
use serde_json::json;
use squall_common::{
    decide::Action,
    rules::{Cidr, Clause, Ports},
};

use crate::host::port::{Spec, cost};

/// 10.0.0.0.
const NETWORK: u32 = 0x0a00_0000;
/// Runs of a program that are timed together.
const REPEAT: u32 = 10_000;

/// How many rules the packet is held against.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Rules, 1 to 64
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    rules: u32,
    /// CIDRs of the rules, all together; at least one each
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    cidrs: u32,
    /// By what the packet is nobody's
    #[arg(long, value_enum, default_value_t = Miss::Address)]
    miss: Miss,
}

/// By what no rule matches a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Miss {
    /// Its address is in no CIDR.
    Address,
    /// Its address is in a CIDR of a rule that is about another port.
    Port,
}

/// Measures, and prints one line of JSON: nanoseconds a packet above an empty tc program. Nothing of the host is touched.
pub fn main(args: &Args) -> Result<()> {
    let each = (args.cidrs / args.rules).max(1);
    // Every other /24 from 10.0.0.0 on: the packet below goes to one in the middle, or to one between two of them, as deep in the trie as
    // it gets.
    let cidr = |n: u32| Cidr::new(Ipv4Addr::from(NETWORK + (n << 9)).into(), 24);
    let to = Ipv4Addr::from(
        NETWORK + ((each * args.rules / 2) << 9) + if args.miss == Miss::Address { 0x102 } else { 2 },
    );
    let peer_ports = if args.miss == Miss::Port { vec![Ports { first: 1, last: 1 }] } else { Vec::new() };
    let rule = |n: u32| {
        let cidrs: Option<Vec<Cidr>> = (n * each..(n + 1) * each).map(cidr).collect();
        let peer_ports = peer_ports.clone();
        let clause = Clause { egress: true, ingress: true, cidrs: cidrs?, peer_ports, ..Clause::default() };
        Some(Spec {
            clauses: vec![clause],
            action: Action::new(1).with_loss(1.0, 0.0),
            quantiles: None,
            dns: None,
            endpoints: BTreeMap::new(),
        })
    };
    let specs: Option<Vec<Spec>> = (0..args.rules).map(rule).collect();
    let specs = specs.ok_or_else(|| anyhow!("a prefix that is no prefix"))?;
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00];
    PacketBuilder::ipv4([192, 0, 2, 1], to.octets(), 64)
        .tcp(40_000, 6379, 1, 1)
        .write(&mut frame, &[0; 64])?;
    let cost = cost(specs, &frame, REPEAT)?;
    println!(
        "{}",
        json!({ "rules": args.rules, "cidrs": each * args.rules, "nanoseconds": cost.as_nanos() as u64 })
    );
    Ok(())
}
