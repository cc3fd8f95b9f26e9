//! The contract of a connection, as checks.

use std::io::{Read as _, Write as _};
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Duration;

use xsr_xen_backend::Gather;

use crate::back_channel::BackChannel as _;
use crate::migrate::connection::{
    Connection, ConnectionError, ConnectionReader, ConnectionWriter, Delivery, Received, Wait,
};
use crate::pace::{Overdue, ReadLimit};
use crate::progress::Cancel;

/// The two ends of a connection.
pub type Pair = (Box<dyn Connection>, Box<dyn Connection>);

/// Long enough to differ from a call that does not wait, short enough for a test.
const SHORT: Duration = Duration::from_millis(30);

/// More than any connection takes without being read.
const MUCH: usize = 32 << 20;

/// Checks that the connections that `make` returns keep the promises of [`Connection`].
///
/// # Panics
///
/// At the first broken promise, with its name.
pub fn contract(make: &dyn Fn() -> Pair) {
    both_directions(make());
    no_more_than_was_asked_for(make());
    no_wait(make());
    a_long_list(make());
    half_close(make());
    dropped(make());
    a_read_that_times_out(make());
    a_write_that_times_out(make());
    limits_of_several_calls(make());
    cancelled(make());
    nobody_reads(make());
    a_look_ahead(make());
    delivery(make());
    peers(make());
}

/// Bytes that differ from their neighbours.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..=250_u8).cycle().take(bytes).collect()
}

fn read_all(connection: &dyn Connection) -> Vec<u8> {
    let mut all = Vec::new();
    let mut room = [0; 5000];
    loop {
        let read = connection.read(&mut room, &Wait::forever());
        match read.expect("a read to the end") {
            Received::Bytes(n) => all.extend_from_slice(&room[..n]),
            Received::Closed => return all,
        }
    }
}

fn write_all(connection: &dyn Connection, bytes: &[u8]) {
    let mut writer = ConnectionWriter::new(connection, Wait::forever());
    writer.write_all(bytes).expect("a write");
}

fn both_directions((here, there): Pair) {
    for (from, to) in [(&here, &there), (&there, &here)] {
        write_all(from, b"one ");
        write_all(from, b"two");
        let mut room = [0; 7];
        let reader = ConnectionReader::new(to, Wait::forever());
        let mut reader = reader.expect("a reader");
        reader.read_exact(&mut room).expect("both");
        assert_eq!(&room, b"one two", "bytes arrive in order");
    }
    assert_eq!(
        here.read(&mut [], &Wait::forever()).expect("no wait"),
        Received::Bytes(0)
    );
    assert_eq!(here.write(&[], &Wait::forever()).expect("no wait"), 0);
}

fn no_more_than_was_asked_for((here, there): Pair) {
    write_all(&here, b"0123456789");
    let mut got = Vec::new();
    while got.len() < 10 {
        let mut room = [0; 1];
        let read = there.read(&mut room, &Wait::forever()).expect("a byte");
        assert_eq!(
            read,
            Received::Bytes(1),
            "a read takes what it has room for"
        );
        got.push(room[0]);
    }
    assert_eq!(got, b"0123456789");
}

/// Returns what has arrived, and does not wait.
fn no_wait((here, there): Pair) {
    let wait = Wait::forever().at_most(Duration::ZERO);
    let error = there.read(&mut [0; 4], &wait).expect_err("nothing came");
    assert!(matches!(error, ConnectionError::TimedOut(_)), "{error:?}");
    let carried = AtomicU64::new(0);
    let count = Wait::forever().counting(&carried);
    assert_eq!(here.write(b"here", &count).expect("there is room"), 4);
    while there.peek(&mut [0; 4]).expect("a look") < 4 {
        thread::yield_now();
    }
    let read = there.read(&mut [0; 4], &wait.counting(&carried));
    assert_eq!(read.expect("what came"), Received::Bytes(4));
    let carried = carried.into_inner();
    assert_eq!(carried, 8, "bytes are counted in both directions");
}

