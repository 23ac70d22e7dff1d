//! The engine's private scratch: how many bytes the ops of a run need beside their operands, and a bump allocator
//! that hands one op's share out again to the next.
//!
//! Ops run in stream order, so every op may use all of it. cublasLt's workspace and the partial sums of a two-step
//! reduction lie apart, for ops use them while they hold scratch of their own.

use dsv_spec::params;

use super::super::Dims;
use super::{CTAS_PER_SM, matmul};

/// f32 partial sums a two-step column sum may use.
pub(super) const PARTIAL_SUMS: usize = 1 << 22;
/// Tokens that eight warps of `gram_sums`, `gram_query` and `gram_key` take at once: a CTA has a multiple of them.
const GRAM_TILES: [usize; 3] = [256, 256, 128];
/// CTAs that share a multiprocessor, of `gram_sums`, `gram_query` and `gram_key`.
const fn gram_ctas_per_sm(head_dim: usize) -> [usize; 3] {
    if head_dim > 128 { [1, 1, 2] } else { [2, 1, 3] }
}

/// Ranges begin at multiples of this many bytes.
const ALIGN: usize = 256;

/// Byte ranges of the scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The device error flag, i32.
    pub(super) flag: usize,
    /// cublasLt's workspace.
    pub(super) matmul: usize,
    /// Partial sums of a two-step reduction.
    pub(super) partial: usize,
    /// The rest, for one op at a time.
    pub(super) op: usize,
    /// End.
    pub(super) bytes: usize,
}

impl Layout {
    /// For an op that needs at most `op_bytes`.
    pub(super) fn new(op_bytes: usize) -> Layout {
        let matmul = ALIGN;
        let partial = matmul + matmul::WORKSPACE_BYTES;
        let op = partial + 4 * PARTIAL_SUMS;
        Layout { flag: 0, matmul, partial, op, bytes: op + op_bytes.next_multiple_of(ALIGN) }
    }
}

/// Rows of one chunk and number of chunks, so that `ctas` CTAs have something to do but none fewer than 16 rows.
pub(super) fn chunks(rows: usize, ctas: usize) -> (usize, usize) {
    let rows_per_chunk = rows.div_ceil(ctas.max(1)).max(16);
    (rows_per_chunk, rows.div_ceil(rows_per_chunk))
}

/// Ranges of f32 (or wider, counted in f32) that an op takes, padded as [`Bump`] pads them.
fn floats(ranges: &[usize]) -> usize {
    ranges.iter().map(|n| (4 * n).next_multiple_of(ALIGN)).sum()
}

/// Partial sums of modulation gradients: shift and scale, or the gate alone.
pub(super) fn modulation_bytes(batch: usize, seqlen: usize, dim: usize, ctas: usize) -> usize {
    floats(&[batch * chunks(seqlen, ctas.div_ceil(batch)).1 * 2 * dim])
}

/// Columns of the activation's output that one CTA of its backward walks: 256 threads of 8.
pub(super) const MLP_COLUMNS: usize = 2048;

/// Rows of one chunk and number of chunks in the MLP activation's backward: several CTAs for each that finds room, so that
/// the last ones leave little idle.
pub(super) fn mlp_chunks(rows: usize, hidden: usize, ctas: usize) -> (usize, usize) {
    chunks(rows, (3 * ctas).div_ceil(hidden.div_ceil(MLP_COLUMNS)))
}

/// Its partial sums of the bias gradient.
fn mlp_bytes(rows: usize, hidden: usize, width: usize, ctas: usize) -> usize {
    floats(&[mlp_chunks(rows, hidden, ctas).1 * width])
}

