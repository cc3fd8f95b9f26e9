//! The state of a domain, in words: whether it can be saved or sent, and what has become of it
//! after a failure.

use xsr_save_restore::migrate::ownership::protect::Here;
use xsr_xen_backend::Errno;
use xsr_xen_backend::domain_store::{Blame, DomainRef, DomainStore, DomainStoreError};
use xsr_xen_backend::{BackendError, Domain, DomainInfo, ShutdownReason};

use crate::args::Backend;
use crate::backend::domain_command;
use crate::exit;

/// The state of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Runs,
    Paused,
    /// It waits for a resume.
    Suspended,
    /// It has shut down, for another reason than to be saved.
    Down(ShutdownReason),
    /// It has been destroyed, or is being destroyed.
    Gone,
    /// The hypervisor does not tell.
    Unknown(BackendError),
}

impl Condition {
    /// Ask the hypervisor.
    pub(crate) fn of(domain: &dyn Domain) -> Self {
        Self::from_info(domain.info())
    }

    /// Ask the hypervisor, after checking that the number has not been reused by a later domain.
    pub(crate) fn in_store(host: &dyn DomainStore, domain: DomainRef) -> Self {
        match host.look_up(domain) {
            Ok(info) => Self::from_info(Ok(info)),
            Err(DomainStoreError::Backend(error)) => Self::from_info(Err(error)),
            Err(error) if error.blame() == Blame::Domain => Self::Gone,
            Err(error) => Self::Unknown(
                BackendError::domain("getdomaininfo", domain.domid, Errno::EIO)
                    .explained(exit::words_of(&error)),
            ),
        }
    }

    /// In words, of a domain after a failure; `None` if it is not known.
    pub(crate) fn fate(&self) -> Option<&'static str> {
        match self {
            Self::Paused => Some("stays paused"),
            Self::Runs => Some("runs on"),
            Self::Suspended => Some("is left suspended"),
            Self::Down(_) => Some("is left shut down: start it anew, or destroy it"),
            Self::Gone => Some("is gone"),
            Self::Unknown(_) => None,
        }
    }

    fn from_info(info: Result<DomainInfo, BackendError>) -> Self {
        match info {
            Ok(info) if info.dying => Self::Gone,
            Ok(info) => match info.shutdown {
                None if info.paused => Self::Paused,
                None => Self::Runs,
                Some(ShutdownReason::Suspend) => Self::Suspended,
                Some(reason) => Self::Down(reason),
            },
            Err(error) if error.errno == Errno::ESRCH => Self::Gone,
            Err(error) => Self::Unknown(error),
        }
    }

    /// The state as a protection that has ended needs it.
    pub(crate) fn here(&self) -> Here {
        match self {
            Self::Runs | Self::Paused => Here::Runs,
            Self::Suspended => Here::Suspended,
            Self::Down(_) => Here::Over,
            Self::Gone => Here::Gone,
            Self::Unknown(_) => Here::Unknown,
        }
    }

    /// Why the domain cannot be asked to suspend, and what to do; `None` if it can. Best asked
    /// before its memory is sent.
    pub(crate) fn refusal(&self, name: &str, backend: &Backend) -> Option<String> {
        let command = |verb: &str| domain_command(backend, verb, name);
        Some(match self {
            Self::Runs | Self::Unknown(_) => return None,
            Self::Paused => format!(
                "it is paused, and a paused domain cannot suspend: first `{}`",
                command("unpause")
            ),
            Self::Suspended => format!(
                "it is suspended already: by a save or migration that is under way, or by one \
                 that was killed; after the latter `{}`, but after `remus` only if the other host \
                 does not run it",
                command("resume")
            ),
            Self::Down(reason) => format!(
                "it has shut down ({reason}): start it anew, or destroy what is left of it: `{}`",
                command("destroy")
            ),
            Self::Gone => "it has been destroyed".to_owned(),
        })
    }

    /// What has become of the domain `name`, which a command has failed to move, and what to do. It
    /// runs nowhere else.
    pub(crate) fn after_failure(&self, name: &str, backend: &Backend) -> String {
        let command = |verb: &str| domain_command(backend, verb, name);
        match self {
            Self::Runs => format!("{name} runs on here"),
            Self::Paused => format!("{name} is paused here"),
            Self::Suspended => format!(
                "{name} is still suspended here, and runs nowhere else: `{}`",
                command("resume")
            ),
            Self::Down(reason) => format!(
                "{name} has shut down ({reason}) here: start it anew, or destroy what is left of \
                 it: `{}`",
                command("destroy")
            ),
            Self::Gone => format!("{name} has been destroyed here, and runs nowhere"),
            Self::Unknown(error) => {
                format!("the state of {name} here could not be determined ({error})")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
    use xsr_xen_backend::{DomId, GuestKind, Host as _};

    use super::*;

    #[test]
    fn only_what_sleeps_is_to_be_resumed() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
        let domid = host.create_guest(&spec).expect("a guest");
        let domain = host.domain(domid).expect("the domain");
        let info = domain.info().expect("what it is");
        let down = |shutdown| {
            let info = info.clone();
            Condition::from_info(Ok(DomainInfo { shutdown, ..info }))
        };
        let failed = |errno| {
            let error = BackendError::domain("getdomaininfo", DomId(1), errno);
            Condition::from_info(Err(error))
        };
        let backend = Backend::Mock("a".into());
        let dying = Condition::from_info(Ok(DomainInfo {
            dying: true,
            ..info.clone()
        }));
        for (condition, said) in [
            (down(None), "web runs on here"),
            (down(Some(ShutdownReason::Suspend)), "`xsr mock resume"),
            (down(Some(ShutdownReason::Poweroff)), "shut down (poweroff)"),
            (down(Some(ShutdownReason::SoftReset)), "(soft reset)"),
            (failed(Errno::ESRCH), "has been destroyed"),
            (dying, "has been destroyed"),
            (failed(Errno::EPERM), "EPERM"),
        ] {
            // A domain that may have to run at the other end is not taken back.
            let may_run_there = matches!(condition, Condition::Suspended | Condition::Unknown(_));
            assert_eq!(condition.here().is_taken_back(), !may_run_there);
            let words = condition.after_failure("web", &backend);
            assert!(words.contains(said), "{words}");
            let resumed = [Some(words), condition.refusal("web", &backend)]
                .into_iter()
                .flatten()
                .any(|words| words.contains("resume"));
            assert_eq!(resumed, condition == Condition::Suspended, "{condition:?}");
            let runs = matches!(condition, Condition::Runs | Condition::Unknown(_));
            assert_eq!(condition.refusal("web", &backend).is_none(), runs);
        }
    }
}
