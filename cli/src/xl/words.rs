//! The positional arguments of a command line for xl: the domain, and the file of a save. While xl
//! works on the domain, it is locked against our other commands.

use std::ffi::{OsStr, OsString};

use anyhow::{Error, Result};
use xsr_xen_backend::domain_store::{DomainLock, DomainStoreError};

use crate::args::Backend;
use crate::backend::Hypervisor;

/// The domain and the file on a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Words {
    /// The command: `save`, `migrate` or `remus`.
    pub(super) command: &'static str,
    /// The letters of the command's options that take a value.
    with_value: &'static str,
    /// Whether the next word is the value of an option.
    is_value: bool,
    /// The positions of these words among xl's arguments: DOMAIN, then FILE or HOST.
    pub(super) positions: Vec<usize>,
    /// The domain runs on after a save (`-c`).
    pub(super) copies: bool,
    /// The domain stays after a save, paused (`-p`).
    pub(super) pauses: bool,
    /// `--force` was given, which xl does not have.
    pub(super) force: bool,
    /// `-s` was given: the command that xl runs in place of ssh.
    pub(super) names_ssh: bool,
}

impl Words {
    /// For a command that works on an existing domain.
    pub(super) fn of(command: &str) -> Option<Self> {
        let (command, with_value) = match command {
            "save" => ("save", ""),
            "migrate" => ("migrate", "Cs"),
            "remus" => ("remus", "isN"),
            _ => return None,
        };
        Some(Self {
            command,
            with_value,
            is_value: false,
            positions: Vec::new(),
            copies: false,
            pauses: false,
            force: false,
            names_ssh: false,
        })
    }

    /// Take note of an argument for xl.
    pub(super) fn see(&mut self, argument: &OsStr, position: usize, may_be_option: bool) {
        if std::mem::take(&mut self.is_value) {
            return;
        }
        let text = argument.to_str().unwrap_or_default();
        match text.strip_prefix('-') {
            Some(letters) if may_be_option && !letters.is_empty() => {
                if letters.starts_with('-') {
                    return;
                }
                self.copies |= letters.contains('c');
                self.pauses |= letters.contains('p');
                let takes = letters.find(|letter| self.with_value.contains(letter));
                self.names_ssh |= takes.is_some_and(|at| letters[at..].starts_with('s'));
                // The rest after the letter, if any, is the value.
                self.is_value = takes.is_some_and(|at| at + 1 == letters.len());
            }
            _ => self.positions.push(position),
        }
    }

    /// Lock the domain. `None` if this process cannot ask the hypervisor, or does not find the
    /// domain: xl reports the reason.
    ///
    /// # Errors
    ///
    /// Another of our commands works on it.
    pub(super) fn lock(&self, arguments: &[OsString]) -> Result<Option<DomainLock>> {
        let word = self.positions.first().map(|at| &arguments[*at]);
        let Some(domain) = word.and_then(|word| word.to_str()) else {
            return Ok(None);
        };
        let Ok(host) = Hypervisor::direct(&Backend::Xen) else {
            return Ok(None);
        };
        let locked = host
            .find(domain)
            .and_then(|found| host.lock(found, &format!("xsr {} {domain}", self.command)));
        match locked {
            Ok(lock) => Ok(Some(lock)),
            Err(error @ DomainStoreError::Locked { .. }) => Err(Error::new(error)),
            Err(error) => {
                tracing::info!(%error, "the domain is not locked for other commands of xsr");
                Ok(None)
            }
        }
    }
}
