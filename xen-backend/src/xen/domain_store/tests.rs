//! Tests of the domain store in xenstore together with libxl: domains that libxl made, locks across
//! processes, writers that die half-way.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use xsr_format::frame::Gfn;

use super::*;
use crate::domain_store::Extent;
use crate::mock::face::Face;
use crate::mock::{HostConfig, MockHost};
use crate::xen::LibxlFiles;
use crate::xenstore::{Work, Xenstore};
use crate::{GuestKind, NewDomain, Ring, Uuid};

/// A libxl domain on a Xen, with libxl's files below `root`.
struct OfLibxl {
    face: Face,
    host: XenHost,
    domain: DomainRef,
    root: tempfile::TempDir,
}

impl OfLibxl {
    fn store(&self) -> &dyn DomainStore {
        &self.host
    }
}

fn host(face: &Face, root: &Path) -> XenHost {
    let (hypercalls, store) = (Arc::new(face.clone()), Box::new(face.clone()));
    XenHost::with_files(hypercalls, store, LibxlFiles::below(root)).unwrap()
}

fn of_libxl() -> OfLibxl {
    let config = HostConfig {
        memory_pages: 1 << 13,
        ..HostConfig::default()
    };
    let face = Face::new(&MockHost::ephemeral(&config).unwrap());
    let root = tempfile::tempdir().unwrap();
    let host = host(&face, root.path());
    let new = NewDomain::new(GuestKind::Pvh, 1, 4).uuid(Uuid([0x11; 16]));
    let domain = DomainRef {
        domid: host.create(&new).unwrap(),
        uuid: new.uuid,
    };
    let n = domain.domid.0;
    let vm = format!("/vm/{}", domain.uuid);
    let nodes = [
        (format!("/local/domain/{n}/name"), "web".to_owned()),
        (format!("/local/domain/{n}/vm"), vm.clone()),
        (format!("{vm}/name"), "web".to_owned()),
        (format!("/libxl/{n}/type"), "pvh".to_owned()),
        (format!("/libxl/{n}/device/console/0/state"), "1".to_owned()),
    ];
    for (path, value) in nodes {
        face.write(&path, value.as_bytes()).unwrap();
    }
    let lib = root.path().join("var/lib/xen");
    fs::create_dir_all(&lib).unwrap();
    let json = lib.join(format!("userdata-d.{n}.{}.libxl-json", domain.uuid));
    fs::write(json, "{ \"libxl\": 1 }").unwrap();
    OfLibxl {
        face,
        host,
        domain,
        root,
    }
}

fn read(face: &Face, path: &str) -> Option<String> {
    text(face.read(path).unwrap())
}

#[test]
fn what_libxl_leaves_of_a_domain_is_named_and_not_touched() {
    let made = of_libxl();
    let n = made.domain.domid.0;
    let devices = ["vbd/51712", "vif/0"].map(|device| format!("/libxl/{n}/device/{device}"));
    for device in &devices {
        made.face.write(&format!("{device}/state"), b"4").unwrap();
    }
    let pid = format!("/local/domain/{n}/image/device-model-pid");
    made.face.write(&pid, b"4711").unwrap();
    made.host.set_configuration(made.domain, b"ours").unwrap();
    made.store().forget(made.domain).unwrap();
    assert_eq!(read(&made.face, &pid).as_deref(), Some("4711"));
    assert!(made.face.list(OURS).unwrap().is_empty(), "ours is gone");
    made.host.set_configuration(made.domain, b"ours").unwrap();
    let destroyed = made.host.destroy(made.domain, Duration::ZERO).unwrap();
    let lib = made.root.path().join("var/lib/xen");
    let file = lib.join(format!("userdata-d.{n}.{}.libxl-json", made.domain.uuid));
    let mut expected = vec![
        LeftBehind::File(file.clone()),
        LeftBehind::Process {
            pid: 4711,
            node: pid.clone(),
        },
    ];
    expected.extend(devices.clone().map(LeftBehind::Device));
    assert_eq!(destroyed.left_behind, expected);
    assert_eq!(destroyed.outcome, DestroyOutcome::Gone);
    assert!(file.exists());
    assert_eq!(read(&made.face, &pid).as_deref(), Some("4711"));
    assert_eq!(made.face.list(&devices[0]).unwrap(), ["state"]);
    assert!(made.face.list(OURS).unwrap().is_empty(), "ours is gone");
}

