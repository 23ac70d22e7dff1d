use crate::error::TableError;
use crate::problem::{Bucket, SEQLEN_BUCKETS, SPARSITY_BUCKETS};
use crate::types::{Arch, Dtype};
use crate::{KernelSpec, Problem};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// Version of the table's JSON.
pub const SCHEMA: u32 = 1;

/// Where a table comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableMeta {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The GPU's name as its driver gives it.
    pub gpu: String,
    /// Architecture of the kernels.
    pub arch: Arch,
    /// Driver version.
    pub driver: String,
    /// Compiler of the kernels.
    pub compiler: String,
    /// Multiprocessor and memory clock under load, MHz, as read while tuning.
    pub clocks: String,
    /// Day of the measurement, ISO 8601.
    pub date: String,
}

/// The winner of one bucket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableEntry {
    /// What it answers.
    #[serde(flatten)]
    pub bucket: Bucket,
    /// The kernel.
    pub kernel: KernelSpec,
    /// blake3 of the kernel's source and headers when it was measured.
    pub source_hash: String,
    /// Its median, microseconds.
    pub median_us: f64,
    /// Distance between the 10th and 90th percentile.
    pub spread_us: f64,
    /// Median of the fastest other kernel, if there was one. A shipped kernel wins over one that is faster by less
    /// than the noise between runs, so this may be a little lower than `median_us`.
    pub runner_up_us: Option<f64>,
    /// Candidates tried.
    pub tried: u32,
    /// Candidates that failed.
    pub failed: u32,
}

/// Where sparse begins to beat dense for one block size and length: selection + forward + backward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Crossover {
    /// Element type.
    pub dtype: Dtype,
    /// Columns of Q, K, V.
    pub head_dim: u16,
    /// Tokens sharing one list.
    pub query_group: u16,
    /// Tokens of one selectable KV unit.
    pub kv_block: u16,
    /// One of [`SEQLEN_BUCKETS`].
    pub seqlen: u32,
    /// Dense forward + backward, microseconds, one sequence of `num_heads` heads.
    pub dense_us: f64,
    /// Selection + inversion, microseconds.
    pub select_us: f64,
    /// (sparsity percent, selection + forward + backward in microseconds), ascending.
    pub sparse_us: Vec<(u8, f64)>,
    /// The sparsity above which sparse is faster, interpolated, percent; absent when it never is.
    pub crossover: Option<f64>,
    /// Heads of the measured problem.
    pub num_heads: u32,
    /// Bytes of lists and workspace one call needs at the crossover or at 90 %.
    pub workspace_bytes: u64,
}

/// Problem bucket -> kernel name, for one GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct DispatchTable {
    /// Where it comes from.
    pub meta: TableMeta,
    /// Sorted by bucket, unique.
    pub entries: Vec<TableEntry>,
    /// Sorted, unique by (dtype, head_dim, block size, length).
    pub crossovers: Vec<Crossover>,
}

