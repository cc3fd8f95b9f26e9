//! The commands, one file each, and their common parts.

mod cat;
pub(crate) mod convert;
mod demo;
mod diff;
mod edit;
mod export;
mod inspect;
pub(crate) mod migrate;
mod migrate_receive;
mod mock;
mod plan;
mod remus;
mod restore;
mod resume;
pub(crate) mod save;
mod tunnel;
mod verify;

use std::path::PathBuf;

use crate::age;
use crate::args::Command;
use crate::exit::Code;
use crate::terminal::Terminal;

/// Run the command of the command line.
pub(crate) fn run(command: Command, terminal: &Terminal) -> anyhow::Result<Code> {
    age::use_identities(identities(&command))?;
    match command {
        Command::Inspect(args) => inspect::run(&args, terminal),
        Command::Verify(args) => verify::run(&args, terminal),
        Command::Diff(args) => diff::run(&args, terminal),
        Command::Convert(args) => convert::run(&args, terminal),
        Command::Export(args) => export::run(&args, terminal),
        Command::Edit(args) => edit::run(&args, terminal),
        Command::Cat(args) => cat::run(&args, terminal),
        Command::Save(args) => save::run(&args, terminal),
        Command::Restore(args) => restore::run(&args, terminal),
        Command::Migrate(args) => migrate::run(&args, terminal),
        Command::MigrateReceive(args) => migrate_receive::run(&args, terminal),
        Command::Tunnel(args) => tunnel::run(&args, terminal),
        Command::Remus(args) => remus::run(&args, terminal),
        Command::Resume(args) => resume::run(&args, terminal),
        Command::Plan(args) => plan::run(&args, terminal),
        Command::Mock(args) => mock::run(&args.command, terminal),
        Command::Demo(args) => demo::run(&args, terminal),
    }
}

/// The files with identities for the images that the command reads.
fn identities(command: &Command) -> &[PathBuf] {
    let identity = match command {
        Command::Inspect(args) => &args.identity,
        Command::Verify(args) => &args.identity,
        Command::Diff(args) => &args.identity,
        Command::Convert(args) => &args.identity,
        Command::Export(args) => &args.identity,
        Command::Edit(args) => &args.identity,
        Command::Cat(args) => &args.identity,
        Command::Restore(args) => &args.identity,
        _ => return &[],
    };
    &identity.identity
}
