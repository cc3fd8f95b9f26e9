//! The receiver of a migration: a connection, the messages and the machine that decides, put
//! together.
//!
//! The caller brings the host, as an [`Arriving`]; [`ReceiveRequest::run`] does the rest. See
//! [`super`] for an example.
//!
//! C implementation: `tools/xl/xl_migrate.c:migrate_receive`.

use std::fmt;
use std::io;
use std::time::Duration;

use super::connection::{Connection, ConnectionError, ConnectionReader, ConnectionWriter, Wait};
use super::messages::{Message, MessageError, Status};
use super::ownership::plain::{Receiver, ReceiverAction, ReceiverEnd, ReceiverEvent};
use super::send::BoxError;
use crate::progress::{Cancel, Cancelled};

/// A domain that is to arrive, as its toolstack sees it.
pub trait Arriving {
    /// Make a domain, paused and under another name, and read the image into it, to its last
    /// byte and no further.
    ///
    /// # Errors
    ///
    /// What was made of it may still be there; [`Self::destroy`] follows.
    fn receive_image(&mut self, from: &mut ConnectionReader<'_>) -> Result<(), BoxError>;

    /// Give the domain its name.
    ///
    /// # Errors
    ///
    /// It keeps the other one.
    fn take_name(&mut self) -> Result<(), BoxError>;

    /// Let the domain run, unless it is to stay paused.
    ///
    /// # Errors
    ///
    /// It is still paused.
    fn run(&mut self) -> Result<(), BoxError>;

    /// Destroy what was made. Nothing is to be done where nothing was.
    ///
    /// # Errors
    ///
    /// It is still there, paused.
    fn destroy(&mut self) -> Result<(), BoxError>;
}

/// How to receive a domain.
pub struct ReceiveRequest<'a> {
    idle: Duration,
    go: Duration,
    cancel: Option<&'a Cancel>,
    observe: Option<&'a mut dyn FnMut(ReceiverAction)>,
}

impl fmt::Debug for ReceiveRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceiveRequest")
            .field("idle", &self.idle)
            .field("go", &self.go)
            .finish_non_exhaustive()
    }
}

impl Default for ReceiveRequest<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> ReceiveRequest<'a> {
    /// With ten minutes for a sender that sends nothing, and two for its "go". Both are longer
    /// than a sender waits, so that the sender is the one that gives up.
    pub const fn new() -> Self {
        Self {
            idle: Duration::from_secs(600),
            go: Duration::from_secs(120),
            cancel: None,
            observe: None,
        }
    }

    /// How long the sender may send nothing of the image, or take nothing of a message.
    #[must_use]
    pub const fn idle_timeout(mut self, limit: Duration) -> Self {
        self.idle = limit;
        self
    }

    /// How long the sender may take to say "go", all of it.
    #[must_use]
    pub const fn go_timeout(mut self, limit: Duration) -> Self {
        self.go = limit;
        self
    }

    /// Who may ask to stop. Once "go" was heard, it is too late.
    #[must_use]
    pub const fn cancel(mut self, cancel: &'a Cancel) -> Self {
        self.cancel = Some(cancel);
        self
    }

    /// Called before each action.
    #[must_use]
    pub fn observe(mut self, observe: &'a mut dyn FnMut(ReceiverAction)) -> Self {
        self.observe = Some(observe);
        self
    }

    /// Receive a domain.
    ///
    /// A panic in `domain` destroys what was made, if "go" was not heard.
    pub fn run(mut self, connection: &dyn Connection, domain: &mut dyn Arriving) -> Arrived {
        let mut machine = Receiver::new();
        let mut causes = Vec::new();
        let mut guard = Destroy {
            domain,
            armed: true,
        };
        loop {
            let action = machine.action();
            if let Some(observe) = &mut self.observe {
                observe(action);
            }
            guard.armed = !machine.has_it();
            if let ReceiverAction::End(end) = action {
                guard.armed = false;
                return Arrived { end, causes };
            }
            let event = match self.perform(action, connection, guard.domain) {
                Ok(()) => ReceiverEvent::Done,
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
        action: ReceiverAction,
        connection: &dyn Connection,
        domain: &mut dyn Arriving,
    ) -> Result<(), (ReceiverEvent, BoxError)> {
        let failed = |cause: BoxError| (ReceiverEvent::Failed, cause);
        let heard = |error: MessageError| (of_message(&error), BoxError::from(error));
        let deaf = Wait::forever().idle(self.idle);
        let asked = match self.cancel {
            Some(cancel) => deaf.unless(cancel),
            None => deaf,
        };
        let reader = || {
            let reader = ConnectionReader::new(connection, asked);
            reader.map_err(|error| failed(error.into()))
        };
        let report = |status: Status| {
            let mut writer = ConnectionWriter::new(connection, deaf).within(self.idle);
            Message::Report.write(&mut writer)?;
            status.write(&mut writer)
        };
        let say = |message: Message, wait| {
            message.write(ConnectionWriter::new(connection, wait).within(self.idle))
        };
        match action {
            ReceiverAction::SayBanner => say(Message::Banner, asked).map_err(heard),
            ReceiverAction::Receive => {
                let mut reader = reader()?;
                let received = domain.receive_image(&mut reader);
                received.map_err(|cause| (of_image(&*cause), cause))
            }
            ReceiverAction::SayReady => say(Message::Ready, asked).map_err(heard),
            ReceiverAction::AwaitGo => {
                let reader = reader()?.within(self.go);
                Message::Go.read(reader).map_err(heard)
            }
            ReceiverAction::RenameIn => domain.take_name().map_err(failed),
            ReceiverAction::Run => domain.run().map_err(failed),
            ReceiverAction::SayRuns => report(Status::SUCCESS).map_err(heard),
            ReceiverAction::SayFailed => report(Status::FAILED).map_err(heard),
            ReceiverAction::Destroy => domain.destroy().map_err(failed),
            ReceiverAction::GiveBack => say(Message::Go, deaf).map_err(heard),
            ReceiverAction::End(_) => Ok(()),
        }
    }
}

/// What a failed message tells the machine.
fn of_message(error: &MessageError) -> ReceiverEvent {
    match error {
        MessageError::Sending { cause, .. } | MessageError::Waiting { cause, .. } => of_io(cause),
        _ => ReceiverEvent::PeerLost,
    }
}

fn of_io(error: &io::Error) -> ReceiverEvent {
    if Cancelled::is(error) {
        return ReceiverEvent::Signal;
    }
    match ConnectionError::of(error) {
        Some(ConnectionError::TimedOut { .. }) => ReceiverEvent::TimedOut,
        Some(ConnectionError::Local(_)) => ReceiverEvent::Failed,
        _ => ReceiverEvent::PeerLost,
    }
}

/// What a failed image tells the machine: all of these destroy the domain here.
fn of_image(mut error: &(dyn std::error::Error + 'static)) -> ReceiverEvent {
    loop {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return of_io(io);
        }
        match error.source() {
            Some(source) => error = source,
            None => return ReceiverEvent::Failed,
        }
    }
}

/// Destroys the domain when a panic comes between.
struct Destroy<'d> {
    domain: &'d mut dyn Arriving,
    armed: bool,
}

impl Drop for Destroy<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = self.domain.destroy()
        {
            tracing::error!(
                error,
                "the domain could not be destroyed: destroy it by hand"
            );
        }
    }
}

/// What receiving a domain came to.
#[derive(Debug)]
pub struct Arrived {
    /// Which host has the domain.
    pub end: ReceiverEnd,
    /// What went wrong, in order: the first is why it ended so.
    pub causes: Vec<BoxError>,
}
