//! The header of a file of age: the file key, encrypted to each recipient, and a MAC.
//!
//! ```text
//! age-encryption.org/v1
//! -> X25519 SHARE
//! WRAPPED FILE KEY
//! --- MAC
//! ```

use std::io::{self, BufRead, Read as _, Write};

use ring::hmac;

use super::keys::{FileKey, Identity, Recipient, WRAPPED, derived};
use super::{AgeError, MAGIC};

/// The longest header that is read. A recipient takes about 100 bytes.
const MAX_HEADER: usize = 1 << 20;
/// Characters of a full line of a stanza's body.
const LINE: usize = 64;

const X25519: &str = "X25519";
const PASSPHRASE: &str = "scrypt";

/// The header of a file.
#[derive(Debug)]
pub(super) struct Header {
    stanzas: Vec<Stanza>,
    /// All bytes that the MAC is for.
    text: Vec<u8>,
    mac: [u8; 32],
}

/// The file key for one recipient, in the recipient's own way.
#[derive(Debug)]
struct Stanza {
    arguments: Vec<String>,
    body: Vec<u8>,
}

/// Reads lines of the header, and keeps them.
struct Lines<'r, R> {
    source: &'r mut R,
    text: Vec<u8>,
}

impl<R: BufRead> Lines<'_, R> {
    /// The next line, without its end.
    fn next(&mut self) -> io::Result<&str> {
        let from = self.text.len();
        let most = (MAX_HEADER - from) as u64;
        self.source
            .by_ref()
            .take(most)
            .read_until(b'\n', &mut self.text)?;
        let line = self.text.get(from..).unwrap_or_default();
        let Some(line) = line.strip_suffix(b"\n") else {
            return Err(match self.text.len() < MAX_HEADER {
                true => AgeError::Truncated,
                false => AgeError::Header("it is longer than 1 MiB"),
            }
            .into());
        };
        let printable = line.iter().all(|byte| matches!(byte, 0x20..=0x7e));
        match std::str::from_utf8(line) {
            Ok(line) if printable => Ok(line),
            _ => Err(AgeError::Header("a line is not text").into()),
        }
    }
}

impl Header {
    /// Reads a header, and nothing after it.
    pub(super) fn read(source: &mut impl BufRead) -> io::Result<Self> {
        let text = Vec::new();
        let mut lines = Lines { source, text };
        if lines.next()?.as_bytes() != MAGIC.trim_ascii_end() {
            return Err(AgeError::Header("its version is unknown").into());
        }
        let mut stanzas = Vec::new();
        loop {
            let line = lines.next()?;
            if let Some(arguments) = line.strip_prefix("-> ") {
                let arguments: Vec<_> = arguments.split(' ').map(str::to_owned).collect();
                if arguments.iter().any(String::is_empty) {
                    return Err(AgeError::Header("an argument is empty").into());
                }
                let body = body(&mut lines)?;
                stanzas.push(Stanza { arguments, body });
                continue;
            }
            let Some(mac) = line.strip_prefix("--- ") else {
                return Err(AgeError::Header("a line is out of place").into());
            };
            let ends = mac.len() + " \n".len();
            let mac = from_base64(mac).and_then(|mac| <[u8; 32]>::try_from(mac).ok());
            let mac = mac.ok_or(AgeError::Header("its MAC is malformed"))?;
            if stanzas.is_empty() {
                return Err(AgeError::Header("it has no recipient").into());
            }
            let mut text = lines.text;
            text.truncate(text.len() - ends);
            return Ok(Self { stanzas, text, mac });
        }
    }

    /// The file key.
    pub(super) fn open(&self, with: &[Identity]) -> Result<FileKey, AgeError> {
        let kind = |stanza: &Stanza| stanza.arguments.first().cloned().unwrap_or_default();
        if self.stanzas.iter().any(|stanza| kind(stanza) == PASSPHRASE) {
            return Err(AgeError::Passphrase);
        }
        for stanza in self.stanzas.iter().filter(|stanza| kind(stanza) == X25519) {
            let [_, share] = &*stanza.arguments else {
                return Err(AgeError::Header(
                    "an X25519 recipient needs exactly one argument",
                ));
            };
            let share = from_base64(share).and_then(|share| <[u8; 32]>::try_from(share).ok());
            let wrapped = <[u8; WRAPPED]>::try_from(&*stanza.body).ok();
            let (Some(share), Some(wrapped)) = (share, wrapped) else {
                return Err(AgeError::Header("a recipient is malformed"));
            };
            for identity in with {
                if let Some(key) = identity.unwrap(&share, &wrapped) {
                    let mac = hmac::verify(&mac_key(&key), &self.text, &self.mac);
                    return mac.map(|()| key).map_err(|_| AgeError::HeaderChanged);
                }
            }
        }
        Err(AgeError::NoIdentity)
    }
}

/// The body of a stanza: full lines, and a shorter one, which may be empty.
fn body(lines: &mut Lines<'_, impl BufRead>) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = lines.next()?;
        let piece = from_base64(line).filter(|_| line.len() <= LINE);
        body.extend(piece.ok_or(AgeError::Header("the body of a recipient is malformed"))?);
        if line.len() < LINE {
            return Ok(body);
        }
    }
}

fn mac_key(key: &FileKey) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &derived(key, &[], b"header"))
}

/// Writes a header with the file key for each of these recipients.
pub(super) fn write(sink: &mut impl Write, key: &FileKey, to: &[Recipient]) -> io::Result<()> {
    let mut text = MAGIC.to_vec();
    for recipient in to {
        let (share, wrapped) = recipient.wrap(key)?;
        let (share, wrapped) = (to_base64(&share), to_base64(&wrapped));
        text.extend(format!("-> {X25519} {share}\n{wrapped}\n").into_bytes());
    }
    text.extend(b"---");
    let mac = hmac::sign(&mac_key(key), &text);
    text.extend(format!(" {}\n", to_base64(mac.as_ref())).into_bytes());
    sink.write_all(&text)
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 without padding.
fn to_base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let mut three = [0; 3];
        three[..group.len()].copy_from_slice(group);
        let [a, b, c] = three.map(u32::from);
        let bits = a << 16 | b << 8 | c;
        for place in 0..=group.len() {
            let six = bits >> (18 - 6 * place) & 0x3f;
            text.push(char::from(ALPHABET[six as usize]));
        }
    }
    text
}

/// Reads base64 without padding, in its only form.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    for group in text.as_bytes().chunks(4) {
        let mut bits = 0_u32;
        for byte in group {
            let six = ALPHABET.iter().position(|known| known == byte)?;
            bits = bits << 6 | u32::try_from(six).ok()?;
        }
        let missing = 4 - group.len();
        bits <<= 6 * missing;
        let [_, all @ ..] = bits.to_be_bytes();
        // A single character is not even a byte.
        let whole = 3_usize.checked_sub(missing).filter(|whole| *whole > 0)?;
        if all[whole..].iter().any(|byte| *byte != 0) {
            return None;
        }
        bytes.extend(&all[..whole]);
    }
    Some(bytes)
}
