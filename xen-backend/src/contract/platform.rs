//! Checks of the calls that PV and translated guests have in common.

use crate::Errno;

use super::kit::Guest;
use super::{Check, Violation, ensure, equal, fails};
use crate::{CpuPolicy, DomId, GuestKind, Host, RingGrant, TscInfo};
use xsr_format::cpu_policy::{CpuPolicy as Leaves, missing};
use xsr_format::fields::x86::Feature;
use xsr_format::frame::Gfn;

pub(super) const CHECKS: &[(&str, Check)] = &[
    (
        "a new domain has a policy that it can be given back",
        policy_round_trip,
    ),
    (
        "a new domain has no more of a CPU than the machine can give",
        policy_within_the_most,
    ),
    (
        "a feature that the machine cannot give is cleared",
        impossible_feature,
    ),
    ("what a domain takes of the memory is not free", physinfo),
    ("an empty half of a policy is left alone", half_policies),
    (
        "the host has a policy, with vendor and features",
        host_policy,
    ),
    ("a policy with half an entry is EINVAL", cut_policies),
    ("a policy beyond the machine is EINVAL", impossible_policy),
    ("a policy cannot change once a vcpu has run", late_policy),
    ("the TSC is what was set, one incarnation on", tsc),
    ("a TSC mode above 2 is EINVAL", bad_tsc),
    ("grants can be seeded", grants),
];

const KINDS: [GuestKind; 3] = [GuestKind::Pv, GuestKind::Hvm, GuestKind::Pvh];

fn policy_round_trip(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let guest = Guest::new(host, kind, 1, 1)?;
        let policy = guest.cpu_policy()?;
        ensure(
            !policy.leaves.is_empty() && policy.leaves.len().is_multiple_of(24),
            "leaves",
        )?;
        ensure(
            !policy.msrs.is_empty() && policy.msrs.len().is_multiple_of(16),
            "MSRs",
        )?;
        guest.set_cpu_policy(&policy)?;
        equal(&guest.cpu_policy()?, &policy, "policy")?;
    }
    Ok(())
}

fn physinfo(host: &dyn Host) -> Result<(), Violation> {
    const PAGES: u64 = 64;
    let before = host.physinfo()?;
    ensure(before.cpu_khz > 0, "the frequency of the TSC")?;
    ensure(before.pv || before.hvm, "guests of some kind")?;
    ensure(before.available_pages() <= before.free_pages, "claims")?;
    ensure(before.free_pages <= before.total_pages, "free pages")?;
    let (_guest, _) = Guest::with_pages(host, GuestKind::Pvh, PAGES)?;
    let after = host.physinfo()?;
    ensure(after.free_pages + PAGES <= before.free_pages, "the pages")?;
    equal(&after.total_pages, &before.total_pages, "all pages")
}

fn leaves_of(policy: &CpuPolicy) -> Result<Leaves, Violation> {
    let parsed = Leaves::parse(&policy.leaves, &policy.msrs);
    parsed.map_err(|error| Violation(format!("a policy that ends inside an entry: {error}")))
}

/// The check before a restore relies on this: an image from a host fits that host.
fn policy_within_the_most(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let guest = Guest::new(host, kind, 1, 1)?;
        let most = host.max_cpu_policy(kind)?;
        equal(&guest.max_cpu_policy()?, &most, "the most for the domain")?;
        let most = leaves_of(&most)?;
        ensure(!most.leaves.is_empty() && !most.msrs.is_empty(), "the most")?;
        let given = leaves_of(&guest.cpu_policy()?)?;
        let missing = missing(&given, &most);
        let missing: Vec<String> = missing.iter().map(|m| m.details().to_string()).collect();
        equal(
            &missing,
            &Vec::new(),
            "what a new domain has beyond the most",
        )?;
    }
    Ok(())
}

fn impossible_feature(host: &dyn Host) -> Result<(), Violation> {
    let sgx = Feature::named("sgx").ok_or_else(|| Violation("no name for SGX".to_owned()))?;
    for kind in KINDS {
        let guest = Guest::new(host, kind, 1, 1)?;
        let before = guest.cpu_policy()?;
        ensure(
            !leaves_of(&host.max_cpu_policy(kind)?)?.has(sgx),
            "no Xen gives SGX to a guest",
        )?;
        let mut asked = leaves_of(&before)?;
        let leaf = asked
            .leaves
            .iter_mut()
            .find(|l| (l.leaf, l.subleaf) == (7, 0));
        // Bit 2 of ebx. A processor without leaf 7 has no feature to request.
        let Some(leaf) = leaf else {
            continue;
        };
        leaf.ebx |= 1 << 2;
        let (leaves, msrs) = asked.encode();
        guest.set_cpu_policy(&CpuPolicy { leaves, msrs })?;
        equal(&guest.cpu_policy()?, &before, "policy")?;
    }
    Ok(())
}

