//! The operations a layer may use, and nothing else: one trait, implemented once per device.
//!
//! Rules every engine keeps:
//! * **Handles.** A [`Buf`] names a range of an arena. Ops take handles, return nothing, and may
//!   run asynchronously in the order they were issued. Only `write_*`, `read_*` and
//!   [`Engine::sync`] wait for the device.
//! * **Beside the ops** run copies to and from host memory ([`Engine::offload`], [`Engine::fetch`]) and what is queued by
//!   [`Engine::beside`]: from when they were issued until an [`Engine::after`] of their [`Done`]. Until then ops must not
//!   write what they read, nor touch what they write.
//! * **No allocation.** After [`Engine::reserve`] nothing is allocated. What an engine needs beside
//!   the buffers it is given comes from its own scratch range, whose size it states in
//!   [`DeviceFacts::scratch_bytes`] for the largest problem of the run.
//! * **Rounding.** Products accumulate in f32 (f64 in gradient tests) and are rounded once, when
//!   stored in the dtype of the destination handle. Pointwise ops read their operands, compute in
//!   f32, and round once per stored value. Sums over tokens (`bias_grad`, modulation gradients,
//!   norms) accumulate in f32 and store f32.
//! * **Aliasing.** Outputs never overlap inputs unless an op's text says "in place".
//! * **Layout.** Row-major, innermost index contiguous. `rows = batch * seqlen`, tokens in the
//!   contract's order. Attention operands are [`View`]s with strides in elements.
//! * **Wrong shapes** are programming errors and panic at issue time. Errors of the device
//!   (allocation, launch, an error flag raised by a kernel) are reported by the next `Result`.

pub mod arena;
pub mod cpu;
pub mod cuda;

pub use arena::{Allocation, ArenaPlan, Buf, Dtype, Precision, Space};
pub use cpu::CpuEngine;
pub use cuda::{CudaEngine, CudaOptions, PlannedGpu};
pub use dsv_spec::GroupRule;

use thiserror::Error;

/// The engine a configuration asks for, without an arena.
///
/// `auto` takes a GPU where there is one that the kernels serve, else the CPU, and says on stderr which and why.
/// `deterministic` asks a GPU for the attention backward whose sums have a fixed order; the CPU is so anyway.
///
/// # Errors
/// [`EngineError::NoDevice`] where `cuda` was asked for and there is no usable GPU.
pub fn open(device: &crate::config::Device, deterministic: bool) -> Result<Box<dyn Engine>, EngineError> {
    use crate::config::DeviceKind;
    let cpu = || Box::new(CpuEngine::<f32>::new());
    let options = CudaOptions {
        index: device.index,
        table: device.table.clone(),
        bundle: device.bundle.clone(),
        deterministic,
        graphs: device.graphs,
    };
    match device.kind {
        DeviceKind::Cpu => Ok(cpu()),
        DeviceKind::Cuda => Ok(Box::new(CudaEngine::open(&options)?)),
        DeviceKind::Auto => match CudaEngine::open(&options) {
            Ok(engine) => Ok(Box::new(engine)),
            Err(reason) => {
                eprintln!("device.kind = auto: training on the CPU; {reason}");
                Ok(cpu())
            }
        },
    }
}

/// Bytes of memory that the host can give without swapping; `None` where the system does not say.
fn host_free_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<usize>().ok()? * 1024)
}

/// What can go wrong on a device.
#[derive(Debug, Error)]
pub enum EngineError {
    /// There is no such device.
    #[error(
        "no usable GPU with index {index}: {reason}\n  next: nvidia-smi lists GPUs; without one: --set device.kind=cpu"
    )]
    NoDevice {
        /// `device.index`.
        index: usize,
        /// What is missing.
        reason: String,
    },
    /// The arena does not fit.
    #[error(
        "cannot reserve an arena of {needed_bytes} bytes: {reason}\n  smaller: --set data.batch_size=1, or fewer tokens (data.frames, data.height, data.width)\n  see every component: dsv-train plan"
    )]
    Reserve {
        /// Bytes asked for.
        needed_bytes: usize,
        /// What the device said.
        reason: String,
    },
    /// The host's part of the run does not fit.
    #[error(
        "cannot reserve {needed_bytes} bytes of page-locked host memory: {reason}\n  on the device instead: --set train.moments=8bit, train.ema_on=device, train.kept_budget_gb=0\n  see every component: dsv-train plan"
    )]
    ReserveHost {
        /// Bytes asked for.
        needed_bytes: usize,
        /// What the device said.
        reason: String,
    },
    /// A kernel raised the device error flag.
    #[error(
        "device error flag raised by {op}: {reason}\n  next: dsv-train run --resume goes on from the last checkpoint"
    )]
    Flag {
        /// The op, or the list of ops since the last sync.
        op: String,
        /// Decoded flag.
        reason: String,
    },
    /// Anything else the device reported.
    #[error("device: {0}")]
    Device(String),
}

/// Which operand of a product is transposed (all row-major).
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum GemmLayout {
    /// `c[m,n] = sum_k a[m,k] b[k,n]`: gradient of an input, `d_x = d_y w`.
    NN,
    /// `c[m,n] = sum_k a[m,k] b[n,k]`: forward, `y = x w^T` with `w [out, in]`.
    NT,
    /// `c[m,n] = sum_k a[k,m] b[k,n]`: gradient of a weight, `d_w = d_y^T x`.
    TN,
}

