//! Attention: a plan is made once per problem and layout, then launched with addresses.

use crate::device::Stream;
use crate::error::Error;
use crate::kernels::Kernel;
use crate::layout::{ALIGN_BYTES, Extent, Layout, pair_of_rows_map};
use dsv_spec::params::{
    AttnBwd, AttnBwdDq, AttnBwdGather, AttnBwdPost, AttnBwdPostKv, AttnBwdPrep, AttnBwdViews, AttnFwd,
    AttnFwdGather, AttnFwdViews, AttnSizes,
};
use dsv_spec::{
    Arch, AttnOp, AttnSpec, AttnTile, Deterministic, Dtype, KernelSpec, Lists, Problem, Schedule, limits,
};
use std::ops::Range;
use std::sync::Arc;

/// Where the tensors of one attention call lie. Those of the backward are not looked at for `attn_fwd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttnLayouts {
    /// Q [batch, seqlen_q, num_heads, head_dim].
    pub q: Layout,
    /// K [batch, seqlen_kv, num_kv_heads, head_dim].
    pub k: Layout,
    /// V, as K.
    pub v: Layout,
    /// out, as Q.
    pub out: Layout,
    /// Gradient of out, as Q.
    pub d_out: Layout,
    /// Gradient of Q, as Q.
    pub dq: Layout,
    /// Gradient of K, as K.
    pub dk: Layout,
    /// Gradient of V, as K.
    pub dv: Layout,
}

impl AttnLayouts {
    /// Every tensor contiguous as [B, S, H, D].
    pub fn bshd(problem: &Problem) -> AttnLayouts {
        Self::each(problem, Layout::bshd)
    }

    /// Every tensor contiguous as [B, H, S, D].
    pub fn bhsd(problem: &Problem) -> AttnLayouts {
        Self::each(problem, Layout::bhsd)
    }

    fn each(p: &Problem, layout: fn(u32, u32, u32) -> Layout) -> AttnLayouts {
        let q = layout(p.seqlen_q, p.num_heads, p.head_dim as u32);
        let k = layout(p.seqlen_kv, p.num_kv_heads, p.head_dim as u32);
        AttnLayouts { q, k, v: k, out: q, d_out: q, dq: q, dk: k, dv: k }
    }

    /// Checks a problem and its layouts without a GPU, and gives the layouts with legal strides for dimensions of
    /// size 1.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem: sizes, list widths, strides.
    pub fn check(&self, problem: &Problem) -> Result<AttnLayouts, Error> {
        let p = problem;
        let mut problems = Vec::new();
        let sizes = [
            ("batch", p.batch, 65_535),
            ("num_heads", p.num_heads, 65_535),
            ("num_kv_heads", p.num_kv_heads, 65_535),
            ("seqlen_q", p.seqlen_q, i32::MAX as u32 - 255),
            ("seqlen_kv", p.seqlen_kv, i32::MAX as u32 - 255),
        ];
        for (name, value, most) in sizes {
            if value == 0 || value > most {
                problems.push(format!("{name} {value}; allowed: 1 to {most}"));
            }
        }
        if p.num_kv_heads > 0 && !p.num_heads.is_multiple_of(p.num_kv_heads) {
            problems.push(format!(
                "num_heads {} is no multiple of num_kv_heads {}; allowed: each KV head serves equally many heads",
                p.num_heads, p.num_kv_heads
            ));
        }
        if !matches!(p.op, AttnOp::Fwd | AttnOp::Bwd) {
            problems.push(format!("op {}; allowed: attn_fwd, or attn_bwd with all its kernels", p.op));
        }
        if problems.is_empty() && p.op == AttnOp::Bwd && statistics_rows(p) > i32::MAX as u64 {
            problems.push(format!(
                "batch {} x num_heads {} x {} padded query tokens = {} rows of attn_bwd; allowed: below 2^31",
                p.batch,
                p.num_heads,
                seqlen_q_padded(p),
                statistics_rows(p)
            ));
        }
        match p.lists {
            Lists::Dense if p.max_selected != 0 => {
                problems.push(format!("max_selected {} of a dense problem; allowed: 0", p.max_selected));
            }
            Lists::Dense => {}
            Lists::Blocks { .. } if p.max_selected == 0 => {
                problems.push("max_selected 0; allowed: at least 1, the width of the lists".to_string());
            }
            Lists::Blocks { .. } => {
                let slab = p.num_groups() as u64 * p.max_selected as u64;
                if slab > i32::MAX as u64 {
                    problems.push(format!(
                        "G {} x max_selected {} = {slab} list entries a head; allowed: below 2^31",
                        p.num_groups(),
                        p.max_selected
                    ));
                }
            }
        }
        let (q, kv) = (extent_q(p), extent_kv(p));
        let mut legal = *self;
        let mut tensors: Vec<(&str, Extent, &mut Layout)> = vec![
            ("q", q, &mut legal.q),
            ("k", kv, &mut legal.k),
            ("v", kv, &mut legal.v),
            ("out", q, &mut legal.out),
        ];
        if p.op == AttnOp::Bwd {
            tensors.extend([
                ("d_out", q, &mut legal.d_out),
                ("dq", q, &mut legal.dq),
                ("dk", kv, &mut legal.dk),
                ("dv", kv, &mut legal.dv),
            ]);
        }
        for (name, extent, layout) in tensors {
            *layout = extent.check(name, *layout, &mut problems);
        }
        if problems.is_empty() { Ok(legal) } else { Err(Error::Plan { what: what(p), problems }) }
    }
}

