//! The other end of a tunnel, which ssh has started: it runs COMMAND.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::process::{ChildStdin, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use xsr_save_restore::migrate::connection::Wait;
use xsr_save_restore::migrate::session::Session;
use xsr_save_restore::progress::Cancel;

use super::frames::{Flags, Frame, Hearing, Pump, Speaker};
use super::{ANSWER, FAILED, spawn, suited};
use crate::args::TunnelArgs;
use crate::exit::Code;
use crate::interrupt::Interrupt;
use crate::terminal::Terminal;
use crate::transport::Served;
use crate::xl::child;

/// How long to wait for the end of COMMAND's output once it has ended. A process that it has left
/// running may keep its stdout open.
const OUTPUT: Duration = Duration::from_secs(1);

/// How often to look whether something has happened.
const LOOK: Duration = Duration::from_millis(20);

/// Runs COMMAND for the other end.
pub(super) fn run(args: &TunnelArgs, command: &str, terminal: &Terminal) -> Result<Code> {
    // ssh may end before the session does.
    let interrupt = Interrupt::catch_without_hangup()?;
    let served = Served::accept(args, |request| suited(request, command), ANSWER, &interrupt)?;
    let session = Arc::clone(&served.session);
    let started = child::plain(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let speaker = Arc::new(Speaker::new(Arc::clone(&session)));
    let mut child = match started.context("starting sh") {
        Ok(child) => child,
        Err(error) => {
            terminal.error(&error);
            let told = speaker.say(&Frame::Exit(FAILED), Wait::forever().at_most(OUTPUT));
            session.close();
            return told.map(|()| Code::Failed).context("telling the near end");
        }
    };
    let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
        anyhow::bail!("the pipes to sh");
    };
    let flags = Arc::new(Flags::default());
    let done = Cancel::new();
    let (gone, lost) = mpsc::channel();
    spawn("tunnel-in", {
        let (session, flags, cancel) = (
            Arc::clone(&session),
            Arc::clone(&flags),
            interrupt.cancel().clone(),
        );
        move || {
            feed(&session, stdin, &flags, &cancel);
            if gone.send(()).is_err() {
                tracing::debug!("the command had ended before");
            }
        }
    })?;
    let carry = |from: OwnedFd, errors: bool| -> Result<Arc<AtomicBool>> {
        let ended = Arc::new(AtomicBool::new(false));
        let pump = Pump {
            speaker: Arc::clone(&speaker),
            flags: Arc::clone(&flags),
            errors,
            ended: Arc::clone(&ended),
            done: done.clone(),
        };
        spawn("tunnel-out", move || pump.run(from.into()))?;
        Ok(ended)
    };
    let ends = [carry(stdout.into(), false)?, carry(stderr.into(), true)?];
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for the command")? {
            break status;
        }
        if lost.recv_timeout(LOOK).is_ok() {
            // Its stdin is closed by now. It ends by itself, and what it says is discarded.
            terminal.say("tunnel: the connection is lost: waiting for the command to end");
            child.wait().context("waiting for the command")?;
            return Ok(Code::Failed);
        }
    };
    let begun = Instant::now();
    while begun.elapsed() < OUTPUT && !ends.iter().all(|end| end.load(Ordering::Relaxed)) {
        thread::park_timeout(LOOK);
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    let wait = Wait::forever().unless(interrupt.cancel());
    let told = speaker.say(&Frame::Exit(code.unwrap_or(FAILED)), wait);
    session.close();
    done.cancel();
    told.context("telling the near end how the command has ended")?;
    Ok(Code::Fine)
}

/// Gives COMMAND what arrives for its stdin, until the session ends.
fn feed(session: &Session, stdin: ChildStdin, flags: &Flags, cancel: &Cancel) {
    let mut hearing = Hearing::new(session, Wait::forever().unless(cancel));
    let mut stdin = Some(stdin);
    loop {
        match hearing.next() {
            Ok(Frame::Data(bytes)) => {
                let written = stdin.as_mut().map(|to| to.write_all(bytes));
                if let Some(Err(error)) = written {
                    tracing::debug!(%error, "the command reads no more");
                    stdin = None;
                    flags.unread.store(true, Ordering::Relaxed);
                }
            }
            Ok(Frame::End) => stdin = None,
            Ok(Frame::Unread) => flags.refused.store(true, Ordering::Relaxed),
            Ok(frame) => {
                tracing::warn!(?frame, "the near end has no such thing to say");
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "nothing more arrives for the command");
                return;
            }
        }
    }
}
