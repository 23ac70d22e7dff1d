//! Which cube of tokens should share a KV list: how far its queries agree on their critical keys, and how much of their mass
//! one list holds. Measured on queries and keys of one attention layer, in f64, for any cube shape of the token order.
//!
//! Of each measured cube and head, with `p_i(j)` the softmax weight of query i of the cube on key j:
//!
//! ```text
//! overlap    mean over ordered pairs of queries of the share of one's critical keys that are critical for the other
//! covered    mean over queries of sum of p_i(j) over the keys j of the cube's list
//! needed     the smallest share of the KV units whose list covers a wanted mass
//! ```
//!
//! The list takes KV units (`kv_block` consecutive tokens in the order that the cube defines) by falling score, under each
//! [`Choice`].

use crate::attention::{AttnError, AttnShape, View};
use crate::element::Element;
use crate::profile::{critical_keys, group_overlap, softmax_row};
use dsv_spec::order::{Cube, Grid, invert_order, token_order};
use rayon::prelude::*;
use std::fmt::Write as _;

/// The cubes whose tokens are a query group that a kernel serves (64, 128 or 256), longer in time or flatter.
pub const SERVED_CUBES: [Cube; 9] = [
    Cube { t: 4, h: 4, w: 4 },
    Cube { t: 2, h: 4, w: 8 },
    Cube { t: 1, h: 8, w: 8 },
    Cube { t: 4, h: 4, w: 8 },
    Cube { t: 8, h: 4, w: 4 },
    Cube { t: 2, h: 8, w: 8 },
    Cube { t: 4, h: 8, w: 8 },
    Cube { t: 8, h: 4, w: 8 },
    Cube { t: 16, h: 4, w: 4 },
];

/// Overlap within a cube that the paper chooses its cubes to stay above.
pub const PAPER_OVERLAP: f64 = 0.8;

/// Why a measurement is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CubeError {
    /// A size or tensor does not fit.
    #[error(transparent)]
    Input(#[from] AttnError),
    /// Queries and keys are not one sequence on one grid.
    #[error(
        "the grid {}x{}x{} has {} tokens, the sequences {seqlen_q} queries and {seqlen_kv} keys\n  allowed: as many queries \
         and keys as tokens\n  next: pass the self-attention's own q and k, and its grid",
        .grid.t, .grid.h, .grid.w, .grid.tokens()
    )]
    Grid {
        /// The grid.
        grid: Grid,
        /// Queries of a sequence.
        seqlen_q: usize,
        /// Keys of a sequence.
        seqlen_kv: usize,
    },
    /// The token order is no permutation of the grid's tokens.
    #[error(
        "order names token {token} twice, or one outside the grid\n  allowed: every raster index of the grid once\n  next: \
         pass what dsv_spec::order::token_order gave for the run's grid and cube"
    )]
    Order {
        /// The first index at fault.
        token: u32,
    },
    /// A share makes no sense.
    #[error("{name} is {value}\n  allowed: above 0, at most 1\n  next: theta 0.9 and mass 0.95 are usual")]
    Share {
        /// Which.
        name: &'static str,
        /// The value found.
        value: f64,
    },
    /// Nothing to measure by.
    #[error(
        "{name} has a 0, or nothing\n  allowed: 1 or more\n  next: give kv_blocks such as [1, 8, 64], and cubes 4"
    )]
    Empty {
        /// Which.
        name: &'static str,
    },
}

/// What is asked of every cube shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The grid of the tokens.
    pub grid: Grid,
    /// Raster index of each token of q and k as they stand ([`token_order`] of the run).
    pub order: Vec<u32>,
    /// Share of a query's mass whose smallest set of keys is critical (0.9 in the paper).
    pub theta: f64,
    /// Share of the KV units a list keeps where `covered` is told.
    pub kept: f64,
    /// Mass a list must hold where `needed` is told.
    pub mass: f64,
    /// Tokens of a KV unit, one measurement each.
    pub kv_blocks: Vec<usize>,
    /// Cubes measured in each head and sequence, spread evenly; all, where there are fewer.
    pub cubes: usize,
}

