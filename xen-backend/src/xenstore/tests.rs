//! Tests of the client against a store at the other end of a socket, which reads and writes the
//! bytes of the protocol directly.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use crate::Errno;
use xsr_format::frame::Gfn;

use super::client::Sockets;
use super::{StoreError, Xenstore};
use crate::DomId;

type Nodes = BTreeMap<Vec<u8>, Vec<u8>>;

/// A store with one node whose first `conflicts` transactions fail when they end. Returns its nodes
/// when the client hangs up.
fn serve(conflicts: usize) -> (Sockets, JoinHandle<Nodes>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut nodes = Nodes::from([(b"/a".to_vec(), b"suspend".to_vec())]);
        let mut stream = theirs;
        let mut conflicts = conflicts;
        let mut open: BTreeMap<u32, Nodes> = BTreeMap::new();
        let mut next = 7_u32;
        let mut header = [0; 16];
        while stream.read_exact(&mut header).is_ok() {
            let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
            let (kind, request, transaction) = (word(0), word(4), word(8));
            let mut payload = vec![0; word(12) as usize];
            stream.read_exact(&mut payload).unwrap();
            let end = payload.iter().position(|byte| *byte == 0).unwrap();
            let (path, value) = (payload[..end].to_vec(), payload[end + 1..].to_vec());
            assert_eq!(transaction != 0, open.contains_key(&transaction));
            let place = open.get_mut(&transaction).unwrap_or(&mut nodes);
            let answer: Result<Vec<u8>, &[u8]> = match kind {
                1 => {
                    let below = [&path, b"/".as_slice()].concat();
                    let names = place
                        .keys()
                        .filter_map(|node| node.strip_prefix(&below[..]));
                    let names = names.map(|name| [name, b"\0"].concat());
                    match names.collect::<Vec<_>>().concat() {
                        names if names.is_empty() => Err(b"ENOENT\0"),
                        names => Ok(names),
                    }
                }
                2 => place.get(&path).cloned().ok_or(b"ENOENT\0"),
                11 if path == b"/forbidden" => Err(b"EACCES\0"),
                11 => {
                    place.insert(path, value);
                    Ok(b"OK\0".to_vec())
                }
                8 | 13 | 14 if path == b"/missing" => Err(b"ENOENT\0"),
                18 if path == b"9" => Err(b"ENOENT\0"),
                // Recorded as received, for the tests to check.
                8 | 14 | 18 => {
                    let key = [format!("{kind}:").as_bytes(), &path].concat();
                    place.insert(key, value);
                    Ok(b"OK\0".to_vec())
                }
                13 => {
                    place.remove(&path);
                    Ok(b"OK\0".to_vec())
                }
                6 => {
                    open.insert(next, nodes.clone());
                    next += 1;
                    Ok(format!("{}\0", next - 1).into_bytes())
                }
                7 => {
                    let made = open.remove(&transaction).unwrap();
                    match (payload.as_slice(), conflicts) {
                        (b"T\0", 0) => {
                            nodes = made;
                            Ok(b"OK\0".to_vec())
                        }
                        (b"T\0", _) => {
                            conflicts -= 1;
                            Err(b"EAGAIN\0")
                        }
                        (b"F\0", _) => Ok(b"OK\0".to_vec()),
                        _ => panic!("{payload:?}"),
                    }
                }
                _ => Err(b"ENOSYS\0"),
            };
            // An event of a watch that another client set: not an answer to any request.
            let mut out = message(15, 0, 0, b"@releaseDomain\0token\0");
            out.extend(match answer {
                Ok(payload) => message(kind, request, transaction, &payload),
                Err(name) => message(16, request, transaction, name),
            });
            stream.write_all(&out).unwrap();
        }
        assert!(open.is_empty(), "transactions are left open");
        nodes
    });
    (Sockets::over(Box::new(ours)), server)
}

fn message(kind: u32, request: u32, transaction: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let words = [kind, request, transaction, len];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    bytes.extend_from_slice(payload);
    bytes
}

#[test]
fn nodes_are_read_and_written() {
    let (store, server) = serve(0);
    assert_eq!(store.read("/a").unwrap().unwrap(), b"suspend");
    assert_eq!(store.read("/b").unwrap(), None);
    store.write("/b", b"7").unwrap();
    assert_eq!(store.read("/b").unwrap().unwrap(), b"7");
    let refused = store.write("/forbidden", b"").unwrap_err();
    assert_eq!(refused.errno(), Errno::EACCES);
    assert_eq!(
        refused.to_string(),
        "xenstore refuses write of /forbidden: EACCES: Permission denied"
    );
    drop(store);
    assert_eq!(server.join().unwrap()[b"/b".as_slice()], b"7");
}

