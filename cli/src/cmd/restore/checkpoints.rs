//! A domain that is restored from a stream of checkpoints, and is the last of them that
//! was complete once the sender is lost.
//!
//! C implementation: `libxl_stream_read.c`: what it does between a CHECKPOINT of the libxc
//! layer and its own CHECKPOINT_END.

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::sync::Arc;

use anyhow::{Error, Result};
use xsr_format::error::ReadErrorCause;
use xsr_format::frame::Gfn;
use xsr_format::walk::Around;
use xsr_format::wrapper::libxl::{LibxlError, LibxlRecord};
use xsr_save_restore::pace::ReadLimit;
use xsr_save_restore::restore::checkpoint::{CheckpointOptions, Ending, Survivor, is_loss};
use xsr_save_restore::toolstack::{
    Arrival, CheckpointRestoreToolstack, DirectToolstack, MissingStaticData, RestoreToolstack,
    ToolstackError,
};
use xsr_save_restore::{RestoreError, restore_checkpointed};

use super::source::ImageSource;
use super::{Image, Made, Named, of_emulator};
use crate::backend::{self, Hypervisor};
use crate::exit::Withdrawn;
use crate::file::Input;
use crate::handshake;
use crate::watch::Watch;

/// What a domain that took over came from.
#[derive(Clone, Debug)]
pub(crate) struct Survival {
    /// Which checkpoint it is.
    pub(crate) checkpoint: u64,
    /// Most octets of a checkpoint that were kept until it was complete.
    pub(crate) most_kept_octets: u64,
    /// Most of them in the file.
    pub(crate) most_spilt_octets: u64,
    /// Why there was no other.
    pub(crate) why: String,
}

/// How a domain is kept.
pub(crate) struct StandBy<'a, 'w> {
    /// What the stream comes from.
    pub(crate) input: &'a Input,
    /// How long the sender may send nothing; lifted by `first`.
    pub(crate) limit: &'w Arc<ReadLimit>,
    pub(crate) host: &'w Hypervisor,
    pub(crate) threads: Option<NonZeroUsize>,
    pub(crate) keep: &'w CheckpointOptions,
    pub(crate) watch: &'w RefCell<&'w mut Watch>,
    /// Called with its name when it can take over for the first time.
    pub(crate) first: &'w dyn Fn(&str),
}

impl<'a> Image<'a> {
    /// Make the domain and keep it at the last checkpoint that is complete, until the
    /// sender is lost. It is paused then, and was all the time.
    ///
    /// # Errors
    ///
    /// Also when the sender takes the domain back ([`Withdrawn`]). The domain is destroyed.
    pub(crate) fn stand_by(self, how: &StandBy<'a, '_>) -> Result<(Made, Survival)> {
        let made = self.plan.make(how.host, Named::Incoming)?;
        outcome(made, |made| {
            let options = made.options(how.threads)?;
            let domain = made.domain.as_ref();
            let mut standby = Standby::new(how, made, self.around)?;
            let result = restore_checkpointed(
                domain,
                self.reader,
                &mut standby,
                &options,
                how.keep,
                &mut |progress| how.watch.borrow_mut().progress(progress),
            );
            Ok((result, standby.withdrawn))
        })
    }
}

/// What `keep` came to, and whether the sender has taken the domain back.
type Kept<S> = Result<(Result<Survivor<S>, RestoreError>, bool)>;

/// The domain that is the last checkpoint, as `keep` keeps it; if there is none, there is no
/// domain, or it is said that there is.
pub(super) fn outcome<S>(
    mut made: Made,
    keep: impl FnOnce(&Made) -> Kept<S>,
) -> Result<(Made, Survival)> {
    let survivor = match keep(&made) {
        Err(error) => return Err(made.given_up(error)),
        Ok((Err(_), true)) => return Err(made.given_up(Error::new(Withdrawn))),
        Ok((Err(error), false)) => return Err(made.given_up(error.into())),
        Ok((Ok(survivor), _)) if survivor.checkpoints == 0 => {
            let why = "the sender sent a plain migration: run migrate-receive without -r for it";
            return Err(made.given_up(Error::msg(why)));
        }
        Ok((Ok(survivor), _)) => survivor,
    };
    if let Err(error) = made.connect(&survivor.restored) {
        return Err(made.given_up(error));
    }
    let survival = Survival {
        checkpoint: survivor.checkpoints,
        most_kept_octets: survivor.most_kept_octets,
        most_spilt_octets: survivor.most_spilt_octets,
        why: match survivor.ending {
            Ending::Ended(_) => "the sender ended the stream".to_owned(),
            Ending::SourceLost(error) => error.to_string(),
            Ending::BackChannelLost(error) => error.to_string(),
            Ending::ToolstackLost => "the stream broke off in the end of a checkpoint".to_owned(),
        },
    };
    Ok((made, survival))
}

/// The toolstack of such a domain.
pub(super) struct Standby<'a, 'd, 'w> {
    direct: DirectToolstack<'d>,
    around: Around<ImageSource<'a>>,
    /// The same descriptor that the engine reads from, for what is not its own.
    pub(super) source: ImageSource<'a>,
    made: &'d Made,
    /// What the emulators have in the last checkpoint that is whole: it is kept with the
    /// domain.
    emulators: Vec<LibxlRecord>,
    /// Whether the sender has taken the domain back.
    pub(super) withdrawn: bool,
    watch: &'w RefCell<&'w mut Watch>,
    /// Called with the domain's name when the first checkpoint is whole.
    first: &'w dyn Fn(&str),
    any: bool,
}

