use super::*;
use crate::checkpoint;
use crate::config::{Attention, Decay, EmaOn, Moments, Switch};
use crate::data::Dataset;
use crate::engine::{CpuEngine, Space};
use dsv_reference::layers::eight_bits::{self, Moment};

/// A run of seconds: 2 blocks, 64 tokens.
fn config() -> Config {
    let mut c = Config::preset("tiny").unwrap();
    (c.model.layers, c.model.heads, c.model.head_dim) = (2, 2, 12);
    (c.model.text_dim, c.model.patch) = (16, [1, 2, 2]);
    (c.data.frames, c.data.height, c.data.width, c.data.clips, c.data.validation) = (4, 8, 8, 16, 2);
    (c.train.steps, c.train.warmup_steps, c.train.decay) = (24, 2, Decay::Cosine);
    (c.train.grad_accumulation, c.train.ema_decay) = (2, 0.9);
    c.train.log_every = 3;
    c.dsv.rank = 4;
    c.dsv.switch = Switch::Step(9);
    (c.dsv.profile_every, c.dsv.profile_every_stage2, c.dsv.dispatch_every) = (4, 5, 4);
    // Half of the blocks are forced; lists that skip half are not enough for the others.
    (c.dsv.profile_queries, c.dsv.keep, c.dsv.force_sparse) = (8, Some(0.4), Some(0.5));
    c.dsv.min_sparsity = 0.6;
    c.validate().unwrap();
    c
}

fn engine() -> Box<dyn Engine> {
    Box::new(CpuEngine::<f32>::new())
}

/// Trains to `until`; returns the events.
fn run(trainer: &mut Trainer, data: &Dataset, position: &mut DataPosition, until: u64) -> Vec<Event> {
    let mut events = Vec::new();
    while trainer.step_number() < until {
        let clips = data.next_batch(position, trainer.clips_per_step()).unwrap();
        trainer.step(&clips, &mut events).unwrap();
    }
    trainer.flush(&mut events).unwrap();
    events
}

/// Tensors by name.
type Bits = Vec<(String, Vec<u32>)>;

/// Every tensor of a run, bit for bit.
fn bits(trainer: &mut Trainer) -> Bits {
    let snapshot = trainer.snapshot(DataPosition::default(), &mut Vec::new()).unwrap();
    let bits = |x: &Vec<f32>| x.iter().map(|x| x.to_bits()).collect();
    snapshot.tensors.iter().map(|(name, _, x)| (name.clone(), bits(x))).collect()
}

fn records(events: &[Event]) -> Vec<&StepRecord> {
    events.iter().filter_map(|e| if let Event::Step(r) = e { Some(r) } else { None }).collect()
}

#[test]
fn a_resumed_run_is_bit_for_bit_the_uninterrupted_one() {
    resumes(config(), &[1, 7, 10, 14]);
}

#[test]
fn a_run_over_single_tokens_resumes_bit_for_bit() {
    let mut config = config();
    config.dsv.kv_block = 1;
    // Each group keeps 26 of 64 tokens.
    assert_eq!((config.kv_blocks(), config.max_selected()), (64, 32));
    resumes(config, &[11]);
}

/// What a run of so many steps ends with: its losses and every tensor, and its validation losses.
fn end_of(config: &Config, steps: u64) -> (Vec<StepRecord>, Bits, EvalResult) {
    let data = Dataset::open(config).unwrap();
    let mut trainer = Trainer::new(config.clone(), engine()).unwrap();
    let events = run(&mut trainer, &data, &mut DataPosition::default(), steps);
    let eval = trainer.evaluate(&data).unwrap();
    (records(&events).into_iter().cloned().collect(), bits(&mut trainer), eval)
}

#[test]
fn averages_on_the_host_are_those_on_the_device_bit_for_bit() {
    let mut config = config();
    let on_device = end_of(&config, 12);
    config.train.ema_on = EmaOn::Host;
    let on_host = end_of(&config, 12);
    assert!(on_device == on_host);
    let of = |prefix: &str| {
        on_host.1.iter().filter(|(n, _)| n.starts_with(prefix)).map(|x| &x.1).collect::<Vec<_>>()
    };
    assert!(of("ema.").len() > 20 && of("ema.") != of("weight.")[..of("ema.").len()], "averages lag behind");
    resumes(config, &[7]);
}

