//! Layouts of the records of an HVM context.
//!
//! C: `xen/include/public/arch-x86/hvm/save.h`. Offsets are the compiler's for Xen 4.17 (see
//! `tests/it/fields`), plus `pending_esr` of LAPIC, which was added later.

use crate::fields::{
    FieldSpec, Format, HEX_32, HEX_64, Layout, Shape, TO_END, array, bytes, dec, hex, signed,
};

/// HEADER: the Xen and the processor that saved the context.
pub(super) const HEADER: Layout = Layout {
    name: "hvm_save_header",
    bytes: 24,
    fields: &[
        hex("magic", 0, 4),
        hex("version", 4, 4),
        hex("changeset", 8, 8),
        hex("cpuid", 16, 4),
        dec("gtsc_khz", 20, 4),
    ],
};

/// CPU: registers of a vcpu.
pub(super) const CPU: Layout = Layout {
    name: "hvm_hw_cpu",
    bytes: 1032,
    fields: &[
        bytes("fpu_regs", 0, 512),
        hex("rax", 512, 8),
        hex("rbx", 520, 8),
        hex("rcx", 528, 8),
        hex("rdx", 536, 8),
        hex("rbp", 544, 8),
        hex("rsi", 552, 8),
        hex("rdi", 560, 8),
        hex("rsp", 568, 8),
        hex("r8", 576, 8),
        hex("r9", 584, 8),
        hex("r10", 592, 8),
        hex("r11", 600, 8),
        hex("r12", 608, 8),
        hex("r13", 616, 8),
        hex("r14", 624, 8),
        hex("r15", 632, 8),
        hex("rip", 640, 8),
        hex("rflags", 648, 8),
        hex("cr0", 656, 8),
        hex("cr2", 664, 8),
        hex("cr3", 672, 8),
        hex("cr4", 680, 8),
        hex("dr0", 688, 8),
        hex("dr1", 696, 8),
        hex("dr2", 704, 8),
        hex("dr3", 712, 8),
        hex("dr6", 720, 8),
        hex("dr7", 728, 8),
        hex("cs_sel", 736, 4),
        hex("ds_sel", 740, 4),
        hex("es_sel", 744, 4),
        hex("fs_sel", 748, 4),
        hex("gs_sel", 752, 4),
        hex("ss_sel", 756, 4),
        hex("tr_sel", 760, 4),
        hex("ldtr_sel", 764, 4),
        hex("cs_limit", 768, 4),
        hex("ds_limit", 772, 4),
        hex("es_limit", 776, 4),
        hex("fs_limit", 780, 4),
        hex("gs_limit", 784, 4),
        hex("ss_limit", 788, 4),
        hex("tr_limit", 792, 4),
        hex("ldtr_limit", 796, 4),
        hex("idtr_limit", 800, 4),
        hex("gdtr_limit", 804, 4),
        hex("cs_base", 808, 8),
        hex("ds_base", 816, 8),
        hex("es_base", 824, 8),
        hex("fs_base", 832, 8),
        hex("gs_base", 840, 8),
        hex("ss_base", 848, 8),
        hex("tr_base", 856, 8),
        hex("ldtr_base", 864, 8),
        hex("idtr_base", 872, 8),
        hex("gdtr_base", 880, 8),
        hex("cs_arbytes", 888, 4),
        hex("ds_arbytes", 892, 4),
        hex("es_arbytes", 896, 4),
        hex("fs_arbytes", 900, 4),
        hex("gs_arbytes", 904, 4),
        hex("ss_arbytes", 908, 4),
        hex("tr_arbytes", 912, 4),
        hex("ldtr_arbytes", 916, 4),
        hex("sysenter_cs", 920, 8),
        hex("sysenter_esp", 928, 8),
        hex("sysenter_eip", 936, 8),
        hex("shadow_gs", 944, 8),
        hex("msr_flags", 952, 8),
        hex("msr_lstar", 960, 8),
        hex("msr_star", 968, 8),
        hex("msr_cstar", 976, 8),
        hex("msr_syscall_mask", 984, 8),
        hex("msr_efer", 992, 8),
        hex("msr_tsc_aux", 1000, 8),
        hex("tsc", 1008, 8),
        hex("pending_event", 1016, 4),
        hex("error_code", 1020, 4),
        hex("flags", 1024, 4),
    ],
};

