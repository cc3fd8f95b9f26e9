//! The world of a protection: two machines, two hosts, the connection, and all possible events.

use super::super::super::Guard;
use super::super::super::protect::{
    Fate, Here, OnLoss, Protector, ProtectorAction, ProtectorEvent, Standby, StandbyAction,
    StandbyEnd, StandbyEvent, Why,
};
use super::super::admission::{Admission, Found as FoundDomain};
use super::super::{Process, Second};

/// The state of the domain at the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Guest {
    Running,
    Suspended,
    Over,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum There {
    None,
    Paused,
    Running,
}

/// A message in transit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Word {
    Banner,
    Checkpoint,
    Withdrawal,
    Runs,
    Failed,
    GivenBack,
    /// A part of a message.
    Cut,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) protector: Process<Protector>,
    pub(super) standby: Process<Standby>,
    pub(super) on_loss: OnLoss,
    pub(super) colo: bool,
    pub(super) guest: Guest,
    pub(super) paused: bool,
    pub(super) away: bool,
    pub(super) there: There,
    /// Complete checkpoints that have been sent.
    pub(super) checkpoints: u8,
    to_there: Vec<Word>,
    to_here: Vec<Word>,
    connected: bool,
    second: Second,
    /// Something was not taken, or not completely.
    cut: bool,
    /// A host has refused a call, which ends an attempt to clean up.
    pub(super) refused: bool,
}

/// After this many, another checkpoint is like the last.
const CHECKPOINTS: u8 = 2;

impl World {
    pub(super) fn start(on_loss: OnLoss, colo: bool, broken: Option<Guard>) -> Self {
        Self {
            protector: Process::Alive(Protector::breaking(on_loss, broken)),
            standby: Process::Alive(Standby::breaking(broken)),
            on_loss,
            colo,
            guest: Guest::Running,
            paused: false,
            away: false,
            there: There::None,
            checkpoints: 0,
            to_there: Vec::new(),
            to_here: Vec::new(),
            connected: true,
            second: Second::Possible,
            cut: false,
            refused: false,
        }
    }

    fn protector(mut self, event: ProtectorEvent) -> Self {
        if let Process::Alive(mut machine) = self.protector {
            self.protector = match machine.on(event) {
                ProtectorAction::End(_) => Process::Ended(machine),
                _ => Process::Alive(machine),
            };
        }
        self
    }

