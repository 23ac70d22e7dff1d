//! One training run on one engine: the step, what is read back, the stage machine and the dispatcher at
//! work, and everything a resumed run needs.
//!
//! The host never waits for the device inside a step. Losses, norms and predictor losses go to a ring of
//! slots on the device, read when the ring is full (`train.log_every` steps), on steps that profile, and
//! before a checkpoint.

use crate::checkpoint::{Checkpoint, State};
use crate::config::{self, Attention, Config};
use crate::data::{Clip, DataPosition, Dataset};
use crate::dispatch::{Decision, ProfileState, Rules};
use crate::engine::{AdamW, ArenaPlan, Buf, DeviceFacts, Done, Engine, EngineError, GradNorm, Transfers};
use crate::eval::{self, EvalResult};
use crate::granularity::{self, ChosenCube};
use crate::model::{BlockAttention, Model, ModelShape, Purposes};
use crate::observe::{self, BlockObservation};
use crate::params::ParamSet;
use crate::plan::{self, MemoryError};
use crate::predictor::{PredictorTask, Predictors};
use crate::rng::{self, Purpose};
use crate::stage::{Reason, Stage, Stages};
use crate::tensors::TensorView;
use dsv_spec::order::{Cube, Grid};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Largest number of steps between two readings of the ring.
const MAX_RING: u64 = 64;
/// f32 values of a slot before the predictor losses: sum of losses, norm and factor, predictors' norm and factor.
const HEAD: usize = 5;

/// Why a run stops.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The device failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It does not fit.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Loss or gradients were non-finite too often in a row.
    #[error(
        "loss or gradients were not finite in {steps} steps in a row, last in step {step}; first tensor: {tensor}\n  those steps changed nothing, and no checkpoint was written since; the weights are those after {good} good steps\n  train.max_skipped = {steps} ends a run there\n  next: lower train.lr or raise train.warmup_steps, then dsv-train run --resume"
    )]
    NotFinite {
        /// Skipped steps in a row.
        steps: u32,
        /// The last of them.
        step: u64,
        /// The first tensor that is not finite.
        tensor: String,
        /// Steps that did change the weights.
        good: u64,
    },
    /// A checkpoint lacks a tensor, or has another shape.
    #[error(
        "checkpoint {path}: tensor {name} {problem}\n  next: resume with the configuration the run began with (config.toml beside its checkpoints)"
    )]
    Tensor {
        /// The checkpoint.
        path: String,
        /// The tensor.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A checkpoint's state cannot be read.
    #[error("checkpoint {path}: {problem}\n  next: resume from an older one, or begin anew without --resume")]
    State {
        /// The checkpoint.
        path: String,
        /// What is wrong.
        problem: String,
    },
}

/// What one step did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    /// The step, from 0.
    pub step: u64,
    /// Video tokens of its clips.
    pub tokens: u64,
    /// Mean loss.
    pub loss: f64,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// 0 for full attention and windows, else 1 or 2.
    pub stage: u8,
    /// Mean predictor loss over all blocks and heads.
    pub predictor_loss: Option<f64>,
    /// Mean predictor loss of each block.
    pub predictor_loss_by_block: Vec<f64>,
    /// Share of blocks whose attention was sparse.
    pub sparse_share: f64,
    /// The first tensor that is not finite, when the step was skipped: an input, a weight or an activation in the order of
    /// the forward pass, the loss, or a gradient in the order of the model. Only of the last step before a reading
    /// are inputs, weights and activations still there to be looked at; of earlier ones it is the loss or a gradient.
    pub skipped: Option<String>,
}

/// Something that happened besides a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A step, read back.
    Step(StepRecord),
    /// Stage 2 begins with this step.
    Stage {
        /// The step.
        step: u64,
        /// Why.
        reason: Reason,
        /// The last mean predictor loss read back.
        predictor_loss: Option<f64>,
    },
    /// A cube of tokens was chosen before this step (`dsv.cube = "auto"`).
    Cube {
        /// The step.
        step: u64,
        /// Which, and why.
        choice: ChosenCube,
    },
    /// The dispatcher decided before this step.
    Decision {
        /// The step.
        step: u64,
        /// What.
        decision: Decision,
    },
    /// What was copied between device and host since this was last told.
    Transfers {
        /// The last step it is about.
        step: u64,
        /// Steps it is about.
        steps: u64,
        /// What, and how long it took.
        moved: Transfers,
    },
    /// The attention was profiled in this step.
    Profile {
        /// The step.
        step: u64,
        /// The smoothed profile.
        profile: ProfileState,
    },
}

#[derive(Copy, Clone, Debug)]
struct Pending {
    step: u64,
    tokens: u64,
    lr: f64,
    stage: u8,
    sparse_share: f64,
    predictors: bool,
}

/// The part of a run that a checkpoint carries beside tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct More {
    stages: Stages,
    profile: ProfileState,
    decision: Decision,
    /// Of the other grids.
    #[serde(default)]
    other_decisions: Vec<Decision>,
    predictor_loss: Option<f64>,
    skipped_in_a_row: u32,
    good_steps: u64,
    list_slots: usize,
    /// The cube that was chosen, once it was.
    #[serde(default)]
    cube: Option<Cube>,
}

