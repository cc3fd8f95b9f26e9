//! A mock host's files after its process has ended: closed, in use, killed, damaged, full.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use xsr_format::frame::{Gfn, PageType};
use xsr_xen_backend::Errno;
use xsr_xen_backend::domain_store::DomainStore;
use xsr_xen_backend::mock::{DomainState, GuestSpec, HostConfig, MockError, MockHost};
use xsr_xen_backend::{Access, DomId, Domain, GuestKind, Host, RingGrant, TscInfo, VcpuBlob};

fn config() -> HostConfig {
    HostConfig {
        memory_pages: 1 << 15,
        ..HostConfig::default()
    }
}

fn contents(domain: &dyn Domain, gfns: &[Gfn]) -> Vec<[u64; 512]> {
    let pages = domain
        .map(gfns, Access::Read)
        .unwrap()
        .all_mapped()
        .unwrap();
    pages.iter().map(|(_, page)| page.read_entries()).collect()
}

/// Frames of a PV guest, by pfn.
fn pv_frames(domain: &dyn Domain) -> Vec<Gfn> {
    let m2p = domain.pv().unwrap().m2p().unwrap();
    let mut frames: Vec<_> = (0..=m2p.max_mfn().0)
        .map(|mfn| (m2p.pfn(xsr_format::frame::Mfn(mfn)).unwrap().0, Gfn(mfn)))
        .filter(|(pfn, _)| *pfn != u64::MAX)
        .collect();
    frames.sort_unstable_by_key(|(pfn, _)| *pfn);
    frames.into_iter().map(|(_, gfn)| gfn).collect()
}

/// An earlier version locks a host in another way: the two must not work on one.
#[test]
fn a_host_of_another_layout_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(MockHost::create(dir.path(), &config()).unwrap());
    let file = dir.path().join("host.json");
    let text = fs::read_to_string(&file).unwrap();
    let older = text.replace("\"format\": 3", "\"format\": 2");
    assert_ne!(older, text);
    fs::write(&file, older).unwrap();
    let error = MockHost::open(dir.path()).unwrap_err();
    assert!(matches!(error, MockError::OtherLayout { layout: 2, .. }));
    assert!(error.to_string().contains("another version"), "{error}");
    fs::write(&file, text).unwrap();
    MockHost::open(dir.path()).unwrap();
}

#[test]
fn all_there_is_survives_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let host = MockHost::create(dir.path(), &config()).unwrap();
    let pv = host
        .create_guest(&GuestSpec::new("pv", GuestKind::Pv, 8))
        .unwrap();
    let hvm = host
        .create_guest(&GuestSpec::new("hvm", GuestKind::Hvm, 8))
        .unwrap();
    let domain = host.domain(pv).unwrap();
    let frames = pv_frames(&*domain);
    let ring = RingGrant {
        gfn: Some(frames[3]),
        backend: DomId(0),
    };
    domain.seed_grants(ring, ring).unwrap();
    host.userdata_store(pv, "domain-json", b"{}").unwrap();
    domain.suspend().unwrap();
    let before = (
        host.show(pv).unwrap(),
        host.show(hvm).unwrap(),
        contents(&*domain, &frames),
        domain.pv().unwrap().vcpu_state(0, VcpuBlob::Basic).unwrap(),
        domain.cpu_policy().unwrap(),
        host.domain(hvm)
            .unwrap()
            .hvm()
            .unwrap()
            .hvm_context()
            .unwrap(),
        host.free_pages(),
    );
    drop((domain, host));

    let host = MockHost::open(dir.path()).unwrap();
    let domain = host.domain(pv).unwrap();
    let after = (
        host.show(pv).unwrap(),
        host.show(hvm).unwrap(),
        contents(&*domain, &frames),
        domain.pv().unwrap().vcpu_state(0, VcpuBlob::Basic).unwrap(),
        domain.cpu_policy().unwrap(),
        host.domain(hvm)
            .unwrap()
            .hvm()
            .unwrap()
            .hvm_context()
            .unwrap(),
        host.free_pages(),
    );
    assert!(before == after);
    assert_eq!(after.0.summary.state, DomainState::Suspended);
    assert_eq!(
        host.userdata_get(pv, "domain-json").unwrap().unwrap(),
        b"{}"
    );
    // It resumes where it was; a new domain gets its own number.
    domain.resume().unwrap();
    let new = host.create_domain(GuestKind::Pvh, 1, 1).unwrap();
    assert!(new > hvm);
}

