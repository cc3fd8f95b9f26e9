//! Results of the scenarios: those of one boot, and the last of each from all boots.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::ErrorKind;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::build::Lab;
use super::share::Share;
use crate::command::Invocation;

/// One scenario's result.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) name: String,
    /// `None` if it did not end.
    pub(super) ok: Option<bool>,
    pub(super) seconds: f64,
}

impl Row {
    /// The result, the commit, and the date as the last word.
    fn note(&self, commit: Option<&str>, date: &str) -> String {
        let end = match self.ok {
            Some(true) => format!("ok, {:.0} s", self.seconds),
            Some(false) => "**failed**".to_owned(),
            None => "**did not end**".to_owned(),
        };
        match commit {
            Some(commit) => format!("{end}, {commit}, {date}"),
            None => format!("{end}, {date}"),
        }
    }
}

/// The results of all requested scenarios.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Results {
    pub(super) rows: Vec<Row>,
}

impl Results {
    /// Reads the results that dom0 wrote.
    pub(super) fn read(share: &Share) -> Result<Self> {
        let path = share.output.join("results");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("dom0 wrote no {}", path.display()))?;
        Ok(Self::parse(&share.wanted()?, &text))
    }

    /// Every requested scenario, whether dom0 reported it or not.
    fn parse(wanted: &[(String, String)], text: &str) -> Self {
        let rows = wanted.iter().map(|(kind, guest)| {
            let said = text.lines().find_map(|line| {
                let words: Vec<&str> = line.split(' ').collect();
                match words[..] {
                    [k, g, result, seconds] if k == kind && g == guest => {
                        Some((result == "ok", seconds.parse().ok()?))
                    }
                    _ => None,
                }
            });
            Row {
                name: format!("{kind}/{guest}"),
                ok: said.map(|(ok, _)| ok),
                seconds: said.map_or(0.0, |(_, seconds)| seconds),
            }
        });
        Self {
            rows: rows.collect(),
        }
    }

    /// The table for display.
    pub(super) fn table(&self) -> String {
        let width = self.rows.iter().map(|row| row.name.len()).max();
        let width = width.unwrap_or_default();
        let mut table = String::new();
        for row in &self.rows {
            let word = match row.ok {
                Some(true) => "ok",
                Some(false) => "FAILED",
                None => "DID NOT END",
            };
            let written = writeln!(table, "{:width$}  {:6.1} s  {word}", row.name, row.seconds);
            // Writing to a String never fails.
            debug_assert!(written.is_ok());
        }
        table.trim_end().to_owned()
    }

    /// Records the results with the lab, each replacing the scenario's previous one.
    pub(super) fn note(&self, lab: &Lab, boot: &Boot) -> Result<()> {
        let mut notes = Notes::read(lab)?;
        for row in &self.rows {
            let note = row.note(boot.commit.as_deref(), &boot.date);
            let name = match &boot.to {
                None => row.name.clone(),
                Some(to) => format!("{}{TO}{to}", row.name),
            };
            notes.0.insert(name, note);
        }
        notes.write(lab)
    }

    /// Fails unless every scenario succeeded.
    pub(super) fn verdict(&self, lab: &Lab) -> Result<()> {
        let bad: Vec<&str> = self
            .rows
            .iter()
            .filter(|row| row.ok != Some(true))
            .map(|row| row.name.as_str())
            .collect();
        if !bad.is_empty() {
            bail!(
                "{} of {} scenarios failed: {}; their logs are KIND-GUEST.log in {}, or \
                 out-shadow beside it",
                bad.len(),
                self.rows.len(),
                bad.join(", "),
                lab.file("out").display()
            );
        }
        Ok(())
    }
}

