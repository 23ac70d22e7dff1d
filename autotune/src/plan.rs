//! What a run measures: cases (shapes with lists), the steps on each, and the kernels that compete in each step.

use crate::error::TuneError;
use crate::listgen::{self, ListKind, mixed_counts, uniform_count};
use crate::selection::{self, Selection};
use crate::service::Service;
use dsv_spec::{
    Arch, AttnOp, AttnSpec, Budget, Deterministic, Dtype, GroupRule, HEAD_DIMS, KernelSpec, ListOp, ListSpec,
    Lists, Problem, space,
};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::PathBuf;

/// One shape with one set of lists: self-attention of `seqlen` tokens, as many KV heads as heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Case {
    /// Columns of Q, K, V.
    pub head_dim: u16,
    /// Sequences.
    pub batch: u32,
    /// Heads.
    pub num_heads: u32,
    /// Tokens.
    pub seqlen: u32,
    /// Dense, or the block size.
    #[serde(with = "block_size")]
    pub lists: Lists,
    /// KV blocks each group keeps; 0 when dense.
    pub max_selected: u32,
    /// How the lists are made.
    pub kind: ListKind,
}

mod block_size {
    use super::Lists;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(lists: &Lists, s: S) -> Result<S::Ok, S::Error> {
        lists.block_size().serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Lists, D::Error> {
        <(u16, u16)>::deserialize(d).map(|(q, k)| Lists::from_block_size(q, k))
    }
}

/// Element type of everything the tuner measures; the shipped kernels have no other.
pub const DTYPE: Dtype = Dtype::Bf16;

impl Case {
    /// A dense case.
    pub const fn dense(head_dim: u16, num_heads: u32, seqlen: u32) -> Case {
        let (lists, kind) = (Lists::Dense, ListKind::Dense);
        Case { head_dim, batch: 1, num_heads, seqlen, lists, max_selected: 0, kind }
    }

    /// A case in which each group keeps the share `keep` of the KV blocks, rounded, at least one.
    pub fn sparse(
        head_dim: u16,
        num_heads: u32,
        seqlen: u32,
        (query_group, kv_block): (u16, u16),
        keep: f64,
        kind: ListKind,
    ) -> Case {
        let blocks = seqlen.div_ceil(kv_block.max(1) as u32);
        let max_selected = ((blocks as f64 * keep).round() as u32).clamp(1, blocks);
        let lists = Lists::Blocks { query_group, kv_block };
        Case { head_dim, batch: 1, num_heads, seqlen, lists, max_selected, kind }
    }

    /// A case whose heads keep between 50 % and 1 % of the KV blocks; `max_selected` is the width of the widest.
    pub fn mixed(head_dim: u16, num_heads: u32, seqlen: u32, (query_group, kv_block): (u16, u16)) -> Case {
        let blocks = seqlen.div_ceil(kv_block.max(1) as u32);
        let max_selected = mixed_counts(num_heads, blocks).into_iter().max().unwrap_or(1);
        let lists = Lists::Blocks { query_group, kv_block };
        Case { head_dim, batch: 1, num_heads, seqlen, lists, max_selected, kind: ListKind::Mixed }
    }

    /// The case of random lists, all of one width, that does the same work as a mixed one; another case as it is.
    pub fn uniform(self) -> Case {
        let blocks = self.problem(AttnOp::Fwd).num_kv_blocks();
        match self.kind {
            ListKind::Mixed => {
                let max_selected = uniform_count(self.num_heads, blocks);
                Case { max_selected, kind: ListKind::Random, ..self }
            }
            _ => self,
        }
    }

    /// The problem of one op.
    pub const fn problem(&self, op: AttnOp) -> Problem {
        Problem {
            op,
            dtype: DTYPE,
            head_dim: self.head_dim,
            lists: self.lists,
            batch: self.batch,
            num_heads: self.num_heads,
            num_kv_heads: self.num_heads,
            seqlen_q: self.seqlen,
            seqlen_kv: self.seqlen,
            max_selected: self.max_selected,
            deterministic: Deterministic::No,
        }
    }

    /// The sparsity bucket the case falls into.
    pub fn sparsity(&self) -> u8 {
        self.problem(AttnOp::Fwd).bucket().sparsity
    }

    /// Share of the KV blocks kept, over all heads; 1 when dense.
    pub fn kept(&self) -> f64 {
        listgen::kept(&self.problem(AttnOp::Fwd), self.kind.name())
    }

