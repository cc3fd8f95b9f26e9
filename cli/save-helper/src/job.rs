//! The helper's job: a save or a restore between an inherited descriptor and a domain.

use std::error::Error as StdError;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result};
use xsr_format::frame::Gfn;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::back_channel::FdBackChannel;
use xsr_save_restore::error::GuestError;
use xsr_save_restore::inherited::inherited_stream;
use xsr_save_restore::save::mapped::MappedOptions;
use xsr_save_restore::save::{BUFFER_BYTES, Checkpoints};
use xsr_save_restore::sink::FdSink;
use xsr_save_restore::source::FdSource;
use xsr_save_restore::{
    Live, RestoreError, RestoreRequest, Restored, Rings, SaveError, SaveOptions,
};
use xsr_xen_backend::Errno;
use xsr_xen_backend::{BackendError, Domain, MapError};

use crate::args::{Args, RestoreArgs, SaveArgs, StreamType};
use crate::at_freeze::AtFreeze;
use crate::backend::Backend;
use crate::environment;
use crate::mapped::Target;
use crate::progress::Steps;
use crate::signals;
use crate::toolstack::Libxl;
use crate::wire::Wire;

/// The result of a job, as libxl is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// 0 or -1.
    pub(crate) retval: i32,
    /// 0, or the errno that best says why.
    pub(crate) errno: i32,
}

/// Do the job.
///
/// # Errors
///
/// It could not even begin: no hypervisor, no such descriptor. A save or restore that fails is an
/// [`Outcome`].
pub(crate) fn run(
    args: &Args,
    wire: &Wire,
    open: fn() -> Result<Box<dyn Backend>>,
) -> Result<Outcome> {
    // Before any thread starts.
    match args {
        Args::Save(_) => signals::cancel_on_signals(wire.cancel()),
        Args::Restore(_) => signals::end_on_sigterm(),
    }
    .context("setting up signals")?;
    let backend = open()?;
    let backend = backend.as_ref();
    let result = match args {
        Args::Save(args) => save(args, wire, backend),
        Args::Restore(args) => restore(args, wire, backend),
    };
    if let (Args::Restore(_), Err(_)) = (args, &result) {
        // libxl needs the frames of the rings before it is told the result, whatever that is.
        wire.restore_results(0, 0)?;
    }
    Ok(match result {
        Ok(()) => Outcome {
            retval: 0,
            errno: 0,
        },
        Err(error) => {
            let (words, advice) = (format!("{error:#}"), advice(&error));
            tracing::error!("{} failed: {words}{advice}", args.what());
            Outcome {
                retval: -1,
                errno: errno_of(error.as_ref()).raw(),
            }
        }
    })
}

/// The descriptor that libxl left open for us.
fn taken(fd: i32) -> Result<OwnedFd> {
    inherited_stream(fd).with_context(|| format!("the stream's descriptor {fd}"))
}

/// The back channel of COLO.
fn back_channel(what: &str, fd: i32) -> Result<OwnedFd> {
    if fd < 0 {
        // Nothing has been done to the guest yet: libxl resumes it.
        return Err(anyhow::Error::new(Errno::EINVAL)
            .context(format!("COLO needs a back-channel, and {what} is {fd}")));
    }
    taken(fd).with_context(|| format!("{what}, the back-channel"))
}

fn save(args: &SaveArgs, wire: &Wire, backend: &dyn Backend) -> Result<()> {
    let stream = taken(args.io_fd)?;
    let domain = backend.host().domain(args.domid)?;
    let domain = domain.as_ref();
    let mut at_freeze = AtFreeze::of(args, &stream, wire.cancel(), backend, domain)?;
    let result = save_domain(args, wire, backend, stream, domain, at_freeze.as_mut());
    if let Some(at_freeze) = at_freeze {
        at_freeze.conclude(result.is_ok());
    }
    result
}

