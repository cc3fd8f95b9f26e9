//! Saves, restores and live migrations in the library: runs the benchmark `live` of
//! `save-restore` and makes tables of what it prints, and a plot.

mod plot;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::command::Invocation;
use crate::spread::Spread;

/// One measurement, as the benchmark prints it.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Migration(Migration),
    Transfer(Transfer),
}

/// A live migration.
#[derive(Clone, Debug, Deserialize)]
struct Migration {
    guest: String,
    policy: String,
    /// What the dirty rate was to be, as a share of what the way takes.
    share: f64,
    /// Pages the guest wrote.
    dirty_pages_per_second: f64,
    /// Pages that went while it ran.
    pages_per_second: f64,
    passes: f64,
    total_ms: f64,
    /// From the request to suspend until the guest may run on the other side.
    downtime_ms: f64,
}

/// A save or a restore that is not live.
#[derive(Clone, Debug, Deserialize)]
struct Transfer {
    what: String,
    guest: String,
    threads: u32,
    bytes: f64,
    ms: f64,
}

/// Run it and print the report; the plot goes into `plot`.
///
/// # Errors
///
/// The benchmark fails, or `plot` cannot be written.
pub(super) fn run(memory: u64, rounds: u32, target_ms: u64, plot: Option<&Path>) -> Result<()> {
    let output = Invocation::cargo()
        .args(["bench", "-p", "xsr-save-restore", "--bench", "live", "--"])
        .args(["--memory", &memory.to_string()])
        .args(["--rounds", &rounds.to_string()])
        .args(["--target", &target_ms.to_string()])
        .into_command()
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the benchmark failed: {}", output.status);
    }
    let text = String::from_utf8(output.stdout).context("the benchmark wrote no UTF-8")?;
    let (migrations, transfers) = parse(&text)?;
    println!("{memory} MiB domains, medians of {rounds} runs or more, target {target_ms} ms\n");
    println!("{}", transfer_table(&transfers)?);
    println!("{}", migration_tables(&migrations, target_ms)?);
    if let Some(path) = plot {
        let svg = plot::downtime(&points(&migrations), target_ms);
        fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("plot: {}", path.display());
    }
    Ok(())
}

fn parse(text: &str) -> Result<(Vec<Migration>, Vec<Transfer>)> {
    let (mut migrations, mut transfers) = (Vec::new(), Vec::new());
    for line in text.lines().filter(|line| line.starts_with('{')) {
        match serde_json::from_str(line).with_context(|| format!("not understood: {line}"))? {
            Line::Migration(migration) => migrations.push(migration),
            Line::Transfer(transfer) => transfers.push(transfer),
        }
    }
    Ok((migrations, transfers))
}

fn transfer_table(transfers: &[Transfer]) -> Result<String> {
    let mut groups: BTreeMap<(&str, &str, u32), Vec<&Transfer>> = BTreeMap::new();
    for transfer in transfers {
        let key = (&*transfer.guest, &*transfer.what, transfer.threads);
        groups.entry(key).or_default().push(transfer);
    }
    let mut table = String::new();
    writeln!(
        table,
        "| guest | what | threads | median ms | range ms | GiB/s |"
    )?;
    writeln!(table, "|---|---|---|---|---|---|")?;
    for ((guest, what, threads), group) in groups {
        let time = Spread::of(group.iter().map(|transfer| transfer.ms));
        let rate = Spread::of(
            group
                .iter()
                .map(|transfer| transfer.bytes / transfer.ms * 1000.0 / f64::from(1 << 30)),
        );
        writeln!(
            table,
            "| {guest} | {what} | {threads} | {:.0} | {:.0}–{:.0} | {:.2} |",
            time.median, time.least, time.most, rate.median
        )?;
    }
    Ok(table)
}

/// Guest, policy, and the share in thousandths: what is drawn and told together.
type Key = (String, String, u64);

fn groups(migrations: &[Migration]) -> BTreeMap<Key, Vec<&Migration>> {
    let mut groups: BTreeMap<Key, Vec<&Migration>> = BTreeMap::new();
    for migration in migrations {
        let share = format!("{:.0}", migration.share * 1000.0);
        let share = share.parse().unwrap_or(u64::MAX);
        let key = (migration.guest.clone(), migration.policy.clone(), share);
        groups.entry(key).or_default().push(migration);
    }
    groups
}

