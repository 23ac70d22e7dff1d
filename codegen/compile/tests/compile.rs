//! Compiles a small Hopper kernel for real. Needs NVRTC: without it these tests fail with the command that
//! fetches it.

use std::fs;
use std::path::Path;

use dsv_compile::{CompileError, CompileJob, Compiler, ResourceReport, SpillList, sass};

/// One wgmma of 64x64x16 on whatever shared memory holds: enough for HGMMA to appear in the SASS.
const WGMMA: &str = r#"
#include "dsv/fence.cuh"
extern "C" __global__ void __launch_bounds__(128, 1) probe_wgmma(float* out, unsigned long long a, unsigned long long b) {
  float d[32];
  #pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = 0.f;
  dsv::wgmma_fence();
  asm volatile(
    "{\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
    "%32, %33, 1, 1, 1, 0, 0;\n}\n"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
    : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" ::: "memory");
  #pragma unroll
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i];
}
"#;

const FENCE: (&str, &str) = (
    "dsv/fence.cuh",
    "#pragma once\nnamespace dsv {\n__device__ __forceinline__ void wgmma_fence() {\n  \
     asm volatile(\"wgmma.fence.sync.aligned;\" ::: \"memory\");\n}\n}\n",
);

/// 64 live floats a thread at 32 registers: must spill.
const SPILL: &str = r#"
extern "C" __global__ void __launch_bounds__(1024, 2) probe_spill(float* x, const float* y, int n) {
  __shared__ float s[100];
  float a[64];
  #pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = x[i * n + threadIdx.x];
  for (int j = 0; j < n; ++j) {
    #pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i * 7 + 3) & 63] + y[j];
  }
  s[threadIdx.x % 100] = a[3];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 64; ++i) x[i * n + threadIdx.x] = a[i] + s[i];
}
"#;

fn compiler(cache: &Path) -> Compiler {
    Compiler::with(None, Some(cache)).unwrap_or_else(|e| panic!("{e}"))
}

fn job<'a>(name: &'a str, source: &'a str, headers: &'a [(&'a str, &'a str)]) -> CompileJob<'a> {
    CompileJob { name, source, headers, arch: "sm90a" }
}

#[test]
fn wgmma_compiles_and_is_cached() {
    let dir = tempfile::tempdir().unwrap();
    let compiler = compiler(dir.path());
    let headers = [FENCE];
    let job = job("probe_wgmma", WGMMA, &headers);
    let first = compiler.compile(job).unwrap_or_else(|e| panic!("{e}"));
    first.check(&SpillList::none()).unwrap_or_else(|e| panic!("{e}"));
    assert!(!first.cached);
    assert!(first.report.registers >= 32, "{:?}", first.report);
    assert_eq!(first.report.max_threads, Some(128));
    assert_eq!((first.report.spill_store_bytes, first.report.static_smem_bytes), (0, 0));

    let again = compiler.compile(job).unwrap();
    assert!(again.cached);
    assert_eq!((&again.cubin, again.report, &again.log), (&first.cubin, first.report, &first.log));
    assert_eq!(fs::read_to_string(&again.source_path).unwrap(), WGMMA);

    // Every part of the key makes another entry.
    let other_header =
        [(FENCE.0, "#pragma once\nnamespace dsv { __device__ inline void wgmma_fence() {} }\n")];
    let text = format!("{WGMMA}// changed\n");
    for changed in [CompileJob { headers: &other_header, ..job }, CompileJob { source: &text, ..job }] {
        assert!(!compiler.compile(changed).unwrap().cached);
    }
}

#[test]
fn sass_shows_the_tensor_cores() {
    let dir = tempfile::tempdir().unwrap();
    let compiled = compiler(dir.path()).compile(job("probe_wgmma", WGMMA, &[FENCE])).unwrap();
    let sass = sass(&compiled.cubin).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(sass["probe_wgmma"].count("HGMMA"), 1);
    assert_eq!(sass["probe_wgmma"].count("LDL"), 0);
}

