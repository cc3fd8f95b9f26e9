//! Tests of plans, on facts that differ in one thing each.

use xsr_format::record::x86::CpuidLeaf;

use super::*;

const LEAF_7_EBX_AVX512F: u32 = 1 << 16;
const LEAF_7_ECX_PKU: u32 = 1 << 3;
const LEAF_1_ECX_VMX: u32 = 1 << 5;

fn policy(leaf_1_ecx: u32, leaf_7: [u32; 2]) -> CpuPolicy {
    let leaf = |leaf, subleaf, ebx, ecx| CpuidLeaf {
        leaf,
        subleaf,
        eax: 0,
        ebx,
        ecx,
        edx: 0,
    };
    CpuPolicy {
        leaves: vec![
            leaf(1, CpuPolicy::NO_SUBLEAF, 0, leaf_1_ecx),
            leaf(7, 0, leaf_7[0], leaf_7[1]),
        ],
        msrs: Vec::new(),
    }
}

fn everything() -> CpuPolicy {
    policy(LEAF_1_ECX_VMX, [LEAF_7_EBX_AVX512F, LEAF_7_ECX_PKU])
}

fn host() -> HostFacts {
    HostFacts {
        xen: XenVersion {
            major: 4,
            minor: 20,
        },
        physinfo: PhysInfo {
            total_pages: 1 << 20,
            free_pages: 1 << 18,
            outstanding_pages: 0,
            cpu_khz: 2_000_000,
            pv: true,
            hvm: true,
            hap: true,
            shadow: true,
        },
        pv: Some(policy(0, [LEAF_7_EBX_AVX512F, 0])),
        hvm: Some(everything()),
    }
}

fn needs() -> Needs {
    Needs {
        kind: GuestKind::Pvh,
        vcpus: 2,
        pages: 1 << 16,
        shadow_memory_kib: None,
        cpu: policy(0, [LEAF_7_EBX_AVX512F, LEAF_7_ECX_PKU]),
        tsc_khz: 2_000_000,
        tsc_native: false,
        xen: Some(XenVersion {
            major: 4,
            minor: 17,
        }),
        hap: None,
        nested: false,
        used_state: 0,
        activity: Activity::Saved,
    }
}

#[track_caller]
fn check(needs: &Needs, host: &HostFacts, subject: Subject) -> (Answer, String) {
    let checks = plan(needs, host);
    let others = checks.iter().filter(|check| check.subject != subject);
    for other in others {
        assert_eq!(other.answer, Answer::Yes, "{other:?}");
    }
    let mut of = checks.iter().filter(|check| check.subject == subject);
    let check = of.next().unwrap();
    assert!(of.next().is_none());
    (check.answer, check.text.clone())
}

#[test]
fn a_guest_fits_on_a_host_that_has_all() {
    for check in plan(&needs(), &host()) {
        assert_eq!(check.answer, Answer::Yes, "{check:?}");
        assert!(check.missing.is_empty());
    }
}

#[test]
fn a_feature_less_is_named() {
    let mut less = host();
    less.hvm = Some(policy(0, [0, LEAF_7_ECX_PKU]));
    let (answer, text) = check(&needs(), &less, Subject::Cpu);
    assert_eq!(answer, Answer::No);
    assert_eq!(text, "the guest has seen what the host lacks: AVX512F");
}

/// What Xen takes away from a guest whose page tables it shadows, by the host or by the
/// configuration; a PV guest has no HAP.
#[test]
fn shadow_paging_takes_features_away() {
    let mut shadow = host();
    shadow.physinfo.hap = false;
    let mut asked = needs();
    asked.hap = Some(false);
    for (needs, host) in [(needs(), shadow), (asked, host())] {
        let (answer, text) = check(&needs, &host, Subject::Cpu);
        assert_eq!(answer, Answer::No);
        assert!(
            text.ends_with("(shadow paging takes away what needs HAP): PKU"),
            "{text}"
        );
    }
    let mut pv = needs();
    pv.kind = GuestKind::Pv;
    pv.cpu = policy(0, [LEAF_7_EBX_AVX512F, 0]);
    let mut without = host();
    without.physinfo.hap = false;
    assert_eq!(check(&pv, &without, Subject::Cpu).0, Answer::Yes);
}

