//! Exhaustive search of a plain migration.

use std::collections::BTreeSet;

use super::super::plain::{
    Receiver, ReceiverAction, ReceiverEnd, ReceiverEvent, Sender, SenderAction, SenderEnd,
    SenderEvent,
};
use super::super::{Guard, Guards};
use super::admission::{Admission, Found as FoundDomain};
use super::{Found, Process, Second, explore};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Here {
    Running,
    Suspended,
    /// It has shut down by itself, or was destroyed by hand.
    Over,
    /// Destroyed, because it has moved.
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum There {
    None,
    Paused,
    Running,
}

/// A message in transit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Word {
    Banner,
    Image,
    Ready,
    Go,
    Report(u8),
    /// A part of a message: its last byte is missing, and nothing after it can be understood.
    Cut,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    sender: Process<Sender>,
    receiver: Process<Receiver>,
    here: Here,
    /// Whether it is called NAME--migratedaway here.
    away: bool,
    there: There,
    to_there: Vec<Word>,
    to_here: Vec<Word>,
    connected: bool,
    ready_said: bool,
    /// All of "go" has been sent.
    go_left: bool,
    second: Second,
    /// A host has refused a call, which ends an attempt to clean up.
    refused: bool,
}

impl World {
    fn start(broken: Option<Guard>) -> Self {
        Self {
            sender: Process::Alive(Sender::breaking(broken)),
            receiver: Process::Alive(Receiver::breaking(broken)),
            here: Here::Running,
            away: false,
            there: There::None,
            to_there: Vec::new(),
            to_here: Vec::new(),
            connected: true,
            ready_said: false,
            go_left: false,
            second: Second::Possible,
            refused: false,
        }
    }

    /// The sender's machine takes an event.
    fn sender(mut self, event: SenderEvent) -> Self {
        if let Process::Alive(mut machine) = self.sender {
            self.sender = match machine.on(event) {
                SenderAction::End(_) => Process::Ended(machine),
                _ => Process::Alive(machine),
            };
        }
        self
    }

    fn receiver(mut self, event: ReceiverEvent) -> Self {
        if let Process::Alive(mut machine) = self.receiver {
            self.receiver = match machine.on(event) {
                ReceiverAction::End(_) => Process::Ended(machine),
                _ => Process::Alive(machine),
            };
        }
        self
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut world = self.clone();
        change(&mut world);
        world
    }

    /// Possible outcomes of writing to the receiver: whether all of it was taken.
    fn write_there(&self, word: Word) -> Vec<(bool, Self)> {
        let reaches = self.connected && self.receiver.is_alive();
        let mut ways = vec![
            // Taken; if the connection is lost, it is lost or not read.
            (
                true,
                self.with(|w| {
                    if reaches {
                        w.to_there.push(word);
                    }
                }),
            ),
            (false, self.clone()),
        ];
        if reaches {
            ways.push((false, self.with(|w| w.to_there.push(Word::Cut))));
        }
        ways
    }

    fn write_here(&self, word: Word) -> Vec<(bool, Self)> {
        let reaches = self.connected && self.sender.is_alive();
        let mut ways = vec![
            (
                true,
                self.with(|w| {
                    if reaches {
                        w.to_here.push(word);
                    }
                }),
            ),
            (false, self.clone()),
        ];
        if reaches {
            ways.push((false, self.with(|w| w.to_here.push(Word::Cut))));
        }
        ways
    }

