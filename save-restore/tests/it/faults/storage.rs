//! Whole saves into a storage of which every call fails in turn: the guest keeps running, and the
//! name refers to the old image or to the complete new one.

use xsr_save_restore::SaveError;
use xsr_save_restore::sink::{CopySink, FdSink};
use xsr_save_restore::source::FdSource;
use xsr_save_restore::storage::file::FileStorage;
use xsr_save_restore::storage::testing::{FakeStorage, Fault};
use xsr_save_restore::storage::{Create, Durability, Opened, Storage, StorageError, StorageName};

use crate::faults::*;

const OLD: &[u8] = b"an image of yesterday";

fn name() -> StorageName {
    "web.save".parse().unwrap()
}

fn contents(storage: &dyn Storage) -> Vec<u8> {
    let Opened::Random(reader) = storage.open(&name()).unwrap() else {
        panic!("it can be read only once");
    };
    let mut bytes = vec![0; usize::try_from(reader.length()).unwrap()];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// What failed.
#[derive(Debug)]
enum Failed {
    Storage(StorageError),
    Save(SaveError),
}

/// Saves into the storage as a toolstack does it: the guest is released only once the image is
/// complete and durable. Returns whether it was.
fn save_into(guest: &Guest<'_>, storage: &dyn Storage, what: &str) -> Result<(), Failed> {
    let domain = guest.host.domain(guest.domid).unwrap();
    let mut toolstack = Toolstack::new(domain.as_ref());
    let mut writer = storage
        .create(&name(), &Create::stream())
        .map_err(Failed::Storage)?;
    let threads = 1 + what.len() % 2;
    let saved = match writer.descriptor() {
        Some(descriptor) => {
            let sink = &mut FdSink::new(descriptor);
            guest.save(threads, domain.as_ref(), &mut toolstack, sink, &mut go_on)
        }
        None => {
            let sink = &mut CopySink(&mut writer);
            guest.save(threads, domain.as_ref(), &mut toolstack, sink, &mut go_on)
        }
    };
    let saved = saved.map_err(Failed::Save)?;
    writer
        .commit(Durability::Durable)
        .map_err(Failed::Storage)?;
    // The test still needs the guest; a toolstack would keep it suspended and destroy it.
    saved.resume().unwrap();
    Ok(())
}

#[test]
fn a_save_into_a_storage_survives_every_call_that_fails() {
    let mut points = Points::default();
    with_guests(44, |guest, before| {
        let slow = guest.spec.kind == GuestKind::Hvm || guest.spec.width == 4;
        if guest.mode == Mode::Live || slow {
            return;
        }
        let whole = FakeStorage::new();
        save_into(guest, &whole, "whole").unwrap();
        let (calls, image) = (whole.calls(), contents(&whole));
        let faults = [
            Fault::Error(Errno::ENOSPC),
            Fault::Error(Errno::EIO),
            Fault::Short,
            Fault::CrashBefore,
            Fault::CrashAfter,
        ];
        for (nth, at) in some_events(calls).enumerate() {
            // Each fault at the first calls and the last; in between they take turns.
            let all = at < 3 || at + 5 > calls;
            for (n, fault) in faults.into_iter().enumerate() {
                if !all && n != nth % faults.len() {
                    continue;
                }
                let what = format!("{} call {at} {fault:?}", guest.spec.name);
                let storage = FakeStorage::new();
                let mut old = storage.create(&name(), &Create::stream()).unwrap();
                std::io::Write::write_all(&mut old, OLD).unwrap();
                old.commit(Durability::Durable).unwrap();
                storage.fail(at, fault);
                let result = save_into(guest, &storage, &what);
                guest.assert_runs(before, &what);
                let found = contents(&storage.after_a_crash());
                let cut = contents(&storage.after_a_power_cut());
                for there in [&found, &cut] {
                    assert!(*there == OLD || *there == image, "{what}: half an image");
                }
                if let Err(Failed::Save(error)) = &result {
                    assert!(matches!(error, SaveError::Stream(_)), "{what}: {error}");
                }
                match result {
                    Ok(()) => assert!(fault == Fault::Short && cut == image, "{what}"),
                    Err(Failed::Storage(StorageError::NotDurable { .. })) => {
                        assert!(found == image, "{what}");
                    }
                    Err(_) if fault == Fault::CrashAfter => {}
                    Err(_) => assert!(found == OLD && cut == OLD, "{what}"),
                }
                points.add(what);
            }
        }
    });
    points.report("calls on a storage", 60);
}

#[test]
fn what_is_saved_into_a_file_is_restored_from_it() {
    let directory = tempfile::tempdir().unwrap();
    let storage = FileStorage::new(directory.path());
    let to = host(46);
    with_guests(45, |guest, _| {
        if guest.mode == Mode::Live {
            return;
        }
        save_into(guest, &storage, "file").unwrap();
        let Opened::Random(reader) = storage.open(&name()).unwrap() else {
            panic!("a file can be read at any place");
        };
        let (domid, rings) = make_room(&to, guest.spec);
        let domain = to.domain(domid).unwrap();
        let mut toolstack = Toolstack::new(domain.as_ref());
        let source = FdSource::new(reader.descriptor().unwrap());
        let restored = try_restore(domain.as_ref(), source, &mut toolstack, rings, &mut go_on);
        restored.unwrap();
        // The rings belong to the new host.
        let left = guest.host.memory_digest(guest.domid).unwrap();
        let arrived = to.memory_digest(domid).unwrap();
        assert!(arrived.differences(&left).len() <= 4, "{}", guest.spec.name);
        domain.destroy().unwrap();
    });
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "no temporary file is left");
}
