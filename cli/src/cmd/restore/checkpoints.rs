//! Restores a domain from a stream of checkpoints: it has the state of the last complete one once
//! the sender is lost.
//!
//! C implementation: `libxl_stream_read.c`, between a CHECKPOINT of the libxc layer and its own
//! CHECKPOINT_END.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use anyhow::{Error, Result, bail};
use xsr_format::error::ReadErrorCause;
use xsr_format::frame::Gfn;
use xsr_format::walk::Around;
use xsr_format::wrapper::libxl::{LibxlError, LibxlRecord};
use xsr_save_restore::migrate::connection::{Connection, ConnectionReader, Wait};
use xsr_save_restore::migrate::messages::Withdrawal;
use xsr_save_restore::progress::Progress;
use xsr_save_restore::restore::checkpoint::{CheckpointOptions, Ending, Survivor, is_loss};
use xsr_save_restore::toolstack::{
    Arrival, CheckpointRestoreToolstack, MissingStaticData, RestoreToolstack, ToolstackError,
};
use xsr_save_restore::{CpuCheck, RestoreError, RestoreRequest};

use super::direct::Toolstack;
use super::source::ImageSource;
use super::{Image, Made, Named, of_emulator};
use crate::backend::{self, Hypervisor};
use crate::exit::{self, Withdrawn};

/// The checkpoint from which a domain took over.
#[derive(Clone, Debug)]
pub(crate) struct Survival {
    /// The checkpoint's number.
    pub(crate) checkpoint: u64,
    /// The most bytes of a checkpoint that were kept until it was complete.
    pub(crate) most_kept_bytes: u64,
    /// The most of these bytes that were in the file.
    pub(crate) most_spilt_bytes: u64,
    /// Why there were no more checkpoints.
    pub(crate) why: String,
}

/// Parameters for keeping a domain.
pub(crate) struct StandBy<'a, 'w> {
    /// The connection of the stream.
    pub(crate) connection: &'a dyn Connection,
    /// How long to wait for it.
    pub(crate) wait: Wait<'a>,
    pub(crate) host: &'w Hypervisor,
    pub(crate) threads: Option<NonZeroUsize>,
    /// What to do if this host lacks CPU features that the guest has seen.
    pub(crate) cpu: CpuCheck,
    pub(crate) keep: &'w CheckpointOptions,
    /// Called with the progress.
    pub(crate) progress: &'w dyn Fn(&Progress) -> ControlFlow<()>,
    /// Called with the domain's name when it can take over for the first time.
    pub(crate) first: &'w dyn Fn(&str),
}

impl<'a> Image<'a> {
    /// Create the domain, and keep it at the last complete checkpoint, until the sender is lost. It
    /// is paused all the time. `made` is the domain, even after a failure.
    ///
    /// # Errors
    ///
    /// Also when the sender takes the domain back ([`Withdrawn`]). The domain is then of no use.
    pub(crate) fn stand_by(
        self,
        how: &StandBy<'a, '_>,
        made: &mut Option<Made>,
    ) -> Result<Survival> {
        let made = made.insert(self.plan.make(how.host, Named::StandingBy)?);
        let rings = made.rings()?;
        let domain = made.domain.as_ref();
        let mut standby = Standby::new(how, made, self.around)?;
        let result = RestoreRequest::new(domain, rings)
            .threads(how.threads)
            .cpu(how.cpu)
            .keep(how.keep)
            .observe(&mut |progress| (how.progress)(progress))
            .read_checkpoints(self.reader, &mut standby);
        let withdrawn = standby.withdrawn;
        survival(made, result, withdrawn)
    }
}

