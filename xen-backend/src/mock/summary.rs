//! Summaries of a mock host's domains, for users and for `--json`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::Errno;
use serde::Serialize;
use xsr_format::frame::{Gfn, PageType};

use super::MockHost;
use super::domain::{MockDomain, storage_errno};
use super::error::MockError;
use super::grants::GrantEntry;
use super::state::Record;
use crate::error::BackendError;
use crate::{DomId, GuestKind, GuestMemory, ShutdownReason, TscInfo};

/// The running state of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DomainState {
    /// It would execute, if the mock executed anything.
    Running,
    /// Paused by the toolstack.
    Paused,
    /// The guest has suspended.
    Suspended,
    /// Shut down for another reason.
    Shutdown,
}

impl DomainState {
    fn of(record: &Record) -> Self {
        match record.shutdown {
            Some(ShutdownReason::Suspend) => Self::Suspended,
            Some(_) => Self::Shutdown,
            None if record.pauses > 0 => Self::Paused,
            None => Self::Running,
        }
    }
}

/// A line of a list of domains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DomainSummary {
    /// Its number.
    pub domid: DomId,
    /// Its name.
    pub name: String,
    /// PV, HVM or PVH.
    pub kind: GuestKind,
    /// Pages that it has.
    pub tot_pages: u64,
    /// Vcpus that it has.
    pub vcpus: u32,
    /// Its running state.
    pub state: DomainState,
}

/// A full report on a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DomainReport {
    /// Its entry in a list.
    #[serde(flatten)]
    pub summary: DomainSummary,
    /// Bytes in the guest's word.
    pub width: u8,
    /// Pages that it may have.
    pub max_pages: u64,
    /// The largest gfn that it has ever had.
    pub maximum_gfn: Option<u64>,
    /// Whether each vcpu is online.
    pub vcpus_online: Vec<bool>,
    /// The number of pauses in effect.
    pub pauses: u32,
    /// The reason why it shut down.
    pub shutdown: Option<ShutdownReason>,
    /// PV: the frame of shared_info.
    pub shared_info_frame: Option<u64>,
    /// Its TSC.
    pub tsc: TscInfo,
    /// The number of its pages of each type.
    pub page_types: BTreeMap<String, u64>,
    /// HVM parameters that were set, by number.
    pub hvm_params: BTreeMap<u32, u64>,
    /// Reserved grant entries: console and xenstore.
    pub grants: [Option<GrantEntry>; 2],
    /// Bytes of each blob: contexts and policy.
    pub blobs: BTreeMap<String, u64>,
    /// Bytes of user data by key.
    pub userdata: BTreeMap<String, u64>,
}

impl MockDomain {
    fn summary_of(&self, record: &Record) -> DomainSummary {
        DomainSummary {
            domid: record.domid,
            name: record.shown_name(),
            kind: record.kind,
            tot_pages: self.machine.tot_pages(record.domid),
            vcpus: u32::try_from(record.vcpus.len()).unwrap_or(u32::MAX),
            state: DomainState::of(record),
        }
    }

    /// Count pages by type.
    fn count_types(&self, maximum: Option<Gfn>) -> Result<BTreeMap<String, u64>, BackendError> {
        const BATCH: u64 = 1024;
        let mut counts = BTreeMap::new();
        let end = maximum.map_or(0, |gfn| gfn.0 + 1);
        let mut types = [PageType::XTAB; 1024];
        for start in (0..end).step_by(1024) {
            let gfns: Vec<Gfn> = (start..end.min(start + BATCH)).map(Gfn).collect();
            let types = &mut types[..gfns.len()];
            self.page_types(&gfns, types)?;
            for page_type in types.iter().filter(|t| **t != PageType::XTAB) {
                *counts.entry(page_type.name().to_owned()).or_default() += 1;
            }
        }
        Ok(counts)
    }
}

impl MockHost {
    /// Every domain, in ascending order.
    ///
    /// # Errors
    ///
    /// [`MockError::Busy`]; I/O errors.
    pub fn list(&self) -> Result<Vec<DomainSummary>, MockError> {
        let mut summaries = Vec::new();
        for dom in self.machine.all_domains()? {
            let machine = Arc::clone(&self.machine);
            let domain = MockDomain { machine, dom };
            match domain.look("list", |state| Ok(domain.summary_of(&state.record))) {
                Ok(summary) => summaries.push(summary),
                // It has been destroyed in the meantime.
                Err(error) if error.errno == Errno::ESRCH => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(summaries)
    }

    /// A full report on one domain.
    ///
    /// # Errors
    ///
    /// ESRCH.
    pub fn show(&self, domid: DomId) -> Result<DomainReport, MockError> {
        let domain = self.mock_domain(domid)?;
        let maximum = domain.maximum_gfn()?;
        let page_types = domain.count_types(maximum)?;
        let report = domain.look("show", |state| {
            let record = &state.record;
            let blobs = state.blobs.iter();
            let userdata = self.machine.store.userdata_sizes(domid);
            Ok(DomainReport {
                summary: domain.summary_of(record),
                width: record.width,
                max_pages: record.max_pages,
                maximum_gfn: maximum.map(|gfn| gfn.0),
                vcpus_online: record.vcpus.iter().map(|vcpu| vcpu.online).collect(),
                pauses: record.pauses,
                shutdown: record.shutdown,
                shared_info_frame: (record.kind == GuestKind::Pv).then_some(record.shared_info),
                tsc: record.tsc,
                page_types,
                hvm_params: (0..)
                    .zip(&record.hvm_params)
                    .filter(|(_, value)| **value != 0)
                    .map(|(index, value)| (index, *value))
                    .collect(),
                grants: domain.reserved_grants(state)?,
                blobs: blobs
                    .map(|(name, blob)| (name.clone(), blob.len() as u64))
                    .collect(),
                userdata: userdata.map_err(|error| storage_errno(&error))?,
            })
        })?;
        Ok(report)
    }
}
