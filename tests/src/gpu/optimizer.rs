//! `adamw` against f64, `adamw_8bit` against the reference bit for bit, over several steps.

use super::tensor::{Flat, same};
use super::{ARCH, Gpu, GpuTest, Outcome};
use dsv_reference::compare::{all_passed, compare};
use dsv_reference::layers::eight_bits::{self, BLOCK, Numbers};
use dsv_reference::layers::{AdamWStep, adamw};
use dsv_reference::rng::SplitMix64;
use dsv_spec::params::{AdamW, AdamW8};
use dsv_spec::{Dtype, KernelSpec, PointwiseOp, PointwiseSpec};
use half::bf16;

/// Counts around the vector width, and one with more work than threads.
pub(super) fn tests() -> Vec<GpuTest> {
    let spec = PointwiseSpec::new(PointwiseOp::AdamW, Dtype::Bf16, 0, 0, 4, ARCH).map(KernelSpec::Pointwise);
    let f32 = [1usize, 3, 4, 1023, 100_003, 3_000_001].into_iter().map(|count| {
        let kernels = spec.iter().copied().collect();
        GpuTest::new(format!("adamw/count_{count}"), kernels, move |gpu| run(gpu, count))
    });
    let coded =
        PointwiseSpec::new(PointwiseOp::AdamW8, Dtype::Bf16, 0, 0, 4, ARCH).map(KernelSpec::Pointwise).ok();
    let coded = [1usize, 7, 300, 20_000].into_iter().map(|blocks| {
        let name = format!("adamw_8bit/blocks_{blocks}");
        GpuTest::new(name, coded.into_iter().collect(), move |gpu| run_8bit(gpu, coded, blocks))
    });
    f32.chain(coded).collect()
}

/// Five steps, the last with a factor that skips it; everything in the same bits as on the CPU.
fn run_8bit(gpu: &mut Gpu, spec: Option<KernelSpec>, blocks: usize) -> Outcome {
    let gpu = &*gpu;
    let kernel = gpu.runtime.kernels().load(&spec.ok_or_else(|| "no spec of adamw_8bit".to_string())?)?;
    let count = blocks * BLOCK;
    let mut rng = SplitMix64::new(count as u64);
    let mut master = rng.normals(count, 1.0);
    let mut moments = [(vec![0u8; count], vec![0.0f32; blocks]), (vec![0u8; count], vec![0.0f32; blocks])];
    let on_gpu = Flat::of(gpu, "master", &master)?;
    let codes = [Flat::of(gpu, "codes1", &moments[0].0)?, Flat::of(gpu, "codes2", &moments[1].0)?];
    let scales = [Flat::of(gpu, "scales1", &moments[0].1)?, Flat::of(gpu, "scales2", &moments[1].1)?];
    let weight = Flat::poisoned(gpu, "weight", 2 * count, 0xFF)?;
    let first = 5_000_000_000u64;
    for step in 1..=5u64 {
        let factor = if step == 5 { f32::INFINITY } else { 0.37 };
        // Sizes over many decades within a block; one block without any gradient, one with gradients too small to keep.
        let mut gradient = rng.normals(count, 0.01);
        for (i, g) in gradient.iter_mut().enumerate() {
            *g *= 10f32.powi(-((i % 11) as i32)) * [1.0, 0.0, 1e-25][i / BLOCK % 3];
        }
        let (grad, factors) = (Flat::of(gpu, "grad", &gradient)?, Flat::of(gpu, "grad_factor", &[factor])?);
        let numbers = Numbers::from(&AdamWStep {
            lr: 3e-3,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.1,
            step,
        });
        let Numbers { keep, size, root, beta1, beta2, eps, seed } = numbers;
        let params = AdamW8 {
            master: on_gpu.address(),
            codes1: codes[0].address(),
            scales1: scales[0].address(),
            codes2: codes[1].address(),
            scales2: scales[1].address(),
            grad: grad.address(),
            weight: weight.address(),
            grad_factor: factors.address(),
            count: count as i64,
            first: first as i64,
            keep,
            size,
            root,
            beta1,
            beta2,
            eps,
            seed,
            reserved: 0,
        };
        let grid = [blocks.div_ceil(8).min(64) as u32, 1, 1];
        // SAFETY: every buffer holds `count` elements, or a scale a block, and lives past the wait.
        unsafe { kernel.launch(&gpu.stream, grid, 0, &params)? };
        gpu.wait()?;
        let [(codes1, scales1), (codes2, scales2)] = &mut moments;
        eight_bits::adamw(
            &numbers,
            factor,
            first,
            &mut master,
            &gradient,
            (codes1, scales1),
            (codes2, scales2),
        );
    }
    let found: Vec<f32> = on_gpu.read(gpu)?;
    same("master", &found, &master)?;
    for (which, (wanted_codes, wanted_scales)) in moments.iter().enumerate() {
        same(&format!("codes of moment {}", which + 1), &codes[which].read::<u8>(gpu)?, wanted_codes)?;
        same(&format!("scales of moment {}", which + 1), &scales[which].read::<f32>(gpu)?, wanted_scales)?;
    }
    let rounded: Vec<u16> = found.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
    same("weight, the master rounded to bf16", &weight.read::<u16>(gpu)?, &rounded)?;
    Ok(format!("  {blocks} blocks in the same bits as the reference"))
}

