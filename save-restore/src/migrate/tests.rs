//! Migrations of a mock domain, with a fault at every call of either end.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::thread;
use std::time::Duration;

use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
use xsr_xen_backend::{DomId, GuestKind, Host as _};

use super::ownership::plain::{ReceiverAction, ReceiverEnd, SenderAction, SenderEnd};
use super::receive::{Arrived, ReceiveRequest};
use super::send::{MigrateRequest, Sent};
use super::testing::{FakeConnection, Fault, Faulty};
use super::{Event, Step};
use crate::progress::Cancel;

mod checkpoints;

#[path = "../../examples/migrate.rs"]
#[allow(dead_code, unreachable_pub, reason = "it is a program of its own, too")]
mod example;

#[test]
fn the_example_migrates_a_domain() {
    example::main().unwrap();
}

/// The state of the domain on a machine: whether it runs, if it exists.
fn runs(host: &MockHost, name: &str) -> Option<bool> {
    let info = host.domain(host.find(name).ok()?).unwrap().info().unwrap();
    Some(!info.paused && info.shutdown.is_none())
}

struct Migration {
    here: MockHost,
    there: MockHost,
    sent: Sent,
    arrived: Arrived,
    calls: [u64; 2],
    /// Calls that each end had made when it began each of its actions.
    sender: Vec<(u64, SenderAction)>,
    receiver: Vec<(u64, ReceiverAction)>,
}

/// Migrates a domain with a fault at one end.
fn migrate(fault: Option<(usize, Faulty)>) -> Migration {
    let host = || MockHost::ephemeral(&HostConfig::default()).unwrap();
    let (here, there) = (host(), host());
    let guest = GuestSpec::new("web", GuestKind::Pvh, 4);
    let domid = here.create_guest(&guest).unwrap();
    let (sender, receiver) = FakeConnection::pair(1 << 20);
    if let Some((end, faulty)) = fault {
        [&sender, &receiver][end].fail(faulty);
    }
    let mut said = Vec::new();
    let mut heard = Vec::new();
    let (first, second) = thread::scope(|scope| {
        let (here, there) = (&here, &there);
        let (said, heard) = (&mut said, &mut heard);
        let receiving = scope.spawn(move || {
            let mut coming = example::Coming {
                host: there,
                domid: None,
            };
            let mut observe = |event: Event| {
                if let Event::Receiving(action) = event {
                    heard.push((receiver.calls(), action));
                }
            };
            let request = ReceiveRequest::new().observer(&mut observe);
            (request.run(&receiver, &mut coming), receiver.calls())
        });
        let sending = scope.spawn(move || {
            let mut leaving = example::Leaving { host: here, domid };
            let mut observe = |event: Event| {
                if let Event::Sending(action) = event {
                    said.push((sender.calls(), action));
                }
            };
            let request = MigrateRequest::new().observer(&mut observe);
            (request.run(&sender, &mut leaving), sender.calls())
        });
        (sending.join().unwrap(), receiving.join().unwrap())
    });
    Migration {
        here,
        there,
        sent: first.0,
        arrived: second.0,
        calls: [first.1, second.1],
        sender: said,
        receiver: heard,
    }
}

/// Checks that the domain is where both ends say, and runs only there.
fn check(migration: &Migration, what: &str) {
    let Migration {
        here,
        there,
        sent,
        arrived,
        ..
    } = migration;
    let state = (
        runs(here, "web"),
        runs(here, "web--migratedaway"),
        runs(there, "web"),
        runs(there, "web--incoming"),
    );
    let ends = (sent.end, arrived.end);
    let expected = match ends {
        (SenderEnd::Moved, ReceiverEnd::Runs { .. }) => (None, None, Some(true), None),
        (SenderEnd::Here, ReceiverEnd::Destroyed { .. }) => (Some(true), None, None, None),
        (SenderEnd::Undecided, ReceiverEnd::Runs { .. }) => (None, Some(false), Some(true), None),
        (SenderEnd::Undecided, ReceiverEnd::Destroyed { .. }) => (None, Some(false), None, None),
        _ => panic!("{what}: {ends:?}, {:?} {:?}", sent.causes, arrived.causes),
    };
    assert_eq!(state, expected, "{what}: {ends:?}");
    let undecided = sent.end == SenderEnd::Undecided;
    assert_eq!(undecided, here.find("web--migratedaway").is_ok(), "{what}");
    assert_eq!(sent.end == SenderEnd::Moved, sent.causes.is_empty());
}

