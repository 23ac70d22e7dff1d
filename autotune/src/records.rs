//! The directory of a run: `run.json` says what is measured and where, `records.jsonl` holds one measurement a line
//! and is only ever appended to, `kernels.json` holds what the compiler said of each kernel.

use crate::error::TuneError;
use crate::plan::{Contest, Plan};
use dsv_spec::{KernelSpec, Outcome, Problem, TableMeta, TuneRecord};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What is measured, and where.
pub const RUN_FILE: &str = "run.json";
/// One measurement a line.
pub const RECORD_FILE: &str = "records.jsonl";
/// What the compiler said of each kernel.
pub const KERNEL_FILE: &str = "kernels.json";

/// The contents of [`RUN_FILE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The plan.
    pub plan: Plan,
    /// Ordinal of the GPU.
    pub device: usize,
    /// The GPU and its software; absent until the run has reached one.
    pub machine: Option<TableMeta>,
}

/// Resources of one kernel as the compiler reports them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelNote {
    /// Registers a thread at launch.
    pub registers: u32,
    /// Bytes spilled.
    pub spill_bytes: u32,
    /// Stack bytes a thread.
    pub stack_bytes: u32,
    /// Dynamic shared memory of a CTA, bytes.
    pub smem_bytes: u32,
    /// blake3 of source and headers.
    pub source_hash: String,
}

/// What makes two measurements the same one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    spec: KernelSpec,
    problem: Problem,
    lists: String,
    source_hash: String,
}

impl Key {
    /// Of a measurement yet to be made.
    pub fn new(spec: KernelSpec, problem: Problem, lists: &str, source_hash: &str) -> Key {
        Key { spec, problem, lists: lists.to_string(), source_hash: source_hash.to_string() }
    }

    /// Of a measurement made.
    pub fn of(record: &TuneRecord) -> Key {
        Key::new(record.spec, record.problem, &record.lists, &record.source_hash)
    }
}

/// The kernels of a contest that are not on record with the text they have now. A failure on record is not tried again.
pub fn todo(contest: &Contest, done: &HashSet<Key>, hash: impl Fn(&KernelSpec) -> String) -> Vec<KernelSpec> {
    let problem = contest.case.problem(contest.step.op());
    let missing = |spec: &&KernelSpec| {
        !done.contains(&Key::new(**spec, problem, contest.case.kind.name(), &hash(spec)))
    };
    contest.specs.iter().filter(missing).copied().collect()
}

/// A line of the record file that is no record. It stays where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// 1-based.
    pub line: usize,
    /// Why it cannot be read.
    pub why: String,
    /// Its beginning.
    pub text: String,
}

impl std::fmt::Display for BadLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{RECORD_FILE} line {} is no record and is left out (it stays in the file): {}: {}",
            self.line, self.why, self.text
        )
    }
}

/// The records of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Records {
    /// In the order they were made.
    pub records: Vec<TuneRecord>,
    /// Lines that could not be read.
    pub bad: Vec<BadLine>,
}

impl Records {
    /// Reads JSONL; a line that is no record is named, and the others are kept.
    pub fn parse(text: &str) -> Records {
        let mut out = Records::default();
        for (i, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            match serde_json::from_str::<TuneRecord>(line) {
                Ok(record) => out.records.push(record),
                Err(e) => out.bad.push(BadLine {
                    line: i + 1,
                    why: e.to_string(),
                    text: line.chars().take(60).collect(),
                }),
            }
        }
        out
    }

    /// What has been measured.
    pub fn keys(&self) -> HashSet<Key> {
        self.records.iter().map(Key::of).collect()
    }

    /// Records that are no success.
    pub fn failures(&self) -> usize {
        self.records.iter().filter(|r| !matches!(r.outcome, Outcome::Ok { .. })).count()
    }
}

/// The word of an outcome.
pub fn outcome_name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Ok { .. } => "ok",
        Outcome::Infeasible { .. } => "infeasible",
        Outcome::Compile { .. } => "compile",
        Outcome::Launch { .. } => "launch",
        Outcome::Timeout { .. } => "timeout",
        Outcome::Wrong { .. } => "wrong",
    }
}

/// The reason of an outcome that is no success.
pub fn outcome_message(outcome: &Outcome) -> Option<&str> {
    match outcome {
        Outcome::Ok { .. } => None,
        Outcome::Infeasible { message }
        | Outcome::Compile { message }
        | Outcome::Launch { message }
        | Outcome::Timeout { message }
        | Outcome::Wrong { message } => Some(message),
    }
}

/// One line of a record file, with its end.
pub(crate) fn to_line(record: &TuneRecord) -> String {
    let mut line = serde_json::to_string(record).expect("plain data serialises");
    line.push('\n');
    line
}

/// A record file open for appending.
pub struct RecordFile {
    file: File,
    path: PathBuf,
}

impl RecordFile {
    /// Opens or makes it. A last line that was cut short by an interruption is ended, so that the next record does
    /// not run into it.
    ///
    /// # Errors
    /// What the system answers.
    pub fn open(path: &Path) -> Result<RecordFile, TuneError> {
        let fail = |why| TuneError::Io { what: "cannot open", path: path.to_path_buf(), why };
        let mut file = OpenOptions::new().create(true).append(true).read(true).open(path).map_err(fail)?;
        if file.metadata().map_err(fail)?.len() > 0 {
            let mut last = [0u8];
            file.seek(SeekFrom::End(-1)).map_err(fail)?;
            file.read_exact(&mut last).map_err(fail)?;
            if last != *b"\n" {
                file.write_all(b"\n").map_err(fail)?;
            }
        }
        Ok(RecordFile { file, path: path.to_path_buf() })
    }

