//! Layouts of PV guests' structures: start_info, shared_info, vcpu contexts.
//!
//! C: `xen/include/public/{xen.h,arch-x86/xen.h,domctl.h}`. Offsets are the compiler's for those
//! headers (see `tests/it/fields`). The 32-bit layouts are those that a 32-bit guest sees; a 64-bit
//! toolstack writes them unchanged.

use super::{
    FieldSpec, HEX_32, HEX_64, Layout, Shape, TO_END, array, bytes, dec, hex, signed, text,
};

/// `start_info` of a 64-bit PV guest: the page that `edx` of vcpu 0 names in a saved image.
pub const START_INFO_64: Layout = Layout {
    name: "start_info",
    bytes: 1168,
    fields: &[
        text("magic", 0, 32),
        dec("nr_pages", 32, 8),
        hex("shared_info", 40, 8),
        hex("flags", 48, 4),
        hex("store_mfn", 56, 8),
        dec("store_evtchn", 64, 4),
        hex("console.mfn", 72, 8),
        dec("console.evtchn", 80, 4),
        hex("pt_base", 88, 8),
        dec("nr_pt_frames", 96, 8),
        hex("mfn_list", 104, 8),
        hex("mod_start", 112, 8),
        dec("mod_len", 120, 8),
        text("cmd_line", 128, 1024),
        hex("first_p2m_pfn", 1152, 8),
        dec("nr_p2m_frames", 1160, 8),
    ],
};

const VCPU_INFO_64: &[FieldSpec] = &[
    hex("evtchn_upcall_pending", 0, 1),
    hex("evtchn_upcall_mask", 1, 1),
    hex("evtchn_pending_sel", 8, 8),
    hex("arch.cr2", 16, 8),
    dec("time.version", 32, 4),
    hex("time.tsc_timestamp", 40, 8),
    dec("time.system_time", 48, 8),
    hex("time.tsc_to_system_mul", 56, 4),
    signed("time.tsc_shift", 60, 1),
    hex("time.flags", 61, 1),
];

/// `shared_info` of a 64-bit guest: the body of SHARED_INFO.
pub const SHARED_INFO_64: Layout = Layout {
    name: "shared_info",
    bytes: 3136,
    fields: &[
        array("vcpu_info", 0, 32, 64, &Shape::Struct(VCPU_INFO_64)),
        array("evtchn_pending", 2048, 64, 8, HEX_64),
        array("evtchn_mask", 2560, 64, 8, HEX_64),
        dec("wc_version", 3072, 4),
        dec("wc_sec", 3076, 4),
        dec("wc_nsec", 3080, 4),
        dec("wc_sec_hi", 3084, 4),
        dec("arch.max_pfn", 3088, 8),
        hex("arch.pfn_to_mfn_frame_list_list", 3096, 8),
        hex("arch.nmi_reason", 3104, 8),
        hex("arch.p2m_cr3", 3112, 8),
        hex("arch.p2m_vaddr", 3120, 8),
        dec("arch.p2m_generation", 3128, 8),
    ],
};

