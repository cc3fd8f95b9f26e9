//! Round trips: a domain is saved and restored on another host, with other frames. Every page, type
//! and register is the same, except for what a restore itself rewrites.

use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use crate::common::*;
use xsr_format::fields::{Value, fields, pv};
use xsr_format::frame::{Gfn, Mfn};
use xsr_save_restore::sink::FdSink;
use xsr_save_restore::source::{CopySource, FdSource};
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{Access, DomId, GuestKind, Host, VcpuBlob};

#[test]
fn a_domain_that_nothing_ran_saves_to_the_same_bytes_twice() {
    let host = host(1);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let first = save_to_vec(&host, domid, &options(1)).unwrap();
        let second = save_to_vec(&host, domid, &options(1)).unwrap();
        assert!(first == second, "{}", spec.name);
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
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
            assert!(stats.superpages_2mib > 0, "{}", spec.name);
        }
        unpause(&to, restored);
        let back = save_to_vec(&to, restored, &options(2)).unwrap();
        assert_same_guest(&spec.name, &out, &back);
        // And once more from there: frames, p2m and pins of a restored guest are as good as those
        // of a new one.
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
fn what_a_restore_rewrites_is_right() {
    let from = host(40);
    for spec in specs() {
        let name = &spec.name;
        // A host for each: its machine-to-physical table then describes only one guest.
        let to = host(41);
        let made = from.create_guest(&spec).unwrap();
        let out = save_to_vec(&from, made, &options(1)).unwrap();
        let shape = shape(&out, spec.kind, spec.vcpus);
        let (domid, restored, ports) = restore_reporting(&to, shape, CopySource(&*out));
        let domain = to.domain(domid).unwrap();
        let (store, console) = (restored.store_gfn.unwrap(), restored.console_gfn.unwrap());
        assert_ne!(store, console, "{name}");
        let grants = to.grants(domid).unwrap().map(|entry| entry.unwrap());
        assert_eq!(grants.map(|g| g.gfn), [console.0, store.0], "{name}");

        if spec.kind.is_translated() {
            let param = |index| domain.hvm().unwrap().hvm_param(index).unwrap();
            assert_eq!([param(1), param(17)], [store.0, console.0], "{name}");
            assert_eq!([param(2), param(18)], ports.map(u64::from), "{name}");
            let rings = take_apart(&out)
                .rings()
                .map(|pfn| Gfn(pfn.0))
                .collect::<Vec<_>>();
            assert!(rings.len() >= 2, "{name}");
            let pages = domain
                .map(&rings, Access::Read)
                .unwrap()
                .all_mapped()
                .unwrap();
            for (_, page) in pages.iter() {
                assert!(page.read_entries().iter().all(|word| *word == 0), "{name}");
            }
            continue;
        }
        let taken = take_apart(&out);
        let m2p = domain.pv().unwrap().m2p().unwrap();
        let page = |gfn| {
            let pages = domain
                .map(&[gfn], Access::Read)
                .unwrap()
                .all_mapped()
                .unwrap();
            pages.page(0).unwrap().to_page()
        };
        let number = |layout, bytes: &[u8], name: &str| {
            let field = fields(layout, bytes).find(|field| field.name == name);
            match field.unwrap().value {
                Value::Hex(value) | Value::Dec(value) => value,
                other => panic!("{name} is {other}"),
            }
        };
        let (context, register) = match spec.width {
            4 => (&pv::VCPU_CONTEXT_32, "user_regs.edx"),
            _ => (&pv::VCPU_CONTEXT_64, "user_regs.rdx"),
        };
        let vcpu = domain.pv().unwrap().vcpu_state(0, VcpuBlob::Basic).unwrap();
        let start_info = Gfn(number(context, &vcpu, register));
        assert_eq!(m2p.pfn(Mfn(start_info.0)), taken.start_info, "{name}");
        let contents = page(start_info);
        let field = |name| number(taken.start_info_layout(), contents.as_slice(), name);
        let info = domain.info().unwrap();
        assert_eq!(field("store_mfn"), store.0, "{name}");
        assert_eq!(field("console.mfn"), console.0, "{name}");
        assert_eq!(
            [field("store_evtchn"), field("console.evtchn")],
            ports.map(u64::from),
            "{name}"
        );
        assert_eq!(
            field("shared_info"),
            info.shared_info_frame.0 << 12,
            "{name}"
        );
        assert_eq!(field("nr_pages"), taken.pages.len() as u64, "{name}");
        assert_eq!(field("flags"), 0, "{name}");

        let shared = page(info.shared_info_frame);
        let shared = shared.as_slice();
        for field in fields(taken.shared_info_layout(), shared) {
            let expected = match field.name.as_str() {
                name if name.starts_with("evtchn_mask") => match spec.width {
                    4 => u64::from(u32::MAX),
                    _ => u64::MAX,
                },
                name if name.starts_with("evtchn_pending") => 0,
                name if name.ends_with("evtchn_pending_sel") => 0,
                "arch.pfn_to_mfn_frame_list_list" => 0,
                _ => continue,
            };
            assert_eq!(field.value, Value::Hex(expected), "{name}: {}", field.name);
        }
        // For every pfn with memory, the p2m names the frame that Xen has for it.
        let leaves: Vec<Gfn> = (taken.p2m_frames.iter())
            .map(|pfn| {
                (0..=m2p.max_mfn().0)
                    .map(Mfn)
                    .find(|mfn| m2p.pfn(*mfn) == Some(*pfn))
            })
            .map(|mfn| Gfn(mfn.unwrap().0))
            .collect();
        let p2m = domain
            .map(&leaves, Access::Read)
            .unwrap()
            .all_mapped()
            .unwrap();
        for (pfn, (page_type, _)) in &taken.pages {
            let index = usize::try_from(pfn.0).unwrap();
            let (mfn, none) = match spec.width {
                4 => {
                    let pair = p2m.read_u64(index / 2).unwrap();
                    (pair >> (index % 2 * 32) & 0xffff_ffff, 0xffff_ffff)
                }
                _ => (p2m.read_u64(index).unwrap(), u64::MAX),
            };
            match page_type.is_populated() {
                true => assert_eq!(m2p.pfn(Mfn(mfn)), Some(*pfn), "{name}: p2m of {pfn}"),
                false => assert_eq!(mfn, none, "{name}: p2m of {pfn}"),
            }
        }
    }
}

