//! An engine that waits for every op and adds up what each took, by what it is for.

use crate::engine::{
    AdamW, ArenaPlan, AttnBwd, AttnFwd, AttnShape, Buf, DeviceFacts, Dims, Done, Engine, EngineError,
    Epilogue, FlowLoss, FlowPrepare, Gated, GatedGrad, Gemm, GradNorm, GramLoss, KvSelect, ListShape, MlpAct,
    NormMod, PatchShape, Precision, Profile, QkPrep, Rates, Rope, SparseCost, TextSelect, Transfers,
};
use serde::Serialize;
use std::time::Instant;

/// What an op of a block is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Attention of the video to itself.
    SelfAttention,
    /// Lists from low-rank scores, and their inverse.
    Selection,
    /// Low-rank scores, the predictors' loss, gradient and update.
    Predictors,
    /// Attention of the video to the text, without its products.
    CrossAttention,
    /// Matrix products.
    Products,
    /// Norms, rotations, activations, residuals, sums.
    Rows,
}

impl Part {
    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Part::SelfAttention => "self-attention",
            Part::Selection => "selection, inversion",
            Part::Predictors => "predictors",
            Part::CrossAttention => "cross-attention",
            Part::Products => "products",
            Part::Rows => "norms, activations, sums",
        }
    }
}

/// One kind of op in a pass.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpTime {
    /// What it is for.
    pub part: Part,
    /// Its name, and of products the sizes M x N x K.
    pub op: String,
    /// Calls a layer.
    pub calls: f64,
    /// Milliseconds a layer.
    pub ms: f64,
    /// FLOP a layer, of attention and products.
    pub flop: f64,
}

/// See the module's text.
pub(super) struct Timed<'a> {
    inner: &'a mut dyn Engine,
    /// The predictors' low-rank buffers, by which their products are known.
    scores: Option<[Buf; 2]>,
    /// What waiting takes where there is nothing to wait for.
    wait_ms: f64,
    /// Share of the query-key pairs that lists keep.
    kept: f64,
    ops: Vec<OpTime>,
    error: Option<EngineError>,
}

impl<'a> Timed<'a> {
    pub(super) fn new(inner: &'a mut dyn Engine, scores: Option<[Buf; 2]>, wait_ms: f64, kept: f64) -> Self {
        Timed { inner, scores, wait_ms, kept, ops: Vec::new(), error: None }
    }

    /// What was added up, or the first error.
    pub(super) fn finish(self) -> Result<Vec<OpTime>, EngineError> {
        self.error.map_or(Ok(self.ops), Err)
    }

    fn time(&mut self, part: Part, op: &str, flop: f64, run: impl FnOnce(&mut dyn Engine)) {
        let began = Instant::now();
        run(self.inner);
        if let Err(error) = self.inner.sync() {
            self.error.get_or_insert(error);
        }
        let ms = (1e3 * began.elapsed().as_secs_f64() - self.wait_ms).max(0.0);
        match self.ops.iter_mut().find(|o| o.part == part && o.op == op) {
            Some(o) => {
                o.calls += 1.0;
                o.ms += ms;
                o.flop += flop;
            }
            None => self.ops.push(OpTime { part, op: op.to_string(), calls: 1.0, ms, flop }),
        }
    }

    fn rows(&mut self, op: &str, run: impl FnOnce(&mut dyn Engine)) {
        self.time(Part::Rows, op, 0.0, run);
    }

    fn attention(&mut self, fwd: &AttnFwd, op: &str, factor: f64, run: impl FnOnce(&mut dyn Engine)) {
        let s = &fwd.shape;
        let pairs = [s.batch, s.heads, s.seqlen_q, s.seqlen_kv].iter().map(|&n| n as f64).product::<f64>();
        let kept = if fwd.lists.is_some() { self.kept } else { 1.0 };
        let part = if s.seqlen_q == s.seqlen_kv { Part::SelfAttention } else { Part::CrossAttention };
        let name = format!("{op} {}x{}", s.seqlen_q, s.seqlen_kv);
        self.time(part, &name, factor * pairs * s.head_dim as f64 * kept, run);
    }
}

