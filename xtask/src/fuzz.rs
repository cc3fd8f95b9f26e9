//! Fuzzing with cargo-fuzz on a stable toolchain.
//!
//! The targets are a separate workspace below `fuzz/`. libFuzzer needs compiler options that a
//! stable compiler only accepts when told to act as an unstable one (`RUSTC_BOOTSTRAP`), and a C++
//! compiler for libFuzzer itself.

mod seed;
mod stats;
mod wrapped;

use std::io::{BufRead, BufReader, Write};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::{fs, thread};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum};

use crate::command::Invocation;
use crate::stages::Outcome;
use crate::{tools, workspace};

use stats::Stats;

/// What `cargo xtask ci` runs of each target. A fixed seed and number, so that the same code is
/// tried with much the same inputs each time and what fails was broken by the change;
/// `cargo xtask fuzz` looks for what has not been found. The seconds are for a target that is slow.
const SMOKE: Bounds = Bounds {
    seconds: 20,
    runs: Some(10_000),
    seed: Some(1),
};

/// An input that takes longer than this many seconds is a finding.
const INPUT_SECONDS: u32 = 10;

/// An allocation of more MiB than this is a finding: the largest window that a decompressor may
/// request is 128 MiB, and nothing else requests as much.
const ALLOCATION_MIB: u32 = 160;

/// Fuzz one of the targets below fuzz/
///
/// Starts from the corpus of earlier runs and from seeds cut out of real images. Prints executions,
/// coverage and speed at the end. A crash, a hang or too much memory is a failure, and the input is
/// kept below fuzz/artifacts.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask fuzz --list
  cargo xtask fuzz libxc_reader --seconds 600
  cargo xtask fuzz libxc_reader --input fuzz/artifacts/libxc_reader/crash-…")]
pub(crate) struct FuzzArgs {
    /// The target
    #[arg(required_unless_present = "list")]
    target: Option<String>,
    /// List the targets
    #[arg(long, conflicts_with = "target")]
    list: bool,
    /// Seconds to run
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Number of processes; they share what they find
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    jobs: u32,
    /// Choose the inputs by this number [default: another one each time]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    seed: Option<u32>,
    /// Run only this input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seconds", "jobs", "seed"])]
    input: Option<PathBuf>,
    /// Sanitizer for the target [default: address if the toolchain has it]
    #[arg(long)]
    sanitizer: Option<Sanitizer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sanitizer {
    /// Finds misuse of memory; about half the speed
    Address,
    /// Finds panics, hangs and excessive allocation
    None,
}

/// The manifest of the fuzz targets' workspace.
pub(crate) fn manifest() -> PathBuf {
    directory().join("Cargo.toml")
}

fn directory() -> PathBuf {
    workspace::root().join("fuzz")
}

/// Runs the task.
///
/// # Errors
///
/// The target cannot be built, or something was found.
pub(crate) fn run(args: &FuzzArgs) -> Result<()> {
    let known = targets()?;
    let Some(target) = &args.target else {
        for target in known {
            println!("{target}");
        }
        return Ok(());
    };
    ensure!(
        known.contains(target),
        "there is no fuzz target {target}; there are: {}",
        known.join(", ")
    );
    let fuzzer = Fuzzer::new(args.sanitizer)?;
    match &args.input {
        Some(input) => {
            let input = fs::canonicalize(input)
                .with_context(|| format!("cannot find {}", input.display()))?;
            fuzzer.invocation("run", target).arg(input).run()
        }
        None => {
            fuzzer.prepare(target)?;
            let bounds = Bounds {
                seconds: args.seconds,
                runs: None,
                seed: args.seed,
            };
            fuzzer.run(target, bounds, args.jobs)
        }
    }
}

/// Runs each target for some seconds.
///
/// # Errors
///
/// A target cannot be built, or something was found.
pub(crate) fn smoke() -> Result<Outcome> {
    if !Invocation::new("c++").arg("--version").succeeds() {
        let why = "libFuzzer needs a C++ compiler: install g++";
        return Ok(Outcome::Skipped(why.to_owned()));
    }
    let fuzzer = Fuzzer::new(None)?;
    let targets = targets()?;
    for target in &targets {
        fuzzer.prepare(target)?;
    }
    // A fuzzing process uses one processor.
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let queue = Mutex::new(targets.into_iter());
    let next = || queue.lock().ok()?.next();
    thread::scope(|scope| {
        let work = || -> Result<()> {
            while let Some(target) = next() {
                fuzzer.run(&target, SMOKE, 1)?;
            }
            Ok(())
        };
        let workers: Vec<_> = (0..processors).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            let ended = worker.join();
            ended.map_err(|_| anyhow!("a fuzzing thread died"))?
        })
    })?;
    Ok(Outcome::Done)
}

fn targets() -> Result<Vec<String>> {
    let mut targets: Vec<String> = workspace::packages(&manifest())?
        .into_iter()
        .flat_map(|package| package.targets)
        .filter(|target| target.kind.iter().any(|kind| kind == "bin"))
        .map(|target| target.name)
        .collect();
    targets.sort();
    Ok(targets)
}

/// The directory with the target's inputs.
fn corpus(target: &str) -> PathBuf {
    directory().join("corpus").join(target)
}