/// CPU before Xen 3.4: without `msr_tsc_aux`.
pub(super) const CPU_COMPAT: Layout = Layout {
    name: "hvm_hw_cpu_compat",
    bytes: 1016,
    fields: &[
        bytes("fpu_regs", 0, 512),
        hex("rax", 512, 8),
        hex("rbx", 520, 8),
        hex("rcx", 528, 8),
        hex("rdx", 536, 8),
        hex("rbp", 544, 8),
        hex("rsi", 552, 8),
        hex("rdi", 560, 8),
        hex("rsp", 568, 8),
        hex("r8", 576, 8),
        hex("r9", 584, 8),
        hex("r10", 592, 8),
        hex("r11", 600, 8),
        hex("r12", 608, 8),
        hex("r13", 616, 8),
        hex("r14", 624, 8),
        hex("r15", 632, 8),
        hex("rip", 640, 8),
        hex("rflags", 648, 8),
        hex("cr0", 656, 8),
        hex("cr2", 664, 8),
        hex("cr3", 672, 8),
        hex("cr4", 680, 8),
        hex("dr0", 688, 8),
        hex("dr1", 696, 8),
        hex("dr2", 704, 8),
        hex("dr3", 712, 8),
        hex("dr6", 720, 8),
        hex("dr7", 728, 8),
        hex("cs_sel", 736, 4),
        hex("ds_sel", 740, 4),
        hex("es_sel", 744, 4),
        hex("fs_sel", 748, 4),
        hex("gs_sel", 752, 4),
        hex("ss_sel", 756, 4),
        hex("tr_sel", 760, 4),
        hex("ldtr_sel", 764, 4),
        hex("cs_limit", 768, 4),
        hex("ds_limit", 772, 4),
        hex("es_limit", 776, 4),
        hex("fs_limit", 780, 4),
        hex("gs_limit", 784, 4),
        hex("ss_limit", 788, 4),
        hex("tr_limit", 792, 4),
        hex("ldtr_limit", 796, 4),
        hex("idtr_limit", 800, 4),
        hex("gdtr_limit", 804, 4),
        hex("cs_base", 808, 8),
        hex("ds_base", 816, 8),
        hex("es_base", 824, 8),
        hex("fs_base", 832, 8),
        hex("gs_base", 840, 8),
        hex("ss_base", 848, 8),
        hex("tr_base", 856, 8),
        hex("ldtr_base", 864, 8),
        hex("idtr_base", 872, 8),
        hex("gdtr_base", 880, 8),
        hex("cs_arbytes", 888, 4),
        hex("ds_arbytes", 892, 4),
        hex("es_arbytes", 896, 4),
        hex("fs_arbytes", 900, 4),
        hex("gs_arbytes", 904, 4),
        hex("ss_arbytes", 908, 4),
        hex("tr_arbytes", 912, 4),
        hex("ldtr_arbytes", 916, 4),
        hex("sysenter_cs", 920, 8),
        hex("sysenter_esp", 928, 8),
        hex("sysenter_eip", 936, 8),
        hex("shadow_gs", 944, 8),
        hex("msr_flags", 952, 8),
        hex("msr_lstar", 960, 8),
        hex("msr_star", 968, 8),
        hex("msr_cstar", 976, 8),
        hex("msr_syscall_mask", 984, 8),
        hex("msr_efer", 992, 8),
        hex("tsc", 1000, 8),
        hex("pending_event", 1008, 4),
        hex("error_code", 1012, 4),
    ],
};

/// PIC: one of the two interrupt controllers.
pub(super) const PIC: Layout = Layout {
    name: "hvm_hw_vpic",
    bytes: 8,
    fields: &[
        hex("irr", 0, 1),
        hex("imr", 1, 1),
        hex("isr", 2, 1),
        hex("irq_base", 3, 1),
        hex("init_state_and_priority_add", 4, 1),
        hex("mode_bits", 5, 1),
        hex("elcr", 6, 1),
        hex("int_output", 7, 1),
    ],
};

