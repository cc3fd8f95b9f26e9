//! Permitted hypercalls, and the memory that the hypervisor may access for each.
//!
//! The hypervisor reads and writes at addresses that it finds in the arguments and inside their
//! structures. This module puts in all of these addresses, from buffers that stay borrowed until
//! the call has been made. The tables below give the size of each command's structure, the places
//! of the addresses in it, and the number of bytes at each address; commands that are not in the
//! tables are refused. So a caller can neither forge an address nor name a buffer that is too
//! small, and needs no `unsafe`.
//!
//! The caller is still responsible for what a command does to a domain.
//!
//! C implementation: `tools/libs/ctrl/xc_private.h` (`DECLARE_HYPERCALL_BOUNCE`); the structures
//! are those of `xen/include/public/{domctl,sysctl,memory,grant_table}.h`.

use std::marker::PhantomData;
use std::mem::offset_of;

use crate::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::CallBuffer;
use crate::sys::{common as sys, v12, v13, v14, v15, v16, v17, v18};

/// Bytes of `xen_domctl` before its union: cmd, interface_version, domain, padding.
pub(crate) const DOMCTL_HEADER: usize = 16;
/// Bytes of `xen_sysctl` before its union: cmd, interface_version.
pub(crate) const SYSCTL_HEADER: usize = 8;
/// Bytes of the union of either structure.
pub(crate) const BODY: usize = 128;

/// Bytes of the largest `xen_domctl_getdomaininfo` of any version.
pub(crate) const LARGEST_INFO: usize = 128;

/// Bytes of a 64-bit `vcpu_guest_context`; a 32-bit one is smaller.
pub(crate) const VCPU_CONTEXT: usize = size_of::<sys::vcpu_guest_context>();
/// Checks the constants defined here against the bindings of every interface version.
const _: () = {
    assert!(DOMCTL_HEADER + BODY == size_of::<sys::xen_domctl>());
    assert!(SYSCTL_HEADER + BODY == size_of::<sys::xen_sysctl>());
    assert!(size_of::<v12::xen_domctl_getdomaininfo>() <= LARGEST_INFO);
    assert!(size_of::<v13::xen_domctl_getdomaininfo>() <= LARGEST_INFO);
    assert!(size_of::<v14::xen_domctl_getdomaininfo>() <= LARGEST_INFO);
    assert!(size_of::<v15::xen_domctl_getdomaininfo>() <= LARGEST_INFO);
    assert!(size_of::<v16::xen_domctl_getdomaininfo>() <= LARGEST_INFO);
    assert!(size_of::<v17::xen_domctl_getdomaininfo>() <= LARGEST_INFO);
    assert!(size_of::<v18::xen_domctl_getdomaininfo>() <= LARGEST_INFO);
};

/// `XENMEM_get_vnumainfo`, and the bytes of its `vnuma_topology_info`: domain and padding of 2
/// each, three numbers of 4, and three addresses, which stay null.
pub(crate) const XENMEM_GET_VNUMAINFO: u32 = 26;
pub(crate) const VNUMA_INFO: usize = 2 + 2 + 3 * 4 + 3 * 8;

/// `XEN_DOMCTL_setvcpuaffinity`, and its body (`xen_domctl_vcpuaffinity`).
pub(crate) const SET_VCPU_AFFINITY: u32 = 9;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct VcpuAffinity {
    pub(crate) vcpu: u32,
    /// [`AFFINITY_HARD`]
    pub(crate) flags: u32,
    /// Address of the bitmap of processors that it may run on.
    pub(crate) hard: u64,
    pub(crate) hard_bits: u64,
    /// Likewise, of those that it should run on.
    pub(crate) soft: u64,
    pub(crate) soft_bits: u64,
}

/// `XEN_VCPUAFFINITY_HARD`
pub(crate) const AFFINITY_HARD: u32 = 1;

/// `XEN_DOMCTL_scheduler_op`, and its body for the credit scheduler.
pub(crate) const SCHEDULER_OP: u32 = 16;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct SchedulerOp {
    /// [`SCHEDULER_CREDIT`]
    pub(crate) scheduler: u32,
    /// [`SCHEDULER_PUT`] or [`SCHEDULER_GET`]: others have addresses.
    pub(crate) cmd: u32,
    pub(crate) weight: u16,
    pub(crate) cap: u16,
}

