//! Selection of KV lists as the tuner measures it: which kernels choose, and when a choice is right. Needs no GPU: it
//! judges what is handed to it.

use crate::check::gather;
use crate::listgen::{head_counts, list_dims};
use crate::plan::Case;
use dsv_reference::attention::{Layout, View};
use dsv_reference::lists::ListDims;
use dsv_reference::rng::SplitMix64;
use dsv_reference::select::{SelectError, block_scores_f64, needed_for, top_of_each};
use dsv_spec::{Arch, BlockScore, Budget, Dtype, GroupRule, SelectOp, SelectSpec, space};
use half::bf16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Columns of the low-rank queries and keys that are measured.
pub(crate) const RANK: usize = space::SHIPPED_RANKS[0] as usize;
/// Predicted logits over low-rank products, where masses are taken: of products of normal numbers a tenth of the keys then
/// holds about nine tenths of the mass.
pub(crate) const SCALE: f32 = 0.64;

/// A selection to be measured: lists of a case's number, shape and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    /// The case; neither its head_dim nor how its lists are made says anything about choosing lists.
    pub case: Case,
    /// Which of a group's low-rank queries are scored.
    pub rule: GroupRule,
    /// What says how many units a group keeps.
    pub budget: Budget,
}

impl Selection {
    /// The kernels that make it: `kv_select` where it can, and `kv_select_fine`.
    pub fn kernels(&self, arch: Arch) -> Vec<SelectSpec> {
        let (query_group, kv_block) = self.case.lists.block_size();
        let score = if self.rule == GroupRule::Mass4 { BlockScore::Mass } else { BlockScore::Max };
        let rows = space::default_select(RANK as u8, query_group, kv_block, self.rule, arch)
            .filter(|_| self.budget == Budget::TopK);
        let fine = space::select_fine(RANK as u8, query_group, kv_block, self.rule, score, self.budget, arch);
        rows.into_iter().chain(fine).collect()
    }
}

/// The kernel whose time is that of choosing a case's lists: by the centre query, a number a head. `kv_select` where it
/// serves the block size, else `kv_select_fine`; None when dense.
pub fn of_lists(case: &Case, arch: Arch) -> Option<SelectSpec> {
    Selection { case: *case, rule: GroupRule::Centre, budget: Budget::TopK }.kernels(arch).first().copied()
}

/// Whether a kernel is [`of_lists`] of its block size; times of the others count for no row of attention.
pub fn is_of_lists(spec: &SelectSpec) -> bool {
    let (query_group, kv_block) = (spec.query_group(), spec.kv_block());
    let rows = space::default_select(spec.rank(), query_group, kv_block, spec.group_rule(), spec.arch());
    (spec.group_rule(), spec.budget(), spec.block_score())
        == (GroupRule::Centre, Budget::TopK, BlockScore::Max)
        && (spec.op() == SelectOp::Rows || rows.is_none())
}

/// Lists drawn from those of a case.
const SAMPLED: usize = 16;

/// A few lists of a selection, and the scores they must be made of.
pub(crate) struct SelectSamples {
    spec: SelectSpec,
    /// Of one list.
    dims: ListDims,
    lists: Vec<Sampled>,
}

struct Sampled {
    /// (batch, head, group) in words.
    name: String,
    /// Its place in [B, H, G].
    at: usize,
    /// Units its head keeps.
    count: usize,
    exact: Vec<f64>,
    /// How far a score may be from the exact one.
    bound: Vec<f64>,
}

