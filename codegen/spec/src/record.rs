use crate::{KernelSpec, Problem};
use serde::{Deserialize, Serialize};

/// The times of one measured spec, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Median over `samples`.
    pub median_us: f64,
    /// Distance between the 10th and 90th percentile.
    pub spread_us: f64,
    /// Timed launches.
    pub samples: u32,
}

/// How one measurement ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Correct and timed.
    Ok {
        /// The times.
        timing: Timing,
        /// Largest error over its tolerance; below 1.
        error_ratio: f64,
    },
    /// No kernel can be written.
    Infeasible {
        /// Why.
        message: String,
    },
    /// The compiler refused, or the result spills or serialises.
    Compile {
        /// The compiler's words.
        message: String,
    },
    /// The launch failed.
    Launch {
        /// The driver's words.
        message: String,
    },
    /// It did not end in time.
    Timeout {
        /// After how long.
        message: String,
    },
    /// It ran and its result is not right.
    Wrong {
        /// The worst coordinate.
        message: String,
    },
}

/// One measurement of one spec on one problem, failures included. One line of a record file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TuneRecord {
    /// The kernel.
    pub spec: KernelSpec,
    /// What it was run on.
    pub problem: Problem,
    /// Percent of KV skipped in the lists it was run on (one of the sparsity buckets).
    pub sparsity: u8,
    /// How lists were made: `dense`, `random`, `clustered` or `mixed`.
    pub lists: String,
    /// blake3 of the kernel's source and headers.
    pub source_hash: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
}
