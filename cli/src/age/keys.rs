//! Keys of age: recipients and identities in Bech32 (BIP 173), and the derivations from them.

use std::fmt;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom as _, SystemRandom};
use std::io;
use x25519_dalek::{X25519_BASEPOINT_BYTES, x25519};

/// The key of one file, from which the keys of its header and contents are derived.
pub(super) type FileKey = [u8; 16];

/// The length of a file key that is encrypted to a recipient.
pub(super) const WRAPPED: usize = 32;

const RECIPIENT: &str = "age";
const IDENTITY: &str = "age-secret-key-";

/// A public key to which files are encrypted: `age1…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recipient([u8; 32]);

/// A private key: `AGE-SECRET-KEY-1…`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Identity([u8; 32]);

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity(…)")
    }
}

impl Recipient {
    /// # Errors
    ///
    /// What is wrong with the text, which is not repeated: it may be a secret.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        if text.to_ascii_lowercase().starts_with(IDENTITY) {
            return Err(
                "this is an identity, which is a secret: it does not belong in an argument, which \
                 every user of the machine can read. Its recipient, from `age-keygen -y FILE`, does",
            );
        }
        match bech32(text) {
            Some((prefix, key)) if prefix == RECIPIENT => Ok(Self(key)),
            _ => Err(
                "expected a recipient that begins with age1, from `age-keygen` (SSH keys, \
                 passphrases and plugins are not supported)",
            ),
        }
    }

    /// Encrypts a file key. Returns the share to put beside it.
    pub(super) fn wrap(&self, key: &FileKey) -> io::Result<([u8; 32], Vec<u8>)> {
        let secret: [u8; 32] = random()?;
        let share = x25519(secret, X25519_BASEPOINT_BYTES);
        let wrapping = wrapping_key(&x25519(secret, self.0), &share, &self.0);
        // A recipient of low order, which no identity has.
        let wrapping =
            wrapping.ok_or_else(|| io::Error::other("the recipient is not a public key"))?;
        let mut wrapped = key.to_vec();
        let sealed = wrapping.seal_in_place_append_tag(zero(), Aad::empty(), &mut wrapped);
        sealed.map_err(|_| io::Error::other("encrypting the key of the file failed"))?;
        Ok((share, wrapped))
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_bech32(RECIPIENT, &self.0))
    }
}

impl Identity {
    /// The identities in the text of a file, one on each line; empty lines and lines with `#` are
    /// none.
    ///
    /// # Errors
    ///
    /// The number of the line that is none.
    pub(crate) fn parse_file(text: &str) -> Result<Vec<Self>, usize> {
        let lines = text.lines().map(str::trim).enumerate();
        let keys = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let parsed = keys.map(|(number, line)| match bech32(line) {
            Some((prefix, key)) if prefix == IDENTITY => Ok(Self(key)),
            _ => Err(number + 1),
        });
        parsed.collect()
    }

    /// Decrypts a file key, if it is encrypted to this identity.
    pub(super) fn unwrap(&self, share: &[u8; 32], wrapped: &[u8; WRAPPED]) -> Option<FileKey> {
        let own = x25519(self.0, X25519_BASEPOINT_BYTES);
        let wrapping = wrapping_key(&x25519(self.0, *share), share, &own)?;
        let mut wrapped = *wrapped;
        let key = wrapping.open_in_place(zero(), Aad::empty(), &mut wrapped);
        FileKey::try_from(&*key.ok()?).ok()
    }
}

/// The key that encrypts a file key; `None` if the shared secret is no secret.
fn wrapping_key(shared: &[u8; 32], share: &[u8; 32], to: &[u8; 32]) -> Option<LessSafeKey> {
    if *shared == [0; 32] {
        return None;
    }
    let salt = [*share, *to].concat();
    Some(cipher(&derived(
        shared,
        &salt,
        b"age-encryption.org/v1/X25519",
    )))
}

/// A key that encrypts a single message.
fn zero() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

/// HKDF-SHA-256.
pub(super) fn derived(from: &[u8], salt: &[u8], label: &[u8]) -> [u8; 32] {
    let mut key = [0; 32];
    let salt = Salt::new(HKDF_SHA256, salt);
    let extracted = salt.extract(from);
    let filled = (extracted.expand(&[label], HKDF_SHA256)).and_then(|okm| okm.fill(&mut key));
    assert!(filled.is_ok(), "32 bytes are one block of HKDF-SHA-256");
    key
}

