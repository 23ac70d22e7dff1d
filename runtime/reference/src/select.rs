//! Selection of KV blocks, or tokens where `kv_block` is 1, from low-rank scores: one proxy query or a few queries a
//! group, the maximum or the softmax mass over them and over a block's keys, the best blocks of each group.
//!
//! With `s_i(j) = <proxy_i(g), k_lr(j)>` for the queries i of the rule and the keys j of block n, and `q_lr`, `k_lr
//! [B, S, H, rank]` per query head (no grouped heads), `score[b, h, g, n]` is
//!
//! ```text
//! max over i, j of s_i(j)                                                   block score max
//! ln(sum over j of exp(scale max over i of s_i(j))) / scale                 block score mass
//! ln(sum over i, j of exp(scale s_i(j)) / sum over all j' of exp(scale s_i(j'))) / scale     rule mass4
//! ```
//!
//! Blocks are ranked by score, ties by the smaller id, and listed ascending: a number of them ([`top_k`]), or the fewest that
//! hold a share of the mass exp(scale score) ([`top_p`]). [`keep`] gives blocks that are to be listed whatever their score the
//! score +inf.

use crate::attention::{AttnError, View};
use crate::element::{Element, Rounding};
use crate::lists::{KvListsBuf, ListDims};
use crate::matrix::{Mat, MatMut, multiply};
use dsv_spec::{BlockScore, Dtype, GroupRule};
use rayon::prelude::*;

/// Why a selection is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SelectError {
    /// A tensor or size does not fit.
    #[error(transparent)]
    Input(#[from] AttnError),
    /// One top-k a head is needed.
    #[error(
        "top_k has {found} entries\n  needed: {num_heads} (one a query head)\n  \
         next: repeat the number for every head"
    )]
    TopKLength {
        /// Entries found.
        found: usize,
        /// Query heads.
        num_heads: usize,
    },
    /// A top-k is negative or wider than the lists.
    #[error(
        "top_k of head {head} is {top_k}\n  allowed: 0..={max_selected} (max_selected)\n  \
         next: widen max_selected or lower top_k"
    )]
    TopK {
        /// Query head.
        head: usize,
        /// The number found.
        top_k: i32,
        /// Width of a list.
        max_selected: usize,
    },
    /// A top-k is above the number of blocks.
    #[error(
        "top_k of head {head} is {top_k}\n  allowed: 0..={blocks} (ceil(seqlen_kv / kv_block))\n  \
         next: lower top_k to the number of blocks"
    )]
    TopKAboveBlocks {
        /// Query head.
        head: usize,
        /// The number found.
        top_k: i32,
        /// KV blocks of a sequence.
        blocks: usize,
    },
    /// A share of the mass makes no sense.
    #[error(
        "top_p of head {head} is {share}\n  allowed: 0 (nothing) to 1 (every block)\n  next: pass a share, not a percentage"
    )]
    Share {
        /// Query head.
        head: usize,
        /// The number found.
        share: f32,
    },
    /// A score is not a number.
    #[error(
        "score[{batch}, {head}, {group}, {block}] is NaN\n  allowed: any number, infinities included\n  \
         next: look for NaN in q_lr, k_lr (predictor weights or its input)"
    )]
    Nan {
        /// Sequence.
        batch: usize,
        /// Query head.
        head: usize,
        /// Query group.
        group: usize,
        /// KV block.
        block: usize,
    },
    /// A scores buffer has the wrong length.
    #[error(
        "scores hold {found} entries\n  needed: {expected} (batch * num_heads * groups * blocks)\n  \
         next: compute them with the same ListDims"
    )]
    ScoresLength {
        /// Entries found.
        found: usize,
        /// Entries needed.
        expected: usize,
    },
    /// A mask of kept blocks of another size.
    #[error(
        "the mask of kept blocks has {found} words\n  needed: {expected} (groups * ceil(blocks / 32)), or none\n  \
         next: make it for the same ListDims"
    )]
    MaskLength {
        /// Words found.
        found: usize,
        /// Words needed.
        expected: usize,
    },
}

fn check<T>(dims: &ListDims, rank: usize, q_lr: &View<'_, T>, k_lr: &View<'_, T>) -> Result<(), SelectError> {
    for (name, size) in [
        ("batch", dims.batch),
        ("num_heads", dims.num_heads),
        ("seqlen_q", dims.seqlen_q),
        ("seqlen_kv", dims.seqlen_kv),
        ("query_group", dims.query_group),
        ("kv_block", dims.kv_block),
        ("rank", rank),
    ] {
        if size == 0 {
            return Err(AttnError::ZeroSize { name }.into());
        }
    }
    q_lr.check("q_lr", dims.batch, dims.seqlen_q, dims.num_heads, rank)?;
    k_lr.check("k_lr", dims.batch, dims.seqlen_kv, dims.num_heads, rank)?;
    Ok(())
}

