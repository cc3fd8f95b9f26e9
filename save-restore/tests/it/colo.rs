//! COLO: the guest runs on both hosts and does different things there; each checkpoint makes them
//! identical again.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::common::*;
use xsr_format::frame::{Gfn, Pfn};
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::record::dirty_pfns::dirty_pfns;
use xsr_save_restore::back_channel::{BackChannelError, FdBackChannel};
use xsr_save_restore::restore::checkpoint::Ending;
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::sink::{CopySink, FdSink};
use xsr_save_restore::source::FdSource;
use xsr_save_restore::toolstack::{
    Arrival, CheckpointRestoreToolstack, CheckpointToolstack, ColoRestoreToolstack, ColoToolstack,
    Epoch, MissingStaticData, NextEpoch, RestoreToolstack, SaveToolstack, ToolstackError, Turn,
};
use xsr_save_restore::{RestoreError, RestoreRequest, Rings, SaveError, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, MemoryDigest, MockHost, Workload, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host};

const EPOCHS: u64 = 5;

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> ToolstackError {
    ToolstackError::new("the hypervisor", error)
}

struct Primary<'a> {
    host: &'a MockHost,
    domid: DomId,
    domain: &'a dyn Domain,
    work: Workload,
    /// Asks the other end for a checkpoint; its answer. `None`: there is no other end.
    other: Option<(Sender<()>, Receiver<()>)>,
    last: u64,
    epochs: Vec<Epoch>,
    digests: Vec<MemoryDigest>,
    log: Vec<&'static str>,
}

impl SaveToolstack for Primary<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.log.push("suspend");
        self.domain.suspend().map_err(refused)?;
        self.digests
            .push(self.host.memory_digest(self.domid).unwrap());
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.log.push("resume");
        self.domain.resume().map_err(refused)
    }

    fn switch_qemu_logdirty(&mut self, _: bool) -> Result<(), ToolstackError> {
        Ok(())
    }
}

impl CheckpointToolstack for Primary<'_> {
    fn postcopy(&mut self) -> Result<(), ToolstackError> {
        self.log.push("postcopy");
        self.domain.resume().map_err(refused)?;
        self.work.step(200).map(drop).map_err(refused)
    }

    fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.log.push("checkpoint");
        let shutdown = self.domain.info().unwrap().shutdown;
        assert!(shutdown.is_some(), "the guest is still suspended");
        if let Some((_, loaded)) = &self.other {
            loaded.recv().map_err(refused)?;
        }
        self.epochs.push(*epoch);
        Ok(NextEpoch::Continue)
    }
}

impl ColoToolstack for Primary<'_> {
    fn wait_checkpoint(&mut self) -> Result<NextEpoch, ToolstackError> {
        self.log.push("wait");
        if self.epochs.len() as u64 == self.last {
            return Ok(NextEpoch::Finish);
        }
        if let Some((new, _)) = &self.other {
            new.send(()).map_err(refused)?;
        }
        Ok(NextEpoch::Continue)
    }
}

struct Secondary<'a> {
    host: &'a MockHost,
    domid: DomId,
    domain: &'a dyn Domain,
    /// The same domain in another process, libxl's, which switches the log on.
    libxl: &'a dyn Domain,
    work: Option<Workload>,
    new: Receiver<()>,
    loaded: Sender<()>,
    digests: Vec<MemoryDigest>,
    log: Vec<&'static str>,
}

impl RestoreToolstack for Secondary<'_> {
    fn static_data_done(&mut self, _: MissingStaticData) -> Result<(), ToolstackError> {
        Ok(())
    }

    fn restore_results(&mut self, _: Option<Gfn>, _: Option<Gfn>) -> Result<(), ToolstackError> {
        self.log.push("results");
        Ok(())
    }
}

impl CheckpointRestoreToolstack for Secondary<'_> {
    fn checkpoint(&mut self, _: u64) -> Result<Arrival, ToolstackError> {
        self.log.push("checkpoint");
        Ok(Arrival::Whole { bytes: 0 })
    }
}

