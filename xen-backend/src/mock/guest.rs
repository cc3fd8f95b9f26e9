//! Guests created by the mock: memory filled with a seeded pattern, and the structures that a real
//! guest of the kind has.

mod hvm;
mod pv;
mod tables;

use std::sync::OnceLock;
use std::{fmt, thread};

use crate::Errno;
use serde::{Deserialize, Serialize};
use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE};

use super::MockHost;
use super::domain::MockDomain;
use super::error::MockError;
use super::random::{SplitMix64, mix};
use crate::error::BackendError;
use crate::{DomId, GuestKind, GuestMemory, Host, NewDomain, Uuid};

pub(super) use hvm::SPECIAL_PAGES;

/// Pages in each batch of a populate, as in Xen's tools.
const POPULATE_BATCH: usize = 1024;

/// Pages that a domain may have beyond its memory (1 MiB, as libxl allows).
const SLACK_PAGES: u64 = 256;

/// The form in which a PV guest publishes its p2m.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum P2mStyle {
    /// Linear in the guest's virtual memory: p2m_cr3, p2m_vaddr.
    Linear,
    /// A tree of frame lists three levels deep.
    Tree,
}

/// Specification of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// Its name.
    pub name: String,
    /// Its UUID; nil for none.
    #[serde(default)]
    pub uuid: Uuid,
    /// PV, HVM or PVH.
    pub kind: GuestKind,
    /// PV: bytes in its word, 8 or 4.
    pub width: u8,
    /// Memory in MiB, at least 4.
    pub memory_mib: u64,
    /// Vcpus, 1–128 (PV: 1–32).
    pub vcpus: u32,
    /// The number of vcpus, counted from the last, that are offline.
    pub offline_vcpus: u32,
    /// PV: pages that the guest has ballooned out; holes in its p2m. At most an eighth of its
    /// memory.
    pub ballooned_pages: u64,
    /// PV: the form of its p2m. `None`: linear for 64-bit, tree for 32-bit.
    pub p2m: Option<P2mStyle>,
    /// PV: processes, each with its own page tables; at most one for each 256 pages.
    pub processes: u64,
    /// The seed of its contents.
    pub seed: u64,
    /// It does not answer requests to suspend.
    #[serde(default)]
    pub ignores_suspend: bool,
}

impl GuestSpec {
    /// A guest with one vcpu and default settings.
    pub fn new(name: impl Into<String>, kind: GuestKind, memory_mib: u64) -> Self {
        Self {
            name: name.into(),
            uuid: Uuid::NIL,
            kind,
            width: 8,
            memory_mib,
            vcpus: 1,
            offline_vcpus: 0,
            ballooned_pages: 0,
            p2m: None,
            processes: 3,
            seed: 1,
            ignores_suspend: false,
        }
    }

    /// Pages of its memory.
    fn pages(&self) -> u64 {
        self.memory_mib << 20 >> 12
    }

    fn check(&self) -> Result<(), MockError> {
        let pv = self.kind == GuestKind::Pv;
        let most_vcpus = self.kind.max_vcpus();
        let problem = if !(4..=512 << 10).contains(&self.memory_mib) {
            "memory is between 4 MiB and 512 GiB".to_owned()
        } else if !(1..=most_vcpus).contains(&self.vcpus) {
            let (vcpus, kind) = (self.vcpus, self.kind.name());
            format!("{vcpus} vcpus: a {kind} guest has between 1 and {most_vcpus}")
        } else if self.offline_vcpus >= self.vcpus {
            "one vcpu at least must be online".to_owned()
        } else if !(self.width == 8 || pv && self.width == 4) {
            "the width is 8, or 4 for a PV guest".to_owned()
        } else if !pv && (self.p2m.is_some() || self.ballooned_pages > 0) {
            "p2m style and ballooned pages are for PV guests".to_owned()
        } else if self.processes > self.pages() / 256 {
            "at most one process for each 256 pages".to_owned()
        } else if self.ballooned_pages > self.pages() / 8 {
            "at most an eighth of the memory can be ballooned out".to_owned()
        } else {
            return Ok(());
        };
        Err(MockError::BadSpec(problem))
    }
}

/// Whether the guest that is being created is no longer wanted.
#[derive(Default)]
pub(super) struct Stop(OnceLock<Box<dyn Fn() -> bool + Send + Sync>>);

impl Stop {
    pub(super) fn set(&self, stop: impl Fn() -> bool + Send + Sync + 'static) {
        self.0.get_or_init(|| Box::new(stop));
    }

