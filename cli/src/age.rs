//! Encryption of images in the format of age (`age-encryption.org/v1`), which the `age` and `rage`
//! programs also read and write: to X25519 recipients only.
//!
//! The primitives are those of `ring` and `x25519-dalek`. This file puts them together as
//! <https://c2sp.org/age> specifies. The `age` crate would do the same, with a hundred further
//! crates (localisation, passphrases, SSH keys) in a program that runs as root on a Xen host.

// Named, because a fuzz target includes this file from another place.
#[path = "age/files.rs"]
mod files;
#[path = "age/header.rs"]
mod header;
#[path = "age/keys.rs"]
mod keys;
#[path = "age/stream.rs"]
mod stream;
#[cfg(test)]
#[path = "age/tests.rs"]
mod tests;

use std::fmt;
use std::io::{self, BufRead, Write};

pub(crate) use self::files::{identities, use_identities};
use self::header::Header;
pub(crate) use self::keys::{Identity, Recipient};
pub(crate) use self::stream::{Decrypted, Encrypting};

/// The first line of an encrypted file.
pub(crate) const MAGIC: &[u8] = b"age-encryption.org/v1\n";

/// Why a file cannot be decrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AgeError {
    /// The header breaks this rule.
    Header(&'static str),
    /// The header was changed after it was written.
    HeaderChanged,
    /// No identity fits any recipient of the file.
    NoIdentity,
    /// It is encrypted with a passphrase.
    Passphrase,
    /// The file ends too early.
    Truncated,
    /// A piece of the contents is damaged: at this byte of the plain contents.
    Damaged { at: u64 },
}

impl fmt::Display for AgeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(rule) => write!(f, "the header of its encryption is damaged: {rule}"),
            Self::HeaderChanged => {
                f.write_str("the header of its encryption is not as it was written: it is damaged")
            }
            Self::NoIdentity => f.write_str(
                "it is encrypted with age to other recipients than those of the identities given",
            ),
            Self::Passphrase => f.write_str(
                "it is encrypted with a passphrase: decrypt it first: age --decrypt FILE | …",
            ),
            Self::Truncated => f.write_str(
                "its encrypted data end too early: the file is truncated: copy it again from where \
                 it came",
            ),
            Self::Damaged { at } => write!(
                f,
                "its encrypted data are damaged or cut off, or not as they were written, at byte \
                 {at:#x} of the contents: copy it again from where it came"
            ),
        }
    }
}

impl std::error::Error for AgeError {}

impl From<AgeError> for io::Error {
    fn from(error: AgeError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// The error of this file's readers inside another one.
pub(crate) fn error_in(error: &io::Error) -> Option<&AgeError> {
    error.get_ref()?.downcast_ref()
}

/// Reads the header of an encrypted file, and returns its contents.
///
/// # Errors
///
/// An [`AgeError`] inside, or the source's error.
pub(crate) fn decrypt<R: BufRead>(mut source: R, with: &[Identity]) -> io::Result<Decrypted<R>> {
    let header = Header::read(&mut source)?;
    let key = header.open(with)?;
    Decrypted::new(source, &key)
}

/// Writes the header of an encrypted file. What is written to the result is encrypted to all of
/// these recipients.
///
/// # Errors
///
/// The sink's error; the system has no random numbers.
pub(crate) fn encrypt<W: Write>(mut sink: W, to: &[Recipient]) -> io::Result<Encrypting<W>> {
    let key = keys::random()?;
    header::write(&mut sink, &key, to)?;
    Encrypting::new(sink, &key)
}