/// The definition, in f64: scores [B, H, G, N], of a block the largest ([`BlockScore::Max`]; [`GroupRule::Mass4`]: its mass,
/// at scale 1). With `rounding`, inputs and the mean proxy are rounded to that dtype first, as a kernel that reads and
/// multiplies in it does.
pub fn scores_f64<T: Element>(
    dims: &ListDims,
    rank: usize,
    q_lr: &View<'_, T>,
    k_lr: &View<'_, T>,
    rule: GroupRule,
    rounding: Option<Dtype>,
) -> Result<Vec<f64>, SelectError> {
    block_scores_f64(dims, rank, q_lr, k_lr, rule, BlockScore::Max, 1.0, rounding)
}

/// [`scores_f64`] with any block score. Logits are `scale` times the products; it must be above 0.
pub fn block_scores_f64<T: Element>(
    dims: &ListDims,
    rank: usize,
    q_lr: &View<'_, T>,
    k_lr: &View<'_, T>,
    rule: GroupRule,
    block_score: BlockScore,
    scale: f64,
    rounding: Option<Dtype>,
) -> Result<Vec<f64>, SelectError> {
    check(dims, rank, q_lr, k_lr)?;
    let round = |x: f64| rounding.map_or(x, |dtype| f64::from(dtype.round(x as f32)));
    let row = |view: &View<'_, T>, b: usize, token: usize, h: usize| -> Vec<f64> {
        view.row(b, token, h, rank).iter().map(|x| round(x.to_f64())).collect()
    };
    let (groups, blocks) = (dims.groups(), dims.blocks());
    let mut scores = vec![f64::NEG_INFINITY; dims.lists() * blocks];
    scores.par_chunks_mut(groups * blocks).enumerate().for_each(|(slab, scores)| {
        let (b, h) = (slab / dims.num_heads, slab % dims.num_heads);
        for group in 0..groups {
            let rows = dims.group_rows(group);
            let queries: Vec<Vec<f64>> = match rule {
                GroupRule::Centre => vec![row(q_lr, b, dims.centre_row(group), h)],
                GroupRule::Mean => {
                    let mut mean = vec![0.0; rank];
                    for token in rows.clone() {
                        for (sum, x) in mean.iter_mut().zip(row(q_lr, b, token, h)) {
                            *sum += x;
                        }
                    }
                    vec![mean.iter().map(|sum| round(sum / rows.len() as f64)).collect()]
                }
                GroupRule::Max4 | GroupRule::Mass4 => {
                    four_rows(dims, group).into_iter().map(|token| row(q_lr, b, token, h)).collect()
                }
            };
            let products: Vec<Vec<f64>> = queries
                .iter()
                .map(|query| {
                    let product = |key| query.iter().zip(row(k_lr, b, key, h)).map(|(q, k)| q * k).sum();
                    (0..dims.seqlen_kv).map(product).collect()
                })
                .collect();
            let found = unit_scores(&products, dims.kv_block, rule, block_score, scale);
            scores[group * blocks..][..blocks].copy_from_slice(&found);
        }
    });
    Ok(scores)
}

/// Scores of the KV units of one group, units of `kv_block` keys, from the products of its [`speakers`] (for
/// [`GroupRule::Mean`]: of the mean query) with all keys, a row each.
pub fn unit_scores(
    products: &[Vec<f64>],
    kv_block: usize,
    rule: GroupRule,
    block_score: BlockScore,
    scale: f64,
) -> Vec<f64> {
    let keys = 0..products.first().map_or(0, Vec::len);
    // One row of scores by key: the largest of the queries', or the logarithm of their masses' sum.
    let of_keys: Vec<f64> = if rule == GroupRule::Mass4 {
        let row = |row: &[f64]| row.iter().map(|x| scale * x).collect();
        let rows: Vec<Vec<f64>> = products.iter().map(|products| row(products)).collect();
        // Logits that are no number, or infinite, take no part in what the others are divided by.
        let lse: Vec<f64> = rows
            .iter()
            .map(|row| log_sum_exp(row.iter().copied().filter(|x| x.is_finite())))
            .map(|lse| if lse.is_finite() { lse } else { 0.0 })
            .collect();
        keys.map(|key| log_sum_exp(rows.iter().zip(&lse).map(|(row, lse)| row[key] - lse)) / scale).collect()
    } else {
        let best = |key: usize| {
            let mut best = f64::NEG_INFINITY;
            products.iter().for_each(|row| keep_larger(&mut best, row[key]));
            best
        };
        keys.map(best).collect()
    };
    let of_unit = |keys: &[f64]| {
        if block_score == BlockScore::Mass || rule == GroupRule::Mass4 {
            return log_sum_exp(keys.iter().map(|key| scale * key)) / scale;
        }
        let mut best = f64::NEG_INFINITY;
        keys.iter().for_each(|&key| keep_larger(&mut best, key));
        best
    };
    of_keys.chunks(kv_block).map(of_unit).collect()
}

