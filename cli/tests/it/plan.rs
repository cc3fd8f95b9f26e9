//! `xsr plan`: whether a guest fits on a host, asked before anything is touched.

use std::fs;
use std::path::Path;

use crate::common::{Ran, arg, backend, create, host_with, ran, real_images, run, scratch, xsr};

/// A host's facts, in a file.
fn facts(host: &Path, file: &Path) {
    let ran = run(["plan", "--facts", &backend(host)]).code(0);
    fs::write(file, ran.stdout).unwrap();
}

/// The answer of a check, and its text.
fn answer(ran: &Ran, check: &str) -> (String, String) {
    let document = ran.json();
    let checks = document["checks"].as_array().unwrap();
    let found = checks.iter().find(|line| line["check"] == check).unwrap();
    let word = |key: &str| found[key].as_str().unwrap().to_owned();
    (word("answer"), word("text"))
}

#[test]
fn an_image_and_its_domain_fit_where_they_come_from() {
    for kind in ["pv", "pv32", "hvm", "pvh"] {
        let dir = scratch();
        let host = host_with(kind, dir.path());
        let (image, here) = (dir.path().join("web.save"), dir.path().join("here.json"));
        run(["save", "-c", &backend(&host), "web", arg(&image)]).code(0);
        facts(&host, &here);
        let xen = format!("--backend=mock-xen:{}", arg(&host));
        let ran = run(["plan", arg(&image), &xen]).code(0);
        ran.stdout_has(": fits on mock-xen:");
        for guest in ["web", arg(&image)] {
            let ran = run(["plan", guest, &backend(&host)]).code(0);
            let ran = ran.stdout_has(&format!("{guest}: fits on mock:"));
            assert!(!ran.stdout.contains(" no "), "{kind}: {ran:?}");
            assert_eq!(ran.stdout.matches(" yes ").count(), 7, "{kind}: {ran:?}");
            let ran = run(["plan", "--json", &backend(&host), guest, "--on", arg(&here)]).code(0);
            assert_eq!(ran.json()["fits"], true);
            for check in ["kind", "vcpus", "cpu", "tsc", "memory", "xen", "config"] {
                assert_eq!(answer(&ran, check).0, "yes", "{kind} {check}: {ran:?}");
            }
        }
    }
}

/// What a mock machine says by hypercalls is what it says directly.
#[test]
fn facts_come_from_hypercalls() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let direct = run(["plan", "--facts", &backend(&host)]).code(0).json();
    let xen = format!("--backend=mock-xen:{}", arg(&host));
    let mut calls = run(["plan", "--facts", &xen]).code(0).json();
    calls["host"] = direct["host"].clone();
    assert_eq!(calls, direct);
    assert!(direct["free_pages"].as_u64() < direct["total_pages"].as_u64());
}

#[test]
fn a_feature_less_is_named_and_the_guest_runs_on() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let (other, there) = (dir.path().join("other"), dir.path().join("there.json"));
    run(["mock", "host", "--host", arg(&other), "--cpu=-avx2,-pku"]).code(0);
    facts(&other, &there);
    // As a file, and as a host that a command reaches.
    let ssh = format!("cat {}; true", arg(&there));
    for on in [vec![arg(&there)], vec!["other.example.org", "-s", &ssh]] {
        let plan = ["plan", "web", &backend(&host), "--on"];
        let ran = run(plan.into_iter().chain(on)).code(1);
        let ran = ran.stdout_has("web: DOES NOT FIT on mock:");
        let ran = ran.stdout_has("cpu     no       the guest has seen what the host lacks: AVX2,");
        assert!(ran.stdout.contains("PKU"), "{ran:?}");
        assert!(ran.stdout.lines().all(|line| line.len() <= 80), "{ran:?}");
    }
    let ran = run([
        "plan",
        "--json",
        "web",
        &backend(&host),
        "--on",
        arg(&there),
    ])
    .code(1);
    let document = ran.json();
    assert_eq!(document["fits"], false);
    let cpu = document["checks"].as_array().unwrap();
    let cpu = cpu.iter().find(|line| line["check"] == "cpu").unwrap();
    assert_eq!(cpu["missing"], serde_json::json!(["AVX2", "PKU"]));
    let show = run(["mock", "show", "--host", arg(&host), "web"]).code(0);
    show.stdout_has("running");
}

#[test]
fn a_host_that_is_too_small_or_runs_no_such_guests() {
    let dir = scratch();
    let host = host_with("hvm", dir.path());
    let here = dir.path().join("here.json");
    facts(&host, &here);
    let mut document: serde_json::Value =
        serde_json::from_slice(&fs::read(&here).unwrap()).unwrap();
    document["free_pages"] = 100.into();
    document["runs_hvm"] = false.into();
    document["hvm"] = serde_json::Value::Null;
    fs::write(&here, document.to_string()).unwrap();
    let plan = ["plan", "--json", "web", &backend(&host), "--on", arg(&here)];
    let ran = run(plan).code(1);
    let (no, text) = answer(&ran, "kind");
    assert_eq!(
        (no.as_str(), text.as_str()),
        ("no", "this Xen runs no HVM guests")
    );
    let (no, text) = answer(&ran, "memory");
    assert_eq!(no, "no");
    assert!(text.contains("only 0 MiB are free"), "{text}");
    assert_eq!(answer(&ran, "cpu").0, "unknown");
}

