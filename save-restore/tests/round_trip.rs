//! A domain goes out and comes back, on another host, with other frames: every page,
//! type and register is the same, but for what a restore itself rewrites.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;

use common::*;
use xsr_format::frame::{PageType, Pfn};
use xsr_xen_backend::{GuestKind, Host};

/// Fields of start_info that the new host decides.
const START_INFO: &[&str] = &[
    "nr_pages",
    "shared_info",
    "flags",
    "store_mfn",
    "store_evtchn",
    "console.mfn",
    "console.evtchn",
];

/// Fields of shared_info that the new host decides, and where the guest publishes its
/// p2m anew.
const SHARED_INFO: &[&str] = &[
    "wc_version",
    "wc_sec",
    "wc_nsec",
    "wc_sec_hi",
    "arch.pfn_to_mfn_frame_list_list",
    "arch.p2m_cr3",
];

#[test]
fn a_domain_that_nothing_ran_saves_to_the_same_octets_twice() {
    let host = host(1);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let first = save_to_vec(&host, domid, &options(1)).unwrap();
        let second = save_to_vec(&host, domid, &options(1)).unwrap();
        assert!(first == second, "{}", spec.name);
    }
}

#[test]
fn octets_do_not_depend_on_the_number_of_threads() {
    let host = host(2);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let one = save_to_vec(&host, domid, &options(1)).unwrap();
        for threads in [2, 5, 16] {
            let many = save_to_vec(&host, domid, &options(threads)).unwrap();
            assert!(one == many, "{} with {threads} threads", spec.name);
        }
    }
}

#[test]
fn every_page_and_register_comes_back() {
    let (from, to) = (host(3), host(4));
    for spec in specs() {
        let domid = from.create_guest(&spec).unwrap();
        let out = save_to_vec(&from, domid, &options(2)).unwrap();
        let (restored, stats) = restore_from(&to, &out, spec.kind, spec.vcpus);
        if spec.kind.is_translated() {
            assert!(stats.superpages > 0, "{}", spec.name);
        }
        unpause(&to, restored);
        let back = save_to_vec(&to, restored, &options(2)).unwrap();
        assert_same_guest(&spec.name, &out, &back);
        // And out again from there: frames, p2m and pins of a restored guest are as
        // good as those of one that was made.
        let (third, _) = restore_from(&from, &back, spec.kind, spec.vcpus);
        unpause(&from, third);
        let again = save_to_vec(&from, third, &options(1)).unwrap();
        assert_same_guest(&spec.name, &back, &again);
        to.domain(restored).unwrap().destroy().unwrap();
    }
    assert_eq!(
        to.free_pages(),
        host(4).free_pages(),
        "nothing is left behind"
    );
}

/// Two streams hold the same guest, but for what a restore rewrites.
fn assert_same_guest(name: &str, a: &[u8], b: &[u8]) {
    let (a, b) = (take_apart(a), take_apart(b));
    assert_eq!(kinds(&a), kinds(&b), "{name}: records and their order");
    let rewritten: BTreeSet<Pfn> = a.p2m_frames.iter().copied().chain(a.rings()).collect();
    for (pfn, page) in &a.pages {
        let other = b.pages.get(pfn);
        // Beyond the last page with memory the new host lists nothing.
        if page.0 == PageType::XTAB && other.is_none() {
            continue;
        }
        let other = other.unwrap_or_else(|| panic!("{name}: pfn {pfn} is missing"));
        assert_eq!(page.0, other.0, "{name}: type of pfn {pfn}");
        if Some(*pfn) == a.start_info {
            let layout = a.start_info_layout();
            let [a, b] = [page.1, other.1].map(|page| page.unwrap().as_slice());
            assert_fields(name, layout, a, b, START_INFO);
        } else if !rewritten.contains(pfn) {
            assert!(page.1 == other.1, "{name}: contents of pfn {pfn}");
        }
    }
    assert!(
        b.pages.keys().all(|pfn| a.pages.contains_key(pfn)),
        "{name}"
    );
    for ((kind, a_body), (_, b_body)) in a.records.iter().zip(&b.records) {
        match kind.name() {
            Some("SHARED_INFO") => {
                assert_fields(name, a.shared_info_layout(), a_body, b_body, SHARED_INFO);
            }
            // Xen counts migrations: u32 at 16.
            Some("X86_TSC_INFO") => {
                assert_eq!(a_body[..16], b_body[..16], "{name}");
                let count = |body: &[u8]| u32::from_le_bytes(body[16..20].try_into().unwrap());
                assert_eq!(count(a_body) + 1, count(b_body), "{name}");
            }
            // The pfn of start_info and of every table is the same.
            _ => assert!(a_body == b_body, "{name}: {kind}"),
        }
    }
}

fn assert_fields(
    name: &str,
    layout: &xsr_format::fields::Layout,
    a: &[u8],
    b: &[u8],
    rewritten: &[&str],
) {
    for difference in xsr_format::fields::diff(layout, a, b) {
        let text = difference.to_string();
        assert!(
            rewritten.iter().any(|field| text.contains(field)),
            "{name}: {}: {text}",
            layout.name
        );
    }
}

#[test]
fn a_guest_kind_that_does_not_fit_is_refused() {
    let host = host(5);
    let specs = specs();
    let pv = host.create_guest(&specs[0]).unwrap();
    let stream = save_to_vec(&host, pv, &options(1)).unwrap();
    let shape = (GuestKind::Pvh, 1, 10_000);
    let (_, result) = restore_stream(&host, shape, xsr_save_restore::source::CopySource(&*stream));
    let error = result.unwrap_err().to_string();
    assert!(error.contains("x86 PV"), "{error}");
}
