//! Turns what a run tells into metrics records, TensorBoard events and the live progress line.

use crate::config::Config;
use crate::dispatch::Decision;
use crate::metrics::{Metrics, MetricsError, Progress as Bar, Record, StepMetrics};
use crate::model::BlockAttention;
use crate::run::{Observer, Progress};
use crate::stage::{LOSS_CRITERION, Reason};
use crate::train::Event;
use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

/// Writes a run's metrics and shows its progress. Opens its files when the run says where it starts.
pub struct Recorder<'a> {
    config: &'a Config,
    metrics: Option<Metrics>,
    bar: Option<Bar>,
    began: Instant,
    speed: (f64, f64),
    /// Which blocks were sparse when that was last said.
    sparse: Vec<bool>,
}

impl<'a> Recorder<'a> {
    /// A recorder for one run.
    pub fn new(config: &'a Config) -> Recorder<'a> {
        Recorder {
            config,
            metrics: None,
            bar: None,
            began: Instant::now(),
            speed: (0.0, 0.0),
            sparse: Vec::new(),
        }
    }

    /// Leaves the terminal tidy.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.say(line),
            None => eprintln!("{line}"),
        }
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        match &mut self.metrics {
            Some(metrics) => metrics.write(record).map_err(to_io),
            None => Ok(()),
        }
    }

    fn start(&mut self, step: u64, steps: u64, engine: &str, rejected: &[String]) -> io::Result<()> {
        let config = self.config;
        let resume = (step > 0).then_some(step);
        self.metrics = Some(Metrics::open(&config.out.dir, resume).map_err(to_io)?);
        let facts = BTreeMap::from([
            ("device".to_string(), engine.to_string()),
            ("attention".to_string(), config.dsv.attention.label().to_string()),
            ("tokens a clip".to_string(), config.tokens().to_string()),
            ("block size".to_string(), format!("{} x {}", config.dsv.query_group, config.dsv.kv_block)),
        ]);
        let title = config.out.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.write(&Record::Run { step, title, config: config.documented_toml(), facts })?;
        self.say(&format!("{engine}; {} tokens a clip; steps {step} to {steps}", config.tokens()));
        for line in rejected {
            let text = format!("passed over a checkpoint that is not usable: {line}");
            self.say(&text);
            self.write(&Record::Note { step, text })?;
        }
        self.bar = Some(Bar::new(step, steps, (steps / 20).max(1)));
        Ok(())
    }

    fn train(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Step(r) => {
                let m = StepMetrics {
                    step: r.step,
                    wall_s: self.began.elapsed().as_secs_f64(),
                    stage: u32::from(r.stage),
                    loss: r.loss,
                    lr: r.lr,
                    grad_norm: r.grad_norm,
                    step_ms: self.speed.1,
                    tokens_per_s: self.speed.0,
                    predictor_loss: r.predictor_loss.filter(|x| x.is_finite()),
                    predictor_loss_by_block: r.predictor_loss_by_block.clone(),
                    sparse_share: r.sparse_share,
                    skipped: r.skipped.clone(),
                };
                if let Some(tensor) = &r.skipped {
                    self.say(&format!("step {} skipped: not finite: {tensor} (loss {})", r.step, r.loss));
                }
                if let Some(bar) = &self.bar {
                    bar.step(&m);
                }
                self.write(&Record::Step(m))
            }
            Event::Stage { step, reason, predictor_loss } => {
                let reason = match reason {
                    Reason::Step(at) => format!("dsv.switch = {at}; {}", criterion(*predictor_loss)),
                    Reason::Loss { loss, below } => format!("predictor loss {loss:.4} < {below}"),
                };
                self.say(&format!("stage 2 from step {step}: {reason}"));
                self.write(&Record::Stage { step: *step, stage: 2, reason })
            }
            Event::Cube { step, choice } => {
                self.say(&format!("cube from step {step}: {}", choice.why));
                self.write(&Record::Cube { step: *step, choice: choice.clone() })
            }
            Event::Decision { step, decision } => {
                let sparse: Vec<bool> =
                    decision.blocks.iter().map(|b| b.attention != BlockAttention::Dense).collect();
                let count = sparse.iter().filter(|s| **s).count();
                if self.sparse != sparse {
                    let kept = kept(decision);
                    self.say(&format!("step {step}: {count} of {} blocks sparse{kept}", sparse.len()));
                    self.sparse.clone_from(&sparse);
                }
                self.write(&Record::Dispatch {
                    step: *step,
                    sparse,
                    skipped: decision.blocks.iter().map(|b| b.skipped).collect(),
                    top_k: decision.blocks.iter().map(|b| b.top_k.clone()).collect(),
                    why: decision.blocks.iter().map(|b| b.why.clone()).collect(),
                })
            }
            Event::Transfers { step, steps, moved } => {
                self.write(&Record::Transfers { step: *step, steps: *steps, moved: *moved })
            }
            Event::Profile { step, profile } => {
                let sparsity = profile.needed.iter().map(|h| h.iter().map(|n| 1.0 - n).collect()).collect();
                let (covered, recall) = (profile.covered.clone(), profile.recall.clone());
                self.write(&Record::Profile { step: *step, sparsity, covered, recall })
            }
        }
    }
}

