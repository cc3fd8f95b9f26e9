//! CPU features that a guest has seen and that this host lacks: what `--force` does about them,
//! and what to say where it was not given.

use anyhow::Error;
use xsr_save_restore::{CpuCheck, RestoreError};

use crate::exit;

/// What a restore does about them.
pub(crate) fn check(force: bool) -> CpuCheck {
    match force {
        true => CpuCheck::Warn,
        false => CpuCheck::Refuse,
    }
}

/// What to do about a guest that a restore refused.
pub(crate) const RESTORE: &str =
    "restore it on a host that has it, or restore it here all the same with --force";

/// The same of a migration, in words for both ends.
pub(crate) const RECEIVE: &str = "migrate it to a host that has it, or all the same with --force \
                                  (of the migrate-receive there, where it listens)";

/// A failure, with what to do about it if this is why.
pub(crate) fn advise(error: Error, advice: &str) -> Error {
    let is_why = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(RestoreError::CpuFeatures(_)))
    };
    match error.chain().any(is_why) {
        true => Error::msg(format!("{}; {advice}", exit::words(error.chain()))),
        false => error,
    }
}
