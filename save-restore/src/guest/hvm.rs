//! HVM and PVH guests: hypercalls take their pfns, and their pages are the same on every machine.
//!
//! C implementation: `xg_sr_save_x86_hvm.c`, `xg_sr_restore_x86_hvm.c`.

use xsr_format::fields::hvm::param_name;
use xsr_format::frame::{Gfn, Page, PageEntry, PageType, Pfn};
use xsr_format::guest_image::GuestImage;
use xsr_format::image::GuestType;
use xsr_format::record::hvm::HvmParam;
use xsr_xen_backend::{Access, Domain, Errno, ForeignPage, HvmGuest, RingGrant};

use crate::error::{GuestError, RestoreError, SaveError};
use crate::guest::refused::suspect_of_context;
use crate::guest::{GoOn, GuestSave, Out, x86};
use crate::restore::Rings;

/// `HVM_PARAM_*` of `xen/include/public/hvm/params.h`.
mod param {
    pub(super) const STORE_PFN: u32 = 1;
    pub(super) const STORE_EVTCHN: u32 = 2;
    pub(super) const PAE_ENABLED: u32 = 4;
    pub(super) const IOREQ_PFN: u32 = 5;
    pub(super) const BUFIOREQ_PFN: u32 = 6;
    pub(super) const VIRIDIAN: u32 = 9;
    pub(super) const IDENT_PT: u32 = 12;
    pub(super) const CONSOLE_PFN: u32 = 17;
    pub(super) const CONSOLE_EVTCHN: u32 = 18;
    pub(super) const ACPI_IOPORTS_LOCATION: u32 = 19;
    pub(super) const PAGING_RING_PFN: u32 = 27;
    pub(super) const MONITOR_RING_PFN: u32 = 28;
    pub(super) const SHARING_RING_PFN: u32 = 29;
    pub(super) const IOREQ_SERVER_PFN: u32 = 32;
    pub(super) const NR_IOREQ_SERVER_PAGES: u32 = 33;
    pub(super) const VM_GENERATION_ID_ADDR: u32 = 34;
    pub(super) const X87_FIP_WIDTH: u32 = 36;
    pub(super) const VM86_TSS_SIZED: u32 = 37;
    pub(super) const MCA_CAP: u32 = 38;

    /// The parameters a stream holds, in the order Xen writes them.
    pub(super) const SAVED: [u32; 16] = [
        STORE_PFN,
        IOREQ_PFN,
        BUFIOREQ_PFN,
        PAGING_RING_PFN,
        MONITOR_RING_PFN,
        SHARING_RING_PFN,
        VM86_TSS_SIZED,
        CONSOLE_PFN,
        ACPI_IOPORTS_LOCATION,
        VIRIDIAN,
        IDENT_PT,
        VM_GENERATION_ID_ADDR,
        IOREQ_SERVER_PFN,
        NR_IOREQ_SERVER_PAGES,
        X87_FIP_WIDTH,
        MCA_CAP,
    ];
}

/// The save side.
pub(crate) struct HvmSave<'a> {
    domain: &'a dyn Domain,
    guest: &'a dyn HvmGuest,
    max_pfn: Pfn,
}

impl<'a> HvmSave<'a> {
    pub(crate) fn new(domain: &'a dyn Domain, guest: &'a dyn HvmGuest) -> Result<Self, SaveError> {
        let max_pfn = max_pfn(domain)?;
        Ok(Self {
            domain,
            guest,
            max_pfn,
        })
    }
}

fn max_pfn(domain: &dyn Domain) -> Result<Pfn, SaveError> {
    // For a guest without memory the last pfn is 0, although it has no page there.
    let max_pfn = Pfn(domain.maximum_gfn()?.map_or(0, |gfn| gfn.0));
    match max_pfn <= PageEntry::MAX_PFN {
        true => Ok(max_pfn),
        false => Err(GuestError::TooLarge { max_pfn }.into()),
    }
}

