//! Every way generating can fail, each with the next command.

use std::fmt::Display;
use std::path::PathBuf;

use dsv_compile::CompileError;
use dsv_spec::{Arch, AttnOp, Dtype, Lists, NameError, TableError, space};

/// Why there is no text, tree or bundle.
#[derive(Debug, thiserror::Error)]
pub enum CodegenError {
    /// Nothing shipped serves these axes.
    #[error("no kernel for {asked}\n{}", axes.join("\n"))]
    NoKernel {
        /// The axes, in prose.
        asked: String,
        /// For each axis at fault: what is available, and how to add what was asked.
        axes: Vec<String>,
    },
    /// Not a kernel's name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// An architecture with no committed kernels.
    #[error(
        "no kernels are shipped for '{arch}'\n  arch available: {}\n  to write them: dsv-codegen --arch sm90",
        available.join(", ")
    )]
    Arch {
        /// What was asked.
        arch: String,
        /// What there is.
        available: Vec<String>,
    },
    /// The op has no template.
    #[error(
        "no template for {op}\n  templates available: {}\n  to add it: write templates/kernels/{op}.cu.tera, then dsv-codegen --arch sm90",
        available.join(", ")
    )]
    NoTemplate {
        /// The op.
        op: String,
        /// Ops with a template.
        available: Vec<String>,
    },
    /// A template does not parse, or names something its spec does not have.
    #[error(
        "templates/kernels/{op}.cu.tera cannot be rendered for {name}\n{report}\n  to give a template another variable: codegen/src/context.rs"
    )]
    Template {
        /// The op.
        op: String,
        /// The kernel.
        name: String,
        /// Tera's report, with line and column.
        report: String,
    },
    /// A file cannot be read or written.
    #[error(
        "cannot {what} {}: {why}\n  allowed: a checkout this user can write; to name another: --root DIR",
        path.display()
    )]
    Io {
        /// `read` or `write`.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's words.
        why: std::io::Error,
    },
    /// The tree on disk is not what the specs and templates say.
    #[error("{} is not what the specs and templates say\n{}\n  to make it so: dsv-codegen --arch sm90", dir.display(), problems.join("\n"))]
    Stale {
        /// The tree.
        dir: PathBuf,
        /// One line per file: missing, extra or different.
        problems: Vec<String>,
    },
    /// A committed table cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A kernel does not compile, or may not ship.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

impl CodegenError {
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> CodegenError {
        let path = path.into();
        move |why| CodegenError::Io { what, path, why }
    }
}

fn joined<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

/// The error for axes nothing shipped serves.
pub(crate) fn no_kernel(op: AttnOp, dtype: Dtype, head_dim: u16, lists: Lists, arch: Arch) -> CodegenError {
    let space_rs = "codegen/spec/src/space.rs";
    let then = "then dsv-codegen --arch sm90";
    let (query_group, kv_block) = lists.block_size();
    let size = match lists {
        Lists::Dense => "dense".to_owned(),
        Lists::Blocks { .. } => format!("query_group {query_group}, kv_block {kv_block}"),
    };
    let mut axes = Vec::new();
    let mut axis = |what: &str, available: String, fix: String| {
        axes.push(format!("  {what} available: {available}\n  to add it: {fix}, {then}"));
    };
    let listed = |value: String, list: &str| format!("put {value} in {list} ({space_rs})");
    if !space::shipped_head_dims(arch).any(|d| d == head_dim) {
        let available = joined(space::shipped_head_dims(arch));
        axis("head_dim", available, space::how_to_add_head_dim(head_dim, arch));
    }
    if !space::SHIPPED_DTYPES.contains(&dtype) {
        axis("dtype", joined(space::SHIPPED_DTYPES), listed(dtype.to_string(), "SHIPPED_DTYPES"));
    }
    let (shipped, list) = space::shipped_sizes(lists);
    if !lists.is_dense() && !shipped.contains(&(query_group, kv_block)) {
        let sizes = shipped.iter().map(|(query_group, kv_block)| format!("({query_group}, {kv_block})"));
        axis(
            "(query_group, kv_block)",
            joined(["dense".to_owned()].into_iter().chain(sizes)),
            listed(format!("({query_group}, {kv_block})"), list),
        );
    }
    if axes.is_empty() {
        axes.push(format!(
            "  arch available: {}\n  to add it: give {op} a feasible tile for {arch} in candidates ({space_rs}), {then}",
            joined(crate::COMMITTED_ARCHES)
        ));
    }
    CodegenError::NoKernel { asked: format!("{op}, {dtype}, head_dim {head_dim}, {size} on {arch}"), axes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_axes_without_a_tile_name_the_place_to_add_one() {
        let error = no_kernel(AttnOp::BwdDq, Dtype::Bf16, 128, Lists::Dense, Arch::Sm80).to_string();
        assert!(error.contains("arch available: sm80, sm90a"), "{error}");
        assert!(error.contains("give attn_bwd_dq a feasible tile for sm80 in candidates"), "{error}");
    }
}
