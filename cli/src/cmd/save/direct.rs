//! Checks of `--direct` before a domain is saved, sent or protected. Without libxl the guest's
//! devices are not waited for, and a device model is not saved. So a guest with a device model is
//! refused, and one with other devices unless it is saved and the domain stays.

use anyhow::{Context as _, Result, bail};
use xsr_xen_backend::GuestKind;
use xsr_xen_backend::domain_store::{DomainRef, DomainStore};

use crate::args::SaveArgs;
use crate::terminal::Terminal;

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
    let Some(devices) = devices(host, domain, name)? else {
        return Ok(());
    };
    if !args.paused && !args.checkpoint {
        bail!(
            "{name} has {devices}, which is libxl's to save and to take down: drop --direct, or \
             keep the domain (-c or -p) and have an image of its memory alone"
        );
    }
    tracing::warn!("the image will hold nothing of {devices} of {name}");
    Ok(())
}

/// Refuses a domain that only libxl can send to another host, and says so if its configuration
/// has to be made.
///
/// # Errors
///
/// What libxl is needed for, and what to do.
pub(crate) fn check_sent(
    host: &dyn DomainStore,
    domain: DomainRef,
    name: &str,
    terminal: &Terminal,
) -> Result<()> {
    if let Some(devices) = devices(host, domain, name)? {
        bail!("{name} has {devices}, which is libxl's to move: drop --direct");
    }
    if host.configuration(domain)?.is_none() {
        terminal.say(&format!(
            "{name} has no configuration of libxl's: one is sent that is made from what Xen and \
             xenstore say of it"
        ));
    }
    Ok(())
}

/// The devices of a domain without a device model, if it has any.
fn devices(host: &dyn DomainStore, domain: DomainRef, name: &str) -> Result<Option<String>> {
    if host.check(domain)?.kind == GuestKind::Hvm {
        bail!("{name} has a device model, which is libxl's to save: drop --direct");
    }
    let devices = host
        .devices(domain)
        .with_context(|| format!("looking whether {name} has devices"))?;
    Ok((!devices.is_empty()).then(|| devices.join(", ")))
}
