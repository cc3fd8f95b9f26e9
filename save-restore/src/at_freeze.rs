//! A program that runs while the guest is suspended, so that it can snapshot the guest's disks in
//! the same instant (`xsr save --at-freeze`, `XSR_AT_FREEZE` of the save helper).
//!
//! The program is run directly, without a shell, as the user of this process, which is root on a
//! Xen host. So only root may be able to replace it. It gets only a fixed environment from this
//! process, without descriptors or arguments.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, Metadata};
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, geteuid};
use xsr_xen_backend::DomId;

use crate::progress::{Cancel, Cancelled};
use crate::save::AtFreeze;
use crate::text::{shown, shown_path};
use crate::toolstack::ToolstackError;

/// The PATH of the program.
const PROGRAMS: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// How often to check whether the program has ended.
const POLL: Duration = Duration::from_millis(2);

/// How long to wait for a killed program to end. A program that waits for a disk ends only when the
/// disk answers.
const REAP_WAIT: Duration = Duration::from_secs(5);

/// The longest line of its output that is logged as one, in bytes.
const LONGEST_LINE: u64 = 1024;

const WHAT: &str = "running the program at the freeze";

/// How long the program may run, unless the user says otherwise.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(10);

/// The longest limit that a user can give, in seconds.
pub const MAX_LIMIT_SECONDS: u32 = 3600;

/// The process group of a program as long as it runs. Its leader is reaped under the lock, so that
/// the number refers to no other group.
#[derive(Clone, Debug)]
pub struct Group(Arc<Mutex<Option<Pid>>>);

impl Group {
    /// Kills all processes of the group if it still runs.
    pub fn kill(&self) {
        let group = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = *group
            && let Err(error) = killpg(pid, Signal::SIGKILL)
        {
            tracing::debug!(%error, "killing process group {pid}");
        }
    }
}

/// What the process that runs a program has to do besides.
pub trait Surroundings: fmt::Debug + Send {
    /// Called before a program is started: has it inherit stdin, stdout and stderr alone.
    ///
    /// # Errors
    ///
    /// The program is not started.
    fn before_start(&self) -> io::Result<()>;

    /// A program has been started, and must be told how the save ended. It has been told when the
    /// result is dropped.
    fn started(&self, path: &Path, group: &Group) -> Box<dyn fmt::Debug + Send>;
}

/// A program that must not be run: another user could replace it, or it is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {why}", shown_path(path))]
pub struct Unfit {
    path: PathBuf,
    why: String,
}

/// What the program is told, in addition to the phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenGuest {
    /// Its number.
    pub domid: DomId,
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// The final name of the image.
    pub file: PathBuf,
}

impl FrozenGuest {
    /// For another process: [`from_bytes`](Self::from_bytes) gives the same back.
    pub fn to_bytes(&self) -> Vec<u8> {
        let domid = self.domid.0.to_string();
        let fields = [domid.as_bytes(), self.name.as_bytes(), self.uuid.as_bytes()];
        let mut bytes = fields.join(&0);
        bytes.push(0);
        bytes.extend(self.file.as_os_str().as_bytes());
        bytes
    }

    /// `None` if the bytes are not complete.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut fields = bytes.splitn(4, |byte| *byte == 0);
        let mut text = || String::from_utf8(fields.next()?.to_vec()).ok();
        let (domid, name, uuid) = (text()?.parse().ok()?, text()?, text()?);
        let file = OsStr::from_bytes(fields.next()?);
        Some(Self {
            domid: DomId(domid),
            name,
            uuid,
            file: file.into(),
        })
    }
}

/// The program of one save.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    limit: Duration,
    cancel: Cancel,
    surroundings: Box<dyn Surroundings>,
    environment: Vec<(&'static str, OsString)>,
    running: Option<Running>,
    /// Set once the program was started, until it has been told how the save ended.
    told: Option<Box<dyn fmt::Debug + Send>>,
    /// Whether the image has its final name.
    pub is_saved: bool,
    /// How long the program ran while the guest was suspended.
    pub took: Option<Duration>,
}

/// A program that was started. A thread waits for its end. Dropping this kills the program with
/// everything in its process group.
#[derive(Debug)]
struct Running {
    group: Group,
    stop: Arc<AtomicBool>,
    ended: Receiver<Ended>,
    has_ended: bool,
    /// The thread holds the other end until the program has been reaped.
    reaped: Receiver<()>,
}

