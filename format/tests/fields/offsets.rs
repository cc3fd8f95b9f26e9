//! Offset, width and count of fields as the compiler sees them: printed with
//! `offsetof` and `sizeof` by a C program that includes the public headers of Xen 4.17
//! (Debian's libxen-dev, `xen/foreign/x86_{32,64}.h` for the guests' own structures).
//!
//! A count of 0 is no array; for arrays the width is that of one element.

use xsr_format::fields::hvm::HvmRecordKind as Hvm;
use xsr_format::fields::{Layout, pv, x86};

/// A name, an offset, a width, a count.
pub(crate) type Member = (&'static str, usize, usize, usize);

/// A structure: the layout that is to describe it, its `sizeof`, its members.
pub(crate) struct Structure {
    pub(crate) layout: &'static Layout,
    pub(crate) octets: usize,
    pub(crate) members: &'static [Member],
    /// The array whose elements are structures, and the members of one.
    pub(crate) element: (&'static str, &'static [Member]),
}

fn hvm(kind: Hvm, length: usize) -> &'static Layout {
    kind.layout(length).expect("each of these has fields")
}

/// All that are in the headers.
pub(crate) fn structures() -> Vec<Structure> {
    vec![
        Structure {
            layout: &pv::START_INFO_64,
            octets: 1168,
            members: START_INFO_64,
            element: ("", &[]),
        },
        Structure {
            layout: &pv::SHARED_INFO_64,
            octets: 3136,
            members: SHARED_INFO_64,
            element: ("vcpu_info", VCPU_INFO_64),
        },
        Structure {
            layout: &pv::VCPU_CONTEXT_64,
            octets: 5168,
            members: VCPU_CONTEXT_64,
            element: ("", &[]),
        },
        Structure {
            layout: &pv::START_INFO_32,
            octets: 1112,
            members: START_INFO_32,
            element: ("", &[]),
        },
        Structure {
            layout: &pv::SHARED_INFO_32,
            octets: 2344,
            members: SHARED_INFO_32,
            element: ("vcpu_info", VCPU_INFO_32),
        },
        Structure {
            layout: &pv::VCPU_CONTEXT_32,
            octets: 2800,
            members: VCPU_CONTEXT_32,
            element: ("", &[]),
        },
        Structure {
            layout: &pv::VCPU_EXTENDED,
            octets: 64,
            members: VCPU_EXTENDED,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::HEADER, 24),
            octets: 24,
            members: HEADER,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::CPU, 1032),
            octets: 1032,
            members: CPU,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::CPU, 1016),
            octets: 1016,
            members: CPU_COMPAT,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::PIC, 8),
            octets: 8,
            members: PIC,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::IOAPIC, 400),
            octets: 400,
            members: IOAPIC,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::LAPIC, 24),
            octets: 24,
            members: LAPIC,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::PCI_IRQ, 16),
            octets: 16,
            members: PCI_IRQ,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::ISA_IRQ, 8),
            octets: 8,
            members: ISA_IRQ,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::PCI_LINK, 8),
            octets: 8,
            members: PCI_LINK,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::PIT, 56),
            octets: 56,
            members: PIT,
            element: ("channels", PIT_CHANNEL),
        },
        Structure {
            layout: hvm(Hvm::RTC, 24),
            octets: 24,
            members: RTC,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::HPET, 1048),
            octets: 1048,
            members: HPET,
            element: ("timers", HPET_TIMER),
        },
        Structure {
            layout: hvm(Hvm::PMTIMER, 8),
            octets: 8,
            members: PMTIMER,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::MTRR, 240),
            octets: 240,
            members: MTRR,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::VIRIDIAN_DOMAIN, 32),
            octets: 32,
            members: VIRIDIAN_DOMAIN,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::CPU_XSAVE, 600),
            octets: 600,
            members: CPU_XSAVE,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::VIRIDIAN_VCPU, 216),
            octets: 216,
            members: VIRIDIAN_VCPU,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::VMCE_VCPU, 32),
            octets: 32,
            members: VMCE_VCPU,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::TSC_ADJUST, 8),
            octets: 8,
            members: TSC_ADJUST,
            element: ("", &[]),
        },
        Structure {
            layout: hvm(Hvm::CPU_MSR, 8),
            octets: 8,
            members: CPU_MSR,
            element: ("msr", ONE_MSR),
        },
        Structure {
            layout: &x86::CPUID_LEAF,
            octets: 24,
            members: CPUID_LEAF,
            element: ("", &[]),
        },
        Structure {
            layout: &x86::MSR_ENTRY,
            octets: 16,
            members: MSR_ENTRY,
            element: ("", &[]),
        },
    ]
}

