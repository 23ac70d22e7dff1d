use super::*;
use crate::config::Switch;
use crate::engine::CpuEngine;

fn config(out: &Path) -> Config {
    let mut c = Config::preset("tiny").unwrap();
    (c.model.layers, c.model.head_dim, c.model.text_dim) = (1, 12, 16);
    (c.data.frames, c.data.height, c.data.width, c.data.clips, c.data.validation) = (4, 8, 8, 12, 2);
    (c.train.steps, c.train.checkpoint_every, c.train.eval_every, c.train.log_every) = (8, 3, 4, 2);
    (c.dsv.switch, c.dsv.profile_queries, c.dsv.force_sparse) = (Switch::Step(4), 4, Some(1.0));
    c.dsv.keep = Some(0.3);
    c.sample.steps = 2;
    c.device.kind = crate::config::DeviceKind::Cpu;
    c.out.dir = out.to_path_buf();
    c.validate().unwrap();
    c
}

fn engine() -> Box<dyn Engine> {
    Box::new(CpuEngine::<f32>::new())
}

/// Runs, setting `stop` once `stop_after` steps have been read.
fn go(config: &Config, existing: Existing, stop_after: u64) -> (Result<Outcome, RunError>, Vec<Progress>) {
    let stop = AtomicBool::new(false);
    let mut seen = Vec::new();
    let result = run(config, engine(), existing, None, &stop, &mut |p: &Progress| {
        if let Progress::Train(Event::Step(r)) = p {
            stop.store(r.step + 1 >= stop_after, Ordering::Relaxed);
        }
        seen.push(p.clone());
        Ok(())
    });
    (result, seen)
}

fn weights(path: &Path) -> Vec<(String, Vec<u8>)> {
    let checkpoint = checkpoint::open(path).unwrap();
    checkpoint.tensors.views().iter().map(|v| (v.name.clone(), v.data.to_vec())).collect()
}

#[test]
fn a_whole_run_leaves_checkpoint_and_sample_and_can_be_evaluated() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let (outcome, seen) = go(&config, Existing::Refuse, u64::MAX);
    let outcome = outcome.unwrap();
    assert!(!outcome.interrupted && outcome.step == 8);
    let gif = std::fs::read(outcome.sample.unwrap()).unwrap();
    assert_eq!(&gif[..6], b"GIF89a");
    let evals: Vec<&EvalResult> =
        seen.iter().filter_map(|p| if let Progress::Eval(r) = p { Some(r) } else { None }).collect();
    assert_eq!(evals.iter().map(|e| e.step).collect::<Vec<_>>(), [0, 4, 8]);
    assert_eq!((evals[0].triples.len(), evals[2].sparse_share), (2 * eval::TIMES_PER_CLIP, 1.0));

    // The checkpoint, opened for inference with another batch, gives the same losses.
    let mut trained = open_trained(dir.path(), None, 3, &[]).unwrap();
    assert_eq!(trained.step, 8);
    let data = Dataset::open(&trained.config).unwrap();
    let again = eval::evaluate(
        &mut *trained.engine,
        &trained.model,
        &trained.config,
        &data,
        &trained.attention,
        trained.step,
    )
    .unwrap();
    let paired = again.paired(evals[2]).unwrap();
    assert!(paired.difference.abs() < 1e-6, "{paired:?}");

    // A second run in the same folder is refused, with both ways on.
    let text = go(&config, Existing::Refuse, u64::MAX).0.unwrap_err().to_string();
    assert!(
        text.contains("up to step 8") && text.contains("--resume") && text.contains("--overwrite"),
        "{text}"
    );
}

#[test]
fn a_run_that_chooses_its_cube_says_so_and_is_evaluated_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.dsv.cube = Some(crate::config::CubeChoice::Auto);
    let mut recorder = crate::recorder::Recorder::new(&config);
    run(&config, engine(), Existing::Refuse, None, &AtomicBool::new(false), &mut recorder).unwrap();
    let data = crate::report::RunData::load(dir.path()).unwrap();
    let [(4, choice)] = &data.cubes[..] else { panic!("{:?}", data.cubes) };
    let page = dir.path().join("page.html");
    crate::report::write(&page, std::slice::from_ref(&data)).unwrap();
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("Cube of tokens") && page.contains(&choice.why), "{choice:?}");
    let mut trained = open_trained(dir.path(), None, 2, &[]).unwrap();
    assert_eq!(trained.model.shape.cube, choice.cube);
    let set = Dataset::open(&trained.config).unwrap();
    let (model, config, attention) = (&trained.model, &trained.config, &trained.attention);
    let again = eval::evaluate(&mut *trained.engine, model, config, &set, attention, 8).unwrap();
    assert!((again.mean() - data.evals[&8].0).abs() < 1e-6);
}

