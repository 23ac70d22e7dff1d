//! From a kernel's name to a function on the GPU: a cubin from a bundle, else from this machine's NVRTC, loaded once.

use crate::device::{Device, Stream, driver};
use crate::error::Error;
use crate::registry::{KernelText, Registry};
use crate::report::{Notice, Report};
use cudarc::driver::sys::CUfunction_attribute_enum as Attribute;
use cudarc::driver::{result, sys};
use dsv_compile::{BundleError, CompileJob, Compiler};
use dsv_spec::{Arch, Facts, KernelSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// A directory of cubins, made by `dsv-codegen build --out DIR`, that was checked against this program's registry.
#[derive(Clone, Debug)]
pub struct Bundle {
    dir: PathBuf,
    inner: dsv_compile::Bundle,
}

impl Bundle {
    /// Reads a bundle and checks every cubin, without a GPU. Kernels this version does not have are left alone.
    ///
    /// # Errors
    /// [`Error::Bundle`] with every problem: a manifest that is missing, cut short or of another schema, a kernel whose
    /// text has changed since, a cubin that is missing or not the one listed, nothing this version has.
    pub fn open(dir: &Path, registry: &Registry) -> Result<Bundle, Error> {
        let fail = |problems: Vec<String>| Error::Bundle { dir: dir.to_path_buf(), problems };
        let inner = dsv_compile::Bundle::open(dir).map_err(|e| fail(vec![problem(&e)]))?;
        let known = || inner.kernels().filter_map(|k| registry.kernel(&k.name));
        let mut problems: Vec<String> =
            known().filter_map(|k| inner.cubin(k.name, k.source_hash).err()).map(|e| problem(&e)).collect();
        if known().next().is_none() {
            problems.push("it holds no kernel that this version has".to_string());
        }
        if problems.is_empty() { Ok(Bundle { dir: dir.to_path_buf(), inner }) } else { Err(fail(problems)) }
    }

    /// Refuses a bundle that this GPU or driver cannot load.
    ///
    /// # Errors
    /// [`Error::Bundle`] with every problem.
    pub fn check_gpu(&self, capability: (i32, i32), driver_major: u32) -> Result<(), Error> {
        let (major, minor) = capability;
        let runs = |arch: &str| Arch::from_name(arch).is_some_and(|arch| arch.runs_on(major, minor));
        let mut problems = Vec::new();
        let arches: BTreeSet<&str> = self.inner.kernels().map(|k| k.arch.as_str()).collect();
        if !arches.iter().any(|arch| runs(arch)) {
            problems.push(format!(
                "its cubins are for {}, this GPU has compute capability {major}.{minor}",
                arches.into_iter().collect::<Vec<_>>().join(", ")
            ));
        }
        let oldest = self.inner.oldest_driver();
        if driver_major < oldest {
            problems.push(format!(
                "its cubins (NVRTC {}) need driver {oldest} or newer, this one is {driver_major}",
                self.inner.compiler()
            ));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Bundle { dir: self.dir.clone(), problems }) }
    }

    /// The bundle in `dir` where this version, GPU and driver can load it; else nothing, and the report says why:
    /// kernels are then compiled on this machine.
    pub fn usable(
        dir: &Path,
        registry: &Registry,
        capability: (i32, i32),
        driver_major: u32,
        report: &Report,
    ) -> Option<Bundle> {
        let opened = Bundle::open(dir, registry)
            .and_then(|bundle| bundle.check_gpu(capability, driver_major).map(|()| bundle));
        opened.map_err(|error| report(&Notice::BundleRefused(error.to_string()))).ok()
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// NVRTC's version.
    pub fn compiler(&self) -> &str {
        self.inner.compiler()
    }

    fn cubin(&self, kernel: &KernelText) -> Result<Option<Vec<u8>>, Error> {
        match self.inner.cubin(kernel.name, kernel.source_hash) {
            Ok(cubin) => Ok(Some(cubin)),
            Err(BundleError::Missing { .. }) => Ok(None),
            Err(e) => Err(Error::Bundle { dir: self.dir.clone(), problems: vec![problem(&e)] }),
        }
    }
}

/// What is wrong, without the next command, which [`Error::Bundle`] names once.
fn problem(error: &BundleError) -> String {
    match error {
        BundleError::Open { why, .. } => why.clone(),
        BundleError::Missing { name, .. } => format!("it has no kernel {name}"),
        BundleError::Stale { name, found, wanted, .. } => {
            format!("{name} was made from text {found}, this version's is {wanted}")
        }
        BundleError::Damaged { path, why, .. } => {
            format!("{}: {why}", path.file_name().unwrap_or_default().to_string_lossy())
        }
    }
}

/// Where a loaded kernel's cubin came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A bundle in this directory.
    Bundle(PathBuf),
    /// NVRTC of this version on this machine, now or earlier (its cache).
    Compiled(String),
    /// The caller gave it.
    Given,
}

