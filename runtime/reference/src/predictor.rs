//! The predictor's loss and gradients over all queries and keys (the DSV paper compares sampled
//! score rows; here no product of S x S is made).
//!
//! For query i of a head, over the keys j:
//!
//! ```text
//! a_j = <q_lr_i, k_lr_j> - mean over keys            predicted scaled logits, centred
//! b_j = scale <q_i, k_j> - mean over keys            true scaled logits, centred
//! loss_i = 0.95 (1 - cos(a, b)) + 0.05 (|a| / |b| - 1)^2
//! ```
//!
//! The loss is the mean of loss_i over queries, heads and sequences; q and k are constants. Since b carries
//! `scale`, the predicted scores are scaled logits too: their softmax approximates attention's.
//!
//! **Zero norms.** |a|^2 is replaced by |a|^2 + [`NORM_EPSILON`] |b|^2, which keeps loss and gradient finite
//! where the prediction is constant over the keys and changes neither by more than rounding where |a| is near
//! |b|. A row whose true logits do not differ (|b|^2 <= [`FLAT_ROW`]) ranks nothing: its loss and gradient are
//! zero, and it still counts in the mean.
//!
//! [`definition`] forms every a and b, O(S^2), in f64. [`gram`] needs only the Gram matrices of the centred keys
//! (rank x rank, rank x D, D x D a head) and is what the trainer uses.

use crate::attention::{AttnError, AttnShape, View};
use crate::element::{Element, Real};
use crate::matrix::{Mat, MatMut, multiply, multiply_add};
use rayon::prelude::*;

/// Weight of 1 - cos: direction, for top-k.
pub const COSINE_WEIGHT: f64 = 0.95;
/// Weight of (|a| / |b| - 1)^2: size, for top-p.
pub const NORM_WEIGHT: f64 = 0.05;
/// Share of |b|^2 added to |a|^2.
pub const NORM_EPSILON: f64 = 1e-6;
/// |b|^2 (squared scaled logits summed over the keys) up to which a row ranks nothing.
pub const FLAT_ROW: f64 = 1e-10;

/// The predictor's rows and the attention rows they imitate.
#[derive(Clone, Copy, Debug)]
pub struct PredictorInputs<'a, T> {
    /// [B, Sq, H, rank].
    pub q_lr: View<'a, T>,
    /// [B, Skv, H, rank], per query head.
    pub k_lr: View<'a, T>,
    /// [B, Sq, H, D], after QK-norm and RoPE; a constant.
    pub q: View<'a, T>,
    /// [B, Skv, Hkv, D], after QK-norm and RoPE; a constant.
    pub k: View<'a, T>,
}

/// How well one head is predicted: means over its queries and all sequences.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadFit {
    /// Mean loss.
    pub loss: f64,
    /// Mean cosine between predicted and true centred logits.
    pub cosine: f64,
    /// Mean |a| / |b|.
    pub norm_ratio: f64,
}

/// Loss and gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct PredictorLoss<T> {
    /// Mean over queries, heads and sequences.
    pub loss: f64,
    /// Per query head, `[H]`.
    pub heads: Vec<HeadFit>,
    /// Gradient of `loss`, packed [B, Sq, H, rank].
    pub d_q_lr: Vec<T>,
    /// Gradient of `loss`, packed [B, Skv, H, rank].
    pub d_k_lr: Vec<T>,
}

/// One row's loss and its derivatives by a.a and a.b, from the three products (b.b is a constant).
#[derive(Clone, Copy, Default)]
struct Row {
    loss: f64,
    cosine: f64,
    norm_ratio: f64,
    by_aa: f64,
    by_ab: f64,
}

impl Row {
    fn new(aa: f64, ab: f64, bb: f64) -> Self {
        if bb <= FLAT_ROW {
            return Row::default();
        }
        // A Gram form may come out a rounding error below zero.
        let aa = aa.max(0.0) + NORM_EPSILON * bb;
        let norms = (aa * bb).sqrt();
        let (cosine, norm_ratio) = (ab / norms, (aa / bb).sqrt());
        Row {
            loss: COSINE_WEIGHT * (1.0 - cosine) + NORM_WEIGHT * (norm_ratio - 1.0).powi(2),
            cosine,
            norm_ratio,
            by_aa: 0.5 * COSINE_WEIGHT * cosine / aa + NORM_WEIGHT * (norm_ratio - 1.0) / norms,
            by_ab: -COSINE_WEIGHT / norms,
        }
    }
}

