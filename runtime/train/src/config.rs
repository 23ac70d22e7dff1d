//! What a training run is, as a TOML file: sections, defaults, presets and the checks that reject an
//! impossible run before anything is allocated.
//!
//! A run's values come from a preset (`preset = "tiny"` in the file, or the command line), then the file,
//! then `--set section.key=value`. Unknown keys are errors. [`Config::documented_toml`] prints every key with
//! its value and meaning.

use crate::engine::Space;
use dsv_reference::lists::KvListsBuf;
use dsv_spec::order::{Cube, Grid, token_order};
use dsv_spec::space::{
    SHIPPED_BLOCK_SIZES, SHIPPED_GATHER, SHIPPED_GATHER_HEAD_DIMS, SHIPPED_RANKS, TRAINER_HEAD_DIMS,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Presets that [`Config::preset`] knows, smallest first.
pub const PRESETS: [&str; 4] = ["tiny", "0.8b", "2.7b", "30b"];

/// Every key, in file order, with what it means. The one list behind unknown-key errors and the documented
/// TOML; a test compares it with the structs.
pub const KEYS: &[(&str, &[(&str, &str)])] = &[
    (
        "model",
        &[
            ("layers", "transformer blocks"),
            ("heads", "attention heads of a block; the width is heads * head_dim"),
            (
                "head_dim",
                "channels of a head; the kernels serve 64, 96, 128 and 256, the CPU any even number",
            ),
            ("mlp", "\"geglu\" or \"gelu\" (tanh form)"),
            ("mlp_ratio", "inner width of the MLP over the model's width"),
            ("text_dim", "channels of a text token"),
            ("text_tokens", "text tokens of a clip"),
            ("patch", "latents folded into one token, as [time, height, width]"),
            ("latent_channels", "channels of a latent; Haar latents have 3 * 8^levels (24, 192)"),
            ("rope_base", "base of the 3D rotary frequencies"),
            (
                "qk_gain",
                "what the gains of QK RMSNorm begin with; logits of unrelated tokens then spread by its square",
            ),
            ("norm_eps", "epsilon of LayerNorm and QK RMSNorm"),
        ],
    ),
    (
        "data",
        &[
            (
                "kind",
                "\"procedural\" (built in, nothing to download) or \"shards\" (dsv-train prepare, or a VAE's)",
            ),
            ("path", "folder of shards, for kind = \"shards\""),
            ("frames", "latent frames of a clip"),
            ("height", "latent rows"),
            ("width", "latent columns"),
            (
                "buckets",
                "optional: further grids [[frames, height, width], ...]; every step takes clips of one grid, eval those of the first",
            ),
            ("clips", "clips of an epoch, for kind = \"procedural\""),
            (
                "plays",
                "optional, for kind = \"procedural\": times a clip shows its scene, each from its start: content comes back from far away",
            ),
            ("batch_size", "clips of one micro-batch"),
            ("seed", "seed of the shuffle, and of the procedural scenes"),
            ("validation", "clips held out of training for eval"),
            ("readers", "threads that read clips ahead of the device; the order does not depend on them"),
            ("read_ahead", "steps whose clips each of them has ready"),
        ],
    ),
    (
        "train",
        &[
            ("steps", "optimizer steps of the whole run, both stages"),
            ("lr", "peak learning rate"),
            ("warmup_steps", "steps of linear warm-up"),
            ("decay", "\"cosine\", \"linear\" or \"constant\" after the warm-up"),
            ("final_lr_factor", "learning rate at the last step over the peak, where it decays"),
            ("grad_clip", "largest norm of the gradient; 0 = off"),
            ("max_skipped", "skipped steps in a row (loss or a gradient not finite) that end the run"),
            ("grad_accumulation", "micro-batches of one step"),
            ("weight_decay", "AdamW's decoupled weight decay"),
            ("betas", "AdamW's two decay rates"),
            ("eps", "AdamW's epsilon"),
            ("ema_decay", "decay of the averaged weights that eval and sample use; 0 = off"),
            (
                "kept_budget_gb",
                "device memory, in GiB, for what blocks keep for their backward (attention outputs, predicted lists); what is beyond goes to page-locked host memory in the forward and comes back ahead of the backward, same bits; 0 = no limit",
            ),
            (
                "moments",
                "AdamW's moments: \"device\" (f32, 8 bytes a parameter), \"8bit\" (on the device, 2.06 bytes: relative to the largest of 128 neighbours), or \"host\" (f32 in page-locked host memory, passed through the device every step, same bits as \"device\")",
            ),
            (
                "ema_on",
                "where the averaged weights lie: \"device\", or \"host\": page-locked host memory, updated beside the next step, same bits",
            ),
            ("caption_dropout", "share of clips trained with the empty caption"),
            ("seed", "seed of weights, timesteps, noise and caption drop-out"),
            (
                "init_weights",
                "optional: safetensors file, or folder of them, whose tensors are the first weights; absent = random",
            ),
            (
                "init_map",
                "optional: TOML or JSON from parameters to tensors of init_weights (form: runtime/train/src/import.rs); absent = same names",
            ),
            ("deterministic", "same bits on every run and after a resume, at some speed"),
            ("checkpoint_every", "steps between checkpoints; 0 = only the last"),
            ("keep_checkpoints", "newest checkpoints kept on disk; 0 = all"),
            ("eval_every", "steps between validation losses; 0 = only the last"),
            (
                "log_every",
                "steps between readings of losses and norms, for which a GPU is waited for; none is lost",
            ),
            (
                "recompute",
                "recompute a block in its backward, keeping only attention's output, LSE and lists",
            ),
        ],
    ),
    (
        "flow",
        &[
            ("logit_mean", "mean of the logit-normal timestep"),
            ("logit_std", "standard deviation of the logit-normal timestep"),
            ("shift", "s in t' = s t / (1 + (s - 1) t); 1 = none, more = noisier"),
        ],
    ),
    (
        "dsv",
        &[
            (
                "attention",
                "\"dsv\" (predictors, two stages), or a baseline: \"full\", \"wa-m\", \"wa-l\" (3D windows of 1/3, 2/3 of each side), \"fixed\" (predictors, every block keeps dsv.keep from step 0: for throughput)",
            ),
            ("query_group", "tokens that share one KV list"),
            (
                "kv_block",
                "tokens selected together; the kernels serve 1, 8, 64 (query_group 64) and 1, 8, 128 (query_group 128), below 64 without train.deterministic",
            ),
            (
                "cube",
                "optional: cube of tokens that are contiguous, frames x rows x columns (\"2x4x8\"), or \"auto\": measured when stage 2 begins; absent = as even as it can be (64 tokens: 4x4x4)",
            ),
            ("rank", "d_lr, the low-rank width of a head's predicted scores"),
            ("predictor_lr", "learning rate of the predictors in stage 1"),
            ("predictor_lr_stage2_factor", "multiplies predictor_lr in stage 2"),
            ("predictor_rope", "rotate the low-rank queries and keys as well"),
            ("group_rule", "query that decides for its group: \"centre\" or \"mean\""),
            (
                "keep_own",
                "list the group's own tokens before all others, whatever is predicted; they count as kept",
            ),
            (
                "keep_window",
                "optional: list the KV within a 3D window around the group's centre query before all others as well; its share of each side of the clip (0.33 = the window of wa-m)",
            ),
            ("theta", "share of the softmax mass that critical KV hold"),
            ("profile_every", "steps between profiles in stage 1"),
            ("profile_every_stage2", "steps between profiles in stage 2"),
            ("profile_queries", "queries sampled for each head and profile"),
            ("switch", "end of stage 1: a step (100) or a loss (\"loss < 0.01\")"),
            ("force_sparse", "optional: share of blocks made sparse in stage 2 whatever the dispatcher says"),
            ("keep", "optional: share of KV blocks each group keeps; absent = from the profile"),
            (
                "share",
                "who gets the blocks of dsv.keep: \"even\" (every head as many) or \"need\" (the same total over all blocks and heads, in proportion to what their profiles need; lists as wide as dsv.max_keep)",
            ),
            ("max_keep", "widest list, as a share of the KV blocks; sizes the index buffers"),
            ("min_sparsity", "sparsity from which sparse is assumed faster where no table says"),
            ("memory_budget_gb", "device memory the dispatcher may plan with, in GiB; 0 = what is free"),
            ("dispatch_every", "steps between the dispatcher's decisions in stage 2"),
        ],
    ),
    (
        "device",
        &[
            ("kind", "\"cpu\", \"cuda\" or \"auto\" (cuda where there is one)"),
            ("index", "which GPU"),
            ("table", "optional: dispatch table; absent = the shipped one of this GPU"),
            (
                "bundle",
                "optional: folder made by dsv-codegen build --out; absent = kernels are compiled at the start",
            ),
            (
                "graphs",
                "record forward and backward once and launch them as one CUDA graph: for short sequences, where launches count",
            ),
        ],
    ),
    (
        "sample",
        &[
            ("steps", "solver steps"),
            ("guidance", "classifier-free guidance; 1 = none"),
            ("solver", "\"euler\" or \"heun\""),
            ("fps", "frames a second of the GIF"),
        ],
    ),
    ("out", &[("dir", "folder of checkpoints, metrics, report and samples")]),
];

/// One whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The preset the values started from, one of [`PRESETS`].
    pub preset: String,
    /// `[model]`
    pub model: Model,
    /// `[data]`
    pub data: Data,
    /// `[train]`
    pub train: Train,
    /// `[flow]`
    pub flow: Flow,
    /// `[dsv]`
    pub dsv: Dsv,
    /// `[device]`
    pub device: Device,
    /// `[sample]`
    pub sample: Sample,
    /// `[out]`
    pub out: Out,
}

