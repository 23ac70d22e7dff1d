//! Runs the measuring process, and a new one for the rest when a kernel has taken it down.

use crate::error::TuneError;
use crate::records::RunDir;
use crate::tune::{EXIT_DEVICE_LOST, EXIT_TIME_LIMIT};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Kernels that may take the measuring process down before the run gives up.
const MOST_RESTARTS: usize = 20;
/// Seconds beyond the limit after which the measuring process is ended from outside.
const GRACE_S: f64 = 30.0;

/// How a supervised run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supervised {
    /// Everything planned is measured.
    Finished,
    /// The time limit came first; what is recorded stands.
    TimeLimit,
    /// The measuring process could not go on, and has said why and what to do on standard error.
    Failed,
}

/// Measures what the run in `dir` plans: starts this program's `worker` command, and starts it again when a kernel
/// has crashed the GPU's context or hung (which is on record then, and not tried again).
///
/// # Errors
/// [`TuneError::Worker`] when the process crashes without leaving anything on record.
pub fn supervise(program: &Path, dir: &RunDir, seconds: f64) -> Result<Supervised, TuneError> {
    let started = Instant::now();
    let mut measured = dir.read_records()?.records.len();
    let mut how = String::new();
    for _ in 0..=MOST_RESTARTS {
        let left = seconds - started.elapsed().as_secs_f64();
        if left <= 0.0 {
            return Ok(Supervised::TimeLimit);
        }
        let mut child = Command::new(program)
            .arg("worker")
            .args(["--time-limit", &format!("{left:.1}"), "--out"])
            .arg(dir.path())
            .spawn()
            .map_err(TuneError::io("cannot start", program))?;
        let kill_at = Instant::now() + Duration::from_secs_f64(left + GRACE_S);
        let status = loop {
            if let Some(status) = child.try_wait().map_err(TuneError::io("cannot wait for", program))? {
                break status;
            }
            if Instant::now() >= kill_at {
                let _ = child.kill();
                let _ = child.wait();
                return Ok(Supervised::TimeLimit);
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        match status.code() {
            Some(0) => return Ok(Supervised::Finished),
            Some(EXIT_TIME_LIMIT) => return Ok(Supervised::TimeLimit),
            // Crashed or hung: on to the rest, as long as there is something new on record.
            Some(EXIT_DEVICE_LOST) | None => {
                how = status.to_string();
                let now = dir.read_records()?.records.len();
                if now == measured {
                    break;
                }
                measured = now;
            }
            Some(_) => return Ok(Supervised::Failed),
        }
    }
    Err(TuneError::Worker { how, dir: dir.path().to_path_buf() })
}
