//! A progress bar that a thread of its own draws: a terminal that takes nothing (Ctrl-S, an ssh
//! session that stalls) must not hold up the engine, whose guest may stand still.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use xsr_save_restore::progress::Progress;

use crate::terminal::Terminal;

/// How long the bar may take to go. One that does not has a terminal that has stalled.
const PATIENCE: Duration = Duration::from_millis(200);

/// What is to be drawn.
#[derive(Debug, Default)]
struct State {
    /// The latest news, and the octets of the image that is read.
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
    pub(crate) fn show(&self, progress: &Progress, octets_total: Option<u64>) {
        let news = Some((*progress, octets_total));
        self.shared.change(|state| state.news = news);
    }

    /// Have the bar go. Whether it has: if not, its terminal takes nothing.
    pub(crate) fn clear(self) -> bool {
        self.shared.change(|state| state.over = true);
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), PATIENCE, |state| !state.gone)
            .unwrap_or_else(PoisonError::into_inner);
        state.gone
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
            Some((progress, octets_total)) => bar.progress(&progress, octets_total),
            None => return,
        }
    }
}
