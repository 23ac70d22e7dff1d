//! Sampling: the flow's ODE from noise to latents, Euler or Heun, with classifier-free guidance.

use crate::config::{Config, Solver};
use crate::engine::{Engine, EngineError};
use crate::model::{BlockAttention, Model};
use crate::rng::{self, Purpose};
use std::fmt;
use std::time::Instant;

/// Times from 1 to 0 in `steps` steps, moved by the training shift.
pub fn schedule(steps: usize, shift: f64) -> Vec<f64> {
    (0..=steps)
        .map(|i| {
            let t = 1.0 - i as f64 / steps as f64;
            shift * t / (1.0 + (shift - 1.0) * t)
        })
        .collect()
}

/// Latents `[C,T,H,W]` for each text (`[text_tokens, text_dim]`; as many as the model's batch), with the model's
/// present compute weights. `progress` is called after each solver step.
///
/// # Panics
/// If the number of texts is not the model's batch.
pub fn sample(
    engine: &mut dyn Engine,
    model: &Model,
    config: &Config,
    texts: &[Vec<f32>],
    seed: u64,
    attention: &[BlockAttention],
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<f32>>, EngineError> {
    let (shape, io) = (&model.shape, &model.io);
    let batch = shape.patch.batch;
    assert_eq!(texts.len(), batch, "one text for each element of the batch");
    let x = io.target;
    engine.write_f32(io.text, &texts.concat())?;
    let key = |b: usize| rng::key(seed, Purpose::Sample, b as u64).map(|k| k as i32);
    engine.write_i32(io.keys, &(0..batch).flat_map(key).collect::<Vec<i32>>())?;
    // Noise minus clips of zeros, which belongs to places as training's does.
    engine.fill(io.latents, 0.0);
    engine.write_f32(io.t, &vec![1.0; batch])?;
    model.prepare(engine);
    let guidance = config.sample.guidance as f32;
    let velocity = |engine: &mut dyn Engine, t: f64, slot: usize| -> Result<(), EngineError> {
        let out = io.velocity[slot];
        engine.write_f32(io.t, &vec![t as f32; batch])?;
        engine.copy(x, io.x_t);
        engine.write_i32(io.drop, &vec![0; batch])?;
        model.infer(engine, attention);
        engine.copy(io.pred, out);
        if guidance != 1.0 {
            // v = v_none + guidance (v_text - v_none)
            engine.write_i32(io.drop, &vec![1; batch])?;
            model.infer(engine, attention);
            engine.axpy(guidance - 1.0, out, out);
            engine.axpy(1.0 - guidance, io.pred, out);
        }
        Ok(())
    };
    let times = schedule(config.sample.steps, config.flow.shift);
    for (i, pair) in times.windows(2).enumerate() {
        let dt = (pair[0] - pair[1]) as f32;
        velocity(engine, pair[0], 0)?;
        engine.axpy(-dt, io.velocity[0], x);
        if config.sample.solver == Solver::Heun && pair[1] > 0.0 {
            velocity(engine, pair[1], 1)?;
            engine.axpy(dt / 2.0, io.velocity[0], x);
            engine.axpy(-dt / 2.0, io.velocity[1], x);
        }
        progress(i + 1);
    }
    engine.unpatchify(&shape.patch, io.order, x, io.latents);
    let latents = engine.read_f32(io.latents)?;
    Ok(latents.chunks(shape.patch.latent_len()).map(<[f32]>::to_vec).collect())
}

/// How fast a trained model is evaluated.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Speed {
    /// Clips at a time.
    pub batch: usize,
    /// Milliseconds of one evaluation as the model was trained.
    pub trained_ms: f64,
    /// The same with full attention in every block; `None` where that is how it was trained.
    pub dense_ms: Option<f64>,
    /// Share of blocks that are not dense.
    pub sparse_share: f64,
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "one evaluation of {} clips: {:.2} ms", self.batch, self.trained_ms)?;
        let Some(dense) = self.dense_ms else { return write!(f, ", full attention") };
        let share = 100.0 * self.sparse_share;
        write!(
            f,
            ", {share:.0} % of the blocks sparse; full attention {dense:.2} ms: {:.2} times as long",
            dense / self.trained_ms
        )
    }
}

