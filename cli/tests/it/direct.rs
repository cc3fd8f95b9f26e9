//! `--direct`: save, restore and migrate without libxl, on the mock machine through hypercalls.

use std::fs;
use std::path::Path;

use crate::common::migration::{Hosts, Running};
use crate::common::{arg, backend, host_with, run, scratch};
use xsr_xen_backend::domain_store::DomainStore;
use xsr_xen_backend::mock::{HostConfig, MockHost};
use xsr_xen_backend::{DomId, DomainInfo, GuestKind, Host as _, NewDomain};

fn xen(host: &Path) -> String {
    format!("mock-xen:{}", host.display())
}

/// The domains of a machine; none if there is no machine.
fn domains(host: &Path) -> Vec<DomainInfo> {
    match host.exists() {
        true => MockHost::open(host).unwrap().domains().unwrap(),
        false => Vec::new(),
    }
}

/// The machine's only domain.
fn only(host: &Path) -> DomainInfo {
    let [info] = domains(host).try_into().unwrap();
    info
}

fn number(host: &Path) -> String {
    let DomId(number) = only(host).domid;
    number.to_string()
}

#[test]
fn a_domain_goes_into_a_bare_stream_and_comes_back() {
    for kind in ["pv", "pv32", "pvh"] {
        let dir = scratch();
        let host = host_with(kind, dir.path());
        let other = dir.path().join("other");
        let (image, again) = (dir.path().join("a.libxc"), dir.path().join("b.libxc"));
        let save = ["save", "--direct", "--backend"];
        run(save
            .iter()
            .copied()
            .chain([&*xen(&host), &number(&host), arg(&image)]))
        .code(0);
        assert!(domains(&host).is_empty(), "it has moved into the image");
        run(["verify", arg(&image)]).code(0);
        run([
            "restore",
            "--direct",
            "--backend",
            &xen(&other),
            arg(&image),
        ])
        .code(0);
        assert!(!only(&other).paused);
        let live = [&*xen(&other), "--live", "-c", &number(&other), arg(&again)];
        run(save.iter().copied().chain(live)).code(0);
        let info = only(&other);
        assert!(!info.paused && info.shutdown.is_none(), "it runs on");
        run(["diff", "--after-restore", arg(&image), arg(&again)]).code(0);
        let paused = ["-p", "--live", &number(&other), arg(&again)];
        run(save.iter().copied().chain([&*xen(&other)]).chain(paused)).code(0);
        assert!(only(&other).paused);
    }
}

#[test]
fn what_fails_leaves_the_guest_running_or_none() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let number = number(&host);
    let image = dir.path().join("a.libxc");
    let save = ["save", "--direct", "--backend", &xen(&host)];
    run(save.iter().copied().chain([&*number, "/dev/full"])).code(1);
    let info = only(&host);
    assert!(!info.paused && info.shutdown.is_none(), "it runs on");
    run(save.iter().copied().chain(["no-such", arg(&image)]))
        .code(1)
        .stderr_has("there is no domain \"no-such\"");
    run(save.iter().copied().chain(["-c", &number, arg(&image)])).code(0);
    // An image that is truncated at some points.
    let bytes = fs::read(&image).unwrap();
    let other = dir.path().join("other");
    let cut = dir.path().join("cut.libxc");
    let restore = [
        "restore", "--direct", "--type", "pvh", "--vcpus", "1", "--memory", "64",
    ];
    for part in [3, 5, 9] {
        fs::write(&cut, &bytes[..bytes.len() * part / 10]).unwrap();
        let there = ["--backend", &*xen(&other), arg(&cut)];
        run(restore.iter().copied().chain(there)).code(2);
        assert!(domains(&other).is_empty(), "it was destroyed");
    }
}

