use super::page::{charts, markdown, svg, tables, text};
use super::*;
use crate::config::Config;
use crate::data::Dataset;
use crate::engine::{ArenaPlan, CpuEngine, Engine};
use crate::model::{Model, ModelShape, Purposes};
use dsv_spec::{Arch, Crossover, DispatchTable, Dtype, TableMeta};

/// An untrained tiny model of 256 tokens, lists of 32 x 8, every query profiled.
fn laid_out(sets: &[&str]) -> (Inference, Dataset) {
    let sets: Vec<String> =
        ["data.frames=4", "data.height=8", "data.width=8", "dsv.query_group=32", "dsv.profile_queries=256"]
            .iter()
            .chain(sets)
            .map(|s| s.to_string())
            .collect();
    let config = Config::from_toml("", "test", Some("tiny"), &sets).unwrap();
    let mut engine: Box<dyn Engine> = Box::new(CpuEngine::<f32>::new());
    let mut plan = ArenaPlan::new(engine.precision());
    let purposes = Purposes { list_slots: 3, ..Purposes::INFERENCE };
    let model = Model::reserve(ModelShape::from_config(&config, 1), purposes, &mut plan);
    engine.reserve(&plan, &model.shape.dims(model.params.master.len())).unwrap();
    model.initialise(&mut *engine, 3).unwrap();
    let data = Dataset::open(&config).unwrap();
    let attention = vec![BlockAttention::Dense; 3];
    (Inference { engine, model, config, attention, step: 9 }, data)
}

fn options() -> Options {
    Options { samples: 1, groups: 64, queries: 256, cubes: false, mass: 0.95, lengths: vec![4096] }
}

#[test]
fn the_engines_own_lists_cover_what_is_told_of_them() {
    for (rule, cube) in [("centre", "2x4x4"), ("mean", "1x4x8")] {
        let sets = [format!("dsv.group_rule={rule}"), format!("dsv.cube={cube}")];
        let (mut trained, data) = laid_out(&[&sets[0], &sets[1], "dsv.predictor_rope=true"]);
        let predictors = trained.model.predictors.clone().unwrap();
        // 7 of 32 units, and every query profiled with those lists.
        trained.engine.write_i32(predictors.top_k, &vec![7; predictors.top_k.len()]).unwrap();
        trained.engine.write_i32(predictors.samples, &(0..256).collect::<Vec<i32>>()).unwrap();
        let ask = Options { cubes: true, ..options() };
        let g = measure(&mut trained, &data, &ask, &Times::default()).unwrap();
        let covered = trained.engine.read_f32(predictors.covered).unwrap();
        let covered = covered.iter().map(|&x| f64::from(x)).sum::<f64>() / covered.len() as f64;
        let own =
            |c: &&Cell| (c.cube, c.query_group, c.kv_block, c.rule) == (g.own.cube, 32, 8, Some(g.own.rule));
        let cell = g.cells.iter().find(own);
        let curve = &cell.unwrap().top_k;
        // 7 of 32 are 21.9 %, which 21 and 22 % of the units ask for, rounded up: 7 and 8.
        let told = curve.covered[20];
        assert_eq!((g.shares[20], curve.kept[20]), (0.21, 0.21875));
        assert!((told - covered).abs() < 2e-5, "{rule}: told {told}, the engine's lists cover {covered}");
        assert_eq!((g.groups, g.step, g.own.cube.to_string().as_str()), (3 * 2 * 8, 9, cube));
        assert!(curve.covered[67] == 1.0 && curve.kept[67] == 1.0, "{curve:?}");
    }
}

