//! Save requests: what to save and how, built by the caller and then run once.

use std::fmt;
use std::io::{self, Write as _};
use std::ops::ControlFlow;

use xsr_xen_backend::{Domain, XenVersion};

use crate::back_channel::BackChannel;
use crate::error::SaveError;
use crate::progress::{OnProgress, Progress};
use crate::save::buffer::{EpochBuffer, Hold};
use crate::save::mapped::MappedImage;
use crate::save::precopy::PrecopyPolicy;
use crate::save::{
    CheckpointedStats, Checkpoints, Live, Run, SaveOptions, SaveStats, Saved, Suspended, give_back,
};
use crate::sink::PageSink;
use crate::text::chain;
use crate::toolstack::{CheckpointToolstack, ColoToolstack, SaveToolstack, ToolstackError};

/// Something that is done while a guest is suspended to be saved: a snapshot of its disks, say.
pub trait AtFreeze {
    /// The guest has just been suspended. Starts what is to be done, beside the last pass.
    ///
    /// # Errors
    ///
    /// The save fails, and the guest runs on.
    fn begin(&mut self) -> Result<(), ToolstackError>;

    /// Called between two steps of the last pass.
    ///
    /// # Errors
    ///
    /// What was started has failed meanwhile: the save fails at once, and the guest runs on.
    fn check(&mut self) -> Result<(), ToolstackError>;

    /// The last pass is over: waits until all is done. The guest is suspended until then. Not
    /// called if the save fails before.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    fn wait(&mut self) -> Result<(), ToolstackError>;
}

/// A save: of which domain, and how. One of the `write_*` methods runs it.
///
/// ```no_run
/// use xsr_save_restore::sink::FdSink;
/// use xsr_save_restore::toolstack::DirectToolstack;
/// use xsr_save_restore::SaveRequest;
/// use xsr_xen_backend::Host;
///
/// # fn example(host: &dyn Host, file: std::fs::File) -> Result<(), Box<dyn std::error::Error>> {
/// # let domid = xsr_xen_backend::DomId(1);
/// let domain = host.domain(domid)?;
/// let mut toolstack = DirectToolstack(&*domain);
/// let saved = SaveRequest::new(&*domain, host.xen_version()?)
///     .write_stream(&mut toolstack, &mut FdSink::new(&file))?;
/// file.sync_all()?;
/// saved.resume()?;
/// # Ok(())
/// # }
/// ```
#[must_use = "a request does nothing until it is run"]
pub struct SaveRequest<'r> {
    pub(super) domain: &'r dyn Domain,
    pub(super) xen: XenVersion,
    pub(super) options: SaveOptions,
    pub(super) live: Option<Live<'r>>,
    pub(super) image: Option<&'r MappedImage<'r>>,
    pub(super) at_freeze: Option<&'r mut (dyn AtFreeze + 'r)>,
    pub(super) progress: Option<&'r mut OnProgress<'r>>,
}

impl fmt::Debug for SaveRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SaveRequest")
            .field("xen", &self.xen)
            .field("options", &self.options)
            .field("live", &self.live)
            .finish_non_exhaustive()
    }
}

impl<'r> SaveRequest<'r> {
    /// A still save, with as many threads as the machine has processors, without an observer. `xen`
    /// goes into the domain header.
    pub fn new(domain: &'r dyn Domain, xen: XenVersion) -> Self {
        Self {
            domain,
            xen,
            options: SaveOptions::default(),
            live: None,
            image: None,
            at_freeze: None,
            progress: None,
        }
    }

    /// Settings that do not change what is written.
    pub fn options(mut self, options: &SaveOptions) -> Self {
        self.options = *options;
        self
    }

    /// Lets the guest run while its memory is written. What it writes meanwhile is written again,
    /// until the policy decides to write the rest with the guest suspended.
    pub fn live<'l: 'r>(mut self, live: Live<'l>) -> Self {
        self.live = Some(Live {
            policy: live.policy,
            verify: live.verify,
        });
        self
    }

