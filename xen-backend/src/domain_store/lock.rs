//! The lock of a domain, its holder, and the check whether that process still runs.
//!
//! If a lock is kept where it outlives its process (xenstore), it is one line of text:
//!
//! | word | holds |
//! |---|---|
//! | 1 | the process number |
//! | 2 | when the process started, in clock ticks since boot (field 22 of `/proc/PID/stat`) |
//! | 3 | the kernel's boot id |
//! | 4 | the process's PID namespace |
//! | rest | the command |

use std::fmt;
use std::fs;
use std::path::Path;

use super::DomainStoreError;

/// The process that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// Its process number; `None` if the lock does not record it.
    pub pid: Option<u32>,
    /// The command that it reported.
    pub command: String,
}

impl LockHolder {
    /// This process, running `command`.
    #[cfg(feature = "mock")]
    pub(crate) fn this(command: &str) -> Self {
        Self {
            pid: Some(std::process::id()),
            command: printable(command),
        }
    }

    /// The holder of a lock that is not in the format of [`Process::encode`].
    pub(crate) fn unknown(text: &[u8]) -> Self {
        Self {
            pid: None,
            command: printable(&String::from_utf8_lossy(text)),
        }
    }

    /// The text form, `PID COMMAND`.
    #[cfg(feature = "mock")]
    pub(crate) fn encode(&self) -> Vec<u8> {
        let pid = self
            .pid
            .map_or_else(|| UNKNOWN.to_owned(), |pid| pid.to_string());
        format!("{pid} {}\n", self.command).into_bytes()
    }

    /// Parses text; `None` if it is not in the format of [`LockHolder::encode`].
    #[cfg(feature = "mock")]
    pub(crate) fn decode(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let (pid, command) = text.trim_end().split_once(' ')?;
        Some(Self {
            pid: Some(pid.parse().ok()?),
            command: printable(command),
        })
    }
}

impl fmt::Display for LockHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid} ({})", self.command),
            None => write!(f, "an unknown process ({})", self.command),
        }
    }
}

/// The longest command that is stored, in characters.
const LONGEST_COMMAND: usize = 200;

/// A command as one line of printable text.
fn printable(command: &str) -> String {
    let shown = |c: char| match c.is_control() {
        true => ' ',
        false => c,
    };
    command.chars().take(LONGEST_COMMAND).map(shown).collect()
}

/// The lock of a domain, which is released when this is dropped.
#[must_use = "the lock is given back when this is dropped"]
pub struct DomainLock {
    release: Option<Box<dyn FnOnce() + Send>>,
    pass: Box<Pass>,
}

/// Records another process as the holder of a lock.
type Pass = dyn Fn(u32) -> Result<(), DomainStoreError> + Send;

impl DomainLock {
    /// A lock that is released by calling `release`, and passed on to another process by calling
    /// `pass`.
    pub(crate) fn new(
        release: impl FnOnce() + Send + 'static,
        pass: impl Fn(u32) -> Result<(), DomainStoreError> + Send + 'static,
    ) -> Self {
        Self {
            release: Some(Box::new(release)),
            pass: Box::new(pass),
        }
    }

    /// Records a child of this process as the holder of the lock, because it continues to work on
    /// the domain even if this process is killed, or this process again. This process still
    /// releases the lock.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Storage`]; the lock still names this process.
    pub fn pass_to(&self, pid: u32) -> Result<(), DomainStoreError> {
        (self.pass)(pid)
    }
}

impl fmt::Debug for DomainLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DomainLock").finish_non_exhaustive()
    }
}

impl Drop for DomainLock {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            release();
        }
    }
}

/// A process, distinguished from all others of this machine, including earlier ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) holder: LockHolder,
    pid: u32,
    started: String,
    boot: String,
    namespace: String,
}

/// The directory of the kernel's information about processes.
const PROC: &str = "/proc";
/// The placeholder for a word that could not be determined.
const UNKNOWN: &str = "?";

impl Process {
    /// This process.
    pub(crate) fn this(command: &str) -> Self {
        Self::of(std::process::id(), command)
    }

    /// A process of this machine, which must still exist (a zombie does).
    pub(crate) fn of(pid: u32, command: &str) -> Self {
        let holder = LockHolder {
            pid: Some(pid),
            command: printable(command),
        };
        let proc = Path::new(PROC);
        let known = |word: Option<String>| word.unwrap_or_else(|| UNKNOWN.to_owned());
        Self {
            pid,
            started: known(started(proc, pid)),
            boot: known(boot(proc)),
            namespace: known(namespace(proc)),
            holder,
        }
    }

