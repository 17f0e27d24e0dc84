//! The global stop: a file. Where it is, nothing may be injected, and what is injected is taken back.
//!
//! It needs no network and no agent that answers: `touch /var/lib/squall/stopped` stops this node, and an agent that
//! is started later finds it.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    time::{sleep, timeout},
};

/// How often the file is looked for where its directory tells of files that come: some file systems do not.
const SELDOM: Duration = Duration::from_secs(2);
/// And where it does not tell, or the file is there: what was let in a moment before may live.
const OFTEN: Duration = Duration::from_millis(250);

/// The file, and what is known where it could not be written.
#[derive(Debug)]
pub struct Stop {
    file: PathBuf,
    set: AtomicBool,
}

impl Stop {
    /// The stop of the agent with this state directory.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self { file: state_dir.join("stopped"), set: AtomicBool::new(false) }
    }

    /// Whether this node is stopped.
    #[must_use]
    pub fn is_set(&self) -> bool {
        // A directory that cannot be read says nothing good.
        self.set.load(Ordering::SeqCst) || self.file.try_exists().unwrap_or(true)
    }

    /// Watches for the file from now on. Must be called within the runtime.
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch(self.told().inspect_err(|e| tracing::debug!("the stop is looked for often: {e}")).ok())
    }

    fn told(&self) -> io::Result<pipe::Receiver> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let dir = self.file.parent().unwrap_or(Path::new("/"));
        inotify.add_watch(dir, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
        // It is read as a pipe is.
        pipe::Receiver::from_owned_fd_unchecked(inotify.into())
    }

    /// Stops; where it cannot be put on disk only for as long as this agent runs, and the error says so.
    pub fn set(&self) -> Result<()> {
        self.set.store(true, Ordering::SeqCst);
        File::create(&self.file).and_then(|file| file.sync_all()).with_context(|| {
            format!("stopped, but {} cannot be written: a restart would forget it", self.file.display())
        })
    }

    /// Allows injections again.
    pub fn release(&self) -> Result<()> {
        match fs::remove_file(&self.file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e)
                    .with_context(|| format!("still stopped: cannot remove {}", self.file.display()));
            }
            _ => {}
        }
        self.set.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// Tells when to look. An agent at rest wakes up as seldom as it can: the service under test shares its CPUs.
#[derive(Debug)]
pub struct Watch(Option<pipe::Receiver>);

impl Watch {
    /// Waits until it is time to look whether [`Stop::is_set`], which it was or was not at the last look.
    pub async fn next(&mut self, was_set: bool) {
        let Some(events) = &mut self.0 else { return sleep(OFTEN).await };
        let every = if was_set { OFTEN } else { SELDOM };
        // Which file came is seen by looking; what is read only makes room for the next.
        if let Ok(Err(error)) = timeout(every, events.read(&mut [0; 4096])).await {
            tracing::debug!("the stop is looked for often: {error}");
            self.0 = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_is_a_file_that_anyone_may_make() {
        let dir = tempfile::tempdir().unwrap();
        let stop = Stop::new(dir.path());
        assert!(!stop.is_set());
        stop.set().unwrap();
        assert!(Stop::new(dir.path()).is_set(), "the next agent finds it");
        stop.release().unwrap();
        stop.release().unwrap();
        assert!(!stop.is_set());
        fs::write(dir.path().join("stopped"), "").unwrap();
        assert!(stop.is_set());
    }

    #[tokio::test]
    async fn a_watch_tells_of_the_file_when_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let stop = Stop::new(dir.path());
        let mut watch = stop.watch();
        let came = tokio::spawn(async move {
            watch.next(false).await;
            watch
        });
        sleep(Duration::from_millis(20)).await;
        assert!(!came.is_finished());
        fs::write(dir.path().join("stopped"), "").unwrap();
        let mut watch = timeout(SELDOM / 2, came).await.expect("it is not waited for the next look").unwrap();

        // A directory that tells nothing more.
        fs::remove_dir_all(dir.path()).unwrap();
        watch.next(false).await;
        for _ in 0..2 {
            timeout(SELDOM * 2, watch.next(false)).await.expect("it is looked for all the same");
        }
        let mut nowhere = Stop::new(Path::new("/none/at/all")).watch();
        timeout(OFTEN * 4, nowhere.next(false)).await.expect("and often where nothing tells at all");
    }

    #[test]
    fn without_a_disk_it_stops_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let stop = Stop::new(&dir.path().join("none"));
        let error = stop.set().unwrap_err();
        assert!(format!("{error:#}").contains("a restart would forget it"), "{error:#}");
        assert!(stop.is_set());
    }
}
