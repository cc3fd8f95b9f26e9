//! Saves and restores through hypercalls: the backend for a real Xen over the mock machine's second
//! interface. The results equal those of the machine used directly.

use std::ops::ControlFlow;

use crate::common::*;
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{Live, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost, WorkloadSpec};
use xsr_xen_backend::{Access, DomId, Host, XenHost, XenVersion};

/// A host of this version of Xen.
fn xen(seed: u64, minor: u16) -> MockHost {
    let config = HostConfig {
        seed,
        xen_version: XenVersion { major: 4, minor },
        ..HostConfig::default()
    };
    MockHost::ephemeral(&config).unwrap()
}

/// Restores into a domain that is also created through hypercalls.
fn restore_through(host: &XenHost, stream: &[u8], spec: &GuestSpec) -> DomId {
    let (domid, _) = restore_from(host, stream, spec.kind, spec.vcpus);
    domid
}

/// The guest is unchanged, except for the rings that a restore clears.
fn assert_arrived(from: (&MockHost, DomId), to: (&MockHost, DomId), stream: &[u8], what: &str) {
    let [left, arrived] = [from, to].map(|(host, domid)| host.memory_digest(domid).unwrap());
    let rings: Vec<_> = take_apart(stream).rings().collect();
    let mut differ = left.differences(&arrived);
    differ.retain(|pfn| !rings.contains(pfn));
    assert_eq!(differ, [], "{what}");
}

#[test]
fn the_bytes_are_those_of_the_machine_itself() {
    for (spec, minor) in specs()
        .into_iter()
        .zip([14, 17, 20, 22].into_iter().cycle())
    {
        let host = xen(5, minor);
        let domid = host.create_guest(&spec).unwrap();
        let through = save_to_vec(&host.as_xen().unwrap(), domid, &options(2)).unwrap();
        let direct = save_to_vec(&host, domid, &options(2)).unwrap();
        assert!(through == direct, "{} on 4.{minor}", spec.name);
    }
}

#[test]
fn a_guest_arrives_through_hypercalls_and_runs_on() {
    for spec in specs() {
        let (old, new) = (xen(6, 15), xen(7, 20));
        let domid = old.create_guest(&spec).unwrap();
        let stream = save_to_vec(&old.as_xen().unwrap(), domid, &options(2)).unwrap();
        let there = restore_through(&new.as_xen().unwrap(), &stream, &spec);
        assert_arrived((&old, domid), (&new, there), &stream, &spec.name);
        // It can be suspended and resumed once more.
        let xen = new.as_xen().unwrap();
        let domain = xen.domain(there).unwrap();
        domain.unpause().unwrap();
        domain.suspend().unwrap();
        domain.resume().unwrap();
    }
}

/// A console daemon of Xen 4.21 marks the ring as connected; before that the ring must be marked as
/// not connected.
#[test]
fn the_console_is_not_connected_where_its_daemon_connects_it() {
    for spec in specs() {
        for (minor, connection) in [(20, 0), (21, 1), (22, 1)] {
            let (old, new) = (xen(10, 17), xen(11, minor));
            let domid = old.create_guest(&spec).unwrap();
            let stream = save_to_vec(&old, domid, &options(1)).unwrap();
            let shape = shape(&stream, spec.kind, spec.vcpus);
            let source = CopySource(stream.as_slice());
            let (there, restored, _) = restore_reporting(&new, shape, source);
            let ring = restored.console_gfn.unwrap();
            let domain = new.domain(there).unwrap();
            let pages = domain.map(&[ring], Access::Read).unwrap();
            let word = pages.page(0).unwrap().read_entry(3088 / 8);
            assert_eq!(word & 0xff, connection, "{} on 4.{minor}", spec.name);
        }
    }
}

#[test]
fn a_guest_at_work_is_saved_live_through_hypercalls() {
    for spec in specs() {
        let host = xen(8, 17);
        let domid = host.create_guest(&spec).unwrap();
        let work = WorkloadSpec {
            table_permille: 50,
            ..WorkloadSpec::writes(3, 1, 500)
        };
        let mut work = host.workload(domid, &work).unwrap();
        let mut step = |progress: &Progress| {
            if progress.phase == Phase::Precopy && progress.pass_is_complete() {
                work.step(300).unwrap();
            }
            ControlFlow::Continue(())
        };
        let xen_host = host.as_xen().unwrap();
        let domain = xen_host.domain(domid).unwrap();
        let mut sink = CopySink(Vec::new());
        let mut toolstack = DirectToolstack(domain.as_ref());
        let how = Live {
            policy: &mut XenPolicy,
            verify: false,
        };
        let saved = SaveRequest::new(domain.as_ref(), xen_host.xen_version().unwrap())
            .options(&options(2))
            .live(how)
            .observe(&mut step)
            .write_stream(&mut toolstack, &mut sink)
            .unwrap();
        assert!(saved.stats().iterations >= 2, "{}", spec.name);
        saved.keep_suspended();
        assert!(!host.is_log_dirty(domid).unwrap(), "{}", spec.name);
        let stream = sink.0;
        let other = xen(9, 20);
        let pages = take_apart(&stream).pages.len() as u64;
        let shape = (
            spec.kind,
            spec.vcpus,
            pages.min(spec.memory_mib * 256 + 1000),
        );
        let (there, restored) = restore_stream(&other, shape, CopySource(stream.as_slice()));
        restored.unwrap();
        assert_arrived((&host, domid), (&other, there), &stream, &spec.name);
    }
}