/// A laid-out, initialised run.
pub struct Trainer {
    /// The configuration.
    pub config: Config,
    /// The model, laid out for the first grid.
    pub model: Model,
    /// The same model for the other grids, with how its blocks attend there.
    others: Vec<(Model, Decision)>,
    engine: Box<dyn Engine>,
    stages: Stages,
    profile: ProfileState,
    decision: Decision,
    step: u64,
    predictor_loss: Option<f64>,
    skipped_in_a_row: u32,
    good_steps: u64,
    /// The cube that was chosen, once it was.
    cube: Option<Cube>,
    ring: Buf,
    culprits: Buf,
    pending: Vec<Pending>,
    /// Whether the last step's weights are still to be averaged, see [`Trainer::average`].
    to_average: bool,
    /// The last averages that were queued, which may still be made from the weights.
    averaged: Done,
    /// Which grid the last step had.
    last_grid: usize,
}

/// A run laid out, before anything is allocated.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The arena.
    pub arena: ArenaPlan,
    /// The model's handles, for the first grid.
    pub model: Model,
    /// The same model's handles for the other grids.
    pub others: Vec<Model>,
    /// List buffers blocks can be given.
    pub list_slots: usize,
    /// Bytes of one list buffer; 0 without predictors.
    pub list_bytes: usize,
    /// Bytes of the engine's workspace.
    pub scratch_bytes: usize,
    /// What is read back of the last steps.
    pub(crate) ring: Buf,
    /// Tensors that were not finite in them.
    pub(crate) culprits: Buf,
}

/// Bytes of what one block keeps beside its input: attention output and predicted lists.
fn kept_bytes(shape: &ModelShape, engine: &dyn DeviceFacts) -> usize {
    let mut probe = ArenaPlan::new(engine.precision());
    probe.act("attention output", shape.rows() * shape.dim());
    if let Some(p) = shape.predictor {
        p.lists.reserve(&mut probe, "lists", engine.needs_inverse_lists());
    }
    probe.total_bytes()
}

/// How many blocks' kept buffers of so many bytes the budget allows on the device; `None` where all are.
fn kept_sets(config: &Config, bytes: usize) -> Option<usize> {
    let budget = (config.train.kept_budget_gb * (1u64 << 30) as f64) as usize;
    // Below two nothing could be copied while a block runs.
    let sets = (budget / bytes.max(1)).max(2);
    (budget > 0 && sets < config.model.layers).then_some(sets)
}

impl Layout {
    /// Lays a training run out for an engine. `list_slots` overrides the number the memory budget gives.
    pub fn new(config: &Config, engine: &dyn DeviceFacts, list_slots: Option<usize>) -> Layout {
        let shapes: Vec<ModelShape> = config
            .grids()
            .into_iter()
            .map(|grid| ModelShape::from_config(&config.of_grid(grid), config.data.batch_size))
            .collect();
        let first = &shapes[0];
        let set_bytes = shapes.iter().map(|s| kept_bytes(s, engine)).max().unwrap_or(0);
        let kept_sets = kept_sets(config, set_bytes);
        let lay = |slots: usize| {
            let mut arena = ArenaPlan::new(engine.precision());
            let purposes = Purposes {
                train: true,
                recompute: config.train.recompute,
                moments: config.train.moments,
                ema: config.ema_space(),
                list_slots: slots,
                kept_sets,
                inverse_lists: engine.needs_inverse_lists(),
            };
            let models = Model::reserve_grids(shapes.clone(), purposes, &mut arena);
            for model in &models {
                arena.need_scratch(engine.scratch_bytes(&model.shape.dims(model.params.master.len())));
            }
            let ring = config.train.log_every.min(MAX_RING) as usize;
            let slot = HEAD + first.predictor.map_or(0, |p| p.layers * p.lists.heads);
            let values = arena.f32("metrics/ring", ring * slot);
            let culprits = arena.i32("metrics/culprits", ring * 2);
            (arena, models, values, culprits)
        };
        let slot_bytes = |shape: &ModelShape| {
            shape.predictor.map_or(0, |p| {
                let arena = ArenaPlan::new(engine.precision());
                Predictors::slot_bytes(&p, engine.needs_inverse_lists(), &arena)
            })
        };
        let list_bytes = shapes.iter().map(slot_bytes).max().unwrap_or(0);
        let list_slots = list_slots.unwrap_or_else(|| {
            if list_bytes == 0 {
                return 0;
            }
            if config.dsv.attention == Attention::Fixed || kept_sets.is_some() {
                // Every block or none: where they do not fit, the run does not. Those on the host need no choice.
                return first.layers;
            }
            let (arena, ..) = lay(0);
            let needed = arena.total_bytes() + arena.scratch_bytes();
            let budget = match config.dsv.memory_budget_gb {
                gib if gib > 0.0 => Some((gib * (1u64 << 30) as f64) as usize),
                _ => engine.free_bytes(),
            };
            match budget {
                Some(bytes) => (bytes.saturating_sub(needed) / list_bytes).min(first.layers),
                None => first.layers,
            }
        });
        let (arena, mut models, ring, culprits) = lay(list_slots);
        let model = models.remove(0);
        let scratch_bytes = arena.scratch_bytes();
        Layout { arena, model, others: models, list_slots, list_bytes, scratch_bytes, ring, culprits }
    }

