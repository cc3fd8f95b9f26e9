//! Receiving a migration: combines a connection, the messages and the state machine of the
//! receiver.
//!
//! The caller implements [`Arriving`] for its host; [`ReceiveRequest::run`] does the rest. See
//! [`super`] for an example.
//!
//! C implementation: `tools/xl/xl_migrate.c:migrate_receive`.

use std::cell::Cell;
use std::time::Duration;

use super::connection::{Connection, ConnectionReader, Stage};
use super::drive::{
    BoxError, Cause, Common, Machine, OnPanic, Talk, Trouble, common_settings, drive,
};
use super::messages::{Message, MessageError, Status};
use super::observe::{Event, Step};
use super::ownership::plain::{Receiver, ReceiverAction, ReceiverEnd, ReceiverEvent};

/// The toolstack's part of receiving a domain: creates, names, runs or destroys it.
pub trait Arriving {
    /// Creates a domain, paused and under another name, and reads the image into it, to its last
    /// byte and no further.
    ///
    /// # Errors
    ///
    /// A part of the domain may still exist; [`Self::destroy`] is called next.
    fn receive_image(&mut self, from: &mut ConnectionReader<'_>) -> Result<(), BoxError>;

    /// Renames the domain to its real name.
    ///
    /// # Errors
    ///
    /// It keeps the other name.
    fn take_name(&mut self) -> Result<(), BoxError>;

    /// Lets the domain run, unless it should stay paused.
    ///
    /// # Errors
    ///
    /// It is still paused.
    fn run(&mut self) -> Result<(), BoxError>;

    /// Destroys the new domain. Does nothing if there is none.
    ///
    /// # Errors
    ///
    /// It still exists, paused.
    fn destroy(&mut self) -> Result<(), BoxError>;
}

/// How to receive a domain.
#[derive(Debug)]
pub struct ReceiveRequest<'a> {
    /// The time limit for answers also limits a pause of the sender inside the image.
    common: Common<'a>,
    go: Duration,
}

impl Default for ReceiveRequest<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> ReceiveRequest<'a> {
    /// A request that gives up after ten minutes without a byte of the image, or two minutes
    /// without "go". Senders wait for less, so the sender gives up first.
    pub const fn new() -> Self {
        Self {
            common: Common::new(Duration::from_secs(600)),
            go: Duration::from_secs(120),
        }
    }

    common_settings! {
        answer: idle_timeout,
        "How long the sender may send nothing of the image, and how long it may take for each \
         message of this end, all of it.";
        cancel: "The token by which another thread asks to stop. Once \"go\" was heard, it is too \
                 late."
    }

    /// How long the sender may take to send all of "go".
    #[must_use]
    pub const fn go_timeout(mut self, limit: Duration) -> Self {
        self.go = limit;
        self
    }

    /// Receives a domain.
    ///
    /// After a panic in `domain`, the new domain is destroyed if "go" has not been received. A panic
    /// of the observer goes on after the end of the migration.
    pub fn run(mut self, connection: &dyn Connection, domain: &mut dyn Arriving) -> Arrived {
        let guard = OnPanic {
            domain,
            armed: Cell::new(true),
            undo: |domain| {
                if let Err(error) = domain.destroy() {
                    let what = "the domain could not be destroyed: destroy it by hand";
                    tracing::error!(error, "{what}");
                }
            },
        };
        let receiving = Receiving {
            talk: self.common.talk(connection),
            go: self.go,
        };
        let mut machine = Receiver::new();
        let perform = |_: &mut Receiver, _: &mut Common<'_>, action| match receiving
            .perform(action, guard.domain)
        {
            Ok(()) => (ReceiverEvent::Done, None),
            Err((trouble, error)) => (trouble.into(), Some(error)),
        };
        let (end, causes) = drive(&mut machine, &mut self.common, perform, |machine| {
            let ended = matches!(machine.action(), ReceiverAction::End(_));
            guard.armed.set(!machine.has_it() && !ended);
        });
        guard.armed.set(false);
        Arrived { end, causes }
    }
}

