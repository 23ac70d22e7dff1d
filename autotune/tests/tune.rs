//! The tuner without a GPU: from recorded lines to a table, what a resumed run leaves out, the report, the command
//! line. The times here come from a formula, not from a GPU.

use dsv_autotune::listgen::ListKind;
use dsv_autotune::plan::{Case, Contest, Mode, Plan, Step};
use dsv_autotune::records::{KernelNote, Key, RECORD_FILE, RecordFile, Records, Run, RunDir, todo};
use dsv_autotune::reduce::{merge, reduce, rows, to_nanosecond};
use dsv_autotune::report::Report;
use dsv_autotune::ruler::Peer;
use dsv_autotune::selection::Selection;
use dsv_autotune::summary;
use dsv_spec::{
    Arch, AttnOp, Budget, Deterministic, DispatchTable, Found, GroupRule, KernelSpec, Outcome, Problem,
    TableMeta, Timing, TuneRecord,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

fn meta() -> TableMeta {
    TableMeta {
        schema: dsv_spec::SCHEMA,
        gpu: "NVIDIA Formula 1".into(),
        arch: Arch::Sm90a,
        driver: "580.0".into(),
        compiler: "13.0.88".into(),
        clocks: "SM 1000 MHz, memory 2000 MHz".into(),
        date: "2026-01-02".into(),
    }
}

/// A time that depends on the work and the tile, so that winners are known: larger tiles are faster, the
/// deterministic backward is slower.
fn formula_us(case: &Case, step: Step, spec: &KernelSpec) -> f64 {
    let KernelSpec::Attn(s) = spec else { return 100.0 };
    let tile = s.tile();
    let rate = 2.0 * (tile.block_m as f64 + tile.block_n as f64) + tile.stages as f64;
    let form = if step == Step::Backward && s.deterministic() == Deterministic::Yes { 1.25 } else { 1.0 };
    20.0 + form * case.flops(step.op()) / (rate * 1e6)
}

fn record(contest: &Contest, spec: KernelSpec, outcome: Option<Outcome>) -> TuneRecord {
    let median_us = to_nanosecond(formula_us(&contest.case, contest.step, &spec));
    let timing = Timing { median_us, spread_us: to_nanosecond(median_us / 50.0), samples: 12 };
    TuneRecord {
        spec,
        problem: contest.case.problem(contest.step.op()),
        sparsity: contest.case.sparsity(),
        lists: contest.case.kind.name().into(),
        source_hash: format!("{:064x}", spec.name().len()),
        outcome: outcome.unwrap_or(Outcome::Ok { timing, error_ratio: 0.5 }),
    }
}

/// The kernel the formula likes best.
fn fastest(contest: &Contest) -> KernelSpec {
    let us = |spec: &KernelSpec| formula_us(&contest.case, contest.step, spec);
    contest
        .specs
        .iter()
        .copied()
        .min_by(|a, b| us(a).total_cmp(&us(b)).then(a.name().cmp(&b.name())))
        .unwrap()
}

/// Everything a run would record. The fastest dense forward is wrong, and where three or more compete, the last does
/// not compile.
fn recorded(plan: &Plan) -> Vec<TuneRecord> {
    let mut out = Vec::new();
    for contest in plan.contests(Arch::Sm90a) {
        let wrong =
            (contest.case.lists.is_dense() && contest.step == Step::Forward).then(|| fastest(&contest));
        let refused = contest.specs.get(2).and(contest.specs.iter().rfind(|s| wrong != Some(**s))).copied();
        for &spec in &contest.specs {
            let failure = if wrong == Some(spec) {
                Some(Outcome::Wrong { message: "out: largest error 1 > 0.1 at [0, <1>, 2]".into() })
            } else if refused == Some(spec) {
                Some(Outcome::Compile { message: "it spills 8 bytes".into() })
            } else {
                None
            };
            out.push(record(&contest, spec, failure));
        }
    }
    out
}

fn quick_d128() -> Plan {
    Plan::tune(Mode::Quick, Some("d128")).unwrap()
}

fn as_jsonl(records: &[TuneRecord]) -> String {
    records.iter().map(|r| serde_json::to_string(r).unwrap() + "\n").collect()
}

/// Lines recorded once (by the formula), so that a change of the candidates changes no snapshot.
const LINES: &str = include_str!("formula.jsonl");

#[test]
fn records_reduce_to_this_table() {
    let read = Records::parse(LINES);
    assert_eq!(read.bad, []);
    let reduction = reduce(&read.records, meta());
    assert_eq!(reduction.notes, Vec::<String>::new());
    let json = reduction.table.to_json();
    insta::assert_snapshot!("table", json);
    assert_eq!(DispatchTable::from_json("here", &json).unwrap(), reduction.table, "the table reads back");
}

#[test]
fn the_table_answers_both_kinds_of_callers() {
    let table = reduce(&recorded(&quick_d128()), meta()).table;
    let case = Case::dense(128, 16, 32768);
    let exact = |op, deterministic| {
        let problem = Problem { deterministic, ..case.problem(op) };
        match table.lookup(&problem) {
            Found::Exact(entry) => entry.clone(),
            other => panic!("{op} {deterministic}: {other:?}"),
        }
    };
    let (no, yes) = (Deterministic::No, Deterministic::Yes);
    assert_eq!(exact(AttnOp::Fwd, no).kernel, exact(AttnOp::Fwd, yes).kernel);
    let (fast, same_bits) = (exact(AttnOp::Bwd, no), exact(AttnOp::Bwd, yes));
    assert!(fast.kernel.name().contains("_nondet_") && same_bits.kernel.name().contains("_det_"));
    assert!(fast.median_us < same_bits.median_us);
    assert!(same_bits.tried < fast.tried, "the deterministic line counts its own form only");
    assert!(exact(AttnOp::BwdDq, yes).kernel.name().starts_with("attn_bwd_dq"));
    // The wrong kernel would have won.
    let forward = exact(AttnOp::Fwd, no);
    let contests = quick_d128().contests(Arch::Sm90a);
    let contest = contests.iter().find(|c| c.case == case && c.step == Step::Forward).unwrap();
    assert_ne!(forward.kernel, fastest(contest));
    assert_eq!((forward.failed, forward.tried), (2, contest.specs.len() as u32));
}

#[test]
fn order_and_repetition_of_records_change_nothing_but_the_latest_counts() {
    let records = recorded(&quick_d128());
    let table = reduce(&records, meta()).table;
    let mut reversed = records.clone();
    reversed.reverse();
    assert_eq!(reduce(&reversed, meta()).table, table);
    // Measured again, the old winner is slow: the later record counts.
    let winner = table.entries[0].clone();
    let mut again = records
        .iter()
        .find(|r| r.spec == winner.kernel && r.problem.bucket().seqlen == winner.bucket.seqlen)
        .unwrap()
        .clone();
    again.outcome =
        Outcome::Ok { timing: Timing { median_us: 1e9, spread_us: 0.0, samples: 1 }, error_ratio: 0.1 };
    let later: Vec<TuneRecord> = records.into_iter().chain([again]).collect();
    let entry = &reduce(&later, meta()).table.entries[0];
    assert_eq!(entry.bucket, winner.bucket);
    assert!(entry.kernel != winner.kernel && entry.tried == winner.tried);
}

#[test]
fn crossovers_are_interpolated_never_or_always() {
    let plan = Plan::tune(Mode::Full, Some("d128 s32768")).unwrap();
    // Sparse costs `slow` times what the formula says.
    let crossover = |slow: f64| {
        let mut records = recorded(&plan);
        for record in records.iter_mut().filter(|r| !r.problem.lists.is_dense()) {
            if let Outcome::Ok { timing, .. } = &mut record.outcome {
                timing.median_us *= slow;
            }
        }
        let table = reduce(&records, meta()).table;
        table.crossover(dsv_spec::Dtype::Bf16, 128, 128, 128, 32768).unwrap().clone()
    };
    let between = crossover(3.0);
    let sparsities: Vec<u8> = between.sparse_us.iter().map(|p| p.0).collect();
    assert_eq!(sparsities, [50, 75, 90, 95]);
    let at = between.crossover.unwrap();
    assert!((50.0..75.0).contains(&at), "{at}");
    assert!(between.select_us == 600.0 && between.workspace_bytes > 0);
    assert_eq!(crossover(1000.0).crossover, None, "never");
    assert_eq!(crossover(0.1).crossover, Some(50.0), "from the lowest measured on");
    // Without selection there is no crossover, and a note says so.
    let without: Vec<TuneRecord> =
        recorded(&plan).into_iter().filter(|r| !matches!(r.spec, KernelSpec::Select(_))).collect();
    let reduction = reduce(&without, meta());
    assert!(reduction.table.crossovers.is_empty());
    assert!(
        reduction.notes.iter().any(|n| n.contains("no crossover") && n.contains("selection")),
        "{:?}",
        reduction.notes
    );
}

/// Selections of finer lists, and others of the same lists, change no line and no crossover of block lists.
#[test]
fn fine_selections_do_not_disturb_the_table() {
    let plan = Plan::tune(Mode::Full, Some("d128 s32768")).unwrap();
    let records = recorded(&plan);
    let before = reduce(&records, meta());
    let mut others = Vec::new();
    for case in plan.cases.iter().filter(|c| !c.lists.is_dense() && c.kind == ListKind::Random) {
        let fine = |kv_block| {
            let (query_group, _) = case.lists.block_size();
            Case::sparse(128, 16, 32768, (query_group, kv_block), 0.1, case.kind)
        };
        for case in [*case, fine(1), fine(8)] {
            for &rule in GroupRule::ALL {
                for &budget in Budget::ALL {
                    for spec in (Selection { case, rule, budget }).kernels(Arch::Sm90a) {
                        let contest = Contest { case, step: Step::Select, specs: vec![] };
                        let mut record = record(&contest, KernelSpec::Select(spec), None);
                        // The one that counts is on record already.
                        if records.iter().any(|r| (r.spec, r.problem) == (record.spec, record.problem)) {
                            continue;
                        }
                        if let Outcome::Ok { timing, .. } = &mut record.outcome {
                            timing.median_us = 1e6;
                        }
                        others.push(record);
                    }
                }
            }
        }
    }
    assert!(others.len() > 100, "{}", others.len());
    let all = [records.clone(), others.clone()].concat();
    assert_eq!(reduce(&all, meta()), before);
    assert_eq!(reduce(&[others, records].concat(), meta()), before);
    assert_eq!(before.table.crossovers.len(), 2);
    // Fine lists that were measured have their own total, without an inversion that no one reads.
    let request = Plan { cases: vec![Case::sparse(128, 16, 32768, (128, 8), 0.1, ListKind::Random)], ..plan };
    let fine = recorded(&request);
    let row = rows(&fine).remove(0);
    let attention =
        row.forward.as_ref().unwrap().timing.median_us + row.backward.as_ref().unwrap().timing.median_us;
    assert_eq!((row.select_us, row.invert_us, row.lists_us()), (Some(100.0), None, Some(100.0)));
    assert_eq!(row.total_us(), Some(attention + 100.0));
    // And they are shown.
    assert!(summary::records(&fine).contains("kv_select_fine_bf16_r16_qg128_kb8_centre_max_topk"));
    assert!(summary::comparison(&rows(&fine), &[]).contains("0.100"));
    let both = [recorded(&Plan::tune(Mode::Full, Some("d128 s32768")).unwrap()), fine].concat();
    let reduced = reduce(&both, meta()).table;
    let of_blocks =
        |t: &DispatchTable| -> Vec<_> { t.crossovers.iter().filter(|c| c.kv_block >= 64).cloned().collect() };
    assert_eq!(of_blocks(&reduced), of_blocks(&before.table));
    assert_eq!(reduced.crossovers.len(), 3);
}

/// A form for neighbours whose lists overlap serves where it costs nothing over random lists and gains over clustered ones.
#[test]
fn pairs_serve_where_they_lose_nothing() {
    let forward = |us: [f64; 2], over: ListKind| {
        let case = Case::sparse(96, 16, 32768, (64, 64), 0.1, over);
        let contest = Contest { case, step: Step::Forward, specs: vec![] };
        [("m64n64_g1c1s2x1_grid", us[0]), ("m128n128_g2c2s3x1_persistent", us[1])].map(|(form, us)| {
            let name = format!("attn_fwd_bf16_d96_qg64_kb64_spany_{form}_det_sm90a");
            let mut record = record(&contest, name.parse().unwrap(), None);
            if let Outcome::Ok { timing, .. } = &mut record.outcome {
                timing.median_us = us;
            }
            record
        })
    };
    // Times of the plain form and of pairs, over random and over clustered lists.
    let groups = |random, clustered| {
        let records = [forward(random, ListKind::Random), forward(clustered, ListKind::Clustered)].concat();
        let table = reduce(&records, meta()).table;
        let kernels: Vec<KernelSpec> = table.entries.iter().map(|entry| entry.kernel).collect();
        assert!(!kernels.is_empty() && kernels.iter().all(|kernel| *kernel == kernels[0]));
        let KernelSpec::Attn(spec) = kernels[0] else { panic!("{}", kernels[0]) };
        spec.tile().groups
    };
    assert_eq!(groups([100.0, 101.0], [95.0, 90.0]), 2);
    assert_eq!(groups([100.0, 103.0], [95.0, 80.0]), 1, "slower over random lists");
    assert_eq!(groups([100.0, 101.0], [95.0, 94.0]), 1, "no gain beyond the noise");
    assert_eq!(groups([100.0, 90.0], [95.0, 99.0]), 2, "faster over random lists");
}

#[test]
fn a_partial_run_is_merged_into_a_table_of_the_same_machine_only() {
    let whole = reduce(&recorded(&quick_d128()), meta()).table;
    let part = Plan::tune(Mode::Quick, Some("d128 s4096 dense")).unwrap();
    let mut new = reduce(&recorded(&part), TableMeta { date: "2026-02-03".into(), ..meta() }).table;
    new.entries[0].median_us = 0.5;
    let (merged, dropped) = merge(whole.clone(), new.clone());
    assert_eq!((merged.entries.len(), dropped), (whole.entries.len(), None));
    assert_eq!(merged.crossovers, whole.crossovers);
    assert!(merged.entries.iter().any(|e| e.median_us == 0.5));
    DispatchTable::from_json("merged", &merged.to_json()).unwrap();
    let elsewhere = DispatchTable { meta: TableMeta { driver: "999".into(), ..meta() }, ..whole };
    let (alone, why) = merge(elsewhere, new.clone());
    assert_eq!(alone, new);
    assert!(why.unwrap().contains("driver 999 is now 580.0"));
}

#[test]
fn a_resumed_run_leaves_out_what_is_on_record() {
    let plan = quick_d128();
    let contests = plan.contests(Arch::Sm90a);
    let contest = contests.iter().find(|c| c.step == Step::Forward).unwrap();
    let hash = |spec: &KernelSpec| format!("{:064x}", spec.name().len());
    let mut records = vec![record(contest, contest.specs[0], None)];
    records.push(record(contest, contest.specs[1], Some(Outcome::Timeout { message: "20 s".into() })));
    let done = records.iter().map(Key::of).collect();
    assert_eq!(todo(contest, &done, hash), contest.specs[2..], "a failure on record is not tried again");
    // The same kernels on another case are open, and so is a kernel whose text has changed.
    let other = contests.iter().find(|c| c.step == Step::Forward && c.case != contest.case).unwrap();
    assert_eq!(todo(other, &done, hash), other.specs);
    assert_eq!(todo(contest, &done, |_| "changed".into()), contest.specs);
}

#[test]
fn a_corrupt_line_is_named_and_nothing_is_lost() {
    let temp = tempfile::tempdir().unwrap();
    let dir = RunDir::new(temp.path());
    let plan = quick_d128();
    dir.begin(&Run { plan: plan.clone(), device: 0, machine: Some(meta()) }).unwrap();
    let records = recorded(&plan);
    let path = dir.file(RECORD_FILE);
    RecordFile::open(&path).unwrap().append(&records[0]).unwrap();
    // A line cut short, as by a lost machine, and bytes that are no text.
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend_from_slice(b"{\"spec\":\"attn_fwd_bf16\xff\xfe");
    std::fs::write(&path, &bytes).unwrap();
    RecordFile::open(&path).unwrap().append(&records[1]).unwrap();
    let read = dir.read_records().unwrap();
    assert_eq!(read.records, records[..2]);
    assert_eq!(read.bad.len(), 1);
    let words = read.bad[0].to_string();
    assert!(words.contains("line 2") && words.contains("attn_fwd_bf16"), "{words}");
    assert!(std::fs::read(&path).unwrap().starts_with(&bytes), "what was there is there");
    // A record whose kernel cannot exist any more is a bad line, not a crash.
    let foreign = as_jsonl(&records[..1]).replace("_m128n128_", "_m128n120_");
    assert_eq!(Records::parse(&foreign).bad.len(), 1);
}

#[test]
fn beginning_anew_keeps_the_records_before() {
    let temp = tempfile::tempdir().unwrap();
    let dir = RunDir::new(&temp.path().join("run"));
    let run = Run { plan: quick_d128(), device: 0, machine: None };
    assert_eq!(dir.begin(&run).unwrap(), None);
    RecordFile::open(&dir.file(RECORD_FILE)).unwrap().append(&recorded(&run.plan)[0]).unwrap();
    let kept = dir.begin(&run).unwrap().unwrap();
    assert!(kept.ends_with("records-1.jsonl"));
    assert_eq!(std::fs::read_to_string(kept).unwrap().lines().count(), 1);
    assert_eq!(dir.read_records().unwrap(), Records::default());
    assert_eq!(dir.read_run().unwrap(), run);
}

fn peers() -> Vec<Peer> {
    serde_json::from_str(
        r#"[{"name":"sdpa <cudnn>","h":16,"s":32768,"d":128,"keep":1.0,"fwd_ms":10.0,"bwd_ms":30.0,"fwd_tf":879.6,"bwd_tf":733.0},
            {"name":"BSA 128 random","h":16,"s":32768,"d":128,"keep":0.1,"fwd_ms":2.0,"bwd_ms":null,"fwd_tf":439.8,"bwd_tf":null}]"#,
    )
    .unwrap()
}

