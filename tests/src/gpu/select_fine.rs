//! `kv_select_fine`: scores against f64, lists and bits exactly the top-k of the scores, at every granularity.

use super::select::kept_bits;
use super::tensor::{Flat, Tensor, flag_is, same};
use super::{ARCH, Gpu, GpuTest, Outcome};
use crate::corpus::LayoutKind;
use crate::inputs::Placement;
use dsv_reference::attention::{Layout, View};
use dsv_reference::lists::ListDims;
use dsv_reference::rng::SplitMix64;
use dsv_reference::select::{Keep, bitmap, block_scores_f64, keep, needed_for, top_of_each};
use dsv_runtime::{FineArgs, FineProblem};
use dsv_spec::params::error_bits;
use dsv_spec::{BlockScore, Budget, Dtype, GroupRule, KernelSpec, space};
use half::bf16;
use serde::Deserialize;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Values {
    #[default]
    Normal,
    Equal,
    Few,
    Giant,
    Nan,
    Infinite,
    ZeroSigns,
    Aliased,
    Drift,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Raises {
    #[default]
    None,
    TopK,
    Nan,
}

/// One entry of `cases/select_fine.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(default = "one")]
    batch: usize,
    seqlen_q: usize,
    seqlen_kv: usize,
    shares: Vec<f64>,
    #[serde(default = "whole")]
    width: f64,
    #[serde(default)]
    keep_first: usize,
    #[serde(default)]
    keep_own: bool,
    #[serde(default)]
    keep_mask: f64,
    #[serde(default)]
    values: Values,
    #[serde(default)]
    raises: Raises,
    #[serde(default = "bshd")]
    layout: LayoutKind,
    seed: u64,
}

fn one() -> usize {
    1
}
fn whole() -> f64 {
    1.0
}
fn bshd() -> LayoutKind {
    LayoutKind::Bshd
}

/// Every kernel body: tokens, one block a lane, several chunks a block; each rule, block score and budget; queries in
/// registers (rank 16) and in shared memory.
const GRANULARITIES: [Granularity; 30] = {
    use BlockScore::{Mass, Max};
    use Budget::{TopK, TopP};
    use GroupRule::{Centre, Mass4, Max4, Mean};
    [
        (16, 64, 1, Centre, Max, TopK),
        (16, 64, 1, Mean, Max, TopK),
        (16, 64, 1, Max4, Max, TopK),
        (16, 64, 1, Mass4, Mass, TopK),
        (16, 64, 8, Centre, Max, TopK),
        (16, 64, 8, Mean, Max, TopK),
        (16, 64, 8, Max4, Max, TopK),
        (16, 64, 8, Centre, Mass, TopK),
        (16, 64, 8, Max4, Mass, TopK),
        (16, 64, 8, Mass4, Mass, TopK),
        (16, 64, 16, Centre, Max, TopK),
        (16, 64, 16, Max4, Max, TopK),
        (16, 64, 64, Mean, Max, TopK),
        (16, 64, 64, Centre, Mass, TopK),
        (16, 128, 1, Mean, Max, TopK),
        (16, 128, 8, Centre, Max, TopK),
        (16, 128, 128, Centre, Max, TopK),
        (16, 128, 128, Max4, Max, TopK),
        (16, 64, 1, Centre, Max, TopP),
        (16, 64, 1, Mass4, Mass, TopP),
        (16, 64, 8, Mean, Max, TopP),
        (16, 64, 8, Centre, Mass, TopP),
        (16, 64, 64, Centre, Max, TopP),
        (16, 128, 16, Mass4, Mass, TopP),
        (32, 64, 1, Centre, Max, TopK),
        (32, 128, 8, Centre, Max, TopP),
        (48, 64, 8, Mean, Max, TopK),
        (48, 64, 1, Mass4, Mass, TopP),
        (64, 64, 1, Mean, Max, TopK),
        (64, 64, 64, Max4, Mass, TopK),
    ]
};

/// rank, query_group, kv_block, and how a unit is scored and chosen.
type Granularity = (u8, u16, u16, GroupRule, BlockScore, Budget);

/// Predicted logits over low-rank products: a few units must not hold everything, nor all of them weigh the same.
const SCALE: f32 = 0.75;

fn cases() -> Vec<Case> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        case: Vec<Case>,
    }
    let file: File = toml::from_str(include_str!("../../cases/select_fine.toml"))
        .unwrap_or_else(|e| panic!("cases/select_fine.toml: {e}"));
    file.case
}

