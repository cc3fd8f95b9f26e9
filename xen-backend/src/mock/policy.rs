//! The CPU policy of the mock machine: what its default processor offers a new guest
//! (`processor.rs` has the deviations of others), and which policies the machine accepts.
//!
//! C implementation: `xen/lib/x86/{cpuid,msr,policy}.c`.

use crate::Errno;

use super::layout::read_word;
use crate::{CpuPolicy, GuestKind, PolicyEntry};

/// Bytes in a CPUID leaf of a policy.
const LEAF: usize = 24;
/// Bytes in an MSR of a policy.
const MSR: usize = 16;
const NO_SUBLEAF: u32 = xsr_format::cpu_policy::CpuPolicy::NO_SUBLEAF;

/// Largest basic leaf that the machine offers.
pub(super) const MAX_BASIC: u32 = 0x1f;
/// Largest extended leaf that the machine offers.
pub(super) const MAX_EXTENDED: u32 = 0x8000_0021;
/// Largest subleaf of leaf 7 that the machine offers.
pub(super) const MAX_FEATURES: u32 = 2;
/// MSRs a policy may hold: MSR_INTEL_PLATFORM_INFO and MSR_ARCH_CAPABILITIES.
const KNOWN_MSRS: [u32; 2] = [0xce, 0x10a];

/// The policy of a new guest of this kind on the default processor.
pub(super) fn default_policy(kind: GuestKind) -> CpuPolicy {
    let mut leaves = Vec::new();
    let mut put = |leaf: u32, subleaf: u32, registers: [u32; 4]| {
        leaves.extend_from_slice(&leaf.to_le_bytes());
        leaves.extend_from_slice(&subleaf.to_le_bytes());
        for register in registers {
            leaves.extend_from_slice(&register.to_le_bytes());
        }
    };
    let translated = kind.is_translated();
    // "AuthenticAMD", in the order ebx, ecx, edx.
    let vendor = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
    put(0, NO_SUBLEAF, [0xd, vendor[0], vendor[1], vendor[2]]);
    put(
        1,
        NO_SUBLEAF,
        match translated {
            true => [0x0083_0f10, 0x0004_0800, 0xf6f8_3203, 0x1fcb_fbfd],
            false => [0x0083_0f10, 0x0002_0800, 0xf6d8_3203, 0x1fc9_c3f5],
        },
    );
    for leaf in 2..=0xc {
        match leaf {
            4 | 0xb => put(leaf, 0, [0; 4]),
            7 => put(
                7,
                0,
                match translated {
                    true => [0, 0x0188_03a9, 0x0000_020c, 0],
                    false => [0, 0x0188_0329, 0x0000_0200, 0],
                },
            ),
            _ => put(leaf, NO_SUBLEAF, [0; 4]),
        }
    }
    // XSAVE: x87, SSE and AVX; translated guests have PKRU too.
    match translated {
        true => put(0xd, 0, [0x207, 0, 0xa88, 0]),
        false => put(0xd, 0, [0x7, 0, 0x340, 0]),
    }
    put(0xd, 1, [0x5, 0, 0, 0]);
    put(0xd, 2, [0x100, 0x240, 0, 0]);
    if translated {
        (3..9).for_each(|subleaf| put(0xd, subleaf, [0; 4]));
        put(0xd, 9, [0x8, 0xa80, 0, 0]);
    }
    put(0x4000_0000, NO_SUBLEAF, [0; 4]);
    put(0x4000_0100, NO_SUBLEAF, [0; 4]);
    put(
        0x8000_0000,
        NO_SUBLEAF,
        [MAX_EXTENDED, vendor[0], vendor[1], vendor[2]],
    );
    put(
        0x8000_0001,
        NO_SUBLEAF,
        match translated {
            true => [0x0083_0f10, 0, 0x0000_0071, 0xe5d3_fbfd],
            false => [0x0083_0f10, 0, 0x0000_0063, 0xe1d1_cbf5],
        },
    );
    let mut brand = *b"Mock x86 processor of the xsr project           ";
    brand[47] = 0;
    for (leaf, text) in (0x8000_0002..).zip(brand.chunks_exact(16)) {
        let word = |n: usize| u32::from_le_bytes([text[n], text[n + 1], text[n + 2], text[n + 3]]);
        put(leaf, NO_SUBLEAF, [word(0), word(4), word(8), word(12)]);
    }
    for leaf in 0x8000_0005..=MAX_EXTENDED {
        put(
            leaf,
            NO_SUBLEAF,
            match leaf {
                0x8000_0005 => [0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140],
                0x8000_0006 => [0, 0x4200_4200, 0x0200_8140, 0x0080_8140],
                0x8000_0008 => [0x3028, 0, 0x1001, 0],
                0x8000_0021 => [0x4, 0, 0, 0],
                _ => [0; 4],
            },
        );
    }
    let mut msrs = Vec::new();
    for index in KNOWN_MSRS {
        // Translated guests have CPUID faulting (bit 31 of MSR_INTEL_PLATFORM_INFO).
        let value = if index == 0xce && translated {
            1_u64 << 31
        } else {
            0
        };
        msrs.extend_from_slice(&index.to_le_bytes());
        msrs.extend_from_slice(&0_u32.to_le_bytes());
        msrs.extend_from_slice(&value.to_le_bytes());
    }
    CpuPolicy { leaves, msrs }
}

