//! The order of things, with a fault that only writes down what is asked of it.

use std::{
    path::PathBuf,
    process::{Child, Command as Program},
    sync::LazyLock,
};

use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::{injection::Status, *};
use crate::{
    access::audit::Audit,
    fault::{Fault, Planned, Window},
    journal::Record,
    target::{Process, Scope},
    time::BootTime,
    upgrade::{self, Known, Upgrade},
};

/// How long a plan takes, in which others do what they do.
const PLANNING: Duration = Duration::from_millis(5);

type Log = Arc<Mutex<Vec<String>>>;

/// Worlds by name: an undo record is plain data, so it can only name its world.
static WORLDS: LazyLock<Mutex<BTreeMap<String, World>>> = LazyLock::new(Mutex::default);

#[derive(Clone)]
struct World {
    log: Log,
    journal: PathBuf,
    failing_reverts: Arc<Mutex<u32>>,
    /// When the kernel would end what was injected last.
    until: Arc<Mutex<BootTime>>,
}

#[derive(Clone)]
struct Fake {
    world: String,
    fails: Option<&'static str>,
    level: u32,
    /// 0: drawn, which gives 7.
    seed: u64,
}

impl Fake {
    fn any(self) -> AnyFault {
        let (interface, share) = (self.world.clone(), self.level.into());
        let message = v1::NetworkFault { interface, share, ..v1::NetworkFault::default() };
        AnyFault::of(self, v1::Fault { kind: Some(v1::fault::Kind::Network(message)) })
    }
}

#[derive(Serialize, Deserialize)]
struct Undo(String);

struct Held(String);

impl Drop for Held {
    fn drop(&mut self) {
        note(&self.0, "dropped");
    }
}

fn world(name: &str) -> World {
    WORLDS.lock().unwrap().get(name).unwrap().clone()
}

fn note(name: &str, what: &str) {
    world(name).log.lock().unwrap().push(what.to_owned());
}

impl Fault for Fake {
    const KIND: &'static str = "fake";
    type Undo = Undo;
    type Held = Held;
    type Proto = v1::Fault;

    /// The world is the name of the interface, the level the share.
    fn parse(proto: v1::Fault) -> Result<Self, Invalid> {
        match proto.kind {
            Some(v1::fault::Kind::Network(v1::NetworkFault { interface, share, .. })) => {
                Ok(Self { world: interface, fails: None, level: share as u32, seed: 0 })
            }
            _ => Err(Invalid::new("fake", "", "has no message", "give one")),
        }
    }

    fn scope(&self) -> Scope {
        Scope::Process
    }

    fn check(&self, _: &Target, _: &Limits) -> Result<(), Invalid> {
        if self.level > 100 {
            return Err(Invalid::new("fake.level", self.level, "too much", "at most 100"));
        }
        Ok(())
    }

    fn summary(&self) -> String {
        format!("level {}", self.level)
    }

    fn draw_from(&mut self, seed: u64) {
        self.seed = seed;
    }

    async fn plan(&self, _: &Target) -> Result<Planned<Undo>> {
        if self.level == 9 {
            note(&self.world, "plan b");
        }
        sleep(PLANNING).await;
        let undo = Undo(self.world.clone());
        let seed = if self.seed == 0 { 7 } else { self.seed };
        Ok(Planned { undo, changes: vec![], warnings: vec![], mechanism: "fake".into(), seed })
    }

    async fn inject(&self, _: &Target, undo: &Undo, window: Window) -> Result<Held> {
        *world(&undo.0).until.lock().unwrap() = window.until;
        let records = std::fs::read_dir(world(&undo.0).journal).unwrap().count();
        note(&undo.0, &format!("inject with {records} records"));
        match self.fails {
            Some("panic") => panic!("asked to"),
            Some(why) => anyhow::bail!(why),
            None => Ok(Held(undo.0.clone())),
        }
    }

    async fn update(&self, held: &mut Held) -> Result<()> {
        note(&held.0, &format!("update {}", self.level));
        Ok(())
    }

    async fn extend(held: &mut Held, _: BootTime) -> Result<()> {
        note(&held.0, "extend");
        Ok(())
    }

    async fn effect(_: &mut Held) -> Result<v1::Effect> {
        Ok(v1::Effect { bit: true, ..v1::Effect::default() })
    }

