//! KV lists: which KV blocks each query group attends to, their inverse, validity, generators and window
//! baselines.
//!
//! The contract: `index [B,H,G,max_selected]` holds ids of KV blocks, ascending and unique, of which the first
//! `count [B,H,G]` are valid; G = ceil(seqlen_q / query_group), N = ceil(seqlen_kv / kv_block). The last group
//! and the last block of a sequence may be short. Lists are per query head, also with grouped-query attention.

use crate::rng::SplitMix64;
use dsv_spec::order::Grid;
use rayon::prelude::*;

/// What a set of KV lists is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListDims {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Queries of a sequence.
    pub seqlen_q: usize,
    /// Keys of a sequence.
    pub seqlen_kv: usize,
    /// Consecutive queries that share one list.
    pub query_group: usize,
    /// Consecutive keys selected together; 1 = single tokens.
    pub kv_block: usize,
    /// Width of a list in memory; the largest count allowed.
    pub max_selected: usize,
}

impl ListDims {
    /// G = ceil(seqlen_q / query_group).
    pub fn groups(&self) -> usize {
        self.seqlen_q.div_ceil(self.query_group)
    }

    /// N = ceil(seqlen_kv / kv_block).
    pub fn blocks(&self) -> usize {
        self.seqlen_kv.div_ceil(self.kv_block)
    }

    /// B * H * G, the number of lists.
    pub fn lists(&self) -> usize {
        self.batch * self.num_heads * self.groups()
    }

    /// The queries of `group`; short for the last one.
    pub fn group_rows(&self, group: usize) -> std::ops::Range<usize> {
        let start = group * self.query_group;
        start..(start + self.query_group).min(self.seqlen_q)
    }

    /// The query that speaks for `group`: index floor(len/2) of its valid queries.
    pub fn centre_row(&self, group: usize) -> usize {
        let rows = self.group_rows(group);
        rows.start + rows.len() / 2
    }

    /// The keys of `block`; short for the last one.
    pub fn block_keys(&self, block: usize) -> std::ops::Range<usize> {
        let start = block * self.kv_block;
        start..(start + self.kv_block).min(self.seqlen_kv)
    }
}

/// Why lists are refused. Positions are (batch, head, group, slot).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// A size of the lists is zero.
    #[error("lists have {name} = 0\n  allowed: 1 or more\n  next: pass the sizes the lists were built with")]
    ZeroSize {
        /// Which size.
        name: &'static str,
    },
    /// A buffer has the wrong length.
    #[error(
        "{name} holds {found} entries\n  needed: {expected} ({formula})\n  \
         next: pass the whole buffer, and the sizes it was built with"
    )]
    Length {
        /// `q2k_index` or `q2k_count`.
        name: &'static str,
        /// Length found.
        found: usize,
        /// Length needed.
        expected: usize,
        /// How the needed length comes about.
        formula: &'static str,
    },
    /// A count below zero or above the width.
    #[error(
        "q2k_count[{batch}, {head}, {group}] is {count}\n  allowed: 0..={max_selected} (max_selected)\n  \
         next: widen max_selected or lower top_k, then select again"
    )]
    Count {
        /// Sequence.
        batch: usize,
        /// Query head.
        head: usize,
        /// Query group.
        group: usize,
        /// The count found.
        count: i32,
        /// The width of a list.
        max_selected: usize,
    },
    /// An id that names no block.
    #[error(
        "q2k_index[{batch}, {head}, {group}, {slot}] is {index}\n  \
         allowed: 0..{blocks} (ceil(seqlen_kv / kv_block))\n  \
         next: check that the lists were made for this seqlen_kv and kv_block"
    )]
    Range {
        /// Sequence.
        batch: usize,
        /// Query head.
        head: usize,
        /// Query group.
        group: usize,
        /// Position in the list.
        slot: usize,
        /// The id found.
        index: i32,
        /// Number of blocks.
        blocks: usize,
    },
    /// Ids repeated or out of order.
    #[error(
        "q2k_index[{batch}, {head}, {group}, {slot}] is {index} after {previous}\n  \
         allowed: strictly ascending ids within q2k_count\n  next: sort each list and drop repeated ids"
    )]
    Order {
        /// Sequence.
        batch: usize,
        /// Query head.
        head: usize,
        /// Query group.
        group: usize,
        /// Position of the second of the two.
        slot: usize,
        /// The id found.
        index: i32,
        /// The id before it.
        previous: i32,
    },
}

