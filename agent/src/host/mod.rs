//! Thin, safe faces over the kernel. The only unsafe code of the agent.

pub mod bpf;
pub mod cgroup;
#[expect(unsafe_code, reason = "maps and locks memory")]
pub mod memory;
pub mod netns;
pub mod port;
#[expect(unsafe_code, reason = "calls that nix has not: pidfd, close_range")]
pub mod proc;
#[cfg_attr(not(test), expect(dead_code, reason = "for the network fault"))]
pub mod resolve;
#[cfg_attr(not(test), expect(dead_code, reason = "for the network fault"))]
pub mod sockets;
pub mod tap;
pub mod tc;
