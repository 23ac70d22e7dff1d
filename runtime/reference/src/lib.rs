//! This crate owns the meaning of every op of the system on the CPU: plain f64 loops that are the oracle,
//! f32 versions on `gemm` and `rayon` that the trainer uses without a GPU, and low-precision models of the
//! kernels' rounding points from which tolerances come. It must never know how a kernel is generated, launched,
//! tuned or scheduled, and it touches no file, clock, environment or driver. Start at [`attention`], whose
//! contract of shapes and lists ([`lists`]) every other module shares.

pub mod attention;
pub mod compare;
pub mod coverage;
pub mod element;
pub mod layers;
pub mod lists;
pub mod matrix;
pub mod predictor;
pub mod profile;
pub mod rng;
pub mod select;
