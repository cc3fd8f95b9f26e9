//! Results for each suite's Xen, from all runs on all machines: `docs/interop.json`, which is
//! checked in. A lab records what ran in it ([`Notes`]). [`Record::merge`] merges whatever is at
//! least as new as the known results. `docs/interop.md` is generated from it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::build::Lab;
use super::cells::{Code, Need};
use super::figures;
use super::results::Notes;
use super::shadow;
use crate::workspace;

/// Suite: results for its Xen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record(pub(super) BTreeMap<String, Suite>);

/// One suite's Xen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Suite {
    /// Version, such as `4.17`.
    pub(super) xen: String,
    /// Packages that matter, with their versions in the newest run.
    pub(super) versions: Vec<String>,
    /// The version of the hypervisor built from source.
    pub(super) shadow: Option<String>,
    /// `KIND/GUEST`: the result, in words that end with the commit of the code that ran (since
    /// 2026-11-25) and the date.
    pub(super) scenarios: Notes,
    /// Names of those whose code had changed when the record was written.
    #[serde(default)]
    pub(super) stale: BTreeSet<String>,
    /// Guest: output of `measure-helper`, line by line.
    pub(super) measures: BTreeMap<String, Vec<String>>,
}

impl Record {
    fn path() -> PathBuf {
        workspace::root().join("docs/interop.json")
    }

    /// Reads the checked-in file.
    pub(super) fn read() -> Result<Self> {
        let path = Self::path();
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Writes it, sorted, one item on a line.
    pub(super) fn write(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(Self::path(), text + "\n").context("writing docs/interop.json")
    }

    /// Merges the results from a suite's lab.
    pub(super) fn merge(&mut self, suite: &str, lab: &Lab) -> Result<()> {
        let versions = lab.describe()?;
        let found = Suite {
            xen: lab.xen_version()?,
            versions: versions
                .lines()
                .skip(1)
                .map(|l| l.trim().to_owned())
                .collect(),
            shadow: shadow::built(lab),
            scenarios: Notes::read(lab)?,
            stale: BTreeSet::new(),
            measures: figures::kept(lab)?,
        };
        self.take_over(suite, found);
        Ok(())
    }

    fn take_over(&mut self, suite: &str, found: Suite) {
        if found.scenarios.0.is_empty() {
            return;
        }
        let known = self.0.entry(suite.to_owned()).or_default();
        if known.xen != found.xen {
            // The suite has another Xen now: the old one's results do not apply.
            *known = Suite::default();
        }
        known.xen = found.xen;
        let mut news = false;
        for (name, note) in found.scenarios.0 {
            let before = known.scenarios.0.get(&name);
            if before.is_some_and(|before| date(before) > date(&note)) {
                continue;
            }
            let guest = name.strip_prefix("pairs/");
            if let Some((guest, lines)) = guest.and_then(|g| found.measures.get_key_value(g)) {
                known.measures.insert(guest.clone(), lines.clone());
            }
            known.scenarios.0.insert(name, note);
            news = true;
        }
        if news {
            known.versions = found.versions;
            known.shadow = found.shadow.or(known.shadow.take());
        }
    }

    /// Compares the code of each result with today's.
    pub(super) fn find_stale(&mut self) {
        let mut code = Code::default();
        for suite in self.0.values_mut() {
            let notes = suite.scenarios.0.iter();
            let stale = notes.filter(|(_, note)| code.need(Some(note)) == Some(Need::Stale));
            suite.stale = stale.map(|(name, _)| name.clone()).collect();
        }
    }

    /// The suites, the oldest Xen first.
    pub(super) fn columns(&self) -> Vec<(&str, &Suite)> {
        let number = |xen: &str| -> Vec<u32> {
            let parts = xen.split('.').map(|part| part.parse().unwrap_or_default());
            parts.collect()
        };
        let suites = self.0.iter().filter(|(_, suite)| !suite.xen.is_empty());
        let mut columns: Vec<(&str, &Suite)> = suites.map(|(n, s)| (n.as_str(), s)).collect();
        columns.sort_by_key(|(name, suite)| (number(&suite.xen), *name));
        columns
    }
}

impl Suite {
    /// The text of a scenario's cell.
    pub(super) fn cell(&self, name: &str) -> String {
        match self.scenarios.0.get(name) {
            None => "not run".to_owned(),
            Some(note) if self.stale.contains(name) => format!("{note}, *stale*"),
            Some(note) => note.clone(),
        }
    }
}

/// The date `2026-11-25` in `ok, 14 s, 2026-11-25`.
fn date(note: &str) -> &str {
    note.rsplit(' ').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suite(scenarios: &[(&str, &str)], measure: &str, version: &str) -> Suite {
        let scenarios = scenarios
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()));
        Suite {
            xen: "4.17".to_owned(),
            versions: vec![version.to_owned()],
            shadow: None,
            scenarios: Notes(scenarios.collect()),
            stale: BTreeSet::new(),
            measures: [("g".to_owned(), vec![measure.to_owned()])].into(),
        }
    }

    #[test]
    fn what_is_newer_stands_and_nothing_else_goes() {
        let mut record = Record::default();
        let first = [
            ("stock/pv", "ok, 7 s, 2026-01-02"),
            ("stock/pvh", "ok, 8 s, 2026-01-02"),
            ("pairs/g", "ok, 9 s, 2026-01-02"),
        ];
        let mut old = suite(&first, "one", "1");
        old.shadow = Some("s".to_owned());
        record.take_over("bookworm", old);
        // A lab without runs, and one whose runs are older.
        record.take_over("bookworm", suite(&[], "two", "2"));
        let older = [
            ("stock/pv", "**failed**, 2025-12-31"),
            ("pairs/g", "ok, 1 s, 2025-12-31"),
        ];
        record.take_over("bookworm", suite(&older, "two", "2"));
        let known = &record.0["bookworm"];
        assert_eq!(known.scenarios.0["stock/pv"], "ok, 7 s, 2026-01-02");
        assert_eq!(
            (known.versions[0].as_str(), known.measures["g"][0].as_str()),
            ("1", "one")
        );
        // Results of the same day count as newer.
        let newer = [
            ("stock/pv", "**failed**, 2026-01-02"),
            ("pairs/g", "ok, 5 s, 2026-01-03"),
        ];
        record.take_over("bookworm", suite(&newer, "two", "2"));
        let known = &record.0["bookworm"];
        assert_eq!(known.scenarios.0["stock/pv"], "**failed**, 2026-01-02");
        assert_eq!(known.scenarios.0["stock/pvh"], "ok, 8 s, 2026-01-02");
        assert_eq!(
            (known.versions[0].as_str(), known.measures["g"][0].as_str()),
            ("2", "two")
        );
        assert_eq!(known.shadow.as_deref(), Some("s"));
    }

    #[test]
    fn another_xen_of_the_same_suite_begins_anew() {
        let mut record = Record::default();
        record.take_over(
            "sid",
            suite(&[("stock/pv", "ok, 7 s, 2026-01-02")], "one", "1"),
        );
        let mut next = suite(&[("stock/pvh", "ok, 7 s, 2026-01-02")], "one", "1");
        next.xen = "4.21".to_owned();
        record.take_over("sid", next);
        record.take_over(
            "bookworm",
            suite(&[("stock/pv", "ok, 7 s, 2026-01-02")], "one", "1"),
        );
        assert_eq!(record.0["sid"].scenarios.0.len(), 1);
        let columns: Vec<&str> = record.columns().iter().map(|(name, _)| *name).collect();
        assert_eq!(columns, ["bookworm", "sid"]);
    }
}