/// Each case with each granularity and rule.
pub(super) fn tests() -> Vec<GpuTest> {
    let mut tests = Vec::new();
    for case in cases() {
        for granularity in GRANULARITIES {
            let (rank, query_group, kv_block, rule, block_score, budget) = granularity;
            let spec = space::select_fine(rank, query_group, kv_block, rule, block_score, budget, ARCH)
                .unwrap_or_else(|| panic!("no kv_select_fine of {granularity:?}"));
            let (case, spec) = (case.clone(), KernelSpec::Select(spec));
            tests.push(GpuTest::new(
                format!("kv_select_fine/{}/{spec}", case.name),
                vec![spec],
                move |gpu| run(gpu, &case, spec, granularity),
            ));
        }
    }
    tests
}

fn run(
    gpu: &mut Gpu,
    case: &Case,
    spec: KernelSpec,
    (rank, query_group, kv_block, rule, block_score, budget): Granularity,
) -> Outcome {
    let kernel = gpu.kernel(&spec)?;
    let gpu = &*gpu;
    let heads = case.shares.len();
    let units = case.seqlen_kv.div_ceil(usize::from(kv_block));
    let dims = ListDims {
        batch: case.batch,
        num_heads: heads,
        seqlen_q: case.seqlen_q,
        seqlen_kv: case.seqlen_kv,
        query_group: usize::from(query_group),
        kv_block: usize::from(kv_block),
        max_selected: (case.width * units as f64).ceil() as usize,
    };
    let budgets: Vec<i32> = case.shares.iter().map(|share| (share * units as f64).ceil() as i32).collect();
    // A share of the units to keep is as good a share of the mass.
    let shares: Vec<f32> = case.shares.iter().map(|&share| share as f32).collect();
    let problem = FineProblem {
        rank,
        query_group,
        kv_block,
        group_rule: rule,
        block_score,
        budget,
        scale: SCALE,
        keep: dsv_runtime::Keep { first: case.keep_first as u32, own: case.keep_own },
        batch: case.batch as u32,
        num_heads: heads as u32,
        seqlen_q: case.seqlen_q as u32,
        seqlen_kv: case.seqlen_kv as u32,
        max_selected: dims.max_selected as u32,
    };
    let rank = usize::from(rank);
    let (q, k) = numbers(case, rank);
    let (q_rows, k_rows) =
        ([case.batch, case.seqlen_q, heads, rank], [case.batch, case.seqlen_kv, heads, rank]);
    let place = |n, d: [usize; 4]| Placement::of(case.layout, n, d[0], d[1], d[2], d[3]);
    let (q_place, k_place) = (place(0, q_rows), place(1, k_rows));
    let q_lr = Tensor::with_rows(gpu, "q_lr", Dtype::Bf16, q_place, q_rows, &q)?;
    let k_lr = Tensor::with_rows(gpu, "k_lr", Dtype::Bf16, k_place, k_rows, &k)?;
    let numbers = match budget {
        Budget::TopK => Flat::of(gpu, "top_k", &budgets)?,
        Budget::TopP => Flat::of(gpu, "top_p", &shares)?,
    };
    let kept = kept_bits(case.keep_mask, case.seed, &dims);
    let mask = Flat::of(gpu, "keep_mask", &kept)?;
    let plan = gpu.runtime.fine_selection_with(
        &problem,
        Tensor::layout(&q_place),
        Tensor::layout(&k_place),
        kernel,
    )?;

    // Everything that can be asked for, then ids alone, then bits alone.
    let words = dims.blocks().div_ceil(32);
    let (mut runs, mut capped_lists) = (Vec::new(), Vec::new());
    for (ids, bits, dump) in [(true, true, true), (true, false, false), (false, true, false)] {
        // 0xFF: -1 in every list entry, as the reference leaves them.
        let index = Flat::poisoned(gpu, "q2k_index", 4 * dims.lists() * dims.max_selected, 0xFF)?;
        let count = Flat::poisoned(gpu, "q2k_count", 4 * dims.lists(), 0xFF)?;
        let bitmap = Flat::poisoned(gpu, "bitmap", 4 * dims.lists() * words, 0xFF)?;
        let scores = Flat::poisoned(gpu, "scores", 4 * dims.lists() * dims.blocks(), 0xFF)?;
        let flag = Flat::of(gpu, "error_flag", &[0i32])?;
        let capped = Flat::of(gpu, "capped", &[0i32])?;
        let args = FineArgs {
            q_lr: q_lr.address(),
            k_lr: k_lr.address(),
            budget: numbers.address(),
            q2k_index: ids.then_some(index.address()),
            q2k_count: count.address(),
            bitmap: bits.then_some(bitmap.address()),
            scores: dump.then_some(scores.address()),
            keep_mask: (!kept.is_empty()).then_some(mask.address()),
            capped: dump.then_some(capped.address()),
            error_flag: flag.address(),
        };
        // SAFETY: every buffer was made for this plan's sizes and layouts, and lives past the wait.
        unsafe { plan.select(&gpu.stream, &args)? };
        gpu.wait()?;
        // Shares of the mass are cut by the width and no fault.
        let sound = budget == Budget::TopP && shares.iter().all(|share| (0.0..=1.0).contains(share));
        let raised = match case.raises {
            Raises::None => 0,
            Raises::TopK if sound => 0,
            Raises::TopK => error_bits::TOP_K_OUT_OF_RANGE,
            Raises::Nan => error_bits::SCORE_IS_NAN,
        };
        flag_is(flag.read::<i32>(gpu)?[0], raised)?;
        runs.push((
            index.read::<i32>(gpu)?,
            count.read::<i32>(gpu)?,
            bitmap.read::<u32>(gpu)?,
            scores.read::<f32>(gpu)?,
        ));
        capped_lists.push(capped.read::<i32>(gpu)?[0]);
    }
    let (index, count, bits, scores) = &runs[0];

    // Scores: products of bf16 are exact in f32, `rank` of them are summed. The mean proxy is rounded to bf16 once,
    // and its f32 sum may fall on the other side of a rounding boundary.
    let view = |data, seqlen| View::new(data, Layout::bshd(seqlen, heads, rank));
    let of = |q, k, rule, block_score, rounding| {
        let (q, k) = (view(q, case.seqlen_q), view(k, case.seqlen_kv));
        block_scores_f64(&dims, rank, &q, &k, rule, block_score, f64::from(SCALE), rounding)
    };
    let mut exact = of(&q[..], &k[..], rule, block_score, Some(Dtype::Bf16))?;
    keep(&dims, Keep { first: case.keep_first, own: case.keep_own, mask: &kept }, &mut exact)?;
    let absolute = |values: &[f32]| values.iter().map(|x| x.abs()).collect::<Vec<f32>>();
    // The largest product, rather than a mass, bounds what rounding moves.
    let largest = if rule == GroupRule::Mass4 { GroupRule::Max4 } else { rule };
    let magnitude = of(&absolute(&q)[..], &absolute(&k)[..], largest, BlockScore::Max, None)?;
    let sum = rank as f64 * 2f64.powi(-23);
    let share = if rule == GroupRule::Mean { 2f64.powi(-7) } else { sum };
    // A mass is a sum of exponentials of approximate base-2 powers, 2^-22 each, in arguments that f32 holds to 2^-24 of
    // themselves; its logarithm is approximate to 2^-22 of itself. Normalised, it has the rounding of the largest product of
    // all, too.
    let all_heads: Vec<f64> =
        magnitude.chunks(dims.blocks()).map(|m| m.iter().copied().fold(0.0, f64::max)).collect();
    let mut worst = 0.0f64;
    for (i, &score) in scores.iter().enumerate() {
        // A NaN ranks last.
        let wanted = if exact[i].is_nan() { f64::NEG_INFINITY } else { exact[i] };
        let mut bound = share * magnitude[i];
        if block_score == BlockScore::Mass {
            bound += 2f64.powi(-17) / f64::from(SCALE) + 2f64.powi(-20) * wanted.abs().min(1e30);
        }
        if rule == GroupRule::Mass4 {
            bound += sum * all_heads[i / dims.blocks()];
        }
        let near = (f64::from(score) - wanted).abs() <= bound;
        if !(near || f64::from(score) == wanted) {
            return Err(format!(
                "score {i} ([B, H, G, N] with G {}, N {}) is {score}, wanted {wanted} within {bound:e}",
                dims.groups(),
                dims.blocks(),
            )
            .into());
        }
        if wanted.is_finite() {
            worst = worst.max((f64::from(score) - wanted).abs());
        }
    }

    // Lists: exactly the top-k of the scores the kernel has, ties to the smaller id, ascending; nothing else written.
    let most = dims.blocks().min(dims.max_selected) as i32;
    let head_of = |list: usize| list / dims.groups() % heads;
    let kept: Vec<i32> = match budget {
        Budget::TopK => (0..dims.lists()).map(|list| budgets[head_of(list)].clamp(0, most)).collect(),
        Budget::TopP => {
            // The fewest, by masses that are integers of 2^-31 of the largest and approximate to 2^-22.
            let slack = 1e-6 + dims.blocks() as f64 * 2f64.powi(-31);
            let mut wide = 0;
            for list in 0..dims.lists() {
                let scores: Vec<f64> =
                    scores[list * dims.blocks()..][..dims.blocks()].iter().map(|&s| s.into()).collect();
                let share = f64::from(shares[head_of(list)]).clamp(0.0, 1.0);
                let of = |share: f64| needed_for(&scores, share, f64::from(SCALE));
                let inside = share > 0.0 && share < 1.0;
                let (least, greatest) = if inside {
                    (of((share - slack).max(f64::MIN_POSITIVE)), of((share + slack).min(1.0 - f64::EPSILON)))
                } else {
                    (of(share), of(share))
                };
                let width = dims.max_selected;
                let found = count[list] as usize;
                if found < least.min(width) || found > greatest.min(width) {
                    return Err(format!(
                        "list {list} ([B, H, G] with G {}) has {found} units of {} for a share of {share}, wanted {least} to \
                         {greatest}, at most {width}",
                        dims.groups(),
                        dims.blocks()
                    )
                    .into());
                }
                // Where the two disagree on whether it was cut, neither is wrong.
                wide += i32::from(least > width);
                if greatest > width && least <= width {
                    wide = i32::MIN / 2;
                }
            }
            if wide >= 0 {
                same("capped", &[capped_lists[0]], &[wide])?;
            }
            count.clone()
        }
    };
    if budget == Budget::TopK && capped_lists[0] != 0 {
        return Err(format!("{} lists were capped by a top-k", capped_lists[0]).into());
    }
    let wanted = top_of_each(&dims, scores, &kept)?;
    same("q2k_count", count, &wanted.count)?;
    same("q2k_index", index, &wanted.index)?;
    let wanted_bits = bitmap(&wanted);
    same("bitmap", bits, &wanted_bits)?;
    for (run, (index, count, bits, scores)) in runs[1..].iter().enumerate() {
        same("q2k_count of a run that asks for less", count, &wanted.count)?;
        let untouched = vec![-1i32; index.len()];
        same(
            "q2k_index of a run that asks for less",
            index,
            if run == 0 { &wanted.index } else { &untouched },
        )?;
        let untouched = vec![u32::MAX; bits.len()];
        same("bitmap of a run that asks for less", bits, if run == 0 { &untouched } else { &wanted_bits })?;
        if scores.iter().any(|x| x.to_bits() != u32::MAX) {
            return Err("scores were written though none were asked for".into());
        }
    }
    q_lr.rows(gpu)?;
    k_lr.rows(gpu)?;
    Ok(format!("  scores within {worst:.1e}"))
}

