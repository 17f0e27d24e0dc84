//! Processes, read from /proc. A process that vanishes while it is read is no error: it is gone.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use procfs::{FromRead, process::Stat};

/// `argv[0]` of the stressor, and its name in `ps`.
pub const STRESSOR: &str = "squall-stress";

/// The argument that ties a stressor to its injection: `--injection=TOKEN`.
pub const INJECTION_ARGUMENT: &str = "--injection=";

/// The argument that says who started a stressor: `--agent=PID`.
pub const AGENT_ARGUMENT: &str = "--agent=";

/// `PF_KTHREAD` [include/linux/sched.h, 6.1].
const PF_KTHREAD: u32 = 0x0020_0000;

/// `PF_EXITING`, as above. Set before a process lets go of its memory [kernel/exit.c, `do_exit`, 6.1].
const PF_EXITING: u32 = 0x0000_0004;

/// Every process of this pid namespace, kernel threads included, ascending.
pub fn pids() -> io::Result<Vec<i32>> {
    let mut pids: Vec<i32> =
        fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    Ok(pids)
}

/// /proc/PID/stat, while the process has not ended: none for a zombie, and for one that is gone.
pub fn stat(pid: i32) -> Option<Stat> {
    any_stat(pid).filter(|stat| !matches!(stat.state, 'Z' | 'X' | 'x'))
}

/// /proc/PID/stat, also of a process that has ended and was not waited for.
pub fn any_stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// What /proc/PID/stat holds. The crate panics where the name is not in its place: `PID (NAME) STATE …`.
pub fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let open = bytes.iter().position(|byte| *byte == b'(')?;
    let close = bytes.iter().rposition(|byte| *byte == b')').filter(|close| open < *close)?;
    let shaped = bytes.first().is_some_and(u8::is_ascii_digit)
        && bytes[..open].ends_with(b" ")
        && matches!(bytes[close..], [_, b' ', state, ..] if state.is_ascii_alphabetic());
    shaped.then(|| Stat::from_read(bytes).ok()).flatten()
}

/// Whether a thread of the kernel's own.
pub fn is_kernel_thread(stat: &Stat) -> bool {
    stat.flags & PF_KTHREAD != 0
}

/// Whether it has begun to end. Of a process that is its first thread, which may be over before others.
pub fn is_exiting(stat: &Stat) -> bool {
    stat.flags & PF_EXITING != 0
}

/// Whether a process is the same user's and in the same pid namespace as this one, as all are that this program starts, whether they
/// have a parent any more or not.
pub fn is_kin(pid: i32) -> bool {
    // The owner of the directory is the effective user, also of a process that may not be looked into
    // [fs/proc/base.c, `task_dump_owner`, 6.1].
    let owner = |pid: i32| fs::metadata(format!("/proc/{pid}")).ok().map(|dir| dir.uid());
    let own = std::process::id() as i32;
    // What cannot be told is no difference.
    owner(pid) == owner(own) && pid_namespace(pid).is_none_or(|there| pid_namespace(own) == Some(there))
}

/// Sets how nice the calling thread is, -20 to 19 (`nice(2)`). Below what it is now takes `CAP_SYS_NICE`; without, it stays.
pub fn be_nice(nice: i32) {
    // SAFETY: no memory is involved. Process 0 is the calling thread (kernel/sys.c, 6.1), and no other.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } != 0 {
        tracing::debug!(nice, "the priority of a thread stays: {}", io::Error::last_os_error());
    }
}

/// The executable, by the path it was started from; none for kernel threads, zombies, and without the right to look.
///
/// The kernel marks a file that was replaced or removed since (an upgrade) with " (deleted)"; the mark is taken off
/// [`fs/d_path.c`, 6.1].
pub fn exe(pid: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok().map(|path| undelete(&path))
}

/// A path without the mark of [`exe`].
pub fn undelete(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    PathBuf::from(OsStr::from_bytes(bytes.strip_suffix(b" (deleted)").unwrap_or(bytes)))
}

/// The arguments; empty for kernel threads, zombies and the dying.
pub fn arguments(pid: i32) -> Vec<String> {
    fs::read(format!("/proc/{pid}/cmdline")).map(|bytes| split_arguments(&bytes)).unwrap_or_default()
}

/// The arguments in what /proc/PID/cmdline holds.
pub fn split_arguments(bytes: &[u8]) -> Vec<String> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.split(|byte| *byte == 0).map(|argument| String::from_utf8_lossy(argument).into_owned()).collect()
}

/// The token of the injection a stressor works for, where these are the arguments of a stressor.
pub fn injection_of(arguments: &[String]) -> Option<&str> {
    if arguments.first().map(String::as_str) != Some(STRESSOR) {
        return None;
    }
    arguments.iter().find_map(|argument| argument.strip_prefix(INJECTION_ARGUMENT))
}