/// `XEN_SCHEDULER_CREDIT`
pub(crate) const SCHEDULER_CREDIT: u32 = 5;
/// `XEN_DOMCTL_SCHEDOP_putinfo`, `XEN_DOMCTL_SCHEDOP_getinfo`
pub(crate) const SCHEDULER_PUT: u32 = 0;
pub(crate) const SCHEDULER_GET: u32 = 1;

/// Bytes of `xen_extraversion_t`, a string that ends with a zero.
pub(crate) const EXTRA_VERSION: usize = 16;

/// Bytes of `mmuext_op`: command, first argument (here the frame), second argument.
pub(crate) const MMUEXT_OP: usize = size_of::<sys::mmuext_op>();
/// The `mmuext_op` commands used here, which take only a frame.
const PINS: [u32; 4] = [
    sys::MMUEXT_PIN_L1_TABLE,
    sys::MMUEXT_PIN_L2_TABLE,
    sys::MMUEXT_PIN_L3_TABLE,
    sys::MMUEXT_PIN_L4_TABLE,
];

/// `__HYPERVISOR_grant_table_op`, and its one permitted command.
pub(crate) const GRANT_TABLE_OP: u32 = sys::__HYPERVISOR_grant_table_op;
pub(crate) const GNTTABOP_SETUP_TABLE: u32 = sys::GNTTABOP_setup_table;
pub(crate) const XENMEM_ADD_TO_PHYSMAP: u32 = sys::XENMEM_add_to_physmap;
pub(crate) const XENMEM_REMOVE_FROM_PHYSMAP: u32 = sys::XENMEM_remove_from_physmap;

/// The number of bytes at an address that the hypervisor may access.
#[derive(Clone, Copy, Debug)]
enum Room {
    /// A fixed number of bytes.
    Bytes(usize),
    /// An array; the word of 4 or 8 bytes at an offset holds the number of its elements.
    Elements {
        at: usize,
        width: usize,
        bytes: usize,
    },
    /// A bitmap; the word of 8 bytes at an offset holds the number of its bits.
    Bits { at: usize },
}

/// An address in a structure.
#[derive(Clone, Copy, Debug)]
struct Pointer {
    at: usize,
    room: Room,
}

const fn counted(at: usize, count: usize, width: usize, bytes: usize) -> Pointer {
    Pointer {
        at,
        room: Room::Elements {
            at: count,
            width,
            bytes,
        },
    }
}

