//! Benchmarks of Xen's engine and ours at the same work on equal mock machines, in pairs: the
//! common parts of measuring throughput and downtime.
//!
//! Each run is a separate process (`xsr-peer-run`), which acts as libxl for one helper and reports
//! the costs. Our helper accesses its machine through hypercalls here, like stock.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::plot::{self, Group};
use super::{downtime, engine, throughput};

/// Options of the benchmarks.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// MiB of memory of each domain
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u64,
    /// Rounds, each with one run of every contender
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Only these kinds of guest: pv, pv32, pvh, hvm
    #[arg(long = "kind", value_name = "KIND")]
    kinds: Vec<String>,
    /// Directory for machines and images
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    dir: PathBuf,
    /// Migrate live, with guests that write at three rates, and measure how long they are paused
    #[arg(long)]
    downtime: bool,
    /// File for a plot of throughput, or downtime
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

impl BenchArgs {
    /// Settings that only show that it works.
    pub(super) fn smoke(downtime: bool) -> Self {
        Self {
            downtime,
            memory: 16,
            pairs: 1,
            kinds: Vec::new(),
            dir: PathBuf::new(),
            plot: None,
        }
    }

    fn kinds(&self) -> Vec<String> {
        match self.kinds.as_slice() {
            [] => KINDS.map(str::to_owned).to_vec(),
            some => some.to_vec(),
        }
    }
}

/// The kinds of guest.
const KINDS: [&str; 4] = ["pv", "pv32", "pvh", "hvm"];

/// A contender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Contender {
    pub(super) name: &'static str,
    /// Its name for `xsr-peer-run`.
    pub(super) whose: &'static str,
    pub(super) threads: &'static str,
}

pub(super) const CONTENDERS: [Contender; 4] = [
    Contender {
        name: "stock",
        whose: "stock",
        threads: "1",
    },
    Contender {
        name: "ours, 1 thread",
        whose: "ours",
        threads: "1",
    },
    Contender {
        name: "ours, 2 threads",
        whose: "ours",
        threads: "2",
    },
    Contender {
        name: "cat",
        whose: "cat",
        threads: "1",
    },
];

/// Builds, measures, and prints.
///
/// # Errors
///
/// Something does not build, a run fails, or the plot cannot be written.
pub(super) fn run(args: &BenchArgs, packages: &Path) -> Result<()> {
    let environment = engine::build(packages)?;
    let runner = engine::runner()?;
    let within = match args.dir.as_os_str().is_empty() {
        true => std::env::temp_dir(),
        false => args.dir.clone(),
    };
    let scratch = within.join(format!("xsr-peer-bench-{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    let runner = Runner {
        program: &runner,
        environment: &environment,
        dir: &scratch,
    };
    let measured = match args.downtime {
        true => downtimes(args, &runner),
        false => throughputs(args, &runner),
    };
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot clear {}", scratch.display()))?;
    let (text, plot) = measured?;
    println!(
        "{} MiB domains, medians of {} rounds and ranges\n{text}",
        args.memory, args.pairs
    );
    if let Some(path) = &args.plot {
        fs::write(path, plot).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("plot: {}", path.display());
    }
    Ok(())
}

/// Runs single tasks, each in a separate process.
#[derive(Debug)]
pub(super) struct Runner<'a> {
    program: &'a Path,
    environment: &'a [(&'static str, OsString)],
    /// Directory for machines and images.
    pub(super) dir: &'a Path,
}

impl Runner<'_> {
    /// Runs a task and returns its output.
    ///
    /// # Errors
    ///
    /// The task fails.
    pub(super) fn task<A: AsRef<OsStr>>(
        &self,
        threads: &str,
        words: impl IntoIterator<Item = A>,
    ) -> Result<String> {
        let mut command = Command::new(self.program);
        command.args(words).env("XSR_THREADS", threads);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let output = command.stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("{command:?} failed: {}", output.status);
        }
        String::from_utf8(output.stdout).context("the runner wrote no UTF-8")
    }
}

/// Measures throughput. Returns the report and the plot.
fn throughputs(args: &BenchArgs, runner: &Runner<'_>) -> Result<(String, String)> {
    let (mut text, mut groups) = (String::new(), Vec::new());
    for kind in args.kinds() {
        let report = throughput::run(runner, &kind, args.memory, args.pairs)?;
        throughput::table(&mut text, &report)?;
        groups.extend(report.groups());
    }
    let title = "Throughput of saves and restores: Xen's helper, ours, and cat";
    Ok((text, plot::bars(title, "GiB/s", &groups)))
}

/// Measures live migrations. Returns the report and the plot.
fn downtimes(args: &BenchArgs, runner: &Runner<'_>) -> Result<(String, String)> {
    let mut rows = Vec::new();
    for kind in args.kinds() {
        rows.extend(downtime::run(runner, &kind, args.memory, args.pairs)?);
    }
    let mut text = String::new();
    downtime::table(&mut text, &rows)?;
    let groups: Vec<Group> = rows.iter().map(downtime::Row::group).collect();
    let title = "Downtime of live migrations: Xen's helpers, and ours";
    Ok((text, plot::bars(title, "ms", &groups)))
}
