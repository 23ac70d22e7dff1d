//! The shipped kernels and the tuner's candidates: the one place to edit to serve more shapes.

use crate::attn::{AttnOp, AttnSpec, AttnTile, Lists, Schedule, Sparsity};
use crate::lists::{ListOp, ListSpec};
use crate::select::{BlockScore, Budget, GroupRule, SelectOp, SelectSpec, SelectTile};
use crate::types::{Arch, Deterministic, Dtype};
use crate::{KernelSpec, PointwiseOp, PointwiseSpec};

/// Head dims the shipped attention kernels serve, where the architecture's templates do: see [`shipped_head_dims`].
pub const SHIPPED_HEAD_DIMS: [u16; 4] = [64, 96, 128, 256];
/// Head dims the trainer's kernels serve. The predictor's loss keeps D x D sums in shared memory; of 256 they just fit, at rank 16.
pub const TRAINER_HEAD_DIMS: [u16; 4] = [64, 96, 128, 256];
/// Block sizes (query_group, kv_block) the shipped kernels serve, beside dense.
pub const SHIPPED_BLOCK_SIZES: [(u16, u16); 2] = [(64, 64), (128, 128)];
/// Granularities (query_group, kv_block) below a KV tile that the shipped attention kernels gather; others are rendered on
/// demand.
pub const SHIPPED_GATHER: [(u16, u16); 4] = [(64, 1), (64, 8), (128, 1), (128, 8)];
/// Head dims of the shipped gather kernels.
pub const SHIPPED_GATHER_HEAD_DIMS: [u16; 3] = [64, 96, 128];
/// Granularities (query_group, kv_block) of the shipped `kv_select_fine` kernels, with the rules of one query; kv_block 1
/// is the token. Others are rendered on demand.
pub const SHIPPED_GRANULARITIES: [(u16, u16); 4] = [(64, 1), (64, 8), (128, 1), (128, 8)];
/// Those of them that are shipped with the budget `top_p`, too, by the centre query.
pub const SHIPPED_TOP_P: [(u16, u16); 2] = [(64, 8), (128, 8)];
/// Ranks (d_lr) of the shipped selection kernels and of the predictor's, of [`crate::RANKS`]. Others are rendered on demand.
pub const SHIPPED_RANKS: [u8; 1] = [16];
/// Dtypes the shipped attention kernels serve.
pub const SHIPPED_DTYPES: [Dtype; 1] = [Dtype::Bf16];

/// The shipped head dims of an architecture: those its templates serve.
pub fn shipped_head_dims(arch: Arch) -> impl Iterator<Item = u16> {
    SHIPPED_HEAD_DIMS.into_iter().filter(move |&head_dim| is_in_templates(head_dim, arch))
}

fn is_in_templates(head_dim: u16, arch: Arch) -> bool {
    !candidates(AttnOp::Fwd, Dtype::Bf16, head_dim, Lists::Dense, arch).is_empty()
}

/// The edits that make a head_dim served on an architecture, for error messages.
pub fn how_to_add_head_dim(head_dim: u16, arch: Arch) -> String {
    let list = format!("put {head_dim} in SHIPPED_HEAD_DIMS (codegen/spec/src/space.rs)");
    let templates = "let the templates serve it (README.md, \"A head_dim\")";
    match (SHIPPED_HEAD_DIMS.contains(&head_dim), is_in_templates(head_dim, arch)) {
        (true, _) => templates.to_owned(),
        (false, true) => list,
        (false, false) => format!("{list} and {templates}"),
    }
}

/// Dense and every shipped block size.
pub fn shipped_lists() -> impl Iterator<Item = Lists> {
    std::iter::once(Lists::Dense).chain(
        SHIPPED_BLOCK_SIZES
            .into_iter()
            .map(|(query_group, kv_block)| Lists::Blocks { query_group, kv_block }),
    )
}

/// The shipped block sizes of the same kind as these lists, gathered or not, and the constant that holds them.
pub const fn shipped_sizes(lists: Lists) -> (&'static [(u16, u16)], &'static str) {
    match lists.is_gather() {
        true => (&SHIPPED_GATHER, "SHIPPED_GATHER"),
        false => (&SHIPPED_BLOCK_SIZES, "SHIPPED_BLOCK_SIZES"),
    }
}

