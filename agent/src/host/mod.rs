//! Thin, safe faces over the kernel. The only unsafe code of the agent.

pub mod bpf;
pub mod caps;
pub mod cgroup;
pub mod line;
pub mod localnet;
#[expect(unsafe_code, reason = "maps and locks memory")]
pub mod memory;
pub mod netns;
pub mod port;
#[expect(unsafe_code, reason = "calls that nix has not: pidfd, close_range, setpriority")]
pub mod proc;
pub mod resolve;
pub mod sockets;
#[expect(unsafe_code, reason = "calls that nix has not: fsopen, fsconfig, fsmount")]
pub mod steer;
pub mod tap;
pub mod tc;
