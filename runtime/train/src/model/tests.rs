use super::*;
use crate::engine::GroupRule;
use crate::engine::{CpuEngine, Precision, cpu::CpuReal};
use crate::rng;

fn shape(mlp: MlpAct) -> ModelShape {
    let patch = PatchShape { batch: 2, channels: 2, latent: [2, 2, 6], patch: [1, 1, 2] };
    let lists = ListShape {
        batch: 2,
        heads: 2,
        seqlen: patch.tokens(),
        query_group: 4,
        kv_block: 2,
        max_selected: 5,
    };
    ModelShape {
        layers: 2,
        heads: 2,
        head_dim: 6,
        mlp,
        hidden: 10,
        text_dim: 5,
        text_tokens: 3,
        text_copies: 3,
        patch,
        eps: 1e-6,
        rope_base: 100.0,
        qk_gain: 1.0,
        cube: dsv_spec::order::Cube::of_group(4),
        window: None,
        predictor: Some(PredictorShape {
            layers: 2,
            d_lr: 4,
            rope: true,
            rule: GroupRule::Centre,
            keep_own: false,
            keep_window: None,
            theta: 0.9,
            samples: 3,
            lists,
        }),
    }
}

struct Rig<T: CpuReal> {
    engine: CpuEngine<T>,
    model: Model,
}

/// A model with random weights everywhere (also where training begins at zero) and random inputs.
fn rig<T: CpuReal>(shape: ModelShape, recompute: bool) -> Rig<T> {
    let mut plan = ArenaPlan::new(T::PRECISION);
    let purposes = Purposes { train: true, recompute, list_slots: shape.layers, ..Purposes::INFERENCE };
    let model = Model::reserve(shape, purposes, &mut plan);
    let mut engine = CpuEngine::<T>::new();
    let e = &mut engine;
    e.reserve(&plan, &model.shape.dims(model.params.master.len())).unwrap();
    model.initialise(e, 7).unwrap();
    let noise = |position: u64, len: usize, scale: f32| -> Vec<f32> {
        let mut out = vec![0f32; len];
        dsv_reference::layers::normal(rng::key(11, rng::Purpose::Sample, position), &mut out);
        out.iter().map(|x| x * scale).collect()
    };
    for (i, (spec, buf)) in model.params.slices(model.params.master).enumerate() {
        let offset = if spec.name.ends_with("_norm") { 1.0 } else { 0.0 };
        let values: Vec<f32> = noise(i as u64, buf.len(), 0.3).iter().map(|x| x + offset).collect();
        e.write_f32(buf, &values).unwrap();
    }
    model.params.refresh(e).unwrap();
    let io = model.io;
    e.write_f32(io.latents, &noise(1000, io.latents.len(), 1.0)).unwrap();
    e.write_f32(io.text, &noise(1001, io.text.len(), 1.0)).unwrap();
    e.write_f32(io.t, &[0.3, 0.8]).unwrap();
    e.write_i32(io.keys, &[1, 2, 3, 4]).unwrap();
    e.write_i32(io.drop, &[0, 1]).unwrap();
    let predictors = model.predictors.as_ref().unwrap();
    e.write_i32(predictors.top_k, &[2, 5, 1, 3]).unwrap();
    e.write_i32(predictors.samples, &[0, 5, 11]).unwrap();
    Rig { engine, model }
}

const DENSE: [BlockAttention; 2] = [BlockAttention::Dense; 2];
const MIXED: [BlockAttention; 2] = [BlockAttention::Sparse { slot: 1 }, BlockAttention::Dense];
const SPARSE: [BlockAttention; 2] = [BlockAttention::Sparse { slot: 1 }, BlockAttention::Sparse { slot: 0 }];

impl<T: CpuReal> Rig<T> {
    fn loss(&mut self, attention: &[BlockAttention]) -> f64 {
        let e = &mut self.engine;
        self.model.params.refresh(e).unwrap();
        self.model.prepare(e);
        self.model.forward(e, attention, PredictorTask::default());
        self.model.loss(e, None);
        e.sync().unwrap();
        let loss = e.values(self.model.io.loss);
        loss.iter().map(|x| x.to_f64()).sum::<f64>() / loss.len() as f64
    }

    fn gradients(&mut self, attention: &[BlockAttention], task: PredictorTask) {
        let e = &mut self.engine;
        let sets = [Some(&self.model.params), self.model.predictors.as_ref().map(|p| &p.params)];
        for set in sets.into_iter().flatten() {
            e.fill(set.state().grad, 0.0);
        }
        self.model.prepare(e);
        self.model.forward(e, attention, task);
        self.model.loss(e, Some(1.0));
        self.model.backward(e, attention);
        e.sync().unwrap();
    }
}

