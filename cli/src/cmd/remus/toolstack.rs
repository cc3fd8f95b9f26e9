//! The toolstack of a protected domain between two checkpoints.
//!
//! C implementation: `tools/libs/light/libxl_remus.c`, `libxl_stream_write.c`
//! (`libxl__stream_write_start_checkpoint`).

use std::io;
use std::time::Duration;

use anyhow::Result;
use xsr_format::wrapper::libxl::{EmulatorId, EmulatorInstance, LibxlRecord, LibxlWriter};
use xsr_save_restore::migrate::connection::{Connection, ConnectionError, Received, Wait};
use xsr_save_restore::migrate::messages::LastWords;
use xsr_save_restore::pace::Pace;
use xsr_save_restore::toolstack::{
    CheckpointToolstack, DirectToolstack, Epoch, NextEpoch, SaveToolstack, ToolstackError,
};

use xsr_xen_backend::GuestKind;

use super::stream::Stream;
use crate::interrupt::Interrupt;

/// Why there are no more checkpoints, if nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The user asked to stop.
    Asked,
    /// The requested number of checkpoints is complete.
    Enough,
    /// The receiver sent a message or hung up. While it is well it is silent.
    Receiver,
}

/// The device model's state in each checkpoint.
#[derive(Debug)]
pub(super) struct DeviceModel {
    records: Vec<LibxlRecord>,
    /// Whether it is the mock machine's, which counts its saves. The stored state of a real one is
    /// from the domain's creation.
    counts: bool,
    saves: u64,
}

/// The start of a mock device model's state. The count follows, in 8 bytes.
const COUNTS: &[u8] = b"xsr mock device model: ";

impl DeviceModel {
    /// From the stored state. An HVM guest without one gets the mock machine's.
    pub(super) fn of(kind: GuestKind, records: Vec<LibxlRecord>) -> Self {
        let mut model = Self {
            records,
            counts: false,
            saves: 0,
        };
        if kind == GuestKind::Hvm && model.records.is_empty() {
            model.records.push(LibxlRecord::EmulatorContext {
                emulator: EmulatorInstance {
                    id: EmulatorId::QemuUpstream,
                    index: 0,
                },
                state: COUNTS.to_vec(),
            });
        }
        if let [LibxlRecord::EmulatorContext { state, .. }] = model.records.as_slice() {
            model.counts = state.starts_with(COUNTS);
        }
        model
    }

    fn save(&mut self) -> &[LibxlRecord] {
        self.saves += 1;
        if self.counts
            && let [LibxlRecord::EmulatorContext { state, .. }] = self.records.as_mut_slice()
        {
            state.truncate(COUNTS.len());
            state.extend(self.saves.to_le_bytes());
        }
        &self.records
    }
}

/// A checkpoint that is complete on this side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Complete {
    pub(super) epoch: Epoch,
    /// From asking the guest to suspend until everything was written, including the libxl layer's
    /// part.
    pub(super) after: Duration,
}

/// The toolstack of a protected domain.
pub(super) struct Protector<'a> {
    pub(super) direct: DirectToolstack<'a>,
    pub(super) libxl: LibxlWriter<&'a Stream<'a>>,
    /// The stream that `libxl` writes to.
    pub(super) stream: &'a Stream<'a>,
    pub(super) emulators: DeviceModel,
    /// The minimum rate at which the receiver must read, which is told when the guest is suspended
    /// and resumed.
    pub(super) pace: &'a Pace,
    /// The connection for the receiver's messages; `None` without a receiver.
    pub(super) from: Option<&'a dyn Connection>,
    /// The message that the receiver has sent unexpectedly.
    pub(super) heard: LastWords,
    pub(super) interrupt: Interrupt,
    pub(super) interval: Duration,
    /// The number of checkpoints to take; `None` for no limit.
    pub(super) epochs: Option<u64>,
    pub(super) observe: &'a mut dyn FnMut(&Complete) -> Result<()>,
    /// Called when the last byte of a checkpoint has been written.
    pub(super) completed: &'a mut dyn FnMut(),
    /// Checkpoints whose last byte has been written.
    pub(super) complete: u64,
    pub(super) stop: Option<Stop>,
}

impl std::fmt::Debug for Protector<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Protector")
            .field("complete", &self.complete)
            .field("stop", &self.stop)
            .finish_non_exhaustive()
    }
}

impl SaveToolstack for Protector<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.direct.suspend()?;
        self.pace.suspended();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.pace.resumed();
        self.direct.resume()
    }

    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        self.direct.switch_qemu_logdirty(on)
    }
}

impl CheckpointToolstack for Protector<'_> {
    fn postcopy(&mut self) -> Result<(), ToolstackError> {
        self.pace.resumed();
        self.direct.resume()
    }

    /// The libxl layer's records, then the interval. A Remus checkpoint is not acknowledged: all
    /// that is known is that it has been written.
    fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.end_of_checkpoint()?;
        self.tell(*epoch)?;
        let stop = self.wait();
        self.stop = stop.map_err(|e| ToolstackError::new("waiting for the next checkpoint", e))?;
        Ok(match self.stop {
            None => NextEpoch::Continue,
            Some(_) => NextEpoch::Finish,
        })
    }
}

