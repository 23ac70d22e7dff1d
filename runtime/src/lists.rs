//! KV lists: selecting, inverting and validating them.

use crate::attention::{KeyLists, QueryLists, aligned};
use crate::device::Stream;
use crate::error::Error;
use crate::kernels::Kernel;
use crate::layout::{ALIGN_BYTES, Extent, Layout};
use dsv_spec::params::{KvInvert, KvSelect, KvValidate};
use dsv_spec::{Dtype, GroupRule, KernelSpec, Problem, SelectOp, limits};
use std::sync::Arc;

/// The sizes of KV lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListShape {
    /// Sequences.
    pub batch: u32,
    /// Query heads.
    pub num_heads: u32,
    /// G = ceil(seqlen_q / query_group).
    pub num_groups: u32,
    /// N = ceil(seqlen_kv / kv_block).
    pub num_kv_blocks: u32,
    /// Width of the lists.
    pub max_selected: u32,
}

impl ListShape {
    /// The lists of an attention problem; all zeros when it is dense.
    pub fn of(problem: &Problem) -> ListShape {
        ListShape {
            batch: problem.batch,
            num_heads: problem.num_heads,
            num_groups: problem.num_groups(),
            num_kv_blocks: problem.num_kv_blocks(),
            max_selected: problem.max_selected,
        }
    }

    fn heads(&self) -> u64 {
        self.batch as u64 * self.num_heads as u64
    }

    /// Bytes of `q2k_index` and of `k2q_index`: i32 [B, H, G, max_selected].
    pub fn index_bytes(&self) -> u64 {
        4 * self.heads() * self.num_groups as u64 * self.max_selected as u64
    }

    /// Bytes of `q2k_count`: i32 [B, H, G].
    pub fn count_bytes(&self) -> u64 {
        4 * self.heads() * self.num_groups as u64
    }

    /// Bytes of `k2q_offset`: i32 [B, H, N + 1].
    pub fn offset_bytes(&self) -> u64 {
        4 * self.heads() * (self.num_kv_blocks as u64 + 1)
    }

    /// Dynamic shared memory of `kv_invert`: one bit per group for 64 KV blocks.
    pub fn invert_smem_bytes(&self) -> u64 {
        64 * self.num_groups.div_ceil(32) as u64 * 4
    }

    /// Checks the sizes without a GPU.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem.
    pub fn check(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        self.collect(&mut problems);
        if self.invert_smem_bytes() > limits::SMEM_BYTES_PER_CTA as u64 {
            problems.push(format!(
                "{} groups need {} bytes of shared memory to invert; allowed: {} bytes, {} groups",
                self.num_groups,
                self.invert_smem_bytes(),
                limits::SMEM_BYTES_PER_CTA,
                limits::SMEM_BYTES_PER_CTA / 256 * 32
            ));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Plan { what: "KV lists".to_string(), problems }) }
    }

    pub(crate) fn collect(&self, problems: &mut Vec<String>) {
        let sizes = [
            ("batch", self.batch, 65_535),
            ("num_heads", self.num_heads, 65_535),
            ("num_groups", self.num_groups, i32::MAX as u32),
            ("num_kv_blocks", self.num_kv_blocks, i32::MAX as u32 - 64),
            ("max_selected", self.max_selected, i32::MAX as u32),
        ];
        for (name, value, most) in sizes {
            if value == 0 || value > most {
                problems.push(format!("{name} {value}; allowed: 1 to {most}"));
            }
        }
        let slab = self.num_groups as u64 * self.max_selected as u64;
        if slab > i32::MAX as u64 {
            problems.push(format!("G x max_selected = {slab} list entries a head; allowed: below 2^31"));
        }
    }
}

/// KV units that are listed before all others, whatever their score: it counts as +inf. By a number of units they count
/// within that number; of more than it, those of the smallest ids are listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// Units with one of the first tokens (text, sinks): how many tokens; 0 to seqlen_kv.
    pub first: u32,
    /// Units with a token of the group's own, by position: key token i is query token i.
    pub own: bool,
}

