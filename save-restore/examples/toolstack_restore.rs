//! A custom toolstack that restores what `toolstack_save` wrote: it creates the domain, restores
//! into it, learns the frames of its rings, and starts it, or destroys it if anything fails.
//!
//! ```text
//! cargo run -p xsr-save-restore --example toolstack_restore -- HOST KIND VCPUS MIB FILE
//! ```
//!
//! HOST is the directory of a mock machine; KIND is `pv`, `hvm` or `pvh`. On a real Xen, a
//! toolstack has more to do for a guest: its xenstore nodes, the other ends of its rings, its
//! devices.

#![allow(clippy::print_stdout, reason = "an example prints for its user")]

use std::error::Error;
use std::fs::File;
use std::path::Path;

use xsr_format::frame::Gfn;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::progress::{Cancel, Progress};
use xsr_save_restore::source::FdSource;
use xsr_save_restore::toolstack::{MissingStaticData, RestoreToolstack, ToolstackError};
use xsr_save_restore::{RestoreRequest, Restored, Rings};
use xsr_xen_backend::mock::{HostConfig, MockHost};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host};

/// The control domain has the other ends of the rings.
const DOM0: DomId = DomId(0);

/// The callbacks of this toolstack.
struct Toolstack;

impl RestoreToolstack for Toolstack {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        match missing == MissingStaticData::default() {
            true => Ok(()),
            // A toolstack that knows the image's host would set that host's policy here.
            false => Err(ToolstackError::new(
                "setting up the processor",
                "the image does not say which features the guest has seen",
            )),
        }
    }

    fn restore_results(
        &mut self,
        store_gfn: Option<Gfn>,
        console_gfn: Option<Gfn>,
    ) -> Result<(), ToolstackError> {
        println!("rings of xenstore and console: {store_gfn:?}, {console_gfn:?}");
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [host, kind, vcpus, mib, file] = &args[..] else {
        return Err("usage: toolstack_restore HOST KIND VCPUS MIB FILE".into());
    };
    let kind = match kind.as_str() {
        "pv" => GuestKind::Pv,
        "hvm" => GuestKind::Hvm,
        "pvh" => GuestKind::Pvh,
        _ => return Err("KIND is pv, hvm or pvh".into()),
    };
    let host = MockHost::open_or_create(Path::new(host), &HostConfig::default())?;
    // One MiB more than the guest's memory, for special pages that the guest does not see.
    let pages = (mib.parse::<u64>()? + 1) << 8;
    let domid = host.create_domain(kind, vcpus.parse()?, pages)?;
    let domain = host.domain(domid)?;
    match fill(domain.as_ref(), Path::new(file)) {
        Ok(restored) => {
            println!("{domid}: {} pages", restored.stats.pages);
            domain.unpause()?;
            Ok(())
        }
        Err(error) => {
            // Half a guest must not run.
            domain.destroy()?;
            Err(error)
        }
    }
}

/// Restores a bare libxc stream into a domain that has just been created.
fn fill(domain: &dyn Domain, file: &Path) -> Result<Restored, Box<dyn Error>> {
    let cancel = Cancel::new();
    let source = FdSource::cancellable(File::open(file)?, cancel.clone())?;
    let reader = RecordReader::new(source, ReadOptions::default())?;
    println!("{}", reader.domain().guest_type);
    let rings = Rings {
        store_port: domain.alloc_unbound_port(DOM0)?,
        store_domid: DOM0,
        console_port: domain.alloc_unbound_port(DOM0)?,
        console_domid: DOM0,
    };
    let mut on_progress = |progress: &Progress| {
        tracing::debug!(?progress, "restoring");
        cancel.check()
    };
    let (restored, _) = RestoreRequest::new(domain, rings)
        .observe(&mut on_progress)
        .read_stream(reader, &mut Toolstack)?;
    Ok(restored)
}
