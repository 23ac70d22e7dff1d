//! The built-in video set: scenes drawn from their index, the same on every machine.
//!
//! A scene is a textured background under a panning camera and one to three textured shapes that turn, move and
//! bounce off the picture's edges. Its caption names shapes, colours, textures, directions and the pan, so that
//! text carries information about the picture.

use super::Video;
use rayon::prelude::*;
use std::f32::consts::TAU;

const COLOURS: [(&str, [f32; 3]); 8] = [
    ("red", [0.90, 0.18, 0.15]),
    ("green", [0.20, 0.72, 0.28]),
    ("blue", [0.16, 0.35, 0.88]),
    ("yellow", [0.95, 0.85, 0.20]),
    ("purple", [0.60, 0.25, 0.75]),
    ("cyan", [0.20, 0.80, 0.85]),
    ("orange", [0.95, 0.55, 0.12]),
    ("white", [0.95, 0.95, 0.95]),
];
const SHAPES: [&str; 6] = ["disc", "square", "triangle", "ring", "cross", "diamond"];
const TEXTURES: [&str; 3] = ["plain", "striped", "checked"];
const DIRECTIONS: [&str; 8] = ["right", "downright", "down", "downleft", "left", "upleft", "up", "upright"];

/// splitmix64: a full-period counter generator, the same everywhere.
#[derive(Clone, Debug)]
pub(super) struct SplitMix(u64);

impl SplitMix {
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut s = SplitMix(seed);
        let mixed = s.next();
        let mut s = SplitMix(mixed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        s.next();
        s
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (self.next() >> 40) as f32 / (1u64 << 24) as f32 * (high - low)
    }