#[test]
fn moments_on_the_host_are_those_on_the_device_bit_for_bit() {
    let mut config = config();
    let on_device = end_of(&config, 12);
    (config.train.moments, config.train.ema_on) = (Moments::Host, EmaOn::Host);
    assert!(on_device == end_of(&config, 12));
    resumes(config.clone(), &[7]);
    // A checkpoint does not depend on where its run kept what.
    let data = Dataset::open(&config).unwrap();
    let mut first = Trainer::new(config.clone(), engine()).unwrap();
    let mut position = DataPosition::default();
    run(&mut first, &data, &mut position, 5);
    let found = saved(&mut first, position);
    config.train.moments = Moments::Device;
    let mut second = Trainer::resume(config, engine(), &found.0).unwrap();
    run(&mut second, &data, &mut position, 12);
    assert!(bits(&mut second) == on_device.1);
}

/// The trainer's checkpoint, and the folder it lies in.
fn saved(trainer: &mut Trainer, position: DataPosition) -> (Checkpoint, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = trainer.snapshot(position, &mut Vec::new()).unwrap();
    checkpoint::save(dir.path(), &snapshot.state, &snapshot.tensors(), 0).unwrap();
    (checkpoint::latest(dir.path()).unwrap().checkpoint.unwrap(), dir)
}

#[test]
fn moments_of_eight_bits_train_as_f32_ones_and_resume_bit_for_bit() {
    let mut config = config();
    config.train.steps = 60;
    let (exact, ..) = end_of(&config, 60);
    config.train.moments = Moments::Coded;
    let (coded, tensors, _) = end_of(&config, 60);
    let mean = |r: &[StepRecord]| r[40..].iter().map(|r| r.loss).sum::<f64>() / 20.0;
    let (a, b) = (mean(&exact), mean(&coded));
    assert!(
        (a / b - 1.0).abs() < 0.01 && exact[59].loss != coded[59].loss,
        "loss {a} with f32, {b} with 8 bits"
    );
    // A moment is at most 2 x 120 + 1 multiples of its block's scale.
    let values = |prefix: &str| {
        let tensor = tensors.iter().find(|(n, _)| n == &format!("{prefix}.block.0.up.weight")).unwrap();
        tensor.1[..128].iter().map(|bits| f32::from_bits(*bits)).collect::<Vec<_>>()
    };
    for (prefix, moment) in [("adam_m", Moment::First), ("adam_v", Moment::Second)] {
        let values = values(prefix);
        let (codes, scales) = eight_bits::encode(moment, &values);
        assert_eq!(eight_bits::decode(moment, &codes, &scales), values);
        assert!(scales[0] > 0.0);
    }
    resumes(config, &[7, 13]);
}

#[test]
fn outputs_and_lists_that_went_to_the_host_give_the_same_bits() {
    let mut config = config();
    config.model.layers = 5;
    // Steps of two grids, in stage 2 with dense and sparse blocks.
    config.data.buckets = vec![[2, 8, 8]];
    config.dsv.switch = Switch::Step(4);
    let set_bytes = Layout::new(&config, &CpuEngine::<f32>::new(), None);
    let set_bytes = set_bytes.list_bytes + 4 * 2 * 64 * 24;
    for recompute in [true, false] {
        config.train.recompute = recompute;
        config.train.kept_budget_gb = 0.0;
        let on_device = end_of(&config, 10);
        assert!(on_device.0[9].sparse_share > 0.3 && on_device.0[9].sparse_share < 0.9);
        for (sets, wanted) in [(0.1, 2), (2.5, 2), (3.5, 3), (4.5, 4), (5.5, 5)] {
            config.train.kept_budget_gb = sets * set_bytes as f64 / (1u64 << 30) as f64;
            let layout = Layout::new(&config, &CpuEngine::<f32>::new(), None);
            let of = |space: Space| {
                let named = |a: &&crate::engine::Allocation| {
                    a.space == space && a.label == "kept per block/attention output"
                };
                layout.arena.allocations().iter().filter(named).count()
            };
            assert_eq!((of(Space::Device), of(Space::Host)), (wanted, 5 - wanted), "{sets} sets");
            assert!(on_device == end_of(&config, 10), "{sets} sets, recompute {recompute}");
        }
    }
    config.train.kept_budget_gb = 1e-9;
    let events = resumes(config.clone(), &[7]);
    let moved: Vec<_> = events
        .iter()
        .filter_map(
            |e| if let Event::Transfers { steps, moved, .. } = e { Some((*steps, *moved)) } else { None },
        )
        .collect();
    assert_eq!(moved.iter().map(|(steps, _)| steps).sum::<u64>(), 18);
    // Three blocks a micro-batch go and come back.
    assert!(
        moved.iter().all(|(_, m)| m.to_host_bytes == m.to_device_bytes && m.to_host_bytes > 0),
        "{moved:?}"
    );
    // What no backward follows copies nothing.
    let data = Dataset::open(&config).unwrap();
    let mut trainer = Trainer::new(config.clone(), engine()).unwrap();
    run(&mut trainer, &data, &mut DataPosition::default(), 10);
    trainer.engine.transfers();
    trainer.evaluate(&data).unwrap();
    assert_eq!(trainer.engine.transfers().to_host_bytes, 0);
    config.device.graphs = true;
    let error = config.validate().unwrap_err().to_string();
    assert!(error.contains("device.graphs=false") && error.contains("train.kept_budget_gb=0"), "{error}");
}

