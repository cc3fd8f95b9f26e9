//! The secondary of COLO: the domain runs here too, and each checkpoint makes it equal to the
//! primary.
//!
//! C implementation: `tools/libs/light/libxl_colo_restore.c`. It also compares networks and
//! replicates disks, which a mock guest lacks.

use std::io;

use anyhow::{Context as _, Result, bail};
use xsr_format::error::{DecodeError, ReadErrorCause};
use xsr_format::frame::Gfn;
use xsr_format::wrapper::libxl::CheckpointState;
use xsr_save_restore::migrate::connection::ConnectionWriter;
use xsr_save_restore::migrate::messages::{ColoWord, MessageError, Withdrawal};
use xsr_save_restore::progress::Cancelled;
use xsr_save_restore::toolstack::{
    Arrival, CheckpointRestoreToolstack, ColoRestoreToolstack, MissingStaticData, RestoreToolstack,
    ToolstackError, Turn,
};
use xsr_save_restore::{RestoreError, RestoreRequest};
use xsr_xen_backend::{DomId, Domain, ShutdownReason};

use super::checkpoints::{StandBy, Standby, Survival, survival};
use super::{Image, Made, Named};
use crate::backend::Hypervisor;
use crate::backend::workload;
use crate::exit;

impl<'a> Image<'a> {
    /// Create the domain and run it from checkpoint to checkpoint, until the primary is lost.
    /// Afterwards it is as it was at that moment: running, suspended, or at its first checkpoint
    /// and paused ([`Made::run_alone`]). `work`: a mock guest's workload here.
    ///
    /// # Errors
    ///
    /// As [`Image::stand_by`].
    pub(crate) fn run_beside(
        self,
        how: &StandBy<'a, '_>,
        work: Option<workload::Work>,
        made: &mut Option<Made>,
    ) -> Result<Survival> {
        let made = made.insert(self.plan.make(how.host, Named::StandingBy)?);
        let rings = made.rings()?;
        let domain = made.domain.as_ref();
        let mut back = ConnectionWriter::new(how.connection, how.wait);
        let mut secondary = Secondary {
            standby: Standby::new(how, made, self.around)?,
            domain,
            back,
            host: how.host,
            domid: made.domid(),
            work,
            working: None,
            ran: false,
        };
        let result = RestoreRequest::new(domain, rings)
            .threads(how.threads)
            .cpu(how.cpu)
            .keep(how.keep)
            .observe(&mut |progress| (how.progress)(progress))
            .read_colo(self.reader, &mut secondary, &mut back);
        let mut withdrawn = secondary.standby.withdrawn;
        drop(secondary);
        if let Err(RestoreError::Stream(error)) = &result
            && let ReadErrorCause::Decode(DecodeError::UnknownMandatory { kind }) = &error.cause
        {
            withdrawn |= Withdrawal::is_libxc_record(*kind);
        }
        survival(made, result, withdrawn)
    }
}

impl Made {
    /// Run the secondary, now the only copy, or pause it.
    ///
    /// # Errors
    ///
    /// It cannot run, for example because it has shut down; it is as it was.
    pub(crate) fn run_alone(&self, paused: bool) -> Result<()> {
        let domain = self.domain.as_ref();
        if let Err(error) = domain.disable_log_dirty() {
            tracing::warn!(%error, "its dirty pages are still logged");
        }
        let info = domain.info()?;
        let suspended = info.shutdown == Some(ShutdownReason::Suspend);
        if let Some(reason) = info.shutdown.filter(|_| !suspended) {
            bail!("it has shut down by itself ({reason})");
        }
        match (paused, info.paused) {
            (true, false) => domain.pause().context("pausing the domain")?,
            (false, true) => domain.unpause().context("unpausing the domain")?,
            _ => {}
        }
        if suspended {
            domain.resume().context("letting the domain run on")?;
        }
        Ok(())
    }
}