    async fn revert(undo: &Undo) -> Result<()> {
        note(&undo.0, "revert");
        let world = world(&undo.0);
        let mut failing = world.failing_reverts.lock().unwrap();
        if *failing > 0 {
            *failing -= 1;
            anyhow::bail!("not yet");
        }
        Ok(())
    }

    async fn describe() -> v1::FaultSupport {
        v1::FaultSupport::default()
    }
}

struct Bench {
    name: String,
    dir: tempfile::TempDir,
    engine: Engine,
    victim: Child,
}

impl Bench {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let world = World {
            log: Log::default(),
            journal: dir.path().join("journal"),
            failing_reverts: Arc::default(),
            until: Arc::new(Mutex::new(BootTime(0))),
        };
        WORLDS.lock().unwrap().insert(name.to_owned(), world);
        let engine =
            Engine::new(Journal::open(dir.path()).unwrap(), Limits::default(), Stop::new(dir.path()))
                .unwrap();
        let victim = Program::new("sleep").arg("60").spawn().unwrap();
        Self { name: name.to_owned(), dir, engine, victim }
    }

    fn target(&self) -> Target {
        let pid = self.victim.id() as i32;
        let start_time = procfs::process::Process::new(pid).unwrap().stat().unwrap().starttime;
        Target {
            name: "sleep".into(),
            process: Some(Process { pid, start_time }),
            cgroup: None,
            netns: None,
            interface: None,
        }
    }

    fn fake(&self) -> Fake {
        Fake { world: self.name.clone(), fails: None, level: 1, seed: 0 }
    }

    fn order(&self, id: &str, fake: Fake) -> Order {
        Order {
            id: id.into(),
            owner: "uid:7".into(),
            targets: vec![self.target()],
            faults: vec![fake.any()],
            duration: Duration::from_secs(60),
            lease: Duration::from_secs(60),
            dry_run: false,
        }
    }

    async fn inject(&self, order: Order) -> v1::Injection {
        let id = order.id.clone();
        self.engine.arm(order).await.unwrap();
        self.engine.fire(&[id]).await.unwrap().remove(0)
    }

    fn log(&self) -> Vec<String> {
        world(&self.name).log.lock().unwrap().clone()
    }

    fn records(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("journal")).unwrap().count()
    }

    fn left(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("resume")).unwrap().count()
    }

    /// The next agent, in a state directory of its own (this process still holds the other one), with what was left.
    fn next(&self) -> Self {
        let next = Self::new(&self.name);
        for file in std::fs::read_dir(self.dir.path().join("resume")).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), next.dir.path().join("resume").join(file.file_name())).unwrap();
        }
        next
    }

    /// What it makes of what was left; and that it is on disk no more.
    async fn resume(&self, upgrade: Upgrade) -> v1::Injection {
        const KINDS: &[Kind] = &[Kind::of::<Fake>()];
        let audit = Audit::start(self.dir.path()).unwrap();
        let known = Known { kinds: KINDS, parse: |proto| Fake::parse(proto).map(Fake::any) };
        upgrade::resume(&self.engine, &audit, upgrade, &known).await;
        assert_eq!(self.left(), 0);
        self.engine.list().remove(0)
    }

    async fn ended(&self, id: &str) -> v1::Injection {
        let (core, _) = self.engine.entries(&[id.to_owned()]).unwrap().remove(0);
        core.wait(Status::ended).await
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.victim.kill().unwrap();
        self.victim.wait().unwrap();
    }
}

#[tokio::test]
async fn the_record_is_on_disk_before_inject_and_gone_after_revert() {
    let bench = Bench::new("order");
    let injection = bench.inject(bench.order("a", bench.fake())).await;
    assert_eq!(injection.state(), State::Active);
    assert!(injection.ends_boot_ns > injection.fired_boot_ns);
    let reverted = bench.engine.revert(&["a".into()], "asked").await.unwrap().remove(0);
    assert_eq!((reverted.state(), reverted.reason.as_str()), (State::Reverted, "asked"));
    assert!(reverted.effect.unwrap().bit, "the effect is measured once more before the end");
    assert_eq!(bench.log(), ["inject with 1 records", "dropped", "revert"]);
    assert_eq!(bench.records(), 0);
    bench.engine.revert(&["a".into()], "again").await.unwrap();
    assert_eq!(bench.log().len(), 3, "reverting twice does nothing more");
}