#[test]
fn what_needs_libxl_is_refused() {
    let dir = scratch();
    let host = host_with("hvm", dir.path());
    let image = dir.path().join("hvm.save");
    let save = ["save", "--direct", "--backend", &xen(&host)];
    run(save.iter().copied().chain([&*number(&host), arg(&image)]))
        .code(1)
        .stderr_has("has a device model");
    assert!(!image.exists());
    let plain = format!("mock:{}", host.display());
    run(["save", "--direct", "--backend", &plain, "web", arg(&image)])
        .code(64)
        .stderr_has("--direct is for a Xen host");
    run(["save", "--backend", &plain, "web", arg(&image)]).code(0);
    let other = dir.path().join("other");
    run([
        "restore",
        "--direct",
        "--backend",
        &xen(&other),
        arg(&image),
    ])
    .code(1)
    .stderr_has("needs a device model");
    assert!(domains(&other).is_empty());
}

/// At either end, and before the guest is touched.
#[test]
fn what_needs_libxl_is_not_migrated() {
    let hosts = Hosts::direct("hvm", &[]);
    let here = hosts.on(&hosts.here);
    let here: Vec<&str> = here.iter().map(String::as_str).collect();
    for command in ["migrate", "remus"] {
        let args = [command, "web", "unix:/nowhere"].into_iter();
        run(args.chain(here.iter().copied()))
            .code(1)
            .stderr_has("has a device model")
            .stderr_has("drop --direct");
    }
    let colo = ["remus", "-c", "web", "unix:/nowhere"].into_iter();
    run(colo.chain(here.iter().copied()))
        .code(64)
        .stderr_has("COLO");
    let there = hosts.on(&hosts.there);
    let there = there.iter().map(String::as_str);
    run(["migrate-receive", "--colo"].into_iter().chain(there))
        .code(64)
        .stderr_has("COLO");
    // A sender that works through libxl sends it, and a receiver without refuses it.
    let socket = hosts.path("socket");
    let to = format!("unix:{}", socket.display());
    for (command, options) in [("migrate", &[][..]), ("remus", &["-r"])] {
        let receiver = hosts.receiver(&socket, options);
        let sent = run([command, &backend(&hosts.here), "web", &to]);
        sent.code(1).stderr_has("needs a device model");
        receiver.end().code(1).stderr_has("needs a device model");
        assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    }
}

/// The configuration of libxl names devices: the guest is refused by them.
#[test]
fn a_guest_with_devices_is_not_received() {
    let hosts = Hosts::direct("pvh", &[]);
    let machine = MockHost::open(&hosts.here).unwrap();
    let domid = only(&hosts.here).domid;
    let config = machine.userdata_get(domid, "libxl-json").unwrap().unwrap();
    let config = String::from_utf8(config).unwrap();
    let disks = "\"disks\": [{ \"vdev\": \"xvda\" }],\n    \"on_reboot\":";
    let config = config.replacen("\"on_reboot\":", disks, 1);
    let kept = machine.userdata_store(domid, "libxl-json", config.as_bytes());
    kept.unwrap();
    drop(machine);
    let socket = hosts.path("socket");
    let receiver = hosts.receiver(&socket, &[]);
    let sent = hosts.sender(&socket, &[]).end().code(1);
    sent.stderr_has("web has disks")
        .stderr_has("web runs on here");
    receiver.end().code(1).stderr_has("web has disks");
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
}

/// Nothing keeps a configuration of a domain that another toolstack has made. libxl's has the name
/// that the domain had when libxl made it.
#[test]
fn a_domain_arrives_under_the_name_that_it_has() {
    for keeps in [true, false] {
        let hosts = Hosts::direct("pv", &[]);
        let machine = MockHost::open(&hosts.here).unwrap();
        let domain = DomainStore::find(&machine, "web").unwrap();
        match keeps {
            true => DomainStore::rename(&machine, domain, "web", "db").unwrap(),
            false => {
                DomainStore::forget(&machine, domain).unwrap();
                DomainStore::give_name(&machine, domain, "db").unwrap();
            }
        }
        drop(machine);
        let socket = hosts.path("socket");
        let receiver = hosts.receiver(&socket, &[]);
        let to = format!("unix:{}", socket.display());
        let args = ["migrate", "db", &to].map(str::to_owned);
        let sent = run(args.into_iter().chain(hosts.on(&hosts.here))).code(0);
        let said = "db has no configuration of libxl's: one is sent";
        assert_eq!(sent.stderr.contains(said), !keeps, "{sent:?}");
        receiver.end().code(0);
        assert_eq!(hosts.domains(), [vec![], vec!["db running".to_owned()]]);
    }
}

