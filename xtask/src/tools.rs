//! Programs from the crate registry that a task needs: the installed one, or one built below
//! `target/tools`.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::command::Invocation;
use crate::workspace;

/// A program from the registry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    /// The package's name.
    pub(crate) name: &'static str,
    /// The program's name.
    pub(crate) program: &'static str,
    /// The version to build if none is installed, fixed for reproducibility.
    pub(crate) version: &'static str,
}

/// Checks licences, bans, sources and advisories.
pub(crate) const CARGO_DENY: Tool = Tool {
    name: "cargo-deny",
    program: "cargo-deny",
    version: "0.20.2",
};

/// Builds and runs fuzz targets.
pub(crate) const CARGO_FUZZ: Tool = Tool {
    name: "cargo-fuzz",
    program: "cargo-fuzz",
    version: "0.13.2",
};

/// Generates bindings to C headers.
pub(crate) const BINDGEN: Tool = Tool {
    name: "bindgen-cli",
    program: "bindgen",
    version: "0.72.1",
};

impl Tool {
    /// The program's path: in `PATH`, or our own, built first if necessary.
    ///
    /// # Errors
    ///
    /// It must be built, and the build fails.
    pub(crate) fn find_or_install(self) -> Result<PathBuf> {
        if Invocation::new(self.program).arg("--version").succeeds() {
            return Ok(self.program.into());
        }
        let tools = workspace::root().join("target/tools");
        let program = tools.join("bin").join(self.program);
        if Invocation::new(&program).arg("--version").succeeds() {
            return Ok(program);
        }
        // Unoptimised: it runs for a second, and builds in a third of the time.
        Invocation::cargo()
            .args(["install", "--quiet", "--locked", "--debug"])
            .args(["--config", "profile.dev.debug=false"])
            .args(["--version", self.version, "--root"])
            .arg(&tools)
            .arg(self.name)
            .run()
            .with_context(|| {
                format!(
                    "{0} is not installed and cannot be built here: \
                     `cargo install --locked {0}` where the registry can be reached",
                    self.name
                )
            })?;
        Ok(program)
    }
}
