use rstest::rstest;

use super::{
    testing::{GAUGE, HISTOGRAM, LOAD, Lab, Second, TARGET, gates},
    *,
};
use crate::event::{TargetSample, What};

fn latency(limit: f64) -> Gate {
    Gate::Latency { probe: LOAD.into(), percentile: 0.95, limit }
}

fn errors(limit: f64) -> Gate {
    Gate::Errors { probe: LOAD.into(), limit }
}

fn recovery(within: f64) -> Gate {
    Gate::Recovery { probe: LOAD.into(), within }
}

fn alive(kills: Option<u64>) -> TargetSample {
    TargetSample { processes: 1, oom_kills: kills, generation: "7@1".into(), ..TargetSample::default() }
}

fn buckets(fast: u64, middle: u64, slow: u64, endless: u64) -> Vec<(Option<f64>, u64)> {
    vec![(Some(0.1), fast), (Some(0.5), 0), (Some(1.0), middle), (Some(2.5), slow), (None, endless)]
}

/// A round of the demo in which all is well.
fn healthy(rounds: usize) -> Lab {
    Lab::new(rounds, 30, 60, 30)
        .load(|_, _| Some(Second::fine()))
        .gauge(|_| Some(12.0))
        .target(|_| Some(alive(Some(0))))
        .histogram(|_| buckets(200, 0, 0, 0))
}

#[test]
fn healthy_service_passes_every_gate() {
    for gate in gates().into_iter().filter(|g| *g != Gate::Leak { probe: "threads".into(), limit: 60.0 }) {
        let finding = healthy(1).judge(gate.clone());
        assert_eq!(finding.outcome, Outcome::Pass, "{finding:#?}");
        let finding = healthy(3).judge_run(gate);
        assert_eq!(finding.outcome, Outcome::Pass, "{finding:#?}");
    }
}

#[test]
fn no_samples_are_inconclusive_for_every_gate() {
    for gate in gates() {
        for finding in [Lab::new(1, 30, 60, 30).judge(gate.clone()), Lab::new(2, 30, 60, 30).judge_run(gate)]
        {
            assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
            assert_eq!((finding.samples, finding.p), (0, None), "{finding:#?}");
            assert!(finding.reason.len() > 15, "{finding:#?}");
        }
    }
}

#[test]
fn nothing_passes_before_the_first_event() {
    let mut lab = Lab::new(1, 30, 60, 30);
    lab.plan.rounds[0].gates = gates();
    lab.plan.gates = gates();
    let run = Run::default();
    for finding in judge_round(&run, &lab.plan, 0).into_iter().chain(judge_run(&run, &lab.plan)) {
        assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
    }
    assert!(!recovered(&run, &lab.plan, 0));
    assert!(judge_round(&run, &lab.plan, 7).is_empty());
}

#[test]
fn a_fault_that_never_bit_passes_nothing() {
    for gate in gates() {
        let finding = healthy(1).idle().judge(gate);
        assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
    }
    let mut lab = healthy(1);
    lab.events.retain(|e| !matches!(e.what, What::Injected { .. }));
    let finding = lab.judge(latency(0.8));
    assert_eq!(finding.outcome, Outcome::Inconclusive);
    assert!(finding.reason.contains("no fault was injected"), "{finding:#?}");
}

#[test]
fn a_fault_that_was_away_for_long_passes_nothing() {
    for gate in gates().into_iter().filter(|g| *g != Gate::Leak { probe: "threads".into(), limit: 60.0 }) {
        assert_eq!(healthy(1).away(5.0).judge(gate.clone()).outcome, Outcome::Pass);
        let finding = healthy(1).away(7.0).judge(gate);
        assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
        assert!(finding.reason.contains("was away for 7s of its 60s"), "{finding:#?}");
    }
    let failing = Lab::new(1, 30, 60, 30)
        .load(|phase, _| Some(if phase == Phase::Fault { Second::failed(150) } else { Second::fine() }));
    assert_eq!(failing.away(7.0).judge(errors(0.01)).outcome, Outcome::Fail, "what is seen to fail fails");
}

