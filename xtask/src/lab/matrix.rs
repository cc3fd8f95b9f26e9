//! The whole matrix of scenarios on each suite's Xen, with its results as `docs/interop.md`.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Result, bail};

use super::build::Lab;
use super::cells::{self, Run};
use super::figures::Figures;
use super::record::{Record, Suite};
use super::results::{Boot, TO};
use super::scenario::{SCENARIOS, Scenario};
use super::shadow;
use super::{Boots, MatrixArgs};
use crate::workspace;

/// The text above the tables.
const HEAD: &str = "\
# Interoperability with Xen

Made by `cargo xtask lab report` from the results of `lab run` and `lab matrix`, which are kept
in `docs/interop.json`: a real Xen
with Debian's kernel and toolstack, under qemu's software emulation. A scenario is a kind
and a guest; a guest counts, checks a memory pattern and rewritten pages every round, and
has to go on doing so. The HVM guests that sit in their BIOS have to be there, and their memory
to be what it was: where `xl` itself restores or migrates them, they are left paused, the stock
helper saves them again, and the two images are compared. That, the search for processes that
died, and a SIGTERM that is sure to come in the midst of a restore (`broken`) are in runs whose
commit is named; older ones did without. A scenario
fails, too, when it leaves a dirty log that is on, a domain (also a dead one that a mapping
holds), a mapping, an event channel of dom0, a process or a xenstore node behind, or when a
process of dom0 dies of a signal that no process sent.

Remus: `xl remus -F -n -d -i 300 -s \"\" GUEST \"xl migrate-receive -r\"` on one host, without
buffers for network and disk. After six checkpoints the sender's xl and helper are stopped where
they are, its guest is destroyed, and they are killed: the receiver takes over, and the guest has
to go on with the round behind one of the last three checkpoints, once, with its memory intact.

Debian builds its hypervisor without shadow paging, which the dirty log of a PV guest needs,
and without 32-bit PV guests. Scenarios with either (32-bit PV, live migration and Remus of PV)
run on a hypervisor built with both, marked *s*: from the source that is named under
\"Versions\", the newest source package of the suite that the archive holds or what it was given
(`lab build --shadow --source`). The toolstack is Debian's.

| guest | |
|---|---|
| pv, pv2 | 64-bit PV, 1 and 2 vcpus |
| pv32, pv32x2 | 32-bit PV, 1 and 2 vcpus |
| pvh, pvh2 | PVH, 1 and 2 vcpus |
| balloon, balloonhvm | PVH, and HVM as hvmpv, that gives pages back to Xen and takes them again, all the time |
| hvm, hvm2 | HVM without PV drivers, in SeaBIOS, 1 and 2 vcpus, with qemu as its device model |
| hvmpv, hvmpv2 | HVM that counts and suspends by itself (its firmware is the guest), 1 and 2 vcpus, likewise |
";

/// The section on what is not in the matrix.
const MISSING: &str = "
## Not in the matrix

- HVM guests with an operating system, or with PV devices other than console and xenstore.
- `direct` of HVM guests: refused, for they need a device model, which is libxl's.
- `remus --direct`: it is refused on one host, and has not been run between two.
- Live migration of PV guests on Debian's own hypervisor: without shadow paging Xen refuses to
  log what they write (EOPNOTSUPP), to the stock helper and to ours. Hence *s*.
- A Xen newer than 4.20: on 2026-11-25 no suite of Debian had one (sid had 4.20.4). For that of
  4.20 marked *s*, the archive listed the source package and did not hold it; it was built of
  upstream's release.
- Remus with buffers for network and disk (`xl remus` was given `-F -n -d`): the lab's guests have
  neither. COLO.
";

