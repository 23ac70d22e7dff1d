//! Measured times of one self-attention's step on one GPU: selection, forward and backward, from dispatch tables and the
//! tuner's records. It must not know what the lists cover. Between two measured shares kept a time lies on the straight line;
//! anywhere else there is none.

use dsv_spec::{
    AttnOp, BlockScore, Budget, DispatchTable, GroupRule, KernelSpec, ListOp, Lists, Outcome, Problem,
    SelectOp, TuneRecord,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Lists on which times are taken that hold for lists nobody has seen.
const RANDOM: &str = "random";
/// Shares kept that differ by less are one: a table tells whole percents.
const SAME_SHARE: f64 = 0.005;

/// The sizes a time was measured at, batch 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shape {
    /// Tokens.
    pub seqlen: u32,
    /// Columns of Q, K, V.
    pub head_dim: u16,
    /// Heads.
    pub num_heads: u32,
}

/// (query_group, kv_block).
type Block = (u16, u16);

/// How a list is chosen, as far as its time depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    /// The group rule.
    pub rule: GroupRule,
    /// What says how many units a group keeps.
    pub budget: Budget,
}

/// The selection that dispatch tables count.
const OF_TABLES: Selector = Selector { rule: GroupRule::Centre, budget: Budget::TopK };

/// A time, and whether it was measured at that share or lies between two that were.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTime {
    /// Microseconds.
    pub us: f64,
    /// Whether this share was measured.
    pub measured: bool,
}

/// Why times cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TimesError {
    /// A file cannot be read.
    #[error(
        "cannot read {path}: {source}\n  next: --table takes a dispatch table (generated/tables), --record the records.jsonl of a dsv-autotune run"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file holds something else.
    #[error(
        "{path} {what}\n  next: --table takes a dispatch table (generated/tables), --record the records.jsonl of a dsv-autotune run"
    )]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// All that was measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Times {
    /// Where from, one line a table or record.
    pub sources: Vec<String>,
    dense: BTreeMap<Shape, f64>,
    /// Whole steps with lists chosen as [`OF_TABLES`]: (share kept, microseconds), ascending.
    steps: BTreeMap<(Shape, Block), Vec<(f64, f64)>>,
    /// Selections alone, the head dim of their shape 0: (share kept, microseconds).
    selections: BTreeMap<(Shape, Block, Selector), Vec<(f64, f64)>>,
}

impl Times {
    /// Takes what a table tells.
    pub fn add_table(&mut self, origin: &str, table: &DispatchTable) {
        let meta = &table.meta;
        self.sources.push(format!("{origin} ({}, {})", meta.gpu, meta.date));
        for c in &table.crossovers {
            let shape = Shape { seqlen: c.seqlen, head_dim: c.head_dim, num_heads: c.num_heads };
            self.dense.insert(shape, c.dense_us);
            let steps = self.steps.entry((shape, (c.query_group, c.kv_block))).or_default();
            c.sparse_us.iter().for_each(|&(sparsity, us)| {
                put(steps, 1.0 - f64::from(sparsity) / 100.0, us);
            });
        }
    }

    /// Reads a table.
    ///
    /// # Errors
    /// [`TimesError`].
    pub fn read_table(&mut self, path: &Path) -> Result<(), TimesError> {
        let origin = path.display().to_string();
        let table = DispatchTable::from_json(&origin, &read(path)?)
            .map_err(|e| TimesError::Form { path: path.to_path_buf(), what: e.problems.join("; ") })?;
        self.add_table(&origin, &table);
        Ok(())
    }

