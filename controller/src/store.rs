//! Runs on disk: `runs/<id>/{plan.yaml, events.jsonl, report.html, report.json, report.junit.xml, report.md, agent.log}`, and the
//! files that the plan names.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{event::Event, fold::Run, report, wrong::Wrong};

/// A run that is being written.
#[derive(Debug)]
pub(crate) struct Store {
    /// Its id: short, hexadecimal, the name of its directory.
    pub id: String,
    dir: PathBuf,
    events: File,
}

impl Store {
    /// Makes a directory with a new id; never one that is there.
    ///
    /// `files` are those that the plan names, by that name. They go beside it, so that the run can be run again; but not
    /// what is named by a whole path or outside the plan's directory.
    pub(crate) fn create(runs: &Path, plan: &str, files: &BTreeMap<PathBuf, PathBuf>) -> Result<Self> {
        fs::create_dir_all(runs).with_context(|| format!("make {}", runs.display()))?;
        let mut digits = 4;
        let (id, dir) = loop {
            let id = format!("{:016x}", rand::random::<u64>())[..digits].to_owned();
            let dir = runs.join(&id);
            match fs::create_dir(&dir) {
                Ok(()) => break (id, dir),
                // Where many short ids are taken, longer ones are not.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && digits < 16 => digits += 1,
                Err(e) => return Err(e).with_context(|| format!("make {}", dir.display())),
            }
        };
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))
        };
        write("plan.yaml", plan)?;
        let path = dir.join("events.jsonl");
        let events = File::create_new(&path).with_context(|| format!("make {}", path.display()))?;
        let beside = |name: &Path| {
            name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        };
        for (name, file) in files.iter().filter(|(name, _)| beside(name)) {
            let path = dir.join(name);
            if !path.exists() {
                fs::create_dir_all(path.parent().unwrap_or(&dir))
                    .and_then(|()| fs::copy(file, &path))
                    .with_context(|| format!("copy {} to {}", file.display(), path.display()))?;
            }
        }
        Ok(Self { id, dir, events })
    }

    /// Adds an event. It is with the kernel when this returns, so it outlives this process.
    pub(crate) fn add(&mut self, event: &Event) -> Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.events
            .write_all(&line)
            .with_context(|| format!("write {}", self.dir.join("events.jsonl").display()))
    }

    /// Writes the log of the local agent beside the events.
    pub(crate) fn add_log(&self, log: &str) -> Result<()> {
        let path = self.dir.join("agent.log");
        fs::write(&path, log).with_context(|| format!("write {}", path.display()))
    }

    /// Writes the reports. Gives the path of the one for people.
    pub(crate) fn write_reports(&self, run: &Run) -> Result<PathBuf> {
        write_reports(&self.dir, run)
    }
}

fn write_reports(dir: &Path, run: &Run) -> Result<PathBuf> {
    let json = format!("{:#}\n", report::json(run));
    let reports = [
        ("report.json", json),
        ("report.junit.xml", report::junit(run)),
        ("report.md", report::markdown(run)),
        ("report.html", report::html(run)?),
    ];
    for (name, text) in reports {
        // A reader never sees half a report.
        let (path, draft) = (dir.join(name), dir.join(format!(".{name}")));
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, &path))
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(dir.join("report.html"))
}

/// Finds a run by its directory, its id, or the first letters of its id.
pub(crate) fn find(runs: &Path, run: &str) -> Result<PathBuf, Wrong> {
    let given = Path::new(run);
    if given.join("events.jsonl").is_file() {
        return Ok(given.to_owned());
    }
    let entries = fs::read_dir(runs).map_err(|e| Wrong(format!("cannot read {}: {e}", runs.display())))?;
    let mut ids: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|id| runs.join(id).join("events.jsonl").is_file())
        .collect();
    ids.sort();
    if let Some(id) = ids.iter().find(|id| *id == run) {
        return Ok(runs.join(id));
    }
    let matching: Vec<&String> = ids.iter().filter(|id| id.starts_with(run)).collect();
    match matching.as_slice() {
        [id] => Ok(runs.join(id)),
        [] if ids.is_empty() => Err(Wrong(format!("there are no runs in {}", runs.display()))),
        [] => {
            Err(Wrong(format!("there is no run `{run}` in {}; there are {}", runs.display(), ids.join(", "))))
        }
        several => {
            let ids: Vec<&str> = several.iter().map(|id| id.as_str()).collect();
            Err(Wrong(format!("`{run}` begins several runs: {}", ids.join(", "))))
        }
    }
}

