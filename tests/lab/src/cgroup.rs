//! A cgroup of its own for a process, on hosts with either version.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait_for;

/// Where the hierarchies are.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// The v1 hierarchies that a lab's cgroup is in.
const CONTROLLERS: [&str; 3] = ["cpu", "cpuacct", "memory"];

/// A cgroup directly below the root: one directory on v2, one in each of the hierarchies that matter on v1. Removed
/// when dropped; whatever is still in it is killed first.
#[derive(Debug)]
pub struct Cgroup {
    name: String,
    dirs: Vec<PathBuf>,
    v2: bool,
    /// Controllers that had to be turned on for the children of the v2 root, and are turned off again.
    enabled: Vec<&'static str>,
}

impl Cgroup {
    /// Makes a cgroup.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let root = Path::new(ROOT);
        let v2 = root.join("cgroup.controllers").exists();
        let dirs = if v2 {
            vec![root.join(&name)]
        } else {
            // cpu and cpuacct may be one hierarchy under two names.
            let mut parents: Vec<PathBuf> = Vec::new();
            for controller in CONTROLLERS {
                let parent = fs::canonicalize(root.join(controller))
                    .with_context(|| format!("no cgroup controller {controller} below {ROOT}"))?;
                if !parents.contains(&parent) {
                    parents.push(parent);
                }
            }
            parents.into_iter().map(|parent| parent.join(&name)).collect()
        };
        let mut cgroup = Self { name, dirs: Vec::new(), v2, enabled: Vec::new() };
        if v2 {
            cgroup.enable(root)?;
        }
        for dir in dirs {
            fs::create_dir(&dir).with_context(|| format!("cannot make the cgroup {}", dir.display()))?;
            cgroup.dirs.push(dir);
        }
        Ok(cgroup)
    }

    fn enable(&mut self, root: &Path) -> Result<()> {
        let control = root.join("cgroup.subtree_control");
        let on = fs::read_to_string(&control).context("cannot read the controllers of the root cgroup")?;
        for controller in ["cpu", "memory"] {
            if !on.split_whitespace().any(|c| c == controller) {
                fs::write(&control, format!("+{controller}"))
                    .with_context(|| format!("cannot turn the cgroup controller {controller} on"))?;
                self.enabled.push(controller);
            }
        }
        Ok(())
    }

    /// Its path below the root of its hierarchies, as in /proc/PID/cgroup.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/{}", self.name)
    }

    /// The directory that has the files of a controller (`cpu`, `memory`).
    pub fn dir(&self, controller: &str) -> Result<&Path> {
        if self.v2 {
            return self.dirs.first().map(PathBuf::as_path).context("the cgroup has no directory");
        }
        let parent = fs::canonicalize(Path::new(ROOT).join(controller))?;
        let dir = self.dirs.iter().find(|dir| dir.parent() == Some(parent.as_path()));
        dir.map(PathBuf::as_path).with_context(|| format!("the cgroup is not in the {controller} hierarchy"))
    }

    /// Limits its memory, bytes.
    pub fn limit_memory(&self, bytes: u64) -> Result<()> {
        let file = if self.v2 { "memory.max" } else { "memory.limit_in_bytes" };
        self.write("memory", file, &bytes.to_string())
    }

    /// Limits it to so many CPUs.
    pub fn limit_cpus(&self, cpus: f64) -> Result<()> {
        const PERIOD_US: u64 = 100_000;
        let quota = (cpus * PERIOD_US as f64) as u64;
        if self.v2 {
            return self.write("cpu", "cpu.max", &format!("{quota} {PERIOD_US}"));
        }
        self.write("cpu", "cpu.cfs_period_us", &PERIOD_US.to_string())?;
        self.write("cpu", "cpu.cfs_quota_us", &quota.to_string())
    }

    /// The memory charged to it now, bytes.
    pub fn memory(&self) -> Result<u64> {
        let file = if self.v2 { "memory.current" } else { "memory.usage_in_bytes" };
        let text = fs::read_to_string(self.dir("memory")?.join(file))?;
        text.trim().parse().with_context(|| format!("{file} is not a number: {text:?}"))
    }

    /// The CPU time it has used since it was made.
    pub fn cpu_time(&self) -> Result<Duration> {
        if !self.v2 {
            let nanos = fs::read_to_string(self.dir("cpuacct")?.join("cpuacct.usage"))?;
            return Ok(Duration::from_nanos(nanos.trim().parse()?));
        }
        let stat = fs::read_to_string(self.dir("cpu")?.join("cpu.stat"))?;
        let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
        Ok(Duration::from_micros(micros.context("cpu.stat has no usage_usec")?.trim().parse()?))
    }

    /// CPUs used over a while: 1.0 is one whole CPU.
    pub fn cpus(&self, over: Duration) -> Result<f64> {
        let (used, started) = (self.cpu_time()?, Instant::now());
        thread::sleep(over);
        Ok((self.cpu_time()?.saturating_sub(used)).as_secs_f64() / started.elapsed().as_secs_f64())
    }

    /// The processes in it.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        for dir in &self.dirs {
            pids.extend(processes(dir)?);
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// The command, wrapped so that it moves itself into this cgroup before anything of it runs.
    #[must_use]
    pub fn wrap(&self, command: &Command) -> Command {
        wrap(&self.dirs, command)
    }

    /// As [`Self::wrap`], but into a cgroup below this one, which is made.
    pub fn wrap_below(&self, path: &str, command: &Command) -> Result<Command> {
        let dirs: Vec<_> = self.dirs.iter().map(|dir| dir.join(path)).collect();
        for dir in &dirs {
            fs::create_dir_all(dir).with_context(|| format!("cannot make the cgroup {}", dir.display()))?;
        }
        Ok(wrap(&dirs, command))
    }

    /// The processes in a cgroup below this one.
    pub fn processes_below(&self, path: &str) -> Result<Vec<i32>> {
        let dir = self.dirs.first().context("the cgroup has no directory")?;
        processes(&dir.join(path))
    }

    fn write(&self, controller: &str, file: &str, value: &str) -> Result<()> {
        let path = self.dir(controller)?.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
    }

    fn remove(&mut self) -> Result<()> {
        for dir in self.dirs.drain(..).rev() {
            remove(&dir)?;
        }
        for controller in self.enabled.drain(..) {
            let control = Path::new(ROOT).join("cgroup.subtree_control");
            fs::write(&control, format!("-{controller}"))
                .with_context(|| format!("cannot turn the cgroup controller {controller} off again"))?;
        }
        Ok(())
    }
}

