//! The kernels on a GPU, through the runtime alone: every shipped kernel and every candidate of the tuner.

mod attention;
mod flow;
mod harness;
mod lists;
mod optimizer;
mod predictor;
mod profile;
mod select;
mod select_fine;
mod tensor;

pub use harness::main;

use crate::corpus::Variant;
use crate::engines::{Lowp, LowpGrads, Oracle};
use crate::inputs::Inputs;
use dsv_compile::{CompileJob, Compiled, Compiler};
use dsv_runtime::{Kernel, Options, Origin, Runtime, Stream, TableSource};
use dsv_spec::{Arch, Dtype, KernelSpec};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Why a test failed.
type Failure = Box<dyn std::error::Error>;
/// What a test that passed has to say, or why it failed.
type Outcome = Result<String, Failure>;

/// The architecture of the GPU.
const ARCH: Arch = Arch::Sm90a;
/// The architectures whose attention kernels are tested, all on that GPU.
const ARCHES: [Arch; 2] = [Arch::Sm90a, Arch::Sm80];

/// One test: a name, the kernels it needs, what to run.
struct GpuTest {
    name: String,
    kernels: Vec<KernelSpec>,
    run: Box<dyn Fn(&mut Gpu) -> Outcome + Send + Sync>,
}

impl GpuTest {
    fn new(
        name: String,
        kernels: Vec<KernelSpec>,
        run: impl Fn(&mut Gpu) -> Outcome + Send + Sync + 'static,
    ) -> GpuTest {
        GpuTest { name, kernels, run: Box::new(run) }
    }
}

/// Every test. Needs no GPU.
fn tests() -> Vec<GpuTest> {
    let families = [
        attention::tests(),
        lists::tests(),
        select::tests(),
        select_fine::tests(),
        predictor::tests(),
        flow::tests(),
        profile::tests(),
        optimizer::tests(),
    ];
    families.into_iter().flatten().collect()
}

/// A variant's inputs and what they should give.
struct Expected {
    dtype: Dtype,
    inputs: Inputs,
    oracle: Oracle,
    /// By the forward's `block_n`.
    lowp: BTreeMap<usize, Lowp>,
    /// After the shipped forward.
    grads: Option<LowpGrads>,
}

impl Expected {
    fn lowp(&self, block_n: usize) -> Result<&Lowp, Failure> {
        self.lowp.get(&block_n).ok_or_else(|| format!("no model with block_n {block_n}").into())
    }
}

/// Seconds a test's launches may take together; compute-sanitizer needs more.
const LIMIT: &str = "DSV_GPU_TEST_LIMIT";

/// When to give the launches up that this process waits for.
static DEADLINE: Mutex<Option<Instant>> = Mutex::new(None);

fn set_deadline(deadline: Option<Instant>) {
    *DEADLINE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = deadline;
}

/// Whether what this process waits for has taken too long.
fn is_overdue() -> bool {
    let deadline = *DEADLINE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    deadline.is_some_and(|deadline| Instant::now() > deadline)
}

/// The GPU, with what tests share.
struct Gpu {
    runtime: Runtime,
    stream: Stream,
    compiler: Option<Compiler>,
    kernels: BTreeMap<String, Arc<Kernel>>,
    /// Of the variant tested last: tests come in the corpus's order.
    expected: Option<(String, Expected)>,
}

impl Gpu {
    /// Opens the first GPU. `DSV_BUNDLE` names a directory made by `dsv-codegen build`; kernels it lacks, or all
    /// without it, are compiled here with the NVRTC that [`dsv_compile::find_nvrtc`] finds.
    fn open() -> Result<Gpu, Failure> {
        let bundle = std::env::var_os("DSV_BUNDLE").map(PathBuf::from);
        let report: dsv_runtime::Report = Arc::new(|notice| eprintln!("{notice}"));
        let runtime =
            Runtime::open(Options { bundle, table: TableSource::Committed, report, ..Options::default() })?;
        let stream = runtime.device().new_stream()?;
        Ok(Gpu { runtime, stream, compiler: None, kernels: BTreeMap::new(), expected: None })
    }

