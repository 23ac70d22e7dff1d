//! A whole run: data ahead of the device, steps, evaluations, checkpoints, and what is left in the
//! output folder. It talks to an [`Observer`]; it prints nothing.

use crate::checkpoint::{self, Checkpoint, CheckpointError};
use crate::config::{Config, ConfigError};
use crate::data::ahead::ahead;
use crate::data::{Clip, DataError, DataPosition, Dataset, Video};
use crate::durable::{RealDisk, write_file};
use crate::engine::{Engine, EngineError, Space};
use crate::eval::{self, EvalResult};
use crate::granularity::MeasureError;
use crate::import::{self, ImportError, Imported};
use crate::model::{BlockAttention, Model, ModelShape, Purposes};
use crate::observe::BlockObservation;
use crate::sample;
use crate::tensors::{self, TensorView};
use crate::train::{self, Attends, Event, TrainError, Trainer};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Why a run, an evaluation or a sample failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The device.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Weights to begin with.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The mass that lists cover.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// A measurement on held-out clips, of which there are none.
    #[error(
        "no clip is held out: data.validation is 0, as it was when the run began\n  next: train a run that holds some out, --set data.validation=8"
    )]
    NothingHeldOut,
    /// A file of the output folder.
    #[error(
        "cannot write {path}: {source}\n  next: free space on that disk or choose another folder (--out DIR), then dsv-train run --resume"
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The folder already holds a run.
    #[error(
        "{path} already holds a run up to step {step}\n  to go on with it:  dsv-train run --resume --out {path}\n  to begin anew:     dsv-train run --overwrite --out {path}   (or choose another --out)"
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// Its newest checkpoint.
        step: u64,
    },
    /// The step to stop after is none that is to come.
    #[error(
        "--until is {until}; {from} of {steps} steps (train.steps) are done\n  allowed: {}\n  next: choose one of these, or leave --until away",
        if from < steps { format!("{} to {steps}", from + 1) } else { format!("none, before --set train.steps is above {steps}") }
    )]
    Until {
        /// The step asked for.
        until: u64,
        /// Steps done before.
        from: u64,
        /// `train.steps`.
        steps: u64,
    },
    /// The checkpoint was made by another model or data.
    #[error("checkpoint {path} belongs to another run; it differs in\n  {}\n  next: resume with {config}, or choose another --out", differences.join("\n  "))]
    Foreign {
        /// The checkpoint.
        path: PathBuf,
        /// `section.key: here -> there`.
        differences: Vec<String>,
        /// The configuration the run began with.
        config: PathBuf,
    },
    /// Nothing to resume, evaluate or sample from.
    #[error("no checkpoint in {path}{}\n  next: dsv-train run --out DIR writes one there (train.checkpoint_every, and at the end)", .rejected.iter().map(|r| format!("\n  not usable: {r}")).collect::<String>())]
    NoCheckpoint {
        /// The folder looked in.
        path: PathBuf,
        /// Checkpoints that are not valid, with the reason.
        rejected: Vec<String>,
    },
}

/// What a run tells while it goes on.
#[derive(Clone, Debug)]
pub enum Progress {
    /// The run is set up.
    Started {
        /// First step to do.
        step: u64,
        /// The step after which it stops.
        steps: u64,
        /// The device.
        engine: String,
        /// Newer checkpoints that were passed over, with the reason.
        rejected: Vec<String>,
    },
    /// Weights trained elsewhere were written before the first step.
    Imported(Imported),
    /// A step, a stage, a decision or a profile.
    Train(Event),
    /// Speed since the last reading, told before the steps it is about.
    Speed {
        /// Video tokens a second.
        tokens_per_second: f64,
        /// Milliseconds a step.
        step_ms: f64,
        /// The last step it is about.
        step: u64,
    },
    /// A validation.
    Eval(EvalResult),
    /// What the attention looks like at the end of the run.
    Observed {
        /// Optimizer steps done.
        step: u64,
        /// Every block.
        blocks: Vec<BlockObservation>,
    },
    /// A sample was made of the finished run.
    Sampled {
        /// Optimizer steps done.
        step: u64,
        /// How fast the model was evaluated for it.
        speed: sample::Speed,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Its folder.
        path: PathBuf,
        /// Its step.
        step: u64,
    },
}

