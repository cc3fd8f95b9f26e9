//! Applying the records of a PV guest to the domain.
//!
//! C implementation: `xg_sr_restore_x86_pv.c`.

use xsr_format::frame::{Gfn, Mfn, PAGE_SHIFT, Page, Pfn};
use xsr_format::guest_image::GuestImage;
use xsr_format::record::pv::PvInfo;
use xsr_format::record::{MAX_BATCH, RecordKind};
use xsr_xen_backend::{
    Access, BackendError, Domain, Errno, ForeignPages, PvGuest, RingGrant, VcpuBlob,
};

use crate::error::{GuestError, RestoreError};
use crate::guest::pv::blame;
use crate::guest::pv::layout::{Field, cr3_to_frame, frame_to_cr3, shared_info, start_info, vcpu};
use crate::guest::pv::p2m::SharedP2m;
use crate::guest::pv::{VCPU_RECORDS, gdt_frames, guest_info};
use crate::guest::x86;
use crate::restore::Rings;

/// The restore side.
pub(crate) struct PvRestore<'r> {
    guest: &'r dyn PvGuest,
    info: PvInfo,
    max_pfn: Pfn,
    pub(crate) p2m: SharedP2m,
}

impl<'r> PvRestore<'r> {
    pub(crate) fn new(guest: &'r dyn PvGuest) -> Self {
        Self {
            guest,
            info: PvInfo::Bits64,
            max_pfn: Pfn(0),
            p2m: SharedP2m::default(),
        }
    }

    /// The last pfn that the guest may have.
    pub(crate) fn max_pfn(&self) -> Pfn {
        self.max_pfn
    }

    /// X86_PV_INFO: gives the domain the guest's word width. A new domain is 64 bits wide, and Xen
    /// does not know of a 32-bit guest before this.
    pub(crate) fn pv_info(&mut self, info: PvInfo) -> Result<(), RestoreError> {
        if guest_info(self.guest)?? != info {
            self.guest.set_guest_width(info.width())?;
        }
        self.info = info;
        Ok(())
    }

    /// X86_PV_P2M_FRAMES has announced pfns up to this one.
    pub(crate) fn set_max_pfn(&mut self, max_pfn: Pfn) {
        self.max_pfn = max_pfn;
    }

    /// The state of a vcpu was refused because of `cause`: finds what may be wrong with it.
    fn vcpu_refused(
        &self,
        domain: &dyn Domain,
        vcpu: u32,
        kind: RecordKind,
        state: &[u8],
        cause: BackendError,
    ) -> RestoreError {
        if matches!(
            cause.errno,
            Errno::ESRCH | Errno::EPERM | Errno::EACCES | Errno::ENOMEM
        ) {
            return cause.into();
        }
        if kind == RecordKind::X86_PV_VCPU_BASIC {
            let cr3 = vcpu::ctrlreg(3).get(self.info, state);
            let root = Pfn(cr3_to_frame(self.info, cr3));
            match blame::table(
                (domain, self.guest),
                &self.p2m.read(),
                self.info,
                vcpu,
                root,
            ) {
                Ok(None) => {}
                Ok(Some(error)) => return error.into(),
                Err(error) => tracing::debug!(%error, "the page tables could not be looked at"),
            }
        }
        RestoreError::VcpuState {
            vcpu,
            kind,
            bytes: state.len(),
            reason: String::new(),
            cause,
        }
    }

    /// Applies everything that was kept: shared_info, vcpus (with start_info), pins, the p2m, the
    /// grants; in Xen's order, in which page tables are validated before the p2m is written.
    /// Returns the frames of the store and console rings.
    pub(crate) fn complete(
        &self,
        image: &GuestImage,
        domain: &dyn Domain,
        ports: &Rings,
        go_on: &mut dyn FnMut() -> Result<(), RestoreError>,
    ) -> Result<(Option<Gfn>, Option<Gfn>), RestoreError> {
        if let Some(page) = image.shared_info() {
            self.merge_shared_info(domain, page)?;
        }
        let mut rings = (None, None);
        for (&id, vcpu) in image.vcpus() {
            go_on()?;
            for (blob, kind) in &VCPU_RECORDS {
                let Some(state) = vcpu.blob(*kind).filter(|state| !state.is_empty()) else {
                    continue;
                };
                let set = if *blob == VcpuBlob::Basic {
                    let mut context = state.to_vec();
                    if id == 0 {
                        rings = self.start_info(domain, &mut context, ports)?;
                    }
                    self.localise_context(id, &mut context)?;
                    self.guest.set_vcpu_state(id, *blob, &context)
                } else {
                    self.guest.set_vcpu_state(id, *blob, state)
                };
                set.map_err(|cause| self.vcpu_refused(domain, id, *kind, state, cause))?;
            }
        }
        self.pin_tables(go_on)?;
        let frames = image.p2m().map_or(&[][..], |p2m| &p2m.frames);
        self.p2m
            .read()
            .write_back(domain, self.info, frames, self.max_pfn, go_on)?;
        let (store, console) = rings;
        if let Some(console) = console {
            x86::disconnect_console(domain, console)?;
        }
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
        Ok(rings)
    }