/// Times evaluations of the model (selection included) on the inputs it was last given, as trained and dense: the
/// median of five each, after one that is not counted.
pub fn speed(
    engine: &mut dyn Engine,
    model: &Model,
    attention: &[BlockAttention],
) -> Result<Speed, EngineError> {
    let mut median = |attention: &[BlockAttention]| -> Result<f64, EngineError> {
        let mut ms = Vec::new();
        for _ in 0..6 {
            engine.sync()?;
            let began = Instant::now();
            model.infer(engine, attention);
            engine.sync()?;
            ms.push(1e3 * began.elapsed().as_secs_f64());
        }
        ms.remove(0);
        ms.sort_by(f64::total_cmp);
        Ok(ms[ms.len() / 2])
    };
    let sparse = attention.iter().filter(|a| **a != BlockAttention::Dense).count();
    let trained_ms = median(attention)?;
    let dense_ms = match sparse {
        0 => None,
        _ => Some(median(&vec![BlockAttention::Dense; attention.len()])?),
    };
    Ok(Speed {
        batch: model.shape.patch.batch,
        trained_ms,
        dense_ms,
        sparse_share: sparse as f64 / attention.len().max(1) as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Dataset;
    use crate::engine::{ArenaPlan, CpuEngine, Precision};
    use crate::model::{ModelShape, Purposes};

    #[test]
    fn the_schedule_runs_from_noise_to_data() {
        assert_eq!(schedule(4, 1.0), [1.0, 0.75, 0.5, 0.25, 0.0]);
        let shifted = schedule(4, 3.0);
        assert_eq!((shifted[0], shifted[4]), (1.0, 0.0));
        assert!((shifted[2] - 0.75).abs() < 1e-12);
    }

    /// With the zero-initialised head the velocity is 0: sampling must return the noise itself, in latent order.
    /// With a constant bias the sample is the noise minus the bias, whatever the solver and the guidance.
    #[test]
    fn a_constant_velocity_is_integrated_exactly() {
        let mut config = Config::preset("tiny").unwrap();
        (config.model.layers, config.data.frames, config.data.height, config.data.width) = (1, 2, 4, 4);
        config.dsv.attention = crate::config::Attention::Full;
        let shape = ModelShape::from_config(&config, 2);
        let mut plan = ArenaPlan::new(Precision::F32);
        let purposes = Purposes::INFERENCE;
        let model = Model::reserve(shape, purposes, &mut plan);
        let mut e = CpuEngine::<f32>::new();
        e.reserve(&plan, &model.shape.dims(0)).unwrap();
        model.initialise(&mut e, 1).unwrap();
        let data = Dataset::open(&config).unwrap();
        let texts: Vec<_> = (0..2).map(|i| data.validation_clip(i).unwrap().text).collect();
        let dense = [BlockAttention::Dense];
        let noise = sample(&mut e, &model, &config, &texts, 3, &dense, |_| ()).unwrap();
        assert_ne!(noise[0], noise[1]);
        let flat = noise.concat();
        let spread = flat.iter().map(|x| x * x).sum::<f32>() / flat.len() as f32;
        assert!((spread - 1.0).abs() < 0.1, "unit variance, found {spread}");
        let (_, bias) =
            model.params.slices(model.params.copy).find(|(s, _)| s.name == "final.head.bias").unwrap();
        e.fill(bias, 0.5);
        for (solver, guidance) in [(Solver::Euler, 1.0), (Solver::Heun, 3.0)] {
            (config.sample.solver, config.sample.guidance) = (solver, guidance);
            let moved = sample(&mut e, &model, &config, &texts, 3, &dense, |_| ()).unwrap().concat();
            assert!(moved.iter().zip(&flat).all(|(m, n)| (m - (n - 0.5)).abs() < 1e-5), "{solver:?}");
        }
    }

    #[test]
    fn heun_comes_closer_than_euler_with_the_same_steps() {
        let mut config = Config::preset("tiny").unwrap();
        (config.model.layers, config.data.frames, config.data.height, config.data.width) = (1, 2, 4, 4);
        (config.dsv.attention, config.sample.guidance) = (crate::config::Attention::Full, 1.5);
        let mut plan = ArenaPlan::new(Precision::F32);
        let purposes = Purposes::INFERENCE;
        let model = Model::reserve(ModelShape::from_config(&config, 1), purposes, &mut plan);
        let mut e = CpuEngine::<f32>::new();
        e.reserve(&plan, &model.shape.dims(0)).unwrap();
        model.initialise(&mut e, 1).unwrap();
        // A velocity that depends on the place alone: of an untrained model, that of the time oscillates within a step.
        let of = |name: &str| model.params.slices(model.params.copy).find(|(s, _)| s.name == name).unwrap().1;
        e.fill(of("time.in.weight"), 0.0);
        let head = of("final.head.weight");
        let weights: Vec<f32> = (0..head.len()).map(|i| ((i * 37 % 101) as f32 - 50.0) * 2e-3).collect();
        e.write_f32(head, &weights).unwrap();
        let text = vec![vec![0.1; config.model.text_tokens * config.model.text_dim]];
        let mut run = |solver, steps| {
            (config.sample.solver, config.sample.steps) = (solver, steps);
            sample(&mut e, &model, &config, &text, 3, &[BlockAttention::Dense], |_| ()).unwrap().concat()
        };
        let exact = run(Solver::Heun, 200);
        let mut error = |solver, steps| {
            let found = run(solver, steps);
            found.iter().zip(&exact).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
        };
        let (euler, heun) = (error(Solver::Euler, 10), error(Solver::Heun, 10));
        assert!(euler > 1e-2 && heun < euler / 4.0, "Euler {euler}, Heun {heun}");
        // First order: half the step, half the error.
        let finer = error(Solver::Euler, 20);
        assert!((1.6..2.6).contains(&(euler / finer)), "Euler {euler} with 10 steps, {finer} with 20");
    }
}