/// Runs the cells of the matrix that are missing, failed or stale, then [`report`].
///
/// # Errors
///
/// A lab cannot be built or does not boot, a scenario fails, or cannot be run because a hypervisor
/// is missing. The error is returned after all others have run and the document has been written.
pub(super) fn run(args: &MatrixArgs) -> Result<()> {
    let patterns = &args.scenarios;
    let known = match patterns[..] {
        [] => Vec::new(),
        _ => super::chosen(patterns)?,
    };
    let asked = |scenario: &Scenario| known.is_empty() || known.contains(scenario);
    let runs = cells::plan(&merged()?, &args.suites, asked, args.all);
    println!("{}", cells::describe(&runs)?);
    if args.dry_run {
        return Ok(());
    }
    let mut bad = Vec::new();
    let mut older = Images::default();
    for run in &runs {
        if let Err(error) = fill(run, args.limit, &mut older, &mut bad) {
            bad.push(format!("{}: {error:#}", run.suite));
        }
        report()?;
    }
    match &bad[..] {
        [] => Ok(()),
        _ => bail!(
            "docs/interop.md has what ran; not well:\n{}",
            bad.join("\n")
        ),
    }
}

/// Directories with the images of older Xens, by hypervisor.
#[derive(Debug, Default)]
struct Images {
    usual: Vec<PathBuf>,
    shadow: Vec<PathBuf>,
}

/// Performs one run, restores the images in `older` there, too, and adds the new images to it.
/// `bad` gets a line for whatever fails or cannot be run.
fn fill(run: &Run, limit: u64, older: &mut Images, bad: &mut Vec<String>) -> Result<()> {
    let suite = &run.suite;
    let lab = Lab::build(suite)?;
    let mut wanted = run.wanted.clone();
    // Images of an older Xen are restored beside the scenarios of one host.
    let alone = wanted.iter().any(|scenario| !scenario.two);
    let mut images = match alone {
        true => (&older.usual[..], &older.shadow[..]),
        false => (&[][..], &[][..]),
    };
    if wanted.iter().any(|scenario| scenario.shadow)
        && let Err(error) = shadow::build(&lab, suite)
    {
        let all = wanted.len();
        wanted.retain(|scenario| !scenario.shadow);
        let lost = all - wanted.len();
        bad.push(format!(
            "{suite}: {lost} scenarios cannot be run: {error:#}"
        ));
        images.1 = &[];
    }
    let boots = Boots {
        suite,
        profile: "dev",
        images: images.0,
        shadow_images: images.1,
        to: &run.to,
        to_cpu: run.to_cpu,
        limit,
    };
    let results = boots.run(&lab, &wanted)?;
    if let Err(error) = results.verdict(&lab) {
        bad.push(format!("{suite}: {error:#}"));
    }
    for (out, known) in [
        ("out/images", &mut older.usual),
        ("out-shadow/images", &mut older.shadow),
    ] {
        // The directory does not exist if no image was written.
        known.extend(Some(lab.file(out)).filter(|dir| alone && dir.is_dir()));
    }
    Ok(())
}

/// The record with the results from this machine's labs.
fn merged() -> Result<Record> {
    let mut record = Record::read()?;
    for suite in Lab::suites()? {
        if let Some(lab) = Lab::built(&suite) {
            Boot::recover(&lab)?;
            record.merge(&suite, &lab)?;
        }
    }
    Ok(record)
}

/// Merges the results from this machine's labs, and writes `docs/interop.md`.
pub(super) fn report() -> Result<()> {
    let mut record = merged()?;
    record.find_stale();
    record.write()?;
    let path = document_path();
    std::fs::write(&path, document(&record)?)?;
    println!("{}", path.display());
    Ok(())
}

fn document_path() -> PathBuf {
    workspace::root().join("docs/interop.md")
}

/// All scenarios except those for measurements.
fn scenarios() -> Vec<Scenario> {
    let figures = |scenario: &&Scenario| scenario.kind == "pairs";
    let wanted = SCENARIOS.iter().filter(|scenario| !figures(scenario));
    wanted.copied().collect()
}