    /// Bytes of arena and workspace.
    pub fn total_bytes(&self) -> usize {
        self.arena.total_bytes() + self.scratch_bytes
    }
}

impl Trainer {
    /// A run at step 0: allocates the arena and writes initial weights.
    pub fn new(config: Config, engine: Box<dyn Engine>) -> Result<Trainer, TrainError> {
        let layout = Layout::new(&config, &*engine, None);
        Self::begin(config, engine, layout)
    }

    /// A run where a checkpoint left it. Where `[dsv]` asks for other lists than the checkpoint's run (a fork), what heads keep
    /// is decided at once.
    pub fn resume(
        config: Config,
        engine: Box<dyn Engine>,
        checkpoint: &Checkpoint,
    ) -> Result<Trainer, TrainError> {
        let path = checkpoint.path.display().to_string();
        let more: More = serde_json::from_value(checkpoint.state.more.clone())
            .map_err(|e| TrainError::State { path: path.clone(), problem: e.to_string() })?;
        let layout = Layout::new(&config, &*engine, Some(more.list_slots));
        let mut trainer = Self::begin(config, engine, layout)?;
        trainer.load_tensors(checkpoint)?;
        trainer.step = checkpoint.state.step;
        trainer.stages = more.stages;
        trainer.profile = more.profile;
        trainer.decision = more.decision;
        for ((_, decision), kept) in trainer.others.iter_mut().zip(more.other_decisions) {
            *decision = kept;
        }
        trainer.predictor_loss = more.predictor_loss;
        trainer.skipped_in_a_row = more.skipped_in_a_row;
        trainer.good_steps = more.good_steps;
        trainer.cube = more.cube;
        trainer.reorder(cube_of(&trainer.config, more.cube))?;
        let theirs = Config::from_toml(&checkpoint.state.config, "the checkpoint", None, &[]);
        let forked = theirs.is_ok_and(|theirs| theirs.dsv != trainer.config.dsv);
        match trainer.stages.stage() {
            Stage::Dense if forked => trainer.decide(Decision::dense)?,
            Stage::Sparse { .. } if forked => trainer.decide(Decision::choose)?,
            _ => trainer.write_top_k()?,
        }
        Ok(trainer)
    }

    fn begin(config: Config, mut engine: Box<dyn Engine>, layout: Layout) -> Result<Trainer, TrainError> {
        plan::check(&config, &layout, &*engine)?;
        let Layout { arena, model, others, list_slots, ring, culprits, .. } = layout;
        engine.reserve(&arena, &model.shape.dims(model.params.master.len()))?;
        model.initialise(&mut *engine, config.train.seed)?;
        for other in &others {
            other.write_tables(&mut *engine)?;
        }
        let stages = Stages::new(&config.dsv);
        let profile = ProfileState::new();
        let first = |model: &Model| match model.shape.window {
            Some(w) => Decision::windows(config.model.layers, w.kept, config.dsv.attention.label()),
            None => Decision::dense(&rules(&config, &*engine, model, list_slots), &profile),
        };
        let decision = first(&model);
        let others = others.into_iter().map(|other| (first(&other), other)).map(|(d, m)| (m, d)).collect();
        let mut trainer = Trainer {
            config,
            model,
            others,
            engine,
            stages,
            profile,
            decision,
            last_grid: 0,
            step: 0,
            predictor_loss: None,
            skipped_in_a_row: 0,
            good_steps: 0,
            cube: None,
            ring,
            culprits,
            pending: Vec::new(),
            to_average: false,
            averaged: Done::default(),
        };
        trainer.write_top_k()?;
        Ok(trainer)
    }

    /// Optimizer steps done.
    pub fn step_number(&self) -> u64 {
        self.step
    }

    /// Current stage.
    pub fn stage(&self) -> Stage {
        self.stages.stage()
    }

    /// The dispatcher's last decision, for the first grid.
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// The smoothed profile.
    pub fn profile(&self) -> &ProfileState {
        &self.profile
    }

    /// Clips a step consumes.
    pub fn clips_per_step(&self) -> usize {
        self.config.data.batch_size * self.config.train.grad_accumulation
    }

    /// Steps in a row that were skipped, up to the last reading.
    pub fn skipped_in_a_row(&self) -> u32 {
        self.skipped_in_a_row
    }

    /// The device, with everything queued that belongs to the steps so far.
    pub fn engine(&mut self) -> &mut dyn Engine {
        self.average();
        &mut *self.engine
    }