#[test]
fn a_domain_of_libxl_without_devices_leaves_no_node() {
    let made = of_libxl();
    let destroyed = made.host.destroy(made.domain, Duration::ZERO).unwrap();
    assert!(matches!(&destroyed.left_behind[..], [LeftBehind::File(_)]));
    for tree in ["/local/domain", "/vm", "/libxl", OURS] {
        assert!(made.face.list(tree).unwrap().is_empty(), "{tree}");
    }
}

/// Two domains have one UUID while one of them moves to the other on this host.
#[test]
fn what_a_copy_on_the_same_host_has_stays() {
    let made = of_libxl();
    let vm = format!("/vm/{}", made.domain.uuid);
    let other = "/local/domain/99/vm";
    made.face.write(other, vm.as_bytes()).unwrap();
    drop(made.host.destroy(made.domain, Duration::ZERO).unwrap());
    assert_eq!(made.face.list("/local/domain").unwrap(), ["99"]);
    assert_eq!(made.face.list("/libxl").unwrap(), [""; 0]);
    assert!(read(&made.face, &format!("{vm}/name")).is_some());
}

#[test]
fn the_configuration_of_libxl_comes_first_and_is_never_written() {
    let made = of_libxl();
    let get = || made.host.configuration(made.domain).unwrap().unwrap();
    let its = get();
    let ConfigurationKeeper::Libxl(path) = &its.keeper else {
        panic!("{its:?}");
    };
    assert_eq!(its.bytes, b"{ \"libxl\": 1 }");
    made.host.set_configuration(made.domain, b"ours").unwrap();
    assert_eq!(get(), its);
    let destroyed = made.host.destroy(made.domain, Duration::ZERO).unwrap();
    assert_eq!(destroyed.left_behind.len(), 1);
    assert_eq!(fs::read(path).unwrap(), its.bytes);
}

/// xl does not know our nodes.
#[test]
fn what_is_kept_of_a_domain_that_xl_destroyed_is_removed_by_the_next_command() {
    let made = of_libxl();
    made.host.set_configuration(made.domain, b"ours").unwrap();
    let new = NewDomain::new(GuestKind::Pvh, 1, 4).uuid(Uuid([0x33; 16]));
    let next = DomainRef {
        domid: made.host.create(&new).unwrap(),
        uuid: new.uuid,
    };
    made.host.open(made.domain).unwrap().destroy().unwrap();
    let kept = tree_of(made.domain);
    assert!(!made.face.list(&kept).unwrap().is_empty());
    let lock = made.host.lock(next, "xsr save next").unwrap();
    assert!(made.face.list(&kept).unwrap().is_empty());
    drop(lock);
    assert!(made.face.list(OURS).unwrap().is_empty());
}

#[test]
fn a_rename_reaches_the_second_place_of_the_name() {
    let made = of_libxl();
    made.host.rename(made.domain, "web", "db").unwrap();
    let second = format!("/vm/{}/name", made.domain.uuid);
    assert_eq!(read(&made.face, &second).as_deref(), Some("db"));
    assert_eq!(made.store().find("db").unwrap(), made.domain);
}