/// How a cube's list is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// By the largest logit of the middle query, as a predictor that makes no error would choose by the rule `centre`.
    Centre,
    /// By the largest logit of the mean query: the rule `mean`.
    Mean,
    /// By the mass of all the cube's queries: no list of as many units covers more.
    Best,
}

impl Choice {
    /// All of them.
    pub const ALL: [Choice; 3] = [Choice::Centre, Choice::Mean, Choice::Best];

    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Choice::Centre => "centre",
            Choice::Mean => "mean",
            Choice::Best => "best",
        }
    }
}

/// One cube shape, KV unit and choice: means over the measured cubes of all heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UnitReport {
    /// Tokens of a KV unit.
    pub kv_block: usize,
    /// How the lists were chosen.
    pub choice: Choice,
    /// Mass the list of `kept` units holds.
    pub covered: f64,
    /// Share of the units that hold the wanted mass.
    pub needed: f64,
}

/// One cube shape.
#[derive(Clone, Debug, PartialEq)]
pub struct CubeReport {
    /// The shape.
    pub cube: Cube,
    /// Cubes measured, over all heads and sequences; 0 where none fits the grid, and the rest is empty then.
    pub measured: usize,
    /// Mean overlap of critical keys.
    pub overlap: f64,
    /// Mean share of the keys that is not critical.
    pub sparsity: f64,
    /// One entry a KV unit and choice.
    pub units: Vec<UnitReport>,
}

/// Measures cube shapes on q and k [B, S, H, D] (k may have fewer heads). Cost: two products of the measured cubes' queries
/// with all keys, in f64, and a sort a query.
///
/// # Errors
/// [`CubeError`]: the first thing that does not fit.
pub fn measure<T: Element>(
    shape: &AttnShape,
    q: &View<'_, T>,
    k: &View<'_, T>,
    question: &Question,
    cubes: &[Cube],
) -> Result<Vec<CubeReport>, CubeError> {
    check(shape, q, k, question)?;
    let inverse = invert_order(&question.order);
    Ok(cubes.iter().map(|&cube| measure_one(shape, q, k, question, &inverse, cube)).collect())
}

fn check<T>(
    shape: &AttnShape,
    q: &View<'_, T>,
    k: &View<'_, T>,
    question: &Question,
) -> Result<(), CubeError> {
    shape.validate()?;
    q.check("q", shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim)?;
    k.check("k", shape.batch, shape.seqlen_kv, shape.num_kv_heads, shape.head_dim)?;
    let (grid, tokens) = (question.grid, question.grid.tokens());
    if shape.seqlen_q != tokens || shape.seqlen_kv != tokens || question.order.len() != tokens {
        return Err(CubeError::Grid { grid, seqlen_q: shape.seqlen_q, seqlen_kv: shape.seqlen_kv });
    }
    let mut seen = vec![false; tokens];
    for &token in &question.order {
        match seen.get_mut(token as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(CubeError::Order { token }),
        }
    }
    for (name, value) in [("theta", question.theta), ("kept", question.kept), ("mass", question.mass)] {
        if !(value > 0.0 && value <= 1.0) {
            return Err(CubeError::Share { name, value });
        }
    }
    if question.kv_blocks.is_empty() || question.kv_blocks.contains(&0) {
        return Err(CubeError::Empty { name: "kv_blocks" });
    }
    if question.cubes == 0 {
        return Err(CubeError::Empty { name: "cubes" });
    }
    Ok(())
}

/// Of one cube: overlap, share of critical keys, and (covered, needed) for each unit and choice.
type Part = (f64, f64, Vec<(f64, f64)>);

