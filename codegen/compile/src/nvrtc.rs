//! A thin binding to NVRTC: find it, load it, compile one program.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

use crate::{CompileError, CompileJob};

/// The wheel that holds NVRTC; kernels are tuned and shipped with exactly this one.
pub const NVRTC_WHEEL: &str = "nvidia-cuda-nvrtc==13.0.88";
/// The wheel that holds nvdisasm, for [`crate::sass`].
pub const NVDISASM_WHEEL: &str = "nvidia-cuda-nvdisasm==13.2.51";

/// Directory of the libraries within a checkout's `.cuda`, or within a Python site-packages.
const WHEEL_LIB: &str = "nvidia/cu13/lib";

/// The oldest Linux driver major version that loads cubins made by this NVRTC version (`13.0.88` -> 580).
/// From NVIDIA's CUDA compatibility table: minor versions of one CUDA major run on the first driver of that major.
pub fn oldest_driver(nvrtc_version: &str) -> u32 {
    match nvrtc_version.split('.').next().and_then(|major| major.parse::<u32>().ok()) {
        Some(..=11) => 450,
        Some(12) => 525,
        _ => 580,
    }
}

/// Directories upwards that may hold `.cuda`: the checkout this was built from, then the current directory and its
/// ancestors.
pub(crate) fn dot_cuda_dirs() -> Vec<PathBuf> {
    let mut roots = Vec::new();
    if let Some(root) = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2) {
        roots.push(root.to_path_buf());
    }
    if let Ok(cwd) = std::env::current_dir() {
        roots.extend(cwd.ancestors().map(Path::to_path_buf));
    }
    let mut dirs: Vec<PathBuf> = Vec::new();
    for dir in roots.into_iter().map(|root| root.join(".cuda")) {
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    dirs
}

/// Python's package directories: of `VIRTUAL_ENV`, then the usual ones of a system's or container's Python.
fn site_packages() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> = Vec::new();
    prefixes.extend(std::env::var_os("VIRTUAL_ENV").map(PathBuf::from));
    prefixes.extend(std::env::var_os("CONDA_PREFIX").map(PathBuf::from));
    prefixes.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local")));
    prefixes.extend(["/usr/local", "/usr", "/opt/conda", "/opt/venv"].map(PathBuf::from));
    let mut dirs = Vec::new();
    for lib in prefixes.iter().flat_map(|prefix| ["lib", "lib64"].map(|lib| prefix.join(lib))) {
        let mut pythons: Vec<PathBuf> = std::fs::read_dir(&lib)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with("python3"))
            .map(|e| e.path())
            .collect();
        pythons.sort();
        for python in pythons {
            dirs.extend(["site-packages", "dist-packages"].map(|packages| python.join(packages)));
        }
    }
    dirs
}

/// The NVRTC library in a directory: `libnvrtc.so.13` first, then any other version, the newest name first.
fn nvrtc_in(dir: &Path) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("libnvrtc.so") && !name.contains(".alt.")
        })
        .collect();
    found.sort();
    let first = found.iter().position(|path| path.ends_with("libnvrtc.so.13"));
    first.map(|i| found[i].clone()).or_else(|| found.pop())
}

