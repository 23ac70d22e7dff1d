//! `profile` against the sorted f64 rows: share of needed keys, covered mass, recall; with the LSE at hand and without.

use super::tensor::{Flat, Tensor, flag_is};
use super::{ARCH, Failure, Gpu, GpuTest, Outcome};
use crate::corpus::LayoutKind;
use crate::inputs::Placement;
use dsv_reference::attention::{AttnShape, View};
use dsv_reference::lists::{KvListsBuf, ListDims};
use dsv_reference::profile::{RowProfile, profile_rows};
use dsv_reference::rng::SplitMix64;
use dsv_runtime::Layout;
use dsv_spec::params::{Profile, TensorView, error_bits};
use dsv_spec::{Dtype, KernelSpec, PointwiseOp, PointwiseSpec};
use half::bf16;

#[derive(Clone, Copy, Debug)]
enum Values {
    /// Ordinary attention.
    Normal,
    /// Every key the same: all tie, and which of them are critical is a matter of their index.
    Equal,
    /// One key holds nearly everything.
    Giant,
    /// Three different keys, each many times.
    Few,
    /// One key is NaN.
    Nan,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    head_dim: usize,
    seqlen: usize,
    kv_block: usize,
    theta: f32,
    values: Values,
}

fn cases() -> [Case; 13] {
    use Values::{Equal, Few, Giant, Nan, Normal};
    let case = |name, head_dim, seqlen, kv_block, theta, values| Case {
        name,
        head_dim,
        seqlen,
        kv_block,
        theta,
        values,
    };
    [
        case("typical", 128, 3000, 64, 0.9, Normal),
        case("tokens", 64, 2049, 1, 0.9, Normal),
        case("no_power_of_two", 96, 1203, 8, 0.9, Normal),
        case("short", 128, 5, 1, 0.9, Normal),
        case("half", 64, 1000, 8, 0.5, Normal),
        case("equal", 128, 1500, 8, 0.9, Equal),
        case("giant", 64, 4000, 8, 0.9, Giant),
        case("few", 64, 1111, 1, 0.6, Few),
        case("everything", 64, 777, 8, 1.0, Equal),
        case("nearly_everything", 64, 1500, 1, 0.99, Normal),
        case("blocks_of_128", 128, 1111, 128, 0.9, Normal),
        case("blocks_across_chunks", 64, 2200, 24, 0.8, Normal),
        case("nan_key", 64, 700, 8, 0.9, Nan),
    ]
}

pub(super) fn tests() -> Vec<GpuTest> {
    cases()
        .into_iter()
        .map(|case| {
            let spec = |op| {
                let spec = PointwiseSpec::shipped(op, Dtype::Bf16, case.head_dim as u16, 0, ARCH);
                KernelSpec::Pointwise(spec.unwrap_or_else(|e| panic!("no {op} of {}: {e}", case.head_dim)))
            };
            let spec = spec(PointwiseOp::Profile);
            GpuTest::new(format!("profile/{}", case.name), vec![spec], move |gpu| run(gpu, case, spec))
        })
        .collect()
}