#[test]
fn a_bad_baseline_decides_nothing() {
    for gate in [latency(0.8), errors(0.01), recovery(5.0)] {
        let finding = Lab::new(1, 30, 60, 30).load(|_, _| Some(Second::failed(150))).judge(gate);
        assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
        assert!(finding.reason.contains("bad baseline"), "{}", finding.reason);
    }
    let finding = Lab::new(1, 30, 60, 30).load(|_, _| Some(Second::slow(150))).judge(latency(0.8));
    assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
    let finding = Lab::new(1, 0, 60, 30).load(|_, _| Some(Second::fine())).judge(latency(0.8));
    assert_eq!(finding.outcome, Outcome::Inconclusive);
}

#[test]
fn missing_seconds_decide_nothing() {
    for gate in [latency(0.8), errors(0.01)] {
        // The generator dies 40 seconds into the fault.
        let dies = |phase, since| {
            (phase == Phase::Baseline || (phase == Phase::Fault && since < 40.0)).then(Second::fine)
        };
        let finding = Lab::new(1, 30, 60, 30).load(dies).judge(gate);
        assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
        assert!(finding.reason.contains("20 of 60 seconds"), "{finding:#?}");
    }
}

// ---- latency -------------------------------------------------------------------------------------------------------

fn in_fault(second: Second) -> impl FnMut(Phase, f64) -> Option<Second> {
    move |phase, _| Some(if phase == Phase::Fault { second } else { Second::fine() })
}

#[rstest]
#[case::none_slow(Second::fine(), Outcome::Pass)]
#[case::few_slow(Second::slow(4), Outcome::Pass)]
#[case::just_inside(Second::slow(9), Outcome::Inconclusive)]
#[case::at_the_limit(Second::slow(10), Outcome::Inconclusive)]
#[case::many_slow(Second::slow(30), Outcome::Fail)]
#[case::all_slow(Second::slow(200), Outcome::Fail)]
#[case::timeouts(Second::failed(100), Outcome::Fail)]
fn latency_by_share_of_slow_requests(#[case] second: Second, #[case] outcome: Outcome) {
    let finding = Lab::new(1, 6, 12, 8).load(in_fault(second)).judge(latency(0.8));
    assert_eq!(finding.outcome, outcome, "{finding:#?}");
    assert_eq!(finding.baseline, Some(0.005));
    assert_eq!(finding.samples, 12 * 200);
    let (low, high) = finding.interval.expect("has samples");
    match outcome {
        Outcome::Pass => assert!(high.is_some_and(|h| h <= 0.8), "{finding:#?}"),
        Outcome::Fail => assert!(low.is_some_and(|l| l >= 0.8), "{finding:#?}"),
        Outcome::Inconclusive => {
            assert!(finding.reason.contains("hold the fault") || finding.reason.contains("close"));
        }
    }
}

#[test]
fn fast_failures_do_not_make_a_service_fast() {
    // Half the requests fail at once, the others are fast.
    let finding = Lab::new(1, 30, 60, 30)
        .load(in_fault(Second::failed(100)))
        .with(|e| {
            if let What::Load { bin, .. } = &mut e.what {
                bin.failed_latency.iter_mut().for_each(|(us, _)| *us = 300);
            }
        })
        .judge(latency(0.8));
    assert_eq!(finding.outcome, Outcome::Fail, "{finding:#?}");
    assert_eq!(finding.value, None, "a failure in no time is not a fast answer");
}

#[test]
fn short_holds_and_low_rates_are_inconclusive() {
    let short = Lab::new(1, 30, 6, 30).load(in_fault(Second::slow(200))).judge(latency(0.8));
    assert_eq!(short.outcome, Outcome::Inconclusive);
    assert!(short.reason.contains("at least 10"), "{}", short.reason);
    let thin = Second { ok: 5, latency: 5_000, ..Second::default() };
    let thin = Lab::new(1, 30, 20, 30).load(|_, _| Some(thin)).judge(latency(0.8));
    assert_eq!(thin.outcome, Outcome::Inconclusive, "100 requests cannot show a p95: {thin:#?}");
    assert!(thin.reason.contains("hold the fault"), "{}", thin.reason);
}

