//! What the profiler measures on sampled queries: how concentrated attention is, and how well lists cover it.
//!
//! The *critical KV* of a query at theta is the smallest set of keys that holds theta of its softmax mass; the
//! sparsity of a head is the mean over queries of the share of keys that is not critical (as the DSV paper,
//! arXiv 2502.07590, measures it). Everything is exact (a full sort a row) and in f64.

use crate::attention::{AttnError, AttnShape, KvLists, View, dot_f64, keys_of_row};
use crate::element::Element;
use dsv_spec::order::Grid;
use rayon::prelude::*;

/// Why a profile is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ProfileError {
    /// A size, tensor or list does not fit.
    #[error(transparent)]
    Input(#[from] AttnError),
    /// The share of the mass makes no sense.
    #[error("theta is {theta}\n  allowed: above 0, at most 1\n  next: use 0.9, as the paper does")]
    Theta {
        /// The value found.
        theta: f64,
    },
    /// A sampled query does not exist.
    #[error("query {row} is to be profiled\n  allowed: 0..{seqlen_q}\n  next: sample below seqlen_q")]
    Row {
        /// The query.
        row: usize,
        /// Queries of a sequence.
        seqlen_q: usize,
    },
}

/// One query of one head.
#[derive(Clone, Debug, PartialEq)]
pub struct RowProfile {
    /// Sequence.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Query.
    pub row: usize,
    /// Critical keys over all keys, in (0, 1].
    pub critical_share: f64,
    /// Softmax mass on the listed keys; None without lists.
    pub covered_mass: Option<f64>,
    /// Share of the critical keys that are listed; None without lists. Of keys that tie for the last critical places any
    /// could be critical: the listed ones count in proportion.
    pub recall: Option<f64>,
}

/// Means over the profiled queries of one head, all sequences together.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadProfile {
    /// 1 - mean critical share.
    pub sparsity: f64,
    /// Share of queries for which a tenth of the keys hold theta of the mass (the paper's power law).
    pub power_law_share: f64,
    /// Mean covered mass; None without lists.
    pub covered_mass: Option<f64>,
    /// Mean recall; None without lists.
    pub recall: Option<f64>,
}

/// Profiles queries `rows` of every sequence and head, in the order (batch, head, row). q is [B, Sq, H, D], k is
/// [B, Skv, Hkv, D]; `lists` are those attention would use.
pub fn profile_rows<T: Element>(
    shape: &AttnShape,
    q: &View<'_, T>,
    k: &View<'_, T>,
    rows: &[usize],
    theta: f64,
    lists: Option<&KvLists<'_>>,
) -> Result<Vec<RowProfile>, ProfileError> {
    check(shape, q, k, theta)?;
    if let Some(&row) = rows.iter().find(|&&row| row >= shape.seqlen_q) {
        return Err(ProfileError::Row { row, seqlen_q: shape.seqlen_q });
    }
    if let Some(lists) = lists {
        lists
            .validate(shape.batch, shape.num_heads, shape.seqlen_q, shape.seqlen_kv)
            .map_err(AttnError::from)?;
    }
    Ok((0..shape.batch * shape.num_heads * rows.len())
        .into_par_iter()
        .map(|at| {
            let (batch, head, row) =
                (at / rows.len() / shape.num_heads, at / rows.len() % shape.num_heads, rows[at % rows.len()]);
            let weights = softmax_row(shape, q, k, batch, head, row);
            let critical = critical_keys(&weights, theta);
            let listed = lists.map(|lists| keys_of_row(shape, Some(lists), batch, head, row));
            RowProfile {
                batch,
                head,
                row,
                critical_share: critical.len() as f64 / weights.len() as f64,
                covered_mass: listed.as_ref().map(|listed| listed.iter().map(|&j| weights[j]).sum()),
                recall: listed.as_ref().map(|listed| recall(&weights, &critical, listed)),
            }
        })
        .collect())
}