/// One (batch, head): sums over its queries, gradients of the whole loss as [Sq, rank] and [Skv, rank].
struct HeadPart<T> {
    sums: HeadFit,
    d_q_lr: Vec<T>,
    d_k_lr: Vec<T>,
}

impl<T> HeadPart<T> {
    fn add(&mut self, row: Row) {
        self.sums.loss += row.loss;
        self.sums.cosine += row.cosine;
        self.sums.norm_ratio += row.norm_ratio;
    }
}

fn check<T>(shape: &AttnShape, rank: usize, inputs: &PredictorInputs<'_, T>) -> Result<(), AttnError> {
    shape.validate()?;
    if rank == 0 {
        return Err(AttnError::ZeroSize { name: "rank" });
    }
    let AttnShape { batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads, head_dim, .. } = *shape;
    inputs.q_lr.check("q_lr", batch, seqlen_q, num_heads, rank)?;
    inputs.k_lr.check("k_lr", batch, seqlen_kv, num_heads, rank)?;
    inputs.q.check("q", batch, seqlen_q, num_heads, head_dim)?;
    inputs.k.check("k", batch, seqlen_kv, num_kv_heads, head_dim)
}

/// Runs `part` for every (batch, head) and puts the results together in a fixed order.
fn assemble<T: Real>(
    shape: &AttnShape,
    rank: usize,
    part: impl Fn(usize, usize) -> HeadPart<T> + Sync,
) -> PredictorLoss<T> {
    let AttnShape { batch, seqlen_q, seqlen_kv, num_heads, .. } = *shape;
    let parts: Vec<HeadPart<T>> =
        (0..batch * num_heads).into_par_iter().map(|slab| part(slab / num_heads, slab % num_heads)).collect();
    let mut result = PredictorLoss {
        loss: 0.0,
        heads: vec![HeadFit { loss: 0.0, cosine: 0.0, norm_ratio: 0.0 }; num_heads],
        d_q_lr: vec![T::ZERO; batch * seqlen_q * num_heads * rank],
        d_k_lr: vec![T::ZERO; batch * seqlen_kv * num_heads * rank],
    };
    let rows = (batch * seqlen_q) as f64;
    for (slab, part) in parts.iter().enumerate() {
        let (b, h) = (slab / num_heads, slab % num_heads);
        let head = &mut result.heads[h];
        head.loss += part.sums.loss / rows;
        head.cosine += part.sums.cosine / rows;
        head.norm_ratio += part.sums.norm_ratio / rows;
        for (to, from, seqlen) in
            [(&mut result.d_q_lr, &part.d_q_lr, seqlen_q), (&mut result.d_k_lr, &part.d_k_lr, seqlen_kv)]
        {
            for (token, row) in from.chunks_exact(rank).enumerate() {
                to[((b * seqlen + token) * num_heads + h) * rank..][..rank].copy_from_slice(row);
            }
        }
    }
    result.loss = result.heads.iter().map(|head| head.loss).sum::<f64>() / num_heads as f64;
    result
}

/// Rows of one head minus their mean over the tokens, packed [seqlen, dim].
fn centred<T: Element, U: Real>(
    view: &View<'_, T>,
    batch: usize,
    head: usize,
    seqlen: usize,
    dim: usize,
) -> Vec<U> {
    let mut mean = vec![0.0f64; dim];
    for token in 0..seqlen {
        for (sum, x) in mean.iter_mut().zip(view.row(batch, token, head, dim)) {
            *sum += x.to_f64();
        }
    }
    mean.iter_mut().for_each(|sum| *sum /= seqlen as f64);
    let mut rows = Vec::with_capacity(seqlen * dim);
    for token in 0..seqlen {
        let row = view.row(batch, token, head, dim).iter().zip(&mean);
        rows.extend(row.map(|(x, mean)| U::from_f64(x.to_f64() - mean)));
    }
    rows
}