/// Every shipped granularity below a KV tile.
pub fn shipped_gather() -> impl Iterator<Item = Lists> {
    SHIPPED_GATHER.into_iter().map(|(query_group, kv_block)| Lists::Blocks { query_group, kv_block })
}

/// The feasible tiles of one kernel, best guess first; the tuner times them all.
///
/// Of `attn_bwd` both forms come, first those that reduce dQ by atomics, then those that leave it to `attn_bwd_dq`.
pub fn candidates(op: AttnOp, dtype: Dtype, head_dim: u16, lists: Lists, arch: Arch) -> Vec<AttnSpec> {
    let tile = |block_m, block_n, consumers, stages| AttnTile {
        block_m,
        block_n,
        groups: 1,
        consumers,
        stages,
        cluster: 1,
        schedule: Schedule::Grid,
    };
    let persistent = |groups, block_n, stages| AttnTile {
        groups,
        schedule: Schedule::Persistent,
        ..tile(128, block_n, 2, stages)
    };
    let small = head_dim <= 64;
    let tiles: Vec<(u16, u16, u8, u8)> = match op {
        // Two consumers where the group has rows for them: every gathered token then serves twice the queries. One leaves
        // room for a second CTA, whose products run while the first waits for L2.
        AttnOp::Fwd if lists.is_gather() => {
            vec![
                (128, 128, 2, 2),
                (128, 176, 2, 2),
                (128, 64, 2, if head_dim > 128 { 2 } else { 4 }),
                (64, 64, 1, 2),
                (64, 128, 1, 2),
            ]
        }
        AttnOp::Bwd if lists.is_gather() => vec![(128, 128, 2, 2), (64, 64, 1, 2), (64, 64, 1, 3)],
        AttnOp::Fwd if arch == Arch::Sm80 => vec![
            (128, 64, 1, if small { 2 } else { 1 }),
            (64, 64, 1, 2),
            (64, 64, 1, 1),
            (128, 64, 1, 2),
            (128, 64, 2, 2),
            (128, 128, 1, 1),
        ],
        AttnOp::Bwd if arch == Arch::Sm80 && small => vec![(64, 64, 1, 2), (64, 64, 1, 1), (64, 128, 2, 1)],
        AttnOp::Bwd if arch == Arch::Sm80 => vec![(64, 64, 1, 1), (64, 64, 1, 2), (64, 128, 2, 1)],
        AttnOp::Fwd if small => vec![
            (192, 128, 3, 2),
            (64, 128, 1, 3),
            (64, 128, 1, 2),
            (128, 128, 2, 3),
            (64, 64, 1, 2),
            (64, 64, 1, 3),
            (192, 96, 3, 2),
            (128, 176, 2, 2),
            (128, 128, 2, 2),
            (128, 64, 2, 3),
            (128, 64, 2, 4),
        ],
        AttnOp::Fwd if head_dim <= 96 => vec![
            (192, 96, 3, 2),
            (128, 128, 2, 2),
            (128, 176, 2, 2),
            (64, 64, 1, 2),
            (64, 128, 1, 2),
            (128, 64, 2, 3),
            (128, 64, 2, 4),
        ],
        AttnOp::Fwd if head_dim > 128 => {
            vec![(128, 80, 2, 2), (128, 64, 2, 2), (64, 64, 1, 2), (64, 64, 1, 3)]
        }
        AttnOp::Fwd => vec![
            (128, 128, 2, 2),
            (128, 176, 2, 2),
            (64, 64, 1, 2),
            (128, 64, 2, 3),
            (128, 64, 2, 4),
            (64, 64, 1, 3),
            (64, 128, 1, 2),
        ],
        AttnOp::Bwd if small => {
            vec![(128, 128, 2, 2), (64, 64, 1, 2), (64, 128, 2, 2), (64, 64, 1, 3)]
        }
        AttnOp::Bwd if head_dim > 128 => vec![(64, 64, 2, 2)],
        AttnOp::Bwd => vec![(64, 128, 2, 2), (64, 64, 1, 2), (64, 64, 1, 3)],
        AttnOp::BwdDq if head_dim > 128 => {
            vec![(128, 32, 2, 3), (64, 32, 1, 4), (128, 32, 2, 2), (64, 32, 1, 2)]
        }
        AttnOp::BwdDq => {
            vec![(128, 64, 2, 3), (64, 64, 1, 2), (128, 128, 2, 2), (128, 64, 2, 2), (192, 64, 3, 2)]
        }
        AttnOp::BwdPrep | AttnOp::BwdPost | AttnOp::BwdPostKv => vec![(64, 0, 1, 0)],
    };
    let mut tiles: Vec<AttnTile> = tiles.into_iter().map(|(m, n, c, s)| tile(m, n, c, s)).collect();
    // Over lists CTAs that stay are faster than one a tile, and two groups in a CTA share what both list. At head_dim 64 and 96
    // random lists are walked faster a group a CTA.
    if op == AttnOp::Fwd && arch == Arch::Sm90a {
        let (one, two) = match head_dim {
            ..=64 => (persistent(1, 128, 3), persistent(2, 128, 3)),
            65..=128 => (persistent(1, 128, 2), persistent(2, 128, 3)),
            _ => (persistent(1, 64, 2), persistent(2, 64, 2)),
        };
        tiles.insert(0, one);
        tiles.insert(if head_dim == 128 { 0 } else { tiles.len() }, two);
        if small {
            // With room for two S.
            tiles.push(persistent(2, 128, 4));
        }
    }
    // The same for dQ; a group's K is read for a tile more, so two groups take four stages.
    if op == AttnOp::BwdDq && arch == Arch::Sm90a {
        if head_dim > 128 {
            tiles.push(persistent(1, 32, 3));
        } else {
            tiles.extend([persistent(1, 64, 3), persistent(2, 64, 4)]);
        }
    }
    let sparsity = if lists.is_dense() { Sparsity::Percent(0) } else { Sparsity::Any };
    // Where a head does not fit L2, CTAs that walk it together share what they read. Dense ones walk in step anyway.
    if op == AttnOp::Bwd && arch == Arch::Sm90a && !lists.is_gather() && !lists.is_dense() {
        tiles.extend(tiles.first().map(|&first| AttnTile { schedule: Schedule::Ring, ..first }));
    }
    let forms: &[Deterministic] = if op == AttnOp::Bwd { Deterministic::ALL } else { &[Deterministic::Yes] };
    let mut specs: Vec<AttnSpec> = forms
        .iter()
        .flat_map(|&form| {
            let spec = move |&tile: &AttnTile| {
                AttnSpec::new(op, dtype, head_dim, lists, sparsity, tile, form, arch).ok()
            };
            tiles.iter().filter_map(spec).collect::<Vec<_>>()
        })
        .collect();
    // Tiles of two blocks are for two consumers that take turns; a lone one does better with more CTAs beside it.
    specs.sort_by_key(|spec| spec.kv_box_rows() < spec.tile().block_n && spec.tile().consumers == 1);
    specs
}

