//! One difference between two images.

use serde::Serialize;
use xsr_format::frame::PageType;

/// The part of the images that a difference is in, in the order of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Section {
    /// The layers, and the fields of their headers.
    Headers,
    /// xl's configuration.
    Config,
    /// The records and their order.
    Records,
    /// The emulator records.
    Emulators,
    /// X86_CPUID_POLICY and X86_MSR_POLICY.
    CpuPolicy,
    /// X86_TSC_INFO.
    Tsc,
    /// X86_PV_P2M_FRAMES.
    P2m,
    /// The page of a PV guest that vcpu 0 names.
    StartInfo,
    /// SHARED_INFO.
    SharedInfo,
    /// X86_PV_VCPU_*.
    Vcpus,
    /// HVM_CONTEXT.
    HvmContext,
    /// HVM_PARAMS.
    HvmParams,
    /// The pfns that are mentioned.
    Pfns,
    /// The types of pages.
    PageTypes,
    /// The contents of pages.
    PageContents,
}

impl Section {
    /// The title in the text output.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Headers => "headers",
            Self::Config => "configuration",
            Self::Records => "records",
            Self::Emulators => "emulators",
            Self::CpuPolicy => "CPU policy",
            Self::Tsc => "TSC",
            Self::P2m => "p2m",
            Self::StartInfo => "start_info",
            Self::SharedInfo => "shared_info",
            Self::Vcpus => "vcpus",
            Self::HvmContext => "HVM context",
            Self::HvmParams => "HVM parameters",
            Self::Pfns => "pfns",
            Self::PageTypes => "page types",
            Self::PageContents => "page contents",
        }
    }
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Difference {
    pub(crate) section: Section,
    #[serde(flatten)]
    pub(crate) what: What,
    /// Why a restore makes this difference, if it does and `--after-restore` was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) expected: Option<&'static str>,
}

/// Differences of one part that are not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LeftOut {
    pub(crate) section: Section,
    pub(crate) differences: u64,
    /// The pages that they affect.
    pub(crate) pages: u64,
    /// As for a [`Difference`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) expected: Option<&'static str>,
}

/// The difference itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum What {
    /// A named value; null if one image does not have it.
    Field {
        field: String,
        a: Option<String>,
        b: Option<String>,
    },
    /// Pfns with different types; null if one image does not mention them.
    Types {
        first_pfn: u64,
        last_pfn: u64,
        #[serde(serialize_with = "type_name")]
        a: Option<PageType>,
        #[serde(serialize_with = "type_name")]
        b: Option<PageType>,
    },
    /// Pfns with different contents.
    Contents { first_pfn: u64, last_pfn: u64 },
}

#[expect(clippy::ref_option, reason = "serde asks for a reference to the field")]
fn type_name<S: serde::Serializer>(page_type: &Option<PageType>, to: S) -> Result<S::Ok, S::Error> {
    page_type.map(PageType::name).serialize(to)
}

impl What {
    /// The number of pages that a difference affects; `None` if it is not about pages.
    pub(crate) fn pages(&self) -> Option<u64> {
        match *self {
            Self::Field { .. } => None,
            Self::Types {
                first_pfn,
                last_pfn,
                ..
            }
            | Self::Contents {
                first_pfn,
                last_pfn,
            } => Some(last_pfn - first_pfn + 1),
        }
    }
}
