//! What is peculiar to domctl interface version 0x14. Made by `cargo xtask bindings` from the public
//! headers of Xen 4.16.0 (MIT); not to be edited.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub type domid_t = u16;
pub type xen_domain_handle_t = [u8; 16];
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_arch_domainconfig {
    pub emulation_flags: u32,
    pub misc_flags: u32,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_createdomain {
    pub ssidref: u32,
    pub handle: xen_domain_handle_t,
    pub flags: u32,
    pub iommu_opts: u32,
    pub max_vcpus: u32,
    pub max_evtchn_port: u32,
    pub max_grant_frames: i32,
    pub max_maptrack_frames: i32,
    pub grant_opts: u32,
    pub vmtrace_size: u32,
    pub arch: xen_arch_domainconfig,
}
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct xen_domctl_getdomaininfo {
    pub domain: domid_t,
    pub pad1: u16,
    pub flags: u32,
    pub tot_pages: u64,
    pub max_pages: u64,
    pub outstanding_pages: u64,
    pub shr_pages: u64,
    pub paged_pages: u64,
    pub shared_info_frame: u64,
    pub cpu_time: u64,
    pub nr_online_vcpus: u32,
    pub max_vcpu_id: u32,
    pub ssidref: u32,
    pub handle: xen_domain_handle_t,
    pub cpupool: u32,
    pub gpaddr_bits: u8,
    pub pad2: [u8; 7usize],
    pub arch_config: xen_arch_domainconfig,
}
pub const XEN_DOMCTL_INTERFACE_VERSION: u32 = 20;
pub const XEN_SYSCTL_INTERFACE_VERSION: u32 = 20;
const _: () = {
    ["Size of xen_arch_domainconfig"][::core::mem::size_of::<xen_arch_domainconfig>() - 8usize];
    ["Alignment of xen_arch_domainconfig"]
        [::core::mem::align_of::<xen_arch_domainconfig>() - 4usize];
    ["Offset of field: xen_arch_domainconfig::emulation_flags"]
        [::core::mem::offset_of!(xen_arch_domainconfig, emulation_flags) - 0usize];
    ["Offset of field: xen_arch_domainconfig::misc_flags"]
        [::core::mem::offset_of!(xen_arch_domainconfig, misc_flags) - 4usize];
};
const _: () = {
    ["Size of xen_domctl_createdomain"]
        [::core::mem::size_of::<xen_domctl_createdomain>() - 60usize];
    ["Alignment of xen_domctl_createdomain"]
        [::core::mem::align_of::<xen_domctl_createdomain>() - 4usize];
    ["Offset of field: xen_domctl_createdomain::ssidref"]
        [::core::mem::offset_of!(xen_domctl_createdomain, ssidref) - 0usize];
    ["Offset of field: xen_domctl_createdomain::handle"]
        [::core::mem::offset_of!(xen_domctl_createdomain, handle) - 4usize];
    ["Offset of field: xen_domctl_createdomain::flags"]
        [::core::mem::offset_of!(xen_domctl_createdomain, flags) - 20usize];
    ["Offset of field: xen_domctl_createdomain::iommu_opts"]
        [::core::mem::offset_of!(xen_domctl_createdomain, iommu_opts) - 24usize];
    ["Offset of field: xen_domctl_createdomain::max_vcpus"]
        [::core::mem::offset_of!(xen_domctl_createdomain, max_vcpus) - 28usize];
    ["Offset of field: xen_domctl_createdomain::max_evtchn_port"]
        [::core::mem::offset_of!(xen_domctl_createdomain, max_evtchn_port) - 32usize];
    ["Offset of field: xen_domctl_createdomain::max_grant_frames"]
        [::core::mem::offset_of!(xen_domctl_createdomain, max_grant_frames) - 36usize];
    ["Offset of field: xen_domctl_createdomain::max_maptrack_frames"]
        [::core::mem::offset_of!(xen_domctl_createdomain, max_maptrack_frames) - 40usize];
    ["Offset of field: xen_domctl_createdomain::grant_opts"]
        [::core::mem::offset_of!(xen_domctl_createdomain, grant_opts) - 44usize];
    ["Offset of field: xen_domctl_createdomain::vmtrace_size"]
        [::core::mem::offset_of!(xen_domctl_createdomain, vmtrace_size) - 48usize];
    ["Offset of field: xen_domctl_createdomain::arch"]
        [::core::mem::offset_of!(xen_domctl_createdomain, arch) - 52usize];
};
const _: () = {
    ["Size of xen_domctl_getdomaininfo"]
        [::core::mem::size_of::<xen_domctl_getdomaininfo>() - 112usize];
    ["Alignment of xen_domctl_getdomaininfo"]
        [::core::mem::align_of::<xen_domctl_getdomaininfo>() - 8usize];
    ["Offset of field: xen_domctl_getdomaininfo::domain"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, domain) - 0usize];
    ["Offset of field: xen_domctl_getdomaininfo::pad1"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, pad1) - 2usize];
    ["Offset of field: xen_domctl_getdomaininfo::flags"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, flags) - 4usize];
    ["Offset of field: xen_domctl_getdomaininfo::tot_pages"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, tot_pages) - 8usize];
    ["Offset of field: xen_domctl_getdomaininfo::max_pages"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, max_pages) - 16usize];
    ["Offset of field: xen_domctl_getdomaininfo::outstanding_pages"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, outstanding_pages) - 24usize];
    ["Offset of field: xen_domctl_getdomaininfo::shr_pages"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, shr_pages) - 32usize];
    ["Offset of field: xen_domctl_getdomaininfo::paged_pages"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, paged_pages) - 40usize];
    ["Offset of field: xen_domctl_getdomaininfo::shared_info_frame"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, shared_info_frame) - 48usize];
    ["Offset of field: xen_domctl_getdomaininfo::cpu_time"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, cpu_time) - 56usize];
    ["Offset of field: xen_domctl_getdomaininfo::nr_online_vcpus"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, nr_online_vcpus) - 64usize];
    ["Offset of field: xen_domctl_getdomaininfo::max_vcpu_id"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, max_vcpu_id) - 68usize];
    ["Offset of field: xen_domctl_getdomaininfo::ssidref"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, ssidref) - 72usize];
    ["Offset of field: xen_domctl_getdomaininfo::handle"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, handle) - 76usize];
    ["Offset of field: xen_domctl_getdomaininfo::cpupool"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, cpupool) - 92usize];
    ["Offset of field: xen_domctl_getdomaininfo::gpaddr_bits"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, gpaddr_bits) - 96usize];
    ["Offset of field: xen_domctl_getdomaininfo::pad2"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, pad2) - 97usize];
    ["Offset of field: xen_domctl_getdomaininfo::arch_config"]
        [::core::mem::offset_of!(xen_domctl_getdomaininfo, arch_config) - 104usize];
};