/// The addresses in the body of a domctl; `None` for a command that is refused.
fn of_domctl(cmd: u32) -> Option<&'static [Pointer]> {
    use sys::{
        xen_domctl_cpu_policy as policy, xen_domctl_getpageframeinfo3 as types,
        xen_domctl_hvmcontext as hvm, xen_domctl_shadow_op as shadow, xen_domctl_vcpu_msrs as msrs,
        xen_domctl_vcpucontext as context, xen_domctl_vcpuextstate as state,
    };
    const CONTEXT: [Pointer; 1] = [Pointer {
        at: offset_of!(context, ctxt),
        room: Room::Bytes(VCPU_CONTEXT),
    }];
    const TYPES: [Pointer; 1] = [counted(
        offset_of!(types, array),
        offset_of!(types, num),
        8,
        8,
    )];
    const DIRTY: [Pointer; 1] = [Pointer {
        at: offset_of!(shadow, dirty_bitmap),
        room: Room::Bits {
            at: offset_of!(shadow, pages),
        },
    }];
    const HVM: [Pointer; 1] = [counted(
        offset_of!(hvm, buffer),
        offset_of!(hvm, size),
        4,
        1,
    )];
    const STATE: [Pointer; 1] = [counted(
        offset_of!(state, buffer),
        offset_of!(state, size),
        8,
        1,
    )];
    const MSRS: [Pointer; 1] = [counted(
        offset_of!(msrs, msrs),
        offset_of!(msrs, msr_count),
        4,
        size_of::<sys::xen_domctl_vcpu_msr>(),
    )];
    const POLICY: [Pointer; 2] = [
        counted(
            offset_of!(policy, leaves),
            offset_of!(policy, nr_leaves),
            4,
            size_of::<sys::xen_cpuid_leaf>(),
        ),
        counted(
            offset_of!(policy, msrs),
            offset_of!(policy, nr_msrs),
            4,
            size_of::<sys::xen_msr_entry>(),
        ),
    ];
    const AFFINITY: [Pointer; 2] = [
        Pointer {
            at: offset_of!(VcpuAffinity, hard),
            room: Room::Bits {
                at: offset_of!(VcpuAffinity, hard_bits),
            },
        },
        Pointer {
            at: offset_of!(VcpuAffinity, soft),
            room: Room::Bits {
                at: offset_of!(VcpuAffinity, soft_bits),
            },
        },
    ];
    Some(match cmd {
        SET_VCPU_AFFINITY => &AFFINITY,
        SCHEDULER_OP => &[],
        sys::XEN_DOMCTL_createdomain
        | sys::XEN_DOMCTL_destroydomain
        | sys::XEN_DOMCTL_pausedomain
        | sys::XEN_DOMCTL_unpausedomain
        | sys::XEN_DOMCTL_resumedomain
        | sys::XEN_DOMCTL_getdomaininfo
        | sys::XEN_DOMCTL_max_mem
        | sys::XEN_DOMCTL_max_vcpus
        | sys::XEN_DOMCTL_getvcpuinfo
        | sys::XEN_DOMCTL_get_address_size
        | sys::XEN_DOMCTL_set_address_size
        | sys::XEN_DOMCTL_get_ext_vcpucontext
        | sys::XEN_DOMCTL_set_ext_vcpucontext
        | sys::XEN_DOMCTL_gettscinfo
        | sys::XEN_DOMCTL_settimeoffset
        | sys::XEN_DOMCTL_settscinfo => &[],
        sys::XEN_DOMCTL_getvcpucontext | sys::XEN_DOMCTL_setvcpucontext => &CONTEXT,
        sys::XEN_DOMCTL_getpageframeinfo3 => &TYPES,
        sys::XEN_DOMCTL_shadow_op => &DIRTY,
        sys::XEN_DOMCTL_gethvmcontext | sys::XEN_DOMCTL_sethvmcontext => &HVM,
        sys::XEN_DOMCTL_getvcpuextstate | sys::XEN_DOMCTL_setvcpuextstate => &STATE,
        sys::XEN_DOMCTL_get_vcpu_msrs | sys::XEN_DOMCTL_set_vcpu_msrs => &MSRS,
        sys::XEN_DOMCTL_get_cpu_policy | sys::XEN_DOMCTL_set_cpu_policy => &POLICY,
        _ => return None,
    })
}

/// The addresses in the body of a sysctl; `None` for a command that is refused.
fn of_sysctl(cmd: u32) -> Option<&'static [Pointer]> {
    use sys::{xen_sysctl_cpu_policy as policy, xen_sysctl_getdomaininfolist as list};
    const LIST: [Pointer; 1] = [counted(
        offset_of!(list, buffer),
        offset_of!(list, max_domains),
        4,
        LARGEST_INFO,
    )];
    const POLICY: [Pointer; 2] = [
        counted(
            offset_of!(policy, leaves),
            offset_of!(policy, nr_leaves),
            4,
            size_of::<sys::xen_cpuid_leaf>(),
        ),
        counted(
            offset_of!(policy, msrs),
            offset_of!(policy, nr_msrs),
            4,
            size_of::<sys::xen_msr_entry>(),
        ),
    ];
    match cmd {
        sys::XEN_SYSCTL_getdomaininfolist => Some(&LIST),
        sys::XEN_SYSCTL_get_cpu_policy => Some(&POLICY),
        sys::XEN_SYSCTL_physinfo => Some(&[]),
        _ => None,
    }
}

