//! From a cubin to a kernel that can be interpreted: its name gives its text, its text gives its PTX.

use crate::decode::{Kernel, decode};
use crate::parse::parse;
use dsv_compile::{CompileJob, Compiler};
use dsv_spec::KernelSpec;
use object::{Object, ObjectSection};
use std::sync::OnceLock;

/// A loaded module: one kernel, as every generated file has.
pub(crate) struct Module {
    pub(crate) kernel: Kernel,
    /// As the cubin has them, for `cuFuncGetAttribute`.
    pub(crate) registers: u32,
    pub(crate) local_bytes: u32,
}

/// The machine's compiler, loaded once.
fn compiler() -> Result<&'static Compiler, String> {
    static COMPILER: OnceLock<Result<Compiler, String>> = OnceLock::new();
    COMPILER.get_or_init(|| Compiler::new().map_err(|e| e.to_string())).as_ref().map_err(Clone::clone)
}

/// The name of the kernel in a cubin.
fn name_in(cubin: &[u8]) -> Result<String, String> {
    let elf = object::File::parse(cubin).map_err(|e| format!("the image is no cubin: {e}"))?;
    let names: Vec<String> = elf
        .sections()
        .filter_map(|s| Some(s.name().ok()?.strip_prefix(".text.")?.to_string()))
        .filter(|name| name.parse::<KernelSpec>().is_ok())
        .collect();
    match &names[..] {
        [name] => Ok(name.clone()),
        [] => Err("the cubin holds no kernel whose name is a spec".to_string()),
        several => Err(format!("the cubin holds several kernels: {}", several.join(", "))),
    }
}

/// Finds the text this cubin was made from, proves it by compiling it to the same cubin, and decodes its PTX.
///
/// # Errors
/// A text that gives another cubin (the emulator was built from other templates), or PTX that is not emulated.
pub(crate) fn load(cubin: &[u8]) -> Result<Module, String> {
    let name = name_in(cubin)?;
    let spec: KernelSpec = name.parse().map_err(|e| format!("{e}"))?;
    let source = dsv_codegen::render(&spec).map_err(|e| e.to_string())?;
    let compiler = compiler()?;
    for arch in [spec.arch().nvrtc_for(9, 0), Some(spec.arch().nvrtc())].into_iter().flatten() {
        let job = CompileJob { name: &name, source: &source, headers: dsv_codegen::HEADERS, arch };
        let compiled = compiler.compile(job).map_err(|e| e.to_string())?;
        if compiled.cubin != cubin {
            continue;
        }
        // Calls are not interpreted: a function that is kept out of line to save registers is inlined.
        let inlined = source.replace("__noinline__", "__forceinline__");
        let text = compiler.ptx(CompileJob { source: &inlined, ..job }).map_err(|e| e.to_string())?;
        let kernel =
            parse(&text).and_then(|text| decode(&text, &name)).map_err(|e| format!("{name}: {e}"))?;
        return Ok(Module {
            kernel,
            registers: compiled.report.registers,
            local_bytes: compiled.report.stack_bytes,
        });
    }
    Err(format!(
        "{name}: this cubin was not made from the templates the emulator was built with; build both anew: \
         tests/emulated.sh"
    ))
}