    /// Queues the averages of the last step's weights, unless they are. A step leaves them to the next one, to be queued behind
    /// its inputs: copies to the device share one queue, and inputs that wait for 11 GB of averages keep the ops waiting too.
    fn average(&mut self) {
        if std::mem::take(&mut self.to_average) {
            self.averaged = self.model.params.average(&mut *self.engine, self.config.train.ema_decay as f32);
        }
    }

    fn write_top_k(&mut self) -> Result<(), EngineError> {
        let others = self.others.iter().map(|(model, decision)| (model, decision));
        for (model, decision) in std::iter::once((&self.model, &self.decision)).chain(others) {
            if let Some(predictors) = &model.predictors {
                self.engine.write_i32(predictors.top_k, &decision.top_k())?;
            }
        }
        Ok(())
    }

    /// Puts the tokens of every grid into the order of this cube.
    fn reorder(&mut self, cube: Cube) -> Result<(), EngineError> {
        let engine = &mut *self.engine;
        let others = self.others.iter_mut().map(|(model, _)| model);
        for model in std::iter::once(&mut self.model).chain(others).filter(|model| model.shape.cube != cube) {
            model.reorder(engine, cube)?;
        }
        Ok(())
    }

    /// Measures the cubes on the first clips of this step, with full attention, and goes on with the best.
    fn choose_cube(&mut self, clips: &[Clip]) -> Result<ChosenCube, EngineError> {
        let model = self.of_grid(self.grid_of(clips)).0.clone();
        let grids: Vec<Grid> = std::iter::once(&self.model)
            .chain(self.others.iter().map(|(model, _)| model))
            .map(|model| model.shape.grid())
            .collect();
        let first = self.step * clips.len() as u64;
        write_clips(&mut *self.engine, &model, &clips[..self.config.data.batch_size], &self.config, first)?;
        let choice = granularity::choose_cube(&mut *self.engine, &model, self.config.dsv.theta, &grids)?;
        self.cube = Some(choice.cube);
        self.reorder(choice.cube)?;
        Ok(choice)
    }

    /// Decides anew for every grid.
    fn decide(&mut self, choose: fn(&Rules, &ProfileState) -> Decision) -> Result<(), EngineError> {
        let slots = self.slots();
        let rules = |model: &Model| rules(&self.config, &*self.engine, model, slots);
        self.decision = choose(&rules(&self.model), &self.profile);
        for (model, decision) in &mut self.others {
            *decision = choose(&rules(model), &self.profile);
        }
        self.write_top_k()
    }

    /// The model and its blocks' attention for a grid, by its number.
    fn of_grid(&self, grid: usize) -> (&Model, &Decision) {
        match grid.checked_sub(1) {
            None => (&self.model, &self.decision),
            Some(other) => (&self.others[other].0, &self.others[other].1),
        }
    }

    /// Number of the grid that all these clips have.
    fn grid_of(&self, clips: &[Clip]) -> usize {
        let grid = clips[0].grid;
        assert!(clips.iter().all(|c| c.grid == grid), "the clips of one step have one grid, {grid:?}");
        let models = std::iter::once(&self.model).chain(self.others.iter().map(|(model, _)| model));
        let found = models.into_iter().position(|m| m.shape.patch.latent == grid);
        found.unwrap_or_else(|| panic!("no model was laid out for clips of {grid:?}"))
    }

    fn slots(&self) -> usize {
        self.model.list_slots()
    }

    /// One optimizer step on [`Trainer::clips_per_step`] clips. Events of this step, and of earlier steps now read
    /// back, are appended to `events`.
    ///
    /// # Panics
    /// If `clips` has another number of clips, or they are not all of one of the configuration's grids.
    pub fn step(&mut self, clips: &[Clip], events: &mut Vec<Event>) -> Result<(), TrainError> {
        assert_eq!(clips.len(), self.clips_per_step(), "clips of one step");
        let step = self.step;
        let dsv = self.config.dsv.clone();
        if let Some(reason) = self.stages.advance(&dsv, step, self.predictor_loss) {
            events.push(Event::Stage { step, reason, predictor_loss: self.predictor_loss });
            // Only here: in stage 1 no order of the tokens changes what is computed, later lists are of one order.
            if dsv.cube == Some(config::CubeChoice::Auto) {
                events.push(Event::Cube { step, choice: self.choose_cube(clips)? });
            }
        }
        if step == 0 && self.model.shape.window.is_some() {
            events.push(Event::Decision { step, decision: self.decision.clone() });
        }
        if self.stages.dispatches(&dsv, step) {
            self.decide(Decision::choose)?;
            events.push(Event::Decision { step, decision: self.decision.clone() });
        }
        let profiles = self.stages.profiles(&dsv, step);
        self.last_grid = self.grid_of(clips);
        let (model, decision) = self.of_grid(self.last_grid);
        let (model, attention, sparse_share) = (model.clone(), decision.attention(), decision.sparse_share());
        if profiles {
            write_samples(&mut *self.engine, self.config.train.seed, step, &model)?;
        }
        self.compute(clips, &model, &attention, profiles)?;
        self.update()?;
        let tokens = (clips.len() * model.shape.patch.tokens()) as u64;
        let stage = self.stages.stage().number();
        let lr = self.config.lr_at(step);
        let predictors = self.model.predictors.is_some();
        self.pending.push(Pending { step, tokens, lr, stage, sparse_share, predictors });
        self.step += 1;
        let ring = self.culprits.len() as u64 / 2;
        if profiles || self.step.is_multiple_of(ring) {
            self.flush(events)?;
            // Only here, on steps the configuration fixes: a checkpoint reads the ring at any step, and must not
            // make stage 1 end earlier than it would have.
            if let Some(Event::Step(record)) = events.last() {
                self.predictor_loss = record.predictor_loss;
            }
        }
        if profiles {
            self.read_profile(step, events)?;
        }
        Ok(())
    }

