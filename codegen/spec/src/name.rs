//! One grammar per op family; `FromStr` rejects what `Display` would not print.

use crate::attn::{AttnOp, AttnSpec, AttnTile, Lists, Schedule, Sparsity};
use crate::error::NameError;
use crate::lists::{ListOp, ListSpec};
use crate::pointwise::{PointwiseOp, PointwiseSpec};
use crate::select::{BlockScore, Budget, GroupRule, SelectOp, SelectSpec, SelectTile};
use crate::types::{Arch, Deterministic, Dtype};
use crate::{KernelSpec, SpecError};
use std::fmt;
use std::str::FromStr;

impl fmt::Display for KernelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelSpec::Attn(s) => {
                let (qg, kb) = s.lists().block_size();
                let AttnTile { block_m, block_n, groups, consumers, stages, cluster, schedule } = s.tile();
                write!(f, "{}_{}_d{}_qg{qg}_kb{kb}_", s.op(), s.dtype(), s.head_dim())?;
                match s.sparsity() {
                    Sparsity::Any => write!(f, "spany")?,
                    Sparsity::Percent(p) => write!(f, "sp{p}")?,
                }
                write!(f, "_m{block_m}n{block_n}_g{groups}c{consumers}s{stages}x{cluster}_{schedule}")?;
                write!(f, "_{}_{}", s.deterministic(), s.arch())
            }
            KernelSpec::Select(s) => {
                let SelectTile { groups, warps } = s.tile();
                write!(f, "{}_{}_r{}_qg{}_kb{}", s.op(), s.dtype(), s.rank(), s.query_group(), s.kv_block())?;
                write!(f, "_{}_{}", s.group_rule(), s.block_score())?;
                if s.op() == SelectOp::Fine {
                    write!(f, "_{}", s.budget())?;
                }
                write!(f, "_g{groups}w{warps}_{}", s.arch())
            }
            KernelSpec::List(s) => write!(f, "{}_{}", s.op, s.arch),
            KernelSpec::Pointwise(s) => {
                write!(f, "{}_{}_d{}", s.op, s.dtype, s.dim)?;
                if s.op.bakes_rank() {
                    write!(f, "_r{}", s.rank)?;
                }
                write!(f, "_v{}_{}", s.vector, s.arch)
            }
        }
    }
}

/// The fields of a name after the op, read from left to right.
struct Fields<'a> {
    name: &'a str,
    rest: std::str::Split<'a, char>,
}

impl<'a> Fields<'a> {
    fn fail(&self, reason: impl Into<String>) -> NameError {
        NameError::Grammar { name: self.name.to_string(), reason: reason.into() }
    }

    fn next(&mut self, what: &str) -> Result<&'a str, NameError> {
        self.rest.next().ok_or_else(|| self.fail(format!("it ends where {what} should be")))
    }

    fn token<T>(&mut self, what: &str, read: impl Fn(&str) -> Option<T>) -> Result<T, NameError> {
        let text = self.next(what)?;
        read(text).ok_or_else(|| self.fail(format!("'{text}' is no {what}")))
    }

    /// Numbers behind fixed letters, such as `m128n64`.
    fn numbers<const K: usize>(&mut self, what: &str, letters: [&str; K]) -> Result<[u16; K], NameError> {
        let text = self.next(what)?;
        let bad = || {
            self.fail(format!(
                "'{text}' is no {what} (expected {})",
                letters.map(|l| format!("{l}<number>")).concat()
            ))
        };
        let mut out = [0u16; K];
        let mut rest = text;
        for (slot, letter) in out.iter_mut().zip(letters) {
            rest = rest.strip_prefix(letter).ok_or_else(bad)?;
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            *slot = rest[..digits].parse().map_err(|_| bad())?;
            rest = &rest[digits..];
        }
        if rest.is_empty() { Ok(out) } else { Err(bad()) }
    }

    fn arch(&mut self) -> Result<Arch, NameError> {
        self.token("arch", |t| Arch::ALL.iter().copied().find(|a| a.name() == t))
    }
}

impl FromStr for KernelSpec {
    type Err = NameError;

