//! The directory of a mock host, opened once, and its files: no access through links, and none for
//! other users.
//!
//! Another user may have created a directory in `/tmp`, with links in it to the caller's own files.
//! So the host's directory has to belong to the caller and be writable only by the caller, and each
//! name in it is opened relative to it with O_NOFOLLOW.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
};
use std::path::{Path, PathBuf};

use crate::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fchmod, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

use super::error::MockError;

/// Directories and files are private to their owner, whatever the umask.
const PRIVATE_DIR: Mode = Mode::S_IRWXU;
const PRIVATE_FILE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);
/// Permission to write for anyone except the owner.
const OTHERS_WRITE: u32 = 0o022;

/// The suffix of the temporary name of a file that is being written.
const NEW: &str = "new";

/// Whether `name` is the temporary name of a file that is being written.
pub(super) fn is_new(name: &str) -> bool {
    Path::new(name)
        .extension()
        .is_some_and(|ending| ending == NEW)
}

/// The name of a file while it is not complete.
pub(super) fn new_name(name: &str) -> String {
    format!("{name}.{NEW}")
}

/// The mode in which a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// For reading. The file must exist.
    Read,
    /// For reading and writing. The file is created if it does not exist.
    Write,
}

/// An open directory.
#[derive(Debug)]
pub(super) struct Place {
    fd: OwnedFd,
    /// For messages.
    path: PathBuf,
}

impl Place {
    /// Open the directory of a host. It has to belong to the caller; read permissions of others are
    /// removed. `None`: the directory does not exist.
    pub(super) fn open(path: &Path) -> Result<Option<Self>, MockError> {
        let opened = File::options()
            .read(true)
            .custom_flags((OFlag::O_DIRECTORY | OFlag::O_CLOEXEC).bits())
            .open(path);
        let dir = match opened {
            Ok(dir) => dir,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(e) => return Err(MockError::io("open", path)(e)),
        };
        let about = dir.metadata().map_err(MockError::io("look at", path))?;
        let unsafe_because = |why: String| MockError::Unsafe {
            path: path.to_owned(),
            why,
        };
        let user = geteuid();
        if about.uid() != user.as_raw() {
            return Err(unsafe_because(format!(
                "it belongs to user {}, and this is user {user}: use a directory of your own",
                about.uid()
            )));
        }
        if about.mode() & OTHERS_WRITE != 0 {
            return Err(unsafe_because(
                "others may write to it, and could have put anything there: use another directory, \
                 or look at what is in it and then run `chmod 700` on it"
                    .to_owned(),
            ));
        }
        let place = Self {
            fd: dir.into(),
            path: path.to_owned(),
        };
        if about.mode() & 0o777 != PRIVATE_DIR.bits() {
            place.make_private(PRIVATE_DIR)?;
        }
        Ok(Some(place))
    }

    /// Create the directory of a host, or open an existing one.
    pub(super) fn create(path: &Path) -> Result<Self, MockError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(PRIVATE_DIR.bits());
        builder
            .create(path)
            .map_err(MockError::io("create", path))?;
        Self::open(path)?.ok_or_else(|| MockError::io("open", path)(Errno::ENOENT.into()))
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A directory in it, any number of levels down `path`.
    pub(super) fn within(&self, path: &str) -> Result<Self, MockError> {
        let mut parts = path.split('/');
        let first = parts.next().unwrap_or_default();
        let mut place = self.subdirectory(first)?;
        for part in parts {
            place = place.subdirectory(part)?;
        }
        Ok(place)
    }

