//! Whether the loopback interface of the calling thread's network namespace takes packets of this host that come without
//! their route, as they do after a detour: `route_localnet` for addresses in 127.0.0.0/8 (`ip_route_input_slow`, Linux 6.1
//! net/ipv4/route.c), `accept_local` for all of the host's own (`fib_validate_source`, net/ipv4/fib_frontend.c). For this
//! interface alone they let nobody in: what comes from it comes from this host.

use std::fs;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::crash;

const FILES: [&str; 2] =
    ["/proc/sys/net/ipv4/conf/lo/route_localnet", "/proc/sys/net/ipv4/conf/lo/accept_local"];

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
}

/// Which settings would have to change.
pub fn missing() -> Result<Changed> {
    let off = |file: &str| {
        let text = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
        anyhow::Ok(text.trim() == "0")
    };
    Ok(Changed([off(FILES[0])?, off(FILES[1])?]))
}

/// Switches settings on, or off again.
pub fn set(which: Changed, on: bool) -> Result<()> {
    for (file, _) in FILES.iter().zip(which.0).filter(|(_, changed)| *changed) {
        crash::step("localnet.write")?;
        fs::write(file, if on { "1" } else { "0" }).with_context(|| format!("writing {file}"))?;
    }
    Ok(())
}
