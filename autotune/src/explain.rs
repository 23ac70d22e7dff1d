//! Which kernel serves a problem, from which line of which table, and what it costs: the runtime's own answer, with
//! or without a GPU.

use crate::error::TuneError;
use crate::listgen::ListKind;
use crate::plan::{Case, DTYPE, parse_block};
use dsv_runtime::{Device, Dispatch, Error, Gpu, MemoryNeeded, Registry, Report, TableSource};
use dsv_spec::{Arch, AttnOp, Deterministic, DispatchTable, Lists, Problem, TableError};
use std::fmt::Write as _;
use std::path::Path;

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Columns of Q, K, V.
    pub head_dim: u16,
    /// Tokens.
    pub seqlen: u32,
    /// Heads.
    pub num_heads: u32,
    /// Sequences.
    pub batch: u32,
    /// `dense`, or `QUERY_GROUPxKV_BLOCK`.
    pub block: String,
    /// Share of the KV blocks kept, 0 to 1.
    pub keep: f64,
    /// Whether results must be the same bits every time.
    pub deterministic: bool,
}

impl Question {
    fn problem(&self) -> Result<Problem, TuneError> {
        if !(self.keep > 0.0 && self.keep <= 1.0) {
            return Err(TuneError::option("--keep", self.keep, "above 0, at most 1"));
        }
        for (what, value) in [("--seqlen", self.seqlen), ("--heads", self.num_heads), ("--batch", self.batch)]
        {
            if value == 0 {
                return Err(TuneError::option(what, value, "1 or more"));
            }
        }
        let case = match parse_block(&self.block)? {
            None => Case::dense(self.head_dim, self.num_heads, self.seqlen),
            Some(size) => {
                let kind = ListKind::Random;
                Case::sparse(self.head_dim, self.num_heads, self.seqlen, size, self.keep, kind)
            }
        };
        let deterministic = if self.deterministic { Deterministic::Yes } else { Deterministic::No };
        Ok(Problem { deterministic, ..Case { batch: self.batch, ..case }.problem(AttnOp::Bwd) })
    }
}

/// The GPU to answer for: this machine's, else the one a table was measured on.
fn gpu(ordinal: usize, table: Option<&Path>) -> Result<(Gpu, String), TuneError> {
    let missing = match Device::open(ordinal) {
        Ok(device) => {
            let info = device.info();
            let gpu = Gpu { name: info.name.clone(), capability: info.capability, arch: device.arch()? };
            let text = format!("for this machine's {}", gpu.name);
            return Ok((gpu, text));
        }
        Err(error @ (Error::NoDriver | Error::NoSuchGpu { .. })) => error,
        // A driver that shows no GPU refuses to initialise.
        Err(error @ Error::Driver { code: 100, .. }) => error,
        Err(error) => return Err(error.into()),
    };
    let read = match table {
        Some(path) => {
            let origin = path.display().to_string();
            let json = std::fs::read_to_string(path).map_err(|why| TableError {
                origin: origin.clone(),
                problems: vec![format!("it cannot be read: {why}")],
            })?;
            Some(DispatchTable::from_json(&origin, &json)?)
        }
        None => Registry::committed()
            .tables
            .first()
            .map(|(file, json)| DispatchTable::from_json(file, json))
            .transpose()?,
    };
    let Some(table) = read else { return Err(missing.into()) };
    let capability = match table.meta.arch {
        Arch::Sm90a => (9, 0),
        Arch::Sm80 => (8, 0),
    };
    let text = format!("for {}, whose table this is; no GPU here", table.meta.gpu);
    Ok((Gpu { name: table.meta.gpu, capability, arch: table.meta.arch }, text))
}

/// The answer, forward and backward, in a few lines each; `table` instead of the committed one.
///
/// # Errors
/// An impossible option, a table that cannot be read, no GPU and no table, or no kernel for the problem.
pub fn explain(
    question: &Question,
    ordinal: usize,
    table: Option<&Path>,
    report: &Report,
) -> Result<String, TuneError> {
    let problem = question.problem()?;
    let (gpu, text) = gpu(ordinal, table)?;
    let source = table.map_or(TableSource::Committed, |path| TableSource::File(path.to_path_buf()));
    let dispatch = Dispatch::new(gpu, &source, Registry::committed(), report);
    let mut out = format!("{text}\n");
    for op in [AttnOp::Fwd, AttnOp::Bwd] {
        let _ = writeln!(out, "{}", dispatch.explain(&Problem { op, ..problem })?);
    }
    let needed = MemoryNeeded::chosen(&Problem { op: AttnOp::Bwd, ..problem }, &dispatch)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let _ = write!(
        out,
        "memory beside Q, K, V and out: {:.1} MiB (lists {:.1}, LSE {:.1}, workspace of the backward {:.1})",
        mib(needed.total()),
        mib(needed.query_lists + needed.key_lists),
        mib(needed.lse),
        mib(needed.workspace)
    );
    if let Lists::Blocks { query_group, kv_block } = problem.lists {
        let line = dispatch
            .table()
            .and_then(|t| t.crossover(DTYPE, problem.head_dim, query_group, kv_block, problem.seqlen_kv));
        let _ = match line {
            Some(line) => {
                let wins = match line.crossover {
                    Some(percent) => format!("beats dense from {percent:.1} % skipped"),
                    None => "never beats dense".to_string(),
                };
                let at = format!("{} tokens, {} heads", line.seqlen, line.num_heads);
                write!(out, "\nsparse {wins} (selection + forward + backward, measured at {at})")
            }
            None => write!(out, "\nno crossover is known; to measure it: dsv-autotune"),
        };
    }
    Ok(out)
}