impl ColoRestoreToolstack for Secondary<'_> {
    fn postcopy(&mut self) -> Result<Turn, ToolstackError> {
        self.log.push("postcopy");
        self.digests
            .push(self.host.memory_digest(self.domid).unwrap());
        self.loaded.send(()).map_err(refused)?;
        match &mut self.work {
            Some(_) => self.domain.resume().map_err(refused)?,
            work => {
                self.libxl.enable_log_dirty().map_err(refused)?;
                self.domain.unpause().map_err(refused)?;
                // It does something else than the original.
                let spec = WorkloadSpec::writes(99, 1, 300);
                *work = Some(self.host.workload(self.domid, &spec).unwrap());
            }
        }
        let work = self.work.as_mut().unwrap();
        work.step(150).map_err(refused)?;
        Ok(Turn::Done)
    }

    fn wait_checkpoint(&mut self) -> Result<Arrival, ToolstackError> {
        self.log.push("wait");
        Ok(match self.new.recv() {
            Ok(()) => Arrival::Whole { bytes: 0 },
            Err(_) => Arrival::Lost,
        })
    }

    fn suspend(&mut self) -> Result<Turn, ToolstackError> {
        self.log.push("suspend");
        self.domain.suspend().map_err(refused)?;
        Ok(Turn::Done)
    }
}

fn primary<'a>(
    host: &'a MockHost,
    domid: DomId,
    domain: &'a dyn Domain,
    other: Option<(Sender<()>, Receiver<()>)>,
) -> Primary<'a> {
    Primary {
        host,
        domid,
        domain,
        work: host
            .workload(domid, &WorkloadSpec::writes(7, 1, 300))
            .unwrap(),
        other,
        last: EPOCHS,
        epochs: Vec::new(),
        digests: Vec::new(),
        log: Vec::new(),
    }
}

#[test]
fn each_checkpoint_makes_the_secondary_the_primary_again() {
    for kind in [GuestKind::Hvm, GuestKind::Pvh] {
        let (from, to) = (host(400), host(401));
        let domid = from.create_guest(&GuestSpec::new("web", kind, 8)).unwrap();
        let domain = from.domain(domid).unwrap();
        let (stream_from, stream_to) = io::pipe().unwrap();
        let (back_from, mut back_to) = io::pipe().unwrap();
        let ((new, asked), (loaded, done)) = (channel(), channel());
        let mut sender = primary(&from, domid, domain.as_ref(), Some((new, done)));
        let there = to.create_domain(kind, 1, 2048 + 256).unwrap();
        let domain_there = to.as_xen().unwrap().domain(there).unwrap();
        let libxl_there = to.as_xen().unwrap().domain(there).unwrap();
        let port = || domain_there.alloc_unbound_port(DomId(0)).unwrap();
        let rings_there = Rings {
            store_port: port(),
            store_domid: DomId(0),
            console_port: port(),
            console_domid: DomId(0),
        };
        let mut receiver = Secondary {
            host: &to,
            domid: there,
            domain: domain_there.as_ref(),
            libxl: libxl_there.as_ref(),
            work: None,
            new: asked,
            loaded,
            digests: Vec::new(),
            log: Vec::new(),
        };
        let (sent, survivor) = std::thread::scope(|scope| {
            let sender = &mut sender;
            let from = &from;
            let sent = scope.spawn(move || {
                let sent = SaveRequest::new(sender.domain, from.xen_version().unwrap())
                    .options(&options(2))
                    .observe(&mut |_| ControlFlow::Continue(()))
                    .write_colo(
                        sender,
                        &mut FdSink::new(stream_to),
                        &mut FdBackChannel::new(back_from),
                        &mut XenPolicy,
                    );
                // Drops the connection completely.
                sender.other = None;
                sent
            });
            let source = FdSource::new(stream_from);
            let reader = RecordReader::new(source, ReadOptions::default()).unwrap();
            let survivor = RestoreRequest::new(receiver.domain, rings_there)
                .threads(NonZeroUsize::new(2))
                .read_colo(reader, &mut receiver, &mut back_to);
            (sent.join().unwrap(), survivor)
        });
        assert_eq!(sent.unwrap().checkpoints, EPOCHS);
        let survivor = survivor.unwrap();
        assert_eq!(survivor.checkpoints, EPOCHS);
        assert!(matches!(survivor.ending, Ending::ToolstackLost));
        // Both run, and libxl decides how they continue.
        for domain in [&domain, &domain_there] {
            let info = domain.info().unwrap();
            assert_eq!((info.shutdown, info.paused), (None, false));
        }
        assert!(!from.is_log_dirty(domid).unwrap());
        assert_eq!((from.mapped_pages(), to.mapped_pages()), (0, 0));
        let rings = [survivor.restored.store_gfn, survivor.restored.console_gfn];
        let rings: Vec<u64> = rings.iter().flatten().map(|gfn| gfn.0).collect();
        assert_eq!(receiver.digests.len(), sender.digests.len());
        for (epoch, (there, here)) in receiver.digests.iter().zip(&sender.digests).enumerate() {
            let mut differ = here.differences(there);
            // A restore clears the pages of xenstore, console and ioreq.
            differ.retain(|pfn| rings.iter().all(|ring| pfn.0.abs_diff(*ring) > 8));
            assert_eq!(differ, [], "{kind:?}: checkpoint {}", epoch + 1);
        }
        for pair in sender.digests.windows(2) {
            assert!(pair[0].differences(&pair[1]).len() > 20, "{kind:?}");
        }
        let turns = ["suspend", "checkpoint", "postcopy", "wait"].repeat(5);
        assert_eq!(sender.log, turns, "{kind:?}");
        let turn = ["checkpoint", "results", "postcopy", "wait", "suspend"];
        let mut turns = turn.repeat(5);
        turns.pop();
        assert_eq!(receiver.log, turns, "{kind:?}");
    }
}

