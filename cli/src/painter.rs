//! A progress bar drawn by its own thread: a stalled terminal (Ctrl-S, an ssh session) must not
//! block the engine, whose guest may be suspended.

use std::fs::File;
use std::io::Seek as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use xsr_save_restore::progress::Progress;

use crate::terminal::Terminal;
use crate::watch::SessionProgress;

/// How long the bar may take to disappear. If it takes longer, its terminal has stalled.
const PATIENCE: Duration = Duration::from_millis(200);

/// What to draw.
#[derive(Debug, Default)]
struct State {
    /// The latest progress, the size of the image that is read, and what the session carries.
    news: Option<(Progress, Option<u64>, Option<SessionProgress>)>,
    /// No more progress will come.
    over: bool,
    /// The bar has been removed.
    gone: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Not inconsistent after a panic: every change is a single step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

/// A bar, and the thread that draws it.
#[derive(Debug)]
pub(crate) struct Painter {
    shared: Arc<Shared>,
}

impl Painter {
    /// A bar for `what`; `None` if stderr is not watched.
    pub(crate) fn start(terminal: &Terminal, what: &'static str) -> Option<Self> {
        if !terminal.is_watched() {
            return None;
        }
        let shared = Arc::<Shared>::default();
        let (terminal, theirs) = (terminal.clone(), Arc::clone(&shared));
        let started = thread::Builder::new()
            .name("xsr-painter".to_owned())
            .spawn(move || {
                draw(&terminal, what, &theirs);
                theirs.change(|state| state.gone = true);
            });
        match started {
            Ok(_) => Some(Self { shared }),
            Err(error) => {
                tracing::info!(%error, "no thread for a progress bar");
                None
            }
        }
    }

    /// Show the engine's progress.
    pub(crate) fn show(
        &self,
        progress: &Progress,
        bytes_total: Option<u64>,
        session: Option<SessionProgress>,
    ) {
        let news = Some((*progress, bytes_total, session));
        self.shared.change(|state| state.news = news);
    }

    /// Remove the bar. Returns whether it is gone: if not, its terminal has stalled.
    pub(crate) fn clear(self) -> bool {
        self.shared.end()
    }
}

/// Draw the progress that comes, at most once per [`FRAME`], and the last in any case.
fn draw(terminal: &Terminal, what: &'static str, shared: &Shared) {
    let bar = terminal.progress(what);
    loop {
        let nothing = |state: &mut State| state.news.is_none() && !state.over;
        let mut state = shared
            .changed
            .wait_while(shared.lock(), nothing)
            .unwrap_or_else(PoisonError::into_inner);
        let news = state.news.take();
        drop(state);
        match news {
            Some((progress, bytes_total, session)) => {
                bar.progress(&progress, bytes_total, session.as_ref());
            }
            None => return,
        }
        // Beyond some lines a second the bar leaves lines out by itself, even the last.
        shared.is_over_within(FRAME);
    }
}

/// Time between two lines of progress.
const FRAME: Duration = Duration::from_millis(50);

/// How long work takes before it gets a bar, if only a file's position shows its progress.
const BEFORE: Duration = Duration::from_secs(1);

/// Time between two looks at such a file.
const BETWEEN: Duration = Duration::from_millis(100);

/// A bar for work that reads or writes a file once, in order: its progress is the file's position.
/// The work itself is not involved. Removed on drop.
#[derive(Debug)]
pub(crate) struct Follower {
    shared: Arc<Shared>,
}

impl Follower {
    /// Follow reads from a file, or writes to it, from its current position on. `total` bytes, if
    /// that is known. `None` if stderr is not watched, or the file has no position.
    pub(crate) fn start(
        terminal: &Terminal,
        what: &'static str,
        file: &File,
        total: Option<u64>,
    ) -> Option<Self> {
        if !terminal.is_watched() {
            return None;
        }
        // The same open file, so that it shares the position.
        let mut file = file.try_clone().ok()?;
        let from = file.stream_position().ok()?;
        let position = move || Some(file.stream_position().ok()?.saturating_sub(from));
        Self::start_at(terminal, what, position, total)
    }

    /// As [`Follower::start`], with the progress returned by `position`, until that is `None`.
    pub(crate) fn start_at(
        terminal: &Terminal,
        what: &'static str,
        mut position: impl FnMut() -> Option<u64> + Send + 'static,
        total: Option<u64>,
    ) -> Option<Self> {
        if !terminal.is_watched() {
            return None;
        }
        let began = Instant::now();
        let shared = Arc::<Shared>::default();
        let (terminal, theirs) = (terminal.clone(), Arc::clone(&shared));
        let started = thread::Builder::new()
            .name("xsr-painter".to_owned())
            .spawn(move || {
                if !theirs.is_over_within(BEFORE) {
                    let bar = terminal.progress(what).since(began);
                    while let Some(at) = position() {
                        bar.bytes(unfinished(at, total), total);
                        if theirs.is_over_within(BETWEEN) {
                            break;
                        }
                    }
                }
                theirs.change(|state| state.gone = true);
            });
        match started {
            Ok(_) => Some(Self { shared }),
            Err(error) => {
                tracing::info!(%error, "no thread for a progress bar");
                None
            }
        }
    }
}

/// The progress of unfinished work, which is never 100%: what has been read is not yet done.
fn unfinished(at: u64, total: Option<u64>) -> u64 {
    total.map_or(at, |total| at.min(total.saturating_sub(1)))
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Shared {
    /// Whether the work is over, or becomes so within a time.
    fn is_over_within(&self, time: Duration) -> bool {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), time, |state| !state.over)
            .unwrap_or_else(PoisonError::into_inner);
        state.over
    }

    /// Remove the bar. Returns whether it is gone: if not, its terminal has stalled.
    fn end(&self) -> bool {
        self.change(|state| state.over = true);
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, |state| !state.gone)
            .unwrap_or_else(PoisonError::into_inner);
        state.gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_goes_on_is_not_all_done() {
        assert_eq!(unfinished(3, None), 3);
        assert_eq!(unfinished(3, Some(100)), 3);
        assert_eq!(unfinished(100, Some(100)), 99);
        assert_eq!(unfinished(0, Some(0)), 0);
    }
}
