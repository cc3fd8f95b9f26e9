//! Tests of the information that a save or restore exchanges with the hypervisor and xenstore: the
//! dirty log of another process, a guest that resumes, the settings of a new domain, the reason for
//! a refusal.

use crate::Errno;
use xsr_format::frame::Pfn;

use super::{Face, guest, machine, xen};
use crate::xenstore::Xenstore as _;
use crate::{
    Detail, DirtyBitmap, DirtyRead, DomainSettings, GuestKind, Host, NewDomain, PolicyEntry,
    ShutdownReason,
};

#[test]
fn a_log_that_another_process_switched_on_is_read() {
    let machine = machine(17);
    for kind in [GuestKind::Hvm, GuestKind::Pvh, GuestKind::Pv] {
        let domid = guest(&machine, kind);
        let [libxl, helper] = [(); 2].map(|()| machine.as_xen().unwrap());
        let [libxl, helper] = [libxl, helper].map(|host| host.domain(domid).unwrap());
        let mut bitmap = DirtyBitmap::new(1000);
        let off = helper.read_dirty(DirtyRead::Clean, &mut bitmap);
        assert_eq!(off.unwrap_err().errno, Errno::EINVAL);
        assert!(!machine.is_log_dirty(domid).unwrap(), "left as it was");
        libxl.enable_log_dirty().unwrap();
        machine.mock_domain(domid).unwrap().dom.dirty.mark(900);
        for how in [DirtyRead::Peek, DirtyRead::Clean] {
            helper.read_dirty(how, &mut bitmap).unwrap();
            assert_eq!(bitmap.iter().collect::<Vec<_>>(), [Pfn(900)]);
        }
        libxl.disable_log_dirty().unwrap();
    }
}

#[test]
fn xenstored_announces_the_shutdown_of_a_guest_that_was_resumed_before() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let domid = guest(&machine, GuestKind::Pvh);
    let domain = xen(&face).domain(domid).unwrap();
    for _ in 0..2 {
        domain.suspend().unwrap();
        assert!(face.announces_shutdown(domid));
        assert!(!face.announces_shutdown(domid), "once");
        domain.resume().unwrap();
    }
    let mock = machine.mock_domain(domid).unwrap();
    assert!(mock.shut_down(ShutdownReason::Poweroff).unwrap());
    assert!(face.announces_shutdown(domid), "xl notices");
}

#[test]
fn a_domain_is_made_with_what_libxl_sets_at_every_restore() {
    for minor in 14..=22 {
        let machine = machine(minor);
        let face = Face::new(&machine);
        let host = xen(&face);
        let domid = host.create_domain(GuestKind::Pvh, 1, 16).unwrap();
        let domain = host.domain(domid).unwrap();
        // No delay for missed ticks.
        assert_eq!(domain.hvm().unwrap().hvm_param(10), Ok(1), "4.{minor}");
        let mut settings = DomainSettings {
            max_event_port: 4095,
            max_grant_frames: Some(64),
            max_maptrack_frames: Some(128),
            ssidref: 9,
            timer_mode: 2,
            time_offset_seconds: -3600,
            msr_relaxed: true,
            paging_kib: Some(9 * 1024 + 1),
            ..DomainSettings::default()
        };
        let new = NewDomain::new(GuestKind::Hvm, 1, 16).settings(settings.clone());
        let domid = host.create(&new).unwrap();
        let kept = machine.settings(domid).unwrap();
        // The timer mode is a parameter, and Xen keeps the memory for tables itself.
        assert_eq!(kept.timer_mode, 0);
        settings.timer_mode = 0;
        let kib = settings.paging_kib.take().unwrap();
        // The hypervisor's largest version, if the interface has the field.
        let grants = (minor >= 16).then_some(2);
        assert_eq!(kept.max_grant_version, grants);
        let made = DomainSettings {
            max_grant_version: grants,
            msr_relaxed: minor >= 15,
            ..settings.clone()
        };
        assert_eq!(kept, made);
        let mib = face.state().allocations[&domid.0];
        assert_eq!(u64::from(mib), kib.div_ceil(1024));
        assert_eq!(
            host.domain(domid).unwrap().hvm().unwrap().hvm_param(10),
            Ok(2)
        );
        settings.cpupool = 2;
        let new = new.settings(settings);
        match host.create(&new) {
            Ok(domid) => assert_eq!(
                (machine.settings(domid).unwrap().cpupool, minor >= 17),
                (2, true)
            ),
            Err(error) => {
                assert_eq!((error.errno, minor < 17), (Errno::EOPNOTSUPP, true));
                assert!(error.to_string().contains("pool of processors"), "{error}");
            }
        }
    }
}

#[test]
fn a_domain_gets_what_its_configuration_wants_or_what_the_hypervisor_has() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let make = |wanted| {
        let settings = DomainSettings {
            max_grant_version: wanted,
            ..DomainSettings::default()
        };
        let new = NewDomain::new(GuestKind::Pvh, 1, 16).settings(settings);
        let made = xen(&face).create(&new);
        made.map(|domid| machine.settings(domid).unwrap().max_grant_version)
    };
    assert_eq!(make(None), Ok(Some(2)));
    assert_eq!(make(Some(1)), Ok(Some(1)));
    face.state().obstacles.no_nested_paging = true;
    assert_eq!(make(None), Ok(Some(2)));
    face.state().obstacles.first_grants_only = true;
    assert_eq!(make(None), Ok(Some(1)));
    face.state().obstacles.no_nested_paging = false;
    assert_eq!(make(None), Ok(Some(1)));
    assert_eq!(make(Some(2)).unwrap_err().errno, Errno::EINVAL);
}