/// `[model]`: the DiT's shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Transformer blocks.
    pub layers: usize,
    /// Attention heads of a block.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Form of the MLP.
    pub mlp: Mlp,
    /// Inner width of the MLP over the model's width.
    pub mlp_ratio: usize,
    /// Channels of a text token.
    pub text_dim: usize,
    /// Text tokens of a clip.
    pub text_tokens: usize,
    /// Latents folded into one token, `[time, height, width]`.
    pub patch: [usize; 3],
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// First value of the gains of QK RMSNorm.
    pub qk_gain: f64,
    /// Epsilon of the norms.
    pub norm_eps: f64,
}

/// Form of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mlp {
    /// `up(x)[..n] * gelu(up(x)[n..])`
    Geglu,
    /// `gelu(up(x))`, tanh form.
    Gelu,
}

/// `[data]`: clips and batches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Where clips come from.
    pub kind: DataKind,
    /// Folder of shards; used by [`DataKind::Shards`].
    pub path: PathBuf,
    /// Latent frames of a clip.
    pub frames: usize,
    /// Latent rows.
    pub height: usize,
    /// Latent columns.
    pub width: usize,
    /// Further grids of latents `[frames, height, width]`; the first grid is the three values above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub buckets: Vec<[usize; 3]>,
    /// Clips of an epoch of [`DataKind::Procedural`].
    pub clips: usize,
    /// Times a clip of [`DataKind::Procedural`] shows its scene, each from its start; once by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plays: Option<usize>,
    /// Clips of one micro-batch.
    pub batch_size: usize,
    /// Seed of the shuffle and of procedural scenes.
    pub seed: u64,
    /// Clips held out of training.
    pub validation: usize,
    /// Threads that read clips ahead.
    pub readers: usize,
    /// Steps each reader has ready.
    pub read_ahead: usize,
}

/// Where clips come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataKind {
    /// Scenes rendered from their index.
    Procedural,
    /// Safetensors shards of latents and text embeddings.
    Shards,
}

/// `[train]`: optimisation and housekeeping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Shape after the warm-up.
    pub decay: Decay,
    /// Last learning rate over the peak.
    pub final_lr_factor: f64,
    /// Largest gradient norm; 0 = off.
    pub grad_clip: f64,
    /// Skipped steps in a row that end the run.
    pub max_skipped: u32,
    /// Micro-batches of one step.
    pub grad_accumulation: usize,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay rates.
    pub betas: [f64; 2],
    /// AdamW's epsilon.
    pub eps: f64,
    /// Decay of the averaged weights; 0 = off.
    pub ema_decay: f64,
    /// GiB of device memory for what blocks keep; 0 = no limit.
    pub kept_budget_gb: f64,
    /// How AdamW's moments are kept.
    pub moments: Moments,
    /// Where the averaged weights lie.
    pub ema_on: EmaOn,
    /// Share of clips trained with the empty caption.
    pub caption_dropout: f64,
    /// Seed of weights, timesteps, noise and caption drop-out.
    pub seed: u64,
    /// Safetensors file or folder whose tensors are the first weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_weights: Option<PathBuf>,
    /// Key map from parameters to tensors of `init_weights`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_map: Option<PathBuf>,
    /// Same bits on every run.
    pub deterministic: bool,
    /// Steps between checkpoints; 0 = only the last.
    pub checkpoint_every: u64,
    /// Newest checkpoints kept; 0 = all.
    pub keep_checkpoints: usize,
    /// Steps between validation losses; 0 = only the last.
    pub eval_every: u64,
    /// Steps between metric lines.
    pub log_every: u64,
    /// Recompute blocks in the backward.
    pub recompute: bool,
}

/// How AdamW's moments are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// f32 in device memory.
    Device,
    /// Eight bits in device memory.
    #[serde(rename = "8bit")]
    Coded,
    /// f32 in page-locked host memory.
    Host,
}

/// Where averaged weights lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmaOn {
    /// Device memory, 4 bytes a parameter.
    Device,
    /// Page-locked host memory.
    Host,
}

/// Learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Half a cosine down to `final_lr_factor`.
    Cosine,
    /// A straight line down to `final_lr_factor`.
    Linear,
    /// No decay.
    Constant,
}

/// `[flow]`: the distribution of timesteps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    /// Mean of the normal under the logistic.
    pub logit_mean: f64,
    /// Its standard deviation.
    pub logit_std: f64,
    /// `s` in `t' = s t / (1 + (s - 1) t)`.
    pub shift: f64,
}

/// `[dsv]`: predictors, profiler, stages and dispatcher (the paper's two-stage training).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dsv {
    /// Which keys are attended to.
    pub attention: Attention,
    /// Tokens that share one list.
    pub query_group: usize,
    /// Tokens selected together.
    pub kv_block: usize,
    /// Cube of tokens that are contiguous; `None` = the one of [`Cube::of_group`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cube: Option<CubeChoice>,
    /// `d_lr`.
    pub rank: usize,
    /// Predictors' learning rate in stage 1.
    pub predictor_lr: f64,
    /// Multiplies `predictor_lr` in stage 2.
    pub predictor_lr_stage2_factor: f64,
    /// Rotate low-rank queries and keys.
    pub predictor_rope: bool,
    /// Query that decides for its group.
    pub group_rule: GroupRule,
    /// A group lists its own tokens first.
    pub keep_own: bool,
    /// And the KV within a window of this share of each side.
    pub keep_window: Option<f64>,
    /// Share of the mass that critical KV hold.
    pub theta: f64,
    /// Steps between profiles in stage 1.
    pub profile_every: u64,
    /// Steps between profiles in stage 2.
    pub profile_every_stage2: u64,
    /// Queries sampled for each head and profile.
    pub profile_queries: usize,
    /// What ends stage 1.
    pub switch: Switch,
    /// Share of blocks forced sparse in stage 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force_sparse: Option<f64>,
    /// Share of KV blocks each group keeps; `None` = from the profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<f64>,
    /// Who gets them.
    pub share: Share,
    /// Widest list as a share of the KV blocks.
    pub max_keep: f64,
    /// Sparsity from which sparse is assumed faster where no table says.
    pub min_sparsity: f64,
    /// Device memory to plan with, GiB; 0 = what is free.
    pub memory_budget_gb: f64,
    /// Steps between the dispatcher's decisions.
    pub dispatch_every: u64,
}

/// Which keys the self-attention of a run attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attention {
    /// Full attention while predictors learn, then the predicted keys where the dispatcher says so.
    Dsv,
    /// All keys throughout.
    Full,
    /// A 3D window of a third of each side of the clip around each query group, as KV lists.
    WaM,
    /// The same with two thirds.
    WaL,
    /// The predicted keys in every block and from the first step on, a fixed share of them.
    Fixed,
}

impl Attention {
    /// Whether the run has predictors.
    pub fn predicts(self) -> bool {
        matches!(self, Attention::Dsv | Attention::Fixed)
    }

    /// Share of each side of the clip that a window spans.
    pub fn window(self) -> Option<f64> {
        match self {
            Attention::WaM => Some(1.0 / 3.0),
            Attention::WaL => Some(2.0 / 3.0),
            _ => None,
        }
    }

    /// As the configuration spells it.
    pub fn name(self) -> &'static str {
        match self {
            Attention::Dsv => "dsv",
            Attention::Full => "full",
            Attention::WaM => "wa-m",
            Attention::WaL => "wa-l",
            Attention::Fixed => "fixed",
        }
    }

    /// For logs and reports.
    pub fn label(self) -> &'static str {
        match self {
            Attention::Dsv => "DSV: predictors, two stages",
            Attention::Full => "full",
            Attention::WaM => "WA-M: 3D windows of a third of each side",
            Attention::WaL => "WA-L: 3D windows of two thirds of each side",
            Attention::Fixed => "fixed share of predicted keys in every block",
        }
    }
}

/// How heads share the KV blocks of `dsv.keep`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Share {
    /// Every head of every block keeps as many.
    Even,
    /// The same total, in proportion to what each head's profile needs.
    Need,
}

/// Which tokens are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CubeChoice {
    /// The cube in which the predicted lists of fewest KV units cover the attention mass, measured before the first step of
    /// stage 2; until then the one of [`Cube::of_group`].
    Auto,
    /// This one.
    Shape(Cube),
}

impl Serialize for CubeChoice {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            CubeChoice::Auto => s.serialize_str("auto"),
            CubeChoice::Shape(cube) => cube.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for CubeChoice {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        match text.parse() {
            _ if text == "auto" => Ok(CubeChoice::Auto),
            Ok(cube) => Ok(CubeChoice::Shape(cube)),
            Err(_) => Err(serde::de::Error::custom(format!(
                "dsv.cube is {text:?}; allowed: \"auto\", or frames x rows x columns, powers of two, as in \"2x4x8\""
            ))),
        }
    }
}

