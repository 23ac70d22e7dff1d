//! `gram_sums`, `gram_query` and `gram_key` against the predictor's loss and gradients by definition, in f64. The records of
//! their CTAs are added up here: the trainer has `sum_rows` for that.

use super::tensor::{Flat, Tensor};
use super::{ARCH, Gpu, GpuTest, Outcome};
use crate::corpus::LayoutKind;
use crate::inputs::Placement;
use dsv_reference::attention::{AttnShape, Layout as Rows, View};
use dsv_reference::predictor::{PredictorInputs, definition};
use dsv_reference::rng::SplitMix64;
use dsv_runtime::Layout;
use dsv_spec::params::{GramKey, GramQuery, GramSums, TensorView, gram_record, gram_slices};
use dsv_spec::{Dtype, KernelSpec, PointwiseOp, PointwiseSpec, space};
use half::bf16;

/// Kernels of other ranks than those shipped: head_dim and rank.
const OTHER_RANKS: [(u16, u8); 4] = [(64, 64), (96, 32), (128, 48), (128, 64)];
/// Tokens of a CTA: nine stages of `gram_sums`, three turns of some warps of `gram_query` and two of the others.
const CTA_ROWS: usize = 576;
const HEADS: usize = 2;
const BATCH: usize = 2;

/// What the keys are.
#[derive(Clone, Copy)]
enum Keys {
    /// Normal, with a mean: the centring must matter.
    Normal,
    /// Mostly multiples of one direction, six times the rest of a key's norm in all: what a query sees of the rest is a small
    /// part of a large Gram matrix.
    OneDirection,
}

/// One for each head_dim the trainer serves, and with every rank: two CTAs, the second short of whole tiles.
pub(super) fn tests() -> Vec<GpuTest> {
    let shipped: Vec<(u16, u8)> = space::TRAINER_HEAD_DIMS
        .into_iter()
        .flat_map(|head_dim| space::SHIPPED_RANKS.map(|rank| (head_dim, rank)))
        .collect();
    let normal = shipped.iter().copied().chain(OTHER_RANKS).map(|sizes| (sizes, Keys::Normal));
    normal
        .chain(shipped.iter().map(|&sizes| (sizes, Keys::OneDirection)))
        .map(|((head_dim, rank), keys)| {
            let spec = |op| {
                let spec = PointwiseSpec::shipped(op, Dtype::Bf16, head_dim, rank, ARCH);
                KernelSpec::Pointwise(spec.unwrap_or_else(|e| panic!("no {op} of {head_dim}, {rank}: {e}")))
            };
            let specs = [PointwiseOp::GramSums, PointwiseOp::GramQuery, PointwiseOp::GramKey].map(spec);
            let name = match keys {
                Keys::Normal => format!("predictor/d{head_dim}_r{rank}"),
                Keys::OneDirection => format!("predictor/one_direction/d{head_dim}_r{rank}"),
            };
            GpuTest::new(name, specs.to_vec(), move |gpu| {
                run(gpu, [usize::from(head_dim), usize::from(rank)], 611, keys, specs)
            })
        })
        .collect()
}

/// The CTAs' records of each (sequence, head), added up.
fn added(records: &[f32], ctas: usize, record: usize) -> Vec<f32> {
    let of_slab = |slab: &[f32]| {
        let sum = |i: usize| slab.iter().skip(i).step_by(record).map(|&x| f64::from(x)).sum::<f64>() as f32;
        (0..record).map(sum).collect::<Vec<f32>>()
    };
    records.chunks_exact(ctas * record).flat_map(of_slab).collect()
}

