//! The OP dispatcher: dense or sparse self-attention for each block, from its profile, the speed of both
//! kernels, and the list buffers the memory budget allows. Pure, so a decision can be replayed and tested.

use crate::config::Share;
use crate::model::BlockAttention;
use serde::{Deserialize, Serialize};

/// Lists keep this factor more KV blocks than the profile's critical share: a block is kept whole for one
/// critical key, and one list serves a whole query group.
pub const KEEP_MARGIN: f64 = 1.5;

/// Least that a head keeps where budgets follow the need, as a share of the even budget: a predicted list is not the best
/// one, so a head of few critical keys needs more units than hold them.
pub const LEAST_SHARE: f64 = 0.25;

/// How concentrated the attention of each block and head is: `S_i = 0.9 S_{i-1} + 0.1 observed`, and how much of it
/// the predicted lists hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProfileState {
    /// Share of keys needed for theta of the mass, smoothed, `[layers][heads]`; empty before the first profile.
    pub needed: Vec<Vec<f64>>,
    /// Mass covered by the predicted lists at the last profile, `[layers][heads]`.
    pub covered: Vec<Vec<f64>>,
    /// Share of the critical keys that they hold, of the same form; empty in checkpoints that had none.
    #[serde(default)]
    pub recall: Vec<Vec<f64>>,
    /// Profiles taken.
    pub count: u64,
}

impl ProfileState {
    /// Nothing observed yet.
    pub fn new() -> ProfileState {
        ProfileState { needed: Vec::new(), covered: Vec::new(), recall: Vec::new(), count: 0 }
    }

    /// Takes an observation of all blocks, flat `[layers * heads]` each. The critical share is smoothed; covered
    /// mass and recall are the last ones seen, since they follow the predictors, which learn faster than attention changes.
    pub fn observe(&mut self, heads: usize, needed: &[f32], covered: &[f32], recall: &[f32]) {
        let rows = |flat: &[f32]| -> Vec<Vec<f64>> {
            flat.chunks(heads).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
        };
        let seen = rows(needed);
        if self.needed.is_empty() {
            self.needed = seen;
        } else {
            for (row, seen) in self.needed.iter_mut().zip(seen) {
                for (s, x) in row.iter_mut().zip(seen) {
                    *s = dsv_reference::profile::smooth(Some(*s), x);
                }
            }
        }
        self.covered = rows(covered);
        self.recall = rows(recall);
        self.count += 1;
    }

    /// Sparsity of a block: mean over heads of the share of keys that is not critical; 0 before any profile.
    pub fn sparsity(&self, block: usize) -> f64 {
        match self.needed.get(block) {
            Some(heads) => 1.0 - heads.iter().sum::<f64>() / heads.len() as f64,
            None => 0.0,
        }
    }
}

impl Default for ProfileState {
    fn default() -> Self {
        Self::new()
    }
}

/// What a decision rests on beside the profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Blocks.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// KV blocks of a sequence.
    pub kv_blocks: usize,
    /// Width of a list.
    pub max_selected: usize,
    /// KV blocks that every head keeps at least: those of a kept window, or 1.
    pub least: usize,
    /// Share of KV blocks to keep; `None` = from the profile.
    pub keep: Option<f64>,
    /// How heads share what `keep` gives all of them together.
    pub share: Share,
    /// Share of KV skipped from which sparse is faster.
    pub crossover: f64,
    /// Where the crossover comes from, for the log.
    pub crossover_source: String,
    /// Share of blocks made sparse whatever the crossover says.
    pub force_sparse: Option<f64>,
    /// List buffers there are.
    pub slots: usize,
}

/// What was decided for one block, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockDecision {
    /// Dense, or sparse with a list buffer.
    pub attention: BlockAttention,
    /// KV blocks each head keeps.
    pub top_k: Vec<i32>,
    /// Share of KV the lists skip.
    pub skipped: f64,
    /// Share of keys that is not critical, from the profile.
    pub profiled_sparsity: f64,
    /// One line for the log.
    pub why: String,
}

/// One decision for all blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Per block.
    pub blocks: Vec<BlockDecision>,
}

