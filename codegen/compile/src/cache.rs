//! The content-addressed cache: `<dir>/<name>-<key>/` holds `<name>.cubin`, the `<name>.cu` it came from and
//! `<name>.json`, its report. An entry appears whole, by one rename of a directory, or not at all. Entries that nothing
//! used for [`UNUSED`], and the longest unused ones above [`LIMIT_BYTES`], are deleted.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::{CompileError, CompileJob, Compiled, ResourceReport, report};

/// Raised when what an entry holds, or how it is judged, changes.
const FORMAT: u32 = 1;

/// Bytes that the entries may take; when they take more, the longest unused go until they take three quarters of it.
pub(crate) const LIMIT_BYTES: u64 = 1 << 30;
/// How long an entry stays without being used.
pub(crate) const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);
/// An entry counts as used at this precision, so that loading one seldom writes to the disk. Younger ones are never
/// deleted: a running process may have been told their path.
const TOUCH: Duration = Duration::from_secs(3600);
/// Texts that did not compile.
const REJECTED: &str = "rejected";
/// Entries stored between two looks at the size.
const LOOK_EVERY: u64 = 128;

/// `target/dsv-cache` of the checkout this was built from, else of the current directory.
pub(crate) fn default_dir() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).filter(|root| root.is_dir());
    root.unwrap_or(Path::new(".")).join("target").join("dsv-cache")
}