#[test]
fn the_generators_own_lateness_neither_passes_nor_fails() {
    let late = Second { late: 100, ..Second::fine() };
    let finding = Lab::new(1, 30, 60, 30).load(in_fault(late)).judge(latency(0.8));
    assert_eq!(finding.outcome, Outcome::Inconclusive);
    assert!(finding.reason.contains("late"), "{}", finding.reason);
    // Every slow request was sent late: it may have been the generator.
    let finding =
        Lab::new(1, 30, 60, 30).load(in_fault(Second { late: 100, ..Second::slow(100) })).judge(latency(0.8));
    assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
    // One hiccup decides nothing.
    let hiccup = |phase, since| {
        let late = if phase == Phase::Fault && since == 7.0 { 20 } else { 0 };
        Some(Second { late, ..Second::fine() })
    };
    assert_eq!(Lab::new(1, 30, 60, 30).load(hiccup).judge(latency(0.8)).outcome, Outcome::Pass);
}

#[test]
fn drops_pass_nothing_but_may_come_from_a_service_that_fails() {
    let dropped = Second { dropped: 2, ..Second::fine() };
    for gate in [latency(0.8), errors(0.05)] {
        let finding = Lab::new(1, 30, 60, 30).load(in_fault(dropped)).judge(gate);
        assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
        assert!(finding.reason.contains("in flight"), "{}", finding.reason);
    }
    // So slow that the cap is hit: of what was sent, all was slow.
    let jammed = Second { slow: 50, dropped: 150, ..Second::default() };
    let finding = Lab::new(1, 30, 60, 30).load(in_fault(jammed)).judge(latency(0.8));
    assert_eq!(finding.outcome, Outcome::Fail, "{finding:#?}");
    // A cap that is too low for a fast service.
    let capped = Second { ok: 100, latency: 5_000, dropped: 100, ..Second::default() };
    let finding = Lab::new(1, 30, 60, 30).load(in_fault(capped)).judge(latency(0.8));
    assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
}

#[test]
fn since_is_counted_from_the_start_of_the_fault() {
    let late = |phase, since| {
        Some(if phase == Phase::Fault && since >= 3.0 { Second::slow(200) } else { Second::fine() })
    };
    let finding = Lab::new(1, 30, 60, 30).load(late).judge(latency(0.8));
    assert_eq!((finding.outcome, finding.since), (Outcome::Fail, Some(3.0)), "{finding:#?}");
}

#[test]
fn over_the_run_the_faults_of_all_rounds_are_judged() {
    let mut lab = Lab::new(4, 6, 5, 8).load(in_fault(Second::fine()));
    assert_eq!(lab.judge(latency(0.8)).outcome, Outcome::Inconclusive, "5 seconds are too few");
    let finding = lab.judge_run(latency(0.8));
    assert_eq!((finding.outcome, finding.samples), (Outcome::Pass, 4 * 5 * 200), "{finding:#?}");
    assert_eq!(finding.name, "latency[shoppers p95]");
}

#[test]
fn the_rate_of_a_counter_is_no_leak_and_no_proof_of_none() {
    let lab = healthy(3).with(|e| {
        if let What::Gauge { rate, .. } = &mut e.what {
            *rate = true;
        }
    });
    let finding = { lab }.judge_run(Gate::Leak { probe: GAUGE.into(), limit: 60.0 });
    assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
    assert!(finding.reason.contains("is a counter"), "{}", finding.reason);
}

// ---- histograms ----------------------------------------------------------------------------------------------------

fn histogram(limit: f64) -> Gate {
    Gate::Latency { probe: HISTOGRAM.into(), percentile: 0.95, limit }
}

