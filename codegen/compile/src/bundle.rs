//! The offline bundle: cubins beside a manifest, for machines that shall not compile.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{CompileError, Compiled, ResourceReport, oldest_driver};

/// Version of the manifest's JSON.
const SCHEMA: u32 = 1;
const MANIFEST: &str = "manifest.json";

/// One kernel of a bundle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundledKernel {
    /// Kernel name; the cubin is `<name>.cubin`.
    pub name: String,
    /// Architecture, as kernel names write it.
    pub arch: String,
    /// blake3 of the kernel's text and all headers, as the registry has it.
    pub source_hash: String,
    /// blake3 of the cubin.
    pub cubin_hash: String,
    /// Dynamic shared memory a launch asks for, bytes; 0 where it depends on the problem.
    pub smem_bytes: u32,
    /// Resources of every entry, by symbol: registers, spills, static shared memory.
    pub entries: BTreeMap<String, ResourceReport>,
    /// The cubin itself, which lies in its own file.
    #[serde(skip)]
    cubin: Vec<u8>,
}

impl BundledKernel {
    /// From a compiled kernel, with what the compiler does not know of it.
    pub fn new(compiled: &Compiled, arch: &str, source_hash: &str, smem_bytes: u32) -> Self {
        Self {
            name: compiled.name.clone(),
            arch: arch.to_owned(),
            source_hash: source_hash.to_owned(),
            cubin_hash: blake3::hash(&compiled.cubin).to_hex().to_string(),
            smem_bytes,
            entries: compiled.entries.clone(),
            cubin: compiled.cubin.clone(),
        }
    }
}

/// `manifest.json` of a bundle.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    schema: u32,
    /// Version of the compiler that made every cubin.
    compiler: String,
    /// Major version of the oldest driver that loads them.
    oldest_driver: u32,
    kernels: Vec<BundledKernel>,
}

/// Why a bundle, or a kernel of it, cannot be used. The caller may go on with its own compiler.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// No bundle there, or one that cannot be read.
    #[error("no bundle in {}: {why}\n  to make one: dsv-codegen build --out {}", dir.display(), dir.display())]
    Open {
        /// Directory.
        dir: PathBuf,
        /// What was wrong.
        why: String,
    },
    /// The bundle has no such kernel.
    #[error("the bundle in {} has no kernel {name}\n  to make a new one: dsv-codegen build --out {}", dir.display(), dir.display())]
    Missing {
        /// Directory.
        dir: PathBuf,
        /// Kernel.
        name: String,
    },
    /// The bundle's kernel was made from another text.
    #[error("the bundle in {} holds {name} of another source ({found}, not {wanted})\n  to make a new one: dsv-codegen build --out {}", dir.display(), dir.display())]
    Stale {
        /// Directory.
        dir: PathBuf,
        /// Kernel.
        name: String,
        /// The manifest's source hash, shortened.
        found: String,
        /// The registry's source hash, shortened.
        wanted: String,
    },
    /// The cubin is damaged.
    #[error("{} is damaged: {why}\n  to make a new bundle: dsv-codegen build --out {}", path.display(), dir.display())]
    Damaged {
        /// The cubin.
        path: PathBuf,
        /// The bundle.
        dir: PathBuf,
        /// What was wrong.
        why: String,
    },
}

/// An opened bundle.
#[derive(Clone, Debug)]
pub struct Bundle {
    dir: PathBuf,
    compiler: String,
    oldest_driver: u32,
    kernels: BTreeMap<String, BundledKernel>,
}