#[test]
fn vmx_is_for_nested_guests() {
    let mut guest = needs();
    guest.cpu = everything();
    let (answer, text) = check(&guest, &host(), Subject::Cpu);
    assert_eq!(answer, Answer::No);
    assert!(text.ends_with(": VMX"), "{text}");
    guest.nested = true;
    assert_eq!(check(&guest, &host(), Subject::Cpu).0, Answer::Yes);
}

#[test]
fn without_a_policy_nothing_is_known() {
    let mut old = needs();
    old.cpu = CpuPolicy::default();
    assert_eq!(check(&old, &host(), Subject::Cpu).0, Answer::Unknown);
    let mut silent = host();
    silent.hvm = None;
    assert_eq!(check(&needs(), &silent, Subject::Cpu).0, Answer::Unknown);
}

/// An image from before Xen 4.14 still says which state its vcpus have used.
#[test]
fn state_that_was_used_stands_in_for_a_policy() {
    let mut old = needs();
    old.cpu = CpuPolicy::default();
    // x87, SSE and AVX.
    old.used_state = 7;
    let (answer, text) = check(&old, &host(), Subject::Cpu);
    assert_eq!(answer, Answer::No);
    assert!(text.ends_with("lacks: the XSAVE state of AVX"), "{text}");
    let mut avx = host();
    let area = CpuidLeaf {
        leaf: 0xd,
        subleaf: 0,
        eax: 7,
        ebx: 0,
        ecx: 0,
        edx: 0,
    };
    avx.hvm.as_mut().unwrap().leaves.push(area);
    assert_eq!(check(&old, &avx, Subject::Cpu).0, Answer::Unknown);
}

#[test]
fn a_guest_that_cannot_be_suspended() {
    assert!(
        plan(&needs(), &host())
            .iter()
            .all(|check| check.subject != Subject::State)
    );
    for (activity, kind, expected) in [
        (Activity::Running, GuestKind::Pvh, Answer::Yes),
        (Activity::Paused, GuestKind::Pvh, Answer::No),
        (Activity::Paused, GuestKind::Hvm, Answer::Warning),
        (
            Activity::Down(ShutdownReason::Suspend),
            GuestKind::Pvh,
            Answer::No,
        ),
        (
            Activity::Down(ShutdownReason::Crash),
            GuestKind::Hvm,
            Answer::No,
        ),
        (Activity::Dying, GuestKind::Pvh, Answer::No),
    ] {
        let mut needs = needs();
        (needs.activity, needs.kind) = (activity, kind);
        let (answer, text) = check(&needs, &host(), Subject::State);
        assert_eq!(answer, expected, "{activity:?}: {text}");
    }
}

#[test]
fn a_host_without_the_guests_kind() {
    let mut host = host();
    host.physinfo.hvm = false;
    assert_eq!(check(&needs(), &host, Subject::Kind).0, Answer::No);
    host.physinfo.hvm = true;
    (host.physinfo.hap, host.physinfo.shadow) = (false, false);
    let mut plain = needs();
    plain.cpu = policy(0, [LEAF_7_EBX_AVX512F, 0]);
    let (answer, text) = check(&plain, &host, Subject::Kind);
    assert_eq!(answer, Answer::No);
    assert!(text.contains("neither HAP nor shadow"), "{text}");
    host.physinfo.shadow = true;
    assert_eq!(check(&plain, &host, Subject::Kind).0, Answer::Yes);
}