fn what(p: &Problem) -> String {
    format!("{} ({}, head_dim {})", p.op, p.dtype, p.head_dim)
}

fn extent_q(p: &Problem) -> Extent {
    let (batch, seqlen, heads) = (p.batch, p.seqlen_q, p.num_heads);
    Extent { batch, seqlen, heads, head_dim: p.head_dim as u32, dtype: p.dtype }
}

fn extent_kv(p: &Problem) -> Extent {
    let (batch, seqlen, heads) = (p.batch, p.seqlen_kv, p.num_kv_heads);
    Extent { batch, seqlen, heads, head_dim: p.head_dim as u32, dtype: p.dtype }
}

/// Query tokens rounded up to the backward's longest query tile.
pub(crate) fn seqlen_q_padded(p: &Problem) -> u32 {
    p.seqlen_q.next_multiple_of(limits::BWD_PADDING as u32)
}

/// Rows of the backward's `lse_log2` and `delta`.
fn statistics_rows(p: &Problem) -> u64 {
    p.batch as u64 * p.num_heads as u64 * seqlen_q_padded(p) as u64
}

/// Whether the backward takes KV blocks in the order of their lists' lengths.
fn ordered(p: &Problem) -> bool {
    !p.lists.is_dense() && !p.lists.is_gather()
}

/// Bytes of that order, i32 [B, Hkv, N].
fn order_bytes(p: &Problem) -> u64 {
    4 * p.batch as u64 * p.num_kv_heads as u64 * p.num_kv_blocks() as u64
}

/// Whether these kernels do: those of sm80 walk blocks as they come.
fn walks_in_order(p: &Problem, kernels: &BackwardKernels) -> bool {
    ordered(p) && kernels.main.spec().arch() == Arch::Sm90a
}

/// Byte offsets of the backward's workspace: f32 `lse_log2` and `delta` [B, H, seqlen_q_padded], where there are lists of KV
/// blocks their order, i32 [B, Hkv, N], then an f32 accumulator
/// where there is one: of dQ [B, H, seqlen_q_padded, D], with a word for each of [B, H] before it, the clock of the
/// CTAs of a `ring`, or with KV units below 64 tokens of dK and dV [B, Hkv, seqlen_kv rounded up to 64,
/// 2 * D]; each aligned to 256 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Workspace {
    pub(crate) delta: u64,
    pub(crate) order: u64,
    pub(crate) accumulator: u64,
    pub(crate) accumulator_bytes: u64,
    pub(crate) bytes: u64,
}