/// A run cut at each of these steps and resumed is the whole one; the events of the whole one.
fn resumes(config: Config, cuts: &[u64]) -> Vec<Event> {
    let data = Dataset::open(&config).unwrap();
    let mut whole = Trainer::new(config.clone(), engine()).unwrap();
    let mut position = DataPosition::default();
    let events = run(&mut whole, &data, &mut position, 18);
    let expected = bits(&mut whole);
    // Stops at steps drawn at random, in both stages and between readings of the ring.
    for &cut in cuts {
        let mut first = Trainer::new(config.clone(), engine()).unwrap();
        let mut position = DataPosition::default();
        run(&mut first, &data, &mut position, cut);
        let (found, _dir) = saved(&mut first, position);
        drop(first);
        let mut second = Trainer::resume(config.clone(), engine(), &found).unwrap();
        let mut position = found.state.position;
        let resumed = run(&mut second, &data, &mut position, 18);
        assert_eq!(bits(&mut second), expected, "cut at {cut}");
        let tail: Vec<_> = records(&events).into_iter().filter(|r| r.step >= cut).collect();
        assert_eq!(records(&resumed), tail, "cut at {cut}");
    }
    events
}

/// Cubes of 8 tokens in clips of 4 x 4 x 4.
fn cube(t: u32, h: u32, w: u32) -> Cube {
    Cube { t, h, w }
}

#[test]
fn over_all_keys_the_order_of_the_tokens_changes_nothing() {
    let data = Dataset::open(&config()).unwrap();
    let mut trainers = [None, Some("1x2x4"), None].map(|shape| {
        let mut config = config();
        config.dsv.cube = shape.map(|s| config::CubeChoice::Shape(s.parse().unwrap()));
        Trainer::new(config, engine()).unwrap()
    });
    let mut positions = [DataPosition::default(); 3];
    let mut losses = [Vec::new(), Vec::new(), Vec::new()];
    for until in [4, 9] {
        for (i, trainer) in trainers.iter_mut().enumerate() {
            let events = run(trainer, &data, &mut positions[i], until);
            losses[i].extend(records(&events).iter().map(|r| (r.loss, r.predictor_loss.unwrap())));
        }
        // The third run changes its order on the way.
        trainers[2].reorder(cube(4, 1, 2)).unwrap();
    }
    assert_eq!(trainers[1].model.shape.cube, cube(1, 2, 4));
    assert_ne!(trainers[0].model.shape.token_order().0, trainers[1].model.shape.token_order().0);
    for other in 1..3 {
        for (a, b) in losses[0].iter().zip(&losses[other]) {
            let off = (a.0 - b.0).abs().max((a.1 - b.1).abs());
            assert!(off < 2e-5, "run {other}: {losses:?}");
        }
    }
    let evals = trainers.each_mut().map(|t| t.evaluate(&data).unwrap());
    for other in &evals[1..] {
        assert!(
            evals[0].paired(other).unwrap().difference.abs() < 2e-5,
            "the noise of a triple is that of its places"
        );
    }
}

#[test]
fn a_run_that_chooses_its_cube_resumes_bit_for_bit() {
    let mut config = config();
    config.dsv.cube = Some(config::CubeChoice::Auto);
    config.validate().unwrap();
    let events = resumes(config, &[4, 9, 10, 14]);
    let at = |wanted: fn(&Event) -> bool| events.iter().position(wanted).unwrap();
    let chosen = at(|e| matches!(e, Event::Cube { .. }));
    assert_eq!(chosen, at(|e| matches!(e, Event::Stage { .. })) + 1);
    assert!(chosen < at(|e| matches!(e, Event::Decision { .. })), "lists come after it");
    assert_eq!(events.iter().filter(|e| matches!(e, Event::Cube { .. })).count(), 1);
    let Event::Cube { step, choice } = &events[chosen] else { unreachable!() };
    let shapes: Vec<Cube> = choice.shapes.iter().map(|s| s.cube).collect();
    assert_eq!((*step, shapes), (9, vec![cube(2, 2, 2), cube(1, 2, 4), cube(4, 1, 2)]));
    let needed = choice.shapes.iter().find(|s| s.cube == choice.cube).unwrap().needed;
    assert!(choice.shapes.iter().all(|s| needed <= s.needed / 0.97), "{choice:?}");
    assert!(choice.shapes.iter().all(|s| s.covered >= granularity::COVERED && s.overlap > 0.0), "{choice:?}");
}