impl SelectSamples {
    /// Draws lists, the last of a sequence among them, and computes their scores in f64 from q_lr and k_lr [B, S, H, 16].
    ///
    /// # Errors
    /// What the reference refuses.
    pub(crate) fn new(
        case: &Case,
        spec: SelectSpec,
        q_lr: &[bf16],
        k_lr: &[bf16],
    ) -> Result<SelectSamples, SelectError> {
        let low_rank = Case { head_dim: RANK as u16, ..*case };
        let whole = list_dims(case);
        let counts = head_counts(case);
        let mut rng = SplitMix64::new(13);
        let drawn: Vec<(usize, usize, usize)> = (0..SAMPLED)
            .map(|n| {
                let (b, h) = (rng.below(whole.batch), rng.below(whole.num_heads));
                (b, h, if n == 0 { whole.groups() - 1 } else { rng.below(whole.groups()) })
            })
            .collect();
        let lists = drawn
            .into_par_iter()
            .map(|(b, h, g)| {
                let rows = whole.group_rows(g);
                let dims = ListDims { batch: 1, num_heads: 1, seqlen_q: rows.len(), ..whole };
                let q = gather(&low_rank, q_lr, b, h, rows);
                let k = gather(&low_rank, k_lr, b, h, 0..whole.seqlen_kv);
                let of = |q: &[bf16], k: &[bf16], rule, score, rounding| {
                    let view = |data, seqlen| View::new(data, Layout::bshd(seqlen, 1, RANK));
                    let (q, k) = (view(q, dims.seqlen_q), view(k, dims.seqlen_kv));
                    block_scores_f64(&dims, RANK, &q, &k, rule, score, f64::from(SCALE), rounding)
                };
                let rule = spec.group_rule();
                let exact = of(&q, &k, rule, spec.block_score(), Some(Dtype::Bf16))?;
                let absolute = |values: &[bf16]| -> Vec<bf16> {
                    values.iter().map(|x| bf16::from_bits(x.to_bits() & 0x7FFF)).collect()
                };
                // The largest product, rather than a mass, bounds what rounding moves.
                let largest = if rule == GroupRule::Mass4 { GroupRule::Max4 } else { rule };
                let magnitude = of(&absolute(&q), &absolute(&k), largest, BlockScore::Max, None)?;
                let bound = bounds(&spec, &exact, &magnitude);
                let name = format!("(batch {b}, head {h}, group {g})");
                let at = (b * whole.num_heads + h) * whole.groups() + g;
                Ok(Sampled { name, at, count: counts[h], exact, bound })
            })
            .collect::<Result<Vec<Sampled>, SelectError>>()?;
        Ok(SelectSamples { spec, dims: ListDims { batch: 1, num_heads: 1, seqlen_q: 1, ..whole }, lists })
    }

    /// Places of the lists in [B, H, G].
    pub(crate) fn places(&self) -> impl Iterator<Item = usize> {
        self.lists.iter().map(|list| list.at)
    }

    /// The share of the predicted mass that lists of the case's width hold, on average: what a budget top_p is asked for, so
    /// that it keeps about as much as top_k does.
    pub(crate) fn share(&self) -> f32 {
        let held = |list: &Sampled| {
            let mut scores = list.exact.clone();
            scores.sort_unstable_by(|a, b| b.total_cmp(a));
            let largest = scores.first().copied().unwrap_or(0.0);
            let mass = |s: &[f64]| s.iter().map(|s| (f64::from(SCALE) * (s - largest)).exp()).sum::<f64>();
            mass(&scores[..list.count]) / mass(&scores)
        };
        (self.lists.iter().map(held).sum::<f64>() / self.lists.len() as f64) as f32
    }

    /// Judges the scores of the lists; the largest error over its tolerance.
    ///
    /// # Errors
    /// The first score outside tolerance.
    pub(crate) fn judge_scores(&self, scores: &[Vec<f32>]) -> Result<f64, String> {
        let mut worst = 0.0f64;
        for (list, scores) in self.lists.iter().zip(scores) {
            for (unit, ((&score, &exact), &bound)) in
                scores.iter().zip(&list.exact).zip(&list.bound).enumerate()
            {
                let error = (f64::from(score) - exact).abs();
                // NaN is no error that is small.
                if error > bound || error.is_nan() {
                    let at = &list.name;
                    return Err(format!(
                        "{at}: score of unit {unit} is {score}, not {exact} within {bound:e}"
                    ));
                }
                worst = worst.max(if error == 0.0 { 0.0 } else { error / bound });
            }
        }
        Ok(worst)
    }

