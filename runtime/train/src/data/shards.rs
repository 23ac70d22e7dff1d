//! Shards of latents: safetensors files made by [`super::prepare`] or by anyone's VAE and text encoder.
//!
//! A shard holds `latents` `[N, C, T, H, W]` and `text` `[N, L, text_dim]`, each f32, f16 or bf16. Its metadata
//! may hold `schema` (`dsv-latents-1`), `codec` (`haar:1`, `haar:2` or the VAE's name; absent = external),
//! `text_encoder` (`hashed-words` for [`super::text`]), and `ids` and `captions`, JSON lists of N strings.
//! Texts shorter than `model.text_tokens` are padded with zeros.

use super::{Clip, Codec, DataError};
use crate::tensors::{TensorFile, TensorView, to_f32};
use safetensors::Dtype;
use std::path::{Path, PathBuf};

/// Value of the metadata key `schema`.
pub const SCHEMA: &str = "dsv-latents-1";
/// Value of the metadata key `text_encoder` for [`super::text`].
pub const HASHED: &str = "hashed-words";

struct Shard {
    file: TensorFile,
    grid: usize,
    clips: usize,
    text_tokens: usize,
    ids: Vec<String>,
    captions: Vec<String>,
}

/// A folder of shards, opened and checked; clips are read from the maps. The clips of each grid are counted apart.
pub struct Shards {
    shards: Vec<Shard>,
    /// For each grid: its shards, and the first clip of each, with the total at the end.
    grids: Vec<(Vec<usize>, Vec<usize>)>,
    latent: Vec<[usize; 4]>,
    text: [usize; 2],
    codec: Codec,
    hashed: bool,
}

/// Shard files of a folder in name order.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let none = |detail: String| DataError::NoShards { path: folder.to_path_buf(), detail };
    let entries = std::fs::read_dir(folder).map_err(|e| none(format!(": {e}")))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .filter(|p| !p.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')))
        .collect();
    files.sort();
    if files.is_empty() { Err(none(String::new())) } else { Ok(files) }
}

impl Shards {
    /// Opens every shard of a folder for clips of one of these `[channels, frames, height, width]` and texts of
    /// `[tokens, dim]`, checking headers, lengths, types and shapes.
    pub fn open(folder: &Path, latent: &[[usize; 4]], text: [usize; 2]) -> Result<Shards, DataError> {
        let mut shards = Vec::new();
        let mut grids = vec![(Vec::new(), vec![0]); latent.len()];
        let mut kind: Option<(Codec, bool)> = None;
        for path in list(folder)? {
            let file = TensorFile::open(&path).map_err(|e| DataError::Shard {
                reason: e.to_string(),
                next: format!(
                    "delete {} and copy it again, or make it anew: dsv-train prepare VIDEOS... --out {} --overwrite",
                    path.display(),
                    folder.display()
                ),
            })?;
            let shard = check(file, latent, text)?;
            let label = shard.file.metadata("codec").unwrap_or("external");
            let this = (Codec::from_label(label), shard.file.metadata("text_encoder") == Some(HASHED));
            if let Some(first) = &kind
                && *first != this
            {
                return Err(DataError::Shard {
                    reason: format!(
                        "{} has codec {label} and text_encoder {}, the shards before it codec {} and text_encoder {}",
                        path.display(),
                        shard.file.metadata("text_encoder").unwrap_or("external"),
                        first.0.label(),
                        if first.1 { HASHED } else { "external" },
                    ),
                    next: "keep shards of different encoders in different folders, and set data.path to one"
                        .into(),
                });
            }
            kind = Some(this);
            let (of_grid, starts) = &mut grids[shard.grid];
            starts.push(starts[starts.len() - 1] + shard.clips);
            of_grid.push(shards.len());
            shards.push(shard);
        }
        let (codec, hashed) = kind.expect("list() gives one file or more");
        Ok(Shards { shards, grids, latent: latent.to_vec(), text, codec, hashed })
    }

    /// Clips of a grid in all shards.
    pub fn len(&self, grid: usize) -> usize {
        let (_, starts) = &self.grids[grid];
        starts[starts.len() - 1]
    }

    /// Whether all shards are empty.
    pub fn is_empty(&self) -> bool {
        (0..self.grids.len()).all(|grid| self.len(grid) == 0)
    }

    /// How the latents become pictures.
    pub fn codec(&self) -> &Codec {
        &self.codec
    }

    /// Whether texts are [`super::text::embed`]'s.
    pub fn hashed_text(&self) -> bool {
        self.hashed
    }

