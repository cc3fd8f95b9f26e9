//! libxl's part, for tests and benchmarks: starts either save helper on a mock machine, and answers
//! its messages.
//!
//! C implementation: `tools/libs/light/libxl_save_callout.c`.

#[allow(dead_code, reason = "benchmarks have no use for it")]
pub(crate) mod colo;
#[allow(dead_code, reason = "tests have no use for it")]
pub(crate) mod migrate;

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockError, MockHost, Stepped};
use xsr_xen_backend::{DomId, GuestKind, Host as _};

/// Message numbers, as in `libxl_save_msgs_gen.pl`.
const LOG: u16 = 1;
const SUSPEND: u16 = 3;
const POSTCOPY: u16 = 4;
const CHECKPOINT: u16 = 5;
const WAIT_CHECKPOINT: u16 = 6;
const LOGDIRTY: u16 = 7;
const STATIC_DATA_DONE: u16 = 8;
const RESTORE_RESULTS: u16 = 9;
const COMPLETE: u16 = 10;

/// libxl's callbacks for a still or live save, and for a restore.
const SAVE_CALLBACKS: u32 = 1 << SUSPEND | 1 << LOGDIRTY;
const RESTORE_CALLBACKS: u32 = 1 << STATIC_DATA_DONE | 1 << RESTORE_RESULTS;

/// The variable that names the machine to `xsr-save-helper-mock`.
const TEST_BACKEND: &str = "XSR_HELPER_TEST_BACKEND";

/// The engine of a helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// Debian's `libxl-save-helper`.
    Stock,
    /// `xsr-save-helper-mock`, which calls the machine directly.
    Ours,
    /// `xsr-save-helper-mock`, which calls the machine by hypercalls, like stock.
    OursByCalls,
}

/// The two helpers.
#[derive(Clone, Debug)]
pub(crate) struct Helpers {
    stock: PathBuf,
    libraries: OsString,
    ours: PathBuf,
    /// Words before the command: a program that runs it, with arguments.
    pub(crate) under: Vec<OsString>,
    /// Further environment variables.
    pub(crate) environment: Vec<(OsString, OsString)>,
}

impl Helpers {
    /// From the variables that `cargo xtask peer` sets; `None` if they are missing.
    pub(crate) fn from_env() -> Option<Self> {
        Some(Self {
            stock: std::env::var_os("XSR_PEER_HELPER")?.into(),
            libraries: std::env::var_os("XSR_PEER_LIBRARIES")?,
            ours: std::env::var_os("XSR_PEER_OURS")?.into(),
            under: Vec::new(),
            environment: Vec::new(),
        })
    }