/// Borrowed KV lists, as attention reads them.
#[derive(Clone, Copy, Debug)]
pub struct KvLists<'a> {
    /// Consecutive queries that share one list.
    pub query_group: usize,
    /// Consecutive keys selected together.
    pub kv_block: usize,
    /// Width of a list.
    pub max_selected: usize,
    /// `q2k_index [B,H,G,max_selected]`; what lies past a count is never read.
    pub index: &'a [i32],
    /// `q2k_count [B,H,G]`.
    pub count: &'a [i32],
}

impl<'a> KvLists<'a> {
    /// The sizes these lists have for a given problem.
    pub fn dims(&self, batch: usize, num_heads: usize, seqlen_q: usize, seqlen_kv: usize) -> ListDims {
        ListDims {
            batch,
            num_heads,
            seqlen_q,
            seqlen_kv,
            query_group: self.query_group,
            kv_block: self.kv_block,
            max_selected: self.max_selected,
        }
    }

    /// The blocks of list `list` = (b * H + h) * G + g; only for validated lists.
    pub fn blocks_of(&self, list: usize) -> &'a [i32] {
        &self.index[list * self.max_selected..][..self.count[list] as usize]
    }

    /// Checks what the `kv_validate` kernel checks: buffer lengths, counts in 0..=max_selected, ids in range,
    /// ascending and unique. Reports the first fault in memory order.
    pub fn validate(
        &self,
        batch: usize,
        num_heads: usize,
        seqlen_q: usize,
        seqlen_kv: usize,
    ) -> Result<ListDims, ListError> {
        let dims = self.dims(batch, num_heads, seqlen_q, seqlen_kv);
        for (name, size) in [
            ("batch", batch),
            ("num_heads", num_heads),
            ("seqlen_q", seqlen_q),
            ("seqlen_kv", seqlen_kv),
            ("query_group", self.query_group),
            ("kv_block", self.kv_block),
            ("max_selected", self.max_selected),
        ] {
            if size == 0 {
                return Err(ListError::ZeroSize { name });
            }
        }
        let lists = dims.lists();
        for (name, found, expected, formula) in [
            ("q2k_count", self.count.len(), lists, "batch * num_heads * ceil(seqlen_q / query_group)"),
            (
                "q2k_index",
                self.index.len(),
                lists * self.max_selected,
                "batch * num_heads * ceil(seqlen_q / query_group) * max_selected",
            ),
        ] {
            if found != expected {
                return Err(ListError::Length { name, found, expected, formula });
            }
        }
        let (groups, blocks) = (dims.groups(), dims.blocks());
        for list in 0..lists {
            let (batch, head, group) =
                (list / (num_heads * groups), list / groups % num_heads, list % groups);
            let count = self.count[list];
            if count < 0 || count as usize > self.max_selected {
                return Err(ListError::Count { batch, head, group, count, max_selected: self.max_selected });
            }
            let mut previous = -1;
            for (slot, &index) in self.blocks_of(list).iter().enumerate() {
                if index < 0 || index as usize >= blocks {
                    return Err(ListError::Range { batch, head, group, slot, index, blocks });
                }
                if index <= previous {
                    return Err(ListError::Order { batch, head, group, slot, index, previous });
                }
                previous = index;
            }
        }
        Ok(dims)
    }
}

/// Owned KV lists. Entries past a count are -1, so that reading them is noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvListsBuf {
    /// Sizes.
    pub dims: ListDims,
    /// `q2k_index [B,H,G,max_selected]`.
    pub index: Vec<i32>,
    /// `q2k_count [B,H,G]`.
    pub count: Vec<i32>,
}

