//! The whole matrix on each suite's Xen, and its results as `docs/interop.md`.

use std::fmt::Write as _;

use anyhow::{Result, bail};

use super::build::Lab;
use super::qemu;
use super::results::Results;
use super::scenario::{SCENARIOS, Scenario};
use super::share::Share;
use crate::command::Invocation;
use crate::workspace;

/// What stands above the tables.
const HEAD: &str = "\
# Interoperability with Xen

Made by `cargo xtask lab matrix`, on a real Xen with Debian's kernel and toolstack under
qemu's software emulation: not written by hand. A scenario is a kind and a guest; a guest
counts, checks a memory pattern and rewritten pages every round, and has to go on doing
so (the guest `hvm` sits in its BIOS, and has to be there). Each scenario fails, too, when
it leaves a domain, an event channel of dom0 or a xenstore node behind.

| guest | |
|---|---|
| pv, pv2 | 64-bit PV, 1 and 2 vcpus |
| pvh, pvh2 | PVH, 1 and 2 vcpus |
| hvm | HVM without PV drivers, in SeaBIOS, with qemu as its device model |
";

/// What nobody has to look for in the tables.
const MISSING: &str = "
## Not in the matrix

- Live migration of PV guests: Debian builds its hypervisor without shadow paging, which
  the dirty log of a PV guest needs.
- 32-bit PV guests: Debian builds its hypervisor without them.
- Images of an older Xen restored on a newer one.
- Remus and COLO: the helper refuses them.
";

/// The results of one suite.
struct Column {
    xen: String,
    versions: String,
    results: Results,
}

/// Run all scenarios on each suite's Xen, write `docs/interop.md`.
///
/// # Errors
///
/// A lab cannot be built or does not boot; or a scenario fails, after all have run and
/// the document has been written.
pub(super) fn run(suites: &[String], limit: u64) -> Result<()> {
    let path = workspace::root().join("docs/interop.md");
    let scenarios = scenarios();
    let mut columns = Vec::new();
    for suite in suites {
        let lab = Lab::build(suite)?;
        let share = Share::prepare(&lab, false)?;
        share.scenarios(&scenarios)?;
        let booted = qemu::boot(&lab, &share, limit);
        // What did not end is in the table as such.
        if let Err(error) = booted {
            eprintln!("{suite}: {error:#}");
        }
        columns.push(Column {
            xen: lab.xen_version()?,
            versions: lab.describe()?,
            results: Results::read(&share)?,
        });
        let date = Invocation::new("date").args(["-u", "+%F"]).capture()?;
        std::fs::write(&path, document(date.trim(), &columns)?)?;
    }
    println!("{}", path.display());
    let bad: usize = columns.iter().map(|c| c.results.failures()).sum();
    match bad {
        0 => Ok(()),
        n => bail!("{n} scenarios failed: see {}", path.display()),
    }
}

/// All but the ones that are for figures.
fn scenarios() -> Vec<Scenario> {
    let figures = |scenario: &&Scenario| scenario.kind == "pairs";
    let wanted = SCENARIOS.iter().filter(|scenario| !figures(scenario));
    wanted.copied().collect()
}

fn document(date: &str, columns: &[Column]) -> Result<String> {
    let mut text = HEAD.to_owned();
    write!(
        text,
        "\n## Results of {date}\n\nSeconds, under emulation.\n\n| scenario |"
    )?;
    for column in columns {
        write!(text, " Xen {} |", column.xen)?;
    }
    text.push_str(" what it is |\n|---|");
    text.push_str(&"---|".repeat(columns.len() + 1));
    text.push('\n');
    for (at, scenario) in scenarios().iter().enumerate() {
        write!(text, "| {} |", scenario.name())?;
        for column in columns {
            let row = &column.results.rows[at];
            match row.ok {
                Some(true) => write!(text, " ok, {:.0} |", row.seconds)?,
                Some(false) => text.push_str(" **failed** |"),
                None => text.push_str(" **did not end** |"),
            }
        }
        writeln!(text, " {} |", scenario.about())?;
    }
    text.push_str("\n## Versions\n");
    for column in columns {
        writeln!(text, "\nXen {}:\n", column.xen)?;
        for line in column.versions.lines().skip(1) {
            writeln!(text, "    {}", line.trim())?;
        }
    }
    text.push_str(MISSING);
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::super::results::Row;
    use super::*;

    #[test]
    fn failures_stand_out() {
        let all = scenarios();
        let rows = all.iter().enumerate().map(|(at, scenario)| Row {
            name: scenario.name(),
            ok: [Some(true), Some(false), None].get(at).copied().flatten(),
            seconds: 7.0,
        });
        let column = Column {
            xen: "4.17".to_owned(),
            versions: "target/lab/x\n  xen-utils-4.17 4.17.7".to_owned(),
            results: Results {
                rows: rows.collect(),
            },
        };
        assert_eq!(column.results.failures(), all.len() - 1);
        let text = document("2026-01-02", &[column]).unwrap();
        assert!(text.contains("## Results of 2026-01-02"));
        assert!(text.contains(" ok, 7 |") && text.contains(" **failed** |"));
        assert!(text.contains(" **did not end** |"));
        assert!(text.contains("    xen-utils-4.17 4.17.7\n") && !text.contains("target/lab"));
    }
}
