//! The tables of [`crate::tables`] as text for a terminal and as Markdown for a document. Both are functions of the record
//! alone, so that what a document shows can be compared with what was committed.

use crate::error::TuneError;
use crate::listgen::ListKind;
use crate::ruler::Peer;
use crate::summary::tokens;
use crate::tables::{
    CLUSTERED_AT_MOST, Cell, DETERMINISTIC_AT_MOST, MIXED_AT_MOST, Section, Selected, SelectionRow, TableRow,
    Tables, Target,
};
use std::fmt::Write as _;
use std::path::Path;

/// First words of the line that opens the tables' place in a document; the record's path follows.
pub const BEGIN: &str = "<!-- bench: begin";
/// The line that closes it.
pub const END: &str = "<!-- bench: end -->";

/// The heading of selections.
const SELECTIONS: &str = "Selection: 10 % kept, predicted queries and keys of 16 columns";

/// Longest reason of a failure shown.
const REASON_CHARS: usize = 160;

fn block(row: &TableRow) -> String {
    match row.block {
        (0, 0) => "dense".to_string(),
        (q, k) => format!("{q}x{k}"),
    }
}

fn name(row: &TableRow) -> String {
    match row.lists.as_str() {
        "dense" | "random" => block(row),
        lists => format!("{} {lists}", block(row)),
    }
}

/// `+` the aim is reached, `=` what must be, `-` neither.
fn mark(value: f64, target: &Target) -> char {
    if value >= target.aim {
        '+'
    } else if value >= target.must {
        '='
    } else {
        '-'
    }
}

/// As [`mark`], of what is better when it is less.
fn mark_of_less(value: f64, target: &Target) -> char {
    mark(-value, &Target { must: -target.must, aim: -target.aim })
}

/// A speed-up with what should be reached.
fn factor(x: Option<f64>, target: Option<&Target>) -> String {
    match (x, target) {
        (None, _) => String::new(),
        (Some(x), Some(t)) => format!("{x:.1}{} ({}/{})", mark(x, t), t.must, t.aim),
        (Some(x), None) => format!("{x:.1}"),
    }
}

fn markdown_factor(x: Option<f64>, target: Option<&Target>) -> String {
    match (x, target) {
        (None, _) => String::new(),
        (Some(x), Some(t)) => format!("{x:.1} (target {} / {})", t.must, t.aim),
        (Some(x), None) => format!("{x:.1}"),
    }
}

fn pair(values: (Option<f64>, Option<f64>)) -> String {
    match values {
        (None, None) => String::new(),
        (a, b) => {
            let text = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.2}"));
            format!("{}|{}", text(a), text(b))
        }
    }
}

fn targets(target: Option<&Target>) -> String {
    target.map_or(String::new(), |t| format!("{}/{}", t.must, t.aim))
}

/// The tile and the other choices in a kernel's name, without what every kernel of the row has.
fn tile(kernel: &str) -> String {
    let parts: Vec<&str> = kernel.split('_').collect();
    let is_tile = |part: &&str| {
        part.starts_with('m') && part[1..].starts_with(|c: char| c.is_ascii_digit()) && part.contains('n')
    };
    let from = parts.iter().position(is_tile).unwrap_or(0);
    let to = parts.iter().rposition(|part| *part == "det" || *part == "nondet").unwrap_or(parts.len());
    let words = parts.get(from..to).unwrap_or(&parts[..]).iter().filter(|part| **part != "grid");
    // One group a CTA, and no cluster, go without saying; persistent CTAs are said short.
    let short = |part: &&str| {
        let part = if *part == "persistent" { "p" } else { part };
        let part = part.strip_prefix("g1c").map_or(part.to_string(), |rest| format!("c{rest}"));
        part.strip_suffix("x1").map_or(part.clone(), str::to_string)
    };
    words.map(short).collect::<Vec<_>>().join("_")
}

fn kernels(row: &TableRow) -> String {
    let cells = [&row.forward, &row.backward, &row.deterministic];
    let words: Vec<String> = cells
        .into_iter()
        .map(|cell| match cell {
            Cell::Measured { kernel, found, .. } => {
                let how = match found.split(',').next() {
                    Some("nearest") => "~",
                    Some("default") => "*",
                    _ => "",
                };
                let text = if found.contains("not committed") { "^" } else { "" };
                format!("{}{how}{text}", tile(kernel))
            }
            other => other.kernel().map_or("-".to_string(), tile),
        })
        .collect();
    match &words[..] {
        [fwd, bwd, det] if fwd == "-" && bwd == "-" && det == "-" => "-".to_string(),
        [fwd, bwd, det] if bwd == det => format!("{fwd} {bwd} ="),
        _ => words.join(" "),
    }
}

