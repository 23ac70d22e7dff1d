//! Every way the runtime can fail, each with the next command.

use dsv_compile::CompileError;
use dsv_spec::params::error_bits;
use std::path::PathBuf;

/// Why something could not be opened, loaded, planned or launched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No CUDA driver on this machine.
    #[error(
        "no CUDA driver: libcuda.so.1 was not found on this machine\n  needed: an NVIDIA GPU with its driver, 580 or newer\n  to see whether there is one: nvidia-smi\n  without a GPU every op runs on the CPU in dsv-reference: cargo test --release -p dsv-reference"
    )]
    NoDriver,
    /// A driver without calls this crate makes.
    #[error(
        "the driver serves CUDA {}.{} only\n  needed: 12.8, driver 570 or newer; 580 or newer for cubins of NVRTC 13\n  to see the driver: nvidia-smi",
        cuda_version / 1000, cuda_version % 1000 / 10
    )]
    OldDriver {
        /// Newest CUDA version the driver serves, for example 12040.
        cuda_version: i32,
    },
    /// The driver is there, the GPU is not.
    #[error(
        "GPU {ordinal} does not exist: the driver shows {count}\n  allowed: {}\n  to list them: nvidia-smi -L (CUDA_VISIBLE_DEVICES hides some)",
        ordinals(*count)
    )]
    NoSuchGpu {
        /// What was asked for.
        ordinal: usize,
        /// GPUs there are.
        count: usize,
    },
    /// A GPU no kernel is written for.
    #[error(
        "'{gpu}' has compute capability {}.{}, for which no kernel is written\n  compute capabilities available: 9.0, 8.x (no deterministic backward, not the trainer's kernels)\n  to see the kernels: dsv-codegen list",
        capability.0, capability.1
    )]
    UnsupportedGpu {
        /// The GPU's name.
        gpu: String,
        /// Its compute capability.
        capability: (i32, i32),
    },
    /// Kernels of an architecture whose instructions the GPU lacks.
    #[error(
        "kernels of {arch} do not run on '{gpu}' (compute capability {}.{})\n  architectures available there: {}",
        capability.0, capability.1, architectures(*capability)
    )]
    Architecture {
        /// The architecture.
        arch: dsv_spec::Arch,
        /// The GPU's name.
        gpu: String,
        /// Its compute capability.
        capability: (i32, i32),
    },
    /// The driver refused a call.
    #[error("{call}: {name} ({code}): {text}{}", hint(*code))]
    Driver {
        /// The call, with what it was about.
        call: String,
        /// `CUresult`.
        code: i32,
        /// Its name.
        name: String,
        /// The driver's words.
        text: String,
    },
    /// No shipped kernel serves a problem.
    #[error("{0}")]
    NoKernel(String),
    /// A kernel without a text.
    #[error(
        "kernel {name} is not in this version's registry\n  to see the committed kernels: dsv-codegen list\n  to commit it: put it into a table under generated/tables or into shipped() (codegen/spec/src/space.rs), then dsv-codegen --arch {arch}"
    )]
    NoText {
        /// The kernel.
        name: String,
        /// Its architecture.
        arch: dsv_spec::Arch,
    },
    /// A bundle that cannot be used, with every problem found in it.
    #[error(
        "the cubin bundle {} cannot be used:\n  {}\n  to make one from this version: dsv-codegen build --out {}",
        dir.display(), problems.join("\n  "), dir.display()
    )]
    Bundle {
        /// Its directory.
        dir: PathBuf,
        /// Every problem.
        problems: Vec<String>,
    },
    /// Compiling a committed text on this machine failed.
    #[error("kernel {name} has no cubin in a bundle and cannot be compiled here: {source}")]
    Compile {
        /// The kernel.
        name: String,
        /// Why.
        source: Box<CompileError>,
    },
    /// Shapes, strides or list widths that no launch can take, with every problem.
    #[error("{what} cannot be planned:\n  {}", problems.join("\n  "))]
    Plan {
        /// What was planned.
        what: String,
        /// Every problem: the value, what is allowed.
        problems: Vec<String>,
    },
    /// An address or an argument of a launch.
    #[error("{kernel}: {what} is {value}\n  allowed: {allowed}")]
    Argument {
        /// The kernel or plan.
        kernel: String,
        /// The argument.
        what: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        allowed: String,
    },
}

