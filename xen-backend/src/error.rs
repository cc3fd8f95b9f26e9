//! The error of a failed backend call: the operation, the domain, the errno from Xen (or from the
//! mock machine), and further details.

use std::fmt;

use crate::Errno;
use thiserror::Error;
use xsr_format::frame::Gfn;

use crate::DomId;

/// A hypercall that failed as a whole.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{op} failed for {}: {errno}{}",
    domid.map_or_else(|| "the host".to_owned(), |d| d.to_string()),
    detail.as_ref().map_or_else(String::new, |detail| format!(" ({detail})"))
)]
pub struct BackendError {
    /// The operation, by Xen's name for it (`populate_physmap`, `getdomaininfo`, …).
    pub op: &'static str,
    /// The domain that the call was about; `None` for a call about the host.
    pub domid: Option<DomId>,
    /// Xen's errno.
    pub errno: Errno,
    /// Further details of the reason.
    pub detail: Option<Box<Detail>>,
}

/// The reason for a failure beyond its errno.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Detail {
    /// The CPU policy entry that the hypervisor does not accept.
    PolicyEntry(PolicyEntry),
    /// A description.
    Text(String),
}

/// An entry of a CPU policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyEntry {
    /// A leaf of CPUID.
    Leaf {
        /// Its number.
        leaf: u32,
        /// Its subleaf; `None` for a leaf that has none.
        subleaf: Option<u32>,
    },
    /// A model-specific register.
    Msr(u32),
}

impl fmt::Display for PolicyEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaf {
                leaf,
                subleaf: Some(subleaf),
            } => write!(f, "CPUID leaf {leaf:#x}, subleaf {subleaf:#x}"),
            Self::Leaf {
                leaf,
                subleaf: None,
            } => write!(f, "CPUID leaf {leaf:#x}"),
            Self::Msr(index) => write!(f, "MSR {index:#x}"),
        }
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PolicyEntry(entry) => write!(f, "because of {entry}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl BackendError {
    /// A failure of `op` on domain `domid`.
    pub const fn domain(op: &'static str, domid: DomId, errno: Errno) -> Self {
        Self {
            op,
            domid: Some(domid),
            errno,
            detail: None,
        }
    }

    /// A failure of `op` that does not concern a single domain.
    pub const fn host(op: &'static str, errno: Errno) -> Self {
        Self {
            op,
            domid: None,
            errno,
            detail: None,
        }
    }

    /// The same, with a known reason.
    #[must_use]
    pub fn because(mut self, detail: Detail) -> Self {
        self.detail = Some(Box::new(detail));
        self
    }

    /// The same, with the reason in words.
    #[must_use]
    pub fn explained(self, text: impl Into<String>) -> Self {
        self.because(Detail::Text(text.into()))
    }
}

/// One frame that could not be mapped, in a mapping call that otherwise succeeded.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("frame {gfn} (number {index} of the request) could not be mapped: {errno}")]
pub struct MapError {
    /// Position in the request, from 0.
    pub index: usize,
    /// The requested frame.
    pub gfn: Gfn,
    /// EINVAL: no such frame, or it may not be mapped this way. ENOENT: paged out.
    pub errno: Errno,
}
