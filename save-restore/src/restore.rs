//! A restore, readable as its list of phases.
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
use xsr_xen_backend::{DomId, Domain, GuestKind};

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
use crate::restore::place::{Placer, read_failed};
use crate::source::{LookAhead, PageSource};
use crate::toolstack::RestoreToolstack;

pub use crate::restore::cpu::{CpuCheck, CpuMissing};

/// The last pfn that any x86 guest can have: 52 bits of address.
const MAX_PFN: Pfn = guest_image::MAX_X86_PFN;

/// How to restore, and into what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoreOptions {
    /// The guest's end of the xenstore ring: an unbound port.
    pub store_port: u32,
    /// Who is at the other end.
    pub store_domid: DomId,
    /// The guest's end of the console ring: an unbound port.
    pub console_port: u32,
    /// Who is at the other end.
    pub console_domid: DomId,
    /// Threads to work with; what the machine has, if not said. What becomes of a stream
    /// does not depend on them. One reads the stream, gets memory for what it names and
    /// helps the others, which put contents into it: pieces of 1 MiB (4 MiB where they
    /// are mapped), of which 16 MiB are in flight, and one more is being read. Threads
    /// that read from a file themselves have a buffer of 1 MiB each. More than 17
    /// threads (5 where pieces are mapped) find no work.
    pub threads: Option<NonZeroUsize>,
    /// What to do where the host lacks CPU features that the guest has seen.
    pub cpu: CpuCheck,
}

/// What a restore did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreStats {
    /// pfns that the stream named, each as often as it did.
    pub pfns: u64,
    /// Pages whose contents came, each as often as they did.
    pub pages: u64,
    /// 1 GiB superpages the guest got.
    pub superpages_1gib: u64,
    /// 2 MiB superpages the guest got.
    pub superpages_2mib: u64,
    /// Single pages the guest got.
    pub small_pages: u64,
    /// Pages it gave back at the end: those the guest gave back while it was saved.
    pub released: u64,
    /// Pages that were sent again after VERIFY and were not what had come before.
    pub verify_mismatches: u64,
}

/// A guest that has been restored; its domain is still paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Frame of the xenstore ring.
    pub store_gfn: Option<Gfn>,
    /// Frame of the console ring.
    pub console_gfn: Option<Gfn>,
    /// What it took.
    pub stats: RestoreStats,
}

/// What differs by guest type. What the stream says of the guest is in [`Run::image`].
#[derive(Debug)]
pub(crate) enum Guest {
    Pv(Box<PvRestore>),
    Hvm,
}

/// Restore a libxc stream into a domain that has just been created: paused, with no
/// memory, with as many vcpus and room for as much memory as the guest needs.
///
/// `reader` has read the headers; the source comes back standing right behind END.
///
/// # Errors
///
/// Whatever fails, in any phase: nothing stays mapped; the domain is still paused
/// and holds what has been built so far. It must not be run: whoever created it
/// destroys it. Nothing else on the host has changed.
pub fn restore<S: PageSource>(
    domain: &dyn Domain,
    mut reader: RecordReader<S>,
    toolstack: &mut dyn RestoreToolstack,
    options: &RestoreOptions,
    progress: &mut OnProgress<'_>,
) -> Result<(Restored, S), RestoreError> {
    // Only the memory of a translated guest can be mapped by superpages.
    let ahead = match reader.domain().guest_type {
        GuestType::X86_HVM => reader.source_mut().look_ahead(),
        _ => Ok(None),
    };
    let ahead = ahead.map_err(|error| read_failed(reader.position(), 0, error))?;
    let mut run = Run::new(domain, &reader, ahead, toolstack, options, progress)?;
    with_crew(run.pages.placer(), options, |hands| {
        go_on(run.progress.begin(Phase::Setup, None))?;
        match run.records(&mut reader, hands)? {
            Stop::End => {}
            Stop::Checkpoint => return Err(RestoreError::Checkpointed),
        }
        let restored = run.end(hands)?;
        Ok((restored, reader.into_source()))
    })
}

