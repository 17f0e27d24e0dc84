use rstest::rstest;

use super::*;

mod network;

const GOOD: &str = r#"apiVersion: squall.dev/v1
kind: Plan
metadata: { name: recommender-release, version: v2.14.0 }
seed: 4711
targets:
  recommender: { process: { exe: recommender } }
  redis:       { address: { cidrs: [10.0.0.7/32], ports: [6379], protocol: tcp } }
probes:
  shoppers:   { load: { url: "http://127.0.0.1:8080/recommend?user_id=U123", rate: 200/s,
                        expect: { status: 200, json: { $.items: { minItems: 8 } }, within: 2s } } }
  goroutines: { scrape: { url: "http://127.0.0.1:8080/metrics", metric: go_goroutines } }
  threads:    { agent: { target: recommender, measure: threads } }
rounds:
  - name: redis-slow
    baseline: 30s
    hold: 60s
    faults:
      - network: { on: recommender, to: redis, delay: { latency: 2s, jitter: 300ms }, loss: 5% }
      - cpu: { on: recommender, load: 90% }
      - memory: { on: recommender, size: 200MiB, ramp: 5s }
    gates:
      - latency:  { probe: shoppers, p95: 800ms }
      - errors:   { probe: shoppers, max: 0.12% }
      - leak:     { probe: goroutines, max: 5/min }
      - oom:      { target: recommender, max: 0 }
      - recovery: { probe: shoppers, within: 47s }
decision: { onFail: block }
"#;

fn read(text: &str) -> Result<Plan, Invalid> {
    parse(Path::new("plan.yaml"), text)
}

/// What a person reads after `from` in the good plan was replaced by `to`.
fn errors(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    read(&GOOD.replacen(from, to, 1)).expect_err("not a plan").text
}

#[test]
fn reads_the_plan_of_the_design() {
    let plan = read(GOOD).expect("valid");
    assert_eq!(
        (plan.name.as_str(), plan.version.as_deref(), plan.seed),
        ("recommender-release", Some("v2.14.0"), Some(4711))
    );
    let Probe::Load(load) = &plan.probes["shoppers"] else { panic!("no load probe") };
    assert_eq!((load.rate, load.expect.within), (200.0, Duration::from_secs(2)));
    assert_eq!(load.expect.json[0].0.steps, [JsonStep::Key("items".into())]);
    let round = &plan.rounds[0];
    assert_eq!((round.baseline, round.hold), (Duration::from_secs(30), Duration::from_mins(1)));
    assert!(round.recovery >= Duration::from_secs(47));
    assert_eq!(round.faults[0].summary, "network recommender ↔ redis: delay 2s ±300ms, loss 5%");
    assert_eq!(round.faults[1].summary, "cpu recommender: load 90%");
    assert_eq!(round.faults[2].summary, "memory recommender: 200MiB, ramp 5s");
    let Some(v1::fault::Kind::Network(network)) = &round.faults[0].proto.kind else {
        panic!("no network fault")
    };
    let delay = network.delay.clone().expect("a delay");
    assert_eq!((delay.latency_ns, delay.jitter_ns), (2_000_000_000, 300_000_000));
    assert_eq!(network.loss, Some(v1::Loss { ratio: 0.05, ..v1::Loss::default() }));
    assert_eq!(network.peers[0].ports, [v1::PortRange { first: 6379, last: 6379 }]);
    assert_eq!(round.gates[0], Gate::Latency { probe: "shoppers".into(), percentile: 0.95, limit: 0.8 });
    assert_eq!(round.gates[2], Gate::Leak { probe: "goroutines".into(), limit: 5.0 });
    let outlines: Vec<String> = round.gates.iter().map(Gate::line).collect();
    assert_eq!(
        outlines,
        [
            "latency: shoppers p95 ≤ 800ms",
            "errors: shoppers ≤ 0.12%",
            "leak: goroutines ≤ 5/min",
            "oom: recommender ≤ 0 kills",
            "recovery: shoppers ≤ 47s"
        ]
    );
}

