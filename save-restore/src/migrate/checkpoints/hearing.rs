//! The secondary's messages to a COLO primary: its progress, and why it gives up.
//! [`messages`](super::super::messages) has the messages and their order.
//!
//! C implementation: `tools/libs/light/libxl_colo_save.c`.

use std::io::{self, Read};
use std::time::Duration;

use xsr_format::wrapper::libxl::CheckpointState;

use super::super::connection::{Connection, ConnectionReader, Wait};
use super::super::messages::{ColoWord, LastWords, MessageError, Outcome, Status};
use crate::back_channel::BackChannel;

/// Receives the secondary's messages.
#[derive(Debug)]
pub(super) struct Hearing<'a> {
    reader: ConnectionReader<'a>,
    /// The longest wait for an answer.
    patience: Duration,
    /// What came since the last CHECKPOINT_STATE. It may include the message with which the
    /// secondary gives up.
    since: LastWords,
}

impl<'a> Hearing<'a> {
    /// Receive as long as `wait` allows, and wait at most `patience` for an answer.
    pub(super) fn new(
        connection: &'a dyn Connection,
        wait: Wait<'a>,
        patience: Duration,
    ) -> io::Result<Self> {
        Ok(Self {
            reader: ConnectionReader::new(connection, wait)?.within(patience),
            patience,
            since: LastWords::default(),
        })
    }

    /// The end of what came since the last state.
    pub(super) fn into_rest(self) -> LastWords {
        self.since
    }

    /// The message that the secondary sends in place of any other when it has ended, read to its
    /// end. [`Self::into_rest`] includes it too.
    pub(super) fn given_up(&mut self) -> Option<io::Error> {
        if !self.since.report_began() {
            return None;
        }
        self.reader.restart(self.patience);
        let mut byte = [0];
        while self.since.report_began() && self.since.status().is_none() {
            // The message that had begun matters more than the error that broke the connection.
            match self.read(&mut byte) {
                Ok(1..) => {}
                Ok(0) | Err(_) => break,
            }
        }
        Some(io::Error::other(match self.since.status() {
            Some(Status::SUCCESS) => Outcome::Runs.to_string(),
            Some(Status(status)) => Outcome::GivenBack { status }.to_string(),
            None => "the other end began to say what became of its domain, and hung up".to_owned(),
        }))
    }

    /// Receive the secondary's state. What follows is part of the same answer.
    ///
    /// # Errors
    ///
    /// The secondary hung up, cannot be reached, says something else, or says nothing for too long.
    pub(super) fn expect(&mut self, state: CheckpointState) -> io::Result<()> {
        self.reader.restart(self.patience);
        match ColoWord::read(&mut *self) {
            Ok(ColoWord::State(said)) if said == state => {
                self.since.clear();
                Ok(())
            }
            Err(MessageError::Waiting { cause, .. }) => Err(cause),
            Err(MessageError::HungUp { .. }) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the other end hung up",
            )),
            Ok(said) => Err(out_of_place(
                &format!("\"{}\"", said.encode().escape_ascii()),
                state,
            )),
            Err(MessageError::Record { got, .. }) => Err(out_of_place(&got, state)),
            Err(error) => Err(io::Error::other(error)),
        }
    }
}

fn out_of_place(said: &str, state: CheckpointState) -> io::Error {
    io::Error::other(format!(
        "the other end said {said} where it had to say that its domain is {state:?}"
    ))
}

impl Read for Hearing<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(room)?;
        self.since.push(&room[..n]);
        Ok(n)
    }
}

impl BackChannel for Hearing<'_> {
    fn look_ahead(&mut self) -> io::Result<Option<[u8; 8]>> {
        self.reader.look_ahead()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::fd::OwnedFd;
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::migrate::connection::PipeConnection;

    /// What a primary with this patience receives before the connection closes.
    fn hearing<T>(
        bytes: &[u8],
        patience: Duration,
        of: impl Fn(&mut Hearing<'_>) -> T,
    ) -> (T, u64) {
        let (from, mut to) = io::pipe().unwrap();
        to.write_all(bytes).unwrap();
        // With patience the primary reads to the end.
        let open = (patience == Duration::ZERO).then_some(to);
        let nothing = File::options().write(true).open("/dev/null").unwrap();
        let from = PipeConnection::new(OwnedFd::from(from), nothing.into(), "there").unwrap();
        let carried = AtomicU64::new(0);
        let heard = {
            let wait = Wait::forever().counting(&carried);
            of(&mut Hearing::new(&from, wait, patience).unwrap())
        };
        drop(open);
        (heard, carried.into_inner())
    }

    #[test]
    fn what_is_heard_moves_and_what_is_not_ends_the_wait() {
        let ready = ColoWord::State(CheckpointState::Ready).encode();
        let patience = Duration::from_secs(60);
        let expect = |hearing: &mut Hearing<'_>| hearing.expect(CheckpointState::Ready);
        let (heard, carried) = hearing(&ready, patience, expect);
        heard.unwrap();
        assert_eq!(carried, 16);
        // In the middle of a message, too.
        for said in [0, 7] {
            let (heard, carried) = hearing(&ready[..said], Duration::ZERO, expect);
            let error = heard.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            assert_eq!(carried, said as u64);
        }
    }

    #[test]
    fn an_end_that_gives_up_is_heard_out() {
        let report = b"my copy unpause results are as follows\0";
        let said = |status: &[u8]| [report, status, b"domain is yours"].concat();
        let failed = "the other end has failed (status 1)";
        for (bytes, expected) in [
            (said(&[1]), failed),
            (said(&[0]), "the other end runs the domain"),
            (report.to_vec(), "and hung up"),
            (report[..16].to_vec(), "and hung up"),
        ] {
            let (why, _) = hearing(&bytes, Duration::from_secs(60), |hearing| {
                hearing.expect(CheckpointState::Ready).unwrap_err();
                hearing.given_up().unwrap().to_string()
            });
            assert!(why.contains(expected), "{why}");
            // In place of a list's header.
            let (why, _) = hearing(&bytes, Duration::from_secs(60), |hearing| {
                hearing.read_exact(&mut [0; 8]).unwrap();
                hearing.given_up().unwrap().to_string()
            });
            assert!(why.contains(expected), "{why}");
        }
        let state = ColoWord::State(CheckpointState::Resumed).encode();
        let (why, _) = hearing(&state, Duration::from_secs(60), |hearing| {
            hearing.expect(CheckpointState::Ready).unwrap_err();
            hearing.given_up()
        });
        assert!(why.is_none());
    }

    /// Earlier bytes are not repeated: a list of pages may be long.
    #[test]
    fn a_word_that_is_out_of_place_is_named_and_nothing_else() {
        let list = [7; 4096];
        let resumed = ColoWord::State(CheckpointState::Resumed).encode();
        for word in [resumed, [0x1b; 16]] {
            let bytes = [&list[..], &word].concat();
            let (error, _) = hearing(&bytes, Duration::from_secs(60), |hearing| {
                hearing.read_exact(&mut [0; 4096]).unwrap();
                hearing.expect(CheckpointState::Ready).unwrap_err()
            });
            assert_eq!(
                error.to_string(),
                format!(
                    "the other end said \"{}\" where it had to say that its domain is Ready",
                    word.escape_ascii()
                )
            );
        }
    }
}
