//! Which granularity of KV lists a trained run should have: how much of its attention mass lists cover for each group rule,
//! query group, KV unit, cube shape and budget, measured on held-out clips, against the measured time of a step over such lists.
//! It must not know how lists are made on a device, nor where results are shown ([`page`]).
//!
//! Masses are measured at the run's own length, with the run's own predictors. At other lengths the same share of the keys is
//! taken to cover as much. Times are those of [`times`], never guessed.

pub mod page;
pub mod times;

use crate::data::Dataset;
use crate::engine::{Engine, EngineError};
use crate::eval;
use crate::model::{BlockAttention, Model};
use crate::predictor::PredictorTask;
use crate::run::{Inference, RunError};
use dsv_reference::attention::{AttnShape, Layout, View};
use dsv_reference::coverage::{self, Arrangement, Choice, CoverageError, Lists, Predicted, Question, Report};
use dsv_spec::order::{Cube, Grid};
use dsv_spec::{Budget, GroupRule, space};
use serde::{Deserialize, Serialize};
use times::{Selector, StepTime, Times, is_block_sparse};

/// File of a measurement in a run's folder.
pub const FILE: &str = "granularity.json";
/// Query groups measured beside the run's own.
pub const QUERY_GROUPS: [usize; 3] = [64, 128, 256];
/// KV units measured beside the run's own.
pub const KV_BLOCKS: [usize; 5] = [1, 8, 16, 64, 128];
/// Percents of the units that are looked at one by one: beyond, lists are no faster than attention over all keys.
const SINGLE_PERCENTS: u32 = 60;
/// Shares of the predicted mass, of the budget `top_p`.
const MASSES: [f64; 12] = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99];

/// Groups of each head, and queries of each, that a cube is chosen by.
const CUBE_GROUPS: usize = 4;
const CUBE_QUERIES: usize = 64;

/// How much is measured, and what for.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// (clip, timestep, noise) triples of the validation set: clips in turn, each at the next of its timesteps.
    pub samples: usize,
    /// Groups of each head and sample.
    pub groups: usize,
    /// Queries of a group whose mass is measured.
    pub queries: usize,
    /// Whether cubes of other shapes are measured too.
    pub cubes: bool,
    /// Mass that lists must cover.
    pub mass: f64,
    /// Lengths whose times are told.
    pub lengths: Vec<usize>,
}

/// One measurement of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Granularity {
    /// Optimizer steps of the weights.
    pub step: u64,
    /// Tokens of a clip, as frames, rows, columns.
    pub grid: [usize; 3],
    /// Heads of a block.
    pub heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// What the run's own lists are made of.
    pub own: Own,
    /// (clip, timestep, noise) triples looked at.
    pub samples: usize,
    /// Groups of each arrangement, over all samples, blocks and heads.
    pub groups: usize,
    /// Queries of a group whose mass was measured, at most.
    pub queries: usize,
    /// Mass that lists must cover.
    pub mass: f64,
    /// Share of a query's mass that its critical keys hold.
    pub theta: f64,
    /// Shares kept, of every `top_k`.
    pub shares: Vec<f64>,
    /// Shares of the predicted mass, of every `top_p`.
    pub masses: Vec<f64>,
    /// Where times come from.
    pub times: Vec<String>,
    /// Whose times are told, and what follows at each.
    pub lengths: Vec<AtLength>,
    /// How far the queries of each cube agree.
    pub cubes: Vec<CubeReport>,
    /// Which cube serves each size of lists best, where several were measured.
    pub picks: Vec<CubePick>,
    /// One entry a cube, query group, KV unit and choice; the contract's cubes first.
    pub cells: Vec<Cell>,
}

/// What a run's lists are made of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Own {
    /// The cube whose tokens are contiguous.
    pub cube: Cube,
    /// Tokens that share a list.
    pub query_group: usize,
    /// Tokens of a KV unit.
    pub kv_block: usize,
    /// Who speaks for the group.
    pub rule: GroupRule,
}

