//! Which kernel serves a problem, and why. Needs no GPU.

use crate::error::Error;
use crate::registry::Registry;
use crate::report::{Notice, Report};
use dsv_spec::{
    Arch, AttnOp, Deterministic, DispatchTable, Found, KernelSpec, Lists, Problem, TableEntry, TableError,
    space,
};
use std::path::PathBuf;

/// Where the dispatch table comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TableSource {
    /// The committed table for this GPU, by name.
    #[default]
    Committed,
    /// This file.
    File(PathBuf),
    /// No table: defaults, without a notice.
    None,
}

/// The GPU a dispatch is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its name as the driver gives it.
    pub name: String,
    /// Compute capability (major, minor).
    pub capability: (i32, i32),
    /// The architecture whose kernels are to serve.
    pub arch: Arch,
}

/// How a kernel was chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// The table's line for exactly this bucket.
    Exact(TableEntry),
    /// The table's nearest line of the same op, dtype, head_dim and block size.
    Nearest(TableEntry),
    /// The shipped default; the reason.
    Default(String),
}

/// Which kernel serves a problem, from which line of which table, and why. `Display` says it in a few lines.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The problem.
    pub problem: Problem,
    /// The kernel.
    pub kernel: KernelSpec,
    /// How it was chosen.
    pub choice: Choice,
    /// The table in use, and what it was measured with; absent when defaults serve everything.
    pub table: Option<String>,
    /// Whether the line's measurement was of another text than this version's.
    pub stale: bool,
}

impl std::fmt::Display for Explanation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let p = &self.problem;
        writeln!(f, "{}", describe(p))?;
        writeln!(
            f,
            "  batch {}, num_heads {}, num_kv_heads {}, seqlen_q {}, seqlen_kv {}, max_selected {} ({:.1} % skipped)",
            p.batch,
            p.num_heads,
            p.num_kv_heads,
            p.seqlen_q,
            p.seqlen_kv,
            p.max_selected,
            p.sparsity_percent()
        )?;
        writeln!(f, "  kernel: {}", self.kernel)?;
        let table = self.table.as_deref().unwrap_or("no table");
        let line = |entry: &TableEntry| {
            format!("seqlen {}, sparsity {} %", entry.bucket.seqlen, entry.bucket.sparsity)
        };
        let entry = match &self.choice {
            Choice::Exact(entry) => {
                write!(f, "  found: exact line ({}) of {table}", line(entry))?;
                entry
            }
            Choice::Nearest(entry) => {
                let bucket = p.bucket();
                write!(
                    f,
                    "  found: nearest line ({}) of {table}; it has none for seqlen {}, sparsity {} %",
                    line(entry),
                    bucket.seqlen,
                    bucket.sparsity
                )?;
                entry
            }
            Choice::Default(why) => return write!(f, "  found: shipped default, because {why}"),
        };
        write!(f, "\n  measured: {:.1} us, spread {:.1} us", entry.median_us, entry.spread_us)?;
        if let Some(runner_up) = entry.runner_up_us {
            write!(f, ", runner-up {runner_up:.1} us")?;
        }
        write!(f, ", {} tried, {} failed", entry.tried, entry.failed)?;
        if self.stale {
            write!(
                f,
                "\n  stale: its text has changed since it was measured; to measure again: dsv-autotune"
            )?;
        }
        Ok(())
    }
}

/// The axes a kernel is chosen by, in words.
fn describe(p: &Problem) -> String {
    let lists = match p.lists {
        Lists::Dense => "dense".to_string(),
        Lists::Blocks { query_group, kv_block } => format!("query_group {query_group}, kv_block {kv_block}"),
    };
    let deterministic = if p.deterministic == Deterministic::Yes { ", deterministic" } else { "" };
    format!("{}, {}, head_dim {}, {lists}{deterministic}", p.op, p.dtype, p.head_dim)
}

/// The table of one GPU, or the reason why there is none, and the kernels it may name.
pub struct Dispatch {
    gpu: Gpu,
    registry: Registry,
    table: Result<(String, DispatchTable), String>,
}

