//! Tests of the backend for a real Xen over the mock machine's face: the contract suite in every
//! interface version, the errors if something is missing, and the absence of leaks.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::Errno;
use xsr_format::frame::{Gfn, Mfn, PageType, Pfn};

mod told;

use super::{Face, Obstacles};
use crate::contract;
use crate::mock::{GuestSpec, HostConfig, MockHost};
use crate::privcmd::{Call, CallBuffer, Elsewhere as _, Hypercalls};
use crate::sys::common as sys;
use crate::xen::interface::INTERFACES;
use crate::xen::{MemoryNode, OpenError, XenHost};
use crate::{
    Access, DirtyBitmap, DirtyRead, DomId, GuestKind, Host, NewDomain, RingGrant, ShutdownReason,
    VcpuBlob, XenVersion,
};

fn machine(minor: u16) -> MockHost {
    MockHost::ephemeral(&HostConfig {
        memory_pages: 1 << 15,
        xen_version: XenVersion { major: 4, minor },
        ..HostConfig::default()
    })
    .unwrap()
}

fn xen(face: &Face) -> XenHost {
    XenHost::over(Arc::new(face.clone()), Box::new(face.clone())).unwrap()
}

fn guest(machine: &MockHost, kind: GuestKind) -> DomId {
    let spec = GuestSpec::new(format!("guest-{kind:?}"), kind, 4);
    machine.create_guest(&spec).unwrap()
}

#[test]
fn the_contract_holds_in_every_version_of_the_interface() {
    for minor in 14..=22 {
        let machine = machine(minor);
        let face = Face::new(&machine);
        let host = xen(&face);
        let free = machine.free_pages();
        let report = contract::run(&host);
        let failures: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
        assert!(failures.is_empty(), "4.{minor}: {}", failures.join("\n"));
        assert_eq!(report.checks, contract::names().count());
        assert_eq!(machine.free_pages(), free, "memory is left behind");
        assert_eq!(face.buffers.live(), 0, "buffers are left behind");
    }
}

#[test]
fn each_version_is_found_and_one_of_the_future_named() {
    for (minor, domctl) in [
        (14, 0x12),
        (15, 0x13),
        (16, 0x14),
        (17, 0x15),
        (18, 0x16),
        (19, 0x17),
        (20, 0x17),
        (21, 0x17),
        (22, 0x18),
    ] {
        assert_eq!(machine(minor).as_xen().unwrap().domctl_version(), domctl);
    }
    let error = machine(23).as_xen().unwrap_err();
    assert_eq!(
        error.to_string(),
        "Xen 4.23 speaks version 0x19 of the domctl interface; this xsr knows 0x12 to 0x18 \
         (Xen 4.14 to 4.22). Use an xsr made for this Xen, or a Xen that this xsr knows"
    );
}

#[test]
fn what_stands_in_the_way_is_named() {
    let face = Face::new(&machine(17));
    let open = |obstacles| {
        face.state().obstacles = obstacles;
        XenHost::over(Arc::new(face.clone()), Box::new(face.clone()))
    };
    let restricted = open(Obstacles {
        restricted: true,
        ..Obstacles::default()
    });
    assert!(matches!(restricted, Err(OpenError::Restricted)));
    let unprivileged = open(Obstacles {
        unprivileged: true,
        ..Obstacles::default()
    });
    let error = unprivileged.unwrap_err();
    assert!(matches!(
        error,
        OpenError::NotPrivileged {
            major: 4,
            minor: 17
        }
    ));
    assert!(error.to_string().contains("run the command in dom0"));
    open(Obstacles::default()).unwrap();
}

/// As Debian's.
#[test]
fn a_xen_without_shadow_paging_is_named() {
    let config = HostConfig {
        shadow_paging: false,
        ..HostConfig::default()
    };
    let machine = MockHost::ephemeral(&config).unwrap();
    let guest = GuestSpec::new("web", GuestKind::Pv, 8);
    let domid = machine.create_guest(&guest).unwrap();
    let face = Face::new(&machine);
    let host = XenHost::over(Arc::new(face.clone()), Box::new(face)).unwrap();
    let error = host.domain(domid).unwrap().enable_log_dirty().unwrap_err();
    assert_eq!(error.errno, Errno::EOPNOTSUPP);
    assert!(
        error.to_string().contains("without shadow paging"),
        "{error}"
    );
}