/// Columns as wide as their widest word, one blank between.
fn align(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |c: usize| rows.iter().filter_map(|row| row.get(c)).map(|w| w.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let last = columns.saturating_sub(1);
    rows.iter()
        .map(|row| {
            let words: Vec<String> = row
                .iter()
                .enumerate()
                .filter(|(c, _)| widths[*c] > 0)
                .map(|(c, word)| match c {
                    // Names to the left, figures to the right.
                    0..=2 => format!("{word:<width$}", width = widths[c]),
                    c if c == last => word.clone(),
                    c => format!("{word:>width$}", width = widths[c]),
                })
                .collect();
            words.join(" ").trim_end().to_string()
        })
        .collect()
}

fn pass(cell: &Cell, target: Option<&Target>) -> [String; 4] {
    match cell {
        Cell::Measured { timing, tf, .. } => [
            format!("{:.0}", timing.median_us),
            format!("{:.1}", 100.0 * timing.spread_us / timing.median_us),
            format!("{tf:.0}{}", target.map_or(' ', |t| mark(*tf, t))),
            targets(target),
        ],
        Cell::Failed { outcome, .. } => [outcome.to_uppercase(), String::new(), "-".into(), targets(target)],
        Cell::NotMeasured { .. } => ["none yet".into(), String::new(), String::new(), targets(target)],
        Cell::NoKernel => ["no kernel".into(), String::new(), String::new(), targets(target)],
    }
}

fn line(row: &TableRow) -> Vec<String> {
    let number = |x: Option<f64>, digits: usize| x.map_or(String::new(), |x| format!("{x:.digits$}"));
    let [fwd_us, fwd_spread, fwd_tf, fwd_target] =
        pass(&row.forward, row.targets.as_ref().map(|g| &g.forward));
    let [bwd_us, bwd_spread, bwd_tf, bwd_target] =
        pass(&row.backward, row.targets.as_ref().map(|g| &g.backward));
    let det = match &row.deterministic {
        Cell::Failed { outcome, .. } => outcome.to_uppercase(),
        _ => row
            .deterministic_factor()
            .map_or(String::new(), |x| format!("{x:.2}{}", mark_of_less(x, &DETERMINISTIC_AT_MOST))),
    };
    let lists_us = match (row.lists_us(), &row.select_target) {
        (Some(us), Some(t)) => format!("{us:.0}{}", mark_of_less(us / 1e3, t)),
        (us, _) => number(us, 0),
    };
    let most = if row.lists == ListKind::Mixed.name() { MIXED_AT_MOST } else { CLUSTERED_AT_MOST };
    let other = match row.of_other() {
        (Some(fwd), Some(bwd)) => {
            format!("{}{}", pair((Some(fwd), Some(bwd))), if fwd.max(bwd) <= most { '=' } else { '-' })
        }
        some => pair(some),
    };
    vec![
        format!("d{}", row.head_dim),
        format!("h{} {}", row.num_heads, tokens(row.seqlen)),
        name(row),
        format!("{:.1}", 100.0 * row.keep),
        fwd_us,
        fwd_spread,
        fwd_tf,
        fwd_target,
        bwd_us,
        bwd_spread,
        bwd_tf,
        bwd_target,
        det,
        lists_us,
        pair(row.of_cudnn()),
        factor(row.speed_up(), row.speed_up_target.as_ref()),
        factor(row.step_speed_up(), row.step_target.as_ref()),
        other,
        number(row.error_ratio(), 2),
        kernels(row),
    ]
}

const HEADER: [&str; 20] = [
    "",
    "",
    "lists",
    "kept",
    "fwd us",
    "+-%",
    "TF",
    "target",
    "bwd us",
    "+-%",
    "TF",
    "target",
    "det/bwd",
    "sel+inv",
    "TF/cuDNN",
    "speed-up",
    "step",
    "us/other",
    "err",
    "tiles of fwd, bwd, det",
];

fn beside(peer: &Peer, row: &TableRow) -> String {
    let whole = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.0}"));
    let ratio = |ours: Option<f64>, theirs: Option<f64>| Some(ours? / theirs?);
    let ours = (ratio(row.forward.tf(), peer.fwd_tf), ratio(row.backward.tf(), peer.bwd_tf));
    let ours = match pair(ours) {
        text if text.is_empty() => text,
        text => format!(" ({text})"),
    };
    format!("{}: {}|{}{ours}", peer.name, whole(peer.fwd_tf), whole(peer.bwd_tf))
}