impl Dispatch {
    /// Loads the table for a GPU. A table that is corrupt, or of another GPU or architecture, is refused: the
    /// runtime goes on with defaults, reports it here once with all its problems, and [`Dispatch::explain`] repeats
    /// why.
    pub fn new(gpu: Gpu, source: &TableSource, registry: Registry, report: &Report) -> Dispatch {
        let table = match source {
            TableSource::None => Err("no table was asked for".to_string()),
            TableSource::File(path) => {
                let origin = path.display().to_string();
                std::fs::read_to_string(path)
                    .map_err(|e| TableError {
                        origin: origin.clone(),
                        problems: vec![format!("it cannot be read: {e}")],
                    })
                    .and_then(|json| checked(origin, &json, &gpu))
                    .map_err(|error| refused(error, report))
            }
            TableSource::Committed => committed(&gpu, &registry, report),
        };
        Dispatch { gpu, registry, table }
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The table in use.
    pub fn table(&self) -> Option<&DispatchTable> {
        self.table.as_ref().ok().map(|(_, table)| table)
    }

    /// Which kernel serves a problem, and why.
    ///
    /// # Errors
    /// [`Error::NoKernel`]: neither the table nor the shipped defaults serve it; the values available on each axis
    /// that does not fit, and the next command.
    pub fn explain(&self, problem: &Problem) -> Result<Explanation, Error> {
        let mut why = match (&self.table, problem.op) {
            (_, op) if op.is_of_any_lists() => "the backward's helpers are not tuned".to_string(),
            (Err(reason), _) => reason.clone(),
            (Ok((origin, table)), _) => {
                let (choice, entry) = match table.lookup(problem) {
                    Found::Exact(entry) => (Choice::Exact(entry.clone()), Some(entry)),
                    Found::Nearest(entry) => (Choice::Nearest(entry.clone()), Some(entry)),
                    Found::Nothing => (Choice::Default(String::new()), None),
                };
                match entry {
                    None => format!("{origin} has no line for this op, dtype, head_dim and block size"),
                    Some(entry) => {
                        let name = entry.kernel.name();
                        match self.registry.kernel(&name) {
                            Some(text) => {
                                return Ok(Explanation {
                                    problem: *problem,
                                    kernel: entry.kernel,
                                    choice,
                                    table: Some(self.describe_table(origin, table)),
                                    stale: text.source_hash != entry.source_hash,
                                });
                            }
                            None => format!(
                                "{origin} names {name}, whose text is not committed (to commit it: dsv-codegen --arch {})",
                                self.gpu.arch
                            ),
                        }
                    }
                }
            }
        };
        let Problem { op, dtype, head_dim, lists, deterministic, .. } = *problem;
        let default = space::default_attn(op, dtype, head_dim, lists, deterministic, self.gpu.arch);
        let Some(kernel) = default.map(KernelSpec::Attn) else { return Err(self.no_kernel(problem)) };
        if self.registry.kernel(&kernel.name()).is_none() {
            return Err(self.no_kernel(problem));
        }
        if why.is_empty() {
            why = "no table answers".to_string();
        }
        let table = self.table.as_ref().ok().map(|(origin, table)| self.describe_table(origin, table));
        Ok(Explanation { problem: *problem, kernel, choice: Choice::Default(why), table, stale: false })
    }

    fn describe_table(&self, origin: &str, table: &DispatchTable) -> String {
        let meta = &table.meta;
        format!("{origin} ({}, {}, driver {}, NVRTC {})", meta.gpu, meta.date, meta.driver, meta.compiler)
    }

    fn no_kernel(&self, p: &Problem) -> Error {
        let arch = self.gpu.arch;
        let mut text = format!("no kernel for {} on {arch}", describe(p));
        let mut explained = false;
        let mut line = |what: &str, available: String, fix: String| {
            text += &format!("\n  {what} available: {available}");
            if !fix.is_empty() {
                text += &format!("\n  to add it: {fix}, then dsv-codegen --arch {arch}");
            }
            explained = true;
        };
        let list = |items: Vec<String>| items.join(", ");
        let space_rs = "(codegen/spec/src/space.rs)";
        if arch == Arch::Sm80 && p.op != AttnOp::Fwd && p.deterministic == Deterministic::Yes {
            line("deterministic", "nondet on sm80, det on sm90a".into(), String::new());
        }
        let gather = p.lists.is_gather();
        if gather && arch == Arch::Sm80 {
            line("kv_block", "64, 128 or dense on sm80, 1, 8 and 16 on sm90a".into(), String::new());
        }
        if gather && p.op == AttnOp::Bwd && p.deterministic == Deterministic::Yes {
            line("deterministic", "nondet with kv_block below 64".into(), String::new());
        }
        if !space::SHIPPED_DTYPES.contains(&p.dtype) {
            let available = list(space::SHIPPED_DTYPES.iter().map(|d| d.to_string()).collect());
            line("dtype", available, format!("put {} in SHIPPED_DTYPES {space_rs}", p.dtype));
        }
        if gather && !space::SHIPPED_GATHER_HEAD_DIMS.contains(&p.head_dim) {
            let available = list(space::SHIPPED_GATHER_HEAD_DIMS.iter().map(|d| d.to_string()).collect());
            line(
                "head_dim with kv_block below 64",
                available,
                format!("put {} in SHIPPED_GATHER_HEAD_DIMS {space_rs}", p.head_dim),
            );
        } else if !space::shipped_head_dims(arch).any(|d| d == p.head_dim) {
            let available = list(space::shipped_head_dims(arch).map(|d| d.to_string()).collect());
            line("head_dim", available, space::how_to_add_head_dim(p.head_dim, arch));
        }
        let (query_group, kv_block) = p.lists.block_size();
        let (shipped, constant) = space::shipped_sizes(p.lists);
        if !p.lists.is_dense() && !shipped.contains(&(query_group, kv_block)) {
            let available = list(shipped.iter().map(|b| format!("{b:?}")).collect());
            line(
                "(query_group, kv_block)",
                format!("dense, {available}"),
                format!("put ({query_group}, {kv_block}) in {constant} {space_rs}"),
            );
        }
        if !explained {
            text += &format!(
                "\n  its default is not in generated/registry.rs\n  to write it: dsv-codegen --arch {arch}"
            );
        }
        Error::NoKernel(text)
    }
}

fn checked(origin: String, json: &str, gpu: &Gpu) -> Result<(String, DispatchTable), TableError> {
    let table = DispatchTable::from_json(&origin, json)?;
    table.check_gpu(&origin, &gpu.name, gpu.capability.0, gpu.capability.1)?;
    if table.meta.arch != gpu.arch {
        let problem =
            format!("its kernels are for {}, those of {} were asked for", table.meta.arch, gpu.arch);
        return Err(TableError { origin, problems: vec![problem] });
    }
    Ok((origin, table))
}

fn refused(error: TableError, report: &Report) -> String {
    let reason = format!("{} was refused: {}", error.origin, error.problems.join("; "));
    report(&Notice::TableRefused(error));
    reason
}

/// The committed table whose metadata names this GPU.
fn committed(gpu: &Gpu, registry: &Registry, report: &Report) -> Result<(String, DispatchTable), String> {
    // The names are read apart from the rest, so that a corrupt table of this GPU is reported, and one of another GPU
    // is not.
    let gpu_of = |json: &str| {
        let value: serde_json::Value = serde_json::from_str(json).ok()?;
        Some(value.get("meta")?.get("gpu")?.as_str()?.to_string())
    };
    let named: Vec<(&str, &str, Option<String>)> =
        registry.tables.iter().map(|(file, json)| (*file, *json, gpu_of(json))).collect();
    let of_this = named.iter().find(|(_, _, name)| name.as_deref() == Some(&gpu.name));
    if let Some((file, json, _)) = of_this.or_else(|| named.iter().find(|(_, _, name)| name.is_none())) {
        return checked(format!("generated/tables/{file}"), json, gpu)
            .map_err(|error| refused(error, report));
    }
    let available = named.into_iter().filter_map(|(_, _, name)| name).collect();
    report(&Notice::NoTable { gpu: gpu.name.clone(), available });
    Err(format!("there is no committed table for '{}' (to make one: dsv-autotune)", gpu.name))
}
