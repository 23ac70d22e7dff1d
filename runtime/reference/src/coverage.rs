//! How much of the attention mass KV lists cover, whatever they are made of: cubes of any shape, query groups and KV units
//! of any size, chosen by predicted scores under any group rule, or by the true mass. Measured on queries and keys of one
//! attention layer, on sampled groups; and how far the queries of a group agree on their critical keys.
//!
//! Of a group g, with `p_i(j)` the softmax weight of its query i on key j, and lists that take KV units (`kv_block`
//! consecutive tokens in the order that the cube defines) by falling score:
//!
//! ```text
//! covered    mean over queries i of sum of p_i(j) over the keys j of the group's list
//! overlap    mean over ordered pairs of queries of the share of one's critical keys that are critical for the other
//! ```
//!
//! Logits are products in f32, everything after them is f64. Memory: the logits of one group a thread.

use crate::attention::{AttnError, AttnShape, View};
use crate::matrix::{Mat, MatMut, multiply};
use crate::profile::{critical_keys, group_overlap, ranked};
use crate::select::{speakers, unit_scores};
use dsv_spec::order::{Cube, Grid, invert_order, token_order};
use dsv_spec::{BlockScore, GroupRule};
use rayon::prelude::*;

/// Overlap within a cube that the paper chooses its cubes to stay above.
pub const PAPER_OVERLAP: f64 = 0.8;
/// Queries of a group whose critical keys are compared.
const COMPARED: usize = 8;

/// Why a measurement is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CoverageError {
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
    #[error("{name} has {value}\n  allowed: above 0, at most 1\n  next: pass shares, not percentages")]
    Share {
        /// Which.
        name: &'static str,
        /// The value found.
        value: f64,
    },
    /// Nothing to measure.
    #[error("{name} is 0, or has a 0\n  allowed: 1 or more\n  next: groups 2 and queries 64 are usual")]
    Empty {
        /// Which.
        name: &'static str,
    },
    /// A logit or a predicted score is not a number, or infinite.
    #[error(
        "{what} of head {head} of sequence {batch} are not finite\n  allowed: finite numbers\n  next: look for NaN in the \
         weights; dsv-train eval tells whether the loss is finite"
    )]
    NotFinite {
        /// Logits or scores.
        what: &'static str,
        /// Sequence.
        batch: usize,
        /// Query head.
        head: usize,
    },
}

/// Tokens in the order that a cube defines, in groups that list KV units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrangement {
    /// The cube whose tokens are contiguous.
    pub cube: Cube,
    /// Consecutive queries that share one list.
    pub query_group: usize,
    /// Consecutive keys of a KV unit, one measurement each.
    pub kv_blocks: Vec<usize>,
}

/// Low-rank queries and keys of the same tokens and heads, [B, S, H, rank]; their products stand for logits.
#[derive(Clone, Copy, Debug)]
pub struct Predicted<'a> {
    /// Columns.
    pub rank: usize,
    /// Queries.
    pub q: View<'a, f32>,
    /// Keys.
    pub k: View<'a, f32>,
}

/// What is asked of every arrangement.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The grid of the tokens.
    pub grid: Grid,
    /// Raster index of each token of q and k as they stand ([`token_order`] of the run).
    pub order: Vec<u32>,
    /// Share of a query's mass whose smallest set of keys is critical (0.9 in the paper).
    pub theta: f64,
    /// Group rules by which predicted scores choose; without them nothing predicted is looked at.
    pub rules: Vec<GroupRule>,
    /// Shares of the KV units that every list keeps (`top_k`), rounded up to whole units.
    pub shares: Vec<f64>,
    /// Shares of a group's predicted mass that its list holds, with as few units as that takes (`top_p`).
    pub masses: Vec<f64>,
    /// Groups measured in each head and sequence, spread evenly; all, where there are fewer.
    pub groups: usize,
    /// Queries of each whose mass is measured, spread evenly; all, where there are fewer. Fewer than all flatter
    /// [`Choice::Best`], which then serves those alone.
    pub queries: usize,
}

