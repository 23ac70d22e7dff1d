//! Videos, pictures and arrays to shards of Haar latents: `dsv-train prepare`.
//!
//! A source is a video file (decoded by ffmpeg), a folder of PNG or JPEG pictures (one video, in name order), or
//! a `.npy` array of u8 `[T, H, W, 3]` or `[N, T, H, W, 3]`. Other folders are searched for sources. Pictures are
//! scaled to cover the wanted size and cut around their middle.
//!
//! Text of `clip.mp4` comes from `clip.text.npy` (embeddings `[tokens, dim]`), else from the words of `clip.txt`
//! (a folder's from `caption.txt` in it), else there is none. Words are embedded by hashing ([`super::text`]).

use super::{Codec, Video, haar, npy, shards, text};
use crate::durable::{self, RealDisk};
use crate::tensors::{self, TensorView};
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const VIDEOS: [&str; 8] = ["mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "gif"];
const PICTURES: [&str; 3] = ["png", "jpg", "jpeg"];

/// Arguments of `dsv-train prepare`.
#[derive(Clone, Debug, clap::Args)]
pub struct PrepareArgs {
    /// Video files, folders of pictures, .npy arrays, or folders of these
    #[arg(required = true)]
    pub inputs: Vec<PathBuf>,
    /// Folder for the shards
    #[arg(long)]
    pub out: PathBuf,
    /// Frames of a clip, in pixels (latents have half, or a quarter with --levels 2)
    #[arg(long, default_value_t = 16)]
    pub frames: usize,
    /// Rows of a clip, in pixels
    #[arg(long, default_value_t = 64)]
    pub height: usize,
    /// Columns of a clip, in pixels
    #[arg(long, default_value_t = 64)]
    pub width: usize,
    /// Frames a second to sample videos at; the default takes every frame
    #[arg(long)]
    pub fps: Option<f64>,
    /// Frames from the start of one clip to the start of the next; the default is --frames
    #[arg(long)]
    pub stride: Option<usize>,
    /// Haar levels: 1 gives 24 channels at half size, 2 gives 192 at a quarter
    #[arg(long, default_value_t = 1)]
    pub levels: u32,
    /// Text tokens of a clip
    #[arg(long, default_value_t = 8)]
    pub text_tokens: usize,
    /// Channels of a text token
    #[arg(long, default_value_t = 64)]
    pub text_dim: usize,
    /// Type of the stored numbers: f16, bf16 or f32
    #[arg(long, default_value = "f16")]
    pub dtype: String,
    /// Clips of one shard
    #[arg(long, default_value_t = 256)]
    pub clips_per_shard: usize,
    /// Stop after this many clips
    #[arg(long)]
    pub max_clips: Option<usize>,
    /// Replace the shards that --out holds
    #[arg(long)]
    pub overwrite: bool,
    /// The ffmpeg program
    #[arg(long, default_value = "ffmpeg")]
    pub ffmpeg: PathBuf,
}

impl PrepareArgs {
    /// The arguments for some inputs and an output folder, everything else at its default.
    pub fn new(inputs: Vec<PathBuf>, out: PathBuf) -> Self {
        PrepareArgs {
            inputs,
            out,
            frames: 16,
            height: 64,
            width: 64,
            fps: None,
            stride: None,
            levels: 1,
            text_tokens: 8,
            text_dim: 64,
            dtype: "f16".into(),
            clips_per_shard: 256,
            max_clips: None,
            overwrite: false,
            ffmpeg: "ffmpeg".into(),
        }
    }

    /// `[channels, frames, height, width]` of the latents these arguments make.
    pub fn latent_shape(&self) -> [usize; 4] {
        let [c, t, h, w] = [haar::channels(self.levels), self.frames, self.height, self.width];
        [c, t >> self.levels, h >> self.levels, w >> self.levels]
    }
}

/// What [`prepare`] made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PrepareReport {
    /// Clips written.
    pub clips: usize,
    /// Sources that gave at least one clip.
    pub sources: usize,
    /// Clips whose text was hashed words.
    pub hashed_captions: usize,
    /// Clips with embeddings from a file.
    pub embedded_captions: usize,
    /// Shards written.
    pub shards: Vec<PathBuf>,
    /// Sources that gave nothing, or less than they hold, and why.
    pub skipped: Vec<(PathBuf, String)>,
}

