//! Tests that the mock's guests look as they would to a toolstack on a real host: walkable p2m,
//! valid page tables, the pattern in the right pages.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use xsr_format::frame::{Gfn, Mfn, PageType};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost, P2mStyle};
use xsr_xen_backend::{Access, Domain, GuestKind, Host, ShutdownReason, VcpuBlob};

fn host() -> MockHost {
    MockHost::ephemeral(&HostConfig {
        memory_pages: 1 << 16,
        ..HostConfig::default()
    })
    .unwrap()
}

fn word(page: &[u8], offset: usize, width: usize) -> u64 {
    let mut word = [0; 8];
    word[..width].copy_from_slice(&page[offset..offset + width]);
    u64::from_le_bytes(word)
}

fn read(domain: &dyn Domain, mfn: u64) -> Box<[u8; 4096]> {
    let pages = domain
        .map(&[Gfn(mfn)], Access::Read)
        .unwrap()
        .all_mapped()
        .unwrap();
    pages.page(0).unwrap().to_page()
}

/// The p2m as a saver finds it, through the tree or the linear list.
fn walk_p2m(domain: &dyn Domain, width: usize) -> Vec<u64> {
    let shared_info = read(domain, domain.info().unwrap().shared_info_frame.0);
    let (max_pfn, fll, cr3, vaddr) = match width {
        8 => (0xc10, 0xc18, 0xc28, 0xc30),
        _ => (0x90c, 0x910, 0x918, 0x91c),
    };
    let count = usize::try_from(word(&shared_info[..], max_pfn, width)).unwrap();
    let per_page = 4096 / width;
    let leaves: Vec<u64> = match word(&shared_info[..], cr3, width) {
        0 => {
            let top = read(domain, word(&shared_info[..], fll, width));
            (0..count.div_ceil(per_page))
                .map(|leaf| {
                    let mid = word(&top[..], leaf / per_page * width, width);
                    word(&read(domain, mid)[..], leaf % per_page * width, width)
                })
                .collect()
        }
        cr3 => {
            let (root, levels) = match width {
                8 => (cr3 >> 12, 4),
                _ => ((cr3 >> 12 | cr3 << 20) & 0xffff_ffff, 3),
            };
            let start = word(&shared_info[..], vaddr, width);
            (0..count.div_ceil(per_page) as u64)
                .map(|leaf| {
                    let address = start + leaf * 4096;
                    (1..=levels).rev().fold(root, |table, level| {
                        let index = address >> (12 + 9 * (level - 1)) & 0x1ff;
                        let entry = word(
                            &read(domain, table)[..],
                            usize::try_from(index).unwrap() * 8,
                            8,
                        );
                        assert_eq!(entry & 1, 1, "hole in the p2m's mapping");
                        (entry & 0x000f_ffff_ffff_f000) >> 12
                    })
                })
                .collect()
        }
    };
    leaves
        .iter()
        .flat_map(|mfn| {
            let page = read(domain, *mfn);
            (0..per_page)
                .map(move |n| word(&page[..], n * width, width))
                .collect::<Vec<_>>()
        })
        .take(count)
        .collect()
}

fn specs() -> Vec<GuestSpec> {
    let mut specs = Vec::new();
    for width in [8, 4] {
        for p2m in [P2mStyle::Linear, P2mStyle::Tree] {
            specs.push(GuestSpec {
                width,
                p2m: Some(p2m),
                vcpus: 3,
                offline_vcpus: 1,
                ballooned_pages: 100,
                ..GuestSpec::new(format!("pv{width}-{p2m:?}"), GuestKind::Pv, 16)
            });
        }
    }
    specs
}

#[test]
fn the_published_p2m_and_the_m2p_agree() {
    for spec in specs() {
        let host = host();
        let domain = host.domain(host.create_guest(&spec).unwrap()).unwrap();
        let width = usize::from(spec.width);
        let p2m = walk_p2m(&*domain, width);
        assert_eq!(p2m.len(), 4096);
        let none = u64::MAX >> (64 - width * 8);
        let m2p = domain.pv().unwrap().m2p().unwrap();
        let mut holes = 0;
        for (pfn, mfn) in (0..).zip(&p2m) {
            if *mfn == none {
                holes += 1;
            } else {
                assert_eq!(m2p.pfn(Mfn(*mfn)).map(|pfn| pfn.0), Some(pfn));
                assert_ne!(*mfn, pfn, "{}", spec.name);
            }
        }
        assert_eq!(holes, 100);
        assert_eq!(m2p.pfn(m2p.compat_first()).map(|p| p.0), Some(u64::MAX));
    }
}

#[test]
fn pv_guests_have_tables_of_every_level() {
    for spec in specs() {
        let host = host();
        let domid = host.create_guest(&spec).unwrap();
        let report = host.show(domid).unwrap();
        let top = if spec.width == 8 { 4 } else { 3 };
        for level in 1..=top {
            for pinned in [false, true] {
                let name = PageType::table(level, pinned).unwrap().name();
                let expected = level < top || pinned;
                assert_eq!(
                    report.page_types.contains_key(name),
                    expected,
                    "{name} {report:?}"
                );
            }
        }
        assert_eq!(report.vcpus_online, [true, true, false]);
    }
}

