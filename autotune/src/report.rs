//! The HTML report of a run: one file that needs nothing else, light and dark.

use crate::error::TuneError;
use crate::plan::flops;
use crate::plot::{Plot, Series, html};
use crate::records::{BadLine, KernelNote, outcome_message, outcome_name};
use crate::reduce::{Row, rows};
use crate::ruler::Peer;
use crate::summary::tokens;
use dsv_spec::{AttnOp, Crossover, KernelSpec, Outcome, TableMeta, TuneRecord};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// What a report shows.
pub struct Report<'a> {
    /// Where it was measured.
    pub meta: &'a TableMeta,
    /// Everything measured.
    pub records: &'a [TuneRecord],
    /// Where sparse begins to beat dense.
    pub crossovers: &'a [Crossover],
    /// What the compiler said of each kernel.
    pub kernels: &'a BTreeMap<String, KernelNote>,
    /// Peers on the same GPU.
    pub peers: &'a [Peer],
    /// Lines of the record file that are none.
    pub bad: &'a [BadLine],
    /// What the reduction had to say.
    pub notes: &'a [String],
}

/// Text as HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2330;--paper:#fdfdfc;--line:#d9dbe0;--soft:#f2f3f5;--bad:#b3372f}\
@media(prefers-color-scheme:dark){:root{--ink:#dfe3ea;--paper:#14171c;--line:#343a44;--soft:#1d2229;--bad:#f08a80}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1200px;margin:2em auto;padding:0 1em}\
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid var(--line)}\
figure{display:inline-block;margin:0 1em 1.5em 0;vertical-align:top;max-width:100%}figcaption{font-weight:600}\
svg{max-width:100%;height:auto;color:var(--ink)}\
ul.legend{list-style:none;margin:.2em 0;padding:0;font-size:12px;max-width:560px}ul.legend li{display:inline-block;margin-right:1.2em}\
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}th,td{padding:2px 9px;text-align:right;white-space:nowrap}\
th{border-bottom:1px solid var(--line)}td:first-child,th:first-child,td.l,th.l{text-align:left}tr:nth-child(even){background:var(--soft)}\
td.m{white-space:pre-wrap;text-align:left;min-width:26em;font-size:12px}.bad{color:var(--bad)}code{font-size:12px}summary{cursor:pointer;margin:.4em 0}";

