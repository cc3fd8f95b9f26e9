//! What `restore` will say of an image, as far as the image itself decides it: `verify` says the
//! same, before there is a host.

use std::fmt;
use std::os::unix::fs::FileExt as _;

use xsr_format::byte_order::ByteOrder;
use xsr_format::detect::{Detected, detect};
use xsr_format::guest_image::GuestImage;
use xsr_format::image::{DomainHeader, GuestType, ImageHeader, Version};
use xsr_format::record::RecordKind;
use xsr_format::wrapper::xl::XlHeader;
use xsr_xen_backend::GuestKind;

use crate::config::{self, Config};
use crate::exit::BadImage;
use crate::file::Input;
use crate::peel::TELLING;
use crate::text::Count;

/// libxl's configuration in an xl header; `None` where that has none, or one in xl's own format,
/// which says less: a restore finds out the rest.
///
/// # Errors
///
/// It is not JSON, does not say what a domain needs, or has a name that no domain can have.
pub(crate) fn config_of(header: &XlHeader) -> Result<Option<(&str, Config)>, BadImage> {
    let Some(json) = header.json().map_err(|e| BadImage(e.to_string()))? else {
        return Ok(None);
    };
    let config = Config::parse(json)?;
    check_name(&config.name)?;
    Ok(Some((json, config)))
}

/// Whether a domain can have a name.
///
/// # Errors
///
/// It cannot.
pub(crate) fn check_name(name: &str) -> Result<(), BadImage> {
    match config::wrong_with_name(name) {
        None => Ok(()),
        Some(why) => {
            let shown: String = name.chars().take(64).collect();
            Err(BadImage(format!(
                "no domain can have the name {shown:?}: {why}; give it another with --name, or \
                 with xsr edit --name"
            )))
        }
    }
}

/// Whether a restore takes a stream with these headers, into a domain of the configuration's
/// type. It needs no record for that.
///
/// # Errors
///
/// The rule that is broken.
pub(crate) fn check_headers(
    image: ImageHeader,
    domain: DomainHeader,
    kind: Option<GuestKind>,
) -> Result<(), BadImage> {
    let guest_type = domain.guest_type;
    let is_pv = match guest_type {
        GuestType::X86_PV => true,
        GuestType::X86_HVM => false,
        other => {
            return Err(BadImage(format!(
                "the guest is of type {:#x}, which is unknown: only x86 PV and x86 HVM guests can \
                 be restored",
                other.0
            )));
        }
    };
    if image.order != ByteOrder::Little {
        return Err(BadImage(format!(
            "the stream is {}; an x86 guest can be restored from a little-endian stream only: \
             xsr convert makes one of it",
            image.order
        )));
    }
    match kind {
        Some(kind) if is_pv != (kind == GuestKind::Pv) => Err(BadImage(format!(
            "the configuration says that the domain is {}, but the stream is that of an \
             {guest_type} guest",
            config::kind_name(kind)
        ))),
        _ => Ok(()),
    }
}

/// Whether the domain of the configuration can hold what the stream has: `pages` pages with
/// memory, and its vcpus.
///
/// # Errors
///
/// The rule that is broken.
pub(crate) fn check_guest(
    guest: &GuestImage,
    pages: u64,
    config: Option<&Config>,
) -> Result<(), BadImage> {
    if guest.checkpoints() > 0 {
        return Err(BadImage(format!(
            "the stream has {} (Remus or COLO): restore takes plain streams, migrate-receive -r \
             takes this one",
            Count(guest.checkpoints(), "checkpoint")
        )));
    }
    let Some(config) = config else {
        return Ok(());
    };
    let needed = guest.vcpus_needed();
    if needed > config.vcpus {
        return Err(BadImage(format!(
            "the stream has the state of vcpu {}, but the configuration has only {}",
            needed.saturating_sub(1),
            Count(config.vcpus, "vcpu")
        )));
    }
    let most = config.max_pages();
    if pages > most {
        return Err(BadImage(format!(
            "the guest has {}, but its configuration allows {most}",
            Count(pages, "page")
        )));
    }
    Ok(())
}

/// Something odd about an image that a restore takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Warning(pub(crate) String);

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is odd about the records of an image that a restore takes.
pub(crate) fn warnings(image: ImageHeader, guest: &GuestImage) -> Vec<Warning> {
    let mut out = Vec::new();
    let mut warn = |text: String| out.push(Warning(text));
    if image.version == Version::V3 && guest.cpuid().is_empty() {
        warn(format!(
            "there is no {}: the guest gets the CPU policy of the host that restores it",
            RecordKind::X86_CPUID_POLICY
        ));
    }
    if guest.guest_type() == GuestType::X86_HVM {
        if guest.hvm_params().is_empty() {
            warn(format!(
                "there is no {}: the guest gets no xenstore and no console",
                RecordKind::HVM_PARAMS
            ));
        }
        let facts = guest.context_facts();
        for kind in &facts.unknown {
            warn(format!(
                "HVM context: an entry of {kind}, which a Xen that does not know it refuses"
            ));
        }
        if let Some(odd) = &facts.odd_end {
            warn(format!("{odd}; Xen does not look at that"));
        }
    }
    if guest.optional_records() > 0 {
        warn(format!(
            "{} of kinds that the format does not define, which a restore skips",
            Count(guest.optional_records(), "optional record")
        ));
    }
    out
}

/// What is behind the end of an image of `bytes` bytes: nothing reads it.
pub(crate) fn trailing(input: &Input, bytes: u64, trailing: u64) -> Option<Warning> {
    if trailing == 0 {
        return None;
    }
    let count = Count(trailing, "byte");
    let mut start = [0; TELLING];
    let read = match input.length {
        Some(_) => input.file.read_at(&mut start, bytes).unwrap_or(0),
        None => 0,
    };
    let what = match detect(start.get(..read).unwrap_or_default()) {
        Detected::Xl | Detected::Libxl | Detected::Libxc => ", and begin like another image",
        _ => "",
    };
    Some(Warning(format!(
        "{count} behind the end of the image (at byte {bytes:#x}) are not part of it{what}"
    )))
}