#[test]
fn a_lock_holds_across_handles_and_ends_with_its_process() {
    let made = of_libxl();
    let other = host(&made.face, made.root.path());
    let path = ours(made.domain, "lock");
    let lock = made.host.lock(made.domain, "xsr save web").unwrap();
    let refused = other.lock(made.domain, "xsr destroy web").unwrap_err();
    let pid = std::process::id();
    assert_eq!(
        refused.to_string(),
        format!(
            "{} is in use by process {pid} (xsr save web); wait until it ends",
            made.domain
        )
    );
    let value = made.face.read(&path).unwrap().unwrap();
    drop(lock);
    assert_eq!(read(&made.face, &path), None);
    let this = String::from_utf8(value).unwrap();
    let mut words: Vec<&str> = this.splitn(5, ' ').collect();
    // From another PID namespace, or from a system without /proc.
    for namespace in ["pid:[1]", "?"] {
        let unseen = [&words[..3], &[namespace, "xsr save web"]].concat();
        made.face.write(&path, unseen.join(" ").as_bytes()).unwrap();
        let refused = other.lock(made.domain, "xsr destroy web").unwrap_err();
        let remedy = format!(
            "which cannot be looked for from here: wait until it ends, or, if it \
                              surely has, `xenstore-rm {path}`"
        );
        assert!(refused.to_string().ends_with(&remedy), "{refused}");
    }
    // Left by a process of an earlier boot, or nonsense.
    words[2] = "00000000-another-boot";
    made.face.write(&path, words.join(" ").as_bytes()).unwrap();
    let lock = other.lock(made.domain, "xsr destroy web").unwrap();
    // The dead process's lock is not released later.
    assert!(
        read(&made.face, &path)
            .unwrap()
            .ends_with("xsr destroy web")
    );
    drop(lock);
    // A lock in another form, as a later version may write it.
    for text in ["nonsense", "v2 pid=7"] {
        made.face.write(&path, text.as_bytes()).unwrap();
        let refused = other.lock(made.domain, "xsr destroy web").unwrap_err();
        let refused = refused.to_string();
        let said = format!("in use by an unknown process ({text})");
        assert!(refused.contains(&said), "{refused}");
        assert!(
            refused.contains(&format!("`xenstore-rm {path}`")),
            "{refused}"
        );
        assert_eq!(read(&made.face, &path).as_deref(), Some(text));
    }
}

/// This process is killed, and its child continues to work on the domain.
#[test]
fn a_lock_that_is_passed_on_ends_with_the_child() {
    let made = of_libxl();
    let other = host(&made.face, made.root.path());
    let lock = || other.lock(made.domain, "xsr save web");
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let passed = made.host.lock(made.domain, "xsr migrate web").unwrap();
    passed.pass_to(child.id()).unwrap();
    let refused = lock().unwrap_err().to_string();
    let said = format!("in use by process {} (xsr migrate web)", child.id());
    assert!(refused.contains(&said), "{refused}");
    std::mem::forget(passed);
    child.kill().unwrap();
    child.wait().unwrap();
    drop(lock().unwrap());
    // The process that took the lock releases it, whichever process it names.
    let passed = made.host.lock(made.domain, "xsr migrate web").unwrap();
    passed.pass_to(1).unwrap();
    assert!(lock().is_err());
    drop(passed);
    drop(lock().unwrap());
    assert!(made.face.list(OURS).unwrap().is_empty());
}

/// An earlier process with the same number wrote the value that is replaced.
#[test]
fn a_value_is_kept_whatever_nodes_there_are() {
    let made = of_libxl();
    fs::remove_dir_all(made.root.path().join("var")).unwrap();
    let n = std::process::id();
    for next in 0..200 {
        let piece = ours(made.domain, &format!("configuration-{n}-{next}/0"));
        made.face.write(&piece, b"old").unwrap();
    }
    let head = ours(made.domain, CONFIGURATION);
    for next in 0..20 {
        let value = format!("3 configuration-{n}-{next}");
        made.face.write(&head, value.as_bytes()).unwrap();
        made.host.set_configuration(made.domain, b"new").unwrap();
        let kept = made.host.configuration(made.domain).unwrap().unwrap();
        assert_eq!(kept.bytes, b"new");
    }
}

/// A store that calls `happens` in each transaction, after its work and before its end.
struct Meanwhile<F> {
    face: Face,
    happens: F,
}

impl<F> std::fmt::Debug for Meanwhile<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meanwhile").finish_non_exhaustive()
    }
}

impl<F: Fn(&Face) + Send + Sync> Xenstore for Meanwhile<F> {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.face.read(path)
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.face.write(path, value)
    }

    fn exchange(&self, path: &str, old: &[u8], new: &[u8]) -> Result<bool, StoreError> {
        self.face.exchange(path, old, new)
    }

    fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        self.face.list(path)
    }

    fn transaction(&self, work: &mut Work<'_>) -> Result<(), StoreError> {
        self.face.transaction(&mut |nodes| {
            let result = work(nodes);
            (self.happens)(&self.face);
            result
        })
    }

    fn remove(&self, path: &str) -> Result<(), StoreError> {
        self.face.remove(path)
    }

    fn let_have(&self, path: &str, domid: DomId, owner: bool) -> Result<(), StoreError> {
        self.face.let_have(path, domid, owner)
    }

    fn resumed(&self, domid: DomId) -> Result<(), StoreError> {
        self.face.resumed(domid)
    }

    fn introduce(&self, domid: DomId, frame: Gfn, port: u32) -> Result<(), StoreError> {
        self.face.introduce(domid, frame, port)
    }
}

