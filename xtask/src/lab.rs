//! The lab: a real Xen with its dom0 and toolstack, booted under qemu's software emulation on any
//! Linux machine, for running scenarios.
//!
//! Everything in it comes from Debian packages, downloaded with a private apt state and unpacked
//! below `target/lab`. Nothing is installed, and no maintainer script runs. The guests and the
//! scripts of dom0 are in `xtask/lab`. Our own binaries are static, so one build runs in every
//! suite's dom0.

mod apt;
mod build;
mod cells;
mod figures;
mod host;
mod kernel;
mod matrix;
mod qemu;
mod record;
mod results;
mod scenario;
mod shadow;
mod share;

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::{Args, Subcommand};

use crate::dist;
use crate::lab::build::Lab;
use crate::lab::results::{Boot, Results};
use crate::lab::scenario::{SCENARIOS, Scenario};
use crate::lab::share::Role;
use crate::stages::Outcome;

/// The suite of the oldest Xen in the lab.
const OLDEST: &str = "bookworm";

/// Boot a real Xen under qemu and run scenarios in it
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask lab build                       download and unpack Xen, dom0, qemu's guests
  cargo xtask lab build --shadow              with the hypervisor for live PV and 32-bit PV
  cargo xtask lab run                         the smoke scenarios
  cargo xtask lab run pvh                     all scenarios of one guest
  cargo xtask lab run --suite trixie stock    one kind of scenario, on another Xen
  cargo xtask lab run two_xsr --to trixie     between two hosts, from 4.17 to 4.20
  cargo xtask lab matrix --dry-run            list what has to run again, and how long it takes
  cargo xtask lab matrix                      run that on each Xen, and update docs/interop.md
  cargo xtask lab list                        list the scenarios

The lab needs some programs that Debian packages; `lab build` lists the missing ones.")]
pub(crate) struct LabArgs {
    #[command(subcommand)]
    task: LabTask,
}

#[derive(Debug, Subcommand)]
enum LabTask {
    /// Download and unpack what the lab boots
    Build(BuildArgs),
    /// Run scenarios in the lab, building it first if necessary
    Run(RunArgs),
    /// Run each combination without a current good result; write docs/interop.md
    ///
    /// A result is no longer current if the code that the scenario runs has changed. To resume an
    /// interrupted run, run the command again.
    Matrix(MatrixArgs),
    /// Merge the last run of each scenario into docs/interop.json; write docs/interop.md
    Report,
    /// List the scenarios
    List,
}

/// The suites and scenarios to run.
#[derive(Debug, Args)]
struct MatrixArgs {
    /// Debian suites, the oldest Xen first
    #[arg(long = "suite", value_name = "SUITE", default_values = ["bookworm", "trixie"])]
    suites: Vec<String>,
    /// Also run combinations with a current good result
    #[arg(long)]
    all: bool,
    /// Only print what would run, and how long it would take
    #[arg(long)]
    dry_run: bool,
    /// Kinds, guests, or KIND/GUEST; all if omitted
    scenarios: Vec<String>,
    /// Give up on a boot after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 7200)]
    limit: u64,
}

/// The lab to use.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// Debian suite that provides Xen, kernel and toolstack
    #[arg(long, default_value = OLDEST)]
    suite: String,
    /// Also build a hypervisor with shadow paging and 32-bit PV (it is built anyway if a scenario
    /// needs it); `run --images` restores on it
    #[arg(long)]
    shadow: bool,
    /// Rebuild it from this source of Xen (xen_VERSION.orig.tar.*), if the archive does not have
    /// the suite's (`build` only)
    #[arg(long, value_name = "FILE", requires = "shadow")]
    source: Option<PathBuf>,
}

/// What to run, and where.
#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    build: BuildArgs,
    /// Optimise our binaries (for measurements)
    #[arg(long)]
    release: bool,
    /// Also restore the images in this directory (NAME.save.zst, as xl wrote them)
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Suite of the second host, for scenarios with two hosts [default: same as --suite]
    #[arg(long, value_name = "SUITE")]
    to: Option<String>,
    /// Features to add to (+NAME) or remove from (-NAME) the second host's processor
    #[arg(long, value_name = "FEATURES", allow_hyphen_values = true)]
    to_cpu: Option<String>,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    limit: u64,
    /// Kinds, guests, or KIND/GUEST; the smoke scenarios if omitted
    scenarios: Vec<String>,
}

