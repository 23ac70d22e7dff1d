//! Clips for training: latents and text by index, in an order that depends on (seed, epoch) alone.
//!
//! [`Dataset::open`] serves procedural scenes ([`procedural`]) or shards of latents ([`shards`]); [`prepare`]
//! makes shards from videos, pictures and arrays; [`ahead`] reads them on threads of their own. A [`DataPosition`] is
//! all a resumed run needs to go on with the very next clip.
//!
//! With clips of several grids (`data.buckets`) the clips of one step all have the same. An epoch then is a shuffled
//! list of whole steps, each of the next clips of its grid's own shuffle; what does not fill a step is left out, other
//! clips in every epoch.

pub mod ahead;
pub mod haar;
pub mod npy;
pub mod prepare;
pub mod procedural;
pub mod shards;
pub mod text;

use crate::config::{Config, DataKind};
use procedural::{Scene, SplitMix};
use serde::{Deserialize, Serialize};
use shards::Shards;
use std::path::PathBuf;

/// Pictures in time: `rgb` is u8 `[frames, height, width, 3]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Video {
    /// Pictures.
    pub frames: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Red, green, blue, row-major.
    pub rgb: Vec<u8>,
}

impl Video {
    /// The video that shows this one so many times, each from its start.
    fn played(mut self, times: usize) -> Video {
        let once = self.rgb.len();
        for _ in 1..times {
            self.rgb.extend_from_within(..once);
        }
        self.frames *= times;
        self
    }
}

/// One training example.
#[derive(Clone, Debug, PartialEq)]
pub struct Clip {
    /// Unique in its data set.
    pub id: String,
    /// What is to be seen, where known.
    pub caption: String,
    /// Latent frames, rows and columns.
    pub grid: [usize; 3],
    /// f32 `[channels, frames, height, width]`.
    pub latents: Vec<f32>,
    /// f32 `[text_tokens, text_dim]`; zeros where there is no text.
    pub text: Vec<f32>,
}

/// The next clip to train on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPosition {
    /// Passes completed.
    pub epoch: u64,
    /// Clips of this pass already used.
    pub index: u64,
}

impl DataPosition {
    /// Clips used since the start of the run, for data sets of `len` training clips.
    pub fn clips_seen(&self, len: usize) -> u64 {
        self.epoch * len as u64 + self.index
    }

    /// The position `clips` clips further on.
    pub fn after(self, clips: u64, len: usize) -> DataPosition {
        let seen = self.clips_seen(len) + clips;
        DataPosition { epoch: seen / len as u64, index: seen % len as u64 }
    }
}

/// How latents become pictures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Codec {
    /// [`haar`] with so many levels.
    Haar {
        /// 1 or 2.
        levels: u32,
    },
    /// A VAE outside this program; the text says which, if known.
    External(String),
}

impl Codec {
    /// The pictures of latents `[channels, frames, height, width]`, where this program can decode them.
    pub fn decode(&self, latents: &[f32], [channels, frames, height, width]: [usize; 4]) -> Option<Video> {
        match self {
            Codec::Haar { levels } if haar::channels(*levels) == channels => {
                Some(haar::decode(latents, [frames, height, width], *levels))
            }
            _ => None,
        }
    }

    /// As shards record it: `haar:1`, `haar:2`, or the VAE's name.
    pub fn label(&self) -> String {
        match self {
            Codec::Haar { levels } => format!("haar:{levels}"),
            Codec::External(name) => name.clone(),
        }
    }

    /// The reverse of [`Codec::label`].
    pub fn from_label(label: &str) -> Codec {
        match label.strip_prefix("haar:").and_then(|l| l.parse().ok()) {
            Some(levels @ 1..=2) => Codec::Haar { levels },
            _ => Codec::External(label.to_string()),
        }
    }
}