    /// Gradients of the step, summed over its micro-batches, and the sum of its losses.
    fn compute(
        &mut self,
        clips: &[Clip],
        model: &Model,
        attention: &[BlockAttention],
        profiles: bool,
    ) -> Result<(), EngineError> {
        let batch = self.config.data.batch_size;
        let micros = clips.len() / batch;
        let head = self.slot(0, HEAD);
        let grid = self.last_grid as u32;
        let first = self.step * clips.len() as u64;
        let e = &mut *self.engine;
        e.fill(model.params.state().grad, 0.0);
        if let Some(predictors) = &model.predictors {
            e.fill(predictors.params.state().grad, 0.0);
        }
        e.fill(head, 0.0);
        for (micro, clips) in clips.chunks(batch).enumerate() {
            write_clips(&mut *self.engine, model, clips, &self.config, first + (micro * batch) as u64)?;
            self.average();
            let e = &mut *self.engine;
            let task = PredictorTask { train: model.predictors.is_some(), profile: profiles && micro == 0 };
            e.repeat(&repeat_key(grid, task, attention), &mut |e| {
                model.prepare(e);
                model.forward(e, attention, task);
                model.loss(e, Some(1.0 / micros as f32));
                model.backward(e, attention);
            });
            e.sum_rows(batch, model.io.loss, head.slice(0, 1));
        }
        Ok(())
    }

    /// `len` values of this step's slot in the ring, from `start`.
    fn slot(&self, start: usize, len: usize) -> Buf {
        self.slot_of(self.step, start, len)
    }

    fn slot_of(&self, step: u64, start: usize, len: usize) -> Buf {
        let ring = self.culprits.len() / 2;
        let width = self.ring.len() / ring;
        self.ring.slice(step as usize % ring * width + start, len)
    }

    /// Norms and optimizer steps. The averages are left to [`Trainer::average`].
    fn update(&mut self) -> Result<(), EngineError> {
        let t = &self.config.train;
        let max_norm = if t.grad_clip > 0.0 { t.grad_clip as f32 } else { f32::INFINITY };
        let at = self.step as usize % (self.culprits.len() / 2) * 2;
        let (loss, clip, predictor_clip) = (self.slot(0, 1), self.slot(1, 2), self.slot(3, 2));
        let losses = self.model.predictors.as_ref().map(|p| (p.loss, self.slot(HEAD, p.loss.len())));
        let predictor_lr = self.stages.predictor_lr(&self.config.dsv) as f32;
        let lr = self.config.lr_at(self.step) as f32;
        let step = self.step + 1;
        let e = &mut *self.engine;
        let adamw =
            |e: &mut dyn Engine, set: &ParamSet, range: Range<usize>, lr: f32, decay: f32, clip: Buf| {
                adamw(e, t, set, range, [lr, decay], step, clip);
            };
        let set = &self.model.params;
        norm(e, set, max_norm, clip, self.culprits.slice(at, 1));
        // The factor of a step that is not to be taken is NaN. 0 times a finite number adds nothing, 0 times another is
        // NaN: so a loss that is not finite skips the step as a gradient does, and model and predictors step together
        // or not at all, without the host.
        let factor = clip.slice(1, 1);
        e.axpy(0.0, loss, factor);
        if let Some(predictors) = &self.model.predictors {
            let predictor_factor = predictor_clip.slice(1, 1);
            norm(e, &predictors.params, f32::INFINITY, predictor_clip, self.culprits.slice(at + 1, 1));
            e.axpy(0.0, predictor_factor, factor);
            e.axpy(0.0, factor, predictor_factor);
        }
        e.after(&self.averaged);
        adamw(e, set, 0..set.decayed(), lr, t.weight_decay as f32, clip);
        adamw(e, set, set.decayed()..set.master.len(), lr, 0.0, clip);
        if let Some(predictors) = &self.model.predictors {
            let set = &predictors.params;
            adamw(e, set, 0..set.master.len(), predictor_lr, 0.0, predictor_clip);
        }
        if let Some((from, to)) = losses {
            e.copy(from, to);
        }
        self.to_average = true;
        Ok(())
    }

