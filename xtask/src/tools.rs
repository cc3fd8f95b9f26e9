//! Programs from the registry that a task needs: the installed one, or one built below
//! `target/tools`.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::command::Invocation;
use crate::workspace;

/// A program from the registry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    /// The package.
    pub(crate) name: &'static str,
    /// The program in it.
    pub(crate) program: &'static str,
    /// The version to build where none is installed: the same today and tomorrow.
    pub(crate) version: &'static str,
}

/// Licences, bans, sources, advisories.
pub(crate) const CARGO_DENY: Tool = Tool {
    name: "cargo-deny",
    program: "cargo-deny",
    version: "0.20.2",
};

/// Fuzz targets.
pub(crate) const CARGO_FUZZ: Tool = Tool {
    name: "cargo-fuzz",
    program: "cargo-fuzz",
    version: "0.13.2",
};

/// Bindings to C headers.
pub(crate) const BINDGEN: Tool = Tool {
    name: "bindgen-cli",
    program: "bindgen",
    version: "0.72.1",
};

impl Tool {
    /// The program: the one in `PATH`, else ours; built first if need be.
    ///
    /// # Errors
    ///
    /// It has to be built and cannot be.
    pub(crate) fn find_or_install(self) -> Result<PathBuf> {
        if Invocation::new(self.program).arg("--version").succeeds() {
            return Ok(self.program.into());
        }
        let tools = workspace::root().join("target/tools");
        let program = tools.join("bin").join(self.program);
        if Invocation::new(&program).arg("--version").succeeds() {
            return Ok(program);
        }
        // Unoptimised: it runs for a second, and is built in a third of the time.
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
