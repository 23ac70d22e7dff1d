//! The shared vocabulary of DSV: specs, their names and derived facts, problems, the dispatch table, tuning
//! records, launch parameters and the token order of the data contract.
//! It must never know a driver, a compiler, a template or a clock: everything here is a value or a pure function.
//! Start with [`KernelSpec`], then [`Facts`], then [`DispatchTable`].

mod attn;
mod error;
mod facts;
mod lists;
mod name;
pub mod order;
pub mod params;
mod pointwise;
mod problem;
mod record;
mod select;
pub mod space;
mod table;
mod types;

pub use attn::{AttnOp, AttnSpec, AttnTile, HEAD_DIMS, Lists, Schedule, Sparsity};
pub use error::{NameError, SpecError, TableError};
pub use facts::{Facts, limits};
pub use lists::{ListOp, ListSpec};
pub use pointwise::{PointwiseOp, PointwiseSpec};
pub use problem::{Bucket, Problem, SEQLEN_BUCKETS, SPARSITY_BUCKETS};
pub use record::{Outcome, Timing, TuneRecord};
pub use select::{BlockScore, Budget, GroupRule, RANKS, SelectOp, SelectSpec, SelectTile};
pub use table::{Crossover, DispatchTable, Found, SCHEMA, TableEntry, TableMeta};
pub use types::{Arch, Deterministic, Dtype};

use serde::{Deserialize, Serialize};

/// Everything baked into one kernel's source, and nothing else.
///
/// A value of this type names exactly one CUDA text; [`std::fmt::Display`] prints the kernel's name, which is also
/// its `extern "C"` symbol, its file stem, its value in the dispatch table and its key in the registry.
/// `FromStr` accepts exactly what `Display` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum KernelSpec {
    /// Attention, forward or one of the backward's kernels.
    Attn(AttnSpec),
    /// Critical-KV selection.
    Select(SelectSpec),
    /// Inversion and validation of KV lists.
    List(ListSpec),
    /// The trainer's elementwise and row-wise kernels.
    Pointwise(PointwiseSpec),
}

impl KernelSpec {
    /// The op's name: folder under `generated/kernels` and stem of the template.
    pub fn op(&self) -> &'static str {
        match self {
            KernelSpec::Attn(s) => s.op().name(),
            KernelSpec::Select(s) => s.op().name(),
            KernelSpec::List(s) => s.op.name(),
            KernelSpec::Pointwise(s) => s.op.name(),
        }
    }

    /// The architecture the text is written for.
    pub fn arch(&self) -> Arch {
        match self {
            KernelSpec::Attn(s) => s.arch(),
            KernelSpec::Select(s) => s.arch(),
            KernelSpec::List(s) => s.arch,
            KernelSpec::Pointwise(s) => s.arch,
        }
    }

    /// Every derived number, once.
    pub fn facts(&self) -> Facts {
        Facts::of(self)
    }

    /// The kernel's name. Same as `to_string`.
    pub fn name(&self) -> String {
        self.to_string()
    }
}

impl From<KernelSpec> for String {
    fn from(spec: KernelSpec) -> String {
        spec.to_string()
    }
}

impl TryFrom<String> for KernelSpec {
    type Error = NameError;
    fn try_from(name: String) -> Result<Self, NameError> {
        name.parse()
    }
}
