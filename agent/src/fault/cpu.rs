//! CPU load in the target's cgroup.
//!
//! The load is a share of the CPUs that the target may use: those its affinity and cpuset leave it, and no more of
//! them than its quota pays for. A load of 0.9 under a quota of 2 CPUs is 1.8 CPUs' worth of burning, whatever the
//! target itself does: it competes with the stressor inside the same quota and the same shares, as it would with a
//! runaway thread of its own.
//!
//! The stressor moves into the v1 hierarchies of `cpu`, `cpuacct` and `cpuset`, or into the one v2 cgroup. Its few
//! megabytes are charged to the target only in v2, where there is no other way.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use squall_proto::v1;

use super::{
    Fault, Planned, Window,
    stressing::{self, Trial, figure},
};
use crate::{
    host::{caps::Capability, cgroup::Hierarchies, proc},
    limits::{Invalid, Limits},
    stress::{Kind, Report, Stressor, Work, end_all},
    target::{Scope, Target},
    time::BootTime,
};

/// Controllers whose cgroups the stressor moves into.
const CONTROLLERS: [&str; 3] = ["cpu", "cpuacct", "cpuset"];
/// How the load is made.
const HOW: &str = "duty cycle";
/// Most threads that may be asked for.
const MOST_WORKERS: u32 = 1024;
/// Share of what was asked that must have been burned for the fault to count as felt.
const FELT: f64 = 0.1;

/// Burns CPU time inside the target's cgroup.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuFault {
    /// 0 to 1, of the CPUs the target may use.
    load: f64,
    /// Threads; none: one for each of those CPUs.
    workers: Option<u32>,
}

/// What [`CpuFault`] must undo: the stressors with this token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    injection: String,
}

/// A running CPU load.
#[derive(Debug)]
pub struct Held {
    stressor: Stressor,
    room: Room,
    until: BootTime,
    /// CPUs' worth of time that is asked for now.
    asked: f64,
    /// What had been used when it was asked for.
    since: Report,
    bit: bool,
}

/// The CPUs that a target may use.
#[derive(Debug, Clone, PartialEq)]
struct Room {
    /// By its affinity and cpuset; empty where unknown.
    cpus: Vec<usize>,
    /// By its quota.
    quota: Option<f64>,
}

impl Room {
    fn of(target: &Target) -> Self {
        let cgroup = target.cgroup.as_ref();
        let of_process = target.process.as_ref().and_then(|process| proc::allowed_cpus(process.pid));
        let cpus = of_process
            .or_else(|| cgroup?.cpuset())
            .or_else(|| proc::allowed_cpus(std::process::id() as i32))
            .unwrap_or_default();
        Self { cpus, quota: cgroup.and_then(crate::target::Cgroup::cpu_quota) }
    }

    /// CPUs' worth of time.
    fn size(&self) -> f64 {
        let cpus = self.cpus.len().max(1) as f64;
        self.quota.map_or(cpus, |quota| quota.min(cpus))
    }
}

impl CpuFault {
    fn usage(&self, room: &Room) -> f64 {
        self.load * room.size()
    }

    fn workers(&self, room: &Room) -> usize {
        self.workers.map_or_else(|| room.size().ceil() as usize, |workers| workers as usize)
    }

    fn work(&self, room: &Room) -> Work {
        Work::Cpu { usage: self.usage(room), workers: self.workers(room), cpus: room.cpus.clone() }
    }

    /// What the workers can burn: a thread is on one CPU at a time.
    fn asked(&self, room: &Room) -> f64 {
        self.usage(room).min(self.workers(room) as f64)
    }
}

impl Fault for CpuFault {
    const KIND: &'static str = "cpu";
    const NEEDS: &'static [Capability] = &[Capability::SysPtrace];
    type Undo = Undo;
    type Held = Held;
    type Proto = v1::CpuFault;

    fn parse(proto: v1::CpuFault) -> Result<Self, Invalid> {
        // Not a number is neither.
        if !(proto.load > 0.0 && proto.load <= 1.0) {
            let fix = "give the share of the target's CPUs to burn, for example 0.9 for 90 %";
            return Err(Invalid::new("cpu.load", proto.load, "not above 0 and at most 1", fix));
        }
        if proto.workers > MOST_WORKERS {
            let fix = format!("give at most {MOST_WORKERS}, or 0 for one on each CPU");
            return Err(Invalid::new("cpu.workers", proto.workers, "too many threads", fix));
        }
        Ok(Self { load: proto.load, workers: (proto.workers > 0).then_some(proto.workers) })
    }

    fn scope(&self) -> Scope {
        Scope::Cgroup
    }

    fn check(&self, _: &Target, _: &Limits) -> Result<(), Invalid> {
        // Bounded by what the target may use anyway.
        Ok(())
    }

    fn summary(&self) -> String {
        let percent = self.load * 100.0;
        let workers = self.workers.map(|n| format!(" on {n} threads")).unwrap_or_default();
        format!("burn {percent}% of the CPUs it may use{workers}")
    }

