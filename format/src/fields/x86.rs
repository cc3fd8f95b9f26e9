//! Structures of every x86 guest: CPU policy entries and TSC.
//!
//! C: `xen/include/public/arch-x86/xen.h`; X86_TSC_INFO is the specification's own.

use super::{Layout, dec, hex};

/// One leaf of X86_CPUID_POLICY.
pub const CPUID_LEAF: Layout = Layout {
    name: "xen_cpuid_leaf",
    octets: 24,
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
    octets: 16,
    fields: &[hex("index", 0, 4), hex("flags", 4, 4), hex("value", 8, 8)],
};

/// The body of X86_TSC_INFO.
pub const TSC_INFO: Layout = Layout {
    name: "tsc_info",
    octets: 24,
    fields: &[
        dec("mode", 0, 4),
        dec("khz", 4, 4),
        dec("nsec", 8, 8),
        dec("incarnation", 16, 4),
    ],
};
