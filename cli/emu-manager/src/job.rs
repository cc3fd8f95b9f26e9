//! A save or a restore between xenopsd's stream and a domain.

use std::ops::ControlFlow;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::mapped::MappedImage;
use xsr_save_restore::save::precopy::PrecopyPolicy;
use xsr_save_restore::sink::{CopySink, FdSink};
use xsr_save_restore::source::{CopySource, FdSource};
use xsr_save_restore::text::chain;
use xsr_save_restore::toolstack::OlderGuest;
use xsr_save_restore::{CpuCheck, Live, RestoreRequest, Rings, SaveError, SaveRequest, Saved};
use xsr_xen_backend::{DomId, Domain, XenVersion};

use crate::Open;
use crate::args::{Args, Mode};
use crate::backend::Backend;
use crate::compress::{Begun, Compressor};
use crate::control::{Control, End};
use crate::disk::Disk;
use crate::line::Line;
use crate::platform::Platform;
use crate::progress::Percent;
use crate::stream;
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
    let mut toolstack = Saving {
        control,
        domain,
        qmp: args.qemu.then(|| backend.qmp_socket(args.domid)),
        live,
        late_suspend: backend.late_suspend(),
        logging: false,
        guest: backend.stand_in(args.domid)?,
    };
    // Whatever reads a suspend image later must be able to.
    let is_migration = stream::waits(&stream)?;
    let compress = args.compress && is_migration && platform.compress()?;
    match (args.compress, compress) {
        (true, false) if !is_migration => {
            tracing::info!("the stream is not compressed: it is a suspend image");
        }
        (true, true) => tracing::info!("the stream is compressed: the other end must run xsr"),
        (true, false) => {
            tracing::info!("the stream is not compressed: platform:xsr-compress is not true");
        }
        (false, _) => {}
    }
    control.prepare().map_err(ended)?;
    // xenopsd has written the head of the record: the stream begins at the descriptor's position.
    let disk = match !live && !compress && platform.live_suspend()? {
        true => Disk::of(&stream)?,
        false => None,
    };
    let mut work = Work {
        control,
        domain,
        xen: backend.host().xen_version()?,
        percent: Percent::default(),
        has_begun: false,
        compress,
    };
    if let Some(disk) = disk {
        control.goes_live();
        tracing::info!("the guest runs while its memory is written");
        toolstack.live = true;
        let image = disk.image();
        let failed = match work.write_image_of(&mut toolstack, &image, &mut *policy) {
            Ok(saved) => {
                let finished = image.finish(None, &mut || control.cancel().check());
                let ended = finished.map_err(Error::from);
                let ended = ended.and_then(|stats| disk.end_at(stats.image_bytes));
                tell(keep(saved, ended)?, control)?;
                None
            }
            Err(error) => {
                drop(image);
                // The file ends again where xenopsd's part of it does.
                drop(disk);
                Some(error)
            }
        };
        match failed {
            None => {
                toolstack.complete();
                return Ok(());
            }
            Some(error) if work.may_stand_still(&error) => {
                tracing::warn!(
                    "what the guest writes cannot be followed, so it is suspended first: {}",
                    chain(&error)
                );
                toolstack.stand_still();
            }
            Some(error) => return Err(error.into()),
        }
    }
    let policy: Option<&mut dyn PrecopyPolicy> = match live {
        true => Some(&mut *policy),
        false => None,
    };
    let saved = work.write_stream_of(&mut toolstack, stream, policy)?;
    tell(saved, control)?;
    toolstack.complete();
    Ok(())
}

/// Tells xenopsd that the domain is saved; if it cannot, the guest runs on.
fn tell(saved: Saved<'_>, control: &Control) -> Result<()> {
    let stats = saved.stats();
    tracing::info!(
        "saved in {} passes and a last one: {} MiB, suspended for {} ms",
        stats.iterations,
        (stats.pages * PAGE_SIZE as u64) >> 20,
        stats.suspended_for.as_millis()
    );
    let told = control.result(&Line::Saved).map_err(ended);
    // xenopsd decides what becomes of the guest now.
    keep(saved, told)?.keep_suspended();
    Ok(())
}

