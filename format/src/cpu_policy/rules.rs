//! Exceptions for comparing CPU policies: bits whose loss is harmless, each with its reason, and
//! the components of the extended state.
//!
//! The reasons are Xen's own: `xen/arch/x86/cpu-policy.c` (before 4.18 `cpuid.c`) and the marks in
//! `xen/include/public/arch-x86/cpufeatureset.h` ("!": not a plain feature; "|": to be shown to a
//! guest if any host of its pool has it), in Xen 4.14 to 4.22.

use super::CpuPolicy;
use crate::fields::x86::{Feature, FeatureWord, Register};

/// Bits of a CPUID register.
struct Bits {
    leaf: u32,
    subleaf: u32,
    register: Register,
    bits: u32,
}

const fn bits(leaf: u32, register: Register, bits: u32) -> Bits {
    Bits {
        leaf,
        subleaf: 0,
        register,
        bits,
    }
}

/// Bits that are never missing.
const HARMLESS: &[Bits] = &[
    // APIC: Xen shows what the guest has set in its own APIC's base register. HTT: tells how to
    // read the topology leaves, which the toolstack chooses. Any guest may have it: Xen up to 4.17
    // allows it in `recalculate_cpuid_policy`, later versions have it in the largest policy.
    bits(1, Register::Edx, 1 << 9 | 1 << 28),
    // X2APIC: Xen emulates it for HVM guests on any hardware. PV guests saw it up to 4.18 and
    // cannot use it.
    // OSXSAVE: Xen shows the guest's own CR4.
    // HYPERVISOR: always offered.
    bits(1, Register::Ecx, 1 << 21 | 1 << 27 | 1 << 31),
    // FDP_EXCP_ONLY and NO_FPU_SEL: Xen replaces the guest's bit by the host's. ERMS: a hint about
    // speed, which Xen offers everywhere.
    bits(7, Register::Ebx, 1 << 6 | 1 << 13 | 1 << 9),
    // OSPKE: like OSXSAVE.
    bits(7, Register::Ecx, 1 << 4),
    // MD_CLEAR ("|"): VERW clears buffers, if this host needs that. The instruction itself is as
    // old as the 286.
    bits(7, Register::Edx, 1 << 10),
    // CMP_LEGACY: like HTT.
    bits(0x8000_0001, Register::Ecx, 1 << 1),
    // AMD's copies of leaf 1's edx: fpu vme de pse tsc msr pae mce cx8 apic, mtrr pge mca cmov pat
    // pse36, mmx fxsr (`CPUID_COMMON_1D_FEATURES`). Xen creates them for the guest; a host's
    // largest policy does not have them.
    bits(0x8000_0001, Register::Edx, 0x0183_f3ff),
    // NO_LMSL ("|"): EFER.LMSLE does not work, as on every Xen.
    bits(0x8000_0008, Register::Ebx, 1 << 20),
    // FS_GS_NS ("|"): writes of the base registers may take effect late. A guest that expects this
    // also works where they do not. VERW_CLEAR ("|"): like MD_CLEAR.
    bits(0x8000_0021, Register::Eax, 1 << 1 | 1 << 5),
];

/// Like [`HARMLESS`], for ARCH_CAPABILITIES. RSBA and RRSBA say that the guest may move to a host
/// on which return stack underflow is dangerous; FB_CLEAR and RFDS_CLEAR are like MD_CLEAR.
const HARMLESS_ARCH_CAPABILITIES: u64 = 1 << 2 | 1 << 19 | 1 << 17 | 1 << 28;

/// The harmless bits of a register.
pub(super) fn harmless(word: FeatureWord) -> u64 {
    match word {
        FeatureWord::ARCH_CAPABILITIES => HARMLESS_ARCH_CAPABILITIES,
        FeatureWord::Msr { .. } => 0,
        FeatureWord::Cpuid {
            leaf,
            subleaf,
            register,
        } => HARMLESS
            .iter()
            .filter(|row| (row.leaf, row.subleaf, row.register) == (leaf, subleaf, register))
            .fold(0, |all, row| all | u64::from(row.bits)),
    }
}

const fn cpuid(leaf: u32, register: Register, bit: u8) -> Feature {
    Feature {
        word: FeatureWord::Cpuid {
            leaf,
            subleaf: 0,
            register,
        },
        bit,
    }
}

const AVX: Feature = cpuid(1, Register::Ecx, 28);
const RTM: Feature = cpuid(7, Register::Ebx, 11);
const MPX: Feature = cpuid(7, Register::Ebx, 14);
const AVX512F: Feature = cpuid(7, Register::Ebx, 16);
const PKU: Feature = cpuid(7, Register::Ecx, 3);
const RTM_ALWAYS_ABORT: Feature = cpuid(7, Register::Edx, 11);
const AMX_TILE: Feature = cpuid(7, Register::Edx, 24);

/// Whether another feature of the host fulfils the promise of a missing one. RTM_ALWAYS_ABORT
/// promises that XBEGIN does not fault, which also holds where transactions work
/// (`guest_common_max_feature_adjustments`).
pub(super) fn stood_in_for(feature: Feature, host: &CpuPolicy) -> bool {
    feature == RTM_ALWAYS_ABORT && host.has(RTM)
}

/// The CPUID leaf of the extended state.
pub(super) const XSTATE_LEAF: u32 = 0xd;

/// The first component with a subleaf of its own; those before, x87 and SSE, are on every
/// processor.
pub(super) const FIRST_COMPONENT: u8 = 2;

/// The components, with the feature that each belongs to.
///
/// Specification: the processor makers' manuals; C: `recalculate_xstate`.
const COMPONENTS: [(u8, &str, Feature); 9] = [
    (2, "AVX", AVX),
    (3, "MPX", MPX),
    (4, "MPX", MPX),
    (5, "AVX512", AVX512F),
    (6, "AVX512", AVX512F),
    (7, "AVX512", AVX512F),
    (9, "PKU", PKU),
    (17, "AMX", AMX_TILE),
    (18, "AMX", AMX_TILE),
];

/// The common name of a component.
fn component_name(component: u8) -> Option<&'static str> {
    let known = COMPONENTS.iter().find(|(number, ..)| *number == component);
    known.map(|(_, name, _)| *name)
}

/// The name of a component's state.
pub(super) fn state_name(component: u8) -> String {
    match component_name(component) {
        Some(name) => format!("the XSAVE state of {name}"),
        None => format!("XSAVE state component {component}"),
    }
}

/// The features that a component needs.
pub(super) fn features_of(component: u8) -> impl Iterator<Item = Feature> {
    let of = move |(number, _, feature): &(u8, &str, Feature)| {
        (*number == component).then_some(*feature)
    };
    COMPONENTS.iter().filter_map(of)
}

/// The components that need one of these features.
pub(super) fn components_of(features: &[Feature]) -> impl Iterator<Item = u8> {
    let needs = |(_, _, feature): &&(u8, &str, Feature)| features.contains(feature);
    COMPONENTS.iter().filter(needs).map(|(number, ..)| *number)
}
