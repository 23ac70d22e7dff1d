//! How the lists of a case are made. A case has the same lists on every machine and in every run: everything is drawn
//! from a seed that depends on nothing but the case's length and width.
//!
//! | kind | lists |
//! |---|---|
//! | `random` | every group of every head draws `max_selected` blocks independently and uniformly: neighbours have little in common |
//! | `clustered` | of each head, groups 8c to 8c + 7 share round(0.8 * `max_selected`) blocks, and each draws the others by itself from those not shared: neighbours agree, as in trained models |
//! | `popular` | some blocks are of use to most groups: a block's weight is log-normal, by head, and groups draw by weight; the lists that the backward walks differ in length by factors |
//! | `mixed` | one launch of heads whose sparsities are spread evenly from 50 % to 99 %, in an order that is drawn ([`mixed_counts`]); the lists of a head are random |
//!
//! A mixed launch keeps exactly as many blocks as a random one of [`uniform_count`] blocks a group, so that their times
//! can be compared.

use crate::plan::Case;
use dsv_reference::lists::{KvListsBuf, ListDims};
use dsv_reference::rng::SplitMix64;
use dsv_spec::Problem;
use serde::{Deserialize, Serialize};

/// How the lists of a case are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ListKind {
    /// No lists: every key.
    Dense,
    /// Each group draws its blocks independently and uniformly. The table is made of these.
    Random,
    /// 8 neighbouring groups share 80 % of their blocks.
    Clustered,
    /// Some blocks are of use to most groups.
    Popular,
    /// Heads of 50 % to 99 % sparsity in one launch.
    Mixed,
}

impl ListKind {
    /// The kinds that have lists.
    pub const WITH_LISTS: [ListKind; 4] =
        [ListKind::Random, ListKind::Clustered, ListKind::Popular, ListKind::Mixed];

    /// The spelling in records and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            ListKind::Dense => "dense",
            ListKind::Random => "random",
            ListKind::Clustered => "clustered",
            ListKind::Popular => "popular",
            ListKind::Mixed => "mixed",
        }
    }
}

/// Sparsest and densest head of a mixed launch, shares kept.
pub const MIXED_KEPT: (f64, f64) = (0.01, 0.5);

/// Blocks that the groups of each head of a mixed launch keep, the widest head first: head h of H keeps the share
/// 0.5 - 0.49 h / (H - 1) of the blocks, rounded, at least one. The sum is a whole multiple of H: what rounding left over
/// is taken from, or added to, the widest heads, a block at a time.
///
/// Panics at 0 heads or blocks.
pub fn mixed_counts(num_heads: u32, blocks: u32) -> Vec<u32> {
    assert!(num_heads > 0 && blocks > 0, "mixed lists of {num_heads} heads, {blocks} blocks");
    let (least, most) = MIXED_KEPT;
    let share = |head: u32| match num_heads {
        1 => (least + most) / 2.0,
        _ => most - (most - least) * f64::from(head) / f64::from(num_heads - 1),
    };
    let mut counts: Vec<u32> = (0..num_heads)
        .map(|head| ((f64::from(blocks) * share(head)).round() as u32).clamp(1, blocks))
        .collect();
    let total: u32 = counts.iter().sum();
    let wanted = ((f64::from(total) / f64::from(num_heads)).round() as u32) * num_heads;
    for n in 0..wanted.saturating_sub(total) {
        counts[(n % num_heads) as usize] += 1;
    }
    for _ in 0..total.saturating_sub(wanted) {
        // The first of the widest; it is wider than the mean, so above 1.
        let widest = (0..counts.len()).rev().max_by_key(|&head| counts[head]).unwrap_or(0);
        counts[widest] -= 1;
    }
    counts
}

/// Blocks a group of the uniform launch that does the same work as a mixed one.
pub fn uniform_count(num_heads: u32, blocks: u32) -> u32 {
    mixed_counts(num_heads, blocks).iter().sum::<u32>() / num_heads
}

/// Share of the (group, KV block) pairs that lists of a kind keep; 1 when dense. Of mixed lists `max_selected` is only the
/// width of the widest head.
pub fn kept(problem: &Problem, lists: &str) -> f64 {
    match problem.num_kv_blocks() {
        0 => 1.0,
        blocks if lists == ListKind::Mixed.name() => {
            f64::from(uniform_count(problem.num_heads, blocks)) / f64::from(blocks)
        }
        _ => 1.0 - problem.sparsity_percent() / 100.0,
    }
}

/// Sizes of a case's lists.
pub(crate) fn list_dims(case: &Case) -> ListDims {
    let (query_group, kv_block) = case.lists.block_size();
    ListDims {
        batch: case.batch as usize,
        num_heads: case.num_heads as usize,
        seqlen_q: case.seqlen as usize,
        seqlen_kv: case.seqlen as usize,
        query_group: query_group as usize,
        kv_block: kv_block as usize,
        max_selected: case.max_selected as usize,
    }
}

/// Blocks that the groups of each head list, head by head.
pub(crate) fn head_counts(case: &Case) -> Vec<usize> {
    match case.kind {
        ListKind::Mixed => {
            let counts = mixed_counts(case.num_heads, list_dims(case).blocks() as u32);
            let order = SplitMix64::new(19 + u64::from(case.seqlen)).permutation(counts.len());
            order.into_iter().map(|n| counts[n] as usize).collect()
        }
        _ => vec![case.max_selected as usize; case.num_heads as usize],
    }
}

