//! Checks of `xsr save --direct`. Without libxl the guest's devices are not waited for, and a
//! device model is not saved. So a guest with a device model is refused, and one with other devices
//! unless the domain stays.

use anyhow::{Context as _, Result, bail};
use xsr_xen_backend::GuestKind;
use xsr_xen_backend::domain_store::{DomainRef, DomainStore};

use crate::args::SaveArgs;

/// Refuses a domain that only libxl can save.
///
/// # Errors
///
/// What libxl is needed for, and what to do.
pub(super) fn refuse(
    args: &SaveArgs,
    host: &dyn DomainStore,
    domain: DomainRef,
    name: &str,
) -> Result<()> {
    if host.check(domain)?.kind == GuestKind::Hvm {
        bail!("{name} has a device model, which is libxl's to save: drop --direct");
    }
    let devices = host
        .devices(domain)
        .with_context(|| format!("looking whether {name} has devices"))?;
    if devices.is_empty() {
        return Ok(());
    }
    let devices = devices.join(", ");
    if !args.paused && !args.checkpoint {
        bail!(
            "{name} has {devices}, which is libxl's to save and to take down: drop --direct, or \
             keep the domain (-c or -p) and have an image of its memory alone"
        );
    }
    tracing::warn!("the image will hold nothing of {devices} of {name}");
    Ok(())
}
