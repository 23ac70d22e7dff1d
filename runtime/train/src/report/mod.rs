//! One self-contained HTML file about one run, or several compared: loss, validation, predictors, sparsity,
//! dispatch, speed, facts, configuration and samples. No script, no font, nothing fetched.

pub(crate) mod plot;

use crate::durable::{RealDisk, write_file};
use crate::engine::Transfers;
use crate::granularity::{self, COVERED, ChosenCube, Granularity};
use crate::metrics::{self, EvalTriple, MetricsError, Record, StepMetrics};
use crate::observe::{BlockObservation, CUBES, EDGES, Ladder, SHARES};
use crate::stage::LOSS_CRITERION;
use plot::{Chart, Line};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Samples shown of a run, newest last.
const MAX_GIFS: usize = 4;
/// Largest sample embedded.
const MAX_GIF_BYTES: u64 = 8 << 20;
/// Columns of a heat map over time.
const MAX_COLUMNS: usize = 96;
/// Rows of a heat map by block and head; beyond, blocks only.
const MAX_ROWS: usize = 64;

/// What a report knows of one run.
#[derive(Clone, Debug, Default)]
pub struct RunData {
    /// Name in legends.
    pub title: String,
    /// The run as TOML, empty if unknown.
    pub config: String,
    /// Facts the run told of itself.
    pub facts: BTreeMap<String, String>,
    /// Steps, by step.
    pub steps: BTreeMap<u64, StepMetrics>,
    /// Changes of stage: step, stage, reason.
    pub stages: Vec<(u64, u32, String)>,
    /// Choices of a cube of tokens: step and choice.
    pub cubes: Vec<(u64, ChosenCube)>,
    /// Profiles, by step.
    pub profiles: BTreeMap<u64, Profile>,
    /// Decisions, by the first step they hold for.
    pub dispatches: BTreeMap<u64, Dispatch>,
    /// Copies between device and host: last step they are of -> steps, sums.
    pub transfers: BTreeMap<u64, (u64, Transfers)>,
    /// Validations: steps done -> mean and triples.
    pub evals: BTreeMap<u64, (f64, Vec<EvalTriple>)>,
    /// The attention of every block at the end.
    pub observed: Vec<BlockObservation>,
    /// What lists of every granularity cover and cost, where that was measured.
    pub granularity: Option<Granularity>,
    /// Notes.
    pub notes: Vec<(u64, String)>,
    /// GIF files.
    pub samples: Vec<PathBuf>,
}

/// What the profiler saw at one step, each `[layers][heads]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// Share of KV that is not critical.
    pub sparsity: Vec<Vec<f64>>,
    /// Attention mass that the predicted lists cover.
    pub covered: Vec<Vec<f64>>,
    /// Share of the critical KV that the predicted lists hold; empty in runs that recorded none.
    pub recall: Vec<Vec<f64>>,
}

/// One decision of the dispatcher, for each block.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dispatch {
    /// Sparse or dense.
    pub sparse: Vec<bool>,
    /// Share of KV its lists skip.
    pub skipped: Vec<f64>,
    /// KV blocks that each of its heads keeps; nothing for windows and in runs that recorded none.
    pub top_k: Vec<Vec<i32>>,
    /// Why.
    pub why: Vec<String>,
}

impl RunData {
    /// Reads a run's folder: `metrics.jsonl`, what `dsv-train granularity` measured, and the GIFs in it and in `samples/`.
    pub fn load(dir: &Path) -> Result<RunData, MetricsError> {
        let mut run = RunData::from_records(metrics::read(&dir.join(metrics::FILE))?);
        if run.title.is_empty() {
            run.title = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        }
        run.granularity = Granularity::load(dir)?;
        for folder in [dir.to_path_buf(), dir.join("samples")] {
            let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
            run.samples.extend(files.filter(|p| p.extension().is_some_and(|e| e == "gif")));
        }
        run.samples.sort();
        Ok(run)
    }

    /// From records; of two for the same step the later counts.
    pub fn from_records(records: Vec<Record>) -> RunData {
        let mut run = RunData::default();
        for record in records {
            match record {
                Record::Run { title, config, facts, .. } => {
                    run.title = title;
                    run.config = config;
                    run.facts.extend(facts);
                }
                Record::Step(s) => {
                    run.steps.insert(s.step, s);
                }
                Record::Stage { step, stage, reason } => run.stages.push((step, stage, reason)),
                Record::Cube { step, choice } => run.cubes.push((step, choice)),
                Record::Profile { step, sparsity, covered, recall } => {
                    run.profiles.insert(step, Profile { sparsity, covered, recall });
                }
                Record::Dispatch { step, sparse, skipped, top_k, why } => {
                    run.dispatches.insert(step, Dispatch { sparse, skipped, top_k, why });
                }
                Record::Eval { step, loss, triples } => {
                    run.evals.insert(step, (loss, triples));
                }
                Record::Transfers { step, steps, moved } => {
                    run.transfers.insert(step, (steps, moved));
                }
                Record::Observed { blocks, .. } => run.observed = blocks,
                Record::Note { step, text } => run.notes.push((step, text)),
            }
        }
        run
    }

