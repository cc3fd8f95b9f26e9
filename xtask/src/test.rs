//! All tests. Needs a Rust toolchain and a C compiler; uses cargo-nextest and
//! Xen's own tools where they are.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::command::Invocation;
use crate::peer;
use crate::workspace;

/// Run all tests of the workspace
///
/// The documentation's examples first, then the tests: with cargo-nextest where it is
/// installed, else with `cargo test`. Tests that compare with Xen's own tools find them
/// in XSR_PEER_TOOLS, by default where `cargo xtask peer-tools` unpacked them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask test
  cargo xtask test -p xsr-format           the tests of one package
  cargo xtask test -p xsr-format truncat   those with `truncat` in their name")]
pub(crate) struct TestArgs {
    /// Only this package; may be given more than once
    #[arg(short, long = "package", value_name = "PACKAGE")]
    packages: Vec<String>,
    /// Only tests with this in their name; leaves out the documentation's examples
    filter: Option<String>,
}

impl TestArgs {
    /// Everything.
    pub(crate) const ALL: Self = Self {
        packages: Vec::new(),
        filter: None,
    };

    /// Which packages, as cargo wants to be told.
    fn selection(&self) -> Vec<&str> {
        match self.packages.as_slice() {
            [] => vec!["--workspace"],
            some => some.iter().flat_map(|name| ["-p", name.as_str()]).collect(),
        }
    }
}

/// Run the tests. The last thing on the screen is the runner's own summary.
///
/// # Errors
///
/// A test fails or does not compile.
pub(crate) fn run(args: &TestArgs) -> Result<()> {
    // A package without a library has no examples to run, and cargo takes being
    // asked for them as a mistake.
    if args.filter.is_none() && args.packages.is_empty() {
        Invocation::cargo()
            .args(["test", "--doc", "--workspace"])
            .run()?;
    }
    let nextest = Invocation::cargo().args(["nextest", "--version"]);
    let mut runner = match nextest.succeeds() {
        true => Invocation::cargo().args(["nextest", "run"]),
        false => Invocation::cargo().args(["test", "--tests"]),
    };
    runner = runner.args(args.selection()).args(&args.filter);
    if std::env::var_os(peer::VARIABLE).is_none() {
        match peer::unpacked() {
            Some(tools) => runner = runner.env(peer::VARIABLE, tools),
            None => not_there(
                "Xen's own tools",
                "nothing is compared with verify-stream-v2; `cargo xtask peer-tools` fetches it",
            ),
        }
    }
    if !real_images() {
        not_there(
            "images of real guests",
            "Linux and SeaBIOS guests are not tried; XSR_IMAGES names the directory with them",
        );
    }
    runner.run()
}

/// Whether the tests will find images that the repository does not hold.
fn real_images() -> bool {
    let beside = || workspace::root().join("../shared/images");
    let directory = std::env::var_os("XSR_IMAGES").map_or_else(beside, PathBuf::from);
    directory.is_dir()
}

/// A runner hides what a test prints that passes: say here what will be passed over.
fn not_there(what: &str, so: &str) {
    let bar = "!".repeat(72);
    eprintln!("{bar}\n!!! {what}: NOT THERE: {so}\n{bar}");
}
