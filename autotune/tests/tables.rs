//! The tables of the project's figures without a GPU: what is measured, how records become rows, what a reader sees. The
//! times here come from a formula, not from a GPU.

use dsv_autotune::listgen::ListKind;
use dsv_autotune::page::{self, markdown, place, placed, text};
use dsv_autotune::plan::{Case, Contest, Mode, ServedBy, Step};
use dsv_autotune::records::{RECORD_FILE, Run, RunDir};
use dsv_autotune::reduce::to_nanosecond;
use dsv_autotune::ruler::Peer;
use dsv_autotune::service::Service;
use dsv_autotune::tables::{BENCH_FILE, Cell, Selected, Tables, lines, plan, selections};
use dsv_spec::{Arch, AttnOp, KernelSpec, Outcome, TableMeta, Timing, TuneRecord};
use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::process::Command;

fn meta() -> TableMeta {
    TableMeta {
        schema: dsv_spec::SCHEMA,
        gpu: "NVIDIA Formula 1 80GB HBM3".into(),
        arch: Arch::Sm90a,
        driver: "580.159.04".into(),
        compiler: "13.0.88".into(),
        clocks: "SM 1755 MHz, memory 2619 MHz".into(),
        date: "2026-01-02".into(),
    }
}

fn service() -> Service {
    Service::defaults(&meta().gpu, Arch::Sm90a)
}

/// 500 TF; choosing 55 us, finely 155 us, by four queries 355 us, inverting 55 us; deterministic 20 % slower, mixed heads 5 %, clustered lists a tenth faster.
fn formula_us(case: &Case, step: Step, spec: &KernelSpec) -> f64 {
    match spec {
        KernelSpec::Attn(_) => {}
        KernelSpec::Select(s) if s.group_rule().queries() == 4 => return 355.25,
        KernelSpec::Select(s) if s.op() == dsv_spec::SelectOp::Fine => return 155.25,
        _ => return 55.25,
    }
    let form = if spec.name().starts_with("attn_bwd") && spec.name().contains("_det_") { 1.2 } else { 1.0 };
    let kind = match case.kind {
        ListKind::Mixed => 1.05,
        ListKind::Clustered => 0.9,
        _ => 1.0,
    };
    form * kind * case.flops(step.op()) / 500e6
}

fn record(contest: &Contest, spec: KernelSpec) -> TuneRecord {
    let median_us = to_nanosecond(formula_us(&contest.case, contest.step, &spec));
    let timing = Timing { median_us, spread_us: to_nanosecond(median_us / 50.0), samples: 12 };
    TuneRecord {
        spec,
        problem: contest.case.problem(contest.step.op()),
        sparsity: contest.case.sparsity(),
        lists: contest.case.kind.name().into(),
        source_hash: format!("{:064x}", spec.name().len()),
        outcome: Outcome::Ok { timing, error_ratio: 0.61 },
    }
}

fn recorded() -> Vec<TuneRecord> {
    let contests = plan(ServedBy::Committed).contests_served(&service());
    contests.iter().flat_map(|c| c.specs.iter().map(move |&spec| record(c, spec))).collect()
}

/// Every row that the PyTorch script of the peers can write, at 400 TF.
fn peers() -> Vec<Peer> {
    let mut peers = Vec::new();
    let mut row = |name: &str, (h, s, d): (u32, u32, u16), keep: f64, backward: bool| {
        let flops = 4.0 * f64::from(h) * f64::from(s).powi(2) * f64::from(d) * keep;
        peers.push(Peer {
            name: name.to_string(),
            h,
            s,
            d,
            keep,
            fwd_ms: Some(flops / 400e9),
            bwd_ms: backward.then_some(2.5 * flops / 400e9),
            fwd_tf: Some(400.0),
            bwd_tf: backward.then_some(400.0),
        });
    };
    let shapes = [(16, 32768, 64), (16, 32768, 96), (16, 32768, 128), (8, 32768, 256), (8, 65536, 128)];
    let sparse = [(16, 32768, 128), (8, 65536, 128), (16, 32768, 64)];
    for shape in shapes {
        row("sdpa cudnn", shape, 1.0, true);
        row("sdpa flash", shape, 1.0, true);
        row("FA3 forward", shape, 1.0, false);
    }
    for shape in sparse {
        let of =
            |block: u32| f64::from((f64::from(shape.1 / block) * 0.1) as u32) / f64::from(shape.1 / block);
        row("flex_attention triton 128x128", shape, of(128), true);
        row("FA4-cute dense", shape, 1.0, true);
        for env in ["default", "FASTVIDEO_VSA_TK", "FASTVIDEO_VSA_TRITON"] {
            row(&format!("VSA 64x64 {env}"), shape, of(64), true);
        }
        for block in [64, 128] {
            for kind in ["random", "clustered"] {
                row(&format!("cuDNN-frontend BSA {block} {kind}"), shape, of(block), shape.2 == 128);
            }
        }
        if shape.2 == 128 {
            row("VSA-CuTe(FA4) 128x128", shape, of(128), true);
            row("VSA-CuTe(FA4) 256x256", shape, of(256), true);
        }
    }
    peers
}

