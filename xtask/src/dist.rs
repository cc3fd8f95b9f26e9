//! What goes into a distribution beside the program: man pages and shell
//! completions, made from the command line's own definition.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{CommandFactory, ValueEnum};
use clap_complete::Shell;

use crate::stages::Outcome;
use crate::workspace;

// The command is a program, not a library, and this is the one module of it that
// somebody else needs: it depends on clap alone.
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "only the definition is wanted here, not what it parses to"
)]
#[path = "../../cli/src/args.rs"]
mod args;

/// Write `target/dist/man` and `target/dist/completions`.
///
/// # Errors
///
/// A file cannot be written.
pub(crate) fn run() -> Result<()> {
    let dist = workspace::root().join("target/dist");
    let man = empty(dist.join("man"))?;
    clap_mangen::generate_to(args::Cli::command(), &man)
        .with_context(|| format!("cannot write to {}", man.display()))?;
    let completions = empty(dist.join("completions"))?;
    for shell in Shell::value_variants() {
        clap_complete::generate_to(*shell, &mut args::Cli::command(), "xsr", &completions)
            .with_context(|| format!("cannot write to {}", completions.display()))?;
    }
    for directory in [&man, &completions] {
        println!("{}: {} files", directory.display(), count(directory)?);
    }
    Ok(())
}

/// As [`run`], for `cargo xtask ci`: what the command line says can be made into
/// pages at all.
pub(crate) fn stage() -> Result<Outcome> {
    run()?;
    Ok(Outcome::Done)
}

/// The directory, with nothing in it.
fn empty(directory: PathBuf) -> Result<PathBuf> {
    if directory.exists() {
        fs::remove_dir_all(&directory)
            .with_context(|| format!("cannot clear {}", directory.display()))?;
    }
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

fn count(directory: &Path) -> Result<usize> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    Ok(entries.collect::<Result<Vec<_>, _>>()?.len())
}