#[test]
fn the_report_holds_everything_and_needs_nothing() {
    let plan = Plan::tune(Mode::Full, Some("d128")).unwrap();
    let records = recorded(&plan);
    let reduction = reduce(&records, meta());
    let note = KernelNote {
        registers: 168,
        spill_bytes: 8,
        stack_bytes: 0,
        smem_bytes: 133_120,
        source_hash: "ab".repeat(32),
    };
    let kernels: BTreeMap<String, KernelNote> =
        records.iter().map(|r| (r.spec.name(), note.clone())).collect();
    let bad = Records::parse("nonsense\n").bad;
    let page = Report {
        meta: &reduction.table.meta,
        records: &records,
        crossovers: &reduction.table.crossovers,
        kernels: &kernels,
        peers: &peers(),
        bad: &bad,
        notes: &["a note with <angle> brackets".to_string()],
    }
    .html()
    .unwrap();
    for r in &records {
        assert!(page.contains(&r.spec.name()));
    }
    for words in [
        "NVIDIA Formula 1",
        "prefers-color-scheme:dark",
        "currentColor",
        "out: largest error 1 &gt; 0.1 at [0, &lt;1&gt;, 2]",
        "it spills 8 bytes",
        "sdpa &lt;cudnn&gt;",
        "BSA 128 random",
        "line 1 is no record",
        "a note with &lt;angle&gt; brackets",
        "forward, H 16, S 32k, D 128",
        "backward, H 8, S 64k, D 128",
        "forward + backward of one head, D 128",
        "D 128, query group 64, KV block 64",
    ] {
        assert!(page.contains(words), "the report lacks: {words}");
    }
    // Six lengths x two ops, one plot over length, two of crossovers.
    assert_eq!(page.matches("<svg").count(), 6 * 2 + 1 + 2);
    assert!(
        !page.contains("http-equiv") && !page.contains("<script") && !page.contains("src="),
        "self-contained"
    );
    assert!(!page.contains("#010203"), "plots take the page's ink");
    assert_eq!(page.matches("<table").count(), page.matches("</table>").count());
    assert_eq!(page.matches("<details").count(), page.matches("</details>").count());
}