fn tables() -> Tables {
    Tables::new(&meta(), &recorded(), &service(), &peers())
}

/// Rows of kernels that every version has, under names that none has: what snapshots show.
fn fixed() -> Tables {
    let mut tables = tables();
    tables.kernels = "0123456789ab".into();
    let fine = tables.sections.pop().unwrap();
    tables.sections.truncate(1);
    tables.sections[0].rows.retain(|row| [64, 128].contains(&row.head_dim));
    tables.sections.push(fine);
    for row in tables.sections.iter_mut().flat_map(|section| &mut section.rows) {
        for (cell, op) in
            [(&mut row.forward, "fwd"), (&mut row.backward, "bwd"), (&mut row.deterministic, "bwd")]
        {
            if let Cell::Measured { kernel, .. } = cell {
                *kernel = format!("attn_{op}_bf16_d0_qg0_kb0_sp0_m1n2_g1c3s4x1_grid_det_sm90a");
            }
        }
    }
    tables
}

#[test]
fn every_line_and_what_it_is_held_against_is_measured_once() {
    let plan = plan(ServedBy::Committed);
    assert_eq!(plan.mode, Mode::Tables);
    let cases: HashSet<Case> = plan.cases.iter().copied().collect();
    assert_eq!(cases.len(), plan.cases.len(), "a case is measured twice");
    for line in lines() {
        assert!(cases.contains(&line.case), "{}", line.case.label());
        assert!(line.against.is_none_or(|other| cases.contains(&other)), "{}", line.case.label());
        assert_eq!(
            line.against.map(|other| other.flops(AttnOp::Fwd)).unwrap_or(line.case.flops(AttnOp::Fwd)),
            line.case.flops(AttnOp::Fwd)
        );
    }
    // Inputs of a shape are made once.
    let shapes: Vec<_> = plan.cases.iter().map(|c| (c.head_dim, c.num_heads, c.seqlen)).collect();
    let changes = shapes.windows(2).filter(|pair| pair[0] != pair[1]).count() + 1;
    assert_eq!(changes, shapes.iter().collect::<HashSet<_>>().len());
    // Forward, and both forms of the backward, of everything that a kernel serves.
    let contests = plan.contests_served(&service());
    let served = |case: &Case| service().serve(&case.problem(AttnOp::Fwd)).is_some();
    let count = |step| contests.iter().filter(|c| c.step == step).count();
    let wanted = plan.cases.iter().filter(|case| served(case)).count();
    assert_eq!((count(Step::Forward), count(Step::Backward)), (wanted, wanted));
    // Fine lists have one form.
    for contest in contests.iter().filter(|c| c.step == Step::Backward) {
        let forms = if contest.case.lists.is_gather() { 1 } else { 2 };
        assert_eq!(contest.specs.len(), forms, "{}", contest.case.label());
    }
    let fine = |c: &&Contest| c.case.lists.is_gather();
    assert_eq!(contests.iter().filter(fine).filter(|c| c.step == Step::Forward).count(), 5);
    assert!(contests.iter().filter(fine).all(|c| c.step != Step::Invert), "no kernel reads their inverse");
    // Every selection once, whether it is that of a row's lists or not.
    let key = |case: &Case, spec: &KernelSpec| (Case { head_dim: 0, ..*case }, *spec);
    let selects = contests.iter().filter(|c| c.step == Step::Select);
    let selects: Vec<_> = selects.flat_map(|c| c.specs.iter().map(|spec| key(&c.case, spec))).collect();
    assert_eq!(selects.iter().collect::<HashSet<_>>().len(), selects.len());
    for selection in selections() {
        for spec in selection.kernels(Arch::Sm90a) {
            assert!(selects.contains(&key(&selection.case, &KernelSpec::Select(spec))), "{selection:?}");
        }
    }
    // What a case shares is made once: its steps follow each other.
    let cases: Vec<Case> = contests.iter().map(|c| c.case).collect();
    let changes = cases.windows(2).filter(|pair| pair[0] != pair[1]).count() + 1;
    assert_eq!(changes, cases.iter().collect::<HashSet<_>>().len());
}