impl Decision {
    /// All blocks dense, for stage 1 and the baseline; lists of dense blocks (profiles) keep what `rules` say.
    pub fn dense(rules: &Rules, profile: &ProfileState) -> Decision {
        let blocks = top_k(rules, profile)
            .chunks(rules.heads)
            .enumerate()
            .map(|(block, top_k)| BlockDecision {
                attention: BlockAttention::Dense,
                skipped: skipped(rules, top_k),
                profiled_sparsity: profile.sparsity(block),
                top_k: top_k.to_vec(),
                why: "dense: stage 1".into(),
            })
            .collect();
        Decision { blocks }
    }

    /// Every block within the same windows, which keep this share of the pairs.
    pub fn windows(layers: usize, kept: f64, label: &str) -> Decision {
        let block = BlockDecision {
            attention: BlockAttention::Window,
            top_k: Vec::new(),
            skipped: 1.0 - kept,
            profiled_sparsity: 0.0,
            why: format!("{label}, {:.1} % of the pairs kept", 100.0 * kept),
        };
        Decision { blocks: vec![block; layers] }
    }

    /// Dense or sparse for every block.
    ///
    /// A block is sparse when its lists skip what sparse needs to be faster, and no more than the profile says is
    /// not critical (unless the share was configured); or when it is among the `force_sparse` share with the highest
    /// sparsity. List buffers go to the blocks that skip most.
    pub fn choose(rules: &Rules, profile: &ProfileState) -> Decision {
        let mut decision = Decision::dense(rules, profile);
        let mut order: Vec<usize> = (0..rules.layers).collect();
        let rank = |d: &BlockDecision| (d.skipped, d.profiled_sparsity);
        order.sort_by(|&a, &b| {
            rank(&decision.blocks[b])
                .partial_cmp(&rank(&decision.blocks[a]))
                .unwrap_or(std::cmp::Ordering::Equal)
                .then(a.cmp(&b))
        });
        let forced = rules.force_sparse.map_or(0, |f| (f * rules.layers as f64 - 1e-9).ceil() as usize);
        let mut slot = 0;
        for (place, &block) in order.iter().enumerate() {
            let d = &mut decision.blocks[block];
            let skipped = 100.0 * d.skipped;
            let source = &rules.crossover_source;
            let wins = if rules.crossover > 1.0 {
                format!("sparse never wins ({source})")
            } else {
                format!("sparse wins from {:.1} % ({source})", 100.0 * rules.crossover)
            };
            let wanted = if place < forced {
                Some(format!("sparse: forced, lists skip {skipped:.1} %"))
            } else if rules.keep.is_none() && d.profiled_sparsity < d.skipped {
                let allowed = 100.0 * d.profiled_sparsity;
                d.why = format!("dense: lists skip {skipped:.1} %, only {allowed:.1} % are not critical");
                None
            } else if d.skipped >= rules.crossover {
                Some(format!("sparse: lists skip {skipped:.1} %, {wins}"))
            } else {
                d.why = format!("dense: lists skip {skipped:.1} %, {wins}");
                None
            };
            if let Some(why) = wanted {
                if slot < rules.slots {
                    d.attention = BlockAttention::Sparse { slot };
                    d.why = why;
                    slot += 1;
                } else {
                    d.why = format!(
                        "dense: lists skip {skipped:.1} %, but the memory budget holds lists for {} blocks",
                        rules.slots
                    );
                }
            }
        }
        decision
    }

    /// How each block's attention runs.
    pub fn attention(&self) -> Vec<BlockAttention> {
        self.blocks.iter().map(|d| d.attention).collect()
    }

    /// `[layers * heads]`, for the device.
    pub fn top_k(&self) -> Vec<i32> {
        self.blocks.iter().flat_map(|d| d.top_k.iter().copied()).collect()
    }

    /// Share of blocks that are sparse.
    pub fn sparse_share(&self) -> f64 {
        let sparse = self.blocks.iter().filter(|d| d.attention != BlockAttention::Dense).count();
        sparse as f64 / self.blocks.len().max(1) as f64
    }
}

