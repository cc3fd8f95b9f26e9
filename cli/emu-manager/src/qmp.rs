//! QMP commands that a save gives to qemu: to switch the dirty log, so that pages written by qemu
//! are sent like those written by the guest, and to continue after a save that has failed.
//!
//! qemu serves one client at a time, and xenopsd is another. So the connection is closed at once,
//! as libxl's own callback does (`tools/libs/light/libxl_x86.c`).

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::{Value, json};
use xsr_save_restore::progress::{Cancel, Cancelled};

/// How long a wait lasts before the token is checked again.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The longest message that qemu may send.
const LONGEST: usize = 64 << 10;

/// Time limits for qemu.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// For accepting the connection and greeting: another client may be connected.
    pub(crate) greeting: Duration,
    /// For answering a command.
    pub(crate) answer: Duration,
}

impl Limits {
    /// For the time before anything has happened to the guest.
    pub(crate) const PATIENT: Self = Self {
        greeting: Duration::from_secs(180),
        answer: Duration::from_secs(30),
    };
    /// For a save that has failed: xenopsd is waiting.
    pub(crate) const BRIEF: Self = Self {
        greeting: Duration::from_secs(3),
        answer: Duration::from_secs(3),
    };
}

/// Switches the dirty log of the qemu at `socket`.
///
/// # Errors
///
/// There is no qemu at `socket`; it does not answer, or refuses; `cancel` was set.
pub(crate) fn switch_dirty_log(
    socket: &Path,
    on: bool,
    limits: Limits,
    cancel: &Cancel,
) -> Result<()> {
    let command = json!({
        "execute": "xen-set-global-dirty-log",
        "arguments": {"enable": on},
    });
    execute(socket, &command, limits, cancel)
}

/// Has the qemu at `socket` continue: xenopsd stopped it when it suspended the guest.
///
/// # Errors
///
/// See [`switch_dirty_log`].
pub(crate) fn run_on(socket: &Path, limits: Limits) -> Result<()> {
    execute(socket, &json!({"execute": "cont"}), limits, &Cancel::new())
}

/// Connects, gives one command, and closes the connection.
fn execute(socket: &Path, command: &Value, limits: Limits, cancel: &Cancel) -> Result<()> {
    tracing::debug!(socket = %socket.display(), %command, "qemu");
    let greeted_by = Instant::now() + limits.greeting;
    let mut client =
        Client::connect(socket, cancel, greeted_by).context("connecting to qemu (QMP)")?;
    client.greeting(greeted_by)?;
    client.command(&json!({"execute": "qmp_capabilities"}), limits.answer)?;
    client.command(command, limits.answer)
}

struct Client<'c> {
    socket: UnixStream,
    cancel: &'c Cancel,
    /// Bytes that have arrived but are not parsed yet.
    buffer: Vec<u8>,
}

impl<'c> Client<'c> {
    /// Connects to qemu, which accepts one client at a time and lets one or two more wait. For any
    /// further client, connect(2) would block until one of these has gone.
    fn connect(path: &Path, cancel: &'c Cancel, until: Instant) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let address = UnixAddr::new(path)?;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        loop {
            match connect(socket.as_raw_fd(), &address) {
                Ok(()) => break,
                Err(Errno::EAGAIN) => {
                    if cancel.is_cancelled() {
                        return Err(io::Error::other(Cancelled).into());
                    }
                    ensure!(Instant::now() < until, "other clients are connected to it");
                    thread::sleep(LOOK_EVERY);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(LOOK_EVERY))?;
        // Commands are short: a socket without room for one is not being read at all.
        socket.set_write_timeout(Some(Duration::from_secs(1)))?;
        Ok(Self {
            socket,
            cancel,
            buffer: Vec::new(),
        })
    }

    fn greeting(&mut self, until: Instant) -> Result<()> {
        let message = self.message(until).context("waiting for its greeting")?;
        ensure!(message.get("QMP").is_some(), "it greets with {message}");
        Ok(())
    }

    fn command(&mut self, command: &Value, limit: Duration) -> Result<()> {
        let name = command["execute"].as_str().unwrap_or_default();
        self.socket.write_all(format!("{command}\r\n").as_bytes())?;
        let until = Instant::now() + limit;
        loop {
            let message = self.message(until);
            let message = message.with_context(|| format!("waiting for its answer to {name}"))?;
            if message.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = message.get("error") {
                let desc = error["desc"].as_str().map(str::to_owned);
                bail!(
                    "it refuses {name}: {}",
                    desc.unwrap_or_else(|| error.to_string())
                );
            }
            // An event, which may arrive at any time.
            ensure!(
                message.get("event").is_some(),
                "it answers {name} with {message}"
            );
        }
    }

    /// The next message. Each is one line.
    fn message(&mut self, until: Instant) -> Result<Value> {
        let mut room = [0; 4096];
        loop {
            ensure!(Instant::now() < until, "nothing came in time");
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line).context("it sent what is not JSON");
            }
            ensure!(
                self.buffer.len() <= LONGEST,
                "it sent more than {LONGEST} bytes without a line end"
            );
            if self.cancel.is_cancelled() {
                return Err(io::Error::other(Cancelled).into());
            }
            match self.socket.read(&mut room) {
                Ok(0) => bail!("it closed the connection"),
                Ok(n) => self.buffer.extend(&room[..n]),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted
                    | io::ErrorKind::WouldBlock
                    | io::ErrorKind::TimedOut => {}
                    _ => return Err(error.into()),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::{BufRead as _, BufReader};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
    const SHORT: Limits = Limits {
        greeting: Duration::from_millis(300),
        answer: Duration::from_millis(300),
    };

    /// A qemu that greets with `greeting` and gives each of `answers` to one command; returns the
    /// commands that it received.
    fn qemu(
        greeting: &'static str,
        answers: &'static [&'static str],
    ) -> (tempfile::TempDir, JoinHandle<Vec<Value>>) {
        serve(move |mut client| {
            client.write_all(greeting.as_bytes()).ok();
            let mut lines = BufReader::new(client.try_clone().unwrap()).lines();
            let mut commands = Vec::new();
            for answer in answers {
                let Some(Ok(line)) = lines.next() else { break };
                commands.push(serde_json::from_str(&line).unwrap());
                client.write_all(answer.as_bytes()).unwrap();
            }
            // Wait until the client has closed the connection.
            lines.next();
            commands
        })
    }

    /// A qemu that runs `with` on its first client.
    fn serve<T: Send + 'static>(
        with: impl FnOnce(UnixStream) -> T + Send + 'static,
    ) -> (tempfile::TempDir, JoinHandle<T>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
        let served = thread::spawn(move || with(listener.accept().unwrap().0));
        (dir, served)
    }

