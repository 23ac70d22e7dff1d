use crate::attn::{AttnOp, AttnSpec, AttnTile, Lists};
use crate::params;
use crate::select::{Budget, GroupRule, SelectOp, SelectSpec};
use crate::types::{Arch, Deterministic};
use crate::{KernelSpec, ListOp};

/// Hardware limits and layout constants, each named once.
pub mod limits {
    /// Shared memory one CTA may ask for on sm90 (227 KB).
    pub const SMEM_BYTES_PER_CTA: u32 = 232_448;
    /// Shared memory of one sm90 multiprocessor (228 KB), of which each CTA takes 1 KB more than it asks for.
    pub const SMEM_BYTES_PER_SM: u32 = 233_472;
    /// Shared memory one CTA may ask for on sm80 of compute capability 8.0 (163 KB).
    pub const SM80_SMEM_BYTES_PER_CTA: u32 = 166_912;
    /// Shared memory of one multiprocessor of 8.0 (164 KB), of which each CTA takes 1 KB more than it asks for.
    pub const SM80_SMEM_BYTES_PER_SM: u32 = 167_936;
    /// Shared memory one CTA may ask for on the smallest GPUs that run sm80, 8.6 and 8.9 (99 KB): defaults fit it.
    pub const SM86_SMEM_BYTES_PER_CTA: u32 = 101_376;
    /// Rows of the unit of dQ's f32 accumulator, and of the backward's usual query tile.
    pub const BWD_BLOCK_M: u16 = 64;
    /// Rows of the backward's statistics and of dQ's accumulator are padded to a multiple of this: the longest query
    /// tile.
    pub const BWD_PADDING: u16 = 128;
    /// Columns of one slab of a tile in shared memory: 128 bytes, the widest swizzle.
    pub const SLAB_COLUMNS: u32 = 64;
    /// 32-bit registers of one multiprocessor.
    pub const REGISTERS_PER_SM: u32 = 65_536;
}

/// Every number derived from a spec, computed once for validation, emission and launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Threads of a CTA.
    pub threads: u32,
    /// CTAs meant to share a multiprocessor (the second value of `__launch_bounds__`).
    pub ctas_per_sm: u32,
    /// Dynamic shared memory of a CTA in bytes, alignment slack included; 0 when it depends on the problem.
    pub smem_bytes: u32,
    /// Bytes of the op's `Params`.
    pub params_bytes: u32,
    /// Registers a consumer thread may use after `setmaxnreg`; 0 when the kernel does not change them.
    pub consumer_registers: u32,
    /// Registers a producer thread keeps after `setmaxnreg`; 0 when the kernel does not change them.
    pub producer_registers: u32,
}

impl Facts {
    pub(crate) fn of(spec: &KernelSpec) -> Facts {
        match spec {
            KernelSpec::Attn(s) => Facts::of_attn(s),
            KernelSpec::Select(s) => Facts::of_select(s),
            KernelSpec::List(s) => Facts {
                threads: 256,
                ctas_per_sm: 1,
                smem_bytes: 0,
                params_bytes: match s.op {
                    ListOp::Invert => size_of::<params::KvInvert>() as u32,
                    ListOp::Validate => size_of::<params::KvValidate>() as u32,
                },
                consumer_registers: 0,
                producer_registers: 0,
            },
            KernelSpec::Pointwise(s) => Facts {
                threads: 256,
                ctas_per_sm: s.ctas_per_sm(),
                smem_bytes: s.smem_bytes(),
                params_bytes: s.op.params_bytes(),
                consumer_registers: 0,
                producer_registers: 0,
            },
        }
    }

