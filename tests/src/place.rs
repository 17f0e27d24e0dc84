//! Where a test hurts something, and how it was before.

use std::time::Duration;

use anyhow::{Context, Result};
use squall_lab::{HostState, NetState, bin_dir, need_root, wait_for};

use crate::{Lab, Victim};

/// A lab and a victim with a limit of 256 MiB, as they were.
#[derive(Debug)]
pub struct Place {
    /// The two network namespaces.
    pub lab: Lab,
    /// A process in a cgroup of its own.
    pub victim: Victim,
    before: (NetState, HostState),
}

impl Place {
    /// As root, before there is an agent.
    pub fn new(tag: &str) -> Result<Self> {
        need_root()?;
        let (lab, victim) = (Lab::new(tag)?, Victim::start(tag, 256 << 20)?);
        let before = (lab.near.state()?, HostState::capture(&bin_dir())?);
        Ok(Self { lab, victim, before })
    }

    /// What is not as before, in the near namespace and on the host: `+` is new, `-` is missing.
    pub fn left(&self) -> Result<Vec<String>> {
        let mut left = self.before.0.changes(&self.lab.near.state()?);
        left.extend(self.before.1.changes(&HostState::capture(&bin_dir())?));
        Ok(left)
    }

    /// With no agent, all is as before, at the latest after 20 s.
    pub fn is_restored(&self) -> Result<()> {
        let restored = || Ok(self.left()?.is_empty().then_some(()));
        wait_for("everything to be as before", Duration::from_secs(20), restored)
            .with_context(|| format!("{:?}", self.left()))
    }
}
