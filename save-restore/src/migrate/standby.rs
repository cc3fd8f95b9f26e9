//! Receiving checkpoints, for Remus and COLO: combines a connection, the messages and the state
//! machine of the standby.
//!
//! The caller brings the host, as a [`Kept`]; [`StandbyRequest::run`] does the rest. The other end
//! is a [`ProtectRequest`](super::protect::ProtectRequest).
//!
//! C implementation: `tools/xl/xl_migrate.c:migrate_receive`, for
//! `LIBXL_CHECKPOINTED_STREAM_REMUS`.

use std::time::Duration;

use super::connection::Connection;
use super::drive::{BoxError, Cause, Common, Machine, Talk, Trouble, common_settings, drive};
use super::messages::{Message, MessageError, Status};
use super::observe::{Event, Step};
use super::ownership::protect::{Standby, StandbyAction, StandbyEnd, StandbyEvent};

/// A standby copy of a protected domain, from its toolstack's view.
///
/// [`ownership::protect::Standby`](super::ownership::protect::Standby) decides which of these is
/// called, and when.
pub trait Kept {
    /// Creates the domain, under another name, and keeps it at the last complete checkpoint, until
    /// no more come. Must call `complete` when a checkpoint is complete and the domain can run from
    /// it.
    fn keep(&mut self, connection: &dyn Connection, complete: &mut dyn FnMut()) -> KeptUntil;

    /// Renames the domain to its real name.
    ///
    /// # Errors
    ///
    /// It keeps the other name, and is run all the same.
    fn take_name(&mut self) -> Result<(), BoxError>;

    /// Lets the domain run, unless it should stay paused. It is kept from here on, whatever
    /// happens: it may be the only copy.
    ///
    /// # Errors
    ///
    /// It is still paused.
    fn run(&mut self) -> Result<(), BoxError>;

    /// Destroys the new domain. Does nothing if there is none.
    ///
    /// # Errors
    ///
    /// It still exists, and must not run.
    fn destroy(&mut self) -> Result<(), BoxError>;
}

/// Why a domain is no longer kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptUntil {
    /// The stream broke off: the sender hung up, or the connection is lost.
    Lost,
    /// The sender took its domain back.
    Withdrawn,
    /// The stream breaks a rule, a checkpoint could not be applied, the work was cancelled, or
    /// something else failed.
    Failed,
}

/// How to keep a standby copy of a domain.
#[derive(Debug)]
pub struct StandbyRequest<'a> {
    common: Common<'a>,
}

impl Default for StandbyRequest<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> StandbyRequest<'a> {
    /// A request with a minute for a sender to take a message.
    pub const fn new() -> Self {
        Self {
            common: Common::new(Duration::from_secs(60)),
        }
    }

    common_settings! {
        answer: answer_timeout,
        "How long the sender may take for each message of this end, all of it.";
        cancel: "The token by which another thread asks to stop while the banner is said. After \
                 that [`Kept::keep`] comes to its end."
    }

    /// Keeps a standby copy, until it is clear which host has the domain.
    pub fn run(mut self, connection: &dyn Connection, domain: &mut dyn Kept) -> StoodBy {
        let talk = self.common.talk(connection);
        let mut machine = Standby::new();
        let perform = |machine: &mut Standby, common: &mut Common<'_>, action| {
            if action != StandbyAction::Keep {
                return match perform(action, talk, domain) {
                    Ok(()) => (StandbyEvent::Done, None),
                    Err((event, error)) => (event, Some(error)),
                };
            }
            let mut any = false;
            let mut complete = || {
                if !std::mem::replace(&mut any, true) {
                    common.observe(Event::Done(Step::Checkpoint));
                }
                machine.on(StandbyEvent::Complete);
            };
            let event = match domain.keep(connection, &mut complete) {
                KeptUntil::Lost => StandbyEvent::Lost,
                KeptUntil::Withdrawn => StandbyEvent::Withdrawn,
                KeptUntil::Failed => StandbyEvent::Failed,
            };
            (event, None)
        };
        let (end, causes) = drive(&mut machine, &mut self.common, perform, |_| {});
        StoodBy { end, causes }
    }
}

impl Machine for Standby {
    type Action = StandbyAction;
    type Event = StandbyEvent;
    type End = StandbyEnd;

    fn action(&self) -> StandbyAction {
        self.action()
    }

    fn on(&mut self, event: StandbyEvent) {
        self.on(event);
    }

    fn end(action: StandbyAction) -> Option<StandbyEnd> {
        match action {
            StandbyAction::End(end) => Some(end),
            _ => None,
        }
    }

    fn announced(action: StandbyAction) -> Event {
        Event::StandingBy(action)
    }

    fn step(action: StandbyAction, event: StandbyEvent) -> Option<Step> {
        match (action, event) {
            (StandbyAction::SayBanner, StandbyEvent::Done) => Some(Step::Banner),
            (StandbyAction::Run, StandbyEvent::Done) => Some(Step::TookOver),
            _ => None,
        }
    }
}

fn perform(
    action: StandbyAction,
    talk: Talk<'_>,
    domain: &mut dyn Kept,
) -> Result<(), (StandbyEvent, BoxError)> {
    let failed = |error: BoxError| (StandbyEvent::Failed, error);
    let said = |error: MessageError| match Trouble::of_message(&error) {
        Trouble::PeerLost | Trouble::TimedOut => (StandbyEvent::Lost, error.into()),
        Trouble::Signal | Trouble::Failed => (StandbyEvent::Failed, error.into()),
    };
    match action {
        StandbyAction::SayBanner => talk.say(Message::Banner, talk.asked()).map_err(said),
        StandbyAction::TakeName => domain.take_name().map_err(failed),
        StandbyAction::Run => domain.run().map_err(failed),
        StandbyAction::Destroy => domain.destroy().map_err(failed),
        StandbyAction::SayRuns => talk.report(Status::SUCCESS).map_err(said),
        StandbyAction::SayFailed => talk.report(Status::FAILED).map_err(said),
        StandbyAction::GiveBack => talk.say(Message::Go, talk.deaf()).map_err(said),
        StandbyAction::Keep | StandbyAction::End(_) => Ok(()),
    }
}

/// The outcome of keeping a standby copy.
#[derive(Debug)]
pub struct StoodBy {
    /// Which host has the domain.
    pub end: StandbyEnd,
    /// Failures in order, except those in [`Kept::keep`].
    pub causes: Vec<Cause<StandbyAction>>,
}
