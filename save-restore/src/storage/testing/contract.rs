//! The contract of every [`Storage`], as named checks. Each uses names of its own and removes them.

use std::io::Write as _;
use std::thread;

use crate::storage::{
    Create, Durability, Existing, Opened, Segment, Shape, Storage, StorageError, StorageName,
    StorageReader, StorageWriter, segments,
};

/// A check that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The check.
    pub check: &'static str,
    /// What it found.
    pub what: String,
}

type Check = fn(&dyn Storage) -> Result<(), String>;

const CHECKS: &[(&str, Check)] = &[
    ("nothing is visible before the commit", invisible),
    ("a dropped writer leaves nothing", dropped),
    ("a commit replaces an image whole", replaced),
    (
        "an existing image stays if it is not to be replaced",
        refused,
    ),
    ("an absent image is named", absent),
    ("images are listed by name and removed", listed),
    ("a reader reads at any place and never beyond the end", read),
    ("several threads read one image", threads_read),
    ("a stream is written from its start to its end", stream),
    ("slots are written at any place, by several threads", slots),
    ("a hole reads as zeros", holes),
    ("segments cover an image without a gap", segmented),
    ("a range is shared, or that is refused", shared),
];

/// Runs every check; returns those that failed.
pub fn run(storage: &dyn Storage) -> Vec<Broken> {
    let broken = CHECKS.iter().filter_map(|(check, run)| {
        let what = run(storage).err()?;
        Some(Broken { check, what })
    });
    broken.collect()
}

fn name(name: &str) -> StorageName {
    name.parse().expect("a name")
}

fn ensure(holds: bool, what: &str) -> Result<(), String> {
    match holds {
        true => Ok(()),
        false => Err(format!("does not hold: {what}")),
    }
}

fn unexpected(error: StorageError) -> String {
    let cause = error.io_error().map(|error| format!(": {error}"));
    format!("unexpected: {error}{}", cause.unwrap_or_default())
}

fn put(storage: &dyn Storage, name: &StorageName, bytes: &[u8]) -> Result<(), String> {
    let writer = storage.create(name, &Create::stream());
    let mut writer = writer.map_err(unexpected)?;
    writer.write_all(bytes).map_err(|error| error.to_string())?;
    writer.commit(Durability::Durable).map_err(unexpected)
}

fn open(storage: &dyn Storage, name: &StorageName) -> Result<Box<dyn StorageReader>, String> {
    match storage.open(name).map_err(unexpected)? {
        Opened::Random(reader) => Ok(reader),
        Opened::Once(_) => Err("it can be read only once".to_owned()),
    }
}

fn get(storage: &dyn Storage, name: &StorageName) -> Result<Vec<u8>, String> {
    let reader = open(storage, name)?;
    let length = usize::try_from(reader.length()).map_err(|error| error.to_string())?;
    let mut bytes = vec![0xee; length];
    reader.read_exact_at(&mut bytes, 0).map_err(unexpected)?;
    Ok(bytes)
}

fn remove(storage: &dyn Storage, name: &StorageName) -> Result<(), String> {
    storage.remove(name).map_err(unexpected)
}

fn is_absent(storage: &dyn Storage, name: &StorageName) -> Result<(), String> {
    let found = storage.open(name);
    let absent = matches!(found, Err(StorageError::NotFound { .. }));
    ensure(absent, "it cannot be opened")?;
    let listed = storage.list().map_err(unexpected)?;
    ensure(
        listed.iter().all(|entry| entry.name != *name),
        "it is not listed",
    )
}

/// Slots, if the storage supports them.
fn slots_of(
    storage: &dyn Storage,
    name: &StorageName,
) -> Result<Option<Box<dyn StorageWriter>>, String> {
    match storage.create(name, &Create::slots()) {
        Ok(writer) => Ok(Some(writer)),
        Err(StorageError::Unsupported { .. }) => Ok(None),
        Err(error) => Err(unexpected(error)),
    }
}

fn invisible(storage: &dyn Storage) -> Result<(), String> {
    for durability in [Durability::Process, Durability::Durable] {
        let name = name("contract-invisible");
        let writer = storage.create(&name, &Create::stream());
        let mut writer = writer.map_err(unexpected)?;
        ensure(!writer.is_straight(), "it can be taken back")?;
        is_absent(storage, &name)?;
        writer
            .write_all(b"half")
            .map_err(|error| error.to_string())?;
        writer.sync().map_err(unexpected)?;
        is_absent(storage, &name)?;
        writer
            .write_all(b"whole")
            .map_err(|error| error.to_string())?;
        writer.commit(durability).map_err(unexpected)?;
        ensure(get(storage, &name)? == b"halfwhole", "all of it is there")?;
        remove(storage, &name)?;
        is_absent(storage, &name)?;
    }
    Ok(())
}

