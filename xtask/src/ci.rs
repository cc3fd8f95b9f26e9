//! Continuous integration: every check there is, in the order in which a failure
//! is the cheapest to find.

use anyhow::Result;

use crate::deny;
use crate::dist;
use crate::fuzz;
use crate::lint;
use crate::peer;
use crate::stages::{Outcome, Stages};
use crate::test::{self, TestArgs};

/// All stages.
pub(crate) fn stages(stages: &mut Stages) {
    lint::stages(stages);
    deny::stages(stages);
    stages.run("doc", lint::doc);
    stages.run("peer tools", peer::stage);
    stages.run("test", tests);
    stages.run("peer engine", peer::engine_stage);
    stages.run("fuzz smoke", fuzz::smoke);
    stages.run("dist", dist::stage);
}

fn tests() -> Result<Outcome> {
    test::run(&TestArgs::ALL)?;
    Ok(Outcome::Done)
}
