//! Throughput of the command on a mock domain, beside what the sink or source itself
//! gives, in the same run.
//!
//! The machines this runs on are noisy, so each figure is a median of rounds in which
//! all the commands of a group take turns.

mod convert;
mod live;
pub(crate) mod measure;
mod remus;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::bench::measure::{Usage, measure};
use crate::command::Invocation;
use crate::spread::Spread;
use crate::workspace;

/// Measure throughput and memory, beside plain copies of the same bytes
///
/// Builds the release binary, makes a mock domain of each kind and takes turns at
/// saving, restoring and verifying it and at moving the same bytes with cat or dd. A
/// restore's limit is a read from the same source and a write into a fresh file. Prints a
/// table, in Markdown, with medians and ranges; docs/performance.md says what it means.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench                        1 GiB domains, 7 rounds: some five minutes
  cargo xtask bench --memory 256 --rounds 3
  cargo xtask bench --dir /var/tmp         on a disk instead of in memory
  cargo xtask bench --micro                the format alone, in memory (criterion)
  cargo xtask bench --convert --memory 256 --rounds 3
  cargo xtask bench --remus --memory 256
  cargo xtask bench --live --memory 512    live migrations in the library: some ten minutes
  cargo xtask bench --live --memory 512 --plot docs/downtime.svg")]
pub(crate) struct BenchArgs {
    /// MiB of memory of each domain
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u64,
    /// Rounds; each figure is the median of as many measurements
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Where hosts and images are kept
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    dir: PathBuf,
    /// Only the benchmarks of the format, in memory
    #[arg(long)]
    micro: bool,
    /// Only the library: saves and restores with 1 and 2 threads, and live migrations with
    /// both precopy policies at several dirty rates
    #[arg(long, conflicts_with = "micro")]
    live: bool,
    /// Only the conversion of a legacy image, beside Xen's script (where `cargo xtask
    /// peer-tools` has fetched it) and cp
    #[arg(long, conflicts_with_all = ["micro", "live"])]
    convert: bool,
    /// Only Remus: the pause per checkpoint against dirty rate
    #[arg(long, conflicts_with_all = ["micro", "live", "convert"])]
    remus: bool,
    /// Downtime that the target policy aims at, with --live
    #[arg(long, value_name = "MS", default_value_t = 100)]
    target: u64,
    /// Where to draw downtime against dirty rate, with --live
    #[arg(long, value_name = "FILE.svg", requires = "live")]
    plot: Option<PathBuf>,
}

/// One command of a group.
struct Row {
    what: String,
    command: String,
    /// Which row of the group is its limit: 100 %.
    limit: Option<usize>,
    /// Run, not measured, after each measurement.
    after: Option<String>,
    used: Vec<Usage>,
}

impl Row {
    fn new(what: &str, command: String, limit: Option<usize>) -> Self {
        Self {
            what: what.to_owned(),
            command,
            limit,
            after: None,
            used: Vec::new(),
        }
    }

    fn after(self, command: String) -> Self {
        Self {
            after: Some(command),
            ..self
        }
    }

    fn spread(&self, figure: impl Fn(&Usage) -> f64) -> Spread {
        Spread::of(self.used.iter().map(figure))
    }

    fn median(&self, figure: impl Fn(&Usage) -> f64) -> f64 {
        self.spread(figure).median
    }

    fn seconds(&self) -> f64 {
        self.median(|usage| usage.seconds)
    }
}

/// Run it.
///
/// # Errors
///
/// A command fails; the directory cannot be used.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    if args.micro {
        return Invocation::cargo()
            .args(["bench", "-p", "xsr-format"])
            .run();
    }
    if args.live {
        return live::run(args.memory, args.rounds, args.target, args.plot.as_deref());
    }
    Invocation::cargo()
        .args(["build", "--release", "-p", "xsr"])
        .run()?;
    let xsr = workspace::root().join("target/release/xsr");
    let scratch = args.dir.join(format!("xsr-bench-{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    let report = match args.convert {
        true => convert::run(&xsr, &scratch, args.memory, args.rounds),
        false if args.remus => remus::run(&xsr, &scratch, args.memory),
        false => kinds(args, &xsr, &scratch),
    };
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot clear {}", scratch.display()))?;
    println!("{}", report?);
    Ok(())
}

fn kinds(args: &BenchArgs, xsr: &Path, scratch: &Path) -> Result<String> {
    let mut report = format!(
        "{} MiB domains in {}, medians of {} rounds\n",
        args.memory,
        args.dir.display(),
        args.rounds
    );
    for kind in ["pvh", "pv"] {
        let bench = Bench {
            xsr: quoted(xsr)?,
            dir: quoted(scratch)?,
            kind,
        };
        shell(&format!(
            "{} mock create guest --host {}/{kind} --type {kind} --memory {}M --vcpus 2",
            bench.xsr, bench.dir, args.memory
        ))?;
        // The bytes that everything is measured with.
        shell(&bench.save("image"))?;
        let bytes = fs::metadata(scratch.join("image"))?.len();
        let mut rows = bench.rows();
        for round in 0..args.rounds {
            eprintln!("{kind}: round {} of {}", round + 1, args.rounds);
            for row in &mut rows {
                row.used.push(measure(&row.command)?);
                if let Some(command) = &row.after {
                    shell(command)?;
                }
            }
        }
        table(&mut report, kind, bytes, &rows)?;
    }
    Ok(report)
}