fn save_domain(
    args: &SaveArgs,
    wire: &Wire,
    backend: &dyn Backend,
    stream: OwnedFd,
    domain: &dyn Domain,
    at_freeze: Option<&mut AtFreeze>,
) -> Result<()> {
    let cancel = wire.cancel();
    let mut mapped = target(args, &stream)?;
    let mut sink = FdSink::cancellable(stream, cancel.clone())?;
    let kind = domain.info()?.kind;
    let type_name = if kind.is_translated() { "HVM" } else { "PV" };
    tracing::info!("Saving domain {}, type x86 {type_name}", args.domid.0);
    let mut toolstack = Libxl {
        wire,
        callbacks: args.callbacks,
        domid: args.domid,
        guest: backend.stand_in(args.domid, domain, true)?,
    };
    let mut steps = Steps::new(wire, args.stream);
    let xen = backend.host().xen_version()?;
    let options = SaveOptions {
        threads: environment::threads()?,
    };
    let mut policy = environment::policy()?;
    // libxl serves a live save as any other: it switches its device model's log and suspends the
    // guest when it is asked to.
    let is_live = args.live || environment::live()?;
    let live = Live {
        policy: &mut *policy,
        verify: args.debug,
    };
    let mut on_progress = |progress: &_| steps.event(progress);
    let checkpointed = match args.stream {
        StreamType::Plain => None,
        StreamType::Remus => Some(
            xsr_save_restore::SaveRequest::new(domain, xen)
                .options(&options)
                .observe(&mut on_progress)
                .write_checkpoints(
                    &mut toolstack,
                    &mut sink,
                    Checkpoints {
                        policy: live.policy,
                        buffer_bytes: BUFFER_BYTES,
                    },
                )?,
        ),
        StreamType::Colo => {
            let recv = back_channel("RECV_FD", args.recv_fd)?;
            Some(
                xsr_save_restore::SaveRequest::new(domain, xen)
                    .options(&options)
                    .observe(&mut on_progress)
                    .write_colo(
                        &mut toolstack,
                        &mut sink,
                        &mut FdBackChannel::cancellable(recv, cancel.clone())?,
                        live.policy,
                    )?,
            )
        }
    };
    if let Some(stats) = checkpointed {
        // The guest continues, unprotected.
        tracing::info!("checkpoint {} was the last", stats.checkpoints);
        return Ok(());
    }
    let mut request = xsr_save_restore::SaveRequest::new(domain, xen)
        .options(&options)
        .observe(&mut on_progress);
    if is_live {
        request = request.live(live);
    }
    if let Some(at_freeze) = at_freeze {
        request = request.at_freeze(&mut at_freeze.program);
    }
    let saved = match mapped.take() {
        None => request.write_stream(&mut toolstack, &mut sink)?,
        Some((target, how)) => {
            let image = target.image(how)?;
            let saved = request.write_mapped(&mut toolstack, &image)?;
            let stats = image.finish(options.threads, &mut || cancel.check())?;
            tracing::debug!(?stats, "mapped");
            if !stats.has_index {
                tracing::warn!(
                    "the index of the mapped image outgrew its room in the xl header, and is \
                     missing: read the image with --ignore-index"
                );
            }
            target.end_at(stats.image_bytes)?;
            saved
        }
    };
    let stats = saved.stats();
    tracing::debug!(?stats, "saved");
    // From now on the guest is libxl's.
    saved.keep_suspended();
    steps.single("Complete");
    Ok(())
}

/// The file of a save in the mapped layout; `None` for the stream layout.
fn target(args: &SaveArgs, stream: &OwnedFd) -> Result<Option<(Target, MappedOptions)>> {
    let Some(options) = environment::mapped()? else {
        return Ok(None);
    };
    let found = match (args.stream, args.debug) {
        (StreamType::Plain, false) => Target::of(stream)?,
        (StreamType::Plain, true) => Err("all memory is sent twice"),
        _ => Err("checkpoints follow one another in it"),
    };
    Ok(match found {
        Ok(target) => Some((target, options)),
        Err(why) => {
            tracing::warn!("XSR_LAYOUT=mapped: {why}, so it gets the stream layout");
            None
        }
    })
}

fn restore(args: &RestoreArgs, wire: &Wire, backend: &dyn Backend) -> Result<()> {
    let source = FdSource::new(taken(args.io_fd)?);
    let domain = backend.host().domain(args.domid)?;
    let reader = RecordReader::new(source, ReadOptions::default())?;
    let header = reader.domain();
    tracing::info!(
        "Found {} domain from Xen {}.{}",
        header.guest_type,
        header.xen_major,
        header.xen_minor
    );
    tracing::info!("Restoring domain");
    let domain = domain.as_ref();
    let colo = args.stream == StreamType::Colo;
    let mut toolstack = Libxl {
        wire,
        callbacks: args.callbacks,
        domid: args.domid,
        // Only a COLO secondary has to be suspended and resumed.
        guest: match colo {
            true => backend.stand_in(args.domid, domain, false)?,
            false => None,
        },
    };
    let rings = Rings {
        store_port: args.store_port,
        store_domid: args.store_domid,
        console_port: args.console_port,
        console_domid: args.console_domid,
    };
    let mut on_progress = |_: &_| match wire.lost() {
        Some(_) => ControlFlow::Break(()),
        None => ControlFlow::Continue(()),
    };
    let request = RestoreRequest::new(domain, rings)
        .threads(environment::threads()?)
        .cpu(environment::cpu_check()?)
        .observe(&mut on_progress);
    let ring = |gfn: Option<Gfn>| gfn.map_or(0, |gfn| gfn.0);
    let restored = match args.stream {
        StreamType::Remus => {
            let survivor = request.read_checkpoints(reader, &mut toolstack)?;
            tracing::info!("the guest is checkpoint {}", survivor.checkpoints);
            survivor.restored
        }
        StreamType::Colo => {
            let back = back_channel("SEND_BACK_FD", args.send_back_fd)?;
            let survivor = request.read_colo(reader, &mut toolstack, &mut FdSink::new(back))?;
            tracing::info!("the guest goes on from checkpoint {}", survivor.checkpoints);
            let Restored {
                store_gfn,
                console_gfn,
                ..
            } = survivor.restored;
            // Once more, as at the end of every restore.
            wire.restore_results(ring(store_gfn), ring(console_gfn))?;
            survivor.restored
        }
        StreamType::Plain => request.read_stream(reader, &mut toolstack)?.0,
    };
    tracing::info!("Restore successful");
    tracing::info!(
        "XenStore: mfn {:#x}, dom {}, evt {}",
        ring(restored.store_gfn),
        args.store_domid.0,
        args.store_port
    );
    tracing::info!(
        "Console: mfn {:#x}, dom {}, evt {}",
        ring(restored.console_gfn),
        args.console_domid.0,
        args.console_port
    );
    Ok(())
}

