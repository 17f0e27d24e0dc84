//! The one place that events go through: to disk, into the fold, and to whoever watches.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    clock::Clock,
    event::{Event, What},
    fold::Run,
    progress::Progress,
    store::Store,
};

/// The events of a run as they happen.
pub(crate) struct Log {
    clock: Clock,
    inner: Mutex<Inner>,
}

struct Inner {
    store: Store,
    run: Run,
    progress: Progress,
    /// Why events cannot be written any more.
    broken: Option<String>,
}

impl Log {
    /// A log that writes to a store.
    pub(crate) fn new(clock: Clock, store: Store, progress: Progress) -> Self {
        Self { clock, inner: Mutex::new(Inner { store, run: Run::default(), progress, broken: None }) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something happened now.
    pub(crate) fn record(&self, what: What) {
        self.record_at(self.clock.now(), what);
    }

    /// Something happened at a given time of the run.
    pub(crate) fn record_at(&self, at: f64, what: What) {
        let event = Event { at, what };
        let mut inner = self.lock();
        let Inner { store, run, progress, broken } = &mut *inner;
        if broken.is_none()
            && let Err(e) = store.add(&event)
        {
            *broken = Some(format!("{e:#}"));
        }
        run.apply(&event);
        progress.apply(&event, run);
    }

    /// Several things happened now.
    pub(crate) fn record_all(&self, all: impl IntoIterator<Item = What>) {
        for what in all {
            self.record(what);
        }
    }

    /// A note for people.
    pub(crate) fn note(&self, text: impl Into<String>) {
        self.record(What::Note { text: text.into() });
    }

    /// Reads the run as it stands now.
    pub(crate) fn with<R>(&self, read: impl FnOnce(&Run) -> R) -> R {
        read(&self.lock().run)
    }

    /// Uses the store.
    pub(crate) fn store<R>(&self, use_it: impl FnOnce(&Store, &Run) -> R) -> R {
        let inner = self.lock();
        use_it(&inner.store, &inner.run)
    }

    /// Lets the progress display look at the clock.
    pub(crate) fn tick(&self) {
        let Inner { run, progress, .. } = &mut *self.lock();
        progress.tick(run);
    }

    /// Ends the progress display.
    pub(crate) fn finish(&self) {
        self.lock().progress.finish();
    }

    /// Why the events could not be written, where that is so: then nothing that follows would be on record.
    pub(crate) fn broken(&self) -> Option<String> {
        self.lock().broken.clone()
    }
}