#[test]
fn every_size_is_measured_and_none_covers_more_than_the_best() {
    let (mut trained, data) = laid_out(&[]);
    let ask = Options { cubes: true, samples: 2, ..options() };
    let g = measure(&mut trained, &data, &ask, &Times::default()).unwrap();
    // Query groups 32, 64, 128, 256 with units 1, 8, 16, 64, 128; by the best lists and four rules.
    assert_eq!(g.of_contract().count(), 4 * 5 * 5);
    for cells in g.cells.chunks(5) {
        assert!(cells[0].rule.is_none() && cells[1..].iter().all(|c| c.rule.is_some()));
        for cell in &cells[1..] {
            for (best, found) in cells[0].top_k.covered.iter().zip(&cell.top_k.covered) {
                assert!(found <= best, "{cell:?}");
            }
        }
        assert!(cells[0].top_k.covered.is_sorted() && cells[0].top_p.kept.is_sorted());
    }
    let cubes: Vec<String> = g.cubes.iter().map(|c| format!("{} {}", c.query_group, c.cube)).collect();
    for wanted in
        ["32 2x4x4", "64 4x4x4", "256 4x8x8", "32 1x4x8", "32 4x2x4", "64 1x8x8", "64 2x4x8", "128 2x8x8"]
    {
        assert!(cubes.iter().any(|c| c == wanted), "{wanted} is not in {cubes:?}");
    }
    assert!(!cubes.iter().any(|c| c.contains("8x2x4")), "a clip has four frames: {cubes:?}");
    assert!(g.cubes.iter().all(|c| c.overlap > 0.0 && c.overlap < 1.0), "{:?}", g.cubes);
    // Without times the share decides; the contract's cube stays where no other is better.
    assert!(g.picks.iter().all(|p| p.seqlen.is_none() && p.needs.us.is_none()));
    assert!(g.picks.iter().all(|p| p.contract_needs.unwrap().kept >= p.needs.kept), "{:?}", g.picks);
    let said = text(&g);
    assert!(
        said.contains("Cube for 64 x 8: ") && said.contains("4096 tokens: no times were given"),
        "{said}"
    );
    let folder = tempfile::tempdir().unwrap();
    let paths = g.write(folder.path()).unwrap();
    assert_eq!(paths.len(), 3);
    assert_eq!(Granularity::load(folder.path()).unwrap(), Some(g));
    std::fs::write(&paths[0], "{").unwrap();
    let error = Granularity::load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("granularity.json is no measurement"), "{error}");
}

#[test]
fn a_run_without_predictors_or_held_out_clips() {
    let (mut trained, data) = laid_out(&["dsv.attention=full"]);
    let g = measure(&mut trained, &data, &options(), &Times::default()).unwrap();
    assert!(!g.cells.is_empty() && g.cells.iter().all(|c| c.rule.is_none()));
    assert!(g.lengths[0].verdict.contains("no predictors"), "{}", g.lengths[0].verdict);
    trained.config.data.validation = 0;
    let none = Dataset::open(&trained.config).unwrap();
    let error = measure(&mut trained, &none, &options(), &Times::default()).unwrap_err().to_string();
    assert!(error.contains("no clip is held out"), "{error}");
}

/// Dense 400 us at 4,096 tokens, head_dim 64; lists at 10, 25 and 50 % kept.
fn times(sizes: &[((u16, u16), [f64; 3])]) -> Times {
    let meta = TableMeta {
        schema: 1,
        gpu: "a GPU".into(),
        arch: Arch::Sm90a,
        driver: "1".into(),
        compiler: "1".into(),
        clocks: "1".into(),
        date: "2026-01-02".into(),
    };
    let crossovers = sizes.iter().map(|&((query_group, kv_block), us)| Crossover {
        dtype: Dtype::Bf16,
        head_dim: 64,
        query_group,
        kv_block,
        seqlen: 4096,
        dense_us: 400.0,
        select_us: 10.0,
        sparse_us: [50, 75, 90].into_iter().zip(us).collect(),
        crossover: None,
        num_heads: 16,
        workspace_bytes: 0,
    });
    let mut times = Times::default();
    times.add_table("t.json", &DispatchTable::new(meta, Vec::new(), crossovers.collect()));
    times
}