/// Finds NVRTC without loading it. The order, first hit wins:
/// 1. `explicit`, a file or a directory that holds it;
/// 2. the environment variable `DSV_NVRTC`, likewise;
/// 3. `.cuda/nvidia/cu13/lib` of the checkout, then of the current directory and its ancestors;
/// 4. `libnvrtc.so.13` and `libnvrtc.so` by the system's loader (returned as a bare name);
/// 5. `/usr/local/cuda/lib64`;
/// 6. `nvidia/cu13/lib` in Python's site-packages (of `VIRTUAL_ENV`, `CONDA_PREFIX`, the user, the system).
///
/// # Errors
/// [`CompileError::NoNvrtc`] with every place looked at. A path given by 1 or 2 that holds no NVRTC is an error at
/// once: the search does not go on behind the caller's back.
pub fn find_nvrtc(explicit: Option<&Path>) -> Result<PathBuf, CompileError> {
    let named = [
        explicit.map(Path::to_path_buf),
        std::env::var_os("DSV_NVRTC").filter(|value| !value.is_empty()).map(PathBuf::from),
    ];
    if let Some(path) = named.into_iter().flatten().next() {
        if path.is_file() {
            return Ok(path);
        }
        return nvrtc_in(&path)
            .ok_or_else(|| CompileError::NoNvrtc { tried: vec![path.display().to_string()] });
    }
    let mut tried = Vec::new();
    for dir in dot_cuda_dirs().into_iter().map(|dir| dir.join(WHEEL_LIB)) {
        if let Some(found) = nvrtc_in(&dir) {
            return Ok(found);
        }
        tried.push(dir.display().to_string());
    }
    for name in ["libnvrtc.so.13", "libnvrtc.so"] {
        // SAFETY: NVRTC's initialisers have no preconditions; the handle is dropped again at once.
        if unsafe { Library::open(Some(name), RTLD_NOW) }.is_ok() {
            return Ok(PathBuf::from(name));
        }
        tried.push(format!("{name} by the system's loader"));
    }
    let rest = site_packages().into_iter().map(|dir| dir.join(WHEEL_LIB));
    for dir in std::iter::once(PathBuf::from("/usr/local/cuda/lib64")).chain(rest) {
        if let Some(found) = nvrtc_in(&dir) {
            return Ok(found);
        }
        tried.push(dir.display().to_string());
    }
    Err(CompileError::NoNvrtc { tried })
}

/// Fetches the NVRTC and nvdisasm wheels into `<root>/.cuda` with pip; does nothing where both are there already.
/// Returns the path of NVRTC.
///
/// # Errors
/// [`CompileError::Fetch`] with pip's own words.
pub fn fetch_nvrtc(root: &Path) -> Result<PathBuf, CompileError> {
    let into = root.join(".cuda");
    let lib = into.join(WHEEL_LIB);
    let fail = |why: String| CompileError::Fetch { into: into.clone(), why };
    if nvrtc_in(&lib).is_none() || !into.join("nvidia/cu13/bin/nvdisasm").is_file() {
        let out = Command::new("python3")
            .args(["-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--only-binary=:all:"])
            .args(["--upgrade", "--target"])
            .arg(&into)
            .args([NVRTC_WHEEL, NVDISASM_WHEEL])
            .output()
            .map_err(|e| fail(format!("python3 does not start: {e}")))?;
        if !out.status.success() {
            return Err(fail(String::from_utf8_lossy(&out.stderr).trim().to_owned()));
        }
        // The wheel carries a second build of the compiler, 200 MB that nothing here uses.
        for entry in std::fs::read_dir(&lib).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains(".alt.so") {
                std::fs::remove_file(entry.path()).map_err(|e| fail(e.to_string()))?;
            }
        }
    }
    nvrtc_in(&lib).ok_or_else(|| fail(format!("pip succeeded, but {} holds no libnvrtc", lib.display())))
}

/// Flags of every compile, one option per flag. Spills and `(C75..)` notes are judged from the log afterwards, for
/// `--ptxas-options=-Werror` would refuse listed spills too and does not catch the notes. Diagnostic 177 (a
/// constant of CONFIG that this kernel does not use) is no defect of a generated file. Everything is device code, the
/// call operators of generic lambdas included, which cannot say so themselves.
pub(crate) fn flags(arch: &str) -> Result<Vec<String>, CompileError> {
    let digits =
        arch.strip_prefix("sm").map(|rest| rest.strip_prefix('_').unwrap_or(rest)).unwrap_or_default();
    let number = digits.trim_end_matches(['a', 'f']);
    if !(2..=3).contains(&number.len())
        || !number.bytes().all(|b| b.is_ascii_digit())
        || digits.len() > number.len() + 1
    {
        return Err(CompileError::Arch { arch: arch.to_owned() });
    }
    Ok(vec![
        format!("--gpu-architecture=sm_{digits}"),
        "--std=c++20".into(),
        "--device-as-default-execution-space".into(),
        "--diag-suppress=177".into(),
        "--ptxas-options=-v".into(),
        "--ptxas-options=-warn-spills".into(),
    ])
}

type Program = *mut c_void;
type Status = c_int;

/// What a compile is to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Product {
    /// Machine code, with the log of ptxas.
    Cubin,
    /// The text ptxas would read.
    Ptx,
}