/// Listens to a run.
pub trait Observer {
    /// Called in the order things happen.
    fn on(&mut self, progress: &Progress) -> std::io::Result<()>;
}

impl<F: FnMut(&Progress) -> std::io::Result<()>> Observer for F {
    fn on(&mut self, progress: &Progress) -> std::io::Result<()> {
        self(progress)
    }
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Optimizer steps done.
    pub step: u64,
    /// Whether it was asked to stop before its last step.
    pub interrupted: bool,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// The sample, when the run finished.
    pub sample: Option<PathBuf>,
}

/// What to do about an output folder that holds a run.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It is an error.
    Refuse,
    /// Go on from its newest valid checkpoint.
    Resume,
    /// Delete its checkpoints and begin anew.
    Overwrite,
}

/// Folder of the checkpoints of a run.
pub fn checkpoints(out: &Path) -> PathBuf {
    out.join("checkpoints")
}

/// The step after which a run of so many done steps stops.
fn last_step(config: &Config, until: Option<u64>, from: u64) -> Result<u64, RunError> {
    let steps = config.train.steps;
    match until {
        Some(until) if until <= from || until > steps => Err(RunError::Until { until, from, steps }),
        _ => Ok(until.unwrap_or(steps)),
    }
}

/// Trains to `train.steps`, or to the step `until`, or until `stop` is set; in any case the last state is on disk when this
/// returns.
pub fn run(
    config: &Config,
    engine: Box<dyn Engine>,
    existing: Existing,
    until: Option<u64>,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Outcome, RunError> {
    let out = config.out.dir.clone();
    let root = checkpoints(&out);
    if existing != Existing::Resume {
        // Before anything is deleted.
        last_step(config, until, 0)?;
    }
    let data = Dataset::open(config)?;
    let mut rejected = Vec::new();
    let found = match existing {
        Existing::Resume => {
            let latest = checkpoint::latest(&root)?;
            rejected.extend(latest.rejected.iter().map(|r| format!("{}: {}", r.path.display(), r.reason)));
            let none = || RunError::NoCheckpoint { path: root.clone(), rejected: rejected.clone() };
            Some(latest.checkpoint.ok_or_else(none)?)
        }
        Existing::Refuse => match checkpoint::steps(&root)?.last() {
            Some((step, _)) => return Err(RunError::Occupied { path: out, step: *step }),
            None => None,
        },
        Existing::Overwrite => {
            for (_, path) in checkpoint::steps(&root)? {
                std::fs::remove_dir_all(&path).map_err(|source| RunError::Write { path, source })?;
            }
            None
        }
    };
    let last = last_step(config, until, found.as_ref().map_or(0, |c| c.state.step))?;
    let write = |path: PathBuf| move |source| RunError::Write { path, source };
    let config_file = out.join("config.toml");
    let name = engine.name();
    let (mut trainer, position) = match &found {
        Some(checkpoint) => {
            check_fingerprint(config, checkpoint, &config_file)?;
            (Trainer::resume(config.clone(), engine, checkpoint)?, checkpoint.state.position)
        }
        None => (Trainer::new(config.clone(), engine)?, DataPosition::default()),
    };
    drop(found);
    write_file(&RealDisk, &config_file, |f| f.write_all(config.documented_toml().as_bytes()))
        .map_err(write(config_file.clone()))?;
    let mut session = Session { config, data: &data, out: &out, observer, read_back: None };
    session.tell(Progress::Started { step: trainer.step_number(), steps: last, engine: name, rejected })?;
    if let (Existing::Refuse | Existing::Overwrite, Some(weights)) = (existing, &config.train.init_weights) {
        let model = trainer.model.clone();
        let found = import::import(trainer.engine(), &model, weights, config.train.init_map.as_deref())?;
        session.tell(Progress::Imported(found))?;
    }
    if trainer.step_number() == 0 {
        session.evaluate(&mut trainer)?;
    }
    session.train(&mut trainer, position, last, stop)
}

fn check_fingerprint(config: &Config, checkpoint: &Checkpoint, file: &Path) -> Result<(), RunError> {
    let differences = match Config::from_toml(&checkpoint.state.config, "the checkpoint", None, &[]) {
        Ok(theirs)
            if checkpoint.state.fingerprint == config.fingerprint()
                && theirs.dsv.attention == config.dsv.attention =>
        {
            return Ok(());
        }
        Ok(theirs) => config.differences(&theirs),
        Err(e) => vec![format!("(its configuration cannot be read: {e})")],
    };
    Err(RunError::Foreign { path: checkpoint.path.clone(), differences, config: file.to_path_buf() })
}

struct Session<'a> {
    config: &'a Config,
    data: &'a Dataset,
    out: &'a Path,
    observer: &'a mut dyn Observer,
    /// When the last step was read back.
    read_back: Option<Instant>,
}

