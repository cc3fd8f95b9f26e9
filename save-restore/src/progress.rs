//! What the engine tells while it works, and how it is told to stop.

use std::ops::ControlFlow;

/// What the engine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Asking the domain what it is; mapping its tables.
    Setup,
    /// Waiting for the guest to suspend.
    Suspend,
    /// Memory.
    Pages,
    /// Registers, devices, everything else.
    Tail,
}

/// How far the engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Passes over memory that are complete; 0 but in a live save.
    pub iteration: u32,
    /// pfns dealt with in this pass.
    pub pages_done: u64,
    /// pfns there are in it; 0 in a restore: a stream does not say.
    pub pages_total: u64,
    /// Octets of page contents that have gone through.
    pub octets: u64,
}

/// Called now and then with how far the engine is. `Break` stops it: the save or
/// restore fails as aborted, with the same promise as after any other failure.
pub type OnProgress<'a> = dyn FnMut(&Progress) -> ControlFlow<()> + 'a;
