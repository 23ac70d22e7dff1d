//! Matrix products of one warp: operands out of shared memory or registers as f32, then rows of 32 lanes.
//!
//! Accumulator register 4 j + 2 h + e of a lane holds row lane / 4 + 8 h and column 8 j + 2 (lane % 4) + e. So with A's
//! rows spread over the lanes and B's columns repeated for every four lanes, a product is multiplications of whole
//! registers, and no accumulator is moved.

use crate::decode::Half;
use crate::float::{NAN, bf16_to, bits_of, f16_to};
use crate::memory::Shared;
use crate::tensor_map::swizzled;

/// A: 16 rows by 16 columns of k, by half of the rows, then k, then lane.
pub(crate) struct Rows(pub(crate) [[[f32; 32]; 16]; 2]);

/// B: by 8-column tile and parity of the column, then k; four columns, twice.
pub(crate) type Columns = Vec<[f32; 8]>;

#[inline(always)]
fn value(bits: u32, half: Half) -> f32 {
    match half {
        Half::Bf16 => bf16_to(bits & 0xFFFF),
        Half::F16 => f16_to(bits & 0xFFFF),
    }
}

/// An operand in shared memory, as a wgmma descriptor gives it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) start: u32,
    pub(crate) leading: u32,
    pub(crate) stride: u32,
    /// Bytes of the swizzle's span; 0 without.
    pub(crate) span: u32,
}

impl Descriptor {
    pub(crate) fn of(bits: u64) -> Result<Descriptor, String> {
        let field = |at: u32| (bits >> at & 0x3FFF) as u32 * 16;
        if bits >> 49 & 7 != 0 {
            return Err(format!("descriptor {bits:#x} has a base offset, which is not emulated"));
        }
        let span = [0, 128, 64, 32][(bits >> 62) as usize];
        Ok(Descriptor { start: field(0), leading: field(16), stride: field(32), span })
    }

    /// The 8 elements (16 bytes) of row `mn` from column `k8` * 8 where rows are contiguous in k, or of row `k` from
    /// `mn8` * 8 where they are contiguous in mn.
    #[inline]
    fn k_major(&self, mn: u32, k8: u32) -> u32 {
        if self.span == 0 {
            return self.start + mn / 8 * self.stride + k8 * self.leading + mn % 8 * 16;
        }
        swizzled(self.start + mn / 8 * self.stride + mn % 8 * self.span + k8 * 16, self.span)
    }

    #[inline]
    fn mn_major(&self, mn8: u32, k: u32) -> u32 {
        if self.span == 0 {
            return self.start + mn8 * self.stride + k / 8 * self.leading + k % 8 * 16;
        }
        let in_span = self.span / 16;
        let at = self.start + mn8 / in_span * self.leading + k / 8 * self.stride;
        swizzled(at + k % 8 * self.span + mn8 % in_span * 16, self.span)
    }
}

/// Reads 16 bytes for the tensor cores on behalf of thread `reader`.
fn chunk(shared: &mut Shared, address: u32, reader: u32) -> Result<[u32; 4], String> {
    if !address.is_multiple_of(16) || !shared.holds(address as u64, 16) {
        return Err(format!("wgmma reads shared memory at {address:#x}, outside its {:#x}", shared.end()));
    }
    if let Some(writer) = shared.unfenced(address, 16, reader) {
        return Err(format!(
            "wgmma reads shared memory at {address:#x}, which thread {writer} wrote by an ordinary store without a \
             fence.proxy.async after it"
        ));
    }
    let bytes = shared.at(address, 16);
    Ok(std::array::from_fn(|i| {
        u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    }))
}

#[inline(always)]
fn eight(words: [u32; 4], half: Half, sign: f32) -> [f32; 8] {
    std::array::from_fn(|i| sign * value(words[i / 2] >> (16 * (i % 2)), half))
}

/// The 16 rows of A from row `first` on, out of shared memory.
pub(crate) fn rows_of_shared(
    shared: &mut Shared,
    descriptor: Descriptor,
    first: u32,
    transpose: bool,
    half: Half,
    negate: bool,
    reader: u32,
) -> Result<Rows, String> {
    let sign = if negate { -1.0 } else { 1.0 };
    let mut rows = Rows([[[0.0; 32]; 16]; 2]);
    let mut put = |r: usize, k: usize, x: f32| {
        rows.0[r / 8][k][4 * (r % 8)..4 * (r % 8) + 4].fill(x);
    };
    if transpose {
        for k in 0..16 {
            for m8 in 0..2 {
                let words = chunk(shared, descriptor.mn_major(first / 8 + m8, k), reader)?;
                for (i, x) in eight(words, half, sign).into_iter().enumerate() {
                    put(8 * m8 as usize + i, k as usize, x);
                }
            }
        }
    } else {
        for r in 0..16 {
            for k8 in 0..2 {
                let words = chunk(shared, descriptor.k_major(first + r, k8), reader)?;
                for (i, x) in eight(words, half, sign).into_iter().enumerate() {
                    put(r as usize, 8 * k8 as usize + i, x);
                }
            }
        }
    }
    Ok(rows)
}