    /// The case in a few words; what `--only` looks into.
    pub fn label(&self) -> String {
        let batch = if self.batch == 1 { String::new() } else { format!("b{} ", self.batch) };
        let shape = format!("{batch}d{} h{} s{}", self.head_dim, self.num_heads, self.seqlen);
        match self.lists.block_size() {
            (0, 0) => format!("{shape} dense"),
            (qg, kb) => format!("{shape} qg{qg} kb{kb} sp{} {}", self.sparsity(), self.kind.name()),
        }
    }

    /// Multiply-adds count twice: 4 B H S^2 D kept in the forward, 2.5 times that in the backward.
    pub fn flops(&self, op: AttnOp) -> f64 {
        flops(&self.problem(op), self.kind.name())
    }
}

/// Floating-point operations of one call on the pairs kept by lists of a kind: 4 B H Sq Skv D kept forward, 2.5 times
/// that backward.
pub fn flops(p: &Problem, lists: &str) -> f64 {
    let kept = listgen::kept(p, lists);
    let pairs = p.batch as f64 * p.num_heads as f64 * p.seqlen_q as f64 * p.seqlen_kv as f64 * kept;
    let factor = if p.op == AttnOp::Fwd { 4.0 } else { 10.0 };
    factor * pairs * p.head_dim as f64
}

/// What is measured of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// `attn_fwd`.
    Forward,
    /// `attn_bwd_dq`, timed as a whole deterministic backward with the default `attn_bwd`.
    BackwardDq,
    /// `attn_bwd` with its helpers: the whole backward.
    Backward,
    /// `kv_select` or `kv_select_fine`: choosing lists of this width from low-rank queries and keys.
    Select,
    /// `kv_invert` of the case's lists.
    Invert,
}

impl Step {
    /// Every step.
    pub const ALL: [Step; 5] = [Step::Forward, Step::BackwardDq, Step::Backward, Step::Select, Step::Invert];

    /// The spelling on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Step::Forward => "fwd",
            Step::BackwardDq => "dq",
            Step::Backward => "bwd",
            Step::Select => "select",
            Step::Invert => "invert",
        }
    }

    /// The op in the records' problem: selection belongs to the forward, inversion to the backward.
    pub const fn op(self) -> AttnOp {
        match self {
            Step::Forward | Step::Select => AttnOp::Fwd,
            Step::BackwardDq => AttnOp::BwdDq,
            Step::Backward | Step::Invert => AttnOp::Bwd,
        }
    }
}

/// How much a run measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Two lengths, 90 % sparsity, head_dim 64 and 128, under two minutes.
    Quick,
    /// Every length and sparsity the table distinguishes and a single GPU's memory of patience allows, two of each for
    /// head_dim 96 and 256; under eight.
    Full,
    /// What the command line of `bench` names.
    Bench,
    /// The tables of the project's figures ([`crate::tables`]).
    Tables,
}

impl Mode {
    /// The hard limit of a run in seconds, where the command line gives none.
    pub const fn time_limit_s(self) -> f64 {
        match self {
            Mode::Quick => 115.0,
            Mode::Full | Mode::Bench => 470.0,
            Mode::Tables => 210.0,
        }
    }

    /// Microseconds of timed launches spent on one step of one case.
    pub const fn budget_us(self) -> f64 {
        match self {
            Mode::Quick => 400e3,
            Mode::Full => 300e3,
            Mode::Bench => 1000e3,
            Mode::Tables => 250e3,
        }
    }
}

/// Everything a run is about, written down when it begins so that it can be resumed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// How much.
    pub mode: Mode,
    /// The filter it was begun with.
    pub only: Option<String>,
    /// Cases in the order they are measured.
    pub cases: Vec<Case>,
    /// Steps measured of each.
    pub steps: Vec<Step>,
    /// The competing kernels of attention; empty means every feasible candidate.
    pub kernels: Vec<KernelSpec>,
    /// The forms of the backward measured.
    #[serde(default = "both_forms")]
    pub forms: Vec<Deterministic>,
    /// Instead of candidates the kernels that a table serves, where this says which.
    #[serde(default)]
    pub served: Option<ServedBy>,
    /// The architecture whose kernels are measured, where it is not the GPU's own.
    #[serde(default)]
    pub arch: Option<Arch>,
    /// Selections measured beside [`Step::Select`], each by every kernel that makes it.
    #[serde(default)]
    pub selections: Vec<Selection>,
}