#[test]
fn every_baseline_runs_resumes_and_is_evaluated_as_it_was_trained() {
    use crate::config::Attention;
    for attention in [Attention::Full, Attention::WaM, Attention::WaL, Attention::Fixed] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        config.dsv.attention = attention;
        assert!(go(&config, Existing::Refuse, 5).0.unwrap().interrupted);
        let (outcome, seen) = go(&config, Existing::Resume, u64::MAX);
        assert_eq!(outcome.unwrap().step, 8);
        let last = seen.iter().rev().find_map(|p| if let Progress::Eval(r) = p { Some(r) } else { None });
        let last = last.unwrap();
        assert_eq!(last.sparse_share, if attention == Attention::Full { 0.0 } else { 1.0 });
        let mut trained = open_trained(dir.path(), None, 2, &[]).unwrap();
        let data = Dataset::open(&trained.config).unwrap();
        let again = eval::evaluate(
            &mut *trained.engine,
            &trained.model,
            &trained.config,
            &data,
            &trained.attention,
            trained.step,
        );
        let paired = again.unwrap().paired(last).unwrap();
        assert!(paired.difference.abs() < 1e-6, "{attention:?}: {paired:?}");
        // Another way to attend is another run, though the weights would fit.
        config.dsv.attention = if attention == Attention::WaM { Attention::WaL } else { Attention::WaM };
        let text = go(&config, Existing::Resume, 1).0.unwrap_err().to_string();
        assert!(text.contains("dsv.attention: "), "{text}");
    }
}

#[test]
fn a_dense_model_trained_elsewhere_goes_straight_into_stage_one() {
    use crate::config::Attention;
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&dir.path().join("dense"));
    config.dsv.attention = Attention::Full;
    let (dense, seen) = go(&config, Existing::Refuse, u64::MAX);
    let eval = |seen: &[Progress], step: u64| {
        let at =
            |p: &Progress| if let Progress::Eval(r) = p { (r.step == step).then(|| r.clone()) } else { None };
        seen.iter().find_map(at).unwrap()
    };
    let trained = eval(&seen, 8);
    // As someone else would keep them: other names, Q, K and V apart, one tensor more.
    let checkpoint = checkpoint::open(&dense.unwrap().checkpoint).unwrap();
    let mut theirs = vec![("vae.mean".to_string(), vec![1], vec![0.5f32])];
    let mut map = String::new();
    for view in checkpoint.tensors.views() {
        let Some(ours) = view.name.strip_prefix("weight.") else { continue };
        let values = view.to_f32().unwrap();
        let name = format!("net/{ours}");
        if ours.contains(".qkv.") {
            let third = values.len() / 3;
            let mut shape = view.shape.clone();
            shape[0] /= 3;
            let parts: Vec<String> = ["q", "k", "v"].iter().map(|p| format!("{name}.{p}")).collect();
            for (part, values) in parts.iter().zip(values.chunks(third)) {
                theirs.push((part.clone(), shape.clone(), values.to_vec()));
            }
            map += &format!("{ours:?} = {parts:?}\n");
        } else {
            theirs.push((name.clone(), view.shape.clone(), values));
            map += &format!("{ours:?} = {name:?}\n");
        }
    }
    let (weights, map_file) = (dir.path().join("theirs.safetensors"), dir.path().join("map.toml"));
    let views: Vec<_> = theirs.iter().map(|(n, s, v)| TensorView::f32(n.clone(), s, v)).collect();
    write_file(&RealDisk, &weights, |f| tensors::write(f, &views, &BTreeMap::new())).unwrap();
    std::fs::write(&map_file, map).unwrap();

    config.out.dir = dir.path().join("dsv");
    config.dsv.attention = Attention::Dsv;
    (config.train.init_weights, config.train.init_map) = (Some(weights), Some(map_file));
    let (outcome, seen) = go(&config, Existing::Refuse, 3);
    let imported =
        seen.iter().find_map(|p| if let Progress::Imported(i) = p { Some(i.clone()) } else { None });
    let imported = imported.unwrap();
    assert!(imported.missing.is_empty() && imported.unmapped == ["vae.mean"], "{imported:?}");
    let first = eval(&seen, 0);
    let paired = first.paired(&trained).unwrap();
    assert_eq!(paired.difference, 0.0, "the imported model is not the trained one: {paired:?}");
    let stages: Vec<u8> = seen
        .iter()
        .filter_map(|p| if let Progress::Train(Event::Step(r)) = p { Some(r.stage) } else { None })
        .collect();
    assert_eq!(stages[..3], [1, 1, 1]);
    // Once, before the first step: a resumed run has weights of its own.
    assert!(outcome.unwrap().interrupted);
    let (resumed, seen) = go(&config, Existing::Resume, u64::MAX);
    assert_eq!(resumed.unwrap().step, 8);
    assert!(!seen.iter().any(|p| matches!(p, Progress::Imported(_))));
    // The checkpoint's own file needs no map.
    config.out.dir = dir.path().join("again");
    config.train.init_map = None;
    config.train.init_weights = Some(checkpoint.path.join("model.safetensors"));
    let (_, seen) = go(&config, Existing::Refuse, 1);
    assert_eq!(eval(&seen, 0).paired(&trained).unwrap().difference, 0.0);
}