/// ln(sum of exp(x)): NaN with a NaN, +inf with one, -inf of nothing.
fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let mut largest = f64::NEG_INFINITY;
    values.clone().for_each(|x| keep_larger(&mut largest, x));
    if !largest.is_finite() {
        return largest;
    }
    largest + values.map(|x| (x - largest).exp()).sum::<f64>().ln()
}

/// [`scores_f64`] in f32 with `gemm`, for the trainer: scores [B, H, G, N].
pub fn scores_f32(
    dims: &ListDims,
    rank: usize,
    q_lr: &View<'_, f32>,
    k_lr: &View<'_, f32>,
    rule: GroupRule,
) -> Result<Vec<f32>, SelectError> {
    if rule == GroupRule::Mass4 {
        // Normalised over all keys: two passes, for which no trainer on a CPU has asked yet.
        let exact = scores_f64(dims, rank, q_lr, k_lr, rule, None)?;
        return Ok(exact.into_iter().map(|score| score as f32).collect());
    }
    check(dims, rank, q_lr, k_lr)?;
    // Keys scored at once: whole blocks, about a thousand keys.
    let tile_keys = 1024usize.div_ceil(dims.kv_block) * dims.kv_block;
    let (groups, blocks) = (dims.groups(), dims.blocks());
    let mut scores = vec![f32::NEG_INFINITY; dims.lists() * blocks];
    scores.par_chunks_mut(groups * blocks).enumerate().for_each(|(slab, scores)| {
        let (b, h) = (slab / dims.num_heads, slab % dims.num_heads);
        let queries = rule.queries() as usize;
        let mut proxies = vec![0.0f32; groups * queries * rank];
        for (group, query) in proxies.chunks_exact_mut(queries * rank).enumerate() {
            let rows = dims.group_rows(group);
            match rule {
                GroupRule::Centre => query.copy_from_slice(q_lr.row(b, dims.centre_row(group), h, rank)),
                GroupRule::Mean => {
                    let len = rows.len() as f32;
                    for token in rows {
                        let row = q_lr.row(b, token, h, rank);
                        query.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                    }
                    query.iter_mut().for_each(|x| *x /= len);
                }
                GroupRule::Max4 | GroupRule::Mass4 => {
                    for (query, token) in query.chunks_exact_mut(rank).zip(four_rows(dims, group)) {
                        query.copy_from_slice(q_lr.row(b, token, h, rank));
                    }
                }
            }
        }
        let mut products = vec![0.0f32; groups * queries * tile_keys.min(dims.seqlen_kv)];
        let mut first = 0;
        while first < dims.seqlen_kv {
            let keys = tile_keys.min(dims.seqlen_kv - first);
            let products = &mut products[..groups * queries * keys];
            multiply(
                MatMut::packed(products, groups * queries, keys),
                1.0,
                Mat::packed(&proxies, groups * queries, rank),
                Mat::new(k_lr.from(b, first, h), keys, rank, k_lr.layout.seq).t(),
            );
            for (row, products) in products.chunks_exact(keys).enumerate() {
                let scores = &mut scores[row / queries * blocks..][..blocks];
                let blocks = products.chunks(dims.kv_block).zip(&mut scores[first / dims.kv_block..]);
                for (products, score) in blocks {
                    products.iter().for_each(|&product| keep_larger(score, product));
                }
            }
            first += keys;
        }
    });
    Ok(scores)
}

/// The queries of [`GroupRule::Max4`] and [`GroupRule::Mass4`] in a group.
fn four_rows(dims: &ListDims, group: usize) -> Vec<usize> {
    let rows = dims.group_rows(group);
    speakers(GroupRule::Max4, rows.len()).into_iter().map(|place| rows.start + place).collect()
}

/// Places of the queries that a rule looks at among the `len` valid queries of a group: index floor(len / 2), all of them (for
/// their mean), or floor(len (2 i + 1) / 8) for i = 0..4.
pub fn speakers(rule: GroupRule, len: usize) -> Vec<usize> {
    match rule {
        GroupRule::Centre => vec![len / 2],
        GroupRule::Mean => (0..len).collect(),
        GroupRule::Max4 | GroupRule::Mass4 => (0..4).map(|i| len * (2 * i + 1) / 8).collect(),
    }
}

/// Blocks that are listed before all others, whatever their score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep<'a> {
    /// Blocks with one of the first tokens of the sequence (text, sinks): how many tokens.
    pub first: usize,
    /// Blocks with a token of the group's own, by position: key token i is query token i.
    pub own: bool,
    /// [G, ceil(N / 32)]: bit n % 32 of word n / 32 is set where block n is kept, in every head; empty = none.
    pub mask: &'a [u32],
}

