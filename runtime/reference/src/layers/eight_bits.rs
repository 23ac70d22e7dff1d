//! AdamW with moments of eight bits, as the kernel `adamw_8bit` computes it: f32 throughout, the same bits.
//!
//! [`BLOCK`] neighbouring values share an f32 scale, the largest of their sizes. A code is a small float relative to it:
//! three bits of mantissa, and of the first moment a sign and four bits of exponent (sizes down to 2^-15), of the second,
//! which is squared, five (down to 2^-30). Why that is stable:
//! * **Rounding is random with the right mean**, by a hash of step and element, so that a run repeats bit for bit. To the
//!   nearest code, a moment would stand still wherever a step moves it by less than half a code (6 %): the second never
//!   falls, for it moves by 1 - beta2.
//! * **No second moment becomes 0 that was not**: below the smallest code it is rounded up, so that no update is divided by
//!   less than it should be. The exponent of the second spans twice that of the first: where a first moment is rounded up to
//!   its smallest code, the update is at most 1.5 times that of the block's largest values.
//! * **The largest value of a block is exact**, and a block is never shared by two tensors.
//!
//! What is decoded is encoded again to the same codes ([`encode`]), so moments may be kept as f32 in between.

use super::AdamWStep;
use rayon::prelude::*;

/// Values that share a scale.
pub const BLOCK: usize = 128;
/// Scales below this are 0: values relative to them would leave the normal range of f32.
const SMALLEST_SCALE: f32 = f32::from_bits((127 - 90) << 23);

/// Which moment a code is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The mean: signed.
    First,
    /// The mean square: at least 0.
    Second,
}

impl Moment {
    /// The code of 1.
    const fn one(self) -> u32 {
        match self {
            Moment::First => 15 << 3,
            Moment::Second => 31 << 3,
        }
    }

    /// What is added to a code to make it the upper twelve bits of an f32.
    const fn base(self) -> u32 {
        (127 << 3) - self.one()
    }

    /// What a code stands for, relative to the scale.
    pub fn value(self, code: u8) -> f32 {
        let (sign, size) = match self {
            Moment::First => (u32::from(code >> 7), u32::from(code & 0x7F)),
            Moment::Second => (0, u32::from(code)),
        };
        let bits = if size == 0 { 0 } else { (size + self.base()) << 20 };
        f32::from_bits(bits | sign << 31)
    }

    /// The code of a value from -1 to 1; between two codes the larger one where `threshold` (16 bits) is below the share of
    /// the way to it.
    pub fn code(self, value: f32, threshold: u32) -> u8 {
        let bits = value.to_bits() & 0x7FFF_FFFF;
        let smallest = (self.base() + 1) << 20;
        let size = if bits >= smallest {
            (bits >> 20) + u32::from(threshold < bits >> 4 & 0xFFFF) - self.base()
        } else {
            match self {
                Moment::First => {
                    let way = f32::from_bits(bits) / f32::from_bits(smallest) * 65_536.0;
                    u32::from((threshold as f32) < way)
                }
                Moment::Second => u32::from(bits > 0),
            }
        };
        let sign = if self == Moment::First && size > 0 { (value.to_bits() >> 24) as u8 & 0x80 } else { 0 };
        size as u8 | sign
    }
}

/// The scale of a block, from the largest of its sizes.
fn scale_of(largest: f32) -> f32 {
    if largest < SMALLEST_SCALE { 0.0 } else { largest }
}

/// A value relative to its block's scale.
fn relative(value: f32, scale: f32) -> f32 {
    if scale > 0.0 { value / scale } else { 0.0 }
}

/// Codes and scales as values.
pub fn decode(moment: Moment, codes: &[u8], scales: &[f32]) -> Vec<f32> {
    codes.iter().enumerate().map(|(i, &code)| moment.value(code) * scales[i / BLOCK]).collect()
}

