//! A model of the attention kernels' rounding: the same algorithm with the same rounding points, so that its
//! distance from the f64 oracle says how far a right kernel may be from it.
//!
//! Rounding points, with the tensor dtype `dtype`: q, k, v, dout on entry; logits, softmax and LSE in f32
//! (base 2, online over tiles of `block_n` keys); p before the product with v, unnormalised in the forward,
//! normalised in the backward; ds before its two products; products accumulate in f32; out, dq, dk, dv on exit.
//! LSE stays f32.

use super::{
    AttnError, AttnGrads, AttnInputs, AttnOutput, AttnShape, KvLists, View, keys_of_row, validate,
    validate_lse, validate_rows,
};
use crate::element::{Element, Rounding};
use dsv_spec::Dtype;
use rayon::prelude::*;

/// Output (values of `dtype`) and LSE (f32). `block_n` is the kernel's kv tile: how many keys one step of
/// the online softmax takes.
pub fn forward<T: Element>(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, T>,
    lists: Option<&KvLists<'_>>,
    dtype: Dtype,
    block_n: usize,
) -> Result<AttnOutput<f32>, AttnError> {
    validate(shape, inputs, lists)?;
    if block_n == 0 {
        return Err(AttnError::ZeroSize { name: "block_n" });
    }
    let dim = shape.head_dim;
    let scale_log2 = (shape.scale * std::f64::consts::LOG2_E) as f32;
    let rounded = Rounded::new(shape, inputs, dtype);
    let mut output = AttnOutput { out: vec![0.0; shape.q_len()], lse: vec![0.0; shape.lse_len()] };
    let lse: Vec<f32> = output
        .out
        .par_chunks_mut(dim)
        .enumerate()
        .map(|(r, out)| {
            let (b, i, h) = (
                r / (shape.num_heads * shape.seqlen_q),
                r / shape.num_heads % shape.seqlen_q,
                r % shape.num_heads,
            );
            let q = rounded.q(b, i, h);
            let keys = keys_of_row(shape, lists, b, h, i);
            let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
            for tile in keys.chunks(block_n) {
                let s: Vec<f32> = tile.iter().map(|&j| dot(q, rounded.k(b, j, shape.kv_head(h)))).collect();
                let tile_max = s.iter().copied().fold(max, f32::max);
                let shrink = ((max - tile_max) * scale_log2).exp2();
                if max != f32::NEG_INFINITY {
                    sum *= shrink;
                    out.iter_mut().for_each(|x| *x *= shrink);
                }
                max = tile_max;
                for (&j, s) in tile.iter().zip(s) {
                    let p = s.mul_add(scale_log2, -max * scale_log2).exp2();
                    sum += p;
                    axpy(out, dtype.round(p), rounded.v(b, j, shape.kv_head(h)));
                }
            }
            if keys.is_empty() {
                return f32::NEG_INFINITY;
            }
            let inverse = 1.0 / sum;
            out.iter_mut().for_each(|x| *x = dtype.round(*x * inverse));
            (max * scale_log2 + sum.log2()) * std::f32::consts::LN_2
        })
        .collect();
    for (r, lse) in lse.into_iter().enumerate() {
        let (b, i, h) = (
            r / (shape.num_heads * shape.seqlen_q),
            r / shape.num_heads % shape.seqlen_q,
            r % shape.num_heads,
        );
        output.lse[(b * shape.num_heads + h) * shape.seqlen_q + i] = lse;
    }
    Ok(output)
}

