//! Images in a storage: read at any place or once, with and without a descriptor, restored, and
//! copied to a file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::common::*;
use xsr_format::transcode::CopyError;
use xsr_save_restore::RestoreError;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::source::{PageSource as _, StoredSource};
use xsr_save_restore::storage::testing::{FakeStorage, Fault};
use xsr_save_restore::storage::{
    Create, Durability, Opened, Storage, StorageCursor, StorageName, StreamReader, file,
};
use xsr_xen_backend::mock::GuestSpec;
use xsr_xen_backend::{Errno, GuestKind, Host as _};

/// A stream that is read once and has no descriptor.
#[derive(Debug)]
struct Bare(io::Cursor<Vec<u8>>);

impl Read for Bare {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}

impl StreamReader for Bare {
    fn name(&self) -> String {
        "bare".to_owned()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

fn in_memory(bytes: &[u8]) -> (FakeStorage, StorageCursor) {
    let storage = FakeStorage::new();
    let name: StorageName = "web.save".parse().unwrap();
    let mut writer = storage.create(&name, &Create::stream()).unwrap();
    writer.write_all(bytes).unwrap();
    writer.commit(Durability::Durable).unwrap();
    let cursor = StorageCursor::new(storage.open(&name).unwrap()).unwrap();
    (storage, cursor)
}

fn bare(bytes: &[u8]) -> StorageCursor {
    let reader = Bare(io::Cursor::new(bytes.to_vec()));
    StorageCursor::new(Opened::Once(Box::new(reader))).unwrap()
}

/// A pipe into which a thread writes `bytes`.
fn pipe(bytes: &[u8]) -> StorageCursor {
    let (reader, mut writer) = io::pipe().unwrap();
    let bytes = bytes.to_vec();
    std::thread::spawn(move || writer.write_all(&bytes));
    let reader = File::from(std::os::fd::OwnedFd::from(reader));
    StorageCursor::new(file::opened(reader, "a pipe").unwrap()).unwrap()
}

fn on_disk(bytes: &[u8]) -> StorageCursor {
    StorageCursor::new(file::opened(file_of(bytes), "a file").unwrap()).unwrap()
}

/// The same bytes in every kind of storage.
fn everywhere(bytes: &[u8]) -> [(&'static str, StorageCursor); 4] {
    [
        ("file", on_disk(bytes)),
        ("memory", in_memory(bytes).1),
        ("pipe", pipe(bytes)),
        ("bare", bare(bytes)),
    ]
}

fn source(cursor: &StorageCursor) -> StoredSource<'_> {
    StoredSource::new(cursor, Cancel::default()).unwrap()
}

#[test]
fn a_guest_is_restored_from_any_storage() {
    for spec in specs() {
        let from = host(301);
        let made = from.create_guest(&spec).unwrap();
        let stream = save_to_vec(&from, made, &options(1)).unwrap();
        let shape = shape(&stream, spec.kind, spec.vcpus);
        for (name, cursor) in everywhere(&stream) {
            let to = host(302);
            let (domid, result) = restore_stream(&to, shape, source(&cursor));
            result.unwrap_or_else(|error| panic!("{} from a {name}: {error:#}", spec.name));
            if cursor.length().is_some() {
                assert_eq!(cursor.position(), stream.len() as u64, "{name}");
            }
            drop(unpause(&to, domid));
            let again = save_to_vec(&to, domid, &options(1)).unwrap();
            assert_same_guest(&format!("{} from a {name}", spec.name), &stream, &again);
        }
    }
}

#[test]
fn what_follows_the_stream_is_not_read() {
    let from = host(303);
    let spec = GuestSpec::new("pvh", GuestKind::Pvh, 4);
    let made = from.create_guest(&spec).unwrap();
    let mut stream = save_to_vec(&from, made, &options(1)).unwrap();
    let shape = shape(&stream, spec.kind, spec.vcpus);
    let end = stream.len();
    stream.extend_from_slice(b"the rest");
    for (name, cursor) in everywhere(&stream) {
        let (_, result) = restore_stream(&host(304), shape, source(&cursor));
        result.unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let mut rest = String::new();
        (&cursor).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "the rest", "{name}, {end}");
    }
}

#[test]
fn a_stream_that_is_cut_off_is_the_same_error_in_any_storage() {
    let from = host(305);
    let spec = GuestSpec::new("pvh", GuestKind::Pvh, 4);
    let made = from.create_guest(&spec).unwrap();
    let stream = save_to_vec(&from, made, &options(1)).unwrap();
    let shape = shape(&stream, spec.kind, spec.vcpus);
    let (start, end) = memory_of(&stream);
    for cut in [start + 4, (start + end) / 2, end - 1, stream.len() - 1] {
        let mut said = Vec::new();
        for (name, cursor) in everywhere(&stream[..cut]) {
            let (_, result) = restore_stream(&host(306), shape, source(&cursor));
            let error = result.expect_err(name);
            said.push((name, format!("{:?}", xsr_save_restore::text::chain(&error))));
        }
        for (name, words) in &said {
            assert_eq!(words, &said[0].1, "{name} at {cut}");
        }
    }
}

#[test]
fn every_failed_read_of_a_storage_fails_the_restore() {
    let from = host(307);
    let spec = GuestSpec::new("pvh", GuestKind::Pvh, 4);
    let made = from.create_guest(&spec).unwrap();
    let stream = save_to_vec(&from, made, &options(1)).unwrap();
    let shape = shape(&stream, spec.kind, spec.vcpus);
    let (storage, cursor) = in_memory(&stream);
    // Short reads are read on.
    storage.fail(2, Fault::Short);
    let (_, result) = restore_stream(&host(308), shape, source(&cursor));
    result.unwrap();
    let calls = storage.calls();
    assert!(calls > 20, "{calls}");
    let to = host(308);
    for call in (0..calls).step_by(calls / 20).chain([calls - 1]) {
        storage.fail(call, Fault::Error(Errno::EIO));
        let cursor = cursor.again().unwrap();
        let (domid, result) = restore_stream(&to, shape, source(&cursor));
        let error = result.expect_err("a read failed");
        let words = xsr_save_restore::text::chain(&error).to_string();
        assert!(words.contains("(os error 5)"), "read {call}: {words}");
        to.domain(domid).unwrap().destroy().unwrap();
    }
}

#[test]
fn a_cancelled_restore_reads_no_more() {
    let (storage, cursor) = in_memory(&[0; 4096]);
    let cancel = Cancel::default();
    let mut source = StoredSource::new(&cursor, cancel.clone()).unwrap();
    source.read_exact(&mut [0; 16]).unwrap();
    let before = storage.calls();
    cancel.cancel();
    let error = source.read(&mut [0; 16]).unwrap_err();
    assert!(
        error
            .get_ref()
            .is_some_and(|e| e.is::<xsr_save_restore::progress::Cancelled>())
    );
    assert!(source.take_extent(16).is_err());
    assert_eq!(storage.calls(), before);
    let (_, result) = restore_stream(&host(309), (GuestKind::Pvh, 1, 1024), source);
    assert!(
        matches!(result, Err(RestoreError::Aborted | RestoreError::Stream(_))),
        "{result:?}"
    );
}

#[test]
fn an_image_is_copied_to_any_file() {
    let bytes: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let wanted = 5_000_000..10_000_000;
    for (name, cursor) in everywhere(&bytes) {
        io::copy(&mut (&cursor).take(wanted.start), &mut io::sink()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        std::fs::write(&path, "head").unwrap();
        // The kernel copies to a file, but not to one that is appended to.
        let files = [
            OpenOptions::new().append(true).open(&path).unwrap(),
            OpenOptions::new().write(true).open(&path).unwrap(),
        ];
        let middle = (wanted.start + wanted.end) / 2;
        assert_eq!(
            cursor.copy_to(&files[0], middle - wanted.start).unwrap(),
            middle - wanted.start,
            "{name}"
        );
        assert_eq!(cursor.position(), middle, "{name}");
        (&files[1]).seek(SeekFrom::End(0)).unwrap();
        assert_eq!(
            cursor.copy_to(&files[1], wanted.end - middle).unwrap(),
            wanted.end - middle,
            "{name}"
        );
        let copied = std::fs::read(&path).unwrap();
        let range = usize::try_from(wanted.start).unwrap()..usize::try_from(wanted.end).unwrap();
        assert!(
            copied.strip_prefix(b"head").unwrap() == &bytes[range],
            "{name}"
        );
        // The rest, and no more than there is.
        let null = OpenOptions::new().write(true).open("/dev/null").unwrap();
        let rest = bytes.len() as u64 - wanted.end;
        assert_eq!(cursor.copy_to(&null, u64::MAX).unwrap(), rest, "{name}");
        assert_eq!(cursor.copy_to(&null, 1).unwrap(), 0, "{name}");
    }
}

#[test]
fn an_image_is_copied_into_a_pipe() {
    let bytes: Vec<u8> = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
    for (name, cursor) in everywhere(&bytes) {
        let (mut reader, writer) = io::pipe().unwrap();
        let copied = std::thread::scope(|scope| {
            let writer = File::from(std::os::fd::OwnedFd::from(writer));
            scope.spawn(move || cursor.copy_to(&writer, u64::MAX).unwrap());
            let mut copied = Vec::new();
            reader.read_to_end(&mut copied).unwrap();
            copied
        });
        assert!(copied == bytes, "{name}");
    }
}

#[test]
fn a_copy_that_fails_says_which_side_failed() {
    let bytes = vec![1; 1 << 20];
    for (name, cursor) in everywhere(&bytes) {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        match cursor.copy_to(&full, 4096) {
            Err(CopyError::Write(error)) => {
                assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{name}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    let (storage, cursor) = in_memory(&bytes);
    storage.fail(0, Fault::CrashBefore);
    match cursor.copy_to(&tempfile::tempfile().unwrap(), 4096) {
        Err(CopyError::Read(error)) => assert_eq!(error.raw_os_error(), Some(5)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_can_be_read_once_has_no_places() {
    for (name, mut cursor) in [("pipe", pipe(b"image")), ("bare", bare(b"image"))] {
        assert_eq!(cursor.length(), None, "{name}");
        assert!(cursor.again().is_none(), "{name}");
        for error in [
            cursor.read_exact_at(&mut [0; 1], 0).unwrap_err(),
            cursor.seek(SeekFrom::Start(1)).unwrap_err(),
        ] {
            assert_eq!(error.kind(), io::ErrorKind::NotSeekable, "{name}");
        }
        // The attempt took nothing from it.
        let mut all = String::new();
        cursor.read_to_string(&mut all).unwrap();
        assert_eq!((&*all, cursor.position()), ("image", 5), "{name}");
    }
}

#[test]
fn a_file_that_is_partly_read_goes_on_from_there() {
    let mut file = file_of(b"an image");
    file.seek(SeekFrom::Start(3)).unwrap();
    let mut cursor = StorageCursor::new(file::opened(file, "stdin").unwrap()).unwrap();
    assert_eq!(cursor.length(), None);
    let mut rest = String::new();
    cursor.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "image");
}

#[test]
fn clones_share_a_position_and_another_cursor_does_not() {
    let cursor = StorageCursor::over(Arc::clone(on_disk(b"an image").reader().unwrap()));
    let (mut clone, mut other) = (cursor.clone(), cursor.again().unwrap());
    clone.seek(SeekFrom::End(-5)).unwrap();
    other.read_exact(&mut [0; 2]).unwrap();
    assert_eq!(
        [cursor.position(), clone.position(), other.position()],
        [3, 3, 2]
    );
    let error = clone.seek(SeekFrom::Current(-4)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert_eq!(cursor.position(), 3);
}
