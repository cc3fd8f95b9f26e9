//! Sharing of space between files, on file systems that support it: XFS and Btrfs in a file,
//! mounted over a loop device. Needs root and their tools, and prints loudly if it did not run.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::storage::StorageReader;

/// A mounted file system; unmounted on drop.
struct Mounted {
    point: PathBuf,
    _directory: tempfile::TempDir,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.point).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} is still mounted", self.point.display());
        }
    }
}

/// Runs a program; returns its output if it failed.
fn ran(program: &str, arguments: &[&Path]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// A new file system of 320 MiB, the smallest that mkfs.xfs creates.
fn mount(make: &str) -> Result<Mounted, String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("only root can mount".to_owned());
    }
    let directory = tempfile::tempdir().unwrap();
    let (device, point) = (
        directory.path().join("device"),
        directory.path().join("point"),
    );
    fs::create_dir(&point).unwrap();
    File::create(&device).unwrap().set_len(320 << 20).unwrap();
    ran(make, &[Path::new("-q"), &device])?;
    ran(
        "mount",
        &[Path::new("-o"), Path::new("loop"), &device, &point],
    )?;
    Ok(Mounted {
        point,
        _directory: directory,
    })
}

/// Free bytes, after everything has been written.
fn free(point: &Path) -> u64 {
    let root = File::open(point).unwrap();
    rustix::fs::syncfs(&root).unwrap();
    let room = rustix::fs::fstatvfs(&root).unwrap();
    room.f_bfree * room.f_frsize
}

fn open(storage: &FileStorage, image: &str) -> Box<dyn StorageReader> {
    match storage.open(&name(image)).unwrap() {
        Opened::Random(reader) => reader,
        Opened::Once(_) => panic!("it can be read only once"),
    }
}

fn contents(reader: &dyn StorageReader) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(reader.length()).unwrap()];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn shares_room(make: &str) {
    const MIB: usize = 1 << 20;
    let mounted = match mount(make) {
        Ok(mounted) => mounted,
        Err(why) => {
            eprintln!("SKIPPED: sharing room was not tried with {make}: {why}");
            return;
        }
    };
    let storage = FileStorage::new(&mounted.point);
    // The contract, on a file system that can share.
    assert_eq!(testing::run(&storage), []);
    let mut expected: Vec<u8> = (0_u32..64 << 18)
        .flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_le_bytes())
        .collect();
    expected.truncate(64 * MIB);
    put(&storage, &name("base"), &expected).unwrap();
    let base = open(&storage, "base");
    let before = free(&mounted.point);
    let writer = storage.create(&name("new"), &Create::slots()).unwrap();
    writer.clone_range(&*base, 0..base.length(), 0).unwrap();
    writer.write_all_at(&[9; 4096], 8 << 20).unwrap();
    writer.punch(16 << 20..17 << 20).unwrap();
    writer.commit(Durability::Durable).unwrap();
    let taken = before.saturating_sub(free(&mounted.point));
    assert!(
        taken < 8 << 20,
        "{taken} bytes were taken, so that nothing is shared"
    );
    assert!(contents(&*base) == expected, "the base is as it was");
    expected[8 * MIB..8 * MIB + 4096].fill(9);
    expected[16 * MIB..17 * MIB].fill(0);
    assert!(contents(&*open(&storage, "new")) == expected);
    // A file of another file system cannot share space.
    let elsewhere = tempfile::tempdir().unwrap();
    let other = FileStorage::new(elsewhere.path());
    put(&other, &name("other"), &[1; 8192]).unwrap();
    let writer = storage.create(&name("third"), &Create::slots()).unwrap();
    let refused = writer.clone_range(&*open(&other, "other"), 0..8192, 0);
    assert!(
        matches!(refused, Err(StorageError::Unsupported { .. })),
        "{refused:?}"
    );
    eprintln!("{make}: an image of 64 MiB with one page changed took {taken} bytes");
}

#[test]
fn xfs_shares_room() {
    shares_room("mkfs.xfs");
}

#[test]
fn btrfs_shares_room() {
    shares_room("mkfs.btrfs");
}