const START_INFO_64: &[Member] = &[
    ("magic", 0, 32, 0),
    ("nr_pages", 32, 8, 0),
    ("shared_info", 40, 8, 0),
    ("flags", 48, 4, 0),
    ("store_mfn", 56, 8, 0),
    ("store_evtchn", 64, 4, 0),
    ("console.mfn", 72, 8, 0),
    ("console.evtchn", 80, 4, 0),
    ("pt_base", 88, 8, 0),
    ("nr_pt_frames", 96, 8, 0),
    ("mfn_list", 104, 8, 0),
    ("mod_start", 112, 8, 0),
    ("mod_len", 120, 8, 0),
    ("cmd_line", 128, 1024, 0),
    ("first_p2m_pfn", 1152, 8, 0),
    ("nr_p2m_frames", 1160, 8, 0),
];

const SHARED_INFO_64: &[Member] = &[
    ("vcpu_info", 0, 64, 32),
    ("evtchn_pending", 2048, 8, 64),
    ("evtchn_mask", 2560, 8, 64),
    ("wc_version", 3072, 4, 0),
    ("wc_sec", 3076, 4, 0),
    ("wc_nsec", 3080, 4, 0),
    ("wc_sec_hi", 3084, 4, 0),
    ("arch.max_pfn", 3088, 8, 0),
    ("arch.pfn_to_mfn_frame_list_list", 3096, 8, 0),
    ("arch.nmi_reason", 3104, 8, 0),
    ("arch.p2m_cr3", 3112, 8, 0),
    ("arch.p2m_vaddr", 3120, 8, 0),
    ("arch.p2m_generation", 3128, 8, 0),
];

const VCPU_CONTEXT_64: &[Member] = &[
    ("fpu_ctxt", 0, 512, 0),
    ("flags", 512, 8, 0),
    ("user_regs.r15", 520, 8, 0),
    ("user_regs.r14", 528, 8, 0),
    ("user_regs.r13", 536, 8, 0),
    ("user_regs.r12", 544, 8, 0),
    ("user_regs.rbp", 552, 8, 0),
    ("user_regs.rbx", 560, 8, 0),
    ("user_regs.r11", 568, 8, 0),
    ("user_regs.r10", 576, 8, 0),
    ("user_regs.r9", 584, 8, 0),
    ("user_regs.r8", 592, 8, 0),
    ("user_regs.rax", 600, 8, 0),
    ("user_regs.rcx", 608, 8, 0),
    ("user_regs.rdx", 616, 8, 0),
    ("user_regs.rsi", 624, 8, 0),
    ("user_regs.rdi", 632, 8, 0),
    ("user_regs.error_code", 640, 4, 0),
    ("user_regs.entry_vector", 644, 4, 0),
    ("user_regs.rip", 648, 8, 0),
    ("user_regs.cs", 656, 2, 0),
    ("user_regs.saved_upcall_mask", 660, 1, 0),
    ("user_regs.rflags", 664, 8, 0),
    ("user_regs.rsp", 672, 8, 0),
    ("user_regs.ss", 680, 2, 0),
    ("user_regs.es", 688, 2, 0),
    ("user_regs.ds", 696, 2, 0),
    ("user_regs.fs", 704, 2, 0),
    ("user_regs.gs", 712, 2, 0),
    ("trap_ctxt", 720, 4096, 0),
    ("ldt_base", 4816, 8, 0),
    ("ldt_ents", 4824, 8, 0),
    ("gdt_frames", 4832, 8, 16),
    ("gdt_ents", 4960, 8, 0),
    ("kernel_ss", 4968, 8, 0),
    ("kernel_sp", 4976, 8, 0),
    ("ctrlreg", 4984, 8, 8),
    ("debugreg", 5048, 8, 8),
    ("event_callback_eip", 5112, 8, 0),
    ("failsafe_callback_eip", 5120, 8, 0),
    ("syscall_callback_eip", 5128, 8, 0),
    ("vm_assist", 5136, 8, 0),
    ("fs_base", 5144, 8, 0),
    ("gs_base_kernel", 5152, 8, 0),
    ("gs_base_user", 5160, 8, 0),
];

