//! The program as a user runs it: a short run on the CPU, a stop by signal, and what it says of bad input.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const SMALL: [&str; 12] = [
    "model.layers=1",
    "data.frames=2",
    "data.height=8",
    "data.width=8",
    "data.clips=12",
    "data.validation=2",
    "train.log_every=1",
    "train.eval_every=0",
    "dsv.switch=4",
    "dsv.profile_queries=4",
    "sample.steps=2",
    "train.warmup_steps=2",
];

fn command(args: &[&str], sets: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsv-train"));
    command.args(args);
    for set in SMALL.iter().chain(sets) {
        command.args(["--set", set]);
    }
    command
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn ok(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

fn error(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    text(&output)
}

fn bare(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsv-train"));
    command.args(args);
    command
}

fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}

#[test]
fn train_evaluate_sample_report() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let said = ok(command(&["run", "--preset", "tiny", "--out", path(&out)], &["train.steps=8"]));
    for name in ["report.html", "sample.gif", "step-00000008"] {
        assert!(said.contains(name), "{said}");
    }
    assert!(said.contains("stage 2 from step 4") && said.contains("1 of 1 blocks sparse"), "{said}");
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("data:image/gif"), "report without plots or sample");
    assert!(page.contains("What the attention looks like"), "report without observations");

    let json = dir.path().join("eval.json");
    let first = ok(bare(&["eval", "--out", path(&out), "--attention", "dense", "--json", path(&json)]));
    assert!(first.contains("8 triples"), "{first}");
    let again = ok(bare(&["eval", "--out", path(&out), "--attention", "dense", "--against", path(&json)]));
    assert!(again.contains("difference +0.000000 +- 0.000000"), "{again}");

    let sample = ok(bare(&["sample", "--out", path(&out), "--caption", "a red ball", "--seed", "3"]));
    assert!(sample.contains("samples/sample.gif") && out.join("samples/sample.gif").exists(), "{sample}");
    let report = dir.path().join("both.html");
    ok(bare(&["report", path(&out), path(&out), "--out", path(&report)]));
    assert!(report.exists());
}

#[test]
fn a_signal_leaves_a_checkpoint_that_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut child =
        command(&["run", "--preset", "tiny", "--out", path(&out)], &["train.steps=100000", "data.clips=64"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
    let metrics = out.join("metrics.jsonl");
    let began = Instant::now();
    while !std::fs::read_to_string(&metrics).is_ok_and(|m| m.matches("\"kind\":\"step\"").count() > 3) {
        assert!(began.elapsed() < Duration::from_secs(60), "the run makes no steps");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    while child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(90), "the run does not stop");
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    let said = text(&output);
    assert!(output.status.success() && said.contains("dsv-train run --resume --out"), "{said}");
    let step: u64 = said.split("stopped after ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let steps = format!("train.steps={}", step + 2);
    let resumed = ok(bare(&["run", "--resume", "--out", path(&out), "--set", &steps]));
    assert!(resumed.contains(&format!("steps {step} to {}", step + 2)), "{resumed}");
}

#[test]
fn a_folder_with_a_run_is_not_overwritten_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["run", "--preset", "tiny", "--out", path(dir.path())];
    ok(command(&args, &["train.steps=2"]));
    let said = error(command(&args, &["train.steps=2"]));
    assert!(said.contains("already holds a run up to step 2") && said.contains("--resume"), "{said}");
    let mut overwrite = args.to_vec();
    overwrite.push("--overwrite");
    ok(command(&overwrite, &["train.steps=2"]));
}

#[test]
fn bad_input_says_what_is_wrong_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let said = error(bare(&["run", "--set", "train.stepz=3"]));
    assert!(said.contains("train.stepz") && said.contains("steps"), "{said}");
    let said = error(bare(&["run", "--preset", "medium"]));
    assert!(said.contains("tiny, 0.8b, 2.7b, 30b"), "{said}");
    let said = error(bare(&["plan", "--set", "data.height=9", "--set", "model.patch=[1,2,2]"]));
    assert!(said.contains("data.height is 9") && said.contains("8 or 10"), "{said}");
    let nothing = dir.path().join("nothing");
    let said = error(command(&["run", "--resume", "--preset", "tiny", "--out", path(&nothing)], &[]));
    assert!(said.contains("no checkpoint in"), "{said}");
    let said = error(bare(&["eval", "--out", path(&nothing)]));
    assert!(said.contains("config.toml"), "{said}");
    let said = error(bare(&["run", "--set", "data.kind=shards", "--set", "data.path=nowhere"]));
    assert!(said.contains("no shards") && said.contains("dsv-train prepare"), "{said}");
}

#[test]
fn the_plan_is_a_configuration_that_loads() {
    let dir = tempfile::tempdir().unwrap();
    let output = bare(&["plan", "--preset", "2.7b", "--set", "device.kind=cpu"]).output().unwrap();
    let plan = String::from_utf8(output.stdout).unwrap();
    assert!(
        plan.contains("# parameters 2") && plan.contains("self-attention") && plan.contains("[dsv]"),
        "{plan}"
    );
    let file = dir.path().join("c.toml");
    std::fs::write(&file, &plan).unwrap();
    let again = ok(bare(&["plan", path(&file)]));
    assert!(again.contains("preset = \"2.7b\""), "{again}");
}