#[test]
fn a_time_without_a_unit() {
    insta::assert_snapshot!(errors("p95: 800ms", "p95: 800"), @r#"
    plan.yaml:22:43: rounds[0].gates[0].latency.p95: `800` has no unit
        |
     22 |       - latency:  { probe: shoppers, p95: 800 }
        |                                           ^^^ write 800ms or 800s

    1 error in plan.yaml
    "#);
}

#[test]
fn an_unknown_field() {
    insta::assert_snapshot!(errors("baseline: 30s", "basline: 30s"), @r#"
    plan.yaml:15:5: rounds[0].basline: unknown field `basline`
        |
     15 |     basline: 30s
        |     ^^^^^^^ did you mean `baseline`?

    1 error in plan.yaml
    "#);
}

#[test]
fn fields_that_are_not_built_yet_are_unknown() {
    insta::assert_snapshot!(errors("seed: 4711", "tier: core"), @r#"
    plan.yaml:4:1: tier: unknown field `tier`
       |
     4 | tier: core
       | ^^^^ known here: apiVersion, kind, metadata, seed, targets, probes, gates, limits, rounds, decision

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(errors("onFail: block", "onFail: block, hooks: { block: [] }"), @r#"
    plan.yaml:27:28: decision.hooks: unknown field `hooks`
        |
     27 | decision: { onFail: block, hooks: { block: [] } }
        |                            ^^^^^ known here: onFail

    1 error in plan.yaml
    "#);
}

#[test]
fn a_missing_probe() {
    insta::assert_snapshot!(errors("latency:  { probe: shoppers", "latency:  { probe: shopers"), @r#"
    plan.yaml:22:28: rounds[0].gates[0].latency.probe: there is no probe `shopers`
        |
     22 |       - latency:  { probe: shopers, p95: 800ms }
        |                            ^^^^^^^ did you mean `shoppers`?

    1 error in plan.yaml
    "#);
}

#[test]
fn a_missing_target() {
    insta::assert_snapshot!(errors("{ on: recommender, to: redis", "{ on: recomender, to: rediss"), @r#"
    plan.yaml:18:24: rounds[0].faults[0].network.on: there is no target `recomender`
        |
     18 |       - network: { on: recomender, to: rediss, delay: { latency: 2s, jitter: 300ms }, loss: 5% }
        |                        ^^^^^^^^^^ did you mean `recommender`?

    plan.yaml:18:40: rounds[0].faults[0].network.to: there is no target `rediss`
        |
     18 |       - network: { on: recomender, to: rediss, delay: { latency: 2s, jitter: 300ms }, loss: 5% }
        |                                        ^^^^^^ did you mean `redis`?

    2 errors in plan.yaml
    "#);
}

#[test]
fn a_gate_that_could_never_be_decided() {
    insta::assert_snapshot!(errors("latency:  { probe: shoppers", "latency:  { probe: threads"), @r#"
    plan.yaml:22:28: rounds[0].gates[0].latency.probe: `threads` yields a gauge: the latency gate could never be decided
        |
     22 |       - latency:  { probe: threads, p95: 800ms }
        |                            ^^^^^^^ name a load probe, or a scraped histogram

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(errors("leak:     { probe: goroutines", "leak:     { probe: shoppers"), @r#"
    plan.yaml:24:28: rounds[0].gates[2].leak.probe: `shoppers` yields requests: the leak gate could never be decided
        |
     24 |       - leak:     { probe: shoppers, max: 5/min }
        |                            ^^^^^^^^ name a scraped gauge, or an agent probe

    1 error in plan.yaml
    "#);
}

#[test]
fn duplicates() {
    insta::assert_snapshot!(errors("goroutines: {", "shoppers: {"), @r#"
    plan.yaml:11:3: probes.shoppers: `shoppers` is here twice
        |
     11 |   shoppers: { scrape: { url: "http://127.0.0.1:8080/metrics", metric: go_goroutines } }
        |   ^^^^^^^^ give each a name of its own

    plan.yaml:24:28: rounds[0].gates[2].leak.probe: there is no probe `goroutines`
        |
     24 |       - leak:     { probe: goroutines, max: 5/min }
        |                            ^^^^^^^^^^ known: shoppers, threads

    2 errors in plan.yaml
    "#);
    insta::assert_snapshot!(errors("errors:   { probe: shoppers, max: 0.12% }", "latency: { probe: shoppers, p95: 1s }"), @r#"
    plan.yaml:23:9: rounds[0].gates[1]: there are two gates latency of shoppers p95
        |
     23 |       - latency: { probe: shoppers, p95: 1s }
        |         ^ remove one of them

    1 error in plan.yaml
    "#);
}

#[test]
fn percentages_rates_and_sizes_want_their_unit() {
    insta::assert_snapshot!(errors("loss: 5%", "loss: 0.05"), @r#"
    plan.yaml:18:93: rounds[0].faults[0].network.loss: `0.05` has no unit
        |
     18 |       - network: { on: recommender, to: redis, delay: { latency: 2s, jitter: 300ms }, loss: 0.05 }
        |                                                                                             ^^^^ write 0.05% or 5%

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(errors("rate: 200/s", "rate: 200"), @r#"
    plan.yaml:9:84: probes.shoppers.load.rate: `200` has no unit
       |
     9 |   shoppers:   { load: { url: "http://127.0.0.1:8080/recommend?user_id=U123", rate: 200,
       |                                                                                    ^^^ write 200/s or 200/min

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(errors("size: 200MiB", "size: 200"), @r#"
    plan.yaml:20:42: rounds[0].faults[2].memory.size: `200` has no unit
        |
     20 |       - memory: { on: recommender, size: 200, ramp: 5s }
        |                                          ^^^ write 200MiB or 200B

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(errors("max: 5/min", "max: 5"), @r#"
    plan.yaml:24:45: rounds[0].gates[2].leak.max: `5` has no unit
        |
     24 |       - leak:     { probe: goroutines, max: 5 }
        |                                             ^ write 5/s or 5/min

    1 error in plan.yaml
    "#);
}

#[rstest]
#[case::errors("max: 0.12%", "max: 0%", "errors.max: that there is none at all cannot be shown")]
#[case::leak("max: 5/min", "max: 0/min", "leak.max: that there is none at all cannot be shown")]
#[case::recovery(
    "rate: 200/s",
    "rate: 30/min",
    "recovery.probe: `shoppers` sends less than a request a second"
)]
#[case::ramp("ramp: 5s", "ramp: 5m", "the ramp is as long as the hold")]
#[case::oom(
    "recommender: { process:",
    "recommender: { interface: { name: eth0 } }\n  other: { process:",
    "oom.target: `recommender` is an interface"
)]
fn what_could_never_be_decided_is_refused(#[case] from: &str, #[case] to: &str, #[case] why: &str) {
    let errors = errors(from, to);
    assert!(errors.contains(why), "{errors}");
}

#[test]
fn wrong_percentiles_and_kinds() {
    insta::assert_snapshot!(errors("p95: 800ms", "p995: 800ms"), @r#"
    plan.yaml:22:44: rounds[0].gates[0].latency.p995: `p995` is no percentile
        |
     22 |       - latency:  { probe: shoppers, p995: 800ms }
        |                                            ^^^^^ expected p50 to p99.9, such as p95: 800ms

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(errors("- latency:", "- latancy:"), @r#"
    plan.yaml:22:9: rounds[0].gates[0].latancy: there is no gate `latancy`
        |
     22 |       - latancy:  { probe: shoppers, p95: 800ms }
        |         ^^^^^^^ did you mean `latency`?

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(errors("loss: 5%", "damage: 5%"), @r#"
    plan.yaml:18:87: rounds[0].faults[0].network.damage: unknown field `damage`
        |
     18 |       - network: { on: recommender, to: redis, delay: { latency: 2s, jitter: 300ms }, damage: 5% }
        |                                                                                       ^^^^^^ known here: on, replicas, to, except, direction, share, flows, delay, loss, duplicate, corrupt, reorder, rate, slots, partition, reset, cut, dns, interface, seed, perSegment, unprotected, sockets, side

    1 error in plan.yaml
    "#);
}

#[test]
fn the_far_side() {
    insta::assert_snapshot!(errors("on: recommender, to: redis", "on: redis, to: recommender"), @r#"
    plan.yaml:18:24: rounds[0].faults[0].network.on: `redis` is an address: no agent can get hold of it
        |
     18 |       - network: { on: redis, to: recommender, delay: { latency: 2s, jitter: 300ms }, loss: 5% }
        |                        ^^^^^ name a process, cgroup or interface target

    plan.yaml:18:35: rounds[0].faults[0].network.to: `recommender` is not an address
        |
     18 |       - network: { on: redis, to: recommender, delay: { latency: 2s, jitter: 300ms }, loss: 5% }
        |                                   ^^^^^^^^^^^ name a target with `address`, or write 10.0.0.7/32:6379/tcp here

    2 errors in plan.yaml
    "#);
    insta::assert_snapshot!(errors("to: redis", "to: 10.0.0.7/33"), @r#"
    plan.yaml:18:41: rounds[0].faults[0].network.to: `10.0.0.7/33` is no address
        |
     18 |       - network: { on: recommender, to: 10.0.0.7/33, delay: { latency: 2s, jitter: 300ms }, loss: 5% }
        |                                         ^^^^^^^^^^^ expected CIDR[:PORT][/PROTOCOL]: 10.0.0.7/32:6379/tcp, [fd00::/64]:6379, *:53/udp

    1 error in plan.yaml
    "#);
    let plan = read(&GOOD.replacen("to: redis", "to: [redis, '10.0.0.8:53/udp']", 1)).expect("valid");
    let Some(v1::fault::Kind::Network(network)) = &plan.rounds[0].faults[0].proto.kind else { panic!() };
    assert_eq!(network.peers.len(), 2);
    assert_eq!(network.peers[1].cidrs, ["10.0.0.8/32"]);
}

#[test]
fn everything_at_once_in_the_order_of_the_file() {
    let text = GOOD
        .replacen("rate: 200/s", "rate: 200", 1)
        .replacen("hold: 60s", "hold: 60.5s", 1)
        .replacen("max: 0.12%", "max: 0.12", 1)
        .replacen("within: 47s", "within: 47", 1);
    let invalid = read(&text).expect_err("four errors");
    assert_eq!(invalid.count, 4);
    let places: Vec<&str> = invalid.text.lines().filter(|l| l.starts_with("plan.yaml:")).collect();
    insta::assert_snapshot!(places.join("\n"), @r#"
    plan.yaml:9:84: probes.shoppers.load.rate: `200` has no unit
    plan.yaml:16:11: rounds[0].hold: phases last whole seconds
    plan.yaml:23:43: rounds[0].gates[1].errors.max: `0.12` has no unit
    plan.yaml:26:46: rounds[0].gates[4].recovery.within: `47` has no unit
    "#);
}

#[test]
fn what_is_no_yaml_and_what_is_nothing() {
    insta::assert_snapshot!(read("rounds: [ {").expect_err("no YAML").text, @r#"
    plan.yaml:1:11: this is no YAML: unclosed bracket '{'
       |
     1 | rounds: [ {
       |           ^ here

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(read("").expect_err("empty").text, @r#"
    plan.yaml:1:1: found nothing
     expected a plan: apiVersion, kind, metadata, targets, probes, rounds

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(errors("kind: Plan", "kind: Plant"), @r#"
    plan.yaml:2:7: kind: `Plant` is not known
       |
     2 | kind: Plant
       |       ^^^^^ write Plan

    1 error in plan.yaml
    "#);
}

#[test]
fn a_round_needs_gates_faults_and_time() {
    let start = GOOD.find("    gates:").expect("there");
    let end = GOOD.find("decision").expect("there");
    let text = format!("{}{}", &GOOD[..start], &GOOD[end..]);
    insta::assert_snapshot!(read(&text).expect_err("no gates").text, @r#"
    plan.yaml:14:5: rounds[0]: a round without gates cannot pass
        |
     14 |   - name: redis-slow
        |     ^ add gates to it, or to the plan

    1 error in plan.yaml
    "#);
    let text = GOOD.replacen("    hold: 60s", "    hold: 60s\n    recovery: 20s", 1);
    insta::assert_snapshot!(read(&text).expect_err("too short").text, @r#"
    plan.yaml:17:15: rounds[0].recovery: the recovery gate could never be decided in this time
        |
     17 |     recovery: 20s
        |               ^^^ give at least 47s

    1 error in plan.yaml
    "#);
}

#[test]
fn what_only_the_hosts_know_has_a_place_too() {
    let of =
        |path: &str, message: &str| Blame { path: path.into(), message: message.into(), fix: "fix".into() };
    let problems = [of("targets.recommender", "matches nothing"), of("rounds[0].faults[1].cpu", "no cgroup")];
    insta::assert_snapshot!(blame(Path::new("plan.yaml"), GOOD, &problems).text, @r#"
    plan.yaml:6:3: targets.recommender: matches nothing
       |
     6 |   recommender: { process: { exe: recommender } }
       |   ^^^^^^^^^^^ fix

    plan.yaml:19:9: rounds[0].faults[1].cpu: no cgroup
        |
     19 |       - cpu: { on: recommender, load: 90% }
        |         ^^^ fix

    2 errors in plan.yaml
    "#);
}

#[test]
fn limits_are_shares_and_a_fault_may_take_some_of_the_replicas() {
    let limits = "limits: { nodes: 50%, zone: 25%, replicas: 50%, pods: 10%, injections: 4 }\ndecision:";
    let text = GOOD.replacen("decision:", limits, 1);
    let text = text.replacen("on: recommender, load: 90%", "on: recommender, replicas: 50%, load: 90%", 1);
    let text = text.replacen("on: recommender, to: redis", "on: recommender, replicas: 1, to: redis", 1);
    let plan = read(&text).expect("valid");
    let faults = &plan.rounds[0].faults;
    assert_eq!(faults[0].replicas, Some(Take::Count(1)));
    assert_eq!((faults[1].replicas, faults[2].replicas), (Some(Take::Share(0.5)), None));
    assert_eq!(faults[0].on, "recommender");
    insta::assert_snapshot!(faults[1].summary, @"cpu recommender (replicas: 50%): load 90%");
    insta::assert_snapshot!(plan.limits.line().expect("some"), @"50% of the nodes for each target, 25% of the nodes of a zone, 50% of the replicas of each target, 10% of the pods of a node, 4 injections");
}

#[test]
fn wrong_shares_and_replicas() {
    insta::assert_snapshot!(errors("decision:", "limits: { zone: 0%, replicas: 2, pods: all }\ndecision:"), @r#"
    plan.yaml:27:17: limits.zone: zero does nothing
        |
     27 | limits: { zone: 0%, replicas: 2, pods: all }
        |                 ^^ give more than 0, or leave it out

    plan.yaml:27:31: limits.replicas: `2` has no unit, and is no share
        |
     27 | limits: { zone: 0%, replicas: 2, pods: all }
        |                               ^ write which share of all of them: 50%

    plan.yaml:27:40: limits.pods: `all` is no percentage
        |
     27 | limits: { zone: 0%, replicas: 2, pods: all }
        |                                        ^^^ expected a percentage: 5%, 0.12%

    3 errors in plan.yaml
    "#);
    insta::assert_snapshot!(errors("on: recommender, load: 90%", "on: recommender, replicas: 0, load: 90%"), @r#"
    plan.yaml:19:43: rounds[0].faults[1].cpu.replicas: none would be hurt
        |
     19 |       - cpu: { on: recommender, replicas: 0, load: 90% }
        |                                           ^ expected a share or a number of them: 50%, 1

    1 error in plan.yaml
    "#);
    insta::assert_snapshot!(errors("on: recommender, load: 90%", "on: recommender, replicas: half, load: 90%"), @r#"
    plan.yaml:19:43: rounds[0].faults[1].cpu.replicas: `half` is no part of the replicas
        |
     19 |       - cpu: { on: recommender, replicas: half, load: 90% }
        |                                           ^^^^ expected a share or a number of them: 50%, 1

    1 error in plan.yaml
    "#);
}