#[test]
fn a_host_is_open_to_several_at_a_time_and_each_sees_what_the_others_do() {
    let dir = tempfile::tempdir().unwrap();
    let one = MockHost::create(dir.path(), &config()).unwrap();
    let other = MockHost::open_or_create(dir.path(), &config()).unwrap();
    let free = one.free_pages();
    let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
    let web = one.create_guest(&spec).unwrap();
    assert_eq!(other.list().unwrap(), one.list().unwrap());
    assert_eq!(other.free_pages(), one.free_pages());
    let taken = other.create_guest(&spec).unwrap_err();
    assert!(matches!(taken, MockError::NameTaken { .. }), "{taken}");
    let mail = GuestSpec::new("mail", GuestKind::Pv, 8);
    let mail = other.create_guest(&mail).unwrap();
    assert!(mail > web, "a number of its own");
    let [here, there] = [&one, &other].map(|host| host.domain(web).unwrap());
    here.suspend().unwrap();
    assert_eq!(other.show(web).unwrap(), one.show(web).unwrap());
    there.resume().unwrap();
    other.rename(web, "site").unwrap();
    other.userdata_store(web, "key", b"kept").unwrap();
    assert_eq!(one.find("site").unwrap(), web);
    assert_eq!(one.userdata_get(web, "key").unwrap().unwrap(), b"kept");
    // Frames that two hosts take alternately belong to only one domain each.
    let new = [&one, &other].map(|host| {
        let domid = host.create_domain(GuestKind::Pvh, 1, 1 << 12).unwrap();
        host.domain(domid).unwrap()
    });
    for pfn in 0..600 {
        for domain in &new {
            assert_eq!(domain.populate(0, &mut [Gfn(pfn)]).unwrap(), 1);
        }
    }
    for (value, domain) in (7_u8..).zip(&new) {
        let page = vec![value; 4096];
        for pfn in 0..600 {
            assert!(domain.write_pages(&[Gfn(pfn)], &page).unwrap().is_empty());
        }
    }
    let gfns: Vec<Gfn> = (0..600).map(Gfn).collect();
    for (value, domain) in (7_u8..).zip(&new) {
        let word = u64::from_ne_bytes([value; 8]);
        let pages = contents(&**domain, &gfns);
        assert!(pages.iter().flatten().all(|found| *found == word));
    }
    // If one host destroys a domain, it is gone for the other, which has a handle on it.
    there.destroy().unwrap();
    for error in [
        here.info().map(drop).unwrap_err(),
        here.map(&[Gfn(0)], Access::Read).map(drop).unwrap_err(),
        here.pause().unwrap_err(),
    ] {
        assert_eq!(error.errno, Errno::ESRCH);
    }
    assert!(one.find("site").is_err());
    for host in [&one, &other] {
        for domain in host.domains().unwrap() {
            host.domain(domain.domid).unwrap().destroy().unwrap();
        }
        assert_eq!((one.free_pages(), other.free_pages()), (free, free));
    }
}