impl Keep {
    pub(crate) fn collect(&self, seqlen_kv: u32, problems: &mut Vec<String>) {
        if self.first > seqlen_kv {
            problems.push(format!("keep.first {}; allowed: 0 to {seqlen_kv} (seqlen_kv)", self.first));
        }
    }
}

/// What a selection is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectProblem {
    /// d_lr, columns of the low-rank queries and keys.
    pub rank: u8,
    /// Tokens sharing one list.
    pub query_group: u16,
    /// Tokens of one selectable KV unit.
    pub kv_block: u16,
    /// How a group's low-rank queries become one.
    pub group_rule: GroupRule,
    /// Blocks listed whatever their score.
    pub keep: Keep,
    /// Sequences.
    pub batch: u32,
    /// Query heads.
    pub num_heads: u32,
    /// Query tokens.
    pub seqlen_q: u32,
    /// KV tokens.
    pub seqlen_kv: u32,
    /// Width of the lists.
    pub max_selected: u32,
}

impl SelectProblem {
    /// Element type of the low-rank queries and keys.
    pub const DTYPE: Dtype = Dtype::Bf16;

    /// The lists it makes.
    pub fn lists(&self) -> ListShape {
        ListShape {
            batch: self.batch,
            num_heads: self.num_heads,
            num_groups: self.seqlen_q.div_ceil(self.query_group.max(1) as u32),
            num_kv_blocks: self.seqlen_kv.div_ceil(self.kv_block.max(1) as u32),
            max_selected: self.max_selected,
        }
    }

    /// Floats between the rows of scores in shared memory: N rounded up to 32, plus 4.
    pub fn score_stride(&self) -> u32 {
        self.lists().num_kv_blocks.next_multiple_of(32) + 4
    }

    /// Dynamic shared memory of `kv_select`: the f32 scores of 16 groups.
    pub fn smem_bytes(&self) -> u64 {
        16 * self.score_stride() as u64 * 4
    }

    fn extent(&self, seqlen: u32) -> Extent {
        low_rank_extent(self.batch, seqlen, self.num_heads, self.rank)
    }

    /// Checks sizes and layouts of q_lr [batch, seqlen_q, num_heads, rank] and k_lr [batch, seqlen_kv, num_heads, rank]
    /// without a GPU; gives the layouts with legal strides for dimensions of size 1.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem.
    pub fn check(&self, q_lr: Layout, k_lr: Layout) -> Result<(Layout, Layout), Error> {
        let mut problems = Vec::new();
        self.lists().collect(&mut problems);
        if self.smem_bytes() > limits::SMEM_BYTES_PER_CTA as u64 {
            problems.push(format!(
                "{} KV blocks need {} bytes of shared memory for the scores of 16 groups; allowed: {} bytes; a larger \
                 kv_block makes fewer",
                self.lists().num_kv_blocks,
                self.smem_bytes(),
                limits::SMEM_BYTES_PER_CTA
            ));
        }
        self.keep.collect(self.seqlen_kv, &mut problems);
        let q_lr = self.extent(self.seqlen_q).check("q_lr", q_lr, &mut problems);
        let k_lr = self.extent(self.seqlen_kv).check("k_lr", k_lr, &mut problems);
        if problems.is_empty() {
            Ok((q_lr, k_lr))
        } else {
            Err(Error::Plan { what: "kv_select".to_string(), problems })
        }
    }
}

/// A low-rank tensor.
pub(crate) fn low_rank_extent(batch: u32, seqlen: u32, heads: u32, rank: u8) -> Extent {
    Extent { batch, seqlen, heads, head_dim: rank as u32, dtype: SelectProblem::DTYPE }
}

/// Device addresses of one selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectArgs {
    /// bf16 [batch, seqlen_q, num_heads, rank], aligned to 16 bytes.
    pub q_lr: u64,
    /// bf16 [batch, seqlen_kv, num_heads, rank], aligned to 16 bytes.
    pub k_lr: u64,
    /// i32, one a head: KV blocks to keep, 0 to min(N, max_selected), those of [`Keep`] among them; what is out of range is
    /// clamped and raises the error flag.
    pub top_k: u64,
    /// The lists, written.
    pub lists: QueryLists,
    /// f32 [B, H, G, N], written, where wanted; NaN as -inf, kept blocks as +inf.
    pub scores: Option<u64>,
    /// u32 [G, ceil(N / 32)], where further blocks are kept as those of [`Keep`] are, in every head: bit n % 32 of word n / 32.
    pub keep_mask: Option<u64>,
    /// i32, one element: the device error flag.
    pub error_flag: u64,
}