/// What follows at one length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AtLength {
    /// Tokens.
    pub seqlen: usize,
    /// Heads of the measured times; `None` where nothing was measured.
    pub num_heads: Option<u32>,
    /// Forward + backward over all keys, microseconds.
    pub dense_us: Option<f64>,
    /// The fastest lists of whole tiles of keys (kv_block 64 and more) that cover the mass, in the contract's cubes.
    pub block_sparse: Option<Chosen>,
    /// The fastest lists of smaller units.
    pub fine: Option<Chosen>,
    /// What is fastest, in a line, and by how much.
    pub verdict: String,
}

/// One way of listing KV that covers the mass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Chosen {
    /// Tokens that share a list.
    pub query_group: usize,
    /// Tokens of a KV unit.
    pub kv_block: usize,
    /// Who speaks for the group.
    pub rule: GroupRule,
    /// What says how many units it keeps.
    pub budget: Budget,
    /// The share asked for: of the units, or of the predicted mass.
    pub asked: f64,
    /// Share of the units kept.
    pub kept: f64,
    /// Mass covered.
    pub covered: f64,
    /// Selection + forward + backward, microseconds.
    pub us: f64,
    /// Whether that share was measured; else the time lies on the line between two that were.
    pub measured: bool,
}

/// How far the queries of one cube agree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CubeReport {
    /// The cube.
    pub cube: Cube,
    /// Tokens that share a list.
    pub query_group: usize,
    /// Mean over ordered pairs of queries of the share of critical keys that both have.
    pub overlap: f64,
    /// Share of the keys that is not critical.
    pub sparsity: f64,
}

/// The cube in which lists of one size cover the mass soonest, against the contract's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CubePick {
    /// Tokens that share a list.
    pub query_group: usize,
    /// Tokens of a KV unit.
    pub kv_block: usize,
    /// Where the times are of; `None` where nothing was measured and the share kept decides.
    pub seqlen: Option<usize>,
    /// The cube.
    pub cube: Cube,
    /// What covers the mass in it.
    pub needs: Needs,
    /// The same in the contract's cube; `None` where no measured share covers the mass.
    pub contract_needs: Option<Needs>,
}

/// What lists need to cover the mass.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Needs {
    /// Share of the units.
    pub kept: f64,
    /// Microseconds of a step; `None` where nothing was measured.
    pub us: Option<f64>,
}

/// One cube, query group, KV unit and choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The cube whose tokens are contiguous.
    pub cube: Cube,
    /// Tokens that share a list.
    pub query_group: usize,
    /// Tokens of a KV unit.
    pub kv_block: usize,
    /// Who chooses: a rule over predicted scores, or `None` for the best lists there are.
    pub rule: Option<GroupRule>,
    /// For each of [`Granularity::shares`].
    pub top_k: Curve,
    /// For each of [`Granularity::masses`].
    pub top_p: Curve,
}

/// What a budget gives, one value for each amount asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Share of the units kept.
    pub kept: Vec<f64>,
    /// Mass covered.
    pub covered: Vec<f64>,
    /// Microseconds of a step, for each of [`Granularity::lengths`]: `None`, or an empty row, where nothing was measured.
    pub us: Vec<Vec<Option<f64>>>,
    /// Places in each of these whose share was measured; the others lie on the line between two that were.
    pub measured: Vec<Vec<usize>>,
}

impl Curve {
    /// Microseconds of a step at a length, for the i-th amount asked for.
    pub fn us_at(&self, length: usize, i: usize) -> Option<f64> {
        *self.us.get(length)?.get(i)?
    }
}

impl Cell {
    /// The fewest units of `top_k` that cover the mass: the place in [`Granularity::shares`].
    pub fn enough(&self, mass: f64) -> Option<usize> {
        self.top_k.covered.iter().position(|&covered| covered >= mass)
    }

