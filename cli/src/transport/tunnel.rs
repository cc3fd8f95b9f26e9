//! The connections of `xsr tunnel`: one end starts the other through ssh, and they agree on a
//! session.

use std::process::Child;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use xsr_save_restore::migrate::connection::Connection;
use xsr_save_restore::migrate::session::{Session, SessionRequest};

use super::{CHILD_PATIENCE, Link, option_of, session};
use crate::args::TunnelArgs;
use crate::interrupt::Interrupt;
use crate::terminal::Terminal;

/// The near end, with the command that has started the other one.
#[derive(Debug)]
pub(crate) struct Tunnel {
    pub(crate) session: Arc<Session>,
    beside: Option<Box<dyn Connection>>,
    child: Option<Child>,
}

/// A text as one word of a shell.
pub(crate) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The command that starts the other end. Two shells read it: the one here and the one there.
fn rune(ssh: &str, host: &str, remote: &str, command: &str) -> String {
    let there = format!("{remote} --serve {}", quoted(command));
    format!("exec {ssh} {} {}", quoted(host), quoted(&there))
}

impl Tunnel {
    /// Starts the other end, which is to run `command`, and makes a session with it. `suit` changes
    /// what the command line asks for.
    pub(crate) fn open(
        args: &TunnelArgs,
        command: &str,
        suit: impl Fn(SessionRequest) -> SessionRequest,
        limit: Duration,
        terminal: &Terminal,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        session::check_through_ssh(&args.session)?;
        let host = args.host.as_deref().unwrap_or_default();
        if host.is_empty() || host.starts_with('-') {
            return Err(option_of(host, &args.ssh));
        }
        let link = Link::run(&rune(&args.ssh, host, &args.remote, command))?;
        let wanted = session::Wanted {
            request: suit(session::request(&args.session)),
            session: &args.session,
            name: "tunnel",
            ssh: &args.ssh,
        };
        match session::agree(&wanted, link.connection, limit, terminal, interrupt) {
            Ok(agreed) => Ok(Self {
                session: Arc::new(agreed.session),
                beside: agreed.beside,
                child: link.child,
            }),
            Err(error) => {
                // The pipes are closed, which ends a command that reads them. It may say why.
                let begun = Instant::now();
                if let Some(child) = link.child {
                    end(child, || begun.elapsed() < CHILD_PATIENCE);
                }
                Err(error)
            }
        }
    }

    /// Closes everything, within this time.
    pub(crate) fn close(self, limit: Duration) {
        let begun = Instant::now();
        let session = self.session;
        let closing = thread::Builder::new().name("tunnel-close".to_owned());
        let closing = closing.spawn(move || session.close());
        let waits = || begun.elapsed() < limit;
        while waits() && closing.as_ref().is_ok_and(|thread| !thread.is_finished()) {
            thread::park_timeout(Duration::from_millis(5));
        }
        drop(self.beside);
        if let Some(child) = self.child {
            end(child, waits);
        }
    }
}

/// Waits for the command that has started the other end, while `waits`, and kills it then: it is an
/// ssh whose host does not answer any more, and carries nothing that is still wanted.
fn end(mut child: Child, waits: impl Fn() -> bool) {
    while waits() && matches!(child.try_wait(), Ok(None)) {
        thread::park_timeout(Duration::from_millis(5));
    }
    if let Err(error) = child.kill() {
        tracing::debug!(%error, "the command could not be ended");
    }
}

/// The other end's session.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) session: Arc<Session>,
    /// Stays open beside the session.
    _beside: Option<Box<dyn Connection>>,
}

impl Served {
    /// Agrees on a session with the end that has started this process.
    pub(crate) fn accept(
        args: &TunnelArgs,
        suit: impl Fn(SessionRequest) -> SessionRequest,
        answer: Duration,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let offer = session::Offer {
            request: suit(session::accepted(Duration::from_secs(u32::MAX.into()))),
            listen_address: args.listen_address,
            ports: args.ports.clone(),
        };
        let stdio = Link::stdio()?;
        let agreed = session::offered(&offer, stdio.connection, answer, interrupt)?;
        Ok(Self {
            session: Arc::new(agreed.session),
            _beside: agreed.beside,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_survives_both_shells() {
        let command = "xl -t migrate-receive 'a b' \"$HOME\"";
        let rune = rune("ssh -v", "web", "xsr tunnel", command);
        let words = rune.strip_prefix("exec ssh -v 'web' ").unwrap();
        // What a shell makes of one word.
        let read = |script: String| {
            let mut sh = std::process::Command::new("sh");
            let said = sh.args(["-c", &script]).output().unwrap().stdout;
            String::from_utf8(said).unwrap()
        };
        let there = read(format!("printf %s {words}"));
        let there = there
            .strip_prefix("xsr tunnel --serve ")
            .unwrap()
            .to_owned();
        assert_eq!(read(format!("printf %s {there}")), command);
    }
}
