//! The command `xsr`: saves, restores, inspects, verifies and compares Xen domains
//! and their images.
//!
//! Parses the command line, sets up stderr, calls the command's file in `cmd`, and turns its result
//! into an exit code.

#![forbid(unsafe_code)]

mod age;
mod args;
mod backend;
mod cmd;
mod condition;
mod config;
mod cpu;
mod exit;
mod feed;
mod file;
mod image;
mod interrupt;
mod left;
mod mapped;
mod origin;
mod output;
mod pack;
mod page_map;
mod painter;
mod peel;
mod stdout;
mod terminal;
mod text;
mod transport;
mod verdict;
mod version;
mod watch;
mod xl;

use std::path::Path;
use std::process::ExitCode;

use crate::terminal::Terminal;
use crate::xl::Messages;

fn main() -> ExitCode {
    let name = std::env::args_os().next();
    let name = name.as_deref().map(Path::new).and_then(Path::file_name);
    if name.is_some_and(|name| name == xl::child::NAME) {
        Terminal::new(0, false).error(&xl::child::become_it());
        return exit::Code::Failed.into();
    }
    let is_script = name.is_some_and(|name| name == cmd::convert::script::NAME);
    if !is_script && let Some(xl) = xl::Xl::asked() {
        let Messages { verbose, quiet } = xl.messages();
        let terminal = Terminal::new(verbose, quiet);
        return ended(xl.run(), &terminal);
    }
    // Before there is a second thread.
    if let Err(error) = interrupt::listen() {
        Terminal::new(0, false).error(&error);
        return exit::Code::Failed.into();
    }
    let code = match is_script {
        true => cmd::convert::script::main(),
        false => command(),
    };
    left::over();
    code
}

/// Run the command of the command line.
fn command() -> ExitCode {
    let cli = match version::parse().and_then(args::Cli::settle) {
        Ok(cli) => cli,
        Err(e) => return exit::command_line(e).into(),
    };
    let terminal = Terminal::new(cli.global.verbose, cli.global.quiet);
    let json = cli.command.json();
    let result = cmd::run(cli.command, &terminal);
    if json && let Err(error) = &result {
        stdout::failure(error);
    }
    ended(result, &terminal)
}

/// Report what failed, with its exit code.
fn ended(result: anyhow::Result<exit::Code>, terminal: &Terminal) -> ExitCode {
    let code = match result {
        Ok(code) => code,
        Err(e) => {
            terminal.error(&e);
            exit::code_of(&e)
        }
    };
    code.into()
}