/// What is wrong with data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The folder of shards is missing or holds none.
    #[error(
        "no shards (*.safetensors) in {path}{detail}\n  next: dsv-train prepare VIDEOS... --out {path}   (or set data.path, or data.kind = \"procedural\")"
    )]
    NoShards {
        /// The folder.
        path: PathBuf,
        /// Why, where the system says.
        detail: String,
    },
    /// A shard cannot be used.
    #[error("{reason}\n  next: {next}")]
    Shard {
        /// What is wrong, naming the file.
        reason: String,
        /// What to do.
        next: String,
    },
    /// Fewer clips of a grid than one step takes.
    #[error(
        "{clips} clips of {grid:?} latents to train on, and a step takes {per_step} of one grid\n  next: lower data.batch_size or train.grad_accumulation, prepare more such clips, or take that grid out of data.buckets"
    )]
    NoStep {
        /// `[frames, height, width]`.
        grid: [usize; 3],
        /// Its training clips.
        clips: usize,
        /// Clips of a step.
        per_step: usize,
    },
    /// Fewer clips than are to be held out.
    #[error("{total} clips, of which data.validation = {validation} are held out; nothing is left to train on\n  allowed: data.validation up to {}\n  next: dsv-train run --set data.validation={} , or prepare more clips", .total.saturating_sub(1), .total.saturating_sub(1).min(1))]
    TooFew {
        /// Clips there are.
        total: usize,
        /// Clips to hold out.
        validation: usize,
    },
}

enum Source {
    Procedural { seed: u64, clips: usize, plays: usize, levels: u32 },
    Shards(Shards),
}

/// The clips of one grid.
struct Bucket {
    /// Latent frames, rows and columns.
    grid: [usize; 3],
    /// Its clips, by the same permutation in every run of a seed; the first `held` are held out.
    split: Permutation,
    held: usize,
}

impl Bucket {
    fn len(&self) -> usize {
        self.split.len - self.held
    }
}

/// A data set: training and validation clips by index.
pub struct Dataset {
    source: Source,
    seed: u64,
    text: [usize; 2],
    /// Clips that a step takes.
    per_step: usize,
    /// By grid, in the configuration's order; the first has the held-out clips.
    buckets: Vec<Bucket>,
}

impl Dataset {
    /// Opens what `[data]` names. Every shard's header is checked here; clips are read when asked for.
    pub fn open(config: &Config) -> Result<Dataset, DataError> {
        let grids = config.grids();
        let channels = config.model.latent_channels;
        let text = [config.model.text_tokens, config.model.text_dim];
        let source = match config.data.kind {
            DataKind::Procedural => Source::Procedural {
                seed: config.data.seed,
                clips: config.data.clips,
                plays: config.data.plays.unwrap_or(1),
                levels: config.haar_levels().ok_or_else(|| DataError::Shard {
                    reason: format!("model.latent_channels is {channels}; procedural clips have 24 or 192"),
                    next: "dsv-train run --set model.latent_channels=24".into(),
                })?,
            },
            DataKind::Shards => {
                let latents: Vec<[usize; 4]> = grids.iter().map(|&[t, h, w]| [channels, t, h, w]).collect();
                Source::Shards(Shards::open(&config.data.path, &latents, text)?)
            }
        };
        let per_step = config.data.batch_size * config.train.grad_accumulation;
        let several = grids.len() > 1;
        let buckets = grids.iter().enumerate().map(|(bucket, &grid)| {
            let total = match &source {
                // Scenes go round the grids.
                Source::Procedural { clips, .. } => (clips + grids.len() - 1 - bucket) / grids.len(),
                Source::Shards(s) => s.len(bucket),
            };
            let held = if bucket == 0 { config.data.validation } else { 0 };
            if bucket == 0 && total <= held {
                return Err(DataError::TooFew { total, validation: held });
            }
            if several && total - held < per_step {
                return Err(DataError::NoStep { grid, clips: total - held, per_step });
            }
            let split = Permutation::new(total, config.data.seed ^ 0x5eed_0fe7_a1da_7e00, bucket as u64);
            Ok(Bucket { grid, split, held })
        });
        let buckets = buckets.collect::<Result<_, _>>()?;
        Ok(Dataset { source, seed: config.data.seed, text, per_step, buckets })
    }

    /// Training clips of an epoch.
    pub fn len(&self) -> usize {
        match self.buckets.as_slice() {
            [one] => one.len(),
            several => several.iter().map(|b| b.len() / self.per_step * self.per_step).sum(),
        }
    }

