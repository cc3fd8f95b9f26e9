//! COLO's back channel: before each checkpoint the secondary sends the primary the list of pages
//! that the secondary has written, so that the primary sends its own versions of them.
//!
//! The list is one record, CHECKPOINT_DIRTY_PFN_LIST, with the record header of 8 bytes that the
//! specification gives. Xen 4.18 and later send a structure of 16 bytes instead (commit
//! efe8de1f91): the header, and 8 more bytes, zero, of a pointer. A reader that takes these for
//! pfns reads pfn 0, misses the last pfn, and finds it where the next record should be. Here that
//! is an error: the primary looks for leftover bytes after such a list, and again before it
//! completes the checkpoint that answers the list. Leftovers that arrive even later do not match
//! any message that the secondary may send then. The guest, which is suspended, does not wait for
//! bytes that may never come.
//!
//! Specification: libxc migration stream, "CHECKPOINT_DIRTY_PFN_LIST". C implementation:
//! `xg_sr_save.c:colo_merge_secondary_dirty_bitmap`,
//! `xg_sr_restore.c:send_checkpoint_dirty_pfn_list`.

use std::io::{self, Read};
use std::os::fd::AsFd;

use thiserror::Error;
use xsr_format::frame::Pfn;
use xsr_format::record::dirty_pfns::{DirtyPfnsError, DirtyPfnsHead};
use xsr_format::record::{MAX_BODY, RecordKind};
use xsr_xen_backend::DirtyBitmap;

use crate::descriptor::Descriptor;
use crate::progress::Cancel;

/// The primary's end of a back channel.
pub trait BackChannel: Read {
    /// Returns the next 8 bytes if they have arrived, without consuming them. Does not wait.
    ///
    /// # Errors
    ///
    /// The error of the descriptor.
    fn look_ahead(&mut self) -> io::Result<Option<[u8; 8]>>;
}

/// A descriptor as a back channel. Reads no more bytes than were asked for.
#[derive(Debug)]
pub struct FdBackChannel<F>(Descriptor<F>);

impl<F: AsFd> FdBackChannel<F> {
    /// Waits for the secondary without a limit.
    pub fn new(fd: F) -> Self {
        Self(Descriptor::blocking(fd))
    }

    /// Stops waiting when `cancel` is set, within a fraction of 100 ms: a read then fails with
    /// [`Cancelled`](crate::progress::Cancelled).
    ///
    /// # Errors
    ///
    /// The descriptor's type could not be determined.
    pub fn cancellable(fd: F, cancel: Cancel) -> io::Result<Self> {
        Ok(Self(Descriptor::cancellable(fd, cancel, false)?))
    }
}

impl<F: AsFd> Read for FdBackChannel<F> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(|fd| Ok(nix::unistd::read(fd, room)?))
    }
}

impl<F: AsFd> BackChannel for FdBackChannel<F> {
    /// Works for a socket or a pipe; for anything else the answer is always `None`.
    fn look_ahead(&mut self) -> io::Result<Option<[u8; 8]>> {
        let mut bytes = [0; 8];
        match self.0.peek(&mut bytes) {
            Ok(8) => Ok(Some(bytes)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What is wrong with what the secondary sent.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BackChannelError {
    /// A read failed, or the back channel ended.
    #[error("reading the back-channel failed")]
    Io(#[from] io::Error),
    /// A record of another kind.
    #[error("record {number} of the back-channel is {kind}, expected CHECKPOINT_DIRTY_PFN_LIST")]
    Kind {
        /// Which record, from 0.
        number: u64,
        /// Its kind.
        kind: RecordKind,
    },
    /// The body cannot be a list of pfns.
    #[error(
        "record {number} of the back-channel has {bytes} bytes, expected a multiple of 8, at most {MAX_BODY}"
    )]
    Length {
        /// Which record, from 0.
        number: u64,
        /// The length in its header.
        bytes: u32,
    },
    /// A pfn that the guest does not have.
    #[error("record {number} of the back-channel names pfn {pfn}, the guest has {pfns}")]
    Pfn {
        /// Which record, from 0.
        number: u64,
        /// The pfn.
        pfn: Pfn,
        /// The number of pfns that the guest has.
        pfns: u64,
    },
    /// A header of 16 bytes.
    #[error(
        "record {number} of the back-channel has a header of 16 bytes, as Xen 4.18 and later send it against the specification: the other end has to be xsr, or Xen 4.17 or older"
    )]
    LongHeader {
        /// Which record, from 0.
        number: u64,
    },
}

/// What may follow a list that has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Behind {
    number: u64,
    /// The number of pfns that the guest has.
    pfns: u64,
    /// Whether the list looks like one whose header has 16 bytes.
    suspect: bool,
}

impl Behind {
    /// Checks whether the last pfn of the list is still unread. Until the checkpoint that answers
    /// the list, the only other bytes that may come here are those of a secondary that gives up,
    /// and they are not a pfn of any guest.
    ///
    /// # Errors
    ///
    /// The last pfn is still unread; the error of the descriptor.
    pub(crate) fn look(self, back: &mut dyn BackChannel) -> Result<(), BackChannelError> {
        if self.suspect
            && let Some(bytes) = back.look_ahead()?
            && u64::from_le_bytes(bytes) < self.pfns
        {
            let number = self.number;
            return Err(BackChannelError::LongHeader { number });
        }
        Ok(())
    }
}