    /// Reads the ring back. Called by [`Trainer::step`]; call it before reading weights or ending a run.
    pub fn flush(&mut self, events: &mut Vec<Event>) -> Result<(), TrainError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        // An op may refuse non-finite values (selection does); the step is then skipped below, not fatal.
        let refused = match self.engine.sync() {
            Err(EngineError::Flag { op, reason }) => Some((op, reason)),
            other => {
                other?;
                None
            }
        };
        let values = self.engine.read_f32(self.ring)?;
        let culprits = self.engine.read_i32(self.culprits)?;
        let ring = culprits.len() / 2;
        let width = values.len() / ring;
        let per_step = self.clips_per_step() as f64;
        let heads = self.model.shape.heads;
        let moved = self.engine.transfers();
        if let Some(last) = self.pending.last().filter(|_| moved != Transfers::default()) {
            events.push(Event::Transfers { step: last.step, steps: self.pending.len() as u64, moved });
        }
        let mut any_skipped = false;
        for p in std::mem::take(&mut self.pending) {
            let at = p.step as usize % ring;
            let slot = &values[at * width..][..width];
            let by_block: Vec<f64> = slot[HEAD..]
                .chunks(heads)
                .map(|row| row.iter().map(|&x| f64::from(x)).sum::<f64>() / heads as f64)
                .collect();
            let predictor_loss = p.predictors.then(|| by_block.iter().sum::<f64>() / by_block.len() as f64);
            let skipped = match slot[2].is_finite() {
                true => None,
                false => Some(self.offender(p.step, slot, &culprits[2 * at..][..2])?),
            };
            any_skipped |= skipped.is_some();
            match &skipped {
                Some(tensor) => {
                    self.skipped_in_a_row += 1;
                    if self.skipped_in_a_row >= self.config.train.max_skipped {
                        return Err(TrainError::NotFinite {
                            steps: self.skipped_in_a_row,
                            step: p.step,
                            tensor: tensor.clone(),
                            good: self.good_steps,
                        });
                    }
                }
                None => {
                    self.skipped_in_a_row = 0;
                    self.good_steps += 1;
                }
            }
            events.push(Event::Step(StepRecord {
                step: p.step,
                tokens: p.tokens,
                loss: f64::from(slot[0]) / per_step,
                grad_norm: f64::from(slot[1]),
                lr: p.lr,
                stage: p.stage,
                predictor_loss,
                predictor_loss_by_block: if p.predictors { by_block } else { Vec::new() },
                sparse_share: p.sparse_share,
                skipped,
            }));
        }
        match refused {
            Some((op, reason)) if !any_skipped => Err(EngineError::Flag { op, reason }.into()),
            _ => Ok(()),
        }
    }

    /// The first tensor that is not finite in a skipped step, from what the ring says of it; inputs, weights and
    /// activations are looked at where the step was the last one.
    fn offender(&mut self, step: u64, slot: &[f32], culprits: &[i32]) -> Result<String, EngineError> {
        if step + 1 == self.step {
            let ring = self.culprits.len() / 2;
            let culprit = self.culprits.slice(step as usize % ring * 2, 1);
            let norm = self.slot_of(step, 1, 2);
            if let Some(name) =
                self.of_grid(self.last_grid).0.clone().first_not_finite(&mut *self.engine, norm, culprit)?
            {
                return Ok(name);
            }
        }
        if !slot[0].is_finite() {
            return Ok("the loss".to_string());
        }
        let predictors = self.model.predictors.as_ref().map(|p| &p.params);
        let sets = [Some(&self.model.params), predictors];
        for (set, &culprit) in sets.into_iter().zip(culprits) {
            if let (Some(set), Ok(segment)) = (set, usize::try_from(culprit)) {
                return Ok(format!("gradient of {}", set.segment_name(segment)));
            }
        }
        Ok("the norm of the gradients, whose sum of squares overflowed".to_string())
    }

    fn read_profile(&mut self, step: u64, events: &mut Vec<Event>) -> Result<(), TrainError> {
        let Some(predictors) = &self.model.predictors else { return Ok(()) };
        let needed = self.engine.read_f32(predictors.needed)?;
        let covered = self.engine.read_f32(predictors.covered)?;
        let recall = self.engine.read_f32(predictors.recall)?;
        if needed.iter().chain(&covered).chain(&recall).all(|x| x.is_finite()) {
            self.profile.observe(self.model.shape.heads, &needed, &covered, &recall);
        }
        if self.stages.stage() == Stage::Dense {
            self.decide(Decision::dense)?;
        }
        events.push(Event::Profile { step, profile: self.profile.clone() });
        Ok(())
    }

    /// Everything a resumed run needs: the state, and every flat buffer on the host, for
    /// [`Snapshot::tensors`].
    pub fn snapshot(
        &mut self,
        position: DataPosition,
        events: &mut Vec<Event>,
    ) -> Result<Snapshot, TrainError> {
        self.flush(events)?;
        self.average();
        let more = More {
            stages: self.stages,
            profile: self.profile.clone(),
            decision: self.decision.clone(),
            other_decisions: self.others.iter().map(|(_, decision)| decision.clone()).collect(),
            predictor_loss: self.predictor_loss.filter(|x| x.is_finite()),
            skipped_in_a_row: self.skipped_in_a_row,
            good_steps: self.good_steps,
            list_slots: self.slots(),
            cube: self.cube,
        };
        let state = State {
            step: self.step,
            stage: u32::from(self.stages.stage().number()),
            position,
            fingerprint: self.config.fingerprint(),
            config: self.config.documented_toml(),
            more: serde_json::to_value(more).expect("finite numbers and names have a JSON form"),
        };
        let mut tensors = Vec::new();
        for set in sets(&self.model) {
            for (prefix, flat) in set.flats() {
                for (id, spec) in set.specs() {
                    let values = set.read(&mut *self.engine, flat, id)?;
                    tensors.push((format!("{prefix}.{}", spec.name), spec.shape.clone(), values));
                }
            }
        }
        Ok(Snapshot { state, tensors })
    }

    /// Losses of the validation triples with the averaged weights (where the run keeps them) and the attention of the
    /// present stage.
    pub fn evaluate(&mut self, data: &Dataset) -> Result<EvalResult, crate::run::RunError> {
        self.average();
        let attention = self.decision.attention();
        let (model, config, step) = (&self.model, &self.config, self.step);
        eval::with_averaged(&mut *self.engine, model, |engine| {
            eval::evaluate(engine, model, config, data, &attention, step)
        })?
    }

    /// What the attention of every block looks like on a held-out clip.
    pub fn observe(&mut self, data: &Dataset) -> Result<Vec<BlockObservation>, crate::run::RunError> {
        self.average();
        let attention = self.decision.attention();
        let (model, config) = (&self.model, &self.config);
        eval::with_averaged(&mut *self.engine, model, |engine| {
            observe::observe(engine, model, config, data, &attention)
        })?
    }

    fn load_tensors(&mut self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        load_tensors(&mut *self.engine, &self.model, checkpoint)
    }
}