    /// `64 x 8`.
    pub fn name(&self) -> String {
        format!("{} x {}", self.query_group, self.kv_block)
    }
}

impl Granularity {
    /// The cells in the cubes that a run has unless it is told otherwise.
    pub fn of_contract(&self) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(|c| c.cube == contract(c.query_group, c.kv_block))
    }

    /// Tokens of a clip.
    pub fn tokens(&self) -> usize {
        self.grid.iter().product()
    }
}

/// Shares of the units that lists keep, of the budget `top_k`: by single percents where times are measured.
fn shares() -> Vec<f64> {
    (1..=SINGLE_PERCENTS)
        .chain((SINGLE_PERCENTS + 5..=100).step_by(5))
        .map(|percent| f64::from(percent) / 100.0)
        .collect()
}

/// The cube of a query group and KV unit.
fn contract(query_group: usize, kv_block: usize) -> Cube {
    Cube::of_group(query_group.max(kv_block) as u32)
}

/// The trained model's masses on held-out clips, with the averaged weights where it keeps them, and what they cost. Beside the
/// queries and keys of one block nothing is kept on the host.
///
/// # Errors
/// [`RunError`]: no clip held out, the device, numbers that are not finite.
pub fn measure(
    trained: &mut Inference,
    data: &Dataset,
    options: &Options,
    times: &Times,
) -> Result<Granularity, RunError> {
    if data.validation_len() == 0 {
        return Err(RunError::NothingHeldOut);
    }
    let Inference { engine, model, config, attention, step } = trained;
    let shape = &model.shape;
    let grid = shape.grid();
    let question = Question {
        grid,
        order: shape.token_order().0,
        theta: config.dsv.theta,
        rules: if model.predictors.is_some() { GroupRule::ALL.to_vec() } else { Vec::new() },
        shares: shares(),
        masses: MASSES.to_vec(),
        groups: options.groups,
        queries: options.queries,
    };
    let own = Own {
        cube: shape.cube,
        query_group: config.dsv.query_group,
        kv_block: config.dsv.kv_block,
        rule: config.dsv.group_rule.into(),
    };
    let arrangements = arrangements(grid, own, options.cubes);
    let reports = eval::with_averaged(&mut **engine, model, |engine| {
        let mut reports: Vec<Vec<Report>> = Vec::new();
        for sample in 0..options.samples {
            let triple =
                sample % data.validation_len() * eval::TIMES_PER_CLIP + sample % eval::TIMES_PER_CLIP;
            eval::write_triples(engine, model, config, data, &vec![triple; shape.patch.batch])?;
            reports.extend(layers(engine, model, attention, &question, &arrangements)?);
        }
        Ok::<_, RunError>(reports)
    })??;
    let of_each: Vec<Report> = (0..arrangements.len())
        .map(|at| Report::mean(&reports.iter().map(|layer| layer[at].clone()).collect::<Vec<_>>()))
        .collect();
    let mut found = Granularity {
        step: *step,
        grid: shape.patch.grid(),
        heads: shape.heads,
        head_dim: shape.head_dim,
        own,
        samples: options.samples,
        groups: of_each.iter().map(|r| r.groups).max().unwrap_or(0),
        queries: options.queries,
        mass: options.mass,
        theta: config.dsv.theta,
        shares: question.shares.clone(),
        masses: question.masses.clone(),
        times: times.sources.clone(),
        lengths: Vec::new(),
        cubes: Vec::new(),
        picks: Vec::new(),
        cells: Vec::new(),
    };
    for (a, report) in arrangements.iter().zip(&of_each) {
        // Units larger than the group stand in another cube: their queries have been looked at in their own.
        if a.kv_blocks.iter().any(|&unit| unit <= a.query_group) {
            found.cubes.push(CubeReport {
                cube: a.cube,
                query_group: a.query_group,
                overlap: report.overlap,
                sparsity: report.sparsity,
            });
        }
        found.cells.extend(report.coverage.iter().map(|c| {
            let curve = |lists: &[Lists]| Curve {
                kept: lists.iter().map(|l| rounded(l.kept, 1e5)).collect(),
                covered: lists.iter().map(|l| rounded(l.covered, 1e5)).collect(),
                ..Curve::default()
            };
            Cell {
                cube: a.cube,
                query_group: a.query_group,
                kv_block: c.kv_block,
                rule: match c.choice {
                    Choice::Best => None,
                    Choice::Predicted(rule) => Some(rule),
                },
                top_k: curve(&c.by_share),
                top_p: curve(&c.by_mass),
            }
        }));
    }
    add_times(&mut found, &options.lengths, times);
    if options.cubes {
        found.picks = picks(&found);
    }
    Ok(found)
}

