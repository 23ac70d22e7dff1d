//! LayerNorm with adaptive modulation, and the gated residual.

use super::{Math, reduce_rows};
use rayon::prelude::*;

/// Sizes of a token matrix `[batch, seqlen, dim]` and of the modulation `[batch, chunks, dim]` that acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModDims {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seqlen: usize,
    /// Width of a token.
    pub dim: usize,
    /// Vectors of width `dim` per sequence in the modulation.
    pub chunks: usize,
}

impl ModDims {
    fn vector<'a, T>(&self, modulation: &'a [T], batch: usize, chunk: usize) -> &'a [T] {
        &modulation[(batch * self.chunks + chunk) * self.dim..][..self.dim]
    }
    fn check<T>(&self, x: &[T], modulation: &[T], chunk: usize) {
        assert_eq!(x.len(), self.batch * self.seqlen * self.dim, "token matrix of {self:?}");
        assert_eq!(modulation.len(), self.batch * self.chunks * self.dim, "modulation of {self:?}");
        assert!(chunk < self.chunks, "chunk {chunk} of {self:?}");
    }
}

/// `out = (x - mean) * rstd * (1 + scale) + shift`; writes `mean [rows]` and `rstd [rows]`, where
/// `rstd = 1 / sqrt(var + eps)` with the population variance. `shift` and `scale` are chunk numbers.
pub fn norm_mod_fwd<T: Math>(
    dims: ModDims,
    (shift, scale): (usize, usize),
    eps: f64,
    x: &[T],
    modulation: &[T],
    out: &mut [T],
    mean: &mut [T],
    rstd: &mut [T],
) {
    dims.check(x, modulation, shift.max(scale));
    let inverse = T::from_f64(1.0 / dims.dim as f64);
    let eps = T::from_f64(eps);
    (out.par_chunks_mut(dims.dim), x.par_chunks(dims.dim), mean.par_iter_mut(), rstd.par_iter_mut())
        .into_par_iter()
        .enumerate()
        .for_each(|(row, (out, x, mean, rstd))| {
            let b = row / dims.seqlen;
            let mut sum = T::ZERO;
            for &v in x {
                sum += v;
            }
            *mean = sum * inverse;
            let mut square = T::ZERO;
            for &v in x {
                square += (v - *mean) * (v - *mean);
            }
            *rstd = T::ONE / (square * inverse + eps).sqrt();
            let (shift, scale) = (dims.vector(modulation, b, shift), dims.vector(modulation, b, scale));
            for i in 0..x.len() {
                out[i] = (x[i] - *mean) * *rstd * (T::ONE + scale[i]) + shift[i];
            }
        });
}

/// Adds the gradient of `x` to `d_x` and overwrites the shift and scale chunks of `d_modulation`.
pub fn norm_mod_bwd<T: Math>(
    dims: ModDims,
    (shift, scale): (usize, usize),
    x: &[T],
    modulation: &[T],
    (mean, rstd): (&[T], &[T]),
    d_out: &[T],
    d_x: &mut [T],
    d_modulation: &mut [T],
) {
    dims.check(x, modulation, shift.max(scale));
    dims.check(d_out, d_modulation, 0);
    let dim = dims.dim;
    let inverse = T::from_f64(1.0 / dim as f64);
    d_x.par_chunks_mut(dim).enumerate().for_each(|(row, d_x)| {
        let scale = dims.vector(modulation, row / dims.seqlen, scale);
        let (x, d_out) = (&x[row * dim..][..dim], &d_out[row * dim..][..dim]);
        let (mean, rstd) = (mean[row], rstd[row]);
        let (mut sum, mut dot) = (T::ZERO, T::ZERO);
        for i in 0..dim {
            let d_norm = d_out[i] * (T::ONE + scale[i]);
            sum += d_norm;
            dot += d_norm * (x[i] - mean) * rstd;
        }
        let (sum, dot) = (sum * inverse, dot * inverse);
        for i in 0..dim {
            let d_norm = d_out[i] * (T::ONE + scale[i]);
            d_x[i] += rstd * (d_norm - sum - (x[i] - mean) * rstd * dot);
        }
    });
    for b in 0..dims.batch {
        let sums = reduce_rows(dims.seqlen, 2 * dim, |s, sums: &mut [T]| {
            let row = b * dims.seqlen + s;
            let (x, d_out) = (&x[row * dim..][..dim], &d_out[row * dim..][..dim]);
            for i in 0..dim {
                sums[i] += d_out[i];
                sums[dim + i] += d_out[i] * (x[i] - mean[row]) * rstd[row];
            }
        });
        for (chunk, sums) in [(shift, &sums[..dim]), (scale, &sums[dim..])] {
            d_modulation[(b * dims.chunks + chunk) * dim..][..dim].copy_from_slice(sums);
        }
    }
}

/// `out = x + gate * y` with chunk `gate` of the modulation, or `x + y` without one.
pub fn residual_fwd<T: Math>(dims: ModDims, gate: Option<(&[T], usize)>, x: &[T], y: &[T], out: &mut [T]) {
    if let Some((modulation, chunk)) = gate {
        dims.check(x, modulation, chunk);
    }
    assert!(x.len() == y.len() && x.len() == out.len(), "residual of {dims:?}");
    out.par_chunks_mut(dims.dim).enumerate().for_each(|(row, out)| {
        let (x, y) = (&x[row * dims.dim..][..dims.dim], &y[row * dims.dim..][..dims.dim]);
        match gate {
            Some((modulation, chunk)) => {
                let gate = dims.vector(modulation, row / dims.seqlen, chunk);
                for i in 0..x.len() {
                    out[i] = x[i] + gate[i] * y[i];
                }
            }
            None => {
                for i in 0..x.len() {
                    out[i] = x[i] + y[i];
                }
            }
        }
    });
}

/// `d_y = gate * d_out`, and overwrites chunk `gate` of `d_modulation` with `sum over tokens of d_out * y`.
pub fn residual_bwd<T: Math>(
    dims: ModDims,
    (modulation, gate): (&[T], usize),
    y: &[T],
    d_out: &[T],
    d_y: &mut [T],
    d_modulation: &mut [T],
) {
    dims.check(y, modulation, gate);
    dims.check(d_out, d_modulation, gate);
    let dim = dims.dim;
    d_y.par_chunks_mut(dim).enumerate().for_each(|(row, d_y)| {
        let gate = dims.vector(modulation, row / dims.seqlen, gate);
        for (i, d_y) in d_y.iter_mut().enumerate() {
            *d_y = gate[i] * d_out[row * dim + i];
        }
    });
    for b in 0..dims.batch {
        let sums = reduce_rows(dims.seqlen, dim, |s, sums: &mut [T]| {
            let row = b * dims.seqlen + s;
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum += d_out[row * dim + i] * y[row * dim + i];
            }
        });
        d_modulation[(b * dims.chunks + gate) * dim..][..dim].copy_from_slice(&sums);
    }
}
