//! Starting from weights trained elsewhere: tensors of safetensors files, found by a key map, become the master
//! weights of a run's first step.
//!
//! A key map is a TOML or JSON table from parameters of this model (`dsv-train` names them as its checkpoints do, without
//! `weight.`) to tensors of the file. `{l}` stands for every block's number. A list is joined along the first dimension
//! (Q, K and V that the file keeps apart); `transpose = true` turns `[in, out]` into `[out, in]`:
//!
//! ```toml
//! "patch.weight" = "x_embedder.proj.weight"
//! "block.{l}.qkv.weight" = ["blocks.{l}.attn.q.weight", "blocks.{l}.attn.k.weight", "blocks.{l}.attn.v.weight"]
//! "block.{l}.o.weight" = { from = "blocks.{l}.attn.out.kernel", transpose = true }
//! ```
//!
//! Trailing dimensions are flattened where the model's tensor has fewer (a patch convolution `[D, C, t, h, w]` is the
//! matrix `[D, C t h w]`). Without a map names are taken as they are, with or without `weight.`: the
//! `model.safetensors` of another run's checkpoint imports by itself.

use crate::engine::{Engine, EngineError};
use crate::model::Model;
use crate::tensors::{TensorFile, TensorFileError, TensorView};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Why weights cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A file or folder cannot be read.
    #[error(
        "cannot read {path}: {reason}\n  next: train.init_weights names a safetensors file or a folder of them, train.init_map a .toml or .json file"
    )]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A tensor file is damaged.
    #[error("{0}\n  next: copy it again")]
    File(#[from] TensorFileError),
    /// Tensors and model do not agree; every problem is listed.
    #[error(
        "weights of {path} do not fit the model ({} problem{})\n{}\n  next: correct train.init_map, or [model]", .problems.len(),
        if .problems.len() == 1 { "" } else { "s" },
        .problems.iter().map(|p| format!("  - {p}")).collect::<Vec<_>>().join("\n")
    )]
    Misfit {
        /// The weights.
        path: PathBuf,
        /// One sentence each.
        problems: Vec<String>,
    },
    /// The device.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// What was imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Where from.
    pub path: PathBuf,
    /// Parameters that were given values.
    pub parameters: usize,
    /// Parameters of the model that the map does not give: they keep their initial values.
    pub missing: Vec<String>,
    /// Tensors of the file that no parameter took.
    pub unmapped: Vec<String>,
}

/// The files of a folder, or the one file.
struct Source {
    files: Vec<TensorFile>,
}

impl Source {
    fn open(path: &Path) -> Result<Source, ImportError> {
        let read = |reason: String| ImportError::Read { path: path.to_path_buf(), reason };
        let paths = if path.is_dir() {
            crate::data::shards::list(path).map_err(|e| read(e.to_string()))?
        } else if path.exists() {
            vec![path.to_path_buf()]
        } else {
            return Err(read("there is no such file or folder".into()));
        };
        let files = paths.iter().map(|p| TensorFile::open(p)).collect::<Result<Vec<_>, _>>()?;
        Ok(Source { files })
    }

    fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.files.iter().find_map(|f| f.get(name))
    }

    fn names(&self) -> BTreeSet<&str> {
        self.files.iter().flat_map(TensorFile::names).collect()
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Names {
    One(String),
    Several(Vec<String>),
}

/// What a parameter is made of.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Entry {
    Plain(Names),
    Full {
        from: Names,
        #[serde(default)]
        transpose: bool,
    },
}

/// Parameter -> (tensors joined along the first dimension, whether each is transposed first).
type Map = BTreeMap<String, (Vec<String>, bool)>;

