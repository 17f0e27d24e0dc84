//! Progress of a run, on stderr. A fold over the events.

use crate::{cli::ProgressMode, event::Event, fold::Run};

/// What is shown of a run while it runs.
#[derive(Debug)]
pub struct Progress {
    mode: ProgressMode,
}

impl Progress {
    /// A display of a mode.
    pub fn new(mode: ProgressMode) -> Self {
        Self { mode }
    }

    /// Shows an event.
    pub fn apply(&mut self, event: &Event, _: &Run) {
        if self.mode == ProgressMode::Json
            && let Ok(line) = serde_json::to_string(event)
        {
            eprintln!("{line}");
        }
    }

    /// Ends the display.
    pub fn finish(&mut self) {}
}
