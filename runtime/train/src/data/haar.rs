//! Latents without a VAE: an orthonormal 3D Haar wavelet packet, exactly invertible.
//!
//! One level maps each 2x2x2 cube of pixels (time, height, width) of each colour to 8 coefficients, the sums and
//! differences along the three axes, halving all three sizes. A second level transforms every channel again.
//! Channels: 3 * 8^levels, channel = ((colour * 8) + band of level 1) * 8 + band of level 2, with
//! band = 4 * (time difference) + 2 * (row difference) + (column difference).
//!
//! Pixels go from 0..255 to -1..1 first. Differences are small in natural video, so each channel is multiplied by
//! a fixed gain by its number of differences, which brings all of them near unit variance; the inverse divides.

use super::Video;

/// Gain of a channel with `i` differences, one level.
const GAINS_1: [f32; 4] = [0.75, 2.5, 5.0, 10.0];
/// Gain of a channel with `i` differences, two levels.
const GAINS_2: [f32; 7] = [0.3, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6];

/// Gain of a channel.
fn gain(channel: usize, levels: u32) -> f32 {
    let bands = channel % 8usize.pow(levels);
    let differences = bands.count_ones() as usize;
    if levels == 1 { GAINS_1[differences] } else { GAINS_2[differences] }
}

/// Channels of the latents.
pub fn channels(levels: u32) -> usize {
    3 * 8usize.pow(levels)
}

/// A video as latents f32 `[3 * 8^levels, T / 2^levels, H / 2^levels, W / 2^levels]`.
///
/// # Panics
/// If `2^levels` does not divide the three sizes, or `levels` is not 1 or 2.
pub fn encode(video: &Video, levels: u32) -> Vec<f32> {
    assert!(levels == 1 || levels == 2, "levels {levels}");
    let [t, h, w] = [video.frames, video.height, video.width];
    let unit = 1usize << levels;
    assert!(t % unit == 0 && h % unit == 0 && w % unit == 0, "[{t}, {h}, {w}] by {unit}");
    let n = t * h * w;
    let mut data = vec![0f32; 3 * n];
    for (i, rgb) in video.rgb.chunks_exact(3).enumerate() {
        for c in 0..3 {
            data[c * n + i] = f32::from(rgb[c]) / 127.5 - 1.0;
        }
    }
    let mut shape = [3, t, h, w];
    for _ in 0..levels {
        (data, shape) = analyse(&data, shape);
    }
    let per_channel = shape[1] * shape[2] * shape[3];
    for (c, values) in data.chunks_exact_mut(per_channel).enumerate() {
        let g = gain(c, levels);
        values.iter_mut().for_each(|x| *x *= g);
    }
    data
}

