//! What a run found, as short tables for a terminal.

use crate::records::{outcome_message, outcome_name};
use crate::reduce::{Best, Row};
use crate::ruler::Peer;
use comfy_table::{CellAlignment, Table, presets};
use dsv_spec::{AttnOp, KernelSpec, Outcome, TuneRecord};
use serde::Serialize;

fn table(header: &[&str], right_from: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.to_vec());
    for column in right_from..header.len() {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A share of pairs in percent.
fn percent(kept: f64) -> String {
    if kept >= 1.0 { "100 %".to_string() } else { format!("{:.1} %", kept * 100.0) }
}

/// 32768 as `32k`.
pub(crate) fn tokens(seqlen: u32) -> String {
    if seqlen >= 1024 && seqlen.is_multiple_of(1024) {
        format!("{}k", seqlen / 1024)
    } else {
        seqlen.to_string()
    }
}

fn time_and_tf(ms: Option<f64>, tf: Option<f64>) -> String {
    match (ms, tf) {
        (Some(ms), Some(tf)) => format!("{} ({tf:.0})", milliseconds(ms)),
        (Some(ms), None) => milliseconds(ms),
        _ => "-".to_string(),
    }
}

fn milliseconds(ms: f64) -> String {
    if ms >= 10.0 { format!("{ms:.1}") } else { format!("{ms:.3}") }
}

/// The tile part of a kernel's name, `m128n128_g1c2s2x1`: what distinguishes candidates.
pub(crate) fn tile(spec: &KernelSpec) -> String {
    match spec {
        KernelSpec::Attn(s) => {
            let t = s.tile();
            format!("m{}n{}c{}s{}", t.block_m, t.block_n, t.consumers, t.stages)
        }
        other => other.name(),
    }
}

fn tile_of(best: Option<&Best>) -> String {
    best.map_or("-".to_string(), |b| tile(&b.kernel))
}

/// Our winners beside the peers that did the same work. Ratios are ours over the peer's effective TFLOP/s: above 1 we
/// are faster.
pub fn comparison(rows: &[Row], peers: &[Peer]) -> String {
    let mut out = table(
        &[
            "kernel",
            "shape (H, S, D)",
            "kept",
            "lists",
            "fwd ms (TF)",
            "bwd ms (TF)",
            "select + invert ms",
            "ours / peer",
        ],
        4,
    );
    for row in rows {
        let p = &row.problem;
        let shape = format!("{}, {}, {}", p.num_heads, tokens(p.seqlen_kv), p.head_dim);
        let ms = |best: &Option<Best>| best.as_ref().map(|b| b.timing.median_us / 1e3);
        out.add_row(vec![
            format!(
                "dsv {} [{} | {}]",
                row.block_label(),
                tile_of(row.forward.as_ref()),
                tile_of(row.backward.as_ref())
            ),
            shape.clone(),
            percent(row.kept()),
            row.lists.clone(),
            time_and_tf(ms(&row.forward), row.tflops(AttnOp::Fwd)),
            time_and_tf(ms(&row.backward), row.tflops(AttnOp::Bwd)),
            row.lists_us().map_or("-".to_string(), |us| milliseconds(us / 1e3)),
            String::new(),
        ]);
        for peer in peers.iter().filter(|peer| peer.matches(&row.problem, &row.lists)) {
            let ratio = |ours: Option<f64>, theirs: Option<f64>| match (ours, theirs) {
                (Some(ours), Some(theirs)) => format!("{:.2}x", ours / theirs),
                _ => "-".to_string(),
            };
            out.add_row(vec![
                format!("  {}", peer.name),
                shape.clone(),
                percent(peer.keep),
                String::new(),
                time_and_tf(peer.fwd_ms, peer.fwd_tf),
                time_and_tf(peer.bwd_ms, peer.bwd_tf),
                String::new(),
                format!(
                    "{} | {}",
                    ratio(row.tflops(AttnOp::Fwd), peer.fwd_tf),
                    ratio(row.tflops(AttnOp::Bwd), peer.bwd_tf)
                ),
            ]);
        }
    }
    out.to_string()
}

/// One line a record, the fastest first within each case: what `bench` prints.
pub fn records(records: &[TuneRecord]) -> String {
    let mut out =
        table(&["kernel", "shape (B, H, S, D)", "kept", "lists", "ms (TF)", "spread", "error / allowed"], 4);
    let mut sorted: Vec<&TuneRecord> = records.iter().collect();
    let median = |r: &TuneRecord| match &r.outcome {
        Outcome::Ok { timing, .. } => timing.median_us,
        _ => f64::INFINITY,
    };
    sorted.sort_by(|a, b| {
        let key = |r: &TuneRecord| {
            let p = &r.problem;
            (
                p.seqlen_kv,
                p.head_dim,
                p.lists.block_size(),
                p.max_selected,
                r.lists.clone(),
                p.op,
                r.spec.op(),
            )
        };
        key(a).cmp(&key(b)).then(median(a).total_cmp(&median(b)))
    });
    let mut failures = Vec::new();
    for record in sorted {
        let p = &record.problem;
        let (time, spread, error) = match &record.outcome {
            Outcome::Ok { timing, error_ratio } => {
                let attention = matches!(record.spec, KernelSpec::Attn(_));
                let tf = attention.then(|| crate::plan::flops(p, &record.lists) / timing.median_us / 1e6);
                (
                    time_and_tf(Some(timing.median_us / 1e3), tf),
                    format!("{:.1} %", 100.0 * timing.spread_us / timing.median_us),
                    format!("{error_ratio:.2}"),
                )
            }
            other => {
                failures.push(format!("{}: {}", record.spec, outcome_message(other).unwrap_or_default()));
                (outcome_name(other).to_string(), String::new(), String::new())
            }
        };
        out.add_row(vec![
            record.spec.name(),
            format!("{}, {}, {}, {}", p.batch, p.num_heads, tokens(p.seqlen_kv), p.head_dim),
            percent(crate::listgen::kept(p, &record.lists)),
            record.lists.clone(),
            time,
            spread,
            error,
        ]);
    }
    failures.sort();
    failures.dedup();
    let mut text = out.to_string();
    for failure in failures {
        text += &format!("\n{failure}");
    }
    text
}

/// One measured kernel of `bench`, as its JSON says it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BenchRow<'a> {
    /// The kernel.
    pub kernel: KernelSpec,
    /// Heads.
    pub h: u32,
    /// Tokens.
    pub s: u32,
    /// Columns of Q, K, V.
    pub d: u16,
    /// Share of KV blocks kept.
    pub keep: f64,
    /// How lists were made.
    pub lists: &'a str,
    /// `ok`, or how it failed.
    pub outcome: &'a str,
    /// Median milliseconds.
    pub ms: Option<f64>,
    /// 10th to 90th percentile, milliseconds.
    pub spread_ms: Option<f64>,
    /// Effective TFLOP/s on the pairs kept; for attention only.
    pub tf: Option<f64>,
    /// Largest error over its tolerance.
    pub error_ratio: Option<f64>,
    /// Why it failed.
    pub message: Option<&'a str>,
}

