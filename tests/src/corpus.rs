//! The corpus: `cases/attention.toml`, embedded, and its expansion into variants.

use dsv_reference::attention::AttnShape;
use dsv_spec::{AttnOp, Deterministic, Dtype, Lists, Problem, space};
use serde::Deserialize;

/// Which blocks each group lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ListKind {
    /// No lists: every key.
    Dense,
    /// Every block.
    Full,
    /// Nothing.
    Empty,
    /// One random block.
    One,
    /// The last block, which may be short.
    Last,
    /// Counts 0, 1, 0, 1, ... by group.
    Alternate,
    /// By group: everything, nothing, one, then random counts.
    Extremes,
    /// Random counts from nothing to everything.
    Random,
    /// Three random blocks.
    Three,
    /// A fifth of the blocks, most of them shared with the neighbouring groups.
    Clustered,
}

/// What the numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Values {
    /// Standard normal.
    Normal,
    /// Queries times 16.
    X16,
    /// One query row and one key row everywhere.
    EqualRows,
    /// A query is eight times a key.
    OneHot,
    /// Every logit about +180.
    Up,
    /// Every logit about -180.
    Down,
    /// Queries are zero.
    Zero,
}

/// Where the rows of every tensor lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayoutKind {
    /// Contiguous [B, S, H, D].
    Bshd,
    /// Contiguous [B, H, S, D].
    Bhsd,
    /// [B, S, H, D] with gaps between heads, tokens and sequences.
    Padded,
    /// [B, S, H, D] rows of a [B, S, 3, H, D] tensor.
    Packed,
    /// Each tensor differently.
    Mixed,
}

/// One entry of the corpus; see the head of `cases/attention.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Name, the first part of every test's.
    pub name: String,
    /// What it is for, in one line.
    pub about: String,
    /// Sequences.
    #[serde(default = "one")]
    pub batch: u32,
    /// Query heads.
    #[serde(default = "two")]
    pub num_heads: u32,
    /// KV heads; as many as query heads unless given.
    pub num_kv_heads: Option<u32>,
    /// Query tokens.
    pub seqlen_q: u32,
    /// KV tokens.
    pub seqlen_kv: u32,
    /// Element type of every tensor.
    #[serde(default = "bf16")]
    pub dtype: Dtype,
    /// Head dims it is run with.
    #[serde(default = "head_dims")]
    pub head_dim: Vec<u16>,
    /// (query_group, kv_block) it is run with, where it has lists.
    #[serde(default = "block_sizes")]
    pub block_size: Vec<(u16, u16)>,
    /// Kinds of lists it is run with.
    pub lists: Vec<ListKind>,
    /// Columns of the lists that no group uses.
    #[serde(default)]
    pub spare_width: u32,
    /// What the numbers are.
    #[serde(default = "normal")]
    pub values: Values,
    /// Where the rows lie.
    #[serde(default = "bshd")]
    pub layout: LayoutKind,
    /// Whether LSE has a gradient of its own.
    #[serde(default)]
    pub d_lse: bool,
    /// Seed of every random number.
    pub seed: u64,
    /// Whether the CPU engines leave it out.
    #[serde(default)]
    pub gpu_only: bool,
}

fn one() -> u32 {
    1
}
fn two() -> u32 {
    2
}
fn bf16() -> Dtype {
    Dtype::Bf16
}
/// The head dims that every case has. Others have fewer cases of their own (`dims_*`): what is theirs alone is the shape of
/// tiles, not the walk over lists.
fn head_dims() -> Vec<u16> {
    vec![64, 128]
}
fn block_sizes() -> Vec<(u16, u16)> {
    space::SHIPPED_BLOCK_SIZES.to_vec()
}
fn normal() -> Values {
    Values::Normal
}
fn bshd() -> LayoutKind {
    LayoutKind::Bshd
}

/// A case with one head_dim, one kind of lists and one block size.
#[derive(Clone, Debug)]
pub struct Variant {
    /// The case.
    pub case: Case,
    /// Columns of q, k and v.
    pub head_dim: u16,
    /// Which blocks each group lists.
    pub kind: ListKind,
    /// Dense, or the block size.
    pub lists: Lists,
}

impl Variant {
    /// `<case>-d<head_dim>-dense`, or `<case>-d<head_dim>-<kind>-qg<query_group>kb<kv_block>`.
    pub fn name(&self) -> String {
        let (case, dim) = (&self.case.name, self.head_dim);
        match self.lists {
            Lists::Dense => format!("{case}-d{dim}-dense"),
            Lists::Blocks { query_group, kv_block } => {
                let kind = format!("{:?}", self.kind).to_lowercase();
                format!("{case}-d{dim}-{kind}-qg{query_group}kb{kv_block}")
            }
        }
    }

    /// The sizes as the reference takes them.
    pub fn shape(&self) -> AttnShape {
        let c = &self.case;
        let shape = AttnShape::new(
            c.batch as usize,
            c.seqlen_q as usize,
            c.num_heads as usize,
            usize::from(self.head_dim),
        );
        shape.with_seqlen_kv(c.seqlen_kv as usize).with_kv_heads(self.num_kv_heads() as usize)
    }

    /// KV heads.
    pub fn num_kv_heads(&self) -> u32 {
        self.case.num_kv_heads.unwrap_or(self.case.num_heads)
    }

    /// The problem as the runtime takes it, with lists of this width.
    pub fn problem(&self, op: AttnOp, max_selected: u32) -> Problem {
        let c = &self.case;
        Problem {
            op,
            dtype: c.dtype,
            head_dim: self.head_dim,
            lists: self.lists,
            batch: c.batch,
            num_heads: c.num_heads,
            num_kv_heads: self.num_kv_heads(),
            seqlen_q: c.seqlen_q,
            seqlen_kv: c.seqlen_kv,
            max_selected,
            deterministic: Deterministic::No,
        }
    }
}

/// Every case of the corpus. Panics where the file is not a corpus: it is part of this program.
pub fn cases() -> Vec<Case> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        case: Vec<Case>,
    }
    let file: File = toml::from_str(include_str!("../cases/attention.toml"))
        .unwrap_or_else(|e| panic!("cases/attention.toml: {e}"));
    file.case
}

/// Every variant of every case, in the corpus's order.
pub fn variants() -> Vec<Variant> {
    let mut variants = Vec::new();
    for case in cases() {
        for &head_dim in &case.head_dim {
            for &kind in &case.lists {
                let mut add = |lists| variants.push(Variant { case: case.clone(), head_dim, kind, lists });
                match kind {
                    ListKind::Dense => add(Lists::Dense),
                    _ => case.block_size.iter().for_each(|&(query_group, kv_block)| {
                        add(Lists::Blocks { query_group, kv_block });
                    }),
                }
            }
        }
    }
    variants
}