/// Query that decides for its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupRule {
    /// The token at `floor(len / 2)` of the group's valid tokens.
    #[serde(alias = "center")]
    Centre,
    /// The mean of the group's valid tokens.
    Mean,
}

impl From<GroupRule> for dsv_spec::GroupRule {
    fn from(rule: GroupRule) -> dsv_spec::GroupRule {
        match rule {
            GroupRule::Centre => dsv_spec::GroupRule::Centre,
            GroupRule::Mean => dsv_spec::GroupRule::Mean,
        }
    }
}

/// What ends stage 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Switch {
    /// Stage 2 begins with this step.
    Step(u64),
    /// Stage 2 begins once the mean predictor loss over all blocks is below this.
    Loss(f64),
}

impl Serialize for Switch {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Switch::Step(n) => s.serialize_u64(*n),
            Switch::Loss(x) => s.serialize_str(&format!("loss < {x}")),
        }
    }
}

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Step(i64),
            Text(String),
            Other(serde::de::IgnoredAny),
        }
        let allowed = "allowed: a step number from 0 (switch = 100) or a loss (switch = \"loss < 0.01\")";
        match Raw::deserialize(d)? {
            Raw::Step(n) if n >= 0 => Ok(Switch::Step(n as u64)),
            Raw::Step(n) => Err(serde::de::Error::custom(format!("dsv.switch is {n}; {allowed}"))),
            Raw::Text(t) => t
                .trim()
                .strip_prefix("loss")
                .and_then(|r| r.trim_start().strip_prefix('<'))
                .and_then(|r| r.trim().parse::<f64>().ok())
                .filter(|x| x.is_finite() && *x > 0.0)
                .map(Switch::Loss)
                .ok_or_else(|| serde::de::Error::custom(format!("dsv.switch is {t:?}; {allowed}"))),
            Raw::Other(_) => Err(serde::de::Error::custom(format!("dsv.switch has another type; {allowed}"))),
        }
    }
}

/// `[device]`: where to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Kind of device.
    pub kind: DeviceKind,
    /// Which GPU.
    pub index: usize,
    /// Dispatch table; `None` = the shipped one of this GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<PathBuf>,
    /// Cubins made by `dsv-codegen build --out DIR`; `None` = kernels are compiled on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<PathBuf>,
    /// Launch forward and backward as a CUDA graph.
    pub graphs: bool,
}

/// Kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The CPU reference, f32.
    Cpu,
    /// Generated kernels, bf16.
    Cuda,
    /// Cuda where there is one.
    Auto,
}

/// `[sample]`: how `dsv-train sample` integrates the flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// Solver steps.
    pub steps: usize,
    /// Classifier-free guidance; 1 = none.
    pub guidance: f64,
    /// Solver.
    pub solver: Solver,
    /// Frames a second of the GIF.
    pub fps: u16,
}

/// Solver of the flow's ODE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Solver {
    /// First order, one evaluation a step.
    Euler,
    /// Second order, two evaluations a step.
    Heun,
}

/// `[out]`: where results go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Out {
    /// Folder of everything the run writes.
    pub dir: PathBuf,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read the config {path}: {source}\n  next: dsv-train plan --preset tiny > {path}   (writes every key with its default)"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or a value of the wrong type.
    #[error(
        "{origin} is not a valid config\n{detail}\n  next: dsv-train plan --preset tiny   (prints every key, its default and its meaning)"
    )]
    Parse {
        /// File or `--set`.
        origin: String,
        /// The parser's words, with line and column.
        detail: String,
    },
    /// Keys nobody reads.
    #[error("{}", .0.join("\n"))]
    UnknownKeys(
        /// One message for each key.
        Vec<String>,
    ),
    /// A preset nobody knows.
    #[error("unknown preset {found:?}\n  presets: {}\n  next: dsv-train plan --preset tiny", PRESETS.join(", "))]
    Preset {
        /// What was asked for.
        found: String,
    },
    /// Values that make no run. Every problem is listed.
    #[error("the config describes no possible run ({} problem{})\n{}\n  next: correct the keys above, then dsv-train plan CONFIG.toml", .0.len(), if .0.len() == 1 { "" } else { "s" }, .0.iter().map(|p| format!("  - {p}")).collect::<Vec<_>>().join("\n"))]
    Impossible(
        /// One sentence for each problem.
        Vec<String>,
    ),
}

impl Config {
    /// A preset by name: `tiny` (CPU, minutes), or a row of the paper's model table.
    pub fn preset(name: &str) -> Result<Config, ConfigError> {
        let large = |layers, heads, head_dim, mlp| Config {
            preset: name.to_string(),
            model: Model {
                layers,
                heads,
                head_dim,
                mlp,
                mlp_ratio: 4,
                text_dim: 4096,
                text_tokens: 120,
                patch: [1, 2, 2],
                latent_channels: 16,
                rope_base: 10_000.0,
                qk_gain: 1.0,
                norm_eps: 1e-6,
            },
            data: Data {
                kind: DataKind::Shards,
                path: "latents".into(),
                frames: 32,
                height: 64,
                width: 64,
                buckets: Vec::new(),
                clips: 4096,
                plays: None,
                batch_size: 1,
                seed: 1,
                validation: 32,
                readers: 2,
                read_ahead: 2,
            },
            train: Train {
                steps: 100_000,
                lr: 1e-4,
                warmup_steps: 1000,
                decay: Decay::Constant,
                final_lr_factor: 0.1,
                grad_clip: 1.0,
                max_skipped: 5,
                grad_accumulation: 1,
                weight_decay: 0.01,
                betas: [0.9, 0.99],
                eps: 1e-8,
                ema_decay: 0.0,
                kept_budget_gb: 0.0,
                moments: Moments::Device,
                ema_on: EmaOn::Device,
                caption_dropout: 0.1,
                seed: 1,
                init_weights: None,
                init_map: None,
                deterministic: false,
                checkpoint_every: 1000,
                keep_checkpoints: 3,
                eval_every: 1000,
                log_every: 10,
                recompute: true,
            },
            flow: Flow { logit_mean: 0.0, logit_std: 1.0, shift: 3.0 },
            dsv: Dsv {
                attention: Attention::Dsv,
                query_group: 64,
                kv_block: 64,
                cube: None,
                rank: 16,
                predictor_lr: 1e-3,
                predictor_lr_stage2_factor: 0.1,
                predictor_rope: false,
                group_rule: GroupRule::Centre,
                keep_own: false,
                keep_window: None,
                theta: 0.9,
                profile_every: 50,
                profile_every_stage2: 1000,
                profile_queries: 64,
                switch: Switch::Loss(0.01),
                force_sparse: None,
                keep: None,
                share: Share::Even,
                max_keep: 0.5,
                min_sparsity: 0.6,
                memory_budget_gb: 0.0,
                dispatch_every: 100,
            },
            device: Device { kind: DeviceKind::Auto, index: 0, table: None, bundle: None, graphs: false },
            sample: Sample { steps: 40, guidance: 4.0, solver: Solver::Euler, fps: 12 },
            out: Out { dir: format!("runs/{name}").into() },
        };
        match name {
            "0.8b" => Ok(large(28, 12, 96, Mlp::Geglu)),
            "2.7b" => Ok(large(32, 16, 128, Mlp::Geglu)),
            "30b" => Ok(large(42, 24, 256, Mlp::Gelu)),
            "tiny" => {
                let mut c = large(3, 2, 32, Mlp::Geglu);
                c.model.text_dim = 64;
                c.model.text_tokens = 8;
                c.model.latent_channels = 24;
                c.model.patch = [1, 1, 1];
                c.data.kind = DataKind::Procedural;
                c.data.path = PathBuf::new();
                c.data.frames = 4;
                c.data.height = 16;
                c.data.width = 16;
                c.data.clips = 1024;
                c.data.batch_size = 2;
                c.data.validation = 8;
                c.train.steps = 200;
                c.train.lr = 4e-3;
                c.train.warmup_steps = 10;
                c.train.decay = Decay::Cosine;
                c.train.deterministic = true;
                c.train.checkpoint_every = 100;
                c.train.eval_every = 50;
                c.train.log_every = 1;
                c.flow.shift = 1.0;
                c.dsv.query_group = 8;
                c.dsv.kv_block = 8;
                c.dsv.predictor_lr = 5e-3;
                c.dsv.profile_every = 5;
                c.dsv.profile_every_stage2 = 25;
                c.dsv.profile_queries = 32;
                c.dsv.switch = Switch::Step(100);
                c.dsv.force_sparse = Some(1.0);
                c.dsv.keep = Some(0.25);
                c.dsv.min_sparsity = 0.5;
                c.device.kind = DeviceKind::Cpu;
                c.dsv.dispatch_every = 10;
                c.sample.steps = 12;
                c.sample.guidance = 2.0;
                c.sample.fps = 8;
                Ok(c)
            }
            other => Err(ConfigError::Preset { found: other.to_string() }),
        }
    }

