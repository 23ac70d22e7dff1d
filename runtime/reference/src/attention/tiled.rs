//! Attention in f32 for the trainer without a GPU: tiles of queries against tiles of keys, online softmax,
//! products by `gemm`, tasks by `rayon`. Listed keys are gathered into contiguous rows first. Work is cut by the
//! problem alone and partial sums are added in a fixed order, so results do not depend on the number of threads.

use super::{
    AttnError, AttnGrads, AttnInputs, AttnOutput, AttnShape, KvLists, View, validate, validate_lse,
    validate_rows,
};
use crate::matrix::{Mat, MatMut, multiply, multiply_add};
use rayon::prelude::*;

/// Queries of a tile without lists.
const DENSE_ROWS: usize = 64;
/// Most queries of a tile with lists; a tile lies within one group.
const LISTED_ROWS: usize = 128;
/// Keys of a tile: 64 x 512 logits (128 KB) stay in the second-level cache.
const TILE_KEYS: usize = 512;
/// Most parts the queries of one head are cut into in the backward; each part holds its own dk and dv.
const MAX_PARTS: usize = 4;
/// (batch, head) pairs from which a head's queries are not cut.
const ENOUGH_HEADS: usize = 8;

/// Output and LSE. `lists` restricts each group's keys; None is dense attention.
pub fn forward(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, f32>,
    lists: Option<&KvLists<'_>>,
) -> Result<AttnOutput<f32>, AttnError> {
    validate(shape, inputs, lists)?;
    let dim = shape.head_dim;
    let tiles = query_tiles(shape, lists);
    let per_head = tiles.len();
    let results: Vec<(Vec<f32>, Vec<f32>)> = (0..shape.batch * shape.num_heads * per_head)
        .into_par_iter()
        .map_init(Scratch::default, |scratch, task| {
            let (b, h) = (task / per_head / shape.num_heads, task / per_head % shape.num_heads);
            forward_tile(shape, inputs, lists, b, h, tiles[task % per_head], scratch)
        })
        .collect();
    let mut output = AttnOutput { out: vec![0.0; shape.q_len()], lse: vec![0.0; shape.lse_len()] };
    let layout = shape.q_layout();
    for (task, (out, lse)) in results.iter().enumerate() {
        let (b, h) = (task / per_head / shape.num_heads, task / per_head % shape.num_heads);
        let tile = tiles[task % per_head];
        for (row, out) in out.chunks_exact(dim).enumerate() {
            output.out[layout.offset(b, tile.start + row, h)..][..dim].copy_from_slice(out);
        }
        let start = (b * shape.num_heads + h) * shape.seqlen_q + tile.start;
        output.lse[start..start + tile.rows].copy_from_slice(lse);
    }
    Ok(output)
}