/// The result of keeping a domain. `withdrawn`: the sender has taken it back.
pub(super) fn survival<S>(
    made: &mut Made,
    result: Result<Survivor<S>, RestoreError>,
    withdrawn: bool,
) -> Result<Survival> {
    let survivor = match result {
        Err(_) if withdrawn => return Err(Error::new(Withdrawn)),
        Err(error) => return Err(error.into()),
        Ok(survivor) if survivor.checkpoints == 0 => {
            bail!("the sender sent a plain migration: run migrate-receive without -r for it")
        }
        Ok(survivor) => survivor,
    };
    made.connect(&survivor.restored)?;
    Ok(Survival {
        checkpoint: survivor.checkpoints,
        most_kept_bytes: survivor.most_kept_bytes,
        most_spilt_bytes: survivor.most_spilt_bytes,
        why: match survivor.ending {
            Ending::Ended(_) => "the sender ended the stream".to_owned(),
            Ending::SourceLost(error) => exit::words_of(&error),
            Ending::BackChannelLost(error) => error.to_string(),
            Ending::ToolstackLost => "the stream broke off in the end of a checkpoint".to_owned(),
        },
    })
}

/// The toolstack of such a domain.
pub(super) struct Standby<'a, 'd, 'w> {
    direct: Toolstack<'d>,
    around: Around<ImageSource<'a>>,
    /// The engine's connection, for libxl's records.
    pub(super) source: ImageSource<'a>,
    made: &'d Made,
    /// The hash of the emulators' state in the last complete checkpoint, which is stored with the
    /// domain; `None` before there is any.
    emulators: Option<u64>,
    /// Whether the sender has taken the domain back.
    pub(super) withdrawn: bool,
    /// Called with the domain's name when the first checkpoint is complete.
    first: &'w dyn Fn(&str),
    any: bool,
}

impl<'a, 'd, 'w> Standby<'a, 'd, 'w> {
    pub(super) fn new(
        how: &StandBy<'a, 'w>,
        made: &'d Made,
        around: Around<ImageSource<'a>>,
    ) -> Result<Self> {
        let reader = ConnectionReader::new(how.connection, how.wait)?;
        Ok(Self {
            direct: made.toolstack(),
            around,
            source: ImageSource::over(reader),
            made,
            emulators: None,
            withdrawn: false,
            first: how.first,
            any: false,
        })
    }

    /// Store the emulators' state with the domain. After that a checkpoint is complete: the domain
    /// needs nothing more when the sender is lost.
    fn keep_emulators(&mut self, records: Vec<LibxlRecord>) -> Result<(), ToolstackError> {
        const WHAT: &str = "keeping the emulators' state of a checkpoint";
        let emulators: Vec<LibxlRecord> = records.into_iter().filter(of_emulator).collect();
        let hash = backend::hash_emulators(&emulators);
        let hash = hash.map_err(|error| ToolstackError::new(WHAT, error))?;
        if self.emulators != Some(hash) {
            let (store, which) = (self.made.store(), self.made.which());
            let stored = backend::store_emulators(store, which, &emulators);
            stored.map_err(|error| ToolstackError::new(WHAT, error))?;
            self.emulators = Some(hash);
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
            Ok((records, bytes)) => {
                self.keep_emulators(records)?;
                if !std::mem::replace(&mut self.any, true) {
                    (self.first)(self.made.name());
                }
                Ok(Arrival::Whole { bytes })
            }
            Err(error) if is_loss(&error) => Ok(Arrival::Lost),
            Err(error) => {
                self.withdrawn = matches!(
                    &error.cause,
                    ReadErrorCause::Libxl(LibxlError::UnknownMandatory { kind })
                        if Withdrawal::is_libxl_record(*kind)
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
    use xsr_xen_backend::{GuestKind, NewDomain};

    use super::*;
    use crate::exit::{self, LeftBehind};
    use crate::left::Left;

    /// A copy that cannot be destroyed must not be reported as gone.
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
        // The same if the restore did not even begin.
        let (domid, made) = make();
        host.domain(domid).expect("it").destroy().expect("it goes");
        let error = made.rings().expect_err("it has no ports");
        let error = made.given_up(error);
        assert!(!error.is::<LeftBehind>());
        // A running copy is paused first.
        let (domid, made) = make();
        let domain = host.domain(domid).expect("the domain");
        domain.unpause().expect("it is let run");
        assert!(!domain.info().expect("what it is").paused);
        assert!(made.stands_still() && made.stands_still());
        assert!(domain.info().expect("what it is").paused);
        // The machine refuses: it cannot store the domain's new state.
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