/// The beginning of a message, in one line.
fn reason(message: &str) -> String {
    message.lines().collect::<Vec<_>>().join(" ").chars().take(REASON_CHARS).collect()
}

fn failures(section: &Section) -> Vec<String> {
    let mut out = Vec::new();
    for row in &section.rows {
        for cell in [&row.forward, &row.backward, &row.deterministic] {
            if let Cell::Failed { kernel, outcome, message } = cell {
                out.push(format!("{outcome}: {kernel}: {}", reason(message)));
            }
        }
    }
    out.sort();
    out.dedup();
    out
}

/// The tables for a terminal: a row a case, peers below it.
pub fn text(bench: &Tables) -> String {
    let m = &bench.machine;
    let mut out = format!(
        "{}, driver {}, NVRTC {}, {}, {}; kernels {}; served by {}\n\
         us: median; +-%: 10th to 90th percentile. TF: on the pairs kept; of the target (must/aim, H100) + aim, = must, - less.\n\
         det/bwd: deterministic backward over default (target {}/{}). sel+inv: us. TF/cuDNN: of its dense TF, fwd|bwd. speed-up:\n\
         its dense fwd+bwd over ours, lists given; step: selection and inversion included. us/other: clustered over random (target {CLUSTERED_AT_MOST:.2}), mixed over\n\
         uniform lists of the same work (target {MIXED_AT_MOST:.2}). err: largest error over its tolerance, below 1 is right. Tiles: ~ nearest line of the\n\
         table, * default, ^ text not committed, _p persistent, = as before it.\n\
         Below a row its peers: TF fwd|bwd, and ours over theirs.\n",
        m.gpu,
        m.driver,
        m.compiler,
        m.clocks,
        m.date,
        bench.kernels,
        bench.served_by,
        DETERMINISTIC_AT_MOST.must,
        DETERMINISTIC_AT_MOST.aim,
    );
    let mut rows = vec![HEADER.map(str::to_string).to_vec()];
    rows.extend(bench.rows().map(line));
    let mut lines = align(&rows).into_iter();
    let _ = write!(out, "\n{}", lines.next().unwrap_or_default());
    for section in &bench.sections {
        let _ = writeln!(out, "\n{}", section.title);
        for (row, text) in section.rows.iter().zip(lines.by_ref()) {
            let _ = writeln!(out, "{text}");
            for peer in &row.peers {
                let _ = writeln!(out, "  {}", beside(peer, row));
            }
        }
        for failure in failures(section) {
            let _ = writeln!(out, "{failure}");
        }
    }
    out += &selections(&bench.selections);
    for peer in &bench.other_peers {
        let _ = writeln!(
            out,
            "no row of ours: {} h{} {} d{} kept {:.1}",
            peer.name,
            peer.h,
            tokens(peer.s),
            peer.d,
            100.0 * peer.keep
        );
    }
    out
}

/// A line for each shape and block size, and why those failed that did.
fn selections(rows: &[SelectionRow]) -> String {
    let mut out = String::new();
    let mut failed = Vec::new();
    for rows in rows.chunk_by(|a, b| shape(a) == shape(b)) {
        let words: Vec<String> = rows
            .iter()
            .map(|row| {
                let budget = if row.budget == "top_k" { String::new() } else { format!(" {}", row.budget) };
                let op = if row.op() == "kv_select" { " rows" } else { "" };
                let us = match &row.result {
                    Selected::Measured { timing, .. } => {
                        let mark = row.target.map(|t| mark_of_less(timing.median_us / 1e3, &t));
                        format!("{:.0}{}", timing.median_us, mark.map_or(String::new(), String::from))
                    }
                    Selected::Failed { outcome, message } => {
                        failed.push(format!("{outcome}: {}: {}", row.kernel, reason(message)));
                        outcome.to_uppercase()
                    }
                    Selected::NotMeasured => "none yet".into(),
                };
                let target = row.target.map(|t| format!(" ({}/{})", 1e3 * t.must, 1e3 * t.aim));
                format!("{}{budget}{op} {us}{}", row.rule, target.unwrap_or_default())
            })
            .collect();
        let (heads, seqlen, (q, k)) = shape(&rows[0]);
        let _ = writeln!(out, "h{heads} {} {q}x{k}: {}", tokens(seqlen), words.join(", "));
    }
    failed.sort();
    failed.dedup();
    failed.iter().for_each(|line| out += &format!("{line}\n"));
    match out.is_empty() {
        true => out,
        false => format!("\n{SELECTIONS}: us (target); rows: kv_select, else kv_select_fine\n{out}"),
    }
}

