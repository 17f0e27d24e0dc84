//! What the faults that start a stressor share.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use squall_proto::v1;

use crate::{
    host::{
        cgroup::{Hierarchies, takes_processes},
        proc,
    },
    stress::{Kind, Stressor, Work, end_all},
    target::Target,
    time::{BootTime, sleep_until},
};

/// A trial that its agent did not end ends by itself.
const LONGEST_TRIAL: Duration = Duration::from_secs(10);

/// A new token, chosen when the undo is planned: whoever carries it on its command line works for that injection.
pub(super) fn token() -> Result<String> {
    procfs::sys::kernel::random::uuid().context("draw a token for the stressor")
}

/// Waits for the start of a window. At once where it is past.
pub(super) async fn wait_until(time: BootTime) {
    if !time.remaining().is_zero() {
        sleep_until(time).await;
    }
}

/// One measure.
pub(super) fn figure(name: &str, value: f64, unit: &str) -> v1::Figure {
    v1::Figure { name: name.to_owned(), value, unit: unit.to_owned() }
}

/// The cgroups that a stressor moves into.
pub(super) fn places(target: &Target, controllers: &[&str]) -> Result<Vec<PathBuf>> {
    let places = target.cgroup.as_ref().map(|cgroup| cgroup.places(controllers)).unwrap_or_default();
    if let Some(inner) = places.iter().find(|dir| !takes_processes(dir)) {
        bail!("cgroup {} holds cgroups, not processes; select one of those below it", inner.display());
    }
    Ok(places)
}

/// `in cgroup /a, /b`, or `on the node`.
pub(super) fn place_in_words(places: &[PathBuf]) -> String {
    if places.is_empty() {
        return "on the node".to_owned();
    }
    let places: Vec<_> = places.iter().map(|dir| dir.display().to_string()).collect();
    format!("in cgroup {}", places.join(", "))
}

/// `v1 cgroup + duty cycle`.
pub(super) fn mechanism(target: &Target, controller: &str, how: &str) -> String {
    match target.cgroup.as_ref().and_then(|cgroup| cgroup.controller(controller)) {
        Some((version, _)) => format!("{version} cgroup + {how}"),
        None => format!("process + {how}"),
    }
}

/// A kind of stressor, for [`describe`].
pub(super) struct Trial {
    /// [`super::Fault::KIND`].
    pub(super) fault: &'static str,
    pub(super) kind: Kind,
    /// The controllers whose cgroups it moves into, the most telling one first.
    pub(super) controllers: &'static [&'static str],
    /// How it does its work.
    pub(super) how: &'static str,
    /// What the fault can do.
    pub(super) features: &'static [&'static str],
    /// Work that does nothing.
    pub(super) work: Work,
}

/// Says whether and how a stressor works here, by starting one that does nothing. It moves itself into the cgroup of
/// the agent, which it is in already: what that needs is needed for any cgroup.
pub(super) async fn describe(trial: Trial) -> v1::FaultSupport {
    let Trial { fault, how, features, .. } = trial;
    let (mechanism, reason) = match trial.run().await {
        Ok(place) => (format!("{place} + {how}"), String::new()),
        Err(error) => (String::new(), format!("{error:#}")),
    };
    let available = reason.is_empty();
    let feature = |name: &&str| v1::Feature {
        name: (*name).to_owned(),
        available,
        mechanism: mechanism.clone(),
        reason: reason.clone(),
    };
    let features = features.iter().map(feature).collect();
    v1::FaultSupport { kind: fault.to_owned(), available, features, reason }
}

impl Trial {
    async fn run(self) -> Result<String> {
        let token = token()?;
        let hierarchies = Hierarchies::read().context("read the cgroup mounts")?;
        let own = proc::cgroups(std::process::id() as i32);
        let cgroup = own.and_then(|cgroups| hierarchies.of_process(&cgroups));
        let places = cgroup.as_ref().map(|cgroup| cgroup.places(self.controllers)).unwrap_or_default();
        let until = BootTime::now() + LONGEST_TRIAL;
        let started = Stressor::start(self.kind, &token, &places, self.work, until).await.map(drop);
        end_all(&token).await?;
        started?;
        let version = cgroup.as_ref().and_then(|cgroup| cgroup.controller(self.controllers.first()?));
        Ok(version.map_or_else(|| "process".to_owned(), |(version, _)| format!("{version} cgroup")))
    }
}