    /// Judges the lists, given the kernel's own scores: exactly the best of each, ties to the smaller id, ascending; as many
    /// as the budget says (`share`: the share asked for). `ids` of each list have the width of the lists.
    ///
    /// # Errors
    /// The first list that is another.
    pub(crate) fn judge_lists(
        &self,
        scores: &[Vec<f32>],
        ids: &[Vec<i32>],
        counts: &[i32],
        share: f32,
    ) -> Result<(), String> {
        for (((list, scores), ids), &count) in self.lists.iter().zip(scores).zip(ids).zip(counts) {
            let (least, most) = match self.spec.budget() {
                Budget::TopK => (list.count, list.count),
                Budget::TopP => self.fewest(scores, share),
            };
            let at = &list.name;
            if count < least as i32 || count > most as i32 {
                let wanted = if least == most { least.to_string() } else { format!("{least} to {most}") };
                return Err(format!("{at}: count {count} instead of {wanted}"));
            }
            let wanted = top_of_each(&self.dims, scores, &[count]).map_err(|e| format!("{at}: {e}"))?;
            let wanted = wanted.view().blocks_of(0).to_vec();
            if let Some(n) = (0..wanted.len()).find(|&n| ids[n] != wanted[n]) {
                let (found, wanted) = (ids[n], wanted[n]);
                let score = |id: i32| scores.get(id as usize).map_or("none".to_string(), f32::to_string);
                return Err(format!(
                    "{at}: entry {n} is unit {found} (score {}) instead of {wanted} (score {}), the best {count} ascending",
                    score(found),
                    score(wanted)
                ));
            }
        }
        Ok(())
    }

    /// The fewest units that hold a share, at least and at most: masses are integers of 2^-31 of the largest, and approximate
    /// to 2^-22.
    fn fewest(&self, scores: &[f32], share: f32) -> (usize, usize) {
        let scores: Vec<f64> = scores.iter().map(|&s| s.into()).collect();
        let slack = 1e-6 + scores.len() as f64 * 2f64.powi(-31);
        let of = |share: f64| needed_for(&scores, share, f64::from(SCALE)).min(self.dims.max_selected);
        let share = f64::from(share);
        // The whole mass is every unit, however light.
        if share >= 1.0 {
            return (of(1.0), of(1.0));
        }
        (of((share - slack).max(f64::MIN_POSITIVE)), of((share + slack).min(1.0 - f64::EPSILON)))
    }
}

