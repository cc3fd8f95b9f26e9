//! The cells of the matrix: a scenario on a suite's Xen, or between two of them. Decides which
//! cells a run still has to fill, and estimates how long that takes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;

use super::record::Record;
use super::results::TO;
use super::scenario::{SCENARIOS, Scenario};
use crate::command::Invocation;

/// The code that a scenario tests. A result is stale once any of it has changed.
const CODE: [&str; 6] = [
    "format/src",
    "xen-backend/src",
    "save-restore/src",
    "cli/src",
    "cli/save-helper/src",
    "Cargo.lock",
];

/// What the second host's processor lacks in the cells that test the comparison of CPU features.
const LESSER_CPU: &str = "-aes";

/// The scenarios that run with [`LESSER_CPU`], too.
const ON_LESSER_CPU: [&str; 3] = ["two_xsr/pvh", "two_ours_ours/pvh", "two_plan/pvh"];

/// Assumed duration of a scenario that has not run yet, in seconds.
const USUAL_SECONDS: f64 = 60.0;

/// Assumed duration of a boot with its preparation, in seconds.
const BOOT_SECONDS: f64 = 60.0;

/// Why a cell has to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Need {
    /// It has no result.
    NotRun,
    /// It failed the last time, or did not end.
    Failed,
    /// Its code has changed since.
    Stale,
}

/// Compares the code of earlier commits with today's.
#[derive(Debug, Default)]
pub(super) struct Code(BTreeMap<String, bool>);

impl Code {
    /// Whether [`CODE`] is the same now as in `commit`; `false` if that is unknown.
    fn is_same(&mut self, commit: &str) -> bool {
        if let Some(known) = self.0.get(commit) {
            return *known;
        }
        // A plus sign: changes that were not committed.
        let same = !commit.ends_with('+')
            && Invocation::new("git")
                .args(["diff", "--quiet", commit, "--"])
                .args(CODE)
                .succeeds();
        self.0.insert(commit.to_owned(), same);
        same
    }

    /// Whether and why the cell with this note has to run; a `note` as [`super::results`] writes it.
    pub(super) fn need(&mut self, note: Option<&str>) -> Option<Need> {
        let Some(note) = note else {
            return Some(Need::NotRun);
        };
        if !note.starts_with("ok") {
            return Some(Need::Failed);
        }
        match commit(note) {
            Some(commit) if self.is_same(commit) => None,
            _ => Some(Need::Stale),
        }
    }
}

/// The commit `cb6517a25` in `ok, 12 s, cb6517a25, 2026-11-25`.
fn commit(note: &str) -> Option<&str> {
    let words: Vec<&str> = note.split(", ").collect();
    match words[..] {
        [.., commit, _date] if words.len() > 3 => Some(commit),
        _ => None,
    }
}

/// The seconds in `ok, 12 s, cb6517a25, 2026-11-25`.
fn seconds(note: &str) -> Option<f64> {
    note.split(", ").nth(1)?.strip_suffix(" s")?.parse().ok()
}

/// One call of [`super::Boots::run`].
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Run {
    pub(super) suite: String,
    pub(super) to: String,
    pub(super) to_cpu: &'static str,
    pub(super) wanted: Vec<Scenario>,
    /// The estimate.
    seconds: f64,
    needs: BTreeMap<Need, usize>,
}

/// The runs that fill all cells for `suites`, oldest Xen first, of those scenarios for which
/// `asked` returns true; with `all`, cells whose results are good, too.
pub(super) fn plan(
    record: &Record,
    suites: &[String],
    asked: impl Fn(&Scenario) -> bool,
    all: bool,
) -> Vec<Run> {
    let mut code = Code::default();
    let mut runs = Vec::new();
    let mut add = |suite: &str, to: &str, to_cpu: &'static str, of: &dyn Fn(&Scenario) -> bool| {
        let mut run = Run {
            suite: suite.to_owned(),
            to: to.to_owned(),
            to_cpu,
            wanted: Vec::new(),
            seconds: 0.0,
            needs: BTreeMap::new(),
        };
        for scenario in SCENARIOS.iter().filter(|s| of(s) && asked(s)) {
            let name = match scenario.two {
                true => format!("{}{TO}{to}{to_cpu}", scenario.name()),
                false => scenario.name(),
            };
            let known = record.0.get(suite).and_then(|s| s.scenarios.0.get(&name));
            let need = code.need(known.map(String::as_str));
            if need.is_none() && !all {
                continue;
            }
            let took = known.and_then(|note| seconds(note));
            run.seconds += took.unwrap_or(USUAL_SECONDS);
            if let Some(need) = need {
                *run.needs.entry(need).or_default() += 1;
            }
            run.wanted.push(*scenario);
        }
        if !run.wanted.is_empty() {
            run.seconds += BOOT_SECONDS;
            runs.push(run);
        }
    };
    // Measurements are not part of the matrix.
    for suite in suites {
        add(suite, suite, "", &|s| s.kind != "pairs" && !s.lesser_cpu());
        add(suite, suite, LESSER_CPU, &|s| {
            ON_LESSER_CPU.contains(&s.name().as_str())
        });
    }
    for pair in suites.windows(2) {
        add(&pair[0], &pair[1], "", &|s| s.two && !s.lesser_cpu());
    }
    runs
}