    fn sender_steps(&self, machine: &Sender, steps: &mut Vec<(&'static str, Self)>) {
        use SenderEvent as E;
        let mut step = |name, world: Self, event| steps.push((name, world.sender(event)));
        let next = self.to_here.first().copied();
        let quiet = !self.connected || !self.receiver.is_alive();
        let mut wait = |expected: fn(Word) -> Option<E>| {
            step("sender: too late", self.clone(), E::TimedOut);
            step("sender: signal", self.clone(), E::Signal);
            match next {
                Some(word) => {
                    let event = expected(word).unwrap_or(E::PeerLost);
                    let heard = self.with(|w| _ = w.to_here.remove(0));
                    step("sender: hears", heard, event);
                }
                None if quiet => step("sender: finds it lost", self.clone(), E::PeerLost),
                None => {}
            }
        };
        match machine.action() {
            SenderAction::AwaitBanner => wait(|w| (w == Word::Banner).then_some(E::Done)),
            SenderAction::AwaitReady => wait(|w| (w == Word::Ready).then_some(E::Done)),
            SenderAction::AwaitReport => wait(|w| match w {
                Word::Report(status) => Some(E::Reported(status)),
                _ => None,
            }),
            SenderAction::AwaitGivenBack => wait(|w| (w == Word::Go).then_some(E::Done)),
            SenderAction::SendImage => {
                if self.here == Here::Running {
                    for (taken, world) in self.write_there(Word::Image) {
                        let suspended = world.with(|w| w.here = Here::Suspended);
                        match taken {
                            true => step("sender: all sent", suspended, E::Done),
                            false => {
                                for event in [E::PeerLost, E::TimedOut, E::Signal, E::Failed] {
                                    step("sender: sends a part", world.clone(), event);
                                    step("sender: sends most", suspended.clone(), event);
                                }
                            }
                        }
                    }
                    let gone = self.with(|w| w.here = Here::Over);
                    step("sender: the guest shuts down", gone, E::GuestGone);
                } else {
                    step("sender: it cannot suspend", self.clone(), E::Failed);
                }
            }
            SenderAction::RenameAway => {
                step("sender: renames", self.with(|w| w.away = true), E::Done);
                step("sender: cannot rename", self.clone(), E::Failed);
            }
            SenderAction::SayGo => {
                for (taken, world) in self.write_there(Word::Go) {
                    match taken {
                        true => step("sender: go", world.with(|w| w.go_left = true), E::Done),
                        false => step("sender: go is cut short", world, E::PeerLost),
                    }
                }
            }
            SenderAction::Destroy => {
                step(
                    "sender: destroys",
                    self.with(|w| w.here = Here::Gone),
                    E::Done,
                );
                let refused = self.with(|w| w.refused = true);
                step("sender: cannot destroy", refused, E::Failed);
            }
            SenderAction::TakeBack if self.here == Here::Over => {
                step("sender: it is gone", self.clone(), E::GuestGone);
            }
            SenderAction::TakeBack => {
                let back = self.with(|w| {
                    w.away = false;
                    w.here = Here::Running;
                });
                step("sender: takes back", back, E::Done);
                let refused = self.with(|w| w.refused = true);
                step("sender: cannot take back", refused, E::Failed);
            }
            SenderAction::End(_) => {}
        }
    }

    fn receiver_steps(&self, machine: &Receiver, steps: &mut Vec<(&'static str, Self)>) {
        use ReceiverEvent as E;
        let mut step = |name, world: Self, event| steps.push((name, world.receiver(event)));
        let next = self.to_there.first().copied();
        let quiet = !self.connected || !self.sender.is_alive();
        let mut say = |word| {
            for (taken, mut world) in self.write_here(word) {
                match taken {
                    true => {
                        world.ready_said |= word == Word::Ready;
                        step("receiver: says", world, E::Done);
                    }
                    false => step("receiver: cannot say", world, E::PeerLost),
                }
            }
        };
        match machine.action() {
            ReceiverAction::SayBanner => say(Word::Banner),
            ReceiverAction::SayReady => say(Word::Ready),
            ReceiverAction::SayRuns => say(Word::Report(0)),
            ReceiverAction::SayFailed => say(Word::Report(1)),
            ReceiverAction::GiveBack => say(Word::Go),
            ReceiverAction::Receive => {
                let part = self.with(|w| w.there = There::Paused);
                for event in [E::TimedOut, E::Signal, E::Failed] {
                    step("receiver: makes nothing", self.clone(), event);
                    step("receiver: makes a part", part.clone(), event);
                }
                match next {
                    Some(Word::Image) => {
                        let whole = part.with(|w| _ = w.to_there.remove(0));
                        step("receiver: has all", whole, E::Done);
                    }
                    Some(_) => step("receiver: has a part", part, E::PeerLost),
                    None if quiet => step("receiver: has a part", part, E::PeerLost),
                    None => {}
                }
            }
            ReceiverAction::AwaitGo => {
                step("receiver: too late", self.clone(), E::TimedOut);
                step("receiver: signal", self.clone(), E::Signal);
                match next {
                    Some(word) => {
                        let event = if word == Word::Go {
                            E::Done
                        } else {
                            E::PeerLost
                        };
                        let heard = self.with(|w| _ = w.to_there.remove(0));
                        step("receiver: hears", heard, event);
                    }
                    None if quiet => step("receiver: finds it lost", self.clone(), E::PeerLost),
                    None => {}
                }
            }
            ReceiverAction::RenameIn => {
                step("receiver: renames", self.clone(), E::Done);
                step("receiver: cannot rename", self.clone(), E::Failed);
            }
            ReceiverAction::Run => {
                let runs = self.with(|w| w.there = There::Running);
                step("receiver: runs it", runs, E::Done);
                step("receiver: cannot run it", self.clone(), E::Failed);
            }
            ReceiverAction::Destroy => {
                let gone = self.with(|w| w.there = There::None);
                step("receiver: destroys", gone, E::Done);
                if self.there != There::None {
                    let refused = self.with(|w| w.refused = true);
                    step("receiver: cannot destroy", refused, E::Failed);
                }
            }
            ReceiverAction::End(_) => {}
        }
    }

    fn steps(&self, admission: Admission) -> Vec<(&'static str, Self)> {
        let mut steps = Vec::new();
        if let Process::Alive(machine) = &self.sender {
            self.sender_steps(machine, &mut steps);
            steps.push(("sender: killed", self.with(|w| w.sender = Process::Killed)));
            if machine.action() == SenderAction::SendImage && self.here == Here::Running {
                let killed = self.with(|w| {
                    w.sender = Process::Killed;
                    w.here = Here::Suspended;
                });
                steps.push(("sender: killed with the guest suspended", killed));
            }
        }
        if let Process::Alive(machine) = &self.receiver {
            self.receiver_steps(machine, &mut steps);
            let killed = self.with(|w| w.receiver = Process::Killed);
            if machine.action() == ReceiverAction::Receive {
                let part = killed.with(|w| w.there = There::Paused);
                steps.push(("receiver: killed with a part", part));
            }
            steps.push(("receiver: killed", killed));
        }
        let at_work = self.sender.is_alive() || self.receiver.is_alive();
        if self.connected && at_work {
            for there in 0..=self.to_there.len() {
                for here in 0..=self.to_here.len() {
                    let lost = self.with(|w| {
                        w.connected = false;
                        w.to_there.truncate(there);
                        w.to_here.truncate(here);
                    });
                    steps.push(("the connection is lost", lost));
                }
            }
        }
        let found = match self.here {
            Here::Running => Some(FoundDomain::Running),
            Here::Suspended => Some(FoundDomain::Suspended),
            Here::Over | Here::Gone => None,
        };
        match (self.second, found) {
            (Second::Possible, Some(found)) => {
                // The lock ends with the process that holds it.
                let admitted = admission.admit(self.sender.is_alive(), found).is_ok();
                if admitted {
                    let works = self.with(|w| {
                        w.second = Second::Working;
                        w.here = Here::Suspended;
                    });
                    steps.push(("a second command suspends the guest", works));
                }
            }
            (Second::Working, Some(_)) => {
                let over = self.with(|w| {
                    w.second = Second::Over;
                    w.here = Here::Running;
                });
                steps.push(("a second command lets the guest run on", over));
            }
            _ => {}
        }
        steps
    }

    /// Whether this state is allowed; `over`: nothing happens any more.
    fn check(&self, over: bool) -> Result<(), String> {
        let running =
            usize::from(self.here == Here::Running) + usize::from(self.there == There::Running);
        let rule = |holds: bool, why: &str| if holds { Ok(()) } else { Err(why.to_owned()) };
        rule(running < 2, "it runs at both ends")?;
        rule(
            self.second != Second::Working || self.here == Here::Suspended,
            "it runs on under a command that has it suspended",
        )?;
        rule(!self.go_left || self.ready_said, "go was said before ready")?;
        rule(
            self.there != There::Running || self.go_left,
            "it runs there and was not let go of",
        )?;
        if let Process::Ended(machine) = &self.sender
            && self.go_left
            && machine.action() == SenderAction::End(SenderEnd::Here)
        {
            rule(
                self.there == There::None,
                "it was taken back while it could be run there",
            )?;
        }
        if !over {
            return Ok(());
        }
        if let Process::Ended(machine) = &self.receiver
            && let ReceiverAction::End(end) = machine.action()
        {
            let there = match end {
                ReceiverEnd::Runs { .. } => self.there == There::Running,
                ReceiverEnd::Destroyed { .. } => self.there == There::None,
                ReceiverEnd::LeftPaused => self.there == There::Paused && self.refused,
            };
            rule(there, "the receiver left something else than it says")?;
        }
        match &self.sender {
            Process::Ended(machine) => {
                let SenderAction::End(end) = machine.action() else {
                    return Err("the sender ended without an end".to_owned());
                };
                let here = match end {
                    SenderEnd::Moved => self.here == Here::Gone && self.there == There::Running,
                    SenderEnd::MovedNotDestroyed => {
                        self.here == Here::Suspended && self.there == There::Running
                    }
                    SenderEnd::Here => self.here == Here::Running && !self.away,
                    SenderEnd::HereSuspended => {
                        matches!(self.here, Here::Running | Here::Suspended)
                            && self.there != There::Running
                            && (self.refused || self.second != Second::Possible)
                    }
                    SenderEnd::GuestGone => self.here == Here::Over,
                    SenderEnd::Undecided => {
                        self.here == Here::Suspended && self.away && self.go_left
                    }
                };
                rule(here, "the sender left something else than it says")
            }
            // A killed sender cannot clean up: never two domains, but one that can be resumed by
            // hand.
            Process::Killed => rule(
                self.here != Here::Gone || self.there == There::Running,
                "a killed sender left nothing to resume",
            ),
            Process::Alive(_) => Err("the sender waits for ever".to_owned()),
        }
    }

    /// The final state, as one line of a table.
    fn end(&self) -> String {
        let sender = match &self.sender {
            Process::Ended(machine) => match machine.action() {
                SenderAction::End(end) => format!("{end:?}"),
                other => format!("{other:?}"),
            },
            _ => "killed".to_owned(),
        };
        let receiver = match &self.receiver {
            Process::Ended(machine) => match machine.action() {
                ReceiverAction::End(end) => format!("{end:?}"),
                other => format!("{other:?}"),
            },
            _ => "killed".to_owned(),
        };
        let name = if self.away { " --migratedaway" } else { "" };
        format!(
            "{sender}: {:?}{name} | {receiver}: {:?}",
            self.here, self.there
        )
    }
}

/// Explores with one guard broken, or none.
fn search(broken: Option<Guard>) -> Result<(usize, Vec<World>), Found> {
    let admission = Admission {
        guards: Guards { broken },
    };
    explore(
        vec![World::start(broken)],
        |world| world.steps(admission),
        World::check,
    )
}

#[test]
fn a_domain_never_runs_twice_and_is_nowhere_only_where_that_cannot_be_known() {
    let (states, over) = search(None).unwrap_or_else(|found| panic!("{found:#?}"));
    assert!(states > 1000, "{states}");
    // The rows of docs/migration.md with exit code 3, and no others.
    let undecided: BTreeSet<String> = over
        .iter()
        .map(World::end)
        .filter(|end| end.starts_with("Undecided"))
        .collect();
    let expected = [
        // "Go" was lost, or came too late, and the receiver could not report that.
        "Undecided: Suspended --migratedaway | Destroyed { given_back: false }: None",
        // It could, but the sender had given up by then, or the message was lost.
        "Undecided: Suspended --migratedaway | Destroyed { given_back: true }: None",
        // The receiver could not run the domain, and could not destroy it either.
        "Undecided: Suspended --migratedaway | LeftPaused: Paused",
        // The domain runs, and its report was lost or too late.
        "Undecided: Suspended --migratedaway | Runs { told: false }: Running",
        "Undecided: Suspended --migratedaway | Runs { told: true }: Running",
        // The receiver was killed before it ran the domain, while it destroyed it, or after.
        "Undecided: Suspended --migratedaway | killed: None",
        "Undecided: Suspended --migratedaway | killed: Paused",
        "Undecided: Suspended --migratedaway | killed: Running",
    ];
    assert_eq!(Vec::from_iter(&undecided), expected);
    // Each final state that the table promises is also reached.
    let ends: BTreeSet<String> = over.iter().map(World::end).collect();
    for end in [
        "Moved: Gone --migratedaway | Runs { told: true }: Running",
        "Here: Running | Destroyed { given_back: true }: None",
        "Here: Running | Destroyed { given_back: false }: None",
        "killed: Suspended | killed: Paused",
        "killed: Suspended --migratedaway | Runs { told: false }: Running",
    ] {
        assert!(ends.contains(end), "{end} is not reached:\n{ends:#?}");
    }
}

#[test]
fn each_guard_is_needed() {
    for (guard, why) in [
        (Guard::GoAfterReady, "go was said before ready"),
        (
            Guard::RenameBeforeGo,
            "the sender left something else than it says",
        ),
        (
            Guard::TakeBackBeforeGo,
            "the sender left something else than it says",
        ),
        (
            Guard::TakeBackUnsaidGo,
            "the sender left something else than it says",
        ),
        (
            Guard::LostDecidesNothing,
            "it was taken back while it could be run there",
        ),
        (
            Guard::LateDecidesNothing,
            "it was taken back while it could be run there",
        ),
        (
            Guard::SignalDecidesNothing,
            "it was taken back while it could be run there",
        ),
        (
            Guard::DestroyAfterReport,
            "the sender left something else than it says",
        ),
        (
            Guard::StatusIsLookedAt,
            "the sender left something else than it says",
        ),
        (
            Guard::GivenBackByGo,
            "it was taken back while it could be run there",
        ),
        (Guard::RunAfterGo, "it runs there and was not let go of"),
        (Guard::LostIsNoGo, "it runs there and was not let go of"),
        (Guard::LateIsNoGo, "it runs there and was not let go of"),
        (Guard::SignalIsNoGo, "it runs there and was not let go of"),
        (
            Guard::ReportWhatRuns,
            "the receiver left something else than it says",
        ),
        (
            Guard::DestroyWithoutGo,
            "the receiver left something else than it says",
        ),
        (
            Guard::DestroyBeforeGivingBack,
            "the receiver left something else than it says",
        ),
        (
            Guard::GiveBackOnlyDestroyed,
            "the receiver left something else than it says",
        ),
        (
            Guard::OneAtATime,
            "it runs on under a command that has it suspended",
        ),
        (
            Guard::NotSuspended,
            "the sender left something else than it says",
        ),
    ] {
        let found = search(Some(guard)).map(|(states, _)| states);
        let found = found.expect_err(&format!("{guard:?} makes no difference"));
        assert_eq!(found.why, why, "{guard:?}: {found:#?}");
    }
}

/// The longest path, without a fault.
#[test]
fn all_goes_well_when_nothing_goes_wrong() {
    let mut sender = Sender::new();
    let end = loop {
        sender.on(match sender.action() {
            SenderAction::End(end) => break end,
            SenderAction::AwaitReport => SenderEvent::Reported(0),
            _ => SenderEvent::Done,
        });
    };
    assert_eq!(end, SenderEnd::Moved);
    let mut receiver = Receiver::new();
    let end = loop {
        match receiver.action() {
            ReceiverAction::End(end) => break end,
            _ => receiver.on(ReceiverEvent::Done),
        };
    };
    assert_eq!(end, ReceiverEnd::Runs { told: true });
}
