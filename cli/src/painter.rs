//! A progress bar that a thread of its own draws: a terminal that takes nothing (Ctrl-S, an ssh
//! session that stalls) must not hold up the engine, whose guest may stand still.

use std::fs::File;
use std::io::Seek as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use xsr_save_restore::progress::Progress;

use crate::terminal::Terminal;

/// How long the bar may take to go. One that does not has a terminal that has stalled.
const PATIENCE: Duration = Duration::from_millis(200);

/// What is to be drawn.
#[derive(Debug, Default)]
struct State {
    /// The latest news, and the bytes of the image that is read.
    news: Option<(Progress, Option<u64>)>,
    /// No more will come.
    over: bool,
    /// The bar is no longer there.
    gone: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of it is a single step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

/// A bar, and who draws it.
#[derive(Debug)]
pub(crate) struct Painter {
    shared: Arc<Shared>,
}

impl Painter {
    /// A bar for `what`. `None` where nobody watches.
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

    /// The engine is so far.
    pub(crate) fn show(&self, progress: &Progress, bytes_total: Option<u64>) {
        let news = Some((*progress, bytes_total));
        self.shared.change(|state| state.news = news);
    }

    /// Have the bar go. Whether it has: if not, its terminal takes nothing.
    pub(crate) fn clear(self) -> bool {
        self.shared.end()
    }
}

/// Draw what comes, until no more will: the last of it, too.
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
            Some((progress, bytes_total)) => bar.progress(&progress, bytes_total),
            None => return,
        }
    }
}

/// How long work takes before it gets a bar, where nothing but a file says how far it is.
const BEFORE: Duration = Duration::from_secs(1);

/// Between two looks at such a file.
const BETWEEN: Duration = Duration::from_millis(100);

/// A bar for work that goes once through a file: it is as far as the file's position is. The work
/// knows nothing of it. Gone when dropped.
#[derive(Debug)]
pub(crate) struct Follower {
    shared: Arc<Shared>,
}

impl Follower {
    /// Follow what is read from a file, or written to it, on from where it stands; `total` bytes
    /// of it, if that is known. `None` where nobody watches, or the file has no position.
    pub(crate) fn start(
        terminal: &Terminal,
        what: &'static str,
        file: &File,
        total: Option<u64>,
    ) -> Option<Self> {
        if !terminal.is_watched() {
            return None;
        }
        // The same open file: its position is that of the one that is worked on.
        let mut file = file.try_clone().ok()?;
        let from = file.stream_position().ok()?;
        let position = move || Some(file.stream_position().ok()?.saturating_sub(from));
        Self::start_at(terminal, what, position, total)
    }

    /// As [`Follower::start`], for work that is as far as `position` says, until that is `None`.
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

/// How far work is that goes on: what has been read is not all done.
fn unfinished(at: u64, total: Option<u64>) -> u64 {
    total.map_or(at, |total| at.min(total.saturating_sub(1)))
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Shared {
    /// Whether it is over, or becomes so within a time.
    fn is_over_within(&self, time: Duration) -> bool {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), time, |state| !state.over)
            .unwrap_or_else(PoisonError::into_inner);
        state.over
    }

    /// Have the bar go. Whether it has: if not, its terminal takes nothing.
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
