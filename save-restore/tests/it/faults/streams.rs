//! Every read and write of the stream fails in turn.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use xsr_format::error::{ReadErrorCause, WriteError};
use xsr_save_restore::sink::{CopySink, FdSink};
use xsr_save_restore::source::{CopySource, FdSource};
use xsr_save_restore::{RestoreError, SaveError};

use crate::common::record_offsets;
use crate::common::stream::{Upset, Upsetting, When};
use crate::faults::*;

/// Errors of write(2) for files, pipes and sockets; results of it that are not failures; and a sink
/// that takes nothing.
fn writes() -> Vec<Upset> {
    let errnos = [
        Errno::EPIPE,
        Errno::ENOSPC,
        Errno::ECONNRESET,
        Errno::EIO,
        Errno::EAGAIN,
        Errno::EFBIG,
        Errno::EDQUOT,
        Errno::ETIMEDOUT,
    ];
    let errnos = errnos.map(|errno| Upset::Errno(errno.raw()));
    let rest = [Upset::Interrupted, Upset::Short, Upset::End];
    errnos.into_iter().chain(rest).collect()
}

/// Likewise for read(2), except the end, which has its own test.
fn reads() -> Vec<Upset> {
    let errnos = [
        Errno::ECONNRESET,
        Errno::EIO,
        Errno::EAGAIN,
        Errno::ETIMEDOUT,
        Errno::EBADF,
    ];
    let errnos = errnos.map(|errno| Upset::Errno(errno.raw()));
    errnos
        .into_iter()
        .chain([Upset::Interrupted, Upset::Short])
        .collect()
}

/// Pseudo-random numbers, the same each time.
fn seeded(mut seed: u64) -> impl Iterator<Item = usize> {
    std::iter::repeat_with(move || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (seed ^ seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        usize::try_from((mixed ^ mixed >> 27) >> 8).unwrap()
    })
}

/// Saves with `sink`; the guest continues to run.
fn save_into(
    guest: &Guest<'_>,
    before: &Source<'_>,
    sink: &mut dyn PageSink,
    what: &str,
) -> Result<(), SaveError> {
    let domain = guest.host.domain(guest.domid).unwrap();
    let domain = domain.as_ref();
    let mut toolstack = Toolstack::new(domain);
    let threads = 1 + what.len() % 2;
    let result = guest.save(threads, domain, &mut toolstack, sink, &mut go_on);
    let result = result.map(|saved| saved.resume().unwrap());
    toolstack.assert_undone(what);
    guest.assert_runs(before, what);
    result
}

/// The error of the sink, with its errno.
fn assert_sink_failed(result: Result<(), SaveError>, upset: Upset, what: &str) {
    let error = match result.unwrap_err() {
        SaveError::Stream(WriteError::Io(error)) => error,
        other => panic!("{what}: {other}"),
    };
    match upset {
        Upset::Errno(errno) => assert_eq!(error.raw_os_error(), Some(errno), "{what}"),
        _ => assert_eq!(error.kind(), io::ErrorKind::WriteZero, "{what}"),
    }
}

#[test]
fn a_save_survives_every_write_that_fails() {
    let mut points = Points::default();
    with_guests(40, |guest, before| {
        let spec = guest.spec;
        let mode = guest.mode;
        let save = |sink: &mut Upsetting<Vec<u8>>, what: &str| {
            let mut copying = CopySink(sink);
            save_into(guest, before, &mut copying, what)
        };
        let mut watching = Upsetting::watching(Vec::new());
        save(&mut watching, &spec.name).unwrap();
        let (calls, whole) = (watching.calls(), watching.into_inner());
        let upsets = writes();
        for (nth, at) in some_events(calls).enumerate() {
            // Each kind at the first writes and the last; in between they take turns.
            let all = (at < 2 || at + 2 > calls) && spec.kind != GuestKind::Hvm;
            let turn = nth % upsets.len();
            let these = upsets.iter().enumerate().filter(|(n, _)| all || *n == turn);
            for (_, upset) in these {
                let what = format!("{} write {at} {upset:?}", spec.name);
                let mut sink = Upsetting::new(Vec::new(), When::Call(at), *upset);
                let result = save(&mut sink, &what);
                // A working guest is not saved to the same bytes twice.
                if !sink.happened() {
                    assert_eq!(mode, Mode::Live, "{what}");
                    continue;
                }
                match upset.is_harmless() {
                    false => assert_sink_failed(result, *upset, &what),
                    true => {
                        result.unwrap();
                        let same = mode == Mode::Live || sink.into_inner() == whole;
                        assert!(same, "{what}: other bytes");
                    }
                }
                points.add(what);
            }
        }
        // Full or gone at any byte, also in the middle of a page.
        let ends = seeded(40).map(|n| n % whole.len()).take(12);
        for (byte, upset) in ends.zip(upsets.iter().cycle()) {
            if upset.is_harmless() {
                continue;
            }
            let what = format!("{} byte {byte} {upset:?}", spec.name);
            let mut sink = Upsetting::new(Vec::new(), When::Byte(byte), *upset);
            assert_sink_failed(save(&mut sink, &what), *upset, &what);
            let same = mode == Mode::Live || sink.into_inner() == whole[..byte];
            assert!(same, "{what}: other bytes");
            points.add(what);
        }
    });
    points.report("writes of a save", 400);
}

