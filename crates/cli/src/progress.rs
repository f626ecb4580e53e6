//! Progress on stderr: a bar in a terminal, now and then a line elsewhere.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

static QUIET: AtomicBool = AtomicBool::new(false);
/// Without a terminal: first after this long, then at this interval.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Turns all progress off.
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Shows how far something has come.
pub struct Progress {
    bar: Option<ProgressBar>,
    last: Instant,
}

impl Progress {
    /// Nothing shows before the first update.
    pub fn new() -> Self {
        Progress { bar: None, last: Instant::now() }
    }

    /// `done` of `total` steps of a stage; a total of 0 is not known.
    pub fn update(&mut self, stage: &str, done: u64, total: u64) {
        if QUIET.load(Ordering::Relaxed) {
            return;
        }
        if !std::io::stderr().is_terminal() {
            if self.last.elapsed() >= LINE_EVERY {
                self.last = Instant::now();
                eprintln!("{stage}: {done} of {total}");
            }
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::new(total);
            let style = ProgressStyle::with_template("{msg:32!} [{bar:30}] {percent:>3} %  {elapsed} (left {eta})");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
            bar
        });
        if bar.message() != stage {
            bar.set_message(stage.to_string());
            bar.reset_elapsed();
            bar.reset_eta();
        }
        bar.set_length(total);
        bar.set_position(done);
    }

    /// Takes the bar away.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A line about something that takes a while and has no end in sight.
pub fn note(text: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        eprintln!("{text}");
    }
}
