use crate::problem;
use dsv_runtime::{AttnLayouts, Error, FineProblem, Keep, Layout, ListShape, MemoryNeeded, SelectProblem};
use dsv_spec::params::{
    AdamW, AttnBwd, AttnBwdDq, AttnBwdGather, AttnBwdPost, AttnBwdPostKv, AttnBwdPrep, AttnBwdViews, AttnFwd,
    AttnFwdGather, AttnFwdViews, KvInvert, KvSelect, KvSelectFine, KvValidate,
};
use dsv_spec::{
    Arch, AttnOp, BlockScore, Budget, Deterministic, GroupRule, KernelSpec, ListOp, Lists, PointwiseOp,
    Problem, SelectOp, limits, space,
};

fn problems(error: Error) -> Vec<String> {
    match error {
        Error::Plan { problems, .. } => problems,
        other => panic!("{other}"),
    }
}

#[test]
fn contiguous_layouts_of_both_orders_pass() {
    let p = Problem { batch: 2, ..problem() };
    for layouts in [AttnLayouts::bshd(&p), AttnLayouts::bhsd(&p)] {
        assert_eq!(layouts.check(&p).unwrap(), layouts);
    }
    assert_eq!(Layout::bshd(10, 4, 128), Layout { batch: 5120, seq: 512, head: 128 });
    assert_eq!(Layout::bhsd(10, 4, 128), Layout { batch: 5120, seq: 128, head: 1280 });
    // Q, K and V cut from one [B, S, 3, H, D] tensor.
    let fused = Layout { batch: 3 * 32_768 * 2048, seq: 3 * 2048, head: 128 };
    let layouts = AttnLayouts { q: fused, k: fused, v: fused, ..AttnLayouts::bshd(&p) };
    layouts.check(&p).unwrap();
}

#[test]
fn strides_of_dimensions_of_size_one_are_ignored_and_made_legal() {
    let p = Problem { batch: 1, num_heads: 1, num_kv_heads: 1, ..problem() };
    let odd = Layout { batch: -3, seq: 128, head: 1 };
    let layouts = AttnLayouts { q: odd, ..AttnLayouts::bshd(&p) };
    let legal = layouts.check(&p).unwrap().q;
    assert_eq!(legal, Layout { batch: 128, seq: 128, head: 128 });
}

#[test]
fn every_bad_stride_is_named() {
    let p = Problem { batch: 2, ..problem() };
    let good = AttnLayouts::bshd(&p);
    let bad = AttnLayouts {
        q: Layout { seq: 2044, ..good.q },
        k: Layout { head: 64, ..good.k },
        v: Layout { batch: 0, ..good.v },
        dq: Layout { head: 1 << 40, ..good.dq },
        ..good
    };
    let found = problems(bad.check(&p).unwrap_err());
    assert_eq!(found.len(), 4, "{found:#?}");
    assert_eq!(
        found[0],
        "q: stride 2044 of seq (size 32768); allowed: positive multiples of 8 elements (16 bytes, for TMA), below 2^40 \
         bytes"
    );
    assert_eq!(
        found[1],
        "k: stride 64 of head makes rows overlap; allowed: at least 128, what the inner dimensions span"
    );
    assert!(found[2].starts_with("v: stride 0 of batch"), "{}", found[2]);
    assert!(found[3].starts_with("dq: stride 1099511627776 of head"), "{}", found[3]);
    // The forward does not look at the backward's tensors.
    let found = problems(bad.check(&Problem { op: AttnOp::Fwd, ..p }).unwrap_err());
    assert_eq!(found.len(), 3, "{found:#?}");
}

#[test]
fn every_bad_size_is_named() {
    let bad = Problem { batch: 0, num_heads: 6, num_kv_heads: 4, max_selected: 0, ..problem() };
    let found = problems(AttnLayouts::bshd(&bad).check(&bad).unwrap_err());
    assert_eq!(found[0], "batch 0; allowed: 1 to 65535");
    assert!(found[1].starts_with("num_heads 6 is no multiple of num_kv_heads 4"), "{}", found[1]);
    assert!(found[2].starts_with("max_selected 0; allowed: at least 1"), "{}", found[2]);
    assert_eq!(found.len(), 3, "{found:#?}");

    let dense = Problem { lists: Lists::Dense, ..problem() };
    let found = problems(AttnLayouts::bshd(&dense).check(&dense).unwrap_err());
    assert_eq!(found, ["max_selected 51 of a dense problem; allowed: 0"]);

    let helper = Problem { op: AttnOp::BwdPrep, ..problem() };
    assert!(
        problems(AttnLayouts::bshd(&helper).check(&helper).unwrap_err())[0].starts_with("op attn_bwd_prep")
    );

    let wide = Problem { max_selected: 1 << 23, ..problem() };
    let found = problems(AttnLayouts::bshd(&wide).check(&wide).unwrap_err());
    assert!(found[0].contains("list entries a head; allowed: below 2^31"), "{}", found[0]);
}

