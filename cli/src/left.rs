//! What this process would leave behind if it ended now: files under temporary names, guests
//! that it has suspended or half made.
//!
//! Everything that must not stay as it is registers here while that is so. The signal thread
//! (`interrupt.rs`) reads it:
//!
//! | there is | a signal that asks to stop |
//! |---|---|
//! | work on a guest | lets that work break off in good order |
//! | nothing but files | removes them and ends the process at once |
//! | nothing at all | ends the process, as it would without us |
//! | nothing any more: the command is over | does nothing |

pub(crate) mod guest;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use xsr_save_restore::storage::file::{Cleanup, Registered};

/// How long a guest may take to say how it is, before the process ends without it.
const DESCRIBE_WAIT: Duration = Duration::from_secs(1);

/// One thing that would be left.
#[derive(Clone)]
enum Thing {
    /// A file under a temporary name, and the name that it is to get.
    File { temporary: PathBuf, to: PathBuf },
    /// A directory that is to go, with all that is in it.
    Directory(PathBuf),
    /// A file that is complete, and has its name.
    Complete(PathBuf),
    /// Work that has to be broken off in good order.
    Work(Arc<Describe>),
}

/// How a guest is at this moment.
type Describe = dyn Fn() -> Option<State> + Send + Sync;

/// How a guest would be left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// In words, with what to do about it.
    pub(crate) words: String,
    /// Whether it may run at the other end, too ([`crate::exit::Code::Undecided`]).
    pub(crate) undecided: bool,
}

impl State {
    /// A state that leaves no doubt.
    pub(crate) fn plain(words: impl Into<String>) -> Self {
        Self {
            words: words.into(),
            undecided: false,
        }
    }
}

static THINGS: Mutex<Vec<(u64, Thing)>> = Mutex::new(Vec::new());
static NEXT: AtomicU64 = AtomicU64::new(0);
/// Whether this command writes anything.
static WRITES: AtomicBool = AtomicBool::new(false);
static OVER: AtomicBool = AtomicBool::new(false);

fn things() -> MutexGuard<'static, Vec<(u64, Thing)>> {
    THINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An entry; removed on drop.
#[derive(Debug)]
#[must_use = "dropping it says that the thing is gone"]
pub(crate) struct Left {
    number: u64,
}

impl Left {
    fn behind(thing: Thing) -> Self {
        Self::add(&mut things(), thing)
    }

    fn add(things: &mut Vec<(u64, Thing)>, thing: Thing) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        WRITES.store(true, Ordering::SeqCst);
        things.push((number, thing));
        Self { number }
    }

    /// A file that has a temporary name until it is complete, as `make` makes it; `path` is that
    /// name. No signal ends the process before it is on the list.
    ///
    /// # Errors
    ///
    /// Those of `make`.
    pub(crate) fn file<T, E>(
        to: &Path,
        make: impl FnOnce() -> Result<T, E>,
        path: impl FnOnce(&T) -> &Path,
    ) -> Result<(Self, T), E> {
        let mut things = things();
        let made = make()?;
        let thing = Thing::File {
            temporary: path(&made).to_owned(),
            to: to.to_owned(),
        };
        Ok((Self::add(&mut things, thing), made))
    }

    /// A directory that goes before the command ends.
    pub(crate) fn directory(path: &Path) -> Self {
        Self::behind(Thing::Directory(path.to_owned()))
    }

    /// Work that has to be broken off in good order, and leaves nothing to be described.
    pub(crate) fn work() -> Self {
        Self::guest(|| None)
    }

    /// Work on a guest. `describe` says how it is, on a thread of its own; `None` if there is
    /// nothing to say.
    pub(crate) fn guest(describe: impl Fn() -> Option<State> + Send + Sync + 'static) -> Self {
        Self::behind(Thing::Work(Arc::new(describe)))
    }

    /// The entry stays until the command is [`over`].
    pub(crate) fn until_the_end(self) {
        std::mem::forget(self);
    }

    /// Do what makes a file stay. No signal ends the process in between.
    ///
    /// # Errors
    ///
    /// Those of `keep`.
    pub(crate) fn settle<T, E>(self, keep: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let mut things = things();
        let kept = keep();
        let found = things.iter_mut().find(|(number, _)| *number == self.number);
        if let (Ok(_), Some((_, thing))) = (&kept, found)
            && let Thing::File { to, .. } = thing
        {
            *thing = Thing::Complete(std::mem::take(to));
            drop(things);
            self.until_the_end();
            return kept;
        }
        drop(things);
        kept
    }
}

/// The files under temporary names: each is on the list while it has one.
#[derive(Debug)]
pub(crate) struct Files;

impl Cleanup for Files {
    fn while_making(
        &self,
        to: &Path,
        make: &mut dyn FnMut() -> io::Result<PathBuf>,
    ) -> io::Result<Box<dyn Registered>> {
        let (left, _) = Left::file(to, make, |path| path)?;
        Ok(Box::new(left))
    }
}

impl Registered for Left {
    fn settle(self: Box<Self>, keep: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        Self::settle(*self, keep)
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        let mut things = things();
        let found = things.iter().position(|(number, _)| *number == self.number);
        let thing = found.map(|at| things.swap_remove(at));
        drop(things);
        // What describes a guest may hold its host: not under the lock.
        drop(thing);
    }
}

