//! The contents of a file of age: pieces of 64 KiB, each encrypted and authenticated with its
//! number and whether it is the last (STREAM). So no piece can be changed, moved, or cut off
//! without a trace.

use std::io::{self, BufRead, Read, Write};

use ring::aead::{Aad, LessSafeKey, Nonce};

use super::AgeError;
use super::keys::{FileKey, cipher, derived, random};

/// Bytes of contents in a piece; the last may have fewer.
const PIECE: usize = 64 << 10;
/// Bytes that authenticate a piece.
const TAG: usize = 16;
/// Bytes of the nonce before the first piece.
const NONCE: usize = 16;

/// The number of a piece.
#[derive(Debug, Default)]
struct Counter(u64);

impl Counter {
    fn nonce(&self, last: bool) -> Nonce {
        let mut nonce = [0; 12];
        nonce[3..11].copy_from_slice(&self.0.to_be_bytes());
        nonce[11] = u8::from(last);
        Nonce::assume_unique_for_key(nonce)
    }
}

fn key_of(key: &FileKey, nonce: &[u8; NONCE]) -> LessSafeKey {
    cipher(&derived(key, nonce, b"payload"))
}

/// Encrypts what is written to it.
pub(crate) struct Encrypting<W> {
    sink: W,
    key: LessSafeKey,
    counter: Counter,
    piece: Vec<u8>,
    /// Whether a piece could not be written. Its number must not be used for another one, because
    /// two pieces under one nonce reveal their contents.
    has_failed: bool,
}

impl<W: Write> Encrypting<W> {
    pub(super) fn new(mut sink: W, key: &FileKey) -> io::Result<Self> {
        let nonce = random()?;
        sink.write_all(&nonce)?;
        Ok(Self {
            sink,
            key: key_of(key, &nonce),
            counter: Counter::default(),
            piece: Vec::with_capacity(PIECE + TAG),
            has_failed: false,
        })
    }

    fn seal(&mut self, last: bool) -> io::Result<()> {
        self.check()?;
        self.has_failed = true;
        let nonce = self.counter.nonce(last);
        let sealed = self
            .key
            .seal_in_place_append_tag(nonce, Aad::empty(), &mut self.piece);
        sealed.map_err(|_| io::Error::other("encrypting failed"))?;
        self.sink.write_all(&self.piece)?;
        self.piece.clear();
        self.counter.0 += 1;
        self.has_failed = false;
        Ok(())
    }

    fn check(&self) -> io::Result<()> {
        match self.has_failed {
            true => Err(io::Error::other("an earlier part could not be written")),
            false => Ok(()),
        }
    }

    /// Writes the last piece. Without it, the file counts as truncated.
    ///
    /// # Errors
    ///
    /// The sink's error, also that of an earlier write.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.seal(true)?;
        Ok(self.sink)
    }
}

impl<W: Write> Write for Encrypting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check()?;
        // The last piece is only known to be the last at the end.
        if self.piece.len() == PIECE && !bytes.is_empty() {
            self.seal(false)?;
        }
        let bytes = &bytes[..bytes.len().min(PIECE - self.piece.len())];
        self.piece.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// The contents of an encrypted file.
pub(crate) struct Decrypted<R> {
    source: R,
    key: LessSafeKey,
    counter: Counter,
    piece: Vec<u8>,
    /// How much of the piece has been read.
    from: usize,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// Pieces may follow.
    Reading,
    /// The piece is the last.
    Over,
    /// A piece could not be read. What follows would no longer be the contents in order. The file
    /// is to blame, if that is known.
    Failed(Option<AgeError>),
}

impl<R: BufRead> Decrypted<R> {
    pub(super) fn new(mut source: R, key: &FileKey) -> io::Result<Self> {
        let mut nonce = [0; NONCE];
        source
            .read_exact(&mut nonce)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => AgeError::Truncated.into(),
                _ => error,
            })?;
        Ok(Self {
            source,
            key: key_of(key, &nonce),
            counter: Counter::default(),
            piece: Vec::new(),
            from: 0,
            state: State::Reading,
        })
    }

    /// Reads the next piece. After an error there is none.
    fn next(&mut self) -> io::Result<()> {
        self.piece.clear();
        self.from = 0;
        self.state = State::Failed(None);
        let read = self.read_piece();
        if let Err(error) = &read {
            self.state = State::Failed(super::error_in(error).cloned());
        }
        let (plain, state) = read?;
        self.piece = plain;
        self.counter.0 += 1;
        self.state = state;
        Ok(())
    }

    /// Whether the source has ended.
    fn has_ended(&mut self) -> io::Result<bool> {
        loop {
            match self.source.fill_buf() {
                Ok(rest) => return Ok(rest.is_empty()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn read_piece(&mut self) -> io::Result<(Vec<u8>, State)> {
        let mut piece = Vec::new();
        let most = (PIECE + TAG) as u64;
        self.source.by_ref().take(most).read_to_end(&mut piece)?;
        let is_last = piece.len() < PIECE + TAG || self.has_ended()?;
        let plain = match self.open(&piece, is_last) {
            Some(plain) => plain,
            // The file ends between two pieces: if this one is not the last, that is why.
            None if is_last && self.open(&piece, false).is_some() => {
                return Err(AgeError::Truncated.into());
            }
            None if piece.len() < TAG => return Err(AgeError::Truncated.into()),
            None => {
                let at = self.counter.0.saturating_mul(PIECE as u64);
                return Err(AgeError::Damaged { at }.into());
            }
        };
        // Only a file without contents has an empty piece.
        if plain.is_empty() && self.counter.0 > 0 {
            let at = self.counter.0.saturating_mul(PIECE as u64);
            return Err(AgeError::Damaged { at }.into());
        }
        let state = match is_last {
            true => State::Over,
            false => State::Reading,
        };
        Ok((plain, state))
    }

    /// The contents of a piece, if it is intact.
    fn open(&self, piece: &[u8], is_last: bool) -> Option<Vec<u8>> {
        let mut piece = piece.to_owned();
        let nonce = self.counter.nonce(is_last);
        let plain = self.key.open_in_place(nonce, Aad::empty(), &mut piece);
        let bytes = plain.ok()?.len();
        piece.truncate(bytes);
        Some(piece)
    }
}

impl<R: BufRead> Read for Decrypted<R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if room.is_empty() {
            return Ok(0);
        }
        if self.from == self.piece.len() {
            match &self.state {
                State::Reading => self.next()?,
                State::Over => return Ok(0),
                // As often as it is read.
                State::Failed(Some(error)) => return Err(error.clone().into()),
                State::Failed(None) => {
                    let why = "an earlier part of the encrypted data could not be read";
                    return Err(io::Error::other(why));
                }
            }
        }
        let ready = &self.piece[self.from..];
        let bytes = ready.len().min(room.len());
        room[..bytes].copy_from_slice(&ready[..bytes]);
        self.from += bytes;
        Ok(bytes)
    }
}
