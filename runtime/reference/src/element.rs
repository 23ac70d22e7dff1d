//! Number types the reference reads and computes in.

use dsv_spec::Dtype;

/// A stored number that the reference can read: f32, f64, bf16 or f16.
pub trait Element: Copy + Send + Sync + 'static {
    /// The exact value.
    fn to_f64(self) -> f64;
    /// The value as f32; exact but for f64.
    fn to_f32(self) -> f32;
}

impl Element for f64 {
    fn to_f64(self) -> f64 {
        self
    }
    fn to_f32(self) -> f32 {
        self as f32
    }
}

impl Element for f32 {
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for half::bf16 {
    fn to_f64(self) -> f64 {
        self.to_f64()
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

impl Element for half::f16 {
    fn to_f64(self) -> f64 {
        self.to_f64()
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

/// A number type that matrix products run in: f32 or f64.
pub trait Real:
    Element
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Rounds an f64 to this type.
    fn from_f64(value: f64) -> Self;
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn from_f64(value: f64) -> Self {
        value
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

/// What the formats kernels store their tensors in can represent.
pub trait Rounding {
    /// Rounds to the nearest value of this format (ties to even), returned as f32.
    fn round(self, value: f32) -> f32;

    /// Distance between neighbouring values of this format at the magnitude of `value`; at zero and below the
    /// smallest normal number, the spacing of subnormal numbers.
    fn ulp(self, value: f64) -> f64;
}

impl Rounding for Dtype {
    fn round(self, value: f32) -> f32 {
        match self {
            Dtype::Bf16 => half::bf16::from_f32(value).to_f32(),
            Dtype::F16 => half::f16::from_f32(value).to_f32(),
            Dtype::F32 => value,
        }
    }

    fn ulp(self, value: f64) -> f64 {
        let (mantissa_bits, smallest_exponent) = match self {
            Dtype::Bf16 => (7, -126),
            Dtype::F16 => (10, -14),
            Dtype::F32 => (23, -126),
        };
        let magnitude = value.abs();
        let mut exponent = smallest_exponent;
        if magnitude.is_finite() && magnitude > 0.0 {
            // log2 may be off by one beside a power of two; the two loops make it exact.
            exponent = magnitude.log2().floor() as i32;
            while 2f64.powi(exponent) > magnitude {
                exponent -= 1;
            }
            while 2f64.powi(exponent + 1) <= magnitude {
                exponent += 1;
            }
            exponent = exponent.max(smallest_exponent);
        }
        2f64.powi(exponent - mantissa_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulp_is_the_step_to_the_next_value() {
        for &x in &[1.0f32, 1.5, 2.0, 3.99, 1e-3, 250.0, 0.99999] {
            let up = f64::from(f32::from_bits(x.to_bits() + 1)) - f64::from(x);
            assert_eq!(Dtype::F32.ulp(f64::from(x)), up, "f32 {x}");
            let h = half::bf16::from_f32(x);
            let up = half::bf16::from_bits(h.to_bits() + 1).to_f64() - h.to_f64();
            assert_eq!(Dtype::Bf16.ulp(h.to_f64()), up, "bf16 {x}");
            let h = half::f16::from_f32(x);
            let up = half::f16::from_bits(h.to_bits() + 1).to_f64() - h.to_f64();
            assert_eq!(Dtype::F16.ulp(h.to_f64()), up, "f16 {x}");
        }
        assert_eq!(Dtype::F16.ulp(0.0), 2f64.powi(-24));
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        assert_eq!(Dtype::Bf16.round(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(Dtype::Bf16.round(1.0 + 3.0 / 256.0), 1.0 + 4.0 / 256.0);
        assert_eq!(Dtype::F16.round(1.0 + 1.0 / 2048.0), 1.0);
        assert_eq!(Dtype::F32.round(0.1), 0.1);
    }
}
