//! What `xsr --version` says: the version, the commit, and which Xens there is an interface for.

use clap::{CommandFactory as _, FromArgMatches as _};
use xsr_xen_backend::known_versions;

use crate::args::Cli;

/// Parse the command line.
///
/// # Errors
///
/// It is wrong, or asks for help or for the version.
pub(crate) fn parse() -> Result<Cli, clap::Error> {
    // clap takes no text that does not live as long as the process.
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