const START_INFO_32: &[Member] = &[
    ("magic", 0, 32, 0),
    ("nr_pages", 32, 4, 0),
    ("shared_info", 36, 4, 0),
    ("flags", 40, 4, 0),
    ("store_mfn", 44, 4, 0),
    ("store_evtchn", 48, 4, 0),
    ("console.mfn", 52, 4, 0),
    ("console.evtchn", 56, 4, 0),
    ("pt_base", 60, 4, 0),
    ("nr_pt_frames", 64, 4, 0),
    ("mfn_list", 68, 4, 0),
    ("mod_start", 72, 4, 0),
    ("mod_len", 76, 4, 0),
    ("cmd_line", 80, 1024, 0),
    ("first_p2m_pfn", 1104, 4, 0),
    ("nr_p2m_frames", 1108, 4, 0),
];

const SHARED_INFO_32: &[Member] = &[
    ("vcpu_info", 0, 64, 32),
    ("evtchn_pending", 2048, 4, 32),
    ("evtchn_mask", 2176, 4, 32),
    ("wc_version", 2304, 4, 0),
    ("wc_sec", 2308, 4, 0),
    ("wc_nsec", 2312, 4, 0),
    ("arch.max_pfn", 2316, 4, 0),
    ("arch.pfn_to_mfn_frame_list_list", 2320, 4, 0),
    ("arch.nmi_reason", 2324, 4, 0),
    ("arch.p2m_cr3", 2328, 4, 0),
    ("arch.p2m_vaddr", 2332, 4, 0),
    ("arch.p2m_generation", 2336, 4, 0),
    ("arch.wc_sec_hi", 2340, 4, 0),
];

const VCPU_CONTEXT_32: &[Member] = &[
    ("fpu_ctxt", 0, 512, 0),
    ("flags", 512, 4, 0),
    ("user_regs.ebx", 516, 4, 0),
    ("user_regs.ecx", 520, 4, 0),
    ("user_regs.edx", 524, 4, 0),
    ("user_regs.esi", 528, 4, 0),
    ("user_regs.edi", 532, 4, 0),
    ("user_regs.ebp", 536, 4, 0),
    ("user_regs.eax", 540, 4, 0),
    ("user_regs.error_code", 544, 2, 0),
    ("user_regs.entry_vector", 546, 2, 0),
    ("user_regs.eip", 548, 4, 0),
    ("user_regs.cs", 552, 2, 0),
    ("user_regs.saved_upcall_mask", 554, 1, 0),
    ("user_regs.eflags", 556, 4, 0),
    ("user_regs.esp", 560, 4, 0),
    ("user_regs.ss", 564, 2, 0),
    ("user_regs.es", 568, 2, 0),
    ("user_regs.ds", 572, 2, 0),
    ("user_regs.fs", 576, 2, 0),
    ("user_regs.gs", 580, 2, 0),
    ("trap_ctxt", 584, 2048, 0),
    ("ldt_base", 2632, 4, 0),
    ("ldt_ents", 2636, 4, 0),
    ("gdt_frames", 2640, 4, 16),
    ("gdt_ents", 2704, 4, 0),
    ("kernel_ss", 2708, 4, 0),
    ("kernel_sp", 2712, 4, 0),
    ("ctrlreg", 2716, 4, 8),
    ("debugreg", 2748, 4, 8),
    ("event_callback_cs", 2780, 4, 0),
    ("event_callback_eip", 2784, 4, 0),
    ("failsafe_callback_cs", 2788, 4, 0),
    ("failsafe_callback_eip", 2792, 4, 0),
    ("vm_assist", 2796, 4, 0),
];