/// What a boot's results are recorded with. It is stored in the boot's output directory until its
/// results are recorded, so that those of a boot that was interrupted are not lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Boot {
    /// The commit of the code that runs.
    commit: Option<String>,
    /// The second host, if there is one.
    to: Option<String>,
    /// The day on which it began: `2026-11-30`.
    date: String,
    /// The requested scenarios: kind and guest.
    wanted: Vec<(String, String)>,
}

impl Boot {
    const FILE: &str = "boot.json";

    /// Stores what the coming boot of `share` is recorded with.
    pub(super) fn begin(share: &Share, to: Option<String>) -> Result<Self> {
        let date = Invocation::new("date").args(["-u", "+%F"]).capture()?;
        let boot = Self {
            commit: share.commit.clone(),
            to,
            date: date.trim().to_owned(),
            wanted: share.wanted()?,
        };
        let text = serde_json::to_string(&boot)?;
        std::fs::write(share.output.join(Self::FILE), text).context("noting what is to run")?;
        Ok(boot)
    }

    /// Records the results of the boot.
    pub(super) fn end(&self, lab: &Lab, share: &Share, results: &Results) -> Result<()> {
        results.note(lab, self)?;
        std::fs::remove_file(share.output.join(Self::FILE)).context("noting what has run")
    }

    /// Records the results of boots of this lab that were interrupted: of the scenarios that had
    /// ended by then.
    pub(super) fn recover(lab: &Lab) -> Result<()> {
        for entry in std::fs::read_dir(lab.file("."))? {
            let output = entry?.path();
            let file = output.join(Self::FILE);
            let boot: Self = match std::fs::read_to_string(&file) {
                Ok(text) => serde_json::from_str(&text)
                    .with_context(|| format!("{} is damaged: remove it", file.display()))?,
                Err(_) => continue,
            };
            let text = std::fs::read_to_string(output.join("results")).unwrap_or_default();
            let mut results = Results::parse(&boot.wanted, &text);
            results.rows.retain(|row| row.ok.is_some());
            results.note(lab, &boot)?;
            std::fs::remove_file(&file).context("noting what had run")?;
        }
        Ok(())
    }
}

/// Separates a scenario of two hosts from the second host's suite in a note's name.
pub(super) const TO: char = '>';

/// The last result of each scenario in a lab: `KIND/GUEST`, and in words. For two hosts
/// `KIND/GUEST>SUITE`, with the suite of the second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Notes(pub(super) BTreeMap<String, String>);

impl Notes {
    const FILE: &str = "notes";

    /// Reads the notes; empty if nothing has run yet.
    pub(super) fn read(lab: &Lab) -> Result<Self> {
        match std::fs::read_to_string(lab.file(Self::FILE)) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).context("reading what was noted of earlier runs"),
        }
    }

    fn parse(text: &str) -> Self {
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        Self(lines.map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    fn write(&self, lab: &Lab) -> Result<()> {
        let mut text = String::new();
        for (name, note) in &self.0 {
            writeln!(text, "{name} {note}")?;
        }
        std::fs::write(lab.file(Self::FILE), text).context("noting the results")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scenario_that_says_nothing_has_not_passed() {
        let wanted = [("stock", "pv"), ("mock", "pv"), ("mock", "pvh")]
            .map(|(k, g)| (k.to_owned(), g.to_owned()));
        let results = Results::parse(&wanted, "stock pv ok 3.5\nmock pv failed 1.0\nmock p");
        let ends: Vec<Option<bool>> = results.rows.iter().map(|row| row.ok).collect();
        assert_eq!(ends, [Some(true), Some(false), None]);
        assert!(results.table().contains("DID NOT END"));
        let notes: Vec<String> = results
            .rows
            .iter()
            .map(|row| row.note(Some("abc"), "1"))
            .collect();
        assert_eq!(
            notes,
            [
                "ok, 4 s, abc, 1",
                "**failed**, abc, 1",
                "**did not end**, abc, 1"
            ]
        );
        assert_eq!(results.rows[1].note(None, "1"), "**failed**, 1");
    }
}
