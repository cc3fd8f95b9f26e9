//! `xsr restore --direct`: without libxl. The domain is made here, for guests without
//! devices, and xenstore and console are connected to its rings.

use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::errno::Errno;
use xsr_save_restore::RestoreError;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_xen_backend::{DomId, GuestKind, Host as _, NewDomain, Ring, XenHost};

use super::{About, Image, Made, Overrides, Plan, bad, report, settings};
use crate::args::RestoreArgs;
use crate::backend;
use crate::exit::Code;
use crate::file::Input;
use crate::left;
use crate::terminal::Terminal;
use crate::watch::Watch;

/// Restore a domain. Whatever fails, the domain is destroyed again, and nothing of it stays
/// in xenstore.
pub(super) fn restore(args: &RestoreArgs, terminal: &Terminal, watch: &mut Watch) -> Result<Code> {
    let started = Instant::now();
    let input = Input::open(&args.file, args.lenient)?;
    let host = backend::hypervisor(&args.backend.backend)?;
    watch.expect_octets(input.length);
    let restoring = || format!("restoring {}", input.name);
    let cancel = watch.interrupt().cancel().clone();
    let built = Image::open(&input, args.lenient, &Overrides::of(args)?, cancel)
        .and_then(|image| build(image, &host, args, watch))
        .and_then(|built| input.finish(0).map(|_| built))
        .map_err(|error| input.blame(error))
        .with_context(restoring)?;
    if watch.interrupt().cancel().is_cancelled() {
        return Err(RestoreError::Aborted).with_context(restoring);
    }
    if !args.paused {
        built.made.unpause()?;
    }
    watch.clear();
    // From here on the domain lives, whatever becomes of what is said about it.
    let about = built.keep();
    report(args, terminal, &input, about, started)?;
    Ok(Code::Fine)
}

/// What a domain has in xenstore. Removed on drop, unless it is kept.
struct Nodes<'a> {
    host: &'a XenHost,
    domid: DomId,
    keep: bool,
}

impl Drop for Nodes<'_> {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = self.host.forget(self.domid) {
            let domid = self.domid;
            tracing::error!(%error, %domid, "nodes in xenstore are left behind");
        }
    }
}

/// A domain that has been made. On drop it goes, and then its nodes.
struct Built<'a> {
    made: Made,
    nodes: Nodes<'a>,
}

impl Built<'_> {
    fn keep(mut self) -> About {
        self.nodes.keep = true;
        self.made.keep()
    }
}

/// The domain to be made; an error for what is not for this way of restoring.
fn refuse(plan: &Plan, host: &XenHost) -> Result<NewDomain> {
    let name = &plan.name;
    if plan.kind == GuestKind::Hvm {
        bail!("{name} needs a device model, which is libxl's to start: drop --direct");
    }
    let config: serde_json::Value =
        serde_json::from_str(&plan.json).map_err(|error| bad(&error.to_string()))?;
    // At the top of libxl's configuration, lists are of devices and nothing else is a list.
    let devices = config.as_object().into_iter().flatten();
    let devices = devices.filter(|(_, value)| value.as_array().is_some_and(|l| !l.is_empty()));
    let devices: Vec<&str> = devices.map(|(key, _)| key.as_str()).collect();
    if !devices.is_empty() {
        let devices = devices.join(", ");
        bail!("{name} has {devices}, and devices are libxl's to connect: drop --direct");
    }
    let (uuid, settings) = settings::of(&config).map_err(|refused| {
        let refused = refused.join(", ");
        anyhow!("{name} has {refused} in its configuration, which --direct cannot give it: drop --direct")
    })?;
    match host.find(name) {
        Ok(_) => bail!("a domain named {name:?} exists already; destroy or rename it first"),
        Err(error) if error.errno == Errno::ESRCH => {}
        Err(error) => return Err(error.into()),
    }
    let new = NewDomain::new(plan.kind, plan.vcpus, plan.max_pages);
    Ok(new.uuid(uuid).settings(settings))
}

/// Make the domain, fill it, connect its rings. It is paused then.
fn build<'h>(
    image: Image<'_>,
    host: &'h XenHost,
    args: &RestoreArgs,
    watch: &mut Watch,
) -> Result<Built<'h>> {
    let plan = &image.plan;
    let new = refuse(plan, host)?;
    let name = plan.name.clone();
    let (left, handle) = left::guest::direct(&name, true);
    let domid = host
        .create(&new)
        .with_context(|| format!("making {name}"))?;
    let (domain, again) = (host.domain(domid)?, host.domain(domid)?);
    let mut built = Built {
        made: Made::new(domain, domid, &name, left),
        nodes: Nodes {
            host,
            domid,
            keep: false,
        },
    };
    handle.get_or_init(|| again);
    let domain = built.made.domain.as_ref();
    let options = built.made.options(args.threads.threads)?;
    let (restored, source) = xsr_save_restore::restore(
        domain,
        image.reader,
        &mut DirectToolstack(domain),
        &options,
        &mut |progress| watch.progress(progress),
    )?;
    built.made.about.stats = restored.stats;
    // What stands behind the stream is looked at, and has nothing for such a guest.
    let offset = source.offset();
    let mut walk = image.around.resume(source, offset);
    while walk.next_step()?.is_some() {}
    let store = restored.store_gfn.ok_or_else(|| {
        bad("the image names no xenstore ring, without which nothing can be asked of the guest")
    })?;
    let ring = |frame, port| Ring { frame, port };
    let console = restored
        .console_gfn
        .map(|gfn| ring(gfn, options.console_port));
    host.introduce(domid, &name, ring(store, options.store_port), console)
        .context("connecting xenstore and console")?;
    Ok(built)
}