fn with(made: &OfLibxl, happens: impl Fn(&Face) + Send + Sync + 'static) -> XenHost {
    let face = made.face.clone();
    let store = Meanwhile { face, happens };
    XenHost::over(Arc::new(made.face.clone()), Box::new(store)).unwrap()
}

/// The other domain is created and named after the rename has listed the domains.
#[test]
fn a_name_that_another_domain_gets_meanwhile_is_not_given_twice() {
    let made = of_libxl();
    let new = NewDomain::new(GuestKind::Pvh, 1, 4).uuid(Uuid([0x33; 16]));
    let other = Arc::new(std::sync::OnceLock::new());
    let (maker, made_then) = (host(&made.face, made.root.path()), Arc::clone(&other));
    let store = with(&made, move |face| {
        made_then.get_or_init(|| {
            let domid = maker.create(&new).unwrap();
            let name = node(domid, "/name");
            face.write(&name, b"db").unwrap();
            domid
        });
    });
    let error = store.rename(made.domain, "web", "db").unwrap_err();
    let by = *other.get().unwrap();
    assert!(
        matches!(&error, DomainStoreError::NameTaken { by: found, .. } if found.domid == by),
        "{error}"
    );
    assert_eq!(
        made.store().name(made.domain).unwrap().as_deref(),
        Some("web")
    );
    // The remains of a domain that is gone do not reserve its name.
    made.host.domain(by).unwrap().destroy().unwrap();
    made.host.rename(made.domain, "web", "db").unwrap();
}

#[test]
fn a_domain_that_is_destroyed_meanwhile_is_not_renamed() {
    let made = of_libxl();
    let domain = made.domain;
    let other = host(&made.face, made.root.path());
    let host = with(&made, move |face| {
        if let Ok(domain) = other.domain(domain.domid) {
            domain.destroy().unwrap();
            // Any change makes the transaction start again.
            face.write("/libxl/note", b"1").unwrap();
        }
    });
    let error = host.rename(domain, "web", "other").unwrap_err();
    assert!(matches!(error, DomainStoreError::Gone { .. }), "{error}");
    let name = format!("/local/domain/{}/name", domain.domid.0);
    assert_eq!(read(&made.face, &name).as_deref(), Some("web"));
}

/// Another domain has the number by the time the old domain's data is removed.
#[test]
fn what_a_new_domain_keeps_is_not_taken_for_a_destroyed_ones() {
    let made = of_libxl();
    let stale = DomId(made.domain.domid.0 + 1);
    let old = DomainRef {
        domid: stale,
        uuid: Uuid([0x22; 16]),
    };
    made.face.write(OURS, b"").unwrap();
    made.face.write(&ours(old, EMULATORS), b"0 x").unwrap();
    let new = NewDomain::new(GuestKind::Pvh, 1, 4).uuid(Uuid([0x33; 16]));
    let domain = DomainRef {
        domid: stale,
        uuid: new.uuid,
    };
    let once = std::sync::Once::new();
    let maker = host(&made.face, made.root.path());
    let store = with(&made, move |face| {
        once.call_once(|| {
            assert_eq!(maker.create(&new).unwrap(), stale);
            face.write(&ours(domain, CONFIGURATION), b"0 x").unwrap();
        });
    });
    drop(store.lock(made.domain, "xsr save web").unwrap());
    assert!(
        made.face
            .read(&ours(domain, CONFIGURATION))
            .unwrap()
            .is_some()
    );
}