#[tokio::test]
async fn a_stop_ends_everything_and_refuses_until_it_is_released() {
    let bench = Bench::new("stop");
    bench.inject(bench.order("a", bench.fake())).await;
    bench.engine.arm(bench.order("b", bench.fake())).await.unwrap();
    let stopped = bench.engine.stop().await.unwrap();
    assert_eq!(stopped.len(), 2);
    assert!(stopped.iter().all(|i| i.state() == State::Reverted && i.reason == "this node was stopped"));
    let armed = bench.engine.arm(bench.order("c", bench.fake())).await;
    assert!(matches!(armed, Err(EngineError::Stopped)));
    assert!(matches!(bench.engine.fire(&["b".into()]).await, Err(EngineError::Stopped)));
    assert!(bench.engine.revert(&["a".into()], "asked").await.is_ok(), "a revert always works");
    bench.engine.release().unwrap();
    assert_eq!(bench.inject(bench.order("c", bench.fake())).await.state(), State::Active);

    let engine = bench.engine.clone();
    let obeying = tokio::spawn(async move { engine.obey_stop().await });
    std::fs::write(bench.dir.path().join("stopped"), "").unwrap();
    assert_eq!(bench.ended("c").await.reason, "this node was stopped", "a file is enough");
    obeying.abort();
}

#[tokio::test]
async fn arming_changes_nothing_and_expires() {
    let bench = Bench::new("expire");
    let order = Order { lease: Duration::from_millis(50), ..bench.order("a", bench.fake()) };
    bench.engine.arm(order).await.unwrap();
    assert_eq!(bench.records(), 0);
    assert_eq!(bench.ended("a").await.reason, "it was armed, but never fired");
    assert!(bench.log().is_empty());
}

#[tokio::test]
async fn a_dry_run_keeps_nothing() {
    let bench = Bench::new("dry");
    let order = Order { dry_run: true, ..bench.order("a", bench.fake()) };
    assert_eq!(bench.engine.arm(order).await.unwrap().len(), 1);
    assert!(bench.engine.list().is_empty());
}

#[tokio::test]
async fn a_lease_that_is_not_renewed_ends_it_and_one_that_is_does_not() {
    let bench = Bench::new("lease");
    let order = Order { lease: Duration::from_millis(300), ..bench.order("a", bench.fake()) };
    let first = bench.inject(order).await;
    for _ in 0..4 {
        sleep(Duration::from_millis(100)).await;
        assert!(bench.engine.renew(&["a".into()]).await.unwrap().is_empty());
    }
    let renewed = bench.engine.list().remove(0);
    assert!(renewed.lease_ends_boot_ns > first.lease_ends_boot_ns);
    assert_eq!(renewed.state(), State::Active);
    assert_eq!(bench.ended("a").await.reason, "its lease was not renewed");
    assert_eq!(bench.engine.renew(&["a".into(), "none".into()]).await.unwrap(), ["a", "none"]);
    assert_eq!(bench.records(), 0);
}

#[tokio::test]
async fn the_deadline_ends_it_however_often_it_is_renewed() {
    let bench = Bench::new("deadline");
    let order = Order { duration: Duration::from_millis(200), ..bench.order("a", bench.fake()) };
    bench.inject(order).await;
    bench.engine.renew(&["a".into()]).await.unwrap();
    assert_eq!(bench.ended("a").await.reason, "its time was up");
}

#[tokio::test]
async fn a_target_that_dies_ends_it() {
    let mut bench = Bench::new("death");
    bench.inject(bench.order("a", bench.fake())).await;
    bench.victim.kill().unwrap();
    bench.victim.wait().unwrap();
    assert_eq!(bench.ended("a").await.reason, "its target is gone");
    assert_eq!(bench.records(), 0);
}

#[tokio::test]
async fn an_inject_that_fails_or_panics_is_taken_back() {
    let bench = Bench::new("failing");
    let failed = bench.inject(bench.order("a", Fake { fails: Some("no such qdisc"), ..bench.fake() })).await;
    assert!(failed.reason.contains("no such qdisc"), "{}", failed.reason);
    bench.inject(bench.order("b", Fake { fails: Some("panic"), ..bench.fake() })).await;
    bench.ended("b").await;
    let log = ["inject with 1 records", "revert", "inject with 1 records", "revert"];
    assert_eq!(bench.log(), log);
    assert_eq!(bench.records(), 0);
}

