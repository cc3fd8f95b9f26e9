//! The sender of a migration: a connection, the messages and the machine that decides, put
//! together.
//!
//! The caller brings the domain, as a [`Departing`]; [`MigrateRequest::run`] does the rest. See
//! [`super`] for an example.
//!
//! C implementation: `tools/xl/xl_migrate.c:migrate_domain`.

use std::cell::Cell;
use std::time::Duration;

use super::connection::{Connection, ConnectionWriter, Stage, TcpConnection};
use super::drive::{
    BoxError, Cause, Common, Machine, OnPanic, Talk, Trouble, common_settings, drive,
};
use super::messages::{Message, MessageError, Status};
use super::observe::{Event, Step};
use super::ownership::plain::{Sender, SenderAction, SenderEnd, SenderEvent};
use crate::error::SaveError;
use crate::pace::Pace;

/// A domain that will leave, from its toolstack's view.
///
/// [`ownership::plain::Sender`](super::ownership::plain::Sender) decides which of these is called,
/// and when.
pub trait Departing {
    /// Writes the image: xl header, libxl stream. Afterwards the domain is suspended, and only
    /// [`Self::take_back`] resumes it.
    ///
    /// # Errors
    ///
    /// The domain may be running or suspended then; [`Self::take_back`] is called next.
    fn send_image(&mut self, to: &mut ConnectionWriter<'_>) -> Result<(), BoxError>;

    /// Renames the domain to the name for a domain that is migrating away.
    ///
    /// # Errors
    ///
    /// It keeps its name.
    fn rename_away(&mut self) -> Result<(), BoxError>;

    /// Resumes the domain, under its name. Does nothing if it runs.
    ///
    /// # Errors
    ///
    /// It is still suspended.
    fn take_back(&mut self) -> Result<TakenBack, BoxError>;

    /// Destroys the domain, which runs on the other host.
    ///
    /// # Errors
    ///
    /// It still exists.
    fn destroy(&mut self) -> Result<(), BoxError>;
}

/// The state of a domain that was taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakenBack {
    /// It runs.
    Runs,
    /// It has shut down by itself, or was destroyed.
    Gone,
}

/// How to send a domain.
#[derive(Debug)]
pub struct MigrateRequest<'a> {
    common: Common<'a>,
    idle: Duration,
    pace: Option<&'a Pace>,
}

impl Default for MigrateRequest<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> MigrateRequest<'a> {
    /// A request with a minute for each answer, and a minute for a receiver that takes nothing.
    pub const fn new() -> Self {
        Self {
            common: Common::new(Duration::from_secs(60)),
            idle: Duration::from_secs(60),
            pace: None,
        }
    }

    common_settings! {
        answer: answer_timeout,
        "How long the receiver may take for each of its messages, all of it.";
        cancel: "The token by which another thread asks to stop. Once the domain has been let go \
                 of, it is too late."
    }

    /// How long the receiver may take nothing of the image. After that it must take the data at the
    /// speed of a [`Pace`] from the first byte on, because only the domain's toolstack knows when
    /// the domain is suspended.
    #[must_use]
    pub const fn idle_timeout(mut self, limit: Duration) -> Self {
        self.idle = limit;
        self
    }

    /// How fast the receiver must take the image, instead of [`Self::idle_timeout`]. The domain's
    /// toolstack tells the pace when the domain is suspended and when it is resumed. Without a
    /// pace, see [`Self::idle_timeout`].
    #[must_use]
    pub const fn pace(mut self, pace: &'a Pace) -> Self {
        self.pace = Some(pace);
        self
    }

    /// Sends the domain.
    ///
    /// After a panic in `domain`, the domain is taken back if it has not been released. A panic of
    /// the observer goes on after the end of the migration.
    pub fn run(mut self, connection: &dyn Connection, domain: &mut dyn Departing) -> Sent {
        let default = Pace::new(self.idle);
        let guard = OnPanic {
            domain,
            armed: Cell::new(true),
            undo: |domain| {
                if let Err(error) = domain.take_back() {
                    tracing::error!(error, "the domain is still suspended: resume it by hand");
                }
            },
        };
        let mut sending = Sending {
            talk: self.common.talk(connection),
            pace: self.pace,
            default: &default,
            status: 0,
        };
        let armed = &guard.armed;
        let perform = |machine: &mut Sender, _: &mut Common<'_>, action| {
            // As soon as it begins to be said, nothing but the machine takes the domain back.
            armed.set(!machine.has_let_go());
            sending.perform(action, guard.domain)
        };
        let (end, causes) =
            drive(
                &mut Sender::new(),
                &mut self.common,
                perform,
                |machine| match machine.action() {
                    SenderAction::SayGo => armed.set(true),
                    SenderAction::End(_) => armed.set(false),
                    _ => armed.set(!machine.has_let_go()),
                },
            );
        guard.armed.set(false);
        Sent { end, causes }
    }
}

impl Machine for Sender {
    type Action = SenderAction;
    type Event = SenderEvent;
    type End = SenderEnd;

    fn action(&self) -> SenderAction {
        self.action()
    }

    fn on(&mut self, event: SenderEvent) {
        self.on(event);
    }

