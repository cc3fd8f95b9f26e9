//! Tests of what counts as missing, one for each rule, with ideas from Xen's own
//! `tools/tests/cpu-policy/test-cpu-policy.c`.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test fails by panicking"
)]

use proptest::prelude::*;

use super::*;

const NO_SUBLEAF: u32 = CpuPolicy::NO_SUBLEAF;
/// In the order of leaf 0: EBX, ECX, EDX.
const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];

/// A policy with these leaves: number, subleaf, registers.
fn policy(leaves: &[(u32, u32, [u32; 4])]) -> CpuPolicy {
    let leaves = leaves.iter();
    CpuPolicy {
        leaves: leaves
            .map(|(leaf, subleaf, [eax, ebx, ecx, edx])| CpuidLeaf {
                leaf: *leaf,
                subleaf: *subleaf,
                eax: *eax,
                ebx: *ebx,
                ecx: *ecx,
                edx: *edx,
            })
            .collect(),
        msrs: Vec::new(),
    }
}

fn of_vendor([ebx, ecx, edx]: [u32; 3]) -> CpuPolicy {
    policy(&[(0, NO_SUBLEAF, [0xd, ebx, ecx, edx])])
}

fn with_msr(index: u32, value: u64) -> CpuPolicy {
    CpuPolicy {
        leaves: Vec::new(),
        msrs: vec![MsrEntry {
            index,
            flags: 0,
            value,
        }],
    }
}

fn names(image: &CpuPolicy, host: &CpuPolicy) -> Vec<String> {
    missing(image, host)
        .iter()
        .map(ToString::to_string)
        .collect()
}

/// A policy with this feature only.
fn only(feature: Feature) -> CpuPolicy {
    match feature.word {
        FeatureWord::Msr { index } => with_msr(index, 1 << feature.bit),
        FeatureWord::Cpuid {
            leaf,
            subleaf,
            register,
        } => {
            let mut registers = [0; 4];
            registers[register as usize] = 1 << feature.bit;
            policy(&[(leaf, subleaf, registers)])
        }
    }
}

#[test]
fn nothing_is_missing_where_both_have_the_same() {
    for host in [of_vendor(AMD), of_vendor(INTEL), with_msr(0x10a, 1)] {
        assert_eq!(missing(&host, &host), []);
    }
    // "Both unknown."
    let unknown = of_vendor([AMD[0] + 1, AMD[1], AMD[2]]);
    assert_eq!(missing(&unknown, &unknown), []);
}

#[test]
fn another_vendor_is_named() {
    assert_eq!(
        names(&of_vendor(AMD), &of_vendor(INTEL)),
        ["a processor of AuthenticAMD (this one is of GenuineIntel)"]
    );
    let unknown = of_vendor([AMD[0] + 1, AMD[1], AMD[2]]);
    assert_eq!(missing(&unknown, &of_vendor(AMD)).len(), 1);
    // Terminal escapes are not passed on.
    let odd = of_vendor([0x6d33_5b1b, 0, 0]);
    let text = names(&odd, &of_vendor(AMD)).concat();
    assert!(text.starts_with(r"a processor of \x1b[3m"), "{text}");
    // An image without a policy does not name a vendor.
    assert_eq!(missing(&CpuPolicy::default(), &of_vendor(AMD)), []);
}

#[test]
fn a_feature_less_is_named_with_its_place_and_both_values() {
    let image = policy(&[(7, 0, [2, 0x0001_0020, 0, 0])]);
    let host = policy(&[(7, 0, [0, 0x0000_0020, 0, 0])]);
    let all = missing(&image, &host);
    let [lost] = all.as_slice() else {
        panic!("{all:?}");
    };
    assert_eq!(
        *lost,
        Missing::Feature {
            feature: Feature::named("avx512f").unwrap(),
            image: 0x0001_0020,
            host: 0x20,
        }
    );
    assert_eq!(lost.to_string(), "AVX512F");
    assert_eq!(
        lost.details().to_string(),
        "AVX512F (bit 16 of CPUID leaf 0x7 ebx: 0x00010020 in the image, 0x00000020 here)"
    );
    // An additional feature is not a loss.
    assert_eq!(missing(&host, &image), []);
}