/// What happens to a product before it is stored.
#[derive(Copy, Clone, Debug, PartialEq)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// Store `pre = product + bias` in `pre [m,n]` (same dtype as `c`) and `c = gelu_tanh(pre)`.
    Gelu {
        /// Pre-activation, kept for the backward.
        pre: Buf,
    },
}

/// One matrix product. `a` and `b` have dtype `Act`; `c` has `Act` or `F32`.
#[derive(Copy, Clone, Debug)]
pub struct Gemm {
    /// Which operand is transposed.
    pub layout: GemmLayout,
    /// Rows of `c`.
    pub m: usize,
    /// Columns of `c`.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Left operand, `m*k` elements.
    pub a: Buf,
    /// Right operand, `k*n` elements.
    pub b: Buf,
    /// Result, `m*n` elements.
    pub c: Buf,
    /// `[n]` of dtype `Act`, added to every row.
    pub bias: Option<Buf>,
    /// `c += product` rather than `c = product` (the sum is formed in f32, then rounded once).
    pub accumulate: bool,
    /// `[m, n]` of `c`'s dtype, added to the product: a residual. Neither together with `accumulate` nor an epilogue.
    pub add: Option<Buf>,
    /// Applied last; not together with `accumulate`.
    pub epilogue: Epilogue,
}

impl Gemm {
    /// A product that overwrites `c`, without bias or epilogue.
    pub fn new(layout: GemmLayout, m: usize, n: usize, k: usize, a: Buf, b: Buf, c: Buf) -> Self {
        Gemm { layout, m, n, k, a, b, c, bias: None, accumulate: false, add: None, epilogue: Epilogue::None }
    }
    /// Adds `bias [n]` to every row.
    pub fn bias(mut self, bias: Buf) -> Self {
        self.bias = Some(bias);
        self
    }
    /// Adds to `c` rather than overwriting it.
    pub fn accumulate(mut self) -> Self {
        self.accumulate = true;
        self
    }
    /// Adds another matrix to the product.
    pub fn plus(mut self, residual: Buf) -> Self {
        self.add = Some(residual);
        self
    }
    /// Applies GELU, keeping the pre-activation in `pre`.
    pub fn gelu(mut self, pre: Buf) -> Self {
        self.epilogue = Epilogue::Gelu { pre };
        self
    }
}

/// A `[batch, seqlen, heads, head_dim]` operand inside a buffer; strides in elements, innermost 1.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct View {
    /// Begins at the first element of batch 0, token 0, head 0.
    pub buf: Buf,
    /// Elements between batch elements.
    pub batch_stride: usize,
    /// Elements between tokens.
    pub seq_stride: usize,
    /// Elements between heads.
    pub head_stride: usize,
}

impl View {
    /// A contiguous `[B, S, H, D]` buffer.
    pub fn bshd(buf: Buf, seqlen: usize, heads: usize, dim: usize) -> Self {
        Self::packed(buf, 1, 0, seqlen, heads, dim)
    }
    /// Part `part` of a packed `[B, S, parts, H, D]` buffer (for example V inside QKV).
    pub fn packed(buf: Buf, parts: usize, part: usize, seqlen: usize, heads: usize, dim: usize) -> Self {
        let width = heads * dim;
        let start = part * width;
        View {
            buf: buf.slice(start, buf.len() - start),
            batch_stride: seqlen * parts * width,
            seq_stride: parts * width,
            head_stride: dim,
        }
    }
}

/// Sizes and scale of one attention call. Query head `h` uses KV head `h` (multi-head).
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct AttnShape {
    /// Batch.
    pub batch: usize,
    /// Heads of Q, K and V.
    pub heads: usize,
    /// Query tokens.
    pub seqlen_q: usize,
    /// Key/value tokens.
    pub seqlen_kv: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the logits, usually `head_dim^-0.5`.
    pub scale: f32,
}

impl AttnShape {
    /// Attention of the same queries to a text of `tokens` tokens, of which there are `copies`, each for as many queries as if
    /// they were a sequence of their own: a batch of them all.
    pub fn to_text(self, tokens: usize, copies: usize) -> AttnShape {
        AttnShape { batch: self.batch * copies, seqlen_q: self.seqlen_q / copies, seqlen_kv: tokens, ..self }
    }
}

/// Sizes of a set of KV lists ([`dsv_reference::lists`] says what they hold).
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct ListShape {
    /// Batch.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Tokens of the self-attention.
    pub seqlen: usize,
    /// Queries sharing one list.
    pub query_group: usize,
    /// Tokens per selectable KV block.
    pub kv_block: usize,
    /// Width of a list: the only list number the host knows.
    pub max_selected: usize,
}

