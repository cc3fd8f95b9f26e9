//! `domctl` on the mock machine, except the commands on vcpus.
//!
//! C implementation: `xen/common/domctl.c`, `xen/arch/x86/domctl.c`,
//! `xen/arch/x86/mm/paging.c`.

use crate::Errno;
use xsr_format::frame::{Gfn, PageType};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::{BODY, DOMCTL_HEADER, Face, errno, sys};
use crate::mock::domain::{MockDomain, storage_errno};
use crate::privcmd::call::{
    AFFINITY_HARD, SCHEDULER_CREDIT, SCHEDULER_OP, SCHEDULER_PUT, SET_VCPU_AFFINITY, SchedulerOp,
    VcpuAffinity,
};
use crate::xen::MSR_RELAXED;
use crate::xen::interface::Info;
use crate::{
    CpuPolicy, Detail, DirtyBitmap, DirtyRead, DomId, DomainControl, DomainInfo, DomainSettings,
    GuestKind, GuestMemory, Host, HvmGuest, LogDirty, NewDomain, PolicyEntry, PvGuest,
    ShutdownReason, TscInfo, Uuid, X86Platform,
};

/// KiB in a page.
const PAGE_KIB: u64 = 4;
/// Up to this interface version, `getdomaininfo` answers for the next domain if none has the
/// number.
const LAST_WITH_NEXT: u32 = 0x15;

/// From this interface version on, Xen chooses a domain's number only for [`DOMID_ANY`], and
/// answers ENOENT for a vcpu that does not exist.
pub(super) const FIRST_WITH_ANY: u32 = 0x18;
/// "Any number."
const DOMID_ANY: u16 = 0x7ff5;

/// A domctl being answered: the address of its union, and the domain.
pub(super) struct Domctl<'a> {
    pub(super) face: &'a Face,
    pub(super) domain: MockDomain,
    place: u64,
}

impl Domctl<'_> {
    /// The member of the union that the command uses.
    pub(super) fn load<T: FromBytes>(&self) -> Result<T, Errno> {
        self.face.load(self.place)
    }

    /// Write it back.
    pub(super) fn save<T: IntoBytes + Immutable>(&self, body: &T) -> Result<u64, Errno> {
        self.face.save(self.place, body)?;
        Ok(0)
    }

    pub(super) fn bytes(&self, address: u64, count: u64) -> Result<Vec<u8>, Errno> {
        let count = usize::try_from(count).map_err(|_| Errno::EFAULT)?;
        self.face.buffers.read(address, count)
    }
}

/// The result of a call that returns no value.
pub(super) fn done(result: Result<(), crate::BackendError>) -> Result<u64, Errno> {
    result.map(|()| 0).map_err(errno)
}

impl Face {
    pub(super) fn domctl(&self, address: u64) -> Result<u64, Errno> {
        let [cmd, version]: [u32; 2] = self.load(address)?;
        // Checked first, for every caller.
        if version != self.interface {
            return Err(Errno::EACCES);
        }
        if self.state().obstacles.unprivileged {
            return Err(Errno::EPERM);
        }
        let domid: u16 = self.load(address + 8)?;
        let place = address + DOMCTL_HEADER;
        // All of it must be readable, however much the command uses.
        self.load::<[u8; BODY]>(place)?;
        match cmd {
            sys::XEN_DOMCTL_createdomain => {
                let body: [u8; BODY] = self.load(place)?;
                // Newer versions take a number other than DOMID_ANY literally.
                if self.interface >= FIRST_WITH_ANY && domid != DOMID_ANY {
                    return Err(Errno::EEXIST);
                }
                let domid = self.create(&body)?;
                self.save(address + 8, &domid.0)?;
                Ok(0)
            }
            sys::XEN_DOMCTL_getdomaininfo => {
                let info = self.info_of_next(domid)?;
                self.buffers.write(place, &info)?;
                Ok(0)
            }
            _ => {
                let call = Domctl {
                    face: self,
                    domain: self.domain(domid)?,
                    place,
                };
                call.answer(cmd)
            }
        }
    }

