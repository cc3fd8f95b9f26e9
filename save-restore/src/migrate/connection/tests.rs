//! The contract over every transport, and how a lost connection differs from a closed one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::*;
use crate::migrate::testing::{Pair, contract};
use crate::source::PageSource as _;

fn pipes() -> (PipeConnection, PipeConnection) {
    let (from_there, to_here) = io::pipe().unwrap();
    let (from_here, to_there) = io::pipe().unwrap();
    let end =
        |from, to, name| PipeConnection::new(OwnedFd::from(from), OwnedFd::from(to), name).unwrap();
    (
        end(from_there, to_there, "there"),
        end(from_here, to_here, "here"),
    )
}

fn unix() -> (UnixConnection, UnixConnection) {
    let (here, there) = UnixStream::pair().unwrap();
    let end = |stream| UnixConnection::new(stream).unwrap();
    (end(here), end(there))
}

fn tcp() -> (TcpConnection, TcpConnection) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (there, _) = listener.accept().unwrap();
    let end = |stream| TcpConnection::new(stream).unwrap();
    (end(here), end(there))
}

fn boxed<C: Connection + 'static>((here, there): (C, C)) -> Pair {
    (Box::new(here), Box::new(there))
}

#[test]
fn pipes_keep_the_contract() {
    contract(&|| boxed(pipes()));
}

#[test]
fn unix_sockets_keep_the_contract() {
    contract(&|| boxed(unix()));
}

#[test]
fn tcp_keeps_the_contract() {
    contract(&|| boxed(tcp()));
}

#[test]
fn a_long_write_is_seen_to_move_before_it_ends() {
    use std::sync::atomic::{AtomicU64, Ordering};

    const MIB: usize = 1 << 20;
    for (here, there) in [boxed(pipes()), boxed(unix()), boxed(tcp())] {
        let bytes = vec![7; 32 * MIB];
        let carried = AtomicU64::new(0);
        let now = || carried.load(Ordering::Relaxed);
        let mut reader = ConnectionReader::new(&there, Wait::forever()).unwrap();
        std::thread::scope(|scope| {
            let (here, bytes, carried) = (&here, &bytes, &carried);
            let writing = scope.spawn(move || {
                let mut list = Gather::new();
                list.push(bytes);
                let wait = Wait::forever().counting(carried);
                here.write_gather(&list, &wait).unwrap();
            });
            // The bytes in transit by now are part of one list, most of which is still to come.
            reader.read_exact(&mut vec![0; 4 * MIB]).unwrap();
            while now() < 4 * MIB as u64 {
                assert!(!writing.is_finished());
                std::thread::yield_now();
            }
            assert!(now() < 32 * MIB as u64);
            reader.read_exact(&mut vec![0; 28 * MIB]).unwrap();
        });
        assert_eq!(now(), 32 * MIB as u64);
    }
}

#[test]
fn an_end_that_did_not_read_all_is_lost_and_not_closed() {
    for (here, there) in [boxed(unix()), boxed(tcp())] {
        let forever = Wait::forever();
        here.write(b"unread", &forever).unwrap();
        // It has arrived.
        while there.peek(&mut [0; 6]).unwrap() < 6 {
            std::thread::yield_now();
        }
        drop(there);
        let error = here.read(&mut [0; 1], &forever).unwrap_err();
        assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
        // The engine's reader sees an error, not the end of the stream.
        let error = io::Error::from(error);
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(matches!(
            ConnectionError::of(&error),
            Some(ConnectionError::Lost(_))
        ));
    }
}