impl ListShape {
    /// Query groups, `ceil(seqlen / query_group)`.
    pub fn groups(&self) -> usize {
        self.seqlen.div_ceil(self.query_group)
    }
    /// KV blocks, `ceil(seqlen / kv_block)`.
    pub fn kv_blocks(&self) -> usize {
        self.seqlen.div_ceil(self.kv_block)
    }
    /// As the kernels name them.
    pub fn kernel_lists(&self) -> dsv_spec::Lists {
        dsv_spec::Lists::Blocks { query_group: self.query_group as u16, kv_block: self.kv_block as u16 }
    }
    /// Reserves the buffers of one set, with the inverse where the engine's backward reads it: not of units below 64 tokens,
    /// whose backward reads what the forward does.
    pub fn reserve(self, plan: &mut ArenaPlan, label: &str, inverse: bool) -> Lists {
        let bh = self.batch * self.heads;
        let entries = bh * self.groups() * self.max_selected;
        Lists {
            shape: self,
            q2k_index: plan.i32(label, entries),
            q2k_count: plan.i32(label, bh * self.groups()),
            inverse: (inverse && !self.kernel_lists().is_gather())
                .then(|| (plan.i32(label, bh * (self.kv_blocks() + 1)), plan.i32(label, entries))),
        }
    }
}

/// KV lists on the device, kept from a block's forward to its backward. Layers pass it on; only
/// engines look inside.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Lists {
    /// Sizes.
    pub shape: ListShape,
    /// `[B,H,G,max_selected]`, ascending and unique in the first `count` entries.
    pub q2k_index: Buf,
    /// `[B,H,G]`.
    pub q2k_count: Buf,
    /// `k2q_offset [B,H,N+1]` and `k2q_index [B,H,G*max_selected]`, when
    /// [`DeviceFacts::needs_inverse_lists`] and `kv_block` is 64 or more.
    pub inverse: Option<(Buf, Buf)>,
}

impl Lists {
    /// Every buffer.
    pub fn buffers(&self) -> Vec<Buf> {
        let inverse = self.inverse.into_iter().flat_map(|(offset, index)| [offset, index]);
        [self.q2k_index, self.q2k_count].into_iter().chain(inverse).collect()
    }
}

/// Layer normalisation without affine weights, then `(1 + scale_b) * n + shift_b`.
#[derive(Copy, Clone, Debug)]
pub struct NormMod {
    /// Batch.
    pub batch: usize,
    /// Tokens per batch element.
    pub seqlen: usize,
    /// Width of a token.
    pub dim: usize,
    /// Input `[B,S,dim]`, `Act`.
    pub x: Buf,
    /// Modulation `[B, chunks, dim]`, `F32`.
    pub modulation: Buf,
    /// Chunks of `modulation` per batch element (6 in a block, 2 in the final layer).
    pub chunks: usize,
    /// Which chunk is the shift.
    pub shift: usize,
    /// Which chunk is the scale.
    pub scale: usize,
    /// Added to the variance.
    pub eps: f32,
    /// `[B*S]`, `F32`: written by the forward, read by the backward.
    pub mean: Buf,
    /// `[B*S]`, `F32`: `1 / sqrt(var + eps)`, population variance.
    pub rstd: Buf,
}

/// A linear map with a gate, `y = gate (w a + bias)`, for one element of the batch. The gate is folded into the weight, so
/// that the product can add the residual, and no pass over the tokens is there for the gate in either direction.
#[derive(Copy, Clone, Debug)]
pub struct Gated {
    /// `[rows, columns]`, `Act`.
    pub weight: Buf,
    /// `[rows]`, `Act`.
    pub bias: Buf,
    /// `[rows]`, `F32`.
    pub gate: Buf,
}

/// Gradients of a [`Gated`] map.
#[derive(Copy, Clone, Debug)]
pub struct GatedGrad {
    /// `[rows, columns]`, `F32`: sum over tokens of `d_y a^T`.
    pub product: Buf,
    /// `[rows]`, `F32`: sum over tokens of `d_y`.
    pub sum: Buf,
    /// `[rows, columns]`, `F32`, added to.
    pub d_weight: Buf,
    /// `[rows]`, `F32`, added to.
    pub d_bias: Buf,
    /// `[rows]`, `F32`, overwritten.
    pub d_gate: Buf,
}

/// Splitting packed QKV, RMS normalisation of Q and K with a learned weight, 3D RoPE.
#[derive(Copy, Clone, Debug)]
pub struct QkPrep {
    /// Batch.
    pub batch: usize,
    /// Tokens.
    pub seqlen: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head, even.
    pub head_dim: usize,
    /// Packed `[B,S,3,H,D]`, `Act`. V is used in place through [`View::packed`].
    pub qkv: Buf,
    /// RMS weight of Q, `[D]`, `Act`.
    pub q_weight: Buf,
    /// RMS weight of K, `[D]`, `Act`.
    pub k_weight: Buf,
    /// Cosines `[S, D/2]`, `F32`, in token order: pair `i` rotates elements `i` and `i + D/2`.
    pub cos: Buf,
    /// Sines `[S, D/2]`, `F32`.
    pub sin: Buf,
    /// `1 / sqrt(mean(q^2) + eps)`, `[B,S,H]`, `F32`: written by the forward.
    pub q_rstd: Buf,
    /// The same for K.
    pub k_rstd: Buf,
    /// Added to the mean square.
    pub eps: f32,
}

/// Rotary embedding of a packed low-rank projection (`dsv.predictor_rope`).
#[derive(Copy, Clone, Debug)]
pub struct Rope {
    /// Batch.
    pub batch: usize,
    /// Tokens.
    pub seqlen: usize,
    /// Rotated vectors of a token (parts times heads).
    pub vectors: usize,
    /// Elements of a vector, even: pair `i` rotates elements `i` and `i + dim/2`.
    pub dim: usize,
    /// Cosines `[S, dim/2]`, `F32`.
    pub cos: Buf,
    /// Sines `[S, dim/2]`, `F32`.
    pub sin: Buf,
}