/// The counters of a number continue when the number is reused.
#[test]
fn a_later_domain_with_the_number_is_not_taken_for_the_earlier_one() {
    let dir = tempfile::tempdir().unwrap();
    let one = MockHost::create(dir.path(), &config()).unwrap();
    let other = MockHost::open(dir.path()).unwrap();
    let domid = one.create_domain(GuestKind::Pvh, 1, 16).unwrap();
    let earlier = other.domain(domid).unwrap();
    one.domain(domid).unwrap().destroy().unwrap();
    let record = dir.path().join("host.json");
    let host = fs::read_to_string(&record).unwrap();
    let next = host.replace("\"next_domid\": 2", "\"next_domid\": 1");
    assert!(next != host);
    fs::write(&record, next).unwrap();
    assert_eq!(one.create_domain(GuestKind::Pvh, 1, 16).unwrap(), domid);
    assert_eq!(earlier.info().unwrap_err().errno, Errno::ESRCH);
    assert_eq!(earlier.destroy().unwrap_err().errno, Errno::ESRCH);
    other.domain(domid).unwrap().info().unwrap();
}

#[test]
fn a_domain_that_a_command_of_another_process_works_on_is_locked() {
    let dir = tempfile::tempdir().unwrap();
    let one = MockHost::create(dir.path(), &config()).unwrap();
    let other = MockHost::open(dir.path()).unwrap();
    let web = GuestSpec::new("web", GuestKind::Pvh, 8);
    let mail = GuestSpec::new("mail", GuestKind::Pvh, 8);
    for spec in [&web, &mail] {
        one.create_guest(spec).unwrap();
    }
    let stores: [&dyn DomainStore; 2] = [&one, &other];
    let [web, mail] = ["web", "mail"].map(|name| stores[0].find(name).unwrap());
    let lock = stores[0].lock(web, "xsr save web").unwrap();
    let locked = stores[1].lock(web, "xsr migrate web").unwrap_err();
    let said = format!("in use by process {} (xsr save web)", std::process::id());
    assert!(locked.to_string().contains(&said), "{locked}");
    drop(stores[1].lock(mail, "xsr save mail").unwrap());
    drop(lock);
    drop(stores[1].lock(web, "xsr migrate web").unwrap());
    // Destroying the domain does not remove the lock.
    let lock = stores[0].lock(web, "xsr save web").unwrap();
    let _ = stores[1].destroy(web, Duration::ZERO).unwrap();
    drop(lock);
}

/// Many threads use the same machine through two handles, like two processes.
#[test]
fn what_is_done_at_the_same_time_is_done_once() {
    const EACH: usize = 12;
    let dir = tempfile::tempdir().unwrap();
    let one = MockHost::create(dir.path(), &config()).unwrap();
    let free = one.free_pages();
    let made: Vec<DomId> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|number| {
                let host = match number % 2 {
                    0 => one.clone(),
                    _ => MockHost::open(dir.path()).unwrap(),
                };
                scope.spawn(move || {
                    let mut made = Vec::new();
                    for turn in 0..EACH {
                        let name = format!("guest-{number}-{turn}");
                        let spec = GuestSpec::new(name, GuestKind::Pvh, 4);
                        let domid = host.create_guest(&spec).unwrap();
                        match turn % 2 {
                            0 => host.domain(domid).unwrap().destroy().unwrap(),
                            _ => made.push(domid),
                        }
                    }
                    made
                })
            })
            .collect();
        let joined = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap());
        joined.collect()
    });
    let unique: std::collections::BTreeSet<_> = made.iter().collect();
    assert_eq!(unique.len(), 4 * EACH / 2);
    assert_eq!(one.list().unwrap().len(), unique.len());
    for domid in &made {
        one.domain(*domid).unwrap().destroy().unwrap();
    }
    assert_eq!(one.free_pages(), free);
}

#[test]
fn a_domain_may_be_called_what_a_nameless_one_is_shown_as() {
    let host = MockHost::ephemeral(&config()).unwrap();
    let spec = GuestSpec::new("domain-1", GuestKind::Pvh, 8);
    host.create_guest(&spec).unwrap();
    let nameless = host.create_domain(GuestKind::Pvh, 1, 16).unwrap();
    let store: &dyn DomainStore = &host;
    let named = store.find("domain-1").unwrap();
    assert_eq!(store.name(named).unwrap().as_deref(), Some("domain-1"));
    assert_eq!(store.list().unwrap()[1].name, None);
    assert_eq!(host.show(nameless).unwrap().summary.name, "domain-2");
    store.rename(named, "domain-1", "web").unwrap();
}