    fn of_attn(spec: &AttnSpec) -> Facts {
        let consumers = spec.tile().consumers as u32;
        let params_bytes = match (spec.op(), spec.arch()) {
            (AttnOp::Fwd, Arch::Sm80) => size_of::<params::AttnFwdViews>(),
            (AttnOp::Fwd, Arch::Sm90a) if spec.lists().is_gather() => size_of::<params::AttnFwdGather>(),
            (AttnOp::Fwd, Arch::Sm90a) => size_of::<params::AttnFwd>(),
            (AttnOp::BwdPrep, _) => size_of::<params::AttnBwdPrep>(),
            (AttnOp::Bwd, Arch::Sm80) => size_of::<params::AttnBwdViews>(),
            (AttnOp::Bwd, Arch::Sm90a) if spec.lists().is_gather() => size_of::<params::AttnBwdGather>(),
            (AttnOp::Bwd, Arch::Sm90a) => size_of::<params::AttnBwd>(),
            (AttnOp::BwdDq, _) => size_of::<params::AttnBwdDq>(),
            (AttnOp::BwdPost, _) => size_of::<params::AttnBwdPost>(),
            (AttnOp::BwdPostKv, _) => size_of::<params::AttnBwdPostKv>(),
        } as u32;
        match spec.op() {
            AttnOp::BwdPrep | AttnOp::BwdPost | AttnOp::BwdPostKv => Facts {
                threads: 256,
                ctas_per_sm: 2,
                smem_bytes: 0,
                params_bytes,
                consumer_registers: 0,
                producer_registers: 0,
            },
            AttnOp::Fwd | AttnOp::Bwd | AttnOp::BwdDq if spec.arch() == Arch::Sm80 => {
                let smem_bytes = attn_smem_bytes(spec);
                // 255 registers a thread and two CTAs of four warps: one computes while the other waits. A CTA with 16
                // query rows a warp needs fewer, and three share a multiprocessor.
                let ctas = match (consumers, spec.op()) {
                    (1, AttnOp::Fwd) if spec.tile().block_m == 64 => 3,
                    (1, _) => 2,
                    _ => 1,
                };
                let by_smem = limits::SM80_SMEM_BYTES_PER_SM / (smem_bytes + 1024);
                Facts {
                    threads: 128 * consumers,
                    ctas_per_sm: by_smem.min(ctas).max(1),
                    smem_bytes,
                    params_bytes,
                    consumer_registers: 0,
                    producer_registers: 0,
                }
            }
            AttnOp::Fwd | AttnOp::Bwd | AttnOp::BwdDq => {
                let smem_bytes = attn_smem_bytes(spec);
                let (ctas, consumer_registers, producer_registers) = wgmma_registers(spec);
                let threads = 128 * (consumers + 1);
                let by_smem = limits::SMEM_BYTES_PER_SM / (smem_bytes + 1024);
                Facts {
                    threads,
                    ctas_per_sm: by_smem.min(ctas).max(1),
                    smem_bytes,
                    params_bytes,
                    consumer_registers,
                    producer_registers,
                }
            }
        }
    }

    fn of_select(spec: &SelectSpec) -> Facts {
        let (smem_bytes, params_bytes) = match spec.op() {
            SelectOp::Rows => (0, size_of::<params::KvSelect>()),
            SelectOp::Fine => (select_fine_smem_bytes(spec), size_of::<params::KvSelectFine>()),
        };
        Facts {
            threads: 32 * spec.tile().warps as u32,
            ctas_per_sm: 1,
            smem_bytes,
            params_bytes: params_bytes as u32,
            consumer_registers: 0,
            producer_registers: 0,
        }
    }
}