/// A path for the shell.
fn quoted(path: &Path) -> Result<String> {
    match path.to_str() {
        Some(text) if !text.contains('\'') => Ok(format!("'{text}'")),
        _ => bail!("{} has a name the shell cannot be given", path.display()),
    }
}

fn shell(command: &str) -> Result<()> {
    Invocation::new("sh").args(["-c", command]).run()
}

struct Bench {
    xsr: String,
    dir: String,
    kind: &'static str,
}

impl Bench {
    fn save(&self, to: &str) -> String {
        let Self { xsr, dir, kind } = self;
        let to = match to {
            "-" => "-".to_owned(),
            name => format!("{dir}/{name}"),
        };
        format!("{xsr} --quiet save -c --backend mock:{dir}/{kind} guest {to}")
    }

    fn rows(&self) -> Vec<Row> {
        let Self { xsr, dir, .. } = self;
        let image = format!("{dir}/image");
        let remove = format!("rm -rf {dir}/copy {dir}/new");
        let restore = format!("{xsr} --quiet restore --backend mock:{dir}/new");
        vec![
            Row::new(
                "write to a file: cat",
                format!("cat {image} >{dir}/copy"),
                None,
            )
            .after(remove.clone()),
            Row::new("save to a file", self.save("copy"), Some(0)).after(remove.clone()),
            Row::new(
                "through a pipe: cat",
                format!("cat {image} | cat >/dev/null"),
                None,
            ),
            Row::new(
                "save to a pipe",
                format!("{} | cat >/dev/null", self.save("-")),
                Some(2),
            ),
            Row::new(
                "save to /dev/null",
                format!("{} >/dev/null", self.save("-")),
                None,
            ),
            Row::new("read a file: cat", format!("cat {image} >/dev/null"), None),
            // Not cat, which has the kernel copy from file to file.
            Row::new(
                "read a file and write: dd",
                format!("dd if={image} of={dir}/copy bs=128K status=none"),
                None,
            )
            .after(remove.clone()),
            Row::new("restore from a file", format!("{restore} {image}"), Some(6))
                .after(remove.clone()),
            Row::new(
                "read a pipe and write: cat",
                format!("cat {image} | cat >{dir}/copy"),
                None,
            )
            .after(remove.clone()),
            Row::new(
                "restore from a pipe",
                format!("cat {image} | {restore} -"),
                Some(8),
            )
            .after(remove),
            Row::new(
                "verify a file",
                format!("{xsr} --quiet verify {image}"),
                Some(5),
            ),
            Row::new(
                "verify a pipe",
                format!("cat {image} | {xsr} --quiet verify -"),
                Some(2),
            ),
        ]
    }
}

fn table(out: &mut String, kind: &str, bytes: u64, rows: &[Row]) -> Result<()> {
    let gib = bytes_in_gib(bytes);
    writeln!(out, "\n### {kind}: image of {bytes} bytes\n")?;
    writeln!(
        out,
        "| what | median s | range s | GiB/s | of the limit | CPU s | peak MiB |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|")?;
    for row in rows {
        let Spread {
            least: low,
            most: high,
            ..
        } = row.spread(|usage| usage.seconds);
        let limit = row.limit.and_then(|limit| rows.get(limit));
        let share = limit.map_or_else(String::new, |limit| {
            format!("{:.0} %", 100.0 * limit.seconds() / row.seconds())
        });
        let peak = row
            .used
            .iter()
            .map(|usage| usage.peak_kib)
            .max()
            .unwrap_or(0);
        writeln!(
            out,
            "| {} | {:.3} | {low:.3}–{high:.3} | {:.2} | {share} | {:.3} | {} |",
            row.what,
            row.seconds(),
            gib / row.seconds(),
            row.median(|usage| usage.cpu_seconds),
            peak / 1024,
        )?;
    }
    Ok(())
}

fn bytes_in_gib(bytes: u64) -> f64 {
    let mib = u32::try_from(bytes >> 20).unwrap_or(u32::MAX);
    f64::from(mib) / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one_and_the_limit_is_a_share() {
        let used = |seconds| Usage {
            seconds,
            cpu_seconds: 0.1,
            peak_kib: 2048,
        };
        let mut limit = Row::new("limit", String::new(), None);
        limit.used = [1.0, 3.0, 2.0].map(used).to_vec();
        let mut row = Row::new("row", String::new(), Some(0));
        row.used = [4.0, 4.0, 40.0].map(used).to_vec();
        let mut out = String::new();
        table(&mut out, "pvh", 4 << 30, &[limit, row]).unwrap();
        assert!(
            out.contains("| limit | 2.000 | 1.000–3.000 | 2.00 |  | 0.100 | 2 |"),
            "{out}"
        );
        assert!(
            out.contains("| row | 4.000 | 4.000–40.000 | 1.00 | 50 % |"),
            "{out}"
        );
    }

    #[test]
    fn a_path_is_quoted_or_refused() {
        assert_eq!(quoted(Path::new("/a b")).unwrap(), "'/a b'");
        assert!(quoted(Path::new("/it's")).is_err());
    }
}