/// Advice, if an environment variable can help.
fn advice(error: &anyhow::Error) -> &'static str {
    match error.downcast_ref() {
        Some(RestoreError::CpuFeatures(_)) => {
            "; choose a host that has it, or have the guest restored all the same with \
             XSR_PLAN=warn (or xsr restore --force)"
        }
        _ => "",
    }
}

/// The errno that best describes the failure: libxl shows it.
fn errno_of(error: &(dyn StdError + 'static)) -> Errno {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<BackendError>() {
            return error.errno;
        }
        if let Some(error) = error.downcast_ref::<MapError>() {
            return error.errno;
        }
        if let Some(errno) = error.downcast_ref::<Errno>() {
            return *errno;
        }
        if let Some(error) = error.downcast_ref::<io::Error>()
            && let Some(raw) = error.raw_os_error()
        {
            return Errno::from_raw(raw);
        }
        match error.downcast_ref::<SaveError>() {
            Some(SaveError::Aborted) => return Errno::ECANCELED,
            Some(SaveError::PolicyAborted { .. }) => return Errno::ETIMEDOUT,
            // libxl prints "No such process". EIO ("Input/output error") would make the user
            // suspect a disk.
            Some(SaveError::Guest(GuestError::Destroyed | GuestError::ShutDown { .. })) => {
                return Errno::ESRCH;
            }
            Some(SaveError::NotResumed { cause, .. }) => return errno_of(&**cause),
            _ => {}
        }
        match error.downcast_ref::<RestoreError>() {
            Some(RestoreError::NoMemory { .. }) => return Errno::ENOMEM,
            Some(RestoreError::CpuPolicy(refused)) => return refused.cause.errno,
            Some(RestoreError::CpuFeatures(_)) => return Errno::EOPNOTSUPP,
            Some(
                RestoreError::VcpuState { cause, .. }
                | RestoreError::HvmContext { cause, .. }
                | RestoreError::HvmParam { cause, .. }
                | RestoreError::TscInfo { cause, .. },
            ) => return cause.errno,
            Some(error) if error.is_bad_image() => return Errno::EINVAL,
            _ => {}
        }
        cause = error.source();
    }
    Errno::EIO
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;
    use xsr_xen_backend::ShutdownReason;

    use super::*;

    #[test]
    fn the_cause_decides_the_errno_and_is_said_once() {
        let broken = || SaveError::from(io::Error::from(io::ErrorKind::BrokenPipe));
        let error = anyhow::Error::new(broken());
        assert_eq!(
            format!("{error:#}"),
            "writing the stream failed: writing failed: broken pipe"
        );
        let raw = io::Error::from_raw_os_error(Errno::ENOSPC.raw());
        let error = anyhow::Error::new(SaveError::from(raw)).context("saving");
        assert_eq!(errno_of(error.as_ref()), Errno::ENOSPC);
        assert_eq!(errno_of(&SaveError::Aborted), Errno::ECANCELED);
        let reason = ShutdownReason::Crash;
        for gone in [GuestError::Destroyed, GuestError::ShutDown { reason }] {
            assert_eq!(errno_of(&SaveError::from(gone)), Errno::ESRCH);
        }
        let full = RestoreError::NoMemory {
            pfn: xsr_format::frame::Pfn(7),
            tot_pages: 1,
            max_pages: 2,
        };
        assert_eq!(errno_of(&full), Errno::ENOMEM);
        assert_eq!(errno_of(anyhow!("no idea").as_ref()), Errno::EIO);
    }
}