/// What is measured: every query group and KV unit in the contract's cube and, where asked for, in every other shape of as many
/// tokens that fits the grid.
fn arrangements(grid: Grid, own: Own, cubes: bool) -> Vec<Arrangement> {
    let with = |sizes: &[usize], size: usize| {
        let mut sizes: Vec<usize> = sizes.iter().copied().chain([size]).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    };
    let (groups, units) = (with(&QUERY_GROUPS, own.query_group), with(&KV_BLOCKS, own.kv_block));
    let mut found = Vec::new();
    for &query_group in &groups {
        let (within, beyond): (Vec<usize>, Vec<usize>) = units.iter().partition(|&&u| u <= query_group);
        found.push(Arrangement {
            cube: contract(query_group, 1),
            query_group,
            kv_blocks: within.iter().copied().filter(|u| query_group % u == 0).collect(),
        });
        found.extend(beyond.into_iter().filter(|u| u % query_group == 0).map(|unit| Arrangement {
            cube: contract(query_group, unit),
            query_group,
            kv_blocks: vec![unit],
        }));
    }
    if cubes {
        for &query_group in &groups {
            let shapes = Cube::shapes(query_group as u32).into_iter().skip(1).filter(|cube| cube.fits(grid));
            let kv_blocks: Vec<usize> = units.iter().copied().filter(|u| query_group % u == 0).collect();
            found.extend(shapes.map(|cube| Arrangement { cube, query_group, kv_blocks: kv_blocks.clone() }));
        }
    }
    found
}

/// Why masses cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The device.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Queries, keys or scores.
    #[error(transparent)]
    Coverage(#[from] CoverageError),
}

/// What was measured of the cubes a run can have, before one was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChosenCube {
    /// The cube from now on.
    pub cube: Cube,
    /// All that were measured, the one until now first.
    pub shapes: Vec<CubeCoverage>,
    /// Why, in a line.
    pub why: String,
}

/// One cube that a run can have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CubeCoverage {
    /// The cube.
    pub cube: Cube,
    /// Share of critical keys that two of its queries have in common.
    pub overlap: f64,
    /// Share of the KV units that the predicted lists need to cover [`COVERED`] of the mass.
    pub needed: f64,
    /// Mass that they cover with that share.
    pub covered: f64,
}

/// Mass that lists are to cover where a cube is chosen.
pub const COVERED: f64 = 0.95;
/// What another cube's lists may need at most of what those of the present one do, to be worth a change.
const WORTH_A_CUBE: f64 = 0.97;

