//! AdamW, gradient norm, averaged weights.

use super::Math;
use rayon::prelude::*;

/// Numbers of one AdamW update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
}

/// One AdamW update of `master` with moments `m`, `v`; gradients are multiplied by `factor` first. A `factor` that
/// is not finite leaves everything as it is.
pub fn adamw<T: Math>(step: &AdamWStep, factor: T, master: &mut [T], grad: &[T], m: &mut [T], v: &mut [T]) {
    if !factor.finite() {
        return;
    }
    let power = i32::try_from(step.step).unwrap_or(i32::MAX);
    let size = T::from_f64(step.lr / (1.0 - step.beta1.powi(power)));
    let root = T::from_f64(1.0 / (1.0 - step.beta2.powi(power)).sqrt());
    let keep = T::from_f64(1.0 - step.lr * step.weight_decay);
    let (beta1, beta2, eps) = (T::from_f64(step.beta1), T::from_f64(step.beta2), T::from_f64(step.eps));
    (master, grad, m, v).into_par_iter().with_min_len(1024).for_each(|(p, &g, m, v)| {
        let g = g * factor;
        *m = beta1 * *m + (T::ONE - beta1) * g;
        *v = beta2 * *v + (T::ONE - beta2) * g * g;
        *p = *p * keep - size * *m / (v.sqrt() * root + eps);
    });
}

/// What [`grad_norm`] finds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradNormResult {
    /// L2 norm over all tensors.
    pub norm: f64,
    /// `min(1, max_norm / (norm + 1e-6))`; NaN where the norm is not finite.
    pub factor: f64,
    /// The first tensor with a gradient that is not finite.
    pub culprit: Option<usize>,
}

/// Norm of flat gradients; tensor `i` is `grad[segments[i]..segments[i + 1]]`.
pub fn grad_norm<T: Math>(grad: &[T], segments: &[usize], max_norm: f64) -> GradNormResult {
    let partial: Vec<f64> =
        grad.par_chunks(4096).map(|g| g.iter().map(|g| g.to_f64() * g.to_f64()).sum()).collect();
    let norm = partial.iter().sum::<f64>().sqrt();
    let culprit = segments
        .windows(2)
        .position(|s| grad[s[0]..s[1]].iter().any(|g| !g.finite()))
        .filter(|_| !norm.is_finite());
    let factor = if norm.is_finite() { (max_norm / (norm + 1e-6)).min(1.0) } else { f64::NAN };
    GradNormResult { norm, factor, culprit }
}

/// `ema = decay * ema + (1 - decay) * master`.
pub fn ema<T: Math>(decay: f64, master: &[T], ema: &mut [T]) {
    let (keep, take) = (T::from_f64(decay), T::from_f64(1.0 - decay));
    ema.par_iter_mut().zip(master).with_min_len(1024).for_each(|(e, &m)| *e = keep * *e + take * m);
}
