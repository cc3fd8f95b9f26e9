//! Checks of an image that need no host: `restore` and `verify` reject the same images.

use std::fmt;

use xsr_format::byte_order::ByteOrder;
use xsr_format::detect::{Detected, detect};
use xsr_format::fields::hvm::param_name;
use xsr_format::frame::{PageType, Pfn};
use xsr_format::guest_image::GuestImage;
use xsr_format::image::{DomainHeader, GuestType, ImageHeader, Version};
use xsr_format::record::RecordKind;
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::RestoreError;
use xsr_xen_backend::GuestKind;

use crate::config::{self, Config};
use crate::exit::BadImage;
use crate::feed::Behind;
use crate::origin::Origin;
use crate::text::Count;

/// libxl's configuration in an xl header; `None` if the header has none, or one in xl's own format,
/// which says less and is checked by the restore.
///
/// # Errors
///
/// It is not JSON, lacks what a domain needs, or has a name that no domain can have.
pub(crate) fn config_of(header: &XlHeader) -> Result<Option<(&str, Config)>, BadImage> {
    let Some(json) = header.json().map_err(|e| BadImage(e.to_string()))? else {
        return Ok(None);
    };
    let config = Config::parse(json)?;
    check_name(&config.name)?;
    check_uuid(config.uuid.as_deref(), UUID_OF_IMAGE)?;
    Ok(Some((json, config)))
}

/// What to do about the UUID in an image's configuration.
pub(crate) const UUID_OF_IMAGE: &str = "give it another with xsr edit --uuid";

/// Checks that a domain can have the UUID of a configuration, if it has one. The error ends with
/// the advice.
///
/// # Errors
///
/// It cannot.
pub(crate) fn check_uuid(uuid: Option<&str>, advice: &str) -> Result<(), BadImage> {
    let Some((uuid, why)) = uuid.and_then(|uuid| Some((uuid, config::wrong_with_uuid(uuid)?)))
    else {
        return Ok(());
    };
    let shown: String = uuid.chars().take(64).collect();
    Err(BadImage(format!(
        "no domain can have the UUID {shown:?}: {why}; {advice}"
    )))
}

/// Checks that a restore accepts what another toolstack says about the domain, for an image of a
/// guest of `guest_type`, if the command line does not say otherwise.
///
/// # Errors
///
/// The broken rule.
pub(crate) fn check_origin(origin: &Origin, guest_type: GuestType) -> Result<(), BadImage> {
    if origin.error.is_some() {
        let advice = "give a name with --name (the domain gets a new UUID), or a configuration";
        return Err(not_understood(origin, advice));
    }
    if let Some(name) = &origin.name {
        check_name(name)?;
    }
    let is_pv = guest_type == GuestType::X86_PV;
    let kind = origin.kind.unwrap_or(match is_pv {
        true => GuestKind::Pv,
        false => GuestKind::Hvm,
    });
    check_vcpus(origin.vcpus.unwrap_or(0), kind)?;
    match is_pv == (kind == GuestKind::Pv) {
        true => Ok(()),
        false => Err(other_kind(origin, kind, guest_type)),
    }
}

/// The error for what another toolstack says if it could not be understood.
pub(crate) fn not_understood(origin: &Origin, advice: &str) -> BadImage {
    BadImage(format!(
        "{} could not be understood: it {}; so the domain's name and UUID are unknown: {advice}",
        origin.words(),
        origin.error.as_deref().unwrap_or("is unknown")
    ))
}

/// The error for another toolstack's domain whose kind is not that of the stream.
pub(crate) fn other_kind(origin: &Origin, kind: GuestKind, guest_type: GuestType) -> BadImage {
    BadImage(format!(
        "{} says that the guest is {}, but the image is of an {guest_type} guest; --type overrides \
         it",
        origin.words(),
        config::kind_name(kind)
    ))
}

