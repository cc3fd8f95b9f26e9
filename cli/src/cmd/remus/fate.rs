//! The outcome of a protection, in words: what happened, where the domain is, and what to do.
//!
//! docs/migration.md has the table.

use anyhow::Error;
use xsr_save_restore::migrate::Cause;
use xsr_save_restore::migrate::ownership::protect::{Fate, ProtectorAction, Why};

use super::Primary;
use crate::args::OnLoss;
use crate::backend::{self, name_of};
use crate::cmd::migrate::away;
use crate::condition::Condition;
use crate::exit::{self, Migration};

/// Why the protection ended.
#[derive(Debug)]
pub(super) enum End {
    Asked,
    Enough,
    /// The receiver hung up, or sent a message.
    Receiver,
    Failed(Error),
}

impl End {
    pub(super) fn why(&self) -> Why {
        match self {
            Self::Asked | Self::Enough => Why::Asked,
            Self::Receiver => Why::Receiver,
            Self::Failed(_) => Why::Failed,
        }
    }
}

/// What is known after a protection that did not end as requested.
pub(super) struct Aftermath<'a> {
    pub(super) end: End,
    pub(super) fate: Fate,
    /// The number of checkpoints that the secondary may have.
    pub(super) complete: u64,
    /// How the command at the other end has ended.
    pub(super) hung_up: &'a str,
    /// Actions on the domain that failed.
    pub(super) causes: &'a [Cause<ProtectorAction>],
}

impl Aftermath<'_> {
    /// Why the last attempt at an action failed, if it did.
    fn failure(&self, action: ProtectorAction) -> Option<String> {
        let cause = self.causes.iter().rfind(|cause| cause.action == action);
        cause.map(|cause| exit::words_of(&*cause.error))
    }
}

