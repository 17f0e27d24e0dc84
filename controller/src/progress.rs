//! Progress of a run, on stderr. A fold over the events.

use crate::{cli::ProgressMode, event::Event, fold::Run};

/// What is shown of a run while it runs.
#[derive(Debug)]
pub(crate) struct Progress {
    mode: ProgressMode,
}

impl Progress {
    /// A display of a mode.
    pub(crate) fn new(mode: ProgressMode) -> Self {
        Self { mode }
    }

    /// Shows an event.
    pub(crate) fn apply(&mut self, event: &Event, _: &Run) {
        if self.mode == ProgressMode::Json
            && let Ok(line) = serde_json::to_string(event)
        {
            eprintln!("{line}");
        }
    }

    /// Ends the display.
    pub(crate) fn finish(&mut self) {}
}
