//! Patches, counter-based noise, flow matching, timestep embedding.

use super::Math;
use rayon::prelude::*;

/// Ten rounds of Philox 4x32 (Salmon et al., SC'11): 128 random bits from a counter and a key.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Key of one noise tensor.
pub type NoiseKey = [u32; 2];

/// Four standard normal values: elements `4 * quad..4 * quad + 4` of the tensor of `key`.
fn normal4(key: NoiseKey, quad: u32) -> [f32; 4] {
    let r = philox([quad, 0, 0, 0], key);
    let u = |r: u32| (r as f32 + 0.5) * 2f32.powi(-32);
    let mut out = [0.0; 4];
    for pair in 0..2 {
        let radius = (-2.0 * u(r[2 * pair]).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * u(r[2 * pair + 1])).sin_cos();
        out[2 * pair] = radius * cos;
        out[2 * pair + 1] = radius * sin;
    }
    out
}

/// Standard normal values: element `e` depends on `key` and `e` alone.
///
/// `philox(counter = [e / 4, 0, 0, 0], key)` gives `r0..r3`; with `u(r) = (r + 0.5) 2^-32` in f32, elements 0 and
/// 1 of the four are `sqrt(-2 ln u(r0)) (cos, sin)(2 pi u(r1))`, elements 2 and 3 the same of `r2, r3`.
pub fn normal<T: Math>(key: NoiseKey, out: &mut [T]) {
    out.par_chunks_mut(4).enumerate().for_each(|(quad, out)| {
        for (out, value) in out.iter_mut().zip(normal4(key, quad as u32)) {
            *out = T::from_f64(f64::from(value));
        }
    });
}

/// A latent video `[batch, channels, t, h, w]` and its patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchDims {
    /// Sequences.
    pub batch: usize,
    /// Latent channels.
    pub channels: usize,
    /// Latent frames, rows, columns.
    pub latent: [usize; 3],
    /// Patch sides; each divides its latent side.
    pub patch: [usize; 3],
}

impl PatchDims {
    fn grid(&self) -> [usize; 3] {
        std::array::from_fn(|i| self.latent[i] / self.patch[i])
    }
    /// Tokens of a sequence.
    pub fn tokens(&self) -> usize {
        self.grid().iter().product()
    }
    /// Values of a token, `[channel, t, h, w]`.
    pub fn width(&self) -> usize {
        self.channels * self.patch.iter().product::<usize>()
    }
    fn latent_len(&self) -> usize {
        self.channels * self.latent.iter().product::<usize>()
    }
    /// Calls `f(column, latent index within the sequence)` for each value of the patch with this raster index.
    fn for_each_value(&self, raster: usize, mut f: impl FnMut(usize, usize)) {
        let [_, gh, gw] = self.grid();
        let [lt, lh, lw] = self.latent;
        let [pt, ph, pw] = self.patch;
        let origin = [raster / (gh * gw) * pt, raster / gw % gh * ph, raster % gw * pw];
        let mut column = 0;
        for c in 0..self.channels {
            for t in 0..pt {
                for h in 0..ph {
                    for w in 0..pw {
                        let at = ((c * lt + origin[0] + t) * lh + origin[1] + h) * lw + origin[2] + w;
                        f(column, at);
                        column += 1;
                    }
                }
            }
        }
    }
}

/// Tokens `[batch, tokens, width]` of latents; token `i` is the patch with raster index `order[i]`.
pub fn patchify<T: Math>(dims: PatchDims, order: &[i32], latents: &[T], tokens: &mut [T]) {
    let (s, width) = (dims.tokens(), dims.width());
    assert_eq!(latents.len(), dims.batch * dims.latent_len(), "latents of {dims:?}");
    assert_eq!((order.len(), tokens.len()), (s, dims.batch * s * width), "tokens of {dims:?}");
    tokens.par_chunks_mut(width).enumerate().for_each(|(row, token)| {
        let latents = &latents[row / s * dims.latent_len()..];
        dims.for_each_value(order[row % s] as usize, |column, at| token[column] = latents[at]);
    });
}