/// The table whose kernels are measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServedBy {
    /// The committed one of the GPU.
    Committed,
    /// This file.
    File(PathBuf),
}

/// The form that may differ between runs, and the one that may not.
pub fn both_forms() -> Vec<Deterministic> {
    Deterministic::ALL.to_vec()
}

/// Sparsities a full run measures, percent of KV skipped.
pub const FULL_SPARSITIES: [u8; 4] = [50, 75, 90, 95];
/// (length, heads) a full run measures, the most telling first.
pub const FULL_SHAPES: [(u32, u32); 5] = [(32768, 16), (4096, 16), (16384, 16), (65536, 8), (8192, 16)];
/// Head dims a full run measures everywhere, and `--quick` measures alone.
pub const FULL_HEAD_DIMS: [u16; 2] = [128, 64];
/// Lengths at which a full run measures the other shipped head dims, over random lists of [`FEW_SPARSITIES`]: every length
/// would not fit into eight minutes, and others are served by the nearest line.
pub const FEW_LENGTHS: [u32; 2] = [32768, 4096];
/// Sparsities of [`FEW_LENGTHS`].
pub const FEW_SPARSITIES: [u8; 2] = [50, 90];
/// (length, heads, sparsity) of the longest random lists of a full run: a head is far larger than L2 there, and other kernels win.
pub const LONGEST: (u32, u32, u8) = (131_072, 4, 90);

impl Plan {
    /// The cases of `--quick` or of a full run; `only` keeps those whose label or step holds every one of its words.
    ///
    /// # Errors
    /// A filter that keeps nothing.
    pub fn tune(mode: Mode, only: Option<&str>) -> Result<Plan, TuneError> {
        let quick = mode == Mode::Quick;
        let shapes = if quick { &FULL_SHAPES[..2] } else { &FULL_SHAPES[..] };
        let mut cases = Vec::new();
        let lists = |head_dim, heads, seqlen, kinds: &[ListKind], sparsities: &[u8]| {
            let mut cases = Vec::new();
            for &kind in kinds {
                for block_size in space::SHIPPED_BLOCK_SIZES {
                    for &sparsity in sparsities {
                        let keep = 1.0 - sparsity as f64 / 100.0;
                        cases.push(Case::sparse(head_dim, heads, seqlen, block_size, keep, kind));
                    }
                }
            }
            cases
        };
        let mut add = |head_dim, heads, seqlen, kinds: &[ListKind], sparsities: &[u8]| {
            cases.push(Case::dense(head_dim, heads, seqlen));
            cases.extend(lists(head_dim, heads, seqlen, kinds, sparsities));
        };
        let (kinds, sparsities): (&[ListKind], &[u8]) = match quick {
            true => (&[ListKind::Random], &[90]),
            false => (&[ListKind::Random, ListKind::Clustered], &FULL_SPARSITIES),
        };
        for &(seqlen, heads) in shapes {
            for head_dim in FULL_HEAD_DIMS {
                add(head_dim, heads, seqlen, kinds, sparsities);
            }
            if quick || !FEW_LENGTHS.contains(&seqlen) {
                continue;
            }
            for head_dim in space::SHIPPED_HEAD_DIMS.into_iter().filter(|d| !FULL_HEAD_DIMS.contains(d)) {
                let heads = if head_dim > 128 { heads / 2 } else { heads };
                add(head_dim, heads, seqlen, &[ListKind::Random], &FEW_SPARSITIES);
            }
        }
        if !quick {
            let (seqlen, heads, sparsity) = LONGEST;
            for head_dim in FULL_HEAD_DIMS {
                cases.extend(lists(head_dim, heads, seqlen, &[ListKind::Random], &[sparsity]));
            }
        }
        let mut plan = Plan {
            mode,
            only: only.map(str::to_string),
            cases,
            steps: Step::ALL.to_vec(),
            kernels: Vec::new(),
            forms: both_forms(),
            served: None,
            arch: None,
            selections: Vec::new(),
        };
        if let Some(only) = only {
            let words: Vec<&str> = only.split([' ', ',']).filter(|w| !w.is_empty()).collect();
            let named: Vec<Step> = Step::ALL.into_iter().filter(|s| words.contains(&s.name())).collect();
            if !named.is_empty() {
                plan.steps = named;
            }
            let words: Vec<&str> =
                words.into_iter().filter(|w| Step::ALL.iter().all(|s| s.name() != *w)).collect();
            let example = plan.cases[plan.cases.len() - 1].label();
            plan.cases.retain(|case| {
                let label = case.label();
                words.iter().all(|word| label.split(' ').any(|part| part == *word))
            });
            if plan.cases.is_empty() {
                return Err(TuneError::option(
                    "--only",
                    format!("'{only}' (no case has all these words)"),
                    format!(
                        "words of a case or steps, for example: d128 s32768 kb128 sp90 bwd; a case is '{example}'"
                    ),
                ));
            }
        }
        Ok(plan)
    }