impl KvListsBuf {
    /// Lists given by a function of (batch, head, group) that returns ascending, unique block ids. Panics where
    /// a list is wider than `dims.max_selected`.
    pub fn from_fn(dims: ListDims, mut blocks: impl FnMut(usize, usize, usize) -> Vec<i32>) -> Self {
        let groups = dims.groups();
        let mut index = vec![-1; dims.lists() * dims.max_selected];
        let mut count = vec![0; dims.lists()];
        for list in 0..dims.lists() {
            let ids = blocks(list / (dims.num_heads * groups), list / groups % dims.num_heads, list % groups);
            assert!(
                ids.len() <= dims.max_selected,
                "a list of {} blocks, wider than max_selected {}",
                ids.len(),
                dims.max_selected
            );
            index[list * dims.max_selected..][..ids.len()].copy_from_slice(&ids);
            count[list] = ids.len() as i32;
        }
        KvListsBuf { dims, index, count }
    }

    /// As attention reads them.
    pub fn view(&self) -> KvLists<'_> {
        KvLists {
            query_group: self.dims.query_group,
            kv_block: self.dims.kv_block,
            max_selected: self.dims.max_selected,
            index: &self.index,
            count: &self.count,
        }
    }

    /// See [`KvLists::validate`].
    pub fn validate(&self) -> Result<(), ListError> {
        let d = &self.dims;
        self.view().validate(d.batch, d.num_heads, d.seqlen_q, d.seqlen_kv).map(|_| ())
    }

    /// Every group lists every block. `dims.max_selected` is replaced by the number of blocks.
    pub fn dense(dims: ListDims) -> Self {
        let dims = ListDims { max_selected: dims.blocks(), ..dims };
        KvListsBuf::from_fn(dims, |_, _, _| (0..dims.blocks() as i32).collect())
    }

    /// Each group lists `kept` blocks (all, where there are fewer), drawn independently and uniformly.
    pub fn random(dims: ListDims, kept: usize, rng: &mut SplitMix64) -> Self {
        let all: Vec<i32> = (0..dims.blocks() as i32).collect();
        KvListsBuf::from_fn(dims, |_, _, _| ascending(rng.sample(&all, kept)))
    }

    /// Each group lists a number of blocks drawn uniformly from `counts` (clamped to the number of blocks), so
    /// that counts differ within one launch and may be zero.
    pub fn random_counts(
        dims: ListDims,
        counts: std::ops::RangeInclusive<usize>,
        rng: &mut SplitMix64,
    ) -> Self {
        let all: Vec<i32> = (0..dims.blocks() as i32).collect();
        KvListsBuf::from_fn(dims, |_, _, _| {
            let kept = counts.start() + rng.below(counts.end() - counts.start() + 1);
            ascending(rng.sample(&all, kept))
        })
    }

    /// Each group of head h lists `kept[h]` blocks (all, where there are fewer), drawn independently and uniformly: heads
    /// of different sparsity in one launch. Panics where `kept` has not one number a head.
    pub fn random_by_head(dims: ListDims, kept: &[usize], rng: &mut SplitMix64) -> Self {
        assert_eq!(kept.len(), dims.num_heads, "one count a head");
        let all: Vec<i32> = (0..dims.blocks() as i32).collect();
        KvListsBuf::from_fn(dims, |_, head, _| ascending(rng.sample(&all, kept[head])))
    }

    /// Lists as trained models have them, where neighbouring queries agree on what matters: of each head, groups 8c to
    /// 8c + 7 all list the same round(0.8 * kept) blocks, drawn for these 8, and each draws its other blocks by itself
    /// from those not shared. So two of the 8 have 80 % of their blocks in common, and by chance a few more.
    pub fn clustered(dims: ListDims, kept: usize, rng: &mut SplitMix64) -> Self {
        let all: Vec<i32> = (0..dims.blocks() as i32).collect();
        let kept = kept.min(all.len());
        let shared_len = (0.8 * kept as f64).round() as usize;
        let (mut shared, mut rest) = (Vec::new(), Vec::new());
        KvListsBuf::from_fn(dims, |_, _, group| {
            if group % 8 == 0 {
                let mut order = rng.sample(&all, all.len());
                rest = order.split_off(shared_len);
                shared = order;
            }
            let mut ids = shared.clone();
            ids.extend(rng.sample(&rest, kept - shared_len));
            ascending(ids)
        })
    }

    /// Lists in which some KV blocks (text, sinks, a background that stays) are of use to most groups: of each head, a block's
    /// weight is e^x, x standard normal, and each group draws `kept` blocks without replacement, by weight (Efraimidis and
    /// Spirakis: the `kept` smallest of exponential times over weight). The lists of the inverse differ in length by
    /// factors.
    pub fn popular(dims: ListDims, kept: usize, rng: &mut SplitMix64) -> Self {
        let kept = kept.min(dims.blocks());
        let mut weights = Vec::new();
        KvListsBuf::from_fn(dims, |_, _, group| {
            if group == 0 {
                weights = (0..dims.blocks()).map(|_| rng.normal().exp()).collect();
            }
            let mut times: Vec<(f64, i32)> = weights
                .iter()
                .zip(0..)
                .map(|(weight, block)| (-(1.0 - rng.uniform()).ln() / weight, block))
                .collect();
            times.sort_by(|a, b| a.0.total_cmp(&b.0));
            ascending(times[..kept].iter().map(|&(_, block)| block).collect())
        })
    }

    /// The 3D window baseline (WA-M, WA-L of the paper): a group lists the blocks that hold any key inside the
    /// window around its centre query. The window has max(1, round(fraction * side)) tokens along each of
    /// (t, h, w); at a border it is shifted inwards, so every window has the same number of tokens.
    ///
    /// `order[i]` is the raster index of token i of the sequence ([`dsv_spec::order::token_order`]). Self
    /// attention: queries and keys are the same tokens. `max_selected` becomes the largest count.
    ///
    /// Panics where an index lies outside `grid`, a size is zero or a fraction is not in (0, 1].
    pub fn window(
        batch: usize,
        num_heads: usize,
        query_group: usize,
        kv_block: usize,
        grid: Grid,
        order: &[u32],
        fraction: [f64; 3],
    ) -> Self {
        assert!(
            fraction.iter().all(|&f| f > 0.0 && f <= 1.0),
            "window fractions {fraction:?} must lie in (0, 1]"
        );
        assert!(
            order.iter().all(|&raster| (raster as usize) < grid.tokens()),
            "a raster index lies outside the grid {grid:?}"
        );
        let coords: Vec<[u32; 3]> = order.iter().map(|&raster| grid.coordinates(raster).into()).collect();
        let sides = [grid.t, grid.h, grid.w];
        let mut dims = ListDims {
            batch,
            num_heads,
            seqlen_q: coords.len(),
            seqlen_kv: coords.len(),
            query_group,
            kv_block,
            max_selected: 1,
        };
        let side: [u32; 3] =
            std::array::from_fn(|a| ((fraction[a] * f64::from(sides[a])).round() as u32).clamp(1, sides[a]));
        let per_group: Vec<Vec<i32>> = (0..dims.groups())
            .into_par_iter()
            .map(|group| {
                let centre = coords[dims.centre_row(group)];
                let start: [u32; 3] =
                    std::array::from_fn(|a| centre[a].saturating_sub(side[a] / 2).min(sides[a] - side[a]));
                let inside =
                    |key: usize| (0..3).all(|a| (start[a]..start[a] + side[a]).contains(&coords[key][a]));
                (0..dims.blocks()).filter(|&n| dims.block_keys(n).any(inside)).map(|n| n as i32).collect()
            })
            .collect();
        dims.max_selected = per_group.iter().map(Vec::len).max().unwrap_or(0).max(1);
        KvListsBuf::from_fn(dims, |_, _, group| per_group[group].clone())
    }

    /// Query-key pairs the lists keep, over all sequences and heads; short groups and blocks count their valid
    /// tokens only.
    pub fn kept_pairs(&self) -> u64 {
        let groups = self.dims.groups();
        let view = self.view();
        (0..self.dims.lists())
            .map(|list| {
                let keys: usize =
                    view.blocks_of(list).iter().map(|&n| self.dims.block_keys(n as usize).len()).sum();
                keys as u64 * self.dims.group_rows(list % groups).len() as u64
            })
            .sum()
    }

    /// Kept pairs over all pairs; 1 - sparsity.
    pub fn kept_fraction(&self) -> f64 {
        let d = &self.dims;
        let all = d.batch as u64 * d.num_heads as u64 * d.seqlen_q as u64 * d.seqlen_kv as u64;
        self.kept_pairs() as f64 / all as f64
    }

    /// The inverse lists (`kv_invert`): for every KV block, the groups that list it, ascending.
    pub fn invert(&self) -> Result<KvInverse, ListError> {
        self.validate()?;
        let dims = self.dims;
        let (groups, blocks) = (dims.groups(), dims.blocks());
        let slab = groups * dims.max_selected;
        let slabs = dims.batch * dims.num_heads;
        let mut offset = vec![0i32; slabs * (blocks + 1)];
        let mut index = vec![-1i32; slabs * slab];
        let view = self.view();
        for s in 0..slabs {
            let offset = &mut offset[s * (blocks + 1)..][..blocks + 1];
            let index = &mut index[s * slab..][..slab];
            for group in 0..groups {
                for &n in view.blocks_of(s * groups + group) {
                    offset[n as usize + 1] += 1;
                }
            }
            for n in 0..blocks {
                offset[n + 1] += offset[n];
            }
            let mut next = offset.to_vec();
            for group in 0..groups {
                for &n in view.blocks_of(s * groups + group) {
                    index[next[n as usize] as usize] = group as i32;
                    next[n as usize] += 1;
                }
            }
        }
        Ok(KvInverse { dims, offset, index })
    }
}