#[test]
fn bytes_go_through_descriptors_of_every_kind() {
    let (from, to) = (host(42), host(43));
    for spec in specs() {
        let made = from.create_guest(&spec).unwrap();
        let expected = save_to_vec(&from, made, &options(2)).unwrap();
        let shape = shape(&expected, spec.kind, spec.vcpus);
        let check = |domid| {
            unpause(&to, domid);
            let back = save_to_vec(&to, domid, &options(1)).unwrap();
            assert_same_guest(&spec.name, &expected, &back);
            to.domain(domid).unwrap().destroy().unwrap();
        };
        // A file.
        let mut file = tempfile::tempfile().unwrap();
        save_to(&from, made, &options(2), &mut FdSink::new(&file)).unwrap();
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert!(bytes == expected, "{}", spec.name);
        file.rewind().unwrap();
        let (domid, result) = restore_stream(&to, shape, FdSource::new(&file));
        result.unwrap();
        check(domid);
        // A pipe and a socket pair: short reads and short writes.
        let (reader, writer) = std::io::pipe().unwrap();
        check(through(&from, made, &to, shape, writer, reader));
        let (one, other) = UnixStream::pair().unwrap();
        check(through(&from, made, &to, shape, one, other));
        // A reader that returns one byte at a time.
        let (domid, result) = restore_stream(&to, shape, CopySource(OneByte(&expected)));
        result.unwrap();
        check(domid);
    }
}

/// Saves into one end while the other is being restored from.
fn through(
    from: &MockHost,
    made: DomId,
    to: &MockHost,
    shape: Shape,
    into: impl AsFd + Send,
    out_of: impl AsFd,
) -> DomId {
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || save_to(from, made, &options(2), &mut FdSink::new(into)));
        let (domid, result) = restore_stream(to, shape, FdSource::new(out_of));
        result.unwrap();
        sender.join().unwrap().unwrap();
        domid
    })
}