#[test]
fn a_chosen_cube_is_in_the_checkpoint() {
    let mut config = config();
    config.dsv.cube = Some(config::CubeChoice::Auto);
    let data = Dataset::open(&config).unwrap();
    let mut whole = Trainer::new(config.clone(), engine()).unwrap();
    let mut position = DataPosition::default();
    run(&mut whole, &data, &mut position, 10);
    // Whatever it chose: now another.
    let other = cube(4, 1, 2);
    whole.cube = Some(other);
    whole.reorder(other).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let snapshot = whole.snapshot(position, &mut Vec::new()).unwrap();
    let root = crate::run::checkpoints(dir.path());
    checkpoint::save(&root, &snapshot.state, &snapshot.tensors(), 0).unwrap();
    let found = checkpoint::latest(&root).unwrap().checkpoint.unwrap();
    let mut resumed = Trainer::resume(config.clone(), engine(), &found).unwrap();
    assert_eq!(resumed.model.shape.cube, other);
    let mut again = position;
    run(&mut resumed, &data, &mut again, 13);
    run(&mut whole, &data, &mut position, 13);
    assert_eq!(bits(&mut resumed), bits(&mut whole));
    let trained = crate::run::open_trained(dir.path(), None, 1, &[]).unwrap();
    assert_eq!(trained.model.shape.cube, other);
    // A cube of the configuration is another order from here on, and so are lists of another size.
    let shape = |sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        crate::run::open_trained(dir.path(), None, 1, &sets).unwrap().model.shape.cube
    };
    assert_eq!(shape(&["dsv.cube=1x2x4"]), cube(1, 2, 4));
    assert_eq!(shape(&["dsv.query_group=16"]), cube(2, 2, 4));
}

#[test]
fn a_step_of_attention_that_is_not_finite_keeps_the_cube() {
    let mut config = config();
    config.dsv.cube = Some(config::CubeChoice::Auto);
    config.dsv.switch = Switch::Step(0);
    let data = Dataset::open(&config).unwrap();
    let mut trainer = Trainer::new(config.clone(), engine()).unwrap();
    let mut clips = data.next_batch(&mut DataPosition::default(), trainer.clips_per_step()).unwrap();
    clips[0].latents[7] = f32::NAN;
    let mut events = Vec::new();
    trainer.step(&clips, &mut events).unwrap();
    let choice =
        events.iter().find_map(|e| if let Event::Cube { choice, .. } = e { Some(choice) } else { None });
    let choice = choice.unwrap();
    assert!(choice.shapes.is_empty() && choice.why.starts_with("2x2x2 stays"), "{choice:?}");
}

#[test]
fn steps_of_several_grids_train_one_model_and_resume_bit_for_bit() {
    let mut config = config();
    // 64, 32 and 48 tokens; the first has the lists of half of the blocks in stage 2, the others theirs.
    config.data.buckets = vec![[2, 8, 8], [3, 4, 16]];
    config.validate().unwrap();
    let events = resumes(config, &[3, 11, 13]);
    let tokens: std::collections::BTreeSet<u64> = records(&events).iter().map(|r| r.tokens).collect();
    assert_eq!(tokens.into_iter().collect::<Vec<_>>(), [4 * 32, 4 * 48, 4 * 64], "every grid had steps");
    assert!(records(&events)[10..].iter().all(|r| r.sparse_share == 0.5 && r.loss.is_finite()));
}

