//! Low-rank predictors of the critical KV: one linear map per block from the hidden state that feeds
//! Q, K, V to `q_lr`, `k_lr`, trained beside the model and detached from it both ways; the lists selected
//! from their scores; the profile of the true attention.

use crate::config::Moments;
use crate::engine::{
    ArenaPlan, AttnShape, Buf, Engine, EngineError, Gemm, GemmLayout, GramLoss, GroupRule, KvSelect,
    ListShape, Lists, Profile, ProfiledLists, Rope, View,
};
use crate::params::{Init, Keeps, ParamId, ParamPlan, ParamSet};
use dsv_reference::lists::KvListsBuf;
use dsv_reference::select::bitmap;

/// What the predictors of a run look like.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct PredictorShape {
    /// Blocks.
    pub layers: usize,
    /// Elements of a low-rank head.
    pub d_lr: usize,
    /// Whether low-rank queries and keys are rotated.
    pub rope: bool,
    /// Query that decides for its group.
    pub rule: GroupRule,
    /// Whether a group lists its own tokens whatever is predicted.
    pub keep_own: bool,
    /// Window whose KV a group lists as well, whatever is predicted.
    pub keep_window: Option<KeptWindow>,
    /// Share of the softmax mass that counts as critical.
    pub theta: f32,
    /// Profiled queries.
    pub samples: usize,
    /// Size of the lists.
    pub lists: ListShape,
}

/// A 3D window around each group's centre query.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct KeptWindow {
    /// Its share of each side of the clip.
    pub side: f64,
    /// The most KV units that a group has within it: no head keeps fewer.
    pub widest: usize,
}

/// What the predictors do during a forward pass.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Default)]
pub struct PredictorTask {
    /// Compute the loss and add to the predictors' gradients.
    pub train: bool,
    /// Measure needed share, covered mass and recall.
    pub profile: bool,
}

/// Predictors of all blocks, their lists and measurements.
#[derive(Clone, Debug)]
pub struct Predictors {
    /// Shapes.
    pub shape: PredictorShape,
    /// Weights `[2 * H * d_lr, D]` of each block, and their own optimizer state.
    pub params: ParamSet,
    /// Mean loss, `[L,H]` `F32`.
    pub loss: Buf,
    /// Share of keys that hold theta of the mass, `[L,H]` `F32`.
    pub needed: Buf,
    /// Mass held by the predicted lists, `[L,H]` `F32`.
    pub covered: Buf,
    /// Share of the critical keys that its lists hold, `[layers * H]`, like `covered`.
    pub recall: Buf,
    /// Profiled tokens, `I32`.
    pub samples: Buf,
    /// KV blocks to keep, `[L,H]` `I32`.
    pub top_k: Buf,
    /// Cosines and sines `[S, d_lr/2]` `F32`, when rotated.
    pub rope_tables: Option<(Buf, Buf)>,
    /// Units within each group's window, a bit each, where a window is kept.
    pub keep_mask: Option<Buf>,
    /// List buffers that blocks can be given; the last one is shared by the profiles of dense blocks.
    pub slots: Vec<Lists>,
    weights: Vec<ParamId>,
    lowrank: Buf,
    d_lowrank: Buf,
    attn: AttnShape,
    dim: usize,
}

/// Buffers of predictors that the grids of a run share.
#[derive(Clone, Debug)]
pub struct Shared {
    params: ParamSet,
    weights: Vec<ParamId>,
    loss: Buf,
    needed: Buf,
    covered: Buf,
    recall: Buf,
}

/// Buffers of predictors that one grid of a run keeps from step to step.
#[derive(Copy, Clone, Debug)]
pub struct Kept {
    samples: Buf,
    top_k: Buf,
    rope_tables: Option<(Buf, Buf)>,
    keep_mask: Option<Buf>,
}