fn check<T>(shape: &AttnShape, q: &View<'_, T>, k: &View<'_, T>, theta: f64) -> Result<(), ProfileError> {
    shape.validate()?;
    q.check("q", shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim)?;
    k.check("k", shape.batch, shape.seqlen_kv, shape.num_kv_heads, shape.head_dim)?;
    if !(theta > 0.0 && theta <= 1.0) {
        return Err(ProfileError::Theta { theta });
    }
    Ok(())
}

/// Means per head, `[H]`. Panics where a head has no row.
pub fn summarise(rows: &[RowProfile], num_heads: usize) -> Vec<HeadProfile> {
    (0..num_heads)
        .map(|head| {
            let rows: Vec<&RowProfile> = rows.iter().filter(|row| row.head == head).collect();
            assert!(!rows.is_empty(), "head {head} has no profiled row");
            let mean = |value: &dyn Fn(&RowProfile) -> Option<f64>| -> Option<f64> {
                let values: Option<Vec<f64>> = rows.iter().map(|row| value(row)).collect();
                values.map(|values| values.iter().sum::<f64>() / values.len() as f64)
            };
            let within_a_tenth = rows.iter().filter(|row| row.critical_share <= 0.1).count();
            HeadProfile {
                sparsity: 1.0 - rows.iter().map(|row| row.critical_share).sum::<f64>() / rows.len() as f64,
                power_law_share: within_a_tenth as f64 / rows.len() as f64,
                covered_mass: mean(&|row| row.covered_mass),
                recall: mean(&|row| row.recall),
            }
        })
        .collect()
}

/// The softmax weights of one query over all keys.
pub fn softmax_row<T: Element>(
    shape: &AttnShape,
    q: &View<'_, T>,
    k: &View<'_, T>,
    batch: usize,
    head: usize,
    row: usize,
) -> Vec<f64> {
    let query = q.row(batch, row, head, shape.head_dim);
    let mut weights: Vec<f64> = (0..shape.seqlen_kv)
        .map(|j| shape.scale * dot_f64(query, k.row(batch, j, shape.kv_head(head), shape.head_dim)))
        .collect();
    let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    weights.iter_mut().for_each(|s| *s = (*s - max).exp());
    let sum: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|p| *p /= sum);
    weights
}

/// Places of `weights` by falling weight, ties by the smaller place: the order in which keys, or units of them, are chosen.
pub fn ranked(weights: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_unstable_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    order
}

/// The smallest set of keys that holds `theta` of the mass of `weights` (which sum to 1), ascending; ties go to
/// the smaller index.
pub fn critical_keys(weights: &[f64], theta: f64) -> Vec<usize> {
    let mut order = ranked(weights);
    let mut mass = 0.0;
    let enough = order.iter().position(|&j| {
        mass += weights[j];
        mass >= theta
    });
    order.truncate(enough.map_or(order.len(), |last| last + 1));
    order.sort_unstable();
    order
}

/// [`RowProfile::recall`] of a row's critical keys and listed ones.
fn recall(weights: &[f64], critical: &[usize], listed: &[usize]) -> f64 {
    let last = critical.iter().map(|&j| weights[j]).fold(f64::INFINITY, f64::min);
    let tying = |keys: &[usize]| keys.iter().filter(|&&j| weights[j] == last).count() as f64;
    let larger = listed.iter().filter(|&&j| weights[j] > last).count() as f64;
    let ties = weights.iter().filter(|&&weight| weight == last).count() as f64;
    (larger + tying(listed) * tying(critical) / ties) / critical.len() as f64
}

/// The mass on the ceil(share * n) largest of n weights.
pub fn top_mass(weights: &[f64], share: f64) -> f64 {
    let kept = (share * weights.len() as f64).ceil() as usize;
    ranked(weights).iter().take(kept).map(|&j| weights[j]).sum()
}

/// The profiler's running value: S_i = 0.9 S_{i-1} + 0.1 observed; the first observation stands for itself.
pub fn smooth(previous: Option<f64>, observed: f64) -> f64 {
    previous.map_or(observed, |previous| 0.9 * previous + 0.1 * observed)
}

