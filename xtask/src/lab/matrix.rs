//! The whole matrix on each suite's Xen, and its results as `docs/interop.md`.

use std::fmt::Write as _;

use anyhow::{Result, bail};

use super::Boots;
use super::build::Lab;
use super::figures::Figures;
use super::results::Notes;
use super::scenario::{SCENARIOS, Scenario};
use super::shadow;
use crate::workspace;

/// What stands above the tables.
const HEAD: &str = "\
# Interoperability with Xen

Made by `cargo xtask lab report` from the results of `lab run` and `lab matrix`: a real Xen
with Debian's kernel and toolstack, under qemu's software emulation. A scenario is a kind
and a guest; a guest counts, checks a memory pattern and rewritten pages every round, and
has to go on doing so (the guest `hvm` sits in its BIOS, and has to be there). A scenario
fails, too, when it leaves a dirty log that is on, a domain (also a dead one that a mapping
holds), a mapping, an event channel of dom0, a process or a xenstore node behind.

Debian builds its hypervisor without shadow paging, which the dirty log of a PV guest needs,
and without 32-bit PV guests. Scenarios with either (32-bit PV, live migration of PV) run on
a hypervisor built with both from the newest source package of the suite that the archive
holds, marked *s*; the toolstack is Debian's.

| guest | |
|---|---|
| pv, pv2 | 64-bit PV, 1 and 2 vcpus |
| pv32 | 32-bit PV, 1 vcpu |
| pvh, pvh2 | PVH, 1 and 2 vcpus |
| hvm | HVM without PV drivers, in SeaBIOS, with qemu as its device model |
";

/// What nobody has to look for in the tables.
const MISSING: &str = "
## Not in the matrix

- 32-bit PV guests with 2 vcpus: the lab's guest brings up a second one in 64-bit mode only.
- HVM guests with PV drivers, or with an operating system.
- Remus and COLO: the helper refuses them.
";

/// What is known of one suite's Xen.
struct Column {
    xen: String,
    versions: String,
    /// The version of the hypervisor built from source.
    shadow: Option<String>,
    notes: Notes,
    figures: Figures,
}

/// Run all scenarios on each suite's Xen, then [`report`].
///
/// # Errors
///
/// A lab cannot be built or does not boot; or a scenario fails, after all have run and
/// the document has been written.
pub(super) fn run(suites: &[String], limit: u64) -> Result<()> {
    let mut bad = 0;
    let mut images = Vec::new();
    for suite in suites {
        let lab = Lab::build(suite)?;
        let boots = Boots {
            suite,
            release: false,
            // Of the older Xens.
            images: &images,
            limit,
        };
        bad += boots.run(&lab, &scenarios())?.failures();
        images.push(lab.file("out/images"));
    }
    report(suites)?;
    match bad {
        0 => Ok(()),
        n => bail!("{n} scenarios failed: docs/interop.md has them"),
    }
}

/// Write `docs/interop.md` from what was noted of the last run of each scenario.
pub(super) fn report(suites: &[String]) -> Result<()> {
    let mut columns = Vec::new();
    for suite in suites {
        let lab = Lab::build(suite)?;
        columns.push(Column {
            xen: lab.xen_version()?,
            versions: lab.describe()?,
            shadow: shadow::built(&lab),
            notes: Notes::read(&lab)?,
            figures: Figures::read(&lab)?,
        });
    }
    let path = workspace::root().join("docs/interop.md");
    let earlier = std::fs::read_to_string(&path)?;
    for column in &mut columns {
        remember(column, &earlier);
    }
    std::fs::write(&path, document(&columns)?)?;
    println!("{}", path.display());
    Ok(())
}