#[test]
fn more_vcpus_than_the_kind_can_have() {
    let mut many = needs();
    many.vcpus = 128;
    assert_eq!(check(&many, &host(), Subject::Vcpus).0, Answer::Yes);
    many.vcpus = 129;
    assert_eq!(check(&many, &host(), Subject::Vcpus).0, Answer::No);
}

#[test]
fn memory_with_what_xen_needs_and_what_is_claimed() {
    let needs = needs();
    // libxl: 4 KiB · (256 · 2 vcpus + 2 · 256 MiB), and 2 MiB.
    assert_eq!(needs.overhead_pages(), 1024 + 512);
    let all = needs.pages + needs.overhead_pages();
    let mut host = host();
    host.physinfo.free_pages = all;
    assert_eq!(check(&needs, &host, Subject::Memory).0, Answer::Yes);
    host.physinfo.free_pages = all - 1;
    let (answer, text) = check(&needs, &host, Subject::Memory);
    // libxl may take what is missing from the control domain.
    assert_eq!(answer, Answer::Warning);
    assert!(text.contains("needs 256 MiB and Xen 6 MiB"), "{text}");
    assert!(text.contains("only 261 MiB are free"), "{text}");
    let mut small = host.clone();
    small.physinfo.total_pages = all - 1;
    let (answer, text) = check(&needs, &small, Subject::Memory);
    assert_eq!(answer, Answer::No);
    assert!(text.contains("the host has only 261 MiB in all"), "{text}");
    (host.physinfo.free_pages, host.physinfo.outstanding_pages) = (all + 512, 512);
    let (answer, text) = check(&needs, &host, Subject::Memory);
    assert_eq!(answer, Answer::Yes);
    assert!(text.contains("2 MiB more are claimed"), "{text}");
    host.physinfo.outstanding_pages = 513;
    assert_eq!(check(&needs, &host, Subject::Memory).0, Answer::Warning);
    let mut pv = needs.clone();
    pv.kind = GuestKind::Pv;
    assert_eq!(pv.overhead_pages(), 512, "no tables");
    let mut set = needs;
    set.shadow_memory_kib = Some(4096);
    assert_eq!(set.overhead_pages(), 1024 + 512);
}

#[test]
fn another_clock() {
    let mut slow = host();
    slow.physinfo.cpu_khz = 1_900_000;
    let (answer, text) = check(&needs(), &slow, Subject::Tsc);
    assert_eq!(answer, Answer::Warning);
    assert!(text.contains("2000000 kHz, the host has 1900000"), "{text}");
    let mut native = needs();
    native.tsc_native = true;
    let (_, text) = check(&native, &slow, Subject::Tsc);
    assert!(text.contains("may run wrong"), "{text}");
    native.tsc_khz = 0;
    assert_eq!(check(&native, &slow, Subject::Tsc).0, Answer::Unknown);
}

#[test]
fn versions_of_xen() {
    let version = |minor| XenVersion { major: 4, minor };
    for (guest, host_minor, kind, expected) in [
        (Some(17), 20, GuestKind::Pvh, Answer::Yes),
        (Some(20), 20, GuestKind::Pvh, Answer::Yes),
        (Some(22), 20, GuestKind::Pvh, Answer::Warning),
        (Some(21), 22, GuestKind::Pvh, Answer::Yes),
        (Some(21), 22, GuestKind::Pv, Answer::Warning),
        (Some(17), 21, GuestKind::Pvh, Answer::Warning),
        (None, 20, GuestKind::Pvh, Answer::Unknown),
    ] {
        let mut needs = needs();
        (needs.xen, needs.kind) = (guest.map(version), kind);
        needs.cpu = policy(0, [LEAF_7_EBX_AVX512F, 0]);
        let mut host = host();
        host.xen = version(host_minor);
        let (answer, text) = check(&needs, &host, Subject::Xen);
        assert_eq!(answer, expected, "{guest:?} on {host_minor}: {text}");
    }
}
