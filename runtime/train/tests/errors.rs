//! The text of every error of the trainer: what, with which value, what is allowed, the next command.

use dsv_train::checkpoint::CheckpointError;
use dsv_train::data::DataError;
use dsv_train::data::prepare::{PrepareError, PrepareReport};
use dsv_train::engine::{EngineError, Space};
use dsv_train::eval::EvalResult;
use dsv_train::import::ImportError;
use dsv_train::metrics::{EvalTriple, MetricsError};
use dsv_train::plan::MemoryError;
use dsv_train::run::RunError;
use dsv_train::tensors::TensorFileError;
use dsv_train::train::TrainError;
use std::io;

fn full() -> io::Error {
    io::Error::other("No space left on device")
}

#[test]
fn running() {
    let texts = [
        RunError::Write { path: "runs/a/config.toml".into(), source: full() }.to_string(),
        RunError::Occupied { path: "runs/a".into(), step: 100 }.to_string(),
        RunError::Until { until: 0, from: 0, steps: 200 }.to_string(),
        RunError::Until { until: 80, from: 100, steps: 200 }.to_string(),
        RunError::Until { until: 200, from: 200, steps: 200 }.to_string(),
        RunError::Foreign {
            path: "runs/a/checkpoints/step-00000100".into(),
            differences: vec!["model.layers: 3 -> 4".into()],
            config: "runs/a/config.toml".into(),
        }
        .to_string(),
        RunError::NoCheckpoint {
            path: "runs/a/checkpoints".into(),
            rejected: vec!["step-00000100: cut".into()],
        }
        .to_string(),
        MemoryError {
            space: Space::Device,
            needed_bytes: 100 << 30,
            free_bytes: 78 << 30,
            advice: vec!["--set train.recompute=true: 60.35 GiB, fits".into()],
        }
        .to_string(),
        MemoryError {
            space: Space::Host,
            needed_bytes: 240 << 30,
            free_bytes: 100 << 30,
            advice: vec!["--set train.moments=8bit: 60.35 GiB, fits".into()],
        }
        .to_string(),
        ImportError::Misfit {
            path: "dit.safetensors".into(),
            problems: vec!["patch.weight has shape [8, 96] in the model, [8, 95] in the file (a)".into()],
        }
        .to_string(),
        TrainError::NotFinite {
            steps: 5,
            step: 12,
            tensor: "gradient of block.1.qkv.weight".into(),
            good: 8,
        }
        .to_string(),
        TrainError::Tensor {
            path: "step-00000100".into(),
            name: "weight.patch".into(),
            problem: "has shape [2], this run needs [3]".into(),
        }
        .to_string(),
        TrainError::State { path: "step-00000100".into(), problem: "missing field `stages`".into() }
            .to_string(),
        EngineError::NoDevice { index: 1, reason: "the driver shows 1".into() }.to_string(),
        EngineError::Reserve { needed_bytes: 1 << 40, reason: "8000000000 bytes are free".into() }
            .to_string(),
        EngineError::ReserveHost { needed_bytes: 1 << 38, reason: "cuMemHostAlloc: out of memory".into() }
            .to_string(),
        EngineError::Flag { op: "kv_select".into(), reason: "a selection score is NaN".into() }.to_string(),
        EngineError::Device("cuLaunchKernel of x: NAME (1): words".into()).to_string(),
        MetricsError::Io { path: "runs/a/metrics.jsonl".into(), source: full() }.to_string(),
        MetricsError::Line { path: "runs/a/metrics.jsonl".into(), line: 7, reason: "EOF".into() }.to_string(),
    ];
    insta::assert_snapshot!(texts.join("\n\n"));
}

#[test]
fn files() {
    let texts = [
        CheckpointError::Write {
            path: "checkpoints/step-00000200".into(),
            source: full(),
            last_good: Some("checkpoints/step-00000100".into()),
        }
        .to_string(),
        CheckpointError::Write { path: "checkpoints/step-00000100".into(), source: full(), last_good: None }
            .to_string(),
        CheckpointError::Invalid {
            path: "checkpoints/step-00000100".into(),
            reason: "state.json is cut".into(),
        }
        .to_string(),
        CheckpointError::List { path: "checkpoints".into(), source: io::Error::other("denied") }.to_string(),
        TensorFileError::Open { path: "a.safetensors".into(), source: io::Error::other("denied") }
            .to_string(),
        TensorFileError::Length { path: "a.safetensors".into(), expected: 100, found: 99 }.to_string(),
        TensorFileError::Length { path: "a.safetensors".into(), expected: 100, found: 101 }.to_string(),
        TensorFileError::Header { path: "a.safetensors".into(), reason: "no JSON".into() }.to_string(),
        DataError::NoShards { path: "latents".into(), detail: String::new() }.to_string(),
        DataError::Shard { reason: "a.safetensors holds no latents".into(), next: "make it again".into() }
            .to_string(),
        DataError::TooFew { total: 4, validation: 8 }.to_string(),
    ];
    insta::assert_snapshot!(texts.join("\n\n"));
}

#[test]
fn preparing_and_pairing() {
    let result = |losses: &[f64]| EvalResult {
        triples: losses.iter().map(|&loss| EvalTriple { clip: "c".into(), t: 0.5, loss }).collect(),
        step: 100,
        sparse_share: 0.0,
        fingerprint: "a".into(),
    };
    let texts = [
        PrepareError::Argument { argument: "--frames", value: "0".into(), allowed: "1 and more".into() }
            .to_string(),
        PrepareError::NoFfmpeg { program: "ffmpeg".into(), source: io::Error::other("not found") }
            .to_string(),
        PrepareError::Input { path: "clips".into(), source: io::Error::other("not found") }.to_string(),
        PrepareError::Text { path: "a.txt".into(), reason: "it is empty".into() }.to_string(),
        PrepareError::Occupied { path: "latents".into(), count: 3 }.to_string(),
        PrepareError::Write { path: "latents/0.safetensors".into(), source: full() }.to_string(),
        PrepareError::Nothing {
            report: PrepareReport {
                skipped: vec![("a.mp4".into(), "3 frames".into())],
                ..PrepareReport::default()
            },
            frames: 16,
        }
        .to_string(),
        result(&[1.0]).paired(&result(&[1.0, 2.0])).unwrap_err().to_string(),
    ];
    insta::assert_snapshot!(texts.join("\n\n"));
}
