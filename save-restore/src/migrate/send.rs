//! The sender of a migration: a connection, the messages and the machine that decides, put
//! together.
//!
//! The caller brings the domain, as a [`Departing`]; [`SendRequest::run`] does the rest. See
//! [`super`] for an example.
//!
//! C implementation: `tools/xl/xl_migrate.c:migrate_domain`.

use std::fmt;
use std::io;
use std::time::Duration;

use super::connection::{Connection, ConnectionError, ConnectionReader, ConnectionWriter, Wait};
use super::messages::{Message, MessageError, Status};
use super::ownership::plain::{Sender, SenderAction, SenderEnd, SenderEvent};
use crate::error::SaveError;
use crate::progress::{Cancel, Cancelled};

/// An error of the caller's own.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A domain that is to leave, as its toolstack sees it.
///
/// Which of these is called, and when, is decided by
/// [`ownership::plain::Sender`](super::ownership::plain::Sender).
pub trait Departing {
    /// Write the image: xl header, libxl stream. Afterwards the domain is suspended, and nothing
    /// but [`Self::take_back`] resumes it.
    ///
    /// # Errors
    ///
    /// The domain may be running or suspended then; [`Self::take_back`] follows.
    fn send_image(&mut self, to: &mut ConnectionWriter<'_>) -> Result<(), BoxError>;

    /// Give the domain the name of one that has been let go of.
    ///
    /// # Errors
    ///
    /// It keeps its name.
    fn rename_away(&mut self) -> Result<(), BoxError>;

    /// Have the domain run on, under its name. Nothing is to be done where it does.
    ///
    /// # Errors
    ///
    /// It is still suspended.
    fn take_back(&mut self) -> Result<TakenBack, BoxError>;

    /// Destroy the domain, which runs at the other end.
    ///
    /// # Errors
    ///
    /// It is still there.
    fn destroy(&mut self) -> Result<(), BoxError>;
}

/// What a domain does that was taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakenBack {
    /// It runs.
    Runs,
    /// It has shut down by itself, or was destroyed.
    Gone,
}

/// How to send a domain.
pub struct SendRequest<'a> {
    answer: Duration,
    idle: Duration,
    cancel: Option<&'a Cancel>,
    observe: Option<&'a mut dyn FnMut(SenderAction)>,
}

impl fmt::Debug for SendRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendRequest")
            .field("answer", &self.answer)
            .field("idle", &self.idle)
            .finish_non_exhaustive()
    }
}

