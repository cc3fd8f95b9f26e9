//! State machines of the sender and the receiver of a migration: which host has the domain.
//!
//! ```text
//!  sender                          receiver
//!  AwaitBanner    ◄──────────────  SayBanner
//!  SendImage      ──────────────►  Receive
//!  AwaitReady     ◄──────────────  SayReady
//!  RenameAway                      │
//!  SayGo          ──────────────►  AwaitGo
//!  │                               RenameIn, Run
//!  AwaitReport    ◄── 0 ─────────  SayRuns
//!  Destroy                         End(Runs)
//!  End(Moved)
//!                     or
//!  AwaitReport    ◄── not 0 ─────  SayFailed
//!  AwaitGivenBack                  Destroy
//!  │              ◄──────────────  GiveBack
//!  TakeBack                        End(Destroyed)
//!  End(Here)
//! ```
//!
//! Until all of "go" has been sent, each failure leads the sender to `TakeBack`. From then on only
//! a message of the receiver does; any other event ends in `Undecided`, with the domain suspended
//! here.
//!
//! C implementation: `tools/xl/xl_migrate.c:migrate_domain`, `migrate_receive`.

use super::{Guard, Guards};

/// The sender's next action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SenderAction {
    /// Wait for the banner.
    AwaitBanner,
    /// Send the image. When all of it has been written, the domain is suspended.
    SendImage,
    /// Wait for "ready".
    AwaitReady,
    /// Rename the domain to the name for a domain that is migrating away.
    RenameAway,
    /// Send "go". No signal interrupts it.
    SayGo,
    /// Wait for the report and its status.
    AwaitReport,
    /// Wait for the message that gives the domain back.
    AwaitGivenBack,
    /// Destroy the domain here.
    Destroy,
    /// Resume the domain here, under its name. Does nothing if it runs already.
    TakeBack,
    /// The migration is over.
    End(SenderEnd),
}

/// The result of the sender's last action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SenderEvent {
    /// It was done, or the message was received.
    Done,
    /// The report was received, with this status ([`SenderAction::AwaitReport`] only).
    Reported(u8),
    /// The other end hung up, is lost, or sent something else. The last byte of a message that was
    /// to be sent has not been sent.
    PeerLost,
    /// The other end did nothing until the time-out.
    TimedOut,
    /// A signal asks to stop.
    Signal,
    /// Something failed here.
    Failed,
    /// The domain has shut down by itself, or was destroyed.
    GuestGone,
}

/// The outcome for the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SenderEnd {
    /// The receiver runs the domain, and it is destroyed here. Exit code 0.
    Moved,
    /// The receiver runs the domain. It is suspended here and could not be destroyed. Exit code 1.
    MovedNotDestroyed,
    /// The domain runs here, and will not run on the other host. Exit code 1.
    Here,
    /// The domain will not run on the other host. It is suspended here, and could not be resumed.
    /// Exit code 1.
    HereSuspended,
    /// The domain has shut down or was destroyed, and stays as it is. Exit code 1.
    GuestGone,
    /// It is unknown whether the receiver runs the domain. It is suspended here. Exit code 3.
    Undecided,
}

/// The sender of a migration.
///
/// ```
/// use xsr_save_restore::migrate::ownership::plain::{
///     Sender, SenderAction, SenderEnd, SenderEvent,
/// };
///
/// // The connection breaks once "go" has left.
/// let mut sender = Sender::new();
/// let end = loop {
///     sender.on(match sender.action() {
///         SenderAction::End(end) => break end,
///         SenderAction::AwaitReport => SenderEvent::PeerLost,
///         _ => SenderEvent::Done,
///     });
/// };
/// assert_eq!(end, SenderEnd::Undecided);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sender {
    doing: SenderAction,
    guards: Guards,
}

impl Default for Sender {
    fn default() -> Self {
        Self::new()
    }
}

impl Sender {
    /// A sender that has a connection, and whose domain runs.
    pub const fn new() -> Self {
        Self {
            doing: SenderAction::AwaitBanner,
            guards: Guards {
                #[cfg(test)]
                broken: None,
            },
        }
    }

    /// The current action.
    pub const fn action(&self) -> SenderAction {
        self.doing
    }

    /// Whether the domain has been released: from then on a signal is only acknowledged.
    pub const fn has_let_go(&self) -> bool {
        matches!(
            self.doing,
            SenderAction::SayGo
                | SenderAction::AwaitReport
                | SenderAction::AwaitGivenBack
                | SenderAction::Destroy
        )
    }