/// GPU time at a pessimistic 350 TF, every head_dim served: check, estimate, at least 5 rounds or the budget, and for the
/// backward's inputs one forward more.
#[test]
fn the_tables_end_within_three_minutes() {
    let plan = plan(ServedBy::Committed);
    let budget = plan.mode.budget_us();
    let mut us = 0.0;
    for case in &plan.cases {
        let forward = case.flops(AttnOp::Fwd) / 350e6;
        let backwards = 2.2 * case.flops(AttnOp::Bwd) / 350e6;
        let timed = |of_a_round: f64| (5.0 * of_a_round).max(budget.min(30.0 * of_a_round));
        us += 3.0 * forward + timed(forward) + 2.0 * backwards + timed(backwards) + 2.0 * 30.0 * 300.0;
    }
    // The rest of the three minutes is for compiling, inputs and the oracle.
    assert!(us / 1e6 < 90.0, "{} s of kernels", us / 1e6);
    assert!(plan.mode.time_limit_s() <= 210.0);
}

#[test]
fn targets_are_those_of_an_h100() {
    let at = |section: &str, head_dim, block, kind: ListKind| {
        let found = |l: &dsv_autotune::tables::Line| {
            (l.case.head_dim, l.case.lists.block_size(), l.case.kind) == (head_dim, block, kind)
                && l.section.starts_with(section)
        };
        lines().into_iter().find(found).unwrap()
    };
    let words = |line: dsv_autotune::tables::Line| {
        let target = line.targets.unwrap();
        [target.forward.must, target.forward.aim, target.backward.must, target.backward.aim]
    };
    assert_eq!(words(at("32,768", 128, (0, 0), ListKind::Dense)), [640.0, 700.0, 570.0, 650.0]);
    assert_eq!(words(at("32,768", 64, (64, 64), ListKind::Random)), [410.0, 460.0, 330.0, 400.0]);
    assert_eq!(words(at("65,536", 128, (0, 0), ListKind::Dense)), [589.0, 644.0, 524.0, 598.0]);
    assert_eq!(words(at("Mixed", 128, (128, 128), ListKind::Mixed)), [543.0, 598.0, 506.0, 561.0]);
    assert_eq!(words(at("Clustered", 128, (64, 64), ListKind::Clustered)), [540.0, 600.0, 430.0, 500.0]);
    assert_eq!(
        at("32,768", 128, (128, 128), ListKind::Random).speed_up.map(|t| (t.must, t.aim)),
        Some((9.5, 10.5))
    );
    assert_eq!(at("32,768", 96, (0, 0), ListKind::Dense).case.num_heads, 16);
    assert_eq!(at("32,768", 256, (0, 0), ListKind::Dense).case.num_heads, 8);
    assert_eq!(words(at("32,768", 96, (0, 0), ListKind::Dense)), [575.0, 640.0, 470.0, 560.0]);
    assert_eq!(words(at("32,768", 256, (0, 0), ListKind::Dense)), [660.0, 730.0, 420.0, 520.0]);
    let of_others = |l: &dsv_autotune::tables::Line| ![64, 128].contains(&l.case.head_dim);
    assert!(lines().into_iter().filter(of_others).count() == 2, "96 and 256 have their dense row alone");
}

