//! Exhaustive search of Remus and COLO, and the table of all their final states.

mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use self::world::{Guest, There, World};
use super::super::protect::{
    Fate, Here, OnLoss, ProtectorAction, ProtectorEnd, StandbyAction, StandbyEnd, Why,
};
use super::super::{Guard, Guards};
use super::admission::Admission;
use super::{Found, Process, explore};

impl World {
    /// The row of docs/migration.md ("Remus: who has the domain") that this final state belongs to.
    fn row(&self) -> Option<usize> {
        let standby = match &self.standby {
            Process::Ended(machine) => match machine.action() {
                StandbyAction::End(end) => Some(end),
                _ => return None,
            },
            _ => None,
        };
        let protector = match &self.protector {
            Process::Ended(machine) => match machine.action() {
                ProtectorAction::End(end) => Some(end),
                _ => return None,
            },
            _ => None,
        };
        let no_copy = matches!(standby, Some(StandbyEnd::Destroyed));
        let refused = matches!(
            standby,
            Some(StandbyEnd::LeftBehind | StandbyEnd::CouldNotRun)
        );
        let row = |name| ROWS.iter().position(|row| *row == name);
        match (protector, standby) {
            (None, None) => row("both ends are killed"),
            (None, Some(StandbyEnd::Runs)) => row("the sender is killed, or its host lost"),
            (None, Some(_)) if refused => row("a host refuses to run or to destroy it"),
            (None, Some(_)) => row("the sender is killed, and the receiver has no copy"),
            (Some(_), _) if self.checkpoints == 0 => row("before the first checkpoint is complete"),
            (
                Some(ProtectorEnd {
                    fate: Fate::There, ..
                }),
                _,
            ) => row("the receiver says that it runs the domain"),
            (Some(end), None) if end.fate == Fate::Unknown => row("the receiver is killed"),
            (Some(end), Some(StandbyEnd::Runs)) if end.fate == Fate::Unknown => {
                row("the connection is lost, or the receiver hangs")
            }
            (Some(end), Some(_)) if end.fate == Fate::Unknown && refused => {
                row("a host refuses to run or to destroy it")
            }
            (Some(end), Some(StandbyEnd::Destroyed)) if end.fate == Fate::Unknown => {
                row("the receiver destroys its copy, and does not say so in time")
            }
            // A domain that was given back is gone, even if the receiver is killed after that.
            (Some(end), _) if no_copy || standby.is_none() => match (end.why, end.here) {
                (_, Here::Over) => row("the guest shuts down or crashes"),
                (_, Here::Gone) => row("another program destroys the domain at the sender"),
                (Why::Asked, _) => row("a signal, or --epochs"),
                (Why::Receiver, _) => row("the receiver fails, or gets a signal"),
                (Why::Failed, _) => row("the sender fails"),
            },
            _ => None,
        }
    }

    fn end(&self) -> String {
        let protector = match &self.protector {
            Process::Ended(machine) => match machine.action() {
                ProtectorAction::End(end) if end.is_undecided() => "exit code 3",
                ProtectorAction::End(end) if end.is_success() => "exit code 0",
                _ => "exit code 1",
            },
            _ => "killed",
        };
        let standby = match &self.standby {
            Process::Ended(machine) => match machine.action() {
                StandbyAction::End(StandbyEnd::Runs) => "exit code 0",
                _ => "exit code 1",
            },
            _ => "killed",
        };
        let guest = match (self.guest, self.paused) {
            (Guest::Running, false) => "runs",
            (Guest::Running, true) => "paused",
            (Guest::Suspended, _) => "suspended",
            (Guest::Over, _) => "over",
            (Guest::Gone, _) => "gone",
        };
        let name = if self.away { " --migratedaway" } else { "" };
        let there = match self.there {
            There::None => "none",
            There::Paused => "paused",
            There::Running => "runs",
        };
        format!("{guest}{name}, {protector} | {there}, {standby}")
    }
}

/// The rows of the table, as far as their final states differ.
const ROWS: [&str; 14] = [
    "both ends are killed",
    "a host refuses to run or to destroy it",
    "the sender is killed, and the receiver has no copy",
    "before the first checkpoint is complete",
    "a signal, or --epochs",
    "the sender fails",
    "the guest shuts down or crashes",
    "another program destroys the domain at the sender",
    "the receiver fails, or gets a signal",
    "the receiver is killed",
    "the sender is killed, or its host lost",
    "the connection is lost, or the receiver hangs",
    "the receiver destroys its copy, and does not say so in time",
    "the receiver says that it runs the domain",
];

