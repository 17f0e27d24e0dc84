//! What is read from files, and read again when they change.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::time::sleep;
use tracing::{error, info};

/// How often the files are looked at. They are small, and a mounted secret changes without an event on its files.
const EVERY: Duration = Duration::from_secs(2);

/// A value that follows its files. A bad change leaves it as it is.
#[derive(Debug)]
pub struct Live<T>(RwLock<Arc<T>>);

impl<T: Send + Sync + 'static> Live<T> {
    /// Reads the files, and follows them from now on.
    pub fn follow(
        paths: Vec<PathBuf>,
        load: impl Fn(&[Vec<u8>]) -> Result<T> + Send + 'static,
    ) -> Result<Arc<Self>> {
        let mut seen = read(&paths);
        let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        let names = names.join(", ");
        let contents = seen.as_ref().map_err(|e| anyhow::anyhow!("{e}"))?;
        let value = load(contents).with_context(|| names.clone())?;
        let live = Arc::new(Self(RwLock::new(Arc::new(value))));
        let weak = Arc::downgrade(&live);
        tokio::spawn(async move {
            loop {
                sleep(EVERY).await;
                let Some(live) = weak.upgrade() else { return };
                let now = read(&paths);
                if now == seen {
                    continue;
                }
                let loaded =
                    now.as_ref().map_err(|e| anyhow::anyhow!("{e}")).and_then(|contents| load(contents));
                match loaded {
                    Ok(value) => {
                        *live.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
                        info!(files = names, "read again");
                    }
                    Err(e) => error!(
                        files = names,
                        error = format!("{e:#}"),
                        "changed for the worse; what was read before stays in force"
                    ),
                }
                seen = now;
            }
        });
        Ok(live)
    }

    /// The value as it is now.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> Live<T> {
    /// A value without files.
    pub fn fixed(value: T) -> Arc<Self> {
        Arc::new(Self(RwLock::new(Arc::new(value))))
    }
}

fn read(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, String> {
    let read = |path: &PathBuf| fs::read(path).map_err(|e| format!("read {}: {e}", path.display()));
    paths.iter().map(read).collect()
}
