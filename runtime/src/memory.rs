//! What one attention call needs beside Q, K, V and out: the sizes the trainer plans with. Needs no GPU.

use crate::attention::Workspace;
use crate::dispatch::Dispatch;
use crate::error::Error;
use crate::lists::ListShape;
use dsv_spec::{AttnOp, KernelSpec, Problem};

/// Bytes of device memory of one attention call, beside its tensors in the input dtype.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryNeeded {
    /// `q2k_index` and `q2k_count`: kept from forward to backward.
    pub query_lists: u64,
    /// `k2q_offset` and `k2q_index`: for the backward alone, with KV blocks of at least 64 tokens.
    pub key_lists: u64,
    /// f32 LSE [B, H, seqlen_q]: kept from forward to backward.
    pub lse: u64,
    /// Workspace of the backward; its contents are not kept. From [`MemoryNeeded::of`] it is the most any kernel of the
    /// problem uses, from [`MemoryNeeded::chosen`] what [`crate::AttnPlan::workspace_bytes`] will be.
    pub workspace: u64,
}

impl MemoryNeeded {
    /// For a problem; the backward's parts are 0 for `attn_fwd`, the lists 0 when dense.
    pub fn of(problem: &Problem) -> MemoryNeeded {
        let backward = problem.op == AttnOp::Bwd;
        let lists = (!problem.lists.is_dense()).then(|| ListShape::of(problem));
        MemoryNeeded {
            query_lists: lists.map_or(0, |l| l.index_bytes() + l.count_bytes()),
            key_lists: lists
                .filter(|_| backward && !problem.lists.is_gather())
                .map_or(0, |l| l.index_bytes() + l.offset_bytes()),
            lse: 4 * problem.batch as u64 * problem.num_heads as u64 * problem.seqlen_q as u64,
            workspace: if backward { Workspace::of(problem, problem.deterministic).bytes } else { 0 },
        }
    }

    /// The same with the kernels that this dispatch chooses: where its table picks the deterministic backward, no f32
    /// accumulator of dQ is counted.
    ///
    /// # Errors
    /// As [`Dispatch::explain`], for `attn_bwd`.
    pub fn chosen(problem: &Problem, dispatch: &Dispatch) -> Result<MemoryNeeded, Error> {
        let most = MemoryNeeded::of(problem);
        if problem.op != AttnOp::Bwd {
            return Ok(most);
        }
        let main = match dispatch.explain(problem)?.kernel {
            KernelSpec::Attn(spec) => spec.deterministic(),
            _ => problem.deterministic,
        };
        Ok(MemoryNeeded { workspace: Workspace::of(problem, main).bytes, ..most })
    }

    /// The sum.
    pub fn total(&self) -> u64 {
        self.query_lists + self.key_lists + self.lse + self.workspace
    }
}