fn wrap(dirs: &[PathBuf], command: &Command) -> Command {
    const MOVE: &str =
        r#"while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit 1; shift; done; shift; exec "$@""#;
    let mut wrapped = Command::new("sh");
    wrapped.args(["-c", MOVE, "sh"]).args(dirs).arg("--");
    wrapped.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            wrapped.env(name, value);
        }
    }
    wrapped
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(e) = self.remove() {
            eprintln!("cannot remove the cgroup {}: {e:#}", self.name);
        }
    }
}

/// Kills what is in a cgroup directory and in those below it, and removes them.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    let children = match fs::read_dir(dir) {
        Ok(children) => children,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("cannot list {}", dir.display())),
    };
    for child in children {
        let child = child?;
        if child.file_type()?.is_dir() {
            remove(&child.path())?;
        }
    }
    wait_for(&format!("the cgroup {} to be empty", dir.display()), Duration::from_secs(10), || {
        for pid in processes(dir)? {
            // Zero stands for a process of another pid namespace; kill(2) would take it for our own process group.
            if pid > 0 {
                // It may have ended since.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        match fs::remove_dir(dir) {
            Ok(()) => Ok(Some(())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Some(())),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => Ok(None),
            Err(e) => bail!("cannot remove {}: {e}", dir.display()),
        }
    })
}

fn processes(dir: &Path) -> Result<Vec<i32>> {
    match fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => text.lines().map(|line| line.parse().context("cgroup.procs is strange")).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("cannot read the processes of {}", dir.display())),
    }
}
