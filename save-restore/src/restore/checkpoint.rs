//! A restore of a stream with checkpoints: each is applied when all of it has come, and
//! when the sender is gone, the last one that was complete is the guest.
//!
//! C implementation: `xg_sr_restore.c:handle_checkpoint`, and the end of `restore` there.

use std::io;
use std::path::PathBuf;

use xsr_format::error::{ReadError, ReadErrorCause};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::{Incoming, RecordReader};
use xsr_format::record::RecordKind;
use xsr_xen_backend::Domain;

use crate::error::RestoreError;
use crate::progress::{Cancelled, OnProgress, Phase};
use crate::restore::crew::Hands;
use crate::restore::spool::{Spool, Tap};
use crate::restore::{RestoreOptions, Restored, Run, Stop, go_on, with_crew};
use crate::source::PageSource;
use crate::toolstack::{Arrival, CheckpointRestoreToolstack};

/// Bytes of a checkpoint that are kept in memory, where nobody says: 64 MiB.
pub const MEMORY_BYTES: usize = 64 << 20;

/// Where a checkpoint is kept until it is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// How much of it in memory, in bytes ([`MEMORY_BYTES`] by default). What is more
    /// goes to a temporary file without a name, which grows with the checkpoint.
    pub memory_bytes: usize,
    /// How many bytes that file may have; by default (`None`) as many as the largest
    /// checkpoint of the domain has, and no disk is filled by a sender that goes mad: all
    /// the pages that it may have, each once, and 64 MiB for everything else.
    pub file_bytes: Option<u64>,
    /// Where that file is made; by default the system's directory for such files.
    pub directory: PathBuf,
}

impl Default for CheckpointOptions {
    fn default() -> Self {
        Self {
            memory_bytes: MEMORY_BYTES,
            file_bytes: None,
            directory: std::env::temp_dir(),
        }
    }
}

/// A guest that is the last complete checkpoint of a stream; its domain is still paused.
#[derive(Debug)]
pub struct Survivor<S> {
    /// Where its rings are, and what it took.
    pub restored: Restored,
    /// Checkpoints that were complete; the last is this guest.
    pub checkpoints: u64,
    /// Most bytes of one checkpoint that were kept until it was complete.
    pub most_kept_bytes: u64,
    /// Most bytes of one checkpoint that were in the file.
    pub most_spilt_bytes: u64,
    /// Why there was no other.
    pub ending: Ending<S>,
}

/// How a stream with checkpoints came to its end.
#[derive(Debug)]
pub enum Ending<S> {
    /// With an END record: the source, right behind it. What came between the last
    /// checkpoint and it is no checkpoint, and was dropped, but in a stream that had none
    /// at all, which is a plain one.
    Ended(S),
    /// The source failed or ended: the sender is gone. That is what checkpoints are for,
    /// and no error.
    SourceLost(ReadError),
    /// The toolstack found that the sender is gone ([`Arrival::Lost`]).
    ToolstackLost,
    /// The sender took nothing any more of what it is told (COLO).
    BackChannelLost(io::Error),
}

/// Restore a stream of checkpoints into a domain that has just been created (as for
/// [`restore`](crate::restore())), until the sender is gone. Then the domain is the guest
/// as it was at the last checkpoint that was complete, and not in part of the one that was
/// not.
///
/// What comes before the first CHECKPOINT goes into the domain as it comes: there is
/// nothing to go back to. What comes after it is kept, as `keep` says, and applied when
/// the next CHECKPOINT is there and `toolstack` has all that belongs to it.
///
/// # Errors
///
/// As for [`restore`](crate::restore()), and the domain is of no use then either. Before
/// the first checkpoint that includes a source that breaks off. After it, it does not; but
/// a stream that breaks a rule, a checkpoint that cannot be kept or applied, a callback
/// that fails, or somebody who stops it, are errors still: the sender may be well. After
/// [`RestoreError::NotApplied`] the domain is a mixture of two checkpoints.
pub fn restore_checkpointed<S: PageSource>(
    domain: &dyn Domain,
    reader: RecordReader<S>,
    toolstack: &mut dyn CheckpointRestoreToolstack,
    options: &RestoreOptions,
    keep: &CheckpointOptions,
    progress: &mut OnProgress<'_>,
) -> Result<Survivor<S>, RestoreError> {
    let mut run = Run::new(domain, &reader, None, toolstack, options, progress)?;
    run.checkpoints(reader, keep, Run::epochs)
}

/// Bytes of the largest checkpoint of a guest that may have so many pages: each pfn comes
/// once, and those that it has no page for are fewer than those that it has.
fn largest(max_pages: u64) -> u64 {
    const PFN: u64 = PAGE_SIZE as u64 + 16;
    const REST: u64 = 64 << 20;
    max_pages.saturating_mul(PFN).saturating_add(REST)
}

/// How one checkpoint came.
pub(super) enum Came {
    Whole,
    Ended,
    SourceLost(ReadError),
    ToolstackLost,
    BackChannelLost(io::Error),
}

/// What there is to say of the checkpoints up to now.
#[derive(Debug, Default)]
pub(super) struct SoFar {
    /// Those that are applied.
    pub(super) checkpoints: u64,
    most_kept: u64,
    most_spilt: u64,
}