fn run(gpu: &mut Gpu, case: Case, spec: KernelSpec) -> Outcome {
    let kernel = gpu.kernel(&spec)?;
    let gpu = &*gpu;
    let Case { head_dim, seqlen, kv_block, theta, .. } = case;
    let (batch, heads, query_group) = (2, 3, 64);
    let shape = AttnShape::new(batch, seqlen, heads, head_dim);
    let (q, k) = numbers(case, batch * heads);
    let place = Placement::of(LayoutKind::Bshd, 0, batch, seqlen, heads, head_dim);
    let rows = [batch, seqlen, heads, head_dim];
    let q_rows = Tensor::with_rows(gpu, "q", Dtype::Bf16, place, rows, &q)?;
    let k_rows = Tensor::with_rows(gpu, "k", Dtype::Bf16, place, rows, &k)?;
    let dims = ListDims {
        batch,
        num_heads: heads,
        seqlen_q: seqlen,
        seqlen_kv: seqlen,
        query_group,
        kv_block,
        max_selected: seqlen.div_ceil(kv_block).div_ceil(2),
    };
    let lists = KvListsBuf::random_counts(dims, 0..=dims.max_selected, &mut SplitMix64::new(3));
    // Not a multiple of the 8 a CTA takes; the first and the last query among them.
    let samples: Vec<usize> = (0..19).map(|i| i * (seqlen - 1) / 18).collect();

    let ids: Vec<i32> = samples.iter().map(|&i| i as i32).collect();
    let ids = Flat::of(gpu, "samples", &ids)?;
    let index = Flat::of(gpu, "q2k_index", &lists.index)?;
    let count = Flat::of(gpu, "q2k_count", &lists.count)?;
    let found = batch * samples.len() * heads;
    let [needed, covered, recall] =
        ["needed", "covered", "recall"].map(|name| Flat::poisoned(gpu, name, 4 * found, 0xFF));
    let (needed, covered, recall) = (needed?, covered?, recall?);
    let view = |tensor: &Tensor| {
        let Layout { batch, seq, head } = Tensor::layout(&place);
        TensorView { ptr: tensor.address(), stride_batch: batch, stride_seq: seq, stride_head: head }
    };
    let (q, k) = (View::new(&q[..], shape.q_layout()), View::new(&k[..], shape.kv_layout()));
    let mut lse = vec![f32::NAN; batch * heads * seqlen];
    for (b, h, &row) in
        (0..batch * heads).flat_map(|i| samples.iter().map(move |row| (i / heads, i % heads, row)))
    {
        lse[(b * heads + h) * seqlen + row] = log_sum_exp(&shape, &q, &k, (b, h, row)) as f32;
    }
    let lse = Flat::of(gpu, "lse", &lse)?;
    let grid = [samples.len().div_ceil(8) as u32, heads as u32, batch as u32];
    let launch = |lse: u64, index: u64| -> Result<i32, Failure> {
        let flag = Flat::of(gpu, "error_flag", &[0i32])?;
        let params = Profile {
            q: view(&q_rows),
            k: view(&k_rows),
            samples: ids.address(),
            lse,
            q2k_index: index,
            q2k_count: count.address(),
            needed: needed.address(),
            covered: covered.address(),
            recall: recall.address(),
            error_flag: flag.address(),
            num_samples: samples.len() as i32,
            num_heads: heads as i32,
            seqlen_q: seqlen as i32,
            seqlen_kv: seqlen as i32,
            num_groups: dims.groups() as i32,
            query_group: query_group as i32,
            kv_block: kv_block as i32,
            max_selected: dims.max_selected as i32,
            scale_log2: (shape.scale * std::f64::consts::LOG2_E) as f32,
            theta,
        };
        // SAFETY: the parameters are the kernel's; every buffer has the size they say and lives past the wait.
        unsafe { kernel.launch(&gpu.stream, grid, spec.facts().smem_bytes, &params)? };
        gpu.wait()?;
        Ok(flag.read::<i32>(gpu)?[0])
    };
    if matches!(case.values, Values::Nan) {
        flag_is(launch(0, index.address())?, error_bits::SCORE_IS_NAN)?;
        return Ok("  NaN is refused".into());
    }
    // Lists of no block there is, and in no order.
    let blocks = dims.blocks() as i32;
    let beyond = Flat::of(gpu, "q2k_index", &vec![blocks; lists.index.len()])?;
    flag_is(
        launch(lse.address(), beyond.address())? & error_bits::INDEX_OUT_OF_RANGE,
        error_bits::INDEX_OUT_OF_RANGE,
    )?;
    if dims.max_selected > 1 {
        let repeated = Flat::of(gpu, "q2k_index", &vec![0i32; lists.index.len()])?;
        flag_is(launch(lse.address(), repeated.address())?, error_bits::LIST_NOT_ASCENDING)?;
    }

    let exact = profile_rows(&shape, &q, &k, &samples, f64::from(theta), Some(&lists.view()))?;
    let mut worst = [0.0f64; 3];
    for lse in [lse.address(), 0] {
        flag_is(launch(lse, index.address())?, 0)?;
        let found = [needed.read::<f32>(gpu)?, covered.read::<f32>(gpu)?, recall.read::<f32>(gpu)?];
        let how = if lse == 0 { "two passes" } else { "with the LSE" };
        compare(&exact, &found, &shape, samples.len(), &mut worst).map_err(|e| format!("{how}: {e}"))?;
    }
    Ok(format!("  needed within {:.1e}, covered {:.1e}, recall {:.1e}", worst[0], worst[1], worst[2]))
}

