//! `xsr tunnel`: runs a command on another host and carries its stdin, stdout and stderr over a
//! session (docs/session.md). `xl migrate -s 'xsr tunnel'` uses it in place of ssh.
//!
//! This file is the end that the user starts. `tunnel/far.rs` is the other one, and
//! `tunnel/frames.rs` has what they tell each other.
//!
//! C implementation of what it stands in for: `create_migration_child`, `migration_child_report` in
//! `tools/xl/xl_migrate.c`.

mod far;
mod frames;

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use xsr_save_restore::migrate::connection::{Connection as _, Stage, Wait};
use xsr_save_restore::migrate::session::{Session, SessionRequest};
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::sink::FdSink;

use self::frames::{Frame, Hearing, Orders, Pump, Speaker};
use crate::args::TunnelArgs;
use crate::exit::{BadUsage, Code};
use crate::interrupt::Interrupt;
use crate::left::Left;
use crate::terminal::Terminal;
use crate::transport::{self, Tunnel};

/// The exit code of a tunnel that fails itself, as ssh's.
const FAILED: u8 = 255;

/// How long each of the two ends waits for the other one to take part in making the session.
const ANSWER: Duration = Duration::from_secs(60);

/// How long closing may take. xl waits 2 s for the command that it has started.
const CLOSE: Duration = Duration::from_millis(1500);

/// What an end has in transit at most if the other one takes over when it is lost: with the pipe
/// from xl and the buffer here, no more than 256 KiB. libxl lets the guest's network output go as
/// soon as it has written a checkpoint.
const IN_TRANSIT: u64 = 128 << 10;

/// Run the command.
pub(crate) fn run(args: &TunnelArgs, terminal: &Terminal) -> Result<Code> {
    if let Some(command) = &args.serve {
        return far::run(args, command, terminal);
    }
    let ended = near(args, terminal);
    match ended {
        Err(error) if !error.is::<BadUsage>() => {
            terminal.error(&error);
            Ok(Code::OfCommand(FAILED))
        }
        ended => ended,
    }
}

/// Whether a command is a receiver that runs the domain when the connection is lost.
fn stands_by<'w>(words: impl IntoIterator<Item = &'w str>) -> bool {
    let mut words = words.into_iter();
    let receives = words.any(|word| word == "migrate-receive");
    receives
        && words.any(|word| match word.strip_prefix('-') {
            Some(long) if long.starts_with('-') => word == "--colo",
            Some(letters) => letters.contains('r'),
            None => false,
        })
}

/// What this end has in transit, and whether it takes up a lost link again.
fn suited(request: SessionRequest, command: &str) -> SessionRequest {
    match stands_by(command.split_whitespace()) {
        true => request.reconnect(Duration::ZERO).in_transit(IN_TRANSIT),
        false => request,
    }
}

fn near(args: &TunnelArgs, terminal: &Terminal) -> Result<Code> {
    // The other end is told when a signal ends this one.
    Left::work().until_the_end();
    let interrupt = Interrupt::of_process()?;
    ensure!(
        !xsr_stdio::stdout_was_closed(),
        "stdout is closed: what the command writes would be lost"
    );
    let command = args.command.join(" ");
    let tunnel = {
        let suit = |request| suited(request, &command);
        Tunnel::open(args, &command, suit, ANSWER, terminal, &interrupt)?
    };
    let (stdin, stdout) = transport::take_stdio()?;
    let session = Arc::clone(&tunnel.session);
    let orders = Orders::new().context("making a pipe")?;
    let pump = Pump {
        speaker: Arc::new(Speaker::new(Arc::clone(&session))),
        orders: Arc::clone(&orders),
        errors: false,
    };
    let unreadable = Arc::new(OnceLock::new());
    spawn("tunnel-in", {
        let (session, unreadable) = (Arc::clone(&session), Arc::clone(&unreadable));
        move || {
            if let Err(error) = pump.run(stdin, |_| ()) {
                unreadable.get_or_init(|| error);
                give_up(&session);
            }
        }
    })?;
    let ended = deliver(&session, stdout, &orders, interrupt.cancel());
    orders.end();
    if ended.is_err() {
        discard(&session);
    }
    tunnel.close(CLOSE);
    match (ended, unreadable.get()) {
        (Ok(code), _) => Ok(Code::OfCommand(code)),
        (Err(_), Some(error)) => bail!("reading stdin: {error}"),
        (Err(_), None) if interrupt.cancel().is_cancelled() => {
            bail!("the tunnel was interrupted, and the command's stdin has ended")
        }
        (Err(error), None) => Err(error),
    }
}

