//! A save or a restore between xenopsd's stream and a domain.

use std::os::fd::OwnedFd;

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::progress::Progress;
use xsr_save_restore::sink::FdSink;
use xsr_save_restore::source::FdSource;
use xsr_save_restore::toolstack::OlderGuest;
use xsr_save_restore::{CpuCheck, Live, RestoreRequest, Rings, SaveRequest};
use xsr_xen_backend::{DomId, Domain};

use crate::Open;
use crate::args::{Args, Mode};
use crate::backend::Backend;
use crate::control::{Control, End};
use crate::disk::Disk;
use crate::line::Line;
use crate::platform::Platform;
use crate::progress::Percent;
use crate::toolstack::{Restoring, Saving};

/// Does the work in `args`, and tells xenopsd the result.
///
/// # Errors
///
/// The failure; [`Control::end`] may have the reason. xenopsd has not been told of it.
pub(crate) fn run(args: &Args, stream: OwnedFd, control: &Control, open: Open) -> Result<()> {
    ensure!(
        !args.vgpu,
        "vgpu Operation not supported; remove platform:emu-manager of this VM"
    );
    tracing::info!(
        "xsr-emu-manager {}: {} of domain {}",
        env!("CARGO_PKG_VERSION"),
        args.what(),
        args.domid.0
    );
    if let Some(node) = &args.node {
        tracing::info!("-mem_pnode {node} is not heeded: the vcpus' affinity places the memory");
    }
    let backend = open()?;
    let backend = backend.as_ref();
    let domain = backend.host().domain(args.domid)?;
    let domain = domain.as_ref();
    let kind = domain.info()?.kind;
    ensure!(
        kind.is_translated() == args.translated,
        "{} is a {} domain, which is not what -mode says",
        args.domid,
        kind.name()
    );
    let platform = Platform::of(backend, args.domid);
    match args.mode {
        Mode::Save { live } => save(args, live, stream, control, backend, &platform, domain),
        Mode::Restore {
            store_port,
            console_port,
        } => {
            let ports = (store_port, console_port);
            restore(ports, stream, control, &platform, domain)
        }
    }
}

fn ended(end: End) -> Error {
    anyhow!(end.text())
}

fn save(
    args: &Args,
    live: bool,
    stream: OwnedFd,
    control: &Control,
    backend: &dyn Backend,
    platform: &Platform<'_>,
    domain: &dyn Domain,
) -> Result<()> {
    platform.check_may_move()?;
    let mut policy = platform.policy()?;
    let xen = backend.host().xen_version()?;
    let mut toolstack = Saving {
        control,
        domain,
        qmp: args.qemu.then(|| backend.qmp_socket(args.domid)),
        live,
        late_suspend: backend.late_suspend(),
        logging: false,
        guest: backend.stand_in(args.domid)?,
    };
    if args.compress {
        tracing::info!("the stream is not compressed: the other end may not know how");
    }
    control.prepare().map_err(ended)?;
    // xenopsd has written the head of the record: the stream begins at the descriptor's position.
    let disk = match !live && platform.live_suspend()? {
        true => Disk::of(&stream)?,
        false => None,
    };
    let live = live || disk.is_some();
    if disk.is_some() {
        toolstack.live = true;
        control.goes_live();
        tracing::info!("the guest runs while its memory is written");
    }
    let image = disk.as_ref().map(Disk::image);
    let mut percent = Percent::default();
    let mut on_progress = |progress: &Progress| {
        if let Some(percent) = percent.next(progress) {
            // The control records that xenopsd cannot be reached.
            control.tell(&Line::Progress(percent)).ok();
        }
        control.cancel().check()
    };
    let mut request = SaveRequest::new(domain, xen).observe(&mut on_progress);
    if live {
        let policy = &mut *policy;
        request = request.live(Live {
            policy,
            verify: false,
        });
    }
    let saved = match &image {
        Some(image) => request.write_mapped(&mut toolstack, image)?,
        None => {
            let mut sink = FdSink::cancellable(stream, control.cancel().clone())?;
            request.write_stream(&mut toolstack, &mut sink)?
        }
    };
    if let Some(image) = image {
        let finished = image.finish(None, &mut || control.cancel().check());
        let ended = match (finished, disk) {
            (Err(error), _) => Err(error.into()),
            (Ok(stats), Some(disk)) => disk.end_at(stats.image_bytes),
            (Ok(_), None) => Ok(()),
        };
        if let Err(error) = ended {
            saved
                .resume()
                .with_context(|| format!("{error:#}, and the guest is still suspended"))?;
            return Err(error);
        }
    }
    let stats = saved.stats();
    tracing::info!(
        "saved in {} passes and a last one: {} MiB, suspended for {} ms",
        stats.iterations,
        (stats.pages * PAGE_SIZE as u64) >> 20,
        stats.suspended_for.as_millis()
    );
    if let Err(end) = control.result(&Line::Saved) {
        // xenopsd cannot have the result.
        saved
            .resume()
            .with_context(|| format!("{}, and the guest is still suspended", end.text()))?;
        return Err(ended(end));
    }
    // xenopsd decides what becomes of the guest now.
    saved.keep_suspended();
    toolstack.complete();
    Ok(())
}

fn restore(
    (store_port, console_port): (u32, u32),
    stream: OwnedFd,
    control: &Control,
    platform: &Platform<'_>,
    domain: &dyn Domain,
) -> Result<()> {
    const DOM0: DomId = DomId(0);
    platform.set_up(domain)?;
    let older = OlderGuest {
        featureset: platform.featureset()?,
        nested: platform.nested()?,
    };
    let source = FdSource::cancellable(stream, control.cancel().clone())?;
    control.wait_for_restore().map_err(ended)?;
    let reader = RecordReader::new(source, ReadOptions::default())?;
    let rings = Rings {
        store_port,
        store_domid: DOM0,
        console_port,
        console_domid: DOM0,
    };
    let mut on_progress = |_: &Progress| control.cancel().check();
    let mut toolstack = Restoring { domain, older };
    let (restored, _) = RestoreRequest::new(domain, rings)
        // xapi compared the hosts' features before it chose this host.
        .cpu(CpuCheck::Warn)
        .observe(&mut on_progress)
        .read_stream(reader, &mut toolstack)?;
    platform.write_generation_id(domain)?;
    tracing::info!("restored: {:?}", restored.stats);
    control
        .result(&Line::Restored {
            store: restored.store_gfn.map_or(0, |gfn| gfn.0),
            console: restored.console_gfn.map_or(0, |gfn| gfn.0),
        })
        .map_err(ended)
}