/// The kernel taken where no table answers: the first candidate that is as deterministic as asked.
pub fn default_attn(
    op: AttnOp,
    dtype: Dtype,
    head_dim: u16,
    lists: Lists,
    deterministic: Deterministic,
    arch: Arch,
) -> Option<AttnSpec> {
    let lists = if op.is_of_any_lists() { Lists::Dense } else { lists };
    let candidates = candidates(op, dtype, head_dim, lists, arch);
    candidates.into_iter().find(|spec| spec.deterministic() >= deterministic)
}

/// The selection kernel of a rank and block size.
pub fn default_select(
    rank: u8,
    query_group: u16,
    kv_block: u16,
    group_rule: GroupRule,
    arch: Arch,
) -> Option<SelectSpec> {
    let tile = SelectTile { groups: 16, warps: 8 };
    SelectSpec::new(
        SelectOp::Rows,
        Dtype::Bf16,
        rank,
        query_group,
        kv_block,
        group_rule,
        BlockScore::Max,
        Budget::TopK,
        tile,
        arch,
    )
    .ok()
}

/// The selection kernel of a rank and granularity that recomputes its scores, with the largest score of a block and a number a
/// head.
pub fn default_select_fine(
    rank: u8,
    query_group: u16,
    kv_block: u16,
    group_rule: GroupRule,
    arch: Arch,
) -> Option<SelectSpec> {
    select_fine(rank, query_group, kv_block, group_rule, BlockScore::Max, Budget::TopK, arch)
}