impl std::fmt::Display for PrepareReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let silent = self.clips - self.hashed_captions - self.embedded_captions;
        write!(
            f,
            "{} clips of {} sources in {} shards\ntext: {} clips by hashed words (no text encoder), {} by given embeddings, {silent} without",
            self.clips,
            self.sources,
            self.shards.len(),
            self.hashed_captions,
            self.embedded_captions,
        )?;
        for (path, reason) in &self.skipped {
            write!(f, "\nskipped {}: {reason}", path.display())?;
        }
        Ok(())
    }
}

/// Why shards could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// An argument makes no shards.
    #[error("{argument} is {value}; allowed: {allowed}\n  next: dsv-train prepare --help")]
    Argument {
        /// The argument.
        argument: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// ffmpeg cannot be started.
    #[error(
        "cannot start {program}, which decodes videos and pictures: {source}\n  next: install ffmpeg, or name it with --ffmpeg PATH, or give .npy arrays [T, H, W, 3] of u8, which need no ffmpeg"
    )]
    NoFfmpeg {
        /// The program tried.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An input does not exist or cannot be listed.
    #[error(
        "cannot read the input {path}: {source}\n  allowed: a video file, a folder of pictures or videos, a .npy array\n  next: dsv-train prepare --help"
    )]
    Input {
        /// The input.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A text file is there but cannot be used.
    #[error(
        "cannot use the text {path}: {reason}\n  next: correct or delete it, or set --text-tokens and --text-dim to what it holds"
    )]
    Text {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The output folder already holds shards.
    #[error("{path} already holds {count} shards\n  next: choose another --out, or add --overwrite")]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// Shards in it.
        count: usize,
    },
    /// A shard cannot be written.
    #[error(
        "cannot write {path}: {source}\n  next: free space on that disk, then the same command with --overwrite"
    )]
    Write {
        /// The shard.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No source gave a clip.
    #[error("no clips: {report}\n  next: lower --frames (now {frames}), or give longer videos")]
    Nothing {
        /// What was tried.
        report: PrepareReport,
        /// Frames a clip needs.
        frames: usize,
    },
}

#[derive(Debug, PartialEq)]
enum Source {
    Video(PathBuf),
    Pictures(PathBuf, Vec<PathBuf>),
    Array(PathBuf),
}

/// Makes shards. `progress` is told the clips so far after each source.
pub fn prepare(
    args: &PrepareArgs,
    mut progress: impl FnMut(&Path, usize),
) -> Result<PrepareReport, PrepareError> {
    let dtype = check(args)?;
    if let Ok(old) = shards::list(&args.out) {
        if !args.overwrite {
            return Err(PrepareError::Occupied { path: args.out.clone(), count: old.len() });
        }
        for path in old {
            std::fs::remove_file(&path).map_err(|source| PrepareError::Write { path, source })?;
        }
    }
    let mut sources = Vec::new();
    for input in &args.inputs {
        find(input, &mut sources)?;
    }
    let mut writer = Writer { args, dtype, clips: Vec::new(), report: PrepareReport::default() };
    for source in &sources {
        let before = writer.report.clips;
        let path = match source {
            Source::Video(p) | Source::Pictures(p, _) | Source::Array(p) => p,
        };
        let caption = Caption::of(source, args)?;
        let mut emit = |v| writer.add(path, v, &caption);
        let outcome = match source {
            Source::Video(path) => from_video(args, path, &mut emit)?,
            Source::Pictures(_, files) => from_pictures(args, files, &mut emit)?,
            Source::Array(path) => from_array(args, path, &mut emit)?,
        };
        let made = writer.report.clips - before;
        writer.report.sources += usize::from(made > 0);
        match outcome {
            Outcome::Failed(why) => {
                let kept =
                    if made > 0 { format!("; the {made} clips before that are kept") } else { String::new() };
                writer.report.skipped.push((path.clone(), why + &kept));
            }
            Outcome::Read(why) if made == 0 => writer.report.skipped.push((path.clone(), why)),
            Outcome::Read(_) => {}
        }
        progress(path, writer.report.clips);
        if writer.full() {
            break;
        }
    }
    writer.flush()?;
    if writer.report.clips == 0 {
        return Err(PrepareError::Nothing { report: writer.report, frames: args.frames });
    }
    Ok(writer.report)
}

