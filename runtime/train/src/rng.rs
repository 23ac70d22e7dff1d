//! Counter-based randomness: every number is a function of (seed, purpose, position), so a resumed
//! run draws what the uninterrupted one would have.

use dsv_reference::layers::philox;

/// What a random number is for; numbers of different purposes are independent.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial weights, by tensor.
    Init = 1,
    /// Flow-matching noise, by clip of the run.
    Noise = 2,
    /// Timesteps, by clip of the run.
    Time = 3,
    /// Caption drop-out, by clip of the run.
    Caption = 4,
    /// Profiled queries, by profile.
    Profile = 5,
    /// Initial noise of a sample.
    Sample = 6,
    /// Noise of the validation triples.
    EvalNoise = 7,
    /// Initial predictor weights, by block.
    Predictor = 8,
}

/// 128 random bits for `(seed, purpose, position)`.
pub fn bits(seed: u64, purpose: Purpose, position: u64) -> [u32; 4] {
    philox(
        [position as u32, (position >> 32) as u32, purpose as u32, 0x4453_5600],
        [seed as u32, (seed >> 32) as u32],
    )
}

/// A key for a device tensor of noise.
pub fn key(seed: u64, purpose: Purpose, position: u64) -> [u32; 2] {
    let [a, b, ..] = bits(seed, purpose, position);
    [a, b]
}

/// Uniform in (0, 1).
pub fn uniform(seed: u64, purpose: Purpose, position: u64) -> f64 {
    let [a, b, ..] = bits(seed, purpose, position);
    ((u64::from(a) << 21 | u64::from(b) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Standard normal.
pub fn normal(seed: u64, purpose: Purpose, position: u64) -> f64 {
    let [_, _, c, d] = bits(seed, purpose, position);
    let unit = |x: u32| (f64::from(x) + 0.5) / 4_294_967_296.0;
    (-2.0 * unit(c).ln()).sqrt() * (std::f64::consts::TAU * unit(d)).cos()
}

/// A logit-normal time with shift: `t = sigmoid(mean + std z)`, then `s t / (1 + (s - 1) t)`.
pub fn flow_time(z: f64, mean: f64, std: f64, shift: f64) -> f64 {
    let t = 1.0 / (1.0 + (-(mean + std * z)).exp());
    shift * t / (1.0 + (shift - 1.0) * t)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_depend_on_each_of_seed_purpose_and_position() {
        let x = bits(1, Purpose::Noise, 5);
        assert_eq!(x, bits(1, Purpose::Noise, 5));
        assert_ne!(x, bits(2, Purpose::Noise, 5));
        assert_ne!(x, bits(1, Purpose::Time, 5));
        assert_ne!(x, bits(1, Purpose::Noise, 6));
        assert_ne!(x, bits(1 << 40, Purpose::Noise, 5));
    }

    #[test]
    fn distributions_have_their_moments() {
        let n = 20_000;
        let mean = |f: &dyn Fn(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        assert!((mean(&|i| uniform(3, Purpose::Caption, i)) - 0.5).abs() < 0.01);
        assert!(mean(&|i| normal(3, Purpose::Time, i)).abs() < 0.03);
        assert!((mean(&|i| normal(3, Purpose::Time, i).powi(2)) - 1.0).abs() < 0.04);
    }

    #[test]
    fn shift_moves_times_towards_noise() {
        assert!((flow_time(0.0, 0.0, 1.0, 1.0) - 0.5).abs() < 1e-12);
        assert!((flow_time(0.0, 0.0, 1.0, 3.0) - 0.75).abs() < 1e-12);
    }
}
