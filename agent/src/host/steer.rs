//! Which CPU takes the packets that come out of a device of ours: one CPU for each flow (Receive Packet Steering).
//!
//! A veth end hands a packet to the CPU that sends it (`netif_rx`), and a qdisc is emptied by whichever CPU comes by. So packets of one
//! flow can lie in the backlogs of two CPUs at once, and overtake each other there. RPS chooses the CPU by the flow's hash instead
//! (`get_rps_cpu` in net/core/dev.c, 6.1). It has no other interface than sysfs.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Write as _},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
    unistd::{SysconfVar, sysconf},
};
use squall_common::line::CPU_OF_FLOW;

/// `FSCONFIG_CMD_CREATE`, `FSOPEN_CLOEXEC` and `FSMOUNT_CLOEXEC` of linux/mount.h (5.2).
const CREATE: libc::c_uint = 6;
const OPEN_CLOEXEC: libc::c_uint = 1;
const MOUNT_CLOEXEC: libc::c_uint = 1;

/// Lets one CPU take all packets of a flow that come out of an interface of the calling thread's network namespace by its first queue.
///
/// # Errors
///
/// Where sysfs cannot be mounted (`CAP_SYS_ADMIN`) or the kernel has no RPS. Nothing is changed then.
pub fn flows_to_cpus(interface: &str) -> io::Result<()> {
    let cpus = sysconf(SysconfVar::_NPROCESSORS_CONF)?.unwrap_or(1);
    write_mask(interface, &mask(usize::try_from(cpus).unwrap_or(1)))
}

/// Undoes [`flows_to_cpus`]: the kernel counts who needs RPS, and forgets to when a device goes.
pub fn flows_anywhere(interface: &str) -> io::Result<()> {
    write_mask(interface, "0")
}

/// A bitmap of so many CPUs, as the kernel reads it: groups of 32 bits, the highest first.
fn mask(cpus: usize) -> String {
    let groups = (0..cpus.div_ceil(32)).rev().map(|group| match cpus - group * 32 {
        bits @ 0..32 => format!("{:x}", (1_u64 << bits) - 1),
        _ => "ffffffff".to_owned(),
    });
    groups.collect::<Vec<_>>().join(",")
}

fn write_mask(interface: &str, mask: &str) -> io::Result<()> {
    let path = format!("class/net/{interface}/queues/rx-{CPU_OF_FLOW}/rps_cpus");
    let file =
        openat(&detached(c"sysfs")?, path.as_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    File::from(file).write_all(mask.as_bytes())
}

/// A file system such as sysfs as it is in the calling thread's namespaces, mounted nowhere; it is gone with its descriptor.
pub(super) fn detached(kind: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the string ends with a NUL and lives for the call.
    let context = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), OPEN_CLOEXEC) })?;
    let none: *const libc::c_char = ptr::null();
    // SAFETY: this command takes neither key nor value.
    let made = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), CREATE, none, none, 0) };
    if made != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no memory is involved.
    descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), MOUNT_CLOEXEC, 0) })
}

/// The descriptor that a call returned.
fn descriptor(returned: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(returned) {
        // SAFETY: the kernel just made it for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_has_a_bit_for_each_cpu() {
        let masks = [1, 2, 31, 32, 33, 64, 72].map(mask);
        assert_eq!(
            masks,
            ["1", "3", "7fffffff", "ffffffff", "1,ffffffff", "ffffffff,ffffffff", "ff,ffffffff,ffffffff"]
        );
    }
}
