//! Names round-trip, infeasible specs say why, tables load or say every problem, the token order is nested cubes.

use dsv_spec::order::{Cube, Grid, invert_order, token_order};
use dsv_spec::*;

fn all_attn() -> Vec<AttnSpec> {
    let mut specs = Vec::new();
    for &op in AttnOp::ALL {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            for head_dim in [64, 80, 96, 128, 256] {
                let block_sizes =
                    [64u16, 128, 256].into_iter().flat_map(|q| [1u16, 8, 16, 64, 128].map(|k| (q, k)));
                for (q, k) in block_sizes.chain([(0, 0)]) {
                    let lists = Lists::from_block_size(q, k);
                    for &arch in Arch::ALL {
                        specs.extend(space::candidates(op, dtype, head_dim, lists, arch));
                    }
                }
            }
        }
    }
    specs
}

#[test]
fn every_name_round_trips() {
    let attn = all_attn().into_iter().map(KernelSpec::Attn);
    let specs: Vec<KernelSpec> = attn.chain(space::shipped(Arch::Sm90a)).collect();
    assert!(specs.len() > 50, "{} specs", specs.len());
    for spec in specs {
        let name = spec.to_string();
        assert_eq!(name.parse::<KernelSpec>().as_ref(), Ok(&spec), "{name}");
        assert!(name.starts_with(spec.op()), "{name} begins with its op");
    }
}

#[test]
fn what_display_would_not_print_is_rejected() {
    let good = space::shipped(Arch::Sm90a)[0].to_string();
    let mutations = [
        good.to_uppercase(),
        format!("{good}_"),
        format!(" {good}"),
        good.replace("_d", "_d0"),
        good.replace("sm90a", "sm90"),
        good.replace("sm90a", ""),
        "attn".to_string(),
        String::new(),
    ];
    for bad in mutations {
        assert!(bad.parse::<KernelSpec>().is_err(), "'{bad}' was accepted");
    }
}

#[test]
fn an_infeasible_name_says_why() {
    let name = "attn_fwd_bf16_d72_qg0_kb0_sp0_m128n128_g1c2s2x1_grid_det_sm90a";
    let error = name.parse::<KernelSpec>().unwrap_err().to_string();
    assert!(error.contains("head_dim 72 is not possible: 64, 80, 96, 128 or 256"), "{error}");
    assert!(error.contains("dsv-codegen list"), "{error}");
}

#[test]
fn selections_have_a_rank_of_whole_steps() {
    for rank in RANKS {
        for name in [
            format!("kv_select_bf16_r{rank}_qg64_kb64_centre_max_g16w8_sm90a"),
            format!("kv_select_fine_bf16_r{rank}_qg64_kb1_mean_max_topk_g64w16_sm90a"),
        ] {
            assert_eq!(name.parse::<KernelSpec>().map(|spec| spec.to_string()), Ok(name));
        }
        // A step more is two bytes a column for each of the 64 queries of a fine selection.
        let fine = space::default_select_fine(rank, 64, 8, GroupRule::Centre, Arch::Sm90a).unwrap();
        let of_16 = space::default_select_fine(16, 64, 8, GroupRule::Centre, Arch::Sm90a).unwrap();
        let bytes = |spec| KernelSpec::Select(spec).facts().smem_bytes;
        assert_eq!(bytes(fine) - bytes(of_16), 64 * 2 * (u32::from(rank) - 16));
    }
    for rank in [0, 8, 40, 80] {
        let name = format!("kv_select_bf16_r{rank}_qg64_kb64_centre_max_g16w8_sm90a");
        let error = name.parse::<KernelSpec>().unwrap_err().to_string();
        assert!(error.contains(&format!("rank {rank} is not possible: 16, 32, 48 or 64")), "{error}");
    }
}

#[test]
fn a_backward_of_three_consumers_cannot_split_dq() {
    let name = "attn_bwd_bf16_d64_qg0_kb0_sp0_m64n192_g1c3s2x1_grid_nondet_sm90a";
    let error = name.parse::<KernelSpec>().unwrap_err().to_string();
    assert!(error.contains("consumers 3 is not possible: 1 or 2"), "{error}");
}

#[test]
fn groups_share_a_cta_only_where_each_has_its_consumer() {
    let name = |groups: u8, lists: &str, schedule: &str| {
        format!("attn_fwd_bf16_d128_{lists}_spany_m128n64_g{groups}c2s4x1_{schedule}_det_sm90a")
    };
    assert!(name(2, "qg64_kb64", "persistent").parse::<KernelSpec>().is_ok());
    for bad in [
        name(3, "qg64_kb64", "persistent"),
        name(2, "qg128_kb64", "persistent"),
        name(2, "qg64_kb128", "persistent"),
        name(2, "qg64_kb64", "grid"),
    ] {
        let error = bad.parse::<KernelSpec>().unwrap_err().to_string();
        assert!(error.contains("is not possible: 1; or 2 in persistent CTAs"), "{error}");
    }
}

