//! The journal: one file per injection, on disk before the first change to the host. Beside it, while no agent runs, what
//! one agent left for the next to inject again: one file per injection too.
//!
//! **Invariant:** a record is whole or absent. It is written beside its place, synced, and renamed; then the directory
//! is synced. A damaged record is set aside and reported, never guessed at, and one that cannot be read just now stays.

use std::{
    fs::{self, File},
    io::{self, Write},
    marker::PhantomData,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
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

/// All that is needed to inject again what an agent took back because another one takes its place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Left {
    /// Id of the injection.
    pub id: String,
    /// Who injected it, where that is known.
    pub owner: Option<String>,
    /// Kind of the fault, for people.
    pub kind: String,
    /// What it did, for people.
    pub summary: String,
    /// The fault as it came: a message `squall.v1.Fault`.
    pub fault: Vec<u8>,
    /// What it drew its decisions from; 0 where it draws none.
    pub seed: u64,
    /// What it was injected into.
    pub target: Target,
    /// What tells the order from another with the same id.
    pub order: String,
    /// From Fire to the deadline, as asked for.
    pub duration: Duration,
    /// The lease, as asked for.
    pub lease: Duration,
    /// When it was first injected.
    pub fired: BootTime,
    /// When it ends.
    pub deadline: BootTime,
    /// When its lease ends.
    pub lease_ends: BootTime,
    /// When this was written: just before it was taken back.
    pub left: BootTime,
    /// /proc/sys/kernel/random/boot_id of the boot it was made in.
    pub boot_id: String,
}

/// What has a file of its own, in a [`Shelf`].
pub trait Filed: Serialize + DeserializeOwned {
    /// For people.
    const NAME: &'static str;
    /// What its absence means, where it could not be written.
    const WITHOUT: &'static str;
    /// Id of its injection.
    fn id(&self) -> &str;
    /// When it was made.
    fn made(&self) -> BootTime;
}

impl Filed for Record {
    const NAME: &'static str = "undo record";
    const WITHOUT: &'static str = "nothing was injected";

    fn id(&self) -> &str {
        &self.id
    }

    fn made(&self) -> BootTime {
        self.created
    }
}

impl Filed for Left {
    const NAME: &'static str = "order to resume";
    const WITHOUT: &'static str = "it is not resumed";

    fn id(&self) -> &str {
        &self.id
    }

    fn made(&self) -> BootTime {
        self.left
    }
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    format: u32,
    sha256: String,
    record: String,
}

/// What an agent has on disk about its injections. Held by one agent alone.
#[derive(Debug)]
pub struct Journal {
    /// What has to be undone.
    pub undo: Shelf<Record>,
    /// What the next agent is asked to inject again.
    pub left: Shelf<Left>,
    _lock: Flock<File>,
}

/// A directory of records, one file each.
#[derive(Debug)]
pub struct Shelf<R> {
    dir: PathBuf,
    records: PhantomData<R>,
}

/// What a shelf held when it was looked at.
#[derive(Debug)]
pub struct Found<R> {
    /// Readable records, the newest first.
    pub records: Vec<R>,
    /// Files that are damaged and are set aside, each with the reason.
    pub set_aside: Vec<(PathBuf, String)>,
    /// Files that were set aside before, and are still there.
    pub aside: Vec<PathBuf>,
    /// Files that could not be read, each with the error. They stay: the next time it may go well.
    pub unread: Vec<(PathBuf, String)>,
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
        let (undo, left) = (Shelf::at(state_dir.join("journal")), Shelf::at(state_dir.join("resume")));
        undo.make()?;
        // What an earlier agent left can also be undone from a disk that takes nothing any more.
        if let Err(e) = left.make() {
            warn!("the next agent could not resume anything: {e:#}");
        }
        let path = state_dir.join("lock");
        let made = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let lock = made.or_else(|e| File::open(&path).map_err(|_| e));
        let lock = lock.with_context(|| format!("open {}", path.display()))?;
        let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
            bail!(
                "another squall-agent holds {}: talk to that one, or stop it first, or give --state-dir",
                state_dir.display()
            );
        };
        Ok(Self { undo, left, _lock: lock })
    }
}

impl<R: Filed> Shelf<R> {
    fn at(dir: PathBuf) -> Self {
        Self { dir, records: PhantomData }
    }

