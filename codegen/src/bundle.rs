//! The offline bundle: every committed kernel compiled, so that a machine needs no compiler at run time.

use std::path::Path;

use dsv_compile::{BundledKernel, CompileJob, Compiler, SpillList, write_bundle};
use dsv_spec::KernelSpec;

use crate::{CodegenError, HEADERS, render, source_hash};

/// Compiles `specs` on `threads` threads, judges each (no `(C75..)` note, no warning, no spill beyond `spills`), and
/// writes the bundle to `out`: `<name>.cubin` and `manifest.json`. `done` is told each kernel's name as it ends.
///
/// # Errors
/// The first kernel that does not render, compile or pass, in the order of `specs`; or what stops the bundle from
/// being written.
pub fn build_bundle(
    specs: &[KernelSpec],
    compiler: &Compiler,
    spills: &SpillList,
    threads: usize,
    out: &Path,
    done: impl Fn(&str) + Sync,
) -> Result<(), CodegenError> {
    let texts = specs
        .iter()
        .map(|spec| Ok((spec.name(), render(spec)?)))
        .collect::<Result<Vec<_>, CodegenError>>()?;
    let jobs: Vec<CompileJob<'_>> = specs
        .iter()
        .zip(&texts)
        .map(|(spec, (name, source))| CompileJob {
            name,
            source,
            headers: HEADERS,
            arch: spec.arch().nvrtc(),
        })
        .collect();
    let results = compiler.compile_all(&jobs, threads, |i, _| done(jobs[i].name));
    let mut kernels = Vec::with_capacity(specs.len());
    for ((spec, (_, source)), result) in specs.iter().zip(&texts).zip(results) {
        let compiled = result?;
        compiled.check(spills)?;
        kernels.push(BundledKernel::new(
            &compiled,
            spec.arch().name(),
            &source_hash(source),
            spec.facts().smem_bytes,
        ));
    }
    write_bundle(out, compiler.version(), kernels)?;
    Ok(())
}