/// This command writes something: ended by a signal, it has failed.
pub(crate) fn writes() {
    WRITES.store(true, Ordering::SeqCst);
}

/// Whether it does.
pub(crate) fn is_writer() -> bool {
    WRITES.load(Ordering::SeqCst)
}

/// The command has done what it does: signals change nothing from now on.
pub(crate) fn over() {
    let mut things = things();
    OVER.store(true, Ordering::SeqCst);
    let over = std::mem::take(&mut *things);
    drop(things);
    // See `Left::drop`.
    drop(over);
}

/// Whether it has.
pub(crate) fn is_over() -> bool {
    OVER.load(Ordering::SeqCst)
}

/// Whether there is work that has to be broken off in good order.
pub(crate) fn is_work() -> bool {
    has_work(&things())
}

fn has_work(things: &[(u64, Thing)]) -> bool {
    things
        .iter()
        .any(|(_, thing)| matches!(thing, Thing::Work(_)))
}

/// Remove the files there are and end the process with `end`, which gets what there is to say
/// about them. Not where there is work on a guest, or the command is over: then this returns.
/// Until the process has ended, nothing can be put on the list or made to stay.
pub(crate) fn end_at_once(end: impl FnOnce(Vec<String>)) {
    let things = things();
    if has_work(&things) || is_over() {
        return;
    }
    end(removed(&things));
    drop(things);
}

fn removed(things: &[(u64, Thing)]) -> Vec<String> {
    let mut said = Vec::new();
    for (_, thing) in things {
        match thing {
            Thing::File { temporary, to } => said.push(match fs::remove_file(temporary) {
                Ok(()) => format!("{} was not written", to.display()),
                Err(error) => format!("{} is left behind ({error})", temporary.display()),
            }),
            Thing::Directory(path) => {
                if let Err(error) = fs::remove_dir_all(path) {
                    said.push(format!("{} is left behind ({error})", path.display()));
                }
            }
            Thing::Complete(path) => said.push(format!("{} is complete", path.display())),
            Thing::Work(_) => {}
        }
    }
    said
}

/// What is left when the process ends where it stands, and whether a guest may run at two ends.
pub(crate) fn describe() -> (Vec<String>, bool) {
    let things: Vec<Thing> = things().iter().map(|(_, thing)| thing.clone()).collect();
    let (mut said, mut undecided) = (Vec::new(), false);
    for thing in things {
        match thing {
            Thing::File { temporary, .. } => {
                let temporary = temporary.display();
                said.push(format!("{temporary} is not complete: remove it"));
            }
            Thing::Directory(path) => said.push(format!("{} is left: remove it", path.display())),
            Thing::Complete(path) => said.push(format!("{} is complete", path.display())),
            Thing::Work(describe) => match ask(describe) {
                Some(Some(state)) => {
                    undecided |= state.undecided;
                    said.push(state.words);
                }
                Some(None) => {}
                None => said.push("the domain's state could not be asked: look at it".to_owned()),
            },
        }
    }
    (said, undecided)
}

/// What it says, if it answers: what is stuck may hold what it asks for.
fn ask(describe: Arc<Describe>) -> Option<Option<State>> {
    let (tell, told) = mpsc::sync_channel(1);
    let thread = thread::Builder::new().spawn(move || {
        if tell.send(describe()).is_err() {
            tracing::debug!("the domain's state came too late");
        }
    });
    thread.ok()?;
    told.recv_timeout(DESCRIBE_WAIT).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, because there is one list in a process.
    #[test]
    fn what_is_registered_is_removed_or_described() {
        let dir = tempfile::tempdir().expect("a directory");
        let [partial, whole] = ["partial", "whole"].map(|name| dir.path().join(name));
        let within = |said: &[String], what: &str| said.iter().any(|line| line.contains(what));
        fs::write(&partial, b"x").expect("a file");
        let make = || Ok::<_, ()>(partial.clone());
        let (file, _) = Left::file(&whole, make, |path| path).expect("an entry");
        let guest = Left::guest(|| Some(State::plain("web is suspended")));
        assert!(is_work() && is_writer());
        let (said, undecided) = describe();
        assert!(within(&said, "partial is not complete") && within(&said, "web is suspended"));
        assert!(!undecided);
        drop(guest);
        assert!(!within(&describe().0, "web is suspended"));

        let doubtful = Left::guest(|| {
            Some(State {
                words: "x".to_owned(),
                undecided: true,
            })
        });
        assert!(describe().1);
        drop(doubtful);

        assert!(within(&removed(&things()), "whole was not written"));
        assert!(!partial.exists());
        fs::write(&partial, b"x").expect("a file");
        file.settle(|| fs::rename(&partial, &whole))
            .expect("a name");
        assert!(within(&removed(&things()), "whole is complete"));
        assert!(whole.exists());
    }

    #[test]
    fn a_guest_that_cannot_be_asked_holds_nothing_up() {
        let stuck = Arc::new(Mutex::new(()));
        let held = stuck.lock().expect("not poisoned");
        let asked = Arc::clone(&stuck);
        let describe: Arc<Describe> = Arc::new(move || {
            let _held = asked.lock();
            None
        });
        assert_eq!(ask(describe), None);
        drop(held);
    }
}
