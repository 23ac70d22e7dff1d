//! From records to a dispatch table: a pure function, so that anyone can repeat it on the recorded JSONL.

use crate::listgen::{self, ListKind};
use crate::plan::flops;
use crate::selection::is_of_lists;
use dsv_runtime::MemoryNeeded;
use dsv_spec::{
    Arch, AttnOp, AttnSpec, Bucket, Crossover, Deterministic, DispatchTable, KernelSpec, ListOp, Lists,
    Outcome, Problem, TableEntry, TableMeta, Timing, TuneRecord, space,
};
use std::collections::{BTreeMap, BTreeSet};

/// The winner among the right kernels of one op on one case, and the field it won against. Of those within [`WORTH_A_KERNEL`] of the
/// fastest a shipped one; over random lists one that shares what neighbours list, where it is faster than that over clustered lists.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    /// The kernel.
    pub kernel: KernelSpec,
    /// Its source when it was measured.
    pub source_hash: String,
    /// Its times.
    pub timing: Timing,
    /// Median of the fastest other.
    pub runner_up_us: Option<f64>,
    /// Candidates tried.
    pub tried: u32,
    /// Candidates that failed.
    pub failed: u32,
}

/// Everything measured of one case.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The forward's problem.
    pub problem: Problem,
    /// Percent of KV skipped, one of the table's.
    pub sparsity: u8,
    /// The kind of lists, a name of [`ListKind`].
    pub lists: String,
    /// Forward.
    pub forward: Option<Best>,
    /// Backward, its helpers included: the fastest of any form.
    pub backward: Option<Best>,
    /// The fastest backward of the deterministic form.
    pub backward_deterministic: Option<Best>,
    /// The fastest `attn_bwd_dq`; its time is that of a whole deterministic backward.
    pub dq: Option<Best>,
    /// Selection of lists of this width, microseconds.
    pub select_us: Option<f64>,
    /// Inversion of the lists, microseconds.
    pub invert_us: Option<f64>,
}

impl Row {
    /// Share of the KV blocks kept; 1 when dense.
    pub fn kept(&self) -> f64 {
        listgen::kept(&self.problem, &self.lists)
    }

    /// Effective TFLOP/s of an op, on the pairs kept.
    pub fn tflops(&self, op: AttnOp) -> Option<f64> {
        let best = if op == AttnOp::Fwd { &self.forward } else { &self.backward };
        let p = Problem { op, ..self.problem };
        best.as_ref().map(|b| flops(&p, &self.lists) / b.timing.median_us / 1e6)
    }

    /// Forward + backward, and for lists making them too; microseconds.
    pub fn total_us(&self) -> Option<f64> {
        let attention = self.forward.as_ref()?.timing.median_us + self.backward.as_ref()?.timing.median_us;
        match self.problem.lists {
            Lists::Dense => Some(attention),
            Lists::Blocks { .. } => Some(attention + self.lists_us()?),
        }
    }

    /// Making the lists: selection, and inversion where the backward reads it; microseconds.
    pub fn lists_us(&self) -> Option<f64> {
        match self.problem.lists.is_gather() {
            true => self.select_us,
            false => Some(self.select_us? + self.invert_us?),
        }
    }

    /// `dense` or `qg128 kb128`.
    pub fn block_label(&self) -> String {
        match self.problem.lists.block_size() {
            (0, 0) => "dense".to_string(),
            (qg, kb) => format!("qg{qg} kb{kb}"),
        }
    }
}

/// (problem of the forward, lists): what makes a row, in the order rows are shown.
type RowKey = (u16, u32, u32, u32, (u16, u16), String, std::cmp::Reverse<u32>);

fn row_key(p: &Problem, lists: &str) -> RowKey {
    let block = p.lists.block_size();
    (
        p.head_dim,
        p.seqlen_kv,
        p.num_heads,
        p.batch,
        block,
        lists.to_string(),
        std::cmp::Reverse(p.max_selected),
    )
}

