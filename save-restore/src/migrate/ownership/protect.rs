//! State machines of the protector and the standby (Remus and COLO): which host has the domain.
//!
//! ```text
//!  protector                           standby
//!  AwaitBanner     ◄─────────────────  SayBanner
//!  Protect         ── checkpoints ──►  Keep
//!                     the sender ends it
//!  Withdraw        ─────────────────►  Destroy
//!  AwaitLastWords  ◄─────────────────  SayFailed, GiveBack
//!  End(Here)
//!                     the connection is lost
//!  Pause                               TakeName, Run
//!  AwaitLastWords  ✗─────────────────  SayRuns
//!  End(Unknown)                        End(Runs)
//! ```
//!
//! `Pause` only with [`OnLoss::Pause`]. Checkpoints are not acknowledged, so after a lost
//! connection both hosts or neither may run the domain, as [`OnLoss`] says. The protector then
//! reports that it does not know ([`Fate::Unknown`], exit code 3).
//!
//! Under COLO the standby's domain runs from the first checkpoint on. Which host keeps it is
//! decided in the same way.
//!
//! C implementation: `tools/xl/xl_migrate.c:main_remus`, `migrate_receive`.

use super::{Guard, Guards};

/// What happens to the domain here if it is unknown whether it runs on the other host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OnLoss {
    /// It continues to run, as under xl. It may then run on both hosts.
    Run,
    /// It is paused. It may then run on neither host.
    Pause,
}

/// Why a protection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// A signal, or the requested number of checkpoints.
    Asked,
    /// The other end hung up, or sent something: it sends nothing while all is well.
    Receiver,
    /// Something failed, here or on the connection.
    Failed,
}

/// The state of the domain here when the protection has ended.
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
    /// The host does not answer.
    Unknown,
}

impl Here {
    /// Whether the other end should forget its copy. A domain that does not run here had better run
    /// there, unless it was destroyed on purpose or has ended by itself.
    pub const fn is_taken_back(self) -> bool {
        !matches!(self, Self::Suspended | Self::Unknown)
    }
}

/// Where the domain is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// Here alone.
    Here,
    /// The other end reports that it runs the domain.
    There,
    /// Here, and perhaps on the other host as well.
    Unknown,
}

/// The protector's next action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProtectorAction {
    /// Wait for the banner.
    AwaitBanner,
    /// Send checkpoint after checkpoint.
    Protect,
    /// Take the domain back, by sending bytes that no receiver can apply.
    Withdraw,
    /// Pause the domain here.
    Pause,
    /// Send nothing more, and wait to hear what becomes of the copy.
    AwaitLastWords {
        /// Whether the connection is lost: the other end's last message is then in transit already.
        lost: bool,
    },
    /// Unpause the domain that was paused.
    Unpause,
    /// Pause the domain here, and rename it to the name for a domain that has moved.
    Stop,
    /// The protection is over.
    End(ProtectorEnd),
}

/// The result of the protector's last action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProtectorEvent {
    /// It was done, or the message was received.
    Done,
    /// One more checkpoint has been sent completely ([`ProtectorAction::Protect`] only).
    Complete,
    /// No more checkpoints will be sent.
    Ended {
        /// Why.
        why: Why,
        /// Whether the other end has only a part of what was sent, or is gone.
        lost: bool,
        /// The state of the domain here now.
        here: Here,
    },
    /// The other end runs its copy.
    RunsThere,
    /// The other end has destroyed its copy, and gives the domain back.
    GivenBack,
    /// The other end hung up, is lost, sent something else, or sent nothing for too long.
    Nothing,
    /// A signal asks to stop.
    Signal,
    /// It failed.
    Failed,
}

/// The outcome of a protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProtectorEnd {
    /// Where the domain is.
    pub fate: Fate,
    /// Why.
    pub why: Why,
    /// The state of the domain here when the protection ended.
    pub here: Here,
}

impl ProtectorEnd {
    /// Whether it ended as requested, with the domain running here: exit code 0.
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
    /// Whether the other end can have a complete checkpoint.
    complete: bool,
    why: Why,
    here: Here,
    /// Whether the domain was paused because the connection was lost.
    paused: bool,
    /// Whether the protector has waited for the last message.
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

    /// The current action.
    pub const fn action(&self) -> ProtectorAction {
        self.doing
    }

    /// Whether the other end can have a complete checkpoint, and so may run the domain once it has
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

    /// Whether the domain still has to be paused if it may run on the other host.
    fn pauses(&self) -> bool {
        self.complete
            && !self.paused
            && self.on_loss == OnLoss::Pause
            && self.guards.hold(Guard::PauseOnLoss)
    }

    /// Takes an event and returns the next action. An event that cannot result from the action
    /// counts as its failure.
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
                if !self.complete && why == Why::Asked {
                    // The other end has nothing that it could run, and so nothing to report.
                    self.end(Fate::Here)
                } else if self.complete && !lost && taken_back && told {
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
            // The other end never had a complete checkpoint.
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
                    // The domain is here alone, and still paused.
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

/// The standby's next action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StandbyAction {
    /// Send the banner.
    SayBanner,
    /// Create the domain, and keep it at the last complete checkpoint.
    Keep,
    /// Rename the domain to its real name.
    TakeName,
    /// Let the domain run, unless it should stay paused.
    Run,
    /// Report that it runs here.
    SayRuns,
    /// Destroy the new domain, if there is one.
    Destroy,
    /// Report that it does not run here.
    SayFailed,
    /// Report that it is not here.
    GiveBack,
    /// The protection is over.
    End(StandbyEnd),
}

/// The result of the standby's last action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StandbyEvent {
    /// It was done.
    Done,
    /// One more checkpoint is complete, and the domain can run from it ([`StandbyAction::Keep`]
    /// only).
    Complete,
    /// The sender takes its domain back.
    Withdrawn,
    /// The stream broke off: the sender hung up, or the connection is lost.
    Lost,
    /// The stream breaks a rule, a checkpoint could not be applied, a signal asks to stop, or
    /// something else failed.
    Failed,
}

/// The outcome for the standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StandbyEnd {
    /// The domain runs here. Exit code 0.
    Runs,
    /// The domain is here, paused, and could not be started. Exit code 1.
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

    /// The current action.
    pub const fn action(&self) -> StandbyAction {
        self.doing
    }

    /// Takes an event and returns the next action.
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

            // Running the domain matters more than its name.
            (A::TakeName, _) => A::Run,
            (A::Run, E::Done) => A::SayRuns,
            // This may be the only copy of the domain.
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
