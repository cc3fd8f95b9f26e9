//! The primary of COLO is cut off at any point: the secondary continues from the last complete
//! checkpoint, with its own work since then, and without any part of the next one.

use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use xsr_format::frame::Gfn;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::record::RecordKind;
use xsr_save_restore::back_channel::FdBackChannel;
use xsr_save_restore::restore::checkpoint::{CheckpointOptions, Ending};
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::{
    Arrival, CheckpointRestoreToolstack, CheckpointToolstack, ColoRestoreToolstack, ColoToolstack,
    Epoch, MissingStaticData, NextEpoch, RestoreToolstack, SaveToolstack, ToolstackError, Turn,
};
use xsr_save_restore::{RestoreError, RestoreRequest, Rings, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, MemoryDigest, MockHost, Workload, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host};

use super::kit::*;
use crate::common::faulty::Faulty;
use crate::common::*;

/// Takes checkpoints of a guest that works between them.
struct Here<'a> {
    primary: Primary<'a>,
    host: &'a MockHost,
    domid: DomId,
    domain: &'a dyn Domain,
    /// Its state at each checkpoint.
    at: Vec<Is>,
}

/// The state of a guest at a checkpoint: its memory, its vcpus and devices.
struct Is(MemoryDigest, Vec<u8>);

impl Is {
    fn of(host: &MockHost, domid: DomId, domain: &dyn Domain) -> Self {
        let memory = host.memory_digest(domid).unwrap();
        Self(memory, domain.hvm().unwrap().hvm_context().unwrap())
    }

    #[track_caller]
    fn same(&self, other: &Self, what: &str) {
        assert_eq!(self.0.differences(&other.0), [], "{what}");
        assert!(self.1 == other.1, "{what}");
    }
}

impl SaveToolstack for Here<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.primary.suspend()
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.primary.resume()
    }

    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        self.primary.switch_qemu_logdirty(on)
    }
}

impl CheckpointToolstack for Here<'_> {
    fn postcopy(&mut self) -> Result<(), ToolstackError> {
        self.primary.resume()
    }

    fn checkpoint(&mut self, _: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.at.push(Is::of(self.host, self.domid, self.domain));
        Ok(NextEpoch::Continue)
    }
}

impl ColoToolstack for Here<'_> {
    fn wait_checkpoint(&mut self) -> Result<NextEpoch, ToolstackError> {
        self.primary.work.step(200).map_err(refused)?;
        Ok(match self.at.len() == EPOCHS {
            true => NextEpoch::Finish,
            false => NextEpoch::Continue,
        })
    }
}

/// Runs beside it, and does something else.
struct There<'a> {
    host: &'a MockHost,
    domid: DomId,
    domain: &'a dyn Domain,
    work: Option<Workload>,
    checkpoints: usize,
    /// Its state when a checkpoint has been applied, and its memory whenever it is suspended.
    at: Vec<Is>,
    left: Vec<MemoryDigest>,
}

impl RestoreToolstack for There<'_> {
    fn static_data_done(&mut self, _: MissingStaticData) -> Result<(), ToolstackError> {
        Ok(())
    }

    fn restore_results(&mut self, _: Option<Gfn>, _: Option<Gfn>) -> Result<(), ToolstackError> {
        Ok(())
    }
}

impl CheckpointRestoreToolstack for There<'_> {
    fn checkpoint(&mut self, _: u64) -> Result<Arrival, ToolstackError> {
        self.checkpoints += 1;
        Ok(Arrival::Whole { bytes: 0 })
    }
}

impl ColoRestoreToolstack for There<'_> {
    fn postcopy(&mut self) -> Result<Turn, ToolstackError> {
        self.at.push(Is::of(self.host, self.domid, self.domain));
        match &mut self.work {
            Some(_) => self.domain.resume().map_err(refused)?,
            work => {
                self.domain.enable_log_dirty().map_err(refused)?;
                self.domain.unpause().map_err(refused)?;
                let spec = WorkloadSpec::writes(99, 1, 300);
                *work = Some(self.host.workload(self.domid, &spec).unwrap());
            }
        }
        let work = self.work.as_mut().unwrap();
        work.step(150).map_err(refused)?;
        Ok(Turn::Done)
    }

    fn wait_checkpoint(&mut self) -> Result<Arrival, ToolstackError> {
        Ok(Arrival::Whole { bytes: 0 })
    }

    fn suspend(&mut self) -> Result<Turn, ToolstackError> {
        self.domain.suspend().map_err(refused)?;
        self.left.push(self.host.memory_digest(self.domid).unwrap());
        Ok(Turn::Done)
    }
}