    /// Whether there is nothing to train on (never, once opened).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Held-out clips, all of the first grid.
    pub fn validation_len(&self) -> usize {
        self.buckets[0].held
    }

    /// How the latents become pictures.
    pub fn codec(&self) -> Codec {
        match &self.source {
            Source::Procedural { levels, .. } => Codec::Haar { levels: *levels },
            Source::Shards(s) => s.codec().clone(),
        }
    }

    /// Grid and number (in the source) of the training clip at a position.
    fn locate(&self, position: DataPosition) -> (usize, usize) {
        let index = position.index as usize;
        assert!(index < self.len(), "clip {index} of an epoch of {}", self.len());
        let (bucket, at) = match self.buckets.as_slice() {
            [_] => (0, index),
            several => {
                let steps = |b: &Bucket| b.len() / self.per_step;
                let total = several.iter().map(steps).sum();
                let order = Permutation::new(total, self.seed ^ 0x57e9_5000_0b0c_4e75, position.epoch + 1);
                let mut step = order.at(index / self.per_step);
                let bucket = several.iter().position(|b| {
                    let inside = step < steps(b);
                    step -= if inside { 0 } else { steps(b) };
                    inside
                });
                let bucket = bucket.expect("a permutation of all steps");
                (bucket, step * self.per_step + index % self.per_step)
            }
        };
        let Bucket { split, held, .. } = &self.buckets[bucket];
        // The first grid's order is that of a data set which has no other.
        let seed = self.seed.wrapping_add((bucket as u64) << 32);
        let order = Permutation::new(self.buckets[bucket].len(), seed, position.epoch + 1);
        (bucket, split.at(held + order.at(at)))
    }

    /// The training clip at a position.
    ///
    /// # Panics
    /// If `position.index` is not below [`Dataset::len`].
    pub fn train_clip(&self, position: DataPosition) -> Result<Clip, DataError> {
        let (bucket, index) = self.locate(position);
        self.clip(bucket, index)
    }

    /// The held-out clip `index`, the same in every run of this seed.
    ///
    /// # Panics
    /// If `index` is not below [`Dataset::validation_len`].
    pub fn validation_clip(&self, index: usize) -> Result<Clip, DataError> {
        let Bucket { split, held, .. } = &self.buckets[0];
        assert!(index < *held, "validation clip {index} of {held}");
        self.clip(0, split.at(index))
    }

    /// The next `count` training clips; `position` moves past them. With several grids, `count` is the clips of a
    /// step, and `position` one that a step begins with.
    pub fn next_batch(&self, position: &mut DataPosition, count: usize) -> Result<Vec<Clip>, DataError> {
        let at = |i: usize| self.locate(position.after(i as u64, self.len()));
        let places: Vec<(usize, usize)> = (0..count).map(at).collect();
        if let Source::Shards(s) = &self.source {
            // All pages are asked for before the first is waited for.
            places.iter().for_each(|&(bucket, index)| s.will_need(bucket, index));
        }
        let clips =
            places.iter().map(|&(bucket, index)| self.clip(bucket, index)).collect::<Result<_, _>>()?;
        *position = position.after(count as u64, self.len());
        Ok(clips)
    }

    /// A caption as the embedding a clip of this set would have, f32 `[text_tokens, text_dim]`. Only procedural
    /// and hashed captions have one here; for a text encoder's embeddings it is `None`.
    pub fn embed(&self, caption: &str) -> Option<Vec<f32>> {
        let hashed = match &self.source {
            Source::Procedural { .. } => true,
            Source::Shards(s) => s.hashed_text(),
        };
        hashed.then(|| text::embed(caption, self.text[0], self.text[1]))
    }

    fn clip(&self, bucket: usize, index: usize) -> Result<Clip, DataError> {
        match &self.source {
            Source::Shards(s) => s.clip(bucket, index),
            Source::Procedural { seed, plays, levels, .. } => {
                let index = index * self.buckets.len() + bucket;
                let grid @ [frames, height, width] = self.buckets[bucket].grid;
                let scene = Scene::new(*seed, index as u64);
                let video = scene.render((frames << levels) / plays, height << levels, width << levels);
                let video = video.played(*plays);
                let caption = scene.caption();
                Ok(Clip {
                    id: format!("scene-{seed}-{index:06}"),
                    grid,
                    latents: haar::encode(&video, *levels),
                    text: text::embed(&caption, self.text[0], self.text[1]),
                    caption,
                })
            }
        }
    }
}