fn run(
    gpu: &mut Gpu,
    [head_dim, rank]: [usize; 2],
    seqlen: usize,
    keys: Keys,
    specs: [KernelSpec; 3],
) -> Outcome {
    let sums_kernel = gpu.kernel(&specs[0])?;
    let (query_kernel, key_kernel) = (gpu.kernel(&specs[1])?, gpu.kernel(&specs[2])?);
    let gpu = &*gpu;
    let shape = AttnShape::new(BATCH, seqlen, HEADS, head_dim);
    let mut rng = SplitMix64::new(head_dim as u64);
    let mut numbers = |columns: usize, scale: f32, mean: f32| -> Vec<f32> {
        let values = rng.normals(BATCH * seqlen * HEADS * columns, scale);
        let moved = values.into_iter().enumerate().map(|(i, x)| x + (i % 7) as f32 * mean);
        moved.map(|x| bf16::from_f32(x).to_f32()).collect()
    };
    let (q, mut k) = (numbers(head_dim, 1.0, 0.0), numbers(head_dim, 1.0, 0.2));
    let (q_lr, k_lr) = (numbers(rank, 0.7, 0.0), numbers(rank, 0.7, 0.1));

    if let Keys::OneDirection = keys {
        let direction = SplitMix64::new(7).normals(head_dim, 1.0);
        let amounts = rng.normals(BATCH * seqlen * HEADS, 6.0);
        for (key, amount) in k.chunks_exact_mut(head_dim).zip(amounts) {
            for (x, along) in key.iter_mut().zip(&direction) {
                *x = bf16::from_f32(*x + amount * along).to_f32();
            }
        }
    }

    let place = |columns| Placement::of(LayoutKind::Padded, 0, BATCH, seqlen, HEADS, columns);
    let rows = |columns| [BATCH, seqlen, HEADS, columns];
    let given = |name, columns, data: &[f32]| {
        Tensor::with_rows(gpu, name, Dtype::Bf16, place(columns), rows(columns), data)
    };
    let made = |name| Tensor::poisoned(gpu, name, Dtype::Bf16, place(rank), rows(rank), 0xFF);
    let (q_rows, k_rows) = (given("q", head_dim, &q)?, given("k", head_dim, &k)?);
    let (q_lr_rows, k_lr_rows) = (given("q_lr", rank, &q_lr)?, given("k_lr", rank, &k_lr)?);
    let (d_q_lr, d_k_lr) = (made("d_q_lr")?, made("d_k_lr")?);
    let view = |tensor: &Tensor, columns| {
        let Layout { batch, seq, head } = Tensor::layout(&place(columns));
        TensorView { ptr: tensor.address(), stride_batch: batch, stride_seq: seq, stride_head: head }
    };
    let ctas = seqlen.div_ceil(CTA_ROWS);
    let loss_partial = Flat::poisoned(gpu, "partial losses", 4 * BATCH * ctas * HEADS, 0xFF)?;
    let loss = Flat::poisoned(gpu, "loss", 4 * HEADS, 0xFF)?;
    let grid = [ctas as u32, HEADS as u32, BATCH as u32];
    let record = gram_record(head_dim, rank);
    let partial = Flat::poisoned(gpu, "partial sums", 4 * BATCH * HEADS * ctas * record, 0xFF)?;
    let params = GramSums {
        k: view(&k_rows, head_dim),
        k_lr: view(&k_lr_rows, rank),
        partial: partial.address(),
        num_heads: HEADS as i32,
        seqlen: seqlen as i32,
        rows_per_cta: CTA_ROWS as i32,
        reserved: 0,
    };
    // SAFETY: the parameters are the kernel's; every buffer has the size they say and lives past the wait.
    unsafe {
        sums_kernel.launch(
            &gpu.stream,
            [grid[0], grid[1], grid[2] * gram_slices(head_dim) as u32],
            specs[0].facts().smem_bytes,
            &params,
        )?
    };
    gpu.wait()?;
    let sums = Flat::of(gpu, "sums", &added(&partial.read::<f32>(gpu)?, ctas, record))?;
    let columns = rank * (head_dim + rank);
    let partial = Flat::poisoned(gpu, "partial weights", 4 * BATCH * HEADS * ctas * columns, 0xFF)?;
    let params = GramQuery {
        q: view(&q_rows, head_dim),
        q_lr: view(&q_lr_rows, rank),
        d_q_lr: view(&d_q_lr, rank),
        sums: sums.address(),
        weights: partial.address(),
        loss: loss_partial.address(),
        num_heads: HEADS as i32,
        seqlen: seqlen as i32,
        rows_per_cta: CTA_ROWS as i32,
        scale: shape.scale as f32,
        gradient_factor: 1.0 / (BATCH * HEADS * seqlen) as f32,
        reserved: 0,
    };
    let sliced = [grid[0], grid[1], grid[2] * (gram_slices(head_dim) * rank / 16) as u32];
    // SAFETY: as above.
    unsafe { query_kernel.launch(&gpu.stream, sliced, specs[1].facts().smem_bytes, &params)? };
    gpu.wait()?;
    let weights = Flat::of(gpu, "weights", &added(&partial.read::<f32>(gpu)?, ctas, columns))?;
    let params = GramKey {
        k: view(&k_rows, head_dim),
        k_lr: view(&k_lr_rows, rank),
        d_k_lr: view(&d_k_lr, rank),
        weights: weights.address(),
        sums: sums.address(),
        loss_partial: loss_partial.address(),
        loss: loss.address(),
        num_heads: HEADS as i32,
        seqlen: seqlen as i32,
        rows_per_chunk: CTA_ROWS as i32,
        loss_parts: (BATCH * ctas) as i32,
        loss_factor: 1.0 / (BATCH * seqlen) as f32,
        reserved: 0,
    };
    // SAFETY: as above.
    unsafe { key_kernel.launch(&gpu.stream, grid, specs[2].facts().smem_bytes, &params)? };
    gpu.wait()?;

    let low = |data| View::new(data, Rows::bshd(seqlen, HEADS, rank));
    let inputs = PredictorInputs {
        q_lr: low(&q_lr[..]),
        k_lr: low(&k_lr[..]),
        q: View::new(&q[..], shape.q_layout()),
        k: View::new(&k[..], shape.kv_layout()),
    };
    let exact = definition(&shape, rank, &inputs)?;
    let mut worst = [0.0f64; 3];
    let found = loss.read::<f32>(gpu)?.iter().map(|&x| f64::from(x)).sum::<f64>();
    worst[0] = (found / HEADS as f64 / exact.loss - 1.0).abs();
    // Gradients are rounded to bf16 once, and so are the weighted rows on the way to that of the keys: 2^-9 each. Gram
    // matrices are kept to 2^-17, of a norm that is a sum of terms of either sign.
    for (i, (tensor, wanted)) in [(&d_q_lr, &exact.d_q_lr), (&d_k_lr, &exact.d_k_lr)].into_iter().enumerate()
    {
        let largest = wanted.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        for (at, (&found, &wanted)) in tensor.rows(gpu)?.iter().zip(wanted).enumerate() {
            let off = (f64::from(found) - wanted).abs();
            let bound = wanted.abs() / 128.0 + largest / 256.0;
            if off.is_nan() || off > bound {
                let name = ["d_q_lr", "d_k_lr"][i];
                return Err(format!("{name} {at} is {found:e}, wanted {wanted:e} within {bound:e}").into());
            }
            worst[i + 1] = worst[i + 1].max(off / largest);
        }
    }
    if worst[0].is_nan() || worst[0] > 1e-3 {
        return Err(format!("the loss is off by {:e} of itself, allowed: 1e-3", worst[0]).into());
    }
    for tensor in [&q_rows, &k_rows, &q_lr_rows, &k_lr_rows] {
        tensor.rows(gpu)?;
    }
    Ok(format!("  loss within {:.1e}, gradients {:.1e}, {:.1e}", worst[0], worst[1], worst[2]))
}
