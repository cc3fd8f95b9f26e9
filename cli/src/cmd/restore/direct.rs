//! What `xsr restore --direct` refuses: a domain that only libxl can make. It is for guests
//! without devices.

use anyhow::{Result, anyhow, bail};
use xsr_xen_backend::GuestKind;

use super::{Plan, bad, settings};

/// Refuses a domain that only libxl can make, and takes over the settings of others.
///
/// # Errors
///
/// What it has, and what to do.
pub(super) fn check(plan: &mut Plan) -> Result<()> {
    let name = &plan.name;
    if plan.kind == GuestKind::Hvm {
        bail!("{name} needs a device model, which is libxl's to start: drop --direct");
    }
    let config: serde_json::Value =
        serde_json::from_str(&plan.json).map_err(|error| bad(&error.to_string()))?;
    // At the top of libxl's configuration, lists are of devices and nothing else is a list.
    let devices = config.as_object().into_iter().flatten();
    let devices = devices.filter(|(_, value)| value.as_array().is_some_and(|l| !l.is_empty()));
    let devices: Vec<&str> = devices.map(|(key, _)| key.as_str()).collect();
    if !devices.is_empty() {
        let devices = devices.join(", ");
        bail!("{name} has {devices}, and devices are libxl's to connect: drop --direct");
    }
    let (uuid, settings) = settings::of(&config).map_err(|refused| {
        let refused = refused.join(", ");
        anyhow!("{name} has {refused} in its configuration, which --direct cannot give it: drop --direct")
    })?;
    plan.uuid = uuid;
    plan.settings = settings;
    Ok(())
}
