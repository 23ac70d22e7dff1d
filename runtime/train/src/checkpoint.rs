//! Checkpoints: a folder `step-00000100/` of named tensors and a state, which is either whole or not there.
//!
//! `model.safetensors` holds every tensor (weights, predictors, optimizer moments, averaged weights),
//! `state.json` a [`State`], `manifest.json` the size and blake3 of both. The folder is written under another
//! name, synced and renamed, so a crash or a full disk leaves the one before it as the newest.

use crate::data::DataPosition;
use crate::durable::{self, Disk, Hashing, RealDisk};
use crate::tensors::{self, TensorFile, TensorFileError, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const SCHEMA: u32 = 1;
const MODEL: &str = "model.safetensors";
const STATE: &str = "state.json";
const MANIFEST: &str = "manifest.json";

/// Everything but tensors that a resumed run needs.
///
/// Floats return bit for bit (the JSON reader rounds correctly), NaN and infinities excepted: they have no JSON
/// form and belong in tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Stage of the run (1 or 2).
    pub stage: u32,
    /// First clip not yet trained on.
    pub position: DataPosition,
    /// [`crate::config::Config::fingerprint`] of the run.
    pub fingerprint: String,
    /// The run as TOML ([`crate::config::Config::documented_toml`]).
    pub config: String,
    /// Anything else: random state, profiler, dispatcher, stage machine.
    pub more: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    schema: u32,
    files: BTreeMap<String, FileFacts>,
}

#[derive(Serialize, Deserialize, PartialEq)]
struct FileFacts {
    bytes: u64,
    blake3: String,
}

/// A checkpoint whose every byte has been checked.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Its state.
    pub state: State,
    /// Its tensors, mapped.
    pub tensors: TensorFile,
}

