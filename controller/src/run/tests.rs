use std::{collections::BTreeMap, time::Duration};

use crate::{
    cli::ProgressMode,
    event::{Event, Phase},
    fake::Fake,
    plan, store,
};

use super::*;

const PLAN: &str = "
apiVersion: squall.dev/v1
kind: Plan
metadata: { name: test }
seed: 1
targets: { web: { process: { exe: web } } }
probes: { threads: { agent: { target: web, measure: threads } } }
rounds:
  - { name: first, baseline: 1s, hold: 2s, recovery: 1s, faults: [ { cpu: { on: web, load: 90% } } ],
      gates: [ { oom: { target: web } } ] }
";

struct Test {
    runs: tempfile::TempDir,
    id: String,
    log: Arc<Log>,
    signals: watch::Sender<Asked>,
    ended: tokio::task::JoinHandle<Ended>,
}

/// Starts the run of a plan on fake agents.
fn start(plan: &str, fakes: &[&Fake]) -> Test {
    let plan = plan::parse(Path::new("plan.yaml"), plan).expect("a plan");
    let runs = tempfile::tempdir().expect("a directory");
    let store = Store::create(runs.path(), "", &BTreeMap::new()).expect("a store");
    let (id, clock) = (store.id.clone(), Clock::start());
    let log = Arc::new(Log::new(clock, store, Progress::new(ProgressMode::None)));
    log.record(outline::run_started(&plan, &id, Timestamp::now(), 1));
    let (trouble, troubles) = mpsc::unbounded_channel();
    let (signals, rx) = watch::channel(Asked::GoOn);
    let mut guard = Guard { signals: rx, trouble: troubles };
    let agents = fakes.iter().map(|f| f.agent.clone()).collect();
    let context = Context {
        plan,
        agents,
        log: Arc::clone(&log),
        clock,
        run: id.clone(),
        seed: 1,
        open: probe::Open::default(),
        trouble,
    };
    let ended = tokio::spawn(async move { rounds(Arc::new(context), &mut guard).await });
    Test { runs, id, log, signals, ended }
}

impl Test {
    async fn end(self) -> (Ended, Run, Vec<Event>) {
        let ended = self.ended.await.expect("no panic");
        let dir = self.runs.path().join(&self.id);
        let text = std::fs::read_to_string(dir.join("events.jsonl")).expect("events");
        let events = text.lines().map(|l| serde_json::from_str(l).expect("an event")).collect();
        // What is on disk tells the same as what was in memory.
        let run = store::read(&dir).expect("a run");
        assert!(run == self.log.with(Run::clone), "events.jsonl tells another story than the run did");
        (ended, run, events)
    }

