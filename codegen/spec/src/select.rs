use crate::error::SpecError;
use crate::types::{Arch, Dtype, tokens};

/// Ranks (d_lr, columns of the low-rank queries and keys) a selection or the predictor's loss may have: 16 columns are a
/// step of the tensor cores.
pub const RANKS: [u8; 4] = [16, 32, 48, 64];

/// Refuses a rank outside [`RANKS`].
pub(crate) fn check_rank(rank: u8) -> Result<(), SpecError> {
    if RANKS.contains(&rank) {
        return Ok(());
    }
    Err(SpecError::new("rank", rank, "16, 32, 48 or 64: 16 columns are a step of the tensor cores"))
}

tokens! {
    /// Which kernel selects.
    SelectOp {
        /// All block scores of 16 groups in shared memory: coarse blocks, at most about 3,600 of them.
        Rows = "kv_select",
        /// Scores recomputed in every pass and never stored: any kv_block, any number of them.
        Fine = "kv_select_fine",
    }
}

tokens! {
    /// How a query group's low-rank queries speak for it (paper: one proxy a group).
    GroupRule {
        /// The query of the token at index floor(len / 2) of the group.
        Centre = "centre",
        /// The mean of the group's queries.
        Mean = "mean",
        /// The largest of four queries' scores: those at indices floor(len (2 i + 1) / 8), i = 0 to 3. Only in
        /// [`SelectOp::Fine`].
        Max4 = "max4",
        /// The softmax mass over the same four queries: the sum of what each of them gives the keys of the unit. Only in
        /// [`SelectOp::Fine`], with [`BlockScore::Mass`].
        Mass4 = "mass4",
    }
}

impl GroupRule {
    /// The rules that make one query of a group's, which every selection kernel serves.
    pub const PROXIES: [GroupRule; 2] = [GroupRule::Centre, GroupRule::Mean];

    /// Queries that are scored for each group.
    pub const fn queries(self) -> u8 {
        match self {
            GroupRule::Centre | GroupRule::Mean => 1,
            GroupRule::Max4 | GroupRule::Mass4 => 4,
        }
    }
}

tokens! {
    /// How the scores of a KV block's keys become the block's score.
    BlockScore {
        /// The largest.
        Max = "max",
        /// ln(sum of exp(scale score)) / scale: the scaled score is the logarithm of the block's softmax mass. Only in
        /// [`SelectOp::Fine`].
        Mass = "mass",
    }
}