/// What chooses a group's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The true mass of the group's queries: no list of as many units covers more.
    Best,
    /// Predicted scores: a unit's largest, or for `mass4` its mass.
    Predicted(GroupRule),
}

/// Means over lists of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lists {
    /// Share of the KV units kept.
    pub kept: f64,
    /// Mass covered.
    pub covered: f64,
}

/// One KV unit and choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Coverage {
    /// Tokens of a unit.
    pub kv_block: usize,
    /// What chose.
    pub choice: Choice,
    /// For each of [`Question::shares`].
    pub by_share: Vec<Lists>,
    /// For each of [`Question::masses`].
    pub by_mass: Vec<Lists>,
}

/// One arrangement: means over the measured groups of all heads and sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Groups measured.
    pub groups: usize,
    /// Overlap of critical keys; 1 for groups of one query.
    pub overlap: f64,
    /// Share of the keys that is not critical.
    pub sparsity: f64,
    /// Units by size, of each the best choice, then the rules as they were asked for.
    pub coverage: Vec<Coverage>,
}

impl Report {
    /// The mean of reports of one arrangement and question, each counting as many times as it has groups.
    ///
    /// # Panics
    /// If there is none, or they answer different questions.
    pub fn mean(reports: &[Report]) -> Report {
        let groups: usize = reports.iter().map(|r| r.groups).sum();
        let of = |value: &dyn Fn(&Report) -> f64| {
            reports.iter().map(|r| r.groups as f64 * value(r)).sum::<f64>() / groups.max(1) as f64
        };
        let lists = |pick: &dyn Fn(&Report) -> Lists| Lists {
            kept: of(&|r| pick(r).kept),
            covered: of(&|r| pick(r).covered),
        };
        let first = &reports[0];
        Report {
            groups,
            overlap: of(&|r| r.overlap),
            sparsity: of(&|r| r.sparsity),
            coverage: first
                .coverage
                .iter()
                .enumerate()
                .map(|(at, c)| {
                    let by_share = (0..c.by_share.len()).map(|i| lists(&|r| r.coverage[at].by_share[i]));
                    let by_mass = (0..c.by_mass.len()).map(|i| lists(&|r| r.coverage[at].by_mass[i]));
                    Coverage { by_share: by_share.collect(), by_mass: by_mass.collect(), ..*c }
                })
                .collect(),
        }
    }
}

/// Measures arrangements on q and k [B, S, H, D] (k may have fewer heads). Cost, for each head and measured group: a product of
/// its queries with all keys, and a sort of the units for each choice and size.
///
/// # Errors
/// [`CoverageError`]: the first thing that does not fit.
///
/// # Panics
/// If there are rules to choose by and nothing predicted.
pub fn measure(
    shape: &AttnShape,
    q: &View<'_, f32>,
    k: &View<'_, f32>,
    predicted: Option<&Predicted<'_>>,
    question: &Question,
    arrangements: &[Arrangement],
) -> Result<Vec<Report>, CoverageError> {
    check(shape, q, k, predicted, question, arrangements)?;
    let inverse = invert_order(&question.order);
    let layer = Layer { shape, q, k, predicted, question };
    arrangements
        .iter()
        .map(|arrangement| {
            let tokens: Vec<usize> = token_order(question.grid, arrangement.cube)
                .iter()
                .map(|&raster| inverse[raster as usize] as usize)
                .collect();
            let groups = tokens.len().div_ceil(arrangement.query_group);
            let each = question.groups.min(groups);
            let parts = (0..shape.batch * shape.num_heads * each)
                .into_par_iter()
                .map(|at| {
                    let (batch, head) = (at / each / shape.num_heads, at / each % shape.num_heads);
                    // Heads look at different places of each of the equal ranges.
                    let place = (at % each) * 2 * shape.num_heads + 2 * head + 1;
                    let group = place * groups / (2 * shape.num_heads * each);
                    layer.group(arrangement, &tokens, (batch, head), group)
                })
                .collect::<Result<Vec<Report>, _>>()?;
            Ok(Report::mean(&parts))
        })
        .collect()
}

