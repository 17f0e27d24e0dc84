//! Thin, safe faces over the kernel. The only unsafe code of the agent.

pub mod bpf;
pub mod cgroup;
pub mod netns;
pub mod port;
pub mod proc;
pub mod tap;
pub mod tc;
