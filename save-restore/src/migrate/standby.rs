//! The receiver of checkpoints, for Remus and COLO: a connection, the messages and the machine that
//! decides, put together.
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

/// A domain that stands by for another, as its toolstack sees it.
///
/// Which of these is called, and when, is decided by
/// [`ownership::protect::Standby`](super::ownership::protect::Standby).
pub trait Kept {
    /// Make the domain, under another name, and keep it at the last checkpoint that is complete,
    /// until there is to be no other. `complete` is to be called when one is, and the domain can
    /// be run from it.
    fn keep(&mut self, connection: &dyn Connection, complete: &mut dyn FnMut()) -> KeptUntil;

    /// Give the domain its name.
    ///
    /// # Errors
    ///
    /// It keeps the other one, and is run all the same.
    fn take_name(&mut self) -> Result<(), BoxError>;

    /// Let the domain run, unless it is to stay paused. It stays from here on, whatever happens:
    /// it may be all there is.
    ///
    /// # Errors
    ///
    /// It is still paused.
    fn run(&mut self) -> Result<(), BoxError>;

    /// Destroy what was made. Nothing is to be done where nothing was.
    ///
    /// # Errors
    ///
    /// It is still there, and must not run.
    fn destroy(&mut self) -> Result<(), BoxError>;
}

/// Until when a domain was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptUntil {
    /// The stream did not go on: the sender hung up, or the connection is lost.
    Lost,
    /// The sender took its domain back.
    Withdrawn,
    /// The stream breaks a rule, a checkpoint could not be applied, someone asked to stop, or
    /// something else failed.
    Failed,
}

/// How to stand by for a domain.
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
    /// With a minute for a sender to take a message.
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

    /// Stand by, until it is clear where the domain is.
    pub fn run(mut self, connection: &dyn Connection, domain: &mut dyn Kept) -> StoodBy {
        let talk = self.common.talk(connection);
        let mut machine = Standby::new();
        let (end, causes) = drive(&mut machine, &mut self.common, |machine, common, action| {
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
        });
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

/// What standing by for a domain came to.
#[derive(Debug)]
pub struct StoodBy {
    /// Which host has the domain.
    pub end: StandbyEnd,
    /// What went wrong, in order, except in [`Kept::keep`].
    pub causes: Vec<Cause<StandbyAction>>,
}
