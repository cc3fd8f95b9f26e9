//! The text of `xsr --version`: the version, the commit, and the supported Xen versions.

use clap::{CommandFactory as _, FromArgMatches as _};
use xsr_xen_backend::known_versions;

use crate::args::Cli;

/// Parse the command line.
///
/// # Errors
///
/// It is invalid, or asks for help or the version.
pub(crate) fn parse() -> Result<Cli, clap::Error> {
    // clap accepts only text with a static lifetime.
    let command = Cli::command().long_version(&*long().leak());
    let matches = command.try_get_matches()?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut Cli::command()))
}

fn long() -> String {
    let commit = match env!("XSR_COMMIT") {
        "" => String::new(),
        commit => format!(" (commit {commit})"),
    };
    let [oldest, newest] = known_versions();
    format!(
        "{}{commit}
works on Xen {}.{} to {}.{}, and on mock machines",
        env!("CARGO_PKG_VERSION"),
        oldest.major,
        oldest.minor,
        newest.major,
        newest.minor
    )
}