/// The selection kernel of a rank, granularity, block score and budget that recomputes its scores; None where no such spec
/// exists.
pub fn select_fine(
    rank: u8,
    query_group: u16,
    kv_block: u16,
    group_rule: GroupRule,
    block_score: BlockScore,
    budget: Budget,
    arch: Arch,
) -> Option<SelectSpec> {
    let tile = SelectTile { groups: 64 / group_rule.queries(), warps: 16 };
    SelectSpec::new(
        SelectOp::Fine,
        Dtype::Bf16,
        rank,
        query_group,
        kv_block,
        group_rule,
        block_score,
        budget,
        tile,
        arch,
    )
    .ok()
}

/// Every committed kernel of an architecture, sorted by name: defaults, and what the committed tables name.
pub fn shipped(arch: Arch) -> Vec<KernelSpec> {
    let mut specs = Vec::new();
    for dtype in SHIPPED_DTYPES {
        for head_dim in shipped_head_dims(arch) {
            for &op in AttnOp::ALL {
                for lists in shipped_lists() {
                    for &deterministic in Deterministic::ALL {
                        specs.extend(
                            default_attn(op, dtype, head_dim, lists, deterministic, arch)
                                .map(KernelSpec::Attn),
                        );
                    }
                }
            }
        }
        for head_dim in SHIPPED_GATHER_HEAD_DIMS {
            for lists in shipped_gather() {
                for op in [AttnOp::Fwd, AttnOp::Bwd] {
                    let spec = default_attn(op, dtype, head_dim, lists, Deterministic::No, arch);
                    specs.extend(spec.map(KernelSpec::Attn));
                }
            }
        }
        // Of the trainer's kernels, sm80 ships what the runtime itself launches.
        for &op in PointwiseOp::ALL.iter().filter(|&&op| arch != Arch::Sm80 || op == PointwiseOp::AdamW) {
            for dim in TRAINER_HEAD_DIMS {
                let spec = |rank| PointwiseSpec::shipped(op, dtype, dim, rank, arch);
                specs.extend(SHIPPED_RANKS.into_iter().flat_map(spec).map(KernelSpec::Pointwise));
            }
        }
    }
    for rank in SHIPPED_RANKS {
        specs.extend(shipped_selections(rank, arch).map(KernelSpec::Select));
    }
    specs.extend(ListOp::ALL.iter().map(|&op| KernelSpec::List(ListSpec { op, arch })));
    specs.sort_by_key(|s| s.to_string());
    specs.dedup();
    specs
}

/// The shipped selection kernels of a rank.
pub fn shipped_selections(rank: u8, arch: Arch) -> impl Iterator<Item = SelectSpec> {
    let by_proxy = |sizes: &'static [(u16, u16)]| {
        sizes.iter().flat_map(|&(group, block)| GroupRule::PROXIES.map(|rule| (group, block, rule)))
    };
    let rows = by_proxy(&SHIPPED_BLOCK_SIZES)
        .filter_map(move |(group, block, rule)| default_select(rank, group, block, rule, arch));
    // Their shared memory is Hopper's: GPUs of sm80 with 100 KB an SM cannot hold it, so there they are rendered on demand.
    let fine = by_proxy(&SHIPPED_GRANULARITIES)
        .filter_map(move |(group, block, rule)| default_select_fine(rank, group, block, rule, arch));
    let top_p = SHIPPED_TOP_P.into_iter().filter_map(move |(group, block)| {
        select_fine(rank, group, block, GroupRule::Centre, BlockScore::Max, Budget::TopP, arch)
    });
    rows.chain(fine.chain(top_p).filter(move |_| arch != Arch::Sm80))
}
