//! Saves into the mapped layout: a still one equals the result of `convert` on a stream, and a live
//! one holds the guest as it was when it suspended, in a file that does not grow with the guest's
//! writes.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use crate::common::*;
use xsr_format::frame::Gfn;
use xsr_format::layout::check::{Damage, check};
use xsr_format::layout::{LayoutError, Mapped, MappedWriter};
use xsr_format::read::ReadOptions;
use xsr_format::transcode::{CopyError, Layer, transcode};
use xsr_format::walk::Walk;
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::AtFreeze;
use xsr_save_restore::save::mapped::{MappedImage, MappedOptions, MappedStats};
use xsr_save_restore::save::precopy::{PrecopyDecision, PrecopyPolicy, PrecopyStats};
use xsr_save_restore::source::CopySource;
use xsr_save_restore::storage::file::FileStorage;
use xsr_save_restore::storage::testing::{FakeStorage, Fault};
use xsr_save_restore::storage::{
    Create, Durability, Opened, Shape, Storage, StorageError, StorageName, StorageReader,
    StorageWriter,
};
use xsr_save_restore::toolstack::{DirectToolstack, ToolstackError};
use xsr_save_restore::{Live, SaveError, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, MockHost, WorkloadSpec};
use xsr_xen_backend::{Access, DomId, Errno, GuestKind, Host};

mod device;

/// This many passes, whatever is dirty.
struct Passes(u32);

impl PrecopyPolicy for Passes {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        match stats.iteration < self.0 {
            true => PrecopyDecision::Continue,
            false => PrecopyDecision::StopAndCopy,
        }
    }
}

fn go_on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn options_of(page_digests: bool) -> MappedOptions {
    let mut options = MappedOptions::default();
    options.page_digests = page_digests;
    options
}

/// How to save.
struct How {
    /// The passes of a live save.
    passes: Option<u32>,
    threads: usize,
    page_digests: bool,
}

const STILL: How = How {
    passes: None,
    threads: 2,
    page_digests: false,
};

const LIVE: How = How {
    passes: Some(4),
    ..STILL
};