const VCPU_EXTENDED: &[Member] = &[
    ("vcpu", 0, 4, 0),
    ("size", 4, 4, 0),
    ("syscall32_callback_eip", 8, 8, 0),
    ("sysenter_callback_eip", 16, 8, 0),
    ("syscall32_callback_cs", 24, 2, 0),
    ("sysenter_callback_cs", 26, 2, 0),
    ("syscall32_disables_events", 28, 1, 0),
    ("sysenter_disables_events", 29, 1, 0),
    ("vmce.caps", 32, 8, 0),
    ("vmce.mci_ctl2_bank0", 40, 8, 0),
    ("vmce.mci_ctl2_bank1", 48, 8, 0),
    ("vmce.mcg_ext_ctl", 56, 8, 0),
];

const HEADER: &[Member] = &[
    ("magic", 0, 4, 0),
    ("version", 4, 4, 0),
    ("changeset", 8, 8, 0),
    ("cpuid", 16, 4, 0),
    ("gtsc_khz", 20, 4, 0),
];

const CPU: &[Member] = &[
    ("fpu_regs", 0, 512, 0),
    ("rax", 512, 8, 0),
    ("rbx", 520, 8, 0),
    ("rcx", 528, 8, 0),
    ("rdx", 536, 8, 0),
    ("rbp", 544, 8, 0),
    ("rsi", 552, 8, 0),
    ("rdi", 560, 8, 0),
    ("rsp", 568, 8, 0),
    ("r8", 576, 8, 0),
    ("r9", 584, 8, 0),
    ("r10", 592, 8, 0),
    ("r11", 600, 8, 0),
    ("r12", 608, 8, 0),
    ("r13", 616, 8, 0),
    ("r14", 624, 8, 0),
    ("r15", 632, 8, 0),
    ("rip", 640, 8, 0),
    ("rflags", 648, 8, 0),
    ("cr0", 656, 8, 0),
    ("cr2", 664, 8, 0),
    ("cr3", 672, 8, 0),
    ("cr4", 680, 8, 0),
    ("dr0", 688, 8, 0),
    ("dr1", 696, 8, 0),
    ("dr2", 704, 8, 0),
    ("dr3", 712, 8, 0),
    ("dr6", 720, 8, 0),
    ("dr7", 728, 8, 0),
    ("cs_sel", 736, 4, 0),
    ("ds_sel", 740, 4, 0),
    ("es_sel", 744, 4, 0),
    ("fs_sel", 748, 4, 0),
    ("gs_sel", 752, 4, 0),
    ("ss_sel", 756, 4, 0),
    ("tr_sel", 760, 4, 0),
    ("ldtr_sel", 764, 4, 0),
    ("cs_limit", 768, 4, 0),
    ("ds_limit", 772, 4, 0),
    ("es_limit", 776, 4, 0),
    ("fs_limit", 780, 4, 0),
    ("gs_limit", 784, 4, 0),
    ("ss_limit", 788, 4, 0),
    ("tr_limit", 792, 4, 0),
    ("ldtr_limit", 796, 4, 0),
    ("idtr_limit", 800, 4, 0),
    ("gdtr_limit", 804, 4, 0),
    ("cs_base", 808, 8, 0),
    ("ds_base", 816, 8, 0),
    ("es_base", 824, 8, 0),
    ("fs_base", 832, 8, 0),
    ("gs_base", 840, 8, 0),
    ("ss_base", 848, 8, 0),
    ("tr_base", 856, 8, 0),
    ("ldtr_base", 864, 8, 0),
    ("idtr_base", 872, 8, 0),
    ("gdtr_base", 880, 8, 0),
    ("cs_arbytes", 888, 4, 0),
    ("ds_arbytes", 892, 4, 0),
    ("es_arbytes", 896, 4, 0),
    ("fs_arbytes", 900, 4, 0),
    ("gs_arbytes", 904, 4, 0),
    ("ss_arbytes", 908, 4, 0),
    ("tr_arbytes", 912, 4, 0),
    ("ldtr_arbytes", 916, 4, 0),
    ("sysenter_cs", 920, 8, 0),
    ("sysenter_esp", 928, 8, 0),
    ("sysenter_eip", 936, 8, 0),
    ("shadow_gs", 944, 8, 0),
    ("msr_flags", 952, 8, 0),
    ("msr_lstar", 960, 8, 0),
    ("msr_star", 968, 8, 0),
    ("msr_cstar", 976, 8, 0),
    ("msr_syscall_mask", 984, 8, 0),
    ("msr_efer", 992, 8, 0),
    ("msr_tsc_aux", 1000, 8, 0),
    ("tsc", 1008, 8, 0),
    ("pending_event", 1016, 4, 0),
    ("error_code", 1020, 4, 0),
    ("flags", 1024, 4, 0),
];