fn dropped(storage: &dyn Storage) -> Result<(), String> {
    let name = name("contract-dropped");
    let before = storage.list().map_err(unexpected)?;
    let half = || {
        let mut writer = storage.create(&name, &Create::stream())?;
        writer
            .write_all(b"half")
            .map_err(StorageError::io("writing", "it"))
    };
    half().map_err(unexpected)?;
    is_absent(storage, &name)?;
    put(storage, &name, b"old")?;
    half().map_err(unexpected)?;
    ensure(get(storage, &name)? == b"old", "the old one is there")?;
    remove(storage, &name)?;
    ensure(
        storage.list().map_err(unexpected)? == before,
        "nothing else is there",
    )
}

fn replaced(storage: &dyn Storage) -> Result<(), String> {
    let name = name("contract-replaced");
    put(storage, &name, b"a long one")?;
    let writer = storage.create(&name, &Create::stream());
    let mut writer = writer.map_err(unexpected)?;
    writer
        .write_all(b"new")
        .map_err(|error| error.to_string())?;
    ensure(
        get(storage, &name)? == b"a long one",
        "the old one is there",
    )?;
    writer.commit(Durability::Durable).map_err(unexpected)?;
    ensure(get(storage, &name)? == b"new", "the new one is there")?;
    remove(storage, &name)
}

fn refused(storage: &dyn Storage) -> Result<(), String> {
    let name = name("contract-refused");
    let create = Create::stream().existing(Existing::Refuse);
    let late = storage.create(&name, &create).map_err(unexpected)?;
    put(storage, &name, b"first")?;
    let second = storage.create(&name, &create).map(drop);
    ensure(
        matches!(second, Err(StorageError::Exists { .. })),
        "refused when created",
    )?;
    let late = late.commit(Durability::Durable);
    ensure(
        matches!(late, Err(StorageError::Exists { .. })),
        "refused at the commit",
    )?;
    ensure(get(storage, &name)? == b"first", "the first one is there")?;
    remove(storage, &name)?;
    let third = storage.create(&name, &create).map_err(unexpected)?;
    third.commit(Durability::Process).map_err(unexpected)?;
    ensure(get(storage, &name)?.is_empty(), "an empty image is one")?;
    remove(storage, &name)
}

fn absent(storage: &dyn Storage) -> Result<(), String> {
    let name = name("contract-absent");
    is_absent(storage, &name)?;
    let removed = storage.remove(&name);
    ensure(
        matches!(removed, Err(StorageError::NotFound { .. })),
        "removed",
    )?;
    let long = "x".repeat(256);
    for bad in ["", ".", "..", "a/b", "a\0b", &long] {
        let is_bad = matches!(
            bad.parse::<StorageName>(),
            Err(StorageError::BadName { .. })
        );
        ensure(is_bad, bad)?;
    }
    Ok(())
}

fn listed(storage: &dyn Storage) -> Result<(), String> {
    let names = ["contract-list-b", "contract-list-a", "contract-list-ä"].map(name);
    for (name, length) in names.iter().zip(1..) {
        put(storage, name, &vec![1; length])?;
    }
    let listed = storage.list().map_err(unexpected)?;
    ensure(listed.is_sorted(), "ascending")?;
    for (name, length) in names.iter().zip(1..) {
        let found = listed.iter().find(|entry| entry.name == *name);
        ensure(
            found.map(|entry| entry.length) == Some(length),
            "listed with its length",
        )?;
        remove(storage, name)?;
    }
    // The longest possible name.
    let long = name(&"x".repeat(255));
    put(storage, &long, b"long")?;
    ensure(get(storage, &long)? == b"long", "a long name")?;
    remove(storage, &long)
}

