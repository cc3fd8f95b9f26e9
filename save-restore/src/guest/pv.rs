//! PV guests: their page tables, p2m, start_info and vcpu contexts hold mfns, which become pfns in
//! the stream and mfns of the new machine on the other side.
//!
//! C implementation: `xg_sr_common_x86_pv.c`, `xg_sr_save_x86_pv.c`, `xg_sr_restore_x86_pv.c`.

pub(crate) mod blame;
pub(crate) mod layout;
pub(crate) mod p2m;
pub(crate) mod pagetable;
pub(crate) mod restore;

use xsr_format::frame::{Gfn, Mfn, Page, PageEntry, PageType, Pfn};
use xsr_format::image::GuestType;
use xsr_format::record::RecordKind;
use xsr_format::record::pv::{PvInfo, vcpu_basic_bytes};
use xsr_xen_backend::{Access, Domain, ForeignPage, ForeignPages, M2p, PvGuest, VcpuBlob};

use crate::error::{GuestError, SaveError};
use crate::guest::pv::layout::{cr3_to_frame, frame_to_cr3, shared_info, vcpu};
use crate::guest::pv::p2m::P2m;
use crate::guest::{GoOn, GuestSave, Out, x86};

/// A guest's word width, as reported by Xen.
pub(crate) fn guest_info(
    guest: &dyn PvGuest,
) -> Result<Result<PvInfo, GuestError>, xsr_xen_backend::BackendError> {
    let width = guest.guest_width()?;
    Ok(PvInfo::from_width(width).ok_or(GuestError::Width { width }))
}

/// The record for each blob of a vcpu, in the order in which Xen writes them.
pub(crate) const VCPU_RECORDS: [(VcpuBlob, RecordKind); 4] = [
    (VcpuBlob::Basic, RecordKind::X86_PV_VCPU_BASIC),
    (VcpuBlob::Extended, RecordKind::X86_PV_VCPU_EXTENDED),
    (VcpuBlob::Xsave, RecordKind::X86_PV_VCPU_XSAVE),
    (VcpuBlob::Msrs, RecordKind::X86_PV_VCPU_MSRS),
];

/// The save side.
pub(crate) struct PvSave<'a> {
    domain: &'a dyn Domain,
    guest: &'a dyn PvGuest,
    info: PvInfo,
    m2p: M2p,
    shared_info: ForeignPages,
    p2m: P2m,
    /// The last pfn that the stream has announced. It is larger than the guest's if the p2m has
    /// lost a part of its last leaf.
    announced: Pfn,
}

impl<'a> PvSave<'a> {
    pub(crate) fn new(
        domain: &'a dyn Domain,
        guest: &'a dyn PvGuest,
        go_on: &mut GoOn<'_>,
    ) -> Result<Self, SaveError> {
        let info = guest_info(guest)??;
        let m2p = guest.m2p()?;
        let frame = domain.info()?.shared_info_frame;
        let shared_info = domain.map(&[frame], Access::Read)?.all_mapped()?;
        let shared = shared_info.page(0).expect("mapped").to_page();
        let p2m = P2m::find(domain, &m2p, info, &shared, go_on)?;
        tracing::debug!(
            width = info.width(),
            max_pfn = %p2m.max_pfn(),
            p2m_frames = p2m.frames.len(),
            "PV guest"
        );
        Ok(Self {
            domain,
            guest,
            info,
            m2p,
            shared_info,
            announced: p2m.max_pfn(),
            p2m,
        })
    }

    fn pfn(&self, mfn: Mfn) -> Option<Pfn> {
        self.p2m.pfn(&self.m2p, mfn)
    }

    fn pfn_of_field(&self, frame: u64, field: impl FnOnce() -> String) -> Result<u64, GuestError> {
        match self.pfn(Mfn(frame)) {
            Some(pfn) => Ok(pfn.0),
            None => Err(GuestError::Frame {
                field: field(),
                frame,
                why: "it is not in the guest's p2m",
            }),
        }
    }

    /// The basic context of a vcpu, with its frames turned into pfns: start_info in vcpu 0's edx,
    /// the GDT's frames, cr3, and in a 64-bit guest the user tables in cr1.
    fn vcpu_basic(&self, id: u32) -> Result<Vec<u8>, SaveError> {
        let info = self.info;
        let mut context = self.guest.vcpu_state(id, VcpuBlob::Basic)?;
        let expected = vcpu_basic_bytes(info);
        if context.len() != expected {
            let got = context.len();
            return Err(GuestError::VcpuContext {
                vcpu: id,
                expected,
                got,
            }
            .into());
        }
        let bytes = context.as_mut_slice();
        if id == 0 {
            let pfn = self.pfn_of_field(vcpu::EDX.get(info, bytes), || {
                "vcpu 0's suspend record (edx)".to_owned()
            })?;
            vcpu::EDX.set(info, bytes, pfn);
        }
        for (frame, field) in gdt_frames(id, info, bytes)? {
            let at = vcpu::gdt_frame(frame);
            let pfn = self.pfn_of_field(at.get(info, bytes), || field.clone())?;
            at.set(info, bytes, pfn);
        }
        let cr3 = vcpu::ctrlreg(3);
        let frame = cr3_to_frame(info, cr3.get(info, bytes));
        let pfn = self.pfn_of_field(frame, || format!("vcpu {id}'s cr3"))?;
        // A pfn below 2^32 always fits.
        cr3.set(
            info,
            bytes,
            frame_to_cr3(info, pfn).expect("below 2^32, as all pfns of PV guests"),
        );
        let cr1 = vcpu::ctrlreg(1);
        let user = cr1.get(info, bytes);
        if info == PvInfo::Bits64 && user != 0 {
            let pfn = self.pfn_of_field(user >> 12, || format!("vcpu {id}'s cr1"))?;
            // Bit 0 marks the table as present: a user table at pfn 0 is possible.
            cr1.set(info, bytes, 1 | pfn << 12);
        }
        Ok(context)
    }
}

