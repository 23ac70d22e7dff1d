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
    assert!(said.contains("stage 2 from step 4"), "{said}");
    assert!(said.contains("1 of 1 blocks sparse, 25.0 % of the KV kept"), "{said}");
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("data:image/gif"), "report without plots or sample");
    assert!(page.contains("What the attention looks like"), "report without observations");

    let json = dir.path().join("eval.json");
    let first = ok(bare(&["eval", "--out", path(&out), "--attention", "dense", "--json", path(&json)]));
    assert!(first.contains("8 triples"), "{first}");
    let again = ok(bare(&["eval", "--out", path(&out), "--attention", "dense", "--against", path(&json)]));
    assert!(again.contains("difference +0.000000 +- 0.000000"), "{again}");

    let sample = ok(bare(&["sample", "--out", path(&out), "--caption", "a red ball", "--seed", "3"]));
    assert!(
        sample.contains("1 clips in ") && sample.contains("100 % of the blocks sparse; full attention "),
        "{sample}"
    );
    let dense =
        ok(bare(&["sample", "--out", path(&out), "--attention", "dense", "--set", "sample.solver=heun"]));
    assert!(dense.contains(" ms, full attention"), "{dense}");
    assert!(page.contains("sampling: one evaluation of "), "the report does not say how fast sampling was");
    assert!(sample.contains("samples/sample.gif") && out.join("samples/sample.gif").exists(), "{sample}");
    let report = dir.path().join("both.html");
    ok(bare(&["report", path(&out), path(&out), "--out", path(&report)]));
    let before = std::fs::read_to_string(&report).unwrap();
    assert!(!before.contains("Granularity of the lists"));

    let told = ok(bare(&["granularity", "--out", path(&out), "--samples", "1", "--cubes", "--gpu", "h100"]));
    for wanted in [
        "128 x 8  4x4x8",
        "no kernel serves head_dim 32",
        "Cubes of tokens",
        "granularity.svg",
        "granularity.md",
    ] {
        assert!(told.contains(wanted), "{wanted}: {told}");
    }
    ok(bare(&["report", path(&out), "--out", path(&report)]));
    let page = std::fs::read_to_string(&report).unwrap();
    assert!(page.contains("Granularity of the lists") && page.contains("KV kept against mass covered"));
    let refused = error(bare(&["granularity", "--out", path(&out), "--gpu", "b200"]));
    assert!(refused.contains("allowed: h100, h200"), "{refused}");
    let refused = error(bare(&["granularity", "--out", path(&out), "--record", path(&json)]));
    assert!(refused.contains("eval.json line 1 is no record"), "{refused}");
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

/// Step, loss and norm of every step in a run's metrics, the last line of each step counting.
fn losses(out: &Path) -> std::collections::BTreeMap<u64, (f64, f64)> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    let steps = lines.filter(|v| v["kind"] == "step");
    let number = |v: &serde_json::Value, key: &str| v[key].as_f64().unwrap();
    steps.map(|v| (v["step"].as_u64().unwrap(), (number(&v, "loss"), number(&v, "grad_norm")))).collect()
}