/// What an earlier document has of scenarios that have not run in this lab since.
fn remember(column: &mut Column, document: &str) {
    let cells = |line: &str| -> Vec<String> {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    let mut lines = document.lines().map(cells);
    let heading = format!("Xen {}", column.xen);
    let place = lines
        .find(|cells| cells.first().is_some_and(|cell| cell == "scenario"))
        .and_then(|cells| cells.iter().position(|cell| *cell == heading));
    let Some(place) = place else {
        return;
    };
    for cells in lines.take_while(|cells| cells.len() > place) {
        let name = cells[0].trim_end_matches(" *s*");
        let note = &cells[place];
        if scenarios().iter().any(|s| s.name() == name) && note != "not run" {
            let noted = column.notes.0.entry(name.to_owned());
            noted.or_insert_with(|| note.clone());
        }
    }
}

/// All but the ones that are for figures.
fn scenarios() -> Vec<Scenario> {
    let figures = |scenario: &&Scenario| scenario.kind == "pairs";
    let wanted = SCENARIOS.iter().filter(|scenario| !figures(scenario));
    wanted.copied().collect()
}

fn document(columns: &[Column]) -> Result<String> {
    let mut text = HEAD.to_owned();
    text.push_str("\n## Results\n\nThe last run of each; seconds under emulation.\n\n| scenario |");
    for column in columns {
        write!(text, " Xen {} |", column.xen)?;
    }
    text.push_str(" what it is |\n|---|");
    text.push_str(&"---|".repeat(columns.len() + 1));
    text.push('\n');
    for scenario in scenarios() {
        let mark = if scenario.shadow { " *s*" } else { "" };
        write!(text, "| {}{mark} |", scenario.name())?;
        for column in columns {
            let note = column.notes.0.get(&scenario.name());
            write!(text, " {} |", note.map_or("not run", String::as_str))?;
        }
        writeln!(text, " {} |", scenario.about())?;
    }
    restored_images(&mut text, columns)?;
    for column in columns {
        if let Some(table) = column.figures.table()? {
            write!(text, "\n## Time and memory, Xen {}\n\n{table}", column.xen)?;
            for (name, note) in &column.notes.0 {
                if name.starts_with("pairs/") {
                    write!(text, "\n{name}: {note}\n")?;
                }
            }
        }
    }
    text.push_str("\n## Versions\n");
    for column in columns {
        writeln!(text, "\nXen {}:\n", column.xen)?;
        for line in column.versions.lines().skip(1) {
            writeln!(text, "    {}", line.trim())?;
        }
        if let Some(version) = &column.shadow {
            writeln!(text, "    *s*: source of xen {version}")?;
        }
    }
    text.push_str(MISSING);
    Ok(text)
}

/// Images that a lab was given: those of an older Xen.
fn restored_images(text: &mut String, columns: &[Column]) -> Result<()> {
    let mut table = String::new();
    for column in columns {
        for (name, note) in &column.notes.0 {
            let (by, image) = match name.split_once('/') {
                Some(("image", image)) => ("stock", image),
                Some(("image_ours", image)) => ("ours", image),
                _ => continue,
            };
            writeln!(table, "| {image} | {} | {by} | {note} |", column.xen)?;
        }
    }
    if !table.is_empty() {
        text.push_str(
            "\n## Images of another Xen\n\nNamed after the Xen that saved them, whose helper \
             that was, and the guest.\n\n| image | restored on Xen | by which helper | |\n\
             |---|---|---|---|\n",
        );
        text.push_str(&table);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn every_scenario_is_in_the_table_whether_it_ran_or_not() {
        let noted = [("stock/pv".to_owned(), "ok, 7 s, 2026-01-02".to_owned())];
        let column = Column {
            xen: "4.17".to_owned(),
            versions: "target/lab/x\n  xen-utils-4.17 4.17.7".to_owned(),
            notes: Notes(noted.into()),
            shadow: None,
            figures: Figures::default(),
        };
        let text = document(std::slice::from_ref(&column)).unwrap();
        assert!(text.contains("| stock/pv | ok, 7 s, 2026-01-02 |"));
        assert!(text.contains("| stock/pvh | not run |"));
        assert!(text.contains("    xen-utils-4.17 4.17.7\n") && !text.contains("target/lab"));
        // A lab that has run nothing knows it from the document.
        let mut fresh = Column {
            notes: Notes::default(),
            ..column
        };
        remember(&mut fresh, &text);
        assert_eq!(fresh.notes.0.len(), 1);
        assert_eq!(fresh.notes.0["stock/pv"], "ok, 7 s, 2026-01-02");
        fresh.xen = "4.20".to_owned();
        fresh.notes = Notes::default();
        remember(&mut fresh, &text);
        assert_eq!(fresh.notes, Notes::default());
    }
}