    async fn plan(&self, target: &Target) -> Result<Planned<Undo>> {
        let hierarchies = Hierarchies::read()?;
        let room = Room::of(target);
        let places = stressing::places(target, &CONTROLLERS)?;
        let mut warnings = Vec::new();
        if target.cgroup.as_ref().is_none_or(|cgroup| hierarchies.is_root(cgroup, "cpu")) {
            warnings.push(format!(
                "{target} is in no CPU cgroup of its own: the load is that of one more process on the node, and every \
                 process here feels it"
            ));
        }
        if self.asked(&room) < self.usage(&room) {
            let (usage, workers) = (self.usage(&room), self.workers(&room));
            warnings
                .push(format!("{usage:.2} CPUs are asked for, but {workers} threads burn at most {workers}"));
        }
        let injection = stressing::token()?;
        let place = stressing::place_in_words(&places);
        let changes = vec![format!(
            "starts a stressor that burns {:.2} of {:.2} CPUs {place}; undone by ending it",
            self.asked(&room),
            room.size()
        )];
        let mechanism = stressing::mechanism(target, "cpu", HOW);
        Ok(Planned { undo: Undo { injection }, changes, warnings, mechanism, seed: 0 })
    }

    async fn inject(&self, target: &Target, undo: &Undo, window: Window) -> Result<Held> {
        let room = Room::of(target);
        stressing::wait_until(window.not_before).await;
        let (places, work) = (stressing::places(target, &CONTROLLERS)?, self.work(&room));
        let mut stressor = Stressor::start(Kind::Cpu, &undo.injection, &places, work, window.until).await?;
        let since = stressor.report().await?;
        let asked = self.asked(&room);
        Ok(Held { stressor, room, until: window.until, asked, since, bit: false })
    }

    async fn update(&self, held: &mut Held) -> Result<()> {
        held.stressor.work(self.work(&held.room), held.until).await?;
        held.since = held.stressor.report().await?;
        held.asked = self.asked(&held.room);
        Ok(())
    }

    async fn extend(held: &mut Held, until: BootTime) -> Result<()> {
        held.until = until;
        held.stressor.until(until).await
    }

    async fn effect(held: &mut Held) -> Result<v1::Effect> {
        let report = held.stressor.report().await?;
        let (used, usage) = usage_since(&report, &held.since);
        held.bit |= used > 0.01 && usage >= FELT * held.asked;
        let figures = vec![
            figure("cpu_usage", usage, "cpus"),
            figure("cpu_asked", held.asked, "cpus"),
            figure("cpu_used", report.cpu_ns as f64 / 1e9, "seconds"),
            figure("stressor_killed", f64::from(u8::from(held.stressor.was_killed())), "count"),
        ];
        Ok(v1::Effect { bit: held.bit, figures, ..v1::Effect::default() })
    }

    fn ended(held: &mut Held) -> Option<&'static str> {
        held.stressor.ended()
    }

    async fn revert(undo: &Undo) -> Result<()> {
        end_all(&undo.injection).await
    }

    async fn describe() -> v1::FaultSupport {
        let work = Work::Cpu { usage: 0.0, workers: 1, cpus: Vec::new() };
        let trial = Trial {
            fault: Self::KIND,
            kind: Kind::Cpu,
            controllers: &CONTROLLERS,
            how: HOW,
            features: &["load"],
            work,
        };
        stressing::describe(trial).await
    }
}

/// CPU seconds used since an earlier report, and how many CPUs' worth that is.
fn usage_since(now: &Report, since: &Report) -> (f64, f64) {
    let used = now.cpu_ns.saturating_sub(since.cpu_ns) as f64;
    let elapsed = now.elapsed_ns.saturating_sub(since.elapsed_ns) as f64;
    (used / 1e9, if elapsed > 0.0 { used / elapsed } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn fault(load: f64, workers: u32) -> Result<CpuFault, Invalid> {
        CpuFault::parse(v1::CpuFault { load, workers })
    }

    #[rstest]
    #[case(0.0, 0, "cpu.load")]
    #[case(1.01, 0, "cpu.load")]
    #[case(-0.5, 0, "cpu.load")]
    #[case(f64::NAN, 0, "cpu.load")]
    #[case(0.5, 1025, "cpu.workers")]
    fn nonsense_is_refused_by_field(#[case] load: f64, #[case] workers: u32, #[case] field: &str) {
        assert_eq!(fault(load, workers).expect_err("nonsense").field, field);
    }

    #[rstest]
    #[case(4, None, 3.6, 4)]
    #[case(4, Some(2.0), 1.8, 2)]
    #[case(4, Some(0.5), 0.45, 1)]
    #[case(1, Some(2.0), 0.9, 1)]
    fn load_is_of_the_cpus_that_quota_and_cpuset_leave(
        #[case] cpus: usize,
        #[case] quota: Option<f64>,
        #[case] usage: f64,
        #[case] workers: usize,
    ) {
        let room = Room { cpus: (0..cpus).collect(), quota };
        let fault = fault(0.9, 0).expect("fine");
        assert!((fault.usage(&room) - usage).abs() < 1e-9);
        assert_eq!(fault.workers(&room), workers);
        assert!((fault.asked(&room) - usage).abs() < 1e-9);
    }

    #[test]
    fn few_threads_burn_less_than_asked() {
        let room = Room { cpus: (0..4).collect(), quota: None };
        let fault = fault(0.9, 2).expect("fine");
        assert!((fault.asked(&room) - 2.0).abs() < 1e-9);
        assert_eq!(fault.summary(), "burn 90% of the CPUs it may use on 2 threads");
    }
}
