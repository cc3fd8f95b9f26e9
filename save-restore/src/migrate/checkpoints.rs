//! Checkpoints of a protected domain, sent over a connection until the protection ends. This is the
//! layer between the engine, which takes the checkpoints, and [`super::protect`], which decides
//! which host has the domain at the end.
//!
//! C implementation: `tools/libs/light/libxl_remus.c`, `libxl_colo_save.c`.

mod colo;
mod hearing;
mod remus;
mod stream;

use std::fmt;
use std::io;
use std::time::Duration;

use xsr_format::wrapper::libxl::{LibxlRecord, LibxlWriter};
use xsr_xen_backend::Domain;

use self::colo::{ColoPrimary, Ear};
use self::hearing::Hearing;
use self::remus::RemusToolstack;
use super::BoxError;
use super::connection::{Connection, Wait};
use super::messages::{LastWords, Withdrawal};
use crate::back_channel::BackChannelError;
use crate::error::SaveError;
use crate::pace::Pace;
use crate::progress::Cancel;
use crate::save::precopy::XenPolicy;
use crate::save::{BUFFER_BYTES, CheckpointedStats, Checkpoints, SaveRequest};
use crate::toolstack::{DirectToolstack, Epoch};

pub use self::stream::CheckpointStream;

/// Why sending ended, if nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The caller asked to stop.
    Asked,
    /// The requested number of checkpoints is complete.
    Enough,
    /// The other end sent something, or hung up: it sends nothing while it is well.
    Receiver,
}

/// A checkpoint that is complete at this end.
#[derive(Clone, Copy, Debug)]
pub struct Complete {
    /// The engine's statistics of it.
    pub epoch: Epoch,
    /// The time from asking the guest to suspend until everything was written, including the libxl
    /// layer's part.
    pub after: Duration,
}

/// A callback for each complete checkpoint. Its failure ends the protection.
pub type OnComplete<'a> = dyn FnMut(&Complete) -> Result<(), BoxError> + 'a;

/// The emulators of a protected domain.
pub trait Emulators {
    /// Their current state, as records of a libxl stream.
    fn save(&mut self) -> &[LibxlRecord];
}

/// A domain without emulators.
#[derive(Clone, Copy, Debug)]
pub struct NoEmulators;

impl Emulators for NoEmulators {
    fn save(&mut self) -> &[LibxlRecord] {
        &[]
    }
}

/// A request to stop sending checkpoints.
///
/// This needs two tokens. One asks for the stop ([`StopRequest::cancel`]). The other cuts the
/// connection, and is the one that the `Wait` of the [`CheckpointStream`] checks. If a single token
/// did both, an ordinary stop after the first checkpoint would cut the connection before the other
/// end is told not to take over, and the domain would run on both hosts. Therefore [`Cancel`] does
/// not implement this trait:
///
/// ```compile_fail,E0277
/// use xsr_save_restore::progress::Cancel;
/// use xsr_save_restore::migrate::checkpoints::StopRequest;
///
/// let cancel = Cancel::default();
/// let stopping: &dyn StopRequest = &cancel;
/// ```
pub trait StopRequest {
    /// The token that another thread sets.
    fn cancel(&self) -> &Cancel;

    /// Called when the first checkpoint is about to be complete. From here on the other end can
    /// take over, and must be told not to. While it can be told, nothing may cut the connection.
    ///
    /// # Errors
    ///
    /// [`Cancelled`](crate::progress::Cancelled): the stop was requested before, so the connection
    /// may be cut at any moment. The checkpoint is then not completed.
    fn takes_its_time(&self) -> io::Result<()>;
}

/// Settings for sending checkpoints.
pub struct CheckpointRequest<'a> {
    domain: &'a dyn Domain,
    save: SaveRequest<'a>,
    interval: Duration,
    epochs: Option<u64>,
    buffer_bytes: usize,
    colo: Option<(Wait<'a>, Duration)>,
}

impl fmt::Debug for CheckpointRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointRequest")
            .field("interval", &self.interval)
            .field("epochs", &self.epochs)
            .field("buffer_bytes", &self.buffer_bytes)
            .finish_non_exhaustive()
    }
}

/// The objects that take part in sending checkpoints.
pub struct CheckpointParties<'a> {
    /// The libxl layer of the stream, up to its libxc stream.
    pub libxl: LibxlWriter<&'a CheckpointStream<'a>>,
    /// The stream to which `libxl` writes.
    pub stream: &'a CheckpointStream<'a>,
    /// The connection on which the other end sends messages; `None` if there is none.
    pub connection: Option<&'a dyn Connection>,
    /// The pace that the other end must keep. It is told when the guest is suspended and resumed.
    pub pace: &'a Pace,
    /// The emulators of the domain.
    pub emulators: &'a mut dyn Emulators,
    /// The request to stop.
    pub stopping: &'a dyn StopRequest,
    /// Called when the last byte of a checkpoint has been written.
    pub completed: &'a mut dyn FnMut(),
    /// Called when a checkpoint is complete. Under COLO the secondary then has it.
    pub observe: &'a mut OnComplete<'a>,
}

