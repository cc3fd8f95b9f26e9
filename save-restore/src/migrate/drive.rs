//! Common parts of the drivers of a migration: how an end sends and receives messages, how a
//! failure is reported to a state machine, and what is undone after a panic.

use std::io;
use std::time::Duration;

use super::connection::{
    Connection, ConnectionError, ConnectionReader, ConnectionWriter, Received, Wait,
};
use super::messages::{Message, MessageError, Reason, Status};
use crate::error::{RestoreError, SaveError};
use crate::progress::{Cancel, Cancelled};

/// Any error of the caller.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A failed action.
#[derive(Debug)]
pub struct Cause<A> {
    /// The action.
    pub action: A,
    /// Why it failed.
    pub error: BoxError,
}

/// A failure as the state machine sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    PeerLost,
    TimedOut,
    Signal,
    Failed,
}

impl Trouble {
    /// For a message that could not be sent or received.
    pub(super) fn of_message(error: &MessageError) -> Self {
        match error {
            MessageError::Sending { cause, .. } | MessageError::Waiting { cause, .. } => {
                Self::of_io(cause)
            }
            MessageError::NotGivenBack { cause, .. } => Self::of_message(cause),
            _ => Self::PeerLost,
        }
    }

    fn of_io(error: &io::Error) -> Self {
        if Cancelled::is(error) {
            return Self::Signal;
        }
        match ConnectionError::of(error) {
            Some(ConnectionError::TimedOut(_)) => Self::TimedOut,
            Some(ConnectionError::Local(_)) => Self::Failed,
            _ => Self::PeerLost,
        }
    }

    /// For an image that could not be written or read. All of these leave the domain at the sender.
    pub(super) fn of_image(mut error: &(dyn std::error::Error + 'static)) -> Self {
        loop {
            if let Some(io) = error.downcast_ref::<io::Error>() {
                return Self::of_io(io);
            }
            if let Some(SaveError::Aborted) = error.downcast_ref() {
                return Self::Signal;
            }
            if let Some(RestoreError::Aborted) = error.downcast_ref() {
                return Self::Signal;
            }
            match error.source() {
                Some(source) => error = source,
                None => return Self::Failed,
            }
        }
    }
}

/// How long to wait for the rest of an unexpected message from the other end: only the error
/// message needs it, and the domain may be suspended.
pub(super) const REST: Duration = Duration::from_secs(1);

/// One end of the conversation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Talk<'a> {
    pub(super) connection: &'a dyn Connection,
    /// How long the other end may take for each whole message.
    pub(super) answer: Duration,
    pub(super) cancel: Option<&'a Cancel>,
}

impl<'a> Talk<'a> {
    /// Until cancelled.
    pub(super) fn asked(&self) -> Wait<'a> {
        match self.cancel {
            Some(cancel) => Wait::forever().unless(cancel),
            None => Wait::forever(),
        }
    }

    /// Whether it has been cancelled.
    pub(super) fn is_asked(&self) -> bool {
        self.cancel.is_some_and(Cancel::is_cancelled)
    }

    /// Ignores cancellation.
    pub(super) const fn deaf(&self) -> Wait<'a> {
        Wait::forever()
    }

    /// The reader for a message.
    pub(super) fn reader(
        &self,
        expected: &'static str,
        wait: Wait<'a>,
    ) -> Result<ConnectionReader<'a>, MessageError> {
        let reader = ConnectionReader::new(self.connection, wait);
        let reader = reader.map_err(|cause| MessageError::Waiting { expected, cause })?;
        Ok(reader.within(self.answer))
    }

    /// The writer for a message.
    pub(super) fn writer(&self, wait: Wait<'a>) -> ConnectionWriter<'a> {
        ConnectionWriter::new(self.connection, wait).within(self.answer)
    }

    pub(super) fn hear(&self, message: Message, wait: Wait<'a>) -> Result<(), MessageError> {
        self.read(message, &mut self.reader(message.name(), wait)?)
    }

    /// Reads a message, or the beginning of what the other end sends instead.
    pub(super) fn read(
        &self,
        message: Message,
        reader: &mut ConnectionReader<'_>,
    ) -> Result<(), MessageError> {
        message.read_or(reader, |reader| {
            reader.restart(self.answer.min(REST));
            true
        })
    }

    pub(super) fn say(&self, message: Message, wait: Wait<'a>) -> Result<(), MessageError> {
        message.write(self.writer(wait))
    }

    /// Sends the report.
    pub(super) fn report(&self, status: Status) -> Result<(), MessageError> {
        let mut writer = self.writer(self.deaf());
        Message::Report.write(&mut writer)?;
        status.write(&mut writer)
    }

    /// Checks that the other end has sent nothing before it is told to go: anything sent by then
    /// cannot be an answer, and this host would destroy the domain because of it.
    pub(super) fn nothing_waits(&self) -> Result<(), MessageError> {
        let mut byte = [0];
        let now = Wait::forever().at_most(Duration::ZERO);
        match self.connection.read(&mut byte, &now) {
            Err(ConnectionError::TimedOut(_)) => Ok(()),
            Ok(Received::Bytes(_)) => {
                let expected = Message::Go.name();
                let reader = self.reader(expected, self.asked())?;
                let why = Reason::read(&byte, reader.within(self.answer.min(REST)));
                Err(
                    why.map_or(MessageError::TooEarly, |why| MessageError::PeerFailed {
                        why,
                    }),
                )
            }
            Ok(Received::Closed) | Err(_) => Err(MessageError::TooEarly),
        }
    }

    /// Sets how long the transport tolerates silence of the other host from now on.
    pub(super) fn bear(&self, limit: Duration) {
        if let Err(error) = self.connection.give_up_on_silence(limit) {
            tracing::warn!(%error, "the time limit for silence could not be set");
        }
    }
}

/// Undoes something to a domain if a panic occurs in between.
pub(super) struct OnPanic<'d, D: ?Sized> {
    pub(super) domain: &'d mut D,
    pub(super) armed: bool,
    pub(super) undo: fn(&mut D),
}

impl<D: ?Sized> Drop for OnPanic<'_, D> {
    fn drop(&mut self) {
        if self.armed {
            (self.undo)(self.domain);
        }
    }
}