    fn check(&self, domain: &MockDomain) -> Result<(), BackendError> {
        match self.0.get().is_some_and(|stop| stop()) {
            true => Err(domain.fail("create_guest", Errno::EINTR)),
            false => Ok(()),
        }
    }
}

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stop").finish_non_exhaustive()
    }
}

impl MockHost {
    /// Create a running guest.
    ///
    /// # Errors
    ///
    /// [`MockError::BadSpec`] or [`MockError::NameTaken`] for an impossible specification;
    /// [`MockError::Backend`] with ENOMEM if the host is full. No part of the guest is left, unless
    /// the log says so.
    pub fn create_guest(&self, spec: &GuestSpec) -> Result<DomId, MockError> {
        spec.check()?;
        self.check_new_name(&spec.name)?;
        let max_pages = spec.pages() + SLACK_PAGES;
        let new = NewDomain::new(spec.kind, spec.vcpus, max_pages).uuid(spec.uuid);
        let domid = self.create(&new)?;
        let built = self.build(domid, spec);
        if built.is_err()
            && let Err(error) = self.domain(domid).and_then(|domain| domain.destroy())
            && error.errno != Errno::ESRCH
        {
            // The first error is the one that counts.
            tracing::warn!(%error, "an incomplete guest is left: destroy {domid}");
        }
        built.map(|()| domid)
    }

    fn build(&self, domid: DomId, spec: &GuestSpec) -> Result<(), MockError> {
        self.rename(domid, &spec.name)?;
        let domain = self.mock_domain(domid)?;
        match spec.kind {
            GuestKind::Pv => pv::build(&domain, spec)?,
            GuestKind::Hvm | GuestKind::Pvh => hvm::build(&domain, spec)?,
        }
        if spec.ignores_suspend {
            domain.change("create_guest", |state| {
                state.record.ignores_suspend = true;
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Populate all `extents`.
fn populate(domain: &MockDomain, order: u8, extents: &mut [Gfn]) -> Result<(), BackendError> {
    for batch in extents.chunks_mut(POPULATE_BATCH) {
        domain.machine.stop.check(domain)?;
        if domain.populate(order, batch)? < batch.len() {
            return Err(domain.fail("populate_physmap", Errno::ENOMEM));
        }
    }
    Ok(())
}

/// The contents of page `pfn` of a guest made from `seed`: `None` for one page in
/// eight, which is zero.
fn pattern(seed: u64, pfn: u64, page: &mut [u8]) -> Option<()> {
    let start = mix(seed ^ mix(pfn));
    if start & 7 == 0 {
        return None;
    }
    let mut random = SplitMix64::new(start);
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    Some(())
}

/// Fill `pages` (pfn and frame) with the pattern.
fn fill(domain: &MockDomain, seed: u64, pages: &[(u64, Mfn)]) -> Result<(), BackendError> {
    let threads = thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let share = pages.len().div_ceil(threads).max(1);
    let results: Vec<Result<(), BackendError>> = thread::scope(|scope| {
        let workers: Vec<_> = pages
            .chunks(share)
            .map(|pages| scope.spawn(move || fill_share(domain, seed, pages)))
            .collect();
        workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    });
    results.into_iter().collect()
}

fn fill_share(domain: &MockDomain, seed: u64, pages: &[(u64, Mfn)]) -> Result<(), BackendError> {
    const MOST: usize = 64;
    let mut buffer = vec![0; MOST * PAGE_SIZE];
    let flush = |first: Mfn, bytes: &[u8]| domain.write_own("fill", first, bytes);
    for run in pages
        .chunk_by(|a, b| a.1.0 + 1 == b.1.0)
        .flat_map(|run| run.chunks(MOST))
    {
        domain.machine.stop.check(domain)?;
        // Pages of the run that are not zero, written in one call.
        let mut start = 0;
        let mut len = 0;
        for (n, (pfn, _)) in run.iter().enumerate() {
            if pattern(seed, *pfn, &mut buffer[len * PAGE_SIZE..][..PAGE_SIZE]).is_some() {
                if len == 0 {
                    start = n;
                }
                len += 1;
            } else if len > 0 {
                flush(run[start].1, &buffer[..len * PAGE_SIZE])?;
                len = 0;
            }
        }
        if len > 0 {
            flush(run[start].1, &buffer[..len * PAGE_SIZE])?;
        }
    }
    Ok(())
}
