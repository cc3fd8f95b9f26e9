//! What is the same in every version of Xen's interfaces. Made by `cargo xtask bindings` from the public
//! headers of Xen 4.22.0 (MIT); not to be edited.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub type domid_t = u16;
pub type evtchn_port_t = u32;
pub type xen_pfn_t = u64;
pub type xen_ulong_t = u64;
pub type __guest_handle_uint64 = u64;
pub type __guest_handle_uint8 = u64;
pub type __guest_handle_vcpu_guest_context_t = u64;
pub type __guest_handle_xen_cpuid_leaf_t = u64;
pub type __guest_handle_xen_domctl_getdomaininfo_t = u64;
pub type __guest_handle_xen_domctl_vcpu_msr_t = u64;
pub type __guest_handle_xen_msr_entry_t = u64;
pub type __guest_handle_xen_pfn_t = u64;
#[repr(C)]
#[repr(align(8))]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct vcpu_guest_context {
    pub _bindgen_opaque_blob: [u64; 646usize],
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_cpuid_leaf {
    pub leaf: u32,
    pub subleaf: u32,
    pub a: u32,
    pub b: u32,
    pub c: u32,
    pub d: u32,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_msr_entry {
    pub idx: u32,
    pub flags: u32,
    pub val: u64,
}
#[repr(C)]
#[repr(align(8))]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct mmuext_op {
    pub _bindgen_opaque_blob: [u64; 3usize],
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct evtchn_alloc_unbound {
    pub dom: domid_t,
    pub remote_dom: domid_t,
    pub port: evtchn_port_t,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct evtchn_close {
    pub port: evtchn_port_t,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct grant_entry_v1 {
    pub flags: u16,
    pub domid: domid_t,
    pub frame: u32,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct gnttab_setup_table {
    pub dom: domid_t,
    pub __bindgen_padding_0: [u8; 2usize],
    pub nr_frames: u32,
    pub status: i16,
    pub __bindgen_padding_1: [u8; 6usize],
    pub frame_list: __guest_handle_xen_pfn_t,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_memory_reservation {
    pub extent_start: __guest_handle_xen_pfn_t,
    pub nr_extents: xen_ulong_t,
    pub extent_order: ::core::ffi::c_uint,
    pub mem_flags: ::core::ffi::c_uint,
    pub domid: domid_t,
    pub __bindgen_padding_0: [u8; 6usize],
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_machphys_mfn_list {
    pub max_extents: ::core::ffi::c_uint,
    pub __bindgen_padding_0: [u8; 4usize],
    pub extent_start: __guest_handle_xen_pfn_t,
    pub nr_extents: ::core::ffi::c_uint,
    pub __bindgen_padding_1: [u8; 4usize],
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_add_to_physmap {
    pub domid: domid_t,
    pub size: u16,
    pub space: ::core::ffi::c_uint,
    pub idx: xen_ulong_t,
    pub gpfn: xen_pfn_t,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_remove_from_physmap {
    pub domid: domid_t,
    pub __bindgen_padding_0: [u8; 6usize],
    pub gpfn: xen_pfn_t,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_getpageframeinfo3 {
    pub num: u64,
    pub array: __guest_handle_xen_pfn_t,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_shadow_op_stats {
    pub fault_count: u32,
    pub dirty_count: u32,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_shadow_op {
    pub op: u32,
    pub mode: u32,
    pub mb: u32,
    pub __bindgen_padding_0: [u8; 4usize],
    pub dirty_bitmap: __guest_handle_uint8,
    pub pages: u64,
    pub stats: xen_domctl_shadow_op_stats,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_max_mem {
    pub max_memkb: u64,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_vcpucontext {
    pub vcpu: u32,
    pub __bindgen_padding_0: [u8; 4usize],
    pub ctxt: __guest_handle_vcpu_guest_context_t,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_getvcpuinfo {
    pub vcpu: u32,
    pub online: u8,
    pub blocked: u8,
    pub running: u8,
    pub __bindgen_padding_0: u8,
    pub cpu_time: u64,
    pub cpu: u32,
    pub __bindgen_padding_1: [u8; 4usize],
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_max_vcpus {
    pub max: u32,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_settimeoffset {
    pub time_offset_seconds: i64,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_hvmcontext {
    pub size: u32,
    pub __bindgen_padding_0: [u8; 4usize],
    pub buffer: __guest_handle_uint8,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_address_size {
    pub size: u32,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_cpu_policy {
    pub nr_leaves: u32,
    pub nr_msrs: u32,
    pub leaves: __guest_handle_xen_cpuid_leaf_t,
    pub msrs: __guest_handle_xen_msr_entry_t,
    pub err_leaf: u32,
    pub err_subleaf: u32,
    pub err_msr: u32,
    pub __bindgen_padding_0: [u8; 4usize],
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_tsc_info {
    pub tsc_mode: u32,
    pub gtsc_khz: u32,
    pub incarnation: u32,
    pub pad: u32,
    pub elapsed_nsec: u64,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_vcpuextstate {
    pub vcpu: u32,
    pub __bindgen_padding_0: [u8; 4usize],
    pub xfeature_mask: u64,
    pub size: u64,
    pub buffer: __guest_handle_uint64,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_vcpu_msr {
    pub index: u32,
    pub reserved: u32,
    pub value: u64,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_vcpu_msrs {
    pub vcpu: u32,
    pub msr_count: u32,
    pub msrs: __guest_handle_xen_domctl_vcpu_msr_t,
}
#[repr(C)]
#[repr(align(8))]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl {
    pub _bindgen_opaque_blob: [u64; 18usize],
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_sysctl_getdomaininfolist {
    pub first_domain: domid_t,
    pub __bindgen_padding_0: [u8; 2usize],
    pub max_domains: u32,
    pub buffer: __guest_handle_xen_domctl_getdomaininfo_t,
    pub num_domains: u32,
    pub __bindgen_padding_1: [u8; 4usize],
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_sysctl_cpu_policy {
    pub index: u32,
    pub nr_leaves: u32,
    pub nr_msrs: u32,
    pub _rsvd: u32,
    pub leaves: __guest_handle_xen_cpuid_leaf_t,
    pub msrs: __guest_handle_xen_msr_entry_t,
}
#[repr(C)]
#[repr(align(8))]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_sysctl {
    pub _bindgen_opaque_blob: [u64; 17usize],
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct sched_remote_shutdown {
    pub domain_id: domid_t,
    pub __bindgen_padding_0: [u8; 2usize],
    pub reason: ::core::ffi::c_uint,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_hvm_param {
    pub domid: domid_t,
    pub pad: u16,
    pub index: u32,
    pub value: u64,
}
pub const XEN_X86_EMU_LAPIC: u32 = 1;
pub const XEN_X86_EMU_VPCI: u32 = 1024;
pub const XEN_X86_EMU_ALL: u32 = 2047;
pub const __HYPERVISOR_memory_op: u32 = 12;
pub const __HYPERVISOR_xen_version: u32 = 17;
pub const __HYPERVISOR_grant_table_op: u32 = 20;
pub const __HYPERVISOR_mmuext_op: u32 = 26;
pub const __HYPERVISOR_sched_op: u32 = 29;
pub const __HYPERVISOR_event_channel_op: u32 = 32;
pub const __HYPERVISOR_hvm_op: u32 = 34;
pub const __HYPERVISOR_sysctl: u32 = 35;
pub const __HYPERVISOR_domctl: u32 = 36;
pub const MMUEXT_PIN_L1_TABLE: u32 = 0;
pub const MMUEXT_PIN_L2_TABLE: u32 = 1;
pub const MMUEXT_PIN_L3_TABLE: u32 = 2;
pub const MMUEXT_PIN_L4_TABLE: u32 = 3;
pub const EVTCHNOP_close: u32 = 3;
pub const EVTCHNOP_alloc_unbound: u32 = 6;
pub const GNTTAB_RESERVED_CONSOLE: u32 = 0;
pub const GNTTAB_RESERVED_XENSTORE: u32 = 1;
pub const GTF_permit_access: u32 = 1;
pub const GNTTABOP_setup_table: u32 = 2;
pub const XENMEM_decrease_reservation: u32 = 1;
pub const XENMEM_populate_physmap: u32 = 6;
pub const XENMEM_maximum_ram_page: u32 = 2;
pub const XENMEM_maximum_gpfn: u32 = 14;
pub const XENMEM_machphys_mfn_list: u32 = 5;
pub const XENMEM_machphys_compat_mfn_list: u32 = 25;
pub const XENMEM_add_to_physmap: u32 = 7;
pub const XENMEM_remove_from_physmap: u32 = 15;
pub const XENMEM_resource_grant_table: u32 = 1;
pub const XENMEM_resource_grant_table_id_shared: u32 = 0;
pub const XEN_DOMCTL_CDF_hvm: u32 = 1;
pub const XEN_DOMCTL_CDF_hap: u32 = 2;
pub const XEN_DOMINF_dying: u32 = 1;
pub const XEN_DOMINF_hvm_guest: u32 = 2;
pub const XEN_DOMINF_shutdown: u32 = 4;
pub const XEN_DOMINF_paused: u32 = 8;
pub const XEN_DOMINF_shutdownmask: u32 = 255;
pub const XEN_DOMINF_shutdownshift: u32 = 16;
pub const XEN_INVALID_MAX_VCPU_ID: i32 = -1;
pub const XEN_DOMCTL_SHADOW_OP_OFF: u32 = 0;
pub const XEN_DOMCTL_SHADOW_OP_CLEAN: u32 = 11;
pub const XEN_DOMCTL_SHADOW_OP_PEEK: u32 = 12;
pub const XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION: u32 = 30;
pub const XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION: u32 = 31;
pub const XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY: u32 = 2;
pub const XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL: u32 = 1;
pub const XEN_DOMCTL_createdomain: u32 = 1;
pub const XEN_DOMCTL_destroydomain: u32 = 2;
pub const XEN_DOMCTL_pausedomain: u32 = 3;
pub const XEN_DOMCTL_unpausedomain: u32 = 4;
pub const XEN_DOMCTL_getdomaininfo: u32 = 5;
pub const XEN_DOMCTL_shadow_op: u32 = 10;
pub const XEN_DOMCTL_max_mem: u32 = 11;
pub const XEN_DOMCTL_setvcpucontext: u32 = 12;
pub const XEN_DOMCTL_getvcpucontext: u32 = 13;
pub const XEN_DOMCTL_getvcpuinfo: u32 = 14;
pub const XEN_DOMCTL_max_vcpus: u32 = 15;
pub const XEN_DOMCTL_settimeoffset: u32 = 24;
pub const XEN_DOMCTL_resumedomain: u32 = 27;
pub const XEN_DOMCTL_gethvmcontext: u32 = 33;
pub const XEN_DOMCTL_sethvmcontext: u32 = 34;
pub const XEN_DOMCTL_set_address_size: u32 = 35;
pub const XEN_DOMCTL_get_address_size: u32 = 36;
pub const XEN_DOMCTL_set_ext_vcpucontext: u32 = 42;
pub const XEN_DOMCTL_get_ext_vcpucontext: u32 = 43;
pub const XEN_DOMCTL_gettscinfo: u32 = 59;
pub const XEN_DOMCTL_settscinfo: u32 = 60;
pub const XEN_DOMCTL_getpageframeinfo3: u32 = 61;
pub const XEN_DOMCTL_setvcpuextstate: u32 = 62;
pub const XEN_DOMCTL_getvcpuextstate: u32 = 63;
pub const XEN_DOMCTL_get_vcpu_msrs: u32 = 72;
pub const XEN_DOMCTL_set_vcpu_msrs: u32 = 73;
pub const XEN_DOMCTL_get_cpu_policy: u32 = 82;
pub const XEN_DOMCTL_set_cpu_policy: u32 = 83;
pub const XEN_SYSCTL_cpu_policy_host: u32 = 1;
pub const XEN_SYSCTL_cpu_policy_pv_max: u32 = 2;
pub const XEN_SYSCTL_cpu_policy_hvm_max: u32 = 3;
pub const XEN_SYSCTL_getdomaininfolist: u32 = 6;
pub const XEN_SYSCTL_get_cpu_policy: u32 = 29;
pub const XENVER_version: u32 = 0;
pub const XENVER_extraversion: u32 = 1;
pub const SCHEDOP_remote_shutdown: u32 = 4;
pub const SHUTDOWN_poweroff: u32 = 0;
pub const SHUTDOWN_reboot: u32 = 1;
pub const SHUTDOWN_suspend: u32 = 2;
pub const SHUTDOWN_crash: u32 = 3;
pub const SHUTDOWN_watchdog: u32 = 4;
pub const SHUTDOWN_soft_reset: u32 = 5;
pub const HVMOP_set_param: u32 = 0;
pub const HVMOP_get_param: u32 = 1;
pub const HVM_PARAM_CALLBACK_IRQ: u32 = 0;
pub const HVM_PARAM_TIMER_MODE: u32 = 10;
const _: () = {
    ["Size of vcpu_guest_context"][::core::mem::size_of::<vcpu_guest_context>() - 5168usize];
    ["Alignment of vcpu_guest_context"][::core::mem::align_of::<vcpu_guest_context>() - 8usize];
};
const _: () = {
    ["Size of xen_cpuid_leaf"][::core::mem::size_of::<xen_cpuid_leaf>() - 24usize];
    ["Alignment of xen_cpuid_leaf"][::core::mem::align_of::<xen_cpuid_leaf>() - 4usize];
    ["Offset of field: xen_cpuid_leaf::leaf"]
        [::core::mem::offset_of!(xen_cpuid_leaf, leaf) - 0usize];
    ["Offset of field: xen_cpuid_leaf::subleaf"]
        [::core::mem::offset_of!(xen_cpuid_leaf, subleaf) - 4usize];
    ["Offset of field: xen_cpuid_leaf::a"][::core::mem::offset_of!(xen_cpuid_leaf, a) - 8usize];
    ["Offset of field: xen_cpuid_leaf::b"][::core::mem::offset_of!(xen_cpuid_leaf, b) - 12usize];
    ["Offset of field: xen_cpuid_leaf::c"][::core::mem::offset_of!(xen_cpuid_leaf, c) - 16usize];
    ["Offset of field: xen_cpuid_leaf::d"][::core::mem::offset_of!(xen_cpuid_leaf, d) - 20usize];
};
const _: () = {
    ["Size of xen_msr_entry"][::core::mem::size_of::<xen_msr_entry>() - 16usize];
    ["Alignment of xen_msr_entry"][::core::mem::align_of::<xen_msr_entry>() - 8usize];
    ["Offset of field: xen_msr_entry::idx"][::core::mem::offset_of!(xen_msr_entry, idx) - 0usize];
    ["Offset of field: xen_msr_entry::flags"]
        [::core::mem::offset_of!(xen_msr_entry, flags) - 4usize];
    ["Offset of field: xen_msr_entry::val"][::core::mem::offset_of!(xen_msr_entry, val) - 8usize];
};
const _: () = {
    ["Size of mmuext_op"][::core::mem::size_of::<mmuext_op>() - 24usize];
    ["Alignment of mmuext_op"][::core::mem::align_of::<mmuext_op>() - 8usize];
};
const _: () = {
    ["Size of evtchn_alloc_unbound"][::core::mem::size_of::<evtchn_alloc_unbound>() - 8usize];
    ["Alignment of evtchn_alloc_unbound"][::core::mem::align_of::<evtchn_alloc_unbound>() - 4usize];
    ["Offset of field: evtchn_alloc_unbound::dom"]
        [::core::mem::offset_of!(evtchn_alloc_unbound, dom) - 0usize];
    ["Offset of field: evtchn_alloc_unbound::remote_dom"]
        [::core::mem::offset_of!(evtchn_alloc_unbound, remote_dom) - 2usize];
    ["Offset of field: evtchn_alloc_unbound::port"]
        [::core::mem::offset_of!(evtchn_alloc_unbound, port) - 4usize];
};
const _: () = {
    ["Size of evtchn_close"][::core::mem::size_of::<evtchn_close>() - 4usize];
    ["Alignment of evtchn_close"][::core::mem::align_of::<evtchn_close>() - 4usize];
    ["Offset of field: evtchn_close::port"][::core::mem::offset_of!(evtchn_close, port) - 0usize];
};
const _: () = {
    ["Size of grant_entry_v1"][::core::mem::size_of::<grant_entry_v1>() - 8usize];
    ["Alignment of grant_entry_v1"][::core::mem::align_of::<grant_entry_v1>() - 4usize];
    ["Offset of field: grant_entry_v1::flags"]
        [::core::mem::offset_of!(grant_entry_v1, flags) - 0usize];
    ["Offset of field: grant_entry_v1::domid"]
        [::core::mem::offset_of!(grant_entry_v1, domid) - 2usize];
    ["Offset of field: grant_entry_v1::frame"]
        [::core::mem::offset_of!(grant_entry_v1, frame) - 4usize];
};
const _: () = {
    ["Size of gnttab_setup_table"][::core::mem::size_of::<gnttab_setup_table>() - 24usize];
    ["Alignment of gnttab_setup_table"][::core::mem::align_of::<gnttab_setup_table>() - 8usize];
    ["Offset of field: gnttab_setup_table::dom"]
        [::core::mem::offset_of!(gnttab_setup_table, dom) - 0usize];
    ["Offset of field: gnttab_setup_table::nr_frames"]
        [::core::mem::offset_of!(gnttab_setup_table, nr_frames) - 4usize];
    ["Offset of field: gnttab_setup_table::status"]
        [::core::mem::offset_of!(gnttab_setup_table, status) - 8usize];
    ["Offset of field: gnttab_setup_table::frame_list"]
        [::core::mem::offset_of!(gnttab_setup_table, frame_list) - 16usize];
};
const _: () = {
    ["Size of xen_memory_reservation"][::core::mem::size_of::<xen_memory_reservation>() - 32usize];
    ["Alignment of xen_memory_reservation"]
        [::core::mem::align_of::<xen_memory_reservation>() - 8usize];
    ["Offset of field: xen_memory_reservation::extent_start"]
        [::core::mem::offset_of!(xen_memory_reservation, extent_start) - 0usize];
    ["Offset of field: xen_memory_reservation::nr_extents"]
        [::core::mem::offset_of!(xen_memory_reservation, nr_extents) - 8usize];
    ["Offset of field: xen_memory_reservation::extent_order"]
        [::core::mem::offset_of!(xen_memory_reservation, extent_order) - 16usize];
    ["Offset of field: xen_memory_reservation::mem_flags"]
        [::core::mem::offset_of!(xen_memory_reservation, mem_flags) - 20usize];
    ["Offset of field: xen_memory_reservation::domid"]
        [::core::mem::offset_of!(xen_memory_reservation, domid) - 24usize];
};
const _: () = {
    ["Size of xen_machphys_mfn_list"][::core::mem::size_of::<xen_machphys_mfn_list>() - 24usize];
    ["Alignment of xen_machphys_mfn_list"]
        [::core::mem::align_of::<xen_machphys_mfn_list>() - 8usize];
    ["Offset of field: xen_machphys_mfn_list::max_extents"]
        [::core::mem::offset_of!(xen_machphys_mfn_list, max_extents) - 0usize];
    ["Offset of field: xen_machphys_mfn_list::extent_start"]
        [::core::mem::offset_of!(xen_machphys_mfn_list, extent_start) - 8usize];
    ["Offset of field: xen_machphys_mfn_list::nr_extents"]
        [::core::mem::offset_of!(xen_machphys_mfn_list, nr_extents) - 16usize];
};
const _: () = {
    ["Size of xen_add_to_physmap"][::core::mem::size_of::<xen_add_to_physmap>() - 24usize];
    ["Alignment of xen_add_to_physmap"][::core::mem::align_of::<xen_add_to_physmap>() - 8usize];
    ["Offset of field: xen_add_to_physmap::domid"]
        [::core::mem::offset_of!(xen_add_to_physmap, domid) - 0usize];
    ["Offset of field: xen_add_to_physmap::size"]
        [::core::mem::offset_of!(xen_add_to_physmap, size) - 2usize];
    ["Offset of field: xen_add_to_physmap::space"]
        [::core::mem::offset_of!(xen_add_to_physmap, space) - 4usize];
    ["Offset of field: xen_add_to_physmap::idx"]
        [::core::mem::offset_of!(xen_add_to_physmap, idx) - 8usize];
    ["Offset of field: xen_add_to_physmap::gpfn"]
        [::core::mem::offset_of!(xen_add_to_physmap, gpfn) - 16usize];
};
const _: () = {
    ["Size of xen_remove_from_physmap"]
        [::core::mem::size_of::<xen_remove_from_physmap>() - 16usize];
    ["Alignment of xen_remove_from_physmap"]
        [::core::mem::align_of::<xen_remove_from_physmap>() - 8usize];
    ["Offset of field: xen_remove_from_physmap::domid"]
        [::core::mem::offset_of!(xen_remove_from_physmap, domid) - 0usize];
    ["Offset of field: xen_remove_from_physmap::gpfn"]
        [::core::mem::offset_of!(xen_remove_from_physmap, gpfn) - 8usize];
};
const _: () = {
    ["Size of xen_domctl_getpageframeinfo3"]
        [::core::mem::size_of::<xen_domctl_getpageframeinfo3>() - 16usize];
    ["Alignment of xen_domctl_getpageframeinfo3"]
        [::core::mem::align_of::<xen_domctl_getpageframeinfo3>() - 8usize];
    ["Offset of field: xen_domctl_getpageframeinfo3::num"]
        [::core::mem::offset_of!(xen_domctl_getpageframeinfo3, num) - 0usize];
    ["Offset of field: xen_domctl_getpageframeinfo3::array"]
        [::core::mem::offset_of!(xen_domctl_getpageframeinfo3, array) - 8usize];
};
const _: () = {
    ["Size of xen_domctl_shadow_op_stats"]
        [::core::mem::size_of::<xen_domctl_shadow_op_stats>() - 8usize];
    ["Alignment of xen_domctl_shadow_op_stats"]
        [::core::mem::align_of::<xen_domctl_shadow_op_stats>() - 4usize];
    ["Offset of field: xen_domctl_shadow_op_stats::fault_count"]
        [::core::mem::offset_of!(xen_domctl_shadow_op_stats, fault_count) - 0usize];
    ["Offset of field: xen_domctl_shadow_op_stats::dirty_count"]
        [::core::mem::offset_of!(xen_domctl_shadow_op_stats, dirty_count) - 4usize];
};
const _: () = {
    ["Size of xen_domctl_shadow_op"][::core::mem::size_of::<xen_domctl_shadow_op>() - 40usize];
    ["Alignment of xen_domctl_shadow_op"][::core::mem::align_of::<xen_domctl_shadow_op>() - 8usize];
    ["Offset of field: xen_domctl_shadow_op::op"]
        [::core::mem::offset_of!(xen_domctl_shadow_op, op) - 0usize];
    ["Offset of field: xen_domctl_shadow_op::mode"]
        [::core::mem::offset_of!(xen_domctl_shadow_op, mode) - 4usize];
    ["Offset of field: xen_domctl_shadow_op::mb"]
        [::core::mem::offset_of!(xen_domctl_shadow_op, mb) - 8usize];
    ["Offset of field: xen_domctl_shadow_op::dirty_bitmap"]
        [::core::mem::offset_of!(xen_domctl_shadow_op, dirty_bitmap) - 16usize];
    ["Offset of field: xen_domctl_shadow_op::pages"]
        [::core::mem::offset_of!(xen_domctl_shadow_op, pages) - 24usize];
    ["Offset of field: xen_domctl_shadow_op::stats"]
        [::core::mem::offset_of!(xen_domctl_shadow_op, stats) - 32usize];
};
const _: () = {
    ["Size of xen_domctl_max_mem"][::core::mem::size_of::<xen_domctl_max_mem>() - 8usize];
    ["Alignment of xen_domctl_max_mem"][::core::mem::align_of::<xen_domctl_max_mem>() - 8usize];
    ["Offset of field: xen_domctl_max_mem::max_memkb"]
        [::core::mem::offset_of!(xen_domctl_max_mem, max_memkb) - 0usize];
};
const _: () = {
    ["Size of xen_domctl_vcpucontext"][::core::mem::size_of::<xen_domctl_vcpucontext>() - 16usize];
    ["Alignment of xen_domctl_vcpucontext"]
        [::core::mem::align_of::<xen_domctl_vcpucontext>() - 8usize];
    ["Offset of field: xen_domctl_vcpucontext::vcpu"]
        [::core::mem::offset_of!(xen_domctl_vcpucontext, vcpu) - 0usize];
    ["Offset of field: xen_domctl_vcpucontext::ctxt"]
        [::core::mem::offset_of!(xen_domctl_vcpucontext, ctxt) - 8usize];
};
const _: () = {
    ["Size of xen_domctl_getvcpuinfo"][::core::mem::size_of::<xen_domctl_getvcpuinfo>() - 24usize];
    ["Alignment of xen_domctl_getvcpuinfo"]
        [::core::mem::align_of::<xen_domctl_getvcpuinfo>() - 8usize];
    ["Offset of field: xen_domctl_getvcpuinfo::vcpu"]
        [::core::mem::offset_of!(xen_domctl_getvcpuinfo, vcpu) - 0usize];
    ["Offset of field: xen_domctl_getvcpuinfo::online"]
        [::core::mem::offset_of!(xen_domctl_getvcpuinfo, online) - 4usize];
    ["Offset of field: xen_domctl_getvcpuinfo::blocked"]
        [::core::mem::offset_of!(xen_domctl_getvcpuinfo, blocked) - 5usize];
    ["Offset of field: xen_domctl_getvcpuinfo::running"]
        [::core::mem::offset_of!(xen_domctl_getvcpuinfo, running) - 6usize];
    ["Offset of field: xen_domctl_getvcpuinfo::cpu_time"]
        [::core::mem::offset_of!(xen_domctl_getvcpuinfo, cpu_time) - 8usize];
    ["Offset of field: xen_domctl_getvcpuinfo::cpu"]
        [::core::mem::offset_of!(xen_domctl_getvcpuinfo, cpu) - 16usize];
};
const _: () = {
    ["Size of xen_domctl_max_vcpus"][::core::mem::size_of::<xen_domctl_max_vcpus>() - 4usize];
    ["Alignment of xen_domctl_max_vcpus"][::core::mem::align_of::<xen_domctl_max_vcpus>() - 4usize];
    ["Offset of field: xen_domctl_max_vcpus::max"]
        [::core::mem::offset_of!(xen_domctl_max_vcpus, max) - 0usize];
};
const _: () = {
    ["Size of xen_domctl_settimeoffset"]
        [::core::mem::size_of::<xen_domctl_settimeoffset>() - 8usize];
    ["Alignment of xen_domctl_settimeoffset"]
        [::core::mem::align_of::<xen_domctl_settimeoffset>() - 8usize];
    ["Offset of field: xen_domctl_settimeoffset::time_offset_seconds"]
        [::core::mem::offset_of!(xen_domctl_settimeoffset, time_offset_seconds) - 0usize];
};
const _: () = {
    ["Size of xen_domctl_hvmcontext"][::core::mem::size_of::<xen_domctl_hvmcontext>() - 16usize];
    ["Alignment of xen_domctl_hvmcontext"]
        [::core::mem::align_of::<xen_domctl_hvmcontext>() - 8usize];
    ["Offset of field: xen_domctl_hvmcontext::size"]
        [::core::mem::offset_of!(xen_domctl_hvmcontext, size) - 0usize];
    ["Offset of field: xen_domctl_hvmcontext::buffer"]
        [::core::mem::offset_of!(xen_domctl_hvmcontext, buffer) - 8usize];
};
const _: () = {
    ["Size of xen_domctl_address_size"][::core::mem::size_of::<xen_domctl_address_size>() - 4usize];
    ["Alignment of xen_domctl_address_size"]
        [::core::mem::align_of::<xen_domctl_address_size>() - 4usize];
    ["Offset of field: xen_domctl_address_size::size"]
        [::core::mem::offset_of!(xen_domctl_address_size, size) - 0usize];
};
const _: () = {
    ["Size of xen_domctl_cpu_policy"][::core::mem::size_of::<xen_domctl_cpu_policy>() - 40usize];
    ["Alignment of xen_domctl_cpu_policy"]
        [::core::mem::align_of::<xen_domctl_cpu_policy>() - 8usize];
    ["Offset of field: xen_domctl_cpu_policy::nr_leaves"]
        [::core::mem::offset_of!(xen_domctl_cpu_policy, nr_leaves) - 0usize];
    ["Offset of field: xen_domctl_cpu_policy::nr_msrs"]
        [::core::mem::offset_of!(xen_domctl_cpu_policy, nr_msrs) - 4usize];
    ["Offset of field: xen_domctl_cpu_policy::leaves"]
        [::core::mem::offset_of!(xen_domctl_cpu_policy, leaves) - 8usize];
    ["Offset of field: xen_domctl_cpu_policy::msrs"]
        [::core::mem::offset_of!(xen_domctl_cpu_policy, msrs) - 16usize];
    ["Offset of field: xen_domctl_cpu_policy::err_leaf"]
        [::core::mem::offset_of!(xen_domctl_cpu_policy, err_leaf) - 24usize];
    ["Offset of field: xen_domctl_cpu_policy::err_subleaf"]
        [::core::mem::offset_of!(xen_domctl_cpu_policy, err_subleaf) - 28usize];
    ["Offset of field: xen_domctl_cpu_policy::err_msr"]
        [::core::mem::offset_of!(xen_domctl_cpu_policy, err_msr) - 32usize];
};
const _: () = {
    ["Size of xen_domctl_tsc_info"][::core::mem::size_of::<xen_domctl_tsc_info>() - 24usize];
    ["Alignment of xen_domctl_tsc_info"][::core::mem::align_of::<xen_domctl_tsc_info>() - 8usize];
    ["Offset of field: xen_domctl_tsc_info::tsc_mode"]
        [::core::mem::offset_of!(xen_domctl_tsc_info, tsc_mode) - 0usize];
    ["Offset of field: xen_domctl_tsc_info::gtsc_khz"]
        [::core::mem::offset_of!(xen_domctl_tsc_info, gtsc_khz) - 4usize];
    ["Offset of field: xen_domctl_tsc_info::incarnation"]
        [::core::mem::offset_of!(xen_domctl_tsc_info, incarnation) - 8usize];
    ["Offset of field: xen_domctl_tsc_info::pad"]
        [::core::mem::offset_of!(xen_domctl_tsc_info, pad) - 12usize];
    ["Offset of field: xen_domctl_tsc_info::elapsed_nsec"]
        [::core::mem::offset_of!(xen_domctl_tsc_info, elapsed_nsec) - 16usize];
};
const _: () = {
    ["Size of xen_domctl_vcpuextstate"]
        [::core::mem::size_of::<xen_domctl_vcpuextstate>() - 32usize];
    ["Alignment of xen_domctl_vcpuextstate"]
        [::core::mem::align_of::<xen_domctl_vcpuextstate>() - 8usize];
    ["Offset of field: xen_domctl_vcpuextstate::vcpu"]
        [::core::mem::offset_of!(xen_domctl_vcpuextstate, vcpu) - 0usize];
    ["Offset of field: xen_domctl_vcpuextstate::xfeature_mask"]
        [::core::mem::offset_of!(xen_domctl_vcpuextstate, xfeature_mask) - 8usize];
    ["Offset of field: xen_domctl_vcpuextstate::size"]
        [::core::mem::offset_of!(xen_domctl_vcpuextstate, size) - 16usize];
    ["Offset of field: xen_domctl_vcpuextstate::buffer"]
        [::core::mem::offset_of!(xen_domctl_vcpuextstate, buffer) - 24usize];
};
const _: () = {
    ["Size of xen_domctl_vcpu_msr"][::core::mem::size_of::<xen_domctl_vcpu_msr>() - 16usize];
    ["Alignment of xen_domctl_vcpu_msr"][::core::mem::align_of::<xen_domctl_vcpu_msr>() - 8usize];
    ["Offset of field: xen_domctl_vcpu_msr::index"]
        [::core::mem::offset_of!(xen_domctl_vcpu_msr, index) - 0usize];
    ["Offset of field: xen_domctl_vcpu_msr::reserved"]
        [::core::mem::offset_of!(xen_domctl_vcpu_msr, reserved) - 4usize];
    ["Offset of field: xen_domctl_vcpu_msr::value"]
        [::core::mem::offset_of!(xen_domctl_vcpu_msr, value) - 8usize];
};
const _: () = {
    ["Size of xen_domctl_vcpu_msrs"][::core::mem::size_of::<xen_domctl_vcpu_msrs>() - 16usize];
    ["Alignment of xen_domctl_vcpu_msrs"][::core::mem::align_of::<xen_domctl_vcpu_msrs>() - 8usize];
    ["Offset of field: xen_domctl_vcpu_msrs::vcpu"]
        [::core::mem::offset_of!(xen_domctl_vcpu_msrs, vcpu) - 0usize];
    ["Offset of field: xen_domctl_vcpu_msrs::msr_count"]
        [::core::mem::offset_of!(xen_domctl_vcpu_msrs, msr_count) - 4usize];
    ["Offset of field: xen_domctl_vcpu_msrs::msrs"]
        [::core::mem::offset_of!(xen_domctl_vcpu_msrs, msrs) - 8usize];
};
const _: () = {
    ["Size of xen_domctl"][::core::mem::size_of::<xen_domctl>() - 144usize];
    ["Alignment of xen_domctl"][::core::mem::align_of::<xen_domctl>() - 8usize];
};
const _: () = {
    ["Size of xen_sysctl_getdomaininfolist"]
        [::core::mem::size_of::<xen_sysctl_getdomaininfolist>() - 24usize];
    ["Alignment of xen_sysctl_getdomaininfolist"]
        [::core::mem::align_of::<xen_sysctl_getdomaininfolist>() - 8usize];
    ["Offset of field: xen_sysctl_getdomaininfolist::first_domain"]
        [::core::mem::offset_of!(xen_sysctl_getdomaininfolist, first_domain) - 0usize];
    ["Offset of field: xen_sysctl_getdomaininfolist::max_domains"]
        [::core::mem::offset_of!(xen_sysctl_getdomaininfolist, max_domains) - 4usize];
    ["Offset of field: xen_sysctl_getdomaininfolist::buffer"]
        [::core::mem::offset_of!(xen_sysctl_getdomaininfolist, buffer) - 8usize];
    ["Offset of field: xen_sysctl_getdomaininfolist::num_domains"]
        [::core::mem::offset_of!(xen_sysctl_getdomaininfolist, num_domains) - 16usize];
};
const _: () = {
    ["Size of xen_sysctl_cpu_policy"][::core::mem::size_of::<xen_sysctl_cpu_policy>() - 32usize];
    ["Alignment of xen_sysctl_cpu_policy"]
        [::core::mem::align_of::<xen_sysctl_cpu_policy>() - 8usize];
    ["Offset of field: xen_sysctl_cpu_policy::index"]
        [::core::mem::offset_of!(xen_sysctl_cpu_policy, index) - 0usize];
    ["Offset of field: xen_sysctl_cpu_policy::nr_leaves"]
        [::core::mem::offset_of!(xen_sysctl_cpu_policy, nr_leaves) - 4usize];
    ["Offset of field: xen_sysctl_cpu_policy::nr_msrs"]
        [::core::mem::offset_of!(xen_sysctl_cpu_policy, nr_msrs) - 8usize];
    ["Offset of field: xen_sysctl_cpu_policy::_rsvd"]
        [::core::mem::offset_of!(xen_sysctl_cpu_policy, _rsvd) - 12usize];
    ["Offset of field: xen_sysctl_cpu_policy::leaves"]
        [::core::mem::offset_of!(xen_sysctl_cpu_policy, leaves) - 16usize];
    ["Offset of field: xen_sysctl_cpu_policy::msrs"]
        [::core::mem::offset_of!(xen_sysctl_cpu_policy, msrs) - 24usize];
};
const _: () = {
    ["Size of xen_sysctl"][::core::mem::size_of::<xen_sysctl>() - 136usize];
    ["Alignment of xen_sysctl"][::core::mem::align_of::<xen_sysctl>() - 8usize];
};
const _: () = {
    ["Size of sched_remote_shutdown"][::core::mem::size_of::<sched_remote_shutdown>() - 8usize];
    ["Alignment of sched_remote_shutdown"]
        [::core::mem::align_of::<sched_remote_shutdown>() - 4usize];
    ["Offset of field: sched_remote_shutdown::domain_id"]
        [::core::mem::offset_of!(sched_remote_shutdown, domain_id) - 0usize];
    ["Offset of field: sched_remote_shutdown::reason"]
        [::core::mem::offset_of!(sched_remote_shutdown, reason) - 4usize];
};
const _: () = {
    ["Size of xen_hvm_param"][::core::mem::size_of::<xen_hvm_param>() - 16usize];
    ["Alignment of xen_hvm_param"][::core::mem::align_of::<xen_hvm_param>() - 8usize];
    ["Offset of field: xen_hvm_param::domid"]
        [::core::mem::offset_of!(xen_hvm_param, domid) - 0usize];
    ["Offset of field: xen_hvm_param::pad"][::core::mem::offset_of!(xen_hvm_param, pad) - 2usize];
    ["Offset of field: xen_hvm_param::index"]
        [::core::mem::offset_of!(xen_hvm_param, index) - 4usize];
    ["Offset of field: xen_hvm_param::value"]
        [::core::mem::offset_of!(xen_hvm_param, value) - 8usize];
};