    /// A run from a file and overrides, checked.
    ///
    /// `file` is TOML with any subset of the keys; what it lacks comes from `preset`, else from the file's own
    /// `preset = "..."`, else from `tiny`. `sets` are `section.key=value` strings, applied last; a value that is
    /// not TOML is taken as a string, and `none` removes an optional key.
    pub fn load(file: Option<&Path>, preset: Option<&str>, sets: &[String]) -> Result<Config, ConfigError> {
        let text = match file {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?,
            None => String::new(),
        };
        let origin = file.map_or_else(|| "the config".to_string(), |p| p.display().to_string());
        Config::from_toml(&text, &origin, preset, sets)
    }

    /// As [`Config::load`], from text; `origin` names it in errors.
    pub fn from_toml(
        text: &str,
        origin: &str,
        preset: Option<&str>,
        sets: &[String],
    ) -> Result<Config, ConfigError> {
        let user: toml::Table = toml::from_str(text)
            .map_err(|e| ConfigError::Parse { origin: origin.to_string(), detail: indent(&e.to_string()) })?;
        let mut unknown = unknown_keys(&user, origin, text);
        let name = match (preset, user.get("preset")) {
            (Some(p), _) => p.to_string(),
            (None, Some(toml::Value::String(p))) => p.clone(),
            (None, Some(v)) => return Err(ConfigError::Preset { found: v.to_string() }),
            (None, None) => "tiny".to_string(),
        };
        let base = Config::preset(&name)?;
        let mut merged =
            toml::Table::try_from(&base).expect("a preset serialises: every field has a TOML form");
        for (section, value) in user {
            match (merged.get_mut(&section), value) {
                (Some(toml::Value::Table(into)), toml::Value::Table(from)) => into.extend(from),
                (_, value) => {
                    merged.insert(section, value);
                }
            }
        }
        merged.insert("preset".into(), toml::Value::String(name));
        for set in sets {
            unknown.extend(apply_set(&mut merged, set)?);
        }
        if !unknown.is_empty() {
            return Err(ConfigError::UnknownKeys(unknown));
        }
        // From text, not from the table: only then does an error know where the value stands.
        let printed = toml::to_string(&merged).expect("a table prints as TOML");
        let config: Config = toml::from_str(&printed).map_err(|e| ConfigError::Parse {
            origin: origin.to_string(),
            detail: wrong_value(&e, &printed, text),
        })?;
        config.validate()?;
        Ok(config)
    }

    /// The run as TOML, every key with its meaning beside it. Parsing the text gives the same run.
    pub fn documented_toml(&self) -> String {
        let table = toml::Table::try_from(self).expect("a config serialises: every field has a TOML form");
        let mut out = format!("preset = {:?}  # {}\n", self.preset, PRESETS.join(", "));
        for (section, keys) in KEYS {
            let _ = writeln!(out, "\n[{section}]");
            for (key, meaning) in *keys {
                match table.get(*section).and_then(|s| s.get(key)) {
                    Some(value) => {
                        let _ = writeln!(out, "{:<44}# {meaning}", format!("{key} = {value}"));
                    }
                    None => {
                        let _ = writeln!(out, "{:<44}# {meaning}", format!("# {key} ="));
                    }
                }
            }
        }
        out
    }