const CPU_COMPAT: &[Member] = &[
    ("fpu_regs", 0, 512, 0),
    ("rax", 512, 8, 0),
    ("rbx", 520, 8, 0),
    ("rcx", 528, 8, 0),
    ("rdx", 536, 8, 0),
    ("rbp", 544, 8, 0),
    ("rsi", 552, 8, 0),
    ("rdi", 560, 8, 0),
    ("rsp", 568, 8, 0),
    ("r8", 576, 8, 0),
    ("r9", 584, 8, 0),
    ("r10", 592, 8, 0),
    ("r11", 600, 8, 0),
    ("r12", 608, 8, 0),
    ("r13", 616, 8, 0),
    ("r14", 624, 8, 0),
    ("r15", 632, 8, 0),
    ("rip", 640, 8, 0),
    ("rflags", 648, 8, 0),
    ("cr0", 656, 8, 0),
    ("cr2", 664, 8, 0),
    ("cr3", 672, 8, 0),
    ("cr4", 680, 8, 0),
    ("dr0", 688, 8, 0),
    ("dr1", 696, 8, 0),
    ("dr2", 704, 8, 0),
    ("dr3", 712, 8, 0),
    ("dr6", 720, 8, 0),
    ("dr7", 728, 8, 0),
    ("cs_sel", 736, 4, 0),
    ("ds_sel", 740, 4, 0),
    ("es_sel", 744, 4, 0),
    ("fs_sel", 748, 4, 0),
    ("gs_sel", 752, 4, 0),
    ("ss_sel", 756, 4, 0),
    ("tr_sel", 760, 4, 0),
    ("ldtr_sel", 764, 4, 0),
    ("cs_limit", 768, 4, 0),
    ("ds_limit", 772, 4, 0),
    ("es_limit", 776, 4, 0),
    ("fs_limit", 780, 4, 0),
    ("gs_limit", 784, 4, 0),
    ("ss_limit", 788, 4, 0),
    ("tr_limit", 792, 4, 0),
    ("ldtr_limit", 796, 4, 0),
    ("idtr_limit", 800, 4, 0),
    ("gdtr_limit", 804, 4, 0),
    ("cs_base", 808, 8, 0),
    ("ds_base", 816, 8, 0),
    ("es_base", 824, 8, 0),
    ("fs_base", 832, 8, 0),
    ("gs_base", 840, 8, 0),
    ("ss_base", 848, 8, 0),
    ("tr_base", 856, 8, 0),
    ("ldtr_base", 864, 8, 0),
    ("idtr_base", 872, 8, 0),
    ("gdtr_base", 880, 8, 0),
    ("cs_arbytes", 888, 4, 0),
    ("ds_arbytes", 892, 4, 0),
    ("es_arbytes", 896, 4, 0),
    ("fs_arbytes", 900, 4, 0),
    ("gs_arbytes", 904, 4, 0),
    ("ss_arbytes", 908, 4, 0),
    ("tr_arbytes", 912, 4, 0),
    ("ldtr_arbytes", 916, 4, 0),
    ("sysenter_cs", 920, 8, 0),
    ("sysenter_esp", 928, 8, 0),
    ("sysenter_eip", 936, 8, 0),
    ("shadow_gs", 944, 8, 0),
    ("msr_flags", 952, 8, 0),
    ("msr_lstar", 960, 8, 0),
    ("msr_star", 968, 8, 0),
    ("msr_cstar", 976, 8, 0),
    ("msr_syscall_mask", 984, 8, 0),
    ("msr_efer", 992, 8, 0),
    ("tsc", 1000, 8, 0),
    ("pending_event", 1008, 4, 0),
    ("error_code", 1012, 4, 0),
];