/// A key map with `{l}` written out for every block.
fn read_map(path: &Path, layers: usize) -> Result<Map, ImportError> {
    let bad = |reason: String| ImportError::Read { path: path.to_path_buf(), reason };
    let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
    let entries: BTreeMap<String, Entry> = if path.extension().is_some_and(|e| e == "json") {
        serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?
    } else {
        toml::from_str(&text).map_err(|e| bad(e.to_string()))?
    };
    let mut out = Map::new();
    for (ours, entry) in entries {
        let (names, transpose) = match entry {
            Entry::Plain(names) => (names, false),
            Entry::Full { from, transpose } => (from, transpose),
        };
        let names = match names {
            Names::One(name) => vec![name],
            Names::Several(names) => names,
        };
        let of = |l: usize| -> (String, (Vec<String>, bool)) {
            let put = |name: &String| name.replace("{l}", &l.to_string());
            (put(&ours), (names.iter().map(put).collect(), transpose))
        };
        let blocks = if ours.contains("{l}") { layers } else { 1 };
        out.extend((0..blocks).map(of));
    }
    Ok(out)
}

/// Values of one parameter, and the shape they have in the file after joining and transposing.
fn gather(
    source: &Source,
    names: &[String],
    transpose: bool,
    problems: &mut Vec<String>,
) -> Option<(Vec<usize>, Vec<f32>)> {
    let mut out: Option<(Vec<usize>, Vec<f32>)> = None;
    for name in names {
        let Some(view) = source.get(name) else {
            problems.push(format!("the file has no tensor {name:?}"));
            return None;
        };
        let Ok(mut values) = view.to_f32() else {
            problems.push(format!("{name} is {:?}; allowed: F32, F16, BF16", view.dtype));
            return None;
        };
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            problems.push(format!("{name} holds {} at value {at}", values[at]));
            return None;
        }
        let mut shape = view.shape.clone();
        if transpose {
            let [rows, columns] = shape[..] else {
                problems.push(format!("{name} has shape {shape:?}; transpose needs two dimensions"));
                return None;
            };
            values = (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect();
            shape = vec![columns, rows];
        }
        match &mut out {
            None => out = Some((shape, values)),
            Some((joined, all)) => {
                if joined.is_empty() || shape.is_empty() || joined[1..] != shape[1..] {
                    problems.push(format!(
                        "{name} has shape {shape:?}, which cannot be joined to {joined:?} along the first dimension"
                    ));
                    return None;
                }
                joined[0] += shape[0];
                all.extend(values);
            }
        }
    }
    out
}

/// Whether a tensor of the file is a parameter of this shape once trailing dimensions are flattened.
fn fits(file: &[usize], model: &[usize]) -> bool {
    let Some((last, first)) = model.split_last() else { return file.is_empty() };
    file.len() >= model.len()
        && file[..first.len()] == *first
        && file[first.len()..].iter().product::<usize>() == *last
}

