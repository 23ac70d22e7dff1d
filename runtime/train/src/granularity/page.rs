//! A [`Granularity`] written down: lines, tables and charts, for the terminal, Markdown, SVG and the report.

use super::{Cell, CubePick, Curve, FILE, Granularity, Needs};
use crate::durable::{RealDisk, write_file};
use crate::metrics::MetricsError;
use crate::report::plot::{self, Chart, Line};
use dsv_reference::coverage::PAPER_OVERLAP;
use dsv_spec::space::{SHIPPED_BLOCK_SIZES, SHIPPED_GATHER};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Percent of the units whose mass tables tell.
const TOLD: [u32; 6] = [5, 10, 15, 20, 30, 50];

impl Granularity {
    /// What was measured of the run in this folder; `None` where nothing was.
    ///
    /// # Errors
    /// [`MetricsError::Granularity`].
    pub fn load(dir: &Path) -> Result<Option<Granularity>, MetricsError> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let found = std::fs::read(&path)
            .map_err(|e| e.to_string())
            .and_then(|text| serde_json::from_slice(&text).map_err(|e| e.to_string()));
        found.map(Some).map_err(|reason| MetricsError::Granularity { path, reason })
    }

    /// Writes `granularity.json`, `granularity.md` and `granularity.svg` into this folder; gives their paths.
    ///
    /// # Errors
    /// The disk's.
    pub fn write(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut files = vec![(FILE, serde_json::to_string(self)?), ("granularity.md", markdown(self))];
        files.extend(svg(self).map(|svg| ("granularity.svg", svg)));
        let mut paths = Vec::new();
        for (name, text) in files {
            let path = dir.join(name);
            write_file(&RealDisk, &path, |out| out.write_all(text.as_bytes()))?;
            paths.push(path);
        }
        Ok(paths)
    }
}

/// A table of text.
pub struct Table {
    /// What it shows.
    pub title: String,
    /// Heads of its columns.
    pub header: Vec<String>,
    /// Cells, row by row.
    pub rows: Vec<Vec<String>>,
    /// What its signs mean.
    pub note: String,
}