fn measure_one<T: Element>(
    shape: &AttnShape,
    q: &View<'_, T>,
    k: &View<'_, T>,
    question: &Question,
    inverse: &[u32],
    cube: Cube,
) -> CubeReport {
    let Question { grid, kv_blocks, .. } = question;
    let size = (cube.t * cube.h * cube.w) as usize;
    // Whole cubes come first in their order.
    let whole = (grid.t / cube.t * (grid.h / cube.h) * (grid.w / cube.w)) as usize;
    let of_each = question.cubes.min(whole);
    // tokens[i]: where the i-th token of the cube's order stands in q and k.
    let tokens: Vec<usize> =
        token_order(*grid, cube).iter().map(|&raster| inverse[raster as usize] as usize).collect();
    let parts: Vec<Part> = (0..shape.batch * shape.num_heads * of_each)
        .into_par_iter()
        .map(|at| {
            let (batch, head) = (at / of_each / shape.num_heads, at / of_each % shape.num_heads);
            let group = (2 * (at % of_each) + 1) * whole / (2 * of_each);
            let queries = &tokens[group * size..][..size];
            measure_cube(shape, q, k, question, &tokens, (batch, head), queries)
        })
        .collect();
    let count = parts.len();
    let mean = |value: &dyn Fn(&Part) -> f64| parts.iter().map(value).sum::<f64>() / count.max(1) as f64;
    let units = kv_blocks.iter().flat_map(|&kv_block| Choice::ALL.map(|choice| (kv_block, choice)));
    let units = units.enumerate().map(|(at, (kv_block, choice))| UnitReport {
        kv_block,
        choice,
        covered: mean(&|part| part.2[at].0),
        needed: mean(&|part| part.2[at].1),
    });
    CubeReport {
        cube,
        measured: count,
        overlap: mean(&|part| part.0),
        sparsity: if count == 0 { 0.0 } else { 1.0 - mean(&|part| part.1) },
        units: if count == 0 { Vec::new() } else { units.collect() },
    }
}

fn measure_cube<T: Element>(
    shape: &AttnShape,
    q: &View<'_, T>,
    k: &View<'_, T>,
    question: &Question,
    tokens: &[usize],
    (batch, head): (usize, usize),
    queries: &[usize],
) -> Part {
    let rows: Vec<Vec<f64>> =
        queries.iter().map(|&query| softmax_row(shape, q, k, batch, head, query)).collect();
    let critical: Vec<Vec<usize>> = rows.iter().map(|row| critical_keys(row, question.theta)).collect();
    let critical_share =
        critical.iter().map(Vec::len).sum::<usize>() as f64 / (rows.len() * tokens.len()) as f64;
    // Means over the cube's queries, keys in the cube's order: of the mass, and of ln(weight), which differs from the mean
    // query's logit by the same for every key.
    let per_query = 1.0 / rows.len() as f64;
    let of_mean = |value: &dyn Fn(f64) -> f64| -> Vec<f64> {
        tokens.iter().map(|&key| per_query * rows.iter().map(|row| value(row[key])).sum::<f64>()).collect()
    };
    let mass = of_mean(&|p| p);
    let mean_logit = of_mean(&|p| p.max(f64::MIN_POSITIVE).ln());
    let centre = &rows[rows.len() / 2];
    let centre: Vec<f64> = tokens.iter().map(|&key| centre[key]).collect();
    let mut found = Vec::new();
    for &kv_block in &question.kv_blocks {
        let largest = |unit: &[f64]| unit.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let of_units: Vec<f64> = mass.chunks(kv_block).map(|unit| unit.iter().sum()).collect();
        for choice in Choice::ALL {
            let scores: Vec<f64> = match choice {
                Choice::Centre => centre.chunks(kv_block).map(largest).collect(),
                Choice::Mean => mean_logit.chunks(kv_block).map(largest).collect(),
                Choice::Best => of_units.clone(),
            };
            found.push(coverage(&scores, &of_units, question));
        }
    }
    (group_overlap(&critical).unwrap_or(1.0), critical_share, found)
}

/// (mass of the `kept` best units by score, share of the units that hold the wanted mass).
fn coverage(scores: &[f64], mass: &[f64], question: &Question) -> (f64, f64) {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_unstable_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let kept = (question.kept * scores.len() as f64).ceil() as usize;
    let covered = order[..kept.min(order.len())].iter().map(|&unit| mass[unit]).sum();
    let mut held = 0.0;
    let enough = order.iter().position(|&unit| {
        held += mass[unit];
        held >= question.mass
    });
    // Where rounding leaves less than asked for, everything is needed.
    let needed = enough.map_or(order.len(), |last| last + 1);
    (covered, needed as f64 / order.len() as f64)
}

