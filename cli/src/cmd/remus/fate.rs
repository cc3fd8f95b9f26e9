//! Who has a protected domain in the end: it is put where it is to be, and what happened, and
//! what is to be done about it, is said.
//!
//! docs/migration.md has the table.

use anyhow::{Context as _, Error, Result};
use nix::errno::Errno;
use xsr_xen_backend::{BackendError, DomainInfo, ShutdownReason};

use super::Primary;
use crate::args::OnLoss;
use crate::backend;
use crate::cmd::migrate::AWAY;
use crate::exit::{self, Migration};

/// Why it came to its end.
#[derive(Debug)]
pub(super) enum End {
    Asked,
    Enough,
    /// The receiver hung up, or said something.
    Receiver,
    Failed(Error),
}

/// Who has the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Here,
    There,
    Unknown,
}

impl Primary<'_> {
    /// Have the domain be where it is to be, and say what happened, and what to do.
    pub(super) fn ended(
        &self,
        end: End,
        fate: Fate,
        complete: u64,
        hung_up: &str,
        stopped: Option<Result<()>>,
    ) -> Error {
        let (name, host) = (self.name, &self.args.host);
        let cause = match &end {
            End::Asked => "interrupted".to_owned(),
            End::Enough => "that was the last checkpoint".to_owned(),
            End::Receiver => "the other end hung up".to_owned(),
            End::Failed(error) => exit::words(error.chain()),
        };
        let begin = format!("protecting {name} on {host}: {cause}{hung_up}");
        let command = |verb: &str, rest: &str| {
            backend::domain_command(&self.args.backend.backend, verb, rest)
        };
        let info = self.domain.info();
        let (asleep, over) = (asleep(&info), over(&info));
        // Of one that is gone there is nothing to stop.
        let gone = over.is_some() && info.is_err();
        let words = match fate {
            Fate::Here if asleep => format!(
                "{begin}; {name} is suspended here, and runs nowhere else: `{}`",
                command("resume", name)
            ),
            Fate::Here => match &over {
                Some(over) => format!("{begin}; {name} {over} here"),
                None => format!("{begin}; {name} runs on here, unprotected"),
            },
            Fate::There => {
                let away = format!("{name}{AWAY}");
                let stopped = match stopped.unwrap_or_else(|| self.stop()) {
                    Err(_) if gone => "here it has been destroyed".to_owned(),
                    Ok(()) => format!("here it does not run any more, as {away}"),
                    Err(error) => format!(
                        "here it could not be stopped ({}), AND MUST BE",
                        exit::words(error.chain())
                    ),
                };
                format!(
                    "{begin}; {host} runs {name} since it lost this end, from a checkpoint on; \
                     {stopped}: `{}`",
                    command("destroy", &away)
                )
            }
            Fate::Unknown => {
                let here = match (self.args.on_loss, asleep) {
                    _ if gone => "Here it has been destroyed".to_owned(),
                    (OnLoss::Run, false) => match &over {
                        Some(over) => format!("Here it {over}"),
                        None => "Here it runs on, unprotected".to_owned(),
                    },
                    (OnLoss::Run, true) => "Here it is suspended".to_owned(),
                    (OnLoss::Pause, _) => match self.pause() {
                        Ok(()) => "Here it is paused".to_owned(),
                        Err(error) => format!("Here it could not be paused ({error})"),
                    },
                };
                let mut then: Vec<String> = Vec::new();
                if asleep {
                    then.push(command("resume", name));
                }
                if self.args.on_loss == OnLoss::Pause && !gone {
                    then.push(command("unpause", name));
                }
                let then = match then.as_slice() {
                    [] => "there is nothing else to do".to_owned(),
                    commands => format!("let it run on here:\n    {}", commands.join("\n    ")),
                };
                format!(
                    "{begin}\n\
                     {host} may have lost this end as this end has lost it, and then it runs \
                     {name} there, from checkpoint {complete} at the latest. {here}. It must \
                     never run at both ends: look at the other one, once its migrate-receive \
                     has ended.\n\
                     If {name} is there, two of them have one life: destroy one. What is here \
                     goes with:\n    {}\n\
                     If it is not there, or as {name}--incoming, destroy that there; {then}",
                    command("destroy", name),
                )
            }
        };
        Error::new(Migration {
            words,
            undecided: fate == Fate::Unknown,
        })
    }

    /// The other end runs the domain: this one must not.
    pub(super) fn stop(&self) -> Result<()> {
        self.pause()?;
        self.host
            .rename(self.domid, &format!("{}{AWAY}", self.name))
            .context("renaming it")
    }

    /// Have the domain stand still, once.
    pub(super) fn pause(&self) -> Result<()> {
        match self.domain.info() {
            Ok(info) if info.paused => Ok(()),
            _ => self.domain.pause().context("pausing it"),
        }
    }

    /// Whether the domain is suspended, and so runs nowhere unless somebody resumes it. One
    /// that has shut down otherwise has come to its end here.
    pub(super) fn is_asleep(&self) -> bool {
        asleep(&self.domain.info())
    }
}

/// Whether that is a domain that is suspended. One that is gone has been destroyed, on purpose:
/// the other end is not to bring it back. Where nobody can tell, it had better have it.
fn asleep(info: &Result<DomainInfo, BackendError>) -> bool {
    match info {
        Ok(info) => info.shutdown == Some(ShutdownReason::Suspend),
        Err(error) => error.errno != Errno::ESRCH,
    }
}

/// How a domain has come to its end here, if it has.
fn over(info: &Result<DomainInfo, BackendError>) -> Option<String> {
    match info {
        Ok(info) => match info.shutdown {
            None | Some(ShutdownReason::Suspend) => None,
            Some(reason) => Some(format!("has shut down ({reason:?})").to_lowercase()),
        },
        Err(error) => (error.errno == Errno::ESRCH).then(|| "has been destroyed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use xsr_xen_backend::mock::{GuestSpec, MockHost};
    use xsr_xen_backend::{DomId, GuestKind, Host as _};

    use super::*;

    #[test]
    fn what_has_come_to_its_end_is_not_asleep() {
        let host = MockHost::ephemeral(&Default::default()).unwrap();
        let domid = host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8));
        let info = host.domain(domid.unwrap()).unwrap().info().unwrap();
        let down = |shutdown| {
            let info = info.clone();
            Ok(DomainInfo { shutdown, ..info })
        };
        let failed = |errno| Err(BackendError::domain("getdomaininfo", DomId(1), errno));
        let shut_down = Some("has shut down (crash)".to_owned());
        for (info, expected) in [
            (down(None), (false, None)),
            (down(Some(ShutdownReason::Suspend)), (true, None)),
            (down(Some(ShutdownReason::Crash)), (false, shut_down)),
            (
                failed(Errno::ESRCH),
                (false, Some("has been destroyed".to_owned())),
            ),
            // Nobody can tell.
            (failed(Errno::EPERM), (true, None)),
        ] {
            assert_eq!((asleep(&info), over(&info)), expected, "{info:?}");
        }
    }
}