/// Have `work` done with as many hands as `options` say.
fn with_crew<R>(
    placer: Placer<'_>,
    options: &RestoreOptions,
    work: impl FnOnce(&Hands<'_, '_>) -> Result<R, RestoreError>,
) -> Result<R, RestoreError> {
    let crew = Crew::new(placer);
    let threads = pipeline::threads(options.threads);
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
    // What failed in an earlier place of the stream comes first.
    crew.finish().and(result)
}

/// Where a run of records ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    End,
    Checkpoint,
}

struct Run<'r, 'p, T: RestoreToolstack + ?Sized> {
    domain: &'r dyn Domain,
    toolstack: &'r mut T,
    options: &'r RestoreOptions,
    progress: Reporter<'r, 'p>,
    /// The domain's last vcpu.
    max_vcpu_id: u32,
    /// What the records have said, kept until END.
    image: GuestImage,
    static_data_done: bool,
    pages: PageRestore<'r>,
}

impl<'r, 'p, T: RestoreToolstack + ?Sized> Run<'r, 'p, T> {
    /// Whether the stream and the domain fit, and what is kept of both.
    fn new<S: PageSource>(
        domain: &'r dyn Domain,
        reader: &RecordReader<S>,
        ahead: Option<LookAhead>,
        toolstack: &'r mut T,
        options: &'r RestoreOptions,
        progress: &'r mut OnProgress<'p>,
    ) -> Result<Self, RestoreError> {
        let info = domain.info()?;
        let order = reader.image().order;
        if order != ByteOrder::Little {
            return Err(RestoreError::ByteOrder { order });
        }
        let image = reader.domain().guest_type;
        let guest = match (image, info.kind) {
            (GuestType::X86_PV, GuestKind::Pv) => Guest::Pv(Box::new(PvRestore::new())),
            (GuestType::X86_HVM, GuestKind::Hvm | GuestKind::Pvh) => Guest::Hvm,
            (image, domain) => return Err(RestoreError::GuestType { image, domain }),
        };
        let plan = ahead.map(|ahead| Plan::of(ahead, info.max_pages));
        Ok(Self {
            domain,
            toolstack,
            options,
            progress: Reporter::new(progress),
            max_vcpu_id: info.max_vcpu_id,
            image: GuestImage::new(image),
            static_data_done: false,
            pages: PageRestore::new(domain, guest, plan),
        })
    }

    /// Apply what comes, up to END or a CHECKPOINT.
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
                    self.pages.batch(body, hands)?;
                    let pfns = self.pages.stats.pfns - before.pfns;
                    let pages = self.pages.stats.pages - before.pages;
                    go_on(self.progress.advance(pfns, pages * PAGE_SIZE as u64))?;
                }
                Incoming::Record(record) => {
                    let applied = self.image.apply(&record);
                    applied.map_err(|cause| bad(position, cause))?;
                    match record.kind {
                        // What is compared is all there.
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

    /// All has come: make the guest of it.
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

    /// What a record asks for at once. What it says is in the image already.
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
                    pv.pv_info(self.domain, info)?;
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
            // END and CHECKPOINT end the loop; the reader lets none of the others through.
            Body::End | Body::Checkpoint | Body::Toolstack(_) | Body::DirtyPfns(_) => {}
        }
        Ok(())
    }

    /// Static data is complete: see that the guest can run here, and set the domain up with it,
    /// before any memory.
    fn static_data(&mut self) -> Result<(), RestoreError> {
        let mut cpu = Comparison::of(&self.image, self.options.cpu);
        cpu.with_host(self.domain)?;
        let missing = x86::set_cpu_policy(self.domain, &cpu.bytes())?;
        cpu.with_given(self.domain)?;
        self.toolstack.static_data_done(missing)?;
        self.static_data_done = true;
        Ok(())
    }

    /// The stream has ended: apply what was kept.
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
            Guest::Pv(pv) => pv.complete(&self.image, self.domain, self.options, &mut ask),
            Guest::Hvm => hvm::complete(&self.image, self.domain, self.options),
        }
    }
}

/// A record that breaks a rule together with those before it.
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