    /// Which kernels compete in which step of which case, in the order they are measured. Selection and inversion do
    /// not depend on head_dim: they are measured once for each (length, heads, block size, width, kind).
    pub fn contests(&self, arch: Arch) -> Vec<Contest> {
        let contests = self.contests_of(arch, |case, step| self.attention(case, step.op(), arch));
        self.with_selections(contests, arch)
    }

    /// As [`Plan::contests`], with the one kernel that a table serves for each form in the place of the candidates.
    /// Of a case that nothing serves, nothing is measured but what is asked for by [`Plan::selections`].
    pub fn contests_served(&self, service: &Service) -> Vec<Contest> {
        let mut contests = self.contests_of(service.arch(), |case, step| {
            let mut specs: Vec<KernelSpec> = Vec::new();
            for &deterministic in &self.forms {
                let problem = Problem { deterministic, ..case.problem(step.op()) };
                specs.extend(service.serve(&problem).map(|found| found.kernel));
            }
            let mut seen = HashSet::new();
            specs.retain(|spec| seen.insert(*spec));
            specs
        });
        contests.retain(|c| service.serve(&c.case.problem(AttnOp::Fwd)).is_some());
        self.with_selections(contests, service.arch())
    }

    /// Adds what [`Plan::selections`] asks for and is not there yet, each after the other steps of its case.
    fn with_selections(&self, mut contests: Vec<Contest>, arch: Arch) -> Vec<Contest> {
        let key = |case: &Case, spec: &KernelSpec| (Case { head_dim: 0, ..*case }, *spec);
        let mut seen: HashSet<_> = contests
            .iter()
            .filter(|c| c.step == Step::Select)
            .flat_map(|c| c.specs.iter().map(move |spec| key(&c.case, spec)))
            .collect();
        for selection in &self.selections {
            let case = selection.case;
            let mut specs: Vec<KernelSpec> =
                selection.kernels(arch).into_iter().map(KernelSpec::Select).collect();
            specs.retain(|spec| seen.insert(key(&case, spec)));
            if !specs.is_empty() {
                let at = contests.iter().rposition(|c| c.case == case).map_or(contests.len(), |at| at + 1);
                contests.insert(at, Contest { case, step: Step::Select, specs });
            }
        }
        contests
    }

    fn contests_of(&self, arch: Arch, attention: impl Fn(&Case, Step) -> Vec<KernelSpec>) -> Vec<Contest> {
        let mut seen = HashSet::new();
        let mut contests = Vec::new();
        for &case in &self.cases {
            for &step in &self.steps {
                let specs = match step {
                    Step::Forward | Step::BackwardDq | Step::Backward => attention(&case, step),
                    Step::Select | Step::Invert => {
                        let key = (step, Case { head_dim: 0, ..case });
                        // How lists are clustered changes nothing about choosing them, and no kernel reads the
                        // inverse of lists of small units.
                        let wanted = match step {
                            Step::Invert => !case.lists.is_dense() && !case.lists.is_gather(),
                            _ => !case.lists.is_dense() && case.kind != ListKind::Clustered,
                        };
                        if !wanted || !seen.insert(key) {
                            continue;
                        }
                        if step == Step::Invert {
                            vec![KernelSpec::List(ListSpec { op: ListOp::Invert, arch })]
                        } else {
                            selection::of_lists(&case, arch).map(KernelSpec::Select).into_iter().collect()
                        }
                    }
                };
                if !specs.is_empty() {
                    contests.push(Contest { case, step, specs });
                }
            }
        }
        contests
    }

