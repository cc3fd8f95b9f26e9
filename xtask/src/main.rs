//! Development tasks, run as `cargo xtask TASK`. `cargo xtask ci` runs the checks of continuous
//! integration, on any machine.
//!
//! One module for each task, and the shared modules [`command`], [`stages`], [`tools`] and
//! [`workspace`]. Nothing depends on this package.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a task prints for its caller")]

mod bench;
mod bindings;
mod ci;
mod command;
mod deny;
mod dist;
mod fuzz;
mod helper;
mod lab;
mod lint;
mod peer;
mod semver;
mod spread;
mod stages;
mod test;
mod tidy;
mod tools;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::stages::Stages;

/// Development tasks of xsr
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_help_subcommand = false,
    after_help = "\
Examples:
  cargo xtask test                             all tests
  cargo xtask lint                             formatting, clippy and the project's own rules
  cargo xtask fuzz libxc_reader --seconds 60   fuzz one parser for a minute
  cargo xtask bench                            throughput compared with cat, as in docs/performance.md
  cargo xtask lab run                          save and restore on a real Xen, under qemu
  cargo xtask ci                               everything that continuous integration runs"
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Test(test::TestArgs),
    /// Check formatting, run clippy with warnings denied, then `tidy`
    ///
    /// clippy covers all packages and all targets: tests, benches and examples too.
    #[command(after_help = "\
Examples:
  cargo xtask lint
  cargo fmt          fix the formatting")]
    Lint,
    /// Check the project's own rules
    ///
    /// The first line of each file, where unsafe code may be, file lengths, the code map in
    /// ARCHITECTURE.md, paths and host names of a particular machine, and which package may depend
    /// on which.
    #[command(after_help = "\
Example:
  cargo xtask tidy")]
    Tidy,
    /// Check licences, bans and sources of all dependencies, and security advisories
    ///
    /// Runs cargo-deny over the workspace and over fuzz/, installing it below target/tools if it is
    /// missing (about a minute). Advisories are checked if the advisory database can be reached.
    #[command(after_help = "\
Example:
  cargo xtask deny")]
    Deny,
    /// Build the documentation, warnings denied
    #[command(after_help = "\
Examples:
  cargo xtask doc
  cargo doc --open --no-deps    open it in a browser")]
    Doc,
    Fuzz(fuzz::FuzzArgs),
    Bench(bench::BenchArgs),
    Bindings(bindings::BindingsArgs),
    Measure(bench::measure::MeasureArgs),
    Lab(lab::LabArgs),
    /// Fetch Xen's own stream tools, for the conformance tests
    ///
    /// Downloads Debian's xen-utils-4.17 and unpacks it below target/peer; nothing is installed.
    /// `cargo xtask test` passes the directory to the tests in XSR_PEER_TOOLS.
    #[command(after_help = "\
Example:
  cargo xtask peer-tools && cargo xtask test")]
    PeerTools,
    Peer(peer::PeerArgs),
    Semver(semver::SemverArgs),
    /// Build the release artefacts: static binaries, a Debian package, a tarball
    ///
    /// Writes target/dist: the binaries with man pages, shell completions, documents and licences
    /// in their installed layout (root/), a tarball that unpacks over /, and, if dpkg-deb is
    /// installed, a .deb. The binaries are then run in isolation.
    #[command(after_help = "\
Examples:
  cargo xtask dist
  apt install ./target/dist/xsr_0.1.0_amd64.deb
  man target/dist/man/xsr-save.1")]
    Dist,
    /// Run everything that continuous integration runs
    ///
    /// Formatting, lints, dependencies, documentation, tests, saves and restores on a real Xen in
    /// the lab (as root, installs what this needs with apt-get), a few seconds of each fuzz target,
    /// man pages and completions. All stages run, even if one fails; the table at the end has the
    /// times.
    #[command(after_help = "\
Example:
  cargo xtask ci")]
    Ci,
}

fn main() -> ExitCode {
    let mut stages = Stages::new();
    let result = match Cli::parse().task {
        // The test runner's own summary is the last line, so no table follows.
        Task::Test(args) => test::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Bindings(args) => bindings::run(&args),
        Task::Measure(args) => bench::measure::run(&args),
        Task::Lab(args) => lab::run(&args),
        Task::PeerTools => peer::run(),
        Task::Peer(args) => peer::side_by_side(&args),
        Task::Semver(args) => semver::run(&args),
        Task::Dist => dist::run(),
        Task::Lint => {
            lint::stages(&mut stages);
            stages.finish()
        }
        Task::Tidy => {
            stages.run("tidy", tidy::run);
            stages.finish()
        }
        Task::Deny => {
            deny::stages(&mut stages);
            stages.finish()
        }
        Task::Doc => {
            stages.run("doc", lint::doc);
            stages.finish()
        }
        Task::Ci => {
            ci::stages(&mut stages);
            stages.finish()
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn every_task_has_a_help_text_and_examples() {
        for task in super::Cli::command().get_subcommands() {
            assert!(
                task.get_about().is_some(),
                "{} has no help",
                task.get_name()
            );
            assert!(
                task.get_after_help().is_some(),
                "{} has no example",
                task.get_name()
            );
        }
    }
}