fn migration_tables(migrations: &[Migration], target_ms: u64) -> Result<String> {
    let mut table = String::new();
    writeln!(
        table,
        "| guest | policy | dirty pages/s | of the bandwidth | downtime ms | range ms | total ms | range ms | passes |"
    )?;
    writeln!(table, "|---|---|---|---|---|---|---|---|---|")?;
    for ((guest, policy, _), group) in groups(migrations) {
        let of = |figure: fn(&Migration) -> f64| Spread::of(group.iter().map(|m| figure(m)));
        let rate = of(|m| m.dirty_pages_per_second);
        let share = of(|m| 100.0 * m.dirty_pages_per_second / m.pages_per_second);
        let (down, total) = (of(|m| m.downtime_ms), of(|m| m.total_ms));
        writeln!(
            table,
            "| {guest} | {policy} | {:.0} | {:.0} % | {:.1} | {:.1}–{:.1} | {:.0} | {:.0}–{:.0} | {:.0} |",
            rate.median,
            share.median,
            down.median,
            down.least,
            down.most,
            total.median,
            total.least,
            total.most,
            of(|m| m.passes).median,
        )?;
    }
    let (met, runs) = met(migrations, target_ms);
    writeln!(
        table,
        "\nThe target policy met {target_ms} ms in {met} of {runs} runs in which the dirty rate was below the bandwidth ({}).",
        percent(met, runs)
    )?;
    Ok(table)
}

/// Of the runs of the target policy in which the guest wrote less than went: how many
/// met the target, and how many there were.
fn met(migrations: &[Migration], target_ms: u64) -> (u32, u32) {
    let target = f64::from(u32::try_from(target_ms).unwrap_or(u32::MAX));
    let below = migrations
        .iter()
        .filter(|m| m.policy == "target" && m.dirty_pages_per_second < m.pages_per_second);
    below.fold((0, 0), |(met, runs), migration| {
        (met + u32::from(migration.downtime_ms <= target), runs + 1)
    })
}

fn percent(part: u32, whole: u32) -> String {
    match whole {
        0 => "there were none".to_owned(),
        whole => format!("{:.1} %", 100.0 * f64::from(part) / f64::from(whole)),
    }
}

/// What to draw: for each guest and policy, pages per second and downtime.
fn points(migrations: &[Migration]) -> Vec<plot::Series> {
    let mut series: Vec<plot::Series> = Vec::new();
    for ((guest, policy, _), group) in groups(migrations) {
        let name = format!("{guest}, {policy}");
        let rate = Spread::of(group.iter().map(|m| m.dirty_pages_per_second)).median;
        let point = plot::Point {
            rate,
            downtime: Spread::of(group.iter().map(|m| m.downtime_ms)),
        };
        match series.last_mut().filter(|last| last.name == name) {
            Some(last) => last.points.push(point),
            None => series.push(plot::Series {
                name,
                points: vec![point],
            }),
        }
    }
    series
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = r#"
{"what":"save to a pipe","guest":"pvh","threads":2,"bytes":1073741824,"ms":500.0}
{"what":"save to a pipe","guest":"pvh","threads":2,"bytes":1073741824,"ms":1000.0}
{"what":"save to a pipe","guest":"pvh","threads":2,"bytes":1073741824,"ms":2000.0}
{"what":"migration","guest":"pv","policy":"target","share":0.02,"dirty_pages_per_second":100,"pages_per_second":1000,"passes":2,"pages":9,"total_ms":900.0,"downtime_ms":50.0,"suspended_ms":49.0}
{"what":"migration","guest":"pv","policy":"target","share":0.02,"dirty_pages_per_second":100,"pages_per_second":1000,"passes":4,"pages":9,"total_ms":700.0,"downtime_ms":101.0,"suspended_ms":49.0}
{"what":"migration","guest":"pv","policy":"target","share":1.2,"dirty_pages_per_second":1200,"pages_per_second":1000,"passes":9,"pages":9,"total_ms":9000.0,"downtime_ms":500.0,"suspended_ms":49.0}
{"what":"migration","guest":"pv","policy":"xen","share":0.02,"dirty_pages_per_second":100,"pages_per_second":1000,"passes":5,"pages":9,"total_ms":800.0,"downtime_ms":7.0,"suspended_ms":6.0}
"#;

    #[test]
    fn figures_become_medians_ranges_and_the_share_that_met_the_target() {
        let (migrations, transfers) = parse(LINES).unwrap();
        let table = transfer_table(&transfers).unwrap();
        assert!(
            table.contains("| pvh | save to a pipe | 2 | 1000 | 500–2000 | 1.00 |"),
            "{table}"
        );
        let table = migration_tables(&migrations, 100).unwrap();
        assert!(
            table.contains("| pv | target | 100 | 10 % | 101.0 | 50.0–101.0 | 900 | 700–900 | 4 |"),
            "{table}"
        );
        // The one above the bandwidth does not count, nor does Xen's policy.
        assert!(table.contains("met 100 ms in 1 of 2 runs"), "{table}");
        assert!(table.contains("(50.0 %)"), "{table}");
    }

    #[test]
    fn every_measurement_is_in_the_plot() {
        let (migrations, _) = parse(LINES).unwrap();
        let svg = plot::downtime(&points(&migrations), 100);
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
        assert_eq!(svg.matches("<circle").count(), 3, "{svg}");
        assert!(
            svg.contains("pv, target") && svg.contains("pv, xen"),
            "{svg}"
        );
    }

    #[test]
    fn a_line_that_is_no_measurement_is_an_error() {
        assert!(parse("{\"what\":\"migration\"}").is_err());
        assert!(parse("Compiling\n").unwrap().0.is_empty());
    }
}
