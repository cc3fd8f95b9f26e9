//! The contract suite run against the mock, on machines of different kinds.

use super::*;
use crate::mock::{HostConfig, MockHost};

fn small(max_run: u32) -> HostConfig {
    HostConfig {
        memory_pages: 1 << 15,
        max_run,
        ..HostConfig::default()
    }
}

fn assert_holds(host: &MockHost) {
    let free = host.free_pages();
    let report = run(host);
    let failures: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(report.checks, names().count());
    assert_eq!(host.free_pages(), free, "nothing is left behind");
}

fn assert_store_holds(store: &dyn crate::domain_store::DomainStore) {
    let report = run_domain_store(store, |_| true);
    let failures: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(report.checks, domain_store_names().count());
    assert!(
        store.list().expect("a list").is_empty(),
        "no domain is left behind"
    );
}

#[test]
fn the_mock_is_a_domain_store() {
    assert_store_holds(&MockHost::ephemeral(&small(32)).expect("a host"));
    let dir = tempfile::tempdir().expect("a directory");
    assert_store_holds(&MockHost::create(dir.path(), &small(32)).expect("a host"));
    assert_store_holds(&MockHost::open(dir.path()).expect("the host"));
}

#[test]
fn a_real_xen_is_a_domain_store_in_every_version_of_the_interface() {
    for minor in 14..=22 {
        let config = HostConfig {
            xen_version: crate::XenVersion { major: 4, minor },
            ..small(32)
        };
        let machine = MockHost::ephemeral(&config).expect("a host");
        assert_store_holds(&machine.as_xen().expect("a Xen"));
    }
}

#[test]
fn the_mock_in_memory_keeps_the_contract() {
    for max_run in [1, 32, 512] {
        assert_holds(&MockHost::ephemeral(&small(max_run)).expect("a host"));
    }
}

#[test]
fn the_mock_without_shadow_paging_keeps_the_contract() {
    let config = HostConfig {
        shadow_paging: false,
        ..small(32)
    };
    assert_holds(&MockHost::ephemeral(&config).expect("a host"));
}

#[test]
fn the_mock_in_a_directory_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("a directory");
    assert_holds(&MockHost::create(dir.path(), &small(32)).expect("a host"));
    // Also in the state that another process would find.
    assert_holds(&MockHost::open(dir.path()).expect("the host"));
}

#[test]
fn check_names_are_unique_within_their_family() {
    let mut names: Vec<&str> = names().collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}
