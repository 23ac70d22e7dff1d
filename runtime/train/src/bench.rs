//! What a block of the model costs: forward and backward as a training step runs them, with recompute, selection, the
//! predictors' update, and the profile at the rate of stage 2. Speed asks for no clips: inputs and targets are noise.
//!
//! A few blocks are laid out as in training and timed between the embedding and the head; everything is given for one
//! layer. Then every op is timed alone, waiting for each, which says what the time goes into.

mod timed;

use crate::config::{Attention, Config, ConfigError, Switch};
use crate::data::Clip;
use crate::dispatch::{Decision, ProfileState};
use crate::engine::{Engine, EngineError, Space};
use crate::model::{BlockAttention, Model};
use crate::plan::MemoryError;
use crate::predictor::PredictorTask;
use crate::rng::{self, Purpose};
use crate::train::{self, Layout, TrainError, Trainer};
use serde::Serialize;
use std::fmt;
use std::time::{Duration, Instant};
use timed::Timed;
pub use timed::{OpTime, Part};

/// Why a measurement cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The configuration describes no run.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It does not fit.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A whole step failed.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// No number of frames has so many tokens.
    #[error(
        "{tokens} tokens are no whole number of frames: a latent frame of {height} x {width} has {each}\n  allowed: multiples of {each}\n  next: --tokens {nearest}, or other sizes by --set data.height={height}"
    )]
    Tokens {
        /// The tokens asked for.
        tokens: usize,
        /// Latent rows.
        height: usize,
        /// Latent columns.
        width: usize,
        /// Tokens of one patch of frames.
        each: usize,
        /// A number that is allowed.
        nearest: usize,
    },
}

/// Share that fixed lists keep where the configuration says nothing.
const KEEP: f64 = 0.1;
/// Passes before any is timed, at least.
const WARM_UP: usize = 3;

/// The configuration of one measurement: so many tokens (by the number of frames), this attention, these
/// (query_group, kv_block); what is `None` stays.
pub fn config_of(
    config: &Config,
    tokens: Option<usize>,
    attention: Attention,
    blocks: Option<(usize, usize)>,
) -> Result<Config, BenchError> {
    let mut c = config.clone();
    c.data.buckets.clear();
    c.dsv.attention = attention;
    // What a checkpoint would bring changes no speed.
    (c.train.init_weights, c.train.init_map) = (None, None);
    if let Some((group, block)) = blocks {
        (c.dsv.query_group, c.dsv.kv_block) = (group, block);
    }
    if attention == Attention::Fixed {
        c.dsv.keep.get_or_insert(KEEP.min(c.dsv.max_keep));
    }
    if let Some(tokens) = tokens {
        let [t, h, w] = c.model.patch;
        let (height, width) = (c.data.height, c.data.width);
        let each = (height / h.max(1)) * (width / w.max(1));
        if each == 0 || tokens == 0 || tokens % each != 0 {
            let nearest = (tokens.div_ceil(each.max(1)) * each).max(each);
            return Err(BenchError::Tokens { tokens, height, width, each, nearest });
        }
        c.data.frames = tokens / each * t;
    }
    c.validate()?;
    Ok(c)
}

/// Median and spread of some runs, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one.
    pub median: f64,
    /// The fastest.
    pub min: f64,
    /// The slowest.
    pub max: f64,
    /// How many.
    pub runs: usize,
}

impl Spread {
    fn of(mut ms: Vec<f64>) -> Spread {
        ms.sort_by(f64::total_cmp);
        Spread { median: ms[ms.len() / 2], min: ms[0], max: ms[ms.len() - 1], runs: ms.len() }
    }
}