/// Measures the cubes a model can have with its present query group and KV unit, on the inputs in its
/// [`crate::model::Io`] with full attention, and takes the one whose predicted lists cover [`COVERED`] of the mass with the fewest
/// units: of one size of lists that is the fastest. `grids` are those that the cube must fit. Values that are not finite leave
/// the cube as it is.
///
/// # Errors
/// The device.
///
/// # Panics
/// If the model has no predictors.
pub fn choose_cube(
    engine: &mut dyn Engine,
    model: &Model,
    theta: f64,
    grids: &[Grid],
) -> Result<ChosenCube, EngineError> {
    let predictor = model.shape.predictor.expect("cubes are chosen by predicted lists");
    let question = Question {
        grid: model.shape.grid(),
        order: model.shape.token_order().0,
        theta,
        rules: vec![predictor.rule],
        shares: shares(),
        masses: Vec::new(),
        groups: CUBE_GROUPS,
        queries: CUBE_QUERIES,
    };
    let own = model.shape.cube;
    let others = Cube::shapes(own.tokens()).into_iter().filter(|&cube| cube != own);
    let cubes: Vec<Cube> =
        std::iter::once(own).chain(others.filter(|cube| grids.iter().all(|&grid| cube.fits(grid)))).collect();
    let arrangement = |&cube: &Cube| Arrangement {
        cube,
        query_group: predictor.lists.query_group,
        kv_blocks: vec![predictor.lists.kv_block],
    };
    let arrangements: Vec<Arrangement> = cubes.iter().map(arrangement).collect();
    let dense = vec![BlockAttention::Dense; model.shape.layers];
    let found = match layers(engine, model, &dense, &question, &arrangements) {
        Ok(found) => found,
        // A step of such values is skipped; the run goes on.
        Err(MeasureError::Coverage(_) | MeasureError::Engine(EngineError::Flag { .. })) => {
            let why = format!("{own} stays: attention was not finite, so no cube was measured");
            return Ok(ChosenCube { cube: own, shapes: Vec::new(), why });
        }
        Err(MeasureError::Engine(error)) => return Err(error),
    };
    let shapes: Vec<CubeCoverage> = cubes
        .iter()
        .enumerate()
        .map(|(at, &cube)| {
            let report = Report::mean(&found.iter().map(|layer| layer[at].clone()).collect::<Vec<_>>());
            let lists = report.coverage.iter().find(|c| c.choice != Choice::Best);
            let lists = &lists.expect("a rule was asked for").by_share;
            // The whole sequence covers everything, but for rounding.
            let enough = lists.iter().find(|l| l.covered >= COVERED).unwrap_or(&lists[lists.len() - 1]);
            CubeCoverage { cube, overlap: report.overlap, needed: enough.kept, covered: enough.covered }
        })
        .collect();
    Ok(fewest(shapes))
}

/// Takes the cube that needs the fewest units, of those the one that covers most with them. The first stays where no other
/// needs less by [`WORTH_A_CUBE`]: a sample of groups tells no smaller difference.
fn fewest(shapes: Vec<CubeCoverage>) -> ChosenCube {
    let own = &shapes[0];
    let better = |a: &&CubeCoverage, b: &&CubeCoverage| {
        a.needed.total_cmp(&b.needed).then(b.covered.total_cmp(&a.covered))
    };
    let worth = |shape: &&CubeCoverage| shape.needed <= WORTH_A_CUBE * own.needed;
    let best = shapes.iter().filter(worth).min_by(better).unwrap_or(own);
    let needs = |shape: &CubeCoverage| format!("{:.1} % of the keys", 100.0 * shape.needed);
    let mass = format!("for {:.0} % of the mass", 100.0 * COVERED);
    let (cube, why) = match best.cube == own.cube {
        true => (
            own.cube,
            format!("{} stays: its lists need {} {mass}, no other cube's clearly less", own.cube, needs(own)),
        ),
        false => (
            best.cube,
            format!(
                "{}: its lists need {} {mass}, those of {} {}",
                best.cube,
                needs(best),
                own.cube,
                needs(own)
            ),
        ),
    };
    ChosenCube { cube, why, shapes }
}

