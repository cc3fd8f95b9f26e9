//! Tests that a workload keeps a guest's rules: a save can read the resulting guest, and the dirty
//! log has exactly the pages that were written.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use xsr_format::frame::PageType;

use super::*;
use crate::mock::frames::FrameUse;
use crate::mock::layout::{DESCRIPTORS_PER_PAGE, VcpuLayout, read_word};
use crate::mock::pagetable::tests::check_counts;
use crate::mock::{GuestSpec, HostConfig, MemoryDigest, P2mStyle};
use crate::{DirtyBitmap, DirtyRead, Domain, Host, LogDirty, ShutdownReason, VcpuBlob};

const MIB: u64 = 8;
const PAGES: u64 = MIB << 8;

fn host(seed: u64) -> MockHost {
    MockHost::ephemeral(&HostConfig {
        memory_pages: 1 << 14,
        seed,
        ..HostConfig::default()
    })
    .expect("a host")
}

/// One guest of each kind.
fn specs() -> Vec<GuestSpec> {
    let mut specs = Vec::new();
    for (width, p2m) in [
        (8, P2mStyle::Linear),
        (8, P2mStyle::Tree),
        (4, P2mStyle::Linear),
        (4, P2mStyle::Tree),
    ] {
        specs.push(GuestSpec {
            width,
            p2m: Some(p2m),
            vcpus: 2,
            ballooned_pages: 20,
            ..GuestSpec::new(format!("pv{width}-{p2m:?}"), GuestKind::Pv, MIB)
        });
    }
    specs.push(GuestSpec::new("hvm", GuestKind::Hvm, MIB));
    specs.push(GuestSpec::new("pvh", GuestKind::Pvh, MIB));
    specs
}

fn churn(seed: u64) -> WorkloadSpec {
    WorkloadSpec {
        seed,
        rate: 50_000,
        working_set: 500,
        table_permille: 300,
        balloon_permille: 200,
        end: None,
    }
}

fn made(host: &MockHost, spec: &GuestSpec) -> (DomId, Box<dyn Domain>) {
    let domid = host.create_guest(spec).expect("a guest");
    (domid, host.domain(domid).expect("the guest"))
}

/// The pages in the log, read with `how`.
fn dirty(domain: &dyn Domain, how: DirtyRead) -> BTreeSet<Pfn> {
    let mut bitmap = DirtyBitmap::new(0x10_0000);
    let stats = domain.read_dirty(how, &mut bitmap).expect("a log");
    assert_eq!(stats.dirty_count, bitmap.count());
    bitmap.iter().collect()
}

fn digest(host: &MockHost, domid: DomId) -> MemoryDigest {
    host.memory_digest(domid).expect("a domain")
}

/// Checks that the counts equal the existing references.
fn check_references(host: &MockHost, domid: DomId) {
    let domain = host.mock_domain(domid).expect("the domain");
    let state = domain.dom.lock().expect("its state");
    let width = state.record.width;
    let layout = VcpuLayout::of(width);
    let mut others = Vec::new();
    for (n, vcpu) in (0_u32..).zip(&state.record.vcpus) {
        let Some(roots) = vcpu.roots else { continue };
        let top = if width == 4 { 3 } else { 4 };
        others.push((Mfn(roots.kernel), top));
        others.extend(roots.user.map(|user| (Mfn(user), top)));
        let name = crate::mock::pv::blob_name(n as usize, VcpuBlob::Basic);
        let context = &state.blobs[&name];
        let pages = layout
            .get(context, layout.gdt_ents)
            .div_ceil(DESCRIPTORS_PER_PAGE);
        for page in 0..usize::try_from(pages).expect("at most 14") {
            others.push((Mfn(layout.get(context, layout.gdt_frame(page))), 5));
        }
    }
    let frames = domain.machine.frames_of(domid);
    let frames: Vec<Gfn> = frames.iter().map(|mfn| Gfn(mfn.0)).collect();
    check_counts(host, domid, &frames, width, &others);
}