fn check(args: &PrepareArgs) -> Result<Dtype, PrepareError> {
    let bad =
        |argument, value: String, allowed: String| Err(PrepareError::Argument { argument, value, allowed });
    if !(1..=2).contains(&args.levels) {
        return bad("--levels", args.levels.to_string(), "1 or 2".into());
    }
    let unit = 1usize << args.levels;
    for (name, value) in [("--frames", args.frames), ("--height", args.height), ("--width", args.width)] {
        if value == 0 || value % unit != 0 {
            let allowed = format!("multiples of {unit} (--levels {} halves each side as often)", args.levels);
            return bad(name, value.to_string(), allowed);
        }
    }
    for (name, value) in [
        ("--stride", args.stride.unwrap_or(1)),
        ("--text-tokens", args.text_tokens),
        ("--text-dim", args.text_dim),
        ("--clips-per-shard", args.clips_per_shard),
        ("--max-clips", args.max_clips.unwrap_or(1)),
    ] {
        if value == 0 {
            return bad(name, "0".into(), "1 and more".into());
        }
    }
    if let Some(fps) = args.fps.filter(|f| !(f.is_finite() && *f > 0.0)) {
        return bad("--fps", fps.to_string(), "more than 0".into());
    }
    match args.dtype.as_str() {
        "f16" => Ok(Dtype::F16),
        "bf16" => Ok(Dtype::BF16),
        "f32" => Ok(Dtype::F32),
        other => bad("--dtype", format!("{other:?}"), "f16, bf16, f32".into()),
    }
}

fn has_extension(path: &Path, list: &[&str]) -> bool {
    path.extension().and_then(|e| e.to_str()).is_some_and(|e| list.contains(&e.to_lowercase().as_str()))
}

/// Sources under `path`, in name order.
fn find(path: &Path, out: &mut Vec<Source>) -> Result<(), PrepareError> {
    let input = |source| PrepareError::Input { path: path.to_path_buf(), source };
    if !std::fs::metadata(path).map_err(input)?.is_dir() {
        let embeddings = path.to_string_lossy().ends_with(".text.npy");
        if has_extension(path, &["npy"]) && !embeddings {
            out.push(Source::Array(path.to_path_buf()));
        } else if has_extension(path, &PICTURES) {
            out.push(Source::Pictures(path.to_path_buf(), vec![path.to_path_buf()]));
        } else if has_extension(path, &VIDEOS) {
            out.push(Source::Video(path.to_path_buf()));
        } else {
            let kinds =
                VIDEOS.iter().chain(&PICTURES).chain(&["npy"]).copied().collect::<Vec<_>>().join(", ");
            return Err(input(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("its ending is none of {kinds}"),
            )));
        }
        return Ok(());
    }
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(path).map_err(input)?.flatten().map(|e| e.path()).collect();
    entries.sort();
    let pictures: Vec<PathBuf> =
        entries.iter().filter(|p| p.is_file() && has_extension(p, &PICTURES)).cloned().collect();
    if !pictures.is_empty() {
        out.push(Source::Pictures(path.to_path_buf(), pictures));
    }
    for entry in entries {
        let array = has_extension(&entry, &["npy"]) && !entry.to_string_lossy().ends_with(".text.npy");
        if entry.is_dir() || array || has_extension(&entry, &VIDEOS) {
            find(&entry, out)?;
        }
    }
    Ok(())
}

/// A source's text, f32 `[text_tokens, text_dim]`.
struct Caption {
    words: String,
    embedding: Vec<f32>,
    given: bool,
}

impl Caption {
    fn of(source: &Source, args: &PrepareArgs) -> Result<Caption, PrepareError> {
        let (words_at, embedding_at) = match source {
            Source::Video(p) | Source::Array(p) => (p.with_extension("txt"), p.with_extension("text.npy")),
            Source::Pictures(p, _) if p.is_dir() => (p.join("caption.txt"), p.join("caption.text.npy")),
            Source::Pictures(p, _) => (p.with_extension("txt"), p.with_extension("text.npy")),
        };
        let words = match std::fs::read_to_string(&words_at) {
            Ok(words) => words.trim().to_string(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(PrepareError::Text { path: words_at, reason: e.to_string() }),
        };
        let (l, d) = (args.text_tokens, args.text_dim);
        if !embedding_at.exists() {
            return Ok(Caption { embedding: text::embed(&words, l, d), words, given: false });
        }
        let refuse = |reason: String| PrepareError::Text { path: embedding_at.clone(), reason };
        let array = npy::Array::read(&embedding_at).map_err(refuse)?;
        if array.shape.len() != 2 || array.shape[0] > l || array.shape[1] != d {
            return Err(refuse(format!("its shape is {:?}; allowed: [up to {l}, {d}]", array.shape)));
        }
        let mut embedding = array.to_f32();
        if !embedding.iter().all(|x| x.is_finite()) {
            return Err(refuse("it holds values that are not finite".into()));
        }
        embedding.resize(l * d, 0.0);
        Ok(Caption { words, embedding, given: true })
    }
}

/// Takes each frame's index and pixels; false = enough.
struct Windows<'a> {
    args: &'a PrepareArgs,
    held: Vec<u8>,
    first: usize,
    /// Frames yet to be dropped before the next window, where the stride exceeds the clip.
    skip: usize,
}