impl Protector<'_> {
    /// The libxl layer's part of a checkpoint.
    pub(super) fn end_of_checkpoint(&mut self) -> Result<(), ToolstackError> {
        const WHAT: &str = "ending a checkpoint";
        self.libxl.begin_checkpoint();
        for record in self.emulators.save() {
            let written = self.libxl.write(record);
            written.map_err(|e| ToolstackError::new(WHAT, e))?;
        }
        if self.complete == 0 {
            // From here on the secondary can take over, and must be told not to when this command
            // stops.
            let asked = self.interrupt.takes_its_time();
            asked.map_err(|e| ToolstackError::new(WHAT, e))?;
        }
        let written = self.libxl.write(&LibxlRecord::CheckpointEnd);
        written.map_err(|e| ToolstackError::new(WHAT, e))?;
        self.complete += 1;
        (self.completed)();
        Ok(())
    }

    /// Report a complete checkpoint.
    pub(super) fn tell(&mut self, epoch: Epoch) -> Result<(), ToolstackError> {
        let complete = Complete {
            epoch,
            after: epoch.asked.elapsed(),
        };
        (self.observe)(&complete).map_err(|e| ToolstackError::new("saying what was done", e))
    }

    /// Wait until the next checkpoint is due. Returns what ended the wait early, and with it the
    /// protection.
    pub(super) fn wait(&mut self) -> io::Result<Option<Stop>> {
        if self.epochs.is_some_and(|enough| self.complete >= enough) {
            return Ok(Some(Stop::Enough));
        }
        self.stream.waits();
        let cancel = self.interrupt.cancel();
        let Some(connection) = self.from else {
            self.interrupt.pause(self.interval);
            return Ok(cancel.is_cancelled().then_some(Stop::Asked));
        };
        let mut byte = [0];
        let wait = Wait::forever().at_most(self.interval).unless(cancel);
        match connection.read(&mut byte, &wait) {
            Err(ConnectionError::TimedOut(_)) => Ok(None),
            Err(ConnectionError::Cancelled) => Ok(Some(Stop::Asked)),
            Err(error @ ConnectionError::Local(_)) => Err(error.into()),
            Ok(Received::Bytes(_)) => {
                self.heard.push(&byte);
                Ok(Some(Stop::Receiver))
            }
            Ok(Received::Closed) | Err(_) => Ok(Some(Stop::Receiver)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::fs::File;
    use std::io::Read as _;
    use std::os::fd::OwnedFd;

    use xsr_save_restore::migrate::connection::PipeConnection;
    use xsr_save_restore::{SaveError, SaveOptions};
    use xsr_xen_backend::Host as _;
    use xsr_xen_backend::domain_store::DomainRef;
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};

    use super::*;
    use crate::cmd::save::{Form, Job};

    /// A later signal would cut the connection without telling the secondary.
    #[test]
    fn who_is_asked_to_stop_before_the_first_checkpoint_is_whole_does_not_complete_it() {
        let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
        let guest = GuestSpec::new("web", GuestKind::Pvh, 8);
        let domid = host.create_guest(&guest).unwrap();
        let domain = host.domain(domid).unwrap();
        let job = Job {
            host: &host,
            which: DomainRef::from(&domain.info().unwrap()),
            domain: domain.as_ref(),
            form: Form::Xl,
            options: SaveOptions::default(),
        };
        let interrupt = Interrupt::catch().unwrap();
        for asked in [false, true] {
            let (mut from, to) = io::pipe().unwrap();
            let nothing = File::open("/dev/null").unwrap();
            let to = PipeConnection::new(nothing.into(), OwnedFd::from(to), "there").unwrap();
            let pace = Pace::new(Duration::from_secs(60));
            let (ended, complete) = {
                let stream = Stream::new(&to, Wait::forever().keeping(&pace));
                let mut protector = Protector {
                    direct: DirectToolstack(domain.as_ref()),
                    libxl: job.begin(&stream).unwrap(),
                    stream: &stream,
                    emulators: DeviceModel::of(GuestKind::Pvh, Vec::new()),
                    pace: &pace,
                    from: None,
                    heard: LastWords::default(),
                    interrupt: interrupt.clone(),
                    interval: Duration::ZERO,
                    epochs: None,
                    observe: &mut |_| Ok(()),
                    completed: &mut || {},
                    complete: 0,
                    stop: None,
                };
                if asked {
                    interrupt.cancel().cancel();
                }
                let ended = protector.end_of_checkpoint();
                (ended, protector.complete)
            };
            drop(to);
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).unwrap();
            let whole = bytes.ends_with(&[4, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!((whole, complete), (!asked, u64::from(!asked)));
            match ended {
                Ok(()) => assert!(!asked),
                Err(error) => assert!(matches!(SaveError::from(error), SaveError::Aborted)),
            }
        }
    }
}
