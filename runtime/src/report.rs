//! What the runtime tells its caller beside results and errors: never printed here.

use dsv_spec::TableError;
use std::path::PathBuf;
use std::sync::Arc;

/// Receives each [`Notice`] once. Show it, log it, or assert on it.
pub type Report = Arc<dyn Fn(&Notice) + Send + Sync>;

/// A report nobody reads.
pub fn silent() -> Report {
    Arc::new(|_| {})
}

/// Something the user should know, though the runtime goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A dispatch table was refused; defaults serve.
    TableRefused(TableError),
    /// No table is for this GPU; defaults serve.
    NoTable {
        /// This GPU.
        gpu: String,
        /// GPUs there are tables for.
        available: Vec<String>,
    },
    /// A bundle, or a kernel of it, cannot be loaded; it is compiled on this machine. The text of
    /// [`crate::Error::Bundle`].
    BundleRefused(String),
    /// The first kernel that had to be compiled on this machine.
    CompilingHere {
        /// The kernel.
        kernel: String,
        /// NVRTC's version.
        compiler: String,
        /// The bundle that lacks it, if one is in use.
        bundle: Option<PathBuf>,
    },
    /// This machine's compiler made a kernel slower than it should be.
    CompilerComplains {
        /// The kernel.
        kernel: String,
        /// NVRTC's version.
        compiler: String,
        /// Bytes a thread spills.
        spilled: u32,
        /// `(C75..)` lines.
        notes: Vec<String>,
    },
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Notice::TableRefused(error) => {
                write!(f, "WARNING: running with default kernels, which may be slower: {error}")
            }
            Notice::NoTable { gpu, available } => {
                let available = if available.is_empty() { "none".to_string() } else { available.join(", ") };
                write!(
                    f,
                    "WARNING: running with default kernels, which may be slower: no dispatch table for '{gpu}'\n  \
                     tables available: {available}\n  to make one for this GPU: dsv-autotune"
                )
            }
            Notice::BundleRefused(why) => {
                write!(f, "WARNING: compiling kernels on this machine instead: {why}")
            }
            Notice::CompilingHere { kernel, compiler, bundle } => {
                let why = match bundle {
                    Some(dir) => format!("the bundle {} lacks {kernel}", dir.display()),
                    None => format!("no cubin bundle is in use ({kernel} is the first)"),
                };
                write!(
                    f,
                    "compiling kernels on this machine with NVRTC {compiler}: {why}\n  to compile them once, ahead: \
                     dsv-codegen build --out DIR"
                )
            }
            Notice::CompilerComplains { kernel, compiler, spilled, notes } => {
                write!(f, "WARNING: NVRTC {compiler} made {kernel} slower than it should be: ")?;
                write!(f, "{spilled} bytes spilled")?;
                for note in notes {
                    write!(f, "\n  {note}")?;
                }
                write!(f, "\n  to ship cubins of a known compiler: dsv-codegen build --out DIR")
            }
        }
    }
}