#[test]
fn a_fault_at_any_call_leaves_the_domain_where_both_ends_say() {
    let whole = migrate(None);
    check(&whole, "no fault");
    assert_eq!(whole.sent.end, SenderEnd::Moved);
    let long = Duration::from_secs(3600);
    // All writes before "ready" and after the image's first bytes behave alike: a sample of them.
    let tails = [
        whole
            .sender
            .iter()
            .find(|(_, a)| *a == SenderAction::AwaitReady)
            .unwrap()
            .0,
        whole
            .receiver
            .iter()
            .find(|(_, a)| *a == ReceiverAction::SayReady)
            .unwrap()
            .0,
    ];
    let mut ends = std::collections::BTreeSet::new();
    for (end, (calls, tail)) in whole.calls.into_iter().zip(tails).enumerate() {
        for call in [0, 1, tail / 2].into_iter().chain(tail - 2..calls) {
            for fault in [
                Fault::Lose { taken: 0 },
                Fault::Lose { taken: 43 },
                // "Go" is sent completely, and arrives completely or without its last byte.
                Fault::Cut { arrive: 43 },
                Fault::Cut { arrive: 1 << 20 },
                Fault::Vanish,
                Fault::Stall(long),
                Fault::Late(long),
                Fault::Short(1),
            ] {
                let image = (2..tail - 2).contains(&call);
                if image && !matches!(fault, Fault::Lose { taken: 43 } | Fault::Stall(_)) {
                    continue;
                }
                let migration = migrate(Some((end, Faulty { call, fault })));
                check(
                    &migration,
                    &format!("{fault:?} at call {call} of end {end}"),
                );
                ends.insert(format!("{:?}", migration.sent.end));
            }
        }
    }
    // The exhaustive search finds these possible; here each of them occurred.
    let ends = Vec::from_iter(&ends);
    assert_eq!(ends, ["Here", "Moved", "Undecided"]);
}

#[test]
fn who_asks_to_stop_before_go_keeps_the_domain_and_after_it_is_not_heard() {
    for at in [
        SenderAction::AwaitBanner,
        SenderAction::SendImage,
        SenderAction::AwaitReady,
        SenderAction::RenameAway,
        SenderAction::SayGo,
        SenderAction::AwaitReport,
    ] {
        let host = || MockHost::ephemeral(&HostConfig::default()).unwrap();
        let (here, there) = (host(), host());
        let guest = GuestSpec::new("web", GuestKind::Pvh, 4);
        let domid = here.create_guest(&guest).unwrap();
        let (sender, receiver) = FakeConnection::pair(1 << 20);
        let cancel = Cancel::new();
        let (sent, arrived) = thread::scope(|scope| {
            let (here, there, cancel) = (&here, &there, &cancel);
            let receiving = scope.spawn(move || {
                let mut coming = example::Coming {
                    host: there,
                    domid: None,
                };
                ReceiveRequest::new().run(&receiver, &mut coming)
            });
            let sending = scope.spawn(move || {
                let mut observe = |event: Event| {
                    if event == Event::Sending(at) {
                        cancel.cancel();
                    }
                };
                let request = MigrateRequest::new().cancel(cancel).observer(&mut observe);
                request.run(&sender, &mut example::Leaving { host: here, domid })
            });
            (sending.join().unwrap(), receiving.join().unwrap())
        });
        let too_late = matches!(at, SenderAction::SayGo | SenderAction::AwaitReport);
        let (end, runs_here) = match too_late {
            true => (SenderEnd::Moved, None),
            false => (SenderEnd::Here, Some(true)),
        };
        assert_eq!(sent.end, end, "{at:?}: {:?}, {arrived:?}", sent.causes);
        assert_eq!(runs(&here, "web"), runs_here, "{at:?}");
        assert_eq!(runs(&there, "web"), too_late.then_some(true), "{at:?}");
    }
}

