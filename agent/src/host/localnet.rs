//! Whether the loopback interface of the calling thread's network namespace takes packets of this host that come without
//! their route, as they do after a detour: `route_localnet` for addresses in 127.0.0.0/8 (`ip_route_input_slow`, Linux 6.1
//! net/ipv4/route.c), `accept_local` for all of the host's own (`fib_validate_source`, net/ipv4/fib_frontend.c). For this
//! interface alone they let nobody in: what comes from it comes from this host.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

use anyhow::{Context, Result};
use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use serde::{Deserialize, Serialize};

use super::steer::detached;
use crate::crash;

/// In procfs.
const FILES: [&str; 2] = ["sys/net/ipv4/conf/lo/route_localnet", "sys/net/ipv4/conf/lo/accept_local"];

/// Which of the two settings were changed, and have to be taken back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed([bool; 2]);

impl Changed {
    /// Whether any was.
    #[must_use]
    pub fn any(self) -> bool {
        self.0.contains(&true)
    }

    /// Either's.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self([self.0[0] || other.0[0], self.0[1] || other.0[1]])
    }

    fn files(self) -> impl Iterator<Item = &'static str> {
        FILES.into_iter().zip(self.0).filter_map(|(file, changed)| changed.then_some(file))
    }
}

/// Which settings would have to change.
pub fn missing() -> Result<Changed> {
    Ok(Changed([!is_on(FILES[0])?, !is_on(FILES[1])?]))
}

/// Whether [`set`] can change them. Changes nothing.
pub fn check(which: Changed) -> Result<()> {
    which.files().try_for_each(|file| to_write(file).map(drop))
}

/// Switches settings on, or off again. What is so already is left alone: also where nobody may write.
pub fn set(which: Changed, on: bool) -> Result<()> {
    for file in which.files() {
        if is_on(file)? == on {
            continue;
        }
        crash::step("localnet.write")?;
        let written = to_write(file)?.write_all(if on { b"1" } else { b"0" });
        written.with_context(|| format!("writing /proc/{file}"))?;
    }
    Ok(())
}

fn is_on(file: &str) -> Result<bool> {
    let path = Path::new("/proc").join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.trim() != "0")
}

fn to_write(file: &str) -> Result<File> {
    match File::options().write(true).open(Path::new("/proc").join(file)) {
        // As in a container that is not privileged; a procfs of one's own is as it always is.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => detached(c"proc")
            .and_then(|proc| {
                Ok(openat(&proc, file, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?.into())
            })
            .with_context(|| format!("/proc/{file} is read-only here; opening it in a procfs of our own")),
        opened => opened.with_context(|| format!("opening /proc/{file} to write")),
    }
}
