//! A domain goes out and comes back, on another host, with other frames: every page,
//! type and register is the same, but for what a restore itself rewrites.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::*;
use xsr_xen_backend::{GuestKind, Host};

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
