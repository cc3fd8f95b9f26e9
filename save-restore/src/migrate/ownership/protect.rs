//! Who has the domain under Remus and COLO: the protector's and the standby's machine.
//!
//! ```text
//!  protector                                   standby
//!  AwaitBanner     ◄─────────────────────────  SayBanner
//!  Protect         ── checkpoints ───────────►  Keep
//!                     the sender ends it
//!  Withdraw        ──────────────────────────►  Destroy
//!  AwaitLastWords  ◄─────────────────────────  SayFailed, GiveBack
//!  End(Here)
//!                     the connection is lost
//!  Pause                                       TakeName, Run
//!  AwaitLastWords  ✗─────────────────────────  SayRuns
//!  End(Unknown)                                End(Runs)
//! ```
//!
//! `Pause` only with [`OnLoss::Pause`]. Nothing acknowledges a checkpoint, so that a connection
//! that is lost lets both run, or neither, as [`OnLoss`] says; the protector then says that it
//! does not know ([`Fate::Unknown`], exit code 3).
//!
//! Under COLO the standby's domain runs from the first checkpoint on. Who keeps it is decided in
//! the same way.
//!
//! C implementation: `tools/xl/xl_migrate.c:main_remus`, `migrate_receive`.

use super::{Guard, Guards};

/// What becomes of the domain here when it is not known whether it runs at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OnLoss {
    /// It runs on, as under xl. It may run at both ends then.
    Run,
    /// It is paused. It may run at neither end then.
    Pause,
}

/// Why a protection came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// A signal, or as many checkpoints as were asked for.
    Asked,
    /// The other end hung up, or said something: it has nothing to say while all is well.
    Receiver,
    /// Something failed, here or on the connection.
    Failed,
}

/// What the domain does here when the protection has come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Here {
    /// It runs.
    Runs,
    /// It is suspended, and could not be resumed.
    Suspended,
    /// It has shut down or crashed.
    Over,
    /// It was destroyed.
    Gone,
    /// The host does not say.
    Unknown,
}

impl Here {
    /// Whether the other end is to forget its copy. A domain that does not run here had better
    /// run there, unless it was destroyed on purpose or has ended itself.
    pub const fn is_taken_back(self) -> bool {
        !matches!(self, Self::Suspended | Self::Unknown)
    }
}

/// Where the domain is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// Here alone.
    Here,
    /// The other end says that it runs it.
    There,
    /// Here, and perhaps at the other end as well.
    Unknown,
}

/// What the protector is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProtectorAction {
    /// Wait for the banner.
    AwaitBanner,
    /// Send checkpoint after checkpoint.
    Protect,
    /// Take the domain back, by what no receiver can apply.
    Withdraw,
    /// Pause the domain here.
    Pause,
    /// Say nothing more, and hear what becomes of the copy.
    AwaitLastWords {
        /// Whether the connection is lost: what is still said is on its way by now.
        lost: bool,
    },
    /// Let the domain run on that was paused.
    Unpause,
    /// Pause the domain here, and give it the name of one that has moved.
    Stop,
    /// It is over.
    End(ProtectorEnd),
}

/// What the protector is told of its last action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProtectorEvent {
    /// It was done, or the message was heard.
    Done,
    /// One more checkpoint has left, all of it ([`ProtectorAction::Protect`] only).
    Complete,
    /// There will be no other.
    Ended {
        /// Why.
        why: Why,
        /// Whether the other end has no more than a part of what was sent, or no end any more.
        lost: bool,
        /// What the domain does here now.
        here: Here,
    },
    /// The other end runs its copy.
    RunsThere,
    /// The other end has destroyed its copy, and gives the domain back.
    GivenBack,
    /// The other end hung up, is lost, said something else, or nothing for too long.
    Nothing,
    /// A signal asks to stop.
    Signal,
    /// It failed.
    Failed,
}

/// How a protection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProtectorEnd {
    /// Where the domain is.
    pub fate: Fate,
    /// Why.
    pub why: Why,
    /// What the domain did here when the protection ended.
    pub here: Here,
}

impl ProtectorEnd {
    /// Whether it ended as was asked, with the domain running here: exit code 0.
    pub fn is_success(self) -> bool {
        self.fate == Fate::Here && self.why == Why::Asked && self.here == Here::Runs
    }

    /// Whether it is unknown where the domain runs: exit code 3.
    pub fn is_undecided(self) -> bool {
        self.fate == Fate::Unknown
    }
}

