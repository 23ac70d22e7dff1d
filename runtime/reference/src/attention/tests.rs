//! The three implementations against each other, against finite differences, and against identities.

use super::*;
use crate::compare::{all_passed, compare};
use crate::element::Rounding;
use crate::lists::{KvListsBuf, ListDims};
use crate::rng::SplitMix64;
use dsv_spec::Dtype;

struct Case {
    shape: AttnShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
    d_lse: Vec<f32>,
}

impl Case {
    fn new(shape: AttnShape, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        Case {
            shape,
            q: rng.normals(shape.q_len(), 1.0),
            k: rng.normals(shape.kv_len(), 1.0),
            v: rng.normals(shape.kv_len(), 1.0),
            dout: rng.normals(shape.q_len(), 1.0),
            d_lse: rng.normals(shape.lse_len(), 1.0),
        }
    }

    fn inputs(&self) -> AttnInputs<'_, f32> {
        AttnInputs::packed(&self.shape, &self.q, &self.k, &self.v)
    }

    fn dout(&self) -> View<'_, f32> {
        View::new(&self.dout, self.shape.q_layout())
    }

    fn list_dims(&self, query_group: usize, kv_block: usize) -> ListDims {
        let mut dims = ListDims {
            batch: self.shape.batch,
            num_heads: self.shape.num_heads,
            seqlen_q: self.shape.seqlen_q,
            seqlen_kv: self.shape.seqlen_kv,
            query_group,
            kv_block,
            max_selected: 1,
        };
        dims.max_selected = dims.blocks();
        dims
    }

    fn oracle(&self, lists: Option<&KvListsBuf>) -> (AttnOutput<f64>, AttnGrads<f64>) {
        let view = lists.map(KvListsBuf::view);
        let forward = oracle::forward(&self.shape, &self.inputs(), view.as_ref()).unwrap();
        let grads =
            oracle::backward(&self.shape, &self.inputs(), view.as_ref(), &self.dout(), Some(&self.d_lse))
                .unwrap();
        (forward, grads)
    }

    fn tiled(&self, lists: Option<&KvListsBuf>) -> (AttnOutput<f32>, AttnGrads<f32>) {
        let view = lists.map(KvListsBuf::view);
        let forward = tiled::forward(&self.shape, &self.inputs(), view.as_ref()).unwrap();
        let grads = tiled::backward(
            &self.shape,
            &self.inputs(),
            view.as_ref(),
            &View::new(&forward.out, self.shape.q_layout()),
            &forward.lse,
            &self.dout(),
            Some(&self.d_lse),
        )
        .unwrap();
        (forward, grads)
    }
}

fn max_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a != b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| {
        assert!(!d.is_nan(), "NaN in a comparison");
        f64::max(m, d)
    })
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn assert_tiled_matches(case: &Case, lists: Option<&KvListsBuf>, relative: f64) {
    let (forward, grads) = case.oracle(lists);
    let (forward32, grads32) = case.tiled(lists);
    for (name, exact, fast) in [
        ("out", &forward.out, &forward32.out),
        ("lse", &forward.lse, &forward32.lse),
        ("dq", &grads.dq, &grads32.dq),
        ("dk", &grads.dk, &grads32.dk),
        ("dv", &grads.dv, &grads32.dv),
    ] {
        let size = exact.iter().filter(|x| x.is_finite()).fold(1.0, |m: f64, x| m.max(x.abs()));
        let difference = max_difference(exact, &widen(fast));
        assert!(difference <= relative * size, "{name}: {difference:e} of {size:e}");
    }
}

#[test]
fn oracle_gradients_match_finite_differences() {
    let shape = AttnShape::new(2, 7, 4, 3).with_seqlen_kv(11).with_kv_heads(2);
    let case = Case::new(shape, 1);
    let lists = KvListsBuf::random_counts(case.list_dims(3, 4), 1..=2, &mut SplitMix64::new(2));
    for lists in [None, Some(&lists)] {
        let view = lists.map(KvListsBuf::view);
        let loss = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
            let inputs = AttnInputs::packed(&shape, q, k, v);
            let forward = oracle::forward(&shape, &inputs, view.as_ref()).unwrap();
            dot_f64(&forward.out, &case.dout) + dot_f64(&forward.lse, &case.d_lse)
        };
        let (_, grads) = case.oracle(lists);
        let tensors = [widen(&case.q), widen(&case.k), widen(&case.v)];
        for (which, grad) in [&grads.dq, &grads.dk, &grads.dv].into_iter().enumerate() {
            for at in 0..grad.len() {
                let shifted = |step: f64| {
                    let mut t = tensors.clone();
                    t[which][at] += step;
                    loss(&t[0], &t[1], &t[2])
                };
                let numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
                assert!(
                    (numeric - grad[at]).abs() < 1e-7 * (1.0 + grad[at].abs()),
                    "tensor {which} element {at}: {numeric} against {}",
                    grad[at]
                );
            }
        }
    }
}

