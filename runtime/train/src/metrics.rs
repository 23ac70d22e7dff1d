//! What a run tells while it runs: one JSON line per record (`metrics.jsonl`), TensorBoard events, and a
//! progress line.

use crate::durable::{RealDisk, write_file};
use crate::engine::Transfers;
use crate::granularity::ChosenCube;
use crate::observe::BlockObservation;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// File name of the JSON lines in a run's folder.
pub const FILE: &str = "metrics.jsonl";

/// One line of `metrics.jsonl`. Steps count from 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A run, or its resumption, begins.
    Run {
        /// First step to come.
        step: u64,
        /// Name in reports.
        title: String,
        /// The run as TOML.
        config: String,
        /// Anything a reader of the report should know: device, kernels, parameters, data.
        facts: BTreeMap<String, String>,
    },
    /// An optimizer step.
    Step(StepMetrics),
    /// Stage 2 begins with this step.
    Stage {
        /// The step.
        step: u64,
        /// The stage that begins.
        stage: u32,
        /// What ended the stage before.
        reason: String,
    },
    /// A cube of tokens was chosen (`dsv.cube = "auto"`).
    Cube {
        /// First step it holds for.
        step: u64,
        /// Which, and why.
        choice: ChosenCube,
    },
    /// The profiler looked.
    Profile {
        /// The step.
        step: u64,
        /// Share of KV that is not critical, `[layers][heads]`, smoothed.
        sparsity: Vec<Vec<f64>>,
        /// Attention mass that the predicted lists cover, `[layers][heads]`.
        covered: Vec<Vec<f64>>,
        /// Share of the critical KV that the predicted lists hold, `[layers][heads]`; empty in records that had none.
        #[serde(default)]
        recall: Vec<Vec<f64>>,
    },
    /// The dispatcher decided.
    Dispatch {
        /// First step it holds for.
        step: u64,
        /// Whether each block is sparse.
        sparse: Vec<bool>,
        /// Share of KV that each block's lists skip.
        skipped: Vec<f64>,
        /// KV blocks that each head keeps, `[layers][heads]`; empty rows for windows, no rows in records that had none.
        #[serde(default)]
        top_k: Vec<Vec<i32>>,
        /// One line for each block.
        why: Vec<String>,
    },
    /// What was copied between device and host.
    Transfers {
        /// The last step it is about.
        step: u64,
        /// Steps it is about.
        steps: u64,
        /// Bytes and milliseconds of all of them.
        #[serde(flatten)]
        moved: Transfers,
    },
    /// Validation on fixed (clip, timestep, noise) triples.
    Eval {
        /// Steps done before it.
        step: u64,
        /// Mean over the triples.
        #[serde(deserialize_with = "number_or_null")]
        loss: f64,
        /// Each triple, in the same order in every run.
        triples: Vec<EvalTriple>,
    },
    /// What the attention looks like at the end of a run.
    Observed {
        /// Steps done before it.
        step: u64,
        /// Every block.
        blocks: Vec<BlockObservation>,
    },
    /// Anything worth a line in the report: a checkpoint, a warning.
    Note {
        /// The step.
        step: u64,
        /// The line.
        text: String,
    },
}

/// An optimizer step in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step.
    pub step: u64,
    /// Seconds since the program began.
    pub wall_s: f64,
    /// 0 = full attention or windows, else 1 or 2.
    pub stage: u32,
    /// Mean flow-matching loss.
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// L2 norm of the gradient before clipping.
    #[serde(deserialize_with = "number_or_null")]
    pub grad_norm: f64,
    /// Milliseconds of the step.
    pub step_ms: f64,
    /// Video tokens a second.
    pub tokens_per_s: f64,
    /// Mean predictor loss over blocks and heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predictor_loss: Option<f64>,
    /// Mean predictor loss of each block.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub predictor_loss_by_block: Vec<f64>,
    /// Share of blocks whose attention was sparse.
    pub sparse_share: f64,
    /// Why the update was skipped, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// The loss of one validation triple.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalTriple {
    /// The clip.
    pub clip: String,
    /// Its timestep, 0 = data, 1 = noise.
    pub t: f64,
    /// Its loss.
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
}