/// Each named feature is missing where a host lacks it, except those that the rules exclude.
#[test]
fn every_feature_is_missing_or_harmless() {
    let mut harmless = Vec::new();
    for word in FeatureWord::all() {
        for bit in 0..64 {
            let feature = Feature { word, bit };
            let Some(name) = feature.name() else {
                continue;
            };
            match names(&only(feature), &CpuPolicy::default()).as_slice() {
                [] => harmless.push(name),
                [lost] => assert_eq!(*lost, feature.to_string()),
                more => panic!("{name}: {more:?}"),
            }
        }
    }
    // In the order of the words.
    assert_eq!(
        harmless,
        [
            "apic",
            "htt",
            "x2apic",
            "osxsave",
            "hypervisor",
            "fdp-excp-only",
            "erms",
            "no-fpu-sel",
            "ospke",
            "md-clear",
            "cmp-legacy",
            "no-lmsl",
            "fs-gs-ns",
            "verw-clear",
            "rsba",
            "fb-clear",
            "rrsba",
            "rfds-clear",
        ]
    );
}

#[test]
fn a_feature_without_a_name_is_named_by_its_place() {
    let image = policy(&[(7, 1, [1 << 31, 0, 1 << 9, 0])]);
    assert_eq!(
        names(&image, &CpuPolicy::default()),
        [
            "bit 31 of CPUID leaf 0x7 subleaf 1 eax",
            "bit 9 of CPUID leaf 0x7 subleaf 1 ecx"
        ]
    );
}

/// Xen creates AMD's copies of leaf 1; a host's largest policy does not have them.
#[test]
fn the_copies_of_leaf_1_are_no_features() {
    let image = policy(&[(0x8000_0001, NO_SUBLEAF, [0, 0, 0, 0x2193_fbff])]);
    let host = policy(&[(0x8000_0001, NO_SUBLEAF, [0, 0, 0, 0x2010_0800])]);
    assert_eq!(missing(&image, &host), []);
}

#[test]
fn what_xen_derives_is_no_difference() {
    let image = policy(&[
        (0, NO_SUBLEAF, [0x16, AMD[0], AMD[1], AMD[2]]),
        // Family, APIC id, logical processors, cache line.
        (1, NO_SUBLEAF, [0x0083_0f10, 0x0704_1000, 0, 0]),
        (4, 0, [0x121, 0x01c0_003f, 0x3f, 0]),
        (7, 0, [2, 0, 0, 0]),
        (0xb, 0, [1, 2, 0x100, 7]),
        // Size of the area.
        (0xd, 0, [3, 0x240, 0x240, 0]),
        (0x4000_0000, NO_SUBLEAF, [5, 0, 0, 0]),
        (
            0x8000_0000,
            NO_SUBLEAF,
            [0x8000_0021, AMD[0], AMD[1], AMD[2]],
        ),
        (0x8000_0002, NO_SUBLEAF, [0x2044_4d41, 0, 0, 0]),
        // 48 bits of physical addresses, cores.
        (0x8000_0008, NO_SUBLEAF, [0x3030, 0, 0x7007, 0]),
        (0x8000_000a, NO_SUBLEAF, [1, 8, 0, 0x1f]),
        (0x8000_001e, NO_SUBLEAF, [7, 0x103, 0, 0]),
    ]);
    let host = policy(&[
        (0, NO_SUBLEAF, [7, AMD[0], AMD[1], AMD[2]]),
        (1, NO_SUBLEAF, [0x0060_0fb1, 0x0000_0800, 0, 0]),
        (0xd, 0, [3, 0, 0x240, 0]),
        (
            0x8000_0000,
            NO_SUBLEAF,
            [0x8000_0008, AMD[0], AMD[1], AMD[2]],
        ),
        (0x8000_0008, NO_SUBLEAF, [0x3028, 0, 0, 0]),
    ]);
    assert_eq!(missing(&image, &host), []);
}

