//! Owns the way from CUDA text to a cubin: NVRTC in-process, the resource report of every kernel, and the
//! content-addressed cache of both.
//! It must never know the CUDA driver, a GPU, or what a kernel computes: it sees names, text and an architecture.
//! Start at [`Compiler`]; [`CompileJob`] goes in, [`Compiled`] comes out, and [`Compiled::check`] is the gate every
//! shipped kernel passes.

mod bundle;
mod cache;
mod error;
mod nvrtc;
mod report;
mod sass;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use bundle::{Bundle, BundleError, BundledKernel, write_bundle};
pub use error::CompileError;
pub use nvrtc::{NVDISASM_WHEEL, NVRTC_WHEEL, fetch_nvrtc, find_nvrtc, oldest_driver};
pub use report::{ResourceReport, SpillList};
pub use sass::{SassReport, find_nvdisasm, sass};

use nvrtc::{Nvrtc, Product};

/// One kernel file to compile. `name` is the kernel's name, which is also its `extern "C"` symbol and file stem.
#[derive(Clone, Copy, Debug)]
pub struct CompileJob<'a> {
    /// Kernel name = symbol = file stem.
    pub name: &'a str,
    /// The CUDA text.
    pub source: &'a str,
    /// Every header the text may include, as (`dsv/xxx.cuh`, text). All of them are part of the cache key.
    pub headers: &'a [(&'a str, &'a str)],
    /// `sm_90a`, or as kernel names write it, `sm90a`.
    pub arch: &'a str,
}

/// A compiled kernel file.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The job's name.
    pub name: String,
    /// The cubin, an ELF image that `cuModuleLoadData` takes.
    pub cubin: Vec<u8>,
    /// Resources of the entry called `name`; where the file has no such entry, of its only or first entry.
    pub report: ResourceReport,
    /// Resources of every entry in the file, by symbol.
    pub entries: BTreeMap<String, ResourceReport>,
    /// The compiler's log, without times, so that it is the same on every run.
    pub log: String,
    /// Lines of the log that carry a `(C75..)` note: wgmma serialised, waits injected, setmaxnreg ignored.
    pub notes: Vec<String>,
    /// Warnings of the compiler, spill warnings excepted (those are in the reports).
    pub warnings: Vec<String>,
    /// Version of the compiler, for example `13.0.88`.
    pub compiler: String,
    /// True where this came out of the cache.
    pub cached: bool,
    /// The `.cu` beside the cubin in the cache.
    pub source_path: PathBuf,
}

impl Compiled {
    /// The gate for a kernel that ships: no `(C75..)` note, no warning, and no spilled byte beyond what `listed`
    /// allows this kernel.
    ///
    /// # Errors
    /// [`CompileError::Notes`], [`CompileError::Warnings`] or [`CompileError::Spills`].
    pub fn check(&self, listed: &SpillList) -> Result<(), CompileError> {
        if !self.notes.is_empty() {
            return Err(CompileError::Notes { name: self.name.clone(), notes: self.notes.join("\n  ") });
        }
        if !self.warnings.is_empty() {
            return Err(CompileError::Warnings {
                name: self.name.clone(),
                warnings: self.warnings.join("\n  "),
            });
        }
        let allowed = listed.allowed(&self.name);
        for (entry, report) in &self.entries {
            let bytes = report.spill_store_bytes.max(report.spill_load_bytes);
            if bytes > allowed {
                return Err(CompileError::Spills {
                    name: self.name.clone(),
                    entry: entry.clone(),
                    bytes,
                    allowed,
                    registers: report.registers,
                });
            }
        }
        Ok(())
    }
}

/// NVRTC with a cache directory. Cheap to share by reference between threads.
pub struct Compiler {
    nvrtc: Nvrtc,
    cache: PathBuf,
}

impl Compiler {
    /// Finds NVRTC as [`find_nvrtc`] does and caches in `target/dsv-cache` of the checkout, or of the current
    /// directory where the checkout this was built from is gone. The cache keeps itself small: entries unused for 30 days
    /// go, and above 1 GiB the longest unused ones.
    ///
    /// # Errors
    /// [`CompileError::NoNvrtc`] names the command that fetches it; [`CompileError::Load`] where a library is there
    /// but cannot be used.
    pub fn new() -> Result<Self, CompileError> {
        Self::with(None, None)
    }

    /// As [`Compiler::new`], with an explicit NVRTC library (a file, or the directory that holds it) and cache
    /// directory.
    ///
    /// # Errors
    /// As [`Compiler::new`].
    pub fn with(nvrtc: Option<&Path>, cache: Option<&Path>) -> Result<Self, CompileError> {
        let cache = cache.map_or_else(cache::default_dir, Path::to_path_buf);
        cache::prune(&cache);
        Ok(Self { nvrtc: Nvrtc::load(nvrtc)?, cache })
    }

