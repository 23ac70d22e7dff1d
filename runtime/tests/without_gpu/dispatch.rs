use crate::{default_kernel, problem, registry};
use dsv_runtime::{Choice, Dispatch, Error, Gpu, MemoryNeeded, Notice, Registry, Report, TableSource};
use dsv_spec::{
    Arch, AttnOp, Deterministic, DispatchTable, Dtype, KernelSpec, Lists, Problem, SCHEMA, TableEntry,
    TableMeta, space,
};
use std::sync::{Arc, Mutex};

const H100: &str = "NVIDIA H100 80GB HBM3";

fn gpu() -> Gpu {
    Gpu { name: H100.to_string(), capability: (9, 0), arch: Arch::Sm90a }
}

fn forward() -> Problem {
    Problem { op: AttnOp::Fwd, ..problem() }
}

fn entry(problem: &Problem, kernel: KernelSpec, source_hash: &str) -> TableEntry {
    TableEntry {
        bucket: problem.bucket(),
        kernel,
        source_hash: source_hash.to_string(),
        median_us: 812.25,
        spread_us: 3.5,
        runner_up_us: Some(840.0),
        tried: 5,
        failed: 1,
    }
}

fn table(gpu: &str, entries: Vec<TableEntry>) -> String {
    let meta = TableMeta {
        schema: SCHEMA,
        gpu: gpu.to_string(),
        arch: Arch::Sm90a,
        driver: "580.95".to_string(),
        compiler: "13.0.88".to_string(),
        clocks: "SM 1755 MHz".to_string(),
        date: "2026-11-23".to_string(),
    };
    DispatchTable::new(meta, entries, Vec::new()).to_json()
}

/// A dispatch, and what it reported.
fn open(gpu: Gpu, source: &TableSource, registry: Registry) -> (Dispatch, Vec<Notice>) {
    let notices = Arc::new(Mutex::new(Vec::new()));
    let sink = notices.clone();
    let report: Report = Arc::new(move |notice| sink.lock().unwrap().push(notice.clone()));
    let dispatch = Dispatch::new(gpu, source, registry, &report);
    let notices = notices.lock().unwrap().clone();
    (dispatch, notices)
}

fn file(json: &str) -> (tempfile::TempDir, TableSource) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table.json");
    std::fs::write(&path, json).unwrap();
    (dir, TableSource::File(path))
}

#[test]
fn workspace_has_an_accumulator_only_where_the_tables_backward_has_one() {
    let p = Problem { op: AttnOp::Bwd, deterministic: Deterministic::No, ..problem() };
    let exact = Problem { deterministic: Deterministic::Yes, ..p };
    let most = MemoryNeeded::of(&p);
    // The table found the deterministic backward faster for a problem that does not ask for it.
    let winner = default_kernel(&exact);
    let (_dir, source) = file(&table(H100, vec![entry(&p, winner, "measured")]));
    let (dispatch, _) = open(gpu(), &source, registry(&[]));
    let chosen = MemoryNeeded::chosen(&p, &dispatch).unwrap();
    assert_eq!(chosen.workspace, MemoryNeeded::of(&exact).workspace);
    assert!(chosen.workspace < most.workspace);
    assert_eq!(MemoryNeeded { workspace: most.workspace, ..chosen }, most, "the rest is the problem's");

    let (dispatch, _) = open(gpu(), &TableSource::None, registry(&[]));
    assert_eq!(MemoryNeeded::chosen(&p, &dispatch).unwrap(), most, "the shipped default accumulates");
    let forward = forward();
    assert_eq!(MemoryNeeded::chosen(&forward, &dispatch).unwrap(), MemoryNeeded::of(&forward));
}

#[test]
fn an_exact_line_is_taken_and_explained() {
    // Not the default, so that it can only come from the table.
    let p =
        Problem { lists: Lists::Blocks { query_group: 128, kv_block: 128 }, max_selected: 26, ..forward() };
    let winner = space::candidates(p.op, p.dtype, p.head_dim, p.lists, Arch::Sm90a)[1];
    let winner = KernelSpec::Attn(winner);
    assert_ne!(winner, default_kernel(&p));
    let json: &'static str = table(H100, vec![entry(&p, winner, "measured")]).leak();
    let mut kernels = registry(&[]).kernels.to_vec();
    let name: &'static str = winner.name().leak();
    kernels.push(dsv_runtime::KernelText { name, source: "", source_hash: "measured" });
    kernels.sort_by_key(|k| k.name);
    let registry =
        Registry { kernels: kernels.leak(), headers: &[], tables: vec![("h100.json", json)].leak() };

    let (dispatch, notices) = open(gpu(), &TableSource::Committed, registry);
    assert_eq!(notices, []);
    let found = dispatch.explain(&p).unwrap();
    assert_eq!(found.kernel, winner);
    assert!(!found.stale);
    assert_eq!(
        found.to_string(),
        format!(
            "attn_fwd, bf16, head_dim 128, query_group 128, kv_block 128\n  batch 1, num_heads 16, num_kv_heads 16, \
             seqlen_q 32768, seqlen_kv 32768, max_selected 26 (89.8 % skipped)\n  kernel: {winner}\n  found: exact line \
             (seqlen 32768, sparsity 90 %) of generated/tables/h100.json (NVIDIA H100 80GB HBM3, 2026-11-23, driver \
             580.95, NVRTC 13.0.88)\n  measured: 812.2 us, spread 3.5 us, runner-up 840.0 us, 5 tried, 1 failed"
        )
    );
}

