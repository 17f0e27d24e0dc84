//! Network namespaces: opened by identity, entered only by threads made for it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Error, Result, anyhow, ensure};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};

use crate::target;

const OWN: &str = "/proc/self/ns/net";

/// An open network namespace. Holding it keeps the namespace alive, also after its last process.
#[derive(Debug)]
pub struct Netns {
    file: File,
    inode: u64,
}

impl Netns {
    /// Opens the namespace of a target, if it still is the same.
    pub fn open(target: &target::Netns) -> Result<Self> {
        let path = target.path.display();
        Self::open_path(&target.path)
            .with_context(|| format!("opening the network namespace {path}"))?
            .ok_or_else(|| anyhow!("{path} is no network namespace any more"))
            .and_then(|found| {
                ensure!(found.inode == target.inode, "{path} is another network namespace by now");
                Ok(found)
            })
    }

    /// Opens a namespace by its inode, wherever it is to be found: at the path where it was, at another process in it,
    /// or by a name. `None` where it is gone.
    ///
    /// # Errors
    ///
    /// Where it was not found, and somewhere could not be looked: it may still be there.
    pub fn find(path: &Path, inode: u64) -> Result<Option<Self>> {
        let mut failed = None;
        let mut look = |path: &Path| match Self::open_path(path) {
            Ok(netns) => netns.filter(|netns| netns.inode == inode),
            Err(error) => {
                failed
                    .get_or_insert_with(|| Error::new(error).context(format!("opening {}", path.display())));
                None
            }
        };
        let mut found = look(path).or_else(|| look(Path::new(OWN)));
        if found.is_none() {
            found = elsewhere()?.iter().find_map(|path| look(path));
        }
        match (found, failed) {
            (None, Some(error)) => {
                Err(error.context(format!("looking for the network namespace net:[{inode}]")))
            }
            (found, _) => Ok(found),
        }
    }

    /// Every network namespace that this process can find, each once.
    pub fn all() -> Result<Vec<Self>> {
        let mut found: Vec<Self> = Vec::new();
        for path in [PathBuf::from(OWN)].into_iter().chain(elsewhere()?) {
            let opened = Self::open_path(&path).with_context(|| format!("opening {}", path.display()))?;
            let new = |netns: &Self| found.iter().all(|other| other.inode != netns.inode);
            let Some(netns) = opened.filter(new) else { continue };
            match netns.run(|| Ok(())) {
                // Names in /run/netns are also taken for namespaces of other kinds.
                Err(error) if error.downcast_ref() == Some(&Errno::EINVAL) => {}
                entered => found.push(entered.map(|()| netns)?),
            }
        }
        Ok(found)
    }

    /// What a path leads to; `None` where that is no namespace, or nothing.
    ///
    /// The path may be a client's, who may have put anything there by now: a FIFO would be waited for, and a device does things
    /// when it is opened. So it is looked at first, and then what was looked at is opened.
    fn open_path(path: &Path) -> io::Result<Option<Self>> {
        let open = || {
            let found = File::options().read(true).custom_flags(OFlag::O_PATH.bits()).open(path)?;
            if fstatfs(&found)?.filesystem_type() != NSFS_MAGIC {
                return Ok(None);
            }
            let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
            Ok(Some(Self { inode: file.metadata()?.ino(), file }))
        };
        open().or_else(|error: io::Error| if leads_nowhere(&error) { Ok(None) } else { Err(error) })
    }

    /// A new namespace, which ends when this is dropped.
    pub fn scratch() -> Result<Self> {
        run_in_new(|| {
            let file =
                File::open("/proc/thread-self/ns/net").context("opening a network namespace just made")?;
            let inode = file.metadata()?.ino();
            Ok(Self { file, inode })
        })
    }

    /// The inode that identifies the namespace.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs a function inside the namespace, on a thread of its own: `setns` on a worker of the runtime would move
    /// whatever runs there next.
    ///
    /// # Panics
    ///
    /// Where the function panics.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("entering the network namespace net:[{}]", self.inode))?;
            f()
        })
    }
}

/// Runs a function inside a new network namespace, which vanishes with it.
pub fn run_in_new<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace (needs CAP_SYS_ADMIN)")?;
        f()
    })
}

fn on_thread<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, f)
            .context("starting a thread")?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Whether an error says that a path leads to no namespace. Everything else (no descriptors or no memory left, a disk that fails)
/// says nothing about it. EACCES is what procfs says of a process that ends just then, and of one that nobody may look at.
fn leads_nowhere(error: &io::Error) -> bool {
    let Some(errno) = error.raw_os_error().map(Errno::from_raw) else { return false };
    let of_the_path = [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP, Errno::ENAMETOOLONG];
    of_the_path.contains(&errno) || matches!(errno, Errno::ESRCH | Errno::EACCES)
}

/// Every path on this host that names a network namespace.
fn elsewhere() -> Result<Vec<PathBuf>> {
    let entries = |dir: &str| -> Result<Vec<PathBuf>> {
        let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>();
        match read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            read => read.with_context(|| format!("reading {dir}")),
        }
    };
    let is_process = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    };
    let mut paths = entries("/run/netns")?;
    paths.extend(entries("/proc")?.into_iter().filter(is_process).map(|path| path.join("ns/net")));
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, sync::mpsc, time::Duration};

    use nix::{
        sys::{
            resource::{Resource, getrlimit, setrlimit},
            stat::Mode,
        },
        unistd::mkfifo,
    };

    use super::*;

    fn own_inode() -> u64 {
        fs::metadata(OWN).unwrap().ino()
    }

    #[test]
    fn a_namespace_is_found_and_what_is_none_is_not() {
        let own = own_inode();
        let find =
            |path: &str, inode| Netns::find(Path::new(path), inode).unwrap().map(|netns| netns.inode());
        assert_eq!(find(OWN, own), Some(own));
        assert_eq!(find("/none", own), Some(own), "it is looked for elsewhere");
        // A client may leave any of these behind.
        for nowhere in ["/none", "/proc/self/ns/mnt", "/proc/stat/ns", &"/a".repeat(5000), "/dev/zero"] {
            assert_eq!(find(nowhere, 1), None, "{nowhere}");
        }
    }

    /// The path of a client who has put something else there meanwhile.
    #[test]
    fn what_a_client_put_at_its_path_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ns");
        symlink(OWN, &path).unwrap();
        assert!(Netns::find(&path, own_inode()).unwrap().is_some());
        fs::remove_file(&path).unwrap();
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let (done, waited_for) = mpsc::channel();
        thread::spawn(move || done.send(Netns::find(&path, 1).map(|found| found.is_none())));
        let found = waited_for.recv_timeout(Duration::from_secs(20)).expect("the FIFO was waited for");
        assert!(found.unwrap());
    }

    /// In a process of its own: the limit is everybody's.
    #[test]
    fn without_descriptors_nothing_is_said_to_be_gone() {
        const CHILD: &str = "SQUALL_TEST_WITHOUT_DESCRIPTORS";
        if std::env::var_os(CHILD).is_none() {
            let test = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["without_descriptors_nothing_is_said_to_be_gone", "--test-threads=1"])
                .env(CHILD, "1")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&test.stdout);
            assert!(test.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
        let found = Netns::find(Path::new("/none"), 1);
        let all = Netns::all();
        setrlimit(Resource::RLIMIT_NOFILE, 1000.min(hard), hard).unwrap();
        let error = format!("{:#}", found.unwrap_err());
        assert!(error.contains("Too many open files"), "{error}");
        assert!(all.is_err());
    }
}
