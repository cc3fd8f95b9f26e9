//! The command `xsr`: saves, restores, inspects, verifies and compares Xen domains
//! and their images.
//!
//! Parses the command line, sets up what goes to stderr, hands over to one file
//! below `cmd` per command, and turns what comes back into an exit code.

#![forbid(unsafe_code)]

mod args;
mod backend;
mod cmd;
mod config;
mod exit;
mod file;
mod image;
mod interrupt;
mod page_map;
mod stdout;
mod terminal;
mod text;

use std::process::ExitCode;

use clap::Parser;

use crate::terminal::Terminal;

fn main() -> ExitCode {
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return exit::command_line(&e).into(),
    };
    let terminal = Terminal::new(cli.global.verbose, cli.global.quiet);
    let code = match cmd::run(cli.command, &terminal) {
        Ok(code) => code,
        Err(e) => {
            terminal.error(&e);
            exit::code_of(&e)
        }
    };
    code.into()
}