/// How a program ended, or why it was killed.
#[derive(Debug)]
struct Ended {
    result: io::Result<()>,
    took: Duration,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.group.kill();
        if self.reaped.recv_timeout(REAP_WAIT) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the program that ran at the freeze was killed, but does not end");
        }
    }
}

/// Waits for a child to end, kills it at the limit, and reports which happened.
struct Waiting {
    child: Child,
    group: Group,
    stop: Arc<AtomicBool>,
    cancel: Cancel,
    limit: Duration,
    began: Instant,
}

impl Waiting {
    fn run(mut self, ended: &SyncSender<Ended>) {
        let result = self.end();
        let took = self.began.elapsed();
        let is_killed = result.is_err();
        if is_killed {
            self.group.kill();
        }
        let result = result.and_then(|status| match status.success() {
            true => Ok(()),
            false => Err(io::Error::other(failed(status))),
        });
        // Fails if the save has already failed for another reason.
        ended.send(Ended { result, took }).ok();
        // A killed program may take a moment to end.
        while is_killed && matches!(self.reap(), Ok(None)) {
            thread::sleep(POLL);
        }
    }

    fn end(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.reap()? {
                return Ok(status);
            }
            if self.began.elapsed() >= self.limit {
                let limit = self.limit.as_secs();
                return Err(io::Error::other(format!(
                    "it has not ended within {limit} s, and was killed"
                )));
            }
            if self.stop.load(Ordering::Relaxed) || self.cancel.is_cancelled() {
                return Err(io::Error::other(Cancelled));
            }
            thread::sleep(POLL);
        }
    }

    /// The status of the child, once it has ended. It then has no process group any more.
    fn reap(&mut self) -> io::Result<Option<ExitStatus>> {
        let mut group = self.group.0.lock().unwrap_or_else(PoisonError::into_inner);
        let status = self.child.try_wait()?;
        if status.is_some() {
            *group = None;
        }
        Ok(status)
    }
}

impl Program {
    /// The program at this path, for which the guest is suspended for at most `limit`.
    ///
    /// # Errors
    ///
    /// Another user could replace the program, or there is none.
    pub fn new(
        path: &Path,
        limit: Duration,
        cancel: Cancel,
        surroundings: Box<dyn Surroundings>,
    ) -> Result<Self, Unfit> {
        let path = checked(path).map_err(|why| Unfit {
            path: path.to_owned(),
            why,
        })?;
        Ok(Self {
            path,
            limit,
            cancel,
            surroundings,
            environment: Vec::new(),
            running: None,
            told: None,
            is_saved: false,
            took: None,
        })
    }

    /// Sets the guest that is saved.
    pub fn is_about(&mut self, guest: FrozenGuest) {
        self.environment = vec![
            ("XSR_DOMID", guest.domid.0.to_string().into()),
            ("XSR_NAME", guest.name.into()),
            ("XSR_UUID", guest.uuid.into()),
            ("XSR_FILE", guest.file.into_os_string()),
        ];
    }

    /// Called when the save is over: tells the program, if it was run, whether the image was saved.
    pub fn conclude(&mut self) {
        if self.stop() {
            self.tell();
        }
    }

    /// Called when the save is over and another process tells the program how it ended
    /// ([`tell`](Self::tell)). Kills the program if it still runs. Returns whether it was run.
    pub fn stop(&mut self) -> bool {
        self.running = None;
        self.told.take().is_some()
    }

    /// Runs the program again, to tell it whether the image was saved.
    pub fn tell(&mut self) {
        let phase = match self.is_saved {
            true => "saved",
            false => "failed",
        };
        // The program must be told even if the save was cancelled.
        self.cancel = Cancel::new();
        let took = self.took;
        let ended = self.start(phase).and_then(|running| {
            self.running = Some(running);
            self.look(true)
        });
        self.running = None;
        self.told = None;
        self.took = took;
        if let Err(error) = ended {
            let path = shown_path(&self.path);
            tracing::warn!("{path} with XSR_PHASE={phase}: {error}");
        }
    }