#[test]
fn what_is_no_host_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = MockHost::open(dir.path());
    assert!(matches!(open, Err(MockError::NotAHost { .. })));
    fs::write(dir.path().join("letter"), "Dear Sir").unwrap();
    let create = MockHost::create(dir.path(), &config());
    assert!(matches!(create, Err(MockError::Occupied { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_damaged_state_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let host = MockHost::create(dir.path(), &config()).unwrap();
    host.create_domain(GuestKind::Pv, 1, 1).unwrap();
    drop(host);
    fs::write(dir.path().join("domains/1/state.json"), "{").unwrap();
    let message = MockHost::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("domains/1/state.json"), "{message}");
}

const CRASH_DIR: &str = "XSR_TEST_CRASH_DIR";

/// Not a test itself: the process that [`a_killed_process_loses_nothing_else`] starts, and that
/// dies in the middle of its work.
#[test]
fn die_half_way() {
    let Some(dir) = std::env::var_os(CRASH_DIR) else {
        return;
    };
    let host = MockHost::open(Path::new(&dir)).unwrap();
    let domain = host
        .domain(host.create_domain(GuestKind::Pvh, 1, 1 << 14).unwrap())
        .unwrap();
    for batch in 0..3 {
        let mut gfns: Vec<Gfn> = (batch * 1024..(batch + 1) * 1024).map(Gfn).collect();
        domain.populate(0, &mut gfns).unwrap();
    }
    std::process::abort();
}

#[test]
fn a_killed_process_loses_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let host = MockHost::create(dir.path(), &config()).unwrap();
    let free = host.free_pages();
    let spec = GuestSpec::new("bystander", GuestKind::Pv, 8);
    let bystander = host.create_guest(&spec).unwrap();
    let frames = pv_frames(&*host.domain(bystander).unwrap());
    let before = contents(&*host.domain(bystander).unwrap(), &frames);
    let free_before = host.free_pages();
    drop(host);

    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "die_half_way"])
        .env(CRASH_DIR, dir.path())
        .output()
        .unwrap();
    assert!(!child.status.success(), "it was to die");
    // A domain that was being created or destroyed when the process died.
    fs::create_dir_all(dir.path().join("domains/99/blobs")).unwrap();
    fs::create_dir_all(dir.path().join("domains/98.dead")).unwrap();

    let host = MockHost::open(dir.path()).unwrap();
    assert_eq!(contents(&*host.domain(bystander).unwrap(), &frames), before);
    let [_, victim] = host.list().unwrap().try_into().unwrap();
    assert_eq!(
        (victim.tot_pages, victim.state),
        (3072, DomainState::Paused)
    );
    assert_eq!(host.free_pages(), free_before - 3072 - 2);
    host.domain(victim.domid).unwrap().destroy().unwrap();
    host.domain(bystander).unwrap().destroy().unwrap();
    assert_eq!(host.free_pages(), free);
}

#[test]
fn frames_without_a_domain_are_freed_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let host = MockHost::create(dir.path(), &config()).unwrap();
    let free = host.free_pages();
    let lost = host
        .create_guest(&GuestSpec::new("lost", GuestKind::Pv, 8))
        .unwrap();
    drop(host);
    // The state after a process died between removing the domain and freeing its memory.
    fs::remove_dir_all(dir.path().join(format!("domains/{}", lost.0))).unwrap();
    fs::write(dir.path().join("open"), 1_u64.to_le_bytes()).unwrap();
    let host = MockHost::open(dir.path()).unwrap();
    assert_eq!(host.free_pages(), free);
    let domain = host
        .domain(host.create_domain(GuestKind::Pv, 1, 1 << 15).unwrap())
        .unwrap();
    let mut gfns: Vec<Gfn> = (0..2048).map(Gfn).collect();
    domain.populate(0, &mut gfns).unwrap();
    assert!(
        contents(&*domain, &gfns)
            .iter()
            .all(|page| *page == [0; 512])
    );
}

