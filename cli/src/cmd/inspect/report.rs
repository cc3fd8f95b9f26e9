//! The result of `xsr inspect` as one document: `--json` prints it (docs/json.md), and the text
//! output is made from it.

use serde::Serialize;

use super::facts::{RecordFacts, TypeFact};
use super::host::HostUse;
use super::named::Named;
use crate::config;
use crate::mapped;
use crate::origin::Origin;
use crate::peel::LeftOut;

/// An image.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct InspectReport {
    /// The path as given, or `stdin`.
    pub(crate) file: String,
    /// Bytes of the image; of the file, if the image is bad; 0 if unknown.
    pub(crate) bytes: u64,
    /// The wrappers that were removed, outermost first. Offsets are those of the image inside.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) layers: Vec<String>,
    /// The XML that libvirt keeps with the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) libvirt_xml: Option<String>,
    /// What a toolstack other than today's xl says about the domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) origin: Option<Origin>,
    /// State beside the image that xl's images have no place for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) left_out: Vec<LeftOut>,
    /// Anomalies in the wrappers of the image.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) notes: Vec<String>,
    /// Bytes of the file after the image, which are never read.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) trailing_bytes: u64,
    /// The index of a mapped image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mapped: Option<mapped::MappedFacts>,
    /// The same in words.
    #[serde(skip)]
    pub(crate) layout: Option<String>,
    /// The xl header, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) xl: Option<XlReport>,
    /// The libxl stream's header, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) libxl: Option<LibxlReport>,
    /// The libxc stream's headers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) libxc: Option<LibxcReport>,
    /// What is known of the guest.
    pub(crate) guest: Guest,
    /// The records of all streams, in the order of the file.
    pub(crate) records: Vec<Row>,
    /// How many records follow the last of those.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) records_left_out: u64,
    /// The pages, by their last version in the stream.
    pub(crate) pages: PagesReport,
    /// Entries of HVM_CONTEXT.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) hvm_context: Vec<ContextEntry>,
    /// HVM_PARAMS.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) hvm_params: Vec<Param>,
    /// The fields of the blobs, if requested.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) fields: Vec<Named>,
    /// Anomalies of the image, as in `verify`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) warnings: Vec<String>,
    /// Why the image is bad. If reading ended early, this document is incomplete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl InspectReport {
    /// Take over what another toolstack says about the domain. (The stream's kind takes precedence,
    /// but it does not distinguish PVH from HVM.)
    pub(crate) fn said_by(&mut self, origin: &Origin) {
        let guest = &mut self.guest;
        guest.name = guest.name.take().or_else(|| origin.name.clone());
        guest.uuid = guest.uuid.take().or_else(|| origin.uuid.clone());
        guest.max_memory_kib = guest.max_memory_kib.or(origin.max_memory_kib);
        guest.max_vcpus = guest.max_vcpus.or(origin.vcpus);
        let said = origin.kind.map(config::kind_name);
        guest.kind = match (guest.kind, said) {
            (None, said) | (Some("hvm"), said @ Some("pvh")) => said,
            (kind, _) => kind,
        };
        if origin.toolstack == "libvirt" {
            self.libvirt_xml = Some(origin.text.clone());
        }
        self.origin = Some(origin.clone());
    }
}

/// The xl header.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct XlReport {
    pub(crate) byte_order: &'static str,
    pub(crate) mandatory_flags: u32,
    pub(crate) optional_flags: u32,
    pub(crate) config_bytes: usize,
    /// The configuration; null if it is not JSON.
    pub(crate) config: Option<serde_json::Value>,
    /// What the configuration has the host run or open.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) host_uses: Vec<HostUse>,
    /// How many more of these there are.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) host_uses_left_out: u64,
}

/// The libxl stream's header.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LibxlReport {
    pub(crate) version: u32,
    pub(crate) byte_order: &'static str,
    pub(crate) legacy_converted: bool,
}

/// The libxc stream's headers.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LibxcReport {
    pub(crate) version: u32,
    pub(crate) byte_order: &'static str,
    pub(crate) guest_type: String,
    pub(crate) xen_major: u32,
    pub(crate) xen_minor: u32,
}

/// What an image says about its guest.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Guest {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) uuid: Option<String>,
    /// `pv`, `hvm` or `pvh`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    /// 32 or 64, of a PV guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bits: Option<u8>,
    /// Vcpus with state in the image.
    pub(crate) vcpus: u32,
    /// The number of vcpus in another toolstack's configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_vcpus: Option<u32>,
    /// The most memory that the configuration allows, in KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_memory_kib: Option<u64>,
    /// Pages that have contents or are allocated, in KiB.
    pub(crate) populated_kib: u64,
    /// The Xen version that saved it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) xen: Option<String>,
}

/// A record, or several consecutive PAGE_DATA records.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// `libxl` or `libxc`.
    pub(crate) stream: &'static str,
    /// Number in its stream, from 0; of the first of several records.
    pub(crate) index: u64,
    /// Its offset in the file.
    pub(crate) offset: u64,
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// Bytes in the body, or bodies.
    pub(crate) bytes: u64,
    pub(crate) facts: RecordFacts,
}

/// The pages of a guest.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct PagesReport {
    /// The number of pfns that the stream mentions.
    pub(crate) pfns: u64,
    /// The number of those that a restore allocates.
    pub(crate) populated: u64,
    /// The highest pfn mentioned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_pfn: Option<u64>,
    pub(crate) types: Vec<TypeFact>,
}

/// An entry of HVM_CONTEXT.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ContextEntry {
    /// Its type's number.
    pub(crate) code: u16,
    /// Its type's name in Xen's headers; null if unknown.
    pub(crate) name: Option<&'static str>,
    pub(crate) instance: u16,
    pub(crate) bytes: usize,
}

/// An HVM parameter.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Param {
    pub(crate) index: u64,
    /// Its name in Xen's headers; null if unknown.
    pub(crate) name: Option<&'static str>,
    pub(crate) value: u64,
}
