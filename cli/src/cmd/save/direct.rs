//! `xsr save --direct`: without libxl. The hypervisor and xenstore are asked themselves,
//! and what is written is a bare libxc stream.
//!
//! Nothing waits for the devices of the guest, and a device model is not saved. A guest with a
//! device model is refused; so is one with other devices, unless the domain stays.

use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use xsr_save_restore::progress::OnProgress;
use xsr_save_restore::save::precopy::PrecopyPolicy;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{Live, SaveError, SaveOptions};
use xsr_xen_backend::{GuestKind, Host as _};

use super::{Ending, ImageSink, Written};
use crate::args::SaveArgs;
use crate::backend;
use crate::cmd::migrate::can_suspend;
use crate::exit::Code;
use crate::left;
use crate::terminal::Terminal;
use crate::watch::Watch;

/// Save a domain. Whatever fails before the image has its name leaves the domain running.
pub(super) fn save(
    args: &SaveArgs,
    live: Option<Box<dyn PrecopyPolicy>>,
    terminal: &Terminal,
    watch: &mut Watch,
) -> Result<Code> {
    let started = Instant::now();
    let host = backend::hypervisor(&args.backend.backend)?;
    let domid = host
        .find(&args.domain)
        .with_context(|| format!("looking for {}", args.domain))?;
    let name = host.name(domid)?.unwrap_or_else(|| domid.to_string());
    let domain = host.domain(domid)?;
    if domain.info()?.kind == GuestKind::Hvm {
        bail!("{name} has a device model, which is libxl's to save: drop --direct");
    }
    let devices = host
        .devices(domid)
        .with_context(|| format!("looking whether {name} has devices"))?;
    if !devices.is_empty() {
        let devices = devices.join(", ");
        if !args.paused && !args.checkpoint {
            bail!(
                "{name} has {devices}, which is libxl's to save and to take down: drop --direct, \
                 or keep the domain (-c or -p) and have an image of its memory alone"
            );
        }
        tracing::warn!("the image will hold nothing of {devices} of {name}");
    }
    let xen = host.xen_version()?;
    // The name may be one that is made up for the messages.
    can_suspend(&*domain, &domid.0.to_string(), &args.backend.backend)
        .with_context(|| format!("saving {name}"))?;
    let output = super::output(args, &*domain)?;
    // From here on a signal breaks off in good order.
    let (left, handle) = left::guest::direct(&name, false);
    handle.get_or_init(|| domain);
    left.until_the_end();
    let domain = host.domain(domid)?;
    let after = super::aftermath(&name, &*domain, &output);
    let mut sink = ImageSink::new(output.file(), watch.interrupt().cancel().clone())?;
    let mut toolstack = DirectToolstack(&*domain);
    let options = SaveOptions {
        threads: args.threads.threads,
    };
    let progress: &mut OnProgress<'_> = &mut |progress| watch.progress(progress);
    let saving = || format!("saving {name} to {}", output.name());
    let saved = match live {
        None => {
            xsr_save_restore::save(&*domain, xen, &mut toolstack, &mut sink, &options, progress)
                .with_context(saving)
                .map_err(&after)?
        }
        Some(mut policy) => {
            let live = Live {
                policy: &mut *policy,
                verify: false,
            };
            xsr_save_restore::save_live(
                &*domain,
                xen,
                &mut toolstack,
                &mut sink,
                &options,
                live,
                progress,
            )
            .with_context(saving)
            .map_err(&after)?
        }
    };
    let octets = sink.octets();
    watch.clear();
    if watch.interrupt().cancel().is_cancelled() {
        drop(saved);
        let aborted = anyhow::Error::new(SaveError::Aborted).context(format!("saving {name}"));
        return Err(after(aborted));
    }
    if let Err(error) = output.finish() {
        drop(saved);
        return Err(after(error));
    }
    let ending = Ending {
        args,
        terminal,
        started,
        name: &name,
        domid,
        domain: &*domain,
    };
    ending.conclude(Written { saved, octets }, watch)?;
    if !args.paused && !args.checkpoint {
        let left = || format!("{name} is saved and destroyed, but its nodes in xenstore stay");
        host.forget(domid).with_context(left)?;
    }
    Ok(Code::Fine)
}
