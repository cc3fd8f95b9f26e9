//! Xen's own `verify-stream-v2` accepts what `xsr save` writes for domains of every
//! kind, and so does `xsr verify`.
//!
//! Needs python3 and the unpacked package `xen-utils-4.17` (`cargo xtask peer-tools`), whose
//! directory is in `XSR_PEER_TOOLS`.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{arg, backend, image, run, scratch};

/// The directory of the script's package; `None`, with a message, if it is missing.
fn tools() -> Option<PathBuf> {
    let tools = std::env::var_os("XSR_PEER_TOOLS").map(PathBuf::from);
    if tools.is_none() {
        eprintln!(
            "SKIPPED: XSR_PEER_TOOLS is not set, so nothing was compared with Xen's \
             verify-stream-v2; `cargo xtask peer-tools` fetches it"
        );
    }
    tools
}

/// The output of Xen's script for an image that it accepts.
fn xen_verifies(tools: &Path, image: &Path) -> String {
    let output = Command::new("python3")
        .arg(tools.join("usr/lib/xen-4.17/bin/verify-stream-v2"))
        .args(["-v", "-f", "xl", "-i"])
        .arg(image)
        .env("PYTHONPATH", tools.join("usr/lib/xen-4.17/lib/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{}: {said}{}",
        image.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

#[test]
fn xens_script_accepts_what_the_mock_machine_saved() {
    let Some(tools) = tools() else {
        return;
    };
    let scratch = scratch();
    let host = scratch.path().join("host");
    for (kind, type_name, is_pv) in [
        ("pv", "x86 PV", true),
        ("pv32", "x86 PV", true),
        ("hvm", "x86 HVM", false),
        ("pvh", "x86 HVM", false),
    ] {
        for vcpus in [1, 3] {
            let name = format!("{kind}-{vcpus}");
            let image = scratch.path().join(format!("{name}.save"));
            let count = vcpus.to_string();
            run([
                "mock",
                "create",
                &name,
                "--host",
                arg(&host),
                "--type",
                kind,
                "--memory",
                "12M",
                "--vcpus",
                &count,
            ])
            .code(0);
            run(["save", &backend(&host), &name, arg(&image)]).code(0);
            run(["verify", arg(&image)]).code(0);
            let said = xen_verifies(&tools, &image);
            assert!(
                said.contains(&format!("Domain Header: {type_name} from Xen 4.17")),
                "{said}"
            );
            assert!(said.contains("Libxl Record: End"), "{said}");
            let contexts = said.matches("Libxc Record: x86 PV vcpu basic").count();
            assert_eq!(contexts, if is_pv { vcpus } else { 0 }, "{said}");
        }
    }
}

#[test]
fn xens_script_accepts_real_images_saved_again() {
    let Some(tools) = tools() else {
        return;
    };
    for name in ["tpv", "tpv-live", "tpvh", "tpvh-live"] {
        let scratch = scratch();
        let host = scratch.path().join("host");
        run(["restore", &backend(&host), arg(&image(name))]).code(0);
        let domains = run(["mock", "list", "--json", "--host", arg(&host)]).code(0);
        let domains = domains.json();
        let domain = domains["domains"][0]["name"].as_str().unwrap();
        let again = scratch.path().join("again.save");
        run(["save", &backend(&host), domain, arg(&again)]).code(0);
        run(["verify", arg(&again)]).code(0);
        let said = xen_verifies(&tools, &again);
        assert!(said.contains("Libxl Record: End"), "{said}");
    }
}
