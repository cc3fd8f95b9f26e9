//! The programs that are shipped for a Xen host, the save helper and the emu-manager: how they are
//! built, and that nothing is in them that a Xen host has no use for.
//!
//! Each is built by itself, without the rest of the workspace: cargo gives a dependency that
//! several packages share the features of all of them.

use anyhow::{Context as _, Result, ensure};

use crate::command::Invocation;
use crate::dist;
use crate::stages::Outcome;

/// The save helper's package, and its program.
pub(crate) const NAME: &str = "xsr-save-helper";

/// A program for a Xen host, and the package of the same name.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// Crates that it must not be linked with: the command line, the drawing and JSON of others.
    not_linked: &'static [&'static str],
    /// What is in the program for certain: a search that finds nothing proves nothing.
    inside: &'static str,
}

/// All of them.
pub(crate) const PROGRAMS: [Program; 2] = [
    Program {
        name: NAME,
        not_linked: &["clap", "indicatif", "serde", "serde_json", "regex"],
        inside: "XSR_HELPER_BEGAN",
    },
    Program {
        name: "xsr-emu-manager",
        // qemu speaks JSON.
        not_linked: &["clap", "indicatif", "regex"],
        inside: "xen-set-global-dirty-log",
    },
];

/// What the mock machine, the tests' programs and the command's variable would leave in a program.
const NOT_INSIDE: [&str; 6] = [
    "XSR_HELPER_TEST_BACKEND",
    "XSR_EMU_TEST_BACKEND",
    "XSR_EMU_TEST_RUN",
    "XSR_BACKEND",
    "mock-xen:",
    "mock-workload",
];

/// For `cargo xtask ci`: the programs know no mock machine.
///
/// # Errors
///
/// One does not build, or there is something in it that must not be.
pub(crate) fn stage() -> Result<Outcome> {
    for program in &PROGRAMS {
        let name = program.name;
        let tree = Invocation::cargo()
            .args(["tree", "--locked", "--package", name, "--edges", "normal"])
            .args(["--prefix", "none", "--format", "{p} [{f}]"])
            .capture()?;
        program.linked(&tree)?;
        let built = dist::build(name, name, dist::PROFILE)?;
        let built =
            std::fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
        program.inside(&built)?;
    }
    Ok(Outcome::Done)
}

impl Program {
    /// Check what `cargo tree` says.
    fn linked(&self, tree: &str) -> Result<()> {
        let program = self.name;
        ensure!(
            tree.contains("xsr-xen-backend "),
            "`cargo tree` does not name xsr-xen-backend: {tree}"
        );
        for line in tree.lines() {
            let name = line.split(' ').next().unwrap_or_default();
            let features = line.rsplit_once(" [").map_or("", |(_, features)| features);
            ensure!(
                !self.not_linked.contains(&name),
                "{program} is linked with {name}"
            );
            ensure!(
                name != "xsr-xen-backend" || !features.contains("mock"),
                "{program} has the mock machine in it: {line}"
            );
        }
        Ok(())
    }

    /// Check the program itself.
    fn inside(&self, program: &[u8]) -> Result<()> {
        let has = |text: &str| program.windows(text.len()).any(|w| w == text.as_bytes());
        let (name, inside) = (self.name, self.inside);
        ensure!(has(inside), "{name} does not have {inside} in it any more");
        for text in NOT_INSIDE {
            ensure!(!has(text), "{name} has {text:?} in it");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mock_machine_is_noticed() {
        let program = &PROGRAMS[0];
        let fine = "xsr-save-helper v0.1.0 (/x) []\nxsr-xen-backend v0.1.0 (/x) []\n";
        assert!(program.linked(fine).is_ok());
        assert!(program.linked("").is_err());
        let mock = "xsr-xen-backend v0.1.0 (/x) [mock]\n";
        assert!(program.linked(mock).is_err());
        assert!(
            program
                .linked(&format!("{fine}clap v4.6.0 [std]\n"))
                .is_err()
        );
        assert!(program.inside(b"..XSR_HELPER_BEGAN..").is_ok());
        assert!(program.inside(b"..").is_err());
        assert!(program.inside(b"..XSR_HELPER_BEGAN..XSR_BACKEND").is_err());
    }
}