/// CTAs that share a multiprocessor as far as registers go, and the registers a thread of a consumer and of a producer keeps, of a
/// kernel for wgmma.
///
/// A producer warpgroup hands registers over to the consumers (setmaxnreg moves whole warpgroups). With one consumer, two or three
/// CTAs share a multiprocessor; with more, one CTA fills it.
fn wgmma_registers(spec: &AttnSpec) -> (u32, u32, u32) {
    // Three leave 80 registers a thread at launch: too few to compile a product of more than 64 keys.
    let small_forward = spec.op() == AttnOp::Fwd && spec.head_dim() == 64 && spec.tile().block_n == 64;
    // The producers of single tokens compute an address for every 16 bytes.
    let by_token = matches!(spec.lists(), Lists::Blocks { kv_block: 1, .. });
    let gather_backward = spec.lists().is_gather() && spec.op() == AttnOp::Bwd;
    match (spec.tile().consumers, spec.op()) {
        (1, AttnOp::Fwd) if by_token && spec.head_dim() > 128 => (1, 224, 56),
        (1, _) if by_token => (2, 208, 48),
        (2, _) if by_token || gather_backward => (1, 232, 40),
        // Whoever walks sets of blocks needs more than one list's place.
        (1, AttnOp::Fwd) if spec.is_persistent() && small_forward => (3, 128, 32),
        (1, AttnOp::Fwd) if spec.is_persistent() && spec.head_dim() <= 128 => (2, 216, 40),
        (2, AttnOp::Fwd | AttnOp::BwdDq) if spec.is_persistent() => (1, 232, 40),
        (1, AttnOp::Fwd) if small_forward => (3, 136, 24),
        // 128 registers of O cannot be had while two CTAs share a multiprocessor.
        (1, AttnOp::Fwd) if spec.head_dim() > 128 => (1, 240, 24),
        (1, AttnOp::Bwd) => (2, 224, 32),
        // Its tiles leave no room for a second CTA.
        (1, AttnOp::BwdDq) if spec.head_dim() > 128 => (1, 240, 24),
        (1, _) => (2, 232, 24),
        // The backward's producer walks a list and feeds four operands: with 24 registers it spills a
        // word or two. At head_dim 128 the consumers cannot spare it 16: wgmma would be serialised.
        (2, AttnOp::Bwd) if spec.head_dim() != 128 => (1, 232, 40),
        (2, _) => (1, 240, 24),
        _ => (1, 160, 32),
    }
}

/// Shared memory of a `kv_select_fine` CTA: for each group 512 bins, whose room later serves two bits for each of two
/// tiles of 1024 units, and 1024 ids a warp; the groups' searches, counts and brackets; scores that wait to be counted, 32 a
/// thread, or in their place the scores kept for a group; the groups' masses; the queries' LSE; stored scores; the numbers of
/// kept ones; 64 queries. What a kernel does not use keeps one element (of the waiting scores one warp's): those wait for tokens
/// by top-k alone, masses are top-p's, LSE, stored and kept scores are mass4's.
fn select_fine_smem_bytes(spec: &SelectSpec) -> u32 {
    let (groups, warps) = (spec.tile().groups as u32, spec.tile().warps as u32);
    let bins = groups * (512 + 4) * 4;
    let bits = 2 * 2 * groups * (32 + 1) * 4 + warps * 1024 * 2;
    let samples = spec.kv_block() == 1 && spec.budget() == Budget::TopK;
    let waiting = if samples { warps } else { 1 } * 32 * 32 * 4;
    let kept = spec.kept_scores();
    let masses = if spec.budget() == Budget::TopP { groups } else { 1 } * 32;
    let lse: u32 = if spec.group_rule() == GroupRule::Mass4 { 64 } else { 1 } * 8;
    let stored = (64 * spec.stored_steps()).max(1) * 4;
    let num_kept = if kept > 0 { groups } else { 1 } * 4;
    let searches = groups * (32 + 4 + 16)
        + masses
        + waiting.max(groups * kept * 4)
        + (lse + stored + num_kept).next_multiple_of(16);
    bins.max(bits) + searches + 64 * spec.rank() as u32 * spec.dtype().bytes()
}