/// Records by case, the latest record of a (kernel, problem, lists) standing for all earlier ones.
pub fn rows<'r>(records: impl IntoIterator<Item = &'r TuneRecord>) -> Vec<Row> {
    struct Group<'a> {
        problem: Problem,
        sparsity: u8,
        by_op: BTreeMap<AttnOp, BTreeMap<KernelSpec, &'a TuneRecord>>,
    }
    let mut groups: BTreeMap<RowKey, Group<'_>> = BTreeMap::new();
    let shipped: BTreeSet<KernelSpec> = Arch::ALL.iter().flat_map(|&arch| space::shipped(arch)).collect();
    // Selection and inversion do not depend on head_dim: one measurement serves every row of the same lists.
    let mut list_us: BTreeMap<(bool, RowKey), f64> = BTreeMap::new();
    // Over clustered lists, by the key of the random ones.
    let mut clustered: BTreeMap<(AttnOp, RowKey), Times> = BTreeMap::new();
    let random = ListKind::Random.name();
    for record in records {
        let forward = Problem { op: AttnOp::Fwd, ..record.problem };
        match record.spec {
            KernelSpec::Attn(_) => {
                if record.lists == ListKind::Clustered.name()
                    && let Some(us) = right_us(record)
                {
                    let key = (record.problem.op, row_key(&forward, random));
                    clustered.entry(key).or_default().insert(record.spec, us);
                }
                groups
                    .entry(row_key(&forward, &record.lists))
                    .or_insert_with(|| Group {
                        problem: forward,
                        sparsity: record.sparsity,
                        by_op: BTreeMap::new(),
                    })
                    .by_op
                    .entry(record.problem.op)
                    .or_default()
                    .insert(record.spec, record);
            }
            KernelSpec::Select(_) | KernelSpec::List(_) => {
                // Of the selections measured one is that of the row's lists.
                let invert = match record.spec {
                    KernelSpec::Select(s) if is_of_lists(&s) => false,
                    KernelSpec::List(l) if l.op == ListOp::Invert => true,
                    _ => continue,
                };
                if let Outcome::Ok { timing, .. } = &record.outcome {
                    let key = row_key(&Problem { head_dim: 0, ..forward }, &record.lists);
                    list_us.insert((invert, key), timing.median_us);
                }
            }
            KernelSpec::Pointwise(_) => {}
        }
    }
    groups
        .into_values()
        .map(|group| {
            let lists = group.by_op.values().flat_map(|m| m.values()).next().map_or("", |r| &r.lists);
            let best_where = |op, keep: fn(&AttnSpec) -> bool| {
                let kept = |r: &&TuneRecord| matches!(&r.spec, KernelSpec::Attn(s) if keep(s));
                let also = clustered.get(&(op, row_key(&group.problem, lists)));
                group.by_op.get(&op).and_then(|m| best(m.values().copied().filter(kept), &shipped, also))
            };
            let best = |op| best_where(op, |_| true);
            let time = |invert: bool, lists: &str| {
                let key = row_key(&Problem { head_dim: 0, ..group.problem }, lists);
                list_us.get(&(invert, key)).copied()
            };
            Row {
                problem: group.problem,
                sparsity: group.sparsity,
                lists: lists.to_string(),
                forward: best(AttnOp::Fwd),
                backward: best(AttnOp::Bwd),
                backward_deterministic: best_where(AttnOp::Bwd, |s| s.deterministic() == Deterministic::Yes),
                dq: best(AttnOp::BwdDq),
                // Choosing lists takes the same time however they turn out.
                select_us: time(false, lists).or_else(|| time(false, random)),
                invert_us: time(true, lists),
            }
        })
        .collect()
}

/// Median of each kernel, microseconds.
type Times = BTreeMap<KernelSpec, f64>;

/// The median of a record whose kernel was right.
fn right_us(record: &TuneRecord) -> Option<f64> {
    match &record.outcome {
        Outcome::Ok { timing, .. } => Some(timing.median_us).filter(|us| us.is_finite() && *us > 0.0),
        _ => None,
    }
}

/// A kernel that is not shipped anyway has to be faster than one that is by more than this: what differs less is
/// within the noise between runs, and every winner is one more committed text.
const WORTH_A_KERNEL: f64 = 1.02;

