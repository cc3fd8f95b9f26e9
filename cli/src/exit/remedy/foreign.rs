//! What the user can do with a file that is not a saved domain.

use xsr_format::detect::foreign::{Encryption, Foreign, ForeignCompression, ForeignKind};

/// The name of a format, and what to do with the file.
pub(crate) fn described(foreign: Foreign) -> String {
    let Foreign { name, kind, .. } = foreign;
    match advice(kind) {
        Some(advice) => format!("{name}: {advice}"),
        None => name.to_owned(),
    }
}

/// What to do with a file of this kind.
pub(super) fn advice(kind: ForeignKind) -> Option<&'static str> {
    Some(match kind {
        ForeignKind::KvmGuest => "only KVM restores it (virsh restore)",
        ForeignKind::IncompleteSave => "save the domain again",
        ForeignKind::DeviceModelState => "the guest's memory is missing",
        ForeignKind::VirtualBoxState => "only VirtualBox reads it",
        ForeignKind::CoreDump => {
            "it holds memory, but not the state that a restore needs; crash, volatility3 and gdb \
             open it"
        }
        ForeignKind::Memory => {
            "it holds memory, but not the state that a restore needs; volatility3 opens it"
        }
        ForeignKind::Minidump => "WinDbg opens it",
        ForeignKind::FlattenedDump => "makedumpfile -R makes a dump of it",
        ForeignKind::Disk => "if a suspend image is on it, take that out first",
        ForeignKind::DiskImage => {
            "it is a disk, not a saved domain; qemu-img shows and converts it"
        }
        ForeignKind::Vhd => {
            "if it is a suspend VDI of xapi, make it raw first: qemu-img convert -f vpc -O raw \
             FILE OUT"
        }
        ForeignKind::Archive => "unpack it first; the saved domain may be in it",
        ForeignKind::Tar => "take the saved domain out of it first: tar -xf FILE",
        ForeignKind::Compressed(compression) => match compression {
            ForeignCompression::Lzip => "decompress it first: lzip -dc FILE | …",
            ForeignCompression::Lzop => "decompress it first: lzop -dc FILE | …",
            ForeignCompression::Snappy => "decompress it first: snzip -dc FILE | …",
            ForeignCompression::Compress => "decompress it first: gzip -dc FILE | …",
            ForeignCompression::Lzma => "decompress it first: xz -dc --format=lzma FILE | …",
            ForeignCompression::Zlib => "decompress it first: pigz -dcz < FILE | …",
            _ => "decompress it first",
        },
        ForeignKind::Encrypted(encryption) => match encryption {
            Encryption::Age => "decrypt it first: age -d FILE | …",
            Encryption::Pgp => "decrypt it first: gpg -d FILE | …",
            Encryption::OpenSsl => "decrypt it first: openssl enc -d",
            Encryption::OpenSslBase64 => "decrypt it first: openssl enc -d -a",
            Encryption::Luks => "open it first: cryptsetup open",
            _ => "decrypt it first",
        },
        ForeignKind::Base64 => "decode it first: base64 -d FILE | …",
        ForeignKind::Configuration => "a configuration of xl goes beside an image",
        ForeignKind::JsonConfiguration => "a configuration goes beside an image: --config FILE",
        ForeignKind::Description => "the saved domain is in another file",
        ForeignKind::XmlDescription => {
            "the saved domain is in another file (virsh keeps both in one)"
        }
        ForeignKind::LfsPointer => "fetch the file that it stands for: git lfs pull",
        _ => return None,
    })
}