    /// Median tokens a second of the steps of a stage, the first of which (warm-up) does not count.
    fn speed(&self, stage: u32) -> Option<f64> {
        let mut v: Vec<f64> =
            self.steps.values().filter(|s| s.stage == stage).skip(1).map(|s| s.tokens_per_s).collect();
        v.sort_by(f64::total_cmp);
        (!v.is_empty()).then(|| v[v.len() / 2])
    }

    /// What a step copied between device and host, and how much of that ran beside its ops.
    fn copies(&self) -> Option<String> {
        let steps = self.transfers.values().map(|(steps, _)| steps).sum::<u64>() as f64;
        let sum =
            |of: fn(&Transfers) -> f64| self.transfers.values().map(|(_, moved)| of(moved)).sum::<f64>();
        let (copied, waited) = (sum(|m| m.copy_ms), sum(|m| m.waited_ms));
        let beside = Transfers { copy_ms: copied, waited_ms: waited, ..Transfers::default() }.overlap()?;
        Some(format!(
            "{:.3} GB to the host, {:.3} GB back, {:.1} ms of copies, {:.1} ms waited for: {:.0} % beside compute",
            sum(|m| m.to_host_bytes as f64) / steps / 1e9,
            sum(|m| m.to_device_bytes as f64) / steps / 1e9,
            copied / steps,
            waited / steps,
            100.0 * beside
        ))
    }

    /// Mean loss over the last tenth of the steps.
    fn final_loss(&self) -> Option<f64> {
        let n = self.steps.len();
        let last: Vec<f64> = self.steps.values().skip(n - n.div_ceil(10)).map(|s| s.loss).collect();
        (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64)
    }
}

/// Writes a report of one run or more to `path`, atomically.
///
/// # Errors
/// The disk's.
pub fn write(path: &Path, runs: &[RunData]) -> io::Result<()> {
    let page = page(runs);
    write_file(&RealDisk, path, |out| out.write_all(page.as_bytes()))
}

/// Text as HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn mean(rows: &[Vec<f64>]) -> f64 {
    let n = rows.iter().map(Vec::len).sum::<usize>();
    rows.iter().flatten().sum::<f64>() / n as f64
}

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1d2330;--soft:#5c6675;--paper:#fff;--line:#d9dee7;--card:#f6f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ef;--soft:#9aa5b5;--paper:#14171d;--line:#323946;--card:#1c2129}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:820px;padding:28px 20px 60px;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:34px 0 6px}
p{margin:4px 0 10px;color:var(--soft)}
svg{width:100%;height:auto;display:block}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600}td.n,th.n{text-align:right}
.wide{overflow-x:auto}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft);margin:6px 0 0 64px}
.legend i{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle}
.ramp{display:flex;align-items:center;gap:8px;font-size:13px;color:var(--soft);margin:6px 0}
.ramp b{display:inline-block;width:160px;height:10px;border-radius:3px}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:12px;overflow-x:auto;font-size:12.5px}
details{margin:8px 0}summary{cursor:pointer}
.gifs{display:flex;flex-wrap:wrap;gap:14px}.gifs figure{margin:0}.gifs img{display:block;min-width:160px;image-rendering:pixelated;border-radius:6px}
figcaption{font-size:13px;color:var(--soft)}
";

