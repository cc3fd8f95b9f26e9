//! What the two ends of a migration say to each other around the image, as xl's two
//! ends do, octet for octet: either may be an xl.
//!
//! ```text
//!  sender                               receiver
//!          ◄── banner ──────────────────
//!  image   ──► xl header, libxl stream ─►
//!          ◄── ready ───────────────────
//!  go      ──► ─────────────────────────►  runs the domain
//!          ◄── report, status 0 ────────
//!                    or
//!          ◄── report, status, go ──────  has destroyed its copy
//! ```
//!
//! There is no specification. C implementation: `tools/xl/xl.h`,
//! `tools/xl/xl_migrate.c:migrate_domain`, `migrate_receive`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use xsr_save_restore::pace::Pace;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::sink::FdSink;

use crate::interrupt::{Interrupt, readable_within};
use crate::text::shown;

/// What one end says: fixed octets each. All but the banner end in NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// The receiver: send.
    Banner,
    /// The receiver: all is here; may it run?
    Ready,
    /// Whoever had the domain lets go of it: the sender, and a receiver that has failed
    /// gives it back so.
    Go,
    /// The receiver: what came of it. A status octet follows, 0 for good.
    Report,
}

impl Message {
    const fn octets(self) -> &'static [u8] {
        match self {
            Self::Banner => b"xl migration receiver ready, send binary domain data.\n",
            Self::Ready => b"domain received, ready to unpause\0",
            Self::Go => b"domain is yours, you are cleared to unpause\0",
            Self::Report => b"my copy unpause results are as follows\0",
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Banner => "banner",
            Self::Ready => "\"ready\"",
            Self::Go => "\"go\"",
            Self::Report => "report",
        }
    }

    /// Say it.
    ///
    /// # Errors
    ///
    /// The descriptor's; the other end takes nothing for as long as `limit`. It cannot have got
    /// all of it then.
    pub(crate) fn send(self, to: &File, limit: Duration) -> Result<()> {
        write_within(to, self.octets(), limit)
            .with_context(|| format!("sending the {}", self.name()))
    }

    /// Hear it.
    ///
    /// # Errors
    ///
    /// The other end hangs up, says something else, or has not said all of it after `limit`;
    /// the user interrupts.
    pub(crate) fn expect(self, from: &File, interrupt: &Interrupt, limit: Duration) -> Result<()> {
        self.hear(from, Patience::within(interrupt, limit))
    }

    fn hear(self, from: &File, patience: Patience<'_>) -> Result<()> {
        let expected = self.octets();
        let mut got = vec![0; expected.len()];
        let n = fill(from, &mut got, patience)
            .map_err(|error| patience.words(error))
            .with_context(|| format!("waiting for the {}", self.name()))?;
        let got = &got[..n];
        match (got == expected, expected.starts_with(got)) {
            (true, _) => Ok(()),
            (false, true) if n == 0 => bail!(
                "the other end hung up where its {} was expected",
                self.name()
            ),
            (false, true) => bail!("the other end hung up inside its {}", self.name()),
            (false, false) if got.starts_with(WHY) => {
                let why = why(got.to_vec(), from).unwrap_or_default();
                bail!("the other end has failed: {why}")
            }
            (false, false) => bail!(
                "the other end said {:?}{} where its {} was expected",
                got.escape_ascii().to_string(),
                if n < expected.len() {
                    ", then hung up,"
                } else {
                    ""
                },
                self.name()
            ),
        }
    }
}

/// What begins the reason of a receiver that fails, over a socket: to either kind of sender
/// these are not the words that it expects, so the migration has failed.
const WHY: &[u8] = b"xsr: failed: ";
/// A reason is no longer than this, with what begins it.
const LONGEST_WHY: usize = 1024;
/// How long a reason is waited for, and may take to be written: the other end hangs up after it.
const WHY_WAIT: Duration = Duration::from_secs(1);

/// Say why this end fails, as the last thing that is said. One line, escaped and bounded.
pub(crate) fn say_why(to: &File, why: &str) {
    let mut line = WHY.to_vec();
    line.extend(shown(why).bytes().take(LONGEST_WHY - WHY.len() - 1));
    line.push(b'\n');
    if let Err(error) = write_within(to, &line, WHY_WAIT) {
        tracing::debug!(%error, "the other end could not be told why");
    }
}

