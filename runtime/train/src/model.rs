//! The video DiT: patch embedding, AdaLN-single on the timestep, blocks of self-attention, cross-attention
//! and MLP, and a modulated linear head. Each part's forward and backward is written once, on the ops of
//! [`Engine`].
//!
//! A block keeps its input, its self-attention output, log-sum-exp and lists (of which outputs and lists may go to the host
//! and come back, [`Purposes::kept_sets`]); the rest is recomputed in the
//! backward (or kept, with `recompute = false`), but for what no gradient needs: the gates of the residuals are folded into
//! the weights before them, so the products' outputs are not wanted again ([`Engine::gate_grad`]), and the MLP's activation
//! is made in the pass that takes its gradient. Attention and selection never run twice for one step.

use crate::config::{self, Config, Mlp};
use crate::engine::{
    ArenaPlan, AttnBwd, AttnFwd, AttnShape, Buf, Dims, Done, Engine, EngineError, FlowLoss, FlowPrepare,
    Gated, GatedGrad, Gemm, GemmLayout, GradNorm, ListShape, Lists, MlpAct, NormMod, PatchShape, QkPrep,
    Space, TextSelect, View,
};
use crate::params::{Init, Keeps, Linear, ParamId, ParamPlan, ParamSet};
use crate::predictor::{self, KeptWindow, PredictorShape, PredictorTask, Predictors};
use crate::rng::Purpose;
use dsv_reference::lists::KvListsBuf;
use dsv_spec::order::{Cube, Grid, token_order};

/// Width of the sinusoidal timestep embedding.
pub const TIME_WIDTH: usize = 256;

/// Everything about a model that decides its buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// Blocks.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Activation of the MLP.
    pub mlp: MlpAct,
    /// Columns of the MLP's output of the activation.
    pub hidden: usize,
    /// Width of a text token.
    pub text_dim: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// Copies of a clip's text tokens; each serves as many of its video tokens, as if it were a clip of its own. A backward has
    /// a CTA for each tile of keys, and one text is one tile.
    pub text_copies: usize,
    /// Latents, patches and batch.
    pub patch: PatchShape,
    /// Epsilon of the norms.
    pub eps: f32,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// First value of the gains of QK RMSNorm.
    pub qk_gain: f32,
    /// The cube whose tokens are contiguous.
    pub cube: Cube,
    /// Predictors, when the run has them.
    pub predictor: Option<PredictorShape>,
    /// Windows, when the run attends within them.
    pub window: Option<WindowShape>,
}

/// CTAs up to which the cross-attention's backward is spread out: what the smallest of the GPUs served runs at a time.
const CROSS_CTAS: usize = 132;
/// Video tokens that a copy of the text serves, at least.
const CROSS_TOKENS: usize = 512;

/// For this many clips, heads and video tokens: the most, a power of two.
fn text_copies(batch: usize, heads: usize, tokens: usize) -> usize {
    let fits = |copies: usize| {
        batch * heads * copies <= CROSS_CTAS
            && tokens.is_multiple_of(copies)
            && tokens / copies >= CROSS_TOKENS
    };
    (1..=4).map(|i| 1 << i).take_while(|&copies| fits(copies)).last().unwrap_or(1)
}

/// 3D windows as KV lists: the same in every block, head and batch element.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct WindowShape {
    /// Share of each side of the clip that a window spans.
    pub side: f64,
    /// Size of the lists.
    pub lists: ListShape,
    /// Share of the query-key pairs that they keep.
    pub kept: f64,
}

impl ModelShape {
    /// The shape a configuration describes, for this batch.
    pub fn from_config(config: &Config, batch: usize) -> ModelShape {
        let (m, d) = (&config.model, &config.dsv);
        let patch = PatchShape {
            batch,
            channels: m.latent_channels,
            latent: [config.data.frames, config.data.height, config.data.width],
            patch: m.patch,
        };
        let mut shape = ModelShape {
            layers: m.layers,
            heads: m.heads,
            head_dim: m.head_dim,
            mlp: match m.mlp {
                Mlp::Geglu => MlpAct::GeGlu,
                Mlp::Gelu => MlpAct::Gelu,
            },
            hidden: m.mlp_ratio * m.heads * m.head_dim,
            text_dim: m.text_dim,
            text_tokens: m.text_tokens,
            text_copies: text_copies(batch, m.heads, patch.tokens()),
            patch,
            eps: m.norm_eps as f32,
            rope_base: m.rope_base,
            qk_gain: m.qk_gain as f32,
            cube: config.first_cube(),
            window: None,
            predictor: d.attention.predicts().then(|| PredictorShape {
                layers: m.layers,
                d_lr: d.rank,
                rope: d.predictor_rope,
                rule: d.group_rule.into(),
                keep_own: d.keep_own,
                keep_window: None,
                theta: d.theta as f32,
                samples: d.profile_queries.min(patch.tokens()),
                lists: ListShape {
                    batch,
                    heads: m.heads,
                    seqlen: patch.tokens(),
                    query_group: d.query_group,
                    kv_block: d.kv_block,
                    max_selected: config.max_selected(),
                },
            }),
        };
        shape.keep_window(d.keep_window);
        shape.window = d.attention.window().map(|side| {
            let lists = shape.window_lists(side, d.query_group, d.kv_block);
            WindowShape {
                side,
                lists: ListShape {
                    batch,
                    heads: m.heads,
                    seqlen: patch.tokens(),
                    query_group: d.query_group,
                    kv_block: d.kv_block,
                    max_selected: lists.dims.max_selected,
                },
                kept: lists.kept_fraction(),
            }
        });
        shape
    }
    /// Notes the window of this side that groups list whatever is predicted.
    fn keep_window(&mut self, side: Option<f64>) {
        let Some(ListShape { query_group, kv_block, .. }) = self.predictor.map(|p| p.lists) else { return };
        let widest = |side| self.window_lists(side, query_group, kv_block).dims.max_selected;
        let kept = side.map(|side| KeptWindow { side, widest: widest(side) });
        if let Some(p) = &mut self.predictor {
            p.keep_window = kept;
        }
    }