#[tokio::test]
async fn a_revert_that_fails_is_kept_retried_and_blocks_its_target() {
    let bench = Bench::new("stuck");
    *world("stuck").failing_reverts.lock().unwrap() = 3;
    bench.inject(bench.order("a", bench.fake())).await;
    let stuck = bench.engine.revert(&["a".into()], "asked").await.unwrap().remove(0);
    assert_eq!(stuck.state(), State::Stuck);
    assert!(stuck.reason.contains("not yet"), "{}", stuck.reason);
    assert_eq!(bench.records(), 1);
    let refused = bench.engine.arm(bench.order("b", bench.fake())).await.unwrap_err();
    assert!(refused.to_string().contains("revert a first"), "{refused}");
    assert_eq!(bench.ended("a").await.state(), State::Reverted);
    assert_eq!(bench.records(), 0);
}

#[tokio::test]
async fn the_next_agent_takes_back_what_a_dead_one_left_newest_first() {
    let bench = Bench::new("replay");
    let journal = &bench.engine.0.journal;
    for (n, boot_id) in [(1, &bench.engine.0.boot_id), (2, &"another boot".to_owned())] {
        let undo = serde_json::to_value(Undo("replay".into())).unwrap();
        let (kind, target, boot_id) = ("fake".to_owned(), bench.target(), boot_id.clone());
        let record = Record { id: format!("old{n}"), kind, target, undo, created: BootTime(n), boot_id };
        journal.undo.write(&record).unwrap();
    }
    bench.engine.replay(&[Kind::of::<Fake>()]).await.unwrap();
    assert_eq!(bench.log(), ["revert"], "only what this boot made");
    assert_eq!(bench.records(), 0);
    assert_eq!(bench.engine.list().remove(0).state(), State::Reverted);
}

#[tokio::test]
async fn the_same_order_twice_is_one_injection_and_another_order_is_refused() {
    let bench = Bench::new("twice");
    bench.inject(bench.order("a", bench.fake())).await;
    let again = bench.inject(bench.order("a", bench.fake())).await;
    assert_eq!(again.state(), State::Active);
    assert_eq!(bench.log(), ["inject with 1 records"]);
    let other = bench.engine.arm(bench.order("a", Fake { level: 2, ..bench.fake() })).await;
    assert!(matches!(other, Err(EngineError::Conflict(_))));
}

#[tokio::test]
async fn an_update_is_in_place_and_checked() {
    let bench = Bench::new("update");
    bench.inject(bench.order("a", bench.fake())).await;
    let stronger = |level| Fake { level, ..bench.fake() }.any();
    let updated = bench.engine.update("a", stronger(7)).await.unwrap();
    assert_eq!((updated.summary.as_str(), updated.state()), ("level 7", State::Active));
    assert!(matches!(bench.engine.update("a", stronger(101)).await, Err(EngineError::Invalid(_))));
    assert_eq!(bench.log(), ["inject with 1 records", "update 7"]);
}

