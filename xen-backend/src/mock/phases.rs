//! Points at which a test can hold a command. Each is reported to a socket that `XSR_MOCK_PHASES`
//! names, and the command waits there for a line in reply. Without that variable, which only tests
//! set, nothing happens.
//!
//! ```text
//! the command ──► "suspended 1234\n" ──► the test      (the phase, the process)
//!             ◄── "\n" ◄────────────────
//! ```

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, OnceLock, PoisonError};

/// The variable that names the socket.
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

/// The command has reached the phase `name`. A test may hold it there.
pub fn phase(name: &str) {
    let Some(test) = TEST.get_or_init(connect) else {
        return;
    };
    let mut test = test.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = tell(&mut test, name) {
        // The test has ended its connection.
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