fn page(runs: &[RunData]) -> String {
    let mut body = String::new();
    let title = match runs {
        [one] => one.title.clone(),
        _ => runs.iter().map(|r| r.title.as_str()).collect::<Vec<_>>().join(" against "),
    };
    let _ = write!(body, "<h1>{}</h1>", escape(&title));
    facts(&mut body, runs);
    let name = |run: &RunData, what: &str| match (runs.len() > 1, what.is_empty()) {
        (true, true) => run.title.clone(),
        (true, false) => format!("{}: {what}", run.title),
        (false, _) => what.to_string(),
    };
    let marks: Vec<(f64, usize)> = runs
        .iter()
        .enumerate()
        .flat_map(|(i, r)| r.stages.iter().map(move |(step, ..)| (*step as f64, i)))
        .collect();
    let each = |what: &str, points: &dyn Fn(&RunData) -> Vec<(f64, f64)>| -> Vec<Line> {
        runs.iter()
            .enumerate()
            .map(|(i, r)| Line { name: name(r, what), colour: i, points: points(r) })
            .collect()
    };
    let of_steps = |pick: fn(&StepMetrics) -> Option<f64>| {
        move |r: &RunData| -> Vec<(f64, f64)> {
            r.steps.values().filter_map(|s| Some((s.step as f64, pick(s)?))).collect()
        }
    };
    let mut section = |heading: &str, text: &str, y_label: &str, log: bool, range, lines: &[Line]| {
        if let Some(svg) = (Chart { x_label: "step", y_label, log, range, marks: &marks, lines }).svg() {
            let _ = write!(body, "<h2>{heading}</h2><p>{text}</p>{svg}");
        }
    };
    section(
        "Training loss",
        "Flow-matching loss of each step. A dashed line marks the first step of stage 2.",
        "loss",
        false,
        None,
        &each("", &of_steps(|s| Some(s.loss))),
    );
    section(
        "Validation loss",
        "Mean over fixed (clip, timestep, noise) triples, the same in every run of one seed.",
        "loss",
        false,
        None,
        &each("", &|r| r.evals.iter().map(|(step, (loss, _))| (*step as f64, *loss)).collect()),
    );
    section(
        "Predictor loss",
        "0.95 (1 - cos) + 0.05 (|a| / |b| - 1)^2 of predicted against true centred scores, mean over blocks and heads.",
        "loss",
        true,
        None,
        &each("", &of_steps(|s| s.predictor_loss)),
    );
    section(
        "Covered mass",
        "Share of the true attention mass on the KV that the predicted lists keep; mean over blocks and heads.",
        "share",
        false,
        None,
        &each("", &|r| r.profiles.iter().map(|(s, p)| (*s as f64, mean(&p.covered))).collect()),
    );
    section(
        "Recall",
        "Share of the critical KV, the fewest that hold theta of a query's mass, among those that the predicted lists keep; mean over blocks and heads.",
        "share",
        false,
        Some((0.0, 1.0)),
        &each("", &|r| {
            let recorded = r.profiles.iter().filter(|(_, p)| !p.recall.is_empty());
            recorded.map(|(s, p)| (*s as f64, mean(&p.recall))).collect()
        }),
    );
    section(
        "Sparsity",
        "Share of KV that is not critical (not needed for theta of the mass), smoothed; mean over blocks and heads.",
        "share",
        false,
        Some((0.0, 1.0)),
        &each("", &|r| r.profiles.iter().map(|(s, p)| (*s as f64, mean(&p.sparsity))).collect()),
    );
    section(
        "Blocks that ran sparse",
        "Share of blocks whose attention used KV lists.",
        "share",
        false,
        Some((0.0, 1.0)),
        &each("", &of_steps(|s| Some(s.sparse_share))),
    );
    section(
        "Speed",
        "Video tokens a second, each step.",
        "tokens/s",
        false,
        None,
        &each("", &of_steps(|s| Some(s.tokens_per_s))),
    );
    for run in runs {
        heat_maps(&mut body, run, runs.len() > 1);
    }
    paired(&mut body, runs);
    for run in runs {
        let of = if runs.len() > 1 { format!(" of {}", escape(&run.title)) } else { String::new() };
        if let Some((step, Dispatch { sparse, skipped, top_k, why })) = run.dispatches.last_key_value() {
            let _ = write!(
                body,
                "<h2>Last decision{of}</h2><p>Made before step {step}.</p><div class=\"wide\"><table><tr><th class=\"n\">block</th><th>attention</th><th class=\"n\">skipped</th><th class=\"n\">KV blocks a head keeps</th><th>why</th></tr>"
            );
            for (b, is_sparse) in sparse.iter().enumerate() {
                let _ = write!(
                    body,
                    "<tr><td class=\"n\">{b}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
                    if *is_sparse { "sparse" } else { "dense" },
                    skipped.get(b).map_or(String::new(), |s| format!("{:.0} %", s * 100.0)),
                    top_k.get(b).map_or(String::new(), |heads| budgets(heads)),
                    why.get(b).map_or(String::new(), |w| escape(w)),
                );
            }
            body += "</table></div>";
        }
        for (step, choice) in &run.cubes {
            cubes(&mut body, *step, choice, &of);
        }
        observed(&mut body, run, &of);
        if let Some(g) = &run.granularity {
            granularity(&mut body, g, &of);
        }
        gifs(&mut body, run, &of);
        if !run.notes.is_empty() {
            let _ = write!(body, "<h2>Notes{of}</h2><table>");
            for (step, text) in &run.notes {
                let _ = write!(body, "<tr><td class=\"n\">{step}</td><td>{}</td></tr>", escape(text));
            }
            body += "</table>";
        }
        if !run.config.is_empty() {
            let _ = write!(
                body,
                "<h2>Configuration{of}</h2><details><summary>Every key</summary><pre>{}</pre></details>",
                escape(&run.config)
            );
        }
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>{}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n",
        escape(&title)
    )
}