tokens! {
    /// What says how many KV units a group keeps.
    Budget {
        /// A number for each head.
        TopK = "topk",
        /// A share of the predicted softmax mass for each head: each group keeps the fewest units that hold it, so groups
        /// differ. Only in [`SelectOp::Fine`].
        TopP = "topp",
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
    op: SelectOp,
    dtype: Dtype,
    rank: u8,
    query_group: u16,
    kv_block: u16,
    group_rule: GroupRule,
    block_score: BlockScore,
    budget: Budget,
    tile: SelectTile,
    arch: Arch,
}

impl SelectSpec {
    /// The only constructor.
    ///
    /// # Errors
    /// The first rule the fields break.
    pub fn new(
        op: SelectOp,
        dtype: Dtype,
        rank: u8,
        query_group: u16,
        kv_block: u16,
        group_rule: GroupRule,
        block_score: BlockScore,
        budget: Budget,
        tile: SelectTile,
        arch: Arch,
    ) -> Result<SelectSpec, SpecError> {
        if dtype == Dtype::F32 {
            return Err(SpecError::new("dtype", dtype, "bf16 or f16"));
        }
        check_rank(rank)?;
        if ![64, 128, 256].contains(&query_group) {
            return Err(SpecError::new("query_group", query_group, "64, 128 or 256"));
        }
        match op {
            SelectOp::Rows => {
                if ![64, 128].contains(&kv_block) {
                    let allowed = "64 or 128 in kv_select; smaller blocks and tokens are kv_select_fine's";
                    return Err(SpecError::new("kv_block", kv_block, allowed));
                }
                if group_rule.queries() != 1 {
                    let allowed =
                        "centre or mean in kv_select; rules of several queries are kv_select_fine's";
                    return Err(SpecError::new("group_rule", group_rule, allowed));
                }
                if budget != Budget::TopK {
                    let allowed = "topk in kv_select; topp is kv_select_fine's";
                    return Err(SpecError::new("budget", budget, allowed));
                }
                if block_score != BlockScore::Max {
                    let allowed = "max in kv_select; mass is kv_select_fine's";
                    return Err(SpecError::new("block_score", block_score, allowed));
                }
                if tile.groups != 16 {
                    return Err(SpecError::new("groups", tile.groups, "16: rows of one mma.sync product"));
                }
                if !matches!(tile.warps, 4 | 8 | 16) {
                    return Err(SpecError::new("warps", tile.warps, "4, 8 or 16"));
                }
            }
            SelectOp::Fine => {
                if ![1, 8, 16, 64, 128].contains(&kv_block) {
                    return Err(SpecError::new("kv_block", kv_block, "1, 8, 16, 64 or 128"));
                }
                match (block_score, group_rule) {
                    (BlockScore::Max, GroupRule::Mass4) => {
                        return Err(SpecError::new(
                            "block_score",
                            block_score,
                            "mass where the rule is mass4",
                        ));
                    }
                    (BlockScore::Mass, rule) if kv_block == 1 && rule != GroupRule::Mass4 => {
                        let allowed =
                            "max where kv_block is 1 and the rule is not mass4: a token's score is its own";
                        return Err(SpecError::new("block_score", block_score, allowed));
                    }
                    _ => {}
                }
                if tile.groups * group_rule.queries() != 64 {
                    let allowed = "64 over the rule's queries: centre and mean 64, max4 and mass4 16";
                    return Err(SpecError::new("groups", tile.groups, allowed));
                }
                if tile.warps != 16 {
                    return Err(SpecError::new(
                        "warps",
                        tile.warps,
                        "16: two words of units a warp fill a tile",
                    ));
                }
            }
        }
        Ok(SelectSpec { op, dtype, rank, query_group, kv_block, group_rule, block_score, budget, tile, arch })
    }

    /// Which kernel.
    pub const fn op(&self) -> SelectOp {
        self.op
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
    /// How the group's queries speak for it.
    pub const fn group_rule(&self) -> GroupRule {
        self.group_rule
    }
    /// How the keys' scores become the block's.
    pub const fn block_score(&self) -> BlockScore {
        self.block_score
    }
    /// What says how many units a group keeps.
    pub const fn budget(&self) -> Budget {
        self.budget
    }
    /// The tunable shape.
    pub const fn tile(&self) -> SelectTile {
        self.tile
    }
    /// Of `kv_select_fine`, steps (four units of the CTA's groups) whose scores stay in shared memory: where exponentials make
    /// them dear and units are blocks, as many turns of 16 warps as there is room for.
    pub const fn stored_steps(&self) -> u32 {
        let turns = match (self.group_rule, self.kv_block, self.arch) {
            (GroupRule::Mass4, 2.., Arch::Sm90a) => 43,
            (GroupRule::Mass4, 2.., Arch::Sm80) => 26,
            _ => 0,
        };
        // Kept scores take the room of 128 steps.
        16 * if turns > 0 && self.kept_scores() > 0 { turns - 7 } else { turns }
    }
    /// Of `kv_select_fine`, scores of a group's bracket that have room in shared memory: where exponentials make them dear, not
    /// all scores are stored, and units are chosen by number.
    pub const fn kept_scores(&self) -> u32 {
        match (self.group_rule, self.budget, self.kv_block, self.arch) {
            (GroupRule::Mass4, Budget::TopK, 1, Arch::Sm90a) => 2816,
            (GroupRule::Mass4, Budget::TopK, 1, Arch::Sm80) => 1792,
            (GroupRule::Mass4, Budget::TopK, 8, _) => 512,
            _ => 0,
        }
    }
    /// The architecture.
    pub const fn arch(&self) -> Arch {
        self.arch
    }
}
