//! Owns what crosses crates: one corpus of attention cases, their oracle, and the runs of every engine against it.
//! It must never know how a kernel is written, and nothing may depend on it.
//! Start with `cases/attention.toml`, then [`corpus`], then [`engines`]; the `gpu` feature adds the kernels themselves.

pub mod corpus;
pub mod engines;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod inputs;
