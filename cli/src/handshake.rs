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

use anyhow::{Context as _, Result, bail};

use crate::interrupt::Interrupt;

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
    /// What the descriptor says. The other end cannot have got all of it then.
    pub(crate) fn send(self, mut to: &File) -> Result<()> {
        to.write_all(self.octets())
            .with_context(|| format!("sending the {}", self.name()))
    }

    /// Hear it.
    ///
    /// # Errors
    ///
    /// The other end hangs up, or says something else; somebody interrupts.
    pub(crate) fn expect(self, from: &File, interrupt: &Interrupt) -> Result<()> {
        let expected = self.octets();
        let mut got = vec![0; expected.len()];
        let n = fill(from, &mut got, interrupt)
            .with_context(|| format!("waiting for the {}", self.name()))?;
        let got = &got[..n];
        match (got == expected, expected.starts_with(got)) {
            (true, _) => Ok(()),
            (false, true) if n == 0 => bail!(
                "the other end hung up where its {} was expected",
                self.name()
            ),
            (false, true) => bail!("the other end hung up inside its {}", self.name()),
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

/// What the receiver says at the end, behind [`Message::Report`].
pub(crate) fn send_status(mut to: &File, status: u8) -> Result<()> {
    to.write_all(&[status]).context("sending the status")
}

/// What a sender that has let go of its domain hears.
///
/// # Errors
///
/// Whether the receiver runs the domain cannot be known.
pub(crate) fn outcome(from: &File, interrupt: &Interrupt) -> Result<Outcome> {
    Message::Report.expect(from, interrupt)?;
    let mut status = [0];
    if fill(from, &mut status, interrupt).context("waiting for the status")? == 0 {
        bail!("the other end hung up where its status was expected");
    }
    match status {
        [0] => Ok(Outcome::Runs),
        [status] => {
            Message::Go
                .expect(from, interrupt)
                .with_context(|| format!("the other end failed (status {status})"))?;
            Ok(Outcome::GivenBack { status })
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
fn fill(mut from: &File, room: &mut [u8], interrupt: &Interrupt) -> io::Result<usize> {
    let mut filled = 0;
    while filled < room.len() {
        interrupt.wait_readable(from)?;
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