/// Saves into a writer; the domain runs again before the image is finished.
fn save_mapped(
    host: &MockHost,
    domid: DomId,
    writer: &dyn StorageWriter,
    how: &How,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<MappedStats, SaveError> {
    let domain = host.domain(domid).unwrap();
    let mut toolstack = DirectToolstack(domain.as_ref());
    let image = MappedImage::new(writer, options_of(how.page_digests));
    let mut policy = Passes(how.passes.unwrap_or(0));
    let request = SaveRequest::new(domain.as_ref(), host.xen_version().unwrap());
    let mut request = request.options(&options(how.threads)).observe(progress);
    if how.passes.is_some() {
        request = request.live(Live {
            policy: &mut policy,
            verify: false,
        });
    }
    let saved = request.write_mapped(&mut toolstack, &image)?;
    saved.resume().unwrap();
    image.finish(options(how.threads).threads, &mut || {
        ControlFlow::Continue(())
    })
}

fn name() -> StorageName {
    "web.save".parse().unwrap()
}

/// The bytes of an image in a storage.
fn read(storage: &dyn Storage) -> Vec<u8> {
    let Opened::Random(reader) = storage.open(&name()).unwrap() else {
        panic!("it can be read only once");
    };
    let mut bytes = vec![0; usize::try_from(reader.length()).unwrap()];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Makes a complete save in memory.
fn to_memory(
    host: &MockHost,
    domid: DomId,
    how: &How,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> (Vec<u8>, MappedStats) {
    let storage = FakeStorage::new();
    let writer = storage.create(&name(), &Create::slots()).unwrap();
    let stats = save_mapped(host, domid, &*writer, how, progress).unwrap();
    writer.commit(Durability::Durable).unwrap();
    let bytes = read(&storage);
    assert_eq!(bytes.len() as u64, stats.file_bytes);
    (bytes, stats)
}

/// The result of `convert --layout mapped` on a stream.
fn mapped(stream: &[u8], page_digests: bool) -> Vec<u8> {
    let mut source = stream;
    let mut walk = Walk::open(&mut source, ReadOptions::default()).unwrap();
    let mut writer = MappedWriter::new(Vec::new(), page_digests);
    let copy = |source: &mut &mut &[u8], bytes: u64, sink: &mut MappedWriter<Vec<u8>>| {
        io::copy(&mut io::Read::take(&mut **source, bytes), sink).map_err(CopyError::Write)
    };
    transcode(&mut walk, &mut writer, Layer::Libxc, None, copy).unwrap();
    writer.finish().unwrap().0
}

/// Checks every digest of the image; returns its contents according to its index.
fn assert_whole(file: &[u8]) -> Mapped {
    let mut source = io::Cursor::new(file);
    let index = Mapped::open(&mut source)
        .unwrap()
        .expect("there is a footer");
    let complain = |damage: Damage| -> Result<(), LayoutError> { panic!("{damage}") };
    check(&index, &mut source, complain).unwrap();
    index
}

/// Checks that the image, restored on another host, has the guest's memory digest.
fn assert_holds(
    file: &[u8],
    at_the_freeze: &xsr_xen_backend::mock::MemoryDigest,
    spec: &GuestSpec,
) {
    let index = assert_whole(file);
    let end = usize::try_from(index.footer().image_end).unwrap();
    let stream = &file[..end];
    let to = host(99);
    let pages = take_apart(stream).pages.len() as u64;
    let shape = (
        spec.kind,
        spec.vcpus,
        pages.min(spec.memory_mib * 256 + 4000),
    );
    let (domid, result) = restore_stream(&to, shape, CopySource(stream));
    result.unwrap();
    let arrived = to.memory_digest(domid).unwrap();
    let rings: Vec<_> = take_apart(stream).rings().collect();
    let mut differ = at_the_freeze.differences(&arrived);
    differ.retain(|pfn| !rings.contains(pfn));
    assert_eq!(differ, [], "{}", spec.name);
}

#[test]
fn a_still_save_is_what_convert_makes_of_a_stream_for_any_number_of_threads() {
    for spec in specs() {
        let host = host(160);
        let domid = host.create_guest(&spec).unwrap();
        let plain = save_to_vec(&host, domid, &options(1)).unwrap();
        for page_digests in [false, true] {
            let expected = mapped(&plain, page_digests);
            for threads in [1, 2, 8] {
                let how = How {
                    threads,
                    page_digests,
                    ..STILL
                };
                let (file, stats) = to_memory(&host, domid, &how, &mut go_on);
                assert!(file == expected, "{}, {threads} threads", spec.name);
                assert_eq!(stats.moved_pages, 0);
                assert_eq!(stats.pages, take_apart(&plain).data_pages());
            }
        }
    }
}

/// Saves live with `operations` of the guest's work after each pass, and none in between. Returns
/// the image, and the guest's memory when it was suspended.
fn stepped(
    host: &MockHost,
    domid: DomId,
    work: &WorkloadSpec,
    operations: u64,
    how: &How,
) -> ((Vec<u8>, MappedStats), xsr_xen_backend::mock::MemoryDigest) {
    let mut work = host.workload(domid, work).unwrap();
    let mut frozen = None;
    let mut step = |progress: &Progress| {
        if progress.phase == Phase::Precopy && progress.pass_is_complete() {
            work.step(operations).unwrap();
        }
        if progress.phase == Phase::Tail {
            frozen = Some(host.memory_digest(domid).unwrap());
        }
        ControlFlow::Continue(())
    };
    let image = to_memory(host, domid, how, &mut step);
    (image, frozen.unwrap())
}

#[test]
fn a_live_save_of_a_guest_that_keeps_its_pages_is_a_still_one_at_any_rate() {
    for spec in specs() {
        for operations in [100, 5000] {
            let host = host(161);
            let domid = host.create_guest(&spec).unwrap();
            let still = to_memory(&host, domid, &STILL, &mut go_on).0;
            let work = WorkloadSpec {
                table_permille: 100,
                ..WorkloadSpec::writes(7, 1, 100_000)
            };
            let how = How {
                page_digests: operations == 100,
                ..LIVE
            };
            let ((file, stats), frozen) = stepped(&host, domid, &work, operations, &how);
            assert_holds(&file, &frozen, &spec);
            // Not a byte more, except for the page digests.
            let digests =
                usize::from(how.page_digests) * 16 * usize::try_from(stats.pages).unwrap();
            assert_eq!(file.len(), still.len() + digests, "{}", spec.name);
            assert_eq!(stats.moved_pages, 0);
            assert!(!assert_whole(&file).footer().moved);
        }
    }
}

#[test]
fn a_live_save_does_not_depend_on_the_number_of_threads() {
    let work = WorkloadSpec {
        table_permille: 50,
        balloon_permille: 100,
        ..WorkloadSpec::writes(3, 1, 500)
    };
    for spec in specs() {
        let of = |threads| {
            let host = host(162);
            let domid = host.create_guest(&spec).unwrap();
            let how = How { threads, ..LIVE };
            stepped(&host, domid, &work, 300, &how).0.0
        };
        let one = of(1);
        assert!(one == of(2) && one == of(8), "{}", spec.name);
    }
}

/// Ballooning pages: the file is about as small as a still save of the guest's final state.
#[test]
fn pages_that_come_and_go_leave_no_gap() {
    let mut moved = 0;
    for balloon_permille in [50, 1000] {
        for spec in specs() {
            let host = host(163);
            let domid = host.create_guest(&spec).unwrap();
            let work = WorkloadSpec {
                balloon_permille,
                ..WorkloadSpec::writes(5, 1, 400)
            };
            let ((file, stats), frozen) = stepped(&host, domid, &work, 400, &LIVE);
            assert_holds(&file, &frozen, &spec);
            let still = to_memory(&host, domid, &STILL, &mut go_on).0;
            let most = still.len() + still.len() / 200 + 8192;
            assert!(
                file.len() <= most,
                "{}: {} bytes, still {}",
                spec.name,
                file.len(),
                still.len()
            );
            moved += stats.moved_pages;
        }
    }
    assert!(moved > 100, "{moved} pages moved");
}

/// Slots that no longer exist do not count as pages: a guest without zero pages gives back its
/// upper half between two passes.
#[test]
fn a_guest_that_gives_back_half_of_its_memory_has_the_zero_pages_that_are_left() {
    for upper_half in [true, false] {
        let host = host_with_an_older_log(168);
        let spec = GuestSpec::new("pvh", GuestKind::Pvh, 16);
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let gfns: Vec<Gfn> = (0..4096).map(Gfn).collect();
        let here = domain.map(&gfns, Access::Write).unwrap();
        for (at, page) in here.iter() {
            if page.to_page().iter().all(|byte| *byte == 0) {
                page.write_entry(at % 512, 1 + at as u64);
            }
        }
        drop(here);
        let mut given_back = 0;
        let mut step = |progress: &Progress| {
            let ends = progress.phase == Phase::Precopy && progress.pass_is_complete();
            if ends && given_back == 0 {
                let half = if upper_half { 2048..4090 } else { 16..2048 };
                for pfn in half {
                    given_back += domain.release(&[Gfn(pfn)]).unwrap();
                }
            }
            ControlFlow::Continue(())
        };
        let (file, stats) = to_memory(&host, domid, &LIVE, &mut step);
        assert!(given_back > 1500, "{given_back} pages given back");
        let index = assert_whole(&file);
        let end = usize::try_from(index.footer().image_end).unwrap();
        let pages = take_apart(&file[..end]).pages;
        let contents = pages.values().filter_map(|(_, page)| *page);
        let zeros = contents.filter(|page| page.iter().all(|byte| *byte == 0));
        assert_eq!(stats.zero_pages, zeros.count() as u64);
        assert!(stats.pages < 2600, "{} pages", stats.pages);
    }
}

/// A writer that notes the calls that make the guest wait for the disk.
#[derive(Debug)]
struct Noting {
    inner: Box<dyn StorageWriter>,
    frozen: AtomicBool,
    punched_frozen: AtomicU32,
    punched: AtomicU32,
    length: AtomicU64,
    /// Writes since the last sync.
    unsynced: AtomicU32,
}

impl io::Write for Noting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl StorageWriter for Noting {
    fn name(&self) -> String {
        self.inner.name()
    }
    fn shape(&self) -> Shape {
        self.inner.shape()
    }
    fn is_straight(&self) -> bool {
        self.inner.is_straight()
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        self.unsynced.fetch_add(1, Relaxed);
        self.inner.write_all_at(bytes, offset)
    }
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        self.inner.read_exact_at(buffer, offset)
    }
    fn punch(&self, range: std::ops::Range<u64>) -> Result<(), StorageError> {
        let noted = match self.frozen.load(Relaxed) {
            true => &self.punched_frozen,
            false => &self.punched,
        };
        noted.fetch_add(1, Relaxed);
        self.inner.punch(range)
    }
    fn set_length(&self, length: u64) -> Result<(), StorageError> {
        self.length.fetch_max(length, Relaxed);
        self.inner.set_length(length)
    }
    fn clone_range(
        &self,
        base: &dyn StorageReader,
        range: std::ops::Range<u64>,
        to: u64,
    ) -> Result<(), StorageError> {
        self.inner.clone_range(base, range, to)
    }
    fn sync(&self) -> Result<(), StorageError> {
        self.unsynced.store(0, Relaxed);
        self.inner.sync()
    }
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn commit(self: Box<Self>, durability: Durability) -> Result<(), StorageError> {
        self.inner.commit(durability)
    }
}

/// Pages that become zero in the last pass are punched once the guest runs again, and the file has
/// its length before its pages come.
#[test]
fn no_hole_is_punched_while_the_guest_is_suspended() {
    let host = host(170);
    let spec = GuestSpec::new("pvh", GuestKind::Pvh, 16);
    let domid = host.create_guest(&spec).unwrap();
    let domain = host.domain(domid).unwrap();
    let mut work = host
        .workload(domid, &WorkloadSpec::writes(7, 1, 100_000))
        .unwrap();
    let storage = FakeStorage::new();
    let writer = Noting {
        inner: storage.create(&name(), &Create::slots()).unwrap(),
        frozen: AtomicBool::new(false),
        punched_frozen: AtomicU32::new(0),
        punched: AtomicU32::new(0),
        length: AtomicU64::new(0),
        unsynced: AtomicU32::new(0),
    };
    let mut cleared = 0;
    let mut unsynced = None;
    let mut step = |progress: &Progress| {
        if progress.phase == Phase::Precopy && progress.pass_is_complete() {
            // What the log tells of in the last pass is zeros by then.
            work.step(400).unwrap();
            let gfns: Vec<Gfn> = work.working_set().iter().map(|pfn| Gfn(pfn.0)).collect();
            let pages = domain.map(&gfns, Access::Write).unwrap();
            for (_, page) in pages.iter() {
                page.clear();
                cleared += 1;
            }
        }
        if progress.phase == Phase::Suspend {
            unsynced = Some(writer.unsynced.load(Relaxed));
        }
        writer
            .frozen
            .store(progress.phase == Phase::StopAndCopy, Relaxed);
        ControlFlow::Continue(())
    };
    let how = How {
        passes: Some(1),
        ..LIVE
    };
    let stats = save_mapped(&host, domid, &writer, &how, &mut step).unwrap();
    assert!(cleared > 100 && stats.zero_pages > 100);
    assert_eq!(writer.punched_frozen.load(Relaxed), 0);
    // The disk has all but the last pass when the guest is asked to suspend.
    assert_eq!(unsynced, Some(0));
    assert!(writer.punched.load(Relaxed) > 0);
    assert!(writer.length.load(Relaxed) >= stats.pages * 4096);
    Box::new(writer).commit(Durability::Durable).unwrap();
    let data = read(&storage);
    assert_whole(&data);
}

/// What is done at the freeze fails during the last pass: the rest of it is not written, and the
/// guest runs.
#[test]
fn a_failure_beside_the_last_pass_ends_it_at_once() {
    #[derive(Default)]
    struct Fails {
        begun: u32,
        checks: u32,
    }
    impl AtFreeze for Fails {
        fn begin(&mut self) -> Result<(), ToolstackError> {
            self.begun += 1;
            Ok(())
        }
        fn check(&mut self) -> Result<(), ToolstackError> {
            self.checks += 1;
            match self.checks {
                1 => Ok(()),
                _ => Err(ToolstackError::new("snapshotting", "no room")),
            }
        }
        fn wait(&mut self) -> Result<(), ToolstackError> {
            panic!("the save has failed before")
        }
    }
    for live in [false, true] {
        let host = host(169);
        let spec = GuestSpec::new("pvh", GuestKind::Pvh, 32);
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let mut toolstack = DirectToolstack(domain.as_ref());
        let storage = FakeStorage::new();
        let writer = storage.create(&name(), &Create::slots()).unwrap();
        let image = MappedImage::new(&*writer, options_of(false));
        let mut work = host
            .workload(domid, &WorkloadSpec::writes(7, 1, 100_000))
            .unwrap();
        let mut step = |progress: &Progress| {
            if progress.phase == Phase::Precopy && progress.pass_is_complete() {
                work.step(20_000).unwrap();
            }
            ControlFlow::Continue(())
        };
        let mut hook = Fails::default();
        let mut policy = Passes(1);
        let request = SaveRequest::new(domain.as_ref(), host.xen_version().unwrap());
        let mut request = request
            .options(&options(2))
            .observe(&mut step)
            .at_freeze(&mut hook);
        if live {
            request = request.live(Live {
                policy: &mut policy,
                verify: false,
            });
        }
        let error = request.write_mapped(&mut toolstack, &image).unwrap_err();
        assert!(error.to_string().contains("snapshotting"), "{error}");
        let info = host.domain(domid).unwrap().info().unwrap();
        assert_eq!((info.shutdown, info.paused), (None, false));
        assert_eq!((hook.begun, hook.checks), (1, 2), "live: {live}");
    }
}

#[test]
fn pages_of_zeros_are_holes_and_those_that_become_zeros_too() {
    let directory = tempfile::tempdir().unwrap();
    for spec in specs() {
        let host = host(164);
        let domid = host.create_guest(&spec).unwrap();
        let storage = FileStorage::new(directory.path());
        let save = |how: &How, progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>| {
            let writer = storage.create(&name(), &Create::slots()).unwrap();
            let stats = save_mapped(&host, domid, &*writer, how, progress).unwrap();
            writer.commit(Durability::Process).unwrap();
            let found = std::fs::metadata(storage.path(&name())).unwrap();
            let blocks = std::os::unix::fs::MetadataExt::blocks(&found);
            (blocks * 512, stats)
        };
        let (room, stats) = save(&STILL, &mut go_on);
        let data = stats.file_bytes - stats.zero_pages * 4096;
        let (least, most) = (data - (8 << 10), data + data / 100 + (128 << 10));
        assert!((least..=most).contains(&room), "{}: {room}", spec.name);
        let mut work = host
            .workload(domid, &WorkloadSpec::writes(1, 1, 300))
            .unwrap();
        let mut step = |progress: &Progress| {
            if progress.phase == Phase::Precopy && progress.pass_is_complete() {
                work.step(300).unwrap();
            }
            ControlFlow::Continue(())
        };
        let (live_room, live) = save(&LIVE, &mut step);
        let data = live.file_bytes - live.zero_pages * 4096;
        let most = data + data / 100 + (128 << 10);
        assert!(
            (data..=most).contains(&live_room),
            "{}: {live_room}",
            spec.name
        );
        let file = read(&storage);
        assert_whole(&file);
    }
}

/// If any call of the storage fails, the guest runs, and the name still refers to what was there
/// before.
#[test]
fn whatever_the_storage_does_the_guest_runs_and_the_name_is_what_it_was() {
    let spec = &specs()[0];
    for how in [STILL, LIVE] {
        for fault in [
            Fault::Error(Errno::ENOSPC),
            Fault::Error(Errno::EIO),
            Fault::CrashBefore,
        ] {
            let host = host(165);
            let domid = host.create_guest(spec).unwrap();
            let run = |storage: &FakeStorage| -> Result<(), String> {
                let mut work = host
                    .workload(domid, &WorkloadSpec::writes(1, 1, 100))
                    .unwrap();
                let mut step = |progress: &Progress| {
                    if progress.phase == Phase::Precopy && progress.pass_is_complete() {
                        work.step(30).unwrap();
                    }
                    ControlFlow::Continue(())
                };
                let writer = storage.create(&name(), &Create::slots());
                let writer = writer.map_err(|e| e.to_string())?;
                save_mapped(&host, domid, &*writer, &how, &mut step).map_err(|e| e.to_string())?;
                writer
                    .commit(Durability::Durable)
                    .map_err(|e| e.to_string())
            };
            let storage = FakeStorage::new();
            run(&storage).unwrap();
            let calls = storage.calls();
            assert!(calls > 10);
            // All of the first and last ones, and some of the others.
            let tried = (0..calls).filter(|n| n % 29 == 0 || *n < 6 || *n + 12 > calls);
            for call in tried {
                let storage = FakeStorage::new();
                let mut old = storage.create(&name(), &Create::stream()).unwrap();
                io::Write::write_all(&mut old, b"old").unwrap();
                old.commit(Durability::Durable).unwrap();
                storage.fail(call, fault);
                let result = run(&storage);
                let info = host.domain(domid).unwrap().info().unwrap();
                assert_eq!((info.shutdown, info.paused), (None, false), "call {call}");
                assert!(!host.is_log_dirty(domid).unwrap());
                let found = read(&storage.after_a_crash());
                match result {
                    // The number of calls varies a little with the timing of the threads.
                    Ok(()) => drop(assert_whole(&found)),
                    // The very last step: the image is complete, but not durable.
                    Err(_) if found != b"old" => {
                        assert_whole(&found);
                        assert_eq!(read(&storage.after_a_power_cut()), b"old");
                    }
                    Err(_) => {}
                }
            }
        }
    }
}

/// A save that is cancelled at any event leaves the guest running.
#[test]
fn a_save_that_is_stopped_leaves_the_guest_running() {
    let host = host(166);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        for phase in [
            Phase::Setup,
            Phase::Precopy,
            Phase::Suspend,
            Phase::StopAndCopy,
            Phase::Tail,
        ] {
            let storage = FakeStorage::new();
            let writer = storage.create(&name(), &Create::slots()).unwrap();
            let mut stop = |progress: &Progress| match progress.phase == phase {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            let result = save_mapped(&host, domid, &*writer, &LIVE, &mut stop);
            assert!(matches!(result, Err(SaveError::Aborted)), "{phase:?}");
            let info = host.domain(domid).unwrap().info().unwrap();
            assert_eq!((info.shutdown, info.paused), (None, false), "{phase:?}");
            drop(writer);
            assert_eq!(storage.list().unwrap(), []);
        }
    }
}

/// The guest works in the background, as fast as it can.
#[test]
fn a_guest_that_never_rests_is_held_as_it_was_at_the_freeze() {
    for (spec, threads) in specs().into_iter().zip([1, 2, 8].into_iter().cycle()) {
        let host = host(167);
        let domid = host.create_guest(&spec).unwrap();
        let work = WorkloadSpec {
            table_permille: 100,
            balloon_permille: 50,
            ..WorkloadSpec::writes(7, 50_000, 800)
        };
        let work = host.workload(domid, &work).unwrap().run_in_background();
        let mut frozen = None;
        let (mut runs, mut seen) = (true, 0);
        let mut wait = |progress: &Progress| {
            if progress.phase == Phase::Tail {
                frozen = Some(host.memory_digest(domid).unwrap());
            }
            runs &= progress.phase != Phase::Suspend;
            while runs && progress.phase == Phase::Precopy && work.operations() < seen + 50 {
                std::thread::yield_now();
            }
            seen = work.operations();
            ControlFlow::Continue(())
        };
        let how = How { threads, ..LIVE };
        let (file, _) = to_memory(&host, domid, &how, &mut wait);
        work.stop().unwrap();
        assert_holds(&file, &frozen.unwrap(), &spec);
    }
}
