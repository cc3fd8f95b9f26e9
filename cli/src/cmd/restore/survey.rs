//! What an image shows of the domain that it needs, where no configuration says it.
//!
//! C implementation: none; xl restores nothing without a configuration.

use anyhow::Result;
use xsr_format::fields::hvm::{HvmContext, HvmRecordKind};
use xsr_format::image::GuestType;
use xsr_format::record::{Body, RecordKind};
use xsr_format::wrapper::libxl::LibxlRecord;
use xsr_xen_backend::GuestKind;

use super::bad;
use crate::file::Input;
use crate::image::{Event, Reading};
use crate::page_map::{PageMap, runs_of};

/// What an image shows of the domain that it needs.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub(super) guest_type: Option<GuestType>,
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