    /// Checks that the values make a run, reporting every problem.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut bad = Vec::new();
        let Config { model, data, train, flow, dsv, device, sample, .. } = self;
        for (key, value) in [
            ("model.layers", model.layers),
            ("model.heads", model.heads),
            ("model.head_dim", model.head_dim),
            ("model.mlp_ratio", model.mlp_ratio),
            ("model.text_dim", model.text_dim),
            ("model.text_tokens", model.text_tokens),
            ("model.patch[0]", model.patch[0]),
            ("model.patch[1]", model.patch[1]),
            ("model.patch[2]", model.patch[2]),
            ("model.latent_channels", model.latent_channels),
            ("data.frames", data.frames),
            ("data.height", data.height),
            ("data.width", data.width),
            ("data.batch_size", data.batch_size),
            ("data.readers", data.readers),
            ("data.read_ahead", data.read_ahead),
            ("train.steps", train.steps as usize),
            ("train.max_skipped", train.max_skipped as usize),
            ("train.grad_accumulation", train.grad_accumulation),
            ("train.log_every", train.log_every as usize),
            ("dsv.query_group", dsv.query_group),
            ("dsv.kv_block", dsv.kv_block),
            ("dsv.rank", dsv.rank),
            ("dsv.profile_every", dsv.profile_every as usize),
            ("dsv.profile_every_stage2", dsv.profile_every_stage2 as usize),
            ("dsv.profile_queries", dsv.profile_queries),
            ("dsv.dispatch_every", dsv.dispatch_every as usize),
            ("sample.steps", sample.steps),
            ("sample.fps", sample.fps as usize),
        ] {
            if value == 0 {
                bad.push(format!("{key} is 0; allowed: 1 and more"));
            }
        }
        for (key, size, patch) in [
            ("frames", data.frames, model.patch[0]),
            ("height", data.height, model.patch[1]),
            ("width", data.width, model.patch[2]),
        ] {
            if patch != 0 && size % patch != 0 {
                bad.push(format!(
                    "data.{key} is {size}, which the patch {patch} (model.patch = {:?}) does not divide; nearest allowed: {}",
                    model.patch,
                    multiples_near(size, patch)
                ));
            }
        }
        for (i, bucket) in data.buckets.iter().enumerate() {
            for ((axis, size), patch) in ["frames", "rows", "columns"].iter().zip(bucket).zip(model.patch) {
                if *size == 0 || patch != 0 && size % patch != 0 {
                    bad.push(format!(
                        "data.buckets[{i}] has {size} {axis}; allowed: multiples of the patch {patch} (model.patch = {:?})",
                        model.patch
                    ));
                }
            }
            if self.grids()[..=i].contains(bucket) {
                bad.push(format!("data.buckets[{i}] is {bucket:?}, a grid named before; name each once"));
            }
        }
        if model.head_dim % 2 != 0 {
            bad.push(format!("model.head_dim is {}; RoPE rotates pairs, so it must be even", model.head_dim));
        } else if model.head_dim > 0 && model.head_dim < 6 {
            bad.push(format!(
                "model.head_dim is {}; 3D RoPE needs a pair for each of three axes, so 6 and more",
                model.head_dim
            ));
        }
        if data.kind == DataKind::Procedural {
            match self.haar_levels() {
                Some(_) => {}
                None => bad.push(format!(
                    "model.latent_channels is {}, but procedural clips have Haar latents; allowed: 24 (1 level), 192 (2 levels)",
                    model.latent_channels
                )),
            }
            let plays = data.plays.unwrap_or(1);
            for [frames, ..] in self.grids() {
                if plays == 0 || frames % plays != 0 {
                    bad.push(format!(
                        "data.plays is {plays}, which does not divide the {frames} latent frames of a clip; allowed: their divisors, from 1"
                    ));
                }
            }
            if data.clips <= data.validation {
                bad.push(format!(
                    "data.clips is {} and data.validation {}; at least one clip must be left to train on",
                    data.clips, data.validation
                ));
            }
        } else if data.path.as_os_str().is_empty() {
            bad.push(
                "data.path is empty, but data.kind is \"shards\"; make shards with: dsv-train prepare --help"
                    .to_string(),
            );
        }
        let mut range = |key: &str, value: f64, allowed: &str, ok: bool| {
            if !ok || !value.is_finite() {
                bad.push(format!("{key} is {value}; allowed: {allowed}"));
            }
        };
        range("model.rope_base", model.rope_base, "more than 1", model.rope_base > 1.0);
        range("model.qk_gain", model.qk_gain, "more than 0", model.qk_gain > 0.0);
        range("model.norm_eps", model.norm_eps, "more than 0", model.norm_eps > 0.0);
        range("train.lr", train.lr, "0 and more", train.lr >= 0.0);
        range("train.grad_clip", train.grad_clip, "0 (off) and more", train.grad_clip >= 0.0);
        range("train.weight_decay", train.weight_decay, "0 and more", train.weight_decay >= 0.0);
        range(
            "train.final_lr_factor",
            train.final_lr_factor,
            "0 to 1",
            (0.0..=1.0).contains(&train.final_lr_factor),
        );
        range("train.betas[0]", train.betas[0], "0 to less than 1", (0.0..1.0).contains(&train.betas[0]));
        range("train.betas[1]", train.betas[1], "0 to less than 1", (0.0..1.0).contains(&train.betas[1]));
        range("train.eps", train.eps, "more than 0", train.eps > 0.0);
        range(
            "train.ema_decay",
            train.ema_decay,
            "0 (off) to less than 1",
            (0.0..1.0).contains(&train.ema_decay),
        );
        range(
            "train.caption_dropout",
            train.caption_dropout,
            "0 to 1",
            (0.0..=1.0).contains(&train.caption_dropout),
        );
        range("flow.logit_mean", flow.logit_mean, "a finite number", true);
        range("flow.logit_std", flow.logit_std, "more than 0", flow.logit_std > 0.0);
        range("flow.shift", flow.shift, "more than 0", flow.shift > 0.0);
        range("dsv.predictor_lr", dsv.predictor_lr, "0 and more", dsv.predictor_lr >= 0.0);
        range(
            "dsv.predictor_lr_stage2_factor",
            dsv.predictor_lr_stage2_factor,
            "0 and more",
            dsv.predictor_lr_stage2_factor >= 0.0,
        );
        range("dsv.theta", dsv.theta, "more than 0, less than 1", dsv.theta > 0.0 && dsv.theta < 1.0);
        range(
            "dsv.max_keep",
            dsv.max_keep,
            "more than 0, up to 1",
            dsv.max_keep > 0.0 && dsv.max_keep <= 1.0,
        );
        range("dsv.min_sparsity", dsv.min_sparsity, "0 to 1", (0.0..=1.0).contains(&dsv.min_sparsity));
        range(
            "dsv.memory_budget_gb",
            dsv.memory_budget_gb,
            "0 (what is free) and more",
            dsv.memory_budget_gb >= 0.0,
        );
        range(
            "train.kept_budget_gb",
            train.kept_budget_gb,
            "0 (no limit) and more",
            train.kept_budget_gb >= 0.0,
        );
        if let Some(f) = dsv.force_sparse {
            range("dsv.force_sparse", f, "0 to 1, or absent", (0.0..=1.0).contains(&f));
        }
        if let Some(k) = dsv.keep {
            range("dsv.keep", k, "more than 0, up to dsv.max_keep, or absent", k > 0.0 && k <= dsv.max_keep);
        }
        if let Some(side) = dsv.keep_window {
            range("dsv.keep_window", side, "more than 0, up to 1, or absent", side > 0.0 && side <= 1.0);
        }
        range("sample.guidance", sample.guidance, "0 and more", sample.guidance >= 0.0);
        if dsv.attention == Attention::Fixed && dsv.keep.is_none() {
            bad.push(
                "dsv.keep is absent, but dsv.attention is \"fixed\"; allowed: more than 0, up to dsv.max_keep"
                    .to_string(),
            );
        }
        match (dsv.share, dsv.keep) {
            (Share::Need, None) => bad.push(
                "dsv.keep is absent, but dsv.share is \"need\", which shares it out; allowed: more than 0, below dsv.max_keep (or dsv.share=\"even\")"
                    .to_string(),
            ),
            (Share::Need, Some(k)) if k == dsv.max_keep => bad.push(format!(
                "dsv.max_keep is {k}, as dsv.keep is, but dsv.share is \"need\", under which some heads keep more; allowed: more than {k}, up to 1 (or dsv.share=\"even\")"
            )),
            _ => {}
        }
        if device.graphs && train.kept_budget_gb > 0.0 {
            bad.push(format!(
                "device.graphs is true and train.kept_budget_gb {}; copies to the host are not recorded in graphs: --set device.graphs=false, or train.kept_budget_gb=0",
                train.kept_budget_gb
            ));
        }
        if train.init_map.is_some() && train.init_weights.is_none() {
            bad.push("train.init_map is set, but not train.init_weights, whose tensors it names".to_string());
        }
        let (g, n) = (dsv.query_group, dsv.kv_block);
        if g > 0 && n > 0 && g.max(n) % g.min(n) != 0 {
            bad.push(format!(
                "dsv.query_group is {g} and dsv.kv_block {n}; token cubes nest, so one must be a multiple of the other"
            ));
        }
        match dsv.cube {
            Some(CubeChoice::Auto) if !matches!(dsv.attention, Attention::Dsv | Attention::Full) => {
                bad.push(format!(
                    "dsv.cube is \"auto\" and dsv.attention \"{}\", which has no stage 1 to measure in; allowed: \"dsv\" (or \"full\", to which the cube is nothing), or a cube such as dsv.cube=\"{}\"",
                    dsv.attention.name(),
                    Cube::of_group(g.max(n) as u32)
                ));
            }
            Some(CubeChoice::Shape(cube)) if g > 0 && n > 0 => {
                let shapes = Cube::shapes(g.max(n) as u32);
                let tokens = shapes[0].tokens();
                let shapes = shapes.iter().map(Cube::to_string).collect::<Vec<_>>().join(", ");
                if cube.tokens() != tokens {
                    bad.push(format!(
                        "dsv.cube is {cube}, {} tokens; allowed: {tokens} tokens, the largest power of two in query_group and kv_block, such as {shapes}",
                        cube.tokens()
                    ));
                }
                for [t, h, w] in self.grids().into_iter().map(|grid| self.token_grid(grid)) {
                    if !cube.fits(Grid { t, h, w }) {
                        bad.push(format!(
                            "dsv.cube is {cube}, of which none fits into clips of {t} x {h} x {w} tokens; allowed: sides up to the clip's"
                        ));
                    }
                }
            }
            _ => {}
        }
        if device.kind == DeviceKind::Cuda {
            let mut served = |what: &str, value: String, available: Vec<String>| {
                if !available.contains(&value) {
                    let list = available.join(", ");
                    bad.push(format!(
                        "{what} is {value}, which no kernel serves on cuda; available: {list} (any on cpu)"
                    ));
                }
            };
            let dims = TRAINER_HEAD_DIMS.map(|d| d.to_string()).to_vec();
            served("model.head_dim", model.head_dim.to_string(), dims);
            if dsv.attention != Attention::Full {
                let gathered = SHIPPED_GATHER_HEAD_DIMS.iter().any(|&d| usize::from(d) == model.head_dim);
                let fine = if gathered { SHIPPED_GATHER.as_slice() } else { &[] };
                let size = |&(g, n): &(u16, u16)| format!("{g} x {n}");
                let sizes = SHIPPED_BLOCK_SIZES.iter().chain(fine).map(size).collect();
                served("dsv.query_group x dsv.kv_block", format!("{g} x {n}"), sizes);
            }
            if dsv.attention.predicts() {
                let shipped = SHIPPED_RANKS.iter().any(|&rank| usize::from(rank) == dsv.rank);
                bad.extend((!shipped).then(|| rank_not_served(dsv.rank)));
            }
            let gathered = SHIPPED_GATHER.iter().any(|&(a, b)| (usize::from(a), usize::from(b)) == (g, n));
            if dsv.attention != Attention::Full && train.deterministic && gathered {
                bad.push(no_deterministic_gather(n));
            }
        }
        if bad.is_empty() && dsv.attention.predicts() {
            bad.extend(dsv.keep_window.and_then(|side| self.window_too_wide(side)));
        }
        if bad.is_empty() { Ok(()) } else { Err(ConfigError::Impossible(bad)) }
    }

    /// Where the run keeps averaged weights; `None` where it keeps none.
    pub fn ema_space(&self) -> Option<Space> {
        (self.train.ema_decay > 0.0).then_some(match self.train.ema_on {
            EmaOn::Device => Space::Device,
            EmaOn::Host => Space::Host,
        })
    }

    /// Width of the model: `heads * head_dim`.
    pub fn dim(&self) -> usize {
        self.model.heads * self.model.head_dim
    }

    /// Tokens along time, height and width.
    pub fn grid(&self) -> [usize; 3] {
        let p = self.model.patch;
        [self.data.frames / p[0], self.data.height / p[1], self.data.width / p[2]]
    }

    /// Tokens along time, height and width of latents [frames, height, width].
    fn token_grid(&self, latents: [usize; 3]) -> [u32; 3] {
        std::array::from_fn(|i| (latents[i] / self.model.patch[i].max(1)) as u32)
    }

    /// The cube of tokens that are contiguous when the run begins.
    pub fn first_cube(&self) -> Cube {
        match self.dsv.cube {
            Some(CubeChoice::Shape(cube)) => cube,
            Some(CubeChoice::Auto) | None => {
                Cube::of_group(self.dsv.query_group.max(self.dsv.kv_block) as u32)
            }
        }
    }

    /// Why lists do not hold the window of `dsv.keep_window`, if they do not.
    fn window_too_wide(&self, side: f64) -> Option<String> {
        let (g, n) = (self.dsv.query_group, self.dsv.kv_block);
        let cube = self.first_cube();
        let share = self.dsv.keep.unwrap_or(self.dsv.max_keep);
        let grids = self.grids().into_iter().map(|grid| self.token_grid(grid));
        let grids = grids.map(|[t, h, w]| Grid { t, h, w }).filter(|&grid| cube.fits(grid));
        grids
            .map(|grid| {
                let order = token_order(grid, cube);
                let widest = KvListsBuf::window(1, 1, g, n, grid, &order, [side; 3]).dims.max_selected;
                let blocks = grid.tokens().div_ceil(n);
                let kept = ((blocks as f64 * share - 1e-9).ceil() as usize).clamp(1, blocks);
                (grid, widest, kept, blocks)
            })
            .find(|&(_, widest, kept, _)| widest > kept)
            .map(|(Grid { t, h, w }, widest, kept, blocks)| {
                format!(
                    "dsv.keep_window is {side}, within which a group of a clip of {t} x {h} x {w} tokens has up to {widest} of {blocks} KV blocks, but it lists {kept} ({share} of them); allowed: a smaller window, a finer dsv.kv_block, a larger dsv.keep and dsv.max_keep, or absent"
                )
            })
    }

    /// Video tokens of a clip.
    pub fn tokens(&self) -> usize {
        self.grid().iter().product()
    }

    /// Grids of latents `[frames, height, width]` that clips may have; the first is that of evaluation and samples.
    pub fn grids(&self) -> Vec<[usize; 3]> {
        let Data { frames, height, width, buckets, .. } = &self.data;
        std::iter::once([*frames, *height, *width]).chain(buckets.iter().copied()).collect()
    }

    /// The same run with clips of this grid alone: what decides the sizes of its buffers and lists.
    pub fn of_grid(&self, [frames, height, width]: [usize; 3]) -> Config {
        let mut config = self.clone();
        (config.data.frames, config.data.height, config.data.width) = (frames, height, width);
        config.data.buckets = Vec::new();
        config
    }

    /// Shape of a clip's latents, `[channels, frames, height, width]`.
    pub fn latent_shape(&self) -> [usize; 4] {
        [self.model.latent_channels, self.data.frames, self.data.height, self.data.width]
    }

    /// Values of one token before the patch embedding.
    pub fn patch_dim(&self) -> usize {
        self.model.latent_channels * self.model.patch.iter().product::<usize>()
    }

    /// Query groups of a clip, the last possibly short.
    pub fn groups(&self) -> usize {
        self.tokens().div_ceil(self.dsv.query_group)
    }

    /// KV blocks of a clip, the last possibly short.
    pub fn kv_blocks(&self) -> usize {
        self.tokens().div_ceil(self.dsv.kv_block)
    }

    /// Width of the predicted lists: the most KV blocks a group may keep.
    pub fn max_selected(&self) -> usize {
        let n = self.kv_blocks();
        let share = match (self.dsv.attention, self.dsv.keep, self.dsv.share) {
            (Attention::Fixed, Some(keep), Share::Even) => keep,
            _ => self.dsv.max_keep,
        };
        ((n as f64 * share - 1e-9).ceil() as usize).clamp(1, n.max(1))
    }

    /// Levels of the Haar transform whose latents have `model.latent_channels` channels (`3 * 8^levels`), if any.
    pub fn haar_levels(&self) -> Option<u32> {
        (1..=2).find(|&l| 3 * 8usize.pow(l) == self.model.latent_channels)
    }

    /// Learning rate of a step counted from 0: warm-up, then the decay.
    pub fn lr_at(&self, step: u64) -> f64 {
        let t = &self.train;
        if step < t.warmup_steps {
            return t.lr * (step + 1) as f64 / t.warmup_steps as f64;
        }
        let span = t.steps.saturating_sub(t.warmup_steps).saturating_sub(1).max(1) as f64;
        let x = ((step - t.warmup_steps) as f64 / span).min(1.0);
        let down = match t.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - x,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * x).cos()),
        };
        t.lr * (t.final_lr_factor + (1.0 - t.final_lr_factor) * down).min(1.0)
    }

    /// blake3 (hex) of what the weights' shapes and the data order depend on: `[model]`, `[data]` without its
    /// path and readers, and `dsv.rank`. A checkpoint of another fingerprint cannot be resumed.
    pub fn fingerprint(&self) -> String {
        // Neither where shards lie nor who reads them.
        let data = Data { path: PathBuf::new(), readers: 0, read_ahead: 0, ..self.data.clone() };
        let what = serde_json::json!({ "model": self.model, "data": data, "rank": self.dsv.rank });
        blake3::hash(what.to_string().as_bytes()).to_hex().to_string()
    }

    /// `section.key: here -> there` for every key in which two runs differ.
    pub fn differences(&self, other: &Config) -> Vec<String> {
        let table = |c: &Config| toml::Table::try_from(c).expect("a config serialises");
        let (a, b) = (table(self), table(other));
        let show = |t: &toml::Table, section: &str, key: &str| {
            t.get(section).and_then(|s| s.get(key)).map_or("none".to_string(), |v| v.to_string())
        };
        let mut out = Vec::new();
        for (section, keys) in KEYS {
            for (key, _) in *keys {
                let (x, y) = (show(&a, section, key), show(&b, section, key));
                if x != y {
                    out.push(format!("{section}.{key}: {x} -> {y}"));
                }
            }
        }
        out
    }
}