/// JSON has no NaN: it is written as null and read back as NaN.
fn number_or_null<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(d)?.unwrap_or(f64::NAN))
}

impl Record {
    /// The step a record belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Record::Step(s) => s.step,
            Record::Run { step, .. }
            | Record::Stage { step, .. }
            | Record::Cube { step, .. }
            | Record::Profile { step, .. }
            | Record::Dispatch { step, .. }
            | Record::Transfers { step, .. }
            | Record::Eval { step, .. }
            | Record::Observed { step, .. }
            | Record::Note { step, .. } => *step,
        }
    }

    /// What TensorBoard shows of a record: tags and values.
    fn scalars(&self) -> Vec<(String, f64)> {
        let mean = |rows: &[Vec<f64>]| {
            let n = rows.iter().map(Vec::len).sum::<usize>().max(1);
            rows.iter().flatten().sum::<f64>() / n as f64
        };
        let by_block = |tag: &str, rows: &[Vec<f64>]| -> Vec<(String, f64)> {
            rows.iter()
                .enumerate()
                .map(|(b, row)| (format!("{tag}/block_{b:02}"), mean(std::slice::from_ref(row))))
                .collect()
        };
        match self {
            Record::Step(s) => {
                let mut out: Vec<(String, f64)> = [
                    ("train/loss", s.loss),
                    ("train/lr", s.lr),
                    ("train/grad_norm", s.grad_norm),
                    ("speed/tokens_per_s", s.tokens_per_s),
                    ("speed/step_ms", s.step_ms),
                    ("dsv/stage", f64::from(s.stage)),
                    ("dsv/sparse_share", s.sparse_share),
                ]
                .map(|(tag, value)| (tag.to_string(), value))
                .to_vec();
                if let Some(loss) = s.predictor_loss {
                    out.push(("dsv/predictor_loss".into(), loss));
                }
                let blocks = s.predictor_loss_by_block.iter().enumerate();
                out.extend(blocks.map(|(b, x)| (format!("predictor_loss/block_{b:02}"), *x)));
                out
            }
            Record::Profile { sparsity, covered, recall, .. } => {
                let mut out =
                    vec![("dsv/sparsity".into(), mean(sparsity)), ("dsv/covered_mass".into(), mean(covered))];
                out.extend(by_block("sparsity", sparsity));
                out.extend(by_block("covered_mass", covered));
                if !recall.is_empty() {
                    out.push(("dsv/recall".into(), mean(recall)));
                    out.extend(by_block("recall", recall));
                }
                out
            }
            Record::Dispatch { skipped, .. } => {
                let kept: Vec<Vec<f64>> = skipped.iter().map(|s| vec![1.0 - s]).collect();
                let mut out = vec![("dsv/kept".into(), mean(&kept))];
                out.extend(by_block("kept", &kept));
                out
            }
            Record::Eval { loss, .. } => vec![("eval/loss".into(), *loss)],
            Record::Transfers { steps, moved, .. } => {
                let each = |x: f64| x / *steps as f64;
                let mut out = vec![
                    ("host/copy_ms".into(), each(moved.copy_ms)),
                    ("host/waited_ms".into(), each(moved.waited_ms)),
                ];
                out.extend(moved.overlap().map(|share| ("host/overlap".into(), share)));
                out
            }
            Record::Run { .. }
            | Record::Stage { .. }
            | Record::Cube { .. }
            | Record::Observed { .. }
            | Record::Note { .. } => Vec::new(),
        }
    }
}

/// Reads `metrics.jsonl`. A last line cut short by a kill is dropped; damage anywhere else is an error.
pub fn read(path: &Path) -> Result<Vec<Record>, MetricsError> {
    let at = |source| MetricsError::Io { path: path.to_path_buf(), source };
    let mut lines = BufReader::new(File::open(path).map_err(at)?).split(b'\n').enumerate().peekable();
    let mut out = Vec::new();
    while let Some((i, line)) = lines.next() {
        let line = line.map_err(at)?;
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match serde_json::from_slice(&line) {
            Ok(record) => out.push(record),
            Err(_) if lines.peek().is_none() => break,
            Err(e) => {
                return Err(MetricsError::Line {
                    path: path.to_path_buf(),
                    line: i + 1,
                    reason: e.to_string(),
                });
            }
        }
    }
    Ok(out)
}