#[test]
fn fine_lists_have_targets_of_their_own() {
    let fine: Vec<_> = lines().into_iter().filter(|l| l.case.lists.is_gather()).collect();
    let told: Vec<_> = fine
        .iter()
        .map(|l| {
            let (c, t) = (l.case, l.targets.unwrap());
            let of = |t: dsv_autotune::tables::Target| (t.must, t.aim);
            (c.lists.block_size(), (c.num_heads, c.seqlen), of(t.forward), of(t.backward), l.select.map(of))
        })
        .collect();
    let (a, b) = ((16, 32768), (4, 131_072));
    assert_eq!(
        told,
        [
            ((128, 8), a, (470.0, 550.0), (300.0, 370.0), None),
            ((64, 8), a, (340.0, 400.0), (180.0, 210.0), Some((0.5, 0.25))),
            ((128, 1), a, (430.0, 520.0), (270.0, 330.0), None),
            ((64, 1), a, (300.0, 360.0), (150.0, 190.0), Some((0.8, 0.4))),
            ((128, 8), b, (420.0, 480.0), (170.0, 250.0), None),
        ]
    );
    assert!(fine.iter().all(|l| l.case.head_dim == 128 && (l.case.kept() - 0.1).abs() < 1e-3));
    let steps: Vec<_> = lines()
        .into_iter()
        .filter_map(|l| l.step.map(|t| (l.case.lists.block_size(), l.case.seqlen, t.must, t.aim)))
        .collect();
    assert_eq!(
        steps,
        [((128, 128), 32768, 9.0, 10.0), ((64, 64), 32768, 6.5, 7.7), ((128, 8), 32768, 5.0, 6.5)]
    );
}

#[test]
fn selections_are_rows_and_the_whole_step_counts_one_of_them() {
    let tables = tables();
    let row = |block, rule: &str, budget: &str, op: &str| {
        let same = |r: &&dsv_autotune::tables::SelectionRow| {
            (r.block, r.rule.as_str(), r.budget.as_str(), r.op(), r.num_heads)
                == (block, rule, budget, op, 16)
        };
        tables.selections.iter().find(same).unwrap_or_else(|| panic!("{block:?} {rule} {budget} {op}"))
    };
    let us = |result: &Selected| match result {
        Selected::Measured { timing, .. } => timing.median_us,
        other => panic!("{other:?}"),
    };
    let ms = |t: Option<dsv_autotune::tables::Target>| t.map(|t| (t.must, t.aim));
    let tokens = row((64, 1), "centre", "top_k", "kv_select_fine");
    assert_eq!((us(&tokens.result), ms(tokens.target)), (155.25, Some((0.8, 0.4))));
    let of_four = row((64, 8), "mass4", "top_k", "kv_select_fine");
    assert_eq!((us(&of_four.result), ms(of_four.target)), (355.25, Some((1.5, 0.75))));
    assert!(of_four.kernel.contains("_mass4_mass_"));
    // Blocks of 64 by both kernels: that of the lists is kv_select, whatever was measured after it.
    let (rows, fine) =
        (row((64, 64), "centre", "top_k", "kv_select"), row((64, 64), "centre", "top_k", "kv_select_fine"));
    assert_eq!((us(&rows.result), us(&fine.result)), (55.25, 155.25));
    assert_eq!((ms(rows.target), ms(fine.target)), (Some((0.25, 0.15)), Some((0.25, 0.15))));
    assert_eq!(row((64, 1), "centre", "top_p", "kv_select_fine").target, None);
    let find = |block, seqlen| {
        let mut rows = tables.rows();
        let same = |r: &&dsv_autotune::tables::TableRow| {
            (r.head_dim, r.block, r.lists.as_str(), r.seqlen) == (128, block, "random", seqlen)
                && (r.keep - 0.1).abs() < 0.003
        };
        rows.find(same).unwrap()
    };
    let blocks = find((64, 64), 32768);
    assert_eq!(
        (blocks.select_us, blocks.invert_us, blocks.lists_us()),
        (Some(55.25), Some(55.25), Some(110.5))
    );
    let fine = find((128, 8), 32768);
    assert_eq!((fine.select_us, fine.invert_us, fine.lists_us()), (Some(155.25), None, Some(155.25)));
    let ours = fine.forward.us().unwrap() + fine.backward.us().unwrap();
    let cudnn = fine.speed_up().unwrap() * ours;
    assert!((fine.step_speed_up().unwrap() - cudnn / (ours + 155.25)).abs() < 1e-9);
    let page = markdown(&tables);
    assert!(
        page.contains("| 16, 32k | 64x8 | mass4 | top_k | kv_select_fine | 0.355 | 1.5 / 0.75 |"),
        "{page}"
    );
    assert!(page.contains(" | 0.155 (target 0.8 / 0.4) | "), "{page}");
    // No cuDNN of 131,072 tokens was measured: no speed-up.
    assert_eq!(find((128, 8), 131_072).step_speed_up(), None);
    let dense = tables.rows().find(|r| r.block == (0, 0)).unwrap();
    assert_eq!((dense.lists_us(), dense.step_speed_up()), (None, None));
}