impl Workspace {
    /// A deterministic `attn_bwd` leaves dQ to another kernel, and accumulates none.
    pub(crate) fn of(p: &Problem, main: Deterministic) -> Workspace {
        let rows = statistics_rows(p);
        let statistics = (rows * 4).next_multiple_of(256);
        let summed = match AttnOp::ending(p.lists, main) {
            AttnOp::BwdPostKv => {
                let tokens = p.seqlen_kv.next_multiple_of(limits::BWD_BLOCK_M as u32) as u64;
                2 * p.batch as u64 * p.num_kv_heads as u64 * tokens
            }
            AttnOp::BwdPost => rows,
            _ => 0,
        };
        let accumulator_bytes = (summed * p.head_dim as u64 * 4).next_multiple_of(256);
        let clocks = match AttnOp::ending(p.lists, main) {
            AttnOp::BwdPost => (p.batch as u64 * p.num_heads as u64 * 4).next_multiple_of(256),
            _ => 0,
        };
        let order_bytes = if ordered(p) { order_bytes(p).next_multiple_of(256) } else { 0 };
        let accumulator = 2 * statistics + order_bytes + clocks;
        Workspace {
            delta: statistics,
            order: 2 * statistics,
            accumulator,
            accumulator_bytes,
            bytes: accumulator + accumulator_bytes,
        }
    }
}

/// Device addresses of the lists the forward reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryLists {
    /// i32 [B, H, G, max_selected]: KV blocks, ascending and unique.
    pub q2k_index: u64,
    /// i32 [B, H, G]: how many of them count.
    pub q2k_count: u64,
}

/// Device addresses of the inverted lists the backward reads (CSR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyLists {
    /// i32 [B, H, N + 1], relative to the (b, h) slab of `k2q_index`.
    pub k2q_offset: u64,
    /// i32 [B, H, G * max_selected]: groups, ascending within a KV block.
    pub k2q_index: u64,
}

/// Device addresses of one forward. Tensors lie as the plan's layouts say, aligned to 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FwdArgs {
    /// Q, input dtype.
    pub q: u64,
    /// K.
    pub k: u64,
    /// V.
    pub v: u64,
    /// out, written.
    pub out: u64,
    /// f32 [B, H, seqlen_q], written: natural log of the softmax's sum of scaled logits; -inf for empty rows.
    pub lse: u64,
    /// The lists; `None` exactly when the problem is dense.
    pub lists: Option<QueryLists>,
    /// i32, one element: the device error flag, see [`crate::decode_error_flag`]; the caller sets it to 0.
    pub error_flag: u64,
}

/// Device addresses of one backward. Tensors lie as the plan's layouts say, aligned to 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BwdArgs {
    /// Q, input dtype.
    pub q: u64,
    /// K.
    pub k: u64,
    /// V.
    pub v: u64,
    /// out of the forward.
    pub out: u64,
    /// f32 [B, H, seqlen_q]: LSE of the forward.
    pub lse: u64,
    /// Gradient of out.
    pub d_out: u64,
    /// f32 [B, H, seqlen_q]: gradient of LSE, where there is one.
    pub d_lse: Option<u64>,
    /// Gradient of Q, written.
    pub dq: u64,
    /// Gradient of K, written.
    pub dk: u64,
    /// Gradient of V, written.
    pub dv: u64,
    /// The inverted lists; needed exactly where [`AttnPlan::needs_key_lists`] says so, and else not looked at.
    pub lists: Option<KeyLists>,
    /// The lists the forward read; needed where there are lists and [`AttnPlan::needs_query_lists`] says so.
    pub query_lists: Option<QueryLists>,
    /// [`AttnPlan::workspace_bytes`] bytes, aligned to 256; contents are lost.
    pub workspace: u64,
    /// i32, one element: the device error flag.
    pub error_flag: u64,
}

/// The three kernels of the backward, in launch order.
#[derive(Clone, Debug)]
pub struct BackwardKernels {
    /// `attn_bwd_prep`.
    pub prep: Arc<Kernel>,
    /// `attn_bwd`: dK, dV, and, unless it is deterministic, the accumulator of dQ; with KV units below 64 tokens, dQ and
    /// the accumulator of dK and dV.
    pub main: Arc<Kernel>,
    /// What `main` leaves open, of the op [`AttnOp::ending`] names: `attn_bwd_dq` after a deterministic `attn_bwd`, else
    /// `attn_bwd_post` or `attn_bwd_post_kv` from the accumulator.
    pub ending: Arc<Kernel>,
}

