//! Places to break things in, on this host and apart from it: network namespaces, cgroups, a shop with a Redis. Each
//! is gone when it is dropped, and [`HostState`] proves that.
//!
//! **Invariant:** nothing here touches the host's own network namespace, clock or root cgroups. Commands run in a
//! namespace through `nsenter --net`, never `ip netns exec`, which mounts a new /sys and so hides the cgroups.

mod bpf;
mod cgroup;
mod command;
mod counters;
mod netns;
mod probe;
mod shop;
mod state;
pub mod stats;
mod sweep;
mod tcx;

use std::{
    env,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use nix::unistd::Uid;

pub use cgroup::Cgroup;
pub use command::{Running, output, run, stdout};
pub use counters::Counters;
pub use netns::{Netns, Ping, Stream, Wire};
pub use probe::{Arrival, Flight, Probe, Seen, monotonic, round_trips};
pub use shop::{Shop, ShopOptions};
pub use state::{HostState, NetState};
pub use sweep::sweep;
pub use tcx::Dropper;

/// Every namespace, cgroup and directory of a lab starts with this.
pub const PREFIX: &str = "squall-";

/// Fails where the caller is not root.
pub fn need_root() -> Result<()> {
    if !Uid::effective().is_root() {
        bail!("this needs root: it makes network namespaces and cgroups and loads eBPF; run it with sudo");
    }
    Ok(())
}

/// A name that no other process, and no other lab of this process, has: `squall-<tag>-<pid>-<n>`.
#[must_use]
pub fn unique(tag: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{PREFIX}{tag}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Where the binaries under test are: `SQUALL_BIN_DIR`, or the release directory of this workspace.
#[must_use]
pub fn bin_dir() -> PathBuf {
    if let Some(dir) = env::var_os("SQUALL_BIN_DIR") {
        return dir.into();
    }
    let target = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target")), PathBuf::from);
    target.join("release")
}

/// Tries until something is there, every 20 ms for at most `most`.
pub fn wait_for<T>(what: &str, most: Duration, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        if started.elapsed() > most {
            bail!("waited {most:?} in vain for {what}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}