    /// As text.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let Self {
            holder,
            pid,
            started,
            boot,
            namespace,
        } = self;
        let command = &holder.command;
        format!("{pid} {started} {boot} {namespace} {command}").into_bytes()
    }

    /// Parses text; `None` if it is not in the format of [`Process::encode`].
    pub(crate) fn decode(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let mut words = text.splitn(5, ' ');
        let pid = words.next()?.parse().ok()?;
        let [started, boot, namespace] = [words.next()?, words.next()?, words.next()?];
        Some(Self {
            pid,
            holder: LockHolder {
                pid: Some(pid),
                command: printable(words.next()?),
            },
            started: started.to_owned(),
            boot: boot.to_owned(),
            namespace: namespace.to_owned(),
        })
    }

    /// Whether the process has certainly ended. A process in another PID namespace cannot be found,
    /// and is assumed to run.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended_by(Path::new(PROC))
    }

    /// Whether the process would be visible if it ran.
    pub(crate) fn is_seen(&self) -> bool {
        self.is_seen_by(Path::new(PROC))
    }

    fn is_seen_by(&self, proc: &Path) -> bool {
        self.namespace != UNKNOWN && namespace(proc).as_deref() == Some(&self.namespace)
    }

    fn has_ended_by(&self, proc: &Path) -> bool {
        let differs =
            |was: &str, now: Option<String>| was != UNKNOWN && now.is_some_and(|now| now != was);
        if differs(&self.boot, boot(proc)) {
            return true;
        }
        if !self.is_seen_by(proc) {
            return false;
        }
        match started(proc, self.pid) {
            Some(now) => differs(&self.started, Some(now)),
            None => !proc.join(self.pid.to_string()).exists(),
        }
    }
}

fn boot(proc: &Path) -> Option<String> {
    let id = fs::read_to_string(proc.join("sys/kernel/random/boot_id")).ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty() && !id.contains(' '))
}

fn namespace(proc: &Path) -> Option<String> {
    let link = fs::read_link(proc.join("self/ns/pid")).ok()?;
    link.to_str().map(str::to_owned)
}

/// The time when a process started. The second field of its line, its name, may contain anything,
/// and ends at the last parenthesis.
fn started(proc: &Path, pid: u32) -> Option<String> {
    /// The number of fields from the one after the name to this one.
    const START: usize = 22 - 3;
    let stat = fs::read(proc.join(pid.to_string()).join("stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat).into_owned();
    let (_, fields) = stat.rsplit_once(')')?;
    // A zombie holds no lock.
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    match state {
        "Z" | "X" => Some("ended".to_owned()),
        _ => fields.nth(START - 1).map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `/proc` with a process 7 whose name is meant to confuse the parser.
    fn proc() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        make("sys/kernel/random/boot_id", "boot-1\n");
        make(
            "7/stat",
            "7 (a ) 1 2) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21\n",
        );
        fs::create_dir_all(dir.path().join("self/ns")).unwrap();
        std::os::unix::fs::symlink("pid:[1]", dir.path().join("self/ns/pid")).unwrap();
        dir
    }

    fn process(text: &str) -> Process {
        Process::decode(text.as_bytes()).unwrap()
    }

    #[test]
    fn a_process_is_told_from_a_later_one_with_its_number() {
        let dir = proc();
        assert_eq!(started(dir.path(), 7).as_deref(), Some("4711"));
        let ended = |text| process(text).has_ended_by(dir.path());
        assert!(!ended("7 4711 boot-1 pid:[1] xsr save web"), "it runs");
        assert!(
            ended("7 4710 boot-1 pid:[1] xsr save web"),
            "another's number"
        );
        assert!(ended("8 4711 boot-1 pid:[1] xsr save web"), "not there");
        assert!(
            ended("7 4711 boot-0 pid:[1] xsr save web"),
            "before the boot"
        );
        // A process with unknown state is assumed to run.
        assert!(!ended("8 4711 boot-1 pid:[2] xsr save web"));
        assert!(!ended("7 ? ? ? xsr save web"));
        fs::write(dir.path().join("7/stat"), "7 (xsr) Z 1 2").unwrap();
        assert!(ended("7 4711 boot-1 pid:[1] xsr save web"), "a zombie");
    }

    #[test]
    fn this_process_runs_and_reads_back_as_itself() {
        let this = Process::this("xsr save\n\x1b[31mweb");
        assert!(!this.has_ended());
        assert_eq!(this.holder.pid, Some(std::process::id()));
        assert_eq!(this.holder.command, "xsr save  [31mweb");
        assert_eq!(Process::decode(&this.encode()), Some(this));
    }

    #[test]
    fn what_is_not_a_process_is_none() {
        for text in ["", "7", "x 1 2 3 4", "7 1 2 3", "-7 1 2 3 4"] {
            assert_eq!(Process::decode(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(Process::decode(b"7 1 2 3 \xff"), None);
    }
}