/// Attention forward operands.
#[derive(Copy, Clone, Debug)]
pub struct AttnFwd {
    /// Sizes.
    pub shape: AttnShape,
    /// Queries.
    pub q: View,
    /// Keys.
    pub k: View,
    /// Values.
    pub v: View,
    /// `None` for dense; else self-attention over these lists.
    pub lists: Option<Lists>,
    /// Output.
    pub out: View,
    /// Natural log-sum-exp of scaled logits, `[B,H,seqlen_q]` `F32`; `-inf` for an empty row.
    pub lse: Buf,
}

/// Attention backward operands.
#[derive(Copy, Clone, Debug)]
pub struct AttnBwd {
    /// What the forward was given and wrote; `out` and `lse` are read.
    pub fwd: AttnFwd,
    /// Gradient of `out`.
    pub d_out: View,
    /// Gradient of Q, overwritten.
    pub d_q: View,
    /// Gradient of K, overwritten.
    pub d_k: View,
    /// Gradient of V, overwritten.
    pub d_v: View,
}

/// Activation of the MLP.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum MlpAct {
    /// `out[r,j] = pre[r,j] * gelu_tanh(pre[r, hidden + j])`; `pre [rows, 2*hidden]`.
    GeGlu,
    /// `out = gelu_tanh(pre)`; `pre [rows, hidden]`.
    Gelu,
}

impl MlpAct {
    /// Columns of the pre-activation for `hidden` columns of output.
    pub fn pre_width(self, hidden: usize) -> usize {
        match self {
            MlpAct::GeGlu => 2 * hidden,
            MlpAct::Gelu => hidden,
        }
    }
}

/// A latent video cut into patches.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct PatchShape {
    /// Batch.
    pub batch: usize,
    /// Latent channels.
    pub channels: usize,
    /// Latent frames, height, width.
    pub latent: [usize; 3],
    /// Patch extents in t, h, w; each divides its `latent` side.
    pub patch: [usize; 3],
}

impl PatchShape {
    /// Patches along t, h, w.
    pub fn grid(&self) -> [usize; 3] {
        [self.latent[0] / self.patch[0], self.latent[1] / self.patch[1], self.latent[2] / self.patch[2]]
    }
    /// Tokens per batch element.
    pub fn tokens(&self) -> usize {
        self.grid().iter().product()
    }
    /// Values of one token, `channels * patch volume`, ordered `[channel, t, h, w]`.
    pub fn width(&self) -> usize {
        self.channels * self.patch.iter().product::<usize>()
    }
    /// Latent values per batch element.
    pub fn latent_len(&self) -> usize {
        self.channels * self.latent.iter().product::<usize>()
    }
}

/// Patches, flow-matching noise and target in one pass.
///
/// `x0` is the patchified latent, `noise` the standard normal below, then
/// `x_t = (1 - t_b) x0 + t_b noise` and `target = noise - x0`.
///
/// Noise value `e` of batch element `b` (`e = patch * width + column`, patches in raster order, so that the token order changes
/// nothing of what a place of the clip gets):
/// Philox4x32-10 with key `(keys[b,0], keys[b,1])` and counter `(e / 4, 0, 0, 0)` gives
/// `r0..r3`; with `u(r) = (r + 0.5) * 2^-32` rounded to f32, `e % 4` = 0, 1 take
/// `sqrt(-2 ln u(r0)) * (cos, sin)(2 pi u(r1))` and 2, 3 the same of `r2, r3`.
#[derive(Copy, Clone, Debug)]
pub struct FlowPrepare {
    /// Sizes.
    pub shape: PatchShape,
    /// Latents `[B, C, T, H, W]`, `F32`.
    pub latents: Buf,
    /// Token -> raster patch index, `[S]` `I32` (a permutation).
    pub order: Buf,
    /// Time of each batch element, `[B]` `F32`, 0 = data, 1 = noise.
    pub t: Buf,
    /// Philox keys, `[B,2]` `I32` (bit patterns of u32).
    pub keys: Buf,
    /// Noised tokens `[B,S,width]`, `Act`.
    pub x_t: Buf,
    /// Target velocity `[B,S,width]`, `F32`.
    pub target: Buf,
}

/// Mean squared error of the velocity and its gradient.
#[derive(Copy, Clone, Debug)]
pub struct FlowLoss {
    /// Batch.
    pub batch: usize,
    /// `S * width`: values per batch element.
    pub per_element: usize,
    /// Predicted velocity `[B, per_element]`, `Act`.
    pub pred: Buf,
    /// Target velocity `[B, per_element]`, `F32`.
    pub target: Buf,
    /// `[B]` `F32`, overwritten: mean over the element's values of `(pred - target)^2`.
    pub loss: Buf,
    /// Gradient of `weight * mean_b(loss_b)` with respect to `pred`, `Act`; `None` for evaluation.
    pub d_pred: Option<Buf>,
    /// Factor of the gradient (1 / accumulation steps).
    pub weight: f32,
}