/// Gives the kept blocks of every group the score +inf, NaN included: they come before all finite scores, ties by the
/// smaller id. Scores [B, H, G, N].
///
/// # Errors
/// [`SelectError::ScoresLength`], [`SelectError::MaskLength`].
pub fn keep<T: From<f32>>(dims: &ListDims, keep: Keep<'_>, scores: &mut [T]) -> Result<(), SelectError> {
    let (groups, blocks) = (dims.groups(), dims.blocks());
    let expected = dims.lists() * blocks;
    if scores.len() != expected {
        return Err(SelectError::ScoresLength { found: scores.len(), expected });
    }
    let words = blocks.div_ceil(32);
    if !keep.mask.is_empty() && keep.mask.len() != groups * words {
        return Err(SelectError::MaskLength { found: keep.mask.len(), expected: groups * words });
    }
    for (list, scores) in scores.chunks_exact_mut(blocks).enumerate() {
        let mask = keep.mask.get(list % groups * words..).unwrap_or_default();
        let own = dims.group_rows(list % groups);
        // A group's own tokens are those of a whole group: the last one's may go on past its queries.
        let own = own.start..own.start + dims.query_group;
        for (block, score) in scores.iter_mut().enumerate() {
            let keys = dims.block_keys(block);
            let masked = mask.get(block / 32).is_some_and(|word| word >> (block % 32) & 1 != 0);
            let is_own = keep.own && keys.start < own.end && keys.end > own.start;
            if masked || is_own || keys.start < keep.first {
                *score = f32::INFINITY.into();
            }
        }
    }
    Ok(())
}

/// Lists of a budget `top_p`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopP {
    /// The lists.
    pub lists: KvListsBuf,
    /// How many of them `max_selected` cut.
    pub capped: usize,
}

/// Lists, for each group, the fewest blocks that hold `shares[h]` of the group's mass, from scores [B, H, G, N]. A block's
/// mass is exp(scale score); blocks of score +inf are listed first and are no mass. A share of 0 lists nothing, 1 every block.
/// Where that is more than `dims.max_selected`, the list keeps its `max_selected` best blocks.
///
/// # Errors
/// [`SelectError::Share`], [`SelectError::TopKLength`] for a wrong number of shares, and as [`top_k`].
pub fn top_p<T: Element + PartialOrd>(
    dims: &ListDims,
    scores: &[T],
    shares: &[f32],
    scale: f64,
) -> Result<TopP, SelectError> {
    let (groups, blocks) = (dims.groups(), dims.blocks());
    if shares.len() != dims.num_heads {
        return Err(SelectError::TopKLength { found: shares.len(), num_heads: dims.num_heads });
    }
    if let Some(head) = shares.iter().position(|share| !(0.0..=1.0).contains(share)) {
        return Err(SelectError::Share { head, share: shares[head] });
    }
    let expected = dims.lists() * blocks;
    if scores.len() != expected {
        return Err(SelectError::ScoresLength { found: scores.len(), expected });
    }
    let counts: Vec<usize> = (0..dims.lists())
        .into_par_iter()
        .map(|list| {
            let share = f64::from(shares[list / groups % dims.num_heads]);
            let scores: Vec<f64> = scores[list * blocks..][..blocks].iter().map(|s| s.to_f64()).collect();
            needed_for(&scores, share, scale)
        })
        .collect();
    let capped = counts.iter().filter(|&&count| count > dims.max_selected).count();
    let counts: Vec<i32> = counts.iter().map(|&count| count.min(dims.max_selected) as i32).collect();
    Ok(TopP { lists: top_of_each(dims, scores, &counts)?, capped })
}

/// The fewest blocks, best first, that hold `share` of the mass; see [`top_p`].
pub fn needed_for(scores: &[f64], share: f64, scale: f64) -> usize {
    if share <= 0.0 || share >= 1.0 {
        return if share >= 1.0 { scores.len() } else { 0 };
    }
    let infinite = scores.iter().filter(|&&s| s == f64::INFINITY).count();
    let mut finite: Vec<f64> = scores.iter().copied().filter(|s| s.is_finite()).collect();
    finite.sort_unstable_by(|a, b| b.total_cmp(a));
    let largest = finite.first().copied().unwrap_or(0.0);
    let masses: Vec<f64> = finite.iter().map(|s| (scale * (s - largest)).exp()).collect();
    let target = share * masses.iter().sum::<f64>();
    let mut held = 0.0;
    let needed = masses.iter().take_while(|&&mass| {
        let more = held < target;
        held += mass;
        more
    });
    infinite + needed.count()
}

/// The lists as bits [B, H, G, ceil(N / 32)]: bit n % 32 of word n / 32 says whether block n is listed.
pub fn bitmap(lists: &KvListsBuf) -> Vec<u32> {
    let words = lists.dims.blocks().div_ceil(32);
    let mut bits = vec![0u32; lists.dims.lists() * words];
    for (list, bits) in bits.chunks_exact_mut(words).enumerate() {
        for &block in lists.view().blocks_of(list) {
            bits[block as usize / 32] |= 1 << (block % 32);
        }
    }
    bits
}

