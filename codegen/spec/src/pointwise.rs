use crate::error::SpecError;
use crate::params;
use crate::select::check_rank;
use crate::space::TRAINER_HEAD_DIMS;
use crate::types::{Arch, Dtype, tokens};

tokens! {
    /// The trainer's elementwise and row-wise kernels.
    PointwiseOp {
        /// AdamW on f32 master weights with a compute-dtype copy.
        AdamW = "adamw",
        /// The same with moments of eight bits.
        AdamW8 = "adamw_8bit",
        /// Conversion between f32 and the compute dtype.
        Cast = "cast",
        /// y += alpha x.
        Axpy = "axpy",
        /// Averaged weights.
        Ema = "ema",
        /// A row added to every row.
        AddRows = "add_rows",
        /// Column sums in a fixed order.
        SumRows = "sum_rows",
        /// LayerNorm and AdaLN modulation.
        NormModFwd = "norm_mod_fwd",
        /// Its backward.
        NormModBwd = "norm_mod_bwd",
        /// Weights of a gated linear map: gate x weight.
        GateWeight = "gate_weight",
        /// Gradients of a gated linear map's weights and gate.
        GateGrad = "gate_grad",
        /// RMS normalisation and RoPE of Q and K.
        QkPrepFwd = "qk_prep_fwd",
        /// Its backward.
        QkPrepBwd = "qk_prep_bwd",
        /// GeGLU or GELU.
        MlpActFwd = "mlp_act_fwd",
        /// Its backward, which makes the forward's output anew and sums the bias gradient.
        MlpActBwd = "mlp_act_bwd",
        /// SiLU.
        SiluFwd = "silu_fwd",
        /// Its backward.
        SiluBwd = "silu_bwd",
        /// Rotary embedding in place.
        Rope = "rope",
        /// Sinusoidal embedding of the timestep.
        TimeEmbed = "time_embed",
        /// Patches, noise and target of flow matching.
        FlowPrepare = "flow_prepare",
        /// Tokens back to latents.
        Unpatchify = "unpatchify",
        /// Standard normal values.
        Normal = "normal",
        /// Squared error of the velocity and its gradient.
        FlowLoss = "flow_loss",
        /// Caption drop-out.
        TextSelectFwd = "text_select_fwd",
        /// Its backward.
        TextSelectBwd = "text_select_bwd",
        /// Partial sums of the gradient norm.
        GradNorm = "grad_norm",
        /// Gradient norm and clip factor.
        GradClip = "grad_clip",
        /// Sums over the keys that the predictor's loss is made of.
        GramSums = "gram_sums",
        /// Predictor loss and gradient of the low-rank queries.
        GramQuery = "gram_query",
        /// Gradient of the low-rank keys.
        GramKey = "gram_key",
        /// Of sampled queries: share of keys that hold most of the mass, covered mass and recall.
        Profile = "profile",
    }
}

impl PointwiseOp {
    /// Whether the text works on f32 alone; its specs have dtype f32.
    pub const fn is_f32_only(self) -> bool {
        use PointwiseOp::*;
        matches!(self, Ema | Unpatchify | Normal | GradNorm | GradClip)
    }

    /// Whether the row length (the head dim) is baked in: operands live in registers.
    pub const fn bakes_dim(self) -> bool {
        use PointwiseOp::*;
        matches!(self, GramSums | GramQuery | GramKey | Profile)
    }

    /// Whether the rank of the low-rank rows is baked in.
    pub const fn bakes_rank(self) -> bool {
        matches!(self, PointwiseOp::GramSums | PointwiseOp::GramQuery | PointwiseOp::GramKey)
    }

    /// Elements a thread of the shipped kernel moves at once.
    pub const fn shipped_vector(self) -> u8 {
        use PointwiseOp::*;
        match self {
            AdamW | AdamW8 | SumRows => 4,
            QkPrepFwd | QkPrepBwd | Rope | TimeEmbed | FlowPrepare | Unpatchify | Normal | GradClip
            | GramSums | GramQuery | GramKey | Profile => 1,
            _ => 8,
        }
    }