/// The inverse of KV lists as CSR, one slab of `G * max_selected` entries a (batch, head).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvInverse {
    /// Sizes of the lists this came from.
    pub dims: ListDims,
    /// `k2q_offset [B,H,N+1]`, relative to the slab.
    pub offset: Vec<i32>,
    /// `k2q_index [B,H,G*max_selected]`: group ids, ascending within a block; -1 past the last offset.
    pub index: Vec<i32>,
}

impl KvInverse {
    /// The groups that list `block`.
    pub fn groups_of(&self, batch: usize, head: usize, block: usize) -> &[i32] {
        let slab = batch * self.dims.num_heads + head;
        let offset = &self.offset[slab * (self.dims.blocks() + 1)..];
        let index = &self.index[slab * self.dims.groups() * self.dims.max_selected..];
        &index[offset[block] as usize..offset[block + 1] as usize]
    }
}

fn ascending(mut ids: Vec<i32>) -> Vec<i32> {
    ids.sort_unstable();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsv_spec::order::{Cube, token_order};

    fn dims() -> ListDims {
        ListDims {
            batch: 2,
            num_heads: 3,
            seqlen_q: 130,
            seqlen_kv: 100,
            query_group: 16,
            kv_block: 8,
            max_selected: 9,
        }
    }

    #[test]
    fn inverse_round_trips() {
        let mut rng = SplitMix64::new(5);
        let lists = KvListsBuf::random_counts(dims(), 0..=9, &mut rng);
        lists.validate().unwrap();
        assert!(lists.count.contains(&0) && lists.count.contains(&9));
        let inverse = lists.invert().unwrap();
        let d = lists.dims;
        let back = KvListsBuf::from_fn(d, |b, h, g| {
            (0..d.blocks() as i32)
                .filter(|&n| inverse.groups_of(b, h, n as usize).contains(&(g as i32)))
                .collect()
        });
        assert_eq!(back, lists);
        for b in 0..d.batch {
            for h in 0..d.num_heads {
                for n in 0..d.blocks() {
                    assert!(inverse.groups_of(b, h, n).is_sorted_by(|x, y| x < y));
                }
            }
        }
    }

    #[test]
    fn pairs_count_valid_tokens_only() {
        let d = dims();
        let dense = KvListsBuf::dense(d);
        assert_eq!(dense.kept_pairs(), (d.batch * d.num_heads * d.seqlen_q * d.seqlen_kv) as u64);
        assert_eq!(dense.kept_fraction(), 1.0);
        // Only the last, short block (4 keys of 8): 4 of 100 keys for every query.
        let last = KvListsBuf::from_fn(d, |_, _, _| vec![d.blocks() as i32 - 1]);
        assert_eq!(last.kept_fraction(), 0.04);
        assert_eq!(d.group_rows(8), 128..130);
        assert_eq!(d.centre_row(8), 129);
        assert_eq!(d.centre_row(0), 8);
    }

    #[test]
    fn clustered_lists_share_four_fifths() {
        let d = ListDims { seqlen_q: 512, seqlen_kv: 3200, max_selected: 50, ..dims() };
        let lists = KvListsBuf::clustered(d, 50, &mut SplitMix64::new(9));
        lists.validate().unwrap();
        assert!(lists.count.iter().all(|&c| c == 50));
        let view = lists.view();
        let common =
            |a: usize, b: usize| view.blocks_of(a).iter().filter(|n| view.blocks_of(b).contains(n)).count();
        for group in 0..31 {
            let shared = common(group, group + 1);
            if group % 8 == 0 && group + 8 <= 32 {
                let by_all = view
                    .blocks_of(group)
                    .iter()
                    .filter(|n| (group..group + 8).all(|other| view.blocks_of(other).contains(n)));
                assert_eq!(by_all.count(), 40, "blocks that groups {group} to {} all list", group + 7);
            }
            if group % 8 == 7 {
                assert!(shared < 25, "groups {group} and the next are of different clusters: {shared}");
            } else {
                assert!(shared >= 40, "neighbours {group} share {shared} of 50");
            }
        }
    }

    #[test]
    fn popular_blocks_are_listed_by_most_groups() {
        let d = ListDims { seqlen_q: 4096, seqlen_kv: 3200, max_selected: 20, ..dims() };
        let lists = KvListsBuf::popular(d, 20, &mut SplitMix64::new(9));
        lists.validate().unwrap();
        assert!(lists.count.iter().all(|&c| c == 20));
        let inverse = lists.invert().unwrap();
        let lengths: Vec<i32> = inverse.offset[..=d.blocks()].windows(2).map(|w| w[1] - w[0]).collect();
        let mean = lengths.iter().sum::<i32>() / lengths.len() as i32;
        assert!(lengths.iter().any(|&len| len > 3 * mean), "{lengths:?}");
        assert!(lengths.iter().any(|&len| len < mean / 3), "{lengths:?}");
    }

    #[test]
    fn every_head_has_its_own_count() {
        let d = ListDims { max_selected: 12, ..dims() };
        let lists = KvListsBuf::random_by_head(d, &[12, 3, 1], &mut SplitMix64::new(2));
        lists.validate().unwrap();
        for (list, &count) in lists.count.iter().enumerate() {
            assert_eq!(count, [12, 3, 1][list / d.groups() % 3]);
        }
        let (a, b) = (lists.view().blocks_of(9), lists.view().blocks_of(10));
        assert!(a.len() == 3 && a != b, "groups of a head draw independently");
    }

    #[test]
    fn every_fault_is_named() {
        let good = KvListsBuf::random(dims(), 4, &mut SplitMix64::new(1));
        let list = 2 * 9 + 3; // batch 0, head 2, group 3
        let at = list * 9;
        let fault = |change: &dyn Fn(&mut KvListsBuf)| {
            let mut lists = good.clone();
            change(&mut lists);
            lists.validate().unwrap_err()
        };
        assert_eq!(
            fault(&|l| l.count[list] = 10),
            ListError::Count { batch: 0, head: 2, group: 3, count: 10, max_selected: 9 }
        );
        assert!(matches!(fault(&|l| l.count[list] = -1), ListError::Count { count: -1, .. }));
        assert_eq!(
            fault(&|l| l.index[at + 3] = 13),
            ListError::Range { batch: 0, head: 2, group: 3, slot: 3, index: 13, blocks: 13 }
        );
        assert!(matches!(fault(&|l| l.index[at] = -1), ListError::Range { slot: 0, index: -1, .. }));
        assert!(matches!(
            fault(&|l| l.index[at + 1] = l.index[at]),
            ListError::Order { slot: 1, head: 2, group: 3, .. }
        ));
        assert!(matches!(fault(&|l| l.index.swap(at, at + 2)), ListError::Order { .. }));
        assert!(matches!(
            fault(&|l| {
                l.count.pop();
            }),
            ListError::Length { name: "q2k_count", .. }
        ));
        assert!(matches!(fault(&|l| l.dims.kv_block = 0), ListError::ZeroSize { name: "kv_block" }));
        // What lies past the count is not looked at.
        let mut lists = good.clone();
        lists.index[at + 4] = 99;
        lists.validate().unwrap();
        let text = fault(&|l| l.index[at + 3] = 13).to_string();
        assert_eq!(
            text,
            "q2k_index[0, 2, 3, 3] is 13\n  allowed: 0..13 (ceil(seqlen_kv / kv_block))\n  \
             next: check that the lists were made for this seqlen_kv and kv_block"
        );
    }

    #[test]
    fn windows_keep_what_they_should() {
        // Raster order on a 6x6x6 grid with single-token groups and blocks: the window is exact.
        let grid = Grid { t: 6, h: 6, w: 6 };
        let raster: Vec<u32> = (0..216).collect();
        let third = KvListsBuf::window(1, 1, 1, 1, grid, &raster, [1.0 / 3.0; 3]);
        third.validate().unwrap();
        assert!(third.count.iter().all(|&c| c == 8));
        assert!((third.kept_fraction() - 1.0 / 27.0).abs() < 1e-12);
        let two_thirds = KvListsBuf::window(1, 2, 1, 1, grid, &raster, [2.0 / 3.0; 3]);
        assert!((two_thirds.kept_fraction() - 8.0 / 27.0).abs() < 1e-12);
        // A query's own token is always in its window, at the borders too.
        for i in 0..216 {
            assert!(third.view().blocks_of(i).contains(&(i as i32)));
        }
        // The token order matters only through the coordinates: a shuffled order lists the same tokens.
        let order = SplitMix64::new(4).permutation(216);
        let shuffled: Vec<u32> = order.iter().map(|&i| raster[i]).collect();
        let lists = KvListsBuf::window(1, 1, 1, 1, grid, &shuffled, [1.0 / 3.0; 3]);
        for (i, &token) in order.iter().enumerate() {
            let mut tokens: Vec<i32> =
                lists.view().blocks_of(i).iter().map(|&n| order[n as usize] as i32).collect();
            tokens.sort_unstable();
            assert_eq!(tokens, third.view().blocks_of(token));
        }
        // In the contract's order a group of 64 is a 4x4x4 cube; the window around its centre, as wide as the
        // cube, takes at most the cubes that touch it.
        let grid16 = Grid { t: 16, h: 16, w: 16 };
        let cubes = token_order(grid16, Cube::of_group(64));
        let lists = KvListsBuf::window(1, 1, 64, 64, grid16, &cubes, [0.25; 3]);
        lists.validate().unwrap();
        assert!(lists.count.iter().all(|&c| (1..=8).contains(&c)));
        assert!((0..64).all(|g| lists.view().blocks_of(g).contains(&(g as i32))));
        // Groups and blocks larger than one: a block is listed if any key of it is inside.
        let lists = KvListsBuf::window(1, 1, 8, 4, grid, &raster, [1.0 / 3.0; 3]);
        lists.validate().unwrap();
        for group in 0..27 {
            let centre = lists.dims.centre_row(group);
            let wanted: std::collections::BTreeSet<i32> =
                third.view().blocks_of(centre).iter().map(|key| key / 4).collect();
            assert_eq!(lists.view().blocks_of(group), wanted.into_iter().collect::<Vec<_>>());
        }
    }
}
