//! What a mock guest does while a command works on it: kept with the domain, and run by
//! the command, which stands in for the machine's processors. The guests of a real Xen run by
//! themselves.

use anyhow::{Context as _, Result};
use xsr_xen_backend::mock::{BackgroundWorkload, WorkloadEnd, WorkloadSpec};
use xsr_xen_backend::{DomId, ShutdownReason};

use crate::args::{MockEnd, WorkloadArgs};
use crate::backend::Hypervisor;

/// Under which name it is kept with the domain.
pub(crate) const WORKLOAD: &str = "mock-workload";

/// Pages a guest writes to that has not been told: 16 MiB.
const WORKING_SET_PAGES: u64 = 4096;

/// What the command line says a guest does; `None` for nothing.
pub(crate) fn spec(args: &WorkloadArgs, seed: u64) -> Option<WorkloadSpec> {
    let working_set = args
        .working_set
        .map_or(WORKING_SET_PAGES, |size| size.kib / 4);
    Some(WorkloadSpec {
        table_permille: args.page_tables,
        balloon_permille: args.balloon,
        end: args.shut_down.map(|how| WorkloadEnd {
            after: args.after,
            reason: match how {
                MockEnd::Poweroff => ShutdownReason::Poweroff,
                MockEnd::Reboot => ShutdownReason::Reboot,
                MockEnd::Crash => ShutdownReason::Crash,
            },
        }),
        ..WorkloadSpec::writes(seed, args.dirty_rate?, working_set)
    })
}

/// A guest that writes to so many pages a second.
pub(crate) fn at_rate(pages: u32) -> WorkloadSpec {
    /// Another one than that of a domain that `xsr mock` makes.
    const SEED: u64 = 0xc010;
    WorkloadSpec::writes(SEED, pages, WORKING_SET_PAGES)
}

/// Keep with a domain what it does; `None`: nothing, from now on. Tried first, so that
/// what cannot be done is said now and not by the next save.
pub(crate) fn store(host: &Hypervisor, domid: DomId, spec: Option<&WorkloadSpec>) -> Result<()> {
    let Some(mock) = host.mock() else {
        return Ok(());
    };
    let bytes = match spec {
        None => Vec::new(),
        Some(spec) => {
            mock.workload(domid, spec).context(TRYING)?;
            record(spec)?
        }
    };
    Ok(mock.userdata_store(domid, WORKLOAD, &bytes)?)
}

/// What is being done where a domain cannot do it.
pub(crate) const TRYING: &str = "what the domain is to do";

/// As it is kept with a domain.
pub(crate) fn record(spec: &WorkloadSpec) -> Result<Vec<u8>> {
    serde_json::to_vec(spec).context("making JSON")
}

/// What is kept with a domain, as what it does.
pub(crate) fn read(kept: Option<Vec<u8>>) -> Result<Option<WorkloadSpec>> {
    kept.filter(|bytes| !bytes.is_empty())
        .map(|bytes| serde_json::from_slice(&bytes))
        .transpose()
        .context("the workload kept with the domain")
}

/// Have the domain do what is kept with it, for as long as the answer lives and the domain
/// runs. `None` if it does nothing, or runs by itself.
pub(crate) fn start(host: &Hypervisor, domid: DomId) -> Result<Option<BackgroundWorkload>> {
    let kept = match host.mock() {
        Some(mock) => mock.userdata_get(domid, WORKLOAD)?,
        None => None,
    };
    match read(kept)? {
        Some(spec) => run(host, domid, &spec),
        None => Ok(None),
    }
}

/// Have the domain do this, for as long as the answer lives and the domain runs. `None` if it
/// runs by itself.
pub(crate) fn run(
    host: &Hypervisor,
    domid: DomId,
    spec: &WorkloadSpec,
) -> Result<Option<BackgroundWorkload>> {
    let Some(mock) = host.mock() else {
        return Ok(None);
    };
    let workload = mock
        .workload(domid, spec)
        .context("starting the workload")?;
    Ok(Some(workload.run_in_background()))
}