/// Critical-KV selection from low-rank scores (the DSV paper's critical-KV estimation).
///
/// Score of (group, KV block) = max over the block's keys of `<q_proxy, k_lr>`; per (batch, head,
/// group) the `top_k[h]` largest, ties to the smaller index, ids ascending; `top_k` is clamped to
/// the number of blocks, and more than `max_selected` raises the error flag.
#[derive(Copy, Clone, Debug)]
pub struct KvSelect {
    /// Low-rank queries `[B,S,H,d_lr]`.
    pub q_lr: View,
    /// Low-rank keys `[B,S,H,d_lr]`.
    pub k_lr: View,
    /// Elements of a low-rank head.
    pub d_lr: usize,
    /// `[H]` `I32`.
    pub top_k: Buf,
    /// Query that decides for its group.
    pub rule: GroupRule,
    /// Whether a group lists its own tokens before all others, within its budget.
    pub keep_own: bool,
    /// `[G, ceil(N / 32)]` `I32`, where every group has further units that it lists before all others, in every head: bit
    /// `n % 32` of word `n / 32`.
    pub keep_mask: Option<Buf>,
    /// Written: lists, counts and, where present, the inverse.
    pub lists: Lists,
}

/// Predictor loss and its gradient in the Gram closed form, over all queries and keys.
///
/// Per (batch, head, query): `a = K_lr q_lr`, `b = scale K q`, both centred over the keys;
/// `loss = 0.95 (1 - cos(a,b)) + 0.05 (|a|/|b| - 1)^2`. Q and K are constants. Zero norms as in
/// `dsv_reference::predictor`: `|a|^2 + 1e-6 |b|^2` stands for `|a|^2`, and a row with
/// `|b|^2 <= 1e-10` contributes nothing.
#[derive(Copy, Clone, Debug)]
pub struct GramLoss {
    /// Sizes of the full queries and keys (`seqlen_q == seqlen_kv`).
    pub shape: AttnShape,
    /// Elements of a low-rank head.
    pub d_lr: usize,
    /// Full queries, after normalisation and RoPE.
    pub q: View,
    /// Full keys.
    pub k: View,
    /// Packed `[B,S,2,H,d_lr]`, `Act`: low-rank queries, then keys.
    pub lowrank: Buf,
    /// `[H]` `F32`, overwritten: mean of the loss over batch and queries.
    pub loss: Buf,
    /// Same shape as `lowrank`, overwritten: gradient of `weight * mean over heads of loss`.
    pub d_lowrank: Buf,
    /// Factor of the gradient.
    pub weight: f32,
}

/// Sparsity profile on sampled queries (the DSV paper's profiler).
#[derive(Copy, Clone, Debug)]
pub struct Profile {
    /// Sizes.
    pub shape: AttnShape,
    /// Queries.
    pub q: View,
    /// Keys.
    pub k: View,
    /// Token ids of the sampled queries, `I32`; every sample serves every batch element and head.
    pub samples: Buf,
    /// `[B,H,S]` `F32`: LSE of full attention of these q and k, where it has just been made: it saves a pass over the keys.
    pub lse: Option<Buf>,
    /// Share of the softmax mass that counts as critical (0.9).
    pub theta: f32,
    /// `[H]` `F32`, overwritten: mean share of the keys needed to hold `theta` of the mass.
    pub needed: Buf,
    /// How good lists are, where that is wanted.
    pub lists: Option<ProfiledLists>,
}

/// What a profile says of lists.
#[derive(Copy, Clone, Debug)]
pub struct ProfiledLists {
    /// The lists.
    pub lists: Lists,
    /// `[H]` `F32`, overwritten: mean over samples of the mass that the sample's list holds.
    pub covered: Buf,
    /// `[H]` `F32`, overwritten: mean over samples of the share of the critical keys that are listed.
    pub recall: Buf,
}

/// AdamW's two moments of a flat array.
#[derive(Copy, Clone, Debug)]
pub enum Moments {
    /// As `F32`.
    Full {
        /// First moment.
        m: Buf,
        /// Second moment.
        v: Buf,
    },
    /// In eight bits (`dsv_reference::layers::eight_bits`), for multiples of [`PARAM_ALIGN`] elements.
    Coded {
        /// First moment.
        m: Coded,
        /// Second moment.
        v: Coded,
    },
}

impl Moments {
    /// Those of the elements `start..start + len`.
    pub fn slice(self, start: usize, len: usize) -> Moments {
        match self {
            Moments::Full { m, v } => Moments::Full { m: m.slice(start, len), v: v.slice(start, len) },
            Moments::Coded { m, v } => Moments::Coded { m: m.slice(start, len), v: v.slice(start, len) },
        }
    }
}

/// Values in eight bits with a scale for each [`PARAM_ALIGN`] of them.
#[derive(Copy, Clone, Debug)]
pub struct Coded {
    /// Codes, four to an `I32`, the first in its lowest byte.
    pub codes: Buf,
    /// Scales, `F32`.
    pub scales: Buf,
}

