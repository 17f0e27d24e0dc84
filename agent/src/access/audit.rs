//! Who did what, and who was not let: JSON lines, each with the SHA-256 of the one before and of itself.
//!
//! **Invariant:** what changes a host is written down, synced, before it is done; where it cannot be, it is refused. A revert
//! waits for nothing here.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;
use tracing::{error, info};

use crate::metrics::METRICS;

/// The log in force. Older ones are `audit.1.jsonl` and so on.
const NAME: &str = "audit.jsonl";
/// A log of this size makes place for a new one, bytes.
const LARGEST: u64 = 16 << 20;
/// Older logs that are kept.
const KEPT: u32 = 8;
/// Lines that may wait for the disk.
const WAITING: usize = 1024;
/// Longest text in a line, characters, and most ids.
const LONGEST: usize = 400;
const MOST_IDS: usize = 64;
/// Lines of one caller and one verdict in a minute that nobody waits for. Whoever asks in vain does not push others out.
const MOST_NOTES: u32 = 300;
const MINUTE: Duration = Duration::from_mins(1);
/// What the first line of all has for its predecessor.
const NONE: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// What is written down of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The caller's name.
    pub who: String,
    /// His role; empty where he has none.
    pub role: String,
    /// `Inject`, `Revert`, …
    pub method: String,
    /// Ids of injections.
    pub ids: Vec<String>,
    /// The selector, as it was given.
    pub target: String,
    /// Kind of the fault.
    pub kind: String,
    /// What the fault does, and for how long.
    pub summary: String,
    /// `allowed` or `refused`.
    pub verdict: String,
    /// Why it was refused.
    pub reason: String,
}

impl Entry {
    fn fitting(mut self) -> Self {
        self.ids.truncate(MOST_IDS);
        let Self { who, role: _, method, ids, target, kind, summary, verdict: _, reason } = &mut self;
        for text in [who, method, target, kind, summary, reason].into_iter().chain(ids) {
            if let Some((end, _)) = text.char_indices().nth(LONGEST) {
                text.truncate(end);
                text.push('…');
            }
        }
        self
    }
}

#[derive(Serialize, Deserialize)]
struct Line {
    n: u64,
    time: String,
    #[serde(flatten)]
    entry: Entry,
    prev: String,
}

/// The log of this agent, written by a thread of its own: a slow disk holds up nobody who does not wait for it.
#[derive(Debug, Clone)]
pub struct Audit {
    jobs: mpsc::SyncSender<Job>,
    notes: Arc<Mutex<Notes>>,
}

/// How many notes there were in this minute, by caller and verdict.
#[derive(Debug)]
struct Notes {
    since: Instant,
    counts: HashMap<(String, String), u32>,
}

type Job = (Entry, Option<oneshot::Sender<Result<()>>>);

impl Audit {
    /// A log in this directory. Opened with the first entry, so that an agent without it can still take back.
    pub fn start(dir: &Path) -> Result<Self> {
        let (sender, jobs) = mpsc::sync_channel::<Job>(WAITING);
        let dir = dir.to_owned();
        let write = move || {
            let mut log = None;
            for (entry, reply) in jobs {
                let written = append(&mut log, &dir, entry);
                if let Err(e) = &written {
                    METRICS.audit_failures.inc();
                    error!(
                        error = format!("{e:#}"),
                        "the audit log cannot be written; injections are refused"
                    );
                }
                if let Some(reply) = reply {
                    let _gone = reply.send(written);
                }
            }
        };
        thread::Builder::new().name("audit".to_owned()).spawn(write).context("start the audit log")?;
        let notes = Notes { since: Instant::now(), counts: HashMap::new() };
        Ok(Self { jobs: sender, notes: Arc::new(Mutex::new(notes)) })
    }

    /// Writes an entry; on disk when this returns.
    pub async fn record(&self, entry: Entry) -> Result<()> {
        let (reply, done) = oneshot::channel();
        self.jobs.try_send((entry, Some(reply))).map_err(|_| anyhow!("too many lines wait for the disk"))?;
        done.await.context("its thread ended")?
    }