/// What is wrong with a run's metrics.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// They cannot be read or written.
    #[error(
        "cannot read or write the metrics {path}: {source}\n  next: check that the folder is a run's ([out] dir), and that its disk has space"
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What was measured of the run's granularity cannot be read.
    #[error(
        "{path} is no measurement: {reason}\n  next: measure anew, dsv-train granularity, or delete the file"
    )]
    Granularity {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A line is no record.
    #[error(
        "{path} line {line} is no metrics record: {reason}\n  next: delete that line, or train into another folder: dsv-train run --set out.dir=DIR"
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// Why.
        reason: String,
    },
}

/// Appends records to `metrics.jsonl` and to a TensorBoard event file in the same folder.
pub struct Metrics {
    path: PathBuf,
    lines: File,
    events: EventWriter<File>,
    events_path: PathBuf,
}

impl Metrics {
    /// Opens a run's folder. `resume` is `None` for a new run, whose `metrics.jsonl` replaces any old one, else the
    /// step that comes next: records of it and later ones (of a run killed after its checkpoint) are dropped, but
    /// for an eval made before that step.
    pub fn open(dir: &Path, resume: Option<u64>) -> Result<Metrics, MetricsError> {
        let path = dir.join(FILE);
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |source| MetricsError::Io { path, source }
        };
        let kept = match resume {
            Some(next) if path.exists() => {
                let mut records = read(&path)?;
                records.retain(|r| r.step() < next || (r.step() == next && matches!(r, Record::Eval { .. })));
                records
            }
            _ => Vec::new(),
        };
        write_file(&RealDisk, &path, |out| {
            for record in &kept {
                serde_json::to_writer(&mut *out, record)?;
                out.write_all(b"\n")?;
            }
            Ok(())
        })
        .map_err(at(&path))?;
        let lines = OpenOptions::new().append(true).open(&path).map_err(at(&path))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("events.out.tfevents.{:010}.dsv-train.{}", now.as_secs(), std::process::id());
        let events_path = dir.join(name);
        let file = File::create(&events_path).map_err(at(&events_path))?;
        let mut events = EventWriter::new(file, now.as_secs_f64()).map_err(at(&events_path))?;
        if let Some(next) = resume {
            events.session_start(now.as_secs_f64(), next).map_err(at(&events_path))?;
        }
        Ok(Metrics { path, lines, events, events_path })
    }

    /// Appends one record to both files.
    pub fn write(&mut self, record: &Record) -> Result<(), MetricsError> {
        let mut line = serde_json::to_vec(record)
            .map_err(|e| MetricsError::Io { path: self.path.clone(), source: e.into() })?;
        line.push(b'\n');
        self.lines.write_all(&line).map_err(|source| MetricsError::Io { path: self.path.clone(), source })?;
        let scalars = record.scalars();
        if !scalars.is_empty() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
            self.events
                .scalars(now, record.step(), &scalars)
                .map_err(|source| MetricsError::Io { path: self.events_path.clone(), source })?;
        }
        Ok(())
    }
}

/// Writes TensorBoard's event format: length-delimited, checksummed protobuf records.
pub struct EventWriter<W: Write> {
    out: W,
}

impl<W: Write> EventWriter<W> {
    /// Starts a file with the version record. `wall_s` is seconds since 1970.
    pub fn new(out: W, wall_s: f64) -> io::Result<Self> {
        let mut writer = EventWriter { out };
        let mut event = Vec::new();
        put_double(&mut event, 1, wall_s);
        put_bytes(&mut event, 3, b"brain.Event:2");
        writer.record(&event)?;
        Ok(writer)
    }