    fn create(&self, body: &[u8]) -> Result<DomId, Errno> {
        let layout = self.layout().ok_or(Errno::ENOSYS)?;
        let create = (layout.decode_create)(body).ok_or(Errno::EINVAL)?;
        let translated = create.flags & sys::XEN_DOMCTL_CDF_hvm != 0;
        let known = sys::XEN_DOMCTL_CDF_hvm | sys::XEN_DOMCTL_CDF_hap;
        let device_model = sys::XEN_X86_EMU_ALL & !sys::XEN_X86_EMU_VPCI;
        let kind = match (translated, create.emulation) {
            _ if create.flags & !known != 0 => return Err(Errno::EINVAL),
            _ if create.flags & sys::XEN_DOMCTL_CDF_hap != 0
                && self.state().obstacles.no_nested_paging =>
            {
                return Err(Errno::EINVAL);
            }
            (false, 0) => GuestKind::Pv,
            (true, sys::XEN_X86_EMU_LAPIC) => GuestKind::Pvh,
            (true, emulation) if emulation == device_model => GuestKind::Hvm,
            _ => return Err(Errno::EINVAL),
        };
        let frames = |frames: i32| u32::try_from(frames).ok();
        let settings = DomainSettings {
            max_event_port: create.max_evtchn_port,
            max_grant_frames: frames(create.max_grant_frames),
            max_maptrack_frames: frames(create.max_maptrack_frames),
            max_grant_version: match u8::try_from(create.grant_version) {
                Ok(2) if self.state().obstacles.first_grants_only => return Err(Errno::EINVAL),
                Ok(0) => None,
                Ok(version) => Some(version),
                Err(_) => return Err(Errno::EINVAL),
            },
            ssidref: create.ssidref,
            msr_relaxed: create.misc_flags & MSR_RELAXED != 0,
            cpupool: create.cpupool,
            // Xen's default; the toolstack may set another later.
            timer_mode: 0,
            time_offset_seconds: 0,
            paging_kib: None,
        };
        let new = NewDomain::new(kind, create.vcpus, 0)
            .uuid(Uuid(create.handle))
            .settings(settings);
        self.host.create(&new).map_err(errno)
    }

    fn info_of_next(&self, domid: u16) -> Result<Vec<u8>, Errno> {
        let domid = match (self.domain(domid), self.interface) {
            (Ok(_), _) => domid,
            // The control domain, which is not in the machine's list.
            (Err(_), _) if domid == 0 => 0,
            (Err(_), ..=LAST_WITH_NEXT) => self
                .host
                .machine
                .all_domains()
                .map_err(|error| storage_errno(&error))?
                .iter()
                .map(|domain| domain.domid.0)
                .find(|next| *next > domid)
                .ok_or(Errno::ESRCH)?,
            (Err(errno), _) => return Err(errno),
        };
        self.info_bytes(domid)
    }

    /// `xen_domctl_getdomaininfo` in this version's layout.
    pub(super) fn info_bytes(&self, domid: u16) -> Result<Vec<u8>, Errno> {
        let info = match domid {
            0 => Info {
                domid,
                flags: 0,
                tot_pages: 0,
                max_pages: u64::MAX,
                shared_info_frame: 0,
                max_vcpu_id: 0,
                emulation: 0,
                handle: [0; 16],
            },
            _ => info(&self.domain(domid)?.info().map_err(errno)?),
        };
        // The layout of a future version is unknown.
        Ok(self
            .layout()
            .map_or(vec![0; BODY], |layout| (layout.encode_info)(&info)))
    }
}