/// Why lists of units below 64 tokens are refused on a GPU that is to give the same bits on every run.
pub(crate) fn no_deterministic_gather(kv_block: usize) -> String {
    format!(
        "train.deterministic is true and dsv.kv_block {kv_block}; on a GPU, dK and dV over units below 64 tokens differ in the last bits between runs: --set train.deterministic=false, or dsv.kv_block=64 or 128"
    )
}

/// Why a low-rank width is refused on a GPU.
pub(crate) fn rank_not_served(rank: usize) -> String {
    let list = |ranks: &[u8]| ranks.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
    format!(
        "dsv.rank is {rank}, which no kernel serves on cuda; available: {} (any on cpu); to add one of {}: put it in \
         SHIPPED_RANKS (codegen/spec/src/space.rs), then dsv-codegen --arch sm90",
        list(&SHIPPED_RANKS),
        list(&dsv_spec::RANKS)
    )
}

fn multiples_near(size: usize, unit: usize) -> String {
    let below = size / unit * unit;
    if below == 0 { unit.to_string() } else { format!("{below} or {}", below + unit) }
}

fn indent(text: &str) -> String {
    text.trim_end().lines().map(|l| format!("  {l}")).collect::<Vec<_>>().join("\n")
}

/// An error in the merged text, told with the user's own line where the value is theirs.
fn wrong_value(error: &toml::de::Error, merged: &str, text: &str) -> String {
    let start = error.span().map_or(0, |s| s.start).min(merged.len());
    let before = &merged[..start];
    let section = before.rfind("\n[").and_then(|i| before[i + 2..].split(']').next());
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    let line = merged[line_start..].lines().next().unwrap_or("");
    let key = line.split('=').next().unwrap_or("").trim();
    let at = line_of(text, section, key).map_or(String::new(), |l| format!("line {l}: "));
    let section = section.map_or(String::new(), |s| format!("[{s}] "));
    format!("  {at}{section}{line}\n{}", indent(error.message()))
}

/// A message for each key of `table` that no section has.
fn unknown_keys(table: &toml::Table, origin: &str, text: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (section, value) in table {
        if section == "preset" {
            continue;
        }
        let Some((_, keys)) = KEYS.iter().find(|(s, _)| s == section) else {
            let at = line_of(text, None, section).map_or(String::new(), |l| format!(" line {l}"));
            let sections: Vec<&str> = std::iter::once("preset").chain(KEYS.iter().map(|(s, _)| *s)).collect();
            out.push(unknown(&format!("{origin}{at}"), section, "sections", &sections));
            continue;
        };
        if let toml::Value::Table(inner) = value {
            for key in inner.keys() {
                if !keys.iter().any(|(k, _)| k == key) {
                    let at =
                        line_of(text, Some(section), key).map_or(String::new(), |l| format!(" line {l}"));
                    let allowed: Vec<&str> = keys.iter().map(|(k, _)| *k).collect();
                    out.push(unknown(
                        &format!("{origin}{at}"),
                        &format!("{section}.{key}"),
                        &format!("keys of [{section}]"),
                        &allowed,
                    ));
                }
            }
        }
    }
    out
}

fn unknown(place: &str, key: &str, what: &str, allowed: &[&str]) -> String {
    let last = key.rsplit('.').next().unwrap_or(key);
    let near = allowed.iter().map(|a| (edit_distance(a, last), *a)).min().filter(|(d, _)| *d <= 2);
    let hint = near.map_or(String::new(), |(_, a)| format!("\n  did you mean: {a}"));
    format!(
        "{place}: unknown key {key:?}\n  {what}: {}{hint}\n  next: dsv-train plan --preset tiny   (prints every key, its default and its meaning)",
        allowed.join(", ")
    )
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let swap = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = swap.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Line (from 1) where `key` is set in `section`, or where the section itself starts.
fn line_of(text: &str, section: Option<&str>, key: &str) -> Option<usize> {
    let mut current = String::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.split(']').next()) {
            current = name.trim().to_string();
            if section.is_none() && current == key {
                return Some(i + 1);
            }
        } else if let Some((k, _)) = line.split_once('=') {
            let k = k.trim();
            let plain = k == key && current == section.unwrap_or("");
            let dotted = current.is_empty() && section.is_some_and(|s| k == format!("{s}.{key}"));
            if plain || dotted {
                return Some(i + 1);
            }
        }
    }
    None
}