#[test]
fn everything_listed_is_dense() {
    let case = Case::new(AttnShape::new(2, 70, 2, 16).with_seqlen_kv(53), 3);
    let (forward, grads) = case.oracle(None);
    let (forward32, grads32) = case.tiled(None);
    for (group, block) in [(16, 8), (64, 1), (70, 53), (128, 64)] {
        let lists = KvListsBuf::dense(case.list_dims(group, block));
        assert_eq!(case.oracle(Some(&lists)), (forward.clone(), grads.clone()), "{group} {block}");
        let (f, g) = case.tiled(Some(&lists));
        assert!(max_difference(&widen(&f.out), &widen(&forward32.out)) < 1e-5);
        assert!(max_difference(&widen(&g.dk), &widen(&grads32.dk)) < 1e-4);
    }
}

#[test]
fn order_of_keys_does_not_matter() {
    let shape = AttnShape::new(1, 20, 2, 8).with_seqlen_kv(40);
    let case = Case::new(shape, 4);
    let order = SplitMix64::new(5).permutation(40);
    let row = shape.num_heads * shape.head_dim;
    let permuted = |x: &[f32]| -> Vec<f32> {
        order.iter().flat_map(|&j| x[j * row..(j + 1) * row].iter().copied()).collect()
    };
    let moved = Case {
        k: permuted(&case.k),
        v: permuted(&case.v),
        q: case.q.clone(),
        dout: case.dout.clone(),
        d_lse: case.d_lse.clone(),
        shape,
    };
    // Lists of single keys move with the keys: the key at new place n was at order[n].
    let lists = KvListsBuf::random(case.list_dims(4, 1), 13, &mut SplitMix64::new(6));
    let new_lists = KvListsBuf::from_fn(lists.dims, |b, h, g| {
        let old = lists.view().blocks_of((b * 2 + h) * 5 + g);
        (0..40).filter(|&n| old.contains(&(order[n as usize] as i32))).collect()
    });
    for pair in [None, Some((&lists, &new_lists))] {
        let (forward, grads) = case.oracle(pair.map(|p| p.0));
        let (forward2, grads2) = moved.oracle(pair.map(|p| p.1));
        assert!(max_difference(&forward.out, &forward2.out) < 1e-12);
        assert!(max_difference(&forward.lse, &forward2.lse) < 1e-12);
        assert!(max_difference(&grads.dq, &grads2.dq) < 1e-12);
        let back = |x: &[f64]| -> Vec<f64> {
            let mut y = vec![0.0; x.len()];
            for (n, &j) in order.iter().enumerate() {
                y[j * row..(j + 1) * row].copy_from_slice(&x[n * row..(n + 1) * row]);
            }
            y
        };
        assert!(max_difference(&grads.dk, &back(&grads2.dk)) < 1e-12);
        assert!(max_difference(&grads.dv, &back(&grads2.dv)) < 1e-12);
    }
}

#[test]
fn halves_merge_by_lse() {
    let shape = AttnShape::new(1, 24, 3, 8).with_seqlen_kv(64);
    let case = Case::new(shape, 7);
    let dims = case.list_dims(8, 8);
    let part = |keep: fn(i32) -> bool| {
        let lists = KvListsBuf::from_fn(dims, |_, _, _| (0..8).filter(|&n| keep(n)).collect());
        case.oracle(Some(&lists)).0
    };
    let (whole, _) = case.oracle(None);
    for (a, b) in [(part(|n| n < 3), part(|n| n >= 3)), (part(|_| false), part(|_| true))] {
        for r in 0..shape.lse_len() {
            let (h, i) = (r / 24, r % 24);
            let (x, y) = (a.lse[r], b.lse[r]);
            let max = x.max(y);
            let lse = max + ((x - max).exp() + (y - max).exp()).ln();
            assert!((lse - whole.lse[r]).abs() < 1e-12);
            for d in 0..8 {
                let at = shape.q_layout().offset(0, i, h) + d;
                let merged = a.out[at] * (x - lse).exp() + b.out[at] * (y - lse).exp();
                assert!((merged - whole.out[at]).abs() < 1e-12);
            }
        }
    }
}