/// The records as a JSON list of [`BenchRow`].
pub fn json(records: &[TuneRecord]) -> String {
    let rows: Vec<BenchRow<'_>> = records
        .iter()
        .map(|r| {
            let p = &r.problem;
            let (timing, error_ratio) = match &r.outcome {
                Outcome::Ok { timing, error_ratio } => (Some(timing), Some(*error_ratio)),
                _ => (None, None),
            };
            let attention = matches!(r.spec, KernelSpec::Attn(_));
            BenchRow {
                kernel: r.spec,
                h: p.num_heads,
                s: p.seqlen_kv,
                d: p.head_dim,
                keep: crate::listgen::kept(p, &r.lists),
                lists: &r.lists,
                outcome: outcome_name(&r.outcome),
                ms: timing.map(|t| t.median_us / 1e3),
                spread_ms: timing.map(|t| t.spread_us / 1e3),
                tf: timing.filter(|_| attention).map(|t| crate::plan::flops(p, &r.lists) / t.median_us / 1e6),
                error_ratio,
                message: outcome_message(&r.outcome),
            }
        })
        .collect();
    let lines: Vec<String> =
        rows.iter().map(|row| serde_json::to_string(row).expect("plain data serialises")).collect();
    format!("[\n{}\n]\n", lines.join(",\n"))
}