    /// Reads the records of a run of the tuner, on the GPU of whatever was read before.
    ///
    /// # Errors
    /// [`TimesError`].
    pub fn read_records(&mut self, path: &Path) -> Result<(), TimesError> {
        let record = |(i, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|e| TimesError::Form {
                path: path.to_path_buf(),
                what: format!("line {} is no record: {e}", i + 1),
            })
        };
        let text = read(path)?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let records = lines.map(record).collect::<Result<Vec<TuneRecord>, _>>()?;
        self.add_records(&path.display().to_string(), &records);
        Ok(())
    }

    /// Takes what records tell: of each op on each problem the fastest kernel. They stand for what was there at the same share.
    pub fn add_records(&mut self, origin: &str, records: &[TuneRecord]) {
        self.sources.push(origin.to_string());
        let us = |r: &TuneRecord| match &r.outcome {
            Outcome::Ok { timing, .. } if timing.median_us.is_finite() && r.problem.batch == 1 => {
                Some(timing.median_us)
            }
            _ => None,
        };
        // Microseconds of each op on each problem; selections and inversions know no head dim.
        type Key = (Shape, Block, u32);
        let mut attention: BTreeMap<(Key, AttnOp), f64> = BTreeMap::new();
        let mut inversions: BTreeMap<Key, f64> = BTreeMap::new();
        let mut selections: BTreeMap<(Key, Selector), (SelectOp, f64)> = BTreeMap::new();
        let mut problems: BTreeMap<Key, Problem> = BTreeMap::new();
        for r in records.iter().filter(|r| r.lists == RANDOM || r.problem.lists.is_dense()) {
            let (Some(us), p) = (us(r), &r.problem) else { continue };
            let shape = Shape { seqlen: p.seqlen_kv, head_dim: p.head_dim, num_heads: p.num_heads };
            let key = (shape, p.lists.block_size(), p.max_selected);
            let listed = (Shape { head_dim: 0, ..shape }, key.1, key.2);
            match r.spec {
                KernelSpec::Attn(_) => {
                    problems.insert(key, *p);
                    let best = attention.entry((key, p.op)).or_insert(f64::INFINITY);
                    *best = best.min(us);
                }
                KernelSpec::List(l) if l.op == ListOp::Invert => {
                    inversions.insert(listed, us);
                }
                KernelSpec::Select(s) if s.block_score() == score_of(s.group_rule()) => {
                    let selector = Selector { rule: s.group_rule(), budget: s.budget() };
                    // Where both serve, `kv_select` is what the runtime launches.
                    let there = selections.get(&(listed, selector));
                    if there.is_none_or(|(op, _)| s.op() <= *op) {
                        selections.insert((listed, selector), (s.op(), us));
                    }
                    problems.insert(listed, *p);
                }
                _ => {}
            }
        }
        let kept = |p: &Problem| {
            let units = p.num_kv_blocks();
            f64::from(p.max_selected.min(units)) / f64::from(units)
        };
        for (((shape, block, width), selector), (_, us)) in &selections {
            let points = self.selections.entry((*shape, *block, *selector)).or_default();
            put(points, kept(&problems[&(*shape, *block, *width)]), *us);
        }
        for (key, problem) in problems.iter().filter(|(key, _)| key.0.head_dim > 0) {
            let of = |op| attention.get(&(*key, op)).copied();
            let (Some(forward), Some(backward)) = (of(AttnOp::Fwd), of(AttnOp::Bwd)) else { continue };
            if problem.lists.is_dense() {
                self.dense.insert(key.0, forward + backward);
                continue;
            }
            let listed = (Shape { head_dim: 0, ..key.0 }, key.1, key.2);
            let Some((_, select)) = selections.get(&(listed, OF_TABLES)) else { continue };
            // Attention over small units reads no inverse.
            let invert = if problem.lists.is_gather() { Some(0.0) } else { inversions.get(&listed).copied() };
            let Some(invert) = invert else { continue };
            let us = forward + backward + select + invert;
            put(self.steps.entry((key.0, key.1)).or_default(), kept(problem), us);
        }
    }

    /// The shape that stands for this length and head dim: that of as many heads, else of the most.
    pub fn shape(&self, seqlen: usize, head_dim: usize, heads: usize) -> Option<Shape> {
        let fits = |s: &&Shape| s.seqlen as usize == seqlen && usize::from(s.head_dim) == head_dim;
        self.dense.keys().filter(fits).max_by_key(|s| (s.num_heads as usize == heads, s.num_heads)).copied()
    }

    /// Lengths at which this head dim was measured, ascending.
    pub fn lengths(&self, head_dim: usize) -> Vec<u32> {
        let mut found: Vec<u32> =
            self.dense.keys().filter(|s| usize::from(s.head_dim) == head_dim).map(|s| s.seqlen).collect();
        found.dedup();
        found
    }

    /// Forward + backward over all keys, microseconds.
    pub fn dense_us(&self, shape: Shape) -> Option<f64> {
        self.dense.get(&shape).copied()
    }

    /// Selection + forward + backward over lists of this share; `None` where the share lies outside what was measured of this
    /// block size, or its selection was not.
    pub fn step(&self, shape: Shape, block: Block, selector: Selector, kept: f64) -> Option<StepTime> {
        let step = between(self.steps.get(&(shape, block))?, kept)?;
        if selector == OF_TABLES {
            return Some(step);
        }
        // How long choosing takes hardly depends on how many are kept: the nearest share stands for it.
        let select = |selector| {
            let points = self.selections.get(&(Shape { head_dim: 0, ..shape }, block, selector))?;
            points.iter().min_by(|a, b| (a.0 - kept).abs().total_cmp(&(b.0 - kept).abs())).map(|p| p.1)
        };
        Some(StepTime { us: step.us - select(OF_TABLES)? + select(selector)?, ..step })
    }
}

