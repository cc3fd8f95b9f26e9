//! A domain that has been made for an image, until somebody keeps it.
//!
//! C implementation: `domcreate_complete` in `tools/libs/light/libxl_create.c`, which destroys
//! what could not be completed.

use std::num::NonZeroUsize;

use anyhow::{Context as _, Error, Result};
use xsr_save_restore::RestoreOptions;
use xsr_save_restore::restore::RestoreStats;
use xsr_xen_backend::{DomId, Domain};

use crate::exit::{self, LeftBehind};
use crate::left::Left;

/// The control domain: the other end of the xenstore and console rings.
const DOM0: DomId = DomId(0);

/// A domain that has been made. Destroyed on drop, unless it is kept.
pub(crate) struct Made {
    pub(super) domain: Box<dyn Domain>,
    pub(super) about: About,
    keep: bool,
    /// As long as the domain is there and must not stay.
    left: Option<Left>,
}

/// What there is to say of a domain that has been made.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) name: String,
    pub(crate) domid: DomId,
    /// What the restore took.
    pub(crate) stats: RestoreStats,
}

impl Made {
    /// A domain that has been created just now, and has nothing yet. `left` was there before it.
    pub(super) fn new(domain: Box<dyn Domain>, domid: DomId, name: &str, left: Left) -> Self {
        let about = About {
            name: name.to_owned(),
            domid,
            stats: RestoreStats::default(),
        };
        Self {
            domain,
            about,
            keep: false,
            left: Some(left),
        }
    }

    /// The name that the domain has, or will have.
    pub(crate) fn name(&self) -> &str {
        &self.about.name
    }

    /// The domain's number.
    pub(crate) fn domid(&self) -> DomId {
        self.about.domid
    }

    /// Whether it is paused, now if not before.
    pub(super) fn stands_still(&self) -> bool {
        match self.domain.info() {
            Ok(info) if info.paused => true,
            _ => self.domain.pause().is_ok(),
        }
    }

    /// The domain goes.
    ///
    /// # Errors
    ///
    /// It could not be destroyed, and is still there.
    pub(crate) fn destroy(mut self) -> Result<()> {
        self.keep = true;
        let name = &self.about.name;
        self.domain
            .destroy()
            .with_context(|| format!("destroying {name}"))
    }

    /// There is no domain to be had for `error`: destroy what there is, and say so if it cannot
    /// be.
    pub(super) fn given_up(self, error: Error) -> Error {
        // A secondary of COLO may run: if it stays, it had better stand still.
        let how = match self.stands_still() {
            true => "is left here, paused; it must not run: destroy it by hand",
            false => "is left here and may be running: destroy it by hand, now",
        };
        let left = format!("{}, made for {}, {how}", self.domid(), self.name());
        match self.destroy() {
            Ok(()) => error,
            Err(cause) => {
                tracing::error!("{}", exit::words(cause.chain()));
                error.context(LeftBehind(left))
            }
        }
    }

    /// How it is to be restored: with event channels for the control domain.
    pub(super) fn options(&self, threads: Option<NonZeroUsize>) -> Result<RestoreOptions> {
        Ok(RestoreOptions {
            store_port: self.domain.alloc_unbound_port(DOM0)?,
            store_domid: DOM0,
            console_port: self.domain.alloc_unbound_port(DOM0)?,
            console_domid: DOM0,
            threads,
        })
    }

    /// Let the domain run.
    pub(crate) fn unpause(&self) -> Result<()> {
        self.domain
            .unpause()
            .with_context(|| format!("unpausing {}", self.about.name))
    }

    /// The domain stays.
    pub(crate) fn keep(mut self) -> About {
        self.keep = true;
        if let Some(left) = self.left.take() {
            // What is said about the domain is the last thing to be done.
            left.until_the_end();
        }
        self.about.clone()
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = self.domain.destroy() {
            let name = &self.about.name;
            tracing::error!(%error, name, "the domain could not be destroyed: destroy it by hand");
        }
    }
}
