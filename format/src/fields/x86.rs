//! Layouts of structures of every x86 guest: CPU policy entries and TSC.
//!
//! C: `xen/include/public/arch-x86/xen.h`; X86_TSC_INFO is defined by the specification itself.

use super::{Layout, dec, hex};

mod features;

pub use features::{Feature, FeatureWord, Register, arch_capabilities, features};

/// One leaf of X86_CPUID_POLICY.
pub const CPUID_LEAF: Layout = Layout {
    name: "xen_cpuid_leaf",
    bytes: 24,
    fields: &[
        hex("leaf", 0, 4),
        hex("subleaf", 4, 4),
        hex("eax", 8, 4),
        hex("ebx", 12, 4),
        hex("ecx", 16, 4),
        hex("edx", 20, 4),
    ],
};

/// One entry of X86_MSR_POLICY.
pub const MSR_ENTRY: Layout = Layout {
    name: "xen_msr_entry",
    bytes: 16,
    fields: &[hex("index", 0, 4), hex("flags", 4, 4), hex("value", 8, 8)],
};

/// The body of X86_TSC_INFO.
pub const TSC_INFO: Layout = Layout {
    name: "tsc_info",
    bytes: 24,
    fields: &[
        dec("mode", 0, 4),
        dec("khz", 4, 4),
        dec("nsec", 8, 8),
        dec("incarnation", 16, 4),
    ],
};

/// The topic of a CPUID leaf, for the leaves that a policy holds.
///
/// Specification: the processor makers' manuals ("CPUID"); Xen's public
/// `arch-x86/cpuid.h` for 0x40000000 and above.
pub const fn leaf_name(leaf: u32) -> Option<&'static str> {
    Some(match leaf {
        0 => "highest basic leaf and vendor",
        1 => "family, model and features",
        2 => "caches and TLBs",
        3 => "serial number",
        4 => "cache parameters",
        5 => "MONITOR",
        6 => "thermal and power management",
        7 => "structured extended features",
        9 => "direct cache access",
        0xa => "performance monitoring",
        0xb => "topology",
        0xd => "extended state",
        0x12 => "SGX",
        0x14 => "processor trace",
        0x15 => "TSC and crystal clock",
        0x16 => "frequencies",
        0x1f => "topology, version 2",
        0x4000_0000 => "highest hypervisor leaf and signature",
        0x4000_0001 => "version of Xen",
        0x4000_0002 => "hypercall pages",
        0x4000_0003 => "time of Xen",
        0x4000_0004 => "features of Xen for HVM guests",
        0x4000_0005 => "features of Xen for PV guests",
        0x8000_0000 => "highest extended leaf and vendor",
        0x8000_0001 => "extended features",
        0x8000_0002..=0x8000_0004 => "brand",
        0x8000_0005 => "L1 caches and TLBs",
        0x8000_0006 => "L2 and L3 caches",
        0x8000_0007 => "advanced power management",
        0x8000_0008 => "widths of addresses, number of cores",
        0x8000_000a => "SVM",
        0x8000_0019 => "TLBs of 1 GiB pages",
        0x8000_001a => "performance hints",
        0x8000_001b => "instruction-based sampling",
        0x8000_001c => "lightweight profiling",
        0x8000_001d => "cache topology",
        0x8000_001e => "topology",
        0x8000_001f => "memory encryption",
        0x8000_0021 => "extended features 2",
        0x8000_0022 => "performance monitoring 2",
        _ => return None,
    })
}

/// The name of a model-specific register, for those that a policy or a vcpu's list holds.
///
/// Specification: the processor makers' manuals; Xen's `asm/msr-index.h` has the numbers.
pub const fn msr_name(index: u32) -> Option<&'static str> {
    Some(match index {
        0x48 => "SPEC_CTRL",
        0xce => "PLATFORM_INFO",
        0x10a => "ARCH_CAPABILITIES",
        0x140 => "MISC_FEATURES_ENABLES",
        0x560 => "RTIT_OUTPUT_BASE",
        0x561 => "RTIT_OUTPUT_MASK",
        0x570 => "RTIT_CTL",
        0x571 => "RTIT_STATUS",
        0x6e1 => "PKRS",
        0xda0 => "XSS",
        0xd90 => "BNDCFGS",
        0xc000_0103 => "TSC_AUX",
        0xc001_011f => "VIRT_SPEC_CTRL",
        0xc001_1027 => "DR0_ADDRESS_MASK",
        0xc001_1019 => "DR1_ADDRESS_MASK",
        0xc001_101a => "DR2_ADDRESS_MASK",
        0xc001_101b => "DR3_ADDRESS_MASK",
        _ => return None,
    })
}