#[test]
fn frames_that_are_paged_out_are_asked_for_again() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let domid = guest(&machine, GuestKind::Pvh);
    let domain = xen(&face).domain(domid).unwrap();
    let gfns: Vec<Gfn> = (0..16).map(Gfn).collect();
    for (gfn, times) in [(3, 1), (4, 3), (9, 2)] {
        face.state().paged_out.insert((domid.0, gfn), times);
    }
    let wanted = [&gfns[..], &[Gfn(1 << 40)]].concat();
    let pages = domain.map(&wanted, Access::Read).unwrap();
    let failed: Vec<(usize, Errno)> = pages.failed().iter().map(|e| (e.index, e.errno)).collect();
    assert_eq!(failed, [(16, Errno::EINVAL)]);
    let direct = machine.domain(domid).unwrap();
    let direct = direct.map(&gfns, Access::Read).unwrap();
    for ((_, page), (_, expected)) in pages.iter().zip(direct.iter()) {
        assert_eq!(page.to_page(), expected.to_page());
    }
    let left: u32 = face.state().paged_out.values().sum();
    assert_eq!(left, 0);
}

#[test]
fn a_buffer_that_is_on_the_move_is_filled_anew() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let domid = guest(&machine, GuestKind::Pv);
    let domain = xen(&face).domain(domid).unwrap();
    let direct = machine.domain(domid).unwrap();
    let typed = |first: u64| {
        let gfns: Vec<Gfn> = (first..first + 1000).map(Gfn).collect();
        let mut types = vec![PageType::XTAB; gfns.len()];
        direct.page_types(&gfns, &mut types).unwrap();
        (gfns, types)
    };
    // Frames for which it matters whether the buffer holds a frame or a type.
    let last = domain.pv().unwrap().m2p().unwrap().max_mfn().0 - 1000;
    let (gfns, expected) = (0..last)
        .step_by(1000)
        .map(typed)
        .find(|(_, types)| types[..500].contains(&PageType::NOTAB))
        .unwrap();
    let mut types = vec![PageType::XTAB; gfns.len()];
    face.state().faults = 2;
    domain.page_types(&gfns, &mut types).unwrap();
    assert_eq!(types, expected);
    // One more fault than the retries cover.
    face.state().faults = 3;
    let error = domain.page_types(&gfns, &mut types).unwrap_err();
    assert_eq!(error.errno, Errno::EFAULT);
}

#[test]
fn a_log_that_something_else_enabled_is_not_read() {
    let machine = machine(20);
    let domid = guest(&machine, GuestKind::Hvm);
    let domain = machine.as_xen().unwrap().domain(domid).unwrap();
    let mut bitmap = DirtyBitmap::new(1024);
    machine.hold_log_dirty(domid).unwrap();
    let held = domain.enable_log_dirty().unwrap_err();
    assert_eq!(held.errno, Errno::EINVAL);
    let read = domain.read_dirty(DirtyRead::Clean, &mut bitmap);
    assert_eq!(read.unwrap_err().errno, Errno::EINVAL);
    domain.disable_log_dirty().unwrap();
    assert!(!machine.is_log_dirty(domid).unwrap());
    domain.enable_log_dirty().unwrap();
    domain.read_dirty(DirtyRead::Clean, &mut bitmap).unwrap();
    assert_eq!(bitmap.count(), 0);
    domain.disable_log_dirty().unwrap();
}

#[test]
fn what_a_guest_writes_comes_through_the_log() {
    let machine = machine(17);
    let domid = guest(&machine, GuestKind::Hvm);
    let domain = machine.as_xen().unwrap().domain(domid).unwrap();
    domain.enable_log_dirty().unwrap();
    machine.mock_domain(domid).unwrap().dom.dirty.mark(1);
    machine.mock_domain(domid).unwrap().dom.dirty.mark(900);
    let mut bitmap = DirtyBitmap::new(1000);
    let stats = domain.read_dirty(DirtyRead::Peek, &mut bitmap).unwrap();
    assert_eq!(stats.dirty_count, 2);
    assert_eq!(bitmap.iter().collect::<Vec<_>>(), [Pfn(1), Pfn(900)]);
    domain.read_dirty(DirtyRead::Clean, &mut bitmap).unwrap();
    assert_eq!(bitmap.count(), 2);
    domain.read_dirty(DirtyRead::Clean, &mut bitmap).unwrap();
    assert_eq!(bitmap.count(), 0);
}

