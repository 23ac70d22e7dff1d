//! The oracle of a variant, the model of the kernels' rounding beside it, and the comparison with both.

use crate::inputs::Inputs;
use dsv_reference::attention::{AttnError, AttnGrads, AttnOutput, lowp, oracle};
use dsv_reference::compare::{Comparison, Verdict, compare};
use dsv_reference::element::Rounding;
use dsv_spec::Dtype;

/// The f64 results of a variant.
#[derive(Clone, Debug)]
pub struct Oracle {
    /// out and LSE.
    pub output: AttnOutput<f64>,
    /// dQ, dK and dV.
    pub grads: AttnGrads<f64>,
}

impl Oracle {
    /// Of these inputs.
    ///
    /// # Errors
    /// What the reference refuses.
    pub fn of(inputs: &Inputs) -> Result<Oracle, AttnError> {
        let (attn, lists) = (inputs.attn(), inputs.lists());
        Ok(Oracle {
            output: oracle::forward(&inputs.shape, &attn, lists.as_ref())?,
            grads: oracle::backward(
                &inputs.shape,
                &attn,
                lists.as_ref(),
                &inputs.d_out(),
                inputs.d_lse.as_deref(),
            )?,
        })
    }
}

/// The forward with a kernel's rounding points: where the tolerance comes from.
#[derive(Clone, Debug)]
pub struct Lowp {
    /// Storage dtype of out, dQ, dK and dV.
    pub dtype: Dtype,
    /// out and LSE.
    pub output: AttnOutput<f32>,
}

impl Lowp {
    /// Of these inputs, for a kernel that stores `dtype` and walks the keys in tiles of `block_n`.
    ///
    /// # Errors
    /// What the reference refuses.
    pub fn of(inputs: &Inputs, dtype: Dtype, block_n: usize) -> Result<Lowp, AttnError> {
        let (attn, lists) = (inputs.attn(), inputs.lists());
        let output = lowp::forward(&inputs.shape, &attn, lists.as_ref(), dtype, block_n)?;
        Ok(Lowp { dtype, output })
    }

    /// The backward that follows.
    ///
    /// # Errors
    /// What the reference refuses.
    pub fn grads(&self, inputs: &Inputs) -> Result<LowpGrads, AttnError> {
        let (attn, lists) = (inputs.attn(), inputs.lists());
        let d_lse = inputs.d_lse.as_deref();
        let grads = lowp::backward(
            &inputs.shape,
            &attn,
            lists.as_ref(),
            &self.output,
            &inputs.d_out(),
            d_lse,
            self.dtype,
        )?;
        Ok(LowpGrads { dtype: self.dtype, grads })
    }
}

/// The backward with a kernel's rounding points.
#[derive(Clone, Debug)]
pub struct LowpGrads {
    /// Storage dtype of dQ, dK and dV.
    pub dtype: Dtype,
    /// dQ, dK and dV.
    pub grads: AttnGrads<f32>,
}

/// Errors that the model's own distance from the oracle does not show, each with the rounding step responsible.
#[derive(Clone, Copy, Debug, Default)]
struct Floors {
    lse: f64,
    dq: f64,
    dk: f64,
}

impl Floors {
    /// A tensor core sums a product of `head_dim` terms in `head_dim / 16` steps, each cut to f32 at the magnitude of
    /// the running sum; the model adds eight lanes, of which a large term touches one.
    ///
    /// * LSE takes the error of the logits.
    /// * dS = P (dP - delta): where one key holds all the mass, dP and delta cancel exactly in the oracle, and in the
    ///   model, which sums both in the same order; a kernel is left with the difference of two roundings.
    fn of(inputs: &Inputs) -> Floors {
        let s = &inputs.shape;
        let norm = |rows: &[f32]| {
            rows.chunks_exact(s.head_dim)
                .map(|row| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt())
                .fold(0.0, f64::max)
        };
        let largest = |rows: &[f32]| rows.iter().map(|&x| f64::from(x.abs())).fold(0.0, f64::max);
        let steps = s.head_dim as f64 / 16.0;
        let ds = steps * Dtype::F32.ulp(norm(&inputs.d_out) * norm(&inputs.v));
        Floors {
            lse: s.scale * steps * Dtype::F32.ulp(norm(&inputs.q) * norm(&inputs.k)),
            // Probabilities of a row sum to 1; over a key's column, errors of random sign grow with the root.
            dq: ds * s.scale * largest(&inputs.k),
            dk: ds * s.scale * largest(&inputs.q) * (s.seqlen_q as f64).sqrt(),
        }
    }
}