/// The codes in an `I32` buffer's values.
pub(crate) fn codes_of(words: &[i32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Codes, a multiple of four, as the values of an `I32` buffer.
pub(crate) fn words_of(codes: &[u8]) -> Vec<i32> {
    codes.chunks_exact(4).map(|c| i32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
}

impl Coded {
    /// Those of the elements `start..start + len`, multiples of [`PARAM_ALIGN`].
    pub fn slice(self, start: usize, len: usize) -> Coded {
        assert!(start.is_multiple_of(PARAM_ALIGN) && len.is_multiple_of(PARAM_ALIGN), "{start}, {len}");
        Coded {
            codes: self.codes.slice(start / 4, len / 4),
            scales: self.scales.slice(start / PARAM_ALIGN, len / PARAM_ALIGN),
        }
    }
}

/// AdamW over flat arrays; `p *= 1 - lr * weight_decay` before the step, bias-corrected.
#[derive(Copy, Clone, Debug)]
pub struct AdamW {
    /// Master weights, `F32`, updated in place.
    pub master: Buf,
    /// Gradients, `F32`.
    pub grad: Buf,
    /// First and second moment, updated in place.
    pub moments: Moments,
    /// Number of the first element in its set; matters where [`Moments`] are coded.
    pub first: usize,
    /// Compute copy, `Act`: overwritten with the rounded master weights.
    pub copy: Buf,
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Number of this step from 1, for the bias correction.
    pub step: u64,
    /// `[norm, factor]` from [`GradNorm`]: gradients are multiplied by `factor`; a factor that is
    /// not finite leaves master, moments and copy untouched (the step is skipped on the device).
    pub clip: Buf,
}

/// Tensors of a flat parameter buffer begin at multiples of this many elements: none shares a scale of [`Coded`].
pub const PARAM_ALIGN: usize = dsv_reference::layers::eight_bits::BLOCK;

/// Norm of a flat gradient, the clip factor, and the first tensor that is not finite.
#[derive(Copy, Clone, Debug)]
pub struct GradNorm {
    /// Flat gradients, `F32`.
    pub grad: Buf,
    /// `I32 [n + 1]`, ascending, in units of [`PARAM_ALIGN`] elements: tensor `i` is
    /// `grad[128 * segments[i]..128 * segments[i + 1]]` (models beyond 2^31 parameters fit).
    pub segments: Buf,
    /// Largest norm allowed; infinite for no clipping.
    pub max_norm: f32,
    /// `F32 [2]`, overwritten: the L2 norm (non-finite if any gradient is), and
    /// `min(1, max_norm / (norm + 1e-6))`, NaN when the norm is not finite.
    pub clip: Buf,
    /// `I32 [1]`, overwritten: smallest tensor id holding a non-finite gradient, or -1.
    pub culprit: Buf,
}

/// Caption drop-out: replace a text by the learned null embedding.
#[derive(Copy, Clone, Debug)]
pub struct TextSelect {
    /// Batch.
    pub batch: usize,
    /// `text tokens * text width`: values per batch element.
    pub per_element: usize,
    /// `[B]` `I32`: non-zero drops the caption.
    pub drop: Buf,
}

/// The largest problem of a run: what an engine sizes its scratch by.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Dims {
    /// Batch (twice the sampler's batch if guidance runs both branches at once).
    pub batch: usize,
    /// Video tokens.
    pub seqlen: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// Copies of them, each for as many of the video tokens.
    pub text_copies: usize,
    /// Width of the model.
    pub dim: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a low-rank head.
    pub d_lr: usize,
    /// Columns of the widest MLP buffer.
    pub mlp_width: usize,
    /// Number of profiled queries.
    pub samples: usize,
    /// Flat parameters.
    pub params: usize,
    /// Lists, when sparse attention may run.
    pub lists: Option<ListShape>,
}

/// Attention speeds an engine can state without running the model, for the dispatcher.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseCost {
    /// Share of KV skipped above which selection + sparse forward + backward beats dense;
    /// more than 1 when sparse never does.
    pub crossover_sparsity: f32,
    /// Which line of which table says so.
    pub source: String,
}

/// Sustained speeds of a device, for estimates.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    /// FLOP a second of large bf16 products.
    pub matmul: f64,
    /// Bytes a second of memory read and written by row-wise kernels.
    pub memory: f64,
    /// FLOP a second of attention, where no table has a line for it.
    pub attention: f64,
    /// The same over lists of units below 64 tokens, with query groups of 64 and of 128.
    pub gather: [f64; 2],
}

/// What is known of a device before anything is allocated on it: enough to lay a run out, to say whether it fits,
/// and to guess how long it takes. A GPU that is not there has these facts too ([`PlannedGpu`]).
pub trait DeviceFacts {
    /// Name for logs: device and precision.
    fn name(&self) -> String;
    /// Width of the engine's types.
    fn precision(&self) -> Precision;
    /// Whether the attention backward reads the inverse lists where KV blocks have 64 tokens or more.
    fn needs_inverse_lists(&self) -> bool;
    /// Whether two runs of the same ops on the same inputs agree bit for bit.
    fn deterministic(&self) -> bool;
    /// Bytes of private scratch for a run whose largest problem is `dims`; reserved by the engine
    /// itself beside the arena, in [`Engine::reserve`].
    fn scratch_bytes(&self, dims: &Dims) -> usize;
    /// Bytes the device has free for [`Engine::reserve`], `None` when not known.
    fn free_bytes(&self) -> Option<usize>;
    /// Bytes the host has free for [`Space::Host`], `None` when not known.
    fn host_free_bytes(&self) -> Option<usize>;
    /// What the engine knows of sparse against dense attention for this shape and block size.
    fn sparse_cost(&self, shape: &AttnShape, query_group: usize, kv_block: usize) -> Option<SparseCost>;
    /// Speeds to estimate with, where they are known.
    fn rates(&self) -> Option<Rates>;
    /// Microseconds of forward + backward of one self-attention, selection included, from the dispatch table's nearest
    /// line scaled to the shape: dense, or over lists that skip this share of the keys. `None` without a line.
    fn attention_us(&self, shape: &AttnShape, lists: Option<(&ListShape, f64)>) -> Option<f64>;
    /// The dispatch table in use, if there is one.
    fn dispatch_table(&self) -> Option<&dsv_spec::DispatchTable>;
}