/// What one attention costs at one length, milliseconds and bytes; times are of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BlockTime {
    /// Video tokens.
    pub tokens: usize,
    /// `dsv.attention`; `dsv` is stage 1: full attention, predictors learning.
    pub attention: Attention,
    /// query_group and kv_block, where there are lists.
    pub blocks: Option<(usize, usize)>,
    /// Share of the query-key pairs computed.
    pub kept: f64,
    /// Layers that were timed together.
    pub layers: usize,
    /// Whether intermediates were recomputed.
    pub recompute: bool,
    /// Memory of these layers, with their optimizer.
    pub memory_bytes: usize,
    /// Forward, backward and the predictors' update, without profile.
    pub pass: Spread,
    /// Of it the forward.
    pub forward: Spread,
    /// Of it the backward, recompute included.
    pub backward: Spread,
    /// Of it norm and update of the predictors.
    pub update: Spread,
    /// What a profile adds to a forward that takes one; 0 without predictors.
    pub profile_ms: f64,
    /// Steps from one profile to the next; 0 without.
    pub profile_every: u64,
    /// Median of [`BlockTime::pass`] and the profile's share of a step.
    pub ms: f64,
    /// Every op of a pass, timed alone.
    pub ops: Vec<OpTime>,
}

/// Time of one part of a block: what it is for, milliseconds a layer, FLOP a second where counted.
pub type PartTime = (Part, f64, Option<f64>);

impl BlockTime {
    /// Milliseconds of the ops by what they are for.
    pub fn parts(&self) -> Vec<PartTime> {
        let all = [
            Part::SelfAttention,
            Part::Selection,
            Part::Predictors,
            Part::CrossAttention,
            Part::Products,
            Part::Rows,
        ];
        let sum = |part: Part| {
            let of = self.ops.iter().filter(|o| o.part == part);
            of.fold((0.0, 0.0, 0), |(ms, flop, n), o| (ms + o.ms, flop + o.flop, n + 1))
        };
        let parts = all.into_iter().map(|part| (part, sum(part)));
        parts
            .filter(|(_, (_, _, n))| *n > 0)
            .map(|(part, (ms, flop, _))| {
                let counted = matches!(part, Part::SelfAttention | Part::CrossAttention | Part::Products);
                (part, ms, (counted && ms > 0.0).then(|| flop / ms * 1e3))
            })
            .collect()
    }

    /// What it is, in a few words.
    pub fn label(&self) -> String {
        let name = self.attention.name();
        match self.blocks {
            Some((group, block)) => format!("{name} {group}x{block}, {:.1} % kept", 100.0 * self.kept),
            None => name.to_string(),
        }
    }
}

impl fmt::Display for BlockTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Spread { min, max, runs, .. } = self.pass;
        writeln!(
            f,
            "{} tokens, {}: {:.3} ms a layer ({min:.3} to {max:.3} in {runs} runs of {} layers)",
            self.tokens,
            self.label(),
            self.ms,
            self.layers
        )?;
        let recompute = if self.recompute { " with recompute" } else { "" };
        write!(f, "  forward {:.3}, backward{recompute} {:.3}", self.forward.median, self.backward.median)?;
        if self.profile_every > 0 {
            let (update, profile, every) = (self.update.median, self.profile_ms, self.profile_every);
            write!(f, ", predictors' update {update:.3}, profile {profile:.3} every {every} steps")?;
        }
        writeln!(f, "; {:.2} GiB", self.memory_bytes as f64 / (1u64 << 30) as f64)?;
        let parts = self.parts();
        let sum: f64 = parts.iter().map(|p| p.1).sum();
        for (part, ms, rate) in parts {
            write!(
                f,
                "  {:<26} {ms:>9.3} ms {:>5.1} %",
                part.name(),
                100.0 * ms / sum.max(f64::MIN_POSITIVE)
            )?;
            match rate {
                Some(rate) => writeln!(f, " {:>7.1} TF", rate * 1e-12)?,
                None => writeln!(f)?,
            }
        }
        write!(f, "  {:<26} {sum:>9.3} ms, each op waited for", "sum")
    }
}

/// Times blocks on one engine, one configuration after the other.
pub struct Bench<'a> {
    engine: &'a mut dyn Engine,
    /// Before anything was reserved.
    free: Option<usize>,
    /// Passes run for so long before any is timed.
    warm_up: Duration,
}