/// How a kernel was found.
#[derive(Clone, Debug, PartialEq)]
pub enum Found<'a> {
    /// A line of the table for exactly this bucket.
    Exact(&'a TableEntry),
    /// The nearest line of the same op, dtype, head_dim and block size.
    Nearest(&'a TableEntry),
    /// No line fits: the caller takes the shipped default.
    Nothing,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    meta: TableMeta,
    entries: Vec<serde_json::Value>,
    crossovers: Vec<serde_json::Value>,
}

impl DispatchTable {
    /// Sorts and takes the parts.
    pub fn new(
        meta: TableMeta,
        mut entries: Vec<TableEntry>,
        mut crossovers: Vec<Crossover>,
    ) -> DispatchTable {
        entries.sort_by_key(|e| e.bucket);
        crossovers.sort_by_key(Crossover::key);
        DispatchTable { meta, entries, crossovers }
    }

    /// JSON: metadata first, then one entry per line.
    pub fn to_json(&self) -> String {
        fn lines<T: Serialize>(out: &mut String, items: &[T]) {
            for (i, item) in items.iter().enumerate() {
                let text = serde_json::to_string(item).expect("plain data serialises");
                let comma = if i + 1 < items.len() { "," } else { "" };
                let _ = writeln!(out, "    {text}{comma}");
            }
        }
        let mut out = String::from("{\n  \"meta\": ");
        out +=
            &serde_json::to_string_pretty(&self.meta).expect("plain data serialises").replace('\n', "\n  ");
        out += ",\n  \"entries\": [\n";
        lines(&mut out, &self.entries);
        out += "  ],\n  \"crossovers\": [\n";
        lines(&mut out, &self.crossovers);
        out += "  ]\n}\n";
        out
    }

    /// Reads and checks a table, reporting every problem.
    ///
    /// # Errors
    /// Not JSON, another schema, entries that do not parse, kernels that do not serve their bucket, duplicates.
    pub fn from_json(origin: &str, text: &str) -> Result<DispatchTable, TableError> {
        let fail = |problems: Vec<String>| TableError { origin: origin.to_string(), problems };
        let raw: Raw =
            serde_json::from_str(text).map_err(|e| fail(vec![format!("it is not a table: {e}")]))?;
        let mut problems = Vec::new();
        if raw.meta.schema != SCHEMA {
            problems.push(format!("schema {} is not {SCHEMA}, the one this version reads", raw.meta.schema));
        }
        fn read<T: serde::de::DeserializeOwned>(
            kind: &str,
            values: Vec<serde_json::Value>,
            problems: &mut Vec<String>,
        ) -> Vec<T> {
            let mut out = Vec::with_capacity(values.len());
            for (i, value) in values.into_iter().enumerate() {
                match serde_json::from_value(value) {
                    Ok(item) => out.push(item),
                    Err(e) => problems.push(format!("{kind} {i}: {e}")),
                }
            }
            out
        }
        let entries: Vec<TableEntry> = read("entry", raw.entries, &mut problems);
        let crossovers: Vec<Crossover> = read("crossover", raw.crossovers, &mut problems);
        let table = DispatchTable::new(raw.meta, entries, crossovers);
        for entry in &table.entries {
            if let Some(problem) = entry.mismatch(table.meta.arch) {
                problems.push(problem);
            }
        }
        for pair in table.entries.windows(2) {
            if pair[0].bucket == pair[1].bucket {
                problems.push(format!("two lines answer {:?}", pair[0].bucket));
            }
        }
        if problems.is_empty() { Ok(table) } else { Err(fail(problems)) }
    }

    /// Refuses a table that was made on another GPU.
    ///
    /// # Errors
    /// The table's GPU or architecture is not this one's.
    pub fn check_gpu(&self, origin: &str, gpu: &str, major: i32, minor: i32) -> Result<(), TableError> {
        let mut problems = Vec::new();
        if !self.meta.arch.runs_on(major, minor) {
            problems.push(format!(
                "its kernels are for {}, this GPU has compute capability {major}.{minor}",
                self.meta.arch
            ));
        }
        if self.meta.gpu != gpu {
            problems.push(format!("it was measured on '{}', this GPU is '{gpu}'", self.meta.gpu));
        }
        if problems.is_empty() { Ok(()) } else { Err(TableError { origin: origin.to_string(), problems }) }
    }

    /// The line that serves a problem best.
    pub fn lookup(&self, problem: &Problem) -> Found<'_> {
        let bucket = problem.bucket();
        if let Ok(i) = self.entries.binary_search_by_key(&bucket, |e| e.bucket) {
            return Found::Exact(&self.entries[i]);
        }
        let same = |b: &Bucket| {
            (b.op, b.dtype, b.head_dim, b.query_group, b.kv_block)
                == (bucket.op, bucket.dtype, bucket.head_dim, bucket.query_group, bucket.kv_block)
                && b.deterministic >= bucket.deterministic
        };
        let distance = |b: &Bucket| {
            let length = (b.seqlen as f64 / bucket.seqlen as f64).log2().abs();
            let sparsity = (b.sparsity as f64 - bucket.sparsity as f64).abs() / 10.0;
            length + sparsity
        };
        self.entries
            .iter()
            .filter(|e| same(&e.bucket))
            .min_by(|a, b| distance(&a.bucket).total_cmp(&distance(&b.bucket)))
            .map_or(Found::Nothing, Found::Nearest)
    }

    /// The crossover of a block size at the bucket nearest to a length.
    pub fn crossover(
        &self,
        dtype: Dtype,
        head_dim: u16,
        query_group: u16,
        kv_block: u16,
        seqlen: u32,
    ) -> Option<&Crossover> {
        let ratio = |s: u32| (s as f64 / seqlen.max(1) as f64).ln().abs();
        self.crossovers
            .iter()
            .filter(|c| {
                (c.dtype, c.head_dim, c.query_group, c.kv_block) == (dtype, head_dim, query_group, kv_block)
            })
            .min_by(|a, b| ratio(a.seqlen).total_cmp(&ratio(b.seqlen)))
    }
}

impl Crossover {
    /// What a crossover is unique by: (dtype, head_dim, query_group, kv_block, seqlen).
    pub fn key(&self) -> (Dtype, u16, u16, u16, u32) {
        (self.dtype, self.head_dim, self.query_group, self.kv_block, self.seqlen)
    }
}

impl TableEntry {
    /// Why the line's kernel does not serve its bucket.
    fn mismatch(&self, arch: Arch) -> Option<String> {
        let KernelSpec::Attn(spec) = &self.kernel else {
            return Some(format!("{} is no attention kernel", self.kernel));
        };
        let b = &self.bucket;
        let (query_group, kv_block) = spec.lists().block_size();
        let fits = (spec.op(), spec.dtype(), spec.head_dim(), query_group, kv_block)
            == (b.op, b.dtype, b.head_dim, b.query_group, b.kv_block)
            && spec.arch() == arch
            && spec.deterministic() >= b.deterministic;
        if !fits {
            return Some(format!("{} does not serve {b:?} on {arch}", self.kernel));
        }
        if !SEQLEN_BUCKETS.contains(&b.seqlen) || !SPARSITY_BUCKETS.contains(&b.sparsity) {
            return Some(format!(
                "{b:?} is no bucket: seqlen is one of {SEQLEN_BUCKETS:?}, sparsity of {SPARSITY_BUCKETS:?}"
            ));
        }
        if !(self.median_us.is_finite() && self.median_us > 0.0) {
            return Some(format!("{}: a median of {} us is no time", self.kernel, self.median_us));
        }
        None
    }
}
