//! Restoring a guest: the sequence of phases.
//!
//! C implementation: `xg_sr_restore.c`.

mod ahead;
pub mod checkpoint;
pub(crate) mod colo;
mod cpu;
mod crew;
mod pages;
mod place;
mod populate;
mod request;
mod spool;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use xsr_format::byte_order::ByteOrder;
use xsr_format::error::{DecodeError, Position, ReadError};
use xsr_format::frame::{Gfn, PAGE_SIZE, Pfn};
use xsr_format::guest_image::{self, GuestImage};
use xsr_format::image::GuestType;
use xsr_format::read::{Incoming, RecordReader};
use xsr_format::record::{Body, Record, RecordKind};
use xsr_xen_backend::{Domain, GuestRole, HvmGuest};

use crate::error::RestoreError;
use crate::guest::hvm;
use crate::guest::pv::restore::PvRestore;
use crate::guest::x86;
use crate::pipeline;
use crate::progress::{OnProgress, Phase, Reporter};
use crate::restore::ahead::Plan;
use crate::restore::cpu::Comparison;
use crate::restore::crew::{Crew, Hands};
use crate::restore::pages::PageRestore;
use crate::restore::place::Placer;
use crate::source::{LookAhead, PageSource};
use crate::toolstack::RestoreToolstack;

pub use crate::restore::cpu::{CpuCheck, CpuMissing};
pub use crate::restore::request::{RestoreRequest, Rings};

/// The last pfn that any x86 guest can have: 52 bits of address.
const MAX_PFN: Pfn = guest_image::MAX_X86_PFN;

/// What a restore did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreStats {
    /// pfns that the stream named, counted each time.
    pub pfns: u64,
    /// Pages with contents that the stream held, counted each time.
    pub pages: u64,
    /// 1 GiB superpages the guest got.
    pub superpages_1gib: u64,
    /// 2 MiB superpages the guest got.
    pub superpages_2mib: u64,
    /// Single pages the guest got.
    pub small_pages: u64,
    /// Pages given back at the end: those that the guest gave back while it was saved.
    pub released: u64,
    /// Pages that were sent again after VERIFY and differed from what had come before.
    pub verify_mismatches: u64,
}

/// A guest that has been restored; its domain is still paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Frame of the xenstore ring.
    pub store_gfn: Option<Gfn>,
    /// Frame of the console ring.
    pub console_gfn: Option<Gfn>,
    /// Statistics.
    pub stats: RestoreStats,
}

/// What differs by guest type. What the stream says about the guest is in [`Run::image`].
pub(crate) enum Guest<'r> {
    Pv(Box<PvRestore<'r>>),
    Hvm(&'r dyn HvmGuest),
}

/// Runs `work` with `threads` threads, by default as many as the machine has.
fn with_crew<R>(
    placer: Placer<'_>,
    threads: Option<NonZeroUsize>,
    work: impl FnOnce(&Hands<'_, '_>) -> Result<R, RestoreError>,
) -> Result<R, RestoreError> {
    let crew = Crew::new(placer);
    let threads = pipeline::threads(threads);
    match pipeline::pool(threads, crew.window()) {
        Some(pool) => pool.in_place_scope(|scope| with_hands(&crew, Some(scope), work)),
        None => with_hands(&crew, None, work),
    }
}

fn with_hands<'scope, R>(
    crew: &'scope Crew<'scope>,
    scope: Option<&rayon::Scope<'scope>>,
    work: impl FnOnce(&Hands<'_, '_>) -> Result<R, RestoreError>,
) -> Result<R, RestoreError> {
    let result = work(&Hands { crew, scope });
    // A failure earlier in the stream has precedence.
    crew.finish().and(result)
}

/// The record that ends a run of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    End,
    Checkpoint,
}

struct Run<'r, 'p, T: RestoreToolstack + ?Sized> {
    domain: &'r dyn Domain,
    toolstack: &'r mut T,
    rings: Rings,
    cpu: CpuCheck,
    progress: Reporter<'r, 'p>,
    /// The domain's last vcpu.
    max_vcpu_id: u32,
    /// The contents of the records, kept until END.
    image: GuestImage,
    static_data_done: bool,
    pages: PageRestore<'r>,
}

impl<'r, 'p, T: RestoreToolstack + ?Sized> Run<'r, 'p, T> {
    /// Checks that the stream and the domain fit each other; creates the state of the restore.
    fn new<S: PageSource>(
        domain: &'r dyn Domain,
        reader: &RecordReader<S>,
        ahead: Option<LookAhead>,
        toolstack: &'r mut T,
        (rings, cpu): (Rings, CpuCheck),
        progress: &'r mut OnProgress<'p>,
    ) -> Result<Self, RestoreError> {
        let info = domain.info()?;
        let order = reader.image().order;
        if order != ByteOrder::Little {
            return Err(RestoreError::ByteOrder { order });
        }
        let image = reader.domain().guest_type;
        let guest = match (image, domain.guest_role()) {
            (GuestType::X86_PV, GuestRole::Pv(guest)) => Guest::Pv(Box::new(PvRestore::new(guest))),
            (GuestType::X86_HVM, GuestRole::Hvm(guest)) => Guest::Hvm(guest),
            (image, _) => {
                let domain = info.kind;
                return Err(RestoreError::GuestType { image, domain });
            }
        };
        let plan = ahead.map(|ahead| Plan::of(ahead, info.max_pages));
        Ok(Self {
            domain,
            toolstack,
            rings,
            cpu,
            progress: Reporter::new(progress),
            max_vcpu_id: info.max_vcpu_id,
            image: GuestImage::new(image),
            static_data_done: false,
            pages: PageRestore::new(domain, guest, plan),
        })
    }