    fn start(&mut self, phase: &str) -> io::Result<Running> {
        self.surroundings.before_start()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let deadline = now.map_err(io::Error::other)? + self.limit;
        let mut child = Command::new(&self.path)
            .env_clear()
            .env("PATH", PROGRAMS)
            .envs(self.environment.iter().cloned())
            .env("XSR_PHASE", phase)
            .env("XSR_DEADLINE", deadline.as_secs().to_string())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let began = Instant::now();
        let pid = i32::try_from(child.id()).map(Pid::from_raw).ok();
        let group = Group(Arc::new(Mutex::new(pid)));
        self.told = Some(self.surroundings.started(&self.path, &group));
        if let Some(out) = child.stdout.take() {
            log(out, "stdout");
        }
        if let Some(out) = child.stderr.take() {
            log(out, "stderr");
        }
        let stop = Arc::<AtomicBool>::default();
        let waiting = Waiting {
            child,
            group: group.clone(),
            stop: Arc::clone(&stop),
            cancel: self.cancel.clone(),
            limit: self.limit,
            began,
        };
        let (tell, ended) = mpsc::sync_channel(1);
        let (holds, reaped) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("at-freeze".to_owned());
        let started = thread.spawn(move || {
            waiting.run(&tell);
            drop(holds);
        });
        if let Err(error) = started {
            group.kill();
            return Err(error);
        }
        Ok(Running {
            group,
            stop,
            ended,
            has_ended: false,
            reaped,
        })
    }

    /// Returns the program's failure, if it has ended with one. With `wait`, waits for the end.
    fn look(&mut self, wait: bool) -> io::Result<()> {
        let Some(running) = self.running.as_mut().filter(|running| !running.has_ended) else {
            return Ok(());
        };
        let ended = match wait {
            true => running.ended.recv().ok(),
            false => match running.ended.try_recv() {
                Err(TryRecvError::Empty) => return Ok(()),
                ended => ended.ok(),
            },
        };
        running.has_ended = true;
        let ended = ended.ok_or_else(|| io::Error::other("its end is unknown"))?;
        self.took = Some(ended.took);
        ended.result
    }
}

fn failed(status: ExitStatus) -> String {
    format!("it failed ({status})")
}

impl AtFreeze for Program {
    fn begin(&mut self) -> Result<(), ToolstackError> {
        let running = self.start("frozen");
        self.running = Some(running.map_err(|error| ToolstackError::new(WHAT, error))?);
        Ok(())
    }

    fn check(&mut self) -> Result<(), ToolstackError> {
        self.look(false)
            .map_err(|error| ToolstackError::new(WHAT, error))
    }

    fn wait(&mut self) -> Result<(), ToolstackError> {
        self.look(true)
            .map_err(|error| ToolstackError::new(WHAT, error))
    }
}

/// Logs what the program prints.
fn log(out: impl Read + Send + 'static, stream: &'static str) {
    let mut out = BufReader::new(out);
    // The thread ends when the last process has closed the other end; nothing waits for it.
    let thread = thread::Builder::new().name("at-freeze-log".to_owned());
    let started = thread.spawn(move || {
        loop {
            let mut line = Vec::new();
            match out.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {
                    let line = String::from_utf8_lossy(&line);
                    tracing::info!("at the freeze, {stream}: {}", shown(line.trim_end()));
                }
            }
        }
    });
    if let Err(error) = started {
        // The program then writes into a closed pipe.
        tracing::warn!(%error, "the {stream} of the program at the freeze is not logged");
    }
}

/// The path without symbolic links, if only its owner and root can write there.
fn checked(path: &Path) -> Result<PathBuf, String> {
    if !path.is_absolute() {
        return Err("expected an absolute path".to_owned());
    }
    let path = fs::canonicalize(path).map_err(|error| error.to_string())?;
    let found = fs::metadata(&path).map_err(|error| error.to_string())?;
    if !found.is_file() || found.mode() & 0o111 == 0 {
        return Err("is not a program".to_owned());
    }
    safe(&path, &found, false)?;
    for directory in path.ancestors().skip(1) {
        let found = fs::metadata(directory).map_err(|error| error.to_string())?;
        safe(directory, &found, true)?;
    }
    Ok(path)
}