/// A panic of the toolstack must not leave the domain suspended, nor a copy of it.
#[test]
fn a_panic_takes_the_domain_back() {
    use super::BoxError;
    use super::connection::{ConnectionReader, ConnectionWriter};
    use super::receive::Arriving;
    use super::send::{Departing, TakenBack};

    #[derive(Default)]
    struct Panics {
        undone: bool,
    }
    impl Departing for Panics {
        fn send_image(&mut self, _: &mut ConnectionWriter<'_>) -> Result<(), BoxError> {
            panic!("a bug")
        }
        fn rename_away(&mut self) -> Result<(), BoxError> {
            Ok(())
        }
        fn take_back(&mut self) -> Result<TakenBack, BoxError> {
            self.undone = true;
            Ok(TakenBack::Runs)
        }
        fn destroy(&mut self) -> Result<(), BoxError> {
            Ok(())
        }
    }
    impl Arriving for Panics {
        fn receive_image(&mut self, _: &mut ConnectionReader<'_>) -> Result<(), BoxError> {
            panic!("a bug")
        }
        fn take_name(&mut self) -> Result<(), BoxError> {
            Ok(())
        }
        fn run(&mut self) -> Result<(), BoxError> {
            Ok(())
        }
        fn destroy(&mut self) -> Result<(), BoxError> {
            self.undone = true;
            Ok(())
        }
    }
    let (here, there) = FakeConnection::pair_in_one_thread(1 << 16);
    let (mut sender, mut receiver) = (Panics::default(), Panics::default());
    let receive = || ReceiveRequest::new().run(&there, &mut receiver).end;
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(receive)).unwrap_err();
    let send = || MigrateRequest::new().run(&here, &mut sender).end;
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(send)).unwrap_err();
    assert!(sender.undone && receiver.undone);
}

/// Migrates a domain with an observer at `end` that panics at its event number `at`. Returns what
/// that event was, unless there were fewer, and where the domain is.
fn observe_and_panic(end: usize, at: usize) -> (Option<Event>, [Option<bool>; 4]) {
    let host = || MockHost::ephemeral(&HostConfig::default()).unwrap();
    let (here, there) = (host(), host());
    let guest = GuestSpec::new("web", GuestKind::Pvh, 4);
    let domid = here.create_guest(&guest).unwrap();
    let (sender, receiver) = FakeConnection::pair(1 << 20);
    let last = std::sync::Mutex::new(None);
    let panics_at = |number: usize| {
        let (mut seen, last) = (0, &last);
        move |event: Event| {
            if seen == number {
                *last.lock().unwrap() = Some(event);
                std::panic::resume_unwind(Box::new("a bug"));
            }
            seen += 1;
        }
    };
    let mut observers = [usize::MAX, usize::MAX];
    observers[end] = at;
    let mut observers = observers.map(panics_at);
    let [first, second] = &mut observers;
    let (one, other) = (&here, &there);
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let mut coming = example::Coming {
                host: other,
                domid: None,
            };
            let request = ReceiveRequest::new().observer(second);
            request.run(&receiver, &mut coming)
        });
        let sending = scope.spawn(move || {
            let mut leaving = example::Leaving { host: one, domid };
            let request = MigrateRequest::new().observer(first);
            request.run(&sender, &mut leaving)
        });
        let panicked = [sending.join().is_err(), receiving.join().is_err()];
        assert!(!panicked[1 - end], "only the end that is asked");
    });
    let state = [
        runs(&here, "web"),
        runs(&here, "web--migratedaway"),
        runs(&there, "web"),
        runs(&there, "web--incoming"),
    ];
    (last.into_inner().unwrap(), state)
}

/// The migration ends as it would have without it, whichever event it was.
#[test]
fn a_panic_of_an_observer_neither_doubles_nor_loses_the_domain() {
    for end in 0..2 {
        let mut all = Vec::new();
        loop {
            let (event, state) = observe_and_panic(end, all.len());
            assert_eq!(state, [None, None, Some(true), None], "{event:?}");
            let Some(event) = event else { break };
            all.push(event);
        }
        assert!(all.contains(&Event::Done(Step::Report)), "{all:?}");
    }
}