    /// The shard of clip `index` of a grid, and its place there.
    fn locate(&self, grid: usize, index: usize) -> (&Shard, usize) {
        assert!(index < self.len(grid), "clip {index} of {}", self.len(grid));
        let (shards, starts) = &self.grids[grid];
        let s = starts.partition_point(|&start| start <= index) - 1;
        (&self.shards[shards[s]], index - starts[s])
    }

    /// Asks the system to read clip `index` of a grid ahead.
    ///
    /// # Panics
    /// If `index` is not below [`Shards::len`].
    pub fn will_need(&self, grid: usize, index: usize) {
        let (shard, i) = self.locate(grid, index);
        let (latents, text) = (self.latent[grid].iter().product::<usize>(), shard.text_tokens * self.text[1]);
        for (name, values) in [("latents", latents), ("text", text)] {
            let bytes = values * shard.file.get(name).expect("checked on opening").dtype.bitsize() / 8;
            shard.file.will_need(name, i * bytes..(i + 1) * bytes);
        }
    }

    /// Reads clip `index` of a grid.
    ///
    /// # Panics
    /// If `index` is not below [`Shards::len`].
    pub fn clip(&self, grid: usize, index: usize) -> Result<Clip, DataError> {
        let (shard, i) = self.locate(grid, index);
        let read = |name: &str, values: usize| -> Result<Vec<f32>, DataError> {
            let tensor = shard.file.get(name).expect("checked on opening");
            let bytes = values * tensor.dtype.bitsize() / 8;
            let data =
                to_f32(tensor.dtype, &tensor.data[i * bytes..(i + 1) * bytes]).expect("checked on opening");
            match data.iter().position(|x| !x.is_finite()) {
                None => Ok(data),
                Some(at) => Err(DataError::Shard {
                    reason: format!(
                        "{}: {name} of clip {i} holds {} at value {at}",
                        shard.file.path().display(),
                        data[at]
                    ),
                    next: "make that shard anew, or delete it".into(),
                }),
            }
        };
        let [_, frames, height, width] = self.latent[grid];
        let latents = read("latents", self.latent[grid].iter().product())?;
        let mut text = read("text", shard.text_tokens * self.text[1])?;
        text.resize(self.text[0] * self.text[1], 0.0);
        let stem = || shard.file.path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Clip {
            id: shard.ids.get(i).cloned().unwrap_or_else(|| format!("{}#{i}", stem())),
            caption: shard.captions.get(i).cloned().unwrap_or_default(),
            grid: [frames, height, width],
            latents,
            text,
        })
    }
}