    fn attention(&self, case: &Case, op: AttnOp, arch: Arch) -> Vec<KernelSpec> {
        if self.kernels.is_empty() {
            let wanted = |s: &AttnSpec| op != AttnOp::Bwd || self.forms.contains(&s.deterministic());
            let candidates = space::candidates(op, DTYPE, case.head_dim, case.lists, arch);
            return candidates.into_iter().filter(wanted).map(KernelSpec::Attn).collect();
        }
        let serves = |spec: &&KernelSpec| {
            matches!(spec, KernelSpec::Attn(s)
                if (s.op(), s.dtype(), s.head_dim(), s.lists(), s.arch()) == (op, DTYPE, case.head_dim, case.lists, arch))
        };
        self.kernels.iter().filter(serves).copied().collect()
    }
}

/// The kernels that compete in one step of one case.
#[derive(Clone, Debug, PartialEq)]
pub struct Contest {
    /// The case.
    pub case: Case,
    /// The step.
    pub step: Step,
    /// The kernels, best guess first.
    pub specs: Vec<KernelSpec>,
}

/// What `bench` was asked for: the cross product of its lists.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchRequest {
    /// Columns of Q, K, V.
    pub head_dims: Vec<u16>,
    /// Tokens.
    pub seqlens: Vec<u32>,
    /// Heads.
    pub num_heads: u32,
    /// Sequences.
    pub batch: u32,
    /// `dense`, or `QUERY_GROUPxKV_BLOCK`.
    pub blocks: Vec<String>,
    /// Shares kept, 0 to 1.
    pub keeps: Vec<f64>,
    /// How lists are made.
    pub kinds: Vec<ListKind>,
    /// Steps.
    pub steps: Vec<Step>,
    /// Names of kernels; empty means every candidate.
    pub kernels: Vec<String>,
    /// Forms of the backward.
    pub forms: Vec<Deterministic>,
    /// Only the kernels that this table serves.
    pub served: Option<ServedBy>,
    /// The architecture whose kernels are measured; none means the GPU's own, or that of `kernels`.
    pub arch: Option<Arch>,
    /// Which of a group's low-rank queries are scored; for the step `select`.
    pub rules: Vec<GroupRule>,
    /// What says how many units a group keeps; for the step `select`.
    pub budgets: Vec<Budget>,
}