/// The parent of a process, its parent, and so on.
pub fn ancestors(pid: i32) -> Vec<i32> {
    let mut line = Vec::new();
    let mut next = any_stat(pid).map_or(0, |stat| stat.ppid);
    while next > 0 && !line.contains(&next) {
        line.push(next);
        next = any_stat(next).map_or(0, |stat| stat.ppid);
    }
    line
}

/// The pid namespace of a process, by its inode.
pub fn pid_namespace(pid: i32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/pid")).ok().map(|meta| meta.ino())
}

/// What /proc/PID/cgroup says.
pub fn cgroups(pid: i32) -> Option<procfs::ProcessCGroups> {
    procfs::FromBufRead::from_buf_read(io::BufReader::new(
        fs::File::open(format!("/proc/{pid}/cgroup")).ok()?,
    ))
    .ok()
}

/// Open file descriptors; none without the right to look.
pub fn descriptors(pid: i32) -> Option<u64> {
    procfs::process::Process::new(pid).ok()?.fd_count().ok().map(|count| count as u64)
}

/// Resident memory, bytes. From statm, which is exact from 6.16 on (`get_mm_counter_sum` in
/// `fs/proc/task_mmu.c`); stat leaves out what is still counted per CPU.
pub fn resident(pid: i32) -> Option<u64> {
    let memory = procfs::process::StatM::from_file(format!("/proc/{pid}/statm")).ok()?;
    Some(memory.resident * procfs::page_size())
}

/// The CPUs a process may run on, ascending.
pub fn allowed_cpus(pid: i32) -> Option<Vec<usize>> {
    let bytes = fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&bytes); // a process may call itself anything
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    super::cgroup::parse_cpus(list.trim())
}

/// A process, held so that its pid cannot come to mean another one.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Takes hold of a process. None where there is none of this pid.
    pub fn open(pid: i32) -> io::Result<Option<Self>> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) };
        }
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        Ok(Some(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) })))
    }

    /// SIGKILL. A process that has ended is as good as killed.
    pub fn kill(&self) -> io::Result<()> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        let fd = self.0.as_raw_fd();
        // SAFETY: the descriptor is open, and the kernel allows a null siginfo.
        let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, no_info, 0) };
        if sent == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
    }
}

/// Closes every descriptor but standard input, output and error. For a program that has opened none yet.
pub fn close_inherited_descriptors() -> io::Result<()> {
    // SAFETY: called first thing in a new program, before anything owns a descriptor above 2.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    if closed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executable_that_was_replaced_keeps_its_name() {
        assert_eq!(undelete(Path::new("/opt/a b/recommender (deleted)")), Path::new("/opt/a b/recommender"));
        assert_eq!(undelete(Path::new("/opt/recommender")), Path::new("/opt/recommender"));
    }

    #[test]
    fn arguments_are_split_at_nul_and_may_be_empty() {
        assert_eq!(split_arguments(b"redis\0--port\0\x006379\0"), ["redis", "--port", "", "6379"]);
        assert_eq!(split_arguments(b""), [""; 0]);
    }

    /// Found by fuzzing: the first two made the crate panic.
    #[test]
    fn what_is_no_stat_is_none() {
        for text in ["x (deleted)", ") 1 (a", "(a) S 1", "1 (a) ", "1 (a)", "1(a) S 1", "1 (a) S 1", ""] {
            assert!(parse_stat(text.as_bytes()).is_none(), "{text:?}");
        }
        let own = fs::read_to_string("/proc/self/stat").unwrap();
        let (_, fields) = own.rsplit_once(')').unwrap();
        let odd = [b"7 (a) (\xff S ".as_slice(), b"b)", fields.as_bytes()].concat();
        assert_eq!(parse_stat(&odd).unwrap().comm, "a) (\u{fffd} S b");
    }

    #[test]
    fn only_a_stressor_has_an_injection() {
        let arguments = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(injection_of(&arguments("squall-stress stress cpu --injection=ab12")), Some("ab12"));
        assert_eq!(injection_of(&arguments("grep --injection=ab12")), None);
        assert_eq!(injection_of(&[]), None);
    }

    #[test]
    fn this_process_can_be_read() {
        let pid = std::process::id() as i32;
        let stat = stat(pid).expect("this process runs");
        assert!(stat.starttime > 0 && !is_kernel_thread(&stat));
        assert!(pids().expect("/proc is readable").contains(&pid));
        assert!(ancestors(pid).contains(&stat.ppid));
        assert!(descriptors(pid).expect("own descriptors") >= 3);
        assert!(!allowed_cpus(pid).expect("own CPUs").is_empty());
        assert_eq!(exe(pid), std::env::current_exe().ok());
    }
}