    async fn until(&self, condition: impl Fn(&Run) -> bool) {
        for _ in 0..1000 {
            if self.log.with(&condition) {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("it never happened: {:#?}", self.log.with(Run::clone));
    }

    async fn until_fault(&self) {
        self.until(|run| !run.injections.is_empty()).await;
    }
}

fn reverted(run: &Run) -> usize {
    run.injections.iter().filter(|i| i.reverted.is_some()).count()
}

#[tokio::test]
async fn a_round_goes_through_its_phases_on_whole_seconds() {
    let fake = Fake::start("a").await;
    let (ended, run, events) = start(PLAN, &[&fake]).end().await;
    ended.expect("not stopped");

    let phases = &run.rounds[0].phases;
    let starts: Vec<f64> = phases.values().copied().collect();
    assert_eq!(phases.keys().copied().collect::<Vec<_>>(), [Phase::Baseline, Phase::Fault, Phase::Recovery]);
    assert!(starts.iter().all(|at| at.fract() == 0.0), "{starts:?}");
    assert_eq!(starts[1] - starts[0], 1.0);
    // The hold begins when the fault is in force, which takes longer where the machine is busy.
    assert!((2.0..=4.0).contains(&(starts[2] - starts[1])), "{starts:?}");

    let injected = &run.injections[0];
    assert!(injected.at >= starts[1] && injected.at < starts[2], "{injected:?}");
    assert!(injected.bit, "{injected:?}");
    let (at, took, _) = injected.reverted.clone().expect("reverted");
    assert!(at >= starts[2] && took < 1.0, "{injected:?}");
    assert_eq!(
        (injected.injection.target.as_str(), injected.injection.resolved.as_str()),
        ("web", "web pid 7")
    );

    let calls = fake.is().calls.clone();
    let order: Vec<_> = calls.iter().copied().filter(|c| !["describe", "renew"].contains(c)).collect();
    assert_eq!(order, ["dry", "arm", "fire", "revert"]);
    assert!(calls.iter().filter(|c| **c == "renew").count() >= 2, "{calls:?}");
    assert_eq!(fake.live(), 0);
    assert!(run.probes["threads"].values.len() >= 10, "{:?}", run.probes["threads"]);
    assert!(events.iter().any(|e| matches!(e.what, What::RoundFinished { round: 0, .. })), "{events:?}");
}

#[tokio::test]
async fn a_fault_that_takes_long_to_begin_is_held_as_long_as_any() {
    let fake = Fake::start("a").await;
    fake.is().fire_takes = Duration::from_secs(2);
    let (ended, run, _) = start(PLAN, &[&fake]).end().await;
    ended.expect("not stopped");
    let (injected, recovery) = (run.injections[0].at, run.rounds[0].phases[&Phase::Recovery]);
    let (reverted, ..) = run.injections[0].reverted.clone().expect("reverted");
    assert!(recovery - injected >= 1.5 && reverted - injected >= 1.5, "{injected} {recovery} {reverted}");
    let fired = run.rounds[0].phases[&Phase::Fault];
    assert!(
        recovery - fired >= 3.5,
        "the two seconds that it took are none of the hold's: {fired} {recovery}"
    );
}

#[tokio::test]
async fn a_target_that_matches_nothing_stops_the_run_before_anything_is_changed() {
    let fake = Fake::start("a").await;
    fake.is().nothing_matches = true;
    let (ended, run, _) = start(PLAN, &[&fake]).end().await;
    let Err(Stopped::Wrong(problems)) = ended else { panic!("{ended:?}") };
    assert_eq!((problems.len(), problems[0].path.as_str()), (1, "targets.web"));
    assert_eq!(problems[0].message, "target `web` matches nothing: a: no process has exe web: 0 of 12");
    assert!(run.injections.is_empty());
    assert!(!fake.is().calls.iter().any(|c| ["arm", "fire"].contains(c)), "{:?}", fake.is().calls);
}

#[tokio::test]
async fn a_fault_that_does_not_work_there_stops_the_run_before_anything_is_changed() {
    let fake = Fake::start("a").await;
    fake.is().refuses = true;
    let (ended, _, _) = start(PLAN, &[&fake]).end().await;
    let Err(Stopped::Wrong(problems)) = ended else { panic!("{ended:?}") };
    assert!(problems[0].message.contains("cpu faults do not work on this node"), "{problems:?}");
    assert!(!fake.is().calls.iter().any(|c| ["arm", "fire"].contains(c)), "{:?}", fake.is().calls);
}

#[tokio::test]
async fn a_person_who_stops_it_gets_everything_reverted() {
    let (a, b) = (Fake::start("a").await, Fake::start("b").await);
    let test = start(PLAN, &[&a, &b]);
    test.until(|run| run.injections.len() == 2).await;
    test.signals.send(Asked::Stop).expect("listened to");
    let (ended, run, _) = test.end().await;
    assert!(matches!(ended, Err(Stopped::Person)), "{ended:?}");
    assert_eq!((run.injections.len(), reverted(&run)), (2, 2));
    assert_eq!((a.live(), b.live()), (0, 0));
}

#[tokio::test]
async fn a_person_who_asks_twice_is_told_which_lease_ends_when() {
    let fake = Fake::start("a").await;
    fake.is().hangs = true;
    let test = start(PLAN, &[&fake]);
    test.until_fault().await;
    test.signals.send(Asked::Stop).expect("listened to");
    sleep(Duration::from_millis(300)).await;
    assert!(!test.ended.is_finished(), "the revert hangs, so it waits");
    test.signals.send(Asked::Leave).expect("listened to");
    let (ended, run, _) = test.end().await;
    assert!(matches!(ended, Err(Stopped::Person)), "{ended:?}");
    assert_eq!(reverted(&run), 0);
    let (_, note) = run.notes.last().expect("a note");
    assert!(note.contains("left with 1 not reverted") && note.contains("when its lease is over"), "{note}");
}

#[tokio::test]
async fn a_lost_agent_aborts_and_the_others_are_reverted() {
    let (a, b) = (Fake::start("a").await, Fake::start("b").await);
    let test = start(PLAN, &[&a, &b]);
    test.until(|run| run.injections.len() == 2).await;
    a.is().lost = true;
    let (ended, run, _) = test.end().await;
    let Err(Stopped::Lost(why)) = ended else { panic!("{ended:?}") };
    assert!(why.contains("the agent on a is lost"), "{why}");
    assert_eq!(b.live(), 0);
    assert_eq!(reverted(&run), 1);
    let notes: Vec<_> = run.notes.iter().map(|(_, text)| text.as_str()).collect();
    assert!(notes.iter().any(|n| n.contains("on a could not be reverted")), "{notes:?}");
}

#[tokio::test]
async fn a_fault_that_another_agent_resumes_goes_on_and_its_gap_is_on_record() {
    let fake = Fake::start("a").await;
    let test = start(&PLAN.replace("hold: 2s", "hold: 4s"), &[&fake]);
    test.until(|run| run.injections.iter().any(|i| i.bit)).await;
    fake.is().lost = true;
    sleep(Duration::from_millis(1500)).await;
    assert!(!test.ended.is_finished(), "it waits for the next agent");
    fake.resume_all();
    let (ended, run, events) = test.end().await;
    ended.expect("not stopped");
    let gaps: Vec<_> = events
        .iter()
        .filter_map(|e| match &e.what {
            What::Resumed { agent, gap, .. } => Some((agent.as_str(), *gap)),
            _ => None,
        })
        .collect();
    assert_eq!(gaps, [("9.9.9", 1.5)]);
    assert!(
        run.notes.iter().any(|(_, n)| n.contains("resumed by agent 9.9.9 after 1.5 s")),
        "{:?}",
        run.notes
    );
    assert!(run.injections[0].bit, "what was touched before the gap was touched");
    assert_eq!((reverted(&run), fake.live()), (1, 0));
    let ended_at = run.injections[0].reverted.as_ref().expect("reverted").0;
    assert!(ended_at >= run.rounds[0].phases[&Phase::Recovery], "held to the end");
}

#[tokio::test]
async fn a_fault_that_the_next_agent_does_not_know_has_ended_early() {
    let fake = Fake::start("a").await;
    let test = start(&PLAN.replace("hold: 2s", "hold: 4s"), &[&fake]);
    test.until(|run| run.injections.iter().any(|i| i.bit)).await;
    fake.is().lost = true;
    sleep(Duration::from_millis(500)).await;
    fake.forget_all();
    let (ended, run, _) = test.end().await;
    assert_ne!(ended.expect("not stopped").0, Verdict::Promote);
    let (_, _, why) = run.injections[0].reverted.clone().expect("ended");
    assert!(why.contains("the next one does not know it"), "{why}");
}

#[tokio::test]
async fn a_revert_waits_for_the_next_agent() {
    let fake = Fake::start("a").await;
    let test = start(PLAN, &[&fake]);
    test.until_fault().await;
    test.until(|run| run.injections.iter().any(|i| i.bit)).await;
    fake.is().lost = true;
    test.signals.send(Asked::Stop).expect("listened to");
    sleep(Duration::from_millis(1500)).await;
    fake.resume_all();
    let (ended, run, _) = test.end().await;
    assert!(matches!(ended, Err(Stopped::Person)), "{ended:?}");
    assert_eq!((reverted(&run), fake.live()), (1, 0));
}

#[tokio::test]
async fn a_round_that_finds_fewer_than_there_were_proves_nothing() {
    let (a, b) = (Fake::start("a").await, Fake::start("b").await);
    // Arming comes two seconds before the fault.
    let test = start(&PLAN.replace("baseline: 1s", "baseline: 4s"), &[&a, &b]);
    test.until(|run| run.rounds[0].phases.contains_key(&Phase::Baseline)).await;
    b.is().nothing_matches = true;
    let (ended, run, _) = test.end().await;
    assert_ne!(ended.expect("not stopped").0, Verdict::Promote);
    assert_eq!((run.injections.len(), reverted(&run)), (1, 1));
    let text = "1 of the 2 that were there when the run began are left";
    assert!(run.notes.iter().any(|(_, n)| n.contains(text)), "{:?}", run.notes);
}

#[tokio::test]
async fn a_fault_that_ends_early_is_noted_and_never_promotes() {
    let fake = Fake::start("a").await;
    let test = start(PLAN, &[&fake]);
    test.until_fault().await;
    fake.end_all("its target is gone");
    let (ended, run, _) = test.end().await;
    let (verdict, _) = ended.expect("not stopped");
    assert_ne!(verdict, Verdict::Promote);
    assert_ne!(run.rounds[0].verdict, Some(Verdict::Promote));
    assert!(
        run.notes.iter().any(|(_, n)| n.contains("ended before the round did: its target is gone")),
        "{:?}",
        run.notes
    );
    assert_eq!(run.injections[0].reverted.as_ref().map(|r| r.2.as_str()), Some("its target is gone"));
}

#[test]
fn an_early_end_turns_promote_into_inconclusive_and_leaves_a_block_alone() {
    let early = "x ended".to_owned();
    let of = |verdict| proven((verdict, "why".into()), Some(&early));
    assert_eq!(of(Verdict::Promote), (Verdict::Inconclusive, "x ended".to_owned()));
    assert_eq!(of(Verdict::Block), (Verdict::Block, "why".to_owned()));
    assert_eq!(proven((Verdict::Promote, "why".into()), None).0, Verdict::Promote);
}

#[tokio::test]
async fn a_revert_that_fails_once_is_tried_again() {
    let fake = Fake::start("a").await;
    fake.is().stuck = 1;
    let (ended, run, events) = start(PLAN, &[&fake]).end().await;
    ended.expect("not stopped");
    assert_eq!(reverted(&run), 1);
    assert!(
        events.iter().any(|e| matches!(&e.what, What::Stuck { reason, .. } if reason == "device is busy"))
    );
}

#[tokio::test]
async fn a_host_that_stays_as_it_is_stops_the_run() {
    let fake = Fake::start("a").await;
    fake.is().stuck = 100;
    let (ended, run, _) = start(PLAN, &[&fake]).end().await;
    let Err(Stopped::Stuck(why)) = ended else { panic!("{ended:?}") };
    assert!(why.contains("device is busy"), "{why}");
    assert_eq!(run.injections[0].stuck.as_deref(), Some("device is busy"));
}

#[tokio::test]
async fn a_fault_that_cannot_be_injected_is_our_failure_and_leaves_nothing() {
    let (a, b) = (Fake::start("a").await, Fake::start("b").await);
    a.is().fire_fails = true;
    let (ended, run, _) = start(PLAN, &[&a, &b]).end().await;
    let Err(Stopped::Ours(why)) = ended else { panic!("{ended:?}") };
    assert!(format!("{why:#}").contains("no such device"), "{why:#}");
    assert_eq!(b.live(), 0);
    assert_eq!(reverted(&run), 1, "what did start was reverted");
}

#[tokio::test]
async fn a_target_that_is_gone_later_leaves_its_round_undecided() {
    let fake = Fake::start("a").await;
    // Arming comes two seconds before the fault.
    let test = start(&PLAN.replace("baseline: 1s", "baseline: 4s"), &[&fake]);
    test.until(|run| run.rounds[0].phases.contains_key(&Phase::Baseline)).await;
    fake.is().nothing_matches = true;
    let (ended, run, _) = test.end().await;
    let Err(Stopped::Undecidable(why)) = ended else { panic!("{ended:?}") };
    assert!(why.starts_with("round first could not be made: target `web` matches nothing"), "{why}");
    assert!(run.injections.is_empty());
}
