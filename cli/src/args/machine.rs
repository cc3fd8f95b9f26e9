//! The command line of which hypervisor, or which mock machine, a command works on.
//!
//! All commands take the same: `--backend BACKEND`, `--host DIR` for a mock machine, and, where
//! neither is given, `XSR_BACKEND`, unless that is empty.
//!
//! As `args.rs`, it depends on clap and the standard library alone.

use std::path::PathBuf;
use std::str::FromStr;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _};

use super::{Cli, Command, MockCommand};

/// The variable that says which hypervisor, where the command line does not.
pub(crate) const VARIABLE: &str = "XSR_BACKEND";

/// Which hypervisor.
#[derive(Debug, Args)]
pub(crate) struct BackendArg {
    /// The hypervisor: `auto`, `xen` (this host's, through xl) or `mock:DIR`
    /// [default: XSR_BACKEND, or auto]
    #[arg(id = "backend", long = "backend", value_name = "BACKEND")]
    given: Option<Backend>,
    /// The mock machine in this directory: the same as --backend mock:DIR
    #[arg(
        id = "machine",
        long = "host",
        value_name = "DIR",
        conflicts_with = "backend"
    )]
    machine: Option<PathBuf>,
    /// Which it is: set by [`Cli::settle`].
    #[arg(skip = Backend::Auto)]
    pub(crate) backend: Backend,
}

/// Which mock machine.
#[derive(Debug, Args)]
pub(crate) struct MockHostArg {
    /// The directory that is the mock machine [default: XSR_BACKEND]
    #[arg(id = "machine", long = "host", value_name = "DIR")]
    machine: Option<PathBuf>,
    /// The same as --host DIR, in the form of other commands
    #[arg(
        id = "backend",
        long = "backend",
        value_name = "mock:DIR",
        conflicts_with = "machine"
    )]
    given: Option<Backend>,
    /// Which it is: set by [`Cli::settle`].
    #[arg(skip)]
    pub(crate) host: PathBuf,
}

/// A hypervisor, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// The Xen this runs on.
    Auto,
    /// The Xen this runs on, and nothing else.
    Xen,
    /// The mock machine in this directory.
    Mock(PathBuf),
    /// The same, reached by hypercalls as a Xen is: for tests of --direct.
    MockXen(PathBuf),
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "xen" => Ok(Self::Xen),
            Some(("mock", "")) => Err("expected a directory after `mock:`".to_owned()),
            Some(("mock", dir)) => Ok(Self::Mock(PathBuf::from(dir))),
            Some(("mock-xen", dir)) if !dir.is_empty() => Ok(Self::MockXen(PathBuf::from(dir))),
            _ => Err("expected `auto`, `xen` or `mock:DIR`".to_owned()),
        }
    }
}

/// What the environment says; nothing where the variable is empty.
fn from_environment() -> Result<Option<Backend>, String> {
    let Some(text) = std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let text = text.to_string_lossy();
    match text.parse() {
        Ok(backend) => Ok(Some(backend)),
        Err(why) => Err(format!("invalid value '{text}' for {VARIABLE}: {why}")),
    }
}

impl BackendArg {
    fn settle(&mut self) -> Result<(), String> {
        self.backend = match (self.given.take(), self.machine.take()) {
            (Some(given), _) => given,
            (None, Some(directory)) => Backend::Mock(directory),
            (None, None) => from_environment()?.unwrap_or(Backend::Auto),
        };
        Ok(())
    }
}

impl MockHostArg {
    fn settle(&mut self) -> Result<(), String> {
        let (backend, from) = match (self.machine.take(), self.given.take()) {
            (Some(directory), _) => (Some(Backend::Mock(directory)), "--host"),
            (None, Some(given)) => (Some(given), "--backend"),
            (None, None) => (from_environment()?, VARIABLE),
        };
        self.host = match backend {
            Some(Backend::Mock(directory) | Backend::MockXen(directory)) => directory,
            Some(Backend::Auto | Backend::Xen) => {
                return Err(format!("{from} names no mock machine: give --host DIR"));
            }
            None => {
                return Err(format!(
                    "which mock machine? Give --host DIR, --backend mock:DIR or {VARIABLE}=mock:DIR"
                ));
            }
        };
        Ok(())
    }
}

impl Cli {
    /// Find out which hypervisor is meant.
    ///
    /// # Errors
    ///
    /// What is wrong with the environment, or missing.
    pub(crate) fn settle(mut self) -> Result<Self, clap::Error> {
        let settled = match &mut self.command {
            Command::Save(args) => args.backend.settle(),
            Command::Restore(args) => args.backend.settle(),
            Command::Migrate(args) => args.backend.settle(),
            Command::MigrateReceive(args) => args.backend.settle(),
            Command::Remus(args) => args.backend.settle(),
            Command::Resume(args) => args.backend.settle(),
            Command::Plan(args) => args.backend.settle(),
            Command::Mock(args) => match &mut args.command {
                MockCommand::Host(args) => args.host.settle(),
                MockCommand::Create(args) => args.host.settle(),
                MockCommand::List(args) => args.host.settle(),
                MockCommand::Show(args) => args.host.settle(),
                MockCommand::Workload(args) => args.host.settle(),
                MockCommand::Rename(args) => args.host.settle(),
                MockCommand::Pause(args)
                | MockCommand::Unpause(args)
                | MockCommand::Resume(args)
                | MockCommand::Destroy(args) => args.host.settle(),
            },
            Command::Inspect(_)
            | Command::Verify(_)
            | Command::Diff(_)
            | Command::Convert(_)
            | Command::Export(_)
            | Command::Edit(_)
            | Command::Cat(_)
            | Command::Tunnel(_)
            | Command::Demo(_) => Ok(()),
        };
        match settled {
            Ok(()) => Ok(self),
            Err(why) => Err(Self::command().error(ErrorKind::ValueValidation, why)),
        }
    }
}