/// Every block's report on the inputs in the model's [`crate::model::Io`], an entry an arrangement.
fn layers(
    engine: &mut dyn Engine,
    model: &Model,
    attention: &[BlockAttention],
    question: &Question,
    arrangements: &[Arrangement],
) -> Result<Vec<Vec<Report>>, MeasureError> {
    let own = model.shape.self_attn();
    let shape = AttnShape::new(own.batch, own.seqlen_kv, own.heads, own.head_dim);
    let mut found: Vec<Result<Vec<Report>, MeasureError>> = Vec::new();
    model.prepare(engine);
    // Profiling makes the scores of dense blocks too.
    let task = PredictorTask { train: false, profile: model.predictors.is_some() };
    model.infer_watched(engine, attention, task, &mut |engine, [q, k]| {
        let mut read = || -> Result<Vec<Report>, MeasureError> {
            let (q, k) = (engine.read_f32(q)?, engine.read_f32(k)?);
            let lowrank = match &model.predictors {
                Some(p) => Some((p.shape.d_lr, engine.read_f32(p.scores()[0])?)),
                None => None,
            };
            let predicted = lowrank.as_ref().map(|(rank, values)| {
                // Packed [B, S, 2, H, rank].
                let width = shape.num_heads * rank;
                let seq = 2 * width;
                let layout = Layout { batch: shape.seqlen_q * seq, seq, head: *rank };
                Predicted {
                    rank: *rank,
                    q: View::new(&values[..], layout),
                    k: View::new(&values[width..], layout),
                }
            });
            let (q, k) = (View::new(&q[..], shape.q_layout()), View::new(&k[..], shape.kv_layout()));
            Ok(coverage::measure(&shape, &q, &k, predicted.as_ref(), question, arrangements)?)
        };
        // After a block that failed the others say nothing new.
        if found.last().is_none_or(Result::is_ok) {
            found.push(read());
        }
    });
    found.into_iter().collect()
}

/// Fills in the times at each length, and what follows.
fn add_times(g: &mut Granularity, lengths: &[usize], times: &Times) {
    for &seqlen in lengths {
        let shape = times.shape(seqlen, g.head_dim, g.heads);
        for cell in &mut g.cells {
            let block = (cell.query_group as u16, cell.kv_block as u16);
            for (budget, curve) in [(Budget::TopK, &mut cell.top_k), (Budget::TopP, &mut cell.top_p)] {
                let (Some(shape), Some(rule)) = (shape, cell.rule) else {
                    curve.us.push(Vec::new());
                    curve.measured.push(Vec::new());
                    continue;
                };
                let step = |&kept: &f64| times.step(shape, block, Selector { rule, budget }, kept);
                let steps: Vec<Option<StepTime>> = curve.kept.iter().map(step).collect();
                let measured = |i: &usize| steps[*i].is_some_and(|step| step.measured);
                curve.measured.push((0..steps.len()).filter(measured).collect());
                curve.us.push(steps.iter().map(|step| step.map(|step| rounded(step.us, 10.0))).collect());
            }
        }
        let fastest = |wanted| fastest(g, g.lengths.len(), wanted);
        let (block_sparse, fine) = (fastest(true), fastest(false));
        let dense_us = shape.and_then(|shape| times.dense_us(shape));
        let verdict = match (shape, dense_us) {
            _ if g.cells.iter().all(|c| c.rule.is_none()) => {
                format!(
                    "{seqlen} tokens: the run has no predictors to choose lists by; next: train one, --set dsv.attention=dsv"
                )
            }
            (Some(shape), Some(dense)) => {
                let about = format!("dense {}, {} heads", ms(dense), shape.num_heads);
                let unknown = without_times(g, g.lengths.len());
                let verdict =
                    verdict(g.mass, dense, &about, block_sparse.as_ref(), fine.as_ref(), !unknown.is_empty());
                let unknown = match unknown.is_empty() {
                    true => String::new(),
                    false => format!(
                        "; not measured here: {}; next: dsv-autotune bench --seqlen {seqlen} --head-dim {} --block {0}, then --record",
                        unknown.join(","),
                        g.head_dim
                    ),
                };
                format!("{seqlen} tokens: {verdict}{unknown}")
            }
            _ => format!("{seqlen} tokens: {}", not_measured(seqlen, g.head_dim, times)),
        };
        let num_heads = shape.map(|s| s.num_heads);
        g.lengths.push(AtLength { seqlen, num_heads, dense_us, block_sparse, fine, verdict });
    }
}