fn check(
    shape: &AttnShape,
    q: &View<'_, f32>,
    k: &View<'_, f32>,
    predicted: Option<&Predicted<'_>>,
    question: &Question,
    arrangements: &[Arrangement],
) -> Result<(), CoverageError> {
    shape.validate()?;
    q.check("q", shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim)?;
    k.check("k", shape.batch, shape.seqlen_kv, shape.num_kv_heads, shape.head_dim)?;
    if let Some(p) = predicted {
        p.q.check("q_lr", shape.batch, shape.seqlen_q, shape.num_heads, p.rank)?;
        p.k.check("k_lr", shape.batch, shape.seqlen_kv, shape.num_heads, p.rank)?;
    }
    let (grid, tokens) = (question.grid, question.grid.tokens());
    if shape.seqlen_q != tokens || shape.seqlen_kv != tokens || question.order.len() != tokens {
        return Err(CoverageError::Grid { grid, seqlen_q: shape.seqlen_q, seqlen_kv: shape.seqlen_kv });
    }
    let mut seen = vec![false; tokens];
    for &token in &question.order {
        match seen.get_mut(token as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(CoverageError::Order { token }),
        }
    }
    let shares = |name, values: &[f64]| match values.iter().find(|v| !(**v > 0.0 && **v <= 1.0)) {
        Some(&value) => Err(CoverageError::Share { name, value }),
        None => Ok(()),
    };
    shares("theta", &[question.theta])?;
    shares("shares", &question.shares)?;
    shares("masses", &question.masses)?;
    let units = arrangements.iter().flat_map(|a| &a.kv_blocks).copied().min().unwrap_or(1);
    let group = arrangements.iter().map(|a| a.query_group).min().unwrap_or(1);
    let sizes = [
        ("groups", question.groups),
        ("queries", question.queries),
        ("kv_blocks", units),
        ("query_group", group),
    ];
    match sizes.into_iter().find(|s| s.1 == 0) {
        Some((name, _)) => Err(CoverageError::Empty { name }),
        None => Ok(()),
    }
}

struct Layer<'a> {
    shape: &'a AttnShape,
    q: &'a View<'a, f32>,
    k: &'a View<'a, f32>,
    predicted: Option<&'a Predicted<'a>>,
    question: &'a Question,
}

