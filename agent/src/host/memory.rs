//! Memory that is really held: touched, and locked where that is allowed.

use std::{io, ptr};

/// Keeps the allocator to one arena. glibc's has one for each thread otherwise, and what loading the eBPF programs took
/// and gave back would stay resident in several: 25 MB instead of 5 for an idle agent. To be called before any thread.
pub fn one_arena() {
    // SAFETY: the call takes two numbers. Where it fails the allocator stays as it is.
    let _unchanged = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Address space reserved once, of which the first [`Region::held`] bytes are resident.
///
/// Not huge pages: a step of the ramp must not bring more memory than it asked for.
#[derive(Debug)]
pub struct Region {
    start: *mut u8,
    size: usize,
    held: usize,
    locked: bool,
}

impl Region {
    /// Reserves address space for at most so many bytes. Takes no memory: without access it is not counted, also where
    /// the kernel does not overcommit [`mm/mmap.c`, `accountable_mapping`, 6.1].
    pub fn reserve(most: u64) -> io::Result<Self> {
        let size = round_up(most)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory that is in use.
        let start = unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range was mapped above. A kernel without huge pages refuses, and needs no advice.
        let _no_huge_pages = unsafe { libc::madvise(start, size, libc::MADV_NOHUGEPAGE) };
        Ok(Self { start: start.cast(), size, held: 0, locked: true })
    }

    /// Bytes that are resident.
    pub fn held(&self) -> u64 {
        self.held as u64
    }

    /// Whether all of it is locked, so that it cannot be swapped out.
    pub fn locked(&self) -> bool {
        self.locked
    }

    /// Holds so many bytes more, rounded up to pages, at most what was reserved.
    pub fn grow(&mut self, bytes: u64) -> io::Result<()> {
        let bytes = round_up(bytes)?.min(self.size - self.held);
        if bytes == 0 {
            return Ok(());
        }
        let from = self.start.wrapping_add(self.held);
        // SAFETY: the range is inside the mapping, which nothing else uses.
        let opened = unsafe { libc::mprotect(from.cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) };
        if opened != 0 {
            return Err(io::Error::last_os_error());
        }
        touch(from, bytes);
        // SAFETY: the range is mapped. Without the right to lock it stays unlocked, and is touched again and again.
        self.locked &= unsafe { libc::mlock(from.cast(), bytes) } == 0;
        self.held += bytes;
        Ok(())
    }

    /// Gives so many bytes back, rounded up to pages.
    pub fn shrink(&mut self, bytes: u64) -> io::Result<()> {
        let bytes = round_up(bytes)?.min(self.held);
        let from = self.start.wrapping_add(self.held - bytes);
        // SAFETY: the range is inside the mapping; unlocking what is not locked changes nothing.
        let _unlocked = unsafe { libc::munlock(from.cast(), bytes) };
        // SAFETY: the range is inside the mapping, and nothing is read from it again.
        let dropped = unsafe { libc::madvise(from.cast(), bytes, libc::MADV_DONTNEED) };
        if dropped != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above; without access it no longer counts as committed.
        let _closed = unsafe { libc::mprotect(from.cast(), bytes, libc::PROT_NONE) };
        self.held -= bytes;
        Ok(())
    }

    /// Touches every page again, so that what was swapped out comes back.
    pub fn touch(&self) {
        touch(self.start, self.held);
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is this region's own, and no reference into it exists.
        let _unmapped = unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}

fn round_up(bytes: u64) -> io::Result<usize> {
    let page = procfs::page_size();
    bytes
        .checked_next_multiple_of(page)
        .and_then(|bytes| usize::try_from(bytes).ok())
        .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

/// Writes to every page of a range that is mapped for writing and belongs to a region.
fn touch(start: *mut u8, bytes: usize) {
    for offset in (0..bytes).step_by(procfs::page_size() as usize) {
        // SAFETY: both callers pass a range of their region that was opened for writing and is still mapped.
        unsafe { start.wrapping_add(offset).write_volatile(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn resident() -> u64 {
        crate::host::proc::resident(std::process::id() as i32).expect("own memory")
    }

    #[test]
    fn what_is_held_is_resident_and_what_is_given_back_is_not() {
        let mut region = Region::reserve(1 << 40).expect("address space");
        let before = resident();
        region.grow(64 * MIB).expect("memory");
        region.grow(1).expect("memory");
        assert_eq!(region.held(), 64 * MIB + procfs::page_size());
        // Other tests run in this process, so only coarse differences count.
        assert!(resident() > before + 48 * MIB, "{} {}", resident(), before);
        region.touch();
        region.shrink(1 << 50).expect("given back");
        assert_eq!(region.held(), 0);
        assert!(resident() < before + 32 * MIB, "{} {}", resident(), before);
        region.grow(8 * MIB).expect("memory, again");
        assert_eq!(region.held(), 8 * MIB);
    }

    #[test]
    fn no_more_than_reserved_is_held() {
        let mut region = Region::reserve(MIB).expect("address space");
        region.grow(5 * MIB).expect("memory");
        assert_eq!(region.held(), MIB);
    }
}
