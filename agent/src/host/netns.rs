//! Network namespaces: opened by identity, entered only by threads made for it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns, unshare};

use crate::target;

/// An open network namespace. Holding it keeps the namespace alive, also after its last process.
#[derive(Debug)]
pub struct Netns {
    file: File,
    inode: u64,
}

impl Netns {
    /// Opens the namespace of a target, if it still is the same.
    pub fn open(target: &target::Netns) -> Result<Self> {
        Self::open_path(&target.path, target.inode)
            .with_context(|| format!("opening the network namespace {}", target.path.display()))?
            .ok_or_else(|| anyhow!("{} is another network namespace by now", target.path.display()))
    }

    /// Opens a namespace by its inode, wherever it is to be found: at the path where it was, at another process in it,
    /// or by a name. `None` where it is gone.
    pub fn find(path: &Path, inode: u64) -> Option<Self> {
        for path in [path.to_owned(), PathBuf::from("/proc/self/ns/net")].into_iter().chain(elsewhere()) {
            // A path that cannot be opened belongs to a process that ended or a name that was removed.
            if let Ok(Some(netns)) = Self::open_path(&path, inode) {
                return Some(netns);
            }
        }
        None
    }

    /// Every network namespace that this process can find, each once.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut found: Vec<Self> = Vec::new();
        for path in [PathBuf::from("/proc/self/ns/net")].into_iter().chain(elsewhere()) {
            // Names in /run/netns are also taken for other things, and what ends meanwhile is gone.
            let Ok(file) = File::open(&path) else { continue };
            let Ok(inode) = file.metadata().map(|meta| meta.ino()) else { continue };
            let netns = Self { file, inode };
            if found.iter().all(|other| other.inode != inode) && netns.run(|| Ok(())).is_ok() {
                found.push(netns);
            }
        }
        found
    }

    fn open_path(path: &Path, inode: u64) -> io::Result<Option<Self>> {
        let file = File::open(path)?;
        Ok((file.metadata()?.ino() == inode).then_some(Self { file, inode }))
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

/// Every path on this host that names a network namespace.
fn elsewhere() -> impl Iterator<Item = PathBuf> {
    let entries = |dir: &str| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let processes = entries("/proc").filter(|path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    });
    entries("/run/netns").chain(processes.map(|path| path.join("ns/net")))
}
