use crate::error::SpecError;
use crate::facts::{attn_smem_bytes, limits, persistent_smem};
use crate::types::{Arch, Deterministic, Dtype, tokens};
use serde::{Deserialize, Serialize};

tokens! {
    /// The kernels of attention.
    AttnOp {
        /// out and LSE from Q, K, V.
        Fwd = "attn_fwd",
        /// delta = rowsum(out * d_out) - d_lse, LSE in base 2, zeroed dQ accumulator where there is one.
        BwdPrep = "attn_bwd_prep",
        /// dK, dV and the f32 accumulator of dQ; of small KV units, dQ and the f32 accumulator of dK and dV.
        Bwd = "attn_bwd",
        /// dQ alone, walked from the queries' side: what a deterministic `attn_bwd` leaves out.
        BwdDq = "attn_bwd_dq",
        /// dQ in the input dtype from its accumulator.
        BwdPost = "attn_bwd_post",
        /// dK and dV in the input dtype from their accumulator, which an `attn_bwd` of small KV units fills.
        BwdPostKv = "attn_bwd_post_kv",
    }
}

/// Which keys a query sees: all of them, or those its group's list names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Lists {
    /// Every key (`qg0_kb0` in names).
    Dense,
    /// Each group of `query_group` consecutive tokens lists KV blocks of `kv_block` consecutive tokens.
    Blocks {
        /// Tokens sharing one list.
        query_group: u16,
        /// Tokens of one selectable KV unit; 1 means single tokens.
        kv_block: u16,
    },
}

impl Lists {
    /// `(query_group, kv_block)`; `(0, 0)` when dense.
    pub const fn block_size(self) -> (u16, u16) {
        match self {
            Lists::Dense => (0, 0),
            Lists::Blocks { query_group, kv_block } => (query_group, kv_block),
        }
    }

    /// From `(query_group, kv_block)`, where `(0, 0)` is dense.
    pub const fn from_block_size(query_group: u16, kv_block: u16) -> Lists {
        if kv_block == 0 { Lists::Dense } else { Lists::Blocks { query_group, kv_block } }
    }

    /// Whether every key is seen.
    pub const fn is_dense(self) -> bool {
        matches!(self, Lists::Dense)
    }

    /// Whether listed units are smaller than the KV tile of any kernel, so that tiles are gathered from several.
    pub const fn is_gather(self) -> bool {
        matches!(self, Lists::Blocks { kv_block: ..64, .. })
    }
}

/// Percent of KV a kernel is specialised for skipping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Sparsity {
    /// The text serves any sparsity (`spany`).
    Any,
    /// The text is specialised for this percentage (`sp90`); `sp0` is dense.
    Percent(u8),
}

tokens! {
    /// How CTAs take work.
    Schedule {
        /// One tile a CTA, tiles of a head adjacent in launch order so that its K and V stay in L2.
        Grid = "grid",
        /// As many CTAs as run at once, each of which takes every so-manieth tile; what the next needs is loaded during this one.
        Persistent = "persistent",
        /// As `grid`, but of its list a CTA takes what is next from where those of its head are by now: what they read at the
        /// same time is the same. In the backward over lists that adds up dQ, whose order of sums is open anyway.
        Ring = "ring",
    }
}

/// The tunable shape of one attention kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttnTile {
    /// Query rows a CTA works on at once.
    pub block_m: u16,
    /// KV rows a CTA works on at once.
    pub block_n: u16,
    /// Query groups a CTA serves.
    pub groups: u8,
    /// Consumer warpgroups of 128 threads (sm80: warps / 4).
    pub consumers: u8,
    /// Buffers of the streamed operand pair (forward: K and V; backward: Q and dO).
    pub stages: u8,
    /// CTAs of a cluster.
    pub cluster: u8,
    /// How CTAs take work.
    pub schedule: Schedule,
}

/// Everything baked into one attention kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttnSpec {
    op: AttnOp,
    dtype: Dtype,
    head_dim: u16,
    lists: Lists,
    sparsity: Sparsity,
    tile: AttnTile,
    deterministic: Deterministic,
    arch: Arch,
}