    fn make(&self) -> Result<()> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.with_context(|| format!("make {}", self.dir.display()))
    }

    /// Reads every record, sets aside what is damaged, and removes what was never finished.
    pub fn read(&self) -> Result<Found<R>> {
        let found = self.look()?;
        for path in &found.unfinished {
            if let Err(e) = fs::remove_file(path) {
                warn!(path = %path.display(), "an unfinished {} cannot be removed: {e}", R::NAME);
            }
        }
        for (path, _) in &found.set_aside {
            if let Err(e) = set_aside(path) {
                warn!("{e:#}");
            }
        }
        Ok(found)
    }

    /// Whether anything of this id is on disk, readable or not.
    #[must_use]
    pub fn has(&self, id: &str) -> bool {
        let there = |path: PathBuf| path.try_exists().unwrap_or(true);
        self.path(id).is_ok_and(|path| there(path.with_extension("json.unreadable")) || there(path))
    }

    /// Reads every record, and changes nothing.
    pub fn look(&self) -> Result<Found<R>> {
        let mut found = Found {
            records: Vec::new(),
            set_aside: Vec::new(),
            aside: Vec::new(),
            unread: Vec::new(),
            unfinished: Vec::new(),
        };
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
            entries => entries.with_context(|| format!("read {}", self.dir.display()))?,
        };
        for entry in entries {
            let path = entry?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("tmp") => found.unfinished.push(path),
                Some("unreadable") => found.aside.push(path),
                // No descriptors, no memory, a disk that fails: that says nothing about the record.
                Some("json") => match fs::read(&path).map(|bytes| of_file(&path, &bytes)) {
                    Ok(Ok(record)) => found.records.push(record),
                    Ok(Err(e)) => found.set_aside.push((path, format!("{e:#}"))),
                    Err(e) => found.unread.push((path, e.to_string())),
                },
                _ => {}
            }
        }
        found.records.sort_by_key(|r: &R| std::cmp::Reverse(r.made()));
        Ok(found)
    }

    /// Writes a record; on disk when this returns. Where it fails, nothing of it is left.
    pub fn write(&self, record: &R) -> Result<()> {
        let path = self.path(record.id())?;
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
            .with_context(|| format!("write the {} {}; {}", R::NAME, path.display(), R::WITHOUT))
    }

    /// Removes a record. One that is not there is a success.
    pub fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id)?;
        match crash::step("journal.remove").and_then(|()| fs::remove_file(&path)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("remove the {} {}", R::NAME, path.display()))
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

/// Sees to it that a file is not read as a record any more.
pub fn set_aside(path: &Path) -> Result<()> {
    fs::rename(path, path.with_extension("json.unreadable"))
        .with_context(|| format!("set {} aside", path.display()))
}

fn of_file<R: Filed>(path: &Path, bytes: &[u8]) -> Result<R> {
    let record: R = parse(bytes)?;
    let id = record.id();
    ensure!(path.file_stem().and_then(|s| s.to_str()) == Some(id), "it is of injection {id}");
    Ok(record)
}

/// A record from the bytes of its file.
pub fn parse<R: Filed>(bytes: &[u8]) -> Result<R> {
    let envelope: Envelope = serde_json::from_slice(bytes).with_context(|| format!("not an {}", R::NAME))?;
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
        journal.undo.write(&record("a", 1)).unwrap();
        journal.undo.write(&record("b.1", 2)).unwrap();
        assert_eq!(journal.undo.read().unwrap().records, [record("b.1", 2), record("a", 1)]);
        journal.undo.remove("a").unwrap();
        journal.undo.remove("a").unwrap();
        assert_eq!(journal.undo.read().unwrap().records, [record("b.1", 2)]);
    }

    #[test]
    fn what_is_damaged_is_set_aside_and_the_rest_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        for id in ["whole", "short", "flipped", "newer", "renamed"] {
            journal.undo.write(&record(id, 1)).unwrap();
        }
        let file = |id: &str| dir.path().join("journal").join(format!("{id}.json"));
        let text = |id: &str| fs::read_to_string(file(id)).unwrap();
        fs::write(file("short"), &text("short")[..40]).unwrap();
        fs::write(file("flipped"), text("flipped").replace("fake", "fuke")).unwrap();
        fs::write(file("newer"), text("newer").replace("\"format\":1", "\"format\":2")).unwrap();
        fs::rename(file("renamed"), file("other")).unwrap();
        fs::write(dir.path().join("journal/half.tmp"), "{").unwrap();
        // It can be opened, and not be read.
        fs::create_dir(file("busy")).unwrap();

        let found = journal.undo.read().unwrap();
        assert_eq!(found.records, [record("whole", 1)]);
        assert_eq!(found.set_aside.len(), 4, "{found:?}");
        let again = journal.undo.read().unwrap();
        assert_eq!((again.records.len(), again.set_aside.len(), again.aside.len()), (1, 0, 4));
        for found in [found, again] {
            assert_eq!(found.unread.len(), 1, "{found:?}");
            assert_eq!(found.unread[0].0, file("busy"));
        }
        let ids = ["whole", "short", "flipped", "newer", "other", "busy", "renamed", "half"];
        assert_eq!(ids.map(|id| journal.undo.has(id)), [true, true, true, true, true, true, false, false]);
        fs::remove_dir(file("busy")).unwrap();
        journal.undo.write(&record("busy", 2)).unwrap();
        assert_eq!(journal.undo.read().unwrap().records, [record("busy", 2), record("whole", 1)]);
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