#[test]
fn a_grid_computes_the_same_alone_and_beside_others() {
    let alone = config();
    let mut both = alone.clone();
    both.data.buckets = vec![[8, 8, 8]];
    let clips = |data: &Dataset| (0..4).map(|i| data.validation_clip(i % 2).unwrap()).collect::<Vec<_>>();
    let clips = clips(&Dataset::open(&alone).unwrap());
    let larger = Dataset::open(&both).unwrap();
    let large = (0..larger.len() as u64 / 4)
        .map(|i| larger.next_batch(&mut DataPosition { epoch: 0, index: 4 * i }, 4).unwrap())
        .find(|clips| clips[0].grid == [8, 8, 8])
        .unwrap();
    let mut a = Trainer::new(alone, engine()).unwrap();
    let mut b = Trainer::new(both, engine()).unwrap();
    let mut events = [Vec::new(), Vec::new()];
    for step in 0..12 {
        // Gradients on the larger grid, never applied, in between: they use the same bytes.
        if step % 3 == 1 {
            let weights = b.model.params.master;
            let before = b.engine().read_f32(weights).unwrap();
            let (model, attention) = (b.others[0].0.clone(), b.others[0].1.attention());
            b.compute(&large, &model, &attention, true).unwrap();
            assert!(b.engine().read_f32(weights).unwrap() == before);
        }
        a.step(&clips, &mut events[0]).unwrap();
        b.step(&clips, &mut events[1]).unwrap();
    }
    a.flush(&mut events[0]).unwrap();
    b.flush(&mut events[1]).unwrap();
    assert_eq!(records(&events[0]), records(&events[1]));
    assert!(bits(&mut a) == bits(&mut b));
}

#[test]
fn a_checkpoint_does_not_move_the_end_of_stage_one() {
    let mut config = config();
    config.dsv.profile_every = 100;
    config.dsv.switch = Switch::Loss(1e-9);
    let data = Dataset::open(&config).unwrap();
    let first_sparse = |config: &Config, snapshots: bool| {
        let mut t = Trainer::new(config.clone(), engine()).unwrap();
        let (mut position, mut events) = (DataPosition::default(), Vec::new());
        while t.step_number() < 6 {
            let clips = data.next_batch(&mut position, t.clips_per_step()).unwrap();
            t.step(&clips, &mut events).unwrap();
            if snapshots {
                t.snapshot(position, &mut events).unwrap();
            }
        }
        let losses: Vec<f64> = records(&events).iter().map(|r| r.predictor_loss.unwrap()).collect();
        let stage = |e: &Event| if let Event::Stage { step, .. } = e { Some(*step) } else { None };
        (events.iter().find_map(stage), losses)
    };
    let (never, losses) = first_sparse(&config, false);
    assert_eq!(never, None);
    // Below the loss of step 0, above those of steps 1 and 2: known by the reading after step 2.
    let below = (losses[0] + losses[1].max(losses[2])) / 2.0;
    assert!(below < losses[0], "{losses:?}");
    config.dsv.switch = Switch::Loss(below);
    assert_eq!(first_sparse(&config, false).0, Some(3));
    assert_eq!(first_sparse(&config, true).0, Some(3));
}

#[test]
fn both_stages_run_and_the_loss_falls() {
    falls(config());
}

#[test]
fn both_stages_run_over_single_tokens() {
    let mut config = config();
    config.dsv.kv_block = 1;
    falls(config);
}

fn falls(mut config: Config) {
    // 40 % of the units, rounded up.
    let units = config.kv_blocks() as f64;
    let kept = (0.4 * units).ceil() / units;
    config.train.grad_accumulation = 1;
    (config.train.steps, config.train.lr) = (60, 4e-3);
    config.dsv.switch = Switch::Step(30);
    let data = Dataset::open(&config).unwrap();
    let mut trainer = Trainer::new(config, engine()).unwrap();
    let events = run(&mut trainer, &data, &mut DataPosition::default(), 60);
    let records = records(&events);
    let mean = |range: std::ops::Range<usize>, f: &dyn Fn(&StepRecord) -> f64| {
        records[range.clone()].iter().map(|r| f(r)).sum::<f64>() / range.len() as f64
    };
    let (first, last) = (mean(0..10, &|r| r.loss), mean(50..60, &|r| r.loss));
    assert!(last < 0.85 * first, "loss {first} -> {last}");
    let predictor = |r: &StepRecord| r.predictor_loss.unwrap();
    let (first, last) = (mean(0..5, &predictor), mean(25..30, &predictor));
    assert!(last < 0.8 * first, "predictor loss {first} -> {last}");
    assert!(records[..30].iter().all(|r| r.stage == 1 && r.sparse_share == 0.0));
    assert!(records[30..].iter().all(|r| r.stage == 2 && r.sparse_share == 0.5));
    let stages = events.iter().filter(|e| matches!(e, Event::Stage { step: 30, .. })).count();
    let decisions = events.iter().filter(|e| matches!(e, Event::Decision { .. })).count();
    assert_eq!((stages, decisions), (1, 8));
    let covered = trainer.profile().covered.iter().flatten().copied().fold(f64::INFINITY, f64::min);
    assert!(covered > 0.8 * kept, "lists of {kept} of the keys cover {covered} of the mass");
}

