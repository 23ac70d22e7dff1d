//! Owns the trainer: model, data, predictors, stages, checkpoints, reports, and the memory arena.
//! It must never know how a kernel is written or tuned: layers see only the ops of
//! [`engine::Engine`], and no op allocates or waits for the device.
//! Start with `engine/mod.rs` (the ops), then `model.rs` (the layers), then `train.rs` (the step).

pub mod config;
pub mod dispatch;
pub mod engine;
pub mod model;
pub mod params;
pub mod predictor;
pub mod rng;
pub mod stage;
