//! `--direct`: save and restore without libxl, over the mock machine's second face.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "not all that tests have in common is of use here")]

mod common;

use std::fs;
use std::path::Path;

use common::{arg, host_with, run, scratch};
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{DomId, DomainInfo, Host as _};

fn xen(host: &Path) -> String {
    format!("mock-xen:{}", host.display())
}

/// The domains of a machine; none where there is no machine.
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
    // An image that ends too early, at some places.
    let octets = fs::read(&image).unwrap();
    let other = dir.path().join("other");
    let cut = dir.path().join("cut.libxc");
    let restore = [
        "restore", "--direct", "--type", "pvh", "--vcpus", "1", "--memory", "64",
    ];
    for part in [3, 5, 9] {
        fs::write(&cut, &octets[..octets.len() * part / 10]).unwrap();
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

/// What libxl sets at every restore comes out of the configuration; what `--direct` cannot set
/// is refused by name.
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
    assert_eq!(machine.domain(info.domid).unwrap().hvm_param(10), Ok(3));
    let settings = machine.settings(info.domid).unwrap();
    assert_eq!(settings.time_offset_seconds, 60);
}
