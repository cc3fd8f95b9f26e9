//! Checks of dependencies: licences, bans and sources against `deny.toml`, and security advisories
//! if the advisory database can be reached.

use std::path::Path;

use anyhow::Result;

use crate::command::Invocation;
use crate::fuzz;
use crate::stages::{Outcome, Stages};
use crate::tools;
use crate::workspace;

/// Licences, bans and sources; then advisories.
pub(crate) fn stages(stages: &mut Stages) {
    stages.run("deny", || {
        let program = tools::CARGO_DENY.find_or_install()?;
        check(&program, &["licenses", "bans", "sources"])
    });
    stages.run("advisories", || {
        advisories(&tools::CARGO_DENY.find_or_install()?)
    });
}

fn check(program: &Path, what: &[&str]) -> Result<Outcome> {
    for manifest in [workspace::root().join("Cargo.toml"), fuzz::manifest()] {
        Invocation::new(program)
            .args(["--locked", "--manifest-path"])
            .arg(&manifest)
            .arg("--config")
            .arg(workspace::root().join("deny.toml"))
            .args(["check", "--hide-inclusion-graph"])
            .args(what)
            .run()?;
    }
    Ok(Outcome::Done)
}

/// A database that cannot be fetched is not a failure of the change under test. An advisory in a
/// fetched database is.
fn advisories(program: &Path) -> Result<Outcome> {
    match Invocation::new(program).args(["fetch", "db"]).run() {
        Ok(()) => check(program, &["advisories"]),
        Err(_) => Ok(Outcome::Skipped(
            "the advisory database cannot be reached from here".to_owned(),
        )),
    }
}