#[rstest]
#[case::fast(buckets(200, 0, 0, 0), 0.8, Outcome::Pass, Some(0.1))]
#[case::limit_on_a_bound(buckets(100, 100, 0, 0), 1.0, Outcome::Pass, Some(1.0))]
#[case::limit_inside_the_bucket(buckets(100, 100, 0, 0), 0.8, Outcome::Inconclusive, Some(1.0))]
#[case::slow(buckets(100, 0, 100, 0), 0.8, Outcome::Fail, Some(2.5))]
#[case::endless(buckets(100, 0, 0, 100), 0.8, Outcome::Fail, None)]
#[case::endless_limit_past_all_bounds(buckets(100, 0, 0, 100), 5.0, Outcome::Inconclusive, None)]
fn latency_of_histograms(
    #[case] during: Vec<(Option<f64>, u64)>,
    #[case] limit: f64,
    #[case] outcome: Outcome,
    #[case] value: Option<f64>,
) {
    let finding = Lab::new(1, 30, 60, 30)
        .histogram(|phase| if phase == Phase::Fault { during.clone() } else { buckets(200, 0, 0, 0) })
        .judge(histogram(limit));
    assert_eq!((finding.outcome, finding.value), (outcome, value), "{finding:#?}");
    assert_eq!(finding.baseline, Some(0.1));
    if outcome == Outcome::Inconclusive {
        assert!(finding.reason.contains("inside the bucket"), "{}", finding.reason);
    }
}

#[test]
fn failed_scrapes_and_resets_decide_nothing() {
    let sampled = || Lab::new(1, 30, 60, 30).histogram(|_| buckets(200, 0, 0, 0));
    let gone = sampled().with(|e| {
        if matches!(e.what, What::Buckets { .. }) && (50.0..55.0).contains(&e.at) {
            e.what = What::ProbeFailed { probe: HISTOGRAM.into(), error: "HTTP 503".into() };
        }
    });
    let mut gone = gone;
    let finding = gone.judge(histogram(0.8));
    assert_eq!(finding.outcome, Outcome::Inconclusive);
    assert!(finding.reason.contains("HTTP 503"), "{}", finding.reason);
    let mut reset = sampled();
    reset.push(50.0, What::ProbeReset { probe: HISTOGRAM.into(), reason: "went from 100 to 3".into() });
    let finding = reset.judge(histogram(0.8));
    assert_eq!(finding.outcome, Outcome::Inconclusive);
    assert!(finding.reason.contains("went from 100 to 3"), "{}", finding.reason);
}

// ---- errors --------------------------------------------------------------------------------------------------------

#[rstest]
#[case::none_of_enough(0, 0.01, Outcome::Pass)]
#[case::none_of_too_few(0, 0.0002, Outcome::Inconclusive)]
#[case::far_below(1, 0.05, Outcome::Pass)]
#[case::close(3, 0.016, Outcome::Inconclusive)]
#[case::above(20, 0.01, Outcome::Fail)]
fn errors_by_share(#[case] failed: u64, #[case] limit: f64, #[case] outcome: Outcome) {
    let finding = Lab::new(1, 30, 60, 30).load(in_fault(Second::failed(failed))).judge(errors(limit));
    assert_eq!(finding.outcome, outcome, "{finding:#?}");
    assert_eq!(finding.value, Some(failed as f64 / 200.0));
}

#[test]
fn none_of_3836_shows_at_most_0_12_percent() {
    // statistics.md: 0 errors of 3 836 → ≤ 0.12 % at 99 %; passing asks for 99.9 %, which 5 754 give.
    let second = Second { ok: 96, latency: 5_000, ..Second::default() };
    let mut lab = Lab::new(1, 30, 60, 30).load(|_, _| Some(second));
    let finding = lab.judge(errors(0.0012));
    assert_eq!((finding.samples, finding.outcome), (5760, Outcome::Pass), "{finding:#?}");
}

// ---- oom -----------------------------------------------------------------------------------------------------------

fn oom(limit: u64) -> Gate {
    Gate::Oom { target: TARGET.into(), limit }
}