/// The least and the most that heads keep.
fn budgets(heads: &[i32]) -> String {
    match (heads.iter().min(), heads.iter().max()) {
        (Some(least), Some(most)) if least < most => format!("{least} to {most}"),
        (Some(all), _) => all.to_string(),
        _ => String::new(),
    }
}

fn facts(body: &mut String, runs: &[RunData]) {
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    let mut row = |label: &str, value: &dyn Fn(&RunData) -> Option<String>| {
        let values: Vec<Option<String>> = runs.iter().map(value).collect();
        if values.iter().any(Option::is_some) {
            rows.push((label.to_string(), values.into_iter().map(Option::unwrap_or_default).collect()));
        }
    };
    let four = |x: f64| format!("{x:.4}");
    row("Steps", &|r| r.steps.last_key_value().map(|(s, _)| (s + 1).to_string()));
    row("Stage 2 from step", &|r| {
        r.stages.iter().rfind(|(_, stage, _)| *stage == 2).map(|(s, _, why)| format!("{s} ({why})"))
    });
    row(&format!("Loss criterion (predictor loss < {LOSS_CRITERION})"), &|r| {
        let losses = || r.steps.values().filter_map(|s| s.predictor_loss.map(|loss| (s.step, loss)));
        let lowest = losses().map(|(_, loss)| loss).min_by(f64::total_cmp)?;
        Some(match losses().find(|(_, loss)| *loss < LOSS_CRITERION) {
            Some((step, _)) => format!("met first in step {step}"),
            None => format!("not met; lowest {lowest:.4}"),
        })
    });
    row("Loss, last tenth", &|r| r.final_loss().map(four));
    row("Validation loss, last", &|r| r.evals.last_key_value().map(|(_, (l, _))| four(*l)));
    row("Predictor loss, last", &|r| r.steps.values().rev().find_map(|s| s.predictor_loss).map(four));
    row("Covered mass, last", &|r| r.profiles.last_key_value().map(|(_, p)| four(mean(&p.covered))));
    row("Recall, last", &|r| {
        let (_, p) = r.profiles.last_key_value().filter(|(_, p)| !p.recall.is_empty())?;
        Some(four(mean(&p.recall)))
    });
    row("Sparsity, last", &|r| r.profiles.last_key_value().map(|(_, p)| four(mean(&p.sparsity))));
    row("Blocks sparse in stage 2, mean", &|r| {
        let v: Vec<f64> = r.steps.values().filter(|s| s.stage == 2).map(|s| s.sparse_share).collect();
        (!v.is_empty()).then(|| format!("{:.0} %", v.iter().sum::<f64>() / v.len() as f64 * 100.0))
    });
    for (stage, label) in [(0, "Tokens/s, baseline"), (1, "Tokens/s, stage 1"), (2, "Tokens/s, stage 2")] {
        row(label, &|r| r.speed(stage).map(plot::number));
    }
    row("Copies between host and device, a step", &|r| r.copies());
    row("Skipped updates", &|r| {
        let n = r.steps.values().filter(|s| s.skipped.is_some()).count();
        (n > 0).then(|| n.to_string())
    });
    let keys: std::collections::BTreeSet<&String> = runs.iter().flat_map(|r| r.facts.keys()).collect();
    for key in keys {
        row(key, &|r| r.facts.get(key).cloned());
    }
    *body += "<div class=\"wide\"><table>";
    if runs.len() > 1 {
        *body += "<tr><th></th>";
        for run in runs {
            let _ = write!(body, "<th>{}</th>", escape(&run.title));
        }
        *body += "</tr>";
    }
    for (label, values) in rows {
        let _ = write!(body, "<tr><th>{}</th>", escape(&label));
        for value in values {
            let _ = write!(body, "<td>{}</td>", escape(&value));
        }
        *body += "</tr>";
    }
    *body += "</table></div>";
}

