//! Memory and arithmetic of a run, component by component, before anything is allocated.

use crate::config::Config;
use crate::engine::Engine;
use crate::model::ModelShape;
use crate::train::Layout;
use std::fmt;

/// What a run will need.
#[derive(Clone, Debug, PartialEq)]
pub struct RunPlan {
    /// Trainable elements of the model.
    pub params: usize,
    /// Trainable elements of the predictors.
    pub predictor_params: usize,
    /// Video tokens of a clip.
    pub tokens: usize,
    /// Bytes by component of the arena.
    pub memory: Vec<(String, usize)>,
    /// Bytes of the engine's scratch.
    pub scratch_bytes: usize,
    /// Bytes the device has free, where known.
    pub free_bytes: Option<usize>,
    /// List buffers, and bytes of one.
    pub lists: (usize, usize),
    /// FLOP of one optimizer step by component: name, dense, at `keep` of the KV.
    pub flop: Vec<(&'static str, f64, f64)>,
    /// Share of KV blocks the second column assumes.
    pub keep: f64,
}

/// Plans a training run on an engine.
pub fn plan(config: &Config, engine: &dyn Engine) -> RunPlan {
    let layout = Layout::new(config, engine, None);
    let shape = &layout.model.shape;
    let (params, _) = shape.params();
    let predictor = layout
        .model
        .predictors
        .as_ref()
        .map_or(0, |p| crate::predictor::Predictors::params(&p.shape, shape.dim()).0.count());
    let keep = config.dsv.keep.unwrap_or(config.dsv.max_keep);
    RunPlan {
        params: params.count(),
        predictor_params: predictor,
        tokens: shape.patch.tokens(),
        memory: layout.arena.by_component(),
        scratch_bytes: engine.scratch_bytes(&shape.dims(layout.model.params.master.len())),
        free_bytes: engine.free_bytes(),
        lists: (layout.list_slots, layout.list_bytes),
        flop: flop(shape, config, keep),
        keep,
    }
}

/// FLOP (two per multiply-add) of one step: forward 1, backward 2, recompute 1 where on; attention forward 1,
/// backward 2.5, never recomputed.
fn flop(shape: &ModelShape, config: &Config, keep: f64) -> Vec<(&'static str, f64, f64)> {
    let per_step = (config.train.grad_accumulation * shape.layers) as f64;
    let passes = if config.train.recompute { 4.0 } else { 3.0 };
    let (rows, dim) = (shape.rows() as f64, shape.dim() as f64);
    let (s, text) = (shape.patch.tokens() as f64, shape.text_tokens as f64);
    let text_rows = shape.patch.batch as f64 * text;
    let linear = |rows: f64, inputs: f64, out: f64| 2.0 * rows * inputs * out * per_step * passes;
    let qkvo = linear(rows, dim, 4.0 * dim);
    let cross = linear(rows, dim, 2.0 * dim) + linear(text_rows, dim, 2.0 * dim);
    let (hidden, pre) = (shape.hidden as f64, shape.mlp.pre_width(shape.hidden) as f64);
    let mlp = linear(rows, dim, pre) + linear(rows, hidden, dim);
    let attention = 4.0 * rows * s * dim * per_step * 3.5;
    // Forward and backward, and the forward once more in the recompute.
    let cross_attention = 4.0 * rows * text * dim * per_step * (passes + 0.5);
    let mut out = vec![
        ("self-attention", attention, attention * keep),
        ("attention projections", qkvo, qkvo),
        ("MLP", mlp, mlp),
        ("cross-attention", cross + cross_attention, cross + cross_attention),
    ];
    if let Some(p) = &shape.predictor {
        let low = 2.0 * shape.heads as f64 * p.d_lr as f64;
        let map = 2.0 * 2.0 * rows * dim * low * per_step;
        let (d, r) = (shape.head_dim as f64, p.d_lr as f64);
        // Gram matrices, and their products with every query and key, per head.
        let gram = 2.0 * rows * shape.heads as f64 * (r * r + r * d + d * d) * 3.0 * per_step;
        let groups = p.lists.groups() as f64;
        let scores = 2.0 * shape.patch.batch as f64 * shape.heads as f64 * groups * s * r * per_step;
        out.push(("predictors", map + gram, map + gram));
        out.push(("selection", 0.0, scores));
    }
    out
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

impl RunPlan {
    /// Bytes of arena and scratch.
    pub fn total_bytes(&self) -> usize {
        self.memory.iter().map(|(_, b)| b).sum::<usize>() + self.scratch_bytes
    }
}

impl fmt::Display for RunPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "parameters {:.1} M, predictors {:.2} M, {} tokens a clip\n",
            self.params as f64 / 1e6,
            self.predictor_params as f64 / 1e6,
            self.tokens
        )?;
        writeln!(f, "{:<32} {:>12}", "memory", "GiB")?;
        for (name, bytes) in &self.memory {
            writeln!(f, "  {name:<30} {:>12.4}", gib(*bytes))?;
        }
        writeln!(f, "  {:<30} {:>12.4}", "engine scratch", gib(self.scratch_bytes))?;
        write!(f, "  {:<30} {:>12.4}", "total", gib(self.total_bytes()))?;
        match self.free_bytes {
            Some(free) if free < self.total_bytes() => {
                writeln!(f, "   more than the {:.2} GiB that are free", gib(free))?;
            }
            Some(free) => writeln!(f, "   of {:.2} GiB free", gib(free))?,
            None => writeln!(f)?,
        }
        writeln!(f, "  lists: {} blocks, {:.4} GiB each\n", self.lists.0, gib(self.lists.1))?;
        let kept = format!("{:.0} % kept", 100.0 * self.keep);
        writeln!(f, "{:<32} {:>12} {:>12}", "TFLOP of a step", "dense", kept)?;
        let tera = 1e-12;
        for (name, dense, sparse) in &self.flop {
            writeln!(f, "  {name:<30} {:>12.4} {:>12.4}", dense * tera, sparse * tera)?;
        }
        let sum = |pick: fn(&(&str, f64, f64)) -> f64| self.flop.iter().map(pick).sum::<f64>() * tera;
        write!(f, "  {:<30} {:>12.4} {:>12.4}", "total", sum(|x| x.1), sum(|x| x.2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::CpuEngine;

    #[test]
    fn presets_have_the_papers_sizes() {
        let engine = CpuEngine::<f32>::new();
        for (preset, low, high) in [("0.8b", 0.6e9, 1.1e9), ("2.7b", 2.4e9, 3.1e9), ("30b", 24e9, 34e9)] {
            let config = Config::preset(preset).unwrap();
            let params = plan(&config, &engine).params as f64;
            assert!((low..high).contains(&params), "{preset}: {params:e} parameters");
        }
    }

    #[test]
    fn attention_dominates_long_sequences() {
        let engine = CpuEngine::<f32>::new();
        let mut config = Config::preset("2.7b").unwrap();
        (config.data.frames, config.data.height, config.data.width) = (50, 128, 128);
        config.dsv.memory_budget_gb = 4000.0;
        let p = plan(&config, &engine);
        assert_eq!(p.tokens, 204_800);
        let share = p.flop[0].1 / p.flop.iter().map(|x| x.1).sum::<f64>();
        assert!(share > 0.85, "the paper says more than 90 % at 200k tokens, found {share}");
        let text = p.to_string();
        for wanted in ["204800 tokens a clip", "kept per block", "lists: 32 blocks", "self-attention"] {
            assert!(text.contains(wanted), "no '{wanted}' in\n{text}");
        }
    }
}
