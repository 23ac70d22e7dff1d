//! LayerNorm with adaptive modulation, and linear maps with a gate.

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

/// Row `r` of `weight [gate.len(), columns]` and of `bias` times `gate[r]`: the weights of `gate * (w a + bias)`.
pub fn gate_weight<T: Math>(
    gate: &[T],
    weight: &[T],
    bias: &[T],
    gated_weight: &mut [T],
    gated_bias: &mut [T],
) {
    let columns = weight.len() / gate.len();
    assert!(weight.len() == gated_weight.len() && gate.len() == bias.len(), "gate_weight of other sizes");
    gated_weight.par_chunks_mut(columns).enumerate().for_each(|(row, out)| {
        for (out, &w) in out.iter_mut().zip(&weight[row * columns..]) {
            *out = gate[row] * w;
        }
    });
    for (row, out) in gated_bias.iter_mut().enumerate() {
        *out = gate[row] * bias[row];
    }
}

/// What `gate_grad` reads of a gated linear map `y = gate * (w a + bias)`.
pub struct GateInputs<'a, T> {
    /// `[rows]`
    pub gate: &'a [T],
    /// `[rows, columns]`
    pub weight: &'a [T],
    /// `[rows]`
    pub bias: &'a [T],
    /// `[rows, columns]`: `sum over tokens of d_y a^T`.
    pub product: &'a [T],
    /// `[rows]`: `sum over tokens of d_y`.
    pub sum: &'a [T],
}

/// Adds to `d_weight` and `d_bias`, overwrites `d_gate`. The output `y` itself is not needed:
/// `sum_t d_y_t (w a_t) = <w, product>` row by row.
pub fn gate_grad<T: Math>(
    inputs: &GateInputs<'_, T>,
    d_weight: &mut [T],
    d_bias: &mut [T],
    d_gate: &mut [T],
) {
    let GateInputs { gate, weight, bias, product, sum } = *inputs;
    let columns = weight.len() / gate.len();
    assert!(product.len() == weight.len() && d_weight.len() == weight.len(), "gate_grad of other sizes");
    d_weight.par_chunks_mut(columns).zip(d_gate.par_iter_mut()).enumerate().for_each(|(row, (d, d_gate))| {
        let (w, p) = (&weight[row * columns..][..columns], &product[row * columns..][..columns]);
        let mut dot = bias[row] * sum[row];
        for i in 0..columns {
            d[i] += gate[row] * p[i];
            dot += w[i] * p[i];
        }
        *d_gate = dot;
    });
    for (row, d) in d_bias.iter_mut().enumerate() {
        *d += gate[row] * sum[row];
    }
}