impl Session<'_> {
    fn tell(&mut self, progress: Progress) -> Result<(), RunError> {
        self.observer.on(&progress).map_err(|source| RunError::Write { path: self.out.to_path_buf(), source })
    }

    /// Passes events on, with the speed of the steps among them.
    fn tell_all(&mut self, events: &mut Vec<Event>) -> Result<(), RunError> {
        let steps: Vec<(u64, u64)> = events
            .iter()
            .filter_map(|e| if let Event::Step(r) = e { Some((r.step, r.tokens)) } else { None })
            .collect();
        if let Some(&(step, _)) = steps.last() {
            let now = Instant::now();
            if let Some(before) = self.read_back.replace(now) {
                let all = (now - before).as_secs_f64();
                let seconds = all / steps.len() as f64;
                let tokens_per_second = steps.iter().map(|s| s.1).sum::<u64>() as f64 / all;
                self.tell(Progress::Speed { tokens_per_second, step_ms: 1e3 * seconds, step })?;
            }
        }
        for event in events.drain(..) {
            self.tell(Progress::Train(event))?;
        }
        Ok(())
    }

    fn evaluate(&mut self, trainer: &mut Trainer) -> Result<(), RunError> {
        if self.data.validation_len() == 0 {
            return Ok(());
        }
        let mut events = Vec::new();
        trainer.flush(&mut events)?;
        self.tell_all(&mut events)?;
        let result = trainer.evaluate(self.data)?;
        self.tell(Progress::Eval(result))?;
        // The evaluation's time is not the steps'.
        self.read_back = self.read_back.map(|_| Instant::now());
        Ok(())
    }

    fn save(&mut self, trainer: &mut Trainer, position: DataPosition) -> Result<PathBuf, RunError> {
        let mut events = Vec::new();
        let snapshot = trainer.snapshot(position, &mut events)?;
        self.tell_all(&mut events)?;
        let keep = self.config.train.keep_checkpoints;
        let path = checkpoint::save(&checkpoints(self.out), &snapshot.state, &snapshot.tensors(), keep)?;
        self.tell(Progress::Checkpoint { path: path.clone(), step: snapshot.state.step })?;
        self.read_back = self.read_back.map(|_| Instant::now());
        Ok(path)
    }

    fn train(
        mut self,
        trainer: &mut Trainer,
        mut position: DataPosition,
        last: u64,
        stop: &AtomicBool,
    ) -> Result<Outcome, RunError> {
        let t = &self.config.train;
        let steps = t.steps;
        let per_step = trainer.clips_per_step();
        let left = last.saturating_sub(trainer.step_number());
        let data = self.data;
        let mut saved_at = None;
        let readers = [self.config.data.readers, self.config.data.read_ahead];
        let begin = position;
        let read = move |step: u64| {
            let mut at = begin.after(step * per_step as u64, data.len());
            (data.next_batch(&mut at, per_step), at)
        };
        let failed = |(clips, _): &(Result<Vec<Clip>, DataError>, DataPosition)| clips.is_err();
        ahead(readers, left, read, failed, |mut batches| -> Result<(), RunError> {
            let mut events = Vec::new();
            let mut due = false;
            self.read_back = Some(Instant::now());
            while trainer.step_number() < last && !stop.load(Ordering::Relaxed) {
                let Some((clips, after)) = batches.next() else { break };
                let result = trainer.step(&clips?, &mut events);
                self.tell_all(&mut events)?;
                result?;
                position = after;
                let done = trainer.step_number();
                if t.eval_every > 0 && done.is_multiple_of(t.eval_every) && done < steps {
                    self.evaluate(trainer)?;
                }
                due |= t.checkpoint_every > 0 && done.is_multiple_of(t.checkpoint_every) && done < steps;
                if due {
                    let read = trainer.flush(&mut events);
                    self.tell_all(&mut events)?;
                    read?;
                    // While steps are skipped the last good checkpoint stays the newest: it waits for a good step.
                    if trainer.skipped_in_a_row() == 0 {
                        saved_at = Some(self.save(trainer, position)?);
                        due = false;
                    }
                }
            }
            Ok(())
        })?;
        let interrupted = trainer.step_number() < steps;
        if !interrupted {
            self.evaluate(trainer)?;
            let blocks = trainer.observe(data)?;
            self.tell(Progress::Observed { step: trainer.step_number(), blocks })?;
        }
        let checkpoint = match saved_at {
            Some(path) if path == checkpoint::folder(&checkpoints(self.out), trainer.step_number()) => path,
            _ => self.save(trainer, position)?,
        };
        let sample = if interrupted { None } else { Some(self.sample(trainer)?) };
        Ok(Outcome { step: trainer.step_number(), interrupted, checkpoint, sample })
    }

    /// Samples under the captions of the first held-out clips (or training clips, where none are held out).
    fn sample(&mut self, trainer: &mut Trainer) -> Result<PathBuf, RunError> {
        let batch = self.config.data.batch_size;
        let texts = texts_of(self.data, batch)?;
        let attention = trainer.decision().attention();
        let (model, config) = (trainer.model.clone(), self.config);
        let seed = config.train.seed;
        let (latents, speed) = eval::with_averaged(trainer.engine(), &model, |engine| {
            let latents = sample::sample(engine, &model, config, &texts, seed, &attention, |_| ())?;
            Ok::<_, EngineError>((latents, sample::speed(engine, &model, &attention)?))
        })??;
        self.tell(Progress::Sampled { step: trainer.step_number(), speed })?;
        write_sample(self.data, config, &latents, self.out)
    }
}