    /// Lists of one head: each group lists the KV blocks that hold a key of the window around its centre query.
    fn window_lists(&self, side: f64, query_group: usize, kv_block: usize) -> KvListsBuf {
        let (order, _) = self.token_order();
        KvListsBuf::window(1, 1, query_group, kv_block, self.grid(), &order, [side; 3])
    }
    /// Tokens along time, height and width.
    pub fn grid(&self) -> Grid {
        let [t, h, w] = self.patch.grid().map(|x| x as u32);
        Grid { t, h, w }
    }
    /// Width of the model.
    pub fn dim(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Batch times video tokens.
    pub fn rows(&self) -> usize {
        self.patch.batch * self.patch.tokens()
    }
    /// Sizes of the self-attention.
    pub fn self_attn(&self) -> AttnShape {
        AttnShape {
            batch: self.patch.batch,
            heads: self.heads,
            seqlen_q: self.patch.tokens(),
            seqlen_kv: self.patch.tokens(),
            head_dim: self.head_dim,
            scale: (self.head_dim as f32).powf(-0.5),
        }
    }
    /// Sizes of the cross-attention: a batch of every copy of the text and the video tokens it serves.
    pub fn cross_attn(&self) -> AttnShape {
        self.self_attn().to_text(self.text_tokens, self.text_copies)
    }
    /// Batch times text tokens, copies included.
    fn copied_text_rows(&self) -> usize {
        self.patch.batch * self.text_copies * self.text_tokens
    }
    /// What an engine sizes its scratch by.
    pub fn dims(&self, params: usize) -> Dims {
        Dims {
            batch: self.patch.batch,
            seqlen: self.patch.tokens(),
            text_tokens: self.text_tokens,
            text_copies: self.text_copies,
            dim: self.dim(),
            heads: self.heads,
            head_dim: self.head_dim,
            d_lr: self.predictor.map_or(0, |p| p.d_lr),
            mlp_width: self.mlp.pre_width(self.hidden),
            samples: self.predictor.map_or(0, |p| p.samples),
            params,
            lists: self.predictor.map(|p| p.lists).or(self.window.map(|w| w.lists)),
        }
    }
    /// Contract order: raster patch index of each token, and (t, h, w) of each token.
    pub fn token_order(&self) -> (Vec<u32>, Vec<[u32; 3]>) {
        let grid = self.grid();
        let order = token_order(grid, self.cube);
        let positions = order
            .iter()
            .map(|&r| {
                let (t, h, w) = grid.coordinates(r);
                [t, h, w]
            })
            .collect();
        (order, positions)
    }
    /// Every parameter of the model.
    pub fn params(&self) -> (ParamPlan, Weights) {
        let mut p = ParamPlan::default();
        let dim = self.dim();
        let std = |inputs: usize| (1.0 / inputs as f32).sqrt();
        let table = Init::Normal(std(dim));
        let gain = Init::Constant(self.qk_gain);
        let width = self.patch.width();
        let weights = Weights {
            patch: p.linear("patch", dim, width, std(width)),
            time_in: p.linear("time.in", dim, TIME_WIDTH, std(TIME_WIDTH / 2)),
            time_out: p.linear("time.out", dim, dim, std(dim)),
            adaln: p.linear("adaln", 6 * dim, dim, 0.02),
            text_in: p.linear("text.in", dim, self.text_dim, std(self.text_dim)),
            text_out: p.linear("text.out", dim, dim, std(dim)),
            null: p.add("text.null".into(), &[self.text_tokens, self.text_dim], Init::Normal(0.02), false),
            blocks: (0..self.layers)
                .map(|l| BlockWeights {
                    table: p.add(format!("block.{l}.table"), &[6, dim], table, false),
                    qkv: p.linear(&format!("block.{l}.qkv"), 3 * dim, dim, std(dim)),
                    q_norm: p.add(format!("block.{l}.q_norm"), &[self.head_dim], gain, false),
                    k_norm: p.add(format!("block.{l}.k_norm"), &[self.head_dim], gain, false),
                    o: p.linear(&format!("block.{l}.o"), dim, dim, std(dim)),
                    cq: p.linear(&format!("block.{l}.cross.q"), dim, dim, std(dim)),
                    ckv: p.linear(&format!("block.{l}.cross.kv"), 2 * dim, dim, std(dim)),
                    co: p.linear(&format!("block.{l}.cross.o"), dim, dim, 0.0),
                    up: p.linear(&format!("block.{l}.up"), self.mlp.pre_width(self.hidden), dim, std(dim)),
                    down: p.linear(&format!("block.{l}.down"), dim, self.hidden, std(self.hidden)),
                })
                .collect(),
            final_mod: p.linear("final.mod", 2 * dim, dim, 0.02),
            head: p.linear("final.head", width, dim, 0.0),
        };
        (p, weights)
    }
}

/// Parameters of one block.
#[derive(Clone, Debug)]
pub struct BlockWeights {
    /// `[6, D]`, added to the shared modulation.
    pub table: ParamId,
    /// Packed Q, K, V projection.
    pub qkv: Linear,
    /// RMS weight of Q.
    pub q_norm: ParamId,
    /// RMS weight of K.
    pub k_norm: ParamId,
    /// Output projection of the self-attention.
    pub o: Linear,
    /// Query projection of the cross-attention.
    pub cq: Linear,
    /// Packed K, V projection of the cross-attention.
    pub ckv: Linear,
    /// Output projection of the cross-attention.
    pub co: Linear,
    /// First MLP projection.
    pub up: Linear,
    /// Second MLP projection.
    pub down: Linear,
}

/// Parameters of the whole model.
#[derive(Clone, Debug)]
pub struct Weights {
    /// Patch embedding.
    pub patch: Linear,
    /// Timestep MLP, first map.
    pub time_in: Linear,
    /// Timestep MLP, second map.
    pub time_out: Linear,
    /// Shared modulation, `D -> 6 D`.
    pub adaln: Linear,
    /// Text projection, first map.
    pub text_in: Linear,
    /// Text projection, second map.
    pub text_out: Linear,
    /// Learned embedding of "no caption".
    pub null: ParamId,
    /// Blocks.
    pub blocks: Vec<BlockWeights>,
    /// Modulation of the head, `D -> 2 D`.
    pub final_mod: Linear,
    /// Head, `D -> patch width`.
    pub head: Linear,
}

/// Inputs of a pass, written by the host, and the pass's results.
#[derive(Copy, Clone, Debug)]
pub struct Io {
    /// Latents `[B,C,T,H,W]` `F32`.
    pub latents: Buf,
    /// Times `[B]` `F32`.
    pub t: Buf,
    /// Noise keys `[B,2]` `I32`.
    pub keys: Buf,
    /// Text embeddings `[B,Lt,text_dim]` `Act`.
    pub text: Buf,
    /// Dropped captions `[B]` `I32`.
    pub drop: Buf,
    /// Token order `[S]` `I32`.
    pub order: Buf,
    /// RoPE cosines `[S, head_dim/2]` `F32`.
    pub cos: Buf,
    /// RoPE sines.
    pub sin: Buf,
    /// Noised tokens `[B,S,width]` `Act`.
    pub x_t: Buf,
    /// Target velocity `[B,S,width]` `F32`.
    pub target: Buf,
    /// Predicted velocity `[B,S,width]` `Act`.
    pub pred: Buf,
    /// Loss of each batch element, `[B]` `F32`.
    pub loss: Buf,
    /// The sampler's guided velocities, `[B,S,width]` `F32` each.
    pub velocity: [Buf; 2],
}

/// Conditioning: timestep and text, shared by all blocks.
#[derive(Copy, Clone, Debug)]
struct Cond {
    time: Buf,
    time_pre: Buf,
    time_act: Buf,
    temb: Buf,
    temb_act: Buf,
    shared: Buf,
    final_mod: Buf,
    text: Buf,
    text_pre: Buf,
    text_act: Buf,
    y: Buf,
    /// `[B, copies, text tokens, width]`
    copies: Buf,
}

/// What a block keeps from forward to backward.
#[derive(Copy, Clone, Debug)]
struct Saved {
    x: Buf,
    attn: Buf,
    lse: Buf,
}

/// Intermediates of one block, shared by all blocks when they are recomputed.
#[derive(Copy, Clone, Debug)]
struct Work {
    modulation: Buf,
    n1: Buf,
    mean1: Buf,
    rstd1: Buf,
    qkv: Buf,
    q: Buf,
    k: Buf,
    q_rstd: Buf,
    k_rstd: Buf,
    x1: Buf,
    cq: Buf,
    ckv: Buf,
    ca: Buf,
    ca_lse: Buf,
    x2: Buf,
    n2: Buf,
    mean2: Buf,
    rstd2: Buf,
    up: Buf,
}

/// Used and free again within one part of a block: the MLP's activation (or, until the backward has made it anew, its
/// gradient), and weights with their gate folded in.
#[derive(Copy, Clone, Debug)]
struct Passing {
    act: Buf,
    gated_weight: Buf,
    gated_bias: Buf,
}

/// Gradients on their way back.
#[derive(Copy, Clone, Debug)]
struct Back {
    pred: Buf,
    x: Buf,
    a: Buf,
    b: Buf,
    q: Buf,
    k: Buf,
    qkv: Buf,
    ckv: Buf,
    /// Sum over tokens of a gated map's output gradient times its input, and of the former alone.
    gate_product: Buf,
    gate_sum: Buf,
    modulation: Buf,
    copies: Buf,
    y: Buf,
    y_act: Buf,
    text_act: Buf,
    text: Buf,
    shared: Buf,
    shared_act: Buf,
    final_mod: Buf,
    final_mod_act: Buf,
    temb: Buf,
    temb_b: Buf,
}

/// How the self-attention of each block runs.
#[derive(Copy, Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockAttention {
    /// Over all keys.
    Dense,
    /// Over the lists of [`ModelShape::window`].
    Window,
    /// Over predicted lists, kept in this slot of [`Predictors::slots`].
    Sparse {
        /// Which slot.
        slot: usize,
    },
}