/// Head dims an attention kernel can be written for.
pub const HEAD_DIMS: [u16; 5] = [64, 80, 96, 128, 256];
/// Query groups the contract knows.
const QUERY_GROUPS: [u16; 3] = [64, 128, 256];
/// KV blocks the contract knows.
const KV_BLOCKS: [u16; 5] = [1, 8, 16, 64, 128];
/// Sparsities a text may be specialised for.
const SPARSITIES: [u8; 8] = [0, 50, 75, 80, 85, 90, 95, 98];

impl AttnOp {
    /// Whether the op's text does not depend on lists: there is one kernel of it, named dense.
    pub const fn is_of_any_lists(self) -> bool {
        matches!(self, AttnOp::BwdPrep | AttnOp::BwdPost | AttnOp::BwdPostKv)
    }

    /// The op that ends a backward whose `attn_bwd` is of these lists and this form: what writes the gradients that the
    /// form leaves open.
    pub const fn ending(lists: Lists, form: Deterministic) -> AttnOp {
        match form {
            _ if lists.is_gather() => AttnOp::BwdPostKv,
            Deterministic::Yes => AttnOp::BwdDq,
            Deterministic::No => AttnOp::BwdPost,
        }
    }
}

impl AttnSpec {
    /// The only constructor: a spec that exists is feasible for its architecture.
    ///
    /// # Errors
    /// The first rule the fields break: the field, its value, what is allowed and why.
    pub fn new(
        op: AttnOp,
        dtype: Dtype,
        head_dim: u16,
        lists: Lists,
        sparsity: Sparsity,
        tile: AttnTile,
        deterministic: Deterministic,
        arch: Arch,
    ) -> Result<AttnSpec, SpecError> {
        let spec = AttnSpec { op, dtype, head_dim, lists, sparsity, tile, deterministic, arch };
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), SpecError> {
        let AttnTile { block_m, block_n, groups, consumers, stages, cluster, .. } = self.tile;
        if self.dtype == Dtype::F32 {
            return Err(SpecError::new("dtype", self.dtype, "bf16 or f16, the tensor cores' 16-bit types"));
        }
        if !HEAD_DIMS.contains(&self.head_dim) {
            return Err(SpecError::new("head_dim", self.head_dim, "64, 80, 96, 128 or 256"));
        }
        if let Lists::Blocks { query_group, kv_block } = self.lists {
            if !QUERY_GROUPS.contains(&query_group) {
                return Err(SpecError::new("query_group", query_group, "64, 128 or 256"));
            }
            if !KV_BLOCKS.contains(&kv_block) {
                return Err(SpecError::new("kv_block", kv_block, "1, 8, 16, 64, 128, or dense"));
            }
        }
        match self.sparsity {
            Sparsity::Percent(p) if !SPARSITIES.contains(&p) => {
                return Err(SpecError::new("sparsity", p, "0, 50, 75, 80, 85, 90, 95, 98 or any"));
            }
            Sparsity::Percent(p) if (p == 0) != self.lists.is_dense() => {
                return Err(SpecError::new("sparsity", p, "0 for dense and only for dense"));
            }
            Sparsity::Any if self.lists.is_dense() => {
                return Err(SpecError::new("sparsity", "any", "0 for dense"));
            }
            _ => {}
        }
        if groups == 0 || consumers == 0 || cluster == 0 {
            return Err(SpecError::new("tile", format!("{:?}", self.tile), "counts of at least 1"));
        }
        if self.op != AttnOp::Bwd && self.deterministic == Deterministic::No {
            return Err(SpecError::new(
                "deterministic",
                self.deterministic,
                "det: only attn_bwd reduces in any order",
            ));
        }
        match self.op {
            AttnOp::Fwd | AttnOp::Bwd | AttnOp::BwdDq => self.check_matmul(),
            AttnOp::BwdPrep | AttnOp::BwdPost | AttnOp::BwdPostKv => {
                if (self.op, self.arch) == (AttnOp::BwdPostKv, Arch::Sm80) {
                    return Err(SpecError::new(
                        "arch",
                        self.arch,
                        "sm90a: on sm80 no attn_bwd takes KV units below 64 tokens",
                    ));
                }
                if !self.lists.is_dense() {
                    return Err(SpecError::new(
                        "lists",
                        format!("{:?}", self.lists),
                        "dense: the text does not depend on lists",
                    ));
                }
                if block_m != limits::BWD_BLOCK_M || block_n != 0 || stages != 0 {
                    return Err(SpecError::new(
                        "tile",
                        format!("m{block_m}n{block_n}s{stages}"),
                        "m64n0 with 0 stages: rows of the backward's accumulators",
                    ));
                }
                Ok(())
            }
        }
    }

