//! Running all tests. Needs a Rust toolchain and a C compiler; uses cargo-nextest and Xen's own
//! tools if they are available.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::command::Invocation;
use crate::peer;
use crate::workspace;

/// Run all tests of the workspace
///
/// The documentation's examples first, then the tests: with cargo-nextest if it is installed,
/// otherwise with `cargo test`. Tests that compare with Xen's own tools find them in
/// XSR_PEER_TOOLS, by default where `cargo xtask peer-tools` unpacked them.
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
    /// All tests.
    pub(crate) const ALL: Self = Self {
        packages: Vec::new(),
        filter: None,
    };

    /// The arguments that select packages for cargo.
    fn selection(&self) -> Vec<&str> {
        match self.packages.as_slice() {
            [] => vec!["--workspace"],
            some => some.iter().flat_map(|name| ["-p", name.as_str()]).collect(),
        }
    }
}

/// Runs the tests. The last output is the runner's own summary.
///
/// # Errors
///
/// A test fails or does not compile.
pub(crate) fn run(args: &TestArgs) -> Result<()> {
    // A package without a library has no examples to run, and cargo fails if asked for them.
    if args.filter.is_none() && args.packages.is_empty() {
        Invocation::cargo()
            .args(["test", "--doc", "--workspace"])
            .run()?;
    }
    let nextest = Invocation::cargo().args(["nextest", "--version"]);
    let mut runner = match nextest.succeeds() {
        true => Invocation::cargo().args(["nextest", "run", "--no-fail-fast"]),
        false => Invocation::cargo().args(["test", "--tests", "--no-fail-fast"]),
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

/// Whether the tests will find images that are not in the repository.
fn real_images() -> bool {
    let beside = || workspace::root().join("../shared/images");
    let directory = std::env::var_os("XSR_IMAGES").map_or_else(beside, PathBuf::from);
    directory.is_dir()
}

/// Runners hide the output of passing tests, so what will be skipped is printed here.
fn not_there(what: &str, so: &str) {
    let bar = "!".repeat(72);
    eprintln!("{bar}\n!!! {what}: NOT THERE: {so}\n{bar}");
}