#[test]
fn budgets_by_need_follow_the_profiles_and_keep_their_total() {
    let mut config = config();
    (config.dsv.share, config.dsv.max_keep, config.dsv.kv_block) = (config::Share::Need, 0.75, 1);
    for attention in [Attention::Dsv, Attention::Fixed] {
        config.dsv.attention = attention;
        config.validate().unwrap();
        let events = resumes(config.clone(), &[7, 14]);
        let trainer = Trainer::new(config.clone(), engine()).unwrap();
        let rules = rules(&config, &*trainer.engine, &trainer.model, trainer.slots());
        assert_eq!((rules.kv_blocks, rules.max_selected), (64, 48));
        let mut profile = ProfileState::new();
        let mut budgets = Vec::new();
        for event in &events {
            match event {
                Event::Profile { profile: seen, .. } => profile = seen.clone(),
                Event::Decision { decision, .. } => {
                    assert_eq!(*decision, Decision::choose(&rules, &profile));
                    // 40 % of 64, rounded up, for two heads of two blocks.
                    assert_eq!(decision.top_k().iter().sum::<i32>(), 4 * 26, "{decision:?}");
                    budgets.push(decision.top_k());
                }
                _ => {}
            }
        }
        let first = budgets[0].clone();
        assert_eq!(
            first == [26; 4],
            attention == Attention::Fixed,
            "even before a profile alone: {budgets:?}"
        );
        assert!(budgets.last() != Some(&first), "{budgets:?}");
    }
}

#[test]
fn the_baseline_trains_without_predictors_from_the_same_weights_and_noise() {
    let mut config = config();
    let data = Dataset::open(&config).unwrap();
    let first = |config: &Config| {
        let mut trainer = Trainer::new(config.clone(), engine()).unwrap();
        let events = run(&mut trainer, &data, &mut DataPosition::default(), 4);
        records(&events).into_iter().cloned().collect::<Vec<_>>()
    };
    let dense_stage = first(&config);
    config.dsv.attention = Attention::Full;
    let baseline = first(&config);
    assert!(baseline.iter().all(|r| r.stage == 0 && r.predictor_loss.is_none()));
    let losses = |r: &[StepRecord]| r.iter().map(|r| r.loss).collect::<Vec<_>>();
    assert_eq!(losses(&baseline), losses(&dense_stage), "stage 1 is the baseline, bit for bit");
}

#[test]
fn baselines_attend_as_they_say() {
    let data = Dataset::open(&config()).unwrap();
    let first = |attention: Attention| {
        let mut config = config();
        (config.dsv.attention, config.dsv.keep, config.dsv.max_keep) = (attention, Some(0.4), 1.0);
        let mut trainer = Trainer::new(config, engine()).unwrap();
        let events = run(&mut trainer, &data, &mut DataPosition::default(), 4);
        let decision = trainer.decision().clone();
        (records(&events).into_iter().cloned().collect::<Vec<_>>(), decision, events)
    };
    let losses = |r: &[StepRecord]| r.iter().map(|r| r.loss).collect::<Vec<_>>();
    let (full, ..) = first(Attention::Full);
    let (medium, decision, events) = first(Attention::WaM);
    assert!(medium.iter().all(|r| r.stage == 0 && r.sparse_share == 1.0 && r.predictor_loss.is_none()));
    assert_eq!(decision.attention(), [BlockAttention::Window; 2]);
    // 4 x 4 x 4 tokens in cubes of 2 x 2 x 2: a window of one token lies in one of 8 blocks.
    assert!((decision.blocks[0].skipped - 7.0 / 8.0).abs() < 1e-12, "{decision:?}");
    assert!(
        decision.blocks[0].why.contains("a third of each side, 12.5 % of the pairs kept"),
        "{decision:?}"
    );
    assert!(events.iter().any(|e| matches!(e, Event::Decision { step: 0, .. })));
    let (large, decision, _) = first(Attention::WaL);
    assert_eq!(decision.blocks[1].skipped, 0.0, "three tokens of four lie in both blocks of each side");
    // The head begins at zero: the first loss is everyone's, later ones depend on the attention.
    let all = [losses(&full), losses(&medium), losses(&large)];
    assert!(all[0][0] == all[1][0] && all[1][0] == all[2][0], "{all:?}");
    assert!(all[0][3] != all[1][3], "{all:?}");
    assert_eq!(all[0], all[2], "lists of all blocks are full attention");

    let (fixed, decision, _) = first(Attention::Fixed);
    assert!(fixed.iter().all(|r| r.stage == 2 && r.sparse_share == 1.0 && r.predictor_loss.is_some()));
    assert_eq!(decision.top_k(), [4; 4], "40 % of 8 blocks");
    assert!(decision.attention().iter().all(|a| matches!(a, BlockAttention::Sparse { .. })));
}