fn check(file: TensorFile, latent: &[[usize; 4]], text: [usize; 2]) -> Result<Shard, DataError> {
    let path = file.path().display().to_string();
    let shard = |reason: String, next: &str| DataError::Shard { reason, next: next.to_string() };
    if let Some(schema) = file.metadata("schema").filter(|s| *s != SCHEMA) {
        return Err(shard(
            format!("{path} has schema {schema:?}; allowed: {SCHEMA:?}, or none"),
            "make it anew: dsv-train prepare --help",
        ));
    }
    let tensor = |name: &str, form: &str| -> Result<TensorView<'_>, DataError> {
        let t = file.get(name).ok_or_else(|| {
            shard(
                format!("{path} has no tensor {name:?}; it has: {}", file.names().collect::<Vec<_>>().join(", ")),
                &format!("a shard needs latents [N, C, T, H, W] and text [N, L, text_dim]; name it {name:?} of shape {form}"),
            )
        })?;
        if !matches!(t.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(shard(
                format!("{path}: {name} is {:?}; allowed: F32, F16, BF16", t.dtype),
                "convert it where it was made",
            ));
        }
        Ok(t)
    };
    let z = tensor("latents", "[N, C, T, H, W]")?;
    let y = tensor("text", "[N, L, text_dim]")?;
    let grid = latent.iter().position(|latent| z.shape.len() == 5 && z.shape[1..] == *latent);
    let Some(grid) = grid else {
        let [channels, ..] = latent[0];
        let set = if z.shape.len() != 5 {
            "make latents of five dimensions: dsv-train prepare --help".into()
        } else if latent.len() > 1 {
            format!(
                "add {:?} to data.buckets (clips of {} channels), or keep that shard in another folder",
                &z.shape[2..],
                z.shape[1]
            )
        } else {
            format!(
                "dsv-train run --set model.latent_channels={} --set data.frames={} --set data.height={} --set data.width={}",
                z.shape[1], z.shape[2], z.shape[3], z.shape[4]
            )
        };
        let wanted: Vec<String> =
            latent.iter().map(|l| format!("[N, {channels}, {}, {}, {}]", l[1], l[2], l[3])).collect();
        return Err(shard(
            format!("{path}: latents have shape {:?}, the run wants {}", z.shape, wanted.join(" or ")),
            &set,
        ));
    };
    let clips = z.shape[0];
    if y.shape.len() != 3 || y.shape[0] != clips || y.shape[1] > text[0] || y.shape[2] != text[1] {
        let set = if y.shape.len() == 3 && y.shape[0] == clips {
            format!(
                "dsv-train run --set model.text_tokens={} --set model.text_dim={}",
                y.shape[1], y.shape[2]
            )
        } else {
            "make one text for each clip: dsv-train prepare --help".into()
        };
        return Err(shard(
            format!(
                "{path}: text has shape {:?}, the run wants [{clips}, up to {}, {}]",
                y.shape, text[0], text[1]
            ),
            &set,
        ));
    }
    let text_tokens = y.shape[1];
    let strings = |key: &str| -> Result<Vec<String>, DataError> {
        let Some(json) = file.metadata(key) else { return Ok(Vec::new()) };
        serde_json::from_str(json).ok().filter(|v: &Vec<String>| v.len() == clips).ok_or_else(|| {
            shard(
                format!("{path}: metadata {key} is not a JSON list of {clips} strings"),
                "leave it out, or write one string for each clip",
            )
        })
    };
    let (ids, captions) = (strings("ids")?, strings("captions")?);
    Ok(Shard { grid, clips, text_tokens, ids, captions, file })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable::{RealDisk, write_file};
    use crate::tensors::{from_f32, write};
    use std::collections::BTreeMap;

    fn put(path: &Path, dtype: Dtype, clips: usize, latent: [usize; 4], text: [usize; 2], codec: &str) {
        let n: usize = latent.iter().product();
        let z: Vec<f32> = (0..clips * n).map(|i| i as f32 * 0.25).collect();
        let y: Vec<f32> = (0..clips * text[0] * text[1]).map(|i| -(i as f32)).collect();
        let (z, y) = (from_f32(dtype, &z).unwrap(), from_f32(dtype, &y).unwrap());
        let mut zs = vec![clips];
        zs.extend(latent);
        let tensors = [
            TensorView { name: "latents".into(), dtype, shape: zs, data: &z },
            TensorView { name: "text".into(), dtype, shape: vec![clips, text[0], text[1]], data: &y },
        ];
        let metadata = BTreeMap::from([("codec".to_string(), codec.to_string())]);
        write_file(&RealDisk, path, |w| write(w, &tensors, &metadata)).unwrap();
    }

    const LATENT: [usize; 4] = [2, 1, 2, 2];

    fn error(dir: &Path, latent: [usize; 4], text: [usize; 2]) -> String {
        Shards::open(dir, &[latent], text).err().unwrap().to_string()
    }

    #[test]
    fn clips_are_read_across_shards_in_each_dtype_with_short_texts_padded() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let dir = tempfile::tempdir().unwrap();
            put(&dir.path().join("a.safetensors"), dtype, 2, LATENT, [1, 3], "some-vae");
            put(&dir.path().join("b.safetensors"), dtype, 3, LATENT, [2, 3], "some-vae");
            let s = Shards::open(dir.path(), &[LATENT], [2, 3]).unwrap();
            assert_eq!((s.len(0), s.codec()), (5, &Codec::External("some-vae".into())));
            let clip = s.clip(0, 1).unwrap();
            assert_eq!(clip.latents, (8..16).map(|i| i as f32 * 0.25).collect::<Vec<_>>());
            assert_eq!((clip.text, clip.id), (vec![-3.0, -4.0, -5.0, 0.0, 0.0, 0.0], "a#1".to_string()));
            assert_eq!(s.clip(0, 2).unwrap().text, [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]);
            assert_eq!(s.clip(0, 4).unwrap().id, "b#2");
        }
    }

    #[test]
    fn clips_of_several_grids_are_counted_apart() {
        let dir = tempfile::tempdir().unwrap();
        let wide = [2, 1, 1, 4];
        put(&dir.path().join("a.safetensors"), Dtype::F32, 2, LATENT, [2, 3], "v");
        put(&dir.path().join("b.safetensors"), Dtype::BF16, 3, wide, [2, 3], "v");
        put(&dir.path().join("c.safetensors"), Dtype::F32, 1, LATENT, [2, 3], "v");
        let s = Shards::open(dir.path(), &[wide, LATENT], [2, 3]).unwrap();
        assert_eq!((s.len(0), s.len(1)), (3, 3));
        let ids: Vec<_> = (0..3).flat_map(|i| [s.clip(0, i).unwrap(), s.clip(1, i).unwrap()]).collect();
        let ids: Vec<_> = ids.into_iter().map(|c| (c.id, c.grid)).collect();
        let expected = ["b#0", "a#0", "b#1", "a#1", "b#2", "c#0"];
        for (i, ((id, grid), expected)) in ids.iter().zip(expected).enumerate() {
            assert_eq!((id.as_str(), *grid), (expected, if i % 2 == 0 { [1, 1, 4] } else { [1, 2, 2] }));
        }
        s.will_need(0, 2);
        let text = Shards::open(dir.path(), &[wide, [2, 4, 1, 1]], [2, 3]).err().unwrap().to_string();
        assert!(
            text.contains("the run wants [N, 2, 1, 1, 4] or [N, 2, 4, 1, 1]")
                && text.contains("add [1, 2, 2] to data.buckets"),
            "{text}"
        );
    }

    #[test]
    fn a_truncated_shard_names_file_bytes_and_next_command() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        put(&path, Dtype::F16, 4, LATENT, [2, 3], "haar:1");
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 40]).unwrap();
        let text = error(dir.path(), LATENT, [2, 3]);
        let expected = format!(
            "{} is truncated: its header promises {} bytes, the file has {}\n  next: delete {}",
            path.display(),
            whole.len(),
            whole.len() - 40,
            path.display()
        );
        assert!(text.starts_with(&expected), "{text}");
    }

    #[test]
    fn a_shard_that_cannot_be_read_is_named_with_the_next_command() {
        let dir = tempfile::tempdir().unwrap();
        put(&dir.path().join("a.safetensors"), Dtype::F16, 4, LATENT, [2, 3], "haar:1");
        // A link that leads nowhere, as after an unmounted disk.
        let lost = dir.path().join("b.safetensors");
        std::os::unix::fs::symlink(dir.path().join("gone"), &lost).unwrap();
        let text = error(dir.path(), LATENT, [2, 3]);
        assert!(text.starts_with(&format!("cannot open {}: ", lost.display())), "{text}");
        assert!(text.contains("\n  next: "), "{text}");
    }

    #[test]
    fn wrong_shapes_types_and_mixtures_say_what_to_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        assert!(error(&dir.path().join("none"), LATENT, [2, 3]).contains("dsv-train prepare"));
        assert!(error(dir.path(), LATENT, [2, 3]).starts_with("no shards"));
        put(&path, Dtype::F16, 4, LATENT, [2, 3], "haar:1");
        let text = error(dir.path(), [2, 1, 2, 4], [2, 3]);
        assert!(
            text.contains("latents have shape [4, 2, 1, 2, 2], the run wants [N, 2, 1, 2, 4]")
                && text.contains("--set data.width=2"),
            "{text}"
        );
        let text = error(dir.path(), LATENT, [1, 3]);
        assert!(text.contains("text has shape [4, 2, 3], the run wants [4, up to 1, 3]"), "{text}");
        put(&dir.path().join("b.safetensors"), Dtype::F16, 4, LATENT, [2, 3], "other");
        assert!(error(dir.path(), LATENT, [2, 3]).contains("codec other"));
        let data = [0u8; 8];
        let only = [TensorView { name: "z".into(), dtype: Dtype::I64, shape: vec![1], data: &data }];
        write_file(&RealDisk, &path, |w| write(w, &only, &BTreeMap::new())).unwrap();
        assert!(error(dir.path(), LATENT, [2, 3]).contains("no tensor \"latents\"; it has: z"));
    }

    #[test]
    fn values_that_are_not_numbers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let z = [0.0, 1.0, f32::NAN, 2.0];
        let tensors = [
            TensorView::f32("latents", &[2, 2, 1, 1, 1], &z),
            TensorView::f32("text", &[2, 1, 1], &[0.0, 0.0]),
        ];
        write_file(&RealDisk, &path, |w| write(w, &tensors, &BTreeMap::new())).unwrap();
        let s = Shards::open(dir.path(), &[[2, 1, 1, 1]], [1, 1]).unwrap();
        assert!(s.clip(0, 0).is_ok());
        assert!(s.clip(0, 1).unwrap_err().to_string().contains("latents of clip 1 holds NaN at value 0"));
    }
}