#[test]
fn frames_of_a_domain_half_removed_are_freed() {
    let dir = tempfile::tempdir().unwrap();
    let host = MockHost::create(dir.path(), &config()).unwrap();
    let free = host.free_pages();
    let lost = host
        .create_guest(&GuestSpec::new("lost", GuestKind::Pv, 8))
        .unwrap();
    // Closed properly, so that only the directory's name shows the removal.
    drop(host);
    let domains = dir.path().join("domains");
    let dead = domains.join(format!("{}.dead", lost.0));
    fs::rename(domains.join(lost.0.to_string()), &dead).unwrap();
    let host = MockHost::open(dir.path()).unwrap();
    assert_eq!(host.free_pages(), free);
    assert!(!dead.exists());
}

#[test]
fn a_domain_that_cannot_be_forgotten_stays() {
    let dir = tempfile::tempdir().unwrap();
    let host = MockHost::create(dir.path(), &config()).unwrap();
    let free = host.free_pages();
    let spec = GuestSpec::new("stays", GuestKind::Hvm, 8);
    let domid = host.create_guest(&spec).unwrap();
    let domain = host.domain(domid).unwrap();
    let before = host.show(domid).unwrap();
    // A file at the path that the directory is renamed to.
    let dead = dir.path().join(format!("domains/{}.dead", domid.0));
    fs::write(&dead, "").unwrap();
    assert_eq!(domain.destroy().unwrap_err().errno, Errno::EIO);
    assert!(host.show(domid).unwrap() == before);
    fs::remove_file(&dead).unwrap();
    // The remains of an earlier domain of that number do not interfere.
    fs::create_dir_all(dead.join("blobs")).unwrap();
    domain.destroy().unwrap();
    assert_eq!(host.free_pages(), free);
    assert!(!dead.exists());
}

/// All visible state of a PV guest.
fn all_of(host: &MockHost, domid: DomId, frames: &[Gfn]) -> impl PartialEq + use<> {
    let domain = host.domain(domid).unwrap();
    (
        host.show(domid).unwrap(),
        contents(&*domain, frames),
        domain.pv().unwrap().vcpu_state(0, VcpuBlob::Basic).unwrap(),
        domain.cpu_policy().unwrap(),
        host.userdata_get(domid, "key").unwrap(),
        host.free_pages(),
    )
}

#[test]
fn a_change_that_cannot_be_kept_is_none() {
    for width in [8, 4] {
        let dir = tempfile::tempdir().unwrap();
        let host = MockHost::create(dir.path(), &config()).unwrap();
        let spec = GuestSpec {
            width,
            ..GuestSpec::new(format!("pv{width}"), GuestKind::Pv, 8)
        };
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let frames = pv_frames(&*domain);
        let state = dir.path().join(format!("domains/{}", domid.0));
        let away = dir.path().join("away");
        let record_in_the_way = state.join("state.json.new");
        let refused = |change: &dyn Fn() -> Option<Errno>| {
            let before = all_of(&host, domid, &frames);
            // No file can be written.
            fs::rename(&state, &away).unwrap();
            assert_eq!(change(), Some(Errno::EIO));
            fs::rename(&away, &state).unwrap();
            assert!(before == all_of(&host, domid, &frames), "nothing written");
            // All files but the last can be written.
            fs::create_dir(&record_in_the_way).unwrap();
            assert_eq!(change(), Some(Errno::EIO));
            fs::remove_dir(&record_in_the_way).unwrap();
            assert!(before == all_of(&host, domid, &frames), "half written");
        };
        let errno = |result: Result<(), xsr_xen_backend::BackendError>| Some(result.err()?.errno);
        refused(&|| errno(domain.pause()));
        refused(&|| errno(domain.suspend()));
        domain.suspend().unwrap();
        refused(&|| errno(domain.resume()));
        domain.resume().unwrap();
        // User data is a file of its own.
        let userdata_in_the_way = state.join("blobs/userdata-key.new");
        fs::create_dir(&userdata_in_the_way).unwrap();
        match host.userdata_store(domid, "key", b"value") {
            Err(MockError::Backend(error)) => assert_eq!(error.errno, Errno::EIO),
            other => panic!("{other:?}"),
        }
        fs::remove_dir(&userdata_in_the_way).unwrap();
        assert_eq!(host.userdata_get(domid, "key").unwrap(), None);
        // The files are restored too.
        let context = fs::read(state.join("blobs/vcpu0-basic")).unwrap();
        assert_eq!(
            context,
            domain.pv().unwrap().vcpu_state(0, VcpuBlob::Basic).unwrap()
        );
    }
}