/// KV blocks each head keeps, `[layers * heads]`.
fn top_k(rules: &Rules, profile: &ProfileState) -> Vec<i32> {
    let units = |share: f64| {
        let k = (share * rules.kv_blocks as f64 - 1e-9).ceil() as usize;
        k.clamp(rules.least.min(rules.max_selected), rules.max_selected)
    };
    let all = rules.layers * rules.heads;
    let needed: Vec<f64> = profile.needed.concat();
    let kept = match (rules.keep, rules.share) {
        (Some(keep), Share::Need) if !needed.is_empty() => {
            by_need(&needed, units(keep), rules.least, rules.max_selected)
        }
        (Some(keep), _) => vec![units(keep); all],
        (None, _) if needed.is_empty() => vec![units(1.0); all],
        (None, _) => needed.iter().map(|need| units(KEEP_MARGIN * need)).collect(),
    };
    kept.into_iter().map(|k| k as i32).collect()
}

/// Shares out `even` units for each head in proportion to what they need, to each at least [`LEAST_SHARE`] of `even` and
/// `least`, and at most `most`. What these bounds take from a head or give it goes to or comes from the others.
fn by_need(needed: &[f64], even: usize, least: usize, most: usize) -> Vec<usize> {
    let least = ((LEAST_SHARE * even as f64).ceil() as usize).clamp(least.min(even), even);
    let total = even * needed.len();
    // A need of 0 has no proportion.
    let need: Vec<f64> = needed.iter().map(|x| x.max(f64::EPSILON)).collect();
    let mut bound: Vec<Option<usize>> = vec![None; need.len()];
    let exact: Vec<f64> = loop {
        let free: f64 = need.iter().zip(&bound).filter(|(_, b)| b.is_none()).map(|(x, _)| x).sum();
        let left = total as f64 - bound.iter().flatten().sum::<usize>() as f64;
        let exact: Vec<f64> =
            need.iter().zip(&bound).map(|(x, b)| b.map_or(left * x / free, |b| b as f64)).collect();
        let below: f64 = exact.iter().map(|x| (least as f64 - x).max(0.0)).sum();
        let above: f64 = exact.iter().map(|x| (x - most as f64).max(0.0)).sum();
        if below == 0.0 && above == 0.0 {
            break exact;
        }
        // Only the side that is further out is bounded now: heads of the other may be within their bounds afterwards.
        for (x, b) in exact.iter().zip(&mut bound) {
            match below >= above {
                true if *x < least as f64 => *b = Some(least),
                false if *x > most as f64 => *b = Some(most),
                _ => {}
            }
        }
    };
    let mut kept: Vec<usize> = exact.iter().map(|&x| (x as usize).clamp(least, most)).collect();
    let rest = total.saturating_sub(kept.iter().sum());
    let mut order: Vec<usize> = (0..kept.len()).filter(|&i| kept[i] < most).collect();
    // A stable sort: ties go to the lower index.
    order.sort_by(|&a, &b| (exact[b] - kept[b] as f64).total_cmp(&(exact[a] - kept[a] as f64)));
    order.into_iter().take(rest).for_each(|i| kept[i] += 1);
    kept
}

