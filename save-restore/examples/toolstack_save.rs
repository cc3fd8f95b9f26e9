//! A custom toolstack that saves a running domain, with progress, a time limit after which it
//! cancels, and a precopy policy of its own.
//!
//! ```text
//! cargo run -p xsr-save-restore --example toolstack_save -- HOST DOMAIN FILE [SECONDS]
//! ```
//!
//! HOST is `xen`, or the directory of a mock machine (`xsr mock create` makes one). FILE becomes a
//! bare libxc stream. The domain is destroyed when FILE is complete, and continues to run if
//! anything fails.

#![allow(clippy::print_stdout, reason = "an example prints for its user")]

use std::error::Error;
use std::path::Path;
use std::thread;
use std::time::Duration;

use xsr_save_restore::progress::{Cancel, Progress};
use xsr_save_restore::save::precopy::{PrecopyDecision, PrecopyPolicy, PrecopyStats};
use xsr_save_restore::sink::FdSink;
use xsr_save_restore::storage::file::FileStorage;
use xsr_save_restore::storage::{Create, Durability, Storage as _};
use xsr_save_restore::toolstack::{SaveToolstack, ToolstackError};
use xsr_save_restore::{Live, SaveOptions};
use xsr_xen_backend::domain_store::{DestroyOutcome, DomainStore};
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{Domain, XenHost};

/// Continues as long as each pass leaves fewer pages dirty than the one before.
#[derive(Debug, Default)]
struct WhileItShrinks {
    last: Option<u64>,
}

impl PrecopyPolicy for WhileItShrinks {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        // Directly after a pass the dirty count is not known yet.
        let Some(dirty) = stats.dirty_count else {
            return PrecopyDecision::Continue;
        };
        match self.last.replace(dirty) {
            Some(last) if dirty >= last || dirty == 0 => PrecopyDecision::StopAndCopy,
            _ => PrecopyDecision::Continue,
        }
    }
}

/// How this toolstack suspends a guest. A toolstack with devices would quiesce them here, too.
struct Toolstack<'a> {
    domain: &'a dyn Domain,
}

impl SaveToolstack for Toolstack<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        let suspended = self.domain.suspend();
        suspended.map_err(|e| ToolstackError::new("suspending the guest", e))
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        let resumed = self.domain.resume();
        resumed.map_err(|e| ToolstackError::new("resuming the guest", e))
    }

    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        println!("a device model would be told now: log-dirty mode {on}");
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (host, name, file, seconds) = match &args[..] {
        [host, name, file] => (host, name, file, 3600),
        [host, name, file, seconds] => (host, name, file, seconds.parse()?),
        _ => return Err("usage: toolstack_save HOST DOMAIN FILE [SECONDS]".into()),
    };
    let host: Box<dyn DomainStore> = match host.as_str() {
        "xen" => Box::new(XenHost::open()?),
        directory => Box::new(MockHost::open(Path::new(directory))?),
    };
    let which = host.find(name)?;
    // Another command of this program that is given the same domain reports the lock's holder.
    let _lock = host.lock(which, "toolstack_save")?;
    let domain = host.open(which)?;

    // Any thread may cancel, at any time: here one that watches the clock.
    let cancel = Cancel::new();
    let limit = cancel.clone();
    thread::spawn(move || {
        thread::sleep(Duration::from_secs(seconds));
        limit.cancel();
    });

    let (storage, image) = FileStorage::at(Path::new(file))?;
    let writer = storage.create(&image, &Create::stream())?;
    let descriptor = writer.descriptor().ok_or("a file has a descriptor")?;
    let mut sink = FdSink::cancellable(descriptor, cancel.clone())?;
    let mut toolstack = Toolstack {
        domain: domain.as_ref(),
    };
    let mut policy = WhileItShrinks::default();
    let mut on_progress = |progress: &Progress| {
        if progress.pass_is_complete() {
            println!(
                "{:?}, pass {}: {} pages, {:.0} MiB/s",
                progress.phase,
                progress.iteration,
                progress.pages_done,
                progress.bytes_per_second / f64::from(1 << 20)
            );
        }
        cancel.check()
    };
    let saved = xsr_save_restore::SaveRequest::new(domain.as_ref(), host.xen_version()?)
        .options(&SaveOptions::default())
        .live(Live {
            policy: &mut policy,
            verify: false,
        })
        .observe(&mut on_progress)
        .write_stream(&mut toolstack, &mut sink);
    let saved = saved.inspect_err(|_| println!("the guest runs on"))?;
    // While `saved` exists, the guest can still be resumed: if this fails, it is resumed, and there
    // is no new image.
    writer.commit(Durability::Durable)?;
    println!("suspended for {:?}", saved.stats().suspended_for);
    saved.keep_suspended();
    let destroyed = host.destroy(which, Duration::from_secs(10))?;
    if destroyed.outcome == DestroyOutcome::StillDying {
        println!("{which} is destroyed; some of its memory is still in use");
    }
    for left in destroyed.left_behind {
        println!("left behind: {left}");
    }
    Ok(())
}