#[test]
fn a_run_told_to_stop_writes_a_checkpoint_and_resumes_bit_for_bit() {
    let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = go(&config(whole.path()), Existing::Refuse, u64::MAX).0.unwrap();
    let config = config(cut.path());
    let (outcome, _) = go(&config, Existing::Refuse, 5);
    let outcome = outcome.unwrap();
    assert!(outcome.interrupted && outcome.step < 8 && outcome.step >= 5, "{outcome:?}");
    let (resumed, seen) = go(&config, Existing::Resume, u64::MAX);
    let resumed = resumed.unwrap();
    assert!(matches!(&seen[0], Progress::Started { step, .. } if *step == outcome.step));
    assert!(weights(&resumed.checkpoint) == weights(&expected.checkpoint), "weights differ");
}

/// Runs to a step.
fn go_until(config: &Config, existing: Existing, until: u64) -> (Result<Outcome, RunError>, Vec<Progress>) {
    let mut seen = Vec::new();
    let result =
        run(config, engine(), existing, Some(until), &AtomicBool::new(false), &mut |p: &Progress| {
            seen.push(p.clone());
            Ok(())
        });
    (result, seen)
}

#[test]
fn a_run_until_a_step_stops_there_and_resumes_bit_for_bit() {
    let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (expected, all) = go(&config(whole.path()), Existing::Refuse, u64::MAX);
    let config = config(cut.path());
    // Four is a step of an evaluation, not of a checkpoint; three and five are in both stages, five between two readings.
    let mut seen = Vec::new();
    for (until, existing) in [(3, Existing::Refuse), (4, Existing::Resume), (5, Existing::Resume)] {
        let (outcome, told) = go_until(&config, existing, until);
        let outcome = outcome.unwrap();
        assert!(outcome.interrupted && outcome.sample.is_none() && outcome.step == until, "{outcome:?}");
        assert_eq!(outcome.checkpoint, checkpoint::folder(&checkpoints(cut.path()), until));
        assert!(matches!(&told[0], Progress::Started { steps, .. } if *steps == until));
        seen.extend(told);
    }
    let (resumed, told) = go_until(&config, Existing::Resume, 8);
    let resumed = resumed.unwrap();
    assert!(!resumed.interrupted && resumed.sample.is_some());
    seen.extend(told);
    assert!(weights(&resumed.checkpoint) == weights(&expected.unwrap().checkpoint), "weights differ");
    let evals = |seen: &[Progress]| -> Vec<EvalResult> {
        seen.iter().filter_map(|p| if let Progress::Eval(r) = p { Some(r.clone()) } else { None }).collect()
    };
    assert_eq!(evals(&seen), evals(&all));
}

#[test]
fn a_step_that_a_run_cannot_stop_after_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let refused = |existing: Existing, until: u64| match go_until(&config, existing, until) {
        (Err(RunError::Until { until, from, steps }), _) => (until, from, steps),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(Existing::Refuse, 0), (0, 0, 8));
    assert_eq!(refused(Existing::Refuse, 9), (9, 0, 8));
    assert!(!checkpoints(dir.path()).exists());
    go_until(&config, Existing::Refuse, 4).0.unwrap();
    assert_eq!(refused(Existing::Resume, 0), (0, 4, 8));
    assert_eq!(refused(Existing::Resume, 4), (4, 4, 8));
    assert_eq!(refused(Existing::Overwrite, 9), (9, 0, 8), "and the checkpoint is still there:");
    go(&config, Existing::Resume, u64::MAX).0.unwrap();
    assert_eq!(refused(Existing::Resume, 8), (8, 8, 8));
}