    /// Applies records up to END or a CHECKPOINT.
    fn records<S: PageSource>(
        &mut self,
        reader: &mut RecordReader<S>,
        hands: &Hands<'_, '_>,
    ) -> Result<Stop, RestoreError> {
        let mut memory = false;
        while let Some((position, incoming)) = reader.next_record_at()? {
            match incoming {
                Incoming::PageData(body) => {
                    let applied = self.image.apply_pages(body.entries().iter());
                    applied.map_err(|cause| bad(position, cause))?;
                    // A v2 stream does not say where static data ends.
                    if !self.static_data_done {
                        self.static_data()?;
                    }
                    if !std::mem::replace(&mut memory, true) {
                        go_on(self.progress.begin(Phase::Pages, None))?;
                    }
                    let before = self.pages.stats;
                    let progress = &mut self.progress;
                    let mut ask = || go_on(progress.ask());
                    self.pages.batch(body, hands, &mut ask)?;
                    let pfns = self.pages.stats.pfns - before.pfns;
                    let pages = self.pages.stats.pages - before.pages;
                    go_on(self.progress.advance(pfns, pages * PAGE_SIZE as u64))?;
                }
                Incoming::Record(record) => {
                    let applied = self.image.apply(&record);
                    applied.map_err(|cause| bad(position, cause))?;
                    match record.kind {
                        // All pages that are to be compared are in place.
                        RecordKind::VERIFY => hands.crew.finish()?,
                        RecordKind::CHECKPOINT => return Ok(Stop::Checkpoint),
                        _ => {}
                    }
                    self.record(&record)?;
                }
            }
        }
        Ok(Stop::End)
    }

    /// The stream is complete: applies everything that is left.
    fn end(&mut self, hands: &Hands<'_, '_>) -> Result<Restored, RestoreError> {
        hands.crew.finish()?;
        go_on(self.progress.begin(Phase::Tail, None))?;
        let progress = &mut self.progress;
        let mut ask = || go_on(progress.ask());
        self.pages.release_absent(&mut ask)?;
        let (store_gfn, console_gfn) = self.complete()?;
        self.toolstack.restore_results(store_gfn, console_gfn)?;
        Ok(Restored {
            store_gfn,
            console_gfn,
            stats: self.pages.stats,
        })
    }

    /// Does what a record needs at once. Its contents are in the image already.
    fn record(&mut self, record: &Record<'_>) -> Result<(), RestoreError> {
        match record.body {
            Body::StaticDataEnd => self.static_data()?,
            Body::P2mFrames(_) => {
                // A version 2 stream does not say where static data ends.
                if !self.static_data_done {
                    self.static_data()?;
                }
                if let (Guest::Pv(pv), Some(p2m)) = (&mut self.pages.guest, self.image.p2m()) {
                    pv.set_max_pfn(p2m.max_pfn);
                }
            }
            Body::PvInfo(info) => {
                if let Guest::Pv(pv) = &mut self.pages.guest {
                    pv.pv_info(info)?;
                }
            }
            Body::Vcpu(_) | Body::HvmContext(_) => {
                let max = self.max_vcpu_id;
                let last = self.image.vcpus().keys().last().copied();
                let last = last.max(self.image.vcpus_needed().checked_sub(1));
                if let Some(vcpu) = last.filter(|vcpu| *vcpu > max) {
                    let kind = record.kind;
                    return Err(RestoreError::Vcpu { kind, vcpu, max });
                }
            }
            Body::Verify => self.pages.verify = true,
            Body::Optional(_) => {
                tracing::info!(kind = %record.kind, "skipped an optional record");
            }
            // Applied when the stream, or its checkpoint, has ended.
            Body::CpuidPolicy(_)
            | Body::MsrPolicy(_)
            | Body::SharedInfo(_)
            | Body::HvmParams(_)
            | Body::TscInfo(_) => {}
            // END and CHECKPOINT end the loop; the reader does not return the others.
            Body::End | Body::Checkpoint => {}
        }
        Ok(())
    }

    /// Static data is complete: checks that the guest can run here and applies the data to the
    /// domain, before it has any memory.
    fn static_data(&mut self) -> Result<(), RestoreError> {
        let mut cpu = Comparison::of(&self.image, self.cpu);
        cpu.with_host(self.domain)?;
        let missing = x86::set_cpu_policy(self.domain, &cpu.bytes())?;
        cpu.with_given(self.domain)?;
        self.toolstack.static_data_done(missing)?;
        self.static_data_done = true;
        Ok(())
    }

    /// The stream has ended: applies what was kept.
    fn complete(&mut self) -> Result<(Option<Gfn>, Option<Gfn>), RestoreError> {
        if let Some(tsc) = self.image.tsc() {
            x86::set_tsc_info(self.domain, tsc)?;
        }
        if self.pages.stats.verify_mismatches > 0 {
            tracing::error!(
                pages = self.pages.stats.verify_mismatches,
                "pages differ from what was sent for verification"
            );
        }
        let progress = &mut self.progress;
        let mut ask = || go_on(progress.ask());
        match &self.pages.guest {
            Guest::Pv(pv) => pv.complete(&self.image, self.domain, &self.rings, &mut ask),
            Guest::Hvm(guest) => hvm::complete(&self.image, self.domain, *guest, &self.rings),
        }
    }
}

/// A record that breaks a rule in combination with earlier records.
fn bad(position: Position, cause: DecodeError) -> RestoreError {
    let cause = cause.into();
    ReadError { position, cause }.into()
}

fn go_on(told: ControlFlow<()>) -> Result<(), RestoreError> {
    match told.is_continue() {
        true => Ok(()),
        false => Err(RestoreError::Aborted),
    }
}
