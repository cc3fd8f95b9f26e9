//! Checks for translated guests.

use crate::Errno;

use super::kit::{Guest, hvm_context};
use super::{Check, Violation, ensure, equal, fails};
use crate::{Domain, GuestKind, Host};

pub(super) const CHECKS: &[(&str, Check)] = &[
    ("a PV guest has nothing of HVM", not_hvm),
    (
        "an HVM context comes back with the records it had",
        round_trip,
    ),
    (
        "a context cut short, without header or with a strange record is EINVAL",
        bad_contexts,
    ),
    ("parameters keep what they are set to", params),
    (
        "parameters that do not exist or are out of range are EINVAL",
        bad_params,
    ),
    ("parameters that may be set once are EEXIST after", set_once),
];

fn not_hvm(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 1)?;
    ensure(Domain::hvm(&*guest).is_none(), "its role is not HVM")?;
    ensure(Domain::pv(&*guest).is_some(), "its role is PV")
}

/// The types of a context's records.
fn kinds(context: &[u8]) -> Option<Vec<u16>> {
    let mut kinds = Vec::new();
    let mut rest = context;
    loop {
        let (descriptor, after) = rest.split_first_chunk::<8>()?;
        let [k0, k1, _, _, l0, l1, l2, l3] = *descriptor;
        kinds.push(u16::from_le_bytes([k0, k1]));
        if kinds.last() == Some(&0) {
            return Some(kinds);
        }
        let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
        rest = after.get(len..)?;
    }
}

fn round_trip(host: &dyn Host) -> Result<(), Violation> {
    for kind in [GuestKind::Hvm, GuestKind::Pvh] {
        let guest = Guest::new(host, kind, 2, 16)?;
        let fresh = kinds(&guest.hvm()?.hvm_context()?);
        ensure(
            fresh.is_some_and(|kinds| kinds[0] == 1),
            "a new guest's context begins with a header",
        )?;
        guest.hvm()?.set_hvm_context(&hvm_context())?;
        let context = guest.hvm()?.hvm_context()?;
        guest.hvm()?.set_hvm_context(&context)?;
        // Its clocks and timers advance, so only the record types are compared.
        equal(
            &kinds(&guest.hvm()?.hvm_context()?),
            &kinds(&context),
            "records",
        )?;
        ensure(
            kinds(&context).is_some_and(|kinds| kinds.contains(&2)),
            "it has a vcpu",
        )?;
        equal(
            &(guest.vcpu_online(0)?, guest.vcpu_online(1)?),
            &(true, false),
            "online",
        )?;
    }
    Ok(())
}

fn bad_contexts(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pvh, 1, 16)?;
    let good = hvm_context();
    let change = |at: usize, value: u8| {
        let mut context = good.clone();
        context[at] = value;
        context
    };
    let bad = [
        ("empty", Vec::new()),
        ("without the end", good[..good.len() - 8].to_vec()),
        ("cut in a record", good[..100].to_vec()),
        ("without a header", good[32..].to_vec()),
        ("with another magic", change(8, 0)),
        ("of another version", change(12, 9)),
        ("with a record of unknown type", change(32, 99)),
        ("with a vcpu too many", change(34, 7)),
        ("with a record that is too long", change(36, 0x10)),
    ];
    let before = guest.hvm()?.hvm_context()?;
    for (what, context) in bad {
        match guest.hvm()?.set_hvm_context(&context) {
            // An implementation may distinguish incomplete from malformed.
            Err(error) if error.errno == Errno::ENODATA => {}
            set => fails(set, Errno::EINVAL, what)?,
        }
    }
    equal(
        &kinds(&guest.hvm()?.hvm_context()?),
        &kinds(&before),
        "records",
    )
}

/// HVM_PARAM_STORE_PFN.
const STORE_PFN: u32 = 1;
/// HVM_PARAM_IOREQ_PFN.
const IOREQ_PFN: u32 = 5;

fn params(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Hvm, 1, 16)?;
    equal(
        &guest.hvm()?.hvm_param(STORE_PFN)?,
        &0,
        "a parameter never set",
    )?;
    for value in [0xf_effc, 7, 0] {
        guest.hvm()?.set_hvm_param(STORE_PFN, value)?;
        equal(&guest.hvm()?.hvm_param(STORE_PFN)?, &value, "a parameter")?;
    }
    Ok(())
}

fn bad_params(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Hvm, 1, 16)?;
    for index in [1000, u32::MAX] {
        fails(
            guest.hvm()?.hvm_param(index),
            Errno::EINVAL,
            "no such parameter",
        )?;
        fails(
            guest.hvm()?.set_hvm_param(index, 1),
            Errno::EINVAL,
            "no such parameter",
        )?;
    }
    // HVM_PARAM_TIMER_MODE, X87_FIP_WIDTH, NR_IOREQ_SERVER_PAGES.
    for (index, value) in [(10, 4), (36, 3), (33, 0)] {
        fails(
            guest.hvm()?.set_hvm_param(index, value),
            Errno::EINVAL,
            "out of range",
        )?;
    }
    Ok(())
}

fn set_once(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Hvm, 1, 16)?;
    guest.hvm()?.set_hvm_param(IOREQ_PFN, 0xf_effd)?;
    guest.hvm()?.set_hvm_param(IOREQ_PFN, 0xf_effd)?;
    fails(
        guest.hvm()?.set_hvm_param(IOREQ_PFN, 0xf_effe),
        Errno::EEXIST,
        "another value",
    )?;
    equal(
        &guest.hvm()?.hvm_param(IOREQ_PFN)?,
        &0xf_effd,
        "a parameter",
    )
}