    fn subdirectory(&self, name: &str) -> Result<Self, MockError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let fd = self.open_at(name, flags, Mode::empty())?;
        Ok(Self {
            fd,
            path: self.path.join(name),
        })
    }

    /// Create a directory in it.
    pub(super) fn make(&self, name: &str) -> Result<Self, MockError> {
        mkdirat(&self.fd, name, PRIVATE_DIR)
            .map_err(|errno| MockError::io("create", self.path.join(name))(errno.into()))?;
        let place = self.subdirectory(name)?;
        place.make_private(PRIVATE_DIR)?;
        Ok(place)
    }

    fn make_private(&self, mode: Mode) -> Result<(), MockError> {
        fchmod(&self.fd, mode)
            .map_err(|errno| MockError::io("change the mode of", &self.path)(errno.into()))
    }

    /// A file in it.
    pub(super) fn file(&self, name: &str, how: How) -> Result<File, MockError> {
        let path = self.path.join(name);
        let file: File = match how {
            How::Read => self.open_at(name, OFlag::O_RDONLY, Mode::empty())?.into(),
            How::Write => self.open_or_make(name)?.into(),
        };
        let about = file.metadata().map_err(MockError::io("look at", &path))?;
        if !about.is_file() {
            let why = match about.file_type() {
                kind if kind.is_fifo() => "it is a FIFO where a file was expected",
                kind if kind.is_dir() => "it is a directory where a file was expected",
                _ => "it is not a regular file",
            };
            return Err(MockError::Unsafe {
                path,
                why: why.to_owned(),
            });
        }
        Ok(file)
    }

    fn open_or_make(&self, name: &str) -> Result<OwnedFd, MockError> {
        let make =
            OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&self.fd, name, make, PRIVATE_FILE).map_err(Errno::from) {
            Ok(fd) => {
                // The umask may have removed permissions that the owner needs.
                fchmod(&fd, PRIVATE_FILE).map_err(|errno| {
                    MockError::io("change the mode of", self.path.join(name))(errno.into())
                })?;
                Ok(fd)
            }
            Err(Errno::EEXIST) => self.open_at(name, OFlag::O_RDWR, Mode::empty()),
            Err(errno) => Err(MockError::io("create", self.path.join(name))(errno.into())),
        }
    }

    fn open_at(&self, name: &str, flags: OFlag, mode: Mode) -> Result<OwnedFd, MockError> {
        // The flags also prevent blocking on a FIFO.
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        openat(&self.fd, name, flags, mode).map_err(|errno| {
            let path = self.path.join(name);
            match self.is_link(name) {
                true => MockError::Unsafe {
                    path,
                    why: "it is a symbolic link, and nothing of a mock host is: remove it"
                        .to_owned(),
                },
                false => MockError::io("open", path)(errno.into()),
            }
        })
    }

    fn is_link(&self, name: &str) -> bool {
        fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(|about| {
            SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT == SFlag::S_IFLNK
        })
    }

    /// The contents of a file in it; `None` if the file does not exist.
    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, MockError> {
        let mut file = match self.file(name, How::Read) {
            Ok(file) => file,
            Err(MockError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .map_err(MockError::io("read", self.path.join(name)))?;
        Ok(Some(bytes))
    }

    /// Replace the contents of a file by `bytes` atomically: a reader, also after this process has
    /// died, finds the old file or the new one. The data is not synced to the disk.
    pub(super) fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), MockError> {
        self.replace_with(name, &mut |file| file.write_all(bytes))
    }

    /// As [`Place::replace`], by what `write` writes.
    pub(super) fn replace_with(
        &self,
        name: &str,
        write: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), MockError> {
        let temporary = new_name(name);
        let path = self.path.join(&temporary);
        let file = self.file(&temporary, How::Write)?;
        let mut file = BufWriter::new(file);
        let written = file
            .get_ref()
            .set_len(0)
            .and_then(|()| write(&mut file))
            .and_then(|()| file.flush())
            .map_err(MockError::io("write", path))
            .and_then(|()| self.rename(&temporary, name));
        if written.is_err() {
            // On a full disk, its room is needed. The first error is the one that counts.
            if let Err(error) = self.remove(&temporary) {
                tracing::warn!(%error, "a partial file of the mock host is left");
            }
        }
        written
    }

    /// The length of a file in it, in bytes; `None` if the file does not exist.
    pub(super) fn length(&self, name: &str) -> Result<Option<u64>, MockError> {
        match self.file(name, How::Read) {
            Ok(file) => {
                let metadata = file.metadata();
                let metadata = metadata.map_err(MockError::io("read", self.path.join(name)))?;
                Ok(Some(metadata.len()))
            }
            Err(MockError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Rename a file or directory in it.
    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), MockError> {
        renameat(&self.fd, from, &self.fd, to)
            .map_err(|errno| MockError::io("rename", self.path.join(from))(errno.into()))
    }

    /// Remove a file in it, if it exists.
    pub(super) fn remove(&self, name: &str) -> Result<(), MockError> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir).map_err(Errno::from) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(MockError::io("remove", self.path.join(name))(errno.into())),
        }
    }

    /// Remove a directory in it with its contents, if it exists.
    pub(super) fn remove_all(&self, name: &str) -> Result<(), MockError> {
        match fs::remove_dir_all(self.by_descriptor().join(name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(MockError::io("remove", self.path.join(name))),
        }
    }

    /// Remove a file, or a directory with its contents, in it, if it exists.
    pub(super) fn remove_any(&self, name: &str) -> Result<(), MockError> {
        match self.remove_all(name) {
            Err(MockError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotADirectory => {
                self.remove(name)
            }
            result => result,
        }
    }

    /// Remove temporary files of interrupted writes.
    pub(super) fn clear_new(&self) -> Result<(), MockError> {
        let names = self.names()?;
        let mut new = names.iter().filter(|name| is_new(name));
        new.try_for_each(|name| self.remove(name))
    }

    /// The names in it.
    pub(super) fn names(&self) -> Result<Vec<String>, MockError> {
        let read = |error| MockError::io("read", &self.path)(error);
        let mut names = Vec::new();
        for entry in fs::read_dir(self.by_descriptor()).map_err(read)? {
            let name = entry.map_err(read)?.file_name();
            names.extend(name.to_str().map(str::to_owned));
        }
        Ok(names)
    }

    /// The path of the open directory, even if it has been renamed. Without a mounted `/proc` (an
    /// empty root), the name it had when it was opened.
    pub(super) fn by_descriptor(&self) -> PathBuf {
        let number = self.fd.as_raw_fd().to_string();
        let path = Path::new("/proc/self/fd").join(OsStr::new(&number));
        match path.exists() {
            true => path,
            false => self.path.clone(),
        }
    }

    /// Whether it is empty.
    pub(super) fn is_empty(&self) -> Result<bool, MockError> {
        let mut entries =
            fs::read_dir(self.by_descriptor()).map_err(MockError::io("read", &self.path))?;
        Ok(entries.next().is_none())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use nix::unistd::{Uid, chown};

    use super::super::{GuestSpec, HostConfig, MockHost};
    use super::*;
    use crate::{GuestKind, Host as _};

    fn small() -> HostConfig {
        HostConfig {
            memory_pages: 1 << 13,
            ..HostConfig::default()
        }
    }

    /// Every file and directory of a host, with its mode.
    fn modes(dir: &Path) -> Vec<(PathBuf, u32, bool)> {
        let mut all = vec![];
        let mut left = vec![dir.to_owned()];
        while let Some(path) = left.pop() {
            let about = fs::symlink_metadata(&path).expect("it is there");
            all.push((
                path.clone(),
                about.permissions().mode() & 0o7777,
                about.is_dir(),
            ));
            if about.is_dir() {
                left.extend(
                    fs::read_dir(&path)
                        .expect("a directory")
                        .map(|e| e.expect("an entry").path()),
                );
            }
        }
        all
    }

    #[test]
    fn a_host_is_its_owners_alone() {
        let scratch = tempfile::tempdir().expect("a directory");
        let dir = scratch.path().join("host");
        let host = MockHost::create(&dir, &small()).expect("a host");
        let guest = GuestSpec::new("web", GuestKind::Pvh, 8);
        host.create_guest(&guest).expect("a guest");
        let modes = modes(&dir);
        assert!(modes.len() > 10, "{modes:?}");
        for (path, mode, is_dir) in modes {
            let expected = if is_dir { 0o700 } else { 0o600 };
            assert_eq!(mode, expected, "{}: {mode:o}", path.display());
        }
    }

    #[test]
    fn a_directory_of_somebody_elses_or_that_others_may_write_is_refused() {
        let scratch = tempfile::tempdir().expect("a directory");
        let dir = scratch.path().join("host");
        drop(MockHost::create(&dir, &small()).expect("a host"));
        let set =
            |mode| fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).expect("a mode");
        for mode in [0o777, 0o1777, 0o720, 0o702] {
            set(mode);
            for refused in [
                MockHost::open(&dir).expect_err("refused"),
                MockHost::open_or_create(&dir, &small()).expect_err("refused"),
            ] {
                let refused = refused.to_string();
                assert!(refused.contains("others may write to it"), "{refused}");
            }
        }
        // Others lose their read permission.
        set(0o755);
        drop(MockHost::open(&dir).expect("opened"));
        assert_eq!(
            fs::metadata(&dir).expect("there").permissions().mode() & 0o777,
            0o700
        );
        if geteuid().is_root() {
            chown(&dir, Some(Uid::from_raw(65_534)), None).expect("another owner");
            let refused = MockHost::open(&dir).expect_err("refused").to_string();
            assert!(refused.contains("belongs to user 65534"), "{refused}");
            fs::remove_file(dir.join("lock")).expect("a lock");
            let empty = scratch.path().join("empty");
            fs::create_dir(&empty).expect("a directory");
            chown(&empty, Some(Uid::from_raw(65_534)), None).expect("another owner");
            let refused = MockHost::create(&empty, &small()).expect_err("refused");
            assert!(refused.to_string().contains("belongs to user 65534"));
        } else {
            eprintln!("SKIPPED: another owner's directory: this is not root");
        }
    }

    #[test]
    fn no_link_in_a_host_is_followed() {
        let scratch = tempfile::tempdir().expect("a directory");
        let victim = scratch.path().join("victim");
        let elsewhere = scratch.path().join("elsewhere");
        for name in [
            "lock",
            "host.json",
            "memory",
            "frames",
            "m2p",
            "blocks",
            "counters",
            "open",
            "domains",
            "domains/1",
            "domains/1/state.json",
            "domains/1/p2m",
            "domains/1/blobs",
            "domains/1/blobs/hvm-context",
        ] {
            for dangling in [false, true] {
                let dir = tempfile::tempdir_in(scratch.path()).expect("a directory");
                let dir = dir.path().join("host");
                let host = MockHost::create(&dir, &small()).expect("a host");
                host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))
                    .expect("a guest");
                drop(host);
                let path = dir.join(name);
                if elsewhere.exists() {
                    fs::remove_dir_all(&elsewhere).expect("removed");
                }
                let was_dir = path.is_dir();
                let target = match (dangling, was_dir) {
                    (true, _) => scratch.path().join("nothing"),
                    (false, true) => elsewhere.clone(),
                    (false, false) => victim.clone(),
                };
                fs::write(&victim, b"precious").expect("a file");
                if was_dir {
                    fs::rename(&path, &elsewhere).expect("moved");
                } else {
                    fs::remove_file(&path).expect("removed");
                }
                symlink(&target, &path).expect("a link");
                let before = modes(scratch.path()).len();
                let refused = MockHost::open(&dir).expect_err(name).to_string();
                assert!(refused.contains("is a symbolic link"), "{name}: {refused}");
                assert_eq!(fs::read(&victim).expect("there"), b"precious", "{name}");
                assert!(!scratch.path().join("nothing").exists(), "{name}");
                assert_eq!(modes(scratch.path()).len(), before, "{name}");
            }
        }
    }

    #[test]
    fn a_temporary_name_is_no_way_out_either() {
        let scratch = tempfile::tempdir().expect("a directory");
        let dir = scratch.path().join("host");
        let victim = scratch.path().join("victim");
        fs::write(&victim, b"precious").expect("a file");
        let host = MockHost::create(&dir, &small()).expect("a host");
        let domid = host
            .create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))
            .expect("a guest");
        symlink(&victim, dir.join("domains/1/state.json.new")).expect("a link");
        host.domain(domid)
            .expect("there")
            .pause()
            .expect_err("refused");
        assert_eq!(fs::read(&victim).expect("there"), b"precious");
    }

    #[test]
    fn a_fifo_holds_nothing_up() {
        let scratch = tempfile::tempdir().expect("a directory");
        let dir = scratch.path().join("host");
        drop(MockHost::create(&dir, &small()).expect("a host"));
        for name in ["host.json", "lock"] {
            let path = dir.join(name);
            let kept = scratch.path().join(name);
            fs::rename(&path, &kept).expect("moved");
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).expect("a FIFO");
            let refused = MockHost::open(&dir).expect_err("refused").to_string();
            assert!(refused.contains("is a FIFO"), "{refused}");
            fs::rename(&kept, &path).expect("moved back");
        }
    }
}
