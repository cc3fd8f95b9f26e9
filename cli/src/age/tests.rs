//! Files of age: what is read, what is refused, and keys.

use std::io::{Cursor, Read as _};

use super::keys::generated;
use super::*;

/// Bytes of contents in a piece.
const PIECE: usize = 64 << 10;

fn identity(text: &str) -> Identity {
    let mut found = Identity::parse_file(text).expect("identities");
    assert_eq!(found.len(), 1);
    found.remove(0)
}

fn encrypted(contents: &[u8], to: &[Recipient]) -> Vec<u8> {
    let mut sink = encrypt(Vec::new(), to).expect("memory");
    // In pieces of another size than the format's.
    for piece in contents.chunks(1000) {
        sink.write_all(piece).expect("memory");
    }
    sink.finish().expect("memory")
}

fn decrypted(file: &[u8], with: &Identity) -> Result<Vec<u8>, AgeError> {
    let mut contents = Vec::new();
    let read = decrypt(Cursor::new(file), std::slice::from_ref(with))
        .and_then(|mut source| source.read_to_end(&mut contents));
    match read {
        Ok(_) => Ok(contents),
        Err(error) => Err(error.downcast::<AgeError>().expect("an error of age")),
    }
}

fn contents(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|i| u8::try_from(i / 251 % 256).unwrap())
        .collect()
}

#[test]
fn every_recipient_reads_every_length_and_nobody_else_does() {
    let (a, to_a) = generated();
    let (b, to_b) = generated();
    let (other, _) = generated();
    for bytes in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 200_000] {
        let plain = contents(bytes);
        let file = encrypted(&plain, &[to_a.clone(), to_b.clone()]);
        for text in [&a, &b] {
            assert!(
                decrypted(&file, &identity(text)).as_ref() == Ok(&plain),
                "{bytes}"
            );
        }
        let refused = decrypted(&file, &identity(&other));
        assert_eq!(refused, Err(AgeError::NoIdentity));
    }
}

#[test]
fn a_cut_at_any_byte_is_found() {
    let (own, to) = generated();
    let own = identity(&own);
    let plain = contents(2 * PIECE + 100);
    let file = encrypted(&plain, &[to]);
    let head = file.len() - (2 * (PIECE + 16) + 116);
    let pieces = [head + PIECE + 16, head + 2 * (PIECE + 16)];
    let near = pieces.iter().flat_map(|at| at - 20..at + 20);
    for cut in (0..head + 40)
        .chain(near)
        .chain(file.len() - 140..file.len())
    {
        let found = decrypted(&file[..cut], &own);
        let expected = [Err(AgeError::Truncated)];
        let is_damage = matches!(found, Err(AgeError::Damaged { .. } | AgeError::Header(_)));
        assert!(expected.contains(&found) || is_damage, "{cut}: {found:?}");
        if pieces.contains(&cut) {
            assert_eq!(found, Err(AgeError::Truncated), "{cut}");
        }
    }
}

#[test]
fn a_changed_bit_anywhere_is_found() {
    let (own, to) = generated();
    let own = identity(&own);
    let file = encrypted(&contents(PIECE + 50), &[to]);
    let head = file.len() - (PIECE + 16 + 66);
    let rest = (head..file.len()).step_by(997);
    for at in (0..head + 16)
        .chain(rest)
        .chain(file.len() - 70..file.len())
    {
        for bit in [0, 6] {
            let mut file = file.clone();
            file[at] ^= 1 << bit;
            assert!(decrypted(&file, &own).is_err(), "byte {at}, bit {bit}");
        }
    }
}

/// Neither encrypted bytes nor a later piece, which is intact.
#[test]
fn nothing_is_read_after_an_error() {
    let (own, to) = generated();
    let own = identity(&own);
    let plain = contents(3 * PIECE);
    let mut file = encrypted(&plain, &[to]);
    let second = file.len() - 2 * (PIECE + 16);
    file[second + 5] ^= 1;
    let mut source = decrypt(Cursor::new(file), std::slice::from_ref(&own)).expect("a header");
    let mut first = vec![0; PIECE];
    source.read_exact(&mut first).expect("an intact piece");
    assert!(first == plain[..PIECE]);
    for _ in 0..4 {
        assert!(source.read(&mut first).is_err());
    }
}

/// A sink that fails once, after this many bytes.
struct FailsOnce {
    written: Vec<u8>,
    at: Option<usize>,
}