/// What the lists of the sparse blocks keep, mean and range; nothing where none is sparse.
fn kept(decision: &Decision) -> String {
    let sparse = decision.blocks.iter().filter(|b| b.attention != BlockAttention::Dense);
    let kept: Vec<f64> = sparse.map(|b| 100.0 * (1.0 - b.skipped)).collect();
    let (least, most) = kept.iter().fold((f64::INFINITY, 0.0f64), |(a, b), &x| (a.min(x), b.max(x)));
    let mean = kept.iter().sum::<f64>() / kept.len() as f64;
    match kept.is_empty() {
        true => String::new(),
        false if most - least < 0.05 => format!(", {mean:.1} % of the KV kept"),
        false => format!(", {mean:.1} % of the KV kept ({least:.1} to {most:.1} % by block)"),
    }
}

/// What the loss criterion says where the switch was set by step.
fn criterion(predictor_loss: Option<f64>) -> String {
    match predictor_loss {
        Some(loss) if loss < LOSS_CRITERION => {
            format!("predictor loss {loss:.4}, so the loss criterion (< {LOSS_CRITERION}) holds too")
        }
        Some(loss) => format!("predictor loss {loss:.4}, above the loss criterion (< {LOSS_CRITERION})"),
        None => "no predictor loss was read yet".to_string(),
    }
}

fn to_io(error: MetricsError) -> io::Error {
    match error {
        MetricsError::Io { source, path } => {
            io::Error::new(source.kind(), format!("{}: {source}", path.display()))
        }
        line @ (MetricsError::Line { .. } | MetricsError::Granularity { .. }) => {
            io::Error::new(io::ErrorKind::InvalidData, line.to_string())
        }
    }
}

impl Observer for Recorder<'_> {
    fn on(&mut self, progress: &Progress) -> io::Result<()> {
        match progress {
            Progress::Started { step, steps, engine, rejected } => {
                self.start(*step, *steps, engine, rejected)
            }
            Progress::Imported(found) => {
                let mut lines = vec![format!(
                    "weights of {}: {} parameters taken",
                    found.path.display(),
                    found.parameters
                )];
                for (what, names) in [
                    ("parameters not given, left at their initial values", &found.missing),
                    ("tensors of the file that no parameter took", &found.unmapped),
                ] {
                    if !names.is_empty() {
                        lines.push(format!("{} {what}: {}", names.len(), names.join(", ")));
                    }
                }
                for text in lines {
                    self.say(&text);
                    self.write(&Record::Note { step: 0, text })?;
                }
                Ok(())
            }
            Progress::Speed { tokens_per_second, step_ms, .. } => {
                self.speed = (*tokens_per_second, *step_ms);
                Ok(())
            }
            Progress::Train(event) => self.train(event),
            Progress::Eval(result) => {
                let loss = result.mean();
                self.say(&format!("validation after {} steps: {loss:.5}", result.step));
                self.write(&Record::Eval { step: result.step, loss, triples: result.triples.clone() })
            }
            Progress::Observed { step, blocks } => {
                self.write(&Record::Observed { step: *step, blocks: blocks.clone() })
            }
            Progress::Sampled { step, speed } => {
                let text = format!("sampling: {speed}");
                self.say(&text);
                self.write(&Record::Note { step: *step, text })
            }
            Progress::Checkpoint { path, step } => {
                let text = format!("checkpoint {}", path.display());
                self.write(&Record::Note { step: *step, text })
            }
        }
    }
}