/// What a model is laid out for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Purposes {
    /// Gradients, moments and backward buffers.
    pub train: bool,
    /// Recompute block intermediates rather than keeping them.
    pub recompute: bool,
    /// What AdamW's moments of the weights are kept as, when they are trained.
    pub moments: config::Moments,
    /// Where averaged weights lie, when the run keeps them.
    pub ema: Option<Space>,
    /// Blocks that can be sparse at one time.
    pub list_slots: usize,
    /// How many blocks' attention outputs and predicted lists are on the device at a time, 2 and more; those of the others
    /// are copied to the host in the forward and back ahead of their backward. `None` = every block's.
    pub kept_sets: Option<usize>,
    /// Whether lists need their inverse ([`crate::engine::DeviceFacts::needs_inverse_lists`]).
    pub inverse_lists: bool,
}

impl Purposes {
    /// Forward passes of weights that are given.
    pub const INFERENCE: Purposes = Purposes {
        train: false,
        recompute: true,
        moments: config::Moments::Device,
        ema: None,
        list_slots: 0,
        kept_sets: None,
        inverse_lists: false,
    };
}

/// What blocks keep where only some blocks' is on the device: block `l` uses set `l % sets.len()`.
#[derive(Clone, Debug)]
struct Shelf {
    sets: Vec<ShelfSet>,
    /// For every block but the last ones, whose sets nobody overwrites: host copies of a set's buffers.
    host: Vec<ShelfCopy>,
}

/// An attention output and predicted lists, where the model has predictors.
#[derive(Clone, Debug)]
struct ShelfSet {
    attn: Buf,
    lists: Option<Lists>,
}

/// The same on the host.
#[derive(Clone, Debug)]
struct ShelfCopy {
    attn: Buf,
    lists: Vec<Buf>,
}

impl Shelf {
    fn reserve(shape: &ModelShape, sets: usize, inverse: bool, plan: &mut ArenaPlan) -> Shelf {
        let sets: Vec<ShelfSet> = (0..sets)
            .map(|i| ShelfSet {
                attn: plan.act("kept per block/attention output", shape.rows() * shape.dim()),
                lists: shape.predictor.map(|p| p.lists.reserve(plan, &format!("lists/set {i}"), inverse)),
            })
            .collect();
        let host = (0..shape.layers.saturating_sub(sets.len()))
            .map(|l| {
                let set = &sets[l % sets.len()];
                let lists = set.lists.iter().flat_map(Lists::buffers);
                ShelfCopy {
                    attn: plan.on_host("kept per block/attention output", set.attn),
                    lists: lists.map(|buf| plan.on_host("lists/kept", buf)).collect(),
                }
            })
            .collect();
        Shelf { sets, host }
    }

    fn set(&self, l: usize) -> &ShelfSet {
        &self.sets[l % self.sets.len()]
    }

    /// Pairs of device and host buffers that a block of this mode has there; none of the last blocks'.
    fn copies(&self, l: usize, mode: BlockAttention) -> Vec<(Buf, Buf)> {
        let Some(host) = self.host.get(l) else { return Vec::new() };
        let set = self.set(l);
        let mut copies = vec![(set.attn, host.attn)];
        if let (BlockAttention::Sparse { .. }, Some(lists)) = (mode, &set.lists) {
            copies.extend(lists.buffers().into_iter().zip(host.lists.iter().copied()));
        }
        copies
    }

    /// After block `l`'s forward: its set goes to the host.
    fn leave(&self, e: &mut dyn Engine, l: usize, mode: BlockAttention) -> Done {
        let copies = self.copies(l, mode).into_iter();
        copies.map(|(device, host)| e.offload(device, host)).last().unwrap_or_default()
    }

    /// Once no op that is queued needs its set any more: block `l`'s comes back.
    fn return_to(&self, e: &mut dyn Engine, l: usize, mode: BlockAttention) -> Done {
        let copies = self.copies(l, mode).into_iter();
        copies.map(|(device, host)| e.fetch(host, device)).last().unwrap_or_default()
    }
}

/// The laid-out model: handles only, no memory.
#[derive(Clone, Debug)]
pub struct Model {
    /// Shapes.
    pub shape: ModelShape,
    /// Parameters.
    pub params: ParamSet,
    /// Predictors, when the run has them.
    pub predictors: Option<Predictors>,
    /// Lists of the windows, when the run has them.
    window: Option<Lists>,
    /// Inputs and results.
    pub io: Io,
    weights: Weights,
    cond: Cond,
    saved: Vec<Saved>,
    shelf: Option<Shelf>,
    last: Buf,
    final_norm: [Buf; 3],
    work: Vec<Work>,
    passing: Passing,
    back: Option<Back>,
    purposes: Purposes,
}

/// What the model keeps of one grid from step to step.
struct KeptOfGrid {
    shape: ModelShape,
    order: Buf,
    cos: Buf,
    sin: Buf,
    window: Option<Lists>,
    predictors: Option<predictor::Kept>,
}

impl KeptOfGrid {
    fn reserve(shape: ModelShape, purposes: Purposes, plan: &mut ArenaPlan) -> KeptOfGrid {
        let (s, half) = (shape.patch.tokens(), shape.head_dim / 2);
        let inverse = purposes.train && purposes.inverse_lists;
        KeptOfGrid {
            order: plan.i32("inputs/token order", s),
            cos: plan.f32("inputs/rope cos", s * half),
            sin: plan.f32("inputs/rope sin", s * half),
            window: shape.window.map(|w| w.lists.reserve(plan, "lists/windows", inverse)),
            predictors: shape.predictor.map(|p| Predictors::reserve_kept(&p, plan)),
            shape,
        }
    }
}

impl Model {
    /// Lays a model out in `plan`; nothing is allocated.
    pub fn reserve(shape: ModelShape, purposes: Purposes, plan: &mut ArenaPlan) -> Model {
        Self::reserve_grids(vec![shape], purposes, plan).remove(0)
    }