/// The winner, a shipped kernel where one is about as fast. Lists of neighbours overlap in real video: a form that shares what they
/// have in common wins where it is about as fast over the lists at hand and faster over `clustered` ones.
fn best<'a>(
    records: impl Iterator<Item = &'a TuneRecord>,
    shipped: &BTreeSet<KernelSpec>,
    clustered: Option<&Times>,
) -> Option<Best> {
    let (mut tried, mut failed) = (0, 0);
    let mut timed: Vec<(&TuneRecord, Timing)> = Vec::new();
    for record in records {
        tried += 1;
        match &record.outcome {
            Outcome::Ok { timing, .. } if right_us(record).is_some() => timed.push((record, *timing)),
            _ => failed += 1,
        }
    }
    // Ties are broken by name, so that the same records always give the same table.
    timed.sort_by(|a, b| {
        a.1.median_us.total_cmp(&b.1.median_us).then_with(|| a.0.spec.name().cmp(&b.0.spec.name()))
    });
    let limit = timed.first()?.1.median_us * WORTH_A_KERNEL;
    let as_fast = timed.iter().take_while(|(_, t)| t.median_us <= limit).count();
    let at = timed[..as_fast].iter().position(|(r, _)| shipped.contains(&r.spec)).unwrap_or(0);
    let over_clustered = |at: usize| clustered?.get(&timed[at].0.spec).copied();
    let other = (0..as_fast)
        .filter(|&i| matches!(timed[i].0.spec, KernelSpec::Attn(s) if s.shares_loads()))
        .filter_map(|i| Some((i, over_clustered(i)?)))
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .filter(|&(_, us)| over_clustered(at).is_some_and(|now| us * WORTH_A_KERNEL < now));
    let (winner, timing) = timed.remove(other.map_or(at, |(i, _)| i));
    Some(Best {
        kernel: winner.spec,
        source_hash: winner.source_hash.clone(),
        timing,
        runner_up_us: timed.first().map(|(_, t)| t.median_us),
        tried,
        failed,
    })
}

/// A table, and what a reader of it should know.
#[derive(Clone, Debug, PartialEq)]
pub struct Reduction {
    /// The table.
    pub table: DispatchTable,
    /// One line for each thing that is missing or was decided between rows.
    pub notes: Vec<String>,
}

/// A table must hold for lists nobody has seen: the other kinds are recorded, and reported, but make no line of it. Clustered ones
/// only let in forms made for them that are about as fast over random ones.
const OF_THE_TABLE: [ListKind; 2] = [ListKind::Dense, ListKind::Random];

/// Whether a record is of a kernel that the tuner tries today.
fn is_candidate(record: &TuneRecord) -> bool {
    let KernelSpec::Attn(s) = record.spec else { return true };
    space::candidates(s.op(), s.dtype(), s.head_dim(), s.lists(), s.arch()).contains(&s)
}