/// By the definition: every predicted and true logit, in f64.
pub fn definition<T: Element>(
    shape: &AttnShape,
    rank: usize,
    inputs: &PredictorInputs<'_, T>,
) -> Result<PredictorLoss<f64>, AttnError> {
    check(shape, rank, inputs)?;
    let AttnShape { batch, seqlen_q, seqlen_kv, num_heads, head_dim, scale, .. } = *shape;
    let weight = 1.0 / (batch * seqlen_q * num_heads) as f64;
    let wide = |row: &[T]| -> Vec<f64> { row.iter().map(|x| x.to_f64()).collect() };
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let centre = |row: &mut [f64]| {
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        row.iter_mut().for_each(|x| *x -= mean);
    };
    Ok(assemble(shape, rank, |b, h| {
        let k_lr: Vec<Vec<f64>> = (0..seqlen_kv).map(|j| wide(inputs.k_lr.row(b, j, h, rank))).collect();
        let k: Vec<Vec<f64>> =
            (0..seqlen_kv).map(|j| wide(inputs.k.row(b, j, shape.kv_head(h), head_dim))).collect();
        let mut part = HeadPart {
            sums: HeadFit { loss: 0.0, cosine: 0.0, norm_ratio: 0.0 },
            d_q_lr: vec![0.0; seqlen_q * rank],
            d_k_lr: vec![0.0; seqlen_kv * rank],
        };
        for i in 0..seqlen_q {
            let (q_lr, q) = (wide(inputs.q_lr.row(b, i, h, rank)), wide(inputs.q.row(b, i, h, head_dim)));
            let mut predicted: Vec<f64> = k_lr.iter().map(|k| dot(&q_lr, k)).collect();
            let mut target: Vec<f64> = k.iter().map(|k| scale * dot(&q, k)).collect();
            centre(&mut predicted);
            centre(&mut target);
            let row = Row::new(dot(&predicted, &predicted), dot(&predicted, &target), dot(&target, &target));
            part.add(row);
            // By each predicted logit before it was centred: centring is its own transpose.
            let mut by_logit: Vec<f64> = predicted
                .iter()
                .zip(&target)
                .map(|(a, b)| weight * (2.0 * row.by_aa * a + row.by_ab * b))
                .collect();
            centre(&mut by_logit);
            for (j, by_logit) in by_logit.iter().enumerate() {
                for r in 0..rank {
                    part.d_q_lr[i * rank + r] += by_logit * k_lr[j][r];
                    part.d_k_lr[j * rank + r] += by_logit * q_lr[r];
                }
            }
        }
        part
    }))
}

