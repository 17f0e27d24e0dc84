//! Memory pressure in the target's cgroup.
//!
//! `bytes` are held by the stressor, whatever others use. A `share` is what people mean by "memory at 90 %": the
//! stressor brings the cgroup's *usage* up to that share of its limit, whoever uses it, and then holds what that took.
//! It neither gives back when the service grows nor takes more when the service shrinks: a service that stays within
//! its usual breath is never pushed into an OOM kill, and one that balloons is not spared it.
//!
//! Usage is the working set, that is without page cache that reclaim can drop at once, as the kubelet and Docker
//! count; otherwise a cgroup that reads files would be "full" without any pressure. The limit is the smallest on the
//! way from the cgroup to the root, and the usage is read where that limit is. Without any it is the node's memory.
//!
//! Of the node's memory a fiftieth is never taken, and the stressor is the kernel's first choice when memory runs out
//! (see [`crate::stress`]).

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use squall_proto::v1;

use super::{
    Fault, Planned, Window,
    stressing::{self, Trial, figure},
};
use crate::{
    host::{
        caps::Capability,
        cgroup::{Hierarchies, Memory, node_memory},
        proc,
    },
    limits::{Invalid, Limits},
    stress::{Gauge, Kind, Size, Stressor, Work, end_all},
    target::{Scope, Target},
    time::BootTime,
};

/// Controllers whose cgroups the stressor moves into.
const CONTROLLERS: [&str; 1] = ["memory"];
/// How memory is held.
const HOW: &str = "resident mapping";
/// This part of the node's memory is never taken.
const SPARE: u64 = 50;
/// Part of what was asked for that must be held for the fault to count as felt.
const FELT: f64 = 0.5;

/// Holds memory inside the target's cgroup.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryFault {
    amount: Amount,
    ramp: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Amount {
    Bytes(u64),
    /// 0 to 1, of the limit.
    Share(f64),
}

/// What [`MemoryFault`] must undo: the stressors with this token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    injection: String,
}

/// Memory that is held.
#[derive(Debug)]
pub struct Held {
    stressor: Stressor,
    room: Room,
    until: BootTime,
    /// Bytes that the stressor was asked to hold, or to bring the usage to.
    asked: u64,
    /// Of these the stressor itself had to add so many when it was asked.
    to_add: u64,
    bit: bool,
}

/// The memory that a target may use.
#[derive(Debug, Clone, PartialEq)]
struct Room {
    limit: u64,
    gauge: Gauge,
    /// Memory of the node: all, and available.
    node: (u64, u64),
    /// What the cgroup itself uses, for people.
    cgroup: Option<Memory>,
}

impl Room {
    fn of(target: &Target) -> Result<Self> {
        let node = node_memory().context("read the node's memory")?;
        let cgroup = target.cgroup.as_ref().and_then(crate::target::Cgroup::memory);
        let limit = cgroup.as_ref().and_then(|memory| memory.limit(node.0));
        let (limit, gauge) =
            limit.map_or((node.0, Gauge::Node), |(limit, limited)| (limit, Gauge::Cgroup(limited)));
        Ok(Self { limit, gauge, node, cgroup })
    }

    fn usage(&self) -> u64 {
        self.gauge.read().unwrap_or(0)
    }

    fn spare(&self) -> u64 {
        self.node.0 / SPARE
    }
}

impl MemoryFault {
    /// Bytes to hold, or to bring the usage to.
    fn asked(&self, room: &Room) -> u64 {
        match self.amount {
            Amount::Bytes(bytes) => bytes,
            Amount::Share(share) => (room.limit as f64 * share) as u64,
        }
    }

    /// Bytes that have to be added to what is used now.
    fn to_add(&self, room: &Room) -> u64 {
        match self.amount {
            Amount::Bytes(bytes) => bytes,
            Amount::Share(_) => self.asked(room).saturating_sub(room.usage()),
        }
    }

    fn work(&self, room: &Room) -> Work {
        let size = match self.amount {
            Amount::Bytes(bytes) => Size::Held(bytes),
            Amount::Share(_) => Size::Usage(room.gauge.clone(), self.asked(room)),
        };
        Work::Memory { size, ramp_ns: self.ramp.as_nanos() as u64, spare: room.spare() }
    }

    fn warnings(&self, target: &Target, room: &Room) -> Vec<String> {
        let mut warnings = Vec::new();
        let (usage, limit) = (room.usage(), room.limit);
        match &room.gauge {
            Gauge::Node => warnings.push(format!(
                "{target} has no memory limit: this takes the node's memory, and everything here feels it"
            )),
            Gauge::Cgroup(limited) => {
                if usage.saturating_add(self.to_add(room)) > limit {
                    warnings.push(format!(
                        "{} in use and {} more are above the limit of {}: an OOM kill is certain",
                        size(usage),
                        size(self.to_add(room)),
                        size(limit)
                    ));
                }
                if limited.kills_group() {
                    warnings.push(format!(
                        "memory.oom.group is set in {}: an OOM kill ends everything in it",
                        limited.dir().display()
                    ));
                }
                if own_limits().is_some_and(|own| own == limited.dir()) {
                    warnings.push(format!(
                        "the agent is under the same limit, {}: an OOM kill may take it",
                        limited.dir().display()
                    ));
                }
            }
        }
        if self.to_add(room) == 0 {
            warnings.push(format!(
                "{} are in use already, more than is asked for: nothing will be held",
                size(usage)
            ));
        }
        warnings
    }
}

