//! The content-addressed cache: `<dir>/<name>-<key>/` holds `<name>.cubin`, the `<name>.cu` it came from and
//! `<name>.json`, its report. An entry appears whole, by one rename of a directory, or not at all.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::{CompileError, CompileJob, Compiled, ResourceReport, report};

/// Raised when what an entry holds, or how it is judged, changes.
const FORMAT: u32 = 1;

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
    Ok(dir.join(format!("{}.cu", job.name)))
}

/// Keeps text that does not compile, so that the log's line numbers can be looked up.
pub(crate) fn keep_rejected(cache: &Path, job: &CompileJob<'_>) -> Result<PathBuf, CompileError> {
    let dir = cache.join("rejected");
    let path = dir.join(format!("{}.cu", job.name));
    fs::create_dir_all(&dir)
        .and_then(|()| fs::write(&path, job.source))
        .map_err(|why| CompileError::Cache { path: path.clone(), why })?;
    Ok(path)
}