/// `vcpu_guest_context` of a 64-bit guest: the blob of X86_PV_VCPU_BASIC.
pub const VCPU_CONTEXT_64: Layout = Layout {
    name: "vcpu_guest_context",
    bytes: 5168,
    fields: &[
        bytes("fpu_ctxt", 0, 512),
        hex("flags", 512, 8),
        hex("user_regs.r15", 520, 8),
        hex("user_regs.r14", 528, 8),
        hex("user_regs.r13", 536, 8),
        hex("user_regs.r12", 544, 8),
        hex("user_regs.rbp", 552, 8),
        hex("user_regs.rbx", 560, 8),
        hex("user_regs.r11", 568, 8),
        hex("user_regs.r10", 576, 8),
        hex("user_regs.r9", 584, 8),
        hex("user_regs.r8", 592, 8),
        hex("user_regs.rax", 600, 8),
        hex("user_regs.rcx", 608, 8),
        hex("user_regs.rdx", 616, 8),
        hex("user_regs.rsi", 624, 8),
        hex("user_regs.rdi", 632, 8),
        hex("user_regs.error_code", 640, 4),
        hex("user_regs.entry_vector", 644, 4),
        hex("user_regs.rip", 648, 8),
        hex("user_regs.cs", 656, 2),
        hex("user_regs.saved_upcall_mask", 660, 1),
        hex("user_regs.rflags", 664, 8),
        hex("user_regs.rsp", 672, 8),
        hex("user_regs.ss", 680, 2),
        hex("user_regs.es", 688, 2),
        hex("user_regs.ds", 696, 2),
        hex("user_regs.fs", 704, 2),
        hex("user_regs.gs", 712, 2),
        bytes("trap_ctxt", 720, 4096),
        hex("ldt_base", 4816, 8),
        dec("ldt_ents", 4824, 8),
        array("gdt_frames", 4832, 16, 8, HEX_64),
        dec("gdt_ents", 4960, 8),
        hex("kernel_ss", 4968, 8),
        hex("kernel_sp", 4976, 8),
        array("ctrlreg", 4984, 8, 8, HEX_64),
        array("debugreg", 5048, 8, 8, HEX_64),
        hex("event_callback_eip", 5112, 8),
        hex("failsafe_callback_eip", 5120, 8),
        hex("syscall_callback_eip", 5128, 8),
        hex("vm_assist", 5136, 8),
        hex("fs_base", 5144, 8),
        hex("gs_base_kernel", 5152, 8),
        hex("gs_base_user", 5160, 8),
    ],
};

/// `start_info` of a 32-bit PV guest: the page that `edx` of vcpu 0 names in a saved image.
pub const START_INFO_32: Layout = Layout {
    name: "start_info",
    bytes: 1112,
    fields: &[
        text("magic", 0, 32),
        dec("nr_pages", 32, 4),
        hex("shared_info", 36, 4),
        hex("flags", 40, 4),
        hex("store_mfn", 44, 4),
        dec("store_evtchn", 48, 4),
        hex("console.mfn", 52, 4),
        dec("console.evtchn", 56, 4),
        hex("pt_base", 60, 4),
        dec("nr_pt_frames", 64, 4),
        hex("mfn_list", 68, 4),
        hex("mod_start", 72, 4),
        dec("mod_len", 76, 4),
        text("cmd_line", 80, 1024),
        hex("first_p2m_pfn", 1104, 4),
        dec("nr_p2m_frames", 1108, 4),
    ],
};

const VCPU_INFO_32: &[FieldSpec] = &[
    hex("evtchn_upcall_pending", 0, 1),
    hex("evtchn_upcall_mask", 1, 1),
    hex("evtchn_pending_sel", 4, 4),
    hex("arch.cr2", 8, 4),
    dec("time.version", 32, 4),
    hex("time.tsc_timestamp", 40, 8),
    dec("time.system_time", 48, 8),
    hex("time.tsc_to_system_mul", 56, 4),
    signed("time.tsc_shift", 60, 1),
    hex("time.flags", 61, 1),
];

/// `shared_info` of a 32-bit guest: the body of SHARED_INFO.
pub const SHARED_INFO_32: Layout = Layout {
    name: "shared_info",
    bytes: 2344,
    fields: &[
        array("vcpu_info", 0, 32, 64, &Shape::Struct(VCPU_INFO_32)),
        array("evtchn_pending", 2048, 32, 4, HEX_32),
        array("evtchn_mask", 2176, 32, 4, HEX_32),
        dec("wc_version", 2304, 4),
        dec("wc_sec", 2308, 4),
        dec("wc_nsec", 2312, 4),
        dec("arch.max_pfn", 2316, 4),
        hex("arch.pfn_to_mfn_frame_list_list", 2320, 4),
        hex("arch.nmi_reason", 2324, 4),
        hex("arch.p2m_cr3", 2328, 4),
        hex("arch.p2m_vaddr", 2332, 4),
        dec("arch.p2m_generation", 2336, 4),
        dec("arch.wc_sec_hi", 2340, 4),
    ],
};