/// Writes a checkpoint's tensors to a model's buffers (those the model has: an inference layout has no moments) and
/// refreshes its compute copies.
pub fn load_tensors(
    engine: &mut dyn Engine,
    model: &Model,
    checkpoint: &Checkpoint,
) -> Result<(), TrainError> {
    let path = checkpoint.path.display().to_string();
    for set in sets(model) {
        for (prefix, flat) in set.flats() {
            for (id, spec) in set.specs() {
                let name = format!("{prefix}.{}", spec.name);
                let problem =
                    |problem: String| TrainError::Tensor { path: path.clone(), name: name.clone(), problem };
                let view = checkpoint.tensors.get(&name).ok_or_else(|| problem("is missing".into()))?;
                if view.shape != spec.shape {
                    let shapes = format!("has shape {:?}, this run needs {:?}", view.shape, spec.shape);
                    return Err(problem(shapes));
                }
                let values =
                    view.to_f32().map_err(|dtype| problem(format!("has dtype {dtype:?}, not F32")))?;
                set.write(engine, flat, id, &values)?;
            }
        }
        set.refresh(engine)?;
    }
    Ok(())
}

/// The parameters of a run: the model's, then the predictors'.
fn sets(model: &Model) -> impl Iterator<Item = &ParamSet> {
    [Some(&model.params), model.predictors.as_ref().map(|p| &p.params)].into_iter().flatten()
}

/// The cube of a run that has chosen one, or none yet: as configured where lists of another size are asked for now.
pub(crate) fn cube_of(config: &Config, chosen: Option<Cube>) -> Cube {
    let first = config.first_cube();
    match config.dsv.cube {
        Some(config::CubeChoice::Auto) => {
            chosen.filter(|cube| cube.tokens() == first.tokens()).unwrap_or(first)
        }
        _ => first,
    }
}

/// How a checkpoint's model attends.
pub(crate) struct Attends {
    /// Each block.
    pub(crate) attention: Vec<BlockAttention>,
    /// KV blocks each head keeps, `[layers * heads]`.
    pub(crate) top_k: Vec<i32>,
    /// List buffers needed.
    pub(crate) list_slots: usize,
    /// The cube that was chosen, once it was.
    pub(crate) cube: Option<Cube>,
}

/// How a checkpoint's model attends.
pub(crate) fn attention_of(checkpoint: &Checkpoint) -> Result<Attends, TrainError> {
    let More { decision, list_slots, cube, .. } = serde_json::from_value(checkpoint.state.more.clone())
        .map_err(|e| TrainError::State {
            path: checkpoint.path.display().to_string(),
            problem: e.to_string(),
        })?;
    Ok(Attends { attention: decision.attention(), top_k: decision.top_k(), list_slots, cube })
}

/// A run on the host.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// All but tensors.
    pub state: State,
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl Snapshot {
    /// The tensors, for [`crate::checkpoint::save`].
    pub fn tensors(&self) -> Vec<TensorView<'_>> {
        self.tensors.iter().map(|(name, shape, data)| TensorView::f32(name.clone(), shape, data)).collect()
    }
}