const PIC: &[Member] = &[
    ("irr", 0, 1, 0),
    ("imr", 1, 1, 0),
    ("isr", 2, 1, 0),
    ("irq_base", 3, 1, 0),
    ("elcr", 6, 1, 0),
    ("int_output", 7, 1, 0),
];

const IOAPIC: &[Member] = &[
    ("base_address", 0, 8, 0),
    ("ioregsel", 8, 4, 0),
    ("id", 12, 4, 0),
    ("redirtbl", 16, 8, 48),
];

const LAPIC: &[Member] = &[
    ("apic_base_msr", 0, 8, 0),
    ("disabled", 8, 4, 0),
    ("timer_divisor", 12, 4, 0),
    ("tdt_msr", 16, 8, 0),
];

const PCI_IRQ: &[Member] = &[("wires", 0, 8, 2)];

const ISA_IRQ: &[Member] = &[("wires", 0, 8, 1)];

const PCI_LINK: &[Member] = &[("route", 0, 1, 4)];

const PIT: &[Member] = &[("channels", 0, 16, 3), ("speaker_data_on", 48, 4, 0)];

const RTC: &[Member] = &[
    ("cmos_data", 0, 14, 0),
    ("cmos_index", 14, 1, 0),
    ("rtc_offset", 16, 8, 0),
];

const HPET: &[Member] = &[
    ("capability", 0, 8, 0),
    ("config", 16, 8, 0),
    ("isr", 32, 8, 0),
    ("mc64", 240, 8, 0),
    ("timers", 256, 32, 3),
    ("period", 1024, 8, 3),
];

const PMTIMER: &[Member] = &[
    ("tmr_val", 0, 4, 0),
    ("pm1a_sts", 4, 2, 0),
    ("pm1a_en", 6, 2, 0),
];

const MTRR: &[Member] = &[
    ("msr_pat_cr", 0, 8, 0),
    ("msr_mtrr_var", 8, 8, 16),
    ("msr_mtrr_fixed", 136, 8, 11),
    ("msr_mtrr_cap", 224, 8, 0),
    ("msr_mtrr_def_type", 232, 8, 0),
];

const VIRIDIAN_DOMAIN: &[Member] = &[
    ("hypercall_gpa", 0, 8, 0),
    ("guest_os_id", 8, 8, 0),
    ("time_ref_count", 16, 8, 0),
    ("reference_tsc", 24, 8, 0),
];

