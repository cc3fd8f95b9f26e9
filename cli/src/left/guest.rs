//! How a guest would be left if the process ended now, in words: for the user who ends it the
//! hard way.

use std::sync::{Arc, OnceLock};

use xsr_xen_backend::mock::{DomainState, DomainSummary, MockHost};
use xsr_xen_backend::{DomId, Domain, ShutdownReason};

use super::{Left, State};
use crate::args::Backend;
use crate::backend::domain_command;
use crate::cmd::migrate::AWAY;

/// A domain of a mock machine that is saved, or sent to `to`. Until the command is over.
pub(crate) fn leaving(
    host: &MockHost,
    domid: DomId,
    name: &str,
    backend: &Backend,
    to: Option<Sent>,
) {
    let (host, name, backend) = (host.clone(), name.to_owned(), backend.clone());
    let describe = move || {
        let domains = host.list();
        let now = domains.iter().find(|domain| domain.domid == domid);
        Some(left(now, &name, &backend, to.as_ref()))
    };
    Left::guest(describe).until_the_end();
}

/// Where a domain is being sent.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    /// The other end.
    pub(crate) host: String,
    /// Whether the other end runs the domain once it has lost this one (Remus, COLO).
    pub(crate) protected: bool,
}

fn left(now: Option<&DomainSummary>, name: &str, backend: &Backend, to: Option<&Sent>) -> State {
    let Some(now) = now else {
        return State::plain(format!("{name} is gone here"));
    };
    let command = |verb: &str, rest: &str| domain_command(backend, verb, rest);
    let called = &now.name;
    let how = match now.state {
        DomainState::Running => "runs",
        DomainState::Paused => "is paused",
        DomainState::Suspended => "is suspended",
        DomainState::Shutdown => "has shut down",
    };
    let resume = match now.state {
        DomainState::Suspended => format!(": `{}`", command("resume", name)),
        DomainState::Paused => format!(": `{}`", command("unpause", name)),
        DomainState::Running | DomainState::Shutdown => String::new(),
    };
    match to {
        Some(Sent {
            host,
            protected: false,
        }) if called.ends_with(AWAY) => State {
            words: format!(
                "{name} {how} here, as {called}; {host} had been told to run it, and may: look \
                 there, once its migrate-receive has ended. If {name} is there, `{}`. If not, \
                 `{}` && `{}`",
                command("destroy", called),
                command("rename", &format!("{called} {name}")),
                command("resume", name),
            ),
            undecided: true,
        },
        Some(Sent {
            host,
            protected: true,
        }) => State {
            words: format!(
                "{called} {how} here, unprotected{resume}; {host} runs it too if it has had a \
                 checkpoint: it must never run at both ends, so destroy one"
            ),
            undecided: true,
        },
        Some(Sent { host, .. }) => State::plain(format!(
            "{called} {how} here{resume}; it does not run on {host}"
        )),
        None => State::plain(format!("{called} {how} here{resume}")),
    }
}

/// A domain of a mock machine that is about to be made for `name`. Tell the second value its
/// number once it has one; drop the first when the domain is destroyed.
pub(crate) fn arriving(host: &MockHost, name: &str) -> (Left, Arc<OnceLock<DomId>>) {
    let number = Arc::new(OnceLock::new());
    let (made, host, name) = (Arc::clone(&number), host.clone(), name.to_owned());
    let left = Left::guest(move || {
        let domid = *made.get()?;
        let domains = host.list();
        let now = domains.iter().find(|domain| domain.domid == domid)?;
        let called = &now.name;
        let dir = host.directory();
        let dir = dir.map_or_else(|| "memory".into(), |dir| dir.display().to_string());
        Some(State::plain(match now.state {
            DomainState::Running => format!("{called} runs here, as {domid} of mock:{dir}"),
            _ => format!(
                "{called}, made for {name}, is left half made as {domid} of mock:{dir}, and must \
                 not run: `xsr mock destroy --host {dir} {}`",
                domid.0
            ),
        }))
    });
    (left, number)
}

