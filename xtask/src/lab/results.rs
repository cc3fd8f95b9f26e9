//! What became of the scenarios of one boot.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};

use super::share::Share;

/// One scenario's end.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) name: String,
    /// `None`: it never ended.
    pub(super) ok: Option<bool>,
    pub(super) seconds: f64,
}

/// The ends of all that were asked for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Results {
    pub(super) rows: Vec<Row>,
}

impl Results {
    /// Read what dom0 wrote.
    pub(super) fn read(share: &Share) -> Result<Self> {
        let path = share.output.join("results");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("dom0 wrote no {}", path.display()))?;
        Ok(Self::parse(&share.wanted()?, &text))
    }

    /// Every scenario that was asked for, whether dom0 says something of it or not.
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

    /// The table for people.
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
            // A String takes everything.
            debug_assert!(written.is_ok());
        }
        table.trim_end().to_owned()
    }

    /// How many were not fine.
    pub(super) fn failures(&self) -> usize {
        self.rows.iter().filter(|row| row.ok != Some(true)).count()
    }

    /// Fail unless every scenario was fine.
    pub(super) fn verdict(&self, share: &Share) -> Result<()> {
        let bad: Vec<&str> = self
            .rows
            .iter()
            .filter(|row| row.ok != Some(true))
            .map(|row| row.name.as_str())
            .collect();
        if !bad.is_empty() {
            bail!(
                "{} of {} scenarios failed: {}; their logs are KIND-GUEST.log in {}",
                bad.len(),
                self.rows.len(),
                bad.join(", "),
                share.output.display()
            );
        }
        Ok(())
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
    }
}