#[test]
fn killed_at_random_moments_it_resumes_bit_for_bit() {
    let sets = [
        "train.steps=150",
        "dsv.switch=60",
        "train.checkpoint_every=4",
        "train.keep_checkpoints=2",
        "train.deterministic=true",
        "train.ema_decay=0.9",
        // What is on the host or in eight bits when it dies: nothing of it counts but the checkpoint.
        "train.ema_on=host",
        "train.moments=8bit",
        "train.kept_budget_gb=0.0001",
        "dsv.dispatch_every=7",
    ];
    let dir = tempfile::tempdir().unwrap();
    // Names of one length: the configuration in a state is aligned.
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("pause"));
    let began = Instant::now();
    ok(command(&["run", "--preset", "tiny", "--out", path(&whole)], &sets));
    let duration = began.elapsed();

    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let mut state = seed;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 24) as f64
    };
    let checkpoints = cut.join("checkpoints");
    let started = || {
        let names = std::fs::read_dir(&checkpoints).into_iter().flatten().flatten().map(|e| e.file_name());
        names.filter(|n| n.to_string_lossy().starts_with("step-")).count() > 0
    };
    let steps = || {
        let text = std::fs::read_to_string(cut.join("metrics.jsonl")).unwrap_or_default();
        text.matches("\"kind\":\"step\"").count()
    };
    let mut kills = Vec::new();
    for life in 0.. {
        assert!(life < 60, "seed {seed}: no end after {life} lives, killed at {kills:?}");
        let how = if started() { "--resume" } else { "--overwrite" };
        let mut child = command(&["run", "--preset", "tiny", "--out", path(&cut), how], &sets)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A random number of steps further than the last life came, and at a random moment of the step after.
        let dies = kills.last().copied().unwrap_or(0) + 1 + (14.0 * random()) as usize;
        let alive = |child: &mut std::process::Child| child.try_wait().unwrap().is_none();
        while kills.len() < 8 && steps() < dies && alive(&mut child) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(duration.mul_f64(random() / 100.0));
        if kills.len() < 8 && alive(&mut child) {
            // SIGKILL: nothing of the program runs after it.
            child.kill().unwrap();
            child.wait().unwrap();
            kills.push(steps());
            continue;
        }
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "seed {seed}, killed at {kills:?}: {}", text(&output));
        break;
    }
    assert!(kills.len() >= 4, "seed {seed}: the run ended after {} kills", kills.len());
    for file in ["model.safetensors", "state.json"] {
        let read = |out: &Path| std::fs::read(out.join("checkpoints/step-00000150").join(file)).unwrap();
        let (mut a, mut b) = (read(&whole), read(&cut));
        if file == "state.json" {
            // The folder's name is part of the configuration in it.
            let of = |bytes: &[u8], out: &Path| String::from_utf8_lossy(bytes).replace(path(out), "DIR");
            (a, b) = (of(&a, &whole).into_bytes(), of(&b, &cut).into_bytes());
        }
        assert!(a == b, "seed {seed}, killed at {kills:?}: {file} differs");
    }
    assert_eq!(losses(&whole), losses(&cut), "seed {seed}, killed at {kills:?}");
    let left: Vec<_> = std::fs::read_dir(&checkpoints).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 2, "half a checkpoint was left: {left:?}");
}

#[test]
fn quality_runs_fork_from_one_stage_one() {
    let dir = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/quality.sh");
    let call = |only: &str, sets: &[&str]| {
        let mut command = Command::new("sh");
        command.arg(&script).args([path(dir.path()), "300"]);
        let lists = ["dsv.query_group=8", "dsv.kv_block=8", "dsv.profile_every=2", "device.kind=cpu"];
        let small = ["model.heads=2", "model.head_dim=12", "data.batch_size=1", "train.steps=8"];
        for set in SMALL.iter().chain(&lists).chain(&small).chain(sets) {
            command.args(["--set", set]);
        }
        command.env("DSV_TRAIN", env!("CARGO_BIN_EXE_dsv-train")).env("SEEDS", "1").env("ONLY", only);
        command.env(
            "VARIANTS",
            "need:dsv.share=need,dsv.max_keep=0.5 b16:dsv.kv_block=16,train.deterministic=false",
        );
        command
    };
    ok(call("full dsv", &[]));
    let said = ok(call("full dsv need b16 wa-m", &[]));
    assert_eq!(said.matches("steps 4 to 8").count(), 2, "forks that were there are not run again: {said}");
    assert_eq!(said.matches("difference ").count(), 4, "{said}");
    assert!(dir.path().join("report.html").exists() && dir.path().join("evals.txt").exists());
    let of = |name: &str| losses(&dir.path().join(format!("{name}-1")));
    let (base, full) = (of("base"), of("full"));
    assert_eq!((base.len(), full.len()), (4, 8));
    for name in ["full", "dsv", "need", "b16"] {
        assert!(base.iter().all(|(step, loss)| of(name)[step] == *loss), "{name} began otherwise");
        assert_eq!(of(name).len(), 8);
    }
    assert!(full != of("dsv") && of("dsv") != of("b16"), "forks that are alike");
    let config = std::fs::read_to_string(dir.path().join("full-1/config.toml")).unwrap();
    assert!(config.contains("switch = 8 ") && config.contains("deterministic = true "), "{config}");

    for (only, sets, wanted) in [
        ("full b9", vec![], "ONLY names b9; allowed: full dsv need b16 wa-m wa-l"),
        ("full", vec!["dsv.switch=loss < 0.1"], "allowed: 1 to 7, as in --set dsv.switch=2"),
        ("full", vec!["dsv.switch=8"], "allowed: 1 to 7"),
    ] {
        let output = call(only, &sets).output().unwrap();
        assert!(output.status.code() == Some(2) && text(&output).contains(wanted), "{}", text(&output));
    }
}

