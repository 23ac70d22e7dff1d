//! What the attention of a trained model looks like on a held-out clip: the paper's observations that the profile of
//! a step does not show (concentration by query, distance of critical keys, agreement of neighbours), and where the mass
//! that lists do not cover is lost. Done once, at the end of a run, on the host, from the queries and keys of every block.

use crate::config::Config;
use crate::data::Dataset;
use crate::engine::{Engine, EngineError, ListShape};
use crate::eval;
use crate::model::{BlockAttention, Model};
use crate::predictor::PredictorTask;
use crate::run::RunError;
use dsv_reference::attention::{AttnShape, Layout, View};
use dsv_reference::profile::{critical_keys, distance_histogram, group_overlap, ranked, softmax_row};
use dsv_spec::order::Grid;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Queries compared in a cube: all of a 2x2x2 cube of the token order, every so many of a larger one.
const CUBE: usize = 8;
/// Tokens of the cubes whose queries are compared.
pub const CUBES: [usize; 3] = [CUBE, 64, 512];
/// Cubes, or groups, looked at in every head.
const PLACES: usize = 4;
/// Distances on the token grid, in tokens, between the classes of [`BlockObservation::distances`].
pub const EDGES: [f64; 4] = [2.0, 5.0, 10.0, 20.0];
/// Shares of the keys of which [`BlockObservation::mass`] says what they hold.
pub const SHARES: [f64; 7] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5];

/// One block, mean over its heads and the sampled queries.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BlockObservation {
    /// Share of KV that is not critical.
    pub sparsity: f64,
    /// Share of queries for which a tenth of the keys hold theta of the mass.
    pub power_law: f64,
    /// Share of critical keys within 5 tokens of their query.
    pub near: f64,
    /// Share of critical keys more than 10 tokens away.
    pub far: f64,
    /// Share of a query's critical keys that are critical for another query of its 2x2x2 cube.
    pub agreement: f64,
    /// Mass that a query's best keys hold, for each of [`SHARES`].
    #[serde(default)]
    pub mass: Vec<f64>,
    /// Share of critical keys up to each of [`EDGES`], and beyond the last.
    #[serde(default)]
    pub distances: Vec<f64>,
    /// The agreement in cubes of [`CUBES`] tokens, as far as the clip has them.
    #[serde(default)]
    pub cubes: Vec<f64>,
    /// Where the mass that lists do not cover is lost; `None` without lists.
    #[serde(default)]
    pub ladder: Option<Ladder>,
}

/// Mass covered by as many keys as the lists hold, chosen in ever coarser ways: each step down is what one simplification
/// costs.
#[derive(Copy, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ladder {
    /// Share of the KV blocks that the lists hold.
    pub kept: f64,
    /// By single keys, chosen for each query: the most there is.
    pub keys: f64,
    /// By whole blocks, chosen for each query.
    pub blocks: f64,
    /// By whole blocks, chosen for a group from the mass of its own queries: the most a predictor could cover.
    pub group: f64,
    /// By the lists themselves.
    pub lists: f64,
    /// Share of the group's best blocks that the lists hold.
    pub recall: f64,
}

/// Lists of one block on the host.
struct HostLists {
    shape: ListShape,
    index: Vec<i32>,
    count: Vec<i32>,
}

/// Every block, on the first held-out clip; empty where none is held out.
pub fn observe(
    engine: &mut dyn Engine,
    model: &Model,
    config: &Config,
    data: &Dataset,
    attention: &[BlockAttention],
) -> Result<Vec<BlockObservation>, RunError> {
    if data.validation_len() == 0 {
        return Ok(Vec::new());
    }
    let batch = model.shape.patch.batch;
    // The second of the clip's timesteps: half-way between noise and data.
    eval::write_triples(engine, model, config, data, &vec![1; batch])?;
    model.prepare(engine);
    // Profiling writes the lists that a dense block would have had.
    let task = PredictorTask { train: false, profile: model.predictors.is_some() };
    let mut found: Vec<Result<BlockObservation, EngineError>> = Vec::new();
    model.infer_watched(engine, attention, task, &mut |engine, [q, k]| {
        let lists = match (attention[found.len()], &model.predictors) {
            (BlockAttention::Dense, None) => None,
            (BlockAttention::Dense, Some(predictors)) => Some(predictors.scratch_slot()),
            (mode, _) => model.lists_of(found.len(), mode),
        };
        let mut read = || {
            let (q, k) = (engine.read_f32(q)?, engine.read_f32(k)?);
            let lists = match lists {
                Some(l) => Some(HostLists {
                    shape: l.shape,
                    index: engine.read_i32(l.q2k_index)?,
                    count: engine.read_i32(l.q2k_count)?,
                }),
                None => None,
            };
            Ok(block(model, config.dsv.theta, &q, &k, lists.as_ref()))
        };
        found.push(read());
    });
    Ok(found.into_iter().collect::<Result<_, _>>()?)
}