    /// Bytes of the op's launch parameters.
    pub(crate) const fn params_bytes(self) -> u32 {
        use PointwiseOp::*;
        let bytes = match self {
            AdamW => size_of::<params::AdamW>(),
            AdamW8 => size_of::<params::AdamW8>(),
            Cast => size_of::<params::Cast>(),
            Axpy => size_of::<params::Axpy>(),
            Ema => size_of::<params::Ema>(),
            AddRows => size_of::<params::AddRows>(),
            SumRows => size_of::<params::SumRows>(),
            NormModFwd => size_of::<params::NormModFwd>(),
            NormModBwd => size_of::<params::NormModBwd>(),
            GateWeight => size_of::<params::GateWeight>(),
            GateGrad => size_of::<params::GateGrad>(),
            QkPrepFwd => size_of::<params::QkPrepFwd>(),
            QkPrepBwd => size_of::<params::QkPrepBwd>(),
            MlpActFwd => size_of::<params::MlpActFwd>(),
            MlpActBwd => size_of::<params::MlpActBwd>(),
            SiluFwd => size_of::<params::SiluFwd>(),
            SiluBwd => size_of::<params::SiluBwd>(),
            Rope => size_of::<params::Rope>(),
            TimeEmbed => size_of::<params::TimeEmbed>(),
            FlowPrepare => size_of::<params::FlowPrepare>(),
            Unpatchify => size_of::<params::Unpatchify>(),
            Normal => size_of::<params::Normal>(),
            FlowLoss => size_of::<params::FlowLoss>(),
            TextSelectFwd => size_of::<params::TextSelectFwd>(),
            TextSelectBwd => size_of::<params::TextSelectBwd>(),
            GradNorm => size_of::<params::GradNorm>(),
            GradClip => size_of::<params::GradClip>(),
            GramSums => size_of::<params::GramSums>(),
            GramQuery => size_of::<params::GramQuery>(),
            GramKey => size_of::<params::GramKey>(),
            Profile => size_of::<params::Profile>(),
        };
        bytes as u32
    }
}

/// Everything baked into one elementwise or row-wise kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PointwiseSpec {
    /// Which kernel.
    pub op: PointwiseOp,
    /// Compute dtype of the activations or weights it reads and writes.
    pub dtype: Dtype,
    /// Row length baked in; 0 when it is a launch parameter.
    pub dim: u16,
    /// Columns of the low-rank rows (d_lr) baked in; 0 where the op has none.
    pub rank: u8,
    /// Elements a thread moves at once.
    pub vector: u8,
    /// The architecture.
    pub arch: Arch,
}

impl PointwiseSpec {
    /// Checks the fields against each other.
    ///
    /// # Errors
    /// A vector that is not 1, 2, 4 or 8; a dtype the op has no text for; a row length where the op takes it as a
    /// launch parameter, or none where it is baked in; the same of a rank.
    pub fn new(
        op: PointwiseOp,
        dtype: Dtype,
        dim: u16,
        rank: u8,
        vector: u8,
        arch: Arch,
    ) -> Result<Self, SpecError> {
        if !matches!(vector, 1 | 2 | 4 | 8) {
            return Err(SpecError::new("vector", vector, "1, 2, 4 or 8 elements"));
        }
        if op == PointwiseOp::SumRows && vector > 4 {
            return Err(SpecError::new(
                "vector",
                vector,
                "1, 2 or 4: a thread of 256 adds up each of 32 vectors",
            ));
        }
        if op == PointwiseOp::AdamW8 && vector != 4 {
            return Err(SpecError::new(
                "vector",
                vector,
                "4: a warp holds the 128 values that share a scale",
            ));
        }
        if op.is_f32_only() != (dtype == Dtype::F32) {
            let allowed = if op.is_f32_only() { "f32" } else { "bf16 or f16" };
            return Err(SpecError::new("dtype", dtype, format!("{allowed} for {op}")));
        }
        match op.bakes_rank() {
            true => check_rank(rank)?,
            false if rank != 0 => return Err(SpecError::new("rank", rank, format!("0: {op} has none"))),
            false => {}
        }
        let spec = PointwiseSpec { op, dtype, dim, rank, vector, arch };
        if op.bakes_rank() && dim == 256 && rank > 16 {
            return Err(SpecError::new(
                "rank",
                rank,
                format!("16 at head_dim 256 for {op}: more fill no shared memory"),
            ));
        }
        match (op.bakes_dim(), dim) {
            (true, dim) if TRAINER_HEAD_DIMS.contains(&dim) => Ok(spec),
            (true, _) => {
                let allowed = TRAINER_HEAD_DIMS.map(|d| d.to_string()).join(", ");
                Err(SpecError::new(
                    "dim",
                    dim,
                    format!("{allowed}: the head dims whose Gram matrices fit shared memory and registers"),
                ))
            }
            (false, 0) => Ok(spec),
            (false, _) => Err(SpecError::new("dim", dim, format!("0: {op} takes it as a launch parameter"))),
        }
    }

