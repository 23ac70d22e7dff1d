//! Owns the tuner: which kernels are tried on which problems, how each is compiled, checked against the oracle and
//! timed, the records of that, and their reduction to a dispatch table and a report.
//! It must never know what a kernel computes inside or how the runtime launches it, and nothing may import it: what
//! it learns reaches the rest of the system only as a table under `generated/tables`.
//! Start at [`plan`] (what is measured), then [`reduce`] (how records become a table), then [`work`] (the GPU's part).

mod check;
mod error;
pub mod explain;
mod gpu;
pub mod listgen;
pub mod page;
pub mod plan;
mod plot;
mod progress;
pub mod records;
pub mod reduce;
pub mod report;
pub mod ruler;
pub mod selection;
pub mod service;
pub mod summary;
mod supervise;
pub mod tables;
mod tune;
mod watchdog;

pub use check::{KeySamples, RowSamples, SmallCase, normals};
pub use error::TuneError;
pub use supervise::{Supervised, supervise};
pub use tune::{Ended, work};