/// The same information in the hypervisor's form.
fn info(info: &DomainInfo) -> Info {
    let flag = |set, flag| if set { flag } else { 0 };
    let reason = info.shutdown.map_or(0, |reason| match reason {
        ShutdownReason::Poweroff => sys::SHUTDOWN_poweroff,
        ShutdownReason::Reboot => sys::SHUTDOWN_reboot,
        ShutdownReason::Suspend => sys::SHUTDOWN_suspend,
        ShutdownReason::Crash => sys::SHUTDOWN_crash,
        ShutdownReason::Watchdog => sys::SHUTDOWN_watchdog,
        ShutdownReason::SoftReset => sys::SHUTDOWN_soft_reset,
    });
    Info {
        domid: info.domid.0,
        flags: flag(info.kind.is_translated(), sys::XEN_DOMINF_hvm_guest)
            | flag(info.shutdown.is_some(), sys::XEN_DOMINF_shutdown)
            | flag(info.paused, sys::XEN_DOMINF_paused)
            | flag(info.dying, sys::XEN_DOMINF_dying)
            | reason << sys::XEN_DOMINF_shutdownshift,
        tot_pages: info.tot_pages,
        max_pages: info.max_pages,
        shared_info_frame: info.shared_info_frame.0,
        max_vcpu_id: info.max_vcpu_id,
        emulation: match info.kind {
            GuestKind::Pv => 0,
            GuestKind::Pvh => sys::XEN_X86_EMU_LAPIC,
            GuestKind::Hvm => sys::XEN_X86_EMU_ALL & !sys::XEN_X86_EMU_VPCI,
        },
        handle: info.uuid.0,
    }
}

