//! Offsets, widths and counts of fields from the compiler: printed with `offsetof` and `sizeof` by
//! a C program that includes the public headers of Xen 4.17 (Debian's libxen-dev,
//! `xen/foreign/x86_{32,64}.h` for the guests' own structures).
//!
//! A count of 0 means that the field is not an array; for arrays the width is that of one element.

#[path = "offsets/hvm.rs"]
mod of_hvm;
#[path = "offsets/pv.rs"]
mod of_pv;

use xsr_format::fields::hvm::HvmRecordKind as Hvm;
use xsr_format::fields::{Layout, pv, x86};

/// A name, an offset, a width, a count.
pub(crate) type Member = (&'static str, usize, usize, usize);

/// A structure: the layout that describes it, its `sizeof`, its members.
pub(crate) struct Structure {
    pub(crate) layout: &'static Layout,
    pub(crate) bytes: usize,
    pub(crate) members: &'static [Member],
    /// The array with structures as elements, and the members of one.
    pub(crate) element: (&'static str, &'static [Member]),
}

fn hvm(kind: Hvm, length: usize) -> &'static Layout {
    kind.layout(length).expect("each of these has fields")
}

/// All structures from the headers.
pub(crate) fn structures() -> Vec<Structure> {
    vec![
        Structure {
            layout: &pv::START_INFO_64,
            bytes: 1168,
            members: of_pv::START_INFO_64,
            element: ("", &[]),
        },
        Structure {
            layout: &pv::SHARED_INFO_64,
            bytes: 3136,
            members: of_pv::SHARED_INFO_64,
            element: ("vcpu_info", of_pv::VCPU_INFO_64),
        },
        Structure {
            layout: &pv::VCPU_CONTEXT_64,
            bytes: 5168,
            members: of_pv::VCPU_CONTEXT_64,
            element: ("", &[]),
        },
        Structure {
            layout: &pv::START_INFO_32,
            bytes: 1112,
            members: of_pv::START_INFO_32,
            element: ("", &[]),
        },
        Structure {
            layout: &pv::SHARED_INFO_32,
            bytes: 2344,
            members: of_pv::SHARED_INFO_32,
            element: ("vcpu_info", of_pv::VCPU_INFO_32),
        },
        Structure {
            layout: &pv::VCPU_CONTEXT_32,
            bytes: 2800,
            members: of_pv::VCPU_CONTEXT_32,
            element: ("", &[]),
        },
        Structure {
            layout: &pv::VCPU_EXTENDED,
            bytes: 64,
            members: of_pv::VCPU_EXTENDED,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::HEADER, 24),
            bytes: 24,
            members: of_hvm::HEADER,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::CPU, 1032),
            bytes: 1032,
            members: of_hvm::CPU,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::CPU, 1016),
            bytes: 1016,
            members: of_hvm::CPU_COMPAT,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::PIC, 8),
            bytes: 8,
            members: of_hvm::PIC,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::IOAPIC, 400),
            bytes: 400,
            members: of_hvm::IOAPIC,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::LAPIC, 24),
            bytes: 24,
            members: of_hvm::LAPIC,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::PCI_IRQ, 16),
            bytes: 16,
            members: of_hvm::PCI_IRQ,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::ISA_IRQ, 8),
            bytes: 8,
            members: of_hvm::ISA_IRQ,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::PCI_LINK, 8),
            bytes: 8,
            members: of_hvm::PCI_LINK,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::PIT, 56),
            bytes: 56,
            members: of_hvm::PIT,
            element: ("channels", of_hvm::PIT_CHANNEL),
        },
        Structure {
            layout: hvm(Hvm::RTC, 24),
            bytes: 24,
            members: of_hvm::RTC,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::HPET, 1048),
            bytes: 1048,
            members: of_hvm::HPET,
            element: ("timers", of_hvm::HPET_TIMER),
        },
        Structure {
            layout: hvm(Hvm::PMTIMER, 8),
            bytes: 8,
            members: of_hvm::PMTIMER,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::MTRR, 240),
            bytes: 240,
            members: of_hvm::MTRR,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::VIRIDIAN_DOMAIN, 32),
            bytes: 32,
            members: of_hvm::VIRIDIAN_DOMAIN,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::CPU_XSAVE, 600),
            bytes: 600,
            members: of_hvm::CPU_XSAVE,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::VIRIDIAN_VCPU, 216),
            bytes: 216,
            members: of_hvm::VIRIDIAN_VCPU,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::VMCE_VCPU, 32),
            bytes: 32,
            members: of_hvm::VMCE_VCPU,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::TSC_ADJUST, 8),
            bytes: 8,
            members: of_hvm::TSC_ADJUST,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::CPU_MSR, 8),
            bytes: 8,
            members: of_hvm::CPU_MSR,
            element: ("msr", of_hvm::ONE_MSR),
        },
        Structure {
            layout: &x86::CPUID_LEAF,
            bytes: 24,
            members: of_pv::CPUID_LEAF,
            element: ("", &[]),
        },
        Structure {
            layout: &x86::MSR_ENTRY,
            bytes: 16,
            members: of_pv::MSR_ENTRY,
            element: ("", &[]),
        },
    ]
}
