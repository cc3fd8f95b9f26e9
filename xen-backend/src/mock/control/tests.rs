//! Tests of the control socket: requests from another process to the one that has the host open.

use super::super::{DomainState, GuestSpec, HostConfig};
use super::*;
use crate::GuestKind;

#[test]
fn a_host_that_is_open_elsewhere_answers() {
    let scratch = tempfile::tempdir().expect("a directory");
    let dir = scratch.path().join("a".repeat(100));
    let config = HostConfig {
        memory_pages: 1 << 13,
        ..HostConfig::default()
    };
    let host = MockHost::create(&dir, &config).expect("a host");
    let domid = host
        .create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))
        .expect("a guest");
    let domain = host.domain(domid).expect("the domain");
    // The lock belongs to the open file, so a second open in this process acts as another process.
    let beside = MockHost::reach(&dir).expect("reached");
    assert!(beside.here().is_none());
    assert_eq!(beside.list().expect("a list"), host.list());
    assert_eq!(beside.show("web").expect("a report").summary.domid, domid);
    beside.pause("1").expect("paused");
    assert!(domain.info().expect("there").paused);
    beside.unpause("web").expect("unpaused");
    beside.userdata_store("web", "k", b"v").expect("kept");
    assert_eq!(
        beside.userdata_get("web", "k").expect("asked"),
        Some(b"v".to_vec())
    );
    domain.suspend().expect("suspended");
    beside.resume("web").expect("resumed");
    beside.rename("web", "www").expect("renamed");
    let refused = beside.resume("www").expect_err("it runs").to_string();
    assert!(refused.contains("EINVAL"), "{refused}");
    let refused = beside.pause("web").expect_err("gone").to_string();
    assert!(refused.contains("no domain"), "{refused}");
    assert_eq!(host.list()[0].state, DomainState::Running);
    let spec = GuestSpec::new("mail", GuestKind::Pv, 8);
    let userdata = [("k".to_owned(), b"v".to_vec())];
    let work = WorkloadSpec::writes(1, 100, 16);
    let made = beside.create_guest(&spec, Some(&work), &userdata);
    let made = made.expect("made");
    assert_eq!(host.find("mail").expect("there"), made);
    assert_eq!(
        host.userdata_get(made, "k").expect("asked"),
        Some(b"v".to_vec())
    );
    let taken = beside.create_guest(&spec, None, &userdata);
    let taken = taken.expect_err("taken").to_string();
    assert!(taken.contains("exists already"), "{taken}");
    beside.try_workload("mail", &work).expect("it can");
    beside.destroy("mail").expect("destroyed");
    beside.destroy("www").expect("destroyed");
    assert_eq!(domain.info().expect_err("gone").errno, Errno::ESRCH);
    drop((host, domain));
    assert!(!dir.join(SOCKET).exists());
    assert!(MockHost::reach(&dir).expect("opened").here().is_some());
}

/// The process that has the host open ends between the connection and the request.
#[test]
fn a_request_that_was_not_heard_is_made_again() {
    let scratch = tempfile::tempdir().expect("a directory");
    let dir = scratch.path().join("host");
    let config = HostConfig {
        memory_pages: 1 << 13,
        ..HostConfig::default()
    };
    let host = MockHost::create(&dir, &config).expect("a host");
    let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
    host.create_guest(&spec).expect("a guest");
    let beside = MockHost::reach(&dir).expect("reached");
    let listed = beside.list().expect("a list");
    // Simulates a process that answers no more requests and closes its connections.
    let held = ANSWERING.write().unwrap_or_else(PoisonError::into_inner);
    let asking = thread::spawn(move || beside.list());
    while Arc::weak_count(&host.machine) < 2 {
        thread::yield_now();
    }
    drop(host);
    drop(held);
    let again = asking.join().expect("no panic").expect("a list");
    assert_eq!(again, listed);
}

#[test]
fn a_host_whose_owner_was_killed_is_opened() {
    let scratch = tempfile::tempdir().expect("a directory");
    let dir = scratch.path().join("host");
    let config = HostConfig {
        memory_pages: 1 << 13,
        ..HostConfig::default()
    };
    drop(MockHost::create(&dir, &config).expect("a host"));
    // A killed process leaves its socket.
    drop(UnixListener::bind(dir.join(SOCKET)).expect("a socket"));
    assert!(MockHost::reach(&dir).expect("opened").here().is_some());
}
