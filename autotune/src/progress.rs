//! Progress with the time left: a bar on a terminal, else a line every few seconds.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Work done of work planned, in expected microseconds.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Option<Instant>,
    planned: f64,
    done: f64,
}

impl Progress {
    pub(crate) fn new(planned: f64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(1000);
            let style = ProgressStyle::with_template("{elapsed_precise} [{bar:32}] {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
            bar
        });
        Progress { bar, started: Instant::now(), last_line: None, planned: planned.max(1.0), done: 0.0 }
    }

    /// Seconds left, from the pace so far and the plan.
    fn left_s(&self) -> f64 {
        let share = (self.done / self.planned).clamp(0.0, 1.0);
        let planned_left = (self.planned - self.done).max(0.0) / 1e6;
        if share < 0.02 {
            return planned_left;
        }
        self.started.elapsed().as_secs_f64() / share * (1.0 - share)
    }

    /// Says what is done next.
    pub(crate) fn doing(&mut self, what: &str) {
        let share = (self.done / self.planned).clamp(0.0, 1.0);
        let text = format!("{:.0} %, about {:.0} s left: {what}", share * 100.0, self.left_s());
        match &self.bar {
            Some(bar) => {
                bar.set_position((share * 1000.0) as u64);
                bar.set_message(text);
            }
            None if self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY) => {
                eprintln!("[{:.0} s] {text}", self.started.elapsed().as_secs_f64());
                self.last_line = Some(Instant::now());
            }
            None => {}
        }
    }

    /// Counts expected microseconds as done.
    pub(crate) fn advance(&mut self, expected_us: f64) {
        self.done += expected_us;
    }

    /// Prints a line without disturbing the bar.
    pub(crate) fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