/// Widens a tolerance and judges again.
fn widen(mut c: Comparison, floor: f64) -> Comparison {
    c.max_allowed += floor;
    c.rms_allowed += floor / 4.0;
    if matches!(c.verdict, Verdict::MaxError | Verdict::RmsError) {
        c.verdict = if c.max_error > c.max_allowed {
            Verdict::MaxError
        } else if c.rms_error > c.rms_allowed {
            Verdict::RmsError
        } else {
            Verdict::Pass
        };
    }
    c
}

/// Widens tolerances for an engine whose products are single f32 sums, term after term: at a logit of +-180 each of
/// `head_dim` sums rounds at that magnitude, and the error of the logit is a relative error of every probability. The
/// first column's largest product is that logit where all are +-180; of queries times 16 it is what a sum of a few terms
/// has reached.
pub fn widen_for_sequential_logits(inputs: &Inputs, results: Vec<Comparison>) -> Vec<Comparison> {
    let s = &inputs.shape;
    let largest = inputs.q.chunks_exact(s.head_dim).map(|q| f64::from(q[0].abs())).fold(0.0, f64::max)
        * inputs.k.chunks_exact(s.head_dim).map(|k| f64::from(k[0].abs())).fold(0.0, f64::max);
    let logit = s.scale * Dtype::F32.ulp(largest) * (s.head_dim as f64).sqrt();
    results
        .into_iter()
        .map(|c| {
            let floor = 2.0 * logit * c.max_reference;
            widen(c, floor)
        })
        .collect()
}

/// out and LSE against the oracle, one line each.
pub fn compare_output(
    inputs: &Inputs,
    oracle: &Oracle,
    lowp: &Lowp,
    found: &AttnOutput<f32>,
) -> Vec<Comparison> {
    let s = &inputs.shape;
    let rows = [s.batch, s.seqlen_q, s.num_heads, s.head_dim];
    let (exact, model) = (&oracle.output, &lowp.output);
    let lse =
        compare("lse", &[s.batch, s.num_heads, s.seqlen_q], &found.lse, &exact.lse, &model.lse, Dtype::F32);
    vec![
        compare("out", &rows, &found.out, &exact.out, &model.out, lowp.dtype),
        widen(lse, Floors::of(inputs).lse),
    ]
}

/// dQ, dK and dV against the oracle, one line each.
pub fn compare_grads(
    inputs: &Inputs,
    oracle: &Oracle,
    lowp: &LowpGrads,
    found: &AttnGrads<f32>,
) -> Vec<Comparison> {
    let s = &inputs.shape;
    let rows = [s.batch, s.seqlen_q, s.num_heads, s.head_dim];
    let kv_rows = [s.batch, s.seqlen_kv, s.num_kv_heads, s.head_dim];
    let (exact, model) = (&oracle.grads, &lowp.grads);
    let floors = Floors::of(inputs);
    vec![
        widen(compare("dq", &rows, &found.dq, &exact.dq, &model.dq, lowp.dtype), floors.dq),
        widen(compare("dk", &kv_rows, &found.dk, &exact.dk, &model.dk, lowp.dtype), floors.dk),
        compare("dv", &kv_rows, &found.dv, &exact.dv, &model.dv, lowp.dtype),
    ]
}

/// The lines of comparisons, for people.
pub fn lines(comparisons: &[Comparison]) -> String {
    comparisons.iter().map(|c| format!("  {c}")).collect::<Vec<_>>().join("\n")
}
