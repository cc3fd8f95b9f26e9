//! A list of what this process would leave behind if it ended now: files under temporary names,
//! guests that it has suspended or not completed.
//!
//! Everything temporary is registered here as long as it exists. The signal thread (`interrupt.rs`)
//! reads the list:
//!
//! | the list has | a signal that asks to stop |
//! |---|---|
//! | work on a guest | lets that work be cancelled in good order |
//! | only files | removes them and ends the process at once |
//! | nothing | ends the process, as by default |
//! | nothing, because the command is over | does nothing |

pub(crate) mod guest;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use xsr_save_restore::at_freeze::{Group, Surroundings};
use xsr_save_restore::storage::file::{Cleanup, Registered};

use crate::text::shown_path;

/// How long to wait for a guest's state before the process ends without it.
const DESCRIBE_WAIT: Duration = Duration::from_secs(1);

/// One thing that would be left.
#[derive(Clone)]
enum Thing {
    /// A file under a temporary name, and its final name.
    File { temporary: PathBuf, to: PathBuf },
    /// A directory to remove with its contents.
    Directory(PathBuf),
    /// A file that is complete, and has its final name.
    Complete(PathBuf),
    /// Work that must be cancelled in good order.
    Work(Arc<Describe>),
    /// A program that has been started and must still be told how the work ended.
    Program { path: String, group: Group },
}

/// Returns the state of a guest at this moment.
type Describe = dyn Fn() -> Option<State> + Send + Sync;

/// The state in which a guest would be left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// In words, with what to do about it.
    pub(crate) words: String,
    /// Whether it may also run on the other host ([`crate::exit::Code::Undecided`]).
    pub(crate) undecided: bool,
}

impl State {
    /// A state that is certain.
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

/// An entry of the list, removed on drop.
#[derive(Debug)]
#[must_use = "dropping it says that the thing is gone"]
pub(crate) struct Left {
    /// `None` for an entry that stays until the end.
    number: Option<u64>,
}

impl Left {
    fn behind(thing: Thing) -> Self {
        Self::add(&mut things(), thing)
    }

    fn add(things: &mut Vec<(u64, Thing)>, thing: Thing) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        WRITES.store(true, Ordering::SeqCst);
        things.push((number, thing));
        Self {
            number: Some(number),
        }
    }

    /// A file that has a temporary name until it is complete. `make` creates it; `path` returns
    /// that name. No signal ends the process before it is on the list.
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

    /// A directory that is removed before the command ends. `make` creates it; `path` returns its
    /// name. No signal ends the process before it is on the list.
    ///
    /// # Errors
    ///
    /// Those of `make`.
    pub(crate) fn directory<T, E>(
        make: impl FnOnce() -> Result<T, E>,
        path: impl FnOnce(&T) -> &Path,
    ) -> Result<(Self, T), E> {
        let mut things = things();
        let made = make()?;
        let thing = Thing::Directory(path(&made).to_owned());
        Ok((Self::add(&mut things, thing), made))
    }

    /// Work that must be cancelled in good order, and leaves nothing to describe.
    pub(crate) fn work() -> Self {
        Self::guest(|| None)
    }

    /// Work on a guest. `describe` returns its state, and is called on its own thread; `None` if
    /// there is nothing to report.
    pub(crate) fn guest(describe: impl Fn() -> Option<State> + Send + Sync + 'static) -> Self {
        Self::behind(Thing::Work(Arc::new(describe)))
    }

    /// The entry stays until the command is [`over`].
    pub(crate) fn until_the_end(mut self) {
        self.number = None;
    }

    /// Make a file permanent, by `keep`. No signal ends the process in between. If that fails, the
    /// entry does not change.
    ///
    /// # Errors
    ///
    /// Those of `keep`.
    pub(crate) fn settle<T, E>(&mut self, keep: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let mut things = things();
        let kept = keep()?;
        let found = things
            .iter_mut()
            .find(|(number, _)| Some(*number) == self.number);
        if let Some((_, thing)) = found
            && let Thing::File { to, .. } = thing
        {
            *thing = Thing::Complete(std::mem::take(to));
            self.number = None;
        }
        Ok(kept)
    }
}

/// Registers programs of `--at-freeze`, which are killed if the process ends without cleanup.
#[derive(Debug)]
pub(crate) struct Programs;