/// Applies one `section.key=value`; an unknown key comes back as its message.
fn apply_set(table: &mut toml::Table, set: &str) -> Result<Option<String>, ConfigError> {
    let form = |detail: String| ConfigError::Parse { origin: format!("--set {set}"), detail };
    let (path, value) = set
        .split_once('=')
        .ok_or_else(|| form("  no '='; the form is section.key=value, as in train.steps=50".into()))?;
    let (section, key) = path
        .trim()
        .split_once('.')
        .ok_or_else(|| form("  no section; the form is section.key=value, as in train.steps=50".into()))?;
    let value = value.trim();
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_string()));
    let mut one = toml::Table::new();
    one.insert(key.to_string(), parsed.clone());
    let mut whole = toml::Table::new();
    whole.insert(section.to_string(), toml::Value::Table(one));
    if let Some(message) = unknown_keys(&whole, &format!("--set {set}"), "").pop() {
        return Ok(Some(message));
    }
    if let Some(toml::Value::Table(inner)) = table.get_mut(section) {
        if value == "none" {
            inner.remove(key);
        } else {
            inner.insert(key.to_string(), parsed);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Config::from_toml(text, "a.toml", None, &[]).unwrap_err().to_string()
    }

    #[test]
    fn presets_are_valid_and_round_trip() {
        for name in PRESETS {
            let c = Config::preset(name).unwrap();
            c.validate().unwrap();
            let again = Config::from_toml(&c.documented_toml(), "printed", None, &[]).unwrap();
            assert_eq!(c, again, "{name}");
        }
        let c = Config::preset("2.7b").unwrap();
        assert_eq!((c.dim(), c.grid(), c.tokens()), (2048, [32, 32, 32], 32768));
        assert_eq!((c.groups(), c.kv_blocks(), c.max_selected()), (512, 512, 256));
    }

    #[test]
    fn the_key_list_is_the_structs() {
        let mut c = Config::preset("tiny").unwrap();
        c.dsv.force_sparse = Some(0.9);
        c.dsv.keep = Some(0.2);
        c.dsv.keep_window = Some(0.1);
        c.dsv.cube = Some(CubeChoice::Auto);
        c.data.buckets = vec![[4, 8, 16]];
        c.data.plays = Some(2);
        c.train.init_weights = Some("w.safetensors".into());
        c.train.init_map = Some("map.toml".into());
        c.device.table = Some("t.json".into());
        c.device.bundle = Some("cubins".into());
        let table = toml::Table::try_from(&c).unwrap();
        for (section, keys) in KEYS {
            let have: std::collections::BTreeSet<&str> =
                table[*section].as_table().unwrap().keys().map(String::as_str).collect();
            let listed: std::collections::BTreeSet<&str> = keys.iter().map(|(k, _)| *k).collect();
            assert_eq!(have, listed, "[{section}]");
        }
        assert_eq!(table.len(), KEYS.len() + 1);
        assert_eq!(Config::from_toml(&c.documented_toml(), "p", None, &[]).unwrap(), c);
    }

    #[test]
    fn a_scene_is_played_a_whole_number_of_times() {
        let mut c = Config::preset("tiny").unwrap();
        c.data.frames = 8;
        for (plays, ok) in [(1, true), (2, true), (0, false), (3, false)] {
            c.data.plays = Some(plays);
            let found = c.validate().err().map(|e| e.to_string()).unwrap_or_default();
            assert_eq!(
                !found.contains(&format!("data.plays is {plays}, which does not divide the 8 latent frames")),
                ok
            );
        }
    }

    #[test]
    fn unknown_keys_name_the_key_the_allowed_ones_and_the_next_command() {
        insta::assert_snapshot!(error("[model]\nlyers = 2\n[smaple]\nsteps = 3\n"), @r#"
        a.toml line 2: unknown key "model.lyers"
          keys of [model]: layers, heads, head_dim, mlp, mlp_ratio, text_dim, text_tokens, patch, latent_channels, rope_base, qk_gain, norm_eps
          did you mean: layers
          next: dsv-train plan --preset tiny   (prints every key, its default and its meaning)
        a.toml line 3: unknown key "smaple"
          sections: preset, model, data, train, flow, dsv, device, sample, out
          did you mean: sample
          next: dsv-train plan --preset tiny   (prints every key, its default and its meaning)
        "#);
    }

    #[test]
    fn presets_say_whether_a_gpu_trains_them() {
        let on_a_gpu = |preset: &str| {
            let mut config = Config::preset(preset).unwrap();
            config.device.kind = DeviceKind::Cuda;
            (config.dsv.query_group, config.dsv.kv_block) = (64, 64);
            config.validate().map_err(|e| e.to_string())
        };
        assert_eq!(on_a_gpu("0.8b"), Ok(()));
        assert_eq!(on_a_gpu("2.7b"), Ok(()));
        assert_eq!(on_a_gpu("30b"), Ok(()));
        let error = on_a_gpu("tiny").unwrap_err();
        let wanted =
            "model.head_dim is 32, which no kernel serves on cuda; available: 64, 96, 128, 256 (any on cpu)";
        assert!(error.contains(wanted), "{error}");
    }

    #[test]
    fn a_kept_window_fits_into_the_lists() {
        let with = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            let clip = "[data]\nframes = 16\nheight = 16\nwidth = 16\n[model]\npatch = [1, 1, 1]\n[dsv]\nquery_group = 64\nkv_block = 8\nkeep = 0.2\nkeep_window = 0.33";
            Config::from_toml(clip, "f", Some("0.8b"), &sets).map_err(|e| e.to_string())
        };
        assert_eq!(with(&[]).unwrap().dsv.keep_window, Some(0.33));
        with(&["dsv.kv_block=64"]).unwrap();
        // Without predictors nothing looks at it.
        with(&["dsv.keep_window=0.9", "dsv.attention=full"]).unwrap();
        insta::assert_snapshot!(with(&["dsv.kv_block=64", "dsv.keep_window=0.75"]).unwrap_err(), @r"
        the config describes no possible run (1 problem)
          - dsv.keep_window is 0.75, within which a group of a clip of 16 x 16 x 16 tokens has up to 48 of 64 KV blocks, but it lists 13 (0.2 of them); allowed: a smaller window, a finer dsv.kv_block, a larger dsv.keep and dsv.max_keep, or absent
          next: correct the keys above, then dsv-train plan CONFIG.toml
        ");
        insta::assert_snapshot!(with(&["dsv.keep_window=0"]).unwrap_err(), @r"
        the config describes no possible run (1 problem)
          - dsv.keep_window is 0; allowed: more than 0, up to 1, or absent
          next: correct the keys above, then dsv-train plan CONFIG.toml
        ");
    }

    #[test]
    fn fine_lists_train_on_a_gpu_without_determinism() {
        let with = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            Config::from_toml("[device]\nkind = \"cuda\"", "f", Some("0.8b"), &sets)
                .map_err(|e| e.to_string())
        };
        for (group, block) in SHIPPED_GATHER {
            for head_dim in SHIPPED_GATHER_HEAD_DIMS {
                let sizes = [
                    format!("dsv.query_group={group}"),
                    format!("dsv.kv_block={block}"),
                    format!("model.head_dim={head_dim}"),
                ];
                let sizes: Vec<&str> = sizes.iter().map(String::as_str).collect();
                assert_eq!(with(&sizes).map(|_| ()), Ok(()));
                let exact = [&sizes[..], &["train.deterministic=true"]].concat();
                let error = with(&exact).unwrap_err();
                assert!(
                    error.contains("1 problem") && error.contains("train.deterministic=false"),
                    "{error}"
                );
                // Neither without lists nor on the CPU.
                with(&[&exact[..], &["dsv.attention=full"]].concat()).unwrap();
                with(&[&exact[..], &["device.kind=cpu"]].concat()).unwrap();
            }
        }
        insta::assert_snapshot!(with(&["dsv.kv_block=16", "train.deterministic=true"]).unwrap_err(), @r"
        the config describes no possible run (1 problem)
          - dsv.query_group x dsv.kv_block is 64 x 16, which no kernel serves on cuda; available: 64 x 64, 128 x 128, 64 x 1, 64 x 8, 128 x 1, 128 x 8 (any on cpu)
          next: correct the keys above, then dsv-train plan CONFIG.toml
        ");
        insta::assert_snapshot!(with(&["dsv.kv_block=8", "train.deterministic=true"]).unwrap_err(), @r"
        the config describes no possible run (1 problem)
          - train.deterministic is true and dsv.kv_block 8; on a GPU, dK and dV over units below 64 tokens differ in the last bits between runs: --set train.deterministic=false, or dsv.kv_block=64 or 128
          next: correct the keys above, then dsv-train plan CONFIG.toml
        ");
    }

    #[test]
    fn the_quality_run_takes_fine_lists() {
        let text = include_str!("../configs/quality.toml");
        for (group, block) in SHIPPED_BLOCK_SIZES.iter().chain(&SHIPPED_GATHER) {
            let sets = [format!("dsv.query_group={group}"), format!("dsv.kv_block={block}")];
            let c = Config::from_toml(text, "quality.toml", None, &sets).unwrap();
            assert_eq!((c.tokens(), c.kv_blocks()), (4096, 4096 / *block as usize));
        }
    }

    #[test]
    fn impossible_shapes_are_all_reported() {
        let text = "[model]\nhead_dim = 33\npatch = [1, 2, 2]\n[data]\nheight = 15\nclips = 4\n[dsv]\nquery_group = 12\nkeep = 0.9\n[device]\nkind = \"cuda\"";
        insta::assert_snapshot!(error(text), @r#"
        the config describes no possible run (7 problems)
          - data.height is 15, which the patch 2 (model.patch = [1, 2, 2]) does not divide; nearest allowed: 14 or 16
          - model.head_dim is 33; RoPE rotates pairs, so it must be even
          - data.clips is 4 and data.validation 8; at least one clip must be left to train on
          - dsv.keep is 0.9; allowed: more than 0, up to dsv.max_keep, or absent
          - dsv.query_group is 12 and dsv.kv_block 8; token cubes nest, so one must be a multiple of the other
          - model.head_dim is 33, which no kernel serves on cuda; available: 64, 96, 128, 256 (any on cpu)
          - dsv.query_group x dsv.kv_block is 12 x 8, which no kernel serves on cuda; available: 64 x 64, 128 x 128 (any on cpu)
          next: correct the keys above, then dsv-train plan CONFIG.toml
        "#);
    }

    #[test]
    fn budgets_by_need_are_of_a_mean_and_may_exceed_it() {
        let with = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            Config::from_toml("[dsv]\nshare = \"need\"", "f", Some("0.8b"), &sets).map_err(|e| e.to_string())
        };
        insta::assert_snapshot!(with(&[]).unwrap_err(), @r#"
        the config describes no possible run (1 problem)
          - dsv.keep is absent, but dsv.share is "need", which shares it out; allowed: more than 0, below dsv.max_keep (or dsv.share="even")
          next: correct the keys above, then dsv-train plan CONFIG.toml
        "#);
        insta::assert_snapshot!(with(&["dsv.keep=0.2", "dsv.max_keep=0.2"]).unwrap_err(), @r#"
        the config describes no possible run (1 problem)
          - dsv.max_keep is 0.2, as dsv.keep is, but dsv.share is "need", under which some heads keep more; allowed: more than 0.2, up to 1 (or dsv.share="even")
          next: correct the keys above, then dsv-train plan CONFIG.toml
        "#);
        insta::assert_snapshot!(with(&["dsv.share=most"]).unwrap_err(), @r#"
        f is not a valid config
          line 2: [dsv] share = "most"
          unknown variant `most`, expected `even` or `need`
          next: dsv-train plan --preset tiny   (prints every key, its default and its meaning)
        "#);
        // A mean above the widest list is one problem, not two.
        assert!(with(&["dsv.keep=0.3", "dsv.max_keep=0.2"]).unwrap_err().contains("1 problem"));
        let widths = |share: &str| {
            ["dsv", "fixed"].map(|attention| {
                let sets = [
                    "dsv.keep=0.25".into(),
                    format!("dsv.share={share}"),
                    format!("dsv.attention={attention}"),
                ];
                let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
                let c = with(&sets).unwrap();
                c.max_selected() as f64 / c.kv_blocks() as f64
            })
        };
        assert_eq!((widths("even"), widths("need")), ([0.5, 0.25], [0.5, 0.5]));
    }

    #[test]
    fn wrong_types_and_words_say_where() {
        insta::assert_snapshot!(error("[dsv]\nswitch = \"soon\"\n"), @r#"
        a.toml is not a valid config
          line 2: [dsv] switch = "soon"
          dsv.switch is "soon"; allowed: a step number from 0 (switch = 100) or a loss (switch = "loss < 0.01")
          next: dsv-train plan --preset tiny   (prints every key, its default and its meaning)
        "#);
        insta::assert_snapshot!(error("[train]\ndecay = \"exp\"\n"), @r#"
        a.toml is not a valid config
          line 2: [train] decay = "exp"
          unknown variant `exp`, expected one of `cosine`, `linear`, `constant`
          next: dsv-train plan --preset tiny   (prints every key, its default and its meaning)
        "#);
        assert!(error("preset = \"3b\"").contains("presets: tiny, 0.8b, 2.7b, 30b"));
        assert!(error("[model\n").contains("line 1"), "{}", error("[model\n"));
    }

    #[test]
    fn sets_override_the_file() {
        let sets =
            ["train.steps=7", "dsv.switch=loss < 0.5", "dsv.keep=0.3", "out.dir=x/y", "model.patch=[2,2,2]"];
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        let c = Config::from_toml("[train]\nsteps = 9\nlr = 0.5\n", "f", Some("tiny"), &sets).unwrap();
        assert_eq!((c.train.steps, c.train.lr, c.dsv.keep), (7, 0.5, Some(0.3)));
        assert_eq!((c.dsv.switch, c.out.dir.as_path()), (Switch::Loss(0.5), Path::new("x/y")));
        assert_eq!(c.model.patch, [2, 2, 2]);
        let base = Config::preset("tiny").unwrap();
        assert_eq!(base.differences(&c).len(), 6);
        let bad = Config::from_toml("", "f", None, &["train.stpes=7".into()]).unwrap_err().to_string();
        assert!(
            bad.contains("--set train.stpes=7: unknown key \"train.stpes\"")
                && bad.contains("did you mean: steps")
        );
        let none = Config::from_toml("[dsv]\nkeep = 0.2", "f", None, &["dsv.keep=none".into()]).unwrap();
        assert_eq!(none.dsv.keep, None);
    }

    #[test]
    fn cubes_have_as_many_tokens_as_the_larger_of_group_and_unit() {
        let with = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            Config::from_toml("", "f", Some("0.8b"), &sets).map_err(|e| e.to_string())
        };
        let cube = |sets: &[&str]| with(sets).unwrap().first_cube().to_string();
        assert_eq!((cube(&[]), cube(&["dsv.kv_block=128"])), ("4x4x4".into(), "4x4x8".into()));
        assert_eq!((cube(&["dsv.cube=2x4x8"]), cube(&["dsv.cube=auto"])), ("2x4x8".into(), "4x4x4".into()));
        assert_eq!(with(&["dsv.cube=auto"]).unwrap().dsv.cube, Some(CubeChoice::Auto));
        with(&["dsv.cube=auto", "dsv.attention=full"]).unwrap();
        let again = with(&["dsv.cube=1x8x8"]).unwrap();
        assert_eq!(Config::from_toml(&again.documented_toml(), "p", None, &[]).unwrap(), again);
        let wrong = ["dsv.cube=2x2x2", "data.frames=4", "data.buckets=[[1, 64, 64]]"];
        insta::assert_snapshot!(with(&wrong).unwrap_err(), @r"
        the config describes no possible run (2 problems)
          - dsv.cube is 2x2x2, 8 tokens; allowed: 64 tokens, the largest power of two in query_group and kv_block, such as 4x4x4, 1x8x8, 2x4x8, 8x2x4, 16x2x2, 32x1x2, 64x1x1
          - dsv.cube is 2x2x2, of which none fits into clips of 1 x 32 x 32 tokens; allowed: sides up to the clip's
          next: correct the keys above, then dsv-train plan CONFIG.toml
        ");
        insta::assert_snapshot!(with(&["dsv.cube=auto", "dsv.attention=wa-m"]).unwrap_err(), @r#"
        the config describes no possible run (1 problem)
          - dsv.cube is "auto" and dsv.attention "wa-m", which has no stage 1 to measure in; allowed: "dsv" (or "full", to which the cube is nothing), or a cube such as dsv.cube="4x4x4"
          next: correct the keys above, then dsv-train plan CONFIG.toml
        "#);
        insta::assert_snapshot!(with(&["dsv.cube=4x4"]).unwrap_err(), @r#"
        f is not a valid config
          [dsv] cube = "4x4"
          dsv.cube is "4x4"; allowed: "auto", or frames x rows x columns, powers of two, as in "2x4x8"
          next: dsv-train plan --preset tiny   (prints every key, its default and its meaning)
        "#);
    }

    #[test]
    fn buckets_are_multiples_of_the_patch_and_named_once() {
        let text =
            "[model]\npatch = [1, 2, 2]\n[data]\nbuckets = [[4, 8, 32], [4, 7, 16], [4, 16, 16], [4, 8, 32]]";
        let error = error(text);
        assert!(error.contains("3 problems") && error.contains("data.buckets[1] has 7 rows"), "{error}");
        for twice in ["data.buckets[2] is [4, 16, 16]", "data.buckets[3] is [4, 8, 32]"] {
            assert!(error.contains(twice), "{error}");
        }
        let sets = ["data.buckets=[[4, 8, 32], [2, 16, 16]]".to_string()];
        let c = Config::from_toml("", "f", Some("tiny"), &sets).unwrap();
        assert_eq!(c.grids(), [[4, 16, 16], [4, 8, 32], [2, 16, 16]]);
        let one = c.of_grid([2, 16, 16]);
        assert_eq!((one.grids(), one.tokens()), (vec![[2, 16, 16]], 512));
    }

    #[test]
    fn learning_rate_warms_up_and_decays() {
        let mut c = Config::preset("tiny").unwrap();
        (c.train.steps, c.train.warmup_steps, c.train.lr, c.train.final_lr_factor) = (110, 10, 1.0, 0.1);
        assert!((c.lr_at(0) - 0.1).abs() < 1e-12 && (c.lr_at(9) - 1.0).abs() < 1e-12);
        assert!((c.lr_at(10) - 1.0).abs() < 1e-12 && (c.lr_at(109) - 0.1).abs() < 1e-12);
        assert!(c.lr_at(50) < c.lr_at(40));
        c.train.decay = Decay::Constant;
        assert_eq!(c.lr_at(109), 1.0);
    }

    #[test]
    fn fingerprint_sees_shapes_only() {
        let a = Config::preset("tiny").unwrap();
        let mut b = a.clone();
        b.train.lr = 1.0;
        b.data.path = "elsewhere".into();
        b.data.readers += 1;
        assert_eq!(a.fingerprint(), b.fingerprint());
        b.model.layers += 1;
        assert_ne!(a.fingerprint(), b.fingerprint());
    }
}