    /// Start a helper on the machine in `host`; the stream is its descriptor 7, and `others` are
    /// further redirections for `sh`.
    fn start(
        &self,
        whose: Whose,
        host: &Path,
        stream: impl Into<Stdio>,
        arguments: &str,
        others: &str,
    ) -> io::Result<Child> {
        let mut command = Command::new("sh");
        let script = format!("exec \"$0\" \"$@\" 7>&2 2>/dev/null {others}");
        command.args(["-c", &script]);
        command.args(&self.under);
        let backend = |how: &str| {
            let mut backend = OsString::from(how);
            backend.push(host);
            backend
        };
        match whose {
            Whose::Stock => command
                .arg(&self.stock)
                .env("LD_LIBRARY_PATH", &self.libraries)
                .env("XSR_PEER_HOST", host),
            Whose::Ours => command.arg(&self.ours).env(TEST_BACKEND, backend("mock:")),
            Whose::OursByCalls => command
                .arg(&self.ours)
                .env(TEST_BACKEND, backend("mock-xen:")),
        };
        command
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .args(arguments.split(' '))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stream)
            .spawn()
    }

    /// Save a domain. For stock it must be suspended already, because only the process that has the
    /// machine open could suspend it.
    ///
    /// # Errors
    ///
    /// The helper cannot be started or does not follow the protocol.
    pub(crate) fn save(
        &self,
        whose: Whose,
        host: &Path,
        domid: DomId,
        stream: impl Into<Stdio>,
    ) -> io::Result<Run> {
        self.save_watched(whose, host, domid, stream, |_| {})
    }

    /// As [`Helpers::save`]; `started` is called with the helper's process ID.
    ///
    /// # Errors
    ///
    /// The same.
    pub(crate) fn save_watched(
        &self,
        whose: Whose,
        host: &Path,
        domid: DomId,
        stream: impl Into<Stdio>,
        started: impl FnOnce(u32),
    ) -> io::Result<Run> {
        let arguments = format!("--save-domain 7 -1 {} 0 {SAVE_CALLBACKS} 0", domid.0);
        let child = self.start(whose, host, stream, &arguments, "")?;
        started(child.id());
        play(child, || Ok(true))
    }

    /// Save a running domain, and suspend it on request; or answer that it could not be suspended.
    ///
    /// # Errors
    ///
    /// The helper cannot be started or does not follow the protocol.
    pub(crate) fn save_live(
        &self,
        whose: Whose,
        host: &Path,
        domid: DomId,
        stream: impl Into<Stdio>,
        suspends: bool,
    ) -> io::Result<Run> {
        let (helpers, request) = self.with_requests(host);
        let arguments = format!("--save-domain 7 -1 {} 1 {SAVE_CALLBACKS} 0", domid.0);
        let child = helpers.start(whose, host, stream, &arguments, "")?;
        play(child, || {
            // Our helper does it itself, once it is told that it is done.
            if whose == Whose::Stock && suspends {
                ask(&request, "suspend", domid)?;
            }
            Ok(suspends)
        })
    }

    /// Helpers with a request file for stock's machine.
    fn with_requests(&self, host: &Path) -> (Self, PathBuf) {
        let request = host.with_extension("requests");
        let mut helpers = self.clone();
        let variable = ("XSR_PEER_REQUESTS".into(), request.clone().into_os_string());
        helpers.environment.push(variable);
        (helpers, request)
    }

    /// Restore into a domain made by [`empty`].
    ///
    /// # Errors
    ///
    /// The helper cannot be started or does not follow the protocol.
    pub(crate) fn restore(
        &self,
        whose: Whose,
        host: &Path,
        empty: &Empty,
        stream: impl Into<Stdio>,
    ) -> io::Result<Run> {
        self.restore_watched(whose, host, empty, stream, |_| {})
    }

    /// As [`Helpers::restore`]; `started` is called with the helper's process ID.
    ///
    /// # Errors
    ///
    /// The same.
    pub(crate) fn restore_watched(
        &self,
        whose: Whose,
        host: &Path,
        empty: &Empty,
        stream: impl Into<Stdio>,
        started: impl FnOnce(u32),
    ) -> io::Result<Run> {
        let arguments = format!(
            "--restore-domain 7 -1 {} {} 0 {} 0 {RESTORE_CALLBACKS} 0",
            empty.domid.0, empty.store, empty.console
        );
        let child = self.start(whose, host, stream, &arguments, "")?;
        started(child.id());
        play(child, || Ok(true))
    }
}

/// The result of one run of a helper.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Run {
    /// Messages that are neither log nor progress: number and arguments.
    pub(crate) asked: Vec<(u16, Vec<u8>)>,
    /// Lines of the log.
    pub(crate) log: Vec<String>,
    /// Its exit code.
    pub(crate) code: Option<i32>,
}

impl Run {
    /// The result and errno that the helper reported; `None` if it did not get that far.
    pub(crate) fn result(&self) -> Option<(i32, i32)> {
        let (number, arguments) = self.asked.last()?;
        let (words, _) = arguments.as_chunks::<4>();
        match (*number, words) {
            (COMPLETE, [result, errno]) => {
                Some((i32::from_ne_bytes(*result), i32::from_ne_bytes(*errno)))
            }
            _ => None,
        }
    }

    /// Whether the run succeeded.
    pub(crate) fn succeeded(&self) -> bool {
        self.result().is_some_and(|(result, _)| result == 0) && self.code == Some(0)
    }

    /// The numbers of the helper's messages.
    pub(crate) fn numbers(&self) -> Vec<u16> {
        self.asked.iter().map(|(number, _)| *number).collect()
    }

    /// The frames of the xenstore and console rings that the helper reported.
    pub(crate) fn rings(&self) -> Option<&[u8]> {
        let results = self.asked.iter().find(|(n, _)| *n == RESTORE_RESULTS)?;
        Some(&results.1)
    }
}

/// Request an action from the machine of a helper, before its next hypercall.
fn ask(requests: &Path, verb: &str, domid: DomId) -> io::Result<()> {
    let mut options = std::fs::File::options();
    let mut file = options.append(true).create(true).open(requests)?;
    writeln!(file, "{verb} {}", domid.0)
}

