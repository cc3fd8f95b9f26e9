//! Common parts of the drivers of a migration: the settings of every request, the loop that
//! performs a machine's actions, how an end sends and receives messages, how a failure is reported
//! to a state machine, and what is undone after a panic.

use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use super::connection::{
    Connection, ConnectionError, ConnectionReader, ConnectionWriter, Received, Wait,
};
use super::messages::{Message, MessageError, Reason, Status};
use super::observe::{Event, Observer, Step};
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
    /// Classifies a failure to send or receive a message.
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

    /// Classifies a failure to write or read an image. The domain stays at the sender in all of
    /// them.
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

/// Settings that every request to a driver has.
pub(super) struct Common<'a> {
    /// How long the other end may take for each whole message.
    pub(super) answer: Duration,
    /// The token by which another thread asks to stop.
    pub(super) cancel: Option<&'a Cancel>,
    /// Called for each action and step, until it panics.
    pub(super) observer: Option<&'a mut dyn Observer>,
    /// The observer's panic, which goes on once the machine has ended: it must not leave a domain
    /// suspended, or at both ends.
    panic: Option<Box<dyn Any + Send>>,
}

impl<'a> Common<'a> {
    pub(super) const fn new(answer: Duration) -> Self {
        Self {
            answer,
            cancel: None,
            observer: None,
            panic: None,
        }
    }

    pub(super) const fn talk<'c>(&self, connection: &'c dyn Connection) -> Talk<'c>
    where
        'a: 'c,
    {
        Talk {
            connection,
            answer: self.answer,
            cancel: self.cancel,
        }
    }

    pub(super) fn observe(&mut self, event: Event) {
        if let Some(observer) = &mut self.observer
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| observer.observe(event)))
        {
            self.observer = None;
            self.panic = Some(panic);
        }
    }
}

impl fmt::Debug for Common<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Common")
            .field("answer", &self.answer)
            .finish_non_exhaustive()
    }
}

/// The methods that set what is [`Common`] to all requests.
macro_rules! common_settings {
    (answer: $answer:ident, $answer_doc:literal; cancel: $cancel_doc:literal) => {
        #[doc = $answer_doc]
        #[must_use]
        pub const fn $answer(mut self, limit: std::time::Duration) -> Self {
            self.common.answer = limit;
            self
        }

        #[doc = $cancel_doc]
        #[must_use]
        pub const fn cancel(mut self, cancel: &'a crate::progress::Cancel) -> Self {
            self.common.cancel = Some(cancel);
            self
        }

        /// Sets an observer, which is called for each action and step.
        #[must_use]
        pub fn observer(mut self, observer: &'a mut dyn super::Observer) -> Self {
            self.common.observer = Some(observer);
            self
        }
    };
}
pub(super) use common_settings;

/// A state machine of [`super::ownership`], as its driver sees it.
pub(super) trait Machine {
    type Action: Copy;
    type Event: Copy;
    type End;

    /// The action to perform now.
    fn action(&self) -> Self::Action;

    /// Tells the machine the result of the action.
    fn on(&mut self, event: Self::Event);

    /// The outcome, if this action is the machine's last.
    fn end(action: Self::Action) -> Option<Self::End>;

    /// The action, for an observer.
    fn announced(action: Self::Action) -> Event;

    /// The step of the protocol that is done when the action had this result.
    fn step(action: Self::Action, event: Self::Event) -> Option<Step>;
}

/// Performs a machine's actions until it has ended. The failures are returned in order: the first
/// one is the reason for the end.
///
/// `settled` is called after each of the machine's steps. A panic of the observer goes on at the end.
pub(super) fn drive<M: Machine>(
    machine: &mut M,
    common: &mut Common<'_>,
    mut perform: impl FnMut(&mut M, &mut Common<'_>, M::Action) -> (M::Event, Option<BoxError>),
    settled: impl Fn(&M),
) -> (M::End, Vec<Cause<M::Action>>) {
    let mut causes = Vec::new();
    loop {
        let action = machine.action();
        common.observe(M::announced(action));
        if let Some(end) = M::end(action) {
            if let Some(panic) = common.panic.take() {
                resume_unwind(panic);
            }
            return (end, causes);
        }
        let (event, error) = perform(machine, common, action);
        causes.extend(error.map(|error| Cause { action, error }));
        machine.on(event);
        settled(machine);
        if let Some(step) = M::step(action, event) {
            common.observe(Event::Done(step));
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
    /// A wait until cancelled.
    pub(super) fn asked(&self) -> Wait<'a> {
        match self.cancel {
            Some(cancel) => Wait::forever().unless(cancel),
            None => Wait::forever(),
        }
    }

    /// Whether the caller has cancelled.
    pub(super) fn is_asked(&self) -> bool {
        self.cancel.is_some_and(Cancel::is_cancelled)
    }

    /// A wait that ignores cancellation.
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

    /// Sends the report and its status.
    pub(super) fn report(&self, status: Status) -> Result<(), MessageError> {
        let mut writer = self.writer(self.deaf());
        Message::Report.write(&mut writer)?;
        status.write(&mut writer)
    }

    /// Checks that the other end has sent nothing before it is told to go. Anything sent by then
    /// cannot be an answer, but this host would take it for one and destroy the domain.
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

    /// Sets how long the transport tolerates silence from the other host from now on.
    pub(super) fn bear(&self, limit: Duration) {
        if let Err(error) = self.connection.give_up_on_silence(limit) {
            tracing::warn!(%error, "the time limit for silence could not be set");
        }
    }
}

/// Undoes a change to a domain if a panic occurs in between.
pub(super) struct OnPanic<'d, D: ?Sized> {
    pub(super) domain: &'d mut D,
    pub(super) armed: Cell<bool>,
    pub(super) undo: fn(&mut D),
}

impl<D: ?Sized> Drop for OnPanic<'_, D> {
    fn drop(&mut self) {
        if self.armed.get() {
            (self.undo)(self.domain);
        }
    }
}
