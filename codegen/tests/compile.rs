//! Every committed kernel compiles, and what it costs is pinned. Needs NVRTC and nvdisasm: without them these tests
//! fail with the command that fetches both.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use dsv_codegen::spec::{
    Arch, AttnOp, AttnSpec, Budget, Deterministic, Dtype, GroupRule, KernelSpec, Lists, PointwiseOp,
    PointwiseSpec, RANKS, SelectSpec, limits, space,
};
use dsv_codegen::{HEADERS, build_bundle, committed_specs, render, source_hash};
use dsv_compile::{Bundle, CompileError, CompileJob, Compiled, Compiler, SpillList, oldest_driver, sass};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn compiler() -> &'static Compiler {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    COMPILER.get_or_init(|| Compiler::new().unwrap_or_else(|e| panic!("{e}")))
}

fn spills() -> SpillList {
    let text = std::fs::read_to_string(root().join("codegen/spills.txt")).unwrap();
    SpillList::parse(&text).unwrap_or_else(|e| panic!("{e}"))
}

/// Every committed kernel, compiled (or from the cache).
fn compiled() -> &'static [(KernelSpec, Compiled)] {
    static ALL: OnceLock<Vec<(KernelSpec, Compiled)>> = OnceLock::new();
    ALL.get_or_init(|| {
        let specs = committed_specs(&root().join("generated")).unwrap();
        let texts: Vec<(String, String)> =
            specs.iter().map(|spec| (spec.name(), render(spec).unwrap_or_else(|e| panic!("{e}")))).collect();
        let jobs: Vec<CompileJob<'_>> = specs
            .iter()
            .zip(&texts)
            .map(|(spec, (name, source))| CompileJob {
                name,
                source,
                headers: HEADERS,
                arch: spec.arch().nvrtc(),
            })
            .collect();
        let results = compiler().compile_all(&jobs, 2, |_, _| {});
        let failed: Vec<String> =
            results.iter().filter_map(|r| r.as_ref().err()).map(ToString::to_string).collect();
        assert!(failed.is_empty(), "{}", failed.join("\n"));
        specs.into_iter().zip(results.into_iter().flatten()).collect()
    })
}

#[test]
fn every_committed_kernel_may_ship() {
    let list = spills();
    let failed: Vec<String> = compiled()
        .iter()
        .filter_map(|(_, compiled)| compiled.check(&list).err())
        .map(|e| e.to_string())
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    for name in list.names() {
        assert!(
            compiled().iter().any(|(spec, _)| spec.name() == name),
            "codegen/spills.txt names {name}, no kernel"
        );
    }
}

#[test]
fn what_every_kernel_costs() {
    let mut table = String::from("registers, spilled bytes, stack, static + dynamic shared memory\n");
    for (spec, compiled) in compiled() {
        for (entry, r) in &compiled.entries {
            writeln!(
                table,
                "{entry}: {}, {}, {}, {} + {}",
                r.registers,
                r.spill_store_bytes + r.spill_load_bytes,
                r.stack_bytes,
                r.static_smem_bytes,
                spec.facts().smem_bytes
            )
            .unwrap();
        }
    }
    insta::assert_snapshot!(table);
}

/// `__launch_bounds__` of the text is the launch's block, and the registers asked for fit as many CTAs as meant.
#[test]
fn launch_bounds_are_the_facts() {
    for (spec, compiled) in compiled() {
        let (name, facts) = (spec.name(), spec.facts());
        assert_eq!(compiled.report.max_threads, Some(facts.threads), "{name}");
        assert_eq!(misfit(spec, compiled.report.registers), None, "{name}");
    }
}

/// Why a kernel of so many registers a thread cannot run as it is meant: the CTAs that should share a multiprocessor do not fit,
/// or `setmaxnreg` asks for more than the launch gave the CTA, and waits forever.
fn misfit(spec: &KernelSpec, registers: u32) -> Option<String> {
    let facts = spec.facts();
    let held = registers.next_multiple_of(8) * facts.threads;
    let moved = match facts.consumer_registers {
        0 => 0,
        consumer => consumer * (facts.threads - 128) + facts.producer_registers * 128,
    };
    match (held * facts.ctas_per_sm <= limits::REGISTERS_PER_SM, moved <= held) {
        (false, _) => Some(format!("{} CTAs of {held} registers", facts.ctas_per_sm)),
        (_, false) => Some(format!("setmaxnreg asks for {moved} registers of {held}")),
        _ => None,
    }
}

