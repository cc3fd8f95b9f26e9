//! Restore requests: into which domain and how, built by the caller and then run once.

use std::fmt;
use std::io::Write;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use xsr_format::image::GuestType;
use xsr_format::read::RecordReader;
use xsr_xen_backend::{DomId, Domain};

use crate::error::RestoreError;
use crate::progress::{OnProgress, Phase, Progress};
use crate::restore::checkpoint::{CheckpointOptions, Survivor};
use crate::restore::cpu::CpuCheck;
use crate::restore::place::read_failed;
use crate::restore::{Guest, Restored, Run, Stop, go_on, with_crew};
use crate::source::{LookAhead, PageSource};
use crate::toolstack::{CheckpointRestoreToolstack, ColoRestoreToolstack, RestoreToolstack};

/// The event channels of the rings that connect a guest with xenstore and its console. The toolstack
/// allocates them for the new domain before it is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rings {
    /// The guest's end of the xenstore ring: an unbound port.
    pub store_port: u32,
    /// The domain at the other end.
    pub store_domid: DomId,
    /// The guest's end of the console ring: an unbound port.
    pub console_port: u32,
    /// The domain at the other end.
    pub console_domid: DomId,
}

/// A restore: into which domain, and how. One of the `read_*` methods runs it.
///
/// The domain has just been created: it is paused, has no memory, as many vcpus as the guest, and
/// room for the guest's memory. The reader that a `read_*` method takes has read the headers, and
/// decides how strict the restore is ([`ReadOptions`](xsr_format::read::ReadOptions)).
///
/// ```no_run
/// use xsr_format::read::{ReadOptions, RecordReader};
/// use xsr_save_restore::source::FdSource;
/// use xsr_save_restore::toolstack::DirectToolstack;
/// use xsr_save_restore::{RestoreRequest, Rings};
/// use xsr_xen_backend::{DomId, Domain};
///
/// # fn example(domain: &dyn Domain, file: std::fs::File) -> Result<(), Box<dyn std::error::Error>> {
/// let dom0 = DomId(0);
/// let rings = Rings {
///     store_port: domain.alloc_unbound_port(dom0)?,
///     store_domid: dom0,
///     console_port: domain.alloc_unbound_port(dom0)?,
///     console_domid: dom0,
/// };
/// let reader = RecordReader::new(FdSource::new(&file), ReadOptions::default())?;
/// let (restored, _rest_of_file) =
///     RestoreRequest::new(domain, rings).read_stream(reader, &mut DirectToolstack(domain))?;
/// println!("{} pages", restored.stats.pages);
/// domain.unpause()?;
/// # Ok(())
/// # }
/// ```
#[must_use = "a request does nothing until it is run"]
pub struct RestoreRequest<'r> {
    domain: &'r dyn Domain,
    rings: Rings,
    threads: Option<NonZeroUsize>,
    cpu: CpuCheck,
    keep: CheckpointOptions,
    progress: Option<&'r mut OnProgress<'r>>,
}

impl fmt::Debug for RestoreRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestoreRequest")
            .field("rings", &self.rings)
            .field("threads", &self.threads)
            .field("cpu", &self.cpu)
            .field("keep", &self.keep)
            .finish_non_exhaustive()
    }
}

impl<'r> RestoreRequest<'r> {
    /// A restore with as many threads as the machine has processors, without an observer. It refuses
    /// a host that lacks CPU features of the guest.
    pub fn new(domain: &'r dyn Domain, rings: Rings) -> Self {
        Self {
            domain,
            rings,
            threads: None,
            cpu: CpuCheck::Refuse,
            keep: CheckpointOptions::default(),
            progress: None,
        }
    }

    /// Number of threads; by default (`None`) as many as the machine has. The result does not depend
    /// on it. One thread reads the stream, gets memory for the pages in it, and helps the others,
    /// which write contents into that memory: in pieces of 1 MiB (4 MiB if they are mapped), of which
    /// 16 MiB are in flight, and one more is being read. Threads that read from a file themselves
    /// have a buffer of 1 MiB each. More than 17 threads (5 if pieces are mapped) find no work.
    pub fn threads(mut self, threads: Option<NonZeroUsize>) -> Self {
        self.threads = threads;
        self
    }

    /// What to do if the host lacks CPU features that the guest has seen.
    pub fn cpu(mut self, check: CpuCheck) -> Self {
        self.cpu = check;
        self
    }

    /// Where a checkpoint is kept until it is complete. [`read_stream`](Self::read_stream) ignores
    /// it.
    pub fn keep(mut self, keep: &CheckpointOptions) -> Self {
        self.keep = keep.clone();
        self
    }

