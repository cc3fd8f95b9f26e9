//! Measurements of the `pairs` scenarios: both helpers on the same guest in the same boot.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};

use super::build::Lab;
use super::share::Share;

use crate::spread::Spread;

/// Prefix of the files that dom0 writes, one for each guest.
const PREFIX: &str = "measures-";

/// One run of a helper.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    seconds: f64,
    /// Seconds of processor time.
    busy: f64,
    peak_kib: u64,
}

/// Runs by guest, save or restore, and helper.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Figures(BTreeMap<(String, String, String), Vec<Run>>);

/// Stores a boot's measurements with the lab.
pub(super) fn keep(lab: &Lab, share: &Share) -> Result<()> {
    for entry in std::fs::read_dir(&share.output)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(PREFIX) {
            std::fs::copy(entry.path(), lab.file(&name))
                .with_context(|| format!("cannot keep {name}"))?;
        }
    }
    Ok(())
}

/// The measurements stored with a lab: guest, and lines as `measure-helper` writes them.
pub(super) fn kept(lab: &Lab) -> Result<BTreeMap<String, Vec<String>>> {
    let mut kept = BTreeMap::new();
    for entry in std::fs::read_dir(lab.file("."))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(guest) = name.strip_prefix(PREFIX) {
            let text = std::fs::read_to_string(entry.path())?;
            let lines = text.lines().map(str::to_owned).collect();
            kept.insert(guest.to_owned(), lines);
        }
    }
    Ok(kept)
}

impl Figures {
    /// Parses the result of [`kept`].
    pub(super) fn of(measures: &BTreeMap<String, Vec<String>>) -> Self {
        let mut figures = Self::default();
        for (guest, lines) in measures {
            figures.add(guest, lines);
        }
        figures
    }

    /// Adds lines as `measure-helper` writes them.
    fn add(&mut self, guest: &str, lines: &[String]) {
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let [mode, helper, seconds, busy, peak] = words[..] else {
                continue;
            };
            if let (Ok(seconds), Ok(busy), Ok(peak_kib)) =
                (seconds.parse(), busy.parse(), peak.parse())
            {
                let key = (guest.to_owned(), mode.to_owned(), helper.to_owned());
                self.0.entry(key).or_default().push(Run {
                    seconds,
                    busy,
                    peak_kib,
                });
            }
        }
    }

    /// The table; `None` if there are no measurements.
    pub(super) fn table(&self) -> Result<Option<String>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let mut text = String::from(
            "`cargo xtask lab run --release pairs`: in one boot, on the same guest (64 MiB), each \
             helper\nin turn, five times; `xl save -c`, then `xl restore`. Seconds of one helper \
             from start to end,\nunder emulation; processor: median of user and system time; peak: \
             the largest resident set,\nread every 20 ms. \
             Processor time is the steadier figure where the machine has other work.\n\n\
             | guest | | helper | seconds, each run | median | processor | peak |\n\
             |---|---|---|---|---|---|---|\n",
        );
        for ((guest, mode, helper), runs) in &self.0 {
            let each: Vec<String> = runs.iter().map(|r| format!("{:.2}", r.seconds)).collect();
            let peak = match runs.iter().map(|r| r.peak_kib).max() {
                None | Some(0) => "not measured".to_owned(),
                // Far less than 4 TiB, so it fits.
                Some(kib) => format!("{:.1} MiB", f64::from(u32::try_from(kib)?) / 1024.0),
            };
            writeln!(
                text,
                "| {guest} | {mode} | {helper} | {} | {:.2} | {:.2} | {peak} |",
                each.join(" "),
                Spread::of(runs.iter().map(|r| r.seconds)).median,
                Spread::of(runs.iter().map(|r| r.busy)).median,
            )?;
        }
        Ok(Some(text))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn runs_of_a_helper_are_one_line_of_the_table() {
        assert_eq!(Figures::of(&BTreeMap::new()).table().unwrap(), None);
        let text = "save ours 3.0 0.5 2048\nsave ours 1.0 0.7 1024\nsave ours 2.0 0.6 1024\nsave o";
        let lines = text.lines().map(str::to_owned).collect();
        let figures = Figures::of(&[("pv64m".to_owned(), lines)].into());
        let table = figures.table().unwrap().unwrap();
        let line = "| pv64m | save | ours | 3.00 1.00 2.00 | 2.00 | 0.60 | 2.0 MiB |\n";
        assert!(table.ends_with(line), "{table}");
    }
}
