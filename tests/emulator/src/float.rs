//! Floating point as the GPU rounds it.

use half::f16;

/// The bits of a result: every NaN that arithmetic makes is this one (on x86 it would have a sign).
#[inline(always)]
pub(crate) fn bits_of(x: f32) -> u32 {
    if x.is_nan() { NAN } else { x.to_bits() }
}

/// The NaN of the hardware.
pub(crate) const NAN: u32 = 0x7FFF_FFFF;

/// Nearest even; every NaN is 0x7FFF, as the hardware makes it.
#[inline(always)]
pub(crate) fn bf16_of(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { 0x7FFF } else { rounded }
}

#[inline(always)]
pub(crate) fn bf16_to(x: u32) -> f32 {
    f32::from_bits(x << 16)
}

#[inline(always)]
pub(crate) fn f16_of(x: f32) -> u32 {
    if x.is_nan() { 0x7FFF } else { f16::from_f32(x).to_bits() as u32 }
}

#[inline(always)]
pub(crate) fn f16_to(x: u32) -> f32 {
    f16::from_bits(x as u16).to_f32()
}

#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { x * 0.0 } else { x }
}

/// 2^x within two units of the last place, denormals flushed: `ex2.approx.ftz`.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    let x = flush(x);
    let inside = x.clamp(-127.0, 128.0);
    let n = (inside + 12_582_912.0) - 12_582_912.0;
    let f = inside - n;
    let mut p = 1.525_273_3e-5f32;
    p = f.mul_add(p, 1.540_353e-4);
    p = f.mul_add(p, 1.333_355_8e-3);
    p = f.mul_add(p, 9.618_129e-3);
    p = f.mul_add(p, 5.550_411e-2);
    p = f.mul_add(p, 2.402_265e-1);
    p = f.mul_add(p, std::f32::consts::LN_2);
    p = f.mul_add(p, 1.0);
    // In two steps, so that 2^128 overflows and 2^-127 is there to be flushed.
    let n = n as i32;
    let half = n >> 1;
    let two = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let y = p * two(half) * two(n - half);
    let y = if y < f32::MIN_POSITIVE { 0.0 } else { y };
    if x.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { y }
}

/// log2(x), denormals taken as zero: `lg2.approx.ftz`.
#[inline(always)]
pub(crate) fn log2(x: f32) -> f32 {
    flush(x).log2()
}

/// The larger; NaN where one is NaN.
#[inline(always)]
pub(crate) fn max_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { max(a, b) }
}

#[inline(always)]
pub(crate) fn min_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { min(a, b) }
}

/// The larger; the other where one is NaN; +0 is larger than -0.
#[inline(always)]
pub(crate) fn max(a: f32, b: f32) -> f32 {
    let larger = if a > b || (a == b && a.is_sign_positive()) { a } else { b };
    if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else {
        larger
    }
}

#[inline(always)]
pub(crate) fn min(a: f32, b: f32) -> f32 {
    let smaller = if a < b || (a == b && a.is_sign_negative()) { a } else { b };
    if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else {
        smaller
    }
}
