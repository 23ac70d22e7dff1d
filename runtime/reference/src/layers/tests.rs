use super::*;
use crate::rng::SplitMix64;

/// Values in (-1, 1), the same on every run.
fn random(seed: u64, len: usize) -> Vec<f64> {
    let mut rng = SplitMix64::new(seed);
    (0..len).map(|_| rng.next_u64() as f64 / u64::MAX as f64 * 2.0 - 1.0).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Asserts that `analytic` is the gradient of `f` at `x`, by central differences in every coordinate.
fn check_gradient(name: &str, x: &[f64], analytic: &[f64], f: impl Fn(&[f64]) -> f64) {
    let h = 1e-5;
    assert_eq!(x.len(), analytic.len(), "{name}");
    for i in 0..x.len() {
        let mut y = x.to_vec();
        y[i] = x[i] + h;
        let up = f(&y);
        y[i] = x[i] - h;
        let numeric = (up - f(&y)) / (2.0 * h);
        assert!(
            (numeric - analytic[i]).abs() < 1e-7 * (1.0 + numeric.abs()),
            "{name}[{i}]: analytic {} numeric {numeric}",
            analytic[i]
        );
    }
}

const DIMS: ModDims = ModDims { batch: 2, seqlen: 5, dim: 6, chunks: 3 };

#[test]
fn norm_mod_gradients() {
    let (x, modulation) = (random(1, 60), random(2, 36));
    let weight = random(3, 60);
    let run = |x: &[f64], modulation: &[f64]| {
        let (mut out, mut mean, mut rstd) = (vec![0.0; 60], vec![0.0; 10], vec![0.0; 10]);
        norm_mod_fwd(DIMS, (2, 0), 1e-6, x, modulation, &mut out, &mut mean, &mut rstd);
        (out, mean, rstd)
    };
    let (_, mean, rstd) = run(&x, &modulation);
    let (mut d_x, mut d_mod) = (vec![1.5; 60], vec![0.0; 36]);
    norm_mod_bwd(DIMS, (2, 0), &x, &modulation, (&mean, &rstd), &weight, &mut d_x, &mut d_mod);
    d_x.iter_mut().for_each(|d| *d -= 1.5);
    check_gradient("x", &x, &d_x, |x| dot(&run(x, &modulation).0, &weight));
    check_gradient("modulation", &modulation, &d_mod, |m| dot(&run(&x, m).0, &weight));
}

#[test]
fn gated_linear_gradients() {
    let (rows, columns, tokens) = (3, 4, 5);
    let (gate, weight, bias) = (random(1, rows), random(2, rows * columns), random(3, rows));
    let (a, d_y) = (random(4, tokens * columns), random(5, tokens * rows));
    let run = |gate: &[f64], weight: &[f64], bias: &[f64]| {
        let (mut gw, mut gb) = (vec![0.0; rows * columns], vec![0.0; rows]);
        gate_weight(gate, weight, bias, &mut gw, &mut gb);
        (0..tokens * rows)
            .map(|i| {
                let (t, r) = (i / rows, i % rows);
                d_y[i] * (dot(&gw[r * columns..][..columns], &a[t * columns..][..columns]) + gb[r])
            })
            .sum::<f64>()
    };
    let token_sum = |f: &dyn Fn(usize) -> f64| (0..tokens).map(f).sum::<f64>();
    let product: Vec<f64> = (0..rows * columns)
        .map(|i| token_sum(&|t| d_y[t * rows + i / columns] * a[t * columns + i % columns]))
        .collect();
    let sum: Vec<f64> = (0..rows).map(|r| token_sum(&|t| d_y[t * rows + r])).collect();
    let (mut d_weight, mut d_bias, mut d_gate) =
        (vec![0.5; rows * columns], vec![0.5; rows], vec![9.0; rows]);
    let inputs = GateInputs { gate: &gate, weight: &weight, bias: &bias, product: &product, sum: &sum };
    gate_grad(&inputs, &mut d_weight, &mut d_bias, &mut d_gate);
    d_weight.iter_mut().chain(&mut d_bias).for_each(|d| *d -= 0.5);
    check_gradient("gate", &gate, &d_gate, |gate| run(gate, &weight, &bias));
    check_gradient("weight", &weight, &d_weight, |weight| run(&gate, weight, &bias));
    check_gradient("bias", &bias, &d_bias, |bias| run(&gate, &weight, bias));
}

#[test]
fn activation_gradients() {
    for (form, width) in [(MlpForm::Gelu, 4), (MlpForm::GeGlu, 8)] {
        let (pre, weight) = (random(1, 3 * width), random(2, 12));
        let pre: Vec<f64> = pre.iter().map(|x| 3.0 * x).collect();
        let run = |pre: &[f64]| {
            let mut out = vec![0.0; 12];
            mlp_act_fwd(form, 4, pre, &mut out);
            dot(&out, &weight)
        };
        let (mut d, mut d_out, mut out) = (pre.clone(), weight.clone(), vec![0.0; 12]);
        mlp_act_bwd(form, 4, &mut d_out, &mut d);
        check_gradient("pre", &pre, &d, run);
        mlp_act_fwd(form, 4, &pre, &mut out);
        assert_eq!(d_out, out, "the activation takes its gradient's place");
    }
    let (x, mut d) = (random(5, 9), random(6, 9));
    let weight = d.clone();
    silu_bwd(&x, &mut d);
    check_gradient("silu", &x, &d, |x| {
        let mut out = vec![0.0; 9];
        silu_fwd(x, &mut out);
        dot(&out, &weight)
    });
}

#[test]
fn gelu_matches_known_values() {
    for (x, y) in [(0.0, 0.0), (1.0, 0.841_191_990_6), (-2.0, -0.045_402_305_9)] {
        assert!((gelu::<f64>(x) - y).abs() < 1e-9, "gelu({x}) = {}", gelu::<f64>(x));
    }
}

#[test]
fn qk_gradients_and_rotation_keeps_length() {
    let dims = QkDims { batch: 2, seqlen: 3, heads: 2, head_dim: 6 };
    let positions = [[0, 1, 2], [3, 0, 1], [1, 5, 4]];
    let (cos, sin) = rope_tables(&positions, 6, 100.0);
    let (qkv, wq, wk) = (random(1, 2 * 3 * 36), random(2, 6), random(3, 6));
    let weight = [random(4, 72), random(5, 72)];
    let run = |qkv: &[f64], wq: &[f64], wk: &[f64]| {
        let (mut q, mut k, mut rq, mut rk) = (vec![0.0; 72], vec![0.0; 72], vec![0.0; 12], vec![0.0; 12]);
        let inputs = QkInputs { qkv, weight: [wq, wk], cos: &cos, sin: &sin };
        qk_prep_fwd(dims, 1e-6, inputs, [&mut q, &mut k], [&mut rq, &mut rk]);
        (dot(&q, &weight[0]) + dot(&k, &weight[1]), rq, rk)
    };
    let (_, rq, rk) = run(&qkv, &wq, &wk);
    let (mut d_qkv, mut d_wq, mut d_wk) = (vec![0.0; qkv.len()], vec![0.0; 6], vec![0.0; 6]);
    let inputs = QkInputs { qkv: &qkv, weight: [&wq, &wk], cos: &cos, sin: &sin };
    let d_out = [&weight[0][..], &weight[1][..]];
    qk_prep_bwd(dims, inputs, [&rq, &rk], d_out, &mut d_qkv, [&mut d_wq, &mut d_wk]);
    check_gradient("qkv", &qkv, &d_qkv, |x| run(x, &wq, &wk).0);
    check_gradient("q weight", &wq, &d_wq, |w| run(&qkv, w, &wk).0);
    check_gradient("k weight", &wk, &d_wk, |w| run(&qkv, &wq, w).0);

    let x = random(7, 36);
    let mut y = x.clone();
    rope_in_place(3, 2, 6, &cos, &sin, false, &mut y);
    assert!((dot(&x, &x) - dot(&y, &y)).abs() < 1e-12 && x[6..] != y[6..]);
    rope_in_place(3, 2, 6, &cos, &sin, true, &mut y);
    assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-12));
}