impl Bundle {
    /// Reads the manifest of the bundle in `dir`. Cubins are read when asked for.
    ///
    /// # Errors
    /// [`BundleError::Open`] where there is none, or it is not one, or of another schema.
    pub fn open(dir: &Path) -> Result<Self, BundleError> {
        let fail = |why: String| BundleError::Open { dir: dir.to_path_buf(), why };
        let text = fs::read(dir.join(MANIFEST)).map_err(|e| fail(format!("{MANIFEST}: {e}")))?;
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|e| fail(format!("{MANIFEST} is not a manifest: {e}")))?;
        if manifest.schema != SCHEMA {
            return Err(fail(format!(
                "schema {} is not {SCHEMA}, the one this version reads",
                manifest.schema
            )));
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            compiler: manifest.compiler,
            oldest_driver: manifest.oldest_driver,
            kernels: manifest.kernels.into_iter().map(|kernel| (kernel.name.clone(), kernel)).collect(),
        })
    }

    /// Version of the compiler that made the cubins.
    pub fn compiler(&self) -> &str {
        &self.compiler
    }

    /// Major version of the oldest driver that loads the cubins, for example 580.
    pub fn oldest_driver(&self) -> u32 {
        self.oldest_driver
    }

    /// Every kernel, sorted by name.
    pub fn kernels(&self) -> impl Iterator<Item = &BundledKernel> {
        self.kernels.values()
    }

    /// The cubin of `name`, if it was made from the source with `source_hash`.
    ///
    /// # Errors
    /// [`BundleError::Missing`], [`BundleError::Stale`] or [`BundleError::Damaged`].
    pub fn cubin(&self, name: &str, source_hash: &str) -> Result<Vec<u8>, BundleError> {
        let dir = self.dir.clone();
        let Some(kernel) = self.kernels.get(name) else {
            return Err(BundleError::Missing { dir, name: name.to_owned() });
        };
        if kernel.source_hash != source_hash {
            let short = |hash: &str| hash.chars().take(12).collect::<String>();
            let (found, wanted) = (short(&kernel.source_hash), short(source_hash));
            return Err(BundleError::Stale { dir, name: name.to_owned(), found, wanted });
        }
        let path = self.dir.join(format!("{name}.cubin"));
        let cubin = match fs::read(&path) {
            Ok(cubin) => cubin,
            Err(e) => return Err(BundleError::Damaged { path, dir, why: e.to_string() }),
        };
        if blake3::hash(&cubin).to_hex().as_str() != kernel.cubin_hash {
            return Err(BundleError::Damaged {
                path,
                dir,
                why: "its content is not what the manifest says".into(),
            });
        }
        Ok(cubin)
    }
}

/// Writes a bundle: the cubins, then, last and by a rename, the manifest. Cubins of an older bundle that the new one
/// does not have are removed.
///
/// # Errors
/// [`CompileError::Cache`] with the path that cannot be written.
pub fn write_bundle(dir: &Path, compiler: &str, mut kernels: Vec<BundledKernel>) -> Result<(), CompileError> {
    let fail = |path: &Path| {
        let path = path.to_path_buf();
        move |why: io::Error| CompileError::Cache { path, why }
    };
    fs::create_dir_all(dir).map_err(fail(dir))?;
    kernels.sort_by(|a, b| a.name.cmp(&b.name));
    for kernel in &kernels {
        let path = dir.join(format!("{}.cubin", kernel.name));
        fs::write(&path, &kernel.cubin).map_err(fail(&path))?;
    }
    for entry in fs::read_dir(dir).map_err(fail(dir))?.flatten() {
        let path = entry.path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if path.extension().is_some_and(|extension| extension == "cubin")
            && !kernels.iter().any(|kernel| kernel.name == stem)
        {
            fs::remove_file(&path).map_err(fail(&path))?;
        }
    }
    let manifest = Manifest {
        schema: SCHEMA,
        compiler: compiler.to_owned(),
        oldest_driver: oldest_driver(compiler),
        kernels,
    };
    let mut text = serde_json::to_string_pretty(&manifest).expect("a struct of strings and integers is JSON");
    text.push('\n');
    let (aside, path) = (dir.join(".manifest.json.aside"), dir.join(MANIFEST));
    let write = || -> io::Result<()> {
        let mut file = fs::File::create(&aside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&aside, &path)
    };
    write().map_err(fail(&path))
}