/// ChaCha20-Poly1305 with this key.
pub(super) fn cipher(key: &[u8; 32]) -> LessSafeKey {
    let key = UnboundKey::new(&CHACHA20_POLY1305, key);
    LessSafeKey::new(key.expect("the length is that of a key"))
}

/// Random bytes from the system.
pub(super) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| io::Error::other("the system has no random numbers"))?;
    Ok(bytes)
}

const CHARSET: &[u8; 32] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";

/// The checksum of Bech32 over these values of five bits.
fn polymod(values: impl Iterator<Item = u8>) -> u32 {
    const GENERATOR: [u32; 5] = [
        0x3b6a_57b2,
        0x2650_8e6d,
        0x1ea1_19fa,
        0x3d42_33dd,
        0x2a14_62b3,
    ];
    values.fold(1, |checksum, value| {
        let top = checksum >> 25;
        let next = (checksum & 0x01ff_ffff) << 5 ^ u32::from(value);
        let bits = GENERATOR.iter().enumerate();
        bits.fold(next, |sum, (bit, of)| sum ^ (of * (top >> bit & 1)))
    })
}

fn expanded(prefix: &str) -> impl Iterator<Item = u8> {
    let high = prefix.bytes().map(|byte| byte >> 5);
    let low = prefix.bytes().map(|byte| byte & 31);
    high.chain([0]).chain(low)
}

/// The prefix, in lower case, and the 32 bytes of a text in Bech32; `None` if it is not that.
fn bech32(text: &str) -> Option<(String, [u8; 32])> {
    /// 256 bits in groups of five.
    const DATA: usize = 52;
    const CHECKSUM: usize = 6;
    let lower = text.to_ascii_lowercase();
    if !text.is_ascii() || (lower != text && text.to_ascii_uppercase() != text) {
        return None;
    }
    let (prefix, data) = lower.rsplit_once('1')?;
    let value = |byte: u8| {
        let at = CHARSET.iter().position(|known| *known == byte)?;
        u8::try_from(at).ok()
    };
    let values: Vec<u8> = data.bytes().map(value).collect::<Option<_>>()?;
    if values.len() != DATA + CHECKSUM {
        return None;
    }
    if polymod(expanded(prefix).chain(values.iter().copied())) != 1 {
        return None;
    }
    let mut bytes = Vec::with_capacity(32);
    let (mut bits, mut held) = (0_u32, 0_u32);
    for value in &values[..DATA] {
        bits = bits << 5 | u32::from(*value);
        held += 5;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held & 0xff) as u8);
            bits &= (1 << held) - 1;
        }
    }
    // The bits that are left are padding.
    let bytes = <[u8; 32]>::try_from(bytes).ok()?;
    (bits == 0).then(|| (prefix.to_owned(), bytes))
}

/// 32 bytes in Bech32, in lower case.
fn to_bech32(prefix: &str, bytes: &[u8; 32]) -> String {
    let mut values = Vec::new();
    let (mut bits, mut held) = (0_u32, 0_u32);
    for byte in bytes {
        bits = bits << 8 | u32::from(*byte);
        held += 8;
        while held >= 5 {
            held -= 5;
            values.push((bits >> held & 31) as u8);
            bits &= (1 << held) - 1;
        }
    }
    values.push((bits << (5 - held) & 31) as u8);
    let zeros = std::iter::repeat_n(0, 6);
    let checksum = polymod(expanded(prefix).chain(values.iter().copied()).chain(zeros)) ^ 1;
    values.extend((0..6).map(|i| (checksum >> (5 * (5 - i)) & 31) as u8));
    let text = values
        .iter()
        .map(|value| char::from(CHARSET[usize::from(*value)]));
    format!("{prefix}1{}", text.collect::<String>())
}

/// A fresh identity for tests, as `age-keygen` writes it, and its recipient.
#[cfg(test)]
pub(super) fn generated() -> (String, Recipient) {
    let secret: [u8; 32] = random().expect("random numbers");
    let text = to_bech32(IDENTITY, &secret).to_ascii_uppercase();
    (text, Recipient(x25519(secret, X25519_BASEPOINT_BYTES)))
}