/// Takes `bytes` bytes of a stream, then disappears.
fn take(mut from: impl Read, bytes: usize) {
    let taken = io::copy(&mut (&mut from).take(bytes as u64), &mut io::sink());
    assert_eq!(taken.unwrap(), bytes as u64);
}

#[test]
fn a_save_survives_descriptors_that_fail() {
    let mut points = Points::default();
    with_guests(41, |guest, before| {
        let spec = guest.spec;
        let what = format!("{} full", spec.name);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let result = save_into(guest, before, &mut FdSink::new(full), &what);
        assert_sink_failed(result, Upset::Errno(Errno::ENOSPC.raw()), &what);
        points.add(what);
        let bytes = [0, 1, 24, 40, 41];
        for bytes in bytes
            .into_iter()
            .chain(seeded(41).map(|n| n % 1_000_000).take(5))
        {
            let what = format!("{} pipe closed after {bytes}", spec.name);
            let (reader, writer) = io::pipe().unwrap();
            let result = std::thread::scope(|scope| {
                scope.spawn(move || take(reader, bytes));
                save_into(guest, before, &mut FdSink::new(writer), &what)
            });
            assert_sink_failed(result, Upset::Errno(Errno::EPIPE.raw()), &what);
            points.add(what);

            let what = format!("{} socket closed after {bytes}", spec.name);
            let (reader, writer) = UnixStream::pair().unwrap();
            let result = std::thread::scope(|scope| {
                scope.spawn(move || take(reader, bytes));
                save_into(guest, before, &mut FdSink::new(writer), &what)
            });
            match result.unwrap_err() {
                SaveError::Stream(WriteError::Io(error)) => {
                    // ECONNRESET if bytes had arrived that were not read.
                    let errnos = [Errno::EPIPE, Errno::ECONNRESET].map(|errno| errno.raw());
                    let errno = error.raw_os_error().unwrap();
                    assert!(errnos.contains(&errno), "{what}: {error}");
                }
                other => panic!("{what}: {other}"),
            }
            points.add(what);
        }
    });
    points.report("descriptors of a save", 160);
}

/// A guest's stream, and how to restore it repeatedly.
struct Image<'a> {
    to: &'a MockHost,
    free: u64,
    spec: &'a GuestSpec,
    bytes: &'a [u8],
    left: &'a MemoryDigest,
}

impl Image<'_> {
    /// Restores from `source`; afterwards either all of the guest is there, or the domain can only
    /// be destroyed.
    fn restore<S: PageSource>(&self, source: S, what: &str) -> Result<(), RestoreError> {
        let (new, rings) = make_room(self.to, self.spec);
        let domain = self.to.domain(new).unwrap();
        let domain = domain.as_ref();
        let mut toolstack = Toolstack::new(domain);
        let result = try_restore(domain, source, &mut toolstack, rings, &mut go_on);
        if result.is_ok() {
            assert_same(self.left, &self.to.memory_digest(new).unwrap(), what);
        }
        assert_destroyable(self.to, new, self.free, what);
        result.map(drop)
    }
}