/// What the other end of a socket has said last, if that is why it has failed: `said` of it has
/// been read already.
pub(crate) fn why(mut said: Vec<u8>, mut from: &File) -> Option<String> {
    let patience = Patience::Until(Instant::now() + WHY_WAIT);
    let mut room = [0; LONGEST_WHY];
    while said.len() < LONGEST_WHY && !said.ends_with(b"\n") {
        match patience
            .wait_readable(from)
            .and_then(|()| from.read(&mut room[said.len()..]))
        {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                let at = said.len();
                said.extend_from_slice(&room[at..at + n]);
            }
        }
    }
    let text = String::from_utf8_lossy(said.strip_prefix(WHY)?);
    // Whatever it begins with, it comes from outside.
    Some(shown(text.trim_end()))
}

/// What the receiver says at the end, behind [`Message::Report`].
fn send_status(to: &File, status: u8, limit: Duration) -> Result<()> {
    write_within(to, &[status], limit).context("sending the status")
}

/// Write all of it. The other end may take nothing for so long.
fn write_within(to: &File, bytes: &[u8], limit: Duration) -> io::Result<()> {
    let sink = FdSink::cancellable(to, Cancel::new())?;
    sink.keep_pace(Arc::new(Pace::new(limit))).write_all(bytes)
}

/// The status octet of a receiver that has failed. xl's is a libxl error; a sender looks
/// only whether it is 0.
const FAILED: u8 = 1;

/// Check that the receiver says nothing more before it has been told to go: what it says then
/// cannot be an answer, and the domain would be destroyed here on its word.
///
/// # Errors
///
/// Something waits to be read, or the receiver has hung up.
pub(crate) fn nothing_waits(from: &File) -> Result<()> {
    if readable_within(Some(from), Duration::ZERO)? {
        bail!("the other end has hung up or said more than it was asked, before it was told to go");
    }
    Ok(())
}

/// Say that the domain runs here.
pub(crate) fn report_running(to: &File, limit: Duration) -> Result<()> {
    Message::Report.send(to, limit)?;
    send_status(to, 0, limit)
}

/// Say that it does not run here; [`Message::Go`] then gives it back.
pub(crate) fn report_failed(to: &File, limit: Duration) -> Result<()> {
    Message::Report.send(to, limit)?;
    send_status(to, FAILED, limit)
}

/// Where in what the other end has said its report begins, if it has begun one: the words that
/// begin no other message suffice.
pub(crate) fn report_in(said: &[u8]) -> Option<usize> {
    let begin = &Message::Report.octets()[..8];
    said.windows(begin.len()).rposition(|w| w == begin)
}

/// The status in a report, if it has come so far.
pub(crate) fn status(report: &[u8]) -> Option<u8> {
    report.get(Message::Report.octets().len()).copied()
}

/// What a status says, for people.
pub(crate) fn status_words(status: u8) -> String {
    match status {
        0 => "the other end runs the domain".to_owned(),
        _ => format!("the other end has failed (status {status}); what it printed says why"),
    }
}

/// Types of libxl records that come in the place of a checkpoint's when the sender of
/// checkpoints takes its domain back: none that anybody knows, and a CHECKPOINT of the libxc
/// layer, which follows one where a checkpoint was broken off behind it.
pub(crate) const WITHDRAWAL: [u32; 2] = [0x7fff_ffff, 0xe];

/// Take back a domain whose checkpoints the other end keeps, so that it does not run the
/// last of them when this end hangs up. xl has no word for it, and so this is a checkpoint
/// that no receiver can apply, xl's neither: it destroys its copy.
///
/// # Errors
///
/// What the sink says. The other end may run its copy then.
pub(crate) fn withdraw(to: &mut impl Write) -> io::Result<()> {
    const CHECKPOINT: u32 = 0xe;
    const CHECKPOINT_END: u32 = 4;
    without_bodies(to, [CHECKPOINT, WITHDRAWAL[0], CHECKPOINT_END])
}

/// Write records without a body, of these kinds.
///
/// # Errors
///
/// What the sink says.
pub(crate) fn without_bodies(to: &mut impl Write, kinds: [u32; 3]) -> io::Result<()> {
    let heads = kinds.map(|kind| u64::from(kind).to_le_bytes());
    to.write_all(heads.as_flattened())?;
    to.flush()
}