/// q_lr and k_lr, packed, of bf16 values.
fn numbers(case: &Case, rank: usize) -> (Vec<f32>, Vec<f32>) {
    let heads = case.shares.len();
    let mut rng = SplitMix64::new(case.seed);
    let mut q = rng.normals(case.batch * case.seqlen_q * heads * rank, 1.0);
    let mut k = rng.normals(case.batch * case.seqlen_kv * heads * rank, 1.0);
    // Row (0, some key, every head).
    let key = 5 * case.seqlen_kv / 7;
    let row = key * heads * rank..(key + 1) * heads * rank;
    // Keys with their position in the sequence.
    let seqlen_kv = case.seqlen_kv;
    let keys = |k: &mut Vec<f32>, change: &dyn Fn(usize, &mut [f32])| {
        for (i, row) in k.chunks_exact_mut(heads * rank).enumerate() {
            change(i % seqlen_kv, row);
        }
    };
    match case.values {
        Values::Normal => {}
        Values::Equal => {
            q.fill(0.5);
            k.fill(0.25);
        }
        Values::Few => {
            q.iter_mut().for_each(|x| *x = x.round().clamp(-1.0, 1.0));
            k.iter_mut().for_each(|x| *x = x.round().clamp(-1.0, 1.0));
        }
        Values::Giant => {
            q.iter_mut().for_each(|x| *x = x.abs());
            k[row].fill(1e30);
        }
        Values::Nan => k[row].fill(f32::NAN),
        Values::Infinite => {
            // Positive queries: the key's score is +inf for every group.
            q.iter_mut().for_each(|x| *x = x.abs() + 0.25);
            k[row].fill(f32::INFINITY);
        }
        Values::ZeroSigns => {
            q.fill(1.0);
            keys(&mut k, &|i, row| row.fill(if (i / 128).is_multiple_of(2) { -0.0 } else { 0.0 }));
        }
        Values::Aliased => {
            keys(&mut k, &|i, row| {
                if i.is_multiple_of(16) {
                    row.iter_mut().for_each(|x| *x *= 1e-3);
                }
            });
        }
        Values::Drift => {
            q.iter_mut().for_each(|x| *x = x.abs());
            keys(&mut k, &|i, row| row.iter_mut().for_each(|x| *x += 8.0 * i as f32 / seqlen_kv as f32));
        }
    }
    let round = |values: Vec<f32>| values.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
    (round(q), round(k))
}