/// As of a GPU whose table was made before there were fine lists.
#[test]
fn a_table_without_fine_lists_is_served_by_defaults_and_says_so() {
    let table = Service::new("NVIDIA H100 80GB HBM3", Arch::Sm90a, &ServedBy::Committed).unwrap();
    let contests = plan(ServedBy::Committed).contests_served(&table);
    let records: Vec<TuneRecord> =
        contests.iter().flat_map(|c| c.specs.iter().map(move |&spec| record(c, spec))).collect();
    let tables = Tables::new(&meta(), &records, &table, &peers());
    let fine: Vec<_> = tables.rows().filter(|r| (1..64).contains(&r.block.1)).collect();
    assert_eq!(fine.len(), 5);
    let by_default = |cell: &Cell| matches!(cell, Cell::Measured { found, .. } if found == "default");
    let page = markdown(&tables);
    if fine.iter().all(|r| by_default(&r.forward) && by_default(&r.backward)) {
        assert_eq!(page.matches("The table has no line for these lists").count(), 1, "{page}");
    }
    assert!(fine.iter().all(|r| r.deterministic == Cell::NoKernel), "there is none, and it is said");
    assert!(page.contains("| no kernel | "), "{page}");
    assert!(!markdown(&self::tables()).contains("has no line"), "without a table it is said once, above");
}

/// A record made before the whole step and selections were measured.
#[test]
fn an_older_record_still_reads() {
    let mut value: serde_json::Value = serde_json::from_str(&tables().to_json()).unwrap();
    value.as_object_mut().unwrap().remove("selections");
    let sections = value["sections"].as_array_mut().unwrap();
    sections.truncate(1);
    for row in sections[0]["rows"].as_array_mut().unwrap() {
        row.as_object_mut().unwrap().remove("step_target");
    }
    let old: Tables = serde_json::from_value(value).unwrap();
    assert_eq!(old.selections, []);
    let page = markdown(&old);
    assert!(page.contains("| whole step |") && !page.contains("scored by"), "{page}");
    let again: Tables = serde_json::from_str(&old.to_json()).unwrap();
    assert_eq!(again, old);
    assert!(!text(&old).contains("kv_select"));
}