fn observed(body: &mut String, run: &RunData, of: &str) {
    if run.observed.is_empty() {
        return;
    }
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    // One row a block; a block without a value has an empty cell.
    let table = |body: &mut String, columns: &[String], row: &dyn Fn(&BlockObservation) -> Vec<String>| {
        *body += "<div class=\"wide\"><table><tr><th class=\"n\">block</th>";
        columns.iter().for_each(|c| {
            let _ = write!(body, "<th class=\"n\">{c}</th>");
        });
        *body += "</tr>";
        for (block, o) in run.observed.iter().enumerate() {
            let _ = write!(body, "<tr><td class=\"n\">{block}</td>");
            let cells = row(o);
            (0..columns.len()).for_each(|i| {
                let _ = write!(body, "<td class=\"n\">{}</td>", cells.get(i).map_or("", String::as_str));
            });
            *body += "</tr>";
        }
        *body += "</table></div>";
    };
    let _ = write!(
        body,
        "<h2>What the attention looks like{of}</h2><p>At the end, on one held-out clip; mean over heads and 32 queries. Critical keys are the fewest that hold theta of a query's mass; distances are on the token grid.</p>"
    );
    let columns = [
        "not critical",
        "queries served by a tenth of the keys",
        "critical keys within 5 tokens",
        "beyond 10 tokens",
        "shared in a 2x2x2 cube",
    ];
    table(body, &columns.map(String::from), &|o| {
        [o.sparsity, o.power_law, o.near, o.far, o.agreement].map(percent).to_vec()
    });
    if run.observed.iter().any(|o| !o.mass.is_empty()) {
        let _ = write!(body, "<h3>Mass that the best keys of a query hold{of}</h3>");
        let shares: Vec<String> = SHARES.iter().map(|s| format!("{:.0} % of the keys", 100.0 * s)).collect();
        table(body, &shares, &|o| o.mass.iter().copied().map(percent).collect());
        let _ = write!(body, "<h3>Critical keys by distance{of}</h3>");
        let mut bins: Vec<String> = EDGES.iter().map(|e| format!("up to {e}")).collect();
        bins.push("beyond".into());
        table(body, &bins, &|o| o.distances.iter().copied().map(percent).collect());
        let _ = write!(body, "<h3>Critical keys shared by the queries of a cube{of}</h3>");
        let cubes: Vec<String> = CUBES.iter().map(|c| format!("{c} tokens")).collect();
        table(body, &cubes, &|o| o.cubes.iter().copied().map(percent).collect());
    }
    if run.observed.iter().any(|o| o.ladder.is_some()) {
        let _ = write!(
            body,
            "<h3>Where uncovered mass is lost{of}</h3><p>Mass held by as many keys as the lists have, chosen in ever coarser ways: single keys for each query, whole KV blocks for each query, whole blocks for a group of queries from their own mass, and as the predictor chose. Each step down is what one simplification costs; recall is the share of the group's best blocks among the listed.</p>"
        );
        let columns =
            ["kept", "keys, by query", "blocks, by query", "blocks, by group", "the lists", "recall"];
        table(body, &columns.map(String::from), &|o| {
            let values = |l: Ladder| [l.kept, l.keys, l.blocks, l.group, l.lists, l.recall];
            o.ladder.map_or(Vec::new(), |l| values(l).map(percent).to_vec())
        });
    }
}

fn cubes(body: &mut String, step: u64, choice: &ChosenCube, of: &str) {
    let _ = write!(
        body,
        "<h2>Cube of tokens{of}</h2><p>Chosen before step {step}. {}.</p><div class=\"wide\"><table><tr><th>cube</th><th class=\"n\">critical keys shared</th><th class=\"n\">KV needed for {:.0} % of the mass</th></tr>",
        escape(&choice.why),
        100.0 * COVERED
    );
    for shape in &choice.shapes {
        let _ = write!(
            body,
            "<tr><td>{}</td><td class=\"n\">{:.1} %</td><td class=\"n\">{:.1} %</td></tr>",
            shape.cube,
            100.0 * shape.overlap,
            100.0 * shape.needed
        );
    }
    *body += "</table></div>";
}