/// The score of a unit under a rule, as the coverage is measured and the kernels ship.
fn score_of(rule: GroupRule) -> BlockScore {
    if rule == GroupRule::Mass4 { BlockScore::Mass } else { BlockScore::Max }
}

fn read(path: &Path) -> Result<String, TimesError> {
    std::fs::read_to_string(path).map_err(|source| TimesError::Read { path: path.to_path_buf(), source })
}

/// Puts a point into ascending ones, in the place of one at the same share.
fn put(points: &mut Vec<(f64, f64)>, share: f64, us: f64) {
    points.retain(|p| (p.0 - share).abs() >= SAME_SHARE);
    let at = points.partition_point(|p| p.0 < share);
    points.insert(at, (share, us));
}

/// The value at `x` on straight lines between ascending points; `None` outside them.
fn between(points: &[(f64, f64)], x: f64) -> Option<StepTime> {
    if let Some(&(_, us)) = points.iter().find(|p| (p.0 - x).abs() < SAME_SHARE) {
        return Some(StepTime { us, measured: true });
    }
    let at = points.partition_point(|p| p.0 < x);
    let (left, right) = (points.get(at.checked_sub(1)?)?, points.get(at)?);
    let us = left.1 + (right.1 - left.1) * (x - left.0) / (right.0 - left.0);
    Some(StepTime { us, measured: false })
}