#[test]
fn shared_memory_fits_and_is_the_sum_of_its_tiles() {
    for spec in all_attn() {
        let facts = KernelSpec::Attn(spec).facts();
        let (of_cta, of_sm) = match spec.arch() {
            Arch::Sm80 => (limits::SM80_SMEM_BYTES_PER_CTA, limits::SM80_SMEM_BYTES_PER_SM),
            Arch::Sm90a => (limits::SMEM_BYTES_PER_CTA, limits::SMEM_BYTES_PER_SM),
        };
        assert!(facts.smem_bytes <= of_cta, "{spec:?}");
        assert!(facts.ctas_per_sm * (facts.smem_bytes + 1024) <= of_sm, "{spec:?}");
    }
    let spec =
        space::default_attn(AttnOp::Fwd, Dtype::Bf16, 128, Lists::Dense, Deterministic::No, Arch::Sm90a)
            .unwrap();
    // Q 128x128, two stages of K and V 128x128, bf16, 2 KB of barriers and slack.
    assert_eq!(KernelSpec::Attn(spec).facts().smem_bytes, 2 * (128 * 128 + 2 * 2 * 128 * 128) + 2048);
}

#[test]
fn warpgroups_ask_for_no_more_registers_than_their_launch_holds() {
    for spec in all_attn() {
        let spec = KernelSpec::Attn(spec);
        let facts = spec.facts();
        if facts.consumer_registers == 0 {
            continue;
        }
        // `__launch_bounds__` gives each thread its share, in steps of 8; a `setmaxnreg` beyond what the CTA holds waits
        // forever.
        let held = limits::REGISTERS_PER_SM / (facts.threads * facts.ctas_per_sm) / 8 * 8;
        let consumers = facts.threads - 128;
        let asked = consumers * facts.consumer_registers + 128 * facts.producer_registers;
        assert!(asked <= facts.threads * held.min(255), "{spec}: {asked} of {}", facts.threads * held);
    }
}

#[test]
fn shipped_sm80_kernels_fit_the_smallest_gpu_that_runs_them() {
    let shipped = space::shipped(Arch::Sm80);
    assert!(shipped.iter().filter(|s| matches!(s, KernelSpec::Attn(_))).count() >= 16);
    for spec in shipped {
        assert!(spec.facts().smem_bytes <= limits::SM86_SMEM_BYTES_PER_CTA, "{spec}");
    }
}

#[test]
fn sm80_has_no_deterministic_backward_and_says_so() {
    for name in [
        "attn_bwd_bf16_d64_qg0_kb0_sp0_m64n64_g1c1s2x1_grid_det_sm80",
        "attn_bwd_dq_bf16_d64_qg0_kb0_sp0_m64n64_g1c1s2x1_grid_det_sm80",
    ] {
        let error = name.parse::<KernelSpec>().unwrap_err().to_string();
        assert!(error.contains("arch sm80 is not possible: sm90a for a deterministic backward"), "{error}");
    }
}

#[test]
fn a_text_runs_where_its_instructions_are() {
    assert_eq!(Arch::Sm80.nvrtc_for(8, 0), Some("sm_80"));
    assert_eq!(Arch::Sm80.nvrtc_for(8, 9), Some("sm_80"));
    assert_eq!(Arch::Sm80.nvrtc_for(9, 0), Some("sm_90a"));
    assert_eq!(Arch::Sm90a.nvrtc_for(9, 0), Some("sm_90a"));
    assert_eq!(Arch::Sm90a.nvrtc_for(8, 0), None);
    assert_eq!(Arch::Sm80.nvrtc_for(7, 5), None);
    // A cubin made ahead is another matter.
    assert!(!Arch::Sm80.runs_on(9, 0) && Arch::Sm80.runs_on(8, 6));
}

fn meta() -> TableMeta {
    TableMeta {
        schema: SCHEMA,
        gpu: "NVIDIA H100 80GB HBM3".into(),
        arch: Arch::Sm90a,
        driver: "580.0".into(),
        compiler: "nvrtc 13.0".into(),
        clocks: "1980/2619".into(),
        date: "2026-01-01".into(),
    }
}

fn problem(lists: Lists, seqlen: u32, max_selected: u32) -> Problem {
    Problem {
        op: AttnOp::Fwd,
        dtype: Dtype::Bf16,
        head_dim: 128,
        lists,
        batch: 1,
        num_heads: 16,
        num_kv_heads: 16,
        seqlen_q: seqlen,
        seqlen_kv: seqlen,
        max_selected,
        deterministic: Deterministic::No,
    }
}