#[rstest]
#[case::none(0, Outcome::Pass, 0.0)]
#[case::as_many_as_allowed(1, Outcome::Pass, 1.0)]
#[case::more(2, Outcome::Fail, 2.0)]
fn kills_are_counted_from_the_start_of_the_round(
    #[case] kills: u64,
    #[case] outcome: Outcome,
    #[case] value: f64,
) {
    // Three kills from before the round are not its fault.
    let finding = Lab::new(1, 30, 60, 30)
        .target(|at| Some(alive(Some(if at < 40.0 { 3 } else { 3 + kills }))))
        .judge(oom(1));
    assert_eq!((finding.outcome, finding.value), (outcome, Some(value)), "{finding:#?}");
    assert_eq!(finding.p, None);
    let since = finding.since.map(f64::round);
    assert_eq!(since, (kills > 0).then_some(10.0), "{finding:#?}");
}

#[rstest]
#[case::never_readable(|_| Some(alive(None)))]
#[case::vanished(|at| Some(TargetSample { processes: u32::from(at < 50.0), ..alive(Some(0)) }))]
#[case::replaced(|at| Some(TargetSample { generation: format!("{}", at < 50.0), ..alive(Some(0)) }))]
#[case::unreadable_for_a_while(|at| Some(alive((!(50.0..52.0).contains(&at)).then_some(0))))]
#[case::sampling_died(|at| (at < 50.0).then(|| alive(Some(0))))]
#[case::sampling_has_holes(|at| (at % 10.0 > 1.0).then(|| alive(Some(0))))]
fn unknown_kills_are_not_none(#[case] sample: fn(f64) -> Option<TargetSample>) {
    let finding = Lab::new(1, 30, 60, 30).target(sample).judge(oom(0));
    assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
}

#[test]
fn a_kill_fails_even_where_the_target_is_gone_after_it() {
    let sample = |at| {
        let dead = at > 50.0;
        Some(TargetSample { processes: u32::from(!dead), ..alive(Some(u64::from(dead))) })
    };
    assert_eq!(Lab::new(1, 30, 60, 30).target(sample).judge(oom(0)).outcome, Outcome::Fail);
    // A new cgroup starts at none; a kill in it counts.
    let moved = |at| Some(alive(Some(if at < 50.0 { 5 } else { 1 })));
    let finding = Lab::new(1, 30, 60, 30).target(moved).judge(oom(0));
    assert_eq!((finding.outcome, finding.value), (Outcome::Fail, Some(1.0)));
}

#[test]
fn over_the_run_a_kill_in_any_round_fails() {
    let finding =
        Lab::new(3, 30, 60, 30).target(|at| Some(alive(Some(u64::from(at > 300.0))))).judge_run(oom(0));
    assert_eq!(finding.outcome, Outcome::Fail, "{finding:#?}");
}

// ---- recovery ------------------------------------------------------------------------------------------------------

/// Bad in the fault and for so many seconds after.
fn bad_for(seconds: f64) -> impl FnMut(Phase, f64) -> Option<Second> {
    move |phase, since| {
        let bad = phase == Phase::Fault || (phase == Phase::Recovery && since < seconds);
        Some(if bad { Second::failed(200) } else { Second::fine() })
    }
}

#[rstest]
#[case::at_once(0.0, Outcome::Pass, Some(1.0))]
#[case::soon(4.0, Outcome::Pass, Some(3.99))]
#[case::not_to_be_told(11.0, Outcome::Inconclusive, Some(10.99))]
#[case::later(15.0, Outcome::Fail, Some(14.99))]
#[case::never(99.0, Outcome::Fail, None)]
fn recovery_is_the_first_run_of_good_seconds(
    #[case] bad: f64,
    #[case] outcome: Outcome,
    #[case] value: Option<f64>,
) {
    let mut lab = Lab::new(1, 30, 60, 30).load(bad_for(bad));
    let finding = lab.judge(recovery(10.5));
    assert_eq!(finding.outcome, outcome, "{finding:#?}");
    match (finding.value, value) {
        (Some(ours), Some(value)) => assert!((ours - value).abs() < 0.011, "{finding:#?}"),
        (ours, value) => assert_eq!(ours, value, "{finding:#?}"),
    }
    assert_eq!(recovered(&lab.run(), &lab.plan, 0), value.is_some());
}

