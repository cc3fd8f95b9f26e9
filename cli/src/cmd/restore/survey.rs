//! A survey of an image without configuration: what its domain needs.
//!
//! C implementation: none; xl restores nothing without a configuration.

use anyhow::Result;
use xsr_format::image::GuestType;
use xsr_format::walk::Content;
use xsr_format::wrapper::libxl::LibxlRecord;
use xsr_xen_backend::GuestKind;

use super::bad;
use crate::exit::BadImage;
use crate::file::Input;
use crate::image::{FileStep, Reading};
use crate::page_map::{PageMap, runs_of};

/// What an image shows about the domain that it needs.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub(super) guest_type: Option<GuestType>,
    pub(super) vcpus: u32,
    pub(super) memory: PageMap,
    /// Whether it has an emulator's state, which PVH guests lack.
    emulated: bool,
}

impl Survey {
    pub(super) fn of(input: &Input, lenient: bool) -> Result<Self> {
        let mut survey = Self::default();
        let walked = Reading { lenient }.over(input, &mut |step| {
            survey.step(&step)?;
            Ok(())
        })?;
        if let Some(guest) = walked.guest {
            survey.guest_type = Some(guest.guest_type());
            survey.vcpus = guest.vcpus_needed();
        }
        Ok(survey)
    }

    fn step(&mut self, step: &FileStep<'_, '_>) -> Result<(), BadImage> {
        match &step.content {
            Content::LibxlRecord(LibxlRecord::EmulatorContext { .. }) => self.emulated = true,
            Content::PageData(body) => {
                for run in runs_of(body.entries().iter(), body.pages_offset()) {
                    self.memory.insert_populated(run)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn kind(&self) -> Result<GuestKind> {
        match self.guest_type {
            Some(GuestType::X86_PV) => Ok(GuestKind::Pv),
            Some(GuestType::X86_HVM) if self.emulated => Ok(GuestKind::Hvm),
            Some(GuestType::X86_HVM) => Ok(GuestKind::Pvh),
            Some(other) => Err(bad(&format!(
                "{other}: this version restores x86 PV and HVM"
            ))),
            None => Err(bad("it contains no libxc stream")),
        }
    }
}