fn read(storage: &dyn Storage) -> Result<(), String> {
    let name = name("contract-read");
    put(storage, &name, b"0123456789")?;
    let reader = open(storage, &name)?;
    ensure(reader.length() == 10, "length")?;
    let mut buffer = [0; 4];
    reader.read_exact_at(&mut buffer, 6).map_err(unexpected)?;
    ensure(&buffer == b"6789", "the end")?;
    reader.read_exact_at(&mut buffer, 1).map_err(unexpected)?;
    ensure(&buffer == b"1234", "back again")?;
    for offset in [10, 11, u64::MAX] {
        let read = reader.read_at(&mut buffer, offset);
        // A file system may refuse an offset that no file can reach.
        ensure(
            matches!(read, Ok(0)) || offset == u64::MAX,
            "beyond the end",
        )?;
    }
    match reader.read_exact_at(&mut buffer, 8) {
        Err(StorageError::Truncated {
            offset: 10,
            missing: 2,
            ..
        }) => {}
        other => return Err(format!("cut short: {other:?}")),
    }
    remove(storage, &name)
}

/// Bytes that depend on their position.
fn pattern(length: usize) -> Vec<u8> {
    let bytes = (0_u32..).flat_map(|at| at.wrapping_mul(0x9e37_79b1).to_le_bytes());
    bytes.take(length).collect()
}

fn threads_read(storage: &dyn Storage) -> Result<(), String> {
    const THREADS: usize = 4;
    let name = name("contract-threads");
    let bytes = pattern(1 << 20);
    put(storage, &name, &bytes)?;
    let reader = open(storage, &name)?;
    let (reader, bytes) = (&*reader, &bytes);
    let read = |thread: usize| {
        // Each starts at another place, and all overlap in time.
        for n in 0..256 {
            let at = (n * 7919 + thread * 65536) % (bytes.len() - 4096);
            let mut buffer = [0; 4096];
            reader
                .read_exact_at(&mut buffer, at as u64)
                .map_err(unexpected)?;
            ensure(buffer == bytes[at..at + 4096], "the bytes of that place")?;
            let data = reader.data_from(at as u64).map_err(unexpected)?;
            ensure(data.is_some_and(|data| data.contains(&(at as u64))), "data")?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || read(thread)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Err("a thread panicked".to_owned())))
            .collect::<Result<Vec<()>, String>>()
    })?;
    remove(storage, &name)
}

fn stream(storage: &dyn Storage) -> Result<(), String> {
    let name = name("contract-stream");
    let writer = storage.create(&name, &Create::stream());
    let mut writer = writer.map_err(unexpected)?;
    ensure(writer.shape() == Shape::Stream, "shape")?;
    let unsupported = |result: Result<(), StorageError>, what: &str| {
        ensure(
            matches!(result, Err(StorageError::Unsupported { .. })),
            what,
        )
    };
    unsupported(writer.write_all_at(b"x", 0), "written at a place")?;
    unsupported(writer.read_exact_at(&mut [0], 0), "read back")?;
    unsupported(writer.punch(0..4096), "a hole")?;
    unsupported(writer.set_length(1), "a length")?;
    let bytes = pattern(300_000);
    for chunk in bytes.chunks(7001) {
        writer.write_all(chunk).map_err(|error| error.to_string())?;
    }
    writer.commit(Durability::Process).map_err(unexpected)?;
    ensure(get(storage, &name)? == bytes, "all of it, in order")?;
    remove(storage, &name)
}

fn slots(storage: &dyn Storage) -> Result<(), String> {
    const PIECE: usize = 4096;
    let name = name("contract-slots");
    let Some(writer) = slots_of(storage, &name)? else {
        return Ok(());
    };
    let bytes = pattern(64 * PIECE);
    let (shared, pieces) = (&*writer, &bytes);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                scope.spawn(move || {
                    // From the last to the first.
                    let own = pieces.chunks(PIECE).enumerate().skip(thread).step_by(4);
                    let own: Vec<_> = own.collect();
                    own.into_iter().rev().try_for_each(|(n, piece)| {
                        let at = (n * PIECE) as u64;
                        shared.write_all_at(piece, at).map_err(unexpected)
                    })
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Err("a thread panicked".to_owned())))
            .collect::<Result<Vec<()>, String>>()
    })?;
    // Overwrites a part, and cuts the end.
    writer.write_all_at(b"again", 10).map_err(unexpected)?;
    let mut back = [0; 9];
    writer.read_exact_at(&mut back, 8).map_err(unexpected)?;
    ensure(
        back[2..7] == *b"again" && back[..2] == bytes[8..10],
        "it is read back",
    )?;
    let beyond = writer.read_exact_at(&mut back, (64 * PIECE) as u64 - 4);
    ensure(
        matches!(beyond, Err(StorageError::Truncated { missing: 5, .. })),
        "nothing is read after the end",
    )?;
    writer.set_length((63 * PIECE) as u64).map_err(unexpected)?;
    is_absent(storage, &name)?;
    writer.commit(Durability::Durable).map_err(unexpected)?;
    let mut expected = bytes;
    expected[10..15].copy_from_slice(b"again");
    expected.truncate(63 * PIECE);
    ensure(get(storage, &name)? == expected, "what was written last")?;
    remove(storage, &name)
}

