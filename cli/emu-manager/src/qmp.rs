//! The device model's dirty log, switched by QMP: pages that qemu writes are dirty as those that the
//! guest writes are.
//!
//! qemu serves one client at a time, and xenopsd is another: the connection is closed at once.
//! libxl's own callback does the same (`tools/libs/light/libxl_x86.c`).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use xsr_save_restore::progress::{Cancel, Cancelled};

/// How long a wait lasts before the token is looked at again.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The longest message that qemu may send.
const LONGEST: usize = 64 << 10;

/// How long qemu may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// To greet: another client may be connected.
    pub(crate) greeting: Duration,
    /// To answer a command.
    pub(crate) answer: Duration,
}

impl Limits {
    /// Before anything has happened to the guest.
    pub(crate) const PATIENT: Self = Self {
        greeting: Duration::from_secs(180),
        answer: Duration::from_secs(30),
    };
    /// When a save has failed: xenopsd waits.
    pub(crate) const BRIEF: Self = Self {
        greeting: Duration::from_secs(3),
        answer: Duration::from_secs(3),
    };
}

/// Switch the dirty log of the qemu behind `socket`.
///
/// # Errors
///
/// There is no such qemu; it does not answer, or refuses; `cancel` says so.
pub(crate) fn switch_dirty_log(
    socket: &Path,
    on: bool,
    limits: Limits,
    cancel: &Cancel,
) -> Result<()> {
    tracing::debug!(socket = %socket.display(), on, "qemu's dirty log");
    let mut client = Client::connect(socket, cancel).context("connecting to qemu (QMP)")?;
    client.greeting(limits.greeting)?;
    client.command(&json!({"execute": "qmp_capabilities"}), limits.answer)?;
    let command = json!({
        "execute": "xen-set-global-dirty-log",
        "arguments": {"enable": on},
    });
    client.command(&command, limits.answer)
}

struct Client<'c> {
    socket: UnixStream,
    cancel: &'c Cancel,
    /// What has come and is not read yet.
    buffer: Vec<u8>,
}

impl<'c> Client<'c> {
    fn connect(path: &Path, cancel: &'c Cancel) -> Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(LOOK_EVERY))?;
        // Commands are short: a socket that has no room for one is not read at all.
        socket.set_write_timeout(Some(Duration::from_secs(1)))?;
        Ok(Self {
            socket,
            cancel,
            buffer: Vec::new(),
        })
    }

    fn greeting(&mut self, limit: Duration) -> Result<()> {
        let message = self.message(limit).context("waiting for its greeting")?;
        ensure!(message.get("QMP").is_some(), "it greets with {message}");
        Ok(())
    }

    fn command(&mut self, command: &Value, limit: Duration) -> Result<()> {
        let name = command["execute"].as_str().unwrap_or_default();
        self.socket.write_all(format!("{command}\r\n").as_bytes())?;
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let message = self.message(left);
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
            // An event, which may come at any time.
            ensure!(
                message.get("event").is_some(),
                "it answers {name} with {message}"
            );
        }
    }

    /// The next message. Each is one line.
    fn message(&mut self, limit: Duration) -> Result<Value> {
        let until = Instant::now() + limit;
        let mut room = [0; 4096];
        loop {
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
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                        ensure!(Instant::now() < until, "nothing came in time");
                    }
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
    use std::thread::{self, JoinHandle};

    use super::*;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
    const SHORT: Limits = Limits {
        greeting: Duration::from_millis(300),
        answer: Duration::from_millis(300),
    };

    /// A qemu that greets with `greeting`, and answers as many commands as there are `answers`;
    /// the commands that it got.
    fn qemu(
        greeting: &'static str,
        answers: &'static [&'static str],
    ) -> (tempfile::TempDir, JoinHandle<Vec<Value>>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
        let served = thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            client.write_all(greeting.as_bytes()).ok();
            let mut lines = BufReader::new(client.try_clone().unwrap()).lines();
            let mut commands = Vec::new();
            for answer in answers {
                let Some(Ok(line)) = lines.next() else { break };
                commands.push(serde_json::from_str(&line).unwrap());
                client.write_all(answer.as_bytes()).unwrap();
            }
            // Until the client has closed the connection.
            lines.next();
            commands
        });
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
