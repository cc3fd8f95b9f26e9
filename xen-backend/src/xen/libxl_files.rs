//! The files that libxl keeps for a domain; they are only read.
//!
//! | file | holds |
//! |---|---|
//! | `/var/lib/xen/userdata-d.N.UUID.libxl-json` | the configuration of domain N |
//! | `/var/lib/xen/userdata-….N.UUID.…` | further user data, and the lock of it |
//! | `/var/lib/xen/qemu-save.N`, `qemu-resume.N` | the state of a device model |
//! | `/run/xen/qmp-libxl-N`, `qmp-libxenstat-N` | sockets of a device model |
//!
//! C implementation: `libxl__userdata_path` in `tools/libs/light/libxl_dom.c`,
//! `LIBXL_DEVICE_MODEL_SAVE_FILE` in `libxl_internal.h`, `libxl_dm.c`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::libc::{O_NOFOLLOW, O_NONBLOCK};

use crate::domain_store::DomainRef;

/// The longest configuration that is read.
const LONGEST: u64 = 16 << 20;

/// Where libxl keeps its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LibxlFiles {
    /// The hypervisor is a mock machine in memory.
    #[cfg(feature = "mock")]
    None,
    /// It is the mock machine in this directory, which has a configuration of libxl in the user
    /// data of each domain that `xsr mock` has created.
    #[cfg(feature = "mock")]
    Mock(PathBuf),
    Below(Directories),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Directories {
    lib: PathBuf,
    run: PathBuf,
}

impl LibxlFiles {
    /// The directories of Xen's packages.
    pub(super) fn of_this_machine() -> Self {
        Self::below(Path::new("/"))
    }

    /// No files: the hypervisor is a mock machine.
    #[cfg(all(test, feature = "mock"))]
    pub(super) const fn none() -> Self {
        Self::None
    }

    /// What a mock machine has instead.
    #[cfg(feature = "mock")]
    pub(crate) fn of_mock(directory: Option<&Path>) -> Self {
        directory.map_or(Self::None, |directory| Self::Mock(directory.to_owned()))
    }

    /// The directories of a machine whose root directory is `root`.
    pub(crate) fn below(root: &Path) -> Self {
        Self::Below(Directories {
            lib: root.join("var/lib/xen"),
            run: root.join("run/xen"),
        })
    }

    /// The configuration that libxl keeps for a domain, and its file.
    pub(super) fn configuration(
        &self,
        domain: DomainRef,
    ) -> io::Result<Option<(PathBuf, Vec<u8>)>> {
        let DomainRef { domid, uuid } = domain;
        let path = match self {
            #[cfg(feature = "mock")]
            Self::None => return Ok(None),
            #[cfg(feature = "mock")]
            Self::Mock(machine) => {
                machine.join(format!("domains/{}/blobs/userdata-libxl-json", domid.0))
            }
            Self::Below(Directories { lib, .. }) => {
                lib.join(format!("userdata-d.{}.{uuid}.libxl-json", domid.0))
            }
        };
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        match read(&path) {
            Ok(bytes) => Ok(Some((path, bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(named(error)),
        }
    }

    /// Every file of a domain. An unreadable directory counts as empty.
    pub(super) fn of(&self, domain: DomainRef) -> Vec<PathBuf> {
        let (lib, run) = match self {
            // A mock machine removes them with the domain.
            #[cfg(feature = "mock")]
            Self::None | Self::Mock(_) => return Vec::new(),
            Self::Below(Directories { lib, run }) => (lib, run),
        };
        let DomainRef { domid, uuid } = domain;
        let number = domid.0;
        let user_data = format!(".{number}.{uuid}.");
        let in_lib = |name: &str| {
            name.strip_prefix("userdata-")
                .and_then(|rest| rest.get(1..))
                .is_some_and(|rest| rest.starts_with(&user_data))
                || [
                    format!("qemu-save.{number}"),
                    format!("qemu-resume.{number}"),
                ]
                .iter()
                .any(|file| file == name)
        };
        let in_run = |name: &str| {
            ["qmp-libxl-", "qmp-libxenstat-"]
                .iter()
                .filter_map(|prefix| name.strip_prefix(prefix))
                .any(|rest| rest == number.to_string())
        };
        let mut files = named(lib, in_lib);
        files.extend(named(run, in_run));
        files.sort();
        files
    }
}

/// The files of a directory whose names `chosen` accepts.
fn named(directory: &Path, chosen: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(&chosen))
        .map(|entry| entry.path())
        .collect()
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(O_NOFOLLOW | O_NONBLOCK)
        .open(path)?;
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > LONGEST {
        true => Err(io::ErrorKind::FileTooLarge.into()),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DomId, Uuid};

    #[test]
    fn the_files_of_a_domain_are_told_from_those_of_others() {
        let root = tempfile::tempdir().unwrap();
        let domain = DomainRef {
            domid: DomId(7),
            uuid: Uuid([0x11; 16]),
        };
        let other = Uuid([0x22; 16]);
        let [lib, run] = ["var/lib/xen", "run/xen"].map(|dir| root.path().join(dir));
        let files = LibxlFiles::below(root.path());
        assert_eq!(files.of(domain), Vec::<PathBuf>::new(), "no directories");
        assert_eq!(files.configuration(domain).unwrap(), None);
        let json = format!("userdata-d.7.{}.libxl-json", domain.uuid);
        let its = [
            lib.join("qemu-save.7"),
            lib.join(&json),
            lib.join(format!("userdata-l.7.{}.domain-userdata-lock", domain.uuid)),
            run.join("qmp-libxl-7"),
        ];
        let others = [
            lib.join(format!("userdata-d.7.{other}.libxl-json")),
            lib.join(format!("userdata-d.77.{}.libxl-json", domain.uuid)),
            lib.join("qemu-save.77"),
            run.join("qmp-libxl-17"),
        ];
        fs::create_dir_all(&lib).unwrap();
        fs::create_dir_all(&run).unwrap();
        for file in its.iter().chain(&others) {
            fs::write(file, file.file_name().unwrap().as_encoded_bytes()).unwrap();
        }
        let mut expected = its.to_vec();
        expected.sort();
        assert_eq!(files.of(domain), expected);
        let (path, bytes) = files.configuration(domain).unwrap().unwrap();
        assert_eq!((path, bytes), (lib.join(&json), json.into_bytes()));
        assert_eq!(LibxlFiles::none().of(domain), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_file_through_a_link_is_not_read_and_is_named() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("var/lib/xen");
        fs::create_dir_all(&lib).unwrap();
        let domain = DomainRef {
            domid: DomId(7),
            uuid: Uuid([0x11; 16]),
        };
        let path = lib.join(format!("userdata-d.7.{}.libxl-json", domain.uuid));
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        let files = LibxlFiles::below(root.path());
        let error = files.configuration(domain).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}
