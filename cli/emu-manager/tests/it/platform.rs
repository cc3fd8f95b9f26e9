//! Platform keys of a VM in xenstore, and their effect on a save or restore.

use std::fs;
use std::path::Path;
use std::process::Command;

use xsr_format::frame::Gfn;
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{Access, Domain, GuestKind, Host as _};

use crate::images::scratch;
use crate::machine::{DOMID, by_the_engine, empty, guest, shutdown};
use crate::restore::words;
use crate::xenopsd::{Ended, Kind, Target, Xenopsd, source};

/// Writes these keys below the domain's platform in the xenstore of `run`.
pub(crate) fn keys(run: &Path, keys: &[(&str, &str)]) {
    for (key, value) in keys {
        let path = run.join("xenstore/1/platform").join(key);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value).unwrap();
    }
}

fn with_run(run: &Path) -> impl FnMut(&mut Command) {
    move |command| {
        command.env("XSR_EMU_TEST_RUN", run);
    }
}

/// Restores `stream` with these keys; returns how the run ended, and the machine.
fn restored(kind: GuestKind, stream: &[u8], set: &[(&str, &str)], dir: &Path) -> (Ended, MockHost) {
    let (machine, ports) = empty(dir, kind);
    let run = dir.join("run");
    keys(&run, set);
    let (ours, go) = source(Kind::Pipe, dir, stream.to_vec(), stream.len());
    let words = words(kind, ports);
    let mut xenopsd = Xenopsd::start_with(&machine, &words, ours, &mut with_run(&run));
    xenopsd.say("restore:xenguest\n");
    let ended = xenopsd.end();
    drop(go);
    (ended, MockHost::open(&machine).unwrap())
}

#[test]
fn nomigrate_counts_by_its_value() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    for (value, fixed) in [
        ("true", true),
        ("TRUE", true),
        ("1", true),
        ("false", false),
        ("0", false),
        ("", false),
        ("tea", false),
    ] {
        let run = dir.path().join(format!("run-{value}"));
        keys(&run, &[("nomigrate", value)]);
        let target = Target::new(Kind::Pipe, dir.path(), true);
        let mut xenopsd =
            Xenopsd::start_with(&machine, "-mode save", target.fd(), &mut with_run(&run));
        if fixed {
            xenopsd.end().failed(2, "d1 is flagged as not being mobile");
        } else {
            assert!(xenopsd.until("prepare:"), "{value}: {:?}", xenopsd.lines);
            xenopsd.say("abort\n");
            xenopsd.end().aborted();
        }
        assert_eq!(shutdown(&machine), None);
    }
}

#[test]
fn a_restored_domain_is_placed_and_timed_as_xapi_says() {
    let stream = by_the_engine(GuestKind::Pvh, 8);
    let dir = scratch();
    let set = [
        ("vcpu/number", "2"),
        ("vcpu/0/affinity", "0011"),
        ("vcpu/weight", "512"),
        ("vcpu/cap", "75"),
        ("hpet", "0"),
        ("timeoffset", "-3600"),
        ("cores-per-socket", "2"),
    ];
    let (ended, host) = restored(GuestKind::Pvh, &stream, &set, dir.path());
    ended.succeeded();
    let placed = host.placement(DOMID).unwrap();
    assert_eq!(
        placed.affinity.into_iter().collect::<Vec<_>>(),
        [(0, vec![0b1100])]
    );
    assert_eq!((placed.weight, placed.cap), (512, 75));
    assert_eq!(host.settings(DOMID).unwrap().time_offset_seconds, -3600);
    assert_eq!(
        host.domain(DOMID).unwrap().hvm().unwrap().hvm_param(11),
        Ok(0)
    );
}

#[test]
fn a_domain_without_keys_has_an_hpet_and_nothing_else() {
    let stream = by_the_engine(GuestKind::Pvh, 8);
    for set in [
        &[][..],
        &[("hpet", ""), ("vcpu/weight", "0"), ("timeoffset", "")],
    ] {
        let dir = scratch();
        let (ended, host) = restored(GuestKind::Pvh, &stream, set, dir.path());
        ended.succeeded();
        assert_eq!(host.placement(DOMID).unwrap(), Default::default());
        assert_eq!(host.settings(DOMID).unwrap().time_offset_seconds, 0);
        assert_eq!(
            host.domain(DOMID).unwrap().hvm().unwrap().hvm_param(11),
            Ok(1)
        );
    }
}