#[test]
fn memory_of_a_problem() {
    let p = problem();
    let (heads, groups, blocks) = (16u64, 512u64, 512u64);
    let needed = MemoryNeeded::of(&p);
    assert_eq!(needed.query_lists, 4 * heads * groups * (51 + 1));
    assert_eq!(needed.key_lists, 4 * heads * (groups * 51 + blocks + 1));
    assert_eq!(needed.lse, 4 * heads * 32_768);
    // Row statistics, the order of the KV blocks, the ring's word a head rounded up, and the accumulator of dQ.
    let order = 4 * heads * blocks;
    assert_eq!(needed.workspace, 4 * heads * 32_768 * (2 + 128) + order + 256);
    assert_eq!(needed.total(), needed.query_lists + needed.key_lists + needed.lse + needed.workspace);

    let forward = MemoryNeeded::of(&Problem { op: AttnOp::Fwd, ..p });
    assert_eq!((forward.key_lists, forward.workspace), (0, 0));
    assert_eq!(forward.query_lists, needed.query_lists);

    let dense = MemoryNeeded::of(&Problem { lists: Lists::Dense, max_selected: 0, ..p });
    assert_eq!((dense.query_lists, dense.key_lists), (0, 0));
    assert_eq!(dense.workspace, needed.workspace - order);

    // Nothing is accumulated where dQ is computed on its own.
    let exact = MemoryNeeded::of(&Problem { deterministic: Deterministic::Yes, ..p });
    assert_eq!(exact.workspace, 4 * heads * 32_768 * 2 + order);

    // Gathered units: no inverted lists, and dK and dV are accumulated instead of dQ, for every KV head.
    let gather = Problem {
        lists: Lists::Blocks { query_group: 64, kv_block: 8 },
        num_kv_heads: 2,
        seqlen_kv: 32_767,
        ..p
    };
    let needed_by_gather = MemoryNeeded::of(&gather);
    assert_eq!(needed_by_gather.key_lists, 0);
    assert_eq!(
        needed_by_gather.workspace,
        4 * heads * 32_768 * 2 + p.batch as u64 * 2 * 32_768 * 2 * 128 * 4
    );

    // One token: rows are padded to the backward's largest tile of 128, parts to 256 bytes.
    let one = Problem { num_heads: 1, num_kv_heads: 1, seqlen_q: 1, seqlen_kv: 1, max_selected: 1, ..p };
    assert_eq!(MemoryNeeded::of(&one).workspace, 512 + 512 + 256 + 256 + 128 * 128 * 4);
}

#[test]
fn launch_parameters_have_the_size_the_facts_say() {
    for spec in Arch::ALL.iter().flat_map(|&arch| space::shipped(arch)) {
        let bytes = match &spec {
            KernelSpec::Attn(s) => match (s.op(), s.arch()) {
                (AttnOp::Fwd, Arch::Sm80) => size_of::<AttnFwdViews>(),
                (AttnOp::Fwd, Arch::Sm90a) if s.lists().is_gather() => size_of::<AttnFwdGather>(),
                (AttnOp::Fwd, Arch::Sm90a) => size_of::<AttnFwd>(),
                (AttnOp::BwdPrep, _) => size_of::<AttnBwdPrep>(),
                (AttnOp::Bwd, Arch::Sm80) => size_of::<AttnBwdViews>(),
                (AttnOp::Bwd, Arch::Sm90a) if s.lists().is_gather() => size_of::<AttnBwdGather>(),
                (AttnOp::Bwd, Arch::Sm90a) => size_of::<AttnBwd>(),
                (AttnOp::BwdDq, _) => size_of::<AttnBwdDq>(),
                (AttnOp::BwdPost, _) => size_of::<AttnBwdPost>(),
                (AttnOp::BwdPostKv, _) => size_of::<AttnBwdPostKv>(),
            },
            KernelSpec::Select(s) if s.op() == SelectOp::Rows => size_of::<KvSelect>(),
            KernelSpec::Select(_) => size_of::<KvSelectFine>(),
            KernelSpec::List(s) if s.op == ListOp::Invert => size_of::<KvInvert>(),
            KernelSpec::List(_) => size_of::<KvValidate>(),
            KernelSpec::Pointwise(s) if s.op == PointwiseOp::AdamW => size_of::<AdamW>(),
            // The trainer launches the others; their texts assert their sizes.
            KernelSpec::Pointwise(_) => continue,
        };
        assert_eq!(spec.facts().params_bytes as usize, bytes, "{spec}");
        // Kernel parameters are limited to 4 KB on every driver.
        assert!(bytes <= 4096, "{spec}");
    }
}

fn selection() -> SelectProblem {
    SelectProblem {
        rank: 16,
        query_group: 64,
        kv_block: 64,
        group_rule: GroupRule::Mean,
        keep: Keep::default(),
        batch: 1,
        num_heads: 16,
        seqlen_q: 32_768,
        seqlen_kv: 32_768,
        max_selected: 51,
    }
}

