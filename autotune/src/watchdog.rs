//! Ends the process when a kernel hangs: the driver has no way to stop one, but ending its process has.

use crate::error::TuneError;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What is under way: when it must have ended, and the record lines to leave if it has not.
struct Armed {
    until: Instant,
    lines: String,
    what: String,
}

/// A thread that watches over GPU work. What it finds hanging is recorded, and the process aborted; its parent starts
/// a new one for the rest.
pub(crate) struct Watchdog {
    armed: Arc<Mutex<Option<Armed>>>,
}

/// Work under watch; dropping it ends the watch.
pub(crate) struct Watched<'a>(&'a Watchdog);

impl Watchdog {
    pub(crate) fn start(records: &Path) -> Result<Watchdog, TuneError> {
        let armed: Arc<Mutex<Option<Armed>>> = Arc::default();
        let (watched, records) = (Arc::downgrade(&armed), records.to_path_buf());
        let watch = move || {
            loop {
                std::thread::sleep(Duration::from_millis(100));
                let Some(armed) = watched.upgrade() else { return };
                let mut guard = armed.lock().unwrap_or_else(|e| e.into_inner());
                if guard.as_ref().is_some_and(|a| Instant::now() >= a.until)
                    && let Some(over) = guard.take()
                {
                    end(&records, &over);
                }
            }
        };
        std::thread::Builder::new()
            .name("watchdog".to_string())
            .spawn(watch)
            .map_err(TuneError::io("cannot start the thread that watches", PathBuf::from("the GPU")))?;
        Ok(Watchdog { armed })
    }

    /// Watches from now; after `limit` the process ends and `lines` are appended to the records.
    pub(crate) fn watch(&self, limit: Duration, what: &str, lines: String) -> Watched<'_> {
        let armed = Armed { until: Instant::now() + limit, lines, what: what.to_string() };
        *self.armed.lock().unwrap_or_else(|e| e.into_inner()) = Some(armed);
        Watched(self)
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        *self.0.armed.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }
}

/// Appends the lines and aborts: the driver's own clean-up at a regular exit would wait for the kernel.
fn end(records: &Path, over: &Armed) -> ! {
    let written = std::fs::OpenOptions::new()
        .append(true)
        .open(records)
        .and_then(|mut file| file.write_all(over.lines.as_bytes()).and_then(|()| file.sync_all()));
    eprintln!("{} did not end in time; recorded as a timeout, and going on in a new process", over.what);
    if let Err(e) = written {
        eprintln!("the timeout could not be recorded in {}: {e}", records.display());
    }
    std::process::abort()
}
