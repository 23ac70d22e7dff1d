//! Every way tuning can fail as a whole, each with the next command. A kernel that fails is no error: it is a record.

use std::path::PathBuf;

/// Why a command of the tuner could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    /// The GPU, its driver, or a launch the tuner itself depends on.
    #[error(transparent)]
    Runtime(#[from] dsv_runtime::Error),
    /// NVRTC is missing or unusable.
    #[error(transparent)]
    Compile(#[from] dsv_compile::CompileError),
    /// A dispatch table that cannot be read.
    #[error(transparent)]
    Table(#[from] dsv_spec::TableError),
    /// An option with a value it cannot have.
    #[error(
        "{what} {value} is not possible\n  allowed: {allowed}\n  to see every option: dsv-autotune --help"
    )]
    Option {
        /// The option.
        what: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// A file that cannot be read or written.
    #[error("{what} {}: {why}\n  choose another directory with --out DIR, or free some space", path.display())]
    Io {
        /// What was tried, for example "cannot write".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        why: std::io::Error,
    },
    /// No run in the directory.
    #[error(
        "there is no run in {}: {} is missing\n  to start one: dsv-autotune --quick --out {}",
        dir.display(), crate::records::RUN_FILE, dir.display()
    )]
    NoRun {
        /// The directory.
        dir: PathBuf,
    },
    /// The description of the run cannot be read.
    #[error(
        "{} cannot be read: {why}\n  its records are untouched in {}\n  to start a new run beside them: dsv-autotune --quick",
        path.display(), crate::records::RECORD_FILE
    )]
    RunFile {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A run that was begun on another GPU.
    #[error(
        "the run in {} was begun on '{theirs}', this GPU is '{ours}'\n  to go on with it: use that GPU\n  to start a new one: dsv-autotune --out OTHER-DIR",
        dir.display()
    )]
    OtherGpu {
        /// The run's directory.
        dir: PathBuf,
        /// Its GPU.
        theirs: String,
        /// This GPU.
        ours: String,
    },
    /// Records that name no machine, so that no table can be made of them.
    #[error(
        "the run in {} has not reached a GPU yet, so there is nothing to reduce\n  to go on: dsv-autotune resume --out {}",
        dir.display(), dir.display()
    )]
    NotStarted {
        /// The run's directory.
        dir: PathBuf,
    },
    /// A ruler file that cannot be used, with every problem found in it.
    #[error(
        "the ruler file {} cannot be used:\n  {}\n  needed: a JSON list of {{name, h, s, d, keep, fwd_ms, bwd_ms, fwd_tf, bwd_tf}}, as a PyTorch run writes it",
        path.display(), problems.join("\n  ")
    )]
    Ruler {
        /// The file.
        path: PathBuf,
        /// Every problem.
        problems: Vec<String>,
    },
    /// A document that has no place for the tables.
    #[error(
        "{} has no place for the tables
  needed: a line that begins with '{}' and, below it, the line '{}'
  to write them into a file of their own: --markdown NEW-FILE",
        path.display(), crate::page::BEGIN, crate::page::END
    )]
    Document {
        /// The document.
        path: PathBuf,
    },
    /// A record of tables that cannot be read.
    #[error("{} is no record of tables: {why}\n  to make it from its run's records: dsv-autotune tables --out DIR", path.display())]
    BenchFile {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Nothing that was measured can be put into a table.
    #[error(
        "no kernel was both right and timed, so no table was written\n  {} failures; to see them: dsv-autotune report --out {}",
        failures, dir.display()
    )]
    NothingMeasured {
        /// The run's directory.
        dir: PathBuf,
        /// Failed records.
        failures: usize,
    },
    /// The measuring process ended again and again without getting anywhere.
    #[error("the measuring process ended without measuring anything: {how}\n  to try again: dsv-autotune resume --out {}", dir.display())]
    Worker {
        /// How it ended.
        how: String,
        /// The run's directory.
        dir: PathBuf,
    },
    /// A plot could not be drawn.
    #[error(
        "the plot '{title}' cannot be drawn: {why}\n  this is a defect of dsv-autotune; the records are untouched"
    )]
    Plot {
        /// Its title.
        title: String,
        /// Why.
        why: String,
    },
}

impl TuneError {
    pub(crate) fn option(what: &'static str, value: impl ToString, allowed: impl Into<String>) -> TuneError {
        TuneError::Option { what, value: value.to_string(), allowed: allowed.into() }
    }

    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> TuneError {
        let path = path.into();
        move |why| TuneError::Io { what, path, why }
    }
}
