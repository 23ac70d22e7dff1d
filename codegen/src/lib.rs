//! Owns the way from a [`KernelSpec`] to CUDA text, and the committed tree of such texts under `generated/`.
//! It must never know a driver or a GPU, and rendering must never know a clock or the environment: one spec has one
//! text, everywhere.
//! Start with [`render`]; [`Tree`] is what `dsv-codegen --arch sm90` writes and `dsv-codegen check` compares.
//!
//! # In a build script
//! A trainer that wants kernels of its own, beside those that dsv-runtime carries, renders them while it is built:
//!
//! ```no_run
//! // build.rs
//! use dsv_codegen::{Tree, attention};
//! use dsv_codegen::spec::{Arch, Dtype, Lists};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let lists = Lists::Blocks { query_group: 128, kv_block: 128 };
//!     let specs = attention(Dtype::Bf16, 128, lists, Arch::Sm90a)?;
//!     Tree::of(&specs)?.write(std::path::Path::new(&std::env::var("OUT_DIR")?))?;
//!     Ok(())
//! }
//! ```
//!
//! and includes the registry, whose paths are relative to itself:
//!
//! ```ignore
//! mod kernels { include!(concat!(env!("OUT_DIR"), "/registry.rs")); }
//! // kernels::KERNELS: name, source, source_hash; kernels::HEADERS: what NVRTC is given beside a source.
//! ```

mod bundle;
mod context;
mod error;
mod registry;
mod templates;
mod tree;

use dsv_spec::{Arch, AttnOp, Dtype, KernelSpec, Lists, space};

pub use bundle::build_bundle;
pub use dsv_spec as spec;
pub use error::CodegenError;
pub use templates::{HEADERS, render, source_hash, template_name, template_path};
pub use tree::{COMMITTED_ARCHES, Tree, Written, committed_specs};

/// The shipped kernels of attention, forward and backward, for one (dtype, head_dim, block size): the defaults that
/// serve where no table answers, deterministic forms included where the architecture has them. Sorted by name.
///
/// # Errors
/// [`CodegenError::NoKernel`] names each axis that is not shipped, what is, and how to add it.
pub fn attention(
    dtype: Dtype,
    head_dim: u16,
    lists: Lists,
    arch: Arch,
) -> Result<Vec<KernelSpec>, CodegenError> {
    // On sm80 dQ is always accumulated; of small KV units dK and dV are, and nothing else.
    let needed = |op: AttnOp| match op {
        AttnOp::BwdPostKv => lists.is_gather(),
        AttnOp::BwdPost => !lists.is_gather(),
        AttnOp::BwdDq => !lists.is_gather() && arch != Arch::Sm80,
        AttnOp::Fwd | AttnOp::BwdPrep | AttnOp::Bwd => true,
    };
    let asked = |spec: &KernelSpec| match spec {
        KernelSpec::Attn(s) => {
            let listed = s.op().is_of_any_lists() || s.lists() == lists;
            (s.dtype(), s.head_dim()) == (dtype, head_dim) && listed && needed(s.op())
        }
        _ => false,
    };
    let specs: Vec<KernelSpec> = space::shipped(arch).into_iter().filter(asked).collect();
    let missing = |op: &&AttnOp| !specs.iter().any(|spec| spec.op() == op.name());
    match AttnOp::ALL.iter().filter(|op| needed(**op)).find(missing) {
        None => Ok(specs),
        Some(&op) => Err(error::no_kernel(op, dtype, head_dim, lists, arch)),
    }
}