/// `vcpu_guest_context` of a 32-bit guest: the blob of X86_PV_VCPU_BASIC.
pub const VCPU_CONTEXT_32: Layout = Layout {
    name: "vcpu_guest_context",
    bytes: 2800,
    fields: &[
        bytes("fpu_ctxt", 0, 512),
        hex("flags", 512, 4),
        hex("user_regs.ebx", 516, 4),
        hex("user_regs.ecx", 520, 4),
        hex("user_regs.edx", 524, 4),
        hex("user_regs.esi", 528, 4),
        hex("user_regs.edi", 532, 4),
        hex("user_regs.ebp", 536, 4),
        hex("user_regs.eax", 540, 4),
        hex("user_regs.error_code", 544, 2),
        hex("user_regs.entry_vector", 546, 2),
        hex("user_regs.eip", 548, 4),
        hex("user_regs.cs", 552, 2),
        hex("user_regs.saved_upcall_mask", 554, 1),
        hex("user_regs.eflags", 556, 4),
        hex("user_regs.esp", 560, 4),
        hex("user_regs.ss", 564, 2),
        hex("user_regs.es", 568, 2),
        hex("user_regs.ds", 572, 2),
        hex("user_regs.fs", 576, 2),
        hex("user_regs.gs", 580, 2),
        bytes("trap_ctxt", 584, 2048),
        hex("ldt_base", 2632, 4),
        dec("ldt_ents", 2636, 4),
        array("gdt_frames", 2640, 16, 4, HEX_32),
        dec("gdt_ents", 2704, 4),
        hex("kernel_ss", 2708, 4),
        hex("kernel_sp", 2712, 4),
        array("ctrlreg", 2716, 8, 4, HEX_32),
        array("debugreg", 2748, 8, 4, HEX_32),
        hex("event_callback_cs", 2780, 4),
        hex("event_callback_eip", 2784, 4),
        hex("failsafe_callback_cs", 2788, 4),
        hex("failsafe_callback_eip", 2792, 4),
        hex("vm_assist", 2796, 4),
    ],
};

/// `xen_domctl_ext_vcpucontext`: the blob of X86_PV_VCPU_EXTENDED.
pub const VCPU_EXTENDED: Layout = Layout {
    name: "ext_vcpucontext",
    bytes: 64,
    fields: &[
        dec("vcpu", 0, 4),
        dec("size", 4, 4),
        hex("syscall32_callback_eip", 8, 8),
        hex("sysenter_callback_eip", 16, 8),
        hex("syscall32_callback_cs", 24, 2),
        hex("sysenter_callback_cs", 26, 2),
        hex("syscall32_disables_events", 28, 1),
        hex("sysenter_disables_events", 29, 1),
        hex("vmce.caps", 32, 8),
        hex("vmce.mci_ctl2_bank0", 40, 8),
        hex("vmce.mci_ctl2_bank1", 48, 8),
        hex("vmce.mcg_ext_ctl", 56, 8),
    ],
};

const VCPU_MSR: &[FieldSpec] = &[
    hex("index", 0, 4),
    hex("reserved", 4, 4),
    hex("value", 8, 8),
];

/// The blob of X86_PV_VCPU_MSRS: an array of `xen_domctl_vcpu_msr`.
pub const VCPU_MSRS: Layout = Layout {
    name: "vcpu_msrs",
    bytes: 16,
    fields: &[array("msr", 0, TO_END, 16, &Shape::Struct(VCPU_MSR))],
};

/// The blob of X86_PV_VCPU_XSAVE: two masks, then the processor's XSAVE area; the part after its
/// header depends on `xstate_bv`.
pub const VCPU_XSAVE: Layout = Layout {
    name: "vcpu_xsave",
    bytes: 592,
    fields: &[
        hex("xcr0", 0, 8),
        hex("xcr0_accum", 8, 8),
        bytes("fpu_sse", 16, 512),
        hex("xstate_bv", 528, 8),
        hex("xcomp_bv", 536, 8),
    ],
};