/// Reduces records to a table: winners by bucket from dense and random lists, and the crossovers. Each bucket has a line for callers
/// that need the same bits every time, and one for those that do not. A kernel that is no candidate any more wins nothing.
pub fn reduce(records: &[TuneRecord], meta: TableMeta) -> Reduction {
    let rows: Vec<Row> = rows(records.iter().filter(|record| is_candidate(record)))
        .into_iter()
        .filter(|row| OF_THE_TABLE.iter().any(|kind| kind.name() == row.lists))
        .collect();
    let mut notes = Vec::new();
    let mut by_bucket: BTreeMap<Bucket, Vec<(&Row, &Best)>> = BTreeMap::new();
    for row in &rows {
        let (no, yes) = (Deterministic::No, Deterministic::Yes);
        for (op, deterministic, best) in [
            (AttnOp::Fwd, no, &row.forward),
            (AttnOp::Fwd, yes, &row.forward),
            (AttnOp::Bwd, no, &row.backward),
            (AttnOp::Bwd, yes, &row.backward_deterministic),
            (AttnOp::BwdDq, no, &row.dq),
            (AttnOp::BwdDq, yes, &row.dq),
        ] {
            if let Some(best) = best {
                let bucket = Problem { op, deterministic, ..row.problem }.bucket();
                by_bucket.entry(Bucket { sparsity: row.sparsity, ..bucket }).or_default().push((row, best));
            }
        }
    }
    let mut entries = Vec::new();
    for (bucket, mut found) in by_bucket {
        // Several cases of one bucket: the one nearest to the bucket's length, then the one with the most work.
        let distance = |row: &Row| (row.problem.seqlen_kv as f64 / bucket.seqlen as f64).ln().abs();
        found.sort_by(|(a, _), (b, _)| {
            distance(a)
                .total_cmp(&distance(b))
                .then_with(|| flops(&b.problem, &b.lists).total_cmp(&flops(&a.problem, &a.lists)))
        });
        let (row, best) = found[0];
        if found.len() > 1 {
            notes.push(format!(
                "{}: {} cases fall into seqlen {}, sparsity {} %; the line is that of {} heads, {} tokens",
                bucket.op,
                found.len(),
                bucket.seqlen,
                bucket.sparsity,
                row.problem.num_heads,
                row.problem.seqlen_kv
            ));
        }
        entries.push(TableEntry {
            bucket,
            kernel: best.kernel,
            source_hash: best.source_hash.clone(),
            median_us: best.timing.median_us,
            spread_us: best.timing.spread_us,
            runner_up_us: best.runner_up_us,
            tried: best.tried,
            failed: best.failed,
        });
    }
    let crossovers = crossovers(&rows, &mut notes);
    Reduction { table: DispatchTable::new(meta, entries, crossovers), notes }
}

/// Where sparse begins to beat dense, for each block size at each length.
pub fn crossovers(rows: &[Row], notes: &mut Vec<String>) -> Vec<Crossover> {
    type Shape = (u16, u32, u32, u32);
    let shape = |p: &Problem| -> Shape { (p.head_dim, p.seqlen_kv, p.num_heads, p.batch) };
    let dense: BTreeMap<Shape, f64> = rows
        .iter()
        .filter(|row| row.problem.lists.is_dense())
        .filter_map(|row| Some((shape(&row.problem), row.total_us()?)))
        .collect();
    let mut by_block: BTreeMap<(Shape, (u16, u16)), Vec<&Row>> = BTreeMap::new();
    for row in rows.iter().filter(|row| !row.problem.lists.is_dense()) {
        by_block.entry((shape(&row.problem), row.problem.lists.block_size())).or_default().push(row);
    }
    let mut out: Vec<Crossover> = Vec::new();
    for ((shape, (query_group, kv_block)), rows) in by_block {
        let what = format!(
            "crossover of head_dim {}, query_group {query_group}, kv_block {kv_block}, {} tokens",
            shape.0, shape.1
        );
        let Some(&dense_us) = dense.get(&shape) else {
            notes.push(format!("no {what}: dense forward and backward were not both measured"));
            continue;
        };
        // (sparsity, total, selection + inversion, row), ascending and unique.
        let mut points: Vec<(u8, f64, f64, &Row)> = rows
            .iter()
            .filter_map(|row| Some((row.sparsity, row.total_us()?, row.lists_us()?, *row)))
            .collect();
        points.sort_by_key(|p| p.0);
        points.dedup_by_key(|p| p.0);
        // What is told of one sparsity is told at 90 %, where the method works.
        let Some(told) = points.iter().min_by_key(|p| (p.0.abs_diff(90), p.0)) else {
            notes.push(format!(
                "no {what}: no sparsity has forward, backward, selection and inversion all measured"
            ));
            continue;
        };
        let sparse_us: Vec<(u8, f64)> = points.iter().map(|p| (p.0, to_nanosecond(p.1))).collect();
        let p = &told.3.problem;
        let bucket = p.bucket();
        let row = Crossover {
            dtype: p.dtype,
            head_dim: p.head_dim,
            query_group,
            kv_block,
            seqlen: bucket.seqlen,
            dense_us: to_nanosecond(dense_us),
            select_us: to_nanosecond(told.2),
            crossover: interpolate(dense_us, &sparse_us).map(|percent| (percent * 100.0).round() / 100.0),
            sparse_us,
            num_heads: p.num_heads,
            workspace_bytes: MemoryNeeded::of(&Problem { op: AttnOp::Bwd, ..*p }).total(),
        };
        match out.iter_mut().find(|c| c.key() == row.key()) {
            Some(there) if there.dense_us >= row.dense_us => {}
            Some(there) => *there = row,
            None => out.push(row),
        }
    }
    out
}

