//! Launch parameters of the trainer's own kernels. "Element" is the compute dtype of the kernel's spec; arrays are
//! contiguous; those documented as elements are aligned to 16 bytes.

use super::TensorView;

/// A contiguous array in f32 or in the kernel's element type.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flat {
    /// Address of the first element.
    pub ptr: u64,
    /// Non-zero: f32; zero: the kernel's element type.
    pub is_f32: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// A latent video cut into patches.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Patches {
    /// Latent channels.
    pub channels: i32,
    /// Latent frames, rows, columns.
    pub latent: [i32; 3],
    /// Sides of a patch; each divides its latent side.
    pub patch: [i32; 3],
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `cast`. Grid: any; threads stride over the elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cast {
    /// [count].
    pub src: Flat,
    /// [count] out.
    pub dst: Flat,
    /// Elements.
    pub count: i64,
}

/// Launch parameters of `axpy`: y += alpha x. Grid: any; threads stride over the elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Axpy {
    /// [count].
    pub x: Flat,
    /// [count], updated; may be `x`.
    pub y: Flat,
    /// Elements.
    pub count: i64,
    /// Factor of x.
    pub alpha: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `ema`: ema = decay ema + (1 - decay) master. Grid: any; threads stride over the elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ema {
    /// f32 [count].
    pub master: u64,
    /// f32 [count], updated.
    pub ema: u64,
    /// Elements.
    pub count: i64,
    /// Weight of the old average.
    pub decay: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `add_rows`: out[r, :] = a[r, :] + b. Grid: (any, any): threads stride over columns and rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AddRows {
    /// [rows, columns].
    pub a: Flat,
    /// [columns].
    pub b: Flat,
    /// [rows, columns] out; may be `a`.
    pub out: Flat,
    /// Rows.
    pub rows: i64,
    /// Columns.
    pub columns: i64,
}

/// Launch parameters of `sum_rows`: f32 column sums in a fixed order, per segment and chunk of rows.
///
/// Grid: (ceil(columns / (32 * vector)), ceil(rows / rows_per_chunk), segments).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SumRows {
    /// [segments, rows, row_stride], of which `columns` columns are summed.
    pub src: Flat,
    /// f32 out, [segments, chunks, columns] by the strides below.
    pub dst: u64,
    /// Rows of a segment.
    pub rows: i64,
    /// Columns.
    pub columns: i64,
    /// Elements of `src` between rows.
    pub row_stride: i64,
    /// Elements of `src` between segments.
    pub segment_stride: i64,
    /// Elements of `dst` between segments.
    pub dst_segment_stride: i64,
    /// Elements of `dst` between chunks.
    pub dst_chunk_stride: i64,
    /// Rows one CTA adds up.
    pub rows_per_chunk: i32,
    /// Non-zero: dst += sum; zero: dst = sum.
    pub accumulate: i32,
    /// Factor of the sums.
    pub factor: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `norm_mod_fwd`: out = LN(x) (1 + scale) + shift. Grid: (ceil(batch * seqlen / 8)): one warp a row.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NormModFwd {
    /// Element [B, S, dim].
    pub x: u64,
    /// Element [B, S, dim] out.
    pub out: u64,
    /// f32 [B, chunks, dim].
    pub modulation: u64,
    /// f32 [B, S] out.
    pub mean: u64,
    /// f32 [B, S] out: 1 / sqrt(var + eps).
    pub rstd: u64,
    /// Sequences.
    pub batch: i32,
    /// Tokens.
    pub seqlen: i32,
    /// Width of a token, a multiple of the vector.
    pub dim: i32,
    /// Chunks of `modulation`.
    pub chunks: i32,
    /// Chunk of the shift.
    pub shift: i32,
    /// Chunk of the scale.
    pub scale: i32,
    /// Added to the variance.
    pub eps: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `norm_mod_bwd`. Grid: (ceil(seqlen / rows_per_chunk), B); `sum_rows` adds up `partial`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NormModBwd {
    /// Element [B, S, dim].
    pub x: u64,
    /// Element [B, S, dim].
    pub d_out: u64,
    /// Element [B, S, dim], added to.
    pub d_x: u64,
    /// f32 [B, chunks, dim].
    pub modulation: u64,
    /// f32 [B, S].
    pub mean: u64,
    /// f32 [B, S].
    pub rstd: u64,
    /// f32 [B, gridDim.x, 2, dim] out: sums of d_out and of d_out times the normalised x.
    pub partial: u64,
    /// Sequences.
    pub batch: i32,
    /// Tokens.
    pub seqlen: i32,
    /// Width of a token, a multiple of the vector.
    pub dim: i32,
    /// Chunks of `modulation`.
    pub chunks: i32,
    /// Chunk of the scale.
    pub scale: i32,
    /// Tokens of a CTA.
    pub rows_per_chunk: i32,
}

/// Launch parameters of `gate_weight`: row r of weight and bias times gate[r]. Grid: (rows).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GateWeight {
    /// Element [rows, columns].
    pub weight: u64,
    /// Element [rows].
    pub bias: u64,
    /// f32 [rows].
    pub gate: u64,
    /// Element [rows, columns] out.
    pub gated_weight: u64,
    /// Element [rows] out.
    pub gated_bias: u64,
    /// Columns, a multiple of the vector.
    pub columns: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `gate_grad`: gradients of y = gate (w a + bias) from P = d_y^T a and s = sum d_y. Grid: (rows).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GateGrad {
    /// f32 [rows, columns]: P.
    pub product: u64,
    /// f32 [rows]: s.
    pub sum: u64,
    /// Element [rows, columns].
    pub weight: u64,
    /// Element [rows].
    pub bias: u64,
    /// f32 [rows].
    pub gate: u64,
    /// f32 [rows, columns], added to.
    pub d_weight: u64,
    /// f32 [rows], added to.
    pub d_bias: u64,
    /// f32 [rows] out.
    pub d_gate: u64,
    /// Columns, a multiple of the vector.
    pub columns: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `qk_prep_fwd`. Grid: (batch * seqlen): one CTA a token.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct QkPrepFwd {
    /// Element [B, S, 3, H, D].
    pub qkv: u64,
    /// Element [D]: RMS weight of Q, of K.
    pub weight: [u64; 2],
    /// f32 [S, D/2].
    pub cosine: u64,
    /// f32 [S, D/2].
    pub sine: u64,
    /// Element [B, S, H, D] out: q, k.
    pub out: [u64; 2],
    /// f32 [B, S, H] out: of Q, of K.
    pub rstd: [u64; 2],
    /// Sequences.
    pub batch: i32,
    /// Tokens.
    pub seqlen: i32,
    /// Heads.
    pub heads: i32,
    /// D: a multiple of 4, at most 256.
    pub head_dim: i32,
    /// Added to the mean square.
    pub eps: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `qk_prep_bwd`. Grid: (ceil(batch * seqlen / rows_per_chunk)); `sum_rows` adds up `partial`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct QkPrepBwd {
    /// Element [B, S, 3, H, D].
    pub qkv: u64,
    /// Element [D]: RMS weight of Q, of K.
    pub weight: [u64; 2],
    /// f32 [S, D/2].
    pub cosine: u64,
    /// f32 [S, D/2].
    pub sine: u64,
    /// f32 [B, S, H]: of Q, of K.
    pub rstd: [u64; 2],
    /// Element [B, S, H, D]: gradients of q and k.
    pub d_out: [u64; 2],
    /// Element [B, S, 3, H, D] out: parts 0 and 1.
    pub d_qkv: u64,
    /// f32 [gridDim.x, 2, D] out: gradients of the weights.
    pub partial: u64,
    /// Sequences.
    pub batch: i32,
    /// Tokens.
    pub seqlen: i32,
    /// Heads.
    pub heads: i32,
    /// D: a multiple of 4, at most 256.
    pub head_dim: i32,
    /// Tokens of a CTA.
    pub rows_per_chunk: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `mlp_act_fwd`. Grid: any; threads stride over the elements of `out`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MlpActFwd {
    /// Element [rows, 2 * hidden] (GeGLU) or [rows, hidden] (GELU).
    pub pre: u64,
    /// Element [rows, hidden] out.
    pub out: u64,
    /// Rows.
    pub rows: i64,
    /// Columns of `out`, a multiple of the vector.
    pub hidden: i32,
    /// Non-zero: GeGLU; zero: GELU.
    pub is_glu: i32,
}

/// Launch parameters of `mlp_act_bwd`. Grid: (ceil(hidden / (256 vectors)), ceil(rows / rows_per_chunk)); `sum_rows` adds up
/// `partial`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MlpActBwd {
    /// Element [rows, 2 * hidden] (GeGLU) or [rows, hidden] (GELU); its gradient is written over it.
    pub pre: u64,
    /// Element [rows, hidden]: gradient of the activation's output, which is written over it.
    pub out: u64,
    /// f32 [gridDim.y, row length of pre] out: column sums of the gradient of pre.
    pub partial: u64,
    /// Rows.
    pub rows: i64,
    /// Columns of `out`, a multiple of the vector.
    pub hidden: i32,
    /// Non-zero: GeGLU; zero: GELU.
    pub is_glu: i32,
    /// Rows of a CTA.
    pub rows_per_chunk: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `silu_fwd`. Grid: any; threads stride over the elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SiluFwd {
    /// [count].
    pub x: Flat,
    /// [count] out.
    pub out: Flat,
    /// Elements.
    pub count: i64,
}

/// Launch parameters of `silu_bwd`. Grid: any; threads stride over the elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SiluBwd {
    /// [count].
    pub x: Flat,
    /// [count].
    pub d_out: Flat,
    /// [count] out; may be `d_out`.
    pub d_x: Flat,
    /// Elements.
    pub count: i64,
}

/// Launch parameters of `rope`. Grid: any; threads stride over the pairs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rope {
    /// Element [B, S, vectors, dim], updated.
    pub x: u64,
    /// f32 [S, dim/2].
    pub cosine: u64,
    /// f32 [S, dim/2].
    pub sine: u64,
    /// Sequences.
    pub batch: i32,
    /// Tokens.
    pub seqlen: i32,
    /// Vectors of a token.
    pub vectors: i32,
    /// Elements of a vector, even.
    pub dim: i32,
    /// Non-zero: rotate backwards.
    pub inverse: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `time_embed`. Grid: any; threads stride over the pairs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TimeEmbed {
    /// f32 [B].
    pub t: u64,
    /// Element [B, width] out.
    pub out: u64,
    /// Sequences.
    pub batch: i32,
    /// Columns, even.
    pub width: i32,
}

/// Launch parameters of `flow_prepare`. Grid: (any, B); threads stride over quadruples of a sequence's values.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FlowPrepare {
    /// f32 [B, C, T, H, W].
    pub latents: u64,
    /// i32 [S]: token to raster patch index.
    pub order: u64,
    /// f32 [B]: 0 is data, 1 is noise.
    pub t: u64,
    /// u32 [B, 2]: Philox keys.
    pub keys: u64,
    /// Element [B, S, width] out.
    pub x_t: u64,
    /// f32 [B, S, width] out.
    pub target: u64,
    /// Sizes.
    pub patches: Patches,
    /// Sequences.
    pub batch: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `unpatchify`. Grid: (any, B); threads stride over a sequence's values.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Unpatchify {
    /// i32 [S]: token to raster patch index.
    pub order: u64,
    /// f32 [B, S, width].
    pub tokens: u64,
    /// f32 [B, C, T, H, W] out.
    pub latents: u64,
    /// Sizes.
    pub patches: Patches,
    /// Sequences.
    pub batch: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `normal`: standard normal values. Grid: any; threads stride over quadruples.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Normal {
    /// u32 [2]: Philox key.
    pub keys: u64,
    /// f32 [count] out.
    pub dst: u64,
    /// Elements.
    pub count: i64,
}

/// Launch parameters of `flow_loss`. Grid: (any, B); threads stride over a sequence's values; `sum_rows` adds up `partial`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FlowLoss {
    /// Element [B, per_element].
    pub pred: u64,
    /// f32 [B, per_element].
    pub target: u64,
    /// Element [B, per_element] out; 0 for none.
    pub d_pred: u64,
    /// f32 [B, gridDim.x] out: sums of squares.
    pub partial: u64,
    /// Values of a sequence.
    pub per_element: i64,
    /// 2 weight / (B per_element).
    pub gradient_factor: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `text_select_fwd`. Grid: (any, B); threads stride over an element's values.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TextSelectFwd {
    /// Element [B, per_element].
    pub text: u64,
    /// Element [per_element].
    pub null: u64,
    /// Element [B, per_element] out.
    pub out: u64,
    /// i32 [B]: non-zero drops the caption.
    pub drop: u64,
    /// Values of a batch element.
    pub per_element: i64,
}

/// Launch parameters of `text_select_bwd`. Grid: any; threads stride over an element's values.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TextSelectBwd {
    /// [B, per_element].
    pub d_out: Flat,
    /// i32 [B]: non-zero drops the caption.
    pub drop: u64,
    /// f32 [per_element], added to.
    pub d_null: u64,
    /// Values of a batch element.
    pub per_element: i64,
    /// Batch elements.
    pub batch: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `grad_norm`. Grid: any; threads stride over the elements; `grad_clip` adds up `partial`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradNorm {
    /// f32 [count].
    pub grad: u64,
    /// i32 [tensors + 1], ascending: first element of each tensor, in units.
    pub segments: u64,
    /// f64 [gridDim.x] out: sums of squares.
    pub partial: u64,
    /// i32 [gridDim.x] out: first tensor with a value that is not finite, or 2^31 - 1.
    pub culprit: u64,
    /// Elements.
    pub count: i64,
    /// Tensors.
    pub tensors: i32,
    /// Elements of one unit of `segments`.
    pub segment_unit: i32,
}

/// Launch parameters of `grad_clip`. Grid: one CTA.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradClip {
    /// f64 [parts].
    pub partial: u64,
    /// i32 [parts].
    pub partial_culprit: u64,
    /// f32 [2] out: norm, and the factor gradients are to be multiplied by (NaN: skip the step).
    pub clip: u64,
    /// i32 [1] out: first tensor with a value that is not finite, or -1.
    pub culprit: u64,
    /// CTAs of `grad_norm`.
    pub parts: i32,
    /// Largest norm allowed; infinite for no clipping.
    pub max_norm: f32,
}

/// Launch parameters of `gram_sums`, of low-rank rows of R columns. Grid: (ceil(S / rows_per_cta), H, B [`gram_slices`]);
/// dynamic shared memory from `Facts`. A record is K^T \[K | K_lr\] as [D, D + R], K_lr^T K_lr [R, R] and the column sums of \[K | K_lr\]:
/// [`gram_record`] f32.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GramSums {
    /// Element [B, S, H, D].
    pub k: TensorView,
    /// Element [B, S, H, R].
    pub k_lr: TensorView,
    /// f32 [B, H, gridDim.x, record] out: of the CTA's tokens.
    pub partial: u64,
    /// Heads.
    pub num_heads: i32,
    /// Tokens S.
    pub seqlen: i32,
    /// Tokens of a CTA, a multiple of 64.
    pub rows_per_cta: i32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// CTAs of `gram_sums`, and of `gram_query` for each 16 low-rank columns, that share a chunk of tokens.
pub const fn gram_slices(head_dim: usize) -> usize {
    if head_dim > 128 { 2 } else { 1 }
}

/// f32 of a record of [`GramSums`].
pub const fn gram_record(head_dim: usize, rank: usize) -> usize {
    head_dim * (head_dim + rank) + rank * rank + head_dim + rank
}

/// Launch parameters of `gram_query`, of low-rank rows of R columns. Grid: (ceil(S / rows_per_cta), H, B [`gram_slices`] R / 16);
/// dynamic shared memory from `Facts`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GramQuery {
    /// Element [B, S, H, D].
    pub q: TensorView,
    /// Element [B, S, H, R].
    pub q_lr: TensorView,
    /// Element [B, S, H, R] out: gradient of the low-rank queries.
    pub d_q_lr: TensorView,
    /// f32 [B, H, record] as of [`GramSums`], of all tokens.
    pub sums: u64,
    /// f32 [B, H, gridDim.x, R, D + R] out: of the CTA's queries, the sums of the low-rank query times the loss's derivative by
    /// a.b and the scale, by the query; and of the same times twice the derivative by a.a, by the low-rank query.
    pub weights: u64,
    /// f32 [B, gridDim.x, H] out: sums over the CTA's queries.
    pub loss: u64,
    /// Heads.
    pub num_heads: i32,
    /// Tokens S.
    pub seqlen: i32,
    /// Tokens of a CTA, a multiple of 32.
    pub rows_per_cta: i32,
    /// Logit scale.
    pub scale: f32,
    /// Factor of every query's gradient: weight / (B S H).
    pub gradient_factor: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `gram_key`, of low-rank rows of R columns. Grid: (any, H, B), of CTAs that take 128 tokens in turn;
/// dynamic shared memory from `Facts`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GramKey {
    /// Element [B, S, H, D].
    pub k: TensorView,
    /// Element [B, S, H, R].
    pub k_lr: TensorView,
    /// Element [B, S, H, R] out: gradient of the low-rank keys.
    pub d_k_lr: TensorView,
    /// f32 [B, H, R, D + R] as of [`GramQuery`], of all queries.
    pub weights: u64,
    /// f32 [B, H, record] as of [`GramSums`], of all tokens.
    pub sums: u64,
    /// f32 [loss_parts, H]: what [`GramQuery`] left in `loss`.
    pub loss_partial: u64,
    /// f32 [H] out: the losses of each head added up, times `loss_factor`.
    pub loss: u64,
    /// Heads.
    pub num_heads: i32,
    /// Tokens S.
    pub seqlen: i32,
    /// Tokens of a CTA of [`GramSums`]: those it read last come first.
    pub rows_per_chunk: i32,
    /// Losses of a head: B times the CTAs of [`GramQuery`] along the tokens.
    pub loss_parts: i32,
    /// 1 / (B S) for the mean.
    pub loss_factor: f32,
    /// Keeps the struct's size a multiple of 8.
    pub reserved: i32,
}

/// Launch parameters of `profile`. Grid: (ceil(samples / 8), H, B); dynamic shared memory from `Facts`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Profile {
    /// Element [B, S, H, D].
    pub q: TensorView,
    /// Element [B, S, H, D].
    pub k: TensorView,
    /// i32 [samples]: token ids.
    pub samples: u64,
    /// f32 [B, H, seqlen_q]: natural logarithm of the sum of exponentials over all keys, of full attention; 0 where it is
    /// not at hand: a pass over the keys finds it then.
    pub lse: u64,
    /// i32 [B, H, G, max_selected]; 0 for no lists.
    pub q2k_index: u64,
    /// i32 [B, H, G]; 0 for no lists.
    pub q2k_count: u64,
    /// f32 [B, samples, H] out: share of the keys that hold `theta` of the mass, within 1/512 for theta up to 0.99.
    pub needed: u64,
    /// f32 [B, samples, H] out: mass of the listed keys; 0 for no lists.
    pub covered: u64,
    /// f32 [B, samples, H] out: share of the needed keys that are listed; 0 where not wanted.
    pub recall: u64,
    /// i32 [1]: OR of [`super::error_bits`].
    pub error_flag: u64,
    /// Samples.
    pub num_samples: i32,
    /// Heads H.
    pub num_heads: i32,
    /// Query tokens.
    pub seqlen_q: i32,
    /// KV tokens, at most 2^22.
    pub seqlen_kv: i32,
    /// G.
    pub num_groups: i32,
    /// Tokens sharing a list.
    pub query_group: i32,
    /// Tokens of a KV block.
    pub kv_block: i32,
    /// Width of the lists.
    pub max_selected: i32,
    /// scale * log2(e).
    pub scale_log2: f32,
    /// Share of the mass that counts.
    pub theta: f32,
}