#[test]
fn selection_sizes_and_limits() {
    let p = selection();
    let (q, k) = (Layout::bshd(p.seqlen_q, 16, 16), Layout::bhsd(p.seqlen_kv, 16, 16));
    let (legal_q, _) = p.check(q, k).unwrap();
    assert_eq!(legal_q.batch, 16, "a batch of one has a stride nobody uses");
    assert_eq!(p.lists(), ListShape::of(&problem()));
    assert_eq!((p.score_stride(), p.smem_bytes()), (516, 16 * 516 * 4));
    let ragged = SelectProblem { seqlen_kv: 64 * 33 - 1, ..p };
    assert_eq!((ragged.lists().num_kv_blocks, ragged.score_stride()), (33, 68));

    // 227 KB hold the scores of 3616 KV blocks, not of 3617.
    let fits = SelectProblem { seqlen_kv: 64 * 3616, ..p };
    fits.check(q, Layout::bshd(fits.seqlen_kv, 16, 16)).unwrap();
    let long = SelectProblem { seqlen_kv: 64 * 3617, ..p };
    let found = problems(long.check(q, Layout::bshd(long.seqlen_kv, 16, 16)).unwrap_err());
    assert!(found[0].starts_with("3617 KV blocks need"), "{}", found[0]);

    let found = problems(p.check(Layout { seq: 20, ..q }, Layout { head: 8, ..k }).unwrap_err());
    assert_eq!(found.len(), 2, "{found:#?}");
    let kept = SelectProblem { keep: Keep { first: p.seqlen_kv + 1, own: false }, ..p };
    let found = problems(kept.check(q, k).unwrap_err());
    assert_eq!(found, ["keep.first 32769; allowed: 0 to 32768 (seqlen_kv)"]);
}

#[test]
fn fine_selection_sizes_and_limits() {
    let p = FineProblem {
        rank: 16,
        query_group: 64,
        kv_block: 8,
        group_rule: GroupRule::Centre,
        block_score: BlockScore::Max,
        budget: Budget::TopP,
        scale: 1.0,
        keep: Keep::default(),
        batch: 1,
        num_heads: 16,
        seqlen_q: 131_072,
        seqlen_kv: 131_072,
        max_selected: 1639,
    };
    let layouts = |p: &FineProblem| (Layout::bshd(p.seqlen_q, 16, 16), Layout::bhsd(p.seqlen_kv, 16, 16));
    let check = |p: &FineProblem| p.check(layouts(p).0, layouts(p).1);
    check(&p).unwrap();
    assert_eq!((p.lists().num_groups, p.lists().num_kv_blocks), (2048, 16_384));
    // A bit a unit: 2 KB a group; ids of a tenth of the tokens take 26 times that.
    assert_eq!(p.bitmap_bytes(), 16 * 2048 * 2048);
    let tokens = FineProblem { kv_block: 1, max_selected: 13_108, ..p };
    check(&tokens).unwrap();
    assert_eq!(tokens.lists().index_bytes(), 16 * 2048 * 13_108 * 4);
    assert_eq!(FineProblem { seqlen_kv: 257, ..p }.bitmap_bytes(), 16 * 2048 * 2 * 4);

    let bad =
        FineProblem { seqlen_kv: 80, max_selected: 11, scale: 0.0, keep: Keep { first: 81, own: true }, ..p };
    let found = problems(check(&bad).unwrap_err());
    assert_eq!(
        found,
        [
            "max_selected 11; allowed: 1 to 10 KV units of 8 tokens",
            "scale 0; allowed: finite and above 0 (1: products are logits)",
            "keep.first 81; allowed: 0 to 80 (seqlen_kv)"
        ]
    );
}

#[test]
fn list_sizes_and_limits() {
    let shape = ListShape { batch: 2, num_heads: 3, num_groups: 33, num_kv_blocks: 7, max_selected: 5 };
    shape.check().unwrap();
    assert_eq!(shape.index_bytes(), 4 * 6 * 33 * 5);
    assert_eq!(shape.count_bytes(), 4 * 6 * 33);
    assert_eq!(shape.offset_bytes(), 4 * 6 * 8);
    assert_eq!(shape.invert_smem_bytes(), 64 * 2 * 4);
    let most = limits::SMEM_BYTES_PER_CTA / 256 * 32;
    ListShape { num_groups: most, ..shape }.check().unwrap();
    let found = problems(ListShape { num_groups: most + 1, ..shape }.check().unwrap_err());
    assert!(found[0].contains(&format!("{most} groups")), "{}", found[0]);
    let dense = ListShape::of(&Problem { lists: Lists::Dense, max_selected: 0, ..problem() });
    assert_eq!(problems(dense.check().unwrap_err()).len(), 3);
}
