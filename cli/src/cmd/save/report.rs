//! What a save reports: for people and as JSON.

use std::fmt;

use serde::Serialize;
use xsr_format::frame::PAGE_SIZE;
use xsr_save_restore::save::mapped::MappedStats;
use xsr_xen_backend::DomId;

use super::Written;
use crate::text::{Count, size};

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
pub(super) struct SaveReport<'a> {
    pub(super) name: &'a str,
    pub(super) domid: DomId,
    /// `destroyed`, `running` or `paused`.
    pub(super) domain: &'static str,
    pub(super) file: String,
    #[serde(flatten)]
    pub(super) memory: MemoryReport,
    /// How long the domain was suspended, if it runs again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) downtime_seconds: Option<f64>,
    pub(super) seconds: f64,
}

/// The memory that was sent.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct MemoryReport {
    pub(super) iterations: u32,
    pub(super) pages: u64,
    pub(super) page_data_bytes: u64,
    pub(super) stream_bytes: u64,
    /// For a mapped image: its zero pages, which are holes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) zero_pages: Option<u64>,
    /// For a mapped image: the file's length, including index and digests. For a packed one: its
    /// length as written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) file_bytes: Option<u64>,
    /// With `--onto`: how many pages were shared, and how many written. A page that is sent several
    /// times counts each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) shared_pages: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) written_pages: Option<u64>,
    /// How long the program of `--at-freeze` ran while the domain was suspended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) at_freeze_seconds: Option<f64>,
}

impl MemoryReport {
    /// For a save that is complete.
    pub(crate) fn of(written: &Written<'_>) -> Self {
        let stats = written.saved.stats();
        Self {
            iterations: stats.iterations,
            pages: stats.pages,
            page_data_bytes: stats.pages * PAGE_SIZE as u64,
            stream_bytes: written.bytes,
            zero_pages: None,
            file_bytes: None,
            shared_pages: None,
            written_pages: None,
            at_freeze_seconds: None,
        }
    }

    /// Complete the report of a mapped image.
    pub(super) fn is_mapped(&mut self, stats: &MappedStats) {
        self.stream_bytes = stats.image_bytes;
        self.zero_pages = Some(stats.zero_pages);
        self.file_bytes = Some(stats.file_bytes);
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of memory", size(self.page_data_bytes))?;
        match self.iterations {
            0 => Ok(()),
            n => write!(f, " in {} and a stop", Count(n, "pass")),
        }
    }
}