impl<'a, 'd, 'w> Standby<'a, 'd, 'w> {
    pub(super) fn new(
        how: &StandBy<'a, 'w>,
        made: &'d Made,
        around: Around<ImageSource<'a>>,
    ) -> Result<Self> {
        let cancel = how.watch.borrow().interrupt().cancel().clone();
        Ok(Self {
            direct: DirectToolstack(made.domain.as_ref()),
            around,
            source: ImageSource::limited(&how.input.file, cancel, how.limit)?,
            made,
            emulators: Vec::new(),
            withdrawn: false,
            watch: how.watch,
            first: how.first,
            any: false,
        })
    }

    /// Keep what the emulators have with the domain: a checkpoint counts when that is done,
    /// and the domain needs nothing more when the sender is lost.
    fn keep_emulators(&mut self, records: Vec<LibxlRecord>) -> Result<(), ToolstackError> {
        let emulators: Vec<LibxlRecord> = records.into_iter().filter(of_emulator).collect();
        if emulators != self.emulators {
            let (store, which) = (self.made.store(), self.made.which());
            let stored = backend::store_emulators(store, which, &emulators);
            stored.map_err(|error| {
                ToolstackError::new("keeping the emulators' state of a checkpoint", error)
            })?;
            self.emulators = emulators;
        }
        Ok(())
    }
}

impl RestoreToolstack for Standby<'_, '_, '_> {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        self.direct.static_data_done(missing)
    }

    fn restore_results(
        &mut self,
        store_gfn: Option<Gfn>,
        console_gfn: Option<Gfn>,
    ) -> Result<(), ToolstackError> {
        self.direct.restore_results(store_gfn, console_gfn)
    }
}

impl CheckpointRestoreToolstack for Standby<'_, '_, '_> {
    fn checkpoint(&mut self, offset: u64) -> Result<Arrival, ToolstackError> {
        match self.around.checkpoint(&mut self.source, offset) {
            Ok((records, octets)) => {
                self.keep_emulators(records)?;
                if !std::mem::replace(&mut self.any, true) {
                    self.watch.borrow_mut().step("checkpoint");
                    (self.first)(self.made.name());
                }
                Ok(Arrival::Whole { octets })
            }
            Err(error) if is_loss(&error) => Ok(Arrival::Lost),
            Err(error) => {
                self.withdrawn = matches!(
                    &error.cause,
                    ReadErrorCause::Libxl(LibxlError::UnknownMandatory { kind })
                        if handshake::WITHDRAWAL.contains(kind)
                );
                Err(ToolstackError::new(
                    "reading the end of a checkpoint",
                    error,
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use xsr_xen_backend::domain_store::DomainRef;
    use xsr_xen_backend::mock::{HostConfig, MockHost};
    use xsr_xen_backend::{Errno, GuestKind, NewDomain};

    use super::*;
    use crate::exit::{self, LeftBehind};
    use crate::left::Left;

    /// A copy that cannot be destroyed is not said to be gone.
    #[test]
    fn what_is_given_up_is_destroyed_or_said_to_be_left() {
        let dir = tempfile::tempdir().expect("a directory");
        let mock = MockHost::create(dir.path(), &HostConfig::default()).expect("a machine");
        let host = Hypervisor::from(mock);
        let make = || {
            let new = NewDomain::new(GuestKind::Pvh, 1, 256);
            let domid = host.create(&new).expect("a domain");
            let which = DomainRef {
                domid,
                uuid: new.uuid,
            };
            let made = Made::new(&host, which, "web", Left::work()).expect("the domain");
            (domid, made)
        };
        let (domid, made) = make();
        let error = made.given_up(Error::new(Withdrawn));
        assert!(error.is::<Withdrawn>() && !error.is::<LeftBehind>());
        assert!(host.domain(domid).is_err());
        // Another command has destroyed it.
        let (domid, made) = make();
        host.domain(domid).expect("it").destroy().expect("it goes");
        let error = made.given_up(Error::new(Withdrawn));
        assert!(error.is::<Withdrawn>() && !error.is::<LeftBehind>());
        // One that runs is stopped before.
        let (domid, made) = make();
        let domain = host.domain(domid).expect("the domain");
        domain.unpause().expect("it is let run");
        assert!(!domain.info().expect("what it is").paused);
        assert!(made.stands_still() && made.stands_still());
        assert!(domain.info().expect("what it is").paused);
        // The same where the restore did not even begin.
        let began = outcome::<()>(made, |_| Err(Error::msg("it has no ports")));
        let error = began.err().expect("there is no domain");
        assert!(!error.is::<LeftBehind>());
        let gone = host.domain(domid).map(drop).expect_err("it is gone");
        assert_eq!(gone.errno, Errno::ESRCH);
        // The machine refuses: it cannot write what becomes of the domain.
        let (domid, made) = make();
        let domains = dir.path().join("domains");
        std::fs::rename(&domains, dir.path().join("elsewhere")).expect("another name");
        let error = made.given_up(Error::new(Withdrawn));
        assert!(error.is::<Withdrawn>() && error.is::<LeftBehind>());
        let said = exit::words(error.chain());
        assert!(
            said.contains(&format!("{domid}, made for web, is left here")),
            "{said}"
        );
    }
}
