//! Activations, sums over rows, caption drop-out.

use super::{Math, reduce_rows};
use rayon::prelude::*;

/// Form of the MLP's activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpForm {
    /// `pre [rows, 2 * hidden]`: `out[j] = pre[j] * gelu(pre[hidden + j])`.
    GeGlu,
    /// `pre [rows, hidden]`: `out = gelu(pre)`.
    Gelu,
}

const ROOT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;

/// GELU, tanh form: `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
pub fn gelu<T: Math>(x: T) -> T {
    let inner = T::from_f64(ROOT_2_OVER_PI) * (x + T::from_f64(CUBIC) * x * x * x);
    T::from_f64(0.5) * x * (T::ONE + inner.tanh())
}

/// Derivative of [`gelu`].
pub fn gelu_derivative<T: Math>(x: T) -> T {
    let tanh = (T::from_f64(ROOT_2_OVER_PI) * (x + T::from_f64(CUBIC) * x * x * x)).tanh();
    let inner = T::from_f64(ROOT_2_OVER_PI) * (T::ONE + T::from_f64(3.0 * CUBIC) * x * x);
    T::from_f64(0.5) * (T::ONE + tanh) + T::from_f64(0.5) * x * (T::ONE - tanh * tanh) * inner
}

/// `out [rows, hidden]` from `pre`.
pub fn mlp_act_fwd<T: Math>(form: MlpForm, hidden: usize, pre: &[T], out: &mut [T]) {
    match form {
        MlpForm::Gelu => {
            assert_eq!(pre.len(), out.len());
            out.par_chunks_mut(hidden).zip(pre.par_chunks(hidden)).for_each(|(out, pre)| {
                for (out, &pre) in out.iter_mut().zip(pre) {
                    *out = gelu(pre);
                }
            });
        }
        MlpForm::GeGlu => {
            assert_eq!(pre.len(), 2 * out.len());
            out.par_chunks_mut(hidden).zip(pre.par_chunks(2 * hidden)).for_each(|(out, pre)| {
                let (value, gate) = pre.split_at(hidden);
                for j in 0..hidden {
                    out[j] = value[j] * gelu(gate[j]);
                }
            });
        }
    }
}

/// Gradient of `pre`, written over it: `pre_to_d_pre` holds `pre` on entry; and the activation's output, written over its
/// gradient.
pub fn mlp_act_bwd<T: Math>(form: MlpForm, hidden: usize, d_out_to_out: &mut [T], pre_to_d_pre: &mut [T]) {
    let rows = d_out_to_out.par_chunks_mut(hidden);
    match form {
        MlpForm::Gelu => {
            assert_eq!(pre_to_d_pre.len(), rows.len() * hidden);
            pre_to_d_pre.par_chunks_mut(hidden).zip(rows).for_each(|(pre, d_out)| {
                for (pre, d) in pre.iter_mut().zip(d_out) {
                    let x = *pre;
                    *pre = *d * gelu_derivative(x);
                    *d = gelu(x);
                }
            });
        }
        MlpForm::GeGlu => {
            assert_eq!(pre_to_d_pre.len(), rows.len() * 2 * hidden);
            pre_to_d_pre.par_chunks_mut(2 * hidden).zip(rows).for_each(|(pre, d_out)| {
                let (value, gate) = pre.split_at_mut(hidden);
                for j in 0..hidden {
                    let (v, g, d) = (value[j], gate[j], d_out[j]);
                    value[j] = d * gelu(g);
                    gate[j] = d * v * gelu_derivative(g);
                    d_out[j] = v * gelu(g);
                }
            });
        }
    }
}

fn sigmoid<T: Math>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

/// `out = x * sigmoid(x)`.
pub fn silu_fwd<T: Math>(x: &[T], out: &mut [T]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = x * sigmoid(x);
    }
}

/// `d = d * silu'(x)`, in place.
pub fn silu_bwd<T: Math>(x: &[T], d: &mut [T]) {
    for (d, &x) in d.iter_mut().zip(x) {
        let s = sigmoid(x);
        *d *= s * (T::ONE + x * (T::ONE - s));
    }
}

/// `dst[c] += sum over rows of src[r, c]`, `dst.len()` columns.
pub fn sum_rows<T: Math>(src: &[T], dst: &mut [T]) {
    let width = dst.len();
    let sums = reduce_rows(src.len() / width, width, |row, sums: &mut [T]| {
        for (sum, &v) in sums.iter_mut().zip(&src[row * width..][..width]) {
            *sum += v;
        }
    });
    for (d, &s) in dst.iter_mut().zip(&sums) {
        *d += s;
    }
}

/// `out[b] = null` where `drop[b]` is not 0, else `text[b]`.
pub fn text_select_fwd<T: Math>(drop: &[i32], text: &[T], null: &[T], out: &mut [T]) {
    for (b, out) in out.chunks_mut(null.len()).enumerate() {
        out.copy_from_slice(if drop[b] != 0 { null } else { &text[b * null.len()..][..null.len()] });
    }
}

/// `d_null += d_out[b]` for every dropped `b`.
pub fn text_select_bwd<T: Math>(drop: &[i32], d_out: &[T], d_null: &mut [T]) {
    for (b, d_out) in d_out.chunks(d_null.len()).enumerate() {
        if drop[b] != 0 {
            for (d_null, &d) in d_null.iter_mut().zip(d_out) {
                *d_null += d;
            }
        }
    }
}