    /// Lays one model out for several grids of latents, of which a step uses one: weights and what is kept from step to
    /// step apart, everything within a step in the same bytes.
    ///
    /// # Panics
    /// If there is no shape.
    pub fn reserve_grids(shapes: Vec<ModelShape>, purposes: Purposes, plan: &mut ArenaPlan) -> Vec<Model> {
        let (params, weights) = shapes[0].params();
        let keeps = Keeps { moments: purposes.train.then_some(purposes.moments), ema: purposes.ema };
        let params = params.reserve(plan, "model", keeps);
        let shared = shapes[0]
            .predictor
            .map(|p| Predictors::reserve_shared(&p, shapes[0].dim(), purposes.train, plan));
        let kept: Vec<KeptOfGrid> =
            shapes.into_iter().map(|s| KeptOfGrid::reserve(s, purposes, plan)).collect();
        plan.alternatives(kept, |plan, kept| {
            Self::reserve_one(kept, params.clone(), weights.clone(), shared.clone(), purposes, plan)
        })
    }

    fn reserve_one(
        kept: KeptOfGrid,
        params: ParamSet,
        weights: Weights,
        shared: Option<predictor::Shared>,
        purposes: Purposes,
        plan: &mut ArenaPlan,
    ) -> Model {
        let KeptOfGrid { shape, order, cos, sin, window, predictors } = kept;
        let predictors = shape.predictor.zip(shared.zip(predictors)).map(|(p, buffers)| {
            Predictors::reserve(
                p,
                shape.self_attn(),
                shape.dim(),
                buffers,
                if purposes.kept_sets.is_some() { 0 } else { purposes.list_slots },
                purposes.inverse_lists,
                purposes.train,
                plan,
            )
        });
        let PatchShape { batch, .. } = shape.patch;
        let (s, width, dim) = (shape.patch.tokens(), shape.patch.width(), shape.dim());
        let (rows, text_rows) = (shape.rows(), batch * shape.text_tokens);
        let heads = shape.heads;
        let io = Io {
            latents: plan.f32("inputs/latents", batch * shape.patch.latent_len()),
            t: plan.f32("inputs/t", batch),
            keys: plan.i32("inputs/noise keys", 2 * batch),
            text: plan.act("inputs/text", text_rows * shape.text_dim),
            drop: plan.i32("inputs/dropped captions", batch),
            order,
            cos,
            sin,
            x_t: plan.act("inputs/noised tokens", rows * width),
            target: plan.f32("inputs/target", rows * width),
            pred: plan.act("activations/prediction", rows * width),
            loss: plan.f32("activations/loss", batch),
            velocity: [
                plan.f32("sampler/velocity", rows * width),
                plan.f32("sampler/second velocity", rows * width),
            ],
        };
        let cond = Cond {
            time: plan.act("conditioning/time", batch * TIME_WIDTH),
            time_pre: plan.act("conditioning/time pre", batch * dim),
            time_act: plan.act("conditioning/time act", batch * dim),
            temb: plan.act("conditioning/temb", batch * dim),
            temb_act: plan.act("conditioning/temb act", batch * dim),
            shared: plan.f32("conditioning/modulation", batch * 6 * dim),
            final_mod: plan.f32("conditioning/final modulation", batch * 2 * dim),
            text: plan.act("conditioning/text", text_rows * shape.text_dim),
            text_pre: plan.act("conditioning/text pre", text_rows * dim),
            text_act: plan.act("conditioning/text act", text_rows * dim),
            y: plan.act("conditioning/text tokens", text_rows * dim),
            copies: plan.act("conditioning/copies of the text tokens", shape.copied_text_rows() * dim),
        };
        let kept = if purposes.train { shape.layers } else { 1 };
        let shelf = purposes.kept_sets.map(|sets| Shelf::reserve(&shape, sets, purposes.inverse_lists, plan));
        let saved = (0..kept)
            .map(|l| Saved {
                x: plan.act("kept per block/input", rows * dim),
                attn: match &shelf {
                    Some(shelf) => shelf.set(l).attn,
                    None => plan.act("kept per block/attention output", rows * dim),
                },
                lse: plan.f32("kept per block/log-sum-exp", batch * heads * s),
            })
            .collect();
        let last = plan.act("kept per block/last output", rows * dim);
        let final_norm = [
            plan.act("activations/final norm", rows * dim),
            plan.f32("activations/final mean", rows),
            plan.f32("activations/final rstd", rows),
        ];
        let works = if purposes.train && !purposes.recompute { shape.layers } else { 1 };
        let pre = shape.mlp.pre_width(shape.hidden);
        let work = (0..works)
            .map(|_| {
                let mut act = |name: &str, len: usize| plan.act(&format!("block work/{name}"), len);
                let (n1, n2) = (act("norm 1", rows * dim), act("norm 2", rows * dim));
                let qkv = act("qkv", rows * 3 * dim);
                let (q, k) = (act("q", rows * dim), act("k", rows * dim));
                let x1 = act("x1", rows * dim);
                let cq = act("cross q", rows * dim);
                let ckv = act("cross kv", shape.copied_text_rows() * 2 * dim);
                let (ca, x2) = (act("cross out", rows * dim), act("x2", rows * dim));
                let up = act("mlp up", rows * pre);
                let mut f32 = |name: &str, len: usize| plan.f32(&format!("block work/{name}"), len);
                Work {
                    modulation: f32("modulation", batch * 6 * dim),
                    n1,
                    mean1: f32("mean 1", rows),
                    rstd1: f32("rstd 1", rows),
                    qkv,
                    q,
                    k,
                    q_rstd: f32("q rstd", rows * heads),
                    k_rstd: f32("k rstd", rows * heads),
                    x1,
                    cq,
                    ckv,
                    ca,
                    ca_lse: f32("cross log-sum-exp", batch * heads * s),
                    x2,
                    n2,
                    mean2: f32("mean 2", rows),
                    rstd2: f32("rstd 2", rows),
                    up,
                }
            })
            .collect();
        let gated = dim * dim.max(shape.hidden);
        let passing = Passing {
            act: plan.act("block work/mlp act", rows * shape.hidden),
            gated_weight: plan.act("block work/gated weight", gated),
            gated_bias: plan.act("block work/gated bias", dim),
        };
        let back = purposes.train.then(|| {
            let mut act = |name: &str, len: usize| plan.act(&format!("gradients of activations/{name}"), len);
            let (pred, x) = (act("prediction", rows * width), act("x", rows * dim));
            let (a, b) = (act("a", rows * dim), act("b", rows * dim));
            let (q, k) = (act("q", rows * dim), act("k", rows * dim));
            let qkv = act("qkv", rows * 3 * dim);
            let ckv = act("cross kv", shape.copied_text_rows() * 2 * dim);
            let (y_act, text_act) = (act("text tokens", text_rows * dim), act("text act", text_rows * dim));
            let text = act("text", text_rows * shape.text_dim);
            let shared_act = act("modulation", batch * 6 * dim);
            let final_mod_act = act("final modulation", batch * 2 * dim);
            let (temb, temb_b) = (act("temb", batch * dim), act("temb b", batch * dim));
            let mut f32 = |name: &str, len: usize| plan.f32(&format!("gradients of activations/{name}"), len);
            Back {
                pred,
                x,
                a,
                b,
                q,
                k,
                qkv,
                ckv,
                gate_product: f32("gated weight", gated),
                gate_sum: f32("gated bias", dim),
                modulation: f32("block modulation", batch * 6 * dim),
                copies: f32("copies of the text tokens", shape.copied_text_rows() * dim),
                y: f32("text tokens sum", text_rows * dim),
                y_act,
                text_act,
                text,
                shared: f32("modulation sum", batch * 6 * dim),
                shared_act,
                final_mod: f32("final modulation sum", batch * 2 * dim),
                final_mod_act,
                temb,
                temb_b,
            }
        });
        Model {
            shape,
            params,
            predictors,
            window,
            io,
            weights,
            cond,
            saved,
            shelf,
            last,
            final_norm,
            work,
            passing,
            back,
            purposes,
        }
    }