#[test]
fn the_comparison_names_peers_with_ratios() {
    let records = recorded(&quick_d128());
    let text = summary::comparison(&rows(&records), &peers());
    let line = |name: &str| {
        text.lines().find(|l| l.contains(name)).unwrap_or_else(|| panic!("{name}: {text}")).to_string()
    };
    let ours = rows(&records)
        .into_iter()
        .find(|r| r.problem.lists.is_dense() && r.problem.seqlen_kv == 32768)
        .unwrap();
    let ratio = ours.tflops(AttnOp::Fwd).unwrap() / 879.6;
    assert!(line("sdpa <cudnn>").contains(&format!("{ratio:.2}x | ")), "{text}");
    assert!(line("BSA 128 random").trim_end().ends_with("| -"), "no backward, no ratio: {text}");
    assert!(text.contains("16, 32k, 128"));
    let bench = summary::records(&records);
    assert!(bench.contains("wrong") && bench.contains("it spills 8 bytes"), "{bench}");
    let json: Vec<serde_json::Value> = serde_json::from_str(&summary::json(&records)).unwrap();
    assert_eq!(json.len(), records.len());
    assert!(
        json.iter().any(|row| row["outcome"] == "wrong" && row["ms"].is_null() && row["message"].is_string())
    );
}

#[cfg(unix)]
#[test]
fn the_measuring_process_is_started_again_only_where_it_gets_on() {
    use dsv_autotune::{Supervised, supervise};
    use std::os::unix::fs::PermissionsExt;
    let temp = tempfile::tempdir().unwrap();
    let line = as_jsonl(&recorded(&quick_d128())[..1]);
    // Runs a shell script in the measuring process's place; it sees the run's directory as $5 and may count in it.
    let run = |name: &str, script: &str, seconds: f64| {
        let dir = RunDir::new(&temp.path().join(name));
        dir.begin(&Run { plan: quick_d128(), device: 0, machine: None }).unwrap();
        std::fs::write(dir.file("line"), &line).unwrap();
        let program = temp.path().join(format!("{name}.sh"));
        std::fs::write(&program, format!("#!/bin/sh\nset -e\ncd \"$5\"\necho x >> starts\n{script}\n"))
            .unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let ended = supervise(&program, &dir, seconds);
        (ended, std::fs::read_to_string(dir.file("starts")).map_or(0, |t| t.lines().count()))
    };
    let (ended, starts) = run("finished", "exit 0", 20.0);
    assert_eq!((ended.unwrap(), starts), (Supervised::Finished, 1));
    // Down twice, each time with something on record, then through.
    let twice = "if [ $(wc -l < starts) -lt 3 ]; then cat line >> records.jsonl; exit 5; fi";
    let (ended, starts) = run("twice", twice, 20.0);
    assert_eq!((ended.unwrap(), starts), (Supervised::Finished, 3));
    // A crash (abort) with a record is like a lost device; without one it ends the run.
    let (ended, starts) =
        run("crash", "if [ $(wc -l < starts) = 1 ]; then cat line >> records.jsonl; fi; kill -ABRT $$", 20.0);
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("without measuring anything") && error.contains("dsv-autotune resume"), "{error}");
    assert_eq!(starts, 2);
    let (ended, _) = run("time", "exit 4", 20.0);
    assert_eq!(ended.unwrap(), Supervised::TimeLimit);
    let (ended, starts) = run("said_why", "exit 1", 20.0);
    assert_eq!((ended.unwrap(), starts), (Supervised::Failed, 1));
}

