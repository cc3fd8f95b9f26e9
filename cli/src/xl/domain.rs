//! The domain of a save whose image is packed. xl has left it paused, and it is destroyed or runs
//! on once it is known whether there is an image.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use anyhow::{Result, bail};
use xsr_xen_backend::domain_store::DomainRef;

use super::child::run_briefly;
use super::words::Words;
use crate::args::Backend;
use crate::backend::Hypervisor;
use crate::condition::Condition;
use crate::exit::Aftermath;
use crate::left::{Left, State};
use crate::text::shown_name;

/// The domain, and what becomes of it.
#[derive(Debug)]
pub(super) struct Domain {
    xl: OsString,
    /// Its name or number on the command line.
    word: OsString,
    /// It, if this process can ask the hypervisor: by the time there is an image, its name may be
    /// another domain's.
    known: Option<(Hypervisor, DomainRef)>,
    after: After,
}

/// What becomes of the domain when its image is in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// xl lets it run on.
    Runs,
    /// xl leaves it paused.
    Paused,
    /// xl leaves it paused, and then it is destroyed.
    Destroyed,
}

impl Domain {
    /// The domain that `word` names.
    pub(super) fn new(xl: &Path, word: OsString, words: &Words) -> Self {
        let known = Hypervisor::direct(&Backend::Xen).ok().and_then(|host| {
            let which = host.find(word.to_str()?).ok()?;
            Some((host, which))
        });
        Self {
            xl: xl.into(),
            word,
            known,
            after: match (words.pauses, words.copies) {
                (true, _) => After::Paused,
                (false, true) => After::Runs,
                (false, false) => After::Destroyed,
            },
        }
    }

    fn name(&self) -> String {
        shown_name(&self.word.to_string_lossy())
    }

    /// Its state, if the hypervisor can be asked.
    fn condition(&self) -> Option<Condition> {
        let (host, which) = self.known.as_ref()?;
        Some(Condition::in_store(&**host, *which))
    }

    /// What commands of xl accept for it: its number, if that is known.
    fn handle(&self) -> OsString {
        match &self.known {
            Some((_, which)) => which.domid.0.to_string().into(),
            None => self.word.clone(),
        }
    }

    /// Registers how the domain is left until it is destroyed or runs on.
    pub(super) fn left(&self) -> Option<Left> {
        let name = self.name();
        let state = State::plain(format!("{name} is paused here: `xl unpause {name}`"));
        (self.after != After::Runs).then(|| Left::guest(move || Some(state.clone())))
    }

    /// The image is in its place: destroys the domain, unless it stays, or has gone on meanwhile.
    ///
    /// # Errors
    ///
    /// It was not destroyed, and why.
    pub(super) fn destroy(&self, file: &str) -> Result<()> {
        if self.after != After::Destroyed {
            return Ok(());
        }
        let destroyed = match self.condition() {
            None | Some(Condition::Paused) => self.ask_xl("destroy"),
            // The aim.
            Some(Condition::Gone) => Ok(()),
            Some(_) => bail!(
                "{file} is complete, but {} since it was saved, and was not destroyed: do not \
                 restore {file} while it is there",
                self.fate()
            ),
        };
        let name = self.name();
        destroyed.map_err(|error| {
            let after = format!(
                "{file} is complete, and {name} may be here still, paused: see `xl list`, and \
                 `xl destroy {name}` before {file} is restored"
            );
            Aftermath::of_guest(error, after)
        })
    }

    /// There is no image: lets the domain run on. Returns what has become of it.
    pub(super) fn unpause(&self) -> String {
        let is_paused = match self.condition() {
            None => self.after != After::Runs,
            Some(condition) => condition == Condition::Paused,
        };
        if is_paused && let Err(error) = self.ask_xl("unpause") {
            tracing::warn!("{error:#}");
            let name = self.name();
            return format!("{name} is left paused: `xl unpause {name}`");
        }
        match self.known {
            Some(_) => self.fate(),
            None => format!("{} runs on", self.name()),
        }
    }

    /// What has become of it.
    pub(super) fn fate(&self) -> String {
        let name = self.name();
        match self.condition().as_ref().and_then(Condition::fate) {
            Some(fate) => format!("{name} {fate}"),
            None => format!("see `xl list` for what has become of {name}"),
        }
    }

    fn ask_xl(&self, verb: &str) -> Result<()> {
        run_briefly(&self.xl, &[OsStr::new(verb), &self.handle()])
    }
}

#[cfg(test)]
mod tests {
    use xsr_xen_backend::GuestKind;
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};

    use super::*;

    /// No xl is there: whether it is asked shows in the error.
    #[test]
    fn a_domain_that_has_gone_on_is_not_destroyed() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
        host.create_guest(&spec).expect("a guest");
        let host = Hypervisor::from(host);
        let which = host.find("web").expect("the domain");
        let guest = host.open(which).expect("the domain");
        let domain = Domain {
            xl: "/nonexistent/xl".into(),
            word: "web".into(),
            known: Some((host, which)),
            after: After::Destroyed,
        };
        let said = |error: anyhow::Error| format!("{error:#}");
        let destroyed = domain.destroy("f").map_err(said);
        let error = destroyed.expect_err("it runs");
        assert!(
            error.starts_with("f is complete, but web runs on since"),
            "{error}"
        );
        assert_eq!(domain.unpause(), "web runs on");

        guest.suspend().expect("suspended");
        let error = domain
            .destroy("f")
            .map_err(said)
            .expect_err("it is suspended");
        assert!(error.contains("web is left suspended since"), "{error}");
        assert_eq!(domain.unpause(), "web is left suspended");
        guest.resume().expect("resumed");

        guest.pause().expect("paused");
        let number = which.domid.0;
        let error = domain
            .destroy("f")
            .map_err(said)
            .expect_err("there is no xl");
        let expected = format!(
            "`xl destroy {number}` has failed (exit status: 127); f is complete, and web may be \
             here still, paused: see `xl list`, and `xl destroy web` before f is restored"
        );
        assert!(
            error.contains("f is complete, and web may be here"),
            "{error} {expected}"
        );

        // Another domain has its name and number: it is not touched.
        guest.destroy().expect("destroyed");
        assert_eq!(domain.destroy("f").map_err(said), Ok(()));
        assert_eq!(domain.unpause(), "web is gone");
    }
}