fn granularity(body: &mut String, g: &Granularity, of: &str) {
    let _ = write!(body, "<h2>Granularity of the lists{of}</h2>");
    for line in granularity::page::about(g) {
        let _ = write!(body, "<p>{}</p>", escape(&line));
    }
    for (title, chart) in granularity::page::charts(g).iter().map(|c| (&c.title, c.chart())) {
        if let Some(svg) = chart.svg() {
            let _ = write!(body, "<h3>{}{of}</h3>{svg}", escape(title));
        }
    }
    for table in granularity::page::tables(g) {
        let _ = write!(
            body,
            "<details><summary>{}</summary><div class=\"wide\"><table><tr>",
            escape(&table.title)
        );
        table.header.iter().for_each(|cell| {
            let _ = write!(body, "<th class=\"n\">{}</th>", escape(cell));
        });
        *body += "</tr>";
        for row in &table.rows {
            *body += "<tr>";
            row.iter().for_each(|cell| {
                let _ = write!(body, "<td class=\"n\">{}</td>", escape(cell));
            });
            *body += "</tr>";
        }
        let _ = write!(body, "</table></div><p>{}</p></details>", escape(&table.note));
    }
}

/// One of a profile's numbers.
type ProfileRows = fn(&Profile) -> &Vec<Vec<f64>>;

fn heat_maps(body: &mut String, run: &RunData, several: bool) {
    let Some((last_step, last)) = run.profiles.last_key_value() else { return };
    let of = if several { format!(" of {}", escape(&run.title)) } else { String::new() };
    let stops: Vec<String> = (0..=8)
        .map(|i| {
            let (r, g, b) = plot::ramp(f64::from(i) / 8.0);
            format!("rgb({r},{g},{b})")
        })
        .collect();
    let legend = format!(
        "<div class=\"ramp\">0 <b style=\"background:linear-gradient(90deg,{})\"></b> 1</div>",
        stops.join(",")
    );
    let (layers, heads) = (last.sparsity.len(), last.sparsity.iter().map(Vec::len).max().unwrap_or(0));
    let kinds: [(&str, ProfileRows); 3] =
        [("Sparsity", |p| &p.sparsity), ("Covered mass", |p| &p.covered), ("Recall", |p| &p.recall)];
    let kinds = kinds.into_iter().filter(|(_, pick)| !pick(last).is_empty());
    let by_head = layers * heads <= MAX_ROWS;
    // Profiles over time, thinned evenly, the last always shown.
    let all: Vec<(&u64, &Profile)> = run.profiles.iter().collect();
    let every = all.len().div_ceil(MAX_COLUMNS);
    let shown: Vec<&(&u64, &Profile)> = all.iter().rev().step_by(every).rev().collect();
    let steps: Vec<String> = shown.iter().map(|(s, _)| s.to_string()).collect();
    let over_time = |pick: ProfileRows| -> (Vec<Vec<f64>>, Vec<String>) {
        let value = |p: &Profile, l: usize, h: Option<usize>| {
            let row = pick(p).get(l);
            match h {
                Some(h) => row.and_then(|r| r.get(h)).copied().unwrap_or(f64::NAN),
                None => row.map_or(f64::NAN, |r| r.iter().sum::<f64>() / r.len() as f64),
            }
        };
        let mut rows = Vec::new();
        let mut labels = Vec::new();
        for l in 0..layers {
            if by_head {
                for h in 0..heads {
                    rows.push(shown.iter().map(|(_, p)| value(p, l, Some(h))).collect());
                    labels.push(format!("block {l} h{h}"));
                }
            } else {
                rows.push(shown.iter().map(|(_, p)| value(p, l, None)).collect());
                labels.push(format!("block {l}"));
            }
        }
        (rows, labels)
    };
    let unit = if by_head { "block and head" } else { "block" };
    for (heading, pick) in kinds.clone() {
        let (rows, labels) = over_time(pick);
        if let Some(svg) = plot::heat_map(&rows, &labels, &steps, "step") {
            let _ = write!(body, "<h2>{heading} by {unit} over time{of}</h2>{legend}{svg}");
        }
    }
    if !by_head {
        let blocks: Vec<String> = (0..layers).map(|l| format!("block {l}")).collect();
        let names: Vec<String> = (0..heads).map(|h| h.to_string()).collect();
        for (heading, pick) in kinds {
            if let Some(svg) = plot::heat_map(pick(last), &blocks, &names, "head") {
                let _ =
                    write!(body, "<h2>{heading} by block and head at step {last_step}{of}</h2>{legend}{svg}");
            }
        }
    }
}