/// As xl allows it: the copy here gets the name when the domain has given it up. A standby on the
/// same host would protect nothing, and would run beside the domain if the sender's process ended.
#[test]
fn a_domain_moves_to_its_own_host() {
    for hosts in Hosts::each("pvh", &[]) {
        let on = hosts.on(&hosts.here);
        let before = only(&hosts.here);
        let receive = format!(
            "{} migrate-receive {}",
            env!("CARGO_BIN_EXE_xsr"),
            on.join(" ")
        );
        let protect = ["remus", "-F", "-s", "", "web", &format!("{receive} -r")];
        let protect = protect.map(str::to_owned);
        run(protect.iter().chain(&on))
            .code(1)
            .stderr_has("exists already");
        let migrate = ["migrate", "-s", "", "web", &receive].map(str::to_owned);
        run(migrate.iter().chain(&on)).code(0);
        let after = only(&hosts.here);
        assert_eq!(hosts.domains()[0], ["web running"]);
        assert_eq!(after.uuid, before.uuid);
        assert_ne!(after.domid, before.domid);
    }
}

/// `xl mem-set` and `xl vcpu-set` change xenstore alone, and libxl sends what is there.
#[test]
fn a_domain_arrives_with_the_memory_that_it_is_to_use_now() {
    let hosts = Hosts::direct("pvh", &["--vcpus", "2"]);
    let moved = |from: &Path, to: &Path, socket: &str| {
        let socket = hosts.path(socket);
        let at = format!("unix:{}", socket.display());
        let listen = ["migrate-receive", "--listen", &at].map(str::to_owned);
        let mut receiver = Running::start(listen.iter().chain(&hosts.on(to)));
        receiver.line("waiting at");
        let send = ["migrate", "web", &at].map(str::to_owned);
        run(send.iter().chain(&hosts.on(from))).code(0);
        receiver.end().code(0);
    };
    let kept = |host: &Path| {
        let machine = MockHost::open(host).unwrap().as_xen().unwrap();
        let web = machine.find("web").unwrap();
        let kept = machine.configuration(web).unwrap().unwrap();
        (machine, web, String::from_utf8(kept.bytes).unwrap())
    };
    // It is told of its memory when it arrives.
    moved(&hosts.here, &hosts.there, "a");
    let (machine, web, before) = kept(&hosts.there);
    let target = "\"target_memkb\": 8192";
    let other = before
        .replace(target, "\"target_memkb\": 4096")
        .replace("\"max_memkb\": 8192", "\"max_memkb\": 16384");
    assert!(before.contains(target) && other != before, "{before}");
    machine.set_configuration(web, other.as_bytes()).unwrap();
    drop(machine);
    moved(&hosts.there, &hosts.here, "b");
    let (_, _, after) = kept(&hosts.here);
    let parsed = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for at in ["/b_info/target_memkb", "/b_info/max_memkb"] {
        assert_eq!(parsed(&after).pointer(at), parsed(&before).pointer(at));
    }
    let online = parsed(&after).pointer("/b_info/avail_vcpus").cloned();
    assert_eq!(online, Some(serde_json::json!([0, 1])));
}

