//! The journal: one file per injection, on disk before the first change to the host.
//!
//! **Invariant:** a record is whole or absent. It is written beside its place, synced, and renamed; then the directory
//! is synced. A record that cannot be read is set aside and reported, never guessed at.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tracing::warn;

use crate::{crash, target::Target, time::BootTime};

/// Version of the record's form. A record of another version is set aside.
const FORMAT: u32 = 1;

/// All that is needed to take an injection back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Id of the injection.
    pub id: String,
    /// Kind of the fault.
    pub kind: String,
    /// What it was injected into.
    pub target: Target,
    /// The fault's own undo record.
    pub undo: Value,
    /// When the record was made; replay runs backwards in it.
    pub created: BootTime,
    /// /proc/sys/kernel/random/boot_id of the boot it was made in.
    pub boot_id: String,
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    format: u32,
    sha256: String,
    record: String,
}

/// The directory of records, held by one agent alone.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    _lock: Flock<File>,
}

/// What a journal held when it was opened.
#[derive(Debug, Default)]
pub struct Found {
    /// Readable records, the newest first.
    pub records: Vec<Record>,
    /// Files that could not be read and are set aside, each with the reason.
    pub set_aside: Vec<(PathBuf, String)>,
    /// Files that were never finished: the change they announced was never made.
    pub unfinished: Vec<PathBuf>,
}

impl Journal {
    /// Takes the state directory for this agent alone.
    ///
    /// # Errors
    ///
    /// When another agent holds it, or it cannot be made.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let dir = state_dir.join("journal");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("make the journal {}", dir.display()))?;
        let path = state_dir.join("lock");
        let made = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
        // What an earlier agent left can also be undone from a disk that takes nothing any more.
        let lock = made.or_else(|e| File::open(&path).map_err(|_| e));
        let lock = lock.with_context(|| format!("open {}", path.display()))?;
        let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
            bail!(
                "another squall-agent holds {}: talk to that one, or stop it first, or give --state-dir",
                state_dir.display()
            );
        };
        Ok(Self { dir, _lock: lock })
    }

    /// Reads every record, sets aside what cannot be read, and removes what was never finished.
    pub fn read(&self) -> Result<Found> {
        let found = self.look()?;
        for path in &found.unfinished {
            if let Err(e) = fs::remove_file(path) {
                warn!(path = %path.display(), "an unfinished undo record cannot be removed: {e}");
            }
        }
        for (path, _) in &found.set_aside {
            if let Err(e) = fs::rename(path, path.with_extension("json.unreadable")) {
                warn!(path = %path.display(), "an unreadable undo record cannot be renamed: {e}");
            }
        }
        Ok(found)
    }

    /// Reads every record, and changes nothing.
    pub fn look(&self) -> Result<Found> {
        let mut found = Found::default();
        let entries = fs::read_dir(&self.dir).with_context(|| format!("read {}", self.dir.display()))?;
        for entry in entries {
            let path = entry?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("tmp") => found.unfinished.push(path),
                Some("json") => match read(&path) {
                    Ok(record) => found.records.push(record),
                    Err(e) => found.set_aside.push((path, format!("{e:#}"))),
                },
                _ => {}
            }
        }
        found.records.sort_by_key(|r| std::cmp::Reverse(r.created));
        Ok(found)
    }

    /// Writes a record; on disk when this returns. Where it fails, nothing of it is left.
    pub fn write(&self, record: &Record) -> Result<()> {
        let path = self.path(&record.id)?;
        let temporary = path.with_extension("tmp");
        let bytes = envelope(serde_json::to_string(record)?)?;
        let attempt = || -> io::Result<()> {
            crash::step("journal.create")?;
            let mut file =
                File::options().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
            crash::step("journal.write")?;
            file.write_all(&bytes)?;
            crash::step("journal.sync")?;
            file.sync_all()?;
            crash::step("journal.rename")?;
            fs::rename(&temporary, &path)?;
            crash::step("journal.sync_dir")?;
            File::open(&self.dir)?.sync_all()?;
            crash::point("journal.written");
            Ok(())
        };
        attempt()
            .inspect_err(|_| {
                for file in [&temporary, &path] {
                    let _not_there = fs::remove_file(file);
                }
            })
            .with_context(|| format!("write the undo record {}; nothing was injected", path.display()))
    }

    /// Removes a record. One that is not there is a success.
    pub fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id)?;
        match crash::step("journal.remove").and_then(|()| fs::remove_file(&path)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("remove the undo record {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, id: &str) -> Result<PathBuf> {
        ensure!(is_id(id), "{id:?} is no injection id");
        Ok(self.dir.join(format!("{id}.json")))
    }
}

