//! A real `squall` beside a shop, with an agent of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use squall_lab::{Running, Shop, bin_dir};

/// How the plans in tests/e2e name the recommender; replaced by the name of the shop.
const NAME_IN_PLAN: &str = "squall-demo";

/// Runs `squall` in the client's namespace of a shop.
#[derive(Debug)]
pub struct Controller<'a> {
    shop: &'a Shop,
}

impl<'a> Controller<'a> {
    /// A controller for this shop.
    #[must_use]
    pub fn of(shop: &'a Shop) -> Self {
        Self { shop }
    }

    /// Writes a plan into the shop's directory, with the name of its recommender put in. Returns its path.
    pub fn plan(&self, text: &str) -> Result<PathBuf> {
        ensure!(text.contains(NAME_IN_PLAN), "the plan does not name {NAME_IN_PLAN}");
        let path = self.shop.dir().join("plan.yaml");
        fs::write(&path, text.replace(NAME_IN_PLAN, self.shop.name()))?;
        Ok(path)
    }

    /// `squall <args>`, ready to run.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.shop.client().command(bin_dir().join("squall"));
        command.args(args).arg("--runs").arg(self.runs());
        command.env("SQUALL_SOCKET", self.shop.dir().join("agent.sock"));
        command.env("SQUALL_STATE_DIR", self.shop.dir().join("state"));
        command.env("SQUALL_AGENT", bin_dir().join("squall-agent"));
        command
    }

    /// Runs `squall <args>` to its end, whatever its exit code.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        self.command(args).stdin(Stdio::null()).output().context("cannot start squall")
    }

    /// Starts `squall <args>`. What it says goes to a file in the shop's directory: see [`Self::said`].
    pub fn start(&self, args: &[&str]) -> Result<Running> {
        let log = fs::File::create(self.log())?;
        let command = self.command(args);
        Running::start_with(
            "squall",
            &command,
            Stdio::null(),
            Stdio::from(log.try_clone()?),
            Stdio::from(log),
        )
    }

    /// What the last one started has said so far.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// Waits until an event of this kind is in the one run there is.
    pub fn wait_for_event(&self, kind: &str) -> Result<()> {
        let marker = format!("\"event\":\"{kind}\"");
        squall_lab::wait_for(&format!("the event {kind}"), Duration::from_secs(60), || {
            let events = self.run_dir().and_then(|run| Ok(fs::read_to_string(run.join("events.jsonl"))?));
            Ok(events.is_ok_and(|events| events.contains(&marker)).then_some(()))
        })
    }

    /// The directory of the one run there is.
    pub fn run_dir(&self) -> Result<PathBuf> {
        let runs = fs::read_dir(self.runs())?.collect::<Result<Vec<_>, _>>()?;
        let runs: Vec<PathBuf> = runs.into_iter().map(|run| run.path()).filter(|run| run.is_dir()).collect();
        ensure!(runs.len() == 1, "not one run: {runs:?}");
        Ok(runs[0].clone())
    }

    /// Its report.json.
    pub fn report(&self) -> Result<Value> {
        let path = self.run_dir()?.join("report.json");
        let text = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
        Ok(serde_json::from_str(&text)?)
    }

    fn runs(&self) -> PathBuf {
        self.shop.dir().join("runs")
    }

    fn log(&self) -> PathBuf {
        Path::new(self.shop.dir()).join("squall.log")
    }
}