impl Primary<'_> {
    /// What happened, where the domain is, and what to do.
    pub(super) fn ended(&self, after: &Aftermath<'_>) -> Error {
        let (name, host) = (self.name, &self.args.host);
        let Aftermath {
            end,
            fate,
            complete,
            hung_up,
            ..
        } = after;
        let condition = self.condition();
        if condition == Condition::Gone {
            return self.gone(after);
        }
        let cause = match end {
            End::Asked => "interrupted".to_owned(),
            End::Enough => "that was the last checkpoint".to_owned(),
            End::Receiver => "the other end hung up".to_owned(),
            End::Failed(error) => exit::words(error.chain()),
        };
        let begin = format!("protecting {name} on {host}: {cause}{hung_up}");
        let command = |verb: &str, rest: &str| {
            backend::domain_command(&self.args.backend.backend, verb, rest)
        };
        let asleep = condition == Condition::Suspended;
        let over = match condition {
            Condition::Down(reason) => Some(format!("has shut down ({reason})")),
            _ => None,
        };
        let words = match fate {
            Fate::Here if asleep => format!(
                "{begin}; {name} is suspended here, and runs nowhere else: `{}`",
                command("resume", name)
            ),
            Fate::Here if matches!(condition, Condition::Unknown(_)) => format!(
                "{begin}; {}, and it runs nowhere else",
                condition.after_failure(name, &self.args.backend.backend)
            ),
            Fate::Here => match (&over, after.failure(ProtectorAction::Unpause)) {
                (_, Some(why)) => format!(
                    "{begin}; {name} is paused here, and runs nowhere else: {why}: `{}`",
                    command("unpause", name)
                ),
                (Some(over), None) => format!("{begin}; {name} {over} here"),
                (None, None) => format!("{begin}; {name} runs on here, unprotected"),
            },
            Fate::There => {
                // Its current name here: a domain that could not be renamed has its own name still.
                let called = name_of(self.host, self.which).unwrap_or_else(|_| away(name));
                let stands_still = matches!(
                    condition,
                    Condition::Paused | Condition::Suspended | Condition::Down(_)
                );
                let stopped = match after.failure(ProtectorAction::Stop) {
                    None => format!("here it does not run any more, as {called}"),
                    Some(why) if stands_still => format!(
                        "here it does not run any more, and must not run again; it is still \
                         called {called} ({why})"
                    ),
                    Some(why) => format!("here it could not be stopped ({why}), AND MUST BE"),
                };
                format!(
                    "{begin}; {host} runs {name} since it lost this end, from a checkpoint on; \
                     {stopped}: `{}`",
                    command("destroy", &called)
                )
            }
            Fate::Unknown => {
                let here = match (self.args.on_loss, asleep) {
                    (OnLoss::Run, false) => match (&over, &condition) {
                        (Some(over), _) => format!("Here it {over}"),
                        (None, Condition::Unknown(error)) => {
                            format!("What it does here could not be found out ({error})")
                        }
                        (None, _) => "Here it runs on, unprotected".to_owned(),
                    },
                    (OnLoss::Run, true) => "Here it is suspended".to_owned(),
                    (OnLoss::Pause, _) => {
                        match (&condition, after.failure(ProtectorAction::Pause)) {
                            (Condition::Paused, _) => "Here it is paused".to_owned(),
                            (Condition::Unknown(error), _) => {
                                format!("What it does here could not be found out ({error})")
                            }
                            (_, Some(why)) => format!("Here it could not be paused ({why})"),
                            (Condition::Suspended, None) => "Here it is suspended".to_owned(),
                            (Condition::Down(reason), None) => {
                                format!("Here it has shut down ({reason})")
                            }
                            (Condition::Runs | Condition::Gone, None) => {
                                "Here it was paused, but another program has unpaused it: IT RUNS"
                                    .to_owned()
                            }
                        }
                    }
                };
                let mut then: Vec<String> = Vec::new();
                if asleep {
                    then.push(command("resume", name));
                }
                if self.args.on_loss == OnLoss::Pause && condition != Condition::Runs {
                    then.push(command("unpause", name));
                }
                let then = match then.as_slice() {
                    [] => "no other action is needed".to_owned(),
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
            undecided: *fate == Fate::Unknown,
        })
    }

    /// The domain has been destroyed on purpose, so failures that follow from that are not
    /// reported.
    fn gone(&self, after: &Aftermath<'_>) -> Error {
        let (name, host) = (self.name, &self.args.host);
        let Aftermath {
            fate,
            complete,
            hung_up,
            ..
        } = after;
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
            undecided: *fate == Fate::Unknown,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use xsr_xen_backend::domain_store::DomainStore;
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
    use xsr_xen_backend::{GuestKind, Host as _};

    use super::*;
    use crate::args::{Cli, Command};

    /// Only its name could not be changed.
    #[test]
    fn what_stands_still_is_not_said_to_run_because_it_could_not_be_renamed() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        for name in ["web", "web--migratedaway"] {
            let spec = GuestSpec::new(name, GuestKind::Pvh, 8);
            host.create_guest(&spec).expect("a guest");
        }
        let which = DomainStore::find(&host, "web").expect("the domain");
        let cli = Cli::parse_from(["xsr", "remus", "web", "other"]);
        let Command::Remus(args) = &cli.command else {
            unreachable!("it is remus")
        };
        let domain = host.open(which).expect("the domain");
        let primary = Primary {
            args,
            host: &host,
            which,
            domain: domain.as_ref(),
            name: "web",
        };
        let said = || {
            let cause = Cause {
                action: ProtectorAction::Stop,
                error: primary.stop().expect_err("the name is taken").into(),
            };
            let error = primary.ended(&Aftermath {
                end: End::Receiver,
                fate: Fate::There,
                complete: 7,
                hung_up: "",
                causes: &[cause],
            });
            error
                .downcast::<Migration>()
                .expect("what became of it")
                .words
        };
        let words = said();
        assert_eq!(primary.condition(), Condition::Paused);
        assert!(words.contains("does not run any more"), "{words}");
        assert!(words.contains("still called web (renaming it"), "{words}");
        assert!(
            words.ends_with(" web`") && !words.contains("MUST BE"),
            "{words}"
        );
        primary.unpause().expect("it runs again");
        let cause = Cause {
            action: ProtectorAction::Stop,
            error: "pausing it: it cannot".into(),
        };
        let error = primary.ended(&Aftermath {
            end: End::Receiver,
            fate: Fate::There,
            complete: 7,
            hung_up: "",
            causes: &[cause],
        });
        assert!(error.to_string().contains("AND MUST BE"), "{error}");
    }

    #[test]
    fn a_domain_that_another_program_has_unpaused_is_not_said_to_be_paused() {
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
        let ended = || {
            let error = primary.ended(&Aftermath {
                end: End::Receiver,
                fate: Fate::Unknown,
                complete: 7,
                hung_up: "",
                causes: &[],
            });
            error.to_string()
        };
        primary.pause().expect("it is paused");
        let words = ended();
        assert!(words.contains("Here it is paused"), "{words}");
        assert!(words.contains("xl unpause"), "{words}");
        domain.unpause().expect("it runs");
        let words = ended();
        assert!(!words.contains("Here it is paused"), "{words}");
        assert!(words.contains("IT RUNS"), "{words}");
        assert!(!words.contains("xl unpause"), "{words}");
        domain.suspend().expect("it is suspended");
        let words = ended();
        assert!(words.contains("Here it is suspended"), "{words}");
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
        // Another domain has its number.
        let mut later = which;
        later.uuid.0[0] ^= 1;
        let earlier = Primary {
            which: later,
            ..primary
        };
        assert_eq!(earlier.condition(), Condition::Gone);
        earlier.pause().expect("it does not run");
        earlier.unpause().expect("there is nothing to be done");
        earlier.stop().expect("it does not run");
        assert_eq!(earlier.runs_on(), None);
        assert_eq!(primary.condition(), Condition::Runs);
        assert_eq!(primary.runs_on(), Some("running"));
        domain.destroy().expect("it goes");
        assert_eq!(primary.condition(), Condition::Gone);
        primary.pause().expect("it does not run");
        primary.unpause().expect("there is nothing to be done");
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
            let error = primary.ended(&Aftermath {
                end,
                fate,
                complete: 7,
                hung_up: "",
                causes: &[],
            });
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