/// Codes and scales of values, each rounded to the nearest code (of the second moment never to 0): what [`decode`] gave
/// comes back as it was.
pub fn encode(moment: Moment, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let scales: Vec<f32> = values
        .chunks(BLOCK)
        .map(|block| scale_of(block.iter().fold(0.0, |most: f32, x| most.max(x.abs()))))
        .collect();
    // Half of the way: what is further than that is rounded up.
    let code = |(i, &x): (usize, &f32)| moment.code(relative(x, scales[i / BLOCK]), 0x7FFF);
    (values.iter().enumerate().map(code).collect(), scales)
}

/// The numbers of an update as the kernel takes them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Numbers {
    /// `1 - lr weight_decay`.
    pub keep: f32,
    /// `lr / (1 - beta1^step)`.
    pub size: f32,
    /// `1 / sqrt(1 - beta2^step)`.
    pub root: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// What the thresholds of this step are drawn with.
    pub seed: u32,
}

impl From<&AdamWStep> for Numbers {
    fn from(step: &AdamWStep) -> Numbers {
        let power = i32::try_from(step.step).unwrap_or(i32::MAX);
        Numbers {
            keep: (1.0 - step.lr * step.weight_decay) as f32,
            size: (step.lr / (1.0 - step.beta1.powi(power))) as f32,
            root: (1.0 / (1.0 - step.beta2.powi(power)).sqrt()) as f32,
            beta1: step.beta1 as f32,
            beta2: step.beta2 as f32,
            eps: step.eps as f32,
            seed: mixed(step.step as u32 ^ (step.step >> 32) as u32),
        }
    }
}

/// 32 bits that depend on every bit of `x` (MurmurHash3's finaliser).
fn mixed(mut x: u32) -> u32 {
    x = (x ^ x >> 16).wrapping_mul(0x85EB_CA6B);
    x = (x ^ x >> 13).wrapping_mul(0xC2B2_AE35);
    x ^ x >> 16
}

/// Thresholds of an element's first and second moment, 16 bits each.
fn thresholds(seed: u32, element: u64) -> [u32; 2] {
    let hash = mixed(seed ^ (element as u32).wrapping_mul(0x9E37_79B1) ^ (element >> 32) as u32);
    [hash & 0xFFFF, hash >> 16]
}

/// A moment in eight bits: a code for each value, a scale for each [`BLOCK`] of them.
pub type Coded<'a> = (&'a mut [u8], &'a mut [f32]);