/// Reads list `number` (from 0) and marks its pages in `dirty`.
pub(crate) fn merge(
    back: &mut dyn BackChannel,
    number: u64,
    dirty: &mut DirtyBitmap,
) -> Result<Behind, BackChannelError> {
    let mut header = [0; 8];
    back.read_exact(&mut header)?;
    let bytes = match DirtyPfnsHead::decode(header) {
        Ok(head) => head.body_bytes,
        Err(DirtyPfnsError::Kind(kind)) => return Err(BackChannelError::Kind { number, kind }),
        Err(DirtyPfnsError::Length(bytes)) => {
            return Err(BackChannelError::Length { number, bytes });
        }
    };
    // Allocates no more than arrives.
    let mut body = Vec::new();
    let length = u64::from(bytes);
    if (&mut *back).take(length).read_to_end(&mut body)? as u64 != length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let mut pfns = DirtyPfnsHead::pfns(&body).peekable();
    // After a header of 16 bytes the last pfn is left over, or the header's own zero if the list is
    // empty.
    let behind = Behind {
        number,
        pfns: dirty.pfns(),
        suspect: pfns.peek().is_none_or(|first| first.0 == 0),
    };
    behind.look(back)?;
    for pfn in pfns {
        if pfn.0 >= dirty.pfns() {
            let pfns = dirty.pfns();
            return Err(BackChannelError::Pfn { number, pfn, pfns });
        }
        dirty.set(pfn);
    }
    Ok(behind)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use xsr_format::record::dirty_pfns::dirty_pfns;

    use super::*;

    /// Merges over a pipe and over a socket, with the same result; what is left can still be read.
    fn merged_of(bytes: &[u8], left: &[u8]) -> Result<Vec<u64>, BackChannelError> {
        fn over(
            from: impl AsFd + Read,
            mut to: impl Write,
            bytes: &[u8],
            left: &[u8],
        ) -> Result<Vec<u64>, BackChannelError> {
            to.write_all(bytes).unwrap();
            to.write_all(left).unwrap();
            drop(to);
            let mut dirty = DirtyBitmap::new(100);
            let mut back = FdBackChannel::new(from);
            merge(&mut back, 3, &mut dirty)?;
            let mut rest = Vec::new();
            back.read_to_end(&mut rest).unwrap();
            assert_eq!(rest, left);
            Ok(dirty.iter().map(|pfn| pfn.0).collect())
        }
        let (from, to) = io::pipe().unwrap();
        let by_pipe = over(from, to, bytes, left);
        let (from, to) = UnixStream::pair().unwrap();
        let by_socket = over(from, to, bytes, left);
        assert_eq!(format!("{by_pipe:?}"), format!("{by_socket:?}"));
        by_socket
    }

    fn merged(bytes: &[u8]) -> Result<Vec<u64>, BackChannelError> {
        merged_of(bytes, &[])
    }

    fn list(pfns: &[u64]) -> Vec<u8> {
        let pfns: Vec<Pfn> = pfns.iter().copied().map(Pfn).collect();
        dirty_pfns(&pfns).unwrap()
    }

    /// As Xen 4.18 sends it.
    fn long(pfns: &[u64]) -> Vec<u8> {
        let mut bytes = list(pfns);
        bytes.splice(8..8, [0; 8]);
        bytes
    }

    #[test]
    fn a_list_of_the_specification_is_merged() {
        for pfns in [&[][..], &[0], &[0, 1], &[5, 99]] {
            assert_eq!(merged(&list(pfns)).unwrap(), pfns);
        }
    }

    #[test]
    fn what_stands_behind_a_list_is_no_long_header() {
        let said: [&[u8]; 3] = [
            b"my copy unpause results are as follows\0\x01",
            // A CHECKPOINT_STATE, and a part of some other message.
            &[5, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[0; 7],
        ];
        for left in said {
            for pfns in [&[][..], &[0], &[0, 1], &[5, 99]] {
                assert_eq!(merged_of(&list(pfns), left).unwrap(), pfns, "{left:?}");
            }
        }
    }

    #[test]
    fn a_header_of_16_bytes_is_found_out_at_once() {
        for pfns in [&[][..], &[0], &[7], &[7, 8, 99]] {
            let error = merged(&long(pfns)).unwrap_err();
            let found = matches!(error, BackChannelError::LongHeader { number: 3 });
            assert!(found, "{pfns:?}: {error}");
        }
    }

    #[test]
    fn a_header_of_16_bytes_is_found_out_before_the_checkpoint_and_not_waited_for() {
        for pfns in [&[][..], &[0], &[7], &[7, 8, 99]] {
            let bytes = long(pfns);
            let (list, left) = bytes.split_at(bytes.len() - 8);
            let (from, mut to) = UnixStream::pair().unwrap();
            to.write_all(list).unwrap();
            let mut back = FdBackChannel::new(from);
            let behind = merge(&mut back, 3, &mut DirtyBitmap::new(100)).unwrap();
            behind.look(&mut back).unwrap();
            // A part of a pfn does not count yet.
            to.write_all(&left[..5]).unwrap();
            behind.look(&mut back).unwrap();
            to.write_all(&left[5..]).unwrap();
            let error = behind.look(&mut back).unwrap_err();
            let found = matches!(error, BackChannelError::LongHeader { number: 3 });
            assert!(found, "{pfns:?}: {error}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let pfn = merged(&list(&[100])).unwrap_err();
        assert!(matches!(pfn, BackChannelError::Pfn { pfns: 100, .. }));
        let mut other = list(&[1]);
        other[0] = 1;
        assert!(matches!(
            merged(&other).unwrap_err(),
            BackChannelError::Kind { .. }
        ));
        let mut odd = list(&[1]);
        odd[4] = 7;
        assert!(matches!(
            merged(&odd).unwrap_err(),
            BackChannelError::Length { bytes: 7, .. }
        ));
        assert!(matches!(
            merged(&list(&[1])[..12]).unwrap_err(),
            BackChannelError::Io(_)
        ));
    }
}