/// How far critical keys lie from their query (the paper: they lie anywhere, not in windows): counts of keys at Euclidean distance on
/// the token grid up to `edges[0]`, up to `edges[1]`, ..., and beyond the last; `edges` ascend. `order[i]` is
/// the raster index of token i of the sequence ([`dsv_spec::order::token_order`]).
pub fn distance_histogram(
    critical: &[usize],
    query: usize,
    grid: Grid,
    order: &[u32],
    edges: &[f64],
) -> Vec<u64> {
    let position = |token: usize| -> [f64; 3] {
        let (t, h, w) = grid.coordinates(order[token]);
        [f64::from(t), f64::from(h), f64::from(w)]
    };
    let from = position(query);
    let mut counts = vec![0; edges.len() + 1];
    for &key in critical {
        let squared: f64 = position(key).iter().zip(from).map(|(a, b)| (a - b).powi(2)).sum();
        counts[edges.partition_point(|edge| *edge < squared.sqrt())] += 1;
    }
    counts
}

/// How much the queries of one group agree (the paper: neighbours share 80 %): the mean over ordered pairs of queries of
/// the share of the first one's critical keys that are critical for the second too. Sets ascending, none empty.
/// None for fewer than two queries.
pub fn group_overlap(critical: &[Vec<usize>]) -> Option<f64> {
    let mut sum = 0.0;
    let mut pairs = 0usize;
    for (i, a) in critical.iter().enumerate() {
        for (_, b) in critical.iter().enumerate().filter(|(j, _)| *j != i) {
            sum += shared(a, b) as f64 / a.len() as f64;
            pairs += 1;
        }
    }
    (pairs > 0).then(|| sum / pairs as f64)
}

