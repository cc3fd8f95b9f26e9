//! Downtime of a live migration with Xen's engine or ours, in pairs: from the request to suspend
//! the guest until the receiving helper has ended.
//!
//! The guest writes at a fixed rate, in timed steps that need no thread. Both engines stop like
//! Xen's, after five passes or with fewer than 50 dirty pages.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::bench::{CONTENDERS, Runner};
use super::plot::Group;
use crate::spread::Spread;

/// Dirty rates in pages per second: each page of the working set is equally likely.
const RATES: [u32; 3] = [10_000, 50_000, 200_000];

/// The contenders that migrate: `cat` cannot.
const WHO: [usize; 3] = [0, 1, 2];

/// The costs of one migration, as `xsr-peer-run` prints them.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Took {
    seconds: f64,
    downtime: f64,
}

/// Migrations at one rate.
#[derive(Debug)]
pub(super) struct Row {
    kind: String,
    rate: u32,
    took: [Vec<Took>; WHO.len()],
}

impl Row {
    /// One value of all runs, in ms.
    fn ms(&self, who: usize, figure: impl Fn(&Took) -> f64) -> Spread {
        Spread::of(self.took[who].iter().map(|took| figure(took) * 1000.0))
    }

    pub(super) fn group(&self) -> Group {
        let bars = WHO.map(|who| (CONTENDERS[who].name, self.ms(who, |took| took.downtime)));
        Group {
            name: format!("{}: {} pages/s", self.kind, self.rate),
            bars: bars.to_vec(),
        }
    }
}

/// Migrates guests of `mib` MiB of one kind, at every rate.
///
/// # Errors
///
/// A migration fails.
pub(super) fn run(runner: &Runner<'_>, kind: &str, mib: u64, pairs: u32) -> Result<Vec<Row>> {
    let guest = runner.dir.join("guest");
    let mib_text = mib.to_string();
    // A quarter of the guest's memory.
    let pages = (mib << 6).to_string();
    let mut rows = Vec::new();
    for rate in RATES {
        let rate_text = rate.to_string();
        let words = ["make".as_ref(), guest.as_os_str(), kind.as_ref()];
        let more = [&mib_text, &rate_text, &pages].map(OsStr::new);
        runner.task("1", words.into_iter().chain(more))?;
        let mut took: [Vec<Took>; WHO.len()] = Default::default();
        for round in 0..pairs {
            eprintln!("{kind} at {rate} pages/s: round {} of {pairs}", round + 1);
            let mut turns = WHO;
            if round % 2 == 1 {
                turns.reverse();
            }
            for turn in turns {
                let contender = CONTENDERS[turn];
                // It is still suspended after the last migration.
                runner.task("1", [OsStr::new("resume"), guest.as_os_str()])?;
                let words = [
                    OsStr::new("migrate"),
                    OsStr::new(contender.whose),
                    guest.as_os_str(),
                    OsStr::new(kind),
                    OsStr::new(&mib_text),
                    OsStr::new("tcp"),
                ];
                let said = runner.task(contender.threads, words)?;
                let said = serde_json::from_str(&said);
                took[turn].push(said.context("what the runner says of a migration")?);
            }
        }
        fs::remove_dir_all(&guest)?;
        rows.push(Row {
            kind: kind.to_owned(),
            rate,
            took,
        });
    }
    Ok(rows)
}

/// The table.
pub(super) fn table(out: &mut String, rows: &[Row]) -> Result<()> {
    writeln!(out, "\n### Downtime of live migrations over TCP\n")?;
    writeln!(
        out,
        "| guest | dirty pages/s | stock, ms | ours, 1 thread, ms | ours, 2 threads, ms | ours (1): stock | ours (2): stock | all, s: stock, ours (1), ours (2) |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|")?;
    for row in rows {
        write!(out, "| {} | {} |", row.kind, row.rate)?;
        let downtimes = WHO.map(|who| row.ms(who, |took| took.downtime));
        for Spread {
            least,
            median,
            most,
        } in downtimes
        {
            write!(out, " {median:.1} ({least:.1}–{most:.1}) |")?;
        }
        let [stock, one, two] = downtimes.map(|downtime| downtime.median);
        let all = WHO.map(|who| row.ms(who, |took| took.seconds).median / 1000.0);
        writeln!(
            out,
            " {:.2} | {:.2} | {:.2}, {:.2}, {:.2} |",
            one / stock,
            two / stock,
            all[0],
            all[1],
            all[2]
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_row_has_medians_ranges_and_shares() {
        let took = |ms: [f64; 3]| {
            ms.map(|ms| Took {
                seconds: ms / 10.0,
                downtime: ms / 1000.0,
            })
            .to_vec()
        };
        let row = Row {
            kind: "pv".to_owned(),
            rate: 7,
            took: [[8.0, 4.0, 9.0], [6.0; 3], [2.0, 1.0, 3.0]].map(took),
        };
        let mut text = String::new();
        table(&mut text, std::slice::from_ref(&row)).unwrap();
        let expected = "| pv | 7 | 8.0 (4.0–9.0) | 6.0 (6.0–6.0) | 2.0 (1.0–3.0) | 0.75 | 0.25 | 0.80, 0.60, 0.20 |";
        assert!(text.contains(expected), "{text}");
        let group = row.group();
        assert_eq!(group.name, "pv: 7 pages/s");
        let spread = Spread::of([1.0, 2.0, 3.0]);
        assert_eq!(group.bars[2], ("ours, 2 threads", spread));
    }
}