    /// Takes an event and returns the next action. An event that cannot result from the action
    /// counts as its failure.
    pub fn on(&mut self, event: SenderEvent) -> SenderAction {
        use SenderAction as A;
        use SenderEvent as E;
        let holds = |guard| self.guards.hold(guard);
        self.doing = match (self.doing, event) {
            (A::AwaitBanner, E::Done) => A::SendImage,
            (A::SendImage, E::Done) if holds(Guard::GoAfterReady) => A::AwaitReady,
            (A::SendImage, E::Done) => A::RenameAway,
            (A::AwaitReady, E::Done) if holds(Guard::RenameBeforeGo) => A::RenameAway,
            (A::AwaitReady | A::RenameAway, E::Done) => A::SayGo,
            (A::SayGo, E::Done) if holds(Guard::DestroyAfterReport) => A::AwaitReport,
            (A::SayGo, E::Done) => A::Destroy,

            // Only a message of the receiver decides.
            (A::AwaitReport, E::Reported(0)) => A::Destroy,
            (A::AwaitReport, E::Reported(_)) if !holds(Guard::StatusIsLookedAt) => A::Destroy,
            (A::AwaitReport, E::Reported(_)) if holds(Guard::GivenBackByGo) => A::AwaitGivenBack,
            (A::AwaitReport, E::Reported(_)) => A::TakeBack,
            (A::AwaitGivenBack, E::Done) => A::TakeBack,
            (waits @ (A::AwaitReport | A::AwaitGivenBack), E::Signal)
                if holds(Guard::SignalDecidesNothing) =>
            {
                waits
            }
            (A::AwaitReport | A::AwaitGivenBack, E::PeerLost)
                if !holds(Guard::LostDecidesNothing) =>
            {
                A::TakeBack
            }
            (A::AwaitReport | A::AwaitGivenBack, E::TimedOut)
                if !holds(Guard::LateDecidesNothing) =>
            {
                A::TakeBack
            }
            (A::AwaitReport | A::AwaitGivenBack, E::Signal) => A::TakeBack,
            (A::AwaitReport | A::AwaitGivenBack, _) => A::End(SenderEnd::Undecided),

            (A::Destroy, E::Done) => A::End(SenderEnd::Moved),
            (A::Destroy, _) => A::End(SenderEnd::MovedNotDestroyed),

            (A::TakeBack, E::Done) => A::End(SenderEnd::Here),
            (A::TakeBack, E::GuestGone) => A::End(SenderEnd::GuestGone),
            (A::TakeBack, _) => A::End(SenderEnd::HereSuspended),

            (A::SayGo, _) if !holds(Guard::TakeBackUnsaidGo) => A::End(SenderEnd::Undecided),
            (A::AwaitReady, _) if !holds(Guard::TakeBackBeforeGo) => A::End(SenderEnd::Undecided),
            // "Go" has not been sent completely: no receiver runs the domain.
            (A::AwaitBanner | A::SendImage | A::AwaitReady | A::RenameAway | A::SayGo, _) => {
                A::TakeBack
            }

            (A::End(end), _) => A::End(end),
        };
        self.doing
    }
}

/// The receiver's next action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReceiverAction {
    /// Send the banner.
    SayBanner,
    /// Create the domain, paused and under another name, and read the image into it.
    Receive,
    /// Send "ready".
    SayReady,
    /// Wait for all of "go".
    AwaitGo,
    /// Rename the domain to its real name. From here on no signal is heeded.
    RenameIn,
    /// Let the domain run, unless it should stay paused.
    Run,
    /// Send the report, with status 0.
    SayRuns,
    /// Send the report, with another status.
    SayFailed,
    /// Destroy the new domain, if there is one.
    Destroy,
    /// Send the message that gives the domain back.
    GiveBack,
    /// The migration is over.
    End(ReceiverEnd),
}

/// The result of the receiver's last action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReceiverEvent {
    /// It was done, or the message was received.
    Done,
    /// The other end hung up, is lost, or sent something else.
    PeerLost,
    /// The other end did nothing until the time-out.
    TimedOut,
    /// A signal asks to stop.
    Signal,
    /// Something failed here.
    Failed,
}

/// The outcome for the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReceiverEnd {
    /// The domain runs here. Exit code 0 if the sender could be told, 1 otherwise.
    Runs {
        /// Whether the report has been sent.
        told: bool,
    },
    /// The domain is not here; the sender has it or may take it back. Exit code 1.
    Destroyed {
        /// Whether the sender was told so.
        given_back: bool,
    },
    /// The domain could not be destroyed: it is paused here, and must not run. Exit code 1.
    LeftPaused,
}

