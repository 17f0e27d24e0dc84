//! Thin, safe faces over the kernel. The only unsafe code of the agent.

pub mod cgroup;
pub mod proc;