    /// Appends one record as one write.
    ///
    /// # Errors
    /// What the system answers, a full disk above all.
    pub fn append(&mut self, record: &TuneRecord) -> Result<(), TuneError> {
        let result = self.file.write_all(to_line(record).as_bytes()).and_then(|()| self.file.flush());
        result.map_err(TuneError::io("cannot append to", &self.path))
    }
}

/// Writes a file aside and renames it into place, so that a reader sees the old or the new one, whole.
///
/// # Errors
/// What the system answers; the old file is untouched.
pub fn write_atomic(path: &Path, text: &str) -> Result<(), TuneError> {
    let fail = |why| TuneError::Io { what: "cannot write", path: path.to_path_buf(), why };
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::create_dir_all(dir).map_err(fail)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let aside = path.with_file_name(name);
    let result = File::create(&aside)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&aside, path));
    if result.is_err() {
        let _ = fs::remove_file(&aside);
    }
    result.map_err(fail)
}

/// The directory of a run.
#[derive(Clone, Debug)]
pub struct RunDir {
    dir: PathBuf,
}

impl RunDir {
    /// Names a directory; nothing is touched.
    pub fn new(dir: &Path) -> RunDir {
        RunDir { dir: dir.to_path_buf() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Begins a run. Records of an earlier one are kept under the next free name `records-N.jsonl`, which is returned.
    ///
    /// # Errors
    /// What the system answers.
    pub fn begin(&self, run: &Run) -> Result<Option<PathBuf>, TuneError> {
        fs::create_dir_all(&self.dir).map_err(TuneError::io("cannot make", &self.dir))?;
        let records = self.file(RECORD_FILE);
        let mut kept = None;
        if records.exists() {
            let free = (1..)
                .map(|n| self.file(&format!("records-{n}.jsonl")))
                .find(|path| !path.exists())
                .expect("there are more numbers than files");
            fs::rename(&records, &free).map_err(TuneError::io("cannot rename", &records))?;
            kept = Some(free);
        }
        self.write_run(run)?;
        File::create(&records).map_err(TuneError::io("cannot make", &records))?;
        Ok(kept)
    }

    /// Writes [`RUN_FILE`].
    ///
    /// # Errors
    /// What the system answers.
    pub fn write_run(&self, run: &Run) -> Result<(), TuneError> {
        let mut text = serde_json::to_string_pretty(run).expect("plain data serialises");
        text.push('\n');
        write_atomic(&self.file(RUN_FILE), &text)
    }

    /// Reads [`RUN_FILE`].
    ///
    /// # Errors
    /// [`TuneError::NoRun`], [`TuneError::RunFile`].
    pub fn read_run(&self) -> Result<Run, TuneError> {
        let path = self.file(RUN_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(TuneError::NoRun { dir: self.dir.clone() });
            }
            Err(why) => return Err(TuneError::Io { what: "cannot read", path, why }),
        };
        serde_json::from_str(&text).map_err(|e| TuneError::RunFile { path, why: e.to_string() })
    }

    /// Reads the records; an absent file holds none.
    ///
    /// # Errors
    /// What the system answers.
    pub fn read_records(&self) -> Result<Records, TuneError> {
        let path = self.file(RECORD_FILE);
        match fs::read(&path) {
            // Bytes that are no text make their line a bad one, not the file.
            Ok(bytes) => Ok(Records::parse(&String::from_utf8_lossy(&bytes))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Records::default()),
            Err(why) => Err(TuneError::Io { what: "cannot read", path, why }),
        }
    }

    /// Reads [`KERNEL_FILE`]; absent or unreadable, it holds nothing: it only decorates the report.
    pub fn read_kernels(&self) -> BTreeMap<String, KernelNote> {
        let text = fs::read_to_string(self.file(KERNEL_FILE)).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// Adds to [`KERNEL_FILE`].
    ///
    /// # Errors
    /// What the system answers.
    pub fn add_kernels(&self, notes: BTreeMap<String, KernelNote>) -> Result<(), TuneError> {
        let mut all = self.read_kernels();
        all.extend(notes);
        let text = serde_json::to_string_pretty(&all).expect("plain data serialises");
        write_atomic(&self.file(KERNEL_FILE), &text)
    }
}

/// Today, ISO 8601, UTC.
pub fn today() -> String {
    let seconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    date_of((seconds / 86_400) as i64)
}

/// The day `days` after 1970-01-01, ISO 8601. Counts years from 1 March, so that leap days end them.
fn date_of(days: i64) -> String {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (days, date) in
            [(0, "1970-01-01"), (59, "1970-03-01"), (11_016, "2000-02-29"), (20_454, "2026-01-01")]
        {
            assert_eq!(date_of(days), date);
        }
    }

    #[test]
    fn atomic_write_replaces_and_leaves_nothing_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/table.json");
        write_atomic(&path, "one").unwrap();
        write_atomic(&path, "two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let error = write_atomic(&path.join("below-a-file"), "x").unwrap_err().to_string();
        assert!(error.contains("cannot write") && error.contains("--out DIR"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
    }
}