/// Writes the tensors of `weights` to a laid-out, initialised model: masters, averages and compute copies.
///
/// # Errors
/// [`ImportError::Misfit`] with every tensor that is missing, of another shape or not finite, before anything is
/// written.
pub fn import(
    engine: &mut dyn Engine,
    model: &Model,
    weights: &Path,
    map: Option<&Path>,
) -> Result<Imported, ImportError> {
    let source = Source::open(weights)?;
    let sets = [Some(&model.params), model.predictors.as_ref().map(|p| &p.params)];
    let sets: Vec<_> = sets.into_iter().flatten().collect();
    let names = |set: usize| sets[set].slices(sets[set].master).map(|(spec, _)| spec.name.clone());
    let map = match map {
        Some(path) => read_map(path, model.shape.layers)?,
        None => names(0)
            .filter_map(|name| {
                let theirs = [name.clone(), format!("weight.{name}")];
                let found = theirs.into_iter().find(|t| source.get(t).is_some())?;
                Some((name, (vec![found], false)))
            })
            .collect(),
    };
    let mut problems = Vec::new();
    let known: BTreeSet<String> = (0..sets.len()).flat_map(names).collect();
    for ours in map.keys().filter(|ours| !known.contains(*ours)) {
        problems.push(format!("the map names {ours:?}, which is no parameter of this model"));
    }
    if map.is_empty() {
        let some: Vec<&str> = source.names().into_iter().take(3).collect();
        problems.push(format!(
            "no tensor has the name of a parameter (the file has {}, ...; the model {}, ...)",
            some.join(", "),
            names(0).take(3).collect::<Vec<_>>().join(", ")
        ));
    }
    let mut values = Vec::new();
    let mut missing = Vec::new();
    for (at, set) in sets.iter().enumerate() {
        for (spec, buf) in set.slices(set.master) {
            let Some((theirs, transpose)) = map.get(&spec.name) else {
                if at == 0 {
                    missing.push(spec.name.clone());
                }
                continue;
            };
            let Some((shape, data)) = gather(&source, theirs, *transpose, &mut problems) else { continue };
            if fits(&shape, &spec.shape) {
                values.push((buf, data));
            } else {
                problems.push(format!(
                    "{} has shape {:?} in the model, {shape:?} in the file ({})",
                    spec.name,
                    spec.shape,
                    theirs.join(" + ")
                ));
            }
        }
    }
    if !problems.is_empty() {
        return Err(ImportError::Misfit { path: weights.to_path_buf(), problems });
    }
    let parameters = values.len();
    for (buf, data) in values {
        engine.write_f32(buf, &data)?;
    }
    for set in &sets {
        set.restart_averages(engine);
        set.refresh(engine)?;
    }
    engine.sync()?;
    let used: BTreeSet<&str> = map.values().flat_map(|(t, _)| t).map(String::as_str).collect();
    let unmapped = source.names().difference(&used).map(|n| n.to_string()).collect();
    Ok(Imported { path: weights.to_path_buf(), parameters, missing, unmapped })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::durable::{RealDisk, write_file};
    use crate::engine::{ArenaPlan, CpuEngine, Precision, Space};
    use crate::model::{ModelShape, Purposes};
    use crate::tensors;

    fn model() -> (CpuEngine<f32>, Model) {
        let mut config = Config::preset("tiny").unwrap();
        (config.model.layers, config.model.heads, config.model.head_dim) = (2, 1, 8);
        (config.model.text_dim, config.model.patch) = (6, [1, 2, 2]);
        let mut plan = ArenaPlan::new(Precision::F32);
        let purposes = Purposes { train: true, ema: Some(Space::Device), ..Purposes::INFERENCE };
        let model = Model::reserve(ModelShape::from_config(&config, 1), purposes, &mut plan);
        let mut engine = CpuEngine::<f32>::new();
        engine.reserve(&plan, &model.shape.dims(0)).unwrap();
        model.initialise(&mut engine, 1).unwrap();
        (engine, model)
    }

    fn numbers(n: usize, from: f32) -> Vec<f32> {
        (0..n).map(|i| from + i as f32).collect()
    }

    fn file(dir: &Path, tensors: &[(&str, &[usize], Vec<f32>)]) -> PathBuf {
        let path = dir.join("theirs.safetensors");
        let views: Vec<_> =
            tensors.iter().map(|(name, shape, data)| TensorView::f32(*name, shape, data)).collect();
        write_file(&RealDisk, &path, |w| tensors::write(w, &views, &BTreeMap::new())).unwrap();
        path
    }

    fn read(engine: &mut CpuEngine<f32>, model: &Model, name: &str) -> [Vec<f32>; 3] {
        let of = |buf| model.params.slices(buf).find(|(s, _)| s.name == name).unwrap().1;
        [model.params.master, model.params.copy, model.params.ema.unwrap()]
            .map(|buf| engine.read_f32(of(buf)).unwrap())
    }

    #[test]
    fn tensors_are_joined_turned_and_flattened_by_the_map() {
        let dir = tempfile::tempdir().unwrap();
        let (mut engine, model) = model();
        let path = file(
            dir.path(),
            &[
                ("embed.w", &[8, 24, 1, 2, 2], numbers(8 * 96, 0.0)),
                ("layers.0.q", &[8, 8], numbers(64, 100.0)),
                ("layers.0.k", &[8, 8], numbers(64, 200.0)),
                ("layers.0.v", &[8, 8], numbers(64, 300.0)),
                ("layers.1.q", &[8, 8], numbers(64, 400.0)),
                ("layers.1.k", &[8, 8], numbers(64, 500.0)),
                ("layers.1.v", &[8, 8], numbers(64, 600.0)),
                ("layers.0.down", &[32, 8], numbers(256, 0.5)),
                ("layers.1.down", &[32, 8], numbers(256, 1.5)),
                ("vae.scale", &[1], vec![1.0]),
            ],
        );
        let map = r#"
            "patch.weight" = "embed.w"
            "block.{l}.qkv.weight" = ["layers.{l}.q", "layers.{l}.k", "layers.{l}.v"]
            "block.{l}.down.weight" = { from = "layers.{l}.down", transpose = true }
        "#;
        let toml = dir.path().join("map.toml");
        std::fs::write(&toml, map).unwrap();
        let table: toml::Table = toml::from_str(map).unwrap();
        let json = dir.path().join("map.json");
        std::fs::write(&json, serde_json::to_string(&table).unwrap()).unwrap();
        let before = read(&mut engine, &model, "block.0.up.weight");
        for map in [&toml, &json] {
            let found = import(&mut engine, &model, &path, Some(map)).unwrap();
            assert_eq!((found.parameters, found.unmapped), (5, vec!["vae.scale".to_string()]));
            assert!(found.missing.contains(&"block.0.up.weight".into()), "{:?}", found.missing);
            assert!(!found.missing.iter().any(|m| m.contains("qkv.weight") || m.contains("predictor")));
        }
        for got in read(&mut engine, &model, "block.1.qkv.weight") {
            assert_eq!((got[0], got[64], got[191]), (400.0, 500.0, 663.0));
        }
        for got in read(&mut engine, &model, "block.0.down.weight") {
            // [out 8, in 32] of [in 32, out 8]: value (o, i) is 8 i + o.
            assert_eq!((got[1], got[32], got[33]), (8.5, 1.5, 9.5));
        }
        assert_eq!(read(&mut engine, &model, "patch.weight")[0], numbers(768, 0.0));
        assert_eq!(read(&mut engine, &model, "block.0.up.weight"), before, "not in the map");
    }

    #[test]
    fn everything_that_does_not_fit_is_said_at_once_and_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (mut engine, model) = model();
        let path = file(
            dir.path(),
            &[
                ("a", &[8, 95], numbers(8 * 95, 0.0)),
                ("b", &[8], numbers(8, 9.0)),
                ("nan", &[8], vec![f32::NAN; 8]),
                ("two", &[4, 7], numbers(28, 0.0)),
            ],
        );
        let before = read(&mut engine, &model, "patch.bias");
        let map = dir.path().join("map.toml");
        let text = "\"patch.weight\" = \"a\"\n\"patch.bias\" = \"b\"\n\"block.{l}.o.weight\" = \"gone.{l}\"\n\
                    \"block.0.o.bias\" = \"nan\"\n\"blocks.0.x\" = \"b\"\n\"text.out.weight\" = [\"two\", \"b\"]\n";
        std::fs::write(&map, text).unwrap();
        let error = import(&mut engine, &model, &path, Some(&map)).unwrap_err().to_string();
        for wanted in [
            "patch.weight has shape [8, 96] in the model, [8, 95] in the file (a)",
            "the file has no tensor \"gone.0\"",
            "the file has no tensor \"gone.1\"",
            "nan holds NaN at value 0",
            "the map names \"blocks.0.x\", which is no parameter",
            "b has shape [8], which cannot be joined to [4, 7]",
            "6 problems",
            "next: correct train.init_map",
        ] {
            assert!(error.contains(wanted), "no '{wanted}' in\n{error}");
        }
        assert_eq!(read(&mut engine, &model, "patch.bias"), before, "written though the rest was refused");
        let error = import(&mut engine, &model, &path, None).unwrap_err().to_string();
        assert!(error.contains("no tensor has the name of a parameter"), "{error}");
        let nowhere = dir.path().join("nowhere");
        let error = import(&mut engine, &model, &nowhere, None).unwrap_err().to_string();
        assert!(error.contains("no such file") && error.contains("train.init_weights"), "{error}");
    }
}