#[test]
fn a_configuration_that_ties_a_guest_to_its_host() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let (image, bare) = (dir.path().join("web.save"), dir.path().join("web.libxc"));
    run(["save", "-c", &backend(&host), "web", arg(&image)]).code(0);
    run(["convert", "--to", "libxc", arg(&image), "-o", arg(&bare)]).code(0);
    let json = dir.path().join("config.json");
    let tied = r#"{
        "c_info": { "type": "pvh", "name": "web", "hap": "False" },
        "b_info": {
            "max_vcpus": 1, "max_memkb": 1048576, "target_memkb": 1048576,
            "disable_migrate": "True", "vnuma_nodes": [{}, {}]
        },
        "pcidevs": [{ "bus": 3 }]
    }"#;
    fs::write(&json, tied).unwrap();
    let xl = dir.path().join("tied.save");
    let convert = [
        "convert",
        "--to",
        "xl",
        "--config",
        arg(&json),
        arg(&bare),
        "-o",
        arg(&xl),
    ];
    run(convert).code(0);
    let ran = run(["plan", &backend(&host), arg(&xl)]).code(1);
    // The guest has seen what it would not get without HAP.
    let ran =
        ran.stdout_has("cpu     no       the guest has seen what the host lacks (shadow paging");
    let ran = ran.stdout_has("config  warning  nomigrate is set");
    let ran = ran.stdout_has("config  warning  the guest has 1 of the host's PCI devices");
    ran.stdout_has("config  warning  the guest has 2 virtual NUMA nodes");
}

#[test]
fn a_level_is_what_hosts_have_in_common() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    for (host, cpu) in [("a", "-avx2"), ("b", "-pku,+avx512f"), ("c", "+avx512f")] {
        run([
            "mock",
            "host",
            "--host",
            arg(&path(host)),
            &format!("--cpu={cpu}"),
        ])
        .code(0);
        facts(&path(host), &path(&format!("{host}.json")));
    }
    let files = ["a.json", "b.json", "c.json"].map(path);
    let level = ["plan", "--level"]
        .into_iter()
        .chain(files.iter().map(|file| arg(file)));
    let ran = run(level.clone()).code(0);
    let ran = ran.stdout_has("# HVM and PVH guests: without AVX2, AVX512F, PKU\n");
    let ran = ran.stdout_has("# PV guests: without AVX2, AVX512F\n");
    // Bits 5 and 16 of ebx.
    ran.stdout_has("cpuid=[\"0x7,0:ebx=xxxxxxxxxxxxxxx0xxxxxxxxxx0xxxxx\"]\n");
    let document = run(level.chain(["--json"])).code(0).json();
    assert_eq!(
        document["levels"][0]["hidden"],
        serde_json::json!(["AVX2", "AVX512F"])
    );
    let one = run(["plan", "--level", arg(&path("a.json"))]).code(0);
    one.stdout_has("# PV guests: nothing to hide\n");
}

/// No false "does not fit": each image of a real Xen fits on a mock machine, whose policies are
/// those of a real one.
#[test]
fn real_images_fit() {
    let dir = scratch();
    let host = dir.path().join("host");
    run(["mock", "host", "--host", arg(&host)]).code(0);
    for image in real_images(dir.path()) {
        let ran = run(["plan", &backend(&host), arg(&image)]).code(0);
        assert!(!ran.stdout.contains(" no "), "{ran:?}");
    }
}

#[test]
fn facts_that_are_none() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let file = dir.path().join("facts.json");
    let long = format!("{{\"host\": \"{}\"}}", "x".repeat(1 << 20));
    for (text, why) in [
        ("", "there are no facts: it is empty"),
        (
            "Xen 4.17",
            "these are no facts as `xsr plan --facts` writes them",
        ),
        ("{}", "there is no version"),
        (
            r#"{"version": 3}"#,
            "the facts have version 3, and this xsr reads version 2",
        ),
        (r#"{"version": 2}"#, "missing field"),
        (
            r#"{"version": 2, "error": "no Xen"}"#,
            "the other host has no facts: no Xen",
        ),
        (&long, "longer than 1 MiB"),
    ] {
        fs::write(&file, text).unwrap();
        run(["plan", "web", &backend(&host), "--on", arg(&file)])
            .code(1)
            .stderr_has(why);
    }
    let failing = [
        "plan",
        "web",
        &backend(&host),
        "--on",
        "other",
        "-s",
        "sh -c 'exit 5'",
    ];
    run(failing)
        .code(1)
        .stderr_has("ended with exit code 5: is xsr installed there?");
    run(["plan", "web", &backend(&host), "--on=-oProxyCommand=x"])
        .code(64)
        .stderr_has("would be an option of ssh");
}

#[test]
fn a_guest_that_is_not_there() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    run(["plan", "missing", &backend(&host)])
        .code(1)
        .stderr_has("there is no domain \"missing\"");
    let bad = dir.path().join("bad.save");
    fs::write(&bad, "not an image").unwrap();
    run(["plan", arg(&bad), &backend(&host)]).code(2);
    run(["plan", &backend(&host)]).code(64);
}

/// The domain is only read: another command may have it.
#[test]
fn two_domains_beside_each_other() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    create(&host, "mail", "pvh");
    let mut plan = xsr(["plan", "mail", &backend(&host)]);
    plan.env_remove("XSR_BACKEND");
    ran(plan).code(0).stdout_has("this Xen runs PVH guests");
}