#[test]
fn a_value_is_exchanged_only_for_what_it_was() {
    let (store, server) = serve(2);
    assert!(store.exchange("/a", b"suspend", b"").unwrap());
    assert!(!store.exchange("/a", b"suspend", b"never").unwrap());
    assert!(!store.exchange("/none", b"suspend", b"never").unwrap());
    drop(store);
    let nodes = server.join().unwrap();
    assert_eq!(nodes.len(), 1);
    assert_eq!(nodes[b"/a".as_slice()], b"");
}

#[test]
fn a_transaction_that_meets_another_is_made_anew_and_one_that_fails_leaves_nothing() {
    let (store, server) = serve(2);
    let mut runs = 0;
    store
        .transaction(&mut |nodes| {
            runs += 1;
            assert_eq!(nodes.read("/a")?.unwrap(), b"suspend");
            assert_eq!(nodes.read("/b")?, None);
            nodes.write("/b", b"7")?;
            nodes.remove("/a")?;
            nodes.remove("/missing")?;
            Ok(true)
        })
        .unwrap();
    assert_eq!(runs, 3);
    store
        .transaction(&mut |nodes| {
            nodes.write("/c", b"7")?;
            Ok(false)
        })
        .unwrap();
    let refused = store.transaction(&mut |nodes| {
        nodes.write("/c", b"7")?;
        nodes.write("/forbidden", b"7")?;
        Ok(true)
    });
    assert_eq!(refused.unwrap_err().errno(), Errno::EACCES);
    drop(store);
    let nodes = server.join().unwrap();
    assert_eq!(nodes.keys().collect::<Vec<_>>(), [b"/b"]);
}

#[test]
fn nodes_are_listed_by_name() {
    let (store, server) = serve(0);
    assert!(store.list("/d").unwrap().is_empty());
    store.write("/d/vbd", b"").unwrap();
    store.write("/d/vif", b"").unwrap();
    assert_eq!(store.list("/d").unwrap(), ["vbd", "vif"]);
    drop(store);
    server.join().unwrap();
}

#[test]
fn transactions_that_always_meet_others_end() {
    let (store, server) = serve(usize::MAX);
    let error = store.exchange("/a", b"suspend", b"").unwrap_err();
    assert_eq!(error.errno(), Errno::EAGAIN);
    drop(store);
    assert_eq!(server.join().unwrap()[b"/a".as_slice()], b"suspend");
}

#[test]
fn a_transaction_is_ended_when_a_write_in_it_fails() {
    let (store, server) = serve(0);
    let absent = store.exchange("/forbidden", b"x", b"y").unwrap();
    assert!(!absent);
    let long = vec![0; 5000];
    let error = store.write("/a", &long).unwrap_err();
    assert_eq!(error.errno(), Errno::E2BIG);
    drop(store);
    server.join().unwrap();
}

#[test]
fn what_is_no_answer_breaks_the_connection() {
    let bad = [
        // The answer to another request.
        message(2, 99, 0, b"value"),
        // Too long.
        [2, 1, 0, 5000]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect(),
        // Cut short.
        message(2, 1, 0, b"value")[..18].to_vec(),
    ];
    for bytes in bad {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let error = Sockets::over(Box::new(ours)).read("/a").unwrap_err();
        assert!(matches!(error, StoreError::Connection(_)), "{error}");
    }
}

#[test]
fn nodes_go_are_lent_and_rings_are_introduced() {
    let (store, server) = serve(0);
    store.remove("/a").unwrap();
    store.remove("/missing").unwrap();
    store.let_have("/b", DomId(5), false).unwrap();
    store.let_have("/c", DomId(5), true).unwrap();
    store.introduce(DomId(5), Gfn(0x1234), 7).unwrap();
    store.resumed(DomId(5)).unwrap();
    assert_eq!(store.resumed(DomId(9)).unwrap_err().errno(), Errno::ENOENT);
    let refused = store.let_have("/missing", DomId(5), true).unwrap_err();
    assert_eq!(refused.errno(), Errno::ENOENT);
    drop(store);
    let nodes = server.join().unwrap();
    let expected: [(&[u8], &[u8]); 4] = [
        (b"14:/b", b"n0\0r5\0"),
        (b"14:/c", b"n5\0"),
        (b"8:5", b"4660\x007\0"),
        (b"18:5", b""),
    ];
    let expected = expected.map(|(path, value)| (path.to_vec(), value.to_vec()));
    assert_eq!(nodes, Nodes::from(expected));
}