/// The form of an attention kernel; of others, [`Deterministic::Yes`].
pub(crate) fn form(kernel: &Kernel) -> Deterministic {
    attn_spec(kernel).map_or(Deterministic::Yes, AttnSpec::deterministic)
}

/// A checked problem with its kernels on the GPU. [`AttnPlan::forward`] and [`AttnPlan::backward`] allocate nothing,
/// wait for nothing, and may be captured in a graph.
#[derive(Clone, Debug)]
pub struct AttnPlan {
    problem: Problem,
    layouts: AttnLayouts,
    sizes: AttnSizes,
    workspace: Workspace,
    forward: Arc<Kernel>,
    backward: Option<BackwardKernels>,
}

impl AttnPlan {
    /// Checks problem, layouts and kernels against each other. [`crate::Runtime::attention`] chooses the kernels; the
    /// tuner gives its own. The scale is 1 / sqrt(head_dim) unless given.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem.
    pub fn new(
        problem: &Problem,
        layouts: &AttnLayouts,
        scale: Option<f32>,
        forward: Arc<Kernel>,
        backward: Option<BackwardKernels>,
    ) -> Result<AttnPlan, Error> {
        let p = problem;
        let mut problems = Vec::new();
        let layouts = match layouts.check(p) {
            Ok(layouts) => layouts,
            Err(Error::Plan { problems: found, .. }) => {
                problems = found;
                *layouts
            }
            Err(other) => return Err(other),
        };
        let scale = scale.unwrap_or(1.0 / (p.head_dim as f32).sqrt());
        if !(scale.is_finite() && scale > 0.0) {
            problems.push(format!("scale {scale}; allowed: finite and positive"));
        }
        match (&backward, p.op) {
            (None, AttnOp::Bwd) => problems.push("no backward kernels for an attn_bwd problem".to_string()),
            (Some(b), _) => {
                serves(&b.prep, AttnOp::BwdPrep, p, &mut problems);
                serves(&b.main, AttnOp::Bwd, p, &mut problems);
                serves(&b.ending, AttnOp::ending(p.lists, form(&b.main)), p, &mut problems);
            }
            (None, _) => {}
        }
        serves(&forward, AttnOp::Fwd, p, &mut problems);
        if !problems.is_empty() {
            return Err(Error::Plan { what: what(p), problems });
        }
        let sizes = AttnSizes {
            batch: p.batch as i32,
            num_heads: p.num_heads as i32,
            num_kv_heads: p.num_kv_heads as i32,
            seqlen_q: p.seqlen_q as i32,
            seqlen_kv: p.seqlen_kv as i32,
            seqlen_q_padded: seqlen_q_padded(p) as i32,
            num_groups: p.num_groups() as i32,
            num_kv_blocks: p.num_kv_blocks() as i32,
            max_selected: p.max_selected as i32,
            scale,
            scale_log2: (scale as f64 * std::f64::consts::LOG2_E) as f32,
            reserved: 0,
        };
        let main = backward.as_ref().map_or(Deterministic::Yes, |b| form(&b.main));
        Ok(AttnPlan { problem: *p, layouts, sizes, workspace: Workspace::of(p, main), forward, backward })
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The forward's kernel.
    pub fn forward_kernel(&self) -> &Arc<Kernel> {
        &self.forward
    }

    /// The backward's kernels, where the problem is `attn_bwd`.
    pub fn backward_kernels(&self) -> Option<&BackwardKernels> {
        self.backward.as_ref()
    }

    /// Whether the backward reads [`BwdArgs::query_lists`]: it has lists, and its `attn_bwd` is deterministic or walks
    /// units below 64 tokens.
    pub fn needs_query_lists(&self) -> bool {
        let lists = self.problem.lists;
        !lists.is_dense()
            && self
                .backward
                .as_ref()
                .is_some_and(|b| lists.is_gather() || form(&b.main) == Deterministic::Yes)
    }

    /// Whether the backward reads [`BwdArgs::lists`]: it has lists, of units of at least 64 tokens.
    pub fn needs_key_lists(&self) -> bool {
        let lists = self.problem.lists;
        self.backward.is_some() && !lists.is_dense() && !lists.is_gather()
    }

    /// Where in the workspace a backward over lists leaves, i32 [B, Hkv, N], the KV blocks of every KV head, those that most groups
    /// list first: the order in which they are walked. Bytes; `None` where there is no such order.
    pub fn kv_order(&self) -> Option<Range<u64>> {
        let p = &self.problem;
        let kernels = self.backward.as_ref()?;
        let start = self.workspace.order;
        walks_in_order(p, kernels).then_some(start..start + order_bytes(p))
    }

    /// Bytes of workspace the backward needs; 0 for `attn_fwd`.
    pub fn workspace_bytes(&self) -> u64 {
        if self.backward.is_some() { self.workspace.bytes } else { 0 }
    }

    /// CTAs of a kernel that walks the keys of tiles of queries.
    fn grid_of_queries(&self, kernel: &Kernel) -> [u32; 3] {
        let p = &self.problem;
        let AttnTile { block_m, schedule, .. } = tile(kernel);
        let tiles = p.seqlen_q.div_ceil(block_m as u32);
        match schedule {
            Schedule::Persistent => {
                let all = tiles as u64 * p.num_heads as u64 * p.batch as u64;
                [all.min(kernel.resident_ctas() as u64) as u32, 1, 1]
            }
            Schedule::Grid | Schedule::Ring => [tiles, p.num_heads, p.batch],
        }
    }

    /// Queues out = softmax(scale Q K^T) V over the listed keys, and LSE.
    ///
    /// # Safety
    /// Every address is device memory of the size and layout the plan was made for, until the work is done.
    ///
    /// # Errors
    /// A null or misaligned address, lists where there should be none or the reverse, or what the driver answers.
    pub unsafe fn forward(&self, stream: &Stream, args: &FwdArgs) -> Result<(), Error> {
        let kernel = &self.forward;
        let check = Check { kernel, dense: self.problem.lists.is_dense() };
        let lists = check.lists("lists", args.lists)?.unwrap_or(QueryLists { q2k_index: 0, q2k_count: 0 });
        if args.lists.is_some() {
            check.words(&[("q2k_index", lists.q2k_index), ("q2k_count", lists.q2k_count)])?;
        }
        check.tensors(&[("q", args.q), ("k", args.k), ("v", args.v), ("out", args.out)])?;
        check.words(&[("lse", args.lse), ("error_flag", args.error_flag)])?;
        let (q, kv) = (extent_q(&self.problem), extent_kv(&self.problem));
        let AttnTile { block_n, .. } = tile(kernel);
        let box_rows = attn_spec(kernel).map_or(block_n, AttnSpec::kv_box_rows);
        let kv_map = |address, layout| match box_rows < block_n {
            true => kv.slab_map(address, layout, box_rows as u32),
            false => kv.tensor_map(address, layout, block_n as u32),
        };
        stream.bind()?;
        let p = &self.problem;
        let grid = self.grid_of_queries(kernel);
        let smem_bytes = kernel.facts().smem_bytes;
        if kernel.spec().arch() == Arch::Sm80 {
            let params = AttnFwdViews {
                q: self.layouts.q.view(args.q),
                k: self.layouts.k.view(args.k),
                v: self.layouts.v.view(args.v),
                o: self.layouts.out.view(args.out),
                lse: args.lse,
                q2k_index: lists.q2k_index,
                q2k_count: lists.q2k_count,
                error_flag: args.error_flag,
                sizes: self.sizes,
            };
            // SAFETY: the caller's promise; the parameters are those of attn_fwd on sm80.
            return unsafe { kernel.launch(stream, grid, smem_bytes, &params) };
        }
        if p.lists.is_gather() {
            let params = AttnFwdGather {
                map_q: q.tensor_map(args.q, &self.layouts.q, CONSUMER_ROWS)?,
                map_k: kv.tensor_map(args.k, &self.layouts.k, box_rows as u32)?,
                map_v: kv.tensor_map(args.v, &self.layouts.v, box_rows as u32)?,
                map_o: q.tensor_map(args.out, &self.layouts.out, CONSUMER_ROWS)?,
                k: self.layouts.k.view(args.k),
                v: self.layouts.v.view(args.v),
                lse: args.lse,
                q2k_index: lists.q2k_index,
                q2k_count: lists.q2k_count,
                error_flag: args.error_flag,
                sizes: self.sizes,
            };
            // SAFETY: the caller's promise; the parameters are those of attn_fwd with such lists.
            return unsafe { kernel.launch(stream, grid, smem_bytes, &params) };
        }
        let params = AttnFwd {
            map_q: q.tensor_map(args.q, &self.layouts.q, CONSUMER_ROWS)?,
            map_k: kv_map(args.k, &self.layouts.k)?,
            map_v: kv_map(args.v, &self.layouts.v)?,
            map_o: q.tensor_map(args.out, &self.layouts.out, CONSUMER_ROWS)?,
            lse: args.lse,
            q2k_index: lists.q2k_index,
            q2k_count: lists.q2k_count,
            error_flag: args.error_flag,
            sizes: self.sizes,
        };
        // SAFETY: the caller's promise; the parameters are those of attn_fwd.
        unsafe { kernel.launch(stream, grid, smem_bytes, &params) }
    }

    /// Queues dQ, dK and dV: three launches in stream order, and with KV units below 64 tokens a fill of the accumulator.
    ///
    /// # Safety
    /// As [`AttnPlan::forward`].
    ///
    /// # Errors
    /// As [`AttnPlan::forward`]; also a plan of `attn_fwd`.
    pub unsafe fn backward(&self, stream: &Stream, args: &BwdArgs) -> Result<(), Error> {
        let kernels = self.backward.as_ref().ok_or_else(|| Error::Argument {
            kernel: self.forward.name().to_string(),
            what: "plan",
            value: "one of attn_fwd".to_string(),
            allowed: "a plan whose problem has op attn_bwd".to_string(),
        })?;
        let check = Check { kernel: &kernels.main, dense: self.problem.lists.is_dense() };
        let gather = self.problem.lists.is_gather();
        let mut key = KeyLists { k2q_offset: 0, k2q_index: 0 };
        if !gather {
            key = check.lists("lists", args.lists)?.unwrap_or(key);
        }
        if self.needs_key_lists() {
            check.words(&[("k2q_offset", key.k2q_offset), ("k2q_index", key.k2q_index)])?;
        }
        let mut query = QueryLists { q2k_index: 0, q2k_count: 0 };
        if self.needs_query_lists() {
            query = check.lists("query_lists", args.query_lists)?.unwrap_or(query);
            check.words(&[("q2k_index", query.q2k_index), ("q2k_count", query.q2k_count)])?;
        }
        check.tensors(&[
            ("q", args.q),
            ("k", args.k),
            ("v", args.v),
            ("out", args.out),
            ("d_out", args.d_out),
            ("dq", args.dq),
            ("dk", args.dk),
            ("dv", args.dv),
            ("workspace", args.workspace),
        ])?;
        check.words(&[("lse", args.lse), ("error_flag", args.error_flag)])?;
        if let Some(d_lse) = args.d_lse {
            check.words(&[("d_lse", d_lse)])?;
        }
        let p = &self.problem;
        let (q, kv) = (extent_q(p), extent_kv(p));
        let layouts = &self.layouts;
        let lse_log2 = args.workspace;
        let delta = args.workspace + self.workspace.delta;
        let accumulator = args.workspace + self.workspace.accumulator;
        let ending = AttnOp::ending(p.lists, form(&kernels.main));
        let dq_accum = if ending == AttnOp::BwdPost { accumulator } else { 0 };
        let row_tiles = [seqlen_q_padded(p) / limits::BWD_BLOCK_M as u32, p.num_heads, p.batch];
        stream.bind()?;

        let ordered = walks_in_order(p, kernels);
        let kv_order = if ordered { args.workspace + self.workspace.order } else { 0 };
        let prep = AttnBwdPrep {
            o: layouts.out.view(args.out),
            d_o: layouts.d_out.view(args.d_out),
            lse: args.lse,
            d_lse: args.d_lse.unwrap_or(0),
            lse_log2,
            delta,
            dq_accum,
            k2q_offset: if ordered { key.k2q_offset } else { 0 },
            kv_order,
            sizes: self.sizes,
        };
        let block_n = tile(&kernels.main).block_n as u32;
        let kv_tiles = match ordered {
            true => p.num_kv_blocks() * (p.lists.block_size().1 as u32 / block_n),
            false => p.seqlen_kv.div_ceil(block_n),
        };
        let kv_tiles = [kv_tiles, p.num_kv_heads, p.batch];
        let smem_bytes = |kernel: &Kernel| kernel.facts().smem_bytes;
        // SAFETY: the caller's promise; the parameters are those of attn_bwd_prep, and the workspace holds what it
        // hands on.
        unsafe { kernels.prep.launch(stream, row_tiles, smem_bytes(&kernels.prep), &prep)? };
        if gather {
            // SAFETY: the accumulator lies in the workspace.
            unsafe { stream.fill(accumulator, 0, self.workspace.accumulator_bytes as usize)? };
            let block_m = tile(&kernels.main).block_m as u32;
            let box_rows = attn_spec(&kernels.main).map_or(0, AttnSpec::kv_box_rows) as u32;
            let main = AttnBwdGather {
                map_q: q.tensor_map(args.q, &layouts.q, block_m)?,
                map_do: q.tensor_map(args.d_out, &layouts.d_out, block_m)?,
                map_k: kv.tensor_map(args.k, &layouts.k, box_rows)?,
                map_v: kv.tensor_map(args.v, &layouts.v, box_rows)?,
                map_dq: q.tensor_map(args.dq, &layouts.dq, CONSUMER_ROWS)?,
                k: layouts.k.view(args.k),
                v: layouts.v.view(args.v),
                lse_log2,
                delta,
                dkv_accum: accumulator,
                q2k_index: query.q2k_index,
                q2k_count: query.q2k_count,
                error_flag: args.error_flag,
                sizes: self.sizes,
            };
            let post = AttnBwdPostKv {
                dk: layouts.dk.view(args.dk),
                dv: layouts.dv.view(args.dv),
                dkv_accum: accumulator,
                sizes: self.sizes,
            };
            let grid = [p.seqlen_q.div_ceil(block_m), p.num_heads, p.batch];
            let kv_tiles = [p.seqlen_kv.div_ceil(limits::BWD_BLOCK_M as u32), p.num_kv_heads, p.batch];
            // SAFETY: as above, of attn_bwd with such lists, and of attn_bwd_post_kv.
            return unsafe {
                kernels.main.launch(stream, grid, smem_bytes(&kernels.main), &main)?;
                kernels.ending.launch(stream, kv_tiles, smem_bytes(&kernels.ending), &post)
            };
        }
        let post = AttnBwdPost { dq: layouts.dq.view(args.dq), dq_accum, sizes: self.sizes };
        if kernels.main.spec().arch() == Arch::Sm80 {
            let main = AttnBwdViews {
                q: layouts.q.view(args.q),
                d_o: layouts.d_out.view(args.d_out),
                k: layouts.k.view(args.k),
                v: layouts.v.view(args.v),
                dk: layouts.dk.view(args.dk),
                dv: layouts.dv.view(args.dv),
                lse_log2,
                delta,
                dq_accum,
                k2q_offset: key.k2q_offset,
                k2q_index: key.k2q_index,
                error_flag: args.error_flag,
                sizes: self.sizes,
            };
            // SAFETY: as above, of attn_bwd on sm80, which accumulates dQ, and of attn_bwd_post.
            return unsafe {
                kernels.main.launch(stream, kv_tiles, smem_bytes(&kernels.main), &main)?;
                kernels.ending.launch(stream, row_tiles, smem_bytes(&kernels.ending), &post)
            };
        }
        let main = AttnBwd {
            map_q: q.tensor_map(args.q, &layouts.q, CONSUMER_ROWS)?,
            map_do: q.tensor_map(args.d_out, &layouts.d_out, CONSUMER_ROWS)?,
            map_k: kv.tensor_map(args.k, &layouts.k, block_n)?,
            map_v: kv.tensor_map(args.v, &layouts.v, block_n)?,
            map_dk: kv.tensor_map(args.dk, &layouts.dk, CONSUMER_ROWS)?,
            map_dv: kv.tensor_map(args.dv, &layouts.dv, CONSUMER_ROWS)?,
            map_rows: pair_of_rows_map(lse_log2, statistics_rows(p), self.workspace.delta)?,
            dq_accum,
            k2q_offset: key.k2q_offset,
            k2q_index: key.k2q_index,
            kv_order,
            error_flag: args.error_flag,
            sizes: self.sizes,
        };
        // SAFETY: as above, of attn_bwd.
        unsafe { kernels.main.launch(stream, kv_tiles, smem_bytes(&kernels.main), &main)? };
        let smem_bytes = smem_bytes(&kernels.ending);
        if ending == AttnOp::BwdDq {
            let AttnTile { block_n, .. } = tile(&kernels.ending);
            let dq = AttnBwdDq {
                map_q: main.map_q,
                map_do: main.map_do,
                map_k: kv.tensor_map(args.k, &layouts.k, block_n as u32)?,
                map_v: kv.tensor_map(args.v, &layouts.v, block_n as u32)?,
                map_dq: q.tensor_map(args.dq, &layouts.dq, CONSUMER_ROWS)?,
                lse_log2,
                delta,
                q2k_index: query.q2k_index,
                q2k_count: query.q2k_count,
                error_flag: args.error_flag,
                sizes: self.sizes,
            };
            let grid = self.grid_of_queries(&kernels.ending);
            // SAFETY: as above.
            unsafe { kernels.ending.launch(stream, grid, smem_bytes, &dq) }
        } else {
            // SAFETY: as above.
            unsafe { kernels.ending.launch(stream, row_tiles, smem_bytes, &post) }
        }
    }
}

/// Rows one consumer warpgroup loads or stores at once.
const CONSUMER_ROWS: u32 = 64;

fn attn_spec(kernel: &Kernel) -> Option<&AttnSpec> {
    match kernel.spec() {
        KernelSpec::Attn(spec) => Some(spec),
        _ => None,
    }
}

fn tile(kernel: &Kernel) -> AttnTile {
    attn_spec(kernel).expect("AttnPlan::new takes attention kernels only").tile()
}

/// Adds the reason why a kernel cannot serve as `op` of a problem, if there is one.
fn serves(kernel: &Kernel, op: AttnOp, p: &Problem, problems: &mut Vec<String>) {
    let lists = if op.is_of_any_lists() { Lists::Dense } else { p.lists };
    let wanted: (AttnOp, Dtype, u16, Lists) = (op, p.dtype, p.head_dim, lists);
    let fits = attn_spec(kernel).is_some_and(|s| {
        (s.op(), s.dtype(), s.head_dim(), s.lists()) == wanted && s.deterministic() >= p.deterministic
    });
    if !fits {
        let (query_group, kv_block) = lists.block_size();
        problems.push(format!(
            "kernel {}; allowed: one of {op}, {}, head_dim {}, query_group {query_group}, kv_block {kv_block}, {}",
            kernel.name(),
            p.dtype,
            p.head_dim,
            p.deterministic
        ));
    }
}

/// The checks of one launch's addresses.
struct Check<'a> {
    kernel: &'a Kernel,
    dense: bool,
}

