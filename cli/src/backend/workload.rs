//! The workload of a mock guest: it is stored with the domain, and run by each command that works
//! on the domain, in place of the machine's processors. The guests of a real Xen run by themselves.

use anyhow::{Context as _, Result};
use xsr_xen_backend::mock::{BackgroundWorkload, WorkloadEnd, WorkloadSpec};
use xsr_xen_backend::{DomId, ShutdownReason};

use super::Hypervisor;
use crate::args::{MockEnd, WorkloadArgs};

/// A guest's workload.
pub(crate) type Work = WorkloadSpec;
/// A running workload, until this is dropped.
pub(crate) type Working = BackgroundWorkload;

/// The name under which it is stored with the domain.
pub(crate) const WORKLOAD: &str = "mock-workload";

/// The default size of a guest's working set: 16 MiB.
const WORKING_SET_PAGES: u64 = 4096;

/// The workload of the command line; `None` for none.
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

/// A guest that writes to this many pages a second.
pub(crate) fn at_rate(pages: u32) -> WorkloadSpec {
    /// Differs from the seed of domains that `xsr mock` creates.
    const SEED: u64 = 0xc010;
    WorkloadSpec::writes(SEED, pages, WORKING_SET_PAGES)
}

/// Store a domain's workload; `None` removes it. It is tried first, so that an impossible workload
/// fails now instead of at the next save.
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

/// The context of an error about a workload that a domain cannot run.
pub(crate) const TRYING: &str = "what the domain is to do";

/// A workload as it is stored with a domain.
pub(crate) fn record(spec: &WorkloadSpec) -> Result<Vec<u8>> {
    serde_json::to_vec(spec).context("making JSON")
}

/// A stored workload.
pub(crate) fn read(kept: Option<Vec<u8>>) -> Result<Option<WorkloadSpec>> {
    kept.filter(|bytes| !bytes.is_empty())
        .map(|bytes| serde_json::from_slice(&bytes))
        .transpose()
        .context("the workload kept with the domain")
}

/// Run the domain's stored workload, until the result is dropped or the domain stops. `None` if it
/// has none, or runs by itself.
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

/// Run this workload, until the result is dropped or the domain stops. `None` if the domain runs by
/// itself.
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