impl<'a> Bench<'a> {
    /// On an engine that has nothing reserved yet. Passes run for `warm_up` before any is timed: a GPU at its power limit holds
    /// its first clocks for less than a second, and a training step is longer.
    pub fn new(engine: &'a mut dyn Engine, warm_up: Duration) -> Bench<'a> {
        let free = engine.free_bytes();
        Bench { engine, free, warm_up }
    }

    /// Times `layers` blocks of a configuration from [`config_of`], `repeats` times.
    pub fn block(&mut self, config: &Config, layers: usize, repeats: usize) -> Result<BlockTime, BenchError> {
        let (layers, repeats) = (layers.max(1), repeats.max(1));
        let mut config = config.clone();
        config.model.layers = layers;
        config.train.ema_decay = 0.0;
        let slots = if config.dsv.attention.predicts() { layers } else { 0 };
        let layout = Layout::new(&config, &*self.engine, Some(slots));
        let memory_bytes = layout.total_bytes();
        if let Some(free_bytes) = self.free.filter(|&free| free < memory_bytes) {
            let advice = vec!["--layers 1, or fewer --tokens".to_string()];
            let space = Space::Device;
            return Err(MemoryError { space, needed_bytes: memory_bytes, free_bytes, advice }.into());
        }
        let model = layout.model.clone();
        let e = &mut *self.engine;
        e.reserve(&layout.arena, &model.shape.dims(model.params.master.len()))?;
        write_noise(e, &model, &config)?;
        let decision = decide(&config, e, &model, layers);
        let attention = decision.attention();
        if let Some(predictors) = &model.predictors {
            e.write_i32(predictors.top_k, &decision.top_k())?;
        }
        let pass = Pass { config: &config, model: &model, layout: &layout, attention: &attention };

        let predicts = model.predictors.is_some();
        let (began, mut passes) = (Instant::now(), 0);
        while passes < WARM_UP || began.elapsed() < self.warm_up {
            pass.run(e, predicts && passes == 0)?;
            passes += 1;
        }
        let mut runs = Vec::new();
        let mut profiled = Vec::new();
        for i in 0..repeats {
            runs.push(pass.run(e, false)?);
            if predicts && i % 3 == 0 {
                profiled.push(pass.run(e, true)?[0]);
            }
        }
        let each = |ms: f64| ms / layers as f64;
        let spread = |pick: fn(&[f64; 3]) -> f64| Spread::of(runs.iter().map(|r| each(pick(r))).collect());
        let whole = spread(|r| r.iter().sum());
        let forward = spread(|r| r[0]);
        let stage_one = config.dsv.attention == Attention::Dsv;
        let (profile_ms, profile_every) = match predicts {
            true => (
                (each(Spread::of(profiled).median) - forward.median).max(0.0),
                if stage_one { config.dsv.profile_every } else { config.dsv.profile_every_stage2 },
            ),
            false => (0.0, 0),
        };
        let share = if profile_every > 0 { profile_ms / profile_every as f64 } else { 0.0 };
        let lists = model.lists_of(0, attention[0]).map(|l| (l.shape.query_group, l.shape.kv_block));
        let kept = if lists.is_some() { 1.0 - decision.blocks[0].skipped } else { 1.0 };
        let ops = pass.ops(e, kept)?;
        Ok(BlockTime {
            tokens: model.shape.patch.tokens(),
            attention: config.dsv.attention,
            blocks: lists,
            kept,
            layers,
            recompute: config.train.recompute,
            memory_bytes,
            pass: whole,
            forward,
            backward: spread(|r| r[1]),
            update: spread(|r| r[2]),
            profile_ms,
            profile_every,
            ms: whole.median + share,
            ops,
        })
    }
}

/// How the blocks attend, and what their lists keep.
fn decide(config: &Config, engine: &dyn Engine, model: &Model, slots: usize) -> Decision {
    if let Some(w) = model.shape.window {
        return Decision::windows(config.model.layers, w.kept, config.dsv.attention.label());
    }
    let rules = train::rules(config, engine, model, slots);
    match config.dsv.attention {
        Attention::Fixed => Decision::choose(&rules, &ProfileState::new()),
        _ => Decision::dense(&rules, &ProfileState::new()),
    }
}

/// Weights and inputs. What training begins with at zero gets values too, or no gradient would reach the blocks.
fn write_noise(e: &mut dyn Engine, model: &Model, config: &Config) -> Result<(), EngineError> {
    model.initialise(e, config.train.seed)?;
    let (io, batch) = (model.io, model.shape.patch.batch);
    let key = io.keys.slice(0, 2);
    let scaled = [(model.io.latents, 1.0)].into_iter().chain(
        model
            .params
            .slices(model.params.master)
            .filter(|(spec, _)| matches!(spec.init, crate::params::Init::Normal(0.0)))
            .map(|(spec, buf)| (buf, (1.0 / *spec.shape.last().unwrap_or(&1) as f32).sqrt())),
    );
    for (i, (buf, scale)) in scaled.enumerate() {
        let bits = rng::key(config.train.seed, Purpose::Sample, i as u64);
        e.write_i32(key, &bits.map(|k| k as i32))?;
        e.normal(key, buf);
        e.axpy(scale - 1.0, buf, buf);
        // The key is overwritten next.
        e.sync()?;
    }
    model.params.refresh(e)?;
    e.write_i32(io.keys, &(0..2 * batch as i32).collect::<Vec<_>>())?;
    e.write_i32(io.drop, &vec![0; batch])?;
    e.write_f32(io.t, &vec![0.5; batch])?;
    e.write_f32(io.text, &text(config, io.text.len()))?;
    train::write_samples(e, config.train.seed, 0, model)?;
    model.prepare(e);
    e.sync()
}

fn text(config: &Config, len: usize) -> Vec<f32> {
    (0..len as u64).map(|i| rng::normal(config.train.seed, Purpose::Caption, i) as f32).collect()
}

/// One forward and backward of the blocks laid out.
struct Pass<'a> {
    config: &'a Config,
    model: &'a Model,
    layout: &'a Layout,
    attention: &'a [BlockAttention],
}

