//! The contract of the traits: a suite of named checks for any implementation, run against the mock
//! machine in its tests and against a real hypervisor if one is present.
//!
//! Each check creates the domains it needs and destroys them. Every errno that the traits promise
//! is provoked, except those that need a different machine or handle: EPERM and EACCES for callers
//! without permission, ENOMEM from a host that is full, EOPNOTSUPP from one that cannot log a
//! guest's writes or has no 32-bit guests, ESRCH for a vcpu that was never created, and ETIMEDOUT
//! from a running guest that does not answer.

mod control;
mod domain_store;
mod hvm;
mod kit;
mod log_dirty;
mod memory;
mod platform;
mod pv;
mod pv_tables;
#[cfg(test)]
mod tests;

use std::fmt;

use crate::Errno;

pub use domain_store::{domain_store_names, run_domain_store};

use crate::{BackendError, Host};

/// A violation of the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<BackendError> for Violation {
    fn from(error: BackendError) -> Self {
        Self(format!("unexpected: {error}"))
    }
}

/// A failed check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The check.
    pub check: &'static str,
    /// The violation that it found.
    pub violation: Violation,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.check, self.violation)
    }
}

/// The result of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The number of checks made.
    pub checks: usize,
    /// The failed checks.
    pub failures: Vec<Failure>,
}

type Check = fn(&dyn Host) -> Result<(), Violation>;

/// The names of all checks, in the order in which they are made.
pub fn names() -> impl Iterator<Item = &'static str> {
    all().map(|(name, _)| *name)
}

fn all() -> impl Iterator<Item = &'static (&'static str, Check)> {
    [
        control::CHECKS,
        memory::CHECKS,
        log_dirty::CHECKS,
        platform::CHECKS,
        pv::CHECKS,
        pv_tables::CHECKS,
        hvm::CHECKS,
    ]
    .into_iter()
    .flatten()
}

/// Make every check, also after a failure.
pub fn run(host: &dyn Host) -> Report {
    run_some(host, |_| true)
}

/// Make the chosen checks, also after a failure.
pub fn run_some(host: &dyn Host, chosen: impl Fn(&str) -> bool) -> Report {
    let mut report = Report {
        checks: 0,
        failures: Vec::new(),
    };
    for (name, check) in all().filter(|(name, _)| chosen(name)) {
        tracing::info!(check = name);
        report.checks += 1;
        if let Err(violation) = check(host) {
            report.failures.push(Failure {
                check: name,
                violation,
            });
        }
    }
    report
}

/// Checks that `holds` is true.
fn ensure(holds: bool, what: &str) -> Result<(), Violation> {
    match holds {
        true => Ok(()),
        false => Err(Violation(format!("does not hold: {what}"))),
    }
}

/// Checks that `got` is `expected`.
fn equal<T: PartialEq + fmt::Debug + ?Sized>(
    got: &T,
    expected: &T,
    what: &str,
) -> Result<(), Violation> {
    match got == expected {
        true => Ok(()),
        false => Err(Violation(format!(
            "{what}: got {got:?}, expected {expected:?}"
        ))),
    }
}

/// The errnos of a hypervisor for a frame that cannot be used as requested. Which one it is depends
/// on the fault, on the kind of guest and on the kernel.
const REFUSED: [Errno; 3] = [Errno::EINVAL, Errno::EPERM, Errno::EBUSY];

/// Checks that `result` is the failure of a frame that cannot be used as requested.
fn refused<T>(result: Result<T, BackendError>, what: &str) -> Result<(), Violation> {
    match result {
        Err(error) if REFUSED.contains(&error.errno) => Ok(()),
        Err(error) => Err(Violation(format!(
            "{what}: {error}, expected one of {REFUSED:?}"
        ))),
        Ok(_) => Err(Violation(format!(
            "{what}: succeeds, expected one of {REFUSED:?}"
        ))),
    }
}

/// Checks that `result` is a failure with `errno`.
fn fails<T>(result: Result<T, BackendError>, errno: Errno, what: &str) -> Result<(), Violation> {
    match result {
        Err(error) if error.errno == errno => Ok(()),
        Err(error) => Err(Violation(format!("{what}: {error}, expected {errno}"))),
        Ok(_) => Err(Violation(format!("{what}: succeeds, expected {errno}"))),
    }
}
