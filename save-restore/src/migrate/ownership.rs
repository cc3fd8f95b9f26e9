//! Which host has the domain: the guarantee of a migration, as state machines.
//!
//! A machine knows nothing of connections and domains. Its driver performs the action that the
//! machine asks for, and tells it the event that came of it;
//! [`SendRequest::run`](super::send::SendRequest::run) and its siblings are that loop. So the
//! machine that runs is the one that the tests explore: every
//! message lost, cut short or late, a stall that ends at any time-out, either end killed in any
//! state, signals, failures of the host, a second command on the same domain.
//!
//! - [`plain`]: a migration. The domain never runs at both ends. It runs at neither only where
//!   that cannot be known ([`plain::SenderEnd::Undecided`]), where an end was killed, or where
//!   the host refused to let it run.
//! - [`protect`]: Remus and COLO, where a lost connection lets both run or neither, as
//!   `--on-loss` says.
//! - [`Admission`]: which command may begin to work on a domain at all.
//!
//! Each rule that a guarantee hangs on is a `Guard`. A test breaks each of them, and the search
//! finds the domain that is lost or doubled then.
//!
//! The tables of `docs/migration.md` say the same to people.

pub mod plain;
pub mod protect;

/// A rule without which a domain is lost or runs twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Guard {
    /// Sender: "go" is said only after "ready" was heard.
    GoAfterReady,
    /// Sender: what is let go of has another name.
    RenameBeforeGo,
    /// Sender: before "go" a failure leaves the domain running here.
    TakeBackBeforeGo,
    /// Sender: a "go" that did not leave whole lets nobody run the domain.
    TakeBackUnsaidGo,
    /// Sender: after "go" a lost connection decides nothing.
    LostDecidesNothing,
    /// Sender: after "go" a time-out decides nothing.
    LateDecidesNothing,
    /// Sender: after "go" a signal decides nothing.
    SignalDecidesNothing,
    /// Sender: only a report lets it destroy the domain.
    DestroyAfterReport,
    /// Sender: only a report of success does.
    StatusIsLookedAt,
    /// Sender: a receiver that failed has the domain until it gives it back.
    GivenBackByGo,
    /// Receiver: only "go" lets it run the domain.
    RunAfterGo,
    /// Receiver: a lost connection is no "go", nor is a part of one.
    LostIsNoGo,
    /// Receiver: a time-out is no "go".
    LateIsNoGo,
    /// Receiver: a signal is no "go".
    SignalIsNoGo,
    /// Receiver: it reports success only of a domain that runs.
    ReportWhatRuns,
    /// Receiver: what it was not let run is destroyed.
    DestroyWithoutGo,
    /// Receiver: what it gives back is destroyed before.
    DestroyBeforeGivingBack,
    /// Receiver: what could not be destroyed is not given back.
    GiveBackOnlyDestroyed,
    /// A second command does not begin while another works on the domain.
    OneAtATime,
    /// No command begins to work on a suspended domain.
    NotSuspended,
    /// Protector: a domain that runs on here is withdrawn before the connection ends.
    WithdrawBeforeHangingUp,
    /// Protector: what does not run here may have to run there, and is not withdrawn.
    WithdrawOnlyWhatRuns,
    /// Protector: without a word of the other end it is not known where the domain runs.
    SilenceIsUnknown,
    /// Protector: before the first checkpoint is complete it can only be here.
    IncompleteIsHere,
    /// Protector: where nothing is known, `--on-loss pause` pauses the domain.
    PauseOnLoss,
    /// Protector: what runs at the other end is stopped here.
    StopWhatRunsThere,
    /// Protector: what is given back runs on here.
    GivenBackIsHere,
    /// Standby: it takes over only when the sender is lost.
    TakeOverOnlyWhenLost,
    /// Standby: and only with a checkpoint that is complete.
    TakeOverOnlyComplete,
    /// Standby: what the sender has withdrawn does not run.
    WithdrawnDoesNotRun,
    /// Standby: what could not be destroyed is not said to be gone.
    SayGoneOnlyOfDestroyed,
}

/// Which guards hold: all of them, unless a test breaks one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Guards {
    #[cfg(test)]
    pub(crate) broken: Option<Guard>,
}

impl Guards {
    #[cfg(test)]
    fn hold(self, guard: Guard) -> bool {
        self.broken != Some(guard)
    }

    #[cfg(not(test))]
    const fn hold(self, _: Guard) -> bool {
        true
    }
}

/// What a domain does, as a command finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Found {
    /// It runs, and can be asked to suspend.
    Running,
    /// It is paused, and a paused domain cannot suspend.
    Paused,
    /// It is suspended: by a command that is under way or was killed, or because it was migrated
    /// and the other end has not said what came of that.
    Suspended,
    /// It has shut down or crashed.
    Over,
}

/// Why a command must not begin to work on a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Another command works on it.
    Busy,
    /// It is paused.
    Paused,
    /// It is suspended, and whether it may run on here is not for this command to say.
    Suspended,
    /// It has shut down or crashed.
    Over,
}

/// Which command may begin to work on a domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Admission {
    guards: Guards,
}

impl Admission {
    /// Whether a command that suspends the domain and may let it run on (a save, a migration, a
    /// protection) may begin. `busy`: another such command has the domain's lock.
    ///
    /// # Errors
    ///
    /// Why it must not.
    pub fn admit(self, busy: bool, found: Found) -> Result<(), Refusal> {
        match found {
            _ if busy && self.guards.hold(Guard::OneAtATime) => Err(Refusal::Busy),
            Found::Suspended if self.guards.hold(Guard::NotSuspended) => Err(Refusal::Suspended),
            Found::Running | Found::Suspended => Ok(()),
            Found::Paused => Err(Refusal::Paused),
            Found::Over => Err(Refusal::Over),
        }
    }
}

#[cfg(test)]
mod tests;