    /// Does something else while the guest is suspended, beside the last pass. It is for saves to a
    /// file; the other `write_*` methods than [`write_stream`](Self::write_stream) and
    /// [`write_mapped`](Self::write_mapped) ignore it.
    pub fn at_freeze<'l: 'r>(mut self, hook: &'l mut (dyn AtFreeze + 'l)) -> Self {
        self.at_freeze = Some(hook);
        self
    }

    /// Calls `progress` with the state of the save. The callback can stop the save.
    pub fn observe(mut self, progress: &'r mut OnProgress<'r>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Saves the domain as a libxc stream, and leaves it suspended.
    ///
    /// The stream is complete, END included, when this returns. [`Saved`] decides what becomes of
    /// the domain.
    ///
    /// # Errors
    ///
    /// Any of [`SaveError`], in any phase. The guest continues to run on this host (it is resumed
    /// if it was suspended), the device model has been told to end its log-dirty mode, the dirty
    /// log is off, and no page stays mapped. If the hypervisor refuses to switch the log off, this
    /// is reported in the program's log. The bytes written to the sink are useless; the caller that
    /// opened it removes them. Only [`SaveError::NotResumed`] leaves the domain suspended, and says
    /// so. A domain that another program has resumed meanwhile continues to run, and the cause is
    /// returned.
    pub fn write_stream<'a>(
        self,
        toolstack: &'a mut dyn SaveToolstack,
        sink: &mut dyn PageSink,
    ) -> Result<Saved<'a>, SaveError> {
        let mut this = self;
        let mut hook = this.at_freeze.take();
        let (suspended, stats, ()) = this.with_guest(toolstack, |run, suspended, xen, live| {
            run.phases(xen, suspended, sink, live, &mut hook)
        })?;
        Ok(Saved { stats, suspended })
    }

    /// Saves the domain into an image in which each page has a slot, and leaves it suspended. Of a
    /// page that comes again in a live save, the file holds the last contents alone.
    ///
    /// The domain is not needed any more when this returns: the caller that keeps it resumes it,
    /// and then completes the image ([`MappedImage::finish`]).
    ///
    /// # Errors
    ///
    /// As [`write_stream`](Self::write_stream). With [`Live::verify`]: a page has one slot.
    pub fn write_mapped<'a>(
        mut self,
        toolstack: &'a mut dyn SaveToolstack,
        image: &'r MappedImage<'_>,
    ) -> Result<Saved<'a>, SaveError> {
        if self.live.as_ref().is_some_and(|live| live.verify) {
            let why = "an image with a slot for each page cannot hold all memory twice";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why).into());
        }
        self.image = Some(image);
        let mut sink = image.sink();
        self.write_stream(toolstack, &mut sink)
    }

    /// Saves the domain repeatedly, as a stream of checkpoints (Remus). Its memory is sent once
    /// while it runs, until the policy decides to send the rest with the guest suspended. Each
    /// epoch then sends what the guest has written since the one before, its registers and devices,
    /// and a CHECKPOINT record. The guest runs between epochs, and `toolstack` decides when the
    /// next is due, and which is the last.
    ///
    /// After the last, the guest continues to run, and the dirty log is off. The stream ends after
    /// the CHECKPOINT record, without an END, as Xen's does: END would mark the preceding records
    /// as complete, and the other side could not distinguish the stream from a migration. For a
    /// restorer the stream just breaks off, and it takes over with the last checkpoint. A toolstack
    /// that wants only one of the two to run ensures that the other side is gone before it answers
    /// [`NextEpoch::Finish`](crate::toolstack::NextEpoch::Finish).
    ///
    /// # Errors
    ///
    /// As [`write_stream`](Self::write_stream): in any epoch, the guest continues to run on this
    /// host. Checkpoints that are complete in the stream stay usable. Unless the sink fails, the
    /// stream ends between two records, and the caller can continue it.
    pub fn write_checkpoints(
        self,
        toolstack: &mut dyn CheckpointToolstack,
        sink: &mut dyn PageSink,
        how: Checkpoints<'_>,
    ) -> Result<CheckpointedStats, SaveError> {
        let hold = Hold::new(how.buffer_bytes);
        let mut buffer = EpochBuffer::new(sink, &hold);
        let result = self.with_guest(toolstack, |run, suspended, xen, _| {
            run.epochs(xen, suspended, &mut buffer, &hold, how.policy)
        });
        match result {
            Ok((_, stream, checkpoints)) => Ok(CheckpointedStats {
                stream,
                checkpoints,
            }),
            Err(cause) => {
                // A caller that cancels does not wait for what is kept, which consists of whole
                // records.
                if !matches!(cause, SaveError::Stream(_) | SaveError::Aborted)
                    && let Err(error) = buffer.flush()
                {
                    // The sink has failed then, and the caller knows it.
                    tracing::debug!(
                        error = chain(&error),
                        "the end of the stream could not be written"
                    );
                }
                Err(cause)
            }
        }
    }

    /// Saves the domain as the primary of COLO, checkpoint after checkpoint, as
    /// [`write_checkpoints`](Self::write_checkpoints) does, with two differences. The guest stays
    /// suspended until the toolstack reports that the other end has all of a checkpoint. Each
    /// checkpoint except the first also sends the pages that the secondary has written, which the
    /// secondary lists over `back`.
    ///
    /// After the last, the guest continues to run, and the dirty log is off.
    ///
    /// # Errors
    ///
    /// As [`write_checkpoints`](Self::write_checkpoints); a PV guest; an invalid list from the
    /// secondary.
    pub fn write_colo(
        self,
        toolstack: &mut dyn ColoToolstack,
        sink: &mut dyn PageSink,
        back: &mut dyn BackChannel,
        policy: &mut dyn PrecopyPolicy,
    ) -> Result<CheckpointedStats, SaveError> {
        let (_, stream, checkpoints) = self.with_guest(toolstack, |run, suspended, xen, _| {
            match run.kind.is_translated() {
                true => run.both(xen, suspended, sink, back, policy),
                false => Err(SaveError::ColoGuest),
            }
        })?;
        Ok(CheckpointedStats {
            stream,
            checkpoints,
        })
    }

    /// Runs `phases` with a guest whose device model marks pages meanwhile. If they fail, the guest
    /// continues to run.
    pub(super) fn with_guest<'a, T: SaveToolstack + ?Sized, O>(
        self,
        toolstack: &'a mut T,
        phases: impl FnOnce(
            &mut Run<'_, '_>,
            &mut Suspended<'a, T>,
            XenVersion,
            Option<Live<'r>>,
        ) -> Result<O, SaveError>,
    ) -> Result<(Suspended<'a, T>, SaveStats, O), SaveError> {
        let mut suspended = Suspended::new(toolstack);
        let domain = self.domain;
        let info = domain.info()?;
        if info.kind.is_translated() {
            suspended.logging_on()?;
        }
        let mut unobserved = |_: &Progress| ControlFlow::Continue(());
        let progress: &mut OnProgress<'_> = match self.progress {
            Some(progress) => progress,
            None => &mut unobserved,
        };
        let mut run = Run::new(domain, &info, &self.options, self.image, progress);
        let result = phases(&mut run, &mut suspended, self.xen, self.live);
        let stats = run.stats;
        suspended.logging_off();
        match result {
            Ok(out) => Ok((suspended, stats, out)),
            Err(cause) => Err(give_back(domain, &mut suspended, cause)),
        }
    }
}