/// Only what is suspended, and not under the name of a domain that may run on another host.
#[test]
fn what_was_left_suspended_is_resumed() {
    for hosts in Hosts::each("pvh", &[]) {
        let on = hosts.on(&hosts.here);
        let resume = |name: &str| run(["resume", name].map(str::to_owned).iter().chain(&on));
        resume("web").code(1).stderr_has("it runs");
        let machine = MockHost::open(&hosts.here).unwrap();
        let web = DomainStore::find(&machine, "web").unwrap();
        let domain = machine.domain(web.domid).unwrap();
        domain.suspend().unwrap();
        for (name, why) in [
            ("web--migratedaway", "another host has been told to run it"),
            ("web--incoming", "another host sends"),
        ] {
            DomainStore::rename(&machine, web, "web", name).unwrap();
            resume(name).code(1).stderr_has(why);
            assert_eq!(hosts.domains()[0], [format!("{name} suspended")]);
            DomainStore::rename(&machine, web, name, "web").unwrap();
        }
        let lock = machine.lock(web, "xsr migrate web").unwrap();
        resume("web").code(1).stderr_has("xsr migrate web");
        drop(lock);
        resume("web").code(0);
        assert_eq!(hosts.domains()[0], ["web running"]);
        domain.pause().unwrap();
        resume("web")
            .code(1)
            .stderr_has("it is paused, not suspended");
    }
    let hosts = Hosts::direct("hvm", &[]);
    let on = hosts.on(&hosts.here);
    let direct = ["resume", "web"].map(str::to_owned);
    run(direct.iter().chain(&on))
        .code(1)
        .stderr_has("has a device model");
    run(["resume", "--backend", "xen", "web"])
        .code(64)
        .stderr_has("give --direct");
}

/// A stream of Xen before 4.14: version 2, without CPU policies.
fn of_an_older_xen(stream: &[u8]) -> Vec<u8> {
    const STATIC_DATA: [u32; 3] = [0x10, 0x11, 0x12];
    let (headers, mut rest) = stream.split_at(24 + 16);
    let mut out = headers.to_vec();
    assert_eq!(out[12..16], 3_u32.to_be_bytes());
    out[12..16].copy_from_slice(&2_u32.to_be_bytes());
    while !rest.is_empty() {
        let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
        let (kind, length) = (word(0), usize::try_from(word(4)).unwrap());
        let (record, more) = rest.split_at(8 + length.next_multiple_of(8));
        if !STATIC_DATA.contains(&kind) {
            out.extend_from_slice(record);
        }
        rest = more;
    }
    out
}

/// As in libxl: the features that a guest of Xen 4.13 had, and changes of them in the
/// configuration. A guest that would see a different processor is not restored.
#[test]
fn a_guest_of_an_older_xen_keeps_its_features() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let at = |name: &str| dir.path().join(name);
    let (new, old) = (at("new.libxc"), at("old.libxc"));
    let save = ["save", "--direct", "--backend", &*xen(&host), "-c"];
    run(save.into_iter().chain([&*number(&host), arg(&new)])).code(0);
    fs::write(&old, of_an_older_xen(&fs::read(&new).unwrap())).unwrap();
    run(["verify", arg(&old)]).code(0);
    let restore =
        |to: &Path, image: &Path| run(["restore", "--direct", "--backend", &xen(to), arg(image)]);
    let policy = |host: &Path| {
        let domid = only(host).domid;
        let domain = MockHost::open(host).unwrap().domain(domid).unwrap();
        domain.cpu_policy().unwrap().leaves
    };
    let other = at("other");
    restore(&other, &old).code(0).stderr_has("no CPU policy");
    let is_beyond = |leaf: &&[u8]| leaf[..4] == 0x8000_001d_u32.to_le_bytes();
    assert!(policy(&host).chunks(24).any(|leaf| is_beyond(&leaf)));
    let found = policy(&other);
    assert!(!found.chunks(24).any(|leaf| is_beyond(&leaf)));
    let features = found
        .chunks(24)
        .find(|leaf| leaf[0] == 7 && leaf[1..8] == [0; 7]);
    // HLE, RTM and MPX, which the host has but hides from new guests.
    assert_eq!(features.unwrap()[12] & 1 << 4, 1 << 4);
    assert_eq!(features.unwrap()[13] & (1 << 3 | 1 << 6), 1 << 3 | 1 << 6);
    // With a configuration that removes a feature.
    let (json, image) = (at("config.json"), at("old.save"));
    let domid = only(&host).domid;
    let config = MockHost::open(&host).unwrap();
    let config = config.userdata_get(domid, "libxl-json");
    let config = String::from_utf8(config.unwrap().unwrap()).unwrap();
    let cpuid = "\"claim_mode\": \"True\", \"cpuid\": [{ \"leaf\": 1, \"ecx\": \"0xxx\" }],";
    let config = config.replacen("\"claim_mode\": \"True\",", cpuid, 1);
    fs::write(&json, config).unwrap();
    let third = at("third");
    for (stream, code) in [(&old, 1), (&new, 0)] {
        let convert = ["convert", "--force", "--to", "xl", "--config", arg(&json)];
        run(convert.into_iter().chain([arg(stream), "-o", arg(&image)])).code(0);
        let restored = restore(&third, &image).code(code);
        if code == 1 {
            restored.stderr_has("b_info.cpuid");
            assert!(domains(&third).is_empty());
        }
    }
}

