//! What an image shows of the domain that it needs, where no configuration says it.
//!
//! C implementation: none; xl restores nothing without a configuration.

use std::path::Path;

use anyhow::{Error, Result};
use xsr_format::fields::hvm::{HvmContext, HvmRecordKind};
use xsr_format::image::GuestType;
use xsr_format::record::{Body, RecordKind};
use xsr_format::wrapper::libxl::LibxlRecord;
use xsr_xen_backend::GuestKind;

use super::bad;
use crate::config;
use crate::exit::BadUsage;
use crate::file::Input;
use crate::image::{Event, Reading};
use crate::page_map::{PageMap, runs_of};

/// The configuration that a restore would make for an image that has none. The image is
/// read for it.
pub(crate) fn config_for(input: &Input, file: &Path, lenient: bool) -> Result<String> {
    if !input.is_repeatable() {
        let why = "the image has no configuration and is read twice, to find out what the \
                   domain needs: give it as a file, or a configuration with --config";
        return Err(Error::new(BadUsage(why.to_owned())));
    }
    let found = Survey::of(&input.again()?.unwrapped(lenient)?, lenient)?;
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    let kind = found.kind()?;
    let memory_kib = found.memory.populated() * 4;
    let uuid = config::uuid(&name, 0);
    Ok(config::make(
        &name,
        &uuid,
        kind,
        found.vcpus.max(1),
        memory_kib,
    ))
}

/// What an image shows of the domain that it needs.
#[derive(Debug, Default)]
pub(super) struct Survey {
    guest_type: Option<GuestType>,
    pub(super) vcpus: u32,
    pub(super) memory: PageMap,
    /// Whether an emulator has state in it, which PVH guests have not.
    emulated: bool,
}

impl Survey {
    pub(super) fn of(input: &Input, lenient: bool) -> Result<Self> {
        let mut survey = Self::default();
        Reading { lenient }.over(input, &mut |event| {
            survey.event(event);
            Ok(())
        })?;
        Ok(survey)
    }

    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Libxc(_, domain) => self.guest_type = Some(domain.guest_type),
            Event::LibxlRecord(_, LibxlRecord::EmulatorContext { .. }) => self.emulated = true,
            Event::Pages(at, entries) => {
                for run in runs_of(entries.iter(), at.page_data(entries)) {
                    self.memory.insert(run);
                }
            }
            Event::Record(_, record) => match record.body {
                Body::Vcpu(vcpu) if record.kind == RecordKind::X86_PV_VCPU_BASIC => {
                    self.vcpus = self.vcpus.max(vcpu.vcpu.saturating_add(1));
                }
                Body::HvmContext(context) => {
                    let cpus = HvmContext::new(context)
                        .filter_map(Result::ok)
                        .filter(|record| record.kind == HvmRecordKind::CPU);
                    self.vcpus = u32::try_from(cpus.count()).unwrap_or(u32::MAX);
                }
                _ => {}
            },
            _ => {}
        }
    }

    pub(super) fn kind(&self) -> Result<GuestKind> {
        match self.guest_type {
            Some(GuestType::X86_PV) => Ok(GuestKind::Pv),
            Some(GuestType::X86_HVM) if self.emulated => Ok(GuestKind::Hvm),
            Some(GuestType::X86_HVM) => Ok(GuestKind::Pvh),
            Some(other) => Err(bad(&format!(
                "{other}: this version restores x86 PV and HVM"
            ))),
            None => Err(bad("there is no libxc stream in it")),
        }
    }
}