    /// Initial weights, token order and RoPE tables. Call once after [`Engine::reserve`].
    pub fn initialise(&self, engine: &mut dyn Engine, seed: u64) -> Result<(), EngineError> {
        self.params.initialise(engine, seed, Purpose::Init)?;
        if let Some(predictors) = &self.predictors {
            predictors.params.initialise(engine, seed, Purpose::Predictor)?;
        }
        self.write_tables(engine)
    }

    /// Token order, RoPE tables and windows of this grid: what [`Model::initialise`] writes beside weights. Call once for
    /// each further model of [`Model::reserve_grids`].
    pub fn write_tables(&self, engine: &mut dyn Engine) -> Result<(), EngineError> {
        let (order, positions) = self.shape.token_order();
        engine.write_i32(self.io.order, &order.iter().map(|&i| i as i32).collect::<Vec<_>>())?;
        let tables =
            dsv_reference::layers::rope_tables(&positions, self.shape.head_dim, self.shape.rope_base);
        engine.write_f32(self.io.cos, &tables.0.iter().map(|&x| x as f32).collect::<Vec<_>>())?;
        engine.write_f32(self.io.sin, &tables.1.iter().map(|&x| x as f32).collect::<Vec<_>>())?;
        if let Some(predictors) = &self.predictors {
            let ListShape { query_group, kv_block, .. } = predictors.shape.lists;
            let windows =
                predictors.shape.keep_window.map(|w| self.shape.window_lists(w.side, query_group, kv_block));
            predictors.write_tables(engine, &positions, self.shape.rope_base, windows.as_ref())?;
        }
        if let (Some(shape), Some(lists)) = (self.shape.window, self.window) {
            let ListShape { batch, heads, query_group, kv_block, .. } = shape.lists;
            let one = self.shape.window_lists(shape.side, query_group, kv_block);
            engine.write_i32(lists.q2k_index, &one.index.repeat(batch * heads))?;
            engine.write_i32(lists.q2k_count, &one.count.repeat(batch * heads))?;
            if let Some((offset, index)) = lists.inverse {
                let inverse = one.invert().expect("windows list each block once, in order");
                engine.write_i32(offset, &inverse.offset.repeat(batch * heads))?;
                engine.write_i32(index, &inverse.index.repeat(batch * heads))?;
            }
        }
        Ok(())
    }

    /// Puts the tokens into the order of another cube: the order and everything that is written by it. Weights do not know it,
    /// and neither does noise, which belongs to places of the clip: over all keys the model computes the same as before.
    pub fn reorder(&mut self, engine: &mut dyn Engine, cube: Cube) -> Result<(), EngineError> {
        self.shape.cube = cube;
        self.shape.keep_window(self.shape.predictor.and_then(|p| p.keep_window).map(|w| w.side));
        self.write_tables(engine)
    }

    /// Noised tokens and target from the latents, times and keys in [`Io`].
    pub fn prepare(&self, engine: &mut dyn Engine) {
        engine.flow_prepare(&FlowPrepare {
            shape: self.shape.patch,
            latents: self.io.latents,
            order: self.io.order,
            t: self.io.t,
            keys: self.io.keys,
            x_t: self.io.x_t,
            target: self.io.target,
        });
    }

    /// Velocity of `io.x_t` at `io.t` under `io.text`, into `io.pred`; a backward may follow.
    pub fn forward(&self, engine: &mut dyn Engine, attention: &[BlockAttention], task: PredictorTask) {
        self.enter(engine);
        self.blocks(engine, attention, task, true, &mut |_, _| ());
        self.leave(engine);
    }

    /// The same, where no backward follows: nothing goes to the host.
    pub fn infer(&self, engine: &mut dyn Engine, attention: &[BlockAttention]) {
        self.infer_watched(engine, attention, PredictorTask::default(), &mut |_, _| ());
    }

    /// The same; `watch` is called after each block with its queries and keys, `[B,S,H,D]` `Act`, normalised and
    /// rotated, which it may read.
    pub fn infer_watched(
        &self,
        engine: &mut dyn Engine,
        attention: &[BlockAttention],
        task: PredictorTask,
        watch: &mut dyn FnMut(&mut dyn Engine, [Buf; 2]),
    ) {
        self.enter(engine);
        self.blocks(engine, attention, task, false, watch);
        self.leave(engine);
    }

    /// What comes before the blocks: conditioning and the patch embedding.
    pub(crate) fn enter(&self, e: &mut dyn Engine) {
        self.condition(e);
        self.linear(e, self.weights.patch, self.shape.rows(), self.io.x_t, self.input_of(0));
    }

    /// The blocks, after [`Model::enter`]; `keep` what a backward needs.
    pub(crate) fn blocks(
        &self,
        e: &mut dyn Engine,
        attention: &[BlockAttention],
        task: PredictorTask,
        keep: bool,
        watch: &mut dyn FnMut(&mut dyn Engine, [Buf; 2]),
    ) {
        let shelf = self.shelf.as_ref().filter(|_| keep);
        // Of each block whose set has left or is on its way.
        let mut left: Vec<Done> = Vec::new();
        for (l, &mode) in attention.iter().enumerate() {
            if let Some(shelf) = shelf
                && let Some(free) = l.checked_sub(shelf.sets.len())
            {
                e.after(&left[free]);
            }
            self.block(e, l, Some((mode, task)));
            left.extend(shelf.map(|shelf| shelf.leave(e, l, mode)));
            let work = self.work_of(l);
            watch(e, [work.q, work.k]);
            if !self.purposes.train && l + 1 < attention.len() {
                e.copy(self.last, self.input_of(0));
            }
        }
        // Another forward may come before the backward: it finds every set free.
        left.iter().for_each(|done| e.after(done));
    }

    /// What comes after the blocks: the head.
    pub(crate) fn leave(&self, e: &mut dyn Engine) {
        let [norm, mean, rstd] = self.final_norm;
        e.norm_mod_fwd(&self.final_norm_mod(mean, rstd), norm);
        self.linear(e, self.weights.head, self.shape.rows(), norm, self.io.pred);
    }

    /// Loss of `io.pred`; with `weight`, the gradient of `weight * mean loss` for [`Model::backward`].
    pub fn loss(&self, engine: &mut dyn Engine, weight: Option<f32>) {
        engine.flow_loss(&FlowLoss {
            batch: self.shape.patch.batch,
            per_element: self.shape.patch.tokens() * self.shape.patch.width(),
            pred: self.io.pred,
            target: self.io.target,
            loss: self.io.loss,
            d_pred: weight.map(|_| self.back().pred),
            weight: weight.unwrap_or(0.0),
        });
    }

    /// Adds the gradients of all parameters, after [`Model::forward`] and [`Model::loss`] of the same pass.
    /// `attention` is what the forward was given.
    pub fn backward(&self, engine: &mut dyn Engine, attention: &[BlockAttention]) {
        self.leave_bwd(engine);
        self.blocks_bwd(engine, attention);
        self.enter_bwd(engine);
    }

    /// Backward of [`Model::leave`].
    pub(crate) fn leave_bwd(&self, e: &mut dyn Engine) {
        let back = self.back();
        let [norm, mean, rstd] = self.final_norm;
        self.linear_bwd(e, self.weights.head, self.shape.rows(), norm, back.pred, Some((back.a, false)));
        e.fill(back.x, 0.0);
        e.norm_mod_bwd(&self.final_norm_mod(mean, rstd), back.a, back.x, back.final_mod);
        e.fill(back.shared, 0.0);
        e.fill(back.copies, 0.0);
    }