#[test]
fn what_an_earlier_domain_with_the_number_left_is_removed_when_a_new_one_comes() {
    let made = of_libxl();
    let before = DomainRef {
        uuid: Uuid([0x22; 16]),
        ..made.domain
    };
    made.face
        .write(&ours(before, "lock"), b"1 ? ? ? x")
        .unwrap();
    let handle = made.host.open(made.domain).unwrap();
    handle.populate(0, &mut [Gfn(0), Gfn(1)]).unwrap();
    let introduction = Introduction {
        name: "new",
        store: Ring {
            frame: Gfn(1),
            port: handle.alloc_unbound_port(DomId(0)).unwrap(),
        },
        console: None,
        extent: None,
    };
    made.store().introduce(made.domain, &introduction).unwrap();
    assert!(made.face.list(OURS).unwrap().is_empty());
    made.face.write(&ours(before, "emulators"), b"7").unwrap();
    let lock = made.host.lock(made.domain, "xsr restore").unwrap();
    made.store().introduce(made.domain, &introduction).unwrap();
    assert_eq!(made.face.list(&tree_of(made.domain)).unwrap(), [LOCK]);
    drop(lock);
    assert!(made.face.list(OURS).unwrap().is_empty());
    assert_eq!(
        made.store().name(made.domain).unwrap().as_deref(),
        Some("new")
    );
}

#[test]
fn a_guest_is_told_of_its_memory_and_its_vcpus() {
    let made = of_libxl();
    let handle = made.host.open(made.domain).unwrap();
    handle.populate(0, &mut [Gfn(0), Gfn(1)]).unwrap();
    let extent = Extent {
        max_memory_kib: 65536,
        target_memory_kib: 32768,
        video_memory_kib: 0,
        vcpus_online: vec![true, false],
    };
    let introduction = Introduction {
        name: "new",
        store: Ring {
            frame: Gfn(1),
            port: handle.alloc_unbound_port(DomId(0)).unwrap(),
        },
        console: None,
        extent: Some(&extent),
    };
    let below = format!("/local/domain/{}", made.domain.domid.0);
    let has = |node: &str| read(&made.face, &format!("{below}/{node}"));
    made.store().introduce(made.domain, &introduction).unwrap();
    for (node, value) in [
        ("memory/static-max", "65536"),
        ("memory/target", "32768"),
        ("memory/videoram", "0"),
        ("cpu/0/availability", "online"),
        ("cpu/1/availability", "offline"),
        ("name", "new"),
    ] {
        assert_eq!(has(node).as_deref(), Some(value), "{node}");
    }
    assert_eq!(has("control/shutdown").as_deref(), Some(""));
}

/// libxl changes the nodes, and not the configuration that it keeps.
#[test]
fn what_a_guest_is_told_now_is_read_from_its_nodes() {
    let made = of_libxl();
    let store = made.store();
    let below = format!("/local/domain/{}", made.domain.domid.0);
    let write = |node: &str, value: &str| {
        let path = format!("{below}/{node}");
        made.face.write(&path, value.as_bytes()).unwrap();
    };
    for node in ["memory/static-max", "memory/target"] {
        assert_eq!(store.extent(made.domain).unwrap(), None);
        write(node, "65536");
    }
    write("cpu/0/availability", "online");
    write("memory/target", "32768");
    let mut expected = Extent {
        max_memory_kib: 65536,
        target_memory_kib: 32768,
        video_memory_kib: 0,
        vcpus_online: vec![true],
    };
    assert_eq!(store.extent(made.domain).unwrap().as_ref(), Some(&expected));
    write("cpu/0/availability", "offline");
    write("memory/videoram", "4096");
    expected.video_memory_kib = 4096;
    expected.vcpus_online = vec![false];
    assert_eq!(store.extent(made.domain).unwrap(), Some(expected));
}

#[test]
fn what_is_left_in_xenstore_is_named_and_the_rest_is_removed() {
    let uuid = "11111111-1111-1111-1111-111111111111";
    for bad in 0..4 {
        let made = of_libxl();
        let domid = made.domain.domid;
        let failing = Failing {
            face: made.face.clone(),
            changes: Arc::default(),
            bad,
            once: true,
        };
        let host = XenHost::over(Arc::new(made.face.clone()), Box::new(failing)).unwrap();
        let n = domid.0;
        let paths = [
            format!("/libxl/{n}"),
            format!("/local/domain/0/backend/console/{n}"),
            format!("/local/domain/{n}"),
            format!("/vm/{uuid}"),
        ];
        let error = host.remove_nodes_of(domid).unwrap_err().to_string();
        let left = format!("left in xenstore: {}; xenstore-rm", paths[bad]);
        assert!(error.contains(&left), "{error}");
        for (at, path) in paths.iter().enumerate().filter(|(at, _)| *at != 1) {
            let there = !made.face.list(path).unwrap().is_empty();
            assert_eq!(there, at == bad, "{path}");
        }
    }
}