impl Scenario {
    /// Whether it makes sense only if the second host's processor lacks something.
    fn lesser_cpu(&self) -> bool {
        self.kind == "two_plan"
    }
}

/// The runs as a list, with their hours.
pub(super) fn describe(runs: &[Run]) -> Result<String> {
    let mut text = String::new();
    let words = [
        (Need::NotRun, "never ran"),
        (Need::Failed, "failed"),
        (Need::Stale, "stale"),
    ];
    for run in runs {
        let needs: Vec<String> = words
            .iter()
            .filter_map(|(need, word)| Some(format!("{} {word}", run.needs.get(need)?)))
            .collect();
        let to = match run.wanted.iter().any(|scenario| scenario.two) {
            true => format!(" (second host: {}{})", run.to, run.to_cpu),
            false => String::new(),
        };
        writeln!(
            text,
            "{}{to}: {} cells ({}), about {}",
            run.suite,
            run.wanted.len(),
            needs.join(", "),
            hours(run.seconds)
        )?;
    }
    let all: f64 = runs.iter().map(|run| run.seconds).sum();
    write!(text, "in all about {}", hours(all))?;
    Ok(text)
}

fn hours(seconds: f64) -> String {
    match seconds / 60.0 {
        minutes if minutes < 90.0 => format!("{minutes:.0} minutes"),
        minutes => format!("{:.1} hours", minutes / 60.0),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::lab::record::Suite;
    use crate::lab::results::Notes;
    use crate::workspace;

    fn record(notes: &[(&str, &str)]) -> Record {
        let notes = notes.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        let suite = Suite {
            scenarios: Notes(notes.collect()),
            ..Suite::default()
        };
        Record([("bookworm".to_owned(), suite)].into())
    }

    #[test]
    fn a_result_holds_while_the_code_is_that_of_its_commit() {
        let mut code = Code([("abc123456".to_owned(), true), ("old".to_owned(), false)].into());
        assert_eq!(code.need(Some("ok, 7 s, abc123456, 2026-01-02")), None);
        for stale in [
            "ok, 7 s, old, 2026-01-02",
            "ok, 7 s, 2026-01-02",
            "ok, 7 s, abc123456+, 2026-01-02",
            "ok, 7 s, 000000000, 2026-01-02",
        ] {
            assert_eq!(code.need(Some(stale)), Some(Need::Stale), "{stale}");
        }
        let failed = Some("**failed**, abc123456, 2026-01-02");
        assert_eq!(code.need(failed), Some(Need::Failed));
        assert_eq!(code.need(None), Some(Need::NotRun));
    }

    /// The commit that is checked out has the code that is checked out, if nothing was changed.
    #[test]
    fn git_says_which_code_is_the_same() {
        let Some(commit) = workspace::commit().filter(|commit| !commit.ends_with('+')) else {
            return;
        };
        assert!(Code::default().is_same(&commit));
    }

    #[test]
    fn a_run_has_what_is_missing_and_failed_and_no_measurements() {
        let record = record(&[
            ("stock/pv", "**failed**, abc123456, 2026-01-02"),
            ("two_xsr/pvh>bookworm", "ok, 7 s, 2026-01-02"),
        ]);
        let suites = ["bookworm".to_owned(), "trixie".to_owned()];
        let asked = |s: &Scenario| ["stock/pv", "two_xsr/pvh", "pairs/pv64m"].contains(&&*s.name());
        let runs = plan(&record, &suites, asked, false);
        let cells: Vec<(String, usize)> = runs
            .iter()
            .map(|run| {
                (
                    format!("{}>{}{}", run.suite, run.to, run.to_cpu),
                    run.wanted.len(),
                )
            })
            .collect();
        assert_eq!(
            cells,
            [
                ("bookworm>bookworm".to_owned(), 2),
                ("bookworm>bookworm-aes".to_owned(), 1),
                ("trixie>trixie".to_owned(), 2),
                ("trixie>trixie-aes".to_owned(), 1),
                ("bookworm>trixie".to_owned(), 1),
            ]
        );
        assert_eq!(
            describe(&runs[..1]).unwrap(),
            "bookworm (second host: bookworm): 2 cells (1 failed, 1 stale), about 2 minutes\n\
             in all about 2 minutes"
        );
    }
}
