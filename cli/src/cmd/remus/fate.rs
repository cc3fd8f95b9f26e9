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

/// What a domain does here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Here {
    Runs,
    /// It is suspended, and so runs nowhere unless somebody resumes it.
    Asleep,
    /// It has come to its end by itself.
    Over(ShutdownReason),
    /// Somebody has destroyed it.
    Gone,
    /// Nobody can tell.
    Unknown,
}

impl Here {
    fn of(info: &Result<DomainInfo, BackendError>) -> Self {
        match info {
            Ok(info) => match info.shutdown {
                None => Self::Runs,
                Some(ShutdownReason::Suspend) => Self::Asleep,
                Some(reason) => Self::Over(reason),
            },
            Err(error) if error.errno == Errno::ESRCH => Self::Gone,
            Err(_) => Self::Unknown,
        }
    }

    /// Whether the other end is to run no copy of it. A domain that does not run here had better
    /// run there, unless somebody wanted it to be gone, or it has ended itself.
    pub(super) fn is_taken_back(self) -> bool {
        !matches!(self, Self::Asleep | Self::Unknown)
    }
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
        let here = self.here();
        if here == Here::Gone {
            return self.gone(fate, complete, hung_up);
        }
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
        let asleep = !here.is_taken_back();
        let over = match here {
            Here::Over(reason) => Some(format!("has shut down ({reason})")),
            _ => None,
        };
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
                if self.args.on_loss == OnLoss::Pause {
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

    /// The domain has been destroyed, on purpose: what failed for that is no news.
    fn gone(&self, fate: Fate, complete: u64, hung_up: &str) -> Error {
        let (name, host) = (self.name, &self.args.host);
        let there = match fate {
            Fate::Here => "it runs nowhere else".to_owned(),
            Fate::There => format!(
                "{host} runs {name} since it lost this end, from a checkpoint on: destroy that, too"
            ),
            Fate::Unknown => format!(
                "{host} may have lost this end, and then it runs {name} there, from checkpoint \
                 {complete} at the latest: look, once its migrate-receive has ended, and destroy \
                 {name} or {name}--incoming there"
            ),
        };
        Error::new(Migration {
            words: format!(
                "protecting {name} on {host}: {name} has been destroyed here{hung_up}; {there}"
            ),
            undecided: fate == Fate::Unknown,
        })
    }

    /// The other end runs the domain: this one must not.
    pub(super) fn stop(&self) -> Result<()> {
        self.pause()?;
        if self.here() == Here::Gone {
            return Ok(());
        }
        self.host
            .rename(self.which, self.name, &format!("{}{AWAY}", self.name))
            .context("renaming it")
    }

    /// Have the domain stand still, once.
    pub(super) fn pause(&self) -> Result<()> {
        match self.domain.info() {
            Ok(info) if info.paused => Ok(()),
            Err(error) if error.errno == Errno::ESRCH => Ok(()),
            _ => self.domain.pause().context("pausing it"),
        }
    }

    /// What the domain does here.
    pub(super) fn here(&self) -> Here {
        Here::of(&self.domain.info())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use xsr_xen_backend::domain_store::DomainStore;
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
    use xsr_xen_backend::{DomId, GuestKind, Host as _};

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn what_may_have_to_run_at_the_other_end_is_not_taken_back() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
        let domid = host.create_guest(&spec).expect("a guest");
        let domain = host.domain(domid).expect("the domain");
        let info = domain.info().expect("what it is");
        let down = |shutdown| {
            let info = info.clone();
            Ok(DomainInfo { shutdown, ..info })
        };
        let failed = |errno| Err(BackendError::domain("getdomaininfo", DomId(1), errno));
        let crash = ShutdownReason::Crash;
        for (info, here, taken_back) in [
            (down(None), Here::Runs, true),
            (down(Some(ShutdownReason::Suspend)), Here::Asleep, false),
            (down(Some(crash)), Here::Over(crash), true),
            (failed(Errno::ESRCH), Here::Gone, true),
            (failed(Errno::EPERM), Here::Unknown, false),
        ] {
            assert_eq!(Here::of(&info), here);
            assert_eq!(here.is_taken_back(), taken_back, "{here:?}");
        }
    }

    #[test]
    fn a_domain_that_somebody_has_destroyed_is_taken_back_and_said_to_be_gone() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
        let domid = host.create_guest(&spec).expect("a guest");
        let domain = host.domain(domid).expect("the domain");
        let which = DomainStore::find(&host, "web").expect("the domain");
        let cli = Cli::parse_from(["xsr", "remus", "--on-loss", "pause", "web", "other"]);
        let Command::Remus(args) = &cli.command else {
            unreachable!("it is remus")
        };
        let primary = Primary {
            args,
            host: &host,
            which,
            domain: domain.as_ref(),
            name: "web",
        };
        domain.destroy().expect("it goes");
        assert_eq!(primary.here(), Here::Gone);
        primary.pause().expect("it stands still");
        primary.stop().expect("it does not run");
        for (fate, undecided, said) in [
            (Fate::Here, false, "here; it runs nowhere else"),
            (
                Fate::There,
                false,
                "here; other runs web since it lost this end",
            ),
            (Fate::Unknown, true, "here; other may have lost this end"),
        ] {
            let end = End::Failed(Error::msg("it is still suspended: resume it by hand"));
            let stopped = (fate == Fate::There).then(|| primary.stop());
            let error = primary.ended(end, fate, 7, "", stopped);
            let migration = error.downcast::<Migration>().expect("what became of it");
            assert_eq!(migration.undecided, undecided);
            let words = &migration.words;
            assert!(words.contains("web has been destroyed"), "{words}");
            assert!(words.contains(said), "{words}");
            assert!(
                !words.contains("by hand") && !words.contains("xsr mock"),
                "{words}"
            );
        }
    }
}