/// Checks that the p2m and the m2p agree, and that the frames are the guest's.
fn check_p2m(host: &MockHost, domid: DomId) {
    let domain = host.mock_domain(domid).expect("the domain");
    let state = domain.dom.lock().expect("its state");
    let p2m = domain.published_p2m(&state).expect("published");
    let mut pages = 0;
    for pfn in 0..p2m.pfns {
        if let Some(mfn) = domain.p2m_entry(&p2m, pfn) {
            assert!(domain.machine.frames.owned(mfn, domid).is_some());
            assert_eq!(domain.machine.m2p(mfn), Some(pfn));
            pages += 1;
        }
    }
    assert_eq!(pages, domain.machine.tot_pages(domid));
    assert_eq!(pages, domain.machine.frames_of(domid).len() as u64);
}

#[test]
fn the_log_has_the_pages_that_changed_and_no_others() {
    for spec in specs() {
        let host = host(1);
        let (domid, domain) = made(&host, &spec);
        let writes = WorkloadSpec::writes(7, 1, 300);
        let mut workload = host.workload(domid, &writes).expect("a workload");
        // The log is off: nothing is recorded.
        assert_eq!(workload.step(50).expect("running"), 50);
        domain.enable_log_dirty().expect("off before");
        assert_eq!(dirty(&*domain, DirtyRead::Peek), BTreeSet::new());
        let before = digest(&host, domid);
        assert_eq!(workload.step(200).expect("running"), 200);
        let changed: BTreeSet<Pfn> = digest(&host, domid)
            .differences(&before)
            .into_iter()
            .collect();
        assert!((100..=200).contains(&changed.len()), "{}", changed.len());
        for how in [DirtyRead::Peek, DirtyRead::Peek, DirtyRead::Clean] {
            assert_eq!(dirty(&*domain, how), changed, "{} {how:?}", spec.name);
        }
        assert_eq!(dirty(&*domain, DirtyRead::Clean), BTreeSet::new());
        let set: BTreeSet<Pfn> = workload.working_set().into_iter().collect();
        assert!(changed.is_subset(&set) && set.len() == 300);
    }
}

#[test]
fn churn_is_logged_down_to_page_tables_and_p2m() {
    for spec in specs() {
        let host = host(2);
        let (domid, domain) = made(&host, &spec);
        let mut workload = host.workload(domid, &churn(3)).expect("a workload");
        domain.enable_log_dirty().expect("off before");
        let before = digest(&host, domid);
        let logged = |workload: &mut Workload| {
            workload.step(1000).expect("running");
            dirty(&*domain, DirtyRead::Clean)
        };
        let log = logged(&mut workload);
        let after = digest(&host, domid);
        let missing: Vec<Pfn> = after
            .differences(&before)
            .into_iter()
            .filter(|pfn| !log.contains(pfn))
            .collect();
        assert_eq!(missing, [], "{}: changed, not logged", spec.name);
        let counts = workload.counts();
        assert_eq!(counts.operations(), 1000);
        assert!(counts.writes > 400 && counts.given_back > 20 && counts.taken > 20);
        if spec.kind == GuestKind::Pv {
            assert!(counts.table_updates > 200, "{counts:?}");
            let leaves: Vec<Pfn> = after
                .pages()
                .iter()
                .filter(|page| page.contents.is_none() && log.contains(&page.pfn))
                .map(|page| page.pfn)
                .collect();
            assert!(
                !leaves.is_empty(),
                "{}: a leaf of the p2m changed",
                spec.name
            );
            let tables = after
                .pages()
                .iter()
                .filter(|page| page.page_type == PageType::L1TAB && log.contains(&page.pfn));
            assert!(tables.count() > 0, "{}: a table changed", spec.name);
        }
    }
}