/// RTM_ALWAYS_ABORT promises that XBEGIN does not fault.
#[test]
fn transactions_stand_in_for_their_absence() {
    let image = only(Feature::named("rtm-always-abort").unwrap());
    let host = only(Feature::named("rtm").unwrap());
    assert_eq!(missing(&image, &host), []);
    assert_eq!(names(&image, &CpuPolicy::default()), ["RTM_ALWAYS_ABORT"]);
    // Not in the other direction: transactions that always abort do not replace RTM.
    assert_eq!(names(&host, &image), ["RTM"]);
}

#[test]
fn msrs_are_compared_by_bits() {
    // "Host CPUID faulting, guest not", "wanted", and "host no CPUID faulting, guest wanted".
    let faulting = with_msr(0xce, 1 << 31);
    let none = with_msr(0xce, 0);
    assert_eq!(missing(&none, &faulting), []);
    assert_eq!(missing(&faulting, &faulting), []);
    assert_eq!(names(&faulting, &none), ["CPUID_FAULTING"]);
    // A guest that was told that it is safe does not protect itself.
    let safe = with_msr(0x10a, 1 | 1 << 5 | 1 << 62 | 1 << 63 | 1 << 2);
    assert_eq!(
        names(&safe, &with_msr(0x10a, 1)),
        ["MDS_NO", "ITS_NO", "bit 63 of MSR 0x10a"]
    );
}

/// A guest with AVX and, at this offset, PKRU.
fn with_pkru(offset: u32) -> CpuPolicy {
    policy(&[
        (1, NO_SUBLEAF, [0, 0, 1 << 28 | 1 << 26, 0]),
        (7, 0, [0, 0, 1 << 3, 0]),
        (0xd, 0, [0x207, 0, offset + 8, 0]),
        (0xd, 1, [0, 0, 0, 0]),
        (0xd, 2, [0x100, 0x240, 0, 0]),
        (0xd, 9, [8, offset, 0, 0]),
    ])
}

#[test]
fn state_that_is_elsewhere_in_the_area_is_told() {
    let (intel, amd) = (with_pkru(0xa80), with_pkru(0x340));
    assert_eq!(missing(&intel, &intel), []);
    assert_eq!(
        names(&intel, &amd),
        ["the XSAVE state of PKU (8 bytes at 0xa80, here 8 bytes at 0x340)"]
    );
    // If the feature is missing, its state is not reported as well.
    let mut without = amd.clone();
    without
        .leaves
        .retain(|leaf| leaf.leaf != 7 && leaf.subleaf != 9);
    without.leaves[1].eax = 7;
    assert_eq!(names(&intel, &without), ["PKU"]);
    // A component without a feature.
    let unknown = policy(&[(0xd, 0, [3, 0, 0, 1]), (0xd, 32, [64, 0xb00, 0, 0])]);
    assert_eq!(
        names(&unknown, &CpuPolicy::default()),
        ["XSAVE state component 32 (64 bytes at 0xb00)"]
    );
}

#[test]
fn performance_monitoring_that_is_off_is_told() {
    let version = |version: u32| policy(&[(0xa, NO_SUBLEAF, [0x0730_0400 | version, 0, 0, 0x603])]);
    assert_eq!(missing(&version(2), &version(4)), []);
    assert_eq!(
        names(&version(4), &version(2)),
        ["performance monitoring version 4 (here 2)"]
    );
    assert_eq!(
        names(&version(2), &CpuPolicy::default()),
        ["performance monitoring version 2"]
    );
}

/// If a leaf occurs twice, Xen takes the last, and so must the comparison.
#[test]
fn the_last_of_two_leaves_counts() {
    let with = (7, 0, [0, 1 << 5, 0, 0]);
    let without = (7, 0, [0, 0, 0, 0]);
    let host = CpuPolicy::default();
    assert_eq!(names(&policy(&[without, with]), &host), ["AVX2"]);
    assert_eq!(missing(&policy(&[with, without]), &host), []);
}

