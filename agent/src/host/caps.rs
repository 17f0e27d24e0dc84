//! The capabilities of this process. Root without them may do little, which is how an agent should run.

use std::fs;

/// A capability, by its number [include/uapi/linux/capability.h, 6.1].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Capability {
    /// Devices, qdiscs and filters.
    NetAdmin = 12,
    /// Memory that stays resident beyond `RLIMIT_MEMLOCK`.
    IpcLock = 14,
    /// To see the executable, the cgroup and the namespaces of everybody's processes.
    SysPtrace = 19,
    /// To enter and make network namespaces; it stands for `CAP_BPF` and `CAP_PERFMON` too [kernel/bpf/syscall.c, 6.1].
    SysAdmin = 21,
}

impl Capability {
    /// Its name: `CAP_NET_ADMIN`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::IpcLock => "CAP_IPC_LOCK",
            Self::SysPtrace => "CAP_SYS_PTRACE",
            Self::SysAdmin => "CAP_SYS_ADMIN",
        }
    }
}

/// What is missing of these, and how it is given; none where nothing is.
#[must_use]
pub fn missing(needed: &[Capability]) -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    missing_of(needed, effective(&status))
}

fn missing_of(needed: &[Capability], effective: u64) -> Option<String> {
    let missing = needed.iter().filter(|needed| effective & 1 << **needed as u8 == 0);
    let names: Vec<_> = missing.map(|capability| capability.name()).collect();
    (!names.is_empty()).then(|| {
        format!(
            "the agent has no {names}; give it to it, as deploy/squall-agent.service does with CapabilityBoundingSet= \
             and deploy/daemonset.yaml with securityContext.capabilities",
            names = names.join(", ")
        )
    })
}

fn effective(status: &str) -> u64 {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    hex.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let has = effective("Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t0000000000081000\n");
        assert_eq!(missing_of(&[Capability::NetAdmin, Capability::SysPtrace], has), None);
        let said = missing_of(&[Capability::NetAdmin, Capability::SysAdmin, Capability::IpcLock], has);
        assert!(said.unwrap().starts_with("the agent has no CAP_SYS_ADMIN, CAP_IPC_LOCK; "));
        assert_eq!(effective("nothing"), 0);
    }
}
