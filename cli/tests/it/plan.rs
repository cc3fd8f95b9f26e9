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
            // Only a domain has a state.
            let checks = if guest == "web" { 8 } else { 7 };
            assert_eq!(
                ran.stdout.matches(" yes ").count(),
                checks,
                "{kind}: {ran:?}"
            );
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
    document["total_pages"] = 200.into();
    document["runs_hvm"] = false.into();
    document["hvm"] = serde_json::Value::Null;
    fs::write(&here, document.to_string()).unwrap();
    let plan = ["plan", "--json", "web", &backend(&host), "--on", arg(&here)];
    let ran = run(plan).code(1);
    let (no, text) = answer(&ran, "kind");
    assert_eq!(
        (no.as_str(), text.as_str()),
        ("no", "the host runs no HVM guests")
    );
    let (no, text) = answer(&ran, "memory");
    assert_eq!(no, "no");
    assert!(text.contains("the host has only 0 MiB in all"), "{text}");
    assert_eq!(answer(&ran, "cpu").0, "unknown");
    let plan = ["plan", "web", &backend(&host), "--on", ""];
    run(plan).code(64).stderr_has("--on: expected a host");
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
    let ran = ran.stdout_has("config  warning  the guest has 1 of its host's PCI devices");
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
fn bad_facts_are_refused() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let file = dir.path().join("facts.json");
    let long = format!("{{\"host\": \"{}\"}}", "x".repeat(1 << 20));
    for (text, why) in [
        ("", "there are no facts: it is empty"),
        ("Xen 4.17", "this is not the output of `xsr plan --facts`"),
        ("{}", "there is no version"),
        (
            r#"{"version": 3}"#,
            "the facts have version 3, and this xsr reads version 2",
        ),
        (r#"{"version": 2}"#, "missing field"),
        (
            r#"{"version": 2, "error": "no\nXen"}"#,
            r"`xsr plan --facts` failed: no\nXen",
        ),
        (&long, "longer than 1 MiB"),
    ] {
        fs::write(&file, text).unwrap();
        run(["plan", "web", &backend(&host), "--on", arg(&file)])
            .code(1)
            .stderr_has(why);
    }
    let document = run(["plan", "--facts", &backend(&host)]).code(0).stdout;
    fs::write(&file, document).unwrap();
    for (ssh, why, installed) in [
        (
            "sh -c 'exit 5'",
            "xsr plan --facts` ended with exit code 5",
            true,
        ),
        ("true", "there are no facts: it is empty", false),
        (
            "sh -c 'echo no such command; exit 127'",
            "ended with exit code 127: this is not the output",
            false,
        ),
        (
            &format!("sh -c 'cat {}; exit 1'", arg(&file)),
            "ended with exit code 1, after it had printed facts",
            false,
        ),
        // It would never end by itself.
        ("sh -c 'exec yes'", "longer than 1 MiB", false),
    ] {
        let on = ["--on", "other", "-s", ssh];
        let plan = ["plan", "web", &backend(&host)];
        let ran = run(plan.into_iter().chain(on)).code(1).stderr_has(why);
        assert_eq!(ran.stderr.contains("is xsr installed there?"), installed);
    }
    run(["plan", "web", &backend(&host), "--on=-oProxyCommand=x"])
        .code(64)
        .stderr_has("would be an option of ssh");
}

#[test]
fn facts_come_through_a_pipe_but_not_from_a_directory() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let on = |on: &str| run(["plan", "web", &backend(&host), "--on", on]);
    let document = run(["plan", "--facts", &backend(&host)]).code(0).stdout;
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| fs::write(&pipe, document).unwrap());
        on(arg(&pipe)).code(0);
    });
    on(arg(dir.path())).code(1).stderr_has("Is a directory");
    let missing = dir.path().join("missing.json");
    let why = format!("cannot open {}: No such file", missing.display());
    on(arg(&missing)).code(1).stderr_has(&why);
}

#[test]
fn a_directory_is_not_an_image() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    for name in ["web", "mail"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let plan = |guest| {
        let mut plan = xsr(["plan", guest, &backend(&host)]);
        plan.current_dir(dir.path());
        ran(plan)
    };
    plan("web").code(0).stdout_has("web: fits on mock:");
    let why = "mail is a directory, not an image: there is no domain \"mail\"";
    plan("mail").code(1).stderr_has(why);
    plan("gone")
        .code(1)
        .stderr_has("there is no file gone: there is no domain \"gone\"");
}

/// A host's name does not begin a line of the configuration.
#[test]
fn the_name_of_a_host_is_escaped() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let file = dir.path().join("facts.json");
    facts(&host, &file);
    let mut document: serde_json::Value =
        serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    document["host"] = "a\ncpuid=[\"host\"]\u{1b}[2J".into();
    fs::write(&file, document.to_string()).unwrap();
    let level = run(["plan", "--level", arg(&file)]).code(0);
    assert!(
        level.stdout.lines().all(|line| line.starts_with("# ")),
        "{level:?}"
    );
    level.stdout_has(r#"# common to a\ncpuid=["host"]\u{1b}[2J"#);
    let ran = run(["plan", "web", &backend(&host), "--on", arg(&file)]).code(0);
    ran.stdout_has(r#"web: fits on a\ncpuid=["host"]"#);
}

#[test]
fn a_paused_domain_does_not_fit_anywhere() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    run(["mock", "pause", "web", "--host", arg(&host)]).code(0);
    let ran = run(["plan", "web", &backend(&host)]).code(1);
    ran.stdout_has("state   no       it is paused, and a paused domain cannot suspend");
}