#[test]
fn rows_hold_kernels_times_and_ratios() {
    let tables = tables();
    assert_eq!(tables.rows().count(), lines().len());
    let find = |head_dim, block, lists: &str, seqlen, keep: f64| {
        let same = |r: &&dsv_autotune::tables::TableRow| {
            (r.head_dim, r.block, r.lists.as_str(), r.seqlen) == (head_dim, block, lists, seqlen)
                && (r.keep - keep).abs() < 0.01
        };
        tables.rows().find(same).unwrap()
    };
    let dense = find(128, (0, 0), "dense", 32768, 1.0);
    assert_eq!((dense.forward.tf(), dense.backward.tf()), (Some(500.0), Some(500.0)));
    assert!((dense.deterministic_factor().unwrap() - 1.2).abs() < 1e-5);
    assert!((dense.speed_up().unwrap() - 1.25).abs() < 1e-5, "500 TF over cuDNN's 400");
    assert_eq!(dense.of_cudnn(), (Some(1.25), Some(1.25)));
    assert_eq!((dense.select_us, dense.invert_us), (None, None));
    assert!(
        matches!(&dense.forward, Cell::Measured { found, kernel, .. } if found == "default" && kernel.starts_with("attn_fwd_bf16_d128_qg0"))
    );
    let names = |row: &dsv_autotune::tables::TableRow| -> Vec<String> {
        row.peers.iter().map(|p| p.name.clone()).collect()
    };
    assert_eq!(names(dense), ["sdpa cudnn", "sdpa flash", "FA3 forward", "FA4-cute dense"]);
    let sparse = find(128, (64, 64), "random", 32768, 0.1);
    assert_eq!(
        names(sparse),
        [
            "VSA 64x64 default",
            "VSA 64x64 FASTVIDEO_VSA_TK",
            "VSA 64x64 FASTVIDEO_VSA_TRITON",
            "cuDNN-frontend BSA 64 random"
        ]
    );
    assert_eq!((sparse.select_us, sparse.invert_us), (Some(55.25), Some(55.25)));
    let sparse = find(128, (128, 128), "random", 65536, 0.1);
    assert_eq!(
        names(sparse),
        [
            "flex_attention triton 128x128",
            "cuDNN-frontend BSA 128 random",
            "VSA-CuTe(FA4) 128x128",
            "VSA-CuTe(FA4) 256x256"
        ]
    );
    let clustered = find(64, (64, 64), "clustered", 32768, 0.1);
    assert_eq!(names(clustered), ["cuDNN-frontend BSA 64 clustered"]);
    assert_eq!(clustered.select_us, Some(55.25), "selection does not depend on how lists turn out");
    let near = |(a, b): (Option<f64>, Option<f64>), x: f64| {
        (a.unwrap() - x).abs() < 1e-5 && (b.unwrap() - x).abs() < 1e-5
    };
    assert!(near(clustered.of_other(), 0.9), "{:?}", clustered.of_other());
    let mixed = find(64, (128, 128), "mixed", 32768, 0.255);
    assert!(near(mixed.of_other(), 1.05) && mixed.peers.is_empty());
    assert_eq!(mixed.against.as_ref().unwrap().lists, "uniform");
    // 50 % is the width of the widest head alone: TF count what all heads keep.
    assert_eq!(mixed.forward.tf(), Some(476.2));
    for row in tables.rows() {
        let case = match row.block {
            (0, 0) => Case::dense(row.head_dim, 1, 4096),
            block => Case::sparse(row.head_dim, 1, 4096, block, 0.1, ListKind::Random),
        };
        let served = service().serve(&case.problem(AttnOp::Fwd)).is_some();
        assert_eq!(matches!(row.forward, Cell::NoKernel), !served, "{}", row.head_dim);
    }
}

#[test]
fn every_peer_lands_beside_one_row() {
    let tables = tables();
    assert_eq!(tables.other_peers, []);
    let landed: usize = tables.rows().map(|row| row.peers.len()).sum();
    assert_eq!(landed, peers().len(), "each once");
    // What nobody did here is named, not lost.
    let stranger = Peer { s: 1000, ..peers()[0].clone() };
    let tables = Tables::new(&meta(), &recorded(), &service(), std::slice::from_ref(&stranger));
    assert_eq!(tables.other_peers, [stranger.rounded()]);
    assert!(text(&tables).contains("no row of ours: sdpa cudnn h16 1000 d64 kept 100.0"));
}

#[test]
fn failures_and_gaps_are_shown() {
    let mut records = recorded();
    let dense: Vec<usize> = (0..records.len())
        .filter(|&i| records[i].problem.lists.is_dense() && records[i].problem.head_dim == 128)
        .collect();
    let message = "dq: largest error 1 > 0.1 at [0, 1, 2]".to_string();
    records[dense[1]].outcome = Outcome::Wrong { message: message.clone() };
    let wrong = records[dense[1]].spec.name();
    records.retain(|r| r.problem.seqlen_kv == 32768);
    let tables = Tables::new(&meta(), &records, &service(), &[]);
    let shown = text(&tables);
    assert!(shown.contains("WRONG") && shown.contains(&format!("wrong: {wrong}: {message}")), "{shown}");
    assert!(shown.contains("none yet"), "what was not measured is said: {shown}");
    let page = markdown(&tables);
    assert!(page.contains("| wrong |"), "{page}");
    assert!(
        !page.contains("65,536") && !page.contains("not measured |"),
        "a table without a figure is left out: {page}"
    );
    // The later record counts.
    let mut again = records.iter().find(|r| r.spec.name() == wrong).unwrap().clone();
    again.outcome =
        Outcome::Ok { timing: Timing { median_us: 1e5, spread_us: 1.0, samples: 5 }, error_ratio: 0.2 };
    records.push(again);
    assert!(!text(&Tables::new(&meta(), &records, &service(), &[])).contains("WRONG"));
}

