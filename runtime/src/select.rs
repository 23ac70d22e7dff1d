//! Selecting KV lists of any granularity, down to single tokens: `kv_select_fine`.

use crate::attention::{QueryLists, aligned};
use crate::device::Stream;
use crate::error::Error;
use crate::kernels::Kernel;
use crate::layout::{ALIGN_BYTES, Extent, Layout};
use crate::lists::{Keep, ListShape, SelectArgs, SelectPlan, low_rank_extent};
use dsv_spec::params::KvSelectFine;
use dsv_spec::{BlockScore, Budget, GroupRule, KernelSpec, SelectOp};
use std::sync::Arc;

/// What a fine selection is asked for. A KV unit is `kv_block` consecutive tokens; 1 is the token itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FineProblem {
    /// d_lr, columns of the low-rank queries and keys.
    pub rank: u8,
    /// Tokens sharing one list.
    pub query_group: u16,
    /// Tokens of one selectable KV unit.
    pub kv_block: u16,
    /// Which of a group's low-rank queries are scored.
    pub group_rule: GroupRule,
    /// What a unit's score is made of.
    pub block_score: BlockScore,
    /// What says how many units a group keeps.
    pub budget: Budget,
    /// Predicted attention logits are this times the low-rank products: 1 for the predictor's own loss. Read only where
    /// softmax masses are taken: by [`BlockScore::Mass`] and [`Budget::TopP`]. Finite and above 0.
    pub scale: f32,
    /// Units listed whatever their score.
    pub keep: Keep,
    /// Sequences.
    pub batch: u32,
    /// Query heads.
    pub num_heads: u32,
    /// Query tokens.
    pub seqlen_q: u32,
    /// KV tokens.
    pub seqlen_kv: u32,
    /// Width of the lists, 1 to N.
    pub max_selected: u32,
}

impl FineProblem {
    /// Tokens of a sequence a selection may have: positions of sampled keys and of lists stay below 2^31.
    pub const MAX_TOKENS: u32 = 1 << 26;

    /// The lists it makes; `num_kv_blocks` counts KV units.
    pub fn lists(&self) -> ListShape {
        ListShape {
            batch: self.batch,
            num_heads: self.num_heads,
            num_groups: self.seqlen_q.div_ceil(self.query_group.max(1) as u32),
            num_kv_blocks: self.seqlen_kv.div_ceil(self.kv_block.max(1) as u32),
            max_selected: self.max_selected,
        }
    }

    /// Bytes of the lists as bits: u32 [B, H, G, ceil(N / 32)].
    pub fn bitmap_bytes(&self) -> u64 {
        let lists = self.lists();
        lists.count_bytes() * lists.num_kv_blocks.div_ceil(32) as u64
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
        let lists = self.lists();
        lists.collect(&mut problems);
        if self.max_selected > lists.num_kv_blocks {
            problems.push(format!(
                "max_selected {}; allowed: 1 to {} KV units of {} tokens",
                self.max_selected, lists.num_kv_blocks, self.kv_block
            ));
        }
        for (name, tokens) in [("seqlen_q", self.seqlen_q), ("seqlen_kv", self.seqlen_kv)] {
            if tokens > Self::MAX_TOKENS {
                problems.push(format!("{name} {tokens}; allowed: 1 to {}", Self::MAX_TOKENS));
            }
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            problems
                .push(format!("scale {}; allowed: finite and above 0 (1: products are logits)", self.scale));
        }
        self.keep.collect(self.seqlen_kv, &mut problems);
        let q_lr = self.extent(self.seqlen_q).check("q_lr", q_lr, &mut problems);
        let k_lr = self.extent(self.seqlen_kv).check("k_lr", k_lr, &mut problems);
        if problems.is_empty() {
            Ok((q_lr, k_lr))
        } else {
            Err(Error::Plan { what: "kv_select_fine".to_string(), problems })
        }
    }
}

/// Device addresses of one fine selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FineArgs {
    /// bf16 [batch, seqlen_q, num_heads, rank], aligned to 16 bytes.
    pub q_lr: u64,
    /// bf16 [batch, seqlen_kv, num_heads, rank], aligned to 16 bytes.
    pub k_lr: u64,
    /// One number a head; what is out of range is clamped and raises the error flag. [`Budget::TopK`]: i32, KV units to
    /// keep, 0 to min(N, max_selected). [`Budget::TopP`]: f32, share of the predicted softmax mass over all units that the
    /// fewest units are to hold, 0 (none) to 1 (all units). Units kept by [`Keep`] come on top and do not count as mass.
    pub budget: u64,
    /// i32 [B, H, G, max_selected], written up to the count, where ids are wanted.
    pub q2k_index: Option<u64>,
    /// i32 [B, H, G], written.
    pub q2k_count: u64,
    /// u32 [B, H, G, ceil(N / 32)], written, where the compact form is wanted: bit n % 32 of word n / 32.
    pub bitmap: Option<u64>,
    /// f32 [B, H, G, N], written, where wanted; NaN as -inf, kept units as +inf.
    pub scores: Option<u64>,
    /// u32 [G, ceil(N / 32)], where further units are kept as those of [`Keep`] are, in every head: bit n % 32 of word n / 32.
    pub keep_mask: Option<u64>,
    /// i32, one element, where wanted: increased by the number of lists that max_selected cut below their share. Such a
    /// list holds the max_selected largest scores; only [`Budget::TopP`] cuts.
    pub capped: Option<u64>,
    /// i32, one element: the device error flag.
    pub error_flag: u64,
}

/// A checked fine selection with its kernel on the GPU.
#[derive(Clone, Debug)]
pub struct FinePlan {
    problem: FineProblem,
    q_lr: Layout,
    k_lr: Layout,
    groups_per_cta: u32,
    kernel: Arc<Kernel>,
}

