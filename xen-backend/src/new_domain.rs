//! A domain that is to be created: its kind, its limits, and the settings that an image does not hold.

#[cfg(feature = "mock")]
use serde::{Deserialize, Serialize};

use crate::error::BackendError;
use crate::{Errno, GuestKind, Uuid};

/// A domain that [`Host::create`](crate::Host::create) can create.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NewDomain {
    /// PV, HVM or PVH.
    pub kind: GuestKind,
    /// The most vcpus that it can have.
    pub vcpus: u32,
    /// The most pages that it may have.
    pub max_pages: u64,
    /// Its UUID; [`Uuid::NIL`] for none.
    pub uuid: Uuid,
    /// Its limits and settings.
    pub settings: DomainSettings,
}

/// Settings that a toolstack makes before a domain first runs, and that an image's libxc stream
/// does not hold. The default is libxl's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "mock", derive(Serialize, Deserialize))]
#[non_exhaustive]
pub struct DomainSettings {
    /// The largest event channel number.
    pub max_event_port: u32,
    /// Frames of its grant table; if `None`, as many as the hypervisor allows.
    pub max_grant_frames: Option<u32>,
    /// Frames of its maptrack table (grants that it has mapped); `None` likewise.
    pub max_maptrack_frames: Option<u32>,
    /// The largest grant table version that it may use; if `None`, the largest that the hypervisor
    /// has.
    pub max_grant_version: Option<u8>,
    /// Its security label (FLASK), as a number; 0 for the default.
    pub ssidref: u32,
    /// Reading an MSR that Xen does not know gives zero instead of a fault. Xen 4.14 always does
    /// so.
    pub msr_relaxed: bool,
    /// Translated guests: memory for the tables that Xen keeps for them, in KiB; if `None`, the
    /// amount that libxl calculates.
    pub paging_kib: Option<u64>,
    /// The CPU pool that it runs in.
    pub cpupool: u32,
    /// Translated guests: how Xen treats timer ticks that the guest misses
    /// (`HVM_PARAM_TIMER_MODE`).
    pub timer_mode: u8,
    /// The offset of its wall clock from the host's, in seconds.
    pub time_offset_seconds: i64,
}

impl DomainSettings {
    /// Missed ticks are dropped (`HVMPTM_no_delay_for_missed_ticks`).
    pub const NO_DELAY_FOR_MISSED_TICKS: u8 = 1;

    /// libxl's defaults.
    pub const DEFAULT: Self = Self {
        max_event_port: 1023,
        max_grant_frames: None,
        max_maptrack_frames: None,
        max_grant_version: None,
        ssidref: 0,
        msr_relaxed: false,
        paging_kib: None,
        cpupool: 0,
        timer_mode: Self::NO_DELAY_FOR_MISSED_TICKS,
        time_offset_seconds: 0,
    };
}

impl Default for DomainSettings {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl NewDomain {
    /// A domain with default settings and without a UUID.
    pub const fn new(kind: GuestKind, vcpus: u32, max_pages: u64) -> Self {
        Self {
            kind,
            vcpus,
            max_pages,
            uuid: Uuid::NIL,
            settings: DomainSettings::DEFAULT,
        }
    }

    /// The same, with this UUID.
    pub const fn uuid(mut self, uuid: Uuid) -> Self {
        self.uuid = uuid;
        self
    }

    /// The same, with these settings.
    #[must_use]
    pub fn settings(mut self, settings: DomainSettings) -> Self {
        self.settings = settings;
        self
    }

    /// EINVAL if no domain of this kind can have this many vcpus.
    pub(crate) fn check_vcpus(&self, op: &'static str) -> Result<(), BackendError> {
        let most = self.kind.max_vcpus();
        match (1..=most).contains(&self.vcpus) {
            true => Ok(()),
            false => Err(BackendError::host(op, Errno::EINVAL).explained(format!(
                "{} vcpus: a {} domain has between 1 and {most}",
                self.vcpus,
                self.kind.name()
            ))),
        }
    }
}