/// Tokens of a CTA and CTAs of a head, where `slabs` heads of `seqlen` tokens share a GPU that `slots` CTAs fill: those by
/// which the last CTA is done first, if one spends on its head what a tile takes. At most twice as many CTAs as slots, or one
/// a head.
fn gram_split(slabs: usize, seqlen: usize, tile: usize, slots: usize) -> (usize, usize) {
    let tiles = seqlen.div_ceil(tile).max(1);
    let most = (2 * slots / slabs.max(1)).clamp(1, tiles);
    let time = |parts: usize| (slabs * parts).div_ceil(slots.max(1)) * (tiles.div_ceil(parts) + 1);
    let parts = (1..=most).min_by_key(|&parts| time(parts)).unwrap_or(1);
    let rows = tile * tiles.div_ceil(parts);
    (rows, seqlen.div_ceil(rows).max(1))
}

/// How the predictor's three kernels are launched, and what lies between them.
#[derive(Clone, Copy, Debug)]
pub(super) struct GramPlan {
    /// Tokens of a CTA and CTAs of a head: of `gram_sums`, `gram_query` and `gram_key`.
    pub(super) splits: [(usize, usize); 3],
    /// f32 of a record of `gram_sums`.
    pub(super) record: usize,
    /// f32 of a record of `gram_query`.
    pub(super) weights: usize,
    /// f32 of each range: records of the CTAs of `gram_sums`, their sum for each head, the same of `gram_query`, losses.
    pub(super) floats: [usize; 5],
}

impl GramPlan {
    /// On a GPU of `multiprocessors`.
    pub(super) fn new(
        [batch, heads, seqlen, head_dim, rank]: [usize; 5],
        multiprocessors: usize,
    ) -> GramPlan {
        let slabs = batch * heads;
        let split = |i: usize| {
            let slabs = if i < 2 { slabs * params::gram_slices(head_dim) } else { slabs };
            gram_split(slabs, seqlen, GRAM_TILES[i], gram_ctas_per_sm(head_dim)[i] * multiprocessors)
        };
        let splits = [split(0), split(1), split(2)];
        let (record, weights) = (params::gram_record(head_dim, rank), rank * (head_dim + rank));
        let [(_, sum_parts), (_, query_parts), _] = splits;
        let floats = [
            slabs * sum_parts * record,
            slabs * record,
            slabs * query_parts * weights,
            slabs * weights,
            slabs * query_parts,
        ];
        GramPlan { splits, record, weights, floats }
    }

    /// What a run of up to `batch` sequences of up to `seqlen` tokens takes.
    fn most_bytes([batch, heads, seqlen, head_dim, rank]: [usize; 5], multiprocessors: usize) -> usize {
        let slabs = batch * heads;
        let (record, weights) = (params::gram_record(head_dim, rank), rank * (head_dim + rank));
        let parts = |ctas_per_sm: usize| {
            (2 * ctas_per_sm * multiprocessors).max(slabs).min(slabs * seqlen.div_ceil(GRAM_TILES[0]).max(1))
        };
        let [of_sums, of_query, _] = gram_ctas_per_sm(head_dim);
        let (sums, queries) = (parts(of_sums), parts(of_query));
        floats(&[sums * record, slabs * record, queries * weights, slabs * weights, queries])
    }
}

/// The profiler's numbers of each sample and head: needed share, covered mass and recall.
fn profile_bytes(batch: usize, heads: usize, samples: usize) -> usize {
    floats(&[batch * samples * heads; 3])
}

/// The most any op but attention needs for a run whose largest problem is `dims`, on a GPU that fills with `ctas`
/// CTAs.
pub(super) fn op_bytes(dims: &Dims, ctas: usize) -> usize {
    let Dims { batch, seqlen, dim, heads, head_dim, d_lr, samples, .. } = *dims;
    // Smaller batches make longer chunks, never more of them in all.
    let modulation = (1..=batch).map(|b| modulation_bytes(b, seqlen, dim, ctas)).max().unwrap_or(0);
    // The MLP with either activation, and the text's; fewer rows never make more chunks than there may be.
    let width = dims.mlp_width;
    let mlp = (1..=batch)
        .flat_map(|b| {
            let (rows, text) = (b * seqlen, b * dims.text_tokens);
            [(rows, width / 2, width), (rows, width, width), (text, dim, dim)]
        })
        .map(|(rows, hidden, width)| mlp_bytes(rows, hidden.max(1), width, ctas))
        .max()
        .unwrap_or(0);
    let weights = floats(&[chunks(batch * seqlen, ctas).1 * 2 * head_dim]);
    // One f32 (loss) or f64 and i32 (norm) a CTA.
    let scalars = floats(&[batch * 8 * ctas, 2 * 8 * ctas, 8 * ctas]);
    let predictor = match d_lr {
        0 => 0,
        rank => GramPlan::most_bytes([batch, heads, seqlen, head_dim, rank], ctas.div_ceil(CTAS_PER_SM)),
    };
    let profile = if samples > 0 { profile_bytes(batch, heads, samples) } else { 0 };
    [modulation, mlp, weights, scalars, predictor, profile].into_iter().max().unwrap_or(0)
}