/// The video of latents `[3 * 8^levels, frames, height, width]`, clamped to 0..=255.
///
/// # Panics
/// If `latents` has another length.
pub fn decode(latents: &[f32], [frames, height, width]: [usize; 3], levels: u32) -> Video {
    let mut shape = [channels(levels), frames, height, width];
    assert_eq!(latents.len(), shape.iter().product::<usize>(), "latents of {shape:?}");
    let mut data = latents.to_vec();
    for (c, values) in data.chunks_exact_mut((frames * height * width).max(1)).enumerate() {
        let g = gain(c, levels);
        values.iter_mut().for_each(|x| *x /= g);
    }
    for _ in 0..levels {
        (data, shape) = synthesise(&data, shape);
    }
    let n = shape[1] * shape[2] * shape[3];
    let mut rgb = vec![0u8; 3 * n];
    for (i, out) in rgb.chunks_exact_mut(3).enumerate() {
        for (c, o) in out.iter_mut().enumerate() {
            *o = ((data[c * n + i] + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
        }
    }
    Video { frames: shape[1], height: shape[2], width: shape[3], rgb }
}

/// 1 / sqrt(8): three orthonormal steps of 1 / sqrt(2).
const NORM: f32 = 0.353_553_4;

/// The 8-point Hadamard transform over the bits of the index: sums and differences along three axes.
fn butterfly(v: &mut [f32; 8]) {
    for bit in [1, 2, 4] {
        for i in 0..8 {
            if i & bit == 0 {
                let (a, b) = (v[i], v[i | bit]);
                (v[i], v[i | bit]) = (a + b, a - b);
            }
        }
    }
    v.iter_mut().for_each(|x| *x *= NORM);
}

fn analyse(data: &[f32], [c, t, h, w]: [usize; 4]) -> (Vec<f32>, [usize; 4]) {
    let (t2, h2, w2) = (t / 2, h / 2, w / 2);
    let n2 = t2 * h2 * w2;
    let mut out = vec![0f32; data.len()];
    for ch in 0..c {
        for ti in 0..t2 {
            for hi in 0..h2 {
                for wi in 0..w2 {
                    let mut v = [0f32; 8];
                    for (k, x) in v.iter_mut().enumerate() {
                        let (dt, dh, dw) = (k >> 2, k >> 1 & 1, k & 1);
                        *x = data[((ch * t + 2 * ti + dt) * h + 2 * hi + dh) * w + 2 * wi + dw];
                    }
                    butterfly(&mut v);
                    let at = (ti * h2 + hi) * w2 + wi;
                    for (band, x) in v.iter().enumerate() {
                        out[(ch * 8 + band) * n2 + at] = *x;
                    }
                }
            }
        }
    }
    (out, [c * 8, t2, h2, w2])
}

fn synthesise(data: &[f32], [c, t, h, w]: [usize; 4]) -> (Vec<f32>, [usize; 4]) {
    let n = t * h * w;
    let (t2, h2, w2) = (t * 2, h * 2, w * 2);
    let mut out = vec![0f32; data.len()];
    for ch in 0..c / 8 {
        for ti in 0..t {
            for hi in 0..h {
                for wi in 0..w {
                    let at = (ti * h + hi) * w + wi;
                    let mut v = [0f32; 8];
                    for (band, x) in v.iter_mut().enumerate() {
                        *x = data[(ch * 8 + band) * n + at];
                    }
                    butterfly(&mut v);
                    for (k, x) in v.iter().enumerate() {
                        let (dt, dh, dw) = (k >> 2, k >> 1 & 1, k & 1);
                        out[((ch * t2 + 2 * ti + dt) * h2 + 2 * hi + dh) * w2 + 2 * wi + dw] = *x;
                    }
                }
            }
        }
    }
    (out, [c / 8, t2, h2, w2])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(frames: usize, height: usize, width: usize) -> Video {
        let mut s = 7u32;
        let rgb = (0..frames * height * width * 3)
            .map(|_| {
                s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (s >> 24) as u8
            })
            .collect();
        Video { frames, height, width, rgb }
    }

    #[test]
    fn decode_undoes_encode_exactly() {
        for levels in [1, 2] {
            let v = noise(4, 8, 12);
            let u = 1 << levels;
            assert_eq!(decode(&encode(&v, levels), [4 / u, 8 / u, 12 / u], levels), v, "{levels} levels");
        }
    }

    #[test]
    fn the_transform_is_orthonormal_and_bands_are_where_documented() {
        let v = noise(2, 2, 2);
        let z = encode(&v, 1);
        let pixels: f32 = v.rgb.iter().map(|x| (f32::from(*x) / 127.5 - 1.0).powi(2)).sum();
        let energy: f32 = z.iter().enumerate().map(|(c, x)| (x / gain(c, 1)).powi(2)).sum();
        assert!((pixels - energy).abs() < 1e-4 * pixels);
        // White on the second frame, black on the first: only red/green/blue mean (0) and time difference.
        let mut step = noise(2, 2, 2);
        step.rgb.iter_mut().enumerate().for_each(|(i, x)| *x = if i < 12 { 0 } else { 255 });
        for (c, x) in encode(&step, 1).iter().enumerate() {
            let expected = if c % 8 == 4 { -8f32.sqrt() * gain(c, 1) } else { 0.0 };
            assert!((x - expected).abs() < 1e-4, "channel {c}: {x}");
        }
    }
}