/// Texts of the first clips to sample for.
pub fn texts_of(data: &Dataset, count: usize) -> Result<Vec<Vec<f32>>, RunError> {
    (0..count)
        .map(|i| {
            let clip = if data.validation_len() > 0 {
                data.validation_clip(i % data.validation_len())?
            } else {
                data.train_clip(DataPosition { epoch: 0, index: (i % data.len()) as u64 })?
            };
            Ok(clip.text)
        })
        .collect()
}

/// Writes `sample.gif`, clips side by side, where the latents can be decoded here, else `sample.safetensors` with
/// `latents [clips, C, T, H, W]`.
pub fn write_sample(
    data: &Dataset,
    config: &Config,
    latents: &[Vec<f32>],
    out: &Path,
) -> Result<PathBuf, RunError> {
    let videos: Option<Vec<Video>> =
        latents.iter().map(|l| data.codec().decode(l, config.latent_shape())).collect();
    let (path, result) = match videos.as_deref().map(beside) {
        Some(Some(video)) => {
            let path = out.join("sample.gif");
            let zoom = (256 / video.height.max(1)).max(1);
            let result = crate::gif::write(&path, &video, config.sample.fps, zoom);
            (path, result)
        }
        _ => {
            let path = out.join("sample.safetensors");
            let [c, t, h, w] = config.latent_shape();
            let flat = latents.concat();
            let tensor = TensorView::f32("latents", &[latents.len(), c, t, h, w], &flat);
            let metadata = BTreeMap::from([("codec".to_string(), data.codec().label())]);
            let result = write_file(&RealDisk, &path, |f| tensors::write(f, &[tensor], &metadata));
            (path, result)
        }
    };
    result.map_err(|source| RunError::Write { path: path.clone(), source })?;
    Ok(path)
}