    fn pick(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

#[derive(Clone, Debug)]
struct Texture {
    kind: usize,
    angle: f32,
    frequency: f32,
    phase: f32,
}

impl Texture {
    fn draw(r: &mut SplitMix, low: f32, high: f32) -> Self {
        Texture {
            kind: r.pick(TEXTURES.len()),
            angle: r.range(0.0, TAU),
            frequency: r.range(low, high),
            phase: r.range(0.0, TAU),
        }
    }

    /// Brightness factor at a point of the textured thing's own frame.
    fn at(&self, x: f32, y: f32) -> f32 {
        let (s, c) = self.angle.sin_cos();
        let (u, v) = (x * c + y * s, y * c - x * s);
        let wave = |p: f32| (TAU * self.frequency * p + self.phase).sin();
        match self.kind {
            0 => 1.0,
            1 => 0.72 + 0.28 * wave(u),
            _ => 0.72 + 0.28 * (3.0 * wave(u) * wave(v)).clamp(-1.0, 1.0),
        }
    }
}

#[derive(Clone, Debug)]
struct Object {
    shape: usize,
    colour: usize,
    texture: Texture,
    radius: f32,
    start: [f32; 2],
    velocity: [f32; 2],
    direction: usize,
    spin: f32,
}

impl Object {
    /// Signed distance to the outline in units of the radius, negative inside.
    fn distance(&self, x: f32, y: f32) -> f32 {
        let (ax, ay) = (x.abs(), y.abs());
        match self.shape {
            0 => (x * x + y * y).sqrt() - 1.0,
            1 => ax.max(ay) - 0.85,
            2 => (0.866 * ax + 0.5 * y).max(-y) - 0.5,
            3 => ((x * x + y * y).sqrt() - 0.75).abs() - 0.25,
            4 => (ax.max(ay) - 1.0).max(ax.min(ay) - 0.33),
            _ => (ax + ay) * std::f32::consts::FRAC_1_SQRT_2 - 0.75,
        }
    }
}

/// One scene: everything needed to draw any of its frames.
#[derive(Clone, Debug)]
pub struct Scene {
    background: usize,
    ground: Texture,
    fine: Texture,
    pan: [f32; 2],
    pan_direction: Option<usize>,
    objects: Vec<Object>,
}

/// Moves back and forth between `low` and `high`.
fn bounce(x: f32, low: f32, high: f32) -> f32 {
    let span = (high - low).max(1e-3);
    let p = (x - low).rem_euclid(2.0 * span);
    low + if p > span { 2.0 * span - p } else { p }
}

impl Scene {
    /// The scene of an index under a seed.
    pub fn new(seed: u64, index: u64) -> Scene {
        let mut r = SplitMix::new(seed, index);
        let background = r.pick(COLOURS.len());
        let pan_direction = (r.pick(4) != 0).then(|| r.pick(8));
        let pan_speed = r.range(0.10, 0.35);
        let ground = Texture { kind: 1 + r.pick(2), ..Texture::draw(&mut r, 1.5, 4.0) };
        let fine = Texture { kind: 1, ..Texture::draw(&mut r, 5.0, 9.0) };
        let heading = |d: usize| [(d as f32 * TAU / 8.0).cos(), (d as f32 * TAU / 8.0).sin()];
        let pan = pan_direction.map_or([0.0; 2], |d| heading(d).map(|x| x * pan_speed));
        let count = 1 + r.pick(3);
        let objects = (0..count)
            .map(|i| {
                let direction = r.pick(8);
                let speed = r.range(0.3, 0.9);
                let mut colour = r.pick(COLOURS.len());
                if colour == background {
                    colour = (colour + 1 + i) % COLOURS.len();
                }
                Object {
                    shape: r.pick(SHAPES.len()),
                    colour,
                    texture: Texture::draw(&mut r, 1.0, 2.5),
                    radius: r.range(0.13, 0.26) / (1.0 + 0.2 * i as f32),
                    start: [r.range(0.2, 0.8), r.range(0.2, 0.8)],
                    velocity: heading(direction).map(|x| x * speed),
                    direction,
                    spin: r.range(-1.5, 1.5),
                }
            })
            .collect();
        Scene { background, ground, fine, pan, pan_direction, objects }
    }

    /// What is to be seen, most important words first (a short text keeps the nearest object).
    pub fn caption(&self) -> String {
        let mut words = Vec::new();
        for o in self.objects.iter().rev() {
            words.extend([
                COLOURS[o.colour].0,
                TEXTURES[o.texture.kind],
                SHAPES[o.shape],
                DIRECTIONS[o.direction],
            ]);
        }
        let pan = self.pan_direction.map_or("still".to_string(), |d| format!("pan{}", DIRECTIONS[d]));
        words.extend(["on", COLOURS[self.background].0, TEXTURES[self.ground.kind]]);
        format!("{} camera {pan}", words.join(" "))
    }

    /// The scene over one unit of time as `frames` pictures.
    pub fn render(&self, frames: usize, height: usize, width: usize) -> Video {
        let mut rgb = vec![0u8; frames * height * width * 3];
        let side = height.min(width) as f32;
        let (wide, tall) = (width as f32 / side, height as f32 / side);
        rgb.par_chunks_exact_mut((height * width * 3).max(1)).enumerate().for_each(|(t, frame)| {
            let time = t as f32 / frames as f32;
            let placed: Vec<_> = self
                .objects
                .iter()
                .map(|o| {
                    let x = bounce(o.start[0] * wide + o.velocity[0] * time, o.radius, wide - o.radius);
                    let y = bounce(o.start[1] * tall + o.velocity[1] * time, o.radius, tall - o.radius);
                    let (s, c) = (o.spin * time).sin_cos();
                    (o, x, y, s, c)
                })
                .collect();
            for (i, pixel) in frame.chunks_exact_mut(3).enumerate() {
                let x = ((i % width) as f32 + 0.5) / side;
                let y = ((i / width) as f32 + 0.5) / side;
                let (gx, gy) = (x + self.pan[0] * time, y + self.pan[1] * time);
                let light = 0.45 * self.ground.at(gx, gy) + 0.12 * (self.fine.at(gx, gy) - 0.72);
                let mut colour = COLOURS[self.background].1.map(|c| c * light);
                for (o, ox, oy, s, c) in &placed {
                    let (dx, dy) = ((x - ox) / o.radius, (y - oy) / o.radius);
                    let (u, v) = (dx * c + dy * s, dy * c - dx * s);
                    let cover = (0.5 - o.distance(u, v) * o.radius * side).clamp(0.0, 1.0);
                    if cover > 0.0 {
                        let shade = o.texture.at(u, v);
                        for (out, base) in colour.iter_mut().zip(COLOURS[o.colour].1) {
                            *out += (base * shade - *out) * cover;
                        }
                    }
                }
                for (out, value) in pixel.iter_mut().zip(colour) {
                    *out = (value * 255.0).round().clamp(0.0, 255.0) as u8;
                }
            }
        });
        Video { frames, height, width, rgb }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenes_are_reproducible_distinct_and_move() {
        let a = Scene::new(1, 5).render(8, 32, 48);
        assert_eq!(a, Scene::new(1, 5).render(8, 32, 48));
        assert_ne!(a, Scene::new(1, 6).render(8, 32, 48));
        assert_ne!(a, Scene::new(2, 5).render(8, 32, 48));
        let frame = 32 * 48 * 3;
        assert_ne!(a.rgb[..frame], a.rgb[7 * frame..]);
        let captions: std::collections::HashSet<String> =
            (0..200).map(|i| Scene::new(1, i).caption()).collect();
        assert!(captions.len() > 195, "{}", captions.len());
        let words: std::collections::HashSet<String> =
            captions.iter().flat_map(|c| c.split(' ').map(String::from)).collect();
        assert!(SHAPES.iter().all(|s| words.contains(*s)) && COLOURS.iter().all(|c| words.contains(c.0)));
    }

    #[test]
    fn bouncing_stays_inside() {
        for i in -50..50 {
            let x = bounce(i as f32 * 0.37, 0.2, 0.8);
            assert!((0.2 - 1e-5..=0.8 + 1e-5).contains(&x), "{x}");
        }
    }

    /// Latents of each band have a standard deviation within a factor of about two of one.
    #[test]
    fn haar_latents_of_scenes_are_near_unit_variance() {
        for levels in [1u32, 2] {
            let bands = 8usize.pow(levels);
            let mut sums = vec![(0f64, 0usize); 3 * levels as usize + 1];
            for index in 0..24 {
                let z = super::super::haar::encode(&Scene::new(3, index).render(16, 64, 64), levels);
                let n = z.len() / (3 * bands);
                for (c, values) in z.chunks_exact(n).enumerate() {
                    let slot = &mut sums[(c % bands).count_ones() as usize];
                    slot.0 += values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                    slot.1 += n;
                }
            }
            for (differences, (sum, n)) in sums.iter().enumerate() {
                let std = (sum / *n as f64).sqrt();
                assert!((0.3..3.0).contains(&std), "{levels} levels, {differences} differences: {std}");
            }
        }
    }
}