/// A out of a warp's four operand registers, k columns of it 8 or 16.
pub(crate) fn rows_of_registers(a: [&[u32; 32]; 4], half: Half, negate: bool, k: usize) -> Rows {
    let sign = if negate { -1.0 } else { 1.0 };
    let mut rows = Rows([[[0.0; 32]; 16]; 2]);
    for (h, by_half) in rows.0.iter_mut().enumerate() {
        for (column, lanes) in by_half.iter_mut().enumerate().take(k) {
            let register = a[h + 2 * (column / 8)];
            for q in 0..8 {
                let bits = register[4 * q + column % 8 / 2] >> (16 * (column % 2));
                lanes[4 * q..4 * q + 4].fill(sign * value(bits, half));
            }
        }
    }
    rows
}

/// N columns of B out of shared memory.
#[allow(clippy::too_many_arguments)]
pub(crate) fn columns_of_shared(
    shared: &mut Shared,
    descriptor: Descriptor,
    n: u32,
    transpose: bool,
    half: Half,
    negate: bool,
    reader: u32,
    columns: &mut Columns,
) -> Result<(), String> {
    let sign = if negate { -1.0 } else { 1.0 };
    columns.resize(n as usize * 4, [0.0; 8]);
    // Column c and k: tile c / 8, parity c % 2, four columns of it.
    let place = |c: usize, k: usize| ((c / 8 * 2 + c % 2) * 16 + k, c % 8 / 2);
    if transpose {
        for k in 0..16 {
            for n8 in 0..n / 8 {
                let words = chunk(shared, descriptor.mn_major(n8, k), reader)?;
                for (i, x) in eight(words, half, sign).into_iter().enumerate() {
                    let (row, t) = place(8 * n8 as usize + i, k as usize);
                    columns[row][t] = x;
                    columns[row][t + 4] = x;
                }
            }
        }
    } else {
        for c in 0..n {
            for k8 in 0..2 {
                let words = chunk(shared, descriptor.k_major(c, k8), reader)?;
                for (i, x) in eight(words, half, sign).into_iter().enumerate() {
                    let (row, t) = place(c as usize, 8 * k8 as usize + i);
                    columns[row][t] = x;
                    columns[row][t + 4] = x;
                }
            }
        }
    }
    Ok(())
}

/// The 8 columns of B of an mma, out of its registers.
pub(crate) fn columns_of_registers(b: [&[u32; 32]; 2], half: Half, k: usize, columns: &mut Columns) {
    columns.clear();
    columns.resize(32, [0.0; 8]);
    for column in 0..8 {
        for kk in 0..k {
            let bits = b[kk / 8][4 * column + kk % 8 / 2] >> (16 * (kk % 2));
            let x = value(bits, half);
            let row = &mut columns[column % 2 * 16 + kk];
            row[column / 2] = x;
            row[column / 2 + 4] = x;
        }
    }
}

/// `d[4 j + 2 h + e] += A B` for the tiles of `columns`.
///
/// # Safety
/// `d` has 2 registers a row of 16 k of `columns`, all distinct and valid.
pub(crate) unsafe fn multiply(d: &[*mut [u32; 32]], rows: &Rows, columns: &Columns) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the features are there; the rest is the caller's promise.
        unsafe { multiply_avx2(d, rows, columns) };
        return;
    }
    for (tile, by_k) in columns.chunks_exact(16).enumerate() {
        let (j, e) = (tile / 2, tile % 2);
        for h in 0..2 {
            // SAFETY: the caller's promise.
            let d = unsafe { &mut *d[4 * j + 2 * h + e] };
            let mut sum = d.map(f32::from_bits);
            for (a, b) in rows.0[h].iter().zip(by_k) {
                for (lane, sum) in sum.iter_mut().enumerate() {
                    *sum = a[lane].mul_add(b[lane % 8], *sum);
                }
            }
            *d = sum.map(bits_of);
        }
    }
}

/// As [`multiply`]. Products of halves are exact in f32, so that fused or not gives the same bits.
///
/// # Safety
/// As [`multiply`], on a machine with AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_avx2(d: &[*mut [u32; 32]], rows: &Rows, columns: &Columns) {
    use std::arch::x86_64::{
        _CMP_UNORD_Q, _mm256_blendv_ps, _mm256_cmp_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps,
        _mm256_storeu_ps,
    };
    let nan = _mm256_set1_ps(f32::from_bits(NAN));
    let clean = |x| _mm256_blendv_ps(x, nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    for (tile, by_k) in columns.chunks_exact(16).enumerate() {
        let (j, e) = (tile / 2, tile % 2);
        // SAFETY: every pointer below is to 8 floats of an array that lives.
        unsafe {
            let (d0, d1) = (d[4 * j + e].cast::<f32>(), d[4 * j + 2 + e].cast::<f32>());
            let mut low: [_; 4] = std::array::from_fn(|q| _mm256_loadu_ps(d0.add(8 * q)));
            let mut high: [_; 4] = std::array::from_fn(|q| _mm256_loadu_ps(d1.add(8 * q)));
            for (k, b) in by_k.iter().enumerate() {
                let b = _mm256_loadu_ps(b.as_ptr());
                for q in 0..4 {
                    low[q] = _mm256_fmadd_ps(_mm256_loadu_ps(rows.0[0][k].as_ptr().add(8 * q)), b, low[q]);
                    high[q] = _mm256_fmadd_ps(_mm256_loadu_ps(rows.0[1][k].as_ptr().add(8 * q)), b, high[q]);
                }
            }
            for q in 0..4 {
                _mm256_storeu_ps(d0.add(8 * q), clean(low[q]));
                _mm256_storeu_ps(d1.add(8 * q), clean(high[q]));
            }
        }
    }
}