#[test]
fn a_policy_of_half_an_entry_is_none() {
    let leaf = CpuidLeaf {
        leaf: 7,
        subleaf: 0,
        eax: 0,
        ebx: 1 << 5,
        ecx: 0,
        edx: 0,
    };
    let msr = MsrEntry {
        index: 0x10a,
        flags: 0,
        value: 1,
    };
    let (leaves, msrs) = (
        leaf.encode(ByteOrder::Little),
        msr.encode(ByteOrder::Little),
    );
    let parsed = CpuPolicy::parse(&leaves, &msrs).unwrap();
    assert_eq!(parsed.encode(), (leaves.to_vec(), msrs.to_vec()));
    assert_eq!((parsed.leaves, parsed.msrs), (vec![leaf], vec![msr]));
    assert!(CpuPolicy::parse(&leaves[1..], &msrs).is_err());
    assert!(CpuPolicy::parse(&leaves, &msrs[1..]).is_err());
    // An absent half is empty.
    assert_eq!(CpuPolicy::parse(&[], &[]), Ok(CpuPolicy::default()));
}

fn any_leaf() -> impl Strategy<Value = CpuidLeaf> {
    let number = prop_oneof![
        prop::sample::select(vec![
            0,
            1,
            7,
            0xa,
            0xd,
            0x8000_0001,
            0x8000_0008,
            0x8000_0021
        ]),
        any::<u32>(),
    ];
    let subleaf = prop_oneof![Just(NO_SUBLEAF), 0..70_u32, any::<u32>()];
    let registers = any::<[u32; 4]>();
    (number, subleaf, registers).prop_map(|(leaf, subleaf, [eax, ebx, ecx, edx])| CpuidLeaf {
        leaf,
        subleaf,
        eax,
        ebx,
        ecx,
        edx,
    })
}

fn any_policy() -> impl Strategy<Value = CpuPolicy> {
    let msr = (prop::sample::select(vec![0xce, 0x10a, 0x140]), any::<u64>());
    let msr = msr.prop_map(|(index, value)| MsrEntry {
        index,
        flags: 0,
        value,
    });
    let parts = (
        prop::collection::vec(any_leaf(), 0..40),
        prop::collection::vec(msr, 0..4),
    );
    parts.prop_map(|(leaves, msrs)| CpuPolicy { leaves, msrs })
}

proptest! {
    /// For any bytes from a sender: no panic, and a host with the same policy lacks nothing.
    #[test]
    fn any_policy_lacks_nothing_of_itself(image in any_policy(), host in any_policy()) {
        prop_assert_eq!(missing(&image, &image), []);
        for one in missing(&image, &host) {
            // Both texts can be displayed: the short one, and the one for the log.
            prop_assert!(one.details().to_string().starts_with(&one.to_string()));
        }
    }
}

fn with(features: &[&str]) -> CpuPolicy {
    let mut policy = CpuPolicy::default();
    for name in features {
        let feature = Feature::named(name).unwrap();
        match feature.word {
            FeatureWord::Cpuid {
                leaf,
                subleaf,
                register,
            } => {
                let bit = 1 << feature.bit;
                let only = |this: Register| if this == register { bit } else { 0 };
                policy.leaves.push(CpuidLeaf {
                    leaf,
                    subleaf: if leaf == 7 { subleaf } else { NO_SUBLEAF },
                    eax: only(Register::Eax),
                    ebx: only(Register::Ebx),
                    ecx: only(Register::Ecx),
                    edx: only(Register::Edx),
                });
            }
            FeatureWord::Msr { index } => policy.msrs.push(MsrEntry {
                index,
                flags: 0,
                value: 1 << feature.bit,
            }),
        }
    }
    policy
}

#[test]
fn a_level_hides_what_not_all_hosts_have() {
    let hosts = [
        with(&["avx2", "pcid", "rdcl-no"]),
        with(&["avx2", "sse4-2"]),
        with(&["avx2"]),
    ];
    // The last entry of a number counts, so each policy has one feature per leaf.
    let hidden = level(&hosts).unwrap();
    let names: Vec<_> = hidden.hidden.iter().filter_map(|f| f.name()).collect();
    assert_eq!(names, ["pcid", "sse4-2", "rdcl-no"]);
    assert_eq!(hidden.beyond_cpuid(), ["RDCL_NO"]);
    // Bits 17 and 20 of leaf 1's ecx.
    assert_eq!(
        hidden.to_string(),
        r#"cpuid=["0x1:ecx=xxxxxxxxxxx0xx0xxxxxxxxxxxxxxxxx"]"#
    );
    let avx512 = level(&[with(&["avx512f"]), with(&[])]).unwrap();
    assert_eq!(
        avx512.registers(),
        ["0x7,0:ebx=xxxxxxxxxxxxxxx0xxxxxxxxxxxxxxxx"]
    );
    assert_eq!(level(&[with(&["avx512f"])]).unwrap(), Level::default());
    assert_eq!(level(&[]).unwrap(), Level::default());
}