/// Reads a run from its events.
///
/// A last line without an end is left out: that is how a run looks whose process died while it wrote.
pub(crate) fn read(dir: &Path) -> Result<Run> {
    let path = dir.join("events.jsonl");
    let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let mut reader = BufReader::new(file);
    let (mut run, mut line, mut number) = (Run::default(), String::new(), 0);
    loop {
        line.clear();
        number += 1;
        let read = reader.read_line(&mut line).with_context(|| format!("read {}", path.display()))?;
        if read == 0 || !line.ends_with('\n') {
            return Ok(run);
        }
        let event: Event =
            serde_json::from_str(&line).with_context(|| format!("{}:{number}: no event", path.display()))?;
        run.apply(&event);
    }
}

/// Makes the reports of a run again. Gives the path of the one for people.
pub(crate) fn report_again(dir: &Path) -> Result<(Run, PathBuf)> {
    let run = read(dir)?;
    let path = write_reports(dir, &run)?;
    Ok((run, path))
}

#[cfg(test)]
mod tests {
    use crate::event::What;

    use super::*;

    fn note(text: &str) -> Event {
        Event { at: 1.0, what: What::Note { text: text.into() } }
    }

    #[test]
    fn events_come_back_and_half_a_line_does_no_harm() {
        let runs = tempfile::tempdir().expect("a directory");
        let mut store = Store::create(runs.path(), "the plan", &BTreeMap::new()).expect("created");
        store.add(&note("one")).expect("written");
        store.add(&note("two")).expect("written");
        store.events.write_all(b"{\"at\":3,\"event\":\"no").expect("written");
        let dir = runs.path().join(&store.id);
        assert_eq!(fs::read_to_string(dir.join("plan.yaml")).expect("there"), "the plan");
        let run = read(&dir).expect("a run");
        assert_eq!(run.notes, [(1.0, "one".to_owned()), (1.0, "two".to_owned())]);
    }

    #[test]
    fn what_the_plan_names_goes_beside_it_and_nothing_out_of_the_directory() {
        let (plans, runs) =
            (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        let found = plans.path().join("found");
        fs::write(&found, "1 2 3").expect("written");
        let whole = runs.path().join("whole");
        let files: BTreeMap<PathBuf, PathBuf> =
            ["./a/my.dist", "plan.yaml", "../out", whole.to_str().expect("utf-8")]
                .map(|name| (name.into(), found.clone()))
                .into();
        let store = Store::create(runs.path(), "the plan", &files).expect("created");
        let dir = runs.path().join(&store.id);
        assert_eq!(fs::read_to_string(dir.join("a/my.dist")).expect("copied"), "1 2 3");
        assert_eq!(fs::read_to_string(dir.join("plan.yaml")).expect("there"), "the plan");
        assert_eq!(fs::read_dir(runs.path()).expect("there").count(), 1, "something is outside");
    }

    #[test]
    fn an_event_that_is_none_is_an_error_with_its_line() {
        let runs = tempfile::tempdir().expect("a directory");
        let mut store = Store::create(runs.path(), "", &BTreeMap::new()).expect("created");
        store.add(&note("one")).expect("written");
        store.events.write_all(b"{}\n").expect("written");
        let error = read(&runs.path().join(&store.id)).expect_err("no event");
        assert!(format!("{error:#}").contains("events.jsonl:2: no event"), "{error:#}");
    }

    #[test]
    fn runs_never_share_a_directory_and_are_found_by_their_first_letters() {
        let runs = tempfile::tempdir().expect("a directory");
        let ids: std::collections::BTreeSet<String> =
            (0..50).map(|_| Store::create(runs.path(), "", &BTreeMap::new()).expect("created").id).collect();
        assert_eq!(ids.len(), 50);
        for id in &ids {
            assert_eq!(find(runs.path(), id).expect("found"), runs.path().join(id));
        }
        assert!(find(runs.path(), "nothing").expect_err("none").0.contains("there is no run `nothing`"));
        assert!(find(runs.path(), "").expect_err("all").0.contains("begins several runs"));
        assert!(find(&runs.path().join("none"), "x").is_err());
    }
}