/// Checks that Xen lets a domain of this kind have so many vcpus.
///
/// # Errors
///
/// It does not.
pub(crate) fn check_vcpus(vcpus: u32, kind: GuestKind) -> Result<(), BadImage> {
    let most = config::most_vcpus(kind);
    match vcpus > most {
        true => Err(BadImage(format!(
            "the guest has {vcpus} vcpus, but a {} guest has at most {most}",
            config::kind_name(kind)
        ))),
        false => Ok(()),
    }
}

/// Checks that the image of a PV guest holds each frame of its p2m, as an ordinary page: the restore
/// writes them. `page` finds a page that has memory.
///
/// # Errors
///
/// It lacks one.
pub(crate) fn check_p2m(
    guest: &GuestImage,
    page: impl Fn(Pfn) -> Option<PageType>,
) -> Result<(), BadImage> {
    let frames = guest.p2m().map_or(&[][..], |p2m| &p2m.frames);
    for (entry, pfn) in frames.iter().enumerate() {
        let why = match page(*pfn) {
            Some(PageType::NOTAB) => continue,
            None => "the image holds no such page",
            Some(page_type) if page_type.table_level().is_some() => "that page is a page table",
            Some(_) => "that page has no contents",
        };
        return Err(BadImage(format!(
            "{} entry {entry} names frame {pfn}: {why}",
            RecordKind::X86_PV_P2M_FRAMES
        )));
    }
    Ok(())
}

/// Checks that a domain can have a name.
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

/// Checks that a restore accepts a stream with these headers, into a domain of the configuration's
/// type. No record is needed for that.
///
/// # Errors
///
/// The broken rule.
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

/// Checks that the configured domain can hold what the stream has: `pages` pages with memory, and
/// its vcpus.
///
/// # Errors
///
/// The broken rule.
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
    if let Some(last) = guest.vcpus_needed().checked_sub(1) {
        let wrong = check_vcpu(RecordKind::HVM_CONTEXT, last, config);
        wrong.map_err(|e| BadImage(e.to_string()))?;
    }
    match config.max_pages() {
        most if pages > most => Err(too_many_pages(pages, most)),
        _ => Ok(()),
    }
}

/// Checks that the configured domain has the vcpu of a record, as a restore does when the record
/// comes.
///
/// # Errors
///
/// The domain lacks that vcpu.
pub(crate) fn check_vcpu(kind: RecordKind, vcpu: u32, config: &Config) -> Result<(), RestoreError> {
    let max = config.vcpus.saturating_sub(1);
    match vcpu > max {
        true => Err(RestoreError::Vcpu { kind, vcpu, max }),
        false => Ok(()),
    }
}

/// The error for a guest of `pages` pages whose configuration allows `most`.
pub(crate) fn too_many_pages(pages: u64, most: u64) -> BadImage {
    let pages = Count(pages, "page");
    BadImage(format!(
        "the guest has {pages}, but its configuration allows {most}"
    ))
}

/// An anomaly of an image that a restore accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Warning(pub(crate) String);

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Anomalies in the records of an image that a restore accepts.
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
        let params = guest.hvm_params().iter();
        for param in params.filter(|param| param_name(param.index).is_none()) {
            warn(format!(
                "{}: parameter {:#x} is unknown to this version of xsr; a Xen that does not know it refuses the image",
                RecordKind::HVM_PARAMS,
                param.index
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

/// A warning about bytes after the end of an image of `bytes` bytes, which are never read.
pub(crate) fn trailing(bytes: u64, behind: &Behind) -> Option<Warning> {
    if behind.bytes == 0 {
        return None;
    }
    let count = Count(behind.bytes, "byte");
    let what = match detect(&behind.start) {
        Detected::Xl | Detected::Libxl | Detected::Libxc => ", and begin like another image",
        _ => "",
    };
    Some(Warning(format!(
        "{count} after the end of the image (at byte {bytes:#x}) are not part of it{what}"
    )))
}