/// A limit to the first version would be lost on a Xen that has no field for it.
#[test]
fn a_limit_that_the_hypervisor_cannot_be_told_is_refused() {
    for (wanted, fine) in [(None, true), (Some(2), true), (Some(1), false)] {
        let settings = DomainSettings {
            max_grant_version: wanted,
            msr_relaxed: true,
            ..DomainSettings::default()
        };
        let new = NewDomain::new(GuestKind::Pv, 1, 16).settings(settings);
        let made = machine(14).as_xen().unwrap().create(&new);
        assert_eq!(made.is_ok(), fine, "{wanted:?}");
    }
}

#[test]
fn a_domain_is_placed_as_xapi_wants_it() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let host = xen(&face);
    let domid = host.create_domain(GuestKind::Pv, 2, 16).unwrap();
    let mut on = [false; 11];
    (on[1], on[10]) = (true, true);
    host.set_hard_affinity(domid, 1, &on).unwrap();
    host.set_time_offset(domid, -3600).unwrap();
    assert_eq!(host.set_credit(domid, None, Some(50)), Ok(true));
    let placed = machine.placement(domid).unwrap();
    assert_eq!(
        placed.affinity.into_iter().collect::<Vec<_>>(),
        [(1, vec![2, 4])]
    );
    assert_eq!((placed.weight, placed.cap), (256, 50));
    let settings = machine.settings(domid).unwrap();
    assert_eq!(settings.time_offset_seconds, -3600);
    for (vcpu, on) in [(2, &on[..]), (0, &[false; 9])] {
        let error = host.set_hard_affinity(domid, vcpu, on).unwrap_err();
        assert_eq!(error.errno, Errno::EINVAL);
    }
    face.state().obstacles.another_scheduler = true;
    assert_eq!(host.set_credit(domid, Some(1), None), Ok(false));
    assert_eq!(machine.placement(domid).unwrap().weight, 256);
}

#[test]
fn a_node_of_a_domain_is_read() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let host = xen(&face);
    let domid = guest(&machine, GuestKind::Pv);
    assert_eq!(host.domain_node(domid, "platform/hpet"), Ok(None));
    let path = format!("/local/domain/{}/platform/hpet", domid.0);
    face.write(&path, b"0").unwrap();
    assert_eq!(
        host.domain_node(domid, "platform/hpet"),
        Ok(Some(b"0".to_vec()))
    );
}

#[test]
fn a_refused_cpu_policy_comes_with_the_entry_that_is_to_blame() {
    let machine = machine(17);
    let domid = machine.create_domain(GuestKind::Pvh, 1, 16).unwrap();
    for domain in [
        machine.as_xen().unwrap().domain(domid).unwrap(),
        machine.domain(domid).unwrap(),
    ] {
        let mut policy = domain.cpu_policy().unwrap();
        policy.msrs[..4].copy_from_slice(&0xdead_u32.to_le_bytes());
        let error = domain.set_cpu_policy(&policy).unwrap_err();
        assert_eq!(error.errno, Errno::ERANGE);
        let msr = Detail::PolicyEntry(PolicyEntry::Msr(0xdead));
        assert_eq!(error.detail.as_deref(), Some(&msr));
        policy.leaves[8] = 0xff;
        policy.msrs.clear();
        let error = domain.set_cpu_policy(&policy).unwrap_err();
        let (leaf, subleaf) = (0, None);
        let leaf = Detail::PolicyEntry(PolicyEntry::Leaf { leaf, subleaf });
        assert_eq!(error.detail.as_deref(), Some(&leaf));
        assert_eq!(
            error.to_string(),
            format!(
                "set_cpu_policy failed for {domid}: EINVAL: Invalid argument (because of CPUID leaf 0x0)"
            )
        );
    }
}

#[test]
fn a_domain_has_as_many_vcpus_as_xen_allows_or_the_refusal_says_so() {
    let machine = machine(17);
    let xen = machine.as_xen().unwrap();
    for host in [&machine as &dyn Host, &xen] {
        let domid = host.create_domain(GuestKind::Pv, 8192, 16).unwrap();
        assert_eq!(
            host.domain(domid).unwrap().info().unwrap().max_vcpu_id,
            8191
        );
        for (kind, vcpus, most) in [(GuestKind::Pv, 8193, 8192), (GuestKind::Pvh, 129, 128)] {
            let error = host.create_domain(kind, vcpus, 16).unwrap_err();
            assert_eq!(error.errno, Errno::EINVAL);
            let text = error.to_string();
            let expected = format!(
                "{vcpus} vcpus: a {} domain has between 1 and {most}",
                kind.name()
            );
            assert!(text.contains(&expected), "{text}");
        }
    }
}

#[test]
fn devices_are_found_where_libxl_and_the_guest_have_them() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let host = xen(&face);
    let domid = guest(&machine, GuestKind::Pvh);
    let write = |path: &str| face.write(path, b"").unwrap();
    write("/local/domain/1/device/suspend/event-channel");
    write("/libxl/1/device/console/0/backend");
    assert_eq!(host.devices_of(domid), Ok(Vec::new()));
    write("/local/domain/1/device/vif/0/mac");
    write("/libxl/1/device/vif/0/backend");
    write("/libxl/1/device/9pfs/1");
    write("/local/domain/1/device/pci/0/dev-0");
    assert_eq!(
        host.devices_of(domid).unwrap(),
        ["9pfs/1", "pci/0", "vif/0"]
    );
}