    fn end(action: SenderAction) -> Option<SenderEnd> {
        match action {
            SenderAction::End(end) => Some(end),
            _ => None,
        }
    }

    fn announced(action: SenderAction) -> Event {
        Event::Sending(action)
    }

    fn step(action: SenderAction, event: SenderEvent) -> Option<Step> {
        match (action, event) {
            (SenderAction::AwaitBanner, SenderEvent::Done) => Some(Step::Banner),
            (SenderAction::SendImage, SenderEvent::Done) => Some(Step::Sent),
            (SenderAction::AwaitReady, SenderEvent::Done) => Some(Step::Ready),
            (SenderAction::SayGo, SenderEvent::Done) => Some(Step::Go),
            (SenderAction::AwaitReport, SenderEvent::Reported(0)) => Some(Step::Report),
            (SenderAction::AwaitGivenBack, SenderEvent::Done) => Some(Step::GivenBack),
            _ => None,
        }
    }
}

/// A migration in progress: performs the actions of the state machine.
struct Sending<'a> {
    talk: Talk<'a>,
    pace: Option<&'a Pace>,
    /// Used instead if there is none.
    default: &'a Pace,
    /// The status that the receiver has reported.
    status: u8,
}

impl Sending<'_> {
    /// Performs an action. Returns the result, and the error if it failed.
    fn perform(
        &mut self,
        action: SenderAction,
        domain: &mut dyn Departing,
    ) -> (SenderEvent, Option<BoxError>) {
        let talk = self.talk;
        let heard = |result: Result<(), MessageError>| match result {
            Ok(()) => (SenderEvent::Done, None),
            Err(error) => {
                let event = Trouble::of_message(&error).into();
                (event, Some(error.into()))
            }
        };
        let done = |result: Result<(), BoxError>| match result {
            Ok(()) => (SenderEvent::Done, None),
            Err(error) => (SenderEvent::Failed, Some(error)),
        };
        match action {
            SenderAction::AwaitBanner => heard(talk.hear(Message::Banner, talk.asked())),
            SenderAction::SendImage => {
                let pace = self.pace.unwrap_or_else(|| {
                    self.default.suspended();
                    self.default
                });
                let wait = talk.asked().keeping(pace);
                talk.bear(TcpConnection::SILENCE_SENDING);
                let sent = domain.send_image(&mut ConnectionWriter::new(talk.connection, wait));
                talk.bear(TcpConnection::SILENCE_WAITING);
                match sent {
                    Ok(()) => {
                        talk.connection.stage(Stage::Suspended);
                        (SenderEvent::Done, None)
                    }
                    Err(error) => (Trouble::of_image(&*error).into(), Some(error)),
                }
            }
            SenderAction::AwaitReady => heard(talk.hear(Message::Ready, talk.asked())),
            // A cancellation after "ready" has been received is still in time.
            SenderAction::RenameAway if talk.is_asked() => {
                (SenderEvent::Signal, Some(SaveError::Aborted.into()))
            }
            SenderAction::RenameAway => done(domain.rename_away()),
            // No signal interrupts it.
            SenderAction::SayGo => {
                // Nothing from here on is sent twice.
                talk.connection.stage(Stage::LetGo);
                heard(
                    talk.nothing_waits()
                        .and_then(|()| talk.say(Message::Go, talk.deaf())),
                )
            }
            SenderAction::AwaitReport => match self.report() {
                Ok(Status(status)) => (SenderEvent::Reported(status), None),
                Err(error) => heard(Err(error)),
            },
            SenderAction::AwaitGivenBack => {
                let status = self.status;
                match talk.hear(Message::Go, talk.deaf()) {
                    Ok(()) => {
                        let why = format!(
                            "the other end could not run it, and has destroyed its copy (status \
                             {status})"
                        );
                        (SenderEvent::Done, Some(why.into()))
                    }
                    Err(cause) => heard(Err(MessageError::NotGivenBack {
                        status,
                        cause: Box::new(cause),
                    })),
                }
            }
            SenderAction::Destroy => done(domain.destroy()),
            SenderAction::TakeBack => {
                talk.connection.stage(Stage::TakenBack);
                match domain.take_back() {
                    Ok(TakenBack::Gone) => (SenderEvent::GuestGone, None),
                    taken => done(taken.map(|_| ())),
                }
            }
            SenderAction::End(_) => (SenderEvent::Done, None),
        }
    }

    /// The report and its status, within the time of one answer.
    fn report(&mut self) -> Result<Status, MessageError> {
        let talk = self.talk;
        let mut reader = talk.reader(Message::Report.name(), talk.deaf())?;
        talk.read(Message::Report, &mut reader)?;
        let status = Status::read(&mut reader)?;
        self.status = status.0;
        Ok(status)
    }
}

impl From<Trouble> for SenderEvent {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::PeerLost => Self::PeerLost,
            Trouble::TimedOut => Self::TimedOut,
            Trouble::Signal => Self::Signal,
            Trouble::Failed => Self::Failed,
        }
    }
}

/// The outcome of sending a domain.
#[derive(Debug)]
pub struct Sent {
    /// Which host has the domain.
    pub end: SenderEnd,
    /// Failures in order: the first one is the reason for the outcome.
    pub causes: Vec<Cause<SenderAction>>,
}