#[test]
fn lse_is_the_logarithm_of_the_sum() {
    // All keys equal: every weight is 1/n, lse = s + ln n, out = mean of v; one-hot: a giant key takes all.
    let shape = AttnShape::new(1, 3, 1, 4).with_seqlen_kv(10);
    let mut case = Case::new(shape, 8);
    for j in 1..10 {
        case.k.copy_within(0..4, j * 4);
    }
    let (forward, _) = case.oracle(None);
    for i in 0..3 {
        let s = shape.scale * dot_f64(&case.q[i * 4..][..4], &case.k[..4]);
        assert!((forward.lse[i] - s - 10f64.ln()).abs() < 1e-12);
        for d in 0..4 {
            let mean = (0..10).map(|j| f64::from(case.v[j * 4 + d])).sum::<f64>() / 10.0;
            assert!((forward.out[i * 4 + d] - mean).abs() < 1e-12);
        }
    }
    assert_tiled_matches(&case, None, 2e-6);
    for d in 0..4 {
        case.k[6 * 4 + d] = case.q[d] * 1000.0;
    }
    let (forward, grads) = case.oracle(None);
    assert!(max_difference(&forward.out[..4], &widen(&case.v[6 * 4..7 * 4])) < 1e-12);
    assert!(grads.dq[..4].iter().zip(&case.k[24..28]).all(|(dq, &k)| {
        (dq - shape.scale * f64::from(case.d_lse[0]) * f64::from(k)).abs() < 1e-9 * f64::from(k).abs()
    }));
    assert_tiled_matches(&case, None, 1e-3);
}

#[test]
fn empty_groups_are_exact_zeros() {
    let case = Case::new(AttnShape::new(2, 50, 2, 8), 9);
    let dims = case.list_dims(16, 8);
    let lists = KvListsBuf::from_fn(dims, |_, h, g| if (h + g) % 2 == 0 { vec![] } else { vec![1, 6] });
    let (forward, grads) = case.oracle(Some(&lists));
    let (forward32, grads32) = case.tiled(Some(&lists));
    let view = lists.view();
    let low = lowp::forward(&case.shape, &case.inputs(), Some(&view), Dtype::Bf16, 16).unwrap();
    let low_grads = lowp::backward(
        &case.shape,
        &case.inputs(),
        Some(&view),
        &low,
        &case.dout(),
        Some(&case.d_lse),
        Dtype::Bf16,
    )
    .unwrap();
    let mut empty = 0;
    for b in 0..2 {
        for h in 0..2 {
            for i in 0..50 {
                if (h + i / 16) % 2 == 0 {
                    let r = (b * 2 + h) * 50 + i;
                    assert_eq!(forward.lse[r], f64::NEG_INFINITY);
                    assert_eq!(forward32.lse[r], f32::NEG_INFINITY);
                    assert_eq!(low.lse[r], f32::NEG_INFINITY);
                    let at = case.shape.q_layout().offset(b, i, h);
                    for d in at..at + 8 {
                        assert_eq!((forward.out[d], grads.dq[d]), (0.0, 0.0));
                        assert_eq!((forward32.out[d], grads32.dq[d]), (0.0, 0.0));
                        assert_eq!((low.out[d], low_grads.dq[d]), (0.0, 0.0));
                    }
                    empty += 1;
                }
            }
        }
    }
    assert_eq!(empty, 100);
    // Keys no group lists get no gradient; listed ones do.
    let key = |j| case.shape.kv_layout().offset(1, j, 0);
    assert!(grads.dk[key(0)..][..8].iter().all(|&x| x == 0.0));
    assert!(grads32.dv[key(0)..][..8].iter().all(|&x| x == 0.0));
    assert!(grads.dk[key(9)..][..8].iter().all(|&x| x != 0.0));
    assert_tiled_matches(&case, Some(&lists), 2e-6);
}

#[test]
fn tiled_matches_the_oracle() {
    // 1e-5, not 1e-6: dp - delta cancels in f32 where one key holds most of a row's mass.
    let mut rng = SplitMix64::new(10);
    for (shape, group, block) in [
        (AttnShape::new(1, 1, 1, 8), 64, 64),
        (AttnShape::new(1, 1, 2, 64).with_seqlen_kv(700), 64, 8),
        (AttnShape::new(1, 200, 2, 64).with_seqlen_kv(1), 64, 128),
        (AttnShape::new(2, 333, 4, 32).with_kv_heads(2), 64, 16),
        (AttnShape::new(1, 300, 6, 16).with_seqlen_kv(1203).with_kv_heads(1), 128, 64),
        (AttnShape::new(1, 257, 3, 96).with_seqlen_kv(129), 64, 128),
        (AttnShape::new(3, 130, 4, 20), 256, 1),
        (AttnShape::new(1, 66_000, 1, 8).with_seqlen_kv(5), 64, 2),
    ] {
        let case = Case::new(shape, 11);
        assert_tiled_matches(&case, None, 1e-5);
        let dims = case.list_dims(group, block);
        let lists = KvListsBuf::random_counts(dims, 0..=dims.blocks(), &mut rng);
        assert_tiled_matches(&case, Some(&lists), 1e-5);
    }
}