/// Gradients (values of `dtype`) of `sum(dout * out) + sum(d_lse * lse)`, from the output and LSE of
/// [`forward`], as a kernel gets them.
pub fn backward<T: Element, G: Element>(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, T>,
    lists: Option<&KvLists<'_>>,
    saved: &AttnOutput<f32>,
    dout: &View<'_, G>,
    d_lse: Option<&[f32]>,
    dtype: Dtype,
) -> Result<AttnGrads<f32>, AttnError> {
    validate(shape, inputs, lists)?;
    validate_rows(shape, "dout", dout)?;
    validate_rows(shape, "out", &View::new(&saved.out, shape.q_layout()))?;
    validate_lse(shape, "lse", &saved.lse)?;
    if let Some(d_lse) = d_lse {
        validate_lse(shape, "d_lse", d_lse)?;
    }
    let (dim, scale) = (shape.head_dim, shape.scale as f32);
    let scale_log2 = (shape.scale * std::f64::consts::LOG2_E) as f32;
    let rounded = Rounded::new(shape, inputs, dtype);
    let dout = round_rows(dout, dtype, shape.batch, shape.seqlen_q, shape.num_heads, dim);
    let q_layout = shape.q_layout();

    // One (batch, KV head) a task: its dk and dv, and dq of the query heads that share it.
    let share = shape.num_heads / shape.num_kv_heads;
    let parts: Vec<AttnGrads<f32>> = (0..shape.batch * shape.num_kv_heads)
        .into_par_iter()
        .map(|task| {
            let (b, kv_head) = (task / shape.num_kv_heads, task % shape.num_kv_heads);
            let mut grads = AttnGrads {
                dq: vec![0.0; share * shape.seqlen_q * dim],
                dk: vec![0.0; shape.seqlen_kv * dim],
                dv: vec![0.0; shape.seqlen_kv * dim],
            };
            for h in kv_head * share..(kv_head + 1) * share {
                for i in 0..shape.seqlen_q {
                    let q = rounded.q(b, i, h);
                    let d_out = &dout[q_layout.offset(b, i, h)..][..dim];
                    let out = &saved.out[q_layout.offset(b, i, h)..][..dim];
                    let at = (b * shape.num_heads + h) * shape.seqlen_q + i;
                    let delta = dot(out, d_out) - d_lse.map_or(0.0, |d_lse| d_lse[at]);
                    let lse_log2 = saved.lse[at] * std::f32::consts::LOG2_E;
                    let row = (h - kv_head * share) * shape.seqlen_q + i;
                    let dq = &mut grads.dq[row * dim..][..dim];
                    for j in keys_of_row(shape, lists, b, h, i) {
                        let (k, v) = (rounded.k(b, j, kv_head), rounded.v(b, j, kv_head));
                        let p = dot(q, k).mul_add(scale_log2, -lse_log2).exp2();
                        let ds = dtype.round(p * (dot(d_out, v) - delta));
                        axpy(dq, ds, k);
                        axpy(&mut grads.dk[j * dim..][..dim], ds, q);
                        axpy(&mut grads.dv[j * dim..][..dim], dtype.round(p), d_out);
                    }
                }
            }
            grads
        })
        .collect();

    let kv_layout = shape.kv_layout();
    let mut grads = AttnGrads {
        dq: vec![0.0; shape.q_len()],
        dk: vec![0.0; shape.kv_len()],
        dv: vec![0.0; shape.kv_len()],
    };
    for (task, part) in parts.iter().enumerate() {
        let (b, kv_head) = (task / shape.num_kv_heads, task % shape.num_kv_heads);
        let copy = |to: &mut [f32], from: &[f32], factor: f32| {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = dtype.round(from * factor));
        };
        for (row, from) in part.dq.chunks_exact(dim).enumerate() {
            let (h, i) = (kv_head * share + row / shape.seqlen_q, row % shape.seqlen_q);
            copy(&mut grads.dq[q_layout.offset(b, i, h)..][..dim], from, scale);
        }
        for j in 0..shape.seqlen_kv {
            let at = kv_layout.offset(b, j, kv_head);
            copy(&mut grads.dk[at..][..dim], &part.dk[j * dim..][..dim], scale);
            copy(&mut grads.dv[at..][..dim], &part.dv[j * dim..][..dim], 1.0);
        }
    }
    Ok(grads)
}

/// q, k, v rounded and packed [B, S, H, D].
struct Rounded<'a> {
    shape: &'a AttnShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl<'a> Rounded<'a> {
    fn new<T: Element>(shape: &'a AttnShape, inputs: &AttnInputs<'_, T>, dtype: Dtype) -> Self {
        let AttnShape { batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads, head_dim, .. } = *shape;
        Rounded {
            shape,
            q: round_rows(&inputs.q, dtype, batch, seqlen_q, num_heads, head_dim),
            k: round_rows(&inputs.k, dtype, batch, seqlen_kv, num_kv_heads, head_dim),
            v: round_rows(&inputs.v, dtype, batch, seqlen_kv, num_kv_heads, head_dim),
        }
    }

    fn q(&self, b: usize, i: usize, h: usize) -> &[f32] {
        &self.q[self.shape.q_layout().offset(b, i, h)..][..self.shape.head_dim]
    }

    fn k(&self, b: usize, j: usize, kv_head: usize) -> &[f32] {
        &self.k[self.shape.kv_layout().offset(b, j, kv_head)..][..self.shape.head_dim]
    }

    fn v(&self, b: usize, j: usize, kv_head: usize) -> &[f32] {
        &self.v[self.shape.kv_layout().offset(b, j, kv_head)..][..self.shape.head_dim]
    }
}

fn round_rows<T: Element>(
    view: &View<'_, T>,
    dtype: Dtype,
    batch: usize,
    seqlen: usize,
    heads: usize,
    dim: usize,
) -> Vec<f32> {
    let packed = view.layout.pack(view.data, batch, seqlen, heads, dim);
    packed.into_iter().map(|x| dtype.round(x.to_f32())).collect()
}

/// <a, b> in f32: exact products, f32 sums in eight lanes (a tensor core's order is unspecified as well).
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for lane in 0..8 {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

fn axpy(sum: &mut [f32], factor: f32, values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += factor * x);
}