#[test]
fn the_nearest_line_says_what_it_lacks_and_a_changed_text_is_stale() {
    let p = forward();
    let (_dir, source) = file(&table(H100, vec![entry(&p, default_kernel(&p), "another text")]));
    let (dispatch, notices) = open(gpu(), &source, registry(&[]));
    assert_eq!(notices, []);
    let longer = Problem { seqlen_q: 131_072, seqlen_kv: 131_072, max_selected: 40, ..p };
    let found = dispatch.explain(&longer).unwrap();
    assert!(matches!(found.choice, Choice::Nearest(_)));
    assert!(found.stale);
    let text = found.to_string();
    assert!(text.contains("nearest line (seqlen 32768, sparsity 90 %)"), "{text}");
    assert!(text.contains("it has none for seqlen 131072, sparsity 98 %"), "{text}");
    assert!(text.contains("stale") && text.contains("dsv-autotune"), "{text}");
    // No line at all for another head_dim: the default, and why.
    let found = dispatch.explain(&Problem { head_dim: 64, ..p }).unwrap();
    assert_eq!(found.kernel, default_kernel(&Problem { head_dim: 64, ..p }));
    assert!(found.to_string().contains("shipped default, because"), "{found}");
    assert!(found.to_string().contains("has no line for this op"), "{found}");
}

#[test]
fn a_winner_without_a_committed_text_is_not_taken() {
    let p = forward();
    let winner = space::candidates(p.op, p.dtype, p.head_dim, p.lists, Arch::Sm90a)
        .into_iter()
        .map(KernelSpec::Attn)
        .find(|k| !space::shipped(Arch::Sm90a).contains(k))
        .unwrap();
    let (_dir, source) = file(&table(H100, vec![entry(&p, winner, "measured")]));
    let (dispatch, _) = open(gpu(), &source, registry(&[]));
    let found = dispatch.explain(&p).unwrap();
    assert_eq!(found.kernel, default_kernel(&p));
    let text = found.to_string();
    assert!(text.contains(&winner.name()) && text.contains("not committed"), "{text}");
}

#[test]
fn a_foreign_table_is_refused_once_with_every_problem_and_repeated_by_explain() {
    let p = forward();
    let (_dir, source) = file(&table("NVIDIA H200", vec![entry(&p, default_kernel(&p), "x")]));
    let ada = Gpu { name: "NVIDIA L40".to_string(), capability: (8, 9), arch: Arch::Sm90a };
    let (dispatch, notices) = open(ada, &source, registry(&[]));
    assert_eq!(notices.len(), 1);
    let Notice::TableRefused(error) = &notices[0] else { panic!("{:?}", notices[0]) };
    assert_eq!(error.problems.len(), 2, "{error}");
    let loud = notices[0].to_string();
    assert!(loud.starts_with("WARNING: running with default kernels"), "{loud}");
    assert!(
        loud.contains("'NVIDIA H200'") && loud.contains("'NVIDIA L40'") && loud.contains("8.9"),
        "{loud}"
    );
    assert!(dispatch.table().is_none());
    let found = dispatch.explain(&p).unwrap();
    assert_eq!(found.kernel, default_kernel(&p));
    let text = found.to_string();
    assert!(text.contains("was refused") && text.contains("'NVIDIA H200'"), "{text}");
}