/// The cgroup whose limit binds the agent itself.
fn own_limits() -> Option<std::path::PathBuf> {
    let cgroups = proc::cgroups(std::process::id() as i32)?;
    let memory = Hierarchies::read().ok()?.of_process(&cgroups)?.memory()?;
    let (_, limited) = memory.limit(node_memory().ok()?.0)?;
    Some(limited.dir().to_owned())
}

impl Fault for MemoryFault {
    const KIND: &'static str = "memory";
    const NEEDS: &'static [Capability] = &[Capability::SysPtrace, Capability::IpcLock];
    type Undo = Undo;
    type Held = Held;
    type Proto = v1::MemoryFault;

    fn parse(proto: v1::MemoryFault) -> Result<Self, Invalid> {
        use v1::memory_fault::Size;
        let amount = match proto.size {
            Some(Size::Bytes(bytes)) if bytes > 0 => Amount::Bytes(bytes),
            Some(Size::Share(share)) if share > 0.0 && share <= 1.0 => Amount::Share(share),
            Some(Size::Bytes(bytes)) => {
                return Err(Invalid::new("memory.bytes", bytes, "holds nothing", "give the bytes to hold"));
            }
            Some(Size::Share(share)) => {
                let fix = "give the share of the limit that is to be in use, for example 0.9 for 90 %";
                return Err(Invalid::new("memory.share", share, "not above 0 and at most 1", fix));
            }
            None => {
                return Err(Invalid::new("memory.size", "", "no amount is given", "give bytes or a share"));
            }
        };
        Ok(Self { amount, ramp: Duration::from_nanos(proto.ramp_ns) })
    }

    fn scope(&self) -> Scope {
        Scope::Cgroup
    }

    fn check(&self, _: &Target, limits: &Limits) -> Result<(), Invalid> {
        match self.amount {
            Amount::Share(share) if share > limits.most_memory => {
                let fix = format!("ask for at most {}", limits.most_memory);
                Err(Invalid::new("memory.share", share, "more than this agent allows", fix))
            }
            // Bytes are measured against the node when the fault is planned.
            Amount::Share(_) | Amount::Bytes(_) => Ok(()),
        }
    }

    fn summary(&self) -> String {
        let amount = match self.amount {
            Amount::Bytes(bytes) => format!("hold {}", size(bytes)),
            Amount::Share(share) => format!("bring memory use to {}% of the limit", share * 100.0),
        };
        let ramp = if self.ramp.is_zero() { String::new() } else { format!(" over {:?}", self.ramp) };
        format!("{amount}{ramp}")
    }

    async fn plan(&self, target: &Target) -> Result<Planned<Undo>> {
        let room = Room::of(target)?;
        let places = stressing::places(target, &CONTROLLERS)?;
        let to_add = self.to_add(&room);
        let (total, available) = room.node;
        if to_add.saturating_add(room.spare()) > available {
            bail!(
                "{} cannot be held: the node has {} of {} available, and {} of them are left to it",
                size(to_add),
                size(available),
                size(total),
                size(room.spare())
            );
        }
        let injection = stressing::token()?;
        let place = stressing::place_in_words(&places);
        let what = match self.amount {
            Amount::Bytes(bytes) => format!("holds {}", size(bytes)),
            Amount::Share(_) => format!(
                "brings the usage from {} to {} of {}",
                size(room.usage()),
                size(self.asked(&room)),
                size(room.limit)
            ),
        };
        let changes = vec![format!("starts a stressor that {what} {place}; undone by ending it")];
        let mechanism = stressing::mechanism(target, "memory", HOW);
        let warnings = self.warnings(target, &room);
        Ok(Planned { undo: Undo { injection }, changes, warnings, mechanism, seed: 0 })
    }

    async fn inject(&self, target: &Target, undo: &Undo, window: Window) -> Result<Held> {
        stressing::wait_until(window.not_before).await;
        let room = Room::of(target)?;
        let places = stressing::places(target, &CONTROLLERS)?;
        let (asked, to_add, work) = (self.asked(&room), self.to_add(&room), self.work(&room));
        let stressor = Stressor::start(Kind::Memory, &undo.injection, &places, work, window.until).await?;
        Ok(Held { stressor, room, until: window.until, asked, to_add, bit: false })
    }

    async fn update(&self, held: &mut Held) -> Result<()> {
        held.stressor.work(self.work(&held.room), held.until).await?;
        held.asked = self.asked(&held.room);
        // What it holds already is part of the usage.
        held.to_add = match self.amount {
            Amount::Bytes(bytes) => bytes,
            Amount::Share(_) => self.to_add(&held.room).saturating_add(held.stressor.report().await?.held),
        };
        Ok(())
    }