/// Inverse of [`patchify`].
pub fn unpatchify<T: Math>(dims: PatchDims, order: &[i32], tokens: &[T], latents: &mut [T]) {
    let (s, width) = (dims.tokens(), dims.width());
    assert_eq!(latents.len(), dims.batch * dims.latent_len(), "latents of {dims:?}");
    assert_eq!((order.len(), tokens.len()), (s, dims.batch * s * width), "tokens of {dims:?}");
    for (row, token) in tokens.chunks(width).enumerate() {
        let latents = &mut latents[row / s * dims.latent_len()..];
        dims.for_each_value(order[row % s] as usize, |column, at| latents[at] = token[column]);
    }
}

/// Noised tokens `x_t = (1 - t) x0 + t noise` and target velocity `noise - x0`, where `x0` are the patches of
/// `latents` and `noise` is [`normal`] of `keys[b]` over the sequence's patches in raster order: the same at every place of a clip
/// whatever the token order.
pub fn flow_prepare<T: Math>(
    dims: PatchDims,
    order: &[i32],
    latents: &[T],
    t: &[T],
    keys: &[NoiseKey],
    x_t: &mut [T],
    target: &mut [T],
) {
    patchify(dims, order, latents, x_t);
    let width = dims.width();
    let per_sequence = dims.tokens() * width;
    let mut noise = vec![T::ZERO; per_sequence];
    for (b, (x_t, target)) in x_t.chunks_mut(per_sequence).zip(target.chunks_mut(per_sequence)).enumerate() {
        normal(keys[b], &mut noise);
        let t = t[b];
        let tokens = x_t.par_chunks_mut(width).zip(target.par_chunks_mut(width)).zip(order);
        tokens.for_each(|((x_t, target), &raster)| {
            let noise = &noise[raster as usize * width..][..width];
            for ((x, target), &noise) in x_t.iter_mut().zip(target).zip(noise) {
                *target = noise - *x;
                *x = (T::ONE - t) * *x + t * noise;
            }
        });
    }
}

/// `loss[b] = mean (pred - target)^2` over a sequence; where wanted, `d_pred`, the gradient of
/// `weight * mean over b of loss[b]`.
pub fn flow_loss<T: Math>(pred: &[T], target: &[T], loss: &mut [T], d_pred: Option<&mut [T]>, weight: f64) {
    let batch = loss.len();
    let per_sequence = pred.len() / batch;
    let chunk = 4096;
    for (b, loss) in loss.iter_mut().enumerate() {
        let at = b * per_sequence..(b + 1) * per_sequence;
        let partial: Vec<f64> = pred[at.clone()]
            .par_chunks(chunk)
            .zip(target[at].par_chunks(chunk))
            .map(|(p, t)| p.iter().zip(t).map(|(&p, &t)| (p.to_f64() - t.to_f64()).powi(2)).sum())
            .collect();
        *loss = T::from_f64(partial.iter().sum::<f64>() / per_sequence as f64);
    }
    if let Some(d_pred) = d_pred {
        let factor = T::from_f64(2.0 * weight / (batch * per_sequence) as f64);
        d_pred.par_iter_mut().zip(pred).zip(target).for_each(|((d, &p), &t)| *d = factor * (p - t));
    }
}

/// `out[b] = [cos(1000 t_b w_i)..., sin(1000 t_b w_i)...]`, `w_i = 10000^(-i/half)`, `half = width/2`.
pub fn time_embed<T: Math>(t: &[T], width: usize, out: &mut [T]) {
    let half = width / 2;
    for (out, &t) in out.chunks_mut(width).zip(t) {
        for i in 0..half {
            let angle = 1000.0 * t.to_f64() * 10_000f64.powf(-(i as f64) / half as f64);
            out[i] = T::from_f64(angle.cos());
            out[half + i] = T::from_f64(angle.sin());
        }
    }
}