/// Of each size of lists the cube that covers the mass in the least time, at every length that has times; where none has, with
/// the least share.
fn picks(g: &Granularity) -> Vec<CubePick> {
    let timed: Vec<Option<usize>> =
        (0..g.lengths.len()).filter(|&at| g.lengths[at].num_heads.is_some()).map(Some).collect();
    let lengths = if timed.is_empty() { vec![None] } else { timed };
    let mut found = Vec::new();
    for own in g.of_contract().filter(|c| c.rule.is_none() && c.kv_block <= c.query_group) {
        for &at in &lengths {
            let of_size = |c: &&Cell| {
                (c.query_group, c.kv_block) == (own.query_group, own.kv_block) && c.rule.is_some()
            };
            // Of each rule that reaches the mass, and has a time where there are any.
            let reach = g.cells.iter().filter(of_size).filter_map(|c| {
                let i = c.enough(g.mass)?;
                let us = match at {
                    Some(at) => Some(c.top_k.us_at(at, i)?),
                    None => None,
                };
                Some((c.cube, Needs { kept: c.top_k.kept[i], us }))
            });
            let reach: Vec<(Cube, Needs)> = reach.collect();
            let cost = |needs: &Needs| needs.us.unwrap_or(needs.kept);
            // The contract's cube comes first, so it stays where another is no better.
            let least = |of: &mut dyn Iterator<Item = &(Cube, Needs)>| {
                of.min_by(|a, b| cost(&a.1).total_cmp(&cost(&b.1))).copied()
            };
            let Some((cube, needs)) = least(&mut reach.iter()) else { continue };
            found.push(CubePick {
                query_group: own.query_group,
                kv_block: own.kv_block,
                seqlen: at.map(|at| g.lengths[at].seqlen),
                cube,
                needs,
                contract_needs: least(&mut reach.iter().filter(|r| r.0 == own.cube)).map(|r| r.1),
            });
        }
    }
    found
}

/// The fastest lists in the contract's cubes that cover the mass.
fn fastest(g: &Granularity, at: usize, block_sparse: bool) -> Option<Chosen> {
    let mut best: Option<Chosen> = None;
    for cell in g.of_contract().filter(|c| is_block_sparse(c.query_group, c.kv_block) == block_sparse) {
        let Some(rule) = cell.rule else { continue };
        for (budget, curve, asked) in
            [(Budget::TopK, &cell.top_k, &g.shares), (Budget::TopP, &cell.top_p, &g.masses)]
        {
            for (i, &asked) in asked.iter().enumerate().filter(|(i, _)| curve.covered[*i] >= g.mass) {
                let Some(us) = curve.us_at(at, i).filter(|us| best.as_ref().is_none_or(|b| *us < b.us))
                else {
                    continue;
                };
                best = Some(Chosen {
                    query_group: cell.query_group,
                    kv_block: cell.kv_block,
                    rule,
                    budget,
                    asked,
                    kept: curve.kept[i],
                    covered: curve.covered[i],
                    us,
                    measured: curve.measured[at].contains(&i),
                });
            }
        }
    }
    best
}