impl Write for FailsOnce {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.at.is_some_and(|at| self.written.len() >= at) {
            self.at = None;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.written.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The failed piece may be in the file already: another one under its nonce would reveal both.
#[test]
fn nothing_is_encrypted_after_an_error() {
    let (_, to) = generated();
    let head = encrypted(b"", std::slice::from_ref(&to)).len() - 16;
    let sink = FailsOnce {
        written: Vec::new(),
        at: Some(head),
    };
    let mut sink = encrypt(sink, &[to]).expect("a header");
    let error = sink.write_all(&contents(PIECE + 1)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    for _ in 0..2 {
        let error = sink.write_all(b"x").unwrap_err();
        assert!(error.to_string().contains("earlier"), "{error}");
    }
    assert!(sink.finish().is_err());
}

#[test]
fn pieces_that_change_places_are_found() {
    let (own, to) = generated();
    let own = identity(&own);
    let plain = contents(3 * PIECE);
    let file = encrypted(&plain, &[to]);
    let head = file.len() - 3 * (PIECE + 16);
    let [first, second] = [0, 1].map(|i| head + i * (PIECE + 16)..head + (i + 1) * (PIECE + 16));
    let swapped = [
        &file[..head],
        &file[second.clone()],
        &file[first],
        &file[second.end..],
    ];
    let found = decrypted(&swapped.concat(), &own);
    assert_eq!(found, Err(AgeError::Damaged { at: 0 }));
    // Without the second, and with more after the last.
    let without = [&file[..second.start], &file[second.end..]].concat();
    let at = PIECE as u64;
    assert_eq!(decrypted(&without, &own), Err(AgeError::Damaged { at }));
    let longer = [&file[..], b"x"].concat();
    let at = 2 * PIECE as u64;
    assert_eq!(decrypted(&longer, &own), Err(AgeError::Damaged { at }));
}

/// Written by age 1.1.1 of Debian, to a key of its age-keygen.
#[test]
fn a_file_of_age_is_read() {
    let own = identity(include_str!("testdata/identity.txt"));
    let file = include_bytes!("testdata/hello.age");
    assert_eq!(decrypted(file, &own), Ok(b"a file of age\n".to_vec()));
}

#[test]
fn a_passphrase_and_a_strange_header_are_named() {
    let (own, to) = generated();
    let own = identity(&own);
    let file = encrypted(b"x", &[to]);
    let text = String::from_utf8_lossy(&file[..200]).into_owned();
    let wrapped = text.lines().nth(2).expect("a body").to_owned();
    let passphrase = format!(
        "age-encryption.org/v1\n-> scrypt {} 18\n{wrapped}\n--- AAAA\n",
        &wrapped[..22]
    );
    // Its MAC is wrong, too: 32 bytes are 43 characters.
    let passphrase = passphrase.replace("AAAA", &"A".repeat(43));
    assert_eq!(
        decrypted(passphrase.as_bytes(), &own),
        Err(AgeError::Passphrase)
    );
    for (header, rule) in [
        ("age-encryption.org/v2\n", "its version is unknown"),
        ("age-encryption.org/v1\n--- AAAA\n", "its MAC is malformed"),
        ("age-encryption.org/v1\nx\n", "a line is out of place"),
        ("age-encryption.org/v1\n->  x\n", "an argument is empty"),
        (
            "age-encryption.org/v1\n-> x\n====\n",
            "the body of a recipient is malformed",
        ),
        ("age-encryption.org/v1\n-> \u{e9}\n", "a line is not text"),
    ] {
        let found = decrypted(header.as_bytes(), &own);
        assert_eq!(found, Err(AgeError::Header(rule)), "{header:?}");
    }
    let none = format!("age-encryption.org/v1\n--- {}\n", "A".repeat(43));
    let found = decrypted(none.as_bytes(), &own);
    assert_eq!(found, Err(AgeError::Header("it has no recipient")));
    // A header without an end takes no more memory than its limit.
    let endless = std::io::repeat(b'a').take(1 << 40);
    let endless = Cursor::new(b"age-encryption.org/v1\n").chain(io::BufReader::new(endless));
    let error = decrypt(endless, std::slice::from_ref(&own))
        .map(drop)
        .unwrap_err();
    assert!(error.to_string().contains("longer than 1 MiB"), "{error}");
}

#[test]
fn keys_are_read_as_age_writes_them_and_a_typing_error_is_found() {
    let (own, to) = generated();
    let text = to.to_string();
    assert!(text.starts_with("age1") && text.len() == 62, "{text}");
    assert_eq!(Recipient::parse(&text), Ok(to.clone()));
    assert_eq!(Recipient::parse(&text.to_uppercase()), Ok(to));
    let mut wrong = text.clone().into_bytes();
    for at in 4..wrong.len() {
        let right = wrong[at];
        wrong[at] = if right == b'q' { b'p' } else { b'q' };
        assert!(
            Recipient::parse(str::from_utf8(&wrong).expect("text")).is_err(),
            "{at}"
        );
        wrong[at] = right;
    }
    let mixed = text.replacen("age1", "Age1", 1);
    for other in [&*mixed, "", "age1", "ssh-ed25519 AAAA", &text[..61]] {
        assert!(Recipient::parse(other).is_err(), "{other}");
    }
    let secret = Recipient::parse(&own).unwrap_err();
    assert!(secret.contains("is a secret") && !secret.contains(&own));
    let file = format!("# created: today\n\n{own}\n  {own}\n");
    assert_eq!(Identity::parse_file(&file).map(|found| found.len()), Ok(2));
    assert_eq!(Identity::parse_file(&format!("{own}\n{text}\n")), Err(2));
    assert!(!format!("{:?}", identity(&own)).contains(&own[20..]));
}