#[test]
fn the_text_fits_and_says_it_all() {
    let mut tables = tables();
    // As if every head_dim had kernels.
    let like = tables.rows().find(|row| row.head_dim == 128 && row.block == (64, 64)).unwrap().clone();
    for row in tables.sections.iter_mut().flat_map(|section| &mut section.rows) {
        if row.forward == Cell::NoKernel {
            (row.forward, row.backward) = (like.forward.clone(), like.backward.clone());
            (row.deterministic, row.select_us, row.invert_us) =
                (like.deterministic.clone(), like.select_us, like.invert_us);
        }
    }
    let shown = text(&tables);
    assert!(shown.len() <= 12_000, "{} characters", shown.len());
    insta::assert_snapshot!("text", text(&fixed()));
    for words in ["cuDNN-frontend BSA 64 clustered: 400|- (1.39|-)", "64x64 mixed", "12.5+ (6.8/7.5)"] {
        assert!(shown.contains(words), "no '{words}' in\n{shown}");
    }
}

#[test]
fn the_record_reads_back_and_makes_the_same_page() {
    let tables = tables();
    let json = tables.to_json();
    let back: Tables = serde_json::from_str(&json).unwrap();
    assert!(back == tables && back.to_json() == json);
    assert_eq!(markdown(&back), markdown(&tables));
    insta::assert_snapshot!("markdown", markdown(&fixed()));
    // Every row of a table has as many columns as its head.
    let columns: BTreeSet<usize> =
        markdown(&tables).lines().filter(|l| l.starts_with('|')).map(|l| l.matches('|').count()).collect();
    assert_eq!(columns.len(), 3, "with and without a comparison, and selections: {columns:?}");
    // Another text of one kernel is another record.
    let mut records = recorded();
    records[0].source_hash = "f".repeat(64);
    assert_ne!(Tables::new(&meta(), &records, &service(), &[]).kernels, tables.kernels);
    let registry = dsv_runtime::Registry::committed();
    assert_eq!(tables.changed(&registry).len(), {
        // What is rendered on demand has no committed text to differ from.
        let committed = tables.selections.iter().filter(|row| registry.kernel(&row.kernel).is_some());
        let names: BTreeSet<String> = tables
            .rows()
            .flat_map(|r| [&r.forward, &r.backward, &r.deterministic])
            .filter_map(Cell::kernel)
            .map(str::to_string)
            .chain(committed.map(|row| row.kernel.clone()))
            .collect();
        names.len()
    });
}

#[test]
fn a_document_has_its_place_replaced() {
    let path = Path::new("README.md");
    let page = markdown(&tables());
    let document = format!("# Head\n\n{} old.json -->\nold\n{}\n\nfoot\n", page::BEGIN, page::END);
    let new = place(path, Some(&document), "record/x/bench.json", &page).unwrap();
    assert!(
        new.starts_with("# Head\n\n<!-- bench: begin record/x/bench.json -->\n")
            && new.ends_with("-->\n\nfoot\n")
    );
    assert_eq!(placed(&new), Some(("record/x/bench.json", page.as_str())));
    assert_eq!(
        place(path, Some(&new), "record/x/bench.json", &page).unwrap(),
        new,
        "a second time changes nothing"
    );
    let alone = place(path, None, "bench.json", &page).unwrap();
    assert_eq!(placed(&alone), Some(("bench.json", page.as_str())));
    for without in ["# Head\n", &document.replace(page::END, ""), &document.replace(page::BEGIN, "")] {
        let error = place(path, Some(without), "r", &page).unwrap_err().to_string();
        assert!(error.contains("README.md") && error.contains("--markdown NEW-FILE"), "{error}");
    }
}