impl Pass<'_> {
    fn task(&self, profile: bool) -> PredictorTask {
        PredictorTask { train: self.model.predictors.is_some(), profile }
    }

    fn forward(&self, e: &mut dyn Engine, profile: bool) {
        if let Some(predictors) = &self.model.predictors {
            e.fill(predictors.params.state().grad, 0.0);
        }
        self.model.blocks(e, self.attention, self.task(profile), true, &mut |_, _| ());
    }

    /// Norm and update of the predictors.
    fn update(&self, e: &mut dyn Engine) {
        let Some(predictors) = &self.model.predictors else { return };
        let set = &predictors.params;
        let clip = self.layout.ring.slice(0, 2);
        train::norm(e, set, f32::INFINITY, clip, self.layout.culprits.slice(0, 1));
        // As every first step: the bias corrections of later ones are no other arithmetic.
        let lr = self.config.dsv.predictor_lr as f32;
        train::adamw(e, &self.config.train, set, 0..set.master.len(), [lr, 0.0], 1, clip);
    }

    /// Milliseconds of forward, backward and update, all layers.
    fn run(&self, e: &mut dyn Engine, profile: bool) -> Result<[f64; 3], EngineError> {
        let time = |e: &mut dyn Engine, key: u32, work: &mut dyn FnMut(&mut dyn Engine)| {
            e.sync()?;
            let began = Instant::now();
            e.repeat(&[key], work);
            e.sync()?;
            Ok::<_, EngineError>(1e3 * began.elapsed().as_secs_f64())
        };
        e.fill(self.model.params.state().grad, 0.0);
        self.model.enter(e);
        let forward = time(e, u32::from(profile), &mut |e| self.forward(e, profile))?;
        self.turn(e);
        let backward = time(e, 2, &mut |e| self.model.blocks_bwd(e, self.attention))?;
        let update = match self.model.predictors {
            Some(_) => time(e, 3, &mut |e| self.update(e))?,
            None => 0.0,
        };
        Ok([forward, backward, update])
    }

    /// From the last block's output to its gradient.
    fn turn(&self, e: &mut dyn Engine) {
        self.model.leave(e);
        self.model.loss(e, Some(1.0));
        self.model.leave_bwd(e);
    }

    /// Every op of a pass, of one layer: of three passes the one that took least.
    fn ops(&self, e: &mut dyn Engine, kept: f64) -> Result<Vec<OpTime>, EngineError> {
        let mut waits = Vec::new();
        for _ in 0..20 {
            let began = Instant::now();
            e.sync()?;
            waits.push(1e3 * began.elapsed().as_secs_f64());
        }
        let wait_ms = Spread::of(waits).median;
        let scores = self.model.predictors.as_ref().map(|p| p.scores());
        let mut best: Option<Vec<OpTime>> = None;
        let sum = |ops: &[OpTime]| ops.iter().map(|o| o.ms).sum::<f64>();
        for _ in 0..3 {
            e.fill(self.model.params.state().grad, 0.0);
            self.model.enter(e);
            e.sync()?;
            let mut timed = Timed::new(e, scores, wait_ms, kept);
            self.forward(&mut timed, false);
            let forward = timed.finish()?;
            self.turn(e);
            e.sync()?;
            let mut timed = Timed::new(e, scores, wait_ms, kept);
            self.model.blocks_bwd(&mut timed, self.attention);
            self.update(&mut timed);
            let mut ops = timed.finish()?;
            for op in forward {
                match ops.iter_mut().find(|o| o.part == op.part && o.op == op.op) {
                    Some(o) => {
                        (o.calls, o.ms, o.flop) = (o.calls + op.calls, o.ms + op.ms, o.flop + op.flop);
                    }
                    None => ops.push(op),
                }
            }
            if best.as_ref().is_none_or(|b| sum(&ops) < sum(b)) {
                best = Some(ops);
            }
        }
        let mut ops = best.unwrap_or_default();
        let layers = self.attention.len() as f64;
        for op in &mut ops {
            (op.calls, op.ms, op.flop) = (op.calls / layers, op.ms / layers, op.flop / layers);
        }
        ops.sort_by(|a, b| a.part.cmp(&b.part).then(b.ms.total_cmp(&a.ms)));
        Ok(ops)
    }
}