    /// The head dims this op's template serves on this architecture, and the same in words.
    const fn matmul_head_dims(&self) -> (&'static [u16], &'static str) {
        match (self.op, self.arch) {
            (AttnOp::Fwd, Arch::Sm90a) => (&HEAD_DIMS, "64, 80, 96, 128 or 256 in attn_fwd on sm90a"),
            (AttnOp::Bwd, Arch::Sm90a) if self.lists.is_gather() => (
                &[64, 80, 96, 128],
                "64, 80, 96 or 128 in attn_bwd with kv_block below 64: dQ stays in registers",
            ),
            (AttnOp::Bwd | AttnOp::BwdDq, Arch::Sm90a) => {
                (&HEAD_DIMS, "64, 80, 96, 128 or 256 in the backward on sm90a")
            }
            _ => (&[64, 128], "64 or 128 with the sm80 templates: whole 128-byte swizzle columns"),
        }
    }

    fn check_matmul(&self) -> Result<(), SpecError> {
        let AttnTile { block_m, block_n, groups, consumers, stages, cluster, schedule } = self.tile;
        let (head_dims, which) = self.matmul_head_dims();
        if !head_dims.contains(&self.head_dim) {
            return Err(SpecError::new("head_dim", self.head_dim, which));
        }
        if cluster != 1 {
            return Err(SpecError::new("cluster", cluster, format!("1 with the {} templates", self.arch)));
        }
        let adds_dq = self.op == AttnOp::Bwd && self.deterministic == Deterministic::No;
        let rings = adds_dq && self.arch == Arch::Sm90a && !self.lists.is_gather() && !self.lists.is_dense();
        let persists = matches!(self.op, AttnOp::Fwd | AttnOp::BwdDq)
            && self.arch == Arch::Sm90a
            && !self.lists.is_gather()
            && !self.lists.is_dense();
        let allowed = match schedule {
            Schedule::Grid => true,
            Schedule::Ring => rings,
            Schedule::Persistent => persists,
        };
        if !allowed {
            let which = match (rings, persists) {
                (true, _) => "grid or ring",
                (_, true) => "grid or persistent",
                _ => "grid",
            };
            return Err(SpecError::new(
                "schedule",
                schedule,
                format!("{which} in {} with the {} templates", self.op, self.arch),
            ));
        }
        if groups != 1 {
            self.check_groups()?;
        }
        if self.arch == Arch::Sm80 {
            return self.check_sm80();
        }
        if self.lists.is_gather() {
            self.check_gather()?;
        }
        if !(1..=4).contains(&stages) {
            return Err(SpecError::new("stages", stages, "1 to 4"));
        }
        if self.op == AttnOp::BwdDq && stages < 2 {
            return Err(SpecError::new(
                "stages",
                stages,
                "2 to 4: K of the tile before is read while the next arrives",
            ));
        }
        if consumers > 3 {
            return Err(SpecError::new(
                "consumers",
                consumers,
                "1 to 3: four consumers and a producer leave under 104 registers a thread",
            ));
        }
        if !(block_n as u32).is_multiple_of(16) || !(16..=256).contains(&block_n) {
            return Err(SpecError::new(
                "block_n",
                block_n,
                "a multiple of 16 from 16 to 256 (wgmma N, and K of the second product)",
            ));
        }
        let rows = 64 * consumers as u16;
        match self.op {
            AttnOp::Fwd | AttnOp::BwdDq => {
                // The result and S (and dP), and P or dS as operand, in registers, with about 32 more.
                let scores = if self.op == AttnOp::Fwd { block_n / 2 } else { block_n };
                let registers = self.head_dim / 2 + scores + block_n / 4 + 32;
                let budget = match (consumers, self.op) {
                    (3, _) => 160,
                    (1, AttnOp::BwdDq) => 232,
                    _ => 240,
                };
                if registers > budget {
                    return Err(SpecError::new(
                        "registers",
                        registers,
                        format!("at most {budget} a thread with {consumers} consumers"),
                    ));
                }
                let narrow = self.op == AttnOp::BwdDq && block_n == 32;
                if !narrow && ![64, 80, 96, 128, 176].contains(&block_n) {
                    return Err(SpecError::new(
                        "block_n",
                        block_n,
                        "64, 80, 96, 128 or 176 (in attn_bwd_dq also 32), the products listed in wgmma_shapes.cuh",
                    ));
                }
                if block_m != rows {
                    return Err(SpecError::new(
                        "block_m",
                        block_m,
                        format!("{rows}: 64 rows for each of {consumers} consumers"),
                    ));
                }
                if let Lists::Blocks { query_group, kv_block } = self.lists {
                    if groups == 1 && !query_group.is_multiple_of(block_m) {
                        return Err(SpecError::new(
                            "block_m",
                            block_m,
                            format!("a divisor of query_group {query_group}"),
                        ));
                    }
                    let joins = self.op == AttnOp::Fwd && kv_block >= 64 && block_n.is_multiple_of(kv_block);
                    if !joins && !self.lists.is_gather() && !kv_block.is_multiple_of(block_n) {
                        let multiple =
                            if self.op == AttnOp::Fwd { " or, from 64 on, a multiple" } else { "" };
                        return Err(SpecError::new(
                            "block_n",
                            block_n,
                            format!("a divisor{multiple} of kv_block {kv_block}"),
                        ));
                    }
                }
            }
            // check_gather has said all of the tile.
            AttnOp::Bwd if self.lists.is_gather() && consumers <= 2 => {
                let (query_group, _) = self.lists.block_size();
                if !query_group.is_multiple_of(block_m) {
                    return Err(SpecError::new(
                        "block_m",
                        block_m,
                        format!("a divisor of query_group {query_group}"),
                    ));
                }
            }
            AttnOp::Bwd => {
                if consumers > 2 {
                    return Err(SpecError::new(
                        "consumers",
                        consumers,
                        "1 or 2 in attn_bwd: consumers share dQ's columns, 32 or 64 a product",
                    ));
                }
                if self.head_dim > 128 {
                    // dK and dV of 64 KV rows are 256 registers at head_dim 256: a warpgroup holds half the columns.
                    if !self.splits_columns() || block_m != limits::BWD_BLOCK_M || stages < 2 {
                        return Err(SpecError::new(
                            "tile",
                            format!("m{block_m}n{block_n}c{consumers}s{stages}"),
                            format!(
                                "m64n64 with 2 consumers and 2 or more stages at head_dim {}: each takes half the columns of dK, dV and dQ",
                                self.head_dim
                            ),
                        ));
                    }
                } else if block_n != rows {
                    return Err(SpecError::new(
                        "block_n",
                        block_n,
                        format!("{rows}: 64 KV rows for each of {consumers} consumers"),
                    ));
                }
                let wide = block_m == 2 * limits::BWD_BLOCK_M && self.head_dim == 64 && consumers == 2;
                if block_m != limits::BWD_BLOCK_M && !wide {
                    return Err(SpecError::new(
                        "block_m",
                        block_m,
                        "64, the layout of dQ's accumulator, or 128 with head_dim 64 and 2 consumers",
                    ));
                }
                if let Lists::Blocks { query_group, kv_block } = self.lists {
                    if !kv_block.is_multiple_of(block_n) {
                        return Err(SpecError::new(
                            "block_n",
                            block_n,
                            format!("a divisor of kv_block {kv_block}"),
                        ));
                    }
                    if !query_group.is_multiple_of(block_m) {
                        return Err(SpecError::new(
                            "block_m",
                            block_m,
                            format!("a divisor of query_group {query_group}"),
                        ));
                    }
                }
            }
            AttnOp::BwdPrep | AttnOp::BwdPost | AttnOp::BwdPostKv => unreachable!("checked by the caller"),
        }
        let smem = attn_smem_bytes(self);
        if smem > limits::SMEM_BYTES_PER_CTA {
            return Err(SpecError::new(
                "shared memory",
                smem,
                format!("at most {} bytes a CTA", limits::SMEM_BYTES_PER_CTA),
            ));
        }
        Ok(())
    }