#[test]
fn nonsense_in_xenstore_is_told() {
    let stream = by_the_engine(GuestKind::Pvh, 8);
    for (key, value) in [
        ("vcpu/number", "two"),
        ("vcpu/number", "7"),
        ("vcpu/0/affinity", "012"),
        ("vcpu/0/affinity", "000"),
        ("vcpu/weight", "-1"),
        ("vcpu/cap", "x"),
        ("timeoffset", "soon"),
        ("vcpu/weight", "65536"),
        ("cores-per-socket", "3"),
    ] {
        let dir = scratch();
        // If a key occurs twice, the last one counts.
        let set = [
            ("vcpu/number", "2"),
            ("vcpu/0/affinity", "01"),
            (key, value),
        ];
        let (ended, host) = restored(GuestKind::Pvh, &stream, &set, dir.path());
        ended.succeeded();
        let key = key.rsplit('/').next().unwrap();
        let warned = ended.with("info:platform/");
        assert!(warned.iter().any(|line| line.contains(key)), "{ended:?}");
        // The keys that make sense take effect.
        let placed = host.placement(DOMID).unwrap();
        let affinity = usize::from(!["affinity", "number"].contains(&key) || value == "7");
        assert_eq!(placed.affinity.len(), affinity, "{key} {value}");
    }
    let dir = scratch();
    let set = [("featureset", "12-tea")];
    let (ended, _) = restored(GuestKind::Pvh, &stream, &set, dir.path());
    ended.failed(2, "featureset");
}

/// The next migration uses the default.
#[test]
fn nonsense_for_the_downtime_is_told_and_no_more() {
    for (value, warned) in [
        ("soon", true),
        ("-1", true),
        ("0x64", false),
        ("xen", false),
    ] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Pv, 8);
        let run = dir.path().join("run");
        keys(&run, &[("xsr-max-downtime", value)]);
        let mut target = Target::new(Kind::Pipe, dir.path(), true);
        let words = "-mode save -live true";
        let mut xenopsd = Xenopsd::start_with(&machine, words, target.fd(), &mut with_run(&run));
        crate::save::play(&mut xenopsd, &mut target);
        let ended = xenopsd.wait();
        ended.succeeded();
        let lines = ended.with("info:platform/xsr-max-downtime in xenstore is ignored");
        assert_eq!(lines.len(), usize::from(warned), "{value}: {ended:?}");
    }
}

#[test]
fn the_downtime_may_be_in_the_host_s_configuration() {
    for (text, key, warned) in [
        ("xsr-max-downtime = soon", None, true),
        ("xsr-max-downtime = soon", Some("xen"), false),
        ("xsr-max-downtime = 50", None, false),
    ] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Pv, 8);
        let run = dir.path().join("run");
        fs::create_dir(&run).unwrap();
        fs::write(run.join("settings"), text).unwrap();
        if let Some(value) = key {
            keys(&run, &[("xsr-max-downtime", value)]);
        }
        let mut target = Target::new(Kind::Pipe, dir.path(), true);
        let words = "-mode save -live true";
        let mut xenopsd = Xenopsd::start_with(&machine, words, target.fd(), &mut with_run(&run));
        crate::save::play(&mut xenopsd, &mut target);
        let ended = xenopsd.wait();
        ended.succeeded();
        let lines = ended.with("info:xsr-max-downtime in ");
        assert_eq!(lines.len(), usize::from(warned), "{text}: {ended:?}");
    }
}

/// The address of the guest's generation id.
const ADDRESS: u64 = 0x5_0ff0;