/// The natural logarithm of the sum of exponentials of a query's logits.
fn log_sum_exp(
    shape: &AttnShape,
    q: &View<'_, f32>,
    k: &View<'_, f32>,
    (b, h, row): (usize, usize, usize),
) -> f64 {
    let query = q.row(b, row, h, shape.head_dim);
    let logit = |j: usize| {
        let key = k.row(b, j, h, shape.head_dim);
        shape.scale * query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
    };
    let logits: Vec<f64> = (0..shape.seqlen_kv).map(logit).collect();
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + logits.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}

/// Judges needed, covered and recall, [B, samples, H] each; `worst` keeps how far each was off.
fn compare(
    exact: &[RowProfile],
    found: &[Vec<f32>; 3],
    shape: &AttnShape,
    samples: usize,
    worst: &mut [f64; 3],
) -> Result<(), String> {
    for (i, row) in exact.iter().enumerate() {
        let at = (row.batch * samples + i % samples) * shape.num_heads + row.head;
        // What is asked of the kernel is 1/512 of the keys; of short rows a key more or less.
        let key = 1.0 / shape.seqlen_kv as f64;
        let critical = row.critical_share / key;
        let listed = "lists were given";
        let wanted = [row.critical_share, row.covered_mass.ok_or(listed)?, row.recall.ok_or(listed)?];
        let bounds = [(1.0 / 512.0f64).max(key), 2f64.powi(-12), (1.0 / 512.0f64).max(2.0 / critical)];
        for (which, name) in ["needed", "covered", "recall"].into_iter().enumerate() {
            let (found, wanted, bound) = (found[which][at], wanted[which], bounds[which]);
            let off = (f64::from(found) - wanted).abs();
            if off.is_nan() || off > bound {
                return Err(format!(
                    "{name} of batch {}, head {}, query {} is {found}, wanted {wanted} within {bound:.1e}",
                    row.batch, row.head, row.row
                ));
            }
            worst[which] = worst[which].max(off);
        }
    }
    Ok(())
}

/// q and k, [B, S, H, D] packed, of bf16 values.
fn numbers(case: Case, slabs: usize) -> (Vec<f32>, Vec<f32>) {
    let mut rng = SplitMix64::new(17);
    let len = slabs * case.seqlen * case.head_dim;
    let mut q = rng.normals(len, 1.5);
    let mut k = rng.normals(len, 1.0);
    let heads_dim = case.head_dim * 3;
    match case.values {
        Values::Normal => {}
        Values::Equal => k.fill(0.5),
        Values::Giant => {
            q.iter_mut().for_each(|x| *x = x.abs());
            for row in k.chunks_exact_mut(heads_dim).skip(case.seqlen / 3).step_by(case.seqlen) {
                row.fill(4.0);
            }
        }
        Values::Nan => k[heads_dim * (case.seqlen / 2)..][..heads_dim].fill(f32::NAN),
        Values::Few => {
            let kinds: Vec<f32> = k[..5 * heads_dim].to_vec();
            for (i, row) in k.chunks_exact_mut(heads_dim).enumerate() {
                row.copy_from_slice(&kinds[i * i % 5 * heads_dim..][..heads_dim]);
            }
        }
    }
    let round = |values: Vec<f32>| values.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
    (round(q), round(k))
}