/// Settings that libxl applies at every restore come from the configuration; those that `--direct`
/// cannot apply are refused by name.
#[test]
fn a_domain_gets_what_its_configuration_says() {
    const CONFIG: &str = "libxl-json";
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let plain = format!("mock:{}", host.display());
    let domid = only(&host).domid;
    let (good, bad) = (dir.path().join("good.save"), dir.path().join("bad.save"));
    let configure = |old: &str, new: &str| {
        let machine = MockHost::open(&host).unwrap();
        let config = machine.userdata_get(domid, CONFIG).unwrap().unwrap();
        let config = String::from_utf8(config).unwrap();
        assert!(config.contains(old), "{config}");
        let config = config.replacen(old, new, 1);
        machine
            .userdata_store(domid, CONFIG, config.as_bytes())
            .unwrap();
        config
    };
    let claim = "\"claim_mode\": \"True\",";
    let more = format!("{claim} \"timer_mode\": \"one_missed_tick_pending\",");
    let config = configure(claim, &format!("{more} \"rtc_timeoffset\": 60,"));
    run(["save", "--backend", &plain, "-c", "web", arg(&good)]).code(0);
    configure(claim, &format!("{claim} \"nested_hvm\": \"True\","));
    run(["save", "--backend", &plain, "-c", "web", arg(&bad)]).code(0);
    let other = dir.path().join("other");
    let restore =
        |image: &Path| run(["restore", "--direct", "--backend", &xen(&other), arg(image)]);
    restore(&bad).code(1).stderr_has("b_info.nested_hvm");
    assert!(domains(&other).is_empty());
    restore(&good).code(0);
    let info = only(&other);
    assert!(config.contains(&info.uuid.to_string()), "{}", info.uuid);
    let machine = MockHost::open(&other).unwrap();
    assert_eq!(
        machine
            .domain(info.domid)
            .unwrap()
            .hvm()
            .unwrap()
            .hvm_param(10),
        Ok(3)
    );
    let settings = machine.settings(info.domid).unwrap();
    assert_eq!(settings.time_offset_seconds, 60);
    assert!(!settings.msr_relaxed, "its configuration says so");
    assert_eq!(settings.max_grant_version, Some(2));
}

#[test]
fn a_domain_without_a_name_is_named_to_commands_by_its_number() {
    let dir = scratch();
    let host = dir.path().join("host");
    let machine = MockHost::open_or_create(&host, &HostConfig::default()).unwrap();
    let new = NewDomain::new(GuestKind::Pvh, 1, 16);
    let number = machine.create(&new).unwrap().0.to_string();
    drop(machine);
    let file = dir.path().join("a.save");
    let unpause = format!(
        "first `xsr mock unpause --host {} {number}`",
        host.display()
    );
    run([
        "save",
        "--direct",
        "--backend",
        &xen(&host),
        &number,
        arg(&file),
    ])
    .code(1)
    .stderr_has(&format!("saving domain-{number}: "))
    .stderr_has(&unpause);
}