fn shape(row: &SelectionRow) -> (u32, u32, (u16, u16)) {
    (row.num_heads, row.seqlen, row.block)
}

fn milliseconds(us: f64) -> String {
    match us / 1e3 {
        ms if ms >= 10.0 => format!("{ms:.1}"),
        ms if ms >= 1.0 => format!("{ms:.2}"),
        ms => format!("{ms:.3}"),
    }
}

fn markdown_pass(cell: &Cell) -> String {
    match cell {
        Cell::Measured { timing, tf, .. } => format!("{} ({tf:.0})", milliseconds(timing.median_us)),
        Cell::Failed { outcome, .. } => outcome.clone(),
        Cell::NotMeasured { .. } => "not measured".into(),
        Cell::NoKernel => "no kernel".into(),
    }
}

/// Lines of at most 120 characters.
fn wrap(text: &str) -> String {
    let mut out = String::new();
    let mut length = 0;
    for word in text.split(' ') {
        if length > 0 && length + 1 + word.chars().count() > 120 {
            out.push('\n');
            length = 0;
        } else if length > 0 {
            out.push(' ');
            length += 1;
        }
        out += word;
        length += word.chars().count();
    }
    out + "\n"
}

/// The tables as Markdown, one a section; rows the run has nothing of are left out.
pub fn markdown(bench: &Tables) -> String {
    let m = &bench.machine;
    let intro = format!(
        "{}, driver {}, NVRTC {}, {} under load, {}; kernels `{}`, served by {}. bf16, batch 1, medians; TFLOP/s (TF) count \
         the pairs kept. Targets are of an H100: at least / hoped for. cuDNN is PyTorch's scaled_dot_product_attention on the \
         same GPU; the speed-up is its dense forward + backward over ours, lists given, and over the whole step, selection and \
         inversion included. Every kernel timed was compared with \
         the f64 oracle on the inputs it was timed on.",
        m.gpu, m.driver, m.compiler, m.clocks, m.date, bench.kernels, bench.served_by
    );
    let mut out = wrap(&intro);
    for section in &bench.sections {
        let rows: Vec<&TableRow> = section.rows.iter().filter(|row| row.is_told()).collect();
        if rows.iter().all(|row| row.forward.us().is_none() && row.backward.us().is_none()) {
            continue;
        }
        let compared = rows.iter().any(|row| row.against.is_some());
        let mut header = vec!["head_dim", "heads, tokens", "attention", "kept", "forward ms (TF)", "target"];
        header.extend(["backward ms (TF)", "target", "same bits ms (TF)", "selection + inversion ms"]);
        header.extend(["TF / cuDNN dense", "speed-up", "whole step"]);
        if compared {
            header.push("time / other lists");
        }
        header.push("peers, TF forward, backward");
        let note = if all_by_default(bench, section) {
            "\nThe table has no line for these lists: the shipped defaults serve.\n"
        } else {
            ""
        };
        let _ = write!(
            out,
            "\n**{}**\n{note}\n| {} |\n|{}\n",
            section.title,
            header.join(" | "),
            "---|".repeat(header.len())
        );
        for row in rows {
            let ratio = |values| pair(values).replace('|', ", ");
            let spaced = |target: Option<&Target>| targets(target).replace('/', " / ");
            let lists_ms = row.lists_us().map_or(String::new(), milliseconds);
            let peers: Vec<String> = row
                .peers
                .iter()
                .map(|peer| {
                    let whole = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.0}"));
                    format!("{} {}, {}", peer.name, whole(peer.fwd_tf), whole(peer.bwd_tf))
                })
                .collect();
            let mut words = vec![
                row.head_dim.to_string(),
                format!("{}, {}", row.num_heads, tokens(row.seqlen)),
                name(row),
                if row.keep >= 1.0 { String::new() } else { format!("{:.1} %", 100.0 * row.keep) },
                markdown_pass(&row.forward),
                spaced(row.targets.as_ref().map(|g| &g.forward)),
                markdown_pass(&row.backward),
                spaced(row.targets.as_ref().map(|g| &g.backward)),
                markdown_pass(&row.deterministic),
                match &row.select_target {
                    Some(t) if !lists_ms.is_empty() => format!("{lists_ms} (target {} / {})", t.must, t.aim),
                    _ => lists_ms,
                },
                ratio(row.of_cudnn()),
                markdown_factor(row.speed_up(), row.speed_up_target.as_ref()),
                markdown_factor(row.step_speed_up(), row.step_target.as_ref()),
            ];
            if compared {
                let other = row.against.as_ref().map_or(String::new(), |a| format!(" ({})", a.lists));
                let ratio = ratio(row.of_other());
                words.push(if ratio.is_empty() { ratio } else { ratio + &other });
            }
            words.push(peers.join("; "));
            let _ = writeln!(out, "| {} |", words.join(" | "));
        }
    }
    out + &markdown_selections(&bench.selections)
}