/// How long a target is run, and with which inputs.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Seconds at most.
    seconds: u32,
    /// Inputs at most.
    runs: Option<u32>,
    /// What the inputs are made from; different ones each time without it.
    seed: Option<u32>,
}

struct Fuzzer {
    program: PathBuf,
    sanitizer: Sanitizer,
}

impl Fuzzer {
    fn new(sanitizer: Option<Sanitizer>) -> Result<Self> {
        let sanitizer = match sanitizer {
            Some(chosen) => chosen,
            None if has_address_sanitizer()? => Sanitizer::Address,
            None => {
                eprintln!("this toolchain has no address sanitizer: fuzzing without one");
                Sanitizer::None
            }
        };
        Ok(Self {
            program: tools::CARGO_FUZZ.find_or_install()?,
            sanitizer,
        })
    }

    /// `cargo fuzz TASK TARGET`.
    fn invocation(&self, task: &str, target: &str) -> Invocation {
        let sanitizer = match self.sanitizer {
            Sanitizer::Address => "address",
            Sanitizer::None => "none",
        };
        Invocation::new(&self.program)
            .env("RUSTC_BOOTSTRAP", "1")
            // It reports a finding as an error of its own, with a backtrace of itself.
            .env("RUST_LIB_BACKTRACE", "0")
            .args(["fuzz", task, "--fuzz-dir", "fuzz"])
            .args(["--sanitizer", sanitizer, target])
    }

    /// Writes the seeds and builds the target.
    fn prepare(&self, target: &str) -> Result<()> {
        let corpus = corpus(target);
        let seeds = seed::write(&corpus)?;
        let made = wrapped::write(target, &corpus)?;
        eprintln!("{target}: {seeds} seeds from real images, {made} made");
        self.invocation("build", target).run()
    }

    fn run(&self, target: &str, bounds: Bounds, jobs: u32) -> Result<()> {
        let corpus = corpus(target);
        let logs = workspace::root().join("target/fuzz");
        fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        let mut runs = Vec::new();
        for job in 0..jobs {
            let mut command = self
                .invocation("run", target)
                .arg(&corpus)
                .arg("--")
                .arg(format!("-max_total_time={}", bounds.seconds))
                // To libFuzzer, -1 is no limit.
                .arg(format!("-runs={}", bounds.runs.map_or(-1, i64::from)))
                .arg(format!("-timeout={INPUT_SECONDS}"))
                .arg(format!("-malloc_limit_mb={ALLOCATION_MIB}"))
                .args(["-print_final_stats=1", "-rss_limit_mb=2048"])
                // To libFuzzer, 0 is another number each time.
                .arg(format!(
                    "-seed={}",
                    bounds.seed.map_or(0, |seed| seed.saturating_add(job))
                ))
                .into_command();
            let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
            let child = child.with_context(|| format!("cannot start {command:?}"))?;
            let log = logs.join(format!("{target}-{job}.log"));
            let label = match jobs {
                1 => target.to_owned(),
                _ => format!("{target} {job}"),
            };
            runs.push(thread::spawn(move || watch(child, &label, &log)));
        }

        let mut total = Stats::default();
        let mut failure = None;
        for run in runs {
            match run.join().map_err(|_| anyhow!("a watching thread died"))? {
                Ok(stats) => total.add(&stats),
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            None => {
                println!("{target}: {total}");
                Ok(())
            }
            Some(error) => Err(error.context(format!("fuzz target {target}"))),
        }
    }
}

/// Follows one fuzzing process: all its output goes to `log`, progress and findings also to the
/// terminal.
fn watch(mut child: Child, label: &str, log: &Path) -> Result<Stats> {
    let name = log.display().to_string();
    let mut file = fs::File::create(log).with_context(|| format!("cannot write {name}"))?;
    let stderr = child.stderr.take().context("no pipe to the fuzzer")?;
    let mut said = String::new();
    let mut found = false;
    for line in BufReader::new(stderr).split(b'\n') {
        // Inputs are printed, and need not be text.
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(file, "{line}").with_context(|| format!("cannot write {name}"))?;
        found |= line.contains("panicked at") || line.contains("ERROR:");
        if found || stats::is_pulse(&line) {
            // An input may be printed as a single line of a hundred thousand characters.
            eprintln!("[{label}] {line:.200}");
        }
        said.push_str(&line);
        said.push('\n');
    }
    let status = child.wait()?;
    if !status.success() {
        match found {
            true => bail!(
                "an input fails: it is below fuzz/artifacts, `--input FILE` runs it again, \
                 and its output is in {name}"
            ),
            false => bail!("the fuzzer failed ({status}); what it said is in {name}"),
        }
    }
    Stats::parse(&said).with_context(|| format!("no statistics in {name}"))
}

/// Whether the toolchain ships the run-time library of the address sanitizer.
fn has_address_sanitizer() -> Result<bool> {
    let libraries = Invocation::new("rustc")
        .args(["--print", "target-libdir"])
        .capture()?;
    let entries = fs::read_dir(libraries.trim())
        .with_context(|| format!("cannot list {}", libraries.trim()))?;
    for entry in entries {
        let name = entry?.file_name();
        if name.to_string_lossy().ends_with("_rt.asan.a") {
            return Ok(true);
        }
    }
    Ok(false)
}