/// Sizes that kernels serve, whose lists cover the mass with no more than [`SINGLE_PERCENTS`], and of which no time is known at a
/// length.
fn without_times(g: &Granularity, at: usize) -> Vec<String> {
    let shipped = space::SHIPPED_BLOCK_SIZES.into_iter().chain(space::SHIPPED_GATHER);
    let sizes = shipped.map(|(group, unit)| (usize::from(group), usize::from(unit)));
    let timed = |size| {
        let of_size = |c: &&Cell| (c.query_group, c.kv_block) == size && c.rule.is_some();
        let reach = |c: &&Cell| c.enough(g.mass).is_some_and(|i| i < SINGLE_PERCENTS as usize);
        let cells: Vec<&Cell> = g.of_contract().filter(of_size).collect();
        !cells.iter().any(reach)
            || cells.iter().any(|c| (0..g.shares.len()).any(|i| c.top_k.us_at(at, i).is_some()))
    };
    sizes.filter(|&size| !timed(size)).map(|(group, unit)| format!("{group}x{unit}")).collect()
}

fn not_measured(seqlen: usize, head_dim: usize, times: &Times) -> String {
    let lengths: Vec<String> = times.lengths(head_dim).iter().map(u32::to_string).collect();
    if times.sources.is_empty() {
        return "no times were given; next: --gpu h100, --table or --record".to_string();
    }
    if !space::SHIPPED_HEAD_DIMS.iter().any(|&d| usize::from(d) == head_dim) {
        return format!("no kernel serves head_dim {head_dim}, so nothing is measured");
    }
    let measure = format!("dsv-autotune bench --seqlen {seqlen} --head-dim {head_dim}, then --record");
    match lengths.is_empty() {
        true => format!("nothing was measured with head_dim {head_dim}; next: {measure}"),
        false => format!(
            "nothing was measured at this length with head_dim {head_dim}, but at {}; next: {measure}",
            lengths.join(", ")
        ),
    }
}

fn ms(us: f64) -> String {
    format!("{:.3} ms", us / 1e3)
}

/// What is fastest, in a line, and by how much.
fn verdict(
    mass: f64,
    dense_us: f64,
    about: &str,
    block_sparse: Option<&Chosen>,
    fine: Option<&Chosen>,
    unknown: bool,
) -> String {
    let percent = format!("{:.0} % of the mass", 100.0 * mass);
    let fastest = [fine, block_sparse].into_iter().flatten().min_by(|a, b| a.us.total_cmp(&b.us));
    let Some(fastest) = fastest else {
        let lists = format!("no lists with a measured time cover {percent} ({about})");
        return if unknown { format!("undecided: {lists}") } else { format!("dense wins: {lists}") };
    };
    if fastest.us >= dense_us {
        return format!(
            "dense wins: the fastest lists that cover {percent}, {fastest}, take longer ({about})"
        );
    }
    let against = match (block_sparse, fine) {
        (Some(blocks), _) if blocks != fastest => {
            let slower = if blocks.us < dense_us { "" } else { ", slower than dense" };
            format!(
                "{:.2} times as fast as the best block-sparse choice, {blocks}{slower}",
                blocks.us / fastest.us
            )
        }
        (None, _) => "no block-sparse choice with a measured time covers as much".to_string(),
        (_, Some(fine)) => {
            format!(
                "block-sparse itself, {:.2} times as fast as the best fine lists, {fine}",
                fine.us / fastest.us
            )
        }
        (_, None) => "block-sparse itself; no fine lists with a measured time cover as much".to_string(),
    };
    format!(
        "fastest at {percent}: {fastest}; {against}; {:.2} times as fast as dense ({about})",
        dense_us / fastest.us
    )
}

/// `x` to a place, so that files stay short.
fn rounded(x: f64, place: f64) -> f64 {
    (x * place).round() / place
}

impl std::fmt::Display for Chosen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Chosen { query_group, kv_block, rule, .. } = self;
        write!(f, "{query_group} x {kv_block} by {rule}, ")?;
        if self.budget == Budget::TopP {
            write!(f, "top_p {}, ", self.asked)?;
        }
        let (kept, covered) = (100.0 * self.kept, 100.0 * self.covered);
        let between = if self.measured { "" } else { " between measured shares" };
        write!(f, "{kept:.1} % kept ({covered:.1} % covered, {}{between})", ms(self.us))
    }
}

#[cfg(test)]
mod tests;