    /// Version of the compiler in full, for example `13.0.88`; part of every cache key.
    pub fn version(&self) -> &str {
        self.nvrtc.version()
    }

    /// Where NVRTC was found: a path, or a bare name where the system's loader found it.
    pub fn library(&self) -> &str {
        self.nvrtc.library()
    }

    /// The cache directory.
    pub fn cache_dir(&self) -> &Path {
        &self.cache
    }

    /// Compiles one kernel file, or takes it from the cache. The result is not judged: call [`Compiled::check`].
    ///
    /// # Errors
    /// [`CompileError::Rejected`] with the compiler's log where the text does not compile (the text is kept and its
    /// path named), [`CompileError::Arch`] for a malformed architecture, [`CompileError::Cache`] where the cache
    /// directory cannot be written.
    pub fn compile(&self, job: CompileJob<'_>) -> Result<Compiled, CompileError> {
        let flags = nvrtc::flags(job.arch)?;
        let key = cache::key(&job, self.version(), &flags);
        if let Some(hit) = cache::load(&self.cache, job.name, &key, self.version()) {
            return Ok(hit);
        }
        let (cubin, log) = match self.nvrtc.compile(&job, &flags, Product::Cubin)? {
            Ok(done) => done,
            Err(log) => {
                return Err(CompileError::Rejected {
                    name: job.name.to_owned(),
                    compiler: self.version().to_owned(),
                    source_path: cache::keep_rejected(&self.cache, &job)?,
                    log: report::without_times(&log),
                });
            }
        };
        let log = report::without_times(&log);
        let entries = report::entries(job.name, &log, &cubin)?;
        let report = *entries.get(job.name).or_else(|| entries.values().next()).ok_or_else(|| {
            CompileError::Report {
                name: job.name.to_owned(),
                what: "the file has no __global__ entry".into(),
            }
        })?;
        let mut compiled = Compiled {
            name: job.name.to_owned(),
            cubin,
            report,
            entries,
            notes: report::notes(&log),
            warnings: report::warnings(&log),
            log,
            compiler: self.version().to_owned(),
            cached: false,
            source_path: PathBuf::new(),
        };
        compiled.source_path = cache::store(&self.cache, &key, &job, &compiled)?;
        Ok(compiled)
    }

    /// The PTX of a kernel, as ptxas reads it on the way to the cubin of [`Compiler::compile`]. Cached likewise.
    ///
    /// # Errors
    /// As [`Compiler::compile`], but for what only ptxas finds.
    pub fn ptx(&self, job: CompileJob<'_>) -> Result<String, CompileError> {
        let flags = nvrtc::ptx_flags(job.arch)?;
        let key = cache::key(&job, self.version(), &flags);
        if let Some(text) = cache::load_ptx(&self.cache, job.name, &key) {
            return Ok(text);
        }
        let made = match self.nvrtc.compile(&job, &flags, Product::Ptx)? {
            Ok((made, _)) => made,
            Err(log) => {
                return Err(CompileError::Rejected {
                    name: job.name.to_owned(),
                    compiler: self.version().to_owned(),
                    source_path: cache::keep_rejected(&self.cache, &job)?,
                    log,
                });
            }
        };
        let text = String::from_utf8_lossy(&made).trim_end_matches('\0').to_owned();
        cache::store_ptx(&self.cache, job.name, &key, &text)?;
        Ok(text)
    }

    /// Compiles many on `threads` threads; results are in the order of `jobs`. `done` is told of each job as it
    /// ends (its index, its result), for a progress bar.
    pub fn compile_all(
        &self,
        jobs: &[CompileJob<'_>],
        threads: usize,
        done: impl Fn(usize, &Result<Compiled, CompileError>) + Sync,
    ) -> Vec<Result<Compiled, CompileError>> {
        let next = AtomicUsize::new(0);
        let results: Mutex<Vec<Option<Result<Compiled, CompileError>>>> =
            Mutex::new((0..jobs.len()).map(|_| None).collect());
        std::thread::scope(|scope| {
            for _ in 0..threads.clamp(1, jobs.len().max(1)) {
                scope.spawn(|| {
                    while let Some((i, job)) = {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        jobs.get(i).map(|job| (i, job))
                    } {
                        let result = self.compile(*job);
                        done(i, &result);
                        results.lock().unwrap_or_else(|e| e.into_inner())[i] = Some(result);
                    }
                });
            }
        });
        let results = results.into_inner().unwrap_or_else(|e| e.into_inner());
        results
            .into_iter()
            .map(|r| r.expect("every job was taken by a thread that has been joined"))
            .collect()
    }
}