/// Runs `check` with a stream of each guest, saved still or live.
fn with_images(seed: u64, mut check: impl FnMut(&Image<'_>)) {
    // A log that reports new pages does not report those that the guest has given back: they
    // arrive, as with Xen's own engine. Without that log the save looks for them.
    let (from, to) = (crate::common::host_with_an_older_log(seed), host(seed + 1));
    let free = to.free_pages();
    for (spec, mode) in guests().iter().zip(Mode::ALL.into_iter().cycle()) {
        let domid = from.create_guest(spec).unwrap();
        let domain = from.domain(domid).unwrap();
        let mut toolstack = Toolstack::new(domain.as_ref());
        let mut sink = CopySink(Vec::new());
        let guest = Guest {
            host: &from,
            domid,
            spec,
            mode,
            work: &BALLOON,
        };
        let saved = guest.save(1, domain.as_ref(), &mut toolstack, &mut sink, &mut go_on);
        saved.unwrap().keep_suspended();
        check(&Image {
            to: &to,
            free,
            spec,
            bytes: &sink.0,
            left: &from.memory_digest(domid).unwrap(),
        });
    }
}

#[test]
fn a_restore_reports_every_read_that_fails() {
    let mut points = Points::default();
    with_images(42, |image| {
        let mut watching = Upsetting::watching(image.bytes);
        let name = &image.spec.name;
        image.restore(CopySource(&mut watching), name).unwrap();
        let calls = watching.calls();
        let upsets = reads();
        let turns = some_events(calls).enumerate();
        for (at, upset) in turns.flat_map(|(nth, at)| {
            let all = at < 6 || at + 6 > calls;
            let turn = nth % upsets.len();
            let these = upsets.iter().enumerate();
            let these = these.filter(move |(n, _)| all || *n == turn);
            these.map(move |(_, upset)| (at, *upset))
        }) {
            let what = format!("{name} read {at} {upset:?}");
            let mut source = Upsetting::new(image.bytes, When::Call(at), upset);
            let result = image.restore(CopySource(&mut source), &what);
            assert!(source.happened(), "{what}");
            match upset {
                Upset::Errno(errno) => assert_source_failed(result, errno, &what),
                _ => result.unwrap(),
            }
            points.add(what);
        }
    });
    points.report("reads of a restore", 350);
}

fn assert_source_failed(result: Result<(), RestoreError>, errno: i32, what: &str) {
    match result.unwrap_err() {
        RestoreError::Stream(error) => {
            assert!(!error.is_bad_image(), "{what}: {error}");
            let ReadErrorCause::Io(error) = error.cause else {
                panic!("{what}: {error}");
            };
            assert_eq!(error.raw_os_error(), Some(errno), "{what}");
        }
        other => panic!("{what}: {other}"),
    }
}

/// The start of the structure that `byte` is in: image header, domain header, records.
fn structure_at(stream: &[u8], byte: usize) -> u64 {
    let records = record_offsets(stream).into_iter().map(|record| record.0);
    let starts = [0, 24].into_iter().chain(records);
    starts.take_while(|start| *start <= byte).last().unwrap() as u64
}

#[test]
fn a_stream_that_ends_anywhere_is_a_bad_image_and_says_where() {
    let mut points = Points::default();
    with_images(44, |image| {
        let name = &image.spec.name;
        let records = record_offsets(image.bytes);
        let edges = some_events(records.len())
            .map(|n| records[n].0)
            .flat_map(|at| [at - 1, at, at + 1, at + 7]);
        let random = seeded(44).map(|n| n % image.bytes.len()).take(25);
        let ends: BTreeSet<usize> = edges.chain([0, 1, 23, 24]).chain(random).collect();
        for end in ends {
            let what = format!("{name} ends at {end}");
            let result = image.restore(CopySource(&image.bytes[..end]), &what);
            let error = result.unwrap_err();
            assert!(error.is_bad_image(), "{what}: {error}");
            let RestoreError::Stream(error) = error else {
                panic!("{what}: {error}");
            };
            assert!(
                matches!(error.cause, ReadErrorCause::Truncated { .. }),
                "{what}: {error}"
            );
            let start = structure_at(image.bytes, end);
            assert_eq!(error.position.offset, start, "{what}: {error}");
            points.add(what);
        }
    });
    points.report("ends of a stream", 350);
}

#[test]
fn a_restore_survives_descriptors_that_end_or_are_reset() {
    let mut points = Points::default();
    with_images(46, |image| {
        let name = &image.spec.name;
        let random = seeded(46).map(|n| n % image.bytes.len()).take(6);
        for end in [0, 24, 40, 44].into_iter().chain(random) {
            let bytes = &image.bytes[..end];
            let what = format!("{name} pipe ends at {end}");
            let (reader, mut writer) = io::pipe().unwrap();
            let result = std::thread::scope(|scope| {
                scope.spawn(move || writer.write_all(bytes).unwrap());
                image.restore(FdSource::new(reader), &what)
            });
            assert!(result.unwrap_err().is_bad_image(), "{what}");
            points.add(what);

            // A peer that disappears with unread bytes resets the connection.
            let what = format!("{name} socket reset at {end}");
            let (mut reader, mut writer) = UnixStream::pair().unwrap();
            reader.write_all(b"unread").unwrap();
            let result = std::thread::scope(|scope| {
                scope.spawn(move || writer.write_all(bytes).unwrap());
                image.restore(FdSource::new(reader), &what)
            });
            assert_source_failed(result, Errno::ECONNRESET.raw(), &what);
            points.add(what);
        }
    });
    points.report("descriptors of a restore", 80);
}
