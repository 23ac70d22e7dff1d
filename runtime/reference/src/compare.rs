//! Is a kernel's output right? The tolerance of every numerical test.
//!
//! A tensor passes when `max|out - ref64| <= 2 max|ref_lowp - ref64| + 2 ulp(max|ref64|)`, where `ref_lowp` is
//! the same algorithm with the kernel's rounding points ([`crate::attention::lowp`]) and the ulp is that of the
//! tensor's dtype. The maximum is over the tensor: rounding errors at one coordinate of two right
//! implementations are independent, only their size is the same. Because a maximum alone would let a wrong but
//! small part pass, the root mean square of the error must also stay within the same bound taken of the root
//! mean squares. NaN and infinity patterns are compared first and must be exactly those of `ref64`.

use crate::element::Rounding;
use dsv_spec::Dtype;

/// Where and how far two values differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Worst {
    /// Coordinate, one number a dimension.
    pub at: Vec<usize>,
    /// Value under test.
    pub out: f64,
    /// Oracle.
    pub reference: f64,
    /// Low-dtype model.
    pub lowp: f64,
}

/// What the comparison found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Within tolerance.
    Pass,
    /// NaN or infinity where the oracle has none, or the other way round (first such coordinate in `worst`).
    Pattern {
        /// Coordinates at which the patterns differ.
        differing: usize,
    },
    /// The low-precision model is not finite where the oracle is: the case overflows the dtype and tests nothing.
    Overflow,
    /// The largest error is above the bound.
    MaxError,
    /// The root mean square of the error is above the bound.
    RmsError,
}

/// The result for one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Name of the tensor (`out`, `lse`, `dq`, ...).
    pub name: String,
    /// dtype of the tensor.
    pub dtype: Dtype,
    /// Pass, or the reason it failed.
    pub verdict: Verdict,
    /// Coordinate of the largest error, or the first of a differing pattern.
    pub worst: Worst,
    /// max|out - ref64|.
    pub max_error: f64,
    /// max|ref_lowp - ref64|.
    pub lowp_max_error: f64,
    /// 2 max|ref_lowp - ref64| + 2 ulp(max|ref64|).
    pub max_allowed: f64,
    /// Root mean square of out - ref64.
    pub rms_error: f64,
    /// Bound on the root mean square.
    pub rms_allowed: f64,
    /// max|ref64| over finite values.
    pub max_reference: f64,
}

impl Comparison {
    /// Whether the tensor is within tolerance.
    pub fn passed(&self) -> bool {
        self.verdict == Verdict::Pass
    }
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = match &self.verdict {
            Verdict::Pass => "ok".to_string(),
            Verdict::Pattern { differing } => format!("WRONG: NaN/inf pattern differs at {differing}"),
            Verdict::Overflow => "WRONG CASE: the dtype overflows in the low-precision model".to_string(),
            Verdict::MaxError => "WRONG: largest error".to_string(),
            Verdict::RmsError => "WRONG: rms error".to_string(),
        };
        write!(
            f,
            "{:<6} {} {verdict}; max {:.3e} <= {:.3e} (lowp {:.3e}), rms {:.3e} <= {:.3e}, max|ref| {:.3e}; \
             worst at {:?}: out {:e}, ref {:e}, lowp {:e}",
            self.name,
            self.dtype,
            self.max_error,
            self.max_allowed,
            self.lowp_max_error,
            self.rms_error,
            self.rms_allowed,
            self.max_reference,
            self.worst.at,
            self.worst.out,
            self.worst.reference,
            self.worst.lowp,
        )
    }
}

/// Tensors outside tolerance, one line each.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{count} of {total} tensors are outside tolerance\n{lines}")]
pub struct OutsideTolerance {
    count: usize,
    total: usize,
    lines: String,
}

/// Ok where every comparison passed; otherwise all lines, the passing ones included.
pub fn all_passed(results: &[Comparison]) -> Result<(), OutsideTolerance> {
    let count = results.iter().filter(|r| !r.passed()).count();
    if count == 0 {
        return Ok(());
    }
    let lines = results.iter().map(|r| format!("  {r}")).collect::<Vec<_>>().join("\n");
    Err(OutsideTolerance { count, total: results.len(), lines })
}

