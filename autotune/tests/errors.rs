//! The text of every error of the tuner: what, with which value, what is allowed, the next command.

use dsv_autotune::TuneError;

#[test]
fn every_text() {
    let dir = || "run".into();
    let errors = [
        TuneError::Option { what: "--heads", value: "0".into(), allowed: "1 or more".into() },
        TuneError::Io {
            what: "cannot write",
            path: "run/records.jsonl".into(),
            why: std::io::Error::other("No space left on device"),
        },
        TuneError::NoRun { dir: dir() },
        TuneError::RunFile { path: "run/run.json".into(), why: "EOF while parsing".into() },
        TuneError::OtherGpu { dir: dir(), theirs: "NVIDIA H100".into(), ours: "NVIDIA H200".into() },
        TuneError::NotStarted { dir: dir() },
        TuneError::Ruler { path: "peers.json".into(), problems: vec!["row 2: no fwd_ms".into()] },
        TuneError::Document { path: "README.md".into() },
        TuneError::BenchFile { path: "run/bench.json".into(), why: "EOF while parsing".into() },
        TuneError::NothingMeasured { dir: dir(), failures: 12 },
        TuneError::Worker { how: "signal 11".into(), dir: dir() },
        TuneError::Plot { title: "speed".into(), why: "no points".into() },
    ];
    let texts: Vec<String> = errors.iter().map(TuneError::to_string).collect();
    insta::assert_snapshot!(texts.join("\n\n"));
}