impl BenchRequest {
    /// The plan of the request.
    ///
    /// # Errors
    /// The first value no kernel can have, with what is allowed.
    pub fn plan(&self) -> Result<Plan, TuneError> {
        let positive = |what, value: u32| {
            if value == 0 { Err(TuneError::option(what, value, "1 or more")) } else { Ok(()) }
        };
        positive("--heads", self.num_heads)?;
        positive("--batch", self.batch)?;
        let mut kernels = Vec::new();
        for name in &self.kernels {
            let spec: KernelSpec = name.parse().map_err(|e: dsv_spec::NameError| {
                TuneError::option("--kernel", name, format!("the name of a kernel of attention: {e}"))
            })?;
            match spec {
                KernelSpec::Attn(s)
                    if matches!(s.op(), AttnOp::Fwd | AttnOp::Bwd | AttnOp::BwdDq) && s.dtype() == DTYPE =>
                {
                    kernels.push(spec);
                }
                _ => {
                    return Err(TuneError::option(
                        "--kernel",
                        name,
                        format!(
                            "kernels of attn_fwd, attn_bwd and attn_bwd_dq in {DTYPE}; the others are --op select and --op invert"
                        ),
                    ));
                }
            }
        }
        let mut cases = Vec::new();
        for &seqlen in &self.seqlens {
            positive("--seqlen", seqlen)?;
            for &head_dim in &self.head_dims {
                // Kernels that do not ship are rendered.
                if !HEAD_DIMS.contains(&head_dim) {
                    let allowed = HEAD_DIMS.map(|d| d.to_string()).join(", ");
                    return Err(TuneError::option("--head-dim", head_dim, allowed));
                }
                for block in &self.blocks {
                    match parse_block(block)? {
                        None => cases.push(Case::dense(head_dim, self.num_heads, seqlen)),
                        Some(size) => {
                            for &kind in &self.kinds {
                                if kind == ListKind::Mixed {
                                    cases.push(Case::mixed(head_dim, self.num_heads, seqlen, size));
                                    continue;
                                }
                                for &keep in &self.keeps {
                                    if !(keep > 0.0 && keep <= 1.0) {
                                        return Err(TuneError::option("--keep", keep, "above 0, at most 1"));
                                    }
                                    cases.push(Case::sparse(
                                        head_dim,
                                        self.num_heads,
                                        seqlen,
                                        size,
                                        keep,
                                        kind,
                                    ));
                                }
                            }
                        }
                    }
                }
            }
        }
        for case in &mut cases {
            case.batch = self.batch;
        }
        // Kernels of one architecture say which.
        let arch = self.arch.or_else(|| kernels.first().map(KernelSpec::arch));
        if self.served.is_some() && !kernels.is_empty() {
            return Err(TuneError::option(
                "--kernel",
                self.kernels.join(", "),
                "no --served beside it: either the kernels named, or those a table serves",
            ));
        }
        // Selection is asked for by rule and budget: no step of the cases' own beside it.
        let mut selections = Vec::new();
        if self.steps.contains(&Step::Select) {
            for &case in cases.iter().filter(|case| !case.lists.is_dense()) {
                for &rule in &self.rules {
                    selections.extend(self.budgets.iter().map(|&budget| Selection { case, rule, budget }));
                }
            }
        }
        let plan = Plan {
            mode: Mode::Bench,
            only: None,
            cases,
            steps: self.steps.iter().copied().filter(|&step| step != Step::Select).collect(),
            kernels,
            forms: self.forms.clone(),
            served: self.served.clone(),
            arch,
            selections,
        };
        let unused: Vec<String> = plan
            .kernels
            .iter()
            .filter(|k| {
                arch != Some(k.arch()) || !plan.contests(k.arch()).iter().any(|c| c.specs.contains(k))
            })
            .map(|k| k.name())
            .collect();
        if !unused.is_empty() {
            return Err(TuneError::option(
                "--kernel",
                unused.join(", "),
                "kernels of one architecture (--arch) whose op, head_dim and block size are among --op, --head-dim and --block",
            ));
        }
        let nothing = plan.steps.is_empty() && plan.selections.is_empty();
        if plan.cases.is_empty() || nothing || plan.forms.is_empty() {
            return Err(TuneError::option(
                "the request",
                "nothing",
                "at least one length, block size, kind of lists, op and form; lists to be chosen are not dense",
            ));
        }
        Ok(plan)
    }
}

/// Block sizes that are measured and not shipped.
const ON_DEMAND: [(u16, u16); 2] = [(64, 16), (128, 16)];

