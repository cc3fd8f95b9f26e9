//! CPU feature check: compares the CPU that a guest has seen with the one that it would get, before
//! it has any memory.
//!
//! Xen silently clears features that the host lacks, and the guest crashes later. So the restore
//! compares twice: the image with the most that the host can give, before anything is set; and,
//! once the policy is set, the image with what Xen has made of it, which is less for a guest whose
//! page tables are shadowed.
//!
//! C implementation: none. `xen/lib/x86/policy.c` compares the largest leaves and one MSR.

use std::fmt;

use xsr_format::cpu_policy::{self, CpuPolicy, Missing};
use xsr_format::guest_image::GuestImage;
use xsr_xen_backend::{BackendError, CpuPolicy as Bytes, Domain};

use crate::error::RestoreError;
use crate::guest::refused::{self, brand};

/// What a restore does if the host lacks features that the guest has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuCheck {
    /// Fails ([`RestoreError::CpuFeatures`]) before the guest has any memory. The same if the
    /// hypervisor does not report the host's features.
    #[default]
    Refuse,
    /// Continues, with a warning in the log for each feature. Stock tools continue silently.
    Warn,
}

/// In an error and in a log, features beyond this number are only counted.
const MOST_NAMES: usize = 16;

/// The parts of its CPU that a guest has seen and would not get.
#[derive(Debug)]
pub struct CpuMissing {
    /// The missing parts, at least one.
    pub missing: Vec<Missing>,
    /// The names of the image's and the host's processor, if they are known and differ.
    processors: Option<[String; 2]>,
}

impl fmt::Display for CpuMissing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.missing.iter().map(ToString::to_string).collect();
        write!(
            f,
            "this host cannot give the guest the CPU that it has seen: it lacks {}",
            refused::list(&names, MOST_NAMES)
        )?;
        if let Some([image, host]) = &self.processors {
            write!(
                f,
                ". The image comes from another CPU: \"{image}\", this host has \"{host}\""
            )?;
        }
        f.write_str("; the guest may crash when it uses what is missing")
    }
}

impl std::error::Error for CpuMissing {}

/// The comparison, for one guest.
#[derive(Debug)]
pub(super) struct Comparison {
    image: CpuPolicy,
    how: CpuCheck,
    /// What has been logged.
    told: Vec<Missing>,
}

impl Comparison {
    /// From the contents of the image's records.
    pub(super) fn of(image: &GuestImage, how: CpuCheck) -> Self {
        Self {
            image: CpuPolicy {
                leaves: image.cpuid().to_vec(),
                msrs: image.msrs().to_vec(),
            },
            how,
            told: Vec::new(),
        }
    }

    /// The policy as bytes for the hypervisor.
    pub(super) fn bytes(&self) -> Bytes {
        let (leaves, msrs) = self.image.encode();
        Bytes { leaves, msrs }
    }

    /// Compares with the most that the host can give to such a guest.
    pub(super) fn with_host(&mut self, domain: &dyn Domain) -> Result<(), RestoreError> {
        self.with(|| domain.max_cpu_policy())
    }

    /// Compares with what the guest has been given.
    pub(super) fn with_given(&mut self, domain: &dyn Domain) -> Result<(), RestoreError> {
        self.with(|| domain.cpu_policy())
    }

    fn with(
        &mut self,
        ask: impl FnOnce() -> Result<Bytes, BackendError>,
    ) -> Result<(), RestoreError> {
        // Xen before 4.14 wrote no policy; the toolstack is informed of that.
        if self.image == CpuPolicy::default() {
            return Ok(());
        }
        let host = match (ask(), self.how) {
            (Ok(host), _) => host,
            (Err(cause), CpuCheck::Refuse) => return Err(cause.into()),
            (Err(cause), CpuCheck::Warn) => {
                tracing::warn!(
                    "whether this host has the CPU features that the guest has seen is not known: \
                     {cause}"
                );
                return Ok(());
            }
        };
        let Ok(host) = CpuPolicy::parse(&host.leaves, &host.msrs) else {
            // The answer of such a hypervisor cannot be compared.
            tracing::warn!("the hypervisor's CPU policy ends inside an entry: not compared");
            return Ok(());
        };
        let mut missing = cpu_policy::missing(&self.image, &host);
        missing.retain(|one| !self.told.iter().any(|told| is_about_the_same(told, one)));
        if missing.is_empty() {
            return Ok(());
        }
        if self.how == CpuCheck::Refuse {
            let names = brand(&self.image).zip(brand(&host));
            let processors = names.filter(|(image, host)| image != host);
            return Err(RestoreError::CpuFeatures(Box::new(CpuMissing {
                missing,
                processors: processors.map(|(image, host)| [image, host]),
            })));
        }
        let shown = MOST_NAMES
            .saturating_sub(self.told.len())
            .min(missing.len());
        for one in &missing[..shown] {
            tracing::warn!(
                "the guest has seen a CPU feature that this host lacks: {}",
                one.details()
            );
        }
        match missing.len() - shown {
            0 => {}
            more => tracing::warn!("and {more} more CPU features are missing on this host"),
        }
        self.told.extend(missing);
        Ok(())
    }
}

/// Whether both are about the same feature: the host's value may have come from two places.
fn is_about_the_same(one: &Missing, other: &Missing) -> bool {
    match (one, other) {
        (Missing::Feature { feature: one, .. }, Missing::Feature { feature: other, .. }) => {
            one == other
        }
        (
            Missing::ExtendedState { component: one, .. },
            Missing::ExtendedState {
                component: other, ..
            },
        ) => one == other,
        _ => one == other,
    }
}