#[tokio::test]
async fn the_next_agent_resumes_what_was_handed_over_and_ends_it_when_it_would_have_ended() {
    let bench = Bench::new("upgrade");
    bench.inject(bench.order("a", bench.fake())).await;
    let stronger = Fake { level: 3, ..bench.fake() }.any();
    let before = bench.engine.update("a", stronger).await.unwrap();
    assert!(bench.engine.hand_over().await.is_empty());
    let handed = bench.engine.list().remove(0);
    assert_eq!((handed.state(), bench.left(), bench.records()), (State::HandedOver, 1, 0));
    assert_eq!(bench.log(), ["inject with 1 records", "update 3", "dropped", "revert"]);
    let refused = bench.engine.renew(&["a".into()]).await;
    assert!(matches!(refused, Err(EngineError::Leaving)), "neither live nor gone: {refused:?}");
    let refused = bench.engine.arm(bench.order("b", bench.fake())).await;
    assert!(matches!(refused, Err(EngineError::Leaving)));

    let next = bench.next();
    let resumed = next.resume(Upgrade::TakeOver).await;
    assert_eq!((resumed.state(), resumed.summary.as_str()), (State::Active, "level 3"), "{resumed:?}");
    let times = |i: &v1::Injection| (i.fired_boot_ns, i.ends_boot_ns, i.lease_ends_boot_ns, i.seed);
    assert_eq!(times(&resumed), times(&before));
    assert_eq!(next.log(), ["inject with 1 records"]);
    let until = *world("upgrade").until.lock().unwrap();
    assert_eq!(until.0, before.lease_ends_boot_ns.min(before.ends_boot_ns), "the kernel ends it then");
    assert!(resumed.warnings[0].contains("resumed by agent"), "{:?}", resumed.warnings);
    assert!(resumed.resumed.is_some_and(|r| r.gap_ns > 0));
    assert_eq!(next.engine.owner("a").as_deref(), Some("uid:7"));
    let again = next.inject(bench.order("a", bench.fake())).await;
    assert_eq!(again.state(), State::Active, "the order that it was");
    assert_eq!(next.log(), ["inject with 1 records"]);
}

#[tokio::test]
async fn what_may_not_be_resumed_is_dropped_and_says_why() {
    let bench = Bench::new("dropped");
    bench.inject(bench.order("a", bench.fake())).await;
    assert!(bench.engine.hand_over().await.is_empty());
    let left = || bench.engine.0.journal.left.look().unwrap().records.remove(0);
    let tampered = |change: fn(&mut Left)| {
        let next = bench.next();
        let mut left = left();
        change(&mut left);
        next.engine.0.journal.left.write(&left).unwrap();
        next
    };
    let cases: [(Bench, Upgrade, &str); 8] = [
        (tampered(|_| {}), Upgrade::End, "--upgrade take-over"),
        (tampered(|left| left.boot_id = "another".into()), Upgrade::TakeOver, "before a reboot"),
        (tampered(|left| left.deadline = BootTime::now()), Upgrade::TakeOver, "its time was up"),
        (tampered(|left| left.lease_ends = BootTime::now()), Upgrade::TakeOver, "not renewed"),
        (
            tampered(|left| left.target.process.as_mut().unwrap().start_time -= 1),
            Upgrade::TakeOver,
            "its target is gone",
        ),
        (
            tampered(|left| left.duration = Duration::from_secs(1_000_000)),
            Upgrade::TakeOver,
            "longer than this agent allows",
        ),
        (
            tampered(|left| {
                let start_time = procfs::process::Process::new(1).unwrap().stat().unwrap().starttime;
                left.target.process = Some(Process { pid: 1, start_time });
            }),
            Upgrade::TakeOver,
            "which is protected",
        ),
        (tampered(|left| left.fault.clear()), Upgrade::TakeOver, "has no message"),
    ];
    for (next, upgrade, why) in cases {
        let dropped = next.resume(upgrade).await;
        assert_eq!(dropped.state(), State::Reverted, "{why}");
        assert!(dropped.reason.contains(why), "{why}: {}", dropped.reason);
        assert!(next.log().is_empty(), "{why}: {:?}", next.log());
    }
    let next = bench.next();
    next.engine.stop().await.unwrap();
    assert!(next.resume(Upgrade::TakeOver).await.reason.contains("stopped"));
    assert!(next.log().is_empty());
}

#[tokio::test]
async fn a_revert_or_a_stop_before_during_or_after_the_hand_over_leaves_nothing_to_resume() {
    for stop in [false, true] {
        for delay in [0, 1, 5, 100] {
            let bench = Bench::new(&format!("race {stop} {delay}"));
            bench.inject(bench.order("a", bench.fake())).await;
            let end = async {
                sleep(Duration::from_millis(delay)).await;
                if stop {
                    bench.engine.stop().await.unwrap();
                } else {
                    bench.engine.revert(&["a".into()], "asked").await.unwrap();
                }
            };
            let ((), left) = tokio::join!(end, bench.engine.hand_over());
            assert!(left.is_empty());
            assert_eq!((bench.left(), bench.records()), (0, 0), "{stop} {delay}");
            assert_eq!(bench.engine.list().remove(0).state(), State::Reverted, "{stop} {delay}");
        }
    }
}

