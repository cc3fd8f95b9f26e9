//! Saving a guest: the sequence of phases.
//!
//! C implementation: `xg_sr_save.c`.

mod balloon;
mod batch;
mod buffer;
mod checkpointed;
mod colo;
mod live;
pub mod mapped;
pub mod precopy;
mod request;
mod suspended;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use xsr_format::frame::{PAGE_SIZE, Pfn};
use xsr_format::image::DomainHeader;
use xsr_format::record::MAX_BATCH;
use xsr_format::write::RecordWriter;
use xsr_xen_backend::{
    DirtyBitmap, Domain, DomainInfo, GuestKind, GuestRole, ShutdownReason, XenVersion,
};

use crate::error::{GuestError, SaveError};
use crate::guest::hvm::HvmSave;
use crate::guest::pv::PvSave;
use crate::guest::{GuestSave, Out};
use crate::pipeline;
use crate::progress::{OnProgress, Phase, Reporter};
use crate::save::balloon::Balloon;
use crate::save::batch::Batch;
use crate::save::mapped::{Extent, MappedImage, Part};
use crate::save::precopy::PrecopyPolicy;
use crate::save::suspended::Suspended;
use crate::sink::PageSink;
use crate::text::chain;
use crate::toolstack::{SaveToolstack, ToolstackError};

pub use crate::save::checkpointed::{BUFFER_BYTES, CheckpointedStats, Checkpoints};
pub use crate::save::request::{AtFreeze, SaveRequest};

/// How to save.
#[derive(Clone, Copy, Debug, Default)]
pub struct SaveOptions {
    /// Number of threads; by default as many as the machine has. The bytes written are the same for
    /// any number. One thread writes and the others prepare batches, of which 8 are in flight (32
    /// MiB mapped): more than 9 threads find no work.
    pub threads: Option<NonZeroUsize>,
}

/// How to save a guest that runs during most of the save.
pub struct Live<'a> {
    /// Decides when the guest is suspended.
    pub policy: &'a mut dyn PrecopyPolicy,
    /// Sends all memory a second time at the end, after a VERIFY record, for the restorer to
    /// compare. For finding bugs, not for production.
    pub verify: bool,
}

impl std::fmt::Debug for Live<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live")
            .field("verify", &self.verify)
            .finish_non_exhaustive()
    }
}

/// What a save did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SaveStats {
    /// pfns that the stream names, counted each time.
    pub pfns: u64,
    /// Pages with contents in the stream, counted each time.
    pub pages: u64,
    /// PAGE_DATA records.
    pub batches: u64,
    /// Passes over memory while the guest ran; 0 in a still save.
    pub iterations: u32,
    /// pfns that were deferred until the guest was suspended: it was just changing them (page
    /// tables) or the tables that describe its memory, or they had no page.
    pub deferred: u64,
    /// Time from asking the guest to suspend until the stream was complete.
    pub suspended_for: Duration,
}

/// A save that is complete, of a domain that is still suspended.
///
/// Dropping this resumes the domain, so that a caller that fails in a later step of its
/// own (another record, an fsync, a rename) just returns and the guest runs on.
/// [`Saved::keep_suspended`] says that the image is safe and the domain may go.
#[must_use = "dropping it resumes the domain"]
pub struct Saved<'a> {
    stats: SaveStats,
    suspended: Suspended<'a, dyn SaveToolstack + 'a>,
}

impl std::fmt::Debug for Saved<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Saved")
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

impl Saved<'_> {
    /// Statistics of the save.
    pub fn stats(&self) -> SaveStats {
        self.stats
    }

    /// Leaves the domain suspended: the image holds the guest now.
    pub fn keep_suspended(mut self) {
        self.suspended.let_go();
    }

    /// Resumes the domain: the image is a copy.
    ///
    /// # Errors
    ///
    /// The toolstack's error; the domain is then still suspended.
    pub fn resume(mut self) -> Result<(), ToolstackError> {
        self.suspended.resume()
    }
}