/// Compares one tensor of shape `dims` (row-major; its product is the length of all three) with the oracle.
/// `dtype` is the dtype the tensor is stored in. Panics where the lengths differ.
pub fn compare(
    name: &str,
    dims: &[usize],
    out: &[f32],
    reference: &[f64],
    lowp: &[f32],
    dtype: Dtype,
) -> Comparison {
    let len: usize = dims.iter().product();
    assert!(
        out.len() == len && reference.len() == len && lowp.len() == len,
        "{name}: shape {dims:?} has {len} elements, but out {}, ref64 {}, ref_lowp {}",
        out.len(),
        reference.len(),
        lowp.len()
    );
    let worst = |i: usize| {
        let mut rest = i;
        let mut at = vec![0; dims.len()];
        for (slot, &size) in at.iter_mut().zip(dims).rev() {
            *slot = rest % size.max(1);
            rest /= size.max(1);
        }
        Worst { at, out: f64::from(out[i]), reference: reference[i], lowp: f64::from(lowp[i]) }
    };
    let same_pattern = |a: f64, b: f64| {
        if b.is_finite() { a.is_finite() } else { (a.is_nan() && b.is_nan()) || a == b }
    };
    let mut result = Comparison {
        name: name.to_string(),
        dtype,
        verdict: Verdict::Pass,
        worst: Worst { at: vec![0; dims.len()], out: 0.0, reference: 0.0, lowp: 0.0 },
        max_error: 0.0,
        lowp_max_error: 0.0,
        max_allowed: 0.0,
        rms_error: 0.0,
        rms_allowed: 0.0,
        max_reference: 0.0,
    };
    let differing = |values: &[f32]| -> Vec<usize> {
        (0..len).filter(|&i| !same_pattern(f64::from(values[i]), reference[i])).collect()
    };
    let (wrong, overflow) = (differing(out), differing(lowp));
    if let Some(&first) = wrong.first() {
        result.verdict = Verdict::Pattern { differing: wrong.len() };
        result.worst = worst(first);
        result.max_error = f64::INFINITY;
        return result;
    }
    if let Some(&first) = overflow.first() {
        result.verdict = Verdict::Overflow;
        result.worst = worst(first);
        return result;
    }
    let (mut sum, mut lowp_sum, mut reference_sum, mut finite) = (0.0, 0.0, 0.0, 0usize);
    let mut at = None;
    for i in (0..len).filter(|&i| reference[i].is_finite()) {
        let error = (f64::from(out[i]) - reference[i]).abs();
        let lowp_error = (f64::from(lowp[i]) - reference[i]).abs();
        if at.is_none() || error > result.max_error {
            result.max_error = error;
            at = Some(i);
        }
        result.lowp_max_error = result.lowp_max_error.max(lowp_error);
        result.max_reference = result.max_reference.max(reference[i].abs());
        sum += error * error;
        lowp_sum += lowp_error * lowp_error;
        reference_sum += reference[i] * reference[i];
        finite += 1;
    }
    let Some(at) = at else {
        return result;
    };
    let rms = |sum: f64| (sum / finite as f64).sqrt();
    result.worst = worst(at);
    result.max_allowed = 2.0 * result.lowp_max_error + 2.0 * dtype.ulp(result.max_reference);
    result.rms_error = rms(sum);
    result.rms_allowed = 2.0 * rms(lowp_sum) + 2.0 * dtype.ulp(rms(reference_sum));
    if result.max_error > result.max_allowed {
        result.verdict = Verdict::MaxError;
    } else if result.rms_error > result.rms_allowed {
        result.verdict = Verdict::RmsError;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> (Vec<f32>, Vec<f64>, Vec<f32>) {
        let reference: Vec<f64> = (0..24).map(|i| 1.0 + 0.01 * f64::from(i)).collect();
        let lowp: Vec<f32> = reference.iter().map(|&x| Dtype::Bf16.round(x as f32)).collect();
        (lowp.clone(), reference, lowp)
    }

    #[test]
    fn rounded_values_pass_and_a_wrong_one_is_located() {
        let (mut out, reference, lowp) = tensors();
        let dims = [2, 3, 4];
        assert!(compare("out", &dims, &out, &reference, &lowp, Dtype::Bf16).passed());
        out[17] += 0.1;
        let result = compare("out", &dims, &out, &reference, &lowp, Dtype::Bf16);
        assert_eq!(result.verdict, Verdict::MaxError);
        assert_eq!(result.worst.at, [1, 1, 1]);
        let text = all_passed(&[result]).unwrap_err().to_string();
        assert!(text.starts_with("1 of 1 tensors are outside tolerance\n  out"), "{text}");
        assert!(text.contains("worst at [1, 1, 1]"), "{text}");
    }

    #[test]
    fn a_wrong_small_part_fails_by_rms() {
        // Three quarters of the tensor are tiny and all doubled: hidden from the maximum, not from the rms.
        let reference: Vec<f64> = (0..400).map(|i| if i == 0 { 1.0 } else { 1e-2 }).collect();
        let lowp: Vec<f32> = reference.iter().map(|&x| Dtype::Bf16.round(x as f32)).collect();
        let mut out = lowp.clone();
        out.iter_mut().skip(1).for_each(|x| *x *= 1.5);
        let result = compare("dq", &[400], &out, &reference, &lowp, Dtype::Bf16);
        assert_eq!(result.verdict, Verdict::RmsError, "{result}");
    }

    #[test]
    fn patterns_come_first() {
        let (mut out, mut reference, mut lowp) = tensors();
        out[5] = f32::NAN;
        let result = compare("lse", &[24], &out, &reference, &lowp, Dtype::F32);
        assert_eq!(result.verdict, Verdict::Pattern { differing: 1 });
        assert_eq!(result.worst.at, [5]);
        // -inf where the oracle says so is right; +inf is not.
        for x in [&mut out, &mut lowp] {
            x[5] = f32::NEG_INFINITY;
        }
        reference[5] = f64::NEG_INFINITY;
        assert!(compare("lse", &[24], &out, &reference, &lowp, Dtype::Bf16).passed());
        out[5] = f32::INFINITY;
        assert!(!compare("lse", &[24], &out, &reference, &lowp, Dtype::Bf16).passed());
        out[5] = 0.0;
        assert!(!compare("lse", &[24], &out, &reference, &lowp, Dtype::Bf16).passed());
    }

    #[test]
    fn the_dtype_sets_the_slack() {
        let reference = vec![1.0f64; 8];
        let lowp = vec![1.0f32; 8];
        let out = vec![1.0f32 + 1.0 / 256.0; 8];
        assert!(compare("out", &[8], &out, &reference, &lowp, Dtype::Bf16).passed());
        assert!(!compare("out", &[8], &out, &reference, &lowp, Dtype::F16).passed());
    }
}