/// All that the machine's processors can do, including features that a guest gets only on request.
pub(super) fn host_policy() -> CpuPolicy {
    let mut policy = default_policy(GuestKind::Hvm);
    for entry in policy.leaves.chunks_exact_mut(LEAF) {
        // The register, counted from eax, and the bits.
        let (register, bits) = match (word(entry, 0), word(entry, 4)) {
            // VMX; RDRAND is set already.
            (1, _) => (2, 1 << 5),
            // HLE, RTM and MPX.
            (7, 0) => (1, 1 << 4 | 1 << 11 | 1 << 14),
            // CMP_LEGACY and SVM.
            (0x8000_0001, _) => (2, 1 << 1 | 1 << 2),
            _ => continue,
        };
        let at = 8 + 4 * register;
        let value: u32 = word(entry, at) | bits;
        entry[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    policy
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::try_from(read_word(bytes, offset, 4)).unwrap_or(u32::MAX)
}

/// Largest subleaf of the leaves that have subleaves: caches, features, topology, extended state
/// (`CPUID_GUEST_NR_*` of Xen).
const fn subleaves(leaf: u32) -> Option<u32> {
    match leaf {
        4 => Some(5),
        7 => Some(2),
        0xb => Some(1),
        0xd => Some(62),
        _ => None,
    }
}

/// CPUID faulting, the one bit of MSR_INTEL_PLATFORM_INFO that a guest may see.
const CPUID_FAULTING: u64 = 1 << 31;

/// Whether the machine can offer `policy` to a guest of this kind. Like Xen, returns ERANGE for a
/// leaf or MSR that a policy cannot hold, EOVERFLOW for a value that is too large, or EINVAL for
/// one that the processor does not have, each with the entry at fault.
pub(super) fn check(
    kind: GuestKind,
    policy: &CpuPolicy,
) -> Result<(), (Errno, Option<PolicyEntry>)> {
    if !policy.leaves.len().is_multiple_of(LEAF) || !policy.msrs.len().is_multiple_of(MSR) {
        return Err((Errno::EINVAL, None));
    }
    let mut highest = [0; 3];
    for entry in policy.leaves.chunks_exact(LEAF) {
        let (leaf, subleaf, eax) = (word(entry, 0), word(entry, 4), word(entry, 8));
        let known = match leaf {
            0..=MAX_BASIC => match subleaves(leaf) {
                Some(most) => subleaf <= most,
                None => subleaf == NO_SUBLEAF,
            },
            0x4000_0000 | 0x4000_0100 | 0x8000_0000..=MAX_EXTENDED => subleaf == NO_SUBLEAF,
            _ => false,
        };
        if !known {
            let subleaf = Some(subleaf).filter(|subleaf| *subleaf != NO_SUBLEAF);
            return Err((Errno::ERANGE, Some(PolicyEntry::Leaf { leaf, subleaf })));
        }
        match (leaf, subleaf) {
            (0, _) => highest[0] = eax,
            (7, 0) => highest[1] = eax,
            (0x8000_0000, _) => highest[2] = eax,
            _ => {}
        }
    }
    let mut faulting = false;
    for msr in policy.msrs.chunks_exact(MSR) {
        let (index, flags) = (word(msr, 0), word(msr, 4));
        let value = u64::from(word(msr, 8)) | u64::from(word(msr, 12)) << 32;
        let errno = match index {
            _ if flags != 0 => Errno::EINVAL,
            _ if !KNOWN_MSRS.contains(&index) => Errno::ERANGE,
            // Xen keeps 32 bits of this MSR.
            0xce if value > u64::from(u32::MAX) => Errno::EOVERFLOW,
            0xce if value & !CPUID_FAULTING != 0 => Errno::EINVAL,
            0xce => {
                faulting = value != 0;
                continue;
            }
            _ => continue,
        };
        return Err((errno, Some(PolicyEntry::Msr(index))));
    }
    // Then the values that Xen compares with the largest policy for such a guest.
    let leaf = |leaf, subleaf| Some(PolicyEntry::Leaf { leaf, subleaf });
    for (highest, most, entry) in [
        (highest[0], MAX_BASIC, leaf(0, None)),
        (highest[1], MAX_FEATURES, leaf(7, Some(0))),
        (highest[2], MAX_EXTENDED, leaf(0x8000_0000, None)),
    ] {
        if highest > most {
            return Err((Errno::EINVAL, entry));
        }
    }
    match faulting && !kind.is_translated() {
        true => Err((Errno::EINVAL, Some(PolicyEntry::Msr(0xce)))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_takes_what_it_offers() {
        for kind in [GuestKind::Pv, GuestKind::Hvm, GuestKind::Pvh] {
            let policy = default_policy(kind);
            assert!(policy.leaves.len() / LEAF > 40);
            assert_eq!(check(kind, &policy), Ok(()));
        }
    }

    #[test]
    fn a_leaf_above_the_machine_is_refused() {
        let mut policy = default_policy(GuestKind::Hvm);
        policy.leaves[8] = 0x30;
        let leaf = PolicyEntry::Leaf {
            leaf: 0,
            subleaf: None,
        };
        let blamed = Err((Errno::EINVAL, Some(leaf)));
        assert_eq!(check(GuestKind::Hvm, &policy), blamed);
    }

    #[test]
    fn a_register_is_blamed_for_what_it_is() {
        let policy = |index: u32, flags: u32, value: u64| {
            let mut msrs = index.to_le_bytes().to_vec();
            msrs.extend(flags.to_le_bytes());
            msrs.extend(value.to_le_bytes());
            CpuPolicy {
                leaves: Vec::new(),
                msrs,
            }
        };
        for (index, flags, value, errno) in [
            (0xdead, 0, 0, Errno::ERANGE),
            (0xce, 1, 0, Errno::EINVAL),
            (0xce, 0, 1 << 40, Errno::EOVERFLOW),
            (0xce, 0, 1 << 31, Errno::EINVAL),
        ] {
            let refused = check(GuestKind::Pv, &policy(index, flags, value)).unwrap_err();
            assert_eq!(
                refused,
                (errno, Some(PolicyEntry::Msr(index))),
                "{value:#x}"
            );
        }
        assert_eq!(check(GuestKind::Pvh, &policy(0xce, 0, 1 << 31)), Ok(()));
    }
}