/// The indices of a vcpu's GDT frames, with a name for each in an error.
fn gdt_frames(
    id: u32,
    info: PvInfo,
    context: &[u8],
) -> Result<impl Iterator<Item = (usize, String)> + use<>, GuestError> {
    let entries = vcpu::GDT_ENTS.get(info, context);
    if entries > vcpu::MAX_GDT_ENTS {
        return Err(GuestError::GdtEntries { vcpu: id, entries });
    }
    let frames = usize::try_from(entries.div_ceil(512)).unwrap_or(0);
    Ok((0..frames).map(move |i| (i, format!("vcpu {id}'s GDT frame {i}"))))
}

impl GuestSave for PvSave<'_> {
    fn guest_type(&self) -> GuestType {
        GuestType::X86_PV
    }

    fn max_pfn(&self) -> Pfn {
        self.announced
    }

    fn pfn_to_gfn(&self, pfn: Pfn) -> Option<Gfn> {
        self.p2m.mfn(pfn).map(|mfn| Gfn(mfn.0))
    }

    fn confirms(&self, pfn: Pfn, gfn: Gfn) -> bool {
        self.m2p.pfn(Mfn(gfn.0)) == Some(pfn)
    }

    fn normalises(&self, page_type: PageType) -> bool {
        page_type.table_level().is_some()
    }

    fn normalise(&self, entry: PageEntry, page: ForeignPage<'_>) -> Result<Box<Page>, GuestError> {
        let level = entry.page_type.table_level().unwrap_or(0);
        pagetable::normalise(
            entry.pfn,
            level,
            self.info,
            &page.read_entries(),
            self.m2p.compat_first(),
            |mfn| self.pfn(mfn),
        )
    }

    fn static_data(&self, out: &mut Out<'_>) -> Result<(), SaveError> {
        out.pv_info(self.info)?;
        x86::write_cpu_policy(self.domain, out)
    }

    fn start_of_stream(&self, out: &mut Out<'_>) -> Result<(), SaveError> {
        let end = u32::try_from(self.announced.0).expect("checked when the p2m was found");
        out.p2m_frames(self.info, 0, end, &self.p2m.frames)?;
        Ok(())
    }

    /// If the guest has moved or enlarged its p2m, the p2m is found and mapped again, and
    /// X86_PV_P2M_FRAMES must be sent again, which restorers treat as a correction. Lookups in the
    /// meantime have been checked by [`GuestSave::confirms`]. (Xen's saver gives up when
    /// `p2m_generation` has changed, and does not see other changes.)
    fn check_vm_state(&mut self, running: bool, go_on: &mut GoOn<'_>) -> Result<bool, SaveError> {
        let shared = self.shared_info.page(0).expect("mapped").to_page();
        // Odd while the guest is changing what maps its p2m list.
        let generation = shared_info::P2M_GENERATION.get(self.info, shared.as_slice());
        if generation % 2 == 1 {
            tracing::debug!(generation, "the guest is moving its p2m");
            return match running {
                true => Ok(false),
                false => Err(GuestError::P2mUnsettled { generation }.into()),
            };
        }
        let p2m = match (self.p2m).find_again(self.domain, &self.m2p, &shared, go_on) {
            Ok(None) => return Ok(false),
            Ok(Some(p2m)) => p2m,
            Err(error @ (SaveError::Guest(_) | SaveError::Map(_))) if running => {
                tracing::debug!(%error, "caught the guest moving its p2m");
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        if p2m.frames.len() < self.p2m.frames.len() {
            return Err(GuestError::P2mShrank {
                before: self.p2m.max_pfn(),
                now: p2m.max_pfn(),
            }
            .into());
        }
        tracing::debug!(
            before = %self.p2m.max_pfn(),
            now = %p2m.max_pfn(),
            "the guest has moved its p2m"
        );
        self.announced = self.announced.max(p2m.max_pfn());
        self.p2m = p2m;
        Ok(true)
    }

    fn end_of_checkpoint(&self, out: &mut Out<'_>) -> Result<(), SaveError> {
        x86::write_tsc_info(self.domain, out)?;
        out.shared_info(&self.shared_info.page(0).expect("mapped").to_page())?;
        let last = self.domain.info()?.max_vcpu_id;
        for id in 0..=last {
            if !self.domain.vcpu_online(id)? {
                continue;
            }
            for (blob, kind) in VCPU_RECORDS {
                let state = match blob {
                    VcpuBlob::Basic => self.vcpu_basic(id)?,
                    _ => self.guest.vcpu_state(id, blob)?,
                };
                out.vcpu_state(kind, self.info, id, &state)?;
            }
        }
        Ok(())
    }
}