/// By Gram matrices of the centred keys, with L = K_lr - mean and F = scale (K - mean) of one head:
///
/// ```text
/// a.a = q_lr^T (L^T L) q_lr     a.b = q_lr^T (L^T F) q     b.b = q^T (F^T F) q
/// ```
///
/// The gradient of q_lr follows row by row; that of K_lr goes through the gradients of L^T L and L^T F, and is
/// already centred because F and L are. Sums over rows are in T, the loss itself in f64.
pub fn gram<T: Real>(
    shape: &AttnShape,
    rank: usize,
    inputs: &PredictorInputs<'_, T>,
) -> Result<PredictorLoss<T>, AttnError> {
    check(shape, rank, inputs)?;
    let AttnShape { batch, seqlen_q, seqlen_kv, num_heads, head_dim, .. } = *shape;
    let scale = T::from_f64(shape.scale);
    let weight = 1.0 / (batch * seqlen_q * num_heads) as f64;
    Ok(assemble(shape, rank, |b, h| {
        let low: Vec<T> = centred(&inputs.k_lr, b, h, seqlen_kv, rank);
        let mut full: Vec<T> = centred(&inputs.k, b, shape.kv_head(h), seqlen_kv, head_dim);
        full.iter_mut().for_each(|x| *x *= scale);
        let low = Mat::packed(&low, seqlen_kv, rank);
        let full = Mat::packed(&full, seqlen_kv, head_dim);
        let product = |rows: usize, cols: usize, lhs: Mat<'_, T>, rhs: Mat<'_, T>| -> Vec<T> {
            let mut out = vec![T::ZERO; rows * cols];
            multiply(MatMut::packed(&mut out, rows, cols), T::ONE, lhs, rhs);
            out
        };
        let low_low = product(rank, rank, low.t(), low);
        let low_full = product(rank, head_dim, low.t(), full);
        let full_full = product(head_dim, head_dim, full.t(), full);

        let q_lr = Mat::new(inputs.q_lr.from(b, 0, h), seqlen_q, rank, inputs.q_lr.layout.seq);
        let q = Mat::new(inputs.q.from(b, 0, h), seqlen_q, head_dim, inputs.q.layout.seq);
        let mut by_aa = product(seqlen_q, rank, q_lr, Mat::packed(&low_low, rank, rank));
        let mut by_ab = product(seqlen_q, rank, q, Mat::packed(&low_full, rank, head_dim).t());
        let by_bb = product(seqlen_q, head_dim, q, Mat::packed(&full_full, head_dim, head_dim));

        let mut part = HeadPart {
            sums: HeadFit { loss: 0.0, cosine: 0.0, norm_ratio: 0.0 },
            d_q_lr: vec![T::ZERO; seqlen_q * rank],
            d_k_lr: vec![T::ZERO; seqlen_kv * rank],
        };
        let dot = |a: &[T], b: &[T]| -> f64 { a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum() };
        for i in 0..seqlen_q {
            let x = inputs.q_lr.row(b, i, h, rank);
            let (aa, ab) = (&mut by_aa[i * rank..][..rank], &mut by_ab[i * rank..][..rank]);
            let bb = dot(&by_bb[i * head_dim..][..head_dim], inputs.q.row(b, i, h, head_dim));
            let row = Row::new(dot(aa, x), dot(ab, x), bb);
            part.add(row);
            let (by_row_aa, by_row_ab) = (T::from_f64(weight * row.by_aa), T::from_f64(weight * row.by_ab));
            let two = T::ONE + T::ONE;
            for r in 0..rank {
                part.d_q_lr[i * rank + r] = two * by_row_aa * aa[r] + by_row_ab * ab[r];
                // From here on these hold q_lr weighted by the row's derivatives.
                aa[r] = by_row_aa * x[r];
                ab[r] = by_row_ab * x[r];
            }
        }
        let by_low_low = product(rank, rank, Mat::packed(&by_aa, seqlen_q, rank).t(), q_lr);
        let by_low_full = product(rank, head_dim, Mat::packed(&by_ab, seqlen_q, rank).t(), q);
        multiply(
            MatMut::packed(&mut part.d_k_lr, seqlen_kv, rank),
            T::ONE + T::ONE,
            low,
            Mat::packed(&by_low_low, rank, rank),
        );
        multiply_add(
            MatMut::packed(&mut part.d_k_lr, seqlen_kv, rank),
            T::ONE,
            full,
            Mat::packed(&by_low_full, rank, head_dim).t(),
        );
        part
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Layout;
    use crate::rng::SplitMix64;

    struct Case {
        shape: AttnShape,
        rank: usize,
        q_lr: Vec<f64>,
        k_lr: Vec<f64>,
        q: Vec<f64>,
        k: Vec<f64>,
    }

    impl Case {
        fn new(shape: AttnShape, rank: usize, seed: u64) -> Self {
            let mut rng = SplitMix64::new(seed);
            let mut normals = |len: usize, shift: f64| -> Vec<f64> {
                (0..len).map(|_| f64::from(rng.normal() as f32) * 0.7 + shift).collect()
            };
            Case {
                shape,
                rank,
                q_lr: normals(shape.batch * shape.seqlen_q * shape.num_heads * rank, 0.0),
                k_lr: normals(shape.batch * shape.seqlen_kv * shape.num_heads * rank, 0.3),
                q: normals(shape.q_len(), 0.1),
                k: normals(shape.kv_len(), -0.4),
            }
        }

        fn views<'a, T>(&self, t: [&'a [T]; 4]) -> PredictorInputs<'a, T> {
            let s = &self.shape;
            PredictorInputs {
                q_lr: View::new(t[0], Layout::bshd(s.seqlen_q, s.num_heads, self.rank)),
                k_lr: View::new(t[1], Layout::bshd(s.seqlen_kv, s.num_heads, self.rank)),
                q: View::new(t[2], s.q_layout()),
                k: View::new(t[3], s.kv_layout()),
            }
        }

        fn definition(&self) -> PredictorLoss<f64> {
            let inputs = self.views([&self.q_lr, &self.k_lr, &self.q, &self.k]);
            definition(&self.shape, self.rank, &inputs).unwrap()
        }

        fn gram(&self) -> PredictorLoss<f64> {
            let inputs = self.views([&self.q_lr, &self.k_lr, &self.q, &self.k]);
            gram(&self.shape, self.rank, &inputs).unwrap()
        }

        fn gram_f32(&self) -> PredictorLoss<f32> {
            let narrow = |x: &[f64]| -> Vec<f32> { x.iter().map(|&x| x as f32).collect() };
            let t = [narrow(&self.q_lr), narrow(&self.k_lr), narrow(&self.q), narrow(&self.k)];
            let inputs = self.views([&t[0][..], &t[1], &t[2], &t[3]]);
            gram(&self.shape, self.rank, &inputs).unwrap()
        }
    }

    /// Largest difference relative to the largest element.
    fn relative<T: Element>(exact: &[f64], other: &[T]) -> f64 {
        assert_eq!(exact.len(), other.len());
        let size = exact.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
        exact.iter().zip(other).map(|(a, b)| (a - b.to_f64()).abs()).fold(0.0, f64::max) / size
    }

    #[test]
    fn gradients_match_finite_differences() {
        let case = Case::new(AttnShape::new(2, 5, 4, 6).with_seqlen_kv(9).with_kv_heads(2), 3, 1);
        let result = case.definition();
        for (which, grad) in [&result.d_q_lr, &result.d_k_lr].into_iter().enumerate() {
            assert!(grad.iter().any(|g| g.abs() > 1e-4));
            for at in 0..grad.len() {
                let loss = |step: f64| {
                    let mut case = Case::new(case.shape, case.rank, 1);
                    [&mut case.q_lr, &mut case.k_lr][which][at] += step;
                    case.definition().loss
                };
                let numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5;
                assert!(
                    (numeric - grad[at]).abs() < 1e-9,
                    "tensor {which} element {at}: {numeric} {}",
                    grad[at]
                );
            }
        }
    }

    #[test]
    fn gram_agrees_with_the_definition() {
        for (shape, rank) in [
            (AttnShape::new(2, 5, 4, 6).with_seqlen_kv(9).with_kv_heads(2), 3),
            (AttnShape::new(1, 130, 2, 64).with_seqlen_kv(201), 16),
            (AttnShape::new(1, 1, 1, 8).with_seqlen_kv(40), 4),
            (AttnShape::new(1, 33, 3, 32).with_kv_heads(1), 16),
        ] {
            let case = Case::new(shape, rank, 2);
            let (exact, fast, single) = (case.definition(), case.gram(), case.gram_f32());
            assert!((exact.loss - fast.loss).abs() < 1e-12);
            assert!(relative(&exact.d_q_lr, &fast.d_q_lr) < 1e-11);
            assert!(relative(&exact.d_k_lr, &fast.d_k_lr) < 1e-11);
            assert!((exact.loss - single.loss).abs() < 1e-5);
            assert!(relative(&exact.d_q_lr, &single.d_q_lr) < 1e-5);
            assert!(relative(&exact.d_k_lr, &single.d_k_lr) < 1e-5);
            for (a, b) in exact.heads.iter().zip(&single.heads) {
                assert!((a.cosine - b.cosine).abs() < 1e-5 && (a.norm_ratio - b.norm_ratio).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn a_perfect_prediction_has_no_loss() {
        // rank = head_dim and k_lr = scale k plus any constant row: the logits agree but for their mean.
        let mut case = Case::new(AttnShape::new(1, 20, 2, 8).with_seqlen_kv(30), 8, 3);
        case.q_lr = case.q.clone();
        case.k_lr = case.k.iter().map(|x| x * case.shape.scale + 5.0).collect();
        for result in [case.definition(), case.gram()] {
            assert!(result.loss < 1e-6, "{}", result.loss);
            assert!(result.d_k_lr.iter().chain(&result.d_q_lr).all(|g| g.abs() < 1e-6));
            assert!((result.heads[1].cosine - 1.0).abs() < 1e-6);
        }
        // Twice as large: the direction is right, the norm term alone is left.
        case.k_lr.iter_mut().for_each(|x| *x *= 2.0);
        let result = case.gram();
        assert!((result.loss - NORM_WEIGHT).abs() < 1e-5, "{}", result.loss);
        assert!((result.heads[0].norm_ratio - 2.0).abs() < 1e-5);
        // Opposite: cos = -1.
        case.k_lr.iter_mut().for_each(|x| *x *= -0.5);
        assert!((case.gram().loss - 2.0 * COSINE_WEIGHT).abs() < 1e-5);
    }

    #[test]
    fn a_constant_added_to_all_keys_changes_nothing() {
        let case = Case::new(AttnShape::new(1, 20, 2, 8).with_seqlen_kv(30), 4, 4);
        let mut shifted = Case::new(case.shape, 4, 4);
        shifted.k_lr.iter_mut().for_each(|x| *x += 3.0);
        shifted.k.iter_mut().for_each(|x| *x -= 2.0);
        let (a, b) = (case.gram(), shifted.gram());
        assert!((a.loss - b.loss).abs() < 1e-12);
        assert!(relative(&a.d_q_lr, &b.d_q_lr) < 1e-10);
        assert!(relative(&a.d_k_lr, &b.d_k_lr) < 1e-10);
    }

    #[test]
    fn zero_norms_are_finite() {
        let shape = AttnShape::new(1, 6, 1, 4).with_seqlen_kv(10);
        // Constant prediction: cos = 0, ratio = sqrt(epsilon), and a gradient that leads out of it.
        let mut case = Case::new(shape, 2, 5);
        case.q_lr.fill(0.0);
        let expected = COSINE_WEIGHT + NORM_WEIGHT * (1.0 - NORM_EPSILON.sqrt()).powi(2);
        for result in [case.definition(), case.gram()] {
            assert!((result.loss - expected).abs() < 1e-12);
            assert!(result.d_q_lr.iter().all(|g| g.is_finite() && *g != 0.0));
            assert!(result.d_k_lr.iter().all(|g| g.abs() < 1e-12));
        }
        assert!(case.gram_f32().d_q_lr.iter().all(|g| g.is_finite()));
        // Equal true logits: nothing to learn; so too with a single key.
        let mut case = Case::new(shape, 2, 6);
        case.q.fill(0.0);
        let single = Case::new(shape.with_seqlen_kv(1), 2, 7);
        for case in [case, single] {
            for result in [case.definition(), case.gram()] {
                assert_eq!(result.loss, 0.0);
                assert!(result.d_q_lr.iter().chain(&result.d_k_lr).all(|g| *g == 0.0));
            }
            assert_eq!(case.gram_f32().loss, 0.0);
        }
    }

    #[test]
    fn gradient_descent_learns_the_ranking() {
        // True logits of rank 2 in 8 dimensions; a rank-2 predictor must find them.
        let mut case = Case::new(AttnShape::new(1, 24, 1, 8).with_seqlen_kv(24), 2, 8);
        for row in case.k.chunks_exact_mut(8) {
            row[2..].fill(0.0);
        }
        let before = case.gram().loss;
        for _ in 0..3000 {
            let result = case.gram();
            case.q_lr.iter_mut().zip(&result.d_q_lr).for_each(|(x, g)| *x -= g);
            case.k_lr.iter_mut().zip(&result.d_k_lr).for_each(|(x, g)| *x -= g);
        }
        let after = case.gram().loss;
        assert!(before > 0.5 && after < 0.01, "{before} -> {after}");
    }

    #[test]
    fn faults_are_named() {
        let case = Case::new(AttnShape::new(1, 4, 1, 4), 2, 9);
        let inputs = case.views([&case.q_lr, &case.k_lr, &case.q, &case.k]);
        assert!(matches!(gram(&case.shape, 0, &inputs), Err(AttnError::ZeroSize { name: "rank" })));
        assert!(matches!(
            definition(&case.shape, 3, &inputs),
            Err(AttnError::TooShort { name: "q_lr", found: 8, needed: 9, .. })
        ));
    }
}