    /// Merges the image's shared_info into the domain's. The guest's own fields are taken over.
    /// Event channels are reset and all masked, since none survives. The frame list must be
    /// published anew, because it held mfns.
    fn merge_shared_info(&self, domain: &dyn Domain, image: &Page) -> Result<(), RestoreError> {
        let info = self.info;
        let frame = domain.info()?.shared_info_frame;
        let pages = map_one(domain, frame)?;
        let page = pages.page(0).expect("mapped");
        let mut shared = page.to_page();
        for range in [shared_info::vcpu_info(info), shared_info::arch(info)] {
            shared[range.clone()].copy_from_slice(&image[range]);
        }
        shared_info::FRAME_LIST_LIST.set(info, shared.as_mut_slice(), 0);
        shared[shared_info::evtchn_pending(info)].fill(0);
        shared[shared_info::evtchn_mask(info)].fill(0xff);
        for vcpu_info in
            shared[shared_info::vcpu_info(info)].chunks_exact_mut(shared_info::VCPU_INFO_BYTES)
        {
            shared_info::PENDING_SEL.set(info, vcpu_info, 0);
        }
        page.copy_from(&shared);
        Ok(())
    }

    /// Vcpu 0's suspend record names start_info, in which the guest finds its rings and
    /// shared_info: these are all new here.
    fn start_info(
        &self,
        domain: &dyn Domain,
        context: &mut [u8],
        ports: &Rings,
    ) -> Result<(Option<Gfn>, Option<Gfn>), RestoreError> {
        let info = self.info;
        let pfn = Pfn(vcpu::EDX.get(info, context));
        let gfn = self
            .p2m
            .read()
            .ordinary_frame(pfn, || "vcpu 0's suspend record (edx)".to_owned())?;
        vcpu::EDX.set(info, context, gfn.0);

        let pages = map_one(domain, gfn)?;
        let page = pages.page(0).expect("mapped");
        let mut contents = page.to_page();
        let bytes = contents.as_mut_slice();
        let ring = |bytes: &mut [u8], mfn: Field, port: Field, value: u32, name: &str| {
            let pfn = Pfn(mfn.get(info, bytes));
            let frame = self.p2m.read().mfn(pfn).ok_or_else(|| GuestError::Frame {
                field: format!("start_info's {name} frame"),
                frame: pfn.0,
                why: "the image holds no such page",
            })?;
            mfn.set(info, bytes, frame.0);
            port.set(info, bytes, u64::from(value));
            Ok::<_, GuestError>(Gfn(frame.0))
        };
        let store = ring(
            bytes,
            start_info::STORE_MFN,
            start_info::STORE_EVTCHN,
            ports.store_port,
            "store",
        )?;
        let console = ring(
            bytes,
            start_info::CONSOLE_MFN,
            start_info::CONSOLE_EVTCHN,
            ports.console_port,
            "console",
        )?;
        let shared = domain.info()?.shared_info_frame;
        start_info::NR_PAGES.set(info, bytes, self.max_pfn.0 + 1);
        start_info::SHARED_INFO.set(info, bytes, shared.0 << PAGE_SHIFT);
        start_info::FLAGS.set(info, bytes, 0);
        page.copy_from(&contents);
        Ok((Some(store), Some(console)))
    }

    /// Turns the pfns in a basic context into mfns, and marks the vcpu online.
    fn localise_context(&self, id: u32, context: &mut [u8]) -> Result<(), RestoreError> {
        let info = self.info;
        let flags = vcpu::FLAGS.get(info, context);
        vcpu::FLAGS.set(info, context, flags | vcpu::ONLINE);
        for (frame, field) in gdt_frames(id, info, context)? {
            let at = vcpu::gdt_frame(frame);
            let gfn = self
                .p2m
                .read()
                .ordinary_frame(Pfn(at.get(info, context)), || field.clone())?;
            at.set(info, context, gfn.0);
        }
        let cr3 = vcpu::ctrlreg(3);
        let pfn = Pfn(cr3_to_frame(info, cr3.get(info, context)));
        let name = || format!("vcpu {id}'s cr3");
        let mfn = self.p2m.read().table_frame(pfn, info.levels(), name)?;
        let value = frame_to_cr3(info, mfn.0).ok_or(RestoreError::FrameTooHigh {
            vcpu: id,
            frame: mfn,
        })?;
        cr3.set(info, context, value);
        let cr1 = vcpu::ctrlreg(1);
        let user = cr1.get(info, context);
        if info == PvInfo::Bits64 && user & 1 != 0 {
            let name = || format!("vcpu {id}'s cr1");
            let mfn = self
                .p2m
                .read()
                .table_frame(Pfn(user >> PAGE_SHIFT), info.levels(), name)?;
            cr1.set(info, context, mfn.0 << PAGE_SHIFT);
        }
        Ok(())
    }

    /// Pins every table that was pinned, ascending by pfn, with as many in one call as Xen's own
    /// restorer uses.
    fn pin_tables(
        &self,
        go_on: &mut dyn FnMut() -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        let tables: Vec<(u8, Mfn)> = self
            .p2m
            .read()
            .pinned()
            .map(|(pfn, level, mfn)| match mfn {
                Some(mfn) => Ok((level, mfn)),
                None => Err(GuestError::Frame {
                    field: "a pinned page table".to_owned(),
                    frame: pfn.0,
                    why: "the image holds no such page",
                }),
            })
            .collect::<Result<_, _>>()?;
        for batch in tables.chunks(MAX_BATCH) {
            go_on()?;
            self.guest.pin_tables(batch)?;
        }
        Ok(())
    }
}

fn map_one(domain: &dyn Domain, gfn: Gfn) -> Result<ForeignPages, RestoreError> {
    Ok(domain.map(&[gfn], Access::Write)?.all_mapped()?)
}
