//! `adamw` against f64, over several steps.

use super::tensor::{Flat, same};
use super::{ARCH, Gpu, GpuTest, Outcome};
use dsv_reference::compare::{all_passed, compare};
use dsv_reference::layers::{AdamWStep, adamw};
use dsv_reference::rng::SplitMix64;
use dsv_spec::params::AdamW;
use dsv_spec::{Dtype, KernelSpec, PointwiseOp, PointwiseSpec};
use half::bf16;

/// Counts around the vector width, and one with more work than threads.
pub(super) fn tests() -> Vec<GpuTest> {
    let spec = PointwiseSpec::new(PointwiseOp::AdamW, Dtype::Bf16, 0, 0, 4, ARCH).map(KernelSpec::Pointwise);
    [1usize, 3, 4, 1023, 100_003, 3_000_001]
        .into_iter()
        .map(|count| {
            let kernels = spec.iter().copied().collect();
            GpuTest::new(format!("adamw/count_{count}"), kernels, move |gpu| run(gpu, count))
        })
        .collect()
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
