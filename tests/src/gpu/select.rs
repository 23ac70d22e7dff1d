//! `kv_select`: scores against f64, lists exactly the top-k of the scores.

use super::tensor::{Flat, Tensor, flag_is, same};
use super::{ARCH, Gpu, GpuTest, Outcome};
use crate::corpus::LayoutKind;
use crate::inputs::Placement;
use dsv_reference::attention::{Layout, View};
use dsv_reference::lists::ListDims;
use dsv_reference::rng::SplitMix64;
use dsv_reference::select::{Keep, keep, scores_f64, top_k};
use dsv_runtime::{QueryLists, SelectArgs, SelectProblem};
use dsv_spec::params::error_bits;
use dsv_spec::{Dtype, GroupRule, KernelSpec, SelectSpec, space};
use half::bf16;
use serde::Deserialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Scores {
    Normal,
    Equal,
    Giant,
    Nan,
    Infinite,
    ZeroSigns,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Raises {
    None,
    TopK,
    Nan,
}

/// How many blocks a head keeps.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged)]
enum Count {
    Number(i32),
    Word(All),
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum All {
    All,
}

/// One entry of `cases/select.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(default = "one")]
    batch: usize,
    seqlen_q: usize,
    seqlen_kv: usize,
    top_k: Vec<Count>,
    max_selected: usize,
    #[serde(default = "normal")]
    values: Scores,
    #[serde(default)]
    keep_first: usize,
    #[serde(default)]
    keep_own: bool,
    #[serde(default)]
    keep_mask: f64,
    #[serde(default = "none")]
    raises: Raises,
    #[serde(default = "bshd")]
    layout: LayoutKind,
    seed: u64,
}

fn one() -> usize {
    1
}
fn normal() -> Scores {
    Scores::Normal
}
fn none() -> Raises {
    Raises::None
}
fn bshd() -> LayoutKind {
    LayoutKind::Bshd
}

/// Kernels of other ranks than those shipped: rank, query_group, kv_block and group rule.
const OTHER_RANKS: [(u8, u16, u16, GroupRule); 3] =
    [(32, 64, 64, GroupRule::Centre), (48, 128, 128, GroupRule::Mean), (64, 64, 64, GroupRule::Mean)];

/// Each case with each block size and group rule, and with every rank.
pub(super) fn tests() -> Vec<GpuTest> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        case: Vec<Case>,
    }
    let file: File = toml::from_str(include_str!("../../cases/select.toml"))
        .unwrap_or_else(|e| panic!("cases/select.toml: {e}"));
    let shipped = space::SHIPPED_RANKS.into_iter().flat_map(|rank| {
        space::SHIPPED_BLOCK_SIZES.into_iter().flat_map(move |(query_group, kv_block)| {
            GroupRule::PROXIES.map(|rule| (rank, query_group, kv_block, rule))
        })
    });
    let kernels: Vec<SelectSpec> = shipped
        .chain(OTHER_RANKS)
        .map(|(rank, query_group, kv_block, rule)| {
            space::default_select(rank, query_group, kv_block, rule, ARCH)
                .unwrap_or_else(|| panic!("no kv_select of rank {rank}, ({query_group}, {kv_block}), {rule}"))
        })
        .collect();
    let mut tests = Vec::new();
    for case in &file.case {
        for &spec in &kernels {
            let case = case.clone();
            tests.push(GpuTest::new(
                format!("kv_select/{}/{}", case.name, KernelSpec::Select(spec)),
                vec![KernelSpec::Select(spec)],
                move |gpu| run(gpu, &case, spec),
            ));
        }
    }
    tests
}