#[test]
fn one_good_second_is_no_recovery() {
    let flapping = |phase, since: f64| {
        let bad = phase == Phase::Fault || (phase == Phase::Recovery && since < 20.0 && since % 3.0 != 2.0);
        Some(if bad { Second::failed(200) } else { Second::fine() })
    };
    let finding = Lab::new(1, 30, 60, 30).load(flapping).judge(recovery(10.0));
    assert_eq!(finding.outcome, Outcome::Fail, "{finding:#?}");
    assert!(finding.value.is_some_and(|v| v > 18.0));
}

#[test]
fn a_window_shorter_than_the_limit_cannot_fail() {
    let finding = Lab::new(1, 30, 60, 5).load(bad_for(99.0)).judge(recovery(10.0));
    assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
    assert!(finding.reason.contains("at least 13s"), "{}", finding.reason);
}

#[test]
fn recovery_is_measured_against_the_baseline_where_no_gate_limits_it() {
    // Five times the baseline's latency, and no latency gate.
    let slower = |phase, _| {
        Some(Second { latency: if phase == Phase::Baseline { 5_000 } else { 25_000 }, ..Second::fine() })
    };
    let mut lab = Lab::new(1, 30, 60, 30).load(slower);
    assert_eq!(lab.judge(recovery(10.0)).outcome, Outcome::Fail);
    lab.plan.rounds[0].gates = vec![latency(0.8), recovery(10.0)];
    assert_eq!(judge_round(&lab.run(), &lab.plan, 0)[1].outcome, Outcome::Pass);
}

#[test]
fn what_may_fail_under_a_fault_is_no_recovery() {
    // A third fails for ever, and two fifths may while the fault is held.
    let after = |phase, _| Some(if phase == Phase::Recovery { Second::failed(66) } else { Second::fine() });
    let mut lab = Lab::new(1, 30, 60, 30).load(after);
    lab.plan.rounds[0].gates = vec![errors(0.4), recovery(10.0)];
    let findings = judge_round(&lab.run(), &lab.plan, 0);
    assert_eq!((findings[0].outcome, findings[1].outcome), (Outcome::Pass, Outcome::Fail), "{findings:#?}");
}

#[test]
fn over_the_run_the_worst_recovery_speaks() {
    let mut lab = Lab::new(3, 30, 60, 30);
    let (_, _, second, _) = lab.times(1);
    for at in 0..lab.end() as u64 {
        let at = at as f64;
        let bad = lab.phase(at).0 == Phase::Fault || (second..second + 20.0).contains(&at);
        let bin = if bad { Second::failed(200) } else { Second::fine() }.bin(at);
        lab.push(at + 1.0, What::Load { probe: LOAD.into(), bin });
    }
    let finding = lab.judge_run(recovery(10.0));
    assert_eq!(finding.outcome, Outcome::Fail);
    assert!(finding.reason.contains("round-1"), "{}", finding.reason);
}

#[test]
fn a_histogram_does_not_pass_without_those_that_hang() {
    let seen = |during| {
        let all = move |phase| buckets(if phase == Phase::Fault { during } else { 200 }, 0, 0, 0);
        Lab::new(1, 30, 60, 30).histogram(all).judge(histogram(0.8))
    };
    assert_eq!(seen(190).outcome, Outcome::Pass);
    let finding = seen(100);
    assert_eq!(finding.outcome, Outcome::Inconclusive, "{finding:#?}");
    assert!(finding.reason.contains("100 observations a second"), "{}", finding.reason);
}

// ---- the verdict ---------------------------------------------------------------------------------------------------