/// The stream of a guest that has chosen this address for its generation id.
fn with_generation_id(address: u64) -> Vec<u8> {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Hvm, 8);
    {
        let host = MockHost::open(&machine).unwrap();
        let domain = host.domain(DOMID).unwrap();
        domain.hvm().unwrap().set_hvm_param(34, address).unwrap();
    }
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let mut xenopsd = Xenopsd::start(&machine, "-mode hvm_save", target.fd());
    crate::save::play(&mut xenopsd, &mut target);
    xenopsd.end().succeeded();
    crate::xenopsd::libxc(&target.image()).to_vec()
}

fn at(domain: &dyn Domain, address: u64) -> [u64; 2] {
    let pages = domain.map(&[Gfn(address >> 12)], Access::Read).unwrap();
    let page = pages.page(0).unwrap();
    let index = usize::try_from(address % 4096 / 8).unwrap();
    [page.read_entry(index), page.read_entry(index + 1)]
}

#[test]
fn the_generation_id_is_written_where_the_guest_wants_it() {
    let stream = with_generation_id(ADDRESS);
    for (value, halves) in [("7:0x9", [7, 9]), ("18446744073709551615:1", [u64::MAX, 1])] {
        let dir = scratch();
        let set = [("generation-id", value)];
        let (ended, host) = restored(GuestKind::Hvm, &stream, &set, dir.path());
        ended.succeeded();
        assert_eq!(at(&*host.domain(DOMID).unwrap(), ADDRESS), halves);
    }
    for value in ["7", "7:0", "0:7", "tea:7", ""] {
        let dir = scratch();
        let set = [("generation-id", value)];
        let (ended, _) = restored(GuestKind::Hvm, &stream, &set, dir.path());
        ended.failed(2, "generation-id");
    }
    let dir = scratch();
    // An id that spans two pages.
    let across = with_generation_id(ADDRESS + 8);
    let set = [("generation-id", "7:8")];
    let (ended, host) = restored(GuestKind::Hvm, &across, &set, dir.path());
    ended.succeeded();
    let domain = host.domain(DOMID).unwrap();
    assert_eq!(at(&*domain, ADDRESS)[1], 7);
    assert_eq!(at(&*domain, ADDRESS + 16)[0], 8);
    // A guest that has chosen no address.
    let dir = scratch();
    let set = [("generation-id", "tea")];
    let none = by_the_engine(GuestKind::Hvm, 8);
    restored(GuestKind::Hvm, &none, &set, dir.path())
        .0
        .succeeded();
}

/// The stream without its CPU policy, as Xen 4.13 writes it.
fn without_policy(stream: &[u8]) -> Vec<u8> {
    const POLICIES: [u32; 2] = [0x11, 0x12];
    let (headers, mut rest) = stream.split_at(40);
    let mut out = headers.to_vec();
    while !rest.is_empty() {
        let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
        let length = usize::try_from(word(4)).unwrap().next_multiple_of(8) + 8;
        if !POLICIES.contains(&word(0)) {
            out.extend(&rest[..length]);
        }
        rest = &rest[length..];
    }
    out
}

/// The register ecx of CPUID leaf 1 of the domain.
fn features(host: &MockHost) -> u32 {
    let leaves = host.domain(DOMID).unwrap().cpu_policy().unwrap().leaves;
    let leaf = leaves
        .chunks(24)
        .find(|leaf| leaf[..4] == [1, 0, 0, 0])
        .unwrap();
    u32::from_le_bytes(leaf[16..20].try_into().unwrap())
}

#[test]
fn a_guest_without_cpu_policy_gets_the_features_of_its_vm() {
    let stream = without_policy(&by_the_engine(GuestKind::Pvh, 8));
    let dir = scratch();
    let (ended, host) = restored(GuestKind::Pvh, &stream, &[], dir.path());
    ended.succeeded();
    let all = features(&host);
    // Without SSSE3 and SSE4.2, which the machine has.
    let less = all & !(1 << 9 | 1 << 20);
    assert_ne!(all, less);
    let featureset = format!("ffffffff-{less:08x}:0-0-0-0-0-0-0-0");
    let dir = scratch();
    let set = [("featureset", featureset.as_str())];
    let (ended, host) = restored(GuestKind::Pvh, &stream, &set, dir.path());
    ended.succeeded();
    assert_eq!(features(&host), less);
}
