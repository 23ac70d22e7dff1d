//! What the runtime promises on a machine without a GPU: clean errors, explanations, plan checks and sizes.

mod bundle;
mod dispatch;
mod errors;
mod plans;

use dsv_runtime::{KernelText, Registry};
use dsv_spec::{Arch, AttnOp, Deterministic, Dtype, KernelSpec, Lists, Problem, space};

/// A registry of the shipped names with made-up texts: what these tests assert does not depend on the texts.
fn registry(tables: &[(&'static str, &'static str)]) -> Registry {
    let kernels: Vec<KernelText> = space::shipped(Arch::Sm90a)
        .iter()
        .map(|spec| {
            let name: &'static str = spec.name().leak();
            KernelText { name, source: "", source_hash: format!("hash of {name}").leak() }
        })
        .collect();
    Registry { kernels: kernels.leak(), headers: &[], tables: tables.to_vec().leak() }
}

/// 90 % sparse video attention of 32k tokens in blocks of (64, 64).
fn problem() -> Problem {
    Problem {
        op: AttnOp::Bwd,
        dtype: Dtype::Bf16,
        head_dim: 128,
        lists: Lists::Blocks { query_group: 64, kv_block: 64 },
        batch: 1,
        num_heads: 16,
        num_kv_heads: 16,
        seqlen_q: 32_768,
        seqlen_kv: 32_768,
        max_selected: 51,
        deterministic: Deterministic::No,
    }
}

/// The shipped default of a problem.
fn default_kernel(p: &Problem) -> KernelSpec {
    KernelSpec::Attn(
        space::default_attn(p.op, p.dtype, p.head_dim, p.lists, p.deterministic, Arch::Sm90a).unwrap(),
    )
}