#[test]
fn a_run_stops_after_the_step_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let go = |args: &[&str]| {
        let mut command = bare(&["run", "--out", path(dir.path())]);
        command.args(args);
        command
    };
    let mut first = command(&["run", "--preset", "tiny", "--out", path(dir.path())], &["train.steps=6"]);
    first.args(["--until", "3"]);
    let said = ok(first);
    assert!(said.contains("steps 0 to 3") && said.contains("stopped after 3 of 6 steps"), "{said}");
    for until in ["0", "3", "7"] {
        let said = error(go(&["--resume", "--until", until]));
        assert!(said.contains(&format!("--until is {until}; 3 of 6 steps")), "{said}");
        assert!(said.contains("allowed: 4 to 6"), "{said}");
    }
    let said = ok(go(&["--resume"]));
    assert!(said.contains("steps 3 to 6") && said.contains("sample.gif"), "{said}");
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
fn blocks_and_whole_steps_are_timed() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("bench.json");
    let args = ["bench", "--preset", "tiny", "--tokens", "128,256", "--blocks", "8x8,16x8", "--repeats", "2"];
    let mut timed = command(&args, &["data.batch_size=1"]);
    timed.args(["--ops", "--whole", "--json", path(&json)]);
    let said = ok(timed);
    for wanted in
        ["256 tokens, full:", "256 tokens, fixed 16x8, 25.0 % kept:", "attn_bwd", "ms a step", "speed-up"]
    {
        assert!(said.contains(wanted), "no '{wanted}' in\n{said}");
    }
    let all: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    let cases = all["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 6, "two lengths of full attention and two list sizes");
    for case in cases {
        let time = &case["time"];
        assert!(time["ms"].as_f64().unwrap() >= time["pass"]["min"].as_f64().unwrap(), "{case}");
        assert!(case["whole_step"]["Ok"]["median"].as_f64().unwrap() > 0.0, "{case}");
        assert!(case["error"].is_null() && time["ops"].as_array().unwrap().len() > 10, "{case}");
    }

    let said = error(command(&["bench", "--preset", "tiny", "--tokens", "100"], &[]));
    assert!(
        said.contains("100 tokens are no whole number of frames") && said.contains("--tokens 128"),
        "{said}"
    );
    for (option, value, wanted) in
        [("--attention", "half", "full, fixed, dsv, wa-m, wa-l"), ("--blocks", "64", "as in 64x64")]
    {
        let output = bare(&["bench", option, value]).output().unwrap();
        assert!(!output.status.success() && text(&output).contains(wanted), "{}", text(&output));
    }
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

#[test]
fn a_plan_needs_no_gpu_and_says_what_would_fit() {
    let said = ok(bare(&["plan", "--preset", "30b", "--gpu", "h100", "--gpus", "16"]));
    for wanted in
        ["NVIDIA H100", "each of 16", "moments", "16 GPUs: fits", "ms of a step, estimated", "--set "]
    {
        assert!(said.contains(wanted), "no '{wanted}' in\n{said}");
    }
    let said = error(bare(&["plan", "--gpu", "gt710"]));
    assert!(said.contains("--gpu gt710 is not known") && said.contains("h100, h200"), "{said}");
}
