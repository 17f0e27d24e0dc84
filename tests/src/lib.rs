//! What the privileged tests share: a lab of two namespaces, and a real agent beside it.
//!
//! These tests need root and the release binaries; `cargo xtask test` sees to both. They never skip: where the kernel
//! lacks something a test needs, that test fails, or checks that the agent says so.

mod agent;
mod bench;
mod controller;
mod lab;
mod names;
mod place;
mod remote;
mod shop;
mod talk;
mod unified;
mod victim;

pub use agent::{Agent, AgentOptions};
pub use bench::{Bench, MS, SECOND, cidr, delay, figure, interface, partition, port, ports, process};
pub use controller::Controller;
pub use lab::Lab;
pub use names::{Answer, NameServer, ask};
pub use place::Place;
pub use remote::{Certs, Dial, verify_audit};
pub use shop::in_a_shop;
pub use squall_lab::{
    Cgroup, Dropper, HostState, NetState, Netns, Ping, Probe, Running, Shop, ShopOptions, Stream, Wire,
    bin_dir, need_root, output, run, stdout, sweep, unique, wait_for,
};
pub use talk::{Pair, Sockets, death, drain};
pub use unified::Unified;
pub use victim::Victim;
