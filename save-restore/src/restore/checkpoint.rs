//! Restoring a stream with checkpoints: each checkpoint is applied when it is complete, and once
//! the sender is lost, the guest is the last complete one.
//!
//! C implementation: `xg_sr_restore.c:handle_checkpoint`, and the end of `restore` there.

use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use xsr_format::error::{ReadError, ReadErrorCause};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::{Incoming, RecordReader};
use xsr_format::record::RecordKind;

use crate::error::RestoreError;
use crate::progress::{Cancelled, Phase};
use crate::restore::crew::Hands;
use crate::restore::spool::{Spool, Tap};
use crate::restore::{Restored, Run, Stop, go_on, with_crew};
use crate::source::PageSource;
use crate::toolstack::{Arrival, CheckpointRestoreToolstack};

/// Default for the bytes of a checkpoint that are kept in memory: 64 MiB.
pub const MEMORY_BYTES: usize = 64 << 20;

/// Where a checkpoint is kept until it is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// How many bytes of it are kept in memory ([`MEMORY_BYTES`] by default). The rest goes to a
    /// temporary file without a name, which grows with the checkpoint.
    pub memory_bytes: usize,
    /// The maximum size of that file. By default (`None`) it is the size of the domain's largest
    /// possible checkpoint: all the pages that it may have, each once, and 64 MiB for everything
    /// else. A faulty sender therefore cannot fill the disk.
    pub file_bytes: Option<u64>,
    /// The directory of that file; by default the system's directory for temporary files.
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
    /// The frames of its rings, and statistics.
    pub restored: Restored,
    /// Complete checkpoints; the guest is the last of them.
    pub checkpoints: u64,
    /// The most bytes of one checkpoint that were kept until it was complete.
    pub most_kept_bytes: u64,
    /// The most bytes of one checkpoint that were in the file.
    pub most_spilt_bytes: u64,
    /// Why no further checkpoint came.
    pub ending: Ending<S>,
}

/// How a stream with checkpoints ended.
#[derive(Debug)]
pub enum Ending<S> {
    /// With an END record; the source is positioned directly after it. Records between the last
    /// checkpoint and END are not a checkpoint and were dropped. A stream without any checkpoint is
    /// a plain one, and its records were applied.
    Ended(S),
    /// The source failed or ended: the sender is lost. This is the case that checkpoints are for,
    /// not an error.
    SourceLost(ReadError),
    /// The toolstack found that the sender is lost ([`Arrival::Lost`]).
    ToolstackLost,
    /// The sender no longer took what the back channel sent (COLO).
    BackChannelLost(io::Error),
}

/// The size of the largest checkpoint of a guest that may have this many pages: each pfn comes
/// once, and fewer pfns come without a page than with one.
fn largest(max_pages: u64) -> u64 {
    const PFN: u64 = PAGE_SIZE as u64 + 16;
    const REST: u64 = 64 << 20;
    max_pages.saturating_mul(PFN).saturating_add(REST)
}

/// How one checkpoint arrived.
pub(super) enum Came {
    Whole,
    Ended,
    SourceLost(ReadError),
    ToolstackLost,
    BackChannelLost(io::Error),
}

/// The state of the checkpoints so far.
#[derive(Debug, Default)]
pub(super) struct SoFar {
    /// Checkpoints that have been applied.
    pub(super) checkpoints: u64,
    most_kept: u64,
    most_spilt: u64,
}

impl SoFar {
    /// The guest is in its final state.
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
    /// Calls `follow` for a stream whose checkpoints can be kept.
    pub(super) fn checkpoints<S: PageSource>(
        &mut self,
        reader: RecordReader<S>,
        keep: &CheckpointOptions,
        threads: Option<NonZeroUsize>,
        follow: impl FnOnce(
            &mut Self,
            RecordReader<Tap<S>>,
            &Hands<'_, '_>,
        ) -> Result<Survivor<S>, RestoreError>,
    ) -> Result<Survivor<S>, RestoreError> {
        with_crew(self.pages.placer(), threads, |hands| {
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

    pub(super) fn epochs<S: PageSource>(
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
        // A failure to place a piece must show before the checkpoint counts.
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

    /// Keeps the next checkpoint, and applies it once it is complete.
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
            // A failure earlier in the stream has precedence.
            let applied = hands.crew.finish().and(applied);
            applied.map_err(|cause| RestoreError::not_applied(so_far.checkpoints + 1, cause))?;
        }
        Ok(came)
    }

    /// Reads the records of one checkpoint, which the tap keeps. Applies none of them.
    fn keep<S: PageSource>(
        &mut self,
        reader: &mut RecordReader<Tap<S>>,
    ) -> Result<Came, RestoreError> {
        loop {
            let bytes = match reader.next_record() {
                // Its pages are skipped, and thereby kept, too.
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

    /// The CHECKPOINT record has arrived. The toolstack reads its own part.
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

/// Whether the stream broke off, as opposed to breaking a rule. A restore of checkpoints takes over
/// then ([`Ending::SourceLost`]). Also for a toolstack that reads a part of the stream itself.
pub fn is_loss(error: &ReadError) -> bool {
    match &error.cause {
        ReadErrorCause::Truncated { .. } => true,
        ReadErrorCause::Io(error) => !Cancelled::is(error),
        _ => false,
    }
}
