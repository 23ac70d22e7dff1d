//! QKV split, QK RMS normalisation and 3D rotary embedding.

use super::{Math, reduce_rows};
use rayon::prelude::*;

/// Cosines and sines `[tokens, dim/2]` of the 3D rotary embedding, in the order of `positions` (t, h, w of each
/// token).
///
/// The `dim/2` pairs are split over the axes: `dim/2/3` pairs each for height and width, the rest for time. Pair
/// `i` of an axis with `n` pairs turns by `position * base^(-i/n)`.
pub fn rope_tables(positions: &[[u32; 3]], dim: usize, base: f64) -> (Vec<f64>, Vec<f64>) {
    let pairs = dim / 2;
    let side = pairs / 3;
    let split = [pairs - 2 * side, side, side];
    let (mut cos, mut sin) = (Vec::with_capacity(positions.len() * pairs), Vec::new());
    for position in positions {
        for (axis, &n) in split.iter().enumerate() {
            for i in 0..n {
                let angle = f64::from(position[axis]) * base.powf(-(i as f64) / n as f64);
                cos.push(angle.cos());
                sin.push(angle.sin());
            }
        }
    }
    (cos, sin)
}

/// Rotates `x [batch, seqlen, vectors, dim]` in place: elements `i` and `i + dim/2` by the angle of pair `i` of
/// the token, backwards when `inverse`.
pub fn rope_in_place<T: Math>(
    seqlen: usize,
    vectors: usize,
    dim: usize,
    cos: &[T],
    sin: &[T],
    inverse: bool,
    x: &mut [T],
) {
    let half = dim / 2;
    x.par_chunks_mut(vectors * dim).enumerate().for_each(|(row, x)| {
        let at = row % seqlen * half;
        for vector in x.chunks_mut(dim) {
            rotate(vector, &cos[at..][..half], &sin[at..][..half], inverse);
        }
    });
}

fn rotate<T: Math>(vector: &mut [T], cos: &[T], sin: &[T], inverse: bool) {
    let (low, high) = vector.split_at_mut(cos.len());
    for i in 0..cos.len() {
        let s = if inverse { -sin[i] } else { sin[i] };
        let (a, b) = (low[i], high[i]);
        low[i] = a * cos[i] - b * s;
        high[i] = b * cos[i] + a * s;
    }
}

/// Sizes of packed QKV `[batch, seqlen, 3, heads, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QkDims {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seqlen: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// What the forward and the backward of Q and K read.
#[derive(Clone, Copy, Debug)]
pub struct QkInputs<'a, T> {
    /// Packed `[batch, seqlen, 3, heads, head_dim]`.
    pub qkv: &'a [T],
    /// RMS weights of Q and K, `[head_dim]` each.
    pub weight: [&'a [T]; 2],
    /// Cosines `[seqlen, head_dim/2]`.
    pub cos: &'a [T],
    /// Sines `[seqlen, head_dim/2]`.
    pub sin: &'a [T],
}

/// `out[part] = rope(rms_norm(part of qkv) * weight)` for Q and K, `[batch, seqlen, heads, head_dim]`; writes
/// `rstd[part] = 1 / sqrt(mean(x^2) + eps)`, `[batch, seqlen, heads]`.
pub fn qk_prep_fwd<T: Math>(
    dims: QkDims,
    eps: f64,
    inputs: QkInputs<'_, T>,
    out: [&mut [T]; 2],
    rstd: [&mut [T]; 2],
) {
    let QkDims { seqlen, heads, head_dim, .. } = dims;
    let width = heads * head_dim;
    let half = head_dim / 2;
    let inverse = T::from_f64(1.0 / head_dim as f64);
    let eps = T::from_f64(eps);
    for (part, (out, rstd)) in out.into_iter().zip(rstd).enumerate() {
        out.par_chunks_mut(width).zip(rstd.par_chunks_mut(heads)).enumerate().for_each(
            |(row, (out, rstd))| {
                let x = &inputs.qkv[(row * 3 + part) * width..][..width];
                let at = row % seqlen * half;
                for (h, out) in out.chunks_mut(head_dim).enumerate() {
                    let x = &x[h * head_dim..][..head_dim];
                    let mut square = T::ZERO;
                    for &v in x {
                        square += v * v;
                    }
                    rstd[h] = T::ONE / (square * inverse + eps).sqrt();
                    for i in 0..head_dim {
                        out[i] = x[i] * rstd[h] * inputs.weight[part][i];
                    }
                    rotate(out, &inputs.cos[at..][..half], &inputs.sin[at..][..half], false);
                }
            },
        );
    }
}

/// Overwrites the Q and K parts of `d_qkv` and adds to `d_weight`, from the gradients `d_out` of rotated Q and K.
pub fn qk_prep_bwd<T: Math>(
    dims: QkDims,
    inputs: QkInputs<'_, T>,
    rstd: [&[T]; 2],
    d_out: [&[T]; 2],
    d_qkv: &mut [T],
    d_weight: [&mut [T]; 2],
) {
    let QkDims { batch, seqlen, heads, head_dim } = dims;
    let width = heads * head_dim;
    let half = head_dim / 2;
    let inverse = T::from_f64(1.0 / head_dim as f64);
    // Gradient of the normalised, weighted vector: the rotation undone.
    let unrotated = |part: usize, row: usize, h: usize| {
        let mut d = d_out[part][row * width + h * head_dim..][..head_dim].to_vec();
        let at = row % seqlen * half;
        rotate(&mut d, &inputs.cos[at..][..half], &inputs.sin[at..][..half], true);
        d
    };
    d_qkv.par_chunks_mut(3 * width).enumerate().for_each(|(row, d_qkv)| {
        for part in 0..2 {
            for h in 0..heads {
                let d = unrotated(part, row, h);
                let x = &inputs.qkv[(row * 3 + part) * width + h * head_dim..][..head_dim];
                let r = rstd[part][row * heads + h];
                let mut dot = T::ZERO;
                for i in 0..head_dim {
                    dot += d[i] * inputs.weight[part][i] * x[i] * r;
                }
                dot *= inverse;
                let d_x = &mut d_qkv[part * width + h * head_dim..][..head_dim];
                for i in 0..head_dim {
                    d_x[i] = r * (d[i] * inputs.weight[part][i] - x[i] * r * dot);
                }
            }
        }
    });
    for (part, d_weight) in d_weight.into_iter().enumerate() {
        let sums = reduce_rows(batch * seqlen, head_dim, |row, sums: &mut [T]| {
            for h in 0..heads {
                let d = unrotated(part, row, h);
                let x = &inputs.qkv[(row * 3 + part) * width + h * head_dim..][..head_dim];
                for i in 0..head_dim {
                    sums[i] += d[i] * x[i] * rstd[part][row * heads + h];
                }
            }
        });
        for (d, &s) in d_weight.iter_mut().zip(&sums) {
            *d += s;
        }
    }
}