/// Videos of one size in a row, one dark column between them.
fn beside(videos: &[Video]) -> Option<Video> {
    let first = videos.first()?;
    let (frames, height, one) = (first.frames, first.height, first.width);
    let width = videos.len() * (one + 1) - 1;
    let mut rgb = vec![16u8; frames * height * width * 3];
    for (i, video) in videos.iter().enumerate() {
        for row in 0..frames * height {
            let from = row * one * 3;
            let to = (row * width + i * (one + 1)) * 3;
            rgb[to..to + one * 3].copy_from_slice(&video.rgb[from..from + one * 3]);
        }
    }
    Some(Video { frames, height, width, rgb })
}

/// A trained model laid out for inference.
pub struct Inference {
    /// The device.
    pub engine: Box<dyn Engine>,
    /// The model's handles.
    pub model: Model,
    /// The run's configuration, with the caller's `[sample]` and `[device]`.
    pub config: Config,
    /// How its blocks attended when the checkpoint was made.
    pub attention: Vec<BlockAttention>,
    /// Optimizer steps of the weights.
    pub step: u64,
}

/// Opens the newest valid checkpoint under `out` (or `at`, one checkpoint's folder) for `batch` clips at a time.
/// `sets` are `section.key=value` on top of the run's configuration.
pub fn open_trained(
    out: &Path,
    at: Option<&Path>,
    batch: usize,
    sets: &[String],
) -> Result<Inference, RunError> {
    let root = checkpoints(out);
    let found = match at {
        Some(path) => checkpoint::open(path)?,
        None => {
            let latest = checkpoint::latest(&root)?;
            let rejected = latest.rejected.iter().map(|r| format!("{}: {}", r.path.display(), r.reason));
            let rejected: Vec<String> = rejected.collect();
            latest.checkpoint.ok_or(RunError::NoCheckpoint { path: root, rejected })?
        }
    };
    let config = Config::from_toml(&found.state.config, "the checkpoint", None, sets)?;
    check_fingerprint(&config, &found, &out.join("config.toml"))?;
    let mut engine = crate::engine::open(&config.device, config.train.deterministic)?;
    let Attends { attention, top_k, list_slots, cube } = train::attention_of(&found)?;
    let mut plan = crate::engine::ArenaPlan::new(engine.precision());
    let ema = (config.train.ema_decay > 0.0).then_some(Space::Device);
    let purposes = Purposes { ema, list_slots, ..Purposes::INFERENCE };
    let mut shape = ModelShape::from_config(&config, batch);
    shape.cube = train::cube_of(&config, cube);
    let model = Model::reserve(shape, purposes, &mut plan);
    engine.reserve(&plan, &model.shape.dims(model.params.master.len()))?;
    model.initialise(&mut *engine, config.train.seed)?;
    train::load_tensors(&mut *engine, &model, &found)?;
    if let Some(predictors) = &model.predictors {
        engine.write_i32(predictors.top_k, &top_k)?;
    }
    Ok(Inference { engine, model, config, attention, step: found.state.step })
}

#[cfg(test)]
mod tests;
