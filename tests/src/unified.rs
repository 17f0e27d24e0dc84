//! A cgroup of version 2, on hosts that have that hierarchy mounted, wherever it is and whatever has the controllers.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use squall_lab::wait_for;

/// A cgroup (v2) with no controllers, directly below the root. Removed when dropped, which takes that its processes have ended.
#[derive(Debug)]
pub struct Unified {
    dir: PathBuf,
}

impl Unified {
    /// Makes one.
    pub fn new(name: &str) -> Result<Self> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let root = roots.into_iter().find(|root| root.join("cgroup.controllers").exists());
        let dir = root.context("no cgroup v2 hierarchy is mounted")?.join(name);
        fs::create_dir(&dir).with_context(|| format!("cannot make the cgroup {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// The command, wrapped so that it moves itself into this cgroup before anything of it runs.
    #[must_use]
    pub fn wrap(&self, command: &Command) -> Command {
        let mut wrapped = Command::new("sh");
        wrapped.args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#]).arg(&self.dir);
        wrapped.arg(command.get_program()).args(command.get_args());
        wrapped
    }
}

impl Drop for Unified {
    fn drop(&mut self) {
        let gone =
            wait_for(
                "the cgroup to be empty",
                Duration::from_secs(10),
                || Ok(fs::remove_dir(&self.dir).ok()),
            );
        if let Err(e) = gone {
            eprintln!("cannot remove the cgroup {}: {e:#}", self.dir.display());
        }
    }
}