/// Hands out the op's range of the scratch from its start.
pub(super) struct Bump {
    next: u64,
    end: u64,
}

impl Bump {
    /// All of `bytes` bytes from `start`.
    pub(super) fn new(start: u64, bytes: usize) -> Bump {
        Bump { next: start, end: start + bytes as u64 }
    }

    /// The address of `bytes` bytes, aligned to 256; `None` where less is left.
    pub(super) fn take(&mut self, bytes: usize) -> Option<u64> {
        let address = self.next;
        let next = address + bytes.next_multiple_of(ALIGN) as u64;
        (next <= self.end).then(|| {
            self.next = next;
            address
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_rows_and_stay_few() {
        for (rows, ctas) in [(1, 528), (15, 528), (16, 4), (17, 4), (32_768, 528), (1000, 1), (5, 0)] {
            let (rows_per_chunk, n) = chunks(rows, ctas);
            assert!(rows_per_chunk * n >= rows && rows_per_chunk * (n - 1) < rows, "{rows} {ctas}");
            assert!(n <= ctas.max(1) && rows_per_chunk >= 16, "{rows} {ctas}");
        }
    }

    #[test]
    fn the_predictors_chunks_cover_the_tokens_and_fit_the_scratch() {
        for (batch, heads, seqlen) in [
            (1, 16, 32_768),
            (1, 1, 1),
            (1, 12, 4096),
            (2, 2, 611),
            (8, 12, 4096),
            (9, 30, 257),
            (1, 133, 1000),
        ] {
            let dims = [batch, heads, seqlen, 128, 16];
            let plan = GramPlan::new(dims, 132);
            for ((rows, parts), tile) in plan.splits.into_iter().zip(GRAM_TILES) {
                let covered = rows * parts >= seqlen && rows * (parts - 1) < seqlen;
                assert!(covered && rows % tile == 0, "{dims:?}: {rows} x {parts}");
            }
            let larger = [batch + 1, heads, seqlen + 700, 128, 16];
            for largest in [dims, larger] {
                assert!(
                    floats(&plan.floats) <= GramPlan::most_bytes(largest, 132),
                    "{dims:?} of {largest:?}"
                );
            }
        }
        // One CTA of gram_query a multiprocessor: eight for each of sixteen heads.
        assert_eq!(GramPlan::new([1, 16, 32_768, 128, 16], 132).splits[1], (4096, 8));
    }

    #[test]
    fn scratch_of_a_smaller_batch_is_no_larger() {
        let dims = |batch| Dims {
            batch,
            seqlen: 4096,
            text_tokens: 120,
            text_copies: 1,
            dim: 1152,
            heads: 12,
            head_dim: 64,
            d_lr: 16,
            mlp_width: 8192,
            samples: 64,
            params: 0,
            lists: None,
        };
        for batch in 2..6 {
            assert!(op_bytes(&dims(batch), 528) >= op_bytes(&dims(batch - 1), 528), "{batch}");
        }
    }

    #[test]
    fn bump_pads_and_ends() {
        let mut bump = Bump::new(4096, 1024);
        assert_eq!((bump.take(1), bump.take(256), bump.take(257)), (Some(4096), Some(4352), Some(4608)));
        assert_eq!(bump.take(1), None);
    }
}
