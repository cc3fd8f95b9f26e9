//! The save helper that is shipped: how it is built, and that nothing is in it that a Xen host
//! has no use for.
//!
//! It is built by itself, without the rest of the workspace: cargo gives a dependency that
//! several packages share the features of all of them.

use anyhow::{Context as _, Result, ensure};

use crate::command::Invocation;
use crate::stages::Outcome;
use crate::workspace;

/// The package, and the program.
pub(crate) const NAME: &str = "xsr-save-helper";
/// Crates that it must not be linked with: the command line, the drawing and JSON of others.
const NOT_LINKED: [&str; 5] = ["clap", "indicatif", "serde", "serde_json", "regex"];
/// What the mock machine, the tests' helper and the command's variable would leave in the program.
const NOT_INSIDE: [&str; 4] = [
    "XSR_HELPER_TEST_BACKEND",
    "XSR_BACKEND",
    "mock-xen:",
    "mock-workload",
];
/// What is in the program for certain: a search that finds nothing proves nothing.
const INSIDE: &str = "XSR_HELPER_BEGAN";

/// Builds the helper alone, as it is shipped.
pub(crate) fn build() -> Invocation {
    let program = ["--package", NAME, "--bin", NAME];
    Invocation::cargo()
        .args(["build", "--locked"])
        .args(program)
}

/// For `cargo xtask ci`: the shipped helper knows no mock machine.
///
/// # Errors
///
/// It does not build, or there is something in it that must not be.
pub(crate) fn stage() -> Result<Outcome> {
    let tree = Invocation::cargo()
        .args(["tree", "--locked", "--package", NAME, "--edges", "normal"])
        .args(["--prefix", "none", "--format", "{p} [{f}]"])
        .capture()?;
    linked(&tree)?;
    build().args(["--release"]).run()?;
    let program = workspace::target().join("release").join(NAME);
    let program =
        std::fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    inside(&program)?;
    Ok(Outcome::Done)
}

/// Check what `cargo tree` says.
fn linked(tree: &str) -> Result<()> {
    ensure!(
        tree.contains("xsr-xen-backend "),
        "`cargo tree` does not name xsr-xen-backend: {tree}"
    );
    for line in tree.lines() {
        let name = line.split(' ').next().unwrap_or_default();
        let features = line.rsplit_once(" [").map_or("", |(_, features)| features);
        ensure!(!NOT_LINKED.contains(&name), "{NAME} is linked with {name}");
        ensure!(
            name != "xsr-xen-backend" || !features.contains("mock"),
            "{NAME} has the mock machine in it: {line}"
        );
    }
    Ok(())
}

/// Check the program itself.
fn inside(program: &[u8]) -> Result<()> {
    let has = |text: &str| program.windows(text.len()).any(|w| w == text.as_bytes());
    ensure!(has(INSIDE), "{NAME} does not have {INSIDE} in it any more");
    for text in NOT_INSIDE {
        ensure!(!has(text), "{NAME} has {text:?} in it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mock_machine_is_noticed() {
        let fine = "xsr-save-helper v0.1.0 (/x) []\nxsr-xen-backend v0.1.0 (/x) []\n";
        assert!(linked(fine).is_ok());
        assert!(linked("").is_err());
        let mock = "xsr-xen-backend v0.1.0 (/x) [mock]\n";
        assert!(linked(mock).is_err());
        assert!(linked(&format!("{fine}clap v4.6.0 [std]\n")).is_err());
        assert!(inside(b"..XSR_HELPER_BEGAN..").is_ok());
        assert!(inside(b"..").is_err());
        assert!(inside(b"..XSR_HELPER_BEGAN..XSR_BACKEND").is_err());
    }
}
