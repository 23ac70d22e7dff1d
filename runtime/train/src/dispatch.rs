//! The OP dispatcher: dense or sparse self-attention for each block, from its profile, the speed of both
//! kernels, and the list buffers the memory budget allows. Pure, so a decision can be replayed and tested.

use crate::model::BlockAttention;
use serde::{Deserialize, Serialize};

/// Lists keep this factor more KV blocks than the profile's critical share: a block is kept whole for one
/// critical key, and one list serves a whole query group.
pub const KEEP_MARGIN: f64 = 1.5;

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
    /// Share of KV blocks to keep; `None` = from the profile.
    pub keep: Option<f64>,
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
        let blocks = (0..rules.layers)
            .map(|block| {
                let top_k = top_k(rules, profile, block);
                BlockDecision {
                    attention: BlockAttention::Dense,
                    skipped: skipped(rules, &top_k),
                    profiled_sparsity: profile.sparsity(block),
                    top_k,
                    why: "dense: stage 1".into(),
                }
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

/// KV blocks each head of a block keeps.
fn top_k(rules: &Rules, profile: &ProfileState, block: usize) -> Vec<i32> {
    (0..rules.heads)
        .map(|head| {
            let share = match (rules.keep, profile.needed.get(block)) {
                (Some(keep), _) => keep,
                (None, Some(needed)) => KEEP_MARGIN * needed[head],
                (None, None) => 1.0,
            };
            let k = (share * rules.kv_blocks as f64 - 1e-9).ceil() as i32;
            k.clamp(1, rules.max_selected as i32)
        })
        .collect()
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
            keep: None,
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