/// As [`flags`], for PTX: no machine code is made, so nothing is said of ptxas.
pub(crate) fn ptx_flags(arch: &str) -> Result<Vec<String>, CompileError> {
    let mut flags = flags(arch)?;
    flags.retain(|flag| !flag.starts_with("--ptxas-options"));
    flags[0] = flags[0].replace("=sm_", "=compute_");
    Ok(flags)
}

/// The functions of NVRTC that are used.
pub(crate) struct Nvrtc {
    create: Symbol<
        unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> Status,
    >,
    destroy: Symbol<unsafe extern "C" fn(*mut Program) -> Status>,
    compile: Symbol<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status>,
    log_size: Symbol<unsafe extern "C" fn(Program, *mut usize) -> Status>,
    log: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    cubin_size: Symbol<unsafe extern "C" fn(Program, *mut usize) -> Status>,
    cubin: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    ptx_size: Symbol<unsafe extern "C" fn(Program, *mut usize) -> Status>,
    ptx: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    error: Symbol<unsafe extern "C" fn(Status) -> *const c_char>,
    library: String,
    version: String,
    /// Whether this NVRTC has a cache of its own that can be passed over ([`NO_CACHE`]).
    caches: bool,
}

/// NVRTC 13 keeps cubins beside the driver's cache, by what its front end made of the text. What it takes from there comes
/// without ptxas' log, which kernels are judged by.
const NO_CACHE: &str = "--no-cache";