    /// Backward of [`Model::blocks`], after [`Model::leave_bwd`].
    pub(crate) fn blocks_bwd(&self, e: &mut dyn Engine, attention: &[BlockAttention]) {
        let mut back: Vec<Done> = vec![Done::default(); attention.len()];
        for (l, &mode) in attention.iter().enumerate().rev() {
            if let Some(shelf) = &self.shelf {
                // The block after this one is done with its set: the next block of that set comes back meanwhile.
                if l + 1 < attention.len()
                    && let Some(next) = (l + 1).checked_sub(shelf.sets.len())
                {
                    back[next] = shelf.return_to(e, next, attention[next]);
                }
                e.after(&back[l]);
            }
            if self.purposes.recompute {
                self.block(e, l, None);
            }
            self.block_bwd(e, l, mode);
        }
    }

    /// Backward of [`Model::enter`].
    pub(crate) fn enter_bwd(&self, e: &mut dyn Engine) {
        self.linear_bwd(e, self.weights.patch, self.shape.rows(), self.io.x_t, self.back().x, None);
        self.condition_bwd(e);
    }

    /// Name of the first input, weight or activation of the last training pass that is not finite, in the order of
    /// the forward pass; `None` where all are. Of a step with micro-batches it is the last one's. `norm` (`F32 [2]`) and
    /// `culprit` (`I32 [1]`) are overwritten. Reads activations to the host: for steps that were skipped.
    pub fn first_not_finite(
        &self,
        engine: &mut dyn Engine,
        norm: Buf,
        culprit: Buf,
    ) -> Result<Option<String>, EngineError> {
        let bad = |engine: &mut dyn Engine, buf: Buf| -> Result<bool, EngineError> {
            Ok(engine.read_f32(buf)?.iter().any(|x| !x.is_finite()))
        };
        for (name, buf) in [("latents", self.io.latents), ("text embeddings", self.io.text)] {
            if bad(engine, buf)? {
                return Ok(Some(format!("{name} of the batch")));
            }
        }
        for set in [Some(&self.params), self.predictors.as_ref().map(|p| &p.params)].into_iter().flatten() {
            let segments = set.state().segments;
            engine.grad_norm(&GradNorm {
                grad: set.master,
                segments,
                max_norm: f32::INFINITY,
                clip: norm,
                culprit,
            });
            if let Ok(segment) = usize::try_from(engine.read_i32(culprit)?[0]) {
                return Ok(Some(format!("weight {}", set.segment_name(segment))));
            }
        }
        let activations =
            [("conditioning".to_string(), self.cond.shared), ("text tokens".into(), self.cond.y)]
                .into_iter()
                .chain(self.saved.iter().enumerate().flat_map(|(l, saved)| {
                    // Where sets are shared the last blocks' outputs are gone: what came of them tells.
                    let attn = match &self.shelf {
                        Some(shelf) => shelf.host.get(l).map(|copy| copy.attn),
                        None => Some(saved.attn),
                    };
                    let output = attn.map(|attn| (format!("attention output of block {l}"), attn));
                    std::iter::once((format!("input of block {l}"), saved.x)).chain(output)
                }))
                .chain([("output of the last block".into(), self.last), ("prediction".into(), self.io.pred)]);
        for (name, buf) in activations {
            if bad(engine, buf)? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    fn back(&self) -> &Back {
        self.back.as_ref().expect("this run was planned without a backward pass")
    }

    /// Input of block `l`; block `l - 1` writes it.
    fn input_of(&self, l: usize) -> Buf {
        match self.saved.get(l) {
            Some(saved) => saved.x,
            None => self.last,
        }
    }

    fn saved_of(&self, l: usize) -> Saved {
        self.saved[l.min(self.saved.len() - 1)]
    }

    fn work_of(&self, l: usize) -> &Work {
        &self.work[l.min(self.work.len() - 1)]
    }

    /// `out = x w^T + b` for `rows` rows.
    fn linear_of(&self, w: Linear, rows: usize, x: Buf, out: Buf) -> Gemm {
        Gemm::new(GemmLayout::NT, rows, w.out, w.inputs, x, self.params.copy_of(w.weight), out)
            .bias(self.params.copy_of(w.bias))
    }

    fn linear(&self, e: &mut dyn Engine, w: Linear, rows: usize, x: Buf, out: Buf) {
        e.gemm(&self.linear_of(w, rows, x, out));
    }

    /// Gradients of weight and bias, and of the input where wanted (`true`: added to the buffer).
    fn linear_bwd(
        &self,
        e: &mut dyn Engine,
        w: Linear,
        rows: usize,
        x: Buf,
        d_out: Buf,
        d_x: Option<(Buf, bool)>,
    ) {
        e.sum_rows(rows, d_out, self.params.grad_of(w.bias));
        self.linear_bwd_unbiased(e, w, rows, x, d_out, d_x);
    }

    /// The same but for the bias, whose gradient whoever made `d_out` has summed.
    fn linear_bwd_unbiased(
        &self,
        e: &mut dyn Engine,
        w: Linear,
        rows: usize,
        x: Buf,
        d_out: Buf,
        d_x: Option<(Buf, bool)>,
    ) {
        let grad = self.params.grad_of(w.weight);
        e.gemm(&Gemm::new(GemmLayout::TN, w.out, w.inputs, rows, d_out, x, grad).accumulate());
        if let Some((d_x, add)) = d_x {
            let weight = self.params.copy_of(w.weight);
            let gemm = Gemm::new(GemmLayout::NN, rows, w.inputs, w.out, d_out, weight, d_x);
            e.gemm(&if add { gemm.accumulate() } else { gemm });
        }
    }

    fn text_select(&self) -> TextSelect {
        TextSelect {
            batch: self.shape.patch.batch,
            per_element: self.shape.text_tokens * self.shape.text_dim,
            drop: self.io.drop,
        }
    }

    fn condition(&self, e: &mut dyn Engine) {
        let (c, w, batch) = (&self.cond, &self.weights, self.shape.patch.batch);
        e.time_embed(self.io.t, TIME_WIDTH, c.time);
        self.linear(e, w.time_in, batch, c.time, c.time_pre);
        e.silu_fwd(c.time_pre, c.time_act);
        self.linear(e, w.time_out, batch, c.time_act, c.temb);
        e.silu_fwd(c.temb, c.temb_act);
        self.linear(e, w.adaln, batch, c.temb_act, c.shared);
        self.linear(e, w.final_mod, batch, c.temb_act, c.final_mod);
        let text_rows = batch * self.shape.text_tokens;
        e.text_select_fwd(&self.text_select(), self.io.text, self.params.copy_of(w.null), c.text);
        e.gemm(&self.linear_of(w.text_in, text_rows, c.text, c.text_act).gelu(c.text_pre));
        self.linear(e, w.text_out, text_rows, c.text_act, c.y);
        for (i, copy) in pieces(c.copies, batch * self.shape.text_copies).enumerate() {
            e.copy(piece(c.y, batch, i / self.shape.text_copies), copy);
        }
    }

    fn condition_bwd(&self, e: &mut dyn Engine) {
        let (c, w, b, batch) = (&self.cond, &self.weights, self.back(), self.shape.patch.batch);
        let text_rows = batch * self.shape.text_tokens;
        e.fill(b.y, 0.0);
        for (i, copies) in pieces(b.copies, batch).enumerate() {
            e.sum_rows(self.shape.text_copies, copies, piece(b.y, batch, i));
        }
        e.copy(b.y, b.y_act);
        self.linear_bwd(e, w.text_out, text_rows, c.text_act, b.y_act, Some((b.text_act, false)));
        let bias = self.params.grad_of(w.text_in.bias);
        e.mlp_act_bwd(MlpAct::Gelu, text_rows, self.shape.dim(), c.text_pre, b.text_act, bias);
        self.linear_bwd_unbiased(e, w.text_in, text_rows, c.text, c.text_pre, Some((b.text, false)));
        e.text_select_bwd(&self.text_select(), b.text, self.params.grad_of(w.null));
        e.copy(b.shared, b.shared_act);
        e.copy(b.final_mod, b.final_mod_act);
        self.linear_bwd(e, w.adaln, batch, c.temb_act, b.shared_act, Some((b.temb, false)));
        self.linear_bwd(e, w.final_mod, batch, c.temb_act, b.final_mod_act, Some((b.temb, true)));
        e.silu_bwd(c.temb, b.temb, b.temb);
        self.linear_bwd(e, w.time_out, batch, c.time_act, b.temb, Some((b.temb_b, false)));
        e.silu_bwd(c.time_pre, b.temb_b, b.temb_b);
        self.linear_bwd(e, w.time_in, batch, c.time, b.temb_b, None);
    }

    fn norm_mod(&self, x: Buf, modulation: Buf, first: usize, mean: Buf, rstd: Buf) -> NormMod {
        NormMod {
            batch: self.shape.patch.batch,
            seqlen: self.shape.patch.tokens(),
            dim: self.shape.dim(),
            x,
            modulation,
            chunks: 6,
            shift: first,
            scale: first + 1,
            mean,
            rstd,
            eps: self.shape.eps,
        }
    }

    fn final_norm_mod(&self, mean: Buf, rstd: Buf) -> NormMod {
        NormMod { chunks: 2, ..self.norm_mod(self.last, self.cond.final_mod, 0, mean, rstd) }
    }

    /// The gated map `w` of batch element `b`; its gate is this chunk of the block's modulation.
    fn gated(&self, w: Linear, modulation: Buf, chunk: usize, b: usize) -> Gated {
        Gated {
            weight: self.params.copy_of(w.weight),
            bias: self.params.copy_of(w.bias),
            gate: chunk_of(modulation, chunk, b, w.out),
        }
    }

    /// Folds the gate of batch element `b` into weight and bias.
    fn fold_gate(
        &self,
        e: &mut dyn Engine,
        w: Linear,
        modulation: Buf,
        chunk: usize,
        b: usize,
    ) -> (Buf, Buf) {
        let Passing { gated_weight, gated_bias, .. } = self.passing;
        let (weight, bias) = (gated_weight.slice(0, w.out * w.inputs), gated_bias.slice(0, w.out));
        e.gate_weight(&self.gated(w, modulation, chunk, b), weight, bias);
        (weight, bias)
    }

    /// `out = x + gate (a w^T + bias)`, the gate being that chunk of the modulation.
    fn gated_residual(
        &self,
        e: &mut dyn Engine,
        w: Linear,
        (modulation, chunk): (Buf, usize),
        [x, a, out]: [Buf; 3],
    ) {
        let tokens = self.shape.patch.tokens();
        for b in 0..self.shape.patch.batch {
            let (weight, bias) = self.fold_gate(e, w, modulation, chunk, b);
            let part = |buf: Buf, width: usize| buf.slice(b * tokens * width, tokens * width);
            let (x, a, out) = (part(x, w.out), part(a, w.inputs), part(out, w.out));
            e.gemm(&Gemm::new(GemmLayout::NT, tokens, w.out, w.inputs, a, weight, out).bias(bias).plus(x));
        }
    }

    /// Gradient of `a` in [`Model::gated_residual`], into `d_a`; `d_out` is that of `x` too.
    fn gated_bwd_input(
        &self,
        e: &mut dyn Engine,
        w: Linear,
        (modulation, chunk): (Buf, usize),
        d_out: Buf,
        d_a: Buf,
    ) {
        let tokens = self.shape.patch.tokens();
        for b in 0..self.shape.patch.batch {
            let (weight, _) = self.fold_gate(e, w, modulation, chunk, b);
            let part = |buf: Buf, width: usize| buf.slice(b * tokens * width, tokens * width);
            let (d_out, d_a) = (part(d_out, w.out), part(d_a, w.inputs));
            e.gemm(&Gemm::new(GemmLayout::NN, tokens, w.inputs, w.out, d_out, weight, d_a));
        }
    }

    /// Gradients of weight, bias and gate in [`Model::gated_residual`].
    fn gated_bwd_weight(
        &self,
        e: &mut dyn Engine,
        w: Linear,
        (modulation, chunk): (Buf, usize),
        a: Buf,
        d_out: Buf,
    ) {
        let (tokens, back) = (self.shape.patch.tokens(), self.back());
        let product = back.gate_product.slice(0, w.out * w.inputs);
        for b in 0..self.shape.patch.batch {
            let part = |buf: Buf, width: usize| buf.slice(b * tokens * width, tokens * width);
            let (a, d_out) = (part(a, w.inputs), part(d_out, w.out));
            e.gemm(&Gemm::new(GemmLayout::TN, w.out, w.inputs, tokens, d_out, a, product));
            e.fill(back.gate_sum, 0.0);
            e.sum_rows(tokens, d_out, back.gate_sum);
            let grad = GatedGrad {
                product,
                sum: back.gate_sum,
                d_weight: self.params.grad_of(w.weight),
                d_bias: self.params.grad_of(w.bias),
                d_gate: chunk_of(back.modulation, chunk, b, w.out),
            };
            e.gate_grad(&self.gated(w, modulation, chunk, b), &grad);
        }
    }

    fn qk_prep(&self, l: usize, w: &Work) -> QkPrep {
        QkPrep {
            batch: self.shape.patch.batch,
            seqlen: self.shape.patch.tokens(),
            heads: self.shape.heads,
            head_dim: self.shape.head_dim,
            qkv: w.qkv,
            q_weight: self.params.copy_of(self.weights.blocks[l].q_norm),
            k_weight: self.params.copy_of(self.weights.blocks[l].k_norm),
            cos: self.io.cos,
            sin: self.io.sin,
            q_rstd: w.q_rstd,
            k_rstd: w.k_rstd,
            eps: self.shape.eps,
        }
    }

    fn heads_view(&self, buf: Buf) -> View {
        View::bshd(buf, self.shape.patch.tokens(), self.shape.heads, self.shape.head_dim)
    }

    /// The same for the cross-attention, whose batch is that of the text's copies.
    fn cross_view(&self, buf: Buf) -> View {
        let s = self.shape.cross_attn();
        View::bshd(buf, s.seqlen_q, s.heads, s.head_dim)
    }

    fn self_attention(&self, w: &Work, saved: Saved, lists: Option<Lists>) -> AttnFwd {
        let s = &self.shape;
        AttnFwd {
            shape: s.self_attn(),
            q: self.heads_view(w.q),
            k: self.heads_view(w.k),
            v: View::packed(w.qkv, 3, 2, s.patch.tokens(), s.heads, s.head_dim),
            lists,
            out: self.heads_view(saved.attn),
            lse: saved.lse,
        }
    }

    fn cross_attention(&self, w: &Work) -> AttnFwd {
        let s = &self.shape;
        let part = |buf: Buf, part: usize| View::packed(buf, 2, part, s.text_tokens, s.heads, s.head_dim);
        AttnFwd {
            shape: s.cross_attn(),
            q: self.cross_view(w.cq),
            k: part(w.ckv, 0),
            v: part(w.ckv, 1),
            lists: None,
            out: self.cross_view(w.ca),
            lse: w.ca_lse,
        }
    }

    /// Blocks that can attend over predicted lists at one time.
    pub fn list_slots(&self) -> usize {
        if self.predictors.is_some() { self.purposes.list_slots } else { 0 }
    }

    /// The lists block `l` attends over in this mode. They are its own until another block of its set runs.
    ///
    /// # Panics
    /// If the model was laid out without them.
    pub fn lists_of(&self, l: usize, mode: BlockAttention) -> Option<Lists> {
        match mode {
            BlockAttention::Dense => None,
            BlockAttention::Window => {
                Some(self.window.expect("windows need dsv.attention = \"wa-m\" or \"wa-l\""))
            }
            BlockAttention::Sparse { slot } => {
                let predictors = self
                    .predictors
                    .as_ref()
                    .expect("predicted lists need predictors: dsv.attention = \"dsv\" or \"fixed\"");
                match &self.shelf {
                    Some(shelf) => shelf.set(l).lists,
                    None => Some(predictors.slots[slot]),
                }
            }
        }
    }

    /// Block `l` forward, from its kept input to the next block's. `None` recomputes: the kept attention output is
    /// used, and neither selection, attention nor predictor runs.
    fn block(&self, e: &mut dyn Engine, l: usize, run: Option<(BlockAttention, PredictorTask)>) {
        let (w, saved, p) = (self.work_of(l), self.saved_of(l), &self.weights.blocks[l]);
        let (rows, batch) = (self.shape.rows(), self.shape.patch.batch);
        let x = saved.x;
        e.add_rows(batch, self.cond.shared, self.params.copy_of(p.table), w.modulation);
        e.norm_mod_fwd(&self.norm_mod(x, w.modulation, 0, w.mean1, w.rstd1), w.n1);
        self.linear(e, p.qkv, rows, w.n1, w.qkv);
        e.qk_prep_fwd(&self.qk_prep(l, w), w.q, w.k);
        if let Some((mode, task)) = run {
            let mut lists = self.lists_of(l, mode);
            let qk = (self.heads_view(w.q), self.heads_view(w.k));
            if let Some(predictors) = &self.predictors {
                lists = predictors.observe(e, l, w.n1, qk, task, lists);
            }
            e.attn_fwd(&self.self_attention(w, saved, lists));
            if let Some(predictors) = self.predictors.as_ref().filter(|_| task.profile) {
                predictors.profile(e, l, qk, lists, saved.lse);
            }
        }
        self.gated_residual(e, p.o, (w.modulation, 2), [x, saved.attn, w.x1]);
        self.linear(e, p.cq, rows, w.x1, w.cq);
        self.linear(e, p.ckv, self.shape.copied_text_rows(), self.cond.copies, w.ckv);
        e.attn_fwd(&self.cross_attention(w));
        e.gemm(&self.linear_of(p.co, rows, w.ca, w.x2).plus(w.x1));
        e.norm_mod_fwd(&self.norm_mod(w.x2, w.modulation, 3, w.mean2, w.rstd2), w.n2);
        self.linear(e, p.up, rows, w.n2, w.up);
        if run.is_some() {
            let out = if self.purposes.train { self.input_of(l + 1) } else { self.last };
            e.mlp_act_fwd(self.shape.mlp, rows, self.shape.hidden, w.up, self.passing.act);
            self.gated_residual(e, p.down, (w.modulation, 5), [w.x2, self.passing.act, out]);
        }
    }

    /// Block `l` backward: `back.x` holds the gradient of its output on entry, of its input on return.
    fn block_bwd(&self, e: &mut dyn Engine, l: usize, mode: BlockAttention) {
        let (w, saved, p, b) = (self.work_of(l), self.saved_of(l), &self.weights.blocks[l], self.back());
        let s = &self.shape;
        let (rows, batch) = (s.rows(), s.patch.batch);
        // MLP. The activation is made anew where its gradient stood: neither it nor what the last product of a block made
        // was kept or recomputed.
        let act = self.passing.act;
        self.gated_bwd_input(e, p.down, (w.modulation, 5), b.x, act);
        e.mlp_act_bwd(s.mlp, rows, s.hidden, w.up, act, self.params.grad_of(p.up.bias));
        self.gated_bwd_weight(e, p.down, (w.modulation, 5), act, b.x);
        self.linear_bwd_unbiased(e, p.up, rows, w.n2, w.up, Some((b.a, false)));
        let norm2 = self.norm_mod(w.x2, w.modulation, 3, w.mean2, w.rstd2);
        e.norm_mod_bwd(&norm2, b.a, b.x, b.modulation);
        // Cross-attention.
        self.linear_bwd(e, p.co, rows, w.ca, b.x, Some((b.a, false)));
        let part = |part: usize| View::packed(b.ckv, 2, part, s.text_tokens, s.heads, s.head_dim);
        e.attn_bwd(&AttnBwd {
            fwd: self.cross_attention(w),
            d_out: self.cross_view(b.a),
            d_q: self.cross_view(b.b),
            d_k: part(0),
            d_v: part(1),
        });
        self.linear_bwd(e, p.cq, rows, w.x1, b.b, Some((b.x, true)));
        self.linear_bwd(e, p.ckv, s.copied_text_rows(), self.cond.copies, b.ckv, Some((b.copies, true)));
        // Self-attention.
        self.gated_bwd_weight(e, p.o, (w.modulation, 2), saved.attn, b.x);
        self.gated_bwd_input(e, p.o, (w.modulation, 2), b.x, b.b);
        e.attn_bwd(&AttnBwd {
            fwd: self.self_attention(w, saved, self.lists_of(l, mode)),
            d_out: self.heads_view(b.b),
            d_q: self.heads_view(b.q),
            d_k: self.heads_view(b.k),
            d_v: View::packed(b.qkv, 3, 2, s.patch.tokens(), s.heads, s.head_dim),
        });
        let (q_norm, k_norm) = (self.params.grad_of(p.q_norm), self.params.grad_of(p.k_norm));
        e.qk_prep_bwd(&self.qk_prep(l, w), b.q, b.k, b.qkv, q_norm, k_norm);
        self.linear_bwd(e, p.qkv, rows, w.n1, b.qkv, Some((b.a, false)));
        let norm1 = self.norm_mod(saved.x, w.modulation, 0, w.mean1, w.rstd1);
        e.norm_mod_bwd(&norm1, b.a, b.x, b.modulation);
        // Modulation: chunks 0, 1, 2, 3, 4, 5 are all written by now.
        e.sum_rows(batch, b.modulation, self.params.grad_of(p.table));
        e.axpy(1.0, b.modulation, b.shared);
    }
}

/// Chunk `chunk` of batch element `b` in a modulation `[B, 6, dim]`.
fn chunk_of(modulation: Buf, chunk: usize, b: usize, dim: usize) -> Buf {
    modulation.slice((6 * b + chunk) * dim, dim)
}

/// Piece `i` of `n` equal ones.
fn piece(buf: Buf, n: usize, i: usize) -> Buf {
    buf.slice(i * (buf.len() / n), buf.len() / n)
}

fn pieces(buf: Buf, n: usize) -> impl Iterator<Item = Buf> {
    (0..n).map(move |i| piece(buf, n, i))
}

#[cfg(test)]
mod tests;