    /// The shipped kernel of an op; `dim` and `rank` are used only where the op bakes them in, `dtype` only where it has one.
    ///
    /// # Errors
    /// As [`PointwiseSpec::new`].
    pub fn shipped(op: PointwiseOp, dtype: Dtype, dim: u16, rank: u8, arch: Arch) -> Result<Self, SpecError> {
        let dtype = if op.is_f32_only() { Dtype::F32 } else { dtype };
        let dim = if op.bakes_dim() { dim } else { 0 };
        let rank = if op.bakes_rank() { rank } else { 0 };
        PointwiseSpec::new(op, dtype, dim, rank, op.shipped_vector(), arch)
    }

    /// Dynamic shared memory of a CTA in bytes.
    pub(crate) fn smem_bytes(&self) -> u32 {
        let (dim, rank) = (self.dim as u32, self.rank as u32);
        // Rows of D elements, or D + 32 where D is a multiple of 64, and of R + 8; all in two 16-bit parts.
        let stride = if dim.is_multiple_of(64) { dim + 32 } else { dim };
        let rows = |long: u32| 2 * 2 * (long * stride + rank * (rank + 8));
        // Rows of a token and its low-rank row, 16 bytes from the next.
        let tokens = |n: u32| 2 * n * (dim + rank + 8);
        match self.op {
            // Four stages of 64 tokens.
            PointwiseOp::GramSums => tokens(4 * 64),
            // Two stages of 32 or 16 tokens of eight warps, or one; blocks of 16 x 16: the centred Gram matrices, of the largest its
            // upper half in two parts, the smallest in two parts too; then one f32 a warp.
            PointwiseOp::GramQuery => {
                let (wide, low) = (dim / 16, rank / 16);
                let blocks = wide * (wide + 1) + low * wide + 2 * low * low;
                let rows = if rank == 16 && dim <= 128 { 32 } else { 16 };
                let stages = if dim <= 128 { 2 } else { 1 };
                tokens(8 * stages * rows) + blocks * 512 + 8 * 4
            }
            // W and M, then one f32 a row.
            PointwiseOp::GramKey => rows(rank) + rank * 4,
            // Eight queries; of each three words in each of 2336 bins, a bit for each of 1024 keys, and 17 f32.
            PointwiseOp::Profile => 8 * (stride * 2 + 3 * 2336 * 4 + 1024 / 8 + 17 * 4),
            _ => 0,
        }
    }

    /// CTAs meant to share a multiprocessor.
    pub(crate) fn ctas_per_sm(&self) -> u32 {
        match self.op {
            // Sums of more than 16 low-rank columns take over 128 registers, and rows of more than 96 shared memory.
            PointwiseOp::GramSums if self.rank == 16 && self.dim <= 128 => 2,
            PointwiseOp::GramKey if self.dim > 128 => 2,
            // Each warp waits for its own loads: the more of them, the better.
            PointwiseOp::GramKey if self.rank == 16 => 3,
            _ => 1,
        }
    }
}