/// Maximum in which NaN wins, so that it is noticed.
fn keep_larger<T: PartialOrd + Copy>(best: &mut T, score: T) {
    let is_nan = |x: T| x.partial_cmp(&x).is_none();
    if !is_nan(*best) && (score > *best || is_nan(score)) {
        *best = score;
    }
}

/// Lists the `top_k[h]` best blocks (at most all) of each group from scores [B, H, G, N].
pub fn top_k<T: PartialOrd + Copy + Sync>(
    dims: &ListDims,
    scores: &[T],
    top_k: &[i32],
) -> Result<KvListsBuf, SelectError> {
    let (groups, blocks) = (dims.groups(), dims.blocks());
    let expected = dims.lists() * blocks;
    if scores.len() != expected {
        return Err(SelectError::ScoresLength { found: scores.len(), expected });
    }
    if top_k.len() != dims.num_heads {
        return Err(SelectError::TopKLength { found: top_k.len(), num_heads: dims.num_heads });
    }
    for (head, &top_k) in top_k.iter().enumerate() {
        if top_k > 0 && top_k as usize > blocks {
            return Err(SelectError::TopKAboveBlocks { head, top_k, blocks });
        }
        if top_k < 0 || top_k as usize > dims.max_selected {
            return Err(SelectError::TopK { head, top_k, max_selected: dims.max_selected });
        }
    }
    let counts: Vec<i32> = (0..dims.lists()).map(|list| top_k[list / groups % dims.num_heads]).collect();
    top_of_each(dims, scores, &counts)
}