    /// What the gathering templates ask beside the rules of the others.
    fn check_gather(&self) -> Result<(), SpecError> {
        let AttnTile { block_m, block_n, consumers, stages, .. } = self.tile;
        let (_, kv_block) = self.lists.block_size();
        if !block_n.is_multiple_of(kv_block.max(8)) {
            return Err(SpecError::new(
                "block_n",
                block_n,
                format!("whole units of kv_block {kv_block}, and whole groups of 8 tokens"),
            ));
        }
        if kv_block == 1 && ![64, 128].contains(&block_n) {
            return Err(SpecError::new(
                "block_n",
                block_n,
                "64 or 128 with kv_block 1: 16 or 32 tokens for each of four producer warps",
            ));
        }
        match self.op {
            AttnOp::BwdDq => Err(SpecError::new(
                "lists",
                format!("{:?}", self.lists),
                "kv_block 64 or 128, or dense: with smaller units attn_bwd writes dQ itself",
            )),
            AttnOp::Bwd if self.deterministic == Deterministic::Yes => Err(SpecError::new(
                "deterministic",
                self.deterministic,
                "nondet with kv_block below 64: dK and dV are added by whichever group comes first",
            )),
            AttnOp::Bwd if block_m != block_n || block_m != 64 * consumers as u16 => Err(SpecError::new(
                "block_m",
                block_m,
                format!(
                    "block_n {block_n}, both 64 for each of {consumers} consumers: they share KV rows, then dQ's rows"
                ),
            )),
            AttnOp::Bwd if stages < 2 => Err(SpecError::new(
                "stages",
                stages,
                "2 to 4: K of the tile before is read while the next arrives; V has one stage less",
            )),
            _ => Ok(()),
        }
    }