#[test]
fn rotated_products_depend_on_relative_position_only() {
    let (q, k) = (random(1, 12), random(2, 12));
    let score = |a: [u32; 3], b: [u32; 3]| {
        let rotated = |x: &[f64], p: [u32; 3]| {
            let (cos, sin) = rope_tables(&[p], 12, 50.0);
            let mut x = x.to_vec();
            rope_in_place(1, 1, 12, &cos, &sin, false, &mut x);
            x
        };
        dot(&rotated(&q, a), &rotated(&k, b))
    };
    assert!((score([1, 2, 3], [4, 2, 5]) - score([6, 7, 1], [9, 7, 3])).abs() < 1e-12);
    assert!((score([1, 2, 3], [4, 2, 5]) - score([1, 2, 3], [4, 3, 5])).abs() > 1e-3);
}

#[test]
fn philox_known_answer() {
    // Known-answer vectors of the Random123 distribution.
    assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
}

#[test]
fn noise_is_normal_and_addressed_by_element() {
    let mut long = vec![0f32; 40_000];
    normal([1, 2], &mut long);
    let mut short = vec![0f32; 10];
    normal([1, 2], &mut short);
    assert_eq!(&long[..10], &short[..]);
    let mean = long.iter().map(|&x| f64::from(x)).sum::<f64>() / long.len() as f64;
    let var = long.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / long.len() as f64;
    let beyond_2 = long.iter().filter(|x| x.abs() > 2.0).count() as f64 / long.len() as f64;
    assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.03 && (beyond_2 - 0.0455).abs() < 0.006);
    let mut other = vec![0f32; 10];
    normal([1, 3], &mut other);
    assert!(short.iter().zip(&other).all(|(a, b)| a != b));
}

