//! The exit codes and the two output streams of the built `squall`, as a script sees them.

use std::{
    path::Path,
    process::{Command, Output},
};

const PLAN: &str = "
apiVersion: squall.dev/v1
kind: Plan
metadata: { name: test }
targets: { web: { process: { exe: no-such-service } } }
rounds:
  - { name: first, baseline: 1s, hold: 2s, recovery: 1s, faults: [ { cpu: { on: web, load: 90% } } ],
      gates: [ { oom: { target: web } } ] }
";

/// Runs squall where no agent listens and none can be started.
fn squall(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_squall"))
        .args(args)
        .current_dir(dir)
        .env("SQUALL_SOCKET", dir.join("agent.sock"))
        .env("SQUALL_STATE_DIR", dir.join("state"))
        .env("SQUALL_AGENT", "/bin/false")
        .output()
        .expect("squall runs")
}

struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn ran(dir: &Path, args: &[&str]) -> Ran {
    let output = squall(dir, args);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("plan.yaml"), PLAN).expect("written");
    std::fs::write(dir.path().join("wrong.yaml"), PLAN.replace("hold: 2s", "hold: 2")).expect("written");
    dir
}

#[test]
fn a_wrong_command_is_2_and_says_why_on_stderr() {
    let dir = dir();
    for args in
        [&["frobnicate"][..], &["inject", "cpu"], &["revert"], &["--agents", "http://10.0.0.1:1", "status"]]
    {
        let ran = ran(dir.path(), args);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("error:"), "{}", ran.stderr);
    }
}

#[test]
fn a_wrong_plan_is_2_names_the_line_and_leaves_no_run() {
    let dir = dir();
    for command in ["check", "run"] {
        let ran = ran(dir.path(), &[command, "wrong.yaml"]);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{}", ran.stderr);
        assert!(ran.stderr.contains("wrong.yaml:7:40: rounds[0].hold: `2` has no unit"), "{}", ran.stderr);
        assert!(ran.stderr.contains("write 2ms or 2s"), "{}", ran.stderr);
    }
    let ran = ran(dir.path(), &["run", "nothing.yaml"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(!dir.path().join("runs").exists());
}

#[test]
fn without_an_agent_the_asking_commands_are_2_and_say_what_to_do() {
    let dir = dir();
    for args in [&["status"][..], &["nodes"], &["revert", "abc"], &["-o", "json", "status"]] {
        let ran = ran(dir.path(), args);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("no agent answers at unix://"), "{}", ran.stderr);
    }
}

#[test]
fn an_agent_that_was_named_and_is_gone_is_4_and_the_run_is_on_record() {
    let dir = dir();
    let gone = format!("unix://{}", dir.path().join("gone.sock").display());
    let status = ran(dir.path(), &["--agents", &gone, "status"]);
    assert_eq!(status.code, Some(4), "{}", status.stderr);
    let run = ran(dir.path(), &["--agents", &gone, "run", "plan.yaml"]);
    assert_eq!(run.code, Some(4), "{}", run.stderr);
    let runs: Vec<_> = std::fs::read_dir(dir.path().join("runs")).expect("runs").flatten().collect();
    assert_eq!(runs.len(), 1);
    for file in ["plan.yaml", "events.jsonl", "report.html", "report.json"] {
        assert!(runs[0].path().join(file).is_file(), "{file}");
    }
    let id = runs[0].file_name().into_string().expect("a name");
    let report = ran(dir.path(), &["report", &id[..2], "-f", "json"]);
    assert_eq!(report.code, Some(0), "{}", report.stderr);
    let json: serde_json::Value = serde_json::from_str(&report.stdout).expect("JSON");
    assert!(json.to_string().contains("aborted"), "{json}");
}

#[test]
fn the_command_that_a_report_gives_to_run_again_is_one() {
    let dir = dir();
    let gone = format!("unix://{}", dir.path().join("gone.sock").display());
    let run = ran(dir.path(), &["--agents", &gone, "run", "plan.yaml", "--seed", "4711"]);
    assert_eq!(run.code, Some(4), "{}", run.stderr);
    let run = std::fs::read_dir(dir.path().join("runs")).expect("runs").flatten().next().expect("one").path();
    let read = |file: &str| std::fs::read_to_string(run.join(file)).expect(file);
    assert!(read("events.jsonl").contains("\"seed\":4711"));
    assert!(read("report.html").contains("squall run plan.yaml --seed 4711"));
}

#[test]
fn an_agent_that_cannot_be_started_is_our_failure() {
    let dir = dir();
    let ran = ran(dir.path(), &["run", "plan.yaml"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(5), ""), "{}", ran.stderr);
    assert!(ran.stderr.contains("/bin/false ended at once"), "{}", ran.stderr);
}

#[test]
fn help_is_no_error_and_explains_the_codes() {
    let dir = dir();
    for args in [&["--help"][..], &["--version"], &["help", "exit-codes"], &["exit-codes"]] {
        let ran = ran(dir.path(), args);
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{args:?}");
        assert!(!ran.stdout.is_empty());
    }
    assert!(ran(dir.path(), &["help", "exit-codes"]).stdout.contains("5  squall itself failed"));
}

#[test]
fn a_run_that_is_not_there_is_2() {
    let dir = dir();
    let ran = ran(dir.path(), &["report", "7f3a"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{}", ran.stderr);
}