/// The structure of a command of another hypercall: its size in bytes, and the addresses in it.
/// `None` for a command that is refused.
fn of_operation(number: u32, cmd: u32) -> Option<(usize, &'static [Pointer])> {
    use sys::{
        gnttab_setup_table as grants, xen_machphys_mfn_list as m2p,
        xen_memory_reservation as frames,
    };
    const FRAMES: [Pointer; 1] = [counted(
        offset_of!(frames, extent_start),
        offset_of!(frames, nr_extents),
        8,
        8,
    )];
    const M2P: [Pointer; 1] = [counted(
        offset_of!(m2p, extent_start),
        offset_of!(m2p, max_extents),
        4,
        8,
    )];
    const GRANTS: [Pointer; 1] = [counted(
        offset_of!(grants, frame_list),
        offset_of!(grants, nr_frames),
        4,
        8,
    )];
    Some(match (number, cmd) {
        (
            sys::__HYPERVISOR_memory_op,
            sys::XENMEM_populate_physmap | sys::XENMEM_decrease_reservation,
        ) => (size_of::<frames>(), &FRAMES),
        (
            sys::__HYPERVISOR_memory_op,
            sys::XENMEM_machphys_mfn_list | sys::XENMEM_machphys_compat_mfn_list,
        ) => (size_of::<m2p>(), &M2P),
        (sys::__HYPERVISOR_xen_version, sys::XENVER_extraversion) => (EXTRA_VERSION, &[]),
        (sys::__HYPERVISOR_memory_op, sys::XENMEM_maximum_gpfn) => (size_of::<u16>(), &[]),
        (sys::__HYPERVISOR_memory_op, XENMEM_GET_VNUMAINFO) => (VNUMA_INFO, &[]),
        (sys::__HYPERVISOR_memory_op, XENMEM_ADD_TO_PHYSMAP) => {
            (size_of::<sys::xen_add_to_physmap>(), &[])
        }
        (sys::__HYPERVISOR_memory_op, XENMEM_REMOVE_FROM_PHYSMAP) => {
            (size_of::<sys::xen_remove_from_physmap>(), &[])
        }
        (GRANT_TABLE_OP, GNTTABOP_SETUP_TABLE) => (size_of::<grants>(), &GRANTS),
        (sys::__HYPERVISOR_hvm_op, sys::HVMOP_get_param | sys::HVMOP_set_param) => {
            (size_of::<sys::xen_hvm_param>(), &[])
        }
        (sys::__HYPERVISOR_event_channel_op, sys::EVTCHNOP_alloc_unbound) => {
            (size_of::<sys::evtchn_alloc_unbound>(), &[])
        }
        (sys::__HYPERVISOR_sched_op, sys::SCHEDOP_remote_shutdown) => {
            (size_of::<sys::sched_remote_shutdown>(), &[])
        }
        _ => return None,
    })
}

/// The buffers that a structure names, in the order of its addresses. An address without a buffer
/// is passed as null, where no process has memory.
pub(crate) type Named<'a, 'b> = &'a mut [&'b mut CallBuffer];

/// A permitted hypercall: it borrows all memory that it names.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    number: u32,
    arguments: [u64; 5],
    ours: bool,
    buffers: PhantomData<&'a mut CallBuffer>,
}

