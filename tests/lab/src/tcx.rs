//! A TCX program of somebody else: what other software on a host attaches.

#![expect(unsafe_code, reason = "bpf(2), of which aya takes whole object files only")]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use anyhow::{Context, Result};

use crate::Netns;

/// Commands, types and places of `linux/bpf.h`, 6.6.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;

/// Programs on one interface that drop the frames of one length, and let all others through. They go when this is dropped.
#[derive(Debug)]
pub struct Dropper(#[expect(dead_code, reason = "held, not used")] Vec<OwnedFd>);

impl Dropper {
    /// Attaches them, leaving and arriving, before all others. `None` where the kernel has no TCX (before Linux 6.6).
    pub fn attach(netns: &Netns, interface: u32, length: u32) -> Result<Option<Self>> {
        let instruction = |code: u8, registers: u8, offset: u16, value: u32| {
            u64::from(code) | u64::from(registers) << 8 | u64::from(offset) << 16 | u64::from(value) << 32
        };
        let program = [
            instruction(0x61, 0x12, 0, 0),      // r2 = *(u32 *)(r1 + 0), the length
            instruction(0xb7, 0x00, 0, !0),     // r0 = TCX_NEXT
            instruction(0x55, 0x02, 1, length), // if r2 != length: skip one
            instruction(0xb7, 0x00, 0, 2),      // r0 = TCX_DROP
            instruction(0x95, 0x00, 0, 0),      // return r0
        ];
        let name_of = |text: &[u8]| text.as_ptr() as u64;
        let kind = u64::from(BPF_PROG_TYPE_SCHED_CLS) | (program.len() as u64) << 32;
        let loaded = bpf(BPF_PROG_LOAD, &[kind, program.as_ptr() as u64, name_of(b"Apache-2.0\0")]);
        let loaded = loaded.context("loading a program of somebody else's")?;
        let number = loaded.as_raw_fd() as u64;
        let mut all = vec![loaded];
        for place in [BPF_TCX_INGRESS, BPF_TCX_EGRESS] {
            let attach = || Ok(bpf(BPF_LINK_CREATE, &[number | u64::from(interface) << 32, place.into()]));
            match netns.inside(attach)? {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
                link => all.push(link.context("attaching a program of somebody else's")?),
            }
        }
        Ok(Some(Self(all)))
    }
}

/// bpf(2) with the first words of its attributes; the others are 0.
fn bpf(command: libc::c_int, words: &[u64]) -> io::Result<OwnedFd> {
    let mut attributes = [0_u64; 16];
    attributes[..words.len()].copy_from_slice(words);
    // SAFETY: the attributes are valid for their size, and what they point to outlives the call.
    let made =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(&attributes)) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(made as RawFd) })
}
