//! Continuous integration: all checks, ordered so that cheap failures are found first.

use anyhow::{Context, Result, ensure};

use crate::command::Invocation;
use crate::deny;
use crate::dist;
use crate::fuzz;
use crate::helper;
use crate::lab;
use crate::lint;
use crate::peer;
use crate::semver::{self, SemverArgs};
use crate::stages::{Outcome, Stages};
use crate::test::{self, TestArgs};
use crate::workspace;

/// All stages.
pub(crate) fn stages(stages: &mut Stages) {
    lint::stages(stages);
    deny::stages(stages);
    stages.run("doc", lint::doc);
    stages.run("semver", semver);
    stages.run("shipped programs", helper::stage);
    stages.run("peer tools", peer::stage);
    stages.run("test", tests);
    stages.run("dist", dist::stage);
    stages.run("lab smoke", lab::stage);
    stages.run("peer engine", peer::engine_stage);
    stages.run("fuzz smoke", fuzz::smoke);
    stages.run("first command", first_command);
}

/// Changes of the libraries' public items: reported, and an error after the first release.
fn semver() -> Result<Outcome> {
    semver::run(&SemverArgs { accept: false })?;
    Ok(Outcome::Done)
}

fn tests() -> Result<Outcome> {
    test::run(&TestArgs::ALL)?;
    Ok(Outcome::Done)
}

/// The first command in the README, which newcomers type.
fn first_command() -> Result<Outcome> {
    let command = ["run", "--release", "-p", "xsr", "--", "demo"];
    let readme = std::fs::read_to_string(workspace::root().join("README.md"))
        .context("cannot read README.md")?;
    let typed = format!("\n    cargo {}\n", command.join(" "));
    ensure!(
        readme.contains(&typed),
        "README.md does not begin with `cargo {}` any more: run what it has instead",
        command.join(" ")
    );
    Invocation::cargo().args(command).run()?;
    Ok(Outcome::Done)
}