    fn switch(dir: &tempfile::TempDir, cancel: &Cancel) -> Result<()> {
        switch_dirty_log(&dir.path().join("qmp"), true, SHORT, cancel)
    }

    #[test]
    fn it_negotiates_switches_and_closes_the_connection() {
        let answers = &[
            "{\"return\": {}}\r\n",
            "{\"timestamp\": {}, \"event\": \"RTC_CHANGE\"}\n{\"return\": {}}\r\n",
        ];
        let (dir, served) = qemu(GREETING, answers);
        switch(&dir, &Cancel::new()).unwrap();
        let expected = [
            json!({"execute": "qmp_capabilities"}),
            json!({"execute": "xen-set-global-dirty-log", "arguments": {"enable": true}}),
        ];
        assert_eq!(served.join().unwrap(), expected);
    }

    #[test]
    fn a_qemu_that_does_otherwise_is_an_error() {
        for (greeting, answers, said) in [
            ("", &[][..], "waiting for its greeting: nothing came"),
            ("hello\n", &[], "not JSON"),
            ("{\"event\": \"X\"}\n", &[], "it greets with"),
            (GREETING, &[""], "answer to qmp_capabilities: nothing came"),
            (GREETING, &["{}\n"], "answers qmp_capabilities with {}"),
            (
                GREETING,
                &["{\"return\": {}}\n", "{\"error\": {\"desc\": \"no\"}}\n"],
                "refuses xen-set-global-dirty-log: no",
            ),
        ] {
            let (dir, served) = qemu(greeting, answers);
            let error = switch(&dir, &Cancel::new()).unwrap_err();
            assert!(format!("{error:#}").contains(said), "{said}: {error:#}");
            served.join().unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let error = switch(&dir, &Cancel::new()).unwrap_err();
        assert!(format!("{error:#}").contains("No such file"), "{error:#}");
    }

    #[test]
    fn events_do_not_extend_the_wait_for_an_answer() {
        const EVENT: &[u8] = b"{\"event\": \"RTC_CHANGE\"}\n";
        let (dir, served) = serve(|mut client| {
            client.write_all(GREETING.as_bytes()).unwrap();
            // Until the client has gone.
            while client.write_all(EVENT).is_ok() {}
        });
        let error = switch(&dir, &Cancel::new()).unwrap_err();
        let said = "answer to qmp_capabilities: nothing came in time";
        assert!(format!("{error:#}").contains(said), "{error:#}");
        served.join().unwrap();
    }

    #[test]
    fn a_qemu_whose_queue_is_full_is_waited_for_with_a_limit_and_the_token() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let of = |flags| socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        let address = UnixAddr::new(&path).unwrap();
        let listener = of(SockFlag::SOCK_CLOEXEC);
        bind(listener.as_raw_fd(), &address).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let mut clients = Vec::new();
        loop {
            let client = of(flags);
            match connect(client.as_raw_fd(), &address) {
                Ok(()) => clients.push(client),
                Err(errno) => break assert_eq!(errno, Errno::EAGAIN),
            }
        }
        let error = switch(&dir, &Cancel::new()).unwrap_err();
        assert!(
            format!("{error:#}").contains("other clients are connected"),
            "{error:#}"
        );
        let cancel = Cancel::new();
        cancel.cancel();
        let patient = switch_dirty_log(&path, true, Limits::PATIENT, &cancel);
        let error = format!("{:#}", patient.unwrap_err());
        assert!(error.contains("cancelled"), "{error}");
    }

    #[test]
    fn it_runs_on() {
        let answers = &["{\"return\": {}}\r\n", "{\"return\": {}}\r\n"];
        let (dir, served) = qemu(GREETING, answers);
        run_on(&dir.path().join("qmp"), SHORT).unwrap();
        assert_eq!(served.join().unwrap()[1], json!({"execute": "cont"}));
    }

    #[test]
    fn a_qemu_that_floods_is_an_error_and_a_wait_can_be_cancelled() {
        let (dir, served) = qemu(Box::leak("x".repeat(LONGEST + 9000).into_boxed_str()), &[]);
        let error = switch(&dir, &Cancel::new()).unwrap_err();
        assert!(
            format!("{error:#}").contains("without a line end"),
            "{error:#}"
        );
        served.join().unwrap();
        let (dir, served) = qemu("", &[]);
        let cancel = Cancel::new();
        cancel.cancel();
        let error = switch(&dir, &cancel).unwrap_err();
        assert!(format!("{error:#}").contains("cancelled"), "{error:#}");
        served.join().unwrap();
    }
}
