//! Owns the trainer: model, data, predictors, stages, checkpoints, reports, and the memory arena.
//! It must never know how a kernel is written or tuned: layers see only the ops of
//! [`engine::Engine`], and no op allocates or waits for the device.
//! Start with `engine/mod.rs` (the ops), then `model.rs` (the layers), then `train.rs` (the step).

pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod crosscheck;
pub mod data;
pub mod dispatch;
pub mod durable;
pub mod engine;
pub mod eval;
pub mod gif;
pub mod granularity;
pub mod import;
pub mod metrics;
pub mod model;
pub mod observe;
pub mod offload;
pub mod params;
pub mod plan;
pub mod predictor;
pub mod recorder;
pub mod report;
pub mod rng;
pub mod run;
pub mod sample;
pub mod stage;
pub mod tensors;
pub mod train;