#[test]
fn a_dirty_log_that_is_not_whole_is_no_answer() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let domid = guest(&machine, GuestKind::Pvh);
    let domain = xen(&face).domain(domid).unwrap();
    domain.enable_log_dirty().unwrap();
    let read = || domain.read_dirty(DirtyRead::Clean, &mut DirtyBitmap::new(1000));
    read().unwrap();
    face.state().obstacles.short_log = true;
    assert_eq!(read().unwrap_err().errno, Errno::EIO);
}

#[test]
fn guests_are_suspended_in_the_way_they_understand() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let host = xen(&face);
    for kind in [GuestKind::Pv, GuestKind::Hvm, GuestKind::Pvh] {
        for events in [false, true] {
            let domid = guest(&machine, kind);
            let node = |name: &str| format!("/local/domain/{}/{name}", domid.0);
            if events {
                let port = (node("device/suspend/event-channel"), b"7".to_vec());
                face.state().nodes.extend([port]);
            }
            let domain = host.domain(domid).unwrap();
            domain.suspend().unwrap();
            let info = domain.info().unwrap();
            assert_eq!(info.shutdown, Some(ShutdownReason::Suspend));
            // A guest without PV drivers reads nothing; one with an event channel is asked through
            // that.
            let asked = face.state().nodes.contains_key(&node("control/shutdown"));
            assert_eq!(asked, kind != GuestKind::Hvm && !events, "{kind:?}");
            domain.resume().unwrap();
            assert_eq!(domain.info().unwrap().shutdown, None);
            domain.destroy().unwrap();
        }
    }
}

/// Kernels that cannot map resources: the frame of the table is mapped, and no gfn of the guest
/// stays in use.
#[test]
fn grants_are_seeded_without_resources() {
    let machine = machine(17);
    let face = Face::new(&machine);
    face.state().obstacles.no_resources = true;
    let host = xen(&face);
    let report = contract::run(&host);
    assert!(report.failures.is_empty(), "{report:?}");
    for kind in [GuestKind::Pv, GuestKind::Hvm, GuestKind::Pvh] {
        let domid = guest(&machine, kind);
        let ring = |gfn| RingGrant {
            gfn: Some(Gfn(gfn)),
            backend: DomId(3),
        };
        let domain = host.domain(domid).unwrap();
        domain.seed_grants(ring(0x11), ring(0x22)).unwrap();
        let table = machine
            .mock_domain(domid)
            .unwrap()
            .dom
            .lock()
            .unwrap()
            .record
            .grant_table;
        let page = machine.machine.read_frame(Mfn(table)).unwrap();
        // flags, domid, frame: permit_access, of either ring.
        let entries = [[1, 0, 3, 0, 0x11, 0, 0, 0], [1, 0, 3, 0, 0x22, 0, 0, 0]];
        assert_eq!(page[..16], *entries.as_flattened(), "{kind:?}");
        assert!(face.state().tables.is_empty(), "{kind:?}");
        // If the table cannot be set up, its gfn is freed.
        face.state().obstacles.no_tables = true;
        domain.seed_grants(ring(0x11), ring(0x22)).unwrap_err();
        assert!(face.state().tables.is_empty(), "{kind:?}");
        face.state().obstacles.no_tables = false;
    }
}

#[test]
fn the_control_domain_is_nobodys_guest() {
    let host = xen(&Face::new(&machine(17)));
    for domid in [0, 0x7ff0, 0x7ff2] {
        let error = host.domain(DomId(domid)).map(drop).unwrap_err();
        assert_eq!(error.errno, Errno::EINVAL, "{domid:#x}");
    }
}

