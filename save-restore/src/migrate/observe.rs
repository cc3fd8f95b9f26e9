//! Events of a migration, reported to the program that runs it.

use std::fmt;

use super::ownership::plain::{ReceiverAction, SenderAction};
use super::ownership::protect::{ProtectorAction, StandbyAction};

/// Receives events, on the thread that causes them. Any `FnMut(Event)` is an observer.
///
/// ```
/// use xsr_save_restore::migrate::{Event, Observer, Step};
///
/// let mut steps = Vec::new();
/// let mut observe = |event: Event| {
///     if let Event::Done(step) = event {
///         steps.push(step.name());
///     }
/// };
/// observe.observe(Event::Done(Step::Banner));
/// assert_eq!(steps, ["banner"]);
/// ```
pub trait Observer {
    /// Called when an event happens.
    fn observe(&mut self, event: Event);
}

impl<F: FnMut(Event)> Observer for F {
    fn observe(&mut self, event: Event) {
        self(event);
    }
}

/// Something that happens in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The sender is about to do this.
    Sending(SenderAction),
    /// The receiver is about to do this.
    Receiving(ReceiverAction),
    /// The protector of a domain is about to do this.
    Protecting(ProtectorAction),
    /// The standby of a domain is about to do this.
    StandingBy(StandbyAction),
    /// This end has done a step of the protocol.
    Done(Step),
}

/// A step of the protocol, as seen from one end. `docs/json.md` has their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// The banner was received, or sent.
    Banner,
    /// The image has been written.
    Sent,
    /// The image has been read into a domain.
    Received,
    /// "Ready" was received, or sent.
    Ready,
    /// "Go" was sent, or received.
    Go,
    /// The receiver has reported that it runs the domain.
    Report,
    /// The receiver has given the domain back.
    GivenBack,
    /// The first checkpoint has been written: the domain is protected.
    Protected,
    /// The first checkpoint is complete on the standby.
    Checkpoint,
    /// The protector has taken its domain back.
    Withdrawn,
    /// The standby has taken over.
    TookOver,
}

impl Step {
    /// The name that programs use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Banner => "banner",
            Self::Sent => "sent",
            Self::Received => "received",
            Self::Ready => "ready",
            Self::Go => "go",
            Self::Report => "report",
            Self::GivenBack => "given_back",
            Self::Protected => "protected",
            Self::Checkpoint => "checkpoint",
            Self::Withdrawn => "withdrawn",
            Self::TookOver => "took_over",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
