use crate::attn::{AttnOp, Lists};
use crate::types::{Deterministic, Dtype};
use serde::{Deserialize, Serialize};

/// Sequence lengths the table distinguishes: a problem falls into the nearest by ratio.
pub const SEQLEN_BUCKETS: [u32; 6] = [4096, 8192, 16384, 32768, 65536, 131_072];
/// Sparsities (percent of KV skipped) the table distinguishes: a problem falls into the nearest.
pub const SPARSITY_BUCKETS: [u8; 8] = [0, 50, 75, 80, 85, 90, 95, 98];

/// What the caller has now: one attention call's shapes, dtype and list width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Problem {
    /// `attn_fwd` or `attn_bwd`; the backward's helpers follow from the latter.
    pub op: AttnOp,
    /// Element type.
    pub dtype: Dtype,
    /// Columns of Q, K, V.
    pub head_dim: u16,
    /// Dense, or the block size of the lists.
    pub lists: Lists,
    /// Sequences.
    pub batch: u32,
    /// Query heads.
    pub num_heads: u32,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Query tokens.
    pub seqlen_q: u32,
    /// KV tokens.
    pub seqlen_kv: u32,
    /// Width of the lists, in KV blocks; 0 when dense.
    pub max_selected: u32,
    /// Whether the result must be the same bits every time.
    pub deterministic: Deterministic,
}

/// The part of a problem the dispatch table is keyed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Bucket {
    /// Which kernel.
    pub op: AttnOp,
    /// Element type.
    pub dtype: Dtype,
    /// Columns of Q, K, V.
    pub head_dim: u16,
    /// Tokens sharing one list; 0 when dense.
    pub query_group: u16,
    /// Tokens of one selectable KV unit; 0 when dense.
    pub kv_block: u16,
    /// One of [`SPARSITY_BUCKETS`].
    pub sparsity: u8,
    /// One of [`SEQLEN_BUCKETS`].
    pub seqlen: u32,
    /// Whether the result must be the same bits every time.
    pub deterministic: Deterministic,
}

impl Problem {
    /// G = ceil(seqlen_q / query_group); 0 when dense.
    pub fn num_groups(&self) -> u32 {
        match self.lists.block_size() {
            (0, _) => 0,
            (query_group, _) => self.seqlen_q.div_ceil(query_group as u32),
        }
    }

    /// N = ceil(seqlen_kv / kv_block); 0 when dense.
    pub fn num_kv_blocks(&self) -> u32 {
        match self.lists.block_size() {
            (_, 0) => 0,
            (_, kv_block) => self.seqlen_kv.div_ceil(kv_block as u32),
        }
    }

    /// Percent of KV skipped if every list is full; 0 when dense.
    pub fn sparsity_percent(&self) -> f64 {
        match self.num_kv_blocks() {
            0 => 0.0,
            blocks => 100.0 * (1.0 - (self.max_selected as f64 / blocks as f64).min(1.0)),
        }
    }

    /// The table line this problem falls into.
    pub fn bucket(&self) -> Bucket {
        let (query_group, kv_block) = self.lists.block_size();
        let percent = self.sparsity_percent();
        let distance = |s: u8| (s as f64 - percent).abs();
        let ratio = |s: u32| (s as f64 / self.seqlen_kv.max(1) as f64).ln().abs();
        let sparsity =
            SPARSITY_BUCKETS.into_iter().min_by(|a, b| distance(*a).total_cmp(&distance(*b))).unwrap_or(0);
        let seqlen = SEQLEN_BUCKETS
            .into_iter()
            .min_by(|a, b| ratio(*a).total_cmp(&ratio(*b)))
            .unwrap_or(SEQLEN_BUCKETS[0]);
        Bucket {
            op: self.op,
            dtype: self.dtype,
            head_dim: self.head_dim,
            query_group,
            kv_block,
            sparsity,
            seqlen,
            deterministic: self.deterministic,
        }
    }
}