#[test]
fn a_secondary_whose_lists_have_a_header_of_16_bytes_is_refused_and_the_guest_runs_on() {
    let from = host(402);
    let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
    let domid = from.create_guest(&spec).unwrap();
    let domain = from.domain(domid).unwrap();
    let good = dirty_pfns(&[Pfn(5), Pfn(1000)]).unwrap();
    let mut long = good.clone();
    long.splice(8..8, [0; 8]);
    for (lists, last) in [([good.clone(), good.clone()], 3), ([good, long], 2)] {
        let (back_from, mut back_to) = io::pipe().unwrap();
        back_to.write_all(&lists.concat()).unwrap();
        let mut sender = primary(&from, domid, domain.as_ref(), None);
        sender.last = 3;
        let mut sink = CopySink(Vec::new());
        let sent = SaveRequest::new(domain.as_ref(), from.xen_version().unwrap())
            .options(&options(1))
            .observe(&mut |_| ControlFlow::Continue(()))
            .write_colo(
                &mut sender,
                &mut sink,
                &mut FdBackChannel::new(back_from),
                &mut XenPolicy,
            );
        match sent {
            Ok(stats) => assert_eq!((stats.checkpoints, last), (3, 3)),
            Err(SaveError::BackChannel(BackChannelError::LongHeader { number: 1 })) => {
                assert_eq!((sender.epochs.len(), last), (2, 2));
                assert_eq!(sender.log.last(), Some(&"resume"));
            }
            Err(error) => panic!("{error}"),
        }
        let info = domain.info().unwrap();
        assert_eq!((info.shutdown, info.paused), (None, false));
        assert!(!from.is_log_dirty(domid).unwrap());
    }
}

#[test]
fn a_pv_guest_is_refused_before_anything_happens() {
    let from = host(403);
    let domid = from
        .create_guest(&GuestSpec::new("web", GuestKind::Pv, 8))
        .unwrap();
    let domain = from.domain(domid).unwrap();
    let (back_from, _back_to) = io::pipe().unwrap();
    let mut sender = primary(&from, domid, domain.as_ref(), None);
    let mut sink = CopySink(Vec::new());
    let sent = SaveRequest::new(domain.as_ref(), from.xen_version().unwrap())
        .options(&options(1))
        .observe(&mut |_| ControlFlow::Continue(()))
        .write_colo(
            &mut sender,
            &mut sink,
            &mut FdBackChannel::new(back_from),
            &mut XenPolicy,
        );
    assert!(matches!(sent, Err(SaveError::ColoGuest)), "{sent:?}");
    assert_eq!((sink.0.len(), sender.log.len()), (0, 0));
    assert!(RestoreError::ColoGuest.to_string().contains("HVM"));
}