#[tokio::test]
async fn what_cannot_be_left_or_was_only_armed_just_ends() {
    let bench = Bench::new("not left");
    bench.engine.arm(bench.order("armed", bench.fake())).await.unwrap();
    bench.inject(bench.order("a", bench.fake())).await;
    std::fs::remove_dir(bench.dir.path().join("resume")).unwrap();
    assert!(bench.engine.hand_over().await.is_empty());
    assert!(bench.engine.list().iter().all(|i| i.state() == State::Reverted));
    assert_eq!((bench.log().last().unwrap().as_str(), bench.records()), ("revert", 0));
}

#[tokio::test]
async fn what_could_not_be_reverted_at_the_hand_over_is_reverted_first_and_then_resumed() {
    let bench = Bench::new("stuck handing");
    *world("stuck handing").failing_reverts.lock().unwrap() = 1000;
    bench.inject(bench.order("a", bench.fake())).await;
    let stuck = bench.engine.hand_over().await;
    assert_eq!((stuck[0].state(), bench.left(), bench.records()), (State::Stuck, 1, 1));
    let record = bench.engine.0.journal.undo.look().unwrap().records.remove(0);
    let next = bench.next();
    next.engine.0.journal.undo.write(&record).unwrap();
    next.engine.replay(&[Kind::of::<Fake>()]).await.unwrap();
    assert_eq!(next.resume(Upgrade::TakeOver).await.state(), State::Active);
    assert_eq!(next.log(), ["revert", "inject with 1 records"]);
}

#[tokio::test]
async fn limits_and_bad_orders_are_refused() {
    let bench = Bench::new("limits");
    let bad = [
        Order { duration: Duration::ZERO, ..bench.order("a", bench.fake()) },
        Order { duration: Duration::from_secs(1_000_000), ..bench.order("a", bench.fake()) },
        bench.order("../a", bench.fake()),
        bench.order("a", Fake { level: 101, ..bench.fake() }),
    ];
    for order in bad {
        assert!(matches!(bench.engine.arm(order).await, Err(EngineError::Invalid(_))));
    }
    for n in 0..32 {
        bench.engine.arm(bench.order(&format!("n{n}"), bench.fake())).await.unwrap();
    }
    let full = bench.engine.arm(bench.order("more", bench.fake())).await;
    assert!(matches!(full, Err(EngineError::Full(32))));
    bench.engine.revert(&["n7".into()], "asked").await.unwrap();
    bench.engine.arm(bench.order("more", bench.fake())).await.unwrap();
}

#[tokio::test]
async fn what_comes_while_the_agent_ends_is_refused_and_what_was_there_is_reverted() {
    for hand_over in [false, true] {
        let bench = Bench::new(&format!("ending {hand_over}"));
        bench.inject(bench.order("a", bench.fake())).await;
        bench.engine.arm(bench.order("armed", bench.fake())).await.unwrap();
        let end = async {
            // The other one is let in by now, and plans.
            while !bench.log().contains(&"plan b".to_owned()) {
                tokio::task::yield_now().await;
            }
            if hand_over { bench.engine.hand_over().await } else { bench.engine.drain("asked").await }
        };
        let late = bench.engine.arm(bench.order("b", Fake { level: 9, ..bench.fake() }));
        let (late, left) = tokio::join!(late, end);
        assert!(matches!(late, Err(EngineError::Leaving)), "{late:?}");
        assert!(left.is_empty(), "{left:?}");
        for refused in [
            bench.engine.arm(bench.order("c", bench.fake())).await.map(drop),
            bench.engine.fire(&["armed".into()]).await.map(drop),
            bench.engine.update("a", bench.fake().any()).await.map(drop),
        ] {
            assert!(matches!(refused, Err(EngineError::Leaving)), "{refused:?}");
        }
        assert!(!bench.engine.list().iter().any(is_live));
        assert_eq!(bench.records(), 0);
        let gone = bench.engine.renew(&["a".into()]).await;
        assert_eq!(gone.is_err(), hand_over, "with this agent it is gone, with the next it is not: {gone:?}");
    }
}

