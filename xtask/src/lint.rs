//! Formatting, clippy and rustdoc, which a change must pass before it is reviewed.

use anyhow::Result;

use crate::command::Invocation;
use crate::fuzz;
use crate::helper;
use crate::stages::{Outcome, Stages};
use crate::tidy;

/// Formatting, clippy, tidy.
pub(crate) fn stages(stages: &mut Stages) {
    stages.run("fmt", fmt);
    stages.run("clippy", clippy);
    stages.run("tidy", tidy::run);
}

fn fmt() -> Result<Outcome> {
    Invocation::cargo()
        .args(["fmt", "--all", "--check"])
        .run()?;
    Invocation::cargo()
        .args(["fmt", "--check", "--manifest-path"])
        .arg(fuzz::manifest())
        .run()?;
    Ok(Outcome::Done)
}

fn clippy() -> Result<Outcome> {
    Invocation::cargo()
        .args(["clippy", "--workspace", "--all-targets", "--locked"])
        .args(["--", "--deny", "warnings"])
        .run()?;
    // The programs for a Xen host by themselves: the libraries without the mock machine.
    for program in &helper::PROGRAMS {
        Invocation::cargo()
            .args(["clippy", "--package", program.name, "--locked"])
            .args(["--", "--deny", "warnings"])
            .run()?;
    }
    Ok(Outcome::Done)
}

/// Builds the documentation.
///
/// # Errors
///
/// rustdoc has a warning.
pub(crate) fn doc() -> Result<Outcome> {
    Invocation::cargo()
        .env("RUSTDOCFLAGS", "--deny warnings")
        .args(["doc", "--workspace", "--no-deps", "--locked"])
        .run()?;
    Ok(Outcome::Done)
}