#[test]
fn large_logits_stay_finite() {
    let shape = AttnShape::new(1, 90, 2, 64);
    let case = Case::new(shape.with_scale(shape.scale * 16.0), 12);
    assert_tiled_matches(&case, None, 3e-5);
    let lists = KvListsBuf::random(case.list_dims(64, 8), 5, &mut SplitMix64::new(1));
    assert_tiled_matches(&case, Some(&lists), 3e-5);
}

#[test]
fn strides_do_not_matter() {
    let shape = AttnShape::new(2, 37, 4, 8).with_seqlen_kv(29).with_kv_heads(2);
    let case = Case::new(shape, 13);
    let expected = case.oracle(None);
    let expected32 = case.tiled(None);
    // q as [B,H,S,D]; k and v interleaved in one buffer with a gap between rows; dout as [B,H,S,D].
    let bhsd = Layout::bhsd(37, 4, 8);
    let kv = Layout { batch: 29 * 2 * 40, seq: 2 * 40, head: 40 };
    let spread = |packed: &[f32], layout: Layout, s: usize, h: usize, offset: usize, into: &mut Vec<f32>| {
        into.resize(into.len().max(offset + layout.extent(2, s, h, 8)), f32::NAN);
        layout.unpack(packed, s, h, 8, &mut into[offset..]);
        assert_eq!(layout.pack(&into[offset..], 2, s, h, 8), packed);
    };
    let (mut q, mut kv_buffer, mut dout) = (Vec::new(), Vec::new(), Vec::new());
    spread(&case.q, bhsd, 37, 4, 0, &mut q);
    spread(&case.k, kv, 29, 2, 0, &mut kv_buffer);
    spread(&case.v, kv, 29, 2, 16, &mut kv_buffer);
    spread(&case.dout, bhsd, 37, 4, 0, &mut dout);
    let inputs = AttnInputs {
        q: View::new(&q, bhsd),
        k: View::new(&kv_buffer, kv),
        v: View::new(&kv_buffer[16..], kv),
    };
    let dout = View::new(&dout[..], bhsd);
    let forward = oracle::forward(&shape, &inputs, None).unwrap();
    let grads = oracle::backward(&shape, &inputs, None, &dout, Some(&case.d_lse)).unwrap();
    assert_eq!((forward, grads), expected);
    let forward = tiled::forward(&shape, &inputs, None).unwrap();
    let out = View::new(&forward.out[..], shape.q_layout());
    let grads = tiled::backward(&shape, &inputs, None, &out, &forward.lse, &dout, Some(&case.d_lse)).unwrap();
    assert!(max_difference(&widen(&forward.out), &widen(&expected32.0.out)) < 1e-6);
    assert!(max_difference(&widen(&grads.dk), &widen(&expected32.1.dk)) < 1e-5);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let case = Case::new(AttnShape::new(1, 700, 3, 32), 14);
    let lists = KvListsBuf::clustered(case.list_dims(64, 16), 11, &mut SplitMix64::new(2));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| (case.tiled(None), case.tiled(Some(&lists))))
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn without_d_lse_its_gradient_is_zero() {
    let mut case = Case::new(AttnShape::new(1, 33, 2, 16), 15);
    case.d_lse.fill(0.0);
    let inputs = case.inputs();
    assert_eq!(
        oracle::backward(&case.shape, &inputs, None, &case.dout(), None).unwrap(),
        case.oracle(None).1
    );
    let (forward, grads) = case.tiled(None);
    let out = View::new(&forward.out[..], case.shape.q_layout());
    let without =
        tiled::backward(&case.shape, &inputs, None, &out, &forward.lse, &case.dout(), None).unwrap();
    assert_eq!(without, grads);
}

