//! The shipped save helper: its build, and a check that it contains nothing that is useless on a
//! Xen host.
//!
//! It is built separately from the rest of the workspace, since cargo gives a dependency that
//! several packages share the features of all these packages.

use anyhow::{Context as _, Result, ensure};

use crate::command::Invocation;
use crate::stages::Outcome;
use crate::workspace;

/// The package, and the program.
pub(crate) const NAME: &str = "xsr-save-helper";
/// Crates that must not be linked in: the command line, drawing on the terminal, JSON.
const NOT_LINKED: [&str; 5] = ["clap", "indicatif", "serde", "serde_json", "regex"];
/// Strings that the mock machine, the test helper and the command's variable would leave in the
/// program.
const NOT_INSIDE: [&str; 4] = [
    "XSR_HELPER_TEST_BACKEND",
    "XSR_BACKEND",
    "mock-xen:",
    "mock-workload",
];
/// A string that is certainly in the program: a search that finds nothing proves nothing.
const INSIDE: &str = "XSR_HELPER_BEGAN";

/// Builds only the helper, as it is shipped.
pub(crate) fn build() -> Invocation {
    let program = ["--package", NAME, "--bin", NAME];
    Invocation::cargo()
        .args(["build", "--locked"])
        .args(program)
}

/// Stage of `cargo xtask ci`: checks that the shipped helper does not contain the mock machine.
///
/// # Errors
///
/// It does not build, or it contains something that it must not.
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

/// Checks the output of `cargo tree`.
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

/// Checks the program itself.
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