/// Lists the `counts[list]` best blocks (at most all) of each group from scores [B, H, G, N]; counts in 0..=max_selected.
///
/// # Errors
/// [`SelectError::Nan`].
pub fn top_of_each<T: PartialOrd + Copy + Sync>(
    dims: &ListDims,
    scores: &[T],
    counts: &[i32],
) -> Result<KvListsBuf, SelectError> {
    let (groups, blocks) = (dims.groups(), dims.blocks());
    if let Some(at) = scores.iter().position(|s| s.partial_cmp(s).is_none()) {
        let list = at / blocks;
        return Err(SelectError::Nan {
            batch: list / (dims.num_heads * groups),
            head: list / groups % dims.num_heads,
            group: list % groups,
            block: at % blocks,
        });
    }
    let chosen: Vec<Vec<i32>> = (0..dims.lists())
        .into_par_iter()
        .map(|list| {
            let scores = &scores[list * blocks..][..blocks];
            let kept = (counts[list] as usize).min(blocks);
            let mut ids: Vec<i32> = (0..blocks as i32).collect();
            if kept < blocks && kept > 0 {
                ids.select_nth_unstable_by(kept - 1, |&a, &b| {
                    let order = scores[b as usize].partial_cmp(&scores[a as usize]);
                    order.unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b))
                });
            }
            ids.truncate(kept);
            ids.sort_unstable();
            ids
        })
        .collect();
    Ok(KvListsBuf::from_fn(*dims, |b, h, g| chosen[(b * dims.num_heads + h) * groups + g].clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Layout;
    use crate::rng::SplitMix64;

    fn dims() -> ListDims {
        ListDims {
            batch: 2,
            num_heads: 3,
            seqlen_q: 77,
            seqlen_kv: 1100,
            query_group: 16,
            kv_block: 8,
            max_selected: 40,
        }
    }

    #[test]
    fn scores_follow_the_rule_and_f32_agrees() {
        let d = dims();
        let mut rng = SplitMix64::new(1);
        let q = rng.normals(2 * 77 * 3 * 16, 1.0);
        let k = rng.normals(2 * 1100 * 3 * 16, 1.0);
        let (q, k) =
            (View::new(&q[..], Layout::bshd(77, 3, 16)), View::new(&k[..], Layout::bhsd(1100, 3, 16)));
        for &rule in GroupRule::ALL {
            let exact = scores_f64(&d, 16, &q, &k, rule, None).unwrap();
            let single = scores_f32(&d, 16, &q, &k, rule).unwrap();
            let worst = exact.iter().zip(&single).map(|(a, &b)| (a - f64::from(b)).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-5, "{worst:e}");
            // By hand: batch 1, head 2, the last group (13 queries) and the last block (4 keys).
            let rows = d.group_rows(4);
            assert_eq!(rows, 64..77);
            let token = |i: usize| q.row(1, i, 2, 16).iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
            let queries: Vec<Vec<f64>> = match rule {
                GroupRule::Centre => vec![token(70)],
                GroupRule::Mean => {
                    vec![(0..16).map(|c| rows.clone().map(|i| token(i)[c]).sum::<f64>() / 13.0).collect()]
                }
                GroupRule::Max4 | GroupRule::Mass4 => [64 + 1, 64 + 4, 64 + 8, 64 + 11].map(token).to_vec(),
            };
            if rule == GroupRule::Mass4 {
                // Four queries' softmax masses of the four keys.
                let by_hand: f64 = queries
                    .iter()
                    .map(|query| {
                        let mass = |j: usize| -> f64 {
                            let key = k.row(1, j, 2, 16);
                            query.iter().zip(key).map(|(a, &b)| a * f64::from(b)).sum::<f64>().exp()
                        };
                        (1096..1100).map(mass).sum::<f64>() / (0..1100).map(mass).sum::<f64>()
                    })
                    .sum();
                let at = ((3 + 2) * 5 + 4) * 138 + 137;
                assert!((exact[at].exp() / by_hand - 1.0).abs() < 1e-12);
                continue;
            }
            let by_hand = (1096..1100)
                .flat_map(|j| {
                    queries
                        .iter()
                        .map(move |q| q.iter().zip(k.row(1, j, 2, 16)).map(|(a, &b)| a * f64::from(b)).sum())
                })
                .fold(f64::NEG_INFINITY, f64::max);
            let at = ((3 + 2) * 5 + 4) * 138 + 137;
            assert!((exact[at] - by_hand).abs() < 1e-12);
            assert_eq!(exact.len(), at + 1);
        }
        let rounded = scores_f64(&d, 16, &q, &k, GroupRule::Mean, Some(Dtype::Bf16)).unwrap();
        let exact = scores_f64(&d, 16, &q, &k, GroupRule::Mean, None).unwrap();
        let worst = exact.iter().zip(&rounded).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst > 1e-4 && worst < 0.1, "{worst:e}");
    }

    #[test]
    fn top_k_is_the_head_of_a_full_sort() {
        let d = dims();
        let mut rng = SplitMix64::new(2);
        // Few distinct values, so that ties straddle the threshold.
        let scores: Vec<f32> = (0..d.lists() * d.blocks()).map(|_| rng.below(6) as f32 - 3.0).collect();
        let lists = top_k(&d, &scores, &[0, 17, 40]).unwrap();
        lists.validate().unwrap();
        for list in 0..d.lists() {
            let scores = &scores[list * d.blocks()..][..d.blocks()];
            let mut order: Vec<usize> = (0..d.blocks()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
            let mut wanted: Vec<i32> =
                order[..[0, 17, 40][list / d.groups() % 3]].iter().map(|&n| n as i32).collect();
            wanted.sort_unstable();
            assert_eq!(lists.view().blocks_of(list), wanted);
        }
    }

    #[test]
    fn adversarial_scores() {
        let d = ListDims {
            batch: 1,
            num_heads: 1,
            seqlen_q: 64,
            seqlen_kv: 640,
            query_group: 64,
            kv_block: 64,
            max_selected: 4,
        };
        let select = |scores: &[f32], k: i32| top_k(&d, scores, &[k]).unwrap().view().blocks_of(0).to_vec();
        assert_eq!(select(&[1.0; 10], 4), [0, 1, 2, 3]);
        assert_eq!(select(&[f32::NEG_INFINITY; 10], 3), [0, 1, 2]);
        let mut giant = [0.0f32; 10];
        giant[9] = 1e30;
        assert_eq!(select(&giant, 1), [9]);
        assert_eq!(select(&giant, 3), [0, 1, 9]);
        let mut signed_zero = [-0.0f32; 10];
        signed_zero[5] = 0.0;
        assert_eq!(select(&signed_zero, 2), [0, 1], "-0 and +0 tie");
        giant[3] = f32::INFINITY;
        assert_eq!(select(&giant, 2), [3, 9]);
        assert!(select(&giant, 0).is_empty());
        // All there are, and one more.
        let narrow = ListDims { seqlen_kv: 130, ..d };
        assert_eq!(top_k(&narrow, &[2.0, 1.0, 3.0], &[3]).unwrap().view().blocks_of(0), [0, 1, 2]);
        let error = top_k(&narrow, &[2.0, 1.0, 3.0], &[4]).unwrap_err();
        assert_eq!(error, SelectError::TopKAboveBlocks { head: 0, top_k: 4, blocks: 3 });
    }

    #[test]
    fn tokens_are_blocks_of_one() {
        // The maximum over a block of token scores is the block's score; lists of tokens come from the same rule.
        let d = dims();
        let tokens = ListDims { kv_block: 1, max_selected: 1100, ..d };
        let mut rng = SplitMix64::new(5);
        let q = rng.normals(2 * 77 * 3 * 16, 1.0);
        let k = rng.normals(2 * 1100 * 3 * 16, 1.0);
        let (q, k) =
            (View::new(&q[..], Layout::bshd(77, 3, 16)), View::new(&k[..], Layout::bhsd(1100, 3, 16)));
        let fine = scores_f64(&tokens, 16, &q, &k, GroupRule::Mean, None).unwrap();
        let coarse = scores_f64(&d, 16, &q, &k, GroupRule::Mean, None).unwrap();
        for (fine, coarse) in fine.chunks(1100).zip(coarse.chunks(138)) {
            let largest: Vec<f64> =
                fine.chunks(8).map(|c| c.iter().copied().fold(f64::NEG_INFINITY, f64::max)).collect();
            assert_eq!(largest, coarse);
        }
        // Everything, nothing, and one more than there are.
        let all = top_k(&tokens, &fine, &[1100, 0, 1]).unwrap();
        assert_eq!(all.view().blocks_of(3), (0..1100).collect::<Vec<i32>>());
        assert!(all.view().blocks_of(5).is_empty());
        assert_eq!(
            top_k(&tokens, &fine, &[1, 1101, 1]).unwrap_err(),
            SelectError::TopKAboveBlocks { head: 1, top_k: 1101, blocks: 1100 }
        );
        let bits = bitmap(&all);
        assert_eq!(bits.len(), tokens.lists() * 35);
        assert_eq!((bits[3 * 35], bits[3 * 35 + 34]), (u32::MAX, (1 << (1100 - 34 * 32)) - 1));
        assert!(bits[5 * 35..6 * 35].iter().all(|&word| word == 0));
        let of_one: u32 = bits[10 * 35..11 * 35].iter().map(|word| word.count_ones()).sum();
        assert_eq!(of_one, 1);
    }

    #[test]
    fn kept_blocks_come_first() {
        let d = ListDims {
            batch: 1,
            num_heads: 1,
            seqlen_q: 40,
            seqlen_kv: 64,
            query_group: 16,
            kv_block: 8,
            max_selected: 8,
        };
        let mut scores: Vec<f64> = (0..3 * 8).map(|n| f64::from(n % 8)).collect();
        scores[8] = f64::NAN; // Block 0 of group 1 is kept: its score is not looked at.
        keep(&d, Keep { first: 9, own: true, mask: &[] }, &mut scores).unwrap();
        let lists = top_k(&d, &scores, &[5]).unwrap();
        assert_eq!(lists.view().blocks_of(0), [0, 1, 5, 6, 7], "text is the group's own cube here");
        assert_eq!(lists.view().blocks_of(1), [0, 1, 2, 3, 7]);
        assert_eq!(lists.view().blocks_of(2), [0, 1, 4, 5, 7], "the last group, of eight queries");
        // Fewer than are kept: ties by the smaller id.
        assert_eq!(top_k(&d, &scores, &[3]).unwrap().view().blocks_of(2), [0, 1, 4]);
        let mut none = scores.clone();
        keep(&d, Keep::default(), &mut none).unwrap();
        assert_eq!(none, scores);
        assert!(matches!(keep(&d, Keep::default(), &mut none[1..]), Err(SelectError::ScoresLength { .. })));

        // A word a group: block 2 of the first, 2 and 4 of the second, none of the third.
        let mask = [1 << 2, 1 << 2 | 1 << 4, 0];
        let mut scores: Vec<f64> = (0..3 * 8).map(|n| f64::from(n % 8)).collect();
        keep(&d, Keep { mask: &mask, ..Keep::default() }, &mut scores).unwrap();
        let lists = top_k(&d, &scores, &[3]).unwrap();
        assert_eq!(lists.view().blocks_of(0), [2, 6, 7]);
        assert_eq!(lists.view().blocks_of(1), [2, 4, 7]);
        assert_eq!(lists.view().blocks_of(2), [5, 6, 7]);
        let short = Keep { mask: &mask[1..], ..Keep::default() };
        assert!(matches!(
            keep(&d, short, &mut scores),
            Err(SelectError::MaskLength { found: 2, expected: 3 })
        ));
    }

    #[test]
    fn a_blocks_mass_is_the_sum_of_its_tokens() {
        let d = dims();
        let tokens = ListDims { kv_block: 1, max_selected: 1100, ..d };
        let mut rng = SplitMix64::new(7);
        let q = rng.normals(2 * 77 * 3 * 16, 1.0);
        let k = rng.normals(2 * 1100 * 3 * 16, 1.0);
        let (q, k) =
            (View::new(&q[..], Layout::bshd(77, 3, 16)), View::new(&k[..], Layout::bhsd(1100, 3, 16)));
        for rule in [GroupRule::Centre, GroupRule::Max4, GroupRule::Mass4] {
            let of =
                |d: &ListDims| block_scores_f64(d, 16, &q, &k, rule, BlockScore::Mass, 0.5, None).unwrap();
            for (fine, coarse) in of(&tokens).chunks(1100).zip(of(&d).chunks(138)) {
                for (fine, coarse) in fine.chunks(8).zip(coarse) {
                    let mass: f64 = fine.iter().map(|s| (0.5 * s).exp()).sum();
                    assert!((mass / (0.5 * coarse).exp() - 1.0).abs() < 1e-12);
                }
                if rule == GroupRule::Mass4 {
                    let total: f64 = fine.iter().map(|s| (0.5 * s).exp()).sum();
                    assert!((total - 4.0).abs() < 1e-12, "four queries give one each: {total}");
                }
            }
        }
        // At a large scale the mass is the largest's.
        let mass = block_scores_f64(&d, 16, &q, &k, GroupRule::Mean, BlockScore::Mass, 1e4, None).unwrap();
        let max = scores_f64(&d, 16, &q, &k, GroupRule::Mean, None).unwrap();
        let worst = mass.iter().zip(&max).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst <= 8f64.ln() / 1e4, "{worst}");
    }

    #[test]
    fn top_p_keeps_the_fewest_that_hold_the_share() {
        let d = ListDims {
            batch: 1,
            num_heads: 2,
            seqlen_q: 128,
            seqlen_kv: 320,
            query_group: 64,
            kv_block: 64,
            max_selected: 3,
        };
        // Masses 1/2, 1/4, 1/8, 1/16, 1/16 in some order; then all equal; the other head wants less.
        let ln = |x: f64| x.ln();
        let halves = [ln(0.0625), ln(0.5), ln(0.0625), ln(0.25), ln(0.125)];
        let mut scores: Vec<f64> = [halves, [3.0; 5], halves, [3.0; 5]].concat();
        let select = |scores: &[f64], shares: [f32; 2]| top_p(&d, scores, &shares, 1.0).unwrap();
        let found = select(&scores, [0.8, 0.5]);
        assert_eq!((found.lists.count.as_slice(), found.capped), (&[3, 3, 1, 3][..], 1));
        assert_eq!(found.lists.view().blocks_of(0), [1, 3, 4]);
        assert_eq!(found.lists.view().blocks_of(1), [0, 1, 2], "four were needed");
        assert_eq!(found.lists.view().blocks_of(2), [1], "a half is half of it");
        let found = select(&scores, [0.0, 1.0]);
        assert_eq!((found.lists.count.as_slice(), found.capped), (&[0, 0, 3, 3][..], 2));
        // Twice the scale: masses 1/4, 1/16, ...: the largest alone holds 0.73.
        assert_eq!(top_p(&d, &scores, &[0.7, 0.7], 2.0).unwrap().lists.count[0], 1);
        // Kept blocks come on top; a block without mass is never needed.
        scores[0] = f64::INFINITY;
        scores[1] = f64::NEG_INFINITY;
        assert_eq!(select(&scores, [0.5, 0.5]).lists.view().blocks_of(0), [0, 3]);
        scores[..5].fill(f64::NEG_INFINITY);
        assert!(select(&scores, [0.5, 0.5]).lists.view().blocks_of(0).is_empty());
        for share in [-0.1, 1.1, f32::NAN] {
            assert!(matches!(
                top_p(&d, &scores, &[0.5, share], 1.0),
                Err(SelectError::Share { head: 1, .. })
            ));
        }
        assert!(matches!(top_p(&d, &scores, &[0.5], 1.0), Err(SelectError::TopKLength { found: 1, .. })));
        assert!(matches!(top_p(&d, &scores[1..], &[0.5; 2], 1.0), Err(SelectError::ScoresLength { .. })));
    }

    #[test]
    fn faults_are_named() {
        let d = dims();
        let mut scores = vec![0.0f64; d.lists() * d.blocks()];
        assert_eq!(
            top_k(&d, &scores, &[1, 41, 1]).unwrap_err(),
            SelectError::TopK { head: 1, top_k: 41, max_selected: 40 }
        );
        assert!(matches!(top_k(&d, &scores, &[1, -1, 1]), Err(SelectError::TopK { top_k: -1, .. })));
        assert!(matches!(top_k(&d, &scores, &[1]), Err(SelectError::TopKLength { found: 1, num_heads: 3 })));
        scores[138 * 7 + 5] = f64::NAN;
        assert_eq!(
            top_k(&d, &scores, &[1; 3]).unwrap_err(),
            SelectError::Nan { batch: 0, head: 1, group: 2, block: 5 }
        );
        assert!(matches!(top_k(&d, &scores[1..], &[1; 3]), Err(SelectError::ScoresLength { .. })));
        // A NaN in k_lr reaches the scores of its block.
        let q = vec![1.0f32; 2 * 77 * 3 * 4];
        let mut k = vec![1.0f32; 2 * 1100 * 3 * 4];
        k[4] = f32::NAN;
        let (q, k) = (View::new(&q[..], Layout::bshd(77, 3, 4)), View::new(&k[..], Layout::bshd(1100, 3, 4)));
        let error = SelectError::Nan { batch: 0, head: 1, group: 0, block: 0 };
        let exact = scores_f64(&d, 4, &q, &k, GroupRule::Centre, None).unwrap();
        assert_eq!(top_k(&d, &exact, &[1; 3]).unwrap_err(), error);
        let single = scores_f32(&d, 4, &q, &k, GroupRule::Centre).unwrap();
        assert_eq!(top_k(&d, &single, &[1; 3]).unwrap_err(), error);
        assert!(matches!(
            scores_f32(&d, 5, &q, &k, GroupRule::Centre),
            Err(SelectError::Input(AttnError::TooShort { name: "q_lr", .. }))
        ));
    }
}
