//! What the host hands a kernel: one `#[repr(C)]` struct per op, mirrored in the op's template as `struct Params`
//! and asserted equal in size on both sides. Pointers are device addresses.

mod trainer;

pub use trainer::*;

/// A TMA descriptor (`CUtensorMap`), opaque to everything but the driver that encodes it.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TensorMap(pub [u64; 16]);

/// A [batch, seq, head, head_dim] tensor in device memory; strides in elements, innermost stride 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorView {
    /// Address of element (0, 0, 0, 0).
    pub ptr: u64,
    /// Elements between batches.
    pub stride_batch: i64,
    /// Elements between tokens.
    pub stride_seq: i64,
    /// Elements between heads.
    pub stride_head: i64,
}

/// Bits of the device error flag (contract: kernels clamp what they read and raise the flag).
pub mod error_bits {
    /// A list names a KV block outside the sequence.
    pub const INDEX_OUT_OF_RANGE: i32 = 1;
    /// A count is negative or larger than `max_selected`.
    pub const COUNT_OUT_OF_RANGE: i32 = 2;
    /// A list is not ascending and unique.
    pub const LIST_NOT_ASCENDING: i32 = 4;
    /// A selection score is NaN.
    pub const SCORE_IS_NAN: i32 = 8;
    /// A top-k budget is negative or larger than `max_selected`.
    pub const TOP_K_OUT_OF_RANGE: i32 = 16;
}

/// The sizes every attention kernel reads.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnSizes {
    /// Sequences.
    pub batch: i32,
    /// Query heads H.
    pub num_heads: i32,
    /// KV heads; divides `num_heads`.
    pub num_kv_heads: i32,
    /// Query tokens.
    pub seqlen_q: i32,
    /// KV tokens.
    pub seqlen_kv: i32,
    /// Query tokens rounded up to 128: rows of `lse_log2`, `delta` and of dQ's accumulator.
    pub seqlen_q_padded: i32,
    /// G = ceil(seqlen_q / query_group); 0 when dense.
    pub num_groups: i32,
    /// N = ceil(seqlen_kv / kv_block); 0 when dense.
    pub num_kv_blocks: i32,
    /// Width of the lists; 0 when dense.
    pub max_selected: i32,
    /// Logit scale.
    pub scale: f32,
    /// scale * log2(e).
    pub scale_log2: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `attn_fwd`.
///
/// The tensor maps have 128-byte swizzle. Where head_dim is a multiple of 64 they are 5-D: (64 columns, seq,
/// head_dim / 64, head, batch), box (64, rows, head_dim / 64, 1, 1); else, and of k and v where kv_block is below block_n,
/// 4-D: (head_dim, seq, head, batch), box (64, rows, 1, 1), one copy for every 64 columns. Box rows: q and o 64 (one
/// consumer's rows), k and v block_n, or kv_block if that is less.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnFwd {
    /// Q, box of 64 rows.
    pub map_q: TensorMap,
    /// K, box of block_n rows, or kv_block if fewer.
    pub map_k: TensorMap,
    /// V, as K.
    pub map_v: TensorMap,
    /// out, box of 64 rows.
    pub map_o: TensorMap,
    /// f32 [B, H, seqlen_q]: LSE out.
    pub lse: u64,
    /// i32 [B, H, G, max_selected].
    pub q2k_index: u64,
    /// i32 [B, H, G].
    pub q2k_count: u64,
    /// i32 [1]: OR of [`error_bits`].
    pub error_flag: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `attn_fwd` with lists of units smaller than a tile.