/// How far scores may be from exact ones: products of bf16 are exact in f32, sixteen of them are summed. A mean query is
/// rounded to bf16 once, and its f32 sum may fall on the other side of a rounding boundary. A mass is a sum of
/// exponentials of approximate base-2 powers, 2^-22 each, in arguments that f32 holds to 2^-24 of themselves; its logarithm is
/// approximate to 2^-22 of itself; normalised, it has the rounding of the largest product of all, too.
fn bounds(spec: &SelectSpec, exact: &[f64], magnitude: &[f64]) -> Vec<f64> {
    let share = if spec.group_rule() == GroupRule::Mean { 2f64.powi(-7) } else { 2f64.powi(-19) };
    let largest = magnitude.iter().copied().fold(0.0, f64::max);
    let bound = |(exact, magnitude): (&f64, &f64)| {
        let mut bound = share * magnitude;
        if spec.block_score() == BlockScore::Mass {
            bound += 2f64.powi(-17) / f64::from(SCALE) + 2f64.powi(-20) * exact.abs();
        }
        if spec.group_rule() == GroupRule::Mass4 {
            bound += 2f64.powi(-19) * largest;
        }
        bound
    };
    exact.iter().zip(magnitude).map(bound).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::normals;
    use crate::listgen::ListKind;
    use crate::plan::parse_block;

    const ARCH: Arch = Arch::Sm90a;

    fn selection(block: &str, rule: GroupRule, budget: Budget) -> Selection {
        let block = parse_block(block).unwrap().unwrap();
        Selection { case: Case::sparse(128, 2, 1100, block, 0.1, ListKind::Random), rule, budget }
    }

    #[test]
    fn the_kernels_of_a_selection() {
        let names = |block, rule, budget| -> Vec<String> {
            let specs = selection(block, rule, budget).kernels(ARCH);
            specs.iter().map(|s| dsv_spec::KernelSpec::Select(*s).name()).collect()
        };
        let (centre, top_k) = (GroupRule::Centre, Budget::TopK);
        let blocks = names("64x64", centre, top_k);
        assert!(blocks.len() == 2 && blocks[0].starts_with("kv_select_bf16"), "{blocks:?}");
        assert!(blocks[1].starts_with("kv_select_fine_bf16_r16_qg64_kb64_centre_max_topk"), "{blocks:?}");
        for (block, rule, budget) in [
            ("64x1", centre, top_k),
            ("128x8", GroupRule::Mean, top_k),
            ("64x16", GroupRule::Max4, top_k),
            ("64x64", GroupRule::Mass4, top_k),
            ("128x128", centre, Budget::TopP),
        ] {
            let found = names(block, rule, budget);
            assert!(found.len() == 1 && found[0].starts_with("kv_select_fine_"), "{block}: {found:?}");
        }
        // One kernel's time counts for lists of a size.
        for block in ["64x64", "128x128", "64x1", "128x8", "64x16"] {
            let all = GroupRule::ALL.iter().flat_map(|&rule| {
                Budget::ALL.iter().flat_map(move |&budget| selection(block, rule, budget).kernels(ARCH))
            });
            let counted: Vec<SelectSpec> = all.filter(is_of_lists).collect();
            assert_eq!(counted, [of_lists(&selection(block, centre, top_k).case, ARCH).unwrap()], "{block}");
        }
        assert_eq!(of_lists(&Case::dense(128, 2, 1100), ARCH), None);
    }

    /// What a kernel would make: f32 scores, and the best of them.
    fn right(case: &Case, samples: &SelectSamples, share: f32) -> (Vec<Vec<f32>>, Vec<Vec<i32>>, Vec<i32>) {
        let scores: Vec<Vec<f32>> =
            samples.lists.iter().map(|list| list.exact.iter().map(|&s| s as f32).collect()).collect();
        let count = |(list, scores): (&Sampled, &Vec<f32>)| match samples.spec.budget() {
            Budget::TopK => list.count as i32,
            Budget::TopP => samples.fewest(scores, share).0 as i32,
        };
        let counts: Vec<i32> = samples.lists.iter().zip(&scores).map(count).collect();
        let ids = scores.iter().zip(&counts).map(|(scores, &count)| {
            let lists = top_of_each(&samples.dims, scores, &[count]).unwrap();
            let mut ids = lists.view().blocks_of(0).to_vec();
            ids.resize(case.max_selected as usize, -1);
            ids
        });
        (scores.clone(), ids.collect(), counts)
    }

    #[test]
    fn choices_are_judged_by_the_kernels_own_scores() {
        let (centre, top_k, top_p) = (GroupRule::Centre, Budget::TopK, Budget::TopP);
        for (block, rule, budget) in [
            ("64x1", centre, top_k),
            ("128x8", GroupRule::Mean, top_k),
            ("64x64", GroupRule::Mass4, top_k),
            ("64x1", GroupRule::Max4, top_k),
            ("64x8", centre, top_p),
        ] {
            let Selection { case, .. } = selection(block, rule, budget);
            let spec = *selection(block, rule, budget).kernels(ARCH).last().unwrap();
            let len = 1100 * 2 * RANK;
            let (q_lr, k_lr) = (normals(len, 1), normals(len, 2));
            let samples = SelectSamples::new(&case, spec, &q_lr, &k_lr).unwrap();
            // The reference over the whole problem finds the same scores.
            let whole = list_dims(&case);
            let view = |data| View::new(data, Layout::bshd(1100, 2, RANK));
            let (q, k) = (view(&q_lr[..]), view(&k_lr[..]));
            let score = spec.block_score();
            let all =
                block_scores_f64(&whole, RANK, &q, &k, rule, score, SCALE.into(), Some(Dtype::Bf16)).unwrap();
            for list in &samples.lists {
                assert_eq!(list.exact, all[list.at * whole.blocks()..][..whole.blocks()]);
            }
            let share = samples.share();
            assert!(share > 0.1 && share < 1.0, "{block}: {share}");
            let (scores, ids, counts) = right(&case, &samples, share);
            assert!(samples.judge_scores(&scores).unwrap() < 1.0);
            samples.judge_lists(&scores, &ids, &counts, share).unwrap();
            if budget == top_p {
                assert_eq!(
                    samples.fewest(&scores[0], 1.0),
                    (samples.dims.max_selected, case.max_selected as usize)
                );
            }
            let mut wrong = scores.clone();
            wrong[3][5] += 0.2;
            assert!(samples.judge_scores(&wrong).unwrap_err().contains("score of unit 5"));
            wrong[3][5] = f32::NAN;
            assert!(samples.judge_scores(&wrong).is_err());
            // A unit that is not among the best is seen, and so is one too few.
            let mut lower = scores.clone();
            lower[0][ids[0][0] as usize] = -1e9;
            let error = samples.judge_lists(&lower, &ids, &counts, share).unwrap_err();
            assert!(error.contains("instead of"), "{error}");
            let mut short = counts.clone();
            short[7] -= 1;
            assert!(samples.judge_lists(&scores, &ids, &short, share).unwrap_err().contains("count"));
        }
    }
}