#[test]
fn nothing_of_a_domain_that_is_forgotten_stays_in_xenstore() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let host = xen(&face);
    let nodes = |face: &Face| face.state().nodes.clone();
    let before = nodes(&face);
    for domid in [1, 12] {
        // The nodes that libxl makes.
        let made = [
            (format!("/local/domain/{domid}/name"), "web".to_owned()),
            (format!("/local/domain/{domid}/vm"), format!("/vm/u{domid}")),
            (format!("/vm/u{domid}/name"), "web".to_owned()),
            (format!("/libxl/{domid}/type"), "pv".to_owned()),
            (
                format!("/local/domain/0/backend/console/{domid}/0/state"),
                "1".to_owned(),
            ),
        ];
        let made = made.map(|(path, value)| (path, value.into_bytes()));
        face.state().nodes.extend(made);
    }
    let other = nodes(&face).into_iter().filter(|(path, value)| {
        let whole = format!("{path}/");
        whole.contains("/12/") || whole.contains("/u12/") || value == b"/vm/u12"
    });
    let other: BTreeMap<String, Vec<u8>> = other.collect();
    host.remove_nodes_of(DomId(1)).unwrap();
    assert_eq!(nodes(&face), other);
    host.remove_nodes_of(DomId(12)).unwrap();
    assert_eq!(nodes(&face), before);
}