/// A model whose lists by the centre query cover 95 % at these percents of the units.
fn known(enough: &[((usize, usize), usize)], times: &Times, lengths: &[usize]) -> Granularity {
    let shares = shares();
    let cell = |&((query_group, kv_block), at): &((usize, usize), usize)| {
        let kept = shares.clone();
        let covered = (1..=shares.len()).map(|i| if i >= at { 0.96 } else { 0.5 }).collect();
        Cell {
            cube: contract(query_group, kv_block),
            query_group,
            kv_block,
            rule: Some(GroupRule::Centre),
            top_k: Curve { kept, covered, ..Curve::default() },
            top_p: Curve::default(),
        }
    };
    let mut g = Granularity {
        step: 9,
        grid: [16, 16, 16],
        heads: 8,
        head_dim: 64,
        own: Own { cube: contract(64, 64), query_group: 64, kv_block: 64, rule: GroupRule::Centre },
        samples: 1,
        groups: 1,
        queries: 64,
        mass: 0.95,
        theta: 0.9,
        masses: Vec::new(),
        times: times.sources.clone(),
        lengths: Vec::new(),
        cubes: Vec::new(),
        picks: Vec::new(),
        cells: enough.iter().map(cell).collect(),
        shares,
    };
    add_times(&mut g, lengths, times);
    g
}

