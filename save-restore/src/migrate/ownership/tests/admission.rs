//! Which command may begin to work on a domain: what the lock of a domain and a look at its state
//! are for, as the searches have it.

use super::super::{Guard, Guards};

/// What a domain does, as a command finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Found {
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
pub(super) enum Refusal {
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
pub(super) struct Admission {
    pub(super) guards: Guards,
}

impl Admission {
    /// Whether a command that suspends the domain and may let it run on (a save, a migration, a
    /// protection) may begin. `busy`: another such command has the domain's lock.
    ///
    /// # Errors
    ///
    /// Why it must not.
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