/// IOAPIC.
pub(super) const IOAPIC: Layout = Layout {
    name: "hvm_hw_vioapic",
    bytes: 400,
    fields: &[
        hex("base_address", 0, 8),
        hex("ioregsel", 8, 4),
        hex("id", 12, 4),
        array("redirtbl", 16, 48, 8, HEX_64),
    ],
};

/// LAPIC: a local APIC beyond its registers.
pub(super) const LAPIC: Layout = Layout {
    name: "hvm_hw_lapic",
    bytes: 24,
    fields: &[
        hex("apic_base_msr", 0, 8),
        hex("disabled", 8, 4),
        dec("timer_divisor", 12, 4),
        hex("tdt_msr", 16, 8),
        hex("pending_esr", 24, 4),
    ],
};

/// PCI_IRQ: PCI interrupt lines.
pub(super) const PCI_IRQ: Layout = Layout {
    name: "hvm_hw_pci_irqs",
    bytes: 16,
    fields: &[array("wires", 0, 2, 8, HEX_64)],
};

/// ISA_IRQ: ISA interrupt lines.
pub(super) const ISA_IRQ: Layout = Layout {
    name: "hvm_hw_isa_irqs",
    bytes: 8,
    fields: &[array("wires", 0, 1, 8, HEX_64)],
};

/// PCI_LINK: the PCI-ISA router.
pub(super) const PCI_LINK: Layout = Layout {
    name: "hvm_hw_pci_link",
    bytes: 8,
    fields: &[array(
        "route",
        0,
        4,
        1,
        &Shape::Number {
            width: 1,
            format: Format::Dec,
        },
    )],
};

const PIT_CHANNEL: &[FieldSpec] = &[
    dec("count", 0, 4),
    dec("latched_count", 4, 2),
    hex("count_latched", 6, 1),
    hex("status_latched", 7, 1),
    hex("status", 8, 1),
    hex("read_state", 9, 1),
    hex("write_state", 10, 1),
    hex("write_latch", 11, 1),
    hex("rw_mode", 12, 1),
    hex("mode", 13, 1),
    hex("bcd", 14, 1),
    hex("gate", 15, 1),
];

/// PIT: the interval timer.
pub(super) const PIT: Layout = Layout {
    name: "hvm_hw_pit",
    bytes: 56,
    fields: &[
        array("channels", 0, 3, 16, &Shape::Struct(PIT_CHANNEL)),
        hex("speaker_data_on", 48, 4),
    ],
};

/// RTC: the clock.
pub(super) const RTC: Layout = Layout {
    name: "hvm_hw_rtc",
    bytes: 24,
    fields: &[
        bytes("cmos_data", 0, 14),
        hex("cmos_index", 14, 1),
        signed("rtc_offset", 16, 8),
    ],
};

const HPET_TIMER: &[FieldSpec] = &[hex("config", 0, 8), hex("cmp", 8, 8), hex("fsb", 16, 8)];

/// HPET.
pub(super) const HPET: Layout = Layout {
    name: "hvm_hw_hpet",
    bytes: 1048,
    fields: &[
        hex("capability", 0, 8),
        hex("config", 16, 8),
        hex("isr", 32, 8),
        hex("mc64", 240, 8),
        array("timers", 256, 3, 32, &Shape::Struct(HPET_TIMER)),
        array(
            "period",
            1024,
            3,
            8,
            &Shape::Number {
                width: 8,
                format: Format::Dec,
            },
        ),
    ],
};

/// PMTIMER.
pub(super) const PMTIMER: Layout = Layout {
    name: "hvm_hw_pmtimer",
    bytes: 8,
    fields: &[
        hex("tmr_val", 0, 4),
        hex("pm1a_sts", 4, 2),
        hex("pm1a_en", 6, 2),
    ],
};

/// MTRR: memory types.
pub(super) const MTRR: Layout = Layout {
    name: "hvm_hw_mtrr",
    bytes: 240,
    fields: &[
        hex("msr_pat_cr", 0, 8),
        array("msr_mtrr_var", 8, 16, 8, HEX_64),
        array("msr_mtrr_fixed", 136, 11, 8, HEX_64),
        hex("msr_mtrr_cap", 224, 8),
        hex("msr_mtrr_def_type", 232, 8),
    ],
};

