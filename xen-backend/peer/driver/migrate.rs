//! A live migration from one helper to another, timed.
//!
//! C implementation: `tools/libs/light/libxl_save_callout.c`.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use xsr_xen_backend::DomId;

use super::{Empty, Helpers, SAVE_CALLBACKS, SUSPEND, Whose, answer, ask};

/// The duration of a migration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Migrated {
    /// From the start of the helpers until both have ended.
    pub(crate) all: Duration,
    /// From the request to suspend the guest until the receiving helper has ended, when libxl would
    /// resume the guest.
    pub(crate) downtime: Duration,
}

/// The two machines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machines<'a> {
    pub(crate) from: &'a Path,
    pub(crate) domid: DomId,
    pub(crate) to: &'a Path,
    /// The domain that waits on the destination.
    pub(crate) empty: Empty,
}

impl Helpers {
    /// Migrate a running guest from one machine to the other, over a connection with these ends.
    ///
    /// # Errors
    ///
    /// A helper cannot be started or does not follow the protocol, or fails: with its messages.
    pub(crate) fn migrate(
        &self,
        whose: Whose,
        machines: Machines<'_>,
        [sender, receiver]: [Stdio; 2],
    ) -> io::Result<Migrated> {
        let Machines {
            from,
            domid,
            to,
            empty,
        } = machines;
        let begun = Instant::now();
        thread::scope(|scope| {
            let receiving = scope.spawn(move || {
                let run = self.restore(whose, to, &empty, receiver)?;
                io::Result::Ok((run, Instant::now()))
            });
            let (helpers, request) = self.with_requests(from);
            let arguments = format!("--save-domain 7 -1 {} 1 {SAVE_CALLBACKS} 0", domid.0);
            let child = helpers.start(whose, from, sender, &arguments, "")?;
            let mut asked = None;
            let saved = answer(child, |number| {
                if number == SUSPEND {
                    asked = Some(Instant::now());
                    if whose == Whose::Stock {
                        ask(&request, "suspend", domid)?;
                    }
                    return Ok(1);
                }
                Ok(0)
            })?;
            let received = receiving.join();
            let (restored, ended) = received.map_err(|_| io::Error::other("a panic"))??;
            for run in [&saved, &restored] {
                if !run.succeeded() {
                    return Err(io::Error::other(format!("a helper failed: {run:#?}")));
                }
            }
            let asked =
                asked.ok_or_else(|| io::Error::other("the guest has not been suspended"))?;
            Ok(Migrated {
                all: begun.elapsed(),
                downtime: ended - asked,
            })
        })
    }
}