impl Machine for Receiver {
    type Action = ReceiverAction;
    type Event = ReceiverEvent;
    type End = ReceiverEnd;

    fn action(&self) -> ReceiverAction {
        self.action()
    }

    fn on(&mut self, event: ReceiverEvent) {
        self.on(event);
    }

    fn end(action: ReceiverAction) -> Option<ReceiverEnd> {
        match action {
            ReceiverAction::End(end) => Some(end),
            _ => None,
        }
    }

    fn announced(action: ReceiverAction) -> Event {
        Event::Receiving(action)
    }

    fn step(action: ReceiverAction, event: ReceiverEvent) -> Option<Step> {
        match (action, event) {
            (ReceiverAction::SayBanner, ReceiverEvent::Done) => Some(Step::Banner),
            (ReceiverAction::Receive, ReceiverEvent::Done) => Some(Step::Received),
            (ReceiverAction::SayReady, ReceiverEvent::Done) => Some(Step::Ready),
            (ReceiverAction::AwaitGo, ReceiverEvent::Done) => Some(Step::Go),
            (ReceiverAction::SayRuns, ReceiverEvent::Done) => Some(Step::Report),
            _ => None,
        }
    }
}

/// A migration in progress: performs the actions of the state machine.
struct Receiving<'a> {
    talk: Talk<'a>,
    go: Duration,
}

impl Receiving<'_> {
    fn perform(
        &self,
        action: ReceiverAction,
        domain: &mut dyn Arriving,
    ) -> Result<(), (Trouble, BoxError)> {
        let talk = self.talk;
        let failed = |error: BoxError| (Trouble::Failed, error);
        let heard = |error: MessageError| (Trouble::of_message(&error), BoxError::from(error));
        match action {
            ReceiverAction::SayBanner => talk.say(Message::Banner, talk.asked()).map_err(heard),
            ReceiverAction::Receive => {
                let wait = talk.asked().idle(talk.answer);
                let reader = ConnectionReader::new(talk.connection, wait);
                let mut reader = reader.map_err(|error| failed(error.into()))?;
                let received = domain.receive_image(&mut reader);
                received.map_err(|error| (Trouble::of_image(&*error), error))
            }
            ReceiverAction::SayReady => talk.say(Message::Ready, talk.asked()).map_err(heard),
            ReceiverAction::AwaitGo => {
                let answer = self.go;
                let talk = Talk { answer, ..talk };
                talk.hear(Message::Go, talk.asked()).map_err(heard)?;
                talk.connection.stage(Stage::LetGo);
                Ok(())
            }
            ReceiverAction::RenameIn => domain.take_name().map_err(failed),
            ReceiverAction::Run => domain.run().map_err(failed),
            ReceiverAction::SayRuns => talk.report(Status::SUCCESS).map_err(heard),
            ReceiverAction::SayFailed => talk.report(Status::FAILED).map_err(heard),
            ReceiverAction::Destroy => domain.destroy().map_err(failed),
            // No signal interrupts the message that says where the domain is.
            ReceiverAction::GiveBack => talk.say(Message::Go, talk.deaf()).map_err(heard),
            ReceiverAction::End(_) => Ok(()),
        }
    }
}

impl From<Trouble> for ReceiverEvent {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::PeerLost => Self::PeerLost,
            Trouble::TimedOut => Self::TimedOut,
            Trouble::Signal => Self::Signal,
            Trouble::Failed => Self::Failed,
        }
    }
}

/// The outcome of receiving a domain.
#[derive(Debug)]
pub struct Arrived {
    /// Which host has the domain.
    pub end: ReceiverEnd,
    /// Failures in order: the first one is the reason for the outcome.
    pub causes: Vec<Cause<ReceiverAction>>,
}