#[test]
fn a_pv_guest_may_have_more_processes_than_one_hypercall_pins() {
    let spec = GuestSpec {
        processes: 1030,
        ..GuestSpec::new("many", GuestKind::Pv, 1030)
    };
    let host = MockHost::ephemeral(&HostConfig {
        memory_pages: spec.memory_mib * 256 + (1 << 14),
        ..HostConfig::default()
    })
    .unwrap();
    let domid = host.create_guest(&spec).unwrap();
    let pinned = PageType::L4TAB_PINNED.name();
    assert!(host.show(domid).unwrap().page_types[pinned] > 1030);
}

#[test]
fn translated_guests_have_memory_where_libxl_puts_it() {
    for (kind, holes) in [(GuestKind::Hvm, 0xa0..0xc0), (GuestKind::Pvh, 0..0)] {
        let host = host();
        let domain = host
            .domain(host.create_guest(&GuestSpec::new("g", kind, 16)).unwrap())
            .unwrap();
        assert_eq!(domain.maximum_gfn().unwrap(), Some(Gfn(0xf_efff)));
        let mut types = [PageType::NOTAB; 1024];
        let gfns: Vec<Gfn> = (0..1024).map(Gfn).collect();
        domain.page_types(&gfns, &mut types).unwrap();
        for (pfn, page_type) in (0..).zip(types) {
            let expected = if holes.contains(&pfn) {
                PageType::XTAB
            } else {
                PageType::NOTAB
            };
            assert_eq!(page_type, expected, "{pfn:#x}");
        }
        assert_eq!(domain.hvm().unwrap().hvm_param(1).unwrap(), 0xf_effc);
        assert!(domain.vcpu_online(0).unwrap());
    }
}

#[test]
fn a_pv_guest_suspends_and_resumes_to_the_same_state() {
    for spec in specs() {
        let host = host();
        let domain = host.domain(host.create_guest(&spec).unwrap()).unwrap();
        let (width, dx, store) = match spec.width {
            8 => (8, 0x268, 0x38),
            _ => (4, 0x20c, 0x2c),
        };
        let context = domain.pv().unwrap().vcpu_state(0, VcpuBlob::Basic).unwrap();
        let start_info = word(&context, dx, width);
        let before = read(&*domain, start_info);
        domain.suspend().unwrap();
        assert_eq!(
            domain.info().unwrap().shutdown,
            Some(ShutdownReason::Suspend)
        );
        let first = domain.pv().unwrap().vcpu_state(0, VcpuBlob::Basic).unwrap();
        let suspended = read(&*domain, start_info);
        assert_eq!(
            word(&suspended[..], store, width),
            17,
            "the pfn of the store ring"
        );
        domain.resume().unwrap();
        assert_eq!(read(&*domain, start_info), before);
        domain.suspend().unwrap();
        assert_eq!(read(&*domain, start_info), suspended);
        assert_eq!(
            domain.pv().unwrap().vcpu_state(0, VcpuBlob::Basic).unwrap(),
            first
        );
    }
}

#[test]
fn destroying_a_guest_gives_everything_back() {
    let host = host();
    let free = host.free_pages();
    let mut all = specs();
    all.push(GuestSpec::new("hvm", GuestKind::Hvm, 16));
    let ids: Vec<_> = all
        .iter()
        .map(|spec| host.create_guest(spec).unwrap())
        .collect();
    for domid in ids {
        host.domain(domid).unwrap().destroy().unwrap();
    }
    assert_eq!(host.free_pages(), free);
    // Freed memory reads as zero.
    let domain = host
        .domain(host.create_domain(GuestKind::Pvh, 1, 1 << 16).unwrap())
        .unwrap();
    let mut gfns: Vec<Gfn> = (0..20_000).map(Gfn).collect();
    assert_eq!(domain.populate(0, &mut gfns).unwrap(), 20_000);
    for batch in gfns.chunks(1024) {
        let pages = domain
            .map(batch, Access::Read)
            .unwrap()
            .all_mapped()
            .unwrap();
        assert!(
            pages
                .iter()
                .all(|(_, page)| page.read_entries() == [0; 512])
        );
    }
}

/// Xen leaves it to the caller not to populate a translated guest's pfn twice; the mock refuses it.
#[test]
fn a_translated_guests_pfn_is_populated_once() {
    let host = MockHost::ephemeral(&HostConfig {
        memory_pages: 1 << 14,
        ..HostConfig::default()
    })
    .unwrap();
    let domid = host.create_domain(GuestKind::Pvh, 1, 2048).unwrap();
    let guest = host.domain(domid).unwrap();
    assert_eq!(guest.populate(0, &mut [Gfn(2)]), Ok(1));
    let mut again = [Gfn(0), Gfn(1), Gfn(2), Gfn(3)];
    assert_eq!(guest.populate(0, &mut again), Ok(2));
    assert_eq!(guest.populate(9, &mut [Gfn(512), Gfn(0)]), Ok(1));
    assert_eq!(guest.info().unwrap().tot_pages, 515);
}