impl Default for SendRequest<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> SendRequest<'a> {
    /// With a minute for each answer, and a minute for a receiver that takes nothing.
    pub const fn new() -> Self {
        Self {
            answer: Duration::from_secs(60),
            idle: Duration::from_secs(60),
            cancel: None,
            observe: None,
        }
    }

    /// How long the receiver may take for each of its messages, all of it.
    #[must_use]
    pub const fn answer_timeout(mut self, limit: Duration) -> Self {
        self.answer = limit;
        self
    }

    /// How long the receiver may take nothing of the image.
    #[must_use]
    pub const fn idle_timeout(mut self, limit: Duration) -> Self {
        self.idle = limit;
        self
    }

    /// Who may ask to stop. Once the domain has been let go of, it is too late.
    #[must_use]
    pub const fn cancel(mut self, cancel: &'a Cancel) -> Self {
        self.cancel = Some(cancel);
        self
    }

    /// Called before each action.
    #[must_use]
    pub fn observe(mut self, observe: &'a mut dyn FnMut(SenderAction)) -> Self {
        self.observe = Some(observe);
        self
    }

    /// Send the domain.
    ///
    /// A panic in `domain` takes the domain back, if it has not been let go of.
    pub fn run(mut self, connection: &dyn Connection, domain: &mut dyn Departing) -> Sent {
        let mut machine = Sender::new();
        let mut causes = Vec::new();
        let mut guard = TakeBack {
            domain,
            armed: true,
        };
        loop {
            let action = machine.action();
            if let Some(observe) = &mut self.observe {
                observe(action);
            }
            // As soon as it begins to be said, nothing but the machine takes the domain back.
            guard.armed = !machine.has_let_go();
            if let SenderAction::End(end) = action {
                guard.armed = false;
                return Sent { end, causes };
            }
            let event = match self.perform(action, connection, guard.domain) {
                Ok(event) => event,
                Err((event, cause)) => {
                    causes.push(cause);
                    event
                }
            };
            machine.on(event);
        }
    }

    fn perform(
        &self,
        action: SenderAction,
        connection: &dyn Connection,
        domain: &mut dyn Departing,
    ) -> Result<SenderEvent, (SenderEvent, BoxError)> {
        let failed = |cause: BoxError| (SenderEvent::Failed, cause);
        let heard = |error: MessageError| (of_message(&error), BoxError::from(error));
        let done = SenderEvent::Done;
        // A signal is not heard once the domain has been let go of.
        let deaf = Wait::forever();
        let asked = match self.cancel {
            Some(cancel) => deaf.unless(cancel),
            None => deaf,
        };
        let reader = |wait| {
            let reader = ConnectionReader::new(connection, wait);
            let reader = reader.map_err(|error| failed(error.into()))?;
            Ok(reader.within(self.answer))
        };
        match action {
            SenderAction::AwaitBanner => {
                Message::Banner.read(reader(asked)?).map_err(heard)?;
            }
            SenderAction::SendImage => {
                let mut writer = ConnectionWriter::new(connection, asked.idle(self.idle));
                domain
                    .send_image(&mut writer)
                    .map_err(|cause| (of_image(&*cause), cause))?;
            }
            SenderAction::AwaitReady => {
                Message::Ready.read(reader(asked)?).map_err(heard)?;
            }
            SenderAction::RenameAway => domain.rename_away().map_err(failed)?,
            SenderAction::SayGo => {
                let writer = ConnectionWriter::new(connection, deaf).within(self.answer);
                Message::Go.write(writer).map_err(heard)?;
            }
            SenderAction::AwaitReport => {
                let mut reader = reader(deaf)?;
                Message::Report.read(&mut reader).map_err(heard)?;
                let Status(status) = Status::read(&mut reader).map_err(heard)?;
                if status != 0 {
                    let why = format!("the other end could not run it (status {status})");
                    return Err((SenderEvent::Reported(status), why.into()));
                }
                return Ok(SenderEvent::Reported(0));
            }
            SenderAction::AwaitGivenBack => {
                Message::Go.read(reader(deaf)?).map_err(heard)?;
            }
            SenderAction::Destroy => domain.destroy().map_err(failed)?,
            SenderAction::TakeBack => match domain.take_back().map_err(failed)? {
                TakenBack::Runs => {}
                TakenBack::Gone => return Ok(SenderEvent::GuestGone),
            },
            SenderAction::End(_) => {}
        }
        Ok(done)
    }
}

/// What a failed message tells the machine.
fn of_message(error: &MessageError) -> SenderEvent {
    match error {
        MessageError::Sending { cause, .. } | MessageError::Waiting { cause, .. } => of_io(cause),
        _ => SenderEvent::PeerLost,
    }
}

fn of_io(error: &io::Error) -> SenderEvent {
    if Cancelled::is(error) {
        return SenderEvent::Signal;
    }
    match ConnectionError::of(error) {
        Some(ConnectionError::TimedOut { .. }) => SenderEvent::TimedOut,
        Some(ConnectionError::Local(_)) => SenderEvent::Failed,
        _ => SenderEvent::PeerLost,
    }
}

/// What a failed image tells the machine: all of these leave the domain here.
fn of_image(mut error: &(dyn std::error::Error + 'static)) -> SenderEvent {
    loop {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return of_io(io);
        }
        if let Some(SaveError::Aborted) = error.downcast_ref::<SaveError>() {
            return SenderEvent::Signal;
        }
        match error.source() {
            Some(source) => error = source,
            None => return SenderEvent::Failed,
        }
    }
}

/// Takes the domain back when a panic comes between.
struct TakeBack<'d> {
    domain: &'d mut dyn Departing,
    armed: bool,
}

impl Drop for TakeBack<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = self.domain.take_back()
        {
            tracing::error!(error, "the domain is still suspended: resume it by hand");
        }
    }
}

/// What sending a domain came to.
#[derive(Debug)]
pub struct Sent {
    /// Which host has the domain.
    pub end: SenderEnd,
    /// What went wrong, in order: the first is why it ended so.
    pub causes: Vec<BoxError>,
}