/// Gradients of `sum(dout * out) + sum(d_lse * lse)`. `out` and `lse` are what [`forward`] returned for the same
/// inputs and lists (`out` may have any strides); `d_lse` is [B, H, Sq].
pub fn backward(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, f32>,
    lists: Option<&KvLists<'_>>,
    out: &View<'_, f32>,
    lse: &[f32],
    dout: &View<'_, f32>,
    d_lse: Option<&[f32]>,
) -> Result<AttnGrads<f32>, AttnError> {
    validate(shape, inputs, lists)?;
    validate_rows(shape, "out", out)?;
    validate_rows(shape, "dout", dout)?;
    validate_lse(shape, "lse", lse)?;
    if let Some(d_lse) = d_lse {
        validate_lse(shape, "d_lse", d_lse)?;
    }
    let dim = shape.head_dim;
    let tiles = query_tiles(shape, lists);
    let heads = shape.batch * shape.num_heads;
    let parts = if heads >= ENOUGH_HEADS { 1 } else { MAX_PARTS.min(tiles.len()) };
    let part_tiles = |part: usize| &tiles[part * tiles.len() / parts..(part + 1) * tiles.len() / parts];
    let saved = Saved { out, lse, dout, d_lse };
    let partial: Vec<AttnGrads<f32>> = (0..heads * parts)
        .into_par_iter()
        .map_init(Scratch::default, |scratch, task| {
            let (b, h) = (task / parts / shape.num_heads, task / parts % shape.num_heads);
            let tiles = part_tiles(task % parts);
            let rows = tiles.iter().map(|tile| tile.rows).sum::<usize>();
            let mut grads = AttnGrads {
                dq: vec![0.0; rows * dim],
                dk: vec![0.0; shape.seqlen_kv * dim],
                dv: vec![0.0; shape.seqlen_kv * dim],
            };
            let mut done = 0;
            for &tile in tiles {
                let dq = &mut grads.dq[done * dim..(done + tile.rows) * dim];
                backward_tile(
                    shape,
                    inputs,
                    lists,
                    &saved,
                    b,
                    h,
                    tile,
                    dq,
                    &mut grads.dk,
                    &mut grads.dv,
                    scratch,
                );
                done += tile.rows;
            }
            grads
        })
        .collect();

    let mut grads = AttnGrads {
        dq: vec![0.0; shape.q_len()],
        dk: vec![0.0; shape.kv_len()],
        dv: vec![0.0; shape.kv_len()],
    };
    let (q_layout, kv_layout) = (shape.q_layout(), shape.kv_layout());
    for (task, partial) in partial.iter().enumerate() {
        let (b, h) = (task / parts / shape.num_heads, task / parts % shape.num_heads);
        let first = part_tiles(task % parts)[0].start;
        for (row, dq) in partial.dq.chunks_exact(dim).enumerate() {
            grads.dq[q_layout.offset(b, first + row, h)..][..dim].copy_from_slice(dq);
        }
        for (sum, part) in [(&mut grads.dk, &partial.dk), (&mut grads.dv, &partial.dv)] {
            for (row, part) in part.chunks_exact(dim).enumerate() {
                let sum = &mut sum[kv_layout.offset(b, row, shape.kv_head(h))..][..dim];
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
        }
    }
    Ok(grads)
}

/// Consecutive queries of one group.
#[derive(Clone, Copy)]
struct Tile {
    start: usize,
    rows: usize,
}

/// Cuts a sequence's queries into tiles; the same for every (batch, head).
fn query_tiles(shape: &AttnShape, lists: Option<&KvLists<'_>>) -> Vec<Tile> {
    let (group, most) = match lists {
        None => (shape.seqlen_q, DENSE_ROWS),
        Some(lists) => (lists.query_group, LISTED_ROWS),
    };
    let mut tiles = Vec::new();
    let mut start = 0;
    while start < shape.seqlen_q {
        let group_end = ((start / group + 1) * group).min(shape.seqlen_q);
        let rows = most.min(group_end - start);
        tiles.push(Tile { start, rows });
        start += rows;
    }
    tiles
}

/// Buffers a thread reuses from tile to tile; never read before they are written.
#[derive(Default)]
struct Scratch {
    keys: Vec<u32>,
    k: Vec<f32>,
    v: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
    part: Vec<f32>,
}

/// What the forward pass saved, and the gradients that arrive.
struct Saved<'a> {
    out: &'a View<'a, f32>,
    lse: &'a [f32],
    dout: &'a View<'a, f32>,
    d_lse: Option<&'a [f32]>,
}

/// The keys of a tile's group, ascending.
fn list_keys(
    shape: &AttnShape,
    lists: Option<&KvLists<'_>>,
    b: usize,
    h: usize,
    tile: Tile,
    keys: &mut Vec<u32>,
) {
    keys.clear();
    match lists {
        None => keys.extend(0..shape.seqlen_kv as u32),
        Some(lists) => {
            let dims = lists.dims(shape.batch, shape.num_heads, shape.seqlen_q, shape.seqlen_kv);
            let list = (b * shape.num_heads + h) * dims.groups() + tile.start / lists.query_group;
            for &n in lists.blocks_of(list) {
                let range = dims.block_keys(n as usize);
                keys.extend(range.start as u32..range.end as u32);
            }
        }
    }
}

/// The first key, where `keys` are consecutive.
fn consecutive(keys: &[u32]) -> Option<usize> {
    ((keys[keys.len() - 1] - keys[0]) as usize + 1 == keys.len()).then_some(keys[0] as usize)
}