fn ordinals(count: usize) -> String {
    match count {
        0 => "none".to_string(),
        1 => "0".to_string(),
        n => format!("0 to {}", n - 1),
    }
}

/// The architectures whose texts a GPU of this compute capability can be given.
fn architectures((major, minor): (i32, i32)) -> String {
    let here = |arch: &&dsv_spec::Arch| arch.nvrtc_for(major, minor).is_some();
    dsv_spec::Arch::ALL.iter().filter(here).map(|arch| arch.name()).collect::<Vec<_>>().join(", ")
}

/// The next command for the driver's codes a user meets.
fn hint(code: i32) -> &'static str {
    match code {
        2 => {
            "\n  to see what takes the memory: nvidia-smi; to see what a problem needs: dsv_runtime::MemoryNeeded"
        }
        100 | 101 => "\n  to list the GPUs: nvidia-smi -L",
        200 | 209 | 218 | 222 => {
            "\n  the cubin does not suit this driver or GPU: dsv-codegen build --out DIR with an NVRTC no newer than the driver"
        }
        700 | 716 | 719 => "\n  to find the access: compute-sanitizer --tool memcheck <the command>",
        701 => "\n  the launch asks for more registers or shared memory than the GPU has",
        _ => "",
    }
}

/// What kernels raised in the device error flag (contract: they clamp what they read, go on, and raise a bit).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device error flag is {flag}:\n  {}", problems.join("\n  "))]
pub struct FlagError {
    /// The flag: an OR of [`error_bits`].
    pub flag: i32,
    /// One line a bit: what was wrong, what the kernels did, what is allowed.
    pub problems: Vec<&'static str>,
}

/// Reads the device error flag, at the caller's next natural synchronisation.
///
/// # Errors
/// One line for each bit that is set.
pub fn decode_error_flag(flag: i32) -> Result<(), FlagError> {
    const TEXTS: [(i32, &str); 5] = [
        (
            error_bits::INDEX_OUT_OF_RANGE,
            "a list names a KV block outside the sequence; kernels skipped or clamped it; allowed: 0 to N - 1, \
             N = ceil(seqlen_kv / kv_block)",
        ),
        (
            error_bits::COUNT_OUT_OF_RANGE,
            "a count is negative or larger than max_selected; kernels clamped it; allowed: 0 to max_selected",
        ),
        (
            error_bits::LIST_NOT_ASCENDING,
            "a list is not ascending and unique; a key seen twice counts twice; to find it: Runtime::lists, then \
             ListPlan::validate on each producer of lists",
        ),
        (
            error_bits::SCORE_IS_NAN,
            "a selection score, or a logit of a profiled query, is NaN; in a selection it ranked last; look for NaN in the (low-rank) queries and keys",
        ),
        (
            error_bits::TOP_K_OUT_OF_RANGE,
            "a top-k or top-p budget is out of range; kernels clamped it; allowed: 0 to the smaller of max_selected and the number of KV units, or a share of 0 to 1",
        ),
    ];
    if flag == 0 {
        return Ok(());
    }
    let mut problems: Vec<&'static str> =
        TEXTS.iter().filter(|(bit, _)| flag & bit != 0).map(|(_, text)| *text).collect();
    if flag & !TEXTS.iter().fold(0, |all, (bit, _)| all | bit) != 0 {
        problems.push(
            "it has bits no kernel raises: the flag was not set to 0 before the launch, or overwritten",
        );
    }
    Err(FlagError { flag, problems })
}