/// The tolerance of the GPU tests, with the f32 implementation in the kernel's place: it must pass, also against
/// a model of another tile width, and a kernel with a typical mistake must not.
#[test]
fn the_tolerance_tells_right_from_wrong() {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let shape = AttnShape::new(1, 150, 2, 64).with_seqlen_kv(203);
        let mut case = Case::new(shape, 16);
        for tensor in [&mut case.q, &mut case.k, &mut case.v, &mut case.dout] {
            tensor.iter_mut().for_each(|x| *x = dtype.round(*x));
        }
        let lists = KvListsBuf::random_counts(case.list_dims(64, 8), 3..=12, &mut SplitMix64::new(3));
        let view = lists.view();
        let (exact, exact_grads) = case.oracle(Some(&lists));
        let low = lowp::forward(&shape, &case.inputs(), Some(&view), dtype, 64).unwrap();
        let backward = |saved: &AttnOutput<f32>| {
            lowp::backward(&shape, &case.inputs(), Some(&view), saved, &case.dout(), Some(&case.d_lse), dtype)
                .unwrap()
        };
        let low_grads = backward(&low);
        let check = |forward: &AttnOutput<f32>, grads: &AttnGrads<f32>| {
            let q_dims = [1, 150, 2, 64];
            let kv_dims = [1, 203, 2, 64];
            all_passed(&[
                compare("out", &q_dims, &forward.out, &exact.out, &low.out, dtype),
                compare("lse", &[1, 2, 150], &forward.lse, &exact.lse, &low.lse, Dtype::F32),
                compare("dq", &q_dims, &grads.dq, &exact_grads.dq, &low_grads.dq, dtype),
                compare("dk", &kv_dims, &grads.dk, &exact_grads.dk, &low_grads.dk, dtype),
                compare("dv", &kv_dims, &grads.dv, &exact_grads.dv, &low_grads.dv, dtype),
            ])
        };
        let other = lowp::forward(&shape, &case.inputs(), Some(&view), dtype, 128).unwrap();
        check(&other, &backward(&other)).unwrap();
        let (mut forward32, mut grads32) = case.tiled(Some(&lists));
        for tensor in [&mut forward32.out, &mut grads32.dq, &mut grads32.dk, &mut grads32.dv] {
            tensor.iter_mut().for_each(|x| *x = dtype.round(*x));
        }
        check(&forward32, &grads32).unwrap();

        // A list read one entry short, one group only.
        let mut short = lists.clone();
        short.count[1] -= 1;
        let wrong = case.tiled(Some(&short));
        let text = check(&wrong.0, &wrong.1).unwrap_err().to_string();
        assert!(text.starts_with("5 of 5"), "{text}");
        // dq and dk without the factor `scale`.
        let mut wrong = grads32.clone();
        wrong.dq.iter_mut().for_each(|x| *x *= 8.0);
        let text = check(&forward32, &wrong).unwrap_err().to_string();
        assert!(text.starts_with("1 of 5"), "{text}");
        // One masked-out key let in with logit 0, as a missing tail mask does.
        let mut wrong = forward32.clone();
        for lse in &mut wrong.lse {
            *lse = (lse.exp() + 1.0).ln();
        }
        assert!(check(&wrong, &grads32).is_err());
    }
}

#[test]
fn faults_are_named() {
    let case = Case::new(AttnShape::new(1, 20, 4, 8), 17);
    let refused = |shape: AttnShape| oracle::forward(&shape, &case.inputs(), None).unwrap_err();
    assert!(matches!(
        refused(case.shape.with_kv_heads(3)),
        AttnError::Heads { num_heads: 4, num_kv_heads: 3 }
    ));
    assert!(matches!(refused(case.shape.with_seqlen_kv(0)), AttnError::ZeroSize { name: "seqlen_kv" }));
    assert!(matches!(refused(case.shape.with_scale(f64::NAN)), AttnError::Scale { .. }));
    assert!(matches!(
        refused(case.shape.with_seqlen_kv(21)),
        AttnError::TooShort { name: "k", found: 640, needed: 672, .. }
    ));
    let mut lists = KvListsBuf::dense(case.list_dims(8, 4));
    lists.index[2] = 7;
    let view = lists.view();
    let error = tiled::forward(&case.shape, &case.inputs(), Some(&view)).unwrap_err();
    assert!(matches!(error, AttnError::Lists(ListError::Range { slot: 2, index: 7, blocks: 5, .. })));
    let forward = tiled::forward(&case.shape, &case.inputs(), None).unwrap();
    let out = View::new(&forward.out[..], case.shape.q_layout());
    let error =
        tiled::backward(&case.shape, &case.inputs(), None, &out, &forward.lse[1..], &case.dout(), None)
            .unwrap_err();
    assert_eq!(
        error.to_string(),
        "lse holds 79 entries\n  needed: 80 (batch * num_heads * seqlen_q)\n  \
         next: pass the tensor the forward pass returned"
    );
}
