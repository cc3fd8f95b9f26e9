//! A survey of an image without configuration, in the kinds of domain that a host has.

use anyhow::{Context as _, Error, Result};
use xsr_format::read::ReadOptions;
use xsr_format::survey::{DomainKind, Survey, SurveyError};
use xsr_format::walk::Walk;
use xsr_save_restore::storage::StorageCursor;
use xsr_xen_backend::GuestKind;

use super::bad;
use crate::exit::BadImage;
use crate::file::Input;

/// Surveys an image.
pub(crate) fn of(input: &Input, lenient: bool) -> Result<Survey> {
    let options = ReadOptions { lenient, offset: 0 };
    survey(&input.image, options)
        .map_err(|error| match error {
            SurveyError::Read(error) => input.blame(error.into()),
            other => Error::new(BadImage(other.to_string())),
        })
        .with_context(|| input.name.clone())
}

fn survey(image: &StorageCursor, options: ReadOptions) -> Result<Survey, SurveyError> {
    match image.length() {
        Some(_) => Survey::of_walk(Walk::open_seeking(image, options)?),
        None => Survey::of(image, options),
    }
}

/// The kind of domain that a surveyed image needs. PVH guests have no emulator.
pub(crate) fn kind(survey: &Survey) -> Result<GuestKind> {
    match survey.kind() {
        Some(DomainKind::Pv(_)) => Ok(GuestKind::Pv),
        Some(DomainKind::Hvm {
            emulated: Some(true),
        }) => Ok(GuestKind::Hvm),
        Some(DomainKind::Hvm { .. }) => Ok(GuestKind::Pvh),
        _ => Err(bad(&format!(
            "{}: this version restores x86 PV and HVM",
            survey.domain.guest_type
        ))),
    }
}
