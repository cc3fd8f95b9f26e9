//! The suite against the mock, on machines of different kinds.

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
    // And as another process would find it.
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