impl Table {
    fn widths(&self) -> Vec<usize> {
        let all = || std::iter::once(&self.header).chain(&self.rows);
        (0..self.header.len()).map(|i| all().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect()
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        let rule = vec!["---".to_string(); self.header.len()];
        format!(
            "**{}**\n\n{}{}{rows}\n{}\n",
            self.title,
            line(&self.header),
            line(&rule).replace(' ', ""),
            self.note
        )
    }

    /// For a terminal, columns flush right.
    pub fn text(&self) -> String {
        let widths = self.widths();
        let line = |cells: &Vec<String>| -> String {
            let cells: Vec<String> =
                cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
            format!("{}\n", cells.join("  ").trim_end())
        };
        let rows: String = self.rows.iter().map(line).collect();
        format!("{}\n{}{rows}{}\n", self.title, line(&self.header), self.note)
    }
}

/// What was measured, and what follows.
pub fn about(g: &Granularity) -> Vec<String> {
    let [t, h, w] = g.grid;
    let mut lines = vec![format!(
        "Step {} of a run with lists of {} x {} by {} in cubes of {}: {} held-out samples of {} tokens ({t} x {h} x {w}), {} groups of each size over all blocks and {} heads of {}, mass of up to {} queries of each. At other lengths the same share is taken to cover as much.",
        g.step,
        g.own.query_group,
        g.own.kv_block,
        g.own.rule,
        g.own.cube,
        g.samples,
        g.tokens(),
        g.groups,
        g.heads,
        g.head_dim,
        g.queries
    )];
    if !g.times.is_empty() {
        lines.push(format!("Times, selection + forward + backward: {}.", g.times.join("; ")));
    }
    lines.extend(g.lengths.iter().map(|l| l.verdict.clone()));
    lines.extend(g.picks.iter().map(pick));
    lines
}

fn pick(p: &CubePick) -> String {
    let needs = |n: Needs| match n.us {
        Some(us) => format!("{:.1} % kept, {}", 100.0 * n.kept, super::ms(us)),
        None => format!("{:.1} % kept", 100.0 * n.kept),
    };
    let length = p.seqlen.map_or(String::new(), |n| format!(" at {n} tokens"));
    let own = super::contract(p.query_group, p.kv_block);
    let against = match p.contract_needs {
        _ if p.cube == own => "no other shape is better".to_string(),
        Some(theirs) => format!("{own} needs {}", needs(theirs)),
        None => format!("{own} does not reach the mass"),
    };
    format!(
        "Cube for {} x {}{length}: {} ({}); {against}.",
        p.query_group,
        p.kv_block,
        p.cube,
        needs(p.needs)
    )
}

fn percent(x: f64) -> String {
    format!("{:.1}", 100.0 * x)
}

const NONE: &str = "-";

/// What lists cover and cost; and, where other shapes were measured, the cubes.
pub fn tables(g: &Granularity) -> Vec<Table> {
    let mut tables = vec![covered(g)];
    if g.cubes.iter().any(|c| c.cube != super::contract(c.query_group, 1)) {
        tables.push(cubes(g));
    }
    tables
}

fn covered(g: &Granularity) -> Table {
    let mass = format!("{:.0} %", 100.0 * g.mass);
    let mut header: Vec<String> = ["group x unit", "cube", "chosen by"].map(String::from).to_vec();
    header.extend(TOLD.map(|p| format!("mass on {p} %")));
    header.extend([format!("top_k for {mass}"), format!("top_p for {mass}: kept")]);
    header.extend(timed(g).map(|at| format!("ms at {}", g.lengths[at].seqlen)));
    let row = |c: &Cell| -> Vec<String> {
        let at_share = |p: u32| {
            let share = f64::from(p) / 100.0;
            g.shares.iter().position(|s| (s - share).abs() < 1e-9).map(|i| percent(c.top_k.covered[i]))
        };
        let first = |curve: &Curve| curve.covered.iter().position(|&covered| covered >= g.mass);
        let kept = |curve: &Curve| first(curve).map_or(NONE.into(), |i| percent(curve.kept[i]));
        let mut cells =
            vec![c.name(), c.cube.to_string(), c.rule.map_or("best there is", |r| r.name()).into()];
        cells.extend(TOLD.map(|p| at_share(p).unwrap_or(NONE.into())));
        cells.extend([kept(&c.top_k), kept(&c.top_p)]);
        cells.extend(timed(g).map(|at| {
            let us = |i: usize| c.top_k.us_at(at, i).map(|us| (us, c.top_k.measured[at].contains(&i)));
            match c.enough(g.mass).and_then(us) {
                Some((us, measured)) => format!("{:.3}{}", us / 1e3, if measured { "*" } else { "" }),
                None => NONE.into(),
            }
        }));
        cells
    };
    Table {
        title: "Mass that lists cover, percent, and what covering enough costs".into(),
        header,
        rows: g.of_contract().map(row).collect(),
        note: format!(
            "top_k, top_p: percent of the units kept where {mass} of the mass is covered. ms: a step at that top_k; * its share was measured, else it lies between two that were; {NONE} nothing is measured there, or the mass is not reached."
        ),
    }
}

fn cubes(g: &Granularity) -> Table {
    let mut units: Vec<usize> = g.cells.iter().map(|c| c.kv_block).collect();
    units.sort_unstable();
    units.dedup();
    let mut header: Vec<String> = ["cube", "tokens", "overlap", "not critical"].map(String::from).to_vec();
    header.extend(units.iter().map(|unit| format!("unit {unit}")));
    let row = |cube: &super::CubeReport| {
        let below = if cube.overlap < PAPER_OVERLAP { "*" } else { "" };
        let mut cells = vec![
            cube.cube.to_string(),
            cube.query_group.to_string(),
            format!("{}{below}", percent(cube.overlap)),
            percent(cube.sparsity),
        ];
        cells.extend(units.iter().map(|&unit| {
            let of_unit = |c: &&Cell| {
                (c.cube, c.query_group, c.kv_block) == (cube.cube, cube.query_group, unit) && c.rule.is_some()
            };
            let needed = g
                .cells
                .iter()
                .filter(of_unit)
                .filter_map(|c| Some((c.top_k.kept[c.enough(g.mass)?], c.rule?)));
            let least = needed.min_by(|a, b| a.0.total_cmp(&b.0));
            least.map_or(NONE.into(), |(kept, rule)| format!("{} {rule}", percent(kept)))
        }));
        cells
    };
    Table {
        title: format!(
            "Cubes of tokens: percent of the units that cover {:.0} % of the mass, by the best rule",
            100.0 * g.mass
        ),
        header,
        rows: g.cubes.iter().map(row).collect(),
        note: format!(
            "overlap: share of critical keys that two queries of the cube have in common; * below the {:.0} % that the paper's cubes keep above.",
            100.0 * PAPER_OVERLAP
        ),
    }
}

/// Lengths with times.
fn timed(g: &Granularity) -> impl Iterator<Item = usize> {
    (0..g.lengths.len()).filter(|&at| g.lengths[at].num_heads.is_some())
}

/// A chart and what it needs to live.
pub struct Drawing {
    /// Heading.
    pub title: String,
    y_label: &'static str,
    lines: Vec<Line>,
}

impl Drawing {
    pub(crate) fn chart(&self) -> Chart<'_> {
        Chart {
            x_label: "attention mass covered, %",
            y_label: self.y_label,
            log: false,
            range: None,
            marks: &[],
            lines: &self.lines,
        }
    }
}

