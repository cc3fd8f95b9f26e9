//! Offsets in the records of an HVM context.

use super::Member;

pub(super) const HEADER: &[Member] = &[
    ("magic", 0, 4, 0),
    ("version", 4, 4, 0),
    ("changeset", 8, 8, 0),
    ("cpuid", 16, 4, 0),
    ("gtsc_khz", 20, 4, 0),
];

pub(super) const CPU: &[Member] = &[
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

pub(super) const CPU_COMPAT: &[Member] = &[
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

pub(super) const PIC: &[Member] = &[
    ("irr", 0, 1, 0),
    ("imr", 1, 1, 0),
    ("isr", 2, 1, 0),
    ("irq_base", 3, 1, 0),
    ("elcr", 6, 1, 0),
    ("int_output", 7, 1, 0),
];

pub(super) const IOAPIC: &[Member] = &[
    ("base_address", 0, 8, 0),
    ("ioregsel", 8, 4, 0),
    ("id", 12, 4, 0),
    ("redirtbl", 16, 8, 48),
];

pub(super) const LAPIC: &[Member] = &[
    ("apic_base_msr", 0, 8, 0),
    ("disabled", 8, 4, 0),
    ("timer_divisor", 12, 4, 0),
    ("tdt_msr", 16, 8, 0),
];

pub(super) const PCI_IRQ: &[Member] = &[("wires", 0, 8, 2)];

pub(super) const ISA_IRQ: &[Member] = &[("wires", 0, 8, 1)];

pub(super) const PCI_LINK: &[Member] = &[("route", 0, 1, 4)];

pub(super) const PIT: &[Member] = &[("channels", 0, 16, 3), ("speaker_data_on", 48, 4, 0)];

pub(super) const RTC: &[Member] = &[
    ("cmos_data", 0, 14, 0),
    ("cmos_index", 14, 1, 0),
    ("rtc_offset", 16, 8, 0),
];

pub(super) const HPET: &[Member] = &[
    ("capability", 0, 8, 0),
    ("config", 16, 8, 0),
    ("isr", 32, 8, 0),
    ("mc64", 240, 8, 0),
    ("timers", 256, 32, 3),
    ("period", 1024, 8, 3),
];

pub(super) const PMTIMER: &[Member] = &[
    ("tmr_val", 0, 4, 0),
    ("pm1a_sts", 4, 2, 0),
    ("pm1a_en", 6, 2, 0),
];

pub(super) const MTRR: &[Member] = &[
    ("msr_pat_cr", 0, 8, 0),
    ("msr_mtrr_var", 8, 8, 16),
    ("msr_mtrr_fixed", 136, 8, 11),
    ("msr_mtrr_cap", 224, 8, 0),
    ("msr_mtrr_def_type", 232, 8, 0),
];

pub(super) const VIRIDIAN_DOMAIN: &[Member] = &[
    ("hypercall_gpa", 0, 8, 0),
    ("guest_os_id", 8, 8, 0),
    ("time_ref_count", 16, 8, 0),
    ("reference_tsc", 24, 8, 0),
];

pub(super) const CPU_XSAVE: &[Member] = &[
    ("xfeature_mask", 0, 8, 0),
    ("xcr0", 8, 8, 0),
    ("xcr0_accum", 16, 8, 0),
    ("fpu_sse", 24, 512, 0),
    ("xstate_bv", 536, 8, 0),
    ("xcomp_bv", 544, 8, 0),
];

pub(super) const VIRIDIAN_VCPU: &[Member] = &[
    ("vp_assist_msr", 0, 8, 0),
    ("apic_assist_pending", 8, 1, 0),
    ("simp_msr", 16, 8, 0),
    ("sint_msr", 24, 8, 16),
    ("stimer_config_msr", 152, 8, 4),
    ("stimer_count_msr", 184, 8, 4),
];

pub(super) const VMCE_VCPU: &[Member] = &[
    ("caps", 0, 8, 0),
    ("mci_ctl2_bank0", 8, 8, 0),
    ("mci_ctl2_bank1", 16, 8, 0),
    ("mcg_ext_ctl", 24, 8, 0),
];

pub(super) const TSC_ADJUST: &[Member] = &[("tsc_adjust", 0, 8, 0)];

pub(super) const CPU_MSR: &[Member] = &[("count", 0, 4, 0), ("msr", 8, 16, 0)];

pub(super) const PIT_CHANNEL: &[Member] = &[
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

pub(super) const HPET_TIMER: &[Member] =
    &[("config", 0, 8, 0), ("cmp", 8, 8, 0), ("fsb", 16, 8, 0)];

pub(super) const ONE_MSR: &[Member] = &[("index", 0, 4, 0), ("val", 8, 8, 0)];
