//! Every way compiling can fail, each with the next command.

use std::path::PathBuf;

/// Why there is no cubin, or none that may ship.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// NVRTC is nowhere.
    #[error(
        "NVRTC, NVIDIA's run-time compiler, was not found\n  looked in: {}\n  to fetch it into this checkout: cargo run --release --bin dsv-codegen -- fetch-nvrtc\n  or name it: DSV_NVRTC=/path/to/libnvrtc.so.13",
        tried.join("\n             ")
    )]
    NoNvrtc {
        /// Places looked at, in order.
        tried: Vec<String>,
    },
    /// A library is there but cannot be used.
    #[error(
        "NVRTC at {library} cannot be used: {why}\n  needed: CUDA 12.3 or newer, with libnvrtc-builtins beside it\n  to fetch one that works: cargo run --release --bin dsv-codegen -- fetch-nvrtc, then unset DSV_NVRTC"
    )]
    Load {
        /// The library.
        library: String,
        /// The loader's or NVRTC's own words.
        why: String,
    },
    /// Fetching the wheels failed.
    #[error(
        "cannot fetch NVRTC into {}: {why}\n  needed: python3 with pip and a package index\n  or name an installed one: DSV_NVRTC=/path/to/libnvrtc.so.13",
        into.display()
    )]
    Fetch {
        /// Target directory.
        into: PathBuf,
        /// What pip said.
        why: String,
    },
    /// Not an architecture.
    #[error("{arch} is not an architecture\n  allowed: sm90a, sm80 and the like (or sm_90a, sm_80)")]
    Arch {
        /// What was given.
        arch: String,
    },
    /// The text does not compile.
    #[error("{name} does not compile with NVRTC {compiler}\n  text: {}\n{log}", source_path.display())]
    Rejected {
        /// Kernel.
        name: String,
        /// NVRTC's version.
        compiler: String,
        /// Where the text was kept.
        source_path: PathBuf,
        /// NVRTC's log.
        log: String,
    },
    /// The log or the cubin could not be understood, or they contradict each other.
    #[error(
        "no resource report for {name}: {what}\n  this is a defect of dsv-compile or a new log format of NVRTC"
    )]
    Report {
        /// Kernel.
        name: String,
        /// What was wrong.
        what: String,
    },
    /// `(C75..)` notes.
    #[error(
        "{name}: the compiler changed what the kernel asks of the tensor cores\n  {notes}\n  allowed: no (C75..) note; wgmma must not be serialised, nor setmaxnreg ignored (it needs __launch_bounds__(n, 1))"
    )]
    Notes {
        /// Kernel.
        name: String,
        /// The notes.
        notes: String,
    },
    /// Warnings.
    #[error("{name}: the compiler warns\n  {warnings}\n  allowed: no warning in a shipped kernel")]
    Warnings {
        /// Kernel.
        name: String,
        /// The warnings.
        warnings: String,
    },
    /// Spills that nobody listed.
    #[error(
        "{name}: {entry} spills {bytes} bytes at {registers} registers\n  allowed: {allowed} bytes\n  to allow it, give the reason: add \"{name} {bytes}  # why\" to codegen/spills.txt; otherwise choose a smaller tile"
    )]
    Spills {
        /// Kernel.
        name: String,
        /// Symbol within the file.
        entry: String,
        /// Larger of the bytes stored and loaded.
        bytes: u32,
        /// What the list allows.
        allowed: u32,
        /// Registers a thread.
        registers: u32,
    },
    /// The list of allowed spills cannot be read.
    #[error(
        "line {line} of the spill list is \"{text}\"\n  allowed: <kernel name> <bytes>  # why, one kernel a line"
    )]
    SpillLine {
        /// 1-based line.
        line: usize,
        /// Its text.
        text: String,
    },
    /// The cache cannot be written.
    #[error("the cache cannot be written: {}: {why}\n  choose another directory, or free some space", path.display())]
    Cache {
        /// File or directory.
        path: PathBuf,
        /// The system's words.
        why: std::io::Error,
    },
    /// nvdisasm is nowhere, or fails.
    #[error(
        "cannot disassemble: {why}\n  needed: nvdisasm, on PATH or named by DSV_NVDISASM\n  to fetch it into this checkout: cargo run --release --bin dsv-codegen -- fetch-nvrtc"
    )]
    Sass {
        /// What was wrong.
        why: String,
    },
}
