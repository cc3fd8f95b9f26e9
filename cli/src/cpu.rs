//! CPU features that a guest has seen and this host lacks: the effect of `--force`, and the advice
//! without it.

use anyhow::Error;
use xsr_save_restore::{CpuCheck, RestoreError};

use crate::exit;

/// How a restore treats them.
pub(crate) fn check(force: bool) -> CpuCheck {
    match force {
        true => CpuCheck::Warn,
        false => CpuCheck::Refuse,
    }
}

/// The advice about a guest that a restore refused.
pub(crate) const RESTORE: &str =
    "restore it on a host that has it, or restore it here all the same with --force";

/// The advice for a migration, worded for both ends.
pub(crate) const RECEIVE: &str = "migrate it to a host that has it, or all the same with --force \
                                  (of the migrate-receive there, where it listens)";

/// Adds the advice to an error that is about CPU features.
pub(crate) fn advise(error: Error, advice: &str) -> Error {
    let is_why = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(RestoreError::CpuFeatures(_)))
    };
    match error.chain().any(is_why) {
        true => Error::msg(format!("{}; {advice}", exit::words(error.chain()))),
        false => error,
    }
}
