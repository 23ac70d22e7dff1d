//! What peers measured on the same GPU: the rows a PyTorch run of cuDNN, FlashAttention and others writes.

use crate::error::TuneError;
use crate::listgen::{self, ListKind};
use dsv_spec::Problem;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One measured peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name; `clustered` in it says what its lists were, `64x64` or `BSA 64` its block size.
    pub name: String,
    /// Heads.
    pub h: u32,
    /// Tokens.
    pub s: u32,
    /// Columns of Q, K, V.
    pub d: u16,
    /// Share of pairs kept; 1 when dense.
    pub keep: f64,
    /// Forward, milliseconds.
    #[serde(default)]
    pub fwd_ms: Option<f64>,
    /// Backward, milliseconds.
    #[serde(default)]
    pub bwd_ms: Option<f64>,
    /// Forward, effective TFLOP/s on the pairs kept.
    #[serde(default)]
    pub fwd_tf: Option<f64>,
    /// Backward, likewise.
    #[serde(default)]
    pub bwd_tf: Option<f64>,
}

/// How far the kept shares of two rows may differ to be compared: 2 % of all pairs.
pub const KEEP_TOLERANCE: f64 = 0.02;

impl Peer {
    /// Whether this peer did the same work as ours on lists of a kind: shape, kept share, block size, and the kind of
    /// lists. Lists of mixed heads no peer has.
    pub fn matches(&self, p: &Problem, lists: &str) -> bool {
        let kept = listgen::kept(p, lists);
        let of_kind = self.name.contains("clustered") == (lists == ListKind::Clustered.name());
        (self.h, self.s, self.d, 1) == (p.num_heads, p.seqlen_kv, p.head_dim, p.batch)
            && self.is_dense() == p.lists.is_dense()
            && (self.keep - kept).abs() <= KEEP_TOLERANCE
            && (self.is_dense()
                || (of_kind && lists != ListKind::Mixed.name() && self.fits(p.lists.block_size())))
    }

    /// Whether this is cuDNN's dense attention of a problem's shape.
    pub fn is_cudnn_dense(&self, p: &Problem) -> bool {
        (self.h, self.s, self.d, 1) == (p.num_heads, p.seqlen_kv, p.head_dim, p.batch)
            && self.is_dense()
            && self.name.to_lowercase().contains("cudnn")
    }

    /// To the nanosecond and a tenth of a TFLOP/s, so that it survives JSON unchanged.
    pub fn rounded(&self) -> Peer {
        let to = |x: Option<f64>, steps: f64| x.map(|x| (x * steps).round() / steps);
        Peer {
            keep: (self.keep * 1e6).round() / 1e6,
            fwd_ms: to(self.fwd_ms, 1e6),
            bwd_ms: to(self.bwd_ms, 1e6),
            fwd_tf: to(self.fwd_tf, 10.0),
            bwd_tf: to(self.bwd_tf, 10.0),
            ..self.clone()
        }
    }

    fn is_dense(&self) -> bool {
        self.keep >= 1.0 - 1e-9
    }

    /// The block size its name tells: `64x64`, or a number after `BSA`.
    fn block_size(&self) -> Option<(u16, u16)> {
        let words: Vec<&str> = self.name.split_whitespace().collect();
        let pair = |word: &&str| {
            let (q, k) = word.split_once('x')?;
            Some((q.parse().ok()?, k.parse().ok()?))
        };
        let after_bsa = || {
            let at = words.iter().position(|word| *word == "BSA")?;
            let side: u16 = words.get(at + 1)?.parse().ok()?;
            Some((side, side))
        };
        words.iter().find_map(pair).or_else(after_bsa)
    }

    /// Whether it stands beside a row of this block size. One larger than (128, 128) stands beside that.
    fn fits(&self, (query_group, kv_block): (u16, u16)) -> bool {
        self.block_size()
            .is_none_or(|(q, k)| (q.min(128), k.min(128)) == (query_group.min(128), kv_block.min(128)))
    }
}