#[test]
fn the_same_seed_does_the_same_on_another_machine() {
    for spec in specs() {
        let run = |host_seed, seed| {
            let host = host(host_seed);
            let (domid, _) = made(&host, &spec);
            let before = digest(&host, domid);
            let mut workload = host.workload(domid, &churn(seed)).expect("a workload");
            workload.step(700).expect("running");
            (before, digest(&host, domid), workload.counts())
        };
        let (one, other, third) = (run(1, 5), run(2, 5), run(1, 6));
        // A p2m tree that is not published counts as data, and depends on the machine.
        let apart: BTreeSet<Pfn> = one.0.differences(&other.0).into_iter().collect();
        assert!(apart.len() <= 2, "{}: {apart:?}", spec.name);
        let after: BTreeSet<Pfn> = one.1.differences(&other.1).into_iter().collect();
        assert!(after.is_subset(&apart), "{}: {after:?}", spec.name);
        assert_eq!(one.2, other.2);
        assert!(one.1.differences(&third.1).len() > 100, "{}", spec.name);
    }
}

#[test]
fn steps_do_the_same_in_one_go_and_in_many() {
    let spec = &specs()[0];
    let run = |steps: &[u64]| {
        let host = host(1);
        let (domid, _) = made(&host, spec);
        let mut workload = host.workload(domid, &churn(4)).expect("a workload");
        for step in steps {
            assert_eq!(workload.step(*step).expect("running"), *step);
        }
        digest(&host, domid)
    };
    assert_eq!(run(&[300]), run(&[1, 64, 0, 65, 170]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Whatever a workload does, each reference is counted, p2m and m2p agree, no frame is lost,
    /// and all frames are free once the guest is gone.
    #[test]
    fn churn_keeps_the_hypervisors_books(
        which in 0_usize..4,
        seed in any::<u64>(),
        tables in 0_u16..600,
        balloon in 1_u16..400,
        steps in proptest::collection::vec(1_u64..400, 1..4),
    ) {
        let host = host(seed);
        let empty = host.free_pages();
        let (domid, domain) = made(&host, &specs()[which]);
        // All allocated frames that are not the guest's: shared_info and the grant table.
        let taken = |host: &MockHost| empty - host.free_pages();
        let spec = WorkloadSpec {
            table_permille: tables,
            balloon_permille: balloon,
            ..churn(seed)
        };
        let mut workload = host.workload(domid, &spec).expect("a workload");
        for step in steps {
            workload.step(step).expect("running");
            check_references(&host, domid);
            check_p2m(&host, domid);
            prop_assert_eq!(taken(&host), domain.info().expect("there").tot_pages + 2);
        }
        let counts = workload.counts();
        let pages = PAGES - 20 + counts.taken - counts.given_back;
        prop_assert_eq!(domain.info().expect("there").tot_pages, pages);
        domain.destroy().expect("there");
        prop_assert_eq!(host.free_pages(), empty);
    }
}

#[test]
fn pages_of_translated_guests_come_and_go() {
    for spec in &specs()[4..] {
        let host = host(1);
        let empty = host.free_pages();
        let (domid, domain) = made(&host, spec);
        let pages = domain.info().expect("there").tot_pages;
        let mut workload = host.workload(domid, &churn(9)).expect("a workload");
        workload.step(2000).expect("running");
        let counts = workload.counts();
        assert!(counts.given_back > counts.taken, "{counts:?}");
        let left = pages + counts.taken - counts.given_back;
        assert_eq!(domain.info().expect("there").tot_pages, left);
        assert_eq!(digest(&host, domid).pages().len() as u64, left);
        assert_eq!(host.free_pages(), empty - left - 2);
    }
}

#[test]
fn a_guest_that_does_not_run_does_nothing() {
    for spec in specs() {
        let host = host(1);
        let (domid, domain) = made(&host, &spec);
        let mut workload = host.workload(domid, &churn(1)).expect("a workload");
        domain.pause().expect("there");
        assert_eq!(workload.step(10).expect("there"), 0);
        domain.unpause().expect("paused");
        assert_eq!(workload.step(10).expect("there"), 10);
        domain.enable_log_dirty().expect("off");
        domain.suspend().expect("running");
        assert_eq!(workload.step(10).expect("there"), 0);
        // The kernel's last write is to start_info.
        let last = dirty(&*domain, DirtyRead::CleanFinal);
        let expected: &[u64] = if spec.kind == GuestKind::Pv {
            &[16]
        } else {
            &[]
        };
        assert_eq!(last, expected.iter().map(|pfn| Pfn(*pfn)).collect());
        domain.resume().expect("suspended");
        assert_eq!(workload.step(10).expect("there"), 10);
        domain.destroy().expect("there");
        let error = workload.step(1).expect_err("gone");
        assert_eq!(error.errno, Errno::ESRCH);
    }
}

/// Wait until `done`, for at most a minute.
fn wait(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it never happens"
        );
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_shuts_down_by_itself_once_it_has_done_so_much() {
    let host = host(1);
    for spec in specs() {
        let (domid, domain) = made(&host, &spec);
        for reason in [ShutdownReason::Poweroff, ShutdownReason::Crash] {
            let end = Some(WorkloadEnd { after: 100, reason });
            let work = WorkloadSpec { end, ..churn(1) };
            let mut work = host.workload(domid, &work).expect("a workload");
            // It does no work while the guest is paused, and so does not shut it down.
            domain.pause().expect("it runs");
            assert_eq!(work.step(1000).expect("there"), 0);
            assert_eq!(domain.info().expect("there").shutdown, None);
            domain.unpause().expect("it is paused");
            assert_eq!(work.step(1000).expect("there"), 100);
            assert_eq!(domain.info().expect("there").shutdown, Some(reason));
            assert_eq!(work.step(1000).expect("there"), 0);
            // The shutdown happens only once.
            domain.resume().expect("it is down");
            assert_eq!(work.step(1000).expect("there"), 1000);
        }
        domain.destroy().expect("there");
    }
    let suspends = WorkloadSpec {
        end: Some(WorkloadEnd {
            after: 0,
            reason: ShutdownReason::Suspend,
        }),
        ..churn(1)
    };
    let (domid, _) = made(&host, &specs()[0]);
    let refused = host.workload(domid, &suspends);
    assert!(matches!(refused, Err(MockError::BadSpec(_))));
}

#[test]
fn a_background_workload_rests_while_the_guest_does() {
    let host = host(1);
    let (domid, domain) = made(&host, &specs()[0]);
    let running = host.workload(domid, &churn(1)).expect("a workload");
    let running = running.run_in_background();
    wait(|| running.operations() > 500);
    domain.suspend().expect("running");
    assert_eq!(
        domain.info().expect("there").shutdown,
        Some(ShutdownReason::Suspend)
    );
    let still = digest(&host, domid);
    // A second guest with the same workload serves as a clock.
    let (clock, _) = made(&host, &specs()[5]);
    let clock = host.workload(clock, &churn(1)).expect("a workload");
    let clock = clock.run_in_background();
    wait(|| clock.operations() > 500);
    drop(clock);
    assert_eq!(digest(&host, domid), still);
    check_references(&host, domid);
    domain.resume().expect("suspended");
    let before = running.operations();
    wait(|| running.operations() > before + 500);
    let workload = running.stop().expect("no fault");
    assert!(workload.counts().operations() > before);
    check_references(&host, domid);
    check_p2m(&host, domid);
    // If the guest is destroyed, the work ends without an error.
    let running = workload.run_in_background();
    domain.destroy().expect("there");
    running.stop().expect("no fault");
}

#[test]
fn a_log_read_beside_a_running_guest_misses_nothing() {
    for spec in specs() {
        let host = host(1);
        let (domid, domain) = made(&host, &spec);
        domain.enable_log_dirty().expect("off");
        let before = digest(&host, domid);
        let workload = host.workload(domid, &churn(1)).expect("a workload");
        let running = workload.run_in_background();
        let mut all = BTreeSet::new();
        wait(|| {
            all.extend(dirty(&*domain, DirtyRead::Clean));
            running.operations() > 2000
        });
        domain.suspend().expect("running");
        all.extend(dirty(&*domain, DirtyRead::CleanFinal));
        let changed = digest(&host, domid).differences(&before);
        assert!(changed.len() > 50);
        let missed: Vec<Pfn> = changed
            .into_iter()
            .filter(|pfn| !all.contains(pfn))
            .collect();
        assert_eq!(missed, [], "{}", spec.name);
        running.stop().expect("no fault");
    }
}

#[test]
fn a_suspend_and_resume_leaves_memory_as_it_was() {
    for spec in specs() {
        let host = host(1);
        let (domid, domain) = made(&host, &spec);
        let before = digest(&host, domid);
        domain.suspend().expect("running");
        // A suspend only changes start_info's ring frames, which the digest leaves out.
        assert_eq!(digest(&host, domid), before);
        domain.resume().expect("suspended");
        assert_eq!(digest(&host, domid), before);
    }
}

/// `p2m_generation` and `max_pfn`.
fn shared_words(domain: &dyn Domain, width: u8) -> (u64, u64) {
    let layout = crate::mock::layout::SharedInfoLayout::of(width);
    let frame = domain.info().expect("there").shared_info_frame;
    let pages = domain.map(&[frame], crate::Access::Read).expect("mapped");
    let page = pages.page(0).expect("mapped").to_page();
    let word = |field| read_word(page.as_slice(), field, layout.width);
    (word(layout.p2m_generation), word(layout.max_pfn))
}

#[test]
fn the_p2m_grows_and_says_so() {
    for spec in &specs()[..4] {
        let host = host(1);
        let (domid, domain) = made(&host, spec);
        let mut workload = host.workload(domid, &churn(1)).expect("a workload");
        domain.enable_log_dirty().expect("off");
        let (generation, max_pfn) = shared_words(&*domain, spec.width);
        assert_eq!(max_pfn, PAGES);
        assert_eq!(workload.bump_p2m_generation(), Ok(true));
        let bumped = shared_words(&*domain, spec.width);
        assert_eq!(bumped, (generation + 2, PAGES));
        let grown = workload.grow_p2m(100);
        if spec.width == 4 && spec.p2m == Some(P2mStyle::Linear) {
            let error = grown.expect_err("no room behind it");
            assert_eq!(error.errno, Errno::EOPNOTSUPP);
            assert_eq!(shared_words(&*domain, spec.width), bumped);
            continue;
        }
        assert_eq!(grown, Ok(true));
        let (now, max_pfn) = shared_words(&*domain, spec.width);
        let linear = spec.p2m == Some(P2mStyle::Linear);
        assert_eq!(now, generation + if linear { 4 } else { 2 });
        assert_eq!(max_pfn, PAGES + 100);
        let pages = domain.info().expect("there").tot_pages;
        assert_eq!(pages, PAGES - 20 + 100);
        workload.step(500).expect("running");
        check_references(&host, domid);
        check_p2m(&host, domid);
        // Nothing happens while the guest is paused.
        domain.pause().expect("there");
        assert_eq!(workload.grow_p2m(1), Ok(false));
        assert_eq!(shared_words(&*domain, spec.width), (now, PAGES + 100));
    }
}

#[test]
fn only_pv_guests_have_a_p2m_of_their_own() {
    let host = host(1);
    let (domid, _) = made(&host, &specs()[4]);
    let mut workload = host.workload(domid, &churn(1)).expect("a workload");
    for result in [workload.bump_p2m_generation(), workload.grow_p2m(1)] {
        assert_eq!(result.expect_err("refused").errno, Errno::EINVAL);
    }
}

#[test]
fn a_workload_that_cannot_be_is_refused() {
    let host = host(1);
    let (domid, _) = made(&host, &specs()[0]);
    let good = churn(1);
    for bad in [
        WorkloadSpec {
            rate: 0,
            ..good.clone()
        },
        WorkloadSpec {
            working_set: 0,
            ..good.clone()
        },
        WorkloadSpec {
            table_permille: 801,
            ..good.clone()
        },
    ] {
        let error = host.workload(domid, &bad).expect_err("refused");
        assert!(matches!(error, MockError::BadSpec(_)), "{error}");
    }
    // A guest without memory has nothing to work on.
    for kind in [GuestKind::Pv, GuestKind::Pvh] {
        let empty = host.create_domain(kind, 1, 1).expect("room");
        let error = host.workload(empty, &good).expect_err("refused");
        assert!(matches!(error, MockError::Backend(e) if e.errno == Errno::EINVAL));
    }
}

#[test]
fn a_held_log_is_taken_by_off_and_on() {
    let host = host(1);
    let (domid, domain) = made(&host, &specs()[4]);
    host.hold_log_dirty(domid).expect("off");
    let refused = domain.enable_log_dirty().expect_err("held");
    assert_eq!(refused.errno, Errno::EINVAL);
    assert!(host.is_log_dirty(domid).expect("there"));
    domain.disable_log_dirty().expect("there");
    assert!(!host.is_log_dirty(domid).expect("there"));
    domain.enable_log_dirty().expect("off");
}

#[test]
fn without_shadow_paging_pv_guests_cannot_be_logged() {
    let host = MockHost::ephemeral(&HostConfig {
        memory_pages: 1 << 14,
        shadow_paging: false,
        ..HostConfig::default()
    })
    .expect("a host");
    for (spec, fine) in [(&specs()[0], false), (&specs()[4], true)] {
        let (_, domain) = made(&host, spec);
        match domain.enable_log_dirty() {
            Ok(()) => assert!(fine),
            Err(error) => assert!(!fine && error.errno == Errno::EOPNOTSUPP),
        }
    }
}

/// An entry that the hypervisor refuses leaves the table unchanged.
#[test]
fn a_bad_entry_changes_nothing() {
    let host = host(1);
    let (domid, _) = made(&host, &specs()[0]);
    let domain = host.mock_domain(domid).expect("the guest");
    let width = domain.pv().unwrap().guest_width().expect("a PV guest");
    let frames = domain.machine.frames_of(domid);
    let used_as = |level| {
        let table = frames.iter().copied().find(|mfn| {
            let frame = domain.machine.frames.owned(*mfn, domid);
            frame.is_some_and(|frame| frame.used_as == FrameUse::Table(level) && frame.validated)
        });
        table.expect("a table")
    };
    let (table, upper) = (used_as(1), used_as(2));
    let tables = crate::mock::pagetable::Tables::new(&domain.machine, &domain.dom, width);
    domain.enable_log_dirty().expect("off");
    let before = digest(&host, domid);
    for (place, entry) in [
        // A writable mapping of a table; a frame that is not the guest's; a reserved bit.
        (table, upper.0 << 12 | 3),
        (table, 1 << 12 | 1),
        (table, upper.0 << 12 | 1 | 1 << 7),
        // Not a level-1 table; not a frame of the guest.
        (upper, 0),
        (Mfn(0), 0),
    ] {
        assert_eq!(tables.update_l1(place, 3, entry), Err(Errno::EINVAL));
    }
    assert_eq!(digest(&host, domid), before);
    assert_eq!(dirty(&domain, DirtyRead::Peek), BTreeSet::new());
    check_references(&host, domid);
}

#[test]
fn pages_become_tables_and_data_again() {
    for spec in &specs()[..4] {
        let host = host(1);
        let (domid, domain) = made(&host, spec);
        let spec = WorkloadSpec {
            table_permille: 1000,
            balloon_permille: 0,
            ..churn(8)
        };
        let mut workload = host.workload(domid, &spec).expect("a workload");
        let types = |host: &MockHost| -> Vec<(Pfn, PageType)> {
            let digest = digest(host, domid);
            let pages = digest.pages().iter();
            pages.map(|page| (page.pfn, page.page_type)).collect()
        };
        domain.enable_log_dirty().expect("off");
        let (mut came, mut went) = (0, 0);
        for _ in 0..60 {
            let before = types(&host);
            workload.step(10).expect("running");
            let log = dirty(&*domain, DirtyRead::Clean);
            for (old, new) in before.into_iter().zip(types(&host)) {
                assert_eq!(old.0, new.0);
                if old.1 != new.1 {
                    assert!(log.contains(&old.0), "a change of type is a change");
                    match (old.1, new.1) {
                        (PageType::NOTAB, PageType::L1TAB_PINNED) => came += 1,
                        (PageType::L1TAB_PINNED, PageType::NOTAB) => went += 1,
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
        assert!(came > 10 && went > 10, "{came} came, {went} went");
        check_references(&host, domid);
    }
}