impl Check<'_> {
    /// Lists exactly when the problem is not dense.
    fn lists<T>(&self, what: &'static str, lists: Option<T>) -> Result<Option<T>, Error> {
        if lists.is_none() == self.dense {
            return Ok(lists);
        }
        Err(Error::Argument {
            kernel: self.kernel.name().to_string(),
            what,
            value: if self.dense { "given to a dense problem" } else { "missing" }.to_string(),
            allowed: "lists exactly when the problem has block sizes".to_string(),
        })
    }

    fn tensors(&self, addresses: &[(&'static str, u64)]) -> Result<(), Error> {
        aligned(self.kernel, addresses, ALIGN_BYTES)
    }

    fn words(&self, addresses: &[(&'static str, u64)]) -> Result<(), Error> {
        aligned(self.kernel, addresses, 4)
    }
}

/// Refuses null and misaligned addresses.
pub(crate) fn aligned(kernel: &Kernel, addresses: &[(&'static str, u64)], to: u64) -> Result<(), Error> {
    match addresses.iter().find(|(_, address)| *address == 0 || !address.is_multiple_of(to)) {
        None => Ok(()),
        Some(&(what, address)) => Err(Error::Argument {
            kernel: kernel.name().to_string(),
            what,
            value: format!("{address:#x}"),
            allowed: format!("a device address that is a multiple of {to}"),
        }),
    }
}
