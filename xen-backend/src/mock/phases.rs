//! Points at which a test can hold a command: each is told to a socket that
//! `XSR_MOCK_PHASES` names, and waited at until a line comes back. Without that variable,
//! which is for tests alone, nothing happens.
//!
//! ```text
//! the command ──► "suspended 1234\n" ──► the test      (the phase, the process)
//!             ◄── "\n" ◄────────────────
//! ```

use std::cell::Cell;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Names the socket.
const VARIABLE: &str = "XSR_MOCK_PHASES";

static TEST: OnceLock<Option<Mutex<BufReader<UnixStream>>>> = OnceLock::new();

fn connect() -> Option<Mutex<BufReader<UnixStream>>> {
    let path = std::env::var_os(VARIABLE)?;
    match UnixStream::connect(&path) {
        Ok(socket) => Some(Mutex::new(BufReader::new(socket))),
        Err(error) => {
            tracing::warn!(%error, "{VARIABLE}");
            None
        }
    }
}

thread_local! {
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// What this thread does is no phase of the command's.
pub(super) fn not_on_this_thread() {
    SILENT.set(true);
}

/// The command has come as far as `name`. A test may hold it there.
pub fn phase(name: &str) {
    if SILENT.get() {
        return;
    }
    let Some(test) = TEST.get_or_init(connect) else {
        return;
    };
    let mut test = test.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = tell(&mut test, name) {
        // The test does not care any more.
        tracing::debug!(%error, name, "{VARIABLE}");
    }
}

fn tell(test: &mut BufReader<UnixStream>, name: &str) -> io::Result<()> {
    let process = std::process::id();
    test.get_mut()
        .write_all(format!("{name} {process}\n").as_bytes())?;
    let mut answer = String::new();
    test.read_line(&mut answer)?;
    Ok(())
}