/// Play libxl until the helper ends. `suspend` suspends the guest, and returns whether it did.
fn play(child: Child, suspend: impl Fn() -> io::Result<bool>) -> io::Result<Run> {
    answer(child, |number| match number {
        SUSPEND => Ok(i32::from(suspend()?)),
        _ => Ok(0),
    })
}

/// Play libxl until the helper ends, with these answers to messages that need one.
fn answer(mut child: Child, mut answers: impl FnMut(u16) -> io::Result<i32>) -> io::Result<Run> {
    let missing = || io::Error::other("a pipe to the helper is missing");
    let mut to = child.stdin.take().ok_or_else(missing)?;
    let mut from = io::BufReader::new(child.stdout.take().ok_or_else(missing)?);
    let mut run = Run::default();
    let mut head = [0; 2];
    loop {
        match from.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        }
        let mut message = vec![0; u16::from_ne_bytes(head).into()];
        from.read_exact(&mut message)?;
        let (number, arguments) = message
            .split_first_chunk::<2>()
            .ok_or_else(|| io::Error::other("a message without a number"))?;
        match u16::from_ne_bytes(*number) {
            LOG => {
                let text = arguments.get(8..).unwrap_or_default();
                run.log.push(String::from_utf8_lossy(text).into_owned());
            }
            number @ (SUSPEND..=COMPLETE) => {
                run.asked.push((number, arguments.to_vec()));
                if number != RESTORE_RESULTS {
                    to.write_all(&answers(number)?.to_ne_bytes())?;
                }
            }
            // Progress.
            _ => {}
        }
    }
    run.code = child.wait()?.code();
    Ok(run)
}

/// A machine in `dir` with one running guest.
///
/// # Errors
///
/// As [`MockHost::create`].
pub(crate) fn with_guest(
    dir: &Path,
    kind: GuestKind,
    width: u8,
    mib: u64,
) -> Result<DomId, MockError> {
    with_working_guest(dir, kind, width, mib, None)
}

/// As [`with_guest`]; the guest works in steps.
pub(crate) fn with_working_guest(
    dir: &Path,
    kind: GuestKind,
    width: u8,
    mib: u64,
    stepped: Option<Stepped>,
) -> Result<DomId, MockError> {
    let config = HostConfig {
        stepped,
        ..config(mib)
    };
    guest_on(&MockHost::create(dir, &config)?, kind, width, mib)
}

/// As [`with_guest`], on an existing machine.
pub(crate) fn guest_on(
    host: &MockHost,
    kind: GuestKind,
    width: u8,
    mib: u64,
) -> Result<DomId, MockError> {
    host.create_guest(&GuestSpec {
        width,
        vcpus: 2,
        ..GuestSpec::new("peer", kind, mib)
    })
}

/// An empty domain, and its ports for xenstore and console.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Empty {
    /// Its number.
    pub(crate) domid: DomId,
    store: u32,
    console: u32,
}

/// A machine in `dir` with a domain that a guest can be restored into.
///
/// # Errors
///
/// As [`MockHost::create`].
pub(crate) fn empty(dir: &Path, kind: GuestKind, width: u8, mib: u64) -> Result<Empty, MockError> {
    empty_on(&MockHost::create(dir, &config(mib))?, kind, width, mib)
}

/// As [`empty`], on an existing machine.
pub(crate) fn empty_on(
    host: &MockHost,
    kind: GuestKind,
    width: u8,
    mib: u64,
) -> Result<Empty, MockError> {
    let domid = host.create_domain(kind, 2, (mib << 8) + 1024)?;
    let domain = host.domain(domid)?;
    // libxl does this before it starts the helper.
    if width == 4 {
        let guest = domain.pv().expect("only PV guests are 4 bytes wide");
        guest.set_guest_width(4)?;
    }
    Ok(Empty {
        domid,
        store: domain.alloc_unbound_port(DomId(0))?,
        console: domain.alloc_unbound_port(DomId(0))?,
    })
}

/// A machine with room for two guests of `mib` MiB.
pub(crate) fn config(mib: u64) -> HostConfig {
    HostConfig {
        memory_pages: (mib << 8) * 2 + 16384,
        ..HostConfig::default()
    }
}