/// Steps between two looks at the clock: a step is queued while the one before runs, as in training.
const STEPS_A_RUN: usize = 2;

/// Times whole optimizer steps of the whole model, on clips of noise: all but the profile, reading clips and writing
/// metrics. Milliseconds of a step.
pub fn whole_step(config: &Config, engine: Box<dyn Engine>, repeats: usize) -> Result<Spread, BenchError> {
    let mut config = config.clone();
    // Nothing but steps: profile and decision before the first one only, no reading back.
    let never = i64::MAX as u64;
    (config.dsv.profile_every, config.dsv.profile_every_stage2) = (never, never);
    (config.dsv.dispatch_every, config.dsv.switch) = (never, Switch::Step(never));
    config.train.log_every = 64;
    let mut trainer = Trainer::new(config, engine)?;
    let patch = trainer.model.shape.patch;
    let latents: Vec<f32> =
        (0..patch.latent_len() as u64).map(|i| rng::normal(1, Purpose::Sample, i) as f32).collect();
    let clip = Clip {
        id: "noise".into(),
        caption: String::new(),
        grid: patch.latent,
        latents,
        text: text(&trainer.config, trainer.config.model.text_tokens * trainer.config.model.text_dim),
    };
    let clips = vec![clip; trainer.clips_per_step()];
    let (mut ms, mut events) = (Vec::new(), Vec::new());
    // The first run warms up.
    for i in 0..=repeats.clamp(1, 60 / STEPS_A_RUN - 1) {
        trainer.flush(&mut events)?;
        let began = Instant::now();
        for _ in 0..STEPS_A_RUN {
            trainer.step(&clips, &mut events)?;
        }
        trainer.flush(&mut events)?;
        if i > 0 {
            ms.push(1e3 * began.elapsed().as_secs_f64() / STEPS_A_RUN as f64);
        }
    }
    Ok(Spread::of(ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::CpuEngine;

    fn small() -> Config {
        let mut config = Config::preset("tiny").unwrap();
        (config.data.height, config.data.width, config.data.batch_size) = (8, 8, 1);
        config.dsv.profile_queries = 4;
        config
    }

    #[test]
    fn tokens_become_frames_or_an_error_that_names_the_nearest() {
        let config = small();
        let c = config_of(&config, Some(256), Attention::Fixed, Some((16, 8))).unwrap();
        assert_eq!((c.tokens(), c.data.frames), (256, 4));
        assert_eq!((c.dsv.query_group, c.dsv.kv_block, c.dsv.keep), (16, 8, config.dsv.keep));
        let error = config_of(&config, Some(100), Attention::Full, None).unwrap_err().to_string();
        assert!(error.contains("100 tokens") && error.contains("--tokens 128"), "{error}");
        let large = Config::preset("2.7b").unwrap();
        let c = config_of(&large, Some(131_072), Attention::Fixed, None).unwrap();
        assert_eq!((c.data.frames, c.dsv.keep), (128, Some(0.1)));
    }

    #[test]
    fn every_attention_is_timed_and_its_parts_are_named() {
        let mut engine = CpuEngine::<f32>::new();
        let mut bench = Bench::new(&mut engine, Duration::ZERO);
        let parts = |t: &BlockTime| t.parts().iter().map(|p| p.0).collect::<Vec<_>>();
        for attention in [Attention::Full, Attention::Fixed, Attention::Dsv, Attention::WaM] {
            let config = config_of(&small(), Some(256), attention, None).unwrap();
            let time = bench.block(&config, 2, 3).unwrap();
            assert_eq!((time.tokens, time.layers, time.pass.runs), (256, 2, 3));
            assert!(time.pass.min <= time.ms && time.forward.median > 0.0 && time.backward.median > 0.0);
            let predicts = attention.predicts();
            assert_eq!(parts(&time).contains(&Part::Predictors), predicts, "{attention:?}");
            assert_eq!(parts(&time).contains(&Part::Selection), attention == Attention::Fixed);
            assert_eq!(time.update.median > 0.0, predicts);
            assert_eq!(time.blocks.is_some(), !matches!(attention, Attention::Full | Attention::Dsv));
            // One layer: its attention once each way, over the pairs kept.
            let flop: f64 = time.ops.iter().filter(|o| o.part == Part::SelfAttention).map(|o| o.flop).sum();
            assert!((flop / (14.0 * 256.0 * 256.0 * 64.0 * time.kept) - 1.0).abs() < 1e-9, "{attention:?}");
            if attention == Attention::Fixed {
                assert!((time.kept - 0.25).abs() < 1e-9 && time.profile_every == 25);
                let text = time.to_string();
                assert!(
                    text.contains("fixed 8x8, 25.0 % kept") && text.contains("predictors' update"),
                    "{text}"
                );
            }
        }
    }

    /// The gradient that reaches the blocks must not be zero, or the GPU would be timed on zeros.
    #[test]
    fn the_blocks_are_timed_on_numbers_that_are_not_zero() {
        let config = config_of(&small(), None, Attention::Fixed, None).unwrap();
        let mut engine = CpuEngine::<f32>::new();
        Bench::new(&mut engine, Duration::ZERO).block(&config, 1, 1).unwrap();
        let mut one = config;
        one.model.layers = 1;
        one.train.ema_decay = 0.0;
        let layout = Layout::new(&one, &engine, Some(1));
        let params = &layout.model.params;
        for (spec, buf) in params.slices(params.state().grad).filter(|(s, _)| s.name.starts_with("block.")) {
            let values = engine.read_f32(buf).unwrap();
            assert!(values.iter().all(|x| x.is_finite()), "{}", spec.name);
            assert!(values.iter().any(|x| *x != 0.0), "the gradient of {} is zero", spec.name);
        }
    }

    #[test]
    fn a_whole_step_is_timed() {
        let config = config_of(&small(), Some(128), Attention::Fixed, None).unwrap();
        let time = whole_step(&config, Box::new(CpuEngine::<f32>::new()), 2).unwrap();
        assert!(time.runs == 2 && time.min > 0.0);
    }
}