impl Predictors {
    /// Parameters of predictors, for counting.
    pub fn params(shape: &PredictorShape, dim: usize) -> (ParamPlan, Vec<ParamId>) {
        let mut plan = ParamPlan::default();
        let rows = 2 * shape.lists.heads * shape.d_lr;
        let std = (1.0 / dim as f32).sqrt();
        let ids = (0..shape.layers)
            .map(|l| plan.add(format!("predictor.{l}.weight"), &[rows, dim], Init::Normal(std), true))
            .collect();
        (plan, ids)
    }

    /// Bytes of one list slot.
    pub fn slot_bytes(shape: &PredictorShape, inverse: bool, arena: &ArenaPlan) -> usize {
        let mut probe = ArenaPlan::new(arena.precision());
        shape.lists.reserve(&mut probe, "lists", inverse);
        probe.total_bytes()
    }

    /// Lays out what all grids of a run share: weights, their optimizer and what is measured of every head.
    pub fn reserve_shared(shape: &PredictorShape, dim: usize, train: bool, plan: &mut ArenaPlan) -> Shared {
        let (params, weights) = Self::params(shape, dim);
        let per_head = shape.layers * shape.lists.heads;
        // Few: in full and on the device whatever the model's are.
        let keeps = Keeps { moments: train.then_some(Moments::Device), ema: None };
        Shared {
            params: params.reserve(plan, "predictors", keeps),
            weights,
            loss: plan.f32("predictors/loss", per_head),
            needed: plan.f32("predictors/needed", per_head),
            covered: plan.f32("predictors/covered", per_head),
            recall: plan.f32("predictors/recall", per_head),
        }
    }

    /// Lays out what the predictors of one grid keep from step to step.
    pub fn reserve_kept(shape: &PredictorShape, plan: &mut ArenaPlan) -> Kept {
        let ListShape { heads, seqlen, .. } = shape.lists;
        Kept {
            samples: plan.i32("predictors/samples", shape.samples),
            top_k: plan.i32("predictors/top_k", shape.layers * heads),
            rope_tables: shape.rope.then(|| {
                let len = seqlen * shape.d_lr / 2;
                (plan.f32("predictors/cos", len), plan.f32("predictors/sin", len))
            }),
            keep_mask: shape.keep_window.map(|_| {
                let words = shape.lists.groups() * shape.lists.kv_blocks().div_ceil(32);
                plan.i32("predictors/window", words)
            }),
        }
    }

    /// Lays out what the predictors of one grid use within a step, `slots + 1` list buffers among it.
    #[allow(clippy::too_many_arguments)]
    pub fn reserve(
        shape: PredictorShape,
        attn: AttnShape,
        dim: usize,
        (shared, kept): (Shared, Kept),
        slots: usize,
        inverse: bool,
        train: bool,
        plan: &mut ArenaPlan,
    ) -> Predictors {
        let ListShape { batch, heads, seqlen, .. } = shape.lists;
        let lowrank = batch * seqlen * 2 * heads * shape.d_lr;
        let Shared { params, weights, loss, needed, covered, recall } = shared;
        let Kept { samples, top_k, rope_tables, keep_mask } = kept;
        Predictors {
            params,
            weights,
            loss,
            needed,
            covered,
            recall,
            samples,
            top_k,
            rope_tables,
            keep_mask,
            slots: (0..=slots)
                .map(|i| shape.lists.reserve(plan, &format!("lists/slot {i}"), inverse))
                .collect(),
            lowrank: plan.act("predictors/low-rank", lowrank),
            d_lowrank: plan.act("predictors/low-rank gradient", if train { lowrank } else { 0 }),
            shape,
            attn,
            dim,
        }
    }

    /// Low-rank queries and keys of the block that ran last, and their gradient.
    pub(crate) fn scores(&self) -> [Buf; 2] {
        [self.lowrank, self.d_lowrank]
    }

    /// The slot that no block owns: profiles of dense blocks write their lists there.
    pub fn scratch_slot(&self) -> Lists {
        self.slots[self.slots.len() - 1]
    }

