//! A receiver's report, found among the last bytes that an end has sent.

use std::io::{self, Read};

use super::{Message, MessageError, Outcome, Reason, Status};

/// The last bytes that an end has sent. A receiver's report may be among the bytes that a sender
/// that breaks off has not read as another message.
///
/// Memory is bounded by [`Self::KEPT`], however much is sent.
#[derive(Clone, Debug, Default)]
pub struct LastWords(Vec<u8>);

impl LastWords {
    /// The number of bytes that are kept.
    pub const KEPT: usize = 1 << 16;

    /// Enough bytes of a report to recognise it: no other message begins with them.
    const RECOGNISED: usize = 8;

    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(Self::KEPT)..];
        let excess = (self.0.len() + bytes.len()).saturating_sub(Self::KEPT);
        self.0.drain(..excess);
        self.0.extend_from_slice(bytes);
    }

    /// Adds what still comes, until it says which end has the domain, the other end hangs up or the
    /// reader fails.
    ///
    /// # Errors
    ///
    /// As [`Self::outcome`]. An error of the reader adds nothing to that.
    pub fn hear_out(&mut self, mut from: impl Read) -> Result<Outcome, MessageError> {
        let mut room = [0; 4096];
        loop {
            let outcome = self.outcome();
            if outcome.is_ok() {
                return outcome;
            }
            match from.read(&mut room) {
                Ok(0) => return outcome,
                Ok(n) => self.push(&room[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::debug!(%error, "the other end said no more");
                    return outcome;
                }
            }
        }
    }

    /// The other end's reason for failing, if it sends one after it has given the domain back:
    /// looks at what is kept, and reads what still comes.
    pub fn reason(&self, from: impl Read) -> Option<String> {
        let given_back = Message::Report.bytes().len() + 1 + Message::Go.bytes().len();
        Reason::read(self.report()?.get(given_back..)?, from)
    }

    /// Forgets everything: what has come was understood.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The bytes that are kept.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether a report has begun, so that it is worth waiting for the rest.
    pub fn report_began(&self) -> bool {
        self.report().is_some()
    }

    /// The status in the report, if it has arrived.
    pub fn status(&self) -> Option<Status> {
        let status = self.report()?.get(Message::Report.bytes().len())?;
        Some(Status(*status))
    }

    /// The first report, from its first byte on. Only the last bytes may be the beginning of one.
    /// Text that begins like a report, such as a line of a log, does not count.
    fn report(&self) -> Option<&[u8]> {
        let words = Message::Report.bytes();
        let begin = &words[..Self::RECOGNISED];
        let begins = self.0.windows(begin.len()).enumerate();
        begins
            .filter(|(_, window)| *window == begin)
            .map(|(at, _)| &self.0[at..])
            .find(|said| said.starts_with(words) || words.starts_with(said))
    }

    /// Which end has the domain, once nothing more will come.
    ///
    /// # Errors
    ///
    /// There is no complete report, or it is one of a failure that does not give the domain back.
    pub fn outcome(&self) -> Result<Outcome, MessageError> {
        let mut said = self.report().ok_or(MessageError::NoReport)?;
        Outcome::read(&mut said)
    }
}