#[test]
fn sm80_kernels_serve_where_they_are_asked_for() {
    let p = problem();
    let a100 = Gpu { name: "NVIDIA A100-SXM4-80GB".to_string(), capability: (8, 0), arch: Arch::Sm80 };
    let h100 = Gpu { arch: Arch::Sm80, ..gpu() };
    for gpu in [a100, h100] {
        let (dispatch, _) = open(gpu, &TableSource::None, Registry::committed());
        for op in [AttnOp::Fwd, AttnOp::BwdPrep, AttnOp::Bwd, AttnOp::BwdPost] {
            let found = dispatch.explain(&Problem { op, ..p }).unwrap();
            assert_eq!((found.kernel.op(), found.kernel.arch()), (op.name(), Arch::Sm80));
        }
        let exact = Problem { deterministic: Deterministic::Yes, ..p };
        let error = dispatch.explain(&exact).unwrap_err().to_string();
        assert!(error.contains("deterministic on sm80"), "{error}");
        assert!(error.contains("deterministic available: nondet on sm80, det on sm90a"), "{error}");
    }
    // A table of this very GPU, but of its own kernels.
    let (_dir, source) = file(&table(H100, vec![entry(&forward(), default_kernel(&forward()), "x")]));
    let (dispatch, notices) = open(Gpu { arch: Arch::Sm80, ..gpu() }, &source, Registry::committed());
    let [Notice::TableRefused(error)] = &notices[..] else { panic!("{notices:?}") };
    assert_eq!(error.problems, ["its kernels are for sm90a, those of sm80 were asked for"]);
    assert_eq!(dispatch.explain(&forward()).unwrap().kernel.arch(), Arch::Sm80);
}

#[test]
fn corrupt_tables_are_refused_with_every_problem() {
    let p = forward();
    let good = table(H100, vec![entry(&p, default_kernel(&p), "x")]);
    let cut = &good[..good.len() / 2];
    let wrong_twice =
        good.replace("\"schema\": 1", "\"schema\": 99").replace("attn_fwd_bf16_d128", "attn_fwd_bf16_d72");
    for (json, problems) in [(cut, 1), (wrong_twice.as_str(), 2)] {
        let (_dir, source) = file(json);
        let (dispatch, notices) = open(gpu(), &source, registry(&[]));
        let [Notice::TableRefused(error)] = &notices[..] else { panic!("{notices:?}") };
        assert_eq!(error.problems.len(), problems, "{error}");
        assert_eq!(dispatch.explain(&p).unwrap().kernel, default_kernel(&p));
    }
    let missing = TableSource::File("no/such/table.json".into());
    let (_, notices) = open(gpu(), &missing, registry(&[]));
    assert!(matches!(&notices[..], [Notice::TableRefused(e)] if e.problems[0].contains("cannot be read")));
    // A corrupt committed table hides no good one, and is reported where there is no good one.
    let good: &'static str = good.leak();
    let (dispatch, notices) =
        open(gpu(), &TableSource::Committed, registry(&[("a.json", "{"), ("b.json", good)]));
    assert!(notices.is_empty() && dispatch.table().is_some());
    let (_, notices) = open(gpu(), &TableSource::Committed, registry(&[("a.json", "{")]));
    assert!(matches!(&notices[..], [Notice::TableRefused(_)]));
}

#[test]
fn a_gpu_without_a_table_is_told_which_there_are() {
    let p = forward();
    let json: &'static str = table("NVIDIA H200", vec![]).leak();
    let (dispatch, notices) = open(gpu(), &TableSource::Committed, registry(&[("h200.json", json)]));
    let expected = Notice::NoTable { gpu: H100.to_string(), available: vec!["NVIDIA H200".to_string()] };
    assert_eq!(notices, [expected]);
    assert!(notices[0].to_string().contains("dsv-autotune"));
    assert!(dispatch.explain(&p).unwrap().to_string().contains("no committed table"));
    // Asking for none is no surprise, so nothing is reported.
    assert_eq!(open(gpu(), &TableSource::None, registry(&[])).1, []);
}