/// The reports as a table of text, one line a cube shape, KV unit and choice, ending with what the paper asks of overlap.
pub fn table(reports: &[CubeReport], question: &Question) -> String {
    let mut text = format!(
        "cube      tokens  overlap  sparsity  kv_block  list by  mass on {:.1} %  share for {:.1} % of the mass\n",
        100.0 * question.kept,
        100.0 * question.mass
    );
    for report in reports {
        let Cube { t, h, w } = report.cube;
        let name = format!("{t}x{h}x{w}");
        if report.measured == 0 {
            let _ = writeln!(text, "{name:9} {:6}  does not fit the grid", t * h * w);
        }
        for unit in &report.units {
            let _ = writeln!(
                text,
                "{name:9} {:6}  {:6.1}%{} {:7.1}%  {:8}  {:7}  {:13.1}%  {:7.2}%",
                t * h * w,
                100.0 * report.overlap,
                if report.overlap < PAPER_OVERLAP { "*" } else { " " },
                100.0 * report.sparsity,
                unit.kv_block,
                unit.choice.name(),
                100.0 * unit.covered,
                100.0 * unit.needed
            );
        }
    }
    let _ = writeln!(text, "* below the {:.0} % that the paper's cubes keep above", 100.0 * PAPER_OVERLAP);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    const GRID: Grid = Grid { t: 8, h: 8, w: 8 };

    fn question(order: Vec<u32>) -> Question {
        Question { grid: GRID, order, theta: 0.9, kept: 0.125, mass: 0.95, kv_blocks: vec![1, 8], cubes: 2 }
    }

    fn raster() -> Vec<u32> {
        (0..512).collect()
    }

    /// Queries that see exactly the tokens of their own cube of `side`, in raster order.
    fn of_own_cube(side: Cube) -> Vec<f32> {
        let columns = (8 / side.t * (8 / side.h) * (8 / side.w)) as usize;
        let mut x = vec![0.0f32; 512 * columns];
        for (token, row) in x.chunks_exact_mut(columns).enumerate() {
            let (t, h, w) = GRID.coordinates(token as u32);
            let cube = (t / side.t * (8 / side.h) + h / side.h) * (8 / side.w) + w / side.w;
            row[cube as usize] = 40.0;
        }
        x
    }

    fn report(side: Cube, cubes: &[Cube], order: &[u32]) -> Vec<CubeReport> {
        let x = of_own_cube(side);
        let columns = x.len() / 512;
        // The tokens as a run with that order has them.
        let x: Vec<f32> =
            order.iter().flat_map(|&token| x[token as usize * columns..][..columns].to_vec()).collect();
        let shape = AttnShape::new(1, 512, 1, columns).with_scale(1.0);
        let view = View::new(&x[..], shape.q_layout());
        measure(&shape, &view, &view, &question(order.to_vec()), cubes).unwrap()
    }

    #[test]
    fn a_cube_that_attends_to_itself_agrees_and_is_covered() {
        let side = Cube { t: 4, h: 4, w: 4 };
        for order in [raster(), token_order(GRID, Cube { t: 2, h: 4, w: 8 })] {
            let found = report(side, &[side, Cube { t: 2, h: 4, w: 8 }], &order);
            // 58 of its 64 keys hold 90 %, the same for every query: ties go to the smaller index.
            assert_eq!((found[0].measured, found[0].overlap), (2, 1.0));
            assert!((found[0].sparsity - (1.0 - 58.0 / 512.0)).abs() < 1e-12);
            for unit in &found[0].units {
                // An eighth of the units is the cube itself; 61 of 64 tokens, or all eight blocks, hold 95 %.
                assert!((unit.covered - 1.0).abs() < 1e-9, "{unit:?}");
                let needed = if unit.kv_block == 1 { 61.0 / 512.0 } else { 8.0 / 64.0 };
                assert!((unit.needed - needed).abs() < 1e-12, "{unit:?}");
            }
            // A 2x4x8 cube lies in two of them: half its queries, each with the whole mass in one.
            let flat = &found[1];
            assert!((flat.overlap - (0.5 * 64.0 - 1.0) / 63.0).abs() < 1e-12, "{}", flat.overlap);
            let by = |choice| flat.units.iter().find(|u| u.choice == choice && u.kv_block == 8).unwrap();
            assert!((by(Choice::Centre).covered - 0.5).abs() < 1e-9);
            assert!((by(Choice::Best).covered - 0.5).abs() < 1e-9);
            assert_eq!(by(Choice::Best).needed, 16.0 / 64.0);
        }
    }

    #[test]
    fn no_choice_covers_more_than_the_best() {
        let shape = AttnShape::new(2, 512, 4, 16).with_kv_heads(2);
        let mut rng = SplitMix64::new(4);
        let q = rng.normals(shape.q_len(), 2.0);
        let k = rng.normals(shape.kv_len(), 2.0);
        let (q, k) = (View::new(&q[..], shape.q_layout()), View::new(&k[..], shape.kv_layout()));
        let question = question(raster());
        for report in measure(&shape, &q, &k, &question, &SERVED_CUBES[..4]).unwrap() {
            assert_eq!(report.measured, 2 * 4 * 2);
            assert!(
                report.overlap > 0.0 && report.overlap < 0.5,
                "random queries agree by chance: {report:?}"
            );
            for units in report.units.chunks(3) {
                let best = units[2];
                assert_eq!(best.choice, Choice::Best);
                for unit in units {
                    assert!(unit.covered <= best.covered + 1e-12 && unit.needed >= best.needed - 1e-12);
                    assert!(unit.covered > 0.0 && unit.covered < 1.0);
                }
            }
            // The same mass in coarser units takes a larger share of them.
            assert!(report.units[5].needed > report.units[2].needed);
        }
    }

    #[test]
    fn the_table_marks_what_stays_below_the_paper() {
        let side = Cube { t: 4, h: 4, w: 4 };
        let cubes = [side, Cube { t: 2, h: 4, w: 8 }, Cube { t: 16, h: 4, w: 4 }];
        let found = report(side, &cubes, &raster());
        let text = table(&found, &question(raster()));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1 + 2 * 6 + 1 + 1, "{text}");
        assert!(lines[1].starts_with("4x4x4         64   100.0%     88.7%"), "{text}");
        assert!(lines[7].starts_with("2x4x8         64    49.2%*"), "{text}");
        assert!(lines[13].contains("does not fit the grid"), "{text}");
    }

    #[test]
    fn faults_are_named() {
        let shape = AttnShape::new(1, 512, 1, 1);
        let x = vec![0.0f32; 512];
        let view = View::new(&x[..], shape.q_layout());
        let ask = |question: &Question| measure(&shape, &view, &view, question, &SERVED_CUBES).unwrap_err();
        let good = question(raster());
        let twice = Question { order: vec![0; 512], ..good.clone() };
        assert_eq!(ask(&twice), CubeError::Order { token: 0 });
        let outside = Question { order: (1..513).collect(), ..good.clone() };
        assert_eq!(ask(&outside), CubeError::Order { token: 512 });
        let other = Question { grid: Grid { t: 8, h: 8, w: 9 }, ..good.clone() };
        assert!(matches!(ask(&other), CubeError::Grid { seqlen_q: 512, .. }));
        let theta = Question { theta: 0.0, ..good.clone() };
        assert_eq!(ask(&theta), CubeError::Share { name: "theta", value: 0.0 });
        assert!(matches!(
            ask(&Question { kept: f64::NAN, ..good.clone() }),
            CubeError::Share { name: "kept", .. }
        ));
        assert_eq!(
            ask(&Question { kv_blocks: vec![], ..good.clone() }),
            CubeError::Empty { name: "kv_blocks" }
        );
        assert_eq!(ask(&Question { cubes: 0, ..good }), CubeError::Empty { name: "cubes" });
    }
}