/// A store in which one change fails, and the following ones too unless `once`.
#[derive(Debug)]
struct Failing {
    face: Face,
    changes: Arc<AtomicUsize>,
    bad: usize,
    once: bool,
}

impl Failing {
    fn change(&self) -> Result<(), StoreError> {
        let n = self.changes.fetch_add(1, Ordering::Relaxed);
        match n == self.bad || n > self.bad && !self.once {
            true => Err(StoreError::Connection(Errno::EPIPE.into())),
            false => Ok(()),
        }
    }
}

impl Xenstore for Failing {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.face.read(path)
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.change()?;
        self.face.write(path, value)
    }

    fn exchange(&self, path: &str, old: &[u8], new: &[u8]) -> Result<bool, StoreError> {
        self.change()?;
        self.face.exchange(path, old, new)
    }

    fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        self.face.list(path)
    }

    fn transaction(&self, work: &mut Work<'_>) -> Result<(), StoreError> {
        self.change()?;
        self.face.transaction(work)
    }

    fn remove(&self, path: &str) -> Result<(), StoreError> {
        self.change()?;
        self.face.remove(path)
    }

    fn let_have(&self, path: &str, domid: DomId, owner: bool) -> Result<(), StoreError> {
        self.change()?;
        self.face.let_have(path, domid, owner)
    }

    fn resumed(&self, domid: DomId) -> Result<(), StoreError> {
        self.change()?;
        self.face.resumed(domid)
    }

    fn introduce(&self, domid: DomId, frame: Gfn, port: u32) -> Result<(), StoreError> {
        self.change()?;
        self.face.introduce(domid, frame, port)
    }
}

#[test]
fn a_writer_that_dies_leaves_the_old_configuration_or_the_new_one() {
    let (old, new) = (vec![1; 2 * PIECE], vec![2; 3 * PIECE + 1]);
    for once in [true, false] {
        let mut succeeded = false;
        for bad in 0.. {
            let made = of_libxl();
            // Remove libxl's configuration, so that ours is read.
            fs::remove_dir_all(made.root.path().join("var")).unwrap();
            made.host.set_configuration(made.domain, &old).unwrap();
            let changes = Arc::new(AtomicUsize::new(0));
            let failing = Failing {
                face: made.face.clone(),
                changes: Arc::clone(&changes),
                bad,
                once,
            };
            let hypercalls = Arc::new(made.face.clone());
            let writer = XenHost::over(hypercalls, Box::new(failing)).unwrap();
            let result = writer.set_configuration(made.domain, &new);
            let kept = made.host.configuration(made.domain).unwrap().unwrap();
            match &result {
                Ok(()) => assert!(kept.bytes == new, "change {bad}"),
                Err(_) => assert!(kept.bytes == old, "change {bad}"),
            }
            if result.is_err() && once {
                let below = format!("{OURS}/{}/{}", made.domain.domid.0, made.domain.uuid);
                assert_eq!(made.face.list(&below).unwrap().len(), 2, "no piece is left");
            }
            if changes.load(Ordering::Relaxed) <= bad {
                succeeded = result.is_ok();
                break;
            }
        }
        assert!(succeeded);
    }
}

#[test]
fn a_domain_that_stays_is_waited_for_until_the_time_is_up_and_no_longer() {
    let mut looks = 0;
    let outcome = wait_until_gone(Duration::ZERO, || {
        looks += 1;
        Ok(false)
    });
    assert_eq!((outcome, looks), (Ok(DestroyOutcome::StillDying), 1));
    let outcome = wait_until_gone(Duration::from_secs(60), || {
        looks += 1;
        Ok(looks == 4)
    });
    assert_eq!(outcome, Ok(DestroyOutcome::Gone));
    let error = BackendError::host("getdomaininfo", Errno::EPERM);
    let failed = wait_until_gone(Duration::from_secs(60), || Err(error.clone()));
    assert_eq!(failed, Err(error));
}