struct OneByte<'a>(&'a [u8]);

impl Read for OneByte<'_> {
    fn read(&mut self, room: &mut [u8]) -> std::io::Result<usize> {
        let one = room.len().min(1);
        self.0.read(&mut room[..one])
    }
}

#[test]
fn pages_sent_again_after_verify_are_compared() {
    let (from, to) = (host(44), host(45));
    for spec in specs() {
        let made = from.create_guest(&spec).unwrap();
        let plain = save_to_vec(&from, made, &options(1)).unwrap();
        let shape = shape(&plain, spec.kind, spec.vcpus);
        let verified = with_verify(&plain, |_| {});
        let (_, result) = restore_stream(&to, shape, CopySource(&*verified));
        let stats = result.unwrap();
        assert_eq!(stats.verify_mismatches, 0, "{}", spec.name);
        let once = take_apart(&plain)
            .pages
            .values()
            .filter(|p| p.1.is_some())
            .count() as u64;
        assert_eq!(stats.pages, 2 * once, "{}", spec.name);
        // One byte of an ordinary page differs from what came before.
        let spoiled = with_verify(&plain, |again| {
            let last = again.len() - 1;
            again[last] ^= 1;
        });
        let (domid, result) = restore_stream(&to, shape, CopySource(&*spoiled));
        assert_eq!(result.unwrap().verify_mismatches, 1, "{}", spec.name);
        // The page is as it was in the first version.
        unpause(&to, domid);
        let back = save_to_vec(&to, domid, &options(1)).unwrap();
        assert_same_guest(&spec.name, &plain, &back);
    }
}

/// The stream with VERIFY after its memory and then all the memory once more, in which `spoil` may
/// change something.
fn with_verify(stream: &[u8], spoil: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let (memory, tail) = memory_of(stream);
    let mut again = stream[memory..tail].to_vec();
    spoil(&mut again);
    let verify = [0x0d, 0, 0, 0, 0, 0, 0, 0];
    [&stream[..tail], &verify, &again, &stream[tail..]].concat()
}

#[test]
fn a_version_2_stream_has_no_policy_and_no_end_of_static_data() {
    let (from, to) = (host(46), host(47));
    for spec in specs() {
        let made = from.create_guest(&spec).unwrap();
        let v3 = save_to_vec(&from, made, &options(1)).unwrap();
        let v2 = as_version_2(&v3);
        let (domid, result) =
            restore_stream(&to, shape(&v3, spec.kind, spec.vcpus), CopySource(&*v2));
        result.unwrap();
        unpause(&to, domid);
        let back = save_to_vec(&to, domid, &options(1)).unwrap();
        let pages = |stream| take_apart(stream).pages.len();
        assert_eq!(
            kinds(&take_apart(&v3)),
            kinds(&take_apart(&back)),
            "{}",
            spec.name
        );
        assert!(pages(&back) <= pages(&v3), "{}", spec.name);
    }
}

#[test]
fn a_guest_kind_that_does_not_fit_is_refused() {
    let host = host(5);
    let specs = specs();
    let pv = host.create_guest(&specs[0]).unwrap();
    let stream = save_to_vec(&host, pv, &options(1)).unwrap();
    let shape = (GuestKind::Pvh, 1, 10_000);
    let (_, result) = restore_stream(&host, shape, CopySource(&*stream));
    let error = result.unwrap_err().to_string();
    assert!(error.contains("x86 PV"), "{error}");
}

#[test]
fn a_big_endian_stream_is_refused_before_anything_is_built() {
    let host = host(48);
    let made = host.create_guest(&specs()[0]).unwrap();
    let mut stream = save_to_vec(&host, made, &options(1)).unwrap();
    stream[17] |= 1;
    // The domain header in that order: PV, page shift 12, Xen 4.17.
    stream[24..40].copy_from_slice(&[0, 0, 0, 1, 0, 12, 0, 0, 0, 0, 0, 4, 0, 0, 0, 17]);
    let (_, result) = restore_stream(&host, (GuestKind::Pv, 1, 1000), CopySource(&*stream));
    let error = result.unwrap_err();
    assert!(
        error.is_bad_image() && error.to_string().contains("big endian"),
        "{error}"
    );
}