impl Layer<'_> {
    /// One group of one head; `tokens[i]` is where the i-th token of the arrangement stands in q and k.
    fn group(
        &self,
        arrangement: &Arrangement,
        tokens: &[usize],
        (batch, head): (usize, usize),
        group: usize,
    ) -> Result<Report, CoverageError> {
        let question = self.question;
        let start = group * arrangement.query_group;
        let members = &tokens[start..tokens.len().min(start + arrangement.query_group)];
        let sampled: Vec<usize> = spread(members.len(), question.queries).map(|i| members[i]).collect();
        let not_finite = |what| CoverageError::NotFinite { what, batch, head };
        let rows = self.weights(batch, head, &sampled).ok_or_else(|| not_finite("logits"))?;
        let critical: Vec<Vec<usize>> = spread(rows.len(), COMPARED)
            .map(|i| {
                let row: Vec<f64> = rows[i].iter().map(|&p| p.into()).collect();
                critical_keys(&row, question.theta)
            })
            .collect();
        let critical_share =
            critical.iter().map(Vec::len).sum::<usize>() as f64 / (critical.len() * tokens.len()) as f64;
        let mut of_keys = vec![0.0f64; tokens.len()];
        for row in &rows {
            of_keys.iter_mut().zip(row).for_each(|(sum, &p)| *sum += f64::from(p));
        }
        let each = 1.0 / rows.len() as f64;
        drop(rows);
        let mass: Vec<f64> = tokens.iter().map(|&token| each * of_keys[token]).collect();
        let mut products = Vec::new();
        for &rule in &question.rules {
            products.push(self.products(rule, batch, head, members, tokens));
        }
        let mut coverage = Vec::new();
        for &kv_block in &arrangement.kv_blocks {
            let units: Vec<f64> = mass.chunks(kv_block).map(|unit| unit.iter().sum()).collect();
            let mut add = |choice, (by_share, by_mass)| {
                coverage.push(Coverage { kv_block, choice, by_share, by_mass });
            };
            add(Choice::Best, lists(&units, &units, question));
            for (&rule, products) in question.rules.iter().zip(&products) {
                let scores = unit_scores(products, kv_block, rule, BlockScore::Max, 1.0);
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                if scores.iter().any(|s| !s.is_finite()) {
                    return Err(not_finite("predicted scores"));
                }
                let predicted: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                add(Choice::Predicted(rule), lists(&predicted, &units, question));
            }
        }
        Ok(Report {
            groups: 1,
            overlap: group_overlap(&critical).unwrap_or(1.0),
            sparsity: 1.0 - critical_share,
            coverage,
        })
    }

    /// Softmax weights of these queries over all keys as they stand; `None` where one is not finite.
    fn weights(&self, batch: usize, head: usize, queries: &[usize]) -> Option<Vec<Vec<f32>>> {
        let AttnShape { seqlen_kv, head_dim, scale, .. } = *self.shape;
        let queries: Vec<f32> =
            queries.iter().flat_map(|&i| self.q.row(batch, i, head, head_dim)).copied().collect();
        let count = queries.len() / head_dim;
        let mut logits = vec![0.0f32; count * seqlen_kv];
        let keys =
            Mat::new(self.k.from(batch, 0, self.shape.kv_head(head)), seqlen_kv, head_dim, self.k.layout.seq);
        let queries = Mat::packed(&queries, count, head_dim);
        multiply(MatMut::packed(&mut logits, count, seqlen_kv), scale as f32, queries, keys.t());
        logits
            .chunks_exact(seqlen_kv)
            .map(|row| {
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let row: Vec<f32> = row.iter().map(|x| (x - largest).exp()).collect();
                let sum: f64 = row.iter().map(|&p| f64::from(p)).sum();
                sum.is_finite().then(|| row.into_iter().map(|p| (f64::from(p) / sum) as f32).collect())
            })
            .collect()
    }

    /// Products of the rule's low-rank queries with the keys, in the arrangement's order.
    fn products(
        &self,
        rule: GroupRule,
        batch: usize,
        head: usize,
        members: &[usize],
        tokens: &[usize],
    ) -> Vec<Vec<f64>> {
        let Predicted { rank, q, k } = self.predicted.expect("rules choose by predicted queries and keys");
        let row = |token: usize| q.row(batch, token, head, *rank);
        let queries: Vec<f32> = match rule {
            GroupRule::Mean => {
                let mut mean = vec![0.0f32; *rank];
                for &token in members {
                    mean.iter_mut().zip(row(token)).for_each(|(sum, x)| *sum += x);
                }
                mean.into_iter().map(|sum| sum / members.len() as f32).collect()
            }
            rule => speakers(rule, members.len()).iter().flat_map(|&i| row(members[i])).copied().collect(),
        };
        let (count, keys) = (queries.len() / rank, tokens.len());
        let mut products = vec![0.0f32; count * keys];
        let k = Mat::new(k.from(batch, 0, head), keys, *rank, k.layout.seq);
        multiply(MatMut::packed(&mut products, count, keys), 1.0, Mat::packed(&queries, count, *rank), k.t());
        products
            .chunks_exact(keys)
            .map(|row| tokens.iter().map(|&token| f64::from(row[token])).collect())
            .collect()
    }
}

/// `count` of 0..len, evenly spread; all, where there are fewer.
fn spread(len: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(len);
    (0..count).map(move |i| (2 * i + 1) * len / (2 * count))
}