impl FinePlan {
    pub(crate) fn new(
        problem: &FineProblem,
        q_lr: Layout,
        k_lr: Layout,
        kernel: Arc<Kernel>,
    ) -> Result<FinePlan, Error> {
        let (q_lr, k_lr) = problem.check(q_lr, k_lr)?;
        let FineProblem { rank, query_group, kv_block, group_rule, block_score, budget, .. } = *problem;
        let asked = (rank, query_group, kv_block, group_rule, block_score, budget);
        match kernel.spec() {
            KernelSpec::Select(s)
                if s.op() == SelectOp::Fine
                    && (
                        s.rank(),
                        s.query_group(),
                        s.kv_block(),
                        s.group_rule(),
                        s.block_score(),
                        s.budget(),
                    ) == asked =>
            {
                let groups_per_cta = s.tile().groups as u32;
                Ok(FinePlan { problem: *problem, q_lr, k_lr, groups_per_cta, kernel })
            }
            _ => Err(Error::Plan {
                what: "kv_select_fine".to_string(),
                problems: vec![format!(
                    "kernel {}; allowed: a kv_select_fine of rank {rank}, query_group {query_group}, kv_block {kv_block}, \
                     {group_rule}, {block_score}, {budget}",
                    kernel.name(),
                )],
            }),
        }
    }

    /// The problem.
    pub fn problem(&self) -> &FineProblem {
        &self.problem
    }

    /// The kernel.
    pub fn kernel(&self) -> &Arc<Kernel> {
        &self.kernel
    }

    /// Queues scores and the exact choice of every group; ids ascending, ties to the smaller id, the same bits every time.
    /// Allocates nothing, needs no workspace, waits for nothing, may be captured.
    ///
    /// # Safety
    /// Every address is device memory of the size and layout the plan was made for, until the work is done.
    ///
    /// # Errors
    /// A null or misaligned address, or what the driver answers.
    pub unsafe fn select(&self, stream: &Stream, args: &FineArgs) -> Result<(), Error> {
        aligned(&self.kernel, &[("q_lr", args.q_lr), ("k_lr", args.k_lr)], ALIGN_BYTES)?;
        let words = [("budget", args.budget), ("q2k_count", args.q2k_count), ("error_flag", args.error_flag)];
        aligned(&self.kernel, &words, 4)?;
        for (name, address) in [
            ("q2k_index", args.q2k_index),
            ("bitmap", args.bitmap),
            ("scores", args.scores),
            ("keep_mask", args.keep_mask),
            ("capped", args.capped),
        ] {
            if let Some(address) = address {
                aligned(&self.kernel, &[(name, address)], 4)?;
            }
        }
        let p = &self.problem;
        let shape = p.lists();
        let params = KvSelectFine {
            q_lr: self.q_lr.view(args.q_lr),
            k_lr: self.k_lr.view(args.k_lr),
            top_k: if p.budget == Budget::TopK { args.budget } else { 0 },
            top_p: if p.budget == Budget::TopP { args.budget } else { 0 },
            q2k_index: args.q2k_index.unwrap_or(0),
            q2k_count: args.q2k_count,
            bitmap: args.bitmap.unwrap_or(0),
            scores: args.scores.unwrap_or(0),
            keep_mask: args.keep_mask.unwrap_or(0),
            error_flag: args.error_flag,
            capped: args.capped.unwrap_or(0),
            batch: p.batch as i32,
            num_heads: p.num_heads as i32,
            seqlen_q: p.seqlen_q as i32,
            seqlen_kv: p.seqlen_kv as i32,
            num_groups: shape.num_groups as i32,
            num_kv_blocks: shape.num_kv_blocks as i32,
            max_selected: p.max_selected as i32,
            keep_first: p.keep.first as i32,
            keep_own: p.keep.own as i32,
            scale_log2: p.scale * std::f32::consts::LOG2_E,
        };
        let grid = [shape.num_groups.div_ceil(self.groups_per_cta), p.num_heads, p.batch];
        // SAFETY: the caller's promise; the parameters are those of kv_select_fine.
        unsafe { self.kernel.launch(stream, grid, self.kernel.max_smem_bytes(), &params) }
    }
}

/// A selection by either kernel, asked in the same words.
#[derive(Clone, Debug)]
pub enum Selection {
    /// `kv_select`: blocks of 64 tokens or more, whose scores lie in shared memory.
    Blocks(SelectPlan),
    /// `kv_select_fine`.
    Fine(FinePlan),
}

impl Selection {
    /// As [`SelectPlan::select`] or [`FinePlan::select`]. `kv_select` writes ids, and neither bits nor what was capped.
    ///
    /// # Safety
    /// Every address is device memory of the size and layout the plan was made for, until the work is done.
    ///
    /// # Errors
    /// A null or misaligned address, or what the driver answers.
    pub unsafe fn select(&self, stream: &Stream, args: &FineArgs) -> Result<(), Error> {
        match self {
            Selection::Blocks(plan) => {
                let lists = QueryLists { q2k_index: args.q2k_index.unwrap_or(0), q2k_count: args.q2k_count };
                let FineArgs { q_lr, k_lr, budget, scores, keep_mask, error_flag, .. } = *args;
                let args = SelectArgs { q_lr, k_lr, top_k: budget, lists, scores, keep_mask, error_flag };
                // SAFETY: the caller's promise.
                unsafe { plan.select(stream, &args) }
            }
            // SAFETY: the caller's promise.
            Selection::Fine(plan) => unsafe { plan.select(stream, args) },
        }
    }
}