impl DeviceFacts for Timed<'_> {
    fn name(&self) -> String {
        self.inner.name()
    }
    fn precision(&self) -> Precision {
        self.inner.precision()
    }
    fn needs_inverse_lists(&self) -> bool {
        self.inner.needs_inverse_lists()
    }
    fn deterministic(&self) -> bool {
        self.inner.deterministic()
    }
    fn scratch_bytes(&self, dims: &Dims) -> usize {
        self.inner.scratch_bytes(dims)
    }
    fn free_bytes(&self) -> Option<usize> {
        self.inner.free_bytes()
    }
    fn host_free_bytes(&self) -> Option<usize> {
        self.inner.host_free_bytes()
    }
    fn sparse_cost(&self, shape: &AttnShape, query_group: usize, kv_block: usize) -> Option<SparseCost> {
        self.inner.sparse_cost(shape, query_group, kv_block)
    }
    fn rates(&self) -> Option<Rates> {
        self.inner.rates()
    }
    fn attention_us(&self, shape: &AttnShape, lists: Option<(&ListShape, f64)>) -> Option<f64> {
        self.inner.attention_us(shape, lists)
    }
    fn dispatch_table(&self) -> Option<&dsv_spec::DispatchTable> {
        self.inner.dispatch_table()
    }
}