#[test]
fn machine_code_uses_tensor_cores_keeps_operands_and_no_local_memory() {
    for (spec, compiled) in compiled() {
        let counts = sass(&compiled.cubin).unwrap_or_else(|e| panic!("{e}"));
        let counts = &counts[&spec.name()];
        if let KernelSpec::Attn(attn) = spec
            && let AttnOp::Fwd | AttnOp::Bwd = attn.op()
        {
            let used: &[&str] = match attn.arch() {
                Arch::Sm80 => &["HMMA", "LDSM", "LDGSTS"],
                Arch::Sm90a => &["HGMMA", "UTMALDG"],
            };
            assert!(used.iter().all(|opcode| counts.count(opcode) > 0), "{}", spec.name());
        }
        assert_eq!(counts.lost_operands(), [""; 0], "{}", spec.name());
        if spills().allowed(&spec.name()) == 0 {
            assert_eq!(
                (counts.count("LDL"), counts.count("STL")),
                (0, 0),
                "{} uses local memory",
                spec.name()
            );
        }
    }
}

/// The forward's candidates for shapes that no committed kernel has: every tile of dense attention, the first guess of each
/// block size, and what stays. None may spill.
#[test]
fn forwards_that_are_not_committed_compile() {
    let block_sizes = [(64, 64), (128, 128), (128, 64), (64, 128), (256, 128)];
    let mut specs: Vec<AttnSpec> = Vec::new();
    for head_dim in [96, 256] {
        specs.extend(space::candidates(AttnOp::Fwd, Dtype::Bf16, head_dim, Lists::Dense, Arch::Sm90a));
    }
    for (dtype, head_dim) in
        [(Dtype::Bf16, 64), (Dtype::Bf16, 96), (Dtype::Bf16, 128), (Dtype::Bf16, 256), (Dtype::F16, 128)]
    {
        for (query_group, kv_block) in block_sizes {
            let lists = Lists::Blocks { query_group, kv_block };
            let candidates = space::candidates(AttnOp::Fwd, dtype, head_dim, lists, Arch::Sm90a);
            assert!(!candidates.is_empty(), "{dtype}, head_dim {head_dim}, ({query_group}, {kv_block})");
            specs.push(candidates[0]);
            if dtype == Dtype::Bf16 {
                specs.extend(candidates.into_iter().filter(AttnSpec::is_persistent));
            }
        }
    }
    assert_compile_without_spills(specs.into_iter().map(KernelSpec::Attn).collect());
}

/// The backward's candidates for shapes that no committed kernel has: every tile of dense attention, the first guess with
/// blocks of two tiles, and what stays. None may spill.
#[test]
fn backwards_that_are_not_committed_compile() {
    let mut specs: Vec<AttnSpec> = Vec::new();
    for op in [AttnOp::BwdPrep, AttnOp::Bwd, AttnOp::BwdDq, AttnOp::BwdPost] {
        let candidates = |dtype, head_dim, lists| {
            let found = space::candidates(op, dtype, head_dim, lists, Arch::Sm90a);
            assert!(!found.is_empty(), "{op}, {dtype}, head_dim {head_dim}, {lists:?}");
            found
        };
        for head_dim in [96, 256] {
            specs.extend(candidates(Dtype::Bf16, head_dim, Lists::Dense));
            if matches!(op, AttnOp::Bwd | AttnOp::BwdDq) {
                let lists = Lists::Blocks { query_group: 64, kv_block: 128 };
                specs.push(candidates(Dtype::Bf16, head_dim, lists)[0]);
            }
        }
        specs.push(candidates(Dtype::F16, 128, Lists::Dense)[0]);
        for (query_group, kv_block) in space::SHIPPED_BLOCK_SIZES.into_iter().filter(|_| op == AttnOp::BwdDq)
        {
            for head_dim in space::SHIPPED_HEAD_DIMS {
                let found = candidates(Dtype::Bf16, head_dim, Lists::Blocks { query_group, kv_block });
                specs.extend(found.into_iter().filter(AttnSpec::is_persistent));
            }
        }
    }
    assert_compile_without_spills(specs.into_iter().map(KernelSpec::Attn).collect());
}

/// What head_dim 80 ships once it is in SHIPPED_HEAD_DIMS. None may spill.
#[test]
fn head_dim_80_compiles() {
    let mut specs: Vec<KernelSpec> = Vec::new();
    for &op in AttnOp::ALL {
        for lists in space::shipped_lists() {
            for &form in Deterministic::ALL {
                specs.extend(
                    space::default_attn(op, Dtype::Bf16, 80, lists, form, Arch::Sm90a).map(KernelSpec::Attn),
                );
            }
        }
    }
    specs.sort_by_key(KernelSpec::name);
    specs.dedup();
    assert_eq!(specs.len(), 15, "the README says how many");
    assert_compile_without_spills(specs);
}