impl Nvrtc {
    /// Loads NVRTC and proves it by compiling an empty kernel, which also tells its version in full.
    pub(crate) fn load(explicit: Option<&Path>) -> Result<Self, CompileError> {
        let path = find_nvrtc(explicit)?;
        let library = path.display().to_string();
        let fail = |why: String| CompileError::Load { library: library.clone(), why };
        let builtins = path
            .parent()
            .and_then(|dir| std::fs::read_dir(dir).ok())
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("libnvrtc-builtins.so") && !name.contains(".alt.")
            })
            .max();
        let open = |path: &Path| {
            // SAFETY: NVRTC and its builtins are data and a compiler; their initialisers have no preconditions.
            unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(|e| fail(e.to_string()))
        };
        // Builtins are found by name once they are in the process. A bare name has no directory: the system's
        // loader finds both.
        let builtins = builtins.map(|path| open(&path)).transpose()?;
        let nvrtc = open(&path)?;
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the field's type is that function's signature in nvrtc.h, the same since CUDA 11.3.
                unsafe { nvrtc.get($name) }.map_err(|e| fail(e.to_string()))?
            };
        }
        let mut this = Self {
            create: symbol!(b"nvrtcCreateProgram"),
            destroy: symbol!(b"nvrtcDestroyProgram"),
            compile: symbol!(b"nvrtcCompileProgram"),
            log_size: symbol!(b"nvrtcGetProgramLogSize"),
            log: symbol!(b"nvrtcGetProgramLog"),
            cubin_size: symbol!(b"nvrtcGetCUBINSize"),
            cubin: symbol!(b"nvrtcGetCUBIN"),
            ptx_size: symbol!(b"nvrtcGetPTXSize"),
            ptx: symbol!(b"nvrtcGetPTX"),
            error: symbol!(b"nvrtcGetErrorString"),
            library: library.clone(),
            version: String::new(),
            caches: true,
        };
        // The libraries stay for the life of the process: NVRTC keeps state of its own, and the symbols point in.
        std::mem::forget((builtins, nvrtc));
        let probe = CompileJob {
            name: "probe",
            source: "extern \"C\" __global__ void probe() {}",
            headers: &[],
            arch: "sm90a",
        };
        let flags = flags(probe.arch)?;
        // Older ones refuse the option.
        this.caches = matches!(this.compile(&probe, &flags, Product::Cubin), Ok(Ok(_)));
        let (cubin, log) = this
            .compile(&probe, &flags, Product::Cubin)
            .map_err(|e| fail(e.to_string()))?
            .map_err(|log| fail(format!("an empty kernel for sm_90a does not compile: {}", log.trim())))?;
        this.version =
            version_in(&cubin).ok_or_else(|| fail(format!("its cubins name no version; {log}")))?;
        Ok(this)
    }

    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    pub(crate) fn library(&self) -> &str {
        &self.library
    }

    fn ok(&self, job: &CompileJob<'_>, status: Status) -> Result<(), CompileError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: takes any integer and returns a static string.
        let text = unsafe { CStr::from_ptr((self.error)(status)) }.to_string_lossy().into_owned();
        Err(CompileError::Load {
            library: self.library.clone(),
            why: format!("{text}, compiling {}", job.name),
        })
    }

    /// Compiles to what is asked for, and the log; the inner error is NVRTC's log where it refuses the text.
    #[allow(clippy::type_complexity)]
    pub(crate) fn compile(
        &self,
        job: &CompileJob<'_>,
        flags: &[String],
        product: Product,
    ) -> Result<Result<(Vec<u8>, String), String>, CompileError> {
        let c_string = |text: &str, what: &str| {
            CString::new(text).map_err(|_| CompileError::Report {
                name: job.name.to_owned(),
                what: format!("{what} holds a NUL byte"),
            })
        };
        let source = c_string(job.source, "the text")?;
        let file = c_string(&format!("{}.cu", job.name), "the name")?;
        let mut names = Vec::new();
        let mut texts = Vec::new();
        for (name, text) in job.headers {
            names.push(c_string(name, "a header's name")?);
            texts.push(c_string(text, name)?);
        }
        let no_cache = self.caches.then_some(NO_CACHE);
        let options = flags.iter().map(String::as_str).chain(no_cache);
        let options = options.map(|flag| c_string(flag, "a flag")).collect::<Result<Vec<_>, _>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (names, texts, options) = (pointers(&names), pointers(&texts), pointers(&options));
        // `names`, `texts` and `options` point into the vectors of CStrings shadowed above, which live to the end.

        /// Destroys the program however the function is left.
        struct Guard<'a>(&'a Nvrtc, Program);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                // SAFETY: the program was created by this library and is destroyed once.
                unsafe { (self.0.destroy)(&mut self.1) };
            }
        }
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: all strings are NUL-terminated and live; both arrays have `headers.len()` elements.
        self.ok(job, unsafe {
            (self.create)(
                &mut program,
                source.as_ptr(),
                file.as_ptr(),
                job.headers.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        })?;
        let program = Guard(self, program);
        // SAFETY: a live program and `options.len()` live strings. NVRTC may be called from many threads.
        let status = unsafe { (self.compile)(program.1, options.len() as c_int, options.as_ptr()) };
        let mut size = 0usize;
        // SAFETY: a live program and a place for the size, which counts the NUL.
        self.ok(job, unsafe { (self.log_size)(program.1, &mut size) })?;
        let mut log = vec![0u8; size.max(1)];
        // SAFETY: the buffer has the size NVRTC asked for.
        self.ok(job, unsafe { (self.log)(program.1, log.as_mut_ptr().cast()) })?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
        if status != 0 {
            // SAFETY: takes any integer and returns a static string.
            let text = unsafe { CStr::from_ptr((self.error)(status)) }.to_string_lossy();
            return Ok(Err(if log.trim().is_empty() { text.into_owned() } else { log }));
        }
        let (size_of, read) = match product {
            Product::Cubin => (&self.cubin_size, &self.cubin),
            Product::Ptx => (&self.ptx_size, &self.ptx),
        };
        // SAFETY: a live, compiled program and a place for the size.
        self.ok(job, unsafe { size_of(program.1, &mut size) })?;
        let mut made = vec![0u8; size];
        // SAFETY: the buffer has the size NVRTC asked for.
        self.ok(job, unsafe { read(program.1, made.as_mut_ptr().cast()) })?;
        Ok(Ok((made, log)))
    }
}

/// The version that ptxas writes into a note of every cubin: `release 13.0, V13.0.88`.
fn version_in(cubin: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(cubin);
    let at = text.find(", V")? + 3;
    let version: String = text[at..].chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    (version.split('.').count() == 3).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arch_is_normalised_and_checked() {
        assert_eq!(flags("sm90a").unwrap()[0], "--gpu-architecture=sm_90a");
        assert_eq!(flags("sm_80").unwrap()[0], "--gpu-architecture=sm_80");
        for bad in ["", "90a", "sm", "sm9", "sm90aa", "sm_90b", "hopper", "sm90 -v"] {
            assert!(flags(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn drivers() {
        assert_eq!(oldest_driver("13.0.88"), 580);
        assert_eq!(oldest_driver("12.9.41"), 525);
    }
}