/// The sender of checkpoints.
///
/// ```
/// use xsr_save_restore::migrate::ownership::protect::{
///     Fate, Here, OnLoss, Protector, ProtectorAction, ProtectorEvent, Why,
/// };
///
/// // A signal ends it, and the other end says that its copy is gone.
/// let mut checkpoints = 0;
/// let mut protector = Protector::new(OnLoss::Run);
/// let end = loop {
///     protector.on(match protector.action() {
///         ProtectorAction::End(end) => break end,
///         ProtectorAction::Protect if checkpoints < 3 => {
///             checkpoints += 1;
///             ProtectorEvent::Complete
///         }
///         ProtectorAction::Protect => ProtectorEvent::Ended {
///             why: Why::Asked,
///             lost: false,
///             here: Here::Runs,
///         },
///         ProtectorAction::AwaitLastWords { .. } => ProtectorEvent::GivenBack,
///         _ => ProtectorEvent::Done,
///     });
/// };
/// assert!(end.fate == Fate::Here && end.is_success());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Protector {
    doing: ProtectorAction,
    on_loss: OnLoss,
    /// Whether the other end can have a whole checkpoint.
    complete: bool,
    why: Why,
    here: Here,
    /// Whether the domain was paused because the connection was lost.
    paused: bool,
    /// Whether the last words have been waited for.
    heard: bool,
    guards: Guards,
}

impl Protector {
    /// A protector that has a connection, and whose domain runs.
    pub const fn new(on_loss: OnLoss) -> Self {
        Self {
            doing: ProtectorAction::AwaitBanner,
            on_loss,
            complete: false,
            why: Why::Failed,
            here: Here::Runs,
            paused: false,
            heard: false,
            guards: Guards {
                #[cfg(test)]
                broken: None,
            },
        }
    }

    /// What is to be done now.
    pub const fn action(&self) -> ProtectorAction {
        self.doing
    }

    /// Whether the other end can have a whole checkpoint, and so may run the domain once it has
    /// lost this end.
    pub const fn is_complete(&self) -> bool {
        self.complete
    }

    const fn end(&self, fate: Fate) -> ProtectorAction {
        ProtectorAction::End(ProtectorEnd {
            fate,
            why: self.why,
            here: self.here,
        })
    }

    /// Nothing more will be sent.
    fn hang_up(&self, lost: bool) -> ProtectorAction {
        if lost && self.pauses() {
            ProtectorAction::Pause
        } else {
            ProtectorAction::AwaitLastWords { lost }
        }
    }

    /// Whether the domain is still to be paused if it may run at the other end.
    fn pauses(&self) -> bool {
        self.complete
            && !self.paused
            && self.on_loss == OnLoss::Pause
            && self.guards.hold(Guard::PauseOnLoss)
    }

    /// What is to be done after an event. An event that cannot follow from the action counts as
    /// its failure.
    pub fn on(&mut self, event: ProtectorEvent) -> ProtectorAction {
        use ProtectorAction as A;
        use ProtectorEvent as E;
        let holds = |guard| self.guards.hold(guard);
        self.doing = match (self.doing, event) {
            (A::AwaitBanner, E::Done) => A::Protect,
            (A::AwaitBanner, e) => {
                if e == E::Signal {
                    self.why = Why::Asked;
                }
                self.end(Fate::Here)
            }

            (A::Protect, E::Complete) => {
                self.complete = true;
                A::Protect
            }
            (A::Protect, E::Ended { why, lost, here }) => {
                (self.why, self.here) = (why, here);
                let taken_back = here.is_taken_back() || !holds(Guard::WithdrawOnlyWhatRuns);
                let told = holds(Guard::WithdrawBeforeHangingUp);
                if self.complete && !lost && taken_back && told {
                    A::Withdraw
                } else {
                    self.hang_up(lost)
                }
            }
            (A::Protect, _) => {
                self.here = Here::Unknown;
                self.hang_up(true)
            }
            (A::Withdraw, E::Done) => self.hang_up(false),
            // The other end may take over.
            (A::Withdraw, _) => self.hang_up(true),

            (A::Pause, e) => {
                self.paused = e == E::Done;
                if self.heard {
                    self.end(Fate::Unknown)
                } else {
                    A::AwaitLastWords { lost: true }
                }
            }

            (A::AwaitLastWords { .. }, E::RunsThere) if holds(Guard::StopWhatRunsThere) => A::Stop,
            (A::AwaitLastWords { .. }, E::RunsThere) => self.end(Fate::There),
            (A::AwaitLastWords { .. }, E::GivenBack) if !holds(Guard::GivenBackIsHere) => {
                self.end(Fate::Unknown)
            }
            (A::AwaitLastWords { .. }, E::GivenBack) if self.paused => A::Unpause,
            (A::AwaitLastWords { .. }, E::GivenBack) => self.end(Fate::Here),
            // It never had all of a checkpoint.
            (A::AwaitLastWords { .. }, _) if !self.complete && holds(Guard::IncompleteIsHere) => {
                self.end(Fate::Here)
            }
            (A::AwaitLastWords { .. }, _) if !holds(Guard::SilenceIsUnknown) => {
                self.end(Fate::Here)
            }
            (A::AwaitLastWords { .. }, _) => {
                self.heard = true;
                if self.pauses() {
                    A::Pause
                } else {
                    self.end(Fate::Unknown)
                }
            }

            (A::Unpause, e) => {
                if e != E::Done {
                    // It is here alone, and still paused.
                    self.why = Why::Failed;
                }
                self.end(Fate::Here)
            }
            (A::Stop, _) => self.end(Fate::There),
            (A::End(end), _) => A::End(end),
        };
        self.doing
    }
}