#[test]
fn a_copy_goes_on_with_other_lists_in_either_stage() {
    let dir = tempfile::tempdir().unwrap();
    let begun = |until: u64| {
        let mut config = config(&dir.path().join(format!("until-{until}")));
        // Lists of 77 of 256 tokens: more than there are blocks of eight.
        (config.dsv.kv_block, config.dsv.max_keep, config.train.checkpoint_every) = (1, 0.4, 0);
        go_until(&config, Existing::Refuse, until).0.unwrap();
        config
    };
    for until in [2, 4, 6] {
        let mut config = begun(until);
        (config.dsv.kv_block, config.dsv.keep, config.dsv.max_keep) = (8, Some(0.5), 0.5);
        let (outcome, seen) = go(&config, Existing::Resume, u64::MAX);
        assert_eq!(outcome.unwrap().step, 8);
        let decided = seen.iter().find_map(|p| match p {
            Progress::Train(Event::Decision { decision, .. }) => Some(decision.top_k()),
            _ => None,
        });
        // From step 4 on the next dispatch is due after the end.
        assert_eq!(decided, (until <= 4).then(|| vec![16; 2]));
        let found = checkpoint::latest(&checkpoints(&config.out.dir)).unwrap().checkpoint.unwrap();
        let Attends { attention, top_k, .. } = train::attention_of(&found).unwrap();
        assert_eq!(
            (attention[0], top_k),
            (BlockAttention::Sparse { slot: 0 }, vec![16; 2]),
            "from step {until}"
        );
    }
    // Full attention throughout is stage 1 to the end.
    let mut config = begun(3);
    config.dsv.switch = Switch::Step(8);
    let (_, seen) = go(&config, Existing::Resume, u64::MAX);
    assert!(!seen.iter().any(|p| matches!(p, Progress::Train(Event::Stage { .. }))));
}

#[test]
fn a_truncated_checkpoint_is_passed_over_and_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let newest = go(&config, Existing::Refuse, u64::MAX).0.unwrap().checkpoint;
    let file = std::fs::OpenOptions::new().write(true).open(newest.join("model.safetensors")).unwrap();
    file.set_len(100).unwrap();
    let (outcome, seen) = go(&config, Existing::Resume, u64::MAX);
    assert_eq!(outcome.unwrap().step, 8);
    let Progress::Started { step, rejected, .. } = &seen[0] else { panic!("{seen:?}") };
    assert!(*step == 6 && rejected[0].contains("truncated"), "{step} {rejected:?}");
}

#[test]
fn resuming_with_another_model_names_the_keys() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    go(&config, Existing::Refuse, 1).0.unwrap();
    config.model.mlp_ratio = 2;
    let text = go(&config, Existing::Resume, 1).0.unwrap_err().to_string();
    assert!(text.contains("model.mlp_ratio") && text.contains("config.toml"), "{text}");
    config.model.mlp_ratio = 4;
    config.out.dir = dir.path().join("nothing");
    let text = go(&config, Existing::Resume, 1).0.unwrap_err().to_string();
    assert!(text.contains("no checkpoint in"), "{text}");
}

#[test]
fn a_run_that_cannot_fit_is_refused_before_it_allocates() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    (config.model.layers, config.model.heads, config.model.head_dim) = (400, 64, 128);
    let text = go(&config, Existing::Refuse, 1).0.unwrap_err().to_string();
    assert!(
        text.contains("does not fit") && text.contains("--set ") && text.contains("dsv-train plan"),
        "{text}"
    );
}

#[test]
fn samples_stand_side_by_side() {
    let video = |value| Video { frames: 2, height: 1, width: 2, rgb: vec![value; 12] };
    let both = beside(&[video(1), video(2)]).unwrap();
    assert_eq!((both.frames, both.height, both.width), (2, 1, 5));
    assert_eq!(both.rgb[..15], [1, 1, 1, 1, 1, 1, 16, 16, 16, 2, 2, 2, 2, 2, 2]);
}

/// The CPU engine, with weights that turn to NaN in between.
#[test]
fn while_steps_are_skipped_the_last_good_checkpoint_stays_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    (config.train.checkpoint_every, config.train.log_every, config.train.max_skipped) = (1, 1, 3);
    let good = go(&config, Existing::Refuse, 2).0.unwrap();
    assert_eq!(good.step, 2);
    let before = weights(&good.checkpoint);
    // A rate at which the first step after the checkpoint throws the weights out of f32's range.
    config.train.lr = 1e38;
    config.train.weight_decay = 0.0;
    let (result, seen) = go(&config, Existing::Resume, u64::MAX);
    let text = result.unwrap_err().to_string();
    assert!(text.contains("3 steps in a row") && text.contains("no checkpoint was written since"), "{text}");
    let skipped = |p: &&Progress| matches!(p, Progress::Train(Event::Step(r)) if r.skipped.is_some());
    let first = seen.iter().position(|p| skipped(&p)).unwrap();
    let saved = seen[first..].iter().any(|p| matches!(p, Progress::Checkpoint { .. }));
    assert!(!saved, "a checkpoint after a skipped step: {:?}", &seen[first..]);
    assert!(weights(&good.checkpoint) == before, "the checkpoint of step 2 changed");
}