/// What lists of the asked shares and masses hold: units by falling `predicted` mass, ties to the smaller number, of which
/// each holds `mass`.
fn lists(predicted: &[f64], mass: &[f64], question: &Question) -> (Vec<Lists>, Vec<Lists>) {
    let order = ranked(predicted);
    // Sums of the first k: predicted, and true.
    let sums = |of: &[f64]| -> Vec<f64> {
        let mut sum = 0.0;
        let rest = order.iter().map(|&unit| {
            sum += of[unit];
            sum
        });
        std::iter::once(0.0).chain(rest).collect()
    };
    let (held, covered) = (sums(predicted), sums(mass));
    let units = mass.len();
    let of = |count: usize| Lists { kept: count as f64 / units as f64, covered: covered[count] };
    let share = |&share: &f64| of(((share * units as f64 - 1e-9).ceil() as usize).clamp(1, units));
    let holding = |&mass: &f64| match mass < 1.0 {
        true => of(held.partition_point(|&sum| sum < mass * held[units]).min(units)),
        false => of(units),
    };
    (question.shares.iter().map(share).collect(), question.masses.iter().map(holding).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lists::{KvListsBuf, ListDims};
    use crate::profile::{profile_rows, softmax_row};
    use crate::rng::SplitMix64;
    use crate::select::{scores_f64, top_k, top_p};

    const GRID: Grid = Grid { t: 8, h: 8, w: 8 };
    const CUBE64: Cube = Cube { t: 4, h: 4, w: 4 };

    fn question(order: Vec<u32>) -> Question {
        Question {
            grid: GRID,
            order,
            theta: 0.9,
            rules: Vec::new(),
            shares: vec![0.0625, 0.125, 0.25],
            masses: vec![0.5, 0.95],
            groups: 2,
            queries: 64,
        }
    }

    fn arrangement(cube: Cube, query_group: usize, kv_blocks: &[usize]) -> Arrangement {
        Arrangement { cube, query_group, kv_blocks: kv_blocks.to_vec() }
    }

    fn raster() -> Vec<u32> {
        (0..512).collect()
    }

    /// Rows [512, columns] of tokens in raster order, as a run with `order` has them.
    fn reordered(x: &[f32], order: &[u32]) -> Vec<f32> {
        let columns = x.len() / 512;
        order.iter().flat_map(|&token| &x[token as usize * columns..][..columns]).copied().collect()
    }

    /// Queries that see exactly the tokens of their own cube of `side`, in raster order.
    fn of_own_cube(side: Cube) -> Vec<f32> {
        let columns = (8 / side.t * (8 / side.h) * (8 / side.w)) as usize;
        let mut x = vec![0.0f32; 512 * columns];
        for (token, row) in x.chunks_exact_mut(columns).enumerate() {
            let (t, h, w) = GRID.coordinates(token as u32);
            let cube = (t / side.t * (8 / side.h) + h / side.h) * (8 / side.w) + w / side.w;
            row[cube as usize] = 8.0;
        }
        x
    }

    #[test]
    fn a_cube_that_attends_to_itself_agrees_and_is_covered_by_itself() {
        let flat = Cube { t: 2, h: 4, w: 8 };
        let arrangements = [arrangement(CUBE64, 64, &[1, 8, 64]), arrangement(flat, 64, &[8])];
        for order in [raster(), token_order(GRID, flat)] {
            let x = reordered(&of_own_cube(CUBE64), &order);
            let shape = AttnShape::new(1, 512, 1, 8).with_scale(1.0);
            let view = View::new(&x[..], shape.q_layout());
            // The predictor sees what attention sees, halved: the order of its scores is the true one.
            let half: Vec<f32> = x.iter().map(|v| v / 2.0).collect();
            let predicted =
                Predicted { rank: 8, q: View::new(&half, view.layout), k: View::new(&half, view.layout) };
            let asked = Question { rules: GroupRule::ALL.to_vec(), ..question(order) };
            let found = measure(&shape, &view, &view, Some(&predicted), &asked, &arrangements).unwrap();
            let own = &found[0];
            // 58 of its 64 keys hold 90 %, the same for every query: ties go to the smaller index.
            assert_eq!((own.groups, own.overlap), (2, 1.0));
            assert!((own.sparsity - (1.0 - 58.0 / 512.0)).abs() < 1e-12, "{own:?}");
            assert_eq!(own.coverage.len(), 3 * 5);
            for c in &own.coverage {
                // The cube is an eighth of the keys: half of it, all of it, and more.
                let half = if c.kv_block == 64 { 1.0 } else { 0.5 };
                let covered: Vec<f64> = c.by_share.iter().map(|l| l.covered).collect();
                for (covered, wanted) in covered.iter().zip([half, 1.0, 1.0]) {
                    assert!((covered - wanted).abs() < 1e-5, "{c:?}");
                }
                // Sixteenths of the cube, all that hold any mass, or fewer units that hold enough.
                let units = 64.0 / c.kv_block as f64;
                let kept = (0.95 * units).ceil() * c.kv_block as f64 / 512.0;
                assert!((c.by_mass[1].kept - kept).abs() < 1e-12, "{c:?}");
                assert!(c.by_mass[1].covered >= 0.95 - 1e-5);
            }
            // A 2x4x8 cube lies in two of them: half its queries, each with its mass in one.
            let flat = &found[1];
            let overlap = (2.0 * 4.0 * 3.0) / (8.0 * 7.0);
            assert!((flat.overlap - overlap).abs() < 1e-12, "{}", flat.overlap);
            let by = |choice| flat.coverage.iter().find(|c| c.choice == choice).unwrap();
            let centre = by(Choice::Predicted(GroupRule::Centre));
            assert!((centre.by_share[1].covered - 0.5).abs() < 1e-5, "it speaks for its own half");
            assert!((by(Choice::Best).by_share[2].covered - 1.0).abs() < 1e-5);
            let max4 = by(Choice::Predicted(GroupRule::Max4));
            assert!((max4.by_share[2].covered - 1.0).abs() < 1e-5, "four queries speak for both");
        }
    }

    #[test]
    fn lists_of_the_definitions_cover_the_same() {
        // Everything anew in f64: tokens put into the arrangement's order, scores and lists as the selection is defined,
        // mass by a full softmax of every query.
        let mut rng = SplitMix64::new(3);
        let order = token_order(GRID, Cube { t: 2, h: 2, w: 2 });
        let (heads, dim, rank) = (2, 16, 4);
        let shape = AttnShape::new(1, 512, heads, dim);
        let [q, k] = [0; 2].map(|_| reordered(&rng.normals(shape.q_len(), 1.6), &order));
        let [q_lr, k_lr] = [0; 2].map(|_| reordered(&rng.normals(512 * heads * rank, 1.2), &order));
        let wide = (View::new(&q[..], shape.q_layout()), View::new(&k[..], shape.q_layout()));
        let narrow = crate::attention::Layout::bshd(512, heads, rank);
        let predicted = Predicted { rank, q: View::new(&q_lr, narrow), k: View::new(&k_lr, narrow) };
        let asked = Question {
            rules: GroupRule::ALL.to_vec(),
            groups: usize::MAX,
            queries: usize::MAX,
            shares: vec![0.05, 0.3],
            masses: vec![0.6, 1.0],
            ..question(order.clone())
        };
        let arrangements = [
            arrangement(CUBE64, 64, &[1, 8, 64]),
            arrangement(Cube { t: 4, h: 4, w: 8 }, 64, &[128]),
            arrangement(CUBE64, 48, &[16]),
        ];
        let found = measure(&shape, &wide.0, &wide.1, Some(&predicted), &asked, &arrangements).unwrap();
        let inverse = invert_order(&order);
        for (a, report) in arrangements.iter().zip(&found) {
            let groups = 512usize.div_ceil(a.query_group);
            assert_eq!(report.groups, heads * groups);
            let places: Vec<usize> =
                token_order(GRID, a.cube).iter().map(|&r| inverse[r as usize] as usize).collect();
            let sorted = |x: &[f32]| -> Vec<f32> {
                let columns = x.len() / 512;
                places.iter().flat_map(|&i| &x[i * columns..][..columns]).copied().collect()
            };
            let [q, k, q_lr, k_lr] = [&q, &k, &q_lr, &k_lr].map(|x| sorted(x));
            let (q, k) = (View::new(&q[..], shape.q_layout()), View::new(&k[..], shape.q_layout()));
            let (q_lr, k_lr) = (View::new(&q_lr[..], narrow), View::new(&k_lr[..], narrow));
            for c in &report.coverage {
                let dims = ListDims {
                    batch: 1,
                    num_heads: heads,
                    seqlen_q: 512,
                    seqlen_kv: 512,
                    query_group: a.query_group,
                    kv_block: c.kv_block,
                    max_selected: 512usize.div_ceil(c.kv_block),
                };
                let scores: Vec<f64> = match c.choice {
                    Choice::Predicted(rule) => scores_f64(&dims, rank, &q_lr, &k_lr, rule, None).unwrap(),
                    Choice::Best => (0..heads * groups)
                        .into_par_iter()
                        .flat_map_iter(|list| {
                            let mut mass = vec![0.0; dims.blocks()];
                            for row in dims.group_rows(list % groups) {
                                let weights = softmax_row(&shape, &q, &k, 0, list / groups, row);
                                let units = weights.chunks(c.kv_block).map(|unit| unit.iter().sum::<f64>());
                                mass.iter_mut().zip(units).for_each(|(sum, unit)| *sum += unit);
                            }
                            // Proportional to the mass, and as a logit.
                            mass.into_iter().map(f64::ln)
                        })
                        .collect(),
                };
                let check = |lists: KvListsBuf, found: Lists, what: f64| {
                    let rows: Vec<usize> = (0..512).collect();
                    let profile = profile_rows(&shape, &q, &k, &rows, 0.9, Some(&lists.view())).unwrap();
                    // The mean over groups of the mean over their queries.
                    let mut of_groups = vec![(0.0, 0.0); heads * groups];
                    for row in profile {
                        let group = &mut of_groups[row.head * groups + row.row / a.query_group];
                        *group = (group.0 + row.covered_mass.unwrap(), group.1 + 1.0);
                    }
                    let covered =
                        of_groups.iter().map(|(sum, n)| sum / n).sum::<f64>() / (heads * groups) as f64;
                    let kept = lists.count.iter().map(|&n| f64::from(n)).sum::<f64>()
                        / (lists.count.len() * dims.blocks()) as f64;
                    let name = (a, c.kv_block, c.choice, what);
                    assert!((found.covered - covered).abs() < 1e-5, "{name:?}: {found:?}, not {covered}");
                    assert!((found.kept - kept).abs() < 1e-3, "{name:?}: {found:?}, not {kept}");
                };
                for (&share, &found) in asked.shares.iter().zip(&c.by_share) {
                    let count = (share * dims.blocks() as f64).ceil() as i32;
                    check(top_k(&dims, &scores, &vec![count; heads]).unwrap(), found, share);
                }
                for (&mass, &found) in asked.masses.iter().zip(&c.by_mass) {
                    check(top_p(&dims, &scores, &vec![mass as f32; heads], 1.0).unwrap().lists, found, mass);
                }
            }
        }
        // Predictions of noise cover what chance covers; the best lists cover more, finer ones most.
        let best = |unit: usize| found[0].coverage[unit * 5].by_share[1].covered;
        assert!(best(0) > best(1) && best(1) > best(2) && best(2) > 0.35, "{found:?}");
        assert!((found[0].coverage[1].by_share[1].covered - 0.3).abs() < 0.05, "{found:?}");
    }

    #[test]
    fn sampled_groups_stand_for_all() {
        let mut rng = SplitMix64::new(5);
        let shape = AttnShape::new(2, 512, 4, 16).with_kv_heads(2);
        let (q, k) = (rng.normals(shape.q_len(), 2.0), rng.normals(shape.kv_len(), 2.0));
        let (q, k) = (View::new(&q[..], shape.q_layout()), View::new(&k[..], shape.kv_layout()));
        let ask = |groups, queries| {
            let question = Question { groups, queries, ..question(raster()) };
            measure(&shape, &q, &k, None, &question, &[arrangement(CUBE64, 64, &[8])]).unwrap().remove(0)
        };
        let (all, some) = (ask(8, 64), ask(2, 64));
        assert_eq!((all.groups, some.groups, ask(99, 64)), (2 * 4 * 8, 2 * 4 * 2, all.clone()));
        let of = |r: &Report| r.coverage[0].by_share[2].covered;
        assert!((of(&all) - of(&some)).abs() < 0.02 && of(&all) != of(&some), "{all:?} {some:?}");
        assert!(of(&ask(8, 4)) > of(&all) + 0.02, "the best lists of four queries serve those");
        assert!(all.overlap > 0.0 && all.overlap < 0.5, "random queries agree by chance: {all:?}");
    }

    #[test]
    fn means_count_groups() {
        let lists = |kept, covered| Lists { kept, covered };
        let report = |groups, x: f64| Report {
            groups,
            overlap: x,
            sparsity: 0.5,
            coverage: vec![Coverage {
                kv_block: 8,
                choice: Choice::Best,
                by_share: vec![lists(0.1, x)],
                by_mass: vec![lists(x, 0.9)],
            }],
        };
        let mean = Report::mean(&[report(1, 0.5), report(3, 0.9)]);
        assert_eq!((mean.groups, mean.sparsity), (4, 0.5));
        assert!((mean.overlap - 0.8).abs() < 1e-12);
        let c = &mean.coverage[0];
        assert!((c.by_share[0].covered - 0.8).abs() < 1e-12 && (c.by_mass[0].kept - 0.8).abs() < 1e-12);
    }

    #[test]
    fn faults_are_named() {
        let shape = AttnShape::new(1, 512, 1, 1);
        let x = vec![0.0f32; 512];
        let view = View::new(&x[..], shape.q_layout());
        let one = [arrangement(CUBE64, 64, &[1])];
        let ask = |question: &Question| measure(&shape, &view, &view, None, question, &one).unwrap_err();
        let good = question(raster());
        let twice = Question { order: vec![0; 512], ..good.clone() };
        assert_eq!(ask(&twice), CoverageError::Order { token: 0 });
        let outside = Question { order: (1..513).collect(), ..good.clone() };
        assert_eq!(ask(&outside), CoverageError::Order { token: 512 });
        let other = Question { grid: Grid { t: 8, h: 8, w: 9 }, ..good.clone() };
        assert!(matches!(ask(&other), CoverageError::Grid { seqlen_q: 512, .. }));
        for (name, question) in [
            ("theta", Question { theta: 0.0, ..good.clone() }),
            ("shares", Question { shares: vec![0.5, 1.5], ..good.clone() }),
            ("masses", Question { masses: vec![f64::NAN], ..good.clone() }),
        ] {
            assert!(matches!(ask(&question), CoverageError::Share { name: found, .. } if found == name));
        }
        assert_eq!(ask(&Question { groups: 0, ..good.clone() }), CoverageError::Empty { name: "groups" });
        assert_eq!(ask(&Question { queries: 0, ..good.clone() }), CoverageError::Empty { name: "queries" });
        let none = [arrangement(CUBE64, 64, &[1, 0])];
        let error = measure(&shape, &view, &view, None, &good, &none).unwrap_err();
        assert_eq!(error, CoverageError::Empty { name: "kv_blocks" });
        let mut nan = x.clone();
        nan[77] = f32::NAN;
        let k = View::new(&nan[..], shape.kv_layout());
        let what = "logits";
        let error = measure(&shape, &view, &k, None, &good, &one).unwrap_err();
        assert_eq!(error, CoverageError::NotFinite { what, batch: 0, head: 0 });
        let predicted = Predicted { rank: 1, q: view, k };
        let question = Question { rules: vec![GroupRule::Centre], ..good };
        let error = measure(&shape, &view, &view, Some(&predicted), &question, &one).unwrap_err();
        let what = "predicted scores";
        assert_eq!(error, CoverageError::NotFinite { what, batch: 0, head: 0 });
    }
}