fn entry(problem: &Problem) -> TableEntry {
    let kernel = space::default_attn(
        problem.op,
        problem.dtype,
        problem.head_dim,
        problem.lists,
        Deterministic::No,
        Arch::Sm90a,
    )
    .unwrap();
    TableEntry {
        bucket: problem.bucket(),
        kernel: KernelSpec::Attn(kernel),
        source_hash: "00".into(),
        median_us: 12.5,
        spread_us: 0.5,
        runner_up_us: None,
        tried: 3,
        failed: 1,
    }
}

#[test]
fn problems_fall_into_the_nearest_bucket() {
    let blocks = Lists::Blocks { query_group: 64, kv_block: 64 };
    let bucket = problem(blocks, 30_000, 47).bucket();
    assert_eq!((bucket.sparsity, bucket.seqlen), (90, 32_768));
    let bucket = problem(Lists::Dense, 5, 0).bucket();
    assert_eq!((bucket.sparsity, bucket.seqlen), (0, 4096));
}

#[test]
fn a_table_round_trips_one_entry_a_line() {
    let blocks = Lists::Blocks { query_group: 128, kv_block: 128 };
    let problems = [problem(blocks, 32_768, 26), problem(Lists::Dense, 32_768, 0)];
    let table = DispatchTable::new(meta(), problems.iter().map(entry).collect(), vec![]);
    let text = table.to_json();
    assert_eq!(text.lines().filter(|l| l.contains("\"kernel\"")).count(), 2);
    let back = DispatchTable::from_json("here", &text).unwrap();
    assert_eq!(back, table);
    assert!(matches!(back.lookup(&problems[0]), Found::Exact(e) if e.bucket.kv_block == 128));
    assert!(matches!(back.lookup(&problem(blocks, 4096, 16)), Found::Nearest(_)));
    assert_eq!(
        back.lookup(&problem(Lists::Blocks { query_group: 64, kv_block: 64 }, 4096, 16)),
        Found::Nothing
    );
}

#[test]
fn a_bad_table_reports_every_problem() {
    let dense = entry(&problem(Lists::Dense, 32_768, 0));
    let mut wrong = entry(&problem(Lists::Blocks { query_group: 64, kv_block: 64 }, 32_768, 51));
    wrong.kernel = dense.kernel;
    let table =
        DispatchTable::new(TableMeta { schema: 99, ..meta() }, vec![dense.clone(), dense, wrong], vec![]);
    let error = DispatchTable::from_json("t.json", &table.to_json()).unwrap_err();
    assert_eq!(error.problems.len(), 3, "{error}");
    assert!(error.to_string().contains("t.json") && error.to_string().contains("dsv-autotune"), "{error}");
    let error = DispatchTable::from_json("t.json", "{\"meta\": 3").unwrap_err();
    assert_eq!(error.problems.len(), 1);
}

#[test]
fn a_foreign_table_is_refused() {
    let table = DispatchTable::new(meta(), vec![], vec![]);
    assert!(table.check_gpu("t", "NVIDIA H100 80GB HBM3", 9, 0).is_ok());
    let error = table.check_gpu("t", "NVIDIA A100", 8, 0).unwrap_err();
    assert_eq!(error.problems.len(), 2, "{error}");
}

#[test]
fn records_round_trip() {
    let problem = problem(Lists::Dense, 4096, 0);
    for outcome in [
        Outcome::Ok { timing: Timing { median_us: 1.0, spread_us: 0.1, samples: 20 }, error_ratio: 0.3 },
        Outcome::Wrong { message: "dq at 3".into() },
    ] {
        let record = TuneRecord {
            spec: entry(&problem).kernel,
            problem,
            sparsity: 0,
            lists: "dense".into(),
            source_hash: "00".into(),
            outcome,
        };
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<TuneRecord>(&text).unwrap(), record);
    }
}