const CPU_XSAVE: &[Member] = &[
    ("xfeature_mask", 0, 8, 0),
    ("xcr0", 8, 8, 0),
    ("xcr0_accum", 16, 8, 0),
    ("fpu_sse", 24, 512, 0),
    ("xstate_bv", 536, 8, 0),
    ("xcomp_bv", 544, 8, 0),
];

const VIRIDIAN_VCPU: &[Member] = &[
    ("vp_assist_msr", 0, 8, 0),
    ("apic_assist_pending", 8, 1, 0),
    ("simp_msr", 16, 8, 0),
    ("sint_msr", 24, 8, 16),
    ("stimer_config_msr", 152, 8, 4),
    ("stimer_count_msr", 184, 8, 4),
];

const VMCE_VCPU: &[Member] = &[
    ("caps", 0, 8, 0),
    ("mci_ctl2_bank0", 8, 8, 0),
    ("mci_ctl2_bank1", 16, 8, 0),
    ("mcg_ext_ctl", 24, 8, 0),
];

const TSC_ADJUST: &[Member] = &[("tsc_adjust", 0, 8, 0)];

const CPU_MSR: &[Member] = &[("count", 0, 4, 0), ("msr", 8, 16, 0)];

const CPUID_LEAF: &[Member] = &[
    ("leaf", 0, 4, 0),
    ("subleaf", 4, 4, 0),
    ("eax", 8, 4, 0),
    ("ebx", 12, 4, 0),
    ("ecx", 16, 4, 0),
    ("edx", 20, 4, 0),
];

const MSR_ENTRY: &[Member] = &[("index", 0, 4, 0), ("flags", 4, 4, 0), ("value", 8, 8, 0)];

const VCPU_INFO_64: &[Member] = &[
    ("evtchn_upcall_pending", 0, 1, 0),
    ("evtchn_upcall_mask", 1, 1, 0),
    ("evtchn_pending_sel", 8, 8, 0),
    ("arch.cr2", 16, 8, 0),
    ("time.version", 32, 4, 0),
    ("time.tsc_timestamp", 40, 8, 0),
    ("time.system_time", 48, 8, 0),
    ("time.tsc_to_system_mul", 56, 4, 0),
    ("time.tsc_shift", 60, 1, 0),
    ("time.flags", 61, 1, 0),
];

const VCPU_INFO_32: &[Member] = &[
    ("evtchn_upcall_pending", 0, 1, 0),
    ("evtchn_upcall_mask", 1, 1, 0),
    ("evtchn_pending_sel", 4, 4, 0),
    ("arch.cr2", 8, 4, 0),
    ("time.version", 32, 4, 0),
    ("time.tsc_timestamp", 40, 8, 0),
    ("time.system_time", 48, 8, 0),
    ("time.tsc_to_system_mul", 56, 4, 0),
    ("time.tsc_shift", 60, 1, 0),
    ("time.flags", 61, 1, 0),
];

const PIT_CHANNEL: &[Member] = &[
    ("count", 0, 4, 0),
    ("latched_count", 4, 2, 0),
    ("count_latched", 6, 1, 0),
    ("status_latched", 7, 1, 0),
    ("status", 8, 1, 0),
    ("read_state", 9, 1, 0),
    ("write_state", 10, 1, 0),
    ("write_latch", 11, 1, 0),
    ("rw_mode", 12, 1, 0),
    ("mode", 13, 1, 0),
    ("bcd", 14, 1, 0),
    ("gate", 15, 1, 0),
];

const HPET_TIMER: &[Member] = &[("config", 0, 8, 0), ("cmp", 8, 8, 0), ("fsb", 16, 8, 0)];

const ONE_MSR: &[Member] = &[("index", 0, 4, 0), ("val", 8, 8, 0)];
