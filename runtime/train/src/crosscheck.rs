//! One training pass of the model with random weights, written out whole, so that another program can compute it again:
//! weights, inputs, KV lists, prediction, loss and every gradient. `tests/crosscheck.py` does so with PyTorch's autograd.
//!
//! Tensors of the file, all f32 or i32: `weight.NAME` (as rounded for the device), `grad.NAME`, `input.*`, `output.pred`
//! `[B, S, width]`, `output.loss` `[B]`, `lists.L.index` `[B, H, G, max_selected]` and `lists.L.count` `[B, H, G]` of every
//! block L that attended over lists. Metadata: the sizes, as decimal numbers, and what ran.

use crate::config::Config;
use crate::engine::{ArenaPlan, Buf, Engine, EngineError};
use crate::model::{BlockAttention, Model, ModelShape, Purposes};
use crate::predictor::PredictorTask;
use crate::rng::{self, Purpose};
use crate::tensors::{Dtype, TensorView};
use std::collections::BTreeMap;

/// A pass, on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Pass {
    /// Sizes and device.
    pub metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Pass {
    /// The tensors, for [`crate::tensors::write`].
    pub fn tensors(&self) -> Vec<TensorView<'_>> {
        self.tensors
            .iter()
            .map(|(name, dtype, shape, data)| TensorView {
                name: name.clone(),
                dtype: *dtype,
                shape: shape.clone(),
                data,
            })
            .collect()
    }

    fn f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((name.to_string(), Dtype::F32, shape.to_vec(), bytes));
    }

    fn i32(&mut self, name: &str, shape: &[usize], values: &[i32]) {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((name.to_string(), Dtype::I32, shape.to_vec(), bytes));
    }
}

fn noise(position: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut out = vec![0f32; len];
    dsv_reference::layers::normal(rng::key(0x0c0c, Purpose::Sample, position), &mut out);
    out.iter().map(|x| x * scale).collect()
}

