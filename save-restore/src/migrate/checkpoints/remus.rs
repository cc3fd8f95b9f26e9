//! The toolstack of a protected domain between two checkpoints.
//!
//! C implementation: `tools/libs/light/libxl_remus.c`, `libxl_stream_write.c`
//! (`libxl__stream_write_start_checkpoint`).

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use xsr_format::wrapper::libxl::{LibxlRecord, LibxlWriter};

use super::super::connection::{Connection, ConnectionError, Received, Wait};
use super::super::messages::LastWords;
use super::{CheckpointStream, Complete, Emulators, OnComplete, Stop, StopRequest};
use crate::pace::Pace;
use crate::toolstack::{
    CheckpointToolstack, DirectToolstack, Epoch, NextEpoch, SaveToolstack, ToolstackError,
};

/// How often a wait looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(50);

/// The toolstack of a protected domain.
pub(super) struct RemusToolstack<'a> {
    pub(super) direct: DirectToolstack<'a>,
    pub(super) libxl: LibxlWriter<&'a CheckpointStream<'a>>,
    /// The stream that `libxl` writes to.
    pub(super) stream: &'a CheckpointStream<'a>,
    pub(super) emulators: &'a mut dyn Emulators,
    /// The minimum rate at which the receiver must read, which is told when the guest is suspended
    /// and resumed.
    pub(super) pace: &'a Pace,
    /// The connection for the receiver's messages; `None` without a receiver.
    pub(super) from: Option<&'a dyn Connection>,
    /// The message that the receiver has sent unexpectedly.
    pub(super) heard: LastWords,
    pub(super) stopping: &'a dyn StopRequest,
    pub(super) interval: Duration,
    /// The number of checkpoints to take; `None` for no limit.
    pub(super) epochs: Option<u64>,
    pub(super) observe: &'a mut OnComplete<'a>,
    /// Called when the last byte of a checkpoint has been written.
    pub(super) completed: &'a mut dyn FnMut(),
    /// Checkpoints whose last byte has been written.
    pub(super) complete: u64,
    pub(super) stop: Option<Stop>,
}

impl std::fmt::Debug for RemusToolstack<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemusToolstack")
            .field("complete", &self.complete)
            .field("stop", &self.stop)
            .finish_non_exhaustive()
    }
}

impl SaveToolstack for RemusToolstack<'_> {
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

impl CheckpointToolstack for RemusToolstack<'_> {
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

impl RemusToolstack<'_> {
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
            let asked = self.stopping.takes_its_time();
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
        let cancel = self.stopping.cancel();
        let Some(connection) = self.from else {
            let until = Instant::now() + self.interval;
            while !cancel.is_cancelled()
                && let left = until.saturating_duration_since(Instant::now())
                && !left.is_zero()
            {
                thread::sleep(left.min(LOOK));
            }
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
    use std::fs::File;
    use std::io::Read as _;
    use std::os::fd::OwnedFd;

    use xsr_format::byte_order::ByteOrder;
    use xsr_format::wrapper::libxl::LibxlHeader;
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
    use xsr_xen_backend::{GuestKind, Host as _};

    use super::super::{CheckpointParties, CheckpointRequest, NoEmulators};
    use super::*;
    use crate::error::SaveError;
    use crate::migrate::connection::PipeConnection;
    use crate::progress::{Cancel, Cancelled};
    use crate::save::SaveRequest;

    /// A request that also stands for the connection's token, as the command has it before the
    /// first checkpoint is complete.
    struct Asked(Cancel);

    impl StopRequest for Asked {
        fn cancel(&self) -> &Cancel {
            &self.0
        }

        fn takes_its_time(&self) -> io::Result<()> {
            match self.0.is_cancelled() {
                true => Err(io::Error::other(Cancelled)),
                false => Ok(()),
            }
        }
    }

    /// A request that comes in between would cut the connection, and the other end would not be
    /// told.
    #[test]
    fn what_is_asked_to_stop_before_the_first_checkpoint_is_whole_does_not_complete_it() {
        let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
        let guest = GuestSpec::new("web", GuestKind::Pvh, 8);
        let domid = host.create_guest(&guest).unwrap();
        let domain = host.domain(domid).unwrap();
        let asked_to_stop = Asked(Cancel::new());
        for asked in [false, true] {
            let (mut from, to) = io::pipe().unwrap();
            let nothing = File::open("/dev/null").unwrap();
            let to = PipeConnection::new(nothing.into(), OwnedFd::from(to), "there").unwrap();
            let pace = Pace::new(Duration::from_secs(60));
            let (ended, complete) = {
                let stream = CheckpointStream::new(&to, Wait::forever().keeping(&pace));
                let header = LibxlHeader {
                    order: ByteOrder::Little,
                    legacy_converted: false,
                };
                let mut libxl = LibxlWriter::new(&stream, header).unwrap();
                libxl.write(&LibxlRecord::LibxcContext).unwrap();
                let mut toolstack = RemusToolstack {
                    direct: DirectToolstack(domain.as_ref()),
                    libxl,
                    stream: &stream,
                    emulators: &mut NoEmulators,
                    pace: &pace,
                    from: None,
                    heard: LastWords::default(),
                    stopping: &asked_to_stop,
                    interval: Duration::ZERO,
                    epochs: None,
                    observe: &mut |_| Ok(()),
                    completed: &mut || {},
                    complete: 0,
                    stop: None,
                };
                if asked {
                    asked_to_stop.0.cancel();
                }
                let ended = toolstack.end_of_checkpoint();
                (ended, toolstack.complete)
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

    #[test]
    fn colo_without_a_connection_is_an_error_before_anything_is_sent() {
        let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
        let guest = GuestSpec::new("web", GuestKind::Pvh, 8);
        let domid = host.create_guest(&guest).unwrap();
        let domain = host.domain(domid).unwrap();
        let null = File::create("/dev/null").unwrap();
        let stream = CheckpointStream::to_nothing(&null);
        let header = LibxlHeader {
            order: ByteOrder::Little,
            legacy_converted: false,
        };
        let libxl = LibxlWriter::new(&stream, header).unwrap();
        let before = stream.bytes();
        let pace = Pace::new(Duration::from_secs(60));
        let save = SaveRequest::new(domain.as_ref(), host.config().xen_version);
        let second = Duration::from_secs(1);
        let request = CheckpointRequest::new(domain.as_ref(), save)
            .epochs(Some(1))
            .colo(Wait::forever(), second);
        let sent = request.run(CheckpointParties {
            libxl,
            stream: &stream,
            connection: None,
            pace: &pace,
            emulators: &mut NoEmulators,
            stopping: &Asked(Cancel::new()),
            completed: &mut || {},
            observe: &mut |_| Ok(()),
        });
        let error = sent.ended.expect_err("it is not COLO");
        let mut causes = vec![error.to_string()];
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            causes.push(cause.to_string());
            source = cause.source();
        }
        let said = causes.join(": ");
        assert!(said.contains("needs a connection"), "{said}");
        assert_eq!(stream.bytes(), before);
        assert!(domain.info().unwrap().shutdown.is_none());
    }
}