    fn standby(mut self, event: StandbyEvent) -> Self {
        if let Process::Alive(mut machine) = self.standby {
            self.standby = match machine.on(event) {
                StandbyAction::End(_) => Process::Ended(machine),
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

    /// Possible outcomes of a write: whether all of it was taken.
    fn write(&self, there: bool, word: Word) -> Vec<(bool, Self)> {
        let alive = if there {
            self.standby.is_alive()
        } else {
            self.protector.is_alive()
        };
        let reaches = self.connected && alive;
        let arrives = |word| {
            self.with(|w| {
                let to = if there {
                    &mut w.to_there
                } else {
                    &mut w.to_here
                };
                if reaches {
                    to.push(word);
                }
            })
        };
        let mut ways = vec![(true, arrives(word)), (false, self.with(|w| w.cut = true))];
        if reaches {
            ways.push((false, arrives(Word::Cut).with(|w| w.cut = true)));
        }
        ways
    }

    /// Whether the protector will send nothing more.
    fn hung_up(&self) -> bool {
        match &self.protector {
            Process::Alive(machine) => !matches!(
                machine.action(),
                ProtectorAction::AwaitBanner
                    | ProtectorAction::Protect
                    | ProtectorAction::Withdraw
                    | ProtectorAction::Pause
            ),
            _ => true,
        }
    }

    fn protector_steps(&self, machine: &Protector, steps: &mut Vec<(&'static str, Self)>) {
        use ProtectorEvent as E;
        let mut step = |name, world: Self, event| steps.push((name, world.protector(event)));
        let quiet = !self.connected || !self.standby.is_alive();
        let ended = |why, lost, here| E::Ended { why, lost, here };
        let refused = self.with(|w| w.refused = true);
        match machine.action() {
            ProtectorAction::AwaitBanner => {
                step("protector: signal", self.clone(), E::Signal);
                step("protector: too late", self.clone(), E::Nothing);
                match self.to_here.first() {
                    Some(Word::Banner) => {
                        let heard = self.with(|w| _ = w.to_here.remove(0));
                        step("protector: banner", heard, E::Done);
                    }
                    Some(_) => step("protector: another word", self.clone(), E::Nothing),
                    None if quiet => step("protector: lost", self.clone(), E::Nothing),
                    None => {}
                }
            }
            ProtectorAction::Protect if self.guest == Guest::Suspended => {
                let event = ended(Why::Failed, false, Here::Suspended);
                step(
                    "protector: something else has suspended it",
                    self.clone(),
                    event,
                );
            }
            ProtectorAction::Protect => {
                if self.checkpoints < CHECKPOINTS {
                    for (taken, world) in self.write(true, Word::Checkpoint) {
                        if taken {
                            let sent = world.with(|w| w.checkpoints += 1);
                            step("protector: checkpoint", sent, E::Complete);
                            continue;
                        }
                        let event = ended(Why::Failed, true, Here::Runs);
                        step("protector: a part of a checkpoint", world.clone(), event);
                        let asleep = world.with(|w| {
                            w.guest = Guest::Suspended;
                            w.refused = true;
                        });
                        let event = ended(Why::Failed, true, Here::Suspended);
                        step("protector: a part, and cannot resume", asleep, event);
                    }
                }
                let event = ended(Why::Asked, false, Here::Runs);
                step("protector: signal", self.clone(), event);
                let event = ended(Why::Failed, false, Here::Runs);
                step("protector: cannot suspend", self.clone(), event);
                for (guest, here) in [(Guest::Over, Here::Over), (Guest::Gone, Here::Gone)] {
                    let world = self.with(|w| w.guest = guest);
                    step(
                        "protector: the guest ends",
                        world,
                        ended(Why::Failed, false, here),
                    );
                }
                let asleep = refused.with(|w| w.guest = Guest::Suspended);
                for why in [Why::Failed, Why::Asked] {
                    let event = ended(why, false, Here::Suspended);
                    step("protector: cannot resume", asleep.clone(), event);
                }
                if quiet || !self.to_here.is_empty() {
                    let event = ended(Why::Receiver, true, Here::Runs);
                    step(
                        "protector: the other end says something",
                        self.clone(),
                        event,
                    );
                }
            }
            ProtectorAction::Withdraw => {
                for (taken, world) in self.write(true, Word::Withdrawal) {
                    let event = if taken { E::Done } else { E::Failed };
                    step("protector: withdraws", world, event);
                }
            }
            ProtectorAction::Pause => {
                step("protector: pauses", self.with(|w| w.paused = true), E::Done);
                step("protector: cannot pause", refused, E::Failed);
            }
            ProtectorAction::AwaitLastWords { .. } => {
                step("protector: too late", self.clone(), E::Nothing);
                match self.to_here.as_slice() {
                    [Word::Runs, ..] => step("protector: runs there", self.clone(), E::RunsThere),
                    [Word::Failed, Word::GivenBack, ..] => {
                        step("protector: given back", self.clone(), E::GivenBack);
                    }
                    _ => {}
                }
            }
            ProtectorAction::Unpause => {
                step(
                    "protector: unpauses",
                    self.with(|w| w.paused = false),
                    E::Done,
                );
                step("protector: cannot unpause", refused, E::Failed);
            }
            ProtectorAction::Stop => {
                let stopped = self.with(|w| {
                    w.paused = true;
                    w.away = w.guest != Guest::Gone;
                });
                step("protector: stops", stopped, E::Done);
                step("protector: cannot stop", refused, E::Failed);
            }
            ProtectorAction::End(_) => {}
        }
    }

    fn standby_steps(&self, machine: &Standby, steps: &mut Vec<(&'static str, Self)>) {
        use StandbyEvent as E;
        let mut step = |name, world: Self, event| steps.push((name, world.standby(event)));
        let lost = !self.connected || self.hung_up();
        let mut say = |word| {
            for (taken, world) in self.write(false, word) {
                let event = if taken { E::Done } else { E::Failed };
                step("standby: says", world, event);
            }
        };
        match machine.action() {
            StandbyAction::SayBanner => say(Word::Banner),
            StandbyAction::SayRuns => say(Word::Runs),
            StandbyAction::SayFailed => say(Word::Failed),
            StandbyAction::GiveBack => say(Word::GivenBack),
            StandbyAction::Keep => {
                step("standby: fails", self.clone(), E::Failed);
                let read = self.with(|w| {
                    if !w.to_there.is_empty() {
                        w.to_there.remove(0);
                    }
                });
                match self.to_there.first() {
                    Some(Word::Checkpoint) => {
                        let kept = read.with(|w| {
                            w.there = if w.colo {
                                There::Running
                            } else {
                                There::Paused
                            };
                        });
                        step("standby: checkpoint", kept, E::Complete);
                        // A mixture of two checkpoints stays paused.
                        let mixed = read.with(|w| w.there = There::Paused);
                        step("standby: cannot apply it", mixed, E::Failed);
                    }
                    Some(Word::Withdrawal) => step("standby: withdrawn", read, E::Withdrawn),
                    Some(_) | None if lost => step("standby: lost", self.clone(), E::Lost),
                    _ => {}
                }
            }
            StandbyAction::TakeName => {
                step("standby: renames", self.clone(), E::Done);
                step("standby: cannot rename", self.clone(), E::Failed);
            }
            StandbyAction::Run => {
                let runs = self.with(|w| w.there = There::Running);
                step("standby: runs it", runs, E::Done);
                let paused = self.with(|w| {
                    w.there = There::Paused;
                    w.refused = true;
                });
                step("standby: cannot run it", paused, E::Failed);
            }
            StandbyAction::Destroy => {
                step(
                    "standby: destroys",
                    self.with(|w| w.there = There::None),
                    E::Done,
                );
                if self.there != There::None {
                    let left = self.with(|w| {
                        w.there = There::Paused;
                        w.refused = true;
                    });
                    step("standby: cannot destroy", left, E::Failed);
                }
            }
            StandbyAction::End(_) => {}
        }
    }

    pub(super) fn steps(&self, admission: Admission) -> Vec<(&'static str, Self)> {
        let mut steps = Vec::new();
        if let Process::Alive(machine) = &self.protector {
            self.protector_steps(machine, &mut steps);
            let killed = self.with(|w| w.protector = Process::Killed);
            if machine.action() == ProtectorAction::Protect && self.guest == Guest::Running {
                let suspended = killed.with(|w| w.guest = Guest::Suspended);
                steps.push(("protector: killed with the guest suspended", suspended));
            }
            steps.push(("protector: killed", killed));
        }
        if let Process::Alive(machine) = &self.standby {
            self.standby_steps(machine, &mut steps);
            let killed = self.with(|w| w.standby = Process::Killed);
            if machine.action() == StandbyAction::Keep && self.there == There::None {
                let part = killed.with(|w| w.there = There::Paused);
                steps.push(("standby: killed with a part", part));
            }
            steps.push(("standby: killed", killed));
        }
        if self.connected && (self.protector.is_alive() || self.standby.is_alive()) {
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
        let found = match (self.guest, self.paused) {
            (Guest::Running, true) => Some(FoundDomain::Paused),
            (Guest::Running, false) => Some(FoundDomain::Running),
            (Guest::Suspended, _) => Some(FoundDomain::Suspended),
            (Guest::Over, _) => Some(FoundDomain::Over),
            (Guest::Gone, _) => None,
        };
        match (self.second, found) {
            (Second::Possible, Some(found))
                if admission.admit(self.protector.is_alive(), found).is_ok() =>
            {
                let works = self.with(|w| {
                    w.second = Second::Working;
                    w.guest = Guest::Suspended;
                });
                steps.push(("a second command suspends the guest", works));
            }
            (Second::Working, Some(_)) => {
                let over = self.with(|w| {
                    w.second = Second::Over;
                    w.guest = Guest::Running;
                });
                steps.push(("a second command lets the guest run on", over));
            }
            _ => {}
        }
        steps
    }

    fn runs_here(&self) -> bool {
        self.guest == Guest::Running && !self.paused
    }

    pub(super) fn check(&self, over: bool) -> Result<(), String> {
        let rule = |holds: bool, why: &str| if holds { Ok(()) } else { Err(why.to_owned()) };
        rule(
            self.there != There::Running || self.checkpoints > 0,
            "it runs there from a part of a checkpoint",
        )?;
        if let Process::Alive(machine) = &self.protector
            && machine.action() == ProtectorAction::Withdraw
        {
            rule(
                self.guest != Guest::Suspended,
                "what cannot run here is taken from where it could",
            )?;
        }
        if !over {
            return Ok(());
        }
        if let Process::Ended(machine) = &self.standby
            && let StandbyAction::End(end) = machine.action()
        {
            let there = match end {
                StandbyEnd::Runs => self.there == There::Running,
                StandbyEnd::CouldNotRun | StandbyEnd::LeftBehind => {
                    self.there == There::Paused && self.refused
                }
                StandbyEnd::Destroyed => self.there == There::None,
            };
            rule(there, "the standby left something else than it says")?;
        }
        let Process::Ended(machine) = &self.protector else {
            return rule(!self.protector.is_alive(), "the protector waits for ever");
        };
        let ProtectorAction::End(end) = machine.action() else {
            return Err("the protector ended without an end".to_owned());
        };
        let taken_over = matches!(&self.standby, Process::Ended(machine)
            if machine.action() == StandbyAction::End(StandbyEnd::Runs));
        rule(
            !taken_over || !self.connected || self.cut || self.refused,
            "the other end took over where nothing was lost",
        )?;
        let both = self.runs_here() && self.there == There::Running;
        let unknown = end.fate == Fate::Unknown;
        rule(
            !both || self.refused || (unknown && self.on_loss == OnLoss::Run),
            "it runs at both ends, and --on-loss did not say so",
        )?;
        rule(
            !unknown || self.on_loss == OnLoss::Run || !self.runs_here() || self.refused,
            "nothing is known, and it was not paused",
        )?;
        rule(
            unknown
                || end.here != Here::Runs
                || end.fate == Fate::There
                || self.runs_here()
                || self.refused,
            "it is here alone, and does not run",
        )?;
        rule(
            !end.is_success() || self.runs_here(),
            "a success, and it does not run",
        )?;
        rule(
            end.fate != Fate::There
                || (self.there == There::Running && !self.runs_here())
                || self.refused,
            "it is there, and runs here",
        )?;
        rule(
            end.fate != Fate::Here || self.checkpoints == 0 || self.there == There::None,
            "it is said to be here alone, and there is a copy",
        )?;
        rule(
            !unknown || self.checkpoints > 0,
            "it can only be here, and that is not known",
        )
    }
}