fn a_long_list((mut here, there): Pair) {
    let bytes = pattern(3 << 20);
    let arrived = thread::scope(|scope| {
        let reading = scope.spawn(|| read_all(&there));
        let mut list = Gather::new();
        for piece in bytes.chunks(4097) {
            list.push(piece);
        }
        let written = here.write_gather(&list, &Wait::forever());
        written.expect("the whole list");
        here.finish_writing().expect("the end");
        reading.join().expect("the reader")
    });
    assert!(arrived == bytes, "a list arrives whole");
}

fn half_close((mut here, there): Pair) {
    write_all(&here, b"the last");
    here.finish_writing().expect("the end");
    here.finish_writing().expect("the end, once more");
    assert!(
        here.write(b"more", &Wait::forever()).is_err(),
        "nothing is written after the end"
    );
    assert_eq!(read_all(&there), b"the last");
    let again = there.read(&mut [0; 4], &Wait::forever());
    assert_eq!(again.expect("the end stays"), Received::Closed);
    write_all(&there, b"answer");
    let mut room = [0; 6];
    let reader = ConnectionReader::new(&here, Wait::forever());
    let mut reader = reader.expect("a reader");
    reader.read_exact(&mut room).expect("what is still said");
    assert_eq!(&room, b"answer");
}

fn dropped((here, there): Pair) {
    write_all(&here, b"the last");
    drop(here);
    assert_eq!(
        read_all(&there),
        b"the last",
        "an end that is dropped is closed in order"
    );
}

fn a_read_that_times_out((here, there): Pair) {
    for wait in [Wait::forever().idle(SHORT), Wait::forever().at_most(SHORT)] {
        let before = there.clock();
        let error = there.read(&mut [0; 4], &wait).expect_err("a time-out");
        let ConnectionError::TimedOut(overdue) = error else {
            panic!("{error:?}")
        };
        let expected = match wait.idle {
            Some(limit) => Overdue::NothingSent(limit),
            None => Overdue::NoAnswer(SHORT),
        };
        assert_eq!(overdue, expected, "the limit that was reached is named");
        assert!(there.clock() - before >= SHORT, "its time has passed");
    }
    let silence = ReadLimit::new(SHORT);
    let wait = Wait::forever().silent_for(&silence);
    let error = there.read(&mut [0; 4], &wait).expect_err("a time-out");
    assert!(
        matches!(error, ConnectionError::TimedOut(Overdue::NothingSent(_))),
        "{error:?}"
    );
    write_all(&here, b"late");
    let mut room = [0; 4];
    let read = there.read(&mut room, &Wait::forever().idle(SHORT));
    assert_eq!(read.expect("usable after it"), Received::Bytes(4));
}

fn a_write_that_times_out((here, there): Pair) {
    let bytes = pattern(MUCH);
    let mut list = Gather::new();
    list.push(&bytes);
    let error = here.write_gather(&list, &Wait::forever().idle(SHORT));
    let error = error.expect_err("nothing is read");
    assert!(
        matches!(error, ConnectionError::TimedOut(Overdue::NothingTaken(limit)) if limit == SHORT),
        "{error:?}"
    );
    let error = loop {
        // There may be room for single bytes for a while.
        if let Err(error) = here.write(b"x", &Wait::forever().at_most(SHORT)) {
            break error;
        }
    };
    assert!(
        matches!(error, ConnectionError::TimedOut(Overdue::NothingTaken(_))),
        "{error:?}"
    );
    // What was taken arrives, and the connection is usable.
    drop(here);
    let arrived = read_all(&there);
    let of_list = arrived.len() - arrived.iter().rev().take_while(|b| **b == b'x').count();
    assert!(of_list > 0 && bytes.starts_with(&arrived[..of_list]));
}

/// A peer that sends a byte now and then.
fn limits_of_several_calls((here, there): Pair) {
    write_all(&here, b"ab");
    let reader = ConnectionReader::new(&there, Wait::forever().idle(SHORT * 100));
    let mut reader = reader.expect("a reader").within(SHORT);
    let error = reader.read_exact(&mut [0; 3]).expect_err("a time-out");
    assert!(
        matches!(
            ConnectionError::of(&error),
            Some(ConnectionError::TimedOut(Overdue::NoAnswer(SHORT)))
        ),
        "the limit of all calls is named: {error:?}"
    );
    let bytes = pattern(MUCH);
    let mut list = Gather::new();
    list.push(&bytes);
    let wait = Wait::forever().idle(SHORT * 100).at_most(SHORT);
    let error = here.write_gather(&list, &wait).expect_err("a time-out");
    assert!(
        matches!(error, ConnectionError::TimedOut { .. }),
        "{error:?}"
    );
}

