//! Protections of a simulated domain, with a fault at every call of either end.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::super::connection::{
    Connection, ConnectionReader, ConnectionWriter, TcpConnection, Wait,
};
use super::super::messages::{LastWords, Message, Withdrawal};
use super::super::ownership::protect::{Fate, Here, OnLoss, StandbyEnd, Why};
use super::super::protect::{Ended, ProtectRequest, Protected, Protection};
use super::super::standby::{Kept, KeptUntil, StandbyRequest, StoodBy};
use super::super::testing::{FakeConnection, Fault, Faulty};
use super::super::{BoxError, Event, Step};

/// A checkpoint: as long as a withdrawal, but with other bytes.
const CHECKPOINT: [u8; 24] = [7; 24];
const LIMIT: Duration = Duration::from_secs(60);

/// The domain at the sender. Checkpoints are sent until `enough`.
struct Sender<'a> {
    enough: usize,
    /// Why no more are sent.
    why: Why,
    runs: &'a AtomicBool,
    stopped: bool,
}

impl Protected for Sender<'_> {
    fn protect(&mut self, connection: &dyn Connection, complete: &mut dyn FnMut()) -> Ended {
        let mut lost = false;
        let mut writer = ConnectionWriter::new(connection, Wait::forever().idle(LIMIT));
        for _ in 0..self.enough {
            if writer.write_all(&CHECKPOINT).is_err() {
                lost = true;
                break;
            }
            complete();
        }
        Ended {
            why: if lost { Why::Failed } else { self.why },
            lost,
            here: Here::Runs,
            withdrawal: Some(Withdrawal::Remus),
            heard: LastWords::default(),
        }
    }

    fn pause(&mut self) -> Result<(), BoxError> {
        self.runs.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn unpause(&mut self) -> Result<(), BoxError> {
        self.runs.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn stop(&mut self) -> Result<(), BoxError> {
        self.runs.store(false, Ordering::Relaxed);
        self.stopped = true;
        Ok(())
    }
}

/// The domain at the receiver.
#[derive(Default)]
struct Receiver {
    made: bool,
    runs: bool,
    checkpoints: usize,
    /// Whether the host refuses to destroy it.
    stays: bool,
}

impl Kept for Receiver {
    fn keep(&mut self, connection: &dyn Connection, complete: &mut dyn FnMut()) -> KeptUntil {
        self.made = true;
        let wait = Wait::forever().idle(LIMIT * 100);
        let mut reader = ConnectionReader::new(connection, wait).unwrap();
        loop {
            let mut checkpoint = [0; CHECKPOINT.len()];
            match reader.read_exact(&mut checkpoint) {
                Err(_) => return KeptUntil::Lost,
                Ok(()) if checkpoint == CHECKPOINT => {
                    self.checkpoints += 1;
                    complete();
                }
                Ok(()) if checkpoint[..] == Withdrawal::Remus.bytes() => {
                    return KeptUntil::Withdrawn;
                }
                Ok(()) => return KeptUntil::Failed,
            }
        }
    }

    fn take_name(&mut self) -> Result<(), BoxError> {
        Err("the name is taken: it runs all the same".into())
    }

    fn run(&mut self) -> Result<(), BoxError> {
        self.runs = true;
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), BoxError> {
        if self.stays {
            return Err("it stays".into());
        }
        self.made = false;
        Ok(())
    }
}

struct Ran {
    protection: Protection,
    stood_by: StoodBy,
    runs: bool,
    stopped: bool,
    receiver: Receiver,
    calls: [u64; 2],
    steps: [Vec<Step>; 2],
}

fn protect(
    enough: usize,
    why: Why,
    on_loss: OnLoss,
    stays: bool,
    fault: Option<(usize, Faulty)>,
) -> Ran {
    let (mut here, there) = FakeConnection::pair(1 << 16);
    if let Some((end, faulty)) = fault {
        [&here, &there][end].fail(faulty);
    }
    let runs = AtomicBool::new(true);
    let mut sender = Sender {
        enough,
        why,
        runs: &runs,
        stopped: false,
    };
    let mut receiver = Receiver {
        stays,
        ..Receiver::default()
    };
    let (mut said, mut heard) = (Vec::new(), Vec::new());
    let ((protection, first), (stood_by, second)) = thread::scope(|scope| {
        let (receiver, heard) = (&mut receiver, &mut heard);
        let standing = scope.spawn(move || {
            let mut observe = |event: Event| {
                if let Event::Done(step) = event {
                    heard.push(step);
                }
            };
            let request = StandbyRequest::new().observer(&mut observe);
            (request.run(&there, receiver), there.calls())
        });
        let (sender, said) = (&mut sender, &mut said);
        let protecting = scope.spawn(move || {
            let mut observe = |event: Event| {
                if let Event::Done(step) = event {
                    said.push(step);
                }
            };
            let request = ProtectRequest::new(on_loss).observer(&mut observe);
            (request.run(&mut here, sender), here.calls())
        });
        (protecting.join().unwrap(), standing.join().unwrap())
    });
    Ran {
        protection,
        stood_by,
        stopped: sender.stopped,
        runs: runs.into_inner(),
        receiver,
        calls: [first, second],
        steps: [said, heard],
    }
}

/// The rows of docs/migration.md: the domain is where both ends say it is.
fn check(ran: &Ran, on_loss: OnLoss, what: &str) {
    let fate = ran.protection.end.fate;
    let ends = (fate, ran.stood_by.end);
    match ran.stood_by.end {
        StandbyEnd::Runs => {
            assert!(ran.receiver.runs && ran.receiver.checkpoints > 0, "{what}");
        }
        StandbyEnd::Destroyed => {
            assert!(!ran.receiver.runs && !ran.receiver.made, "{what}");
        }
        end => panic!("{what}: {end:?}"),
    }
    match (fate, ran.stood_by.end) {
        // If this end says that it has the domain, the other one does not run it.
        (Fate::Here, StandbyEnd::Destroyed) => assert!(ran.runs, "{what}"),
        (Fate::There, StandbyEnd::Runs) => assert!(!ran.runs && ran.stopped, "{what}"),
        // Checkpoints are not acknowledged: as `--on-loss` says.
        (Fate::Unknown, _) => assert_eq!(ran.runs, on_loss == OnLoss::Run, "{what}"),
        _ => panic!("{what}: {ends:?} {:?}", ran.protection.causes),
    }
}

#[test]
fn a_protection_that_ends_in_order_is_taken_back() {
    for why in [Why::Asked, Why::Failed] {
        let ran = protect(3, why, OnLoss::Pause, false, None);
        check(&ran, OnLoss::Pause, "no fault");
        assert_eq!(ran.protection.end.fate, Fate::Here);
        assert_eq!(ran.protection.end.is_success(), why == Why::Asked);
        assert_eq!(ran.receiver.checkpoints, 3);
        let [sender, receiver] = &ran.steps;
        assert_eq!(sender[..], [Step::Banner, Step::Protected, Step::Withdrawn]);
        assert_eq!(receiver[..], [Step::Banner, Step::Checkpoint]);
    }
    // Before a checkpoint is complete, there is nothing to take back.
    let ran = protect(0, Why::Asked, OnLoss::Pause, false, None);
    check(&ran, OnLoss::Pause, "no checkpoint");
    assert_eq!(ran.steps[0], [Step::Banner]);
}

/// Has sent one checkpoint, and waits for the time of the next.
struct Waits;

impl Protected for Waits {
    fn protect(&mut self, connection: &dyn Connection, complete: &mut dyn FnMut()) -> Ended {
        complete();
        connection
            .give_up_on_silence(TcpConnection::SILENCE_WAITING)
            .unwrap();
        Ended {
            why: Why::Asked,
            lost: false,
            here: Here::Runs,
            withdrawal: Some(Withdrawal::Remus),
            heard: LastWords::default(),
        }
    }
    fn pause(&mut self) -> Result<(), BoxError> {
        unreachable!("it runs on")
    }
    fn unpause(&mut self) -> Result<(), BoxError> {
        unreachable!("it was not paused")
    }
    fn stop(&mut self) -> Result<(), BoxError> {
        unreachable!("it does not run there")
    }
}

#[test]
fn what_takes_the_domain_back_has_the_time_of_an_answer_all_of_it() {
    let (mut here, there) = FakeConnection::pair_in_one_thread(1 << 16);
    there
        .write(Message::Banner.bytes(), &Wait::forever())
        .unwrap();
    // One byte in 59 s.
    for call in 1..=24 {
        for fault in [Fault::Stall(Duration::from_secs(59)), Fault::Short(1)] {
            here.fail(Faulty { call, fault });
        }
    }
    let protection = ProtectRequest::new(OnLoss::Run).run(&mut here, &mut Waits);
    assert_eq!(protection.end.fate, Fate::Unknown, "{protection:?}");
    let most = LIMIT + ProtectRequest::LAST_WORDS;
    assert_eq!(here.clock(), most, "{protection:?}");
}

/// The receiver applies a checkpoint, and reads nothing meanwhile: if the connection is given up
/// then, it takes over.
#[test]
fn a_receiver_is_given_longer_to_read_that_the_domain_is_taken_back() {
    use std::net::{TcpListener, TcpStream};

    use nix::sys::socket::{getsockopt, sockopt};

    use super::super::messages::{Outcome, Status};
    use super::super::ownership::protect::ProtectorAction;

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    Message::Banner.write(&mut peer).unwrap();
    Message::Report.write(&mut peer).unwrap();
    Status::FAILED.write(&mut peer).unwrap();
    Message::Go.write(&mut peer).unwrap();
    let looks = socket.try_clone().unwrap();
    let seconds = || getsockopt(&looks, sockopt::TcpUserTimeout).unwrap() / 1000;
    let mut connection = TcpConnection::new(socket).unwrap();
    let mut borne = Vec::new();
    let mut observe = |event: Event| match event {
        Event::Protecting(ProtectorAction::Withdraw) => borne.push(seconds()),
        Event::Protecting(ProtectorAction::AwaitLastWords { .. }) => borne.push(seconds()),
        _ => {}
    };
    let request = ProtectRequest::new(OnLoss::Run).observer(&mut observe);
    let protection = request.run(&mut connection, &mut Waits);
    assert_eq!(
        protection.outcome,
        Some(Outcome::GivenBack { status: 1 }),
        "{protection:?}"
    );
    assert_eq!(borne, [30, 120]);
    assert_eq!(seconds(), 120);
}

#[test]
fn a_copy_that_could_not_be_destroyed_is_not_given_back() {
    let ran = protect(2, Why::Asked, OnLoss::Pause, true, None);
    assert_eq!(ran.stood_by.end, StandbyEnd::LeftBehind);
    assert!(ran.protection.end.is_undecided() && !ran.runs && !ran.receiver.runs);
}

#[test]
fn a_fault_at_any_call_leaves_the_domain_where_the_table_says() {
    let mut ends = BTreeSet::new();
    let long = Duration::from_secs(3600);
    for on_loss in [OnLoss::Run, OnLoss::Pause] {
        for enough in [0, 1, 3] {
            let whole = protect(enough, Why::Asked, on_loss, false, None);
            for (end, calls) in whole.calls.into_iter().enumerate() {
                for call in 0..calls {
                    for fault in [
                        Fault::Lose { taken: 0 },
                        Fault::Lose { taken: 23 },
                        Fault::Cut { arrive: 23 },
                        Fault::Cut { arrive: 1 << 10 },
                        Fault::Vanish,
                        Fault::Stall(long),
                        Fault::Late(long),
                        Fault::Short(1),
                    ] {
                        let faulty = Some((end, Faulty { call, fault }));
                        let ran = protect(enough, Why::Asked, on_loss, false, faulty);
                        let what = format!("{on_loss:?}, {enough}: {fault:?} at {call} of {end}");
                        check(&ran, on_loss, &what);
                        let complete = ran.receiver.checkpoints > 0;
                        assert!(complete || !ran.receiver.runs, "{what}");
                        ends.insert(format!(
                            "{:?} {:?}",
                            ran.protection.end.fate, ran.stood_by.end
                        ));
                    }
                }
            }
        }
    }
    // Each of them occurred.
    let ends = Vec::from_iter(&ends);
    assert_eq!(
        ends,
        [
            "Here Destroyed",
            "There Runs",
            "Unknown Destroyed",
            "Unknown Runs"
        ]
    );
}