impl Report<'_> {
    /// The whole page.
    ///
    /// # Errors
    /// [`TuneError::Plot`].
    pub fn html(&self) -> Result<String, TuneError> {
        let rows = rows(self.records);
        let mut out = String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
        let m = self.meta;
        let _ = write!(
            out,
            "<meta name=\"viewport\" content=\"width=device-width\"><title>dsv-autotune: {gpu}</title><style>{STYLE}</style></head>\n\
             <body><h1>Attention kernels on {gpu}</h1>\n<p>{} | {} | driver {} | NVRTC {} | {} under load</p>\n",
            escape(&m.date),
            m.arch,
            escape(&m.driver),
            escape(&m.compiler),
            escape(&m.clocks),
            gpu = escape(&m.gpu),
        );
        let failures = self.records.iter().filter(|r| !matches!(r.outcome, Outcome::Ok { .. })).count();
        let _ = writeln!(
            out,
            "<p>{} measurements, {failures} failures. bf16, batch 1, non-causal. TF: effective TFLOP/s on the pairs kept, \
             4 H S<sup>2</sup> D kept forward, 2.5 times that backward. Every timed kernel was compared with the f64 \
             oracle, whole on a small problem and in samples on the timed one.</p>",
            self.records.len()
        );
        for line in self.bad {
            let _ = writeln!(out, "<p class=\"bad\">{}</p>", escape(&line.to_string()));
        }
        for note in self.notes {
            let _ = writeln!(out, "<p>{}</p>", escape(note));
        }
        out += "<h2>Speed over sparsity</h2>\n";
        out += &self.over_sparsity(&rows)?;
        out += "<h2>Speed over length</h2>\n";
        out += &self.over_length(&rows)?;
        out += "<h2>Where sparse beats dense</h2>\n";
        out += &self.crossover_plots()?;
        out += &self.crossover_table();
        out += "<h2>Winners</h2>\n";
        out += &self.winners(&rows);
        out += "<h2>Kernels</h2>\n";
        out += &self.kernel_table();
        out += "<h2>Every measurement</h2>\n";
        out += &self.every_record();
        out += "</body></html>\n";
        Ok(out)
    }

    /// Series of rows: dense as a line at every sparsity, one line a block size and kind of lists, peers as marks.
    fn over_sparsity(&self, rows: &[Row]) -> Result<String, TuneError> {
        let mut out = String::new();
        let shapes: BTreeSet<(u32, u16, u32)> = rows
            .iter()
            .filter(|r| !r.problem.lists.is_dense())
            .map(|r| (r.problem.seqlen_kv, r.problem.head_dim, r.problem.num_heads))
            .collect();
        for (op, word) in [(AttnOp::Fwd, "forward"), (AttnOp::Bwd, "backward")] {
            for &(seqlen, head_dim, heads) in shapes.iter().rev() {
                let here: Vec<&Row> = rows
                    .iter()
                    .filter(|r| {
                        (r.problem.seqlen_kv, r.problem.head_dim, r.problem.num_heads)
                            == (seqlen, head_dim, heads)
                    })
                    .collect();
                let mut series: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
                let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
                for row in here.iter().filter(|r| !r.problem.lists.is_dense()) {
                    if let Some(tf) = row.tflops(op) {
                        let percent = 100.0 * (1.0 - row.kept());
                        (low, high) = (low.min(percent), high.max(percent));
                        series
                            .entry(format!("{}, {}", row.block_label(), row.lists))
                            .or_default()
                            .push((percent, tf));
                    }
                }
                if series.is_empty() {
                    continue;
                }
                let mut lines = Vec::new();
                if let Some(tf) =
                    here.iter().filter(|r| r.problem.lists.is_dense()).find_map(|r| r.tflops(op))
                {
                    lines.push(Series {
                        name: "dense".into(),
                        points: vec![(low, tf), (high, tf)],
                        marks_only: false,
                    });
                }
                for (name, mut points) in series {
                    points.sort_by(|a, b| a.0.total_cmp(&b.0));
                    let marks_only = points.len() == 1;
                    lines.push(Series { name, points, marks_only });
                }
                for peer in self.peers.iter().filter(|p| (p.s, p.d, p.h) == (seqlen, head_dim, heads)) {
                    let tf = if op == AttnOp::Fwd { peer.fwd_tf } else { peer.bwd_tf };
                    if let Some(tf) = tf {
                        let percent = 100.0 * (1.0 - peer.keep);
                        let points =
                            if percent == 0.0 { vec![(low, tf), (high, tf)] } else { vec![(percent, tf)] };
                        let marks_only = points.len() == 1;
                        lines.push(Series { name: peer.name.clone(), points, marks_only });
                    }
                }
                out += &html(&Plot {
                    title: format!("{word}, H {heads}, S {}, D {head_dim}", tokens(seqlen)),
                    x: "KV skipped, %",
                    y: "TFLOP/s on the pairs kept",
                    x_text: |v| format!("{v:.0}"),
                    y_text: |v| format!("{v:.0}"),
                    x_labels: 10,
                    y_from_zero: true,
                    series: lines,
                })?;
            }
        }
        Ok(out)
    }

    /// Milliseconds of one call (selection included) over length.
    fn over_length(&self, rows: &[Row]) -> Result<String, TuneError> {
        let mut out = String::new();
        let dims: BTreeSet<u16> = rows.iter().map(|r| r.problem.head_dim).collect();
        for head_dim in dims.into_iter().rev() {
            let mut series: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
            for row in rows.iter().filter(|r| r.problem.head_dim == head_dim && r.lists != "clustered") {
                let dense = row.problem.lists.is_dense();
                if let Some(us) = row.total_us().filter(|_| dense || row.sparsity == 90) {
                    let name = if dense {
                        "dense".to_string()
                    } else {
                        format!("{}, {} % skipped, selection included", row.block_label(), row.sparsity)
                    };
                    // A head's time, so that lengths measured with different numbers of heads line up.
                    let p = &row.problem;
                    let per_head = us / 1e3 / (p.num_heads as f64 * p.batch as f64);
                    series.entry(name).or_default().push(((p.seqlen_kv as f64).log2(), per_head.log10()));
                }
            }
            let series = series
                .into_iter()
                .map(|(name, mut points)| {
                    points.sort_by(|a, b| a.0.total_cmp(&b.0));
                    Series { name, marks_only: points.len() == 1, points }
                })
                .collect();
            out += &html(&Plot {
                title: format!("forward + backward of one head, D {head_dim}"),
                x: "tokens",
                y: "milliseconds a head",
                x_text: |v| tokens(v.exp2().round() as u32),
                y_text: |v| format!("{:.2}", 10f64.powf(v)),
                x_labels: 6,
                y_from_zero: false,
                series,
            })?;
        }
        Ok(out)
    }

    fn crossover_plots(&self) -> Result<String, TuneError> {
        let mut out = String::new();
        let kinds: BTreeSet<(u16, u16, u16)> =
            self.crossovers.iter().map(|c| (c.head_dim, c.query_group, c.kv_block)).collect();
        for (head_dim, query_group, kv_block) in kinds.into_iter().rev() {
            let here = self
                .crossovers
                .iter()
                .filter(|c| (c.head_dim, c.query_group, c.kv_block) == (head_dim, query_group, kv_block));
            let mut series: Vec<Series> = here
                .map(|c| Series {
                    name: format!("{} tokens", tokens(c.seqlen)),
                    points: c.sparse_us.iter().map(|(s, us)| (*s as f64, c.dense_us / us)).collect(),
                    marks_only: c.sparse_us.len() == 1,
                })
                .collect();
            let xs = || series.iter().flat_map(|s| s.points.iter().map(|p| p.0));
            let (low, high) = (xs().fold(f64::INFINITY, f64::min), xs().fold(f64::NEG_INFINITY, f64::max));
            if low.is_finite() {
                series.push(Series {
                    name: "as fast as dense".into(),
                    points: vec![(low, 1.0), (high, 1.0)],
                    marks_only: false,
                });
            }
            out += &html(&Plot {
                title: format!("D {head_dim}, query group {query_group}, KV block {kv_block}"),
                x: "KV skipped, %",
                y: "times as fast as dense, selection included",
                x_text: |v| format!("{v:.0}"),
                y_text: |v| format!("{v:.1}"),
                x_labels: 10,
                y_from_zero: true,
                series,
            })?;
        }
        Ok(out)
    }

    fn crossover_table(&self) -> String {
        let mut out = String::from(
            "<div class=\"wide\"><table><tr><th>D</th><th>query group</th><th>KV block</th><th>tokens</th><th>heads</th>\
             <th>dense ms</th><th>selection + inversion ms</th><th>sparse ms (skipped %)</th><th>sparse wins above</th>\
             <th>lists and workspace MB</th></tr>\n",
        );
        for c in self.crossovers {
            let sparse: Vec<String> =
                c.sparse_us.iter().map(|(s, us)| format!("{:.3} ({s})", us / 1e3)).collect();
            let above = c.crossover.map_or("never measured so".to_string(), |s| format!("{s:.0} %"));
            let _ = writeln!(
                out,
                "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{:.3}</td><td>{:.3}</td><td>{}</td><td>{above}</td><td>{:.0}</td></tr>",
                c.head_dim,
                c.query_group,
                c.kv_block,
                c.seqlen,
                c.num_heads,
                c.dense_us / 1e3,
                c.select_us / 1e3,
                sparse.join(", "),
                c.workspace_bytes as f64 / 1e6
            );
        }
        out + "</table></div>\n"
    }

    fn winners(&self, rows: &[Row]) -> String {
        let mut out = String::from(
            "<div class=\"wide\"><table><tr><th>kernel</th><th class=\"l\">shape (H, S, D)</th><th>kept %</th><th class=\"l\">lists</th>\
             <th>ms</th><th>TF</th><th>runner-up ms</th><th>tried</th><th>failed</th><th class=\"l\">peers (TF, ours / theirs)</th></tr>\n",
        );
        for row in rows {
            for (op, best) in [(AttnOp::Fwd, &row.forward), (AttnOp::Bwd, &row.backward)] {
                let (Some(best), Some(tf)) = (best, row.tflops(op)) else { continue };
                let p = &row.problem;
                let peers: Vec<String> = self
                    .peers
                    .iter()
                    .filter(|peer| peer.matches(&row.problem, &row.lists))
                    .filter_map(|peer| {
                        let theirs = if op == AttnOp::Fwd { peer.fwd_tf } else { peer.bwd_tf }?;
                        Some(format!("{} ({theirs:.0}, {:.2}x)", escape(&peer.name), tf / theirs))
                    })
                    .collect();
                let _ = writeln!(
                    out,
                    "<tr><td><code>{}</code></td><td class=\"l\">{}, {}, {}</td><td>{:.1}</td><td class=\"l\">{}</td><td>{:.3}</td><td>{tf:.0}</td>\
                     <td>{}</td><td>{}</td><td>{}</td><td class=\"l\">{}</td></tr>",
                    best.kernel,
                    p.num_heads,
                    p.seqlen_kv,
                    p.head_dim,
                    100.0 * row.kept(),
                    escape(&row.lists),
                    best.timing.median_us / 1e3,
                    best.runner_up_us.map_or("-".to_string(), |us| format!("{:.3}", us / 1e3)),
                    best.tried,
                    best.failed,
                    peers.join(", ")
                );
            }
        }
        out + "</table></div>\n"
    }

    fn kernel_table(&self) -> String {
        let mut out = String::from(
            "<div class=\"wide\"><table><tr><th>kernel</th><th>registers</th><th>spilled bytes</th><th>stack bytes</th>\
             <th>shared KB</th><th class=\"l\">source</th></tr>\n",
        );
        for (name, note) in self.kernels {
            let class = if note.spill_bytes > 0 { " class=\"bad\"" } else { "" };
            let _ = writeln!(
                out,
                "<tr><td><code>{}</code></td><td>{}</td><td{class}>{}</td><td>{}</td><td>{:.1}</td><td class=\"l\"><code>{}</code></td></tr>",
                escape(name),
                note.registers,
                note.spill_bytes,
                note.stack_bytes,
                note.smem_bytes as f64 / 1024.0,
                escape(note.source_hash.get(..12).unwrap_or(&note.source_hash))
            );
        }
        out + "</table></div>\n"
    }

    fn every_record(&self) -> String {
        type CaseKey<'a> = (u16, u32, (u16, u16), u8, &'a str);
        let mut by_case: BTreeMap<CaseKey<'_>, Vec<&TuneRecord>> = BTreeMap::new();
        for record in self.records {
            let p = &record.problem;
            by_case
                .entry((p.head_dim, p.seqlen_kv, p.lists.block_size(), record.sparsity, &record.lists))
                .or_default()
                .push(record);
        }
        let mut out = String::new();
        for ((head_dim, seqlen, (qg, kb), sparsity, lists), records) in by_case {
            let bad = records.iter().filter(|r| !matches!(r.outcome, Outcome::Ok { .. })).count();
            let what = if kb == 0 {
                "dense".to_string()
            } else {
                format!("query group {qg}, KV block {kb}, {sparsity} % skipped, {}", escape(lists))
            };
            let _ = writeln!(
                out,
                "<details{}><summary>D {head_dim}, S {}, {what}: {} kernels, {bad} failed</summary><div class=\"wide\"><table>\
                 <tr><th>kernel</th><th class=\"l\">outcome</th><th>ms</th><th>TF</th><th>spread %</th><th>samples</th>\
                 <th>error / allowed</th><th class=\"l\">reason</th></tr>",
                if bad > 0 { " open" } else { "" },
                tokens(seqlen),
                records.len()
            );
            for record in records {
                let numbers = match &record.outcome {
                    Outcome::Ok { timing, error_ratio } => {
                        let tf = match record.spec {
                            KernelSpec::Attn(_) => {
                                format!(
                                    "{:.0}",
                                    flops(&record.problem, &record.lists) / timing.median_us / 1e6
                                )
                            }
                            _ => String::new(),
                        };
                        format!(
                            "<td>{:.4}</td><td>{tf}</td><td>{:.1}</td><td>{}</td><td>{error_ratio:.2}</td>",
                            timing.median_us / 1e3,
                            100.0 * timing.spread_us / timing.median_us,
                            timing.samples
                        )
                    }
                    _ => "<td></td><td></td><td></td><td></td><td></td>".to_string(),
                };
                let class = if outcome_message(&record.outcome).is_some() { "l bad" } else { "l" };
                let _ = writeln!(
                    out,
                    "<tr><td><code>{}</code></td><td class=\"{class}\">{}</td>{numbers}<td class=\"m\">{}</td></tr>",
                    record.spec,
                    outcome_name(&record.outcome),
                    escape(outcome_message(&record.outcome).unwrap_or_default())
                );
            }
            out += "</table></div></details>\n";
        }
        out
    }
}