fn search(broken: Option<Guard>) -> Result<(usize, Vec<World>), Found> {
    let mut starts = Vec::new();
    for on_loss in [OnLoss::Run, OnLoss::Pause] {
        for colo in [false, true] {
            starts.push(World::start(on_loss, colo, broken));
        }
    }
    let admission = Admission {
        guards: Guards { broken },
    };
    explore(starts, |world| world.steps(admission), World::check)
}

/// All final states: below the row of docs/migration.md the domain and the exit code at the sender,
/// the same at the receiver, and with which `--on-loss`, if not with both. Under Remus and COLO
/// they are the same. Final states that occur only if a host refuses to resume, pause or destroy a
/// domain are checked, but not listed.
const ENDS: &str = include_str!("protect.ends");

fn ends(over: &[World]) -> Result<String, String> {
    let mut rows: BTreeMap<usize, BTreeMap<String, BTreeSet<(bool, OnLoss)>>> = BTreeMap::new();
    for world in over.iter().filter(|world| !world.refused) {
        let end = world.end();
        let row = world.row().ok_or_else(|| format!("no row has {end}"))?;
        let kinds = rows.entry(row).or_default().entry(end).or_default();
        kinds.insert((world.colo, world.on_loss));
    }
    let mut table = String::new();
    for (row, ends) in rows {
        writeln!(table, "{}", ROWS[row]).unwrap();
        for (end, kinds) in ends {
            let with = |colo, on_loss| kinds.contains(&(colo, on_loss));
            let on_loss = match (with(true, OnLoss::Run), with(true, OnLoss::Pause)) {
                (true, true) => "",
                (true, false) => " | --on-loss run",
                (false, true) => " | --on-loss pause",
                (false, false) => " | never",
            };
            for on_loss in [OnLoss::Run, OnLoss::Pause] {
                if with(false, on_loss) != with(true, on_loss) {
                    return Err(format!("{end}: not under both Remus and COLO"));
                }
            }
            writeln!(table, "    {end}{on_loss}").unwrap();
        }
    }
    Ok(table)
}

#[test]
fn the_ends_are_the_rows_of_the_table_and_no_others() {
    let (states, over) = search(None).unwrap_or_else(|found| panic!("{found:#?}"));
    assert!(states > 10_000, "{states}");
    let ends = ends(&over).unwrap();
    if let Some(path) = std::env::var_os("XSR_BLESS") {
        std::fs::write(path, &ends).unwrap();
    }
    assert!(ends == ENDS, "{ends}");
}

#[test]
fn each_guard_is_needed() {
    for (guard, why) in [
        (
            Guard::WithdrawBeforeHangingUp,
            "the other end took over where nothing was lost",
        ),
        (
            Guard::WithdrawOnlyWhatRuns,
            "what cannot run here is taken from where it could",
        ),
        (
            Guard::SilenceIsUnknown,
            "it is said to be here alone, and there is a copy",
        ),
        (
            Guard::IncompleteIsHere,
            "it can only be here, and that is not known",
        ),
        (
            Guard::PauseOnLoss,
            "nothing is known, and it was not paused",
        ),
        (
            Guard::StopWhatRunsThere,
            "it runs at both ends, and --on-loss did not say so",
        ),
        (
            Guard::GivenBackIsHere,
            "it can only be here, and that is not known",
        ),
        (
            Guard::TakeOverOnlyWhenLost,
            "the other end took over where nothing was lost",
        ),
        (
            Guard::TakeOverOnlyComplete,
            "it runs there from a part of a checkpoint",
        ),
        (
            Guard::WithdrawnDoesNotRun,
            "the other end took over where nothing was lost",
        ),
        (
            Guard::SayGoneOnlyOfDestroyed,
            "it is said to be here alone, and there is a copy",
        ),
        (
            Guard::OneAtATime,
            "what cannot run here is taken from where it could",
        ),
    ] {
        let Err(found) = search(Some(guard)) else {
            panic!("{guard:?} makes no difference");
        };
        assert_eq!(found.why, why, "{guard:?}: {found:#?}");
    }
}