fn run(gpu: &mut Gpu, count: usize) -> Outcome {
    let gpu = &*gpu;
    let plan = gpu.runtime.adamw(Dtype::Bf16)?;
    let (lr, beta1, beta2, eps, weight_decay, factor) = (3e-3f32, 0.9f32, 0.95f32, 1e-8f32, 0.1f32, 0.37f32);
    let mut rng = SplitMix64::new(count as u64);
    let start = rng.normals(count, 1.0);
    let mut exact = Weights::<f64>::from(&start);
    let mut single = Weights::<f32>::from(&start);
    let master = Flat::of(gpu, "master", &start)?;
    let zeros = vec![0.0f32; count];
    let moment1 = Flat::of(gpu, "moment1", &zeros)?;
    let moment2 = Flat::of(gpu, "moment2", &zeros)?;
    let weight = Flat::poisoned(gpu, "weight", 2 * count, 0xFF)?;
    let factors = [Flat::of(gpu, "grad_factor", &[factor])?, Flat::of(gpu, "grad_factor", &[f32::NAN])?];
    let mut params = AdamW {
        master: master.address(),
        moment1: moment1.address(),
        moment2: moment2.address(),
        weight: weight.address(),
        grad_factor: factors[0].address(),
        count: count as i64,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        ..AdamW::default()
    };
    for step in 1..=5u64 {
        let gradient = rng.normals(count, 0.01);
        let grad = Flat::of(gpu, "grad", &gradient)?;
        let power = step as i32;
        params.grad = grad.address();
        params.bias_correction1 = (1.0 - f64::from(beta1).powi(power)) as f32;
        params.bias_correction2 = (1.0 - f64::from(beta2).powi(power)) as f32;
        // SAFETY: every buffer holds `count` elements and lives past the wait.
        unsafe { plan.step(&gpu.stream, &params)? };
        gpu.wait()?;
        same("grad, which is only read", &grad.read::<f32>(gpu)?, &gradient)?;
        let numbers = AdamWStep {
            lr: f64::from(lr),
            beta1: f64::from(beta1),
            beta2: f64::from(beta2),
            eps: f64::from(eps),
            weight_decay: f64::from(weight_decay),
            step,
        };
        let wide: Vec<f64> = gradient.iter().map(|&g| f64::from(g)).collect();
        adamw(&numbers, f64::from(factor), &mut exact.master, &wide, &mut exact.moment1, &mut exact.moment2);
        adamw(&numbers, factor, &mut single.master, &gradient, &mut single.moment1, &mut single.moment2);
    }
    let found: Vec<f32> = master.read(gpu)?;
    let one = |name: &str, found: &[f32], exact: &[f64], single: &[f32]| {
        compare(name, &[count], found, exact, single, Dtype::F32)
    };
    let results = [
        one("master", &found, &exact.master, &single.master),
        one("moment1", &moment1.read::<f32>(gpu)?, &exact.moment1, &single.moment1),
        one("moment2", &moment2.read::<f32>(gpu)?, &exact.moment2, &single.moment2),
    ];
    all_passed(&results)?;
    let rounded: Vec<u16> = found.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
    same("weight, the master rounded to bf16", &weight.read::<u16>(gpu)?, &rounded)?;

    // A factor that is not finite (an overflown gradient norm) skips the step.
    let grad = Flat::of(gpu, "grad", &zeros)?;
    params.grad = grad.address();
    params.grad_factor = factors[1].address();
    // SAFETY: as above.
    unsafe { plan.step(&gpu.stream, &params)? };
    gpu.wait()?;
    same("master after a skipped step", &master.read::<f32>(gpu)?, &found)?;
    Ok(crate::engines::lines(&results))
}

struct Weights<T> {
    master: Vec<T>,
    moment1: Vec<T>,
    moment2: Vec<T>,
}

impl<T: From<f32> + Clone> Weights<T> {
    fn from(start: &[f32]) -> Weights<T> {
        let zeros = vec![T::from(0.0); start.len()];
        Weights {
            master: start.iter().map(|&x| T::from(x)).collect(),
            moment1: zeros.clone(),
            moment2: zeros,
        }
    }
}