/// What a level leaves is what each of its hosts can give.
#[test]
fn a_guest_of_the_level_misses_nothing() {
    let hosts = [with(&["avx2", "pcid"]), with(&["avx512f", "sse4-2"])];
    let level = level(&hosts).unwrap();
    for host in &hosts {
        let mut guest = host.clone();
        assert!(hosts.iter().any(|other| !missing(&guest, other).is_empty()));
        guest.remove(&level.hidden);
        for other in &hosts {
            assert_eq!(missing(&guest, other), []);
        }
    }
}

/// Zen 3 and Zen 4 have PKU both, and keep its state at different places.
#[test]
fn a_level_hides_features_whose_state_is_elsewhere() {
    let hosts = [with_pkru(0x340), with_pkru(0x980)];
    let level = level(&hosts).unwrap();
    assert_eq!(level.hidden, [Feature::named("pku").unwrap()]);
    assert!(level.components.is_empty(), "{:?}", level.components);
    assert_eq!(
        level.registers(),
        ["0x7,0:ecx=xxxxxxxxxxxxxxxxxxxxxxxxxxxx0xxx"]
    );
    for host in &hosts {
        let mut guest = host.clone();
        guest.remove(&level.hidden);
        for other in &hosts {
            assert_eq!(missing(&guest, other), []);
        }
    }
}

/// A component stays while one of the features that need it does.
#[test]
fn removing_a_feature_removes_its_state() {
    let mut policy = with_pkru(0x980);
    policy.remove(&[Feature::named("avx2").unwrap()]);
    assert_eq!(policy.leaves[2].eax, 0x207);
    policy.remove(&[Feature::named("pku").unwrap()]);
    assert_eq!(policy.leaves[2].eax, 7);
    policy.remove(&[Feature::named("avx").unwrap()]);
    assert_eq!(policy.leaves[2].eax, 3);
}

#[test]
fn state_without_a_feature_cannot_be_hidden() {
    let unknown = policy(&[(0xd, 0, [3, 0, 0, 1]), (0xd, 32, [64, 0xb00, 0, 0])]);
    let level = level(&[unknown.clone(), CpuPolicy::default()]).unwrap();
    assert_eq!((&*level.hidden, &*level.components), (&[][..], &[32][..]));
    assert_eq!(level.beyond_cpuid(), ["XSAVE state component 32"]);
    assert_eq!(
        super::level(&[unknown.clone(), unknown]).unwrap(),
        Level::default()
    );
}

#[test]
fn a_level_sets_the_lowest_version_of_performance_monitoring() {
    let version = |version: u32| policy(&[(0xa, NO_SUBLEAF, [0x0730_0400 | version, 0, 0, 0x603])]);
    let level = level(&[version(5), version(2), version(4)]).unwrap();
    assert_eq!(level.monitoring, Some(2));
    assert_eq!(
        level.registers(),
        ["0xa:eax=xxxxxxxxxxxxxxxxxxxxxxxx00000010"]
    );
    assert_eq!(
        super::level(&[version(2), version(2)]).unwrap(),
        Level::default()
    );
}

#[test]
fn hosts_of_two_vendors_have_no_level() {
    let vendor = |ebx, edx, ecx| CpuPolicy {
        leaves: vec![CpuidLeaf {
            leaf: 0,
            subleaf: NO_SUBLEAF,
            eax: 0,
            ebx,
            ecx,
            edx,
        }],
        msrs: Vec::new(),
    };
    let intel = vendor(0x756e_6547, 0x4965_6e69, 0x6c65_746e);
    let amd = vendor(0x6874_7541, 0x6974_6e65, 0x444d_4163);
    let error = level(&[intel.clone(), amd]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "one host's processor is of GenuineIntel, another's of AuthenticAMD: no guest moves \
         between them"
    );
    assert!(level(&[intel.clone(), intel]).is_ok());
}
