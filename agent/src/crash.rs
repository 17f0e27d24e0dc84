//! Named points on the way of an injection, at which a test kills the agent or makes a step fail.
//!
//! Only with the feature `crash-points`, which no release has; without it a point is nothing. `SQUALL_CRASH` names a
//! directory with two files. Each point that is passed becomes a line of `trace`, with the
//! word `step` where it may fail. The one line of `orders` says what happens
//! at the n-th passing since the trace was emptied: `kill engine.journaled 1`, or `fail line.veth 2 28` with an errno. In a
//! stressor `kill` is for its agent, and the stressor goes on.

/// Every point there is.
#[cfg(any(test, feature = "crash-points"))]
pub const POINTS: &[&str] = &[
    "engine.fire",
    "engine.journaled",
    "engine.injected",
    "engine.renew",
    "engine.renewed",
    "engine.update",
    "engine.updated",
    "engine.end",
    "engine.dropped",
    "engine.revert",
    "engine.reverted",
    "engine.removed",
    "engine.replay",
    "engine.leave",
    "engine.left",
    "engine.resume",
    "journal.create",
    "journal.write",
    "journal.sync",
    "journal.rename",
    "journal.sync_dir",
    "journal.written",
    "journal.remove",
    "network.inject",
    "network.rule",
    "network.ruled",
    "network.update",
    "network.updated",
    "network.extend",
    "network.revert",
    "network.filters",
    "network.clsact",
    "network.line",
    "network.localnet",
    "port.open",
    "port.prepare",
    "port.localnet",
    "port.clsact",
    "port.attach",
    "port.attached",
    "port.line",
    "port.line.program",
    "port.lined",
    "port.tap",
    "port.tap.program",
    "port.tap.queue",
    "port.write",
    "port.written",
    "port.close",
    "port.close.drain",
    "port.close.programs",
    "port.close.filters",
    "port.close.line",
    "port.close.clsact",
    "port.close.localnet",
    "port.closed",
    "line.veth",
    "line.made",
    "line.steer",
    "line.up",
    "line.fq",
    "line.remove",
    "tap.open",
    "tap.create",
    "tap.offload",
    "tap.up",
    "localnet.write",
    "stressor.spawn",
    "stressor.spawned",
    "stressor.order",
    "stressor.answered",
    "stressor.child",
    "stressor.join",
    "stressor.work",
    "stressor.kill",
    "stressor.ended",
];

/// A step that may fail: a test kills the agent here, or gets an error out of it.
#[cfg(not(feature = "crash-points"))]
#[inline]
#[expect(clippy::unnecessary_wraps, reason = "with the feature it can fail")]
pub const fn step(_: &'static str) -> std::io::Result<()> {
    Ok(())
}

/// A place that cannot fail: a test kills the agent here.
#[cfg(not(feature = "crash-points"))]
#[inline]
pub const fn point(_: &'static str) {}

#[cfg(feature = "crash-points")]
pub use live::{env, point, step};

#[cfg(feature = "crash-points")]
mod live {
    use std::{
        env::var_os,
        fs::{self, File},
        io::{self, Read, Write},
        path::Path,
        process::id,
        sync::{Mutex, PoisonError},
    };

    use nix::{
        errno::Errno,
        sys::signal::{Signal, kill},
        unistd::{Pid, getpid, getppid},
    };

    use super::POINTS;

    const DIR: &str = "SQUALL_CRASH";
    const AGENT: &str = "SQUALL_CRASH_AGENT";
    /// Of the agent and its stressors one at a time is at a point.
    static ONE: Mutex<()> = Mutex::new(());

    pub fn step(name: &'static str) -> io::Result<()> {
        at(name, "step")
    }

    fn at(name: &'static str, kind: &str) -> io::Result<()> {
        debug_assert!(POINTS.contains(&name), "{name} is not in the list");
        let Some(dir) = var_os(DIR) else { return Ok(()) };
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        match pass(Path::new(&dir), name, kind) {
            Ok(None) => Ok(()),
            Ok(Some(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Err(error) => panic!("the test's orders in {}: {error}", dir.display()),
        }
    }

    pub fn point(name: &'static str) {
        if let Err(error) = at(name, "point") {
            panic!("{name} cannot fail, but was told to: {error}");
        }
    }

    /// What a stressor has to know of the test.
    pub fn env() -> Vec<(&'static str, std::ffi::OsString)> {
        let agent = (AGENT, id().to_string().into());
        var_os(DIR).map(|dir| (DIR, dir)).into_iter().chain([agent]).collect()
    }

    /// The errno that a step is told to fail with.
    fn pass(dir: &Path, name: &str, kind: &str) -> io::Result<Option<i32>> {
        let mut trace = File::options().read(true).append(true).create(true).open(dir.join("trace"))?;
        let mut before = String::new();
        trace.read_to_string(&mut before)?;
        trace.write_all(format!("{name} {kind}\n").as_bytes())?;
        let passed = 1 + before.lines().filter(|line| line.split(' ').next() == Some(name)).count();
        let orders = fs::read_to_string(dir.join("orders")).unwrap_or_default();
        let words: Vec<&str> = orders.split_whitespace().collect();
        match words[..] {
            ["kill", at, n] if at == name && n == passed.to_string() => {
                let agent: Option<i32> = var_os(AGENT).and_then(|pid| pid.to_str()?.parse().ok());
                let agent = Pid::from_raw(agent.unwrap_or_else(|| id() as i32));
                // An agent that is gone already has left its stressor to another parent.
                if agent == getppid() || agent == getpid() {
                    kill(agent, Signal::SIGKILL)?;
                }
                Ok(None)
            }
            ["fail", at, n, errno] if at == name && n == passed.to_string() => {
                let errno: i32 = errno.parse().map_err(io::Error::other)?;
                tracing::info!(name, error = %Errno::from_raw(errno), "a test makes this step fail");
                Ok(Some(errno))
            }
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::POINTS;

    fn sources(dir: &Path, found: &mut String) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if !path.ends_with("crash.rs") {
                found.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }

    #[test]
    fn the_list_is_what_the_sources_name() {
        let mut text = String::new();
        sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut text);
        let named = |call: &str| -> Vec<String> {
            text.split(call).skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())).collect()
        };
        let used: Vec<String> = [named("crash::step(\""), named("crash::point(\"")].concat();
        let unique: BTreeSet<&str> = used.iter().map(String::as_str).collect();
        assert_eq!(unique, POINTS.iter().copied().collect());
    }
}