/// First token of each place where `size` neighbours are looked at.
fn places(tokens: usize, size: usize) -> Vec<usize> {
    (0..PLACES).map(|i| ((2 * i + 1) * tokens / (2 * PLACES) / size * size).min(tokens - size)).collect()
}

/// What one place of one head shows.
struct Place {
    /// Critical keys of all its queries.
    critical: usize,
    /// Queries for which a tenth of the keys are enough.
    concentrated: usize,
    /// Critical keys by distance.
    distances: Vec<u64>,
    /// Mass of the best keys, by share.
    mass: Vec<f64>,
    /// Agreement by size of cube.
    cubes: Vec<f64>,
    ladder: Option<Ladder>,
}

/// `q` and `k` are `[B, S, H, D]`; the first sequence counts.
fn block(model: &Model, theta: f64, q: &[f32], k: &[f32], lists: Option<&HostLists>) -> BlockObservation {
    let own = model.shape.self_attn();
    let shape = AttnShape::new(own.batch, own.seqlen_kv, own.heads, own.head_dim);
    let layout = Layout::bshd(shape.seqlen_kv, shape.num_heads, shape.head_dim);
    let (q, k) = (View::new(q, layout), View::new(k, layout));
    let [t, h, w] = model.shape.patch.grid().map(|n| n as u32);
    let grid = Grid { t, h, w };
    let (order, _) = model.shape.token_order();
    let tokens = shape.seqlen_kv;
    let row = |head: usize, row: usize| softmax_row(&shape, &q, &k, 0, head, row);
    let small = CUBE.min(tokens);
    let larger: Vec<usize> = CUBES[1..].iter().copied().filter(|&size| 2 * size <= tokens).collect();
    let parts: Vec<Place> = (0..shape.num_heads * PLACES)
        .into_par_iter()
        .map(|at| {
            let (head, place) = (at / PLACES, at % PLACES);
            let start = places(tokens, small)[place];
            let rows: Vec<Vec<f64>> = (start..start + small).map(|r| row(head, r)).collect();
            let critical: Vec<Vec<usize>> = rows.iter().map(|r| critical_keys(r, theta)).collect();
            let mut distances = vec![0; EDGES.len() + 1];
            for (row, keys) in (start..).zip(&critical) {
                let counts = distance_histogram(keys, row, grid, &order, &EDGES);
                distances.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
            }
            let curves: Vec<Vec<f64>> = rows.into_iter().map(|r| best(r, &SHARES)).collect();
            let mut cubes = vec![group_overlap(&critical).unwrap_or(1.0)];
            for &size in &larger {
                let start = places(tokens, size)[place];
                let sample = (0..CUBE).map(|i| start + i * size / CUBE);
                let critical: Vec<_> = sample.map(|r| critical_keys(&row(head, r), theta)).collect();
                cubes.push(group_overlap(&critical).unwrap_or(1.0));
            }
            Place {
                critical: critical.iter().map(Vec::len).sum(),
                concentrated: critical.iter().filter(|keys| 10 * keys.len() <= tokens).count(),
                distances,
                mass: (0..SHARES.len()).map(|i| mean(curves.iter().map(|c| c[i]))).collect(),
                cubes,
                ladder: lists.and_then(|lists| ladder(lists, head, place, |r| row(head, r))),
            }
        })
        .collect();
    let queries = (parts.len() * small) as f64;
    let critical = parts.iter().map(|p| p.critical).sum::<usize>() as f64;
    let share = |bins: std::ops::Range<usize>| {
        parts.iter().flat_map(|p| &p.distances[bins.clone()]).sum::<u64>() as f64 / critical
    };
    let ladders: Vec<Ladder> = parts.iter().filter_map(|p| p.ladder).collect();
    let of = |pick: fn(&Ladder) -> f64| mean(ladders.iter().map(pick));
    BlockObservation {
        sparsity: 1.0 - critical / (queries * tokens as f64),
        power_law: parts.iter().map(|p| p.concentrated).sum::<usize>() as f64 / queries,
        near: share(0..2),
        far: share(3..EDGES.len() + 1),
        agreement: mean(parts.iter().map(|p| p.cubes[0])),
        mass: (0..SHARES.len()).map(|i| mean(parts.iter().map(|p| p.mass[i]))).collect(),
        distances: (0..=EDGES.len()).map(|i| share(i..i + 1)).collect(),
        cubes: (0..=larger.len()).map(|i| mean(parts.iter().map(|p| p.cubes[i]))).collect(),
        ladder: (!ladders.is_empty()).then(|| Ladder {
            kept: of(|l| l.kept),
            keys: of(|l| l.keys),
            blocks: of(|l| l.blocks),
            group: of(|l| l.group),
            lists: of(|l| l.lists),
            recall: of(|l| l.recall),
        }),
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), x| (sum + x, n + 1));
    sum / f64::from(n.max(1))
}

