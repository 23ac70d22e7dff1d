//! Validation loss on fixed (clip, timestep, noise) triples, so that two runs can be compared pair by pair.

use crate::config::Config;
use crate::data::{Clip, Dataset};
use crate::engine::{Engine, EngineError};
use crate::metrics::EvalTriple;
use crate::model::{BlockAttention, Model};
use crate::rng::{self, Purpose};
use crate::train::write_latents_and_text;
use serde::{Deserialize, Serialize};

/// Timesteps of each held-out clip, evenly spread over the training distribution's quantiles.
pub const TIMES_PER_CLIP: usize = 4;
/// Seed of the triples' noise: the same in every run, whatever its seed.
const NOISE_SEED: u64 = 0x4556_414c;

/// All triples, in a fixed order: clip by clip, [`TIMES_PER_CLIP`] each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalResult {
    /// Optimizer steps of the weights.
    pub step: u64,
    /// Share of blocks whose attention was sparse.
    pub sparse_share: f64,
    /// The data the triples come from (the run's fingerprint of `[model]` and `[data]`).
    pub fingerprint: String,
    /// Every triple.
    pub triples: Vec<EvalTriple>,
}

/// Two evaluations of the same triples.
#[derive(Copy, Clone, Debug, PartialEq, Serialize)]
pub struct Paired {
    /// Mean of `a`.
    pub a: f64,
    /// Mean of `b`.
    pub b: f64,
    /// Mean of `a - b`.
    pub difference: f64,
    /// Standard error of the mean difference.
    pub standard_error: f64,
}

/// Why two evaluations cannot be paired.
#[derive(Debug, thiserror::Error)]
#[error(
    "the evaluations cannot be paired: {reason}\n  next: evaluate both checkpoints with the same [model], [data] and data.validation: dsv-train eval --help"
)]
pub struct PairError {
    reason: String,
}

impl EvalResult {
    /// Mean loss.
    pub fn mean(&self) -> f64 {
        self.triples.iter().map(|t| t.loss).sum::<f64>() / self.triples.len().max(1) as f64
    }

    /// Pairs two evaluations of the same triples.
    pub fn paired(&self, other: &EvalResult) -> Result<Paired, PairError> {
        let refuse = |reason: String| Err(PairError { reason });
        let (a, b) = (&self.triples, &other.triples);
        if a.len() != b.len() {
            return refuse(format!("{} triples against {}", a.len(), b.len()));
        }
        if self.fingerprint != other.fingerprint {
            return refuse("they come from runs of another model or data".into());
        }
        if let Some((a, b)) = a.iter().zip(b).find(|(a, b)| (&a.clip, a.t) != (&b.clip, b.t)) {
            return refuse(format!("clip {} at {} stands against clip {} at {}", a.clip, a.t, b.clip, b.t));
        }
        let n = a.len() as f64;
        let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a.loss - b.loss).collect();
        let mean = differences.iter().sum::<f64>() / n;
        let variance = differences.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        Ok(Paired {
            a: self.mean(),
            b: other.mean(),
            difference: mean,
            standard_error: (variance / n).sqrt(),
        })
    }
}

/// Time of triple `index` of a clip: a quantile of the training distribution.
fn time_of(config: &Config, index: usize) -> f64 {
    // Normal quantiles of (i + 1/2) / 4.
    const Z: [f64; TIMES_PER_CLIP] = [-1.150_349_380, -0.318_639_364, 0.318_639_364, 1.150_349_380];
    let flow = &config.flow;
    rng::flow_time(Z[index], flow.logit_mean, flow.logit_std, flow.shift)
}