#[test]
fn who_is_there_and_what_has_been_read_is_known_where_it_can_be() {
    let (here, _there) = unix();
    let Peer::Process { pid, uid, .. } = here.peer() else {
        panic!("{:?}", here.peer())
    };
    assert_eq!(u32::try_from(pid).unwrap(), std::process::id());
    let metadata = std::fs::metadata("/proc/self").unwrap();
    assert_eq!(uid, std::os::unix::fs::MetadataExt::uid(&metadata));
    let (here, there) = tcp();
    assert!(matches!(here.peer(), Peer::Address(address) if address.ip().is_loopback()));
    here.write(b"sent", &Wait::forever()).unwrap();
    while there.peek(&mut [0; 4]).unwrap() < 4 {
        std::thread::yield_now();
    }
    // The peer's kernel has it, but the peer has not read it.
    while here.delivery() == Delivery::Pending {
        std::thread::yield_now();
    }
    assert_eq!(here.delivery(), Delivery::AtPeerHost);
    let (mut here, there) = pipes();
    assert_eq!(here.delivery(), Delivery::Read);
    here.write(b"sent", &Wait::forever()).unwrap();
    assert_eq!(here.delivery(), Delivery::Pending);
    assert_eq!(
        there.read(&mut [0; 4], &Wait::forever()).unwrap(),
        Received::Bytes(4)
    );
    assert_eq!(here.delivery(), Delivery::Read);
    here.finish_writing().unwrap();
    assert_eq!(here.delivery(), Delivery::Unknown);
}

#[test]
fn a_limit_on_a_message_holds_however_slowly_it_comes() {
    use crate::migrate::messages::{Message, MessageError};
    use crate::migrate::testing::{FakeConnection, Fault, Faulty};

    let (sender, receiver) = FakeConnection::pair(1 << 16);
    let second = Duration::from_secs(1);
    let ended = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A byte every 40 s.
            for (call, byte) in (0..).zip(Message::Ready.bytes()) {
                let fault = Fault::Stall(40 * second);
                receiver.fail(Faulty { call, fault });
                if receiver.write(&[*byte], &Wait::forever()).is_err() {
                    break;
                }
            }
        });
        let wait = Wait::forever().idle(60 * second);
        let reader = ConnectionReader::new(&sender, wait).unwrap();
        let error = Message::Ready
            .read(reader.within(120 * second))
            .unwrap_err();
        let ended = sender.clock();
        drop(sender);
        assert!(
            matches!(&error, MessageError::Waiting { cause, .. }
                if cause.kind() == io::ErrorKind::TimedOut),
            "{error:?}"
        );
        ended
    });
    assert_eq!(ended, 120 * second);
}

#[test]
fn pages_come_straight_from_a_descriptor_and_with_a_copy_from_anything_else() {
    use xsr_format::frame::{Gfn, PAGE_SIZE};
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
    use xsr_xen_backend::{Access, GuestKind, Host as _};

    use crate::migrate::testing::FakeConnection;
    use crate::sink::PageSink as _;

    let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
    let guest = GuestSpec::new("web", GuestKind::Pvh, 8);
    let domid = host.create_guest(&guest).unwrap();
    let domain = host.domain(domid).unwrap();
    let gfns = [Gfn(10), Gfn(11), Gfn(12)];
    let pages = domain.map(&gfns, Access::Write).unwrap();
    for index in 0..3 {
        let fill = 0x10 + u8::try_from(index).unwrap();
        let page = pages.page(index).unwrap();
        page.copy_from(&[fill; PAGE_SIZE]);
    }
    let fake = FakeConnection::pair_in_one_thread(1 << 20);
    for (here, there) in [boxed(pipes()), boxed(unix()), boxed(tcp()), boxed(fake)] {
        let wait = Wait::forever().idle(Duration::from_secs(60));
        let mut list = Gather::new();
        list.push_pages(&pages, 0..2);
        let mut writer = ConnectionWriter::new(&here, wait);
        writer.write_gather(&list).unwrap();
        let mut reader = ConnectionReader::new(&there, wait).unwrap();
        // Into the second and the third page.
        reader.read_pages(&pages, 1..3).unwrap();
        let mut contents = [0; PAGE_SIZE];
        for (index, fill) in [(0, 0x10), (1, 0x10), (2, 0x11)] {
            pages.page(index).unwrap().copy_to(&mut contents);
            assert!(contents.iter().all(|byte| *byte == fill), "page {index}");
        }
        // Unchanged.
        pages.page(1).unwrap().copy_from(&[0x11; PAGE_SIZE]);
        drop(here);
        assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
    }
}