/// Records of an image except those of memory.
type Records = Vec<(RecordKind, Vec<u8>)>;

/// The result of a secondary; its domain is gone.
struct Left {
    checkpoints: usize,
    /// The number of checkpoints, and how it ended.
    result: Result<(u64, &'static str), RestoreError>,
    at: Vec<Is>,
    left: Vec<MemoryDigest>,
    /// Its final state, if it may run: memory, and everything else.
    state: Option<(MemoryDigest, Records)>,
}

fn beside(
    to: &MockHost,
    (kind, pages): (GuestKind, u64),
    source: impl Read,
    back: &mut dyn Write,
    keep: &CheckpointOptions,
) -> Left {
    let domid = to.create_domain(kind, 1, pages).unwrap();
    let domain = to.domain(domid).unwrap();
    beside_in(to, (domid, domain.as_ref()), source, back, keep)
}

/// In a domain that has just been created.
fn beside_in(
    to: &MockHost,
    (domid, domain): (DomId, &dyn Domain),
    source: impl Read,
    back: &mut dyn Write,
    keep: &CheckpointOptions,
) -> Left {
    let [store_port, console_port] = [(); 2].map(|()| domain.alloc_unbound_port(DomId(0)).unwrap());
    let rings_there = Rings {
        store_port,
        store_domid: DomId(0),
        console_port,
        console_domid: DomId(0),
    };
    let mut there = There {
        host: to,
        domid,
        domain,
        work: None,
        checkpoints: 0,
        at: Vec::new(),
        left: Vec::new(),
    };
    let reader = RecordReader::new(CopySource(source), ReadOptions::default());
    let result = reader.map_err(RestoreError::from).and_then(|reader| {
        let go_on = &mut |_: &_| ControlFlow::Continue(());
        RestoreRequest::new(there.domain, rings_there)
            .threads(NonZeroUsize::new(2))
            .keep(keep)
            .observe(go_on)
            .read_colo(reader, &mut there, back)
    });
    assert_eq!(to.mapped_pages(), 0);
    let There {
        checkpoints,
        at,
        left,
        work,
        ..
    } = there;
    drop(work);
    let result = result.map(|survivor| {
        let ending = match survivor.ending {
            Ending::SourceLost(_) => "source",
            Ending::BackChannelLost(_) => "back-channel",
            _ => "otherwise",
        };
        (survivor.checkpoints, ending)
    });
    let state = result.is_ok().then(|| {
        let memory = to.memory_digest(domid).unwrap();
        domain.disable_log_dirty().unwrap();
        domain.resume().unwrap();
        let saved = save_to_vec(to, domid, &options(1)).unwrap();
        let records = take_apart(&saved).records;
        let records = records.iter().map(|(kind, raw)| (*kind, raw.to_vec()));
        (memory, records.collect())
    });
    domain.destroy().unwrap();
    Left {
        checkpoints,
        result,
        at,
        left,
        state,
    }
}

/// Writes to two places.
struct Tee<W>(Vec<u8>, W);

impl<W: Write> Write for Tee<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.write_all(bytes)?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

/// Takes this many lists.
struct Lists(usize);

impl Write for Lists {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.checked_sub(1) {
            Some(left) => self.0 = left,
            None => return Err(io::ErrorKind::BrokenPipe.into()),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_primary_that_is_cut_off_anywhere_leaves_the_secondary_as_it_was() {
    let (cuts, mut seed) = (number("XSR_CUTS", 8), number("XSR_SEED", 1));
    let mut runs = 0_u64;
    for kind in [GuestKind::Hvm, GuestKind::Pvh] {
        // Both ends, uncut; the bytes that were sent.
        let (from, to) = (host(310), host(311));
        let shape = (kind, 2048 + 256);
        let domid = from.create_guest(&GuestSpec::new("web", kind, 8)).unwrap();
        let domain = from.domain(domid).unwrap();
        let mut here = Here {
            primary: primary(&from, domid, domain.as_ref(), kind),
            host: &from,
            domid,
            domain: domain.as_ref(),
            at: Vec::new(),
        };
        let (stream_from, stream_to) = io::pipe().unwrap();
        let (back_from, mut back_to) = io::pipe().unwrap();
        let (stream, whole) = std::thread::scope(|scope| {
            let (from, domain) = (&from, domain.as_ref());
            let here = &mut here;
            let sent = scope.spawn(move || {
                let mut sink = CopySink(Tee(Vec::new(), stream_to));
                SaveRequest::new(domain, from.xen_version().unwrap())
                    .options(&options(1))
                    .observe(&mut |_| ControlFlow::Continue(()))
                    .write_colo(
                        here,
                        &mut sink,
                        &mut FdBackChannel::new(back_from),
                        &mut XenPolicy,
                    )
                    .unwrap();
                let CopySink(Tee(stream, _)) = sink;
                stream
            });
            let whole = beside(&to, shape, stream_from, &mut back_to, &in_memory(64 << 20));
            (sent.join().unwrap(), whole)
        });
        assert_eq!(whole.left.len(), EPOCHS);
        // Every checkpoint made it equal to the primary.
        let as_the_primary = |left: &Left, what: &str| {
            for (applied, sent) in left.at.iter().zip(&here.at) {
                applied.same(sent, what);
            }
        };
        assert_eq!((here.at.len(), whole.at.len()), (EPOCHS, EPOCHS));
        as_the_primary(&whole, "both ends");
        for pair in whole.left.windows(2) {
            assert_ne!(pair[0].differences(&pair[1]), [], "{kind:?}");
        }
        let records = record_offsets(&stream);
        let complete = ends(&stream);
        assert_eq!(complete.len(), EPOCHS, "{kind:?}");
        // Everything except memory, as a cut directly after each checkpoint leaves it.
        let expected: Vec<_> = complete
            .iter()
            .map(|at| {
                let left = beside(&to, shape, &stream[..*at], &mut io::sink(), &in_memory(0));
                left.state.unwrap().1
            })
            .collect();
        assert!(
            expected.windows(2).all(|pair| pair[0] != pair[1]),
            "{kind:?}"
        );
        let mut at: Vec<usize> = records.iter().map(|(at, ..)| *at).collect();
        let bytes = stream.len() as u64;
        at.extend((0..cuts).map(|_| usize::try_from(random(&mut seed) % bytes).unwrap()));
        for (turn, at) in at.into_iter().enumerate() {
            let what = format!("{kind:?}: cut at byte {at} of {}", stream.len());
            let keep = in_memory([0, 4109, 64 << 20][turn % 3]);
            let left = match turn % 2 {
                0 => beside(&to, shape, &stream[..at], &mut io::sink(), &keep),
                _ => beside(&to, shape, Breaks(&stream[..at]), &mut io::sink(), &keep),
            };
            runs += 1;
            let last = complete.iter().filter(|end| **end <= at).count();
            assert_eq!((left.checkpoints, left.at.len()), (last, last), "{what}");
            as_the_primary(&left, &what);
            if last == 0 {
                assert!(
                    matches!(left.result, Err(RestoreError::Stream(_))),
                    "{what}"
                );
                continue;
            }
            assert_eq!(left.result.unwrap(), (last as u64, "source"), "{what}");
            let (memory, records) = left.state.unwrap();
            assert_eq!(whole.left[last - 1].differences(&memory), [], "{what}");
            assert!(records == expected[last - 1], "{what}");
        }
        // A primary that no longer takes a list.
        for (lists, expected) in expected.iter().enumerate().take(EPOCHS) {
            let what = format!("{kind:?}: {lists} lists");
            let left = beside(&to, shape, &stream[..], &mut Lists(lists), &in_memory(0));
            runs += 1;
            assert_eq!(left.at.len(), lists + 1, "{what}");
            as_the_primary(&left, &what);
            let ending = (lists as u64 + 1, "back-channel");
            assert_eq!(left.result.unwrap(), ending, "{what}");
            let (memory, records) = left.state.unwrap();
            assert_eq!(whole.left[lists].differences(&memory), [], "{what}");
            assert!(records == *expected, "{what}");
        }
    }
    eprintln!("{runs} primaries were cut off");
}

/// The primary would treat its pages as unwritten.
#[test]
fn a_secondary_that_cannot_name_its_pages_gives_up() {
    let spec = &guests()[3];
    let stream = protect(spec);
    let (kind, vcpus, pages) = shape(&plain(&stream, 1), spec.kind, spec.vcpus);
    let to = host(312);
    let domid = to.create_domain(kind, vcpus, pages + 256).unwrap();
    let domain = Faulty::without_pages(to.domain(domid).unwrap());
    let mut back = Vec::new();
    let left = beside_in(&to, (domid, &domain), &stream[..], &mut back, &in_memory(0));
    let error = left.result.unwrap_err();
    assert!(matches!(error, RestoreError::BackChannel(_)), "{error}");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("has no page"), "{cause}");
    assert_eq!((left.at.len(), back), (1, Vec::new()));
}