/// One AdamW update of `master` with moments `m`, `v`; gradients are multiplied by `factor` first. A `factor` that is not
/// finite leaves everything as it is. `first` is the number of the first element in its set.
///
/// # Panics
/// If the lengths differ, or are no multiple of [`BLOCK`].
pub fn adamw(
    numbers: &Numbers,
    factor: f32,
    first: u64,
    master: &mut [f32],
    grad: &[f32],
    m: Coded<'_>,
    v: Coded<'_>,
) {
    assert!(master.len().is_multiple_of(BLOCK), "{} elements", master.len());
    assert_eq!([grad.len(), m.0.len(), v.0.len(), m.1.len() * BLOCK, v.1.len() * BLOCK], [master.len(); 5]);
    if !factor.is_finite() {
        return;
    }
    let blocks = (
        master.par_chunks_mut(BLOCK),
        grad.par_chunks(BLOCK),
        (m.0.par_chunks_mut(BLOCK), m.1),
        (v.0.par_chunks_mut(BLOCK), v.1),
    );
    blocks.into_par_iter().enumerate().for_each(
        |(block, (master, grad, (m_codes, m_scale), (v_codes, v_scale)))| {
            let (mut m, mut v) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
            let n = numbers;
            for i in 0..BLOCK {
                let g = grad[i] * factor;
                m[i] = n.beta1.mul_add(Moment::First.value(m_codes[i]) * *m_scale, (1.0 - n.beta1) * g);
                v[i] = n.beta2.mul_add(Moment::Second.value(v_codes[i]) * *v_scale, (1.0 - n.beta2) * g * g);
                let update = n.size * m[i] / v[i].sqrt().mul_add(n.root, n.eps);
                master[i] = master[i].mul_add(n.keep, -update);
            }
            *m_scale = scale_of(m.iter().fold(0.0, |most: f32, x| most.max(x.abs())));
            *v_scale = scale_of(v.iter().fold(0.0, |most: f32, x| most.max(*x)));
            for i in 0..BLOCK {
                let [by_m, by_v] = thresholds(n.seed, first + (block * BLOCK + i) as u64);
                m_codes[i] = Moment::First.code(relative(m[i], *m_scale), by_m);
                v_codes[i] = Moment::Second.code(relative(v[i], *v_scale), by_v);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    #[test]
    fn codes_are_ascending_floats_that_end_at_one() {
        for (moment, last, smallest) in
            [(Moment::First, 120u8, 1.125 / 32_768.0), (Moment::Second, 248, 1.125 / 2_147_483_648.0)]
        {
            assert_eq!((moment.value(0), moment.value(1), moment.value(last)), (0.0, smallest, 1.0));
            for code in 1..last {
                let (x, next) = (moment.value(code), moment.value(code + 1));
                assert!(next > x && (code == 1 || next / x <= 1.125), "{moment:?} {code}: {x} {next}");
                // The value of a code is that code whatever the threshold.
                assert!([0, 0x7FFF, 0xFFFF].iter().all(|&t| moment.code(x, t) == code), "{moment:?} {code}");
            }
        }
        assert_eq!(Moment::First.value(120 | 0x80), -1.0);
        assert_eq!(Moment::First.code(-0.75, 0), 0x80 | (14 << 3 | 4));
    }

    #[test]
    fn rounding_has_the_right_mean_and_second_moments_never_vanish() {
        let mut rng = SplitMix64::new(5);
        for x in rng.normals(64, 0.2).into_iter().chain([1e-6, -2e-5]).map(|x| x.clamp(-1.0, 1.0)) {
            // Every threshold once: the mean over a uniform one.
            let mean = |moment: Moment, x: f32| {
                let sum: f64 = (0..=0xFFFF).map(|t| f64::from(moment.value(moment.code(x, t)))).sum();
                sum / 65_536.0
            };
            let off = (mean(Moment::First, x) - f64::from(x)).abs();
            assert!(off <= f64::from(x.abs()) * 2e-5 + 1e-9, "{x}: {off}");
            let off = (mean(Moment::Second, x * x) - f64::from(x * x)).abs();
            assert!(x * x < 1e-9 || off <= f64::from(x * x) * 2e-5, "{x} squared: {off}");
        }
        for tiny in [1e-38, 1e-12, 4e-10] {
            assert!((0..=0xFFFF).all(|t| Moment::Second.code(tiny, t) >= 1));
        }
    }

    #[test]
    fn what_was_decoded_is_encoded_to_the_same_codes() {
        let mut rng = SplitMix64::new(6);
        let mut values = rng.normals(6 * BLOCK, 1.0);
        // Scales over the whole range, a block of zeros, and one whose scale is too small.
        for (block, scale) in [1.0f32, 1e-26, 1e20, 0.0, 1e-30, 3e-5].into_iter().enumerate() {
            values[block * BLOCK..][..BLOCK]
                .iter_mut()
                .enumerate()
                .for_each(|(i, x)| *x *= scale * 0.9f32.powi(i as i32));
        }
        let squares: Vec<f32> = values.iter().map(|x| x.abs()).collect();
        for (moment, values) in [(Moment::First, values), (Moment::Second, squares)] {
            let (codes, scales) = encode(moment, &values);
            let decoded = decode(moment, &codes, &scales);
            assert_eq!(encode(moment, &decoded), (codes.clone(), scales.clone()), "{moment:?}");
            assert_eq!((scales[3], scales[4]), (0.0, 0.0));
            assert!(codes.iter().collect::<std::collections::BTreeSet<_>>().len() > 60, "{moment:?}");
            for (x, y) in values.iter().zip(&decoded).take(BLOCK) {
                assert!((x - y).abs() <= x.abs() / 15.9 || x.abs() < 1e-4, "{moment:?}: {x} as {y}");
            }
        }
    }

    /// Minimises a badly scaled quadratic with noisy gradients; returns the distances from the minimum over the root of its
    /// scale, with moments of f32 and of eight bits.
    fn distances(beta2: f64, steps: u64) -> [f64; 2] {
        let len = 2 * BLOCK;
        let mut rng = SplitMix64::new(7);
        let start = rng.normals(len, 1.0);
        // Curvatures over four decades within a block.
        let curvature: Vec<f32> =
            (0..len).map(|i| 10f32.powf(-4.0 * (i % BLOCK) as f32 / BLOCK as f32)).collect();
        let mut out = [0.0; 2];
        for (which, distance) in out.iter_mut().enumerate() {
            let mut rng = SplitMix64::new(8);
            let mut w = start.clone();
            let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
            let mut coded = [(vec![0u8; len], vec![0.0f32; 2]), (vec![0u8; len], vec![0.0f32; 2])];
            for step in 1..=steps {
                let noise = rng.normals(len, 0.3);
                let grad: Vec<f32> = (0..len).map(|i| curvature[i] * (w[i] + noise[i])).collect();
                let lr = 0.02 * (1.0 - step as f64 / (steps + 1) as f64);
                let numbers = AdamWStep { lr, beta1: 0.9, beta2, eps: 1e-8, weight_decay: 0.0, step };
                let [(mc, ms), (vc, vs)] = &mut coded;
                match which {
                    0 => super::super::adamw(&numbers, 1.0, &mut w, &grad, &mut m, &mut v),
                    _ => adamw(&Numbers::from(&numbers), 1.0, 0, &mut w, &grad, (mc, ms), (vc, vs)),
                }
            }
            *distance = (w.iter().map(|w| f64::from(w * w)).sum::<f64>() / len as f64).sqrt();
        }
        out
    }

    #[test]
    fn eight_bits_converge_as_f32_does() {
        for beta2 in [0.95, 0.99, 0.999] {
            let [exact, coded] = distances(beta2, 600);
            assert!(
                exact < 0.1 && coded < 1.25 * exact,
                "beta2 {beta2}: {coded} from the minimum, f32 {exact}"
            );
        }
    }

    #[test]
    fn a_second_moment_falls_by_less_than_a_code_a_step() {
        // Large gradients, then none but in one element that holds the scale: v decays by 0.999 a step.
        let mut state = [(vec![0u8; BLOCK], vec![0.0f32; 1]), (vec![0u8; BLOCK], vec![0.0f32; 1])];
        let mut w = vec![0.0f32; BLOCK];
        for step in 1..=2000 {
            let grad: Vec<f32> = (0..BLOCK).map(|i| if i == 0 || step <= 1000 { 1.0 } else { 0.0 }).collect();
            let numbers = AdamWStep { lr: 0.0, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step };
            let [(mc, ms), (vc, vs)] = &mut state;
            adamw(&Numbers::from(&numbers), 1.0, 0, &mut w, &grad, (mc, ms), (vc, vs));
        }
        let v = decode(Moment::Second, &state[1].0, &state[1].1);
        let mean = v[1..].iter().sum::<f32>() / (BLOCK - 1) as f32;
        // 1 - 0.999^1000, and that times 0.999^1000.
        assert!((v[0] - 0.865).abs() < 0.01 && (mean - 0.632 * 0.368).abs() < 0.03, "{} {mean}", v[0]);
    }

    #[test]
    fn a_factor_that_is_not_finite_changes_nothing() {
        let mut state = [(vec![9u8; BLOCK], vec![2.0f32; 1]), (vec![7u8; BLOCK], vec![3.0f32; 1])];
        let (before, mut w) = (state.clone(), vec![1.0f32; BLOCK]);
        let numbers = AdamWStep { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step: 1 };
        let [(mc, ms), (vc, vs)] = &mut state;
        adamw(&Numbers::from(&numbers), f32::NAN, 0, &mut w, &[1.0; BLOCK], (mc, ms), (vc, vs));
        assert!(state == before && w == [1.0; BLOCK]);
    }
}