/// What a sender that has let go of its domain hears first: the report, and its status.
///
/// # Errors
///
/// Whether the receiver runs the domain cannot be known.
pub(crate) fn report(from: &File, patience: Patience<'_>) -> Result<u8> {
    Message::Report.hear(from, patience)?;
    let mut status = [0];
    let filled = fill(from, &mut status, patience).map_err(|error| patience.words(error));
    if filled.context("waiting for the status")? == 0 {
        bail!("the other end hung up where its status was expected");
    }
    Ok(status[0])
}

/// What it hears after a report of failure.
///
/// # Errors
///
/// The receiver did not say that its copy is gone.
pub(crate) fn given_back(from: &File, patience: Patience<'_>, status: u8) -> Result<()> {
    let heard = Message::Go.hear(from, patience);
    heard.with_context(|| format!("the other end failed (status {status})"))
}

/// Both.
///
/// # Errors
///
/// As [`report`] and [`given_back`].
pub(crate) fn outcome(from: &File, patience: Patience<'_>) -> Result<Outcome> {
    match report(from, patience)? {
        0 => Ok(Outcome::Runs),
        status => {
            given_back(from, patience, status)?;
            Ok(Outcome::GivenBack { status })
        }
    }
}

/// The same where the other end may have said something else before: `heard` of it has been
/// read, and its last words are what counts. It hangs up behind them.
///
/// # Errors
///
/// As [`outcome`].
pub(crate) fn outcome_behind(
    heard: Vec<u8>,
    from: &File,
    patience: Patience<'_>,
) -> Result<Outcome> {
    /// Of what comes before them, so much is kept.
    const KEPT: usize = 1 << 16;
    let mut all = heard;
    let mut room = [0; 4096];
    loop {
        let n = match patience
            .wait_readable(from)
            .and_then(|()| (&*from).read(&mut room))
        {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            // What has come by now is all that will.
            Err(error) => {
                tracing::debug!(%error, "the other end said no more");
                break;
            }
        };
        all.extend_from_slice(&room[..n]);
        all.drain(..all.len().saturating_sub(KEPT));
    }
    let report = Message::Report.octets();
    let Some(at) = all.windows(report.len()).rposition(|w| w == report) else {
        bail!("the other end did not say what became of its copy");
    };
    let go = Message::Go.octets();
    match &all[at + report.len()..] {
        [0, ..] => Ok(Outcome::Runs),
        [status, rest @ ..] if rest.starts_with(go) => Ok(Outcome::GivenBack { status: *status }),
        _ => bail!("the other end failed, and did not say that its copy is gone"),
    }
}

/// How long to wait for what the other end says.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience<'a> {
    /// Until the user asks to stop, and until then: the limit after which that is.
    Within(&'a Interrupt, Option<Instant>, Duration),
    /// Until then.
    Until(Instant),
}

impl<'a> Patience<'a> {
    /// From now on for so long.
    pub(crate) fn within(interrupt: &'a Interrupt, limit: Duration) -> Self {
        Self::Within(interrupt, Instant::now().checked_add(limit), limit)
    }

    /// What an error of a wait is, for people.
    fn words(self, error: io::Error) -> io::Error {
        match self {
            Self::Within(_, _, limit) if error.kind() == io::ErrorKind::TimedOut => {
                let seconds = limit.as_secs_f64();
                let why = format!("the other end has not answered in {seconds} s");
                io::Error::new(error.kind(), why)
            }
            _ => error,
        }
    }

    fn wait_readable(self, from: &File) -> io::Result<()> {
        let until = match self {
            Self::Within(interrupt, until, _) => {
                return interrupt.wait_readable_until(from, until);
            }
            Self::Until(until) => until,
        };
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if readable_within(Some(from), left)? {
                return Ok(());
            }
        }
    }
}

/// Who has the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The receiver.
    Runs,
    /// The sender: the receiver failed, and has destroyed its copy.
    GivenBack {
        /// Not 0.
        status: u8,
    },
}

/// Read until `room` is full or nothing more comes; how many octets came. Never more
/// than fit: what follows is for others.
fn fill(mut from: &File, room: &mut [u8], patience: Patience<'_>) -> io::Result<usize> {
    let mut filled = 0;
    while filled < room.len() {
        patience.wait_readable(from)?;
        match from.read(&mut room[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // A descriptor somebody else has made non-blocking.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}