impl Surroundings for Programs {
    /// Descriptors that this process inherited are not closed in its children otherwise.
    fn before_start(&self) -> io::Result<()> {
        xsr_stdio::close_on_exec()
    }

    fn started(&self, path: &Path, group: &Group) -> Box<dyn std::fmt::Debug + Send> {
        Box::new(Left::behind(Thing::Program {
            path: shown_path(path),
            group: group.clone(),
        }))
    }
}

/// Registers files as long as they have temporary names.
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
    fn settle(&mut self, keep: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        Self::settle(self, keep)
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        let Some(own) = self.number else { return };
        let mut things = things();
        let found = things.iter().position(|(number, _)| *number == own);
        let thing = found.map(|at| things.swap_remove(at));
        drop(things);
        // Dropped without the lock, because `describe` may own a host.
        drop(thing);
    }
}

/// This command writes something: if a signal ends it, it has failed.
pub(crate) fn writes() {
    WRITES.store(true, Ordering::SeqCst);
}

/// Whether this command writes something.
pub(crate) fn is_writer() -> bool {
    WRITES.load(Ordering::SeqCst)
}

/// The command has finished: from now on signals do nothing.
pub(crate) fn over() {
    let mut things = things();
    OVER.store(true, Ordering::SeqCst);
    let over = std::mem::take(&mut *things);
    drop(things);
    // See `Left::drop`.
    drop(over);
}

/// Whether the command has finished.
pub(crate) fn is_over() -> bool {
    OVER.load(Ordering::SeqCst)
}

/// Whether there is work that must be cancelled in good order.
pub(crate) fn is_work() -> bool {
    has_work(&things())
}

fn has_work(things: &[(u64, Thing)]) -> bool {
    things
        .iter()
        .any(|(_, thing)| matches!(thing, Thing::Work(_) | Thing::Program { .. }))
}

/// Remove the files of the list and end the process with `end`, which receives messages about them.
/// Returns instead if there is work on a guest, or if the command is over. Until the process has
/// ended, no entry can be added or made permanent.
pub(crate) fn end_at_once(end: impl FnOnce(Vec<String>)) {
    let things = things();
    if has_work(&things) || is_over() {
        return;
    }
    end(removed(&things));
    drop(things);
}

/// Removes a directory in which other threads of this process may still make files.
fn remove_directory(path: &Path) -> io::Result<()> {
    const TRIES: u32 = 20;
    for _ in 1..TRIES {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            done => return done,
        }
    }
    fs::remove_dir_all(path)
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
                if let Err(error) = remove_directory(path) {
                    said.push(format!("{} is left behind ({error})", path.display()));
                }
            }
            Thing::Complete(path) => said.push(format!("{} is complete", path.display())),
            Thing::Work(_) | Thing::Program { .. } => {}
        }
    }
    said
}

/// What is left if the process ends without cleanup, and whether a guest may run on two hosts.
/// Kills the programs that run beside the work.
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
            Thing::Program { path, group } => {
                group.kill();
                said.push(format!(
                    "{path} was not told how the save ended: remove its snapshot"
                ));
            }
            Thing::Work(describe) => match ask(describe) {
                Some(Some(state)) => {
                    undecided |= state.undecided;
                    said.push(state.words);
                }
                Some(None) => {}
                None => {
                    said.push("the domain's state could not be determined: check it".to_owned())
                }
            },
        }
    }
    (said, undecided)
}

/// The description, if it comes in time: a stuck command may hold a lock that it needs.
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

    /// A single test, because a process has a single list.
    #[test]
    fn what_is_registered_is_removed_or_described() {
        let dir = tempfile::tempdir().expect("a directory");
        let [partial, whole] = ["partial", "whole"].map(|name| dir.path().join(name));
        let within = |said: &[String], what: &str| said.iter().any(|line| line.contains(what));
        fs::write(&partial, b"x").expect("a file");
        let make = || Ok::<_, ()>(partial.clone());
        let (mut file, _) = Left::file(&whole, make, |path| path).expect("an entry");
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

        // A file that could not be renamed must still be removed.
        file.settle(|| fs::rename(&whole, &partial))
            .expect_err("there is no such file");
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