/// Central differences in several coordinates of every tensor against the hand-written backward, in f64.
fn check_whole_model(mlp: MlpAct, attention: &[BlockAttention], recompute: bool) {
    let mut rig = rig::<f64>(shape(mlp), recompute);
    rig.gradients(attention, PredictorTask::default());
    let set = rig.model.params.clone();
    let analytic = rig.engine.values(set.state().grad).to_vec();
    let base = set.master.offset_bytes();
    let (mut checked, mut nonzero) = (0, 0);
    for (spec, buf) in set.slices(set.master) {
        let len = spec.len();
        for j in [0, len / 3, len / 2 + 1, len - 1] {
            let at = j.min(len - 1);
            let flat = (buf.offset_bytes() - base) / 8 + at;
            let h = 1e-5;
            let value = rig.engine.values(set.master)[flat];
            let mut probe = |x: f64| {
                rig.engine.values_mut(set.master)[flat] = x;
                rig.loss(attention)
            };
            let numeric = (probe(value + h) - probe(value - h)) / (2.0 * h);
            probe(value);
            let found = analytic[flat];
            assert!(
                (numeric - found).abs() < 2e-7 * (1.0 + numeric.abs()),
                "{} [{at}] {mlp:?} {attention:?}: backward {found}, differences {numeric}",
                spec.name
            );
            checked += 1;
            nonzero += usize::from(found != 0.0);
        }
    }
    assert!(
        checked == 4 * set.slices(set.master).count() && nonzero * 10 > checked * 9,
        "{nonzero}/{checked}"
    );
}

#[test]
fn gradients_of_the_whole_model_dense_geglu() {
    check_whole_model(MlpAct::GeGlu, &DENSE, true);
}

#[test]
fn gradients_of_the_whole_model_sparse_gelu() {
    check_whole_model(MlpAct::Gelu, &SPARSE, false);
}

#[test]
fn gradients_of_the_whole_model_mixed() {
    check_whole_model(MlpAct::GeGlu, &MIXED, true);
}

#[test]
fn recomputing_changes_no_bit() {
    let run = |recompute| {
        let mut rig = rig::<f32>(shape(MlpAct::GeGlu), recompute);
        rig.gradients(&MIXED, PredictorTask { train: true, profile: true });
        let predictors = rig.model.predictors.as_ref().unwrap();
        let read = |buf| rig.engine.values(buf).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        [
            read(rig.model.params.state().grad),
            read(predictors.params.state().grad),
            read(predictors.loss),
            read(predictors.needed),
            read(predictors.covered),
            read(predictors.recall),
        ]
    };
    let (kept, recomputed) = (run(false), run(true));
    assert_eq!(kept, recomputed);
    assert!(kept[1].iter().any(|&x| x != 0) && kept[4..].iter().flatten().all(|&x| f32::from_bits(x) > 0.0));
}

#[test]
fn the_predictor_is_detached_both_ways() {
    let read = |rig: &Rig<f64>| rig.engine.values(rig.model.params.state().grad).to_vec();
    let mut rig = rig::<f64>(shape(MlpAct::GeGlu), true);
    rig.gradients(&DENSE, PredictorTask::default());
    let without = read(&rig);
    rig.gradients(&DENSE, PredictorTask { train: true, profile: false });
    assert_eq!(without, read(&rig), "training the predictor changes no gradient of the model");
}

/// The predictor's gradient against differences of its own loss.
#[test]
fn predictor_gradient() {
    let mut rig = rig::<f64>(shape(MlpAct::GeGlu), true);
    let task = PredictorTask { train: true, profile: false };
    rig.gradients(&DENSE, task);
    let predictors = rig.model.predictors.clone().unwrap();
    let set = predictors.params.clone();
    let analytic = rig.engine.values(set.state().grad).to_vec();
    for at in (0..2 * 192).step_by(17) {
        let value = rig.engine.values(set.master)[at];
        let mut probe = |x: f64| {
            rig.engine.values_mut(set.master)[at] = x;
            set.refresh(&mut rig.engine).unwrap();
            rig.gradients(&DENSE, task);
            // Each block's predictor is trained on the mean of its own heads.
            let block = at / 192;
            rig.engine.values(predictors.loss)[2 * block..][..2].iter().sum::<f64>() / 2.0
        };
        let numeric = (probe(value + 1e-5) - probe(value - 1e-5)) / 2e-5;
        probe(value);
        assert!(
            (numeric - analytic[at]).abs() < 1e-7 * (1.0 + numeric.abs()),
            "[{at}] {} {numeric}",
            analytic[at]
        );
    }
}