/// The end of something that runs beside the ops; see [`Engine::after`].
#[derive(Clone, Default)]
pub struct Done(DoneAt);

#[derive(Clone, Default)]
enum DoneAt {
    /// It is over.
    #[default]
    Over,
    /// The CPU engine's copies up to this one.
    Copies(u64),
    /// A point in a stream.
    Event(std::sync::Arc<dsv_runtime::device::Event>),
}

/// Copies between device and host since they were last asked for.
#[derive(Copy, Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Transfers {
    /// Bytes copied to the host.
    pub to_host_bytes: u64,
    /// Bytes copied to the device.
    pub to_device_bytes: u64,
    /// Milliseconds that the copies took, each by itself.
    pub copy_ms: f64,
    /// Milliseconds of them for which ops had to wait.
    pub waited_ms: f64,
}

impl Transfers {
    /// Share of the copies' time that ran beside ops; `None` where nothing was copied.
    pub fn overlap(&self) -> Option<f64> {
        (self.copy_ms > 0.0).then(|| (1.0 - self.waited_ms / self.copy_ms).max(0.0))
    }
}

/// A device that runs the trainer's ops. See the module's text for the rules.
pub trait Engine: DeviceFacts {
    /// Allocates both arenas (zeroed) and the scratch, as much as `dims` and the plan ask for; validates that every kernel
    /// the run needs exists. Called once, before any op.
    fn reserve(&mut self, plan: &ArenaPlan, dims: &Dims) -> Result<(), EngineError>;

    /// Runs `work`, which queues ops and neither reads nor writes host values. An engine may record it at a later call with
    /// the same `key` and replay the record from then on: the key names everything that decides which ops are queued, on
    /// which buffers, with which numbers.
    fn repeat(&mut self, key: &[u32], work: &mut dyn FnMut(&mut dyn Engine));
    /// Waits for all ops and reports the device error flag.
    fn sync(&mut self) -> Result<(), EngineError>;
    /// Copies host values into `buf` (`Act` or `F32`, rounded to it). `data.len() == buf.len()`.
    fn write_f32(&mut self, buf: Buf, data: &[f32]) -> Result<(), EngineError>;
    /// Copies host values into an `I32` buffer.
    fn write_i32(&mut self, buf: Buf, data: &[i32]) -> Result<(), EngineError>;
    /// Waits, then copies an `Act` or `F32` buffer to the host as f32.
    fn read_f32(&mut self, buf: Buf) -> Result<Vec<f32>, EngineError>;
    /// Waits, then copies an `I32` buffer to the host.
    fn read_i32(&mut self, buf: Buf) -> Result<Vec<i32>, EngineError>;

    /// Copies a device buffer to a host buffer of the same length and dtype, beside the ops that follow: after every op
    /// queued so far, and after the copies to the host before it.
    fn offload(&mut self, from: Buf, to: Buf) -> Done;
    /// Copies a host buffer to a device buffer of the same length and dtype, beside the ops that follow: after every op and
    /// every copy to the host queued so far, and after the copies to the device before it.
    fn fetch(&mut self, from: Buf, to: Buf) -> Done;
    /// Ops queued from now on come after this.
    fn after(&mut self, done: &Done);
    /// Queues ops (`ema`, `copy` of one dtype, copies; none that needs scratch) which run in their own order beside those
    /// queued after this call, and after those before it. Within `work`, "queued so far" means its own.
    fn beside(&mut self, work: &mut dyn FnMut(&mut dyn Engine)) -> Done;
    /// Copies that have ended since this was last called.
    fn transfers(&mut self) -> Transfers;

    /// Every element becomes `value` (any dtype; converted).
    fn fill(&mut self, dst: Buf, value: f32);
    /// `dst = src`, converting between `Act` and `F32`. Same length.
    fn copy(&mut self, src: Buf, dst: Buf);
    /// `y += alpha * x`, `x` and `y` each `Act` or `F32`. Same length; `x` may equal `y`.
    fn axpy(&mut self, alpha: f32, x: Buf, y: Buf);
    /// `out[r, :] = a[r, :] + b` for `rows` rows of `b.len()` values; `a`, `b`, `out` each `Act` or
    /// `F32`. `out` may be `a` (in place).
    fn add_rows(&mut self, rows: usize, a: Buf, b: Buf, out: Buf);
    /// `dst[c] += sum_r src[r, c]` over `rows` rows of `dst.len()` values; `dst` is `F32`, `src`
    /// `Act` or `F32`. Gradient of a bias or of a row that was broadcast.
    fn sum_rows(&mut self, rows: usize, src: Buf, dst: Buf);

    /// A matrix product.
    fn gemm(&mut self, gemm: &Gemm);