/// A guest that is about to be made on a mock machine, by this process alone.
pub(crate) fn making(host: &MockHost, name: &str) -> Left {
    let (host, name) = (host.clone(), name.to_owned());
    let before: Vec<DomId> = host.list().iter().map(|domain| domain.domid).collect();
    Left::guest(move || {
        let domains = host.list();
        let now = domains
            .iter()
            .find(|domain| !before.contains(&domain.domid))?;
        let domid = now.domid;
        let dir = host.directory()?.display();
        Some(State::plain(format!(
            "{name} is left half made, as {domid}: `xsr mock destroy --host {dir} {}`",
            domid.0
        )))
    })
}

/// A domain of a real host, which is saved or has been `made`, once there is a handle on it.
pub(crate) fn direct(name: &str, made: bool) -> (Left, Arc<OnceLock<Box<dyn Domain>>>) {
    let handle: Arc<OnceLock<Box<dyn Domain>>> = Arc::new(OnceLock::new());
    let (domain, name) = (Arc::clone(&handle), name.to_owned());
    let left = Left::guest(move || {
        let info = domain.get()?.info();
        let how = match &info {
            Ok(info) if info.shutdown == Some(ShutdownReason::Suspend) => "is suspended",
            Ok(info) if info.shutdown.is_some() => "has shut down",
            Ok(info) if info.paused => "is paused",
            Ok(_) => "runs",
            Err(_) => "is gone, or cannot be asked",
        };
        let then = match (made, how) {
            (_, "runs") | (false, "is paused" | "has shut down") => "",
            (true, _) => "; it is half made and must not run: `xl destroy` it",
            (false, _) => "; restore it from an image, or `xl destroy` it and start it anew",
        };
        Some(State::plain(format!("{name} {how} here{then}")))
    });
    (left, handle)
}

#[cfg(test)]
mod tests {
    use xsr_xen_backend::GuestKind;
    use xsr_xen_backend::Host as _;
    use xsr_xen_backend::mock::{GuestSpec, HostConfig};

    use super::*;

    #[test]
    fn a_guest_is_described_as_it_is() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let guest = GuestSpec::new("web", GuestKind::Pvh, 8);
        let domid = host.create_guest(&guest).expect("a guest");
        let domain = host.domain(domid).expect("the domain");
        let backend = Backend::Mock("/lab".into());
        let sent = |protected| Sent {
            host: "b".to_owned(),
            protected,
        };
        let state = |to: Option<&Sent>| {
            let domains = host.list();
            left(domains.first(), "web", &backend, to)
        };
        assert_eq!(state(None), State::plain("web runs here"));
        domain.suspend().expect("suspended");
        let resume = "web is suspended here: `xsr mock resume --host /lab web`";
        assert_eq!(state(None), State::plain(resume));
        let said = state(Some(&sent(false)));
        assert!(
            !said.undecided && said.words.starts_with(resume),
            "{said:?}"
        );
        host.rename(domid, &format!("web{AWAY}")).expect("renamed");
        let said = state(Some(&sent(false)));
        assert!(said.undecided, "{said:?}");
        for part in [
            "web is suspended here, as web--migratedaway; b had been told",
            "rename --host /lab web--migratedaway web",
            "destroy --host /lab web--migratedaway",
        ] {
            assert!(said.words.contains(part), "{said:?}");
        }
        assert!(state(Some(&sent(true))).undecided);
        domain.destroy().expect("destroyed");
        assert_eq!(state(None), State::plain("web is gone here"));
    }

    #[test]
    fn a_domain_that_is_being_made_is_described_once_it_has_a_number() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let (left, number) = arriving(&host, "web");
        assert!(super::super::is_work());
        let domid = host
            .create_domain(GuestKind::Pvh, 1, 2048)
            .expect("a domain");
        number.set(domid).expect("a number");
        let (said, _) = super::super::describe();
        assert!(
            said.iter()
                .any(|line| line.contains("made for web, is left half made")),
            "{said:?}"
        );
        drop(left);
    }
}