#[test]
fn lists_of_everything_give_the_dense_result() {
    let mut s = shape(MlpAct::GeGlu);
    s.predictor.as_mut().unwrap().lists.max_selected = 6;
    let mut rig = rig::<f64>(s, true);
    let top_k = rig.model.predictors.as_ref().unwrap().top_k;
    rig.engine.write_i32(top_k, &[6; 4]).unwrap();
    let (dense, sparse) = (rig.loss(&DENSE), rig.loss(&SPARSE));
    assert!((dense - sparse).abs() < 1e-12, "{dense} {sparse}");
    rig.engine.write_i32(top_k, &[1; 4]).unwrap();
    assert!((dense - rig.loss(&SPARSE)).abs() > 1e-6);
}

#[test]
fn lists_hold_the_window_whatever_is_predicted() {
    let mut s = shape(MlpAct::GeGlu);
    // 2 x 2 x 3 tokens, so windows of 1 x 1 x 2 tokens: one or two units of two.
    s.keep_window(Some(0.5));
    assert!(s.predictor.unwrap().keep_window.is_some_and(|w| w.side == 0.5 && w.widest == 2));
    let mut rig = rig::<f64>(s, true);
    let predictors = rig.model.predictors.clone().unwrap();
    let windows = rig.model.shape.window_lists(0.5, 4, 2);
    assert!(windows.dims.max_selected <= 2);
    rig.engine.write_i32(predictors.top_k, &[3; 4]).unwrap();
    rig.loss(&SPARSE);
    let ListShape { batch, heads, max_selected, .. } = predictors.shape.lists;
    for slot in &predictors.slots[..2] {
        let index = rig.engine.read_i32(slot.q2k_index).unwrap();
        let groups = windows.dims.groups();
        for (list, ids) in index.chunks(max_selected).enumerate() {
            let listed = |unit: &i32| ids[..3].contains(unit);
            let window = windows.view().blocks_of(list % groups);
            assert!(
                !window.is_empty() && window.iter().all(listed),
                "list {list} is {ids:?}, window {window:?}"
            );
        }
        assert_eq!(index.len(), batch * heads * groups * max_selected);
    }
}

#[test]
fn the_inference_layout_computes_what_the_training_layout_does() {
    let mut train = rig::<f32>(shape(MlpAct::Gelu), true);
    let loss = train.loss(&MIXED);
    let mut plan = ArenaPlan::new(Precision::F32);
    let purposes = Purposes { list_slots: 2, ..Purposes::INFERENCE };
    let model = Model::reserve(shape(MlpAct::Gelu), purposes, &mut plan);
    let mut engine = CpuEngine::<f32>::new();
    engine.reserve(&plan, &model.shape.dims(0)).unwrap();
    model.initialise(&mut engine, 7).unwrap();
    let (a, b) = (&train.model, &model);
    let (pa, pb) = (a.predictors.as_ref().unwrap(), b.predictors.as_ref().unwrap());
    for (from, to) in [
        (a.params.master, b.params.master),
        (pa.params.master, pb.params.master),
        (a.io.latents, b.io.latents),
        (a.io.text, b.io.text),
        (a.io.t, b.io.t),
    ] {
        let values = train.engine.read_f32(from).unwrap();
        engine.write_f32(to, &values).unwrap();
    }
    for (from, to) in [(a.io.keys, b.io.keys), (a.io.drop, b.io.drop), (pa.top_k, pb.top_k)] {
        let values = train.engine.read_i32(from).unwrap();
        engine.write_i32(to, &values).unwrap();
    }
    pb.params.refresh(&mut engine).unwrap();
    assert_eq!(Rig { engine, model }.loss(&MIXED), loss);
}

#[test]
fn texts_are_copied_until_a_gpu_is_busy_and_no_further() {
    for ((batch, heads, tokens), wanted) in [
        ((1, 16, 32_768), 8),
        ((1, 12, 32_768), 8),
        ((8, 16, 32_768), 1),
        ((1, 8, 4096), 8),
        ((1, 2, 1023), 1),
        ((1, 2, 1024), 2),
        ((1, 4, 131_072), 16),
    ] {
        assert_eq!(text_copies(batch, heads, tokens), wanted, "{batch} x {heads} x {tokens}");
    }
}

#[test]
fn copies_of_the_text_change_nothing() {
    let losses = [1, 2, 4].map(|text_copies| {
        let shape = ModelShape { text_copies, ..shape(MlpAct::GeGlu) };
        let mut rig = rig::<f64>(shape, true);
        rig.loss(&DENSE)
    });
    assert!(losses.iter().all(|x| (x - losses[0]).abs() < 1e-12 * losses[0].abs()), "{losses:?}");
}