/// README's tables are those of the newest committed record, character by character. To bring them up to date:
/// dsv-autotune tables --from autotune/record/DATE-GPU/bench.json --markdown README.md
#[test]
fn the_readme_shows_the_newest_committed_record() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let (record, shown) = placed(&readme).expect("README.md has marks for the tables");
    let tables = Tables::read(&root.join(record)).unwrap();
    assert_eq!(shown, markdown(&tables), "README.md does not show {record}");
    assert!(tables.rows().filter(|row| row.forward.us().is_some()).count() >= 8, "{record} holds too little");
    let mut records = 0;
    for entry in std::fs::read_dir(root.join("autotune/record")).unwrap() {
        let path = entry.unwrap().path().join(BENCH_FILE);
        if path.exists() {
            records += 1;
            let (theirs, date) = (Tables::read(&path).unwrap().machine.date, &tables.machine.date);
            assert!(theirs <= *date, "{} is newer than {record}, which README.md shows", path.display());
        }
    }
    assert!(records > 0);
}

#[test]
fn the_command_line_makes_them_without_a_gpu() {
    let temp = tempfile::tempdir().unwrap();
    let dir = RunDir::new(&temp.path().join("run"));
    dir.begin(&Run { plan: plan(ServedBy::Committed), device: 0, machine: Some(meta()) }).unwrap();
    let records: String = recorded().iter().map(|r| serde_json::to_string(r).unwrap() + "\n").collect();
    std::fs::write(dir.file(RECORD_FILE), records).unwrap();
    std::fs::write(temp.path().join("peers.json"), serde_json::to_string(&peers()).unwrap()).unwrap();
    let autotune = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dsv-autotune"));
        let command = command.args(args).current_dir(temp.path()).env("CUDA_VISIBLE_DEVICES", "");
        let output = command.output().unwrap();
        let words = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), words(&output.stdout), words(&output.stderr))
    };
    let (ok, shown, errors) =
        autotune(&["tables", "--out", "run", "--ruler", "peers.json", "--markdown", "page.md"]);
    assert!(ok, "{errors}");
    assert_eq!(shown.trim_end(), text(&tables()).trim_end());
    let json = std::fs::read_to_string(dir.file(BENCH_FILE)).unwrap();
    assert!(json == tables().to_json(), "{json}");
    let page = std::fs::read_to_string(temp.path().join("page.md")).unwrap();
    assert_eq!(placed(&page), Some(("run/bench.json", markdown(&tables()).as_str())));
    // The record alone makes the same.
    let (ok, again, errors) = autotune(&["tables", "--from", "run/bench.json", "--markdown", "again.md"]);
    assert!(ok && again == shown, "{errors}");
    assert_eq!(std::fs::read_to_string(temp.path().join("again.md")).unwrap(), page);
    let (_, status, errors) = autotune(&["status", "--out", "run"]);
    assert!(
        status.contains("to measure: 0\n") && status.contains("next: dsv-autotune tables"),
        "{status}{errors}"
    );
    // Before a GPU is reached, too.
    let early = RunDir::new(&temp.path().join("early"));
    early.begin(&Run { plan: plan(ServedBy::File("t.json".into())), device: 0, machine: None }).unwrap();
    let (ok, status, errors) = autotune(&["status", "--out", "early"]);
    assert!(ok && status.contains(&format!("to measure: {}\n", recorded().len())), "{status}{errors}");
    for (args, words) in [
        (&["bench", "--tables", "--heads", "4"][..], "cannot be used with"),
        (&["bench", "--tables", "--table", "no.json"], "no.json"),
        (&["bench", "--form", "fast"], "--form fast is not possible\n  allowed: default, deterministic"),
        (&["bench", "--lists", "window"], "allowed: random, clustered, popular, mixed"),
        (&["tables", "--from", "peers.json"], "peers.json is no record of tables"),
        (&["tables", "--out", "nowhere"], "there is no run in nowhere"),
    ] {
        let (ok, _, errors) = autotune(args);
        assert!(!ok && errors.contains(words), "{args:?}: {errors}");
    }
}
