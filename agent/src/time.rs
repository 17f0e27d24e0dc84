//! The one clock that leases and deadlines run on.

use std::{fmt, fs, ops::Add, time::Duration};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A reading of CLOCK_BOOTTIME in nanoseconds: it does not step, and it goes on through a suspend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootTime(pub u64);

impl BootTime {
    /// The time now.
    ///
    /// # Panics
    ///
    /// Never on a kernel with CLOCK_BOOTTIME (2.6.39 and later).
    #[must_use]
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every supported kernel has CLOCK_BOOTTIME");
        Self(Duration::from(now).as_nanos() as u64)
    }

    /// How long from now until this time; zero where it has passed.
    #[must_use]
    pub fn remaining(self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(Self::now().0))
    }
}

/// By how much this time namespace shifts CLOCK_BOOTTIME: seconds and nanoseconds [time_namespaces(7)]. The clock that eBPF
/// programs read is never shifted. `None` on kernels without time namespaces.
pub fn boot_offset() -> Option<String> {
    let offsets = fs::read_to_string("/proc/self/timens_offsets").ok()?;
    let words = offsets.lines().find_map(|line| line.strip_prefix("boottime"))?.split_whitespace();
    Some(words.collect::<Vec<_>>().join(" "))
}

impl Add<Duration> for BootTime {
    type Output = Self;

    fn add(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for BootTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "boot+{:.3}s", self.0 as f64 / 1e9)
    }
}

/// Longest nap of [`sleep_until`]: how late it may notice that the machine was suspended. Longer than a second, after which whoever holds
/// an injection looks anyway: an agent is not to wake up three times for that.
const NAP: Duration = Duration::from_secs(2);

/// Sleeps until a time on CLOCK_BOOTTIME. Tokio's own timers stand still in a suspend, so it looks again after each nap.
pub async fn sleep_until(time: BootTime) {
    loop {
        let remaining = time.remaining();
        if remaining.is_zero() {
            return;
        }
        tokio::time::sleep(remaining.min(NAP)).await;
    }
}