    /// Calls `progress` with the state of the restore. The callback can stop the restore.
    pub fn observe(mut self, progress: &'r mut OnProgress<'r>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Restores a libxc stream.
    ///
    /// The returned source is positioned directly after END.
    ///
    /// # Errors
    ///
    /// Any of [`RestoreError`], in any phase. No page stays mapped. The domain is still paused and
    /// holds what has been built so far. It must not be run: its creator has to destroy it. Nothing
    /// else on the host has changed.
    pub fn read_stream<S: PageSource>(
        self,
        mut reader: RecordReader<S>,
        toolstack: &mut dyn RestoreToolstack,
    ) -> Result<(Restored, S), RestoreError> {
        // Superpages exist only for the memory of a translated guest.
        let ahead = match reader.domain().guest_type {
            GuestType::X86_HVM => reader.source_mut().look_ahead(),
            _ => Ok(None),
        };
        let ahead = ahead.map_err(|error| read_failed(reader.position(), 0, error))?;
        self.run(reader, ahead, toolstack, |run, mut reader, threads, _| {
            with_crew(run.pages.placer(), threads, |hands| {
                go_on(run.progress.begin(Phase::Setup, None))?;
                match run.records(&mut reader, hands)? {
                    Stop::End => {}
                    Stop::Checkpoint => return Err(RestoreError::Checkpointed),
                }
                let restored = run.end(hands)?;
                Ok((restored, reader.into_source()))
            })
        })
    }

    /// Restores a stream of checkpoints (Remus), until the sender is lost. The domain is then the
    /// guest of the last complete checkpoint, without any part of an incomplete one.
    ///
    /// Records before the first CHECKPOINT are applied at once: there is no earlier state to return
    /// to. Later records are kept, as [`keep`](Self::keep) says, and applied when the next CHECKPOINT
    /// has arrived and `toolstack` has all that belongs to it.
    ///
    /// # Errors
    ///
    /// As [`read_stream`](Self::read_stream), and the domain is useless then, too. Before the first
    /// checkpoint this includes a source that breaks off; after it, that is not an error. A stream
    /// that breaks a rule, a checkpoint that cannot be kept or applied, a failed callback and a
    /// cancellation are always errors, because the sender may still be alive. After
    /// [`RestoreError::NotApplied`] the domain is a mixture of two checkpoints.
    pub fn read_checkpoints<S: PageSource>(
        self,
        reader: RecordReader<S>,
        toolstack: &mut dyn CheckpointRestoreToolstack,
    ) -> Result<Survivor<S>, RestoreError> {
        self.run(reader, None, toolstack, |run, reader, threads, keep| {
            run.checkpoints(reader, keep, threads, Run::epochs)
        })
    }

    /// Restores a stream of COLO checkpoints, as the secondary. Each checkpoint is applied when it is
    /// complete, and the guest runs. Before the next one the primary is told over `back` which pages
    /// the guest here has written (which the toolstack has logged from the first
    /// [`ColoRestoreToolstack::postcopy`] on).
    ///
    /// When the primary is lost, which includes a failed write to `back`, the guest here takes over.
    /// It runs or is suspended, as the toolstack last left it.
    ///
    /// # Errors
    ///
    /// As [`read_checkpoints`](Self::read_checkpoints); a PV guest. After an error, a guest that has
    /// run may still be running.
    pub fn read_colo<S: PageSource>(
        self,
        reader: RecordReader<S>,
        toolstack: &mut dyn ColoRestoreToolstack,
        back: &mut dyn Write,
    ) -> Result<Survivor<S>, RestoreError> {
        self.run(reader, None, toolstack, |run, reader, threads, keep| {
            if matches!(run.pages.guest, Guest::Pv(_)) {
                return Err(RestoreError::ColoGuest);
            }
            run.checkpoints(reader, keep, threads, |run, reader, hands| {
                run.both(reader, back, hands)
            })
        })
    }

    /// Checks that the stream and the domain fit each other, and runs `phases`.
    fn run<S: PageSource, T: RestoreToolstack + ?Sized, O>(
        self,
        reader: RecordReader<S>,
        ahead: Option<LookAhead>,
        toolstack: &mut T,
        phases: impl FnOnce(
            &mut Run<'_, '_, T>,
            RecordReader<S>,
            Option<NonZeroUsize>,
            &CheckpointOptions,
        ) -> Result<O, RestoreError>,
    ) -> Result<O, RestoreError> {
        let mut unobserved = |_: &Progress| ControlFlow::Continue(());
        let progress: &mut OnProgress<'_> = match self.progress {
            Some(progress) => progress,
            None => &mut unobserved,
        };
        let how = (self.rings, self.cpu);
        let mut run = Run::new(self.domain, &reader, ahead, toolstack, how, progress)?;
        phases(&mut run, reader, self.threads, &self.keep)
    }
}