///
/// Tensor maps as in [`AttnFwd`]; box rows: q and o 64, k and v 8 (unused with kv_block 1).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnFwdGather {
    /// Q, box of 64 rows.
    pub map_q: TensorMap,
    /// K, box of 8 rows.
    pub map_k: TensorMap,
    /// V, box of 8 rows.
    pub map_v: TensorMap,
    /// out, box of 64 rows.
    pub map_o: TensorMap,
    /// K, for kv_block 1.
    pub k: TensorView,
    /// V, for kv_block 1.
    pub v: TensorView,
    /// f32 [B, H, seqlen_q]: LSE out.
    pub lse: u64,
    /// i32 [B, H, G, max_selected].
    pub q2k_index: u64,
    /// i32 [B, H, G].
    pub q2k_count: u64,
    /// i32 [1]: OR of [`error_bits`].
    pub error_flag: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `attn_fwd` on sm80, which has no TMA.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnFwdViews {
    /// Q.
    pub q: TensorView,
    /// K.
    pub k: TensorView,
    /// V.
    pub v: TensorView,
    /// out.
    pub o: TensorView,
    /// f32 [B, H, seqlen_q]: LSE out.
    pub lse: u64,
    /// i32 [B, H, G, max_selected].
    pub q2k_index: u64,
    /// i32 [B, H, G].
    pub q2k_count: u64,
    /// i32 [1]: OR of [`error_bits`].
    pub error_flag: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `attn_bwd_prep`. Grid: (seqlen_q_padded / 64, H, B).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnBwdPrep {
    /// out of the forward.
    pub o: TensorView,
    /// Gradient of out.
    pub d_o: TensorView,
    /// f32 [B, H, seqlen_q]: LSE of the forward.
    pub lse: u64,
    /// f32 [B, H, seqlen_q]: gradient of LSE; 0 when there is none.
    pub d_lse: u64,
    /// f32 [B, H, seqlen_q_padded] out: LSE * log2(e); +inf for empty rows and padding, so that P is 0.
    pub lse_log2: u64,
    /// f32 [B, H, seqlen_q_padded] out: rowsum(out * d_out) - d_lse; 0 for padding.
    pub delta: u64,
    /// f32 [B, H, seqlen_q_padded, D] out: zeroed accumulator of dQ; 0 where `attn_bwd_dq` follows.
    pub dq_accum: u64,
    /// i32 [B, H, N + 1]; 0 where `attn_bwd` asks for no order.
    pub k2q_offset: u64,
    /// i32 [B, Hkv, N] out: KV blocks by the length of their lists, the longest first; 0 where `k2q_offset` is.
    pub kv_order: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `attn_bwd`. Grid: (ceil(seqlen_kv / block_n), num_kv_heads, B), with lists (N * kv_block / block_n,
/// num_kv_heads, B).
///
/// Tensor maps as in [`AttnFwd`]; box rows: q and do 64, k and v block_n, dk and dv 64.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnBwd {
    /// Q, box of 64 rows.
    pub map_q: TensorMap,
    /// Gradient of out, box of 64 rows.
    pub map_do: TensorMap,
    /// K, box of block_n rows.
    pub map_k: TensorMap,
    /// V, box of block_n rows.
    pub map_v: TensorMap,
    /// dK, box of 64 rows.
    pub map_dk: TensorMap,
    /// dV, box of 64 rows.
    pub map_dv: TensorMap,
    /// f32 [2, B * H * seqlen_q_padded]: `lse_log2`, then `delta`. 2-D, box 64 values of one of them, no swizzle.
    pub map_rows: TensorMap,
    /// f32 [B, H, seqlen_q_padded / 64, 64 * D] in the kernel's own order; only `attn_bwd_post` reads it.
    pub dq_accum: u64,
    /// i32 [B, H, N + 1], relative to the (b, h) slab of `k2q_index`.
    pub k2q_offset: u64,
    /// i32 [B, H, G * max_selected]: group ids, ascending within a KV block.
    pub k2q_index: u64,
    /// i32 [B, Hkv, N] of `attn_bwd_prep`; 0 when dense.
    pub kv_order: u64,
    /// i32 [1].
    pub error_flag: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `attn_bwd` with lists of units smaller than a tile. Grid: (ceil(seqlen_q / block_m), H, B).
///
/// Tensor maps as in [`AttnFwd`]; box rows: q and do block_m, k and v 8 (unused with kv_block 1), dq 64.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnBwdGather {
    /// Q, box of block_m rows.
    pub map_q: TensorMap,
    /// Gradient of out, box of block_m rows.
    pub map_do: TensorMap,
    /// K, box of 8 rows.
    pub map_k: TensorMap,
    /// V, box of 8 rows.
    pub map_v: TensorMap,
    /// dQ, box of 64 rows.
    pub map_dq: TensorMap,
    /// K, for kv_block 1.
    pub k: TensorView,
    /// V, for kv_block 1.
    pub v: TensorView,
    /// f32 [B, H, seqlen_q_padded].
    pub lse_log2: u64,
    /// f32 [B, H, seqlen_q_padded].
    pub delta: u64,
    /// f32 [B, Hkv, seqlen_kv rounded up to 64, 2 * D], zeros on entry, in the kernel's own order; only
    /// `attn_bwd_post_kv` reads it.
    pub dkv_accum: u64,
    /// i32 [B, H, G, max_selected].
    pub q2k_index: u64,
    /// i32 [B, H, G].
    pub q2k_count: u64,
    /// i32 [1].
    pub error_flag: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `attn_bwd` on sm80, which has no TMA. Grid: as [`AttnBwd`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnBwdViews {
    /// Q.
    pub q: TensorView,
    /// Gradient of out.
    pub d_o: TensorView,
    /// K.
    pub k: TensorView,
    /// V.
    pub v: TensorView,
    /// dK out.
    pub dk: TensorView,
    /// dV out.
    pub dv: TensorView,
    /// f32 [B, H, seqlen_q_padded].
    pub lse_log2: u64,
    /// f32 [B, H, seqlen_q_padded].
    pub delta: u64,
    /// f32 [B, H, seqlen_q_padded / 64, 64 * D] in the kernel's own order; only `attn_bwd_post` reads it.
    pub dq_accum: u64,
    /// i32 [B, H, N + 1], relative to the (b, h) slab of `k2q_index`.
    pub k2q_offset: u64,
    /// i32 [B, H, G * max_selected]: group ids, ascending within a KV block.
    pub k2q_index: u64,
    /// i32 [1].
    pub error_flag: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `attn_bwd_dq`. Grid: (ceil(seqlen_q / block_m), H, B).
///
/// Tensor maps as in [`AttnFwd`]; box rows: q, do and dq 64, k and v block_n.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnBwdDq {
    /// Q, box of 64 rows.
    pub map_q: TensorMap,
    /// Gradient of out, box of 64 rows.
    pub map_do: TensorMap,
    /// K, box of block_n rows.
    pub map_k: TensorMap,
    /// V, box of block_n rows.
    pub map_v: TensorMap,
    /// dQ, box of 64 rows.
    pub map_dq: TensorMap,
    /// f32 [B, H, seqlen_q_padded].
    pub lse_log2: u64,
    /// f32 [B, H, seqlen_q_padded].
    pub delta: u64,
    /// i32 [B, H, G, max_selected].
    pub q2k_index: u64,
    /// i32 [B, H, G].
    pub q2k_count: u64,
    /// i32 [1]: OR of [`error_bits`].
    pub error_flag: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `attn_bwd_post`. Grid: (seqlen_q_padded / 64, H, B).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnBwdPost {
    /// dQ out.
    pub dq: TensorView,
    /// f32 accumulator of `attn_bwd`.
    pub dq_accum: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `attn_bwd_post_kv`. Grid: (ceil(seqlen_kv / 64), Hkv, B).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnBwdPostKv {
    /// dK out.
    pub dk: TensorView,
    /// dV out.
    pub dv: TensorView,
    /// f32 accumulator of `attn_bwd`.
    pub dkv_accum: u64,
    /// Sizes.
    pub sizes: AttnSizes,
}

/// Launch parameters of `kv_select`. Grid: (ceil(G / 16), H, B); dynamic shared memory
/// `16 * num_kv_blocks_padded * 4` bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KvSelect {
    /// Low-rank queries [B, seqlen_q, H, rank].
    pub q_lr: TensorView,
    /// Low-rank keys [B, seqlen_kv, H, rank].
    pub k_lr: TensorView,
    /// i32 [H]: KV blocks to keep per head, 0 to min(N, max_selected).
    pub top_k: u64,
    /// i32 [B, H, G, max_selected] out.
    pub q2k_index: u64,
    /// i32 [B, H, G] out.
    pub q2k_count: u64,
    /// f32 [B, H, G, N] out, for tests; 0 when not wanted.
    pub scores: u64,
    /// u32 [G, ceil(N / 32)]: bit n % 32 of word n / 32 says whether KV block n scores +inf, in every head; 0 = none.
    pub keep_mask: u64,
    /// i32 [1].
    pub error_flag: u64,
    /// Sequences.
    pub batch: i32,
    /// Heads.
    pub num_heads: i32,
    /// Query tokens.
    pub seqlen_q: i32,
    /// KV tokens.
    pub seqlen_kv: i32,
    /// G.
    pub num_groups: i32,
    /// N.
    pub num_kv_blocks: i32,
    /// N rounded up to 32, plus 4: the row stride of the scores in shared memory, in floats.
    pub score_stride: i32,
    /// Width of the lists.
    pub max_selected: i32,
    /// KV blocks with one of the first `keep_first` tokens score +inf.
    pub keep_first: i32,
    /// Not 0: KV blocks with a token of the group's own score +inf.
    pub keep_own: i32,
}

/// Launch parameters of `kv_select_fine`. Grid: (ceil(G / groups of a CTA), H, B).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KvSelectFine {
    /// Low-rank queries [B, seqlen_q, H, rank].
    pub q_lr: TensorView,
    /// Low-rank keys [B, seqlen_kv, H, rank].
    pub k_lr: TensorView,
    /// Budget `top_k`: i32 [H], KV units to keep per head, 0 to min(N, max_selected).
    pub top_k: u64,
    /// Budget `top_p`: f32 [H], share of the predicted mass to keep per head, 0 to 1.
    pub top_p: u64,
    /// i32 [B, H, G, max_selected] out; 0 when not wanted.
    pub q2k_index: u64,
    /// i32 [B, H, G] out.
    pub q2k_count: u64,
    /// u32 [B, H, G, ceil(N / 32)] out: bit n % 32 of word n / 32 says whether unit n is listed; 0 when not wanted.
    pub bitmap: u64,
    /// f32 [B, H, G, N] out, for tests; 0 when not wanted.
    pub scores: u64,
    /// u32 [G, ceil(N / 32)]: bit n % 32 of word n / 32 says whether KV unit n scores +inf, in every head; 0 = none.
    pub keep_mask: u64,
    /// i32 [1].
    pub error_flag: u64,
    /// i32 [1], increased by the lists `max_selected` cut below `top_p`; 0 when not wanted.
    pub capped: u64,
    /// Sequences.
    pub batch: i32,
    /// Heads.
    pub num_heads: i32,
    /// Query tokens.
    pub seqlen_q: i32,
    /// KV tokens.
    pub seqlen_kv: i32,
    /// G.
    pub num_groups: i32,
    /// N.
    pub num_kv_blocks: i32,
    /// Width of the lists.
    pub max_selected: i32,
    /// KV units with one of the first `keep_first` tokens score +inf.
    pub keep_first: i32,
    /// Not 0: KV units with a token of the group's own score +inf.
    pub keep_own: i32,
    /// Where masses are taken: predicted logits in base 2 are this times the low-rank products.
    pub scale_log2: f32,
}

/// Launch parameters of `kv_invert`. Grid: (ceil(N / 64), H, B); dynamic shared memory
/// `64 * ceil(G / 32) * 4` bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KvInvert {
    /// i32 [B, H, G, max_selected].
    pub q2k_index: u64,
    /// i32 [B, H, G].
    pub q2k_count: u64,
    /// i32 [B, H, N + 1] out.
    pub k2q_offset: u64,
    /// i32 [B, H, G * max_selected] out.
    pub k2q_index: u64,
    /// i32 [1].
    pub error_flag: u64,
    /// Sequences.
    pub batch: i32,
    /// Heads.
    pub num_heads: i32,
    /// G.
    pub num_groups: i32,
    /// N.
    pub num_kv_blocks: i32,
    /// Width of the lists.
    pub max_selected: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `kv_validate`. Grid: (ceil(G / 8), H, B): one warp a group.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KvValidate {
    /// i32 [B, H, G, max_selected].
    pub q2k_index: u64,
    /// i32 [B, H, G].
    pub q2k_count: u64,
    /// i32 [1].
    pub error_flag: u64,
    /// Sequences.
    pub batch: i32,
    /// Heads.
    pub num_heads: i32,
    /// G.
    pub num_groups: i32,
    /// N.
    pub num_kv_blocks: i32,
    /// Width of the lists.
    pub max_selected: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `adamw`. Grid: any; threads stride over `count / vector`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AdamW {
    /// f32 [count]: master weights, updated.
    pub master: u64,
    /// f32 [count]: first moment, updated.
    pub moment1: u64,
    /// f32 [count]: second moment, updated.
    pub moment2: u64,
    /// f32 [count]: gradient.
    pub grad: u64,
    /// Compute-dtype [count] out: the weights the products read.
    pub weight: u64,
    /// f32 [1]: factor on the gradient (clipping), on the device.
    pub grad_factor: u64,
    /// Elements.
    pub count: i64,
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
    /// 1 - beta1^step.
    pub bias_correction1: f32,
    /// 1 - beta2^step.
    pub bias_correction2: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `adamw_8bit`. Grid: any; warps stride over blocks of 128 elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AdamW8 {
    /// f32 [count]: master weights, updated.
    pub master: u64,
    /// u8 [count]: codes of the first moment, updated.
    pub codes1: u64,
    /// f32 [count / 128]: its scales, updated.
    pub scales1: u64,
    /// u8 [count]: codes of the second moment, updated.
    pub codes2: u64,
    /// f32 [count / 128]: its scales, updated.
    pub scales2: u64,
    /// f32 [count]: gradient.
    pub grad: u64,
    /// Compute-dtype [count] out: the weights the products read.
    pub weight: u64,
    /// f32 [1]: factor on the gradient (clipping), on the device.
    pub grad_factor: u64,
    /// Elements, a multiple of 128.
    pub count: i64,
    /// Number of the first of them in its set, from which thresholds are drawn.
    pub first: i64,
    /// 1 - lr weight_decay.
    pub keep: f32,
    /// lr / (1 - beta1^step).
    pub size: f32,
    /// 1 / sqrt(1 - beta2^step).
    pub root: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Of the step's thresholds.
    pub seed: u32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}
