//! What the engine asks of whoever drives it: libxl through its save helper, a
//! toolstack of its own, or nobody but the domain itself.
//!
//! The contracts are those of libxl's callbacks (`xenguest.h`, `save_callbacks` and
//! `restore_callbacks`).

use thiserror::Error;
use xsr_xen_backend::{BackendError, Domain};

/// A callback that failed.
#[derive(Debug, Error)]
#[error("{what}: {cause}")]
pub struct ToolstackError {
    /// What was asked.
    pub what: &'static str,
    /// Why it failed.
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl ToolstackError {
    /// `what` failed because of `cause`.
    pub fn new(
        what: &'static str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let cause = cause.into();
        Self { what, cause }
    }
}

/// What a save asks.
pub trait SaveToolstack {
    /// Suspend the guest; when this returns, the domain has shut down with reason
    /// "suspend" and its devices are quiet.
    fn suspend(&mut self) -> Result<(), ToolstackError>;

    /// Undo [`SaveToolstack::suspend`]: the guest runs on where it was. Asked at
    /// most once, of a guest that has suspended: also where [`SaveToolstack::suspend`]
    /// failed after it had.
    fn resume(&mut self) -> Result<(), ToolstackError>;

    /// Switch the device model's log-dirty mode. Asked for HVM and PVH guests only:
    /// on before memory is read, off again at the end, whatever happened between.
    /// A guest without a device model has nothing to do.
    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError>;
}

/// Static data that a stream did not hold, so that the toolstack must provide it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MissingStaticData {
    /// No X86_CPUID_POLICY (C: `XGR_SDD_MISSING_CPUID`).
    pub cpuid: bool,
    /// No X86_MSR_POLICY (C: `XGR_SDD_MISSING_MSR`).
    pub msr: bool,
}

/// What a restore asks.
pub trait RestoreToolstack {
    /// Static data has arrived and been applied, all but what is missing. Asked
    /// once, before any memory.
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError>;
}

/// No toolstack: suspends and resumes through the hypervisor alone, and has no
/// device model.
#[derive(Clone, Copy)]
pub struct DirectToolstack<'a>(pub &'a dyn Domain);

impl std::fmt::Debug for DirectToolstack<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DirectToolstack").finish_non_exhaustive()
    }
}

fn backend(what: &'static str) -> impl Fn(BackendError) -> ToolstackError {
    move |error| ToolstackError::new(what, error)
}

impl SaveToolstack for DirectToolstack<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.0.suspend().map_err(backend("suspending the guest"))
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.0.resume().map_err(backend("resuming the guest"))
    }

    fn switch_qemu_logdirty(&mut self, _on: bool) -> Result<(), ToolstackError> {
        Ok(())
    }
}

impl RestoreToolstack for DirectToolstack<'_> {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        // Xen gave the domain its default policy when it was created.
        if missing.cpuid || missing.msr {
            tracing::warn!(
                cpuid = missing.cpuid,
                msr = missing.msr,
                "the image holds no CPU policy (Xen before 4.14 wrote it); the guest gets this host's default"
            );
        }
        Ok(())
    }
}
