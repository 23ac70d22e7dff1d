//! `flow_prepare` against its meaning in f64: patches, noise that belongs to a place of the clip, target.

use super::tensor::Flat;
use super::{ARCH, Gpu, GpuTest, Outcome};
use dsv_reference::layers::{PatchDims, flow_prepare};
use dsv_reference::rng::SplitMix64;
use dsv_spec::params::{FlowPrepare, Patches};
use dsv_spec::{Dtype, KernelSpec, PointwiseOp, PointwiseSpec};
use half::bf16;

/// A width of whole Philox blocks, and one that blocks do not divide; two sequences.
pub(super) fn tests() -> Vec<GpuTest> {
    let spec = PointwiseSpec::shipped(PointwiseOp::FlowPrepare, Dtype::Bf16, 0, 0, ARCH);
    let spec = KernelSpec::Pointwise(spec.unwrap_or_else(|e| panic!("no flow_prepare: {e}")));
    [("whole_blocks", 4, [1, 2, 2]), ("cut_blocks", 3, [1, 2, 1])]
        .into_iter()
        .map(|(name, channels, patch)| {
            let dims = PatchDims { batch: 2, channels, latent: [4, 6, 6], patch };
            GpuTest::new(format!("flow_prepare/{name}"), vec![spec], move |gpu| run(gpu, dims, spec))
        })
        .collect()
}

fn run(gpu: &mut Gpu, dims: PatchDims, spec: KernelSpec) -> Outcome {
    let kernel = gpu.kernel(&spec)?;
    let gpu = &*gpu;
    // Patches hold every latent once.
    let (tokens, values) = (dims.tokens(), 2 * dims.tokens() * dims.width());
    let mut rng = SplitMix64::new(7);
    // Any permutation will do.
    let mut order: Vec<i32> = (0..tokens as i32).collect();
    (1..tokens).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
    let latents = rng.normals(values, 1.0);
    let (times, keys) = ([0.25f32, 0.75], [[5u32, 6], [7, 0xFFFF_FFFF]]);
    let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let (mut x_t, mut target) = (vec![0.0f64; values], vec![0.0f64; values]);
    flow_prepare(dims, &order, &wide(&latents), &wide(&times), &keys, &mut x_t, &mut target);

    let given = |name, data: &[f32]| Flat::of(gpu, name, data);
    let (latents, t) = (given("latents", &latents)?, given("t", &times)?);
    let (order, keys) = (Flat::of(gpu, "order", &order)?, Flat::of(gpu, "keys", &keys.concat())?);
    let made = Flat::poisoned(gpu, "x_t", 2 * values, 0xFF)?;
    let aim = Flat::poisoned(gpu, "target", 4 * values, 0xFF)?;
    let params = FlowPrepare {
        latents: latents.address(),
        order: order.address(),
        t: t.address(),
        keys: keys.address(),
        x_t: made.address(),
        target: aim.address(),
        patches: Patches {
            channels: dims.channels as i32,
            latent: dims.latent.map(|n| n as i32),
            patch: dims.patch.map(|n| n as i32),
            reserved: 0,
        },
        batch: 2,
        reserved: 0,
    };
    // SAFETY: the parameters are the kernel's; every buffer has the size they say and lives past the wait.
    unsafe { kernel.launch(&gpu.stream, [1, 2, 1], spec.facts().smem_bytes, &params)? };
    gpu.wait()?;
    // Logarithms and sines of the device: 1e-5 of a standard deviation. x_t is rounded to bf16 once.
    let mut worst = 0.0f64;
    let found: Vec<f32> = aim.read(gpu)?;
    for (i, (&found, &wanted)) in found.iter().zip(&target).enumerate() {
        let off = (f64::from(found) - wanted).abs();
        if off.is_nan() || off > 1e-5 * (1.0 + wanted.abs()) {
            return Err(format!("target {i} is {found}, wanted {wanted}").into());
        }
        worst = worst.max(off);
    }
    for (i, (found, &wanted)) in made.read::<bf16>(gpu)?.iter().zip(&x_t).enumerate() {
        let off = (found.to_f64() - wanted).abs();
        if off.is_nan() || off > wanted.abs() / 256.0 + 1e-5 {
            return Err(format!("x_t {i} is {found}, wanted {wanted}").into());
        }
    }
    Ok(format!("  target within {worst:.1e}"))
}