fn found(outcome: Outcome, p: Option<f64>) -> Finding {
    let lab = Lab::new(1, 1, 1, 1);
    let run = Run::default();
    let scope = Scope { run: &run, plan: &lab.plan, rounds: vec![0], name: Some("a") };
    Finding { outcome, p, reason: "why".into(), ..scope.finding("latency", GAUGE, 1.0, "seconds") }
}

#[rstest]
#[case::nothing(vec![], true, Verdict::Inconclusive)]
#[case::all_pass(vec![found(Outcome::Pass, Some(0.9)), found(Outcome::Pass, None)], true, Verdict::Promote)]
#[case::idle(vec![found(Outcome::Pass, Some(0.9))], false, Verdict::Inconclusive)]
#[case::open(vec![found(Outcome::Pass, None), found(Outcome::Inconclusive, None)], true, Verdict::Inconclusive)]
#[case::fact(vec![found(Outcome::Pass, Some(0.9)), found(Outcome::Fail, None)], true, Verdict::Block)]
#[case::sure(vec![found(Outcome::Fail, Some(1e-9)), found(Outcome::Inconclusive, None)], true, Verdict::Block)]
#[case::one_of_one(vec![found(Outcome::Fail, Some(0.008))], true, Verdict::Block)]
#[case::one_of_two(vec![found(Outcome::Fail, Some(0.008)), found(Outcome::Pass, Some(0.9))], true, Verdict::Inconclusive)]
#[case::fails_though_idle(vec![found(Outcome::Fail, None)], false, Verdict::Block)]
fn verdicts(#[case] findings: Vec<Finding>, #[case] bit: bool, #[case] expected: Verdict) {
    let (verdict, why) = verdict(&findings, 0, OnFail::Block, bit);
    assert_eq!(verdict, expected, "{why}");
    assert!(why.len() > 10);
    if expected == Verdict::Block {
        assert_eq!(super::verdict(&findings, 0, OnFail::Rollback, bit).0, Verdict::Rollback);
    }
}

#[test]
fn every_look_at_a_run_counts_all_its_gates() {
    // Enough for one gate alone, not for one of three: also where the other two are still to come.
    let found = [found(Outcome::Fail, Some(0.008))];
    assert_eq!(verdict(&found, 1, OnFail::Block, true).0, Verdict::Block);
    assert_eq!(verdict(&found, 3, OnFail::Block, true).0, Verdict::Inconclusive);
    let mut lab = healthy(2);
    lab.plan.rounds[0].gates = vec![latency(0.8), errors(0.01), oom(0), recovery(10.0)];
    lab.plan.gates = vec![latency(0.8)];
    assert_eq!(tested(&lab.plan), 3);
}

#[test]
fn names_are_unique() {
    let mut lab = healthy(1);
    lab.plan.rounds[0].gates = vec![latency(0.8), latency(0.4), errors(0.01)];
    let names: Vec<_> = judge_round(&lab.run(), &lab.plan, 0).into_iter().map(|f| f.name).collect();
    assert_eq!(
        names,
        ["round-0/latency[shoppers p95]", "round-0/latency[shoppers p95] #2", "round-0/errors[shoppers]"]
    );
}

#[test]
fn needs_say_what_is_missing() {
    let lab = Lab::new(2, 6, 12, 8);
    let p999 = Gate::Latency { probe: LOAD.into(), percentile: 0.999, limit: 0.8 };
    let needs_of = |gate: &Gate, round| needs(gate, &lab.plan, round);
    assert!(needs_of(&latency(0.8), Some(0)).iter().all(Need::enough));
    let short: Vec<_> = needs_of(&p999, Some(0)).into_iter().filter(|n| !n.enough()).collect();
    assert_eq!((short[0].needs, short[0].gives), (6905.0, 2400.0));
    assert!(!needs_of(&Gate::Leak { probe: GAUGE.into(), limit: 60.0 }, Some(0))[0].enough());
    assert!(needs_of(&oom(0), None).iter().all(Need::enough));
    assert!(!needs_of(&recovery(47.0), Some(0))[0].enough());
    assert!(!needs_of(&errors(0.0012), Some(0)).iter().all(Need::enough));
}
