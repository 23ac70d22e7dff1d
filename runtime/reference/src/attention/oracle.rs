//! Attention by its definition, in f64: one softmax a row, one sum an element, nothing saved or recomputed
//! cleverly. Rows (and, for dk and dv, keys) are independent and run on all cores.

use super::{
    AttnError, AttnGrads, AttnInputs, AttnOutput, AttnShape, KvLists, View, dot_f64, keys_of_row, validate,
    validate_lse, validate_rows,
};
use crate::element::Element;
use rayon::prelude::*;

/// Output and LSE. `lists` restricts each group's keys; None is dense attention.
pub fn forward<T: Element>(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, T>,
    lists: Option<&KvLists<'_>>,
) -> Result<AttnOutput<f64>, AttnError> {
    validate(shape, inputs, lists)?;
    let dim = shape.head_dim;
    let mut output = AttnOutput { out: vec![0.0; shape.q_len()], lse: vec![0.0; shape.lse_len()] };
    // Row r of packed [B, Sq, H, D] is (b, i, h).
    let lse: Vec<f64> = output
        .out
        .par_chunks_mut(dim)
        .enumerate()
        .map(|(r, out)| {
            let (b, i, h) = split(shape, r);
            let (keys, p, lse) = softmax_row(shape, inputs, lists, b, h, i);
            for (&j, p) in keys.iter().zip(&p) {
                let v = inputs.v.row(b, j, shape.kv_head(h), dim);
                for d in 0..dim {
                    out[d] += p * v[d].to_f64();
                }
            }
            lse
        })
        .collect();
    for (r, lse) in lse.into_iter().enumerate() {
        let (b, i, h) = split(shape, r);
        output.lse[(b * shape.num_heads + h) * shape.seqlen_q + i] = lse;
    }
    Ok(output)
}

/// Gradients of `sum(dout * out) + sum(d_lse * lse)`: `dout` as [B, Sq, H, D], `d_lse` as [B, H, Sq].
pub fn backward<T: Element, G: Element>(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, T>,
    lists: Option<&KvLists<'_>>,
    dout: &View<'_, G>,
    d_lse: Option<&[G]>,
) -> Result<AttnGrads<f64>, AttnError> {
    validate(shape, inputs, lists)?;
    validate_rows(shape, "dout", dout)?;
    if let Some(d_lse) = d_lse {
        validate_lse(shape, "d_lse", d_lse)?;
    }
    let dim = shape.head_dim;
    let lse_at = |b: usize, h: usize, i: usize| (b * shape.num_heads + h) * shape.seqlen_q + i;
    let d_lse_at = |b, h, i| d_lse.map_or(0.0, |d_lse| d_lse[lse_at(b, h, i)].to_f64());

    // dq, row by row; each row leaves its lse and its delta = sum_j p_ij dp_ij for the other pass.
    let mut dq = vec![0.0; shape.q_len()];
    let statistics: Vec<(f64, f64)> = dq
        .par_chunks_mut(dim)
        .enumerate()
        .map(|(r, dq)| {
            let (b, i, h) = split(shape, r);
            let kv_head = shape.kv_head(h);
            let (keys, p, lse) = softmax_row(shape, inputs, lists, b, h, i);
            let d_out = dout.row(b, i, h, dim);
            let dp: Vec<f64> =
                keys.iter().map(|&j| dot_f64(d_out, inputs.v.row(b, j, kv_head, dim))).collect();
            let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for (n, &j) in keys.iter().enumerate() {
                let ds = p[n] * (dp[n] - delta + d_lse_at(b, h, i));
                let k = inputs.k.row(b, j, kv_head, dim);
                for d in 0..dim {
                    dq[d] += shape.scale * ds * k[d].to_f64();
                }
            }
            (lse, delta)
        })
        .collect();

    // dk and dv, key by key, over all queries of all heads that share the key and list it.
    let visible = visibility(shape, lists);
    let mut dk = vec![0.0; shape.kv_len()];
    let mut dv = vec![0.0; shape.kv_len()];
    dk.par_chunks_mut(dim).zip(dv.par_chunks_mut(dim)).enumerate().for_each(|(r, (dk, dv))| {
        let (b, j, kv_head) = (
            r / (shape.num_kv_heads * shape.seqlen_kv),
            r / shape.num_kv_heads % shape.seqlen_kv,
            r % shape.num_kv_heads,
        );
        let (k, v) = (inputs.k.row(b, j, kv_head, dim), inputs.v.row(b, j, kv_head, dim));
        for h in (0..shape.num_heads).filter(|&h| shape.kv_head(h) == kv_head) {
            for i in (0..shape.seqlen_q).filter(|&i| visible(b, h, i, j)) {
                let (q, d_out) = (inputs.q.row(b, i, h, dim), dout.row(b, i, h, dim));
                let (lse, delta) = statistics[(b * shape.seqlen_q + i) * shape.num_heads + h];
                let p = (shape.scale * dot_f64(q, k) - lse).exp();
                let ds = p * (dot_f64(d_out, v) - delta + d_lse_at(b, h, i));
                for d in 0..dim {
                    dv[d] += p * d_out[d].to_f64();
                    dk[d] += shape.scale * ds * q[d].to_f64();
                }
            }
        }
    });
    Ok(AttnGrads { dq, dk, dv })
}

/// (batch, token, head) of row `r` of a packed [B, Sq, H, D] tensor.
fn split(shape: &AttnShape, r: usize) -> (usize, usize, usize) {
    (r / (shape.num_heads * shape.seqlen_q), r / shape.num_heads % shape.seqlen_q, r % shape.num_heads)
}

/// The keys of a row, their softmax weights, and the LSE; no keys give no weights and -inf.
fn softmax_row<T: Element>(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, T>,
    lists: Option<&KvLists<'_>>,
    b: usize,
    h: usize,
    i: usize,
) -> (Vec<usize>, Vec<f64>, f64) {
    let dim = shape.head_dim;
    let q = inputs.q.row(b, i, h, dim);
    let keys = keys_of_row(shape, lists, b, h, i);
    if keys.is_empty() {
        return (keys, Vec::new(), f64::NEG_INFINITY);
    }
    let s: Vec<f64> =
        keys.iter().map(|&j| shape.scale * dot_f64(q, inputs.k.row(b, j, shape.kv_head(h), dim))).collect();
    let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = max + s.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
    (keys, s.iter().map(|s| (s - lse).exp()).collect(), lse)
}

/// Whether query (b, h, i) attends to key j.
fn visibility(
    shape: &AttnShape,
    lists: Option<&KvLists<'_>>,
) -> impl Fn(usize, usize, usize, usize) -> bool + Sync {
    let (heads, mut group, mut block, mut groups, mut blocks) = (shape.num_heads, 1, 1, 0, 0);
    let mut listed = Vec::new();
    if let Some(lists) = lists {
        let dims = lists.dims(shape.batch, heads, shape.seqlen_q, shape.seqlen_kv);
        (group, block, groups, blocks) = (dims.query_group, dims.kv_block, dims.groups(), dims.blocks());
        listed = vec![false; dims.lists() * blocks];
        for list in 0..dims.lists() {
            for &n in lists.blocks_of(list) {
                listed[list * blocks + n as usize] = true;
            }
        }
    }
    let dense = lists.is_none();
    move |b, h, i, j| dense || listed[((b * heads + h) * groups + i / group) * blocks + j / block]
}