impl SoFar {
    /// The guest is what is there now.
    pub(super) fn survivor<S: PageSource>(
        self,
        restored: Restored,
        came: Came,
        reader: RecordReader<Tap<S>>,
    ) -> Survivor<S> {
        Survivor {
            restored,
            checkpoints: self.checkpoints,
            most_kept_bytes: self.most_kept,
            most_spilt_bytes: self.most_spilt,
            ending: match came {
                Came::SourceLost(error) => Ending::SourceLost(error),
                Came::ToolstackLost => Ending::ToolstackLost,
                Came::BackChannelLost(error) => Ending::BackChannelLost(error),
                Came::Whole | Came::Ended => Ending::Ended(reader.into_source().into_source()),
            },
        }
    }
}

impl<T: CheckpointRestoreToolstack + ?Sized> Run<'_, '_, T> {
    /// Have `follow` follow a stream whose checkpoints can be kept.
    pub(super) fn checkpoints<S: PageSource>(
        &mut self,
        reader: RecordReader<S>,
        keep: &CheckpointOptions,
        follow: impl FnOnce(
            &mut Self,
            RecordReader<Tap<S>>,
            &Hands<'_, '_>,
        ) -> Result<Survivor<S>, RestoreError>,
    ) -> Result<Survivor<S>, RestoreError> {
        with_crew(self.pages.placer(), self.options, |hands| {
            go_on(self.progress.begin(Phase::Setup, None))?;
            let standing = reader.onto(io::empty());
            let limit = match keep.file_bytes {
                Some(bytes) => bytes,
                None => largest(self.domain.info()?.max_pages),
            };
            let tap = Tap::new(reader.into_source(), Spool::new(keep, limit));
            follow(self, standing.onto(tap), hands)
        })
    }

    fn epochs<S: PageSource>(
        &mut self,
        mut reader: RecordReader<Tap<S>>,
        hands: &Hands<'_, '_>,
    ) -> Result<Survivor<S>, RestoreError> {
        let mut so_far = SoFar::default();
        let mut came = match self.records(&mut reader, hands)? {
            Stop::End => Came::Ended,
            Stop::Checkpoint => match self.arrival(&mut reader)? {
                Came::Whole => Came::Whole,
                _ => return Err(RestoreError::NoCheckpoint),
            },
        };
        // A piece that could not be placed is found before the checkpoint counts.
        hands.crew.finish()?;
        while let Came::Whole = came {
            so_far.checkpoints += 1;
            self.pages.verify = false;
            go_on(self.progress.begin(Phase::Checkpoint, None))?;
            came = self.keep_and_apply(&mut reader, hands, &mut so_far)?;
        }
        let restored = self.end(hands)?;
        Ok(so_far.survivor(restored, came, reader))
    }

    /// Keep the next checkpoint, and apply it once it is whole.
    pub(super) fn keep_and_apply<S: PageSource>(
        &mut self,
        reader: &mut RecordReader<Tap<S>>,
        hands: &Hands<'_, '_>,
        so_far: &mut SoFar,
    ) -> Result<Came, RestoreError> {
        reader.source_mut().keep()?;
        let standing = reader.onto(io::empty());
        let came = self.keep(reader)?;
        let spool = &mut reader.source_mut().spool;
        so_far.most_kept = spool.len().max(so_far.most_kept);
        so_far.most_spilt = spool.in_file().max(so_far.most_spilt);
        if let Came::Whole = came {
            let applied = self.records(&mut standing.onto(spool), hands);
            // What failed in an earlier place of the stream comes first.
            let applied = hands.crew.finish().and(applied);
            applied.map_err(|cause| RestoreError::not_applied(so_far.checkpoints + 1, cause))?;
        }
        Ok(came)
    }

    /// Read the records of one checkpoint, which the tap keeps. Nothing is applied.
    fn keep<S: PageSource>(
        &mut self,
        reader: &mut RecordReader<Tap<S>>,
    ) -> Result<Came, RestoreError> {
        loop {
            let bytes = match reader.next_record() {
                // Its pages are passed over, and kept with that.
                Ok(Some(Incoming::PageData(body))) => u64::from(body.length()),
                Ok(Some(Incoming::Record(record))) if record.kind == RecordKind::CHECKPOINT => {
                    return self.arrival(reader);
                }
                Ok(Some(Incoming::Record(record))) => record.raw.len() as u64,
                Ok(None) => return Ok(Came::Ended),
                Err(error) => {
                    return match reader.source_mut().failed() {
                        Some(spill) => Err(spill),
                        None if is_loss(&error) => Ok(Came::SourceLost(error)),
                        None => Err(error.into()),
                    };
                }
            };
            go_on(self.progress.advance(0, bytes))?;
        }
    }

    /// The CHECKPOINT record is here. What the toolstack reads is its own.
    pub(super) fn arrival<S: PageSource>(
        &mut self,
        reader: &mut RecordReader<Tap<S>>,
    ) -> Result<Came, RestoreError> {
        Ok(match self.toolstack.checkpoint(reader.offset())? {
            Arrival::Whole { bytes } => {
                reader.advance(bytes);
                Came::Whole
            }
            Arrival::Lost => Came::ToolstackLost,
        })
    }
}

/// Whether the stream did not go on, rather than go on wrongly: what makes a restore of
/// checkpoints take over ([`Ending::SourceLost`]), also for a toolstack that reads part of
/// the stream itself.
pub fn is_loss(error: &ReadError) -> bool {
    match &error.cause {
        ReadErrorCause::Truncated { .. } => true,
        ReadErrorCause::Io(error) => !Cancelled::is(error),
        _ => false,
    }
}