/// The save has failed because of `cause`: resumes the guest, if it is suspended. A guest that has
/// gone away is left as it is, and this is then the cause of any failed call on it.
fn give_back<T: SaveToolstack + ?Sized>(
    domain: &dyn Domain,
    suspended: &mut Suspended<'_, T>,
    cause: SaveError,
) -> SaveError {
    if let Some(gone) = suspended::gone(domain) {
        suspended.let_go();
        return went_away(gone, cause);
    }
    let Err(resume) = suspended.resume() else {
        return cause;
    };
    if let Some(gone) = suspended::gone(domain) {
        return went_away(gone, cause);
    }
    match domain.info() {
        // Another program has resumed the domain meanwhile.
        Ok(info) if info.shutdown.is_none() => cause,
        info => SaveError::NotResumed {
            cause: Box::new(cause),
            resume,
            known: info.is_ok(),
        },
    }
}

/// The save has failed because of `cause`, and the guest has gone away: returns `gone`, if that can
/// be the origin of `cause`.
fn went_away(gone: GuestError, cause: SaveError) -> SaveError {
    let of_the_guest = matches!(
        cause,
        SaveError::Backend(_) | SaveError::Map(_) | SaveError::Toolstack(_) | SaveError::Guest(_)
    );
    if of_the_guest {
        tracing::debug!(error = chain(&cause), "the guest has gone away");
        return gone.into();
    }
    cause
}

/// Records what becomes of the pfns that are sent.
#[derive(Default)]
struct Notes<'a> {
    /// The guest runs: pfns that cannot be sent for that reason. `None`: it is suspended.
    deferred: Option<&'a mut DirtyBitmap>,
    /// Which of them are absent, if later changes must be detected.
    balloon: Option<&'a mut Balloon>,
    /// What is done beside this pass.
    hook: Option<&'a mut (dyn AtFreeze + 'a)>,
}