/// Lets nothing arrive that is still on this host, and lets the other end know that it is lost.
fn discard(session: &Session) {
    session.stage(Stage::TakenBack);
}

/// The same, and ends the session.
fn give_up(session: &Session) {
    discard(session);
    session.close();
}

/// Passes on what the other end says, until COMMAND's exit code.
///
/// # Errors
///
/// The session is lost; stdout takes no more, although it is read; the wait was cancelled.
fn deliver(session: &Session, stdout: File, orders: &Orders, cancel: &Cancel) -> Result<u8> {
    let mut hearing = Hearing::new(session, Wait::forever().unless(cancel));
    let stdout = FdSink::cancellable(stdout, cancel.clone()).context("stdout")?;
    let mut stdout = Some(stdout);
    let messages = Messages::start(cancel)?;
    loop {
        match hearing.next()? {
            Frame::Data(bytes) => {
                let written = stdout.as_mut().map_or(Ok(()), |to| to.write_all(bytes));
                match written {
                    Ok(()) => {}
                    Err(error) if is_unread(&error) => {
                        tracing::debug!(%error, "stdout is not read any more");
                        stdout = None;
                        orders.unread();
                    }
                    Err(error) => return Err(error).context("writing stdout"),
                }
            }
            Frame::End => stdout = None,
            Frame::Errors(bytes) => messages.show(bytes),
            Frame::Unread => orders.refused(),
            Frame::Exit(code) => return Ok(code),
        }
    }
}

/// Writes COMMAND's messages to stderr in a thread: a terminal that takes nothing, for example, does
/// not hold up what COMMAND says on stdout. Dropping this waits a little for the last of them.
struct Messages {
    tell: Option<SyncSender<Vec<u8>>>,
    ended: Receiver<()>,
}

impl Messages {
    /// As many frames of messages may wait; then the tunnel waits, as ssh does.
    const WAITING: usize = 32;

    /// How long the last messages are waited for.
    const LAST: Duration = Duration::from_millis(400);

    fn start(cancel: &Cancel) -> Result<Self> {
        let (tell, told) = mpsc::sync_channel::<Vec<u8>>(Self::WAITING);
        let (ends, ended) = mpsc::sync_channel(0);
        // It may be a socket or pipe that does not block, with ssh beside this process.
        let stderr = FdSink::cancellable(io::stderr(), cancel.clone()).context("stderr")?;
        spawn("tunnel-errors", move || {
            let mut stderr = Some(stderr);
            for bytes in told {
                let written = stderr.as_mut().map(|to| to.write_all(&bytes));
                if let Some(Err(error)) = written {
                    // The messages are lost, and nothing depends on them.
                    tracing::debug!(%error, "stderr takes nothing more");
                    stderr = None;
                }
            }
            drop(ends);
        })?;
        let tell = Some(tell);
        Ok(Self { tell, ended })
    }

    fn show(&self, bytes: &[u8]) {
        if let Some(tell) = &self.tell {
            // Fails only if the thread has panicked.
            tell.send(bytes.to_vec()).ok();
        }
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        self.tell = None;
        // The thread ends, or the time is over.
        self.ended.recv_timeout(Self::LAST).ok();
    }
}

/// Whether the reader of a pipe or a socket has closed it.
fn is_unread(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(run)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receiver_that_takes_over_is_recognised() {
        for (command, expected) in [
            ("xl migrate-receive -r", true),
            ("xl migrate-receive -e -pr", true),
            ("xl -t migrate-receive --colo", true),
            ("sudo xsr migrate-receive -r --backend mock:/x", true),
            ("xl migrate-receive -e -d -p", false),
            ("xl migrate-receive", false),
            ("xsr migrate-receive --force", false),
            ("xl -r migrate-receive", false),
            ("cat -r", false),
        ] {
            let words = command.split_whitespace();
            assert_eq!(stands_by(words), expected, "{command}");
        }
    }
}