#[test]
fn a_window_of_the_whole_clip_is_full_attention() {
    let mut config = config();
    config.dsv.attention = Attention::WaL;
    let mut shape = ModelShape::from_config(&config, 2);
    let window = shape.window.as_mut().unwrap();
    (window.side, window.lists.max_selected) = (1.0, 8);
    let mut plan = ArenaPlan::new(crate::engine::Precision::F32);
    let purposes = Purposes { train: true, inverse_lists: true, ..Purposes::INFERENCE };
    let model = Model::reserve(shape, purposes, &mut plan);
    let mut e = CpuEngine::<f32>::new();
    e.reserve(&plan, &model.shape.dims(0)).unwrap();
    model.initialise(&mut e, 1).unwrap();
    let head = model.params.slices(model.params.copy).find(|(s, _)| s.name == "final.head.weight").unwrap().1;
    e.write_f32(head, &(0..head.len()).map(|i| (i % 7) as f32 * 0.1 - 0.3).collect::<Vec<_>>()).unwrap();
    e.write_f32(
        model.io.x_t,
        &(0..model.io.x_t.len()).map(|i| (i % 11) as f32 * 0.2 - 1.0).collect::<Vec<_>>(),
    )
    .unwrap();
    let mut forward = |attention: BlockAttention| {
        model.forward(&mut e, &[attention; 2], PredictorTask::default());
        e.read_f32(model.io.pred).unwrap()
    };
    let (windows, dense) = (forward(BlockAttention::Window), forward(BlockAttention::Dense));
    let most = windows.iter().zip(&dense).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(most < 1e-4 && dense.iter().any(|x| x.abs() > 0.1), "{most}");
}

#[test]
fn a_poisoned_step_changes_nothing_and_names_a_tensor() {
    for moments in [Moments::Device, Moments::Coded, Moments::Host] {
        let mut config = config();
        config.train.moments = moments;
        poisoned_once(config);
    }
}

fn poisoned_once(config: Config) {
    let data = Dataset::open(&config).unwrap();
    let mut trainer = Trainer::new(config, engine()).unwrap();
    let mut position = DataPosition::default();
    run(&mut trainer, &data, &mut position, 2);
    let before = bits(&mut trainer);
    let mut events = Vec::new();
    let mut clips = data.next_batch(&mut position, trainer.clips_per_step()).unwrap();
    clips[0].latents[5] = f32::NAN;
    trainer.step(&clips, &mut events).unwrap();
    trainer.flush(&mut events).unwrap();
    let record = records(&events)[0].clone();
    // The bad clip is of the first of two micro-batches: the second overwrote its latents, the gradients tell.
    assert_eq!(record.skipped.as_deref(), Some("the loss"), "{record:?}");
    let weights = |b: Bits| b.into_iter().filter(|(n, _)| !n.starts_with("ema")).collect::<Bits>();
    assert_eq!(weights(bits(&mut trainer)), weights(before));
    let clips = data.next_batch(&mut position, trainer.clips_per_step()).unwrap();
    trainer.step(&clips, &mut events).unwrap();
    trainer.flush(&mut events).unwrap();
    assert!(records(&events)[1].skipped.is_none(), "the next good step trains again");
}

/// One step whose model or inputs `poison` spoilt: what the record says, and that nothing changed.
fn poisoned(poison: impl Fn(&mut Trainer, &mut Vec<Clip>)) -> String {
    let mut config = config();
    (config.train.grad_accumulation, config.train.ema_decay) = (1, 0.0);
    let data = Dataset::open(&config).unwrap();
    let mut trainer = Trainer::new(config, engine()).unwrap();
    let mut position = DataPosition::default();
    run(&mut trainer, &data, &mut position, 2);
    let mut clips = data.next_batch(&mut position, trainer.clips_per_step()).unwrap();
    poison(&mut trainer, &mut clips);
    let before = bits(&mut trainer);
    let mut events = Vec::new();
    trainer.step(&clips, &mut events).unwrap();
    trainer.flush(&mut events).unwrap();
    assert!(bits(&mut trainer) == before, "a skipped step changed something");
    records(&events)[0].skipped.clone().expect("skipped")
}

fn write_one(trainer: &mut Trainer, buf: Buf, at: usize, value: f32) {
    let mut values = trainer.engine().read_f32(buf).unwrap();
    values[at] = value;
    trainer.engine().write_f32(buf, &values).unwrap();
}