/// A receiver may be gone or busy: TCP cannot distinguish the two.
#[test]
fn a_receiver_is_given_longer_to_take_the_image_than_to_answer() {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};

    use nix::sys::socket::{getsockopt, sockopt};

    use super::BoxError;
    use super::connection::{Connection as _, ConnectionWriter, TcpConnection};
    use super::messages::Message;
    use super::send::{Departing, TakenBack};

    struct Looks<'c> {
        connection: &'c TcpConnection,
        seen: u32,
    }
    fn seconds(connection: &TcpConnection) -> u32 {
        let socket = connection.read_fd().unwrap();
        getsockopt(&socket, sockopt::TcpUserTimeout).unwrap() / 1000
    }
    impl Departing for Looks<'_> {
        fn send_image(&mut self, _: &mut ConnectionWriter<'_>) -> Result<(), BoxError> {
            self.seen = seconds(self.connection);
            Err("that was all".into())
        }
        fn rename_away(&mut self) -> Result<(), BoxError> {
            unreachable!("it has no image")
        }
        fn take_back(&mut self) -> Result<TakenBack, BoxError> {
            Ok(TakenBack::Runs)
        }
        fn destroy(&mut self) -> Result<(), BoxError> {
            unreachable!("it has not moved")
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    peer.write_all(Message::Banner.bytes()).unwrap();
    let connection = TcpConnection::new(socket).unwrap();
    assert_eq!(seconds(&connection), 30);
    let mut looks = Looks {
        connection: &connection,
        seen: 0,
    };
    let sent = MigrateRequest::new().run(&connection, &mut looks);
    assert_eq!(sent.end, SenderEnd::Here, "{:?}", sent.causes);
    assert_eq!((looks.seen, seconds(&connection)), (120, 30));
}

/// A domain whose image is empty, or this many zeros.
struct Zeros(usize);

impl super::send::Departing for Zeros {
    fn send_image(
        &mut self,
        to: &mut super::connection::ConnectionWriter<'_>,
    ) -> Result<(), super::BoxError> {
        use std::io::Write as _;
        Ok(to.write_all(&vec![0; self.0])?)
    }
    fn rename_away(&mut self) -> Result<(), super::BoxError> {
        Ok(())
    }
    fn take_back(&mut self) -> Result<super::send::TakenBack, super::BoxError> {
        Ok(super::send::TakenBack::Runs)
    }
    fn destroy(&mut self) -> Result<(), super::BoxError> {
        unreachable!("it has not moved")
    }
}

/// The domain is suspended meanwhile, and only the error message needs the rest.
#[test]
fn a_receiver_that_says_something_else_is_not_waited_for_as_for_an_answer() {
    use super::connection::{Connection as _, Wait};
    use super::messages::Message;

    for (said, words) in [
        (
            &b"no\n"[..],
            "said \"no\\n\" where its \"ready\" was expected",
        ),
        (
            &[Message::Ready.bytes(), b"x"].concat(),
            "said more than it was asked",
        ),
    ] {
        let (here, there) = FakeConnection::pair_in_one_thread(1 << 16);
        for part in [Message::Banner.bytes(), said] {
            there.write(part, &Wait::forever()).unwrap();
        }
        let sent = MigrateRequest::new().run(&here, &mut Zeros(0));
        assert_eq!(sent.end, SenderEnd::Here);
        let why = sent.causes[0].error.to_string();
        assert!(why.contains(words), "{why}");
        assert_eq!(here.clock(), Duration::from_secs(1), "{why}");
    }
}

/// Single bytes now and then must not leave the domain suspended.
#[test]
fn a_receiver_that_takes_little_is_given_up_without_a_pace_of_the_callers() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::{self, RecvTimeoutError};

    use super::connection::UnixConnection;
    use super::messages::Message;

    let (here, mut peer) = UnixStream::pair().unwrap();
    peer.write_all(Message::Banner.bytes()).unwrap();
    let connection = UnixConnection::new(here).unwrap();
    let (tell, ended) = mpsc::channel::<()>();
    let sips = thread::spawn(move || {
        let mut room = [0; 4096];
        let now_and_then = Duration::from_millis(20);
        while ended.recv_timeout(now_and_then) == Err(RecvTimeoutError::Timeout)
            && peer.read(&mut room).is_ok_and(|n| n > 0)
        {}
    });
    let request = MigrateRequest::new().idle_timeout(Duration::from_secs(1));
    let sent = request.run(&connection, &mut Zeros(8 << 20));
    drop(tell);
    sips.join().unwrap();
    assert_eq!(sent.end, SenderEnd::Here);
    let why = sent.causes[0].error.to_string();
    assert!(why.contains("too slowly"), "{why}");
}

/// A domain number that a failed migration must not use up.
#[test]
fn nothing_is_left_of_a_receiver_that_gives_back() {
    let migration = migrate(Some((
        0,
        Faulty {
            call: 1,
            fault: Fault::Lose { taken: 0 },
        },
    )));
    assert_eq!(migration.sent.end, SenderEnd::Here);
    assert!(migration.there.domain(DomId(1)).is_err());
}