/// Rows `keys` of head `head` as a matrix: in place where they are consecutive, else gathered into `buffer`.
fn rows_of<'a>(
    view: &View<'a, f32>,
    b: usize,
    head: usize,
    dim: usize,
    keys: &[u32],
    buffer: &'a mut Vec<f32>,
) -> Mat<'a, f32> {
    if let Some(first) = consecutive(keys) {
        return Mat::new(view.from(b, first, head), keys.len(), dim, view.layout.seq);
    }
    buffer.clear();
    for &key in keys {
        buffer.extend_from_slice(view.row(b, key as usize, head, dim));
    }
    Mat::packed(buffer, keys.len(), dim)
}

fn forward_tile(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, f32>,
    lists: Option<&KvLists<'_>>,
    b: usize,
    h: usize,
    tile: Tile,
    scratch: &mut Scratch,
) -> (Vec<f32>, Vec<f32>) {
    let (dim, rows, kv_head) = (shape.head_dim, tile.rows, shape.kv_head(h));
    let Scratch { keys, k, v, p, .. } = scratch;
    list_keys(shape, lists, b, h, tile, keys);
    let q = Mat::new(inputs.q.from(b, tile.start, h), rows, dim, inputs.q.layout.seq);
    let mut out = vec![0.0f32; rows * dim];
    let mut max = vec![f32::NEG_INFINITY; rows];
    let mut sum = vec![0.0f32; rows];
    p.resize(p.len().max(rows * TILE_KEYS), 0.0);
    for keys in keys.chunks(TILE_KEYS) {
        let n = keys.len();
        let k = rows_of(&inputs.k, b, kv_head, dim, keys, k);
        let v = rows_of(&inputs.v, b, kv_head, dim, keys, v);
        let p = &mut p[..rows * n];
        multiply(MatMut::packed(p, rows, n), shape.scale as f32, q, k.t());
        for row in 0..rows {
            let p = &mut p[row * n..][..n];
            let tile_max = max_of(p);
            if tile_max > max[row] {
                let shrink = (max[row] - tile_max).exp();
                sum[row] *= shrink;
                out[row * dim..][..dim].iter_mut().for_each(|x| *x *= shrink);
                max[row] = tile_max;
            }
            let max = max[row];
            p.iter_mut().for_each(|s| *s = exp(*s - max));
            sum[row] += sum_of(p);
        }
        multiply_add(MatMut::packed(&mut out, rows, dim), 1.0, Mat::packed(p, rows, n), v);
    }
    for row in 0..rows {
        if keys.is_empty() {
            continue;
        }
        let inverse = 1.0 / sum[row];
        out[row * dim..][..dim].iter_mut().for_each(|x| *x *= inverse);
        max[row] += sum[row].ln();
    }
    (out, max)
}