impl Windows<'_> {
    /// Adds a frame; a full window goes to `emit` with the index of its first frame.
    fn frame(
        &mut self,
        rgb: &[u8],
        emit: &mut dyn FnMut((usize, Video)) -> Result<bool, PrepareError>,
    ) -> Result<bool, PrepareError> {
        if self.skip > 0 {
            self.skip -= 1;
            return Ok(true);
        }
        self.held.extend_from_slice(rgb);
        let a = self.args;
        let (size, stride) = (a.height * a.width * 3, a.stride.unwrap_or(a.frames));
        if self.held.len() < size * a.frames {
            return Ok(true);
        }
        let video = Video { frames: a.frames, height: a.height, width: a.width, rgb: self.held.clone() };
        let more = emit((self.first, video))?;
        self.held.drain(..size * stride.min(a.frames));
        self.skip = stride.saturating_sub(a.frames);
        self.first += stride;
        Ok(more)
    }
}

/// How reading a source ended: to its end (or to the last clip wanted), with why it may have given no clip; or
/// with a failure.
enum Outcome {
    Read(String),
    Failed(String),
}

/// ffmpeg with everything but its input: pictures scaled to cover the clip's size and cut, as raw RGB.
fn ffmpeg(args: &PrepareArgs, input: &std::ffi::OsStr, filter: &str) -> Command {
    let (w, h) = (args.width, args.height);
    let filter = format!(
        "{filter}scale={w}:{h}:force_original_aspect_ratio=increase:flags=area,crop={w}:{h},setsar=1"
    );
    let mut command = Command::new(&args.ffmpeg);
    command.args(["-hide_banner", "-loglevel", "error", "-i"]);
    command.arg(input);
    command.args(["-map", "0:v:0", "-vf", &filter, "-fps_mode", "passthrough"]);
    command.args(["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The first and the last of ffmpeg's complaints.
fn complaint(words: &str) -> String {
    let mut lines = words.lines().map(str::trim).filter(|l| !l.is_empty());
    match (lines.next(), lines.next_back()) {
        (Some(first), Some(last)) => format!("{first}; {last}"),
        (Some(only), None) => only.to_string(),
        _ => "it said nothing".to_string(),
    }
}

/// Decodes a video and cuts its frames into clips.
fn from_video(
    args: &PrepareArgs,
    path: &Path,
    emit: &mut dyn FnMut((usize, Video)) -> Result<bool, PrepareError>,
) -> Result<Outcome, PrepareError> {
    let no_ffmpeg = |source| PrepareError::NoFfmpeg { program: args.ffmpeg.clone(), source };
    // "file:" keeps ffmpeg from reading a name as a protocol or an option.
    let mut input = std::ffi::OsString::from("file:");
    input.push(path);
    let fps = args.fps.map_or(String::new(), |f| format!("fps={f},"));
    let mut child = ffmpeg(args, &input, &fps).stdin(Stdio::null()).spawn().map_err(no_ffmpeg)?;
    let mut stderr = child.stderr.take().expect("piped");
    let words = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stderr.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let mut stdout = child.stdout.take().expect("piped");
    let mut frame = vec![0u8; args.width * args.height * 3];
    let mut windows = Windows { args, held: Vec::new(), first: 0, skip: 0 };
    let mut frames = 0;
    let more = loop {
        if stdout.read_exact(&mut frame).is_err() {
            break Ok(true);
        }
        frames += 1;
        match windows.frame(&frame, emit) {
            Ok(true) => {}
            enough_or_error => break enough_or_error,
        }
    };
    drop(stdout);
    if !matches!(more, Ok(true)) {
        // An error only means that it has already ended.
        let _ = child.kill();
    }
    let status = child.wait().map_err(no_ffmpeg)?;
    let words = words.join().unwrap_or_default();
    Ok(if more? && !status.success() {
        Outcome::Failed(format!("ffmpeg failed ({status}) after {frames} frames: {}", complaint(&words)))
    } else {
        Outcome::Read(format!("{frames} frames, a clip needs {}", args.frames))
    })
}

/// Decodes pictures, each by its own ffmpeg (formats and sizes may differ), as the frames of one video.
fn from_pictures(
    args: &PrepareArgs,
    files: &[PathBuf],
    emit: &mut dyn FnMut((usize, Video)) -> Result<bool, PrepareError>,
) -> Result<Outcome, PrepareError> {
    let size = args.width * args.height * 3;
    let decode = |file: &PathBuf| -> Result<Result<Vec<u8>, String>, PrepareError> {
        let input = |source| PrepareError::Input { path: file.clone(), source };
        let picture = std::fs::File::open(file).map_err(input)?;
        let out = ffmpeg(args, "pipe:0".as_ref(), "")
            .stdin(picture)
            .output()
            .map_err(|source| PrepareError::NoFfmpeg { program: args.ffmpeg.clone(), source })?;
        Ok(if out.status.success() && out.stdout.len() >= size {
            Ok(out.stdout[..size].to_vec())
        } else {
            let words = complaint(&String::from_utf8_lossy(&out.stderr));
            Err(format!("ffmpeg failed ({}) on {}: {words}", out.status, file.display()))
        })
    };
    let mut windows = Windows { args, held: Vec::new(), first: 0, skip: 0 };
    for some in files.chunks(64) {
        let decoded: Vec<_> = some.par_iter().map(decode).collect();
        for frame in decoded {
            match frame? {
                Err(why) => return Ok(Outcome::Failed(why)),
                Ok(frame) => {
                    if !windows.frame(&frame, emit)? {
                        return Ok(Outcome::Read(String::new()));
                    }
                }
            }
        }
    }
    Ok(Outcome::Read(format!("{} pictures, a clip needs {}", files.len(), args.frames)))
}

fn from_array(
    args: &PrepareArgs,
    path: &Path,
    emit: &mut dyn FnMut((usize, Video)) -> Result<bool, PrepareError>,
) -> Result<Outcome, PrepareError> {
    let array = match npy::Array::read(path) {
        Ok(array) => array,
        Err(reason) => return Ok(Outcome::Failed(reason)),
    };
    let s = &array.shape;
    if array.element != npy::Element::U8 || !(4..=5).contains(&s.len()) || s[s.len() - 1] != 3 {
        return Ok(Outcome::Failed(format!(
            "it is {:?} of shape {s:?}; allowed: u8 [T, H, W, 3] or [N, T, H, W, 3]",
            array.element
        )));
    }
    let [t, h, w] = [s[s.len() - 4], s[s.len() - 3], s[s.len() - 2]];
    if h == 0 || w == 0 || t < args.frames {
        return Ok(Outcome::Read(format!(
            "its videos have {t} frames of {h} x {w}, a clip needs {}",
            args.frames
        )));
    }
    for (n, video) in array.data.chunks_exact(t * h * w * 3).enumerate() {
        let mut windows = Windows { args, held: Vec::new(), first: n * t, skip: 0 };
        for frame in video.chunks_exact(h * w * 3) {
            if !windows.frame(&cover(frame, h, w, args.height, args.width), emit)? {
                return Ok(Outcome::Read(String::new()));
            }
        }
    }
    Ok(Outcome::Read(String::new()))
}

/// Scales a picture to cover `[height, width]` by area averages and cuts its middle.
fn cover(rgb: &[u8], h: usize, w: usize, height: usize, width: usize) -> Vec<u8> {
    if (h, w) == (height, width) {
        return rgb.to_vec();
    }
    // Source pixels that one target pixel spans, the same along both axes.
    let step = (h as f64 / height as f64).min(w as f64 / width as f64);
    let (y0, x0) = ((h as f64 - step * height as f64) / 2.0, (w as f64 - step * width as f64) / 2.0);
    // Weights of the source pixels under one target pixel.
    let spans = |start: f64, count: usize, limit: usize| -> Vec<Vec<(usize, f64)>> {
        (0..count)
            .map(|i| {
                let (a, b) = (start + i as f64 * step, start + (i + 1) as f64 * step);
                let first = a.floor().max(0.0) as usize;
                (first..limit)
                    .take_while(|p| (*p as f64) < b)
                    .map(|p| (p, (b.min(p as f64 + 1.0) - a.max(p as f64)) / step))
                    .collect()
            })
            .collect()
    };
    let (rows, columns) = (spans(y0, height, h), spans(x0, width, w));
    let mut out = Vec::with_capacity(height * width * 3);
    for row in &rows {
        for column in &columns {
            let mut sum = [0f64; 3];
            for (y, wy) in row {
                for (x, wx) in column {
                    for (c, s) in sum.iter_mut().enumerate() {
                        *s += wy * wx * f64::from(rgb[(y * w + x) * 3 + c]);
                    }
                }
            }
            out.extend(sum.map(|s| s.round().clamp(0.0, 255.0) as u8));
        }
    }
    out
}

struct Pending {
    id: String,
    caption: String,
    latents: Vec<u8>,
    text: Vec<u8>,
}

struct Writer<'a> {
    args: &'a PrepareArgs,
    dtype: Dtype,
    clips: Vec<Pending>,
    report: PrepareReport,
}

impl Writer<'_> {
    fn full(&self) -> bool {
        self.args.max_clips.is_some_and(|m| self.report.clips >= m)
    }

    fn add(
        &mut self,
        source: &Path,
        (first, video): (usize, Video),
        caption: &Caption,
    ) -> Result<bool, PrepareError> {
        let bytes = |values: &[f32]| tensors::from_f32(self.dtype, values).expect("a float type was chosen");
        let name = source.file_name().unwrap_or_default().to_string_lossy();
        let pending = Pending {
            id: format!("{name}@{first}"),
            caption: caption.words.clone(),
            latents: bytes(&haar::encode(&video, self.args.levels)),
            text: bytes(&caption.embedding),
        };
        self.clips.push(pending);
        self.report.clips += 1;
        self.report.embedded_captions += usize::from(caption.given);
        self.report.hashed_captions += usize::from(!caption.given && !caption.words.is_empty());
        if self.clips.len() == self.args.clips_per_shard {
            self.flush()?;
        }
        Ok(!self.full())
    }

    fn flush(&mut self) -> Result<(), PrepareError> {
        if self.clips.is_empty() {
            return Ok(());
        }
        let n = self.clips.len();
        let join = |part: fn(&Pending) -> &Vec<u8>| {
            self.clips.iter().flat_map(|c| part(c).iter().copied()).collect()
        };
        let (latents, texts): (Vec<u8>, Vec<u8>) = (join(|c| &c.latents), join(|c| &c.text));
        let list = |part: fn(&Pending) -> &String| {
            serde_json::to_string(&self.clips.iter().map(part).collect::<Vec<_>>()).expect("strings are JSON")
        };
        let mut shape = vec![n];
        shape.extend(self.args.latent_shape());
        let given = self.report.embedded_captions > 0;
        let metadata = BTreeMap::from([
            ("schema".to_string(), shards::SCHEMA.to_string()),
            ("codec".to_string(), Codec::Haar { levels: self.args.levels }.label()),
            ("text_encoder".to_string(), if given { "external" } else { shards::HASHED }.to_string()),
            ("ids".to_string(), list(|c| &c.id)),
            ("captions".to_string(), list(|c| &c.caption)),
        ]);
        let views = [
            TensorView { name: "latents".into(), dtype: self.dtype, shape, data: &latents },
            TensorView {
                name: "text".into(),
                dtype: self.dtype,
                shape: vec![n, self.args.text_tokens, self.args.text_dim],
                data: &texts,
            },
        ];
        let path = self.args.out.join(format!("shard-{:05}.safetensors", self.report.shards.len()));
        durable::write_file(&RealDisk, &path, |w| tensors::write(w, &views, &metadata))
            .map_err(|source| PrepareError::Write { path: path.clone(), source })?;
        self.report.shards.push(path);
        self.clips.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::npy::tests::file as npy_file;
    use super::super::procedural::Scene;
    use super::super::shards::Shards;
    use super::*;

    fn small(inputs: Vec<PathBuf>, out: PathBuf) -> PrepareArgs {
        let mut a = PrepareArgs::new(inputs, out);
        (a.frames, a.height, a.width, a.dtype) = (4, 8, 8, "f32".into());
        a
    }

    #[test]
    fn arrays_become_shards_that_decode_to_their_frames() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("latents");
        let video = Scene::new(1, 1).render(11, 8, 8);
        std::fs::write(dir.path().join("a.npy"), npy_file("|u1", "(11, 8, 8, 3)", &video.rgb)).unwrap();
        std::fs::write(dir.path().join("a.txt"), "a red ball\n").unwrap();
        let four = Scene::new(1, 2).render(8, 8, 8);
        std::fs::write(dir.path().join("b.npy"), npy_file("|u1", "(2, 4, 8, 8, 3)", &four.rgb)).unwrap();
        let mut args = small(vec![dir.path().to_path_buf()], out.clone());
        args.stride = Some(3);
        args.clips_per_shard = 2;
        let report = prepare(&args, |_, _| {}).unwrap();
        // a: frames 0..4, 3..7, 6..10; b: one clip of each video.
        assert_eq!((report.clips, report.sources, report.shards.len()), (5, 2, 3));
        assert_eq!((report.hashed_captions, report.embedded_captions), (3, 0));
        assert!(report.to_string().contains("3 clips by hashed words (no text encoder)"));
        let s = Shards::open(&out, &[args.latent_shape()], [8, 64]).unwrap();
        let frame = 8 * 8 * 3;
        for (i, from) in [(0, 0), (1, 3), (2, 6)] {
            let clip = s.clip(0, i).unwrap();
            assert_eq!((clip.id, clip.caption), (format!("a.npy@{from}"), "a red ball".to_string()));
            assert_eq!(clip.text, text::embed("a red ball", 8, 64));
            let shown = s.codec().decode(&clip.latents, args.latent_shape()).unwrap();
            assert_eq!(shown.rgb, video.rgb[from * frame..(from + 4) * frame]);
        }
        assert_eq!(s.clip(0, 4).unwrap().id, "b.npy@4");
        let again = prepare(&args, |_, _| {}).unwrap_err().to_string();
        assert!(again.contains("already holds 3 shards") && again.contains("--overwrite"), "{again}");
        (args.overwrite, args.max_clips, args.stride) = (true, Some(1), Some(6));
        assert_eq!(prepare(&args, |_, _| {}).unwrap().clips, 1);
        assert_eq!(shards::list(&out).unwrap().len(), 1);
    }

    #[test]
    fn strides_longer_than_a_clip_skip_frames_and_given_embeddings_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let video = Scene::new(1, 1).render(10, 8, 8);
        let input = dir.path().join("a.npy");
        std::fs::write(&input, npy_file("|u1", "(10, 8, 8, 3)", &video.rgb)).unwrap();
        let given: Vec<u8> = [1.5f32, 2.5].iter().flat_map(|x| x.to_le_bytes()).collect();
        std::fs::write(dir.path().join("a.text.npy"), npy_file("<f4", "(1, 2)", &given)).unwrap();
        let mut args = small(vec![input.clone()], dir.path().join("out"));
        (args.stride, args.text_tokens, args.text_dim) = (Some(6), 2, 2);
        let report = prepare(&args, |_, _| {}).unwrap();
        assert_eq!((report.clips, report.embedded_captions), (2, 2));
        let s = Shards::open(&args.out, &[args.latent_shape()], [2, 2]).unwrap();
        assert!(!s.hashed_text());
        let clip = s.clip(0, 1).unwrap();
        assert_eq!((clip.id.as_str(), clip.text), ("a.npy@6", vec![1.5, 2.5, 0.0, 0.0]));
        let shown = s.codec().decode(&clip.latents, args.latent_shape()).unwrap();
        assert_eq!(shown.rgb, video.rgb[6 * 192..]);
        (args.text_dim, args.overwrite) = (3, true);
        let error = prepare(&args, |_, _| {}).unwrap_err().to_string();
        assert!(error.contains("its shape is [1, 2]; allowed: [up to 2, 3]"), "{error}");
    }

    #[test]
    fn missing_ffmpeg_and_bad_arguments_say_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let video = dir.path().join("a.mp4");
        std::fs::write(&video, b"not a video").unwrap();
        let mut args = small(vec![video], dir.path().join("out"));
        args.ffmpeg = "/nonexistent/ffmpeg".into();
        let error = prepare(&args, |_, _| {}).unwrap_err().to_string();
        assert!(
            error.starts_with("cannot start /nonexistent/ffmpeg") && error.contains("next: install ffmpeg")
        );
        args.height = 9;
        let error = prepare(&args, |_, _| {}).unwrap_err().to_string();
        assert!(error.starts_with("--height is 9; allowed: multiples of 2"), "{error}");
        args.height = 8;
        args.dtype = "f64".into();
        assert!(prepare(&args, |_, _| {}).unwrap_err().to_string().contains("allowed: f16, bf16, f32"));
        let none = small(vec![dir.path().join("none")], dir.path().join("out"));
        assert!(prepare(&none, |_, _| {}).unwrap_err().to_string().contains("cannot read the input"));
    }

    /// A program that answers as ffmpeg does: raw frames on its output, or words and a failure.
    #[cfg(unix)]
    fn script(path: &Path, body: &str) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn frames_come_through_the_pipe_and_failures_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let (video, program) = (dir.path().join("a.mp4"), dir.path().join("ffmpeg"));
        let frames = Scene::new(1, 1).render(9, 8, 8);
        std::fs::write(&video, &frames.rgb).unwrap();
        script(&program, &format!("cat '{}'", video.display()));
        let mut args = small(vec![video.clone()], dir.path().join("out"));
        args.ffmpeg = program.clone();
        assert_eq!(prepare(&args, |_, _| {}).unwrap().clips, 2);
        let s = Shards::open(&args.out, &[args.latent_shape()], [8, 64]).unwrap();
        let shown = s.codec().decode(&s.clip(0, 1).unwrap().latents, args.latent_shape()).unwrap();
        assert_eq!(shown.rgb, frames.rgb[4 * 192..8 * 192]);
        args.overwrite = true;
        script(&program, &format!("cat '{}'; echo 'then it broke' >&2; exit 1", video.display()));
        let report = prepare(&args, |_, _| {}).unwrap();
        assert_eq!((report.clips, report.skipped.len()), (2, 1));
        assert!(report.skipped[0].1.ends_with("then it broke; the 2 clips before that are kept"));
        // Pictures come on the program's input.
        let folder = dir.path().join("pictures");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("caption.txt"), "many things").unwrap();
        for (i, frame) in frames.rgb.chunks_exact(192).enumerate() {
            std::fs::write(folder.join(format!("{i}.{}", ["png", "JPG"][i % 2])), frame).unwrap();
        }
        script(&program, "cat");
        let pictures = PrepareArgs { inputs: vec![folder], ..args.clone() };
        let report = prepare(&pictures, |_, _| {}).unwrap();
        assert_eq!((report.clips, report.hashed_captions), (2, 2));
        let s = Shards::open(&args.out, &[args.latent_shape()], [8, 64]).unwrap();
        let clip = s.clip(0, 1).unwrap();
        let shown = s.codec().decode(&clip.latents, args.latent_shape()).unwrap();
        assert_eq!(
            (shown.rgb.as_slice(), clip.caption.as_str()),
            (&frames.rgb[4 * 192..8 * 192], "many things")
        );
        script(&program, "echo 'moov atom not found' >&2; exit 1");
        let error = prepare(&args, |_, _| {}).unwrap_err().to_string();
        assert!(error.contains("after 0 frames: moov atom not found") && error.contains("next: "), "{error}");
    }

    #[test]
    fn covering_keeps_means_and_the_middle() {
        let flat = cover(&[100; 6 * 10 * 3], 6, 10, 4, 4);
        assert!(flat.iter().all(|x| *x == 100));
        // Columns 0 and 255 of a 2 x 4 picture: the middle two stay.
        let row: Vec<u8> = [10, 20, 30, 40].iter().flat_map(|x| [*x; 3]).collect();
        let cut = cover(&[row.clone(), row].concat(), 2, 4, 2, 2);
        assert_eq!(cut[..6], [20, 20, 20, 30, 30, 30]);
        let half = cover(&[0, 0, 0, 100, 100, 100, 0, 0, 0, 100, 100, 100], 2, 2, 1, 1);
        assert_eq!(half, [50, 50, 50]);
        let up = cover(&[7; 2 * 2 * 3], 2, 2, 8, 8);
        assert_eq!(up, vec![7; 192]);
    }
}