impl GuestSave for HvmSave<'_> {
    fn guest_type(&self) -> GuestType {
        GuestType::X86_HVM
    }

    fn max_pfn(&self) -> Pfn {
        self.max_pfn
    }

    fn pfn_to_gfn(&self, pfn: Pfn) -> Option<Gfn> {
        Some(Gfn(pfn.0))
    }

    /// Xen itself translates the pfns of these guests.
    fn confirms(&self, _: Pfn, _: Gfn) -> bool {
        true
    }

    fn normalises(&self, _: PageType) -> bool {
        false
    }

    fn normalise(&self, _: PageEntry, page: ForeignPage<'_>) -> Result<Box<Page>, GuestError> {
        Ok(page.to_page())
    }

    fn static_data(&self, out: &mut Out<'_>) -> Result<(), SaveError> {
        x86::write_cpu_policy(self.domain, out)
    }

    fn start_of_stream(&self, _: &mut Out<'_>) -> Result<(), SaveError> {
        Ok(())
    }

    /// Memory may have been added at the end.
    fn check_vm_state(&mut self, _: bool, _: &mut GoOn<'_>) -> Result<bool, SaveError> {
        let now = max_pfn(self.domain)?;
        let grown = now > self.max_pfn;
        self.max_pfn = self.max_pfn.max(now);
        Ok(grown)
    }

    /// TSC, context, params: the order in which Xen writes them, though the specification wants
    /// params first.
    fn end_of_checkpoint(&self, out: &mut Out<'_>) -> Result<(), SaveError> {
        x86::write_tsc_info(self.domain, out)?;
        out.hvm_context(&self.guest.hvm_context()?)?;
        let mut params = Vec::with_capacity(param::SAVED.len());
        for index in param::SAVED {
            let value = self.guest.hvm_param(index)?;
            if value != 0 {
                let index = u64::from(index);
                params.push(HvmParam { index, value });
            }
        }
        out.hvm_params(&params)?;
        Ok(())
    }
}

/// Applies a stream's records of a translated guest: params first, since they decide what the
/// context may hold; then the event channels of the rings, the context, the grants.
///
/// The pages of the xenstore, console and ioreq rings are cleared: what the old host's backends
/// left in them means nothing here.
pub(crate) fn complete(
    image: &GuestImage,
    domain: &dyn Domain,
    guest: &dyn HvmGuest,
    ports: &Rings,
) -> Result<(Option<Gfn>, Option<Gfn>), RestoreError> {
    let (mut store, mut console) = (None, None);
    for &HvmParam { index, value } in image.hvm_params() {
        // The fold of the records takes only indices that Xen has.
        let index = u32::try_from(index).map_err(|_| GuestError::HvmParam { index })?;
        match index {
            param::STORE_PFN => store = Some(Gfn(value)),
            param::CONSOLE_PFN => console = Some(Gfn(value)),
            // Used to tell the toolstack how to make CPUID; obsolete.
            param::PAE_ENABLED => continue,
            _ => {}
        }
        if matches!(
            index,
            param::STORE_PFN | param::CONSOLE_PFN | param::IOREQ_PFN | param::BUFIOREQ_PFN
        ) {
            clear_page(domain, Gfn(value))?;
        }
        if index == param::CONSOLE_PFN {
            x86::disconnect_console(domain, Gfn(value))?;
        }
        guest
            .set_hvm_param(index, value)
            .map_err(|cause| match cause.errno {
                // Errors about the parameter itself.
                Errno::EINVAL | Errno::EEXIST | Errno::ERANGE => RestoreError::HvmParam {
                    index,
                    name: param_name(u64::from(index)).unwrap_or("unknown"),
                    value,
                    cause,
                },
                _ => cause.into(),
            })?;
    }
    guest.set_hvm_param(param::STORE_EVTCHN, u64::from(ports.store_port))?;
    guest.set_hvm_param(param::CONSOLE_EVTCHN, u64::from(ports.console_port))?;
    let context = image.hvm_context();
    guest
        .set_hvm_context(context)
        .map_err(|cause| match cause.errno {
            Errno::ESRCH | Errno::EPERM | Errno::EACCES | Errno::ENOMEM => cause.into(),
            _ => {
                let last = domain.info().ok().map(|info| info.max_vcpu_id);
                RestoreError::HvmContext {
                    bytes: context.len(),
                    reason: suspect_of_context(context, last),
                    cause,
                }
            }
        })?;
    domain.seed_grants(
        RingGrant {
            gfn: console,
            backend: ports.console_domid,
        },
        RingGrant {
            gfn: store,
            backend: ports.store_domid,
        },
    )?;
    Ok((store, console))
}

/// Clears one page. A frame that does not exist is not an error: Xen does not check either, and an
/// image may name a ring it never had. A frame that exists but cannot be mapped is an error.
fn clear_page(domain: &dyn Domain, gfn: Gfn) -> Result<(), RestoreError> {
    let pages = domain.map(&[gfn], Access::Write)?;
    match pages.failed().first() {
        Some(error) if error.errno == Errno::EINVAL => {
            tracing::warn!(%gfn, "the image names a ring page that it does not hold");
        }
        Some(error) => return Err((*error).into()),
        None => pages.iter().for_each(|(_, page)| page.clear()),
    }
    Ok(())
}