fn backward_tile(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, f32>,
    lists: Option<&KvLists<'_>>,
    saved: &Saved<'_>,
    b: usize,
    h: usize,
    tile: Tile,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    scratch: &mut Scratch,
) {
    let (dim, rows, kv_head) = (shape.head_dim, tile.rows, shape.kv_head(h));
    let scale = shape.scale as f32;
    let Scratch { keys, k, v, p, ds, part } = scratch;
    list_keys(shape, lists, b, h, tile, keys);
    let first_row = (b * shape.num_heads + h) * shape.seqlen_q + tile.start;
    let lse = &saved.lse[first_row..][..rows];
    // delta_i = <dout_i, out_i> - d_lse_i, so that ds = p * (dp - delta).
    let delta: Vec<f32> = (0..rows)
        .map(|row| {
            let out = saved.out.row(b, tile.start + row, h, dim);
            let dout = saved.dout.row(b, tile.start + row, h, dim);
            let dot: f32 = out.iter().zip(dout).map(|(x, y)| x * y).sum();
            dot - saved.d_lse.map_or(0.0, |d_lse| d_lse[first_row + row])
        })
        .collect();
    let q = Mat::new(inputs.q.from(b, tile.start, h), rows, dim, inputs.q.layout.seq);
    let dout = Mat::new(saved.dout.from(b, tile.start, h), rows, dim, saved.dout.layout.seq);
    for buffer in [&mut *p, &mut *ds] {
        buffer.resize(buffer.len().max(rows * TILE_KEYS), 0.0);
    }
    for keys in keys.chunks(TILE_KEYS) {
        let n = keys.len();
        let k = rows_of(&inputs.k, b, kv_head, dim, keys, k);
        let v = rows_of(&inputs.v, b, kv_head, dim, keys, v);
        let (p, ds) = (&mut p[..rows * n], &mut ds[..rows * n]);
        multiply(MatMut::packed(p, rows, n), scale, q, k.t());
        multiply(MatMut::packed(ds, rows, n), 1.0, dout, v.t());
        for row in 0..rows {
            let (lse, delta) = (lse[row], delta[row]);
            let (p, ds) = (&mut p[row * n..][..n], &mut ds[row * n..][..n]);
            for (p, ds) in p.iter_mut().zip(ds) {
                *p = exp(*p - lse);
                *ds = *p * (*ds - delta);
            }
        }
        let (p, ds) = (Mat::packed(p, rows, n), Mat::packed(ds, rows, n));
        multiply_add(MatMut::packed(dq, rows, dim), scale, ds, k);
        for (sum, scale, weights, other) in [(&mut *dv, 1.0, p, dout), (&mut *dk, scale, ds, q)] {
            if let Some(first) = consecutive(keys) {
                let sum = &mut sum[first * dim..(first + n) * dim];
                multiply_add(MatMut::packed(sum, n, dim), scale, weights.t(), other);
            } else {
                part.resize(part.len().max(n * dim), 0.0);
                let part = &mut part[..n * dim];
                multiply(MatMut::packed(part, n, dim), scale, weights.t(), other);
                for (&key, part) in keys.iter().zip(part.chunks_exact(dim)) {
                    let sum = &mut sum[key as usize * dim..][..dim];
                    sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
            }
        }
    }
}

/// e^x for x <= about 88 to 2 ulp, branch-free so that loops over it become vector code; below -87.3, where
/// e^x leaves the normal numbers, e^-87.3. NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let x = if x < -87.3 { -87.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // x = n ln 2 + r, with ln 2 in two parts so that r is exact to f32
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let poly = 1.0 / 720.0 + r * (1.0 / 5040.0);
    let poly = 1.0 / 120.0 + r * poly;
    let poly = 1.0 / 24.0 + r * poly;
    let poly = 1.0 / 6.0 + r * poly;
    let poly = 0.5 + r * poly;
    let poly = 1.0 + r * (1.0 + r * poly);
    let power = (shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23;
    poly * f32::from_bits(power)
}

/// The largest element; NaN is passed over (it reaches the sum of exponentials instead).
fn max_of(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let chunks = values.chunks_exact(8);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

fn sum_of(values: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let chunks = values.chunks_exact(8);
    let tail: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    lanes.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_where_softmax_needs_it() {
        let mut worst = 0.0f64;
        for step in 0..200_000 {
            let x = -87.0 + step as f32 * (87.5 / 200_000.0);
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.5e-7, "relative error {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) < 1.3e-38 && exp(f32::NEG_INFINITY) < 1.3e-38);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tiles_stay_within_groups() {
        let shape = AttnShape::new(1, 300, 1, 8);
        let count = vec![0; 3];
        let lists = KvLists { query_group: 128, kv_block: 8, max_selected: 0, index: &[], count: &count };
        let cut = |lists| -> Vec<(usize, usize)> {
            query_tiles(&shape, lists).iter().map(|t| (t.start, t.rows)).collect()
        };
        assert_eq!(cut(Some(&lists)), [(0, 128), (128, 128), (256, 44)]);
        assert_eq!(cut(None), [(0, 64), (64, 64), (128, 64), (192, 64), (256, 44)]);
        let wide = KvLists { query_group: 192, ..lists };
        assert_eq!(cut(Some(&wide)), [(0, 128), (128, 64), (192, 108)]);
    }
}
