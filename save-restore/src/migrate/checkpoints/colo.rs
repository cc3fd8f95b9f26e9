//! The toolstack of a COLO primary between two checkpoints: as under Remus, but the secondary takes
//! part.
//!
//! C implementation: `tools/libs/light/libxl_colo_save.c`. Its network and disk support
//! (colo-proxy, replication) has no counterpart here, because a mock guest has neither.

use std::cell::RefCell;
use std::io::{self, Read};
use std::time::Instant;

use xsr_format::wrapper::libxl::CheckpointState;

use super::super::messages::{ColoWord, LastWords, Withdrawal};
use super::hearing::Hearing;
use super::remus::RemusToolstack;
use super::{CheckpointStream, Stop};
use crate::back_channel::BackChannel;
use crate::toolstack::{
    CheckpointToolstack, ColoToolstack, Epoch, NextEpoch, SaveToolstack, ToolstackError,
};

/// The secondary's state, as far as its primary knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It has not received the first checkpoint completely, or is in the middle of libxl's part of
    /// one.
    Nothing,
    /// It runs, and waits for a message.
    Waits,
    /// It waits for the records of a checkpoint.
    Reads,
    /// It has a checkpoint, and will wait for a message after reporting that it runs.
    Applies,
}

/// The toolstack of such a domain.
pub(super) struct ColoPrimary<'p, 'a> {
    protector: &'p mut RemusToolstack<'a>,
    stream: &'p CheckpointStream<'a>,
    hearing: &'p Ear<'a>,
    place: Place,
    /// The checkpoint that the secondary is applying.
    epoch: Option<Epoch>,
}

impl std::fmt::Debug for ColoPrimary<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ColoPrimary")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

/// The secondary's messages, which the engine and this toolstack read in turn.
#[derive(Debug)]
pub(super) struct Ear<'a>(RefCell<Hearing<'a>>);

impl<'a> Ear<'a> {
    pub(super) fn new(hearing: Hearing<'a>) -> Self {
        Self(RefCell::new(hearing))
    }

    /// The message that the secondary has sent in place of the expected one, if it has given up.
    pub(super) fn given_up(&self) -> Option<io::Error> {
        self.0.borrow_mut().given_up()
    }

    /// What came since the last complete message.
    pub(super) fn into_rest(self) -> LastWords {
        self.0.into_inner().into_rest()
    }
}

impl Read for &Ear<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(room)
    }
}

impl BackChannel for &Ear<'_> {
    fn look_ahead(&mut self) -> io::Result<Option<[u8; 8]>> {
        self.0.borrow_mut().look_ahead()
    }
}

impl Place {
    /// What makes the secondary drop its copy in this state, if anything does.
    pub(super) fn withdrawal(self) -> Option<Withdrawal> {
        match self {
            Self::Waits | Self::Applies => Some(Withdrawal::ColoBetween),
            Self::Reads => Some(Withdrawal::ColoWithin),
            Self::Nothing => None,
        }
    }
}

impl<'p, 'a> ColoPrimary<'p, 'a> {
    pub(super) fn new(
        protector: &'p mut RemusToolstack<'a>,
        stream: &'p CheckpointStream<'a>,
        hearing: &'p Ear<'a>,
    ) -> Self {
        Self {
            protector,
            stream,
            hearing,
            place: Place::Nothing,
            epoch: None,
        }
    }

    fn hear(&self, what: &'static str, state: CheckpointState) -> Result<(), ToolstackError> {
        self.stream.waits();
        let heard = self.hearing.0.borrow_mut().expect(state);
        heard.map_err(|error| ToolstackError::new(what, error))
    }

    /// The secondary's state.
    pub(super) fn place(&self) -> Place {
        self.place
    }
}

impl SaveToolstack for ColoPrimary<'_, '_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.protector.suspend()?;
        match self.place {
            Place::Reads => self.hear("suspending the secondary", CheckpointState::Suspended),
            _ => Ok(()),
        }
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.protector.resume()
    }

    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        self.protector.switch_qemu_logdirty(on)
    }
}

impl CheckpointToolstack for ColoPrimary<'_, '_> {
    /// The secondary reports that it has the checkpoint, and then that it runs.
    fn postcopy(&mut self) -> Result<(), ToolstackError> {
        const WHAT: &str = "letting the guest run at both ends";
        self.hear(WHAT, CheckpointState::Ready)?;
        self.protector.postcopy()?;
        let ran = Instant::now();
        self.hear(WHAT, CheckpointState::Resumed)?;
        self.place = Place::Waits;
        let Some(mut epoch) = self.epoch.take() else {
            return Err(ToolstackError::new(WHAT, "no checkpoint has been sent"));
        };
        epoch.suspended_for = ran.duration_since(epoch.asked);
        self.protector.tell(epoch)
    }

    fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.place = Place::Nothing;
        self.epoch = Some(*epoch);
        self.protector.end_of_checkpoint()?;
        self.place = Place::Applies;
        Ok(NextEpoch::Continue)
    }
}

impl ColoToolstack for ColoPrimary<'_, '_> {
    /// The output of the two guests is not compared here: a checkpoint is due when the interval is
    /// over.
    fn wait_checkpoint(&mut self) -> Result<NextEpoch, ToolstackError> {
        const WHAT: &str = "asking for a new checkpoint";
        let stop = self.protector.wait();
        self.protector.stop = stop.map_err(|e| ToolstackError::new(WHAT, e))?;
        if let Some(stop) = self.protector.stop {
            if stop == Stop::Receiver {
                self.place = Place::Nothing;
            }
            return Ok(NextEpoch::Finish);
        }
        self.place = Place::Reads;
        let mut stream = self.stream;
        let asked = ColoWord::State(CheckpointState::New).write(&mut stream);
        asked.map_err(|e| ToolstackError::new(WHAT, e))?;
        Ok(NextEpoch::Continue)
    }
}