#[test]
fn spills_are_reported_and_must_be_listed() {
    let dir = tempfile::tempdir().unwrap();
    let compiled = compiler(dir.path()).compile(job("probe_spill", SPILL, &[])).unwrap();
    let ResourceReport { registers, spill_store_bytes, static_smem_bytes, barriers, .. } = compiled.report;
    assert_eq!((registers, static_smem_bytes, barriers), (32, 400, 1));
    assert!(spill_store_bytes > 0);
    let message = compiled.check(&SpillList::none()).unwrap_err().to_string();
    insta::assert_snapshot!("error_spills", message);
    let list = SpillList::parse("probe_spill 100000  # made to spill").unwrap();
    compiled.check(&list).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_serialised_wgmma_is_refused() {
    // The accumulator is read before the wait: the compiler serialises and says so in a (C75..) note.
    let dir = tempfile::tempdir().unwrap();
    let text = WGMMA
        .replace("wgmma.wait_group.sync.aligned 0;\\n", "")
        .replace("out[threadIdx.x * 32 + i] = d[i];", "out[threadIdx.x * 32 + i] = d[i] * d[i];");
    assert_ne!(text, WGMMA);
    let compiled = compiler(dir.path()).compile(job("probe_wgmma", &text, &[FENCE])).unwrap();
    let error = compiled.check(&SpillList::none()).unwrap_err();
    assert!(matches!(error, CompileError::Notes { .. }), "{error}\n{}", compiled.log);
}

#[test]
fn warnings_are_refused_but_for_unused_constants() {
    let dir = tempfile::tempdir().unwrap();
    let compiler = compiler(dir.path());
    let unused =
        "namespace { constexpr int kUnused = 3; }\nextern \"C\" __global__ void k(int* x) { x[0] = 1; }";
    compiler.compile(job("k", unused, &[])).unwrap().check(&SpillList::none()).unwrap();
    let pointless = "extern \"C\" __global__ void k(unsigned* x) { if (x[0] < 0) x[1] = 1; x[2] = 1; }";
    let error = compiler.compile(job("k", pointless, &[])).unwrap().check(&SpillList::none()).unwrap_err();
    assert!(matches!(error, CompileError::Warnings { .. }), "{error}");
}

#[test]
fn a_file_of_two_entries_reports_both() {
    let dir = tempfile::tempdir().unwrap();
    let text = "extern \"C\" __global__ void a(float* x) { x[0] = 1; }\n\
                extern \"C\" __global__ void __launch_bounds__(256) b(float* x) { __shared__ float s[8]; \
                s[threadIdx.x & 7] = x[0]; __syncthreads(); x[1] = s[3]; }";
    let compiled = compiler(dir.path()).compile(job("b", text, &[])).unwrap();
    assert_eq!(compiled.entries.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((compiled.report.static_smem_bytes, compiled.report.max_threads), (32, Some(256)));
    assert_eq!(compiled.entries["a"].static_smem_bytes, 0);
}

#[test]
fn rejected_text_names_line_and_file() {
    let dir = tempfile::tempdir().unwrap();
    let Err(CompileError::Rejected { log, source_path, .. }) = compiler(dir.path()).compile(job(
        "broken",
        "extern \"C\" __global__ void broken() {\n  int x = y;\n}",
        &[],
    )) else {
        panic!("undeclared y was accepted");
    };
    assert!(log.contains("broken.cu(2)"), "{log}");
    assert!(source_path.is_file());
    // Plain sm_90 has no wgmma: the refusal of ptxas arrives as well.
    let plain = CompileJob { arch: "sm90", ..job("probe_wgmma", WGMMA, &[FENCE]) };
    let error = compiler(dir.path()).compile(plain).unwrap_err();
    assert!(error.to_string().contains("wgmma"), "{error}");
}

#[test]
fn a_damaged_entry_is_compiled_again() {
    let dir = tempfile::tempdir().unwrap();
    let compiler = compiler(dir.path());
    let job = job("k", "extern \"C\" __global__ void k(int* x) { x[0] = 1; }", &[]);
    let first = compiler.compile(job).unwrap();
    let cubin = first.source_path.with_extension("cubin");
    fs::write(&cubin, &first.cubin[..100]).unwrap();
    let again = compiler.compile(job).unwrap();
    assert!(!again.cached);
    assert_eq!(again.cubin, first.cubin);
    assert!(compiler.compile(job).unwrap().cached, "the damaged entry was not replaced");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 1, "left behind: {left:?}");
}

#[test]
fn many_at_once_keep_their_order_and_share_a_cache() {
    let dir = tempfile::tempdir().unwrap();
    let compiler = compiler(dir.path());
    let texts: Vec<(String, String)> = (0..8)
        .map(|i| {
            let name = format!("k{}", i / 2); // every job twice: both threads race for one entry
            let text = format!("extern \"C\" __global__ void {name}(int* x) {{ x[0] = {}; }}", i / 2);
            (name, text)
        })
        .collect();
    let jobs: Vec<_> = texts.iter().map(|(name, text)| job(name, text, &[])).collect();
    let told = std::sync::atomic::AtomicUsize::new(0);
    let results = compiler.compile_all(&jobs, 4, |_, result| {
        assert!(result.is_ok());
        told.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(told.into_inner(), 8);
    for (result, (name, _)) in results.iter().zip(&texts) {
        assert_eq!(&result.as_ref().unwrap().name, name);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
}

#[test]
fn an_unwritable_cache_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = compiler(&file).compile(job("k", "extern \"C\" __global__ void k() {}", &[])).unwrap_err();
    assert!(matches!(error, CompileError::Cache { .. }), "{error}");
}

#[test]
fn a_path_without_nvrtc_is_an_error_with_the_next_command() {
    let dir = tempfile::tempdir().unwrap();
    let error = Compiler::with(Some(dir.path()), None).err().expect("an empty directory holds no NVRTC");
    let message = error.to_string().replace(&dir.path().display().to_string(), "<DIR>");
    insta::assert_snapshot!(message, @r"
    NVRTC, NVIDIA's run-time compiler, was not found
      looked in: <DIR>
      to fetch it into this checkout: cargo run --release --bin dsv-codegen -- fetch-nvrtc
      or name it: DSV_NVRTC=/path/to/libnvrtc.so.13
    ");
    let text = dir.path().join("libnvrtc.so.13");
    fs::write(&text, "not a library").unwrap();
    let error = Compiler::with(Some(&text), None).err().expect("a text file is no library");
    assert!(matches!(error, CompileError::Load { .. }), "{error}");
}

/// A bundle of one kernel, and what it says when something is amiss.
#[test]
fn bundles_say_what_is_wrong() {
    use dsv_compile::{Bundle, BundledKernel, write_bundle};
    let dir = tempfile::tempdir().unwrap();
    let hidden = |error: dsv_compile::BundleError| {
        error.to_string().replace(&dir.path().display().to_string(), "<DIR>")
    };
    insta::assert_snapshot!("bundle_absent", hidden(Bundle::open(dir.path()).unwrap_err()));

    let compiler = compiler(&dir.path().join("cache"));
    let compiled =
        compiler.compile(job("k", "extern \"C\" __global__ void k(int* x) { x[0] = 1; }", &[])).unwrap();
    let kernel = BundledKernel::new(&compiled, "sm90a", "0123456789abcdef", 1024);
    write_bundle(dir.path(), compiler.version(), vec![kernel.clone()]).unwrap();
    let bundle = Bundle::open(dir.path()).unwrap();
    assert_eq!(bundle.cubin("k", "0123456789abcdef").unwrap(), compiled.cubin);
    let [listed] = bundle.kernels().collect::<Vec<_>>()[..] else { panic!("one kernel") };
    assert_eq!(
        (&listed.source_hash, listed.smem_bytes, &listed.entries),
        (&kernel.source_hash, 1024, &compiled.entries)
    );

    insta::assert_snapshot!("bundle_missing_kernel", hidden(bundle.cubin("other", "").unwrap_err()));
    insta::assert_snapshot!(
        "bundle_stale_kernel",
        hidden(bundle.cubin("k", "fedcba9876543210").unwrap_err())
    );
    let file = dir.path().join("k.cubin");
    fs::write(&file, &compiled.cubin[..64]).unwrap();
    insta::assert_snapshot!(
        "bundle_damaged_cubin",
        hidden(bundle.cubin("k", "0123456789abcdef").unwrap_err())
    );
    let manifest = dir.path().join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"schema\": 1", "\"schema\": 9")).unwrap();
    insta::assert_snapshot!("bundle_other_schema", hidden(Bundle::open(dir.path()).unwrap_err()));
    fs::write(&manifest, &text[..100]).unwrap();
    insta::assert_snapshot!("bundle_cut_manifest", hidden(Bundle::open(dir.path()).unwrap_err()));
}
