//! Exact reads from a source: readers take precisely the bytes they need, in whatever portions the
//! source delivers them.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};

use crate::error::ReadErrorCause;

/// The source ended after this many of the requested bytes. As the inner error of an
/// [`io::ErrorKind::UnexpectedEof`], it tells how many are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndedAfter(pub u64);

impl fmt::Display for EndedAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the source ended after {} bytes", self.0)
    }
}

impl std::error::Error for EndedAfter {}

impl From<EndedAfter> for io::Error {
    fn from(ended: EndedAfter) -> Self {
        Self::new(io::ErrorKind::UnexpectedEof, ended)
    }
}

/// Moves a source forward by some bytes. Returns how many it could skip.
pub(crate) type Skip<R> = fn(&mut R, u64, &mut Vec<u8>) -> io::Result<u64>;

/// Fills `room` exactly.
pub(crate) fn fill(source: &mut impl Read, room: &mut [u8]) -> Result<(), ReadErrorCause> {
    let mut rest = room;
    while !rest.is_empty() {
        match source.read(rest) {
            Ok(0) => {
                let needed = rest.len() as u64;
                return Err(ReadErrorCause::Truncated { needed });
            }
            Ok(n) => {
                let Some(left) = rest.get_mut(n..) else {
                    return Err(ReadErrorCause::Io(broken_source()));
                };
                rest = left;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ReadErrorCause::Io(e)),
        }
    }
    Ok(())
}

/// Fills `room` exactly: first with `known`, which came from the source earlier, then from the
/// source.
pub(crate) fn fill_behind(
    known: &[u8],
    source: &mut impl Read,
    room: &mut [u8],
) -> Result<(), ReadErrorCause> {
    let (head, rest) = room.split_at_mut(known.len().min(room.len()));
    for (to, from) in head.iter_mut().zip(known) {
        *to = *from;
    }
    fill(source, rest)
}

/// Fills `body` with exactly `bytes`. The number is the stream's claim, so memory is allocated only
/// as bytes arrive.
pub(crate) fn fill_growing(
    source: &mut impl Read,
    body: &mut Vec<u8>,
    bytes: u64,
) -> Result<(), ReadErrorCause> {
    const STEP: usize = 1 << 20;
    body.clear();
    let mut left = bytes;
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(STEP).min(STEP);
        let at = body.len();
        if body.capacity() < at.saturating_add(step) {
            // Twice as much as has come, but no more than is announced.
            let left = usize::try_from(left).unwrap_or(usize::MAX);
            body.reserve_exact(left.min(at.max(STEP)));
        }
        body.resize(at.saturating_add(step), 0);
        let (_, room) = body.split_at_mut(at);
        left = left.saturating_sub(step as u64);
        fill(source, room).map_err(|cause| cause.truncated_before(left))?;
    }
    Ok(())
}

/// The error for a source that claims to have read more than there was room for.
fn broken_source() -> io::Error {
    io::Error::other("the source claims to have read more than it was asked for")
}

pub(crate) fn skip_by_reading<R: Read>(
    source: &mut R,
    bytes: u64,
    scratch: &mut Vec<u8>,
) -> io::Result<u64> {
    const STEP: usize = 256 << 10;
    scratch.resize(STEP, 0);
    let mut left = bytes;
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(STEP).min(STEP);
        let Some(room) = scratch.get_mut(..step) else {
            let bug = ReadErrorCause::Bug("the room for skipped bytes is too small");
            return Err(io::Error::other(bug));
        };
        match source.read(room) {
            Ok(0) => break,
            Ok(n) if n > step => return Err(broken_source()),
            Ok(n) => left = left.saturating_sub(n as u64),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(bytes.saturating_sub(left))
}

pub(crate) fn skip_by_seeking<R: Read + Seek>(
    source: &mut R,
    bytes: u64,
    _scratch: &mut Vec<u8>,
) -> io::Result<u64> {
    // A seek beyond the end succeeds, so the end is determined each time: the file may be growing,
    // or have shrunk.
    let at = source.stream_position()?;
    let end = source.seek(SeekFrom::End(0))?;
    let target = at.saturating_add(bytes).min(end.max(at));
    source.seek(SeekFrom::Start(target))?;
    Ok(target.saturating_sub(at))
}
