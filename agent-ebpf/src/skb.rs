//! A packet in the kernel, behind a safe face.

use core::{
    mem::MaybeUninit,
    ptr::{addr_of, addr_of_mut},
};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS},
    helpers::{
        bpf_clone_redirect, bpf_get_prandom_u32, bpf_redirect, bpf_set_hash, bpf_skb_change_head,
        bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use squall_common::{packet::Bytes, table::Table, tap};

/// A packet, valid while the program runs.
pub(crate) struct Skb<'a> {
    ptr: *mut __sk_buff,
    _ctx: &'a TcContext,
}

/// What our programs write on a packet for the next of them to read: `skb->cb`, which is the qdisc layer's own and
/// travels with clones and redirects.
#[derive(Clone, Copy)]
pub(crate) struct Note {
    /// `CLOCK_MONOTONIC` nanoseconds at which the packet leaves; the rule's index above.
    pub(crate) due: u64,
    /// EDT: not 0 where it may overtake others. TAP: when it arrived.
    pub(crate) more: u64,
}

macro_rules! field {
    ($skb:expr, $($field:tt)+) => {
        // SAFETY: the context is valid, and the verifier checks which fields may be read.
        unsafe { addr_of!((*$skb.ptr).$($field)+).read_volatile() }
    };
}

macro_rules! set_field {
    ($skb:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: the context is valid, and the verifier checks which fields may be written.
        unsafe { addr_of_mut!((*$skb.ptr).$($field)+).write_volatile($value) }
    };
}

impl<'a> Skb<'a> {
    #[inline(always)]
    pub(crate) fn new(ctx: &'a TcContext) -> Self {
        Self { ptr: ctx.skb.skb, _ctx: ctx }
    }

    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        field!(self, len)
    }

    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        field!(self, ifindex)
    }

    /// `skb->protocol` in host order.
    #[inline(always)]
    pub(crate) fn ethertype(&self) -> u16 {
        u16::from_be(field!(self, protocol) as u16)
    }

    /// Earliest departure time, as TCP's pacing set it.
    #[inline(always)]
    pub(crate) fn departure(&self) -> u64 {
        field!(self, tstamp)
    }

    #[inline(always)]
    pub(crate) fn set_departure(&self, at: u64) {
        set_field!(self, at, tstamp);
    }

    /// The note of this port on the packet, if there is one.
    #[inline(always)]
    pub(crate) fn note(&self, table: &Table) -> Option<Note> {
        let guard = table.guard.load() as u32;
        if field!(self, cb[0]) != guard {
            return None;
        }
        let due = u64::from(field!(self, cb[1])) | u64::from(field!(self, cb[2])) << 32;
        let more = u64::from(field!(self, cb[3])) | u64::from(field!(self, cb[4])) << 32;
        Some(Note { due, more })
    }

    #[inline(always)]
    pub(crate) fn set_note(&self, table: &Table, note: Note) {
        set_field!(self, table.guard.load() as u32, cb[0]);
        set_field!(self, note.due as u32, cb[1]);
        set_field!(self, (note.due >> 32) as u32, cb[2]);
        set_field!(self, note.more as u32, cb[3]);
        set_field!(self, (note.more >> 32) as u32, cb[4]);
    }

    #[inline(always)]
    pub(crate) fn clear_note(&self) {
        set_field!(self, 0, cb[0]);
    }

    /// Makes the packet a flow of its own.
    #[inline(always)]
    pub(crate) fn set_random_hash(&self) {
        // SAFETY: the helper takes no argument and cannot fail.
        let hash = unsafe { bpf_get_prandom_u32() };
        // SAFETY: the context is valid; the helper cannot fail.
        unsafe { bpf_set_hash(self.ptr, hash) };
    }

    /// Sends a clone out of an interface.
    #[inline(always)]
    pub(crate) fn clone_redirect(&self, ifindex: u32) -> bool {
        // SAFETY: the context is valid.
        (unsafe { bpf_clone_redirect(self.ptr, ifindex, 0) }) == 0
    }

    /// Puts bytes in front of the packet.
    #[inline(always)]
    pub(crate) fn push(&self, bytes: &[u8; tap::LEN]) -> bool {
        // SAFETY: the context is valid.
        if unsafe { bpf_skb_change_head(self.ptr, tap::LEN as u32, 0) } != 0 {
            return false;
        }
        // SAFETY: the context is valid, and so are as many bytes as the array has.
        (unsafe { bpf_skb_store_bytes(self.ptr.cast(), 0, bytes.as_ptr().cast(), tap::LEN as u32, 0) }) == 0
    }
}

/// The verdict that sends the packet of this program out of (or into) an interface.
#[inline(always)]
pub(crate) fn redirect(ifindex: u32, ingress: bool) -> i32 {
    let flags = if ingress { u64::from(BPF_F_INGRESS) } else { 0 };
    // SAFETY: the helper only notes the index down; an interface that is not there is found out later.
    (unsafe { bpf_redirect(ifindex, flags) }) as i32
}

impl Bytes for Skb<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes all N bytes, or fails.
        let failed = unsafe {
            bpf_skb_load_bytes(self.ptr.cast(), offset as u32, bytes.as_mut_ptr().cast(), N as u32)
        };
        if failed != 0 {
            return None;
        }
        // SAFETY: the helper succeeded, so all bytes are written.
        Some(unsafe { bytes.assume_init() })
    }
}