impl Engine for Timed<'_> {
    fn reserve(&mut self, plan: &ArenaPlan, dims: &Dims) -> Result<(), EngineError> {
        self.inner.reserve(plan, dims)
    }
    fn repeat(&mut self, _key: &[u32], work: &mut dyn FnMut(&mut dyn Engine)) {
        work(self);
    }
    fn sync(&mut self) -> Result<(), EngineError> {
        self.inner.sync()
    }
    fn write_f32(&mut self, buf: Buf, data: &[f32]) -> Result<(), EngineError> {
        self.inner.write_f32(buf, data)
    }
    fn write_i32(&mut self, buf: Buf, data: &[i32]) -> Result<(), EngineError> {
        self.inner.write_i32(buf, data)
    }
    fn read_f32(&mut self, buf: Buf) -> Result<Vec<f32>, EngineError> {
        self.inner.read_f32(buf)
    }
    fn read_i32(&mut self, buf: Buf) -> Result<Vec<i32>, EngineError> {
        self.inner.read_i32(buf)
    }

    fn offload(&mut self, from: Buf, to: Buf) -> Done {
        self.inner.offload(from, to)
    }
    fn fetch(&mut self, from: Buf, to: Buf) -> Done {
        self.inner.fetch(from, to)
    }
    fn after(&mut self, done: &Done) {
        self.rows("waits for copies", |e| e.after(done));
    }
    fn beside(&mut self, work: &mut dyn FnMut(&mut dyn Engine)) -> Done {
        self.inner.beside(work)
    }
    fn transfers(&mut self) -> Transfers {
        self.inner.transfers()
    }

    fn fill(&mut self, dst: Buf, value: f32) {
        self.rows("fill", |e| e.fill(dst, value));
    }
    fn copy(&mut self, src: Buf, dst: Buf) {
        self.rows("copy", |e| e.copy(src, dst));
    }
    fn axpy(&mut self, alpha: f32, x: Buf, y: Buf) {
        self.rows("axpy", |e| e.axpy(alpha, x, y));
    }
    fn add_rows(&mut self, rows: usize, a: Buf, b: Buf, out: Buf) {
        self.rows("add_rows", |e| e.add_rows(rows, a, b, out));
    }
    fn sum_rows(&mut self, rows: usize, src: Buf, dst: Buf) {
        let name = format!("sum_rows {rows}x{}", dst.len());
        self.rows(&name, |e| e.sum_rows(rows, src, dst));
    }
    fn gemm(&mut self, g: &Gemm) {
        let of_predictors = self.scores.is_some_and(|s| s.contains(&g.c) || s.contains(&g.a));
        let part = if of_predictors { Part::Predictors } else { Part::Products };
        let mut name = format!("{:?} {}x{}x{}", g.layout, g.m, g.n, g.k);
        let extra = [
            (g.bias.is_some(), " + bias"),
            (g.add.is_some(), " + residual"),
            (g.accumulate, " + itself"),
            (matches!(g.epilogue, Epilogue::Gelu { .. }), ", GELU"),
        ];
        extra.into_iter().filter(|x| x.0).for_each(|x| name.push_str(x.1));
        self.time(part, &name, 2.0 * g.m as f64 * g.n as f64 * g.k as f64, |e| e.gemm(g));
    }
    fn norm_mod_fwd(&mut self, args: &NormMod, out: Buf) {
        self.rows("norm_mod_fwd", |e| e.norm_mod_fwd(args, out));
    }
    fn norm_mod_bwd(&mut self, args: &NormMod, d_out: Buf, d_x: Buf, d_modulation: Buf) {
        self.rows("norm_mod_bwd", |e| e.norm_mod_bwd(args, d_out, d_x, d_modulation));
    }
    fn gate_weight(&mut self, args: &Gated, gated_weight: Buf, gated_bias: Buf) {
        self.rows("gate_weight", |e| e.gate_weight(args, gated_weight, gated_bias));
    }
    fn gate_grad(&mut self, args: &Gated, grad: &GatedGrad) {
        self.rows("gate_grad", |e| e.gate_grad(args, grad));
    }
    fn qk_prep_fwd(&mut self, args: &QkPrep, q: Buf, k: Buf) {
        self.rows("qk_prep_fwd", |e| e.qk_prep_fwd(args, q, k));
    }
    fn qk_prep_bwd(
        &mut self,
        args: &QkPrep,
        d_q: Buf,
        d_k: Buf,
        d_qkv: Buf,
        d_q_weight: Buf,
        d_k_weight: Buf,
    ) {
        self.rows("qk_prep_bwd", |e| e.qk_prep_bwd(args, d_q, d_k, d_qkv, d_q_weight, d_k_weight));
    }
    fn attn_fwd(&mut self, args: &AttnFwd) {
        self.attention(args, "attn_fwd", 4.0, |e| e.attn_fwd(args));
    }
    fn attn_bwd(&mut self, args: &AttnBwd) {
        self.attention(&args.fwd, "attn_bwd", 10.0, |e| e.attn_bwd(args));
    }
    fn mlp_act_fwd(&mut self, act: MlpAct, rows: usize, hidden: usize, pre: Buf, out: Buf) {
        self.rows("mlp_act_fwd", |e| e.mlp_act_fwd(act, rows, hidden, pre, out));
    }
    fn mlp_act_bwd(&mut self, act: MlpAct, rows: usize, hidden: usize, pre: Buf, out: Buf, d_bias: Buf) {
        self.rows("mlp_act_bwd", |e| e.mlp_act_bwd(act, rows, hidden, pre, out, d_bias));
    }
    fn silu_fwd(&mut self, x: Buf, out: Buf) {
        self.rows("silu_fwd", |e| e.silu_fwd(x, out));
    }
    fn silu_bwd(&mut self, x: Buf, d_out: Buf, d_x: Buf) {
        self.rows("silu_bwd", |e| e.silu_bwd(x, d_out, d_x));
    }
    fn time_embed(&mut self, t: Buf, width: usize, out: Buf) {
        self.rows("time_embed", |e| e.time_embed(t, width, out));
    }
    fn flow_prepare(&mut self, args: &FlowPrepare) {
        self.rows("flow_prepare", |e| e.flow_prepare(args));
    }
    fn flow_loss(&mut self, args: &FlowLoss) {
        self.rows("flow_loss", |e| e.flow_loss(args));
    }
    fn normal(&mut self, keys: Buf, dst: Buf) {
        self.rows("normal", |e| e.normal(keys, dst));
    }
    fn unpatchify(&mut self, shape: &PatchShape, order: Buf, tokens: Buf, latents: Buf) {
        self.rows("unpatchify", |e| e.unpatchify(shape, order, tokens, latents));
    }
    fn text_select_fwd(&mut self, args: &TextSelect, text: Buf, null: Buf, out: Buf) {
        self.rows("text_select_fwd", |e| e.text_select_fwd(args, text, null, out));
    }
    fn text_select_bwd(&mut self, args: &TextSelect, d_out: Buf, d_null: Buf) {
        self.rows("text_select_bwd", |e| e.text_select_bwd(args, d_out, d_null));
    }
    fn rope(&mut self, args: &Rope, x: Buf, inverse: bool) {
        self.time(Part::Predictors, "rope", 0.0, |e| e.rope(args, x, inverse));
    }
    fn kv_select(&mut self, args: &KvSelect) {
        self.time(Part::Selection, "kv_select", 0.0, |e| e.kv_select(args));
    }
    fn gram_loss(&mut self, args: &GramLoss) {
        self.time(Part::Predictors, "gram_loss", 0.0, |e| e.gram_loss(args));
    }
    fn profile(&mut self, args: &Profile) {
        self.time(Part::Predictors, "profile", 0.0, |e| e.profile(args));
    }
    fn grad_norm(&mut self, args: &GradNorm) {
        self.time(Part::Predictors, "grad_norm", 0.0, |e| e.grad_norm(args));
    }
    fn adamw(&mut self, args: &AdamW) {
        self.time(Part::Predictors, "adamw", 0.0, |e| e.adamw(args));
    }
    fn ema(&mut self, decay: f32, master: Buf, ema: Buf) {
        self.rows("ema", |e| e.ema(decay, master, ema));
    }
}