impl fmt::Debug for CheckpointParties<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointParties")
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

/// The outcome of sending checkpoints.
#[derive(Debug)]
pub struct SentCheckpoints {
    /// Why sending ended.
    pub ended: Result<Stop, SaveError>,
    /// Statistics of the checkpoints that were sent; empty after a failure.
    pub stats: CheckpointedStats,
    /// The number of checkpoints that the other end may have.
    pub complete: u64,
    /// How to take the domain back at this place in the stream.
    pub withdrawal: Option<Withdrawal>,
    /// What the other end has sent that was not understood as anything else.
    pub heard: LastWords,
    /// What a COLO secondary sent instead of an answer, if it has given up.
    pub given_up: Option<io::Error>,
}

impl<'a> CheckpointRequest<'a> {
    /// Remus checkpoints, five a second, until the request to stop. `save` says how each is saved,
    /// and must be a request for the same domain.
    pub fn new(domain: &'a dyn Domain, save: SaveRequest<'a>) -> Self {
        Self {
            domain,
            save,
            interval: Duration::from_millis(200),
            epochs: None,
            buffer_bytes: BUFFER_BYTES,
            colo: None,
        }
    }

    /// Sets how long the domain runs from one checkpoint to the next.
    #[must_use]
    pub const fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Sets the number of checkpoints to send; `None` for no limit.
    #[must_use]
    pub const fn epochs(mut self, epochs: Option<u64>) -> Self {
        self.epochs = epochs;
        self
    }

    /// Sets how many bytes of a checkpoint are kept while the guest is suspended
    /// ([`Checkpoints::buffer_bytes`]).
    #[must_use]
    pub const fn buffer_bytes(mut self, bytes: usize) -> Self {
        self.buffer_bytes = bytes;
        self
    }

    /// Uses COLO instead of Remus. `wait` limits how long to listen to the secondary, and `answer`
    /// how long it may take to answer. COLO needs a connection: without one nothing is sent
    /// ([`SaveError`]).
    #[must_use]
    pub const fn colo(mut self, wait: Wait<'a>, answer: Duration) -> Self {
        self.colo = Some((wait, answer));
        self
    }

    /// Sends checkpoint after checkpoint. The guest is running afterwards, unless the engine could
    /// not resume it.
    pub fn run(self, parties: CheckpointParties<'a>) -> SentCheckpoints {
        let CheckpointParties {
            libxl,
            stream,
            connection,
            pace,
            emulators,
            stopping,
            completed,
            observe,
        } = parties;
        let Self {
            domain,
            save,
            interval,
            epochs,
            buffer_bytes,
            colo,
        } = self;
        let mut toolstack = RemusToolstack {
            direct: DirectToolstack(domain),
            libxl,
            stream,
            emulators,
            pace,
            from: connection,
            heard: LastWords::default(),
            stopping,
            interval,
            epochs,
            observe,
            completed,
            complete: 0,
            stop: None,
        };
        let mut sent = SentCheckpoints {
            ended: Ok(Stop::Asked),
            stats: CheckpointedStats::default(),
            complete: 0,
            withdrawal: Some(Withdrawal::Remus),
            heard: LastWords::default(),
            given_up: None,
        };
        let result = match (connection, colo) {
            (Some(connection), Some((wait, answer))) => Hearing::new(connection, wait, answer)
                .map_err(|error| BackChannelError::Io(error).into())
                .and_then(|hearing| send_colo(save, hearing, &mut toolstack, &mut sent)),
            (None, Some(_)) => {
                let why = "COLO needs a connection on which the secondary answers";
                Err(BackChannelError::Io(io::Error::new(io::ErrorKind::InvalidInput, why)).into())
            }
            (_, None) => {
                let how = Checkpoints {
                    policy: &mut XenPolicy,
                    buffer_bytes,
                };
                save.write_checkpoints(&mut toolstack, &mut &*stream, how)
            }
        };
        sent.heard.push(toolstack.heard.bytes());
        sent.complete = toolstack.complete;
        match result {
            Ok(stats) => {
                sent.stats = stats;
                sent.ended = Ok(toolstack.stop.unwrap_or(Stop::Asked));
            }
            Err(SaveError::Aborted) => {}
            Err(error) => sent.ended = Err(error),
        }
        sent
    }
}

fn send_colo<'a>(
    save: SaveRequest<'_>,
    hearing: Hearing<'a>,
    toolstack: &mut RemusToolstack<'a>,
    sent: &mut SentCheckpoints,
) -> Result<CheckpointedStats, SaveError> {
    let (ear, stream) = (Ear::new(hearing), toolstack.stream);
    let mut primary = ColoPrimary::new(toolstack, stream, &ear);
    let result = save.write_colo(&mut primary, &mut &*stream, &mut &ear, &mut XenPolicy);
    sent.withdrawal = primary.place().withdrawal();
    sent.given_up = result.as_ref().err().and_then(|_| ear.given_up());
    sent.heard = ear.into_rest();
    result
}
