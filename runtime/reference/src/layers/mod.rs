//! The layers of a video DiT and of its training step, forward and backward, once for f32 and f64.
//!
//! Row-major slices, `rows = batch * seqlen`, tokens in the contract's order. Rows run in parallel; sums over
//! rows are formed in chunks of [`CHUNK_ROWS`] rows that are added in order, so no result depends on the number
//! of threads. Wrong lengths panic: they are programming errors.

pub mod eight_bits;
mod flow;
mod norm;
mod optimizer;
mod pointwise;
mod rope;

pub use flow::{
    NoiseKey, PatchDims, flow_loss, flow_prepare, normal, patchify, philox, time_embed, unpatchify,
};
pub use norm::{GateInputs, ModDims, gate_grad, gate_weight, norm_mod_bwd, norm_mod_fwd};
pub use optimizer::{AdamWStep, GradNormResult, adamw, ema, grad_norm};
pub use pointwise::{
    MlpForm, gelu, gelu_derivative, mlp_act_bwd, mlp_act_fwd, silu_bwd, silu_fwd, sum_rows, text_select_bwd,
    text_select_fwd,
};
pub use rope::{QkDims, QkInputs, qk_prep_bwd, qk_prep_fwd, rope_in_place, rope_tables};

use crate::element::Real;
use crate::matrix::{Mat, MatMut, multiply, multiply_add};
use rayon::prelude::*;

/// Rows summed into one partial sum; fixed, so that sums do not depend on the number of threads.
pub const CHUNK_ROWS: usize = 64;

/// Elementary functions that layers need beside [`Real`]'s arithmetic.
pub trait Math: Real + std::ops::Neg<Output = Self> + std::ops::Div<Output = Self> {
    /// `e^self`.
    fn exp(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Whether the value is neither infinite nor NaN.
    fn finite(self) -> bool;
}

macro_rules! math {
    ($type:ty) => {
        impl Math for $type {
            fn exp(self) -> Self {
                self.exp()
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            fn tanh(self) -> Self {
                self.tanh()
            }
            fn finite(self) -> bool {
                self.is_finite()
            }
        }
    };
}
math!(f32);
math!(f64);

/// Which operand of [`matmul`] is stored transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transpose {
    /// `c[m,n] = sum a[m,k] b[k,n]`.
    None,
    /// `c[m,n] = sum a[m,k] b[n,k]`.
    Right,
    /// `c[m,n] = sum a[k,m] b[k,n]`.
    Left,
}

/// `c [m,n] = product`, or `c += product`; packed row-major operands, rows of `c` in parallel tiles of fixed size.
pub fn matmul<T: Math>(
    transpose: Transpose,
    [m, n, k]: [usize; 3],
    a: &[T],
    b: &[T],
    c: &mut [T],
    accumulate: bool,
) {
    assert_eq!((a.len(), b.len(), c.len()), (m * k, k * n, m * n), "matmul {m}x{n}x{k}");
    let rhs = match transpose {
        Transpose::Right => Mat::packed(b, n, k).t(),
        _ => Mat::packed(b, k, n),
    };
    c.par_chunks_mut(CHUNK_ROWS * n.max(1)).enumerate().for_each(|(tile, c)| {
        let (start, rows) = (tile * CHUNK_ROWS, c.len() / n);
        let lhs = match transpose {
            Transpose::Left => Mat::new(&a[start..], k, rows, m).t(),
            _ => Mat::packed(&a[start * k..][..rows * k], rows, k),
        };
        let dst = MatMut::packed(c, rows, n);
        if accumulate {
            multiply_add(dst, T::ONE, lhs, rhs);
        } else {
            multiply(dst, T::ONE, lhs, rhs);
        }
    });
}

/// Sums `f(row, partial)` over `rows` into a vector of `width`, in chunks added in order.
fn reduce_rows<T: Math>(rows: usize, width: usize, f: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    let partials: Vec<Vec<T>> = (0..rows.div_ceil(CHUNK_ROWS))
        .into_par_iter()
        .map(|chunk| {
            let mut partial = vec![T::ZERO; width];
            for row in chunk * CHUNK_ROWS..((chunk + 1) * CHUNK_ROWS).min(rows) {
                f(row, &mut partial);
            }
            partial
        })
        .collect();
    let mut total = vec![T::ZERO; width];
    for partial in &partials {
        for (t, &p) in total.iter_mut().zip(partial) {
            *t += p;
        }
    }
    total
}

#[cfg(test)]
mod tests;