/// A checked selection with its kernel on the GPU.
#[derive(Clone, Debug)]
pub struct SelectPlan {
    problem: SelectProblem,
    q_lr: Layout,
    k_lr: Layout,
    kernel: Arc<Kernel>,
}

impl SelectPlan {
    pub(crate) fn new(
        problem: &SelectProblem,
        q_lr: Layout,
        k_lr: Layout,
        kernel: Arc<Kernel>,
    ) -> Result<SelectPlan, Error> {
        let (q_lr, k_lr) = problem.check(q_lr, k_lr)?;
        let SelectProblem { rank, query_group, kv_block, group_rule, .. } = *problem;
        let asked = (SelectOp::Rows, rank, query_group, kv_block, group_rule);
        match kernel.spec() {
            KernelSpec::Select(s)
                if (s.op(), s.rank(), s.query_group(), s.kv_block(), s.group_rule()) == asked =>
            {
                room(&kernel, problem.smem_bytes(), "kv_select")?;
                Ok(SelectPlan { problem: *problem, q_lr, k_lr, kernel })
            }
            _ => Err(Error::Plan {
                what: "kv_select".to_string(),
                problems: vec![format!(
                    "kernel {}; allowed: a kv_select of rank {rank}, query_group {query_group}, kv_block {kv_block}, {group_rule}",
                    kernel.name(),
                )],
            }),
        }
    }

    /// The problem.
    pub fn problem(&self) -> &SelectProblem {
        &self.problem
    }

    /// The kernel.
    pub fn kernel(&self) -> &Arc<Kernel> {
        &self.kernel
    }

    /// Queues scores and exact top-k of every group; ids ascending, ties to the smaller id. Allocates nothing, waits
    /// for nothing, may be captured.
    ///
    /// # Safety
    /// Every address is device memory of the size and layout the plan was made for, until the work is done.
    ///
    /// # Errors
    /// A null or misaligned address, or what the driver answers.
    pub unsafe fn select(&self, stream: &Stream, args: &SelectArgs) -> Result<(), Error> {
        aligned(&self.kernel, &[("q_lr", args.q_lr), ("k_lr", args.k_lr)], ALIGN_BYTES)?;
        let words = [
            ("top_k", args.top_k),
            ("q2k_index", args.lists.q2k_index),
            ("q2k_count", args.lists.q2k_count),
            ("error_flag", args.error_flag),
        ];
        aligned(&self.kernel, &words, 4)?;
        if let Some(address) = args.keep_mask {
            aligned(&self.kernel, &[("keep_mask", address)], 4)?;
        }
        let p = &self.problem;
        let shape = p.lists();
        let params = KvSelect {
            q_lr: self.q_lr.view(args.q_lr),
            k_lr: self.k_lr.view(args.k_lr),
            top_k: args.top_k,
            q2k_index: args.lists.q2k_index,
            q2k_count: args.lists.q2k_count,
            scores: args.scores.unwrap_or(0),
            keep_mask: args.keep_mask.unwrap_or(0),
            error_flag: args.error_flag,
            batch: p.batch as i32,
            num_heads: p.num_heads as i32,
            seqlen_q: p.seqlen_q as i32,
            seqlen_kv: p.seqlen_kv as i32,
            num_groups: shape.num_groups as i32,
            num_kv_blocks: shape.num_kv_blocks as i32,
            score_stride: p.score_stride() as i32,
            max_selected: p.max_selected as i32,
            keep_first: p.keep.first as i32,
            keep_own: p.keep.own as i32,
        };
        let grid = [shape.num_groups.div_ceil(16), p.num_heads, p.batch];
        // SAFETY: the caller's promise; the parameters are those of kv_select.
        unsafe { self.kernel.launch(stream, grid, p.smem_bytes() as u32, &params) }
    }
}