/// The toolstack of such a domain.
struct Secondary<'a, 'd, 'w> {
    standby: Standby<'a, 'd, 'w>,
    domain: &'d dyn Domain,
    back: ConnectionWriter<'a>,
    host: &'w Hypervisor,
    domid: DomId,
    work: Option<workload::Work>,
    working: Option<workload::Working>,
    /// Whether it has run.
    ran: bool,
}

impl Secondary<'_, '_, '_> {
    /// Report the secondary's state to the primary.
    fn tell(&mut self, what: &'static str, state: CheckpointState) -> Result<Turn, ToolstackError> {
        match ColoWord::State(state).write(self.back) {
            Ok(()) => Ok(Turn::Done),
            Err(error) if Cancelled::is(&error) => Err(ToolstackError::new(what, error)),
            Err(error) => {
                tracing::info!(%error, "the primary takes nothing any more");
                Ok(Turn::Lost)
            }
        }
    }
}

impl RestoreToolstack for Secondary<'_, '_, '_> {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        self.standby.static_data_done(missing)
    }

    fn restore_results(
        &mut self,
        store_gfn: Option<Gfn>,
        console_gfn: Option<Gfn>,
    ) -> Result<(), ToolstackError> {
        self.standby.restore_results(store_gfn, console_gfn)
    }
}

impl CheckpointRestoreToolstack for Secondary<'_, '_, '_> {
    fn checkpoint(&mut self, offset: u64) -> Result<Arrival, ToolstackError> {
        self.standby.checkpoint(offset)
    }
}

impl ColoRestoreToolstack for Secondary<'_, '_, '_> {
    fn postcopy(&mut self) -> Result<Turn, ToolstackError> {
        const WHAT: &str = "letting the secondary run";
        let failed = |error| ToolstackError::new(WHAT, error);
        if self.tell(WHAT, CheckpointState::Ready)? == Turn::Lost {
            return Ok(Turn::Lost);
        }
        if std::mem::replace(&mut self.ran, true) {
            self.domain.resume().map_err(failed)?;
        } else {
            self.domain.enable_log_dirty().map_err(failed)?;
            self.domain.unpause().map_err(failed)?;
            if let Some(spec) = self.work.take() {
                let work = workload::run(self.host, self.domid, &spec);
                self.working = work.map_err(|error| ToolstackError::new(WHAT, error))?;
            }
        }
        self.tell(WHAT, CheckpointState::Resumed)
    }

    fn wait_checkpoint(&mut self) -> Result<Arrival, ToolstackError> {
        const WHAT: &str = "waiting for a checkpoint";
        match ColoWord::read(&mut self.standby.source) {
            Ok(ColoWord::State(CheckpointState::New)) => Ok(Arrival::Whole {
                bytes: ColoWord::BYTES as u64,
            }),
            Ok(ColoWord::Withdrawn) => {
                self.standby.withdrawn = true;
                let why = io::Error::other("the primary has taken the domain back");
                Err(ToolstackError::new(WHAT, why))
            }
            Ok(ColoWord::State(state)) => Err(ToolstackError::new(
                WHAT,
                format!("the primary said {state:?}, expected New"),
            )),
            Err(MessageError::Waiting { cause, .. }) if Cancelled::is(&cause) => {
                Err(ToolstackError::new(WHAT, cause))
            }
            Err(error @ MessageError::Record { .. }) => Err(ToolstackError::new(WHAT, error)),
            Err(error) => {
                tracing::info!(
                    error = exit::words_of(&error),
                    "the primary says nothing any more"
                );
                Ok(Arrival::Lost)
            }
        }
    }

    fn suspend(&mut self) -> Result<Turn, ToolstackError> {
        const WHAT: &str = "suspending the secondary";
        let suspended = self.domain.suspend();
        suspended.map_err(|error| ToolstackError::new(WHAT, error))?;
        self.tell(WHAT, CheckpointState::Suspended)
    }
}