/// The receiver of a migration.
///
/// ```
/// use xsr_save_restore::migrate::ownership::plain::{
///     Receiver, ReceiverAction, ReceiverEnd, ReceiverEvent,
/// };
///
/// // The sender falls silent before "go".
/// let mut receiver = Receiver::new();
/// let end = loop {
///     receiver.on(match receiver.action() {
///         ReceiverAction::End(end) => break end,
///         ReceiverAction::AwaitGo => ReceiverEvent::TimedOut,
///         _ => ReceiverEvent::Done,
///     });
/// };
/// assert_eq!(end, ReceiverEnd::Destroyed { given_back: true });
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Receiver {
    doing: ReceiverAction,
    /// Whether the sender gets the domain back once it is destroyed here.
    gives_back: bool,
    guards: Guards,
}

impl Default for Receiver {
    fn default() -> Self {
        Self::new()
    }
}

impl Receiver {
    /// A receiver that has a connection.
    pub const fn new() -> Self {
        Self {
            doing: ReceiverAction::SayBanner,
            gives_back: false,
            guards: Guards {
                #[cfg(test)]
                broken: None,
            },
        }
    }

    /// The current action.
    pub const fn action(&self) -> ReceiverAction {
        self.doing
    }

    /// Whether this end owns the domain: from then on a signal is only acknowledged.
    pub const fn has_it(&self) -> bool {
        matches!(
            self.doing,
            ReceiverAction::RenameIn | ReceiverAction::Run | ReceiverAction::SayRuns
        )
    }

    /// Takes an event and returns the next action.
    pub fn on(&mut self, event: ReceiverEvent) -> ReceiverAction {
        use ReceiverAction as A;
        use ReceiverEnd as End;
        use ReceiverEvent as E;
        let holds = |guard| self.guards.hold(guard);
        self.doing = match (self.doing, event) {
            (A::SayBanner, E::Done) => A::Receive,
            (A::SayBanner, _) => A::End(End::Destroyed { given_back: false }),
            (A::Receive, E::Done) => A::SayReady,
            // The sender has not asked for an answer: hanging up tells it.
            (A::Receive | A::SayReady, e) if e != E::Done => A::Destroy,
            (A::Receive | A::SayReady, _) if holds(Guard::RunAfterGo) => A::AwaitGo,
            (A::Receive | A::SayReady, _) => A::RenameIn,

            (A::AwaitGo, E::Done) => A::RenameIn,
            (A::AwaitGo, E::PeerLost) if !holds(Guard::LostIsNoGo) => A::RenameIn,
            (A::AwaitGo, E::TimedOut) if !holds(Guard::LateIsNoGo) => A::RenameIn,
            (A::AwaitGo, E::Signal) if !holds(Guard::SignalIsNoGo) => A::RenameIn,
            (A::RenameIn, E::Done) if holds(Guard::ReportWhatRuns) => A::Run,
            (A::RenameIn, E::Done) => A::SayRuns,
            (A::Run, E::Done) => A::SayRuns,
            (A::AwaitGo | A::RenameIn | A::Run, _) if !holds(Guard::DestroyWithoutGo) => {
                A::End(End::LeftPaused)
            }
            (A::AwaitGo | A::RenameIn | A::Run, _) => A::SayFailed,

            // The domain is here, whether or not the report arrives.
            (A::SayRuns, e) => A::End(End::Runs { told: e == E::Done }),

            (A::SayFailed, e) => {
                self.gives_back = e == E::Done;
                if holds(Guard::DestroyBeforeGivingBack) {
                    A::Destroy
                } else {
                    A::GiveBack
                }
            }
            (A::Destroy, E::Done) if self.gives_back => A::GiveBack,
            (A::Destroy, E::Done) => A::End(End::Destroyed { given_back: false }),
            (A::Destroy, _) if !holds(Guard::GiveBackOnlyDestroyed) => A::GiveBack,
            (A::Destroy, _) => A::End(End::LeftPaused),
            (A::GiveBack, e) => A::End(End::Destroyed {
                given_back: e == E::Done,
            }),
            (A::End(end), _) => A::End(end),
        };
        self.doing
    }
}

#[cfg(test)]
impl Sender {
    pub(super) fn breaking(broken: Option<Guard>) -> Self {
        Self {
            guards: Guards { broken },
            ..Self::new()
        }
    }
}

#[cfg(test)]
impl Receiver {
    pub(super) fn breaking(broken: Option<Guard>) -> Self {
        Self {
            guards: Guards { broken },
            ..Self::new()
        }
    }
}