    /// Writes the constant tables; `windows` are the lists of the kept window, of one head.
    pub fn write_tables(
        &self,
        engine: &mut dyn Engine,
        positions: &[[u32; 3]],
        base: f64,
        windows: Option<&KvListsBuf>,
    ) -> Result<(), EngineError> {
        if let (Some(mask), Some(windows)) = (self.keep_mask, windows) {
            let bits: Vec<i32> = bitmap(windows).into_iter().map(|word| word as i32).collect();
            engine.write_i32(mask, &bits)?;
        }
        if let Some((cos, sin)) = self.rope_tables {
            let (c, s) = dsv_reference::layers::rope_tables(positions, self.shape.d_lr, base);
            engine.write_f32(cos, &c.iter().map(|&x| x as f32).collect::<Vec<_>>())?;
            engine.write_f32(sin, &s.iter().map(|&x| x as f32).collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Profiles block `l` after [`Predictors::observe`] and the block's attention: by the lists chosen for it, or those in the
    /// scratch slot where it attends to everything, and has made the LSE that saves a pass.
    pub fn profile(
        &self,
        engine: &mut dyn Engine,
        l: usize,
        (q, k): (View, View),
        lists: Option<Lists>,
        lse: Buf,
    ) {
        let heads = self.shape.lists.heads;
        let per_head = |buf: Buf| buf.slice(l * heads, heads);
        engine.profile(&Profile {
            shape: self.attn,
            q,
            k,
            samples: self.samples,
            lse: lists.is_none().then_some(lse),
            theta: self.shape.theta,
            needed: per_head(self.needed),
            lists: Some(ProfiledLists {
                lists: lists.unwrap_or(self.scratch_slot()),
                covered: per_head(self.covered),
                recall: per_head(self.recall),
            }),
        });
    }

    /// Runs block `l`'s predictor: scores from `hidden [B,S,D]`, then what `task` and `lists` ask for. `q`, `k` are
    /// the block's queries and keys after normalisation and RoPE. Returns the lists attention should use.
    pub fn observe(
        &self,
        engine: &mut dyn Engine,
        l: usize,
        hidden: Buf,
        (q, k): (View, View),
        task: PredictorTask,
        lists: Option<Lists>,
    ) -> Option<Lists> {
        if !task.train && !task.profile && lists.is_none() {
            return None;
        }
        let ListShape { batch, heads, seqlen, .. } = self.shape.lists;
        let d_lr = self.shape.d_lr;
        let (rows, width) = (batch * seqlen, 2 * heads * d_lr);
        let weight = self.params.copy_of(self.weights[l]);
        engine.gemm(&Gemm::new(GemmLayout::NT, rows, width, self.dim, hidden, weight, self.lowrank));
        let rope = self.rope_tables.map(|(cos, sin)| Rope {
            batch,
            seqlen,
            vectors: 2 * heads,
            dim: d_lr,
            cos,
            sin,
        });
        if let Some(rope) = &rope {
            engine.rope(rope, self.lowrank, false);
        }
        let per_head = |buf: Buf| buf.slice(l * heads, heads);
        if lists.is_some() || task.profile {
            engine.kv_select(&KvSelect {
                q_lr: View::packed(self.lowrank, 2, 0, seqlen, heads, d_lr),
                k_lr: View::packed(self.lowrank, 2, 1, seqlen, heads, d_lr),
                d_lr,
                top_k: per_head(self.top_k),
                rule: self.shape.rule,
                keep_own: self.shape.keep_own,
                keep_mask: self.keep_mask,
                lists: lists.unwrap_or(self.scratch_slot()),
            });
        }
        if task.train {
            engine.gram_loss(&GramLoss {
                shape: self.attn,
                d_lr,
                q,
                k,
                lowrank: self.lowrank,
                loss: per_head(self.loss),
                d_lowrank: self.d_lowrank,
                weight: 1.0,
            });
            if let Some(rope) = &rope {
                engine.rope(rope, self.d_lowrank, true);
            }
            let grad = self.params.grad_of(self.weights[l]);
            engine.gemm(
                &Gemm::new(GemmLayout::TN, width, self.dim, rows, self.d_lowrank, hidden, grad).accumulate(),
            );
        }
        lists
    }
}