/// Reads the file of a PyTorch run.
///
/// # Errors
/// [`TuneError::Io`]; [`TuneError::Ruler`] with every row that is not one.
pub fn read(path: &Path) -> Result<Vec<Peer>, TuneError> {
    let text = std::fs::read_to_string(path).map_err(TuneError::io("cannot read the ruler file", path))?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<Vec<Peer>, TuneError> {
    let fail = |problems: Vec<String>| TuneError::Ruler { path: path.to_path_buf(), problems };
    let values: Vec<serde_json::Value> =
        serde_json::from_str(text).map_err(|e| fail(vec![format!("it is no JSON list: {e}")]))?;
    let (mut peers, mut problems) = (Vec::new(), Vec::new());
    for (i, value) in values.into_iter().enumerate() {
        match serde_json::from_value::<Peer>(value) {
            Err(e) => problems.push(format!("row {}: {e}", i + 1)),
            Ok(peer) if !(peer.keep > 0.0 && peer.keep <= 1.0) => {
                problems.push(format!("row {} ({}): keep {} is not in (0, 1]", i + 1, peer.name, peer.keep));
            }
            Ok(peer) => {
                let times = [
                    ("fwd_ms", peer.fwd_ms),
                    ("bwd_ms", peer.bwd_ms),
                    ("fwd_tf", peer.fwd_tf),
                    ("bwd_tf", peer.bwd_tf),
                ];
                for (name, value) in times {
                    if value.is_some_and(|v| !(v.is_finite() && v > 0.0)) {
                        problems.push(format!("row {} ({}): {name} is not positive", i + 1, peer.name));
                    }
                }
                peers.push(peer);
            }
        }
    }
    if problems.is_empty() { Ok(peers) } else { Err(fail(problems)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listgen::ListKind;
    use crate::plan::Case;
    use dsv_spec::AttnOp;

    #[test]
    fn peers_match_the_same_work_only() {
        let text = r#"[
            {"name": "sdpa cudnn", "h": 16, "s": 32768, "d": 128, "keep": 1.0, "fwd_ms": 13.9, "bwd_ms": 39.4, "fwd_tf": 634, "bwd_tf": 558},
            {"name": "BSA 128 clustered", "h": 16, "s": 32768, "d": 128, "keep": 0.0977, "fwd_ms": 1.4, "bwd_ms": null, "fwd_tf": 611, "bwd_tf": null},
            {"name": "BSA 128 random", "h": 16, "s": 32768, "d": 128, "keep": 0.0977, "fwd_ms": 1.5, "fwd_tf": 584}
        ]"#;
        let peers = parse(Path::new("peers.json"), text).unwrap();
        assert_eq!(peers[1].bwd_ms, None);
        let named = |case: Case| -> Vec<&str> {
            let problem = case.problem(AttnOp::Fwd);
            peers.iter().filter(|p| p.matches(&problem, case.kind.name())).map(|p| p.name.as_str()).collect()
        };
        let sparse = |keep, kind| Case::sparse(128, 16, 32768, (128, 128), keep, kind);
        assert_eq!(named(Case::dense(128, 16, 32768)), ["sdpa cudnn"]);
        assert_eq!(named(sparse(0.1, ListKind::Random)), ["BSA 128 random"]);
        assert_eq!(named(sparse(0.1, ListKind::Clustered)), ["BSA 128 clustered"]);
        let small = Case::sparse(128, 16, 32768, (64, 64), 0.1, ListKind::Random);
        assert!(named(small).is_empty(), "blocks of 128 are not blocks of 64");
        assert!(named(sparse(0.15, ListKind::Random)).is_empty());
        assert!(named(sparse(0.99, ListKind::Random)).is_empty(), "nearly dense is not dense");
        assert!(named(Case::dense(64, 16, 32768)).is_empty());
    }

    #[test]
    fn every_bad_row_is_named() {
        let text = r#"[{"name": "x", "h": 1, "s": 2, "d": 3, "keep": 2.0},
                       {"name": "y", "h": -1, "s": 2, "d": 3, "keep": 0.5},
                       {"name": "z", "h": 1, "s": 2, "d": 3, "keep": 0.5, "fwd_ms": -4}]"#;
        let error = parse(Path::new("peers.json"), text).unwrap_err().to_string();
        for words in ["peers.json", "row 1 (x): keep 2", "row 2:", "row 3 (z): fwd_ms", "needed:"] {
            assert!(error.contains(words), "{words} is not in: {error}");
        }
        let error = parse(Path::new("peers.json"), "{}").unwrap_err().to_string();
        assert!(error.contains("no JSON list"), "{error}");
        let error = read(Path::new("/nonexistent/peers.json")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/peers.json"), "{error}");
    }
}