// ---- the command line ----

fn autotune(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dsv-autotune"))
        .args(args)
        .current_dir(dir)
        // No GPU is visible, wherever the test runs.
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Fails, and says all these words.
fn refuses(dir: &Path, args: &[&str], words: &[&str]) {
    let output = autotune(dir, args);
    let text = stderr(&output);
    assert!(!output.status.success(), "{args:?} succeeded");
    for word in words {
        assert!(text.contains(word), "{args:?} does not say '{word}':\n{text}");
    }
}

#[test]
fn bad_options_say_what_is_allowed() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    refuses(dir, &["--time-limit", "0"], &["--time-limit 0", "above 0", "--help"]);
    refuses(dir, &["--quick", "--only", "d77"], &["'d77'", "a case is"]);
    refuses(dir, &["--quick", "--full"], &["cannot be used with"]);
    refuses(dir, &["--quick", "resume"], &["belong to a new run", "dsv-autotune --quick"]);
    refuses(dir, &["--ruler", "peers.json"], &["peers.json"]);
    refuses(dir, &["bench", "--op", "forward"], &["--op forward", "fwd, bwd, dq"]);
    refuses(dir, &["bench", "--lists", "window"], &["--lists window", "random, clustered"]);
    refuses(dir, &["bench", "--block", "7x7"], &["--block 7x7", "128x128"]);
    refuses(
        dir,
        &["bench", "--op", "select", "--rule", "median"],
        &["--rule median", "centre, mean, max4, mass4"],
    );
    refuses(dir, &["bench", "--op", "select", "--budget", "half"], &["--budget half", "top_k, top_p"]);
    for command in ["resume", "reduce", "status", "report"] {
        refuses(dir, &[command], &["there is no run in", "run.json", "dsv-autotune --quick"]);
    }
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0, "nothing was begun");
}