/// Whether lists of this block size are block-sparse: whole tiles of keys, as other libraries have them.
pub fn is_block_sparse(query_group: usize, kv_block: usize) -> bool {
    !Lists::Blocks { query_group: query_group as u16, kv_block: kv_block as u16 }.is_gather()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{DeviceFacts, PlannedGpu};
    use dsv_spec::{Arch, Deterministic, Dtype, Timing, space};

    const SHAPE: Shape = Shape { seqlen: 4096, head_dim: 64, num_heads: 16 };

    fn committed() -> Times {
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let mut times = Times::default();
        times.add_table("table", gpu.dispatch_table().unwrap());
        times
    }

    #[test]
    fn a_table_answers_between_its_points_and_nowhere_else() {
        let times = committed();
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let line = gpu.dispatch_table().unwrap().crossover(Dtype::Bf16, 64, 64, 64, 4096).unwrap();
        let at = |kept| times.step(SHAPE, (64, 64), OF_TABLES, kept);
        let told = |sparsity| line.sparse_us.iter().find(|p| p.0 == sparsity).unwrap().1;
        assert_eq!(times.shape(4096, 64, 8), Some(SHAPE), "no line has 8 heads");
        assert_eq!(times.dense_us(SHAPE), Some(line.dense_us));
        assert_eq!(at(0.1), Some(StepTime { us: told(90), measured: true }));
        assert_eq!(at(0.1025), at(0.1), "7 of 68 units is the measured tenth");
        let middle = at(0.175).unwrap();
        assert!((middle.us - (told(90) + told(75)) / 2.0).abs() < 1e-9 && !middle.measured);
        assert_eq!((at(0.01), at(0.7)), (None, None), "beyond the points");
        assert_eq!(times.step(SHAPE, (64, 8), OF_TABLES, 0.1), None, "not in the table");
        let mean = Selector { rule: GroupRule::Mean, ..OF_TABLES };
        assert_eq!(times.step(SHAPE, (64, 64), mean, 0.1), None, "its selection was not measured");
        assert_eq!(times.shape(1024, 64, 8), None);
        assert!(times.lengths(64).contains(&32768) && times.lengths(80).is_empty());
    }

    fn record(spec: KernelSpec, op: AttnOp, block: Block, max_selected: u32, us: f64) -> TuneRecord {
        TuneRecord {
            spec,
            problem: Problem {
                op,
                dtype: Dtype::Bf16,
                head_dim: 64,
                lists: Lists::from_block_size(block.0, block.1),
                batch: 1,
                num_heads: 16,
                num_kv_heads: 16,
                seqlen_q: 4096,
                seqlen_kv: 4096,
                max_selected,
                deterministic: Deterministic::No,
            },
            sparsity: 0,
            lists: if block == (0, 0) { "dense" } else { RANDOM }.into(),
            source_hash: String::new(),
            outcome: Outcome::Ok {
                timing: Timing { median_us: us, spread_us: 0.0, samples: 1 },
                error_ratio: 0.5,
            },
        }
    }

    fn attn(op: AttnOp, block: Block, max_selected: u32, us: f64) -> TuneRecord {
        let lists = Lists::from_block_size(block.0, block.1);
        let spec = space::default_attn(op, Dtype::Bf16, 64, lists, Deterministic::No, Arch::Sm90a).unwrap();
        record(KernelSpec::Attn(spec), op, block, max_selected, us)
    }

    fn select(rule: GroupRule, budget: Budget, block: Block, max_selected: u32, us: f64) -> TuneRecord {
        let spec =
            space::select_fine(16, block.0, block.1, rule, score_of(rule), budget, Arch::Sm90a).unwrap();
        record(KernelSpec::Select(spec), AttnOp::Fwd, block, max_selected, us)
    }

    #[test]
    fn records_add_steps_and_selections_of_other_rules() {
        use AttnOp::{Bwd, Fwd};
        let fine = (64, 8);
        let mut records = vec![attn(Fwd, (0, 0), 0, 100.0), attn(Bwd, (0, 0), 0, 300.0)];
        for (width, us) in [(51, 10.0), (154, 30.0)] {
            records.push(attn(Fwd, fine, width, us));
            records.push(attn(Bwd, fine, width, 3.0 * us));
            records.push(select(GroupRule::Centre, Budget::TopK, fine, width, 5.0));
        }
        // A slower candidate does not count; a failed one neither.
        records.push(attn(Fwd, fine, 51, 99.0));
        let mut failed = attn(Bwd, fine, 51, 1.0);
        failed.outcome = Outcome::Wrong { message: "x".into() };
        records.push(failed);
        records.push(select(GroupRule::Mean, Budget::TopP, fine, 51, 8.0));
        let mut times = Times::default();
        times.add_records("records", &records);
        assert_eq!(times.dense_us(SHAPE), Some(400.0));
        let at = |rule, budget, kept| times.step(SHAPE, fine, Selector { rule, budget }, kept);
        let centre = |kept| at(GroupRule::Centre, Budget::TopK, kept);
        assert_eq!(centre(0.1), Some(StepTime { us: 45.0, measured: true }));
        let middle = centre((51.0 + 154.0) / 2.0 / 512.0).unwrap();
        assert!((middle.us - 85.0).abs() < 1e-9 && !middle.measured);
        assert_eq!(at(GroupRule::Mean, Budget::TopP, 0.1).unwrap().us, 48.0);
        assert_eq!(at(GroupRule::Mean, Budget::TopK, 0.1), None);
        // On top of a table they add, and stand for its points of the same share.
        let mut both = committed();
        let before = both.step(SHAPE, (64, 64), OF_TABLES, 0.5);
        records.extend([attn(Fwd, (64, 64), 6, 50.0), attn(Bwd, (64, 64), 6, 60.0)]);
        both.add_records("records", &records);
        assert_eq!(both.step(SHAPE, (64, 64), OF_TABLES, 0.5), before);
        assert_eq!(both.step(SHAPE, fine, OF_TABLES, 0.1), centre(0.1));
        assert_ne!(both.step(SHAPE, (64, 64), OF_TABLES, 0.1).unwrap().us, 110.0, "no selection beside it");
        assert_eq!(both.sources.len(), 2);
    }

    #[test]
    fn files_that_are_something_else_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        let mut times = Times::default();
        let error = times.read_table(&path).unwrap_err().to_string();
        assert!(error.contains("cannot read") && error.contains("--record"), "{error}");
        std::fs::write(&path, "{}\n{}").unwrap();
        let error = times.read_table(&path).unwrap_err().to_string();
        assert!(error.contains("not a table"), "{error}");
        let error = times.read_records(&path).unwrap_err().to_string();
        assert!(error.contains("line 1 is no record"), "{error}");
        assert_eq!(times, Times::default());
    }
}