    async fn extend(held: &mut Held, until: BootTime) -> Result<()> {
        held.until = until;
        held.stressor.until(until).await
    }

    async fn effect(held: &mut Held) -> Result<v1::Effect> {
        let report = held.stressor.report().await?;
        if let Some(error) = &report.error {
            tracing::warn!(error, held = report.held, "the stressor cannot hold more memory");
        }
        held.bit |= report.held > 0 && report.held as f64 >= FELT * held.to_add as f64;
        let killed = held.stressor.was_killed();
        let holds = if killed { 0 } else { report.held };
        let mut figures = vec![
            figure("memory_held", holds as f64, "bytes"),
            figure("memory_asked", held.asked as f64, "bytes"),
            figure("memory_usage", held.room.usage() as f64, "bytes"),
            figure("memory_limit", held.room.limit as f64, "bytes"),
            figure("stressor_killed", f64::from(u8::from(killed)), "count"),
        ];
        if let Some(kills) = held.room.cgroup.as_ref().and_then(Memory::oom_kills) {
            figures.push(figure("oom_kills", kills as f64, "count"));
        }
        Ok(v1::Effect { bit: held.bit, figures, ..v1::Effect::default() })
    }

    fn ended(held: &mut Held) -> Option<&'static str> {
        held.stressor.ended()
    }

    async fn revert(undo: &Undo) -> Result<()> {
        end_all(&undo.injection).await
    }

    async fn describe() -> v1::FaultSupport {
        let work = Work::Memory { size: Size::Held(0), ramp_ns: 0, spare: u64::MAX };
        let trial = Trial {
            fault: Self::KIND,
            kind: Kind::Memory,
            controllers: &CONTROLLERS,
            how: HOW,
            features: &["bytes", "share"],
            work,
        };
        stressing::describe(trial).await
    }
}

/// For people: `256 MiB`.
fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    for (unit, factor) in UNITS {
        if bytes >= factor {
            let value = format!("{:.1}", bytes as f64 / factor as f64);
            return format!("{} {unit}", value.trim_end_matches(".0"));
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use v1::memory_fault::Size as Wire;

    use super::*;

    fn fault(size: Wire, ramp: Duration) -> Result<MemoryFault, Invalid> {
        MemoryFault::parse(v1::MemoryFault { size: Some(size), ramp_ns: ramp.as_nanos() as u64 })
    }

    fn nobody() -> Target {
        Target { name: "nobody".into(), process: None, cgroup: None, netns: None, interface: None }
    }

    #[rstest]
    #[case(Some(Wire::Bytes(0)), "memory.bytes")]
    #[case(Some(Wire::Share(0.0)), "memory.share")]
    #[case(Some(Wire::Share(1.5)), "memory.share")]
    #[case(Some(Wire::Share(f64::NAN)), "memory.share")]
    #[case(None, "memory.size")]
    fn nonsense_is_refused_by_field(#[case] size: Option<Wire>, #[case] field: &str) {
        let refused = MemoryFault::parse(v1::MemoryFault { size, ramp_ns: 0 });
        assert_eq!(refused.expect_err("nonsense").field, field);
    }

    #[test]
    fn share_above_the_limits_is_refused() {
        let limits = Limits { most_memory: 0.9, ..Limits::default() };
        let check =
            |share| fault(Wire::Share(share), Duration::ZERO).expect("fine").check(&nobody(), &limits);
        assert_eq!(check(0.9), Ok(()));
        assert_eq!(check(0.91).expect_err("too much").field, "memory.share");
    }

    #[test]
    fn share_counts_what_others_use_and_bytes_do_not() {
        let (total, available) = node_memory().expect("the node's memory");
        let room = Room { limit: total, gauge: Gauge::Node, node: (total, available), cgroup: None };
        let share = fault(Wire::Share(0.9), Duration::ZERO).expect("fine");
        assert_eq!(share.asked(&room), (total as f64 * 0.9) as u64);
        assert!(share.to_add(&room) < share.asked(&room));
        let bytes = fault(Wire::Bytes(77), Duration::ZERO).expect("fine");
        assert_eq!((bytes.asked(&room), bytes.to_add(&room)), (77, 77));
    }

    #[tokio::test]
    async fn more_than_the_node_has_is_refused_before_anything_happens() {
        let (total, _) = node_memory().expect("the node's memory");
        let fault = fault(Wire::Bytes(total), Duration::ZERO).expect("fine");
        let error = fault.plan(&nobody()).await.expect_err("too much").to_string();
        assert!(error.contains("cannot be held: the node has "), "{error}");
    }

    #[test]
    fn summaries_are_for_people() {
        let ramped = fault(Wire::Share(0.9), Duration::from_secs(5)).expect("fine");
        assert_eq!(ramped.summary(), "bring memory use to 90% of the limit over 5s");
        assert_eq!(fault(Wire::Bytes(256 << 20), Duration::ZERO).expect("fine").summary(), "hold 256 MiB");
        assert_eq!(size(1536), "1.5 KiB");
    }
}
