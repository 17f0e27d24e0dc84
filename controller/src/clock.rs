//! The clock of a run: seconds since its start, monotonic.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Seconds since the start of a run. Phases and the bins of load probes start on its whole seconds.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    /// A clock that starts now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// The time now, seconds.
    #[must_use]
    pub fn now(self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }

    /// The first whole second from now on.
    #[must_use]
    pub fn next_second(self) -> f64 {
        self.now().ceil()
    }

    /// Waits until a time; not at all where it has passed.
    pub async fn wait_until(self, at: f64) {
        sleep_until(self.0 + Duration::from_secs_f64(at.max(0.0))).await;
    }
}
