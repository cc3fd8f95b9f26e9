//! Messages of xenstore.
//!
//! | offset | size | field, in the machine's byte order |
//! |---|---|---|
//! | 0 | 4 | type of the request or answer |
//! | 4 | 4 | number of the request, which the answer repeats |
//! | 8 | 4 | transaction; 0 none |
//! | 12 | 4 | bytes that follow, at most 4096 |
//!
//! C: `struct xsd_sockmsg` in `xen/include/public/io/xs_wire.h`.

use std::io::{self, Read, Write};

use crate::Errno;

/// The type of a request or answer (`enum xsd_sockmsg_type`).
pub(super) mod kind {
    pub(in super::super) const DIRECTORY: u32 = 1;
    pub(in super::super) const READ: u32 = 2;
    pub(in super::super) const TRANSACTION_START: u32 = 6;
    pub(in super::super) const TRANSACTION_END: u32 = 7;
    pub(in super::super) const INTRODUCE: u32 = 8;
    pub(in super::super) const WRITE: u32 = 11;
    pub(in super::super) const RM: u32 = 13;
    pub(in super::super) const SET_PERMS: u32 = 14;
    pub(in super::super) const RESUME: u32 = 18;
    pub(super) const WATCH_EVENT: u32 = 15;
    pub(in super::super) const ERROR: u32 = 16;
}

/// Bytes of a header.
pub(super) const HEADER: usize = 16;
/// The most bytes after it.
pub(super) const MAX_PAYLOAD: usize = 4096;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: u32,
    pub(super) request: u32,
    pub(super) transaction: u32,
    pub(super) payload: Vec<u8>,
}

impl Message {
    /// Write it with a single write: the device treats each write as one message.
    pub(super) fn send(&self, to: &mut impl Write) -> io::Result<()> {
        let len = u32::try_from(self.payload.len())
            .ok()
            .filter(|len| usize::try_from(*len).is_ok_and(|len| len <= MAX_PAYLOAD))
            .ok_or_else(|| io::Error::from_raw_os_error(Errno::E2BIG.raw()))?;
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        for word in [self.kind, self.request, self.transaction, len] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&self.payload);
        to.write_all(&bytes)
    }

    /// Read one.
    pub(super) fn receive(from: &mut impl Read) -> io::Result<Self> {
        let mut words = [0_u32; 4];
        for word in &mut words {
            let mut bytes = [0; 4];
            from.read_exact(&mut bytes)?;
            *word = u32::from_ne_bytes(bytes);
        }
        let [kind, request, transaction, len] = words;
        let len = usize::try_from(len)
            .ok()
            .filter(|len| *len <= MAX_PAYLOAD)
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a message of {len} bytes; {MAX_PAYLOAD} is the most"),
                )
            })?;
        let mut payload = vec![0; len];
        from.read_exact(&mut payload)?;
        Ok(Self {
            kind,
            request,
            transaction,
            payload,
        })
    }

    /// Whether it is not an answer to a request.
    pub(super) fn is_event(&self) -> bool {
        self.kind == kind::WATCH_EVENT
    }
}

/// The errno for an error's name; EIO for a name that the protocol does not define.
pub(super) fn errno_of(name: &[u8]) -> Errno {
    let name = name.strip_suffix(b"\0").unwrap_or(name);
    match name {
        b"EINVAL" => Errno::EINVAL,
        b"EACCES" => Errno::EACCES,
        b"EEXIST" => Errno::EEXIST,
        b"EISDIR" => Errno::EISDIR,
        b"ENOENT" => Errno::ENOENT,
        b"ENOMEM" => Errno::ENOMEM,
        b"ENOSPC" => Errno::ENOSPC,
        b"ENOTEMPTY" => Errno::ENOTEMPTY,
        b"ENOSYS" => Errno::ENOSYS,
        b"EROFS" => Errno::EROFS,
        b"EBUSY" => Errno::EBUSY,
        b"EAGAIN" => Errno::EAGAIN,
        b"EISCONN" => Errno::EISCONN,
        b"E2BIG" => Errno::E2BIG,
        b"EPERM" => Errno::EPERM,
        _ => Errno::EIO,
    }
}
