use crate::error::SpecError;
use crate::types::{Arch, Dtype, tokens};

tokens! {
    /// How a query group's low-rank queries become one proxy query (paper: one proxy a group).
    GroupRule {
        /// The query of the token at index floor(len / 2) of the group.
        Centre = "centre",
        /// The mean of the group's queries.
        Mean = "mean",
    }
}

tokens! {
    /// How the scores of a KV block's keys become the block's score.
    BlockScore {
        /// The largest.
        Max = "max",
    }
}

/// The tunable shape of a selection kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SelectTile {
    /// Query groups a CTA chooses for.
    pub groups: u8,
    /// Warps of a CTA.
    pub warps: u8,
}

/// Everything baked into one critical-KV selection kernel: low-rank scores, block score, exact top-k per group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SelectSpec {
    dtype: Dtype,
    rank: u8,
    query_group: u16,
    kv_block: u16,
    group_rule: GroupRule,
    block_score: BlockScore,
    tile: SelectTile,
    arch: Arch,
}

impl SelectSpec {
    /// The only constructor.
    ///
    /// # Errors
    /// The first rule the fields break.
    pub fn new(
        dtype: Dtype,
        rank: u8,
        query_group: u16,
        kv_block: u16,
        group_rule: GroupRule,
        block_score: BlockScore,
        tile: SelectTile,
        arch: Arch,
    ) -> Result<SelectSpec, SpecError> {
        if dtype == Dtype::F32 {
            return Err(SpecError::new("dtype", dtype, "bf16 or f16"));
        }
        if rank != 16 {
            return Err(SpecError::new("rank", rank, "16: one tensor-core step of the low-rank product"));
        }
        if ![64, 128, 256].contains(&query_group) {
            return Err(SpecError::new("query_group", query_group, "64, 128 or 256"));
        }
        if ![64, 128].contains(&kv_block) {
            return Err(SpecError::new("kv_block", kv_block, "64 or 128 with the block template"));
        }
        if tile.groups != 16 {
            return Err(SpecError::new("groups", tile.groups, "16: rows of one mma.sync product"));
        }
        if !matches!(tile.warps, 4 | 8 | 16) {
            return Err(SpecError::new("warps", tile.warps, "4, 8 or 16"));
        }
        Ok(SelectSpec { dtype, rank, query_group, kv_block, group_rule, block_score, tile, arch })
    }

    /// Element type of the low-rank queries and keys.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Columns of the low-rank queries and keys (d_lr).
    pub const fn rank(&self) -> u8 {
        self.rank
    }
    /// Tokens sharing one list.
    pub const fn query_group(&self) -> u16 {
        self.query_group
    }
    /// Tokens of one selectable KV unit.
    pub const fn kv_block(&self) -> u16 {
        self.kv_block
    }
    /// How the group's queries become one.
    pub const fn group_rule(&self) -> GroupRule {
        self.group_rule
    }
    /// How the keys' scores become the block's.
    pub const fn block_score(&self) -> BlockScore {
        self.block_score
    }
    /// The tunable shape.
    pub const fn tile(&self) -> SelectTile {
        self.tile
    }
    /// The architecture.
    pub const fn arch(&self) -> Arch {
        self.arch
    }
}
