//! Restoring under COLO: the guest also runs on the secondary, from checkpoint to checkpoint.
//!
//! C implementation: `xg_sr_restore.c:handle_checkpoint` for `XC_STREAM_COLO`,
//! `send_checkpoint_dirty_pfn_list`.

use std::io::{self, Write};

use xsr_format::frame::Pfn;
use xsr_format::read::RecordReader;
use xsr_format::record::dirty_pfns::dirty_pfns;
use xsr_xen_backend::{DirtyBitmap, DirtyRead};

use crate::error::RestoreError;
use crate::progress::{Cancelled, Phase};
use crate::restore::checkpoint::{Came, SoFar, Survivor};
use crate::restore::crew::Hands;
use crate::restore::spool::Tap;
use crate::restore::{Restored, Run, Stop, go_on};
use crate::source::PageSource;
use crate::toolstack::{Arrival, ColoRestoreToolstack, ToolstackError, Turn};

impl<T: ColoRestoreToolstack + ?Sized> Run<'_, '_, T> {
    pub(super) fn both<S: PageSource>(
        &mut self,
        mut reader: RecordReader<Tap<S>>,
        back: &mut dyn Write,
        hands: &Hands<'_, '_>,
    ) -> Result<Survivor<S>, RestoreError> {
        match self.records(&mut reader, hands)? {
            Stop::Checkpoint if matches!(self.arrival(&mut reader)?, Came::Whole) => {}
            _ => return Err(RestoreError::NoCheckpoint),
        }
        let mut so_far = SoFar::default();
        loop {
            so_far.checkpoints += 1;
            let restored: Restored = self.end(hands)?;
            go_on(self.progress.begin(Phase::Checkpoint, None))?;
            let came = match self.turn(&mut reader)? {
                Turn::Lost => Came::ToolstackLost,
                Turn::Done => {
                    let list = self.dirty_list()?;
                    match back.write_all(&list).and_then(|()| back.flush()) {
                        Ok(()) => self.keep_and_apply(&mut reader, hands, &mut so_far)?,
                        Err(error) if Cancelled::is(&error) => return Err(RestoreError::Aborted),
                        // The primary is lost, as if it sent nothing any more.
                        Err(error) => Came::BackChannelLost(error),
                    }
                }
            };
            if !matches!(came, Came::Whole) {
                return Ok(so_far.survivor(restored, came, reader));
            }
        }
    }

    /// The guest's turn: it runs until the primary wants a checkpoint.
    fn turn<S: PageSource>(
        &mut self,
        reader: &mut RecordReader<Tap<S>>,
    ) -> Result<Turn, ToolstackError> {
        if self.toolstack.postcopy()? == Turn::Lost {
            return Ok(Turn::Lost);
        }
        match self.toolstack.wait_checkpoint()? {
            Arrival::Whole { bytes } => reader.advance(bytes),
            Arrival::Lost => return Ok(Turn::Lost),
        }
        self.toolstack.suspend()
    }

    /// The pages that differ from the last checkpoint, for the primary.
    fn dirty_list(&mut self) -> Result<Vec<u8>, RestoreError> {
        let failed = |cause: Box<dyn std::error::Error + Send + Sync>| {
            RestoreError::BackChannel(io::Error::other(cause))
        };
        // An empty list would mean that the guest has written nothing.
        let Some(last) = self.domain.maximum_gfn()? else {
            return Err(failed(
                "the hypervisor says that the guest has no page".into(),
            ));
        };
        let pfns = last.0 + 1;
        let mut dirty = DirtyBitmap::new(pfns);
        self.domain.read_dirty(DirtyRead::Clean, &mut dirty)?;
        let pfns: Vec<Pfn> = dirty.iter().collect();
        dirty_pfns(&pfns).map_err(|error| failed(error.into()))
    }
}