fn cancelled((here, there): Pair) {
    let cancel = Cancel::new();
    let wait = Wait::forever().unless(&cancel);
    let (read, written) = thread::scope(|scope| {
        let reading = scope.spawn(|| there.read(&mut [0; 4], &wait));
        let writing = scope.spawn(|| {
            let bytes = pattern(MUCH);
            let mut list = Gather::new();
            list.push(&bytes);
            here.write_gather(&list, &wait)
        });
        // It makes no difference whether they wait by now.
        cancel.cancel();
        (reading.join(), writing.join())
    });
    // The reader may have received a byte from the writer before.
    let read = read.expect("the reader");
    assert!(
        matches!(
            read,
            Err(ConnectionError::Cancelled) | Ok(Received::Bytes(_))
        ),
        "{read:?}"
    );
    let written = written.expect("the writer");
    assert!(
        matches!(written, Err(ConnectionError::Cancelled)),
        "{written:?}"
    );
    let error = there.write(b"x", &wait).expect_err("cancelled before");
    assert!(matches!(error, ConnectionError::Cancelled), "{error:?}");
    let error = std::io::Error::from(error);
    assert!(crate::progress::Cancelled::is(&error));
    write_all(&there, b"go on");
    let mut room = [0; 5];
    let reader = ConnectionReader::new(&here, Wait::forever());
    let mut reader = reader.expect("a reader");
    reader.read_exact(&mut room).expect("another wait");
    assert_eq!(&room, b"go on");
}

fn nobody_reads((here, there): Pair) {
    drop(there);
    let bytes = pattern(1 << 16);
    // TCP learns of it from the answer to the first write.
    let error = loop {
        if let Err(error) = here.write(&bytes, &Wait::forever()) {
            break error;
        }
    };
    assert!(
        matches!(
            error,
            ConnectionError::NotRead(_) | ConnectionError::Lost(_)
        ),
        "{error:?}"
    );
}

fn a_look_ahead((here, there): Pair) {
    let reader = ConnectionReader::new(&there, Wait::forever());
    let mut reader = reader.expect("a reader");
    let nothing = reader.look_ahead().expect("a look");
    assert_eq!(nothing, None, "a look does not wait");
    write_all(&here, b"01234567890");
    // Everything has arrived once the last byte has.
    let mut room = [0; 3];
    reader.read_exact(&mut room).expect("what came");
    for _ in 0..2 {
        let mut head = [0; 8];
        let n = there.peek(&mut head).expect("a look");
        assert_eq!(&head[..n], &b"34567890"[..n]);
    }
    let mut room = [0; 8];
    reader.read_exact(&mut room).expect("what was looked at");
    assert_eq!(&room, b"34567890", "a look takes nothing");
}

fn delivery((here, there): Pair) {
    write_all(&here, b"unread");
    assert_ne!(
        here.delivery(),
        Delivery::Read,
        "what was not read is not said to have been"
    );
    let mut room = [0; 6];
    let reader = ConnectionReader::new(&there, Wait::forever());
    let mut reader = reader.expect("a reader");
    reader.read_exact(&mut room).expect("what came");
    // An acknowledgement may be in transit.
    while here.delivery() == Delivery::Pending {
        thread::yield_now();
    }
}

fn peers((here, there): Pair) {
    for end in [&here, &there] {
        assert_eq!(end.peer(), end.peer());
        assert!(!end.peer().to_string().is_empty());
        assert!(end.clock() <= end.clock());
        let limit = Duration::from_secs(30);
        end.give_up_on_silence(limit).expect("it is set or not");
    }
    if let Some(fd) = there.read_fd() {
        write_all(&here, b"direct");
        let mut room = [0; 6];
        let n = nix::unistd::read(fd, &mut room).expect("the descriptor");
        assert_eq!(&room[..n], &b"direct"[..n], "what is written comes there");
    }
}