/// The sparsity (percent) above which sparse is faster at every measured point, by straight lines between the points
/// (ascending in sparsity). `None` when the highest sparsity does not win; the lowest measured one when all of them
/// win, since below it nothing is known.
pub fn interpolate(dense_us: f64, sparse_us: &[(u8, f64)]) -> Option<f64> {
    let wins = |point: &(u8, f64)| point.1 < dense_us;
    let mut above = sparse_us.last().filter(|p| wins(p))?;
    for below in sparse_us.iter().rev().skip(1) {
        if !wins(below) {
            let (s0, t0) = (below.0 as f64, below.1);
            let (s1, t1) = (above.0 as f64, above.1);
            return Some(s0 + (t0 - dense_us) / (t0 - t1) * (s1 - s0));
        }
        above = below;
    }
    Some(above.0 as f64)
}

/// Puts the lines of a run that measured only part of the space into the table that was there. Lines of the new run
/// win; old lines are kept where GPU, architecture, driver and compiler are the same, else the new table stands alone
/// (the reason is returned).
pub fn merge(old: DispatchTable, new: DispatchTable) -> (DispatchTable, Option<String>) {
    let (a, b) = (&old.meta, &new.meta);
    let differing: Vec<String> =
        [("GPU", &a.gpu, &b.gpu), ("driver", &a.driver, &b.driver), ("compiler", &a.compiler, &b.compiler)]
            .into_iter()
            .filter(|(_, a, b)| a != b)
            .map(|(what, a, b)| format!("{what} {a} is now {b}"))
            .chain((a.arch != b.arch).then(|| format!("architecture {} is now {}", a.arch, b.arch)))
            .collect();
    if !differing.is_empty() {
        return (new, Some(format!("the old table's lines were dropped: {}", differing.join(", "))));
    }
    let measured: BTreeSet<Bucket> = new.entries.iter().map(|e| e.bucket).collect();
    let crossed: BTreeSet<_> = new.crossovers.iter().map(Crossover::key).collect();
    let entries =
        old.entries.into_iter().filter(|e| !measured.contains(&e.bucket)).chain(new.entries).collect();
    let crossovers =
        old.crossovers.into_iter().filter(|c| !crossed.contains(&c.key())).chain(new.crossovers).collect();
    (DispatchTable::new(new.meta, entries, crossovers), None)
}

/// Microseconds to the nanosecond, the clock's own grain; short enough to read, and to survive JSON unchanged.
pub fn to_nanosecond(us: f64) -> f64 {
    (us * 1e3).round() / 1e3
}

/// File stem of a GPU's table: lower case, anything that is no letter or digit a dash (`nvidia-h200`).
pub fn gpu_slug(gpu: &str) -> String {
    let dashed: String =
        gpu.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    dashed.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crossover_between_points() {
        // Dense 100: 50 % costs 120, 75 % costs 80: the line crosses half-way.
        assert_eq!(interpolate(100.0, &[(50, 120.0), (75, 80.0), (90, 40.0)]), Some(62.5));
        // Never: not even the highest sparsity wins.
        assert_eq!(interpolate(100.0, &[(50, 140.0), (90, 100.0)]), None);
        assert_eq!(interpolate(100.0, &[]), None);
        // Always: known from the lowest measured sparsity on.
        assert_eq!(interpolate(100.0, &[(50, 99.0), (90, 30.0)]), Some(50.0));
        // A slow point above a fast one: the answer lies above the slow one.
        assert_eq!(interpolate(100.0, &[(50, 90.0), (75, 110.0), (90, 90.0)]), Some(82.5));
    }

    #[test]
    fn slugs() {
        assert_eq!(gpu_slug("NVIDIA H200"), "nvidia-h200");
        assert_eq!(gpu_slug("NVIDIA H100 80GB HBM3"), "nvidia-h100-80gb-hbm3");
        assert_eq!(gpu_slug("A/B  (C)"), "a-b-c");
    }
}
