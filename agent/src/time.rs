//! The one clock that leases and deadlines run on.

use std::{fmt, ops::Add, os::fd::OwnedFd, time::Duration};

use nix::{
    sys::{
        time::TimeSpec,
        timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

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

/// Sleeps until a time on CLOCK_BOOTTIME, which tokio's own timers do not run on: they stand still in a suspend.
pub async fn sleep_until(time: BootTime) {
    let timer =
        TimerFd::new(timerfd::ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)
            .and_then(|timer| {
                // Zero would disarm it.
                let at = TimeSpec::from_duration(Duration::from_nanos(time.0.max(1)));
                timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
                Ok(timer)
            });
    match timer.map(OwnedFd::from).map_err(std::io::Error::from).and_then(AsyncFd::try_register) {
        Ok(timer) => drop(timer.readable().await),
        // Out of file descriptors: the coarser clock still ends it.
        Err(_) => tokio::time::sleep(time.remaining()).await,
    }
}
