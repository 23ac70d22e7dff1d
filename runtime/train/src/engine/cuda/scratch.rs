//! The engine's private scratch: how many bytes the ops of a run need beside their operands, and a bump allocator
//! that hands one op's share out again to the next.
//!
//! Ops run in stream order, so every op may use all of it. cublasLt's workspace and the partial sums of a two-step
//! reduction lie apart, for ops use them while they hold scratch of their own.

use super::super::Dims;
use super::matmul;

/// f32 partial sums a two-step column sum may use.
pub(super) const PARTIAL_SUMS: usize = 1 << 22;
/// Queries or keys one CTA of the predictor's kernels walks.
pub(super) const GRAM_ROWS: usize = 512;

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

/// The predictor's Gram matrices, column sums, weighted rows and losses.
pub(super) fn gram_bytes(batch: usize, heads: usize, seqlen: usize, head_dim: usize, rank: usize) -> usize {
    let slabs = batch * heads;
    floats(&[
        slabs * head_dim * head_dim,
        slabs * rank * head_dim,
        slabs * rank * rank,
        slabs * head_dim,
        slabs * rank,
        slabs * rank * head_dim,
        slabs * rank * rank,
        (slabs * seqlen * rank).div_ceil(2),
        (slabs * seqlen * rank).div_ceil(2),
        slabs * seqlen.div_ceil(GRAM_ROWS),
    ])
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
    let predictor = if d_lr > 0 { gram_bytes(batch, heads, seqlen, head_dim, d_lr) } else { 0 };
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
    fn scratch_of_a_smaller_batch_is_no_larger() {
        let dims = |batch| Dims {
            batch,
            seqlen: 4096,
            text_tokens: 120,
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