#[test]
fn a_resumed_guest_is_told_that_its_suspend_was_cancelled() {
    let machine = machine(17);
    let host = machine.as_xen().unwrap();
    let domid = guest(&machine, GuestKind::Pv);
    let domain = host.domain(domid).unwrap();
    let eax = || domain.pv().unwrap().vcpu_state(0, VcpuBlob::Basic).unwrap()[600..608].to_vec();
    domain.suspend().unwrap();
    assert_eq!(eax(), [0; 8]);
    domain.resume().unwrap();
    assert_eq!(eax(), [1, 0, 0, 0, 0, 0, 0, 0]);
    // The same with PV drivers: Xen keeps its context.
    let domid = guest(&machine, GuestKind::Hvm);
    let domain = host.domain(domid).unwrap();
    domain
        .hvm()
        .unwrap()
        .set_hvm_param(sys::HVM_PARAM_CALLBACK_IRQ, 7)
        .unwrap();
    domain.suspend().unwrap();
    domain.resume().unwrap();
    let context = domain.hvm().unwrap().hvm_context().unwrap();
    assert_eq!(context[552..560], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn memory_that_is_no_buffer_is_efault() {
    let face = Face::new(&machine(17));
    let domctl = |address| {
        face.answer(sys::__HYPERVISOR_domctl, [address, 0, 0, 0, 0])
            .unwrap_err()
    };
    assert_eq!(domctl(0), Errno::EFAULT);
    let version = 0x15_u32;
    let fill = |bytes| {
        let mut buffer = face.buffer(bytes).unwrap();
        buffer.write(0, &sys::XEN_DOMCTL_getdomaininfo.to_ne_bytes());
        buffer.write(4, &version.to_ne_bytes());
        buffer
    };
    // Too short, misplaced, freed.
    let short = fill(100);
    assert_eq!(domctl(short.address()), Errno::EFAULT);
    let whole = fill(144);
    let arguments = [whole.address(), 0, 0, 0, 0];
    assert_eq!(face.answer(sys::__HYPERVISOR_domctl, arguments), Ok(0));
    assert_eq!(domctl(whole.address() + 144), Errno::EFAULT);
    let address = whole.address();
    drop(whole);
    assert_eq!(domctl(address), Errno::EFAULT);
}

/// A call is made only if its addresses are those in the tables, with enough room behind each.
#[test]
fn a_call_names_no_memory_but_that_of_its_buffers() {
    let face = Face::new(&machine(17));
    let mut whole = face.buffer(144).unwrap();
    let mut frames = face.buffer(64).unwrap();
    let mut ask = |cmd: u32, count: u64, named: &mut [&mut CallBuffer]| {
        whole.write(0, &cmd.to_le_bytes());
        whole.write(16, &count.to_le_bytes());
        // An address outside every buffer.
        whole.write(24, &[0xaa; 8]);
        Call::domctl(&mut whole, named).map(|call| call.arguments())?;
        let mut address = [0; 8];
        whole.read(24, &mut address);
        Ok(u64::from_le_bytes(address))
    };
    let types = sys::XEN_DOMCTL_getpageframeinfo3;
    let address = frames.address();
    assert_eq!(ask(types, 8, &mut [&mut frames]), Ok(address));
    assert_eq!(ask(types, 8, &mut []), Ok(0));
    for count in [9, 1 << 61, u64::MAX] {
        assert_eq!(ask(types, count, &mut [&mut frames]), Err(Errno::EFAULT));
    }
    // A command without addresses, and one that is refused.
    let pause = sys::XEN_DOMCTL_pausedomain;
    assert_eq!(ask(pause, 0, &mut [&mut frames]), Err(Errno::EFAULT));
    assert_eq!(ask(9999, 0, &mut []), Err(Errno::ENOSYS));
    let refused = |call: Result<Call<'_>, Errno>| call.unwrap_err();
    let mut short = face.buffer(143).unwrap();
    short.write(0, &pause.to_le_bytes());
    assert_eq!(refused(Call::domctl(&mut short, &mut [])), Errno::EFAULT);
    short.write(0, &9999_u32.to_le_bytes());
    assert_eq!(refused(Call::sysctl(&mut short, &mut [])), Errno::ENOSYS);
    assert_eq!(
        refused(Call::plain(sys::__HYPERVISOR_memory_op, 9)),
        Errno::ENOSYS
    );
    let (memory_op, populate) = (sys::__HYPERVISOR_memory_op, sys::XENMEM_populate_physmap);
    let mut tiny = face.buffer(31).unwrap();
    let call = Call::operation(memory_op, populate, &mut tiny, &mut []);
    assert_eq!(refused(call), Errno::EFAULT);
    let call = Call::operation(memory_op, 99, &mut short, &mut []);
    assert_eq!(refused(call), Errno::ENOSYS);
    // Only pins: other commands take an address in the last word.
    let mut ops = face.buffer(48).unwrap();
    ops.write(0, &sys::MMUEXT_PIN_L1_TABLE.to_le_bytes());
    // MMUEXT_SET_LDT, whose second argument is a number of entries.
    ops.write(24, &13_u32.to_le_bytes());
    assert!(Call::pins(&mut ops, 1, 7).is_ok());
    assert_eq!(refused(Call::pins(&mut ops, 2, 7)), Errno::ENOSYS);
    ops.write(24, &sys::MMUEXT_PIN_L4_TABLE.to_le_bytes());
    assert!(Call::pins(&mut ops, 2, 7).is_ok());
    assert_eq!(refused(Call::pins(&mut ops, 3, 7)), Errno::EFAULT);
    ops.write(16, &[1]);
    assert_eq!(refused(Call::pins(&mut ops, 1, 7)), Errno::ENOSYS);
}

#[test]
fn a_structure_means_the_same_taken_apart_as_put_together() {
    for interface in &INTERFACES {
        let info = crate::xen::interface::Info {
            domid: 7,
            flags: 0x2_0006,
            tot_pages: 1 << 33,
            max_pages: 1 << 34,
            shared_info_frame: 1 << 35,
            max_vcpu_id: 3,
            emulation: sys::XEN_X86_EMU_LAPIC,
            handle: *b"0123456789abcdef",
        };
        let bytes = (interface.encode_info)(&info);
        assert_eq!(bytes.len(), interface.info_bytes);
        assert_eq!((interface.decode_info)(&bytes), Some(info));
        assert_eq!((interface.decode_info)(&bytes[1..]), None);
        // A domain whose vcpus have not been created yet.
        let none = crate::xen::interface::Info {
            max_vcpu_id: u32::MAX,
            ..info
        };
        assert_eq!(info.to_domain_info().max_vcpu_id, 3);
        assert_eq!(none.to_domain_info().max_vcpu_id, 0);
        let create = crate::xen::interface::Create {
            flags: 3,
            vcpus: 5,
            max_evtchn_port: 1023,
            emulation: 1,
            handle: *b"fedcba9876543210",
            ssidref: 77,
            max_grant_frames: 64,
            max_maptrack_frames: -1,
            grant_version: if interface.has_grant_version { 2 } else { 0 },
            misc_flags: u32::from(interface.domctl > 0x12),
            cpupool: if interface.has_cpupool { 3 } else { 0 },
        };
        let bytes = (interface.encode_create)(&create);
        assert_eq!((interface.decode_create)(&bytes), Some(create));
        assert_eq!((interface.decode_create)(&bytes[1..]), None);
    }
}

#[test]
fn each_call_of_a_multicall_has_its_own_answer() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let domid = guest(&machine, GuestKind::Pvh);
    let domain = machine.domain(domid).unwrap();
    let last = domain.maximum_gfn().unwrap().unwrap();
    let list = face.buffers.take(5 * 64);
    let argument = face.buffers.take(8);
    let (place, domid_at) = (list.address(), argument.address());
    face.save(domid_at, &u64::from(domid.0)).unwrap();
    let version = u64::from(sys::__HYPERVISOR_xen_version);
    let memory = u64::from(sys::__HYPERVISOR_memory_op);
    let maximum = u64::from(sys::XENMEM_maximum_gpfn);
    let untouched = 0x5555_u64;
    let calls = [
        [
            version,
            untouched,
            sys::XENVER_version.into(),
            0,
            0,
            0,
            0,
            0,
        ],
        [memory, untouched, maximum, domid_at, 0, 0, 0, 0],
        // A nested list, which Xen refuses; an invalid number; an address without a buffer.
        [super::MULTICALL.into(), untouched, place, 1, 0, 0, 0, 0],
        [u64::MAX, untouched, 0, 0, 0, 0, 0, 0],
        [memory, untouched, maximum, 0x10, 0, 0, 0, 0],
    ];
    face.save(place, &calls).unwrap();
    assert_eq!(face.answer(super::MULTICALL, [place, 5, 0, 0, 0]), Ok(0));
    let answered: [[u64; 8]; 5] = face.load(place).unwrap();
    let error = |errno: Errno| (-i64::from(errno.raw())).cast_unsigned();
    let expected = [
        4 << 16 | 17,
        last.0,
        error(Errno::ENOSYS),
        error(Errno::ENOSYS),
        error(Errno::EFAULT),
    ];
    assert_eq!(answered.map(|call| call[1]), expected);
    // The rest of the list is unchanged.
    for (asked, answered) in calls.iter().zip(&answered) {
        assert_eq!((asked[0], &asked[2..]), (answered[0], &answered[2..]));
    }
    // A list that exceeds the buffer: the calls before its end are still answered.
    face.save(place, &calls).unwrap();
    let beyond = face.answer(super::MULTICALL, [place, 6, 0, 0, 0]);
    assert_eq!(beyond, Err(Errno::EFAULT));
    let answered: [[u64; 8]; 5] = face.load(place).unwrap();
    assert_eq!(answered[0][1], 4 << 16 | 17);
}

#[test]
fn what_stands_in_the_padding_of_a_pin_is_not_looked_at() {
    let machine = machine(17);
    let face = Face::new(&machine);
    let domid = guest(&machine, GuestKind::Pv);
    let buffer = face.buffers.take(24);
    let pin = |command: u32, padding: u32| {
        let op = [u64::from(padding) << 32 | u64::from(command), u64::MAX, 0];
        face.save(buffer.address(), &op).unwrap();
        let arguments = [buffer.address(), 1, 0, domid.0.into(), 0];
        face.answer(sys::__HYPERVISOR_mmuext_op, arguments)
    };
    for padding in [0, 0x7ffd] {
        // No such frame; no such command.
        let wanted = (Err(Errno::EINVAL), Err(Errno::ENOSYS));
        let got = (pin(sys::MMUEXT_PIN_L4_TABLE, padding), pin(99, padding));
        assert_eq!(got, wanted, "{padding:#x}");
    }
}

/// As a toolstack places a guest that it restores.
#[test]
fn memory_is_taken_from_a_node() {
    let mock = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
    let xen = mock.as_xen().expect("a Xen");
    let domid = mock.create(&NewDomain::new(GuestKind::Pvh, 1, 16));
    let domid = domid.expect("a domain");
    let on = |node, exact| {
        let node = MemoryNode { node, exact };
        xen.domain_on(domid, node).expect("the domain")
    };
    // The machine has node 0 alone.
    for (gfn, node, exact, expected) in [
        (0, 0, true, 1),
        (1, 3, false, 1),
        (2, 3, true, 0),
        (3, 255, false, 1),
    ] {
        let populated = on(node, exact).populate(0, &mut [Gfn(gfn)]);
        assert_eq!(populated.expect("memory"), expected, "node {node}");
    }
    // Only an allocation has a node.
    assert_eq!(on(3, true).release(&[Gfn(0)]).expect("released"), 1);
    let error = xen.domain_on(
        DomId(77),
        MemoryNode {
            node: 0,
            exact: true,
        },
    );
    assert_eq!(error.err().expect("no domain").errno, Errno::ESRCH);
}