#[test]
fn a_missing_driver_is_said_with_the_next_command() {
    let temp = tempfile::tempdir().unwrap();
    // Without a driver: no libcuda; with one, but no visible GPU: the driver's own refusal. Both name nvidia-smi.
    refuses(temp.path(), &["--quick"], &["nvidia-smi"]);
    let error = dsv_runtime::Error::NoDriver.to_string();
    assert!(error.contains("no CUDA driver") && error.contains("nvidia-smi"), "{error}");
    // The run was begun and can be gone on with; it has no machine, so there is nothing to reduce.
    refuses(temp.path(), &["reduce"], &["has not reached a GPU", "dsv-autotune resume"]);
    let status = autotune(temp.path(), &["status"]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("to measure:"));
}

#[test]
fn explain_names_kernel_line_memory_and_crossover_without_a_gpu() {
    let temp = tempfile::tempdir().unwrap();
    // Of kernels whose text is committed: another's line would be answered by the shipped default.
    let shipped = dsv_spec::space::shipped(Arch::Sm90a);
    let records: Vec<TuneRecord> =
        recorded(&quick_d128()).into_iter().filter(|record| shipped.contains(&record.spec)).collect();
    let table = reduce(&records, meta()).table;
    std::fs::write(temp.path().join("t.json"), table.to_json()).unwrap();
    let explain = |args: &[&str]| {
        let output = autotune(temp.path(), &[&["explain", "--table", "t.json"], args].concat());
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let sparse = explain(&["--seqlen", "5000"]);
    let line = table
        .entries
        .iter()
        .find(|e| (e.bucket.op, e.bucket.seqlen, e.bucket.kv_block) == (dsv_spec::AttnOp::Fwd, 4096, 64))
        .unwrap();
    for wanted in [
        format!("for {}, whose table this is", table.meta.gpu),
        "seqlen_kv 5000, max_selected 8 (89.9 % skipped)".into(),
        format!("kernel: {}", line.kernel),
        "attn_bwd, bf16, head_dim 128, query_group 64, kv_block 64".into(),
        "found: exact line (seqlen 4096, sparsity 90 %) of t.json".into(),
        format!("measured: {:.1} us", line.median_us),
        "memory beside Q, K, V and out: ".into(),
        "measured at 4096 tokens, 16 heads)".into(),
    ] {
        assert!(sparse.contains(&wanted), "no '{wanted}' in\n{sparse}");
    }
    let dense = explain(&["--block", "dense", "--deterministic"]);
    assert!(dense.contains("dense, deterministic") && !dense.contains("sparse beats"), "{dense}");
    let with = |args: &[&'static str]| [&["explain", "--table", "t.json"], args].concat();
    refuses(temp.path(), &with(&["--head-dim", "72"]), &["no kernel", "head_dim available", "space.rs"]);
    refuses(temp.path(), &with(&["--keep", "0"]), &["--keep 0", "above 0"]);
    refuses(temp.path(), &with(&["--block", "7x7"]), &["--block 7x7", "128x128"]);
    refuses(temp.path(), &["explain", "--table", "no.json"], &["no.json", "cannot be read"]);
}

#[test]
fn reduce_status_and_report_need_no_gpu() {
    let temp = tempfile::tempdir().unwrap();
    let dir = RunDir::new(&temp.path().join("run"));
    let plan = quick_d128();
    dir.begin(&Run { plan: plan.clone(), device: 0, machine: Some(meta()) }).unwrap();
    let records = recorded(&plan);
    let text = as_jsonl(&records);
    // The last third is still to be measured, and one line is damaged.
    let kept: Vec<&str> = text.lines().take(records.len() * 2 / 3).collect();
    std::fs::write(dir.file(RECORD_FILE), kept.join("\n") + "\nhalf a lin").unwrap();
    let at = |args: &[&str]| {
        let mut all = args.to_vec();
        all.extend(["--out", "run", "--table", "tables/formula.json"]);
        let output = autotune(temp.path(), &all);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
    };
    let (status, errors) = at(&["status"]);
    let open = records.len() - kept.len();
    assert!(
        status.contains(&format!("to measure: {open}\n")) && status.contains("dsv-autotune resume"),
        "{status}"
    );
    assert!(errors.contains(&format!("line {} is no record", kept.len() + 1)), "{errors}");
    at(&["reduce"]);
    let table = std::fs::read_to_string(temp.path().join("tables/formula.json")).unwrap();
    let first = DispatchTable::from_json("formula.json", &table).unwrap();
    assert!(!first.entries.is_empty());
    // The rest arrives; the merged table is the whole one.
    std::fs::write(dir.file(RECORD_FILE), &text).unwrap();
    at(&["reduce"]);
    let table = std::fs::read_to_string(temp.path().join("tables/formula.json")).unwrap();
    assert_eq!(DispatchTable::from_json("formula.json", &table).unwrap(), reduce(&records, meta()).table);
    let (report, _) = at(&["report"]);
    assert!(report.contains("dsv dense ["), "{report}");
    assert!(std::fs::read_to_string(dir.file("report.html")).unwrap().contains("</html>"));
    // A table that cannot be read is not overwritten.
    std::fs::write(temp.path().join("tables/formula.json"), "{ not a table").unwrap();
    refuses(
        temp.path(),
        &["reduce", "--out", "run", "--table", "tables/formula.json"],
        &["left as it is", "--table PATH", "it is not a table"],
    );
    assert_eq!(std::fs::read_to_string(temp.path().join("tables/formula.json")).unwrap(), "{ not a table");
}