    /// Values of one step.
    pub fn scalars(&mut self, wall_s: f64, step: u64, values: &[(String, f64)]) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut one = Vec::new();
            put_bytes(&mut one, 1, tag.as_bytes());
            one.push(2 << 3 | 5);
            one.extend((*value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &one);
        }
        let mut event = Vec::new();
        put_double(&mut event, 1, wall_s);
        put_varint(&mut event, 2, step);
        put_bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    /// Tells TensorBoard that values of `step` and later ones, from files before this one, are void.
    pub fn session_start(&mut self, wall_s: f64, step: u64) -> io::Result<()> {
        let mut log = Vec::new();
        put_varint(&mut log, 1, 1);
        let mut event = Vec::new();
        put_double(&mut event, 1, wall_s);
        put_varint(&mut event, 2, step);
        put_bytes(&mut event, 7, &log);
        self.record(&event)
    }

    fn record(&mut self, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut all = length.to_vec();
        all.extend(masked_crc32c(&length).to_le_bytes());
        all.extend(data);
        all.extend(masked_crc32c(data).to_le_bytes());
        self.out.write_all(&all)
    }
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_varint(out: &mut Vec<u8>, field: u8, value: u64) {
    out.push(field << 3);
    varint(out, value);
}

fn put_double(out: &mut Vec<u8>, field: u8, value: f64) {
    out.push(field << 3 | 1);
    out.extend(value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

/// CRC-32C (Castagnoli), bitwise: a few hundred bytes a step need no table.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1));
        }
    }
    !crc
}

fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The live progress line on standard error: a bar on a terminal, a line every so many steps elsewhere.
pub struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    first: u64,
    every: u64,
    began: Instant,
}

impl Progress {
    /// For steps `first..total`; without a terminal one line every `every` steps.
    pub fn new(first: u64, total: u64, every: u64) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}");
            bar.set_style(style.expect("a fixed template"));
            bar.set_position(first);
            bar
        });
        Progress { bar, total, first, every: every.max(1), began: Instant::now() }
    }

    /// A step is done.
    pub fn step(&self, m: &StepMetrics) {
        let done = m.step + 1;
        let text = describe(m, self.left(done));
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(text);
            }
            None if done.is_multiple_of(self.every) || done == self.total => {
                eprintln!("step {done}/{} {text}", self.total);
            }
            None => {}
        }
    }

    /// A line that stays, such as the change of stage or a checkpoint.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// Leaves the terminal tidy.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }

    fn left(&self, done: u64) -> Duration {
        let steps = done.saturating_sub(self.first).max(1);
        let each = self.began.elapsed().as_secs_f64() / steps as f64;
        Duration::from_secs_f64(each * self.total.saturating_sub(done) as f64)
    }
}

