//! `--at-freeze`: a program that runs while the guest is suspended, so that it can snapshot the
//! guest's disks in the same instant.
//!
//! The program is run directly, without a shell, as the user of this process, which is root on a
//! Xen host. So only root may be able to replace it, and it gets nothing from this process but a
//! fixed environment: no descriptors, no arguments.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Error, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, geteuid};
use xsr_save_restore::progress::{Cancel, Cancelled};
use xsr_save_restore::save::AtFreeze;
use xsr_save_restore::toolstack::ToolstackError;

use crate::exit::BadUsage;
use crate::text::{shown, shown_path};

/// Where the program finds others.
const PROGRAMS: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// How often it is looked at whether the program has ended.
const POLL: Duration = Duration::from_millis(2);

/// The longest line of its output that is logged as one, in bytes.
const LONGEST_LINE: u64 = 1024;

const WHAT: &str = "running the program of --at-freeze";

/// What the program is told, beside the phase.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) domid: u16,
    pub(crate) name: String,
    pub(crate) uuid: String,
    /// The final name of the image.
    pub(crate) file: PathBuf,
}

/// The program of one save.
#[derive(Debug)]
pub(crate) struct Program {
    path: PathBuf,
    limit: Duration,
    cancel: Cancel,
    environment: Vec<(&'static str, OsString)>,
    running: Option<Running>,
    /// Whether it was started, and has to learn how the save ended.
    was_started: bool,
    /// The image has its name.
    pub(crate) is_saved: bool,
    /// How long it ran while the guest was suspended.
    pub(crate) took: Option<Duration>,
}

/// A program that was started.
#[derive(Debug)]
struct Running {
    child: Child,
    began: Instant,
}

impl Running {
    /// Kills it, with all that it has started in its process group.
    fn kill(&mut self) {
        if let Ok(group) = i32::try_from(self.child.id())
            && let Err(error) = killpg(Pid::from_raw(group), Signal::SIGKILL)
        {
            tracing::debug!(%error, "killing the program of --at-freeze");
        }
        if let Err(error) = self.child.wait() {
            tracing::debug!(%error, "waiting for the program of --at-freeze");
        }
    }
}

impl Program {
    /// The program at this path, for which the guest is suspended no longer than `limit`.
    ///
    /// # Errors
    ///
    /// [`BadUsage`]: another user could put something else in its place.
    pub(crate) fn new(path: &Path, limit: Duration, cancel: Cancel) -> Result<Self> {
        let path = checked(path).map_err(|why| {
            Error::new(BadUsage(format!("--at-freeze {}: {why}", shown_path(path))))
        })?;
        Ok(Self {
            path,
            limit,
            cancel,
            environment: Vec::new(),
            running: None,
            was_started: false,
            is_saved: false,
            took: None,
        })
    }

    /// Which guest it is about.
    pub(crate) fn is_about(&mut self, guest: Guest) {
        self.environment = vec![
            ("XSR_DOMID", guest.domid.to_string().into()),
            ("XSR_NAME", guest.name.into()),
            ("XSR_UUID", guest.uuid.into()),
            ("XSR_FILE", guest.file.into_os_string()),
        ];
    }

    /// The save is over: tells the program, if it has been run, whether the image is there.
    pub(crate) fn conclude(&mut self) {
        self.running = None;
        if !std::mem::take(&mut self.was_started) {
            return;
        }
        let phase = match self.is_saved {
            true => "saved",
            false => "failed",
        };
        // That the save was cancelled is no reason not to tell it.
        self.cancel = Cancel::new();
        let ended = self.start(phase).and_then(|running| {
            self.running = Some(running);
            self.end()
        });
        if let Err(error) = ended {
            let path = shown_path(&self.path);
            tracing::warn!("{path} with XSR_PHASE={phase}: {error}");
        }
    }

    fn start(&self, phase: &str) -> io::Result<Running> {
        // What this process was started with is not closed in its children by itself.
        xsr_stdio::close_on_exec()?;
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
        if let Some(out) = child.stdout.take() {
            log(out, "stdout");
        }
        if let Some(out) = child.stderr.take() {
            log(out, "stderr");
        }
        Ok(Running { child, began })
    }

    /// Waits for its end.
    fn end(&mut self) -> io::Result<()> {
        let Some(mut running) = self.running.take() else {
            return Ok(());
        };
        let status = loop {
            match running.child.try_wait() {
                Ok(Some(status)) => break Ok(status),
                Ok(None) => {}
                Err(error) => break Err(error),
            }
            if running.began.elapsed() >= self.limit {
                let limit = self.limit.as_secs();
                break Err(io::Error::other(format!(
                    "it has not ended within {limit} s, and was killed"
                )));
            }
            if self.cancel.is_cancelled() {
                break Err(io::Error::other(Cancelled));
            }
            thread::sleep(POLL);
        };
        self.took = Some(running.began.elapsed());
        if status.is_err() {
            running.kill();
        }
        match status? {
            status if status.success() => Ok(()),
            status => Err(io::Error::other(failed(status))),
        }
    }
}

fn failed(status: ExitStatus) -> String {
    format!("it failed ({status})")
}

impl AtFreeze for Program {
    fn begin(&mut self) -> Result<(), ToolstackError> {
        let running = self.start("frozen");
        self.running = Some(running.map_err(|error| ToolstackError::new(WHAT, error))?);
        self.was_started = true;
        Ok(())
    }

    fn wait(&mut self) -> Result<(), ToolstackError> {
        self.end().map_err(|error| ToolstackError::new(WHAT, error))
    }
}

impl Drop for Program {
    /// A save that failed meanwhile does not wait for it.
    fn drop(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.kill();
        }
    }
}

/// Has what the program prints go into the log.
fn log(out: impl Read + Send + 'static, stream: &'static str) {
    let mut out = BufReader::new(out);
    // It ends when the last process has closed the other end; nothing waits for that.
    thread::spawn(move || {
        loop {
            let mut line = Vec::new();
            match out.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {
                    let line = String::from_utf8_lossy(&line);
                    tracing::info!("--at-freeze, {stream}: {}", shown(line.trim_end()));
                }
            }
        }
    });
}

/// The path without links, if only its owner and root can write there.
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

/// Whether only its owner, who is this user or root, can change what is there.
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
