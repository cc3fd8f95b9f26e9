//! State machines that decide which host has the domain: the guarantee of a migration.
//!
//! A machine knows nothing of connections and domains. Its driver performs the action that the
//! machine requests, and returns the resulting event;
//! [`MigrateRequest::run`](super::send::MigrateRequest::run) and its siblings are that loop. So the
//! tests explore the very machine that runs: every message lost, cut short or late, a stall that
//! ends at any time-out, either end killed in any state, signals, failures of the host, a second
//! command on the same domain.
//!
//! - [`plain`]: a migration. The domain never runs on both hosts. It runs on neither only if that
//!   cannot be known ([`plain::SenderEnd::Undecided`]), if an end was killed, or if the host
//!   refused to let it run.
//! - [`protect`]: Remus and COLO, where after a lost connection both hosts or neither run the
//!   domain, depending on `--on-loss`.
//!
//! Each rule that a guarantee depends on is a `Guard`. A test breaks each of them, and the search
//! then finds a lost domain or one that runs twice.
//!
//! The tables of `docs/migration.md` describe the same for users.

pub mod plain;
pub mod protect;

/// A rule without which a domain is lost or runs twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Guard {
    /// Sender: "go" is sent only after "ready" was received.
    GoAfterReady,
    /// Sender: the domain is renamed before it is released.
    RenameBeforeGo,
    /// Sender: before "go" a failure leaves the domain running here.
    TakeBackBeforeGo,
    /// Sender: a "go" that was not sent completely does not let any receiver run the domain.
    TakeBackUnsaidGo,
    /// Sender: after "go" a lost connection decides nothing.
    LostDecidesNothing,
    /// Sender: after "go" a time-out decides nothing.
    LateDecidesNothing,
    /// Sender: after "go" a signal decides nothing.
    SignalDecidesNothing,
    /// Sender: it destroys the domain only after a report.
    DestroyAfterReport,
    /// Sender: and only after a report of success.
    StatusIsLookedAt,
    /// Sender: a receiver that failed has the domain until it gives it back.
    GivenBackByGo,
    /// Receiver: it runs the domain only after "go".
    RunAfterGo,
    /// Receiver: a lost connection does not count as "go", nor does a part of a "go".
    LostIsNoGo,
    /// Receiver: a time-out does not count as "go".
    LateIsNoGo,
    /// Receiver: a signal does not count as "go".
    SignalIsNoGo,
    /// Receiver: it reports success only for a domain that runs.
    ReportWhatRuns,
    /// Receiver: a domain that it may not run is destroyed.
    DestroyWithoutGo,
    /// Receiver: a domain is destroyed before it is given back.
    DestroyBeforeGivingBack,
    /// Receiver: a domain that could not be destroyed is not given back.
    GiveBackOnlyDestroyed,
    /// A second command does not begin while another works on the domain.
    #[cfg(test)]
    OneAtATime,
    /// No command begins to work on a suspended domain.
    #[cfg(test)]
    NotSuspended,
    /// Protector: a domain that keeps running here is withdrawn before the connection ends.
    WithdrawBeforeHangingUp,
    /// Protector: a domain that does not run here may have to run there, and is not withdrawn.
    WithdrawOnlyWhatRuns,
    /// Protector: if the other end does not answer, it is unknown where the domain runs.
    SilenceIsUnknown,
    /// Protector: before the first checkpoint is complete, the domain can only be here.
    IncompleteIsHere,
    /// Protector: if it is unknown where the domain runs, `--on-loss pause` pauses it.
    PauseOnLoss,
    /// Protector: a domain that runs on the other host is stopped here.
    StopWhatRunsThere,
    /// Protector: a domain that is given back keeps running here.
    GivenBackIsHere,
    /// Standby: it takes over only when the sender is lost.
    TakeOverOnlyWhenLost,
    /// Standby: and only with a complete checkpoint.
    TakeOverOnlyComplete,
    /// Standby: a domain that the sender has withdrawn does not run.
    WithdrawnDoesNotRun,
    /// Standby: a domain that could not be destroyed is not reported as gone.
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

#[cfg(test)]
mod tests;