/// A pseudo-random permutation of `0..len`, computed one element at a time: a four-round Feistel network over
/// the next even power of two, walked until it lands inside.
#[derive(Clone, Debug)]
struct Permutation {
    len: usize,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    fn new(len: usize, seed: u64, stream: u64) -> Self {
        let bits = (len.max(2) - 1).ilog2() + 1;
        let mut r = SplitMix::new(seed, stream);
        Permutation { len, half_bits: bits.div_ceil(2), keys: std::array::from_fn(|_| r.next()) }
    }

    fn at(&self, index: usize) -> usize {
        assert!(index < self.len, "index {index} of {}", self.len);
        let mask = (1u64 << self.half_bits) - 1;
        let mut x = index as u64;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for key in self.keys {
                let round = SplitMix::new(key, right).next() & mask;
                (left, right) = (right, left ^ round);
            }
            x = left << self.half_bits | right;
            if x < self.len as u64 {
                return x as usize;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn tiny(clips: usize, validation: usize) -> Config {
        let mut c = Config::preset("tiny").unwrap();
        (c.data.frames, c.data.height, c.data.width) = (2, 4, 4);
        (c.data.clips, c.data.validation) = (clips, validation);
        c
    }

    #[test]
    fn permutations_are_permutations_and_differ() {
        for len in [1, 2, 3, 7, 64, 1000] {
            let p = Permutation::new(len, 9, 4);
            assert_eq!((0..len).map(|i| p.at(i)).collect::<BTreeSet<_>>().len(), len);
        }
        let order = |seed, epoch| {
            let p = Permutation::new(100, seed, epoch);
            (0..100).map(|i| p.at(i)).collect::<Vec<_>>()
        };
        assert_eq!(order(1, 2), order(1, 2));
        assert_ne!(order(1, 2), order(1, 3));
        assert_ne!(order(1, 2), order(2, 2));
        assert_ne!(order(1, 2), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn an_epoch_is_every_training_clip_once_and_no_held_out_one() {
        let d = Dataset::open(&tiny(20, 4)).unwrap();
        let held: BTreeSet<String> = (0..4).map(|i| d.validation_clip(i).unwrap().id).collect();
        let mut position = DataPosition::default();
        let mut orders = Vec::new();
        for _ in 0..2 {
            let ids: Vec<String> =
                d.next_batch(&mut position, 16).unwrap().into_iter().map(|c| c.id).collect();
            assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), 16);
            assert!(ids.iter().all(|id| !held.contains(id)));
            orders.push(ids);
        }
        assert_eq!(position, DataPosition { epoch: 2, index: 0 });
        assert_ne!(orders[0], orders[1]);
        assert_eq!(held.len(), 4);
    }

    #[test]
    fn resuming_gives_the_very_next_clip_across_epochs() {
        let d = Dataset::open(&tiny(11, 2)).unwrap();
        let mut one = DataPosition::default();
        let all: Vec<Clip> = d.next_batch(&mut one, 20).unwrap();
        let mut position = DataPosition::default();
        let mut seen = Vec::new();
        while seen.len() < 20 {
            let json = serde_json::to_string(&position).unwrap();
            position = serde_json::from_str(&json).unwrap();
            let again = Dataset::open(&tiny(11, 2)).unwrap();
            seen.extend(again.next_batch(&mut position, 4).unwrap());
        }
        assert_eq!((seen, position), (all, one));
        assert_eq!(one.clips_seen(d.len()), 20);
    }

    fn buckets(clips: usize, per_step: usize) -> Config {
        let mut c = tiny(clips, 3);
        c.data.buckets = vec![[2, 2, 8], [1, 4, 4]];
        (c.data.batch_size, c.train.grad_accumulation) = (per_step, 1);
        c.validate().unwrap();
        c
    }

    #[test]
    fn a_step_has_clips_of_one_grid_and_an_epoch_every_whole_step_once() {
        // 14, 13 and 13 scenes; 11, 13 and 13 to train on: 2, 3 and 3 steps of four.
        let c = buckets(40, 4);
        let d = Dataset::open(&c).unwrap();
        assert_eq!((d.len(), d.validation_len()), (32, 3));
        let held: BTreeSet<String> = (0..3).map(|i| d.validation_clip(i).unwrap().id).collect();
        let mut position = DataPosition::default();
        let mut orders = Vec::new();
        for _ in 0..2 {
            let (mut grids, mut ids) = (Vec::new(), BTreeSet::new());
            for _ in 0..8 {
                let clips = d.next_batch(&mut position, 4).unwrap();
                assert!(clips.iter().all(|c| c.grid == clips[0].grid), "one step, one grid");
                assert!(clips.iter().all(|c| c.latents.len() == 24 * c.grid.iter().product::<usize>()));
                grids.push(clips[0].grid);
                ids.extend(clips.into_iter().map(|c| c.id));
            }
            assert_eq!(ids.len(), 32);
            assert!(ids.is_disjoint(&held));
            for (grid, steps) in [([2, 4, 4], 2), ([2, 2, 8], 3), ([1, 4, 4], 3)] {
                assert_eq!(grids.iter().filter(|g| **g == grid).count(), steps, "{grids:?}");
            }
            orders.push((grids, ids));
        }
        assert_eq!(position, DataPosition { epoch: 2, index: 0 });
        assert!(orders[0].0 != orders[1].0 && orders[0].1 != orders[1].1, "{orders:?}");
        // Any step can be read from its position alone.
        let mut one = DataPosition::default();
        let all: Vec<Vec<Clip>> = (0..16).map(|_| d.next_batch(&mut one, 4).unwrap()).collect();
        for (i, expected) in all.iter().enumerate().rev() {
            let mut at = DataPosition::default().after(4 * i as u64, d.len());
            assert_eq!(&Dataset::open(&c).unwrap().next_batch(&mut at, 4).unwrap(), expected);
        }
    }

    #[test]
    fn a_grid_without_a_whole_step_is_an_error() {
        let error = Dataset::open(&buckets(17, 6)).err().unwrap().to_string();
        assert!(
            error.starts_with("3 clips of [2, 4, 4] latents") && error.contains("data.batch_size"),
            "{error}"
        );
    }

    #[test]
    fn clips_have_the_configured_shapes_and_decode_to_their_video() {
        let c = tiny(8, 1);
        let d = Dataset::open(&c).unwrap();
        let clip = d.train_clip(DataPosition { epoch: 3, index: 2 }).unwrap();
        assert_eq!(clip.latents.len(), c.latent_shape().iter().product::<usize>());
        assert_eq!(clip.text.len(), 8 * 64);
        assert_eq!(d.embed(&clip.caption).unwrap(), clip.text);
        let video = d.codec().decode(&clip.latents, c.latent_shape()).unwrap();
        assert_eq!((video.frames, video.height, video.width), (4, 8, 8));
        let index = clip.id.rsplit('-').next().unwrap().parse().unwrap();
        assert_eq!(video, Scene::new(c.data.seed, index).render(4, 8, 8));
    }

    #[test]
    fn a_scene_played_twice_is_the_same_from_the_middle_on() {
        let mut c = tiny(8, 1);
        c.data.plays = Some(2);
        let d = Dataset::open(&c).unwrap();
        let clip = d.train_clip(DataPosition::default()).unwrap();
        let video = d.codec().decode(&clip.latents, c.latent_shape()).unwrap();
        let index = clip.id.rsplit('-').next().unwrap().parse().unwrap();
        let once = Scene::new(c.data.seed, index).render(2, 8, 8);
        assert_eq!(video.rgb, [once.rgb.clone(), once.rgb].concat());
    }

    #[test]
    fn holding_out_everything_is_an_error() {
        let error = Dataset::open(&tiny(4, 4)).err().unwrap().to_string();
        assert!(
            error.starts_with("4 clips, of which data.validation = 4") && error.contains("next: "),
            "{error}"
        );
    }
}