#[test]
fn patches_round_trip_and_flow_interpolates() {
    let dims = PatchDims { batch: 2, channels: 2, latent: [2, 4, 4], patch: [1, 2, 2] };
    let order: Vec<i32> = [5, 0, 7, 2, 1, 3, 6, 4].to_vec();
    let latents = random(1, 2 * 64);
    let mut tokens = vec![0.0; 128];
    patchify(dims, &order, &latents, &mut tokens);
    // Token 0 is patch 5: frame 1, row 0, column 1 of the 2x2x2 grid; column 0 is its corner in channel 0.
    assert_eq!(tokens[0], latents[16 + 2]);
    let mut back = vec![0.0; 128];
    unpatchify(dims, &order, &tokens, &mut back);
    assert_eq!(back, latents);

    let (mut x_t, mut target) = (vec![0.0; 128], vec![0.0; 128]);
    flow_prepare(dims, &order, &latents, &[0.25, 1.0], &[[1, 1], [2, 2]], &mut x_t, &mut target);
    let mut noise = vec![0.0; 64];
    normal([1, 1], &mut noise);
    // Noise belongs to the patch: token i has that of patch order[i].
    for i in 0..64 {
        let noise = noise[8 * order[i / 8] as usize + i % 8];
        assert!((x_t[i] - (0.75 * tokens[i] + 0.25 * noise)).abs() < 1e-12);
        assert!((target[i] - (noise - tokens[i])).abs() < 1e-12);
    }
    normal([2, 2], &mut noise);
    for (token, &raster) in x_t[64..].chunks(8).zip(&order) {
        assert_eq!(token, &noise[8 * raster as usize..][..8]);
    }
}