    fn from_str(name: &str) -> Result<KernelSpec, NameError> {
        let grammar =
            |reason: &str| NameError::Grammar { name: name.to_string(), reason: reason.to_string() };
        // An op's name is a prefix of another's (attn_bwd, attn_bwd_prep): the longest that fits is meant.
        let ops = AttnOp::ALL.iter().map(|o| o.name()).chain(ListOp::ALL.iter().map(|o| o.name()));
        let ops = ops.chain(PointwiseOp::ALL.iter().map(|o| o.name()));
        let ops = ops.chain(SelectOp::ALL.iter().map(|o| o.name()));
        let op = ops
            .filter(|op| name.strip_prefix(op).is_some_and(|rest| rest.starts_with('_')))
            .max_by_key(|op| op.len())
            .ok_or_else(|| grammar("it does not begin with the name of an op"))?;
        let mut fields = Fields { name, rest: name[op.len() + 1..].split('_') };
        let infeasible = |source: SpecError| NameError::Infeasible { name: name.to_string(), source };

        let spec = if let Some(op) = AttnOp::from_name(op) {
            let dtype = fields.token("dtype", Dtype::from_name)?;
            let [head_dim] = fields.numbers("head_dim", ["d"])?;
            let [query_group] = fields.numbers("query_group", ["qg"])?;
            let [kv_block] = fields.numbers("kv_block", ["kb"])?;
            let sparsity = fields.token("sparsity", |t| match t.strip_prefix("sp")? {
                "any" => Some(Sparsity::Any),
                number => number.parse().ok().map(Sparsity::Percent),
            })?;
            let [block_m, block_n] = fields.numbers("tile", ["m", "n"])?;
            let [groups, consumers, stages, cluster] =
                fields.numbers("tile", ["g", "c", "s", "x"])?.map(|v| v.min(255) as u8);
            let schedule = fields.token("schedule", Schedule::from_name)?;
            let deterministic = fields.token("determinism", Deterministic::from_name)?;
            let arch = fields.arch()?;
            let tile = AttnTile { block_m, block_n, groups, consumers, stages, cluster, schedule };
            let lists = Lists::from_block_size(query_group, kv_block);
            KernelSpec::Attn(
                AttnSpec::new(op, dtype, head_dim, lists, sparsity, tile, deterministic, arch)
                    .map_err(infeasible)?,
            )
        } else if let Some(op) = ListOp::from_name(op) {
            KernelSpec::List(ListSpec { op, arch: fields.arch()? })
        } else if let Some(op) = PointwiseOp::from_name(op) {
            let dtype = fields.token("dtype", Dtype::from_name)?;
            let [dim] = fields.numbers("dim", ["d"])?;
            let [rank] = if op.bakes_rank() { fields.numbers("rank", ["r"])? } else { [0] };
            let [vector] = fields.numbers("vector", ["v"])?;
            let arch = fields.arch()?;
            let (rank, vector) = (rank.min(255) as u8, vector.min(255) as u8);
            KernelSpec::Pointwise(PointwiseSpec::new(op, dtype, dim, rank, vector, arch).map_err(infeasible)?)
        } else if let Some(op) = SelectOp::from_name(op) {
            let dtype = fields.token("dtype", Dtype::from_name)?;
            let [rank] = fields.numbers("rank", ["r"])?;
            let [query_group] = fields.numbers("query_group", ["qg"])?;
            let [kv_block] = fields.numbers("kv_block", ["kb"])?;
            let group_rule = fields.token("group rule", GroupRule::from_name)?;
            let block_score = fields.token("block score", BlockScore::from_name)?;
            let budget = match op {
                SelectOp::Rows => Budget::TopK,
                SelectOp::Fine => fields.token("budget", Budget::from_name)?,
            };
            let [groups, warps] = fields.numbers("tile", ["g", "w"])?.map(|v| v.min(255) as u8);
            let arch = fields.arch()?;
            let tile = SelectTile { groups, warps };
            KernelSpec::Select(
                SelectSpec::new(
                    op,
                    dtype,
                    rank.min(255) as u8,
                    query_group,
                    kv_block,
                    group_rule,
                    block_score,
                    budget,
                    tile,
                    arch,
                )
                .map_err(infeasible)?,
            )
        } else {
            return Err(grammar("it begins with an op that no family of kernels has"));
        };
        if spec.to_string() != name {
            return Err(grammar(&format!("the kernel it describes is named {spec}")));
        }
        Ok(spec)
    }
}