/// Losses of the model's present compute weights on all triples.
pub fn evaluate(
    engine: &mut dyn Engine,
    model: &Model,
    config: &Config,
    data: &Dataset,
    attention: &[BlockAttention],
    step: u64,
) -> Result<EvalResult, crate::run::RunError> {
    let batch = model.shape.patch.batch;
    let total = data.validation_len() * TIMES_PER_CLIP;
    let mut triples = Vec::with_capacity(total);
    let numbers: Vec<usize> = (0..total).collect();
    for chunk in numbers.chunks(batch) {
        // A short last batch is filled with its last triple, whose extra losses are dropped.
        let filled: Vec<usize> = (0..batch).map(|i| chunk[i.min(chunk.len() - 1)]).collect();
        let (clips, times) = write_triples(engine, model, config, data, &filled)?;
        model.prepare(engine);
        model.infer(engine, attention);
        model.loss(engine, None);
        let read = engine.read_f32(model.io.loss)?;
        triples.extend((0..chunk.len()).map(|i| EvalTriple {
            clip: clips[i].id.clone(),
            t: f64::from(times[i]),
            loss: f64::from(read[i]),
        }));
    }
    let sparse = attention.iter().filter(|a| **a != BlockAttention::Dense).count();
    Ok(EvalResult {
        step,
        sparse_share: sparse as f64 / attention.len().max(1) as f64,
        fingerprint: config.fingerprint(),
        triples,
    })
}

/// Writes the inputs of these triples, one for each clip of the batch; gives clips and times.
pub(crate) fn write_triples(
    engine: &mut dyn Engine,
    model: &Model,
    config: &Config,
    data: &Dataset,
    triples: &[usize],
) -> Result<(Vec<Clip>, Vec<f32>), crate::run::RunError> {
    let clips =
        triples.iter().map(|t| data.validation_clip(t / TIMES_PER_CLIP)).collect::<Result<Vec<_>, _>>()?;
    let times: Vec<f32> = triples.iter().map(|t| time_of(config, t % TIMES_PER_CLIP) as f32).collect();
    let keys: Vec<i32> = triples
        .iter()
        .flat_map(|&t| rng::key(NOISE_SEED, Purpose::EvalNoise, t as u64).map(|k| k as i32))
        .collect();
    engine.write_f32(model.io.t, &times)?;
    engine.write_i32(model.io.keys, &keys)?;
    engine.write_i32(model.io.drop, &vec![0; triples.len()])?;
    write_latents_and_text(engine, model, &clips)?;
    Ok((clips, times))
}

/// Runs `f` with the averaged weights in the compute copy, where the model keeps them.
pub fn with_averaged<R>(
    engine: &mut dyn Engine,
    model: &Model,
    f: impl FnOnce(&mut dyn Engine) -> R,
) -> Result<R, EngineError> {
    if model.params.ema.is_none() {
        return Ok(f(engine));
    }
    model.params.copy_averages(engine);
    let result = f(engine);
    engine.copy(model.params.master, model.params.copy);
    engine.sync()?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(losses: &[f64]) -> EvalResult {
        let triple = |(i, &loss): (usize, &f64)| EvalTriple { clip: i.to_string(), t: 0.5, loss };
        let triples = losses.iter().enumerate().map(triple).collect();
        EvalResult { step: 1, sparse_share: 0.0, fingerprint: "x".into(), triples }
    }

    #[test]
    fn pairs_compare_triple_by_triple() {
        let p = result(&[1.0, 2.0, 3.0]).paired(&result(&[0.5, 1.5, 2.5])).unwrap();
        assert_eq!((p.difference, p.standard_error, p.a, p.b), (0.5, 0.0, 2.0, 1.5));
        let p = result(&[1.0, 3.0]).paired(&result(&[1.0, 1.0])).unwrap();
        assert!((p.difference - 1.0).abs() < 1e-12 && (p.standard_error - 1.0).abs() < 1e-12);
    }

    #[test]
    fn other_triples_are_refused() {
        assert!(result(&[1.0]).paired(&result(&[1.0, 2.0])).unwrap_err().to_string().contains("1 triples"));
        let other = EvalResult { fingerprint: "y".into(), ..result(&[1.0]) };
        assert!(result(&[1.0]).paired(&other).is_err());
        let mut other = result(&[1.0]);
        other.triples[0].clip = "another".into();
        assert!(result(&[1.0]).paired(&other).unwrap_err().to_string().contains("another"));
    }
}