/// What the standby is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StandbyAction {
    /// Say the banner.
    SayBanner,
    /// Make the domain, and keep it at the last checkpoint that is complete.
    Keep,
    /// Give the domain its name.
    TakeName,
    /// Let the domain run, unless it is to stay paused.
    Run,
    /// Say that it runs here.
    SayRuns,
    /// Destroy what was made, if anything was.
    Destroy,
    /// Say that it does not run here.
    SayFailed,
    /// Say that it is not here.
    GiveBack,
    /// It is over.
    End(StandbyEnd),
}

/// What the standby is told of its last action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StandbyEvent {
    /// It was done.
    Done,
    /// One more checkpoint is complete, and the domain can be run from it
    /// ([`StandbyAction::Keep`] only).
    Complete,
    /// The sender takes its domain back.
    Withdrawn,
    /// The stream did not go on: the sender hung up, or the connection is lost.
    Lost,
    /// The stream breaks a rule, a checkpoint could not be applied, a signal asks to stop, or
    /// something else failed.
    Failed,
}

/// How it ended for the standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StandbyEnd {
    /// The domain runs here. Exit code 0.
    Runs,
    /// The domain is here, paused, and could not be let run. Exit code 1.
    CouldNotRun,
    /// The domain is not here. Exit code 1.
    Destroyed,
    /// The domain could not be destroyed, and must not run. Exit code 1.
    LeftBehind,
}

/// The receiver of checkpoints.
///
/// ```
/// use xsr_save_restore::migrate::ownership::protect::{
///     Standby, StandbyAction, StandbyEnd, StandbyEvent,
/// };
///
/// // The sender is lost before a checkpoint is complete.
/// let mut standby = Standby::new();
/// let end = loop {
///     standby.on(match standby.action() {
///         StandbyAction::End(end) => break end,
///         StandbyAction::Keep => StandbyEvent::Lost,
///         _ => StandbyEvent::Done,
///     });
/// };
/// assert_eq!(end, StandbyEnd::Destroyed);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Standby {
    doing: StandbyAction,
    complete: bool,
    destroyed: bool,
    guards: Guards,
}

impl Default for Standby {
    fn default() -> Self {
        Self::new()
    }
}

impl Standby {
    /// A standby that has a connection.
    pub const fn new() -> Self {
        Self {
            doing: StandbyAction::SayBanner,
            complete: false,
            destroyed: false,
            guards: Guards {
                #[cfg(test)]
                broken: None,
            },
        }
    }

    /// What is to be done now.
    pub const fn action(&self) -> StandbyAction {
        self.doing
    }

    /// What is to be done after an event.
    pub fn on(&mut self, event: StandbyEvent) -> StandbyAction {
        use StandbyAction as A;
        use StandbyEnd as End;
        use StandbyEvent as E;
        let holds = |guard| self.guards.hold(guard);
        self.doing = match (self.doing, event) {
            (A::SayBanner, E::Done) => A::Keep,
            (A::SayBanner, _) => A::End(End::Destroyed),

            (A::Keep, E::Complete) => {
                self.complete = true;
                A::Keep
            }
            (A::Keep, E::Lost) if self.complete || !holds(Guard::TakeOverOnlyComplete) => {
                A::TakeName
            }
            (A::Keep, E::Withdrawn) if !holds(Guard::WithdrawnDoesNotRun) => A::TakeName,
            (A::Keep, E::Failed) if self.complete && !holds(Guard::TakeOverOnlyWhenLost) => {
                A::TakeName
            }
            (A::Keep, _) => A::Destroy,

            // It matters more that it runs than what it is called.
            (A::TakeName, _) => A::Run,
            (A::Run, E::Done) => A::SayRuns,
            // It may be all there is.
            (A::Run, _) => A::End(End::CouldNotRun),
            (A::SayRuns, _) => A::End(End::Runs),

            (A::Destroy, e) => {
                self.destroyed = e == E::Done;
                A::SayFailed
            }
            (A::SayFailed, E::Done) if self.destroyed || !holds(Guard::SayGoneOnlyOfDestroyed) => {
                A::GiveBack
            }
            (A::SayFailed | A::GiveBack, _) => A::End(if self.destroyed {
                End::Destroyed
            } else {
                End::LeftBehind
            }),
            (A::End(end), _) => A::End(end),
        };
        self.doing
    }
}

#[cfg(test)]
impl Protector {
    pub(super) fn breaking(on_loss: OnLoss, broken: Option<Guard>) -> Self {
        Self {
            guards: Guards { broken },
            ..Self::new(on_loss)
        }
    }
}

#[cfg(test)]
impl Standby {
    pub(super) fn breaking(broken: Option<Guard>) -> Self {
        Self {
            guards: Guards { broken },
            ..Self::new()
        }
    }
}
