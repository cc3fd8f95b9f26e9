//! Admission of commands to a domain: the purpose of a domain's lock and of checking its state, as
//! the searches use it.

use super::super::{Guard, Guards};

/// The state in which a command finds a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Found {
    /// It runs, and can be asked to suspend.
    Running,
    /// It is paused, and a paused domain cannot suspend.
    Paused,
    /// It is suspended: by a command that is in progress or was killed, or because it was migrated
    /// and the other end has not reported the outcome.
    Suspended,
    /// It has shut down or crashed.
    Over,
}

/// Why a command must not begin to work on a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Refusal {
    /// Another command is working on it.
    Busy,
    /// It is paused.
    Paused,
    /// It is suspended, and this command cannot decide whether it may be resumed here.
    Suspended,
    /// It has shut down or crashed.
    Over,
}

/// Which command may begin to work on a domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Admission {
    pub(super) guards: Guards,
}

impl Admission {
    /// Whether a command that suspends the domain and may resume it (a save, a migration, a
    /// protection) may begin. `busy`: another such command has the domain's lock.
    ///
    /// # Errors
    ///
    /// Why it must not begin.
    pub(super) fn admit(self, busy: bool, found: Found) -> Result<(), Refusal> {
        match found {
            _ if busy && self.guards.hold(Guard::OneAtATime) => Err(Refusal::Busy),
            Found::Suspended if self.guards.hold(Guard::NotSuspended) => Err(Refusal::Suspended),
            Found::Running | Found::Suspended => Ok(()),
            Found::Paused => Err(Refusal::Paused),
            Found::Over => Err(Refusal::Over),
        }
    }
}
