//! The identities that the command line names (`--identity FILE`): secrets are never arguments.

use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::{Context as _, Error, Result};

use super::Identity;
use crate::exit::BadUsage;
use crate::text::shown_path;

/// The longest file that is read. An identity has 74 characters.
const MAX_FILE: u64 = 1 << 20;

static GIVEN: OnceLock<Vec<Identity>> = OnceLock::new();

/// Reads the files that the command line names. Called once, before anything is read.
///
/// # Errors
///
/// A file cannot be read; [`BadUsage`]: it has no identity, or something else.
pub(crate) fn use_identities(files: &[PathBuf]) -> Result<()> {
    let mut all = Vec::new();
    for path in files {
        let name = || shown_path(path);
        let mut text = String::new();
        let file = File::open(path).with_context(name)?;
        file.take(MAX_FILE + 1)
            .read_to_string(&mut text)
            .with_context(name)?;
        if text.len() as u64 > MAX_FILE {
            let why = format!(
                "{} is longer than 1 MiB, which a file of identities never is",
                name()
            );
            return Err(Error::new(BadUsage(why)));
        }
        // The line itself may be a secret with a typing error.
        let found = Identity::parse_file(&text).map_err(|line| {
            Error::new(BadUsage(format!(
                "{}: line {line} is not an identity, which begins with AGE-SECRET-KEY-1 \
                 (`age-keygen -o FILE` makes one; SSH keys and plugins are not supported)",
                name()
            )))
        })?;
        if found.is_empty() {
            let why = format!("{} has no identity: `age-keygen -o FILE` makes one", name());
            return Err(Error::new(BadUsage(why)));
        }
        all.extend(found);
    }
    // A command has one command line.
    GIVEN.get_or_init(|| all);
    Ok(())
}

/// The identities of the command line.
pub(crate) fn identities() -> &'static [Identity] {
    GIVEN.get().map_or(&[], Vec::as_slice)
}
