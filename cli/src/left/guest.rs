//! How a guest would be left if the process ended now, in words, for a user who ends it at once.

use std::sync::{Arc, OnceLock};

use xsr_xen_backend::domain_store::{DomainRef, DomainStore, DomainStoreError};

use super::{Left, State};
use crate::args::Backend;
use crate::backend::{Hypervisor, domain_command, handle_of, name_of};
use crate::cmd::migrate::away;
use crate::condition::Condition;

/// A domain that is saved, or sent to `to`. Registered until the command is over.
pub(crate) fn leaving(host: &Hypervisor, domain: DomainRef, name: &str, to: Option<Sent>) {
    let (host, name) = (host.clone(), name.to_owned());
    let describe = move || {
        let now = Now::of(&*host, domain, &name);
        Some(left(&now, &name, host.backend(), to.as_ref()))
    };
    Left::guest(describe).until_the_end();
}

/// The state of a domain at this moment, and its name.
struct Now {
    condition: Condition,
    called: String,
    /// What commands accept for it.
    handle: String,
}

impl Now {
    fn of(host: &dyn DomainStore, domain: DomainRef, name: &str) -> Self {
        Self {
            condition: Condition::in_store(host, domain),
            called: name_of(host, domain).unwrap_or_else(|_| name.to_owned()),
            handle: handle_of(host, domain).unwrap_or_else(|_| name.to_owned()),
        }
    }
}

/// The destination of a domain.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    /// The destination host.
    pub(crate) host: String,
    /// Whether the destination runs the domain when the connection is lost (Remus, COLO).
    pub(crate) protected: bool,
}

fn left(now: &Now, name: &str, backend: &Backend, to: Option<&Sent>) -> State {
    let command = |verb: &str, rest: &str| domain_command(backend, verb, rest);
    let Now { called, handle, .. } = now;
    let (how, then) = match &now.condition {
        Condition::Gone => return State::plain(format!("{name} is gone here")),
        Condition::Unknown(error) => (
            format!("is in a state here that could not be determined ({error})"),
            String::new(),
        ),
        Condition::Runs => ("runs here".to_owned(), String::new()),
        Condition::Paused => (
            "is paused here".to_owned(),
            format!(": `{}`", command("unpause", handle)),
        ),
        Condition::Suspended => (
            "is suspended here".to_owned(),
            format!(": `{}`", command("resume", handle)),
        ),
        Condition::Down(_) => ("has shut down here".to_owned(), String::new()),
    };
    match to {
        Some(Sent {
            host,
            protected: false,
        }) if *called == away(name) && now.condition == Condition::Runs => State::plain(format!(
            // It was taken back, but could not be renamed.
            "{name} {how}, as {called}, and not on {host}: `{}`",
            command("rename", &format!("{called} {name}"))
        )),
        Some(Sent {
            host,
            protected: false,
        }) if *called == away(name) => State {
            words: format!(
                "{name} {how}, as {called}; {host} had been told to run it, and may: look \
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
                "{called} {how}, unprotected{then}; {host} runs it too if it has had a \
                 checkpoint: it must never run at both ends, so destroy one"
            ),
            undecided: true,
        },
        Some(Sent { host, .. }) => {
            State::plain(format!("{called} {how}{then}; it does not run on {host}"))
        }
        None => State::plain(format!("{called} {how}{then}")),
    }
}

/// A domain that is about to be created for `name`. Set the second value when the domain exists;
/// drop the first when it is destroyed.
pub(crate) fn arriving(host: &Hypervisor, name: &str) -> (Left, Arc<OnceLock<DomainRef>>) {
    let domain = Arc::new(OnceLock::new());
    let (made, host, name) = (Arc::clone(&domain), host.clone(), name.to_owned());
    let left = Left::guest(move || {
        let domain: DomainRef = *made.get()?;
        let Now {
            condition, called, ..
        } = Now::of(&*host, domain, &name);
        let place = host.place_of(domain.domid);
        match condition {
            Condition::Gone => None,
            Condition::Runs => Some(State::plain(format!("{called} runs here, as {place}"))),
            _ => Some(State::plain(format!(
                "{called}, made for {name}, is left half made as {place}, and must not run: `{}`",
                domain_command(host.backend(), "destroy", &domain.domid.0.to_string())
            ))),
        }
    });
    (left, domain)
}