/// The domain is saved, and `ended` is how its image ended: if that failed, the guest runs on.
fn keep(saved: Saved<'_>, ended: Result<()>) -> Result<Saved<'_>> {
    if let Err(error) = ended {
        let failed = format!("{error:#}, and the guest is still suspended");
        saved.resume().context(failed)?;
        return Err(error);
    }
    Ok(saved)
}

/// A save, whose progress xenopsd is told.
struct Work<'w> {
    control: &'w Control,
    domain: &'w dyn Domain,
    xen: XenVersion,
    percent: Percent,
    /// A pass over the memory has begun: the guest's writes are followed, or it is suspended.
    has_begun: bool,
    compress: bool,
}

impl Work<'_> {
    fn observe(&mut self, progress: &Progress) -> ControlFlow<()> {
        self.has_begun |= progress.phase == Phase::Precopy && progress.pages_total.is_some();
        if let Some(percent) = self.percent.next(progress) {
            // The control records that xenopsd cannot be reached.
            self.control.tell(&Line::Progress(percent)).ok();
        }
        self.control.cancel().check()
    }

    /// Saves into a stream, live if there is a policy.
    fn write_stream_of<'t>(
        &mut self,
        toolstack: &'t mut Saving<'_>,
        stream: OwnedFd,
        policy: Option<&mut dyn PrecopyPolicy>,
    ) -> Result<Saved<'t>> {
        let mut sink = FdSink::cancellable(stream, self.control.cancel().clone())?;
        let (domain, xen, compress) = (self.domain, self.xen, self.compress);
        let mut on_progress = |progress: &Progress| self.observe(progress);
        let mut request = SaveRequest::new(domain, xen).observe(&mut on_progress);
        if let Some(policy) = policy {
            let verify = false;
            request = request.live(Live { policy, verify });
        }
        if !compress {
            return Ok(request.write_stream(toolstack, &mut sink)?);
        }
        let mut sink = Compressor::new(sink);
        let saved = request.write_stream(toolstack, &mut CopySink(&mut sink))?;
        let ended = sink.finish().context("writing the end of the stream");
        keep(saved, ended)
    }

    /// Saves into an image with a place for each page, live.
    fn write_image_of<'t>(
        &mut self,
        toolstack: &'t mut Saving<'_>,
        image: &MappedImage<'_>,
        policy: &mut dyn PrecopyPolicy,
    ) -> Result<Saved<'t>, SaveError> {
        let (domain, xen) = (self.domain, self.xen);
        let mut on_progress = |progress: &Progress| self.observe(progress);
        let verify = false;
        SaveRequest::new(domain, xen)
            .observe(&mut on_progress)
            .live(Live { policy, verify })
            .write_mapped(toolstack, image)
    }

    /// Whether a live save that xenopsd did not ask for failed because Xen or qemu refuses its
    /// dirty log. Xen does if it lacks the memory for it, or shadow paging for a PV guest, or if
    /// a device writes to the guest's memory.
    fn may_stand_still(&self, error: &SaveError) -> bool {
        let refused = matches!(error, SaveError::Backend(_) | SaveError::Toolstack(_));
        refused && !self.has_begun && self.control.end().is_none()
    }
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
    let begun = Begun::new(source).context("reading the stream")?;
    let rings = Rings {
        store_port,
        store_domid: DOM0,
        console_port,
        console_domid: DOM0,
    };
    let mut on_progress = |_: &Progress| control.cancel().check();
    let mut toolstack = Restoring { domain, older };
    let request = RestoreRequest::new(domain, rings)
        // xapi compared the hosts' features before it chose this host.
        .cpu(CpuCheck::Warn)
        .observe(&mut on_progress);
    let restored = match begun.is_compressed() {
        false => {
            let reader = RecordReader::new(begun, ReadOptions::default())?;
            request.read_stream(reader, &mut toolstack)?.0
        }
        true => {
            tracing::info!("the stream is compressed");
            let stream = CopySource(begun.decompressed());
            let reader = RecordReader::new(stream, ReadOptions::default())?;
            let (restored, CopySource(rest)) = request.read_stream(reader, &mut toolstack)?;
            rest.finish().context("reading the end of the stream")?;
            restored
        }
    };
    platform.write_generation_id(domain)?;
    tracing::info!("restored: {:?}", restored.stats);
    control
        .result(&Line::Restored {
            store: restored.store_gfn.map_or(0, |gfn| gfn.0),
            console: restored.console_gfn.map_or(0, |gfn| gfn.0),
        })
        .map_err(ended)
}