#[test]
fn what_no_kernel_serves_is_said_axis_by_axis() {
    let (dispatch, _) = open(gpu(), &TableSource::None, registry(&[]));
    let text = |p: Problem| match dispatch.explain(&p) {
        Err(Error::NoKernel(text)) => text,
        other => panic!("{other:?}"),
    };
    let shipped = space::SHIPPED_HEAD_DIMS.map(|d| d.to_string()).join(", ");
    assert_eq!(
        text(Problem { head_dim: 72, ..forward() }),
        format!(
            "no kernel for attn_fwd, bf16, head_dim 72, query_group 64, kv_block 64 on sm90a\n  head_dim available: {shipped}\n  \
             to add it: put 72 in SHIPPED_HEAD_DIMS (codegen/spec/src/space.rs) and let the templates serve it \
             (README.md, \"A head_dim\"), then dsv-codegen --arch sm90a"
        )
    );
    let both = text(Problem {
        dtype: Dtype::F16,
        lists: Lists::Blocks { query_group: 64, kv_block: 128 },
        ..forward()
    });
    assert!(both.contains("dtype available: bf16"), "{both}");
    assert!(both.contains("(query_group, kv_block) available: dense, (64, 64), (128, 128)"), "{both}");
    // Gathered units are shipped apart.
    let gather = |query_group, kv_block| Lists::Blocks { query_group, kv_block };
    let fine = text(Problem { head_dim: 256, lists: gather(256, 16), ..forward() });
    assert!(fine.contains("head_dim with kv_block below 64 available: 64, 96, 128"), "{fine}");
    assert!(fine.contains("available: dense, (64, 1), (64, 8), (128, 1), (128, 8)"), "{fine}");
    assert!(fine.contains("put (256, 16) in SHIPPED_GATHER (codegen/spec/src/space.rs)"), "{fine}");
    let deterministic = Problem { lists: gather(64, 8), deterministic: Deterministic::Yes, ..problem() };
    let exact = text(deterministic);
    assert!(exact.contains("deterministic available: nondet with kv_block below 64"), "{exact}");
    // A deterministic backward leaves dQ to a kernel of its own.
    let exact = Problem { deterministic: Deterministic::Yes, ..problem() };
    for (op, name) in [(AttnOp::Bwd, "attn_bwd_bf16"), (AttnOp::BwdDq, "attn_bwd_dq_bf16")] {
        let found = dispatch.explain(&Problem { op, ..exact }).unwrap().kernel.name();
        assert!(found.starts_with(name) && found.contains("_det_"), "{found}");
    }
    assert!(dispatch.explain(&problem()).unwrap().kernel.name().contains("_nondet_"));
    let empty = Registry { kernels: &[], headers: &[], tables: &[] };
    let (dispatch, _) = open(gpu(), &TableSource::None, empty);
    let Err(Error::NoKernel(text)) = dispatch.explain(&forward()) else { panic!("an empty registry served") };
    assert!(text.contains("not in generated/registry.rs"), "{text}");
}

#[test]
fn every_shipped_problem_is_served_on_every_op() {
    let (dispatch, _) = open(gpu(), &TableSource::None, registry(&[]));
    let mut served = 0;
    for &head_dim in &space::SHIPPED_HEAD_DIMS {
        for lists in space::shipped_lists() {
            for &op in AttnOp::ALL {
                let max_selected = if lists.is_dense() { 0 } else { 51 };
                let p = Problem { op, head_dim, lists, max_selected, ..problem() };
                let KernelSpec::Attn(spec) = dispatch.explain(&p).unwrap().kernel else { panic!("{p:?}") };
                assert_eq!((spec.op(), spec.head_dim()), (op, head_dim));
                served += 1;
            }
        }
    }
    let shapes = space::SHIPPED_HEAD_DIMS.len() * (1 + space::SHIPPED_BLOCK_SIZES.len());
    assert_eq!(served, shapes * AttnOp::ALL.len());
    for head_dim in space::SHIPPED_GATHER_HEAD_DIMS {
        for lists in space::shipped_gather() {
            for op in [AttnOp::Fwd, AttnOp::BwdPrep, AttnOp::Bwd, AttnOp::BwdPostKv] {
                let p = Problem { op, head_dim, lists, max_selected: 400, ..problem() };
                let KernelSpec::Attn(spec) = dispatch.explain(&p).unwrap().kernel else { panic!("{p:?}") };
                assert_eq!(
                    (spec.op(), spec.head_dim(), spec.lists().is_dense()),
                    (op, head_dim, op.is_of_any_lists())
                );
            }
        }
    }
}

#[test]
fn the_committed_registry_is_sorted_and_serves_every_shipped_problem() {
    let committed = Registry::committed();
    assert!(committed.kernels.windows(2).all(|pair| pair[0].name < pair[1].name));
    for kernel in committed.kernels {
        assert_eq!(committed.kernel(kernel.name).map(|k| k.source_hash), Some(kernel.source_hash));
        let spec: KernelSpec = kernel.name.parse().unwrap();
        assert!(kernel.source.contains(kernel.name), "the text of {spec} does not define its symbol");
        for include in kernel.source.lines().filter_map(|l| l.strip_prefix("#include \"")) {
            let header = include.trim_end_matches('"');
            assert!(committed.headers.iter().any(|(name, _)| *name == header), "{spec} includes {header}");
        }
    }
    assert!(committed.kernel("attn_fwd").is_none());
    let (dispatch, _) = open(gpu(), &TableSource::None, committed);
    for &head_dim in &space::SHIPPED_HEAD_DIMS {
        for lists in space::shipped_lists() {
            let max_selected = if lists.is_dense() { 0 } else { 51 };
            for &op in AttnOp::ALL {
                for &deterministic in Deterministic::ALL {
                    let p = Problem { op, head_dim, lists, max_selected, deterministic, ..problem() };
                    dispatch.explain(&p).unwrap_or_else(|e| panic!("{e}"));
                }
            }
        }
    }
}