    /// A kernel made from the templates of this program: by the runtime where its registry has the same text, else
    /// rendered and compiled here.
    fn kernel(&mut self, spec: &KernelSpec) -> Result<Arc<Kernel>, Failure> {
        let name = spec.name();
        if let Some(kernel) = self.kernels.get(&name) {
            return Ok(kernel.clone());
        }
        let source = dsv_codegen::render(spec)?;
        let committed = self.runtime.kernels().registry().kernel(&name);
        let kernel = if committed.is_some_and(|text| text.source == source) {
            self.runtime.kernels().load(spec)?
        } else {
            if self.compiler.is_none() {
                self.compiler = Some(Compiler::new()?);
            }
            let compiler = self.compiler.as_ref().ok_or("a compiler was made above")?;
            let compiled = compile(compiler, spec, &source)?;
            let origin = Origin::Compiled(compiled.compiler);
            Arc::new(Kernel::load(self.runtime.device(), *spec, &compiled.cubin, origin)?)
        };
        self.kernels.insert(name, kernel.clone());
        Ok(kernel)
    }

    /// Makes a variant's inputs and what they should give.
    fn expect(&mut self, variant: &Variant) -> Result<&Expected, Failure> {
        let name = variant.name();
        if self.expected.as_ref().is_none_or(|(of, _)| *of != name) {
            let inputs = Inputs::of(variant);
            let oracle = Oracle::of(&inputs)?;
            self.expected = Some((
                name,
                Expected { dtype: variant.case.dtype, inputs, oracle, lowp: BTreeMap::new(), grads: None },
            ));
        }
        self.expected()
    }

    /// Adds, for the variant last expected, the rounding of a forward that walks keys in tiles of `block_n`, and of the
    /// backward after it where `grads` says so.
    fn expect_rounding(&mut self, block_n: usize, grads: bool) -> Result<(), Failure> {
        let Some((_, Expected { dtype, inputs, lowp, grads: made, .. })) = &mut self.expected else {
            return Err("nothing is expected".into());
        };
        if let Entry::Vacant(entry) = lowp.entry(block_n) {
            entry.insert(Lowp::of(inputs, *dtype, block_n)?);
        }
        if grads && made.is_none() {
            *made = Some(lowp[&block_n].grads(inputs)?);
        }
        Ok(())
    }

    /// What [`Gpu::expect`] computed last.
    fn expected(&self) -> Result<&Expected, Failure> {
        Ok(&self.expected.as_ref().ok_or("nothing is expected")?.1)
    }

    /// Waits for what was launched, not forever: the harness gives up a process that is overdue.
    fn wait(&self) -> Result<(), Failure> {
        let seconds = std::env::var(LIMIT).ok().and_then(|text| text.parse().ok()).unwrap_or(10);
        set_deadline(Some(Instant::now() + Duration::from_secs(seconds)));
        let done = self.stream.synchronize();
        set_deadline(None);
        Ok(done?)
    }
}

fn compile(
    compiler: &Compiler,
    spec: &KernelSpec,
    source: &str,
) -> Result<Compiled, dsv_compile::CompileError> {
    compiler.compile(CompileJob {
        name: &spec.name(),
        source,
        headers: dsv_codegen::HEADERS,
        arch: target(spec),
    })
}

/// What a kernel is compiled for: the GPU of [`ARCH`], whichever instructions the text uses.
fn target(spec: &KernelSpec) -> &'static str {
    spec.arch().nvrtc_for(9, 0).unwrap_or(spec.arch().nvrtc())
}

/// Compiles the kernels into the cache, all cores at once, so that tests find them there. What does not compile is
/// reported by the tests that need it.
fn compile_ahead(specs: &[KernelSpec]) -> Result<(), Failure> {
    let compiler = Compiler::new()?;
    let texts: Vec<(String, String, &str)> = specs
        .iter()
        .filter_map(|spec| Some((spec.name(), dsv_codegen::render(spec).ok()?, target(spec))))
        .collect();
    let jobs: Vec<CompileJob<'_>> = texts
        .iter()
        .map(|(name, source, arch)| CompileJob { name, source, headers: dsv_codegen::HEADERS, arch })
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    compiler.compile_all(&jobs, threads, |_, _| {});
    Ok(())
}