    /// `out = LN(x) (1 + scale) + shift`, `[B,S,dim]` `Act`; writes `mean` and `rstd`.
    fn norm_mod_fwd(&mut self, args: &NormMod, out: Buf);
    /// Adds the gradient of `x` to `d_x` `Act` (rounded once after the sum) and overwrites the
    /// shift and scale chunks of `d_modulation` (shape of `modulation`, `F32`).
    fn norm_mod_bwd(&mut self, args: &NormMod, d_out: Buf, d_x: Buf, d_modulation: Buf);
    /// `gated_weight = gate weight` and `gated_bias = gate bias`, row by row; shapes of `weight` and `bias`, `Act`.
    fn gate_weight(&mut self, args: &Gated, gated_weight: Buf, gated_bias: Buf);
    /// Gradients of weight, bias and gate. The map's output is not needed: row by row,
    /// `d_gate = <weight, product> + bias sum`.
    fn gate_grad(&mut self, args: &Gated, grad: &GatedGrad);

    /// Writes rotated `q` and `k`, `[B,S,H,D]` `Act`, and the `rstd`s.
    fn qk_prep_fwd(&mut self, args: &QkPrep, q: Buf, k: Buf);
    /// From the gradients of rotated `q` and `k`: overwrites the Q and K parts of `d_qkv`
    /// (`[B,S,3,H,D]`; the V part is left alone) and *adds* to `d_q_weight`, `d_k_weight` `[D]` `F32`.
    fn qk_prep_bwd(
        &mut self,
        args: &QkPrep,
        d_q: Buf,
        d_k: Buf,
        d_qkv: Buf,
        d_q_weight: Buf,
        d_k_weight: Buf,
    );

    /// Attention forward, dense or over lists.
    fn attn_fwd(&mut self, args: &AttnFwd);
    /// Attention backward.
    fn attn_bwd(&mut self, args: &AttnBwd);

    /// `pre [rows, pre_width] -> out [rows, hidden]`, both `Act`.
    fn mlp_act_fwd(&mut self, act: MlpAct, rows: usize, hidden: usize, pre: Buf, out: Buf);
    /// In place: `pre [rows, pre_width]` becomes its gradient; `out [rows, hidden]` holds the gradient of the activation's
    /// output on entry, and that output on return (so that it need not be kept); both `Act`. `d_bias [pre_width]` `F32`
    /// gets the gradient's column sums added.
    fn mlp_act_bwd(&mut self, act: MlpAct, rows: usize, hidden: usize, pre: Buf, out: Buf, d_bias: Buf);
    /// `out = x * sigmoid(x)`; `x` and `out` each `Act` or `F32`.
    fn silu_fwd(&mut self, x: Buf, out: Buf);
    /// `d_x = d_out * silu'(x)` (overwrites); each `Act` or `F32`; `d_x` may be `d_out`.
    fn silu_bwd(&mut self, x: Buf, d_out: Buf, d_x: Buf);

    /// Sinusoidal embedding of `1000 t`: `out[b, i] = cos(1000 t_b w_i)`, `out[b, half + i] = sin(..)`,
    /// `w_i = 10000^(-i/half)`, `half = width/2`; `t [B]` `F32`, `out [B, width]` `Act`.
    fn time_embed(&mut self, t: Buf, width: usize, out: Buf);
    /// Patches, noise and target.
    fn flow_prepare(&mut self, args: &FlowPrepare);
    /// Loss and gradient.
    fn flow_loss(&mut self, args: &FlowLoss);
    /// Standard normal values in `dst` (`F32`): the noise of [`FlowPrepare`] for `keys [1,2]`, `e` =
    /// position in `dst`.
    fn normal(&mut self, keys: Buf, dst: Buf);
    /// Tokens `[B,S,width]` (`F32`) back to latents `[B,C,T,H,W]` (`F32`); inverse of the patching in
    /// [`FlowPrepare`].
    fn unpatchify(&mut self, shape: &PatchShape, order: Buf, tokens: Buf, latents: Buf);

    /// `out[b] = drop[b] ? null : text[b]`; `text`, `null`, `out` `Act`.
    fn text_select_fwd(&mut self, args: &TextSelect, text: Buf, null: Buf, out: Buf);
    /// `d_null += sum over dropped b of d_out[b]`; `d_out` `Act` or `F32`, `d_null` `F32`.
    fn text_select_bwd(&mut self, args: &TextSelect, d_out: Buf, d_null: Buf);

    /// Rotates `x [B,S,vectors,dim]` `Act` in place; by the negative angles when `inverse` (which is
    /// the backward).
    fn rope(&mut self, args: &Rope, x: Buf, inverse: bool);
    /// Lists from low-rank scores; writes the inverse too where `lists.inverse` is there.
    fn kv_select(&mut self, args: &KvSelect);
    /// Predictor loss and gradient.
    fn gram_loss(&mut self, args: &GramLoss);
    /// Sparsity profile.
    fn profile(&mut self, args: &Profile);

    /// Gradient norm, clip factor, culprit.
    fn grad_norm(&mut self, args: &GradNorm);
    /// One AdamW update.
    fn adamw(&mut self, args: &AdamW);
    /// `ema = decay * ema + (1 - decay) * master`, both `F32`.
    fn ema(&mut self, decay: f32, master: Buf, ema: Buf);
}