/// `dense`, or `QUERY_GROUPxKV_BLOCK`.
pub(crate) fn parse_block(text: &str) -> Result<Option<(u16, u16)>, TuneError> {
    if text == "dense" {
        return Ok(None);
    }
    let size = text.split_once('x').and_then(|(q, k)| Some((q.parse().ok()?, k.parse().ok()?)));
    let known = || space::SHIPPED_BLOCK_SIZES.into_iter().chain(space::SHIPPED_GATHER).chain(ON_DEMAND);
    match size {
        Some(size) if known().any(|s| s == size) => Ok(Some(size)),
        _ => {
            let sizes: Vec<String> = known().map(|(q, k)| format!("{q}x{k}")).collect();
            Err(TuneError::option("--block", text, format!("dense, {}", sizes.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tuned_case_falls_into_the_bucket_it_is_for() {
        for mode in [Mode::Quick, Mode::Full] {
            let plan = Plan::tune(mode, None).unwrap();
            for case in &plan.cases {
                let bucket = case.problem(AttnOp::Bwd).bucket();
                assert_eq!(bucket.seqlen, case.seqlen, "{}", case.label());
                assert!(case.lists.is_dense() == (bucket.sparsity == 0), "{}", case.label());
            }
            let buckets: HashSet<_> = plan
                .cases
                .iter()
                .filter(|c| c.kind != ListKind::Clustered)
                .map(|c| c.problem(AttnOp::Fwd).bucket())
                .collect();
            let wanted = plan.cases.iter().filter(|c| c.kind != ListKind::Clustered).count();
            assert_eq!(buckets.len(), wanted, "two cases of {mode:?} share a bucket");
        }
    }

    #[test]
    fn sizes_of_the_plans() {
        let contests = |mode| Plan::tune(mode, None).unwrap().contests(Arch::Sm90a);
        let quick = contests(Mode::Quick);
        assert_eq!(quick.iter().filter(|c| c.step == Step::Forward).count(), 12);
        // Selection and inversion once for each length and block size, though there are two head dims.
        assert_eq!(quick.iter().filter(|c| c.step == Step::Select).count(), 4);
        let full = contests(Mode::Full);
        let backwards = |of: &dyn Fn(u16) -> bool| {
            full.iter().filter(|c| c.step == Step::Backward && of(c.case.head_dim)).count()
        };
        assert_eq!(backwards(&|d| FULL_HEAD_DIMS.contains(&d)), 2 * (5 * (1 + 2 * 2 * 4) + 2));
        assert_eq!(backwards(&|d| [96, 256].contains(&d)), 2 * 2 * (1 + 2 * 2));
        assert!(full.iter().all(|c| !c.specs.is_empty()));
        assert!(full.iter().all(|c| c.case.head_dim != 256 || c.case.num_heads == 8));
        assert!(full.iter().any(|c| c.case.seqlen == 65536 && c.case.num_heads == 8));
    }

    #[test]
    fn only_keeps_what_has_every_word() {
        let plan = Plan::tune(Mode::Full, Some("d128 s32768,kb128 sp90 bwd")).unwrap();
        assert_eq!(plan.steps, [Step::Backward]);
        assert_eq!(plan.cases.len(), 2, "random and clustered");
        assert!(plan.cases.iter().all(|c| c.label().starts_with("d128 h16 s32768 qg128 kb128 sp90")));
        let plan = Plan::tune(Mode::Full, Some("d96 s32768 dense")).unwrap();
        assert_eq!(plan.cases, [Case::dense(96, 16, 32768)]);
        let error = Plan::tune(Mode::Quick, Some("d72")).unwrap_err().to_string();
        assert!(error.contains("--only 'd72'") && error.contains("allowed:"), "{error}");
    }

    #[test]
    fn bad_bench_requests_say_what_is_allowed() {
        let good = BenchRequest {
            head_dims: vec![128],
            seqlens: vec![1000],
            num_heads: 4,
            batch: 2,
            blocks: vec!["dense".into(), "128x128".into()],
            keeps: vec![0.1],
            kinds: vec![ListKind::Random],
            steps: vec![Step::Forward],
            kernels: vec![],
            forms: both_forms(),
            served: None,
            arch: None,
            rules: vec![GroupRule::Centre],
            budgets: vec![Budget::TopK],
        };
        let plan = good.plan().unwrap();
        assert_eq!(plan.cases.len(), 2);
        assert_eq!((plan.cases[1].batch, plan.cases[1].max_selected), (2, 1));
        let expect = |request: BenchRequest, words: &[&str]| {
            let error = request.plan().unwrap_err().to_string();
            assert!(words.iter().all(|w| error.contains(w)), "{error}");
        };
        expect(
            BenchRequest { head_dims: vec![72], ..good.clone() },
            &["--head-dim 72", "64, 80, 96, 128, 256"],
        );
        let rendered = BenchRequest { head_dims: vec![80], ..good.clone() }.plan().unwrap();
        assert!(rendered.contests(Arch::Sm90a).iter().all(|contest| !contest.specs.is_empty()));
        expect(
            BenchRequest { blocks: vec!["63x64".into()], ..good.clone() },
            &["--block 63x64", "dense, 64x64, 128x128, 64x1, 64x8, 128x1, 128x8"],
        );
        expect(BenchRequest { keeps: vec![1.5], ..good.clone() }, &["--keep 1.5", "at most 1"]);
        expect(BenchRequest { num_heads: 0, ..good.clone() }, &["--heads 0"]);
        expect(
            BenchRequest { kernels: vec!["attn_fwd".into()], ..good.clone() },
            &["--kernel attn_fwd", "dsv-codegen list"],
        );
        let other = space::candidates(AttnOp::Bwd, DTYPE, 128, Lists::Dense, Arch::Sm90a)[0];
        let name = KernelSpec::Attn(other).name();
        expect(BenchRequest { kernels: vec![name.clone()], ..good.clone() }, &[&name, "--op"]);
        let own = BenchRequest { steps: vec![Step::Backward], kernels: vec![name], ..good.clone() };
        assert_eq!(own.plan().unwrap().contests(Arch::Sm90a).len(), 1);
        // Another architecture's kernels, all or by name, but not those of two.
        let all = BenchRequest { kernels: vec![], arch: Some(Arch::Sm80), ..own.clone() }.plan().unwrap();
        assert_eq!(all.arch, Some(Arch::Sm80));
        let contests = all.contests(Arch::Sm80);
        assert!(
            contests.iter().all(|c| c.specs.iter().all(|s| s.arch() == Arch::Sm80)) && contests.len() == 2
        );
        let sm80 = contests[0].specs[0].name();
        let named = BenchRequest { kernels: vec![sm80.clone()], ..own.clone() };
        assert_eq!(named.plan().unwrap().arch, Some(Arch::Sm80));
        let two = [own.kernels.clone(), vec![sm80.clone()]].concat();
        expect(BenchRequest { kernels: two, ..own.clone() }, &[&sm80, "of one architecture"]);
        let both = BenchRequest { served: Some(ServedBy::Committed), ..own };
        expect(both, &["--kernel attn_bwd", "no --served"]);
        // Lists of tokens are chosen, and not inverted.
        let steps = Step::ALL.to_vec();
        let tokens = BenchRequest { blocks: vec!["128x1".into()], steps, ..good.clone() }.plan().unwrap();
        let steps: Vec<Step> = tokens.contests(Arch::Sm90a).iter().map(|c| c.step).collect();
        assert_eq!(steps, [Step::Forward, Step::Backward, Step::Select]);
        let chosen = BenchRequest {
            head_dims: vec![64, 128],
            blocks: ["64x1", "64x16", "64x64", "dense"].map(String::from).to_vec(),
            steps: vec![Step::Select],
            rules: vec![GroupRule::Centre, GroupRule::Mass4],
            budgets: vec![Budget::TopK, Budget::TopP],
            ..good.clone()
        };
        let specs = |plan: &Plan| -> Vec<KernelSpec> {
            plan.contests(Arch::Sm90a).into_iter().flat_map(|c| c.specs).collect()
        };
        let found = specs(&chosen.plan().unwrap());
        // Once for both head dims: three sizes, two rules, two budgets, and kv_select.
        assert_eq!(found.len(), 3 * 2 * 2 + 1, "{found:?}");
        assert!(found.iter().all(|s| matches!(s, KernelSpec::Select(_))));
        expect(BenchRequest { blocks: vec!["dense".into()], ..chosen }, &["not dense"]);
        // Mixed lists have a sparsity of their own: one case, whatever is kept.
        let kinds = BenchRequest {
            kinds: vec![ListKind::Random, ListKind::Mixed],
            keeps: vec![0.1, 0.2],
            seqlens: vec![4096],
            ..good
        };
        let cases = kinds.plan().unwrap().cases;
        let labels: Vec<String> = cases.iter().map(Case::label).collect();
        assert_eq!(
            labels,
            [
                "b2 d128 h4 s4096 dense",
                "b2 d128 h4 s4096 qg128 kb128 sp90 random",
                "b2 d128 h4 s4096 qg128 kb128 sp80 random",
                "b2 d128 h4 s4096 qg128 kb128 sp50 mixed"
            ]
        );
    }

    #[test]
    fn forms_choose_among_backwards() {
        let all = Plan::tune(Mode::Quick, Some("d128 s4096 kb64 bwd")).unwrap();
        let only = |form| Plan { forms: vec![form], ..all.clone() }.contests(Arch::Sm90a).remove(0).specs;
        let (fast, same) = (only(Deterministic::No), only(Deterministic::Yes));
        assert!(fast.iter().all(|s| s.name().contains("_nondet_")) && !fast.is_empty());
        assert!(same.iter().all(|s| s.name().contains("_det_")) && !same.is_empty());
        assert_eq!(all.contests(Arch::Sm90a)[0].specs.len(), fast.len() + same.len());
    }

    #[test]
    fn the_served_kernels_are_the_only_ones() {
        let service = Service::defaults("some GPU", Arch::Sm90a);
        let plan = Plan { served: Some(ServedBy::Committed), ..Plan::tune(Mode::Quick, None).unwrap() };
        let contests = plan.contests_served(&service);
        assert_eq!(contests.len(), plan.contests(Arch::Sm90a).len());
        for contest in &contests {
            let wanted = if contest.step == Step::Backward { 2 } else { 1 };
            assert_eq!(contest.specs.len(), wanted, "{} {}", contest.case.label(), contest.step.name());
        }
    }
}
