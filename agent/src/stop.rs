//! The global stop: a file. Where it is, nothing may be injected, and what is injected is taken back.
//!
//! It needs no network and no agent that answers: `touch /var/lib/squall/stopped` stops this node, and an agent that
//! is started later finds it.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result};

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

    #[test]
    fn without_a_disk_it_stops_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let stop = Stop::new(&dir.path().join("none"));
        let error = stop.set().unwrap_err();
        assert!(format!("{error:#}").contains("a restart would forget it"), "{error:#}");
        assert!(stop.is_set());
    }
}