#[test]
fn the_space_for_an_image_is_looked_at() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let (image, there) = (dir.path().join("web.save"), dir.path().join("no/web.save"));
    let plan = |guest, to| run(["plan", guest, &backend(&host), "--save-to", to]);
    let ran = plan("web", arg(&image)).code(0);
    ran.stdout_has("space   yes      the image will have 15.0 MiB at least;");
    plan("web", arg(&there))
        .code(1)
        .stderr_has("no: No such file");
    run(["save", "-c", &backend(&host), "web", arg(&image)]).code(0);
    plan(arg(&image), arg(&image))
        .code(64)
        .stderr_has("--save-to is for a domain");
}

#[test]
fn disks_are_looked_for_on_this_host() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let [bare, xl, json, there] =
        ["web.libxc", "web.save", "config.json", "there.json"].map(|name| dir.path().join(name));
    run(["save", "-c", &backend(&host), "web", arg(&xl)]).code(0);
    run(["convert", "--to", "libxc", arg(&xl), "-o", arg(&bare)]).code(0);
    facts(&host, &there);
    let with = |disk: &Path| {
        let config = serde_json::json!({
            "c_info": { "type": "pvh", "name": "web" },
            "b_info": { "max_vcpus": 1, "max_memkb": 1048576 },
            "disks": [
                { "pdev_path": disk, "vdev": "xvda", "backend": "phy" },
                { "pdev_path": "", "vdev": "xvdb" },
                { "pdev_path": "/of/another", "vdev": "xvdc", "backend_domname": "storage" },
                { "pdev_path": "/by/a/script", "vdev": "xvdd", "script": "block-iscsi" },
            ],
        });
        fs::write(&json, config.to_string()).unwrap();
        let convert = [
            "convert",
            "-f",
            "--to",
            "xl",
            "--config",
            arg(&json),
            arg(&bare),
            "-o",
        ];
        run(convert.into_iter().chain([arg(&xl)])).code(0);
        let here = format!("--backend=mock-xen:{}", arg(&host));
        let here = run(["plan", "--json", &here, arg(&xl)]);
        let there = run(["plan", "--json", arg(&xl), "--on", arg(&there)]).code(0);
        (here, answer(&there, "disks"))
    };
    let (here, there) = with(&bare);
    let disk = arg(&bare);
    let words = |word: &str, text: String| (word.to_owned(), text);
    assert_eq!(
        answer(&here.code(0), "disks"),
        words("yes", format!("this host has {disk}"))
    );
    assert_eq!(
        there,
        words("unknown", format!("the host must have {disk}"))
    );
    let gone = dir.path().join("gone.img");
    let (here, _) = with(&gone);
    let text = format!("this host does not have {}", arg(&gone));
    assert_eq!(answer(&here.code(1), "disks"), words("no", text));
}

/// Hosts that differ in more than features of CPUID.
#[test]
fn a_level_has_state_monitoring_and_registers() {
    let dir = scratch();
    let (host, file) = (dir.path().join("host"), dir.path().join("a.json"));
    run(["mock", "host", "--host", arg(&host)]).code(0);
    facts(&host, &file);
    let one: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let mut other = one.clone();
    let leaves = other["hvm"]["leaves"].as_array_mut().unwrap();
    for leaf in leaves {
        match (leaf["leaf"].as_u64(), leaf["subleaf"].as_u64()) {
            // The state of PKU is at another place.
            (Some(0xd), Some(9)) => leaf["ebx"] = 0x980.into(),
            (Some(0xa), _) => leaf["eax"] = 0x0730_0402.into(),
            _ => {}
        }
    }
    // RDCL_NO.
    other["pv"]["msrs"] = serde_json::json!([{ "index": 0x10a, "value": 1 }]);
    let second = dir.path().join("b.json");
    fs::write(&second, other.to_string()).unwrap();
    let level = ["plan", "--level", arg(&file), arg(&second)];
    let ran = run(level).code(0);
    let ran = ran.stdout_has("# HVM and PVH guests: without PKU\n");
    let ran = ran.stdout_has("# HVM and PVH guests: performance monitoring version 0\n");
    let ran = ran.stdout_has("\"0xa:eax=xxxxxxxxxxxxxxxxxxxxxxxx00000000\"]\n");
    ran.stdout_has("# PV guests: without RDCL_NO\n# PV guests: cpuid cannot hide RDCL_NO\n");
    let document = run(level.into_iter().chain(["--json"])).code(0).json();
    assert_eq!(document["levels"][1]["performance_monitoring"], 0);
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
    ran(plan).code(0).stdout_has("the host runs PVH guests");
}