/// Share kept against mass covered, and time against mass covered at each length that has times: a line a granularity that
/// kernels serve, chosen by the rule that covers the mass with the fewest units.
pub fn charts(g: &Granularity) -> Vec<Drawing> {
    let served = |c: &&Cell| {
        let size = (c.query_group, c.kv_block);
        let shipped = SHIPPED_GATHER.iter().chain(&SHIPPED_BLOCK_SIZES);
        size == (g.own.query_group, g.own.kv_block)
            || shipped.into_iter().any(|&(a, b)| (usize::from(a), usize::from(b)) == size)
    };
    let mut best: Vec<&Cell> = Vec::new();
    for cell in g.of_contract().filter(served).filter(|c| c.rule.is_some()) {
        let needs = |c: &Cell| c.enough(g.mass).unwrap_or(usize::MAX);
        match best.iter_mut().find(|b| b.name() == cell.name()) {
            Some(there) if needs(cell) < needs(there) => *there = cell,
            Some(_) => {}
            None => best.push(cell),
        }
    }
    let lines = |y: &dyn Fn(&Cell, usize) -> Option<f64>| -> Vec<Line> {
        best.iter()
            .enumerate()
            .map(|(colour, cell)| Line {
                name: format!("{} by {}", cell.name(), cell.rule.map_or("", |r| r.name())),
                colour,
                points: (0..g.shares.len())
                    .filter_map(|i| Some((100.0 * cell.top_k.covered[i], y(cell, i)?)))
                    .collect(),
            })
            .filter(|line| !line.points.is_empty())
            .collect()
    };
    let mut found = vec![Drawing {
        title: "KV kept against mass covered".into(),
        y_label: "KV kept, %",
        lines: lines(&|c, i| Some(100.0 * c.top_k.kept[i])),
    }];
    for at in timed(g) {
        let length = &g.lengths[at];
        let mut lines = lines(&|c, i| c.top_k.us_at(at, i).map(|us| us / 1e3));
        if let Some(dense) = length.dense_us.filter(|_| !lines.is_empty()) {
            let from = lines.iter().flat_map(|l| &l.points).map(|p| p.0).fold(100.0, f64::min);
            let points = vec![(from, dense / 1e3), (100.0, dense / 1e3)];
            lines.push(Line { name: "dense".into(), colour: 7, points });
        }
        let heads = length.num_heads.unwrap_or(0);
        found.push(Drawing {
            title: format!(
                "Time of a step against mass covered, {} tokens, {heads} heads of {}",
                length.seqlen, g.head_dim
            ),
            y_label: "ms",
            lines,
        });
    }
    found
}

/// The charts as one file; `None` where there is nothing to draw.
pub fn svg(g: &Granularity) -> Option<String> {
    let drawings = charts(g);
    let charts: Vec<(String, Chart<'_>)> = drawings.iter().map(|d| (d.title.clone(), d.chart())).collect();
    plot::file(&charts)
}

/// Everything for a terminal.
pub fn text(g: &Granularity) -> String {
    let mut out = String::new();
    tables(g).iter().for_each(|table| {
        let _ = writeln!(out, "{}", table.text());
    });
    about(g).iter().for_each(|line| {
        let _ = writeln!(out, "{line}");
    });
    out
}

/// Everything as Markdown, the plot beside it.
pub fn markdown(g: &Granularity) -> String {
    let mut out = String::from("# Granularity of KV lists\n\n");
    about(g).iter().for_each(|line| {
        let _ = writeln!(out, "{line}\n");
    });
    out += "![time against covered mass](granularity.svg)\n";
    tables(g).iter().for_each(|table| {
        let _ = write!(out, "\n{}", table.markdown());
    });
    out
}