#[test]
fn the_vocabulary_reaches_what_comes_later() {
    // Clusters have a place in tile and name, though no template serves them.
    let tile = AttnTile {
        block_m: 128,
        block_n: 64,
        groups: 2,
        consumers: 2,
        stages: 2,
        cluster: 2,
        schedule: Schedule::Persistent,
    };
    let lists = Lists::Blocks { query_group: 64, kv_block: 64 };
    let spec = |tile, lists, op| {
        AttnSpec::new(op, Dtype::Bf16, 128, lists, Sparsity::Any, tile, Deterministic::Yes, Arch::Sm90a)
    };
    let what = |tile, lists, op| spec(tile, lists, op).unwrap_err().what;
    assert!(what(tile, lists, AttnOp::Fwd) == "cluster");
    let tile = AttnTile { cluster: 1, ..tile };
    assert!(spec(tile, lists, AttnOp::Fwd).is_ok());
    // Two groups are for CTAs that stay, and these for the forward and dQ over blocks.
    assert!(what(AttnTile { schedule: Schedule::Grid, ..tile }, lists, AttnOp::Fwd) == "groups");
    assert!(what(tile, Lists::Blocks { query_group: 64, kv_block: 8 }, AttnOp::Fwd) == "schedule");
    assert!(what(tile, Lists::Dense, AttnOp::BwdDq) == "sparsity");
    assert!(what(tile, lists, AttnOp::BwdPost) == "lists");
    let shipped = space::shipped(Arch::Sm90a);
    for op in [
        "kv_select",
        "kv_invert",
        "kv_validate",
        "adamw",
        "attn_fwd",
        "attn_bwd",
        "attn_bwd_prep",
        "attn_bwd_post",
    ] {
        assert!(shipped.iter().any(|s| s.op() == op), "{op} is shipped");
    }
}

#[test]
fn token_order_is_a_permutation_of_nested_cubes() {
    for (grid, group) in [
        (Grid { t: 16, h: 16, w: 16 }, 64),
        (Grid { t: 16, h: 16, w: 16 }, 128),
        (Grid { t: 5, h: 7, w: 9 }, 64),
        (Grid { t: 1, h: 1, w: 3 }, 8),
    ] {
        let order = token_order(grid, Cube::of_group(group));
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..grid.tokens() as u32));
        let inverse = invert_order(&order);
        assert!(order.iter().enumerate().all(|(i, &r)| inverse[r as usize] == i as u32));
    }
}

#[test]
fn consecutive_tokens_fill_cubes() {
    let grid = Grid { t: 8, h: 8, w: 16 };
    let order = token_order(grid, Cube::of_group(128));
    for (size, sides) in [(8, (2, 2, 2)), (64, (4, 4, 4)), (128, (4, 4, 8))] {
        for chunk in order.chunks(size) {
            let at: Vec<_> = chunk.iter().map(|&r| grid.coordinates(r)).collect();
            let span = |f: fn(&(u32, u32, u32)) -> u32| {
                at.iter().map(f).max().unwrap() - at.iter().map(f).min().unwrap() + 1
            };
            assert_eq!((span(|c| c.0), span(|c| c.1), span(|c| c.2)), sides, "{size}");
        }
    }
}

#[test]
fn only_the_last_group_is_cut() {
    // 5x7x9 holds 1x1x2 whole cubes of 4x4x4; the rest follows them.
    let grid = Grid { t: 5, h: 7, w: 9 };
    let order = token_order(grid, Cube { t: 4, h: 4, w: 4 });
    for chunk in order[..128].chunks(64) {
        let at: Vec<_> = chunk.iter().map(|&r| grid.coordinates(r)).collect();
        assert!(at.iter().all(|c| c.0 < 4 && c.1 < 4));
    }
}

#[test]
fn cubes_have_shapes_and_names() {
    let shapes = |group| Cube::shapes(group).iter().map(Cube::to_string).collect::<Vec<_>>().join(" ");
    assert_eq!(shapes(64), "4x4x4 1x8x8 2x4x8 8x2x4 16x2x2 32x1x2 64x1x1");
    assert_eq!(shapes(128), "4x4x8 1x8x16 2x8x8 8x4x4 16x2x4 32x2x2 64x1x2 128x1x1");
    assert_eq!(shapes(8), "2x2x2 1x2x4 4x1x2 8x1x1");
    assert_eq!(shapes(48), "2x4x4 1x4x8 4x2x4 8x2x2 16x1x2 32x1x1", "the largest power of two below");
    let grid = Grid { t: 4, h: 8, w: 8 };
    for cube in Cube::shapes(256) {
        assert_eq!(cube.tokens(), 256);
        assert_eq!(cube.to_string().parse(), Ok(cube));
        assert_eq!(cube.fits(grid), cube == (Cube { t: 4, h: 8, w: 8 }), "{cube}");
        let mut order = token_order(Grid { t: 32, h: 16, w: 16 }, cube);
        order.sort_unstable();
        assert!(order.into_iter().eq(0..8192));
    }
    for wrong in ["4x4", "4x4x4x4", "4x3x8", "0x4x4", "4x4x", "04x4x4", "+4x4x4", "512x1x1", "4X4X4", ""] {
        let error = wrong.parse::<Cube>().unwrap_err();
        assert!(error.contains("as in 4x4x8") && error.contains(&format!("{wrong:?}")), "{error}");
    }
}