/// blake3 over name, compiler version, flags, source and headers, each with its length before it.
pub(crate) fn key(job: &CompileJob<'_>, version: &str, flags: &[String]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut field = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    field(&FORMAT.to_string());
    field(job.name);
    field(version);
    field(&flags.len().to_string());
    flags.iter().for_each(|flag| field(flag));
    field(job.source);
    for (name, text) in job.headers {
        field(name);
        field(text);
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// The JSON beside a cubin.
#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    compiler: String,
    cubin_blake3: String,
    entries: BTreeMap<String, ResourceReport>,
    log: String,
}

fn entry_dir(cache: &Path, name: &str, key: &str) -> PathBuf {
    cache.join(format!("{name}-{key}"))
}

/// The entry, where it is there and whole. A damaged one (a machine that lost power) counts as absent.
pub(crate) fn load(cache: &Path, name: &str, key: &str, version: &str) -> Option<Compiled> {
    let dir = entry_dir(cache, name, key);
    let entry: Entry = serde_json::from_slice(&fs::read(dir.join(format!("{name}.json"))).ok()?).ok()?;
    let cubin = fs::read(dir.join(format!("{name}.cubin"))).ok()?;
    if entry.name != name
        || entry.compiler != version
        || entry.cubin_blake3 != blake3::hash(&cubin).to_hex().as_str()
    {
        return None;
    }
    touch(&dir);
    let report = *entry.entries.get(name).or_else(|| entry.entries.values().next())?;
    Some(Compiled {
        name: entry.name,
        cubin,
        report,
        entries: entry.entries,
        notes: report::notes(&entry.log),
        warnings: report::warnings(&entry.log),
        log: entry.log,
        compiler: entry.compiler,
        cached: true,
        source_path: dir.join(format!("{name}.cu")),
    })
}

/// Remembers that an entry was used: the directory's time.
fn touch(dir: &Path) {
    let now = SystemTime::now();
    let old = |dir: &fs::File| Some(now.duration_since(dir.metadata().ok()?.modified().ok()?).ok()? > TOUCH);
    // A cache that cannot be written to serves all the same.
    if let Ok(file) = fs::File::open(dir)
        && old(&file) == Some(true)
    {
        let _ = file.set_modified(now);
    }
}

/// Deletes what has not been used for [`UNUSED`], and the longest unused entries above [`LIMIT_BYTES`]. What cannot be
/// deleted stays; a reader of an entry that goes finds it whole or not at all.
pub(crate) fn prune(cache: &Path) {
    prune_to(cache, LIMIT_BYTES, SystemTime::now());
}

fn prune_to(cache: &Path, limit: u64, now: SystemTime) {
    let mut entries: Vec<(Duration, u64, PathBuf)> = Vec::new();
    let children = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    let age = |path: &Path| -> Option<Duration> {
        // Of the future: as if used now.
        Some(now.duration_since(fs::metadata(path).ok()?.modified().ok()?).unwrap_or_default())
    };
    // The directory is the caller's to name: only what this module makes is looked at.
    let ours = |name: &str| {
        let key = name.rsplit_once('-').map_or("", |(_, key)| key);
        let entry = key.len() == 32 && key.bytes().all(|b| b.is_ascii_hexdigit());
        entry || name.starts_with(".aside-") || name == REJECTED
    };
    for child in children(cache).filter(|c| c.file_name().to_str().is_some_and(ours)) {
        let path = child.path();
        let Some(age) = age(&path) else { continue };
        let bytes = children(&path).filter_map(|f| Some(f.metadata().ok()?.len())).sum();
        entries.push((age, bytes, path));
    }
    let delete = |path: &Path| {
        let gone = aside(cache);
        if fs::rename(path, &gone).is_ok() {
            let _ = fs::remove_dir_all(&gone);
        }
    };
    let (mut entries, forgotten): (Vec<_>, Vec<_>) = entries.into_iter().partition(|e| e.0 <= UNUSED);
    forgotten.iter().for_each(|(_, _, path)| delete(path));
    let mut left: u64 = entries.iter().map(|e| e.1).sum();
    let most = if left > limit { limit / 4 * 3 } else { limit };
    entries.sort();
    while left > most
        && let Some((age, bytes, path)) = entries.pop()
        && age > TOUCH
    {
        delete(&path);
        left -= bytes;
    }
}

/// A name beside the entries that no other thread or process uses.
fn aside(cache: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    cache.join(format!(".aside-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Stores an entry: written aside, synced, renamed. Losing the race to another process is success. Returns the path
/// of the `.cu`.
pub(crate) fn store(
    cache: &Path,
    key: &str,
    job: &CompileJob<'_>,
    done: &Compiled,
) -> Result<PathBuf, CompileError> {
    let dir = entry_dir(cache, job.name, key);
    let fail = |path: &Path| {
        let path = path.to_path_buf();
        move |why: io::Error| CompileError::Cache { path, why }
    };
    fs::create_dir_all(cache).map_err(fail(cache))?;
    let temporary = aside(cache);
    let entry = Entry {
        name: job.name.to_owned(),
        compiler: done.compiler.clone(),
        cubin_blake3: blake3::hash(&done.cubin).to_hex().to_string(),
        entries: done.entries.clone(),
        log: done.log.clone(),
    };
    let json = serde_json::to_vec_pretty(&entry).expect("a struct of strings and integers is JSON");
    let write = || -> io::Result<()> {
        fs::create_dir(&temporary)?;
        write_synced(&temporary.join(format!("{}.cu", job.name)), job.source.as_bytes())?;
        write_synced(&temporary.join(format!("{}.json", job.name)), &json)?;
        write_synced(&temporary.join(format!("{}.cubin", job.name)), &done.cubin)?;
        fs::File::open(&temporary)?.sync_all()
    };
    let outcome = write().and_then(|()| {
        fs::rename(&temporary, &dir).or_else(|first| {
            if load(cache, job.name, key, &done.compiler).is_some() {
                return Ok(()); // Another process was faster; the content is the same by its address.
            }
            // What lies there is damaged: move it out of the way, then try once more.
            let damaged = aside(cache);
            if fs::rename(&dir, &damaged).is_err() {
                return Err(first);
            }
            let _ = fs::remove_dir_all(&damaged);
            fs::rename(&temporary, &dir)
        })
    });
    // After the rename this finds nothing; after a lost race or an error it clears up.
    let _ = fs::remove_dir_all(&temporary);
    outcome.map_err(fail(&dir))?;
    static STORED: AtomicU64 = AtomicU64::new(1);
    if STORED.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOK_EVERY) {
        prune(cache);
    }
    Ok(dir.join(format!("{}.cu", job.name)))
}

/// PTX kept by [`store_ptx`]; its last line is a hash of the others, so that a torn file counts as absent.
pub(crate) fn load_ptx(cache: &Path, name: &str, key: &str) -> Option<String> {
    let dir = entry_dir(cache, name, key);
    let kept = fs::read_to_string(dir.join(format!("{name}.ptx"))).ok()?;
    let (text, hash) = kept.rsplit_once("\n// ")?;
    if hash != blake3::hash(text.as_bytes()).to_hex().as_str() {
        return None;
    }
    touch(&dir);
    Some(text.to_owned())
}

/// Stores PTX as an entry of its own, whole or not at all.
pub(crate) fn store_ptx(cache: &Path, name: &str, key: &str, text: &str) -> Result<(), CompileError> {
    let dir = entry_dir(cache, name, key);
    let temporary = aside(cache);
    let hash = blake3::hash(text.as_bytes()).to_hex();
    let outcome = fs::create_dir_all(&dir)
        .and_then(|()| write_synced(&temporary, format!("{text}\n// {hash}").as_bytes()))
        .and_then(|()| fs::rename(&temporary, dir.join(format!("{name}.ptx"))));
    let _ = fs::remove_file(&temporary);
    outcome.map_err(|why| CompileError::Cache { path: dir, why })
}

/// Keeps text that does not compile, so that the log's line numbers can be looked up.
pub(crate) fn keep_rejected(cache: &Path, job: &CompileJob<'_>) -> Result<PathBuf, CompileError> {
    let dir = cache.join(REJECTED);
    let path = dir.join(format!("{}.cu", job.name));
    fs::create_dir_all(&dir)
        .and_then(|()| fs::write(&path, job.source))
        .map_err(|why| CompileError::Cache { path: path.clone(), why })?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(cache: &Path, name: &str, bytes: usize, unused: Duration, now: SystemTime) {
        let dir = cache.join(named(name));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("a.cubin"), vec![0; bytes]).unwrap();
        fs::File::open(&dir).unwrap().set_modified(now - unused).unwrap();
    }

    /// A kernel's name with a key, unless it is a name of another kind.
    fn named(name: &str) -> String {
        if name.contains(['.', '/']) { name.to_string() } else { format!("{name}-{}", "0a".repeat(16)) }
    }

    fn names(cache: &Path) -> Vec<String> {
        let names = fs::read_dir(cache).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.map(|n| n.split('-').next().unwrap().to_string()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_longest_unused_entries_go_first_and_those_in_use_stay() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let hours = |n: u64| Duration::from_secs(n * 3600);
        for (name, unused) in [("a", hours(0)), ("b", hours(2)), ("c", hours(30)), ("d", hours(40))] {
            entry(dir.path(), name, 1000, unused, now);
        }
        entry(dir.path(), "e", 10, UNUSED + hours(1), now);
        entry(dir.path(), ".aside-1-1", 10, UNUSED + hours(1), now);
        prune_to(dir.path(), 4000, now);
        assert_eq!(
            names(dir.path()),
            ["a", "b", "c", "d"],
            "within the limit: only what nothing used for long"
        );
        prune_to(dir.path(), 3999, now);
        assert_eq!(names(dir.path()), ["a", "b"], "above the limit: down to three quarters of it");
        prune_to(dir.path(), 1, now);
        assert_eq!(names(dir.path()), ["a"], "what was used within the hour stays whatever the limit");
    }

    #[test]
    fn what_is_not_the_caches_own_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        for name in ["thesis.d", "notes.2024"] {
            entry(dir.path(), name, 5000, UNUSED * 2, now);
        }
        fs::create_dir(dir.path().join("photos-2024")).unwrap();
        prune_to(dir.path(), 1, now + UNUSED * 2);
        assert_eq!(names(dir.path()), ["notes.2024", "photos", "thesis.d"]);
    }

    #[test]
    fn a_use_makes_an_entry_young() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        entry(dir.path(), "old", 1000, Duration::from_secs(24 * 3600), now);
        entry(dir.path(), "older", 1000, Duration::from_secs(48 * 3600), now);
        touch(&dir.path().join(named("older")));
        prune_to(dir.path(), 1500, now);
        assert_eq!(names(dir.path()), ["older"]);
    }
}