#[tokio::test]
async fn one_id_is_one_injection_however_many_ask_at_once() {
    let bench = Bench::new("at once");
    let one = || bench.order("a", bench.fake());
    let (first, second) = tokio::join!(bench.engine.arm(one()), bench.engine.arm(one()));
    assert_eq!((first.unwrap().len(), second.unwrap().len()), (1, 1), "it is the same order");
    bench.engine.fire(&["a".into()]).await.unwrap();
    let other = |level| bench.order("b", Fake { level, ..bench.fake() });
    let (first, second) = tokio::join!(bench.engine.arm(other(1)), bench.engine.arm(other(2)));
    assert!(first.is_ok() != second.is_ok(), "two orders are not one: {first:?}, {second:?}");
    let refused = first.and(second).unwrap_err();
    assert!(matches!(refused, EngineError::Conflict(_)), "{refused}");
    bench.engine.fire(&["b".into()]).await.unwrap();
    bench.engine.revert(&["a".into(), "b".into()], "asked").await.unwrap();
    let log = bench.log();
    let count = |what: &str| log.iter().filter(|line| line.starts_with(what)).count();
    assert_eq!((count("inject"), count("revert"), bench.records()), (2, 2, 0), "{log:?}");
}

#[tokio::test]
async fn what_is_live_keeps_its_id() {
    let bench = Bench::new("kept id");
    bench.inject(bench.order("a", bench.fake())).await;
    let (core, _) = bench.engine.entries(&["a".to_owned()]).unwrap().remove(0);
    let entry =
        |core: &Arc<Core>| Entry { core: Arc::clone(core), order: None, commands: mpsc::channel(1).0 };
    assert!(matches!(bench.engine.0.insert("a".into(), entry(&core)), Err(EngineError::Conflict(_))));
    assert_eq!(bench.engine.revert(&["a".into()], "asked").await.unwrap()[0].state(), State::Reverted);
    assert!(bench.engine.0.insert("a".into(), entry(&core)).is_ok());
}

#[tokio::test]
async fn what_is_stuck_can_be_asked_for_as_often_as_one_likes() {
    let bench = Bench::new("stuck often");
    *world("stuck often").failing_reverts.lock().unwrap() = 1000;
    bench.inject(bench.order("a", bench.fake())).await;
    bench.inject(bench.order("b", Fake { fails: Some("no"), ..bench.fake() })).await;
    for _ in 0..40 {
        for id in ["a".to_owned(), "b".to_owned()] {
            let asked = bench.engine.revert(std::slice::from_ref(&id), "asked");
            let asked = tokio::time::timeout(Duration::from_secs(5), asked).await;
            assert_eq!(asked.expect("it is answered").unwrap()[0].state(), State::Stuck);
            let seen = tokio::time::timeout(Duration::from_secs(5), bench.engine.observe(&[id])).await;
            assert_eq!(seen.expect("it is answered").unwrap()[0].state(), State::Stuck);
        }
    }
}

#[tokio::test]
async fn a_record_that_nobody_played_back_keeps_its_id() {
    let bench = Bench::new("recorded");
    let undo = serde_json::to_value(Undo("recorded".into())).unwrap();
    let (boot_id, target) = (bench.engine.0.boot_id.clone(), bench.target());
    let record =
        Record { id: "unknown".into(), kind: "newer".into(), target, undo, created: BootTime(1), boot_id };
    bench.engine.0.journal.undo.write(&record).unwrap();
    let journal = bench.dir.path().join("journal");
    std::fs::write(journal.join("damaged.json"), "{").unwrap();
    std::fs::create_dir(journal.join("unread.json")).unwrap();
    bench.engine.replay(&[Kind::of::<Fake>()]).await.unwrap();
    for id in ["unknown", "damaged", "unread"] {
        let refused = bench.engine.arm(bench.order(id, bench.fake())).await.map(drop).unwrap_err();
        assert!(refused.to_string().contains("has an undo record"), "{id}: {refused}");
    }
    assert_eq!(bench.engine.0.journal.undo.read().unwrap().records, [record]);
    assert!(bench.log().is_empty());
}

#[tokio::test]
async fn what_was_left_and_cannot_be_read_is_never_resumed() {
    let bench = Bench::new("unread left");
    let file = bench.dir.path().join("resume/a.json");
    std::fs::create_dir(&file).unwrap();
    assert!(bench.engine.take_left().unwrap().is_empty());
    assert!(!file.exists(), "it may be read the next time");
}