#[test]
fn the_first_tensor_is_an_input_a_weight_an_activation_or_a_gradient() {
    assert_eq!(poisoned(|_, clips| clips[1].latents[3] = f32::NAN), "latents of the batch");
    assert_eq!(poisoned(|_, clips| clips[0].text[3] = f32::INFINITY), "text embeddings of the batch");
    let weight = poisoned(|trainer, _| {
        let master = trainer.model.params.master;
        let (_, buf) =
            trainer.model.params.slices(master).find(|(s, _)| s.name == "block.1.o.weight").unwrap();
        write_one(trainer, buf, 7, f32::NAN);
        trainer.model.params.clone().refresh(trainer.engine()).unwrap();
    });
    assert_eq!(weight, "weight block.1.o.weight");
    // The weights that compute overflow, the master's do not: block 1 is the first to show it.
    let activation = poisoned(|trainer, _| {
        let copy = trainer.model.params.copy;
        let (_, buf) =
            trainer.model.params.slices(copy).find(|(s, _)| s.name == "block.0.down.weight").unwrap();
        trainer.engine().fill(buf, f32::MAX);
    });
    assert_eq!(activation, "input of block 1");
    // Finite everywhere, but its square is not: a loss that overflows skips the step though no gradient does.
    let loss = poisoned(|trainer, _| {
        let copy = trainer.model.params.copy;
        let (_, buf) = trainer.model.params.slices(copy).find(|(s, _)| s.name == "final.head.bias").unwrap();
        trainer.engine().fill(buf, 1e22);
    });
    assert_eq!(loss, "the loss");
}

#[test]
fn a_run_that_stays_non_finite_stops_with_the_tensor() {
    let mut config = config();
    config.train.max_skipped = 4;
    let data = Dataset::open(&config).unwrap();
    let mut trainer = Trainer::new(config, engine()).unwrap();
    let mut position = DataPosition::default();
    let mut events = Vec::new();
    let error = (0..20).find_map(|_| {
        let mut clips = data.next_batch(&mut position, trainer.clips_per_step()).unwrap();
        clips[1].latents[0] = f32::INFINITY;
        trainer.step(&clips, &mut events).err()
    });
    let text = error.expect("stops").to_string();
    assert!(text.contains("4 steps in a row") && text.contains("first tensor: "), "{text}");
}

#[test]
fn a_checkpoint_of_another_shape_is_refused_by_tensor() {
    let config = config();
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(config.clone(), engine()).unwrap();
    let snapshot = trainer.snapshot(DataPosition::default(), &mut Vec::new()).unwrap();
    checkpoint::save(dir.path(), &snapshot.state, &snapshot.tensors(), 0).unwrap();
    let found = checkpoint::latest(dir.path()).unwrap().checkpoint.unwrap();
    let mut other = config;
    other.model.text_dim = 8;
    let error = Trainer::resume(other, engine(), &found).err().unwrap().to_string();
    assert!(error.contains("weight.text.in.weight") && error.contains("[24, 16]"), "{error}");
}

#[test]
fn the_memory_budget_limits_list_buffers() {
    let mut config = config();
    let engine = CpuEngine::<f32>::new();
    let layout = Layout::new(&config, &engine, Some(0));
    let gib = (1u64 << 30) as f64;
    config.dsv.memory_budget_gb = (layout.arena.total_bytes() + layout.list_bytes * 3 / 2) as f64 / gib;
    assert_eq!(Layout::new(&config, &engine, None).list_slots, 1);
    config.dsv.memory_budget_gb = 1.0;
    assert_eq!(Layout::new(&config, &engine, None).list_slots, 2);
}

#[test]
fn passes_that_queue_other_ops_have_other_keys() {
    use BlockAttention::{Dense, Sparse, Window};
    let (train, profile) =
        (PredictorTask { train: true, profile: false }, PredictorTask { train: true, profile: true });
    let keys = [
        repeat_key(0, train, &[Dense, Dense]),
        repeat_key(1, train, &[Dense, Dense]),
        repeat_key(0, profile, &[Dense, Dense]),
        repeat_key(0, PredictorTask::default(), &[Dense, Dense]),
        repeat_key(0, train, &[Window, Dense]),
        repeat_key(0, train, &[Sparse { slot: 0 }, Dense]),
        repeat_key(0, train, &[Sparse { slot: 1 }, Dense]),
        repeat_key(0, train, &[Dense, Sparse { slot: 1 }]),
    ];
    assert_eq!(keys.iter().collect::<std::collections::BTreeSet<_>>().len(), keys.len());
}