/// Refuses a problem whose shared memory this kernel, on this GPU, has no room for.
fn room(kernel: &Kernel, smem_bytes: u64, what: &str) -> Result<(), Error> {
    if smem_bytes <= kernel.max_smem_bytes() as u64 {
        return Ok(());
    }
    let problem = format!(
        "{smem_bytes} bytes of dynamic shared memory; allowed: {} for {} on this GPU",
        kernel.max_smem_bytes(),
        kernel.name()
    );
    Err(Error::Plan { what: what.to_string(), problems: vec![problem] })
}

/// Checked list sizes with the kernels that invert and validate lists.
#[derive(Clone, Debug)]
pub struct ListPlan {
    shape: ListShape,
    invert: Arc<Kernel>,
    validate: Arc<Kernel>,
}

impl ListPlan {
    pub(crate) fn new(
        shape: &ListShape,
        invert: Arc<Kernel>,
        validate: Arc<Kernel>,
    ) -> Result<ListPlan, Error> {
        shape.check()?;
        room(&invert, shape.invert_smem_bytes(), "KV lists")?;
        Ok(ListPlan { shape: *shape, invert, validate })
    }

    /// The sizes.
    pub fn shape(&self) -> &ListShape {
        &self.shape
    }

    /// Queues the inversion of the forward's lists into the backward's: deterministic, groups ascending. Allocates
    /// nothing, waits for nothing, may be captured.
    ///
    /// # Safety
    /// Every address is device memory of the sizes in [`ListShape`], until the work is done.
    ///
    /// # Errors
    /// A null or misaligned address, or what the driver answers.
    pub unsafe fn invert(
        &self,
        stream: &Stream,
        from: &QueryLists,
        to: &KeyLists,
        error_flag: u64,
    ) -> Result<(), Error> {
        let words = [
            ("q2k_index", from.q2k_index),
            ("q2k_count", from.q2k_count),
            ("k2q_offset", to.k2q_offset),
            ("k2q_index", to.k2q_index),
            ("error_flag", error_flag),
        ];
        aligned(&self.invert, &words, 4)?;
        let s = &self.shape;
        let params = KvInvert {
            q2k_index: from.q2k_index,
            q2k_count: from.q2k_count,
            k2q_offset: to.k2q_offset,
            k2q_index: to.k2q_index,
            error_flag,
            batch: s.batch as i32,
            num_heads: s.num_heads as i32,
            num_groups: s.num_groups as i32,
            num_kv_blocks: s.num_kv_blocks as i32,
            max_selected: s.max_selected as i32,
            reserved: 0,
        };
        let grid = [s.num_kv_blocks.div_ceil(64), s.num_heads, s.batch];
        // SAFETY: the caller's promise; the parameters are those of kv_invert.
        unsafe { self.invert.launch(stream, grid, s.invert_smem_bytes() as u32, &params) }
    }

    /// Queues the check that lists are ascending, unique and in range; what is wrong is raised in the error flag.
    ///
    /// # Safety
    /// As [`ListPlan::invert`].
    ///
    /// # Errors
    /// As [`ListPlan::invert`].
    pub unsafe fn validate(&self, stream: &Stream, lists: &QueryLists, error_flag: u64) -> Result<(), Error> {
        let words =
            [("q2k_index", lists.q2k_index), ("q2k_count", lists.q2k_count), ("error_flag", error_flag)];
        aligned(&self.validate, &words, 4)?;
        let s = &self.shape;
        let params = KvValidate {
            q2k_index: lists.q2k_index,
            q2k_count: lists.q2k_count,
            error_flag,
            batch: s.batch as i32,
            num_heads: s.num_heads as i32,
            num_groups: s.num_groups as i32,
            num_kv_blocks: s.num_kv_blocks as i32,
            max_selected: s.max_selected as i32,
            reserved: 0,
        };
        let grid = [s.num_groups.div_ceil(8), s.num_heads, s.batch];
        // SAFETY: the caller's promise; the parameters are those of kv_validate.
        unsafe { self.validate.launch(stream, grid, 0, &params) }
    }
}