impl<'a> Call<'a> {
    /// A call without memory: `XENVER_version`, `XENMEM_maximum_ram_page`. ENOSYS for another.
    pub(crate) fn plain(number: u32, cmd: u32) -> Result<Self, Errno> {
        match (number, cmd) {
            (sys::__HYPERVISOR_xen_version, sys::XENVER_version)
            | (sys::__HYPERVISOR_memory_op, sys::XENMEM_maximum_ram_page) => {
                Ok(Self::of(number, [cmd.into(), 0, 0, 0, 0], true))
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    /// A domctl; `whole` holds its header and body. ENOSYS for a command that is not in the table,
    /// EFAULT if a buffer is too small.
    pub(crate) fn domctl(whole: &'a mut CallBuffer, named: Named<'a, '_>) -> Result<Self, Errno> {
        let cmd = number_at(whole, 0, 4)?;
        let pointers = of_domctl(cmd).ok_or(Errno::ENOSYS)?;
        if cmd == SCHEDULER_OP {
            let at = DOMCTL_HEADER + offset_of!(SchedulerOp, cmd);
            if ![SCHEDULER_PUT, SCHEDULER_GET].contains(&number_at(whole, at, 4)?) {
                return Err(Errno::ENOSYS);
            }
        }
        Self::control(
            sys::__HYPERVISOR_domctl,
            whole,
            DOMCTL_HEADER,
            pointers,
            named,
        )
    }

    /// A sysctl, likewise.
    pub(crate) fn sysctl(whole: &'a mut CallBuffer, named: Named<'a, '_>) -> Result<Self, Errno> {
        let pointers = of_sysctl(number_at(whole, 0, 4)?).ok_or(Errno::ENOSYS)?;
        Self::control(
            sys::__HYPERVISOR_sysctl,
            whole,
            SYSCTL_HEADER,
            pointers,
            named,
        )
    }

    fn control(
        number: u32,
        whole: &'a mut CallBuffer,
        header: usize,
        pointers: &[Pointer],
        named: Named<'a, '_>,
    ) -> Result<Self, Errno> {
        if whole.len() < header + BODY {
            return Err(Errno::EFAULT);
        }
        let ours = name(whole, header, pointers, named)?;
        Ok(Self::of(number, [whole.address(), 0, 0, 0, 0], ours))
    }

    /// A command of another hypercall, with its structure. ENOSYS and EFAULT as above.
    pub(crate) fn operation(
        number: u32,
        cmd: u32,
        structure: &'a mut CallBuffer,
        named: Named<'a, '_>,
    ) -> Result<Self, Errno> {
        let (bytes, pointers) = of_operation(number, cmd).ok_or(Errno::ENOSYS)?;
        if structure.len() < bytes {
            return Err(Errno::EFAULT);
        }
        let ours = name(structure, 0, pointers, named)?;
        // Grant table operations are passed as lists: here a list of one. The others use at most
        // two arguments.
        let count = u64::from(number == GRANT_TABLE_OP);
        let arguments = [cmd.into(), structure.address(), count, 0, 0];
        Ok(Self::of(number, arguments, ours))
    }

    /// Pin `count` page tables of a domain, each a `mmuext_op` of [`PINS`] in the buffer.
    /// ENOSYS and EFAULT as above.
    pub(crate) fn pins(ops: &'a mut CallBuffer, count: usize, domid: u16) -> Result<Self, Errno> {
        for index in 0..count {
            let at = index.checked_mul(MMUEXT_OP).ok_or(Errno::EFAULT)?;
            let cmd = number_at(ops, at, 4)?;
            // In some commands the second argument is an address; in these it must be zero.
            let argument: u64 = word_at(ops, at + 16, 8)?;
            if !PINS.contains(&cmd) || argument != 0 {
                return Err(Errno::ENOSYS);
            }
        }
        // The pointer to the number done is null: it is not needed.
        let arguments = [ops.address(), count as u64, 0, domid.into(), 0];
        Ok(Self::of(
            sys::__HYPERVISOR_mmuext_op,
            arguments,
            ops.is_ours(),
        ))
    }

    fn of(number: u32, arguments: [u64; 5], ours: bool) -> Self {
        Self {
            number,
            arguments,
            ours,
            buffers: PhantomData,
        }
    }

    /// `__HYPERVISOR_*`.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// The arguments in the hypervisor's order.
    pub(crate) fn arguments(&self) -> [u64; 5] {
        self.arguments
    }

    /// Whether all named memory belongs to this process and to privcmd's buffers.
    pub(super) fn is_ours(&self) -> bool {
        self.ours
    }
}

fn word_at(buffer: &CallBuffer, at: usize, width: usize) -> Result<u64, Errno> {
    let end = at.checked_add(width).ok_or(Errno::EFAULT)?;
    if end > buffer.len() || width > 8 {
        return Err(Errno::EFAULT);
    }
    let mut word = [0; 8];
    buffer.read(at, &mut word[..width]);
    Ok(u64::from_le_bytes(word))
}

fn number_at(buffer: &CallBuffer, at: usize, width: usize) -> Result<u32, Errno> {
    u32::try_from(word_at(buffer, at, width)?).map_err(|_| Errno::ENOSYS)
}

/// Put the addresses of `named` into `structure`, whose body begins at `base`; missing ones are
/// null. Returns whether all of the memory belongs to this process.
fn name(
    structure: &mut CallBuffer,
    base: usize,
    pointers: &[Pointer],
    named: Named<'_, '_>,
) -> Result<bool, Errno> {
    if named.len() > pointers.len() {
        return Err(Errno::EFAULT);
    }
    let mut ours = structure.is_ours();
    for (index, pointer) in pointers.iter().enumerate() {
        let buffer = named.get(index);
        if let Some(buffer) = buffer {
            let room = match pointer.room {
                Room::Bytes(bytes) => bytes as u64,
                Room::Elements { at, width, bytes } => {
                    let count = word_at(structure, base + at, width)?;
                    count.checked_mul(bytes as u64).ok_or(Errno::EFAULT)?
                }
                Room::Bits { at } => word_at(structure, base + at, 8)?.div_ceil(8),
            };
            if room > buffer.len() as u64 {
                return Err(Errno::EFAULT);
            }
            ours &= buffer.is_ours();
        }
        let address = buffer.map_or(0, |buffer| buffer.address());
        structure.write(base + pointer.at, &address.to_le_bytes());
    }
    Ok(ours)
}