fn run(gpu: &mut Gpu, case: &Case, spec: SelectSpec) -> Outcome {
    let kernel = gpu.kernel(&KernelSpec::Select(spec))?;
    let gpu = &*gpu;
    let (query_group, kv_block, rule) = (spec.query_group(), spec.kv_block(), spec.group_rule());
    let rank = usize::from(spec.rank());
    let heads = case.top_k.len();
    let dims = ListDims {
        batch: case.batch,
        num_heads: heads,
        seqlen_q: case.seqlen_q,
        seqlen_kv: case.seqlen_kv,
        query_group: usize::from(query_group),
        kv_block: usize::from(kv_block),
        max_selected: case.max_selected,
    };
    let top_k_of = |&count: &Count| match count {
        Count::Number(k) => k,
        Count::Word(All::All) => dims.blocks() as i32,
    };
    let asked: Vec<i32> = case.top_k.iter().map(top_k_of).collect();
    let problem = SelectProblem {
        rank: spec.rank(),
        query_group,
        kv_block,
        group_rule: rule,
        keep: dsv_runtime::Keep { first: case.keep_first as u32, own: case.keep_own },
        batch: case.batch as u32,
        num_heads: heads as u32,
        seqlen_q: case.seqlen_q as u32,
        seqlen_kv: case.seqlen_kv as u32,
        max_selected: case.max_selected as u32,
    };
    let (q, k) = numbers(case, rank);
    let (q_rows, k_rows) =
        ([case.batch, case.seqlen_q, heads, rank], [case.batch, case.seqlen_kv, heads, rank]);
    let place = |n, d: [usize; 4]| Placement::of(case.layout, n, d[0], d[1], d[2], d[3]);
    let (q_place, k_place) = (place(0, q_rows), place(1, k_rows));
    let q_lr = Tensor::with_rows(gpu, "q_lr", Dtype::Bf16, q_place, q_rows, &q)?;
    let k_lr = Tensor::with_rows(gpu, "k_lr", Dtype::Bf16, k_place, k_rows, &k)?;
    let top_k_flat = Flat::of(gpu, "top_k", &asked)?;
    let kept = kept_bits(case.keep_mask, case.seed, &dims);
    let mask = Flat::of(gpu, "keep_mask", &kept)?;
    let plan =
        gpu.runtime.selection_with(&problem, Tensor::layout(&q_place), Tensor::layout(&k_place), kernel)?;

    let mut runs = Vec::new();
    for dump in [true, false] {
        // 0xFF: -1 in every list entry, as the reference leaves them.
        let index = Flat::poisoned(gpu, "q2k_index", 4 * dims.lists() * dims.max_selected, 0xFF)?;
        let count = Flat::poisoned(gpu, "q2k_count", 4 * dims.lists(), 0xFF)?;
        let scores = Flat::poisoned(gpu, "scores", 4 * dims.lists() * dims.blocks(), 0xFF)?;
        let flag = Flat::of(gpu, "error_flag", &[0i32])?;
        let args = SelectArgs {
            q_lr: q_lr.address(),
            k_lr: k_lr.address(),
            top_k: top_k_flat.address(),
            lists: QueryLists { q2k_index: index.address(), q2k_count: count.address() },
            scores: dump.then_some(scores.address()),
            keep_mask: (!kept.is_empty()).then_some(mask.address()),
            error_flag: flag.address(),
        };
        // SAFETY: every buffer was made for this plan's sizes and layouts, and lives past the wait.
        unsafe { plan.select(&gpu.stream, &args)? };
        gpu.wait()?;
        let raised = match case.raises {
            Raises::None => 0,
            Raises::TopK => error_bits::TOP_K_OUT_OF_RANGE,
            Raises::Nan => error_bits::SCORE_IS_NAN,
        };
        flag_is(flag.read::<i32>(gpu)?[0], raised)?;
        runs.push((index.read::<i32>(gpu)?, count.read::<i32>(gpu)?, scores.read::<f32>(gpu)?));
    }
    let (index, count, scores) = &runs[0];

    // Scores: products of bf16 are exact in f32, `rank` of them are summed. The mean proxy is rounded to bf16 once,
    // and its f32 sum may fall on the other side of a rounding boundary.
    let view = |data, seqlen| View::new(data, Layout::bshd(seqlen, heads, rank));
    let mut exact = scores_f64(
        &dims,
        rank,
        &view(&q[..], case.seqlen_q),
        &view(&k[..], case.seqlen_kv),
        rule,
        Some(Dtype::Bf16),
    )?;
    keep(&dims, Keep { first: case.keep_first, own: case.keep_own, mask: &kept }, &mut exact)?;
    let absolute = |values: &[f32]| values.iter().map(|x| x.abs()).collect::<Vec<f32>>();
    let (q_abs, k_abs) = (absolute(&q), absolute(&k));
    let magnitude = scores_f64(
        &dims,
        rank,
        &view(&q_abs[..], case.seqlen_q),
        &view(&k_abs[..], case.seqlen_kv),
        rule,
        None,
    )?;
    let share = if rule == GroupRule::Centre { rank as f64 * 2f64.powi(-23) } else { 2f64.powi(-7) };
    let mut worst = 0.0f64;
    for (i, &score) in scores.iter().enumerate() {
        // A NaN ranks last.
        let wanted = if exact[i].is_nan() { f64::NEG_INFINITY } else { exact[i] };
        let near = (f64::from(score) - wanted).abs() <= share * magnitude[i];
        if !(near || f64::from(score) == wanted) {
            return Err(format!(
                "score {i} ([B, H, G, N] with G {}, N {}) is {score}, wanted {wanted} within {:e}",
                dims.groups(),
                dims.blocks(),
                share * magnitude[i]
            )
            .into());
        }
        if wanted.is_finite() {
            worst = worst.max((f64::from(score) - wanted).abs());
        }
    }

    // Lists: exactly the top-k of the scores the kernel has, ties to the smaller id, ascending; nothing else written.
    let budgets: Vec<i32> =
        asked.iter().map(|&k| k.clamp(0, dims.blocks() as i32).min(dims.max_selected as i32)).collect();
    let wanted = top_k(&dims, scores, &budgets)?;
    same("q2k_count", count, &wanted.count)?;
    same("q2k_index", index, &wanted.index)?;
    same("q2k_index of a second run, without scores", &runs[1].0, index)?;
    same("q2k_count of a second run, without scores", &runs[1].1, count)?;
    if runs[1].2.iter().any(|x| x.to_bits() != u32::MAX) {
        return Err("scores were written though none were asked for".into());
    }
    q_lr.rows(gpu)?;
    k_lr.rows(gpu)?;
    Ok(format!("  scores within {worst:.1e}"))
}