    /// What two groups in one CTA ask: each has its consumer.
    fn check_groups(&self) -> Result<(), SpecError> {
        let AttnTile { block_n, groups, consumers, stages, schedule, .. } = self.tile;
        if !matches!(self.op, AttnOp::Fwd | AttnOp::BwdDq) || self.arch != Arch::Sm90a {
            return Err(SpecError::new("groups", groups, "1 outside attn_fwd and attn_bwd_dq on sm90a"));
        }
        let (query_group, kv_block) = self.lists.block_size();
        let whole_blocks = block_n >= kv_block && stages >= 2;
        if schedule != Schedule::Persistent || (groups, consumers, query_group) != (2, 2, 64) || !whole_blocks
        {
            return Err(SpecError::new(
                "groups",
                groups,
                "1; or 2 in persistent CTAs with 2 consumers, query_group 64, block_n at least kv_block and at least 2 stages",
            ));
        }
        Ok(())
    }

    /// The rules of the templates for mma.sync and cp.async.
    fn check_sm80(&self) -> Result<(), SpecError> {
        let AttnTile { block_m, block_n, consumers, stages, .. } = self.tile;
        if self.op == AttnOp::BwdDq || (self.op, self.deterministic) == (AttnOp::Bwd, Deterministic::Yes) {
            return Err(SpecError::new(
                "arch",
                self.arch,
                "sm90a for a deterministic backward: on sm80 attn_bwd adds dQ with atomics, and there is no attn_bwd_dq",
            ));
        }
        if consumers > 2 {
            return Err(SpecError::new("consumers", consumers, "1 or 2 on sm80: 4 or 8 warps"));
        }
        if self.op == AttnOp::Fwd {
            if !(1..=4).contains(&stages) {
                return Err(SpecError::new("stages", stages, "1 to 4"));
            }
            let rows = 64 * consumers as u16;
            if block_m != rows && block_m != 2 * rows {
                return Err(SpecError::new(
                    "block_m",
                    block_m,
                    format!("{rows} or {}: 16 or 32 rows for each of {} warps", 2 * rows, 4 * consumers),
                ));
            }
            if !block_n.is_multiple_of(32) || !(32..=128).contains(&block_n) {
                return Err(SpecError::new("block_n", block_n, "32, 64, 96 or 128 on sm80"));
            }
            // O and S in registers for every 16 rows of a warp, with about 60 more.
            let registers = block_m / rows * (self.head_dim / 2 + block_n / 2) + 60;
            if registers > 255 {
                return Err(SpecError::new("registers", registers, "at most 255 a thread"));
            }
        } else {
            if !(1..=2).contains(&stages) {
                return Err(SpecError::new("stages", stages, "1 or 2 in attn_bwd on sm80"));
            }
            if block_m != limits::BWD_BLOCK_M {
                return Err(SpecError::new("block_m", block_m, "64: the layout of dQ's accumulator"));
            }
            let rows = 64 * consumers as u16;
            if block_n != rows {
                return Err(SpecError::new(
                    "block_n",
                    block_n,
                    format!("{rows}: 16 KV rows for each of {} warps", 4 * consumers),
                ));
            }
        }
        if let Lists::Blocks { query_group, kv_block } = self.lists {
            if !query_group.is_multiple_of(block_m) {
                return Err(SpecError::new(
                    "block_m",
                    block_m,
                    format!("a divisor of query_group {query_group}"),
                ));
            }
            if !kv_block.is_multiple_of(block_n) {
                return Err(SpecError::new("block_n", block_n, format!("a divisor of kv_block {kv_block}")));
            }
        }
        let smem = attn_smem_bytes(self);
        if smem > limits::SM80_SMEM_BYTES_PER_CTA {
            return Err(SpecError::new(
                "shared memory",
                smem,
                format!("at most {} bytes a CTA", limits::SM80_SMEM_BYTES_PER_CTA),
            ));
        }
        Ok(())
    }