/// Checks that only the owner, which must be this user or root, can change the file or directory.
fn safe(path: &Path, found: &Metadata, is_directory: bool) -> Result<(), String> {
    const STICKY: u32 = 0o1000;
    let path = shown_path(path);
    let owner = found.uid();
    if owner != 0 && owner != geteuid().as_raw() {
        return Err(format!("{path} belongs to user {owner}: it must be root's"));
    }
    let shared = found.mode() & 0o022 != 0;
    // In a directory like /tmp, only its owner can replace a file.
    if shared && !(is_directory && found.mode() & STICKY != 0) {
        let mode = found.mode() & 0o7777;
        return Err(format!(
            "{path} can be written by other users (mode {mode:o}): `chmod go-w` it"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::error::Error as _;

    use super::*;

    /// A process that inherited nothing, and keeps no list.
    #[derive(Debug)]
    struct Alone;

    impl Surroundings for Alone {
        fn before_start(&self) -> io::Result<()> {
            Ok(())
        }

        fn started(&self, _: &Path, _: &Group) -> Box<dyn fmt::Debug + Send> {
            Box::new(())
        }
    }

    /// A program that runs `does` in phase `frozen`, and then writes the phase to a file.
    fn program(directory: &Path, does: &str, limit: Duration) -> (Program, PathBuf) {
        use std::os::unix::fs::PermissionsExt as _;
        let [path, told] = ["program", "told"].map(|name| directory.join(name));
        let script = format!(
            "#!/bin/sh\nif [ $XSR_PHASE = frozen ]; then {does}; fi\necho $XSR_PHASE >> {}\n",
            told.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        (
            Program::new(&path, limit, Cancel::new(), Box::new(Alone)).unwrap(),
            told,
        )
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn another_process_learns_all_about_the_guest() {
        let guest = FrozenGuest {
            domid: DomId(7),
            name: "web\n1".to_owned(),
            uuid: "00000000-0000-0000-0000-000000000007".to_owned(),
            file: OsStr::from_bytes(b"/srv/w\xff\n.save").into(),
        };
        let bytes = guest.to_bytes();
        assert_eq!(FrozenGuest::from_bytes(&bytes).as_ref(), Some(&guest));
        let uuid_ends = bytes.iter().rposition(|byte| *byte == 0).unwrap();
        for cut in 0..=uuid_ends {
            assert_eq!(FrozenGuest::from_bytes(&bytes[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn a_program_that_still_runs_is_killed_before_it_is_told_of_the_failure() {
        let directory = tempfile::tempdir().unwrap();
        let (mut program, told) = program(directory.path(), "sleep 2", LONG);
        program.begin().unwrap();
        let group = program.running.as_ref().unwrap().group.clone();
        assert!(group.0.lock().unwrap().is_some());
        let began = Instant::now();
        program.conclude();
        assert!(began.elapsed() < Duration::from_millis(1500));
        assert_eq!(*group.0.lock().unwrap(), None);
        thread::sleep(Duration::from_millis(2500));
        assert_eq!(fs::read_to_string(told).unwrap(), "failed\n");
        assert!(program.told.is_none());
    }

    #[test]
    fn the_limit_holds_whatever_the_save_does_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let limit = Duration::from_secs(1);
        let (mut program, told) = program(directory.path(), "sleep 2", limit);
        program.begin().unwrap();
        // The last pass takes longer than the program.
        thread::sleep(Duration::from_millis(3000));
        let error = program.check().unwrap_err();
        let cause = error.source().unwrap().to_string();
        assert!(cause.contains("not ended within 1 s"), "{cause}");
        assert!(!told.exists());
        program.conclude();
        assert_eq!(fs::read_to_string(told).unwrap(), "failed\n");
    }

    #[test]
    fn its_time_is_its_own_and_a_failure_is_noticed_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let (mut program, _) = program(directory.path(), "true", LONG);
        program.begin().unwrap();
        thread::sleep(Duration::from_millis(2000));
        program.wait().unwrap();
        assert!(program.took.unwrap() < Duration::from_millis(1500));
        drop(program);

        let (mut program, _) = self::program(directory.path(), "exit 3", LONG);
        program.begin().unwrap();
        let began = Instant::now();
        let error = loop {
            match program.check() {
                Ok(()) => thread::sleep(POLL),
                Err(error) => break error,
            }
            assert!(began.elapsed() < LONG);
        };
        let cause = error.source().unwrap().to_string();
        assert!(cause.contains("exit status: 3"), "{cause}");
    }
}