/// Runs the task.
///
/// # Errors
///
/// The lab cannot be built or does not boot, or a scenario fails.
pub(crate) fn run(args: &LabArgs) -> Result<()> {
    match &args.task {
        LabTask::Build(args) => {
            let lab = Lab::build(&args.suite)?;
            println!("{}", lab.describe()?);
            if args.shadow {
                let built = match &args.source {
                    Some(archive) => shadow::build_of(&lab, archive)?,
                    None => shadow::build(&lab, &args.suite)?,
                };
                println!("{}", built.display());
            }
            Ok(())
        }
        LabTask::Run(args) => run_scenarios(args),
        LabTask::Matrix(args) => matrix::run(args),
        LabTask::Report => matrix::report(),
        LabTask::List => {
            for scenario in SCENARIOS {
                let smoke = if scenario.smoke { "  (smoke)" } else { "" };
                println!("{:28}{}{smoke}", scenario.name(), scenario.about());
            }
            Ok(())
        }
    }
}

/// Stage that runs the smoke scenarios. Installs what the lab lacks, if run as root.
///
/// # Errors
///
/// Same as [`run`]. The stage fails, rather than being skipped, if the lab cannot be built.
pub(crate) fn stage() -> Result<Outcome> {
    host::install(build::PROGRAMS)?;
    let lab = Lab::build(OLDEST)?;
    let boots = Boots {
        suite: OLDEST,
        // What is shipped, which an earlier stage has built.
        profile: dist::PROFILE,
        images: &[],
        shadow_images: &[],
        to: OLDEST,
        to_cpu: "",
        limit: 480,
    };
    let results = boots.run(&lab, &chosen(&[])?)?;
    println!("\n{}", results.table());
    results.verdict(&lab)?;
    Ok(Outcome::Done)
}

fn run_scenarios(args: &RunArgs) -> Result<()> {
    ensure!(
        args.build.source.is_none(),
        "`cargo xtask lab build --shadow --source FILE` builds the hypervisor, then run without"
    );
    let mut wanted = chosen(&args.scenarios)?;
    if args.scenarios.is_empty() && args.images.is_some() {
        wanted.clear();
    }
    let lab = Lab::build(&args.build.suite)?;
    let images: Vec<PathBuf> = args.images.iter().cloned().collect();
    let (images, shadow_images) = match args.build.shadow {
        true => (Vec::new(), images),
        false => (images, Vec::new()),
    };
    let boots = Boots {
        suite: &args.build.suite,
        profile: if args.release { "release" } else { "dev" },
        images: &images,
        shadow_images: &shadow_images,
        to: args.to.as_deref().unwrap_or(&args.build.suite),
        to_cpu: args.to_cpu.as_deref().unwrap_or_default(),
        limit: args.limit,
    };
    let results = boots.run(&lab, &wanted)?;
    println!("\n{}", results.table());
    results.verdict(&lab)
}

/// Settings for running scenarios in a lab.
#[derive(Debug)]
struct Boots<'a> {
    suite: &'a str,
    /// The profile of cargo that our programs are built with.
    profile: &'a str,
    /// Directories with additional images to restore.
    images: &'a [PathBuf],
    /// Directories with images of guests that need the hypervisor that [`shadow`] builds.
    shadow_images: &'a [PathBuf],
    /// The suite of the second host, for scenarios that need one.
    to: &'a str,
    /// Features of its processor in qemu's syntax: `-aes,-avx`.
    to_cpu: &'a str,
    /// Time limit of each boot, in seconds.
    limit: u64,
}