    /// Tokens one copy brings of K and of V: a whole tile, or a block where tiles are put together from several, of units
    /// below 64 tokens 8.
    pub const fn kv_box_rows(&self) -> u16 {
        match self.lists {
            Lists::Blocks { kv_block: ..64, .. } => 8,
            Lists::Blocks { kv_block, .. } if kv_block < self.tile.block_n => kv_block,
            _ => self.tile.block_n,
        }
    }

    /// Which kernel of attention.
    pub const fn op(&self) -> AttnOp {
        self.op
    }
    /// Element type of Q, K, V, out and their gradients.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Columns of Q, K and V.
    pub const fn head_dim(&self) -> u16 {
        self.head_dim
    }
    /// Dense, or the block size.
    pub const fn lists(&self) -> Lists {
        self.lists
    }
    /// The sparsity the text is specialised for.
    pub const fn sparsity(&self) -> Sparsity {
        self.sparsity
    }
    /// Whether the two consumers of `attn_bwd` work on the same 64 KV rows, each on half the columns.
    pub(crate) const fn splits_columns(&self) -> bool {
        matches!(self.op, AttnOp::Bwd)
            && self.head_dim > 128
            && self.tile.consumers == 2
            && self.tile.block_n == 64
    }
    /// Whether neighbouring groups load once what they both list.
    pub const fn shares_loads(&self) -> bool {
        self.tile.groups > 1
    }
    /// Whether CTAs take tile after tile.
    pub const fn is_persistent(&self) -> bool {
        matches!(self.tile.schedule, Schedule::Persistent)
    }
    /// Whether a persistent kernel has room for out or dQ beside Q, of which it loads the next while this leaves.
    pub fn has_out_apart(&self) -> bool {
        self.is_persistent() && persistent_smem(self).1
    }
    /// The tunable shape.
    pub const fn tile(&self) -> AttnTile {
        self.tile
    }
    /// Whether sums have a fixed order.
    pub const fn deterministic(&self) -> Deterministic {
        self.deterministic
    }
    /// The architecture.
    pub const fn arch(&self) -> Arch {
        self.arch
    }
}