/// Whether a text may be the id of an injection, and so a part of a file name.
#[must_use]
pub fn is_id(id: &str) -> bool {
    (1..=100).contains(&id.len())
        && !id.starts_with('.')
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn read(path: &Path) -> Result<Record> {
    let record = parse(&fs::read(path)?)?;
    ensure!(
        path.file_stem().and_then(|s| s.to_str()) == Some(&record.id),
        "it is of injection {}",
        record.id
    );
    Ok(record)
}

/// A record from the bytes of its file.
pub fn parse(bytes: &[u8]) -> Result<Record> {
    let envelope: Envelope = serde_json::from_slice(bytes).context("not an undo record")?;
    ensure!(envelope.format == FORMAT, "format {}, this agent reads format {FORMAT}", envelope.format);
    ensure!(envelope.sha256 == digest(&envelope.record), "its checksum does not match");
    Ok(serde_json::from_str(&envelope.record)?)
}

/// The bytes of the file around the JSON of a record.
pub fn envelope(inner: String) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&Envelope { format: FORMAT, sha256: digest(&inner), record: inner })?)
}

fn digest(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// The id of this boot.
pub fn boot_id() -> Result<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the boot id")?;
    Ok(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, created: u64) -> Record {
        Record {
            id: id.into(),
            kind: "fake".into(),
            target: Target { name: "t".into(), process: None, cgroup: None, netns: None, interface: None },
            undo: serde_json::json!({ "n": created }),
            created: BootTime(created),
            boot_id: "b".into(),
        }
    }

    #[test]
    fn what_was_written_is_read_newest_first_and_gone_once_removed() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.write(&record("a", 1)).unwrap();
        journal.write(&record("b.1", 2)).unwrap();
        assert_eq!(journal.read().unwrap().records, [record("b.1", 2), record("a", 1)]);
        journal.remove("a").unwrap();
        journal.remove("a").unwrap();
        assert_eq!(journal.read().unwrap().records, [record("b.1", 2)]);
    }

    #[test]
    fn what_is_damaged_is_set_aside_and_the_rest_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        for id in ["whole", "short", "flipped", "newer", "renamed"] {
            journal.write(&record(id, 1)).unwrap();
        }
        let file = |id: &str| dir.path().join("journal").join(format!("{id}.json"));
        let text = |id: &str| fs::read_to_string(file(id)).unwrap();
        fs::write(file("short"), &text("short")[..40]).unwrap();
        fs::write(file("flipped"), text("flipped").replace("fake", "fuke")).unwrap();
        fs::write(file("newer"), text("newer").replace("\"format\":1", "\"format\":2")).unwrap();
        fs::rename(file("renamed"), file("other")).unwrap();
        fs::write(dir.path().join("journal/half.tmp"), "{").unwrap();

        let found = journal.read().unwrap();
        assert_eq!(found.records, [record("whole", 1)]);
        assert_eq!(found.set_aside.len(), 4, "{found:?}");
        let again = journal.read().unwrap();
        assert_eq!((again.records.len(), again.set_aside.len()), (1, 0));
        assert!(!dir.path().join("journal/half.tmp").exists());
    }

    #[test]
    fn a_second_agent_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Journal::open(dir.path()).unwrap();
        let refused = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("another squall-agent"), "{refused}");
    }

    #[test]
    fn an_id_cannot_leave_the_journal() {
        for bad in ["", ".", "../x", "a/b", "a b", "ü", &"x".repeat(101)] {
            assert!(!is_id(bad), "{bad:?}");
        }
        assert!(is_id("7f3a-r1.f2_x"));
    }
}