/// The lists of a case, the same each time.
pub(crate) fn host_lists(case: &Case) -> KvListsBuf {
    let dims = list_dims(case);
    let mut rng = SplitMix64::new(17 + case.seqlen as u64 * 1000 + case.max_selected as u64);
    match case.kind {
        ListKind::Clustered => KvListsBuf::clustered(dims, dims.max_selected, &mut rng),
        ListKind::Popular => KvListsBuf::popular(dims, dims.max_selected, &mut rng),
        ListKind::Dense | ListKind::Random => KvListsBuf::random(dims, dims.max_selected, &mut rng),
        ListKind::Mixed => KvListsBuf::random_by_head(dims, &head_counts(case), &mut rng),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsv_spec::AttnOp;

    fn case(kind: ListKind) -> Case {
        match kind {
            ListKind::Mixed => Case::mixed(64, 4, 4096, (64, 64)),
            _ => Case::sparse(64, 4, 4096, (64, 64), 0.25, kind),
        }
    }

    #[test]
    fn lists_of_a_case_are_valid_full_and_repeatable() {
        for kind in ListKind::WITH_LISTS {
            let case = case(kind);
            let lists = host_lists(&case);
            // Ascending, unique, in range, counts within the width.
            lists.validate().unwrap();
            assert_eq!(lists, host_lists(&case), "{}", kind.name());
            let counts = head_counts(&case);
            for (list, &count) in lists.count.iter().enumerate() {
                assert_eq!(count as usize, counts[list / 64], "{} list {list}", kind.name());
            }
            assert_eq!(counts.iter().max(), Some(&(case.max_selected as usize)));
            let kept = kept(&case.problem(AttnOp::Fwd), kind.name());
            assert!((lists.kept_fraction() - kept).abs() < 1e-12, "{}: {kept}", kind.name());
            assert!((case.kept() - kept).abs() < 1e-12);
        }
        let dense = Case::dense(64, 4, 4096);
        assert_eq!(kept(&dense.problem(AttnOp::Fwd), "dense"), 1.0);
    }

    /// Blocks two neighbouring groups have in common, over the width, averaged over pairs of one cluster and of two.
    fn overlap(kind: ListKind) -> (f64, f64) {
        let case = case(kind);
        let lists = host_lists(&case);
        let view = lists.view();
        let (mut inside, mut across) = (Vec::new(), Vec::new());
        for list in (0..lists.count.len() - 1).filter(|list| list % 64 != 63) {
            let (a, b) = (view.blocks_of(list), view.blocks_of(list + 1));
            let share = a.iter().filter(|n| b.contains(n)).count() as f64 / a.len() as f64;
            if list % 8 == 7 { across.push(share) } else { inside.push(share) }
        }
        let mean = |shares: Vec<f64>| shares.iter().sum::<f64>() / shares.len() as f64;
        (mean(inside), mean(across))
    }

    #[test]
    fn neighbours_of_a_cluster_share_four_fifths() {
        // 16 of 64 blocks: 13 shared; of the 51 others each group draws 3, so a neighbour has 3 * 3 / 51 more in common.
        let (inside, across) = overlap(ListKind::Clustered);
        let expected = (13.0 + 9.0 / 51.0) / 16.0;
        assert!((inside - expected).abs() < 0.01, "{inside} is not {expected}");
        assert!((across - 0.25).abs() < 0.05, "groups of two clusters share by chance alone: {across}");
        let (inside, _) = overlap(ListKind::Random);
        assert!((inside - 0.25).abs() < 0.02, "random lists share by chance alone: {inside}");
    }

    #[test]
    fn mixed_heads_spread_from_half_to_a_hundredth() {
        let counts = mixed_counts(16, 512);
        let share = |n: u32| f64::from(n) / 512.0;
        assert!((share(counts[0]) - 0.5).abs() < 0.005 && (share(counts[15]) - 0.01).abs() < 0.002);
        for pair in counts.windows(2) {
            let step = share(pair[0]) - share(pair[1]);
            assert!((step - 0.49 / 15.0).abs() < 0.005, "{counts:?}");
        }
        // The order of heads is drawn: neither the widest nor the sparsest first.
        let case = Case::mixed(128, 16, 32768, (64, 64));
        let by_head = head_counts(&case);
        assert!(!by_head.is_sorted() && !by_head.is_sorted_by(|a, b| a >= b), "{by_head:?}");
    }

    #[test]
    fn a_mixed_launch_does_the_work_of_a_uniform_one() {
        for num_heads in 1..=40 {
            for blocks in [1, 2, 3, 5, 6, 7, 32, 256, 512, 1024] {
                let counts = mixed_counts(num_heads, blocks);
                assert_eq!(counts.len(), num_heads as usize);
                assert!(counts.iter().all(|n| (1..=blocks).contains(n)), "{num_heads} {blocks}: {counts:?}");
                assert_eq!(
                    counts.iter().sum::<u32>(),
                    num_heads * uniform_count(num_heads, blocks),
                    "{num_heads} heads, {blocks} blocks"
                );
            }
        }
        let mixed = Case::mixed(128, 16, 32768, (128, 128));
        let uniform = mixed.uniform();
        assert_eq!((uniform.kind, uniform.max_selected), (ListKind::Random, 65));
        assert_eq!(mixed.flops(AttnOp::Bwd), uniform.flops(AttnOp::Bwd));
        let pairs = |case: &Case| host_lists(case).kept_pairs();
        let (mixed, uniform) = (case(ListKind::Mixed), case(ListKind::Mixed).uniform());
        assert_eq!(pairs(&mixed), pairs(&uniform));
    }
}
