//! Atomic additions. Rust's target for eBPF has none (`atomic-cas` is false in its description), the machine has.

use squall_common::table::Cell;

/// Adds without asking for the value before. Any kernel.
#[inline(always)]
pub(crate) fn add(counter: &Cell, by: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the pointer comes from a reference to an aligned u64 that everyone changes atomically.
    unsafe {
        core::arch::asm!("lock *(u64 *)({p} + 0) += {v}", p = in(reg) counter.as_ptr(), v = in(reg) by);
    }
    #[cfg(not(target_arch = "bpf"))]
    counter.store(counter.load() + by);
}

/// Adds and gives the value before. Kernel 5.12 and later.
#[inline(always)]
pub(crate) fn fetch_add(counter: &Cell, by: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = by;
        // SAFETY: the pointer comes from a reference to an aligned u64 that everyone changes atomically.
        unsafe {
            core::arch::asm!(
                "{v} = atomic_fetch_add((u64 *)({p} + 0), {v})",
                p = in(reg) counter.as_ptr(),
                v = inout(reg) value,
            );
        }
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        counter.store(counter.load() + by);
        counter.load() - by
    }
}