fn skipped(rules: &Rules, top_k: &[i32]) -> f64 {
    let kept: f64 = top_k.iter().map(|&k| f64::from(k)).sum();
    1.0 - kept / (top_k.len() * rules.kv_blocks) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            layers: 4,
            heads: 2,
            kv_blocks: 64,
            max_selected: 32,
            least: 1,
            keep: None,
            share: Share::Even,
            crossover: 0.7,
            crossover_source: "test".into(),
            force_sparse: None,
            slots: 4,
        }
    }

    /// Blocks needing 5, 40, 10 and 20 % of the keys.
    fn profile() -> ProfileState {
        let mut p = ProfileState::new();
        p.observe(2, &[0.05, 0.05, 0.4, 0.4, 0.1, 0.1, 0.2, 0.2], &[0.9; 8], &[0.7; 8]);
        p
    }

    fn sparse(d: &Decision) -> Vec<usize> {
        (0..4).filter(|&b| d.blocks[b].attention != BlockAttention::Dense).collect()
    }

    #[test]
    fn blocks_above_the_crossover_are_sparse() {
        // Kept: 1.5 * need, at most half: 5/64, 32/64, 10/64, 20/64.
        let d = Decision::choose(&rules(), &profile());
        assert_eq!(d.top_k(), [5, 5, 32, 32, 10, 10, 20, 20]);
        assert_eq!(sparse(&d), [0, 2], "20/64 kept skips 68.75 %, below 70 %");
        assert_eq!(d.blocks[0].attention, BlockAttention::Sparse { slot: 0 }, "most skipped first");
        assert!(d.blocks[3].why.contains("68.8 %") && d.blocks[3].why.contains("test"));
        assert_eq!(d.sparse_share(), 0.5);
    }

    #[test]
    fn a_block_whose_critical_keys_no_list_holds_stays_dense() {
        // Lists of at most an eighth: block 2 needs 10 %, block 3 needs 20 %.
        let d = Decision::choose(&Rules { max_selected: 8, crossover: 0.5, ..rules() }, &profile());
        assert_eq!(sparse(&d), [0, 2]);
        assert_eq!(d.blocks[3].why, "dense: lists skip 87.5 %, only 80.0 % are not critical");
        // At the crossover itself sparse is as fast: the lowest sparsity that was measured and won.
        let d = Decision::choose(&Rules { crossover: 0.5, ..rules() }, &profile());
        assert_eq!(sparse(&d), [0, 1, 2, 3], "block 1 keeps half");
    }

    #[test]
    fn memory_for_one_list_goes_to_the_sparsest_block() {
        let d = Decision::choose(&Rules { slots: 1, ..rules() }, &profile());
        assert_eq!(sparse(&d), [0]);
        assert!(d.blocks[2].why.contains("memory budget"));
    }

    #[test]
    fn forcing_takes_the_sparsest_and_rounds_up() {
        let d = Decision::choose(&Rules { force_sparse: Some(0.6), crossover: 2.0, ..rules() }, &profile());
        assert_eq!(sparse(&d), [0, 2, 3]);
        assert_eq!(d.blocks[1].why, "dense: lists skip 50.0 %, sparse never wins (test)");
        let all = Decision::choose(&Rules { force_sparse: Some(1.0), crossover: 2.0, ..rules() }, &profile());
        assert_eq!(sparse(&all), [0, 1, 2, 3]);
    }

    #[test]
    fn a_configured_share_overrides_the_profile() {
        let d = Decision::choose(&Rules { keep: Some(0.2), ..rules() }, &profile());
        assert!(d.top_k().iter().all(|&k| k == 13), "ceil(12.8)");
        assert_eq!(sparse(&d), [0, 1, 2, 3]);
    }

    fn need(keep: f64, max_selected: usize) -> Rules {
        Rules { keep: Some(keep), share: Share::Need, max_selected, ..rules() }
    }

    #[test]
    fn budgets_follow_the_need_at_the_even_total() {
        // 104 units in all. The first block's share would be 3.5 a head, of which 4 is the least; the others share 96
        // as 0.4 to 0.1 to 0.2, 27.4 to 6.9 to 13.7: four units are left after rounding down.
        let d = Decision::choose(&need(0.2, 32), &profile());
        assert_eq!(d.top_k(), [4, 4, 27, 27, 7, 7, 14, 14]);
        assert_eq!(d, Decision::choose(&need(0.2, 32), &profile()));
        assert!((d.blocks[1].skipped - (1.0 - 27.0 / 64.0)).abs() < 1e-12, "{d:?}");
        assert_eq!(sparse(&d), [0, 2, 3], "block 1 skips 57.8 %, below the crossover");
        // A kept window of seven blocks: no head keeps fewer.
        let d = Decision::dense(&Rules { least: 7, ..need(0.2, 32) }, &profile());
        assert_eq!(d.top_k(), [7, 7, 25, 25, 7, 7, 13, 13]);
        // Lists of 16 at most: what blocks 1 and 3 may not take goes to the others, 40 as 0.05 to 0.1.
        let d = Decision::dense(&need(0.2, 16), &profile());
        assert_eq!(d.top_k(), [7, 7, 16, 16, 13, 13, 16, 16]);
    }

    #[test]
    fn budgets_of_any_need_keep_the_total_and_their_bounds() {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / (1u64 << 24) as f64
        };
        for case in 0..2000 {
            let heads = 1 + (random() * 40.0) as usize;
            let even = 1 + (random() * 60.0) as usize;
            let most = even + (random() * 100.0) as usize;
            // From alike to almost all in a few heads.
            let power = 12.0 * random();
            let needed: Vec<f64> = (0..heads).map(|_| random().powf(power)).collect();
            let kept = by_need(&needed, even, 1, most);
            let least = even.div_ceil(4);
            assert_eq!(kept.iter().sum::<usize>(), even * heads, "case {case}");
            assert!(kept.iter().all(|k| (least..=most).contains(k)), "case {case}: {kept:?}");
            assert_eq!(kept, by_need(&needed, even, 1, most));
            // Less than a unit from the proportion within the bounds, found by halving.
            let at = |scale: f64, i: usize| (scale * needed[i]).clamp(least as f64, most as f64);
            let (mut low, mut high) = (0.0, 1e300);
            for _ in 0..2200 {
                let scale = (low + high) / 2.0;
                let sum: f64 = (0..heads).map(|i| at(scale, i)).sum();
                (low, high) = if sum < (even * heads) as f64 { (scale, high) } else { (low, scale) };
            }
            assert!(
                (0..heads).all(|i| (kept[i] as f64 - at(low, i)).abs() < 1.0 + 1e-6),
                "case {case}: {kept:?}"
            );
            for (a, b) in (0..heads).flat_map(|a| (0..heads).map(move |b| (a, b))) {
                assert!(
                    needed[a] <= needed[b] || kept[a] >= kept[b],
                    "case {case}: heads {a} and {b} of {kept:?}"
                );
            }
        }
    }

    #[test]
    fn heads_that_need_alike_keep_alike_and_ties_go_to_the_lower_index() {
        assert_eq!(by_need(&[0.3; 5], 13, 1, 32), [13; 5]);
        assert_eq!(by_need(&[0.0; 3], 13, 1, 32), [13; 3]);
        assert_eq!(by_need(&[0.2, 0.1, 0.1, 0.1], 4, 1, 9), [7, 3, 3, 3]);
        assert_eq!(by_need(&[0.3, 0.1, 0.1], 5, 1, 9), [9, 3, 3]);
        assert_eq!(by_need(&[0.1, 0.1, 0.15], 3, 1, 9), [3, 2, 4]);
        assert_eq!(by_need(&[0.1, 0.9], 1, 1, 4), [1, 1], "at least a unit");
    }

    #[test]
    fn before_a_profile_and_where_lists_cannot_differ_budgets_are_even() {
        let even = Decision::choose(&Rules { keep: Some(0.2), ..rules() }, &profile());
        let first = Decision::choose(&need(0.2, 32), &ProfileState::new());
        assert_eq!(first.top_k(), even.top_k());
        assert_eq!(Decision::choose(&need(0.2, 13), &profile()).top_k(), even.top_k());
    }

    #[test]
    fn without_a_profile_lists_are_as_wide_as_they_can_be_and_blocks_dense() {
        let d = Decision::choose(&rules(), &ProfileState::new());
        assert!(d.top_k().iter().all(|&k| k == 32) && sparse(&d).is_empty());
    }

    #[test]
    fn needs_are_smoothed_and_coverage_is_the_last_seen() {
        let mut p = profile();
        p.observe(2, &[0.15; 8], &[0.8; 8], &[0.6; 8]);
        assert!((p.needed[0][0] - (0.9 * 0.05 + 0.1 * 0.15)).abs() < 1e-7);
        assert!((p.covered[3][1] - 0.8).abs() < 1e-7 && (p.recall[3][1] - 0.6).abs() < 1e-7);
        assert!((p.sparsity(1) - (1.0 - 0.375)).abs() < 1e-7);
        assert_eq!(p.count, 2);
    }
}