/// Sums of the largest `share * len` (rounded up) of the weights, for each share.
fn best(mut weights: Vec<f64>, shares: &[f64]) -> Vec<f64> {
    weights.sort_by(|a, b| b.total_cmp(a));
    let len = weights.len() as f64;
    shares.iter().map(|share| weights[..(share * len - 1e-9).ceil() as usize].iter().sum()).collect()
}

/// The ladder of one group of one head; `None` for a group that lists nothing.
fn ladder(lists: &HostLists, head: usize, place: usize, row: impl Fn(usize) -> Vec<f64>) -> Option<Ladder> {
    let ListShape { seqlen, query_group, kv_block, max_selected, .. } = lists.shape;
    let groups = lists.shape.groups();
    let group = (2 * place + 1) * groups / (2 * PLACES);
    let at = head * groups + group;
    let listed: Vec<usize> = lists.index[at * max_selected..][..lists.count[at].max(0) as usize]
        .iter()
        .map(|&block| block as usize)
        .collect();
    if listed.is_empty() {
        return None;
    }
    let queries = query_group.min(seqlen - group * query_group);
    let sample = CUBE.min(queries);
    let rows: Vec<Vec<f64>> = (0..sample).map(|i| row(group * query_group + i * queries / sample)).collect();
    // Mass of each query in each KV block, and of the group.
    let by_block: Vec<Vec<f64>> =
        rows.iter().map(|r| r.chunks(kv_block).map(|keys| keys.iter().sum()).collect()).collect();
    let blocks = by_block[0].len();
    let of_group: Vec<f64> = (0..blocks).map(|n| mean(by_block.iter().map(|b| b[n]))).collect();
    let k = listed.len();
    let kept = k as f64 / blocks as f64;
    let mut ideal = ranked(&of_group);
    ideal.truncate(k);
    Some(Ladder {
        kept,
        keys: mean(rows.into_iter().map(|r| best(r, &[kept])[0])),
        blocks: mean(by_block.iter().map(|b| ranked(b).iter().take(k).map(|&n| b[n]).sum())),
        group: ideal.iter().map(|&n| of_group[n]).sum(),
        lists: listed.iter().map(|&n| of_group[n]).sum(),
        recall: listed.iter().filter(|n| ideal.contains(n)).count() as f64 / k as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{ArenaPlan, Precision};
    use crate::model::{ModelShape, Purposes};

    fn tiny() -> Model {
        let config = Config::preset("tiny").unwrap();
        let purposes = Purposes::INFERENCE;
        Model::reserve(ModelShape::from_config(&config, 1), purposes, &mut ArenaPlan::new(Precision::F32))
    }

    #[test]
    fn equal_scores_need_theta_of_all_keys_and_every_query_the_same() {
        let model = tiny();
        let zeros = vec![0.0; 1024 * 2 * 32];
        let o = block(&model, 0.9, &zeros, &zeros, None);
        assert!((o.sparsity - (1.0 - 922.0 / 1024.0)).abs() < 1e-12, "{o:?}");
        assert_eq!((o.power_law, o.agreement), (0.0, 1.0));
        assert!(o.near > 0.0 && o.far > 0.0 && o.near + o.far < 1.0, "{o:?}");
        // Even attention: a share of the keys holds that share of the mass.
        for (mass, share) in o.mass.iter().zip(SHARES) {
            assert!((mass - (share * 1024.0).ceil() / 1024.0).abs() < 1e-9, "{o:?}");
        }
        assert!((o.distances.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{o:?}");
        assert_eq!((o.cubes.as_slice(), o.ladder), ([1.0; 3].as_slice(), None));
    }

    #[test]
    fn queries_that_see_every_thirty_second_token_share_nothing_with_their_neighbours() {
        let model = tiny();
        let mut x = vec![0.0; 1024 * 2 * 32];
        for row in 0..1024 * 2 {
            // Token row / 2, either head: one large channel, another for each of 32 tokens in a row.
            x[row * 32 + row / 2 % 32] = 40.0;
        }
        let o = block(&model, 0.9, &x, &x, None);
        // 29 of the 32 tokens of the same channel hold 90 %.
        assert!((o.sparsity - (1.0 - 29.0 / 1024.0)).abs() < 1e-12, "{o:?}");
        assert_eq!((o.power_law, o.agreement), (1.0, 0.0));
    }

    /// 1,024 tokens in blocks of 8, groups of 8 queries. Every query sees the 8 keys of the block `own(query)`, and half as
    /// much mass one key each of 8 blocks.
    fn ladder_of(own: impl Fn(usize) -> usize, listed: Vec<i32>) -> Ladder {
        let shape =
            ListShape { batch: 1, heads: 1, seqlen: 1024, query_group: 8, kv_block: 8, max_selected: 4 };
        let mut index = Vec::new();
        (0..128).for_each(|_| index.extend(listed.iter().copied().chain(std::iter::repeat(127)).take(4)));
        let lists = HostLists { shape, index, count: vec![listed.len() as i32; 128] };
        let row = |query: usize| {
            let mut weights = vec![0.0; 1024];
            weights[8 * own(query)..][..8].fill(2.0 / 24.0);
            (0..8).for_each(|i| weights[8 * (40 + i)] = 1.0 / 24.0);
            weights
        };
        ladder(&lists, 0, 1, row).unwrap()
    }

    #[test]
    fn the_ladder_says_which_step_loses_the_mass() {
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        // All queries of the group want the same block, and the lists have it: nothing is lost by sharing.
        let l = ladder_of(|_| 3, vec![3]);
        assert!(near(l.kept, 1.0 / 128.0) && near(l.keys, 2.0 / 3.0), "{l:?}");
        assert!(near(l.blocks, 2.0 / 3.0) && near(l.group, 2.0 / 3.0) && near(l.lists, 2.0 / 3.0), "{l:?}");
        assert_eq!(l.recall, 1.0);
        // With two blocks, the eight lone keys cost a block each: single keys hold all of the mass, blocks do not.
        let l = ladder_of(|_| 3, vec![3, 9]);
        assert!(near(l.keys, 1.0) && near(l.blocks, 2.0 / 3.0 + 1.0 / 24.0), "{l:?}");
        assert!(near(l.lists, 2.0 / 3.0) && near(l.recall, 0.5), "{l:?}");
        // Every query wants a block of its own: sharing loses what choosing for each did not.
        let l = ladder_of(|query| query % 8, vec![0]);
        assert!(near(l.blocks, 2.0 / 3.0) && near(l.group, 2.0 / 24.0), "{l:?}");
        // A predictor that is wrong loses what sharing did not.
        let l = ladder_of(|_| 3, vec![4]);
        assert!(near(l.group, 2.0 / 3.0) && l.lists == 0.0 && l.recall == 0.0, "{l:?}");
    }
}
