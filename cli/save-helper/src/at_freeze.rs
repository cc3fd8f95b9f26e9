//! `XSR_AT_FREEZE`: the program that runs while the domain of a save to a file is suspended.
//!
//! Migrations and checkpoints never run it, whatever the environment says: the variable is for the
//! toolstack, which starts the helper for all of them.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use xsr_save_restore::at_freeze::{FrozenGuest, Group, Program, Surroundings};
use xsr_save_restore::progress::Cancel;
use xsr_xen_backend::Domain;
use xsr_xen_backend::domain_store::DomainRef;

use crate::args::{SaveArgs, StreamType};
use crate::backend::Backend;
use crate::environment;

/// The program of one save.
#[derive(Debug)]
pub(crate) struct AtFreeze {
    pub(crate) program: Program,
    /// Whether `xsr save`, which started xl, tells the program how the save ended.
    told_by_another: bool,
}

impl AtFreeze {
    /// The program for this save, if the environment names one and the save goes to a file.
    ///
    /// # Errors
    ///
    /// Another user could replace the program; the domain's name cannot be read.
    pub(crate) fn of(
        args: &SaveArgs,
        stream: &OwnedFd,
        cancel: &Cancel,
        backend: &dyn Backend,
        domain: &dyn Domain,
    ) -> Result<Option<Self>> {
        let Some(asked) = environment::at_freeze()? else {
            return Ok(None);
        };
        let found = match (args.stream, args.debug) {
            (StreamType::Plain, false) => file_of(stream)?,
            _ => None,
        };
        let Some(found) = found else {
            tracing::warn!(
                "XSR_AT_FREEZE is for a save to a file: {} is not run",
                asked.path.display()
            );
            return Ok(None);
        };
        let uuid = domain.info()?.uuid;
        let which = DomainRef {
            domid: args.domid,
            uuid,
        };
        let guest = FrozenGuest {
            domid: args.domid,
            name: backend.name(which)?.unwrap_or_default(),
            uuid: uuid.to_string(),
            file: asked.file.unwrap_or(found),
        };
        let told_by_another = asked.frozen.is_some();
        let surroundings = Box::new(Process {
            frozen: asked.frozen.map(|path| (path, guest.to_bytes())),
        });
        let program = Program::new(&asked.path, asked.limit, cancel.clone(), surroundings);
        let mut program = program.context("XSR_AT_FREEZE")?;
        program.is_about(guest);
        Ok(Some(Self {
            program,
            told_by_another,
        }))
    }

    /// Called when the save is over: tells the program whether it has succeeded, unless another
    /// process does.
    pub(crate) fn conclude(mut self, is_saved: bool) {
        if let Some(took) = self.program.took {
            tracing::info!("XSR_AT_FREEZE: the program ran for {} ms", took.as_millis());
        }
        self.program.is_saved = is_saved;
        match self.told_by_another {
            true => {
                self.program.stop();
            }
            false => self.program.conclude(),
        }
    }
}

/// The path of a regular file; `None` for anything else. A migration goes to a pipe or a socket.
fn file_of(stream: &OwnedFd) -> Result<Option<PathBuf>> {
    let file = File::from(stream.as_fd().try_clone_to_owned()?);
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let link = format!("/proc/self/fd/{}", stream.as_raw_fd());
    let path = fs::read_link(&link).context("reading the name of the image")?;
    Ok(Some(path))
}

/// This process, in which libxl has left descriptors open.
#[derive(Debug)]
struct Process {
    /// The file to write before a program is started, and its contents: for the process that tells
    /// the program how the save ended.
    frozen: Option<(PathBuf, Vec<u8>)>,
}

impl Surroundings for Process {
    fn before_start(&self) -> io::Result<()> {
        // A program that could not be told how the save ended must not be run.
        if let Some((path, about)) = &self.frozen {
            fs::write(path, about)?;
        }
        xsr_stdio::close_on_exec()
    }

    fn started(&self, _: &Path, _: &Group) -> Box<dyn fmt::Debug + Send> {
        Box::new(())
    }
}
