//! The mock machine as the helper's hypervisor, for tests: compiled with the cargo feature
//! `test-backend` only, and used by the program `xsr-save-helper-mock` only.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use xsr_save_restore::toolstack::ToolstackError;
use xsr_xen_backend::domain_store::{DomainRef, DomainStore as _};
use xsr_xen_backend::mock::{MockError, MockHost, Workload, WorkloadSpec};
use xsr_xen_backend::{BackendError, DomId, Domain, Host};

use crate::backend::{Backend, StandIn};

/// Names the machine: `mock:DIR`, or `mock-xen:DIR` for the same machine through hypercalls.
const VARIABLE: &str = "XSR_HELPER_TEST_BACKEND";
/// Operations of a mock guest from one checkpoint to the next.
const OPERATIONS: u64 = 100;

/// A mock machine, directly or through hypercalls.
struct Mock {
    host: Box<dyn Host>,
    machine: MockHost,
}

/// Open the machine that the environment names.
///
/// # Errors
///
/// The environment names none, or it cannot be opened.
pub(crate) fn open() -> Result<Box<dyn Backend>> {
    let name = std::env::var(VARIABLE).context(VARIABLE)?;
    tracing::warn!("MOCK: {VARIABLE}={name}: this is a test, and no domain of a Xen is touched");
    let (how, dir) = name.split_once(':').unwrap_or_default();
    let machine = || MockHost::open(Path::new(dir));
    let (host, machine): (Box<dyn Host>, MockHost) = match how {
        "mock" => {
            let machine = machine()?;
            (Box::new(machine.clone()), machine)
        }
        "mock-xen" => {
            let machine = machine()?;
            (Box::new(machine.as_xen()?), machine)
        }
        _ => bail!("{VARIABLE} is {name:?}, expected mock:DIR or mock-xen:DIR"),
    };
    Ok(Box::new(Mock { host, machine }))
}

impl Backend for Mock {
    fn host(&self) -> &dyn Host {
        &*self.host
    }

    fn name(&self, domain: DomainRef) -> Result<Option<String>> {
        Ok(self.machine.name(domain)?)
    }

    fn stand_in<'d>(
        &self,
        domid: DomId,
        domain: &'d dyn Domain,
        ran: bool,
    ) -> Result<Option<Box<dyn StandIn + 'd>>> {
        let guest = MockGuest::of(&self.machine, domid, domain, ran)?;
        Ok(Some(Box::new(guest)))
    }
}

/// A domain of the mock machine. Only the process that has the machine open can suspend it, resume
/// it and make it work, so the helper does that as soon as libxl says that it has.
struct MockGuest<'d> {
    domain: &'d dyn Domain,
    /// The workload, under the name that `xsr mock` uses.
    work: Option<Workload>,
    /// The workload of a COLO secondary can start only when there is a guest.
    spec: Option<(MockHost, DomId, WorkloadSpec)>,
    /// Whether the guest has run. It has not yet during a restore.
    ran: bool,
}

impl<'d> MockGuest<'d> {
    /// The domain, with the workload stored as its `mock-workload`. `ran`: whether it holds a
    /// guest.
    fn of(host: &MockHost, domid: DomId, domain: &'d dyn Domain, ran: bool) -> Result<Self> {
        let kept = host.userdata_get(domid, "mock-workload")?;
        let kept = kept.filter(|bytes| !bytes.is_empty());
        let spec: Option<WorkloadSpec> = kept
            .map(|bytes| serde_json::from_slice(&bytes))
            .transpose()?;
        let mut guest = Self {
            domain,
            work: None,
            spec: spec.map(|spec| (host.clone(), domid, spec)),
            ran,
        };
        if ran {
            guest.begin()?;
        }
        Ok(guest)
    }

    fn begin(&mut self) -> Result<(), MockError> {
        if let Some((host, domid, spec)) = self.spec.take() {
            self.work = Some(host.workload(domid, &spec)?);
        }
        Ok(())
    }
}

impl StandIn for MockGuest<'_> {
    fn suspend(&self) -> Result<(), ToolstackError> {
        let suspended = self.domain.suspend();
        suspended.map_err(|e| ToolstackError::new("suspending the mock guest", e))
    }

    fn run_on(&mut self) -> Result<(), ToolstackError> {
        let failed = |e: BackendError| ToolstackError::new("resuming the mock guest", e);
        match std::mem::replace(&mut self.ran, true) {
            true => self.domain.resume().map_err(failed)?,
            // libxl's part of the first checkpoint of COLO.
            false => {
                self.domain.enable_log_dirty().map_err(failed)?;
                self.domain.unpause().map_err(failed)?;
                let begun = self.begin();
                begun.map_err(|e| ToolstackError::new("starting the mock guest's work", e))?;
            }
        }
        match &mut self.work {
            Some(work) => work.step(OPERATIONS).map(drop).map_err(failed),
            None => Ok(()),
        }
    }
}