impl Domctl<'_> {
    fn answer(&self, cmd: u32) -> Result<u64, Errno> {
        let domain = &self.domain;
        match cmd {
            sys::XEN_DOMCTL_pausedomain => done(domain.pause()),
            sys::XEN_DOMCTL_unpausedomain => done(domain.unpause()),
            sys::XEN_DOMCTL_destroydomain => {
                self.face.state().allocations.remove(&domain.dom.domid.0);
                done(domain.destroy())
            }
            // Resuming a running domain has no effect.
            sys::XEN_DOMCTL_resumedomain => match domain.info().map_err(errno)?.shutdown {
                None => Ok(0),
                Some(_) => done(domain.resume()),
            },
            sys::XEN_DOMCTL_max_mem => {
                let body: sys::xen_domctl_max_mem = self.load()?;
                done(domain.change("max_mem", |state| {
                    state.record.max_pages = body.max_memkb / PAGE_KIB;
                    Ok(())
                }))
            }
            sys::XEN_DOMCTL_max_vcpus => {
                let body: sys::xen_domctl_max_vcpus = self.load()?;
                let last = domain.info().map_err(errno)?.max_vcpu_id;
                match body.max == last + 1 {
                    true => Ok(0),
                    false => Err(Errno::EINVAL),
                }
            }
            sys::XEN_DOMCTL_getpageframeinfo3 => self.page_types(),
            sys::XEN_DOMCTL_shadow_op => self.shadow_op(),
            sys::XEN_DOMCTL_get_cpu_policy => self.cpu_policy(),
            sys::XEN_DOMCTL_set_cpu_policy => self.set_cpu_policy(),
            sys::XEN_DOMCTL_gettscinfo => {
                let tsc = domain.tsc_info().map_err(errno)?;
                self.save(&sys::xen_domctl_tsc_info {
                    tsc_mode: tsc.mode,
                    gtsc_khz: tsc.khz,
                    incarnation: tsc.incarnation,
                    pad: 0,
                    elapsed_nsec: tsc.nsec,
                })
            }
            sys::XEN_DOMCTL_settscinfo => {
                let body: sys::xen_domctl_tsc_info = self.load()?;
                done(domain.set_tsc_info(&TscInfo {
                    mode: body.tsc_mode,
                    khz: body.gtsc_khz,
                    nsec: body.elapsed_nsec,
                    incarnation: body.incarnation,
                }))
            }
            sys::XEN_DOMCTL_settimeoffset => {
                let body: sys::xen_domctl_settimeoffset = self.load()?;
                done(domain.change("settimeoffset", |state| {
                    state.record.settings.time_offset_seconds = body.time_offset_seconds;
                    Ok(())
                }))
            }
            SET_VCPU_AFFINITY => self.set_affinity(),
            SCHEDULER_OP => self.scheduler(),
            sys::XEN_DOMCTL_get_address_size => {
                let width = domain.guest_width().map_err(errno)?;
                self.save(&sys::xen_domctl_address_size {
                    size: u32::from(width) * 8,
                })
            }
            sys::XEN_DOMCTL_set_address_size => {
                let body: sys::xen_domctl_address_size = self.load()?;
                let width = u8::try_from(body.size / 8).map_err(|_| Errno::EINVAL)?;
                done(domain.set_guest_width(width))
            }
            sys::XEN_DOMCTL_gethvmcontext => self.hvm_context(),
            sys::XEN_DOMCTL_sethvmcontext => {
                let body: sys::xen_domctl_hvmcontext = self.load()?;
                let context = self.bytes(body.buffer, body.size.into())?;
                done(domain.set_hvm_context(&context))
            }
            _ => self.vcpu_answer(cmd),
        }
    }

    fn set_affinity(&self) -> Result<u64, Errno> {
        let body: VcpuAffinity = self.load()?;
        let last = self.domain.info().map_err(errno)?.max_vcpu_id;
        if body.flags != AFFINITY_HARD || body.vcpu > last {
            return Err(Errno::EINVAL);
        }
        let map = self.bytes(body.hard, body.hard_bits.div_ceil(8))?;
        if map.iter().all(|byte| *byte == 0) {
            return Err(Errno::EINVAL);
        }
        done(self.domain.change("setvcpuaffinity", |state| {
            state.record.placement.affinity.insert(body.vcpu, map);
            Ok(())
        }))
    }

    /// The machine's scheduler is the credit scheduler.
    fn scheduler(&self) -> Result<u64, Errno> {
        let mut body: SchedulerOp = self.load()?;
        if body.scheduler != SCHEDULER_CREDIT || self.face.state().obstacles.another_scheduler {
            return Err(Errno::EINVAL);
        }
        if body.cmd == SCHEDULER_PUT {
            return done(self.domain.change("scheduler_op", |state| {
                let placement = &mut state.record.placement;
                (placement.weight, placement.cap) = (body.weight, body.cap);
                Ok(())
            }));
        }
        let placement = (self.domain)
            .look("scheduler_op", |state| Ok(state.record.placement.clone()))
            .map_err(errno)?;
        (body.weight, body.cap) = (placement.weight, placement.cap);
        self.save(&body)
    }

    fn page_types(&self) -> Result<u64, Errno> {
        let body: sys::xen_domctl_getpageframeinfo3 = self.load()?;
        if body.num > 1024 {
            return Err(Errno::E2BIG);
        }
        let bytes = self.bytes(body.array, body.num * 8)?;
        let (words, _) = bytes.as_chunks::<8>();
        let gfns: Vec<Gfn> = words.iter().map(|w| Gfn(u64::from_ne_bytes(*w))).collect();
        let mut types = vec![PageType::NOTAB; gfns.len()];
        self.domain.page_types(&gfns, &mut types).map_err(errno)?;
        let types: Vec<u64> = types.iter().map(|t| u64::from(t.nibble()) << 28).collect();
        let mut state = self.face.state();
        if let Some(left) = state.faults.checked_sub(1) {
            state.faults = left;
            let reached = &types[..types.len() / 2];
            self.face.buffers.write(body.array, reached.as_bytes())?;
            return Err(Errno::EFAULT);
        }
        self.face.buffers.write(body.array, types.as_bytes())?;
        Ok(0)
    }

    fn shadow_op(&self) -> Result<u64, Errno> {
        let mut body: sys::xen_domctl_shadow_op = self.load()?;
        let domid = self.domain.dom.domid;
        match body.op {
            sys::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY => done(self.domain.enable_log_dirty()),
            sys::XEN_DOMCTL_SHADOW_OP_OFF => {
                self.domain.disable_log_dirty().map_err(errno)?;
                // Xen's result, once the log is off, for a domain with nested paging.
                match self.domain.dom.kind {
                    GuestKind::Pv => Ok(0),
                    GuestKind::Hvm | GuestKind::Pvh => Err(Errno::EINVAL),
                }
            }
            sys::XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION => {
                self.face.state().allocations.insert(domid.0, body.mb);
                Ok(0)
            }
            sys::XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION => {
                let state = self.face.state();
                body.mb = state.allocations.get(&domid.0).copied().unwrap_or(0);
                self.save(&body)
            }
            sys::XEN_DOMCTL_SHADOW_OP_CLEAN | sys::XEN_DOMCTL_SHADOW_OP_PEEK => {
                self.read_dirty(&mut body)?;
                self.save(&body)
            }
            _ => Err(Errno::EINVAL),
        }
    }

    fn read_dirty(&self, body: &mut sys::xen_domctl_shadow_op) -> Result<(), Errno> {
        if body.mode & !sys::XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL != 0 {
            return Err(Errno::EINVAL);
        }
        let mut bitmap = DirtyBitmap::new(body.pages);
        let on = self
            .face
            .host
            .is_log_dirty(self.domain.dom.domid)
            .map_err(|_| Errno::ESRCH)?;
        body.stats = sys::xen_domctl_shadow_op_stats::new_zeroed();
        if on {
            // Xen does not require that the domain is stopped.
            let how = match body.op {
                sys::XEN_DOMCTL_SHADOW_OP_PEEK => DirtyRead::Peek,
                _ => DirtyRead::Clean,
            };
            let stats = self.domain.read_dirty(how, &mut bitmap).map_err(errno)?;
            let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
            body.stats.dirty_count = count(stats.dirty_count);
            body.stats.fault_count = count(stats.fault_count);
        }
        let bytes = usize::try_from(body.pages.div_ceil(8)).map_err(|_| Errno::EINVAL)?;
        let mut bits = vec![0_u8; bytes];
        for pfn in bitmap.iter() {
            let place = usize::try_from(pfn.0 / 8)
                .ok()
                .and_then(|at| bits.get_mut(at));
            if let Some(byte) = place {
                *byte |= 1 << (pfn.0 % 8);
            }
        }
        if self.face.state().obstacles.short_log {
            body.pages = body.pages.saturating_sub(1);
        }
        self.face.buffers.write(body.dirty_bitmap, &bits)
    }

    fn cpu_policy(&self) -> Result<u64, Errno> {
        let mut body: sys::xen_domctl_cpu_policy = self.load()?;
        let policy = self.domain.cpu_policy().map_err(errno)?;
        let leaf = size_of::<sys::xen_cpuid_leaf>();
        let msr = size_of::<sys::xen_msr_entry>();
        for (bytes, size, room, buffer) in [
            (&policy.leaves, leaf, &mut body.nr_leaves, body.leaves),
            (&policy.msrs, msr, &mut body.nr_msrs, body.msrs),
        ] {
            let entries = u32::try_from(bytes.len() / size).map_err(|_| Errno::EINVAL)?;
            if *room < entries {
                return Err(Errno::ENOBUFS);
            }
            *room = entries;
            self.face.buffers.write(buffer, bytes)?;
        }
        self.save(&body)
    }

    fn set_cpu_policy(&self) -> Result<u64, Errno> {
        let body: sys::xen_domctl_cpu_policy = self.load()?;
        let leaf = size_of::<sys::xen_cpuid_leaf>() as u64;
        let msr = size_of::<sys::xen_msr_entry>() as u64;
        let set = self.domain.set_cpu_policy(&CpuPolicy {
            leaves: self.bytes(body.leaves, u64::from(body.nr_leaves) * leaf)?,
            msrs: self.bytes(body.msrs, u64::from(body.nr_msrs) * msr)?,
        });
        if let Err(error) = &set {
            const NOTHING: u32 = u32::MAX;
            let mut told = sys::xen_domctl_cpu_policy { ..body };
            (told.err_leaf, told.err_subleaf, told.err_msr) = match error.detail.as_deref() {
                Some(Detail::PolicyEntry(PolicyEntry::Leaf { leaf, subleaf })) => {
                    (*leaf, subleaf.unwrap_or(NOTHING), NOTHING)
                }
                Some(Detail::PolicyEntry(PolicyEntry::Msr(index))) => (NOTHING, NOTHING, *index),
                _ => (NOTHING, NOTHING, NOTHING),
            };
            self.save(&told)?;
        }
        done(set)
    }

    fn hvm_context(&self) -> Result<u64, Errno> {
        let mut body: sys::xen_domctl_hvmcontext = self.load()?;
        let context = self.domain.hvm_context().map_err(errno)?;
        let needed = u32::try_from(context.len()).map_err(|_| Errno::EINVAL)?;
        if body.buffer != 0 {
            if body.size < needed {
                return Err(Errno::ENOSPC);
            }
            self.face.buffers.write(body.buffer, &context)?;
        }
        body.size = needed;
        self.save(&body)
    }
}