/// Whether there is a table, and it has no line for anything measured of a section.
fn all_by_default(bench: &Tables, section: &Section) -> bool {
    let cells = section.rows.iter().flat_map(|row| [&row.forward, &row.backward, &row.deterministic]);
    let founds: Vec<&str> = cells
        .filter_map(|cell| match cell {
            Cell::Measured { found, .. } => Some(found.as_str()),
            _ => None,
        })
        .collect();
    !bench.served_by.starts_with("shipped defaults")
        && founds.iter().all(|found| found.starts_with("default"))
}

/// Selections as Markdown; nothing where none was measured.
fn markdown_selections(rows: &[SelectionRow]) -> String {
    let told: Vec<&SelectionRow> = rows.iter().filter(|row| row.result != Selected::NotMeasured).collect();
    if told.is_empty() {
        return String::new();
    }
    let mut out = format!(
        "\n**{SELECTIONS}**\n\n| heads, tokens | lists | scored by | budget | kernel | ms | target |\n|{}\n",
        "---|".repeat(7)
    );
    for row in told {
        let _ = writeln!(
            out,
            "| {}, {} | {}x{} | {} | {} | {} | {} | {} |",
            row.num_heads,
            tokens(row.seqlen),
            row.block.0,
            row.block.1,
            row.rule,
            row.budget,
            row.op(),
            match &row.result {
                Selected::Measured { timing, .. } => milliseconds(timing.median_us),
                Selected::Failed { outcome, .. } => outcome.clone(),
                Selected::NotMeasured => "not measured".into(),
            },
            row.target.map_or(String::new(), |t| format!("{} / {}", t.must, t.aim)),
        );
    }
    out
}

/// The document with the tables in the place its marks name, and the record's path (relative to the document) in the first
/// mark; a document that is absent is made of the tables alone.
///
/// # Errors
/// [`TuneError::Document`]: no marks, or one without the other.
pub fn place(path: &Path, document: Option<&str>, record: &str, tables: &str) -> Result<String, TuneError> {
    let whole = format!("{BEGIN} {record} -->\n{tables}{END}\n");
    let Some(document) = document else { return Ok(whole) };
    let missing = || TuneError::Document { path: path.to_path_buf() };
    let begin = document.find(BEGIN).ok_or_else(missing)?;
    let length = document[begin..].find(END).ok_or_else(missing)?;
    let rest = document[begin + length + END.len()..].trim_start_matches('\n');
    let gap = if rest.is_empty() { "" } else { "\n" };
    Ok(format!("{}{whole}{gap}{rest}", &document[..begin]))
}

/// The record a document's mark names, and the tables between the marks.
pub fn placed(document: &str) -> Option<(&str, &str)> {
    let (_, rest) = document.split_once(BEGIN)?;
    let (record, rest) = rest.split_once("-->\n")?;
    let (tables, _) = rest.split_once(END)?;
    Some((record.trim(), tables))
}
