//! Checks of `xsr restore --direct`, which is for guests without devices: it refuses a domain that
//! only libxl can create.

use anyhow::{Result, anyhow, bail};
use xsr_format::frame::Gfn;
use xsr_save_restore::toolstack::{
    DirectToolstack, MissingStaticData, RestoreToolstack, ToolstackError,
};
use xsr_xen_backend::GuestKind;

use super::{RestorePlan, bad, settings};

/// Refuses a domain that only libxl can create, and takes over the settings of others.
///
/// # Errors
///
/// What libxl is needed for, and what to do.
pub(super) fn check(plan: &mut RestorePlan) -> Result<()> {
    let name = &plan.name;
    if plan.kind == GuestKind::Hvm {
        bail!("{name} needs a device model, which is libxl's to start: drop --direct");
    }
    let config: serde_json::Value =
        serde_json::from_str(&plan.json).map_err(|error| bad(&error.to_string()))?;
    // At the top level of libxl's configuration, all lists are lists of devices.
    let devices = config.as_object().into_iter().flatten();
    let devices = devices.filter(|(_, value)| value.as_array().is_some_and(|l| !l.is_empty()));
    let devices: Vec<&str> = devices.map(|(key, _)| key.as_str()).collect();
    if !devices.is_empty() {
        let devices = devices.join(", ");
        bail!("{name} has {devices}, and devices are libxl's to connect: drop --direct");
    }
    let said = settings::of(&config, plan.vcpus).map_err(|refused| {
        let refused = refused.join(", ");
        anyhow!("{name} has {refused} in its configuration, which --direct cannot give it: drop --direct")
    })?;
    plan.uuid = said.uuid;
    plan.settings = said.settings;
    plan.extent = Some(said.extent);
    plan.changes_cpuid = said.changes_cpuid;
    Ok(())
}

/// The direct toolstack, unless the configuration has something that the stream lacks.
pub(super) struct Toolstack<'a> {
    pub(super) direct: DirectToolstack<'a>,
    /// Whether the configuration changes what the guest sees of the CPU.
    pub(super) changes_cpuid: bool,
}

impl RestoreToolstack for Toolstack<'_> {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        if missing.cpuid && self.changes_cpuid {
            return Err(ToolstackError::new(
                "setting the CPU policy",
                "the image holds none, and its configuration has b_info.cpuid, which --direct \
                 cannot apply: drop --direct",
            ));
        }
        self.direct.static_data_done(missing)
    }

    fn restore_results(
        &mut self,
        store_gfn: Option<Gfn>,
        console_gfn: Option<Gfn>,
    ) -> Result<(), ToolstackError> {
        self.direct.restore_results(store_gfn, console_gfn)
    }
}