#[test]
fn a_full_host_refuses() {
    let host = MockHost::ephemeral(&HostConfig {
        memory_pages: 4096,
        ..config()
    })
    .unwrap();
    let domain = host
        .domain(host.create_domain(GuestKind::Pvh, 1, 1 << 20).unwrap())
        .unwrap();
    let free = host.free_pages();
    let failed = host.create_guest(&GuestSpec::new("large", GuestKind::Pv, 16));
    let Err(MockError::Backend(error)) = failed else {
        panic!("a guest larger than the host: {failed:?}");
    };
    assert_eq!(error.errno, Errno::ENOMEM);
    assert_eq!(host.free_pages(), free, "no part of it is left");
    let mut gfns: Vec<Gfn> = (0..4096).map(Gfn).collect();
    let done = domain.populate(0, &mut gfns).unwrap();
    assert_eq!(done as u64, free);
    assert_eq!(domain.populate(9, &mut [Gfn(1 << 20)]).unwrap(), 0);
    let refused = host.create_domain(GuestKind::Pv, 1, 1).unwrap_err();
    assert_eq!(refused.errno, Errno::ENOMEM);
}

#[test]
fn handles_work_from_many_threads() {
    let host = MockHost::ephemeral(&config()).unwrap();
    let workers: Vec<_> = (0..4_u64)
        .map(|worker| {
            let host = host.clone();
            thread::spawn(move || {
                let kind = if worker % 2 == 0 {
                    GuestKind::Pv
                } else {
                    GuestKind::Pvh
                };
                let domid = host.create_domain(kind, 1, 4096).unwrap();
                let domain = host.domain(domid).unwrap();
                let mut all = Vec::new();
                for batch in 0..4 {
                    let mut gfns: Vec<Gfn> = (batch * 512..(batch + 1) * 512).map(Gfn).collect();
                    assert_eq!(domain.populate(0, &mut gfns).unwrap(), 512);
                    let pages = domain
                        .map(&gfns, Access::Write)
                        .unwrap()
                        .all_mapped()
                        .unwrap();
                    for (n, page) in pages.iter() {
                        page.write_entry(0, worker << 32 | batch << 16 | n as u64);
                    }
                    all.extend(gfns);
                }
                (domid, worker, all)
            })
        })
        .collect();
    for handle in workers {
        let (domid, worker, gfns) = handle.join().unwrap();
        let domain = host.domain(domid).unwrap();
        // Two threads use the same domain.
        thread::scope(|scope| {
            for half in gfns.chunks(1024) {
                let domain = &*domain;
                scope.spawn(move || {
                    let mut types = vec![PageType::XTAB; half.len()];
                    domain.page_types(half, &mut types).unwrap();
                    assert!(types.iter().all(|t| *t == PageType::NOTAB));
                    for (page, expected) in contents(domain, half).iter().zip(0_u64..) {
                        assert_eq!(page[0] >> 32, worker);
                        assert_eq!(page[0] & 0xffff, expected % 512);
                    }
                });
            }
        });
    }
}