fn describe(m: &StepMetrics, left: Duration) -> String {
    let stage = if m.stage == 0 { "baseline".to_string() } else { format!("stage {}", m.stage) };
    let predictor = m.predictor_loss.map_or(String::new(), |l| format!(" predictor {l:.4}"));
    let sparse = if m.stage == 2 { format!(" sparse {:.0}%", m.sparse_share * 100.0) } else { String::new() };
    let skipped = m.skipped.as_ref().map_or(String::new(), |s| format!(" SKIPPED ({s} not finite)"));
    let speed = match m.tokens_per_s {
        x if x >= 1e6 => format!("{:.2}M", x / 1e6),
        x if x >= 1e4 => format!("{:.1}k", x / 1e3),
        x => format!("{x:.0}"),
    };
    let s = left.as_secs();
    let left = match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        _ => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
    };
    format!("loss {:.4} {stage}{predictor}{sparse} {speed} tokens/s, {left} left{skipped}", m.loss)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Record {
        Record::Step(StepMetrics {
            step,
            stage: 1,
            loss: 0.1 + step as f64,
            predictor_loss: Some(0.5),
            predictor_loss_by_block: vec![0.4, 0.6],
            ..StepMetrics::default()
        })
    }

    #[test]
    fn event_records_are_framed_as_tensorboard_expects() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        // Bytes worked out apart from this code: wall_time 1.5, step 3, loss = 0.25.
        let mut out = Vec::new();
        let mut w = EventWriter::new(&mut out, 0.0).unwrap();
        w.scalars(1.5, 3, &[("loss".to_string(), 0.25)]).unwrap();
        // Every event file begins so: 24 bytes, their checksum, field 1 (double).
        assert_eq!(out[..13], [24, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22, 0x09]);
        let second: String = out[24 + 16..].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            second,
            "1a00000000000000129bd82d09000000000000f83f10032a0d0a0b0a046c6f7373150000803ed054b255"
        );
    }

    #[test]
    fn lines_are_read_back_and_resume_drops_what_comes_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let eval = |step| Record::Eval {
            step,
            loss: 0.30000000000000004,
            triples: vec![EvalTriple { clip: "a".into(), t: 0.5, loss: f64::NAN }],
        };
        let mut m = Metrics::open(dir.path(), None).unwrap();
        for r in [step(0), step(1), eval(2), step(2), step(3)] {
            m.write(&r).unwrap();
        }
        drop(m);
        // A kill in the middle of a line.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"kind\":\"st").unwrap();
        assert_eq!(read(&path).unwrap().len(), 5);
        let mut m = Metrics::open(dir.path(), Some(2)).unwrap();
        m.write(&step(2)).unwrap();
        let records = read(&path).unwrap();
        assert_eq!(records.iter().map(Record::step).collect::<Vec<_>>(), [0, 1, 2, 2]);
        assert_eq!(records[0], step(0));
        let Record::Eval { loss, triples, .. } = &records[2] else { panic!("{:?}", records[2]) };
        assert!(*loss == 0.30000000000000004 && triples[0].loss.is_nan());
        std::fs::write(&path, "{\"kind\":\"note\",\"step\":1,\"text\":\"x\"}\nnonsense\n{}\n").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl line 2 is no metrics record"), "{error}");
        Metrics::open(dir.path(), None).unwrap();
        assert!(read(&path).unwrap().is_empty());
    }

    #[test]
    fn scalars_name_blocks() {
        let profile = Record::Profile {
            step: 3,
            sparsity: vec![vec![0.5, 0.7], vec![0.9, 0.9]],
            covered: vec![vec![1.0, 1.0], vec![0.8, 0.6]],
            recall: vec![vec![0.9, 0.7], vec![0.6, 0.2]],
        };
        let scalars = profile.scalars();
        let get = |tag: &str| scalars.iter().find(|s| s.0 == tag).unwrap().1;
        assert!(
            (get("dsv/sparsity") - 0.75).abs() < 1e-12 && (get("covered_mass/block_01") - 0.7).abs() < 1e-12
        );
        assert!((get("dsv/recall") - 0.6).abs() < 1e-12 && (get("recall/block_01") - 0.4).abs() < 1e-12);
        let (sparse, top_k) = (vec![true; 2], vec![vec![4, 4], vec![2, 6]]);
        let why = vec![String::new(); 2];
        let dispatch = Record::Dispatch { step: 3, sparse, skipped: vec![0.75, 0.5], top_k, why };
        let scalars = dispatch.scalars();
        assert_eq!(scalars[0], ("dsv/kept".into(), 0.375));
        assert_eq!(scalars[2], ("kept/block_01".into(), 0.5));
        assert!(step(0).scalars().iter().any(|s| s.0 == "predictor_loss/block_01" && s.1 == 0.6));
    }

    #[test]
    fn the_progress_line_says_everything() {
        let m = StepMetrics {
            stage: 2,
            loss: 0.5,
            predictor_loss: Some(0.01),
            sparse_share: 0.9,
            tokens_per_s: 12_345.0,
            ..StepMetrics::default()
        };
        assert_eq!(
            describe(&m, Duration::from_secs(3725)),
            "loss 0.5000 stage 2 predictor 0.0100 sparse 90% 12.3k tokens/s, 1h02m left"
        );
        let p = Progress::new(10, 20, 5);
        assert!(p.left(20).is_zero());
    }
}