    /// Writes an entry some time soon.
    pub fn note(&self, mut entry: Entry) {
        match self.notes.lock().unwrap_or_else(PoisonError::into_inner).count(&entry) {
            ..MOST_NOTES => {}
            MOST_NOTES => entry.reason += " (what comes more within this minute is not written down)",
            _ => return METRICS.audit_failures.inc(),
        }
        if self.jobs.try_send((entry, None)).is_err() {
            METRICS.audit_failures.inc();
        }
    }
}

impl Notes {
    /// How many there were before in this minute.
    fn count(&mut self, entry: &Entry) -> u32 {
        if self.since.elapsed() > MINUTE {
            *self = Self { since: Instant::now(), counts: HashMap::new() };
        }
        let count = self.counts.entry((entry.who.clone(), entry.verdict.clone())).or_default();
        *count = count.saturating_add(1);
        *count - 1
    }
}

fn append(log: &mut Option<Log>, dir: &Path, entry: Entry) -> Result<()> {
    let open = match log {
        Some(open) => open,
        None => log.insert(Log::open(dir, LARGEST)?),
    };
    // To open it again repairs what is torn or missing.
    open.append(entry).inspect_err(|_| *log = None)
}

/// The file, and where its chain ends.
struct Log {
    dir: PathBuf,
    file: File,
    length: u64,
    largest: u64,
    n: u64,
    last: String,
}

impl Log {
    fn open(dir: &Path, largest: u64) -> Result<Self> {
        let path = dir.join(NAME);
        let mut notes = Vec::new();
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read.with_context(|| format!("read {}", path.display()))?,
        };
        let mut whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if whole < text.len() {
            notes.push(format!("{} bytes of an unfinished line were cut", text.len() - whole));
        }
        let last = match end(&text[..whole]) {
            Ok(last) => last,
            Err(e) => {
                let aside = dir.join(format!("audit.broken-{}.jsonl", Timestamp::now().as_second()));
                fs::rename(&path, &aside)?;
                notes.push(format!("the log before was set aside as {}: {e:#}", aside.display()));
                whole = 0;
                None
            }
        };
        // Between two files of one chain the new one is empty.
        let last = match last {
            None if whole == 0 => fs::read(older(dir, 1)).ok().and_then(|text| end(&text).ok().flatten()),
            last => last,
        };
        let (n, last) = last.unwrap_or_else(|| (0, NONE.to_owned()));
        let file = create(&path)?;
        file.set_len(whole as u64)?;
        let mut log = Self { dir: dir.to_owned(), file, length: whole as u64, largest, n, last };
        for reason in notes {
            error!(reason, "the audit log was not whole");
            log.append(Entry { method: "audit".to_owned(), reason, ..Entry::default() })?;
        }
        Ok(log)
    }

    fn append(&mut self, entry: Entry) -> Result<()> {
        if self.length >= self.largest {
            self.rotate().context("make place for a new audit log")?;
        }
        let n = self.n + 1;
        let time = Timestamp::now().to_string();
        let line = Line { n, time, entry: entry.fitting(), prev: self.last.clone() };
        let body = serde_json::to_string(&line)?;
        let hash = digest(&body);
        let text = format!("{},\"sha256\":\"{hash}\"}}\n", &body[..body.len() - 1]);
        if let Err(e) = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data()) {
            self.file.set_len(self.length)?;
            return Err(e).with_context(|| format!("write {}", self.dir.join(NAME).display()));
        }
        // A copy of the chain's end elsewhere tells of lines that were cut off or all written anew.
        info!(target: "audit", n, sha256 = hash, "written");
        (self.n, self.last, self.length) = (n, hash, self.length + text.len() as u64);
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let path = self.dir.join(NAME);
        // Where the log is away already it is the first of the older ones, and none of them goes on.
        if path.try_exists()? {
            for n in (1..KEPT).rev() {
                match fs::rename(older(&self.dir, n), older(&self.dir, n + 1)) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
            }
            fs::rename(&path, older(&self.dir, 1))?;
        }
        self.file = create(&path)?;
        self.length = 0;
        File::open(&self.dir)?.sync_all()
    }
}