/// Members common to two ascending lists.
fn shared(a: &[usize], b: &[usize]) -> usize {
    let (mut i, mut j, mut count) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                count += 1;
                i += 1;
                j += 1;
            }
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lists::{KvListsBuf, ListDims};
    use crate::rng::SplitMix64;

    #[test]
    fn critical_sets_are_smallest() {
        assert_eq!(critical_keys(&[0.1, 0.5, 0.05, 0.35], 0.8), [1, 3]);
        assert_eq!(critical_keys(&[0.1, 0.5, 0.05, 0.35], 0.5), [1]);
        assert_eq!(critical_keys(&[0.25; 4], 0.6), [0, 1, 2]);
        assert_eq!(critical_keys(&[0.3, 0.3, 0.4], 1.0).len(), 3);
        assert_eq!(critical_keys(&[1.0], 0.9), [0]);
        let mut rng = SplitMix64::new(1);
        let mut weights: Vec<f64> = (0..200).map(|_| rng.normal().exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
        let critical = critical_keys(&weights, 0.9);
        let mass: f64 = critical.iter().map(|&j| weights[j]).sum();
        let least = critical.iter().map(|&j| weights[j]).fold(1.0, f64::min);
        assert!(mass >= 0.9 && mass - least < 0.9);
        let share = critical.len() as f64 / 200.0;
        assert!((top_mass(&weights, share) - mass).abs() < 1e-12);
        assert!((top_mass(&weights, 1.0) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn profiles_count_mass_and_recall() {
        // Keys 3 and 17 answer every query with logit 6 each; the others have logit 0.
        let shape = AttnShape::new(2, 40, 4, 2).with_kv_heads(2).with_scale(1.0);
        let q: Vec<f32> = [1.0, 0.0].repeat(2 * 40 * 4);
        let mut k = vec![0.0f32; shape.kv_len()];
        for (b, j, h) in [(0, 3, 0), (0, 17, 0), (1, 3, 0), (1, 17, 0), (0, 3, 1), (1, 3, 1)] {
            k[shape.kv_layout().offset(b, j, h)] = 6.0;
        }
        let (q, k) = (View::new(&q[..], shape.q_layout()), View::new(&k[..], shape.kv_layout()));
        let dims = ListDims {
            batch: 2,
            num_heads: 4,
            seqlen_q: 40,
            seqlen_kv: 40,
            query_group: 8,
            kv_block: 8,
            max_selected: 2,
        };
        // Block 0 holds key 3, block 2 holds key 17.
        let lists = KvListsBuf::from_fn(dims, |_, _, g| if g == 0 { vec![] } else { vec![0, 4] });
        let rows = profile_rows(&shape, &q, &k, &[1, 39], 0.9, Some(&lists.view())).unwrap();
        assert_eq!(rows.len(), 2 * 4 * 2);
        let giant = 6f64.exp();
        let total = 2.0 * giant + 38.0;
        for row in rows.iter().filter(|row| row.head < 2) {
            assert_eq!(row.critical_share, 2.0 / 40.0);
            let (mass, recall) = if row.row == 1 { (0.0, 0.0) } else { ((giant + 15.0) / total, 0.5) };
            assert!((row.covered_mass.unwrap() - mass).abs() < 1e-12);
            assert_eq!(row.recall, Some(recall));
        }
        let heads = summarise(&rows, 4);
        assert!((heads[0].sparsity - 0.95).abs() < 1e-12);
        assert_eq!(heads[0].power_law_share, 1.0);
        assert_eq!(heads[0].recall, Some(0.25));
        assert_eq!(heads[3].recall, Some(0.5), "heads 2 and 3 read KV head 1, where key 3 alone is critical");
        let without = profile_rows(&shape, &q, &k, &[5], 0.9, None).unwrap();
        assert_eq!(summarise(&without, 4)[1].covered_mass, None);
        // Four of eight equal keys are critical, any of them: of two listed ones, one is.
        assert_eq!(recall(&[0.125; 8], &[0, 1, 2, 3], &[6, 7]), 0.25);
        assert_eq!(recall(&[0.1, 0.5, 0.1, 0.1, 0.1, 0.1], &[0, 1, 2], &[1, 5]), (1.0 + 2.0 / 5.0) / 3.0);
        // Dense lists cover all of it.
        let dense = KvListsBuf::dense(dims);
        let rows = profile_rows(&shape, &q, &k, &[7], 0.9, Some(&dense.view())).unwrap();
        assert!(rows.iter().all(|r| (r.covered_mass.unwrap() - 1.0).abs() < 1e-12 && r.recall == Some(1.0)));
    }

    #[test]
    fn faults_are_named() {
        let shape = AttnShape::new(1, 4, 1, 2);
        let data = [0.0f32; 8];
        let view = View::new(&data[..], shape.q_layout());
        assert_eq!(
            profile_rows(&shape, &view, &view, &[4], 0.9, None).unwrap_err(),
            ProfileError::Row { row: 4, seqlen_q: 4 }
        );
        for theta in [0.0, 1.1, f64::NAN] {
            let error = profile_rows(&shape, &view, &view, &[0], theta, None).unwrap_err();
            assert!(matches!(error, ProfileError::Theta { .. }));
        }
        let longer = shape.with_seqlen_kv(5);
        assert!(matches!(
            profile_rows(&longer, &view, &view, &[0], 0.9, None),
            Err(ProfileError::Input(AttnError::TooShort { name: "k", .. }))
        ));
    }

    #[test]
    fn observations() {
        assert_eq!(smooth(None, 0.4), 0.4);
        assert!((smooth(Some(0.8), 0.4) - 0.76).abs() < 1e-12);
        let grid = Grid { t: 10, h: 10, w: 10 };
        let mut order: Vec<u32> = (0..1000).collect();
        // Distances 0, 5 (3-4-5), 9 and sqrt(243).
        assert_eq!(distance_histogram(&[0, 340, 9, 999], 0, grid, &order, &[5.0, 10.0]), [2, 1, 1]);
        order.swap(9, 1);
        assert_eq!(distance_histogram(&[0, 340, 9, 999], 0, grid, &order, &[5.0, 10.0]), [3, 0, 1]);
        assert_eq!(group_overlap(&[vec![1, 2, 3, 4], vec![3, 4]]), Some(0.75));
        assert_eq!(group_overlap(&[vec![1], vec![1], vec![1]]), Some(1.0));
        assert_eq!(group_overlap(&[vec![1], vec![2]]), Some(0.0));
        assert_eq!(group_overlap(&[vec![1]]), None);
    }
}