impl Boots<'_> {
    /// Boots the lab once with each hypervisor that is needed. Returns the results of all
    /// scenarios, which are also recorded in the lab.
    ///
    /// # Errors
    ///
    /// A boot does not reach the first scenario, or something cannot be built.
    fn run(&self, lab: &Lab, wanted: &[Scenario]) -> Result<Results> {
        let (between, alone): (Vec<Scenario>, Vec<Scenario>) =
            wanted.iter().partition(|scenario| scenario.two);
        let (special, usual): (Vec<Scenario>, Vec<Scenario>) =
            alone.into_iter().partition(|scenario| scenario.shadow);
        let mut all = Results::default();
        Boot::recover(lab)?;
        if !usual.is_empty() || !self.images.is_empty() {
            let share = share::Share::prepare(lab, &lab.file("xen"), self.profile)?;
            share.scenarios(&usual)?;
            for images in self.images {
                share.images(images)?;
            }
            all.rows.extend(self.boot(lab, &share)?.rows);
        }
        if !special.is_empty() || !self.shadow_images.is_empty() {
            let hypervisor = shadow::build(lab, self.suite)?;
            let share = share::Share::prepare(lab, &hypervisor, self.profile)?;
            share.scenarios(&special)?;
            for images in self.shadow_images {
                share.images(images)?;
            }
            all.rows.extend(self.boot(lab, &share)?.rows);
        }
        let (special, usual): (Vec<Scenario>, Vec<Scenario>) =
            between.into_iter().partition(|scenario| scenario.shadow);
        for scenarios in [usual, special] {
            if !scenarios.is_empty() {
                all.rows.extend(self.boot_two(lab, &scenarios)?.rows);
            }
        }
        Ok(all)
    }

    /// Boots two hosts with a network between them. All scenarios need the same hypervisors.
    fn boot_two(&self, lab: &Lab, scenarios: &[Scenario]) -> Result<Results> {
        let other = Lab::build(self.to)?;
        let hypervisor = |lab: &Lab, suite: &str| match scenarios.iter().any(|s| s.shadow) {
            true => shadow::build(lab, suite),
            false => Ok(lab.file("xen")),
        };
        let common = lab.file("common");
        build::clear(&common)?;
        std::fs::create_dir_all(&common)?;
        let near = hypervisor(lab, self.suite)?;
        let near = share::Share::of_two(lab, &near, self.profile, Role::Near, &common)?;
        near.scenarios(scenarios)?;
        let far = hypervisor(&other, self.to)?;
        let far = share::Share::of_two(&other, &far, self.profile, Role::Far, &common)?;
        let processor = match self.to_cpu {
            "" => String::new(),
            features => format!(",{}", qemu::features(features)?),
        };
        let far = qemu::Far {
            lab: &other,
            share: &far,
            processor: &processor,
        };
        let noted = Boot::begin(&near, Some(format!("{}{}", self.to, self.to_cpu)))?;
        let booted = qemu::boot(lab, &near, Some(&far), self.limit);
        let results = self.ended(&near, booted)?;
        noted.end(lab, &near, &results)?;
        Ok(results)
    }

    /// A scenario that does not end counts as a result.
    fn boot(&self, lab: &Lab, share: &share::Share) -> Result<Results> {
        let noted = Boot::begin(share, None)?;
        let booted = qemu::boot(lab, share, None, self.limit);
        let results = self.ended(share, booted)?;
        noted.end(lab, share, &results)?;
        figures::keep(lab, share)?;
        Ok(results)
    }

    fn ended(&self, share: &share::Share, booted: Result<()>) -> Result<Results> {
        match (Results::read(share), booted) {
            (Ok(results), Ok(())) => Ok(results),
            (Ok(results), Err(error)) => {
                eprintln!("{}: {error:#}", self.suite);
                Ok(results)
            }
            (Err(_), Err(error)) | (Err(error), Ok(())) => Err(error),
        }
    }
}

/// The scenarios that match any of `patterns`; the smoke scenarios if there are no patterns.
fn chosen(patterns: &[String]) -> Result<Vec<Scenario>> {
    for pattern in patterns {
        ensure!(
            SCENARIOS.iter().any(|s| s.matches(pattern)),
            "no scenario matches {pattern}: `cargo xtask lab list` has them"
        );
    }
    let chosen: Vec<Scenario> = SCENARIOS
        .iter()
        .filter(|s| match patterns {
            [] => s.smoke,
            _ => patterns.iter().any(|pattern| s.matches(pattern)),
        })
        .copied()
        .collect();
    if chosen.is_empty() {
        bail!("there are no scenarios");
    }
    Ok(chosen)
}