fn older(dir: &Path, n: u32) -> PathBuf {
    dir.join(format!("audit.{n}.jsonl"))
}

fn create(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).mode(0o600).open(path)
}

fn digest(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// Number and hash of the last of some whole lines.
fn end(text: &[u8]) -> Result<Option<(u64, String)>> {
    let Some(line) = text.strip_suffix(b"\n").and_then(|text| text.rsplit(|byte| *byte == b'\n').next())
    else {
        return Ok(None);
    };
    let (line, hash) = parse(std::str::from_utf8(line).context("no text")?)?;
    Ok(Some((line.n, hash)))
}

/// A line and its hash, where they go together.
fn parse(text: &str) -> Result<(Line, String)> {
    let (body, rest) = text.rsplit_once(",\"sha256\":\"").context("it has no hash")?;
    let (body, hash) =
        (format!("{body}}}"), rest.strip_suffix("\"}").context("it does not end as a line does")?);
    ensure!(digest(&body) == hash, "its hash is of another text: it was changed");
    Ok((serde_json::from_str(&body).context("no line of an audit log")?, hash.to_owned()))
}

/// What `squall-agent audit` does.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Check that no line was changed, taken out or put in; name the first that was
    Verify {
        /// The log, or several in order, the oldest first
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

/// `squall-agent audit`. What it found goes to standard output.
pub fn main(args: &Args) -> Result<()> {
    let Command::Verify { files } = &args.command;
    let (mut chain, mut first, mut lines) = (None, 0, 0_u64);
    for path in files {
        let file = File::open(path).with_context(|| format!("read {}", path.display()))?;
        for (i, text) in BufReader::new(file).lines().enumerate() {
            let checked = text.map_err(Into::into).and_then(|text| next(chain.as_ref(), &text));
            let line = checked.with_context(|| format!("{} line {}", path.display(), i + 1))?;
            first = if lines == 0 { line.0 } else { first };
            lines += 1;
            chain = Some(line);
        }
    }
    let Some((n, hash)) = chain else { bail!("there is no line in it") };
    writeln!(io::stdout(), "{lines} lines are whole: {first} to {n}, the last with sha256 {hash}")?;
    Ok(())
}

/// Number and hash of a line that follows another.
fn next(chain: Option<&(u64, String)>, text: &str) -> Result<(u64, String)> {
    let (line, hash) = parse(text)?;
    match chain {
        Some((n, last)) => ensure!(
            line.n == n + 1 && line.prev == *last,
            "it is line {} and does not follow line {n}: something is missing or out of order before it",
            line.n
        ),
        // A later file of a chain begins with a later line.
        None => ensure!(line.n > 1 || line.prev == NONE, "it is the first line and follows another"),
    }
    Ok((line.n, hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(who: &str) -> Entry {
        Entry {
            who: who.to_owned(),
            method: "Inject".to_owned(),
            verdict: "allowed".to_owned(),
            ..Entry::default()
        }
    }

    fn verify(files: &[PathBuf]) -> Result<(), String> {
        let args = Args { command: Command::Verify { files: files.to_vec() } };
        main(&args).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn a_chain_goes_on_over_restarts_and_files_and_shows_every_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let mut log = Log::open(dir.path(), 900).unwrap();
        for who in ["a", "b\n{\"n\":3}", "c"] {
            log.append(entry(who)).unwrap();
        }
        drop(log);
        let mut log = Log::open(dir.path(), 900).unwrap();
        log.append(entry("d")).unwrap();
        let files = [older(dir.path(), 1), path.clone()];
        verify(&files).unwrap();
        verify(&files[1..]).unwrap();
        let (old, new) = (fs::read_to_string(&files[0]).unwrap(), fs::read_to_string(&path).unwrap());
        assert_eq!(old.lines().count() + new.lines().count(), 4);

        let lines: Vec<_> = old.lines().chain(new.lines()).collect();
        let check = |lines: &[&str]| {
            let file = dir.path().join("copy");
            fs::write(&file, lines.iter().fold(String::new(), |text, line| text + line + "\n")).unwrap();
            verify(&[file])
        };
        check(&lines).unwrap();
        let changed = lines[1].replace("allowed", "refused");
        assert!(check(&[lines[0], &changed, lines[2]]).unwrap_err().contains("line 2: its hash"));
        assert!(check(&[lines[0], lines[2], lines[3]]).unwrap_err().contains("line 2: it is line 3"));
        assert!(check(&[lines[0], lines[1], lines[1]]).unwrap_err().contains("line 3: it is line 2"));
        assert!(check(&[]).unwrap_err().contains("no line"));
    }

    #[test]
    fn what_fails_halfway_is_taken_up_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let mut log = Some(Log::open(dir.path(), 1).unwrap());
        for who in ["a", "b", "c"] {
            append(&mut log, dir.path(), entry(who)).unwrap();
        }
        let older = |n| older(dir.path(), n);
        let files = [older(2), older(1), path.clone()];
        verify(&files).unwrap();
        // A place was made, and no new log could be.
        for n in [2, 1] {
            fs::rename(older(n), older(n + 1)).unwrap();
        }
        fs::rename(&path, older(1)).unwrap();
        append(&mut log, dir.path(), entry("d")).unwrap();
        verify(&[older(3), older(2), older(1), path.clone()]).unwrap();
        assert!(!older(4).exists());
        // A line is torn, and cannot be cut.
        let log = &mut Some(Log::open(dir.path(), LARGEST).unwrap());
        fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"n\":5,\"ti").unwrap();
        log.as_mut().unwrap().file = File::open(&path).unwrap();
        assert!(append(log, dir.path(), entry("e")).is_err());
        append(log, dir.path(), entry("f")).unwrap();
        verify(&[older(3), older(2), older(1), path]).unwrap();
    }

    #[test]
    fn a_torn_line_is_cut_and_a_changed_end_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        Log::open(dir.path(), LARGEST).unwrap().append(entry("a")).unwrap();
        fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"n\":2,\"ti").unwrap();
        Log::open(dir.path(), LARGEST).unwrap().append(entry("b")).unwrap();
        verify(std::slice::from_ref(&path)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.lines().count() == 3 && text.contains("10 bytes of an unfinished line"), "{text}");

        fs::write(&path, text.replace("\"who\":\"b\"", "\"who\":\"x\"")).unwrap();
        Log::open(dir.path(), LARGEST).unwrap().append(entry("c")).unwrap();
        verify(std::slice::from_ref(&path)).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("set aside"));
        let aside = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().path());
        let aside: Vec<_> = aside.filter(|p| p.display().to_string().contains("broken")).collect();
        assert!(verify(&aside).is_err());
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_an_error_until_it_can() {
        let dir = tempfile::tempdir().unwrap();
        let later = dir.path().join("later");
        let audit = Audit::start(&later).unwrap();
        assert!(audit.record(entry("a")).await.is_err());
        fs::create_dir(&later).unwrap();
        audit.record(entry("b")).await.unwrap();
        verify(&[later.join(NAME)]).unwrap();
    }

    #[tokio::test]
    async fn whoever_asks_in_vain_again_and_again_does_not_fill_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::start(dir.path()).unwrap();
        for _ in 0..MOST_NOTES {
            audit.note(entry("eve"));
        }
        audit.record(entry("ci")).await.unwrap();
        for _ in 0..1000 {
            audit.note(entry("eve"));
        }
        audit.note(entry("ops"));
        audit.record(entry("ci")).await.unwrap();
        let text = fs::read_to_string(dir.path().join(NAME)).unwrap();
        let of = |who: &str| text.lines().filter(|line| line.contains(&format!("\"who\":\"{who}\""))).count();
        assert_eq!((of("eve"), of("ops"), of("ci")), (MOST_NOTES as usize + 1, 1, 2));
        assert!(text.contains("not written down"), "{text}");
    }

    #[test]
    fn long_texts_are_cut() {
        let long = Entry { summary: "ü".repeat(5000), ids: vec!["x".repeat(5000); 500], ..Entry::default() }
            .fitting();
        assert!(long.summary.chars().count() == LONGEST + 1 && long.ids.len() == MOST_IDS, "{long:?}");
    }
}