/// An image of 3 MiB: data in the second, a hole before and after; a hole of 8 KiB in the data.
fn sparse(storage: &dyn Storage, name: &StorageName) -> Result<Option<Vec<u8>>, String> {
    const MIB: usize = 1 << 20;
    let Some(writer) = slots_of(storage, name)? else {
        return Ok(None);
    };
    let data = pattern(MIB);
    let hole = MIB + 65536..MIB + 65536 + 8192;
    writer
        .write_all_at(&data, MIB as u64)
        .and_then(|()| writer.set_length(3 * MIB as u64))
        .and_then(|()| writer.punch(hole.start as u64..hole.end as u64))
        // Beyond the end there is nothing to punch.
        .and_then(|()| writer.punch(3 * MIB as u64..5 * MIB as u64))
        .map_err(unexpected)?;
    writer.commit(Durability::Process).map_err(unexpected)?;
    let mut expected = vec![0; 3 * MIB];
    expected[MIB..2 * MIB].copy_from_slice(&data);
    expected[hole].fill(0);
    Ok(Some(expected))
}

fn holes(storage: &dyn Storage) -> Result<(), String> {
    let name = name("contract-holes");
    if let Some(expected) = sparse(storage, &name)? {
        ensure(
            get(storage, &name)? == expected,
            "zeros where nothing was written",
        )?;
        remove(storage, &name)?;
    }
    Ok(())
}

fn segmented(storage: &dyn Storage) -> Result<(), String> {
    let name = name("contract-segments");
    put(storage, &name, b"")?;
    ensure(
        segments(&*open(storage, &name)?).next().is_none(),
        "nothing of nothing",
    )?;
    let expected = match sparse(storage, &name)? {
        Some(expected) => expected,
        None => {
            put(storage, &name, &pattern(10_000))?;
            pattern(10_000)
        }
    };
    let reader = open(storage, &name)?;
    let mut at = 0;
    for segment in segments(&*reader) {
        let (range, hole) = match segment.map_err(unexpected)? {
            Segment::Data(range) => (range, false),
            Segment::Hole(range) => (range, true),
        };
        ensure(
            range.start == at && range.end > at,
            "each starts where the last ended",
        )?;
        at = range.end;
        let of = |offset| usize::try_from(offset).map_err(|_| "too long".to_owned());
        let bytes = &expected[of(range.start)?..of(range.end)?];
        ensure(
            !hole || bytes.iter().all(|byte| *byte == 0),
            "holes are zeros",
        )?;
    }
    ensure(at == reader.length(), "the last ends at the end")?;
    ensure(
        matches!(reader.data_from(reader.length()), Ok(None)),
        "no data at the end",
    )?;
    remove(storage, &name)
}

fn shared(storage: &dyn Storage) -> Result<(), String> {
    let [base_name, name] = ["contract-base", "contract-shared"].map(name);
    let bytes = pattern(3 * 65536 + 100);
    put(storage, &base_name, &bytes)?;
    let base = open(storage, &base_name)?;
    if let Some(writer) = slots_of(storage, &name)? {
        let end = base.length();
        for odd in [1..4096, 0..4095] {
            let result = writer.clone_range(&*base, odd, 0);
            let refused = matches!(result, Err(StorageError::Unsupported { .. }));
            ensure(refused, "a range of no whole blocks")?;
        }
        let mut expected = vec![0; 65536 + bytes.len() - 65536];
        match writer.clone_range(&*base, 65536..end, 65536) {
            Ok(()) => {
                expected[65536..].copy_from_slice(&bytes[65536..]);
                writer
                    .write_all_at(b"changed", 2 * 65536)
                    .map_err(unexpected)?;
                expected[2 * 65536..2 * 65536 + 7].copy_from_slice(b"changed");
                writer.commit(Durability::Durable).map_err(unexpected)?;
                ensure(get(storage, &name)? == expected, "the range and the change")?;
                remove(storage, &name)?;
            }
            Err(StorageError::Unsupported { .. }) => {}
            Err(error) => return Err(unexpected(error)),
        }
    }
    ensure(get(storage, &base_name)? == bytes, "the base is as it was")?;
    remove(storage, &base_name)
}