/// A folder that looks like a checkpoint and is none.
#[derive(Clone, Debug)]
pub struct Rejected {
    /// The folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// Outcome of [`latest`].
#[derive(Debug)]
pub struct Latest {
    /// The newest valid checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that are not valid; worth telling the user.
    pub rejected: Vec<Rejected>,
}

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Writing failed; what was there before is untouched.
    #[error(
        "cannot write the checkpoint {path}: {source}\n  last good checkpoint: {}\n  next: free space on that disk (or lower train.keep_checkpoints), then dsv-train run --resume",
        .last_good.as_ref().map_or("none yet".to_string(), |p| p.display().to_string())
    )]
    Write {
        /// The checkpoint that was to be.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// The newest checkpoint on disk.
        last_good: Option<PathBuf>,
    },
    /// A checkpoint cannot be used.
    #[error(
        "{path} is not a usable checkpoint: {reason}\n  next: delete it, or resume from an older one: dsv-train run --resume picks the newest valid one"
    )]
    Invalid {
        /// The folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The folder of checkpoints cannot be listed.
    #[error(
        "cannot list the checkpoints in {path}: {source}\n  next: name a folder that can be read: dsv-train run --out DIR"
    )]
    List {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Folder of the checkpoint of a step under `root`.
pub fn folder(root: &Path, step: u64) -> PathBuf {
    root.join(format!("step-{step:08}"))
}

/// Writes the checkpoint of `state.step` under `root`, then deletes all but the newest `keep` (0 = keep all).
/// A checkpoint of the same step is replaced. Returns its folder.
pub fn save(
    root: &Path,
    state: &State,
    tensors: &[TensorView<'_>],
    keep: usize,
) -> Result<PathBuf, CheckpointError> {
    save_on(&RealDisk, root, state, tensors, keep)
}

/// As [`save`], on a given disk.
pub fn save_on(
    disk: &dyn Disk,
    root: &Path,
    state: &State,
    tensors: &[TensorView<'_>],
    keep: usize,
) -> Result<PathBuf, CheckpointError> {
    let path = folder(root, state.step);
    let aside = durable::aside(&path);
    let result = write_all(disk, root, &aside, &path, state, tensors);
    if let Err(source) = result {
        let _ = std::fs::remove_dir_all(&aside);
        let last_good = steps(root).ok().and_then(|s| s.last().map(|(_, p)| p.clone()));
        return Err(CheckpointError::Write { path, source, last_good });
    }
    prune(root, keep);
    Ok(path)
}

fn write_all(
    disk: &dyn Disk,
    root: &Path,
    aside: &Path,
    path: &Path,
    state: &State,
    tensors: &[TensorView<'_>],
) -> io::Result<()> {
    std::fs::create_dir_all(root)?;
    // What a killed process left half written.
    for entry in std::fs::read_dir(root)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(".step-") && name.contains(".tmp-") {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    std::fs::create_dir(aside)?;
    let mut files = BTreeMap::new();
    let mut put = |name: &str, fill: &dyn Fn(&mut dyn Write) -> io::Result<()>| -> io::Result<()> {
        let (bytes, blake3) = durable::write_synced(disk, &aside.join(name), |out| {
            let mut out = Hashing::new(out);
            fill(&mut out)?;
            Ok(out.finish())
        })?;
        files.insert(name.to_string(), FileFacts { bytes, blake3 });
        Ok(())
    };
    let metadata = BTreeMap::from([("schema".to_string(), format!("dsv-checkpoint-{SCHEMA}"))]);
    put(MODEL, &|mut out| tensors::write(&mut out, tensors, &metadata))?;
    put(STATE, &|out| out.write_all(&serde_json::to_vec_pretty(state)?))?;
    let manifest = serde_json::to_vec_pretty(&Manifest { schema: SCHEMA, files })?;
    durable::write_synced(disk, &aside.join(MANIFEST), |out| out.write_all(&manifest))?;
    durable::sync_dir(aside)?;
    if path.exists() {
        // A folder cannot be renamed onto a full one: the old one steps aside first and goes last.
        let old = path.with_file_name(format!(
            ".{}.tmp-{}-old",
            path.file_name().unwrap_or_default().to_string_lossy(),
            std::process::id()
        ));
        std::fs::rename(path, &old)?;
        std::fs::rename(aside, path)?;
        durable::sync_dir(root)?;
        std::fs::remove_dir_all(&old)?;
    } else {
        std::fs::rename(aside, path)?;
        durable::sync_dir(root)?;
    }
    Ok(())
}

fn prune(root: &Path, keep: usize) {
    let Ok(all) = steps(root) else { return };
    if keep > 0 && all.len() > keep {
        for (_, path) in &all[..all.len() - keep] {
            // A checkpoint too many harms nobody; losing the run over it would.
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

/// Checkpoint folders under `root`, oldest first, unchecked. A missing `root` has none.
pub fn steps(root: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(CheckpointError::List { path: root.to_path_buf(), source }),
    };
    let mut out: Vec<(u64, PathBuf)> = entries
        .flatten()
        .filter_map(|e| {
            let step = e.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            Some((step, e.path()))
        })
        .collect();
    out.sort();
    Ok(out)
}

/// Opens a checkpoint, checking its manifest, every byte of its files, and its header.
pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let invalid = |reason: String| CheckpointError::Invalid { path: path.to_path_buf(), reason };
    let read = |name: &str| {
        std::fs::read(path.join(name)).map_err(|e| invalid(format!("{name} cannot be read: {e}")))
    };
    let manifest: Manifest = serde_json::from_slice(&read(MANIFEST)?)
        .map_err(|e| invalid(format!("{MANIFEST} is not a manifest: {e}")))?;
    if manifest.schema != SCHEMA {
        return Err(invalid(format!("it has schema {}, this program reads {SCHEMA}", manifest.schema)));
    }
    for name in [MODEL, STATE] {
        let Some(promised) = manifest.files.get(name) else {
            return Err(invalid(format!("{MANIFEST} does not list {name}")));
        };
        let file = std::fs::File::open(path.join(name))
            .map_err(|e| invalid(format!("{name} cannot be read: {e}")))?;
        let found = file.metadata().map_err(|e| invalid(format!("{name}: {e}")))?.len();
        if found != promised.bytes {
            let what = if found < promised.bytes { "truncated" } else { "too long" };
            return Err(invalid(format!(
                "{name} is {what}: expected {} bytes, found {found}",
                promised.bytes
            )));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file).map_err(|e| invalid(format!("{name}: {e}")))?;
        let hash = hasher.finalize().to_hex().to_string();
        if hash != promised.blake3 {
            return Err(invalid(format!(
                "{name} is corrupt: expected blake3 {}, found {}",
                &promised.blake3[..16.min(promised.blake3.len())],
                &hash[..16]
            )));
        }
    }
    let state: State =
        serde_json::from_slice(&read(STATE)?).map_err(|e| invalid(format!("{STATE} is not a state: {e}")))?;
    let tensors = TensorFile::open(&path.join(MODEL)).map_err(|e: TensorFileError| invalid(e.to_string()))?;
    Ok(Checkpoint { path: path.to_path_buf(), state, tensors })
}

/// The newest valid checkpoint under `root`, and the newer ones that had to be passed over.
pub fn latest(root: &Path) -> Result<Latest, CheckpointError> {
    let mut rejected = Vec::new();
    for (_, path) in steps(root)?.into_iter().rev() {
        match open(&path) {
            Ok(checkpoint) => return Ok(Latest { checkpoint: Some(checkpoint), rejected }),
            Err(CheckpointError::Invalid { path, reason }) => rejected.push(Rejected { path, reason }),
            Err(other) => return Err(other),
        }
    }
    Ok(Latest { checkpoint: None, rejected })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};

    fn state(step: u64) -> State {
        State {
            step,
            stage: 1,
            position: DataPosition { epoch: 2, index: 7 },
            fingerprint: "f".into(),
            config: "preset = \"tiny\"\n".into(),
            more: serde_json::json!({ "profile": [0.1, 0.30000000000000004, 1e-300], "rng": u64::MAX }),
        }
    }

    fn put(root: &Path, step: u64, keep: usize) -> PathBuf {
        let values = vec![step as f32; 1000];
        save(root, &state(step), &[TensorView::f32("w", &[10, 100], &values)], keep).unwrap()
    }

    #[test]
    fn round_trip_replace_and_prune() {
        let dir = tempfile::tempdir().unwrap();
        assert!(latest(dir.path()).unwrap().checkpoint.is_none());
        assert!(latest(&dir.path().join("missing")).unwrap().checkpoint.is_none());
        for step in [5, 100, 20, 20] {
            put(dir.path(), step, 0);
        }
        let found = latest(dir.path()).unwrap().checkpoint.unwrap();
        assert_eq!(found.state, state(100));
        assert_eq!(found.tensors.get("w").unwrap().to_f32().unwrap(), vec![100.0; 1000]);
        put(dir.path(), 110, 2);
        let left: Vec<u64> = steps(dir.path()).unwrap().iter().map(|s| s.0).collect();
        assert_eq!(left, [100, 110]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing aside is left");
    }

    #[test]
    fn corrupt_and_truncated_ones_are_passed_over_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), 1, 0);
        let cut = put(dir.path(), 2, 0);
        let flipped = put(dir.path(), 3, 0);
        let lost = put(dir.path(), 4, 0);
        let file = OpenOptions::new().write(true).open(cut.join(MODEL)).unwrap();
        file.set_len(file.metadata().unwrap().len() - 10).unwrap();
        let mut bytes = std::fs::read(flipped.join(MODEL)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(flipped.join(MODEL), bytes).unwrap();
        std::fs::remove_file(lost.join(MANIFEST)).unwrap();
        let found = latest(dir.path()).unwrap();
        assert_eq!(found.checkpoint.unwrap().state.step, 1);
        let reasons: Vec<&str> = found.rejected.iter().map(|r| r.reason.as_str()).collect();
        assert!(reasons[0].starts_with("manifest.json cannot be read"), "{reasons:?}");
        assert!(reasons[1].starts_with("model.safetensors is corrupt: expected blake3"), "{reasons:?}");
        assert!(reasons[2].starts_with("model.safetensors is truncated: expected"), "{reasons:?}");
        let text = open(&cut).unwrap_err().to_string();
        assert!(text.contains("next: ") && text.contains("bytes, found"), "{text}");
    }

    #[test]
    fn a_checkpoint_killed_half_way_is_neither_seen_nor_kept() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), 1, 0);
        let half = dir.path().join(".step-00000002.tmp-1");
        std::fs::create_dir(&half).unwrap();
        std::fs::write(half.join(MODEL), b"half").unwrap();
        assert_eq!(latest(dir.path()).unwrap().checkpoint.unwrap().state.step, 1);
        put(dir.path(), 3, 0);
        assert!(!half.exists());
    }

    /// Every write to the tensors fails as on a full disk, with the kernel's own ENOSPC.
    struct FullDisk;

    impl Disk for FullDisk {
        fn create(&self, path: &Path) -> io::Result<File> {
            let full = path.file_name().is_some_and(|n| n == MODEL);
            if full { OpenOptions::new().write(true).open("/dev/full") } else { File::create(path) }
        }
    }

    #[test]
    fn a_full_disk_keeps_the_last_good_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let good = put(dir.path(), 1, 0);
        let values = vec![1.0f32; 1000];
        for step in [1, 2] {
            let error =
                save_on(&FullDisk, dir.path(), &state(step), &[TensorView::f32("w", &[1000], &values)], 1)
                    .unwrap_err();
            let CheckpointError::Write { source, last_good, .. } = &error else { panic!("{error}") };
            assert_eq!(source.kind(), io::ErrorKind::StorageFull);
            assert_eq!(last_good.as_ref(), Some(&good));
            assert!(
                error.to_string().contains("No space left") && error.to_string().contains("next: free space")
            );
            assert_eq!(latest(dir.path()).unwrap().checkpoint.unwrap().path, good);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the half-written one is gone");
        }
    }

    /// Run by the next test in a process whose files may not grow past 64 KiB.
    #[test]
    #[ignore = "the child process of a_file_size_limit_keeps_the_last_good_checkpoint"]
    fn child_with_a_file_size_limit() {
        let root =
            PathBuf::from(std::env::var_os("DSV_CHECKPOINT_TEST_ROOT").expect("set by the parent test"));
        let values = vec![1.0f32; 1 << 20];
        let error = save(&root, &state(2), &[TensorView::f32("w", &[1 << 20], &values)], 1).unwrap_err();
        assert!(matches!(error, CheckpointError::Write { .. }), "{error}");
        println!("refused: {error}");
    }

    #[test]
    fn a_file_size_limit_keeps_the_last_good_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let good = put(dir.path(), 1, 0);
        // 512-byte blocks; SIGXFSZ ignored, so that the write returns an error as ENOSPC does.
        let out = std::process::Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 128; exec \"$0\" --ignored --exact --nocapture \"$1\""])
            .arg(std::env::current_exe().unwrap())
            .arg(format!("{}::child_with_a_file_size_limit", module_path!().split_once("::").unwrap().1))
            .env("DSV_CHECKPOINT_TEST_ROOT", dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && text.contains("refused: cannot write the checkpoint"), "{text}");
        assert!(text.contains(&format!("last good checkpoint: {}", good.display())), "{text}");
        let found = latest(dir.path()).unwrap();
        assert_eq!((found.checkpoint.unwrap().path, found.rejected.len()), (good, 0));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