/// VIRIDIAN_DOMAIN: state of the Hyper-V interface for Windows.
pub(super) const VIRIDIAN_DOMAIN: Layout = Layout {
    name: "hvm_viridian_domain_context",
    bytes: 32,
    fields: &[
        hex("hypercall_gpa", 0, 8),
        hex("guest_os_id", 8, 8),
        hex("time_ref_count", 16, 8),
        hex("reference_tsc", 24, 8),
    ],
};

/// CPU_XSAVE: extended registers of a vcpu; the rest of the body depends on `xstate_bv`.
pub(super) const CPU_XSAVE: Layout = Layout {
    name: "hvm_hw_cpu_xsave",
    bytes: 600,
    fields: &[
        hex("xfeature_mask", 0, 8),
        hex("xcr0", 8, 8),
        hex("xcr0_accum", 16, 8),
        bytes("fpu_sse", 24, 512),
        hex("xstate_bv", 536, 8),
        hex("xcomp_bv", 544, 8),
    ],
};

/// VIRIDIAN_VCPU.
pub(super) const VIRIDIAN_VCPU: Layout = Layout {
    name: "hvm_viridian_vcpu_context",
    bytes: 216,
    fields: &[
        hex("vp_assist_msr", 0, 8),
        hex("apic_assist_pending", 8, 1),
        hex("simp_msr", 16, 8),
        array("sint_msr", 24, 16, 8, HEX_64),
        array("stimer_config_msr", 152, 4, 8, HEX_64),
        array("stimer_count_msr", 184, 4, 8, HEX_64),
    ],
};

/// VMCE_VCPU: machine checks.
pub(super) const VMCE_VCPU: Layout = Layout {
    name: "hvm_vmce_vcpu",
    bytes: 32,
    fields: &[
        hex("caps", 0, 8),
        hex("mci_ctl2_bank0", 8, 8),
        hex("mci_ctl2_bank1", 16, 8),
        hex("mcg_ext_ctl", 24, 8),
    ],
};

/// TSC_ADJUST.
pub(super) const TSC_ADJUST: Layout = Layout {
    name: "hvm_tsc_adjust",
    bytes: 8,
    fields: &[hex("tsc_adjust", 0, 8)],
};

const ONE_MSR: &[FieldSpec] = &[hex("index", 0, 4), hex("val", 8, 8)];

/// CPU_MSR: model-specific registers of a vcpu.
pub(super) const CPU_MSR: Layout = Layout {
    name: "hvm_msr",
    bytes: 8,
    fields: &[
        dec("count", 0, 4),
        array("msr", 8, TO_END, 16, &Shape::Struct(ONE_MSR)),
    ],
};

/// LAPIC_REGS: the registers of a local APIC, at the processor's own offsets.
pub(super) const LAPIC_REGS: Layout = Layout {
    name: "hvm_hw_lapic_regs",
    bytes: 1024,
    fields: &[
        hex("id", 0x20, 4),
        hex("version", 0x30, 4),
        hex("tpr", 0x80, 4),
        hex("apr", 0x90, 4),
        hex("ppr", 0xa0, 4),
        hex("eoi", 0xb0, 4),
        hex("rrd", 0xc0, 4),
        hex("ldr", 0xd0, 4),
        hex("dfr", 0xe0, 4),
        hex("svr", 0xf0, 4),
        array("isr", 0x100, 8, 16, HEX_32),
        array("tmr", 0x180, 8, 16, HEX_32),
        array("irr", 0x200, 8, 16, HEX_32),
        hex("esr", 0x280, 4),
        hex("lvt_cmci", 0x2f0, 4),
        hex("icr_low", 0x300, 4),
        hex("icr_high", 0x310, 4),
        hex("lvt_timer", 0x320, 4),
        hex("lvt_thermal", 0x330, 4),
        hex("lvt_performance", 0x340, 4),
        hex("lvt_lint0", 0x350, 4),
        hex("lvt_lint1", 0x360, 4),
        hex("lvt_error", 0x370, 4),
        hex("timer_initial", 0x380, 4),
        hex("timer_current", 0x390, 4),
        hex("timer_divide", 0x3e0, 4),
    ],
};