/// Words [G, ceil(N / 32)] with this share of the bits set; none of the last group's, and all of them in words past the last
/// unit, which no kernel may look at. Empty for a share of 0.
pub(super) fn kept_bits(share: f64, seed: u64, dims: &ListDims) -> Vec<u32> {
    if share == 0.0 {
        return Vec::new();
    }
    let (groups, units) = (dims.groups(), dims.blocks());
    let words = units.div_ceil(32);
    let mut rng = SplitMix64::new(seed + 1000);
    let mut bits = vec![0; groups * words];
    for (at, word) in bits.iter_mut().enumerate() {
        for bit in 0..32 {
            let past = at % words * 32 + bit >= units;
            let drawn = rng.uniform() < share && at / words + 1 < groups;
            *word |= u32::from(past || drawn) << bit;
        }
    }
    bits
}

/// q_lr and k_lr, packed, of bf16 values.
fn numbers(case: &Case, rank: usize) -> (Vec<f32>, Vec<f32>) {
    let heads = case.top_k.len();
    let mut rng = SplitMix64::new(case.seed);
    let mut q = rng.normals(case.batch * case.seqlen_q * heads * rank, 1.0);
    let mut k = rng.normals(case.batch * case.seqlen_kv * heads * rank, 1.0);
    // Row (0, some key, every head).
    let key = 5 * case.seqlen_kv / 7;
    let row = key * heads * rank..(key + 1) * heads * rank;
    match case.values {
        Scores::Normal => {}
        Scores::Equal => {
            q.chunks_exact_mut(rank).for_each(|row| row.fill(0.5));
            k.chunks_exact_mut(rank).for_each(|row| row.fill(0.25));
        }
        Scores::Giant => {
            q.iter_mut().for_each(|x| *x = x.abs());
            k[row].fill(1e30);
        }
        Scores::Nan => k[row].fill(f32::NAN),
        Scores::Infinite => {
            // Positive queries: the key's score is +inf for every group.
            q.iter_mut().for_each(|x| *x = x.abs() + 0.25);
            k[row].fill(f32::INFINITY);
        }
        Scores::ZeroSigns => {
            q.fill(1.0);
            for (i, row) in k.chunks_exact_mut(rank).enumerate() {
                row.fill(if (i / heads / 128).is_multiple_of(2) { -0.0 } else { 0.0 });
            }
        }
    }
    let round = |values: Vec<f32>| values.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
    (round(q), round(k))
}