/// Runs forward, loss and backward once. Every second block attends over predicted lists where the configuration has
/// predictors (`dsv.keep`, or half of the blocks), all over windows where it has those.
pub fn pass(config: &Config, engine: &mut dyn Engine) -> Result<Pass, EngineError> {
    let batch = config.data.batch_size;
    let shape = ModelShape::from_config(config, batch);
    let layers = shape.layers;
    let attention: Vec<BlockAttention> = (0..layers)
        .map(|l| match (&shape.window, &shape.predictor) {
            (Some(_), _) => BlockAttention::Window,
            (None, Some(_)) if l % 2 == 1 || layers == 1 => BlockAttention::Sparse { slot: l },
            _ => BlockAttention::Dense,
        })
        .collect();
    let mut plan = ArenaPlan::new(engine.precision());
    let purposes = Purposes {
        train: true,
        recompute: config.train.recompute,
        list_slots: layers,
        inverse_lists: engine.needs_inverse_lists(),
        ..Purposes::INFERENCE
    };
    let model = Model::reserve(shape, purposes, &mut plan);
    engine.reserve(&plan, &model.shape.dims(model.params.master.len()))?;
    model.initialise(engine, config.train.seed)?;
    // Also what training begins with at zero: gates, biases, the head.
    let master = model.params.master;
    for (i, (spec, buf)) in model.params.slices(master).enumerate() {
        let fan_in = if spec.shape.len() == 2 { spec.shape[1] } else { 16 };
        let (offset, scale) = match spec.name.ends_with("_norm") {
            true => (1.0, 0.2),
            false => (0.0, (1.0 / fan_in as f32).sqrt()),
        };
        let values: Vec<f32> = noise(i as u64, buf.len(), scale).iter().map(|x| x + offset).collect();
        engine.write_f32(buf, &values)?;
    }
    model.params.refresh(engine)?;
    let io = model.io;
    engine.write_f32(io.latents, &noise(1 << 20, io.latents.len(), 1.0))?;
    engine.write_f32(io.text, &noise(2 << 20, io.text.len(), 1.0))?;
    engine.write_f32(io.t, &(0..batch).map(|b| (b as f32 + 0.5) / batch as f32).collect::<Vec<_>>())?;
    engine.write_i32(io.keys, &(0..2 * batch as i32).collect::<Vec<_>>())?;
    engine.write_i32(io.drop, &(0..batch as i32).map(|b| b % 2).collect::<Vec<_>>())?;
    if let Some(predictors) = &model.predictors {
        let lists = predictors.shape.lists;
        let keep = config.dsv.keep.unwrap_or(0.5);
        let most = ((lists.kv_blocks() as f64 * keep).ceil() as usize).clamp(1, lists.max_selected);
        // Heads of one block keep different numbers.
        let top_k: Vec<i32> = (0..layers * lists.heads).map(|i| (most - i % 2 * (most / 2)) as i32).collect();
        engine.write_i32(predictors.top_k, &top_k)?;
    }
    engine.fill(model.params.state().grad, 0.0);
    model.prepare(engine);
    model.forward(engine, &attention, PredictorTask::default());
    model.loss(engine, Some(1.0));
    model.backward(engine, &attention);
    engine.sync()?;

    let shape = &model.shape;
    let (tokens, width, half) = (shape.patch.tokens(), shape.patch.width(), shape.head_dim / 2);
    let lists = shape.predictor.map(|p| p.lists).or(shape.window.map(|w| w.lists));
    let sizes = [
        ("layers", layers),
        ("heads", shape.heads),
        ("head_dim", shape.head_dim),
        ("hidden", shape.hidden),
        ("geglu", usize::from(shape.mlp.pre_width(1) == 2)),
        ("query_group", lists.map_or(0, |l| l.query_group)),
        ("kv_block", lists.map_or(0, |l| l.kv_block)),
    ];
    let mut metadata: BTreeMap<String, String> =
        sizes.into_iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    metadata.insert("eps".into(), shape.eps.to_string());
    metadata.insert("engine".into(), engine.name());
    let mut pass = Pass { metadata, tensors: Vec::new() };
    for (prefix, flat) in [("weight", model.params.copy), ("grad", model.params.state().grad)] {
        for (spec, buf) in model.params.slices(flat) {
            pass.f32(&format!("{prefix}.{}", spec.name), &spec.shape, &engine.read_f32(buf)?);
        }
    }
    let text = [batch, shape.text_tokens, shape.text_dim];
    let floats: [(&str, Buf, &[usize]); 8] = [
        ("input.x_t", io.x_t, &[batch, tokens, width]),
        ("input.target", io.target, &[batch, tokens, width]),
        ("input.t", io.t, &[batch]),
        ("input.text", io.text, &text),
        ("input.cos", io.cos, &[tokens, half]),
        ("input.sin", io.sin, &[tokens, half]),
        ("output.pred", io.pred, &[batch, tokens, width]),
        ("output.loss", io.loss, &[batch]),
    ];
    for (name, buf, dims) in floats {
        pass.f32(name, dims, &engine.read_f32(buf)?);
    }
    pass.i32("input.drop", &[batch], &engine.read_i32(io.drop)?);
    for (l, &mode) in attention.iter().enumerate() {
        if let Some(lists) = model.lists_of(l, mode) {
            let s = lists.shape;
            let dims = [s.batch, s.heads, s.groups(), s.max_selected];
            pass.i32(&format!("lists.{l}.index"), &dims, &engine.read_i32(lists.q2k_index)?);
            pass.i32(&format!("lists.{l}.count"), &dims[..3], &engine.read_i32(lists.q2k_count)?);
        }
    }
    Ok(pass)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::CpuEngine;

    #[test]
    fn a_pass_holds_every_gradient_and_the_lists_of_its_sparse_blocks() {
        let mut config = Config::preset("tiny").unwrap();
        (config.model.layers, config.data.frames, config.data.height, config.data.width) = (2, 2, 8, 8);
        let pass = pass(&config, &mut CpuEngine::<f32>::new()).unwrap();
        let views = pass.tensors();
        let find = |name: &str| views.iter().find(|v| v.name == name).unwrap_or_else(|| panic!("no {name}"));
        let mut grads = 0;
        for view in views.iter().filter(|v| v.name.starts_with("grad.")) {
            let values = view.to_f32().unwrap();
            assert!(values.iter().all(|x| x.is_finite()), "{}", view.name);
            assert!(values.iter().any(|x| *x != 0.0), "{} is all zero", view.name);
            assert_eq!(find(&view.name.replace("grad.", "weight.")).shape, view.shape);
            grads += 1;
        }
        assert!(grads > 30, "{grads} gradients");
        // Heads of the sparse block keep 4 and 2 of 16 blocks.
        let counts = &find("lists.1.count").data;
        assert_eq!((counts[0], counts[4 * 16]), (4, 2));
        assert!(!views.iter().any(|v| v.name == "lists.0.count"));
        assert_eq!(pass.metadata["query_group"], "8");
    }
}
