//! What the attention of a trained model looks like on a held-out clip: the paper's observations that the profile of
//! a step does not show (concentration by query, distance of critical keys, agreement of neighbours). Done once, at
//! the end of a run, on the host, from the queries and keys of every block.

use crate::config::Config;
use crate::data::Dataset;
use crate::engine::{Engine, EngineError};
use crate::eval;
use crate::model::{BlockAttention, Model};
use crate::predictor::PredictorTask;
use crate::run::RunError;
use dsv_reference::attention::{AttnShape, Layout, View};
use dsv_reference::profile::{critical_keys, distance_histogram, group_overlap, softmax_row};
use dsv_spec::order::Grid;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Neighbouring queries that are compared: a 2x2x2 cube of the token order.
const CUBE: usize = 8;
/// Cubes looked at in every head.
const CUBES: usize = 4;
/// Distances on the token grid, in tokens, that separate near, middle and far.
const EDGES: [f64; 2] = [5.0, 10.0];

/// One block, mean over its heads and the sampled queries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    let mut found: Vec<Result<BlockObservation, EngineError>> = Vec::new();
    model.forward_watched(engine, attention, PredictorTask::default(), &mut |engine, [q, k]| {
        let read = engine.read_f32(q).and_then(|q| Ok((q, engine.read_f32(k)?)));
        found.push(read.map(|(q, k)| block(model, config.dsv.theta, &q, &k)));
    });
    Ok(found.into_iter().collect::<Result<_, _>>()?)
}

/// `q` and `k` are `[B, S, H, D]`; the first sequence counts.
fn block(model: &Model, theta: f64, q: &[f32], k: &[f32]) -> BlockObservation {
    let own = model.shape.self_attn();
    let shape = AttnShape::new(own.batch, own.seqlen_kv, own.heads, own.head_dim);
    let layout = Layout::bshd(shape.seqlen_kv, shape.num_heads, shape.head_dim);
    let (q, k) = (View::new(q, layout), View::new(k, layout));
    let [t, h, w] = model.shape.patch.grid().map(|n| n as u32);
    let grid = Grid { t, h, w };
    let (order, _) = model.shape.token_order();
    let tokens = shape.seqlen_kv;
    let cube = CUBE.min(tokens);
    let starts: Vec<usize> =
        (0..CUBES).map(|i| ((2 * i + 1) * tokens / (2 * CUBES) / cube * cube).min(tokens - cube)).collect();
    // (critical keys, queries in the tenth, [near, middle, far], agreement) of each cube of each head.
    let parts: Vec<(usize, usize, [u64; 3], f64)> = (0..shape.num_heads * starts.len())
        .into_par_iter()
        .map(|at| {
            let (head, start) = (at / starts.len(), starts[at % starts.len()]);
            let critical: Vec<Vec<usize>> = (start..start + cube)
                .map(|row| critical_keys(&softmax_row(&shape, &q, &k, 0, head, row), theta))
                .collect();
            let mut distances = [0; 3];
            for (row, keys) in (start..).zip(&critical) {
                let counts = distance_histogram(keys, row, grid, &order, &EDGES);
                distances.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
            }
            let concentrated = critical.iter().filter(|keys| 10 * keys.len() <= tokens).count();
            let keys = critical.iter().map(Vec::len).sum();
            (keys, concentrated, distances, group_overlap(&critical).unwrap_or(1.0))
        })
        .collect();
    let queries = (parts.len() * cube) as f64;
    let critical = parts.iter().map(|p| p.0).sum::<usize>() as f64;
    let distance = |i: usize| parts.iter().map(|p| p.2[i]).sum::<u64>() as f64 / critical;
    BlockObservation {
        sparsity: 1.0 - critical / (queries * tokens as f64),
        power_law: parts.iter().map(|p| p.1).sum::<usize>() as f64 / queries,
        near: distance(0),
        far: distance(2),
        agreement: parts.iter().map(|p| p.3).sum::<f64>() / parts.len() as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{ArenaPlan, Precision};
    use crate::model::{ModelShape, Purposes};

    fn tiny() -> Model {
        let config = Config::preset("tiny").unwrap();
        let purposes =
            Purposes { train: false, recompute: true, ema: false, list_slots: 0, inverse_lists: false };
        Model::reserve(ModelShape::from_config(&config, 1), purposes, &mut ArenaPlan::new(Precision::F32))
    }

    #[test]
    fn equal_scores_need_theta_of_all_keys_and_every_query_the_same() {
        let model = tiny();
        let zeros = vec![0.0; 1024 * 2 * 32];
        let o = block(&model, 0.9, &zeros, &zeros);
        assert!((o.sparsity - (1.0 - 922.0 / 1024.0)).abs() < 1e-12, "{o:?}");
        assert_eq!((o.power_law, o.agreement), (0.0, 1.0));
        assert!(o.near > 0.0 && o.far > 0.0 && o.near + o.far < 1.0, "{o:?}");
    }

    #[test]
    fn queries_that_see_every_thirty_second_token_share_nothing_with_their_neighbours() {
        let model = tiny();
        let mut x = vec![0.0; 1024 * 2 * 32];
        for row in 0..1024 * 2 {
            // Token row / 2, either head: one large channel, another for each of 32 tokens in a row.
            x[row * 32 + row / 2 % 32] = 40.0;
        }
        let o = block(&model, 0.9, &x, &x);
        // 29 of the 32 tokens of the same channel hold 90 %.
        assert!((o.sparsity - (1.0 - 29.0 / 1024.0)).abs() < 1e-12, "{o:?}");
        assert_eq!((o.power_law, o.agreement), (1.0, 0.0));
    }
}