/// Validation of each later run against the first, on the triples both have, at the last step both have.
fn paired(body: &mut String, runs: &[RunData]) {
    let Some((first, others)) = runs.split_first() else { return };
    for other in others {
        let common = first.evals.keys().rev().find(|s| other.evals.contains_key(*s));
        let Some(step) = common else { continue };
        let key = |t: &EvalTriple| (t.clip.clone(), t.t.to_bits());
        let theirs: BTreeMap<_, f64> = other.evals[step].1.iter().map(|t| (key(t), t.loss)).collect();
        let pairs: Vec<(&EvalTriple, f64)> =
            first.evals[step].1.iter().filter_map(|t| Some((t, *theirs.get(&key(t))?))).collect();
        if pairs.is_empty() {
            continue;
        }
        let n = pairs.len() as f64;
        let differences: Vec<f64> = pairs.iter().map(|(t, loss)| loss - t.loss).collect();
        let m = differences.iter().sum::<f64>() / n;
        let variance = differences.iter().map(|d| (d - m).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        let error = (variance / n).sqrt();
        let base = pairs.iter().map(|(t, _)| t.loss).sum::<f64>() / n;
        let (a, b) = (escape(&first.title), escape(&other.title));
        let _ = write!(
            body,
            "<h2>{b} against {a}, paired</h2><p>{} triples after {step} steps. Mean difference {m:+.5} ({:+.2} %), standard error {error:.5}; {b} is lower on {} of them.</p><details><summary>Every triple</summary><div class=\"wide\"><table><tr><th>clip</th><th class=\"n\">t</th><th class=\"n\">{a}</th><th class=\"n\">{b}</th><th class=\"n\">difference</th></tr>",
            pairs.len(),
            m / base * 100.0,
            differences.iter().filter(|d| **d < 0.0).count(),
        );
        for (t, loss) in &pairs {
            let _ = write!(
                body,
                "<tr><td>{}</td><td class=\"n\">{:.3}</td><td class=\"n\">{:.5}</td><td class=\"n\">{loss:.5}</td><td class=\"n\">{:+.5}</td></tr>",
                escape(&t.clip),
                t.t,
                t.loss,
                loss - t.loss,
            );
        }
        *body += "</table></div></details>";
    }
}

fn gifs(body: &mut String, run: &RunData, of: &str) {
    let newest = &run.samples[run.samples.len().saturating_sub(MAX_GIFS)..];
    let mut figures = String::new();
    for path in newest {
        let small = std::fs::metadata(path).is_ok_and(|m| m.len() <= MAX_GIF_BYTES);
        let Some(bytes) = small.then(|| std::fs::read(path).ok()).flatten() else { continue };
        let caption = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let _ = write!(
            figures,
            "<figure><img alt=\"{0}\" src=\"data:image/gif;base64,{1}\"><figcaption>{0}</figcaption></figure>",
            escape(&caption),
            base64(&bytes)
        );
    }
    if !figures.is_empty() {
        let _ = write!(body, "<h2>Samples{of}</h2><div class=\"gifs\">{figures}</div>");
    }
}

fn base64(data: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(data.len().div_ceil(3) * 4);
    for chunk in data.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i) & 63) as usize] as char;
            out.push(if i <= chunk.len() { digit } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(title: &str, stage: u32, offset: f64, layers: usize) -> Vec<Record> {
        let mut records = vec![Record::Run {
            step: 0,
            title: title.into(),
            config: "preset = \"tiny\" # <x>\n".into(),
            facts: BTreeMap::from([("Device".to_string(), "CPU & co".to_string())]),
        }];
        for step in 0..60u64 {
            records.push(Record::Step(StepMetrics {
                step,
                stage: if stage == 0 { 0 } else { 1 + u32::from(step >= 30) },
                loss: 1.0 / (1.0 + step as f64) + offset,
                tokens_per_s: 1000.0 + step as f64,
                predictor_loss: (stage > 0).then(|| 0.5 / (1.0 + step as f64)),
                sparse_share: if stage > 0 && step >= 30 { 0.9 } else { 0.0 },
                ..StepMetrics::default()
            }));
            if stage > 0 && step % 5 == 0 {
                let rows = |x: f64| vec![vec![x, x + 0.05]; layers];
                records.push(Record::Profile {
                    step,
                    sparsity: rows(0.5 + step as f64 / 200.0),
                    covered: rows(0.9),
                    recall: rows(0.6),
                });
            }
        }
        if stage > 0 {
            records.push(Record::Stage { step: 30, stage: 2, reason: "step 30 reached".into() });
            records.push(Record::Dispatch {
                step: 40,
                sparse: vec![true, false],
                skipped: vec![0.8, 0.0],
                top_k: vec![vec![4, 9], vec![13, 13]],
                why: vec!["forced".into(), "below <crossover>".into()],
            });
        }
        let triples = (0..4)
            .map(|i| EvalTriple {
                clip: format!("c{i}"),
                t: f64::from(i) / 4.0,
                loss: 0.5 + offset * f64::from(i),
            })
            .collect();
        records.push(Record::Eval { step: 60, loss: 0.5 + offset * 1.5, triples });
        for step in [29, 59] {
            let moved = Transfers {
                to_host_bytes: 45_000_000_000,
                to_device_bytes: 30_000_000_000,
                copy_ms: 900.0,
                waited_ms: 45.0,
            };
            records.push(Record::Transfers { step, steps: 30, moved });
        }
        records
    }

    #[test]
    fn two_runs_are_compared_in_one_self_contained_page() {
        let dir = tempfile::tempdir().unwrap();
        let folders = [dir.path().join("full"), dir.path().join("dsv")];
        for (folder, records) in folders.iter().zip([run("full", 0, 0.0, 2), run("DSV", 2, 0.01, 2)]) {
            let mut m = metrics::Metrics::open(folder, None).unwrap();
            records.iter().for_each(|r| m.write(r).unwrap());
        }
        let video = crate::data::procedural::Scene::new(1, 1).render(2, 8, 8);
        crate::gif::write(&folders[1].join("samples/step-60.gif"), &video, 8, 1).unwrap();
        let runs: Vec<RunData> = folders.iter().map(|f| RunData::load(f).unwrap()).collect();
        let path = dir.path().join("report.html");
        write(&path, &runs).unwrap();
        let page = std::fs::read_to_string(&path).unwrap();
        for wanted in [
            "<h1>full against DSV</h1>",
            "Training loss",
            "Predictor loss",
            "Covered mass by block and head over time of DSV",
            "Recall by block and head over time of DSV",
            "Recall, last",
            "Sparsity by block and head over time of DSV",
            "Blocks that ran sparse",
            "Speed",
            "DSV against full, paired",
            "4 triples after 60 steps. Mean difference +0.01500 (+3.00 %)",
            "lower on 0 of them",
            "30 (step 30 reached)",
            "Loss criterion (predictor loss &lt; 0.01)",
            "met first in step 50",
            "below &lt;crossover&gt;",
            "80 %</td><td class=\"n\">4 to 9</td>",
            "0 %</td><td class=\"n\">13</td>",
            "CPU &amp; co",
            "1.500 GB to the host, 1.000 GB back, 30.0 ms of copies, 1.5 ms waited for: 95 % beside compute",
            "data:image/gif;base64,R0lGOD",
            "preset = &quot;tiny&quot; # &lt;x&gt;",
            "prefers-color-scheme:dark",
        ] {
            assert!(page.contains(wanted), "{wanted}");
        }
        for never in ["<script", "http://cdn", "https://", "@import", "<link", "NaN"] {
            assert!(!page.contains(never), "{never}");
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    }

    #[test]
    fn observations_are_tables_and_older_records_have_fewer() {
        let old = r#"{"sparsity":0.5,"power_law":0.25,"near":0.2,"far":0.4,"agreement":0.8}"#;
        let old: BlockObservation = serde_json::from_str(old).unwrap();
        let ladder = Ladder { kept: 0.2, keys: 0.75, blocks: 0.6, group: 0.5, lists: 0.45, recall: 0.875 };
        let new = BlockObservation { ladder: Some(ladder), mass: vec![0.125; 7], ..old.clone() };
        let show = |observed: Vec<BlockObservation>| {
            page(&[RunData { title: "t".into(), observed, ..RunData::default() }])
        };
        let before = show(vec![old.clone()]);
        assert!(
            before.contains("80.0 %") && !before.contains("Where uncovered") && !before.contains("Mass that")
        );
        let both = show(vec![old, new]);
        for wanted in
            ["Where uncovered mass is lost", "87.5 %", "12.5 %", "2 % of the keys", "512 tokens", "up to 20"]
        {
            assert!(both.contains(wanted), "{wanted}");
        }
    }

    #[test]
    fn many_heads_are_shown_by_block_and_once_by_head() {
        let page = page(&[RunData::from_records(run("large", 2, 0.0, 40))]);
        assert!(
            page.contains("Sparsity by block over time")
                && page.contains("Sparsity by block and head at step 55")
        );
    }

    #[test]
    fn an_empty_run_still_gives_a_page() {
        let page = page(&[RunData { title: "none".into(), ..RunData::default() }]);
        assert!(page.contains("<h1>none</h1>") && !page.contains("<svg"));
    }

    #[test]
    fn base64_is_rfc_4648() {
        for (text, encoded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(text.as_bytes()), encoded);
        }
    }
}