/// A kernel on the GPU, ready to be launched. Unloaded with the value.
pub struct Kernel {
    device: Arc<Device>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    spec: KernelSpec,
    name: String,
    facts: Facts,
    origin: Origin,
    max_smem_bytes: u32,
    registers: u32,
    local_bytes: u32,
}

// SAFETY: the driver's modules and functions may be used from any thread with the context current, which every call
// ensures.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({:?}, {} registers)", self.name, self.origin, self.registers)
    }
}

impl Kernel {
    /// Loads a cubin and allows its function the dynamic shared memory its spec asks for (all the GPU has where that
    /// depends on the problem).
    ///
    /// # Errors
    /// What the driver answers: a cubin of another architecture, one that is newer than the driver, a missing symbol.
    pub fn load(
        device: &Arc<Device>,
        spec: KernelSpec,
        cubin: &[u8],
        origin: Origin,
    ) -> Result<Kernel, Error> {
        device.bind()?;
        let name = spec.name();
        // SAFETY: the image is a whole cubin (from the compiler, or of the listed hash); the driver checks its form.
        let module = driver(format!("cuModuleLoadData of {name}"), unsafe {
            result::module::load_data(cubin.as_ptr().cast())
        })?;
        let mut kernel = Kernel {
            device: device.clone(),
            module,
            function: std::ptr::null_mut(),
            facts: spec.facts(),
            spec,
            name,
            origin,
            max_smem_bytes: 0,
            registers: 0,
            local_bytes: 0,
        };
        let symbol = CString::new(kernel.name.as_str()).expect("kernel names hold no zero byte");
        // SAFETY: the module is alive.
        kernel.function = driver(format!("cuModuleGetFunction of {}", kernel.name), unsafe {
            result::module::get_function(module, symbol)
        })?;
        let attribute = |attribute| {
            // SAFETY: the function is alive.
            driver(format!("cuFuncGetAttribute of {}", kernel.name), unsafe {
                result::function::get_function_attribute(kernel.function, attribute)
            })
        };
        let static_bytes = attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)? as u32;
        let registers = attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)? as u32;
        let local_bytes = attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)? as u32;
        let room = device.info().smem_bytes_per_cta.saturating_sub(static_bytes);
        kernel.max_smem_bytes = if kernel.facts.smem_bytes > 0 { kernel.facts.smem_bytes } else { room };
        kernel.registers = registers;
        kernel.local_bytes = local_bytes;
        let smem_bytes = kernel.max_smem_bytes;
        // SAFETY: the function is alive.
        let answer = unsafe {
            result::function::set_function_attribute(
                kernel.function,
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                smem_bytes as i32,
            )
        };
        driver(
            format!("cuFuncSetAttribute of {}: {smem_bytes} bytes of shared memory", kernel.name),
            answer,
        )?;
        Ok(kernel)
    }

    /// The kernel's spec.
    pub fn spec(&self) -> &KernelSpec {
        &self.spec
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its derived numbers.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Where its cubin came from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Registers a thread, as the driver sees it.
    pub fn registers(&self) -> u32 {
        self.registers
    }

    /// Local memory (spills, stack) a thread in bytes, as the driver sees it.
    pub fn local_bytes(&self) -> u32 {
        self.local_bytes
    }

    /// Dynamic shared memory a launch may ask for, bytes.
    pub fn max_smem_bytes(&self) -> u32 {
        self.max_smem_bytes
    }

    /// CTAs that are meant to run at once on this GPU: [`Facts::ctas_per_sm`] on each multiprocessor.
    pub fn resident_ctas(&self) -> u32 {
        self.facts.ctas_per_sm * self.device.info().multiprocessors
    }

    /// Queues the kernel on `grid` CTAs of [`Facts::threads`] threads with `smem_bytes` of dynamic shared memory
    /// and the op's launch parameters (one of [`dsv_spec::params`]). Allocates nothing, waits for nothing; may be
    /// captured.
    ///
    /// # Safety
    /// The parameters' addresses are what the op's documentation asks for, and stay so until the work is done.
    ///
    /// # Errors
    /// Parameters of another size, a grid with a zero, more shared memory than allowed, or what the driver answers.
    pub unsafe fn launch<P: Copy>(
        &self,
        stream: &Stream,
        grid: [u32; 3],
        smem_bytes: u32,
        params: &P,
    ) -> Result<(), Error> {
        let refuse = |what, value: String, allowed: String| {
            Err(Error::Argument { kernel: self.name.clone(), what, value, allowed })
        };
        if size_of::<P>() != self.facts.params_bytes as usize {
            return refuse(
                "size of the parameters",
                format!("{} ({})", size_of::<P>(), std::any::type_name::<P>()),
                format!("{} bytes, those of the op's struct in dsv_spec::params", self.facts.params_bytes),
            );
        }
        if grid[0] == 0 || grid[0] > i32::MAX as u32 || grid[1..].iter().any(|&n| n == 0 || n > 65_535) {
            return refuse("grid", format!("{grid:?}"), "1 to 2147483647 by 1 to 65535 by 1 to 65535".into());
        }
        if smem_bytes > self.max_smem_bytes {
            return refuse(
                "dynamic shared memory",
                format!("{smem_bytes} bytes"),
                format!("at most {}", self.max_smem_bytes),
            );
        }
        stream.bind()?;
        let mut argument: *mut c_void = std::ptr::from_ref(params).cast_mut().cast();
        // SAFETY: one argument of the size the kernel declares (asserted in its text), copied by the driver before
        // it returns; the rest is the caller's promise.
        let answer = unsafe {
            sys::cuLaunchKernel(
                self.function,
                grid[0],
                grid[1],
                grid[2],
                self.facts.threads,
                1,
                1,
                smem_bytes,
                stream.raw(),
                &mut argument,
                std::ptr::null_mut(),
            )
        };
        match answer {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            _ => driver(
                format!("cuLaunchKernel of {} on {grid:?} x {} threads", self.name, self.facts.threads),
                answer.result(),
            ),
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: loaded by this value and unloaded once; the driver waits for what runs.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

/// The kernels of one GPU, each loaded at most once.
pub struct Kernels {
    device: Arc<Device>,
    registry: Registry,
    bundle: Option<Bundle>,
    compiler: OnceLock<Compiler>,
    loaded: Mutex<BTreeMap<String, Arc<Kernel>>>,
    report: Report,
}

impl Kernels {
    /// Kernels from `bundle` ([`Bundle::usable`] on this GPU) where it has them, else compiled here from the registry's
    /// text.
    pub fn new(device: &Arc<Device>, registry: Registry, bundle: Option<Bundle>, report: Report) -> Kernels {
        Kernels {
            device: device.clone(),
            registry,
            bundle,
            compiler: OnceLock::new(),
            loaded: Mutex::new(BTreeMap::new()),
            report,
        }
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The texts.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    fn loaded(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Kernel>>> {
        self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The kernel of this spec, loaded now or earlier. Not for hot calls: the first time it reads files, may compile
    /// (seconds), and loads a module.
    ///
    /// # Errors
    /// [`Error::NoText`], [`Error::Compile`], or what the driver answers.
    pub fn load(&self, spec: &KernelSpec) -> Result<Arc<Kernel>, Error> {
        let name = spec.name();
        // Held while compiling: two threads asking for one kernel wait for one compile.
        let mut loaded = self.loaded();
        if let Some(kernel) = loaded.get(&name) {
            return Ok(kernel.clone());
        }
        let (cubin, origin) = self.cubin(spec, &name)?;
        let kernel = Arc::new(Kernel::load(&self.device, *spec, &cubin, origin)?);
        loaded.insert(name, kernel.clone());
        Ok(kernel)
    }

    fn cubin(&self, spec: &KernelSpec, name: &str) -> Result<(Vec<u8>, Origin), Error> {
        let text = self
            .registry
            .kernel(name)
            .ok_or_else(|| Error::NoText { name: name.to_string(), arch: spec.arch() })?;
        let (major, minor) = self.device.info().capability;
        let arch = spec.arch();
        let target = arch.nvrtc_for(major, minor).ok_or_else(|| Error::Architecture {
            arch,
            gpu: self.device.info().name.clone(),
            capability: (major, minor),
        })?;
        // A bundle's cubins are for the first GPUs of their architecture; where those do not run, the text still does.
        if let Some(bundle) = self.bundle.as_ref().filter(|_| arch.runs_on(major, minor)) {
            match bundle.cubin(text) {
                Ok(Some(cubin)) => return Ok((cubin, Origin::Bundle(bundle.dir().to_path_buf()))),
                Ok(None) => {}
                // It changed on the disk since it was opened.
                Err(error) => (self.report)(&Notice::BundleRefused(error.to_string())),
            }
        }
        let fail = |source| Error::Compile { name: name.to_string(), source: Box::new(source) };
        let compiler = match self.compiler.get() {
            Some(compiler) => compiler,
            None => {
                let compiler = Compiler::new().map_err(fail)?;
                (self.report)(&Notice::CompilingHere {
                    kernel: name.to_string(),
                    compiler: compiler.version().to_string(),
                    bundle: self.bundle.as_ref().map(|b| b.dir().to_path_buf()),
                });
                self.compiler.get_or_init(|| compiler)
            }
        };
        let job = CompileJob { name, source: text.source, headers: self.registry.headers, arch: target };
        let compiled = compiler.compile(job).map_err(fail)?;
        let spilled = compiled.report.spill_store_bytes.max(compiled.report.spill_load_bytes);
        if !compiled.notes.is_empty() || spilled > 0 {
            (self.report)(&Notice::CompilerComplains {
                kernel: name.to_string(),
                compiler: compiled.compiler.clone(),
                spilled,
                notes: compiled.notes.clone(),
            });
        }
        Ok((compiled.cubin, Origin::Compiled(compiled.compiler)))
    }
}