/// Writes clips, their times, noise keys and dropped captions; `first` is the number of clips the run used before.
fn write_clips(
    e: &mut dyn Engine,
    model: &Model,
    clips: &[Clip],
    config: &Config,
    first: u64,
) -> Result<(), EngineError> {
    let (seed, flow) = (config.train.seed, &config.flow);
    let positions: Vec<u64> = (0..clips.len() as u64).map(|i| first + i).collect();
    let t = |&p: &u64| {
        let z = rng::normal(seed, Purpose::Time, p);
        rng::flow_time(z, flow.logit_mean, flow.logit_std, flow.shift) as f32
    };
    let dropped =
        |&p: &u64| i32::from(rng::uniform(seed, Purpose::Caption, p) < config.train.caption_dropout);
    let io = &model.io;
    e.write_f32(io.t, &positions.iter().map(t).collect::<Vec<_>>())?;
    e.write_i32(io.drop, &positions.iter().map(dropped).collect::<Vec<_>>())?;
    let keys: Vec<i32> =
        positions.iter().flat_map(|&p| rng::key(seed, Purpose::Noise, p).map(|k| k as i32)).collect();
    e.write_i32(io.keys, &keys)?;
    write_latents_and_text(e, model, clips)
}

/// Writes latents and text of one batch.
pub(crate) fn write_latents_and_text(
    e: &mut dyn Engine,
    model: &Model,
    clips: &[Clip],
) -> Result<(), EngineError> {
    e.write_f32(model.io.latents, &clips.iter().flat_map(|c| &c.latents).copied().collect::<Vec<_>>())?;
    e.write_f32(model.io.text, &clips.iter().flat_map(|c| &c.text).copied().collect::<Vec<_>>())
}

/// Queries to profile in a step, one random query from each of as many equal ranges, where the model has predictors.
pub(crate) fn write_samples(
    e: &mut dyn Engine,
    seed: u64,
    step: u64,
    model: &Model,
) -> Result<(), EngineError> {
    let Some(predictors) = &model.predictors else { return Ok(()) };
    let tokens = model.shape.patch.tokens() as f64;
    let len = predictors.samples.len();
    let samples: Vec<i32> = (0..len)
        .map(|i| {
            let u = rng::uniform(seed, Purpose::Profile, step * len as u64 + i as u64);
            ((i as f64 + u) / len as f64 * tokens) as i32
        })
        .collect();
    e.write_i32(predictors.samples, &samples)
}

/// Norm of a set's gradients.
pub(crate) fn norm(e: &mut dyn Engine, set: &ParamSet, max_norm: f32, clip: Buf, culprit: Buf) {
    let state = set.state();
    e.grad_norm(&GradNorm { grad: state.grad, segments: state.segments, max_norm, clip, culprit });
}

/// AdamW on a range of a set; `step` counts from 1.
pub(crate) fn adamw(
    e: &mut dyn Engine,
    t: &config::Train,
    set: &ParamSet,
    range: Range<usize>,
    [lr, weight_decay]: [f32; 2],
    step: u64,
    clip: Buf,
) {
    let grad = set.state().grad;
    let [beta1, beta2] = t.betas.map(|b| b as f32);
    set.with_moments(e, range, &mut |e, at, moments| {
        let part = |buf: Buf| buf.slice(at.start, at.len());
        e.adamw(&AdamW {
            master: part(set.master),
            grad: part(grad),
            moments,
            first: at.start,
            copy: part(set.copy),
            lr,
            beta1,
            beta2,
            eps: t.eps as f32,
            weight_decay,
            step,
            clip,
        });
    });
}

/// What decides the ops of a forward and backward pass within one run.
fn repeat_key(grid: u32, task: PredictorTask, attention: &[BlockAttention]) -> Vec<u32> {
    let mode = |a: &BlockAttention| match *a {
        BlockAttention::Dense => 0,
        BlockAttention::Window => 1,
        BlockAttention::Sparse { slot } => 2 + slot as u32,
    };
    [grid, u32::from(task.train), u32::from(task.profile)]
        .into_iter()
        .chain(attention.iter().map(mode))
        .collect()
}

/// What the dispatcher may rest on.
pub(crate) fn rules(config: &Config, engine: &dyn DeviceFacts, model: &Model, slots: usize) -> Rules {
    let dsv = &config.dsv;
    let cost = engine.sparse_cost(&model.shape.self_attn(), dsv.query_group, dsv.kv_block);
    let (crossover, crossover_source) = match cost {
        Some(cost) => (f64::from(cost.crossover_sparsity), cost.source),
        None => (dsv.min_sparsity, "dsv.min_sparsity".to_string()),
    };
    Rules {
        layers: config.model.layers,
        heads: config.model.heads,
        kv_blocks: model.shape.patch.tokens().div_ceil(dsv.kv_block),
        max_selected: model.shape.predictor.map_or(config.max_selected(), |p| p.lists.max_selected),
        least: model.shape.predictor.and_then(|p| p.keep_window).map_or(1, |w| w.widest),
        keep: dsv.keep,
        share: dsv.share,
        crossover,
        crossover_source,
        force_sparse: if dsv.attention == Attention::Fixed { Some(1.0) } else { dsv.force_sparse },
        slots,
    }
}

#[cfg(test)]
mod tests;