/// Generates the document from the record.
fn document(record: &Record) -> Result<String> {
    let columns = record.columns();
    let mut text = HEAD.to_owned();
    text.push_str("\n## Results\n\nThe last run of each: seconds under emulation, commit of the code that ran (`+`: and what was\nnot committed; runs before some time of 2026-11-25 do not say), date. *stale*: the code has changed\nsince then, when this document was made.\n\n| scenario |");
    for (suite, column) in &columns {
        write!(text, " Xen {}, {suite} |", column.xen)?;
    }
    text.push_str(" what it is |\n|---|");
    text.push_str(&"---|".repeat(columns.len() + 1));
    text.push('\n');
    for scenario in scenarios().iter().filter(|scenario| !scenario.two) {
        let mark = if scenario.shadow { " *s*" } else { "" };
        write!(text, "| {}{mark} |", scenario.name())?;
        for (_, column) in &columns {
            write!(text, " {} |", column.cell(&scenario.name()))?;
        }
        writeln!(text, " {} |", scenario.about())?;
    }
    between_hosts(&mut text, &columns)?;
    restored_images(&mut text, &columns)?;
    for (_, column) in &columns {
        if let Some(table) = Figures::of(&column.measures).table()? {
            write!(text, "\n## Time and memory, Xen {}\n\n{table}", column.xen)?;
            for (name, note) in &column.scenarios.0 {
                if name.starts_with("pairs/") {
                    write!(text, "\n{name}: {note}\n")?;
                }
            }
        }
    }
    text.push_str("\n## Versions\n");
    for (suite, column) in &columns {
        writeln!(text, "\nXen {}, {suite}, the newest run:\n", column.xen)?;
        for line in &column.versions {
            writeln!(text, "    {line}")?;
        }
        if let Some(version) = &column.shadow {
            writeln!(text, "    *s*: source of xen {version}")?;
        }
    }
    text.push_str(MISSING);
    Ok(text)
}

/// The results of scenarios between two hosts.
fn between_hosts(text: &mut String, columns: &[(&str, &Suite)]) -> Result<()> {
    text.push_str(
        "\n## Between two hosts\n\nTwo Xens in two machines, with a network, ssh and a shared disk \
         between them. A guest moves live\nfrom the first to the second, counts on there, and \
         moves back if the Xens are the same. Features that the second\nprocessor lacks stand behind its suite.\n\n\
         | scenario | from | to | | what it is |\n|---|---|---|---|---|\n",
    );
    for scenario in scenarios().iter().filter(|scenario| scenario.two) {
        let mark = if scenario.shadow { " *s*" } else { "" };
        let name = scenario.name();
        let mut ran = false;
        for (suite, column) in columns {
            for noted in column.scenarios.0.keys() {
                let note = column.cell(noted);
                if let Some((_, to)) = noted.split_once(TO).filter(|(of, _)| *of == name) {
                    writeln!(
                        text,
                        "| {name}{mark} | {}, {suite} | {to} | {note} | {} |",
                        column.xen,
                        scenario.about()
                    )?;
                    ran = true;
                }
            }
        }
        if !ran {
            writeln!(
                text,
                "| {name}{mark} | | | not run | {} |",
                scenario.about()
            )?;
        }
    }
    Ok(())
}

/// The results for images of older Xens.
fn restored_images(text: &mut String, columns: &[(&str, &Suite)]) -> Result<()> {
    let mut table = String::new();
    for (_, column) in columns {
        for name in column.scenarios.0.keys() {
            let note = column.cell(name);
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
    use crate::lab::results::Notes;

    #[test]
    fn every_scenario_is_in_the_table_whether_it_ran_or_not() {
        let noted = [("stock/pv".to_owned(), "ok, 7 s, 2026-01-02".to_owned())];
        let suite = Suite {
            xen: "4.17".to_owned(),
            versions: vec!["xen-utils-4.17 4.17.7".to_owned()],
            scenarios: Notes(noted.into()),
            ..Suite::default()
        };
        let text = document(&Record([("bookworm".to_owned(), suite)].into())).unwrap();
        assert!(text.contains("| stock/pv | ok, 7 s, 2026-01-02 |"));
        assert!(text.contains("| stock/pvh | not run |"));
        assert!(text.contains("    xen-utils-4.17 4.17.7\n"));
    }

    /// The checked-in files match: the document has no results of its own.
    #[test]
    fn the_document_is_that_of_the_record() {
        let text = std::fs::read_to_string(document_path()).unwrap();
        let made = document(&Record::read().unwrap()).unwrap();
        assert!(
            text == made,
            "docs/interop.md: run `cargo xtask lab report`"
        );
    }
}