/// The selections and the predictor's kernels that a rank in SHIPPED_RANKS would ship. None may spill, but two of rank 64:
/// top_p, which keeps five words, and the predictor's queries of 128 columns, which keep one.
#[test]
fn kernels_of_every_rank_compile() {
    let specs = RANKS.into_iter().filter(|rank| !space::SHIPPED_RANKS.contains(rank)).flat_map(|rank| {
        let one_rule = |s: &SelectSpec| {
            s.group_rule() == GroupRule::Centre && (s.rank() < 64 || s.budget() == Budget::TopK)
        };
        let selections =
            space::shipped_selections(rank, Arch::Sm90a).filter(one_rule).map(KernelSpec::Select);
        let ops = [PointwiseOp::GramSums, PointwiseOp::GramQuery, PointwiseOp::GramKey];
        let predictor = ops.into_iter().flat_map(move |op| {
            let spec = move |dim| PointwiseSpec::shipped(op, Dtype::Bf16, dim, rank, Arch::Sm90a);
            space::TRAINER_HEAD_DIMS
                .into_iter()
                .filter(|&dim| dim <= 128)
                .map(move |dim| KernelSpec::Pointwise(spec(dim).unwrap_or_else(|e| panic!("{e}"))))
        });
        selections.chain(predictor)
    });
    assert_compile_without_spills(specs.collect());
}

fn assert_compile_without_spills(specs: Vec<KernelSpec>) {
    let texts: Vec<(String, String)> =
        specs.iter().map(|spec| (spec.name(), render(spec).unwrap_or_else(|e| panic!("{e}")))).collect();
    let jobs: Vec<CompileJob<'_>> = texts
        .iter()
        .map(|(name, source)| CompileJob { name, source, headers: HEADERS, arch: Arch::Sm90a.nvrtc() })
        .collect();
    let sound = |spec: &KernelSpec, compiled: &Compiled| {
        compiled.check(&SpillList::none())?;
        let lost = sass(&compiled.cubin)?.into_values().flat_map(|text| text.lost_operands().to_vec());
        Ok(lost.chain(misfit(spec, compiled.report.registers)).collect())
    };
    let failed: Vec<String> = compiler()
        .compile_all(&jobs, 2, |_, _| {})
        .into_iter()
        .zip(&specs)
        .flat_map(|(result, spec)| {
            let found: Result<Vec<String>, CompileError> = result.and_then(|compiled| sound(spec, &compiled));
            found
                .unwrap_or_else(|e| vec![e.to_string()])
                .into_iter()
                .map(|what| format!("{}: {what}", spec.name()))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// On an H100 the runtime gives texts of sm80 to NVRTC for that GPU; f16 differs in the product alone.
#[test]
fn sm80_compiles_for_the_h100_and_in_f16() {
    let mut specs: Vec<KernelSpec> = Vec::new();
    for (op, head_dim) in [(AttnOp::Fwd, 64), (AttnOp::Fwd, 128), (AttnOp::Bwd, 64), (AttnOp::Bwd, 128)] {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            for lists in space::shipped_lists() {
                let default = space::candidates(op, dtype, head_dim, lists, Arch::Sm80)[0];
                specs.push(KernelSpec::Attn(default));
            }
        }
    }
    let target = Arch::Sm80.nvrtc_for(9, 0).expect("a text of sm80 runs on 9.0");
    for spec in specs {
        let (name, source) = (spec.name(), render(&spec).unwrap());
        let job = CompileJob { name: &name, source: &source, headers: HEADERS, arch: target };
        let compiled = compiler().compile(job).unwrap_or_else(|e| panic!("{e}"));
        compiled.check(&SpillList::none()).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn the_bundle_holds_what_the_registry_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    let specs: Vec<KernelSpec> =
        ["kv_validate_sm90a", "kv_invert_sm90a"].map(|name| name.parse().unwrap()).to_vec();
    build_bundle(&specs, compiler(), &spills(), 2, dir.path(), |_| {}).unwrap_or_else(|e| panic!("{e}"));
    let bundle = Bundle::open(dir.path()).unwrap();
    assert_eq!(bundle.compiler(), compiler().version());
    assert_eq!(bundle.oldest_driver(), oldest_driver(compiler().version()));
    assert_eq!(bundle.kernels().count(), 2);
    for spec in &specs {
        let cubin = bundle.cubin(&spec.name(), &source_hash(&render(spec).unwrap())).unwrap();
        let (_, compiled) = compiled().iter().find(|(known, _)| known == spec).expect("both are committed");
        assert_eq!(cubin, compiled.cubin, "{}", spec.name());
    }
    // A smaller bundle in the same place leaves no cubin behind.
    build_bundle(&specs[..1], compiler(), &spills(), 1, dir.path(), |_| {}).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "one cubin and the manifest");
}