/// Dynamic shared memory of an attention CTA: the tiles; on sm90a also 1 KB for barriers and row statistics' alignment,
/// and 1 KB of slack to align the swizzle atoms.
pub(crate) fn attn_smem_bytes(spec: &AttnSpec) -> u32 {
    if spec.is_persistent() {
        return persistent_smem(spec).0;
    }
    let AttnTile { block_m, block_n, stages, consumers, .. } = spec.tile();
    let (m, n, stages) = (block_m as u32, block_n as u32, stages as u32);
    let (d, bytes) = (spec.head_dim() as u32, spec.dtype().bytes());
    if spec.arch() == Arch::Sm80 {
        return match spec.op() {
            // Q (its room serves out in the epilogue), then the ring of K and V.
            AttnOp::Fwd => m * d * bytes + stages * 2 * n * d * bytes,
            // K and V, the stages of Q and dO with LSE and delta, dS, and 2 KB a warp for dQ on its way out.
            AttnOp::Bwd => {
                let stage = 2 * m * d * bytes + 2 * m * 4;
                2 * n * d * bytes + stages * stage + n * m * bytes + n / 16 * 2048
            }
            AttnOp::BwdDq | AttnOp::BwdPrep | AttnOp::BwdPost | AttnOp::BwdPostKv => 0,
        };
    }
    // Tiles are whole slabs of 64 columns, of which the last may be partly zeros (templates/include/dsv/tile.cuh).
    let columns = d.next_multiple_of(limits::SLAB_COLUMNS);
    let tiles = match spec.op() {
        // Q (its room serves out in the epilogue), then the ring of K and V.
        AttnOp::Fwd => m * columns * bytes + stages * 2 * n * columns * bytes,
        // Q (its room serves dQ in the epilogue) and dO, then the ring of K and V.
        AttnOp::BwdDq => 2 * m * columns * bytes + stages * 2 * n * columns * bytes,
        // Q (its room serves dQ in the epilogue), dO and their statistics, K and V (which has one stage less), and dS.
        AttnOp::Bwd if spec.lists().is_gather() => {
            2 * m * columns * bytes + 2 * m * 4 + (2 * stages - 1) * n * columns * bytes + n * m * bytes
        }
        // K and V (their room serves dK and dV in the epilogue), the ring of Q and dO with LSE and delta, and dS:
        // two buffers where warpgroups exchange it, one where a lone warpgroup keeps it to itself, none where dQ is
        // another kernel's.
        AttnOp::Bwd => {
            // Consumers that split the columns exchange P too, in either form.
            let ds = match (spec.deterministic(), consumers) {
                _ if spec.splits_columns() => 2 * 2 * n * m * bytes,
                (Deterministic::Yes, _) => 0,
                (Deterministic::No, 1) => n * m * bytes,
                (Deterministic::No, _) => 2 * n * m * bytes,
            };
            // dQ on its way to the copy engine, where there is room for two.
            let staged = spec.deterministic() == Deterministic::No
                && !spec.splits_columns()
                && (consumers > 1 || d <= 64);
            let dq = if staged { 2 * m * columns * 4 } else { 0 };
            let without =
                2 * n * columns * bytes + stages * (2 * m * columns * bytes + 2 * m * 4) + ds + 1024;
            return if without + dq <= limits::SMEM_BYTES_PER_CTA { without + dq } else { without };
        }
        AttnOp::BwdPrep | AttnOp::BwdPost | AttnOp::BwdPostKv => 0,
    };
    tiles + 2048
}

/// Shared memory of a persistent kernel, and whether out or dQ has room of its own in it: where that costs no CTA of the
/// multiprocessor. Out of several groups takes that of V.
///
/// Beside it are Q (and dO), the rings of K and V, of which the forward's of V has at least three stages with several groups, and
/// barriers and sets of blocks. Nothing aligns by slack.
pub(crate) fn persistent_smem(spec: &AttnSpec) -> (u32, bool) {
    let AttnTile { block_m, block_n, stages, groups, .. } = spec.tile();
    let row = spec.head_dim().next_multiple_of(limits::SLAB_COLUMNS as u16) as u32 * spec.dtype().bytes();
    let pairs_forward = spec.op() == AttnOp::Fwd && groups > 1;
    let stages_v = if pairs_forward { stages.max(3) } else { stages };
    let queries = if spec.op() == AttnOp::Fwd { 1 } else { 2 } * block_m as u32;
    let without =
        (queries + (stages + stages_v) as u32 * block_n as u32) * row + if groups > 1 { 3072 } else { 1024 };
    let with = without + block_m as u32 * row;
    let (ctas, ..) = wgmma_registers(spec);
    let apart = !pairs_forward && with <= limits::SMEM_BYTES_PER_SM / ctas - 1024;
    (if apart { with } else { without }, apart)
}