#[test]
fn flow_loss_gradient() {
    let (pred, target) = (random(1, 24), random(2, 24));
    let value = |pred: &[f64]| {
        let mut loss = [0.0; 3];
        flow_loss(pred, &target, &mut loss, None, 0.5);
        0.5 * loss.iter().sum::<f64>() / 3.0
    };
    let (mut loss, mut d) = ([0.0; 3], vec![0.0; 24]);
    flow_loss(&pred, &target, &mut loss, Some(&mut d), 0.5);
    check_gradient("pred", &pred, &d, value);
}

#[test]
fn matmul_forms_agree_and_sums_do_not_depend_on_threads() {
    let (m, n, k) = (150, 7, 5);
    let (a, b) = (random(1, m * k), random(2, k * n));
    let plain: Vec<f64> =
        (0..m * n).map(|i| (0..k).map(|x| a[i / n * k + x] * b[x * n + i % n]).sum()).collect();
    let transpose = |x: &[f64], rows: usize, cols: usize| -> Vec<f64> {
        (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
    };
    let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
    for (form, a, b) in [(Transpose::None, &a, &b), (Transpose::Right, &a, &bt), (Transpose::Left, &at, &b)] {
        let mut c = vec![1.0; m * n];
        matmul(form, [m, n, k], a, b, &mut c, true);
        assert!(c.iter().zip(&plain).all(|(c, p)| (c - 1.0 - p).abs() < 1e-12), "{form:?}");
    }
    let values: Vec<f32> = random(3, 1000 * 3).iter().map(|&x| x as f32).collect();
    let sum = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut sums = [0f32; 3];
            sum_rows(&values, &mut sums);
            sums
        })
    };
    assert_eq!(sum(1), sum(5));
}

#[test]
fn adamw_follows_the_formula_and_skips_what_is_not_finite() {
    let step = AdamWStep { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.5, step: 1 };
    let (mut p, mut m, mut v) = ([1.0f64, -2.0], [0.0; 2], [0.0; 2]);
    adamw(&step, 0.5, &mut p, &[4.0, -4.0], &mut m, &mut v);
    // First step: the bias-corrected update is lr * sign(gradient).
    assert!((p[0] - (0.95 - 0.1)).abs() < 1e-8 && (p[1] - (-1.9 + 0.1)).abs() < 1e-8, "{p:?}");
    assert!((m[0] - 0.2).abs() < 1e-12 && (v[0] - 0.04).abs() < 1e-12);
    let before = p;
    adamw(&step, f64::NAN, &mut p, &[4.0, -4.0], &mut m, &mut v);
    assert_eq!(p, before);
}

#[test]
fn grad_norm_names_the_first_tensor_that_is_not_finite() {
    let mut grad = vec![3.0f32, 4.0, 0.0, 0.0, 0.0];
    let segments = [0, 2, 3, 5];
    let r = grad_norm(&grad, &segments, 1.0);
    assert!(r.norm == 5.0 && (r.factor - 0.2).abs() < 1e-6 && r.culprit.is_none());
    grad[4] = f32::NAN;
    grad[2] = f32::INFINITY;
    let r = grad_norm(&grad, &segments, 1.0);
    assert!(r.factor.is_nan() && r.culprit == Some(1));
}

#[test]
fn dropped_captions_become_the_null_embedding() {
    let (text, null) = ([1.0, 2.0, 3.0, 4.0], [9.0, 8.0]);
    let mut out = [0.0; 4];
    text_select_fwd(&[0, 1], &text, &null, &mut out);
    assert_eq!(out, [1.0, 2.0, 9.0, 8.0]);
    let mut d_null = [1.0, 1.0];
    text_select_bwd(&[0, 1], &text, &mut d_null);
    assert_eq!(d_null, [4.0, 5.0]);
}

#[test]
fn averaged_weights() {
    let mut e = [1.0f64];
    ema(0.75, &[5.0], &mut e);
    assert_eq!(e, [2.0]);
}