/// A guest that is about to be created on a mock machine.
pub(crate) fn making(host: &Hypervisor, name: &str) -> Left {
    let before = match host.find(name) {
        Ok(domain) => Some(Some(domain)),
        Err(DomainStoreError::NotFound { .. }) => Some(None),
        // Whatever is found later may be another guest.
        Err(_) => None,
    };
    let (host, name) = (host.clone(), name.to_owned());
    Left::guest(move || {
        let before = before?;
        let made = host.find(&name).ok().filter(|made| before != Some(*made))?;
        let domid = made.domid;
        Some(State::plain(format!(
            "{name} is left half made, as {domid}: `{}`",
            domain_command(host.backend(), "destroy", &domid.0.to_string())
        )))
    })
}

#[cfg(test)]
mod tests {
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
    use xsr_xen_backend::{GuestKind, NewDomain};

    use super::*;

    #[test]
    fn a_guest_is_described_as_it_is() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let guest = GuestSpec::new("web", GuestKind::Pvh, 8);
        host.create_guest(&guest).expect("a guest");
        let host = Hypervisor::from(host);
        let web = host.find("web").expect("the domain");
        let domain = host.open(web).expect("the domain");
        let backend = Backend::Mock("/lab".into());
        let sent = |protected| Sent {
            host: "b".to_owned(),
            protected,
        };
        let state = |to: Option<&Sent>| left(&Now::of(&*host, web, "web"), "web", &backend, to);
        assert_eq!(state(None), State::plain("web runs here"));
        domain.suspend().expect("suspended");
        let resume = "web is suspended here: `xsr mock resume --host /lab web`";
        assert_eq!(state(None), State::plain(resume));
        let said = state(Some(&sent(false)));
        assert!(
            !said.undecided && said.words.starts_with(resume),
            "{said:?}"
        );
        let away = away("web");
        host.rename(web, "web", &away).expect("renamed");
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
        // It was taken back, but another domain had its name by then.
        domain.resume().expect("it runs");
        let said = state(Some(&sent(false)));
        assert!(!said.undecided, "{said:?}");
        let rename = "runs here, as web--migratedaway, and not on b: `xsr mock rename --host /lab \
                      web--migratedaway web`";
        assert!(said.words.contains(rename), "{said:?}");
        domain.destroy().expect("destroyed");
        assert_eq!(state(None), State::plain("web is gone here"));
    }

    #[test]
    fn a_domain_without_a_name_is_named_to_commands_by_its_number() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let host = Hypervisor::from(host);
        let new = NewDomain::new(GuestKind::Pvh, 1, 2048);
        let domain = DomainRef {
            domid: host.create(&new).expect("a domain"),
            uuid: new.uuid,
        };
        let number = domain.domid.0;
        let name = format!("domain-{number}");
        let state = |condition| {
            let now = Now {
                condition,
                ..Now::of(&*host, domain, &name)
            };
            left(&now, &name, &Backend::Xen, None).words
        };
        for (condition, command) in [
            (Condition::Paused, format!("`xl unpause {number}`")),
            (
                Condition::Suspended,
                format!("`xsr resume --direct {number}`"),
            ),
        ] {
            let said = state(condition);
            assert!(said.starts_with(&name) && said.contains(&command), "{said}");
        }
    }

    #[test]
    fn a_domain_that_is_being_made_is_described_once_it_has_a_number() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let host = Hypervisor::from(host);
        let (left, domain) = arriving(&host, "web");
        assert!(super::super::is_work());
        let new = NewDomain::new(GuestKind::Pvh, 1, 2048);
        let made = DomainRef {
            domid: host.create(&new).expect("a domain"),
            uuid: new.uuid,
        };
        domain.set(made).expect("a domain");
        let (said, _) = super::super::describe();
        assert!(
            said.iter()
                .any(|line| line.contains("made for web, is left half made")),
            "{said:?}"
        );
        drop(left);
    }
}