#[test]
fn the_fastest_lists_that_cover_the_mass_are_named_with_what_they_win() {
    let sizes = [((64, 8), [220.0, 120.0, 60.0]), ((64, 64), [180.0, 100.0, 50.0])];
    // Fine lists need 10 % (60 us, measured), blocks 40 % (148 us, between two): 2.47 times.
    let g = known(&[((64, 8), 10), ((64, 64), 40)], &times(&sizes), &[4096, 32768]);
    let fine = g.lengths[0].fine.as_ref().unwrap();
    assert_eq!((fine.kv_block, fine.us, fine.measured), (8, 60.0, true));
    let blocks = g.lengths[0].block_sparse.as_ref().unwrap();
    assert_eq!((blocks.kv_block, blocks.us, blocks.measured), (64, 148.0, false));
    let mut said = vec![g.lengths[0].verdict.clone(), g.lengths[1].verdict.clone()];
    let mut ask = |enough: &[((usize, usize), usize)], times: &Times| {
        said.push(known(enough, times, &[4096]).lengths.remove(0).verdict);
    };
    // Blocks win where they need little more.
    ask(&[((64, 8), 10), ((64, 64), 11)], &times(&sizes));
    // No measured time reaches the mass: blocks need more than half, and fine lists were not measured, or were not looked at.
    ask(&[((64, 8), 10), ((64, 64), 64)], &times(&sizes[1..]));
    ask(&[((64, 64), 64)], &times(&sizes[1..]));
    // What reaches it is slower than dense.
    ask(&[((64, 8), 10)], &times(&[((64, 8), [900.0, 800.0, 700.0])]));
    ask(&[((64, 8), 10)], &Times::default());
    insta::assert_snapshot!(said.join("\n"), @r"
    4096 tokens: fastest at 95 % of the mass: 64 x 8 by centre, 10.0 % kept (96.0 % covered, 0.060 ms); 2.47 times as fast as the best block-sparse choice, 64 x 64 by centre, 40.0 % kept (96.0 % covered, 0.148 ms between measured shares); 6.67 times as fast as dense (dense 0.400 ms, 16 heads)
    32768 tokens: nothing was measured at this length with head_dim 64, but at 4096; next: dsv-autotune bench --seqlen 32768 --head-dim 64, then --record
    4096 tokens: fastest at 95 % of the mass: 64 x 64 by centre, 11.0 % kept (96.0 % covered, 0.053 ms between measured shares); block-sparse itself, 1.13 times as fast as the best fine lists, 64 x 8 by centre, 10.0 % kept (96.0 % covered, 0.060 ms); 7.50 times as fast as dense (dense 0.400 ms, 16 heads)
    4096 tokens: undecided: no lists with a measured time cover 95 % of the mass (dense 0.400 ms, 16 heads); not measured here: 64x8; next: dsv-autotune bench --seqlen 4096 --head-dim 64 --block 64x8, then --record
    4096 tokens: dense wins: no lists with a measured time cover 95 % of the mass (dense 0.400 ms, 16 heads)
    4096 tokens: dense wins: the fastest lists that cover 95 % of the mass, 64 x 8 by centre, 10.0 % kept (96.0 % covered, 0.700 ms), take longer (dense 0.400 ms, 16 heads)
    4096 tokens: no times were given; next: --gpu h100, --table or --record
    ");
}

#[test]
fn tables_and_charts_show_what_was_measured_where() {
    let sizes = [((64, 8), [220.0, 120.0, 60.0]), ((64, 64), [180.0, 100.0, 50.0])];
    let g = known(&[((64, 8), 10), ((64, 64), 40)], &times(&sizes), &[4096, 32768]);
    insta::assert_snapshot!(tables(&g)[0].text(), @r"
    Mass that lists cover, percent, and what covering enough costs
    group x unit   cube  chosen by  mass on 5 %  mass on 10 %  mass on 15 %  mass on 20 %  mass on 30 %  mass on 50 %  top_k for 95 %  top_p for 95 %: kept  ms at 4096
          64 x 8  4x4x4     centre         50.0          96.0          96.0          96.0          96.0          96.0            10.0                     -      0.060*
         64 x 64  4x4x4     centre         50.0          50.0          50.0          50.0          50.0          96.0            40.0                     -       0.148
    top_k, top_p: percent of the units kept where 95 % of the mass is covered. ms: a step at that top_k; * its share was measured, else it lies between two that were; - nothing is measured there, or the mass is not reached.
    ");
    let page = markdown(&g);
    assert!(
        page.contains("| 64 x 8 | 4x4x4 | centre | 50.0 | 96.0 |") && page.contains("](granularity.svg)"),
        "{page}"
    );
    // Share kept, and time at the one length with times; two sizes, and dense.
    let drawn = charts(&g);
    assert_eq!(drawn.len(), 2);
    let file = svg(&g).unwrap();
    for wanted in ["64 x 8 by centre", "64 x 64 by centre", ">dense<", "4096 tokens, 16 heads of 64"] {
        assert!(file.contains(wanted), "{wanted}");
    }
}

#[test]
fn another_cube_is_picked_where_it_takes_less_time() {
    let times = times(&[((64, 8), [220.0, 120.0, 60.0])]);
    let mut g = known(&[((64, 8), 25), ((64, 8), 10)], &times, &[4096]);
    g.cells[1].cube = Cube { t: 1, h: 8, w: 8 };
    // Picks are made for the sizes whose best lists were measured.
    let best = Cell { rule: None, ..g.cells[0].clone() };
    g.cells.insert(0, best);
    let found = picks(&g);
    assert_eq!(found.len(), 1);
    let needs = |kept, us| Needs { kept, us: Some(us) };
    assert_eq!((found[0].cube, found[0].needs), (Cube { t: 1, h: 8, w: 8 }, needs(0.1, 60.0)));
    assert_eq!(found[0].contract_needs, Some(needs(0.25, 120.0)));
    g.picks = found;
    let said = text(&g);
    let wanted =
        "Cube for 64 x 8 at 4096 tokens: 1x8x8 (10.0 % kept, 0.060 ms); 4x4x4 needs 25.0 % kept, 0.120 ms.";
    assert!(said.contains(wanted), "{said}");
}

#[test]
fn the_cube_that_needs_the_fewest_keys_is_chosen() {
    let shape = |side: &str, needed, covered| CubeCoverage {
        cube: side.parse().unwrap(),
        overlap: 0.5,
        needed,
        covered,
    };
    let of = |shapes: Vec<CubeCoverage>| fewest(shapes);
    let found = of(vec![shape("4x4x4", 0.2, 0.96), shape("1x8x8", 0.2, 0.97), shape("2x4x8", 0.15, 0.951)]);
    assert_eq!(found.cube.to_string(), "2x4x8");
    assert_eq!(
        found.why,
        "2x4x8: its lists need 15.0 % of the keys for 95 % of the mass, those of 4x4x4 20.0 % of the keys"
    );
    let found = of(vec![shape("4x4x4", 0.2, 0.96), shape("1x8x8", 0.1, 0.96), shape("2x4x8", 0.1, 0.97)]);
    assert_eq!(found.cube.to_string(), "2x4x8", "as many keys, more mass");
    for needed in [0.196, 0.2, 0.3] {
        let found = of(vec![shape("4x4x4", 0.2, 0.96), shape("1x8x8", needed, 0.97)]);
        assert!(found.cube.to_string() == "4x4x4" && found.why.starts_with("4x4x4 stays"), "{found:?}");
    }
}