#[test]
fn names_are_unique_and_sane() {
    let host = MockHost::ephemeral(&config()).unwrap();
    let first = host
        .create_guest(&GuestSpec::new("one", GuestKind::Pvh, 4))
        .unwrap();
    let second = host.create_domain(GuestKind::Pvh, 1, 1).unwrap();
    assert_eq!(host.find("one").unwrap(), first);
    assert_eq!(host.find(&second.0.to_string()).unwrap(), second);
    assert!(matches!(
        host.find("two"),
        Err(MockError::NoSuchDomain { .. })
    ));
    assert!(matches!(
        host.rename(second, "one"),
        Err(MockError::NameTaken { .. })
    ));
    host.rename(second, "two").unwrap();
    host.rename(second, "two").unwrap();
    assert_eq!(host.find("two").unwrap(), second);
    for bad in ["", "7", "a/b", "..\0", &"x".repeat(65)] {
        assert!(
            matches!(host.rename(second, bad), Err(MockError::BadName { .. })),
            "{bad:?}"
        );
        assert!(matches!(
            host.userdata_store(second, bad, b""),
            Err(MockError::BadName { .. })
        ));
    }
}

#[test]
fn user_data_goes_with_the_domain() {
    let dir = tempfile::tempdir().unwrap();
    let host = MockHost::create(dir.path(), &config()).unwrap();
    let domid = host.create_domain(GuestKind::Hvm, 1, 1).unwrap();
    host.userdata_store(domid, "emulator", b"state").unwrap();
    assert_eq!(
        host.userdata_get(domid, "emulator").unwrap().unwrap(),
        b"state"
    );
    assert_eq!(host.userdata_get(domid, "other").unwrap(), None);
    host.domain(domid).unwrap().destroy().unwrap();
    let MockError::Backend(error) = host.userdata_get(domid, "emulator").unwrap_err() else {
        panic!("of a domain that is gone");
    };
    assert_eq!(error.errno, Errno::ESRCH);
    assert_eq!(fs::read_dir(dir.path().join("domains")).unwrap().count(), 0);
}

#[test]
fn grants_can_be_read_back() {
    let host = MockHost::ephemeral(&config()).unwrap();
    let domid = host.create_domain(GuestKind::Hvm, 1, 1).unwrap();
    let domain = host.domain(domid).unwrap();
    let ring = |gfn, backend| RingGrant {
        gfn,
        backend: DomId(backend),
    };
    domain
        .seed_grants(ring(Some(Gfn(5)), 3), ring(None, 0))
        .unwrap();
    domain
        .seed_grants(ring(None, 9), ring(Some(Gfn(6)), 4))
        .unwrap();
    let entries = host
        .grants(domid)
        .unwrap()
        .map(|entry| entry.map(|e| (e.gfn, e.backend.0)));
    assert_eq!(entries, [Some((5, 3)), Some((6, 4))]);
}

#[test]
fn two_hosts_give_the_same_guest_other_frames_and_the_same_contents() {
    let spec = GuestSpec::new("g", GuestKind::Pvh, 8);
    let [one, two] = [1, 2].map(|seed| {
        let host = MockHost::ephemeral(&HostConfig { seed, ..config() }).unwrap();
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        assert_eq!(
            domain.tsc_info().unwrap().incarnation,
            TscInfo::default().incarnation + 1
        );
        let gfns: Vec<Gfn> = (0..2048).map(Gfn).collect();
        contents(&*domain, &gfns)
    });
    assert!(one == two);
    let zeros = one.iter().filter(|page| **page == [0; 512]).count();
    assert!(
        (150..400).contains(&zeros),
        "about one page in eight is zero: {zeros}"
    );
    let mut different = one.clone();
    different.sort_unstable();
    different.dedup();
    assert_eq!(different.len(), one.len() - zeros + 1, "all others differ");
}