fn half_policies(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pvh, 1, 1)?;
    let policy = guest.cpu_policy()?;
    guest.set_cpu_policy(&CpuPolicy::default())?;
    equal(&guest.cpu_policy()?, &policy, "policy")?;
    let leaves = CpuPolicy {
        leaves: policy.leaves.clone(),
        msrs: Vec::new(),
    };
    guest.set_cpu_policy(&leaves)?;
    equal(&guest.cpu_policy()?, &policy, "policy")
}

fn host_policy(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let policy = Guest::new(host, kind, 1, 1)?.host_cpu_policy()?;
        for leaf in [0_u32, 1] {
            let mut leaves = policy.leaves.chunks_exact(24);
            let found = leaves.any(|bytes| bytes.starts_with(&leaf.to_le_bytes()));
            ensure(found, "a leaf that every processor has")?;
        }
    }
    Ok(())
}

fn cut_policies(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 1)?;
    let policy = guest.cpu_policy()?;
    let mut leaves = policy.clone();
    leaves.leaves.pop();
    fails(guest.set_cpu_policy(&leaves), Errno::EINVAL, "leaves")?;
    let mut msrs = policy.clone();
    msrs.msrs.pop();
    fails(guest.set_cpu_policy(&msrs), Errno::EINVAL, "MSRs")?;
    equal(&guest.cpu_policy()?, &policy, "policy")
}

fn impossible_policy(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Hvm, 1, 1)?;
    let mut policy = guest.cpu_policy()?;
    // Leaf 0: the largest basic leaf.
    policy.leaves[8..12].copy_from_slice(&0x0fff_u32.to_le_bytes());
    fails(
        guest.set_cpu_policy(&policy),
        Errno::EINVAL,
        "a basic leaf 0xfff",
    )
}

fn late_policy(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pvh, 1, 1)?;
    let policy = guest.cpu_policy()?;
    guest.unpause()?;
    guest.pause()?;
    fails(
        guest.set_cpu_policy(&policy),
        Errno::EEXIST,
        "set_cpu_policy",
    )
}

fn tsc(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let guest = Guest::new(host, kind, 1, 1)?;
        let info = TscInfo {
            mode: 1,
            khz: 1_234_567,
            nsec: 1_000_000_000,
            incarnation: 6,
        };
        guest.set_tsc_info(&info)?;
        let got = guest.tsc_info()?;
        equal(
            &(got.mode, got.khz, got.incarnation),
            &(1, 1_234_567, 7),
            "mode, kHz, incarnation",
        )?;
        ensure(got.nsec >= info.nsec, "time goes forward")?;
        // Not emulated: there is no offset to report.
        guest.set_tsc_info(&TscInfo { mode: 2, ..info })?;
        let got = guest.tsc_info()?;
        equal(
            &(got.mode, got.khz, got.nsec),
            &(2, 0, 0),
            "mode, kHz, nanoseconds",
        )?;
        // This is allowed for a running domain.
        guest.unpause()?;
        guest.set_tsc_info(&TscInfo::default())?;
        ensure(
            guest.tsc_info()?.khz > 0,
            "the host's frequency where none is given",
        )?;
    }
    Ok(())
}

fn bad_tsc(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Hvm, 1, 1)?;
    for mode in [3, 4, u32::MAX] {
        let bad = TscInfo {
            mode,
            ..TscInfo::default()
        };
        fails(guest.set_tsc_info(&bad), Errno::EINVAL, "a mode above 2")?;
    }
    Ok(())
}

fn grants(host: &dyn Host) -> Result<(), Violation> {
    let (guest, gfns) = Guest::with_pages(host, GuestKind::Pvh, 2)?;
    let ring = |gfn: Option<Gfn>| RingGrant {
        gfn,
        backend: DomId(0),
    };
    guest.seed_grants(ring(Some(gfns[0])), ring(Some(gfns[1])))?;
    guest.seed_grants(ring(None), ring(None))?;
    let wide = guest.seed_grants(ring(Some(Gfn(1 << 32))), ring(None));
    fails(wide, Errno::EINVAL, "a frame beyond an entry")
}