/// What is done while the guest is suspended.
type Hook<'h, 'a> = &'h mut Option<&'a mut (dyn AtFreeze + 'a)>;

struct Run<'r, 'p> {
    domain: &'r dyn Domain,
    kind: GuestKind,
    /// The slots that pages go to; `None` if all goes into one stream.
    image: Option<&'r MappedImage<'r>>,
    /// Prepares batches, in every pass.
    pool: Option<rayon::ThreadPool>,
    /// Bytes of memory that the domain has.
    memory: u64,
    /// The most pages that it can have.
    most_pages: u64,
    progress: Reporter<'r, 'p>,
    stats: SaveStats,
}

impl<'r, 'p> Run<'r, 'p> {
    fn new(
        domain: &'r dyn Domain,
        info: &DomainInfo,
        options: &SaveOptions,
        image: Option<&'r MappedImage<'r>>,
        progress: &'r mut OnProgress<'p>,
    ) -> Self {
        let threads = pipeline::threads(options.threads);
        // Where the pool writes, too, this thread has next to nothing to do.
        let threads = match image {
            Some(_) if threads.get() > 1 => threads.saturating_add(1),
            _ => threads,
        };
        Self {
            domain,
            kind: info.kind,
            image,
            pool: pipeline::pool(threads, pipeline::IN_FLIGHT),
            progress: Reporter::new(progress),
            memory: info.tot_pages * PAGE_SIZE as u64,
            most_pages: info.max_pages.max(info.tot_pages),
            stats: SaveStats::default(),
        }
    }
}

/// The pfns that even a small guest has: up to 8 GiB, below which its devices are.
const ORDINARY_PFNS: u64 = 1 << 21;

impl<'r> Run<'r, '_> {
    /// Maps the tables that describe the guest's memory; writes everything that precedes memory.
    fn head<'s>(
        &mut self,
        xen: XenVersion,
        sink: &'s mut dyn PageSink,
    ) -> Result<(Box<dyn GuestSave + 'r>, Out<'s>), SaveError> {
        self.report(Phase::Setup)?;
        let guest = self.setup()?;
        self.warn_of_size(guest.as_ref());
        let domain_header = DomainHeader {
            guest_type: guest.guest_type(),
            xen_major: u32::from(xen.major),
            xen_minor: u32::from(xen.minor),
        };
        let mut out = RecordWriter::new(sink, domain_header)?;
        guest.static_data(&mut out)?;
        out.static_data_end()?;
        self.begin(Part::Start);
        guest.start_of_stream(&mut out)?;
        Ok((guest, out))
    }

    /// A guest decides how long its image is: it has an entry for each pfn up to the last, whether
    /// the guest has a page there or not. (Xen's saver writes the same.)
    fn warn_of_size(&self, guest: &dyn GuestSave) {
        let pfns = guest_pages(guest);
        if pfns > ORDINARY_PFNS + 4 * self.most_pages {
            let (most, mib) = (self.most_pages, (8 * pfns) >> 20);
            tracing::warn!(
                "the guest has {most} pages at most, but pfns up to {:#x}: the image has {mib} MiB \
                 for those without a page",
                pfns - 1
            );
        }
    }

    /// What comes now belongs to this part of an image with slots.
    fn begin(&self, part: Part) {
        if let Some(image) = self.image {
            image.begin(part);
        }
    }

    /// Memory comes now. Pages may come again if it is `live`.
    fn begin_memory(&self, live: bool, guest: &dyn GuestSave) -> Result<(), SaveError> {
        match self.image {
            Some(image) => image.begin_memory(&Extent {
                live,
                pages: self.memory / PAGE_SIZE as u64,
                most_pages: match live {
                    true => self.most_pages,
                    false => self.memory / PAGE_SIZE as u64,
                },
                pfns: guest_pages(guest),
            }),
            None => Ok(()),
        }
    }

    fn phases(
        &mut self,
        xen: XenVersion,
        suspended: &mut Suspended<'_, dyn SaveToolstack + '_>,
        sink: &mut dyn PageSink,
        live: Option<Live<'_>>,
        hook: Hook<'_, '_>,
    ) -> Result<(), SaveError> {
        let (mut guest, mut out) = self.head(xen, sink)?;
        let guest = guest.as_mut();
        let stopped = match live {
            None => {
                let stopped = self.suspend(suspended)?;
                if let Some(hook) = hook {
                    hook.begin()?;
                }
                if self.check_vm_state(guest, false)? {
                    guest.start_of_stream(&mut out)?;
                }
                self.begin_memory(false, guest)?;
                let all = (all_pages(guest), guest_pages(guest));
                let notes = Notes {
                    hook: again(hook),
                    ..Notes::default()
                };
                self.send(guest, &mut out, Phase::Pages, all, notes)?;
                stopped
            }
            Some(live) => self.live(guest, &mut out, suspended, live, hook)?,
        };

        self.report(Phase::Tail)?;
        self.begin(Part::Tail);
        guest.end_of_checkpoint(&mut out)?;
        if let Some(hook) = hook {
            hook.wait()?;
        }
        self.still_suspended()?;
        out.end()?;
        self.stats.suspended_for = stopped.elapsed();
        Ok(())
    }

    /// Syncs what a pass has written into slots. The guest runs meanwhile, and what it writes in
    /// this time is in the next pass. So the sync that completes the image, for which it may be
    /// suspended (under xl it is), has only the last pass to wait for.
    fn sync_pass(&self) -> Result<(), SaveError> {
        match self.image {
            Some(image) => image.sync(),
            None => Ok(()),
        }
    }

    /// Suspends the guest; returns when it was asked to.
    fn suspend<T: SaveToolstack + ?Sized>(
        &mut self,
        suspended: &mut Suspended<'_, T>,
    ) -> Result<Instant, SaveError> {
        self.report(Phase::Suspend)?;
        let asked = Instant::now();
        suspended.suspend(self.domain)?;
        Ok(asked)
    }

    /// Sends pfns (this many, ascending) in batches.
    fn send(
        &mut self,
        guest: &dyn GuestSave,
        out: &mut Out<'_>,
        phase: Phase,
        (pfns, total): (impl Iterator<Item = Pfn>, u64),
        mut notes: Notes<'_>,
    ) -> Result<(), SaveError> {
        let domain = self.domain;
        let running = notes.deferred.is_some();
        let bytes = total.saturating_mul(PAGE_SIZE as u64).min(self.memory);
        go_on(self.progress.begin(phase, Some((total, bytes))))?;
        if let (Some(image), Phase::StopAndCopy) = (self.image, phase) {
            image.freeze();
        }
        let prepare = |pfns: Vec<Pfn>| Batch::prepare(domain, guest, &pfns, running);
        let mut sent = |batch: &Batch| {
            if let Some(deferred) = &mut notes.deferred {
                for (pfn, _) in batch.deferred() {
                    deferred.set(*pfn);
                }
            }
            if let Some(balloon) = &mut notes.balloon {
                balloon.sent(domain, batch.entries(), batch.pages() > 0)?;
            }
            if let Some(hook) = &mut notes.hook {
                hook.check()?;
            }
            self.stats.pfns += batch.pfns();
            self.stats.pages += batch.pages();
            self.stats.batches += 1;
            let bytes = batch.pages() * PAGE_SIZE as u64;
            go_on(self.progress.advance(batch.pfns(), bytes))
        };
        let pool = self.pool.as_ref();
        match self.image {
            None => pipeline::ordered(pool, batches(pfns), prepare, |batch| {
                batch.write(*out.sink_mut())?;
                sent(batch)
            }),
            Some(image) => pipeline::placed(
                pool,
                batches(pfns),
                prepare,
                |batch| {
                    let placed = image.place(batch)?;
                    sent(batch).map(|()| placed)
                },
                |batch, placed| image.write(batch, placed),
            ),
        }
    }

    /// Checks that nothing has resumed the guest since it was asked to suspend: otherwise the image
    /// would match neither its earlier state nor its present one.
    fn still_suspended(&self) -> Result<(), SaveError> {
        match self.domain.info()?.shutdown {
            Some(ShutdownReason::Suspend) => Ok(()),
            None => Err(GuestError::ResumedMeanwhile.into()),
            Some(reason) => Err(GuestError::ShutDown { reason }.into()),
        }
    }

    /// Maps a guest's tables. Does not change the guest.
    fn setup(&mut self) -> Result<Box<dyn GuestSave + 'r>, SaveError> {
        let (domain, progress) = (self.domain, &mut self.progress);
        Ok(match domain.guest_role() {
            GuestRole::Hvm(guest) => Box::new(HvmSave::new(domain, guest)?),
            GuestRole::Pv(guest) => {
                Box::new(PvSave::new(domain, guest, &mut || go_on(progress.ask()))?)
            }
        })
    }

    /// As [`GuestSave::check_vm_state`].
    fn check_vm_state(
        &mut self,
        guest: &mut dyn GuestSave,
        running: bool,
    ) -> Result<bool, SaveError> {
        let progress = &mut self.progress;
        guest.check_vm_state(running, &mut || go_on(progress.ask()))
    }

    fn report(&mut self, phase: Phase) -> Result<(), SaveError> {
        go_on(self.progress.begin(phase, None))
    }
}

/// The hook, for one pass.
fn again<'h>(
    hook: &'h mut Option<&mut (dyn AtFreeze + '_)>,
) -> Option<&'h mut (dyn AtFreeze + 'h)> {
    match hook {
        Some(hook) => Some(&mut **hook),
        None => None,
    }
}

fn go_on(told: ControlFlow<()>) -> Result<(), SaveError> {
    match told.is_continue() {
        true => Ok(()),
        false => Err(SaveError::Aborted),
    }
}

/// The number of possible pfns.
fn guest_pages(guest: &dyn GuestSave) -> u64 {
    guest.max_pfn().0 + 1
}

/// Every possible pfn, ascending: restorers rebuild superpages from exactly that order.
fn all_pages(guest: &dyn GuestSave) -> impl Iterator<Item = Pfn> + use<> {
    (0..guest_pages(guest)).map(Pfn)
}

/// As many pfns at a time as fit into one record.
fn batches(mut pfns: impl Iterator<Item = Pfn>) -> impl Iterator<Item = Vec<Pfn>> {
    std::iter::from_fn(move || {
        let batch: Vec<Pfn> = pfns.by_ref().take(MAX_BATCH).collect();
        (!batch.is_empty()).then_some(batch)
    })
}
